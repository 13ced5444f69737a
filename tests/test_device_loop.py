"""The loop on a device equals the loop on the host, byte for byte, captured or not: here over ONNX Runtime's CPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported_run import PLAIN, exported_run
from host_memory import HostMemory
from mixed_batch import MIXED, draw
from safetensors.numpy import load, save

from ul_runtime.backends import gpu_loop
from ul_runtime.backends.gpu import Scratch
from ul_runtime.backends.gpu_loop import bucket_of
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.backends.ort_cuda import OrtDeviceBackend
from ul_runtime.batches import Images, in_batches
from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.errors import NonFiniteError, OutOfMemoryError, StoppedError, ULError, UsageError
from ul_runtime.images.convert import to_uint8
from ul_runtime.manifest import BundleInfo
from ul_runtime.pipeline import Pipeline

# what is drawn -> overrides of the bundle's settings
LOOPS = {
    "guided in an interval": {"steps": 6, "guidance": 2.0, "guidance_interval": (-3.0, 1.5)},
    "not guided": {"steps": 5, "guidance": 1.0, "sampler": "ab2"},
    "noise in every step": {"steps": 5, "sampler": "sa2", "guidance": 1.5, "guidance_rescale": 0.5},
    "noise in the decoder": {"steps": 3, "decoder_sampler": "ancestral", "decoder_steps": 4},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(PLAIN, tmp_path_factory).bundle


def device(path: Path, memory: HostMemory, *, captured: bool = True) -> Pipeline:
    backend = OrtDeviceBackend(Bundle.open(path), memory, ["CPUExecutionProvider"])
    backend.loop.captures = captured
    if captured:
        backend.loop.bind = memory.recording(backend.loop.bind)
    return Pipeline(Bundle.open(path).manifest, backend)


def on_host(path: Path) -> Pipeline:
    opened = Bundle.open(path)
    return Pipeline(opened.manifest, OrtCpuBackend(opened, threads=1))


def pictures(pipeline: Pipeline, images: object = 5, **options: object) -> np.ndarray:
    return np.concatenate([each.x for each in pipeline.generate(images, **options)])  # type: ignore[arg-type]


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("name", LOOPS)
def test_pictures_are_those_of_the_host_byte_for_byte(bundle, name, captured):
    memory = HostMemory()
    host = on_host(bundle)
    for images, batch_size in ((5, 3), ([7, 2], 2), (1, 1)):
        options = {"seed": 4, "labels": ["#1", "#2", "none"], "batch_size": batch_size, **LOOPS[name]}
        expected = pictures(host, images, **options)
        assert np.isfinite(expected).all()
        assert pictures(device(bundle, memory, captured=captured), images, **options).tobytes() == expected.tobytes()
    assert (memory.replays > 0) == captured


@pytest.mark.parametrize("captured", [True, False])
def test_the_device_makes_the_hosts_pictures_in_uint8_itself(bundle, captured):
    host = on_host(bundle)
    memory = HostMemory()
    there = device(bundle, memory, captured=captured)
    for _ in range(3):
        options = {"seed": 4, "steps": 3, "batch_size": 4}
        expected = np.concatenate([each.images for each in host.generate(6, **options)])
        batches = list(there.generate(6, keep_x=False, **options))
        assert np.concatenate([each.images for each in batches]).tobytes() == expected.tobytes()
    assert 20 < expected.std() < 128
    assert memory.largest_download <= 4 * max(np.prod(there.image_shape), 4 * np.prod(there.latent_shape))
    with pytest.raises(UsageError, match="made with keep_x=False"):
        _ = batches[0].x
    (decoded,) = there.decode(np.zeros((2, *there.latent_shape), np.float32), keep_x=False)
    (exact,) = host.decode(np.zeros((2, *there.latent_shape), np.float32))
    assert decoded.images.tobytes() == exact.images.tobytes()


def test_what_is_not_finite_is_known_without_x(bundle):
    there = device(bundle, HostMemory())
    z_0 = np.zeros((3, *there.latent_shape), np.float32)
    z_0[1] = np.inf
    batches = there.decode(z_0, keep_x=False, batch_size=3)
    (left,) = [next(batches)]
    assert left.indices.tolist() == [0, 2]
    with pytest.raises(NonFiniteError, match="1 of 3 images"):
        next(batches)


def test_the_graph_of_the_pixels_is_the_conversion_of_the_host(bundle):
    backend = on_host(bundle).backend
    x = np.random.default_rng(0).normal(0, 1, (5, *on_host(bundle).image_shape)).astype(np.float32)
    halves = (np.arange(-1, 256) + 0.5) / 127.5 - 1.0
    x[:, 0].flat[:264] = np.float32([*halves, -2, -1, 1, 2, 1e30, -1e30, -0.0])
    out = backend.run("pixels", {"x": x})
    assert out["images"].dtype == np.uint8
    assert out["images"].tobytes() == to_uint8(x).tobytes()
    assert np.isfinite(out["sum"]).all()
    for value in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[2, 0, 3, 4] = value
        assert np.isfinite(backend.run("pixels", {"x": broken})["sum"]).tolist() == [True, True, False, True, True]


GUIDED = {"steps": 6, "seed": 4, "guidance": 2.0, "guidance_interval": (-3.0, 1.5), "guidance_rescale": 0.3}


@pytest.fixture(scope="module")
def lesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with another prior on the same encoder."""
    exported = exported_run(PLAIN, tmp_path_factory)
    manifest = Bundle.open(exported.bundle).manifest
    info = BundleInfo(**{name: getattr(manifest, name) for name in BundleInfo.model_fields})
    weights = load(exported.files["prior.safetensors"])
    files = exported.files | {"prior.safetensors": save({name: 0.8 * array for name, array in weights.items()})}
    return write_bundle(tmp_path_factory.mktemp("lesser") / "bundle", info, files).path


