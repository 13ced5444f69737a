"""A guide as a user makes one: the base of a copy of a run trained anew, smaller, and both exported."""

import json
import shutil
from pathlib import Path

import pytest
from command import Runner

from ul_export.cli import main as export
from ul_runtime.bundle import Bundle
from ul_runtime.cli.generate import main as generate
from ul_train.cli import main as train

pytestmark = pytest.mark.slow


def test_a_smaller_base_on_a_copy_of_a_run_makes_a_guide(
    command: Runner, finished: Path, image_store: Path, tmp_path: Path
) -> None:
    lesser = Path(shutil.copytree(finished, tmp_path / "lesser"))
    for checkpoint in (lesser / "checkpoints").glob("base-*"):
        shutil.rmtree(checkpoint)
    smaller = (
        "--set",
        "base.widths=[16]",
        "--set",
        "base.blocks=[1]",
        "--allow",
        "base.widths",
        "--allow",
        "base.blocks",
    )
    options = ("--resume", "--stage", "base", "--cache", image_store / "cache", "--report-images", 2)
    result = command(train, lesser, *options, *smaller)
    assert result.code == 0, result
    for run in (finished, lesser):
        result = command(export, run, "--out", tmp_path / f"{run.name}.bundle", "--threads", 1)
        assert result.code == 0, result
    bundle, guide = (tmp_path / f"{name}.bundle" for name in (finished.name, "lesser"))
    manifests = [Bundle.open(path).manifest for path in (bundle, guide)]
    sizes = [manifest.files["prior.safetensors"].size for manifest in manifests]
    assert sizes[1] < sizes[0] / 2
    assert manifests[0].provenance.encoder_sha256 == manifests[1].provenance.encoder_sha256
    arguments = (
        "--guide",
        guide,
        "--guidance",
        2,
        "--num-images",
        2,
        "--threads",
        1,
        "--json",
        "--out",
        tmp_path / "out",
    )
    result = command(generate, bundle, *arguments)
    assert result.code == 0, result
    assert json.loads(result.out)["guide"] == Bundle.open(guide).hash
