"""The scale of real-valued actions: worked by hand, binary dimensions, constants, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lapa.policy.actions import ActionBins, ActionScale, warn_of_ranges

RNG = np.random.default_rng(0)
# As BridgeData's: open or shut, and now and then on the way.
GRIPPER_T = np.array([0.0] * 63 + [1.0] * 178 + [0.16, 0.56, 0.66, 0.79, 0.8, 0.89, 0.975, 0.977, 0.994], np.float32)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def test_worked_by_hand():
    """Of 0 to 100, the 1st and 99th percentile are 1 and 99; beyond them is clamped, both ways."""
    scale = ActionScale.fit(np.arange(101.0)[:, None])
    assert (scale.low_A[0], scale.high_A[0]) == (1, 99)
    np.testing.assert_allclose(scale.encode(column(1, 50, 99, 25.5))[:, 0], [-1, 0, 1, -0.5])
    np.testing.assert_array_equal(scale.encode(column(0, 100, 1e30))[:, 0], [-1, 1, 1])
    np.testing.assert_array_equal(scale.decode(column(-1, 0, 1, -7, 1.01))[:, 0], [1, 50, 99, 1, 99])
    assert scale.count_outside(np.arange(101.0)[:, None]).tolist() == [2]


def test_constants_and_rare_motion_come_back():
    """A dimension that never moves, and one that moves so seldom that both percentiles are its resting place."""
    rare = np.zeros(1000)
    rare[::250] = [-0.2, 0.1, 0.3, 0.5]
    actions_TA = np.stack([np.full(1000, 0.3), rare], axis=1).astype(np.float32)
    scale = ActionScale.fit(actions_TA)
    np.testing.assert_array_equal(scale.encode(actions_TA)[:, 0], 0)
    np.testing.assert_allclose(scale.decode(scale.encode(actions_TA)), actions_TA, atol=1e-7)
    np.testing.assert_array_equal(scale.decode(column(-1, 0.4).repeat(2, 1))[:, 0], np.float32(0.3))


def test_a_binary_dimension_is_said_by_sign():
    actions_TA = np.stack([RNG.normal(size=250), GRIPPER_T], axis=1)
    scale = ActionScale.fit(actions_TA, binary=(False, True))
    assert (scale.low_A[1], scale.high_A[1]) == (0, 1)
    sides = scale.encode(actions_TA)[:, 1]
    np.testing.assert_array_equal(sides, np.where(GRIPPER_T < 0.5, -1, 1))
    said = np.array([[0.0, -3.0], [0.0, -1e-6], [0.0, 0.0], [0.0, 0.4]])
    np.testing.assert_array_equal(scale.decode(said)[:, 1], [0, 0, 1, 1])


def test_bins_of_a_binary_dimension_are_two():
    """With stragglers between its values only where it is declared; two distinct values always."""
    actions_TA = np.stack([RNG.normal(size=250), GRIPPER_T, np.where(GRIPPER_T < 0.5, -1, 1)], axis=1)
    assert ActionBins.fit(actions_TA).counts_A.tolist() == [250, 11, 2]
    bins = ActionBins.fit(actions_TA, 256, (False, True, True))
    assert bins.counts_A.tolist() == [250, 2, 2]
    np.testing.assert_array_equal(bins.decode(bins.encode(actions_TA))[:, 1], np.where(GRIPPER_T < 0.5, 0, 1))
    assert not bins.count_outside(actions_TA).any()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_switch_that_never_moved_stays_where_it_is(value):
    actions_TA = np.full((50, 1), value, np.float32)
    scale, bins = ActionScale.fit(actions_TA, (True,)), ActionBins.fit(actions_TA, 256, (True,))
    assert scale.encode(column(value)) == 0 and bins.counts_A.tolist() == [1]
    np.testing.assert_array_equal(scale.decode(column(-0.5, 0.5))[:, 0], value)


@pytest.mark.parametrize("codec", [ActionScale, ActionBins])
def test_what_is_not_binary_is_named_with_its_values(codec):
    """RT-1's gripper says open, shut or as it is."""
    actions_TA = np.stack([np.zeros(300), np.tile([-1.0, 0, 0, 0, 0, 1.0], 50)], axis=1)
    with pytest.raises(ValueError, match=r"dimension 1 is declared binary, but 17%.*takes -1, 0, 1\); take it out"):
        codec.fit(actions_TA, binary=(False, True))
    with pytest.raises(ValueError, match=r"dimension 0 is declared binary.* and 994 more"):
        codec.fit(RNG.uniform(size=(1000, 1)), binary=(True,))
    with pytest.raises(ValueError, match="3 dimensions are declared binary or not, the actions have 1"):
        codec.fit(RNG.uniform(size=(10, 1)), binary=(True,) * 3)


