"""ul-export --tensorrt: engines of a finished bundle, built ahead for named architectures and built once."""

import inspect
import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from analytic_bundle import write_analytic_bundle

from ul_export.cli import _build_of, main
from ul_export.engines import build_engines, open_engines
from ul_runtime import machine
from ul_runtime.backends import tensorrt_build
from ul_runtime.backends.tensorrt_engines import EngineCache, engines_for_gpu
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, StoppedError, UsageError
from ul_runtime.machine import Gpu

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")


def test_engines_are_built_once_and_the_reason_of_each_build_is_said(analytic_bundle, tmp_path, command):
    options = ["--tensorrt", "--target", "sm89", "--engines", tmp_path / "engines", "--json"]
    first = command(main, analytic_bundle, *options)
    assert first.code == 0, first
    figures = json.loads(first.out)
    assert (figures["engines_built"], figures["engines_for"]) == (4, "sm89")
    assert first.err.count("there is none yet") == 4
    again = command(main, analytic_bundle, *options)
    assert json.loads(again.out) == figures | {"engines_built": 0}
    assert "building an engine" not in again.err
    other = command(main, analytic_bundle, *options, "--target", "sm120")
    assert json.loads(other.out)["engines_built"] == 4
    assert other.err.count("it was built for other architectures (sm89, now sm89,sm120)") == 4


def test_a_stop_says_what_is_kept(analytic_bundle, tmp_path, monkeypatch):
    engines = open_engines(["sm89"], 8, tmp_path / "engines")

    def tick(amount: float) -> None:
        if len(list(engines.cache.entries())) == 1:
            raise StoppedError("stopped")

    @contextmanager
    def after_the_first(*_):
        yield tick

    monkeypatch.setattr("ul_export.engines.progress", after_the_first)
    with pytest.raises(StoppedError, match=r"1 of 4 engines are in .*engines; run the same command again to go on"):
        build_engines(engines, analytic_bundle)
    assert len(list(engines.cache.entries())) == 1


def test_new_weights_build_anew(tmp_path, command):
    options = ["--tensorrt", "--target", "sm89", "--engines", tmp_path / "engines"]
    write_analytic_bundle(tmp_path / "a")
    write_analytic_bundle(tmp_path / "b", latent_std=0.4)
    assert command(main, tmp_path / "a", *options).code == 0
    result = command(main, tmp_path / "b", *options)
    assert "have changed" in result.err or "has changed" in result.err, result


def test_misuse_is_refused_before_any_work(analytic_bundle, tmp_path, command):
    command.fails(main, 2, "give that too", analytic_bundle, "--target", "sm89")
    command.fails(main, 2, "--max-batch is 0; expected 1 or more", analytic_bundle, "--tensorrt", "--max-batch", 0)
    command.fails(main, 2, "does not build for 'sm1'", analytic_bundle, "--tensorrt", "--target", "sm1")
    command.fails(main, 2, "leave out --target", analytic_bundle, "--tensorrt", "--refittable", "--target", "sm89")
    command.fails(main, 2, "is a bundle", analytic_bundle, "--tensorrt", "--target", "sm89", "--fp16")
    engines = tmp_path / "engines"
    engines.mkdir()
    engines.chmod(0o777)
    result = command(main, analytic_bundle, "--tensorrt", "--target", "sm89", "--engines", engines)
    assert result.code == 77
    assert "others may write to it" in result.err
    assert list(EngineCache(engines).entries()) == []


def test_a_run_that_is_not_there_and_a_folder_that_cannot_be_are_refused_before_any_work(tmp_path, command):
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    words = ("--tensorrt", "--target", "sm89", "--out", tmp_path / "bundle", "--engines")
    command.fails(main, 65, "no run: no such run, bundle or model", tmp_path / "no run", *words, tmp_path / "file")
    command.fails(main, 74, "cannot write: Not a directory", tmp_path / "run", *words, tmp_path / "file")


def test_what_cannot_be_built_after_an_export_says_that_the_bundle_is_whole():
    def refused(bundle):
        raise BadInputError("b.bundle: prior_step: TensorRT-RTX cannot build it")

    with pytest.raises(BadInputError, match=r"cannot build it; the bundle b\.bundle is whole"):
        _build_of(Path("b.bundle"), refused)


