"""Stage decoder trains the decoder alone, on the frozen latents of stage joint; ul-train --init begins after it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Runner
from exported_run import PLAIN, exported_run
from random_run import DIGITS, write_run
from tiny_run import CPU, measured, new_run, splits, tiny, train, write_npz
from torch import nn

from ul_export.cli import main as export
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError
from ul_train import checkpoint as ckpt
from ul_train.cli import main
from ul_train.config import load_config
from ul_train.fine_tune import networks_of, put_weights
from ul_train.run import Run
from ul_train.stages import Base, Decoder, Joint

STAGE = ("stages.decoder.steps=6", "stages.decoder.batch_size=8")
OF_STAGE = [word for change in STAGE for word in ("--set", change)]


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, its) for (name, value), (other, its) in pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of three stages; read only."""
    made = new_run(tmp_path_factory.mktemp("three") / "run", tiny(*STAGE))
    train(made, "all")
    return made


def test_the_decoder_alone_learns_and_begins_as_stage_joint_ends(run):
    joint, decoder, base = (run.after(stage).networks for stage in (Joint, Decoder, Base))
    stage = run.stage(Decoder, CPU, "fp32")
    assert list(stage.modules) == ["decoder"]
    assert same(stage.modules["decoder"], joint["decoder"])
    assert same(stage.ema["decoder"], joint["decoder"])
    assert not same(decoder["decoder"], joint["decoder"])
    for name in ("encoder", "prior"):
        assert same(decoder[name], joint[name]), name
    assert same(base["encoder"], joint["encoder"])
    assert same(base["decoder"], decoder["decoder"]), "what samples are made by"
    assert not any(parameter.requires_grad for parameter in stage.frozen["encoder"].parameters())


def test_its_loss_is_the_decoders_of_stage_joint(run):
    stage, joint = run.stage(Decoder, CPU, "fp32"), run.stage(Joint, CPU, "fp32")
    frozen = run.after(Joint).networks
    joint.compute = {"encoder": frozen["encoder"], "prior": frozen["prior"], "decoder": frozen["decoder"]}
    batch = stage.batch(splits().train, torch.arange(8).numpy(), 0)
    loss, figures = stage.loss(batch, 0)
    torch.testing.assert_close(figures["decoder_nats"], joint.loss(batch, 10)[1]["decoder_nats"])
    assert loss.item() == pytest.approx(figures["decoder_nats"].item() / batch.x[0].numel())
    loss.backward()
    assert all(parameter.grad is not None for parameter in stage.modules["decoder"].parameters())


def test_the_report_is_of_the_newest_decoder_and_the_bits_stay(run):
    figures = measured(run)
    assert '"measured": "decoder-000006"' in (run.path / "report.json").read_text()
    of_joint = Run(run.path, tiny(), run.info, run.recipe_sha256)  # the recipe without the stage
    before = measured(of_joint)
    assert '"measured": "joint-000006"' in (run.path / "report.json").read_text()
    assert figures.bits_per_image == before.bits_per_image
    assert figures.psnr_db != before.psnr_db


def test_a_run_whose_base_is_finished_can_be_given_the_stage(tmp_path):
    """The base learned the encoder's latents, which the stage leaves alone."""
    earlier = new_run(tmp_path, tiny())
    train(earlier, "joint", "base")
    before = earlier.finished()
    assert list(before.networks) == ["encoder", "prior", "decoder"]
    config = tiny(*STAGE)
    later = earlier.adopt(config)
    assert same(later.finished().networks["decoder"], before.networks["decoder"]), "not begun"
    assert train(later, "decoder") == [True]
    assert train(later, "base") == [False]
    after = later.finished()
    assert (after.stage, after.step) == ("base", 6)
    assert same(after.networks["prior"], before.networks["prior"])
    assert not same(after.networks["decoder"], before.networks["decoder"])


