"""Gymnasium environments of others: what is read of one, what an episode is, and environments that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

from lapa.envs import Task  # noqa: E402
from lapa.envs.gymnasium import gymnasium_kind  # noqa: E402
from lapa.errors import UserError  # noqa: E402
from lapa.evaluation.config import EvaluateConfig  # noqa: E402
from lapa.evaluation.rollout import evaluate  # noqa: E402

PUSHT = Path(__file__).parent.parent / "examples" / "pusht"


class Reach(gymnasium.Env):
    """A point on a line, to be moved to 1 from a place that the seed draws; it is lost below -1."""

    metadata: ClassVar = {"render_modes": [], "render_fps": 5}

    def __init__(self, cameras: tuple[str, ...] = (), **lacking: Any) -> None:
        image = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
        pixels = gymnasium.spaces.Dict(dict.fromkeys(cameras, image)) if cameras else image
        state = gymnasium.spaces.Box(-2, 2, (1,), np.float64)
        self.observation_space = lacking.get("observations", gymnasium.spaces.Dict(pixels=pixels, agent_pos=state))
        self.action_space = lacking.get("actions", gymnasium.spaces.Box(-0.5, 0.25, (1,), np.float32))
        self.cameras, self.reports = cameras, lacking.get("reports", True)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-0.5, 0.5)
        self.task_description = f"go right from {self.place:.1f}"
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.place += float(action[0])
        info = {"is_success": self.place >= 1} if self.reports else {}
        return self._seen(), 0.0, abs(self.place) >= 1, False, info

    def _seen(self) -> dict[str, Any]:
        image = np.full((8, 8, 3), 100, np.uint8)
        pixels = dict.fromkeys(self.cameras, image) if self.cameras else image
        return {"pixels": pixels, "agent_pos": np.array([self.place])}


def reach(**options: Any) -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(Reach(**options), 30)


def test_a_kind_is_read_off_the_environment() -> None:
    kind = gymnasium_kind("reaching", {"reach": reach}, max_steps=30)
    assert (kind.fps, kind.action_dim, kind.state_dim, kind.size) == (5, 1, 1, 8)
    assert (kind.known_cameras, kind.cameras, kind.action_low, kind.action_high) == (
        ("image",),
        ("image",),
        (-0.5,),
        (0.25,),
    )
    assert kind.parse_tasks("all") == {"reach": Task("reach", 30)}
    several = gymnasium_kind("reaching", {"reach": lambda: reach(cameras=("side", "top"))}, fps=20, max_steps=9)
    assert (several.known_cameras, several.cameras, several.fps) == (("side", "top"), ("side",), 20)


def test_an_episode_depends_on_its_seed_and_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = gymnasium_kind("reaching", {"reach": lambda: reach(cameras=("side", "top"))}, max_steps=30)
    environment = kind.make("reach", size=8, cameras=("side",))
    environment.reset(2**40 + 3, 0)
    first = environment.observe()
    assert set(first.images) == {"side"} and first.instruction.startswith("go right from ")
    assert first.state is not None and first.state.dtype == np.float32
    # An action beyond the bounds is cut to them.
    steps = 1
    while not environment.step(np.array([7.0])):
        steps += 1
    assert steps == int(np.ceil((1 - first.state[0]) / 0.25))
    environment.reset(2**40 + 4, 0)
    assert environment.observe().state != first.state
    environment.reset(2**40 + 3, 0)
    assert environment.observe().state == first.state
    # Over, and not solved by what follows.
    for _ in range(4):
        assert not environment.step(np.array([-1.0]))
    assert not any(environment.step(np.array([1.0])) for _ in range(30))
    environment.close()


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"observations": gymnasium.spaces.Box(0, 1, (3,))}, {"max_steps": 9}, 'a Dict with "pixels", got Box'),
        ({"actions": gymnasium.spaces.Discrete(3)}, {"max_steps": 9}, "a Box of one axis, got Discrete"),
        ({"actions": gymnasium.spaces.MultiDiscrete([3])}, {"max_steps": 9}, "a Box of one axis, got MultiDiscrete"),
        ({}, {}, "does not declare max_steps; give it to gymnasium_kind"),
    ],
)
def test_environments_that_do_not_fit_are_named(options: dict, given: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"reach: .*{message}"):
        gymnasium_kind("reaching", {"reach": lambda: reach(**options)}, **given)


def test_what_shows_only_later_is_named() -> None:
    kind = gymnasium_kind("reaching", {"reach": lambda: reach(reports=False)}, max_steps=30)
    with pytest.raises(UserError, match="itself chose 8 pixels, not 64; leave out --size"):
        kind.make("reach", size=64, cameras=("image",))
    environment = kind.make("reach", size=8, cameras=("image",))
    environment.reset(0, 0)
    with pytest.raises(UserError, match='its info needs "is_success"'):
        environment.step(np.zeros(1))


def test_pusht_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gym_pusht")
    metadata = tmp_path / "lapa_pusht-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lapa-pusht\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[lapa.environments]\npusht = lapa_pusht:PUSHT\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(PUSHT)
    config = EvaluateConfig("random", tmp_path / "out", env="pusht", tasks="all", episodes=2, videos=1, workers=1)
    report = evaluate(config)
    assert list(report["tasks"]) == ["push-t"] and report["overall"]["episodes"] == 2
    assert report["gym-pusht"] and {episode["steps"] for episode in report["episodes"]} == {300}
    assert (tmp_path / "out" / "videos" / "push-t.mp4").exists()
