"""Nodes named by the torch module that they came from, so that messages and reports say where in the model they are."""

import ast
from collections import Counter

from onnx import ModelProto, NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's note on a node: its modules from the outside in, then the operation


def name_nodes(model: ModelProto) -> None:
    """`network.middle.blocks.0.mlp.0/MatMul`; a second one of a kind in a module ends in `_2`."""
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        name = f"{_path(node)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def module_of(node_name: str) -> str:
    """Path of the module in a node's name; empty for the graph itself."""
    return node_name.rpartition("/")[0]


def _path(node: NodeProto) -> str:
    notes = {entry.key: entry.value for entry in node.metadata_props}
    scopes = ast.literal_eval(notes.get(_SCOPES, "['']"))
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else str(path)
