#!/usr/bin/env python
"""Error of every sampler against the number of network calls, as JSON, table and plot.

    python tools/solver_error.py BUNDLE --out tools/results/solver-error

Exact model: 1-D latents that are an even mixture of three Gaussians, whose denoiser is known. Root-mean-square distance
of z_0, both in order, to a run of many steps: the Wasserstein distance, which stochastic samplers have too.
Bundle: deterministic samplers against a run of many steps from the same noise: z_0 of the prior; the image of one z_0.
Without a BUNDLE: the exact model alone.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tool_tables import write_results

from ul_runtime.cli.command import run_command
from ul_runtime.errors import NonFiniteError, UsageError
from ul_runtime.machine import origin

if TYPE_CHECKING:
    import numpy as np

    from ul_runtime.pipeline import Pipeline
    from ul_runtime.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
DETERMINISTIC = ("ddim", "heun", "dpmpp2m", "ab2", "ab3", "unipc2")
STOCHASTIC = ("ancestral", "sa2:0.4", "sa2")
REFERENCE = "unipc2"
PACKAGES = ("unified-latents", "numpy", "onnxruntime")
CENTRES, WIDTH, NUM_POINTS, EXACT_STEPS = (-1.0, 0.3, 1.2), 0.35, 8192, 1024
PANELS = {
    "exact": "exact model: distance of the distribution of z_0",
    "z_0": "bundle: distance of z_0 from the same noise",
    "image": "bundle: distance of the image from the same z_0",
}


@app.command()
def solver_error(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results.json, table.md and plot.png go.")],
    bundle: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="Bundle of ul-export.")] = None,
    calls: Annotated[str, typer.Option(metavar="A,B,...", help="Network calls of a loop.")] = "4,6,8,12,16,24,32,48,64",
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Images, the classes in turn.")] = 8,
    seed: Annotated[int, typer.Option(metavar="INT", help="Seed of all noise.")] = 0,
    reference_steps: Annotated[int, typer.Option(metavar="N", min=4, help="Steps of the run compared with.")] = 256,
    guidance: Annotated[float | None, typer.Option(metavar="WEIGHT", help="As for ul-generate.")] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="NAME", help="Grid of the prior; mix for the exact model.")
    ] = None,
    decoder_grid: Annotated[str | None, typer.Option(metavar="NAME", help="Grid of the decoder.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.")] = None,
) -> None:
    """Measure the error of every sampler for these numbers of calls."""
    import ul_runtime

    counts = parse_calls(calls)
    record: dict[str, Any] = {"seed": seed, "exact_grid": grid or "mix"}
    pipeline = None if bundle is None else ul_runtime.load(bundle, threads=threads)
    figures = list(exact_figures(counts, record["exact_grid"], seed))
    if pipeline is not None:
        settings = pipeline.settings(grid=grid, decoder_grid=decoder_grid, guidance=guidance)
        record |= {"bundle": pipeline.manifest.name, "bundle_sha256": pipeline.hash, "num_images": images}
        asked = ("prior_grid", "decoder_grid", "guidance", "guidance_interval")
        record["settings"] = {key: value for key, value in settings.as_dict().items() if key in asked}
        record["reference"] = f"{reference_steps} steps of {REFERENCE}"
        figures += bundle_figures(pipeline, settings, counts, images, seed, reference_steps)
    record |= {"figures": figures, **origin("python tools/solver_error.py", PACKAGES)}
    write_results(out, ("results.json", "table.md", "plot.png"), record, table(record), plot(record))


def parse_calls(text: str) -> list[int]:
    """Whole numbers of 2 or more between commas; UsageError."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 2:
        raise UsageError(f"--calls {text}: expected whole numbers of 2 or more between commas, for example 4,8,16")
    return counts


def num_steps(sampler: str, calls: int) -> int:
    """Most steps of `sampler` with no more than `calls` calls."""
    return calls // 2 if sampler == "heun" else calls


def figure(panel: str, sampler: str, at_most: int, calls: int, rms: float) -> dict[str, Any]:
    """One point of the plot: asked for at most so many calls, made with `calls`; NonFiniteError."""
    if not rms < float("inf"):
        raise NonFiniteError(f"{sampler} with {calls} calls: the error is {rms}; look at the bundle with ul-generate")
    return {"panel": panel, "sampler": sampler, "at_most": at_most, "calls": calls, "rms": rms}


def mixture_mean(z: "np.ndarray", logsnr: float) -> "np.ndarray":
    """E[x | z_t], z `n`, for an even mixture of N(c, WIDTH^2), c in CENTRES."""
    import numpy as np

    from ul_runtime.diffusion import alpha, sigma

    a, centres = float(alpha(logsnr)), np.array(CENTRES)
    variance = a**2 * WIDTH**2 + float(sigma(logsnr)) ** 2
    off = z[:, None] - a * centres
    log_share = -(off**2) / (2.0 * variance)
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    means = centres + a * WIDTH**2 / variance * off
    return (share * means).sum(axis=1) / share.sum(axis=1)


