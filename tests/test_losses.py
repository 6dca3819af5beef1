"""The losses that options add: they cannot be lowered by collapse, and are those of the whole batch."""

import pytest
import torch

from lapa.latent import model as losses


def test_making_both_sides_smaller_does_not_lower_the_relative_error():
    """With a fixed scale below, it would: the model then shrinks its latents until one code is left."""
    torch.manual_seed(0)
    ours, wanted, scale = torch.randn(8, 4, 3), torch.randn(8, 4, 3), torch.ones((), requires_grad=True)
    error = losses.relative_error(scale * ours, scale * wanted)
    torch.testing.assert_close(error, (ours - wanted).square().mean() / wanted.square().mean())
    error.backward()
    assert scale.grad.abs() < 1e-5


def test_known_actions_count_and_unknown_ones_do_not():
    nan = float("nan")
    predicted, actions = torch.ones(4, 2), torch.tensor([[1.0, 3.0], [nan, nan], [2.0, 1.0], [nan, nan]])
    assert losses.known_actions_error(predicted, actions) == (4 + 1) / 4
    assert losses.known_actions_error(predicted, torch.full((4, 2), nan)) == 0


def test_known_actions_of_two_processes_weigh_as_in_one_batch(monkeypatch):
    """One process knows three pairs, the other none: the mean of both losses is the loss of the whole."""
    nan, predicted = float("nan"), torch.zeros(4, 1)
    here, there = torch.tensor([[1.0], [2.0], [3.0], [nan]]), torch.full((4, 1), nan)
    whole = losses.known_actions_error(torch.zeros(8, 1), torch.cat([here, there]))
    monkeypatch.setattr(losses, "mean_everywhere", lambda count: torch.tensor(3 / 2))
    parts = [losses.known_actions_error(predicted, actions) for actions in (here, there)]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_a_collapse_of_every_position_to_its_own_code_shows_in_the_batch():
    even = losses.batch_usage(torch.arange(16)[:, None].repeat(1, 4) % 8, 8)
    assert even["batch_codes_used"] == 8
    assert even["batch_perplexity"] == pytest.approx(8, rel=1e-5)
    collapsed = losses.batch_usage(torch.tensor([[0, 2, 5, 7]]).repeat(16, 1), 8)
    assert collapsed["batch_codes_used"] == collapsed["batch_perplexity"] == 1
