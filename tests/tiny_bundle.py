"""A bundle of a few thousand bytes for tests: the format is right, the graphs compute nothing."""

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save

from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.manifest import GRAPH_NAMES, BundleInfo, GraphName, ImageFormat, LatentFormat, dtype_of, interface

IMAGE, LATENT = ImageFormat(channels=3, size=16), LatentFormat(channels=4, size=2)
WEIGHTS = {
    "encoder": "encoder.safetensors",
    "prior_step": "prior.safetensors",
    "decoder_step": "decoder.safetensors",
    "pixels": "pixels.safetensors",
}


_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}
OPSET = 20


def graph_bytes(name: GraphName) -> bytes:
    """A graph with the inputs and outputs of that name, and a node for each output."""
    inputs, outputs = (
        [helper.make_tensor_value_info(key, _TYPES[dtype_of(key)], list(shape)) for key, shape in shapes.items()]
        for shapes in interface(name, IMAGE, LATENT)
    )
    nodes = [helper.make_node("Identity", [inputs[0].name], [output.name]) for output in outputs]
    graph = helper.make_graph(nodes, name, inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]).SerializeToString()


def tensors(shapes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": dtype_of(name), "shape": list(shape)} for name, shape in shapes.items()]


def info_fields() -> dict[str, Any]:
    graphs = {}
    for name in GRAPH_NAMES:
        inputs, outputs = interface(name, IMAGE, LATENT)
        graphs[name] = {
            "file": f"{name}.onnx",
            "weights": WEIGHTS[name],
            "precision": "fp32",
            "opset": OPSET,
            "inputs": tensors(inputs),
            "outputs": tensors(outputs),
        }
    sampling = {"sampler": "ddim", "grid": "uniform", "num_steps": 8}
    return {
        "name": "tiny",
        "image": IMAGE.model_dump(),
        "latent": LATENT.model_dump(),
        "classes": ["cat", "dog"],
        "logsnr_z": {"min": -10, "max": 5.0},
        "logsnr_x": {"min": -10.0, "max": 10.0},
        "defaults": {
            "prior": sampling | {"guidance": 1.5, "guidance_interval": [-3.0, 3.0]},
            "decoder": sampling,
        },
        "graphs": graphs,
        "provenance": {
            "run_id": "r1",
            "config_sha256": "0" * 64,
            "data_fingerprint": "digits",
            "step": 5,
            "weights": "ema",
            "code_version": "0.1.0",
        },
        "quality": {"psnr_db": 30.5},
    }


def bundle_files() -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = {f"{name}.onnx": graph_bytes(name) for name in GRAPH_NAMES}
    return files | {name: save({"w": np.full((2, 3), 1.5, np.float32)}) for name in WEIGHTS.values()}


def write_tiny_bundle(path: Path) -> Bundle:
    return write_bundle(path, BundleInfo.model_validate(info_fields()), bundle_files())
