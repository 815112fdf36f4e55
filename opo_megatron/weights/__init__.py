"""Megatron ↔ Hugging Face: the only room that knows both naming schemes."""
