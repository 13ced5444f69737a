"""Measure a bundle against real images, and write the record, the report and contact sheets."""

from pathlib import Path
from typing import Any

from ul_export.evaluation.comparison import Comparison, real_images
from ul_export.evaluation.features import default_spaces, open_space
from ul_export.evaluation.measures import (
    find_neighbours,
    image_measures,
    measure_bits,
    measure_reconstructions,
    measure_samples,
    note_of_copies,
)
from ul_export.evaluation.report import CONTACT_SHEETS, contact_sheets, html_report
from ul_export.evaluation.statistics import COVERAGE_NEIGHBOURS
from ul_export.options import EvalOptions
from ul_runtime.cli.options import SamplingOptions
from ul_runtime.errors import UsageError
from ul_runtime.files import durable
from ul_runtime.loading import open_pipeline
from ul_runtime.machine import OneGpuOptions, origin
from ul_runtime.settings import check_count, check_seed
from ul_runtime.signals import stop_on_signal
from ul_train.torch_backend import fix_threads

_PACKAGES = ("unified-latents", "numpy", "scipy", "onnxruntime", "torch")
_FEWEST = COVERAGE_NEIGHBOURS + 1  # images that have so many neighbours


def check(options: EvalOptions) -> None:
    """UsageError for what cannot be, OutputError for a folder that cannot be written."""
    if options.images < _FEWEST:
        raise UsageError(f"--images is {options.images}; expected {_FEWEST} or more, for their nearest neighbours")
    check_count("--seeds", options.seeds)
    check_seed(options.seed)
    check_seed(options.seed + options.seeds - 1)
    check_count("--classifier-steps", options.classifier_steps)
    check_count("--bits-samples", options.bits_samples)
    if options.train_images is not None:
        check_count("--train-images", options.train_images)
    if len(set(options.features)) != len(options.features):
        raise UsageError(f"--features {', '.join(options.features)}: each may be given once")
    if options.classifier is not None and options.classifier.suffix != ".safetensors":
        raise UsageError(f"--classifier {options.classifier}: expected a name that ends in .safetensors")
    if options.out is not None:
        durable.check_output_directory(options.out, ("eval.json", "report.html", *CONTACT_SHEETS))


def run_eval(path: Path, options: EvalOptions, sampling: SamplingOptions, machine: OneGpuOptions) -> dict[str, Any]:
    """Every figure, JSON-ready; writes `options.out`. UsageError before anything is measured; StoppedError."""
    check(options)
    pipeline = open_pipeline(path, machine)
    settings = pipeline.settings(**sampling.overrides)
    fix_threads(machine.threads)
    with stop_on_signal():
        image = pipeline.manifest.image
        splits, split = real_images(pipeline, options.data, options.heldout, options.cache, options.images)
        measures, absent = image_measures(image.size)
        names = options.features or default_spaces(image.channels, splits.train.class_names)
        spaces = [open_space(name, splits, options, machine.threads) for name in names]
        comparison = Comparison(pipeline, splits, split, spaces, options, sampling.overrides)
        generation, samples, features = measure_samples(comparison)
        reconstruction, decoded = measure_reconstructions(comparison, measures)
        bits = measure_bits(comparison)
        memorisation, index, distance = find_neighbours(comparison, features)
        result = {
            "bundle": {"path": str(path), "name": pipeline.manifest.name, "hash": pipeline.hash},
            "data": _data(comparison),
            "settings": settings.as_dict(),
            "computed_by": pipeline.computed_by,
            "seeds": list(comparison.seeds),
            "features": {space.name: space.record for space in spaces},
            "generation": generation,
            "reconstruction": reconstruction,
            "bits_per_pixel": bits,
            "memorisation": memorisation,
            "absent": absent,
            "notes": [*_notes(comparison), *note_of_copies(memorisation)],
            **origin("ul-eval", _PACKAGES),
        }
        if options.out is not None:
            sheets = contact_sheets(comparison, samples, decoded, index, distance)
            durable.make_directory(options.out)
            for name, data in sheets.items():
                durable.atomic_write(options.out / name, data)
            durable.atomic_write(options.out / "report.html", html_report(result, sheets).encode())
            durable.write_json(options.out / "eval.json", result)  # the last: it says that all are there
    return result


def _data(comparison: Comparison) -> dict[str, Any]:
    train, heldout = comparison.splits.train, comparison.splits.heldout
    return {
        "source": comparison.options.data,
        "fingerprint": train.fingerprint,
        "heldout_fingerprint": heldout.fingerprint,
        "train_images": len(train),
        "heldout_images": len(heldout),
        "reference": comparison.reference_split,
        "reference_images": len(comparison.real_ids),
        "classes": list(train.class_names),
    }


def _notes(comparison: Comparison) -> list[str]:
    """What a reader of the figures has to know."""
    notes, manifest = [], comparison.pipeline.manifest
    if comparison.splits.train.fingerprint != manifest.provenance.data_fingerprint:
        notes.append("the bundle was trained on other images than --data, or they were prepared in another way")
    if manifest.classes and comparison.labels(comparison.seeds[0]) is None:
        notes.append("the classes of --data are not the bundle's: samples are of all its classes in turn")
    if comparison.reference_split == "train":
        notes.append("too few images are held out for two halves: samples are compared with images trained on")
    if len(comparison.heldout_ids) < comparison.options.images:
        notes.append(f"{len(comparison.heldout_ids)} images are held out: so many are reconstructed")
    return notes
