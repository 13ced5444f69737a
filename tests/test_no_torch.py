"""The runtime works where torch and onnx are not installed: blocked in this environment, truly absent in a new one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported_run import PLAIN, exported_run
from PIL import Image

ROOT = Path(__file__).parent.parent
ABSENT = ("torch", "onnx", "onnxscript", "ul_train", "ul_export")
BLOCKED = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
module, _, main = sys.argv.pop(1).partition(":")
getattr(importlib.import_module(module), main or "main")()
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures of noise."""
    (tmp_path / "photos").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


def use(commands: dict[str, list[str]], bundle: Path, photos: Path, out: Path, **environment: str) -> None:
    """ul-generate, ul-encode and ul-decode on a bundle, outside the repository; asserts what they make."""
    latents = out / "latents.safetensors"
    calls = {
        "generate": [bundle, "--num-images", 3, "--out", out / "generated"],
        "encode": [bundle, photos, "--out", latents, "--bits-samples", 2],
        "decode": [bundle, latents, "--out", out / "decoded"],
    }
    settings = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **environment}
    for name, arguments in calls.items():
        words = [*commands[name], *map(str, arguments), "--threads", "1", "--json"]
        done = subprocess.run(words, cwd=out, env=settings, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
    assert len(list((out / "generated").glob("0*.png"))) == 3
    assert len(list((out / "decoded").glob("0*.png"))) == 2


def test_the_commands_run_where_torch_and_onnx_cannot_be_imported(analytic_bundle, photos, tmp_path):
    call = [sys.executable, "-c", BLOCKED]
    mains = {
        "generate": "ul_runtime.cli.generate:main",
        "encode": "ul_runtime.cli.latents:encode_main",
        "decode": "ul_runtime.cli.latents:decode_main",
    }
    commands = {name: [*call, main] for name, main in mains.items()}
    use(commands, analytic_bundle, photos, tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("module", ABSENT)
def test_what_is_blocked_cannot_be_imported(module):
    """The control of the test above."""
    done = subprocess.run([sys.executable, "-c", BLOCKED, module], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"ModuleNotFoundError: No module named '{module}'" in done.stderr


def pip(python: Path, *arguments: object) -> str:
    words = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with `pip install .`: the dependencies of the runtime and nothing else."""
    folder = tmp_path_factory.mktemp("install")
    kept = ("ul_runtime", "ul_train", "ul_export", "pyproject.toml", "README.md", "LICENSE")
    for name in kept:  # a copy, so that no build output gets into the checkout
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / "source" / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    python = folder / "venv" / "bin" / "python"
    pip(python, "install", "--quiet", folder / "source")
    return python.parent


@pytest.mark.slow
def test_a_plain_install_brings_neither_torch_nor_onnx(plain_install):
    packages = json.loads(pip(plain_install / "python", "list", "--format=json"))
    installed = {package["name"].lower() for package in packages}
    assert {"unified-latents", "onnxruntime", "numpy"} <= installed
    assert not installed & {"torch", "onnx", "onnxscript", "datasets", "matplotlib"}


@pytest.mark.slow
def test_an_exported_bundle_works_in_a_plain_install(plain_install, photos, tmp_path, tmp_path_factory):
    bundle = shutil.copytree(exported_run(PLAIN, tmp_path_factory).bundle, tmp_path / "bundle")
    commands = {name: [str(plain_install / f"ul-{name}")] for name in ("generate", "encode", "decode")}
    use(commands, bundle, photos, tmp_path)


@pytest.mark.slow
def test_ul_export_says_which_extras_it_needs(plain_install, tmp_path):
    words = [plain_install / "ul-export", "run", "--out", "out"]
    settings = {"PATH": os.environ["PATH"]}  # no PYTHONPATH, which would lead to another source
    done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    source = plain_install.parent.parent / "source"
    said = f"ul-export: torch is not installed; pip install '{source}[train,export]'; without an NVIDIA GPU, first "
    assert done.stderr == f"{said}install torch's CPU build by the command on pytorch.org/get-started\n"


def test_engines_of_a_bundle_are_built_ahead_where_torch_cannot_be_imported(analytic_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")
    blocked = BLOCKED.replace(repr(ABSENT), repr(("torch", "onnxscript")))
    words = [analytic_bundle, "--tensorrt", "--target", "sm89", "--engines", tmp_path / "engines", "--json"]
    call = [sys.executable, "-c", blocked, "ul_export.cli", *map(str, words)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engines_built"] == 4


@pytest.mark.parametrize("name", ["generate", "doctor"])
def test_without_onnx_runtime_it_is_said_what_to_install(analytic_bundle, tmp_path, name):
    blocked = BLOCKED.replace(repr(ABSENT), repr(("onnxruntime",)))
    words = [analytic_bundle, "--num-images", 1, "--out", tmp_path / "out"] if name == "generate" else []
    call = [sys.executable, "-c", blocked, f"ul_runtime.cli.{name}:main", *map(str, words)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "UL_CACHE": str(tmp_path)}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if name == "generate" else 1), done.stderr
    assert "Traceback" not in done.stderr
    assert "onnxruntime cannot be imported" in done.stdout + done.stderr
    assert "pip install onnxruntime, or onnxruntime-gpu" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