def guided(bundle: Path, lesser: Path, memory: HostMemory, other: HostMemory, **options: bool) -> Pipeline:
    pipeline = device(bundle, memory, **options)
    pipeline.guide = device(lesser, other, **options)
    return pipeline


@pytest.mark.parametrize("captured", [True, False])
def test_a_guide_on_the_same_device_is_asked_there_and_pictures_are_the_hosts(bundle, lesser, captured):
    host, there = (Bundle.open(path) for path in (bundle, lesser))
    guide = Pipeline(there.manifest, OrtCpuBackend(there, threads=1))
    expected = pictures(Pipeline(host.manifest, OrtCpuBackend(host, threads=1), guide), 5, batch_size=3, **GUIDED)
    assert np.abs(expected - pictures(device(bundle, HostMemory()), 5, batch_size=3, **GUIDED)).max() > 1e-3
    memory = HostMemory()
    pipeline = guided(bundle, lesser, memory, memory, captured=captured)
    pictures(pipeline, 5, batch_size=3, **GUIDED)
    before = memory.waits
    assert pictures(pipeline, 5, batch_size=3, **GUIDED).tobytes() == expected.tobytes()
    assert memory.waits - before == 2, "one for each batch"
    assert memory.largest_upload < 1000
    apart = guided(bundle, lesser, HostMemory(), HostMemory())
    assert pictures(apart, 5, batch_size=3, **GUIDED).tobytes() == expected.tobytes(), "asked by the host"


def test_where_memory_is_short_a_guides_steps_are_released_as_well(bundle, lesser, caplog):
    memory = HostMemory()
    expected = pictures(guided(bundle, lesser, memory, memory), 8, batch_size=4, **GUIDED)
    memory = HostMemory(limit=int(1.3 * sum(array.nbytes for array in memory.held.values())))
    assert pictures(guided(bundle, lesser, memory, memory), 8, batch_size=8, **GUIDED).tobytes() == expected.tobytes()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("captured", [True, False])
def test_images_at_different_steps_of_different_tables_are_the_hosts_byte_for_byte(bundle, captured):
    host, there = on_host(bundle), device(bundle, HostMemory(), captured=captured)
    expected = [draw(host, [each]) for each in MIXED]
    for _ in range(2):
        for k, states in enumerate(draw(there, MIXED)):
            assert states.tobytes() == np.concatenate([alone[k] for alone in expected]).tobytes()
    others = draw(there, [MIXED[1], *MIXED[1:]])[1]  # negative control
    assert others[0].tobytes() != expected[0][1].tobytes()
    assert others[1:].tobytes() == np.concatenate([alone[1] for alone in expected[1:]]).tobytes()


def test_encoder_and_bits_are_those_of_the_host(bundle):
    host = on_host(bundle)
    there = device(bundle, HostMemory())
    x = np.random.default_rng(0).uniform(-1, 1, (3, *host.image_shape)).astype(np.float32)
    expected = host.encode(x)
    assert there.encode(x).z_0.tobytes() == expected.z_0.tobytes()
    assert np.array_equal(there.bits(expected.z_clean, num_samples=2), host.bits(expected.z_clean, num_samples=2))


