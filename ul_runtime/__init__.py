"""Unified Latents runtime: samples a bundle without torch (arXiv 2602.17270)."""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ul_runtime.pipeline import Pipeline

__version__ = "0.1.0"


def load(
    path: str | Path | None = None,
    *,
    guide: str | Path | None = None,
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    allow_spinning: bool = True,
    device: int | None = None,
    engines: str | Path | None = None,
    require_graphs: bool = False,
) -> "Pipeline":
    """The verified bundle at `path`, ready to generate, encode and decode; graphs are built when first used.

    With backend "torch" it is a run of ul-train instead, sampled as it is.
    A name such as "garments-32" opens the model of that name inside the package, None the default one.
    `guide`: a bundle of a smaller or less trained prior of the same latents, away from which `guidance` leads
    (autoguidance, Karras et al. 2024). `precision` None = the bundle's own, `threads` None = one per core.
    On NVIDIA cards: `device` is the card's number (None = 0), `engines` the folder of TensorRT's engines (None = the
    user's cache), and with `require_graphs` a step that cannot be captured as a CUDA graph is an error.
    UsageError: a backend that is unknown, not installed or not able to compute in that precision.
    BadInputError: the guide does not fit. BadInputError, UntrustedError: see Bundle.open.
    """
    from ul_runtime.backends import TORCH, Backend, open_backend
    from ul_runtime.backends.on_a_card import CardOptions
    from ul_runtime.bundle import Bundle
    from ul_runtime.errors import UsageError, require_packages
    from ul_runtime.pipeline import Pipeline
    from ul_runtime.shipped import open_bundle

    if backend == TORCH:
        if path is None or engines is not None:
            what = "give its folder" if path is None else "it has no engines; leave out --engines"
            raise UsageError(f"backend torch samples a run of ul-train: {what}")
        require_packages("torch", extras="train")
        torch_device = import_module("ul_train.torch_device")  # which builds on this package, not this one on it
        lesser_run, say = None if guide is None else Path(guide), logging.getLogger(__name__).warning
        how = {"precision": precision, "threads": threads, "device": device, "require_graphs": require_graphs}
        return torch_device.open_run(Path(path), guide=lesser_run, say=say, **how)
    named = device is not None or engines is not None or require_graphs
    card = CardOptions(device or 0, Path(engines) if engines else None, require_graphs) if named else None

    def pipeline(bundle: Bundle, guide: Pipeline | None = None) -> Pipeline:
        machine: dict[str, Any] = {"threads": threads, "allow_spinning": allow_spinning, "card": card}

        def open_in(precision: str | None, backend: str, guide: Pipeline | None) -> Backend:
            beside = None if guide is None else guide.backend
            return open_backend(backend, bundle, precision=precision, beside=beside, **machine)

        opened = open_in(precision, backend, guide)
        if opened.precision == "fp32":
            return Pipeline(bundle, opened, guide)
        in_float32 = lambda: open_in("fp32", opened.name, guide and (guide.in_float32 or guide))  # noqa: E731
        return Pipeline(bundle, opened, guide, in_float32)

    lesser = None if guide is None else pipeline(open_bundle(guide, graphs=["prior_step"]))
    return pipeline(open_bundle(path), lesser)
