"""ul-tune: the cheapest settings that are as good as the reference."""
