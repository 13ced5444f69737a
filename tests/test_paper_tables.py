"""tools/paper_tables.py: its rows are recipes, equal runs are one run, and a table is trained, measured and drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from tool_module import TOOLS, load_tool

from ul_runtime.errors import UsageError
from ul_train.account import stages_on_meta, training
from ul_train.config import load_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_tool("paper_tables")


def test_every_row_is_a_recipe_and_costs_what_its_table_mates_cost(tables):
    for name, table in tables.TABLES.items():
        configs = [load_config("quickstart", [*tables.BUDGET["quickstart"], *row.changes]) for row in table.rows]
        flops = [training(stages_on_meta(config, 10)[0])["flops_of_stage"] for config in configs]
        assert max(flops) < 1.02 * min(flops), name
        assert len({config.model_dump_json() for config in configs}) == len(configs)


def test_a_row_without_effect_is_the_run_that_other_tables_call_ul(tables):
    first, second = tables.TABLES["loss-factor"].rows[:2]
    assert tables.run_name(second, 1, "quickstart", []) == "ul_seed-1"
    assert tables.run_name(first, 0, "quickstart", []) == "loss_factor-1.5_seed-0"
    assert tables.run_name(second, 0, "color-64", []) == "loss_factor-2_seed-0"
    assert tables.run_name(tables.TABLES["ablations"].rows[0], 1, "quickstart", []) == "ul_seed-1"


def test_values_are_of_the_tables_one_field_or_begin_the_names_of_rows(tables):
    assert [row.changes for row in tables.chosen_rows("channels", "2,8")] == [
        ("latent_channels=2",),
        ("latent_channels=8",),
    ]
    assert [row.label[:2] for row in tables.chosen_rows("ablations", "B,UL")] == ["UL", "B:"]
    for name, values, message in (
        ("ablations", "A,2", "no row begins with '2'; ablations has: UL; A: no gradient"),
        ("channels", "2,x", "expected numbers between commas"),
        ("loss", None, "TABLE loss: expected one of loss-factor, channels"),
    ):
        with pytest.raises(UsageError, match=message):
            tables.chosen_rows(name, values)


def test_a_row_at_another_rows_rate_is_steered_to_what_was_measured_at_its_seed(tables):
    row = tables.TABLES["prior-and-reconstruction"].rows[1]
    figures = [{"row": "UL", "seed": seed, "bits_per_pixel": rate} for seed, rate in ((0, 0.11111), (1, 0.22222))]
    assert tables.steered(row, 1, figures) == [*row.changes, "objective.target_bits_per_pixel=0.222"]
    assert tables.steered(tables.Row("UL"), 1, figures) == []


def test_seeds_of_a_row_are_averaged_and_their_spread_is_said(tables):
    runs = [dict.fromkeys(tables.COLUMNS, value) | {"row": "UL", "seed": seed} for seed, value in ((0, 1.0), (1, 2.0))]
    (row,) = tables.averaged({"figures": runs})
    assert tables.cell(row, "gfd") == "1.5 ± 0.7"
    (alone,) = tables.averaged({"figures": runs[:1]})
    assert tables.cell(alone, "gfd") == "1.0"


@pytest.mark.slow
def test_a_table_is_trained_measured_and_drawn_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("sklearn")
    steps = [word for stage in ("joint", "base") for word in ("--set", f"stages.{stage}.steps=2")]
    sizes = ["--images", "20", "--eval-seeds", "1", "--mean-of", "1", "--values", "1.5", "--threads", "1"]
    asked = ["--eval-option=--features=pixels", "--eval-option=--bits-samples=1"]
    folders = [part for name in ("runs", "out", "cache") for part in (f"--{name}", str(tmp_path / name))]
    words = ["loss-factor", "--recipe", "tiny", "--data", "sklearn-digits", *steps, *sizes, *asked, *folders]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run() -> subprocess.CompletedProcess[str]:
        program = [sys.executable, TOOLS / "paper_tables.py", *words]
        return subprocess.run(program, env=settings, capture_output=True, text=True, timeout=300, check=True)

    first, second = run(), run()
    assert first.stdout == second.stdout == (tmp_path / "out" / "loss-factor.md").read_text()
    assert {"ul-export", "ul-eval"} <= set(first.stderr.split())
    assert not {"ul-export", "ul-eval"} & set(second.stderr.split()), "exported and evaluated before"
    (row,) = json.loads((tmp_path / "out" / "loss-factor.json").read_text())["figures"]
    assert (row["row"], row["seed"], row["count"], row["num_images"]) == ("1.5", 0, 20, 20)
    assert row["gfd"] > row["gfd_real"], "two steps of training make no pictures"
    joint = stages_on_meta(load_config("tiny", steps[1::2]), 10)[0]
    assert row["flops"]["joint"] == training(joint)["flops_of_stage"]
    assert str(tmp_path) not in (tmp_path / "out" / "loss-factor.json").read_text()
    with Image.open(tmp_path / "out" / "loss-factor.png") as picture:
        picture.load()
