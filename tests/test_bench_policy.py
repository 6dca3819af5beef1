"""The policy's benchmark, and its literal twin: the same weights give the same losses and actions."""

import json

import bench_policy
import pytest
import torch
from literal_policy import LiteralPolicy

from lapa.policy.config import LwmConfig, VQGANConfig

CPU = torch.device("cpu")
SMALL_LWM = LwmConfig(
    width=32,
    inner_width=64,
    layers=2,
    heads=2,
    vqgan=VQGANConfig(resolution=32, hidden_channels=32, channel_mult=(1, 1), num_res_blocks=1, num_embeddings=16),
    vision_rows=20,
    end_of_frame=16,
    end_of_vision=17,
)
QUICK = bench_policy.BenchConfig(configs=("debug",), device="cpu", repeats=1, sequence=300, bins_chunk=2)


@pytest.fixture(params=["debug", "lwm"])
def bench(request, monkeypatch) -> bench_policy.Bench:
    monkeypatch.setitem(bench_policy.SIZES, "lwm", SMALL_LWM)
    torch.manual_seed(0)
    return bench_policy.build(request.param, QUICK, CPU, torch.float32)


def test_the_twin_learns_and_says_what_the_policy_does(bench):
    model = bench.policies["bins"].model
    twin = LiteralPolicy(model)
    latent, action = bench.batch("latent", 3), bench.batch("bins", 3)
    torch.testing.assert_close(twin(latent, model.latent_field, latent["latent_BL"]), model(latent).loss)
    said_BF = action["action_BKA"].flatten(1)
    torch.testing.assert_close(twin(action, model.action_field, said_BF), model(action).loss)
    # Left-padded, as instructions of different lengths are.
    action["mask_BT"][1, :2] = 0
    said_BF, _ = model.decode(action, model.action_field)
    assert torch.equal(twin.act(action, model.action_field), said_BF)


def test_the_twin_acts_as_the_policy_does_from_pictures_to_numbers(bench):
    policy, observations = bench.policies["bins"], bench.observations(2)
    said_BKA = policy.infer(observations)
    assert said_BKA.shape == (2, 2, 7)
    assert (bench_policy.act_literally(LiteralPolicy(policy.model), policy, observations) == said_BKA).all()


def test_the_arithmetic_told_is_what_torch_counts_in_the_twin(bench):
    model = bench.policies["bins"].model
    batch, twin = bench.batch("latent", 1), LiteralPolicy(model)
    with torch.no_grad(), bench_policy.FlopCounterMode(display=False) as counter:
        twin(batch, model.latent_field, batch["latent_BL"])
    heads = 2 * model.config.vocabulary.size * bench.backbone.language.config.hidden_size
    positions = bench.positions("latent")
    # The twin reads the last token too, which predicts nothing.
    counted = counter.get_total_flops() - (positions + 1) * heads
    assert counted == pytest.approx(bench_policy.forward_flops(bench, positions + 1), rel=1e-6)


def test_a_benchmark_measures_all_that_is_asked_and_writes_it(tmp_path, capsys):
    config = bench_policy.BenchConfig(
        configs=("debug",), acting_batches=(1,), device="cpu", repeats=1, out=tmp_path / "out.json"
    )
    bench_policy.main(config)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {(row["use"], row["head"], row["model"]) for row in rows} == {
        ("training", "latent", "ours"),
        ("training", "latent", "literal"),
        ("acting", "bins", "ours"),
        ("acting", "bins", "literal"),
        ("acting", "chunk", "ours"),
        ("acting", "flow", "ours"),
    }
    assert all(row["seconds"] > 0 and row["failed"] is None for row in rows)
    assert "| training | latent | ours | 4 |" in capsys.readouterr().out


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_policy, "training_step", full)
    config = bench_policy.BenchConfig(
        configs=("debug",), models=("ours",), heads=("chunk",), acting_batches=(1,), device="cpu", repeats=1,
        out=tmp_path / "out.json",
    )  # fmt: skip
    bench_policy.main(config)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["use"], row["failed"]) for row in rows] == [("training", "out of memory"), ("acting", None)]


def test_a_model_in_bf16_keeps_the_image_tokeniser_in_full(monkeypatch):
    monkeypatch.setitem(bench_policy.SIZES, "lwm", SMALL_LWM)
    backbone = bench_policy.build("lwm", QUICK, CPU, torch.bfloat16).backbone
    assert {p.dtype for p in backbone.language.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in backbone.vision.parameters()} == {torch.float32}
