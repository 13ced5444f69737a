"""Feature spaces: pixels, the classifier and its file, ONNX files, and weights that come in packages."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from tiny_run import splits

from ul_export.evaluation import features as module
from ul_export.evaluation.classifier import accuracy, load_classifier, save_classifier, train_classifier
from ul_export.evaluation.features import FeatureSpace, default_spaces, features_of, open_space, packaged_weights
from ul_export.options import EvalOptions
from ul_runtime.errors import BadInputError, NonFiniteError, StoppedError, ULError, UsageError
from ul_runtime.install import install


def space(name: str | Path, **given: Any) -> FeatureSpace:
    return open_space(str(name), splits(), EvalOptions(data="", classifier_steps=30, **given), threads=1)


def write_onnx(
    path: Path, shape: tuple[int | str, ...] = ("b", 1, "h", "w"), op: str = "GlobalAveragePool", kind: int = 1
) -> Path:
    """x -> its mean by channel, or what `op` makes of it."""
    taken = helper.make_tensor_value_info("x", kind, list(shape))
    made = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", [taken], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_pixels_are_the_values_themselves_and_means_of_larger_images():
    x = np.random.default_rng(0).uniform(-1, 1, (3, 1, 32, 32)).astype(np.float32)
    assert np.array_equal(space("pixels").extract(x), x.reshape(3, -1))
    large = np.random.default_rng(0).uniform(-1, 1, (2, 1, 64, 64)).astype(np.float32)
    means = large.reshape(2, 32, 2, 32, 2).mean(axis=(2, 4)).reshape(2, -1)
    assert space("pixels").extract(large) == pytest.approx(means, abs=1e-6)
    assert space("pixels").extract(np.zeros((2, 3, 64, 64), np.float32)).shape == (2, 3 * 18 * 18)


@pytest.mark.parametrize(
    ("channels", "classes", "first"),
    [(1, ("a", "b"), "classifier"), (1, (), "efficientnet-lite0"), (3, ("a", "b"), "efficientnet-lite0")],
)
def test_the_first_space_goes_by_the_images(channels, classes, first):
    assert default_spaces(channels, classes) == [first, "pixels"]


def test_an_onnx_file_sees_images_from_minus_one_to_one(tmp_path):
    found = space(write_onnx(tmp_path / "f.onnx"))
    images = splits().train.images
    ids = np.array([5, 0])
    features = features_of(found, images, ids)
    assert features == pytest.approx((images[ids] / 127.5 - 1.0).mean(axis=(2, 3)), abs=1e-6)
    assert len(found.record["sha256"]) == 64


def test_an_onnx_file_of_a_fixed_size_and_three_channels_gets_them(tmp_path):
    found = space(write_onnx(tmp_path / "f.onnx", ("b", 3, 8, 8), op="Identity"))
    x = np.linspace(-1, 1, 16, dtype=np.float32) * np.ones((2, 1, 16, 1), np.float32)
    features = found.extract(x)
    assert features.shape == (2, 3, 8, 8)
    assert (features[:, 0] == features[:, 2]).all()
    assert features[0, 0, 4, 1:-1] == pytest.approx((x[0, 0, 0, ::2] + x[0, 0, 0, 1::2])[1:-1] / 2, abs=1e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shape": (4, 1, "h", "w")}, "its batch is fixed to 4"),
        ({"shape": ("b", 2, "h", "w")}, "takes 2 channels, the images have 1"),
        ({"shape": ("b", 1, "h")}, "expected one input, float32 b c h w"),
        ({"kind": TensorProto.DOUBLE, "op": "Identity"}, "expected one input, float32 b c h w"),
    ],
)
def test_an_onnx_file_of_another_contract_is_refused(tmp_path, given, message):
    with pytest.raises(BadInputError, match=message):
        space(write_onnx(tmp_path / "f.onnx", **given))


def test_an_onnx_file_that_is_damaged_or_missing_is_refused(tmp_path):
    (tmp_path / "f.onnx").write_bytes(b"no model")
    with pytest.raises(BadInputError, match=r"f\.onnx: cannot be loaded: .*holds its weights itself"):
        space(tmp_path / "f.onnx")
    with pytest.raises(BadInputError, match="cannot be read"):
        space(tmp_path / "nowhere.onnx")


def test_an_onnx_file_whose_weights_lie_elsewhere_is_refused(tmp_path):
    path = write_onnx(tmp_path / "f.onnx")
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(helper.make_node("Mul", ["x", "w"], ["y"]))
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    model.graph.initializer.append(weight)
    (tmp_path / "w.bin").write_bytes(np.ones(1, np.float32).tobytes())
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadInputError, match=r"cannot be loaded"):
        space(path)
    weight.data_location, weight.raw_data = TensorProto.DEFAULT, np.ones(1, np.float32).tobytes()  # the control
    del weight.external_data[:]
    model.graph.initializer[0].CopyFrom(weight)
    path.write_bytes(model.SerializeToString())
    assert space(path).extract(np.ones((2, 1, 4, 4), np.float32)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("extract", "error", "message"),
    [
        (lambda x: np.full((len(x), 2), np.nan), NonFiniteError, "features are not finite"),
        (lambda x: np.zeros((len(x), 5000)), BadInputError, "5000 features an image, at most 4096"),
    ],
)
def test_features_that_nothing_can_be_computed_from_are_refused(extract, error, message):
    with pytest.raises(error, match=message):
        features_of(FeatureSpace("odd", extract), splits().train.images, np.arange(3))


def test_an_unknown_name_is_refused_with_what_can_be_given():
    with pytest.raises(UsageError, match="--features inception: expected efficientnet-lite0, classifier, pixels or"):
        space("inception")


def test_the_classifier_learns_the_classes_and_is_the_same_again():
    data = splits()
    first, second = (train_classifier(data.train, 60) for _ in range(2))
    assert accuracy(first, data.heldout) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = train_classifier(data.train, 59)  # the control
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_classifier_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_classifier(splits().train, 1)
    assert torch.equal(torch.rand(3), expected)


def test_training_the_classifier_stops_when_asked():
    def stop(amount: float) -> None:
        raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        train_classifier(splits().train, 10**6, stop)


def test_a_classifier_is_kept_and_found_again(tmp_path, monkeypatch):
    path, x = tmp_path / "kept" / "c.safetensors", np.zeros((2, 1, 16, 16), np.float32)
    first = space("classifier", classifier=path)
    assert first.extract(x).shape == (2, 128)
    monkeypatch.setattr("ul_export.evaluation.classifier.train_classifier", None)
    second = space("classifier", classifier=path)
    assert np.array_equal(first.extract(x), second.extract(x))
    assert first.record == second.record
    assert 0.0 <= first.record["heldout_accuracy"] <= 1.0


def test_a_classifier_of_other_images_or_another_file_is_refused(tmp_path):
    path, data = tmp_path / "c.safetensors", splits()
    save_classifier(path, train_classifier(data.train, 1), {"data": data.train.fingerprint})
    load_classifier(path, data.train)
    with pytest.raises(BadInputError, match=r"c\.safetensors: trained on other images"):
        load_classifier(path, data.heldout)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInputError, match="not a safetensors file"):
        load_classifier(path, data.train)
    save_file({"w": np.zeros(2, np.float32)}, path)
    with pytest.raises(BadInputError, match="not a classifier of ul-eval"):
        load_classifier(path, data.train)
    save_file({"w": np.zeros(2, np.float32)}, path, {"format": "unified-latents-classifier-1", "facts": "{}"})
    with pytest.raises(BadInputError, match="damaged"):
        load_classifier(path, data.train)


def test_packaged_weights_of_other_bytes_are_never_unpickled(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save({"w": torch.ones(2)}, package / "w.pth")
    monkeypatch.syspath_prepend(tmp_path)
    import hashlib

    right = hashlib.sha256((package / "w.pth").read_bytes()).hexdigest()
    assert packaged_weights("some_weights", "w.pth", right, "eval")["w"].tolist() == [1.0, 1.0]
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(BadInputError, match=r"SHA-256 is .* expected 000000000000"):
        packaged_weights("some_weights", "w.pth", "0" * 64, "eval")
    with pytest.raises(BadInputError, match=r"holds no v\.pth"):
        packaged_weights("some_weights", "v.pth", right, "eval")
    with pytest.raises(UsageError, match=re.escape(f"no_weights is not installed; {install('eval')}")):
        packaged_weights("no_weights", "w.pth", right, "eval")


def test_efficientnet_sees_more_in_an_image_than_in_grey_and_takes_grey_as_three_equal_channels():
    found = space(module.EFFICIENTNET)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 1, 16, 16)).astype(np.float32)
    features = found.extract(x)
    assert features.shape == (2, 1280)
    assert features == pytest.approx(found.extract(np.repeat(x, 3, axis=1)), abs=1e-5)
    assert not np.allclose(features[0], features[1], atol=1e-2)


def test_a_failing_onnx_file_says_on_what(tmp_path):
    found = space(write_onnx(tmp_path / "f.onnx", ("b", 1, "h", "w")))
    with pytest.raises(ULError, match=r"ONNX Runtime failed on \[2, 2, 4, 4\]"):
        found.extract(np.zeros((2, 2, 4, 4), np.float32))
