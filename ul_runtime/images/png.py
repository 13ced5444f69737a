"""PNG files of images and contact sheets. Each holds one text chunk of JSON that says how it was made: its `ImageInfo`.

A job is all that its images depend on beside their index and label; its fingerprint is a hash of it.
"""

import hashlib
import io
import json
import math
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
)

from ul_runtime.errors import BadInputError
from ul_runtime.images.kinds import HEAD_BYTES, kind_of
from ul_runtime.machine import VERSION
from ul_runtime.manifest import Count, Sha256, StudentName, Text, first_error

ALL_CLASSES = "all classes in turn"
SOFTWARE = f"unified-latents {VERSION}"
CONTACT_SHEET = "contact_sheet.png"
JOB_FILES = {"ul-generate": "generate.json", "ul-decode": "decode.json"}  # by the command that fills a folder
KEY = "unified-latents"  # of the text chunk
_MOST_CHARACTERS = 2**20  # of the text chunk
_MOST_PIXELS, _MOST_BYTES = 2**26, 2**28  # of a file that is read
_END_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"
MOST_TILES = 100  # of a contact sheet
_MOST_COLUMNS = 20
_MIN_TILE, _MAX_TILE = 96, 256  # px: smaller images are enlarged by whole factors, larger ones reduced
_GAP, _MARGIN = 4, 12
_TEXT_PX, _LINE_PX = 14, 20
_MOST_TITLE = 720  # px: a longer title is shortened rather than widen the contact sheet
_NO_GLYPH = "\uffff"  # no font has one for it
_WHITE, _INK = (255, 255, 255), (32, 32, 32)

Seed = Annotated[int, Field(ge=0, lt=2**64)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Job(_Record):
    bundle: Sha256
    seed: Seed
    decoder_sampler: Text
    decoder_grid: Text
    decoder_num_steps: Count
    decoder_student: StudentName | None = None
    backend: Text
    precision: Text
    threads: Count | None  # None: images do not depend on it

    def as_dict(self) -> dict[str, Any]:
        """As JSON; without the students that it does not have, as jobs were written before there were any."""
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if value is not None or not name.endswith("_student")}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the job as canonical JSON."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class GenerateJob(_Job):
    """A job of ul-generate."""

    command: Literal["ul-generate"] = "ul-generate"
    guide: Sha256 | None  # hash of the bundle that guided
    labels: Literal["all classes in turn"] | tuple[Text, ...]  # image i has labels[i mod len]
    prior_sampler: Text
    prior_grid: Text
    prior_num_steps: Count
    prior_student: StudentName | None = None
    guidance: FiniteFloat
    guidance_interval: tuple[float, float] | None  # logsnr; None = everywhere
    guidance_rescale: FiniteFloat


class DecodeJob(_Job):
    """A job of ul-decode; its images come from a file of latents."""

    command: Literal["ul-decode"] = "ul-decode"
    latents: Sha256  # of the file
    mean_of: Annotated[int, Field(ge=1)]


Job: TypeAlias = GenerateJob | DecodeJob


class ImageInfo(_Record):
    """How an image was made; a contact sheet has neither index nor label."""

    software: Annotated[str, Field(pattern=r"^unified-latents [0-9A-Za-z.+-]{1,40}$")] = SOFTWARE
    bundle_name: Text
    job: Annotated[Job, Field(discriminator="command")]
    index: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    label: Text | None = None
    batch: Count | None = None  # the size of the batch; None: images do not depend on it
    pixels: Sha256 | None = None  # of the pixels; `png_bytes` fills it in

    def text(self) -> str:
        """The text chunk, which `read_info` reads."""
        values = self.model_dump(mode="json") | {"job": self.job.as_dict(), "fingerprint": self.job.fingerprint}
        return json.dumps(values)


def read_info(texts: Mapping[str, str], where: str) -> ImageInfo:
    """What the text chunks of a PNG say. BadInputError: not made by this toolkit, damaged, changed, other version."""
    if KEY not in texts:
        if {"command", "bundle", "job"} <= texts.keys() and texts.get("Software", "").startswith("unified-latents "):
            message = "was written by an earlier version, in a format that this one does not read"
            raise BadInputError(f"{where}: {message}; use that version, or generate the image again")
        raise BadInputError(f"{where}: does not say how it was made; expected an image of ul-generate")
    text = texts[KEY]
    if len(text) > _MOST_CHARACTERS:
        raise BadInputError(f"{where}: its info has more than {_MOST_CHARACTERS} characters; it is not ours")
    try:
        info = _Stored.model_validate_json(text, strict=True)
    except ValidationError as error:
        message = f"its info is damaged or comes from a newer version: {first_error(error)}"
        raise BadInputError(f"{where}: {message}") from error
    if missing := sorted(_Stored.model_fields.keys() - info.model_fields_set - {"pixels"}):
        raise BadInputError(f"{where}: its info is damaged: {missing[0]} is missing")
    if info.fingerprint != info.job.fingerprint:
        raise BadInputError(f"{where}: its info was changed: the job is not that of its fingerprint")
    return info


class _Stored(ImageInfo):
    fingerprint: Sha256


