"""Where the arithmetic of a step is: the head, one sweep over the vocabulary."""
