"""Unified Latents export: a run directory to a verified bundle."""
