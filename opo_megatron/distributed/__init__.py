"""Process groups, the CPU backend of Megatron-Core, and the rank launcher."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
