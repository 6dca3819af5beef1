"""Augmentation of pairs: one change a pair, the same on both frames, exact under a seed, nothing at strength zero."""

from __future__ import annotations

import pytest
import torch

from lapa.latent.augment import AugmentConfig, augment_pairs

NOTHING = AugmentConfig(crop=0, brightness=0, contrast=0, saturation=0, hue=0)
STRENGTHS = {"crop": 0.3, "brightness": 0.3, "contrast": 0.5, "saturation": 0.9, "hue": 0.3}


def pairs(batch: int = 4, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 2, 3, size, size), dtype=torch.uint8, generator=seeded(1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(name: str) -> AugmentConfig:
    return AugmentConfig(**{field: STRENGTHS[field] * (field == name) for field in STRENGTHS})


def smooth(size: int = 32) -> torch.Tensor:
    """One pair of equal frames, with channels that fall and rise over the image."""
    ramp = torch.linspace(40, 200, size)
    image = torch.stack((ramp.expand(size, size), ramp.flip(0).expand(size, size), ramp[:, None].expand(size, size)))
    return image.expand(1, 2, 3, size, size).to(torch.uint8)


def test_shape_type_and_input_left_alone():
    frames = pairs()
    before = frames.clone()
    changed = augment_pairs(frames, generator=seeded(0))
    assert changed.dtype == torch.uint8
    assert changed.shape == frames.shape
    assert torch.equal(frames, before)


def test_strength_zero_is_the_identity():
    assert torch.equal(augment_pairs(pairs(), NOTHING), pairs())


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_change_alone_is_the_same_on_both_frames_and_differs_between_pairs(name):
    same = pairs(1)[:, :1].expand(6, 2, 3, 24, 24)
    changed = augment_pairs(same, only(name), seeded(0))
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert not torch.equal(changed[0], same[0])
    assert all(not torch.equal(changed[0], changed[other]) for other in range(1, 6))


def test_the_second_frame_goes_through_the_map_of_the_first():
    """A pixel that does not differ between the frames still does not after any change of colour."""
    frames = pairs()
    frames[:, 1, :, :, :12] = frames[:, 0, :, :, :12]
    changed = augment_pairs(frames, AugmentConfig(crop=0), seeded(0))
    assert torch.equal(changed[:, 0, :, :, :12], changed[:, 1, :, :, :12])
    assert not torch.equal(changed[:, 0], changed[:, 1])


def test_randomness_is_the_generators():
    frames = pairs()
    assert torch.equal(augment_pairs(frames, generator=seeded(3)), augment_pairs(frames, generator=seeded(3)))
    assert not torch.equal(augment_pairs(frames, generator=seeded(3)), augment_pairs(frames, generator=seeded(4)))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = augment_pairs(frames), augment_pairs(frames)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(augment_pairs(frames), first)


def test_an_explicit_generator_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    augment_pairs(pairs(), generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_overflows_is_clamped():
    white = torch.full((32, 2, 3, 8, 8), 255, dtype=torch.uint8)
    changed = augment_pairs(white, AugmentConfig(brightness=0.9), seeded(0)).flatten(1).float()
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert (changed[:, 0] == 255).any()
    assert (changed[:, 0] < 200).any()


def test_hue_saturation_and_contrast_keep_the_mean_grey():
    config = AugmentConfig(crop=0, brightness=0, contrast=0.2, saturation=0.2, hue=0.1)
    grey = smooth().float().mean()
    for seed in range(5):
        assert augment_pairs(smooth(), config, seeded(seed)).float().mean() == pytest.approx(grey, abs=0.5)


def test_hue_leaves_grey_pixels_as_they_are():
    grey = pairs()[:, :, :1].expand(-1, -1, 3, -1, -1)
    assert torch.equal(augment_pairs(grey, only("hue"), seeded(0)), grey)


def test_a_third_of_a_turn_permutes_the_channels():
    from lapa.latent.augment import _rotation_about_grey

    thirds = torch.tensor([0.0, 1.0, 2.0]) * (2 * torch.pi / 3)
    rotations = _rotation_about_grey(thirds)
    permutation = rotations[1].round()
    torch.testing.assert_close(rotations[0], torch.eye(3))
    torch.testing.assert_close(rotations[1], permutation)
    torch.testing.assert_close(rotations[2], permutation @ permutation)
    torch.testing.assert_close(_rotation_about_grey(torch.tensor([0.7]))[0].det(), torch.tensor(1.0))


def test_a_crop_is_a_window_of_the_image_scaled_up():
    """On a ramp, a crop is a ramp again: within the old range, no steeper, its slope the square root of the area."""
    slopes = []
    for seed in range(20):
        changed = augment_pairs(smooth(), only("crop"), seeded(seed))[0, 0].float()
        assert changed.min() >= 40
        assert changed.max() <= 200
        slopes.append((changed[0, 16, 28] - changed[0, 16, 3]).item() / (160 / 31 * 25))
    assert 0.7**0.5 - 0.02 <= min(slopes) < 0.9
    assert 0.95 < max(slopes) <= 1.02


def test_autocast_does_not_coarsen_pixels():
    plain = augment_pairs(pairs(), generator=seeded(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment_pairs(pairs(), generator=seeded(0)), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_computes_what_the_cpu_does():
    on_cpu = augment_pairs(pairs(), generator=seeded(0)).int()
    on_gpu = augment_pairs(pairs().cuda(), generator=seeded(0)).cpu().int()
    assert (on_cpu - on_gpu).abs().max() <= 1


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"uint8 of shape \[B, T, 3, H, W\].*float32"):
        augment_pairs(pairs().float())
    with pytest.raises(ValueError, match=r"\[4, 3, 24, 24\]"):
        augment_pairs(pairs()[:, 0])
