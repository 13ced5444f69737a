"""Engines on the disk, keyed by all that they depend on. An engine is code: only the user's own are ever opened.

One file an engine: a line of JSON (facts, size, SHA-256), then its bytes; written whole or not at all.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ul_runtime.backends.onnx_weights import with_weights
from ul_runtime.backends.tensorrt_build import (
    REFITTABLE,
    Library,
    Plan,
    Profile,
    Timings,
    build_engine,
    flags,
    library_on,
    refit_engine,
)
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, ULError, UntrustedError
from ul_runtime.files import durable
from ul_runtime.machine import engine_dir, gpus
from ul_runtime.manifest import GraphName
from ul_runtime.progress import Tick, silent

_LOG = logging.getLogger(__name__)
_MAGIC = b"unified-latents-engine 2\n"
_MOST_HEADER = 2**16
_SUFFIX = ".engine"
_ASK_S = 0.2  # between two looks at a lock
# what a difference in a fact is called, the most telling first
_CHANGES = {
    "library": "it was built by another library",
    "version": "the library is of another version",
    "gpu": "it was built for another GPU",
    "targets": "it was built for other architectures",
    "profile": "it takes other batches",
    "flags": "it was built otherwise",
    "graph_sha256": "the graph has changed",
    "weights_sha256": "the weights have changed",
}


@dataclass(frozen=True)
class Facts:
    """All that an engine depends on; equal facts, equal engine."""

    bundle: str  # its name
    graph: str
    graph_sha256: str
    weights_sha256: str
    library: str
    version: str
    targets: str  # sm80,sm89; empty = `gpu`
    gpu: str  # name and architecture of the GPU that it was built on and for; empty = `targets`
    profile: str  # batches: least, likeliest, most
    flags: str = ""

    @property
    def is_engine(self) -> bool:
        """False of what a library keeps beside its engines, which belongs to no graph."""
        return bool(self.graph_sha256)

    def serves(self, wanted: "Facts", batch: int | None) -> bool:
        """Whether an engine with these facts does for `wanted`: with more architectures and flags, or larger batches.

        The batches that it has to take are up to `batch`, or, None, exactly those of `wanted`.
        """
        targets, flags = set(self.targets.split(",")), set(self.flags.split(", "))
        if replace(self, targets=wanted.targets, profile=wanted.profile, flags=wanted.flags) != wanted:
            return False
        if not flags >= set(wanted.flags.split(", ")):
            return False
        right = self.profile == wanted.profile if batch is None else batch <= self.most
        return right and targets >= set(wanted.targets.split(","))

    @property
    def most(self) -> int:
        """The largest batch."""
        return int(self.profile.rpartition(",")[2])

    @property
    def file_name(self) -> str:
        """Readable in front, unique by its end."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{_stem(self.bundle, self.graph)}{digest[:32]}{_SUFFIX}"


@dataclass(frozen=True)
class Entry:
    """A file of the cache: its facts, or what is wrong with it."""

    path: Path
    size: int
    facts: Facts | None
    problem: str = ""
    trusted: bool = True  # False: not the user's own


