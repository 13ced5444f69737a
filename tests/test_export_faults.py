"""ul-export on faulty graphs, weights, runs, disks and outputs: the right exit code, and nothing is written."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from disk import Disk
from exported_run import PLAIN, Exported, exported_run
from onnx import ModelProto, numpy_helper
from random_run import randomise, save, write_run
from safetensors.numpy import load
from safetensors.numpy import save as save_weights

from ul_export import export as export_command
from ul_export.cli import main
from ul_runtime.bundle import Bundle
from ul_train.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_run(PLAIN, tmp_path_factory)


# Faults put into the files of an export; the exporter has to notice each of them and write nothing.


def exported_again(
    plain: Exported, files: dict[str, bytes], command: Any, monkeypatch: pytest.MonkeyPatch, out: Path
) -> Any:
    """ul-export of the same run where torch has made these files."""
    monkeypatch.setattr(export_command, "export_graphs", lambda *arguments: dict(files))
    return command(main, plain.run, "--out", out, "--opset", plain.opset, "--threads", 1)


def check_refused(result: Any, code: int, message: str, out: Path) -> None:
    """One line of error after the progress, and no trace at --out."""
    assert result.code == code, result
    line = result.err.splitlines()[-1]
    assert line.startswith("ul-export: ")
    assert re.search(message, line), line
    assert "Traceback" not in result.err
    assert result.out == ""
    assert not out.exists()
    assert not [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]


def test_the_same_files_again_make_the_same_bundle(plain, command, monkeypatch, tmp_path):
    """The control of what follows: nothing but the fault makes the exports below fail."""
    result = exported_again(plain, plain.files, command, monkeypatch, tmp_path / "bundle")
    assert result.code == 0, result
    assert (tmp_path / "bundle" / "prior_step.onnx").read_bytes() == plain.files["prior_step.onnx"]
    assert "worst_graph_difference" in result.out


def with_weight(files: dict[str, bytes], network: str, pick: Callable[[np.ndarray], None]) -> dict[str, bytes]:
    """`pick` changes the largest weight of a network, a convolution's if it has one."""
    name = f"{network}.safetensors"
    weights = {key: value.copy() for key, value in load(files[name]).items()}
    pick(max(weights.values(), key=lambda array: (array.ndim == 4, array.size)))
    return files | {name: save_weights(weights)}


