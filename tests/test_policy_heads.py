"""The heads that give real numbers: what they learn, what they must not see, and a literal twin of the flow's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lapa.policy.config import FlowConfig
from lapa.policy.heads import LAST_TIME, ActionHead, ChunkHead, FlowHead, build_head, draw_times

WIDTH, CHUNK, ACTION_DIM = 12, 3, 2
SMALL = FlowConfig(width=32, layers=2, heads=2, steps=10)
KINDS = ("chunk", "flow")


def make(kind: str, chunk: int = CHUNK, action_dim: int = ACTION_DIM, flow: FlowConfig = SMALL) -> ActionHead:
    torch.manual_seed(0)
    return build_head(kind, WIDTH, chunk, action_dim, flow)  # type: ignore[arg-type]


def random_batch(num: int = 4, chunk: int = CHUNK, action_dim: int = ACTION_DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (as many as the chunk, so that both heads can read them), targets, and all steps counted."""
    torch.manual_seed(1)
    return torch.randn(num, chunk, WIDTH), torch.rand(num, chunk, action_dim) * 2 - 1, torch.ones(num, chunk).bool()


def learn(head: ActionHead, draw, steps: int = 300, lr: float = 3e-3) -> None:
    """`draw(num)` gives hidden states and targets."""
    optimizer = torch.optim.AdamW(head.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        hidden_BSD, targets_BKA = draw(64)
        loss, _ = head.loss(hidden_BSD, None, targets_BKA, torch.ones(targets_BKA.shape[:2]).bool())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_learns_a_linear_map_of_the_hidden_states(kind: str) -> None:
    head = make(kind)
    weight_DA = torch.randn(WIDTH, ACTION_DIM) / math.sqrt(WIDTH) / 2

    def draw(num: int) -> tuple[Tensor, Tensor]:
        hidden_BKD = torch.randn(num, CHUNK, WIDTH)
        # The flow head is to find the step of the chunk among the positions that it attends to.
        hidden_BKD[..., :CHUNK] = torch.eye(CHUNK)
        return hidden_BKD, hidden_BKD @ weight_DA

    learn(head, draw)
    hidden_BKD, targets_BKA = draw(200)
    error = (head.act(hidden_BKD) - targets_BKA).abs().mean()
    assert error < 0.35 * (targets_BKA - targets_BKA.mean(0)).abs().mean()


def test_flow_samples_each_of_two_ways_and_not_their_mean() -> None:
    """Half of the chunks are 0.8 throughout, half -0.8: a sample is one of both, throughout."""
    head = make("flow")
    hidden_BSD = torch.randn(1, 2, WIDTH)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        sides_B11 = torch.randint(0, 2, (num, 1, 1)).float() * 2 - 1
        return hidden_BSD.expand(num, -1, -1), 0.8 * sides_B11.expand(-1, CHUNK, ACTION_DIM)

    learn(head, draw)
    assert isinstance(head, FlowHead)
    samples = head.sample(hidden_BSD.expand(200, -1, -1), None, torch.randn(200, CHUNK, ACTION_DIM)).flatten(1)
    assert ((samples.abs() - 0.8).abs() < 0.25).float().mean() > 0.9
    assert 0.3 < (samples.mean(1) > 0).float().mean() < 0.7
    assert (samples.sign() == samples.sign()[:, :1]).all(1).float().mean() > 0.9
    assert head.act(hidden_BSD).abs().min() > 0.5, "acting decides for one"


def test_chunk_learns_the_median_of_what_it_saw() -> None:
    head = make("chunk")
    hidden_BKD = torch.randn(1, CHUNK, WIDTH)
    values = torch.tensor([-0.8, -0.8, -0.8, 0.1, 0.1, 0.1, 0.8, 0.8, 0.8, 0.8])

    def draw(num: int) -> tuple[Tensor, Tensor]:
        targets_BKA = values[torch.randint(0, len(values), (num, CHUNK, ACTION_DIM))]
        return hidden_BKD.expand(num, -1, -1), targets_BKA

    learn(head, draw)
    torch.testing.assert_close(head.act(hidden_BKD), torch.full((1, CHUNK, ACTION_DIM), 0.1), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_past_the_end_of_an_episode_change_nothing(kind: str) -> None:
    head = make(kind)
    hidden_BSD, targets_BKA, counted_BK = random_batch()
    counted_BK[0, 1:] = counted_BK[2, 2:] = False
    results = []
    for filling in (0.0, 9.0, math.nan):
        filled_BKA = targets_BKA.masked_fill(~counted_BK[..., None], filling)
        head.zero_grad()
        torch.manual_seed(2)
        loss, _ = head.loss(hidden_BSD, None, filled_BKA, counted_BK)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in head.parameters())])
    for other in results[1:]:
        for before, after in zip(results[0], other, strict=True):
            assert before.isfinite().all() and torch.equal(before, after)
    loss, _ = head.loss(hidden_BSD, None, targets_BKA, torch.zeros_like(counted_BK))
    assert loss == 0


