"""What the processor can do at best, measured: the rate of large matrix products."""

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np

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
        from ul_runtime.backends import ort_cpu

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
