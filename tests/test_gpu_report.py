"""tools/gpu_report.py on a machine without a GPU: the same code, on the CPU, of a model of seconds."""

import json

import pytest
import torch
from host_memory import HostMemory
from tool_module import load_tool

from ul_runtime.bundle import Bundle
from ul_runtime.manifest import NETWORK_GRAPHS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("on_device", [True, False])
def test_the_report_has_every_row_or_why_it_is_not_there(command, tmp_path, monkeypatch, on_device):
    torch.set_num_threads(1)
    tool = load_tool("gpu_report")
    if on_device:  # the loop that a GPU runs, over the host's memory
        monkeypatch.setattr(tool, "memory_on", lambda device: HostMemory())
    names = "torch-eager,torch-graphs,torch-no-graphs,ort-cuda,tensorrt"
    words = ["--models", "tiny,garments-32", "--contenders", names, "--batch-sizes", "2,1", "--repeats", 1]
    done = command(tool.main, *words, "--device", "cpu", "--out", tmp_path / "gpu")
    assert done.code == 0, done
    report = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert report["gpu"] == "none: this run only tries the tool"
    assert set(report["ceilings"]) == {"fp16_tflops_per_s", "bf16_tflops_per_s", "fp32_tflops_per_s", "copy_gb_per_s"}
    assert all(value > 0 for value in report["ceilings"].values())
    measured = [row for row in report["rows"] if "images_per_s" in row]
    assert [(row["contender"], row["batch_size"]) for row in measured] == [
        (name, batch) for name in names.split(",")[:3] for batch in (2, 1)
    ]
    for row in measured:
        assert ("ms" in row) == (on_device and row["contender"] != "torch-eager")
        if "ms" in row:
            assert set(row["ms"]) == {"prior_step", "guided_prior_step", "decoder_step"}
            assert -1 < row["host_gap"] < 1
    failed = {(row["model"], row["contender"]): row["failed"] for row in report["rows"] if "failed" in row}
    assert failed["garments-32", "torch-eager"] == "UsageError: a bundle has no torch networks"
    if not torch.cuda.is_available():
        for engine in ("ort-cuda", "tensorrt"):
            assert "no NVIDIA GPU" in failed["tiny", engine] or "cuda-core" in failed["tiny", engine]
    assert "| tiny | torch-graphs | 2 |" in (tmp_path / "gpu" / "gpu.md").read_text()


def test_nothing_is_begun_after_the_time_is_over(command, tmp_path):
    tool = load_tool("gpu_report")
    words = ["--models", "tiny", "--contenders", "torch-eager", "--batch-sizes", "1", "--minutes", "0"]
    assert command(tool.main, *words, "--device", "cpu", "--out", tmp_path / "gpu").code == 0
    (row,) = json.loads((tmp_path / "gpu" / "gpu.json").read_text())["rows"]
    assert row["skipped"] == "no time left"


def test_the_bundle_for_engines_computes_in_float16_and_calls_add_up(tmp_path):
    tool = load_tool("gpu_report")
    model = tool.open_model("tiny", tmp_path, ["ort-cuda", "ort-cuda-attention", "torch-eager"])
    assert list(model.bundles) == [20, 23]
    for opset, path in model.bundles.items():
        manifest = Bundle.open(path).manifest
        assert {manifest.graphs[name].precision for name in NETWORK_GRAPHS} == {"fp16"}
        assert (b"Attention" in Bundle.open(path).graph("prior_step").replace(b".attention", b"")) == (opset == 23)
    prior = manifest.defaults.prior
    assert tool.calls(model.info, "prior_step") + tool.calls(model.info, "guided_prior_step") == prior.num_steps
    assert tool.calls(model.info, "decoder_step") == manifest.defaults.decoder.num_steps


def test_what_is_not_known_is_refused(command, tmp_path):
    tool = load_tool("gpu_report")
    command.fails(tool.main, 2, "expected some of torch-eager", "--contenders", "best", "--out", tmp_path)
    if not torch.cuda.is_available():
        command.fails(tool.main, 2, "torch finds no NVIDIA GPU", "--out", tmp_path)
