"""The shipped model's pictures, latents and bits on ONNX Runtime's CPU backend are those that were kept, to the byte.

Bytes are the same for any number of threads and any batch, but kernels differ between processors and versions: hashes
are kept for each class of them. Elsewhere pictures are compared with kept pixels, latents and bits with kept values.
`python tests/test_golden_pictures.py --write` makes the files anew, which a change that only moves code never needs;
`--add` adds the hashes of this class of processor. Only the public API is used: what is inside may move.
"""

import base64
import hashlib
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

import ul_runtime

KEPT = Path(__file__).with_name("golden_pictures.json")
SHEET = KEPT.with_suffix(".png")
MODEL, SEED, COLUMNS = "garments-32", 20260, 5
SHORT = {"steps": 6, "decoder_steps": 3}
SAMPLERS = ("ddim", "ancestral", "dpmpp2m", "ab2", "ab3", "sa2", "unipc2", "heun")
DRAWN: dict[str, dict[str, Any]] = {  # the k-th is image k, so that all ten classes occur
    **{f"sampler {name}": {"sampler": name} for name in SAMPLERS},
    "decoder sampler ancestral": {"decoder_sampler": "ancestral"},
    "decoder sampler heun": {"decoder_sampler": "heun", "decoder_grid": "karras"},
    "decoder sampler sa2:0.6": {"decoder_sampler": "sa2:0.6", "decoder_grid": "mix:0.9,-1,1.5"},
    "grid uniform": {"grid": "uniform", "decoder_grid": "cosine"},
    "grid karras": {"grid": "karras", "decoder_grid": "uniform"},
    "grid flow": {"grid": "flow", "labels": "none"},
    "grid cosine, guidance 3 everywhere": {
        "grid": "cosine", "decoder_grid": "flow", "guidance": 3.0, "guidance_interval": (-np.inf, np.inf)
    },
    "guidance 4 in an interval, rescaled": {
        "guidance": 4.0, "guidance_interval": (-1.0, 3.0), "guidance_rescale": 0.7, "labels": "Bag"
    },
    "autoguidance by itself": {"guidance": 2.0},  # leads nowhere: only the last digits of x know of it
    "autoguidance by a lesser prior": {"guidance": 2.0, "guidance_interval": (-6.0, 3.0), "guidance_rescale": 0.5},
}  # fmt: skip
DECODED = {"decode, one": 1, "decode, mean of two": 2}
PICTURES = (*DRAWN, *DECODED)
VALUES = {"z_clean": "<f4", "z_0": "<f4", "bits": "<f8"}
ENCODED = "sampler dpmpp2m"  # its kept pixels are encoded
MOST_UNLIKE = 0.001  # of a picture's pixels, by more than one level, on a processor or version of another class
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx")


def machine_class() -> str:
    """What the bytes may depend on: vector units (from /proc/cpuinfo), versions of ONNX Runtime and numpy."""
    import onnxruntime

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    units = [flag for flag in FLAGS if any(name == flag or name.startswith(f"{flag}_") for name in found)]
    versions = f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}"
    return f"{platform.machine()} {' '.join(units) or 'unknown'}, {versions}"


def hash_of(array: np.ndarray) -> str:
    """SHA-256 of type, shape and bytes in C order."""
    array = array.astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes(order="C")).hexdigest()


def load(guide: Path | str | None = None) -> Any:
    return ul_runtime.load(MODEL, guide=guide, backend="ort-cpu", threads=1)


