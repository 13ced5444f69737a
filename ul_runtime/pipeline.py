"""The three networks of a bundle as one thing: generate, encode, bits, decode. numpy in and out.

Image i depends only on (bundle, seed, i, its label, settings, backend); on a card, in last digits, on batch size too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Unpack

import numpy as np

from ul_runtime import noise
from ul_runtime.backends import Backend
from ul_runtime.batches import Drawn, Images, finite, in_batches
from ul_runtime.diffusion import NATS_PER_BIT, Schedule, alpha, diffuse, diffusion_term, kl_terminal, sigma
from ul_runtime.errors import UsageError
from ul_runtime.loop import (
    Guide,
    Inputs,
    Noise,
    Step,
    Walk,
    Walker,
    autoguided,
    check_effective,
    check_guide,
    classifier_free,
    run_steps,
    unguided,
)
from ul_runtime.manifest import Described, LogsnrRange
from ul_runtime.progress import UNWATCHED, Control, Tick, silent
from ul_runtime.samplers import LOGSNR, sampler_table
from ul_runtime.settings import (
    SEEDS,
    Label,
    Overrides,
    SamplerSettings,
    Settings,
    as_indices,
    check_seed,
    label_cycle,
    resolve_settings,
)

_PIXELS_A_BATCH, _MOST_A_BATCH = 2**15, 16  # on a processor: 16 images of 32 px, 8 of 64 px, 1 of 256 px
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Encoded:
    """Latents of images: the encoder's output, and with its fixed noise, as the decoder wants it."""

    z_clean: np.ndarray  # float32 b c h w
    z_0: np.ndarray  # float32 b c h w


