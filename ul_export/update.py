"""ul-export --update: newer weights of the same networks into the graphs of a bundle, and the proof again."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ul_export.command import (
    calibration_images,
    check_finite,
    proof_in_short,
    reduced_in_short,
    rounded_provenance,
)
from ul_export.compare import REDUCED
from ul_export.half_weights import rounded
from ul_export.onnx_graphs import split_weights, step_graphs
from ul_export.precision.command import REPORT, with_their_weights
from ul_export.precision.kinds import KINDS, Kind, as_computed
from ul_export.precision.memory import in_memory
from ul_export.trial import Trial, torch_reference
from ul_export.verify import PROOF_BATCHES, Proof, require, verify
from ul_export.weight_names import parameters, replace_weights
from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.manifest import GRAPH_NAMES, BundleInfo, Manifest
from ul_train.describe import describe
from ul_train.model import weights_sha256
from ul_train.session import load_networks

_SAME = ("image", "latent", "classes", "logsnr_z", "logsnr_x")  # of bundles whose graphs are the same


def _kind(bundle: Bundle) -> Kind | None:
    """What its networks compute in, None for float32."""
    precision = bundle.manifest.graphs["prior_step"].precision
    return next((kind for kind in KINDS if kind == precision), None)


def _rounded_weights(bundle: Bundle) -> bool:
    """Whether weights are stored in half precision and computed with in float32."""
    names = (name for graph in GRAPH_NAMES for name in bundle.initializers(graph))
    return _kind(bundle) is None and any(name.endswith(".half") for name in names)


def update_bundle(
    run: Path,
    old: Path,
    out: Path,
    threads: int | None,
    say: Callable[[str], None],
    *,
    calibrate: str | None = None,
    cache: Path = Path("cache"),
) -> dict[str, Any]:
    """Write the run's weights with the graphs of the bundle `old` to `out`, which may be `old`; what to print.

    The proof is that of an export, of the encoder in a lower precision on images of the run or of `calibrate`; pins and
    scales stay as they were found for the old weights. BadInputError: other networks, or the proof fails.
    NonFiniteError: a weight is NaN or Inf. UsageError: `calibrate` for a bundle in float32.
    """
    started = time.monotonic()
    bundle = Bundle.open(old)
    manifest, kind = bundle.manifest, _kind(bundle)
    config, info, networks, step = load_networks(run)
    check_finite(run, networks)
    opset, encoder = manifest.graphs["encoder"].opset, weights_sha256(networks["encoder"])
    described = describe(config, info.class_names, info.run_id, info.data_fingerprint, step, opset, encoder)
    _check_same(run, old, described, manifest)
    if kind is None and calibrate is not None:
        raise UsageError(f"--calibrate is for bundles in a lower precision; {old} is in float32")
    x = None if kind is None else calibration_images(run, config, info, calibrate, cache, say)[0]
    described = described.model_copy(update={"graphs": manifest.graphs})
    if _rounded_weights(bundle):
        described = described.model_copy(update={"provenance": rounded_provenance(described)})
        networks = rounded(networks)
    say(f"base step {step} of {run} into the graphs of {old} ({kind or 'fp32'})")
    files = _files(bundle, described, networks)
    say("comparing with torch along the whole sampling path")
    trial = Trial(out, described, files, networks, threads)
    proof, backend = trial.prove(batch_sizes=PROOF_BATCHES) if kind is None else trial.prove(REDUCED[kind])
    require(proof, str(run))
    figures: dict[str, Any] = proof.figures
    shown = proof_in_short(proof)
    if kind is not None:
        assert x is not None
        typed = _prove_typed(described, files, networks, kind, threads, str(run), x)
        of_old: Any = manifest.parity.get(kind, {})  # older versions kept neither
        kept = {name: of_old[name] for name in ("pinned", "flops_share") if name in of_old}
        shown = reduced_in_short(kept | typed.figures)
        say(f"{REPORT}.html is left out: it is of the old weights")
        figures = {kind: kept | typed.figures | {"on_this_machine": proof.figures}}
        if kind == "bf16":
            figures["bf16"] |= trial.by_openvino(say)
    parity = {"reference": f"torch {torch.__version__}", "backend": backend, "updated_from": bundle.hash} | figures
    final = write_bundle(out, described.model_copy(update={"parity": parity}), files, overwrite=out == old)
    return {
        "bundle": str(out),
        "hash": final.hash,
        "precision": kind or "fp32",
        **shown,
        "seconds": time.monotonic() - started,
    }


def _check_same(run: Path, old: Path, described: BundleInfo, manifest: Manifest) -> None:
    """BadInputError unless both have the same formats and networks; by recipes, which older bundles lack."""
    pairs = {part: (getattr(described, part), getattr(manifest, part)) for part in _SAME}
    for part in ("encoder", "decoder", "base") if manifest.recipe else ():
        pairs[part] = _without_dropout(described.recipe.get(part)), _without_dropout(manifest.recipe.get(part))
    for part, (ours, its) in pairs.items():
        if ours != its:
            raise BadInputError(f"{run}: its {part} is {ours}, that of {old} {its}; export without --update")


def _without_dropout(part: Any) -> Any:
    """A network of a recipe without what only training knows."""
    return {name: value for name, value in part.items() if name != "dropout"} if isinstance(part, dict) else part


def _files(old: Bundle, info: BundleInfo, networks: dict[str, nn.Module]) -> dict[str, bytes]:
    """The bundle's graphs over new weights; its report is of the old ones, and stays behind."""
    files = {}
    modules = {graph.name: graph.module for graph in step_graphs(networks, info.image, info.latent)}
    for name, entry in info.graphs.items():
        given, constants = parameters(modules[name]), old.initializers(name)
        for file in (entry.file, entry.float32_file):
            if file is not None:
                model = onnx.load_model_from_string(old.read(file))
                replace_weights(model, given, constants)
                files[file], files[entry.weights] = split_weights(model, entry.weights)
    left = {*old.manifest.files} - {*files, f"{REPORT}.json", f"{REPORT}.html"}
    return files | {name: old.read(name) for name in left}


def _prove_typed(
    info: BundleInfo,
    files: dict[str, bytes],
    networks: dict[str, nn.Module],
    kind: Kind,
    threads: int | None,
    run: str,
    x: np.ndarray,
) -> Proof:
    """The typed graphs with all their rounding against torch in float32, the encoder on images x `b c h w` too."""
    models = {name: as_computed(model, kind) for name, model in with_their_weights(info, files).items()}
    reference = torch_reference(info, networks)
    proof = verify(
        reference, in_memory(info, models, threads), tolerances=REDUCED[kind], batch_sizes=PROOF_BATCHES, x=x
    )
    advice = "pins and scales are those of the old weights: export without --update finds new ones"
    require(proof, f"{run}, in {kind}", lambda: advice)
    return proof