def write_lesser(folder: Path) -> Path:
    """The shipped bundle with a worse prior: its matrices are shrunk."""
    shutil.copytree(load().path, folder)
    weights = load_file(folder / "prior.safetensors")
    worse = {name: (array * (0.9 if array.ndim > 1 else 1.0)).astype(array.dtype) for name, array in weights.items()}
    (folder / "prior.safetensors").write_bytes(data := save(worse))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["prior.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def draw(name: str, pipeline: Any, seed: int = SEED) -> Any:
    """Picture `name` of DRAWN: `images` uint8 `1 h w c`, `x` float32 `1 c h w`."""
    return next(pipeline.generate([list(DRAWN).index(name)], seed=seed, **SHORT, **DRAWN[name]))


def decode(name: str, pipeline: Any, z_0: np.ndarray, seed: int = SEED) -> Any:
    """The same for DECODED."""
    return next(pipeline.decode(z_0, seed=seed, mean_of=DECODED[name], decoder_steps=3))


def encode(pipeline: Any, picture: np.ndarray, seed: int = SEED) -> dict[str, np.ndarray]:
    """z_clean and z_0 of a picture uint8 `1 h w c`."""
    x = picture.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    encoded = pipeline.encode(x, seed=seed)
    return {"z_clean": encoded.z_clean, "z_0": encoded.z_0}


def bits(pipeline: Any, z_clean: np.ndarray, seed: int = SEED) -> np.ndarray:
    return pipeline.bits(z_clean, seed=seed, num_samples=4)


def sheet_of(made: dict[str, np.ndarray]) -> np.ndarray:
    """All pictures side by side, uint8 `h w`."""
    tiles = [made[name][0, :, :, 0] for name in PICTURES]
    return np.block([tiles[first : first + COLUMNS] for first in range(0, len(tiles), COLUMNS)])


def kept_pictures() -> dict[str, np.ndarray]:
    with Image.open(SHEET) as image:
        sheet = np.asarray(image)
    side = sheet.shape[1] // COLUMNS
    rows = sheet.reshape(-1, side, COLUMNS, side).swapaxes(1, 2).reshape(-1, 1, side, side, 1)
    return dict(zip(PICTURES, rows, strict=True))


def text_of(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def kept_values(kept: dict[str, Any]) -> dict[str, np.ndarray]:
    values = {name: (kept["values"][name], kind) for name, kind in VALUES.items()}
    return {
        name: np.frombuffer(base64.b64decode(value["base64"]), kind).reshape(value["shape"])
        for name, (value, kind) in values.items()
    }


def is_near(made: np.ndarray, kept: np.ndarray) -> bool:
    """Whether uint8 pictures differ by at most one level, but for MOST_UNLIKE of their pixels."""
    return made.shape == kept.shape and np.mean(np.abs(made.astype(int) - kept) > 1) <= MOST_UNLIKE


def is_close(made: np.ndarray, kept: np.ndarray) -> bool:
    """The same for latents and bits: float32 networks, whose last digits may differ."""
    same = made.shape == kept.shape and made.dtype == kept.dtype
    return same and bool(np.allclose(made, kept, rtol=1e-4, atol=1e-5))


class Maker:
    """Everything that is kept, made here, each of given inputs; pipelines are opened once."""

    def __init__(self, folder: Path) -> None:
        guides = {"autoguidance by itself": MODEL, "autoguidance by a lesser prior": write_lesser(folder / "lesser")}
        self.pipeline = load()
        self.guided = {name: load(guide) for name, guide in guides.items()}
        self.pictures: dict[str, np.ndarray] = {}  # of these, ENCODED is encoded
        self.values: dict[str, np.ndarray] = {}  # of these, z_0 is decoded, and z_clean has bits

    def make(self, name: str, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
        """Picture, latent or bits called `name`, and the float32 x of a picture."""
        if name in PICTURES:
            made = (
                draw(name, self.guided.get(name, self.pipeline), seed)
                if name in DRAWN
                else decode(name, self.pipeline, self.values["z_0"], seed)
            )
            return made.images, made.x
        if name == "bits":
            made = bits(self.pipeline, self.values["z_clean"], seed)
        else:
            made = encode(self.pipeline, self.pictures[ENCODED], seed)[name]
        return made, made


class Kept(Maker):
    """The same of the inputs that are kept, beside what is kept."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.file = json.loads(KEPT.read_text())
        self.pictures, self.values = kept_pictures(), kept_values(self.file)
        self.hashes: dict[str, list[str]] = self.file["hashes"].get(machine_class(), {})


def hashes_of(made: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """Of a picture in uint8 and of its x: what rounding to pixels hides."""
    return list(dict.fromkeys(hash_of(array) for array in made))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("guide"))


def test_there_are_twenty_pictures_and_no_two_are_the_same(kept):
    assert len(kept.pictures) == 20
    for hashes in kept.file["hashes"].values():
        assert set(hashes) == {*PICTURES, *VALUES}
        assert len({one for both in hashes.values() for one in both}) == 2 * len(PICTURES) + len(VALUES)


def test_the_kept_pixels_and_values_have_the_kept_hashes(kept):
    hashes = kept.file["hashes"][kept.file["made_by"]]
    kept_arrays = kept.pictures | kept.values
    assert {name: hash_of(array) for name, array in kept_arrays.items()} == {name: hashes[name][0] for name in hashes}


def test_bytes_are_compared_on_this_class_of_processor(kept):
    if not kept.hashes:
        pytest.skip(f"no hashes of {machine_class()}: pixels and values are compared instead; add them with --add")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_kept_one(kept, name):
    made = kept.make(name)
    assert made[0].dtype == np.uint8
    assert is_near(made[0], kept.pictures[name])
    assert hashes_of(made) == kept.hashes.get(name, hashes_of(made))


@pytest.mark.parametrize("name", VALUES)
def test_latents_and_bits_are_the_kept_ones(kept, name):
    made = kept.make(name)
    assert made[0].dtype == np.dtype(VALUES[name])
    assert is_close(made[0], kept.values[name])
    assert hashes_of(made) == kept.hashes.get(name, hashes_of(made))


@pytest.mark.parametrize("name", ["sampler ddim", "autoguidance by a lesser prior", "decode, mean of two"])
def test_another_seed_gives_another_picture(kept, name):
    other = kept.make(name, SEED + 1)
    assert hash_of(other[0]) != hash_of(kept.pictures[name])
    assert not {*hashes_of(other)} & {*kept.hashes.get(name, [])}
    assert not is_near(other[0], kept.pictures[name])


@pytest.mark.parametrize("name", ["z_0", "bits"])
def test_another_seed_gives_another_latent_and_other_bits(kept, name):
    other, _ = kept.make(name, SEED + 1)
    assert hash_of(other) != hash_of(kept.values[name])
    assert not is_close(other, kept.values[name])


def test_the_comparison_of_pixels_allows_one_level_anywhere_and_more_in_one_pixel_alone(kept):
    picture = kept.pictures["sampler ddim"]
    one_level = np.where(picture > 0, picture - 1, 1).astype(np.uint8)
    assert is_near(one_level, picture)
    far = picture.copy()
    far[0, 0, 0, 0] ^= 128
    assert is_near(far, picture)
    far[0, 1, 0, 0] ^= 128
    assert not is_near(far, picture)
    assert not is_near(picture[0], picture)
    assert len({hash_of(array) for array in (picture, picture[0], one_level)}) == 3


def test_the_picture_of_an_index_is_the_same_in_a_batch_of_three(kept):
    many = next(kept.pipeline.generate([7, 3, 0], seed=SEED, batch_size=3, **SHORT, **DRAWN["sampler ddim"]))
    assert hashes_of((many.images[2:], many.x[2:])) == hashes_of(kept.make("sampler ddim"))


def write(folder: Path) -> None:
    """Both files, with the hashes of this class of processor alone."""
    maker, hashes = Maker(folder), {}
    for name in (*DRAWN, *VALUES, *DECODED):  # in the order in which one needs the other
        made = maker.make(name)
        (maker.values if name in VALUES else maker.pictures)[name] = made[0]
        hashes[name] = hashes_of(made)
    Image.fromarray(sheet_of(maker.pictures)).save(SHEET, optimize=True)
    values = {name: text_of(value) for name, value in maker.values.items()}
    write_file({"made_by": machine_class(), "hashes": {machine_class(): hashes}, "values": values})


def add(folder: Path) -> None:
    """The hashes of this class of processor, if its pictures and values are near the kept ones."""
    kept = Kept(folder)
    made = {name: kept.make(name) for name in (*PICTURES, *VALUES)}
    unlike = [name for name in PICTURES if not is_near(made[name][0], kept.pictures[name])]
    unlike += [name for name in VALUES if not is_close(made[name][0], kept.values[name])]
    if unlike:
        sys.exit(f"not added, unlike what is kept: {', '.join(unlike)}")
    if kept.hashes:
        sys.exit(f"there are hashes of {machine_class()}; --write makes all anew")
    kept.file["hashes"][machine_class()] = {name: hashes_of(arrays) for name, arrays in made.items()}
    write_file(kept.file)


def write_file(file: dict[str, Any]) -> None:
    KEPT.write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] not in (["--write"], ["--add"]):
        sys.exit("usage: python tests/test_golden_pictures.py --write | --add")
    with tempfile.TemporaryDirectory() as temporary:
        {"--write": write, "--add": add}[sys.argv[1]](Path(temporary))