class EngineCache:
    """The engines in one folder, which nobody but its owner may write to."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))

    def load(self, facts: Facts) -> bytes | None:
        """The engine with these facts; None if there is none, or it is damaged. UntrustedError: not the user's own."""
        path = self.folder / facts.file_name
        if not os.path.lexists(path):
            return None
        try:
            found, engine = _read(path)
        except BadInputError:
            return None
        return engine if found == facts else None

    def find(self, facts: Facts, batch: int | None = None) -> bytes | None:
        """What does for `facts` (see Facts.serves), of several engines that for the smallest batches; None: none does.

        UntrustedError: not the user's own.
        """
        if batch is None and (engine := self.load(facts)) is not None:
            return engine
        able = [other for other in self._headers(facts) if other.serves(facts, batch)]
        for other in sorted(able, key=lambda other: other.most):
            if (engine := self.load(other)) is not None:
                return engine
        return None

    def _headers(self, facts: Facts) -> Iterator[Facts]:
        """Of the engines of the same graph of the same bundle; their bytes are not read."""
        for path in sorted(self.folder.glob(f"{_stem(facts.bundle, facts.graph)}*{_SUFFIX}")):
            with suppress(BadInputError), _opened(path) as stream:
                yield _header(stream, path)[0]

    def with_other_weights(self, facts: Facts, flag: str, batch: int | None = None) -> Facts | None:
        """Of an engine that would do for `facts` with its own weights, and was built with `flag`."""
        for other in self._headers(facts):
            same = replace(other, weights_sha256=facts.weights_sha256)
            if flag in other.flags.split(", ") and same.serves(facts, batch):
                return other
        return None

    def store(self, facts: Facts, engine: bytes) -> Path:
        """Keep an engine, whole or not at all. OutputError; UntrustedError: others may write to the folder."""
        self.make_folder()
        digest = hashlib.sha256(engine).hexdigest()
        header = json.dumps({"facts": asdict(facts), "size": len(engine), "sha256": digest}, sort_keys=True)
        path = self.folder / facts.file_name
        durable.atomic_write(path, _MAGIC + header.encode() + b"\n" + engine)
        return path

    @contextmanager
    def building(self, facts: Facts, tick: Tick) -> Iterator[None]:
        """While this process builds an engine; two at once would do the same work twice. OutputError; StoppedError."""
        self.make_folder()
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            waited = False
            while not _locked(fd):
                if not waited:
                    _LOG.warning("%s: another process builds an engine in %s; waiting for it", facts.graph, self.folder)
                waited = True
                tick(0)
                time.sleep(_ASK_S)
            yield
        finally:
            os.close(fd)

    def check_folder(self) -> None:
        """BadInputError: no folder. UntrustedError: others may write to it."""
        if not self.folder.is_dir():
            raise BadInputError(f"{self.folder}: is no folder; give --engines one")
        _check_own(self.folder, self.folder.lstat())

    def make_folder(self) -> None:
        """Make it, or see that it is the user's own. OutputError; UntrustedError: others may write to it."""
        if not self.folder.is_dir():
            durable.make_directory(self.folder)
            self.folder.chmod(0o700)
        self.check_folder()

    def why(self, facts: Facts) -> str:
        """Why an engine with these facts has to be built: what the nearest one that is there has different."""
        near = [entry for entry in self.entries() if entry.path.name.startswith(_stem(facts.bundle, facts.graph))]
        for entry in near:
            if entry.path.name == facts.file_name:
                return f"the one that is there is damaged: {entry.problem}"
        known = [entry.facts for entry in near if entry.facts is not None]
        if not known:
            return "there is none yet"
        changes = min((_changes(facts, other) for other in known), key=len)
        return "; ".join(changes)

    def entries(self) -> Iterator[Entry]:
        """All engines, by name; the bytes of each are checked."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            size = path.lstat().st_size
            try:
                facts, _ = _read(path)
            except (BadInputError, UntrustedError) as error:
                yield Entry(path, size, None, str(error), not isinstance(error, UntrustedError))
            else:
                yield Entry(path, size, facts)


def _stem(bundle: str, graph: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', bundle)[:64]}.{graph}."


def _changes(wanted: Facts, other: Facts) -> list[str]:
    mine, theirs = asdict(wanted), asdict(other)
    told = []
    for name, text in _CHANGES.items():
        if mine[name] != theirs[name]:
            shown = "" if name.endswith("sha256") else f" ({theirs[name] or 'none'}, now {mine[name] or 'none'})"
            told.append(text + shown)
    return told


def _locked(fd: int) -> bool:
    """Whether the lock is now this process's."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_own(path: Path, status: os.stat_result) -> None:
    """UntrustedError unless the path belongs to this user and no other may write to it."""
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        advice = "give --engines a folder of your own (chmod 700)" if stat.S_ISDIR(status.st_mode) else "remove it"
        raise UntrustedError(
            f"{path}: belongs to another user or others may write to it; an engine runs as code: {advice}"
        )


