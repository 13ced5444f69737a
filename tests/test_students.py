"""Students: what they learn, that training goes on exactly, that bundles hold them, and that settings choose them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Runner
from random_run import write_run
from tiny_run import CPU, new_run, splits, tiny, train, write_npz

import ul_runtime
from ul_export.cli import main as export
from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.cli.generate import main as generate
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.manifest import BundleInfo, Preset
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import silent
from ul_runtime.samplers import ddim
from ul_train.cli import main
from ul_train.config import Config, load_config
from ul_train.run import Run
from ul_train.stages import Base, Joint, students_of
from ul_train.students import Moments, clean_value_between, teacher_nodes
from ul_train.trajectories import trajectories_of

SHORT = ["steps=4", "batch_size=8", "examples=24"]


def student(name: str, *changes: str) -> list[str]:
    return [f"students.{name}.{change}" for change in (*SHORT, *changes)]


EXACT = ["sampling.guidance=1", "sampling.grid=mix"]


def finished_run(path: Path, *changes: str) -> Run:
    run = new_run(path, tiny(*changes))
    train(run, "joint", "base")
    return run


def first_loss(run: Run, name: str) -> float:
    """Of a student before its first step, which is then its teacher."""
    (kind,) = (kind for kind in students_of(run.config) if kind.name == name)
    stage = run.stage(kind, CPU, "fp32")
    images = trajectories_of(stage, run, splits().train, silent)
    assert len(images) >= 24
    loss, _ = stage.loss(stage.batch(images, np.arange(24), 0), 0)
    return loss.item()


def test_the_clean_value_between_two_states_is_that_of_a_ddim_step() -> None:
    nodes = np.array([-3.0, 1.0])
    ((a, b_0, *_),) = ddim(nodes, 0)
    z_s, pred = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    s, t = (torch.full((2, 1, 1, 1), level, dtype=torch.float64) for level in nodes)
    torch.testing.assert_close(clean_value_between(z_s, a * z_s + b_0 * pred, s, t), pred)


def test_the_nodes_of_a_student_are_every_second_one_of_a_teacher_of_twice_as_many_steps() -> None:
    config = tiny(*student("prior-4"), *student("prior-8"))
    np.testing.assert_allclose(teacher_nodes(config, "prior-4"), teacher_nodes(config, "prior-8")[::2], atol=1e-9)


@pytest.mark.parametrize(("teacher_steps", "exact"), [(2, True), (4, False)])
def test_a_teacher_of_as_many_steps_is_its_own_student(teacher_steps: int, exact: bool, tmp_path: Path) -> None:
    """The control: of twice as many steps it is not."""
    run = finished_run(tmp_path, *EXACT, *student("prior-2", "sampler=ddim", f"teacher_steps={teacher_steps}"))
    loss = first_loss(run, "prior-2")
    assert loss < 1e-10 if exact else loss > 1e-6, loss


@pytest.mark.parametrize(("teacher_steps", "exact"), [(1, True), (4, False)])
def test_a_teacher_of_one_call_is_its_own_student(teacher_steps: int, exact: bool, tmp_path: Path) -> None:
    run = finished_run(tmp_path, *EXACT, *student("decoder-1", "sampler=ddim", f"teacher_steps={teacher_steps}"))
    loss = first_loss(run, "decoder-1")
    assert loss < 1e-6 if exact else loss > 1e-4, loss  # images are kept in float16


def test_moments_that_match_move_nothing_and_others_do(tmp_path: Path) -> None:
    run = finished_run(tmp_path, *EXACT, *student("prior-4", "method=moments"))
    (kind,) = students_of(run.config)
    assert issubclass(kind, Moments)
    stage = run.stage(kind, CPU, "fp32")
    batch = stage.batch(splits().train, np.arange(8), 1)
    assert stage.loss(batch, 1)[0].item() == 0.0, "auxiliary network and teacher are equal"
    with torch.no_grad():
        next(stage.modules["auxiliary"].parameters()).add_(0.1)
    loss, figures = stage.loss(batch, 1)
    loss.backward()
    assert figures["moments"] > 0
    trained = {name for name, module in stage.modules.items() if any(p.grad is not None for p in module.parameters())}
    assert trained == {"student"}
    for module in stage.modules.values():
        module.zero_grad(set_to_none=True)
    stage.loss(batch, 2)[0].backward()
    trained = {name for name, module in stage.modules.items() if any(p.grad is not None for p in module.parameters())}
    assert trained == {"auxiliary"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (student("prior-3"), "students.prior-3.teacher_steps is 8; give a multiple of 3"),
        (student("decoder-2"), "a student of the decoder takes one call"),
        (student("decoder-1", "method=moments"), "a student of the decoder takes one call"),
        (student("base-2"), "students.base-2"),
        (["students.prior-2.steps=4"], "students.prior-2.batch_size is missing"),
    ],
)
def test_students_that_cannot_be_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny(*changes)


STUDENTS = [*student("prior-2"), *student("decoder-1"), "stages.decoder.steps=4", "stages.decoder.batch_size=8"]
OPTIONS = [word for change in STUDENTS for word in ("--set", change)]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with students, trained without a stop; read only."""
    run = new_run(tmp_path_factory.mktemp("distilled") / "run", tiny(*STUDENTS))
    train(run, "all")
    return run


