"""TIFF files of types that Pillow does not write."""

import struct

import numpy as np

Tags = dict[int, tuple[int, ...]]
BITS, PHOTOMETRIC, FILL_ORDER, SAMPLE_FORMAT, EXTRA_SAMPLES, COMPRESSION = 258, 262, 266, 339, 338, 259


def tiff(values: np.ndarray, tags: Tags | None = None, planar: bool = False, strip: bytes | None = None) -> bytes:
    """An uncompressed TIFF of `values` h w [c], in their byte order; `strip` in place of their bytes."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width, *channels = values.shape
    count, bits = (channels or [1])[0], values.dtype.itemsize * 8
    planes = [values[..., c] for c in range(count)] if planar else [values]
    strips = [np.ascontiguousarray(plane).tobytes() for plane in planes] if strip is None else [strip]
    entries: Tags = {256: (width,), 257: (height,), BITS: (bits,) * count, COMPRESSION: (1,), 277: (count,)}
    entries |= {PHOTOMETRIC: (2 if count > 2 else 1,), 278: (height,), 284: (2 if planar else 1,)} | (tags or {})
    entries |= {273: (0,) * len(strips), 279: tuple(map(len, strips))}
    start = 8 + 2 + 12 * len(entries) + 4
    at = start + sum(4 * len(value) for value in entries.values() if len(value) > 1)
    entries[273] = tuple(at + sum(map(len, strips[:k])) for k in range(len(strips)))
    directory, values_outside = struct.pack(f"{order}H", len(entries)), b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        where = struct.pack(f"{order}I", start + len(values_outside)) if len(numbers) > 1 else packed
        values_outside += packed if len(numbers) > 1 else b""
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + where
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", 8) + directory + b"\0" * 4 + values_outside + b"".join(strips)
