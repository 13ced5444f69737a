"""Unified Latents runtime: samples a bundle without torch (arXiv 2602.17270)."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ul_runtime.pipeline import Pipeline

__version__ = "0.1.0"


def load(
    path: str | Path, *, backend: str = "auto", threads: int | None = None, allow_spinning: bool = True
) -> "Pipeline":
    """The verified bundle at `path`, ready to generate, encode and decode; graphs are built when first used.

    `threads` None = one per core. UsageError: unknown backend. BadInputError, UntrustedError: see Bundle.open.
    """
    from ul_runtime.backends import open_backend
    from ul_runtime.bundle import Bundle
    from ul_runtime.pipeline import Pipeline

    bundle = Bundle.open(Path(path))
    return Pipeline(bundle, open_backend(backend, bundle, threads=threads, allow_spinning=allow_spinning))
