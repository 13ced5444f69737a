"""ul-train from its command line: what it writes and shows, signals, resume, full disks, dry runs, reports."""

import errno
import io
import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command import Runner
from disk import Disk
from PIL import Image
from rich.console import Console
from tiny_run import SHORT, blobs, image_set, refuses, tree, write_npz

from ul_runtime.cli.command import run_command
from ul_runtime.errors import UsageError
from ul_train.account import account
from ul_train.cli import main
from ul_train.config import load_config, preset_names
from ul_train.log import RunLog
from ul_train.plan import for_minutes, plan_table, seconds_of_stages

KEPT = sorted(
    ["config.toml", "run.json", "log.jsonl", "report.json", "report.png", "checkpoints", "previews", "tensorboard"]
)


pytestmark = pytest.mark.usefixtures("one_thread")


def signal_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, number: signal.Signals) -> None:
    log_step = RunLog.step

    def step_and_signal(self: RunLog, at_stage: str, at: int, figures: dict[str, float]) -> None:
        log_step(self, at_stage, at, figures)
        if (at_stage, at) == (stage, step):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "step", step_and_signal)


# runs


def test_one_command_trains_both_stages_and_prints_the_held_out_figures(
    command: Runner, train_options: list[Any], tmp_path: Path
) -> None:
    result = command(main, "tiny", *train_options, *SHORT, "--json")
    assert result.code == 0, result
    figures = json.loads(result.out)
    assert figures["base"] == "base-000004"
    assert {"bits_per_pixel", "psnr_db", "psnr_mean_db", "latent_std"} <= figures.keys()
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == KEPT
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["base-000002", "base-000004", "joint-000002", "joint-000004"]
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["base-000004.png", "joint-000004.png"]
    assert not (tmp_path / "never").exists()


@pytest.mark.case(
    "N11",
    "progress of a run of two stages",
    "it says the epoch, and of which stage the time is left; there is a preview of the last step of each stage",
)
def test_the_screen_shows_short_lines_with_the_figures_that_matter(
    command: Runner, train_options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = command(main, "tiny", *train_options, *SHORT).err.splitlines()
    assert lines[0].startswith("38 training and 2 held-out images of 16 px, 2 classes, from ")
    assert lines[1].startswith("images of each class: ")
    assert lines[2].endswith("cpu, fp32, 1 threads")
    starts = ("joint 4/4  prior ", "joint 4/4  held-out ", "base 4/4  base ")
    joint, heldout, base = (next(line for line in lines if line.startswith(start)) for start in starts)
    for word in (" nats  decoder ", " bits/pixel", " images/s  epoch 0.4  0:00:00 left of stage 1/2"):
        assert word in joint
    assert heldout.endswith(" dB")
    assert max(map(len, (joint, heldout, base))) < 120


def test_a_terminal_shows_a_bar_with_its_figures_below_and_messages_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["ul-train"])
    log, app = RunLog(tmp_path, 1), typer.Typer()

    @app.command()
    def train() -> None:
        with log.stage("joint", 3, 8, 0, 16):
            losses = {"prior_nats": 70.123, "decoder_nats": 150.0, "latent_std": 1.0}
            log.step("joint", 1, losses | {"bits_per_pixel": 0.4})
            log.evaluation("joint", 1, {"bits_per_pixel": 0.3, "psnr_db": 7.0})
            logging.getLogger("ul_train.train").info("a message")

    with pytest.raises(SystemExit):
        run_command(app, "ul-train")
    log.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    for text in ("joint, epoch 0.5", "1/3, left:", "prior 70.12 nats  decoder 150 nats  0.4 bits/pixel", "a message\n"):
        assert text in shown
    assert "held-out 0.3 bits/pixel  PSNR 7.00 dB at step 1" in shown


def test_joint_then_base_apart_equal_one_command(
    command: Runner, train_options: list[Any], finished: Path, tmp_path: Path
) -> None:
    apart = [*train_options[:-1], tmp_path / "apart"]
    assert command(main, "tiny", *apart, *SHORT, "--stage", "joint").code == 0
    assert command(main, tmp_path / "apart", "--resume", "--stage", "base", *train_options[2:4]).code == 0
    for name in ("joint-000004/weights", "joint-000004/ema", "base-000004/ema", "base-000004/optimizer"):
        file = f"checkpoints/{name}.safetensors"
        assert (finished / file).read_bytes() == (tmp_path / "apart" / file).read_bytes()


