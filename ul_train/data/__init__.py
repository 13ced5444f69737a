"""Training images from any source: prepared once into a memory-mapped set, read by index."""
