"""Figures of matplotlib as files."""

from collections.abc import Iterable
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure_png(figure: "Figure", dpi: int) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    data = BytesIO()
    figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    return data.getvalue()


def name_points(axes: "Axes", points: Iterable[tuple[float, float, str]]) -> None:
    """Write the name of each point (x, y, name) beside it, above and below in turn along x."""
    for number, (x, y, name) in enumerate(sorted(points)):
        offset, edge = ((4, 6), "bottom") if number % 2 == 0 else ((4, -6), "top")
        axes.annotate(name, (x, y), offset, textcoords="offset points", verticalalignment=edge)
