"""Checkpoints: whole or absent, verified, pruned by policy; a damaged one is named and never loaded."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import Disk
from power_loss import Inode, RecordingDisk, copy_of, replay, snapshot
from tiny_run import contents
from torch import nn

from ul_runtime.errors import BadInputError, OutputError
from ul_train import checkpoint as ckpt

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


def state(step: int = 7, stage: str = "joint") -> ckpt.State:
    return ckpt.State(stage, step, 3, "c" * 64, "d" * 64, {"skipped": 1})


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"net.weight": torch.full((40, 3), value), "net.bias": torch.arange(5) * value}


def save(folder: Path, step: int = 7, stage: str = "joint") -> Path:
    return ckpt.save_checkpoint(folder, state(step, stage), tensors(1.0 * step), tensors(2.0), tensors(3.0))


def loads(path: Path) -> bool:
    try:
        ckpt.load_checkpoint(path)
    except BadInputError:
        return False
    return True


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints")
    assert path.name == "joint-000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    loaded = ckpt.load_checkpoint(path)
    assert loaded.state == state()
    for part, value in (("weights", 7.0), ("ema", 2.0), ("optimizer", 3.0)):
        given, expected = getattr(loaded, part), tensors(value)
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[name], expected[name]) for name in expected)


# damage


@pytest.mark.parametrize("file", FILES)
@pytest.mark.case(
    "C5", "a bit flipped anywhere in a checkpoint, or a file cut", "refused with the name of the file, exit code 65"
)
def test_a_flipped_bit_anywhere_is_refused_with_the_file_named(tmp_path: Path, file: str) -> None:
    path = save(tmp_path)
    good = (path / file).read_bytes()
    random = iter(torch.randint(0, 8, (10_000,), generator=torch.Generator().manual_seed(0)).tolist())
    for at in range(0, len(good), max(1, len(good) // 150)):
        (path / file).write_bytes(good[:at] + bytes([good[at] ^ 1 << next(random)]) + good[at + 1 :])
        with pytest.raises(BadInputError, match=f"joint-000007/{file}: "):
            ckpt.load_checkpoint(path)
    (path / file).write_bytes(good)
    assert loads(path)


def test_the_message_of_a_changed_file_has_both_hashes_and_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path)
    record = json.loads((path / "state.json").read_text())
    file = path / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(BadInputError) as caught:
        ckpt.load_checkpoint(path)
    expected = record["files"]["ema.safetensors"]["sha256"][:16]
    assert f"state.json says {expected}" in str(caught.value)
    assert "SHA-256 is " in str(caught.value)
    assert "remove joint-000007 and resume from the checkpoint before" in str(caught.value)
    assert BadInputError.exit_code == 65


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
@pytest.mark.case("C5")
def test_a_cut_empty_or_missing_file_is_refused_by_name(tmp_path: Path, file: str, damage: str) -> None:
    path = save(tmp_path)
    good = (path / file).read_bytes()
    if damage == "missing":
        (path / file).unlink()
    else:
        (path / file).write_bytes(good[: len(good) // 2] if damage == "cut" else b"")
    with pytest.raises(BadInputError, match=f"joint-000007/{file}: .*(remove|choose)"):
        ckpt.load_checkpoint(path)


def rewrite(path: Path, **changes: Any) -> None:
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this program reads up to 1; upgrade"),
        ({"format": "something"}, "not a checkpoint of unified-latents"),
        ({"step": 8}, "SHA-256 is .* state.json says"),
        ({"sha256": 5}, "not readable"),
        ({"format_version": "1"}, "not readable"),
    ],
)
def test_a_state_that_is_not_ours_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path)
    rewrite(path, **changes)
    with pytest.raises(BadInputError, match=f"state.json: {message}"):
        ckpt.load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", '"text"', "{}", "\xff"])
def test_a_state_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path)
    (path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInputError, match=r"state\.json: not readable"):
        ckpt.load_checkpoint(path)


@pytest.mark.case("C6", "a pickle under any name that is read", "never run, exit code 77")
def test_a_pickle_under_any_of_our_names_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = b"cposix\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR."
    for file in FILES:
        path = save(tmp_path / file)
        (path / file).write_bytes(payload)
        assert not loads(path)
    assert not canary.exists()


# crashes and full disks


@pytest.mark.case(
    "C1",
    "a process killed at any call of a checkpoint's save",
    "the newest committed checkpoint is whole; leftovers are swept",
)
def test_a_power_loss_at_any_call_of_a_save_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 7)
    start = snapshot(tmp_path)
    with RecordingDisk().in_use() as disk:
        save(folder, 8)
    assert len(disk.log) >= 20
    newest = set()
    for end in range(len(disk.log) + 1):
        model = copy_of(start)
        replay(tmp_path, model, disk.log[:end])
        root = tmp_path / f"after-{end}"
        put(root, model)
        found = ckpt.list_checkpoints(root / "checkpoints", "joint")
        assert all(loads(path) for path in found)
        newest.add(found[-1].name)
        save(root / "checkpoints", 9)  # the next save works and sweeps what the crash left
        assert not [name for name in os.listdir(root / "checkpoints") if name.startswith(".")]
    assert newest == {"joint-000007", "joint-000008"}


def put(path: Path, model: Inode) -> None:
    """Write what a reboot finds."""
    tree = model.after_power_loss(names_flushed=True)
    pending: list[tuple[Path, Any]] = [(path, tree)]
    while pending:
        at, node = pending.pop()
        if isinstance(node, dict):
            at.mkdir(parents=True)
            pending += [(at / name, child) for name, child in node.items()]
        else:
            at.write_bytes(node)


class FullDisk(Disk):
    """Has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, fd: int, data: memoryview) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(fd, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 100, 1500, 2200, 2600])
