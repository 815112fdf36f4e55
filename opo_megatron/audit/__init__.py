"""Digests of every step's rollouts and weights, for comparing runs."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
