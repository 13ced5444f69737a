"""What ul-bench does: contenders by name, their measurement in turn, and what it was measured with."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ul_export.bench.measure import (
    Contender,
    Plan,
    add_shares,
    measure_contenders,
    num_turns,
    pipeline_contender,
    start_up,
    work_of_an_image,
)
from ul_runtime.backends import check_threads, ort_cpu
from ul_runtime.backends.choose import open_backend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import ULError, UsageError, require_packages
from ul_runtime.loading import open_bundle
from ul_runtime.machine import commit, versions
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Control, progress, stop_on_signal
from ul_runtime.settings import Overrides, check_count

if TYPE_CHECKING:
    from ul_export.bench.peers import TorchRun


_SIZES = (512, 768, 1536)  # powers of two beyond lose a fifth, where rows share the places of a cache
Product = Callable[[np.ndarray], object]


def ceilings(threads: int, precisions: set[str], seconds: float) -> dict[str, dict[str, float | str]]:
    """For each precision the best `gflops_per_s` found in about `seconds` for each library and size, and `by` which.

    float32: ONNX Runtime, and OpenVINO where it is installed. bfloat16: OpenVINO. Without a library: no ceiling.
    """
    found: dict[str, dict[str, float | str]] = {}
    for precision in sorted(precisions & {"fp32", "bf16"}):
        for size in _SIZES:
            a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
            for library, product in _products(precision, threads, b).items():
                rate = _best_rate(partial(product, a), 2 * size**3, seconds) / 1e9
                if rate > float(found.get(precision, {}).get("gflops_per_s", 0.0)):
                    found[precision] = {"gflops_per_s": rate, "by": f"{library}, {size} x {size} x {size}"}
    return found


def _products(precision: str, threads: int, b: np.ndarray) -> dict[str, Product]:
    """What multiplies by b here, by library."""
    products: dict[str, Product] = {}
    if precision == "fp32":
        product = ort_cpu.product(threads)
        products["ONNX Runtime"] = lambda a: product(a, b)
    if find_spec("openvino") is not None:
        from ul_runtime.backends import openvino

        products["OpenVINO"] = openvino.product(precision, threads, b)
    return products


def _best_rate(call: Callable[[], object], flops: int, seconds: float) -> float:
    """FLOP/s of the fastest of at least three calls."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return flops / min(times)


FIRST = "ort-cpu"
# contender -> (backend, precision; None = the bundle's own)
BACKENDS: dict[str, tuple[str, str | None]] = {
    FIRST: ("ort-cpu", None),
    "openvino": ("openvino", "fp32"),
    "openvino-bf16": ("openvino", "bf16"),
}
TORCH_PEERS = ("torch", "torch-bf16", "torch-compile", "torch-compile-bf16", "torch-loop", "torch-loop-bf16")
_PACKAGES = ("unified-latents", "numpy", "onnxruntime", "openvino", "torch")


@dataclass(frozen=True)
class BenchOptions:
    """What is asked for; `threads` None = as many as this process may use processors."""

    peers: Sequence[str]
    run: Path | None
    batch_sizes: Sequence[int]
    repeats: int
    image_repeats: int
    ceiling_s: float
    threads: int | None
    start_up: bool
    overrides: Overrides

    def check(self) -> None:
        """UsageError for what cannot be measured."""
        known = [*list(BACKENDS)[1:], *TORCH_PEERS]
        for name in self.peers:
            if name not in known:
                raise UsageError(f"peer {name!r} is not known; expected some of {', '.join(known)}")
        if not self.batch_sizes:
            raise UsageError("--batch-sizes is empty; expected numbers with commas between them")
        for size in self.batch_sizes:
            check_count("--batch-sizes", size)
        check_count("--repeats", self.repeats)
        check_count("--image-repeats", self.image_repeats)
        check_threads(self.threads)
        if self.torch_peers and self.run is None:
            raise UsageError(f"peer {self.torch_peers[0]} needs --run RUN: a bundle has no torch networks")
        if self.run is not None and not self.torch_peers:
            raise UsageError("--run is for torch peers and none is asked for; give --peers torch, or leave it out")

    @property
    def torch_peers(self) -> list[str]:
        """Those of the peers that torch runs."""
        return [name for name in self.peers if name in TORCH_PEERS]


def run_bench(path: Path, options: BenchOptions) -> dict[str, Any]:
    """Every figure, JSON-ready. UsageError before anything is measured; StoppedError on a signal."""
    options.check()
    threads = options.threads or len(os.sched_getaffinity(0))
    bundle = open_bundle(path)
    torch_run = _torch_run(bundle, options, threads) if options.torch_peers else None
    plan = Plan(options.batch_sizes, options.repeats, options.image_repeats, options.overrides)
    makers = [_maker(name, bundle, torch_run, plan, threads) for name in (FIRST, *options.peers)]
    precisions = {make().precision for make in makers}  # what cannot be made is refused here
    settings = Pipeline(bundle, open_backend(FIRST, bundle)).settings(**options.overrides)
    with stop_on_signal() as stop:
        work = work_of_an_image(bundle, threads, options.overrides)
        before = ceilings(threads, precisions, options.ceiling_s)
        with progress("measuring", num_turns(plan, len(makers), work), "turns") as advance:
            results = measure_contenders(makers, work, plan, Control(stop, advance))
        best = _best(before, ceilings(threads, precisions, options.ceiling_s))
        add_shares(results, best)
        started = _start_ups(path, options, threads, Control(stop)) if options.start_up else None
    return {
        "bundle": {"path": str(path), "name": bundle.manifest.name, "hash": bundle.hash},
        "settings": settings.as_dict(),
        "threads": threads,
        "an_image": work.as_dict(),
        "ceilings": best,
        "results": results,
        "start_up": started,
        "machine": {"processor": _processor(), "processors": os.cpu_count()},
        "versions": versions(_PACKAGES),
        "commit": commit(),
    }


def _torch_run(bundle: Bundle, options: BenchOptions, threads: int) -> "TorchRun":
    require_packages("torch", extras="train")
    from ul_export.bench.peers import TorchRun

    assert options.run is not None
    loaded = TorchRun.load(options.run, threads)
    loaded.check_same(options.run, bundle)
    return loaded


def _maker(
    name: str, bundle: Bundle, torch_run: "TorchRun | None", plan: Plan, threads: int
) -> Callable[[], Contender]:
    if torch_run is not None and name in TORCH_PEERS:
        return partial(torch_run.contender, name, bundle, plan.overrides)
    backend, precision = BACKENDS[name]

    def make() -> Contender:
        opened = open_backend(backend, bundle, precision=precision, threads=threads)
        return pipeline_contender(name, bundle, opened, plan.overrides)

    return make


def _best(*found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The highest ceiling of each precision."""
    names = {name for ceilings_ in found for name in ceilings_}
    return {
        name: max((c[name] for c in found if name in c), key=lambda ceiling: ceiling["gflops_per_s"])
        for name in sorted(names)
    }


def _start_ups(path: Path, options: BenchOptions, threads: int, control: Control) -> dict[str, Any]:
    """Start-up of every contender but the compiled ones, whose first images take minutes (`warm_up_s`)."""
    started = {}
    for name in (FIRST, *options.peers):
        if "compile" in name:
            continue
        control.check()
        try:
            if name in BACKENDS:
                started[name] = start_up(path, *BACKENDS[name], threads)
            elif options.run is not None:
                from ul_export.bench.peers import torch_start_up

                started[name] = torch_start_up(options.run, name, threads)
        except ULError:
            control.check()  # Ctrl-C ends the fresh process as well
            raise
    return started


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
