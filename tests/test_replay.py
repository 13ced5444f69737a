"""ul-generate --replay: the same picture from its own info, and one clear line for all else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from host_memory import HostMemory
from PIL import Image, PngImagePlugin

from ul_runtime.backends.gpu_loop import bucket_of
from ul_runtime.backends.ort_cuda import OrtDeviceBackend
from ul_runtime.bundle import Bundle
from ul_runtime.cli.generate import main
from ul_runtime.cli.latents import decode_main as decode
from ul_runtime.images.png import ImageInfo, as_pil, png_bytes, read_info, read_png
from ul_runtime.latents import latents_bytes
from ul_runtime.pipeline import Pipeline

FAST = ("--steps", 3, "--decoder-steps", 2, "--threads", 1)
NOISY = ("--sampler", "ancestral", "--decoder-sampler", "ancestral", "--seed", 2**64 - 1)
JOBS = {
    "plain": FAST,
    "the bundle's defaults": ("--threads", 1),
    "every setting": (
        *FAST, *NOISY, "--grid", "mix", "--decoder-grid", "cosine", "--guidance", "1.7", "--guidance-interval=-inf,3.3",
    ),
    "labels and none": (
        *FAST, *NOISY, "--label", "blue", "--label", "none", "--guidance", 2.3, "--guidance-interval", "all",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def guided_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its defaults guide, so that a setting that a replay forgets shows."""
    return write_analytic_bundle(tmp_path_factory.mktemp("guided") / "bundle", guidance=1.5).path


@pytest.fixture
def picture(command, guided_bundle, tmp_path) -> Path:
    """Image 2 of a job."""
    assert command(main, guided_bundle, "--out", tmp_path / "job", "--num-images", 3, *NOISY, *FAST).code == 0
    return tmp_path / "job" / "000002.png"


def rewrite(path: Path, pixels: np.ndarray | None = None, **changes: Any) -> Path:
    """The image with other pixels, or with another job and info, whole and coherent as a forger would make it."""
    there, info = stored(path)
    about = {name: changes.pop(name) for name in ("label", "software", "batch") if name in changes}
    info = info.model_copy(update={"job": info.job.model_copy(update=changes), **about})
    path.write_bytes(png_bytes(as_pil(there if pixels is None else pixels), info))
    return path


def stored(path: Path) -> tuple[np.ndarray, ImageInfo]:
    found = read_png(path)
    return found.pixels, read_info(found.texts, str(path))


@pytest.mark.parametrize("arguments", JOBS.values(), ids=JOBS)
def test_every_picture_of_a_job_is_made_again_byte_for_byte(command, guided_bundle, tmp_path, arguments):
    assert command(main, guided_bundle, "--out", tmp_path / "job", "--num-images", 4, *arguments).code == 0
    for index in range(4):
        file = tmp_path / "job" / f"{index:06d}.png"
        result = command(main, guided_bundle, "--replay", file, "--out", tmp_path / "again", "--threads", 1)
        assert result.code == 0, result
        assert "the same file, byte for byte" in result.out
        assert result.err == ""
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_json_says_what_was_compared(command, guided_bundle, picture):
    result = command(main, guided_bundle, "--replay", picture, "--json")
    assert json.loads(result.out) == {
        "image": str(picture), "index": 2, "label": "blue", "seed": 2**64 - 1, "changed": {}, "pixels_equal": True,
        "pixels_differing": 0, "largest_difference": 0, "out": None, "bytes_equal": True,
    }  # fmt: skip
    assert result.out.count("\n") == 1


