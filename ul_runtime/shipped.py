"""Models that come inside the package: opened by name, or when no bundle is given."""

import os
from collections.abc import Collection
from pathlib import Path

from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError
from ul_runtime.manifest import GRAPH_NAMES, GraphName

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
