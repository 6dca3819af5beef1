"""Mixtures: exact shares of the draws, an order that seed and draw decide alone, horizons and motion, in place."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
from lapa.data.sampling import ItemIndex, Mixture, require_names, require_plain
from lapa.data.spec import open_dataset
from lapa.data.video import encode_clip
from lapa.data.writer import DatasetWriter
from lapa.engine.batches import BLOCK, Draw, Mixed, StepSampler, batch_loader
from lapa.files import read_json, write_json
from lapa.latent import probe
from lapa.latent import train as training
from lapa.latent.model import LatentActionModel, horizon_for
from lapa.latent.probe import ProbeConfig
from lapa.presets import LATENT
from lapa.sources.synthetic import moving_squares, write_synthetic_dataset

DEBUG = LATENT["debug"]
GROUPS = ((50, 50.0), (7, 3.5), (0, 9.0), (400, 0.02), (1000, 21.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder, and a folder of clips to read in place, of another rate, half of which stand still."""
    root = tmp_path_factory.mktemp("mixture")
    write_synthetic_dataset(root / "squares", episodes=6, frames=12, size=32, fps=10, actions=True)
    (root / "own clips é").mkdir()
    for number, (frames_TCHW, _) in enumerate(zip(*moving_squares(6, seed=3, size=32), strict=True)):
        first, second = frames_TCHW.transpose(0, 2, 3, 1)
        frames = [first, first, first, second, second, second] * 4 if number % 2 else [first] * 24
        encode_clip(root / "own clips é" / f"{number}.mp4", frames, fps=20)
    return root


def specs(root: Path, options: str = ",horizon=0.2") -> tuple[str, str]:
    return f"{root / 'squares'}:1.0", f"own=videos:{root / 'own clips é'},caption=look{options}:0.25"


def samples(groups=GROUPS, first_step: int = 0, last_step: int = 200, **options) -> list[Draw]:
    total = sum(size for size, _ in groups)
    sampler = StepSampler(total, 12, seed=1, first_step=first_step, last_step=last_step, groups=groups, **options)
    return [draw for batch in sampler for draw in batch]


def test_counts_are_the_shares_to_within_rounding_however_long_the_run() -> None:
    mixed = Mixed(GROUPS, seed=0)
    weights = np.array([weight if size else 0 for size, weight in GROUPS])
    before = np.zeros(len(GROUPS))
    for num_draws in [*range(3000), *(10**9 + n for n in range(50))]:
        counts = np.array(mixed.counts(num_draws))
        assert counts.sum() == num_draws
        assert np.abs(counts - num_draws * weights / weights.sum()).max() <= len(GROUPS) / 2
        if 0 < num_draws < 3000:
            assert sorted(counts - before) == [0, 0, 0, 0, 1], "one draw more is one part's"
        before = counts


def test_places_are_those_of_a_literal_count() -> None:
    mixed = Mixed(GROUPS, seed=0)
    seen = dict.fromkeys(range(len(GROUPS)), 0)
    for number in range(3 * BLOCK + 5):
        part, before = mixed.place(number)
        assert before == seen[part]
        seen[part] += 1
    assert Mixed(GROUPS, seed=0).place(2 * BLOCK + 17) == mixed.place(2 * BLOCK + 17), "without what came before"
    assert any(Mixed(GROUPS, seed=1).place(number) != mixed.place(number) for number in range(50))
    assert len({mixed.place(number)[0] for number in range(20)}) > 1, "shuffled, not part by part"


def test_each_part_is_gone_through_in_permutations_of_its_own() -> None:
    draws = [draw.sample for draw in samples()]
    first = [sample for sample in draws if sample < 50]
    assert sorted(first[:50]) == list(range(50)) == sorted(first[50:100])
    assert first[:50] != first[50:100]
    second = [sample - 50 for sample in draws if 50 <= sample < 57]
    assert sorted(second[:7]) == list(range(7))
    assert max(draws) < 50 + 7 + 400 + 1000


def test_the_order_does_not_depend_on_where_a_run_resumes_nor_on_processes() -> None:
    whole = samples()
    assert samples(first_step=130) == whole[130 * 12 :]
    shares = [
        StepSampler(1457, 12, seed=1, first_step=0, last_step=9, accumulate=3, rank=rank, world=2, groups=GROUPS)
        for rank in (0, 1)
    ]
    assert sorted(draw for share in shares for batch in share for draw in batch) == sorted(whole[: 9 * 12])


