"""The models inside the package: found by name, opened as any bundle, made by tools/ship_model.py."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from PIL import Image
from tool_module import load_tool

import ul_runtime
from ul_runtime import loading
from ul_runtime.bundle import Bundle
from ul_runtime.cli.generate import main as generate
from ul_runtime.errors import BadInputError, UntrustedError, UsageError
from ul_runtime.images.find import find_images
from ul_train.config import validate

QUICK = ("--steps", 2, "--decoder-steps", 1, "--threads", 1)


@pytest.fixture
def one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in which only `analytic` ships; its files are hard links, as some installers make them."""
    bundle = write_analytic_bundle(tmp_path / "package" / "analytic")
    for file in list(bundle.path.iterdir()):
        (tmp_path / file.name).hardlink_to(file)
    monkeypatch.setattr(loading, "MODELS", tmp_path / "package")
    monkeypatch.setattr(loading, "DEFAULT", "analytic")
    return bundle.path


def test_a_model_is_found_by_name_and_when_nothing_is_given(one_model):
    expected = ul_runtime.load("analytic").hash
    assert ul_runtime.load().hash == expected
    with pytest.raises(UntrustedError, match="link"):
        Bundle.open(one_model)  # of an installer's hard links only those inside the package are taken


def test_a_folder_goes_before_a_model_of_its_name(one_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = write_analytic_bundle(tmp_path / "analytic", latent_std=0.3)
    assert ul_runtime.load("analytic").hash == other.hash != ul_runtime.load().hash


def test_a_name_that_does_not_ship_is_refused_with_those_that_do(one_model):
    with pytest.raises(
        BadInputError, match=r"nowhere: no such folder, .*\(those that do: analytic\); expected a bundle"
    ):
        ul_runtime.load("nowhere")


def test_without_a_bundle_ul_generate_takes_the_model_and_can_replay_its_pictures(one_model, command, tmp_path):
    made = command(generate, "--num-images", 2, "--out", tmp_path / "out", *QUICK)
    assert made.code == 0, made
    again = command(generate, "--replay", tmp_path / "out" / "000001.png")
    assert again.code == 0, again
    assert "the same file, byte for byte" in again.out


@pytest.fixture(scope="module")
def ship() -> ModuleType:
    return load_tool("ship_model")


def evaluation(path: Path, bundle_hash: str) -> Path:
    """eval.json as far as the tool reads it."""
    keys = ("settings", "computed_by", "seeds", "generation", "reconstruction", "bits_per_pixel", "memorisation")
    record = {"bundle": {"hash": bundle_hash, "path": "/home/someone"}, "versions": {}, **dict.fromkeys(keys, 1.5)}
    path.write_text(json.dumps(record))
    return path


def test_a_model_ships_with_its_quality_and_without_folders_of_a_machine(ship, tmp_path, monkeypatch):
    bundle = write_analytic_bundle(tmp_path / "bundle")
    file = evaluation(tmp_path / "eval.json", bundle.hash)
    ship.ship(bundle.path, file, "closed forms", tmp_path / "models")
    written = Bundle.open(tmp_path / "models" / "analytic")
    assert written.manifest.quality["generation"] == 1.5
    assert written.manifest.quality["trained_on"] == "closed forms"
    assert written.manifest.files == bundle.manifest.files
    assert "someone" not in (written.path / "manifest.json").read_text()
    ship.ship(bundle.path, file, "closed forms", tmp_path / "models")  # again: replaced

    with pytest.raises(BadInputError, match="is of bundle 000000000000"):
        ship.ship(bundle.path, evaluation(file, "0" * 64), "closed forms", tmp_path / "models")
    monkeypatch.setattr(ship, "MOST_BYTES", 1000)
    with pytest.raises(BadInputError, match="at most 1000 ship; export with --weights fp16"):
        ship.ship(bundle.path, evaluation(file, bundle.hash), "closed forms", tmp_path / "models")


# The model itself.


def test_the_model_fits_into_twelve_megabytes_and_says_how_good_it_is_and_how_it_was_trained():
    bundle = loading.open_bundle(None)
    assert loading.shipped_names() == [loading.DEFAULT]
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 12_000_000
    quality = bundle.manifest.quality
    distance = quality["generation"]["classifier"]["frechet_distance"]
    assert distance["count"] == 1000
    assert distance["real"] < distance["value"] < 2 * distance["real"], "what it was trained for"
    assert "MIT" in quality["trained_on"]
    assert validate(bundle.manifest.recipe, "its recipe").name == loading.DEFAULT
    assert "rounded to float16" in bundle.manifest.provenance.weights


def test_its_pictures_are_garments_of_all_classes_and_the_same_everywhere(command, tmp_path):
    made = command(generate, "--num-images", 20, "--seed", 1, "--out", tmp_path / "out", "--threads", 1)
    assert made.code == 0, made
    pictures = [np.asarray(Image.open(tmp_path / "out" / f"{i:06d}.png")).astype(int) for i in range(20)]
    for picture in pictures:
        assert picture.shape == (32, 32)
        assert max(picture[:2].mean(), picture[-2:].mean()) < 25, "garments lie in the middle"
        assert 15 < picture.mean() < 200
        steps = np.abs(np.diff(picture, axis=0)).mean() / picture.std()
        assert steps < 0.6, "noise has 1.1"
    trousers, bags = (np.mean([pictures[k], pictures[k + 10]], axis=0) for k in (1, 8))
    assert trousers[:, 12:20].mean() > 1.5 * bags[2:8].mean()
    replayed = command(generate, "--replay", tmp_path / "out" / "000019.png")
    assert "the same file, byte for byte" in replayed.out


def test_a_setting_that_does_not_exist_is_refused_with_the_one_meant():
    pipeline = ul_runtime.load()
    for given, message in (
        ({"label": "Bag"}, "did you mean labels"),
        ({"decoder_step": 2}, "did you mean decoder_steps"),
    ):
        with pytest.raises(UsageError, match=message):
            next(pipeline.generate(1, **given))


def test_the_contact_sheet_beside_pictures_is_no_picture_to_encode(command, tmp_path):
    out = tmp_path / "out"
    assert command(generate, "--num-images", 2, "--out", out, *QUICK).code == 0
    assert [file.path.name for file in find_images([out])[0]] == ["000000.png", "000001.png"]
    assert [file.path.name for file in find_images([out / "contact_sheet.png"])[0]] == ["contact_sheet.png"]
    (out / "generate.json").unlink()
    assert len(find_images([out])[0]) == 3, "any other folder may hold a picture of that name"
