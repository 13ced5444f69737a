"""A contact sheet: small images under a title, one column a class where classes come in turn, else a square."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ul_runtime.png import as_pil, png_bytes

MOST_TILES = 100
_MOST_COLUMNS = 20
_MIN_TILE, _MAX_TILE = 96, 256  # px: smaller images are enlarged by whole factors, larger ones reduced
_GAP, _MARGIN = 4, 12
_TEXT_PX, _LINE_PX = 14, 20
_MOST_TITLE = 720  # px: a longer title is shortened rather than widen the contact sheet
_BACKGROUND, _INK = (255, 255, 255), (32, 32, 32)


def _tile(image: np.ndarray) -> Image.Image:
    """uint8 `h w c` as an RGB image of the size of a tile."""
    tile = as_pil(image)
    if tile.mode == "RGBA":
        tile = Image.alpha_composite(Image.new("RGBA", tile.size, (*_BACKGROUND, 255)), tile)
    tile = tile.convert("RGB")
    longest = max(tile.size)
    if longest > _MAX_TILE:
        tile.thumbnail((_MAX_TILE, _MAX_TILE), Image.Resampling.LANCZOS)
        return tile
    factor = max(1, math.ceil(_MIN_TILE / longest))
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _fit(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, shortened with an ellipsis to at most `width` px."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def contact_sheet(
    images: Sequence[np.ndarray], title: str, columns: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """The first MOST_TILES of `images` (uint8 `h w c`, one size) under a title.

    `columns`: one name a column, image i stands in column i mod len. `captions`: one line under each image.
    """
    if len(columns) > _MOST_COLUMNS:
        columns, captions = (), captions or [columns[i % len(columns)] for i in range(len(images))]
    tiles = [_tile(image) for image in images[:MOST_TILES]]
    across = len(columns) or math.ceil(math.sqrt(len(tiles)))
    down = math.ceil(len(tiles) / across)
    width, height = tiles[0].size
    cell_w, cell_h = width + _GAP, height + _GAP + (_LINE_PX if captions else 0)
    top = _MARGIN + _LINE_PX + _GAP + (_LINE_PX if columns else 0)
    font = ImageFont.load_default(_TEXT_PX)
    sheet_w = 2 * _MARGIN + max(across * cell_w - _GAP, min(math.ceil(font.getlength(title)), _MOST_TITLE))
    sheet = Image.new("RGB", (sheet_w, top + down * cell_h + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _fit(title, sheet_w - 2 * _MARGIN, font), _INK, font)

    def centred(text: str, column: int, y: int) -> None:
        place = (_MARGIN + column * cell_w + width / 2, y)
        draw.text(place, _fit(text, width, font), _INK, font, anchor="ma")

    for column, name in enumerate(columns):
        centred(name, column, top - _LINE_PX)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, across)
        sheet.paste(tile, (_MARGIN + column * cell_w, top + row * cell_h))
        if captions:
            centred(captions[i], column, top + row * cell_h + height + 2)
    return sheet


def contact_sheet_png(
    images: Sequence[np.ndarray], title: str, columns: Sequence[str] = (), captions: Sequence[str] = ()
) -> bytes:
    """A contact sheet as PNG bytes."""
    return png_bytes(contact_sheet(images, title, columns, captions))
