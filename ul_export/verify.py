"""The comparison of two backends: graph by graph, and along the whole sampling path."""

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ul_runtime.backends import Backend, WrappedBackend
from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import BadInputError, NonFiniteError
from ul_runtime.images.convert import to_uint8
from ul_runtime.manifest import GraphName, interface
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import progress
from ul_runtime.samplers import ALPHA, LOGSNR, SIGMA
from ul_runtime.settings import NO_PRESET, Overrides


@dataclass(frozen=True)
class Tolerance:
    """Every |expected - actual| must be at most absolute + relative |expected|."""

    absolute: float
    relative: float


@dataclass(frozen=True)
class Tolerances:
    """Of a comparison: of one graph call, of z_0 after the whole loop (None = images alone count), and of final images.

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


BATCH_SIZES = (1, 3, 16)
CHECK_BATCHES = (*BATCH_SIZES, 16, 16, 16)  # of what is written: 68 images, guided and not
MOST_CALLS = 8  # of a graph, that a comparison keeps

_ANY = Tolerance(absolute=np.inf, relative=0.0)  # anything finite

Arrays = dict[str, np.ndarray]
Call = tuple[GraphName, Arrays, Arrays]  # inputs, outputs


@dataclass
class Recorder(WrappedBackend):
    """Keeps the inputs and outputs of every call of a backend: the real path, to compare other backends on."""

    calls: list[Call] = field(default_factory=list)

    def run(self, graph_name: GraphName, inputs: Arrays) -> Arrays:
        """Run and remember."""
        outputs = self.backend.run(graph_name, inputs)
        self.calls.append((graph_name, inputs, outputs))
        return outputs


@dataclass(frozen=True)
class ComparedCall:
    """A call of the reference, and how many times the tolerance another backend is away from it."""

    share: float
    inputs: Arrays
    outputs: Arrays


@dataclass
class Comparison:
    """What was compared: figures for the manifest, and every failure in words."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    # graph -> its calls that are furthest out, the worst first, MOST_CALLS of them
    worst_calls: dict[GraphName, list[ComparedCall]] = field(default_factory=dict)

    def note(self, what: str, difference: Difference) -> float:
        """Record a failure, if it is one; returns the largest difference."""
        if not difference.within:
            self.failures.append(f"{what}: {difference.reason}, largest difference {difference.largest:.3g}")
        return difference.largest

    def compare_calls(self, key: str, calls: list[Call], actual: Backend, tolerance: Tolerance) -> dict[str, Any]:
        """Run every recorded call again on `actual`; the figures of `key` get the largest difference of each graph."""
        largest: dict[str, float] = {}
        for graph, inputs, outputs in calls:
            differences = compare_outputs(outputs, actual.run(graph, inputs), tolerance)
            for name, difference in differences.items():
                largest[graph] = max(largest.get(graph, 0.0), self.note(f"{graph}, {name}, {key}", difference))
            share = max(difference.share for difference in differences.values())
            self._keep(graph, ComparedCall(share, inputs, outputs))
        self.figures[key] = {"largest_difference": largest}
        return self.figures[key]

    def _keep(self, graph: GraphName, call: ComparedCall) -> None:
        calls = self.worst_calls.setdefault(graph, [])
        insort(calls, call, key=lambda each: -each.share)
        del calls[MOST_CALLS:]

    def check(self, where: str, look: Callable[[], str] | None = None) -> None:
        """BadInputError with the first failures, or because nothing was compared; `look` finds out more about them."""
        if not self.figures:
            raise BadInputError(f"{where}: nothing was compared with torch, no bundle was written")
        if self.failures:
            shown = "; ".join(self.failures[:3])
            more = f" and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
            found = f"; {look()}" if look is not None and self.worst_calls else ""
            raise BadInputError(f"{where}: the graphs do not equal torch, no bundle was written: {shown}{more}{found}")

    @property
    def summary(self) -> dict[str, float]:
        """Of a comparison in float32, what ul-export prints."""
        paths = [figures for figures in self.figures.values() if "z_0" in figures]
        return {
            "worst_graph_difference": max(max(each["largest_difference"].values()) for each in self.figures.values()),
            "worst_z_0_difference": max(figures["z_0"] for figures in paths),
            "worst_image_psnr_db": min(figures["image_psnr_db"] for figures in paths),
        }

    @property
    def worst_graph(self) -> GraphName:
        """The graph with the call that is furthest out, by its tolerance."""
        return max(self.worst_calls, key=lambda graph: self.worst_calls[graph][0].share)