def test_flow_sees_no_step_that_is_not_counted() -> None:
    """Noise and target past the end reach no counted step, though the steps of a chunk attend to each other."""
    head = make("flow")
    assert isinstance(head, FlowHead)
    hidden_BSD, noisy_BKA, counted_BK = random_batch()
    counted_BK[:, 2] = False
    context, time_B = head.observe(hidden_BSD), torch.full((4,), 0.4)
    before_BKA = head.velocity(noisy_BKA, time_B, context, counted_BK)
    noisy_BKA[:, 2] += 5
    after_BKA = head.velocity(noisy_BKA, time_B, context, counted_BK)
    assert torch.equal(before_BKA[:, :2], after_BKA[:, :2])
    assert not torch.equal(head.velocity(noisy_BKA, time_B, context)[:, :2], after_BKA[:, :2])


@pytest.mark.parametrize("padding", [7.0, math.nan])
def test_flow_does_not_read_padding(padding: float) -> None:
    head = make("flow").eval()
    hidden_BSD, targets_BKA, counted_BK = random_batch()
    padded_BSD = torch.cat([torch.full((4, 5, WIDTH), padding), hidden_BSD], dim=1)
    mask_BS = torch.arange(5 + CHUNK).expand(4, -1) >= 5
    torch.testing.assert_close(head.act(padded_BSD, mask_BS), head.act(hidden_BSD), atol=1e-5, rtol=0)
    losses = [
        head.loss(hidden, mask, targets_BKA, counted_BK)[0]
        for hidden, mask in ((padded_BSD, mask_BS.long()), (hidden_BSD, None))
    ]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_acting_is_the_same_each_time_and_alone_as_in_a_batch(kind: str) -> None:
    head = make(kind)
    hidden_BSD, *_ = random_batch()
    actions_BKA = head.act(hidden_BSD)
    assert torch.equal(head.act(hidden_BSD), actions_BKA)
    torch.testing.assert_close(head.act(hidden_BSD[2:3]), actions_BKA[2:3], atol=1e-5, rtol=0)
    again = make(kind)
    nn.init.normal_(next(again.parameters()))
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.act(hidden_BSD), actions_BKA)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_hidden_states(kind: str) -> None:
    head = make(kind)
    hidden_BSD, targets_BKA, counted_BK = random_batch()
    hidden_BSD.requires_grad_()
    head.loss(hidden_BSD, None, targets_BKA, counted_BK)[0].backward()
    assert hidden_BSD.grad is not None and (hidden_BSD.grad.abs().amax((1, 2)) > 1e-5).all()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "action_dim"), [(1, 1), (1, 14), (8, 7)])
