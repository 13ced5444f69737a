"""Options of the commands ul-export, ul-eval, ul-tune and ul-bench."""

from dataclasses import dataclass
from pathlib import Path

from ul_runtime.settings import option, threads_option


@dataclass(frozen=True)
class ExportOptions:
    """How a run becomes a bundle."""

    fp16: bool = option(False, "Compute in float16 wherever that holds.")
    bf16: bool = option(False, "Compute in bfloat16 wherever that holds.")
    int8: bool = option(False, "Products and convolutions in int8 wherever that holds.")
    calibrate: str | None = option(
        None, "Images for lower precisions.", metavar="SOURCE", shown="the run's held-out images"
    )
    update: Path | None = option(
        None, "Put RUN's weights into this bundle's graphs, in its precision, and verify them.", metavar="BUNDLE"
    )
    opset: int | None = option(
        None,
        "ONNX opset of the graphs; from 23 on attention is one operator.",
        metavar="18|20|22|23",
        shown="20; --bf16: 22",
    )
    weights: str = option("fp32", "How weights are stored where graphs compute in float32.", metavar="fp32|fp16")
    threads: int | None = threads_option()
    cache: Path | None = option(None, "Prepared images.", metavar="DIR", shown="$UL_CACHE or the user's cache")
    overwrite: bool = option(False, "Replace a bundle at --out.")


@dataclass(frozen=True)
class EngineOptions:
    """TensorRT engines that are built ahead of their first use."""

    tensorrt: bool = option(False, "Build TensorRT engines too; RUN may be a finished bundle, then only these.")
    target: list[str] = option(
        [], "Build for this architecture (sm89); repeatable.", metavar="SM", shown="this machine's GPU"
    )
    max_batch: int = option(64, "Largest batch that the engines take.", metavar="IMAGES")
    refittable: bool = option(False, "Engines that take newer weights in seconds; may run slower.")
    engines: Path | None = option(
        None, "Where engines are kept: a folder of your own.", metavar="DIR", shown="the user's cache"
    )


@dataclass(frozen=True)
class EvalOptions:
    """Of ul-eval: `images` samples a seed stand against as many real images."""

    data: str = option(..., "Real images, as given to ul-train.", metavar="SOURCE")
    heldout: str | None = option(None, "Held-out images.", metavar="SOURCE", shown="the source's own, or 5 %")
    out: Path | None = option(None, "Folder for eval.json, report.html and images.", metavar="DIR")
    images: int = option(1000, "Samples a seed, and real images beside them.", metavar="COUNT")
    seeds: int = option(3, "Repetitions, for the spread.", metavar="COUNT")
    seed: int = option(0, "The first of the seeds.", metavar="INT")
    features: list[str] = option(
        [],
        "efficientnet-lite0 (ImageNet), classifier, pixels, or an ONNX file: x b c h w in [-1, 1] -> b d. "
        "Repeat it for several; the first one finds neighbours.",
        metavar="NAME|FILE.onnx",
        shown="classifier for grey images with classes, else efficientnet-lite0; and pixels",
    )
    classifier: Path | None = option(
        None, "Keeps the classifier: trained on --data if it is not there.", metavar="FILE.safetensors"
    )
    classifier_steps: int = option(1500, "Its training steps, of 64 images.", metavar="COUNT")
    train_images: int | None = option(None, "Training images searched for neighbours.", metavar="COUNT", shown="all")
    bits_samples: int = option(16, "Noise levels an image for its bits.", metavar="COUNT")
    cache: Path | None = option(None, "Prepared images.", metavar="DIR", shown="$UL_CACHE or the user's cache")


@dataclass(frozen=True)
class TuneOptions:
    """Of ul-tune: what settings are compared on, and how much worse than the reference a preset may be."""

    data: str = option(..., "Real images, as given to ul-train.", metavar="SOURCE")
    heldout: str | None = option(None, "Held-out images.", metavar="SOURCE", shown="the source's own, or 5 %")
    images: int = option(1000, "Samples of each setting in the last round.", metavar="COUNT")
    seeds: int = option(2, "Repetitions in the last round.", metavar="COUNT")
    seed: int = option(0, "The first of the seeds.", metavar="INT")
    balanced: float = option(1.1, "Preset balanced: distance at most so many times the reference's.", metavar="RATIO")
    draft: float = option(1.35, "Preset draft: distance at most so many times the reference's.", metavar="RATIO")
    finalists: int = option(8, "Settings in the last round.", metavar="COUNT")
    features: list[str] = option(
        [], "Spaces that choose, as for ul-eval; repeatable.", metavar="NAME", shown="as for ul-eval"
    )
    held_out: str | None = option(None, "A space that is only reported.", metavar="NAME", shown="another one")
    classifier: Path | None = option(None, "As for ul-eval.", metavar="FILE.safetensors")
    cache: Path | None = option(None, "Prepared images.", metavar="DIR", shown="$UL_CACHE or the user's cache")
    overwrite: bool = option(False, "Replace a bundle at --out.")


@dataclass(frozen=True)
class BenchOptions:
    """Of ul-bench: what is measured, how often, and beside what."""

    peers: str = option(
        "",
        "Measured in turn with ort-cpu: openvino, openvino-bf16, torch, torch-compile, torch-loop "
        "(sampling as a user writes it), and these three with -bf16.",
        metavar="NAME,...",
        shown="none",
    )
    run: Path | None = option(None, "Run directory of the bundle, for the torch peers.", metavar="RUN")
    batch_sizes: str | None = option(None, "Batch sizes.", metavar="IMAGES,...", shown="1,8,64; with --quick 1,8")
    repeats: int = option(20, "Measurements of each step.", metavar="COUNT")
    image_repeats: int = option(5, "Measurements of whole batches of images.", metavar="COUNT")
    threads: int | None = threads_option()
    start_up: bool = option(
        True, "Measure import, load and first image in fresh processes.", "--start-up/--no-start-up"
    )
    plot: Path | None = option(None, "Draw images/s against batch size (needs matplotlib).", metavar="FILE.png")
    quick: bool = option(False, "One or two measurements of each: to see that it works, not for figures.")
