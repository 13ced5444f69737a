"""Measure a bundle: the runners by name, what is measured of them in turn, and this machine's ceiling."""

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ul_export.bench.measure import (
    Runner,
    add_shares,
    fresh_process,
    measure_runners,
    num_turns,
    pipeline_runner,
    start_up,
    work_of_an_image,
)
from ul_export.options import BenchOptions
from ul_runtime.backends import check_threads
from ul_runtime.backends.choose import open_backend
from ul_runtime.backends.ort_cpu import session_options
from ul_runtime.bundle import Bundle
from ul_runtime.errors import ULError, UsageError
from ul_runtime.install import require_packages
from ul_runtime.loading import open_bundle
from ul_runtime.machine import origin
from ul_runtime.progress import progress
from ul_runtime.settings import Overrides, check_count, parse_counts, resolve_settings
from ul_runtime.signals import check_stopped, stop_on_signal
from ul_runtime.threads import cores

_LOG = logging.getLogger(__name__)
_PACKAGES = ("unified-latents", "numpy", "onnxruntime", "openvino", "torch")
FIRST = "ort-cpu"
# runner -> (backend, precision; None = the bundle's own)
BACKENDS: dict[str, tuple[str, str | None]] = {
    FIRST: ("ort-cpu", None),
    "openvino": ("openvino", "fp32"),
    "openvino-bf16": ("openvino", "bf16"),
}
TORCH_PEERS = ("torch", "torch-bf16", "torch-compile", "torch-compile-bf16", "torch-loop", "torch-loop-bf16")
_QUICK_SIZES, _SIZES = "1,8", "1,8,64"
_QUICK_CEILING_S, _CEILING_S = 0.02, 0.3  # for each library and size
_PRODUCT_SIZES = (512, 768, 1536)  # powers of two beyond lose a fifth, where rows share the places of a cache


def run_bench(path: Path, options: BenchOptions, overrides: Overrides) -> dict[str, Any]:
    """Every figure, JSON-ready. UsageError before anything is measured; StoppedError on a signal."""
    peers, sizes = check(options)
    threads = options.threads or cores()
    repeats, image_repeats, seconds = options.repeats, options.image_repeats, _CEILING_S
    if options.quick:
        repeats, image_repeats, seconds = min(repeats, 2), 1, _QUICK_CEILING_S
    bundle = open_bundle(path)
    makers = _makers((FIRST, *peers), bundle, options.run, overrides, threads)
    precisions = {make().precision for make in makers}  # what cannot be made is refused here
    settings = resolve_settings(bundle.manifest, overrides, can_guide=bool(bundle.manifest.classes))
    if find_spec("onnx") is None:
        _LOG.info("no ceiling by ONNX Runtime: onnx is not installed; pip install onnx")
    with stop_on_signal():
        work = work_of_an_image(bundle, threads, overrides)
        before = ceilings(threads, precisions, seconds)
        turns = num_turns(work, len(sizes) * len(makers), repeats, image_repeats)
        with progress("measuring", turns, "turns") as tick:
            results = measure_runners(makers, work, sizes, repeats, image_repeats, tick)
        after = ceilings(threads, precisions, seconds)
        best = {name: max(each, after[name], key=itemgetter("gflops_per_s")) for name, each in before.items()}
        add_shares(results, best)
        started = _start_ups(path, peers, options.run, threads) if options.start_up else None
    return {
        "bundle": {"path": str(path), "name": bundle.manifest.name, "hash": bundle.hash},
        "settings": settings.as_dict(),
        "threads": threads,
        "an_image": work.as_dict(),
        "ceilings": best,
        "results": results,
        "start_up": started,
        "machine": {"processor": _cpu_name(), "processors": os.cpu_count()},
        **origin("ul-bench", _PACKAGES),
    }


