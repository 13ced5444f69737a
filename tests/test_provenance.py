"""The info in an image: written and read back the same, and refused when it is anything else."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ul_runtime.errors import BadInputError
from ul_runtime.images.png import (
    ALL_CLASSES,
    KEY,
    SOFTWARE,
    DecodeJob,
    GenerateJob,
    ImageInfo,
    pixels_sha256,
    png_bytes,
    read_info,
    read_png,
)
from ul_runtime.samplers import GRIDS, SAMPLERS
from ul_runtime.settings import MOST_GUIDANCE, SamplerSettings, Settings

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HASH, OTHER = "0123456789abcdef" * 4, "f" * 64
PRIOR, DECODER = SamplerSettings("dpmpp2m", "mix", 32), SamplerSettings("ddim", "uniform", 8)
MACHINE = {"backend": "ort-cpu", "precision": "fp32", "threads": None}
JOB = GenerateJob(
    bundle=HASH,
    guide=None,
    seed=9,
    labels=ALL_CLASSES,
    **Settings(PRIOR, DECODER, 1.5, (-3.0, 1.5)).as_dict(),
    **MACHINE,
)
DECODED = DecodeJob(
    bundle=HASH, latents=OTHER, seed=1, mean_of=4, decoder_sampler="ddim", decoder_grid="uniform",
    decoder_num_steps=2, **MACHINE,
)  # fmt: skip
INFO = ImageInfo(job=JOB, bundle_name="fashion", index=7, label="Bag")
RECORD = json.loads(INFO.text())

names = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
loops = st.builds(SamplerSettings, st.sampled_from(list(SAMPLERS)), st.sampled_from(list(GRIDS)), st.integers(1, 65536))
intervals = st.none() | st.tuples(st.floats(-1e9, 0) | st.just(float("-inf")), st.floats(0.1, 1e9))
samplings = st.builds(Settings, loops, loops, st.floats(0, MOST_GUIDANCE), intervals, st.floats(0, 1))
seeds, indices = st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)


def read(text: str) -> ImageInfo:
    return read_info({KEY: text}, "here")


def with_field(place: str, text: str) -> str:
    """The info with the JSON `text` at `place`, such as job.seed."""
    marker = "\0marker"
    record: dict[str, Any] = json.loads(json.dumps(RECORD))
    part = record["job"] if place.startswith("job.") else record
    part[place.removeprefix("job.")] = marker
    return json.dumps(record).replace(json.dumps(marker), text)


@given(
    samplings,
    st.none() | st.just(OTHER),
    seeds,
    st.just(ALL_CLASSES) | st.lists(names, min_size=1, max_size=5),
    indices,
    names,
    names,
    st.none() | st.integers(1, 65536),
)
def test_what_is_written_is_what_is_read(sampling, guide, seed, labels, index, label, bundle_name, batch):
    job = GenerateJob(bundle=HASH, guide=guide, seed=seed, labels=labels, **sampling.as_dict(), **MACHINE)
    info = ImageInfo(job=job, bundle_name=bundle_name, index=index, label=label, batch=batch)
    found = read(info.text())
    assert found.model_dump(exclude={"fingerprint"}) == info.model_dump()
    assert found.job == job
    assert found.software == SOFTWARE


@pytest.mark.parametrize("job", [JOB, DECODED])
@pytest.mark.parametrize("label", ["Bag", "Tasche für Fuß", "шапка", "7", "null", '"quoted"', "none"])
def test_a_png_file_keeps_its_info_in_one_text_chunk(tmp_path, job, label):
    info = ImageInfo(job=job, bundle_name="fashion ü", index=7, label=label)
    (tmp_path / "a.png").write_bytes(png_bytes(Image.new("L", (4, 4), 7), info))
    stored = read_png(tmp_path / "a.png")
    assert stored.pixels.shape == (4, 4, 1)
    assert np.all(stored.pixels == 7)
    assert stored.texts == {KEY: info.model_copy(update={"pixels": pixels_sha256(stored.pixels)}).text()}
    assert stored.data == (tmp_path / "a.png").read_bytes()
    assert read_info(stored.texts, "a.png").label == label


def test_the_info_is_json_that_people_can_read():
    job = {
        "command": "ul-generate", "bundle": HASH, "guide": None, "guidance_rescale": 0.0, "seed": 9,
        "labels": ALL_CLASSES, "prior_sampler": "dpmpp2m", "prior_grid": "mix", "prior_num_steps": 32,
        "decoder_sampler": "ddim", "decoder_grid": "uniform", "decoder_num_steps": 8, "guidance": 1.5,
        "guidance_interval": [-3.0, 1.5], "backend": "ort-cpu", "precision": "fp32", "threads": None,
    }  # fmt: skip
    assert {
        "software": SOFTWARE, "bundle_name": "fashion", "job": job, "index": 7, "label": "Bag", "batch": None,
        "pixels": None, "fingerprint": JOB.fingerprint,
    } == RECORD  # fmt: skip


def test_each_field_of_a_job_is_in_its_fingerprint():
    changed = {
        "bundle": OTHER, "seed": 10, "labels": ("Bag",), "prior_sampler": "ddim", "prior_grid": "uniform",
        "prior_num_steps": 31, "decoder_sampler": "ancestral", "decoder_grid": "mix", "decoder_num_steps": 7,
        "guidance": 1.25, "guidance_interval": None, "guidance_rescale": 0.5, "guide": OTHER,
        "backend": "other", "precision": "bf16", "threads": 2,
        "prior_student": "prior-4", "decoder_student": "decoder-1",
    }  # fmt: skip
    assert changed.keys() == GenerateJob.model_fields.keys() - {"command"}
    prints = {JOB.model_copy(update={key: value}).fingerprint for key, value in changed.items()}
    assert len(prints | {JOB.fingerprint}) == len(changed) + 1


@pytest.mark.parametrize("place", [*sorted(RECORD.keys() - {"pixels"}), *(f"job.{key}" for key in RECORD["job"])])
def test_info_without_one_of_its_fields_is_refused(place):
    record = json.loads(INFO.text())
    part = record["job"] if place.startswith("job.") else record
    del part[place.removeprefix("job.")]
    with pytest.raises(BadInputError, match=r"^here: "):
        read(json.dumps(record))


HOSTILE = {
    "job": ["null", "[]", '"x"', "7", "{}", "[" * 100_000],
    "job.bundle": ["7", '""', f'"{"0" * 63}"', f'"{"G" * 64}"', '"../../etc"'],
    "job.seed": ["-1", str(2**64), "1e3", "1.5", "NaN", "true", "null", '"9"', "9" * 5000, "09", "[9]", "0x9", ""],
    "job.labels": ['"every class"', "[]x", '["a", 1]', "{}", '[["a"]]', "[" * 100_000, '"all"'],
    "job.prior_sampler": ['""', f'"{"a" * 200}"', r'"dd\nim"', r'"\u001b[31m"', "null", "7"],
    "job.prior_num_steps": ["0", "-5", "65537", "1000000000000", "NaN", "Infinity", "8.0", "true", '"8"'],
    "job.decoder_num_steps": ["0", "1" * 400],
    "job.guidance": ["NaN", "Infinity", "-Infinity", "1e999", "x", "null", '"1.5"', "true"],
    "job.guidance_interval": ["[1]", "[1, 2, 3]", "{}", '"all"', '["a", "b"]', "-3.0,1.5"],
    "job.command": ['""', '"ul-train"', '"ul-decode"', '"rm -rf"', "null"],
    "job.precision": ['""', f'"{"a" * 2**21}"'],
    "index": ["-1", str(2**63), "1e300", "NaN", '"seven"', "7.5", ""],
    "label": ['""', f'"{"a" * 200}"', r'"a\u0000b"', "7"],
    "batch": ["0", "-1", "1.0", '"4"'],
    "fingerprint": [f'"{OTHER}"', '""', "null"],
    "software": [
        '""', '"paint 1.0"', '"unified-latents"', r'"unified-latents \u001b[2J"', f'"unified-latents {"9" * 1000}"',
    ],
}  # fmt: skip


@pytest.mark.parametrize(("place", "text"), [(place, text) for place, texts in HOSTILE.items() for text in texts])
def test_nonsense_in_a_field_is_one_printable_line(place, text):
    check_refused(with_field(place, text))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", "{", "[" * 100_000, "a\x00b", "\x1b[2J", '"\\ud800"'])
def test_text_that_is_no_info_is_one_printable_line(text):
    check_refused(text)


def check_refused(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith("here: ")
    assert message.isprintable()
    assert len(message) < 500


def test_a_field_that_is_put_back_as_it_was_is_read():
    assert read(with_field("job.seed", "9")) == read(INFO.text())


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("job.seed", "10"),
        ("job.guidance", "2.5"),
        ("job.prior_num_steps", "16"),
        ("job.bundle", f'"{OTHER}"'),
        ("job.labels", '["Bag"]'),
    ],
)
def test_a_job_that_was_changed_to_another_good_one_is_noticed(key, text):
    with pytest.raises(BadInputError, match="was changed"):
        read(with_field(key, text))


def test_a_setting_that_this_version_does_not_know_is_noticed():
    newer = RECORD | {"job": RECORD["job"] | {"new_setting": 3}, "software": "unified-latents 9.0.0"}
    with pytest.raises(BadInputError, match=r"comes from a newer version: .*new_setting"):
        read(json.dumps(newer))


def test_chunks_of_other_programs_are_passed_over():
    other = {"Comment": "mine", "Software": "unified-latents 0.0.1", "bundle": "mine"}
    assert read_info({KEY: INFO.text()} | other, "here") == read(INFO.text())


def test_a_file_of_other_programs_does_not_say_how_it_was_made():
    with pytest.raises(BadInputError, match="does not say how it was made"):
        read_info({"Comment": "mine", "Software": "unified-latents 0.0.1"}, "here")


def test_a_file_of_an_earlier_version_says_so():
    earlier = {"command": "ul-generate", "bundle": HASH, "job": OTHER, "Software": "unified-latents 0.0.9"}
    with pytest.raises(BadInputError, match="was written by an earlier version"):
        read_info(earlier, "here")


def test_a_contact_sheet_says_its_job_and_has_no_index():
    found = read(ImageInfo(job=JOB, bundle_name="fashion").text())
    assert (found.job, found.index, found.label) == (JOB, None, None)


@pytest.mark.parametrize("data", [b"", SIGNATURE, SIGNATURE + bytes(100), b"GIF89a" + bytes(50)])
def test_a_file_that_is_no_png_is_one_line(tmp_path: Path, data: bytes):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadInputError, match="is not a whole PNG file"):
        read_png(tmp_path / "a.png")


def test_a_png_that_is_cut_or_damaged_anywhere_is_one_line(tmp_path: Path):
    whole = png_bytes(Image.effect_noise((16, 16), 50), INFO)
    for size in range(len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:size])
        with pytest.raises(BadInputError, match="is not a whole PNG file"):
            read_png(tmp_path / "a.png")
    for place in range(len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(BadInputError, match="is not a whole PNG file"):
            read_png(tmp_path / "a.png")


def test_a_text_chunk_that_would_fill_the_memory_is_one_line(tmp_path: Path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEY, "a" * 2**26, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(BadInputError, match="is not a whole PNG file"):
        read_png(tmp_path / "a.png")


def test_a_picture_that_would_fill_the_memory_is_one_line(tmp_path: Path):
    Image.new("1", (8200, 8200)).save(tmp_path / "a.png")
    with pytest.raises(BadInputError, match="8200 by 8200 px"):
        read_png(tmp_path / "a.png")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(BadInputError, match="at most 268435456 bytes"):
        read_png(tmp_path / "b.png")


def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadInputError, match="a file of at most"):
        read_png(tmp_path / "a.png")
