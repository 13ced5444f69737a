"""Engines on the disk: found again by all that they depend on, rebuilt with a reason, and never another's."""

import os
from dataclasses import asdict, replace

import pytest

from ul_runtime.backends.tensorrt_engines import EngineCache, Facts
from ul_runtime.errors import StoppedError, UntrustedError
from ul_runtime.progress import silent

FACTS = Facts(
    bundle="garments-32",
    graph="prior_step",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    library="tensorrt-rtx",
    version="1.7.1",
    targets="sm86,sm89",
    gpu="",
    profile="1,8,64",
    flags="no TF32",
)
ENGINE = bytes(range(256)) * 10


@pytest.fixture
def cache(tmp_path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_an_engine_comes_back_and_the_folder_is_the_owners_alone(cache):
    assert cache.load(FACTS) is None
    path = cache.store(FACTS, ENGINE)
    assert cache.load(FACTS) == ENGINE
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [(entry.path, entry.facts, entry.problem) for entry in cache.entries()] == [(path, FACTS, "")]


@pytest.mark.parametrize("fact", sorted(asdict(FACTS)))
def test_every_fact_counts(cache, fact):
    cache.store(FACTS, ENGINE)
    assert cache.load(replace(FACTS, **{fact: "other"})) is None


def test_an_engine_for_more_architectures_serves_one_of_them(cache):
    cache.store(FACTS, ENGINE)
    assert cache.find(replace(FACTS, targets="sm89")) == ENGINE
    assert cache.find(replace(FACTS, targets="sm80")) is None
    assert cache.find(replace(FACTS, targets="sm89", version="2")) is None
    assert cache.find(replace(FACTS, targets="", gpu="a GPU, sm89")) is None


def test_an_engine_of_larger_batches_serves_smaller_ones_and_the_smallest_is_taken(cache):
    for most in (128, 32, 64):
        cache.store(replace(FACTS, profile=f"1,8,{most}"), ENGINE + str(most).encode())
    asked = replace(FACTS, profile="1,8,64", targets="sm89")
    assert cache.find(asked, 4) == ENGINE + b"32"
    assert cache.find(asked, 33) == ENGINE + b"64"
    assert cache.find(asked, 65) == ENGINE + b"128"
    assert cache.find(asked, 129) is None
    assert cache.find(FACTS, 4) == ENGINE + b"32", "its kernels are for the smallest batches"
    assert cache.find(replace(FACTS, profile="1,8,16")) is None


def test_an_engine_whose_weights_can_be_replaced_serves_as_any_and_is_found_for_others(cache):
    refittable = replace(FACTS, flags="no TF32, refittable", weights_sha256="c" * 64)
    cache.store(refittable, ENGINE)
    assert cache.find(replace(FACTS, weights_sha256="c" * 64)) == ENGINE
    assert cache.find(FACTS) is None
    assert cache.with_other_weights(FACTS, "refittable") == refittable
    assert cache.with_other_weights(FACTS, "refittable", 32) == refittable
    assert cache.with_other_weights(FACTS, "refittable", 65) is None
    assert cache.with_other_weights(replace(FACTS, graph_sha256="d" * 64), "refittable") is None
    cache.store(FACTS, ENGINE)
    assert cache.with_other_weights(replace(FACTS, weights_sha256="e" * 64), "refittable") == refittable
    assert cache.find(replace(refittable, weights_sha256=FACTS.weights_sha256)) is None, "that one is not refittable"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "1.8.0"}, "the library is of another version (1.7.1, now 1.8.0)"),
        ({"weights_sha256": "c" * 64}, "the weights have changed"),
        ({"targets": "", "gpu": "H200, sm90"}, "it was built for another GPU (none, now H200, sm90); "
         "it was built for other architectures (sm86,sm89, now none)"),
        ({"profile": "1,8,128"}, "it takes other batches (1,8,64, now 1,8,128)"),
        ({"graph": "decoder_step"}, "there is none yet"),
        ({"bundle": "garments"}, "there is none yet"),
    ],
)  # fmt: skip
def test_the_reason_for_building_is_what_changed(cache, change, why):
    cache.store(FACTS, ENGINE)
    assert cache.why(replace(FACTS, **change)) == why


