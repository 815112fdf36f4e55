"""Process groups, the CPU backend, and the launcher of ranks."""