def test_images_of_one_class_are_trained_on_and_that_is_said(command: Runner, tmp_path: Path) -> None:
    (tmp_path / "in" / "only").mkdir(parents=True)
    for number, image in enumerate(blobs(8)[0]):
        Image.fromarray(image[0]).save(tmp_path / "in" / "only" / f"{number}.png")
    steps = [*SHORT, "--set", "stages.joint.steps=1", "--set", "stages.base.steps=1"]
    result = command(
        main, "tiny", "--data", tmp_path / "in", "--cache", tmp_path / "c", "--out", tmp_path / "o", *steps
    )
    assert result.code == 0, result
    assert "one class only (only)" in result.err


# signals


@pytest.mark.parametrize(("stage", "step", "number"), [("joint", 3, signal.SIGINT), ("base", 1, signal.SIGTERM)])
def test_a_signal_saves_and_resume_completes_the_run_as_if_unbroken(
    command: Runner,
    train_options: list[Any],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    step: int,
    number: signal.Signals,
) -> None:
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        signal_at(patch, stage, step, number)
        result = command(main, "tiny", *train_options[:-1], run, *SHORT)
    assert result.code == 75
    assert result.out == ""
    last = result.err.splitlines()[-1]
    assert last == f"ul-train: stopped at step {step} of 4 of stage {stage}, saved; go on with ul-train {run} --resume"
    assert (run / "checkpoints" / f"{stage}-{step:06d}").is_dir()
    assert not (run / ".lock").exists()
    again = command(main, run, "--resume", *train_options[2:4], "--report-images", 2)
    assert again.code == 0, again
    for name in ("joint-000004/ema", "base-000004/ema", "base-000004/optimizer"):
        file = f"checkpoints/{name}.safetensors"
        assert (run / file).read_bytes() == (finished / file).read_bytes()


def test_a_signal_in_the_held_out_report_says_how_to_go_on(
    command: Runner, train_options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, "joint", 4, signal.SIGTERM)  # the last step: the stage is finished and saved
        result = command(main, "tiny", *train_options, *SHORT)
    assert result.code == 75
    assert "stopped in the held-out report, stage joint is saved; go on with ul-train" in result.err
    assert not (tmp_path / "run" / "report.json").exists()
    assert command(main, tmp_path / "run", "--resume", *train_options[2:4], "--stage", "joint").code == 0
    assert (tmp_path / "run" / "report.json").exists()


