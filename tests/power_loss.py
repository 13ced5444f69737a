"""A power loss, simulated: record the calls of a write, replay any beginning of them, drop what was not synced."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from disk import Disk

Tree = dict[str, "bytes | Tree"]
Event = tuple[Any, ...]


class RecordingDisk(Disk):
    """Does the real calls and logs them: create, write, sync, rename, exchange, remove, make_directory."""

    def __init__(self, skip_sync_of: str = "") -> None:
        self.log: list[Event] = []
        self.paths: dict[int, Path] = {}
        self.skip_sync_of = skip_sync_of

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.paths[fd] = path
        self.log.append(("create", path))
        return fd

    def open(self, path: Path) -> int:
        fd = super().open(path)
        self.paths[fd] = path
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        written = super().write(fd, data[:1500])  # short writes on the way
        self.log.append(("write", self.paths[fd], bytes(data[:written])))
        return written

    def sync(self, fd: int) -> None:
        kind = "directory" if self.paths[fd].is_dir() else "file"
        if kind != self.skip_sync_of:
            self.log.append(("sync", self.paths[fd]))

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.log.append(("make_directory", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(("rename", source, target))

    def rename_to_free(self, source: Path, target: Path) -> None:
        super().rename_to_free(source, target)
        self.log.append(("rename", source, target))

    def exchange(self, a: Path, b: Path) -> None:
        super().exchange(a, b)
        self.log.append(("exchange", a, b))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.log.append(("remove", path))


class Inode:
    """A file or directory of the model: what is in memory and what is on the platter."""

    def __init__(self, content: bytes | None, names: dict[str, "Inode"] | None = None) -> None:
        self.content = self.synced_content = content
        self.names = names or {}
        self.synced_names = dict(self.names)

    def sync(self) -> None:
        self.synced_content, self.synced_names = self.content, dict(self.names)

    def after_power_loss(self, names_flushed: bool) -> "bytes | Tree":
        """What a reboot finds: only synced bytes; only synced names, or all names (the kernel may flush early)."""
        if self.content is not None:
            assert self.synced_content is not None
            return self.synced_content
        names = self.names if names_flushed else self.synced_names
        return {name: inode.after_power_loss(names_flushed) for name, inode in names.items()}


def snapshot(path: Path) -> Inode:
    if path.is_dir():
        return Inode(None, {entry.name: snapshot(entry) for entry in path.iterdir()})
    return Inode(path.read_bytes())


def replay(root: Path, before: Inode, log: list[Event]) -> None:
    """Apply logged calls to the model `before` of `root`."""

    def find(path: Path) -> Inode:
        node = before
        for part in path.relative_to(root).parts:
            node = node.names[part]
        return node

    for call, path, *rest in log:
        if call == "sync":
            find(path).sync()
            continue
        names = find(path.parent).names
        if call in ("create", "make_directory"):
            node = Inode(b"" if call == "create" else None)
            names[path.name] = node
        elif call == "write":
            node = names[path.name]
            assert node.content is not None
            node.content += rest[0]
            node.synced_content = node.synced_content or b""
        elif call == "remove":
            del names[path.name]
        else:
            other = rest[0].name
            if call == "exchange":
                names[path.name], names[other] = names[other], names[path.name]
            else:
                names[other] = names.pop(path.name)


def violations(root: Path, act: Callable[[], None], new: "bytes | Tree", disk: RecordingDisk) -> list[str]:
    """Every power loss during `act` after which `root/target` is neither old nor new, or lost when done."""
    before = snapshot(root)
    old = before.after_power_loss(True)
    assert isinstance(old, dict)
    start = snapshot(root)
    with disk.in_use():
        act()
    found = []
    for end in range(len(disk.log) + 1):
        for flushed in (False, True):
            model = copy_of(start)
            replay(root, model, disk.log[:end])
            after = model.after_power_loss(flushed)
            assert isinstance(after, dict)
            accepted = [new] if end == len(disk.log) else [old.get("target"), new]
            if after.get("target") not in accepted:
                found.append(f"after call {end} of {len(disk.log)}, names flushed: {flushed}")
    return found


def copy_of(node: Inode) -> Inode:
    return Inode(node.content, {name: copy_of(child) for name, child in node.names.items()})
