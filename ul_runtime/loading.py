"""A path, or the name of a model inside the package, to a pipeline that is ready to sample."""

import difflib
import logging
import os
from collections.abc import Collection
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ul_runtime.backends import TORCH, Backend
from ul_runtime.backends.choose import choose_backend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.install import install, require_packages
from ul_runtime.machine import MachineOptions
from ul_runtime.manifest import GraphName

if TYPE_CHECKING:
    from ul_runtime.pipeline import Pipeline

_LOG = logging.getLogger(__name__)
MODELS = Path(__file__).with_name("models")  # a bundle in each folder
DEFAULT = "garments-32"
_ENTRY_POINTS = "unified_latents.backends"


def load(
    path: str | Path | None = None,
    *,
    guide: str | Path | None = None,
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
    device: int | None = None,
    engines: str | Path | None = None,
    require_graphs: bool = False,
    expect: str | None = None,
) -> "Pipeline":
    """The verified bundle at `path`, ready to generate, encode and decode; graphs are built when first used.

    With backend "torch" it is a run of ul-train instead, sampled as it is.
    A name such as "garments-32" opens the model of that name inside the package, None the default one.
    `guide`: a bundle of a smaller or less trained prior of the same latents, away from which `guidance` leads
    (autoguidance, Karras et al. 2024). `precision` None = the bundle's own, `threads` None = as cores are free.
    On NVIDIA GPUs: `device` is the GPU's index (None = 0), `engines` the folder of TensorRT's engines (None = the
    user's cache), and with `require_graphs` a step that cannot be captured as a CUDA graph is an error.
    UsageError: a backend that is unknown, not installed or not able to compute in that precision.
    `expect`: the hash that the bundle must have, 64 digits, as ul-export prints it; nobody can change a bundle and keep
    its hash.
    BadInputError: the guide does not fit, another hash. BadInputError, UntrustedError: see Bundle.open.
    """
    devices, folder = None if device is None else str(device), None if engines is None else Path(engines)
    options = MachineOptions(backend, precision, threads, spinning, devices, folder, require_graphs, expect)
    return open_pipeline(path, options, guide)


def open_pipeline(path: str | Path | None, options: MachineOptions, guide: str | Path | None = None) -> "Pipeline":
    """As `load`. Logs which backend `auto` took and why, or that one computes unlike the bundle."""
    if options.backend == TORCH:
        return _open_run(path, options, guide)
    weaker = None
    if guide is not None:
        prior = open_bundle(guide, graphs=["prior_step"])
        weaker = _pipeline(prior, options, choose_backend(prior, options).backend)
    bundle = open_bundle(path, expect=options.expect_hash)
    backend, why = choose_backend(bundle, options, None if weaker is None else weaker.backend)
    if why:
        _LOG.info("backend %s: %s", options.backend, why)
    return _pipeline(bundle, options, backend, weaker)


def _pipeline(bundle: Bundle, options: MachineOptions, backend: Backend, guide: "Pipeline | None" = None) -> "Pipeline":
    """Over a backend; images that are not finite are made again in float32 where it computes in less."""
    from ul_runtime.pipeline import Pipeline

    def in_float32() -> Backend:
        beside = None if guide is None else (guide.in_float32 or guide).backend
        same = options.of_backend(backend.name)
        return choose_backend(bundle, replace(same, precision="fp32"), beside).backend

    exact = None if backend.precision == "fp32" else in_float32
    return Pipeline(bundle.manifest, backend, guide, exact, path=bundle.path, hash=bundle.hash)


def _open_run(path: str | Path | None, options: MachineOptions, guide: str | Path | None) -> "Pipeline":
    if options.expect_hash is not None:
        raise UsageError("backend torch samples a run of ul-train, which has no hash: leave out --expect-hash")
    if path is None or options.engines is not None:
        what = "give its folder" if path is None else "it has no engines; leave out --engines"
        raise UsageError(f"backend torch samples a run of ul-train: {what}")
    return backend_of_runs().open_run(Path(path), options, None if guide is None else Path(guide))


def backend_of_runs() -> Any:
    """The module that samples runs, found by its entry point. UsageError: it is not installed, or torch is not."""
    require_packages("torch", extras="train")
    found = list(entry_points(group=_ENTRY_POINTS, name=TORCH))
    if not found:
        raise UsageError(f"no package offers backend {TORCH}; {install('train')}")
    return found[0].load()


def shipped_names() -> list[str]:
    """Names of the models inside the package."""
    return sorted(folder.name for folder in MODELS.iterdir()) if MODELS.is_dir() else []


def open_bundle(
    bundle: str | Path | None, *, graphs: Collection[GraphName] | None = None, expect: str | None = None
) -> Bundle:
    """The bundle at that path or, where nothing is, the shipped model of that name; None = DEFAULT.

    BadInputError, UntrustedError: see Bundle.open, which takes `graphs` and `expect`.
    """
    if bundle is not None and os.path.lexists(bundle):
        if (Path(bundle) / "checkpoints").is_dir():
            raise BadInputError(
                f"{bundle}: is a run of ul-train; ul-export makes a bundle of it, --backend torch samples it as it is"
            )
        return Bundle.open(Path(bundle), graphs=graphs, expect=expect)
    name = DEFAULT if bundle is None else str(bundle)
    names = shipped_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        known = (", ".join(names) or "none") + (f"; did you mean {near[0]}?" if near else "")
        raise BadInputError(
            f"{name}: no such folder, and no model of that name ships with this package (those that do: {known}); "
            "expected a bundle, the folder that ul-export wrote"
        )
    return Bundle.open(MODELS / name, graphs=graphs, allow_hard_links=True, expect=expect)
