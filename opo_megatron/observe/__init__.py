"""What a run writes and shows: metrics, TensorBoard, the live table, the summary."""