def test_a_link_to_a_folder_of_ones_own_is_that_folder(analytic_bundle, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    cache = open_engines(["sm89"], 8, tmp_path / "link").cache
    assert cache.folder == (tmp_path / "real").resolve()


def test_a_stop_after_an_export_says_that_the_bundle_is_whole_and_how_to_go_on():
    def stopped(bundle):
        raise StoppedError("stopped; 1 of 4 engines are in engines; run the same command again to go on")

    with pytest.raises(StoppedError) as caught:
        _build_of(Path("b.bundle"), stopped)
    assert str(caught.value) == (
        "stopped; 1 of 4 engines are in engines; the bundle b.bundle is whole: "
        "go on with ul-export b.bundle --tensorrt and the options for engines that you gave"
    )


def test_without_a_gpu_and_an_architecture_the_way_out_is_said(analytic_bundle, command, monkeypatch):
    def none() -> list[Gpu]:
        raise UsageError("no NVIDIA GPU can be used: there is no NVIDIA driver")

    monkeypatch.setattr("ul_export.engines.gpus", none)
    command.fails(main, 2, "--target sm89 builds ahead", analytic_bundle, "--tensorrt")
    monkeypatch.setattr("ul_export.engines.gpus", list)
    command.fails(main, 2, "this machine has no NVIDIA GPU; --target sm89", analytic_bundle, "--tensorrt")


def test_what_is_built_for_this_machines_gpu_is_what_its_backend_looks_for(analytic_bundle, tmp_path, monkeypatch):
    gpu = [Gpu(0, "Test GPU", "sm89", 2**30)]
    monkeypatch.setattr("ul_export.engines.gpus", lambda: gpu)
    monkeypatch.setattr("ul_runtime.backends.tensorrt_engines.gpus", lambda: gpu)
    built, wanted = open_engines([], 32, tmp_path), engines_for_gpu(0, tmp_path)
    bundle = Bundle.open(analytic_bundle)
    built.cache.store(built.facts(bundle, "prior_step"), b"engine")
    assert wanted.cache.find(wanted.facts(bundle, "prior_step"), 4) == b"engine"


def test_weights_that_cannot_be_replaced_are_said_and_the_engine_is_built(analytic_bundle, tmp_path, caplog):
    """Really: without a GPU the library cannot even load an engine."""
    bundle = Bundle.open(analytic_bundle)
    engines = replace(open_engines(["sm89"], 8, tmp_path / "engines"), gpu="a GPU")
    facts = engines.facts(bundle, "encoder")
    other = replace(facts, weights_sha256="c" * 64, flags=f"{facts.flags}, refittable")
    engines.cache.store(other, b"no engine at all")
    prepared = engines.engine(bundle, "encoder")
    assert "the weights have changed" in str(prepared.built_because)
    assert engines.cache.load(facts) == prepared.engine != b"no engine at all"
    assert caplog.messages[0].startswith("encoder: new weights into the engine that is there, by TensorRT-RTX")
    assert "has to be built, its weights cannot be replaced" in caplog.messages[1]


def test_the_library_has_what_replacing_weights_calls():
    api = pytest.importorskip("tensorrt_rtx")
    source = inspect.getsource(tensorrt_build)
    assert set(re.findall(r"refitter\.(\w+)\(", source)) <= set(dir(api.Refitter))
    assert hasattr(api.OnnxParserRefitter, "refit_from_bytes")
    assert hasattr(api.BuilderFlag, "REFIT")


def test_the_bindings_have_what_the_gpus_are_asked_for():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    about = runtime.cudaDeviceProp()
    assert {"name", "major", "minor", "totalGlobalMem"} <= set(dir(about))
    assert len(runtime.cudaGetDeviceCount()) == len(runtime.cudaDriverGetVersion()) == 2
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        assert all(gpu.architecture.startswith("sm") and gpu.memory > 0 for gpu in machine.gpus())
    else:
        with pytest.raises(UsageError, match="no NVIDIA GPU can be used"):
            machine.gpus()