def test_a_change_of_the_order_of_history_is_seen(bundle, monkeypatch):
    """Negative control: two steps back matter to ab3."""
    options = {"steps": 6, "sampler": "ab3", "guidance": 1.0}
    right = pictures(device(bundle, HostMemory()), **options)

    def without_history(memory: HostMemory, state: str, addresses: dict[str, int], shapes: Any) -> Callable[[], None]:
        size = 4 * int(np.prod(shapes[state]))
        return lambda: memory.copy(addresses[state], addresses[f"{state}_next"], size)

    monkeypatch.setattr(gpu_loop, "_shift", without_history)
    assert np.abs(pictures(device(bundle, HostMemory()), **options) - right).max() > 1e-3


def test_steps_seed_sampler_grid_guidance_and_labels_capture_nothing_anew(bundle):
    memory = HostMemory()
    pipeline = device(bundle, memory)
    backend = pipeline.backend
    assert isinstance(backend, OrtDeviceBackend)
    pictures(pipeline, 4, steps=6, guidance=2.0, guidance_interval=(-3.0, 1.5))
    captured, bound = backend.loop.captured, memory.allocations
    assert captured == 3, "prior with one branch and with two, decoder"
    first = pictures(pipeline, 4, steps=6, guidance=2.0)
    for change in (
        {"seed": 1},
        {"labels": "#2"},
        {"steps": 7},
        {"sampler": "unipc2"},
        {"grid": "karras"},
        {"guidance": 3.0},
    ):
        again = pictures(pipeline, 4, **({"steps": 6, "guidance": 2.0} | change))
        assert not np.array_equal(first, again), "replays do not show stale inputs"
    assert np.array_equal(first, pictures(pipeline, 4, steps=6, guidance=2.0))
    assert backend.loop.captured == captured
    assert memory.allocations == bound + 8, "tables before both loops"
    pictures(pipeline, 3, steps=6, guidance=2.0)
    assert backend.loop.captured == captured, "3 images go into the bucket of 4"


def test_buckets_can_be_interleaved(bundle):
    pipeline = device(bundle, HostMemory())
    alone = {n: pictures(device(bundle, HostMemory()), n, steps=4, batch_size=n) for n in (1, 2, 5)}
    for n in (5, 1, 2, 1, 5):
        assert pictures(pipeline, n, steps=4, batch_size=n).tobytes() == alone[n].tobytes()


def test_nothing_is_allocated_or_waited_for_inside_the_loop(bundle):
    memory = HostMemory()
    pipeline = device(bundle, memory)
    pictures(pipeline, 2, steps=4)
    before = memory.allocations, memory.waits
    pictures(pipeline, 2, steps=4)
    few = memory.allocations - before[0], memory.waits - before[1]
    before = memory.allocations, memory.waits
    pictures(pipeline, 2, steps=12)
    assert (memory.allocations - before[0], memory.waits - before[1]) == few == (1, 1)


def test_a_capture_that_fails_is_logged_once_and_the_pictures_are_the_same(bundle, caplog):
    pipeline = device(bundle, HostMemory(refuses_capture=True))
    assert np.array_equal(pictures(pipeline, 2, steps=4), pictures(device(bundle, HostMemory()), 2, steps=4))
    said = [record.message for record in caplog.records]
    assert [line.split(" ")[0] for line in said] == ["prior_step", "prior_step", "decoder_step"]
    assert all("could not be captured: this operation is not permitted" in line for line in said)


def test_with_graphs_required_a_capture_that_fails_is_an_error(bundle):
    pipeline = device(bundle, HostMemory(refuses_capture=True))
    pipeline.backend.loop.require_graphs = True  # type: ignore[attr-defined]
    with pytest.raises(ULError, match="not permitted when stream is capturing"):
        pictures(pipeline, 2, steps=4)


def used(bundle: Path, images: int) -> int:
    memory = HostMemory()
    pictures(device(bundle, memory), images, steps=4, batch_size=images)
    return sum(array.nbytes for array in memory.held.values())


def test_out_of_memory_halves_the_batch_and_makes_the_same_images(bundle, caplog):
    memory = HostMemory(limit=int(used(bundle, 4) * 1.3))
    made = pictures(device(bundle, memory), 9, steps=4, batch_size=8)
    assert made.tobytes() == pictures(device(bundle, HostMemory()), 9, steps=4, batch_size=8).tobytes()
    assert [record.message.split("; ")[1] for record in caplog.records] == ["going on with batches of 4"]


def image_shape(backend: Any) -> tuple[int, ...]:
    """Of x, without the batch."""
    return backend.loop.graphs["pixels"].inputs[0].shape[1:]


def test_tables_that_do_not_fit_release_the_steps_of_the_larger_batch(bundle):
    """Many steps have larger tables, so that the region is what fails, with all steps bound."""
    memory = HostMemory()
    pipeline = device(bundle, memory)
    pictures(pipeline, 8, steps=4, batch_size=8)
    held = sum(array.nbytes for array in memory.held.values())
    memory.limit = held + 1000
    made = pictures(pipeline, 8, steps=40, sampler="ancestral", batch_size=8)
    assert len(made) == 8
    assert sum(array.nbytes for array in memory.held.values()) < held