def test_students_learn_after_all_stages_the_priors_first(distilled: Run) -> None:
    trained = distilled.finished()
    assert list(trained.networks) == ["encoder", "prior", "decoder", "prior-2", "decoder-1"]
    assert trained.students == {"prior-2": 4, "decoder-1": 4}
    info = trained.manifest()
    assert {name: entry.place for name, entry in info.students.items()} == {
        "prior-2": "prior_step",
        "decoder-1": "decoder_step",
    }
    assert info.students["prior-2"].guidance == 1.5
    for name in ("prior-2", "decoder-1"):
        (preview,) = (distilled.path / "previews").glob(f"{name}-*.png")
        assert preview.stat().st_size > 1000


def test_a_stopped_student_goes_on_bit_for_bit(distilled: Run, tmp_path: Path) -> None:
    """As do trajectories of which some are there, are damaged, or are of another teacher."""
    copy = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    whole = (copy / "checkpoints" / "decoder-1-000004" / "weights.safetensors").read_bytes()
    for name in ("decoder-1-000004",):
        shutil.rmtree(copy / "checkpoints" / name)
    part = copy / "trajectories" / "decoder-1" / "0000.safetensors"
    kept = part.read_bytes()
    part.unlink()
    run = Run.open(copy)
    assert train(run, "decoder-1") == [True]
    assert part.read_bytes() == kept
    assert (copy / "checkpoints" / "decoder-1-000004" / "weights.safetensors").read_bytes() == whole
    part.write_bytes(kept[:-7])
    shutil.rmtree(copy / "checkpoints" / "decoder-1-000004")
    with pytest.raises(BadInputError, match="remove this file, it is made again"):
        train(run, "decoder-1")


def test_more_examples_make_the_last_file_anew(tmp_path: Path) -> None:
    """Else later rows would stand beside the noise of others."""
    run = finished_run(tmp_path, *student("decoder-1"))
    (kind,) = students_of(run.config)
    stage = run.stage(kind, CPU, "fp32")
    few = trajectories_of(stage, run, splits().train, silent)
    more = run.adopt(tiny(*student("decoder-1", "examples=40")))
    many = trajectories_of(more.stage(kind, CPU, "fp32"), more, splits().train, silent)
    assert (len(few), len(many)) == (24, 40)
    np.testing.assert_array_equal(many.batch(range(24))["x"], few.batch(range(24))["x"])  # type: ignore[call-overload]


