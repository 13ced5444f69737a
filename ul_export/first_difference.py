"""Where a graph parts from torch: the first module whose results differ, for the error of a proof that fails."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import nn

from ul_export.compare import FP32_GRAPH, compare
from ul_export.module_paths import module_of
from ul_export.precision.layers import exposed
from ul_export.precision.memory import in_memory
from ul_runtime.manifest import BundleInfo, GraphName


def first_difference(
    module: nn.Module, model: ModelProto, info: BundleInfo, graph: GraphName, inputs: Mapping[str, np.ndarray]
) -> str:
    """What differs first on these inputs, module by module in the graph's order; says so if no module does."""
    expected = _results(module, inputs)
    last = {module_of(node.name): node for node in model.graph.node if module_of(node.name) in expected}
    names = {path: node.output[0] for path, node in last.items()}
    given = in_memory(info, {graph: exposed(model, list(names.values()))}).run(graph, dict(inputs))
    for path, node in last.items():
        actual = given[names[path]]
        if actual.shape != expected[path].shape:
            continue  # the exporter moved a dimension into another module
        difference = compare(expected[path], actual, FP32_GRAPH)
        if not difference.within:
            return f"{graph} parts from torch in {path} (node {node.name}): {difference.reason}"
    return f"no module of {graph} parts from torch: the difference is between modules"


@torch.inference_mode()
def _results(module: nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What every module without children gives, by its path; as float32."""
    found: dict[str, np.ndarray] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            if isinstance(result, torch.Tensor):
                found[path] = result.float().numpy()

        return hook

    leaves = {path: each for path, each in module.named_modules() if not list(each.children())}
    handles = [each.register_forward_hook(keep(path)) for path, each in leaves.items()]
    try:
        module(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return found
