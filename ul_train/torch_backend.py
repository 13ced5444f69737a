"""A run sampled by torch as it is, without an export: on an NVIDIA GPU each step is captured once and replayed."""

import copy
import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ul_runtime.backends import PRECISIONS, HostBackend, one_line
from ul_runtime.backends.gpu import NoiseKernel, no_collection
from ul_runtime.backends.gpu_loop import DeviceBackend, DeviceLoop, Dims, Engine, graphs_of
from ul_runtime.errors import OutOfMemoryError, ULError, UsageError
from ul_runtime.machine import MachineOptions, has_bindings
from ul_runtime.manifest import BundleInfo
from ul_runtime.noise import quantile_table
from ul_runtime.pipeline import Pipeline
from ul_train.model import weights_sha256
from ul_train.run import Run
from ul_train.step_graphs import DecoderStep, PriorStep


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


class TorchBackend(HostBackend):
    """Runs the graphs of ul_runtime.pipeline with torch networks: numpy float32 in and out.

    `prior` is whichever prior is asked about: the base to sample, the prior of stage 1 to measure bits.
    """

    name = "torch"
    threads = None

    def __init__(
        self,
        encoder: nn.Module,
        prior: nn.Module,
        decoder: nn.Module,
        device: torch.device,
        precision: str = "fp32",
        likely_batch: int | None = None,
    ) -> None:
        self.device, self.precision, self.likely_batch = device, precision, likely_batch
        self.graphs: dict[str, nn.Module] = {
            "encoder": encoder,
            "prior_step": PriorStep(prior),
            "decoder_step": DecoderStep(decoder),
        }
        self.outputs = {
            "encoder": ("z_clean",),
            "prior_step": ("z_next", "pred"),
            "decoder_step": ("x_next", "pred"),
        }
        if getattr(encoder, "learned_variance", False):  # what no bundle has: it encodes by the mean
            self.graphs["moments"] = Moments(encoder)
            self.outputs["moments"] = ("z_clean", "log_variance")

    @torch.inference_mode()
    def run(self, graph_name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of a graph by name; networks run in evaluation mode."""
        graph = self.graphs[graph_name]
        if was_training := graph.training:
            graph.eval()
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(value)).to(self.device) for name, value in inputs.items()
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            results = graph(**tensors)
        if was_training:
            graph.train()
        results = results if isinstance(results, tuple) else (results,)
        return {
            name: value.float().cpu().numpy() for name, value in zip(self.outputs[graph_name], results, strict=True)
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


_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_CHUNK = 2**22  # blocks of four values at a time: the work takes 300 MB at most


def normals(seed: int, indices: Tensor, stream: int, size: int) -> Tensor:
    """Standard normal noise, float32 `[len(indices), size]`, on the device of `indices` (int64)."""
    blocks = -(-size // 4)
    result = torch.empty(len(indices) * blocks, 4, dtype=torch.float32, device=indices.device)
    for start in range(0, len(result), _CHUNK):
        at = torch.arange(start, min(start + _CHUNK, len(result)), device=indices.device)
        row = at // blocks
        result[start : start + len(at)] = _quantiles(_philox(at - row * blocks, stream, indices[row], seed))
    return result.view(len(indices), 4 * blocks)[:, :size]


def _philox(block: Tensor, stream: int, index: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of n counters: words `n 4`, int64."""
    even = [block & _WORD, index & _WORD]
    odd = [torch.full_like(block, stream), (index >> 32) & _WORD]
    key = [seed & _WORD, seed >> 32]
    for _ in range(10):
        products = [word * multiplier for word, multiplier in zip(even, _MULTIPLIERS, strict=True)]
        high = [(product >> 32) & _WORD for product in products]
        even = [high[1] ^ odd[0] ^ key[0], high[0] ^ odd[1] ^ key[1]]
        odd = [products[1] & _WORD, products[0] & _WORD]
        key = [(word + step) & _WORD for word, step in zip(key, _WEYL, strict=True)]
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=1)


def _quantiles(words: Tensor) -> Tensor:
    """See noise.words_to_normals; float64."""
    centred = words.double() - (2.0**31 - 0.5)
    bits = (2.0**31 - centred.abs()).view(torch.int64)
    segment = (bits >> 47) - (1022 << 5)
    offset = ((bits & (2**47 - 1)) | 0x3FF0000000000000).view(torch.float64) - (1.0 + 0.5 / 32)
    table = _table(words.device)
    value = table[3][segment]
    for coefficient in (2, 1, 0):
        value = value.mul_(offset).add_(table[coefficient][segment])
    return value.mul_(centred)


@lru_cache(maxsize=16)
def _table(device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(quantile_table())).to(device)


