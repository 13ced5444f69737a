"""A bundle: a directory of graphs and weights that is verified before any engine sees a byte.

Closed world (every file listed, nothing else there), regular files only, sizes, SHA-256, and graphs that are what the
manifest says. Each file is opened and read once, so what is parsed is what was hashed.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.files import durable
from ul_runtime.files.closed_folder import Kind, closed_folder
from ul_runtime.files.safe_tensors import reading_safetensors
from ul_runtime.graph_check import check_graph
from ul_runtime.manifest import (
    MANIFEST_NAME,
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
_KIND = Kind("bundle", "a bundle, the folder that ul-export wrote", "the manifest", "copy or export it again")
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
        cls,
        path: Path,
        *,
        graphs: Collection[GraphName] | None = None,
        allow_hard_links: bool = False,
        expect: str | None = None,
    ) -> "Bundle":
        """Verify the bundle at `path`, reading the files that `graphs` need (of the others: presence, kind, size).

        `graphs` None = all, those of students too.

        `allow_hard_links` is for the bundle inside an installed package: installers link from their cache. `expect` is
        the hash that it must have.
        BadInputError: damaged, incomplete, another hash, newer format, graphs that are not what the manifest says.
        UntrustedError: links, escapes, kinds that run code.
        """
        path = Path(path)
        with closed_folder(path, _KIND, allow_hard_links=allow_hard_links) as folder:
            names = folder.names()
            if MANIFEST_NAME not in names:
                raise BadInputError(
                    f"{path}: not a bundle: there is no {MANIFEST_NAME} in it; expected a folder of ul-export"
                )
            data = folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
            _check_expected(path, expect, found := hashlib.sha256(data).hexdigest())
            manifest = parse_manifest(data, str(path / MANIFEST_NAME))
            folder.check_closed(names, [*manifest.files, MANIFEST_NAME])
            graphs = list(manifest.all_graphs) if graphs is None else graphs
            unused = {file for name in manifest.all_graphs if name not in graphs for file in _files_of(manifest, name)}
            unused -= {file for name in graphs for file in _files_of(manifest, name)}
            folder.check_memory(sum(entry.size for name, entry in manifest.files.items() if name not in unused))
            held = {}
            for name, entry in manifest.files.items():
                content = folder.read_entry(name, entry, skip=name in unused)
                if content is not None:
                    held[name] = content
        bundle = cls(path, manifest, found, held)
        bundle._check_graphs(graphs)
        return bundle

    def _check_graphs(self, graphs: Collection[GraphName]) -> None:
        for name in graphs:
            entry = self.manifest.all_graphs[name]
            check_graph(self.read(entry.file), name, self.manifest, str(self.path / entry.file))
            if (file := entry.float32_file) is not None:
                check_graph(self.read(file), name, self.manifest, str(self.path / file), float32=True)

    def read(self, name: str) -> bytes:
        """Verified bytes of a file. KeyError: unknown, or of a graph that `open` left out."""
        return self._held[name]

    def holds(self, graph: GraphName) -> bool:
        """Whether `open` read the files of a graph."""
        return all(name in self._held for name in _files_of(self.manifest, graph))

    def graph(self, graph: GraphName, *, float32: bool = False) -> bytes:
        """Verified ONNX bytes of a step graph, without weights; `float32`: the one that computes in float32."""
        entry = self.manifest.all_graphs[graph]
        return self.read(entry.float32_file or entry.file if float32 else entry.file)

    def initializers(self, graph: GraphName) -> dict[str, np.ndarray]:
        """Weights of a step graph by initializer name; bfloat16 as its bits in uint16. BadInputError."""
        name = self.manifest.all_graphs[graph].weights
        return parse_weights(self.read(name), str(self.path / name))


def _check_expected(path: Path, expect: str | None, found: str) -> None:
    """UsageError: `expect` is no hash. BadInputError: the bundle's is another."""
    if expect is None:
        return
    if not re.fullmatch("[0-9a-f]{64}", expect):
        raise UsageError(f"the expected hash is {expect[:100]!a}; give all 64 digits, as ul-export prints them")
    if expect != found:
        raise BadInputError(f"{path}: its hash is {found}, expected {expect}; it is not the bundle that was meant")


def _files_of(manifest: Manifest, graph: GraphName) -> list[str]:
    entry = manifest.all_graphs[graph]
    return [name for name in (entry.file, entry.weights, entry.float32_file) if name is not None]


def parse_weights(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file by name; bfloat16 as its bits in uint16. BadInputError, UntrustedError."""
    from safetensors import deserialize

    arrays = {}
    with reading_safetensors(data, where, "export the bundle again"):
        for name, fields in deserialize(data):
            tensor: dict[str, Any] = dict(fields)
            if tensor["dtype"] not in _DTYPES:
                raise ValueError(f"{name[:100]!a} is {tensor['dtype']}; expected {', '.join(_DTYPES)}")
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
