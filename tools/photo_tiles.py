"""Colour photographs to train on: the landscapes of Debian's endless-sky-data, cut into tiles.

    apt-get download endless-sky-data && dpkg -x endless-sky-data_*.deb package
    python tools/photo_tiles.py package/usr/share/games/endless-sky/images/land photos

Public domain or CC-BY-SA, file by file (the package's copyright file). Every eighth photograph is held out whole: tiles
of one photograph are alike, and would stand on both sides of a split by tile.
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

SIZE = 64
HELDOUT_EVERY = 8


def photo_tiles(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", exists=True, help="Folder of photographs (*.jpg).")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where train and heldout go.")],
) -> None:
    """Cut photographs into tiles of 64 px: DIR/train and DIR/heldout, a PNG a tile."""
    counts = {"train": 0, "heldout": 0}
    for split in counts:
        (out / split).mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(photos.glob("*.jpg"))):
        split = "heldout" if number % HELDOUT_EVERY == 0 else "train"
        with Image.open(file) as image:
            photo = image.convert("RGB")
        for top in range(0, photo.height - SIZE + 1, SIZE):
            for left in range(0, photo.width - SIZE + 1, SIZE):
                tile = photo.crop((left, top, left + SIZE, top + SIZE))
                tile.save(out / split / f"{file.stem}_{top}_{left}.png")
                counts[split] += 1
    print(f"{counts} tiles in {out}")


if __name__ == "__main__":
    typer.run(photo_tiles)
