#!/usr/bin/env python
"""Bundles of one model in several precisions, side by side: size, parity, speed on this CPU and quality.

    python tools/precisions.py fashion.bundle fashion.fp16.bundle fashion.int8.bundle --data SOURCE --out DIR

The first is the one in float32. Quality is by ul-eval, from the same noise and on the same images. Of half precision it
is of the typed graphs with every rounding written out: ONNX Runtime's CPU would leave the rounding out. Speed is of
what `--backend auto` takes on this machine, all bundles in turn.
"""

import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tool_tables import EvalOptions, evaluated, write_results

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import with_options
from ul_runtime.errors import UsageError
from ul_runtime.machine import origin

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.pipeline import Pipeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PACKAGES = ("unified-latents", "numpy", "onnxruntime", "openvino", "torch")
BATCH_SIZES = (1, 16)


@app.command()
@with_options
def precisions(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="In float32 first.")],
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Images, as for ul-eval.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where precisions.json and precisions.md go.")],
    options: EvalOptions,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Seeds of ul-eval.")] = 2,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Batches timed, of each size.")] = 7,
) -> None:
    """Put bundles of one model in several precisions side by side: size, parity, speed on this CPU and quality."""
    import ul_runtime

    threads = options.threads or len(os.sched_getaffinity(0))
    options = replace(options, threads=threads)
    pipelines = [ul_runtime.load(path, threads=threads) for path in bundles]
    check_same(bundles, pipelines)
    rows = [described(pipeline) for pipeline in pipelines]
    for row, speed in zip(rows, speeds(pipelines, repeats), strict=True):
        row["images_per_s"] = speed
    for row, pipeline in zip(rows, pipelines, strict=True):
        row["quality"] = quality(pipeline.path, data, options.words(seeds))
    record = {"rows": rows, "threads": threads, **origin("python tools/precisions.py", PACKAGES)}
    write_results(out, ("precisions.json", "precisions.md"), record, markdown(record))


def check_same(paths: list[Path], pipelines: "list[Pipeline]") -> None:
    """UsageError unless all are of the weights of the first, which is in float32."""
    from ul_runtime.backends import bundle_precision

    first = pipelines[0].manifest
    if bundle_precision(pipelines[0].manifest) != "fp32":
        raise UsageError(f"{paths[0]}: is in {bundle_precision(pipelines[0].manifest)}; give the one in fp32 first")
    for path, pipeline in zip(paths, pipelines, strict=True):
        if pipeline.manifest.provenance != first.provenance:
            raise UsageError(f"{path}: is not of the same weights as {paths[0]}")


def described(pipeline: "Pipeline") -> dict[str, Any]:
    """Precision, size, and the parity that ul-export measured."""
    from ul_runtime.backends import bundle_precision

    manifest, kind = pipeline.manifest, bundle_precision(pipeline.manifest)
    weights = {graph.weights for graph in manifest.graphs.values()}
    parity: Any = manifest.parity if kind == "fp32" else manifest.parity[kind]
    paths = [each for each in parity.values() if isinstance(each, dict) and "image_psnr_db" in each]
    return {
        "precision": kind,
        "hash": pipeline.hash,
        "weights_mb": sum(manifest.files[name].size for name in weights) / 1e6,
        "flops_share": {} if kind == "fp32" else parity["flops_share"],
        "pinned": 0 if kind == "fp32" else sum(map(len, parity["pinned"].values())),
        "z_0": max(each["z_0"] for each in paths),
        "image_psnr_db": min(each["image_psnr_db"] for each in paths),
        "computed_by": pipeline.computed_by,
    }


def speeds(pipelines: "list[Pipeline]", repeats: int) -> list[dict[str, float]]:
    """Images a second of each, by batch size: the median of the batches, in turn."""
    from ul_export.bench.measure import in_turn

    def make(pipeline: "Pipeline", batch: int) -> None:
        for _ in pipeline.generate(batch, batch_size=batch):
            pass

    found: list[dict[str, float]] = [{} for _ in pipelines]
    for batch in BATCH_SIZES:
        seconds = in_turn([partial(make, pipeline, batch) for pipeline in pipelines], repeats, warm=True)
        for each, times in zip(found, seconds, strict=True):
            each[str(batch)] = batch / median(times)
    return found


def quality(path: Path, data: str, ask: list[str]) -> dict[str, Any]:
    """What ul-eval says of the bundle; of half precision, of its copy with the rounding written out."""
    from ul_export.evaluation.report import summary
    from ul_runtime.backends import bundle_precision
    from ul_runtime.bundle import Bundle

    bundle = Bundle.open(path)
    with tempfile.TemporaryDirectory() as folder:
        half = bundle_precision(bundle.manifest) in ("fp16", "bf16")
        if half:
            path = rounded_copy(bundle, Path(folder) / "rounded").path
        found = summary(evaluated(path, data, ask))
    return {"evaluated": "every rounding written out" if half else "as it is", **found}


def rounded_copy(bundle: "Bundle", out: Path) -> "Bundle":
    """A bundle in float32 that rounds wherever the typed graphs of this one do."""
    from ul_export.onnx_model import join_weights, split_weights
    from ul_export.precision.lower import emulated
    from ul_runtime.bundle import write_bundle

    graphs, files = {}, {}
    for name, graph in bundle.manifest.graphs.items():
        weights = f"{name}.safetensors"
        model = emulated(join_weights(bundle.read(graph.file), bundle.read(graph.weights), graph.weights))
        files[graph.file], files[weights] = split_weights(model, weights)
        graphs[name] = graph.model_copy(update={"weights": weights, "precision": "fp32", "float32_file": None})
    return write_bundle(out, bundle.manifest.model_copy(update={"graphs": graphs, "parity": {}}), files)


def markdown(record: dict[str, Any]) -> str:
    """The table and what it was made with."""
    from ul_train.sweep import markdown_table

    sizes = record["rows"][0]["images_per_s"]
    columns = ["precision", "weights, MB", "least share of FLOPs", "pinned", "z_0 differs by at most", "images, dB"]
    columns += ["gFD", "rFD", "PSNR, dB", *(f"images/s, batch {size}" for size in sizes), "on this CPU by"]
    rows = []
    for row in record["rows"]:
        computed, found = row["computed_by"], row["quality"]
        rows.append(
            [
                row["precision"],
                f"{row['weights_mb']:.1f}",
                f"{min(row['flops_share'].values()):.0%}" if row["flops_share"] else "",
                str(row["pinned"]),
                f"{row['z_0']:.2g}",
                f"{row['image_psnr_db']:.0f}",
                f"{found['gfd']:.2f} ± {found['gfd_spread']:.2f}",
                f"{found['rfd']:.2f}",
                f"{found['psnr_db']:.2f}",
                *(f"{speed:.2f}" for speed in row["images_per_s"].values()),
                f"{computed['backend']}, {computed['precision']}",
            ]
        )
    first = record["rows"][0]["quality"]
    how = (
        f"z_0 and images: of fp32 against torch, of the others against fp32, the worst of all batches of the check. "
        f"gFD and rFD: Frechet distance of {first['count']} samples and reconstructions, {first['space']} features; of "
        f"real images: {first['gfd_real']:.2f}. {record['threads']} threads."
    )
    return "\n".join([*markdown_table(columns, rows), "", how, "", f"`{record['command']}`", ""])


if __name__ == "__main__":
    run_command(app, "precisions")