@settings(deadline=None, max_examples=60)
@given(values=arrays.arrays(np.float32, (20, 3), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_properties_on_any_data(values):
    scale = ActionScale.fit(values)
    coded = scale.encode(values)
    assert coded.dtype == np.float32 and np.abs(coded).max() <= 1
    clamped = np.clip(values, scale.low_A, scale.high_A)
    span_A = scale.high_A.astype(np.float64) - scale.low_A
    assert (np.abs(scale.decode(coded).astype(np.float64) - clamped) <= 1e-6 * span_A + 1e-44).all()
    ends = np.stack([scale.low_A, scale.high_A])
    np.testing.assert_array_equal(scale.decode(scale.encode(ends)), ends)


def test_chunks_of_a_batch_are_encoded_like_rows():
    actions_TA = RNG.normal(size=(60, 2)).astype(np.float32)
    scale = ActionScale.fit(actions_TA)
    chunks = actions_TA.reshape(5, 12, 2)
    np.testing.assert_array_equal(scale.encode(chunks).reshape(60, 2), scale.encode(actions_TA))
    np.testing.assert_array_equal(scale.decode(chunks).reshape(60, 2), scale.decode(actions_TA))


def test_not_a_number_and_wrong_width_are_refused():
    scale = ActionScale.fit(RNG.normal(size=(100, 4)))
    broken = np.zeros((5, 4), np.float32)
    broken[3, 2] = np.nan
    for use in (scale.encode, scale.decode, ActionScale.fit):
        with pytest.raises(ValueError, match="row 3, dimension 2"):
            use(broken)
    for use in (scale.encode, scale.decode, scale.count_outside):
        with pytest.raises(ValueError, match="expected actions of 4 dimensions"):
            use(np.zeros((5, 7), np.float32))
    with pytest.raises(ValueError, match="at least one row"):
        ActionScale.fit(np.zeros((0, 4)))


def test_a_saved_scale_is_the_same(tmp_path):
    scale = ActionScale.fit(np.stack([RNG.normal(size=250), GRIPPER_T], axis=1), (False, True))
    path = tmp_path / "actions.safetensors"
    scale.save(path)
    loaded = ActionScale.load(path)
    for name in ("low_A", "high_A", "binary_A"):
        before, after = getattr(scale, name), getattr(loaded, name)
        np.testing.assert_array_equal(after, before)
        assert after.dtype == before.dtype
    with pytest.raises(ValueError, match=r"actions\.safetensors: not a file of action bins"):
        ActionBins.load(path)
    ActionBins.fit(RNG.normal(size=(9, 2))).save(path)
    with pytest.raises(ValueError, match=r"actions\.safetensors: not a file of action scales"):
        ActionScale.load(path)
    with pytest.raises(ValueError, match=r"absent\.safetensors: missing"):
        ActionScale.load(tmp_path / "absent.safetensors")


def hardly_moving(share: float, dust: float = 1e-9, num: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    """A rotation and a gripper that are float dust but in a share of the steps; and which steps these are."""
    turns = RNG.choice(num, max(2, round(share * num)), replace=False)
    actions_TA = np.stack([RNG.normal(0, dust, num), 1 + RNG.normal(0, 100 * dust, num)], axis=1).astype(np.float32)
    actions_TA[turns, 0] = np.where(np.arange(len(turns)) % 2, -0.3, 0.3)
    actions_TA[turns, 1] = 0
    return actions_TA, turns


@pytest.mark.parametrize("codec", [ActionScale, ActionBins])
@pytest.mark.parametrize("share", [0.0004, 0.002, 0.008, 0.019])
@pytest.mark.parametrize("dust", [0, 1e-9, 1e-6])
def test_rare_moves_amid_float_dust_come_back(codec, share, dust):
    """Percentiles and bins of equal frequency would leave the dust as all that can be predicted."""
    actions_TA, turns = hardly_moving(share, dust)
    fitted = codec.fit(actions_TA)
    back_TA = fitted.decode(fitted.encode(actions_TA))
    np.testing.assert_allclose(back_TA[turns], actions_TA[turns], atol=1e-6)
    np.testing.assert_allclose(back_TA, actions_TA, atol=1e-3)
    assert not fitted.count_outside(actions_TA[turns]).any()


def test_ordinary_motion_keeps_its_percentiles():
    """A rare value a hundred times as far as the others does not stretch the scale."""
    values_N1 = RNG.normal(size=(5000, 1)).astype(np.float32)
    values_N1[0] = 300
    scale = ActionScale.fit(values_N1)
    assert -3 < scale.low_A[0] < -2 and 2 < scale.high_A[0] < 3


def test_dimensions_that_clamping_narrows_are_named(capsys):
    actions_TA = np.stack([RNG.uniform(-1, 1, 5000), RNG.normal(0, 0.01, 5000), RNG.normal(0, 1e-9, 5000)], axis=1)
    actions_TA[::1250, 1:] = 0.3
    actions_TA = actions_TA.astype(np.float32)
    for codec in (ActionScale, ActionBins):
        fitted = codec.fit(actions_TA)
        kept_A = fitted.kept_range(actions_TA)
        assert kept_A[0] > 0.9 and kept_A[1] < 0.3 and kept_A[2] > 0.99
        warn_of_ranges("robot", fitted, actions_TA, ["x", "roll", "yaw"])
        said = capsys.readouterr().err
        assert "which narrows roll to" in said and "values of yaw (" in said and "x to" not in said
    warn_of_ranges("robot", ActionScale.fit(actions_TA[:, :1]), actions_TA[:, :1], ["x"])
    assert not capsys.readouterr().err
