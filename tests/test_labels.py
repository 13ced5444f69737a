"""Labels: class names, numbers by '#3', no label; the same rule for --label, Python and --replay."""

import json

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from PIL import Image

import ul_runtime
from ul_runtime.cli.generate import main
from ul_runtime.errors import UsageError
from ul_runtime.settings import label_cycle, no_label

NUMBERS = ("1", "2", "3", "10")
FAST = ("--steps", 2, "--decoder-steps", 2, "--threads", 1, "--backend", "ort-cpu")


@pytest.mark.case(
    "F17",
    "classes called 1, 2, 3, 10, and labels that are numbers or nearly so",
    "a class name comes first, a number is written #3, and anything else is refused with the nearest name",
)
@pytest.mark.parametrize(
    ("classes", "label", "expected"),
    [
        (NUMBERS, "1", 0),
        (NUMBERS, "10", 3),
        (NUMBERS, "#1", 1),
        (NUMBERS, "#0", 0),
        (NUMBERS, "none", 4),
        (NUMBERS, "#none", 4),
        (("#1", "b"), "#1", 0),
        (("a", "\u00e9"), "e\u0301", 1),
        (("\u00e9", "e\u0301"), "e\u0301", 1),
        (("a", "none"), "none", 1),
        (("a", "none"), "#none", 2),
        (("#none", "none"), "#none", 0),
        (("#none", "none"), "##none", 2),
        ((), "none", 0),
    ],
)
def test_a_name_comes_before_a_number_and_before_no_label(classes, label, expected):
    assert label_cycle(label, classes) == (expected,)


@pytest.mark.case("F17")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0", "'0' is not a class of the bundle; '#0' is class number 0, '1'"),
        (["1", "01"], "'#1' is class number 1, '2'"),
        ("7", "the classes are 1, 2, 3, 10"),
        (" 2", "did you mean '2'"),
        ("1.0", "is not a class"),
        ("#01", "is not a class"),
        ("#-1", "is not a class"),
        ("#4", "'#4' is out of range; expected '#0' to '#3'"),
        ("#99999999999", "is not a class"),
        ("None", "is not a class"),
        (1, "label 1: is no text"),
        ([1], "label 1: is no text; expected a class name, '#3' for class number 3, or 'none'"),
        (1.5, "label 1.5: is no text"),
        ([True], "label True: is no text"),
        ([None], "label None: is no text"),
        (np.array([2]), "is no text"),
        ([], "is empty"),
    ],
)
def test_what_is_no_label_is_refused_and_nothing_is_cut_off(labels, message):
    with pytest.raises(UsageError) as error:
        label_cycle(labels, NUMBERS)
    assert message in str(error.value)


def test_no_label_is_written_so_that_it_is_no_class():
    assert [no_label(classes) for classes in ((), ("a",), ("none",), ("none", "#none"))] == [
        "none", "none", "#none", "##none",
    ]  # fmt: skip


@pytest.mark.case("F17")
@pytest.mark.parametrize(("label", "number"), [("none", 1), ("#none", 3), ("#1", 1), ("red", 0)])
def test_a_class_called_none_and_no_label_are_both_made_and_made_again(command, tmp_path, label, number):
    bundle = write_analytic_bundle(tmp_path / "bundle", classes=("red", "none", "blue")).path
    made = command(main, bundle, "--out", tmp_path / "out", "-n", 1, "--label", label, *FAST)
    assert made.code == 0, made
    with Image.open(tmp_path / "out/000000.png") as image:
        stored = json.loads(next(iter(image.text.values())))["label"]
    assert stored == ("red", "none", "blue", "#none")[number]
    (batch,) = ul_runtime.load(bundle, threads=1).generate(1, labels=label, steps=2, decoder_steps=2)
    assert batch.labels.tolist() == [number]
    again = command(main, bundle, "--replay", tmp_path / "out/000000.png", "--threads", 1)
    assert (again.code, again.err) == (0, ""), again
    assert "byte for byte" in again.out
