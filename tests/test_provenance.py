"""Text chunks of pictures: written and read back the same, and refused when they are anything else."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ul_runtime.errors import BadInputError
from ul_runtime.png import (
    ALL_CLASSES,
    SOFTWARE,
    DecodeJob,
    GenerateJob,
    fingerprint,
    is_picture_of,
    picture_chunks,
    png_bytes,
    read_chunks,
    read_png,
    sheet_chunks,
)
from ul_runtime.samplers import GRIDS, SAMPLERS
from ul_runtime.settings import SamplerSettings, Settings

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
CHUNKS = picture_chunks(JOB, "fashion", 7, "Bag")

names = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
loops = st.builds(SamplerSettings, st.sampled_from(list(SAMPLERS)), st.sampled_from(list(GRIDS)), st.integers(1, 65536))
intervals = st.none() | st.tuples(st.floats(-1e9, 0) | st.just(float("-inf")), st.floats(0.1, 1e9))
samplings = st.builds(Settings, loops, loops, numbers, intervals, st.floats(0, 1))
seeds, indices = st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)


@given(
    samplings,
    st.none() | st.just(OTHER),
    seeds,
    st.just(ALL_CLASSES) | st.lists(names, min_size=1, max_size=5),
    indices,
    names,
    names,
)
def test_what_is_written_is_what_is_read(sampling, guide, seed, labels, index, label, bundle_name):
    job = GenerateJob(bundle=HASH, guide=guide, seed=seed, labels=labels, **sampling.as_dict(), **MACHINE)
    chunks = picture_chunks(job, bundle_name, index, label)
    assert all(isinstance(text, str) for text in chunks.values())
    found = read_chunks(chunks, "here")
    assert (found.job, found.bundle_name, found.index, found.label) == (job, bundle_name, index, label)
    assert found.software == SOFTWARE
    assert is_picture_of(chunks, fingerprint(job), index)
    assert not is_picture_of(chunks, fingerprint(job), index + 1)
    assert not is_picture_of(chunks, OTHER, index)


@pytest.mark.parametrize("job", [JOB, DECODED])
@pytest.mark.parametrize("label", ["Bag", "Tasche für Fuß", "шапка", "7", "null", '"quoted"', "none"])
def test_a_png_file_keeps_the_chunks_as_they_are(tmp_path, job, label):
    chunks = picture_chunks(job, "fashion ü", 7, label)
    (tmp_path / "a.png").write_bytes(png_bytes(Image.new("L", (4, 4), 7), chunks))
    pixels, text, data = read_png(tmp_path / "a.png")
    assert pixels.shape == (4, 4, 1)
    assert text == chunks
    assert data == (tmp_path / "a.png").read_bytes()
    assert read_chunks(text, "a.png").label == label


def test_the_chunks_are_spelled_so_that_people_can_read_them():
    expected = {
        "command": "ul-generate", "bundle": HASH, "guide": "null", "guidance_rescale": "0.0",
        "seed": "9", "labels": f'"{ALL_CLASSES}"', "prior_sampler": "dpmpp2m",
        "prior_grid": "mix", "prior_num_steps": "32", "decoder_sampler": "ddim", "decoder_grid": "uniform",
        "decoder_num_steps": "8", "guidance": "1.5", "guidance_interval": "[-3.0, 1.5]", "backend": "ort-cpu",
        "precision": "fp32", "threads": "null", "job": fingerprint(JOB), "bundle_name": "fashion", "Software": SOFTWARE,
        "index": "7", "label": "Bag",
    }  # fmt: skip
    assert expected == CHUNKS


def test_each_field_of_a_job_is_in_its_fingerprint():
    changed = {
        "bundle": OTHER, "seed": 10, "labels": ("Bag",), "prior_sampler": "ddim", "prior_grid": "uniform",
        "prior_num_steps": 31, "decoder_sampler": "ancestral", "decoder_grid": "mix", "decoder_num_steps": 7,
        "guidance": 1.25, "guidance_interval": None, "guidance_rescale": 0.5, "guide": OTHER,
        "backend": "other", "precision": "bf16", "threads": 2,
    }  # fmt: skip
    assert changed.keys() == GenerateJob.model_fields.keys() - {"command"}
    prints = {fingerprint(JOB.model_copy(update={key: value})) for key, value in changed.items()}
    assert len(prints | {fingerprint(JOB)}) == len(changed) + 1


@pytest.mark.parametrize("key", sorted(CHUNKS))
def test_a_picture_without_one_of_the_chunks_is_refused(key):
    with pytest.raises(BadInputError, match=r"^here: "):
        read_chunks({name: text for name, text in CHUNKS.items() if name != key}, "here")


HOSTILE = {
    "bundle": ["", "0" * 63, "G" * 64, "../../etc"],
    "seed": ["-1", str(2**64), "1e3", "1.5", "NaN", "true", "null", '"9"', "9" * 5000, "", "09", "[9]", "0x9"],
    "labels": ["all classes in turn", "[]x", '["a", 1]', "{}", '[["a"]]', "[" * 100_000, '"all"'],
    "prior_sampler": ["", "a" * 200, "dd\nim", "\x1b[31m"],
    "prior_num_steps": ["0", "-5", "65537", "1000000000000", "NaN", "Infinity", "8.0", "true"],
    "decoder_num_steps": ["0", "1" * 400],
    "guidance": ["NaN", "Infinity", "-Infinity", "1e999", "x", "null", '"1.5"', "true"],
    "guidance_interval": ["[1]", "[1, 2, 3]", "{}", "all", '["a", "b"]', "-3.0,1.5"],
    "index": ["-1", str(2**63), "1e300", "NaN", "seven", "7.5", ""],
    "label": ["", "a" * 200, "a\x00b"],
    "job": [OTHER, "", "x"],
    "Software": ["", "paint 1.0", "unified-latents", "unified-latents \x1b[2J", "unified-latents " + "9" * 1000],
    "command": ["", "ul-train", "ul-decode", "rm -rf"],
    "precision": ["", "a" * 2**21],
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in HOSTILE.items() for text in texts])
def test_nonsense_in_a_chunk_is_one_printable_line(key, text):
    with pytest.raises(BadInputError) as caught:
        read_chunks(CHUNKS | {key: text}, "here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize(
    ("key", "text"),
    [("seed", "10"), ("guidance", "2.5"), ("prior_num_steps", "16"), ("bundle", OTHER), ("labels", '["Bag"]')],
)
def test_a_chunk_that_was_changed_to_another_good_value_is_noticed(key, text):
    with pytest.raises(BadInputError, match="were changed"):
        read_chunks(CHUNKS | {key: text}, "here")


def test_a_setting_that_this_version_does_not_know_is_noticed():
    job = json.loads(JOB.model_dump_json()) | {"new_setting": 3}
    assert job.keys() > GenerateJob.model_fields.keys()
    newer = CHUNKS | {"new_setting": "3", "job": OTHER, "Software": "unified-latents 9.0.0"}
    with pytest.raises(BadInputError, match="come from a newer version"):
        read_chunks(newer, "here")


def test_chunks_of_other_programs_are_passed_over():
    assert read_chunks(CHUNKS | {"Comment": "mine", "Author": "me"}, "here") == read_chunks(CHUNKS, "here")


def test_a_contact_sheet_says_its_job_and_is_not_one_picture():
    sheet = sheet_chunks(JOB, "fashion")
    assert sheet.items() <= CHUNKS.items()
    assert CHUNKS.keys() - sheet.keys() == {"index", "label"}
    with pytest.raises(BadInputError, match="contact sheet"):
        read_chunks(sheet, "here")


@pytest.mark.parametrize("data", [b"", SIGNATURE, SIGNATURE + bytes(100), b"GIF89a" + bytes(50)])
def test_a_file_that_is_no_png_is_one_line(tmp_path: Path, data: bytes):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BadInputError, match="is not a whole PNG file"):
        read_png(tmp_path / "a.png")


def test_a_png_that_is_cut_or_damaged_anywhere_is_one_line(tmp_path: Path):
    whole = png_bytes(Image.effect_noise((16, 16), 50), CHUNKS)
    for size in range(len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:size])
        with pytest.raises(BadInputError, match="is not a whole PNG file"):
            read_png(tmp_path / "a.png")
    for place in range(len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
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
