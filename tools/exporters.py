#!/usr/bin/env python
"""torch's two exporters on the step graphs of a run: nodes, seconds, difference to torch, speed in ONNX Runtime.

    python tools/exporters.py runs/fashion --out tools/results/exporters

`torch.export` (dynamo=True) is what ul-export uses. The TorchScript exporter (dynamo=False) has no RMS norm; here it is
given one, written out, so that both can be compared.
"""

import io
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ul_runtime.errors import run_command
from ul_runtime.machine import anonymous, commit, versions

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

    from ul_export.onnx_graphs import StepGraph

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PACKAGES = ("unified-latents", "torch", "onnx", "onnxscript", "onnxruntime")
OPSET = 20  # the newest that the TorchScript exporter knows
BATCH_SIZES = (1, 16)


@app.command()
def exporters(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of ul-train.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where exporters.json and exporters.md go.")],
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Calls timed, of each batch size.")] = 30,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads.")] = 2,
) -> None:
    """Export every step graph by both, compare and time them in turn."""
    from ul_export.bench.measure import in_turn
    from ul_export.onnx_graphs import export_onnx, step_graphs
    from ul_export.precision.graphs import in_memory
    from ul_runtime import durable
    from ul_runtime.progress import UNWATCHED
    from ul_train.run import Run

    trained = Run.open(run).finished()
    described, networks = trained.manifest(OPSET), trained.networks
    makers: dict[str, Callable[..., ModelProto]] = {"torch.export": export_onnx, "TorchScript": torchscript}
    rows = []
    for graph in step_graphs(networks, described.image, described.latent):
        backends, found = [], []
        for name, export in makers.items():
            start = time.perf_counter()
            model = export(graph, [tensor.name for tensor in described.graphs[graph.name].outputs], OPSET)
            row = {"graph": graph.name, "exporter": name, "nodes": len(model.graph.node)}
            found.append(row | {"seconds": time.perf_counter() - start, "ms": {}})
            backends.append(in_memory(described, {graph.name: model}, threads))
        for row, backend in zip(found, backends, strict=True):
            inputs = random_inputs(graph, 3)
            row["largest_difference"] = difference(graph, inputs, backend.run(graph.name, inputs))
        for batch in BATCH_SIZES:
            inputs = random_inputs(graph, batch)
            calls = [partial(backend.run, graph.name, inputs) for backend in backends]
            for row, times in zip(found, in_turn(calls, repeats, UNWATCHED, warm=True), strict=True):
                row["ms"][str(batch)] = 1e3 * median(times)
        rows += found
    record = {
        "command": anonymous("python tools/exporters.py", sys.argv[1:]),
        "opset": OPSET,
        "rows": rows,
        "versions": versions(PACKAGES),
        "commit": commit(),
    }
    durable.make_directory(out)
    durable.write_json(out / "exporters.json", record)
    durable.atomic_write(out / "exporters.md", markdown(record).encode())
    print(markdown(record), end="")


def torchscript(graph: "StepGraph", outputs: list[str], opset: int) -> "ModelProto":
    """The graph by the TorchScript exporter, batch and branches dynamic."""
    import onnx
    import torch

    torch.onnx.register_custom_op_symbolic("aten::rms_norm", _rms_norm, opset)
    dynamic = {name: {0: "b", 1: "g"} if name in ("label", "weight") else {0: "b"} for name in graph.inputs}
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of being deprecated, and of shapes
        torch.onnx.export(
            graph.module,
            (),
            file,
            kwargs=graph.inputs,
            input_names=list(graph.inputs),
            output_names=outputs,
            dynamic_axes=dynamic | {name: {0: "b"} for name in outputs},
            opset_version=opset,
            dynamo=False,
        )
    return onnx.load_model_from_string(file.getvalue())


def _rms_norm(g: Any, x: Any, shape: Any, gain: Any, epsilon: Any) -> Any:
    """x / sqrt(mean(x^2) + epsilon) * gain over the last axis, for the TorchScript exporter."""
    import torch
    from torch.onnx import symbolic_helper

    axes = g.op("Constant", value_t=torch.tensor([-1]))
    mean = g.op("ReduceMean", g.op("Mul", x, x), axes, keepdims_i=1)
    small = g.op("Constant", value_t=torch.tensor(float(symbolic_helper._maybe_get_const(epsilon, "f"))))
    return g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean, small))), gain)


def random_inputs(graph: "StepGraph", batch: int) -> "dict[str, np.ndarray]":
    """Normal numbers for a batch, without guidance; label 0."""
    import numpy as np
    import torch

    draw = np.random.default_rng(0)
    inputs = {}
    for name, example in graph.inputs.items():
        shape = (batch, 1) if name in ("label", "weight") else (batch, *example.shape[1:])
        whole = example.dtype == torch.int64
        inputs[name] = np.zeros(shape, np.int64) if whole else draw.standard_normal(shape).astype(np.float32)
    return inputs


def difference(graph: "StepGraph", inputs: "dict[str, np.ndarray]", given: "dict[str, np.ndarray]") -> float:
    """The largest of any output to torch."""
    import numpy as np
    import torch

    with torch.no_grad():
        made = graph.module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    expected = made if isinstance(made, tuple) else (made,)
    return max(float(np.abs(a.numpy() - b).max()) for a, b in zip(expected, given.values(), strict=True))


def markdown(record: dict[str, Any]) -> str:
    """The table and what it was made with."""
    sizes = record["rows"][0]["ms"]
    columns = ["graph", "exporter", "nodes", "seconds", "differs from torch by", *(f"ms, batch {s}" for s in sizes)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in record["rows"]:
        cells = [row["graph"], row["exporter"], str(row["nodes"]), f"{row['seconds']:.1f}"]
        cells += [f"{row['largest_difference']:.2g}", *(f"{row['ms'][size]:.2f}" for size in sizes)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Opset {record['opset']}. `{record['command']}`", ""])


if __name__ == "__main__":
    run_command(app, "exporters")
