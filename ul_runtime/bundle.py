"""A bundle: a directory of graphs and weights that is verified before any parser sees a byte.

Closed world (every file listed, nothing else there), regular files only, sizes, SHA-256. Each file is opened and
read once, so what is parsed is what was hashed.
"""

import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ul_runtime import durable
from ul_runtime.errors import BadInputError, UntrustedError, UsageError
from ul_runtime.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    BundleInfo,
    FileEntry,
    GraphName,
    Manifest,
    check_file_name,
    manifest_bytes,
    parse_manifest,
)

_CHUNK = 2**20
# bfloat16 has no numpy type: its bits come as uint16, which no bundle stores otherwise.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass
class Bundle:
    """A verified bundle: its manifest and the verified bytes of its files, held until taken."""

    path: Path
    manifest: Manifest
    hash: str
    _held: dict[str, bytes] = field(repr=False)

    @classmethod
    def open(
        cls, path: Path, *, graphs: Collection[GraphName] = GRAPH_NAMES, allow_hard_links: bool = False
    ) -> "Bundle":
        """Verify the bundle at `path`, reading the files that `graphs` need (of the others: presence, kind, size).

        `allow_hard_links` is for the bundle inside an installed package: installers link from their cache.
        BadInputError: damaged, incomplete, newer format. UntrustedError: links, escapes, kinds that run code.
        """
        path = Path(path)
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            message = f"{path}: cannot open: {error.strerror}; expected a bundle, the folder that ul-export wrote"
            raise BadInputError(message) from error
        try:
            reader = _Reader(path, folder, allow_hard_links)
            names = reader.names()
            if MANIFEST_NAME not in names:
                raise BadInputError(
                    f"{path}: not a bundle: there is no {MANIFEST_NAME} in it; expected a folder of ul-export"
                )
            data = reader.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
            manifest = parse_manifest(data, str(path / MANIFEST_NAME))
            reader.check_closed(names, manifest)
            unused = {g for name in GRAPH_NAMES if name not in graphs for g in _files_of(manifest, name)}
            unused -= {g for name in graphs for g in _files_of(manifest, name)}
            held = {}
            for name, entry in manifest.files.items():
                content = reader.read_entry(name, entry, skip=name in unused)
                if content is not None:
                    held[name] = content
        finally:
            os.close(folder)
        return cls(path, manifest, hashlib.sha256(data).hexdigest(), held)

    def read(self, name: str) -> bytes:
        """Verified bytes of a file. KeyError: unknown, or of a graph that `open` left out."""
        return self._held[name]

    def holds(self, graph: GraphName) -> bool:
        """Whether `open` read the files of a graph."""
        return all(name in self._held for name in _files_of(self.manifest, graph))

    def graph(self, graph: GraphName, *, float32: bool = False) -> bytes:
        """Verified ONNX bytes of a step graph, without weights; `float32`: the one that computes in float32."""
        entry = self.manifest.graphs[graph]
        return self.read(entry.float32_file or entry.file if float32 else entry.file)

    def initializers(self, graph: GraphName) -> dict[str, np.ndarray]:
        """Weights of a step graph by initializer name; bfloat16 as its bits in uint16. BadInputError."""
        name = self.manifest.graphs[graph].weights
        return parse_weights(self.read(name), str(self.path / name))


def _files_of(manifest: Manifest, graph: GraphName) -> list[str]:
    entry = manifest.graphs[graph]
    return [name for name in (entry.file, entry.weights, entry.float32_file) if name is not None]


