"""Graphs that are run before they are files."""

from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto

from ul_export.onnx_graphs import split_weights
from ul_export.precision.tensors import copied
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.manifest import BundleInfo, FileEntry, GraphName, Manifest


def in_memory(info: BundleInfo, models: Mapping[GraphName, ModelProto], threads: int | None = None) -> OrtCpuBackend:
    """ONNX Runtime over these graphs, weights inside them, which take the place of those that `info` describes."""
    files: dict[str, bytes] = {}
    for name, model in models.items():
        files[_file(name)], files[_weights(name)] = split_weights(copied(model), _weights(name))
    graphs = {
        name: graph.model_copy(update={"file": _file(name), "weights": _weights(name), "float32_file": None})
        for name, graph in info.graphs.items()
    }
    entries = {
        name: FileEntry(sha256="0" * 64, size=0) for graph in info.graphs for name in (_file(graph), _weights(graph))
    }
    manifest = Manifest.model_construct(**{**dict(info), "graphs": graphs, "files": entries})
    return OrtCpuBackend(Bundle(Path("memory"), manifest, "0" * 64, files), threads=threads)


def _file(graph: GraphName) -> str:
    return f"{graph}.onnx"


def _weights(graph: GraphName) -> str:
    return f"{graph}.safetensors"
