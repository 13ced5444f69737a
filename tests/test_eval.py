"""ul-eval: its figures on models that are known, its files, what it refuses, and how it stops."""

import base64
import json
import re
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from command import Runner
from PIL import Image
from tiny_run import blobs

import ul_runtime
from ul_export.evaluation.cli import main
from ul_runtime.images.png import contact_sheet
from ul_runtime.install import install
from ul_train.data.imageset import epoch_order

ROOT = Path(__file__).parent.parent
CLASSES = ("disc", "bar")
COUNT = 60
QUICK = ("--images", COUNT, "--seeds", 2, "--features", "pixels", "--threads", 1, "--steps", 4, "--bits-samples", 2)
DISTANCES = {"frechet_distance", "kernel_distance", "sliced_distance", "precision", "recall", "density", "coverage"}


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    np.savez(path, images=images, labels=labels, class_names=np.array(CLASSES))
    return path


def halves(folder: Path, images: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    """Options for 200 images to train on and 200 held out."""
    train = write(folder / "a.npz", images[:200], labels[:200])
    heldout = write(folder / "b.npz", images[200:], labels[200:])
    return "--data", train, "--heldout", heldout, "--cache", folder / "cache"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "bundle"
    means = np.array([[0.4] * 4, [-0.4] * 4, [0.0] * 4], np.float32)
    write_analytic_bundle(path, classes=CLASSES, class_mean=means, channels=1, size=16)
    return path


@pytest.fixture(scope="module")
def own(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Options for real images that the bundle's own distribution made: it is a perfect model of them."""
    folder = tmp_path_factory.mktemp("own")
    drawn = list(ul_runtime.load(bundle).generate(400, seed=999, steps=4))
    images = np.concatenate([batch.images for batch in drawn]).transpose(0, 3, 1, 2)
    labels = np.concatenate([batch.labels for batch in drawn])
    return halves(folder, images, labels)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Options for real images that are nothing like the bundle's."""
    folder = tmp_path_factory.mktemp("foreign")
    images, labels = blobs(400)
    return halves(folder, images, labels)


def figures_of(command: Runner, *arguments: Any) -> dict[str, Any]:
    result = command(main, *arguments, "--json")
    assert result.code == 0, result
    assert result.out.count("\n") == 1
    return json.loads(result.out)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Filled by the first test that needs them."""
    return {}


def both(
    command: Runner, results: dict[str, dict[str, Any]], bundle: Path, own: tuple[Any, ...], foreign: tuple[Any, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if not results:
        results["own"] = figures_of(command, bundle, *own, *QUICK)
        results["foreign"] = figures_of(command, bundle, *foreign, *QUICK)
    return results["own"], results["foreign"]


def test_a_perfect_model_scores_as_real_images_do_and_another_does_not(command, results, bundle, own, foreign):
    perfect, wrong = (result["generation"]["pixels"] for result in both(command, results, bundle, own, foreign))
    assert set(perfect) == set(wrong) == DISTANCES
    for name, figure in perfect.items():
        assert figure["count"] == COUNT
        assert figure["value"] == pytest.approx(figure["real"], rel=0.15, abs=0.1), name
    assert wrong["frechet_distance"]["value"] > 2 * wrong["frechet_distance"]["real"]
    for name in ("recall", "coverage"):
        assert wrong[name]["value"] < wrong[name]["real"] - 0.3


def test_a_perfect_model_is_no_nearer_to_its_training_images_than_held_out_ones(command, results, bundle, own, foreign):
    perfect, wrong = (result["memorisation"] for result in both(command, results, bundle, own, foreign))
    assert perfect["nearer_than_heldout"] == pytest.approx(0.5, abs=0.15)
    assert perfect["real"] == pytest.approx(0.5, abs=0.15)
    assert wrong["nearer_than_heldout"] < 0.05
    assert perfect["train_images"] == perfect["all_train_images"] == 200


def test_reconstructions_are_nearer_to_their_originals_than_other_images_are(command, results, bundle, own, foreign):
    found = both(command, results, bundle, own, foreign)[0]["reconstruction"]
    assert found["psnr_db"]["value"] > found["psnr_db"]["real"] + 3
    assert found["ssim"]["value"] > found["ssim"]["real"]
    assert found["psnr_db"]["count"] == COUNT
    assert found["frechet_distance"]["pixels"]["value"] < found["frechet_distance"]["pixels"]["real"]


def test_psnr_is_that_of_the_pipeline_and_the_spread_is_over_the_seeds(command, results, bundle, own, foreign):
    found = both(command, results, bundle, own, foreign)[0]
    pipeline = ul_runtime.load(bundle)
    with np.load(own[3]) as file:
        pixels = file["images"]
    ids = epoch_order(len(pixels), 0, 0)[:COUNT]
    x = pixels[ids].astype(np.float32) / np.float32(127.5) - np.float32(1)
    values = []
    for seed in (0, 1):
        (decoded,) = pipeline.decode(
            pipeline.encode(x, seed=seed, indices=ids).z_0, seed=seed, indices=ids, batch_size=COUNT
        )
        values.append(10 * np.log10(4 / np.square(decoded.x.clip(-1, 1) - x, dtype=np.float64).mean()))
    assert found["reconstruction"]["psnr_db"]["value"] == pytest.approx(np.mean(values), abs=1e-4)
    assert found["reconstruction"]["psnr_db"]["spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    bits = pipeline.bits(pipeline.encode(x).z_clean, indices=ids, num_samples=2).mean() / 256
    assert found["bits_per_pixel"]["value"] == pytest.approx(bits, rel=0.05)
    assert found["bits_per_pixel"]["value"] != pytest.approx(bits * 2, rel=0.05)  # the control


def test_the_record_says_what_was_measured_and_how(command, results, bundle, own, foreign):
    perfect, wrong = both(command, results, bundle, own, foreign)
    assert perfect["seeds"] == [0, 1]
    assert perfect["settings"]["prior_num_steps"] == 4
    assert perfect["data"]["reference"] == "heldout"
    assert perfect["data"]["classes"] == list(CLASSES)
    assert perfect["data"]["fingerprint"] != wrong["data"]["fingerprint"]
    assert perfect["features"] == {"pixels": {}}
    assert {"python", "numpy", "onnxruntime", "torch", "scipy"} <= set(perfect["versions"])
    assert any("trained on other images" in note for note in perfect["notes"])


def test_the_same_command_gives_the_same_figures(command, results, bundle, own, foreign):
    perfect, _ = both(command, results, bundle, own, foreign)
    again = figures_of(command, bundle, *own, *QUICK)
    other = figures_of(command, bundle, *own, *QUICK, "--seed", 5)
    for part in ("generation", "reconstruction", "bits_per_pixel", "memorisation"):
        assert again[part] == perfect[part]
        assert other[part] != perfect[part]  # the control


def test_people_get_a_table_and_a_page_with_its_images_inside(command, bundle, own, tmp_path):
    out = tmp_path / "evaluation"
    result = command(main, bundle, *own, *QUICK, "--features", "classifier", "--classifier-steps", 5, "--out", out)
    assert result.code == 0, result
    for part in ("Frechet distance", "copies, pixels", "samples, classifier", "bits per pixel", "Means ±"):
        assert part in result.out
    sheets = {"samples.png", "real.png", "reconstructions.png", "neighbours.png", "closest.png"}
    assert {path.name for path in out.iterdir()} == {"eval.json", "report.html", *sheets}
    figures = json.loads((out / "eval.json").read_text())
    assert set(figures["generation"]) == {"pixels", "classifier"}
    page = (out / "report.html").read_text()
    inside = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert {path.read_bytes() for path in out.glob("*.png")} == set(inside)
    assert not re.search(r'(src|href)="(?!data:)', page)
    for data in inside:
        with Image.open(BytesIO(data)) as picture:
            picture.load()


def test_the_first_samples_stand_beside_their_nearest_training_images(command, bundle, own, tmp_path):
    result = command(main, bundle, *own, *QUICK, "--out", tmp_path / "out")
    assert result.code == 0, result
    with np.load(own[1]) as train, np.load(own[3]) as heldout:
        images, labels = train["images"], heldout["labels"]
    pool = epoch_order(len(labels), 0, 0)[: 2 * COUNT][epoch_order(2 * COUNT, 0, 1)]
    second = np.sort(np.argsort(labels[pool], kind="stable")[1::2])  # every second one of each class
    replaced = pool[second]
    asked = [CLASSES[label] for label in labels[replaced]]
    drawn = list(ul_runtime.load(bundle).generate(COUNT, seed=0, labels=asked, steps=4))
    samples = np.concatenate([batch.images for batch in drawn]).transpose(0, 3, 1, 2)
    tiles, captions = [], []
    for row in range(8):
        far = np.sqrt(np.square((samples[row] - images.astype(np.float64)) / 127.5).sum(axis=(1, 2, 3)))
        nearest = np.argsort(far)[:5]
        tiles += [samples[row], *images[nearest]]
        captions += [f"sample {row}", *(f"{distance:.3g}" for distance in far[nearest])]
    title = "the first samples and their nearest training images, by pixels"
    names = ("sample", *(f"nearest {k}" for k in range(1, 6)))
    expected = contact_sheet([tile.transpose(1, 2, 0) for tile in tiles], title, names, captions)
    with Image.open(tmp_path / "out" / "neighbours.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
        assert not np.array_equal(np.asarray(picture), np.asarray(expected.rotate(180)))  # the control


def test_a_second_run_replaces_its_own_files_and_no_others(command, bundle, own, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "eval.json").write_text("old")
    assert command(main, bundle, *own, *QUICK, "--out", out).code == 0
    assert json.loads((out / "eval.json").read_text())["seeds"] == [0, 1]
    (out / "thesis.txt").write_text("mine")
    command.fails(main, 2, "holds other things (thesis.txt)", bundle, *own, *QUICK, "--out", out)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--images", 5), 2, "--images is 5; expected 6 or more"),
        (("--seeds", 0), 2, "--seeds is 0; expected 1 or more"),
        (("--seed", -1), 2, "the seed is -1"),
        (("--seed", 2**64 - 1), 2, f"the seed is {2**64}"),
        (("--bits-samples", 0), 2, "--bits-samples is 0"),
        (("--train-images", 0), 2, "--train-images is 0"),
        (("--classifier-steps", 0), 2, "--classifier-steps is 0"),
        (("--classifier", "c.pt"), 2, "--classifier c.pt: expected a name that ends in .safetensors"),
        (("--features", "pixels"), 2, "--features pixels, pixels: each may be given once"),
        (("--steps", 0), 2, "number of steps is 0"),
        (("--threads", 0), 2, "number of threads is 0"),
        (("--data", "nowhere"), 65, "nowhere: does not exist"),
    ],
)
def test_nonsense_is_one_line(command, bundle, own, options, code, message):
    command.fails(main, code, message, bundle, *own, *QUICK, *options)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--images", 101), 2, "--images 101: needs 202 real images, for two halves; there are 200 to train on"),
        (("--features", "inception"), 2, "--features inception: expected efficientnet-lite0, classifier, pixels or"),
        (("--features", "f.onnx"), 65, "--features f.onnx: cannot be read"),
    ],
)
def test_nonsense_that_the_images_show_is_one_line_after_what_was_said_of_them(
    command, bundle, own, options, code, message
):
    result = command(main, bundle, *own, *QUICK, *options)
    assert (result.code, result.out) == (code, "")
    lines = [line for line in result.err.splitlines() if line.startswith("ul-eval: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_ctrl_c_ends_it_with_75_and_writes_nothing(bundle, own, tmp_path):
    code = "from ul_export.evaluation.cli import main; main()"
    words = [bundle, *own, "--images", 100, "--seeds", 100000, "--features", "pixels", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    while not process.stderr.readline().startswith("sampling "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, ""), err
    assert "ul-eval: stopped" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["torch", "scipy"])
def test_what_is_not_installed_is_said_with_its_extra(bundle, own, package):
    program = f"""
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest)
from ul_export.evaluation.cli import main
main()
"""
    words = [sys.executable, "-c", program, *map(str, (bundle, *own, *QUICK))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ul-eval: {package} is not installed; {install('eval')}")


def test_without_the_perceptual_weights_the_report_says_what_to_install(command, bundle, own, monkeypatch):
    monkeypatch.setattr("ul_export.evaluation.measures.find_spec", lambda name: None)
    found = figures_of(command, bundle, *own, *QUICK, "--images", 20)
    assert "perceptual_distance" not in found["reconstruction"]
    assert found["absent"]["perceptual_distance"].endswith(install("perceptual"))
