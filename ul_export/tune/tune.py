"""The search of ul-tune: candidates, rounds of more and more images, and the presets that come out of it.

Settings are data: every candidate is the same bundle with other overrides. In each round all that is left is measured
on the same labels and noise, and what is clearly worse than the reference, or as good as something cheaper, is dropped.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ul_export.bench.measure import work_of_an_image
from ul_export.evaluation.comparison import Comparison, real_images
from ul_export.evaluation.features import CLASSIFIER, EFFICIENTNET, PIXELS, default_spaces, open_space
from ul_export.evaluation.statistics import frechet_distance, precision_recall
from ul_export.export import check_free
from ul_export.options import EvalOptions, TuneOptions
from ul_export.tune.report import FILES, pareto_plot, report_markdown
from ul_runtime.bundle import write_bundle
from ul_runtime.errors import UsageError
from ul_runtime.loading import open_bundle, open_pipeline
from ul_runtime.loop import Guidance
from ul_runtime.machine import OneGpuOptions, origin
from ul_runtime.manifest import BundleInfo, DecoderDefaults, Preset, PriorDefaults
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import progress
from ul_runtime.settings import NO_PRESET, Overrides, Settings, check_count
from ul_runtime.signals import stop_on_signal
from ul_train.torch_backend import fix_threads

_LOG = logging.getLogger(__name__)
_PACKAGES = ("unified-latents", "numpy", "scipy", "onnxruntime", "torch")
_STEPS, _DECODER_STEPS = (2, 3, 4, 6, 8, 12, 16), (1, 2, 4)  # and the reference's own
_GUIDANCES = (1.0, 0.6, 1.6)  # of what the reference is guided beyond 1
_SAMPLERS = ("dpmpp2m", "unipc2")
_ROUNDS = ((4, 1.6), (2, 1.4), (1, None))  # images are a 4th, a half, all of them; worse than so many times: dropped
_RECALL_LOST = 0.03  # that a preset may have less than the reference


@dataclass
class Trial:
    """Settings under trial: what an image costs, and what was measured in the last round."""

    overrides: Overrides
    settings: Settings
    calls: int
    flops: int
    distances: dict[str, list[float]] = field(default_factory=dict)  # by space, one a seed
    recall: list[float] = field(default_factory=list)
    ratio: float = np.inf  # of the Frechet distance to the reference's, in the worst of the spaces that choose

    @property
    def name(self) -> str:
        """In words."""
        prior, decoder = self.settings.prior, self.settings.decoder
        parts = [
            f"{prior.num_steps} {prior.student or prior.sampler}",
            f"{decoder.num_steps} {decoder.student or decoder.sampler}",
        ]
        guided = f", guidance {self.settings.guidance:g}" if self.settings.guidance != 1.0 else ""
        return " + ".join(parts) + guided

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        means = {_short(space): float(np.mean(values)) for space, values in self.distances.items()}
        return {
            "name": self.name,
            "settings": self.settings.as_dict(),
            "calls": self.calls,
            "flops": self.flops,
            "frechet_distance": means,
            "spread": {_short(s): float(np.std(v, ddof=1)) if len(v) > 1 else None for s, v in self.distances.items()},
            "recall": float(np.mean(self.recall)) if self.recall else None,
            "ratio": float(self.ratio) if np.isfinite(self.ratio) else None,
        }


def _short(space: str) -> str:
    """A space's name without the folders of this machine."""
    return Path(space).name


def candidates(pipeline: Pipeline) -> Iterator[Overrides]:
    """The settings that are tried; the reference is first."""
    own = pipeline.settings(preset=NO_PRESET)
    yield Overrides(preset=NO_PRESET)
    of_prior, of_decoder = (pipeline.manifest.students_of(place) for place in ("prior_step", "decoder_step"))
    guidances = [1.0 + share * (own.guidance - 1.0) for share in _GUIDANCES] if own.guidance != 1.0 else [1.0]
    priors: list[Overrides] = [
        Overrides(steps=steps, sampler=sampler, guidance=guidance)
        for steps in (*(each for each in _STEPS if each < own.prior.num_steps), own.prior.num_steps)
        for sampler in dict.fromkeys((*_SAMPLERS, own.prior.sampler))
        for guidance in guidances
    ]
    decoders: list[Overrides] = [
        Overrides(decoder_steps=steps)
        for steps in (*(each for each in _DECODER_STEPS if each < own.decoder.num_steps), own.decoder.num_steps)
    ]
    for prior, decoder in product([*priors, *of_prior], [*decoders, *of_decoder]):
        named = [each for each in (prior, decoder) if isinstance(each, str)]
        given: Any = {"students": named}
        for each in (prior, decoder):
            given |= each if isinstance(each, dict) else {}
        yield Overrides(**given)


