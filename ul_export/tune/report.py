"""What ul-tune found: tables for a terminal and in Markdown, and quality against cost."""

from typing import Any

from rich.table import Table

from ul_train.log import figure_png, name_points
from ul_train.sweep import markdown_table

FILES = ("tuning.md", "tuning.png")  # in the bundle
_COLUMNS = ("", "settings", "calls", "GFLOP an image", "distance, times the reference's", "recall")


def _rows(record: dict[str, Any]) -> list[list[str]]:
    given = {"reference": record["reference"], **record["presets"]}
    rows = []
    for name, each in given.items():
        recall = "" if each["recall"] is None else f"{each['recall']:.2f}"
        ratio = f"{each['ratio']:.2f}"
        rows.append([name, each["name"], str(each["calls"]), f"{each['flops'] / 1e9:.3g}", ratio, recall])
    return rows


def tables(record: dict[str, Any]) -> tuple[Table | str, ...]:
    """For people."""
    table = Table(*_COLUMNS, title=f"presets of {record['bundle']['name']}", title_justify="left")
    for row in _rows(record):
        table.add_row(*row)
    spaces = ", ".join(record["chosen_by"])
    said = f"{record['images']} images, {record['seeds']} seeds, {spaces}; in {record['out']}, default balanced"
    return table, said


def report_markdown(record: dict[str, Any]) -> str:
    """The presets, then every setting that came into the last round."""
    spaces = list(record["reference"]["frechet_distance"])
    columns = ["settings", "calls", "GFLOP", *(f"FD, {space}" for space in spaces), "recall"]
    rows = [
        [
            each["name"],
            str(each["calls"]),
            f"{each['flops'] / 1e9:.3g}",
            *(f"{each['frechet_distance'][space]:.2f}" for space in spaces),
            f"{each['recall']:.3f}",
        ]
        for each in sorted(record["trials"], key=lambda each: each["flops"])
    ]
    held = f" {record['held_out']} has chosen nothing." if record["held_out"] else ""
    lines = [
        f"# Presets of {record['bundle']['name']}",
        "",
        f"{record['images']} images, {record['seeds']} seeds, same labels and noise.{held}",
        "",
        *markdown_table(_COLUMNS, _rows(record)),
        "",
        *markdown_table(columns, rows),
        "",
        f"`{record['command']}`",
        "",
    ]
    return "\n".join(lines)


def pareto_plot(record: dict[str, Any]) -> bytes:
    """PNG: Frechet distance against FLOPs of an image, the presets named."""
    from matplotlib.figure import Figure

    space = record["chosen_by"][0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [(each["flops"] / 1e9, each["frechet_distance"][space]) for each in record["trials"]]
    axes.semilogx(*zip(*points, strict=True), ".", color="grey", label="settings")
    named = {"reference": record["reference"], **record["presets"]}
    found = [(each["flops"] / 1e9, each["frechet_distance"][space], name) for name, each in named.items()]
    axes.semilogx([x for x, _, _ in found], [y for _, y, _ in found], "o", color="C1", label="presets")
    name_points(axes, found)
    axes.set(xlabel="GFLOP an image", ylabel=f"Frechet distance, {space}", title=record["bundle"]["name"])
    axes.grid(alpha=0.3)
    axes.legend()
    return figure_png(figure, 110)