class Pipeline:
    """A bundle, or a run as it is, and a backend that runs its graphs; the prior of `guide` guides (autoguidance).

    `exact` opens a backend in float32, where `backend` computes in less: images that are not finite are made again on
    it, and their indices noted in `remade`.
    """

    def __init__(
        self,
        bundle: Described,
        backend: Backend,
        guide: "Pipeline | None" = None,
        exact: Callable[[], Backend] | None = None,
    ) -> None:
        """BadInputError: the guide does not fit."""
        self._exact = exact
        self.remade: list[int] = []
        self.bundle = bundle
        self.backend = backend
        self.guide = guide
        self.manifest = manifest = bundle.manifest
        if guide is not None:
            check_guide(manifest, guide.bundle.manifest)
        self.num_classes = len(manifest.classes)
        self.image_shape = (manifest.image.channels, manifest.image.size, manifest.image.size)
        self.latent_shape = (manifest.latent.channels, manifest.latent.size, manifest.latent.size)
        suits = backend.likely_batch if isinstance(backend, Walker) else None
        self.default_batch_size = suits or min(_MOST_A_BATCH, max(1, _PIXELS_A_BATCH // manifest.image.size**2))

    def batch_of(self, count: int) -> int:
        """How many of `count` images are made at once, unless it is said."""
        return max(1, min(self.default_batch_size, count))

    @property
    def guide_hash(self) -> str | None:
        """Hash of the guide's bundle."""
        return None if self.guide is None else self.guide.bundle.hash

    @property
    def computed_by(self) -> dict[str, Any]:
        """What computes: backend, precision, and the number of threads where bytes depend on it (else None)."""
        return {"backend": self.backend.name, "precision": self.backend.precision, "threads": self.backend.threads}

    @cached_property
    def in_float32(self) -> "Pipeline | None":
        """The same on the backend of `exact`; None without one."""
        if self._exact is None:
            return None
        return Pipeline(self.bundle, self._exact(), self.guide and (self.guide.in_float32 or self.guide))

    def settings(self, **overrides: Unpack[Overrides]) -> Settings:
        """The bundle's default settings with `overrides`; UsageError for what cannot be."""
        return resolve_settings(
            self.manifest.defaults, overrides, can_guide=self.num_classes > 0 or self.guide is not None
        )

    def prior_table(self, sampler: SamplerSettings) -> np.ndarray:
        """The table `[rows, 8]` from noise to z_0: a row for each call of the prior."""
        return table_between(sampler, self.manifest.logsnr_z, ends_clean=False)

    def decoder_table(self, sampler: SamplerSettings) -> np.ndarray:
        """The table `[rows, 8]` from noise to the image: a row for each call of the decoder."""
        return table_between(sampler, self.manifest.logsnr_x, ends_clean=True)

    def generate(
        self,
        images: int | Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        labels: Label | Sequence[Label] | None = None,
        batch_size: int | None = None,
        keep_x: bool = True,
        tick: Tick = silent,
        control: Control = UNWATCHED,
        **overrides: Unpack[Overrides],
    ) -> Iterator[Images]:
        """Batches of the first `images` images, or of the images with these indices.

        `batch_size` None = what suits the device, at most all. On a card a smaller last batch is computed as one of
        that size, so that no byte depends on how many are left.
        Labels go by index, in turn: image i has labels[i mod len]; None = all classes, "none" = no label.
        `guidance` w: pred = w pred(label) + (1 - w) u where logsnr is in `guidance_interval`; u is the prediction of
        the pipeline's guide or, without one, of this bundle for no label. `guidance_rescale` in [0, 1], 0 = off, draws
        the guided prediction's standard deviation, of each image, back to that of pred(label).
        With `keep_x` False they have no x: a device then converts them to uint8 itself, and no more leaves it.
        Images that are not finite, in float32 either, are left out; after the last batch they raise NonFiniteError.
        Else UsageError, StoppedError.
        """
        control = control if tick is silent else Control.of(tick)
        check_seed(seed)
        indices = as_indices(images)
        settings = self.settings(**overrides)
        check_effective(settings, overrides, has_guide=self.guide is not None)
        cycle = np.array(label_cycle(labels, self.manifest.classes), np.int64)
        if self.guide is None and np.all(cycle == self.num_classes):
            settings = replace(settings, guidance=1.0)
        calls = len(self.prior_table(settings.prior)) + len(self.decoder_table(settings.decoder))
        per_step = _per_step(control, calls)

        def draw(by: Pipeline, part: np.ndarray, batch: int) -> Drawn:
            label = cycle[indices[part] % len(cycle)]
            prior = by._sampling(indices[part], label, seed, settings)
            if by._walker is not None:
                decoder = by._decoding(None, indices[part], seed, settings.decoder)
                return _walked(by._walker, [prior, decoder], label, batch, keep_x, per_step)
            z_0 = by._prior_loop(prior, label, settings, per_step)
            decoder = by._decoding(z_0, indices[part], seed, settings.decoder)
            drawn = by._draw_images(decoder, z_0, label, batch, keep_x, per_step)
            return replace(drawn, finite=drawn.finite & finite(z_0))

        return self._batches(indices, batch_size, draw)

    def decode(
        self,
        z_0: np.ndarray,
        *,
        seed: int = 0,
        indices: Sequence[int] | np.ndarray | None = None,
        labels: np.ndarray | None = None,
        mean_of: int = 1,
        batch_size: int | None = None,
        keep_x: bool = True,
        tick: Tick = silent,
        control: Control = UNWATCHED,
        **overrides: Unpack[Overrides],
    ) -> Iterator[Images]:
        """Batches of images decoded from z_0 `n c h w`; `labels` `n` only travel with them.

        `indices` `n` choose the decoder's noise (None = 0, 1, ...). `mean_of` K averages K decodes, of seed, seed + 1,
        ...: closer to the original than one, which is a draw. Errors as for `generate`.
        """
        control = control if tick is silent else Control.of(tick)
        check_seed(seed)
        z_0 = _check_shape("z_0", z_0, self.latent_shape)
        if mean_of < 1:
            raise UsageError(f"the number of decodes to average is {mean_of}; expected 1 or more")
        at = as_indices(len(z_0) if indices is None else indices)
        if not len(at) == len(z_0) == len(z_0 if labels is None else labels):
            raise UsageError(f"{len(z_0)} latents need as many indices and labels; got {len(at)} indices")
        sampler = self.settings(**overrides).decoder
        label = np.full(len(at), self.num_classes) if labels is None else np.asarray(labels)
        per_step = _per_step(control, len(self.decoder_table(sampler)) * mean_of)

        def draw(by: Pipeline, part: np.ndarray, batch: int) -> Drawn:
            if mean_of == 1:
                walk = by._decoding(z_0[part], at[part], seed, sampler)
                return by._draw_images(walk, z_0[part], label[part], batch, keep_x, per_step)
            total = by.sample_x(z_0[part], at[part], seed, sampler, per_step)
            for k in range(1, mean_of):
                total = total + by.sample_x(z_0[part], at[part], (seed + k) % SEEDS, sampler, per_step)
            return Drawn.of(label[part], total / np.float32(mean_of))

        return self._batches(at, batch_size, draw)

    def encode(self, x: np.ndarray, *, seed: int = 0, indices: Sequence[int] | np.ndarray | None = None) -> Encoded:
        """z_clean and z_0 of images x `b c h w` in [-1, 1], one batch; `indices` choose the fixed noise of z_0."""
        check_seed(seed)
        x = _check_shape("x", x, self.image_shape)
        at = as_indices(len(x) if indices is None else indices)
        z_clean = self.backend.run("encoder", {"x": x})["z_clean"]
        logsnr_0 = self.manifest.logsnr_z.max
        eps = noise.normals(seed, at, noise.ENCODER, self.latent_shape)
        z_0 = np.float32(alpha(logsnr_0)) * z_clean + np.float32(sigma(logsnr_0)) * eps
        return Encoded(z_clean, z_0)

    def bits(
        self,
        z_clean: np.ndarray,
        *,
        seed: int = 0,
        indices: Sequence[int] | np.ndarray | None = None,
        num_samples: int = 16,
        tick: Tick = silent,
        control: Control = UNWATCHED,
    ) -> np.ndarray:
        """Bits of each latent z_clean `b c h w`, float64 `b`: an estimate from `num_samples` noise levels an image.

        An upper bound under the bundle's prior: that is the base, trained for pictures with a sigmoid weighting, so
        the bound is valid but looser than the training log's, which is that of the prior of stage 1.
        """
        control = control if tick is silent else Control.of(tick)
        check_seed(seed)
        z_clean = _check_shape("z_clean", z_clean, self.latent_shape)
        if num_samples < 1:
            raise UsageError(f"the number of noise levels is {num_samples}; expected 1 or more")
        at = as_indices(len(z_clean) if indices is None else indices)
        ends = self.manifest.logsnr_z
        schedule = Schedule("linear", ends.min, ends.max)
        latent = z_clean.astype(np.float64)
        nats = kl_terminal(latent, ends.min)
        per_step = _per_step(control, num_samples)
        for k in range(num_samples):
            t = (k + (at + 1) * _GOLDEN % 1.0) / num_samples  # one stratum a sample, shifted from image to image
            logsnr = schedule.logsnr(t)
            eps = noise.normals(seed, at, noise.prior_step(k), self.latent_shape)
            pred = self._predict(diffuse(latent, eps, logsnr[:, None, None, None]), logsnr, per_step)
            nats = nats + diffusion_term(latent, pred, logsnr, schedule.slope(t)) / num_samples
        return nats / NATS_PER_BIT

    def _predict(self, z: np.ndarray, logsnr: np.ndarray, control: Control) -> np.ndarray:
        """The prior's clean-value prediction, without label, for z `b c h w` at logsnr `b`."""
        control.check()
        still = np.zeros_like(logsnr)
        row = np.stack([logsnr, alpha(logsnr), sigma(logsnr), still, still + 1.0, still, still, still], axis=1)
        step = self._prior_step(np.full(len(z), self.num_classes), Settings(*_ONE_STEP), control)
        z = z.astype(np.float32)
        history = np.zeros((len(z), 2, *self.latent_shape), np.float32)
        return step(z, history, np.zeros_like(z), row.astype(np.float32))[1]

    def _prior_step(self, label: np.ndarray, settings: Settings, control: Control) -> Step:
        low, high = settings.guidance_interval or (-np.inf, np.inf)
        weight, phi = settings.guidance, settings.guidance_rescale
        ask_guide = None if self.guide is None else self.guide._prior_step(label, Settings(*_ONE_STEP), UNWATCHED)

        def step(z: np.ndarray, history: np.ndarray, eps: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if weight == 1.0 or not low <= row[0, LOGSNR] <= high:
                guidance = unguided(label, z)
            elif ask_guide is None:
                guidance = classifier_free(label, z, self.num_classes, weight, phi)
            else:
                guidance = autoguided(label, ask_guide(z, history, eps, row)[1], weight, phi)
            inputs = {"z": z, "history": history, "noise": eps, "row": row, **guidance}
            out = self.backend.run("prior_step", inputs)
            control.progress(len(z))
            return out["z_next"], out["pred"]

        return step

    def _guided(
        self, label: np.ndarray, settings: Settings, rows: np.ndarray
    ) -> tuple[Callable[[int], Inputs], Guide | None]:
        """Labels and guidance at each of `rows`, and who is asked there."""
        low, high = settings.guidance_interval or (-np.inf, np.inf)
        weight, phi = settings.guidance, settings.guidance_rescale
        guided = (weight != 1.0) & (rows[:, LOGSNR] >= low) & (rows[:, LOGSNR] <= high)
        like = np.zeros((len(label), *self.latent_shape), np.float32)
        off, guide = unguided(label, like), None
        if self.guide is None:
            on = classifier_free(label, like, self.num_classes, weight, phi)
        else:
            on = autoguided(label, like, weight, phi)
            if isinstance(self.guide.backend, Walker):
                guide = Guide(self.guide.backend, off, lambda k: bool(guided[k]))
        return lambda k: on if guided[k] else off, guide

    @property
    def _walker(self) -> Walker | None:
        """The backend, where it runs whole loops of the prior, and can ask the guide on its way."""
        if not isinstance(self.backend, Walker):
            return None
        return self.backend if self.guide is None or self.backend.can_ask(self.guide.backend) else None

    def sample_z_0(
        self, indices: np.ndarray, label: np.ndarray, seed: int, settings: Settings, control: Control = UNWATCHED
    ) -> np.ndarray:
        """z_0 `b c h w` from noise, for `indices` and `label` `b`: ends at the latent's own noise level, not clean."""
        walk = self._sampling(indices, label, seed, settings)
        if self._walker is not None:
            return self._walker.walk([walk], control.stop, control.progress)[0]
        return self._prior_loop(walk, label, settings, control)

    def _prior_loop(self, walk: Walk, label: np.ndarray, settings: Settings, control: Control) -> np.ndarray:
        """z_0, the loop run by the host."""
        step = self._prior_step(label, settings, control)
        return run_steps(step, walk.table, walk.noise.at_start(), walk.noise.at_step, control.stop)

    def sample_x(
        self, z_0: np.ndarray, indices: np.ndarray, seed: int, sampler: SamplerSettings, control: Control = UNWATCHED
    ) -> np.ndarray:
        """x `b c h w` from noise and z_0 `b c h w`: ends clean, not clipped."""
        walk = self._decoding(z_0, indices, seed, sampler)
        if isinstance(self.backend, Walker):
            return self.backend.walk([walk], control.stop, control.progress)[0]
        return self._decoder_loop(walk, z_0, control)

    def _decoder_loop(self, walk: Walk, z_0: np.ndarray, control: Control) -> np.ndarray:
        """x, the loop run by the host."""

        def step(x: np.ndarray, history: np.ndarray, eps: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            inputs = {"x": x, "history": history, "noise": eps, "row": row, "z_0": z_0}
            out = self.backend.run("decoder_step", inputs)
            control.progress(len(x))
            return out["x_next"], out["pred"]

        return run_steps(step, walk.table, walk.noise.at_start(), walk.noise.at_step, control.stop)

    def _draw_images(
        self, walk: Walk, z_0: np.ndarray, labels: np.ndarray, batch: int, keep_x: bool, control: Control
    ) -> Drawn:
        """Images of the decoder's walk from z_0."""
        if isinstance(self.backend, Walker):
            return _walked(self.backend, [walk], labels, batch, keep_x, control)
        return Drawn.of(labels, self._decoder_loop(walk, z_0, control))

    def _sampling(self, indices: np.ndarray, label: np.ndarray, seed: int, settings: Settings) -> Walk:
        """The prior's loop as data."""
        table = self.prior_table(settings.prior)
        given, guide = self._guided(label, settings, table.astype(np.float32))
        drawn = Noise(seed, indices, self.latent_shape, noise.PRIOR_START, noise.prior_step)
        return Walk("prior_step", "z", table, drawn, given, guide=guide)

    def _decoding(self, z_0: np.ndarray | None, indices: np.ndarray, seed: int, sampler: SamplerSettings) -> Walk:
        """The decoder's loop as data; z_0 None = what the walk before ends with."""
        condition: Inputs = {} if z_0 is None else {"z_0": z_0}
        drawn = Noise(seed, indices, self.image_shape, noise.DECODER_START, noise.decoder_step)
        takes = None if condition else "z_0"
        return Walk("decoder_step", "x", self.decoder_table(sampler), drawn, lambda k: condition, takes)

    def _batches(
        self, indices: np.ndarray, batch_size: int | None, draw: Callable[["Pipeline", np.ndarray, int], Drawn]
    ) -> Iterator[Images]:
        """Checks now, yields later. `draw(pipeline, positions in indices, batch)`: this one, or that in float32."""
        size = self.batch_of(len(indices)) if batch_size is None else batch_size
        if size < 1:
            raise UsageError(f"the batch size is {size}; expected 1 or more")

        def by(in_float32: bool, part: np.ndarray, batch: int) -> Drawn:
            pipeline = self.in_float32 if in_float32 else self
            assert pipeline is not None
            return draw(pipeline, part, batch)

        return in_batches(indices, size, by, self._exact is not None, self.remade)


def _walked(
    walker: Walker, walks: Sequence[Walk], labels: np.ndarray, batch: int, keep_x: bool, control: Control
) -> Drawn:
    """Images of the last of these walks, without x unless it is to be kept; computed as `batch` where that matters."""
    computed_as = walker.computed_as(max(batch, len(labels)))
    walks = [replace(walk, batch=computed_as or 0) for walk in walks]
    if keep_x:
        *states, x = walker.walk(walks, control.stop, control.progress)
        drawn = Drawn.of(labels, x)
    else:
        states, images, good = walker.walk_to_images(walks, control.stop, control.progress)
        drawn = Drawn(labels, images, good, None)
    good = np.logical_and.reduce([drawn.finite, *map(finite, states)])
    return replace(drawn, finite=good, computed_as=computed_as)


_ONE_STEP = SamplerSettings("ddim", "uniform", 1), SamplerSettings("ddim", "uniform", 1)


@lru_cache(maxsize=32)
def table_between(sampler: SamplerSettings, ends: LogsnrRange, *, ends_clean: bool) -> np.ndarray:
    """The sampler's table `[rows, 8]` over a network's noise levels, read-only."""
    table = sampler_table(
        sampler.sampler,
        sampler.grid,
        sampler.num_steps,
        logsnr_min=ends.min,
        logsnr_max=ends.max,
        ends_clean=ends_clean,
    )
    table.setflags(write=False)  # all batches share it
    return table


def _per_step(control: Control, calls: int) -> Control:
    """Control whose progress counts images when it is told of single calls of a network, `calls` an image."""
    return replace(control, progress=lambda images: control.progress(images / calls))


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.ndim != 4 or array.shape[1:] != shape:
        raise UsageError(f"{name} has shape {list(array.shape)}; the bundle expects {['n', *shape]}")
    return np.ascontiguousarray(array, dtype=np.float32)
