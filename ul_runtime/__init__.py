"""Unified Latents runtime: samples a bundle without torch (arXiv 2602.17270)."""

from typing import TYPE_CHECKING, Any

from ul_runtime.machine import VERSION

if TYPE_CHECKING:
    from ul_runtime.images.find import read_images
    from ul_runtime.loading import load

__all__ = ["load", "read_images"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """What is offered, imported when it is first used: commands that only print help stay fast."""
    if name == "load":
        from ul_runtime.loading import load

        return load
    if name == "read_images":
        from ul_runtime.images.find import read_images

        return read_images
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
