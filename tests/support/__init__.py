"""What tests share: fixtures, reference implementations, tiny runs, and workers that run as ranks."""
