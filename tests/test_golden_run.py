"""A run of this version, kept: later versions must open it, go on with it, and come to the same losses.

It is what `tiny_run.tiny` with narrow networks (its config.toml) gives of `tiny_run.splits`: four steps of stage joint,
six of base, of which the checkpoint of step 4 and the log are kept. A bundle is kept too: the model inside the package.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import train

from ul_train.run import Run

GOLDEN = Path(__file__).with_name("golden_run")


def losses(run: Path, stage: str) -> dict[int, float]:
    """Loss by step."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if entry.get("stage") == stage and "loss" in entry}


@pytest.mark.case(
    "C11",
    "a checkpoint that an earlier version wrote",
    "it is opened and trained on; losses of the next steps are equal",
)
def test_a_kept_run_goes_on_with_the_losses_that_it_had(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run = Run.open(Path(shutil.copytree(GOLDEN, tmp_path / "run")))
    (run.path / "previews").mkdir()
    expected = losses(GOLDEN, "base")
    train(run, "base")
    found = losses(run.path, "base")
    assert found.keys() == expected.keys() == set(range(1, 7))
    for step in (5, 6):  # these were done here
        assert found[step] == pytest.approx(expected[step], rel=1e-4)
    assert [path.name for path in run.checkpoints("base")] == ["base-000004", "base-000006"]


@pytest.mark.case("C11")
def test_a_kept_run_is_sampled(tmp_path: Path) -> None:
    snapshot = Run.open(GOLDEN).newest()
    assert (snapshot.stage, snapshot.step) == ("base", 4)
    assert snapshot.networks.keys() == {"encoder", "prior", "decoder"}
    assert snapshot.manifest().classes == ("disc", "bar")
