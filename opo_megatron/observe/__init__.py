"""The output of a run: metrics, TensorBoard and W&B, the live table, the summary."""
