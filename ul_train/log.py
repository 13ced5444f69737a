"""Figures of a run: progress on stderr, log.jsonl, TensorBoard events. All three from one stream of figures."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ul_runtime.files import durable
from ul_runtime.files.json_file import parse_object

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


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


_LINE_EVERY_S = 10.0
_ON_SCREEN = {
    "bits_per_pixel": "{:.3g} bits/pixel",
    "psnr_db": "PSNR {:.2f} dB",
    "squared_error": "squared error {:.3g}",
    "teacher_mse": "squared difference to the teacher {:.3g}",
    "images_per_s": "{:.3g} images/s",
}


def on_screen(figures: dict[str, float]) -> str:
    """The figures that matter while one waits, in short: losses in nats, rate, PSNR, speed."""
    parts = []
    for name, value in figures.items():
        if name.endswith("_nats"):
            parts.append(f"{name.removesuffix('_nats')} {value:.4g} nats")
        elif name in _ON_SCREEN:
            parts.append(_ON_SCREEN[name].format(value))
    return "  ".join(parts)


class RunLog:
    """Figures of a run by (stage, step). Losses on screen are means over the steps since the last line.

    `sums`: of each figure since then, (sum, number); a checkpoint keeps them, so that a resume continues the means.
    """

    def __init__(self, run: Path, log_every: int) -> None:
        self.run, self.log_every = run, log_every
        self.sums: dict[str, tuple[float, int]] = {}
        self._writer: SummaryWriter | None = None
        self._bar: Progress | None = None  # on a terminal: a bar, and two rows of figures below it
        self._figures: Progress
        self._tasks: tuple[TaskID, TaskID, TaskID]  # bar, training figures, held-out figures
        self._started = self._last_line = 0.0
        self._first_step = self._steps = self._batch_size = self._num_images = 0
        self.place = ""  # of the stage among those of the run, as progress says it

    @contextmanager
    def stage(self, name: str, steps: int, batch_size: int, first_step: int, num_images: int) -> Iterator[None]:
        """Progress of one stage, from `first_step` to `steps`, on so many different images."""
        self._steps, self._batch_size, self._first_step = steps, batch_size, first_step
        self._num_images = num_images
        self._started = self._last_line = time.monotonic()
        if not sys.stderr.isatty():
            yield
            return
        text = TextColumn("{task.description}", markup=False)
        count = TextColumn("{task.completed}/{task.total}, left:")
        bar = Progress(text, BarColumn(20), count, TimeRemainingColumn(), speed_estimate_period=60.0)
        figures = Progress(text)
        self._bar, self._figures = bar, figures
        first_row = bar.add_task(name, total=steps, completed=first_step)
        self._tasks = first_row, figures.add_task(""), figures.add_task("", visible=False)
        with Live(Group(bar, figures), console=Console(stderr=True), refresh_per_second=4):
            try:
                yield
            finally:
                self._bar = None

    def step(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """Figures of one training step; written every `log_every` steps as means over those that are finite."""
        for name, value in figures.items():
            if math.isfinite(value):
                total, number = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + value, number + 1
        if self._bar is not None:
            self._bar.update(self._tasks[0], completed=step, description=f"{stage}{self.place}, {self._epoch(step)}")
        if step % self.log_every and step != self._steps:
            return
        means = {name: total / number for name, (total, number) in self.sums.items()}
        self.sums = {}
        now = time.monotonic()
        figures = {**means, "images_per_s": (step - self._first_step) * self._batch_size / (now - self._started)}
        self.write(stage, step, figures)
        if self._bar is not None:
            self._figures.update(self._tasks[1], description=on_screen(figures))
        elif now - self._last_line >= _LINE_EVERY_S or step == self._steps:
            self._last_line = now
            left = (self._steps - step) * (now - self._started) / (step - self._first_step)
            took = timedelta(seconds=round(left))
            where = f"{self._epoch(step)}  {took} left{self.place}"
            logger.info(f"{stage} {step}/{self._steps}  {on_screen(figures)}  {where}")

    def _epoch(self, step: int) -> str:
        return f"epoch {step * self._batch_size / self._num_images:.1f}"

    def write(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """One JSON line, and one TensorBoard scalar a figure."""
        line = {"stage": stage, "step": step, **{name: float(f"{value:.7g}") for name, value in figures.items()}}
        durable.append_line(self.run / "log.jsonl", json.dumps(line, allow_nan=False))
        for name, value in figures.items():
            self._tensorboard().add_scalar(f"{stage}/{name}", value, step)

    def evaluation(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """Held-out figures: logged, and kept below the bar until the next ones."""
        self.write(stage, step, {f"heldout_{name}": value for name, value in figures.items()})
        text = f"held-out {on_screen(figures)}"
        if self._bar is None:
            logger.info(f"{stage} {step}/{self._steps}  {text}")
        else:
            self._figures.update(self._tasks[2], description=f"{text} at step {step}", visible=True)

    def warn(self, text: str, stage: str | None = None, step: int = 0) -> None:
        """A warning on stderr and in the log, of a step of a stage, which a resume may do again."""
        logger.warning(f"warning: {text}")
        of_step = {} if stage is None else {"stage": stage, "step": step}
        durable.append_line(self.run / "log.jsonl", json.dumps(of_step | {"warning": text}))

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()

    def _tensorboard(self) -> "SummaryWriter":
        if self._writer is None:  # no events file for a run that logs nothing
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run / "tensorboard"))
        return self._writer


def drop_lines_after(run: Path, order: Sequence[str], stage: str, step: int) -> None:
    """On resume: remove the log's lines of steps that will be done again, and of stages after it in `order`."""
    file = run / "log.jsonl"
    with suppress(FileNotFoundError):
        kept = []
        for line in file.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line cut by a crash, or none of ours
                entry = parse_object(line)
                place = (order.index(entry["stage"]), int(entry["step"])) if "stage" in entry else (0, 0)
                if place <= (order.index(stage), step):
                    kept.append(line + b"\n")
        durable.atomic_write(file, b"".join(kept))
