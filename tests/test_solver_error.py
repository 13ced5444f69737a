"""tools/solver_error.py on the analytic bundle: its figures are the distances of walks that are known."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from analytic_bundle import MEANS
from exact_denoisers import gaussian_mean, mixture_mean, walk
from PIL import Image
from tool_module import load_tool

from ul_runtime import noise
from ul_runtime.errors import NonFiniteError, UsageError
from ul_runtime.samplers import sampler_table

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "solver_error.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("solver_error")


@pytest.fixture(scope="module")
def out(analytic_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run: three images, 4, 8 and 16 calls, against 64 steps."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("solver_error") / "out"
    words = [analytic_bundle, "--out", folder, "--calls", "16,4,8", "--images", 3, "--seed", 5, "--threads", 1]
    arguments = [sys.executable, TOOL, *map(str, words), "--reference-steps", "64", "--decoder-grid", "cosine"]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "table.md").read_text()
    return folder


@pytest.fixture(scope="module")
def errors(out: Path) -> dict[tuple[str, str, int], float]:
    figures = json.loads((out / "results.json").read_text())["figures"]
    return {(row["panel"], row["sampler"], row["at_most"]): row["rms"] for row in figures}


def test_a_figure_of_z_0_is_the_distance_of_two_walks_in_float64(errors):
    start = noise.normals(5, np.arange(3), noise.PRIOR_START, (4, 4, 4)).astype(np.float64)
    mean = MEANS[:3, :, None, None].astype(np.float64)

    def z_0(sampler: str, num_steps: int) -> np.ndarray:
        table = sampler_table(sampler, "uniform", num_steps, logsnr_min=-10.0, logsnr_max=5.0, ends_clean=False)
        return walk(table, start, lambda z, logsnr: gaussian_mean(z, logsnr, 0.5, mean))

    def distance(sampler: str, num_steps: int) -> float:
        return np.sqrt(np.mean((z_0(sampler, num_steps) - z_0("unipc2", 64)) ** 2, axis=(1, 2, 3))).mean()

    assert errors["z_0", "ab3", 8] == pytest.approx(distance("ab3", 8), rel=1e-3)
    assert errors["z_0", "heun", 16] == pytest.approx(distance("heun", 8), rel=1e-3)
    assert errors["z_0", "reference", 32] == pytest.approx(distance("unipc2", 32), rel=1e-2)
    assert errors["z_0", "ab3", 8] != pytest.approx(distance("ab2", 8), rel=1e-1)  # negative control


def test_every_panel_has_every_sampler_it_can_compare(errors, tool):
    for panel, samplers in (("exact", (*tool.DETERMINISTIC, *tool.STOCHASTIC)), ("image", tool.DETERMINISTIC)):
        found = {(sampler, calls) for name, sampler, calls in errors if name == panel and sampler != "reference"}
        assert found == {(sampler, calls) for sampler in samplers for calls in (4, 8, 16)}


def test_more_calls_are_nearer_on_the_exact_model(errors, tool):
    for sampler in (*tool.DETERMINISTIC, *tool.STOCHASTIC):
        assert errors["exact", sampler, 16] < 0.6 * errors["exact", sampler, 4], sampler


def test_the_calls_of_a_figure_are_those_that_were_made(out):
    figures = json.loads((out / "results.json").read_text())["figures"]
    heun = {(row["panel"], row["at_most"]): row["calls"] for row in figures if row["sampler"] == "heun"}
    assert [heun[panel, 8] for panel in ("exact", "z_0", "image")] == [8, 8, 7]


def test_the_record_says_how_it_was_made_without_folders_of_this_machine(out):
    text = (out / "results.json").read_text()
    record = json.loads(text)
    assert record["settings"]["decoder_grid"] == "cosine"
    assert (record["bundle"], record["seed"], record["num_images"]) == ("analytic", 5, 3)
    assert record["reference"] == "64 steps of unipc2"
    assert record["command"].startswith("python tools/solver_error.py analytic --out out --calls 16,4,8")
    assert str(out.parent) not in text
    with Image.open(out / "plot.png") as picture:
        picture.load()


def test_the_exact_model_is_the_mixture_of_the_tests(tool):
    z = np.linspace(-3.0, 3.0, 50)
    for logsnr in (-10.0, 0.0, 5.0):
        assert np.allclose(tool.mixture_mean(z, logsnr), mixture_mean(z, logsnr), rtol=1e-13)
    assert not np.allclose(tool.mixture_mean(z, 1.0), mixture_mean(z, 1.1), rtol=1e-3)


@pytest.mark.parametrize("text", ["", "a", "4,", "1,4", "-4", "4.5"])
def test_numbers_of_calls_that_cannot_be_are_refused(tool, text):
    with pytest.raises(UsageError, match="--calls"):
        tool.parse_calls(text)


def test_an_error_that_is_no_number_is_never_a_figure(tool):
    for error in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="ab3 with 8 calls"):
            tool.figure("z_0", "ab3", 8, 8, error)
