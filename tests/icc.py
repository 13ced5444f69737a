"""Colour profiles for tests: the smallest that ICC 2 allows."""

import struct

# red, green, blue in D50, as ICC stores them
_SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
_ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
_WHITE = (0.9642, 1.0, 0.8249)


def _xyz(value: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(x * 65536)) for x in value)


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    entries, data, at = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        entries += name + struct.pack(">II", at + len(data), len(content))
        data += content
    size = at + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ") + b"\0" * 12 + b"acsp"
    head = head.ljust(68, b"\0") + _xyz(_WHITE)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + data


def rgb_profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """A display profile: XYZ of red, green and blue, and one gamma."""
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {b"wtpt": _xyz(_WHITE)} | {name: _xyz(xyz) for name, xyz in zip(names, primaries, strict=True)}
    return _profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma)))


ADOBE_RGB = rgb_profile(_ADOBE, 563 / 256)
SWAPPED = rgb_profile((_SRGB[1], _SRGB[0], _SRGB[2]), 2.2)  # red and green exchanged
LINEAR_GREY = _profile(b"GRAY", {b"wtpt": _xyz(_WHITE), b"kTRC": _gamma(1.0)})