def test_a_signal_while_images_are_prepared_leaves_neither_run_nor_half_a_cache(
    command: Runner, tmp_path: Path, image_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ul_train.data import write

    convert = write.convert

    def convert_and_signal(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(write, "convert", convert)
        return convert(*arguments)

    monkeypatch.setattr(write, "convert", convert_and_signal)
    run = ["--data", image_store / "blobs.npz", "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    message = "stopped while preparing the images; run the same command again"
    (tmp_path / "cache").mkdir()
    refuses(command, tmp_path, 75, message, "tiny", *run, *SHORT)


# resume


def test_a_finished_run_is_left_alone(command: Runner, finished: Path, image_store: Path) -> None:
    before = {name: data for name, data in tree(finished).items() if not name.startswith("tensorboard")}
    result = command(main, finished, "--resume", "--cache", image_store / "cache", "--json")
    assert result.code == 0
    assert json.loads(result.out)["base"] == "base-000004"
    assert "stage joint is finished at step 4\nstage base is finished at step 4\n" in result.err
    assert {name: data for name, data in tree(finished).items() if not name.startswith("tensorboard")} == before


def test_a_run_with_its_own_held_out_images_resumes_from_any_folder_with_nothing_more(
    command: Runner, image_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npz(tmp_path / "train.npz", 20)
    write_npz(tmp_path / "held.npz", 6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UL_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        signal_at(patch, "joint", 1, signal.SIGTERM)
        run = ["--data", "train.npz", "--heldout", "held.npz", "--out", "run", "--stage", "joint"]
        assert command(main, "tiny", *run, *SHORT).code == 75
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = command(main, tmp_path / "run", "--resume", "--stage", "joint", "--report-images", 1)
    assert result.code == 0, result
    assert "20 training and 6 held-out images" in result.err


# disks


class FillingDisk(Disk):
    """Has no room from the first write to a path with `name` in it."""

    def __init__(self, name: str) -> None:
        self.name, self.full = name, False

    def _open(self, path: Path) -> None:
        self.full = self.full or self.name in str(path)

    def create(self, path: Path) -> int:
        self._open(path)
        return super().create(path)

    def open_to_append(self, path: Path) -> int:
        self._open(path)
        return super().open_to_append(path)

    def write(self, fd: int, data: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)


@pytest.mark.case("R5", "a disk that fills up while ul-train saves", "the line ends with ul-train RUN --resume")
@pytest.mark.parametrize("name", ["config.toml", "log.jsonl", "joint-000004", "previews"])
def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_whole_checkpoints(
    command: Runner, train_options: list[Any], tmp_path: Path, name: str
) -> None:
    with FillingDisk(name).in_use():
        result = command(main, "tiny", *train_options, *SHORT, "--stage", "joint")
    assert result.code == 74, result
    last = result.err.splitlines()[-1]
    assert last.startswith("ul-train: ")
    assert "No space left on device; free space on this disk and run again" in last
    assert name in last
    assert last.endswith(f"; to go on: ul-train {tmp_path / 'run'} --resume") == (name != "config.toml")
    assert "Traceback" not in result.err
    assert not list(tmp_path.glob("run/**/*.tmp"))
    saved = {path.name for path in tmp_path.glob("run/checkpoints/*")}
    assert saved == ({"joint-000002"} if name in ("joint-000004", "previews") else set())


def test_a_full_disk_under_tensorboard_is_one_line_too(
    command: Runner, train_options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    result = command(main, "tiny", *train_options, *SHORT)
    assert result.code == 74
    assert "No space left on device" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


# dry run and report


@pytest.mark.parametrize("preset", preset_names())
def test_a_dry_run_writes_nothing(
    command: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "UL_CACHE", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = command(main, preset, "--out", "run", "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert f"{preset}: networks" in result.out
    assert "not looked at: give --data" in result.out
    assert tree(tmp_path) == {}


@pytest.mark.case(
    "N4",
    "--dry-run with a folder of images, and with one that is not there",
    "counts, classes, what is rejected, epochs and measured time of each stage; a missing folder ends with code 65",
)
def test_a_dry_run_looks_at_the_data(command: Runner, train_options: list[Any], tmp_path: Path) -> None:
    steps = ("--set", "stages.joint.steps=76", "--set", "stages.joint.batch_size=4", "--threads", 1)
    result = command(main, "tiny", *train_options, *steps, "--dry-run", "--json")
    assert result.code == 0, result
    data = json.loads(result.out)["account"]["data"]
    assert (data["num_train"], data["num_heldout"]) == (38, 2)
    assert sum(data["class_counts"].values()) == 38
    assert data["class_counts"].keys() == {"disc", "bar"}
    assert data["epochs"]["joint"] == 8
    assert all(seconds > 0 for seconds in data["seconds"].values())
    shown = command(main, "tiny", *train_options, *steps, "--dry-run").out
    assert re.search(r"stage joint\W+8 epochs, about \d+:\d\d:\d\d on this machine", shown), shown
    assert not (tmp_path / "run").exists()
    refuses(command, tmp_path, 65, "nosuchdir: does not exist", "tiny", "--data", "nosuchdir", "--dry-run")


@pytest.mark.case("N4")
def test_a_step_that_is_too_large_for_a_cpu_is_not_measured() -> None:
    config = load_config("photo-256", [])
    figures = account(config, 2)
    assert seconds_of_stages(config, image_set(), torch.device("cpu"), figures) is None
    shown = io.StringIO()
    data = {"num_train": 2, "num_heldout": 1, "class_counts": {"[red]": 2}, "rejected": {}, "converted": {}}
    data |= {"epochs": {"joint": 3.0}, "seconds": None, "measured_on": ""}
    Console(file=shown, width=100).print(plan_table(figures | {"data": data}))
    assert "3 epochs, time not measured" in shown.getvalue()
    assert "[red] 2" in shown.getvalue()


@pytest.mark.case(
    "N8",
    "a recipe saved by ul-train color-64 --dry-run > mine.toml",
    "--print-recipe prints the recipe alone, and the file is a recipe",
)
def test_a_printed_recipe_is_a_recipe(command: Runner, tmp_path: Path) -> None:
    result = command(main, "color-64", "--set", "stages.base.steps=77", "--print-recipe")
    assert (result.code, result.err) == (0, "")
    (tmp_path / "mine.toml").write_text(result.out)
    assert load_config(str(tmp_path / "mine.toml"), []) == load_config("color-64", ["stages.base.steps=77"])


@pytest.mark.case(
    "N10",
    "steps for a slow machine, guessed by hand",
    "--minutes M scales the steps of all stages to about M minutes, measured by some steps; the recipe keeps them",
)
def test_minutes_scale_all_that_is_counted_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("quickstart", [])
    took = {"joint": 300.0, "base": 300.0}
    monkeypatch.setattr("ul_train.plan.seconds_of_stages", lambda *_: took)
    shorter = for_minutes(config, 5.0 / 0.85, image_set(), torch.device("cpu"))
    assert (shorter.stages.joint.steps, shorter.stages.base.steps) == (300, 300)
    assert (shorter.stages.joint.warmup_steps, shorter.objective.prior_ramp_steps, shorter.run.eval_every) == (
        25, 125, 150,
    )  # fmt: skip
    with pytest.raises(UsageError, match="takes 10 minutes on this machine"):
        for_minutes(config, 0.01, image_set(), torch.device("cpu"))


@pytest.mark.case("N10")
def test_a_run_of_some_minutes_keeps_its_steps(
    command: Runner, train_options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ul_train.plan.seconds_of_stages", lambda *_: {"joint": 1.0, "base": 1.0})
    result = command(main, "tiny", *train_options, *SHORT, "--minutes", 0.1, "--threads", 1)
    assert result.code == 0, result
    assert "steps for 0.1 minutes: joint 10, base 10\n" in result.err
    assert load_config(str(tmp_path / "run/config.toml"), []).stages.joint.steps == 10
    assert (tmp_path / "run/checkpoints/joint-000010").is_dir()
    refuses(command, tmp_path, 2, "--minutes: is for a new run", tmp_path / "run", "--resume", "--minutes", 5)
    refuses(
        command, tmp_path, 2, "--minutes nan: expected a number above 0", "tiny", *train_options, "--minutes", "nan"
    )


def test_a_report_of_a_finished_run_measures_it_again(command: Runner, finished: Path, image_store: Path) -> None:
    events = list(finished.glob("tensorboard/*"))
    few = ["--images", 2, "--mean-of", 2, "--decoder-steps", 1, "--cache", image_store / "cache", "--json"]
    result = command(main, "report", finished, *few)
    assert result.code == 0, result
    figures = json.loads(result.out)
    assert (figures["num_images"], figures["mean_of"], figures["decoder_steps"]) == (2, 2, 1)
    assert json.loads((finished / "report.json").read_text())["decoder_steps"] == 1
    assert list(finished.glob("tensorboard/*")) == events


def test_a_report_of_an_unfinished_run_says_how_far_it_is(
    command: Runner, finished: Path, image_store: Path, tmp_path: Path
) -> None:
    shutil.rmtree(finished / "checkpoints" / "joint-000004")
    message = f"{finished}: stage joint is at step 2 of 4; finish it with ul-train {finished} --resume"
    refuses(command, tmp_path, 65, message, "report", finished, "--cache", image_store / "cache")
    refuses(command, tmp_path, 65, "no run.json in it", "report", tmp_path, "--cache", image_store / "cache")
