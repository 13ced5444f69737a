"""Colour images to train on: Google's emoji (npm package emoji-datasource-google, Apache-2.0) as folders by category.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/emoji_folder.py package emoji

Skin tones are left out: they are near-duplicates, and would stand on both sides of a held-out split.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer


def emoji_folder(
    package: Annotated[
        Path, typer.Argument(metavar="PACKAGE", exists=True, help="The unpacked emoji-datasource-google.")
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where the folders go.")],
) -> None:
    """Copy PACKAGE/img/google/64/*.png to DIR/CATEGORY/, without skin tones."""
    count = 0
    for emoji in json.loads((package / "emoji.json").read_text()):
        image = package / "img" / "google" / "64" / emoji["image"]
        if emoji["category"] == "Component" or not emoji["has_img_google"] or not image.is_file():
            continue
        folder = out / emoji["category"].replace(" & ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, folder / emoji["image"])
        count += 1
    print(f"{count} images in {out}")


if __name__ == "__main__":
    typer.run(emoji_folder)
