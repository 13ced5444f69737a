"""The comparison that a bundle's proof rests on: what is missing, not finite or empty fails."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """Every |expected - actual| must be at most absolute + relative |expected|."""

    absolute: float
    relative: float


@dataclass(frozen=True)
class Tolerances:
    """Of a proof: of one graph call, of z_0 after the whole loop (None = images alone count), and of final images.

    `off_path`: whether calls with random inputs, which no sampling path has, are within the tolerance too.
    """

    graph: Tolerance
    path: Tolerance | None
    least_psnr_db: float  # of final images in [-1, 1]
    least_equal_pixels: float = 0.0  # share of uint8 values that differ by at most one
    off_path: bool = True


FP32_GRAPH = Tolerance(absolute=1e-5, relative=1e-4)
FP32_PATH = Tolerance(absolute=2e-4, relative=1e-3)
FP32 = Tolerances(FP32_GRAPH, FP32_PATH, least_psnr_db=80.0, least_equal_pixels=0.999)  # 133 to 142 dB measured
REDUCED = {  # each against float32; half precision has steps of 2^-11 and 2^-8, int8 scales that the path has shown
    "fp16": Tolerances(Tolerance(absolute=2.5e-3, relative=1e-3), None, least_psnr_db=35.0),
    "bf16": Tolerances(Tolerance(absolute=0.02, relative=0.01), None, least_psnr_db=35.0),
    "int8": Tolerances(Tolerance(absolute=0.1, relative=0.05), None, least_psnr_db=35.0, off_path=False),
}


@dataclass(frozen=True)
class Difference:
    """How far two arrays are apart; `within` is the verdict, `reason` says what is wrong when it is not.

    `share`: the largest part of the tolerance that a value takes; above 1 it is not within.
    """

    largest: float
    within: bool
    reason: str = ""
    share: float = np.inf


def compare(expected: np.ndarray | None, actual: np.ndarray | None, tolerance: Tolerance) -> Difference:
    """Whether two arrays agree; a missing, empty, differently shaped or typed, or non-finite one never does."""
    if expected is None or actual is None:
        return Difference(np.inf, False, "missing on one side")
    if expected.shape != actual.shape:
        return Difference(np.inf, False, f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if expected.dtype != actual.dtype:
        return Difference(np.inf, False, f"dtype {actual.dtype}, expected {expected.dtype}")
    if expected.size == 0:
        return Difference(np.inf, False, "empty")
    for side, array in (("expected", expected), ("actual", actual)):
        if not np.isfinite(array).all():
            return Difference(np.inf, False, f"{int((~np.isfinite(array)).sum())} {side} values are not finite")
    gap = np.abs(expected.astype(np.float64) - actual.astype(np.float64))
    bound = tolerance.absolute + tolerance.relative * np.abs(expected.astype(np.float64))
    largest = float(gap.max())
    share = float((gap / np.maximum(bound, np.finfo(np.float64).tiny)).max())
    if bool((gap <= bound).all()):
        return Difference(largest, True, share=share)
    worst = np.unravel_index(int((gap - bound).argmax()), gap.shape)
    where = ", ".join(str(i) for i in worst)
    return Difference(largest, False, f"[{where}] is {actual[worst]:.6g}, expected {expected[worst]:.6g}", share)


def compare_outputs(
    expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], tolerance: Tolerance
) -> dict[str, Difference]:
    """`compare` for every name on either side; no names at all is a failure."""
    names = sorted({*expected, *actual})
    if not names:
        return {"": Difference(np.inf, False, "no outputs")}
    return {name: compare(expected.get(name), actual.get(name), tolerance) for name in names}


def image_psnr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    """PSNR of float images in [-1, 1], in dB; infinite only for equal finite images. ValueError for anything else."""
    if expected.shape != actual.shape or expected.size == 0:
        raise ValueError(f"images of shape {list(actual.shape)} and {list(expected.shape)} cannot be compared")
    if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        raise ValueError("images are not finite")
    error = float(np.mean((expected.astype(np.float64) - actual.astype(np.float64)) ** 2))
    return float("inf") if error == 0.0 else float(10.0 * np.log10(4.0 / error))
