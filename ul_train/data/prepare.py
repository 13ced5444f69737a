"""Open training images: prepared in the cache on the first call, mapped from there after."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

from ul_runtime import durable
from ul_runtime.errors import BadInputError, OutputError, StoppedError, UsageError
from ul_runtime.images import SMALLER, Conversion
from ul_runtime.progress import Tick, check_stopped, progress, silent
from ul_train.config import ImageConfig
from ul_train.data.imageset import INDEX_NAME, SCHEMA, Index, Splits, load, read_index
from ul_train.data.sources import Sources, find_sources
from ul_train.data.write import TOO_SMALL_ADVICE, examples, write_set

_log = logging.getLogger(__name__)


def open_data(
    source: str,
    *,
    size: int,
    channels: int,
    cache_dir: Path,
    background: str = "white",
    fit: Literal["crop", "pad"] = "crop",
    heldout_source: str | None = None,
    classes: Literal["auto", "none"] = "auto",
    max_rejected_share: float = 0.5,
    tick: Tick = silent,
) -> Splits:
    """Images of `source` as uint8 channels size size, prepared in `cache_dir` on the first call, mapped after.

    `tick` counts the images while they are prepared.
    BadInputError: nothing to train on, more than `max_rejected_share` (0 to 1) unusable, a damaged source.
    UsageError: impossible values. OutputError: `cache_dir` cannot be written.
    """
    to = Conversion(size, channels, background, fit)
    return _open(find_sources(source, heldout_source, classes), to, cache_dir, max_rejected_share, tick)


def open_splits(image: ImageConfig, data: str, heldout: str | None, cache: Path) -> Splits:
    """The images that a recipe asks for, prepared or mapped; logs what was found. StoppedError."""
    sources = find_sources(data, heldout, "auto" if image.labels else "none")
    to = Conversion(image.size, image.channels, image.background, image.fit)
    total = sources.num_records
    try:
        with progress("preparing images", total, "images") if total else nullcontext(_only_look) as tick:
            splits = _open(sources, to, cache, image.max_rejected_share, tick)
    except StoppedError as error:
        raise StoppedError("stopped while preparing the images; run the same command again") from error
    _describe(splits, image.size, data)
    return splits


def _only_look(amount: float) -> None:
    check_stopped()


def _describe(splits: Splits, size: int, data: str) -> None:
    train = splits.train
    classes = f"{len(train.class_names)} classes" if train.class_names else "no classes"
    _log.info(f"{len(train)} training and {len(splits.heldout)} held-out images of {size} px, {classes}, from {data}")
    for note in train.notes:
        _log.info(f"note: {note}")
    if train.num_rejected:
        first = "; ".join(str(rejected) for rejected in train.rejected[:3])
        _log.info(f"rejected: {train.num_rejected}: {first}{'; ...' * (train.num_rejected > 3)}")
    if train.converted:
        _log.info("converted: " + ", ".join(f"{count} {reason}" for reason, count in train.converted.items()))


def _open(sources: Sources, to: Conversion, cache_dir: Path, max_rejected_share: float, tick: Tick) -> Splits:
    if not 0 <= max_rejected_share <= 1:
        raise UsageError(f"image.max_rejected_share={max_rejected_share}: 0 to 1 is expected")
    key, notes = _key(to, sources, SCHEMA), sources.notes
    folder = cache_dir / key
    index = read_index(folder, key) if folder.exists() else None
    if not isinstance(index, Index):
        older = cache_dir / _key(to, sources, SCHEMA - 1)
        if index is not None:
            notes = (*notes, f"{folder}: the prepared images were damaged ({index}) and were prepared again")
        elif older.exists():
            _log.info(f"{older}: prepared by an earlier version; the images are prepared again, this folder can go")
        index = _build(folder, key, to, sources, tick)
    _check_rejected(folder, index, sources, max_rejected_share)
    return load(folder, index, notes)


def _key(to: Conversion, sources: Sources, schema: int) -> str:
    facts = {
        "schema": schema,
        "conversion": [to.size, to.channels, to.background, to.fit],
        "train": sources.train.identity,
        "heldout": sources.heldout.identity if sources.heldout else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, key: str, to: Conversion, sources: Sources, tick: Tick) -> Index:
    """Prepare the set beside `folder` and give it its name; whoever is first wins, both get a whole set."""
    with ExitStack() as at_end:
        with _sweeping_alone(folder.parent):
            with suppress(OutputError):  # another attempt's folder may go away under the sweep
                durable.sweep(folder.parent, folder.name)
            temporary = at_end.enter_context(durable.temporary_directory_beside(folder))
        _check_space(temporary, to, sources.num_records or 0)
        index = write_set(temporary, key, to, sources, tick)
        try:
            if folder.exists() and not isinstance(read_index(folder, key), Index):
                durable.replace_directory(temporary, folder)
            else:
                durable.commit_directory(temporary, folder)
        except (UsageError, OutputError):
            theirs = read_index(folder, key)
            if not isinstance(theirs, Index):
                raise
            return theirs
    return index


@contextmanager
def _sweeping_alone(cache_dir: Path) -> Iterator[None]:
    """Wait for the other processes in this block: a new temporary folder is swept by none before it is locked."""
    durable.make_directory(cache_dir)
    fd = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _check_space(temporary: Path, to: Conversion, count: int) -> None:
    needed = count * (to.channels * to.size * to.size + 16)  # label and id
    free = shutil.disk_usage(temporary).free
    if needed > free:
        raise OutputError(
            f"{temporary.parent}: {count:,} prepared images take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; free space or choose another cache folder"
        )


def _check_rejected(folder: Path, index: Index, sources: Sources, max_rejected_share: float) -> None:
    """BadInputError when too large a share of the images of a part was rejected."""
    for source, part in ((sources.train, index.train), (sources.heldout, index.heldout)):
        usable = part.num_images + (index.heldout.num_images if sources.heldout is None else 0)
        if source is None or part.num_rejected <= max_rejected_share * (part.num_rejected + usable):
            continue
        small = part.reasons.get(SMALLER, 0) > part.num_rejected / 2
        raise BadInputError(
            f"{source.where}: {part.num_rejected} of {part.num_rejected + usable} images are unusable, at most "
            f"{max_rejected_share:.1%} may be{examples(part.rejected, part.num_rejected)}; all are listed in "
            f"{folder / INDEX_NAME}; {TOO_SMALL_ADVICE if small else 'repair them'} "
            f"or raise --set image.max_rejected_share=SHARE"
        )
