"""TensorRT engines of a bundle, built ahead of their first use."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ul_runtime.backends.tensorrt_build import Profile, library_for
from ul_runtime.backends.tensorrt_engines import EngineCache, Engines, engines_for_gpu
from ul_runtime.bundle import Bundle
from ul_runtime.errors import StoppedError, UsageError
from ul_runtime.loading import open_bundle
from ul_runtime.machine import engine_dir, gpus
from ul_runtime.progress import progress
from ul_runtime.signals import stop_on_signal


def open_engines(targets: list[str], most: int, folder: Path | None, refittable: bool = False) -> Engines:
    """Where and for what engines are built: for `targets`, or for this machine's first GPU, batches up to `most`.

    `refittable`: their weights can be replaced by newer ones. UsageError: no library for that, an architecture that it
    does not know, no GPU. OutputError, UntrustedError: the folder.
    """
    if refittable and targets:
        raise UsageError("--refittable: such engines are built where they run; leave out --target")
    profile = Profile(most, most)
    if targets:
        library, cache = library_for(tuple(targets)), EngineCache(engine_dir(folder))
        engines = Engines(library, cache, profile, tuple(dict.fromkeys(targets)))
    else:
        engines = replace(_for_this_gpu(folder), profile=profile, refittable=refittable)
    engines.cache.make_folder()  # or the work before is in vain
    return engines


def _for_this_gpu(folder: Path | None) -> Engines:
    able = library_for(()).targets()
    ahead = "; --target sm89 builds ahead for that architecture, without a GPU" if able else ""
    try:
        found = gpus()
    except UsageError as error:
        raise UsageError(f"{error}{ahead}") from error
    if not found:
        raise UsageError(f"this machine has no NVIDIA GPU{ahead}")
    return engines_for_gpu(found[0].number, folder)


def build_engines(engines: Engines, bundle: Path) -> dict[str, Any]:
    """Build what is missing of the engines of `bundle`, a path or a shipped name; returns what to print.

    BadInputError: a graph that the library cannot build; the engines before it are kept. StoppedError.
    """
    opened: Bundle = open_bundle(bundle)
    built, size = [], 0
    names = list(opened.manifest.all_graphs)
    with stop_on_signal(), progress("building engines", len(names), "graphs") as tick:
        for graph in names:
            try:
                prepared = engines.engine(opened, graph, tick=tick)
            except StoppedError:
                done = f"{names.index(graph)} of {len(names)} engines are in {engines.cache.folder}"
                raise StoppedError(f"stopped; {done}; run the same command again to go on") from None
            built += [graph] if prepared.built_because else []
            size += len(prepared.engine)
    return {
        "engines": str(engines.cache.folder),
        "engines_for": ", ".join(engines.targets) or engines.gpu,
        "engines_by": engines.library.title,
        "engines_built": len(built),
        "engine_megabytes": size / 1e6,
    }
