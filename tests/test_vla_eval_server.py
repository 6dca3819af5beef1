"""The conventions of examples/vla_eval_server.py; vla-eval itself runs against it in `make check-vla-eval`."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from acting_policies import INSTRUCTION, acting_policy, observation
from lapa.errors import UserError

specs = pytest.importorskip("vla_eval.specs", reason="needs vla-eval")
EXAMPLE = Path(__file__).parent.parent / "examples" / "vla_eval_server.py"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    policy = acting_policy("tiny", "chunk", folder)
    policy.save_pretrained(folder / "policy", run={})
    return policy, str(folder / "policy")


def server(policy, **options):
    return runpy.run_path(str(EXAMPLE))["LapaModelServer"](policy[1], device="cpu", **options)


def sent(seen: dict, **others) -> dict:
    """An observation as vla-eval's benchmarks send it."""
    images = {"agentview": seen["front"], "wrist": seen["wrist"]}
    return {"images": images, "task_description": INSTRUCTION, "states": seen["state"], **others}


CAMERAS = {"front": "agentview"}


def test_a_batch_of_sessions_has_the_actions_of_infer(policy):
    several = [observation(seed) for seed in range(2)]
    found = server(policy, cameras=CAMERAS).predict_batch([sent(seen) for seen in several], [])
    np.testing.assert_array_equal([one["actions"] for one in found], policy[0].infer(several))


def test_images_state_and_gripper_follow_the_options(policy):
    seen = observation()
    options = {"cameras": CAMERAS, "upside_down": True, "state": "controller_states", "state_order": [2, 0]}
    served = server(policy, **options, gripper="open01")
    state = np.array([seen["state"][1], 9.0, seen["state"][0]], np.float32)
    turned = {**seen, "front": seen["front"][::-1, ::-1], "wrist": seen["wrist"][::-1, ::-1]}
    (found,) = served.predict_batch([sent(turned, controller_states=state)], [])
    wanted_KA = policy[0].infer(seen)
    np.testing.assert_array_equal(found["actions"][:, :2], wanted_KA[:, :2])
    np.testing.assert_array_equal(found["actions"][:, 2], 1 - 2 * wanted_KA[:, 2])


@pytest.mark.parametrize(
    ("gripper", "opened", "closed"),
    [("keep", 1, 0), ("negate", -1, 0), ("open01", -1, 1), ("close01", 1, -1)],
)
def test_what_is_sent_for_a_gripper_of_one_and_of_zero(gripper, opened, closed):
    change = runpy.run_path(str(EXAMPLE))["GRIPPERS"][gripper]
    np.testing.assert_array_equal(change(np.array([1.0, 0.0])), [opened, closed])


def test_conventions_are_declared_and_the_benchmark_is_asked_for_what_is_needed(policy):
    action = ["POSITION_DELTA", "ROTATION_AA", "GRIPPER_CLOSE_POS"]
    served = server(policy, cameras=CAMERAS, action=action, observation="STATE_EEF_POS_AA_GRIP")
    assert served.get_action_spec() == {
        "position": specs.POSITION_DELTA,
        "rotation": specs.ROTATION_AA,
        "gripper": specs.GRIPPER_CLOSE_POS,
    }
    assert set(served.get_observation_spec()) == {"agentview", "wrist", "language", "state"}
    assert served.get_observation_params() == {"send_wrist_image": True, "send_state": True}
    assert served.chunk_size == policy[0].chunk and server(policy, chunk_size=2).chunk_size == 2


def test_what_is_missing_or_unknown_is_named(policy):
    with pytest.raises(UserError, match=r"no image front \(it sends agentview, wrist\)"):
        server(policy).predict_batch([sent(observation())], [])
    with pytest.raises(UserError, match="no states or state"):
        stateless = {key: value for key, value in sent(observation()).items() if key != "states"}
        server(policy, cameras=CAMERAS).predict_batch([stateless], [])
    with pytest.raises(UserError, match="the policy has no top; it has front, wrist"):
        server(policy, cameras={"top": "agentview"})
    with pytest.raises(UserError, match=r"vla_eval\.specs has no POSITION; it has POSITION_DELTA"):
        server(policy, action=["POSITION"])