_LOG = logging.getLogger(__name__)


class TorchMemory:
    """Memory of a torch device, and a stream of its own on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """UsageError: there is no such device."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        self.device, self.kind, self.number = device, device.type, device.index or 0
        self.lock = RLock()
        self._noise: NoiseKernel | None = None
        self._pool: Any = None  # of what captured steps compute on their way
        self._pieces: dict[int, Tensor] = {}
        try:
            torch.empty(1, device=device)
            self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        except (RuntimeError, AssertionError) as error:
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"device {device} cannot be used: {why}; ul-doctor says what works here") from error

    def use(self) -> None:
        """See Memory."""
        if self.stream is not None:
            torch.cuda.set_device(self.device)

    def ordered(self) -> AbstractContextManager[object]:
        """Within it, torch's work is in this memory's order."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def allocate(self, size: int) -> int:
        """See Memory."""
        try:
            piece = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise self._full() from error
        self._pieces[piece.data_ptr()] = piece
        return piece.data_ptr()

    def _full(self) -> OutOfMemoryError:
        return OutOfMemoryError(f"device {self.device} has no memory left; give a smaller --batch-size")

    def free(self, address: int) -> None:
        """See Memory."""
        del self._pieces[address]

    def at(self, address: int, size: int) -> Tensor:
        """The bytes there, uint8."""
        starts = sorted(self._pieces)
        start = starts[bisect_right(starts, address) - 1]
        return self._pieces[start][address - start : address - start + size]

    def upload(self, address: int, array: np.ndarray) -> None:
        """See Memory."""
        with self.ordered():
            self.at(address, array.nbytes).copy_(_bytes(array), non_blocking=True)

    def download(self, address: int, array: np.ndarray) -> None:
        """See Memory."""
        with self.ordered():
            _bytes(array).copy_(self.at(address, array.nbytes), non_blocking=True)

    def copy(self, to: int, source: int, size: int, *, rows: int = 1, to_pitch: int = 0, pitch: int = 0) -> None:
        """See Memory."""
        with self.ordered():
            if rows == 1:
                self.at(to, size).copy_(self.at(source, size))
            else:
                self._rows(to, rows, size, to_pitch).copy_(self._rows(source, rows, size, pitch))

    def _rows(self, address: int, rows: int, size: int, pitch: int) -> Tensor:
        """As float32 where they can be: a GPU copies that four times as fast as bytes."""
        part = self.at(address, (rows - 1) * pitch + size)
        width = 1 if size % 4 or pitch % 4 or part.storage_offset() % 4 else 4
        wide = part if width == 1 else part.view(torch.float32)
        return wide.as_strided((rows, size // width), (pitch // width, 1))

    def clear(self, address: int, size: int) -> None:
        """See Memory."""
        with self.ordered():
            self.at(address, size).zero_()

    def normals(self, to: int, seed: int, indices: int, rows: int, stream: int, size: int) -> None:
        """See Memory. By the kernel for GPUs where NVIDIA's bindings are there, else by torch. OutOfMemoryError."""
        if self.stream is not None and has_bindings():
            if self._noise is None:
                table = torch.from_numpy(np.stack(quantile_table())).to(self.device)
                self._pieces[table.data_ptr()] = table  # as long as this memory
                self._noise = NoiseKernel(table.data_ptr())
            return self._noise.enqueue(to, seed, indices, rows, stream, size, self.stream.cuda_stream)
        try:
            with self.ordered():
                made = normals(seed, self.at(indices, 8 * rows).view(torch.int64), stream, size)
                self.at(to, 4 * rows * size).view(torch.float32).view(rows, size).copy_(made)
        except torch.OutOfMemoryError as error:
            raise self._full() from error

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Memory. ULError: something that `work` does cannot be captured, or this is no GPU."""
        if self.stream is None:
            raise ULError(f"device {self.device} has no CUDA graphs")
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with no_collection(), torch.cuda.graph(graph, self._pool, self.stream, "thread_local"):
                work()
        except RuntimeError as error:
            if isinstance(error.__context__, OutOfMemoryError):  # of the work; what is told is that the capture ended
                raise error.__context__ from error
            raise ULError(f"torch cannot capture a step: {' '.join(str(error).split())[:200]}") from error
        finally:
            torch.cuda.set_stream(current)  # which an end of capture that fails leaves as it is

        def replay() -> None:
            with self.ordered():
                graph.replay()

        return replay

    def wait(self) -> None:
        """See Memory."""
        if self.stream is not None:
            self.stream.synchronize()


def _bytes(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


class TorchDeviceBackend(DeviceBackend):
    """Torch networks behind the loop that stays on a device."""

    name = "torch"

    def __init__(
        self,
        networks: dict[str, nn.Module],
        described: BundleInfo,
        memory: TorchMemory,
        *,
        precision: str = "fp32",
        require_graphs: bool = False,
    ) -> None:
        """`networks`: encoder, prior (the base), decoder; they go to the device of `memory`."""
        self.memory, self._graphs, device = memory, graphs_of(described), memory.device
        on_device = {name: in_precision(network.eval(), precision).to(device) for name, network in networks.items()}
        self._by_name = TorchBackend(on_device["encoder"], on_device["prior"], on_device["decoder"], device, precision)
        self.precision = precision
        self.threads = torch.get_num_threads() if device.type == "cpu" else None
        on_gpu = device.type == "cuda"
        self.loop = DeviceLoop(memory, self._graphs, self._bind, captures=on_gpu, require_graphs=require_graphs)

    def _bind(self, graph: str, dims: Dims, addresses: dict[str, int]) -> Engine:
        entry = self._graphs[graph]
        tensors = {}
        for tensor in (*entry.inputs, *entry.outputs):
            shape = [d if isinstance(d, int) else dims[d] for d in tensor.shape]
            kind = getattr(torch, tensor.dtype)
            size = int(np.prod(shape)) * kind.itemsize
            tensors[tensor.name] = self.memory.at(addresses[tensor.name], size).view(kind).view(shape)
        inputs = {tensor.name: tensors[tensor.name] for tensor in entry.inputs}
        outputs = [tensors[name] for name in self._by_name.outputs.get(graph, ("images", "sum"))]
        module = self._by_name.graphs.get(graph, Pixels())
        return _BoundModule(module, inputs, outputs, self.memory, self.precision)


class Pixels(nn.Module):
    """The graph of ul_runtime.backends.gpu_loop."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(images, sum)."""
        images = x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1), x.abs().sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class _BoundModule:
    """A step graph as a torch module, with its tensors."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    memory: TorchMemory
    precision: str

    @torch.inference_mode()
    def enqueue(self) -> None:
        """See Engine."""
        kind = self.memory.device.type
        try:
            with self.memory.ordered(), torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16"):
                made = self.module(**self.inputs)
                for output, result in zip(self.outputs, made if isinstance(made, tuple) else (made,), strict=True):
                    output.copy_(result)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):  # of cuBLAS and cuDNN
                raise OutOfMemoryError(f"device {self.memory.device} has no memory left for this batch") from error
            raise ULError(f"torch cannot run a step: {' '.join(str(error).split())[:200]}") from error


@dataclass(frozen=True)
class RunModel:
    """What the pipeline asks of a bundle, of a run."""

    path: Path
    manifest: BundleInfo
    hash: str

    @classmethod
    def load(cls, run: Path) -> "tuple[RunModel, dict[str, nn.Module]]":
        """(description, averaged networks) of a run whose base has begun. BadInputError."""
        trained = Run.open(run).finished()
        described, networks = trained.manifest(), trained.networks
        sums = {name: weights_sha256(network) for name, network in sorted(networks.items())}
        digest = hashlib.sha256((described.model_dump_json() + "".join(sums.values())).encode())
        return cls(run, described, digest.hexdigest()), networks


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
    if threads:
        torch.set_num_threads(threads)
    on_gpu = options.devices is not None or (threads is None and torch.cuda.is_available())
    where = torch.device("cuda", options.gpu) if on_gpu else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    if options.require_graphs and not on_gpu:
        raise UsageError("--require-graphs: torch finds no NVIDIA GPU, and a CPU has no CUDA graphs")
    # the work of a guide is in one order with that of the run
    beside = None if guide is None else guide.backend
    memory = beside.memory if isinstance(beside, TorchDeviceBackend) else TorchMemory(where)
    model, networks = RunModel.load(run)

    def backend(precision: str) -> TorchDeviceBackend:
        required = options.require_graphs
        return TorchDeviceBackend(networks, model.manifest, memory, precision=precision, require_graphs=required)

    exact = None if precision in (None, "fp32") else lambda: backend("fp32")
    return Pipeline(model.manifest, backend(precision or "fp32"), guide, exact, path=run, hash=model.hash)


def torch_pipeline(
    info: BundleInfo,
    encoder: nn.Module,
    prior: nn.Module,
    decoder: nn.Module,
    device: torch.device,
    precision: str,
) -> Pipeline:
    """The runtime's own pipeline over torch networks; `prior` is the base, or the prior of stage 1 for its bits."""
    likely_batch = min(64, max(1, 2**16 // info.image.size**2))  # a GPU gains from more than a CPU does
    return Pipeline(info, TorchBackend(encoder, prior, decoder, device, precision, likely_batch))