def compare_backends(
    reference: Pipeline,
    actual: Backend,
    *,
    seed: int = 0,
    tolerances: Tolerances = FP32,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    what: str = "torch",
    x: np.ndarray | None = None,
    to_first_failure: bool = False,
) -> Comparison:
    """Compare `actual` with the reference pipeline (`what`): same noise and labels, each of `paths`, batch by batch.

    Each graph is compared on the inputs that the reference path really gives it, then, while these agree, z_0 and the
    images of both whole paths, then each graph where no input is zero (unless the tolerances leave that out).
    Differences are collected, not raised; `to_first_failure`: only to the first batch that shows one.
    A size of `batch_sizes` that comes again is of other images; the encoder is also given images x `b c h w`.
    NonFiniteError: the reference gives NaN or Inf.
    """
    comparison, settings = Comparison(), paths(reference)
    with progress(f"comparing with {what}", sum(batch_sizes) * len(settings), "images") as tick:
        for (at, batch_size), (words, overrides) in product(enumerate(batch_sizes), settings.items()):
            again = batch_sizes[:at].count(batch_size)
            key = f"batch {batch_size}, {words}" + (f", seed {seed + again}" if again else "")
            path = _Path(batch_size, overrides, seed + again)
            _compare_path(comparison, reference, actual, path, key, tolerances, what)
            tick(batch_size)
            if to_first_failure and comparison.failures:
                return comparison
    more: dict[str, list[tuple[GraphName, Arrays]]] = {}
    if tolerances.off_path:
        more["any coefficients"] = list(_full_inputs(reference, seed))
    if x is not None:
        more["images"] = [("encoder", {"x": x})]
    for key, given in more.items():
        calls = [(graph, inputs, reference.backend.run(graph, inputs)) for graph, inputs in given]
        comparison.compare_calls(key, calls, actual, tolerances.graph)
    return comparison


def paths(pipeline: Pipeline) -> dict[str, Overrides]:
    """What is compared of a bundle, in words: its networks, guided and not; every student, alone and in pairs."""
    guidances = dict.fromkeys((1.0, pipeline.settings(preset=NO_PRESET).guidance))
    found = {f"guidance {weight:g}": Overrides(preset=NO_PRESET, guidance=weight) for weight in guidances}
    info = pipeline.manifest
    pairs = product(info.students_of("prior_step"), info.students_of("decoder_step"))
    for names in (*((name,) for name in info.students), *pairs):
        found[f"student {' and '.join(names)}"] = Overrides(students=names)
    return found


def compare_pixels(comparison: Comparison, actual: Backend, shape: tuple[int, int, int]) -> None:
    """Failures unless the graph `pixels` makes the runtime's own bytes of x `b c h w`, and tells what is not finite.

    Values are within [-1, 1] and beyond; at a batch of each size but the first an image has NaN, infinity or both.
    """
    draw, spoilt = np.random.default_rng(0), (np.nan, np.inf, -np.inf)
    for batch_size in BATCH_SIZES:
        x = draw.normal(0.0, 1.0, (batch_size, *shape)).astype(np.float32)
        x[0] = np.resize(np.linspace(-1.2, 1.2, 613, dtype=np.float32), shape)  # in steps of half a level
        finite = np.arange(batch_size) % 4 != 1
        for at, image in enumerate(np.flatnonzero(~finite)):
            x[image].reshape(-1)[draw.integers(0, x[image].size)] = spoilt[at % len(spoilt)]
        given = actual.run("pixels", {"x": x})
        images, magnitude = given["images"], given["sum"]
        if not np.array_equal(images[finite], to_uint8(x[finite])):
            comparison.failures.append("pixels: images differ from round((clip(x, -1, 1) + 1) * 127.5)")
        expected = np.abs(x.astype(np.float64)).sum(axis=(1, 2, 3)).astype(np.float32)
        difference = compare(expected[finite], magnitude[finite], FP32_GRAPH)
        comparison.note(f"pixels, sum, batch {batch_size}", difference)
        if np.isfinite(magnitude[~finite]).any():
            comparison.failures.append("pixels: the sum of an image with NaN or infinity is finite")


@dataclass(frozen=True)
class _Path:
    """A batch of images to sample."""

    batch_size: int
    overrides: Overrides
    seed: int

    def images(self, reference: Pipeline, backend: Backend) -> np.ndarray:
        """x by this backend, sampled as the reference is."""
        pipeline = Pipeline(reference.manifest, backend)
        (images,) = pipeline.generate(self.batch_size, seed=self.seed, batch_size=self.batch_size, **self.overrides)
        return images.x


