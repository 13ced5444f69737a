"""Images: found in folders, read from any file, converted, and written as PNG."""
