"""The three networks of a bundle as one thing: generate, encode, bits, decode. numpy in and out.

Image i depends only on (bundle, seed, i, its label, settings, backend); on a GPU, in last digits, on batch size too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from ul_runtime import noise
from ul_runtime.backends import Backend
from ul_runtime.batches import Images, in_batches
from ul_runtime.diffusion import NATS_PER_BIT, Schedule, alpha, diffuse, diffusion_term, kl_terminal, sigma
from ul_runtime.errors import UsageError
from ul_runtime.loop import (
    Guidance,
    Inputs,
    Loop,
    NoiseKeys,
    check_effective,
    check_guide,
    conditions,
    one_call,
    side_by_side,
    to_pixels,
    unguided,
)
from ul_runtime.manifest import BundleInfo, GraphName, LogsnrRange
from ul_runtime.progress import Tick, silent
from ul_runtime.samplers import sampler_table
from ul_runtime.settings import (
    SEEDS,
    Overrides,
    SamplerSettings,
    Settings,
    as_indices,
    check_count,
    check_seed,
    label_cycle,
    resolve_settings,
)

_PIXELS_A_BATCH, _MOST_A_BATCH = 2**15, 16  # on a CPU: 16 images of 32 px, 8 of 64 px, 1 of 256 px
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Encoded:
    """Latents of images: the encoder's output, and with its fixed noise, as the decoder wants it."""

    z_clean: np.ndarray  # float32 b c h w
    z_0: np.ndarray  # float32 b c h w


