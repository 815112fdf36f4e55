"""The server's package of exact mode without one operation, which the variable ALTERED names."""
