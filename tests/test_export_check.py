"""ul-export --check, and ul-train --export-check N, which runs it: a run that cannot be exported ends early."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Runner
from exported_run import PLAIN, Exported, exported_run
from random_run import write_run
from safetensors.numpy import load
from safetensors.numpy import save as save_weights
from tiny_run import SHORT, tree

from ul_export import export as export_command
from ul_export.cli import main as export
from ul_runtime.bundle import Bundle
from ul_train import checkpoint as ckpt
from ul_train import train as training
from ul_train.cli import main as train
from ul_train.sweep import run_to_end

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
FIGURES = {"worst_graph_difference", "worst_z_0_difference", "worst_image_psnr_db", "seconds"}


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_run(PLAIN, tmp_path_factory)


def check(command: Runner, run: Path, *options: Any) -> Any:
    return command(export, run, "--check", "--threads", 1, *options)


def test_a_finished_run_is_checked_as_by_an_export_and_nothing_is_written(plain, command):
    before = tree(plain.run)
    result = check(command, plain.run, "--json")
    assert result.code == 0, result
    figures = json.loads(result.out)
    assert set(figures) == FIGURES
    parity = Bundle.open(plain.bundle).manifest.parity
    of_the_same = [path["z_0"] for name, path in parity.items() if name.startswith("batch") and "seed" not in name]
    assert figures["worst_z_0_difference"] == max(of_the_same), "the export checks more images, of other seeds"
    assert "base step" in result.err
    assert tree(plain.run) == before


def test_a_run_without_a_base_is_checked_with_the_prior_of_stage_joint(command, tmp_path):
    write_run(tmp_path / "run", base=False)
    command.fails(export, 65, "has no base stage", tmp_path / "run", "--out", tmp_path / "bundle")
    result = check(command, tmp_path / "run")
    assert result.code == 0, result
    assert "joint step" in result.err
    assert float(result.out.split()[1]) > 0


def test_a_wrong_weight_fails_the_check(plain, command, monkeypatch):
    weights = {name: array.copy() for name, array in load(plain.files["prior.safetensors"]).items()}
    max(weights.values(), key=lambda array: array.size).reshape(-1)[0] += np.float32(0.1)
    files = plain.files | {"prior.safetensors": save_weights(weights)}
    monkeypatch.setattr(export_command, "export_graphs", lambda *arguments: dict(files))
    result = check(command, plain.run)
    assert (result.code, result.out) == (65, "")
    assert "do not equal torch" in result.err.splitlines()[-1]


def test_what_a_check_refuses(command, tmp_path):
    write_run(tmp_path / "run", base=False)
    for options in (("--out", tmp_path / "bundle"), ("--fp16",), ("--update", tmp_path), ("--overwrite",)):
        command.fails(export, 2, "--check writes nothing", tmp_path / "run", "--check", *options)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    command.fails(export, 65, "has no checkpoint yet", tmp_path / "run", "--check")


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.case("F2")
def test_training_with_checks_logs_what_they_found_and_trains_as_without(command, train_options, tmp_path):
    """A checkpoint is saved for each check, also at steps where the recipe saves none; the first is at step 1."""
    steps = ["--set", "run.checkpoint_every=100", "--set", "stages.base.steps=2"]
    options = [*train_options, *SHORT, *steps, "--threads", 1]
    result = command(train, "tiny", *options, "--export-check", 3)
    assert result.code == 0, result
    run = tmp_path / "run"
    found = {(line["stage"], line["step"]): set(line) for line in logged(run) if "export.seconds" in line}
    names = {f"export.{name}" for name in FIGURES} | {"stage", "step"}
    assert found == dict.fromkeys([("joint", 1), ("joint", 3), ("base", 1)], names)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("base-000001", "base-000002", "joint-000003", "joint-000004")
    ]
    plain = [*train_options[:-1], tmp_path / "plain", *options[len(train_options) :]]
    assert command(train, "tiny", *plain).code == 0
    checked, unchecked = (
        ckpt.load_checkpoint(tmp_path / name / "checkpoints" / "base-000002").ema for name in ("run", "plain")
    )
    assert all((checked[name] == unchecked[name]).all() for name in checked)


def test_a_check_that_fails_ends_training_with_its_exit_code_and_keeps_the_checkpoint(
    command, train_options, monkeypatch, tmp_path
):
    """The averaged weights that are saved hold NaN: ul-export refuses them in its own process."""
    save = ckpt.save_checkpoint

    def spoilt(folder: Path, state: ckpt.State, weights: Any, ema: Any, optimizer: Any) -> Path:
        name = max(ema, key=lambda each: ema[each].numel())
        return save(folder, state, weights, ema | {name: ema[name] * float("nan")}, optimizer)

    monkeypatch.setattr(ckpt, "save_checkpoint", spoilt)
    result = command(train, "tiny", *train_options, *SHORT, "--threads", 1, "--export-check", 2)
    assert result.code == 76, result
    assert "stage joint, step 1: the export check failed; the checkpoint is kept, training ends" in result.err
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["joint-000001"]
    assert "the export check failed" in logged(run)[-1]["warning"]


def test_a_signal_during_a_check_stops_training_with_all_saved(command, train_options, monkeypatch, tmp_path):
    """As Ctrl-C on a terminal, which reaches both processes."""
    stopped = "import os, signal; os.kill(os.getppid(), signal.SIGINT); raise SystemExit(75)"
    monkeypatch.setattr(training, "run_script", lambda *words: run_to_end([sys.executable, "-c", stopped]))
    result = command(train, "tiny", *train_options, *SHORT, "--export-check", 2)
    assert result.code == 75, result
    assert "stage joint, step 1: stopped in the export check, saved; go on with ul-train " in result.err
    monkeypatch.undo()
    result = command(train, tmp_path / "run", "--resume", *train_options[2:4])
    assert result.code == 0, result
