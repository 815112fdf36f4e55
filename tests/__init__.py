"""Tests mirror the package's folders; what they share is in `support/`."""