def _read(path: Path) -> tuple[Facts, bytes]:
    """BadInputError: not an engine of ours, or damaged. UntrustedError: not the user's own, or not a plain file."""
    with _opened(path) as stream:
        facts, size, digest = _header(stream, path)
        engine = stream.read()
    if len(engine) != size:
        raise BadInputError(f"{path}: damaged: {len(engine)} bytes, its header says {size}")
    if hashlib.sha256(engine).hexdigest() != digest:
        raise BadInputError(f"{path}: damaged: its SHA-256 is not that of its header")
    return facts, engine


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    _check_own(path.parent, path.parent.lstat())
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BadInputError(f"{path}: cannot open: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise UntrustedError(f"{path}: not a plain file; remove it")
    with os.fdopen(fd, "rb") as stream:
        _check_own(path, status)
        yield stream


def _header(stream: BinaryIO, path: Path) -> tuple[Facts, int, str]:
    """Its facts, and size and SHA-256 of the engine that follows. BadInputError."""
    if stream.read(len(_MAGIC)) != _MAGIC:
        raise BadInputError(f"{path}: not an engine of this program")
    try:
        record: dict[str, Any] = json.loads(stream.readline(_MOST_HEADER))
        return Facts(**record["facts"]), int(record["size"]), str(record["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{path}: damaged header") from error


class Prepared(NamedTuple):
    """An engine, and why it was built: None if it was there."""

    engine: bytes
    built_because: str | None


@dataclass(frozen=True)
class Engines:
    """Engines by one library, for `targets` or else for `gpu`, in one cache."""

    library: Library
    cache: EngineCache
    profile: Profile
    targets: tuple[str, ...] = ()
    gpu: str = ""
    refittable: bool = False

    @property
    def batches(self) -> str:
        """As Facts.profile."""
        return f"1,{self.profile.likely},{self.profile.most}"

    def facts(self, bundle: Bundle, graph: GraphName, *, float32: bool = False) -> Facts:
        """What the engine of a graph depends on."""
        entry, files = bundle.manifest.all_graphs[graph], bundle.manifest.files
        file = entry.float32_file or entry.file if float32 else entry.file
        return Facts(
            bundle=bundle.manifest.name,
            graph=graph,
            graph_sha256=files[file].sha256,
            weights_sha256=files[entry.weights].sha256,
            library=self.library.name,
            version=self.library.version,
            targets=",".join(self.targets),
            gpu="" if self.targets else self.gpu,
            profile=self.batches,
            flags=flags(self.library, refittable=self.refittable),
        )

    def kept(self, what: str) -> Facts:
        """Of what the library keeps beside its engines, whatever their graphs."""
        return Facts("any", what, "", "", self.library.name, self.library.version, ",".join(self.targets), self.gpu, "")

    def engine(
        self,
        bundle: Bundle,
        graph: GraphName,
        *,
        float32: bool = False,
        batch: int | None = None,
        tick: Tick = silent,
    ) -> Prepared:
        """The engine of a graph, for batches up to `batch` at least. A message says why, where it has to be built.

        Errors are those of `build_engine`.
        """
        facts = self.facts(bundle, graph, float32=float32)
        if (engine := self.cache.find(facts, batch)) is not None:
            return Prepared(engine, None)
        if batch is not None and batch > self.profile.most:
            larger = replace(self, profile=replace(self.profile, most=batch))
            return larger.engine(bundle, graph, float32=float32, tick=tick)
        plan = self._plan(bundle, graph, float32)
        if self.gpu and (refitted := self._refitted(facts, plan, batch)) is not None:
            return Prepared(refitted, "the weights have changed")
        with self.cache.building(facts, tick):
            if (engine := self.cache.find(facts, batch)) is not None:  # another process has built it
                return Prepared(engine, None)
            return self._build(facts, plan, tick)

    def _plan(self, bundle: Bundle, graph: GraphName, float32: bool) -> Plan:
        onnx = with_weights(bundle.graph(graph, float32=float32), bundle.initializers(graph))
        inputs, timings = bundle.manifest.all_graphs[graph].inputs, None
        if self.library.kind.keeps_timings:
            timings = Timings(self.cache.load(self.kept("timings")) or b"")
        return Plan(str(bundle.path), graph, onnx, inputs, self.profile, self.targets, timings, self.refittable)

    def _build(self, facts: Facts, plan: Plan, tick: Tick) -> Prepared:
        why = self.cache.why(facts)
        _LOG.warning("%s: building an engine by %s: %s", facts.graph, self.library.title, why)
        engine = build_engine(self.library, plan, tick)
        self.cache.store(facts, engine)
        if plan.timings is not None:
            self.cache.store(self.kept("timings"), plan.timings.data)
        return Prepared(engine, why)

    def _refitted(self, facts: Facts, plan: Plan, batch: int | None) -> bytes | None:
        """An engine that is there with these weights put in, and kept; None, logged why, where that does not work."""
        other = self.cache.with_other_weights(facts, REFITTABLE, batch)
        if other is None or (old := self.cache.load(other)) is None:
            return None
        _LOG.warning("%s: new weights into the engine that is there, by %s", facts.graph, self.library.title)
        try:
            engine = refit_engine(self.library, old, plan.onnx, plan.where)
        except ULError as error:
            _LOG.warning("%s: it has to be built, its weights cannot be replaced: %s", facts.graph, error)
            return None
        self.cache.store(replace(other, weights_sha256=facts.weights_sha256), engine)
        return engine


def engines_for_gpu(number: int, folder: Path | None = None) -> Engines:
    """Engines that a GPU of this machine runs, in `folder` or the user's cache. UsageError: no library for it."""
    gpu = gpus()[number]
    library = library_on(gpu.architecture)
    targets = (gpu.architecture,) if library.targets() else ()
    return Engines(library, EngineCache(engine_dir(folder)), Profile(), targets, f"{gpu.name}, {gpu.architecture}")
