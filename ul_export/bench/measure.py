"""How fast a bundle runs: single steps and whole images of several contenders, measured in turn in one process."""

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
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import onnxruntime as ort

from ul_runtime.backends import (
    Backend,
    InFront,
)
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import ULError
from ul_runtime.manifest import GraphName
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import UNWATCHED, Control
from ul_runtime.settings import Overrides

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName


Shape = tuple[int, ...]
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
    options = backend.options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # keeps the weights' shapes
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        session = backend.build(graph_name, options)
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    return [_node(event) for event in events if "input_type_shape" in event.get("args", {})]


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


def _node(event: dict[str, Any]) -> Node:
    """An event of the profile; shapes come as [{"float": [1, 64]}, ...]."""
    about = event["args"]
    inputs, outputs = (
        tuple(tuple(shape) for typed in about[key] for shape in typed.values())
        for key in ("input_type_shape", "output_type_shape")
    )
    return Node(about["op_name"], inputs, outputs, event["name"].removesuffix("_kernel_time"))


_REST_S = 0.05  # before each turn: threads of the one before that wait busily go to sleep
_WARM_S = 0.05  # of a step, before it is measured
Arrays: TypeAlias = dict[str, np.ndarray]
Step: TypeAlias = tuple[GraphName, int]  # a graph, and its branches of guidance (1: none)


@dataclass(frozen=True)
class Plan:
    """What to measure; `overrides` as for Pipeline.generate."""

    batch_sizes: Sequence[int]
    repeats: int  # of each step
    image_repeats: int  # of each batch of whole images
    overrides: Overrides


@dataclass
class Watched(InFront):
    """Counts the calls of a backend by step, and keeps their seconds and last inputs."""

    seconds: float = 0.0
    calls: Counter[Step] = field(default_factory=Counter)
    inputs: dict[Step, Arrays] = field(default_factory=dict)

    def run(self, graph_name: GraphName, inputs: Arrays) -> Arrays:
        """Run, and note."""
        start = time.perf_counter()
        outputs = self.backend.run(graph_name, inputs)
        self.seconds += time.perf_counter() - start
        step = graph_name, inputs["label"].shape[1] if "label" in inputs else 1
        self.calls[step] += 1
        self.inputs[step] = inputs
        return outputs


@dataclass(frozen=True)
class Contender:
    """One way to make images. `backend` runs its steps; None for a loop that cannot be taken apart."""

    name: str
    precision: str
    backend: Watched | None
    generate: Callable[[int, Control], object]  # one batch of so many images


def pipeline_contender(name: str, bundle: Bundle, backend: Backend, overrides: Overrides) -> Contender:
    """The project's own loop over a backend."""
    watched = Watched(backend)
    pipeline = Pipeline(bundle, watched)

    def generate(batch: int, control: Control) -> None:
        for _ in pipeline.generate(batch, batch_size=batch, control=control, **overrides):
            pass

    return Contender(name, backend.precision, watched, generate)


@dataclass(frozen=True)
class Work:
    """What one image takes: how often each step is called, and the FLOPs of a call."""

    calls: dict[Step, int]
    flops: dict[Step, int]

    @property
    def image_flops(self) -> int:
        """FLOPs of a whole image."""
        return sum(self.flops[step] * count for step, count in self.calls.items())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        steps = {step_name(step): {"calls": self.calls[step], "flops": self.flops[step]} for step in self.calls}
        return {"steps": steps, "flops": self.image_flops}


def work_of_an_image(bundle: Bundle, threads: int, overrides: Overrides) -> Work:
    """Made by ONNX Runtime; FLOPs are counted in the graphs, and linear in the batch."""
    backend = OrtCpuBackend(bundle, threads=threads)
    contender = pipeline_contender("ort-cpu", bundle, backend, overrides)
    contender.generate(1, UNWATCHED)
    assert contender.backend is not None
    flops = {
        step: count_flops(run_nodes(backend, step[0], inputs)) for step, inputs in contender.backend.inputs.items()
    }
    return Work(dict(contender.backend.calls), flops)


def step_name(step: Step) -> str:
    """For people and JSON: prior_step, guided_prior_step, decoder_step."""
    graph, branches = step
    return graph if branches == 1 else f"guided_{graph}"


def in_turn(
    tasks: Sequence[Callable[[], object]], repeats: int, control: Control, *, warm: bool = False
) -> list[list[float]]:
    """Seconds of each task, `repeats` times, in turn, so that what disturbs the machine disturbs all of them.

    `warm` runs the task for a while before each turn, not measured: caches, threads and clock are as within a loop.
    """
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, times in zip(tasks, seconds, strict=True):
            control.check()
            time.sleep(_REST_S)
            warm_until = time.perf_counter() + _WARM_S
            while warm and time.perf_counter() < warm_until:
                task()
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
            control.progress(1)
    return seconds


