"""What ul-eval can be told."""

from dataclasses import dataclass
from pathlib import Path

from ul_runtime.cli.options import option


@dataclass(frozen=True)
class EvalOptions:
    """`images` samples a seed stand against as many real images."""

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
