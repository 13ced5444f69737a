"""What ul-export does: averaged weights to ONNX, compared with torch, one hashed bundle."""

import copy
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ul_export.onnx_graphs import OPSETS, export_graphs, step_graphs
from ul_export.onnx_model import check_graph, join_weights, stored_name
from ul_export.options import ExportOptions
from ul_export.precision.graphs import in_memory
from ul_export.precision.lower import BF16, PRECISIONS, Precision
from ul_export.precision.reduce import REPORT, reduced_bundle, with_their_weights
from ul_export.precision.search import CALIBRATION_IMAGES, first_difference
from ul_export.update import updated_files
from ul_export.verify import (
    BATCH_SIZES,
    CHECK_BATCHES,
    FP32,
    Comparison,
    Tolerances,
    compare_backends,
    compare_pixels,
    image_psnr_db,
)
from ul_runtime.backends import NO_BF16
from ul_runtime.backends.choose import open_backend
from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.errors import BadInputError, NonFiniteError, UsageError
from ul_runtime.files import durable
from ul_runtime.images.convert import from_uint8
from ul_runtime.machine import cache_dir, versions
from ul_runtime.manifest import MANIFEST_NAME, BundleInfo
from ul_runtime.pipeline import Pipeline
from ul_train.data.prepare import open_splits
from ul_train.fine_tune import check_same
from ul_train.run import OPSET, Run, Snapshot
from ul_train.torch_backend import fix_threads, torch_pipeline

_LOG = logging.getLogger(__name__)
LEAST_PSNR_DB = 35.0  # of images by rounded against those by exact weights, from the same noise
NUM_IMAGES = 16
WEIGHTS = ("fp32", "fp16")


