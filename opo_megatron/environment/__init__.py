"""Checks of installed packages and of nodes, and the set of versions that work together."""
