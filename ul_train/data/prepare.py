"""Open training images: prepared in the cache on the first call, mapped from there after."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from ul_runtime.errors import BadInputError, OutputError, StoppedError, UsageError
from ul_runtime.files import durable
from ul_runtime.images.convert import SMALLER, Conversion
from ul_runtime.images.find import first_three, in_words
from ul_runtime.machine import in_units
from ul_runtime.progress import Tick, progress, silent
from ul_runtime.signals import check_stopped
from ul_train.config import ImageConfig
from ul_train.data.imageset import INDEX_NAME, SCHEMA, Index, Splits, load, read_index
from ul_train.data.sources import Sources, find_sources
from ul_train.data.write import TOO_SMALL_ADVICE, write_set

_log = logging.getLogger(__name__)
_MOST_CLASSES = 20  # that are listed each with its count


def open_splits(image: ImageConfig, data: str, heldout: str | None, cache: Path) -> Splits:
    """The images of `data` as a recipe asks for them; logs what was found, and shows the progress of preparing them.

    BadInputError, UsageError, OutputError as `open_sources`; StoppedError.
    """
    sources = find_sources(data, heldout, image.labels)
    total = sources.num_records
    try:
        watched = progress("preparing images", total, "images") if total else nullcontext(lambda _: check_stopped())
        with watched as tick:
            splits = open_sources(sources, image, cache, tick)
    except StoppedError as error:
        raise StoppedError("stopped while preparing the images; run the same command again") from error
    index = splits.index
    classes = f"{len(index.class_names)} classes" if index.class_names else "no classes"
    counts = f"{index.train.num_images} training and {index.heldout.num_images} held-out images"
    _log.info(f"{counts} of {image.size} px, {classes}, from {data}")
    for line in _found(index, sources):
        _log.info(line)
    return splits


def _found(index: Index, sources: Sources) -> Iterator[str]:
    """The lines that say what became of everything in a source: classes, what is converted, rejected or no image."""
    if index.class_names:
        counts = Counter(index.train.class_counts) + Counter(index.heldout.class_counts)
        yield f"images of each class: {_by_class(index.class_names, counts)}"
    for note in (*sources.all_notes, *index.notes):
        yield f"note: {note}"
    for of, part, source in (("", index.train, sources.train), ("held out, ", index.heldout, sources.heldout)):
        if part.num_rejected:
            reasons = f" ({in_words(Counter(part.reasons))})" if len(part.reasons) > 1 else ""
            yield f"{of}rejected: {part.num_rejected:,}{reasons}: {first_three(part.rejected)}"
        if part.converted:
            yield f"{of}converted: {in_words(Counter(part.converted))}"
        ignored = part.ignored if source is None or source.ignored is None else source.ignored
        if ignored:
            yield f"{of}no images, not looked at: {in_words(Counter(ignored))}"


def _by_class(names: Sequence[str], counts: Counter[str]) -> str:
    if len(names) <= _MOST_CLASSES:
        return ", ".join(f"{name} {counts[name]:,}" for name in names)
    (most, largest), (fewest, smallest) = counts.most_common(1)[0], min(counts.items(), key=lambda pair: pair[1])
    return f"{smallest:,} ({fewest}) to {largest:,} ({most})"


def open_sources(sources: Sources, image: ImageConfig, cache: Path, tick: Tick = silent) -> Splits:
    """The images as uint8 `channels size size`, prepared in `cache` on the first call, mapped after.

    `tick` counts the images while they are prepared. BadInputError: nothing to train on, more than
    `image.max_rejected_share` unusable, a damaged source. UsageError: no such colour. OutputError: `cache`
    cannot be written.
    """
    to = Conversion(image.size, image.channels, image.background, image.fit)
    key = _key(to, sources, SCHEMA)
    folder = cache / key
    index = read_index(folder, key, tick) if folder.exists() else None
    if not isinstance(index, Index):
        older = cache / _key(to, sources, SCHEMA - 1)
        if index is not None:
            _log.info(f"note: {folder}: the prepared images were damaged ({index}) and are prepared again")
        elif older.exists():
            _log.info(f"{older}: prepared by an earlier version; the images are prepared again, this folder can go")
        index = _prepare(folder, key, to, sources, tick)
    _check_rejected(folder, index, sources, image.max_rejected_share)
    return load(folder, index)


def _key(to: Conversion, sources: Sources, schema: int) -> str:
    facts = {
        "schema": schema,
        "conversion": [to.size, to.channels, to.background, to.fit],
        "train": sources.train.identity,
        "heldout": sources.heldout.identity if sources.heldout else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _prepare(folder: Path, key: str, to: Conversion, sources: Sources, tick: Tick) -> Index:
    """Prepare the set beside `folder` and give it its name; whoever is first wins, both get a whole set."""
    cache = folder.parent
    with _naming_the_cache(), ExitStack() as at_end:
        with _sweeping_alone(cache):
            with suppress(OutputError):  # another attempt's folder may go away under the sweep
                durable.sweep(cache, folder.name)
            temporary = at_end.enter_context(durable.temporary_directory_beside(folder))
        count = sources.num_records or 0
        needed = count * (to.channels * to.size * to.size + 16)  # label and id
        free = shutil.disk_usage(temporary).free
        if needed > free:
            raise OutputError(
                f"{cache}: {count:,} prepared images take {in_units(needed)}, {in_units(free)} are free; free space"
            )
        with durable.as_output_error(cache):
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
def _naming_the_cache() -> Iterator[None]:
    """OutputErrors say how to choose another folder."""
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{error}, or name another cache with --cache DIR or UL_CACHE") from error


@contextmanager
def _sweeping_alone(cache: Path) -> Iterator[None]:
    """Wait for the other processes in this block: a new temporary folder is swept by none before it is locked."""
    durable.make_directory(cache)
    fd = os.open(cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _check_rejected(folder: Path, index: Index, sources: Sources, max_rejected_share: float) -> None:
    """BadInputError when too large a share of the images of a part was rejected."""
    for source, part in ((sources.train, index.train), (sources.heldout, index.heldout)):
        usable = part.num_images + (index.heldout.num_images if sources.heldout is None else 0)
        if source is None or part.num_rejected <= max_rejected_share * (part.num_rejected + usable):
            continue
        small = part.reasons.get(SMALLER, 0) > part.num_rejected / 2
        raise BadInputError(
            f"{source.where}: {part.num_rejected} of {part.num_rejected + usable} images are unusable, at most "
            f"{max_rejected_share:.1%} may be; {part.num_rejected} rejected: {first_three(part.rejected)}; "
            f"all are listed in {folder / INDEX_NAME}; {TOO_SMALL_ADVICE if small else 'repair them'} "
            f"or raise --set image.max_rejected_share=SHARE"
        )
