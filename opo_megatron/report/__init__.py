"""One page that compares runs, made from their files; training never imports it."""
