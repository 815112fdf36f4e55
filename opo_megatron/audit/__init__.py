"""Digests of every step's rollouts and weights, by which two runs are compared."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