def one_value(weight: np.ndarray) -> None:
    weight.reshape(-1)[weight.size // 2] += 1e-3


def all_values(weight: np.ndarray) -> None:
    weight *= np.float32(1.001)


@pytest.mark.parametrize("fault", [one_value, all_values])
@pytest.mark.parametrize(
    ("network", "graph"), [("encoder", "encoder"), ("prior", "prior_step"), ("decoder", "decoder_step")]
)
@pytest.mark.case(
    "B8", "a weight wrong by a thousandth, a wrong operator, weights that are not finite", "no bundle is written"
)
def test_a_weight_that_is_wrong_by_a_thousandth_fails_the_export(
    network, graph, fault, plain, command, monkeypatch, tmp_path
):
    files = with_weight(plain.files, network, fault)
    result = exported_again(plain, files, command, monkeypatch, tmp_path / "bundle")
    check_refused(result, 65, f"do not equal torch, no bundle was written: {graph}, ", tmp_path / "bundle")


def with_graph(files: dict[str, bytes], graph: str, change: Callable[[ModelProto], None]) -> dict[str, bytes]:
    model = onnx.load_from_string(files[f"{graph}.onnx"])
    change(model)
    return files | {f"{graph}.onnx": model.SerializeToString()}


def norm_epsilon(model: ModelProto) -> None:
    """The epsilon of one normalisation becomes 1e-3."""
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3


def exact_gelu(model: ModelProto) -> None:
    """The error function of one GELU becomes a hyperbolic tangent of nearly the same shape."""
    node = next(n for n in model.graph.node if n.op_type == "Gelu")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


def feed(old: str, new: str) -> Callable[[ModelProto], None]:
    """Every node that takes input `old` takes `new` instead."""

    def change(model: ModelProto) -> None:
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    return change


def drop_pred(model: ModelProto) -> None:
    """An output too few."""
    model.graph.output.remove(next(o for o in model.graph.output if o.name == "pred"))


def nan_constant(model: ModelProto) -> None:
    """A small constant inside the graph becomes NaN."""
    constant = next(t for t in model.graph.initializer if t.name.endswith("frequencies"))
    constant.raw_data = np.full(len(constant.raw_data) // 4, np.nan, np.float32).tobytes()


def becomes(old: str, new: str) -> Callable[[ModelProto], None]:
    """The one node of an operator becomes another operator."""

    def change(model: ModelProto) -> None:
        (node,) = (node for node in model.graph.node if node.op_type == old)
        node.op_type = new

    return change


def lying(model: ModelProto) -> None:
    """Each image on its side."""
    (node,) = (node for node in model.graph.node if node.op_type == "Transpose")
    node.attribute[0].ints[:] = [0, 3, 2, 1]


def hidden_infinity(model: ModelProto) -> None:
    """Magnitudes are summed up to a bound that no finite one reaches here."""
    (at,) = (at for at, node in enumerate(model.graph.node) if node.op_type == "Abs")
    for name, value in (("least", -1e6), ("most", 1e6)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    model.graph.node[at].input[0] = "bounded"
    model.graph.node.insert(at, onnx.helper.make_node("Clip", ["x", "least", "most"], ["bounded"]))


@pytest.mark.parametrize(
    ("graph", "change", "message"),
    [
        ("prior_step", norm_epsilon, "do not equal torch.*prior_step"),
        ("prior_step", exact_gelu, "do not equal torch.*prior_step"),
        ("prior_step", feed("noise", "z"), "do not equal torch.*prior_step, z_next, any coefficients"),
        ("prior_step", feed("guide", "z"), "do not equal torch.*prior_step, .*, any coefficients"),
        ("prior_step", feed("guide_weight", "rescale"), "do not equal torch.*prior_step, .*, any coefficients"),
        ("prior_step", feed("rescale", "guide_weight"), "do not equal torch.*prior_step, .*, any coefficients"),
        ("decoder_step", feed("noise", "x"), "do not equal torch.*decoder_step, x_next, any coefficients"),
        (
            "decoder_step",
            drop_pred,
            "decoder_step.onnx: not a graph of this bundle: its outputs are .x_next, history_next",
        ),
        ("decoder_step", nan_constant, "do not equal torch.*decoder_step.* actual values are not finite"),
        ("pixels", becomes("Round", "Floor"), "pixels: images differ"),
        ("pixels", becomes("Clip", "Sum"), "pixels: images differ"),
        ("pixels", lying, "pixels: images differ"),
        ("pixels", becomes("Abs", "Identity"), "pixels, sum, batch 1: "),
        ("pixels", hidden_infinity, "pixels: the sum of an image with NaN or infinity is finite"),
    ],
)
@pytest.mark.case("B8")
def test_a_wrong_operator_fails_the_export(graph, change, message, plain, command, monkeypatch, tmp_path):
    files = with_graph(plain.files, graph, change)
    result = exported_again(plain, files, command, monkeypatch, tmp_path / "bundle")
    check_refused(result, 65, message, tmp_path / "bundle")


def test_a_graph_that_no_runtime_can_load_fails_the_export(plain, command, monkeypatch, tmp_path):
    files = with_graph(plain.files, "encoder", lambda model: setattr(model.graph.node[0], "op_type", "Nonsense"))
    result = exported_again(plain, files, command, monkeypatch, tmp_path / "bundle")
    check_refused(result, 65, "encoder.onnx: not a graph of this bundle: node .* is .Nonsense.", tmp_path / "bundle")


def test_a_tensor_that_no_graph_uses_fails_the_export(plain, command, monkeypatch, tmp_path):
    weights = load(plain.files["prior.safetensors"]) | {"left_over": np.ones((2, 2), np.float32)}
    files = plain.files | {"prior.safetensors": save_weights(weights)}
    result = exported_again(plain, files, command, monkeypatch, tmp_path / "bundle")
    assert result.code == 65, result
    assert not (tmp_path / "bundle").exists()


class FullDisk(Disk):
    """A disk that is full after `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, fd: int, data: memoryview) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return super().write(fd, data)


@pytest.mark.parametrize("room", [0, 100_000, 700_000])  # the trial takes 0.55 MB, the bundle as much again
def test_a_full_disk_leaves_nothing(room, plain, command, monkeypatch, tmp_path):
    with FullDisk(room).in_use():
        result = exported_again(plain, plain.files, command, monkeypatch, tmp_path / "bundle")
    check_refused(result, 74, "No space left on device; free space", tmp_path / "bundle")


@pytest.mark.case("B7", "a full disk while a bundle is replaced", "the old bundle stays whole")
def test_a_full_disk_leaves_the_bundle_that_was_there(plain, command, monkeypatch, tmp_path):
    bundle = tmp_path / "bundle"
    assert exported_again(plain, plain.files, command, monkeypatch, bundle).code == 0
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    with FullDisk(700_000).in_use():
        result = command(main, plain.run, "--out", bundle, "--threads", 1, "--overwrite")
    assert result.code == 74, result
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_overwrite_replaces_a_bundle(plain, command, monkeypatch, tmp_path):
    bundle = tmp_path / "bundle"
    assert exported_again(plain, plain.files, command, monkeypatch, bundle).code == 0
    command.fails(main, 2, "exists already; choose another --out, or --overwrite", plain.run, "--out", bundle)
    result = command(main, plain.run, "--out", bundle, "--threads", 1, "--overwrite", "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["hash"] == Bundle.open(bundle).hash


# What is said before torch exports anything.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_weight_that_is_not_finite_stops_the_export(command, tmp_path):
    for value in (np.nan, np.inf):
        run = tmp_path / f"run-{value}"
        networks = write_run(run, base=False)
        joint = {name: networks[name] for name in ("encoder", "prior", "decoder")}
        with torch.no_grad():
            networks["decoder"].out.weight[0, 0, 0, 0] = float(value)  # type: ignore[index,union-attr]
        config = Run.open(run).config
        hash_ = save(run, config, "joint", joint)
        save(run, config, "base", {"base": networks["base"]}, hash_)
        command.fails(main, 76, "weight decoder.out.weight is not finite", run, "--out", tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()


def test_finite_weights_that_overflow_stop_the_export(plain, command, monkeypatch, tmp_path):
    """Not finite on both sides: never a bundle, although torch and ONNX Runtime agree."""
    run = tmp_path / "run"
    networks = write_run(run, base=False)
    with torch.no_grad():
        networks["base"].out.weight.fill_(1e38)  # type: ignore[operator,union-attr]
    config = Run.open(run).config
    joint = {name: networks[name] for name in ("encoder", "prior", "decoder")}
    save(run, config, "base", {"base": networks["base"]}, save(run, config, "joint", joint))
    monkeypatch.setattr(export_command, "export_graphs", lambda *arguments: dict(plain.files))
    result = command(main, run, "--out", tmp_path / "bundle", "--threads", 1)
    check_refused(result, 76, "torch itself gives NaN or Inf", tmp_path / "bundle")


def test_a_run_without_its_base_stage_is_refused_and_told_what_to_do(command, tmp_path):
    write_run(tmp_path / "run", base=False)
    message = f"has no base stage, so nothing to sample from; run ul-train {tmp_path / 'run'} --resume --stage base"
    command.fails(main, 65, message, tmp_path / "run", "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_base_of_another_encoder_is_refused(command, run, tmp_path):
    networks = write_run(tmp_path / "other", seed=1)
    config = Run.open(run).config
    save(run, config, "joint", {name: randomise(networks[name], 7) for name in ("encoder", "prior", "decoder")})
    message = "was trained on the latents of another encoder than joint-000020; train stage base again"
    command.fails(main, 65, message, run, "--out", tmp_path / "bundle")


NO_RUN = {
    "missing": "no such folder; expected the directory that ul-train",
    "folder": "no run.json in it; expected the directory that ul-train",
    "file": "no such folder; expected the directory that ul-train",
    "bundle": "a bundle of ul-export, and no run; expected the directory that ul-train",
}


@pytest.mark.parametrize("what", NO_RUN)
def test_what_is_not_a_run_is_refused(what, command, analytic_bundle, tmp_path):
    source = {"bundle": analytic_bundle}.get(what, tmp_path / what)
    if what == "folder":
        source.mkdir()
    if what == "file":
        source.write_text("no run")
    command.fails(main, 65, NO_RUN[what], source, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("what", ["file", "folder", "bundle", "link to nowhere"])
def test_what_is_at_out_is_not_touched(what, command, run, analytic_bundle, tmp_path):
    out = tmp_path / "out"
    match what:
        case "file":
            out.write_text("mine")
        case "folder":
            out.mkdir()
            (out / "notes").write_text("mine")
        case "bundle":
            out = analytic_bundle
        case "link to nowhere":
            out.symlink_to(tmp_path / "nowhere")
    before = (analytic_bundle / "manifest.json").read_bytes()
    command.fails(main, 2, "exists already", run, "--out", out)
    if what != "bundle":
        command.fails(main, 2, "exists and is not a bundle", run, "--out", out, "--overwrite")
    assert (analytic_bundle / "manifest.json").read_bytes() == before
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_made_is_said_before_any_work(command, run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    command.fails(main, 2, "is a file, a folder is expected", run, "--out", tmp_path / "file" / "bundle")


def test_no_threads_at_all_are_refused_before_any_work(command, run, tmp_path):
    for words in (("--out", tmp_path / "bundle"), ("--check",)):
        command.fails(main, 2, "the number of threads is 0; expected 1 or more", run, *words, "--threads", 0)


@pytest.mark.parametrize("opset", [17, 19, 24])
@pytest.mark.case("B9", "an opset that is not supported", "refused before any work")
def test_an_opset_that_no_test_covers_is_refused(opset, command, run, tmp_path):
    command.fails(
        main, 2, f"--opset is {opset}; expected 18, 20, 22 or 23", run, "--out", tmp_path / "bundle", "--opset", opset
    )
