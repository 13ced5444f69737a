"""The one loop of every sampler: each image follows its own rows of coefficients; the step graphs do the arithmetic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from ul_runtime import noise
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.images.convert import to_uint8
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.progress import Tick
from ul_runtime.samplers import B_0, LOGSNR, A, S
from ul_runtime.settings import Overrides, Settings

Inputs: TypeAlias = dict[str, np.ndarray]
NO_NOISE = -1  # in place of a stream


class Runs(Protocol):
    """What runs graphs; see backends.Backend."""

    def run(self, graph_name: GraphName, inputs: Inputs) -> Inputs:
        """The outputs of a graph by name."""


@dataclass(frozen=True)
class NoiseKeys:
    """Whose noise: a key for each image, so that images of other seeds may share a batch."""

    seeds: np.ndarray  # uint64 b
    indices: np.ndarray  # int64 b
    shape: tuple[int, ...]  # c h w

    def draw(self, streams: np.ndarray) -> np.ndarray:
        """Noise `b c h w` from each image's stream, int64 `b`; 0 where that is NO_NOISE."""
        drawn = np.zeros((len(self.indices), *self.shape), np.float32)
        for seed, stream in set(zip(self.seeds.tolist(), streams.tolist(), strict=True)):
            if stream != NO_NOISE:
                at = (self.seeds == seed) & (streams == stream)
                drawn[at] = noise.normals(seed, self.indices[at], stream, self.shape)
        return drawn


@dataclass(frozen=True)
class Guide:
    """A weaker prior on `backend`: its prediction is the graph's input `guide` at calls where it is `asked`."""

    backend: Runs
    condition: Inputs  # of its own step
    asked: np.ndarray  # bool calls


@dataclass(frozen=True)
class Loop:
    """Images `b` from noise through `calls` calls of a step graph, as data.

    `condition(k)` are the graph's other inputs at call k, the same object for all calls that share them. Beside them,
    the input `takes` is the last state of the loop before.
    """

    graph: GraphName
    state: str  # its input; the output is {state}_next
    rows: np.ndarray  # float32 calls b 8, see samplers.ROW
    streams: np.ndarray  # int64 calls b: of the noise that each image's row takes
    noise: NoiseKeys
    start: int  # stream of the first state
    condition: Callable[[int], Inputs]
    takes: str | None = None
    batch: int = 0  # computed as so many images at least
    guide: Guide | None = None


