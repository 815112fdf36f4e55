"""A batch on its way from an engine to the optimizer: rollouts, their statistics, redistribution over ranks, micro-batches, packing."""
