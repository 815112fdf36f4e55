"""Checkpoints: save, load, retention, and conversion to and from Hugging Face folders."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
