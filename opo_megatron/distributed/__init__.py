"""Process groups, the CPU backend, and the launcher of ranks."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
