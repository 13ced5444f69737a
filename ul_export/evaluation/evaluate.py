"""What ul-eval does once its options are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import ul_runtime
from ul_export.evaluation.distances import COVERAGE_NEIGHBOURS, SMALLEST_PX
from ul_export.evaluation.features import FeatureSpace, default_spaces, open_space
from ul_export.evaluation.measures import (
    Rebuilt,
    measure_bits,
    measure_generation,
    measure_memorisation,
    measure_reconstruction,
)
from ul_export.evaluation.report import SHEETS, draw_sheets, html_report
from ul_export.evaluation.subject import Figure, Subject, reference_part
from ul_runtime import durable
from ul_runtime.backends.choose import say_choice
from ul_runtime.errors import UsageError
from ul_runtime.machine import commit, versions
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Control, stop_on_signal
from ul_runtime.settings import Overrides, check_count, check_seed
from ul_train.config import ImageConfig
from ul_train.data.imageset import Splits
from ul_train.data.prepare import open_splits

_PACKAGES = ("unified-latents", "numpy", "scipy", "onnxruntime", "torch")
_FEWEST = COVERAGE_NEIGHBOURS + 1  # images that have so many neighbours
_FILES = ("eval.json", "report.html", *SHEETS)


@dataclass(frozen=True)
class EvalOptions:
    """What is asked for; `features` empty = by the data, `train_images` None = all."""

    data: str
    heldout: str | None
    num_images: int
    num_seeds: int
    seed: int
    features: Sequence[str]
    classifier: Path | None
    classifier_steps: int
    train_images: int | None
    bits_samples: int
    machine: dict[str, Any]  # backend, precision, threads and card, as ul_runtime.loading.load takes them
    cache: Path
    out: Path | None
    overrides: Overrides

    def check(self) -> None:
        """UsageError for what cannot be, OutputError for a folder that cannot be written."""
        if self.num_images < _FEWEST:
            raise UsageError(f"--images is {self.num_images}; expected {_FEWEST} or more, for their nearest neighbours")
        check_count("--seeds", self.num_seeds)
        check_seed(self.seed)
        check_seed(self.seed + self.num_seeds - 1)
        check_count("--classifier-steps", self.classifier_steps)
        check_count("--bits-samples", self.bits_samples)
        if self.train_images is not None:
            check_count("--train-images", self.train_images)
        if len(set(self.features)) != len(self.features):
            raise UsageError(f"--features {', '.join(self.features)}: each may be given once")
        if self.classifier is not None and self.classifier.suffix != ".safetensors":
            raise UsageError(f"--classifier {self.classifier}: expected a name that ends in .safetensors")
        if self.out is not None:
            durable.check_output_directory(self.out, _FILES)


def run_eval(path: Path, options: EvalOptions, command: str) -> dict[str, Any]:
    """Every figure, JSON-ready; writes `options.out`. UsageError before anything is measured; StoppedError."""
    options.check()
    pipeline = ul_runtime.load(path, **options.machine)
    settings = pipeline.settings(**options.overrides)
    say_choice(options.machine["backend"], options.machine["precision"], pipeline)
    if options.machine["threads"]:
        torch.set_num_threads(options.machine["threads"])
    with stop_on_signal() as stop:
        splits = _open(pipeline, options, stop)
        reference_part(splits, options.num_images)
        perceptual, absent = _perceptual(pipeline.manifest.image.size)
        subject = _subject(pipeline, splits, options, stop)
        generated = measure_generation(subject)
        rebuilt = measure_reconstruction(subject, perceptual)
        bits = measure_bits(subject)
        found = measure_memorisation(subject, generated, options.train_images)
        result = {
            "bundle": {"path": str(path), "name": pipeline.manifest.name, "hash": pipeline.bundle.hash},
            "data": _data(subject, options.data),
            "settings": settings.as_dict(),
            "computed_by": pipeline.computed_by,
            "seeds": list(subject.seeds),
            "features": {space.name: space.facts for space in subject.spaces},
            "generation": {name: _as_dicts(figures) for name, figures in generated.figures.items()},
            "reconstruction": _reconstruction(rebuilt),
            "bits_per_pixel": bits.as_dict() | {"num_samples": options.bits_samples},
            "memorisation": found.figures,
            "absent": absent,
            "notes": _notes(subject),
            "versions": versions(_PACKAGES),
            "commit": commit(),
            "command": command,
        }
        if options.out is not None:
            _write(options.out, result, draw_sheets(subject, generated, rebuilt, found))
    return result


def _open(pipeline: Pipeline, options: EvalOptions, stop: Callable[[], bool]) -> Splits:
    """The images as the bundle takes them."""
    image = pipeline.manifest.image
    asked = ImageConfig.model_validate(
        {"size": image.size, "channels": image.channels, "background": image.background, "fit": image.fit}
    )
    return open_splits(asked, options.data, options.heldout, options.cache, stop)


def _subject(pipeline: Pipeline, splits: Splits, options: EvalOptions, stop: Callable[[], bool]) -> Subject:
    names = options.features or default_spaces(pipeline.image_shape[0], splits.train.class_names)
    spaces: list[FeatureSpace] = [
        open_space(
            name, splits, options.classifier, options.classifier_steps, options.machine["threads"], Control(stop)
        )
        for name in names
    ]
    seeds = tuple(range(options.seed, options.seed + options.num_seeds))
    return Subject(pipeline, splits, spaces, options.num_images, seeds, options.overrides, options.bits_samples, stop)


def _perceptual(size: int) -> tuple[Callable[..., Any] | None, dict[str, str]]:
    """The perceptual distance, if its weights are installed; and what is absent, with the reason."""
    absent = {}
    if size < SMALLEST_PX:
        absent["ssim"] = f"images of {size} px, {SMALLEST_PX} or more are needed"
    if find_spec("stlpips_pytorch") is None:
        absent["perceptual_distance"] = "stlpips-pytorch is not installed; pip install 'unified-latents[perceptual]'"
        return None, absent
    from ul_export.evaluation.features import open_perceptual

    return open_perceptual(), absent


def _as_dicts(figures: dict[str, Figure]) -> dict[str, Any]:
    return {name: figure.as_dict() for name, figure in figures.items()}


def _reconstruction(rebuilt: Rebuilt) -> dict[str, Any]:
    return _as_dicts(rebuilt.figures) | {"frechet_distance": _as_dicts(rebuilt.frechet)}


def _data(subject: Subject, source: str) -> dict[str, Any]:
    train, heldout = subject.splits.train, subject.splits.heldout
    return {
        "source": source,
        "fingerprint": train.fingerprint,
        "heldout_fingerprint": heldout.fingerprint,
        "train_images": len(train),
        "heldout_images": len(heldout),
        "reference": subject.part,
        "reference_images": len(subject.pool),
        "classes": list(train.class_names),
    }


def _notes(subject: Subject) -> list[str]:
    """What a reader of the figures has to know."""
    notes, manifest = [], subject.pipeline.manifest
    if subject.splits.train.fingerprint != manifest.provenance.data_fingerprint:
        notes.append("the bundle was trained on other images than --data, or they were prepared in another way")
    if manifest.classes and subject.labels(subject.seeds[0]) is None:
        notes.append("the classes of --data are not the bundle's: samples are of all its classes in turn")
    if subject.part == "train":
        notes.append("too few images are held out for two halves: samples are compared with images trained on")
    if len(subject.heldout_ids) < subject.count:
        notes.append(f"{len(subject.heldout_ids)} images are held out: so many are reconstructed")
    return notes


def _write(out: Path, result: dict[str, Any], sheets: dict[str, bytes]) -> None:
    """All files of the folder, eval.json last. OutputError."""
    durable.make_directory(out)
    for name, data in sheets.items():
        durable.atomic_write(out / name, data)
    durable.atomic_write(out / "report.html", html_report(result, sheets).encode())
    durable.write_json(out / "eval.json", result)
