"""The NVIDIA cards of this machine, by NVIDIA's own bindings (the package cuda-bindings)."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ul_runtime.errors import UsageError

VERSION = "0.1.0"  # of these packages


@dataclass(frozen=True)
class Card:
    """A card that programs can use: its number, name and architecture (sm90), and its memory in bytes."""

    number: int
    name: str
    architecture: str
    memory: int


def has_bindings() -> bool:
    """Whether cuda-bindings is installed."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


def driver_version() -> str | None:
    """The newest CUDA that the driver takes, for example 13.0; None without a driver. UsageError: no bindings."""
    _require_bindings()
    from cuda.bindings import runtime

    error, version = runtime.cudaDriverGetVersion()
    if error != runtime.cudaError_t.cudaSuccess or not version:
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def cards() -> list[Card]:
    """All cards. UsageError: no bindings; the runtime's reason where it cannot count them (no driver, too old)."""
    _require_bindings()
    from cuda.bindings import runtime

    error, count = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaErrorNoDevice:
        return []
    if error != runtime.cudaError_t.cudaSuccess:
        driver = driver_version()
        have = f"the driver takes CUDA {driver} at most" if driver else "there is no NVIDIA driver"
        raise UsageError(f"no NVIDIA card can be used: {error.name}: {have}")
    found = []
    for number in range(count):
        error, about = runtime.cudaGetDeviceProperties(number)
        if error != runtime.cudaError_t.cudaSuccess:
            raise UsageError(f"NVIDIA card {number} cannot be used: {error.name}")
        found.append(Card(number, about.name.decode(), f"sm{about.major}{about.minor}", about.totalGlobalMem))
    return found


def _require_bindings() -> None:
    if not has_bindings():
        raise UsageError("cuda-bindings is not installed; pip install 'unified-latents[gpu]'")


_ROOT = Path(__file__).parent.parent


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that this file lies in, with -dirty if it was changed; None for an installed package."""
    if not (_ROOT / ".git").exists():
        return None
    words = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return None
    return done.stdout.strip() or None


def origin(program: str, packages: Sequence[str]) -> dict[str, object]:
    """What the record of a measurement says of how it was made: versions, commit and the command of this process."""
    return {"versions": versions(packages), "commit": commit(), "command": anonymous(program, sys.argv[1:])}


def anonymous(program: str, arguments: Sequence[str]) -> str:
    """The command line, of each absolute path only its last part, also behind `=`: no folder of a machine."""
    return f"{program} {shlex.join(map(_anonymous_word, arguments))}"


def _anonymous_word(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


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
