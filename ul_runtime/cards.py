"""The NVIDIA cards of this machine, by NVIDIA's own bindings (the package cuda-bindings)."""

from dataclasses import dataclass
from importlib.util import find_spec

from ul_runtime.errors import UsageError


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
