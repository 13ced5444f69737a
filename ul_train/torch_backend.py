"""A run sampled by torch as it is, without an export: on an NVIDIA GPU each step is captured once and replayed."""

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ul_runtime.backends import PRECISIONS, Backend, HostBackend, check_threads, run_failed
from ul_runtime.backends.gpu import CudaMemory, Memory, no_collection
from ul_runtime.backends.gpu_loop import DeviceBackend, DeviceLoop, Dims, Engine
from ul_runtime.errors import OutOfMemoryError, ULError, UsageError, is_out_of_memory, one_line
from ul_runtime.machine import MachineOptions
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.pipeline import Pipeline
from ul_runtime.threads import free_threads
from ul_train.model import weights_sha256
from ul_train.run import Run
from ul_train.step_graphs import DecoderStep, Pixels, PriorStep


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; UsageError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}; expected auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


_fixed_threads: int | None = None


def fix_threads(count: int | None) -> None:
    """Torch computes on so many threads in this process; None: on as many as cores are free. UsageError."""
    global _fixed_threads
    check_threads(count)
    _fixed_threads = count
    follow_load()


def follow_load() -> int:
    """Called now and again in long work: torch computes on as many threads as cores are free. Returns how many."""
    count = _fixed_threads or free_threads()
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the device computes it natively, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))  # elsewhere it is emulated, and slower
    return "bf16" if native else "fp32"


class Moments(nn.Module):
    """An encoder's mean and log of the variance, as a graph."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder.moments(x)  # type: ignore[operator]
        return mean, log_variance


_STEPS: dict[str, tuple[type[PriorStep] | type[DecoderStep], tuple[str, ...]]] = {
    "prior": (PriorStep, ("z_next", "pred", "history_next")),
    "decoder": (DecoderStep, ("x_next", "pred", "history_next")),
}


class TorchBackend(HostBackend):
    """Runs the graphs of ul_runtime.pipeline with torch networks: numpy float32 in and out.

    `prior` is whichever prior is asked about: the base to sample, the prior of stage 1 to measure bits.
    """

    name = "torch"
    threads: int | None = None  # how many where an image has to be made again to the byte; None: as cores are free

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        device: torch.device,
        precision: str = "fp32",
        likely_batch: int | None = None,
    ) -> None:
        """`networks`: encoder, prior and decoder, and students by their names, such as prior-4."""
        self.device, self.precision, self.likely_batch = device, precision, likely_batch
        encoder = networks["encoder"]
        self.graphs: dict[str, nn.Module] = {"encoder": encoder, "pixels": Pixels()}
        self.outputs: dict[str, tuple[str, ...]] = {"encoder": ("z_clean",), "pixels": ("images", "sum")}
        for name, network in networks.items():
            if name == "encoder":
                continue
            kind, outputs = _STEPS[name.partition("-")[0]]  # of a student too
            graph = name if "-" in name else f"{name}_step"
            self.graphs[graph], self.outputs[graph] = kind(network), outputs
        if getattr(encoder, "learned_variance", False):  # what no bundle has: it encodes by the mean
            self.graphs["moments"] = Moments(encoder)
            self.outputs["moments"] = ("z_clean", "log_variance")

    @torch.inference_mode()
    def run(self, graph_name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of a graph by name; networks run in evaluation mode."""
        if self.threads is None:
            follow_load()
        graph = self.graphs[graph_name]
        if was_training := graph.training:
            graph.eval()
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(value)).to(self.device) for name, value in inputs.items()
        }
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                results = graph(**tensors)
        except (RuntimeError, MemoryError) as error:
            raise run_failed("torch", graph_name, inputs, error) from error
        if was_training:
            graph.train()
        results = results if isinstance(results, tuple) else (results,)
        return {
            name: (value.float() if value.is_floating_point() else value).cpu().numpy()
            for name, value in zip(self.outputs[graph_name], results, strict=True)
        }


