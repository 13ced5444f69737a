"""ul-doctor tries what is installed, says what is not, and finds what is broken."""

import json

import pytest

from ul_runtime import doctor
from ul_runtime.backends import ort_cpu
from ul_runtime.cli.doctor import main
from ul_runtime.tensorrt.engines import EngineCache, Facts

FACTS = Facts("tiny", "encoder", "a" * 64, "b" * 64, "tensorrt-rtx", "0.0.1", "sm89", "", "1,8,64")


def findings(command, *options):
    result = command(main, "--json", *options)
    return result, {finding["what"]: finding for finding in json.loads(result.out)}


def test_every_library_is_tried_or_said_to_be_missing(command, tmp_path):
    result, found = findings(command, "--engines", tmp_path)
    assert result.code == 0, result
    assert set(found) == {"processors", "ort-cpu", "openvino", "NVIDIA cards", "tensorrt", "tensorrt-rtx", "engines"}
    assert found["ort-cpu"]["works"] is True
    for finding in found.values():
        assert finding["works"] or finding["says"]
        if finding["says"] == "not installed":
            assert finding["advice"].startswith("pip install ")


def test_the_table_is_for_people(command, tmp_path):
    result = command(main, "--engines", tmp_path)
    assert result.code == 0, result
    assert " yes  ort-cpu       onnxruntime " in result.out
    assert f"none in {tmp_path}" in result.out


def test_rtx_builds_an_engine_here(command, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")
    _, found = findings(command, "--engines", tmp_path)
    assert found["tensorrt-rtx"]["works"] is True
    assert "builds ahead, without a card, for sm75, sm80" in found["tensorrt-rtx"]["says"]


def test_a_backend_that_computes_wrongly_is_found(command, monkeypatch, tmp_path):
    right = ort_cpu.product(1)
    monkeypatch.setattr(ort_cpu, "product", lambda threads: lambda a, b: right(a, b) + 1e-2)
    result, found = findings(command, "--engines", tmp_path)
    assert result.code == 1
    assert found["ort-cpu"]["works"] is False
    assert "does not work here: ort-cpu" in result.err


def test_engines_are_counted_and_damage_is_named(command, tmp_path):
    cache = EngineCache(tmp_path / "engines")
    cache.store(FACTS, b"engine")
    _, found = findings(command, "--engines", cache.folder)
    assert found["engines"]["says"].startswith("0 valid, 1 of another version of their library, 0 damaged")
    path = cache.store(FACTS, b"engine")
    path.write_bytes(path.read_bytes()[:-1])
    result, found = findings(command, "--engines", cache.folder)
    assert result.code == 1
    assert path.name in found["engines"]["advice"]


def test_a_card_without_an_architecture_of_the_library_is_said(monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")
    card = doctor.Card(0, "H200", "sm90", 2**37)
    finding = doctor._tensorrt("tensorrt-rtx", [card])
    assert finding.works is True
    assert "not for sm90 of card 0" in finding.says