class Pipeline:
    """Networks that `manifest` describes and `backend` runs; the prior of `guide` guides (autoguidance).

    `exact` opens a backend in float32, where `backend` computes in less: images that are not finite are made again on
    it. `path` and `hash` (SHA-256 of all that images depend on) say which bundle or run it is.
    """

    def __init__(
        self,
        manifest: BundleInfo,
        backend: Backend,
        guide: "Pipeline | None" = None,
        exact: Callable[[], Backend] | None = None,
        *,
        path: Path | None = None,
        hash: str = "",
    ) -> None:
        """BadInputError: the guide does not fit."""
        if guide is not None:
            check_guide(manifest, guide.manifest)
        self.manifest: BundleInfo = manifest
        self.backend, self.guide, self._exact = backend, guide, exact
        self.path, self.hash = path, hash
        self.num_classes = len(manifest.classes)
        self.image_shape = (manifest.image.channels, manifest.image.size, manifest.image.size)
        self.latent_shape = (manifest.latent.channels, manifest.latent.size, manifest.latent.size)
        few = min(_MOST_A_BATCH, max(1, _PIXELS_A_BATCH // manifest.image.size**2))
        self.default_batch_size = backend.likely_batch or few

    def batch_of(self, count: int) -> int:
        """How many of `count` images are made at once, unless it is said."""
        return max(1, min(self.default_batch_size, count))

    @property
    def guide_hash(self) -> str | None:
        """Hash of the guide's bundle."""
        return None if self.guide is None else self.guide.hash

    @property
    def computed_by(self) -> dict[str, Any]:
        """What computes: backend, precision, and the number of threads where bytes depend on it (else None)."""
        return {"backend": self.backend.name, "precision": self.backend.precision, "threads": self.backend.threads}

    @cached_property
    def in_float32(self) -> "Pipeline | None":
        """The same on the backend of `exact`; None without one."""
        if self._exact is None:
            return None
        guide = self.guide and (self.guide.in_float32 or self.guide)
        return Pipeline(self.manifest, self._exact(), guide, path=self.path, hash=self.hash)

    def settings(self, **overrides: Unpack[Overrides]) -> Settings:
        """The bundle's default settings with `overrides`; UsageError for what cannot be."""
        can_guide = self.num_classes > 0 or self.guide is not None
        return resolve_settings(self.manifest, overrides, can_guide=can_guide)

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
        labels: str | Iterable[str] | None = None,
        batch_size: int | None = None,
        keep_x: bool = True,
        tick: Tick = silent,
        **overrides: Unpack[Overrides],
    ) -> Iterator[Images]:
        """Batches of the first `images` images, or of the images with these indices.

        `batch_size` None = what suits the device, at most all. On a GPU a smaller last batch is computed as one of
        that size, so that no byte depends on how many are left.
        Labels go by index, in turn: image i has labels[i mod len]; None = all classes, "none" = no label,
        "#3" = class number 3.
        `guidance` w: pred = w pred(label) + (1 - w) u where logsnr is in `guidance_interval`; u is the prediction of
        the pipeline's guide or, without one, of this bundle for no label. `guidance_rescale` in [0, 1], 0 = off, draws
        the guided prediction's standard deviation, of each image, back to that of pred(label).
        With `keep_x` False they have no x: a GPU then converts them to uint8 itself, and no more leaves it.
        `tick` gets the share of images just done. Images that are not finite, in float32 either, are left out; after
        the last batch they raise NonFiniteError. Else UsageError, StoppedError.
        """
        check_seed(seed)
        indices = as_indices(images)
        settings = self.settings(**overrides)
        check_effective(settings, overrides, has_guide=self.guide is not None)
        cycle = np.array(label_cycle(labels, self.manifest.classes), np.int64)
        calls = len(self.prior_table(settings.prior)) + len(self.decoder_table(settings.decoder))
        of_calls = _of_calls(tick, calls)

        def draw(by: Pipeline, part: np.ndarray, batch: int) -> Images:
            at = indices[part]
            label, seeds = cycle[at % len(cycle)], _seeds(seed, len(at))
            prior = by.prior_loop(at, label, seeds, [settings] * len(at))
            decoder = by.decoder_loop(at, seeds, [settings.decoder] * len(at))
            return by._images([prior, decoder], label, batch, keep_x, of_calls)

        return self._batches(len(indices), batch_size, draw)

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
        **overrides: Unpack[Overrides],
    ) -> Iterator[Images]:
        """Batches of images decoded from z_0 `n c h w`; `labels` `n` only travel with them.

        `indices` `n` choose the decoder's noise (None = 0, 1, ...). `mean_of` K averages K decodes, of seed, seed + 1,
        ...: closer to the original than one, which is a draw. Errors as for `generate`.
        """
        check_seed(seed)
        z_0 = _check_shape("z_0", z_0, self.latent_shape)
        check_count("the number of decodes to average", mean_of)
        at = as_indices(len(z_0) if indices is None else indices)
        if not len(at) == len(z_0) == len(z_0 if labels is None else labels):
            raise UsageError(f"{len(z_0)} latents need as many indices and labels; got {len(at)} indices")
        sampler = self.settings(**overrides).decoder
        label = np.full(len(at), self.num_classes) if labels is None else np.asarray(labels)
        of_calls = _of_calls(tick, len(self.decoder_table(sampler)) * mean_of)

        def draw(by: Pipeline, part: np.ndarray, batch: int) -> Images:
            given, samplers = z_0[part], [sampler] * len(part)
            if mean_of == 1:
                loop = by.decoder_loop(at[part], _seeds(seed, len(part)), samplers, given)
                return by._images([loop], label[part], batch, keep_x, of_calls)
            total = np.zeros((len(part), *self.image_shape), np.float32)
            for k in range(mean_of):
                total += by.sample_x(given, at[part], (seed + k) % SEEDS, sampler, of_calls)
            return _of_x(at[part], label[part], total / np.float32(mean_of))

        return self._batches(len(at), batch_size, draw)

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
    ) -> np.ndarray:
        """Bits of each latent z_clean `b c h w`, float64 `b`: an estimate from `num_samples` noise levels an image.

        An upper bound under the bundle's prior: that is the base, trained for images with a sigmoid weighting, so
        the bound is valid but looser than the training log's, which is that of the prior of stage 1.
        """
        check_seed(seed)
        z_clean = _check_shape("z_clean", z_clean, self.latent_shape)
        check_count("the number of noise levels", num_samples)
        at = as_indices(len(z_clean) if indices is None else indices)
        ends = self.manifest.logsnr_z
        schedule = Schedule("linear", ends.min, ends.max)
        latent = z_clean.astype(np.float64)
        nats = kl_terminal(latent, ends.min)
        of_calls = _of_calls(tick, num_samples)
        for k in range(num_samples):
            of_calls(0)
            t = (k + (at + 1) * _GOLDEN % 1.0) / num_samples  # one stratum a sample, shifted from image to image
            logsnr = schedule.logsnr(t)
            eps = noise.normals(seed, at, noise.prior_step(k), self.latent_shape)
            pred = self._predict(diffuse(latent, eps, logsnr[:, None, None, None]), logsnr)
            nats = nats + diffusion_term(latent, pred, logsnr, schedule.slope(t)) / num_samples
            of_calls(len(at))
        return nats / NATS_PER_BIT

    def _predict(self, z: np.ndarray, logsnr: np.ndarray) -> np.ndarray:
        """The prior's clean-value prediction, without label, for z `b c h w` at logsnr `b`."""
        step = one_call("z", z.astype(np.float32), logsnr, alpha(logsnr), sigma(logsnr))
        no_label = unguided(np.full(len(z), self.num_classes), self.latent_shape)
        return self.backend.run("prior_step", step | no_label)["pred"]

    def sample_z_0(
        self, indices: np.ndarray, labels: np.ndarray, seed: int, settings: Settings, tick: Tick = silent
    ) -> np.ndarray:
        """z_0 `b c h w` from noise, for `indices` and `labels` `b`: ends at the latent's own noise level, not clean."""
        loop = self.prior_loop(indices, labels, _seeds(seed, len(indices)), [settings] * len(indices))
        return self.backend.run_loops([loop], tick)[0]

    def sample_x(
        self, z_0: np.ndarray, indices: np.ndarray, seed: int, sampler: SamplerSettings, tick: Tick = silent
    ) -> np.ndarray:
        """x `b c h w` from noise and z_0 `b c h w`: ends clean, not clipped."""
        loop = self.decoder_loop(indices, _seeds(seed, len(indices)), [sampler] * len(indices), z_0)
        return self.backend.run_loops([loop], tick)[0]

    def prior_loop(
        self, indices: np.ndarray, labels: np.ndarray, seeds: np.ndarray, settings: Sequence[Settings]
    ) -> Loop:
        """The prior's loop to z_0 of images `b`, each with its own index, label, seed (uint64) and settings."""
        rows, streams = side_by_side([self.prior_table(each.prior) for each in settings], noise.prior_step)
        guidance, by = Guidance.of(labels, settings), None if self.guide is None else self.guide.backend
        condition, guide = conditions(guidance, rows, self.latent_shape, self.num_classes, by)
        keys = NoiseKeys(seeds, indices, self.latent_shape)
        graph = _graph_of([each.prior for each in settings], "prior_step")
        return Loop(graph, "z", rows, streams, keys, noise.PRIOR_START, condition, guide=guide)

    def decoder_loop(
        self,
        indices: np.ndarray,
        seeds: np.ndarray,
        samplers: Sequence[SamplerSettings],
        z_0: np.ndarray | None = None,
    ) -> Loop:
        """The decoder's loop to x of images `b`; z_0 None = what the loop before ends with."""
        rows, streams = side_by_side([self.decoder_table(each) for each in samplers], noise.decoder_step)
        condition: Inputs = {} if z_0 is None else {"z_0": z_0}
        keys, takes = NoiseKeys(seeds, indices, self.image_shape), "z_0" if z_0 is None else None
        graph = _graph_of(samplers, "decoder_step")
        return Loop(graph, "x", rows, streams, keys, noise.DECODER_START, lambda k: condition, takes)

    def _images(self, loops: Sequence[Loop], labels: np.ndarray, batch: int, keep_x: bool, tick: Tick) -> Images:
        """Images of the last of these loops, computed as `batch` where that matters; without x unless it is to be kept.

        They are finite where the last states of all loops are.
        """
        computed_as = self.backend.computed_as(max(batch, len(labels)))
        loops = [replace(loop, batch=computed_as or 0) for loop in loops]
        made, indices = self.backend.run_loops(loops, tick, pixels=not keep_x), loops[0].noise.indices
        if keep_x:
            drawn = _of_x(indices, labels, made[-1])
        else:
            total = made.pop()
            drawn = Images(indices, labels, made[-1], np.isfinite(total), np.zeros(len(labels), bool))
        finite = np.logical_and.reduce([drawn.finite, *map(_finite, made[:-1])])
        return replace(drawn, finite=finite, computed_as=computed_as)

    def _batches(
        self, count: int, batch_size: int | None, draw: Callable[["Pipeline", np.ndarray, int], Images]
    ) -> Iterator[Images]:
        """Checks now, yields later. `draw(pipeline, positions, batch)`: by this one, or by that in float32."""
        size = self.batch_of(count) if batch_size is None else batch_size
        check_count("the batch size", size)

        def again(part: np.ndarray, batch: int) -> Images:
            assert self.in_float32 is not None
            return draw(self.in_float32, part, batch)

        return in_batches(count, size, partial(draw, self), None if self._exact is None else again)


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


