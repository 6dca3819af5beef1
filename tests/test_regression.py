"""Regressions and counts of the probe: each finds what is there, and nothing where there is nothing."""

import numpy as np
import pytest
import torch

from lapa.latent.metrics import (
    equal_frequency_bins,
    hold_out,
    linear_accuracy,
    mlp,
    mutual_information,
    r2,
    ridge,
    scores,
)

# No warning of the libraries that fit reaches the user.
pytestmark = pytest.mark.filterwarnings("error")


def ridge_r2(features_BF, targets_BA, test_B):
    return r2(ridge(features_BF, targets_BA, test_B)[test_B], targets_BA[test_B], targets_BA[~test_B].mean(0))


def test_ridge_finds_a_linear_relation_and_no_other() -> None:
    rng = np.random.default_rng(0)
    features, noise = rng.normal(size=(400, 5)), rng.normal(size=(400, 1))
    targets = np.concatenate([features[:, :1] * 2 + 3, noise, np.ones((400, 1))], axis=1)
    test_B = np.arange(400) >= 300
    found = ridge_r2(features, targets, test_B)
    assert found[0] > 0.99
    assert found[1] < 0.1
    assert np.isnan(found[2])
    # More features than rows: the penalty grows until the noise among them does no harm.
    wide = np.concatenate([features[:, :1].repeat(100, 1), rng.normal(size=(400, 400))], axis=1)
    assert ridge_r2(wide, targets, test_B)[0] > 0.7


def test_mlp_finds_a_product_and_is_the_same_for_a_seed() -> None:
    rng = np.random.default_rng(0)
    features, groups_B = rng.normal(size=(600, 3)), np.repeat(np.arange(30), 20)
    targets = (features[:, :1] * features[:, 1:2]) * 5 + 2
    test_B = hold_out(groups_B)
    predicted = mlp(features, targets, test_B, groups_B)
    assert scores(predicted, targets, test_B)["r2"] > 0.8 > 0.2 > ridge_r2(features, targets, test_B)[0]
    np.testing.assert_array_equal(predicted, mlp(features, targets, test_B, groups_B))


@pytest.mark.parametrize("dims", [1, 2])
def test_two_pairs_are_few_and_no_error(dims: int) -> None:
    predicted = mlp(np.eye(2), np.ones((2, dims)), np.array([False, True]), np.arange(2))
    assert predicted.shape == (2, dims)


def test_scores_of_the_mean_are_zero_and_one() -> None:
    targets = np.stack([np.arange(10.0), np.ones(10)], axis=1)
    test_B = np.arange(10) % 2 == 0
    mean = np.broadcast_to(targets[~test_B].mean(0), targets.shape)
    assert scores(mean, targets, test_B)["r2_per_dimension"] == [0.0, None]
    assert scores(targets, targets, test_B)["standardised_mse"] == 0.0
    assert r2(targets, targets, mean[0]).tolist()[0] == 1.0


def test_held_out_rows_are_whole_groups() -> None:
    groups_B = np.repeat(np.arange(10), 3)
    test_B = hold_out(groups_B)
    assert test_B.sum() == 6
    assert not set(groups_B[test_B]) & set(groups_B[~test_B])
    assert not hold_out(np.zeros(5)).any()


def test_linear_accuracy_of_separable_and_of_permuted_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 800)
    features = np.eye(8)[labels] + rng.normal(scale=0.2, size=(800, 8))
    test_B = np.arange(800) >= 600
    assert linear_accuracy(features, labels, test_B) > 0.98
    assert linear_accuracy(torch.from_numpy(features), rng.permutation(labels), torch.from_numpy(test_B)) < 0.25


def test_mutual_information_is_corrected_by_permutation() -> None:
    rng = np.random.default_rng(0)
    bins_B = equal_frequency_bins(rng.normal(size=800), 8)
    assert np.bincount(bins_B).tolist() == [100] * 8
    same = mutual_information(bins_B, bins_B)
    assert same["nats"] == pytest.approx(np.log(8))
    assert same["known"] == pytest.approx(1.0)
    # 400 codes for 800 pairs seem to know much, and know nothing.
    many = mutual_information(rng.integers(0, 400, 800), bins_B)
    assert many["nats"] > 1
    assert abs(many["known"]) < 0.1
    assert mutual_information(np.arange(800), bins_B)["known"] is None
    assert equal_frequency_bins(np.array([-1.0, -1, -1, 1]), 8).tolist() == [0, 0, 0, 1]
