"""WebDataset shards: tar files whose members `key.png`, `key.cls`, ... make one sample; read, never extracted."""

import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Self, cast

from ul_runtime.errors import BadInputError
from ul_runtime.images.decode import SUFFIXES, ImageRejectedError, Rejected, open_regular
from ul_runtime.images.find import is_image_file, printable
from ul_runtime.images.kinds import HEAD_BYTES
from ul_train.data.records import LABEL_ALONE, MAX_IMAGE_BYTES, Ignored, Record, Source, file_identity

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MAX_LABEL_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
_MAX_SHARDS = 100_000
_LABEL_KEYS = ("label", "cls", "class")
_EXTENDED_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError)


class _StrictTarInfo(tarfile.TarInfo):
    """Where tarfile takes a cut or damaged header for the end of the archive, this one says so."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)  # the end mark
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, before the end mark") from error
        if info.type in _EXTENDED_HEADERS and info.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes, at most {_MAX_HEADER_BYTES:,} is read")
        return info


def expand_braces(pattern: str) -> list[str]:
    """ "s-{000..002}.tar" -> its three names; several ranges multiply. BadInputError above 100,000."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MAX_SHARDS:
        raise BadInputError(f"{pattern}: {{{match[1]}..{match[2]}}} must rise, by less than {_MAX_SHARDS:,}")
    width = len(match[1])
    names: list[str] = []
    for number in range(first, last + 1):
        names += expand_braces(f"{pattern[: match.start()]}{number:0{width}d}{pattern[match.end() :]}")
        if len(names) > _MAX_SHARDS:
            raise BadInputError(f"{pattern}: more than {_MAX_SHARDS:,} shards")
    return names


def find_shards(folder: Path) -> list[Path]:
    """The tar files directly in `folder`, by name."""
    names = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in names if path.name.lower().endswith(SHARD_SUFFIXES))


def shard_source(where: str, shards: Sequence[Path], labelled: bool) -> Source:
    """The samples of these tar files. BadInputError when one is missing."""
    missing = [path for path in shards if not path.exists()]
    if missing:
        raise BadInputError(
            f"{where}: {len(missing)} of {len(shards)} shards are missing, first {printable(missing[0])}"
        )
    identity = {"kind": "shards", "files": [file_identity(path) for path in shards], "labelled": labelled}
    return Source(where=where, identity=identity, records=lambda: _records(shards, labelled))


def _records(shards: Sequence[Path], labelled: bool) -> Iterator[Record | Rejected | Ignored]:
    for shard in shards:
        count, name = 0, printable(shard.name)
        try:
            with (
                open_regular(shard) as file,
                tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as tar,
            ):
                for record in _samples(tar, name, labelled):
                    count += not isinstance(record, Ignored)
                    yield record
        except ImageRejectedError as problem:
            yield problem.at(name)
        except _DAMAGED as error:
            yield Rejected(name, "damaged or truncated shard", f"after {count} samples: {error}")


@dataclass
class _Sample:
    """The members of one key, as they come: at most one image and one label, and what else there is."""

    image: bytes | None = None
    label: str | None = None
    other: ImageRejectedError | None = None  # why an image of another ending is not read
    is_one: bool = False  # it has a member that an image or a label should be in

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Ignored | None:
        """Read what a member has for the sample; what it is, if that is nothing. ImageRejectedError."""
        name = member.name.rpartition("/")[2]
        ending = printable(f".{name.rpartition('.')[2].lower()}" if "." in name else "")
        if ending in (".cls", ".json"):
            self.is_one = True
            given = _label(_read(tar, member, _MAX_LABEL_BYTES), ending)
            self.label = self.label if given is None else given
            return Ignored(f"{ending} without {', '.join(_LABEL_KEYS)}") if given is None else None
        if ending in SUFFIXES:
            self.is_one = True
            if self.image is not None:
                key = f"a key ends at the first dot of the name: here {_key(member)}"
                raise ImageRejectedError("second image of one sample", printable(key))
            self.image = _read(tar, member, MAX_IMAGE_BYTES)
            return None
        try:
            if not member.isreg() or not is_image_file(ending, lambda: _head(tar, member)):
                return Ignored(ending or "no ending")
            self.other = ImageRejectedError("an image of another ending", f"{ending or 'none'}; name it key.png")
        except ImageRejectedError as problem:
            self.other = problem
        return None


def _samples(tar: tarfile.TarFile, shard: str, labelled: bool) -> Iterator[Record | Rejected | Ignored]:
    """One record for the members of each key that hold an image or a label."""
    for key, members in groupby(_members(tar), key=_key):
        sample = _Sample()
        for member in members:
            try:
                if (ignored := sample.take(tar, member)) is not None:
                    yield ignored
            except ImageRejectedError as problem:
                yield problem.at(printable(f"{shard}/{member.name}"))
        yield from _record(sample, printable(f"{shard}/{key}"), labelled, "/" in key)


def _record(sample: _Sample, name: str, labelled: bool, in_folder: bool) -> Iterator[Record | Rejected | Ignored]:
    if sample.image is not None:
        if sample.other is not None:
            yield Ignored(f"beside the image of a sample ({sample.other.detail.partition(';')[0]})")
        if labelled and in_folder and sample.label is None:
            yield Ignored("names of folders (the classes of shards are .cls and .json members)")
        yield Record(name, sample.label if labelled else None, sample.image)
    elif sample.other is not None:
        yield sample.other.at(name)
    elif sample.is_one:
        yield Rejected(name, LABEL_ALONE if labelled and sample.label is not None else "no image in this sample")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or tarfile keeps every header of the shard
        if not member.isdir() and not member.name.rpartition("/")[2].startswith("."):
            yield member


def _key(member: tarfile.TarInfo) -> str:
    """WebDataset's rule: the key ends at the first dot of the name."""
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if not member.isreg():
        raise ImageRejectedError("not a regular file", "a link or device in the shard")
    if member.size > limit:
        raise ImageRejectedError("member too large", f"{member.size:,} bytes, at most {limit:,}")
    return cast(IO[bytes], tar.extractfile(member)).read()


def _head(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return cast(IO[bytes], tar.extractfile(member)).read(HEAD_BYTES)


def _label(text: bytes, suffix: str) -> str | None:
    try:
        if suffix == ".cls":
            return printable(text.decode().strip()) or None
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageRejectedError("unreadable label", str(error)) from error
    if not isinstance(content, dict):
        return None
    value = next((content[key] for key in _LABEL_KEYS if key in content), None)
    return printable(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
