"""A bundle of a preset's full size with random weights, none of them zero: no training, and no proof against torch."""

from collections.abc import Sequence
from pathlib import Path

from random_run import DIGITS, randomise
from torch import nn

from ul_export.onnx_graphs import export_graphs
from ul_runtime.bundle import Bundle, write_bundle
from ul_train.config import load_config
from ul_train.model import make_base, make_decoder, make_encoder
from ul_train.run import Run


def write_random_bundle(
    path: Path, recipe: str = "fashion-32", *overrides: str, classes: Sequence[str] = DIGITS, opset: int = 20
) -> Bundle:
    """Export the encoder, base and decoder of `recipe` as they start, but for their weights."""
    config = load_config(recipe, list(overrides))
    networks: dict[str, nn.Module] = {
        "encoder": make_encoder(config),
        "prior": make_base(config, len(classes)),
        "decoder": make_decoder(config),
    }
    for seed, network in enumerate(networks.values()):
        randomise(network, seed).eval()
    info = Run.in_memory(config, tuple(classes)).manifest(opset)
    return write_bundle(path, info, dict(export_graphs(networks, info, opset)))
