"""Runs of the preset `tiny` exported by ul-export, each once for all tests: torch takes twenty seconds for one."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from random_run import DIGITS, write_run

from ul_export import export
from ul_export.export import rounded
from ul_export.options import ExportOptions
from ul_train.run import Run
from ul_train.torch_backend import TorchBackend

# name -> opset, overrides of the preset, classes
CASES: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "grey with classes, opset 20": (20, (), DIGITS),
    "grey with classes, opset 18": (18, (), DIGITS),
    "grey with classes, opset 22": (22, (), DIGITS),
    "grey with classes, opset 23": (23, (), DIGITS),
    "grey with classes, weights in float16": (20, (), DIGITS),
    "RGB without classes, opset 20": (
        20,
        ("image.channels=3", "latent_channels=3", "base.widths=[32]", "base.blocks=[2]"),
        (),
    ),
}
PLAIN = "grey with classes, opset 20"
HALF = "grey with classes, weights in float16"


@dataclass(frozen=True)
class Exported:
    """A run, its bundle, the files that torch made for it, and what ul-export printed."""

    run: Path
    bundle: Path
    opset: int
    weights: str
    files: dict[str, bytes]
    figures: dict[str, Any]
    said: list[str]  # what it logged

    def torch_backend(self) -> TorchBackend:
        """The same networks in torch, rounded where the bundle's weights are."""
        networks = Run.open(self.run).finished().networks
        if self.weights == "fp16":
            networks = rounded(networks)
        return TorchBackend(networks, torch.device("cpu"))


class _Kept(logging.Handler):
    """Keeps the messages that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


_EXPORTED: dict[str, Exported] = {}


def exported_run(name: str, factory: pytest.TempPathFactory) -> Exported:
    """The case, exported when it is first asked for."""
    if name not in _EXPORTED:
        _EXPORTED[name] = _export(name, factory.mktemp("export"))
    return _EXPORTED[name]


def _export(name: str, folder: Path) -> Exported:
    opset, overrides, classes = CASES[name]
    write_run(folder / "run", *overrides, classes=classes)
    weights = "fp16" if name == HALF else "fp32"
    files: dict[str, bytes] = {}
    make = export.export_graphs

    def keep(*arguments: Any) -> dict[str, bytes]:
        files.update(make(*arguments))
        return dict(files)

    kept, log = _Kept(), logging.getLogger("ul_export")
    log.addHandler(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_graphs", keep)
        patch.setattr(log, "level", logging.INFO)
        options = ExportOptions(opset=opset, weights=weights, threads=1)
        figures = export.export_bundle(folder / "run", folder / "bundle", options)
    log.removeHandler(kept)
    return Exported(folder / "run", folder / "bundle", opset, weights, files, figures, kept.messages)
