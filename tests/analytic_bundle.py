"""A real ONNX bundle whose networks are exact: every loop over it has a closed form.

Latents of class k are N(class_mean[k], latent_std^2), images given z_0 are N(z_0 enlarged, image_std^2), so

    pred = mean + alpha s^2 / (alpha^2 s^2 + sigma^2) (state - alpha mean)

The prior's branches, its guide and its rescale are combined as ul_train/step_graphs.py says, in ONNX
operators of their own. The encoder averages blocks of `factor` px, channel by channel; further latent channels take the
mean of all.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save

from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.manifest import (
    GRAPH_NAMES,
    BundleInfo,
    GraphName,
    ImageFormat,
    LatentFormat,
    Shape,
    dtype_of,
    interface,
)
from ul_runtime.samplers import ALPHA, B_0, B_1, B_2, SIGMA, A, S

OPSET = 18
CLASSES = ("red", "green", "blue")
MEANS = np.array([[1, -1, -1, 0], [-1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]], np.float32)
WEIGHT_FILES = {
    "encoder": "encoder.safetensors",
    "prior_step": "prior.safetensors",
    "decoder_step": "decoder.safetensors",
    "pixels": "pixels.safetensors",
}
_DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}


class GraphBuilder:
    """Nodes in order; every method returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def integers(self, *values: int) -> str:
        tensor = helper.make_tensor("value", TensorProto.INT64, [len(values)], values)
        return self("Constant", value=tensor)

    def number(self, value: float) -> str:
        return self("Constant", value=helper.make_tensor("value", TensorProto.FLOAT, [], [value]))

    def spread(self, values: str, *axes: int) -> str:
        """Unit axes put in, so that `values` broadcasts."""
        return self("Unsqueeze", values, self.integers(*axes))

    def column(self, of: int) -> str:
        """A column of `row` as `b 1 1 1`."""
        return self.spread(self("Gather", "row", self.integers(of), axis=1), 2, 3)

    def past(self, of: int) -> str:
        """An earlier prediction as `b c h w`."""
        taken = self("Gather", "history", self.integers(of), axis=1)
        return self("Squeeze", taken, self.integers(1))

    def total(self, *terms: str, output: str | None = None) -> str:
        return self("Sum", *terms, output=output)

    def exact(self, state: str, mean: str, variance: str) -> str:
        """The exact prediction for N(mean, variance)."""
        alpha, sigma = self.column(ALPHA), self.column(SIGMA)
        signal = self("Mul", self("Mul", alpha, alpha), variance)
        share = self("Div", self("Mul", alpha, variance), self("Add", signal, self("Mul", sigma, sigma)))
        return self("Add", mean, self("Mul", share, self("Sub", state, self("Mul", alpha, mean))))

    def std(self, values: str) -> str:
        """`b c h w` -> `b 1 1 1`."""
        axes = self.integers(1, 2, 3)
        centred = self("Sub", values, self("ReduceMean", values, axes))
        return self("Sqrt", self("ReduceMean", self("Mul", centred, centred), axes))

    def unless_zero(self, switch: str, on: str, off: str) -> str:
        """`on` for the images whose `switch` `b 1 1 1` is not zero, `off` for the others."""
        return self("Where", self("Equal", switch, self.number(0.0)), off, on)

    def update(self, state: str) -> None:
        """The linear update of the samplers, by "pred"."""
        terms = [(A, state), (B_0, "pred"), (B_1, self.past(0)), (B_2, self.past(1)), (S, "noise")]
        scaled = [self("Mul", self.column(column), term) for column, term in terms]
        self.total(*scaled, output=f"{state}_next")
        self("Concat", self.spread("pred", 1), self.spread(self.past(0), 1), output="history_next", axis=1)


def _encoder(g: GraphBuilder, factor: int) -> None:
    g("Conv", "x", "kernel", output="z_clean", strides=[factor, factor])


def _prior(g: GraphBuilder, factor: int) -> None:
    def summed(values: str) -> str:
        return g("ReduceSum", values, g.integers(1), keepdims=0)

    means = g("Gather", "class_mean", "label", axis=0)
    mean = g.spread(summed(g("Mul", means, g.spread("weight", 2))), 2, 3)
    first = g.spread(g("Squeeze", g("Gather", means, g.integers(0), axis=1), g.integers(1)), 2, 3)
    weighted = g.exact(g("Mul", g.spread(summed("weight"), 1, 2, 3), "z"), mean, "variance")
    guide_weight = g.spread("guide_weight", 1, 2, 3)
    guided = g.unless_zero(guide_weight, g("Add", weighted, g("Mul", guide_weight, "guide")), weighted)
    std, phi = g.std(guided), g.spread("rescale", 1, 2, 3)
    one = g.number(1.0)
    ratio = g.unless_zero(std, g("Div", g.std(g.exact("z", first, "variance")), std), one)
    gain = g("Add", g("Mul", phi, ratio), g("Sub", one, phi))
    g("Identity", g.unless_zero(phi, g("Mul", guided, gain), guided), output="pred")
    g.update("z")


