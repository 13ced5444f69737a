"""Several runs of one recipe that differ in a few fields: each trained and measured once, in processes of their own.

What is finished is kept, so that the same command goes on where it stopped.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul_runtime import durable
from ul_train.processes import run_main

_REPORT_IMAGES = 16  # in the report at the end of training, which is not the one that counts


@dataclass(frozen=True)
class Variants:
    """A recipe, its images, the folder `runs` with a run directory in it each, and options that all commands share."""

    recipe: str
    data: str
    runs: Path
    shared: Sequence[str] = ()  # of ul-train and ul-train report: --threads, --cache, --heldout

    def train(self, name: str, overrides: Sequence[str], stage: str = "joint") -> Path:
        """The run called `name`, trained through `stage` (joint or all). A run of another recipe there is refused.

        Ends this process with the exit code of ul-train where that fails.
        """
        run = self.runs / name
        changes = [word for override in overrides for word in ("--set", override)]
        going_on = ["--resume"] if (run / "run.json").is_file() else []
        options = ["--out", str(run), "--stage", stage, "--report-images", str(_REPORT_IMAGES)]
        _ul_train(self.recipe, "--data", self.data, *options, *changes, *self.shared, *going_on)
        return run

    def measured(self, run: Path, images: int, mean_of: int) -> dict[str, Any]:
        """Held-out figures of a run by ul-train report, kept in measured.json with how they were taken."""
        file, asked = run / "measured.json", {"images": images, "mean_of": mean_of}
        record = json.loads(file.read_bytes()) if file.is_file() else {}
        if record.get("asked") != asked:
            options = ["--images", str(images), "--mean-of", str(mean_of)]
            _ul_train("report", str(run), "--data", self.data, *options, *self.shared)
            record = {"asked": asked, "figures": json.loads((run / "report.json").read_bytes())}
            durable.atomic_write(file, json.dumps(record).encode())
        return dict(record["figures"])


def _ul_train(*words: str) -> None:
    run_main("ul_train.cli", *words, name="ul-train")
