"""What torch's exporter made of a graph, kept for all tests and processes of a run: it takes five seconds for one.

The same modules, weights, inputs and opset give the same graph. A test that changed torch's exporter itself could not
use this.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from ul_export import onnx_graphs
from ul_export.onnx_graphs import StepGraph


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within, torch is asked once for each graph."""
    by_torch = onnx_graphs.by_torch

    def export(graph: StepGraph, outputs: list[str], opset: int) -> ir.Model:
        file = folder / f"{key_of(graph, outputs, opset)}.onnx"
        if not file.exists():
            data = ir.to_proto(by_torch(graph, outputs, opset)).SerializeToString()
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
                temporary.write(data)
            os.replace(temporary.name, file)
        return ir.from_proto(onnx.load_model_from_string(file.read_bytes()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graphs, "by_torch", export)
        yield


def key_of(graph: StepGraph, outputs: list[str], opset: int) -> str:
    """Of all that a graph depends on: modules and their plain attributes, weights, inputs, outputs, opset."""
    digest = hashlib.sha256(repr((graph.name, outputs, opset, torch.__version__)).encode())
    for name, module in graph.module.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple))}
        digest.update(repr((name, type(module), sorted(plain.items()))).encode())
    tensors = {**dict(graph.module.state_dict()), **graph.inputs}
    for name, tensor in tensors.items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        if name not in graph.inputs:
            digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