def test_a_decoder_of_other_latents_is_refused(run, tmp_path):
    other = new_run(tmp_path, tiny(*STAGE, "seed=1"))
    train(other, "joint")
    (run.path / "checkpoints" / "decoder-000006").rename(tmp_path / "checkpoints" / "decoder-000006")
    try:
        with pytest.raises(BadInputError, match="was trained on the latents of another encoder than joint-000006"):
            other.after(Decoder)
    finally:
        (tmp_path / "checkpoints" / "decoder-000006").rename(run.path / "checkpoints" / "decoder-000006")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported_run(PLAIN, tmp_path_factory)


def test_a_bundle_gives_its_networks_back(exported):
    wanted = Run.open(exported.run).finished().networks
    given = networks_of(str(exported.bundle), load_config("tiny", []), DIGITS)
    for name, network in wanted.items():
        assert same(given[name], network), name


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        (["latent_channels=3"], DIGITS, "its latent is channels=3"),
        (["base.blocks=[1,1]"], DIGITS, "its base is"),
        ([], ("disc", "bar"), "its classes is"),
    ],
)
def test_a_recipe_of_other_networks_or_classes_is_refused(exported, changes, names, message):
    with pytest.raises(BadInputError, match=message):
        networks_of(str(exported.bundle), load_config("tiny", changes), names)


def test_a_weight_that_the_bundle_lacks_is_named():
    with pytest.raises(BadInputError, match=r"here: has no weight bias of this shape"):
        put_weights(nn.Linear(2, 2), {"weight.T": torch.eye(2).numpy()}, "here")


def test_a_run_begins_with_a_bundle_and_leaves_its_encoder_alone(
    command: Runner, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    networks = write_run(tmp_path / "old", classes=("disc", "bar"))
    assert command(export, tmp_path / "old", "--out", tmp_path / "bundle", "--threads", 1).code == 0
    data = ["--data", write_npz(tmp_path / "blobs.npz"), "--cache", tmp_path / "cache", "--threads", 1]
    words = ["tiny", *data, "--out", tmp_path / "new", "--init", tmp_path / "bundle", *OF_STAGE]
    result = command(main, *words, "--report-images", 2, "--set", "stages.base.learning_rate=1e-9")
    assert result.code == 0, result.err
    run = Run.open(tmp_path / "new")
    assert run.config.init == Bundle.open(tmp_path / "bundle").hash
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == ["base-000010", "base-000020", "decoder-000006", "init-000000"]
    found = run.finished().networks
    assert same(found["encoder"], networks["encoder"])
    assert not same(found["decoder"], networks["decoder"])
    for given, expected in zip(found["prior"].parameters(), networks["base"].parameters(), strict=True):
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    assert run.finished().manifest().recipe["init"] == run.config.init
    again = command(main, run.path, "--resume", "--threads", 1)
    assert again.code == 0, again.err
    assert "stage base is finished" in again.err
    shutil.rmtree(run.path / "checkpoints" / "base-000010")
    shutil.rmtree(run.path / "checkpoints" / "base-000020")
    decoder_alone = run.finished()
    assert (decoder_alone.stage, decoder_alone.step) == ("decoder", 6)
    assert same(decoder_alone.networks["prior"], networks["base"]), "of the bundle"
    assert decoder_alone.manifest().classes == ("disc", "bar")
    fresh = load_config("tiny", list(STAGE))
    assert not same(found["prior"], Base.networks(fresh, 2)["base"])
    command.fails(main, 2, "--init: is for a new run", run.path, "--resume", "--init", tmp_path / "bundle")
    command.fails(main, 2, "give it with --init", run.path / "config.toml", *data, "--out", tmp_path / "third")
    command.fails(main, 2, "expected decoder, base or all", *words[:-4], *OF_STAGE, "--stage", "joint")
    saved = ckpt.load_checkpoint(run.path / "checkpoints" / "init-000000")
    assert {name.partition(".")[0] for name in saved.ema} == {"encoder", "prior", "decoder"}
