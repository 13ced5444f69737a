"""Training: it learns, it resumes bit for bit, its averages and rates are their formulas, and NaN never gets in."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import CPU, image_set, measured, new_run, same_tensors, splits, stop_at, tiny, train

from ul_runtime.errors import BadInputError, NonFiniteError, StoppedError
from ul_train import checkpoint as ckpt
from ul_train.log import RunLog
from ul_train.objective import step_generator
from ul_train.run import Run
from ul_train.stage import Stage, ema_decay_at
from ul_train.stages import Base, Joint
from ul_train.trainer import Trainer, learning_rate_at

HARD = (  # everything that draws random numbers, and everything that is split
    "image.flip=true",
    "decoder.dropout=0.2",
    "prior.dropout=0.2",
    "base.dropout=0.2",
    "stages.base.label_dropout=0.5",
    "stages.joint.accumulate=2",
    "stages.base.accumulate=4",
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


STEERED = ("objective.target_bits_per_pixel=0.5", "objective.prior_ramp_steps=1")


def losses(run: Path, stage: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line.get("stage") == stage and "loss" in line]
    assert len({line["step"] for line in kept}) == len(kept)
    return {line["step"]: line["loss"] for line in kept}


def trainer(stage: Stage, run: Path) -> Trainer:
    return Trainer(stage, image_set(), run, RunLog(run, 1))


def untrained_joint(*overrides: str) -> Stage:
    return Joint(tiny(*overrides), CPU, "fp32")


def untrained_base(*overrides: str) -> Stage:
    joint = untrained_joint(*overrides)
    return Base(tiny(*overrides), CPU, "fp32", 2, joint.ema)


def state(made: Trainer) -> dict[str, torch.Tensor]:
    weights, ema = ckpt.tensors_of(made.stage.modules), ckpt.tensors_of(made.stage.ema)
    optimizer = ckpt.optimizer_tensors(made.optimizer, list(made.parameters))
    parts = {"weights": weights, "ema": ema, "optimizer": optimizer}
    return {f"{part}.{name}": value.clone() for part, values in parts.items() for name, value in values.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# it learns


@pytest.mark.parametrize("make", [untrained_joint, untrained_base])
def test_one_batch_overfits(tmp_path: Path, make: Callable[..., Stage]) -> None:
    options = ("learning_rate=5e-3", "warmup_steps=0", "final_learning_rate=1.0", "label_dropout=0.0")
    made = trainer(make(*(f"{section}.{o}" for section in ("stages.joint", "stages.base") for o in options)), tmp_path)
    ids = np.arange(8)
    batch = made.stage.batch(made.images, ids, step=0)
    made.stage.batch = lambda *_: batch  # type: ignore[method-assign]
    first = made.train_step()["loss"]
    for _ in range(40):
        last = made.train_step()["loss"]
    assert last < 0.5 * first


# stop and resume


@pytest.mark.parametrize(("stop", "more"), [(2, ()), (4, ()), (3, STEERED)])
@pytest.mark.case(
    "C7",
    "a stop at any step, and a resume",
    "weights, averages and optimizer are those of an unbroken run, bit for bit",
)
def test_a_stopped_and_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path, stop: int, more: tuple[str, ...]
) -> None:
    config = tiny(*HARD, *more)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken, run = new_run(whole, config), new_run(broken, config)
    train(unbroken, "joint", "base")
    run = dataclasses.replace(run, info=dataclasses.replace(run.info, run_id=unbroken.info.run_id))
    for stage in ("joint", "base"):
        with pytest.raises(StoppedError, match=f"step {stop} of 6 of stage {stage}, saved"):
            train(run, stage, tick=stop_at(stop))
        train(run, stage)
    for stage in ("joint", "base"):
        assert losses(broken, stage) == losses(whole, stage)
        assert list(losses(whole, stage)) == [1, 2, 3, 4, 5, 6]
        name = f"checkpoints/{stage}-000006"
        assert same_tensors(whole / name, broken / name)


@pytest.mark.case(
    "F21",
    "a stop in the middle of a window of run.log_every steps, or before or within an evaluation",
    "every line of log.jsonl but its images/s is that of an unbroken run: a checkpoint keeps the sums of the window, "
    "and an evaluation that was cut off is done first",
)
@pytest.mark.case("A5", "the same, after 20 SIGKILLs", "the log is equal too")
@pytest.mark.parametrize("calls", [1, 6, 7, 8, 12, 18])
def test_every_line_of_the_log_is_that_of_an_unbroken_run(tmp_path: Path, calls: int) -> None:
    """Stopped after so many looks at whether to stop: in steps, in evaluations."""
    rhythm = ("run.log_every=5", "run.eval_every=6", "run.checkpoint_every=100", "run.eval_images=2")
    config = tiny(*rhythm, "stages.joint.steps=13", "stages.base.steps=7", *STEERED)
    for name in ("whole", "broken"):
        run = new_run(tmp_path / name, config)
        if name == "broken":
            with pytest.raises(StoppedError):
                train(run, "joint", tick=stop_at(calls))
        train(run, "joint", "base")
    whole, broken = (log_lines(tmp_path / name) for name in ("whole", "broken"))
    assert [(line["stage"], line["step"]) for line in whole if "loss" in line] == [
        ("joint", 5), ("joint", 10), ("joint", 13), ("base", 5), ("base", 7),
    ]  # fmt: skip
    assert broken == whole


def log_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def test_the_comparison_of_runs_sees_another_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(new_run(tmp_path / str(seed), tiny(f"seed={seed}")), "joint")
    a, b = (tmp_path / str(seed) for seed in (0, 1))
    assert losses(a, "joint") != losses(b, "joint")
    assert not same_tensors(a / "checkpoints/joint-000006", b / "checkpoints/joint-000006")


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(new_run(whole, tiny()), "joint")
    run = new_run(killed, tiny())

    def die(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ul_train.train.Evaluation.__call__", die)  # at the last step, before it is saved
        with pytest.raises(MemoryError):
            train(run, "joint")
    assert run.checkpoints("joint")[-1].name == "joint-000003"
    train(run, "joint")
    assert losses(killed, "joint") == losses(whole, "joint")
    assert same_tensors(whole / "checkpoints/joint-000006", killed / "checkpoints/joint-000006")


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_a_clean_log(tmp_path: Path) -> None:
    run = new_run(tmp_path, tiny())
    (tmp_path / "log.jsonl").write_text('{"stage": "joint", "step": 1, "loss": 99}\n{"stage": "joi')
    train(run, "joint")
    assert list(losses(tmp_path, "joint")) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path, "joint")[1] != 99


def test_a_finished_stage_is_left_alone_and_the_log_of_the_next_one_too(tmp_path: Path) -> None:
    run = new_run(tmp_path, tiny())
    train(run, "joint")
    with pytest.raises(StoppedError):
        train(run, "base", tick=stop_at(2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/*/*")}
    assert train(run, "joint") == [False]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/*/*")} == before
    assert list(losses(tmp_path, "base")) == [1, 2]
    assert train(run, "base") == [True]
    assert list(losses(tmp_path, "base")) == [1, 2, 3, 4, 5, 6]


def test_a_stop_during_an_evaluation_saves_the_step_it_was_at(tmp_path: Path) -> None:
    def evaluate(step: int) -> None:
        raise StoppedError("in the middle")

    with pytest.raises(StoppedError, match="step 2 of 6"):
        trainer(untrained_joint("run.eval_every=2"), tmp_path).train(evaluate)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["joint-000002"]


@pytest.mark.case("N13")
def test_a_bundle_says_what_the_held_out_report_measured(tmp_path: Path) -> None:
    run = new_run(tmp_path, tiny())
    train(run, "joint", "base")
    assert run.finished().manifest().quality == {}
    figures = measured(run)
    quality = run.finished().manifest().quality
    assert quality["heldout_bits_per_image"] == figures.bits_per_image
    assert quality.keys() == {"heldout_bits_per_image", "heldout_psnr_db", "heldout_psnr_mean_db"}


def test_the_base_of_another_encoder_is_not_trained_on(tmp_path: Path) -> None:
    train(new_run(tmp_path, tiny()), "joint", "base")
    longer = tiny("stages.joint.steps=8")
    run = Run.open(tmp_path)
    run.check_recipe(longer, ["stages.joint.steps"])
    run = run.adopt(longer)
    train(run, "joint")
    with pytest.raises(BadInputError, match=r"base-000006: learned the latents of another encoder.*remove.*base-\*"):
        train(run, "base")
    with pytest.raises(BadInputError, match="another encoder"):
        Run.open(tmp_path).finished()


def test_a_recipe_changed_with_allow_leaves_the_earlier_stage_usable(tmp_path: Path) -> None:
    train(new_run(tmp_path, tiny()), "joint")
    longer = tiny("stages.base.steps=7")
    run = Run.open(tmp_path)
    run.check_recipe(longer, ["stages.base.steps"])
    run = run.adopt(longer)
    assert run.config == longer
    assert Run.open(tmp_path) == run
    train(run, "base")
    assert Run.open(tmp_path).finished().step == 7


def test_a_run_with_its_recipe_in_the_earlier_form_goes_on_and_its_checkpoints_stay_known(tmp_path: Path) -> None:
    file, config = tmp_path / "config.toml", tiny()
    new_run(tmp_path, config)
    text = file.read_text()
    file.write_text(text.replace("[stages.joint]", "[joint]").replace("[stages.base]", "[base_stage]"))
    run, digest = Run.open(tmp_path), hashlib.sha256(file.read_bytes()).hexdigest()
    assert (run.config, run.manifest().provenance.config_sha256) == (config, digest)
    assert run.adopt(config).info.earlier_recipes == (digest,)
    assert file.read_text() == text


def test_a_recipe_edited_by_hand_is_not_exported(tmp_path: Path) -> None:
    train(new_run(tmp_path, tiny()), "joint", "base")
    Run.open(tmp_path).finished()
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("base_bias = 2.0", "base_bias = 1.0"))
    with pytest.raises(BadInputError, match=r"config.toml: is not the recipe of the checkpoints"):
        Run.open(tmp_path).finished()


# one step


def test_accumulation_over_two_micro_batches_is_nearly_the_whole_batch(tmp_path: Path) -> None:
    whole, halves = (trainer(untrained_joint(f"stages.joint.accumulate={count}"), tmp_path) for count in (1, 2))
    for _ in range(2):
        a, b = whole.train_step(), halves.train_step()
        assert a.keys() == b.keys()
        for name in ("loss", "prior_nats", "decoder_nats", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_a_step_draws_from_seed_stage_and_step_alone(tmp_path: Path) -> None:
    made = trainer(untrained_base("image.flip=true", "stages.base.label_dropout=0.5"), tmp_path)
    ids = np.arange(8)
    first = made.stage.batch(made.images, ids, 3)
    torch.rand(100)
    again, other = made.stage.batch(made.images, ids, 3), made.stage.batch(made.images, ids, 4)
    for name in ("x", "label"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.draws.eps_prior, again.draws.eps_prior)
    assert not torch.equal(first.draws.eps_prior, other.draws.eps_prior)


def test_label_dropout_hides_that_share_of_the_labels(tmp_path: Path) -> None:
    made = trainer(untrained_base("stages.base.label_dropout=0.25"), tmp_path)
    labels = torch.cat([made.stage.batch(made.images, np.arange(40), step).label for step in range(50)])
    assert (labels == 2).float().mean() == pytest.approx(0.25, abs=0.03)
    assert set(labels.tolist()) == {0, 1, 2}


def test_dropout_is_not_a_function_of_the_noise(tmp_path: Path) -> None:
    made = trainer(untrained_joint(), tmp_path)
    torch.manual_seed(made._dropout_seed())
    kept = torch.rand(1000)
    noise = torch.rand(1000, generator=step_generator(made.stage.config.seed, Joint.number, made.step))
    assert abs(torch.corrcoef(torch.stack([kept, noise]))[0, 1]) < 0.15


def test_the_averages_equal_their_closed_form(tmp_path: Path) -> None:
    made = trainer(untrained_joint("stages.joint.ema_decay=0.5"), tmp_path)
    name = next(iter(made.parameters))
    history = [made.parameters[name].detach().double().clone()]
    for made.step in range(6):
        made.train_step()
        history.append(made.parameters[name].detach().double().clone())
    decays = [ema_decay_at(step, 0.5) for step in range(6)]
    assert decays == [0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]
    weights = [math.prod(decays)] + [(1 - decays[k]) * math.prod(decays[k + 1 :]) for k in range(6)]
    expected = sum(weight * value for weight, value in zip(weights, history, strict=True))
    average = ckpt.tensors_of(made.stage.ema)[name]
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(average.double(), history[-1], rtol=1e-6, atol=1e-8)


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    settings = tiny(
        *("stages.joint.steps=100", "stages.joint.warmup_steps=10"),
        *("stages.joint.learning_rate=2e-3", "stages.joint.final_learning_rate=0.1"),
    ).stages.joint
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(101)]
    rates = [learning_rate_at(step, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([2e-3 * (step + 1) / 10 * cosine[step] for step in range(10)])
    assert rates[10:] == pytest.approx([2e-3 * value for value in cosine[10:]])
    assert rates[100] == pytest.approx(2e-4)
    assert learning_rate_at(0, tiny("stages.joint.warmup_steps=0").stages.joint) == 1e-3


def test_the_optimiser_gets_the_rate_of_its_step(tmp_path: Path) -> None:
    made = trainer(untrained_joint(), tmp_path)
    for made.step in range(3):
        assert made.train_step()["learning_rate"] == learning_rate_at(made.step, made.stage.settings)
        assert made.optimizer.param_groups[0]["lr"] == learning_rate_at(made.step, made.stage.settings)


# not finite


def poison_loss(made: Trainer, steps: set[int], value: float) -> None:
    loss = made.stage.loss

    def poisoned(batch: Any, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, figures = loss(batch, step)
        return (total * value if step in steps else total), figures

    made.stage.loss = poisoned  # type: ignore[method-assign]


def poison_gradient(made: Trainer, steps: set[int], value: float) -> None:
    parameter = list(made.parameters.values())[3]
    parameter.register_hook(lambda gradient: gradient * value if made.step in steps else gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
@pytest.mark.parametrize("make", [untrained_joint, untrained_base])
def test_a_value_that_is_not_finite_reaches_nothing_and_is_counted(
    tmp_path: Path, make: Callable[..., Stage], poison: Callable[..., None], value: float
) -> None:
    made = trainer(make(), tmp_path)
    poison(made, {1, 2}, value)
    made.train_step()
    before = state(made)
    for made.step in (1, 2):
        made.train_step()
        assert equal(state(made), before)
    assert made.counters == {"skipped": 2, "skipped_in_a_row": 2}
    made.step = 3
    made.train_step()
    assert not equal(state(made), before)
    assert made.counters == {"skipped": 2, "skipped_in_a_row": 0}
    assert all(torch.isfinite(value).all() for value in state(made).values())


def test_without_the_guard_the_same_value_would_reach_the_weights(tmp_path: Path, monkeypatch: Any) -> None:
    made = trainer(untrained_joint(), tmp_path)
    poison_gradient(made, {0}, math.nan)
    monkeypatch.setattr("ul_train.trainer.math.isfinite", lambda value: True)
    made.train_step()
    assert not all(torch.isfinite(value).all() for value in state(made).values())


def test_three_bad_steps_in_a_row_end_the_run_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    made = trainer(untrained_joint(), tmp_path)
    poison_loss(made, {1, 3, 4, 5}, math.nan)
    with pytest.raises(NonFiniteError, match=r"stage joint, step 5: loss nan.*3 steps in a row.*weights unchanged"):
        made.train()
    assert made.counters["skipped"] == 4
    (kept,) = ckpt.list_checkpoints(tmp_path / "checkpoints", "joint")
    assert kept.name == "joint-000003"
    again = trainer(untrained_joint(), tmp_path)
    again.restore(kept)
    assert equal(state(again), state(made))
    assert again.counters == {"skipped": 1, "skipped_in_a_row": 0}


def test_the_log_stays_json_and_its_means_leave_out_what_was_not_finite(tmp_path: Path) -> None:
    made = trainer(untrained_joint("run.log_every=2", "stages.joint.steps=4"), tmp_path)
    made.log.log_every = 2
    poison_loss(made, {1, 2, 3}, math.nan)
    with pytest.raises(NonFiniteError):
        made.train()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["warning"].startswith("stage joint, step 1: loss nan")
    assert math.isfinite(lines[1]["loss"])


# the latent


def test_the_death_of_the_latent_is_watched_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = [f"stages.joint.{each}" for each in ("learning_rate=2e-2", "warmup_steps=0", "steps=150")]
    run = new_run(
        tmp_path, tiny("objective.loss_factor=1e-6", "objective.prior_ramp_steps=0", "run.eval_every=150", *settings)
    )
    train(run, "joint")
    assert "warning: the latent has died" in caplog.text
    caplog.clear()
    assert measured(run).latent_died
    assert "warning: the latent has died" in caplog.text
    assert json.loads((tmp_path / "report.json").read_text())["latent_died"] is True


def test_a_living_latent_is_not_said_to_have_died(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path, tiny("run.eval_every=5"))
    train(run, "joint")
    assert "latent_died" not in measured(run).as_dict()
    assert "died" not in caplog.text


def test_splits_hold_both_classes() -> None:
    assert set(splits().train.labels.tolist()) == {0, 1}


def test_a_target_for_the_bits_changes_loss_factor_and_nothing_before_it_is_steered(tmp_path: Path) -> None:
    for name, options in (("plain", ("objective.prior_ramp_steps=1",)), ("steered", STEERED)):
        train(new_run(tmp_path / name, tiny(*options)), "joint")
    plain, steered = losses(tmp_path / "plain", "joint"), losses(tmp_path / "steered", "joint")
    assert [plain[step] == steered[step] for step in (1, 2, 3)] == [True, True, False]