def rounded(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the networks, every floating-point weight the float16 next to it. BadInputError: one is too large."""
    copies = {name: copy.deepcopy(network) for name, network in networks.items()}
    for name, network in copies.items():
        for key, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            half = value.half()
            if not torch.isfinite(half).all():
                largest = value.abs().max().item()
                raise BadInputError(
                    f"weight {name}.{key} is up to {largest:.4g}, float16 ends at 65504; export with --weights fp32"
                )
            value.copy_(half)
    return copies


def effect_of_rounding(exact: Pipeline, by_rounded: Pipeline) -> dict[str, Any]:
    """The same images by both, from the same noise: largest difference of a pixel in [-1, 1], and their PSNR.

    BadInputError below LEAST_PSNR_DB.
    """
    (expected,), (given,) = (list(p.generate(NUM_IMAGES, batch_size=NUM_IMAGES)) for p in (exact, by_rounded))
    psnr = image_psnr_db(expected.x, given.x)
    if not psnr >= LEAST_PSNR_DB:
        raise BadInputError(
            f"images by weights rounded to float16 are at {psnr:.1f} dB of those by exact weights, at least "
            f"{LEAST_PSNR_DB:g} is asked for; no bundle was written: export with --weights fp32"
        )
    largest = float(np.abs(expected.x - given.x).max())
    return {"num_images": NUM_IMAGES, "image_psnr_db": min(psnr, 200.0), "largest_pixel_difference": largest}


def torch_reference(described: BundleInfo, networks: dict[str, nn.Module]) -> Pipeline:
    """The sampling path by torch in float32 on the CPU, with which everything is compared."""
    cpu = torch.device("cpu")
    return torch_pipeline(described, networks, cpu, "fp32")


@dataclass(frozen=True)
class Candidate:
    """Files that may become the bundle `out`, and the networks that they have to equal."""

    out: Path
    described: BundleInfo
    files: dict[str, bytes]
    networks: dict[str, nn.Module]
    threads: int | None = None

    def compare(
        self, tolerances: Tolerances = FP32, backend: str = "ort-cpu", batch_sizes: Sequence[int] = BATCH_SIZES
    ) -> Comparison:
        """The files with torch, as a bundle on the disk of `out` that is opened as a user's is.

        ort-cpu computes in what it takes for the bundle, openvino in bfloat16.
        """
        reference = torch_reference(self.described, self.networks)
        with durable.temporary_directory_beside(self.out) as temporary:
            folder = temporary / "candidate"
            bundle = write_bundle(folder, self.described, self.files)
            for graph in self.described.all_graphs.values():
                for file in {graph.file, graph.float32_file or graph.file}:
                    check_graph(folder / file)
            precision = "bf16" if backend == "openvino" else None
            opened = open_backend(backend, bundle, precision=precision, threads=self.threads)
            comparison = compare_backends(reference, opened, tolerances=tolerances, batch_sizes=batch_sizes)
            if backend == "ort-cpu":  # OpenVINO's loops run on the host, which makes the pixels itself
                compare_pixels(comparison, opened, reference.image_shape)
            return comparison

    def by_openvino(self) -> dict[str, Any]:
        """How a bundle in bf16 compares on OpenVINO, which computes in it natively where the CPU does.

        {"openvino": its figures} where it holds; else nothing, said why: `auto` takes OpenVINO only where it was
        verified.
        """
        if find_spec("openvino") is None:
            _LOG.info("bf16: not verified on OpenVINO, which is not installed")
            return {}
        from ul_runtime.backends.openvino import has_bf16

        if not has_bf16():
            _LOG.info(f"bf16: not verified on OpenVINO: {NO_BF16}")
            return {}
        comparison = self.compare(BF16.tolerances, "openvino")
        if comparison.failures:
            _LOG.info(f"bf16: does not hold on OpenVINO, which auto will not take: {comparison.failures[0]}")
            return {}
        return {"openvino": {"versions": versions(["openvino"]), **comparison.figures}}

    def first_difference(self, comparison: Comparison) -> str:
        """Where the worst call of a comparison that failed parts from torch: module and node."""
        graph, described = comparison.worst_graph, self.described
        modules = {each.name: each.module for each in step_graphs(self.networks, described.image, described.latent)}
        entry = described.all_graphs[graph]
        model = join_weights(self.files[entry.file], self.files[entry.weights], entry.weights)
        return first_difference(modules[graph], model, described, graph, comparison.worst_calls[graph][0].inputs)


@dataclass(frozen=True)
class _Plan:
    """What is exported: in which precision (None: float32), and into the graphs of which bundle, if `old` is one."""

    precision: Precision | None
    opset: int
    half_weights: bool
    old: Bundle | None

    @classmethod
    def of(cls, options: ExportOptions) -> "_Plan":
        """What the options ask for. UsageError for what cannot be; BadInputError: the bundle to update."""
        asked = [name for name in PRECISIONS if getattr(options, name)]
        if len(asked) > 1:
            raise UsageError(f"--{asked[0]} and --{asked[1]}: give one of them")
        if options.update is not None:
            if asked or options.opset is not None or options.weights != "fp32":
                raise UsageError("--update keeps the bundle's precision and opset; leave them out")
            plan = cls._of_bundle(Bundle.open(options.update))
            if plan.precision is None and options.calibrate is not None:
                raise UsageError(f"--calibrate is for bundles in a lower precision; {options.update} is in float32")
            return plan
        precision = PRECISIONS[asked[0]] if asked else None
        least = precision.least_opset if precision else OPSETS[0]
        opset = max(OPSET, least) if options.opset is None else options.opset
        if opset not in OPSETS:
            raise UsageError(f"--opset is {opset}; expected {', '.join(map(str, OPSETS[:-1]))} or {OPSETS[-1]}")
        if opset < least:
            raise UsageError(f"--opset is {opset}; convolutions take bfloat16 from opset {least} on")
        if options.weights not in WEIGHTS:
            raise UsageError(f"--weights {options.weights}: expected {' or '.join(WEIGHTS)}")
        if precision and options.weights != "fp32":
            raise UsageError(f"--weights {options.weights}: --{precision.name} says itself how weights are stored")
        if precision is None and options.calibrate is not None:
            raise UsageError("--calibrate is for --fp16, --bf16 and --int8")
        return cls(precision, opset, options.weights == "fp16", None)

    @classmethod
    def _of_bundle(cls, old: Bundle) -> "_Plan":
        graph = old.manifest.graphs["prior_step"]
        precision = PRECISIONS.get(graph.precision)
        names = (name for graph_name in old.manifest.all_graphs for name in old.initializers(graph_name))
        half = precision is None and any(name.endswith(stored_name("")) for name in names)
        return cls(precision, graph.opset, half, old)

    def described(self, trained: Snapshot) -> BundleInfo:
        """The manifest, without hashes and parity. BadInputError: `old` has other networks."""
        info = trained.manifest(self.opset)
        changed: dict[str, Any] = {}
        if self.old is not None:
            check_same(info, self.old, str(trained.run.path), "export without --update")
            info = info.with_graphs(self.old.manifest.all_graphs)
            if self.old.manifest.presets:
                _LOG.info("presets are left out: they were measured with the old weights; ul-tune finds new ones")
        if self.half_weights:
            weights = f"{info.provenance.weights}, rounded to float16"
            changed["provenance"] = info.provenance.model_copy(update={"weights": weights})
        return info.model_copy(update=changed)


def export_bundle(run: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Export the run and compare it with torch; the bundle at `out` is whole or absent. Returns what to print.

    With `options.update`, which may be `out`, the run's weights go into that bundle's graphs: pins and scales stay as
    they were found for its own weights.
    BadInputError: a stage is missing, or a graph does not equal torch, or float32 in a lower precision, or the bundle
    to update has other networks. NonFiniteError: a weight is NaN or Inf. UsageError: options, or `out` is in the way.
    OutputError: it cannot be written.
    """
    started, plan = time.monotonic(), _Plan.of(options)
    replaced = options.overwrite or out == options.update
    check_free(out, replaced)
    fix_threads(options.threads)
    trained = Run.open(run).finished()
    check_finite(trained)
    networks, described = trained.networks, plan.described(trained)
    x, images = calibration_images(trained.run, options) if plan.precision else (None, {})
    how = f"at opset {plan.opset}" if plan.old is None else f"into the graphs of {plan.old.path}"
    _LOG.info(f"exporting {described.name} ({progress_of(trained)}, averaged weights) {how}")
    parity: dict[str, Any] = {"reference": f"torch {torch.__version__}", "backend": "ort-cpu"}
    shown: dict[str, Any] = {"precision": plan.precision.name if plan.precision else "fp32", "opset": plan.opset}
    if plan.half_weights:
        exact, networks = networks, rounded(networks)
        parity["rounded_weights"] = effect_of_rounding(*(torch_reference(described, n) for n in (exact, networks)))
        shown["rounded_weights_psnr_db"] = parity["rounded_weights"]["image_psnr_db"]
    if plan.old is None:
        files = export_graphs(networks, described, plan.opset, plan.half_weights)
    else:
        files, parity["updated_from"] = updated_files(plan.old, described, networks), plan.old.hash
    candidate = Candidate(out, described, files, networks, options.threads)
    if plan.old is None or x is None:
        _LOG.info("comparing with torch along the whole sampling path")
        comparison = candidate.compare(batch_sizes=CHECK_BATCHES)
        comparison.check(str(run), lambda: candidate.first_difference(comparison))
        parity |= comparison.figures
        shown |= comparison.summary
    if plan.precision is not None and x is not None:
        candidate, figures = _in_precision(candidate, plan.precision, x, plan.old, str(run))
        parity[plan.precision.name] = figures | {"calibration": images}
        shown |= reduced_in_short(figures)
    described = candidate.described.model_copy(update={"parity": parity})
    final = write_bundle(out, described, candidate.files, overwrite=replaced)
    size = sum(entry.size for entry in final.manifest.files.values())
    about = {"bundle": str(out), "hash": final.hash, "megabytes": size / 1e6}
    return about | shown | {"seconds": time.monotonic() - started}


def _in_precision(
    candidate: Candidate, precision: Precision, x: np.ndarray, old: Bundle | None, run: str
) -> tuple[Candidate, dict[str, Any]]:
    """(the candidate in `precision`, as that of `old` if it has the graphs of this bundle; figures for the manifest).

    The encoder is compared on images x `b c h w` too. BadInputError: it does not hold.
    """
    described, files, threads = candidate.described, candidate.files, candidate.threads
    if old is None:
        described, files, figures = reduced_bundle(described, files, precision, x, threads)
        candidate = replace(candidate, described=described, files=files)
        _LOG.info(f"report: {REPORT}.html in the bundle")
    else:
        models = {name: precision.as_computed(model) for name, model in with_their_weights(described, files).items()}
        typed = compare_backends(
            torch_reference(described, candidate.networks),
            in_memory(described, models, threads),
            tolerances=precision.tolerances,
            batch_sizes=CHECK_BATCHES,
            x=x,
        )
        advice = "pins and scales are those of the old weights: export without --update finds new ones"
        typed.check(f"{run}, in {precision.name}", lambda: advice)
        of_old: Any = old.manifest.parity[precision.name]
        figures = {name: of_old[name] for name in ("pinned", "flops_share")} | typed.figures
        _LOG.info(f"{REPORT}.html is left out: it is of the old weights")
    here = candidate.compare(precision.tolerances)
    here.check(run)
    by_openvino = candidate.by_openvino() if precision is BF16 else {}
    return candidate, {**figures, "on_this_machine": here.figures, **by_openvino}


def check_export(run: Path, threads: int | None) -> dict[str, Any]:
    """Compare the float32 export of a run as it stands, before its stages are finished; writes nothing that lasts.

    Returns what to print. Errors are those of `export_bundle`.
    """
    started = time.monotonic()
    newest = Run.open(run).newest()
    check_finite(newest)
    fix_threads(threads)
    described, networks, where = newest.manifest(OPSET), newest.networks, f"{newest.stage} step {newest.step}"
    _LOG.info(f"checking the export of {described.name} ({where}, averaged weights) at opset {OPSET}")
    files = export_graphs(networks, described, OPSET)
    with tempfile.TemporaryDirectory() as folder:
        candidate = Candidate(Path(folder) / "bundle", described, files, networks, threads)
        comparison = candidate.compare()
    comparison.check(str(run), lambda: candidate.first_difference(comparison))
    return {**comparison.summary, "seconds": time.monotonic() - started}


def calibration_images(run: Run, options: ExportOptions) -> tuple[np.ndarray, dict[str, Any]]:
    """(images `b c h w` in [-1, 1] for the encoder's ranges and comparison, which they are). BadInputError, UsageError.

    The first held-out ones of the run, or the first of the source `calibrate`: all of these may be used.
    """
    given = options.calibrate is not None
    source, heldout = (options.calibrate, None) if given else (run.info.data, run.info.heldout)
    try:
        splits = open_splits(run.config.image, str(source), heldout, cache_dir(options.cache))
    except BadInputError as error:
        if given:
            raise
        raise BadInputError(
            f"{run.path}: {error}; the ranges of the encoder need images, give others by --calibrate"
        ) from None
    parts = [splits.heldout, splits.train] if given else [splits.heldout]
    pixels = np.concatenate([part.batch(np.arange(min(CALIBRATION_IMAGES, len(part))))[0] for part in parts])
    x = from_uint8(pixels[:CALIBRATION_IMAGES])
    which = "--calibrate" if given else "the run's held-out images"
    if len(x) < CALIBRATION_IMAGES:
        few = f"the encoder is compared on only {len(x)} images ({which})"
        _LOG.info(f"{few}; {CALIBRATION_IMAGES} show its range better")
    return x, {"images": len(x), "source": which, "data_fingerprint": parts[0].fingerprint}


def reduced_in_short(figures: dict[str, Any]) -> dict[str, Any]:
    """Of the comparison in a lower precision, what ul-export prints."""
    paths = [each for each in figures.values() if isinstance(each, dict) and "z_0" in each]
    return {
        "pinned_nodes": sum(map(len, figures["pinned"].values())),
        "least_share_of_flops": min(figures["flops_share"].values()),
        "lowered_z_0_difference": max(each["z_0"] for each in paths),
        "lowered_image_psnr_db": min(each["image_psnr_db"] for each in paths),
    }


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse before any work what `write_bundle` would refuse after it."""
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"{out}: exists already; choose another --out, or --overwrite")
    if os.path.lexists(out) and not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out}: exists and is not a bundle; choose another --out")
    durable.check_output_directory(Path(os.path.abspath(out)).parent, ["*"])


def progress_of(trained: Snapshot) -> str:
    """`base step 20 of 40`; a warning where that is not the last."""
    steps = trained.run.config.of_stage(trained.stage).steps
    where = f"{trained.stage} step {trained.step} of {steps}"
    if trained.step < steps:
        _LOG.warning(f"warning: the run is not finished ({where}): its images are worse than they will be")
    return where


def check_finite(trained: Snapshot) -> None:
    """NonFiniteError with the name of a weight that is NaN or Inf."""
    for name, network in trained.networks.items():
        for key, value in network.state_dict().items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"{trained.run.path}: weight {name}.{key} is not finite; remove the newest checkpoint of its "
                    "stage, go on with ul-train --resume, and export again"
                )
