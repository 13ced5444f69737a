"""What ul-train refuses: the exit code, one line that says what to do, and nothing half written."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import Runner
from disk import Disk
from tiny_run import SHORT, refuses, tree, write_npz

from ul_runtime.errors import OutputError, UsageError
from ul_runtime.files import durable
from ul_train import train as commands
from ul_train.checks import check_description, check_disk
from ul_train.cli import main
from ul_train.config import load_config
from ul_train.stages import stages_of

pytestmark = pytest.mark.usefixtures("one_thread")


# resume


@pytest.mark.case("C9", "a resume with another recipe", "refused with the fields that differ, unless allowed")
def test_another_recipe_is_refused_by_its_keys_unless_allowed(
    command: Runner, train_options: list[Any], finished: Path, tmp_path: Path
) -> None:
    change = ["--set", "objective.bias=1.5", "--set", "stages.base.steps=5"]
    resume = [finished, "--resume", *train_options[2:4], *change]
    keys = "objective.bias (run 0.0, now 1.5), stages.base.steps (run 4, now 5)"
    refuses(command, tmp_path, 2, keys, *resume)
    refuses(command, tmp_path, 2, "objective.bias (run 0.0, now 1.5); use", *resume, "--allow", "stages.base.steps")
    refuses(command, tmp_path, 2, "did you mean stages.base.steps?", *resume, "--allow", "base.steps")
    allowed = command(main, finished, "--resume", *train_options[2:4], *change[2:], "--allow", "stages.base.steps")
    assert allowed.code == 0, allowed
    assert (finished / "checkpoints" / "base-000005").is_dir()
    assert "[stages.base]\nsteps = 5\n" in (finished / "config.toml").read_text()


def test_other_data_is_refused(command: Runner, finished: Path, image_store: Path, tmp_path: Path) -> None:
    write_npz(image_store / "others.npz", 30)
    resume = [finished, "--resume", "--cache", image_store / "cache", "--data", image_store / "others.npz"]
    refuses(command, tmp_path, 2, "the data is not the run's: fingerprint ", *resume, data_said=True)


def test_a_damaged_checkpoint_is_refused_by_name(
    command: Runner, finished: Path, image_store: Path, tmp_path: Path
) -> None:
    file = finished / "checkpoints" / "joint-000004" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = tree(tmp_path)
    result = command(main, finished, "--resume", "--cache", image_store / "cache")
    assert result.code == 65
    last = result.err.splitlines()[-1]
    assert last.startswith(f"ul-train: {file}: ")
    assert "state.json says" in last
    assert "remove joint-000004 and resume from the checkpoint before" in last
    assert tree(tmp_path) == before


@pytest.mark.case("C10", "two processes on one run", "the second is refused and told who has it")
def test_a_run_in_use_is_refused(command: Runner, finished: Path, image_store: Path) -> None:
    resume = [finished, "--resume", "--cache", image_store / "cache"]
    with durable.lock_directory(finished):
        command.fails(main, 2, f"{finished}: in use by pid {os.getpid()} on ", *resume)


@pytest.mark.parametrize("missing", ["run.json", "config.toml"])
def test_a_run_that_misses_a_file_of_its_own_says_which(
    command: Runner, finished: Path, tmp_path: Path, missing: str
) -> None:
    (finished / missing).unlink()
    message = "holds no run" if missing == "run.json" else "config.toml: missing; restore"
    code = 2 if missing == "run.json" else 65
    refuses(command, tmp_path, code, message, finished, "--resume")


# a new run


@pytest.mark.case(
    "N17",
    "a run that is not there, a misspelled model, a JPEG for --replay",
    "each named: no such run; did you mean; JPEG",
)
def test_options_that_cannot_be_are_refused_at_once(command: Runner, train_options: list[Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    cases: list[tuple[int, str, list[Any]]] = [
        (2, "--data is missing", ["tiny", "--out", run]),
        (2, "--out is missing", ["tiny", *train_options[:2]]),
        (2, "--stage both: expected joint, base or all", ["tiny", *train_options, "--stage", "both"]),
        (2, "stage base needs a finished stage joint", ["tiny", *train_options, "--stage", "base"]),
        (2, "holds no run to resume; leave out --resume", ["tiny", *train_options, "--resume"]),
        (2, "--allow seed: is for --resume", ["tiny", *train_options, "--allow", "seed"]),
        (2, "neither a preset nor a file; did you mean fashion-32?", ["fashon-32", *train_options]),
        (2, "is a folder that holds no run", [tmp_path, *train_options]),
        (2, "runs/nope: no such run; give the directory that ul-train --out wrote", ["runs/nope", "--resume"]),
        (2, "--device tpu: ", ["tiny", *train_options, "--device", "tpu"]),
        (2, "--device meta: expected auto, cpu or cuda", ["tiny", *train_options, "--device", "meta"]),
        (
            2,
            "there is no key stages.joint.stepz; did you mean stages.joint.steps?",
            ["tiny", *train_options, "--set", "stages.joint.stepz=3"],
        ),
        (2, "seed = -1: input should be greater than or equal to 0", ["tiny", *train_options, "--set", "seed=-1"]),
        (
            2,
            "stages.joint.batch_size 8 must be a multiple of accumulate 3",
            ["tiny", *train_options, "--set", "stages.joint.accumulate=3"],
        ),
        (2, "--set 'seed': expected field=value", ["tiny", *train_options, "--set", "seed"]),
        (65, "nowhere: does not exist", ["tiny", "--data", tmp_path / "nowhere", "--out", run]),
    ]
    for code, message, arguments in cases:
        refuses(command, tmp_path, code, message, *arguments)
    if not torch.cuda.is_available():
        refuses(command, tmp_path, 2, "finds no CUDA device", "tiny", *train_options, "--device", "cuda")


def test_a_toml_file_with_an_unknown_key_offers_the_nearest(
    command: Runner, train_options: list[Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("latent_chanels = 4\n")
    message = "mine.toml: there is no key latent_chanels; did you mean latent_channels?"
    refuses(command, tmp_path, 2, message, recipe, *train_options)


def test_images_that_cannot_be_trained_on_are_refused_before_a_run_is_made(command: Runner, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no images")
    np.savez(tmp_path / "small.npz", images=np.zeros((9, 8, 8), np.uint8))
    cases = [
        ("empty", "no images in this folder"),
        ("notes", "no images in this folder"),
        ("small.npz", "all 9 images are smaller"),
    ]
    (tmp_path / "cache").mkdir()
    for name, message in cases:
        run = ["--data", tmp_path / name, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
        refuses(command, tmp_path, 65, message, "tiny", *run, "--set", "image.fit=crop")


def test_colour_images_for_a_grey_model_are_converted_and_counted(
    command: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npz(tmp_path / "colour.npz", 8, channels=3)
    monkeypatch.setattr(commands, "train_stages", lambda *_: None)
    run = ["--data", tmp_path / "colour.npz", "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    result = command(main, "tiny", *run, *SHORT)
    assert result.code == 0
    assert "converted: 7 " in result.err or "converted: 8 " in result.err


@pytest.mark.case("A9", "a recipe name that is long or has a control character", "refused before the images are opened")
@pytest.mark.parametrize("name", ["x" * 129, "a\tb", ""])
def test_a_recipe_name_that_no_bundle_can_hold_is_refused_at_once(
    command: Runner, train_options: list[Any], tmp_path: Path, name: str
) -> None:
    refuses(command, tmp_path, 2, "name = ", "tiny", *train_options, "--set", f'name="{name}"')


@pytest.mark.case("F2")
def test_more_class_names_than_a_bundle_has_room_for_are_refused_before_the_first_step(
    command: Runner, train_options: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ul_train.checks.MAX_DESCRIPTION", 1000)
    message = "2 class names take"
    refuses(command, tmp_path, 2, message, "tiny", *train_options, data_said=True)
    monkeypatch.undo()
    check_description(load_config("tiny", []), ("a", "b"))
    with pytest.raises(
        UsageError, match=r"no bundle can be made of this recipe: classes\.1: String should have at most"
    ):
        check_description(load_config("tiny", []), ("a", "b" * 129))


@pytest.mark.case("F2")
def test_a_disk_without_room_for_the_checkpoints_is_said_before_the_first_step(
    command: Runner, train_options: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = SimpleNamespace(free=3_000_000)
    monkeypatch.setattr("ul_train.checks.shutil.disk_usage", lambda _: free)
    message = "the checkpoints take 5.9 MiB, 2.9 MiB are free; free space, choose another --out, or keep fewer"
    refuses(command, tmp_path, 74, message, "tiny", *train_options, data_said=True)
    joint = stages_of(load_config("tiny", []), "joint")
    with pytest.raises(OutputError, match=r"take 3\.7 MiB"):
        check_disk(load_config("tiny", []), (), tmp_path / "new", joint)
    check_disk(load_config("tiny", ["run.keep_checkpoints=1"]), (), tmp_path / "new", joint)
    (tmp_path / "new" / "checkpoints" / "joint-000200").mkdir(parents=True)
    check_disk(load_config("tiny", []), (), tmp_path / "new", joint)


def test_an_output_folder_that_cannot_be_used_is_refused(
    command: Runner, train_options: list[Any], finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    start = ["tiny", *train_options[:4], "--out"]
    refuses(command, tmp_path, 2, "full: holds other things (thesis.tex)", *start, tmp_path / "full")
    refuses(command, tmp_path, 2, "file: is a file, a folder is expected", *start, tmp_path / "file")
    refuses(command, tmp_path, 74, "below: cannot write: Not a directory", *start, tmp_path / "file" / "below")
    refuses(command, tmp_path, 2, "holds a run already; add --resume", *start, finished)
    refuses(command, tmp_path, 2, "is a run directory; add --resume", finished)
    refuses(
        command,
        tmp_path,
        2,
        "goes on in its own directory",
        finished,
        "--resume",
        *train_options[-2:-1],
        tmp_path / "x",
    )
    with ReadOnlyDisk().in_use():
        message = "Read-only file system; choose a folder on a writable disk"
        refuses(command, tmp_path, 74, message, *start, tmp_path / "r")


class ReadOnlyDisk(Disk):
    def create(self, path: Path) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