def check(options: BenchOptions) -> tuple[list[str], list[int]]:
    """The peers and the batch sizes; UsageError for what cannot be measured."""
    peers = [part.strip() for part in options.peers.split(",")] if options.peers else []
    if "" in peers or len(set(peers)) != len(peers):
        raise UsageError(f"--peers {options.peers!r}: expected different names with commas between them")
    known = [*list(BACKENDS)[1:], *TORCH_PEERS]
    for name in peers:
        if name not in known:
            raise UsageError(f"peer {name!r} is not known; expected some of {', '.join(known)}")
    asked = options.batch_sizes
    sizes = parse_counts("--batch-sizes", (_QUICK_SIZES if options.quick else _SIZES) if asked is None else asked)
    if len(set(sizes)) != len(sizes):
        raise UsageError(f"--batch-sizes {asked}: expected different numbers")
    check_count("--repeats", options.repeats)
    check_count("--image-repeats", options.image_repeats)
    check_threads(options.threads)
    by_torch = [name for name in peers if name in TORCH_PEERS]
    if by_torch and options.run is None:
        raise UsageError(f"peer {by_torch[0]} needs --run RUN: a bundle has no torch networks")
    if options.run is not None and not by_torch:
        raise UsageError("--run is for torch peers and none is asked for; give --peers torch, or leave it out")
    if options.plot is not None:
        require_packages("matplotlib", extras="train")
        if options.plot.suffix != ".png" or not options.plot.parent.is_dir():
            raise UsageError(f"--plot {options.plot}: expected a name that ends in .png, in a folder that exists")
    return peers, sizes


def _makers(
    names: Sequence[str], bundle: Bundle, run: Path | None, overrides: Overrides, threads: int
) -> list[Callable[[], Runner]]:
    """What makes the runners of these names anew. UsageError, BadInputError: `run` is not the bundle's."""
    torch_run = None
    if run is not None:
        require_packages("torch", extras="train")
        from ul_export.bench.peers import TorchRun

        torch_run = TorchRun.load(run, threads)
        torch_run.check_same(bundle)

    def make(name: str) -> Runner:
        if torch_run is not None and name in TORCH_PEERS:
            return torch_run.runner(name, overrides)
        backend, precision = BACKENDS[name]
        opened = open_backend(backend, bundle, precision=precision, threads=threads)
        return pipeline_runner(name, bundle.manifest, opened, overrides)

    return [partial(make, name) for name in names]


def ceilings(threads: int, precisions: set[str], seconds: float) -> dict[str, dict[str, float | str]]:
    """For each precision the best `gflops_per_s` found in about `seconds` for each library and size, and `by` which.

    float32: ONNX Runtime, and OpenVINO where it is installed. bfloat16: OpenVINO. Without a library: no ceiling.
    """
    found: dict[str, dict[str, float | str]] = {}
    for precision in sorted(precisions & {"fp32", "bf16"}):
        for size in _PRODUCT_SIZES:
            a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
            for library, product in _products(precision, threads, b):
                rate = _best_rate(partial(product, a), 2 * size**3, seconds) / 1e9
                if rate > float(found.get(precision, {}).get("gflops_per_s", 0.0)):
                    found[precision] = {"gflops_per_s": rate, "by": f"{library}, {size} x {size} x {size}"}
    return found


def _products(precision: str, threads: int, b: np.ndarray) -> Iterator[tuple[str, Callable[[np.ndarray], object]]]:
    """What multiplies by b here, each with its library."""
    if precision == "fp32" and find_spec("onnx") is not None:
        yield "ONNX Runtime", ort_product(threads, b)
    if find_spec("openvino") is not None:
        from ul_runtime.backends import openvino

        yield "OpenVINO", openvino.product(precision, threads, b)


def ort_product(threads: int, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The matrix product a b, each float32 `n n`, by ONNX Runtime on so many threads."""
    from onnx import TensorProto, helper

    a_info, b_info, y_info = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in "aby")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "product", [a_info, b_info], [y_info])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    cpu = ["CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), session_options(threads), providers=cpu)
    return lambda a: session.run(None, {"a": a, "b": b})[0]


def _best_rate(call: Callable[[], object], flops: int, seconds: float) -> float:
    """FLOP/s of the fastest of at least three calls."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return flops / min(times)


def _start_ups(path: Path, peers: Sequence[str], run: Path | None, threads: int) -> dict[str, Any]:
    """Start-up of every runner but the compiled ones, whose first images take minutes (`warm_up_s`)."""
    started = {}
    for name in (FIRST, *peers):
        if "compile" in name:
            continue
        check_stopped()
        try:
            if name in BACKENDS:
                started[name] = start_up(path, *BACKENDS[name], threads)
            elif run is not None:
                from ul_export.bench.peers import LOAD

                started[name] = fresh_process(LOAD, run, name, threads)
        except ULError:
            check_stopped()  # Ctrl-C ends the fresh process as well
            raise
    return started


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
