"""The policy: a Megatron-Core GPT, its micro-batch schedules, its optimizer, its training step."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
