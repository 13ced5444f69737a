"""The figures of ul-eval for people: a table, and one HTML file with its images inside."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from rich.table import Table

from ul_export.evaluation.comparison import Comparison
from ul_export.html_page import image, page, paragraph, table
from ul_runtime.cli.options import print_table
from ul_runtime.images.png import contact_sheet, png_bytes

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
CONTACT_SHEETS = {
    "samples.png": "Samples",
    "real.png": "Real images",
    "reconstructions.png": "Reconstructions",
    "neighbours.png": "Nearest training images of the first samples",
    "closest.png": "Samples nearest to a training image",
}
_TILES = 64
_ROWS = 8  # of samples with their neighbours


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every figure in order: of what, name, better, count, the bundle's value, the real images' value, about."""
    reconstruction, copies = dict(result["reconstruction"]), result["memorisation"]
    frechet = reconstruction.pop("frechet_distance")
    share = {"value": copies["nearer_than_heldout"], "real": copies["real"], "count": copies["count"]}
    sections = {
        **{f"samples, {space}": figures for space, figures in result["generation"].items()},
        "reconstructions": reconstruction,
        **{f"reconstructions, {space}": {"frechet_distance": figure} for space, figure in frechet.items()},
        "latents": {"bits_per_pixel": result["bits_per_pixel"]},
        f"copies, {copies['features']}": {"nearer_than_heldout": share},
    }
    for section, figures in sections.items():
        for key, figure in figures.items():
            name, better, about = FIGURES[key]
            real = _with_spread(figure["real"], figure.get("real_spread"))
            value = _with_spread(figure["value"], figure.get("spread"))
            yield section, name, better, str(figure["count"]), value, real, about


def _with_spread(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


def sentences(result: Mapping[str, Any]) -> list[str]:
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
    title = f"{result['bundle']['name']}, {result['data']['source']}"
    shown = Table("of", "figure", "better", title=title, title_justify="left")
    for name in ("count", "bundle", "real"):
        shown.add_column(name, justify="right")
    before = ""
    for section, *cells, _about in rows(result):
        shown.add_row("" if section == before else section, *cells)
        before = section
    print_table(shown, *sentences(result), width=_WIDTH)


def html_report(result: Mapping[str, Any], sheets: Mapping[str, bytes]) -> str:
    """One page that needs no other file."""
    columns = ["of", "figure", "better", "count", "bundle", "real", ""]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    body = [
        *map(paragraph, sentences(result)),
        table(columns, rows(result), (3, 4, 5)),
        *(image(CONTACT_SHEETS[name], data) for name, data in sheets.items()),
        paragraph(f"Bundle {result['bundle']['hash'][:12]}; data {result['data']['fingerprint'][:12]}; {versions}"),
        f"<p><code>{escape(result['command'])}</code></p>",
    ]
    return page(f"{result['bundle']['name']}: evaluation", body)


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
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


def contact_sheets(
    comparison: Comparison, samples: np.ndarray, decoded: np.ndarray, index: np.ndarray, distance: np.ndarray
) -> dict[str, bytes]:
    """PNG by file name, of what ul_export.evaluation.measures returns."""
    seed, train, heldout = comparison.seeds[0], comparison.splits.train.images, comparison.splits.heldout.images
    real_ids = comparison.real_ids[comparison.halves(seed)[1]][:_TILES]
    matched = ", of the same classes in the same order" if comparison.labels(seed) else ""
    originals = heldout[comparison.heldout_ids[: _TILES // 2]]
    pairs = [side for pair in zip(originals, decoded[: len(originals)], strict=True) for side in pair]

    def neighbours(chosen: np.ndarray, title: str) -> bytes:
        """A row a sample: the sample, then its nearest training images with their distances."""
        images: list[np.ndarray] = []
        captions = []
        for row in chosen[:_ROWS]:
            images += [samples[row], *train[index[row]]]
            captions += [f"sample {row}", *(f"{apart:.3g}" for apart in distance[row])]
        columns = ("sample", *(f"nearest {k + 1}" for k in range(index.shape[1])))
        return _png(images, f"{title}, by {comparison.spaces[0].name}", columns, captions)

    closest = np.argsort(distance[:, 0], kind="stable")
    sheets = (
        _png(samples[:_TILES], f"samples, seed {seed}"),
        _png(comparison.reference.images[real_ids], f"real images, {comparison.reference_split}{matched}"),
        _png(pairs, f"held-out images beside their reconstructions, seed {seed}", ("original", "decoded") * 4),
        neighbours(np.arange(len(samples)), "the first samples and their nearest training images"),
        neighbours(closest, "the samples nearest to a training image"),
    )
    return dict(zip(CONTACT_SHEETS, sheets, strict=True))


def _png(images: Iterable[np.ndarray], title: str, columns: Sequence[str] = (), captions: Sequence[str] = ()) -> bytes:
    """A contact sheet of images uint8 `c h w`."""
    return png_bytes(contact_sheet([image.transpose(1, 2, 0) for image in images], title, columns, captions))
