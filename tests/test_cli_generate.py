"""ul-generate: pictures, provenance, resume, and one clear line for each mistake."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from analytic_bundle import MEANS, write_analytic_bundle
from disk import Disk
from PIL import Image, PngImagePlugin

import ul_runtime
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.cli.generate import _title, main
from ul_runtime.images.png import read_info, read_png
from ul_runtime.jobs import ImageFolder, _missing

FAST = ("--steps", 3, "--decoder-steps", 2, "--threads", 1)
QUIET = ("--backend", "ort-cpu")  # chosen by name, so that there is nothing to say about it


def tree(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_folder_gets_numbered_pngs_a_sheet_and_the_job(command, analytic_bundle, tmp_path):
    result = command(main, analytic_bundle, "--out", tmp_path / "out", "--num-images", 7, *FAST)
    assert result.code == 0, result
    names = [f"{i:06d}.png" for i in range(7)]
    assert sorted(tree(tmp_path / "out")) == [*names, "contact_sheet.png", "generate.json"]
    assert "7 images" in result.out
    job = json.loads((tmp_path / "out/generate.json").read_text())
    assert (job["num_images"], job["job"]["prior_num_steps"], job["job"]["decoder_num_steps"]) == (7, 3, 2)


def test_a_png_says_where_it_comes_from(command, analytic_bundle, tmp_path):
    command(main, analytic_bundle, "--out", tmp_path / "out", "--num-images", 2, "--seed", 9, *FAST)
    with Image.open(tmp_path / "out/000001.png") as picture:
        (text,) = picture.text.values()
    info = json.loads(text)
    expected = {"seed": 9, "prior_sampler": "dpmpp2m", "prior_num_steps": 3, "prior_grid": "uniform", "guidance": 1.0}
    expected |= {"backend": "ort-cpu", "precision": "fp32", "threads": None}
    assert expected.items() <= info["job"].items()
    assert (info["index"], info["label"]) == (1, "green")
    assert re.fullmatch(r"[0-9a-f]{64}", info["job"]["bundle"])
    assert info["software"].startswith("unified-latents ")


def test_the_title_of_the_sheet_counts_calls_of_the_networks(analytic_bundle):
    pipeline = ul_runtime.load(analytic_bundle, threads=1)
    settings = pipeline.settings(sampler="heun", steps=5, decoder_sampler="sa2:0.6", decoder_steps=3, guidance=2)
    title = _title(pipeline, 7, settings, ["red"])
    assert title == "analytic, red, seed 7, 10 heun + 3 sa2:0.6 calls, guidance 2"


def test_json_is_one_line_on_stdout(command, analytic_bundle, tmp_path):
    result = command(main, analytic_bundle, "--out", tmp_path / "out", "--num-images", 2, "--json", *FAST)
    assert result.out.count("\n") == 1
    assert json.loads(result.out)["made"] == 2


@pytest.mark.case(
    "G8", "images deleted, cut or changed between two runs of a job", "these alone are made again, with the same bytes"
)
def test_resume_makes_only_what_is_missing_or_damaged_and_equals_an_unbroken_run(command, analytic_bundle, tmp_path):
    out = tmp_path / "out"
    arguments = (analytic_bundle, "--out", out, "--num-images", 9, "--sampler", "ancestral", *FAST)
    command(main, *arguments)
    unbroken = tree(out)
    for index in (0, 4):
        (out / f"{index:06d}.png").unlink()
    (out / "000007.png").write_bytes(unbroken["000007.png"][:-40])
    (out / "000008.png").write_bytes(unbroken["000001.png"])
    kept = (out / "000003.png").stat().st_ino
    result = command(main, *arguments, "--batch-size", 2, "--json")
    assert json.loads(result.out)["made"] == 4
    assert tree(out) == unbroken
    assert (out / "000003.png").stat().st_ino == kept


@pytest.mark.case(
    "A6",
    "pictures removed or changed while a job runs, or before it goes on",
    "a job counts its pictures before it says that it is done; a picture of other pixels is made again",
)
def test_a_picture_of_other_pixels_with_the_same_text_is_made_again(command, analytic_bundle, tmp_path):
    out = tmp_path / "out"
    arguments = (analytic_bundle, "--out", out, "--num-images", 3, *FAST)
    command(main, *arguments)
    unbroken = tree(out)
    with Image.open(out / "000001.png") as picture:
        (text,) = picture.text.items()
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text(*text)
        changed = picture.point(lambda value: 255 - value)
    changed.save(out / "000001.png", pnginfo=chunk)
    assert read_info(read_png(out / "000001.png").texts, "it").index == 1
    assert json.loads(command(main, *arguments, "--json").out)["made"] == 1
    assert tree(out) == unbroken


@pytest.mark.case("A6")
@pytest.mark.parametrize(("gone", "ended"), [("000000.png", (74, True)), ("generate.json", (0, False))])
def test_a_job_that_has_lost_a_file_does_not_say_that_it_is_done(
    command, analytic_bundle, tmp_path, monkeypatch, gone, ended
):
    out = tmp_path / "out"
    write = ImageFolder.write

    def losing(folder, index, *rest):
        write(folder, index, *rest)
        if index == 3:  # others of its batch are written at the same time
            (out / gone).unlink()

    arguments = (analytic_bundle, "--out", out, "--num-images", 4, "--batch-size", 2, *FAST, *QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "write", losing)
        result = command(main, *arguments)
    assert (result.code, "run the same command again to make them" in result.err) == ended
    assert command(main, *arguments).code == 0
    assert len(tree(out)) == 6


@pytest.mark.case("A15", "the output folder replaced while a job runs; a pipe as job file", "one line, nothing written")
def test_nothing_is_written_into_a_folder_that_takes_the_place_of_the_jobs(
    command, analytic_bundle, tmp_path, monkeypatch
):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    write = ImageFolder.write

    def swapping(folder, index, *rest):
        write(folder, index, *rest)
        if index == 1:
            out.rename(tmp_path / "moved")
            out.symlink_to(other)

    monkeypatch.setattr(ImageFolder, "write", swapping)
    monkeypatch.setattr("ul_runtime.jobs._MOST_WRITERS", 1)
    arguments = (analytic_bundle, "--out", out, "--num-images", 6, "--batch-size", 2, *FAST, *QUIET)
    command.fails(main, 74, "another folder has this name since the job began", *arguments)
    assert tree(other) == {}


@pytest.mark.case("A15")
def test_a_pipe_in_place_of_the_job_file_is_refused_and_not_waited_for(command, analytic_bundle, tmp_path):
    os.mkfifo(tmp_path / "generate.json")
    command.fails(main, 65, "is not a job file", analytic_bundle, "--out", tmp_path, *FAST)


def test_a_job_may_be_extended_and_then_equals_a_fresh_run(command, analytic_bundle, tmp_path):
    for out, counts in (("grown", (3, 6)), ("fresh", (6,))):
        for count in counts:
            assert command(main, analytic_bundle, "--out", tmp_path / out, "--num-images", count, *FAST).code == 0
    assert tree(tmp_path / "grown") == tree(tmp_path / "fresh")


@pytest.mark.case("R16", "ul-generate into a folder of other steps", "the message names the option, --steps")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--seed", 1), "seed 0, now 1"),
        (("--label", "red"), "--label all classes in turn, now ['red']"),
        (("--guidance", 2), "guidance 1.0, now 2.0"),
        (("--decoder-steps", 5), "made with --decoder-steps 2, now 5"),
        (("--steps", 4), "made with --steps 3, now 4"),
        (("--num-images", 1), "holds a job of 2 images, now 1"),
    ],
)
@pytest.mark.case("G7", "a job continued with other settings", "refused, naming the option")
def test_a_folder_of_another_job_is_refused_naming_the_setting(command, analytic_bundle, tmp_path, changed, message):
    out = tmp_path / "out"
    command(main, analytic_bundle, "--out", out, "--num-images", 2, *FAST)
    before = tree(out)
    command.fails(main, 2, message, analytic_bundle, "--out", out, "--num-images", 2, *FAST, *changed)
    assert tree(out) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--num-images", 0), 2, "--num-images is 0; expected 1 or more"),
        (("--num-images", -4), 2, "--num-images is -4"),
        (("--num-images", 2**63 + 1), 2, "--num-images is 9223372036854775809; expected at most 100000000"),
        (("--steps", 0), 2, "number of steps is 0"),
        (("--decoder-steps", -1), 2, "number of steps is -1"),
        (("--label", "gren"), 2, "label 'gren' is not a class of the bundle; did you mean 'green'?"),
        (("--label", "car"), 2, "label 'car' is not a class of the bundle"),
        (("--label", "#7"), 2, "label '#7' is out of range; expected '#0' to '#2'"),
        (("--sampler", "euler"), 2, "sampler 'euler' is not known"),
        (("--guidance-interval", "3"), 2, "expected LO,HI"),
        (("--guidance-interval", "3,1"), 2, "expected LO below HI"),
        (("--batch-size", 0), 2, "batch size is 0"),
        (("--threads", 0), 2, "number of threads is 0"),
        (("--threads", 100000), 2, "number of threads is 100000; expected at most"),
        (("--seed", -1), 2, "the seed is -1"),
        (("--backend", "cuda"), 2, "backend 'cuda' is not known; expected one of auto, ort-cpu"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command, analytic_bundle, tmp_path, arguments, code, message):
    command.fails(main, code, message, analytic_bundle, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_missing_or_damaged_is_one_line(command, tmp_path):
    command.fails(main, 65, "nowhere", tmp_path / "nowhere", "--out", tmp_path / "out")
    bundle = write_analytic_bundle(tmp_path / "bundle").path
    data = bytearray((bundle / "prior.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "prior.safetensors").write_bytes(data)
    command.fails(main, 65, "prior.safetensors", bundle, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_other_things_is_left_alone(command, analytic_bundle, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    command.fails(main, 2, "holds other things (notes.txt)", analytic_bundle, "--out", tmp_path, *FAST)
    assert tree(tmp_path) == {"notes.txt": b"mine"}


def test_pictures_of_someone_else_are_not_taken_for_a_job(command, analytic_bundle, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    command.fails(main, 2, "holds images but no generate.json", analytic_bundle, "--out", tmp_path, *FAST)
    assert sorted(tree(tmp_path)) == ["000000.png"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "unified-latents-images"}', "[" * 100000])
def test_a_job_file_of_another_kind_is_refused(command, analytic_bundle, tmp_path, content):
    (tmp_path / "generate.json").write_text(content)
    command.fails(main, 65, "is not a job file", analytic_bundle, "--out", tmp_path, *FAST)


def test_images_that_are_not_finite_are_never_written(command, tmp_path):
    means = MEANS.copy()
    means[1] = np.inf
    bundle = write_analytic_bundle(tmp_path / "bundle", class_mean=means).path
    out = tmp_path / "out"
    command.fails(main, 76, "not finite and were left out: 1, 4", bundle, "--out", out, "-n", 6, *FAST, *QUIET)
    assert sorted(tree(out)) == [*(f"{i:06d}.png" for i in (0, 2, 3, 5)), "contact_sheet.png", "generate.json"]


def test_a_job_is_the_same_in_whatever_pieces_its_indices_are_listed(command, tmp_path, monkeypatch):
    means = MEANS.copy()
    means[1] = np.inf
    bundle = write_analytic_bundle(tmp_path / "bundle", class_mean=means).path
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    command.fails(main, 76, "2 of 6 images are not finite", bundle, "--out", whole, "-n", 6, *FAST, *QUIET)
    monkeypatch.setattr("ul_runtime.jobs._MOST_INDICES", 2)
    message = "1 of 2 images are not finite and were left out: 1; "
    command.fails(main, 76, message, bundle, "--out", pieces, "-n", 6, *FAST, *QUIET)
    assert tree(pieces) == tree(whole)


def test_the_indices_of_a_huge_job_are_listed_piece_by_piece():
    pieces = _missing(2**63, {0, 5})
    first, second = next(pieces), next(pieces)
    assert first[:5].tolist() == [1, 2, 3, 4, 6]
    assert second[0] == first[-1] + 1
    assert max(len(first), len(second)) <= 2**14
    (last,) = _missing(3, {0, 1})
    assert last.tolist() == [2]
    assert list(_missing(2, {0, 1})) == []


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.case("G14", "a signal while images are made", "stops at a step, whole files, exit code 75")
def test_a_signal_stops_at_a_step_and_leaves_whole_files(analytic_bundle, tmp_path, number):
    out = tmp_path / "out"
    code = "from ul_runtime.cli.generate import main; main()"
    process = start(code, analytic_bundle, "--out", out, "--num-images", 100000, "--batch-size", 4, *FAST)
    deadline = time.monotonic() + 60
    while not (out / "000003.png").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    there = len(list(out.glob("[0-9]*.png")))
    assert f"{out}: {there} of 100000 images are there; run the same command again to go on" in err
    assert not [name for name in os.listdir(out) if name.endswith(".tmp") or name == ".lock"]
    for file in out.glob("*.png"):
        with Image.open(file) as picture:
            picture.load()


def test_it_runs_without_torch_and_onnx(analytic_bundle, tmp_path):
    code = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "ul_train", "ul_export"):
            raise ImportError(name)
sys.meta_path.insert(0, Forbidden())
from ul_runtime.cli.generate import main
main()
assert "onnxruntime" in sys.modules
"""
    process = start(code, analytic_bundle, "--out", tmp_path / "out", "--num-images", 2, *FAST)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_importing_the_runtime_imports_nothing_heavy():
    code = """
import sys, pkgutil, importlib
import ul_runtime
from ul_runtime.cli import generate, latents
heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "safetensors", "pydantic"} & set(sys.modules)
assert not heavy, heavy
for module in pkgutil.walk_packages(ul_runtime.__path__, "ul_runtime."):
    importlib.import_module(module.name)
heavy = {"torch", "onnx", "ul_train", "ul_export"} & set(sys.modules)
assert not heavy, heavy
"""
    process = start(code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


class FullDisk(Disk):
    """No image of index `full_at` or later can be written; counts what is tried."""

    def __init__(self, full_at: int) -> None:
        self.full_at, self.tried = full_at, []

    def create(self, path: Path) -> int:
        number = re.match(r"\.(\d{6})\.png\.", path.name)
        if number:
            self.tried.append(int(number[1]))
            if int(number[1]) >= self.full_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path)