def test_parts_that_make_no_mixture_are_refused() -> None:
    for groups, message in {
        ((3, 0.0), (0, 1.0)): "no part of the mixture has both",
        ((3, -1.0), (3, 1.0)): "none is below 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            Mixed(groups, seed=0)
    with pytest.raises(ValueError, match=r"the dataset 5"):
        StepSampler(5, 1, seed=0, first_step=0, last_step=1, groups=((3, 1.0),))


def test_shares_are_by_weight_times_frames_or_episodes_or_by_weight_alone(root: Path, capsys) -> None:
    datasets = [open_dataset(spec) for spec in specs(root)]
    both = ItemIndex([np.arange(6), np.arange(3)], [np.full(6, 10), np.full(3, 40)])
    shares = {by: Mixture.of(datasets, both, by).shares for by in ("frames", "episodes", "equal")}
    expected = {"frames": 60 / 90, "episodes": 6 / 6.75, "equal": 1 / 1.25}
    for by, share in expected.items():
        assert shares[by] == pytest.approx((share, 1 - share))
    Mixture.of(datasets, both, "frames").report(1000)
    printed = capsys.readouterr().err
    assert "66.7%" in printed and "11.11" in printed and "2.78" in printed, "shares, and epochs of 1000 draws"
    lacking = Mixture.of(datasets, ItemIndex([np.arange(6), np.arange(0)], [np.full(6, 10), np.arange(0)]), "equal")
    assert lacking.groups is None and lacking.shares == (1, 0)
    lacking.report(10)
    assert "own: nothing of it is trained on" in " ".join(capsys.readouterr().err.split())


def test_equal_weights_by_frames_keep_the_order_of_one_pool(root: Path) -> None:
    alike = [open_dataset(f"{root / 'squares'}:0.5"), open_dataset(f"{root / 'squares'}:0.5")]
    pairs = FramePairs(alike, PairsConfig(size=32, horizon=0.3, held_out=0.0))
    assert pairs.groups is None
    drawn = [d.sample for b in StepSampler(len(pairs), 9, seed=4, first_step=0, last_step=24, groups=None) for d in b]
    literal = [np.random.default_rng([4, epoch]).permutation(len(pairs)) for epoch in (0, 1)]
    assert drawn == np.concatenate(literal)[: len(drawn)].tolist()
    assert FramePairs(alike, replace(pairs.config, mix_by="equal")).groups == ((54, 0.5), (54, 0.5))


def test_pairs_of_a_mixture_are_drawn_alike_by_any_number_of_workers(root: Path) -> None:
    datasets = [open_dataset(spec) for spec in specs(root)]
    pairs = FramePairs(datasets, PairsConfig(size=32, horizon=0.3, held_out=0.0, mix_by="equal", min_motion=0.005))
    batches = []
    for workers in (0, 2):
        sampler = StepSampler(len(pairs), 10, seed=0, first_step=3, last_step=7, groups=pairs.groups)
        batches.append(list(batch_loader(pairs, collate_pairs, sampler, workers=workers, pin_memory=False)))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["frames_BTCHW"], other["frames_BTCHW"])
    of_second = torch.cat([batch["index"] for batch in batches[0]]) >= pairs.groups[0][0]
    assert abs(int(of_second.sum()) - 8) < 7, "a fifth of forty"


def test_names_and_weights_that_do_not_fit_are_refused_with_the_mend(root: Path) -> None:
    squares = open_dataset(root / "squares")
    with pytest.raises(ValueError, match=r"has the name 'squares' of another one.*--data NAME="):
        require_names([squares, squares])
    require_plain([squares], "lapa baseline video", "--horizon-seconds")
    for spec, message in zip((f"{squares.root}:2", f"{squares.root},horizon=1"), ("weight", "horizon"), strict=True):
        with pytest.raises(ValueError, match=f"leave out.*{message}"):
            require_plain([open_dataset(spec)], "lapa baseline video", "--horizon-seconds")


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_pairs_that_do_not_move_are_left_out_and_counted(root: Path, capsys, cache_gib: float) -> None:
    clips = open_dataset(specs(root)[1])
    config = PairsConfig(size=32, held_out=0.0, min_motion=0.02, cache_gib=cache_gib)
    plain = FramePairs([clips], replace(config, min_motion=0.0))
    moving = FramePairs([clips], config)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"own: {moving.num_still[0]} of {len(plain)} pairs" in printed and "warning" in printed, "more than half"
    assert len(moving) + moving.num_still[0] == len(plain)
    kept = [moving.location(index) for index in range(len(moving))]
    assert {episode for _, episode, _ in kept} == {1, 3, 5}, "the even clips stand still"
    for index, place in enumerate(kept):
        assert moving.index_of(*place) == index
        item = moving[index]["frames_TCHW"]
        assert (item == plain[plain.index_of(*place)]["frames_TCHW"]).all()
        assert np.abs(item[0].astype(int) - item[1]).mean() > 0.5
    assert len(FramePairs([clips], replace(config, held_out=0.5), "held_out")) == 3 * (24 - 4), (
        "held-out pairs all stay"
    )


