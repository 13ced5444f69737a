"""Which nodes must stay in float32: as few as the tolerances allow, found on the real sampling path."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import nn

from ul_export.onnx_model import module_of
from ul_export.precision.graphs import (
    RangeRecorder,
    exposed,
    headroom_bits,
    in_memory,
    node_errors,
    weight_ranges,
    with_ranges,
)
from ul_export.precision.lower import MOVEMENT, Kind, as_computed, candidates, half_nodes, typed
from ul_export.verify import FP32_GRAPH, PROOF_BATCHES, REDUCED, ComparedCall, Proof, compare, compare_outputs, verify
from ul_runtime.backends import Backend
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import progress

LEAST_HEADROOM_BITS = 1.0  # a magnitude seen in calibration may double before float16 overflows
MOST_ROUNDS = 8
CALIBRATION_IMAGES = 64
CALIBRATION_BATCH = 16

Models = Mapping[GraphName, ModelProto]
Pins = dict[GraphName, dict[str, str]]  # node -> why it stays in float32


@dataclass(frozen=True)
class Calibration:
    """Graphs in float32, what they are part of, images `b c h w` in [-1, 1] for the encoder, and threads."""

    info: BundleInfo
    models: Models
    x: np.ndarray
    threads: int | None = None

    def pipeline(self, models: Models) -> Pipeline:
        """The runtime's own, over these graphs."""
        return self._over(in_memory(self.info, models, self.threads))

    def _over(self, backend: Backend) -> Pipeline:
        return Pipeline(self.info, backend)

    @cached_property
    def largest(self) -> dict[GraphName, dict[str, float]]:
        """The largest magnitude of every float32 tensor: all steps of both loops, guided and not, and the encoder."""
        measured = {name: with_ranges(model) for name, model in self.models.items()}
        backend = in_memory(self.info, {name: model for name, (model, _) in measured.items()}, self.threads)
        recorder = RangeRecorder(backend, {name: names for name, (_, names) in measured.items()})
        recorder.largest = {name: weight_ranges(model) for name, model in self.models.items()}
        pipeline = self._over(recorder)
        for guidance in dict.fromkeys((1.0, pipeline.settings().guidance)):
            for _ in pipeline.generate(CALIBRATION_IMAGES, guidance=guidance, batch_size=CALIBRATION_BATCH):
                pass
        for first in range(0, len(self.x), CALIBRATION_BATCH):
            z_0 = pipeline.encode(self.x[first : first + CALIBRATION_BATCH]).z_0
            for _ in pipeline.decode(z_0):
                pass
        return recorder.largest


@dataclass
class Reduced:
    """Typed graphs, the nodes that were pinned to float32 and why, and the proof of the rest against float32."""

    kind: Kind
    models: dict[GraphName, ModelProto]
    nodes: dict[GraphName, set[str]]  # that compute in `kind`
    pinned: Pins
    proof: Proof


def overflow_pins(model: ModelProto, largest: Mapping[str, float]) -> dict[str, str]:
    """Nodes that take or make a magnitude with fewer than LEAST_HEADROOM_BITS below the largest float16.

    Only as many as it takes: what stays in float32 between two of them, or only moves values, needs no pin.
    """
    pins, half = {}, half_nodes(model, {})
    for node in model.graph.node:
        if node.op_type in MOVEMENT or node.name not in half:
            continue
        seen = max((largest[name] for name in (*node.input, *node.output) if name in largest), default=0.0)
        if headroom_bits(seen) < LEAST_HEADROOM_BITS:
            pins[node.name] = f"magnitude {seen:.4g}, headroom {headroom_bits(seen):.1f} bits"
    for name in list(pins):
        others = {node: why for node, why in pins.items() if node != name}
        if name not in half_nodes(model, others):
            pins = others
    return pins


def reduce(calibration: Calibration, kind: Kind, say: Callable[[str], None]) -> Reduced:
    """The graphs in `kind` with the fewest nodes in float32 that hold the tolerances; the proof says if none does.

    Pins what would overflow. While the proof fails: ranks the nodes of the graph that is furthest out, and pins as few
    of the first as bring the calls that failed, now and in earlier rounds, to where they should be. A proof is long and
    a call is short, so only calls are tried again and again. The proof of the result is of all PROOF_BATCHES.
    """
    pins: Pins = {graph: {} for graph in calibration.models}
    if kind == "fp16":
        pins = {graph: overflow_pins(model, calibration.largest[graph]) for graph, model in calibration.models.items()}
    reduced = _attempt(calibration, kind, pins)
    searches: dict[GraphName, _Search] = {}
    for _ in range(MOST_ROUNDS):
        if not reduced.proof.failures:
            break
        graph = reduced.proof.worst_graph
        failed = f"{kind}: searching for what has to stay in float32 ({reduced.proof.failures[0]})"
        if graph not in searches:
            say(f"{failed}; ranking the nodes of {graph} by what their rounding does")
            searches[graph] = _Search(calibration, kind, graph, pins[graph], ranking(calibration, reduced))
        found = searches[graph].more(reduced.proof)
        say(f"{failed}; {len(found)} nodes of {graph} to float32, {next(iter(found))} first")
        reduced = _attempt(calibration, kind, reduced.pinned | {graph: pins[graph] | found}, to_first_failure=True)
    return reduced


