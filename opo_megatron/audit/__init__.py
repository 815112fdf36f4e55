"""Digests of every step's rollouts and weights, by which two runs are compared."""
