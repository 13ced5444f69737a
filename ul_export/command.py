"""What ul-export does: averaged weights to ONNX, the proof against torch, one hashed bundle."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ul_export.onnx_graphs import check_graph, export_graphs
from ul_export.verify import require, verify
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import write_bundle
from ul_runtime.errors import NonFiniteError, UsageError
from ul_train.describe import describe
from ul_train.heldout import torch_pipeline
from ul_train.session import load_networks


def export_bundle(
    run: Path, out: Path, *, opset: int, threads: int | None, overwrite: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Export the run and verify; the bundle at `out` is whole or absent. Returns what to print.

    BadInputError: a stage is missing, or a graph does not equal torch. NonFiniteError: a weight is NaN or Inf.
    UsageError: `out` is in the way.
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists already; choose another --out, or --overwrite")
    started = time.monotonic()
    config, info, networks, step = load_networks(run)
    for name, network in networks.items():
        bad = [key for key, value in network.state_dict().items() if not torch.isfinite(value).all()]
        if bad:
            raise NonFiniteError(f"{run}: weight {name}.{bad[0]} is not finite; export an earlier checkpoint")
    if threads:
        torch.set_num_threads(threads)
    described = describe(config, info.class_names, info.run_id, info.data_fingerprint, step, opset)
    say(f"exporting {config.name} (base step {step}, averaged weights) at opset {opset}")
    files = export_graphs(networks, described, opset)
    with tempfile.TemporaryDirectory(prefix="ul-export-") as temporary:
        trial = Path(temporary) / "bundle"
        bundle = write_bundle(trial, described, files)
        for graph in described.graphs.values():
            check_graph(trial / graph.file)
        backend = OrtCpuBackend(bundle, threads=threads)
        cpu = torch.device("cpu")
        reference = torch_pipeline(described, networks["encoder"], networks["prior"], networks["decoder"], cpu, "fp32")
        proof = verify(reference, backend, say=say)
    require(proof, str(run))
    parity = {"reference": f"torch {torch.__version__}", "backend": backend.name, **proof.figures}
    final = write_bundle(out, described.model_copy(update={"parity": parity}), files, overwrite=overwrite)
    return {
        "bundle": str(out),
        "hash": final.hash,
        "megabytes": sum(entry.size for entry in final.manifest.files.values()) / 1e6,
        "opset": opset,
        "worst_graph_difference": max(
            max(f["largest_difference"].values())
            for f in proof.figures.values()
            if isinstance(f["largest_difference"], dict)
        ),
        "worst_z_0_difference": max(f["z_0"] for f in proof.figures.values() if "z_0" in f),
        "worst_image_psnr_db": min(f["image_psnr_db"] for f in proof.figures.values() if "image_psnr_db" in f),
        "seconds": time.monotonic() - started,
    }
