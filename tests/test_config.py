"""Configs survive a round trip through JSON, and a typo is answered with the nearest known name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from lapa import UserError, config, presets


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    betas: tuple[float, ...] = (0.9, 0.99)


@dataclass(frozen=True)
class Outer:
    out: Path
    steps: int = 3
    kind: Literal["a", "b"] = "a"
    decay: float | None = None
    inner: Inner = field(default_factory=Inner)


def test_round_trip(tmp_path: Path) -> None:
    written = Outer(out=tmp_path, steps=7, kind="b", decay=0.9, inner=Inner(rate=1.0, betas=(0.5,)))
    config.save(written, tmp_path / "config.json")
    assert config.load(Outer, tmp_path / "config.json") == written


def test_whole_numbers_become_floats() -> None:
    assert config.from_dict(Inner, {"rate": 1}) == Inner(rate=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out": "x", "stpes": 3}, "config: unknown key of Outer 'stpes'; did you mean 'steps'"),
        ({"steps": 3}, "config: Outer needs the key 'out'"),
        ({"out": "x", "steps": "many"}, "config: steps: expected int, got 'many'"),
        ({"out": "x", "steps": True}, "config: steps: expected int, got True"),
        ({"out": "x", "kind": "c"}, "config: kind: unknown value 'c'"),
        ({"out": "x", "inner": {"rat": 1}}, "config: inner: unknown key of Inner 'rat'; did you mean 'rate'"),
        ({"out": "x", "inner": 3}, "config: inner: expected an object for Inner, got int"),
        ({"out": 3}, "config: out: expected Path, got 3"),
        ({"out": "x", "decay": 10**400}, "config: decay: expected float, got 1000"),
        ({"out": "x", "inner": {"betas": "0.9"}}, "config: inner: betas: expected a list, got '0.9'"),
    ],
)
def test_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        config.from_dict(Outer, values)
    assert str(error.value).startswith(message)


def test_a_name_without_a_near_one_lists_the_known_ones() -> None:
    assert str(config.unknown("preset", "zzz", ["debug", "tiny"])) == "unknown preset 'zzz' (known: debug, tiny)"


def test_a_path_is_the_same_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = {"lam": str(tmp_path / "lam"), "data": [f"robot={tmp_path / 'd'},camera=front", "b"], "rate": 1}
    assert not config.differences({"lam": "./lam", "data": ["robot=d,camera=front", "./b"], "rate": 1}, there)
    assert config.differences({**there, "lam": "other"}, there) and config.differences({**there, "data": ["b"]}, there)
    assert config.differences({**there, "rate": "1"}, there)


@dataclass(frozen=True)
class Sizes:
    image_size: int = 64
    vision_widths: tuple[int, ...] = (32, 64)
    steps: int = 10**12
    seed: int = 10**15


@dataclass(frozen=True)
class Nested:
    model: Sizes = field(default_factory=Sizes)
    hf_image_size: int | None = None
    codebook_size: int = 1 << 20


def test_absurd_sizes_are_refused() -> None:
    config.require_plausible(Nested())
    for odd, message in (
        (Nested(Sizes(image_size=10**6)), "--image-size must be at most 8192, got 1000000"),
        (Nested(Sizes(vision_widths=(32, 10**9))), "--vision-widths must be at most 65536"),
        (Nested(hf_image_size=8193), "--hf-image-size must be at most 8192"),
        (Nested(codebook_size=10**9), "--codebook-size must be at most 1048576"),
    ):
        with pytest.raises(UserError, match=message):
            config.require_plausible(odd)


def test_every_preset_is_plausible() -> None:
    for stage in presets.STAGES.values():
        for preset in stage.values():
            config.require_plausible(preset)
