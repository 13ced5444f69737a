"""Which nodes must stay in float32: as few as the tolerances allow, found on the real sampling path."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ul_export.onnx_model import module_of, name_of
from ul_export.precision.graphs import (
    NodeError,
    RangeRecorder,
    exposed,
    headroom_bits,
    in_memory,
    node_errors,
    weight_ranges,
    with_ranges,
)
from ul_export.precision.lower import MOVEMENT, Precision, half_nodes
from ul_export.verify import (
    CHECK_BATCHES,
    FP32_GRAPH,
    ComparedCall,
    Comparison,
    compare,
    compare_backends,
    compare_outputs,
    paths,
)
from ul_runtime.backends import Backend
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import progress

_LOG = logging.getLogger(__name__)
LEAST_HEADROOM_BITS = 1.0  # a magnitude seen in calibration may double before float16 overflows
MOST_ROUNDS = 8
CALIBRATION_IMAGES = 64
CALIBRATION_BATCH = 16

Models = Mapping[GraphName, ir.Model]
Pins = dict[GraphName, dict[str, str]]  # node -> why it stays in float32


@dataclass(frozen=True)
class Calibration:
    """Graphs in float32, what they are part of, images `b c h w` in [-1, 1] for the encoder, and threads."""

    info: BundleInfo
    models: Models
    x: np.ndarray
    threads: int | None = None

    @cached_property
    def largest(self) -> dict[GraphName, dict[str, float]]:
        """The largest magnitude of every float32 tensor: all steps of both loops, guided and not, and the encoder."""
        measured = {name: with_ranges(model) for name, model in self.models.items()}
        backend = in_memory(self.info, {name: model for name, (model, _) in measured.items()}, self.threads)
        recorder = RangeRecorder(backend, {name: names for name, (_, names) in measured.items()})
        recorder.largest = {name: weight_ranges(model) for name, model in self.models.items()}
        pipeline = Pipeline(self.info, recorder)
        for overrides in paths(pipeline).values():
            for _ in pipeline.generate(CALIBRATION_IMAGES, batch_size=CALIBRATION_BATCH, **overrides):
                pass
        for first in range(0, len(self.x), CALIBRATION_BATCH):
            z_0 = pipeline.encode(self.x[first : first + CALIBRATION_BATCH]).z_0
            for _ in pipeline.decode(z_0):
                pass
        return recorder.largest


@dataclass
class Reduced:
    """Typed graphs, the nodes that were pinned to float32 and why, and the comparison of the rest with float32."""

    precision: Precision
    models: dict[GraphName, ir.Model]
    nodes: dict[GraphName, set[str]]  # that compute in the precision
    pinned: Pins
    comparison: Comparison


def overflow_pins(model: ir.Model, largest: Mapping[str, float]) -> dict[str, str]:
    """Nodes that take or make a magnitude with fewer than LEAST_HEADROOM_BITS below the largest float16.

    Only as many as it takes: what stays in float32 between two of them, or only moves values, needs no pin.
    """
    pins, half = {}, half_nodes(model, {})
    for node in model.graph:
        if node.op_type in MOVEMENT or node.name not in half:
            continue
        seen = max(magnitudes(node, largest), default=0.0)
        if headroom_bits(seen) < LEAST_HEADROOM_BITS:
            pins[name_of(node)] = f"magnitude {seen:.4g}, headroom {headroom_bits(seen):.1f} bits"
    for name in list(pins):
        others = {node: why for node, why in pins.items() if node != name}
        if name not in half_nodes(model, others):
            pins = others
    return pins


def magnitudes(node: ir.Node, largest: Mapping[str, float]) -> list[float]:
    """The largest of each tensor that a node takes or makes, as far as known."""
    names = [value.name or "" for value in (*node.inputs, *node.outputs) if value is not None]
    return [largest[name] for name in names if name in largest]


def reduce(calibration: Calibration, precision: Precision) -> Reduced:
    """The graphs in `precision` with the fewest nodes in float32 that hold the tolerances; `comparison` says if none.

    Pins what would overflow. While the comparison fails: ranks the nodes of the graph that is furthest out, and pins as
    few of the first as bring the calls that failed, now and in earlier rounds, to where they should be. A comparison is
    long and a call is short, so only calls are tried again and again. That of the result is of all CHECK_BATCHES.
    """
    pins: Pins = {graph: {} for graph in calibration.models}
    if precision.largest is not None:
        pins = {graph: overflow_pins(model, calibration.largest[graph]) for graph, model in calibration.models.items()}
    reduced = _attempt(calibration, precision, pins)
    searches: dict[GraphName, _Search] = {}
    for number in range(1, MOST_ROUNDS + 1):
        if not reduced.comparison.failures:
            break
        graph = reduced.comparison.worst_graph
        _LOG.info(f"{precision.name}: choosing what stays in float32 in {graph}, as most exports need (round {number})")
        if graph not in searches:
            searches[graph] = _Search(calibration, precision, graph, pins[graph], ranking(calibration, reduced))
        found = searches[graph].more(reduced.comparison)
        reduced = _attempt(calibration, precision, reduced.pinned | {graph: pins[graph] | found}, to_first_failure=True)
    return reduced


@dataclass
class _Search:
    """For the shortest beginning of a graph's `ranked` nodes that has to be pinned beside `pins`."""

    calibration: Calibration
    precision: Precision
    graph: GraphName
    pins: dict[str, str]
    ranked: dict[str, str]  # node -> why it is pinned, if it is; the worst first
    calls: list[ComparedCall] = field(default_factory=list)  # share: the most of the tolerance that each may take
    too_few: int = 0  # with so many of `ranked` a comparison failed

    def more(self, comparison: Comparison) -> dict[str, str]:
        """The fewest with which those calls hold that this comparison, which failed, and earlier ones showed."""
        kept = comparison.worst_calls[self.graph]
        failed = [replace(call, share=1.0) for call in kept if call.share > 1.0]
        # of whole images that are too far off although every call holds, the worst call has to improve
        self.calls += failed or [replace(kept[0], share=kept[0].share / 2**0.5)]
        nodes = list(self.ranked.items())
        fails, holds = self.too_few, len(nodes)
        while holds - fails > 1:
            middle = (fails + holds) // 2
            fails, holds = (fails, middle) if self._hold(dict(nodes[:middle])) else (middle, holds)
        self.too_few = holds
        return dict(nodes[:holds])

    def _hold(self, found: dict[str, str]) -> bool:
        _, model = _lowered(self.calibration, self.precision, self.graph, self.pins | found)
        run = _computed(self.calibration, self.precision, {self.graph: model}).run
        tolerance = self.precision.tolerances.graph
        return all(
            difference.share <= call.share
            for call in self.calls
            for difference in compare_outputs(call.outputs, run(self.graph, call.inputs), tolerance).values()
        )


