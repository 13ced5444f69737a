"""Where a user's prepared images and engines are kept."""

import os
from pathlib import Path


def cache_dir(given: Path | None = None) -> Path:
    """`given`, else $UL_CACHE, else the user's cache."""
    if given is not None:
        return given
    if os.environ.get("UL_CACHE"):
        return Path(os.environ["UL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unified-latents"


def engine_dir(given: Path | None = None) -> Path:
    """The folder of engines: `given`, or one in the cache."""
    return cache_dir() / "engines" if given is None else given
