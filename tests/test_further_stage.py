"""A further stage of training is a class in stages.py and a section in config.py: no other file is touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import SHORT, write_npz

ROOT = Path(__file__).parent.parent
SECTION = "    base: StageConfig\n"
STAGES = "(Joint, Decoder, Base)  # in the order of training"
TOY = '''
class Toy(Stage):
    """A copy of the base, on the latents of a run whose base is finished."""

    name, number, needs = "toy", 3, Base.name
    places = {"copy": "prior"}
    conditional = True

    @staticmethod
    def networks(config, num_classes):
        return {"copy": make_base(config, num_classes)}

    def loss(self, batch, step):
        with torch.no_grad():
            z, _ = self.encode(self.frozen["encoder"], batch)
            wanted = self.frozen["prior"](z, batch.draws.t_z, batch.label)
        nats = (self.compute["copy"](z, batch.draws.t_z, batch.label) - wanted).square().flatten(1).sum(1)
        return nats.mean(), {"toy_nats": nats.mean()}

    def preview(self, pipeline, heldout, step, log, tick=silent):
        return sample_sheet(pipeline, "toy", tick)


'''
TOY_STEPS = ["--set", "stages.toy.steps=4", "--set", "stages.toy.batch_size=4"]


def once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ul_train with a further stage, which a recipe may be without."""
    folder = tmp_path_factory.mktemp("packages")
    package = Path(shutil.copytree(ROOT / "ul_train", folder / "ul_train"))
    config, stages = package / "config.py", package / "stages.py"
    config.write_text(once(config.read_text(), SECTION, f"{SECTION}    toy: StageConfig | None = None\n"))
    text = once(stages.read_text(), "STAGES: tuple[", f"{TOY}STAGES: tuple[")
    stages.write_text(once(text, STAGES, STAGES.replace("Base)", "Base, Toy)")))
    return folder


def ul_train(packages: Path, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from ul_train.cli import main; main()", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "UL_CACHE": str(packages / "cache")}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=packages)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_a_further_stage_is_trained_checkpointed_and_resumed(packages: Path, tmp_path: Path) -> None:
    write_npz(tmp_path / "blobs.npz")
    data, run, whole = ["--data", tmp_path / "blobs.npz", "--threads", 1], tmp_path / "run", tmp_path / "whole"
    recipe = ["tiny", *data, *SHORT]
    toy = [*recipe, *TOY_STEPS]
    refused = ul_train(packages, *recipe, "--out", run, "--stage", "toy", code=2)
    assert "--stage toy: expected joint, base or all" in refused.stderr, "the recipe has no such stage"
    refused = ul_train(packages, *toy, "--out", run, "--stage", "toy", code=2)
    assert "stage toy needs a finished stage base: train that first" in refused.stderr
    result = json.loads(ul_train(packages, *toy, "--out", run, "--json").stdout)
    assert (result["base"], result["toy"]) == ("base-000004", "toy-000004")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {f"{stage}-00000{step}" for stage in ("joint", "base", "toy") for step in (2, 4)}
    assert (run / "previews" / "toy-000004.png").is_file()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "toy_nats" in line] == [1, 2, 3, 4]

    shutil.copytree(run, whole)
    shutil.rmtree(run / "checkpoints" / "toy-000004")
    again = ul_train(packages, *toy, "--out", run, "--resume", "--stage", "toy")
    assert "stage toy goes on from toy-000002" in again.stderr
    weights = [(each / "checkpoints" / "toy-000004" / "weights.safetensors").read_bytes() for each in (run, whole)]
    assert weights[0] == weights[1]
    earlier = (whole / "checkpoints" / "toy-000002" / "weights.safetensors").read_bytes()
    assert weights[0] != earlier

    account = json.loads(ul_train(packages, *toy, "--dry-run", "--json").stdout)["account"]
    assert account["networks"]["copy"] == account["networks"]["base"]
    assert account["toy"]["frozen_bytes"] > account["base"]["frozen_bytes"]
    sample = "from ul_train.run import Run; from pathlib import Path; print(Run.open(Path({!r})).finished().stage)"
    environment = os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"}
    program = [sys.executable, "-c", sample.format(str(run))]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment, cwd=packages)
    assert done.stdout == "toy\n"


def test_a_stage_without_its_section_is_refused(packages: Path, tmp_path: Path) -> None:
    shutil.copytree(packages / "ul_train", tmp_path / "ul_train")
    shutil.copyfile(ROOT / "ul_train" / "config.py", tmp_path / "ul_train" / "config.py")
    done = ul_train(tmp_path, "tiny", code=70)
    assert (
        "stages ['joint', 'decoder', 'base', 'toy'] are not those of StagesConfig, ['joint', 'decoder', 'base']"
        in done.stderr
    )
