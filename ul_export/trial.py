"""A bundle before it is written: its files are proved as a user's are opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ul_export.compare import FP32, REDUCED, Tolerances
from ul_export.first_difference import first_difference
from ul_export.onnx_graphs import check_graph, join_weights, step_graphs
from ul_export.verify import BATCH_SIZES, Proof, verify
from ul_runtime import durable
from ul_runtime.backends import NO_BF16, open_backend
from ul_runtime.bundle import write_bundle
from ul_runtime.manifest import BundleInfo
from ul_runtime.origin import versions
from ul_runtime.pipeline import Pipeline
from ul_train.heldout import torch_pipeline


def torch_reference(described: BundleInfo, networks: dict[str, nn.Module]) -> Pipeline:
    """The sampling path by torch in float32 on the processor, which every proof is against."""
    cpu = torch.device("cpu")
    return torch_pipeline(described, networks["encoder"], networks["prior"], networks["decoder"], cpu, "fp32")


@dataclass(frozen=True)
class Trial:
    """Files that may become the bundle `out`, and the networks that they have to equal."""

    out: Path
    described: BundleInfo
    files: dict[str, bytes]
    networks: dict[str, nn.Module]
    threads: int | None = None

    def prove(
        self, tolerances: Tolerances = FP32, backend: str = "ort-cpu", batch_sizes: Sequence[int] = BATCH_SIZES
    ) -> tuple[Proof, str]:
        """(proof, name of the backend) of the files as a bundle on the disk of `out`, opened as a user's is.

        ort-cpu computes in what it takes for the bundle, openvino in bfloat16.
        """
        reference = torch_reference(self.described, self.networks)
        with durable.temporary_directory_beside(self.out) as temporary:
            bundle = write_bundle(temporary / "trial", self.described, self.files)
            for graph in self.described.graphs.values():
                for file in {graph.file, graph.float32_file or graph.file}:
                    check_graph(temporary / "trial" / file)
            precision = "bf16" if backend == "openvino" else None
            opened = open_backend(backend, bundle, precision=precision, threads=self.threads)
            return verify(reference, opened, tolerances=tolerances, batch_sizes=batch_sizes), opened.name

    def by_openvino(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The proof of a bundle in bf16 on OpenVINO, which computes in it natively where the processor does.

        {"openvino": its figures} where it holds; else nothing, said why: `auto` takes OpenVINO only where it was
        proved.
        """
        if find_spec("openvino") is None:
            say("bf16: not proved on OpenVINO, which is not installed")
            return {}
        from ul_runtime.backends.openvino import has_bf16

        if not has_bf16():
            say(f"bf16: not proved on OpenVINO: {NO_BF16}")
            return {}
        proof, _ = self.prove(REDUCED["bf16"], "openvino")
        if proof.failures:
            say(f"bf16: does not hold on OpenVINO, which auto will not take: {proof.failures[0]}")
            return {}
        return {"openvino": {"versions": versions(["openvino"]), **proof.figures}}

    def first_difference(self, proof: Proof) -> str:
        """Where the worst call of a proof that failed parts from torch: module and node."""
        graph, described = proof.worst_graph, self.described
        modules = {each.name: each.module for each in step_graphs(self.networks, described.image, described.latent)}
        entry = described.graphs[graph]
        model = join_weights(self.files[entry.file], self.files[entry.weights], entry.weights)
        return first_difference(modules[graph], model, described, graph, proof.worst_calls[graph][0].inputs)