def num_turns(plan: Plan, num_contenders: int, work: Work) -> int:
    """How many turns `measure` takes, at most."""
    return len(plan.batch_sizes) * num_contenders * (1 + len(work.calls) * plan.repeats + plan.image_repeats)


def measure_contenders(
    makers: Sequence[Callable[[], Contender]], work: Work, plan: Plan, control: Control
) -> list[dict[str, Any]]:
    """One result for each batch size and contender; the first contender is what others' outputs are compared with.

    Contenders are made anew for each batch size, so that no more than one size of their models is in memory.
    StoppedError if asked to stop.
    """
    results = []
    for batch in plan.batch_sizes:
        results += _measure_batch([make() for make in makers], batch, work, plan, control)
    return results


def _measure_batch(
    contenders: Sequence[Contender], batch: int, work: Work, plan: Plan, control: Control
) -> list[dict[str, Any]]:
    quiet = Control(control.stop)
    warm_up = in_turn([partial(contender.generate, batch, quiet) for contender in contenders], 1, control)
    results: list[dict[str, Any]] = [
        {"contender": c.name, "precision": c.precision, "batch_size": batch, "warm_up_s": round(seconds, 3)}
        for c, (seconds,) in zip(contenders, warm_up, strict=True)
    ]
    able = [(c.backend, result) for c, result in zip(contenders, results, strict=True) if c.backend is not None]
    for step, inputs in dict(able[0][0].inputs).items():
        expected = able[0][0].run(step[0], inputs)["pred"]
        seconds = in_turn([partial(b.run, step[0], inputs) for b, _ in able], plan.repeats, control, warm=True)
        for (backend, result), times in zip(able, seconds, strict=True):
            gap = float(np.abs(backend.run(step[0], inputs)["pred"] - expected).max())
            result[step_name(step)] = _figures(times, work.flops[step] * batch) | {"largest_difference": gap}
    _measure_images(contenders, results, batch, work, plan, control)
    return results


def _measure_images(
    contenders: Sequence[Contender],
    results: Sequence[dict[str, Any]],
    batch: int,
    work: Work,
    plan: Plan,
    control: Control,
) -> None:
    """Put whole batches of images into the results, and what the loop costs beyond its graphs."""
    quiet, in_graphs = Control(control.stop), [list[float]() for _ in contenders]

    def generate(contender: Contender, graphs: list[float]) -> None:
        before = contender.backend.seconds if contender.backend else math.nan
        contender.generate(batch, quiet)
        graphs.append(contender.backend.seconds - before if contender.backend else math.nan)

    tasks = [partial(generate, *pair) for pair in zip(contenders, in_graphs, strict=True)]
    for result, times, graphs in zip(results, in_turn(tasks, plan.image_repeats, control), in_graphs, strict=True):
        result["images"] = _figures(times, work.image_flops * batch)
        result["images"]["images_per_s"] = batch / float(np.median(times))
        if not math.isnan(graphs[0]):
            result["images"]["loop_overhead"] = float(np.median(np.divide(times, graphs))) - 1.0


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
from ul_export.bench.measure import report
bundle, backend, precision, threads = sys.argv[1:]
def load():
    pipeline = ul_runtime.load(bundle, backend=backend, precision=precision or None, threads=int(threads))
    return lambda: next(pipeline.generate(1))
report(started, load)
"""
_GENERATE = "from ul_runtime.cli.generate import main; main()"
_TIMEOUT_S = 600.0
_Result = TypeVar("_Result")


def report(started: float, load: Callable[[], Callable[[], object]]) -> None:
    """Print seconds as one JSON line: of imports (since `started`), of `load`, of two calls of what it returns."""
    seconds = {"import_s": time.perf_counter() - started}

    def timed(name: str, call: Callable[[], _Result]) -> _Result:
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    generate = timed("load_s", load)
    timed("first_image_s", generate)
    timed("next_image_s", generate)
    print(json.dumps({name: round(value, 4) for name, value in seconds.items()}))


def fresh_process(code: str, *arguments: object) -> dict[str, Any]:
    """The figures that `code` prints as its last line, and `process_s`, the whole process. ULError if it fails."""
    start = time.perf_counter()
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-300:]
        raise ULError(f"a fresh process for start-up ended with {done.returncode}: {said}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": round(seconds, 3)}


def start_up(bundle: Path, backend: str, precision: str | None, threads: int) -> dict[str, Any]:
    """Seconds of import, load, first and next image, and of `ul-generate -n 1` beyond the next image's."""
    figures = fresh_process(_LOAD, bundle, backend, precision or "", threads)
    options = ["--backend", backend, "--threads", threads, *(["--precision", precision] if precision else [])]
    with tempfile.TemporaryDirectory() as folder:
        whole = fresh_process(_GENERATE, bundle, "--out", f"{folder}/images", "-n", 1, "--json", *options)["process_s"]
    beyond = round(whole - figures["next_image_s"], 3)
    return figures | {"ul_generate_s": whole, "ul_generate_beyond_sampling_s": beyond}
