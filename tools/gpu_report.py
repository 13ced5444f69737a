#!/usr/bin/env python
"""What an NVIDIA GPU makes of the sampling path: its own ceilings, then every way to run it, one after the other.

    python tools/gpu_report.py --out tools/results/gpu

Models are the networks of a preset with weights of no meaning (imagenet-512: base and decoder of the paper's sizes),
which is enough for speed and for nothing else, and bundles. Torch computes in bfloat16 with weights stored in it, ONNX
Runtime and TensorRT in float16 by graphs that were lowered and not proved, with "-attention" such as have attention as
one operator (opset 23). Figures are written after each contender; what there is no time left for, and what does not
run, is in the report with its reason.
"""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ul_runtime.cli.command import run_command
from ul_runtime.errors import ULError, UsageError
from ul_runtime.install import require_packages
from ul_runtime.machine import anonymous, commit, versions
from ul_runtime.settings import parse_counts

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ul_runtime.backends.gpu_loop import DeviceLoop
    from ul_runtime.manifest import BundleInfo

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PACKAGES = ("unified-latents", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13")
OPSET, WITH_ATTENTION = 20, 23
TORCH = ("torch-eager", "torch-compile", "torch-graphs", "torch-no-graphs")
ENGINES = ("ort-cuda-attention", "ort-cuda", "tensorrt-attention", "tensorrt", "tensorrt-no-graphs")
CONTENDERS = ("torch-eager", "torch-graphs", "torch-no-graphs", *ENGINES, "torch-compile")  # what takes longest, last
_STEPS_TIMED = 20
_CEILING_S = 0.5


@dataclass
class Model:
    """What is sampled: networks for torch, bundles for engines by opset (0: one that was there). FLOPs an image."""

    name: str
    info: "BundleInfo"
    flops: int
    networks: "dict[str, nn.Module] | None" = None
    bundles: dict[int, Path] = field(default_factory=dict)


@dataclass
class Made:
    """A contender that is ready: `images(n)` makes one batch, `loop` is the loop on the device, if it is ours."""

    precision: str
    images: Callable[[int], "np.ndarray"]
    loop: "DeviceLoop | None" = None


@app.command()
def gpu_report(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where gpu.json and gpu.md go.")],
    models: Annotated[
        str, typer.Option(metavar="NAME,...", help="Presets, and bundles by path or shipped name.")
    ] = "imagenet-512,garments-32",
    contenders: Annotated[str, typer.Option(metavar="NAME,...", help="Ways to run them.")] = ",".join(CONTENDERS),
    batch_sizes: Annotated[str, typer.Option(metavar="N,...", help="Largest first is best.")] = "64,8,1",
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Batches timed after the first.")] = 3,
    minutes: Annotated[float, typer.Option(metavar="N", help="No contender is begun after so many.")] = 8.5,
    device: Annotated[str, typer.Option(metavar="cuda|cpu", help="cpu: to try the tool.")] = "cuda",
) -> None:
    """Measure, and write the report as JSON and as a table."""
    names = contenders.split(",")
    if unknown := set(names) - set(CONTENDERS):
        raise UsageError(f"--contenders {', '.join(sorted(unknown))}: expected some of {', '.join(CONTENDERS)}")
    sizes = parse_counts("--batch-sizes", batch_sizes)
    require_packages("torch", "onnx", extras="train,export")
    import torch

    from ul_runtime.files import durable

    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no NVIDIA GPU here; --device cpu tries the tool without one")
    durable.make_directory(out)
    deadline = time.monotonic() + 60 * minutes
    report: dict[str, Any] = {
        "command": anonymous("python tools/gpu_report.py", sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(where) if device == "cuda" else "none: this run only tries the tool",
        "ceilings": ceilings(where),
        "versions": versions(PACKAGES) | {"cuda": torch.version.cuda or "none"},
        "commit": commit(),
        "rows": [],
    }

    def note(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        durable.atomic_write(out / "gpu.json", (json.dumps(report, indent=1) + "\n").encode())
        durable.atomic_write(out / "gpu.md", table(report).encode())
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name in models.split(","):
            model = open_model(name, Path(folder), names)
            for contender in names:
                for row in measure(model, contender, sizes, repeats, where, deadline):
                    note({"model": model.name, "contender": contender, **row})
    print(table(report))
    if not any("failed" not in row for row in report["rows"]):
        raise ULError(f"nothing could be measured; {out / 'gpu.md'} says why")


def ceilings(device: Any) -> dict[str, float]:
    """Best of many products of large matrices in each precision, TFLOP/s; and of copies within memory, GB/s."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    size = 8192 if device.type == "cuda" else 256
    found = {}
    for name, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
        found[f"{name}_tflops_per_s"] = 2e-12 * size**3 / _best_s(lambda a=a, b=b: a @ b, device)
    source = torch.empty(2**30 if device.type == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2e-9 * source.numel() / _best_s(lambda: target.copy_(source), device)
    return found


def _best_s(work: Callable[[], object], device: Any) -> float:
    best, ends = float("inf"), time.perf_counter() + _CEILING_S
    while time.perf_counter() < ends:
        best = min(best, seconds_of(work, device, 10))
    return best


def seconds_of(work: Callable[[], object], device: Any, times: int) -> float:
    """Mean of `times` calls enqueued one after the other, waited for once."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def open_model(name: str, folder: Path, contenders: Sequence[str]) -> Model:
    """A bundle, or a preset with random weights: networks, and a bundle in float16 if an engine is to run it."""
    from ul_export.bench.measure import work_of_an_image
    from ul_runtime.loading import open_bundle, shipped_names
    from ul_runtime.settings import Overrides

    if name in shipped_names() or Path(name).is_dir():
        bundle = open_bundle(name)
        flops = work_of_an_image(bundle, 2, Overrides()).image_flops
        return Model(bundle.manifest.name, bundle.manifest, flops, bundles={0: bundle.path})
    import torch

    from ul_train.account import account
    from ul_train.config import load_config
    from ul_train.model import make_base, make_decoder, make_encoder, randomise
    from ul_train.run import Run

    config, classes = load_config(name, []), tuple(f"class {n}" for n in range(10))
    torch.manual_seed(0)
    made = {"encoder": make_encoder(config), "prior": make_base(config, len(classes)), "decoder": make_decoder(config)}
    networks = {key: randomise(network, seed).eval() for seed, (key, network) in enumerate(made.items())}
    info = Run.in_memory(config, classes).manifest(OPSET)
    flops = account(config, len(classes))["sampling"]["flops_per_image"]
    opsets = dict.fromkeys(opset_of(contender) for contender in contenders if contender in ENGINES)
    bundles = {opset: float16_bundle(info, networks, opset, folder / f"{name}-{opset}") for opset in opsets}
    return Model(name, info, flops, networks, bundles)


def opset_of(contender: str) -> int:
    """Of the graphs that an engine runs."""
    return WITH_ATTENTION if contender.endswith("-attention") else OPSET


def float16_bundle(info: "BundleInfo", networks: "dict[str, nn.Module]", opset: int, path: Path) -> Path:
    """The networks in float16 wherever ul-export would try it first: for speed, not proved."""
    from ul_export.onnx_graphs import export_graphs
    from ul_export.onnx_model import split_weights
    from ul_export.precision.lower import FP16
    from ul_export.precision.reduce import with_their_weights
    from ul_runtime.bundle import write_bundle

    files = export_graphs(networks, info, opset)
    graphs = {name: entry.model_copy(update={"opset": opset}) for name, entry in info.graphs.items()}
    for name, model in with_their_weights(info, files).items():
        entry = graphs[name]
        lowered = FP16.lowered(model, FP16.nodes(model, ()), {})
        files[entry.file], files[entry.weights] = split_weights(lowered, entry.weights)
        graphs[name] = entry.model_copy(update={"precision": "fp16"})
    write_bundle(path, info.model_copy(update={"graphs": graphs}), files)
    return path


def measure(
    model: Model, contender: str, sizes: Sequence[int], repeats: int, device: Any, deadline: float
) -> list[dict[str, Any]]:
    """A row for each batch size: images/s, ms of each step, share of the ceiling, what the host adds; or why not."""
    import torch

    rows: list[dict[str, Any]] = []
    made = None
    for batch in sizes:
        if time.monotonic() > deadline:
            rows.append({"batch_size": batch, "skipped": "no time left"})
            continue
        try:
            made = made or make(model, contender, device)
            rows.append({"batch_size": batch, **_measured(model, made, batch, repeats, device)})
        except (ULError, RuntimeError) as error:  # of torch and its compiler
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows.append({"batch_size": batch, "failed": why})
            if made is None:
                break
    if made is not None and made.loop is not None:
        made.loop.release()
    del made
    gc.collect()  # weights of engines, and what torch keeps for later, are not to be in the next one's way
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _measured(model: Model, made: Made, batch: int, repeats: int, device: Any) -> dict[str, Any]:
    first = seconds_of(lambda: made.images(batch), device, 1)
    made.images(batch)  # a step is captured in its second run
    times = [seconds_of(lambda: made.images(batch), device, 1) for _ in range(repeats)]
    seconds = median(times)
    row = {
        "precision": made.precision,
        "images_per_s": batch / seconds,
        "seconds": times,
        "first_s": first,
        "tflops_per_s": 1e-12 * model.flops * batch / seconds,
    }
    if made.loop is None:
        return row
    ms, in_steps = {}, 0.0
    for (graph, state, branches, bucket), bound in made.loop.bound.items():
        if state is None or bucket < batch or bucket >= 2 * batch:
            continue
        name = graph if branches < 2 else f"guided_{graph}"
        ms[name] = 1e3 * seconds_of(bound.step, device, _STEPS_TIMED)
        in_steps += 1e-3 * ms[name] * calls(model.info, name)
    return row | {
        "ms": ms,
        "host_gap": 1.0 - in_steps / seconds,
        "captured": made.loop.captured,
    }


def calls(info: "BundleInfo", step: str) -> int:
    """How often a step is called for an image by the bundle's default settings."""
    import numpy as np

    from ul_runtime.pipeline import table_between
    from ul_runtime.samplers import LOGSNR
    from ul_runtime.settings import Overrides, resolve_settings

    settings = resolve_settings(info, Overrides(), can_guide=bool(info.classes))
    if step == "decoder_step":
        return len(table_between(settings.decoder, info.logsnr_x, ends_clean=True))
    table = table_between(settings.prior, info.logsnr_z, ends_clean=False).astype(np.float32)
    low, high = settings.guidance_interval or (-np.inf, np.inf)
    inside = (table[:, LOGSNR] >= low) & (table[:, LOGSNR] <= high) & (settings.guidance != 1.0)
    return int(inside.sum() if step.startswith("guided") else (~inside).sum())


def make(model: Model, contender: str, device: Any) -> Made:
    """The contender over the model. ULError: it cannot be on this machine."""
    if contender in TORCH:
        if model.networks is None:
            raise UsageError("a bundle has no torch networks")
        return _by_torch(model, contender, device)
    path = model.bundles.get(opset_of(contender)) or model.bundles.get(0)
    if path is None or (0 in model.bundles and contender.endswith("-attention")):
        raise UsageError("there is no bundle of that opset")
    from ul_runtime.backends.choose import open_on_gpu
    from ul_runtime.bundle import Bundle
    from ul_runtime.machine import MachineOptions
    from ul_runtime.pipeline import Pipeline

    bundle = Bundle.open(path, allow_hard_links=True)
    name = contender.removesuffix("-no-graphs").removesuffix("-attention")
    backend: Any = open_on_gpu(bundle, MachineOptions(name))
    if contender.endswith("-no-graphs"):
        backend.loop.captures = False
    return Made(backend.precision, _images(Pipeline(bundle.manifest, backend)), backend.loop)


def _by_torch(model: Model, contender: str, device: Any) -> Made:
    import torch

    from ul_export.bench.peers import UserLoop
    from ul_runtime.pipeline import Pipeline
    from ul_runtime.settings import Overrides, resolve_settings
    from ul_train.torch_backend import TorchDeviceBackend, in_precision, torch_backend

    assert model.networks is not None
    if contender in ("torch-graphs", "torch-no-graphs"):
        memory = memory_on(device)
        if memory is None:
            return Made("bf16", _images(Pipeline(model.info, torch_backend(model.networks, device, "bf16"))))
        backend = TorchDeviceBackend(model.networks, model.info, memory, precision="bf16")
        backend.loop.captures &= contender == "torch-graphs"
        return Made("bf16", _images(Pipeline(model.info, backend)), backend.loop)
    networks = {key: in_precision(network, "bf16").to(device) for key, network in model.networks.items()}
    settings = resolve_settings(model.info, Overrides(), can_guide=bool(model.info.classes))
    if contender == "torch-compile":
        torch.compiler.reset()
        networks = {
            key: torch.compile(network, mode="max-autotune", dynamic=False) for key, network in networks.items()
        }
    loop = UserLoop(model.info, settings, networks["prior"], networks["decoder"], "bf16", device)
    return Made("bf16", loop.images)


def memory_on(device: Any) -> Any:
    """Where the loop on a device works; None on a CPU, where the host runs it."""
    from ul_train.torch_backend import TorchMemory

    return TorchMemory(device.index or 0) if device.type == "cuda" else None


def _images(pipeline: Any) -> Callable[[int], "np.ndarray"]:
    def images(batch: int) -> "np.ndarray":
        made = next(iter(pipeline.generate(batch, batch_size=batch, keep_x=False))).images
        if len(made) != batch:
            raise ULError(
                f"{len(made)} of {batch} images: for want of memory the batch was halved, or some are not finite"
            )
        return made

    return images


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    peaks = {name: report["ceilings"][f"{name}_tflops_per_s"] for name in ("fp16", "bf16", "fp32")}
    found = ", ".join(f"{name} {peak:.4g}" for name, peak in peaks.items())
    copies = report["ceilings"]["copy_gb_per_s"]
    lines = [
        f"{report['gpu']}: best matrix products {found} TFLOP/s, copies {copies:.4g} GB/s",
        "",
        "| model | contender | batch | images/s | TFLOP/s | of the ceiling | ms a step | host adds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        start = f"| {row['model']} | {row['contender']} | {row['batch_size']} |"
        if "images_per_s" not in row:
            lines.append(f"{start} {row.get('failed') or row['skipped']} | | | | |")
            continue
        steps = ", ".join(f"{name.removesuffix('_step')} {ms:.3g}" for name, ms in row.get("ms", {}).items())
        share = f"{100 * row['tflops_per_s'] / peaks[row['precision']]:.3g} %" if row["precision"] in peaks else ""
        gap = f"{100 * row['host_gap']:.2g} %" if "host_gap" in row else ""
        lines.append(f"{start} {row['images_per_s']:.4g} | {row['tflops_per_s']:.4g} | {share} | {steps} | {gap} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Console script."""
    run_command(app, "gpu_report")


if __name__ == "__main__":
    main()
