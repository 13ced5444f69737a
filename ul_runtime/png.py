"""Where a picture comes from, as the text chunks of its PNG: the one place that names, writes and reads them.

A job is all that its pictures depend on beside their index and label; its fingerprint is a hash of it. A chunk holds
one field: a name as it is, any other value as JSON.
"""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, get_origin

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ul_runtime.errors import BadInputError
from ul_runtime.machine import VERSION
from ul_runtime.manifest import Count, Sha256, Text, first_error

ALL_CLASSES = "all classes in turn"
SOFTWARE = f"unified-latents {VERSION}"
_MOST_CHARACTERS = 2**20  # of one chunk

Seed = Annotated[int, Field(ge=0, lt=2**64)]


class _Fields(BaseModel):
    """Fields that are chunks of their names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def chunks(self) -> dict[str, str]:
        """A text for each field, but for what may be left out and is None."""
        return {
            key: value if _is_name(type(self), key) else json.dumps(value)
            for key, value in self.model_dump(mode="json").items()
            if value is not None or type(self).model_fields[key].is_required()
        }

    @classmethod
    def from_chunks(cls, text: Mapping[str, str]) -> Self:
        """The inverse of `chunks`; other chunks are passed over. ValueError: missing, or not what it must be."""
        values: dict[str, Any] = {}
        for key in cls.model_fields:
            if key not in text and cls.model_fields[key].default is None:
                continue
            if key not in text:
                raise ValueError(f"{key} is missing")
            values[key] = str(text[key]) if _is_name(cls, key) else _value(key, text[key])
        return cls.model_validate_json(json.dumps(values), strict=True)


def _value(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{key} is {text[:40]!a}, which is no JSON value") from None


def _is_name(fields: type[_Fields], key: str) -> bool:
    annotation = fields.model_fields[key].annotation
    return annotation is str or get_origin(annotation) is Literal


class GenerateJob(_Fields):
    """A job of ul-generate."""

    command: Literal["ul-generate"] = "ul-generate"
    bundle: Sha256
    guide: Sha256 | None  # hash of the bundle that guided
    seed: Seed
    labels: Literal["all classes in turn"] | tuple[Text, ...]  # image i has labels[i mod len]
    prior_sampler: Text
    prior_grid: Text
    prior_num_steps: Count
    decoder_sampler: Text
    decoder_grid: Text
    decoder_num_steps: Count
    guidance: FiniteFloat
    guidance_interval: tuple[float, float] | None  # logsnr; None = everywhere
    guidance_rescale: FiniteFloat
    backend: Text
    precision: Text
    threads: Count | None  # None: pictures do not depend on it


class DecodeJob(_Fields):
    """A job of ul-decode; its pictures come from a file of latents."""

    command: Literal["ul-decode"] = "ul-decode"
    bundle: Sha256
    latents: Sha256  # of the file
    seed: Seed
    mean_of: Annotated[int, Field(ge=1)]
    decoder_sampler: Text
    decoder_grid: Text
    decoder_num_steps: Count
    backend: Text
    precision: Text
    threads: Count | None  # None: pictures do not depend on it


Job: TypeAlias = GenerateJob | DecodeJob


class _Sheet(_Fields):
    """What a contact sheet has beside its job."""

    job: Sha256
    bundle_name: Text
    Software: Annotated[str, Field(pattern=r"^unified-latents [0-9A-Za-z.+-]{1,40}$")] = SOFTWARE


class _Picture(_Sheet):
    """What a picture has beside its job."""

    index: Annotated[int, Field(ge=0, lt=2**63)]
    label: Text
    batch: Count | None = None  # that it was computed in; None: pictures do not depend on it


def fingerprint(job: Job) -> str:
    """SHA-256 of the job as canonical JSON."""
    text = json.dumps(job.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def picture_chunks(job: Job, bundle_name: str, index: int, label: str, batch: int | None = None) -> dict[str, str]:
    """The text chunks of one picture; `batch`: how many were computed with it, None where that changes nothing."""
    picture = _Picture(job=fingerprint(job), bundle_name=bundle_name, index=index, label=label, batch=batch)
    return job.chunks() | picture.chunks()


def sheet_chunks(job: Job, bundle_name: str) -> dict[str, str]:
    """The text chunks of a contact sheet: no index, no label."""
    return job.chunks() | _Sheet(job=fingerprint(job), bundle_name=bundle_name).chunks()


def is_picture_of(text: Mapping[Any, Any], job_fingerprint: str, index: int) -> bool:
    """Whether chunks read from a PNG are those of picture `index` of the job."""
    return text.get("job") == job_fingerprint and text.get("index") == str(index)


@dataclass(frozen=True)
class Provenance:
    """What the chunks of a picture say, every field checked."""

    job: Job
    bundle_name: str
    index: int
    label: str
    batch: int | None
    software: str  # name and version


def read_chunks(text: Mapping[str, str], where: str) -> Provenance:
    """The inverse of `picture_chunks`. BadInputError: not a picture of this toolkit, damaged, changed or too new."""
    kinds: dict[str, type[GenerateJob | DecodeJob]] = {"ul-generate": GenerateJob, "ul-decode": DecodeJob}
    if text.get("command") not in kinds:
        raise BadInputError(f"{where}: has no provenance: its text chunks are not those of ul-generate")
    if "index" not in text:
        raise BadInputError(f"{where}: is not one picture of a job (a contact sheet?); choose one with an index")
    if max(map(len, text.values())) > _MOST_CHARACTERS:
        raise BadInputError(f"{where}: a text chunk has more than {_MOST_CHARACTERS} characters; it is not ours")
    try:
        job = kinds[text["command"]].from_chunks(text)
        picture = _Picture.from_chunks(text)
    except ValidationError as error:
        raise BadInputError(f"{where}: its text chunks are damaged: {first_error(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: its text chunks are damaged: {_one_line(error)}") from error
    if picture.job != fingerprint(job):
        message = "its text chunks were changed, or come from a newer version: they do not give the job they name"
        raise BadInputError(f"{where}: {message}")
    return Provenance(job, picture.bundle_name, picture.index, picture.label, picture.batch, picture.Software)


def _one_line(error: Exception, most: int = 200) -> str:
    return re.sub(r"\s+", " ", ascii(str(error))[1:-1])[:most]


def to_picture(image: np.ndarray) -> Image.Image:
    """uint8 `h w c` with 1 (grey), 3 (RGB) or 4 (RGBA) channels as a picture."""
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


SHEET = "contact_sheet.png"
_JOB_FILES = {"ul-generate": "generate.json", "ul-decode": "decode.json"}  # by the command that fills a folder
_MOST_PIXELS = 2**26
_MOST_BYTES = 2**28
_END_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"


def image_name(index: int) -> str:
    """File name of image `index`."""
    return f"{index:06d}.png"


def is_sheet(file: Path) -> bool:
    """Whether the file is the contact sheet beside images that a job here filled a folder with."""
    return file.name == SHEET and any((file.parent / job).is_file() for job in _JOB_FILES.values())


def png_bytes(picture: Image.Image, text: Mapping[str, str]) -> bytes:
    """A PNG file with these tEXt entries."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_png(path: Path) -> tuple[np.ndarray, dict[str, str], bytes]:
    """A PNG file's pixels `h w c`, its text chunks and its bytes. BadInputError: not whole, or larger than is read."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"a file of at most {_MOST_BYTES} bytes is expected")
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels, text = _parse_png(data)
    except UnidentifiedImageError as error:
        raise BadInputError(f"{path}: is not a whole PNG file: it does not begin as one") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path}: is not a whole PNG file: {ascii(str(error))[1:-1][:200]}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels, text, data


def _parse_png(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        if picture.width * picture.height > _MOST_PIXELS:
            raise ValueError(f"{picture.width} by {picture.height} px, at most {_MOST_PIXELS} pixels are read")
        picture.verify()  # the checksums, which reading the pixels would pass over
    if not data.endswith(_END_CHUNK):
        raise ValueError("it does not end where a PNG file ends")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        text = {str(key): str(value) for key, value in picture.info.items() if isinstance(value, str)}
        return np.asarray(picture), text
