"""Image i is the same bytes whatever is made beside it: the real networks, and the tool that checks any bundle."""

import json
from types import ModuleType

import numpy as np
import pytest
from tool_module import load_tool

import ul_runtime
from ul_runtime.backends import HostBackend
from ul_runtime.cli.command import run_command
from ul_runtime.cli.generate import main as generate
from ul_runtime.errors import UsageError
from ul_runtime.pipeline import Pipeline

SHIPPED = "garments-32"
SIZES = (1, 2, 3, 5, 8, 16, 64)
SHORT = {"steps": 2, "sampler": "ancestral", "decoder_steps": 2, "decoder_sampler": "ancestral"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("invariance")


@pytest.mark.slow
@pytest.mark.case("G9", "other batch sizes, orders and numbers of threads (ONNX Runtime, CPU)", "the same bytes")
def test_the_real_networks_give_the_same_bytes_at_any_batch_size_order_and_thread_count(tool):
    pipelines = [ul_runtime.load(SHIPPED, threads=threads, spinning=False) for threads in (1, 2)]
    result = tool.measure(pipelines, (1, 2), SIZES, 0, SHORT)
    cases = [(case["threads"], case["batch_size"]) for case in result["cases"]]
    assert cases == [(threads, size) for threads in (1, 2) for size in SIZES]
    assert [case for case in result["cases"] if case["differing"]] == []
    assert result["equal"] is True
    # four steps of three outputs, x and the image, the encoder and one step for the bits, and what these give
    assert result["arrays_an_image"] == 4 * 3 + 2 + (1 + 3) + 3


@pytest.mark.slow
def test_the_real_networks_are_not_trivial(tool):
    """What the comparison could be blind to: outputs that are constant, or that are the same for all images."""
    rows = tool.trace(ul_runtime.load(SHIPPED, threads=1), [0, 1, 2], 3, 0, SHORT | {"guidance": 1.5})
    for arrays in zip(*rows.values(), strict=True):
        assert {what for what, _ in arrays} == {arrays[0][0]}
        assert len({array.tobytes() for _, array in arrays}) == 3
        assert arrays[0][0] == "bits" or all(np.ptp(array) > 0 for _, array in arrays)


@pytest.mark.slow
def test_the_files_of_the_real_networks_are_the_same_at_any_batch_size(command, tmp_path):
    trees = []
    for size in (1, 5):
        out = tmp_path / str(size)
        result = command(
            generate, SHIPPED, "--out", out, "--num-images", 6, "--steps", 2, "--decoder-steps", 1,
            "--batch-size", size, "--threads", 1,
        )  # fmt: skip
        assert result.code == 0, result
        trees.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert len(trees[0]) == 8
    assert trees[0] == trees[1]


class Sloppy(HostBackend):
    """A backend whose decoder is off in the last bit of one value, in the second row of any batch."""

    name, precision, threads = "sloppy", "fp32", None

    def __init__(self, backend):
        self.backend = backend

    def run(self, graph_name, inputs):
        out = self.backend.run(graph_name, inputs)
        if graph_name == "decoder_step":
            pred = out["pred"] = out["pred"].copy()
            pred[1:2, 0, 0, 0] = np.nextafter(pred[1:2, 0, 0, 0], np.float32(np.inf))
        return out


def test_the_comparison_finds_the_last_bit_of_one_value_and_says_where(tool, analytic_bundle):
    pipeline = ul_runtime.load(analytic_bundle, threads=1)
    broken = Pipeline(pipeline.manifest, Sloppy(pipeline.backend))
    result = tool.measure([broken, broken], (1, 1), (1, 3), 0, SHORT)
    assert result["equal"] is False
    assert [case["differing"] for case in result["cases"]] == [0, 3, 0, 3]
    first = result["cases"][1]["first"]
    assert first["what"] == "pred of decoder_step"
    assert (
        first["array"] == 7
    )  # of the prior's two steps: z_next, pred and history_next each; then the decoder's x_next
    assert 0 < first["largest_difference"] < 1e-6


def test_the_tool_prints_one_json_line_and_fails_where_bytes_differ(tool, command, analytic_bundle, monkeypatch):
    def main() -> None:
        run_command(tool.app, "invariance")

    arguments = (analytic_bundle, "--batch-sizes", "1,3", "--threads", "1")
    result = command(main, *arguments)
    assert result.code == 0, result
    assert result.out.count("\n") == 1
    assert json.loads(result.out)["equal"] is True
    load = ul_runtime.loading.load

    def load_sloppy(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        return Pipeline(pipeline.manifest, Sloppy(pipeline.backend))

    monkeypatch.setattr(ul_runtime, "load", load_sloppy)
    result = command(main, *arguments)
    assert result.code == 1
    assert json.loads(result.out)["equal"] is False
    assert "invariance: " in result.err
    assert "1 of 2 cases differ" in result.err
    assert "pred of decoder_step" in result.err


@pytest.mark.parametrize("text", ["", "a", "0", "1,", "-1", "1.5"])
def test_counts_that_cannot_be_are_refused(tool, text):
    with pytest.raises(UsageError, match="--threads"):
        tool.parse_counts("--threads", text)
