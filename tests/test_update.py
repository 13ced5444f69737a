"""ul-export --update: newer weights in the graphs of a bundle are those of an export, and are verified."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_run import write_run
from test_precision_export import calm
from tiny_run import contents, write_npz
from torch import nn

from ul_export import update as updating
from ul_export.cli import main
from ul_export.onnx_graphs import name_weights
from ul_export.onnx_model import initializers
from ul_export.precision.lower import PRECISIONS
from ul_export.update import replace_weights
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError
from ul_runtime.manifest import GRAPH_NAMES, NETWORK_GRAPHS
from ul_train.run import Run

KINDS = {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8",), "weights in fp16": ("--weights", "fp16")}


def calm_in_half(networks: dict[str, nn.Module]) -> None:
    calm(networks)
    with torch.no_grad():
        for network in networks.values():
            for weight in network.parameters():
                weight.copy_(weight.half())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of the same networks with other weights, which float16 holds: --weights fp16 exports the same graphs."""
    folder = tmp_path_factory.mktemp("runs")
    write_npz(folder / "images.npz")
    for seed in (0, 1):
        write_run(folder / str(seed), seed=seed, change=calm_in_half)
    return folder / "0", folder / "1"


def words(kind: str, run: Path) -> tuple[object, ...]:
    calibrate = ("--calibrate", run.parent / "images.npz") if kind in ("fp16", "int8") else ()
    return (*KINDS[kind], *calibrate, "--threads", 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_updated_bundle_has_the_weights_of_an_export_of_the_newer_run(kind, runs, command, tmp_path):
    old, new = runs
    for run, name in ((old, "updated"), (new, "exported")):
        assert command(main, run, "--out", tmp_path / name, *words(kind, run)).code == 0
    before = Bundle.open(tmp_path / "updated").hash
    images = words(kind, new)[1:-2] if kind in ("fp16", "int8") else ()
    result = command(main, new, "--update", tmp_path / "updated", *images, "--threads", 1)
    assert result.code == 0, result.err
    updated, exported = (Bundle.open(tmp_path / name) for name in ("updated", "exported"))
    assert updated.manifest.provenance == exported.manifest.provenance
    assert updated.manifest.parity["updated_from"] == before
    assert "precision.html" not in updated.manifest.files
    if kind in ("fp16", "int8"):
        own, of_export = updated.manifest.parity[kind], exported.manifest.parity[kind]
        assert own["flops_share"].keys() == own["pinned"].keys() == set(NETWORK_GRAPHS)
        assert own["on_this_machine"].keys() == of_export["on_this_machine"].keys()
        assert own["images"].keys() == of_export["images"].keys() == {"largest_difference"}
        assert "lowered_image_psnr_db" in result.out
        assert "worst_graph_difference" not in result.out, "that is of float32"
        assert "precision.html is left out" in result.out + result.err
        assert own["batch 16, guidance 1"]["image_psnr_db"] > PRECISIONS[kind].tolerances.least_psnr_db
    for graph in GRAPH_NAMES:
        given, expected = updated.initializers(graph), exported.initializers(graph)
        assert given.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(given[name], array, err_msg=name)
    if kind != "int8":  # whose activations keep the scales of the older run
        for file in updated.manifest.files:
            if file.endswith(".onnx"):
                assert updated.read(file) == exported.read(file), file


@pytest.mark.slow
def test_a_weight_that_stays_old_fails_the_check_and_leaves_the_bundle_alone(runs, command, monkeypatch, tmp_path):
    old, new = runs
    bundle = tmp_path / "bundle"
    assert command(main, old, "--out", bundle, "--threads", 1).code == 0
    before = contents(bundle)
    replace = updating.replace_weights

    def forget_one(model, given):
        stale = {name: tensor.numpy() for name, tensor in initializers(model).items()}
        replace(model, {name: stale.get(name, value) if "mlp.0" in name else value for name, value in given.items()})

    monkeypatch.setattr(updating, "replace_weights", forget_one)
    result = command(main, new, "--update", bundle, "--threads", 1)
    assert result.code == 65
    assert "do not equal torch" in result.err
    assert contents(bundle) == before
    monkeypatch.undo()
    assert command(main, new, "--update", bundle, "--out", tmp_path / "other", "--threads", 1).code == 0
    assert contents(bundle) == before


@pytest.mark.slow
def test_a_run_of_other_networks_is_refused(runs, command, tmp_path):
    old, _ = runs
    assert command(main, old, "--out", tmp_path / "bundle", "--threads", 1).code == 0
    write_run(tmp_path / "wide", "latent_channels=3")
    result = command(main, tmp_path / "wide", "--update", tmp_path / "bundle")
    assert result.code == 65
    assert "its latent is channels=3" in result.err
    assert "export without --update" in result.err
    for change, message in (
        ("base.blocks=[1,1]", "its base is {'widths'"),
        ("encoder.blocks=[2,1]", "its encoder is"),
        ("decoder.middle_blocks=2", "its decoder is"),
    ):
        write_run(tmp_path / change, change)
        result = command(main, tmp_path / change, "--update", tmp_path / "bundle", "--threads", 1)
        assert result.code == 65
        assert message in result.err, result.err


def test_no_weight_of_either_side_may_stay_behind():
    names = ("first.weight", "second.weight")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    weights = {name: np.ones((2, 2), np.float32) for name in names}

    def graph() -> ir.Model:
        stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
        return ir.from_proto(helper.make_model(helper.make_graph([], "g", [x], [], stored)))

    replace_weights(graph(), weights)
    with pytest.raises(BadInputError, match=r"the bundle has a weight second\.weight and the run has not"):
        replace_weights(graph(), {"first.weight": weights["first.weight"]})
    with pytest.raises(BadInputError, match=r"does not have 1 weights of the run, such as third\.bias"):
        replace_weights(graph(), weights | {"third.bias": np.ones(2, np.float32)})


@pytest.mark.slow
def test_an_encoder_that_leaves_its_scales_fails_on_real_images(runs, command, monkeypatch, tmp_path):
    old, new = runs
    bundle = tmp_path / "bundle"
    assert command(main, old, "--out", bundle, *words("int8", old)).code == 0
    before, load = contents(bundle), Run.finished

    def grown(run):
        trained = load(run)
        with torch.no_grad():
            next(trained.networks["encoder"].parameters()).mul_(8.0)
        return trained

    monkeypatch.setattr(Run, "finished", grown)
    result = command(main, new, "--update", bundle, "--calibrate", new.parent / "images.npz", "--threads", 1)
    assert result.code == 65, result.out
    assert "encoder, z_clean, images" in result.err
    assert "export without --update finds new ones" in result.err
    assert contents(bundle) == before


@pytest.mark.parametrize("given", [("--fp16",), ("--opset", 20), ("--weights", "fp16")])
def test_an_update_keeps_precision_and_opset(given, command, tmp_path):
    command.fails(main, 2, "--update keeps the bundle's precision", tmp_path, "--update", tmp_path, *given)


def test_an_export_needs_a_place(command, tmp_path):
    command.fails(main, 2, "--out is missing; see ul-export --help", tmp_path)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)


