"""The policy: a Megatron-Core GPT, its schedules, its optimizer and the one training step."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
