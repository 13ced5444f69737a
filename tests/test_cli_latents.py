"""ul-encode and ul-decode: pictures to latents with their bits, and back."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analytic_bundle import CLASSES, write_analytic_bundle
from PIL import Image

import ul_runtime
from ul_runtime.cli.latents import _names
from ul_runtime.cli.latents import decode_main as decode
from ul_runtime.cli.latents import encode_main as encode
from ul_runtime.latents import latents_bytes, read_latents

THREAD = ("--threads", 1)
COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "other": (128, 128, 128)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (20 + 4 * k, 16), colour).save(tmp_path / "photos" / name / f"{k}.png")
    return tmp_path / "photos"


def test_gpus_and_engines_can_be_named_as_for_ul_generate(command, analytic_bundle, photos, tmp_path):
    file = tmp_path / "latents.npz"
    assert command(encode, analytic_bundle, photos, "--out", file, "--bits-samples", 1, *THREAD).code == 0
    for main, words in ((encode, (photos, "--out", tmp_path / "new.npz")), (decode, (file, "--out", tmp_path / "out"))):
        command.fails(main, 2, "--devices 0,1: one GPU is expected", analytic_bundle, *words, "--devices", "0,1")
        options = ("--backend", "ort-cpu", "--engines", tmp_path)
        command.fails(main, 2, "leave out --devices, --engines", analytic_bundle, *words, *options)
    assert not (tmp_path / "new.npz").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_decode_of_encode_is_the_reconstruction(command, analytic_bundle, photos, tmp_path, suffix):
    file, out = tmp_path / f"latents{suffix}", tmp_path / "out"
    result = command(encode, analytic_bundle, photos, "--out", file, "--bits-samples", 4, *THREAD)
    assert result.code == 0, result
    assert "6 images" in result.out
    assert "bits/pixel" in result.out
    result = command(decode, analytic_bundle, file, "--out", out, "--mean-of", 8, "--decoder-steps", 10, *THREAD)
    assert result.code == 0, result
    files = sorted(photos.rglob("*.png"))
    for index, file in enumerate(files):
        with Image.open(out / f"{index:06d}.png") as picture:
            pixels = np.asarray(picture).astype(float)
            info = json.loads(picture.info["unified-latents"])
        assert np.abs(pixels.mean(axis=(0, 1)) - COLOURS[file.parent.name]).max() < 12
        assert info["label"] == (file.parent.name if file.parent.name in CLASSES else "none")
    assert (out / "contact_sheet.png").exists()
    assert json.loads((out / "decode.json").read_text())["job"]["mean_of"] == 8


def test_the_file_holds_both_latents_labels_bits_and_names(command, analytic_bundle, photos, tmp_path):
    file = tmp_path / "latents.safetensors"
    result = command(encode, analytic_bundle, photos, "--out", file, "--batch-size", 4, "--json", *THREAD)
    latents = read_latents(file)
    shapes = {name: array.shape for name, array in latents.arrays.items()}
    assert shapes == {"z_0": (6, 4, 4, 4), "z_clean": (6, 4, 4, 4), "label": (6,), "bits": (6,)}
    assert latents.arrays["label"].tolist() == [1, 1, 3, 3, 0, 0]
    assert latents.info["names"] == [str(path) for path in sorted(photos.rglob("*.png"))]
    printed = json.loads(result.out)
    assert (printed["num_images"], printed["rejected"]) == (6, [])
    assert printed["bits_per_image"] == pytest.approx(latents.arrays["bits"].mean(), abs=1e-3)
    assert printed["bits_per_pixel"] == pytest.approx(latents.arrays["bits"].mean() / 64, abs=1e-6)


@pytest.mark.case(
    "N13",
    "ul-encode on pictures of another kind than those of the training",
    "a warning where they take 1.5 times the bits of held-out images, which ul-export puts into the manifest",
)
@pytest.mark.parametrize(("share", "warned"), [(None, False), (1.0, False), (0.5, True)])
def test_bits_far_above_those_of_the_training_are_warned_of(command, photos, tmp_path, share, warned):
    bundle = write_analytic_bundle(tmp_path / "bundle").path
    given = (bundle, photos, "--bits-samples", 1, "--json", *THREAD)
    bits = json.loads(command(encode, *given, "--out", tmp_path / "a.npz").out)["bits_per_image"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["quality"] = {} if share is None else {"heldout_bits_per_image": share * bits}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = command(encode, *given, "--out", tmp_path / "b.npz")
    assert result.code == 0
    assert ("it may not reconstruct such images" in result.err) == warned


@pytest.mark.case("N12")
def test_the_sheet_of_decoded_latents_has_the_names_of_the_images(command, analytic_bundle, photos, tmp_path):
    assert command(encode, analytic_bundle, photos, "--out", tmp_path / "a.npz", "--bits-samples", 1, *THREAD).code == 0
    file = read_latents(tmp_path / "a.npz")
    assert _names(file) == [path.name for path in sorted(photos.rglob("*.png"))]
    for names in (None, ["one"], "abcdef"):
        assert _names(replace(file, info={"names": names})) == []


@pytest.mark.case(
    "F12", "ul-encode on a folder with a broken and a small image", "the others are encoded; exit code 65"
)
def test_images_that_cannot_be_read_cost_none_of_the_others(command, analytic_bundle, photos, tmp_path):
    out = (tmp_path / "before.npz", tmp_path / "after.npz")
    assert command(encode, analytic_bundle, photos, "--out", out[0], "--bits-samples", 1, *THREAD).code == 0
    (photos / "green" / "0a.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    Image.new("RGB", (4, 4)).save(photos / "red" / "9.png")
    (photos / "red" / "raw.dng").write_bytes(b"II*\0")
    result = command(encode, analytic_bundle, photos, "--out", out[1], "--bits-samples", 1, "--json", *THREAD)
    assert result.code == 65
    assert f"3 of 9 images cannot be read; the others are in {out[1]}" in result.err
    assert result.err.count("left out: ") == 3
    assert "0a.png: corrupt or truncated" in result.err
    assert "9.png: smaller than the model (4x4, model 8x8)" in result.err
    assert "raw.dng: unsupported (.dng; convert it to PNG)" in result.err
    assert len(json.loads(result.out)["rejected"]) == 3
    before, after = map(read_latents, out)
    assert after.info["names"] == before.info["names"]
    assert all(np.array_equal(before.arrays[name], after.arrays[name]) for name in before.arrays)


def labels_of(command, bundle, source, out) -> list[str]:
    assert command(encode, bundle, source, "--out", out, "--bits-samples", 1, *THREAD).code == 0
    names = (*json.loads((bundle / "manifest.json").read_text())["classes"], "none")
    return [names[label] for label in read_latents(out).arrays["label"]]


@pytest.mark.case(
    "F11", "ul-encode on class folders with sub-folders, links and escaped names", "the class is that of ul-train"
)
def test_an_image_has_the_class_that_training_gives_it(command, tmp_path):
    decomposed = "e\u0301te\u0301"
    bundle = write_analytic_bundle(tmp_path / "bundle", classes=("a\\nb", "\u00e9t\u00e9", "red")).path
    for name in ("a\nb", f"{decomposed}/2019/red", "red", "other", ".red", "__MACOSX/red"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "in" / name / "0.png")
    (tmp_path / "in" / "red" / "._1.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "away").mkdir()
    (tmp_path / "in" / "red").rename(tmp_path / "away" / "red")
    (tmp_path / "in" / "red").symlink_to(tmp_path / "away" / "red")
    labels = labels_of(command, bundle, tmp_path / "in", tmp_path / "all.npz")
    assert labels == ["a\\nb", "\u00e9t\u00e9", "none", "red"]
    assert labels_of(command, bundle, tmp_path / "in" / "red", tmp_path / "one.npz") == ["red"]
    assert labels_of(command, bundle, tmp_path / "in" / "red" / "0.png", tmp_path / "file.npz") == ["red"]


def test_bits_do_not_depend_on_the_batch(command, analytic_bundle, photos, tmp_path):
    for batch in (1, 6):
        command(encode, analytic_bundle, photos, "--out", tmp_path / f"{batch}.npz", "--batch-size", batch, *THREAD)
    one, six = (read_latents(tmp_path / f"{batch}.npz").arrays for batch in (1, 6))
    assert all(np.array_equal(one[name], six[name]) for name in one)


def test_bits_of_a_known_latent_are_those_of_the_closed_form(analytic_bundle):
    pipeline = ul_runtime.load(analytic_bundle, threads=1)
    z_clean = np.random.default_rng(1).normal(0, 0.5, (32, 4, 4, 4)).astype(np.float32)
    expected = 64 * 0.5 * math.log2(1 + 0.25 * math.exp(5))
    assert pipeline.bits(z_clean, num_samples=16).mean() == pytest.approx(expected, rel=0.03)


def test_what_cannot_be_encoded_is_one_line_and_writes_nothing(command, analytic_bundle, photos, tmp_path):
    out = tmp_path / "latents.npz"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    command.fails(encode, 65, "nowhere: no such file or folder", analytic_bundle, tmp_path / "nowhere", "--out", out)
    command.fails(encode, 65, "holds no images", analytic_bundle, tmp_path / "empty", "--out", out)
    broken = (tmp_path / "broken.png", "--out", out, "--backend", "ort-cpu")
    command.fails(encode, 65, "broken.png: corrupt", analytic_bundle, *broken)
    command.fails(encode, 2, "ends in .safetensors or .npz", analytic_bundle, photos, "--out", tmp_path / "latents.pt")
    command.fails(encode, 2, "--bits-samples is 0", analytic_bundle, photos, "--out", out, "--bits-samples", 0)
    command.fails(encode, 2, "--batch-size is 0", analytic_bundle, photos, "--out", out, "--batch-size", 0)
    assert not out.exists()
    out.write_bytes(b"mine")
    command.fails(encode, 2, "latents.npz: exists", analytic_bundle, photos, "--out", out)
    assert out.read_bytes() == b"mine"


def test_latents_of_another_bundle_are_refused(command, analytic_bundle, photos, tmp_path):
    command(encode, analytic_bundle, photos, "--out", tmp_path / "latents.npz", *THREAD)
    other = write_analytic_bundle(tmp_path / "other", latent_std=0.7).path
    command.fails(decode, 65, "made with bundle", other, tmp_path / "latents.npz", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write(path: Path, **arrays: np.ndarray) -> Path:
    path.write_bytes(latents_bytes(path.suffix, arrays, {}))
    return path


def test_a_file_with_nothing_but_z_0_can_be_decoded(command, analytic_bundle, tmp_path):
    file = write(tmp_path / "z.npz", z_0=np.zeros((2, 4, 4, 4)))
    assert command(decode, analytic_bundle, file, "--out", tmp_path / "out", *THREAD).code == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z_0": np.zeros((2, 3, 4, 4), np.float32)}, "z_0 is [2, 3, 4, 4], the bundle expects ['n', 4, 4, 4]"),
        ({"z_0": np.zeros((2, 4), np.float32)}, "has no z_0 of shape n c h w"),
        ({"z_0": np.zeros((0, 4, 4, 4), np.float32)}, "has no z_0 of shape n c h w"),
        ({"other": np.zeros((2, 4, 4, 4), np.float32)}, "has no z_0 of shape n c h w"),
        ({"z_0": np.full((2, 4, 4, 4), np.nan, np.float32)}, "z_0 is not finite at [0, 1]"),
        ({"z_0": np.zeros((1, 4, 4, 4), np.float32), "label": np.array([9])}, "label must be 1 numbers from 0 to 3"),
        ({"z_0": np.zeros((1, 4, 4, 4), np.float32), "label": np.array([0, 1])}, "label must be 1 numbers"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_latents_that_do_not_fit_are_one_line(command, analytic_bundle, tmp_path, arrays, message, suffix):
    file = write(tmp_path / f"z{suffix}", **arrays)
    command.fails(decode, 65, message, analytic_bundle, file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def test_a_pickle_in_a_file_of_latents_is_never_opened(command, analytic_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("z.npz", z_0=np.array([Payload()], dtype=object))
    command.fails(
        decode, 65, "holds Python objects, which are never unpickled", analytic_bundle, "z.npz", "--out", "out"
    )
    assert not Path("canary").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 64, b"{}" * 8])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_damaged_files_of_latents_are_one_line(command, analytic_bundle, tmp_path, content, suffix):
    (tmp_path / f"z{suffix}").write_bytes(content)
    code = 77 if content[:2] == b"PK" and suffix == ".safetensors" else 65  # which may hold a pickle
    command.fails(decode, code, f"z{suffix}: ", analytic_bundle, tmp_path / f"z{suffix}", "--out", tmp_path / "o")


def test_an_npz_that_would_expand_without_bound_is_refused(command, analytic_bundle, tmp_path):
    with zipfile.ZipFile(tmp_path / "z.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("z_0.npy", bytes(100_000_000))
    message = "to 100,000,000; more than 200 times is refused"
    command.fails(decode, 65, message, analytic_bundle, tmp_path / "z.npz", "--out", tmp_path / "out")


@pytest.mark.case("A16")
def test_ul_encode_looks_at_the_folder_of_its_file_before_it_opens_anything(command, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    command.fails(encode, 74, "file", tmp_path / "no.bundle", tmp_path, "--out", tmp_path / "file" / "latents.npz")
