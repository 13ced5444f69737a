"""Models that come inside the package: opened by name, or when no bundle is given."""

import logging
import os
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError
from ul_runtime.manifest import GRAPH_NAMES, GraphName

if TYPE_CHECKING:
    from ul_runtime.pipeline import Pipeline


MODELS = Path(__file__).with_name("models")  # a bundle in each folder
DEFAULT = "garments-32"


def shipped_names() -> list[str]:
    """Names of the models inside the package."""
    return sorted(folder.name for folder in MODELS.iterdir()) if MODELS.is_dir() else []


def open_bundle(bundle: str | Path | None, *, graphs: Collection[GraphName] = GRAPH_NAMES) -> Bundle:
    """The bundle at that path or, where nothing is, the shipped model of that name; None = DEFAULT.

    BadInputError, UntrustedError: see Bundle.open, whose `graphs` these are.
    """
    if bundle is not None and os.path.lexists(bundle):
        if (Path(bundle) / "checkpoints").is_dir():
            raise BadInputError(
                f"{bundle}: is a run of ul-train; ul-export makes a bundle of it, --backend torch samples it as it is"
            )
        return Bundle.open(Path(bundle), graphs=graphs)
    name = DEFAULT if bundle is None else str(bundle)
    names = shipped_names()
    if name not in names:
        known = ", ".join(names) or "none"
        raise BadInputError(
            f"{name}: no such folder, and no model of that name ships with this package (those that do: {known}); "
            "expected a bundle, the folder that ul-export wrote"
        )
    return Bundle.open(MODELS / name, graphs=graphs, allow_hard_links=True)


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
    from ul_runtime.backends import TORCH, Backend
    from ul_runtime.backends.choose import CardOptions, open_backend
    from ul_runtime.bundle import Bundle
    from ul_runtime.errors import UsageError, require_packages
    from ul_runtime.pipeline import Pipeline

    if backend == TORCH:
        if path is None or engines is not None:
            what = "give its folder" if path is None else "it has no engines; leave out --engines"
            raise UsageError(f"backend torch samples a run of ul-train: {what}")
        require_packages("torch", extras="train")
        torch_device = import_module("ul_train.torch_backend")  # which builds on this package, not this one on it
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
            return Pipeline(bundle.manifest, opened, guide, path=bundle.path, hash=bundle.hash)
        in_float32 = lambda: open_in("fp32", opened.name, guide and (guide.in_float32 or guide))  # noqa: E731
        return Pipeline(bundle.manifest, opened, guide, in_float32, path=bundle.path, hash=bundle.hash)

    lesser = None if guide is None else pipeline(open_bundle(guide, graphs=["prior_step"]))
    return pipeline(open_bundle(path), lesser)