def test_any_chunk_and_any_action_dimensions(kind: str, chunk: int, action_dim: int) -> None:
    head = make(kind, chunk, action_dim).eval()
    hidden_BSD, targets_BKA, counted_BK = random_batch(2, chunk, action_dim)
    actions_BKA = head.act(hidden_BSD)
    assert actions_BKA.shape == (2, chunk, action_dim) and actions_BKA.isfinite().all()
    loss, parts = head.loss(hidden_BSD, None, targets_BKA, counted_BK)
    assert loss.shape == () and loss > 0
    torch.testing.assert_close(parts["action_l1"], (actions_BKA - targets_BKA).abs().mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gives_about_the_same_in_float32(kind: str, weights: torch.dtype, autocast: bool) -> None:
    head = make(kind).eval()
    hidden_BSD, targets_BKA, counted_BK = random_batch()
    expected = head.act(hidden_BSD), head.loss(hidden_BSD, None, targets_BKA, counted_BK)[0]
    head = head.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = head.act(hidden_BSD.bfloat16()), head.loss(hidden_BSD.bfloat16(), None, targets_BKA, counted_BK)[0]
    found[1].backward()
    for full, half in zip(expected, found, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, atol=0.1, rtol=0)


def test_chunk_loss_worked_by_hand() -> None:
    head = make("chunk")
    nn.init.zeros_(head.out.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(head.out.bias)  # type: ignore[union-attr, arg-type]
    targets_BKA = torch.tensor([[[1.0, -1.0], [0.5, 0.0], [9.0, 9.0]]])
    loss, _ = head.loss(torch.randn(1, 3, WIDTH), None, targets_BKA, torch.tensor([[True, True, False]]))
    assert float(loss.detach()) == pytest.approx((1 + 1 + 0.5 + 0) / 4)


def test_flow_loss_is_that_of_the_straight_way_from_noise_to_actions() -> None:
    head = make("flow")
    assert isinstance(head, FlowHead)
    hidden_BSD, targets_BKA, counted_BK = random_batch()
    torch.manual_seed(5)
    loss, parts = head.loss(hidden_BSD, None, targets_BKA, counted_BK)
    torch.manual_seed(5)
    noise_BKA, time_B = torch.randn(4, CHUNK, ACTION_DIM), draw_times(4, torch.device("cpu"))
    total = 0.0
    for one in range(4):
        time = float(time_B[one])
        noisy_KA = time * targets_BKA[one] + (1 - time) * noise_BKA[one]
        velocity_KA = twin_velocity(head, noisy_KA, time, hidden_BSD[one])
        total += float(((velocity_KA - (targets_BKA[one] - noise_BKA[one])) ** 2).mean())
    assert float(loss.detach()) == pytest.approx(total / 4, rel=1e-4)
    assert parts == {}
    head.eval()
    first, second = (float(head.loss(hidden_BSD, None, targets_BKA, counted_BK)[0].detach()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_steps_equal_a_literal_loop(steps: int) -> None:
    """One observation at a time, without padding, nothing kept between steps, attention written out."""
    head = make("flow", flow=FlowConfig(width=32, layers=2, heads=2, steps=steps))
    assert isinstance(head, FlowHead)
    hidden_BSD, noise_BKA, _ = random_batch()
    mask_BS = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool()
    found_BKA = head.sample(hidden_BSD, mask_BS, noise_BKA)
    for one in range(4):
        chunk_KA = noise_BKA[one]
        for step in range(steps):
            chunk_KA = chunk_KA + twin_velocity(head, chunk_KA, step / steps, hidden_BSD[one, mask_BS[one]]) / steps
        torch.testing.assert_close(found_BKA[one], chunk_KA, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def twin_velocity(head: FlowHead, noisy_KA: Tensor, time: float, hidden_SD: Tensor) -> Tensor:
    """FlowHead.velocity of one observation, from the head's weights."""
    width, count = head.config.width, head.config.width // 2
    periods = [0.004 * 1000 ** (number / (count - 1)) for number in range(count)]
    waves = [f(2 * math.pi * time / period) for f in (math.sin, math.cos) for period in periods]
    context_SW = head.context_in(head.context_norm(hidden_SD))
    tokens = [torch.cat([head.action_in(row_A), torch.tensor(waves)]) for row_A in noisy_KA]
    x_KW = head.mix(torch.stack(tokens)) + head.places_KW

    def attention(module: nn.Module, queries_from: Tensor, context: Tensor) -> Tensor:
        keys, values = module.to_keys_values(context).split(width, dim=1)
        queries, each = module.to_queries(queries_from), width // head.config.heads
        outs = []
        for first in range(0, width, each):
            part = slice(first, first + each)
            logits = queries[:, part] @ keys[:, part].T / math.sqrt(each)
            outs.append(logits.softmax(1) @ values[:, part])
        return module.to_out(torch.cat(outs, dim=1))

    for layer in head.layers:
        normed_KW = layer.among_norm(x_KW)
        x_KW = x_KW + attention(layer.among, normed_KW, normed_KW)
        x_KW = x_KW + attention(layer.across, layer.across_norm(x_KW), context_SW)
        x_KW = x_KW + layer.inner(layer.inner_norm(x_KW))
    return head.out(head.norm(x_KW))


def test_times_follow_the_beta_distribution_of_pi0() -> None:
    times = draw_times(20000, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert times.min() >= 0 and times.max() <= LAST_TIME
    exact = 1 - torch.distributions.Beta(1.5, 1.0).mean
    assert float(times.mean()) == pytest.approx(LAST_TIME * float(exact), abs=0.01)
    # P(u > 1/2) = 1 - (1/2)^1.5 for u ~ Beta(1.5, 1).
    assert float((times < LAST_TIME / 2).float().mean()) == pytest.approx(1 - 0.5**1.5, abs=0.01)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"steps": 0}, "steps must be at least 1, got 0"), ({"width": 36, "heads": 4}, "multiple of twice its 4 heads")],
)
def test_sizes_that_cannot_be_are_refused(change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FlowConfig(**change)


def test_the_kind_chooses_the_head() -> None:
    assert isinstance(make("chunk"), ChunkHead) and isinstance(make("flow"), FlowHead)