def ranking(calibration: Calibration, reduced: Reduced) -> dict[str, str]:
    """node -> what its rounding alone does to the worst call of the worst graph, the worst node first."""
    graph, precision = reduced.comparison.worst_graph, reduced.precision
    model, worst = calibration.models[graph], reduced.comparison.worst_calls[graph][0]
    nodes, squares = [name for each in model.graph if (name := name_of(each)) in reduced.nodes[graph]], {}
    with progress(f"rounding one node of {graph} after the other", len(nodes), "nodes") as tick:
        for node in nodes:
            alone = {graph: precision.lowered(model, {node}, calibration.largest[graph])}
            given = _computed(calibration, precision, alone).run(graph, worst.inputs)
            square = sum(float(np.square(given[name] - expected).mean()) for name, expected in worst.outputs.items())
            squares[node] = square if np.isfinite(square) else np.inf
            tick(1)
    ranked = sorted(squares.items(), key=lambda item: -item[1])
    words = "its rounding alone changes the results by {:.2g} (root mean square)"
    return {node: words.format(square**0.5) for node, square in ranked}


def _lowered(
    calibration: Calibration, precision: Precision, graph: GraphName, pins: Mapping[str, str]
) -> tuple[set[str], ir.Model]:
    """(nodes of the graph that compute in the precision with these pins, the typed graph)."""
    model = calibration.models[graph]
    nodes = precision.nodes(model, pins)
    return nodes, precision.lowered(model, nodes, calibration.largest[graph])


def _computed(calibration: Calibration, precision: Precision, models: Models) -> Backend:
    """What computes typed graphs, rounded as their precision rounds."""
    computed = {name: precision.as_computed(model) for name, model in models.items()}
    return in_memory(calibration.info, computed, calibration.threads)


def _attempt(calibration: Calibration, precision: Precision, pins: Pins, to_first_failure: bool = False) -> Reduced:
    lowered = {graph: _lowered(calibration, precision, graph, pins[graph]) for graph in calibration.models}
    nodes = {graph: names for graph, (names, _) in lowered.items()}
    models = {graph: model for graph, (_, model) in lowered.items()}
    comparison = compare_typed(calibration, precision, models, CHECK_BATCHES, to_first_failure)
    return Reduced(precision, models, nodes, pins, comparison)


def compare_typed(
    calibration: Calibration,
    precision: Precision,
    models: Models,
    batches: Sequence[int] = CHECK_BATCHES,
    to_first_failure: bool = False,
) -> Comparison:
    """Typed graphs, rounded as their precision rounds, with float32."""
    return compare_backends(
        Pipeline(calibration.info, in_memory(calibration.info, calibration.models, calibration.threads)),
        _computed(calibration, precision, models),
        tolerances=precision.tolerances,
        batch_sizes=batches,
        what="float32",
        x=calibration.x,
        to_first_failure=to_first_failure,
    )


def worst_nodes(calibration: Calibration, reduced: Reduced) -> tuple[GraphName, list[NodeError]]:
    """(the graph that is furthest out, its nodes by what they add to the error of its worst call)."""
    graph = reduced.comparison.worst_graph
    inputs = reduced.comparison.worst_calls[graph][0].inputs
    model = reduced.precision.as_computed(reduced.models[graph])
    return graph, node_errors(calibration.models[graph], model, calibration.info, graph, inputs)


def first_difference(
    module: nn.Module, model: ir.Model, info: BundleInfo, graph: GraphName, inputs: Mapping[str, np.ndarray]
) -> str:
    """What differs first on these inputs, module by module in the graph's order; says so if no module does."""
    expected = _results(module, inputs)
    last = {path: node for node in model.graph if (path := module_of(name_of(node))) in expected}
    names = {path: name_of(node.outputs[0]) for path, node in last.items()}
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
