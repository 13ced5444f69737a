"""The figures of ul-eval for people: a table, and one HTML file with its pictures inside."""

import base64
import sys
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

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
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.about { color: #606060 } img { max-width: 100%; border: 1px solid #ddd } code { overflow-wrap: anywhere }
"""


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
    table = Table("of", "figure", "better", title=title, title_justify="left")
    for name in ("count", "bundle", "real"):
        table.add_column(name, justify="right")
    before = ""
    for row in rows(result):
        table.add_row("" if row.section == before else row.section, *row[1:-1])
        before = row.section
    console.print(table)
    for line in said(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def html_report(result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """One page that needs no other file."""
    head = "".join(f"<th>{name}</th>" for name in ("of", "figure", "better"))
    head += "".join(f'<th class="number">{name}</th>' for name in ("count", "bundle", "real")) + "<th></th>"
    lines = []
    for row in rows(result):
        texts = "".join(f"<td>{escape(text)}</td>" for text in row[:3])
        numbers = "".join(f'<td class="number">{escape(text)}</td>' for text in row[3:6])
        lines.append(f'<tr>{texts}{numbers}<td class="about">{escape(row.about)}</td></tr>')
    figures = "".join(
        f'<h2>{_PICTURES[name]}</h2><img alt="{_PICTURES[name]}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    )
    sentences = "".join(f"<p>{escape(line)}</p>" for line in said(result))
    title = escape(f"{result['bundle']['name']}: evaluation")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    facts = escape(f"Bundle {result['bundle']['hash'][:12]}; data {result['data']['fingerprint'][:12]}; {versions}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{sentences}<table><tr>{head}</tr>{''.join(lines)}</table>{figures}"
        f"<p>{facts}</p><p><code>{escape(result['command'])}</code></p></html>\n"
    )