@dataclass(frozen=True)
class _Reader:
    """Reads regular files of one directory, by its descriptor, never through a link."""

    path: Path
    folder: int
    allow_hard_links: bool

    def names(self) -> set[str]:
        """Names in the directory, refused as soon as there are too many."""
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in islice(entries, MAX_FILES + 2)]
        if len(names) > MAX_FILES + 1:
            raise BadInputError(f"{self.path}: not a bundle: more than {MAX_FILES + 1} files in it")
        return set(names)

    def check_closed(self, names: set[str], manifest: Manifest) -> None:
        """Every listed file is there and nothing else."""
        listed = {*manifest.files, MANIFEST_NAME}
        if missing := sorted(listed - names):
            raise BadInputError(f"{self.path / missing[0]}: missing; copy or export the bundle again")
        if extra := sorted(names - listed):
            raise BadInputError(f"{self.path}: {extra[0]!a} is not in the manifest; remove it or export again")

    def _open(self, name: str) -> int:
        """A descriptor of a regular file with no other name."""
        where = self.path / name
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            if not stat.S_ISREG(os.stat(name, dir_fd=self.folder, follow_symlinks=False).st_mode):
                raise UntrustedError(f"{where}: a link, pipe, device or folder; a bundle holds plain files only")
            fd = os.open(name, flags, dir_fd=self.folder)
        except OSError as error:
            raise BadInputError(f"{where}: cannot open: {error.strerror}") from error
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and (status.st_nlink <= 1 or self.allow_hard_links):
            return fd
        os.close(fd)
        raise UntrustedError(f"{where}: has {status.st_nlink} names (hard links); copy the bundle with cp -r first")

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file that must not be larger than `limit`."""
        with os.fdopen(self._open(name), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise BadInputError(f"{self.path / name}: {size} bytes; at most {limit} are allowed")
            return stream.read(size)

    def read_entry(self, name: str, entry: FileEntry, *, skip: bool) -> bytes | None:
        """Bytes of a listed file, equal to its entry in size and SHA-256; with `skip`, only kind and size."""
        where = self.path / name
        with os.fdopen(self._open(name), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = b"" if skip or size != entry.size else stream.read(entry.size)
        if size != entry.size:
            raise BadInputError(f"{where}: {size} bytes, the manifest says {entry.size}; copy or export it again")
        if skip:
            return None
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            message = f"SHA-256 is {found}, the manifest says {entry.sha256}; copy or export it again"
            raise BadInputError(f"{where}: {message}")
        return data


def parse_weights(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file by name; bfloat16 as its bits in uint16. BadInputError, UntrustedError."""
    from safetensors import SafetensorError, deserialize

    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise UntrustedError(f"{where}: a pickle or zip, not safetensors; it can run code and is not opened")
    try:
        tensors = deserialize(data)
    except SafetensorError as error:
        raise BadInputError(f"{where}: not a safetensors file: {error}; export the bundle again") from error
    arrays = {}
    for name, fields in tensors:
        tensor: dict[str, Any] = dict(fields)
        if tensor["dtype"] not in _DTYPES:
            raise BadInputError(f"{where}: {name[:100]!a} is {tensor['dtype']}; expected {', '.join(_DTYPES)}")
        arrays[name] = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return arrays


def write_bundle(out: Path, info: BundleInfo, files: Mapping[str, bytes | Path], *, overwrite: bool = False) -> Bundle:
    """Write a bundle at `out`, whole or not at all, hashes computed here; returns it as verified.

    `files`: name in the bundle -> its bytes, or a file to copy. UsageError: `out` exists (with `overwrite`, a
    bundle there is replaced in one step, other things still refuse). BadInputError: `info` and `files` disagree.
    """
    out = Path(os.path.abspath(out))
    replaced = _check_target(out, overwrite)
    durable.sweep(out.parent, out.name)
    with durable.temporary_directory_beside(out) as temporary:
        entries = {}
        for name, source in files.items():
            check_file_name(name, str(out))
            entries[name] = _write_entry(temporary / name, source)
        durable.write_file(temporary / MANIFEST_NAME, [manifest_bytes(info, entries)])
        bundle = Bundle.open(temporary)
        (durable.replace_directory if replaced else durable.commit_directory)(temporary, out)
    return replace(bundle, path=out)


def _check_target(out: Path, overwrite: bool) -> bool:
    """Whether a bundle has to be replaced. UsageError when something is in the way."""
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return False
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out}: exists and is not a bundle; choose another name")
    if not overwrite:
        raise UsageError(f"{out}: a bundle is there already; choose another name or allow overwriting")
    return True


def _write_entry(path: Path, source: bytes | Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0

    def hashed(chunks: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    if isinstance(source, bytes):
        durable.write_file(path, hashed(iter([source])))
    else:
        try:
            stream = source.open("rb")
        except OSError as error:
            raise BadInputError(f"{source}: cannot read: {error.strerror}") from error
        with stream:
            durable.write_file(path, hashed(iter(lambda: stream.read(_CHUNK), b"")))
    return FileEntry(sha256=digest.hexdigest(), size=size)
