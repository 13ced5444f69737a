"""manifest.json: hostile, damaged, newer or incoherent ones are refused, quickly and with our errors only."""

import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import bundle_files, info_fields, write_tiny_bundle

from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, ULError, UntrustedError
from ul_runtime.manifest import BundleInfo, FileEntry, manifest_bytes, parse_manifest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "b").path


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((path / "manifest.json").read_bytes())
    change(value)
    (path / "manifest.json").write_text(json.dumps(value))


def test_every_truncation_of_the_manifest_is_refused(path: Path) -> None:
    data = (path / "manifest.json").read_bytes()
    for end in range(0, len(data) - 2, 7):
        with pytest.raises(BadInputError, match="not readable"):
            parse_manifest(data[:end])


def test_a_newer_format_is_refused_with_the_version_and_the_advice(path: Path) -> None:
    change_manifest(path, lambda value: value.update(format_version=5, news=1))
    with pytest.raises(BadInputError, match="format_version 5, this program reads 4; upgrade unified-latents"):
        Bundle.open(path)


def test_an_older_format_is_refused_with_the_version_and_the_advice(path: Path) -> None:
    change_manifest(path, lambda value: value.update(format_version=2))
    with pytest.raises(
        BadInputError, match="format_version 2, this program reads 4; export again with this version's ul-export"
    ):
        Bundle.open(path)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "..",
        "..\\x",
        "a\\b",
        "C:x",
        "a\0b",
        "/dev/zero",
        "a/b",
        "w.pt",
        "w.pkl",
        "e.plan",
    ],
)
@pytest.mark.parametrize("where", ["files", "file", "weights"])
def test_a_name_that_escapes_or_can_run_code_is_not_trusted(path: Path, name: str, where: str) -> None:
    def attack(value: dict[str, Any]) -> None:
        if where == "files":
            value["files"][name] = {"sha256": "0" * 64, "size": 0}
        else:
            value["graphs"]["encoder"][where] = name

    change_manifest(path, attack)
    with pytest.raises(UntrustedError):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a b", "é", "x" * 129, "a\n", "ENCODER.onnx", "manifest.json"])
def test_a_malformed_or_twin_name_is_refused(path: Path, name: str) -> None:
    change_manifest(path, lambda value: value["files"].update({name: {"sha256": "0" * 64, "size": 0}}))
    with pytest.raises(BadInputError):
        Bundle.open(path)


def resized(data: bytes, size: bytes) -> bytes:
    return re.sub(rb'"size": \d+\n  }\n }\n}', b'"size": ' + size + b"\n  }\n }\n}", data)


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "not an object": lambda data: b"[]",
    "utf-16": lambda data: data.decode().encode("utf-16"),
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "duplicate key": lambda data: data.replace(b'"name": "tiny"', b'"name": "tiny", "name": "tiny"'),
    "duplicate key, escaped": lambda data: data.replace(b'"psnr_db": 30.5', b'"a": 1, "\\u0061": 2'),
    "NaN": lambda data: data.replace(b"30.5", b"NaN"),
    "infinity": lambda data: data.replace(b"30.5", b"1e999"),
    "long number": lambda data: data.replace(b"30.5", b"9" * 10_000),
    "lone surrogate": lambda data: data.replace(b"psnr_db", b"\\ud800"),
    "control character": lambda data: data.replace(b"tiny", b"\\u001b[2J"),
    "nested a little too deep": lambda data: data.replace(b"30.5", b"[" * 17 + b"]" * 17),
    "nested very deep": lambda data: b"[" * 2**20,
    "nested objects": lambda data: b'{"a":' * 150_000,
    "many strings": lambda data: b'"' + b'\\"' * 500_000,
    "many files": lambda data: (
        b'{"format": "unified-latents-bundle", "format_version": 4, "files": {'
        + b",".join(b'"%d":0' % i for i in range(80_000))
        + b"}}"
    ),
    "many classes": lambda data: data.replace(b'"cat"', b",".join([b"0"] * 400_000)),
    "unknown key with an escape": lambda data: data.replace(b'"name"', b'"\\u001b[2J": "x", "name"'),
    "unknown key": lambda data: data.replace(b'"name"', b'"code": "x", "name"'),
    "negative size": lambda data: resized(data, b"-1"),
    "huge size": lambda data: resized(data, b"1000000000000000"),
    "text for a number": lambda data: data.replace(b'"step": 5', b'"step": "5"'),
    "other format": lambda data: data.replace(b"unified-latents-bundle", b"other-bundle"),
    "version as text": lambda data: data.replace(b'"format_version": 4', b'"format_version": "4"'),
    "rescale above 1": lambda data: data.replace(b'"guidance_rescale": 0.0', b'"guidance_rescale": 1.5'),
    "class twice": lambda data: data.replace(b'"dog"', b'"cat"'),
    "schedule upside down": lambda data: data.replace(b'"min": -10.0', b'"min": 50.0'),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_manifest_is_refused_in_linear_time_and_in_little_memory(path: Path, attack: str) -> None:
    good = (path / "manifest.json").read_bytes()
    bad = HOSTILE[attack](good)
    assert bad != good
    (path / "manifest.json").write_bytes(bad)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(BadInputError) as caught:
        Bundle.open(path)
    assert time.process_time() - start < 10.0  # a check that is quadratic in the entries takes minutes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


