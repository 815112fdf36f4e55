"""`opo replay`: repeats a step of a run and compares it with the record."""
