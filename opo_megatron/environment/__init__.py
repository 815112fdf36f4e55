"""What is installed, whether nodes are fit to run, and the set of versions that works together."""
