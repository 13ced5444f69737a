"""Checkpoints and runs from others, or damaged: as strict as bundles, and never a traceback."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import new_run, tiny

from ul_runtime.errors import BadInputError, ULError, UntrustedError, UsageError
from ul_runtime.files.json_file import read_if_whole
from ul_train import checkpoint as ckpt
from ul_train.log import drop_lines_after
from ul_train.run import Run

Damage = Callable[[Path], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"net.weight": torch.ones(4, 3)}
    return ckpt.save_checkpoint(tmp_path, ckpt.State("joint", 7, 3, "c" * 64, "d" * 64), tensors, tensors, tensors)


def sealed(**changes: Any) -> Damage:
    """Fields of state.json changed, every hash made right again."""

    def damage(path: Path) -> None:
        record = json.loads((path / "state.json").read_text())
        for name in ckpt.TENSOR_FILES:
            data = (path / name).read_bytes()
            record["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        record.update(changes)
        del record["sha256"]
        (path / "state.json").write_bytes(ckpt._sealed(record))

    return damage


def with_tensors(data: bytes) -> Damage:
    def damage(path: Path) -> None:
        (path / "ema.safetensors").write_bytes(data)
        sealed()(path)

    return damage


def tensors(**entry: Any) -> Damage:
    """A file of one tensor, of these fields."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    size = header and entry.get("data_offsets", [0, 4])[1]
    return with_tensors(struct.pack("<Q", len(header)) + header + bytes(size))


def as_link(path: Path) -> None:
    os.rename(path / "ema.safetensors", path.parent / "elsewhere")
    (path / "ema.safetensors").symlink_to(path.parent / "elsewhere")


def as_pipe(name: str) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return damage


def folder_as_link(path: Path) -> None:
    os.rename(path, path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def state(data: bytes) -> Damage:
    return lambda path: (path / "state.json").write_bytes(data)


ENTRY: dict[str, Any] = {"sha256": "0" * 64, "size": 1}
CHECKPOINTS: dict[str, tuple[type[ULError], Damage]] = {
    "a link for tensors": (UntrustedError, as_link),
    "a hard link for tensors": (UntrustedError, lambda path: os.link(path / "ema.safetensors", path.parent / "other")),
    "a pipe for tensors": (UntrustedError, as_pipe("ema.safetensors")),
    "a pipe for the state": (UntrustedError, as_pipe("state.json")),
    "a link for the folder": (BadInputError, folder_as_link),
    "a further file": (BadInputError, lambda path: (path / "evil.pt").write_bytes(b"x")),
    "a deep state": (BadInputError, state(b"[" * 200_000)),
    "a state that is no text": (BadInputError, state(b"\xff\xfe")),
    "a state of 20 MB": (BadInputError, state(b" " * 20_000_000)),
    "tensors that are noise": (BadInputError, with_tensors(bytes(range(256)) * 8)),
    "a pickle for tensors": (UntrustedError, with_tensors(b"\x80\x04.")),
    "0 x 2^63 tensors": (BadInputError, tensors(shape=[0, 2**63], data_offsets=[0, 0])),
    "tensors of float4": (BadInputError, tensors(dtype="F4", shape=[2], data_offsets=[0, 1])),
    **{
        f"{name} {value!r}": (BadInputError, sealed(**{name: value}))
        for name, value in [
            ("step", "abc"),
            ("step", None),
            ("step", 1.5),
            ("seed", "x"),
            ("counters", [1]),
            ("rate_control", 5),
            ("encoder_checkpoint", 7),
            ("data_fingerprint", None),
            ("format_version", "x"),
            ("format_version", 99),
            ("nosuch", 1),
            ("files", [1, 2]),
            ("files", {}),
        ]
    },
    "a hash that is null": (BadInputError, sealed(files={name: {"sha256": None} for name in ckpt.TENSOR_FILES})),
    "a number for a file": (BadInputError, sealed(files=dict.fromkeys(ckpt.TENSOR_FILES, 7))),
    "sizes that lie": (BadInputError, sealed(files=dict.fromkeys(ckpt.TENSOR_FILES, ENTRY))),
    "a file that leaves": (BadInputError, sealed(files={"../weights.safetensors": ENTRY})),
}


@pytest.mark.case(
    "A10",
    "checkpoints with right hashes: links, pipes, further files, deep JSON, wrong types, lying sizes, pickles",
    "each is refused in one line, with 65, or 77 for links and pickles",
)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_in_one_line(saved: Path, case: str) -> None:
    kind, damage = CHECKPOINTS[case]
    damage(saved)
    with pytest.raises(kind, match="joint-000007") as caught:
        ckpt.load_checkpoint(saved)
    assert type(caught.value) is kind
    assert all(letter.isprintable() for letter in str(caught.value))


@pytest.mark.case("A10")
def test_a_checkpoint_sealed_again_loads(saved: Path) -> None:
    """The control of the cases above."""
    sealed(step=8)(saved)
    assert ckpt.load_checkpoint(saved).state.step == 8


@pytest.mark.case("A10")
@pytest.mark.parametrize(
    ("file", "data", "error"),
    [
        *(
            ("run.json", data, BadInputError)
            for data in (b"[" * 200_000, b"\xff", b"[]", b"5", b"{}", b"", b'{"format": 5}', b"a" * 2**25)
        ),
        ("config.toml", b"a=" + b"[" * 50_000, UsageError),
        ("config.toml", b"\xff", UsageError),
        ("config.toml", b"latent_channels = 1000000000", UsageError),
    ],
)
def test_a_hostile_file_of_a_run_is_refused_in_one_line(
    tmp_path: Path, file: str, data: bytes, error: type[ULError]
) -> None:
    run = new_run(tmp_path / "run", tiny())
    (run.path / file).write_bytes(data)
    with pytest.raises(error, match=file):
        Run.open(run.path)


@pytest.mark.case("A10")
@pytest.mark.parametrize("value", [5, [{"a": 1}], [1], "ab", None])
def test_classes_of_a_run_are_names(tmp_path: Path, value: object) -> None:
    run = new_run(tmp_path / "run", tiny())
    record = json.loads((run.path / "run.json").read_text()) | {"class_names": value}
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadInputError, match=r"run\.json: not readable \(class_names"):
        Run.open(run.path)


