"""A small classifier trained on the labels of the training images: features that see what the classes differ in."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ul_runtime.errors import BadInputError
from ul_runtime.files import durable
from ul_runtime.images.convert import from_uint8
from ul_runtime.progress import Tick, silent
from ul_train.data.imageset import ImageSet, sample_ids
from ul_train.torch_backend import follow_load

_BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 64, 2e-3, 0.01
_SEED = 0
_FORMAT = "unified-latents-classifier-1"
_WIDTHS = (32, 64, 128)
_GROUPS = 8
_PLACES = 4  # a side, of the last map
_FEATURES = 128


class Classifier(nn.Module):
    """Three 3x3 convolutions of stride 2, their map averaged to 4x4, a linear layer (the features), and the classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in pairwise((channels, *_WIDTHS)):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(_GROUPS, width), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(_PLACES), nn.Flatten(), nn.Linear(_WIDTHS[-1] * _PLACES**2, _FEATURES)]
        self.trunk = nn.Sequential(*layers, nn.ReLU())
        self.head = nn.Linear(_FEATURES, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """x `b c h w` in [-1, 1] -> `b 128`."""
        return self.trunk(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `b c h w` in [-1, 1] -> logits `b num_classes`."""
        return self.head(self.features(x))


def train_classifier(images: ImageSet, steps: int, tick: Tick = silent) -> Classifier:
    """Trained on `images` and their labels, always from the same seed; the tick counts steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = Classifier(images.images.shape[1], len(images.class_names))
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    for step in range(steps):
        tick(0)
        follow_load()
        pixels, labels = images.batch(sample_ids(len(images), _SEED, step, _BATCH))
        loss = nn.functional.cross_entropy(network(torch.from_numpy(from_uint8(pixels))), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        tick(1)
    return network.eval()


@torch.inference_mode()
def accuracy(network: Classifier, images: ImageSet, most: int = 10_000) -> float:
    """Share of the first `most` labelled images that it names rightly."""
    right = []
    for first in range(0, min(most, len(images)), 256):
        pixels, labels = images.batch(np.arange(first, min(first + 256, len(images))))
        named = network(torch.from_numpy(from_uint8(pixels))).argmax(dim=1).numpy()
        right.append((named == labels)[labels >= 0])
    return float(np.concatenate(right).mean())


def save_classifier(path: Path, network: Classifier, record: dict[str, object]) -> None:
    """Write a new file of weights and `record`. OutputError."""
    metadata = {"format": _FORMAT, "facts": json.dumps(record, sort_keys=True)}
    durable.make_directory(path.parent)
    durable.atomic_write(path, save(network.state_dict(), metadata))


def load_classifier(path: Path, images: ImageSet) -> tuple[Classifier, dict[str, object]]:
    """The classifier and its record; BadInputError for other files, or one that was trained on other images."""
    network = Classifier(images.images.shape[1], len(images.class_names))
    advice = "choose another name, or remove it to train one"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{path}: not a safetensors file ({error}); {advice}") from None
    if metadata.get("format") != _FORMAT:
        raise BadInputError(f"{path}: not a classifier of ul-eval; {advice}")
    try:
        record = dict(json.loads(metadata["facts"]))
        if record["data"] == images.fingerprint:
            network.load_state_dict(weights)
    except (LookupError, ValueError, TypeError, RuntimeError):
        raise BadInputError(f"{path}: damaged; remove it to train one") from None
    if record["data"] != images.fingerprint:
        raise BadInputError(f"{path}: trained on other images ({str(record['data'])[:12]}...); {advice}")
    return network.eval(), record