@dataclass
class _Search:
    """For the shortest beginning of a graph's `ranked` nodes that has to be pinned beside `pins`."""

    calibration: Calibration
    kind: Kind
    graph: GraphName
    pins: dict[str, str]
    ranked: dict[str, str]  # node -> why it is pinned, if it is; the worst first
    calls: list[ComparedCall] = field(default_factory=list)  # share: the most of the tolerance that each may take
    too_few: int = 0  # with so many of `ranked` a proof failed

    def more(self, proof: Proof) -> dict[str, str]:
        """The fewest with which the calls that this proof, which failed, and earlier ones brought to light hold."""
        kept = proof.worst_calls[self.graph]
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
        model = _lowered(self.calibration, self.kind, self.graph, self.pins | found)[1]
        computed = {self.graph: as_computed(model, self.kind)}
        backend = in_memory(self.calibration.info, computed, self.calibration.threads)
        return all(
            difference.share <= call.share
            for call in self.calls
            for difference in compare_outputs(
                call.outputs, backend.run(self.graph, call.inputs), REDUCED[self.kind].graph
            ).values()
        )


def ranking(calibration: Calibration, reduced: Reduced) -> dict[str, str]:
    """node -> what its rounding alone does to the worst call of the worst graph, the worst node first."""
    graph = reduced.proof.worst_graph
    model, worst = calibration.models[graph], reduced.proof.worst_calls[graph][0]
    nodes, squares = [each.name for each in model.graph.node if each.name in reduced.nodes[graph]], {}
    with progress(f"rounding one node of {graph} after the other", len(nodes), "nodes") as advance:
        for node in nodes:
            alone = {graph: as_computed(typed(model, reduced.kind, {node}, calibration.largest[graph]), reduced.kind)}
            given = in_memory(calibration.info, alone, calibration.threads).run(graph, worst.inputs)
            square = sum(float(np.square(given[name] - expected).mean()) for name, expected in worst.outputs.items())
            squares[node] = square if np.isfinite(square) else np.inf
            advance(1)
    ranked = sorted(squares.items(), key=lambda item: -item[1])
    words = "its rounding alone changes the results by {:.2g} (root mean square)"
    return {node: words.format(square**0.5) for node, square in ranked}


def _lowered(
    calibration: Calibration, kind: Kind, graph: GraphName, pins: Mapping[str, str]
) -> tuple[set[str], ModelProto]:
    """(nodes of the graph that compute in `kind` with these pins, the typed graph)."""
    model = calibration.models[graph]
    nodes = candidates(model, kind, pins)
    return nodes, typed(model, kind, nodes, calibration.largest[graph])


def _attempt(calibration: Calibration, kind: Kind, pins: Pins, to_first_failure: bool = False) -> Reduced:
    lowered = {graph: _lowered(calibration, kind, graph, pins[graph]) for graph in calibration.models}
    nodes = {graph: names for graph, (names, _) in lowered.items()}
    models = {graph: model for graph, (_, model) in lowered.items()}
    return Reduced(kind, models, nodes, pins, prove(calibration, kind, models, PROOF_BATCHES, to_first_failure))


def prove(
    calibration: Calibration,
    kind: Kind,
    models: Models,
    batches: Sequence[int] = PROOF_BATCHES,
    to_first_failure: bool = False,
) -> Proof:
    """Typed graphs, rounded as their precision rounds, against float32."""
    computed = {name: as_computed(model, kind) for name, model in models.items()}
    return verify(
        calibration.pipeline(calibration.models),
        in_memory(calibration.info, computed, calibration.threads),
        tolerances=REDUCED[kind],
        batch_sizes=batches,
        what="float32",
        x=calibration.x,
        to_first_failure=to_first_failure,
    )


def worst_nodes(calibration: Calibration, reduced: Reduced) -> tuple[GraphName, list[Any]]:
    """(the graph that is furthest out, its nodes by what they add to the error of its worst call)."""
    graph = reduced.proof.worst_graph
    inputs = reduced.proof.worst_calls[graph][0].inputs
    model = as_computed(reduced.models[graph], reduced.kind)
    return graph, node_errors(calibration.models[graph], model, calibration.info, graph, inputs)


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