def test_students_learn_without_dropout(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "base.dropout=0.1", *student("prior-2"))
    (kind,) = students_of(run.config)
    layers = [each for each in run.stage(kind, CPU, "fp32").modules["student"].modules() if hasattr(each, "inplace")]
    rates = [each.p for each in layers if isinstance(each, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}


def test_students_of_another_teacher_are_refused(distilled: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    longer = Run.open(copy).adopt(tiny(*STUDENTS, "stages.base.steps=7"))
    assert train(longer, "base") == [True]
    with pytest.raises(BadInputError, match="prior-2-000004: was trained on the latents of another"):
        longer.finished()


def test_distill_adds_students_to_a_finished_run_and_says_what_is_missing(command: Runner, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ["--data", write_npz(tmp_path / "blobs.npz"), "--cache", tmp_path / "cache"]
    short = [word for part in ("joint", "base") for word in ("--set", f"stages.{part}.steps=2")]
    command.fails(main, 65, "no run.json in it", "distill", tmp_path)
    words = ["tiny", *data, "--out", run, *short, "--threads", 1, "--report-images", 2]
    assert command(main, *words, "--stage", "joint").code == 0
    command.fails(main, 65, "stage base is at step 0 of 2", "distill", run, "--prior-calls", 2)
    assert command(main, *words, "--resume").code == 0
    cache = ["--cache", tmp_path / "cache", "--threads", 1]
    command.fails(main, 2, "no student is asked for", "distill", run, *cache)
    few = ["--train-steps", 3, "--set", "students.prior-2.examples=24", "--set", "students.prior-2.batch_size=8"]
    result = command(main, "distill", run, "--prior-calls", 2, *few, *cache)
    assert result.code == 0, result.err
    assert "prior-2-000003" in result.out
    again = command(main, "distill", run, *cache)
    assert again.code == 0, again.err
    assert "stage prior-2 is finished at step 3" in again.err
    for words, message in (
        (["--set", "seed=1"], "distill changes students alone"),
        (["--prior-calls", 2, "--set", "students.prior-2.guidance=3"], "it has checkpoints; to train it"),
        (["--method", "nonsense"], "--method nonsense: expected trajectory or moments"),
        (["--decoder-calls", 0], "students.decoder-0"),
        (["--prior-calls", "x"], "--prior-calls 'x': expected numbers from 1 up"),
    ):
        command.fails(main, 2, message, "distill", run, *words, *cache)
    config = load_config(str(run / "config.toml"), [])
    assert config.students["prior-2"].guidance == 1.5, "what sampling.guidance was"
    assert (config.students["prior-2"].examples, config.students["prior-2"].steps) == (24, 3)


# Bundles with students. Networks with random weights: another network can be told by its images.


def calm(networks: dict[str, Any]) -> None:
    with torch.no_grad():
        for network in networks.values():
            network.out.weight *= 0.3


@pytest.fixture(scope="module")
def with_students(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its bundle, whose students are other random networks of the same shapes."""
    folder = tmp_path_factory.mktemp("students")
    run, bundle = folder / "run", folder / "bundle"
    config = write_student_run(run)
    assert list(config.students) == ["prior-2", "decoder-1"]
    from ul_export.export import export_bundle
    from ul_export.options import ExportOptions

    export_bundle(run, bundle, ExportOptions(threads=1))
    return run, bundle


def write_student_run(run: Path) -> Config:
    from random_run import save

    from ul_train.model import make_base, make_decoder, randomise

    write_run(run, *STUDENTS[:6], change=calm)
    config = load_config(str(run / "config.toml"), [])
    opened = Run.open(run)
    of_prior, of_decoder = (opened.after(kind).state_hash for kind in (Base, Joint))
    torch.manual_seed(9)
    made = {"prior-2": make_base(config, len(opened.info.class_names)), "decoder-1": make_decoder(config)}
    for number, (name, network) in enumerate(made.items()):
        randomise(network, 90 + number)
        calm({name: network})
        save(run, config, name, {"student": network}, of_prior if name == "prior-2" else of_decoder)
    return config


def test_a_bundle_holds_students_that_are_verified(with_students: tuple[Path, Path]) -> None:
    bundle = Bundle.open(with_students[1])
    manifest = bundle.manifest
    assert list(manifest.all_graphs) == ["encoder", "prior_step", "decoder_step", "pixels", "prior-2", "decoder-1"]
    compared = [key for key in manifest.parity if key.startswith("batch 16, student") and "seed" not in key]
    assert compared == [
        "batch 16, student prior-2", "batch 16, student decoder-1", "batch 16, student prior-2 and decoder-1",
    ]  # fmt: skip
    last: Any = manifest.parity[compared[-1]]
    assert set(last["largest_difference"]) == {"prior-2", "decoder-1"}
    assert bundle.initializers("prior-2").keys() == bundle.initializers("prior_step").keys()
    name = max(bundle.initializers("prior-2"), key=lambda each: bundle.initializers("prior-2")[each].size)
    assert (bundle.initializers("prior-2")[name] != bundle.initializers("prior_step")[name]).any()


def images(pipeline: Pipeline, **overrides: Any) -> np.ndarray:
    return np.concatenate([batch.images for batch in pipeline.generate(6, batch_size=3, **overrides)])


def test_a_student_makes_other_images_the_same_at_any_batch_size_and_by_torch(
    with_students: tuple[Path, Path],
) -> None:
    run, path = with_students
    pipeline = ul_runtime.load(path, threads=1, backend="ort-cpu")
    both = images(pipeline, students=["prior-2", "decoder-1"])
    assert (both != images(pipeline)).any()
    assert (both != images(pipeline, students=["prior-2"])).any()
    (whole,) = pipeline.generate(6, batch_size=6, students=["prior-2", "decoder-1"])
    np.testing.assert_array_equal(whole.images, both)
    by_torch = images(ul_runtime.load(run, backend="torch", threads=1), students=["prior-2", "decoder-1"])
    assert np.abs(by_torch.astype(int) - both).max() <= 1


def test_images_of_students_say_so_and_are_replayed(
    with_students: tuple[Path, Path], command: Runner, tmp_path: Path
) -> None:
    _, bundle = with_students
    words = ["--out", tmp_path / "out", "-n", 3, "--threads", 1, "--student", "prior-2", "--student", "decoder-1"]
    assert command(generate, bundle, *words).code == 0
    assert '"prior_student": "prior-2"' in (tmp_path / "out" / "generate.json").read_text()
    replayed = command(generate, bundle, "--replay", tmp_path / "out" / "000002.png", "--threads", 1)
    assert replayed.code == 0, replayed.err
    assert "the same file, byte for byte" in replayed.out
    plain = command(generate, bundle, "--out", tmp_path / "plain", "-n", 3, "--threads", 1)
    assert plain.code == 0, plain.err
    assert "student" not in (tmp_path / "plain" / "generate.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_students_are_exported_in_lower_precision(
    kind: str, with_students: tuple[Path, Path], command: Runner, tmp_path: Path
) -> None:
    run, _ = with_students
    images = write_npz(tmp_path / "images.npz")
    result = command(export, run, "--out", tmp_path / "bundle", f"--{kind}", "--calibrate", images, "--threads", 1)
    assert result.code == 0, result.err
    bundle = Bundle.open(tmp_path / "bundle")
    assert {bundle.manifest.students[name].graph.precision for name in ("prior-2", "decoder-1")} == {kind}
    figures: Any = bundle.manifest.parity[kind]
    assert {"prior-2", "decoder-1"} <= figures["flops_share"].keys()
    assert "batch 16, student prior-2 and decoder-1" in figures
    pipeline = ul_runtime.load(tmp_path / "bundle", threads=1, backend="ort-cpu")
    assert np.isfinite(images_of(pipeline)).all()


def images_of(pipeline: Pipeline) -> np.ndarray:
    return np.concatenate(
        [batch.x for batch in pipeline.generate(2, students=["prior-2", "decoder-1"]) if batch.x is not None]
    )


@pytest.mark.slow
def test_an_update_takes_newer_students_along(
    with_students: tuple[Path, Path], command: Runner, tmp_path: Path
) -> None:
    run, bundle = with_students
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert command(export, run, "--update", copy, "--threads", 1).code == 0
    before, after = Bundle.open(bundle), Bundle.open(copy)
    for name in ("prior-2", "decoder-1"):
        assert after.read(after.manifest.students[name].graph.weights) == before.read(f"{name}.safetensors")
    write_run(tmp_path / "plain", change=calm)
    assert command(export, tmp_path / "plain", "--out", tmp_path / "other", "--threads", 1).code == 0
    result = command(export, run, "--update", tmp_path / "other", "--threads", 1)
    assert result.code == 65
    assert "its students is decoder-1, prior-2, that of" in result.err


# Settings: presets, students, and what is given over them.


@pytest.fixture
def tuned(with_students: tuple[Path, Path], tmp_path: Path) -> Pipeline:
    """The bundle with presets: draft by both students, which is its own, and careful by none."""
    bundle = Bundle.open(with_students[1])
    info = bundle.manifest
    prior, decoder = info.defaults.prior, info.defaults.decoder
    of_students = Preset(
        prior=prior.model_copy(
            update={"student": "prior-2", "sampler": "ddim", "num_steps": 2, "guidance": 1.0, "guidance_interval": None}
        ),
        decoder=decoder.model_copy(update={"student": "decoder-1", "sampler": "ddim", "num_steps": 1}),
        calls=3,
    )
    careful = Preset(prior=prior.model_copy(update={"num_steps": 9}), decoder=decoder, calls=11)
    values = info.model_dump(exclude={"files"}) | {
        "presets": {"draft": of_students, "careful": careful},
        "preset": "draft",
    }
    files = {name: bundle.read(name) for name in info.files}
    write_bundle(tmp_path / "tuned", BundleInfo.model_validate(values), files)
    return ul_runtime.load(tmp_path / "tuned", threads=1, backend="ort-cpu")


@pytest.mark.parametrize(
    ("given", "prior", "decoder"),
    [
        ({}, ("prior-2", 2), ("decoder-1", 1)),
        ({"preset": "draft"}, ("prior-2", 2), ("decoder-1", 1)),
        ({"preset": "careful"}, (None, 9), (None, 2)),
        ({"preset": "careful", "steps": 5}, (None, 5), (None, 2)),
        ({"preset": "none"}, (None, 4), (None, 2)),
        ({"steps": 8}, (None, 8), ("decoder-1", 1)),
        ({"steps": 2}, ("prior-2", 2), ("decoder-1", 1)),
        ({"guidance": 2.0}, (None, 4), ("decoder-1", 1)),
        ({"preset": "draft", "students": ["prior-2"]}, ("prior-2", 2), ("decoder-1", 1)),
        ({"decoder_steps": 4}, ("prior-2", 2), (None, 4)),
        ({"students": ["decoder-1"]}, (None, 4), ("decoder-1", 1)),
        ({"students": []}, (None, 4), (None, 2)),
    ],
)
def test_settings_are_of_the_preset_and_a_student_gives_way_to_what_it_was_not_trained_for(
    given: Any, prior: tuple[str | None, int], decoder: tuple[str | None, int], tuned: Pipeline
) -> None:
    settings = tuned.settings(**given)
    assert (settings.prior.student, settings.prior.num_steps) == prior
    assert (settings.decoder.student, settings.decoder.num_steps) == decoder
    wanted = given.get("guidance", 1.0 if prior[0] else 1.5)
    assert settings.guidance == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "drafty"}, "preset 'drafty': the bundle has no such preset; expected draft, careful, none"),
        ({"preset": "draft", "steps": 8}, "student prior-2 was trained for steps 2, not 8; leave that out"),
        ({"preset": "draft", "guidance": 3.0}, "was trained for guidance 1.5, not 3.0"),
        ({"students": ["prior-2"], "guidance": 1.0}, "was trained for guidance 1.5, not 1.0"),
        ({"students": ["prior-2"], "sampler": "ab2"}, "was trained for sampler ddim, not ab2"),
        ({"students": ["prior-4"]}, "student 'prior-4': the bundle has no such student; it has prior-2, decoder-1"),
        ({"students": ["prior-2", "prior-2"]}, "both stand for the prior"),
    ],
)
def test_settings_that_no_student_has_are_refused(given: Any, message: str, tuned: Pipeline) -> None:
    with pytest.raises(UsageError, match=message):
        tuned.settings(**given)


def test_one_batch_is_of_one_network(tuned: Pipeline) -> None:
    settings = [tuned.settings(), tuned.settings(students=[])]
    with pytest.raises(UsageError, match=r"one batch is of one network, not of prior-2 and prior_step"):
        tuned.prior_loop(np.arange(2), np.zeros(2, int), np.zeros(2, np.uint64), settings)


def changed(info: BundleInfo, change: str) -> dict[str, Any]:
    values = info.model_dump(exclude={"files"})
    if change == "place":
        values["students"]["prior-2"]["place"] = "decoder_step"
    elif change == "unknown":
        values["presets"] = {"draft": {**values["defaults"], "calls": 2}}
        values["presets"]["draft"]["prior"] = values["defaults"]["prior"] | {"student": "prior-4"}
    elif change == "defaults":
        values["defaults"]["prior"]["student"] = "prior-2"
    elif change == "preset":
        values["preset"] = "draft"
    elif change == "name":
        values["students"]["teacher"] = values["students"].pop("prior-2")
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("none", None),
        ("place", "students.prior-2"),
        ("unknown", "draft: prior-4 is no student of the prior"),
        ("defaults", "defaults: are of the networks themselves"),
        ("preset", "preset: draft is not in presets"),
        ("name", "students.teacher"),
    ],
)
def test_a_manifest_whose_students_do_not_fit_is_refused(
    change: str, message: str | None, with_students: tuple[Path, Path]
) -> None:
    values = changed(Bundle.open(with_students[1]).manifest, change)
    if message is None:
        BundleInfo.model_validate(values)
        return
    with pytest.raises(ValueError, match=message):
        BundleInfo.model_validate(values)


def test_a_bundle_of_format_3_is_read(with_students: tuple[Path, Path]) -> None:
    values = Bundle.open(with_students[1]).manifest.model_dump(exclude={"files", "students", "presets", "preset"})
    info = BundleInfo.model_validate(values | {"format_version": 3})
    assert (info.students, info.presets, info.preset) == ({}, {}, None)
