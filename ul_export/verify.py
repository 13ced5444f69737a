"""The proof of a bundle: its graphs against torch, one by one on the real path, and along the whole of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ul_export.compare import FP32_GRAPH, FP32_PATH, Difference, Tolerance, compare, compare_outputs, image_psnr_db
from ul_runtime.backends import Backend
from ul_runtime.errors import BadInputError
from ul_runtime.pipeline import Pipeline, to_uint8

BATCH_SIZES = (1, 3, 16)
LEAST_PSNR_DB = 60.0  # of final images, float32 against float32
LEAST_EQUAL_PIXELS = 0.999  # share of uint8 values that differ by at most one


@dataclass
class Recorder:
    """A backend that keeps the inputs and outputs of every call: the real path, to compare other backends on."""

    backend: Backend
    calls: list[tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the backend behind."""
        return self.backend.name

    @property
    def precision(self) -> str:
        """Of the backend behind."""
        return self.backend.precision

    def run(self, graph_name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run and remember."""
        outputs = self.backend.run(graph_name, inputs)
        self.calls.append((graph_name, inputs, outputs))
        return outputs


@dataclass
class Proof:
    """What was compared: figures for the manifest, and every failure in words."""

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def note(self, what: str, difference: Difference) -> float:
        """Record a failure, if it is one; returns the largest difference."""
        if not difference.within:
            self.failures.append(f"{what}: {difference.reason}, largest difference {difference.largest:.3g}")
        return difference.largest


def verify(
    reference: Pipeline,
    actual: Backend,
    *,
    num_images: int = 16,
    seed: int = 0,
    tolerance: Tolerance = FP32_GRAPH,
    say: Callable[[str], None] = lambda text: None,
) -> Proof:
    """Compare `actual` with the reference pipeline (torch): same noise and labels, guided and not, several batch sizes.

    Each graph is compared on the inputs that the reference path really gives it; then z_0 and the images of both
    whole paths are compared. Failures are collected, not raised.
    """
    proof = Proof()
    guided = reference.settings().guidance != 1.0
    for batch_size in BATCH_SIZES:
        for guidance in (1.0, reference.settings().guidance) if guided else (1.0,):
            say(f"comparing with torch: batch size {batch_size}, guidance {guidance:g}")
            _verify_path(proof, reference, actual, batch_size, guidance, min(batch_size, num_images), seed, tolerance)
    _verify_encoder(proof, reference, actual, seed, tolerance)
    return proof


def _verify_path(
    proof: Proof,
    reference: Pipeline,
    actual: Backend,
    batch_size: int,
    guidance: float,
    num_images: int,
    seed: int,
    tolerance: Tolerance,
) -> None:
    key = f"batch {batch_size}, guidance {guidance:g}"
    recorder = Recorder(reference.backend)
    paths = [Pipeline(reference.bundle, backend) for backend in (recorder, Recorder(actual))]
    expected, given = (
        list(path.generate(num_images, seed=seed, batch_size=batch_size, guidance=guidance)) for path in paths
    )
    largest: dict[str, float] = {}
    for graph, inputs, outputs in recorder.calls:
        for name, difference in compare_outputs(outputs, actual.run(graph, inputs), tolerance).items():
            worst = proof.note(f"{graph}, {name}, {key}", difference)
            largest[graph] = max(largest.get(graph, 0.0), worst)
    z_0 = [path.backend.calls[-1][1]["z_0"] for path in paths]  # type: ignore[attr-defined]
    x, y = (np.concatenate([batch.x for batch in batches]) for batches in (expected, given))
    psnr = image_psnr_db(x, y)
    close = float((np.abs(to_uint8(x).astype(int) - to_uint8(y).astype(int)) <= 1).mean())
    if psnr < LEAST_PSNR_DB or close < LEAST_EQUAL_PIXELS:
        proof.failures.append(f"images, {key}: PSNR {psnr:.1f} dB, {close:.4%} of values within one level")
    proof.figures[key] = {
        "largest_difference": largest,
        "z_0": proof.note(f"z_0, {key}", compare(z_0[0], z_0[1], FP32_PATH)),
        "image_psnr_db": min(psnr, 200.0),
        "within_one_level": close,
    }


def _verify_encoder(proof: Proof, reference: Pipeline, actual: Backend, seed: int, tolerance: Tolerance) -> None:
    """The encoder on images that the model itself makes, at every batch size."""
    (images,) = reference.generate(max(BATCH_SIZES), seed=seed, batch_size=max(BATCH_SIZES))
    x = images.x.clip(-1.0, 1.0)
    worst = 0.0
    for batch_size in BATCH_SIZES:
        inputs = {"x": np.ascontiguousarray(x[:batch_size])}
        outputs = reference.backend.run("encoder", inputs)
        for name, difference in compare_outputs(outputs, actual.run("encoder", inputs), tolerance).items():
            worst = max(worst, proof.note(f"encoder, {name}, batch {batch_size}", difference))
    proof.figures["encoder"] = {"largest_difference": worst}


def require(proof: Proof, where: str) -> None:
    """BadInputError with the first failures unless the proof holds."""
    if proof.failures:
        shown = "; ".join(proof.failures[:3])
        more = f" and {len(proof.failures) - 3} more" if len(proof.failures) > 3 else ""
        raise BadInputError(f"{where}: the graphs do not equal torch, no bundle was written: {shown}{more}")
