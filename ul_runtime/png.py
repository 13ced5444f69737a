"""PNG files of images. Each holds one text chunk of JSON that says how the image was made: its `ImageInfo`.

A job is all that its images depend on beside their index and label; its fingerprint is a hash of it.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ul_runtime.errors import BadInputError
from ul_runtime.machine import VERSION
from ul_runtime.manifest import Count, Sha256, Text, first_error

ALL_CLASSES = "all classes in turn"
SOFTWARE = f"unified-latents {VERSION}"
CONTACT_SHEET = "contact_sheet.png"
JOB_FILES = {"ul-generate": "generate.json", "ul-decode": "decode.json"}  # by the command that fills a folder
KEY = "unified-latents"  # of the text chunk
_MOST_CHARACTERS = 2**20  # of the text chunk
_MOST_PIXELS, _MOST_BYTES = 2**26, 2**28  # of a file that is read
_END_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"

Seed = Annotated[int, Field(ge=0, lt=2**64)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Job(_Record):
    bundle: Sha256
    seed: Seed
    decoder_sampler: Text
    decoder_grid: Text
    decoder_num_steps: Count
    backend: Text
    precision: Text
    threads: Count | None  # None: images do not depend on it

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the job as canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class GenerateJob(_Job):
    """A job of ul-generate."""

    command: Literal["ul-generate"] = "ul-generate"
    guide: Sha256 | None  # hash of the bundle that guided
    labels: Literal["all classes in turn"] | tuple[Text, ...]  # image i has labels[i mod len]
    prior_sampler: Text
    prior_grid: Text
    prior_num_steps: Count
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

    def text(self) -> str:
        """The text chunk, which `read_info` reads."""
        return json.dumps(self.model_dump(mode="json") | {"fingerprint": self.job.fingerprint})


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
    if missing := sorted(_Stored.model_fields.keys() - info.model_fields_set):
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
            pixels, texts = _parse_png(data)
    except UnidentifiedImageError as error:
        raise BadInputError(f"{path}: is not a whole PNG file: it does not begin as one") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path}: is not a whole PNG file: {ascii(str(error))[1:-1][:200]}") from error
    return StoredImage(pixels[..., None] if pixels.ndim == 2 else pixels, texts, data)


def _parse_png(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"{image.width} by {image.height} px, at most {_MOST_PIXELS} pixels are read")
        image.verify()  # the checksums, which reading the pixels would pass over
    if not data.endswith(_END_CHUNK):
        raise ValueError("it does not end where a PNG file ends")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        texts = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
        return np.asarray(image), texts


def png_bytes(image: Image.Image, info: ImageInfo | None = None) -> bytes:
    """A PNG file, with its info if there is one."""
    chunks = PngImagePlugin.PngInfo()
    if info is not None:
        chunks.add_text(KEY, info.text())
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
