#!/usr/bin/env python
"""Puts a bundle into the package, with its measured quality in the manifest: what ul-generate takes when given none.

    ul-train garments-32 --data fashion-mnist/ --out runs/garments
    ul-export runs/garments --weights fp16 --out garments.bundle
    ul-eval garments.bundle --data fashion-mnist/ --images 1000 --out evaluation
    python tools/ship_model.py garments.bundle --evaluation evaluation/eval.json \
        --about "Fashion-MNIST (Zalando Research, MIT licence), the 60,000 training images"

Then STEP_RMS of ul_runtime/cli/examine.py and tests/golden_pictures.json are of the old model: tests say so.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.cli.command import run_command
from ul_runtime.errors import BadInputError
from ul_runtime.loading import MODELS
from ul_runtime.manifest import BundleInfo

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
MOST_BYTES = 12_000_000


@app.command()
def ship(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle of ul-export --weights fp16.")],
    evaluation: Annotated[Path, typer.Option(metavar="FILE", help="eval.json that ul-eval wrote of this bundle.")],
    about: Annotated[str, typer.Option(metavar="TEXT", help="The images it was trained on, and their licence.")],
    models: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the models.")] = MODELS,
) -> None:
    """Write the bundle under its name into the package."""
    given = Bundle.open(bundle)
    quality = quality_of(json.loads(evaluation.read_bytes()), given.hash, evaluation) | {"trained_on": about}
    values = given.manifest.model_dump() | {"quality": quality}
    values.pop("files")
    files = {name: given.read(name) for name in given.manifest.files}
    size = sum(len(data) for data in files.values())
    if size > MOST_BYTES:
        raise BadInputError(f"{bundle}: {size} bytes, at most {MOST_BYTES} ship; export with --weights fp16")
    models.mkdir(exist_ok=True)
    shipped = write_bundle(models / given.manifest.name, BundleInfo.model_validate(values), files, overwrite=True)
    print(f"{shipped.path}: {size / 1e6:.2f} MB, {shipped.hash}")


def quality_of(record: dict[str, Any], bundle_hash: str, where: Path) -> dict[str, Any]:
    """The figures of ul-eval without the folders of the machine; BadInputError if they are of another bundle."""
    if record["bundle"]["hash"] != bundle_hash:
        raise BadInputError(f"{where}: is of bundle {record['bundle']['hash'][:12]}, this one is {bundle_hash[:12]}")
    kept = ("settings", "computed_by", "seeds", "generation", "reconstruction", "bits_per_pixel", "memorisation")
    return {"measured_bundle": bundle_hash, **{key: record[key] for key in kept}, "versions": record["versions"]}


if __name__ == "__main__":
    run_command(app, "ship_model")
