"""A folder of images; the first-level sub-folders are the classes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ul_runtime.errors import BadInputError
from ul_runtime.images.decode import SUFFIXES, Rejected
from ul_runtime.images.find import ImageSearch, in_words, printable
from ul_train.data.records import Record, Source

TRAIN_FOLDERS = ("train", "training")
HELDOUT_FOLDERS = ("heldout", "val", "valid", "validation", "test", "testing")


def folder_source(root: Path, labelled: bool) -> Source:
    """The images of a folder. BadInputError: no image file in it, or images beside class folders."""
    digest, count = hashlib.sha256(), 0
    beside: list[str] = []
    classes: set[str] = set()
    within: dict[str, set[str]] = {}  # names of splits below a folder of the first level
    problems: Counter[str] = Counter()
    search = ImageSearch(root)
    for found in search:
        facts = [found.relative, found.size, found.mtime_ns, str(found.problem or "")]
        digest.update(json.dumps(facts).encode() + b"\n")
        if found.problem is not None:
            problems[found.problem.reason] += 1
            continue
        count += 1
        if found.folders:
            classes.add(found.folders[0])
            below = found.folders[1:2]
            if below and below[0].casefold() in (*TRAIN_FOLDERS, *HELDOUT_FOLDERS):
                within.setdefault(found.folders[0], set()).add(below[0])
        elif len(beside) < 3:
            beside.append(found.relative)
    where = printable(root)
    if count == 0:
        others = in_words(problems + search.ignored) or "nothing"
        expected = f"expected files ending in {' '.join(sorted(SUFFIXES))}"
        if search.ignored[".arrow"] or search.ignored[".parquet"]:
            expected = f"a Hugging Face data set is hf:{where}"
        raise BadInputError(f"{where}: no images in this folder (found {others}); {expected}")
    if beside and classes and labelled:
        raise BadInputError(
            f"{where}: images ({', '.join(beside)}) lie beside class folders ({', '.join(sorted(classes)[:3])}); "
            f"move them into a class folder, or train without classes: --set image.labels=false"
        )
    labelled = labelled and bool(classes)
    notes = [f"{where}: {in_words(search.odd)}: images by their first bytes"] if search.odd else []
    notes += [_said_of_splits(where, *each) for each in within.items() if len(each[1]) > 1][:1]
    return Source(
        where=where,
        identity={
            "kind": "folder",
            "root": printable(root.resolve()),
            "labelled": labelled,
            "files": digest.hexdigest(),
        },
        records=lambda: _records(root, labelled),
        num_records=count,
        folders=tuple(search.folders) if labelled else (),
        ignored=dict(search.ignored),
        notes=tuple(notes),
    )


def _said_of_splits(where: str, top: str, names: set[str]) -> str:
    found = " and ".join(f"{name}/" for name in sorted(names))
    advice = "to hold some out, name a folder that holds train/ and test/ with the classes in each"
    return f"{where}: {top}/ has {found}, and all of it is trained on; {advice}"


def _records(root: Path, labelled: bool) -> Iterator[Record | Rejected]:
    for found in ImageSearch(root):
        if found.problem is not None:
            yield found.problem.at(found.relative)
        else:
            yield Record(found.relative, found.folders[0] if labelled else None, found.path)
