"""The scripts in tools/: they parse, name no machine and no package index, and the sweep goes on where it stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from tool_module import load_tool

from ul_runtime.errors import UsageError

ROOT = Path(__file__).parent.parent
SHELL = ("tools/environment", "tools/quickstart", "tools/test", ".ci/run")
SWEEP = ROOT / "tools" / "loss_factor_sweep.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    return load_tool("loss_factor_sweep")


@pytest.mark.parametrize("script", SHELL)
def test_a_shell_script_parses_and_stops_at_the_first_error(script):
    text = (ROOT / script).read_text()
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=20)
    if script != "tools/environment":  # sourced by the others
        assert "set -euo pipefail" in text
        assert os.access(ROOT / script, os.X_OK)
    assert not re.search(r"https?://|--(extra-)?index-url", text)


def test_the_quickstart_explains_itself_without_doing_anything():
    done = subprocess.run([ROOT / "tools/quickstart", "--help"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert done.stdout.startswith("From nothing to pictures: tools/quickstart [IMAGES]")
    assert done.stderr == ""


@pytest.mark.parametrize("text", ["", "a", "1.5,", "0", "-1", "inf", "nan", "2,2.0"])
def test_loss_factors_that_cannot_be_are_refused(sweep, text):
    with pytest.raises(UsageError, match="--values"):
        sweep.parse_values(text)


def test_the_recorded_command_has_no_folder_of_this_machine(sweep):
    words = ["x", "tiny", "--data", "/home/someone/images", "--out", "tools/results/a"]
    assert sweep.anonymous(words) == "python tools/loss_factor_sweep.py tiny --data images --out tools/results/a"


@pytest.mark.slow
def test_a_sweep_measures_every_value_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("sklearn")

    def run(values: str) -> subprocess.CompletedProcess[str]:
        words = ["tiny", "--data", "sklearn-digits", "--set", "joint.steps=2", "--images", "8", "--mean-of", "2"]
        folders = [part for name in ("runs", "out", "cache") for part in (f"--{name}", str(tmp_path / name))]
        settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, SWEEP, *words, *folders, "--values", values, "--threads", "1"]
        return subprocess.run(arguments, env=settings, capture_output=True, text=True, timeout=300, check=True)

    run("3")
    second = run("1.5,3")
    assert "loss-factor-3: finished before" in second.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["loss_factor"] for row in record["figures"]] == [1.5, 3.0]
    assert all(row["num_images"] == 8 and row["mean_of"] == 2 for row in record["figures"])
    assert record["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(record)
    assert second.stdout == (tmp_path / "out" / "table.md").read_text()
    assert second.stdout.count("\n| ") == 2
    with Image.open(tmp_path / "out" / "plot.png") as picture:
        picture.load()


def test_emoji_go_into_folders_by_category_without_skin_tones_and_components(tmp_path):
    (tmp_path / "package/img/google/64").mkdir(parents=True)
    emoji = []
    for name, category, there in (("a", "Food & Drink", True), ("b", "Component", True), ("c", "Flags", False)):
        Image.new("RGBA", (4, 4)).save(tmp_path / f"package/img/google/64/{name}.png")
        skins = {"1F3FB": {"image": "a-1f3fb.png"}}
        emoji.append({"image": f"{name}.png", "category": category, "has_img_google": there, "skin_variations": skins})
    Image.new("RGBA", (4, 4)).save(tmp_path / "package/img/google/64/a-1f3fb.png")
    (tmp_path / "package/emoji.json").write_text(json.dumps(emoji))
    command = [sys.executable, ROOT / "tools/emoji_folder.py", tmp_path / "package", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.startswith("1 images in ")
    assert [path.relative_to(tmp_path / "out") for path in tmp_path.glob("out/**/*.png")] == [Path("Food-Drink/a.png")]