def test_images_made_again_in_float32_are_so_in_pieces_where_memory_is_short():
    calls = []

    def images(part: np.ndarray, finite: bool) -> Images:
        pixels = np.full((len(part), 1, 1, 1), part.reshape(-1, 1, 1, 1), np.uint8)
        return Images(part, part, pixels, np.full(len(part), finite), np.zeros(len(part), bool))

    def again(part: np.ndarray, batch: int) -> Images:
        calls.append(part.tolist())
        if len(part) > 2:
            raise OutOfMemoryError("no memory left")
        return images(part, finite=True)

    (batch,) = in_batches(5, 5, lambda part, batch: images(part, finite=False), again)
    assert batch.images.ravel().tolist() == batch.indices.tolist() == [0, 1, 2, 3, 4]
    assert batch.in_float32.all()
    assert calls == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1], [2], [3, 4]]


def test_two_threads_can_share_a_pipeline(bundle):
    pipeline = device(bundle, HostMemory())
    alone = [pictures(pipeline, 3, steps=6, seed=seed).tobytes() for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            made = pool.map(lambda seed: pictures(pipeline, 3, steps=6, seed=seed).tobytes(), range(4))
            assert list(made) == alone


def test_a_call_that_does_not_fit_leaves_nothing_behind(bundle):
    memory = HostMemory(limit=5000)
    backend = device(bundle, memory).backend
    with pytest.raises(OutOfMemoryError):
        backend.loop.run("pixels", {"x": np.zeros((64, *image_shape(backend)), np.float32)})  # type: ignore[attr-defined]
    assert memory.held == {}


def test_the_first_error_is_told_where_the_device_fails_again_afterwards(bundle, monkeypatch):
    memory = HostMemory()
    pipeline = device(bundle, memory)

    def failing(*_: object) -> None:
        raise ULError("the first")

    def failing_again() -> None:
        raise ULError("the second")

    monkeypatch.setattr(memory, "copy", failing)
    monkeypatch.setattr(memory, "wait", failing_again)
    with pytest.raises(ULError, match="the first"):
        pictures(pipeline, 1, steps=4)


def test_each_entry_makes_its_device_the_current_one(bundle):
    memory = HostMemory()
    pipeline = device(bundle, memory)
    for entry in (lambda: pictures(pipeline, 1, steps=4), pipeline.backend.loop.release):  # type: ignore[attr-defined]
        before = memory.uses
        entry()
        assert memory.uses > before


def test_where_not_even_one_image_fits_it_is_an_error(bundle):
    memory = HostMemory(limit=1000)
    with pytest.raises(OutOfMemoryError, match="bytes are not left"):
        pictures(device(bundle, memory), 2, steps=4)
    assert memory.held == {}


def test_noise_is_made_on_the_device_and_no_image_travels_there(bundle):
    memory = HostMemory()
    pipeline = device(bundle, memory)
    pictures(pipeline, 4, steps=4, sampler="ancestral", decoder_sampler="ancestral")
    largest = 4 * max(np.prod(pipeline.image_shape), np.prod(pipeline.latent_shape)) * 4
    assert memory.largest_upload < largest / 2
    (decoded,) = pipeline.decode(np.ones((4, *pipeline.latent_shape), np.float32))
    assert memory.largest_upload == 4 * np.prod(pipeline.latent_shape) * 4, "z_0 is what has to"
    assert len(decoded.indices) == 4


def test_a_stop_ends_the_loop_and_gives_its_table_back(bundle):
    memory = HostMemory()
    pipeline = device(bundle, memory)
    pictures(pipeline, 2, steps=6)
    before = set(memory.held)
    done: list[float] = []

    def tick(amount: float) -> None:
        if len(done) == 3:
            raise StoppedError("stopped")
        if amount:
            done.append(amount)

    with pytest.raises(StoppedError):
        pictures(pipeline, 2, steps=6, tick=tick)
    assert len(done) == 3
    assert set(memory.held) == before


def test_scratch_memory_is_shared_and_never_moves():
    memory = HostMemory()
    scratch = Scratch(memory)
    small = scratch.at_least(10)
    assert scratch.at_least(4) == small
    large = scratch.at_least(100)
    assert large != small
    assert scratch.at_least(50) == large
    assert set(memory.held) == {small, large}, "a captured step may still hold the smaller one"
    scratch.release()
    assert memory.held == {}
    assert scratch.at_least(0) in memory.held


def test_buckets_are_powers_of_two():
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
