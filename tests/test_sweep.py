"""ul-train sweep: every loss factor is trained and measured once, and the results name no folder of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ul_runtime.errors import StoppedError, UsageError
from ul_runtime.machine import anonymous, versions
from ul_train.cli import main
from ul_train.sweep import parse_factors, run_to_end

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("text", ["", "a", "1.5,", "0", "-1", "inf", "nan", "2,2.0"])
def test_loss_factors_that_cannot_be_are_refused(text):
    with pytest.raises(UsageError, match="--loss-factors"):
        parse_factors(text)


def test_a_recorded_command_has_no_folder_of_this_machine():
    words = ["tiny", "--data", "/home/some one/images", "--out", "tools/results/a"]
    assert anonymous("ul-train sweep", words) == "ul-train sweep tiny --data images --out tools/results/a"
    assert anonymous("x", ["/a/b c"]) == "x 'b c'"
    assert anonymous("x", ["--eval-option=--classifier=/a/b", "--set", "a=1/2"]) == (
        "x --eval-option=--classifier=b --set a=1/2"
    )


def test_versions_are_of_what_is_installed():
    found = versions(["numpy", "no-such-package"])
    assert list(found) == ["python", "numpy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--data is missing; see ul-train sweep --help"),
        (("--data", "x"), "--out is missing"),
        (("--data", "x", "--out", "y", "--loss-factors", "2,a"), "--loss-factors 2,a: expected numbers between commas"),
        (("--data", "x", "--out", "y", "--set", "stages.joint.stepz=1"), "there is no key stages.joint.stepz"),
        (("--data", "x", "--out", "y", "--set", "objective.loss_factor=3"), "a sweep sets it for each run; give"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(words, message, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = command(main, "sweep", "tiny", *words)
    assert result.code == 2
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_measures_every_value_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("sklearn")
    main_program = (sys.executable, "-c", "from ul_train.cli import main; main()")

    def run(factors: str) -> subprocess.CompletedProcess[str]:
        words = ["tiny", "--data", "sklearn-digits", "--set", "stages.joint.steps=2", "--images", "8", "--mean-of", "2"]
        folders = [part for name in ("out", "cache") for part in (f"--{name}", str(tmp_path / name))]
        settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [*main_program, "sweep", *words, *folders, "--loss-factors", factors, "--threads", "1"]
        return subprocess.run(arguments, env=settings, capture_output=True, text=True, timeout=300, check=True)

    run("3")
    second = run("1.5,3")
    assert "stage joint is finished at step 2" in second.stderr
    assert second.stderr.count("ul-train report") == 1, "the other had been measured"
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["loss_factor"] for row in record["figures"]] == [1.5, 3.0]
    assert all(row["num_images"] == 8 and row["mean_of"] == 2 for row in record["figures"])
    assert record["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(record)
    assert second.stdout == (tmp_path / "out" / "table.md").read_text()
    assert second.stdout.count("\n| ") == 2
    with Image.open(tmp_path / "out" / "plot.png") as picture:
        picture.load()


def test_a_command_in_its_own_process_hands_over_what_it_says_and_how_it_ends():
    def program(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    assert run_to_end(program("print('said')")) == "said\n"
    with pytest.raises(SystemExit) as ended:
        run_to_end(program("raise SystemExit(65)"))
    assert ended.value.code == 65
    with pytest.raises(StoppedError, match="run the same command again to go on"):
        run_to_end(program("raise SystemExit(75)"))


def test_a_signal_lets_the_command_save_what_it_has(tmp_path):
    """As a terminal does: Ctrl-C reaches both processes; the inner one takes half a second to save."""
    saved = tmp_path / "saved"
    slow = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"  # our commands take it for the signal that they have had
        f"def save(*_): time.sleep(0.5); open({str(saved)!r}, 'w').close(); os._exit(75)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "for process in (os.getppid(), os.getpid()): os.kill(process, signal.SIGINT)\n"
        "time.sleep(20)"
    )
    with pytest.raises(StoppedError):
        run_to_end([sys.executable, "-c", slow])
    assert saved.exists()