def exact_figures(counts: list[int], grid: str, seed: int) -> Iterator[dict[str, Any]]:
    """Every sampler on the mixture from logsnr -10 to 5, over NUM_POINTS quantiles of the start.

    Noise is these quantiles in a random order: stochastic samplers come down to about 0.005, no further.
    """
    import numpy as np

    from ul_runtime.samplers import B_0, B_1, B_2, LOGSNR, A, S, sampler_table

    draw = np.random.default_rng(seed)
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / NUM_POINTS) for i in range(NUM_POINTS)])

    def sample(sampler: str, steps: int) -> tuple[int, np.ndarray]:
        table = sampler_table(sampler, grid, steps, logsnr_min=-10.0, logsnr_max=5.0, ends_clean=False)
        z, pred_1, pred_2 = quantiles, np.zeros(NUM_POINTS), np.zeros(NUM_POINTS)
        for row in table:
            pred = mixture_mean(z, row[LOGSNR])
            z = row[A] * z + row[B_0] * pred + row[B_1] * pred_1 + row[B_2] * pred_2
            z = z + row[S] * draw.permutation(quantiles) if row[S] else z
            pred_1, pred_2 = pred, pred_1
        return len(table), np.sort(z)

    _, exact = sample(REFERENCE, EXACT_STEPS)
    for sampler in (*DETERMINISTIC, *STOCHASTIC):
        for count in counts:
            calls, z_0 = sample(sampler, num_steps(sampler, count))
            yield figure("exact", sampler, count, calls, float(np.sqrt(np.mean((z_0 - exact) ** 2))))


def bundle_figures(
    pipeline: "Pipeline", settings: "Settings", counts: list[int], images: int, seed: int, reference_steps: int
) -> list[dict[str, Any]]:
    """z_0 and image of the deterministic samplers; also of the reference with half its steps, to show its own error."""
    from dataclasses import replace

    import numpy as np

    from ul_runtime.progress import progress
    from ul_runtime.settings import label_cycle

    plan = [(REFERENCE, reference_steps), (REFERENCE, reference_steps // 2)]
    plan += [(sampler, count) for sampler in DETERMINISTIC for count in counts]
    loops = [{"sampler": sampler, "num_steps": num_steps(sampler, count)} for sampler, count in plan]
    priors = [replace(settings, prior=replace(settings.prior, **loop)) for loop in loops]
    decoders = [replace(settings.decoder, **loop) for loop in loops]
    prior_calls = [len(pipeline.prior_table(prior.prior)) for prior in priors]
    decoder_calls = [len(pipeline.decoder_table(decoder)) for decoder in decoders]
    cycle = np.array(label_cycle(None, pipeline.manifest.classes))
    errors: dict[str, list[list[np.ndarray]]] = {"z_0": [[] for _ in plan], "image": [[] for _ in plan]}
    with progress("samplers", images * (sum(prior_calls) + sum(decoder_calls)), "calls") as tick:
        for first in range(0, images, pipeline.default_batch_size):
            at = np.arange(first, min(images, first + pipeline.default_batch_size))
            label = cycle[at % len(cycle)]
            z_0 = pipeline.sample_z_0(at, label, seed, priors[0], tick)
            x = pipeline.sample_x(z_0, at, seed, decoders[0], tick)
            for i in range(1, len(plan)):
                errors["z_0"][i].append(rms(pipeline.sample_z_0(at, label, seed, priors[i], tick) - z_0))
                errors["image"][i].append(rms(pipeline.sample_x(z_0, at, seed, decoders[i], tick) - x))
    return [
        figure(
            panel, "reference" if i == 1 else sampler, count, calls[i], float(np.concatenate(errors[panel][i]).mean())
        )
        for panel, calls in (("z_0", prior_calls), ("image", decoder_calls))
        for i, (sampler, count) in enumerate(plan)
        if i > 0
    ]


def rms(difference: "np.ndarray") -> "np.ndarray":
    """Root mean square of each image or latent of `b c h w`, `b`."""
    import numpy as np

    return np.sqrt(np.mean(difference.astype(np.float64) ** 2, axis=(1, 2, 3)))


def panels(record: dict[str, Any], key: str) -> dict[str, dict[str, dict[int, float]]]:
    """panel -> sampler -> calls (`key`: calls or at_most) -> error."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in record["figures"]:
        found.setdefault(row["panel"], {}).setdefault(row["sampler"], {})[row[key]] = row["rms"]
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown: a table a panel, a row a sampler, a column a number of calls."""
    from ul_train.sweep import markdown_table

    lines: list[str] = []
    for panel, samplers in panels(record, "at_most").items():
        reference = samplers.pop("reference", {})
        columns = [PANELS[panel], *(f"{count} calls" for count in samplers[REFERENCE])]
        rows = ([sampler, *(f"{error:.2g}" for error in errors.values())] for sampler, errors in samplers.items())
        lines += markdown_table(columns, rows)
        lines += ["", *(f"The reference with half its steps: {error:.2g}.\n" for error in reference.values())]
    how = f"{record['num_images']} images, against {record['reference']}. " if "bundle" in record else ""
    return "\n".join([*lines, f"{how}Seed {record['seed']}. `{record['command']}`", ""])


def plot(record: dict[str, Any]) -> bytes:
    """PNG: error over calls, one plot a panel, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from ul_train.log import figure_png

    found = panels(record, "calls")
    canvas = Figure(figsize=(6.5 * len(found), 5.0), layout="constrained")
    colours = {sampler: f"C{i}" for i, sampler in enumerate((*DETERMINISTIC, *STOCHASTIC))}
    for axes, (panel, samplers) in zip(canvas.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for error in samplers.pop("reference", {}).values():
            axes.axhline(error, color="grey", linestyle=":", label="reference, half its steps")
        for sampler, errors in samplers.items():
            style = "s--" if sampler in STOCHASTIC else "o-"
            axes.loglog(*zip(*sorted(errors.items()), strict=True), style, color=colours[sampler], label=sampler, ms=4)
        axes.set_xticks(list(samplers[REFERENCE]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel="network calls", ylabel="root-mean-square error", title=PANELS[panel])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure_png(canvas, 110)


if __name__ == "__main__":
    run_command(app, "solver_error")
