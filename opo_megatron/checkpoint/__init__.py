"""Checkpoints: saving, loading, retention, and conversion to and from Hugging Face folders."""
