"""What ul-export --fp16, --bf16 and --int8 do: ranges, search, comparison, and the files of the bundle."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ul_export.onnx_model import join_weights, split_weights
from ul_export.precision.lower import Precision, by_design
from ul_export.precision.report import html_report, precision_report
from ul_export.precision.search import Calibration, Reduced, reduce, worst_nodes
from ul_runtime.errors import BadInputError, ULError
from ul_runtime.manifest import BundleInfo, Graph, GraphName

_LOG = logging.getLogger(__name__)
LEAST_SHARE = 0.5  # of a graph's FLOPs in the precision that was asked for
REPORT = "precision"  # .json and .html, in the bundle


def reduced_bundle(
    info: BundleInfo, files: Mapping[str, bytes], precision: Precision, x: np.ndarray, threads: int | None
) -> tuple[BundleInfo, dict[str, bytes], dict[str, Any]]:
    """(description, files, figures of the comparison) of these graphs in `precision`, each beside its float32 version.

    `files`: a bundle's in float32. BadInputError: the tolerances do not hold, the worst node is named.
    """
    kind = precision.name
    calibration = Calibration(info, with_their_weights(info, files), x, threads)
    _LOG.info(f"{kind}: recording the largest magnitude of every tensor along the sampling path")
    reduced = reduce(calibration, precision)
    if reduced.comparison.failures:
        graph, nodes = worst_nodes(calibration, reduced)
        raise BadInputError(
            f"{info.name}: {kind} does not equal float32, no bundle was written: {reduced.comparison.failures[0]}; "
            f"worst node of {graph}: {nodes[0].node}, which adds {nodes[0].grown:.2g} to the relative error"
        )
    report = precision_report(calibration, reduced)
    shares = {name: report["graphs"][name]["flops_share"] for name in reduced.models}
    for name, share in shares.items():
        if share < LEAST_SHARE:
            raise BadInputError(
                f"{info.name}: {name} would compute {share:.0%} of its FLOPs in {kind}, to equal float32 within the "
                f"tolerance; at least {LEAST_SHARE:.0%} are expected, no bundle was written: export in float32"
            )
    pinned = ", ".join(f"{len(nodes)} of {name}" for name, nodes in reduced.pinned.items())
    design = sum(len(by_design(model)) for model in reduced.models.values())
    _LOG.info(f"{kind}: equals float32 within the tolerance; nodes kept in float32: {pinned}, {design} by design")
    pixels = info.graphs["pixels"]
    written = {file: files[file] for file in (pixels.file, pixels.weights)}
    graphs = {"pixels": pixels}
    for name in reduced.models:
        entry = info.all_graphs[name].model_copy(update={"precision": kind, "float32_file": f"{name}.float32.onnx"})
        graphs[name] = entry
        written |= _files(name, entry, calibration, reduced)
    written[f"{REPORT}.json"] = (json.dumps(report, indent=1) + "\n").encode()
    written[f"{REPORT}.html"] = html_report(report, info.name).encode()
    figures = {"pinned": reduced.pinned, "flops_share": shares}
    return info.with_graphs(graphs), written, {**figures, **reduced.comparison.figures}


def with_their_weights(info: BundleInfo, files: Mapping[str, bytes]) -> dict[GraphName, ir.Model]:
    """The networks' graphs of a bundle's files, weights inside."""
    entries = info.all_graphs
    return {
        name: join_weights(files[entries[name].file], files[entries[name].weights], entries[name].weights)
        for name in info.network_graphs
    }


def _files(name: GraphName, entry: Graph, calibration: Calibration, reduced: Reduced) -> dict[str, bytes]:
    """Both graphs and the one file of weights that they share."""
    typed = reduced.models[name]
    twin = reduced.precision.in_float32(calibration.models[name], reduced.nodes[name])
    graph, data = split_weights(typed, entry.weights)
    other, same = split_weights(twin, entry.weights)
    if data != same:
        raise ULError(f"{name}: the graphs in {entry.precision} and float32 have other weights")
    return {entry.file: graph, str(entry.float32_file): other, entry.weights: data}