class StoredImage(NamedTuple):
    """A PNG file: pixels uint8 `h w c`, text chunks, bytes."""

    pixels: np.ndarray
    texts: dict[str, str]
    data: bytes


def read_png(path: Path) -> StoredImage:
    """A whole PNG file. BadInputError: damaged, or larger than is read."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"a file of at most {_MOST_BYTES} bytes is expected")
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(f"{image.width} by {image.height} px, at most {_MOST_PIXELS} pixels are read")
                image.verify()  # the checksums, which reading the pixels would pass over
            if not data.endswith(_END_CHUNK):
                raise ValueError("it does not end where a PNG file ends")
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                texts = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
                pixels = np.asarray(image)
    except UnidentifiedImageError as error:
        kind = kind_of(data[:HEAD_BYTES])
        said = "it does not begin as one" if kind in (None, "PNG") else f"it begins as {kind}"
        raise BadInputError(f"{path}: is not a whole PNG file: {said}") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path}: is not a whole PNG file: {ascii(str(error))[1:-1][:200]}") from error
    return StoredImage(pixels[..., None] if pixels.ndim == 2 else pixels, texts, data)


def pixels_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of the pixels of an image, uint8 `h w c`, by which a job knows its own images again."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def png_bytes(image: Image.Image, info: ImageInfo | None = None) -> bytes:
    """A PNG file, with its info if there is one."""
    chunks = PngImagePlugin.PngInfo()
    if info is not None:
        chunks.add_text(KEY, info.model_copy(update={"pixels": pixels_sha256(np.asarray(image))}).text())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def as_pil(image: np.ndarray) -> Image.Image:
    """An image of Pillow of uint8 `h w c` with 1 (grey), 3 (RGB) or 4 (RGBA) channels."""
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def image_name(index: int) -> str:
    """File name of image `index`."""
    return f"{index:06d}.png"


def is_contact_sheet(file: Path) -> bool:
    """Whether the file is the contact sheet beside images that a job filled a folder with."""
    return file.name == CONTACT_SHEET and any((file.parent / job).is_file() for job in JOB_FILES.values())


def contact_sheet(
    images: Sequence[np.ndarray], title: str, columns: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """The first MOST_TILES of `images` (uint8 `h w c`, one size) under a title, in a square or in named columns.

    `columns`: one name a column, image i stands in column i mod len; few names are repeated, so that the sheet is
    about square. `captions`: one line under each image.
    """
    tiles = [_tile(image) for image in images[:MOST_TILES]]
    if len(columns) > _MOST_COLUMNS:
        columns, captions = (), captions or [columns[i % len(columns)] for i in range(len(images))]
    elif columns:
        columns = list(columns) * max(1, round(math.sqrt(len(tiles)) / len(columns)))
    across = len(columns) or math.ceil(math.sqrt(len(tiles)))
    down = math.ceil(len(tiles) / across)
    width, height = tiles[0].size
    cell_w, cell_h = width + _GAP, height + _GAP + (_LINE_PX if captions else 0)
    top = _MARGIN + _LINE_PX + _GAP + (_LINE_PX if columns else 0)
    font = ImageFont.load_default(_TEXT_PX)
    sheet_w = 2 * _MARGIN + max(across * cell_w - _GAP, min(math.ceil(font.getlength(title)), _MOST_TITLE))
    sheet = Image.new("RGB", (sheet_w, top + down * cell_h + _MARGIN), _WHITE)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _shortened(_drawable(title, font), sheet_w - 2 * _MARGIN, font), _INK, font)

    def centred(text: str, column: int, y: int) -> None:
        place = (_MARGIN + column * cell_w + width / 2, y)
        draw.text(place, _shortened(_drawable(text, font), width, font), _INK, font, anchor="ma")

    for column, name in enumerate(columns):
        centred(name, column, top - _LINE_PX)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, across)
        sheet.paste(tile, (_MARGIN + column * cell_w, top + row * cell_h))
        if captions:
            centred(captions[i], column, top + row * cell_h + height + 2)
    return sheet


def _tile(image: np.ndarray) -> Image.Image:
    tile = as_pil(image)
    if tile.mode == "RGBA":
        tile = Image.alpha_composite(Image.new("RGBA", tile.size, (*_WHITE, 255)), tile)
    tile = tile.convert("RGB")
    longest = max(tile.size)
    if longest > _MAX_TILE:
        tile.thumbnail((_MAX_TILE, _MAX_TILE), Image.Resampling.LANCZOS)
        return tile
    factor = max(1, math.ceil(_MIN_TILE / longest))
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _shortened(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, with an ellipsis in its middle if it is longer than `width` px: names often differ at their ends."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shown = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if font.getlength(shown) <= width:
            return shown
    return "…" if text else ""


def _drawable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`; of what the font lacks, letters with accents become letters, and all else \\u and its number."""
    box = bytes(font.getmask(_NO_GLYPH))

    def drawn(c: str) -> str:
        if c.isascii() or bytes(font.getmask(c)) != box:
            return c
        plain = unicodedata.normalize("NFKD", c)[0]
        return plain if plain.isascii() else c.encode("unicode_escape").decode()

    return "".join(map(drawn, unicodedata.normalize("NFC", text)))
