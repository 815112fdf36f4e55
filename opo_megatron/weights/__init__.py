"""Megatron ↔ Hugging Face: the only room that knows both naming schemes."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
