"""The same networks in torch, as runners of ul-bench.

torch          eager, behind the project's own loop
torch-compile  compiled by inductor with frozen weights, for each batch size anew, behind the same loop
torch-loop     eager, and the loop that a user of the networks would write: another implementation, on purpose
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ul_export.bench.measure import Runner, pipeline_runner
from ul_export.onnx_graphs import OPSETS
from ul_runtime.bundle import Bundle
from ul_runtime.errors import UsageError
from ul_runtime.manifest import BundleInfo
from ul_runtime.pipeline import table_between
from ul_runtime.progress import Tick, silent
from ul_runtime.samplers import ALPHA, B_0, B_1, B_2, LOGSNR, SIGMA, A, S
from ul_runtime.settings import Overrides, Settings, resolve_settings
from ul_train.run import Run
from ul_train.torch_backend import TorchBackend, fix_threads, in_precision

# Prints the start-up of a runner in a process of its own, without a bundle; takes the run, its name and threads.
LOAD = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from ul_export.bench.measure import print_seconds
from ul_export.bench.peers import TorchRun
from ul_runtime.progress import silent
run, name, threads = sys.argv[1:]
def load():
    runner = TorchRun.load(Path(run), int(threads)).runner(name, {})
    return lambda: runner.generate(1, silent)
print_seconds(started, load)
"""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TorchRun:
    """The networks of a run, and what a bundle of them says."""

    path: Path
    info: BundleInfo
    networks: dict[str, nn.Module]

    @classmethod
    def load(cls, run: Path, threads: int) -> "TorchRun":
        """The finished run at `run`, with torch on so many threads. BadInputError."""
        fix_threads(threads)
        trained = Run.open(run).finished()
        return cls(run, trained.manifest(OPSETS[-1]), trained.networks)

    def check_same(self, bundle: Bundle) -> None:
        """UsageError unless the bundle is of this run, at this step."""
        ours, its = self.info.provenance, bundle.manifest.provenance
        for field in ("run_id", "config_sha256", "data_fingerprint", "step", "weights"):
            if getattr(ours, field) != getattr(its, field):
                message = f"its {field} is {getattr(ours, field)}, the bundle's {getattr(its, field)}"
                advice = "give the run that was exported"
                raise UsageError(f"{self.path}: is not the run of {bundle.path}: {message}; {advice}")

    def runner(self, name: str, overrides: Overrides) -> Runner:
        """One of TORCH_PEERS."""
        precision = "bf16" if name.endswith("-bf16") else "fp32"
        networks = {key: in_precision(network, precision) for key, network in self.networks.items()}
        settings = resolve_settings(self.info, overrides, can_guide=bool(self.info.classes))
        students = settings.prior.student, settings.decoder.student
        if name.startswith("torch-loop"):
            prior, decoder = (networks[each or own] for each, own in zip(students, ("prior", "decoder"), strict=True))
            loop = UserLoop(self.info, settings, prior, decoder, precision)
            return Runner(name, precision, None, loop.images)
        backend = TorchBackend(networks, _CPU, precision)
        if name.startswith("torch-compile"):
            torch.compiler.reset()  # the shapes of the batch size before; beyond a few, torch silently runs eagerly
            for key in (each or own for each, own in zip(students, ("prior_step", "decoder_step"), strict=True)):
                compiled = torch.compile(backend.graphs[key], dynamic=False, options={"freezing": True})
                backend.graphs[key] = cast(nn.Module, compiled)
        return pipeline_runner(name, self.info, backend, overrides)


@dataclass(frozen=True)
class UserLoop:
    """Sampling as one writes it by hand: torch's random numbers, one batch, the step inlined, all in torch tensors."""

    info: BundleInfo
    settings: Settings
    prior: nn.Module
    decoder: nn.Module
    precision: str
    device: torch.device = _CPU

    @torch.inference_mode()
    def images(self, batch: int, tick: Tick = silent) -> np.ndarray:
        """uint8 `b h w c`."""
        latent, image, num_classes = self.info.latent, self.info.image, len(self.info.classes)
        label = torch.arange(batch, device=self.device) % max(1, num_classes)
        no_label = torch.full_like(label, num_classes)
        low, high = self.settings.guidance_interval or (-np.inf, np.inf)
        w = self.settings.guidance

        def prior(z: Tensor, logsnr: float) -> Tensor:
            if w == 1.0 or not low <= logsnr <= high:
                return self.prior(z, torch.full((batch,), logsnr, device=self.device), label)
            both = torch.full((2 * batch,), logsnr, device=self.device)
            v, v_0 = self.prior(torch.cat([z, z]), both, torch.cat([label, no_label])).chunk(2)
            return w * v + (1.0 - w) * v_0

        def decoder(x: Tensor, logsnr: float) -> Tensor:
            return self.decoder(x, torch.full((batch,), logsnr, device=self.device), z_0)

        z = torch.randn(batch, latent.channels, latent.size, latent.size, device=self.device)
        x = torch.randn(batch, image.channels, image.size, image.size, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            z_0 = _sample(prior, table_between(self.settings.prior, self.info.logsnr_z, ends_clean=False), z, tick)
            table = table_between(self.settings.decoder, self.info.logsnr_x, ends_clean=True)
            x = _sample(decoder, table, x, tick)
        return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _sample(predict_v: Callable[[Tensor, float], Tensor], table: np.ndarray, state: Tensor, tick: Tick) -> Tensor:
    """The state after all steps of the table."""
    earlier = [torch.zeros_like(state)] * 2
    for row in table.astype(np.float32).tolist():
        tick(0)
        pred = row[ALPHA] * state - row[SIGMA] * predict_v(state, row[LOGSNR]).float()
        state = row[A] * state + row[B_0] * pred + row[B_1] * earlier[0]
        if row[B_2]:
            state = state + row[B_2] * earlier[1]
        if row[S]:
            state = state + row[S] * torch.randn_like(state)
        earlier = [pred, earlier[0]]
    return state
