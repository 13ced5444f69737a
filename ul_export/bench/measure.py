"""How fast a bundle runs: single steps and whole images of several runners, measured in turn in one process."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from ul_runtime.backends import Backend, WrappedBackend
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import ULError
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, silent
from ul_runtime.settings import Overrides

Shape: TypeAlias = tuple[int, ...]
Arrays: TypeAlias = dict[str, np.ndarray]
_REST_S = 0.05  # before each turn: threads of the one before that wait busily go to sleep
_WARM_S = 0.05  # of a step, before it is measured
_TIMEOUT_S = 600.0  # of a fresh process
# Operators that multiply and accumulate, but of a kind that no exported graph has: refused rather than left out.
_UNCOUNTED = {"DeformConv", "Einsum", "GRU", "LSTM", "QLinearConv", "QLinearMatMul", "RNN"}


@dataclass(frozen=True)
class Node:
    """An operator that ran, the shapes of its inputs (without those that are left out) and outputs, and its name."""

    op: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    name: str = ""


def run_nodes(backend: OrtCpuBackend, graph_name: GraphName, inputs: dict[str, np.ndarray]) -> list[Node]:
    """Every operator that a call runs, as the graph has it (not optimised), from ONNX Runtime's own profile."""
    options = backend.options(threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # keeps the weights' shapes
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        session, _values = backend.build(graph_name, options)  # which it reads
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    nodes = []
    for event in events:
        about = event.get("args", {})
        if "input_type_shape" in about:  # shapes come as [{"float": [1, 64]}, ...]
            taken, made = (
                tuple(tuple(shape) for typed in about[key] for shape in typed.values())
                for key in ("input_type_shape", "output_type_shape")
            )
            nodes.append(Node(about["op_name"], taken, made, event["name"].removesuffix("_kernel_time")))
    return nodes


def node_flops(node: Node) -> int:
    """FLOPs of one node, 0 for what is not counted. ULError for an operator whose FLOPs are not known."""
    if node.op in ("MatMul", "MatMulInteger"):  # ... m k, ... k n -> ... m n
        return 2 * math.prod(node.outputs[0]) * node.inputs[0][-1]
    if node.op == "Gemm":  # m k or k m, any -> m n
        return 2 * math.prod(node.inputs[0]) * node.outputs[0][1]
    if node.op in ("Conv", "ConvInteger"):  # b c ..., o c/groups kernel... -> b o ...
        return 2 * math.prod(node.outputs[0]) * math.prod(node.inputs[1][1:])
    if node.op == "ConvTranspose":  # b c ..., c o/groups kernel... -> b o ...
        return 2 * math.prod(node.inputs[0]) * math.prod(node.inputs[1][1:])
    if node.op == "Attention":  # q b (h) n d, k b (h) m d, v -> b (h) n d_v: scores, then weighted values
        queries, keys, result = node.inputs[0], node.inputs[1], node.outputs[0]
        return 2 * (math.prod(queries) + math.prod(result)) * keys[-2]
    if node.op in _UNCOUNTED:
        raise ULError(f"FLOPs of the operator {node.op} are not known; update unified-latents")
    return 0


def count_flops(nodes: Iterable[Node]) -> int:
    """FLOPs of all nodes of a run."""
    return sum(node_flops(node) for node in nodes)


@dataclass
class TimedBackend(WrappedBackend):
    """Counts the calls of a backend by step, and keeps their seconds and last inputs.

    Steps are prior_step, guided_prior_step (of two branches) and decoder_step.
    """

    seconds: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    last: dict[str, tuple[GraphName, Arrays]] = field(default_factory=dict)

    def run(self, graph_name: GraphName, inputs: Arrays) -> Arrays:
        """See Backend.run."""
        start = time.perf_counter()
        outputs = self.backend.run(graph_name, inputs)
        self.seconds += time.perf_counter() - start
        guided = "label" in inputs and inputs["label"].shape[1] > 1
        step = f"guided_{graph_name}" if guided else graph_name
        self.calls[step] += 1
        self.last[step] = graph_name, inputs
        return outputs


@dataclass(frozen=True)
class Runner:
    """One way to make images. `backend` runs its steps; None for a loop that cannot be taken apart."""

    name: str
    precision: str
    backend: TimedBackend | None
    generate: Callable[[int, Tick], object]  # one batch of so many images


def pipeline_runner(name: str, manifest: BundleInfo, backend: Backend, overrides: Overrides) -> Runner:
    """The project's own loop over a backend."""
    timed = TimedBackend(backend)
    pipeline = Pipeline(manifest, timed)

    def generate(batch: int, tick: Tick) -> None:
        for _ in pipeline.generate(batch, batch_size=batch, tick=tick, **overrides):
            pass

    return Runner(name, backend.precision, timed, generate)


@dataclass(frozen=True)
class Work:
    """What one image takes: how often each step is called, and the FLOPs of a call."""

    calls: dict[str, int]
    flops: dict[str, int]

    @property
    def image_flops(self) -> int:
        """FLOPs of a whole image."""
        return sum(self.flops[step] * count for step, count in self.calls.items())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        steps = {step: {"calls": count, "flops": self.flops[step]} for step, count in self.calls.items()}
        return {"steps": steps, "flops": self.image_flops}


def work_of_an_image(bundle: Bundle, threads: int, overrides: Overrides) -> Work:
    """Made by ONNX Runtime; FLOPs are counted in the graphs, and linear in the batch."""
    backend = OrtCpuBackend(bundle, threads=threads)
    timed = TimedBackend(backend)
    list(Pipeline(bundle.manifest, timed).generate(1, **overrides))
    flops = {step: count_flops(run_nodes(backend, graph, inputs)) for step, (graph, inputs) in timed.last.items()}
    return Work(dict(timed.calls), flops)


def in_turn(
    tasks: Sequence[Callable[[], object]], repeats: int, tick: Tick = silent, *, warm: bool = False
) -> list[list[float]]:
    """Seconds of each task, `repeats` times, in turn, so that what disturbs the machine disturbs all of them.

    `warm` runs the task for a while before each turn, not measured: caches, threads and clock are as within a loop.
    """
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, times in zip(tasks, seconds, strict=True):
            tick(0)
            time.sleep(_REST_S)
            warm_until = time.perf_counter() + _WARM_S
            while warm and time.perf_counter() < warm_until:
                task()
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
            tick(1)
    return seconds


def num_turns(work: Work, num_cases: int, repeats: int, image_repeats: int) -> int:
    """How many turns `measure_runners` takes, at most; a case is a runner at a batch size."""
    return num_cases * (1 + len(work.calls) * repeats + image_repeats)


def measure_runners(
    makers: Sequence[Callable[[], Runner]],
    work: Work,
    batch_sizes: Sequence[int],
    repeats: int,
    image_repeats: int,
    tick: Tick = silent,
) -> list[dict[str, Any]]:
    """One result for each batch size and runner; the first runner is what others' outputs are compared with.

    `repeats` are of each step, `image_repeats` of whole batches of images. Runners are made anew for each batch size,
    so that no more than one size of their models is in memory.
    """
    results = []
    for batch in batch_sizes:
        runners = [make() for make in makers]
        warm_up = in_turn([partial(runner.generate, batch, lambda _: tick(0)) for runner in runners], 1, tick)
        rows: list[dict[str, Any]] = [
            {"contender": made.name, "precision": made.precision, "batch_size": batch, "warm_up_s": round(seconds, 3)}
            for made, (seconds,) in zip(runners, warm_up, strict=True)
        ]
        _measure_steps(runners, rows, batch, work, repeats, tick)
        _measure_images(runners, rows, batch, work, image_repeats, tick)
        results += rows
    return results


def _measure_steps(
    runners: Sequence[Runner], results: Sequence[dict[str, Any]], batch: int, work: Work, repeats: int, tick: Tick
) -> None:
    """Put each step into the results, on the inputs that it last had in the first runner's loop."""
    able = [(runner.backend, row) for runner, row in zip(runners, results, strict=True) if runner.backend is not None]
    first = able[0][0]
    for step, (graph, inputs) in dict(first.last).items():
        expected = first.run(graph, inputs)["pred"]
        seconds = in_turn([partial(backend.run, graph, inputs) for backend, _ in able], repeats, tick, warm=True)
        for (backend, row), times in zip(able, seconds, strict=True):
            gap = float(np.abs(backend.run(graph, inputs)["pred"] - expected).max())
            row[step] = _figures(times, work.flops[step] * batch) | {"largest_difference": gap}


def _measure_images(
    runners: Sequence[Runner], results: Sequence[dict[str, Any]], batch: int, work: Work, repeats: int, tick: Tick
) -> None:
    """Put whole batches of images into the results, and what the loop costs beyond its graphs."""
    in_graphs = [list[float]() for _ in runners]

    def generate(runner: Runner, graphs: list[float]) -> None:
        before = runner.backend.seconds if runner.backend else math.nan
        runner.generate(batch, lambda _: tick(0))
        graphs.append(runner.backend.seconds - before if runner.backend else math.nan)

    tasks = [partial(generate, *pair) for pair in zip(runners, in_graphs, strict=True)]
    for row, times, graphs in zip(results, in_turn(tasks, repeats, tick), in_graphs, strict=True):
        row["images"] = _figures(times, work.image_flops * batch)
        row["images"]["images_per_s"] = batch / float(np.median(times))
        if not math.isnan(graphs[0]):
            row["images"]["loop_overhead"] = float(np.median(np.divide(times, graphs))) - 1.0


def _figures(seconds: Sequence[float], flops: int) -> dict[str, float | int]:
    """Median and 95th percentile in ms, of how many, and the rate at the median."""
    median, p95 = (float(np.percentile(seconds, q)) for q in (50, 95))
    times = {"median_ms": 1e3 * median, "p95_ms": 1e3 * p95, "repeats": len(seconds)}
    return times | {"gflops_per_s": flops / median / 1e9}


def add_shares(results: Sequence[dict[str, Any]], ceilings: Mapping[str, Mapping[str, Any]]) -> None:
    """Put `of_ceiling` beside every rate: its share of the best matrix product in the same precision, or None."""
    for result in results:
        ceiling = ceilings.get(result["precision"])
        for part in result.values():
            if isinstance(part, dict) and "gflops_per_s" in part:
                part["of_ceiling"] = part["gflops_per_s"] / ceiling["gflops_per_s"] if ceiling else None


_LOAD = """
import sys, time
started = time.perf_counter()
import ul_runtime.backends, ul_runtime.bundle, ul_runtime.pipeline
from ul_export.bench.measure import print_seconds
bundle, backend, precision, threads = sys.argv[1:]
def load():
    pipeline = ul_runtime.load(bundle, backend=backend, precision=precision or None, threads=int(threads))
    return lambda: next(pipeline.generate(1))
print_seconds(started, load)
"""
_GENERATE = "from ul_runtime.cli.generate import main; main()"


def print_seconds(started: float, load: Callable[[], Callable[[], object]]) -> None:
    """Print seconds as one JSON line: of imports (since `started`), of `load`, of two calls of what it returns."""
    imported = time.perf_counter()
    generate = load()
    loaded = time.perf_counter()
    generate()
    first = time.perf_counter()
    generate()
    seconds = np.diff([started, imported, loaded, first, time.perf_counter()]).round(4).tolist()
    print(json.dumps(dict(zip(("import_s", "load_s", "first_image_s", "next_image_s"), seconds, strict=True))))


def fresh_process(code: str, *arguments: object) -> dict[str, Any]:
    """The figures that `code` prints as its last line, and `process_s`, the whole process. ULError if it fails."""
    start = time.perf_counter()
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        message = " ".join(done.stderr.split())[-300:]
        raise ULError(f"a fresh process for start-up ended with {done.returncode}: {message}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": round(seconds, 3)}


def start_up(bundle: Path, backend: str, precision: str | None, threads: int) -> dict[str, Any]:
    """Seconds of import, load, first and next image, and of `ul-generate -n 1` beyond the next image's."""
    figures = fresh_process(_LOAD, bundle, backend, precision or "", threads)
    options = ["--backend", backend, "--threads", threads, *(["--precision", precision] if precision else [])]
    with tempfile.TemporaryDirectory() as folder:
        whole = fresh_process(_GENERATE, bundle, "--out", f"{folder}/images", "-n", 1, "--json", *options)["process_s"]
    beyond = round(whole - figures["next_image_s"], 3)
    return figures | {"ul_generate_s": whole, "ul_generate_beyond_sampling_s": beyond}