def in_precision(network: nn.Module, precision: str) -> nn.Module:
    """The network, or a copy with weights in bfloat16, which autocast would otherwise convert in every call."""
    if precision == "fp32":
        return network
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
    return network


_LOG = logging.getLogger(__name__)


class TorchMemory(CudaMemory):
    """A GPU's memory in which torch works: within `ordered` in this memory's order, and captured by torch itself.

    So that what torch allocates in a capture lies in a pool that nothing else takes from.
    """

    def __init__(self, device: int = 0) -> None:
        """UsageError: torch finds no such GPU, or cuda-core is not installed."""
        try:
            torch.empty(1, device=f"cuda:{device}")
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device cuda:{device} cannot be used: {one_line(error)}; see ul-doctor") from error
        super().__init__(device)
        self._torch_stream = torch.cuda.ExternalStream(self.stream, f"cuda:{device}")
        self._torch_pool: Any = None

    def ordered(self) -> AbstractContextManager[object]:
        """Within it, torch's work is in this memory's order."""
        return torch.cuda.stream(self._torch_stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Memory. ULError: something that `work` does cannot be captured."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.number)
        if self._torch_pool is None:
            self._torch_pool = torch.cuda.graph_pool_handle()
        try:
            with no_collection(), torch.cuda.graph(graph, self._torch_pool, self._torch_stream, "thread_local"):
                work()
        except RuntimeError as error:
            if isinstance(error.__context__, OutOfMemoryError):  # of the work; what is told is that the capture ended
                raise error.__context__ from error
            raise ULError(f"torch cannot capture a step: {one_line(error)}") from error
        finally:
            torch.cuda.set_stream(current)  # which an end of capture that fails leaves as it is

        def replay() -> None:
            with self.ordered():
                graph.replay()

        return replay


class TorchDeviceBackend(DeviceBackend):
    """Torch networks behind the loop that stays on a device."""

    name = "torch"
    threads = None

    def __init__(
        self,
        networks: dict[str, nn.Module],
        described: BundleInfo,
        memory: Memory,
        *,
        precision: str = "fp32",
        require_graphs: bool = False,
    ) -> None:
        """`networks`: encoder, prior (the base), decoder; they go to the device of `memory`."""
        self._memory, self._graphs, self.precision = memory, described.all_graphs, precision
        on_gpu = isinstance(memory, TorchMemory)
        device = torch.device("cuda", memory.number) if on_gpu else torch.device("cpu")
        self._modules = torch_backend(networks, device, precision)
        self.loop = DeviceLoop(memory, self._graphs, self._bind, captures=on_gpu, require_graphs=require_graphs)

    def _bind(self, graph: GraphName, dims: Dims, addresses: dict[str, int]) -> Engine:
        entry = self._graphs[graph]
        tensors = {}
        for tensor in (*entry.inputs, *entry.outputs):
            shape = [d if isinstance(d, int) else dims[d] for d in tensor.shape]
            kind = getattr(torch, tensor.dtype)
            there = self._memory.array(addresses[tensor.name], int(np.prod(shape)) * kind.itemsize)
            tensors[tensor.name] = torch.from_dlpack(there).view(kind).view(shape)
        inputs = {tensor.name: tensors[tensor.name] for tensor in entry.inputs}
        outputs = [tensors[name] for name in self._modules.outputs[graph]]
        module = self._modules.graphs[graph]
        return _BoundModule(module, inputs, outputs, self._memory, self.precision)


def torch_backend(networks: dict[str, nn.Module], device: torch.device, precision: str) -> TorchBackend:
    """The networks of a run (encoder, prior, decoder, students) on a device, in evaluation mode and that precision."""
    there = {name: in_precision(network.eval(), precision).to(device) for name, network in networks.items()}
    threads = torch.get_num_threads() if device.type == "cpu" else None
    backend = TorchBackend(there, device, precision)
    backend.threads = threads  # the bytes of an image depend on it
    return backend


@dataclass(frozen=True)
class _BoundModule:
    """A step graph as a torch module, with its tensors."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    memory: Memory
    precision: str

    @torch.inference_mode()
    def enqueue(self) -> None:
        """See Engine."""
        torch_memory = self.memory if isinstance(self.memory, TorchMemory) else None
        kind, ordered = ("cpu", nullcontext()) if torch_memory is None else ("cuda", torch_memory.ordered())
        try:
            with ordered, torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16"):
                made = self.module(**self.inputs)
                for output, result in zip(self.outputs, made if isinstance(made, tuple) else (made,), strict=True):
                    output.copy_(result)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"GPU {self.memory.number} has no memory left for this batch") from error
            raise ULError(f"torch cannot run a step: {one_line(error)}") from error


def check() -> str:
    """Multiply two matrices on the device that torch takes by itself, "cuda" or "cpu". ULError: it fails, is wrong."""
    where = choose_device("auto")
    a, b = np.random.default_rng(0).standard_normal((2, 8, 8), np.float32)
    try:
        product = torch.matmul(torch.from_numpy(a).to(where), torch.from_numpy(b).to(where)).cpu().numpy()
    except RuntimeError as error:  # for example without kernels for the GPU
        raise ULError(f"fails on {where.type}: {one_line(error)}") from error
    if not np.allclose(product, a @ b, atol=1e-2):  # TF32 is right
        raise ULError(f"a product of two matrices on {where.type} is wrong")
    return where.type


def open_run(run: Path, options: MachineOptions, guide: Path | None) -> Pipeline:
    """The pipeline over a run and, for autoguidance, another: on the GPU that is named, or the first if there is one.

    BadInputError: no run, or a stage is missing. UsageError: no such GPU or precision.
    """
    pipeline = _open_run(run, options, None if guide is None else _open_run(guide, options, None))
    if (computed := pipeline.backend.precision) != "fp32":
        _LOG.info("backend torch: computes in %s", computed)
    return pipeline


def _open_run(run: Path, options: MachineOptions, guide: Pipeline | None) -> Pipeline:
    precision, threads = options.precision, options.threads
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"backend torch computes in {' or '.join(PRECISIONS)}, not {precision!r}")
    on_gpu = options.devices is not None or (threads is None and torch.cuda.is_available())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    if options.require_graphs and not on_gpu:
        raise UsageError("--require-graphs: torch finds no NVIDIA GPU, and a CPU has no CUDA graphs")
    # the work of a guide is in one order with that of the run
    beside = guide.backend.loop.memory if guide and isinstance(guide.backend, TorchDeviceBackend) else None
    memory = (beside or TorchMemory(options.gpu)) if on_gpu else None
    trained = Run.open(run).finished()
    described, networks = trained.manifest(), trained.networks
    sums = "".join(weights_sha256(network) for _, network in sorted(networks.items()))
    digest = hashlib.sha256((described.model_dump_json() + sums).encode()).hexdigest()

    def backend(precision: str) -> Backend:
        if memory is None:
            fix_threads(threads or free_threads())
            return torch_backend(networks, torch.device("cpu"), precision)
        required = options.require_graphs
        return TorchDeviceBackend(networks, described, memory, precision=precision, require_graphs=required)

    exact = None if precision in (None, "fp32") else lambda: backend("fp32")
    return Pipeline(described, backend(precision or "fp32"), guide, exact, path=run, hash=digest)


def torch_pipeline(
    info: BundleInfo, networks: Mapping[str, nn.Module], device: torch.device, precision: str
) -> Pipeline:
    """The runtime's own pipeline over torch networks: encoder, prior, decoder and the students that `info` has.

    `prior` is the base, or the prior of stage joint for its bits.
    """
    likely_batch = min(64, max(1, 2**16 // info.image.size**2))  # a GPU gains from more than a CPU does
    return Pipeline(info, TorchBackend(networks, device, precision, likely_batch))
