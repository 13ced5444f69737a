"""Unified Latents runtime: samples a bundle without torch (arXiv 2602.17270)."""

__version__ = "0.1.0"
