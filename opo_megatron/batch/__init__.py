"""A batch on its way from an engine to the optimizer: rollouts, their statistics, redistribution over ranks, micro-batches, packing."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
