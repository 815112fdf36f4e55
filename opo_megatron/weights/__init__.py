"""Weights between Megatron and Hugging Face; the only package with both naming schemes."""

import opo_megatron.utils.quiet_megatron  # noqa: F401  before Megatron is imported