def side_by_side(tables: Sequence[np.ndarray], stream: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows `calls b 8` and streams `calls b` of images that each follow a table `[rows, 8]`; row k draws `stream(k)`.

    An image with a shorter table waits at the start: its rows have its first noise level, a = 1 and no other
    coefficient, so its state stays and the network sees what it sees in the image's first call.
    """
    calls = max(map(len, tables))
    rows = np.zeros((calls, len(tables), tables[0].shape[1]), np.float32)
    streams = np.full(rows.shape[:2], NO_NOISE, np.int64)
    for image, table in enumerate(tables):
        first = calls - len(table)
        rows[:first, image, :A] = table[0, :A]
        rows[:first, image, A] = 1.0
        rows[first:, image] = table
        drawing = np.flatnonzero(table[:, S])
        streams[first + drawing, image] = [stream(k) for k in drawing.tolist()]
    return rows, streams


def run_on_host(backend: Runs, loops: Sequence[Loop], tick: Tick, *, pixels: bool = False) -> list[np.ndarray]:
    """See Backend.run_loops: the loops one after the other, each call of a graph a call of `backend`."""
    states: list[np.ndarray] = []
    for loop in loops:
        states.append(_run(backend, loop, states[-1] if states else None, tick))
    return [*states[:-1], *to_pixels(states[-1])] if pixels else states


def _run(backend: Runs, loop: Loop, before: np.ndarray | None, tick: Tick) -> np.ndarray:
    """The last state of one loop, `b c h w`."""
    taken = {} if loop.takes is None or before is None else {loop.takes: before}
    state = loop.noise.draw(np.full_like(loop.streams[0], loop.start))
    history = np.zeros((len(state), 2, *state.shape[1:]), np.float32)
    for k, row in enumerate(loop.rows):
        tick(0)
        step = {loop.state: state, "history": history, "noise": loop.noise.draw(loop.streams[k]), "row": row, **taken}
        condition = loop.condition(k)
        if loop.guide is not None and loop.guide.asked[k]:
            guide = loop.guide.backend.run(loop.graph, step | loop.guide.condition)["pred"]
            condition = condition | {"guide": guide}
        out = backend.run(loop.graph, step | condition)
        state, history = out[f"{loop.state}_next"], out["history_next"]
        tick(len(state))
    return state


def to_pixels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `b h w c` of x, and the sums of its magnitudes, `b`: finite where all of x is."""
    total = np.abs(x).sum(axis=(1, 2, 3), dtype=np.float64)
    return to_uint8(np.where(np.isfinite(total)[:, None, None, None], x, np.float32(0.0))), total


@dataclass(frozen=True)
class Guidance:
    """How each image of a batch is guided: pred = w pred(label) + (1 - w) u, where u is the guide's or of no label."""

    labels: np.ndarray  # int64 b
    weights: np.ndarray  # float64 b; w = 1 is off
    intervals: np.ndarray  # float32 b 2: lowest and highest logsnr
    rescales: np.ndarray  # float32 b: phi of Lin et al. 2023 (arXiv 2305.08891), 0 = off

    @classmethod
    def of(cls, labels: np.ndarray, settings: Sequence[Settings]) -> "Guidance":
        """As the settings of each image say."""
        weights = np.array([each.guidance for each in settings], np.float64)
        everywhere = (-np.inf, np.inf)
        intervals = np.array([each.guidance_interval or everywhere for each in settings], np.float32)
        return cls(labels, weights, intervals, np.array([each.guidance_rescale for each in settings], np.float32))

    def guided(self, rows: np.ndarray) -> np.ndarray:
        """At which of the rows `calls b 8` each image is guided: bool `calls b`."""
        logsnr = rows[..., LOGSNR]
        return (self.weights != 1.0) & (self.intervals[:, 0] <= logsnr) & (logsnr <= self.intervals[:, 1])

    def by_no_label(self, guided: np.ndarray, no_label: int) -> Inputs:
        """Classifier-free: two branches, weights w and 1 - w (Ho & Salimans 2022, arXiv 2207.12598)."""
        w = np.where(guided, self.weights, 1.0)
        branches = {"label": np.stack([self.labels, np.full_like(self.labels, no_label)], axis=1)}
        return branches | {"weight": np.stack([w, 1.0 - w], axis=1).astype(np.float32)} | self._rescaled(guided)

    def by_guide(self, guided: np.ndarray) -> Inputs:
        """One branch of weight w, and the guide's prediction of weight 1 - w (Karras et al. 2024, arXiv 2406.02507)."""
        w = np.where(guided, self.weights, 1.0)
        weights = {"weight": w[:, None].astype(np.float32), "guide_weight": (1.0 - w).astype(np.float32)}
        return weights | self._rescaled(guided)

    def _rescaled(self, guided: np.ndarray) -> Inputs:
        return {"rescale": np.where(guided, self.rescales, np.float32(0.0))}


def unguided(labels: np.ndarray, shape: tuple[int, ...]) -> Inputs:
    """pred(label): one branch, for labels `b` and states of `shape` c h w."""
    one, off = np.ones((len(labels), 1), np.float32), np.zeros(len(labels), np.float32)
    nobody = np.zeros((len(labels), *shape), np.float32)  # takes no memory until it is read
    return {"label": labels[:, None], "weight": one, "guide": nobody, "guide_weight": off, "rescale": off}


def conditions(
    guidance: Guidance, rows: np.ndarray, shape: tuple[int, ...], no_label: int, guide: Runs | None
) -> tuple[Callable[[int], Inputs], Guide | None]:
    """The condition of a prior's loop over `rows`, with its guide if there is one that is asked.

    The graph has two branches only at calls where an image is guided by no label; there, and where a guide is asked,
    the others have weights 1 and 0, which leave their bytes as they are.
    """
    guided = guidance.guided(rows)
    if guide is None:
        guided = guided & (guidance.labels != no_label)  # these have nothing to be guided from
    off = unguided(guidance.labels, shape)
    made: dict[bytes, Inputs] = {np.zeros_like(guided[0]).tobytes(): off}

    def at(k: int) -> Inputs:
        key = guided[k].tobytes()
        if key not in made:
            by = guidance.by_no_label(guided[k], no_label) if guide is None else guidance.by_guide(guided[k])
            made[key] = off | by
        return made[key]

    return at, None if guide is None else Guide(guide, off, np.any(guided, axis=1))


def one_call(state: str, values: np.ndarray, logsnr: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> Inputs:
    """A step whose prediction alone is wanted, of `values` `b c h w` at noise levels `b`."""
    row = np.zeros((len(values), S + 1), np.float32)
    row[:, :A] = np.stack([logsnr, alpha, sigma], axis=1)
    row[:, B_0] = 1.0
    history = np.zeros((len(values), 2, *values.shape[1:]), np.float32)
    return {state: values, "history": history, "noise": np.zeros_like(values), "row": row}


def check_effective(settings: Settings, given: Overrides, *, has_guide: bool) -> None:
    """UsageError for a guide or a rescale that would do nothing because guidance is off and nobody said so."""
    asked = "the guide" if has_guide else "guidance_rescale" if given.get("guidance_rescale") else ""
    if asked and settings.guidance == 1.0 and given.get("guidance") is None:
        raise UsageError(f"guidance is 1 = off unless given, so {asked} would do nothing; give guidance, for example 2")


def check_guide(main: BundleInfo, guide: BundleInfo) -> None:
    """BadInputError unless the guide's prior is of the same latents: shape, noise levels, classes and encoder."""
    facts: list[tuple[str, object, object]] = [
        ("latent channels", main.latent.channels, guide.latent.channels),
        ("latent size", main.latent.size, guide.latent.size),
        ("lowest logsnr", main.logsnr_z.min, guide.logsnr_z.min),
        ("highest logsnr", main.logsnr_z.max, guide.logsnr_z.max),
        ("number of classes", len(main.classes), len(guide.classes)),
        *((f"class {k}", *names) for k, names in enumerate(zip(main.classes, guide.classes, strict=False))),
        ("encoder", *_encoders(main, guide)),
    ]
    for what, wanted, given in facts:
        if given != wanted:
            message = f"{what} {given}, the bundle has {wanted}"
            raise BadInputError(f"guide {guide.name}: {message}; give a guide trained on the same latents and classes")


def _encoders(main: BundleInfo, guide: BundleInfo) -> tuple[str, str]:
    """Start of the hash of each one's encoder; empty if either does not say."""
    hashes = main.provenance.encoder_sha256, guide.provenance.encoder_sha256
    return (hashes[0][:12], hashes[1][:12]) if hashes[0] and hashes[1] else ("", "")
