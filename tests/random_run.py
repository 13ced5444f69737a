"""A run directory as ul-train leaves it, of networks with random weights none of which is zero: seconds, no training.

Fresh networks would not do: their last layers and modulations start at zero, so that every graph would be trivial.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ul_train import checkpoint as ckpt
from ul_train.config import Config, config_hash, load_config
from ul_train.model import make_base, make_decoder, make_encoder, make_prior, randomise
from ul_train.run import Run

DIGITS = tuple("0123456789")


def save(run: Path, config: Config, stage: str, networks: dict[str, nn.Module], encoder: str | None = None) -> str:
    """The last checkpoint of a stage; returns the hash of its state. `encoder`: that of the joint one, for the base."""
    steps = config.of_stage(stage).steps
    state = ckpt.State(stage, steps, config.seed, config_hash(config), "0" * 64, {}, encoder)
    tensors = ckpt.tensors_of(networks)
    path = ckpt.save_checkpoint(run / "checkpoints", state, tensors, tensors, {})
    return ckpt.read_state(path)[1]


def write_run(
    run: Path,
    *overrides: str,
    recipe: str = "tiny",
    classes: Sequence[str] = DIGITS,
    base: bool = True,
    seed: int = 0,
    change: Callable[[dict[str, nn.Module]], None] = lambda networks: None,
) -> dict[str, nn.Module]:
    """Write the run, with its base stage or without; returns its networks, `base` in any case, after a `change`."""
    torch.manual_seed(seed)  # of the biases before they are moved
    config = load_config(recipe, list(overrides))
    splits: Any = SimpleNamespace(
        train=SimpleNamespace(fingerprint="0" * 64, class_names=tuple(classes)),
        index=SimpleNamespace(train=SimpleNamespace(rejected=[])),
    )
    Run.create(run, config, "nowhere", None, splits)
    makers = {"encoder": make_encoder, "prior": make_prior, "decoder": make_decoder}
    networks: dict[str, nn.Module] = {name: make(config) for name, make in makers.items()}
    networks["base"] = make_base(config, len(classes))
    for index, network in enumerate(networks.values()):
        randomise(network, 10 * seed + index)
    change(networks)
    joint = save(run, config, "joint", {name: networks[name] for name in makers})
    if base:
        save(run, config, "base", {"base": networks["base"]}, joint)
    return networks
