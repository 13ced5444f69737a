"""Unified Latents training: encoder, prior and decoder together, then the base prior."""