def _compare_path(
    comparison: Comparison,
    reference: Pipeline,
    actual: Backend,
    path: _Path,
    key: str,
    tolerances: Tolerances,
    what: str,
) -> None:
    expected, given = Recorder(reference.backend), Recorder(actual)
    try:
        x = path.images(reference, expected)
    except NonFiniteError as error:
        message = f"{what} itself gives NaN or Inf; train on, or change sampling.guidance"
        raise NonFiniteError(f"images, {key}: {message}: {error}") from error
    figures = comparison.compare_calls(key, expected.calls, actual, tolerances.graph)
    if comparison.failures:
        return
    try:
        y = path.images(reference, given)
    except NonFiniteError as error:
        comparison.failures.append(f"images, {key}: {error}")
        return
    z_0 = [recorder.calls[-1][1]["z_0"] for recorder in (expected, given)]
    psnr = image_psnr_db(x, y)
    close = float((np.abs(to_uint8(x).astype(int) - to_uint8(y).astype(int)) <= 1).mean())
    if not (psnr >= tolerances.least_psnr_db and close >= tolerances.least_equal_pixels):
        comparison.failures.append(f"images, {key}: PSNR {psnr:.1f} dB, {close:.4%} of values within one level")
    figures["z_0"] = comparison.note(f"z_0, {key}", compare(z_0[0], z_0[1], tolerances.path or _ANY))
    figures["image_psnr_db"] = min(psnr, 200.0)
    figures["largest_pixel_difference"] = float(np.abs(x - y).max())
    figures["within_one_level"] = close
    figures["drift"] = drift(expected.calls, given.calls)


def drift(expected: Sequence[Call], given: Sequence[Call]) -> dict[str, list[float]]:
    """Root-mean-square difference of the state after each step, of both loops."""
    steps: dict[str, list[float]] = {}
    for (graph, _, outputs), (_, _, others) in zip(expected, given, strict=True):
        (state,) = (name for name in outputs if name in ("z_next", "x_next"))
        gap = outputs[state].astype(np.float64) - others[state]
        steps.setdefault(graph, []).append(float(f"{np.sqrt(np.square(gap).mean()):.4g}"))
    return steps


def _full_inputs(pipeline: Pipeline, seed: int) -> Iterator[tuple[GraphName, Arrays]]:
    """Inputs of every graph in which every value matters, at every batch size and number of branches.

    A sampling path leaves some out: dpmpp2m draws no noise and does not use the prediction of two rows before, and a
    guide comes from another bundle.
    """
    draw = np.random.default_rng(seed)
    for batch_size in BATCH_SIZES:
        yield "encoder", {"x": draw.uniform(-1, 1, (batch_size, *pipeline.image_shape)).astype(np.float32)}
        for branches in (1, 2):
            yield "prior_step", _full_step(pipeline, "prior_step", batch_size, branches, draw)
        yield "decoder_step", _full_step(pipeline, "decoder_step", batch_size, 1, draw)
        for name, student in pipeline.manifest.students.items():
            yield name, _full_step(pipeline, student.place, batch_size, 1, draw)


def _full_step(
    pipeline: Pipeline, graph: GraphName, batch_size: int, branches: int, draw: np.random.Generator
) -> Arrays:
    """Normal numbers; noise levels and labels, "no label" among them, from their whole range."""
    manifest = pipeline.manifest
    sizes = {"b": batch_size, "g": branches}
    inputs: Arrays = {
        name: draw.standard_normal([sizes[d] if isinstance(d, str) else d for d in shape]).astype(np.float32)
        for name, shape in interface(graph, manifest.image, manifest.latent)[0].items()
    }
    ends = manifest.logsnr_z if graph == "prior_step" else manifest.logsnr_x
    logsnr = draw.uniform(ends.min, ends.max, batch_size)
    for column, values in ((LOGSNR, logsnr), (ALPHA, alpha(logsnr)), (SIGMA, sigma(logsnr))):
        inputs["row"][:, column] = values
    if graph == "prior_step":
        inputs["label"] = draw.integers(0, pipeline.num_classes + 1, (batch_size, branches))
        inputs["rescale"] = draw.uniform(0.1, 1.0, batch_size).astype(np.float32)
    return inputs
