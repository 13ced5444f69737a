"""Colour images to train on: Google's emoji (npm package emoji-datasource-google, Apache-2.0) as folders by category.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/emoji_folder.py package emoji

Skin tones are left out: they are near-duplicates, and would stand on both sides of a held-out split.
"""

import json
import shutil
import sys
from pathlib import Path


def emoji_folder(package: Path, out: Path) -> int:
    """Copy `package`/img/google/64/*.png to `out`/CATEGORY/; returns how many."""
    count = 0
    for emoji in json.loads((package / "emoji.json").read_text()):
        image = package / "img" / "google" / "64" / emoji["image"]
        if emoji["category"] == "Component" or not emoji["has_img_google"] or not image.is_file():
            continue
        folder = out / emoji["category"].replace(" & ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, folder / emoji["image"])
        count += 1
    return count


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1], "emoji.json").is_file():
        sys.exit(f"{__doc__}\nemoji_folder.py: expected the unpacked package and a folder to make")
    print(f"{emoji_folder(Path(sys.argv[1]), Path(sys.argv[2]))} images in {sys.argv[2]}")
