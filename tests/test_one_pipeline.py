"""One pipeline in several threads: every backend makes each call's images as if it were called alone.

The backends for GPUs run here in the host's memory, over ONNX Runtime's CPU and torch; TensorRT's loop is the same.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
import pytest
import torch
from host_memory import HostMemory

from ul_runtime.backends.openvino import OpenVinoBackend
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.backends.ort_cuda import OrtDeviceBackend
from ul_runtime.bundle import Bundle
from ul_runtime.manifest import GraphName
from ul_runtime.pipeline import Pipeline
from ul_train.config import load_config
from ul_train.model import make_base, make_decoder, make_encoder
from ul_train.run import Run
from ul_train.torch_backend import TorchDeviceBackend, torch_pipeline

FAST: dict[str, Any] = {"steps": 2, "decoder_steps": 2, "batch_size": 2}
THREADS = 4


def over(backend: Callable[[Bundle], Any]) -> Callable[[Path], Pipeline]:
    def open_(path: Path) -> Pipeline:
        bundle = Bundle.open(path)
        return Pipeline(bundle.manifest, backend(bundle))

    return open_


def in_torch(on_device: bool) -> Callable[[Path], Pipeline]:
    def open_(path: Path) -> Pipeline:
        torch.manual_seed(0)
        config = load_config("tiny", [])
        encoder, prior, decoder = make_encoder(config), make_base(config, 3), make_decoder(config)
        for network in (encoder, prior, decoder):
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        info = Run.in_memory(config, ("a", "b", "c")).manifest()
        if not on_device:
            return torch_pipeline(
                info, {"encoder": encoder, "prior": prior, "decoder": decoder}, torch.device("cpu"), "fp32"
            )
        networks: dict[str, torch.nn.Module] = {"encoder": encoder, "prior": prior, "decoder": decoder}
        return Pipeline(info, TorchDeviceBackend(networks, info, HostMemory()))

    return open_


OPEN: dict[str, Callable[[Path], Pipeline]] = {
    "ort-cpu": over(lambda bundle: OrtCpuBackend(bundle, threads=1)),
    "openvino": over(lambda bundle: OpenVinoBackend(bundle, "fp32", threads=1)),
    "ort-cuda": over(lambda bundle: OrtDeviceBackend(bundle, HostMemory(), ["CPUExecutionProvider"])),
    "torch": in_torch(on_device=False),
    "torch on a GPU": in_torch(on_device=True),
}


def made(pipeline: Pipeline, seed: int) -> bytes:
    """All that a pipeline computes: images, their latents, the bits of these, and images again."""
    (batch,) = pipeline.generate(2, seed=seed, **FAST)
    encoded = pipeline.encode(batch.x)
    bits = pipeline.bits(encoded.z_clean, num_samples=2)
    (decoded,) = pipeline.decode(encoded.z_0, decoder_steps=2)
    return b"".join(np.ascontiguousarray(a).tobytes() for a in (batch.x, encoded.z_clean, bits, decoded.x))


def differing(pipeline: Pipeline, calls: int = 12) -> int:
    """How many calls make something else when they are made at once."""
    alone = [made(pipeline, seed) for seed in range(calls)]
    assert len(set(alone)) == calls
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda seed: made(pipeline, seed), range(calls)))
    return sum(a != b for a, b in zip(alone, together, strict=True))


@pytest.mark.case(
    "A1",
    "several threads call one pipeline, on each backend",
    "each gets the images that it would get alone; a lock or a request of its own keeps calls apart",
)
@pytest.mark.parametrize("name", OPEN)
def test_calls_at_once_make_what_each_makes_alone(analytic_bundle: Path, name: str) -> None:
    assert differing(OPEN[name](analytic_bundle)) == 0


class Shared(OrtCpuBackend):
    """Keeps the inputs of a call where the next call puts its own, as an engine does that is bound to memory."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, threads=1)
        self.meeting = Barrier(2)
        self.held: dict[str, dict[str, np.ndarray]] = {}

    def run(self, graph_name: GraphName, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.held[graph_name] = inputs
        with suppress(BrokenBarrierError):  # of a call that is alone
            self.meeting.wait(0.02)
        self.meeting.reset()
        return super().run(graph_name, self.held[graph_name])


def test_the_check_finds_a_backend_that_keeps_calls_in_one_place(analytic_bundle: Path) -> None:
    bundle = Bundle.open(analytic_bundle)
    assert differing(Pipeline(bundle.manifest, Shared(bundle)), calls=3) > 0
