"""The figures of ul-bench for people: tables, and images per second against batch size as an image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ul_runtime.cli.options import print_table
from ul_runtime.files import durable
from ul_train.log import figure_png

_STEPS = {"prior_step": "prior step", "guided_prior_step": "guided prior step", "decoder_step": "decoder step"}
_WIDTH = 110  # of tables that no terminal limits


def print_report(result: Mapping[str, Any]) -> None:
    """Tables on stdout."""
    parts: list[Any] = [step_table(result), image_table(result)]
    for precision, ceiling in result["ceilings"].items():
        parts.append(f"ceiling {precision}: {ceiling['gflops_per_s']:.0f} GFLOP/s, {ceiling['by']}")
    if result["start_up"]:
        parts.append(start_up_table(result["start_up"]))
    machine = result["machine"]
    commit = f"; commit {result['commit']}" if result["commit"] else ""
    print_table(*parts, f"{machine['processor']}, {machine['processors']} CPUs{commit}", width=_WIDTH)


def step_table(result: Mapping[str, Any]) -> Table:
    """A row for each batch size and runner: the time of a step, and how far it is from the first runner's."""
    title = f"{result['bundle']['name']}, threads: {result['threads']}; ms a step, median (95th percentile)"
    table = Table("batch", "runner", title=title, title_justify="left")
    names = list(result["an_image"]["steps"])  # of students too
    for name in (*(_STEPS.get(step, step) for step in names), "largest difference"):
        table.add_column(name, justify="right")
    for row in result["results"]:
        steps = [row.get(step) for step in names]
        differences = [step["largest_difference"] for step in steps if step]
        times = (f"{step['median_ms']:.3g} ({step['p95_ms']:.3g})" if step else "" for step in steps)
        far = f"{max(differences):.1g}" if differences else ""
        table.add_row(str(row["batch_size"]), row["contender"], *times, far)
    return table


def image_table(result: Mapping[str, Any]) -> Table:
    """A row for each batch size and runner: whole images."""
    title = f"whole images, {result['an_image']['flops'] / 1e9:.3g} GFLOP each"
    table = Table("batch", "runner", title=title, title_justify="left")
    for name in ("images/s", "ms a batch", "of ceiling", "loop beyond graphs", "warm-up, s"):
        table.add_column(name, justify="right")
    for row in result["results"]:
        images = row["images"]
        share, loop = images["of_ceiling"], images.get("loop_overhead")
        table.add_row(
            str(row["batch_size"]),
            row["contender"],
            f"{images['images_per_s']:.3g}",
            f"{images['median_ms']:.4g} ({images['p95_ms']:.4g})",
            "" if share is None else f"{share:.1%}",
            "" if loop is None else f"{loop:.1%}",
            f"{row['warm_up_s']:.2f}",
        )
    return table


def start_up_table(started: Mapping[str, Mapping[str, float]]) -> Table:
    """Seconds in a fresh process."""
    table = Table("start-up, s", title="a fresh process", title_justify="left")
    columns = {
        "import": "import_s",
        "load": "load_s",
        "first image": "first_image_s",
        "next image": "next_image_s",
        "ul-generate -n 1": "ul_generate_s",
        "beyond sampling": "ul_generate_beyond_sampling_s",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for name, figures in started.items():
        table.add_row(name, *(f"{figures[key]:.2f}" if key in figures else "" for key in columns.values()))
    return table


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """Images per second at each batch size, a bar for each runner, as PNG. OutputError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row["contender"] for row in result["results"]))
    sizes = sorted({row["batch_size"] for row in result["results"]})
    for number, name in enumerate(names):
        rows = [row for row in result["results"] if row["contender"] == name]
        places = [sizes.index(row["batch_size"]) + (number + 0.5) * 0.8 / len(names) - 0.4 for row in rows]
        axes.bar(places, [row["images"]["images_per_s"] for row in rows], 0.8 / len(names), label=name)
    axes.set(xlabel="batch size", ylabel="images/s")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_title(f"{result['bundle']['name']}, threads: {result['threads']}, {result['machine']['processor']}")
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside right upper")
    durable.atomic_write(path, figure_png(figure, 120))
