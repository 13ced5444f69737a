"""The pipeline over a real ONNX bundle whose networks are exact."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analytic_bundle import MEANS, write_analytic_bundle
from exact_denoisers import gaussian_mean, walk
from mixed_batch import MIXED, draw

import ul_runtime
from ul_runtime import noise
from ul_runtime.backends import HostBackend
from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import NonFiniteError, StoppedError, UsageError
from ul_runtime.images.convert import to_uint8
from ul_runtime.pipeline import Pipeline
from ul_runtime.samplers import B_0, SAMPLERS

NO_MEAN = np.zeros((4, 4))


@pytest.fixture(scope="module")
def pipeline(analytic_bundle: Path) -> Pipeline:
    return ul_runtime.load(analytic_bundle, threads=1)


def made(pipeline: Pipeline, *args, **kwargs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batches = list(pipeline.generate(*args, **kwargs))
    return tuple(
        np.concatenate([getattr(batch, part) for batch in batches]) for part in ("indices", "labels", "images")
    )


def centred(tmp_path: Path, std: float) -> Pipeline:
    write_analytic_bundle(tmp_path / "bundle", class_mean=NO_MEAN, latent_std=std)
    return ul_runtime.load(tmp_path / "bundle", threads=1)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_the_prior_ends_with_the_std_of_the_noisy_latent(tmp_path, std):
    pipeline = centred(tmp_path, std)
    z_0 = pipeline.sample_z_0(np.arange(2), np.zeros(2, int), 0, pipeline.settings(steps=200))
    start = pipeline.sample_z_0(np.arange(2), np.zeros(2, int), 0, pipeline.settings(steps=1, sampler="ddim"))
    gain_of_one_step = sigma(5.0) / sigma(-10.0) + (alpha(5.0) - alpha(-10.0) * sigma(5.0) / sigma(-10.0)) * (
        alpha(-10.0) * std**2 / (alpha(-10.0) ** 2 * std**2 + sigma(-10.0) ** 2)
    )
    gain = z_0 / (start / gain_of_one_step)
    expected = math.hypot(alpha(5.0) * std, sigma(5.0)) / math.hypot(alpha(-10.0) * std, sigma(-10.0))
    assert np.allclose(gain, expected, rtol=2e-3)


@pytest.mark.parametrize("sampler", [*SAMPLERS, "sa2:0.6"])
def test_every_sampler_through_the_graphs_is_its_walk_in_float64(pipeline, sampler):
    settings = pipeline.settings(sampler=sampler, grid="mix:0.9,-1,1.5", steps=6)
    given = pipeline.sample_z_0(np.arange(2), np.zeros(2, int), 3, settings)

    def fresh(stream: int) -> np.ndarray:
        return noise.normals(3, np.arange(2), stream, pipeline.latent_shape).astype(np.float64)

    def walked(table: np.ndarray) -> np.ndarray:
        mean = MEANS[0][:, None, None].astype(np.float64)
        return walk(
            table,
            fresh(noise.PRIOR_START),
            lambda z, logsnr: gaussian_mean(z, logsnr, 0.5, mean),
            lambda k: fresh(noise.prior_step(k)),
        )

    table = pipeline.prior_table(settings.prior).copy()
    assert np.allclose(given, walked(table), rtol=1e-4, atol=1e-5)
    table[-1, B_0] *= 1.01  # negative control
    assert not np.allclose(given, walked(table), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_images_are_the_same_bytes_at_any_batch_size_order_and_thread_count(pipeline, analytic_bundle, threads):
    settings = {"sampler": "ancestral", "decoder_sampler": "ancestral", "guidance": 2.0, "steps": 4}
    expected = made(pipeline, 16, seed=3, batch_size=16, **settings)[2]
    other = ul_runtime.load(analytic_bundle, threads=threads)
    for batch_size in (1, 2, 3, 5, 8):
        assert np.array_equal(made(other, 16, seed=3, batch_size=batch_size, **settings)[2], expected)
    assert np.array_equal(made(other, [11, 2, 7], seed=3, **settings)[2], expected[[11, 2, 7]])


def test_an_index_of_more_than_32_bits_is_its_own_image_at_any_batch_size(pipeline):
    at = [5, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1]
    indices, labels, images = made(pipeline, at, seed=3, batch_size=5)
    assert indices.tolist() == at
    assert labels.tolist() == [index % 3 for index in at]
    assert len({image.tobytes() for image in images}) == len(at)
    for index, image in zip(at, images, strict=True):
        assert np.array_equal(made(pipeline, np.array([index], np.uint64), seed=3)[2][0], image)


def test_another_seed_gives_other_images(pipeline):
    assert not np.array_equal(made(pipeline, 2, seed=0)[2], made(pipeline, 2, seed=1)[2])


@pytest.mark.parametrize(("size", "batch"), [(8, 16), (32, 16), (64, 8), (128, 2), (256, 1), (512, 1)])
def test_the_default_batch_is_bounded_in_pixels(tmp_path, size, batch):
    write_analytic_bundle(tmp_path / "bundle", size=size)
    assert ul_runtime.load(tmp_path / "bundle").default_batch_size == batch


def test_classes_come_in_turn_and_look_like_their_class(pipeline):
    indices, labels, images = made(pipeline, 9)
    assert indices.tolist() == list(range(9))
    assert labels.tolist() == [0, 1, 2] * 3
    assert images.dtype == np.uint8
    assert images.shape == (9, 8, 8, 3)
    assert images.mean(axis=(1, 2)).argmax(axis=1).tolist() == labels.tolist()


@pytest.mark.parametrize(("labels", "expected"), [("green", [1] * 3), ("#2", [2] * 3), (["none", "red"], [3, 0, 3])])
def test_labels_by_name_number_and_none(pipeline, labels, expected):
    assert made(pipeline, 3, labels=labels)[1].tolist() == expected


class Recorder(HostBackend):
    """A backend that notes the shape of `label` for each prior step."""

    name, precision, threads = "recorder", "fp32", None

    def __init__(self, backend):
        self.backend, self.calls = backend, []

    def run(self, graph_name, inputs):
        if graph_name == "prior_step":
            self.calls.append((float(inputs["row"][0, 0]), inputs["label"].tolist(), inputs["weight"].tolist()))
        return self.backend.run(graph_name, inputs)


def test_guidance_runs_two_branches_inside_its_interval_and_one_elsewhere(pipeline):
    recorder = Recorder(pipeline.backend)
    made(Pipeline(pipeline.manifest, recorder), 1, labels="green", guidance=2.5, guidance_interval=(-3.0, 1.5), steps=8)
    assert len(recorder.calls) == 8
    for logsnr, label, weight in recorder.calls:
        inside = -3.0 <= logsnr <= 1.5
        assert (label, weight) == (([[1, 3]], [[2.5, -1.5]]) if inside else ([[1]], [[1.0]]))


@pytest.mark.parametrize("settings", [{"guidance": 1.0}, {"guidance": 3.0, "labels": "none"}])
def test_without_guidance_or_label_every_step_has_one_branch(pipeline, settings):
    recorder = Recorder(pipeline.backend)
    made(Pipeline(pipeline.manifest, recorder), 1, **settings)
    assert {len(label[0]) for _, label, _ in recorder.calls} == {1}


def test_an_image_without_label_does_not_depend_on_the_labels_of_the_others(tmp_path):
    write_analytic_bundle(tmp_path / "bundle", class_mean=MEANS + np.float32(0.3))
    pipeline = ul_runtime.load(tmp_path / "bundle", threads=1)
    settings = {"guidance": 1.7, "guidance_interval": (-np.inf, np.inf)}
    (beside,) = pipeline.generate(4, labels=["red", "none"], **settings)
    (alone,) = pipeline.generate([1, 3], labels="none", **settings)
    assert np.array_equal(beside.x[1::2], alone.x)


def test_guidance_everywhere_moves_latents_to_the_guided_mean(pipeline):
    settings = pipeline.settings(guidance=2.0, guidance_interval=(-np.inf, np.inf), steps=50)
    plain = pipeline.settings(guidance=1.0, steps=50)
    label = np.zeros(4, int)
    moved = pipeline.sample_z_0(np.arange(4), label, 0, settings) - pipeline.sample_z_0(np.arange(4), label, 0, plain)
    expected = alpha(5.0) * (MEANS[0] - MEANS[3])
    assert np.allclose(moved.mean(axis=(0, 2, 3)), expected, atol=0.02)


def test_encode_adds_the_fixed_noise_of_the_latent(pipeline):
    x = np.random.default_rng(0).uniform(-1, 1, (64, 3, 8, 8)).astype(np.float32)
    encoded = pipeline.encode(x)
    noise = (encoded.z_0 - np.float32(alpha(5.0)) * encoded.z_clean) / sigma(5.0)
    assert noise.std() == pytest.approx(1.0, abs=0.05)
    assert np.array_equal(pipeline.encode(x[5:7], indices=[5, 6]).z_0, encoded.z_0[5:7])
    assert not np.array_equal(pipeline.encode(x, seed=1).z_0, encoded.z_0)


def test_decode_of_encode_is_the_image_up_to_its_noise(pipeline):
    x = np.repeat(np.repeat(np.random.default_rng(0).uniform(-0.8, 0.8, (4, 3, 4, 4)), 2, 2), 2, 3).astype(np.float32)
    (batch,) = pipeline.decode(pipeline.encode(x).z_0, decoder_steps=50)
    error = (batch.x - x).std()
    assert error == pytest.approx(math.hypot(sigma(5.0), 0.1), rel=0.15)


def test_the_mean_of_many_decodes_is_closer_than_one(pipeline):
    z_0 = pipeline.encode(np.zeros((2, 3, 8, 8), np.float32)).z_0
    target = np.repeat(np.repeat(z_0[:, :3], 2, 2), 2, 3)
    one, many = (next(pipeline.decode(z_0, mean_of=k, decoder_steps=20)).x for k in (1, 16))
    assert np.square(many - target).mean() < 0.2 * np.square(one - target).mean()


def test_bits_of_gaussian_latents_are_their_closed_form(tmp_path):
    pipeline = centred(tmp_path, 0.7)
    z_clean = np.random.default_rng(0).normal(0, 0.7, (64, *pipeline.latent_shape)).astype(np.float32)
    expected = z_clean[0].size * 0.5 * math.log2(1 + 0.7**2 * math.exp(5))
    assert pipeline.bits(z_clean, num_samples=32).mean() == pytest.approx(expected, rel=0.02)


def test_non_finite_images_are_left_out_and_then_named(tmp_path):
    means = MEANS.copy()
    means[2] = np.nan
    write_analytic_bundle(tmp_path / "bundle", class_mean=means)
    batches = ul_runtime.load(tmp_path / "bundle").generate(6, batch_size=3)
    assert [next(batches).indices.tolist() for _ in range(2)] == [[0, 1], [3, 4]]
    with pytest.raises(NonFiniteError, match=r"2 of 6 images .* 2, 5"):
        next(batches)


def test_a_latent_that_is_not_finite_is_not_decoded_to_an_image(pipeline):
    class Broken(Recorder):
        def run(self, graph_name, inputs):
            out = self.backend.run(graph_name, {k: np.nan_to_num(v) for k, v in inputs.items()})
            if graph_name == "prior_step":
                out["z_next"][0] = np.inf
            return out

    batches = Pipeline(pipeline.manifest, Broken(pipeline.backend)).generate(2)
    assert next(batches).indices.tolist() == [1]
    with pytest.raises(NonFiniteError, match="1 of 2"):
        next(batches)


class Overflowing(Recorder):
    """Gives infinity for every image of the third class, as half precision may."""

    def run(self, graph_name, inputs):
        out = self.backend.run(graph_name, {k: np.nan_to_num(v) for k, v in inputs.items()})
        if graph_name == "prior_step":
            out["z_next"] = np.where(inputs["label"][:, :1, None, None] == 2, np.float32(np.inf), out["z_next"])
        return out


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@pytest.mark.case(
    "G12", "NaN or Inf in one image of a batch", "this image alone is made again in float32, or left out and listed"
)
def test_images_that_are_not_finite_are_made_again_in_float32_and_these_alone(pipeline, batch_size):
    opened = []

    def exact():
        opened.append(Recorder(pipeline.backend))
        return opened[-1]

    half = Pipeline(pipeline.manifest, Overflowing(pipeline.backend), exact=exact)
    batches, expected = list(half.generate(6, batch_size=batch_size)), made(pipeline, 6, batch_size=batch_size)
    for part, other in zip(("indices", "labels", "images"), expected, strict=True):
        assert np.array_equal(np.concatenate([getattr(batch, part) for batch in batches]), other)
    assert [index for batch in batches for index in batch.indices[batch.in_float32]] == [2, 5]
    (recorder,) = opened
    assert {branches[0] for _, label, _ in recorder.calls for branches in label} == {2}


def test_without_float32_or_not_finite_there_either_they_are_named(pipeline):
    def overflowing():
        return Overflowing(pipeline.backend)

    for exact in (None, overflowing):
        half = Pipeline(pipeline.manifest, overflowing(), exact=exact)
        with pytest.raises(NonFiniteError, match=r"2 of 6 images .* 2, 5"):
            list(half.generate(6))


def stopped(amount: float) -> None:
    assert amount == 0, "looked before the first call of a graph"
    raise StoppedError("stopped")


@pytest.mark.parametrize("sampler", ["dpmpp2m", "heun"])
def test_stop_is_prompt_and_progress_adds_up_to_the_images(pipeline, sampler):
    total, settings = [], {"sampler": sampler, "decoder_sampler": sampler, "steps": 3, "decoder_steps": 2}
    list(pipeline.generate(5, batch_size=2, tick=total.append, **settings))
    assert sum(total) == pytest.approx(5)
    total.clear()
    list(pipeline.decode(np.zeros((5, *pipeline.latent_shape)), tick=total.append, **settings))
    assert sum(total) == pytest.approx(5)
    with pytest.raises(StoppedError):
        list(pipeline.generate(5, tick=stopped))


def test_float_to_uint8_is_round_of_x_plus_1_times_127_5():
    x = np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 9.0], np.float32).reshape(1, 1, 1, 6)
    assert to_uint8(x).ravel().tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "number of images is 0"),
        ({"images": [-1]}, "index -1 is out of range; expected 0 to"),
        ({"images": [0, 2**63]}, "index 9223372036854775808 is out of range"),
        ({"images": np.array([2**64 - 1], np.uint64)}, "index 18446744073709551615 is out of range"),
        ({"images": [1.5]}, "whole numbers"),
        ({"images": [[0, 1]]}, "flat list"),
        ({"images": None}, "flat list"),
        ({"steps": 0}, "number of steps is 0"),
        ({"decoder_steps": -3}, "number of steps is -3"),
        ({"sampler": "euler"}, "sampler 'euler' is not known; expected one of ddim"),
        ({"grid": "karas"}, "grid 'karas' is not known; .*; did you mean karras"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance": -5.0}, "guidance is -5.0; expected 0 to "),
        ({"guidance_interval": (2.0, -1.0)}, "LO below HI"),
        ({"labels": "gren"}, "did you mean 'green'"),
        ({"labels": "#3"}, "label '#3' is out of range"),
        ({"labels": []}, "list of labels is empty"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(pipeline, arguments, message):
    arguments = {"images": 4} | arguments
    with pytest.raises(UsageError, match=message):
        pipeline.generate(arguments.pop("images"), **arguments)


def test_arrays_of_another_shape_are_refused(pipeline):
    with pytest.raises(UsageError, match=r"x has shape \[1, 1, 8, 8\]; the bundle expects \['n', 3, 8, 8\]"):
        pipeline.encode(np.zeros((1, 1, 8, 8)))
    with pytest.raises(UsageError, match="as many indices"):
        pipeline.decode(np.zeros((2, 4, 4, 4)), indices=[0])


def test_a_bundle_without_classes_takes_no_label_and_no_guidance(tmp_path):
    write_analytic_bundle(tmp_path / "bundle", classes=(), guidance=1.5)
    pipeline = ul_runtime.load(tmp_path / "bundle")
    assert made(pipeline, 2)[1].tolist() == [0, 0]
    with pytest.raises(UsageError, match="has no classes"):
        pipeline.generate(1, labels="#0")
    with pytest.raises(UsageError, match="the bundle has none"):
        pipeline.generate(1, guidance=2.0)


def test_images_at_different_steps_of_different_tables_are_those_that_each_is_alone(pipeline):
    batch = draw(pipeline, MIXED)
    for i, wanted in enumerate(MIXED):
        for together, alone in zip(batch, draw(pipeline, [wanted]), strict=True):
            assert together[i].tobytes() == alone[0].tobytes(), wanted
    again = draw(pipeline, MIXED[::-1])
    assert all(one[::-1].tobytes() == other.tobytes() for one, other in zip(again, batch, strict=True))


@pytest.mark.parametrize("change", [{"steps": 6}, {"sampler": "ab2"}, {"guidance": 2.5}, {"decoder_steps": 3}])
def test_what_one_image_of_a_batch_asks_changes_that_image_alone(pipeline, change):
    """The control of the test above."""
    first, *others = MIXED
    before, after = (
        draw(pipeline, [each, *others])[1] for each in (first, replace(first, overrides=first.overrides | change))
    )
    assert np.abs(before[0] - after[0]).max() > 1e-4
    assert before[1:].tobytes() == after[1:].tobytes()


def test_an_image_of_a_mixed_batch_is_that_of_generate(pipeline):
    batch, names = draw(pipeline, MIXED)[1], ["red", "green", "blue", "none"]
    for i, each in enumerate(MIXED):
        (alone,) = pipeline.generate([each.index], seed=each.seed, labels=names[each.label], **each.overrides)
        assert alone.x[0].tobytes() == batch[i].tobytes()