@pytest.mark.case("C3", "a full disk at any write of a save", "exit code 74; the checkpoint before stays")
def test_a_full_disk_is_an_output_error_and_the_checkpoint_before_stays(tmp_path: Path, room: int) -> None:
    save(tmp_path, 7)
    before = contents(tmp_path)
    with FullDisk(room).in_use(), pytest.raises(OutputError, match="No space left"):
        save(tmp_path, 8)
    assert OutputError.exit_code == 74
    assert contents(tmp_path) == before
    assert loads(save(tmp_path, 8))


def test_a_full_disk_does_not_harm_the_checkpoint_that_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 7)
    before = contents(tmp_path)
    with FullDisk(1500).in_use(), pytest.raises(OutputError):
        save(tmp_path, 7)
    assert contents(tmp_path) == before


# policy


def test_the_newest_of_a_stage_are_kept_and_the_other_stage_is_left_alone(tmp_path: Path) -> None:
    for step in (5, 999_999, 1_000_000):
        save(tmp_path, step)
    save(tmp_path, 3, "base")
    ckpt.prune(tmp_path, "joint", 2)
    assert [path.name for path in ckpt.list_checkpoints(tmp_path, "joint")] == ["joint-999999", "joint-1000000"]
    ckpt.prune(tmp_path, "joint", 2)
    assert sorted(os.listdir(tmp_path)) == ["base-000003", "joint-1000000", "joint-999999"]


def test_a_pruning_that_is_killed_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def killed(path: Path) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        ckpt.prune(tmp_path, "joint", 1)
    monkeypatch.undo()
    assert [path.name for path in ckpt.list_checkpoints(tmp_path, "joint")] == ["joint-000002"]
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["joint-000002", "joint-000003"]


def test_other_things_in_the_folder_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    save(tmp_path, 7)
    (tmp_path / "joint-000009").write_text("a file")
    for name in ("joint-00001", "joint-000010.bak", "prior-000001", ".joint-000008.0123456789abcdef.tmpx"):
        (tmp_path / name).mkdir()
    assert [path.name for path in ckpt.list_checkpoints(tmp_path, "joint")] == ["joint-000007"]
    before = sorted(os.listdir(tmp_path))
    save(tmp_path, 7)
    assert sorted(os.listdir(tmp_path)) == before
    assert ckpt.list_checkpoints(tmp_path / "missing", "joint") == []


# tensors


def test_tensors_of_another_network_are_refused_by_name() -> None:
    given = ckpt.tensors_of({"net": nn.Linear(3, 2)})
    for other, message in (
        (nn.Linear(3, 4), r"net\.weight is \[2, 3\], expected \[4, 3\]"),
        (nn.Linear(3, 2, bias=False), r"net\.bias is not in the recipe's network"),
        (nn.Sequential(nn.Linear(3, 2)), r"net\.bias is not in"),
    ):
        with pytest.raises(BadInputError, match=f"here: {message}"):
            ckpt.load_tensors({"net": other}, given, "here")
    with pytest.raises(BadInputError, match=r"net\.bias is missing"):
        ckpt.load_tensors({"net": nn.Linear(3, 2)}, {"net.weight": given["net.weight"]}, "here")


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_optimiser_goes_on_as_if_never_saved_in_any_memory_layout(layout: torch.memory_format) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, list[str]]:
        torch.manual_seed(0)
        net = nn.Conv2d(4, 6, 3).to(memory_format=layout)  # type: ignore[call-overload]
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True), ["weight", "bias"]

    net, optimizer, names = make()
    for seed in range(3):
        step(net, optimizer, seed)
    again, other, _ = make()
    ckpt.load_tensors({"net": again}, ckpt.tensors_of({"net": net}), "here")
    ckpt.load_optimizer(other, names, ckpt.optimizer_tensors(optimizer, names))
    for seed in range(3, 5):
        step(net, optimizer, seed)
        step(again, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_an_optimiser_before_its_first_step_is_saved_and_loaded() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    saved = ckpt.optimizer_tensors(optimizer, ["weight", "bias"])
    ckpt.load_optimizer(optimizer, ["weight", "bias"], saved)
    assert saved == {}
    assert not any(optimizer.state.values())


@pytest.mark.case("A16")
def test_a_checkpoint_that_cannot_be_removed_is_an_error_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        (tmp_path / f"joint-{step:06d}").mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("ul_train.checkpoint.os.rename", full)
    with pytest.raises(OutputError, match=r"joint-000001: cannot write: Read-only file system"):
        ckpt.prune(tmp_path, "joint", 1)
