"""This machine: what is to run on it (options), its NVIDIA GPUs, versions, the user's cache."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from ul_runtime.errors import UsageError
from ul_runtime.install import install
from ul_runtime.settings import option, threads_option

VERSION = "0.1.0"  # of these packages


@dataclass(frozen=True)
class MachineOptions:
    """Which bundle, what runs its graphs, and on which cores and GPUs. UsageError: devices that cannot be."""

    backend: str = option("auto", "What runs the graphs.", metavar="auto|ort-cpu|openvino|tensorrt|ort-cuda|torch")
    precision: str | None = option(None, "What the networks compute in.", metavar="fp32|bf16", shown="the bundle's")
    threads: int | None = threads_option()
    spinning: bool = option(
        True, "Let idle threads spin (ort-cpu): faster, keeps cores busy.", "--spinning/--no-spinning"
    )
    devices: str | None = option(None, "GPU indices, one process each.", metavar="N,...", shown="0")
    engines: Path | None = option(None, "Where TensorRT engines are kept.", metavar="DIR", shown="the user's cache")
    require_graphs: bool = option(False, "Fail where a step cannot be captured as a CUDA graph.", "--require-graphs")
    expect_hash: str | None = option(
        None, "Refuse the bundle unless this is its hash, as ul-export printed it.", metavar="HASH", shown="any"
    )

    def __post_init__(self) -> None:
        words = [] if self.devices is None else self.devices.split(",")
        if not all(word.strip().isdecimal() for word in words) or len(set(map(int, words))) != len(words):
            raise UsageError(f"--devices {self.devices!r}: expected different GPU indices such as 0,1; see ul-doctor")

    @property
    def gpus(self) -> list[int]:
        """The indices of `devices`; none where it is not given."""
        return [] if self.devices is None else [int(word) for word in self.devices.split(",")]

    @property
    def gpu(self) -> int:
        """The index of the first."""
        return self.gpus[0] if self.devices is not None else 0

    @property
    def wants_gpu(self) -> bool:
        """Whether something is asked for that only a GPU has."""
        return self.devices is not None or self.engines is not None or self.require_graphs

    def of_backend(self, name: str) -> "MachineOptions":
        """The same for the backend that `auto` took."""
        return replace(self, backend=name, engines=self.engines if name == "tensorrt" else None)


@dataclass(frozen=True)
class OneGpuOptions(MachineOptions):
    """Of a command that works on one GPU. UsageError: several are named."""

    devices: str | None = option(None, "GPU index.", metavar="N", shown="0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.gpus) > 1:
            raise UsageError(f"--devices {self.devices}: one GPU is expected; ul-generate alone works on several")


@dataclass(frozen=True)
class Gpu:
    """A GPU that programs can use: its number, name and architecture (sm90), and its memory in bytes."""

    number: int
    name: str
    architecture: str
    memory: int


def has_bindings() -> bool:
    """Whether cuda-core and cuda-bindings are installed."""
    return find_spec("cuda") is not None and None not in (find_spec("cuda.core"), find_spec("cuda.bindings"))


def driver_version() -> str | None:
    """The newest CUDA that the driver takes, for example 13.0; None without a driver. UsageError: no bindings."""
    _require_bindings()
    from cuda.bindings import runtime

    error, version = runtime.cudaDriverGetVersion()
    if error != runtime.cudaError_t.cudaSuccess or not version:
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def gpus() -> list[Gpu]:
    """All GPUs. UsageError: no bindings; the runtime's reason where it cannot count them (no driver, too old)."""
    _require_bindings()
    from cuda.bindings import runtime

    error, count = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaErrorNoDevice:
        return []
    if error != runtime.cudaError_t.cudaSuccess:
        driver = driver_version()
        have = f"the driver takes CUDA {driver} at most" if driver else "there is no NVIDIA driver"
        raise UsageError(f"no NVIDIA GPU can be used: {error.name}: {have}")
    found = []
    for number in range(count):
        error, about = runtime.cudaGetDeviceProperties(number)
        if error != runtime.cudaError_t.cudaSuccess:
            raise UsageError(f"NVIDIA GPU {number} cannot be used: {error.name}")
        found.append(Gpu(number, about.name.decode(), f"sm{about.major}{about.minor}", about.totalGlobalMem))
    return found


def _require_bindings() -> None:
    if not has_bindings():
        raise UsageError(f"cuda-core is not installed; {install('gpu')}")


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


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_dir(given: Path | None = None) -> Path:
    """`given`, else $UL_CACHE, else the user's cache. UsageError: the user has no home."""
    try:
        return given or Path(os.environ.get("UL_CACHE") or platformdirs.user_cache_path("unified-latents"))
    except RuntimeError as error:  # no HOME, and no entry for the user
        raise UsageError("this user has no home folder for a cache; set UL_CACHE to a folder for it") from error


def in_units(size: float) -> str:
    """Bytes in the unit that fits: `13.2 KiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def engine_dir(given: Path | None = None) -> Path:
    """The folder of engines: `given`, or one in the cache."""
    return given or cache_dir() / "engines"
