"""The scripts in tools/: they parse, and name no machine and no package index."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tool_module import load_tool

ROOT = Path(__file__).parent.parent
SHELL = ("tools/environment", "tools/quickstart", "tools/test", ".ci/run")


@pytest.mark.parametrize("script", SHELL)
def test_a_shell_script_parses_and_stops_at_the_first_error(script):
    text = (ROOT / script).read_text()
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=20)
    if script != "tools/environment":  # sourced by the others
        assert "set -euo pipefail" in text
        assert os.access(ROOT / script, os.X_OK)
    assert not re.search(r"https?://|--(extra-)?index-url", text)


@pytest.mark.case(
    "N5",
    "Ctrl-C in tools/test",
    "ends the tests; their compile cache is their own",
)
def test_ctrl_c_ends_the_tests_though_their_shell_ignores_it():
    code = "import conftest, signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    words = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT / "tests", capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.case("N5")
def test_what_the_tests_compile_is_kept_in_a_cache_of_their_own(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    assert all(base in Path(os.environ[name]).parents for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))


def test_the_page_of_cases_is_that_of_the_tests(tmp_path):
    tool = load_tool("cases")
    found = tool.rows(tool.test_files())
    assert tool.PAGE.read_text() == tool.page(found), "run python tools/cases.py"
    names = [row[0] for row in found]
    assert {"F1", "A3", "N1"} <= set(names)
    described = """
@pytest.mark.case("Z9", "x | y", "z")
def test_one():
    pass

@pytest.mark.case("Z9")
def test_two():
    pass
"""
    (tmp_path / "test_it.py").write_text(described)
    assert "| Z9 | x \\| y | z | [test_one](../tests/test_it.py)<br>[test_two](../tests/test_it.py) |" in tool.page(
        tool.rows([tmp_path / "test_it.py"])
    )
    (tmp_path / "test_it.py").write_text(described.replace(', "x | y", "z"', ""))
    with pytest.raises(ValueError, match=r"test_it.py: no marker says what was tried in case Z9"):
        tool.rows([tmp_path / "test_it.py"])


def test_the_quickstart_explains_itself_without_doing_anything():
    done = subprocess.run([ROOT / "tools/quickstart", "--help"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert done.stdout.startswith("From nothing to pictures: tools/quickstart [IMAGES]")
    assert done.stderr == ""


@pytest.mark.case("N2", "tools/quickstart --threads 1", "training, export and samples all take it")
@pytest.mark.parametrize(
    ("given", "expected"), [(["--threads", "1"], "--threads 1"), (["--threads=3"], "--threads=3"), ([], "")]
)
def test_the_quickstart_gives_threads_to_every_step(tmp_path, given, expected):
    """With commands that only note how they are called."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/quickstart", tmp_path / "tools/quickstart")
    (tmp_path / "tools/environment").write_text("say() { :; }\nmake_environment() { :; }\n")
    (tmp_path / "bin").mkdir()
    for name in ("ul-train", "ul-export", "ul-generate"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\necho "$(basename "$0") $*" >>"$CALLS"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    command = [tmp_path / "tools/quickstart", "photos", "--set", "seed=1", *given]
    subprocess.run(command, env=environment, check=True, timeout=20, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["ul-train", "ul-export", "ul-generate"]
    assert all(call.endswith(expected) for call in calls)
    assert all(("--threads" in call) == bool(given) for call in calls)
    assert "--set" not in calls[1] + calls[2]


def test_photographs_become_tiles_and_none_is_on_both_sides_of_the_split(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(9):
        Image.new("RGB", (130, 70), (20 * number,) * 3).save(tmp_path / f"photos/{number}.jpg", quality=100)
    command = [sys.executable, ROOT / "tools/photo_tiles.py", tmp_path / "photos", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.startswith("{'train': 14, 'heldout': 4} tiles in ")
    for split, photos in (("train", "1234567"), ("heldout", "08")):
        assert {path.name.partition("_")[0] for path in tmp_path.glob(f"out/{split}/*.png")} == set(photos)
    with Image.open(tmp_path / "out/train/3_0_64.png") as tile:
        assert tile.size == (64, 64)
        assert tile.getpixel((0, 0)) == (60, 60, 60)


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
