"""Guidance of the prior as data: the inputs of its step graph (ul_train/step.py), and which bundle can guide which.

pred = w pred(label) + (1 - w) u,   u = pred(no label), or the prediction of a guide: a lesser prior of these latents
"""

import numpy as np

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.manifest import BundleInfo
from ul_runtime.settings import Overrides, Settings

Inputs = dict[str, np.ndarray]


def unguided(label: np.ndarray, z: np.ndarray) -> Inputs:
    """pred(label): one branch, for labels `b` and a state `b c h w`."""
    off, nobody = np.zeros(len(label), np.float32), np.zeros(z.shape, np.float32)  # takes no memory until it is read
    one = np.ones((len(label), 1), np.float32)
    return {"label": label[:, None], "weight": one, "guide": nobody, "guide_weight": off, "rescale": off}


def classifier_free(label: np.ndarray, z: np.ndarray, no_label: int, guidance: float, rescale: float) -> Inputs:
    """Two branches, weights w and 1 - w (Ho & Salimans 2022, arXiv 2207.12598); `rescale` is phi of Lin et al. 2023.

    Images without a label have nothing to be guided from: theirs are 1, 0 and 0, as in a batch that is not guided.
    """
    pull = np.where(label == no_label, 1.0, guidance)
    return {
        **unguided(label, z),
        "label": np.stack([label, np.full_like(label, no_label)], axis=1),
        "weight": np.stack([pull, 1.0 - pull], axis=1).astype(np.float32),
        "rescale": np.where(label == no_label, 0.0, rescale).astype(np.float32),
    }


def autoguided(label: np.ndarray, guide: np.ndarray, guidance: float, rescale: float) -> Inputs:
    """One branch of weight w, and the guide's prediction `b c h w` of weight 1 - w (Karras et al. 2024)."""
    return {
        **unguided(label, guide),
        "weight": np.full((len(label), 1), guidance, np.float32),
        "guide": guide,
        "guide_weight": np.full(len(label), 1.0 - guidance, np.float32),
        "rescale": np.full(len(label), rescale, np.float32),
    }


def check_effective(settings: Settings, given: Overrides, *, has_guide: bool) -> None:
    """UsageError for a guide or a rescale that would do nothing because guidance is off and nobody said so."""
    asked = "the guide" if has_guide else "guidance_rescale" if given.get("guidance_rescale") else ""
    if asked and settings.guidance == 1.0 and given.get("guidance") is None:
        raise UsageError(f"guidance is 1 = off unless given, so {asked} would do nothing; give guidance, for example 2")


def check_guide(main: BundleInfo, guide: BundleInfo) -> None:
    """BadInputError unless the guide's prior is of the same latents: shape, noise levels, classes and encoder."""
    facts: list[tuple[str, object, object]] = [
        ("latent channels", main.latent.channels, guide.latent.channels),
        ("latent size", main.latent.size, guide.latent.size),
        ("lowest logsnr", main.logsnr_z.min, guide.logsnr_z.min),
        ("highest logsnr", main.logsnr_z.max, guide.logsnr_z.max),
        ("number of classes", len(main.classes), len(guide.classes)),
        *((f"class {k}", *names) for k, names in enumerate(zip(main.classes, guide.classes, strict=False))),
        ("encoder", *_encoders(main, guide)),
    ]
    for what, wanted, given in facts:
        if given != wanted:
            message = f"{what} {given}, the bundle has {wanted}"
            raise BadInputError(f"guide {guide.name}: {message}; give a guide trained on the same latents and classes")


def _encoders(main: BundleInfo, guide: BundleInfo) -> tuple[str, str]:
    """Start of the hash of each one's encoder; empty if either does not say."""
    hashes = main.provenance.encoder_sha256, guide.provenance.encoder_sha256
    return (hashes[0][:12], hashes[1][:12]) if hashes[0] and hashes[1] else ("", "")
