"""x to finished pictures on the device: one graph for every bundle, so that uint8 and not float32 leaves a card."""

from dataclasses import dataclass

from ul_runtime.device.interface import Interface
from ul_runtime.manifest import BundleInfo, ImageFormat

NAME = "pixels"
# round((clip(x, -1, 1) + 1) * 127.5) as uint8, channels last; and the sum of the magnitudes of x, finite where x is.
# What tests/pixels_graph.py builds, which a test compares.
ONNX = (
    b"\x08\x08\x12\x00:\x86\x04\n#\n\x01x\n\x03low\n\x04high\x12\x07clipped\x1a\x04cl"
    b'ip"\x04Clip\n$\n\x07clipped\n\x04high\x12\x07shifted\x1a\x05'
    b'shift"\x03Add\n$\n\x07shifted\n\x05scale\x12\x06scaled'
    b'\x1a\x05scale"\x03Mul\n\x1d\n\x06scaled\x12\x05whole\x1a\x05round'
    b'"\x05Round\n:\n\x05whole\x12\x04last\x1a\rchannels_las'
    b't"\tTranspose*\x11\n\x04perm@\x00@\x02@\x03@\x01\xa0\x01\x07\n&\n\x04l'
    b'ast\x12\x06images\x1a\x05uint8"\x04Cast*\t\n\x02to\x18\x02\xa0\x01\x02\n'
    b'\x1e\n\x01x\x12\tmagnitude\x1a\tmagnitude"\x03Abs\n7\n\tm'
    b'agnitude\n\x04axes\x12\x03sum\x1a\x03sum"\tReduceSum*'
    b"\x0f\n\x08keepdims\x18\x00\xa0\x01\x02\x12\x06pixels*\r\x10\x01B\x03lowJ\x04\x00"
    b"\x00\x80\xbf*\x0e\x10\x01B\x04highJ\x04\x00\x00\x80?*\x0f\x10\x01B\x05scaleJ\x04\x00\x00\xffB"
    b"*$\x08\x03\x10\x07B\x04axesJ\x18\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00"
    b"\x00\x00Z\x1f\n\x01x\x12\x1a\n\x18\x08\x01\x12\x14\n\x03\x12\x01b\n\x03\x12\x01c\n\x03\x12\x01h\n\x03\x12\x01wb"
    b"$\n\x06images\x12\x1a\n\x18\x08\x02\x12\x14\n\x03\x12\x01b\n\x03\x12\x01h\n\x03\x12\x01w\n\x03\x12\x01"
    b"cb\x12\n\x03sum\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01bB\x04\n\x00\x10\x12"
)


@dataclass(frozen=True)
class PixelTensor:
    """As TensorFormat."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PixelGraph:
    """x `b c h w` float32 -> images `b h w c` uint8, sum `b` float32: NaN or Inf where x is not finite."""

    inputs: tuple[PixelTensor, ...]
    outputs: tuple[PixelTensor, ...]

    @classmethod
    def of(cls, image: ImageFormat) -> "PixelGraph":
        """For images of this format."""
        size, channels = image.size, image.channels
        x = PixelTensor("x", "float32", ("b", channels, size, size))
        images = PixelTensor("images", "uint8", ("b", size, size, channels))
        return cls((x,), (images, PixelTensor("sum", "float32", ("b",))))


def graphs_of(manifest: BundleInfo) -> dict[str, Interface]:
    """All graphs that a device runs for a bundle: its own and, as NAME, this one."""
    graphs: dict[str, Interface] = {str(name): graph for name, graph in manifest.graphs.items()}
    return graphs | {NAME: PixelGraph.of(manifest.image)}
