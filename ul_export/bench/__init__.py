"""ul-bench: how fast a bundle runs."""
