"""The figures that a comparison of models shows, out of all that ul-eval says of one."""

from collections.abc import Mapping
from typing import Any


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of a result of ul-eval, in its first feature space: gFD and its floor, rFD, precision, recall, PSNR, bits."""
    space, generated = next(iter(result["generation"].items()))
    distance = generated["frechet_distance"]
    return {
        "space": space,
        "count": distance["count"],
        "gfd": distance["value"],
        "gfd_spread": distance["spread"],
        "gfd_real": distance["real"],
        "precision": generated["precision"]["value"],
        "recall": generated["recall"]["value"],
        "rfd": result["reconstruction"]["frechet_distance"][space]["value"],
        "psnr_db": result["reconstruction"]["psnr_db"]["value"],
        "bits_per_pixel": result["bits_per_pixel"]["value"],
    }
