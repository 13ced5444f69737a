"""What ul-export does: averaged weights to ONNX, the proof against torch, one hashed bundle."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ul_export.compare import REDUCED
from ul_export.half_weights import effect_of_rounding, rounded
from ul_export.onnx_graphs import OPSETS, export_graphs
from ul_export.precision.command import REPORT, reduced_bundle
from ul_export.precision.kinds import Kind
from ul_export.precision.search import CALIBRATION_IMAGES
from ul_export.trial import Trial, torch_reference
from ul_export.verify import BATCH_SIZES, PROOF_BATCHES, Proof, require
from ul_runtime import durable
from ul_runtime.bundle import write_bundle
from ul_runtime.errors import BadInputError, NonFiniteError, UsageError
from ul_runtime.loop import never
from ul_runtime.manifest import MANIFEST_NAME, BundleInfo, Provenance
from ul_train.command import open_splits
from ul_train.config import Config
from ul_train.describe import describe
from ul_train.heldout import from_uint8
from ul_train.model import weights_sha256
from ul_train.session import RunInfo, load_networks, load_newest

WEIGHTS = ("fp32", "fp16")
_DEFAULT_OPSET = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}  # convolutions take bfloat16 from opset 22 on


@dataclass(frozen=True)
class ExportOptions:
    """The options of ul-export. `weights`: what they are stored in where graphs compute in float32.

    `calibrate`: source of images; None = the run's own. `opset` None = the precision's.
    """

    opset: int | None = None
    precision: Kind | Literal["fp32"] = "fp32"
    weights: str = "fp32"
    calibrate: str | None = None
    cache: Path = Path("cache")
    threads: int | None = None
    overwrite: bool = False

    def check(self) -> int:
        """The opset. UsageError for what cannot be."""
        opset = _DEFAULT_OPSET[self.precision] if self.opset is None else self.opset
        if opset not in OPSETS:
            raise UsageError(f"--opset is {opset}; expected {', '.join(map(str, OPSETS[:-1]))} or {OPSETS[-1]}")
        if self.precision == "bf16" and opset < _DEFAULT_OPSET["bf16"]:
            raise UsageError(f"--opset is {opset}; convolutions take bfloat16 from opset {_DEFAULT_OPSET['bf16']} on")
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights {self.weights}: expected {' or '.join(WEIGHTS)}")
        if self.precision != "fp32" and self.weights != "fp32":
            raise UsageError(f"--weights {self.weights}: --{self.precision} says itself how weights are stored")
        if self.precision == "fp32" and self.calibrate is not None:
            raise UsageError("--calibrate is for --fp16, --bf16 and --int8")
        return opset


def export_bundle(run: Path, out: Path, options: ExportOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Export the run and verify; the bundle at `out` is whole or absent. Returns what to print.

    BadInputError: a stage is missing, or a graph does not equal torch, or float32 in a lower precision.
    NonFiniteError: a weight is NaN or Inf. UsageError: `out` is in the way. OutputError: it cannot be written.
    """
    opset, weights, threads = options.check(), options.weights, options.threads
    _check_free(out, options.overwrite)
    started = time.monotonic()
    config, info, networks, step = load_networks(run)
    check_finite(run, networks)
    x, which = (
        (None, {})
        if options.precision == "fp32"
        else calibration_images(run, config, info, options.calibrate, options.cache, say)
    )
    if threads:
        torch.set_num_threads(threads)
    encoder = weights_sha256(networks["encoder"])
    described = describe(config, info.class_names, info.run_id, info.data_fingerprint, step, opset, encoder)
    steps = config.base_stage.steps
    say(f"exporting {config.name} (base step {step} of {steps}, averaged weights) at opset {opset}")
    parity: dict[str, Any] = {"reference": f"torch {torch.__version__}"}
    if weights == "fp16":
        exact, networks = networks, rounded(networks)
        described = described.model_copy(update={"provenance": rounded_provenance(described)})
        say("measuring what rounding the weights to float16 does to pictures")
        parity["rounded_weights"] = effect_of_rounding(
            torch_reference(described, exact), torch_reference(described, networks)
        )
    files = export_graphs(networks, described, opset, weights == "fp16")
    batches = ", ".join(map(str, BATCH_SIZES))
    say(f"comparing with torch along the whole sampling path, at batch sizes {batches}")
    trial = Trial(out, described, files, networks, threads)
    proof, backend = trial.prove(batch_sizes=PROOF_BATCHES)
    require(proof, str(run), lambda: trial.first_difference(proof))
    parity |= {"backend": backend, **proof.figures}
    by_rounding = parity.get("rounded_weights")
    reduced: dict[str, Any] = {}
    if x is not None and options.precision != "fp32":
        described, files, reduced = reduced_bundle(described, files, options.precision, x, threads, say)
        lowered = replace(trial, described=described, files=files)
        on_this_machine, _ = lowered.prove(REDUCED[options.precision])
        require(on_this_machine, str(run))
        parity[options.precision] = reduced | {"on_this_machine": on_this_machine.figures, "calibration": which}
        if options.precision == "bf16":
            parity["bf16"] |= lowered.by_openvino(say)
        say(f"report: {REPORT}.html in the bundle")
    final = write_bundle(out, described.model_copy(update={"parity": parity}), files, overwrite=options.overwrite)
    return {
        "bundle": str(out),
        "hash": final.hash,
        "megabytes": sum(entry.size for entry in final.manifest.files.values()) / 1e6,
        "opset": opset,
        **reduced_in_short(reduced),
        **proof_in_short(proof),
        **({"rounded_weights_psnr_db": by_rounding["image_psnr_db"]} if by_rounding else {}),
        "seconds": time.monotonic() - started,
    }