def run_tune(path: Path, out: Path, options: TuneOptions, machine: OneGpuOptions) -> dict[str, Any]:
    """Search, and write the bundle with its presets at `out`; JSON-ready. UsageError; a stop writes nothing."""
    _check(options, out)
    pipeline, bundle = open_pipeline(path, machine), open_bundle(path)
    fix_threads(machine.threads)
    with stop_on_signal():
        comparison, held_out = _comparison(pipeline, options, machine)
        flops = work_of_an_image(bundle, 1, Overrides(preset=NO_PRESET, steps=1, guidance=1.0, decoder_steps=1)).flops
        trials = [trial(pipeline, overrides, flops) for overrides in candidates(pipeline)]
        trials = first_decoders(trials, comparison, options)
        for share, worst in _ROUNDS:
            count, seeds = max(options.images // share, 50), 1 if worst else options.seeds
            measured(trials, comparison, count, seeds)
            kept = trials if worst is None else survivors(trials, worst, options.finalists * share)
            _LOG.info(f"{count} images each: {len(trials)} settings, {len(kept)} are left")
            trials = kept
        chosen = choose(trials, options)
        quality = _quality(chosen, held_out, options)
        record = {
            "bundle": {"name": pipeline.manifest.name, "hash": pipeline.hash},
            "images": options.images,
            "seeds": options.seeds,
            "chosen_by": [_short(space.name) for space in _choosing(comparison)],
            "held_out": _short(held_out),
            "reference": trials[0].as_dict(),
            "presets": {name: each.as_dict() | {"quality": quality[name]} for name, each in chosen.items()},
            "trials": [each.as_dict() for each in trials],
            **origin("ul-tune", _PACKAGES),
        }
    presets = {name: preset(each, quality[name]) for name, each in chosen.items()}
    values = bundle.manifest.model_dump(exclude={"files"}) | {"presets": presets, "preset": "balanced"}
    files: dict[str, bytes | Path] = {name: bundle.read(name) for name in bundle.manifest.files if name not in FILES}
    files |= {FILES[0]: report_markdown(record).encode(), FILES[1]: pareto_plot(record)}
    written = write_bundle(out, BundleInfo.model_validate(values), files, overwrite=options.overwrite)
    return record | {"out": str(out), "hash": written.hash}


def _check(options: TuneOptions, out: Path) -> None:
    check_count("--images", options.images)
    check_count("--seeds", options.seeds)
    check_count("--finalists", options.finalists)
    if options.images < 100:
        raise UsageError(f"--images is {options.images}; expected 100 or more")
    if not 1.0 <= options.balanced <= options.draft:
        raise UsageError(
            f"--balanced {options.balanced:g} --draft {options.draft:g}: expected 1 or more, draft the larger"
        )
    check_free(out, options.overwrite)


def _comparison(pipeline: Pipeline, options: TuneOptions, machine: OneGpuOptions) -> tuple[Comparison, str]:
    """Real images in the spaces that choose and, last, the one that does not; its name."""
    splits, split = real_images(pipeline, options.data, options.heldout, options.cache, options.images)
    channels, classes = pipeline.manifest.image.channels, splits.train.class_names
    able = [EFFICIENTNET, *([CLASSIFIER] if len(classes) > 1 else []), PIXELS]
    defaults = default_spaces(channels, classes)
    names = options.features or (defaults if len(able) > 2 else [EFFICIENTNET])
    held_out = options.held_out or next((name for name in able if name not in names), None)
    if held_out is None or held_out in names:
        given = "all spaces choose" if held_out is None else f"--held-out {held_out}: is a space that chooses"
        raise UsageError(f"{given}; give another --held-out, or fewer --features")
    evaluation = EvalOptions(
        data=options.data, heldout=options.heldout, images=options.images, seeds=options.seeds, seed=options.seed,
        features=names, classifier=options.classifier, cache=options.cache,
    )  # fmt: skip
    spaces = [open_space(name, splits, evaluation, machine.threads) for name in names]
    spaces.append(open_space(held_out, splits, evaluation, machine.threads))
    return Comparison(pipeline, splits, split, spaces, evaluation, Overrides()), held_out


def trial(pipeline: Pipeline, overrides: Overrides, flops: dict[str, int]) -> Trial:
    """With what an image costs: `flops` of a call of prior_step and decoder_step."""
    settings = pipeline.settings(**overrides)
    prior, decoder = pipeline.prior_table(settings.prior), pipeline.decoder_table(settings.decoder)
    rows = prior[:, None].astype(np.float32)  # as those of the loop
    guided = int(Guidance.of(np.zeros(1, np.int64), [settings]).guided(rows).sum())
    cost = (len(prior) + guided) * flops["prior_step"] + len(decoder) * flops["decoder_step"]
    return Trial(overrides, settings, len(prior) + len(decoder), cost)


def first_decoders(trials: Sequence[Trial], comparison: Comparison, options: TuneOptions) -> list[Trial]:
    """Drop decoders that are bad beside a prior of many steps, and cost as much as a better one."""
    reference = trials[0]
    by_decoder = [
        each for each in trials
        if each.settings.prior == reference.settings.prior and each.settings.guidance == reference.settings.guidance
    ]  # fmt: skip
    measured(by_decoder, comparison, max(options.images // 4, 50), 1)
    good = {each.settings.decoder for each in survivors(by_decoder, 1.6, 3)}
    return [reference, *(each for each in trials[1:] if each.settings.decoder in good)]


def measured(trials: Sequence[Trial], comparison: Comparison, count: int, seeds: int) -> None:
    """Sample each, and set its distances, recall and ratio; the first is the reference."""
    real = comparison.real_features
    choosing = [space.name for space in _choosing(comparison)]
    with progress("sampling", len(trials) * count * seeds, "images") as tick:
        for each in trials:
            each.distances, each.recall = {name: [] for name in real}, []
            for seed in comparison.seeds[:seeds]:
                _, features = comparison.sampled(seed, count, each.overrides, tick)
                first, _ = comparison.halves(seed)
                for name in real:
                    each.distances[name].append(frechet_distance(features[name], real[name][first]))
                each.recall.append(precision_recall(features[choosing[0]], real[choosing[0]][first][:count])[1])
    for each in trials:
        of_reference = trials[0].distances
        each.ratio = max(float(np.mean(each.distances[name]) / np.mean(of_reference[name])) for name in choosing)


def _choosing(comparison: Comparison) -> Sequence[Any]:
    """The spaces that choose: all but the last, which is held out."""
    return comparison.spaces[:-1]


def survivors(trials: Sequence[Trial], worst: float, most: int) -> list[Trial]:
    """The reference, and at most so many others that no cheaper one equals, none worse than `worst`."""
    reference, *others = trials
    near = [each for each in others if each.ratio <= worst]
    near = near or sorted(others, key=lambda each: each.ratio)[:most]
    front = [each for each in near if not any(o.flops < each.flops and o.ratio <= each.ratio for o in near)]
    rest = sorted((each for each in near if each not in front), key=lambda each: each.ratio)
    return [reference, *[*front, *rest][:most]]


def choose(trials: Sequence[Trial], options: TuneOptions) -> dict[str, Trial]:
    """Presets: best in quality; the cheapest within --balanced of the reference; the cheapest within --draft."""
    reference = trials[0]
    kept = [each for each in trials if np.mean(each.recall) >= np.mean(reference.recall) - _RECALL_LOST]
    best = min(kept, key=lambda each: (each.ratio, each.flops))
    balanced = min((e for e in kept if e.ratio <= options.balanced), key=lambda each: each.flops)
    draft = min((e for e in trials if e.ratio <= options.draft), key=lambda each: each.flops)
    return {"draft": draft, "balanced": balanced, "best": best}


def _quality(chosen: dict[str, Trial], held_out: str, options: TuneOptions) -> dict[str, dict[str, Any]]:
    """What a preset's record says; the space that no choice has seen is marked."""
    return {
        name: {
            "images": options.images,
            "seeds": options.seeds,
            "ratio_to_reference": float(each.ratio),
            "recall": float(np.mean(each.recall)),
            "frechet_distance": {_short(space): float(np.mean(v)) for space, v in each.distances.items()},
            "held_out_space": _short(held_out),
        }
        for name, each in chosen.items()
    }


def preset(each: Trial, quality: dict[str, Any]) -> Preset:
    """As a bundle keeps it."""
    prior, decoder, settings = each.settings.prior, each.settings.decoder, each.settings
    return Preset(
        prior=PriorDefaults(
            student=prior.student,
            sampler=prior.sampler,
            grid=prior.grid,
            num_steps=prior.num_steps,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
            guidance_rescale=settings.guidance_rescale,
        ),
        decoder=DecoderDefaults(
            student=decoder.student, sampler=decoder.sampler, grid=decoder.grid, num_steps=decoder.num_steps
        ),
        calls=each.calls,
        flops=each.flops,
        quality=quality,
    )