def test_nothing_that_moves_is_an_error(root: Path, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "still", fps=10, cameras={"front": (32, 32)})
    writer.add_episode({"front": np.full((9, 32, 32, 3), 99, np.uint8)}, "wait")
    datasets = [open_dataset(root / "squares"), writer.finish()]
    with pytest.raises(ValueError, match=r"still: none of its 6 pairs changes by --min-motion 0\.01, 0\.0000 at most"):
        FramePairs(datasets, PairsConfig(size=32, horizon=0.3, min_motion=0.01))
    with pytest.raises(ValueError, match="it lies from 0"):
        FramePairs(datasets, PairsConfig(size=32, min_motion=float("nan")))


def test_a_horizon_of_its_own_goes_before_the_common_one(root: Path) -> None:
    pairs = FramePairs([open_dataset(spec) for spec in specs(root)], PairsConfig(size=32, horizon=0.6), "all")
    assert (pairs.horizons, pairs.horizon_frames) == ((0.6, 0.2), (6, 4))
    with pytest.raises(ValueError, match="too short for a horizon of 9 s"):
        FramePairs([open_dataset(specs(root, ",horizon=9")[1])], PairsConfig(size=32))


def test_a_model_trains_on_a_mixture_in_place_resumes_exactly_and_knows_its_horizons(
    root: Path, tmp_path: Path, capsys
) -> None:
    """A dataset folder and a folder of videos, unequal weights, a horizon of its own, still pairs left out."""
    loop = replace(DEBUG.loop, steps=4, batch_size=8)
    config = replace(DEBUG, data=specs(root), out=tmp_path / "whole", loop=loop, mix_by="episodes", min_motion=0.01)
    training.run(config)
    parts = replace(config, out=tmp_path / "parts")
    training.run(replace(parts, loop=replace(loop, stop_after=2, workers=1)))
    with pytest.raises(ValueError, match="mix_by was 'episodes', is 'equal'"):
        training.run(replace(parts, mix_by="equal", resume=True, loop=replace(loop, workers=1)))
    training.run(replace(parts, resume=True, loop=replace(loop, workers=1)))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    lam = LatentActionModel.from_pretrained(config.out)
    squares, clips = (open_dataset(spec) for spec in specs(root))
    noted = read_json(config.out / "config.json")["datasets"]
    assert noted[clips.fingerprint] == {"name": "own", "horizon_seconds": 0.2}
    assert noted[squares.fingerprint]["horizon_seconds"] == lam.horizon == 0.3
    unsaid = open_dataset(specs(root, "")[1])
    assert horizon_for(config.out, unsaid, lam) == 0.2, "as it was trained"
    assert horizon_for(config.out, open_dataset(specs(root, ",horizon=0.4")[1]), lam) == 0.4, "the given one"
    probe.run(ProbeConfig(config.out, specs(root, "")[1], tmp_path / "probe", num_pairs=8, device="cpu"))
    assert read_json(tmp_path / "probe" / "probe.json")["horizon_seconds"] == 0.2
    lines = [line for line in capsys.readouterr().err.splitlines() if "next: lapa label" in line]
    words = shlex.split(lines[-1])
    assert words[words.index("--data") + 1] == specs(root, "")[1], "quoted, for a path with a space"
    assert words[-2:] == ["--out", "LABELS"], "labels of a source in place have no folder there"
    unknown = write_synthetic_dataset(tmp_path / "other", episodes=1, frames=3, size=32)
    assert horizon_for(config.out, unknown, lam) == lam.horizon
    write_json(config.out / "config.json", {**read_json(config.out / "config.json"), "datasets": ["x"]})
    with pytest.raises(ValueError, match=r"config\.json: \"datasets\" must hold"):
        horizon_for(config.out, unknown, lam)
