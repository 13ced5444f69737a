#!/usr/bin/env python
"""Is image i the same bytes whatever is made beside it? Batch sizes, orders, thread counts and runs, on any bundle.

    python tools/invariance.py fashion.bundle

Every output of every graph call is compared, not only the images. One JSON line on stdout; where something differs,
it names the first call that did, and the exit code is 1.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer

import ul_runtime
from ul_runtime import noise
from ul_runtime.backends import WrappedBackend
from ul_runtime.cli.command import run_command
from ul_runtime.errors import DifferentError
from ul_runtime.pipeline import Pipeline
from ul_runtime.settings import Overrides, parse_counts

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
EDGES = (2**32 - 1, 2**32, 2**63 - 1)

Rows: TypeAlias = dict[int, list[tuple[str, np.ndarray]]]  # image index -> (what, its row of it) as they were computed


@app.command()
def invariance(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle of ul-export.")],
    batch_sizes: Annotated[str, typer.Option(metavar="A,B,...", help="Images at a time.")] = "1,2,3,5,8,16,64",
    threads: Annotated[str, typer.Option(metavar="A,B,...", help="CPU threads.")] = "1,2",
    steps: Annotated[int, typer.Option(metavar="COUNT", min=1, help="Prior steps.")] = 2,
    decoder_steps: Annotated[int, typer.Option(metavar="COUNT", min=1, help="Decoder steps.")] = 2,
    seed: Annotated[int, typer.Option(metavar="INT", help="Seed of all noise, and of the orders.")] = 0,
    backend: Annotated[str, typer.Option(metavar="NAME", help="What runs the graphs.")] = "auto",
) -> None:
    """Check that image i is the same bytes at every batch size, in any order, at every number of threads.

    Each case is compared with batch size 1 in the order of the indices, on the first thread count.
    """
    sizes, counts = parse_counts("--batch-sizes", batch_sizes), parse_counts("--threads", threads)

    def load(threads: int) -> Pipeline:
        return ul_runtime.load(bundle, backend=backend, threads=threads, spinning=False)

    settings = Overrides(steps=steps, sampler="ancestral", decoder_steps=decoder_steps, decoder_sampler="ancestral")
    result = measure([load(count) for count in counts], counts, sizes, seed, settings)
    print(json.dumps(result))
    if not result["equal"]:
        failed = [case for case in result["cases"] if case["differing"]]
        message = f"{len(failed)} of {len(result['cases'])} cases differ; the first: {json.dumps(failed[0])}"
        raise DifferentError(f"{bundle}: {message}")


def measure(
    pipelines: Sequence[Pipeline], threads: Sequence[int], batch_sizes: Sequence[int], seed: int, settings: Overrides
) -> dict[str, Any]:
    """What the tool prints: one case a pipeline (of `threads`) and batch size, its images in an order of its own.

    A case has three whole batches and one image more, or all of the reference.
    """
    first = pipelines[0]
    if first.num_classes:
        settings = settings | Overrides(guidance=1.5, guidance_interval=(-np.inf, np.inf))
    num_images = max(max(batch_sizes), 8)
    indices = [*range(num_images - len(EDGES)), *EDGES]
    expected = trace(first, indices, 1, seed, settings)
    cases = []
    for pipeline, count in zip(pipelines, threads, strict=True):
        for size in batch_sizes:
            order = np.random.default_rng([seed, count, size]).permutation(indices)[: 3 * size + 1].tolist()
            found = differences(expected, trace(pipeline, order, size, seed, settings))
            case = {"threads": count, "batch_size": size, "images": len(order)}
            cases.append(case | {"differing": len(found), "first": found[0] if found else None})
            print(f"threads {count}, batch size {size}: {len(found)} of {len(order)} differ", file=sys.stderr)
    return {
        "equal": not any(case["differing"] for case in cases),
        "bundle": first.hash,
        "backend": first.backend.name,
        "precision": first.backend.precision,
        "version": ul_runtime.__version__,
        "cores": os.cpu_count(),
        "images": num_images,
        "arrays_an_image": len(expected[0]),
        "cases": cases,
    }


@dataclass
class Recorder(WrappedBackend):
    """Keeps the outputs of all calls since `calls` was last emptied."""

    calls: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def run(self, graph_name: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See Backend.run."""
        outputs = self.backend.run(graph_name, inputs)
        self.calls += [(f"{name} of {graph_name}", array) for name, array in outputs.items()]
        return outputs


def trace(pipeline: Pipeline, indices: Sequence[int], batch_size: int, seed: int, settings: Overrides) -> Rows:
    """Each image generated, and as many images of noise encoded, with all that was computed for them."""
    backend = Recorder(pipeline.backend)
    recorded = Pipeline(pipeline.manifest, backend)
    rows: Rows = {index: [] for index in indices}

    def keep(at: Iterable[int], results: dict[str, np.ndarray]) -> None:
        for i, index in enumerate(at):
            rows[index] += [(what, array[i].copy()) for what, array in [*backend.calls, *results.items()]]
        backend.calls.clear()

    for batch in recorded.generate(indices, seed=seed, batch_size=batch_size, **settings):
        keep(batch.indices.tolist(), {"x": batch.x, "image": batch.images})
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        x = np.clip(noise.normals(seed, part, noise.ENCODER, pipeline.image_shape), -1.0, 1.0)
        encoded = recorded.encode(x, seed=seed, indices=part)
        bits = recorded.bits(encoded.z_clean, seed=seed, indices=part, num_samples=1)
        keep(part, {"z_clean": encoded.z_clean, "z_0": encoded.z_0, "bits": bits})
    return rows


def differences(expected: Rows, found: Rows) -> list[dict[str, Any]]:
    """For each image of `found` with a byte that is not as expected: which array was the first, and how far off."""
    differing = []
    for index, rows in found.items():
        for number, ((what, was), (_, now)) in enumerate(zip(expected[index], rows, strict=True)):
            if was.tobytes() != now.tobytes():
                largest = float(np.abs(was.astype(np.float64) - now).max())
                differing.append({"image": index, "array": number, "what": what, "largest_difference": largest})
                break
    return differing


if __name__ == "__main__":
    run_command(app, "invariance")
