"""What ul-export does: averaged weights to ONNX, the proof against torch, one hashed bundle."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ul_export.half_weights import effect_of_rounding, rounded
from ul_export.onnx_graphs import OPSETS, check_graph, export_graphs
from ul_export.verify import BATCH_SIZES, Proof, require, verify
from ul_runtime import durable
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import write_bundle
from ul_runtime.errors import NonFiniteError, UsageError
from ul_runtime.manifest import MANIFEST_NAME, BundleInfo, Provenance
from ul_runtime.pipeline import Pipeline
from ul_train.describe import describe
from ul_train.heldout import torch_pipeline
from ul_train.session import load_networks

WEIGHTS = ("fp32", "fp16")


def export_bundle(
    run: Path,
    out: Path,
    *,
    opset: int,
    weights: str = "fp32",
    threads: int | None,
    overwrite: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Export the run and verify; the bundle at `out` is whole or absent. Returns what to print.

    `weights`: what they are stored in, fp32 or fp16; graphs compute in float32 either way.
    BadInputError: a stage is missing, or a graph does not equal torch. NonFiniteError: a weight is NaN or Inf.
    UsageError: `out` is in the way. OutputError: it cannot be written.
    """
    if opset not in OPSETS:
        raise UsageError(f"--opset is {opset}; expected {' or '.join(map(str, OPSETS))}")
    if weights not in WEIGHTS:
        raise UsageError(f"--weights {weights}: expected {' or '.join(WEIGHTS)}")
    _check_free(out, overwrite)
    started = time.monotonic()
    config, info, networks, step = load_networks(run)
    _check_finite(run, networks)
    if threads:
        torch.set_num_threads(threads)
    encoder = _weights_sha256(networks["encoder"])
    described = describe(config, info.class_names, info.run_id, info.data_fingerprint, step, opset, encoder)
    steps = config.base_stage.steps
    say(f"exporting {config.name} (base step {step} of {steps}, averaged weights) at opset {opset}")
    parity: dict[str, Any] = {"reference": f"torch {torch.__version__}"}
    if weights == "fp16":
        exact, networks = networks, rounded(networks)
        described = described.model_copy(update={"provenance": _rounded_provenance(described)})
        say("measuring what rounding the weights to float16 does to pictures")
        parity["rounded_weights"] = effect_of_rounding(_torch(described, exact), _torch(described, networks))
    files = export_graphs(networks, described, opset, weights == "fp16")
    batches = ", ".join(map(str, BATCH_SIZES))
    say(f"comparing with torch along the whole sampling path, at batch sizes {batches}")
    proof, backend = prove(out, described, files, networks, threads)
    require(proof, str(run))
    parity |= {"backend": backend, **proof.figures}
    final = write_bundle(out, described.model_copy(update={"parity": parity}), files, overwrite=overwrite)
    paths = [figures for figures in proof.figures.values() if "z_0" in figures]
    by_rounding = parity.get("rounded_weights")
    return {
        "bundle": str(out),
        "hash": final.hash,
        "megabytes": sum(entry.size for entry in final.manifest.files.values()) / 1e6,
        "opset": opset,
        "worst_graph_difference": proof.worst_graph_difference,
        "worst_z_0_difference": max(figures["z_0"] for figures in paths),
        "worst_image_psnr_db": min(figures["image_psnr_db"] for figures in paths),
        **({"rounded_weights_psnr_db": by_rounding["image_psnr_db"]} if by_rounding else {}),
        "seconds": time.monotonic() - started,
    }


def _torch(described: BundleInfo, networks: dict[str, nn.Module]) -> Pipeline:
    cpu = torch.device("cpu")
    return torch_pipeline(described, networks["encoder"], networks["prior"], networks["decoder"], cpu, "fp32")


def _rounded_provenance(described: BundleInfo) -> Provenance:
    return described.provenance.model_copy(update={"weights": f"{described.provenance.weights}, rounded to float16"})


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse before any work what `write_bundle` would refuse after it."""
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"{out}: exists already; choose another --out, or --overwrite")
    if os.path.lexists(out) and not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out}: exists and is not a bundle; choose another --out")
    durable.check_output_directory(Path(os.path.abspath(out)).parent, ["*"])


def _check_finite(run: Path, networks: dict[str, nn.Module]) -> None:
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"{run}: weight {name}.{key} is not finite; remove the newest checkpoint of its stage, "
                    "go on with ul-train --resume, and export again"
                )


def _weights_sha256(network: nn.Module) -> str:
    """SHA-256 of a network's tensors and their names, whatever graph they are written into."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def prove(
    out: Path,
    described: BundleInfo,
    files: dict[str, bytes],
    networks: dict[str, nn.Module],
    threads: int | None,
) -> tuple[Proof, str]:
    """(proof, name of the backend) of the files as a bundle on the disk of `out`, opened as a user's is."""
    reference = _torch(described, networks)
    with durable.temporary_directory_beside(out) as temporary:
        bundle = write_bundle(temporary / "trial", described, files)
        for graph in described.graphs.values():
            check_graph(temporary / "trial" / graph.file)
        backend = OrtCpuBackend(bundle, threads=threads)
        return verify(reference, backend), backend.name