def _graph_of(samplers: Sequence[SamplerSettings], own: GraphName) -> GraphName:
    """The graph that a batch runs: the bundle's own, or that of the student of all its images. UsageError."""
    names = {each.student or own for each in samplers}
    if len(names) > 1:
        raise UsageError(f"one batch is of one network, not of {' and '.join(sorted(names))}; make two of it")
    return names.pop() if names else own


def _of_x(indices: np.ndarray, labels: np.ndarray, x: np.ndarray) -> Images:
    images, total = to_pixels(x)
    return Images(indices, labels, images, np.isfinite(total), np.zeros(len(x), bool), x)


def _finite(states: np.ndarray) -> np.ndarray:
    """Which of `b ...` have no NaN or Inf."""
    return np.isfinite(states).reshape(len(states), -1).all(axis=1)


def _seeds(seed: int, count: int) -> np.ndarray:
    return np.full(count, seed, np.uint64)


def _of_calls(tick: Tick, calls: int) -> Tick:
    """The tick of single calls of a network, `calls` an image, where `tick` is of images."""
    return lambda images: tick(images / calls)


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        given = f"{array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UsageError(f"{name} is {given}; an array of numbers is expected, {['n', *shape]}")
    if array.ndim != 4 or array.shape[1:] != shape:
        raise UsageError(f"{name} has shape {list(array.shape)}; the bundle expects {['n', *shape]}")
    return np.ascontiguousarray(array, dtype=np.float32)
