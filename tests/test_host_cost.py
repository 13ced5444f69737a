"""tools/host_cost.py and tools/compile_noise.py on small input."""

import json

from tool_module import load_tool

from ul_runtime.backends.gpu import PTX_FILE


def test_every_size_and_sampler_has_its_seconds(command, tmp_path):
    tool = load_tool("host_cost")
    words = ["--presets", "tiny", "--batch-sizes", "2,1", "--repeats", 2, "--out", tmp_path / "cost"]
    done = command(tool.main, *words)
    assert done.code == 0, done
    rows = json.loads((tmp_path / "cost" / "host-cost.json").read_text())["rows"]
    assert [(row["batch_size"], row["sampler"]) for row in rows] == [
        (batch, sampler) for batch in (2, 1) for sampler in ("dpmpp2m", "ancestral")
    ]
    assert all(0 < second < 1 for row in rows for second in row["seconds"])
    assert all(len(row["seconds"]) == 2 for row in rows)


def test_the_loops_ask_the_device_for_all_of_their_noise(monkeypatch):
    """Negative control of the tool: what it measures is the loop that GPUs run."""
    tool = load_tool("host_cost")
    asked = []
    monkeypatch.setattr(tool.NoTime, "normals", lambda self, to, seed, indices, rows, stream, size: asked.append(rows))
    pipeline = tool.over_no_device("tiny")
    tool.seconds(pipeline, 3, "ancestral")
    settings = pipeline.settings(sampler="ancestral", decoder_sampler="ancestral")
    tables = pipeline.prior_table(settings.prior), pipeline.decoder_table(settings.decoder)
    noisy = sum(int((table[:, 7] != 0).sum()) for table in tables)
    assert asked == [4] * (noisy + 2)


def test_without_a_compiler_the_kernel_stays_and_it_is_said(command):
    before = PTX_FILE.read_bytes()
    command.fails(load_tool("compile_noise").main, 2, "name it by --nvcc", "--nvcc", "no-such-compiler")
    assert PTX_FILE.read_bytes() == before
