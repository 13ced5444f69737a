"""Bundles: what is written opens; what is damaged, hostile or newer is refused with the right error."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Runner
from tiny_bundle import bundle_files, graph_bytes, info_fields, write_tiny_bundle

import ul_runtime
from ul_runtime.bundle import Bundle, parse_weights, write_bundle
from ul_runtime.cli.generate import main as generate
from ul_runtime.errors import BadInputError, UntrustedError, UsageError
from ul_runtime.manifest import GRAPH_NAMES, BundleInfo


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "b").path


# --- what is written opens


def test_a_written_bundle_opens_with_its_files_hash_and_weights(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.hash == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert bundle.graph("encoder") == graph_bytes("encoder")
    assert bundle.manifest.num_classes == 2
    np.testing.assert_array_equal(bundle.initializers("prior_step")["w"], np.full((2, 3), 1.5, np.float32))
    assert all(bundle.holds(graph) for graph in bundle.manifest.graphs)


def test_the_same_content_has_the_same_hash_whether_given_as_bytes_or_files(path: Path, tmp_path: Path) -> None:
    files = {name: path / name for name in bundle_files()}
    again = write_bundle(tmp_path / "c", BundleInfo.model_validate(info_fields()), files)
    assert again.hash == Bundle.open(path).hash == Bundle.open(tmp_path / "c").hash
    assert again.path == tmp_path / "c"


def test_opening_for_one_graph_reads_only_its_files(path: Path) -> None:
    flip(path / "prior.safetensors", 3)
    bundle = Bundle.open(path, graphs=["encoder"])
    assert bundle.initializers("encoder")["w"].shape == (2, 3)
    with pytest.raises(KeyError):
        bundle.graph("prior_step")


def test_an_existing_bundle_is_replaced_only_when_asked(path: Path) -> None:
    info = BundleInfo.model_validate(info_fields() | {"name": "second"})
    with pytest.raises(UsageError, match="a bundle is there already"):
        write_bundle(path, info, bundle_files())
    write_bundle(path, info, bundle_files(), overwrite=True)
    assert Bundle.open(path).manifest.name == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


def test_other_things_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match="not a bundle"):
        write_bundle(tmp_path / "photos", BundleInfo.model_validate(info_fields()), bundle_files(), overwrite=True)


def test_a_failed_write_leaves_the_old_bundle_and_nothing_else(path: Path) -> None:
    before = Bundle.open(path).hash
    files = bundle_files()
    del files["prior.safetensors"]
    with pytest.raises(BadInputError, match=r"prior\.safetensors is not in files"):
        write_bundle(path, BundleInfo.model_validate(info_fields()), files, overwrite=True)
    files["prior.safetensors"] = path.parent / "nowhere"
    with pytest.raises(BadInputError, match="nowhere: cannot read"):
        write_bundle(path, BundleInfo.model_validate(info_fields()), files, overwrite=True)
    assert Bundle.open(path).hash == before
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


def test_bfloat16_weights_come_as_their_bits() -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes.fromhex("803f0040")
    np.testing.assert_array_equal(parse_weights(data, "w")["w"], np.array([0x3F80, 0x4000], np.uint16))


# --- damage


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(data)


@pytest.mark.parametrize("name", sorted(bundle_files()))
def test_a_flipped_bit_anywhere_in_a_file_is_refused_with_both_hashes(path: Path, name: str) -> None:
    good = (path / name).read_bytes()
    for bit in range(0, 8 * len(good), 97):
        (path / name).write_bytes(good)
        flip(path / name, bit)
        found = hashlib.sha256((path / name).read_bytes()).hexdigest()
        expected = hashlib.sha256(good).hexdigest()
        with pytest.raises(BadInputError, match=f"{name}: SHA-256 is {found}, the manifest says {expected}"):
            Bundle.open(path)


@pytest.mark.parametrize("graphs", [GRAPH_NAMES, ("prior_step",)])
@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", ["encoder.onnx", "prior.safetensors"])
def test_a_file_one_byte_off_is_refused(path: Path, name: str, change: int, graphs: Any) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(BadInputError, match=f"{name}: {len(data) + change} bytes, the manifest says {len(data)}"):
        Bundle.open(path, graphs=graphs)


@pytest.mark.case(
    "B2", "a missing or additional file, a million files, a manifest of a gigabyte", "refused at once, exit code 65"
)
def test_a_missing_or_extra_file_is_refused(path: Path) -> None:
    (path / "notes.txt").write_text("hi")
    with pytest.raises(BadInputError, match=r"'notes.txt' is no part of the bundle"):
        Bundle.open(path)
    (path / "notes.txt").unlink()
    (path / "decoder_step.onnx").unlink()
    with pytest.raises(BadInputError, match=r"decoder_step.onnx: missing"):
        Bundle.open(path)


@pytest.mark.case("B2")
def test_a_million_files_are_refused_without_listing_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "x"

    class Endless:
        def __enter__(self) -> "Endless":
            return self

        def __exit__(self, *_: object) -> None: ...
        def __iter__(self) -> "Endless":
            return self

        def __next__(self) -> Entry:
            return Entry()

    monkeypatch.setattr(os, "scandir", lambda _: Endless())
    with pytest.raises(BadInputError, match="more than 68 files"):
        Bundle.open(path)


def test_a_folder_without_manifest_a_file_and_nothing_are_no_bundles(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in (".", "file", "missing"):
        with pytest.raises(BadInputError, match="bundle"):
            Bundle.open(tmp_path / name)


# --- attacks


@pytest.mark.parametrize("name", ["encoder.onnx", "encoder.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["symlink", "hard link", "directory symlink", "pipe", "directory", "device"])
@pytest.mark.case("B1", "links, devices and pipes in a bundle", "refused before a parser reads them, exit code 77")
def test_anything_but_a_plain_file_with_one_name_is_not_trusted(path: Path, name: str, kind: str) -> None:
    outside = path.parent / "outside"
    os.rename(path / name, outside)
    target = path / name
    if kind == "symlink":
        target.symlink_to(outside)
    elif kind == "hard link":
        os.link(outside, target)
    elif kind == "directory symlink":
        (path.parent / "folder").mkdir()
        target.symlink_to(path.parent / "folder")
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("/dev/zero")
    with pytest.raises(UntrustedError):
        Bundle.open(path)


def test_hard_links_of_an_installer_are_accepted_when_asked(path: Path) -> None:
    os.link(path / "encoder.onnx", path.parent / "cache")
    assert Bundle.open(path, allow_hard_links=True).graph("encoder") == graph_bytes("encoder")


def test_a_pickle_in_the_place_of_weights_is_not_trusted(path: Path) -> None:
    import pickletools  # only to be sure that the payload is one

    payload = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04echo\x85R."
    assert any(opcode.name == "REDUCE" for opcode, _, _ in pickletools.genops(payload))
    for data in (payload, b"PK\x03\x04" + bytes(60)):
        with pytest.raises(UntrustedError, match="pickle"):
            parse_weights(data, "prior.safetensors")
    with pytest.raises(BadInputError, match="not a safetensors file"):
        parse_weights(b"\x00" * 20, "prior.safetensors")


@pytest.mark.case("B2")
def test_a_manifest_of_a_gigabyte_is_refused_unread(path: Path) -> None:
    os.truncate(path / "manifest.json", 2**30)
    with pytest.raises(BadInputError, match="1073741824 bytes; at most"):
        Bundle.open(path)


@pytest.mark.case("B3", "a file swapped while it is opened", "what is parsed is what was hashed")
def test_a_file_swapped_while_opening_is_never_returned_unverified(path: Path) -> None:
    good = graph_bytes("encoder")
    other = good.replace(b"z_clean", b"z_other")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for data in (other, good):
                (path.parent / "swap").write_bytes(data)
                os.replace(path.parent / "swap", path / "encoder.onnx")

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = []
    try:
        for _ in range(300):
            try:
                outcomes.append(Bundle.open(path).graph("encoder"))
            except BadInputError:
                outcomes.append(b"refused")
    finally:
        stop.set()
        thread.join()
    assert set(outcomes) == {good, b"refused"}


# --- which bundle it is


@pytest.mark.case(
    "N7",
    "a class renamed by hand in manifest.json",
    "refused where --expect-hash or load(..., expect=) is given",
)
def test_a_changed_manifest_is_refused_where_its_hash_is_expected(path: Path) -> None:
    printed = Bundle.open(path).hash
    assert Bundle.open(path, expect=printed).hash == printed
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"cat"', b'"cow"'))
    assert Bundle.open(path).manifest.classes == ("cow", "dog")
    with pytest.raises(BadInputError, match=f"its hash is {Bundle.open(path).hash}, expected {printed}"):
        Bundle.open(path, expect=printed)
    for text in (printed[:12], printed.upper(), "", f"{printed}0"):
        with pytest.raises(UsageError, match="give all 64 digits"):
            Bundle.open(path, expect=text)


@pytest.mark.case("N7")
def test_commands_and_load_take_the_expected_hash(command: Runner, analytic_bundle: Path, tmp_path: Path) -> None:
    printed, out = Bundle.open(analytic_bundle).hash, ["-n", "1", "--threads", "1", "--out", tmp_path / "out"]
    other = "0" * 64
    command.fails(generate, 65, f"its hash is {printed}", analytic_bundle, "--expect-hash", other, *out)
    assert command(generate, analytic_bundle, "--expect-hash", printed, *out).code == 0
    assert ul_runtime.load(analytic_bundle, threads=1, expect=printed).hash == printed
    for given in (analytic_bundle, "garments-32"):
        with pytest.raises(BadInputError, match="it is not the bundle that was meant"):
            ul_runtime.load(given, threads=1, expect=other)


# --- what other programs leave


@pytest.mark.case(
    "R21", ".DS_Store, Thumbs.db or desktop.ini in a bundle", "one line says that it is not read, and the bundle opens"
)
def test_what_file_managers_leave_is_said_and_not_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._manifest.json"):
        (path / name).write_bytes(b"\0")
    with caplog.at_level("INFO", logger="ul_runtime"):
        Bundle.open(path)
    assert ".DS_Store, ._manifest.json, Thumbs.db, desktop.ini is no part of the bundle and is not read" in caplog.text
    for name in (".DS_Store2", "._other", ".hidden"):
        (path / name).write_bytes(b"\0")
        with pytest.raises(BadInputError, match="is no part of the bundle; remove it"):
            Bundle.open(path)
        (path / name).unlink()


@pytest.mark.case("A12", "a sparse file of 60 GiB that the manifest names", "refused unread where memory is smaller")
def test_files_larger_than_the_memory_are_refused_unread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ul_runtime.files.closed_folder.memory_bytes", lambda: 2**30)
    manifest, size = json.loads((path / "manifest.json").read_text()), 60 * 2**30
    manifest["files"]["prior.safetensors"]["size"] = size
    (path / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(path / "prior.safetensors", size)
    with pytest.raises(BadInputError, match=r"60\.0 GiB are to be read, this machine has 1\.0 GiB of memory"):
        Bundle.open(path)
