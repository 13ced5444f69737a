"""Weights of more than 2 GiB, where 32-bit offsets and protobuf end: sparse files, which fill no disk."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from analytic_bundle import write_analytic_bundle
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ul_export.onnx_model import check_graph, initializers, join_weights, split_weights
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError
from ul_runtime.manifest import MANIFEST_NAME, FileEntry, manifest_bytes

MIB = 2**20
ROWS = 175 * MIB  # float32: 700 MiB a tensor, three of them
LARGE = ("large/0", "large/1", "large/2")
FREE_GIB = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
NEEDED_GIB = 9

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FREE_GIB < NEEDED_GIB, reason=f"{FREE_GIB:.1f} GiB of memory are free, {NEEDED_GIB} are needed"),
]


def add_last_rows(model: ModelProto, output: str) -> None:
    """The last value of every large tensor is added to an output."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(ROWS - 1), "last"))
    for node in graph.node:
        for at, name in enumerate(node.output):
            node.output[at] = f"{name}/plain" if name == output else name
    for name in LARGE:
        graph.node.append(helper.make_node("Gather", [name, "last"], [f"{name}/row"], name=f"{name}/Gather"))
    graph.node.append(helper.make_node("Sum", [f"{output}/plain", *(f"{name}/row" for name in LARGE)], [output]))


def external(name: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[ROWS], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "encoder.safetensors"), ("offset", offset), ("length", 4 * ROWS)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_sparse(path: Path, arrays: dict[str, np.ndarray], last: list[float]) -> int:
    """A safetensors file: LARGE, zeros but for the `last` value of each, then the arrays; returns where data begin."""
    header, end = {}, 0
    for name in LARGE:
        header[name] = {"dtype": "F32", "shape": [ROWS], "data_offsets": [end, end + 4 * ROWS]}
        end += 4 * ROWS
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, value in zip(LARGE, last, strict=True):
            file.seek(start + header[name]["data_offsets"][1] - 4)
            file.write(np.float32(value).tobytes())
        for array in arrays.values():
            file.write(array.tobytes())
    return start


def entry_of(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def test_a_bundle_with_more_than_2_gib_of_weights_is_verified_checked_and_run(tmp_path):
    folder = tmp_path / "bundle"
    plain = write_analytic_bundle(folder)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 8)).astype(np.float32)
    before = OrtCpuBackend(plain, threads=1).run("encoder", {"x": x})
    model = onnx.load_model_from_string(plain.graph("encoder"))
    (output,) = (each.name for each in model.graph.output)
    weights = folder / plain.manifest.graphs["encoder"].weights
    arrays = plain.initializers("encoder")
    start = write_sparse(weights, arrays, [1.0, 2.0, 4.0])
    assert weights.stat().st_size > 2**31
    assert weights.stat().st_blocks * 512 < MIB
    add_last_rows(model, output)
    known = {each.name: each for each in model.graph.initializer}
    end = start + 4 * ROWS * len(LARGE)
    for name, array in arrays.items():
        known[name].external_data[1].value = str(end)
        end += array.nbytes
    model.graph.initializer.extend(external(name, start + 4 * ROWS * at) for at, name in enumerate(LARGE))
    (folder / "encoder.onnx").write_bytes(model.SerializeToString())
    entries = plain.manifest.files | {name: entry_of(folder / name) for name in ("encoder.onnx", weights.name)}
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(plain.manifest, entries))
    check_graph(folder / "encoder.onnx")
    after = OrtCpuBackend(Bundle.open(folder), threads=1).run("encoder", {"x": x})
    np.testing.assert_allclose(after[output], before[output] + 7.0, rtol=1e-6)
    with weights.open("r+b") as file:  # the control: a bit beyond 2 GiB
        file.seek(start + 4 * ROWS * len(LARGE) - 1)
        file.write(b"\xff")
    with pytest.raises(BadInputError, match="SHA-256"):
        Bundle.open(folder)


def test_a_graph_of_more_than_2_gib_is_taken_apart_and_put_together_again():
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    model = helper.make_model(helper.make_graph([node], "large", [given], [made]))
    add_last_rows(model, "y")
    for value, name in enumerate(LARGE):
        model.graph.initializer.append(numpy_helper.from_array(np.full(ROWS, value, np.float32), name))
    graph, weights = split_weights(ir.from_proto(model), "encoder.safetensors")
    del model
    assert len(graph) < MIB
    assert len(weights) > 2**31
    tensors = {each.name: each for each in onnx.load_model_from_string(graph).graph.initializer}
    for value, name in enumerate(LARGE):
        place = {each.key: each.value for each in tensors[name].external_data}
        at = int(place["offset"]) + int(place["length"]) - 4
        assert np.frombuffer(weights[at : at + 4], np.float32) == value
    again = initializers(join_weights(graph, weights, "encoder.safetensors"))
    for value, name in enumerate(LARGE):
        assert isinstance(again[name], ir.Tensor)
        assert again[name].numpy()[-1] == value
        assert again[name].nbytes == 4 * ROWS
