"""A folder of numbered PNG files that one job fills: resumable, and never mixed with another job's.

job.json (the settings and their fingerprint, written first), 000000.png ..., contact_sheet.png
"""

import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ul_runtime import durable
from ul_runtime.contact_sheet import MOST_TILES, contact_sheet, to_picture
from ul_runtime.errors import BadInputError, StoppedError, UsageError
from ul_runtime.loop import never
from ul_runtime.provenance import Job, fingerprint, is_picture_of, picture_chunks, sheet_chunks

SHEET = "contact_sheet.png"
_JOB_FILES = {"ul-generate": "generate.json", "ul-decode": "decode.json"}  # by the command that fills a folder
_FORMAT = "unified-latents-images"
_NAME = re.compile(r"\d{6}\.png|[1-9]\d{6,18}\.png")  # image_name
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


class ImageFolder:
    """The open folder of one job; made by `open_image_folder`."""

    def __init__(self, path: Path, job: Job, bundle_name: str, num_images: int) -> None:
        self.path = path
        self.job = job
        self.bundle_name = bundle_name
        self.num_images = num_images
        self.fingerprint = fingerprint(job)

    def _read(self, index: int) -> np.ndarray | None:
        """Image `index` as uint8 `h w c` if it is there, whole and of this job."""
        try:
            pixels, text, _ = read_png(self.path / image_name(index))
        except BadInputError:
            return None
        return pixels if is_picture_of(text, self.fingerprint, index) else None

    def done(self, stop: Callable[[], bool] = never) -> set[int]:
        """Indices of the images that are there, whole and of this job. `stop` is asked often: StoppedError."""
        found = set()
        for path in self.path.iterdir():
            if stop():
                raise StoppedError(f"{self.path}: stopped before any image; run the same command again to go on")
            index = int(path.stem) if _NAME.fullmatch(path.name) else self.num_images
            if index < self.num_images and self._read(index) is not None:
                found.add(index)
        return found

    def write(self, index: int, image: np.ndarray, label: str, batch: int | None = None) -> None:
        """Put image `index` (uint8 `h w c`) in place, whole or not at all, with its provenance. OutputError."""
        text = picture_chunks(self.job, self.bundle_name, index, label, batch)
        durable.atomic_write(self.path / image_name(index), png_bytes(to_picture(image), text))

    def write_sheet(self, title: str, columns: Sequence[str]) -> Path | None:
        """The contact sheet of the first images that are there; None if there are none. OutputError."""
        found = [self._read(index) for index in range(min(self.num_images, MOST_TILES))]
        example = next((image for image in found if image is not None), None)
        if example is None:
            return None
        images = [np.full_like(example, 255) if image is None else image for image in found]
        path = self.path / SHEET
        text = sheet_chunks(self.job, self.bundle_name)
        durable.atomic_write(path, png_bytes(contact_sheet(images, title, columns), text))
        return path

    def begin(self, job_file: Path) -> None:
        """Write the job file, or check that the one there is of the same job. UsageError, BadInputError."""
        if job_file.exists():
            self._check_same(job_file, _read_job(job_file))
        elif next(self.path.glob("*.png"), None):
            raise UsageError(f"{self.path}: holds images but no {job_file.name}; choose an empty folder")
        head = {"format": _FORMAT, "format_version": 1, "num_images": self.num_images}
        content = {**head, "fingerprint": self.fingerprint, "job": self.job.model_dump(mode="json")}
        durable.atomic_write(job_file, (json.dumps(content, indent=2) + "\n").encode())

    def _check_same(self, job_file: Path, found: dict[str, Any]) -> None:
        job, count = found["job"], found["num_images"]
        wanted = self.job.model_dump(mode="json")
        for key in sorted(set(job) | set(wanted)):
            if job.get(key) != wanted.get(key):
                message = f"{job_file}: the images here were made with {key} {job.get(key)}, now {wanted.get(key)}"
                raise UsageError(f"{message}; choose another folder, or the same settings to go on")
        if count > self.num_images:
            message = f"{job_file}: the folder holds a job of {count} images, now {self.num_images}"
            raise UsageError(f"{message}; ask for at least as many, or choose another folder")


def _read_job(job_file: Path) -> dict[str, Any]:
    try:
        found = json.loads(job_file.read_bytes())
        if found["format"] == _FORMAT and isinstance(found["job"], dict) and isinstance(found["num_images"], int):
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BadInputError(f"{job_file}: is not a job file of this toolkit; choose another folder")


@contextmanager
def open_image_folder(path: Path, job: Job, bundle_name: str, num_images: int) -> Iterator[ImageFolder]:
    """The folder `path`, held for this process: new, empty, or filled by the same job before, or by less of it.

    UsageError: other things in it, or another job. OutputError: not writable.
    """
    job_name = _JOB_FILES[job.command]
    durable.check_output_directory(path, [job_name, SHEET, "[0-9]" * 6 + "*.png"])
    with durable.lock_directory(path):
        folder = ImageFolder(path, job, bundle_name, num_images)
        folder.begin(path / job_name)
        durable.sweep(path)
        yield folder