def test_one_changed_pixel_is_found(command, guided_bundle, picture):
    pixels = read_png(picture)[0].copy()
    pixels[3, 4, 1] ^= 8
    rewrite(picture, pixels)
    message = "is not the image made again: 1 pixels differ, by at most 8"
    command.fails(main, 1, message, guided_bundle, "--replay", picture)
    result = command(main, guided_bundle, "--replay", picture, "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert (found["pixels_equal"], found["pixels_differing"], found["largest_difference"]) == (False, 1, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8}, {"guidance": 2.5}, {"prior_num_steps": 4}, {"prior_grid": "cosine"}, {"decoder_num_steps": 3},
        {"prior_sampler": "ddim"}, {"decoder_sampler": "ddim"}, {"decoder_grid": "mix"}, {"label": "red"},
        {"guidance_interval": None},
    ],
    ids=str,
)  # fmt: skip
def test_each_setting_is_used(command, guided_bundle, picture, changes):
    result = command(main, guided_bundle, "--replay", rewrite(picture, **changes))
    assert result.code == 1, result
    assert "pixels differ" in result.err


def test_a_picture_of_another_shape_is_different(command, guided_bundle, picture):
    rewrite(picture, np.zeros((16, 16, 3), np.uint8))
    command.fails(main, 1, "has another shape or depth", guided_bundle, "--replay", picture)


def test_another_compression_of_the_same_pixels_is_the_same_picture_and_is_said(command, guided_bundle, picture):
    found = read_png(picture)
    chunks = PngImagePlugin.PngInfo()
    for key, text in {**found.texts, "Comment": "mine"}.items():
        chunks.add_text(key, text)
    as_pil(found.pixels).save(picture, pnginfo=chunks, compress_level=1)
    assert picture.read_bytes() != found.data
    result = command(main, guided_bundle, "--replay", picture)
    assert result.code == 0
    assert "the same pixels in other bytes of the file" in result.out