def set_shape(graph: str, index: int, shape: list[Any]) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        value["graphs"][graph]["inputs"][index]["shape"] = shape

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_shape("prior_step", 0, ["b", 5, 2, 2]), r"prior_step.inputs: z is float32 \['b', 5, 2, 2\]"),
        (set_shape("decoder_step", 0, [1, 3, 16, 16]), "decoder_step.inputs: x is"),
        (set_shape("encoder", 0, ["b", 3, 16]), "encoder.inputs: x is"),
        (lambda value: value["latent"].update(channels=8), "z_clean is"),
        (set_shape("prior_step", 6, ["b", 4, 2]), "prior_step.inputs: guide is"),
        (lambda value: value["graphs"]["prior_step"]["inputs"].pop(), "prior_step.inputs: names are"),
        (lambda value: value["graphs"].pop("prior_step"), "prior_step is missing"),
        (lambda value: value["graphs"]["encoder"]["outputs"].pop(), "outputs: names are"),
        (lambda value: value["graphs"]["prior_step"]["inputs"][4].update(dtype="float32"), "label is float32"),
        (lambda value: value["graphs"]["encoder"].update(weights="other.safetensors"), "not in files"),
    ],
)
def test_graphs_that_do_not_fit_together_are_refused(
    path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(path, change)
    with pytest.raises(BadInputError, match=message):
        Bundle.open(path)


GOOD_INFO = BundleInfo.model_validate(info_fields())


def good_manifest() -> bytes:
    entry = FileEntry(sha256="0" * 64, size=1)
    return manifest_bytes(GOOD_INFO, dict.fromkeys(bundle_files(), entry))


@settings(max_examples=300, deadline=1000)
@given(st.data())
def test_a_mutated_manifest_gives_a_manifest_or_our_error(data: st.DataObject) -> None:
    manifest = bytearray(good_manifest())
    pieces = [b"", b"{", b"}", b"[", b'"', b"null", b"-1", b"1e400", b"\\u0000", b"\xff", b"\0", b"../", b"true"]
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(manifest)))
        length = data.draw(st.integers(0, 40))
        manifest[start : start + length] = data.draw(st.sampled_from(pieces) | st.binary(max_size=8))
    try:
        parse_manifest(bytes(manifest))
    except ULError as error:
        assert error.exit_code in (65, 77)  # noqa: PT017


@settings(max_examples=100, deadline=1000)
@given(st.binary(max_size=200) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_arbitrary_bytes_as_a_manifest_give_our_error(data: bytes | str) -> None:
    with pytest.raises(ULError):
        parse_manifest(data.encode(errors="surrogatepass") if isinstance(data, str) else data)
