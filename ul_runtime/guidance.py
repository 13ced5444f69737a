"""Guidance of the prior as data: the inputs of its step graph (ul_train/step.py).

pred = w pred(label) + (1 - w) pred(no label)
"""

import numpy as np

Inputs = dict[str, np.ndarray]


def unguided(label: np.ndarray, z: np.ndarray) -> Inputs:
    """pred(label): one branch, for labels `b` and a state `b c h w`."""
    off = np.zeros(len(label), np.float32)
    one = np.ones((len(label), 1), np.float32)
    return {"label": label[:, None], "weight": one, "guide": np.zeros_like(z), "guide_weight": off, "rescale": off}


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
