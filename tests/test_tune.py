"""ul-tune: candidates, what is dropped, what is chosen, and a bundle with presets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Runner
from onnx import TensorProto, helper
from PIL import Image

import ul_runtime
from ul_export.options import TuneOptions
from ul_export.tune.cli import main
from ul_export.tune.tune import Trial, candidates, choose, survivors, trial
from ul_runtime.bundle import Bundle
from ul_runtime.cli.generate import main as generate
from ul_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(analytic_bundle: Path) -> Pipeline:
    return ul_runtime.load(analytic_bundle, threads=1, backend="ort-cpu")


def test_the_reference_comes_first_and_no_setting_twice(pipeline: Pipeline) -> None:
    found = [pipeline.settings(**each) for each in candidates(pipeline)]
    assert found[0] == pipeline.settings(preset="none")
    assert len(set(found[1:])) == len(found) - 1
    assert {each.prior.sampler for each in found} >= {"dpmpp2m", "unipc2"}
    assert max(each.prior.num_steps for each in found) == found[0].prior.num_steps


def test_what_an_image_costs(pipeline: Pipeline) -> None:
    flops = {"prior_step": 100, "decoder_step": 7}
    plain = trial(pipeline, {"steps": 5, "decoder_steps": 3, "guidance": 1.0}, flops)
    assert (plain.calls, plain.flops) == (8, 5 * 100 + 3 * 7)
    guided = trial(pipeline, {"steps": 5, "guidance": 2.0, "guidance_interval": (-np.inf, np.inf)}, flops)
    assert guided.flops == 10 * 100 + 7 * guided.settings.decoder.num_steps


def made(pipeline: Pipeline, *of: tuple[int, float, float]) -> list[Trial]:
    """Trials of (FLOPs, ratio, recall); the first is the reference."""
    settings = pipeline.settings()
    return [Trial({}, settings, 1, flops, {"a": [ratio]}, [recall], ratio) for flops, ratio, recall in of]


def test_what_is_worse_or_dearer_than_another_is_dropped(pipeline: Pipeline) -> None:
    trials = made(pipeline, (100, 1.0, 0.8), (50, 1.1, 0.8), (60, 1.2, 0.8), (10, 3.0, 0.8), (20, 1.4, 0.8))
    assert [each.flops for each in survivors(trials, 1.6, 2)] == [100, 50, 20]
    assert [each.flops for each in survivors(trials, 1.6, 3)] == [100, 50, 20, 60], "a further one, if there is room"
    assert [each.flops for each in survivors(trials, 1.05, 1)] == [100, 50], "the best, where none is near"


def test_presets_are_the_cheapest_within_their_bounds_and_keep_the_recall(pipeline: Pipeline) -> None:
    trials = made(
        pipeline, (100, 1.0, 0.80), (80, 0.9, 0.80), (50, 1.05, 0.79), (20, 1.08, 0.70), (10, 1.3, 0.7), (5, 1.5, 0.8)
    )
    chosen = choose(trials, TuneOptions(data="", balanced=1.1, draft=1.35))
    assert {name: each.flops for name, each in chosen.items()} == {"draft": 10, "balanced": 50, "best": 80}
    alone = choose(made(pipeline, (100, 1.0, 0.8)), TuneOptions(data=""))
    assert {each.flops for each in alone.values()} == {100}


def features_file(path: Path, seed: int) -> Path:
    """A feature space: eight random projections of the image."""
    weight = np.random.default_rng(seed).normal(size=(3 * 8 * 8, 8)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 8])
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    stored = helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)
    graph = helper.make_graph(nodes, "g", [x], [y], [stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.slow
def test_a_bundle_gets_presets_that_ul_generate_takes(command: Runner, analytic_bundle: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    pipeline = ul_runtime.load(analytic_bundle, threads=1, backend="ort-cpu")
    classes = pipeline.manifest.classes
    for batch in pipeline.generate(420, seed=5, steps=24):
        for index, label, image in zip(batch.indices, batch.labels, batch.images, strict=True):
            folder = images / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    spaces = ["--features", features_file(tmp_path / "a.onnx", 1), "--features", "pixels"]
    spaces += ["--held-out", features_file(tmp_path / "b.onnx", 2)]
    words = ["--data", images, "--images", 100, "--seeds", 1, "--finalists", 3, "--threads", 1, *spaces]
    words += ["--cache", tmp_path / "cache", "--json"]
    command.fails(
        main, 2, "--images is 50; expected 100 or more", analytic_bundle, "--out", "x", *words, "--images", 50
    )
    result = command(main, analytic_bundle, "--out", tmp_path / "tuned", *words)
    assert result.code == 0, result.err
    record: Any = json.loads(result.out.splitlines()[-1])
    bundle = Bundle.open(tmp_path / "tuned")
    manifest = bundle.manifest
    assert list(manifest.presets) == ["draft", "balanced", "best"]
    assert manifest.preset == "balanced"
    costs = [manifest.presets[name].flops for name in ("draft", "balanced")]
    reference = record["reference"]["flops"]
    assert costs[0] <= costs[1] < reference, "an exact model needs few steps"
    quality: Any = manifest.presets["balanced"].quality
    assert quality["ratio_to_reference"] <= 1.1
    assert len(quality["frechet_distance"]) == 3
    assert {"tuning.md", "tuning.png"} <= set(manifest.files)
    assert Image.open(tmp_path / "tuned" / "tuning.png").size == (770, 495)
    text = (tmp_path / "tuned" / "tuning.md").read_text()
    assert "| balanced |" in text
    assert str(tmp_path) not in text.split("`")[0]
    made = command(generate, tmp_path / "tuned", "--preset", "draft", "-n", 2, "--out", tmp_path / "d", "--threads", 1)
    assert made.code == 0, made.err
    job = json.loads((tmp_path / "d" / "generate.json").read_text())["job"]
    assert job["prior_num_steps"] == manifest.presets["draft"].prior.num_steps
    assert {name: bundle.read(name) for name in ("prior_step.onnx",)} == {
        "prior_step.onnx": Bundle.open(analytic_bundle).read("prior_step.onnx")
    }
    command.fails(main, 2, "exists already", analytic_bundle, "--out", tmp_path / "tuned", *words)
