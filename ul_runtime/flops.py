"""FLOPs of a graph from the shapes its nodes saw: 2 a multiply-add of products and convolutions, all else left out.

The same convention as torch.utils.flop_counter, which ul-train counts with.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ul_runtime.errors import ULError

Shape = tuple[int, ...]
# Operators that multiply and accumulate, but of a kind that no exported graph has: refused rather than left out.
_UNCOUNTED = {"DeformConv", "Einsum", "GRU", "LSTM", "QLinearConv", "QLinearMatMul", "RNN"}


@dataclass(frozen=True)
class Node:
    """An operator that ran, the shapes of its inputs (without those that are left out) and outputs, and its name."""

    op: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    name: str = ""


def node_flops(node: Node) -> int:
    """FLOPs of one node, 0 for what is not counted. ULError for an operator whose FLOPs are not known."""
    if node.op in ("MatMul", "MatMulInteger"):  # ... m k, ... k n -> ... m n
        return 2 * math.prod(node.outputs[0]) * node.inputs[0][-1]
    if node.op == "Gemm":  # m k or k m, any -> m n
        return 2 * math.prod(node.inputs[0]) * node.outputs[0][1]
    if node.op in ("Conv", "ConvInteger"):  # b c ..., o c/groups kernel... -> b o ...
        return 2 * math.prod(node.outputs[0]) * math.prod(node.inputs[1][1:])
    if node.op == "ConvTranspose":  # b c ..., c o/groups kernel... -> b o ...
        return 2 * math.prod(node.inputs[0]) * math.prod(node.inputs[1][1:])
    if node.op == "Attention":  # q b (h) n d, k b (h) m d, v -> b (h) n d_v: scores, then weighted values
        queries, keys, result = node.inputs[0], node.inputs[1], node.outputs[0]
        return 2 * (math.prod(queries) + math.prod(result)) * keys[-2]
    if node.op in _UNCOUNTED:
        raise ULError(f"FLOPs of the operator {node.op} are not known; update unified-latents")
    return 0


def count_flops(nodes: Iterable[Node]) -> int:
    """FLOPs of all nodes of a run."""
    return sum(node_flops(node) for node in nodes)