def _decoder(g: GraphBuilder, factor: int) -> None:
    g(
        "Identity",
        g.exact("x", g("ConvTranspose", "z_0", "kernel", strides=[factor, factor]), "variance"),
        output="pred",
    )
    g.update("x")


def _pixels(g: GraphBuilder, factor: int) -> None:
    one = g.number(1.0)
    levels = g("Mul", g("Add", g("Clip", "x", g.number(-1.0), one), one), g.number(127.5))
    g("Cast", g("Transpose", g("Round", levels), perm=[0, 2, 3, 1]), output="images", to=TensorProto.UINT8)
    g("ReduceSum", g("Abs", "x"), g.integers(1, 2, 3), output="sum", keepdims=0)


def _infos(shapes: dict[str, Shape]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, _DTYPES[dtype_of(name)], list(shape)) for name, shape in shapes.items()]


def external_initializers(weights: bytes, file: str) -> list[onnx.TensorProto]:
    """Initializers whose data lie in the safetensors file `file` with these bytes."""
    (length,) = struct.unpack("<Q", weights[:8])
    tensors = []
    for name, entry in json.loads(weights[8 : 8 + length]).items():
        begin, end = entry["data_offsets"]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=entry["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", 8 + length + begin), ("length", end - begin)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return tensors


def _onnx(graph: GraphName, image: ImageFormat, latent: LatentFormat, weights: bytes) -> bytes:
    builder = GraphBuilder()
    build = {"encoder": _encoder, "prior_step": _prior, "decoder_step": _decoder, "pixels": _pixels}[graph]
    build(builder, image.size // latent.size)
    inputs, outputs = interface(graph, image, latent)
    initializers = external_initializers(weights, WEIGHT_FILES[graph])
    made = helper.make_graph(builder.nodes, graph, _infos(inputs), _infos(outputs), initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return model.SerializeToString()


def _weights(
    image: ImageFormat, latent: LatentFormat, class_mean: np.ndarray, latent_std: float, image_std: float
) -> dict[str, bytes]:
    factor = image.size // latent.size
    into = np.zeros((latent.channels, image.channels), np.float32)
    into[: image.channels] = np.eye(latent.channels, image.channels)[: image.channels]
    into[image.channels :] = 1.0 / image.channels
    back = np.zeros((latent.channels, image.channels), np.float32)
    np.fill_diagonal(back, 1.0)
    block = np.ones((1, 1, factor, factor), np.float32)
    return {
        "encoder": save({"kernel": into[..., None, None] * block / np.float32(factor**2)}),
        "prior_step": save({"class_mean": class_mean, "variance": np.array([latent_std**2], np.float32)}),
        "decoder_step": save(
            {"kernel": back[..., None, None] * block, "variance": np.array([image_std**2], np.float32)}
        ),
        "pixels": save({}),
    }


def _tensors(shapes: dict[str, Shape]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": dtype_of(name), "shape": shape} for name, shape in shapes.items()]


def write_analytic_bundle(
    path: Path,
    *,
    classes: Sequence[str] = CLASSES,
    class_mean: np.ndarray | None = None,
    latent_std: float = 0.5,
    image_std: float = 0.1,
    channels: int = 3,
    size: int = 8,
    guidance: float = 1.0,
) -> Bundle:
    """Write the bundle; `class_mean` `len(classes)+1 4` (the last row is "no label") defaults to MEANS, or 0."""
    image, latent = ImageFormat(channels=channels, size=size), LatentFormat(channels=4, size=size // 2)
    if class_mean is None:
        class_mean = MEANS if len(classes) == 3 else np.zeros((len(classes) + 1, 4))
    weights = _weights(image, latent, np.asarray(class_mean, np.float32), latent_std, image_std)
    graphs = {}
    files: dict[str, bytes | Path] = {WEIGHT_FILES[name]: weights[name] for name in GRAPH_NAMES}
    for name in GRAPH_NAMES:
        files[f"{name}.onnx"] = _onnx(name, image, latent, weights[name])
        inputs, outputs = interface(name, image, latent)
        graphs[name] = {
            "file": f"{name}.onnx",
            "weights": WEIGHT_FILES[name],
            "precision": "fp32",
            "opset": OPSET,
            "inputs": _tensors(inputs),
            "outputs": _tensors(outputs),
        }
    sampling = {"sampler": "dpmpp2m", "grid": "uniform", "num_steps": 8}
    fields = {
        "name": "analytic",
        "image": image,
        "latent": latent,
        "classes": list(classes),
        "logsnr_z": {"min": -10.0, "max": 5.0},
        "logsnr_x": {"min": -10.0, "max": 10.0},
        "defaults": {
            "prior": sampling | {"guidance": guidance, "guidance_interval": [-3.0, 1.5]},
            "decoder": sampling | {"sampler": "ddim", "num_steps": 4},
        },
        "graphs": graphs,
        "provenance": {
            "run_id": "analytic",
            "config_sha256": "0" * 64,
            "data_fingerprint": "gaussian",
            "step": 0,
            "weights": "exact",
            "code_version": "0.1.0",
            "encoder_sha256": hashlib.sha256(weights["encoder"]).hexdigest(),
        },
    }
    return write_bundle(path, BundleInfo.model_validate(fields), files)
