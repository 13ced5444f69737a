"""Which nodes must stay in float32: as few as the tolerances allow, found on the real sampling path."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from onnx import ModelProto

from ul_export.compare import REDUCED
from ul_export.precision.kinds import Kind, as_computed, candidates, typed
from ul_export.precision.layers import node_errors
from ul_export.precision.lower import MOVEMENT, half_nodes
from ul_export.precision.memory import in_memory
from ul_export.precision.ranges import RangeRecorder, headroom_bits, weight_ranges, with_ranges
from ul_export.verify import BATCH_SIZES, Proof, verify
from ul_runtime.backends import Backend
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.pipeline import Pipeline

LEAST_HEADROOM_BITS = 1.0  # a magnitude seen in calibration may double before float16 overflows
MOST_ROUNDS = 4
AIM = 0.85  # part of the tolerance that is left to the nodes of half precision when others are pinned
CALIBRATION_IMAGES = 64
CALIBRATION_BATCH = 16
PROOF_BATCHES = (*BATCH_SIZES, 16, 16, 16)  # 68 images, guided and not

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
        return Pipeline(SimpleNamespace(manifest=self.info), backend)  # type: ignore[arg-type]

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


def reduce(
    calibration: Calibration, kind: Kind, say: Callable[[str], None], batches: Sequence[int] = PROOF_BATCHES
) -> Reduced:
    """The graphs in `kind` with the fewest nodes in float32 that hold the tolerances; the proof says if none does.

    Pins what would overflow. While the proof fails, pins in the graph that is furthest out the nodes whose rounding
    matters most to it, as many as should do; then as few of them as really do. First on few images, then on all of
    `batches`, which the proof of the result is of.
    """
    pins: Pins = {graph: {} for graph in calibration.models}
    if kind == "fp16":
        pins = {graph: overflow_pins(model, calibration.largest[graph]) for graph, model in calibration.models.items()}
    reduced = _hold(calibration, kind, pins, BATCH_SIZES, say)
    return reduced if reduced.proof.failures else _hold(calibration, kind, reduced.pinned, batches, say)


def _hold(
    calibration: Calibration, kind: Kind, pins: Pins, batches: Sequence[int], say: Callable[[str], None]
) -> Reduced:
    """With so many more pins that the proof on these batches holds, if MOST_ROUNDS find them."""
    reduced = _attempt(calibration, kind, pins, batches)
    ranked: dict[GraphName, list[tuple[str, str]]] = {}
    for _ in range(MOST_ROUNDS):
        if not reduced.proof.failures:
            break
        graph = reduced.proof.worst_graph
        new = too_much(calibration, reduced)
        say(f"{kind}: {reduced.proof.failures[0]}; {len(new)} nodes of {graph} to float32, {new[0][0]} first")
        ranked[graph] = [*ranked.get(graph, []), *new]
        reduced = _attempt(calibration, kind, _with(pins, ranked), batches)
    if reduced.proof.failures:
        return reduced
    for graph, nodes in ranked.items():  # the shortest beginning that holds, by bisection
        fails, holds = -1, len(nodes)
        while holds - fails > 1:
            middle = (fails + holds) // 2
            fewer = _with(pins, {**ranked, graph: nodes[:middle]})
            attempt = _attempt(calibration, kind, fewer, batches, to_first_failure=True)
            if attempt.proof.failures:
                fails = middle
            else:
                holds, reduced = middle, attempt
        ranked[graph] = nodes[:holds]
    return reduced


def _with(pins: Pins, ranked: Mapping[GraphName, Sequence[tuple[str, str]]]) -> Pins:
    return {graph: of | dict(ranked.get(graph, ())) for graph, of in pins.items()}


def too_much(calibration: Calibration, reduced: Reduced) -> list[tuple[str, str]]:
    """(node, why) of the fewest nodes without whose rounding the worst call should hold, the worst node first.

    Roundings are independent: the squares of what each node alone does to the results add up.
    """
    graph = reduced.proof.worst_graph
    share, inputs = reduced.proof.worst_calls[graph]
    if not np.isfinite(share):
        return [(each.node, "its result is not finite") for each in worst_nodes(calibration, reduced)[1][:1]]
    model = calibration.models[graph]
    expected = calibration.pipeline({graph: model}).backend.run(graph, inputs)
    squares = {}
    for node in [each.name for each in model.graph.node if each.name in reduced.nodes[graph]]:
        alone = {graph: as_computed(typed(model, reduced.kind, {node}, calibration.largest[graph]), reduced.kind)}
        given = in_memory(calibration.info, alone, calibration.threads).run(graph, inputs)
        gap = sum(float(np.square(given[name].astype(np.float64) - expected[name]).mean()) for name in expected)
        squares[node] = gap
    allowed = sum(squares.values()) * min(0.5, (AIM / share) ** 2)
    left, chosen = sum(squares.values()), []
    for node, square in sorted(squares.items(), key=lambda item: -item[1]):
        if left <= allowed:
            break
        left -= square
        chosen.append((node, f"its rounding alone changes the results by {square**0.5:.2g} (root mean square)"))
    return chosen


def _attempt(
    calibration: Calibration, kind: Kind, pins: Pins, batches: Sequence[int], to_first_failure: bool = False
) -> Reduced:
    nodes = {name: candidates(model, kind, pins[name]) for name, model in calibration.models.items()}
    models = {
        name: typed(model, kind, nodes[name], calibration.largest[name]) for name, model in calibration.models.items()
    }
    proof = prove(calibration, kind, models, batches, to_first_failure)
    return Reduced(kind, models, nodes, {name: dict(of) for name, of in pins.items()}, proof)


def prove(
    calibration: Calibration,
    kind: Kind,
    models: Models,
    batches: Sequence[int] = BATCH_SIZES,
    to_first_failure: bool = False,
) -> Proof:
    """Typed graphs, rounded as their precision rounds, against float32."""
    computed = {name: as_computed(model, kind) for name, model in models.items()}
    actual = in_memory(calibration.info, computed, calibration.threads)
    reference = calibration.pipeline(calibration.models)
    return verify(
        reference,
        actual,
        tolerances=REDUCED[kind],
        batch_sizes=batches,
        what="float32",
        x=calibration.x,
        to_first_failure=to_first_failure,
    )


def worst_nodes(calibration: Calibration, reduced: Reduced) -> tuple[GraphName, list[Any]]:
    """(the graph that is furthest out, its nodes by what they add to the error of its worst call)."""
    graph = reduced.proof.worst_graph
    inputs = reduced.proof.worst_calls[graph][1]
    model = as_computed(reduced.models[graph], reduced.kind)
    return graph, node_errors(calibration.models[graph], model, calibration.info, graph, inputs)
