"""Equal-frequency action bins: worked by hand, on ties, and on what real robots send."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lapa.policy.actions import ActionBins

RNG = np.random.default_rng(0)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def test_worked_by_hand():
    """Eight distinct values in four bins: two a bin, edges halfway between, medians as centres."""
    actions_TA = column(0, 1, 2, 3, 10, 11, 20, 30)
    bins = ActionBins.fit(actions_TA, num_bins=4)
    np.testing.assert_array_equal(bins.edges_AN[0], [1.5, 6.5, 15.5, np.inf])
    np.testing.assert_array_equal(bins.centres_AN[0], [0.5, 2.5, 10.5, 25.0])
    np.testing.assert_array_equal(bins.encode(column(-5, 0, 1.4, 1.6, 9, 19, 99))[:, 0], [0, 0, 0, 1, 2, 3, 3])


def test_a_heavy_tie_worked_by_hand():
    """Of 16 values in 4 bins, a value that occurs 10 times has its own bin; below and above it, one bin each."""
    actions_TA = column(*[-3, -2, -1], *[0] * 10, *[1, 2, 3])
    bins = ActionBins.fit(actions_TA, num_bins=4)
    np.testing.assert_array_equal(bins.edges_AN[0], [-0.5, 0.5, np.inf])
    np.testing.assert_array_equal(bins.centres_AN[0], [-2, 0, 2])


def test_clipped_actions_decode_to_exactly_one():
    """Meta-World clips to [-1, 1]: both ends are shared by many, and most of the 256 bins must stay in use."""
    actions_TA = np.clip(RNG.normal(0, 0.8, (5000, 3)), -1, 1).astype(np.float32)
    bins = ActionBins.fit(actions_TA)
    assert bins.counts_A.min() >= 250
    clipped = np.abs(actions_TA) == 1
    decoded_TA = bins.decode(bins.encode(actions_TA))
    np.testing.assert_array_equal(decoded_TA[clipped], actions_TA[clipped])
    assert np.abs(decoded_TA - actions_TA).mean() < 0.005


def test_bins_are_of_equal_frequency_where_nothing_is_shared():
    actions_TA = RNG.normal(size=(25600, 1)).astype(np.float32)
    bins = ActionBins.fit(actions_TA)
    assert bins.counts_A.tolist() == [256]
    counts = np.bincount(bins.encode(actions_TA)[:, 0])
    assert counts.min() >= 99 and counts.max() <= 101


def test_a_gripper_keeps_its_values():
    """A few distinct values: a bin for each, decoded exactly; and a constant dimension has one."""
    gripper = RNG.choice(np.array([-1, 0.1, 1], np.float32), 1000)
    actions_TA = np.stack([gripper, np.full(1000, 0.3, np.float32)], axis=1)
    bins = ActionBins.fit(actions_TA)
    assert bins.counts_A.tolist() == [3, 1]
    np.testing.assert_array_equal(bins.decode(bins.encode(actions_TA)), actions_TA)


@settings(deadline=None, max_examples=60)
@given(
    values=arrays.arrays(
        np.float32, st.integers(1, 200), elements=st.integers(-40, 40).map(lambda n: np.float32(n / 8))
    ),
    num_bins=st.integers(2, 16),
)
def test_properties_on_any_data(values, num_bins):
    bins = ActionBins.fit(values[:, None], num_bins)
    codes = bins.encode(values[:, None])[:, 0]
    assert len(bins.centres_AN[0]) == bins.counts_A[0] <= num_bins
    assert set(codes) == set(range(bins.counts_A[0])), "every bin holds data"
    order = np.argsort(values, kind="stable")
    assert (np.diff(codes[order]) >= 0).all(), "bins are in the order of the values"
    decoded = bins.decode(codes[:, None])
    np.testing.assert_array_equal(bins.encode(decoded)[:, 0], codes)
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        if count * num_bins > 2 * len(values):
            np.testing.assert_array_equal(decoded[values == value], value)


def test_out_of_range_is_clamped_and_counted():
    bins = ActionBins.fit(np.stack([np.linspace(-1, 1, 999), np.linspace(0, 5, 999)], axis=1))
    far = np.array([[[-7, 2.0], [0.0, 5.5]], [[3.0, -0.1], [0.5, 1.0]]], np.float32)
    codes = bins.encode(far)
    assert codes[0, 0, 0] == 0 and codes[1, 0, 0] == bins.counts_A[0] - 1
    assert bins.count_outside(far).tolist() == [2, 2]


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_bin_that_is_not_there_is_refused(bad):
    bins = ActionBins.fit(np.stack([np.arange(300.0), np.arange(300.0) % 3], axis=1))
    with pytest.raises(ValueError, match="action dimension 1 has bins 0 to 2"):
        bins.decode(np.array([[5, bad]]))


def test_not_a_number_and_wrong_width_are_refused():
    bins = ActionBins.fit(RNG.normal(size=(100, 4)))
    broken = np.zeros((5, 4), np.float32)
    broken[3, 2] = np.nan
    for use in (bins.encode, ActionBins.fit):
        with pytest.raises(ValueError, match="row 3, dimension 2"):
            use(broken)
    with pytest.raises(ValueError, match="expected actions of 4 dimensions"):
        bins.encode(np.zeros((5, 7), np.float32))
    with pytest.raises(ValueError, match="at least one row"):
        ActionBins.fit(np.zeros((0, 4)))


def test_saved_bins_are_the_same(tmp_path):
    actions_TA = np.clip(RNG.normal(size=(3000, 4)), -1, 1).astype(np.float32)
    bins = ActionBins.fit(actions_TA)
    bins.save(tmp_path / "actions.safetensors")
    loaded = ActionBins.load(tmp_path / "actions.safetensors")
    for name in ("edges_AN", "centres_AN", "counts_A", "low_A", "high_A"):
        before, after = getattr(bins, name), getattr(loaded, name)
        np.testing.assert_array_equal(after, before)
        assert after.dtype == before.dtype
    (tmp_path / "other.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"other\.safetensors: not a file of action bins"):
        ActionBins.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"absent\.safetensors: missing"):
        ActionBins.load(tmp_path / "absent.safetensors")
