"""ul-bench: its JSON, tables and plot, what it refuses, and how it stops."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Runner
from exported_run import PLAIN, exported_run
from PIL import Image
from random_run import write_run

from ul_export.bench.cli import main
from ul_runtime.backends.openvino import has_bf16
from ul_runtime.install import install

ROOT = Path(__file__).parent.parent
QUICK = ("--quick", "--threads", 1, "--batch-sizes", "1,2", "--steps", 3, "--decoder-steps", 2)
WITHOUT = ("--no-start-up",)
STEPS = {"prior_step", "guided_prior_step", "decoder_step"}


def test_json_has_every_figure_and_what_it_was_measured_with(command: Runner, analytic_bundle: Path) -> None:
    peers = ["openvino", *(["openvino-bf16"] if has_bf16() else [])]
    result = command(main, analytic_bundle, *QUICK, *WITHOUT, "--guidance", 2, "--peers", ",".join(peers), "--json")
    assert result.code == 0, result
    assert result.out.count("\n") == 1
    figures = json.loads(result.out)
    assert [(r["batch_size"], r["contender"]) for r in figures["results"]] == [
        (batch, name) for batch in (1, 2) for name in ("ort-cpu", *peers)
    ]
    for row in figures["results"]:
        assert set(row) == {"contender", "precision", "batch_size", "warm_up_s", "images", *STEPS}
        for part in (*STEPS, "images"):
            assert row[part]["of_ceiling"] >= 0
    assert set(figures["ceilings"]) == {"fp32", "bf16"} if has_bf16() else {"fp32"}
    assert figures["an_image"]["steps"]["decoder_step"]["calls"] == 2
    assert figures["threads"] == 1
    assert figures["settings"]["prior_num_steps"] == 3
    assert {"python", "numpy", "onnxruntime"} <= set(figures["versions"])
    assert figures["command"].startswith("ul-bench ")
    assert figures["start_up"] is None
    assert figures["machine"]["processor"]


def test_people_get_tables_and_a_plot(command: Runner, analytic_bundle: Path, tmp_path: Path) -> None:
    result = command(main, analytic_bundle, *QUICK, "--batch-sizes", 1, "--plot", tmp_path / "plot.png")
    assert result.code == 0, result
    for part in ("ort-cpu", "decoder step", "images/s", "GFLOP/s", "beyond sampling", "analytic, threads: 1"):
        assert part in result.out
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1020, 540)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ("--peers", "tensorflow"),
            2,
            "peer 'tensorflow' is not known; expected some of openvino, ",
        ),
        (("--peers", "openvino,openvino"), 2, "expected different names"),
        (("--peers", "openvino,"), 2, "expected different names"),
        (("--peers", "torch"), 2, "peer torch needs --run RUN"),
        (("--run", "runs/a"), 2, "--run is for torch peers and none is asked for"),
        (("--batch-sizes", "0"), 2, "--batch-sizes '0': expected numbers from 1 up"),
        (("--batch-sizes", "1,x"), 2, "--batch-sizes '1,x': expected numbers from 1 up"),
        (("--batch-sizes", ""), 2, "--batch-sizes '': expected numbers from 1 up"),
        (("--batch-sizes", "1,2,1"), 2, "--batch-sizes 1,2,1: expected different numbers"),
        (("--repeats", 0), 2, "--repeats is 0"),
        (("--image-repeats", -1), 2, "--image-repeats is -1"),
        (("--threads", 0), 2, "number of threads is 0"),
        (("--steps", 0), 2, "number of steps is 0"),
        (("--plot", "plot.jpg"), 2, "--plot plot.jpg: expected a name that ends in .png"),
        (("--plot", "nowhere/plot.png"), 2, "in a folder that exists"),
        (("--peers", "torch", "--run", "nowhere"), 65, "nowhere"),
    ],
)
def test_nonsense_is_one_line(
    command: Runner, analytic_bundle: Path, options: tuple[Any, ...], code: int, message: str
) -> None:
    command.fails(main, code, message, analytic_bundle, *options)


def test_a_bundle_that_is_missing_is_one_line(command: Runner, tmp_path: Path) -> None:
    command.fails(main, 65, "nowhere", tmp_path / "nowhere")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.case("N6", "Ctrl-C in ul-eval or ul-bench", "stopped; nothing is said of going on, for nothing is kept")
def test_ctrl_c_ends_it_with_75(analytic_bundle: Path) -> None:
    code = "from ul_export.bench.cli import main; main()"
    process = start(code, analytic_bundle, "--threads", 1, "--repeats", 1000000, *WITHOUT)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("measuring ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, ""), err
    assert err.endswith("ul-bench: stopped\n")


def test_torch_onnx_and_openvino_are_not_needed_for_what_does_not_use_them(analytic_bundle: Path) -> None:
    code = """
import sys
for name in ("torch", "onnx", "onnxscript", "openvino"):
    sys.modules[name] = None
from ul_export.bench.cli import main
main()
"""
    done = start(code, analytic_bundle, *QUICK, *WITHOUT, "--json")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert json.loads(out)["ceilings"] == {}
    assert "no ceiling by ONNX Runtime: onnx is not installed; pip install onnx\n" in err
    for peer, package, extra in (("openvino", "openvino", "openvino"), ("torch", "torch", "train")):
        done = start(
            code, analytic_bundle, *QUICK, *WITHOUT, "--peers", peer, *(["--run", "r"] if peer == "torch" else [])
        )
        _, err = done.communicate(timeout=120)
        assert done.returncode == 2
        assert err.startswith(f"ul-bench: {package} is not installed; {install(extra)}")


@pytest.mark.slow
def test_torch_peers_run_the_same_networks(command: Runner, tmp_path_factory: pytest.TempPathFactory) -> None:
    exported = exported_run(PLAIN, tmp_path_factory)
    peers = "torch,torch-bf16,torch-loop,torch-loop-bf16"
    options = ("--batch-sizes", 2, "--peers", peers, "--run", exported.run, "--json")
    result = command(main, exported.bundle, *QUICK, *options)
    assert result.code == 0, result
    figures = json.loads(result.out)
    rows = {row["contender"]: row for row in figures["results"]}
    assert list(rows) == ["ort-cpu", *peers.split(",")]
    for step in STEPS:
        assert rows["torch"][step]["largest_difference"] < 1e-4 < rows["torch-bf16"][step]["largest_difference"] < 0.2
    assert set(figures["start_up"]) == set(rows)
    for started in figures["start_up"].values():
        assert started["import_s"] + started["first_image_s"] < started["process_s"]


@pytest.mark.slow
def test_compiled_torch_is_a_peer(command: Runner, tmp_path_factory: pytest.TempPathFactory) -> None:
    exported = exported_run(PLAIN, tmp_path_factory)
    options = ("--batch-sizes", 1, "--guidance", 1, "--peers", "torch-compile", "--run", exported.run, "--json")
    result = command(main, exported.bundle, *QUICK, *WITHOUT, *options)
    assert result.code == 0, result
    row = json.loads(result.out)["results"][1]
    assert row["contender"] == "torch-compile"
    assert all(row[step]["largest_difference"] < 1e-4 for step in ("prior_step", "decoder_step"))


@pytest.mark.slow
def test_networks_of_another_run_are_no_peers(
    command: Runner, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    exported = exported_run(PLAIN, tmp_path_factory)
    write_run(tmp_path / "other", seed=1)
    options = ("--peers", "torch", "--run", tmp_path / "other")
    command.fails(main, 2, "is not the run of", exported.bundle, *QUICK, *options)
