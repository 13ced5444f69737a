"""What a run says: progress on stderr, log.jsonl, TensorBoard events. All three from one stream of figures."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ul_runtime import durable

_LINE_EVERY_S = 10.0


class RunLog:
    """Figures of a run by (stage, step). Losses on screen are means over the steps since the last line."""

    def __init__(self, run: Path, log_every: int) -> None:
        self.run, self.log_every = run, log_every
        self.console = Console(stderr=True, highlight=False)
        self.writer = SummaryWriter(str(run / "tensorboard"))
        self.shown: dict[str, float] = {}
        self.sums: dict[str, list[float]] = {}
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._last_line = 0.0
        self._first_step = self._steps = self._batch_size = 0

    @contextmanager
    def stage(self, name: str, steps: int, batch_size: int, first_step: int) -> Iterator[None]:
        """Progress of one stage, from `first_step` to `steps`."""
        self.sums, self.shown = {}, {}
        self._steps, self._batch_size, self._first_step = steps, batch_size, first_step
        self._started = self._last_line = time.monotonic()
        if not sys.stderr.isatty():
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
        )
        columns += (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))  # type: ignore[assignment]
        with Progress(*columns, console=self.console, speed_estimate_period=60.0) as bar:
            self._bar, self._task = bar, bar.add_task(name, total=steps, completed=first_step, figures="")
            try:
                yield
            finally:
                self._bar = None

    def step(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """Figures of one training step; written every `log_every` steps as means."""
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(value)
        if step % self.log_every and step != self._steps:
            return
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        self.sums = {}
        rate = (step - self._first_step) * self._batch_size / (time.monotonic() - self._started)
        self.write(stage, step, {**means, "images_per_s": rate})
        self.shown |= {k: v for k, v in means.items() if k.endswith("_nats") or k == "bits_per_pixel"}
        self.shown["images_per_s"] = rate
        self._show(stage, step)

    def write(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """One JSON line, and one TensorBoard scalar a figure."""
        line = {"stage": stage, "step": step, **{name: float(f"{value:.7g}") for name, value in figures.items()}}
        durable.append_line(self.run / "log.jsonl", json.dumps(line))
        for name, value in figures.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)

    def evaluation(self, stage: str, step: int, figures: dict[str, float]) -> None:
        """Held-out figures: logged and kept on screen until the next ones."""
        self.write(stage, step, {f"heldout_{name}": value for name, value in figures.items()})
        self.shown |= {f"heldout_{name}": value for name, value in figures.items()}
        self._show(stage, step, now=True)

    def say(self, text: str) -> None:
        """One line on stderr, above the progress bar."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A warning on stderr and in the log."""
        self.say(f"warning: {text}")
        durable.append_line(self.run / "log.jsonl", json.dumps({"warning": text}))

    def close(self) -> None:
        """Flush TensorBoard."""
        self.writer.close()

    def _show(self, stage: str, step: int, now: bool = False) -> None:
        text = "  ".join(f"{name.replace('heldout_', 'held-out ')} {value:.4g}" for name, value in self.shown.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, figures=text)
            return
        time_now = time.monotonic()
        if now or time_now - self._last_line >= _LINE_EVERY_S or step == self._steps:
            self._last_line = time_now
            done = step - self._first_step
            left = (self._steps - step) * (time_now - self._started) / max(done, 1)
            self.say(f"{stage} {step}/{self._steps}  {left:.0f} s left  {text}")


def drop_lines_after(run: Path, stage: str, step: int) -> None:
    """On resume: remove the log's lines of steps that will be done again, and of later stages."""
    order = ("joint", "base")
    file = run / "log.jsonl"
    with suppress(FileNotFoundError):
        kept = []
        for line in file.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # a line cut by a crash
                entry = json.loads(line)
                place = (order.index(entry["stage"]), entry["step"]) if "stage" in entry else (0, 0)
                if place <= (order.index(stage), step):
                    kept.append(line + "\n")
        durable.atomic_write(file, "".join(kept).encode())
