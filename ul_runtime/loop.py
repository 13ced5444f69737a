"""The one loop of every sampler: it walks the rows of a coefficient table and does no arithmetic of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from ul_runtime import noise
from ul_runtime.errors import BadInputError, StoppedError, UsageError
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.samplers import S
from ul_runtime.settings import Overrides, Settings

# (state b c h w, history b 2 c h w, noise b c h w, row b 8) -> (next state, prediction), all float32
Step: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def never() -> bool:
    """The `stop` of a loop that nobody stops."""
    return False


def run_steps(
    step: Step,
    table: np.ndarray,
    state: np.ndarray,
    noise_for_step: Callable[[int], np.ndarray],
    stop: Callable[[], bool] = never,
) -> np.ndarray:
    """The state `b c h w` (float32) after all rows of `table` `[rows, 8]` (samplers.ROW).

    `noise_for_step(k)` is asked only where row k draws noise. `stop` is asked before each step: StoppedError.
    """
    rows = table.astype(np.float32)
    batch = len(state)
    history = np.zeros((batch, 2, *state.shape[1:]), np.float32)
    silence = np.zeros_like(state)
    for k, row in enumerate(rows):
        if stop():
            raise StoppedError(f"stopped before step {k + 1} of {len(rows)}; run the same command again to go on")
        noise = noise_for_step(k) if row[S] != 0.0 else silence
        state, pred = step(state, history, noise, np.tile(row, (batch, 1)))
        history = np.stack([pred, history[:, 0]], axis=1)
    return state


Inputs = dict[str, np.ndarray]


def unguided(label: np.ndarray, z: np.ndarray) -> Inputs:
    """pred(label): one branch, for labels `b` and a state `b c h w`."""
    off, nobody = np.zeros(len(label), np.float32), np.zeros(z.shape, np.float32)  # takes no memory until it is read
    one = np.ones((len(label), 1), np.float32)
    return {"label": label[:, None], "weight": one, "guide": nobody, "guide_weight": off, "rescale": off}


def classifier_free(label: np.ndarray, z: np.ndarray, no_label: int, guidance: float, rescale: float) -> Inputs:
    """Two branches, weights w and 1 - w (Ho & Salimans 2022, arXiv 2207.12598); `rescale` is phi of Lin et al. 2023.

    Images without a label have nothing to be guided from: theirs are 1, 0 and 0, as in a batch that is not guided.
    """
    pull = np.where(label == no_label, 1.0, guidance)
    return {
        **unguided(label, z),
        "label": np.stack([label, np.full_like(label, no_label)], axis=1),
        "weight": np.stack([pull, 1.0 - pull], axis=1).astype(np.float32),
        "rescale": np.where(label == no_label, 0.0, rescale).astype(np.float32),
    }


def autoguided(label: np.ndarray, guide: np.ndarray, guidance: float, rescale: float) -> Inputs:
    """One branch of weight w, and the guide's prediction `b c h w` of weight 1 - w (Karras et al. 2024)."""
    return {
        **unguided(label, guide),
        "weight": np.full((len(label), 1), guidance, np.float32),
        "guide": guide,
        "guide_weight": np.full(len(label), 1.0 - guidance, np.float32),
        "rescale": np.full(len(label), rescale, np.float32),
    }


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


@dataclass(frozen=True)
class Noise:
    """The noise of a loop, `b c h w`, by its keys (see noise.normals): a device can make it itself."""

    seed: int
    indices: np.ndarray  # int64 b
    shape: tuple[int, ...]  # c h w
    start: int  # its stream
    step: Callable[[int], int]  # row of the table -> stream

    def at_start(self) -> np.ndarray:
        """The first state."""
        return noise.normals(self.seed, self.indices, self.start, self.shape)

    def at_step(self, k: int) -> np.ndarray:
        """What row k of the table adds."""
        return noise.normals(self.seed, self.indices, self.step(k), self.shape)


@dataclass(frozen=True)
class Guide:
    """A lesser prior that is asked at rows where `asked(k)`: its prediction is then the graph's input `guide`."""

    walker: "Walker"
    condition: Inputs  # of its own step
    asked: Callable[[int], bool]


@dataclass(frozen=True)
class Walk:
    """A loop over the rows of `table` `[rows, 8]` from noise.

    `condition(k)` are the graph's other inputs at row k, the same object for all rows that share them; beside them, the
    input `takes` is the last state of the walk before.
    """

    graph: GraphName
    state: str  # its input; the output is {state}_next
    table: np.ndarray
    noise: Noise
    condition: Callable[[int], Inputs]
    takes: str | None = None
    batch: int = 0  # computed as so many images at least
    guide: Guide | None = None


@runtime_checkable
class Walker(Protocol):
    """A backend that runs whole loops on its device, one after the other, of the same images."""

    @property
    def likely_batch(self) -> int | None:
        """How many images at once suit the device; None: as many as a processor."""

    def computed_as(self, count: int) -> int | None:
        """How many images a batch of `count` is computed as, where images depend on it; None: they do not."""

    def can_ask(self, other: object) -> bool:
        """Whether another backend can be the walker of a Guide: it works on the same device, in the same order."""

    def walk(self, walks: Sequence[Walk], stop: Callable[[], bool], advance: Callable[[int], None]) -> list[np.ndarray]:
        """The states `b c h w` float32 after their last rows; `advance` gets images after each row. StoppedError."""

    def walk_to_images(
        self, walks: Sequence[Walk], stop: Callable[[], bool], advance: Callable[[int], None]
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """(States of all but the last, its images `b h w c` as batches.to_uint8 makes them, finite or not: bool b)."""
