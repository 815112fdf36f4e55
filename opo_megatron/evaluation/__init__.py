"""Held-out evaluation during training, and `opo eval`."""