def test_another_bundle_is_refused_with_both_hashes(command, guided_bundle, picture, tmp_path):
    other = write_analytic_bundle(tmp_path / "other", latent_std=0.7)
    hashes = f"made from bundle {Bundle.open(guided_bundle).hash}, and this one is {other.hash}"
    command.fails(main, 65, hashes, other.path, "--replay", picture, "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_picture_is_never_written_over(command, guided_bundle, picture, tmp_path):
    before = picture.read_bytes()
    command.fails(main, 2, "000002.png: exists", guided_bundle, "--replay", picture, "--out", picture.parent)
    assert picture.read_bytes() == before
    shutil.copy(picture, tmp_path / "mine.png")
    arguments = (guided_bundle, "--replay", tmp_path / "mine.png", "--out", tmp_path / "again")
    assert command(main, *arguments).code == 0
    command.fails(main, 2, "000002.png: exists", *arguments)


def test_a_picture_that_differs_is_written_too_so_that_it_can_be_looked_at(command, guided_bundle, picture, tmp_path):
    again = read_png(picture)[0]
    rewrite(picture, 255 - again)
    result = command(main, guided_bundle, "--replay", picture, "--out", tmp_path / "again")
    assert result.code == 1
    assert np.array_equal(read_png(tmp_path / "again" / "000002.png")[0], again)


def test_another_version_is_said(command, guided_bundle, picture):
    rewrite(picture, software="unified-latents 0.0.9")
    result = command(main, guided_bundle, "--replay", picture)
    assert result.code == 0
    assert "the same pixels in other bytes of the file" in result.out
    assert "software was unified-latents 0.0.9, is unified-latents" in result.err
    changed = json.loads(command(main, guided_bundle, "--replay", picture, "--json").out)["changed"]
    assert list(changed) == ["software"]


def test_backend_precision_and_threads_are_those_of_the_picture_unless_given(command, guided_bundle, tmp_path):
    job, options = tmp_path / "job", ("--backend", "openvino", "--threads", 1)
    assert command(main, guided_bundle, "--out", job, "-n", 1, "--precision", "fp32", *options).code == 0
    picture = job / "000000.png"
    result = command(main, guided_bundle, "--replay", picture)
    assert (result.code, result.err) == (0, "")
    assert "byte for byte" in result.out
    result = command(main, guided_bundle, "--replay", picture, "--backend", "ort-cpu", "--json")
    assert json.loads(result.out)["changed"] == {"backend": ["openvino", "ort-cpu"], "threads": [1, None]}
    assert "backend was openvino, is ort-cpu" in result.err


def test_another_backend_must_be_asked_for_and_is_said(command, guided_bundle, picture):
    rewrite(picture, backend="abacus")
    command.fails(main, 65, "made by backend 'abacus'; choose one", guided_bundle, "--replay", picture)
    result = command(main, guided_bundle, "--replay", picture, "--backend", "ort-cpu")
    assert result.code == 0
    assert "backend was abacus, is ort-cpu" in result.err


def test_what_ul_decode_made_says_that_it_needs_its_latents(command, guided_bundle, tmp_path):
    (tmp_path / "z.npz").write_bytes(latents_bytes(".npz", {"z_0": np.zeros((1, 4, 4, 4), np.float32)}, {}))
    assert command(decode, guided_bundle, tmp_path / "z.npz", "--out", tmp_path / "out", "--threads", 1).code == 0
    picture = tmp_path / "out" / "000000.png"
    message = "made by ul-decode from a file of latents"
    command.fails(main, 65, message, guided_bundle, "--replay", picture)


def test_a_contact_sheet_is_not_one_picture(command, guided_bundle, picture):
    sheet = picture.with_name("contact_sheet.png")
    command.fails(main, 65, "is a contact sheet; choose one image", guided_bundle, "--replay", sheet)


def test_a_picture_of_someone_else_does_not_say_how_it_was_made(command, guided_bundle, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command.fails(main, 65, "does not say how it was made", guided_bundle, "--replay", tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    command.fails(main, 65, "is not a whole PNG file", guided_bundle, "--replay", tmp_path / "a.jpg")
    command.fails(main, 2, "no such file", guided_bundle, "--replay", tmp_path / "nowhere.png")


@pytest.mark.case("N17")
def test_a_picture_of_another_kind_is_named(command, guided_bundle, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png", "JPEG")
    message = "photo.png: is not a whole PNG file: it begins as JPEG"
    command.fails(main, 65, message, guided_bundle, "--replay", tmp_path / "photo.png")


@pytest.mark.case("N17")
def test_a_misspelled_model_of_the_package_is_guessed(command, tmp_path):
    command.fails(main, 65, "did you mean garments-32?", "garment-32", "--out", tmp_path / "out")


def test_an_image_of_an_earlier_version_says_so(command, guided_bundle, picture):
    info = stored(picture)[1]
    chunks = PngImagePlugin.PngInfo()
    for key, value in {**info.job.model_dump(mode="json"), "job": info.job.fingerprint, "index": 2}.items():
        chunks.add_text(key, str(value))
    chunks.add_text("Software", "unified-latents 0.0.9")
    Image.new("RGB", (8, 8)).save(picture, pnginfo=chunks)
    command.fails(main, 65, "was written by an earlier version", guided_bundle, "--replay", picture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_sampler": "astrology"}, "cannot be made again: sampler 'astrology'"),
        ({"decoder_grid": "evil"}, "cannot be made again: grid"),
        ({"decoder_grid": "\u202eevil"}, "decoder_grid: String should match pattern"),
        ({"label": "mauve"}, "label 'mauve' is not a class of the bundle"),
        ({"guidance_interval": (3.0, -3.0)}, "cannot be made again: the guidance interval"),
        ({"guidance_interval": (float("nan"), 1.0)}, "cannot be made again: the guidance interval"),
    ],
)
def test_settings_that_cannot_be_are_one_line_about_the_picture(command, guided_bundle, picture, changes, message):
    rewrite(picture, **changes)
    command.fails(main, 65, message, guided_bundle, "--replay", picture)


def test_guidance_of_a_bundle_without_classes_is_refused(command, tmp_path):
    bundle = write_analytic_bundle(tmp_path / "bundle", classes=()).path
    assert command(main, bundle, "--out", tmp_path / "job", "--num-images", 1, *FAST).code == 0
    picture = tmp_path / "job" / "000000.png"
    assert command(main, bundle, "--replay", picture).code == 0
    rewrite(picture, guidance=3.0)
    command.fails(main, 65, "cannot be made again: guidance 3.0", bundle, "--replay", picture)


@pytest.mark.parametrize(
    "option",
    [("--seed", 1), ("--steps", 3), ("--num-images", 64), ("--label", "red"), ("--batch-size", 1), ("--guidance", 1.5)],
)
def test_options_that_the_picture_says_are_refused(command, guided_bundle, picture, option):
    command.fails(main, 2, f"{option[0]}: cannot be given with --replay", guided_bundle, "--replay", picture, *option)


def test_without_replay_a_folder_is_needed(command, guided_bundle):
    command.fails(main, 2, "--out is missing", guided_bundle)


def test_a_guided_picture_needs_its_guide(command, guided_bundle, tmp_path):
    guide = write_analytic_bundle(tmp_path / "guide", latent_std=0.7).path
    made = command(main, guided_bundle, "--guide", guide, "--out", tmp_path / "job", "--num-images", 2, *FAST)
    assert made.code == 0
    picture = tmp_path / "job" / "000001.png"
    assert "byte for byte" in command(main, guided_bundle, "--guide", guide, "--replay", picture).out
    command.fails(main, 65, "--guide gives no bundle", guided_bundle, "--replay", picture)
    command.fails(main, 65, "give the guide that made it", guided_bundle, "--guide", guided_bundle, "--replay", picture)


class Rounding(OrtDeviceBackend):
    """A device on which pictures depend on the size of their batch, as on a card."""

    name = "ort-cuda"
    computed_as = staticmethod(bucket_of)

    def _bind(self, graph, dims, addresses):
        engine, memory = super()._bind(graph, dims, addresses), self.loop.memory
        if graph != "decoder_step":
            return engine

        class Rounded:
            def enqueue(self) -> None:
                engine.enqueue()
                pred = memory.held[addresses["x_next"]].view(np.float32)
                pred += np.float32(0.02 * dims["b"])

        return Rounded()


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands work on such a device."""

    def open_pipeline(path, *_):
        bundle = Bundle.open(path)
        backend = Rounding(bundle, HostMemory(), ["CPUExecutionProvider"])
        return Pipeline(bundle.manifest, backend, path=bundle.path, hash=bundle.hash)

    monkeypatch.setattr("ul_runtime.loading.open_pipeline", open_pipeline)


def test_a_picture_that_depends_on_its_batch_is_made_again_in_one_of_that_size(
    command, guided_bundle, tmp_path, rounding
):
    words = ("--out", tmp_path / "job", "--num-images", 5, "--batch-size", 4, *FAST)
    assert command(main, guided_bundle, *words, "--backend", "ort-cuda").code == 0
    batches = []
    for index in (0, 3, 4):
        file = tmp_path / "job" / f"{index:06d}.png"
        batches.append(stored(file)[1].batch)
        result = command(main, guided_bundle, "--replay", file)
        assert result.code == 0, result
        assert "the same file, byte for byte" in result.out
    assert batches == [4, 4, 4], "the last one too"
    changed = rewrite(tmp_path / "job" / "000000.png", batch=2)
    command.fails(main, 1, "pixels differ", guided_bundle, "--replay", changed)


def test_a_job_that_went_on_has_the_same_pictures_where_they_depend_on_their_batch(
    command, guided_bundle, tmp_path, rounding
):
    words = ("--num-images", 6, "--backend", "ort-cuda", *FAST)
    for folder in ("at once", "in pieces"):
        assert command(main, guided_bundle, "--out", tmp_path / folder, *words).code == 0
    pieces = sorted((tmp_path / "in pieces").glob("0*.png"))
    for path in (pieces[1], pieces[5]):
        path.unlink()
    assert command(main, guided_bundle, "--out", tmp_path / "in pieces", *words).code == 0
    for path in pieces:
        assert path.read_bytes() == (tmp_path / "at once" / path.name).read_bytes()