def test_the_reason_is_told_against_the_nearest_engine(cache):
    cache.store(replace(FACTS, version="1.6", weights_sha256="d" * 64), ENGINE)
    cache.store(replace(FACTS, version="1.6"), ENGINE)
    assert cache.why(FACTS) == "the library is of another version (1.6, now 1.7.1)"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"x" + data[1:],
        lambda data: data.replace(b'"size"', b'"sise"'),
        lambda data: data.split(b"\n")[0] + b"\n[]\n",
        lambda data: b"",
    ],
)
@pytest.mark.case("B6", "an engine that is damaged or another user's", "not used; it is built again, or refused")
def test_a_damaged_engine_is_not_used_and_the_reason_says_so(cache, damage):
    path = cache.store(FACTS, ENGINE)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load(FACTS) is None
    assert cache.why(FACTS).startswith("the one that is there is damaged")
    (entry,) = cache.entries()
    assert entry.facts is None
    assert entry.problem
    cache.store(FACTS, ENGINE)
    assert cache.load(FACTS) == ENGINE


def test_an_engine_under_the_name_of_another_is_not_used(cache):
    path = cache.store(FACTS, ENGINE)
    other = replace(FACTS, version="1.8.0")
    path.rename(path.with_name(other.file_name))
    assert cache.load(other) is None


def test_a_folder_or_file_that_others_may_write_to_is_refused(cache):
    path = cache.store(FACTS, ENGINE)
    for place, mode in ((path, 0o666), (path.parent, 0o770)):
        before = place.stat().st_mode
        place.chmod(mode)
        with pytest.raises(UntrustedError, match="others may write to it"):
            cache.load(FACTS)
        place.chmod(before)
    assert cache.load(FACTS) == ENGINE
    path.parent.chmod(0o777)
    with pytest.raises(UntrustedError, match="others may write to it"):
        cache.store(FACTS, ENGINE)


@pytest.mark.case("B6")
def test_an_engine_of_another_user_is_refused(cache, monkeypatch):
    cache.store(FACTS, ENGINE)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UntrustedError, match="belongs to another user"):
        cache.load(FACTS)


def test_a_link_is_not_followed(cache, tmp_path):
    path = cache.store(FACTS, ENGINE)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.load(FACTS) is None


def test_any_name_of_a_bundle_makes_a_file_name(cache):
    facts = replace(FACTS, bundle="../../my bundle/ü" * 20)
    assert cache.store(facts, ENGINE).parent == cache.folder
    assert cache.load(facts) == ENGINE


def test_while_one_builds_another_waits_and_can_be_stopped(cache, caplog):
    asked = []

    def tick(amount: float) -> None:
        asked.append(amount)
        if len(asked) > 2:
            raise StoppedError("stopped")

    with (
        cache.building(FACTS, silent),
        pytest.raises(StoppedError),
        cache.building(FACTS, tick),
    ):
        raise AssertionError("two at once")
    assert caplog.messages == [f"prior_step: another process builds an engine in {cache.folder}; waiting for it"]
    with cache.building(FACTS, silent):
        assert len(caplog.messages) == 1
    assert asked == [0, 0, 0]
    assert os.listdir(cache.folder) == []


def test_a_foreign_engine_of_the_same_graph_is_refused_where_one_is_looked_for(cache):
    path = cache.store(FACTS, ENGINE)
    path.chmod(0o666)
    with pytest.raises(UntrustedError, match="belongs to another user or others may write to it"):
        cache.find(replace(FACTS, targets="sm89"), 4)


def test_a_folder_in_the_place_of_an_engine_is_refused_and_not_opened(cache):
    path = cache.store(FACTS, ENGINE)
    path.unlink()
    path.mkdir()
    with pytest.raises(UntrustedError, match="not a plain file; remove it"):
        cache.load(FACTS)
    assert [(entry.facts, entry.trusted) for entry in cache.entries()] == [(None, False)]
