"""The figures of ul-eval for people: a table, and one HTML file with its pictures inside."""

import sys
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ul_export.page import page, paragraph, picture, table

_WIDTH = 110  # of tables that no terminal limits
# figure -> (name, better, what it says)
FIGURES = {
    "frechet_distance": ("Frechet distance", "lower", "of two Gaussians fitted to the features; depends on the count"),
    "kernel_distance": ("kernel distance (KID)", "lower", "unbiased: 0 in the mean for real images, at any count"),
    "sliced_distance": ("sliced Wasserstein (MIND)", "lower", "Monge distance of the features, a direction at a time"),
    "precision": ("precision", "higher", "share of samples that lie near real images; 1 for noise in their midst"),
    "recall": ("recall", "higher", "share of real images that lie near samples"),
    "density": ("density", "higher", "how many real images a sample lies near, 1 for real ones"),
    "coverage": ("coverage", "higher", "share of real images with a sample among their neighbours"),
    "psnr_db": ("PSNR, dB", "higher", "of one decode; real: one held-out image for another"),
    "ssim": ("SSIM", "higher", "structural similarity; real: as above"),
    "perceptual_distance": ("perceptual distance", "lower", "ST-LPIPS, AlexNet; real: as above"),
    "bits_per_pixel": ("bits per pixel", "", "bound under the bundle's prior; real: of training images"),
    "nearer_than_heldout": (
        "nearer than held out",
        "0.5",
        "chance that a sample is nearer to training images than an unseen one",
    ),
}
_PICTURES = {
    "samples.png": "Samples",
    "real.png": "Real images",
    "reconstructions.png": "Reconstructions",
    "neighbours.png": "Nearest training images of the first samples",
    "closest.png": "Samples nearest to a training image",
}


class Row(NamedTuple):
    """A line of the tables."""

    section: str
    name: str
    better: str
    images: str
    value: str
    real: str
    about: str


def rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """Every figure, in order."""
    for space, figures in result["generation"].items():
        for name, figure in figures.items():
            yield _row(f"samples, {space}", name, figure)
    reconstruction = dict(result["reconstruction"])
    frechet = reconstruction.pop("frechet_distance")
    for name, figure in reconstruction.items():
        yield _row("reconstructions", name, figure)
    for space, figure in frechet.items():
        yield _row(f"reconstructions, {space}", "frechet_distance", figure)
    yield _row("latents", "bits_per_pixel", result["bits_per_pixel"])
    found = result["memorisation"]
    share = {"value": found["nearer_than_heldout"], "real": found["real"], "count": found["count"]}
    yield _row(f"copies, {found['features']}", "nearer_than_heldout", share)


def _row(section: str, key: str, figure: Mapping[str, Any]) -> Row:
    name, better, about = FIGURES[key]
    real = _with_spread(figure["real"], figure.get("real_spread"))
    value = _with_spread(figure["value"], figure.get("spread"))
    return Row(section, name, better, str(figure["count"]), value, real, about)


def _with_spread(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


def said(result: Mapping[str, Any]) -> list[str]:
    """What the figures rest on, in sentences."""
    data, found = result["data"], result["memorisation"]
    return [
        f"Means ± standard deviation over seeds {', '.join(map(str, result['seeds']))}. Real: as many real images in "
        f"the model's place, {data['reference_images']} of the {data['reference']} images in two halves; for a "
        "reconstruction, another held-out image; for bits, images that were trained on.",
        f"Nearest training images, among {found['train_images']} of {found['all_train_images']}: median distance "
        f"{found['median_distance']:.3g} for samples, {found['heldout_median_distance']:.3g} for held-out images.",
        *(f"Absent: {name}: {why}." for name, why in result["absent"].items()),
        *(f"Note: {note}." for note in result["notes"]),
    ]


def print_report(result: Mapping[str, Any]) -> None:
    """The table on stdout."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    title = f"{result['bundle']['name']}, {result['data']['source']}"
    shown = Table("of", "figure", "better", title=title, title_justify="left")
    for name in ("count", "bundle", "real"):
        shown.add_column(name, justify="right")
    before = ""
    for row in rows(result):
        shown.add_row("" if row.section == before else row.section, *row[1:-1])
        before = row.section
    console.print(shown)
    for line in said(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def html_report(result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """One page that needs no other file."""
    columns = ["of", "figure", "better", "count", "bundle", "real", ""]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    body = [
        *map(paragraph, said(result)),
        table(columns, rows(result), (3, 4, 5)),
        *(picture(_PICTURES[name], data) for name, data in pictures.items()),
        paragraph(f"Bundle {result['bundle']['hash'][:12]}; data {result['data']['fingerprint'][:12]}; {versions}"),
        f"<p><code>{escape(result['command'])}</code></p>",
    ]
    return page(f"{result['bundle']['name']}: evaluation", body)
