"""The TensorRT libraries, their differences in one table, and the only file that imports them.

TensorRT 10.12 and newer, 11, and TensorRT-RTX 1.7 have one API. All networks are strongly typed: precision is what the
ONNX graph says, and there is no flag for it.
"""

import importlib
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

from ul_runtime.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """What one library does otherwise than another."""

    title: str  # in messages
    module: str
    extra: str  # of pip install 'unified-latents[...]'
    oldest: tuple[int, ...]
    builds_ahead: bool  # for architectures that it is told, on a machine without a card
    keeps_timings: bool  # chooses kernels by measuring them, and can be given earlier measurements
    compiles_late: bool  # compiles kernels when an engine first runs, and can be given what it compiled before
    user_allocation: bool  # has to be told that an engine may allocate nothing as it runs, without which no capture


KINDS = {
    "tensorrt": Kind(
        "TensorRT",
        "tensorrt",
        "tensorrt",
        (10, 12),
        False,
        keeps_timings=True,
        compiles_late=False,
        user_allocation=False,
    ),
    "tensorrt-rtx": Kind(
        "TensorRT-RTX",
        "tensorrt_rtx",
        "tensorrt-rtx",
        (1, 7),
        True,
        keeps_timings=False,
        compiles_late=True,
        user_allocation=True,
    ),
}


@dataclass
class Library:
    """An imported library: `api` is its module, `log` what it last warned of, newest last."""

    name: str
    kind: Kind
    api: Any
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """One logger: the library keeps the first that a process gives it, whatever comes later."""
        api, log = self.api, self.log

        class Logger(api.ILogger):  # type: ignore[name-defined]
            def log(self, severity: Any, message: str) -> None:
                if severity <= api.ILogger.Severity.WARNING:
                    log.append(f"{severity.name.lower()}: {message}")

        self.logger = Logger()

    @property
    def version(self) -> str:
        """For example 1.7.1.116."""
        return str(self.api.__version__)

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.kind.title} {self.version}"

    @property
    def last(self) -> str:
        """What it last complained of."""
        return self.log[-1] if self.log else "no reason given"

    def targets(self) -> list[str]:
        """The architectures that it can be told to build for; none where it builds for the machine's card alone."""
        if not self.kind.builds_ahead:
            return []
        names = [name.lower() for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
        return sorted(names, key=lambda name: int(name[2:]))

    def check_targets(self, targets: tuple[str, ...]) -> None:
        """UsageError for an architecture that the library does not build for."""
        for target in targets:
            if target not in self.targets():
                able = ", ".join(self.targets()) or "only for the card of the machine it runs on"
                raise UsageError(f"{self.title} does not build for {target!r}; it builds for {able}")


def installed() -> list[str]:
    """Names of the libraries that are installed; the first is the one to prefer."""
    return [name for name, kind in KINDS.items() if find_spec(kind.module) is not None]


@cache
def open_library(name: str) -> Library:
    """Import `tensorrt` or `tensorrt-rtx`. UsageError: not installed, or too old."""
    kind = KINDS[name]
    if find_spec(kind.module) is None:
        raise UsageError(f"{kind.title} is not installed; pip install 'unified-latents[{kind.extra}]'")
    try:
        api = importlib.import_module(kind.module)
    except (ImportError, OSError) as error:
        raise UsageError(f"{kind.title} is installed and cannot be loaded: {error}") from error
    if not hasattr(api, "Builder"):
        raise UsageError(f"the package {kind.module} holds no library; install {kind.title} as its maker says")
    version = tuple(int(part) for part in str(api.__version__).split(".")[:2])
    if version < kind.oldest:
        oldest = ".".join(map(str, kind.oldest))
        raise UsageError(f"{kind.title} {api.__version__} is installed; expected {oldest} or newer: upgrade it")
    return Library(name, kind, api)


def library_for(targets: tuple[str, ...]) -> Library:
    """The library that builds for these architectures (none = for this machine's card). UsageError: there is none."""
    able = [name for name in installed() if KINDS[name].builds_ahead or not targets]
    if not able:
        wanted = [kind for kind in KINDS.values() if kind.builds_ahead or not targets]
        ways = " or ".join(f"pip install 'unified-latents[{kind.extra}]'" for kind in wanted)
        raise UsageError(f"{' or '.join(kind.title for kind in wanted)} is not installed; {ways}")
    library = open_library(able[0])
    library.check_targets(targets)
    return library


def library_on(architecture: str) -> Library:
    """The library that runs on a card of this architecture. UsageError: there is none, with the reason of each."""
    reasons = []
    for name in installed():
        library = open_library(name)
        if not library.targets() or architecture in library.targets():
            return library
        reasons.append(f"{library.title} has {', '.join(library.targets())} and not {architecture}")
    lacking = [kind for name, kind in KINDS.items() if name not in installed()]
    reasons += [f"{kind.title} is not installed: pip install 'unified-latents[{kind.extra}]'" for kind in lacking]
    raise UsageError(f"no TensorRT for a card of {architecture}: {'; '.join(reasons)}")
