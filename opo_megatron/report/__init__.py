"""One page that compares runs, made from what they wrote; training never imports it."""
