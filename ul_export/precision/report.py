"""What a lower precision did: node by node and step by step, as JSON and as one page."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import onnx_ir as ir

from ul_export.bench.measure import in_turn, node_flops, run_nodes
from ul_export.html_page import image, page, paragraph, table
from ul_export.onnx_model import initializers, module_of, name_of
from ul_export.precision.graphs import headroom_bits, in_memory
from ul_export.precision.lower import PRECISIONS, by_design
from ul_export.precision.search import LEAST_HEADROOM_BITS, Calibration, Reduced, magnitudes
from ul_runtime.machine import versions
from ul_runtime.manifest import GraphName
from ul_train.activations import LARGEST_FLOAT16

_PACKAGES = ("unified-latents", "onnx", "onnxruntime", "torch")
_TIMED = 9  # calls
_SHOWN = 8  # nodes with the least headroom, of each graph


@dataclass(frozen=True)
class NodeReport:
    """A node: what it computes in and why, the largest magnitude that it takes or makes, and its share of the FLOPs.

    `pinned`: it could compute in the lower precision, and was found to need float32.
    """

    node: str
    module: str
    operator: str
    precision: str
    pinned: bool
    why: str
    largest: float
    headroom_bits: float | None  # None: zeros alone
    flops_share: float


def precision_report(calibration: Calibration, reduced: Reduced) -> dict[str, Any]:
    """All that is known, as JSON."""
    kind = reduced.precision.name
    graphs = {}
    for graph, model in calibration.models.items():
        nodes = _nodes(calibration, reduced, graph)
        graphs[graph] = {
            "flops_share": sum(each.flops_share for each in nodes if each.precision == kind),
            "weight_bytes": _weight_bytes(reduced.models[graph]),
            "weight_bytes_float32": sum(_weight_bytes(model).values()),
            **_speed(calibration, reduced, graph),
            "nodes": [asdict(each) for each in nodes],
        }
    tolerances = asdict(reduced.precision.tolerances)
    comparison = {"figures": reduced.comparison.figures, "failures": reduced.comparison.failures}
    info = calibration.info
    about = {
        "name": info.name,
        "run_id": info.provenance.run_id,
        "step": info.provenance.step,
        "opset": info.graphs["prior_step"].opset,
        "calibration_images": len(calibration.x),
        "versions": versions(_PACKAGES),
    }
    return {"precision": kind, "model": about, "tolerances": tolerances, "graphs": graphs, "comparison": comparison}


def _nodes(calibration: Calibration, reduced: Reduced, graph: GraphName) -> list[NodeReport]:
    kind, model, largest = reduced.precision.name, calibration.models[graph], calibration.largest[graph]
    design, pinned, nodes = by_design(model), reduced.pinned[graph], reduced.nodes[graph]
    flops = _flops(calibration, reduced, graph)
    total = sum(flops.values())
    found = []
    for node in model.graph:
        if not any(value.name in largest for value in node.outputs):
            continue  # makes no float32
        name, seen = name_of(node), max(magnitudes(node, largest))
        why = pinned.get(name) or design.get(name) or reduced.precision.rest
        room = headroom_bits(seen)
        found.append(
            NodeReport(
                node=name,
                module=module_of(name),
                operator=node.op_type,
                precision=kind if name in nodes else "fp32",
                pinned=name in pinned,
                why="" if name in nodes else why,
                largest=seen,
                headroom_bits=round(room, 2) if math.isfinite(room) else None,
                flops_share=flops.get(name, 0) / total,
            )
        )
    return found


def _flops(calibration: Calibration, reduced: Reduced, graph: GraphName) -> dict[str, int]:
    """FLOPs of every node on the inputs of a real call."""
    backend = in_memory(calibration.info, {graph: calibration.models[graph]}, calibration.threads)
    ran = run_nodes(backend, graph, reduced.comparison.worst_calls[graph][0].inputs)
    return {node.name: node_flops(node) for node in ran}


def _speed(calibration: Calibration, reduced: Reduced, graph: GraphName) -> dict[str, Any]:
    """Milliseconds of a call by ONNX Runtime on this CPU, in turn; and its batch size. Half precision it has none."""
    inputs = reduced.comparison.worst_calls[graph][0].inputs
    models = {"fp32": calibration.models[graph]}
    if reduced.precision.on_cpu:
        models[reduced.precision.name] = reduced.models[graph]
    backends = [in_memory(calibration.info, {graph: model}, calibration.threads) for model in models.values()]
    calls = [partial(backend.run, graph, inputs) for backend in backends]
    seconds = in_turn(calls, _TIMED, warm=True)
    batch = len(next(iter(inputs.values())))
    return {"batch": batch, "ms": {name: 1e3 * median(of) for name, of in zip(models, seconds, strict=True)}}


def _weight_bytes(model: ir.Model) -> dict[str, int]:
    """By type."""
    found: dict[str, int] = {}
    for tensor in initializers(model).values():
        name = tensor.dtype.name.lower()
        found[name] = found.get(name, 0) + tensor.nbytes
    return found


def html_report(record: Mapping[str, Any], name: str) -> str:
    """The record as a page that needs no other file, with drift by step and headroom by node."""
    kind, bound, compared = record["precision"], record["tolerances"], record["comparison"]["figures"]
    nodes = [node | {"graph": graph} for graph, each in record["graphs"].items() for node in each["nodes"]]
    pins = [[node["graph"], node["node"], node["why"]] for node in nodes if node["pinned"]]
    paths = [(key, each) for key, each in compared.items() if "z_0" in each]
    worst = min(each["image_psnr_db"] for _, each in paths)
    about = {key.replace("_", " "): value for key, value in record["model"].items() if key != "versions"}
    body = [
        paragraph(
            f"Every graph call of the sampling path is within {bound['graph']['absolute']:g} + "
            f"{bound['graph']['relative']:g} |value| of float32; final images are at {worst:.1f} dB or better "
            f"(at least {bound['least_psnr_db']:g} dB is asked for). {PRECISIONS[kind].rounding}"
        ),
        paragraph(", ".join(f"{key} {value}" for key, value in (about | record["model"]["versions"]).items())),
        *_graphs(record),
        "<h2>Pinned to float32</h2>",
        table(["graph", "node", "why"], pins) if pins else paragraph("None."),
        "<h2>In float32 for other reasons</h2>",
        _others(nodes, list(record["graphs"])),
        image("Drift of the state along both loops, root mean square", drift_plot(paths)),
        image("Largest magnitude of every node", headroom_plot(record)),
        *(_headroom(nodes, list(record["graphs"])) if PRECISIONS[kind].largest is not None else []),
        "<h2>Graph calls</h2>",
        table(
            ["inputs", "graph", "largest difference"],
            [
                (key, graph, f"{value:.2g}")
                for key, each in compared.items()
                for graph, value in each["largest_difference"].items()
            ],
            (2,),
        ),
        "<h2>Whole images</h2>",
        table(
            ["path", "z_0, largest difference", "images, PSNR in dB", "within one level of 255"],
            [
                (key, f"{each['z_0']:.2g}", f"{each['image_psnr_db']:.1f}", f"{each['within_one_level']:.2%}")
                for key, each in paths
            ],
            (1, 2, 3),
        ),
    ]
    return page(f"{name}: {kind} against float32", body)


def _graphs(record: Mapping[str, Any]) -> list[str]:
    """The table of the graphs, and what its speeds are of."""
    kind = record["precision"]
    columns = ["graph", f"FLOPs in {kind}", "weights, bytes", "of float32", "nodes", "pinned", "ms, float32"]
    rows = []
    for graph, each in record["graphs"].items():
        stored, ms = sum(each["weight_bytes"].values()), each["ms"]
        row = [graph, f"{each['flops_share']:.1%}", f"{stored:,}", f"{stored / each['weight_bytes_float32']:.0%}"]
        row += [str(len(each["nodes"])), str(sum(node["pinned"] for node in each["nodes"]))]
        rows.append([*row, f"{ms['fp32']:.2f}", f"{ms[kind]:.2f}" if kind in ms else "not on a CPU"])
    speeds = "Milliseconds are of a call by ONNX Runtime on the CPU that exported"
    speeds += "." if PRECISIONS[kind].on_cpu else f", which does not compute in {kind}: that is for a GPU to show."
    columns.append(f"ms, {kind}")
    return [table(columns, rows, range(1, len(columns))), paragraph(speeds)]


def _others(nodes: list[Any], graphs: list[str]) -> str:
    """Why nodes that nobody pinned stay in float32, and how many of each graph, the most frequent first."""
    reasons = [(node["graph"], node["why"]) for node in nodes if node["precision"] == "fp32" and not node["pinned"]]
    counts, total = Counter(reasons), Counter(why for _, why in reasons)
    rows = [[why, *(str(counts[graph, why]) for graph in graphs)] for why, _ in total.most_common()]
    return table(["why", *graphs], rows, range(1, 1 + len(graphs)))


def _headroom(nodes: list[Any], graphs: list[str]) -> list[str]:
    """The nodes of each graph that are nearest to the end of float16."""
    rows = []
    half = [node for node in nodes if node["precision"] != "fp32" and node["headroom_bits"] is not None]
    half.sort(key=lambda node: float(node["headroom_bits"]))
    for graph in graphs:
        for node in [node for node in half if node["graph"] == graph][:_SHOWN]:
            rows.append([graph, node["node"], f"{node['largest']:.4g}", f"{node['headroom_bits']:.1f}"])
    columns = ["graph", "node", "largest", "headroom, bits"]
    return ["<h2>Least headroom below 65504, of the nodes in fp16</h2>", table(columns, rows, (2, 3))]


def drift_plot(figures: list[tuple[str, Mapping[str, Any]]]) -> bytes:
    """PNG: root-mean-square difference of z and x after each step, a line a path, a colour for each guidance."""
    from matplotlib.figure import Figure

    from ul_train.log import figure_png

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, graph, state in zip(figure.subplots(1, 2), ("prior_step", "decoder_step"), ("z", "x"), strict=True):
        colours: dict[str, str] = {}
        for key, each in figures:
            guidance, drift = key.split(", ")[1], _of_network(each["drift"], graph)
            label = None if guidance in colours else guidance
            colour = colours.setdefault(guidance, f"C{len(colours)}")
            axes.semilogy(range(1, len(drift) + 1), drift, ".-", color=colour, linewidth=0.8, label=label)
        axes.set(xlabel="step", ylabel=f"difference of {state}", title=graph)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")  # over no line
    return figure_png(figure, 110)


def _of_network(drift: Mapping[str, list[float]], graph: GraphName) -> list[float]:
    """Of a step graph, or of the student in its place."""
    student = graph.replace("_step", "-")
    return next(steps for name, steps in drift.items() if name == graph or name.startswith(student))


def headroom_plot(record: Mapping[str, Any]) -> bytes:
    """PNG: largest magnitude of every node in the graph's order; those that stay in float32 apart."""
    from matplotlib.figure import Figure

    from ul_train.log import figure_png

    graphs = record["graphs"]
    figure = Figure(figsize=(4 * len(graphs), 4), layout="constrained")
    for axes, (graph, each) in zip(figure.subplots(1, len(graphs), sharey=True), graphs.items(), strict=True):
        for kind, marker in (("fp32", "x"), (record["precision"], ".")):
            points = [(at, node["largest"]) for at, node in enumerate(each["nodes"]) if node["precision"] == kind]
            axes.semilogy(*zip(*points, strict=True), marker, label=kind, markersize=4)
        if PRECISIONS[record["precision"]].largest is not None:
            axes.axhline(LARGEST_FLOAT16, color="red", label="largest float16")
            axes.axhline(LARGEST_FLOAT16 / 2**LEAST_HEADROOM_BITS, color="red", linestyle=":", label="pinned above")
        axes.set(xlabel="node, in the graph's order", title=graph)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("largest magnitude")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure_png(figure, 110)
