"""Precision, recall, density, coverage and copies: their definitions, and what is known of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul_export.evaluation.measures import note_of_copies
from ul_export.evaluation.statistics import (
    density_coverage,
    nearest,
    precision_recall,
    share_nearer,
    squared_distances,
    squared_radii,
)


def points(count: int, dimensions: int = 3, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, dimensions)).astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b))


def radius(centres: np.ndarray, i: int, k: int) -> float:
    return sorted(distance(centres[i], other) for j, other in enumerate(centres) if j != i)[k - 1]


def within_any(point: np.ndarray, centres: np.ndarray, k: int) -> bool:
    return any(distance(point, centre) <= radius(centres, i, k) for i, centre in enumerate(centres))


@given(seed=st.integers(0, 50), k=st.integers(1, 5), shift=st.floats(-1.0, 2.0))
def test_precision_and_recall_are_their_definitions(seed, k, shift):
    samples, real = points(12, seed=seed, shift=shift), points(10, seed=seed + 100)
    expected = np.mean([within_any(s, real, k) for s in samples]), np.mean([within_any(r, samples, k) for r in real])
    assert precision_recall(samples, real, k) == pytest.approx(expected)


@given(seed=st.integers(0, 50), k=st.integers(1, 5), shift=st.floats(-1.0, 2.0))
def test_density_and_coverage_are_their_definitions(seed, k, shift):
    samples, real = points(12, seed=seed, shift=shift), points(10, seed=seed + 100)
    radii = [radius(real, i, k) for i in range(len(real))]
    inside = np.array([[distance(s, r) <= radii[i] for i, r in enumerate(real)] for s in samples])
    expected = inside.sum() / (k * len(samples)), inside.any(axis=0).mean()
    assert density_coverage(samples, real, k) == pytest.approx(expected)


def test_the_definitions_tell_samples_apart_and_so_do_the_figures():
    """The control of the two above: none of the four is constant."""
    real, near, far = points(200), points(200, seed=1), points(200, seed=1, shift=3.0)
    for figures in (precision_recall, density_coverage):
        assert all(good > bad + 0.3 for good, bad in zip(figures(near, real), figures(far, real), strict=True))


def test_radii_and_distances_are_exact_over_several_chunks_and_far_from_the_origin():
    features = points(1100) + np.float32(1000.0)
    brute = np.linalg.norm(features[:, None].astype(np.float64) - features, axis=2)
    assert np.sqrt(squared_distances(features, features)) == pytest.approx(brute, abs=1e-5)
    assert np.sqrt(squared_radii(features, 3)) == pytest.approx(np.sort(brute, axis=1)[:, 3], abs=1e-6)
    assert np.sqrt(squared_radii(features, 3)) != pytest.approx(np.sort(brute, axis=1)[:, 2], abs=1e-6)  # the control


def test_one_distribution_has_density_one_and_the_coverage_that_theory_says():
    k, count = 5, 60
    found = np.array([density_coverage(points(count, seed=s), points(count, seed=9000 + s), k) for s in range(100)])
    none_of_mine = np.prod([(count - i) / (2 * count - i) for i in range(1, k + 1)])  # Naeem et al. 2020, lemma 2
    expected = np.array([1.0, 1.0 - none_of_mine])
    assert (np.abs(found.mean(axis=0) - expected) < 4 * found.std(axis=0) / 10).all()
    assert abs(expected[1] - (1 - 2**-k)) < 0.01


def test_samples_at_one_place_have_precision_and_no_recall_or_coverage():
    real = points(200)
    collapsed = np.repeat(real.mean(axis=0, keepdims=True), 200, axis=0) + 1e-4 * points(200, seed=1)
    precision, recall = precision_recall(collapsed, real)
    assert (precision, recall) == (1.0, 0.0)
    assert density_coverage(collapsed, real)[1] < 0.2


@given(chunk=st.integers(1, 30))
def test_a_search_in_chunks_finds_the_nearest_of_all(chunk):
    queries, among = points(6), points(25, seed=1)
    index, far = nearest(queries, (among[first : first + chunk] for first in range(0, len(among), chunk)), 4)
    brute = np.linalg.norm(queries[:, None].astype(np.float64) - among, axis=2)
    assert np.array_equal(index, np.argsort(brute, axis=1)[:, :4])
    assert far == pytest.approx(np.sort(brute, axis=1)[:, :4], abs=1e-6)


@given(
    a=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    b=st.lists(st.integers(0, 6), min_size=1, max_size=8),
)
def test_the_share_of_nearer_samples_counts_pairs_and_halves_ties(a, b):
    pairs = [1.0 if x < y else 0.5 if x == y else 0.0 for x in a for y in b]
    assert share_nearer(np.array(a, float), np.array(b, float)) == pytest.approx(np.mean(pairs))


def test_copies_are_nearer_than_held_out_images_and_fresh_draws_are_not():
    train, heldout, fresh = points(400), points(300, seed=1), points(300, seed=2)

    def to_train(queries: np.ndarray) -> np.ndarray:
        return nearest(queries, [train], 1)[1][:, 0]

    assert share_nearer(to_train(train[:300]), to_train(heldout)) == 1.0
    assert share_nearer(to_train(fresh), to_train(heldout)) == pytest.approx(0.5, abs=0.1)
    assert share_nearer(to_train(fresh + np.float32(9.0)), to_train(heldout)) == 0.0


@pytest.mark.case(
    "N14",
    "the search for copies on samples of a poor model",
    "a note says that it says nothing, where samples are farther from training images than unseen real images are",
)
def test_the_search_for_copies_says_when_it_says_nothing():
    real, samples, train = points(300), points(300, seed=1), points(300, seed=2)
    for moved, says_nothing in ((samples, False), (train, False), (samples + np.float32(4.0), True)):
        distances = [nearest(of, [train], 1)[1][:, 0] for of in (moved, real)]
        record = {"nearer_than_heldout": share_nearer(*distances)}
        record |= {"median_distance": np.median(distances[0]), "heldout_median_distance": np.median(distances[1])}
        assert any("says nothing" in note for note in note_of_copies(record)) == says_nothing
