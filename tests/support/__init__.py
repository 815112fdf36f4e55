"""Shared by tests: fixtures, reference implementations, tiny runs, and workers that run as ranks."""
