"""Guidance along the whole loop: against a walk in float64 over networks that are exact, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic_bundle import MEANS, write_analytic_bundle
from PIL import Image

import ul_runtime
from ul_runtime import noise
from ul_runtime.backends import HostBackend
from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.cli.generate import main
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.manifest import BundleInfo
from ul_runtime.pipeline import Pipeline
from ul_runtime.samplers import ALPHA, LOGSNR, SIGMA, A, S, sampler_table

LESSER = {"class_mean": 0.6 * MEANS + 0.1, "latent_std": 0.8}
LABEL = np.array([0, 1, 2, 3, 0])
FAST = ("--steps", 4, "--decoder-steps", 2, "--threads", 1, "--num-images", 2)


@pytest.fixture(scope="module")
def lesser_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_analytic_bundle(tmp_path_factory.mktemp("guides") / "lesser", **LESSER).path


@pytest.fixture(scope="module")
def guided(analytic_bundle: Path, lesser_bundle: Path) -> Pipeline:
    return ul_runtime.load(analytic_bundle, guide=lesser_bundle, threads=1)


@pytest.fixture(scope="module")
def plain(analytic_bundle: Path) -> Pipeline:
    return ul_runtime.load(analytic_bundle, threads=1)


def gaussian(z: np.ndarray, row: np.ndarray, mean: np.ndarray, std: float) -> np.ndarray:
    """The exact prediction of N(mean, std^2) latents, `mean` b c."""
    mean, alpha, sigma = mean[:, :, None, None], row[ALPHA], row[SIGMA]
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)


def by_guide(z: np.ndarray, row: np.ndarray) -> np.ndarray:
    return gaussian(z, row, LESSER["class_mean"][LABEL], LESSER["latent_std"])


def by_no_label(z: np.ndarray, row: np.ndarray) -> np.ndarray:
    return gaussian(z, row, MEANS[np.full(len(LABEL), 3)], 0.5)


@dataclass(frozen=True)
class Walk:
    """z_0 in float64, by the formulas of the papers."""

    other: Callable[[np.ndarray, np.ndarray], np.ndarray]
    guidance: float
    rescale: float = 0.0
    interval: tuple[float, float] = (-3.0, 1.5)
    axes: tuple[int, ...] = (1, 2, 3)
    swapped: bool = False

    def pred(self, z: np.ndarray, row: np.ndarray) -> np.ndarray:
        cond = gaussian(z, row, MEANS[LABEL], 0.5)
        if not self.interval[0] <= row[LOGSNR] <= self.interval[1]:
            return cond
        w = 1.0 - self.guidance if self.swapped else self.guidance
        pred = w * cond + (1.0 - w) * self.other(z, row)
        ratio = cond.std(self.axes, keepdims=True) / pred.std(self.axes, keepdims=True)
        return pred * (self.rescale * ratio + 1.0 - self.rescale)

    def __call__(self, sampler: str, num_steps: int) -> np.ndarray:
        indices = np.arange(len(LABEL))
        table = sampler_table(sampler, "uniform", num_steps, logsnr_min=-10.0, logsnr_max=5.0, ends_clean=False)
        z = noise.normals(0, indices, noise.PRIOR_START, (4, 4, 4)).astype(np.float64)
        history = [np.zeros_like(z)] * 2
        for k, row in enumerate(table):
            pred = self.pred(z, row)
            fresh = noise.normals(0, indices, noise.prior_step(k), (4, 4, 4)) if row[S] else 0.0
            terms = zip(row[A:S], (z, pred, *history), strict=True)
            z = sum(factor * term for factor, term in terms) + row[S] * fresh
            history = [pred, history[0]]
        return z


def z_0(pipeline: Pipeline, **settings: Any) -> np.ndarray:
    return pipeline.sample_z_0(np.arange(len(LABEL)), LABEL, 0, pipeline.settings(**settings))


SETTINGS = [(2.0, 0.0), (2.5, 0.7), (0.5, 0.3), (1.5, 1.0)]


@pytest.mark.parametrize("sampler", ["dpmpp2m", "ancestral"])
@pytest.mark.parametrize(("guidance", "rescale"), SETTINGS)
@pytest.mark.parametrize("other", [by_guide, by_no_label])
def test_z_0_is_that_of_the_formulas(guided, plain, other, guidance, rescale, sampler):
    pipeline = guided if other is by_guide else plain
    result = z_0(pipeline, guidance=guidance, guidance_rescale=rescale, sampler=sampler, steps=12)
    assert np.allclose(result, Walk(other, guidance, rescale)(sampler, 12), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"other": by_no_label},
        {"swapped": True},
        {"axes": (1,)},
        {"axes": (2, 3)},
        {"axes": (0, 1, 2, 3)},
        {"rescale": 0.0},
        {"rescale": 0.3},
        {"interval": (-np.inf, np.inf)},
        {"interval": (-3.0, 0.0)},
    ],
)
def test_another_formula_gives_another_z_0(guided, wrong):
    """The control of the test above."""
    result = z_0(guided, guidance=2.5, guidance_rescale=0.7, sampler="ddim", steps=12)
    right = {"other": by_guide, "guidance": 2.5, "rescale": 0.7}
    assert np.allclose(result, Walk(**right)("ddim", 12), rtol=1e-4, atol=1e-5)
    assert np.abs(result - Walk(**{**right, **wrong})("ddim", 12)).max() > 1e-3


def test_a_bundle_that_guides_itself_is_unguided(analytic_bundle, plain):
    itself = ul_runtime.load(analytic_bundle, guide=analytic_bundle, threads=1)
    same = z_0(itself, guidance=2.0, guidance_rescale=0.5, steps=12, guidance_interval=(-np.inf, np.inf))
    assert np.allclose(same, z_0(plain, steps=12), rtol=0.0, atol=2e-6)


# --- what is computed, and what is not


class Recorder(HostBackend):
    """A backend that keeps the inputs of every prior step."""

    name, precision, threads = "recorder", "fp32", None

    def __init__(self, backend):
        self.backend, self.calls = backend, []

    def run(self, graph_name, inputs):
        if graph_name == "prior_step":
            self.calls.append(inputs)
        return self.backend.run(graph_name, inputs)


def recorded(pipeline: Pipeline) -> tuple[Pipeline, Recorder, Recorder]:
    main_, guide_ = Recorder(pipeline.backend), Recorder(pipeline.guide.backend)
    return Pipeline(pipeline.manifest, main_, Pipeline(pipeline.guide.manifest, guide_)), main_, guide_


def test_the_guide_runs_inside_the_interval_only_and_the_main_network_once_a_step(guided):
    pipeline, mains, guides = recorded(guided)
    z_0(pipeline, guidance=2.5, guidance_rescale=0.7, guidance_interval=(-3.0, 1.5), steps=8)
    assert len(mains.calls) == 8
    inside = [call for call in mains.calls if -3.0 <= call["row"][0, LOGSNR] <= 1.5]
    assert [call["row"][0, LOGSNR] for call in guides.calls] == [call["row"][0, LOGSNR] for call in inside]
    assert 0 < len(inside) < 8
    for call in mains.calls:
        assert call["label"].tolist() == LABEL[:, None].tolist()
        on = any(call is one for one in inside)
        assert call["weight"].ravel().tolist() == [2.5 if on else 1.0] * 5
        assert call["guide_weight"].tolist() == [-1.5 if on else 0.0] * 5
        assert call["rescale"].tolist() == [np.float32(0.7) if on else 0.0] * 5
        assert np.any(call["guide"]) == on


def test_the_guide_is_asked_for_its_own_unguided_prediction_of_the_same_labels(guided):
    pipeline, mains, guides = recorded(guided)
    z_0(pipeline, guidance=2.5, guidance_rescale=0.7, guidance_interval=(-np.inf, np.inf), steps=3)
    for main_, guide_ in zip(mains.calls, guides.calls, strict=True):
        assert np.array_equal(main_["z"], guide_["z"])
        assert np.array_equal(main_["label"], guide_["label"])
        assert guide_["weight"].ravel().tolist() == [1.0] * 5
        assert not any(guide_[name].any() for name in ("guide", "guide_weight", "rescale"))
        assert np.array_equal(main_["guide"], guided.guide.backend.run("prior_step", guide_)["pred"])


def test_without_guidance_the_guide_is_not_run_and_changes_no_byte(guided, plain):
    pipeline, _, guides = recorded(guided)
    assert np.array_equal(z_0(pipeline, guidance=1.0, guidance_rescale=0.7), z_0(plain, guidance=1.0))
    assert guides.calls == []


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_guided_images_are_the_same_bytes_at_any_batch_size(analytic_bundle, lesser_bundle, guided, phi):
    settings: dict[str, Any] = {"guidance": 2.0, "guidance_rescale": phi, "sampler": "ancestral", "steps": 6}
    (expected,) = guided.generate(16, batch_size=16, **settings)
    other = ul_runtime.load(analytic_bundle, guide=lesser_bundle, threads=2)
    for batch_size in (1, 3, 5):
        batches = other.generate(16, batch_size=batch_size, **settings)
        assert np.array_equal(np.concatenate([batch.x for batch in batches]), expected.x)


def test_an_image_without_label_is_the_same_bytes_beside_guided_ones(plain):
    (guided_,) = plain.generate(4, labels=["red", "none"], guidance=3.0, guidance_rescale=0.7)
    (alone,) = plain.generate([1, 3], labels="none", guidance=1.0)
    assert np.array_equal(guided_.x[1::2], alone.x)


def test_a_guide_serves_images_without_label_and_bundles_without_classes(guided, tmp_path):
    images = [next(guided.generate(2, labels="none", guidance=w)).x for w in (1.0, 3.0)]
    assert not np.allclose(*images, atol=0.01)
    write_analytic_bundle(tmp_path / "main", classes=())
    write_analytic_bundle(tmp_path / "guide", classes=(), latent_std=0.8)
    pipeline = ul_runtime.load(tmp_path / "main", guide=tmp_path / "guide")
    images = [next(pipeline.generate(2, guidance=w)).x for w in (1.0, 3.0)]
    assert not np.allclose(*images, atol=0.01)


def test_only_the_prior_of_a_guide_is_read(lesser_bundle, analytic_bundle, tmp_path):
    data = bytearray((lesser_bundle / "decoder.safetensors").read_bytes())
    data[-1] ^= 1
    guide = tmp_path / "guide"
    guide.mkdir()
    for file in lesser_bundle.iterdir():
        (guide / file.name).write_bytes(bytes(data) if file.name == "decoder.safetensors" else file.read_bytes())
    ul_runtime.load(analytic_bundle, guide=guide)


# --- defaults, the command and its provenance


def with_defaults(path: Path, source: Path, **changes: Any) -> Path:
    """A copy of a bundle with other fields."""
    bundle = Bundle.open(source)
    fields = bundle.manifest.model_dump(exclude={"files"})
    for key, value in changes.items():
        part, *rest = key.split("__")
        holder = fields
        for name in rest:
            holder, part = holder[part], name
        holder[part] = value
    files: dict[str, bytes | Path] = {name: bundle.read(name) for name in bundle.manifest.files}
    return write_bundle(path, BundleInfo.model_validate(fields), files).path


def test_the_bundle_says_how_much_is_rescaled_unless_asked(analytic_bundle, plain, tmp_path):
    path = with_defaults(tmp_path / "bundle", analytic_bundle, defaults__prior__guidance_rescale=0.4)
    pipeline = ul_runtime.load(path)
    assert plain.settings().guidance_rescale == 0.0
    assert pipeline.settings().guidance_rescale == 0.4
    assert pipeline.settings(guidance_rescale=0.0).guidance_rescale == 0.0
    assert np.array_equal(z_0(pipeline, guidance=2.0), z_0(plain, guidance=2.0, guidance_rescale=0.4))


def test_pictures_and_job_name_the_guide_and_the_rescale(command, analytic_bundle, lesser_bundle, tmp_path):
    out = tmp_path / "out"
    options = ("--guidance", 2, "--guidance-rescale", 0.7, "--guide", lesser_bundle)
    result = command(main, analytic_bundle, "--out", out, *options, *FAST)
    assert result.code == 0, result
    with Image.open(out / "000001.png") as picture:
        info, pixels = json.loads(picture.info["unified-latents"]), np.asarray(picture)
    expected = {"guidance": 2.0, "guidance_rescale": 0.7, "guide": Bundle.open(lesser_bundle).hash}
    assert expected.items() <= info["job"].items()
    pipeline = ul_runtime.load(analytic_bundle, guide=lesser_bundle, threads=1)
    (batch,) = pipeline.generate(2, guidance=2.0, guidance_rescale=0.7, steps=4, decoder_steps=2)
    assert np.array_equal(pixels, batch.images[1])
    job = json.loads((out / "generate.json").read_text())["job"]
    assert (job["guide"], job["guidance_rescale"]) == (Bundle.open(lesser_bundle).hash, 0.7)


def test_another_guide_or_rescale_is_another_job(command, analytic_bundle, lesser_bundle, tmp_path):
    out = tmp_path / "out"
    guide = ("--guidance", 2, "--guide", lesser_bundle)
    assert command(main, analytic_bundle, "--out", out, *guide, *FAST).code == 0
    hash_ = Bundle.open(lesser_bundle).hash
    command.fails(main, 2, f"guide {hash_}, now None", analytic_bundle, "--out", out, *FAST, "--guidance", 2)
    rescale = ("--guidance-rescale", 0.5)
    command.fails(main, 2, "--guidance-rescale 0.0, now 0.5", analytic_bundle, "--out", out, *guide, *rescale, *FAST)


# --- what is refused


@pytest.mark.parametrize("phi", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_rescale_outside_0_to_1_is_refused(plain, phi):
    with pytest.raises(UsageError, match=r"guidance rescale is .*; expected 0 \(off\) to 1"):
        plain.generate(1, guidance=2.0, guidance_rescale=phi)


def test_a_guide_or_rescale_that_would_do_nothing_is_refused(plain, guided):
    with pytest.raises(UsageError, match="so the guide would do nothing; give guidance"):
        guided.generate(1)
    with pytest.raises(UsageError, match="so guidance_rescale would do nothing; give guidance"):
        plain.generate(1, guidance_rescale=0.5)
    for pipeline in (plain, guided):
        pipeline.generate(1, guidance=1.0, guidance_rescale=0.5)


def test_a_bundle_without_classes_or_guide_takes_no_guidance(tmp_path):
    write_analytic_bundle(tmp_path / "bundle", classes=())
    with pytest.raises(UsageError, match="the bundle has none; leave it out, or give a guide"):
        ul_runtime.load(tmp_path / "bundle").generate(1, guidance=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 16}, "latent size 8, the bundle has 4"),
        ({"logsnr_z": {"min": -9.0, "max": 5.0}}, "lowest logsnr -9.0, the bundle has -10.0"),
        ({"logsnr_z": {"min": -10.0, "max": 4.0}}, "highest logsnr 4.0, the bundle has 5.0"),
        ({"classes": ("red", "green")}, "number of classes 2, the bundle has 3"),
        ({"classes": ("red", "blue", "green")}, "class 1 blue, the bundle has green"),
        ({"channels": 1}, "encoder [0-9a-f]{12}, the bundle has [0-9a-f]{12}"),
    ],
)
def test_a_guide_of_other_latents_is_refused(command, analytic_bundle, tmp_path, changes, message):
    guide = tmp_path / "guide"
    made = {key: changes[key] for key in ("size", "classes", "channels") if key in changes}
    write_analytic_bundle(guide if made else tmp_path / "same", **made)
    if not made:
        with_defaults(guide, tmp_path / "same", **changes)
    with pytest.raises(BadInputError, match=f"guide analytic: {message}.*; give a guide trained on the same latents"):
        ul_runtime.load(analytic_bundle, guide=guide)
    options = ("--guide", guide, "--guidance", 2, "--out", tmp_path / "out")
    command.fails(main, 65, f"guide analytic: {message.partition('[')[0]}", analytic_bundle, *options, *FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--guidance-rescale", 2), 2, "guidance rescale is 2.0; expected 0 (off) to 1"),
        (("--guidance-rescale", 0.5), 2, "would do nothing; give guidance"),
        (("--guidance", 2, "--guide", "nowhere"), 65, "nowhere: no such folder, and no model of that name"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command, analytic_bundle, tmp_path, options, code, message):
    command.fails(main, code, message, analytic_bundle, "--out", tmp_path / "out", *options, *FAST)
    assert not (tmp_path / "out").exists()


def test_a_guide_without_guidance_is_one_line(command, analytic_bundle, lesser_bundle, tmp_path):
    options = ("--out", tmp_path / "out", "--guide", lesser_bundle)
    command.fails(main, 2, "so the guide would do nothing; give guidance", analytic_bundle, *options, *FAST)