def check_export(run: Path, threads: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Prove the float32 export of a run as it stands, before its stages are finished; writes nothing that lasts.

    Returns what to print. Errors are those of `export_bundle`.
    """
    started = time.monotonic()
    config, info, networks, stage, step = load_newest(run)
    check_finite(run, networks)
    if threads:
        torch.set_num_threads(threads)
    opset = _DEFAULT_OPSET["fp32"]
    described = describe(config, info.class_names, info.run_id, info.data_fingerprint, step, opset)
    say(f"checking the export of {config.name} ({stage} step {step}, averaged weights) at opset {opset}")
    files = export_graphs(networks, described, opset)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder) / "bundle", described, files, networks, threads)
        proof, _ = trial.prove()
    require(proof, str(run), lambda: trial.first_difference(proof))
    return {**proof_in_short(proof), "seconds": time.monotonic() - started}


def proof_in_short(proof: Proof) -> dict[str, Any]:
    """Of the proof in float32, what ul-export prints."""
    paths = [figures for figures in proof.figures.values() if "z_0" in figures]
    return {
        "worst_graph_difference": proof.worst_graph_difference,
        "worst_z_0_difference": max(figures["z_0"] for figures in paths),
        "worst_image_psnr_db": min(figures["image_psnr_db"] for figures in paths),
    }


def calibration_images(
    run: Path, config: Config, info: RunInfo, calibrate: str | None, cache: Path, say: Callable[[str], None]
) -> tuple[np.ndarray, dict[str, Any]]:
    """(images `b c h w` in [-1, 1] for the encoder's ranges and proof, which they are). BadInputError, UsageError.

    The first held-out ones of the run, or the first of the source `calibrate`: all of these may be used.
    """
    source, heldout = (info.data, info.heldout) if calibrate is None else (calibrate, None)
    try:
        splits = open_splits(config.image, source, heldout, cache, never)
    except BadInputError as error:
        if calibrate is not None:
            raise
        raise BadInputError(
            f"{run}: {error}; the ranges of the encoder need images, give others by --calibrate"
        ) from None
    parts = [splits.heldout] if calibrate is None else [splits.heldout, splits.train]
    pixels = np.concatenate([part.batch(np.arange(min(CALIBRATION_IMAGES, len(part))))[0] for part in parts])
    x = from_uint8(pixels[:CALIBRATION_IMAGES])
    which = "the run's held-out images" if calibrate is None else "--calibrate"
    if len(x) < CALIBRATION_IMAGES:
        few = f"the encoder is proved on only {len(x)} images ({which})"
        say(f"{few}; {CALIBRATION_IMAGES} show its range better")
    return x, {"images": len(x), "source": which, "data_fingerprint": parts[0].fingerprint}


def reduced_in_short(reduced: dict[str, Any]) -> dict[str, Any]:
    """Of the proof in a lower precision, what ul-export prints."""
    if not reduced:
        return {}
    paths = [each for each in reduced.values() if isinstance(each, dict) and "z_0" in each]
    pinned, shares = reduced.get("pinned"), reduced.get("flops_share")  # bundles of older versions have neither
    return {
        **({"pinned_nodes": sum(map(len, pinned.values()))} if pinned is not None else {}),
        **({"least_share_of_flops": min(shares.values())} if shares else {}),
        "lowered_z_0_difference": max(each["z_0"] for each in paths),
        "lowered_image_psnr_db": min(each["image_psnr_db"] for each in paths),
    }


def rounded_provenance(described: BundleInfo) -> Provenance:
    """Its own, and that weights are rounded."""
    return described.provenance.model_copy(update={"weights": f"{described.provenance.weights}, rounded to float16"})


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse before any work what `write_bundle` would refuse after it."""
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"{out}: exists already; choose another --out, or --overwrite")
    if os.path.lexists(out) and not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out}: exists and is not a bundle; choose another --out")
    durable.check_output_directory(Path(os.path.abspath(out)).parent, ["*"])


def check_finite(run: Path, networks: dict[str, nn.Module]) -> None:
    """NonFiniteError with the name of a weight that is NaN or Inf."""
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"{run}: weight {name}.{key} is not finite; remove the newest checkpoint of its stage, "
                    "go on with ul-train --resume, and export again"
                )