@pytest.mark.case("A10")
def test_a_pipe_for_the_facts_of_a_run_is_not_waited_for(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", tiny())
    (run.path / "run.json").unlink()
    os.mkfifo(run.path / "run.json")
    with pytest.raises(BadInputError, match=r"run\.json: not readable \(a pipe"):
        Run.open(run.path)


@pytest.mark.case("A10", "lines of log.jsonl that are no text or no object", "--resume drops them and keeps the others")
def test_damaged_lines_of_the_log_are_dropped_on_resume(tmp_path: Path) -> None:
    good, later = b'{"stage": "joint", "step": 3, "loss": 1.0}\n', b'{"stage": "joint", "step": 9}\n'
    bad = [
        b"5",
        b"\xff\xfe",
        b"[1]",
        b'{"stage": "joi',
        b'{"stage": 5, "step": 1}',
        b'{"stage": "joint"}',
        b"[" * 99_999,
    ]
    (tmp_path / "log.jsonl").write_bytes(good + b"\n".join(bad) + b"\n" + later)
    drop_lines_after(tmp_path, ["joint", "base"], "joint", 5)
    assert (tmp_path / "log.jsonl").read_bytes() == good


@pytest.mark.case("A10", "a report.json that was cut off", "it counts as missing, and is made again")
@pytest.mark.parametrize("data", [b'{"psnr_db": 3', b"[]", b"\xff", b"[" * 99_999])
def test_a_damaged_report_counts_as_missing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "report.json"
    assert read_if_whole(path) is None
    path.write_bytes(data)
    assert read_if_whole(path) is None
    path.write_bytes(b'{"psnr_db": 3}')
    assert read_if_whole(path) == {"psnr_db": 3}