def test_weights_are_named_by_the_parameter_of_the_module_that_takes_them_and_replaced_by_these_names():
    module = Layers()
    module.second.weight.data = module.first.weight.data.clone()  # equal values: the module decides
    folded = module.first.weight.detach().numpy().T
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["h"], "first/MatMul"),
        helper.make_node("MatMul", ["h", "val_2"], ["y"], "second/MatMul"),
        helper.make_node("Add", ["y", "one"], ["z"], "/Add"),
    ]
    arrays = {"val_1": folded, "val_2": folded, "one": np.ones(1, np.float32)}
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2]) for name in "xz")
    stored = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]
    model = ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", [x], [z], stored)))
    name_weights(model, module)
    assert list(model.graph.initializers) == ["first.weight.T", "second.weight.T", "one"]
    assert [node.inputs[1].name for node in model.graph] == ["first.weight.T", "second.weight.T", "one"]
    new = {"first.weight": np.arange(4, dtype=np.float32).reshape(2, 2), "second.weight": np.eye(2, dtype=np.float32)}
    replace_weights(model, new)
    values = {name: tensor.numpy() for name, tensor in initializers(model).items()}
    np.testing.assert_array_equal(values["first.weight.T"], new["first.weight"].T)
    np.testing.assert_array_equal(values["one"], [1.0])
    onnx.checker.check_model(ir.to_proto(model))
