"""What ul-export can be told."""

from dataclasses import dataclass
from pathlib import Path

from ul_runtime.cli.options import option


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
    threads: int | None = option(None, "CPU threads.", metavar="COUNT", shown="one per core")
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
