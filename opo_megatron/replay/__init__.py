"""`opo replay`: a step of a run is done again and compared with what was recorded."""
