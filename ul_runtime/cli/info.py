"""ul-info: what a bundle is: classes, sizes, precision, default settings, where it came from."""

import json
from typing import TYPE_CHECKING, Any

import typer

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import AsJson, OptionalBundle, with_options

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_MOST_NAMES = 30  # of classes, for people; --json has all


@app.command(epilog="Example: ul-info photos.bundle")
@with_options
def info(bundle: OptionalBundle = None, as_json: AsJson = False) -> None:
    """Verify a bundle and show what it is: classes, sizes, precision, default settings, origin, hash."""
    from ul_runtime.loading import open_bundle

    facts = _facts(open_bundle(bundle))
    if as_json:
        print(json.dumps(facts))
        return
    facts["quality"] = {name: value for name, value in facts["quality"].items() if isinstance(value, int | float)}
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<14}{_shown(value)}")


def _facts(bundle: "Bundle") -> dict[str, Any]:
    from ul_runtime.settings import resolve_settings

    manifest = bundle.manifest
    settings = resolve_settings(manifest, {}, can_guide=manifest.num_classes > 0)
    return {
        "name": manifest.name,
        "path": str(bundle.path),
        "hash": bundle.hash,
        "image": [manifest.image.channels, manifest.image.size, manifest.image.size],  # c h w
        "fit": manifest.image.fit,
        "latent": [manifest.latent.channels, manifest.latent.size, manifest.latent.size],
        "num_classes": manifest.num_classes,
        "classes": list(manifest.classes),
        "precision": {name: graph.precision for name, graph in manifest.all_graphs.items()},
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "settings": settings.as_dict(),
        "quality": dict(manifest.quality),
        "provenance": manifest.provenance.model_dump(mode="json", exclude_none=True),
    }


def _shown(value: Any) -> str:
    """For people: one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        more = [f"and {len(value) - _MOST_NAMES:,} more"] * (len(value) > _MOST_NAMES)
        sizes = all(isinstance(part, int) for part in value)
        return (" x " if sizes else ", ").join([*map(str, value[:_MOST_NAMES]), *more]) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Entry point of ul-info."""
    run_command(app, "ul-info")
