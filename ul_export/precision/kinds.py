"""The precisions below float32: which nodes may compute in each, the typed graph, and the same weights in float32."""

from collections.abc import Collection, Mapping
from typing import Literal

from onnx import ModelProto

from ul_export.half_weights import store_half
from ul_export.precision.lower import HALF, emulated, half_nodes, lower
from ul_export.precision.quantize import quantisable, quantised, quantised_weights
from ul_export.precision.tensors import copied, stored_name

Kind = Literal["fp16", "bf16", "int8"]
KINDS: tuple[Kind, ...] = ("fp16", "bf16", "int8")


def candidates(model: ModelProto, kind: Kind, pinned: Collection[str]) -> set[str]:
    """Names of the nodes that compute in `kind` where `pinned` ones may not."""
    return quantisable(model) - set(pinned) if kind == "int8" else half_nodes(model, pinned)


def typed(model: ModelProto, kind: Kind, nodes: set[str], largest: Mapping[str, float]) -> ModelProto:
    """A copy in which `nodes` compute in `kind`; `largest`: magnitudes of the calibration, for int8."""
    return quantised(model, nodes, largest) if kind == "int8" else lower(model, kind, nodes)


def as_computed(graph: ModelProto, kind: Kind) -> ModelProto:
    """A typed graph as ONNX Runtime's CPU can run it with all its rounding: int8 as it is, half precision emulated."""
    return graph if kind == "int8" else emulated(graph)


def in_float32(model: ModelProto, kind: Kind, nodes: set[str], graph: ModelProto) -> ModelProto:
    """The same weights as the typed `graph` of `model`, all computed in float32."""
    if kind == "int8":
        return quantised_weights(model, nodes)
    copy = copied(model)
    stored = {tensor.name for tensor in graph.graph.initializer}
    halved = {tensor.name for tensor in copy.graph.initializer if stored_name(tensor.name) in stored}
    return store_half(copy, halved, HALF[kind])
