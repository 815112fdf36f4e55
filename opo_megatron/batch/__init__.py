"""A batch from engine to optimizer: rollouts, statistics, redistribution, micro-batches, packing."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
