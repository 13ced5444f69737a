"""What a file is, by its first bytes: for the files that are no image, or an image that is not read."""

HEAD_BYTES = 512  # enough of a file for `kind_of`

# (where, first bytes, what it is); the first that matches
_IMAGES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (0, b"\xff\xd8", "JPEG"),
    (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"),
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"P5\n", "PGM"),
    (0, b"P6\n", "PPM"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftyphev", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"ftypcrx ", "raw photograph (CR3)"),
    (0, b"FUJIFILMCCD-RAW", "raw photograph (RAF)"),
    (0, b"IIU\0", "raw photograph (RW2)"),
    (0, b"IIR", "raw photograph (ORF)"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"8BPS", "Photoshop document"),
    (0, b"gimp xcf", "GIMP document"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"qoif", "QOI"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"DDS ", "DDS texture"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"\0\0\x01\0", "Windows icon"),
    (0, b"icns", "macOS icon"),
)
_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"\0\x05\x16\x07", "side-car file of macOS"),
    (0, b"version https://git-lfs", "Git LFS pointer; run git lfs pull"),
    (4, b"ftyp", "video"),
    (0, b"\x1aE\xdf\xa3", "video"),
    (8, b"AVI ", "video"),
    (0, b"PK\x03\x04", "ZIP archive"),
    (0, b"\x1f\x8b", "gzip archive"),
    (0, b"7z\xbc\xaf", "7z archive"),
    (257, b"ustar", "tar archive"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"PAR1", "Parquet"),
)
_MARKUP = ((b"<!doctype html", "HTML page"), (b"<html", "HTML page"), (b"<svg", "SVG drawing"), (b"<?xml", "XML file"))


def kind_of(head: bytes) -> str | None:
    """What begins with these bytes, as "JPEG XL" or "HTML page"; None if that is not known."""
    for where, magic, name in (*_IMAGES, *_OTHERS):
        if head.startswith(magic, where):
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in _MARKUP:
        if text.startswith(magic):
            return name
    return "text" if head and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else None


def is_image_kind(kind: str | None) -> bool:
    """Whether a kind is that of images, as "JPEG XL" is and "HTML page" is not."""
    return any(kind == name for _, _, name in _IMAGES)
