"""Shots and motion: hard cuts are found, and pans, flashes, jerks and noise are not taken for cuts."""

from __future__ import annotations

import os
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from lapa.data.motion import (
    AROUND,
    CameraMeter,
    MotionMeter,
    _shift,
    inside_bars,
    motion_energy,
    moved_as_one,
    share_of_new,
    shot_numbers,
    thumbnails,
)
from lapa.data.video import ClipScan, encode_clip

SHARED = Path(os.environ.get("LAPA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def scene(seed: int, width: int = 96) -> np.ndarray:
    """A made-up landscape of soft blots, float [64, width]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :width]
    image = np.full((64, width), rng.uniform(60, 180))
    for _ in range(40):
        y, x, radius = rng.uniform(0, 64), rng.uniform(0, width), rng.uniform(3, 14)
        image += rng.uniform(-70, 70) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / radius**2)
    return image


def video(images: list[np.ndarray], noise: float = 3.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noisy = [np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8) for image in images]
    return thumbnails([np.repeat(image[..., None], 3, axis=2) for image in noisy])


def still(seed: int, length: int) -> list[np.ndarray]:
    return [scene(seed)] * length


def pan(seed: int, length: int, step: int) -> list[np.ndarray]:
    wide = scene(seed, 96 + step * length)
    return [wide[:, step * number : step * number + 96] for number in range(length)]


def shots(small_THW: np.ndarray) -> list[range]:
    """The frames of each shot."""
    numbers = np.array(list(shot_numbers(small_THW)), np.int64)
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True)]


def starts(small_THW: np.ndarray) -> list[int]:
    return [shot.start for shot in shots(small_THW)]


def test_hard_cuts_are_found() -> None:
    for seed in range(8):
        small = video([*still(seed, 12), *still(seed + 100, 20), *pan(seed + 200, 15, 2)], seed=seed)
        assert [(shot.start, shot.stop) for shot in shots(small)] == [(0, 12), (12, 32), (32, 47)]


def test_a_video_without_cut_is_one_shot() -> None:
    assert shots(video(still(0, 30))) == [range(30)]
    assert shots(video(still(0, 1))) == [range(1)]
    assert shots(thumbnails([])) == [range(0)]


@pytest.mark.parametrize("step", [1, 4, 10])
def test_a_pan_is_no_cut(step: int) -> None:
    for seed in range(6):
        assert starts(video(pan(seed, 40, step))) == [0]
        moving = pan(seed, 20, step)
        assert starts(video([*moving[:1] * 10, *moving, *moving[-1:] * 10])) == [0]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_flash_is_no_cut(length: int) -> None:
    white = [np.full((64, 96), 250.0)] * length
    for seed in range(6):
        assert starts(video([*still(seed, 15), *white, *still(seed, 15)])) == [0]


def test_a_light_that_is_faded_in_is_no_cut() -> None:
    assert starts(video([scene(3) * level for level in np.linspace(0.1, 1, 12)])) == [0]


@pytest.mark.parametrize("repeats", [2, 3, 6, 10])
def test_images_that_come_several_times_are_no_cuts(repeats: int) -> None:
    """As where video of 3 images a second is stored at 30; its first and last move are no different from cuts."""
    for seed in range(4):
        moving = [image for image in pan(seed, 12, 12) for _ in range(repeats)]
        assert set(starts(video(moving))) <= {0, repeats, 11 * repeats}


def test_motion_of_a_meter_equals_that_of_the_whole_video() -> None:
    for length, horizon in ((1, 3), (3, 3), (4, 3), (20, 3)):
        small = video(pan(1, length, 3))
        meter = MotionMeter(horizon)
        for image in small:
            meter.add(image)
        energy = motion_energy(small, min(horizon, length - 1)) if length > 1 else np.zeros(1)
        assert meter.greatest == pytest.approx(energy.max(), abs=1e-6)
    assert MotionMeter(3).greatest == 0.0


def test_a_stalled_stream_is_frozen_and_a_still_camera_is_not() -> None:
    moving, noisy = video(pan(1, 12, 2)), video(still(1, 12))
    for small_THW, share in ((moving, 0.0), (noisy, 0.0), (noisy[[0] * 12], 1.0), (moving[[0, 1, 2, 2, 2]], 0.5)):
        meter = MotionMeter(3)
        for image in small_THW:
            meter.add(image)
        assert meter.frozen == share
    assert MotionMeter(3).frozen == 0.0


def test_bars_are_black_on_two_sides_of_all_frames() -> None:
    frames = np.repeat(np.stack([scene(seed) for seed in (0, 1)])[..., None], 3, axis=3).clip(40, 255).astype(np.uint8)
    assert inside_bars(frames) == (slice(0, 64), slice(0, 96))
    frames[:, :6] = frames[:, -8:] = 16
    assert inside_bars(frames) == (slice(6, 58), slice(0, 96))
    frames[:, :, :10] = 0
    assert inside_bars(frames) == (slice(6, 58), slice(0, 96))
    frames[:, :, -10:] = 3
    assert inside_bars(frames) == (slice(6, 58), slice(10, 86))
    frames[1, 0, 50] = 200
    assert inside_bars(frames)[0] == slice(0, 64)
    assert inside_bars(np.zeros_like(frames)) == (slice(0, 64), slice(0, 96))


def test_something_bright_on_black_has_no_bars() -> None:
    whole, title = (slice(0, 64), slice(0, 96)), np.zeros((1, 64, 96, 3), np.uint8)
    # Strokes of letters.
    title[:, 26:38, 20:76:8] = title[:, 26, 20:76:3] = title[:, 37, 20:76:3] = 255
    assert inside_bars(title) == whole
    # A light in the middle of a scene that is faded in.
    down_HW, right_HW = np.mgrid[-32:32, -48:48]
    faded = (60 * np.exp(-(down_HW**2 + right_HW**2) / 200))[None, ..., None].repeat(3, axis=3).astype(np.uint8)
    assert faded.max() > 2 * faded[:, 0].max() and inside_bars(faded) == whole


def test_shots_are_told_a_few_frames_behind() -> None:
    taken = 0

    def counted():
        nonlocal taken
        for image in video([*still(0, 20), *still(1, 20)]):
            taken += 1
            yield image

    behind = [taken - place for place, _ in enumerate(shot_numbers(counted()))]
    assert max(behind) <= AROUND + 1
    assert len(behind) == 40


@cache
def real_clips() -> list[np.ndarray]:
    paths = [path for name in ("rt1_videos", "calvin_videos") for path in sorted((SHARED / name).glob("*.mp4"))]
    if not paths:
        pytest.skip("the shared sample data are not here")
    return [thumbnails(frame_HWC for _, frame_HWC in ClipScan(path)) for path in paths]


def test_real_clips_are_one_shot_each() -> None:
    assert [len(shots(small)) for small in real_clips()] == [1] * 12


def test_the_joins_of_real_clips_are_found_and_nothing_else() -> None:
    for one, other in list(permutations(real_clips(), 2))[::3]:
        assert starts(np.concatenate([one, other])) == [0, len(one)]


def moving(num: int, seed: int = 0, step: int = 2) -> list[np.ndarray]:
    """Frames of a pan."""
    wide = scene(seed, 96 + step * num).clip(0, 255).astype(np.uint8)
    return [np.repeat(wide[:, step * place : step * place + 96, None], 3, axis=2) for place in range(num)]


@pytest.mark.parametrize(("times", "encoded"), [(2, False), (2.5, True), (3, True), (5, True), (10, True), (10, False)])
def test_images_that_are_repeated_are_counted_once(tmp_path: Path, times: float, encoded: bool) -> None:
    images = moving(30)
    frames = [images[int(place / times)] for place in range(min(90, int(30 * times)))]
    if encoded:
        encode_clip(tmp_path / "film.mp4", frames, 30, keyframe_interval=12)
        frames = [frame_HWC for _, frame_HWC in ClipScan(tmp_path / "film.mp4")]
    assert share_of_new(frames) == pytest.approx(1 / times, rel=0.15)


def test_films_that_move_or_stand_still_repeat_nothing() -> None:
    rng = np.random.default_rng(0)
    images = moving(90)
    waits = [*images[:1] * 30, *images[:20], *images[20:21] * 25, *images[21:40]]
    noisy = [np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8) for image in images[:1] * 60]
    for frames in (images, waits, images[:1] * 60, noisy, images[:2], images[:1], []):
        assert share_of_new(frames) == 1.0


@pytest.mark.parametrize("name", ["rt1_videos", "calvin_videos"])
def test_real_films_repeat_nothing(name: str) -> None:
    paths = sorted((SHARED / name).glob("*.mp4"))
    if not paths:
        pytest.skip("the shared sample data are not here")
    assert all(share_of_new(frame_HWC for _, frame_HWC in ClipScan(path)) == 1.0 for path in paths)


def test_what_a_moving_camera_explains_of_the_change() -> None:
    for pixels, least in ((1, 0.6), (3, 0.85), (6, 0.9)):
        assert least < camera_share(video(pan(1, 20, pixels))) <= 1, pixels
    wide = scene(2, 160)
    shaken = [wide[:, left : left + 96] for left in np.random.default_rng(0).integers(0, 12, 20)]
    assert camera_share(video(shaken)) > 0.85
    passing = [image.copy() for image in still(3, 20)]
    for number, image in enumerate(passing):
        image[20:44, 4 * number : 4 * number + 24] = 230
    assert camera_share(video(passing, noise=1.0)) < 0.5
    flashing = [image + 40 * (number % 2) for number, image in enumerate(still(4, 20))]
    assert camera_share(video(flashing)) < 0.1
    assert camera_share(video(still(1, 1))) == camera_share(np.zeros((5, 32, 32), np.uint8)) == 0
    black_and_noise = np.stack([np.zeros((32, 32), np.uint8), video(still(1, 1))[0]])
    assert camera_share(black_and_noise) < 0.3


def camera_share(small_THW: np.ndarray) -> float:
    meter = CameraMeter()
    for small_HW in small_THW:
        meter.add(small_HW)
    return meter.share


def test_a_shift_in_parts_of_a_pixel() -> None:
    image = np.asarray(scene(6, 96)[:, :, None].repeat(3, axis=2).clip(0, 255), np.uint8)
    one, other = (thumbnails([image[:, left : left + 64]])[0] for left in (5, 8))
    change, left = moved_as_one(one, other)
    # Three of 64 pixels are 1.5 of 32; the content moves to the left.
    assert _shift(one.astype(np.float32), other.astype(np.float32)) == pytest.approx((0, -1.5), abs=0.13)
    assert left < 0.1 * change