@pytest.mark.case("A16", "a disk that is full", "the line names the picture, not a hidden file")
@pytest.mark.case(
    "G6",
    "a disk that fills while images are made",
    "the work ends before the next step; whole files stay; exit code 74",
)
def test_a_disk_that_fills_ends_the_work_at_once_and_leaves_whole_files(command, analytic_bundle, tmp_path):
    out = tmp_path / "out"
    arguments = (analytic_bundle, "--out", out, "--num-images", 100_000, "--batch-size", 4, *FAST)
    with FullDisk(full_at=6).in_use() as disk:
        command.fails(main, 74, "out/000006.png: cannot write: No space left on device; free space", *arguments)
    assert set(range(7)) <= set(disk.tried) <= set(range(8)), "images of one batch are written at once, of no later one"
    assert sorted(tree(out)) == [*(f"{i:06d}.png" for i in range(6)), "generate.json"]


def test_images_are_written_while_the_next_are_made(command, analytic_bundle, tmp_path, monkeypatch):
    """The disk hangs at the first image until the network is asked for the second batch."""
    asked = threading.Event()

    class Waiting(Disk):
        def create(self, path: Path) -> int:
            if path.name.startswith(".000000.png"):
                assert asked.wait(60)
            return super().create(path)

    run, calls = OrtCpuBackend.run, []

    def counted(self, graph_name, inputs):
        calls.append(graph_name)
        if len(calls) == 6:  # 3 prior and 2 decoder steps are the first batch
            asked.set()
        return run(self, graph_name, inputs)

    monkeypatch.setattr(OrtCpuBackend, "run", counted)
    arguments = (analytic_bundle, "--out", tmp_path / "out", "--num-images", 4, "--batch-size", 2, *FAST)
    with Waiting().in_use():
        result = command(main, *arguments)
    assert result.code == 0, result
    assert len(calls) == 10


def test_temporary_files_of_a_killed_run_are_swept(command, analytic_bundle, tmp_path):
    out = tmp_path / "out"
    command(main, analytic_bundle, "--out", out, "--num-images", 2, *FAST)
    expected = tree(out)
    (out / ".000001.png.0123456789abcdef.tmp").write_bytes(b"half a picture")
    (out / "000001.png").unlink()
    assert command(main, analytic_bundle, "--out", out, "--num-images", 2, *FAST).code == 0
    assert tree(out) == expected
