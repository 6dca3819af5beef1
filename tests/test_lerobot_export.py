"""`lapa export lerobot` and `lapa import lerobot`: what is in the folder, and that the way back changes no action.

What LeRobot makes of such a folder is tested where it is installed (test_lerobot_policy.py, `make check-lerobot`).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from acting_policies import CAMERAS, STATE_DIM, acting_policy, observation
from fake_hub import FakeHub, Repo
from lapa import cli
from lapa.errors import UserError
from lapa.policy.config import ExportLeRobotConfig, ImportLeRobotConfig
from lapa.policy.lerobot import export, read_back
from lapa.policy.runtime import Policy
from vlms import IMAGE_SIZE

FROZEN = Path(__file__).parent / "golden" / "frozen"
RUN = {"loop": {"optim": {"lr": 5e-4, "weight_decay": 0.02}}, "data": ["/somewhere/data"], "out": "/somewhere/policy"}
OBSERVATIONS = [observation(seed) for seed in range(2)]


def exported(policy: Policy, folder: Path, **options) -> Path:
    """The folder of an export. That of the policy is gone afterwards."""
    policy.save_pretrained(folder / "policy", run=RUN, metrics={"held_out_loss": 0.5})
    export(ExportLeRobotConfig(folder / "policy", folder / "exported", **options))
    shutil.rmtree(folder / "policy")
    return folder / "exported"


def imported(folder: Path, out: Path) -> Policy:
    read_back(ImportLeRobotConfig(folder, out))
    return Policy.from_pretrained(out, device="cpu")


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        *(("tiny", head) for head in ("bins", "chunk", "flow")),
        *(("smolvlm", "chunk"), ("qwen2_5_vl", "flow"), ("paligemma", "bins"), ("gemma3", "chunk"), ("lwm", "bins")),
    ],
)
def test_there_and_back_gives_the_same_actions(backbone, head, tmp_path):
    policy = acting_policy(backbone, head, tmp_path)
    before = policy.infer(OBSERVATIONS)
    folder = exported(policy, tmp_path)
    back = imported(shutil.copytree(folder, tmp_path / "moved"), tmp_path / "back")
    np.testing.assert_array_equal(back.infer(OBSERVATIONS), before)
    assert back.config == policy.config
    assert json.loads((tmp_path / "back" / "metrics.json").read_text()) == {"held_out_loss": 0.5}


@pytest.mark.parametrize("head", ["bins", "chunk", "flow"])
def test_a_policy_of_an_earlier_version_goes_there_and_back(head, tmp_path):
    before = Policy.from_pretrained(FROZEN / f"policy-{head}", device="cpu")
    export(ExportLeRobotConfig(FROZEN / f"policy-{head}", tmp_path / "exported"))
    back = imported(tmp_path / "exported", tmp_path / "back")
    seen = {"front": OBSERVATIONS[0]["front"], "instruction": "move up", "state": np.full(2, 9.0)}
    np.testing.assert_array_equal(back.infer(seen), before.infer(seen))


def test_the_folder_is_one_of_lerobots_and_names_no_place(tmp_path):
    policy = acting_policy("smolvlm", "chunk", tmp_path)
    folder = exported(policy, tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".lock"}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"} <= files
    assert {"lapa/config.json", "lapa/actions.safetensors", "lapa/state.safetensors"} <= files
    assert {"lapa/model/config.json", "lapa/processor/tokenizer.json"} <= files
    assert not any(name.endswith("model.safetensors") for name in files - {"model.safetensors"})
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == "lapa"
    assert config["input_features"] == {
        **{f"observation.images.{name}": {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]} for name in CAMERAS},
        "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
    }
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [3]}}
    assert (config["chunk_size"], config["head"], config["state"]) == (3, "chunk", True)
    assert config["action_feature_names"] == ["x", "y", "grip"]
    assert (config["optimizer_lr"], config["optimizer_weight_decay"]) == (5e-4, 0.02)
    assert not any("/somewhere" in (folder / name).read_text() for name in files if name.endswith(".json"))
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    # lerobot-train sets options of these three, and refuses a pipeline without them.
    names = {step["registry_name"] for step in steps}
    assert {"device_processor", "normalizer_processor", "rename_observations_processor"} <= names
    assert {mode for step in steps for mode in step["config"].get("norm_map", {}).values()} == {"IDENTITY"}


@pytest.mark.parametrize("backbone", ["gemma3", "lwm"])
def test_weights_keep_their_precision_and_tied_ones_are_written_once(backbone, tmp_path):
    policy = acting_policy(backbone, "bins", tmp_path)
    # Of lwm, the image tokenizer stays in float32.
    policy.model.to(torch.bfloat16)
    precisions = [weight.dtype for weight in policy.model.parameters()]
    before = policy.infer(OBSERVATIONS)
    folder = exported(policy, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert torch.bfloat16 in precisions and {tensor.dtype for tensor in weights.values()} == set(precisions)
    tied = policy.model.backbone.language.config.tie_word_embeddings
    assert len(weights) == len(policy.model.state_dict()) - bool(tied)
    back = imported(folder, tmp_path / "back")
    assert [weight.dtype for weight in back.model.parameters()] == precisions
    np.testing.assert_array_equal(back.infer(OBSERVATIONS), before)


def test_of_several_datasets_one_is_chosen(tmp_path):
    policy = acting_policy("tiny", "chunk", tmp_path, keys=("bridge", "rt1"))
    with pytest.raises(UserError, match=r"choose with --statistics-key: bridge, rt1"):
        exported(policy, tmp_path / "none")
    folder = exported(policy, tmp_path, statistics_key="rt1")
    back = imported(folder, tmp_path / "back")
    assert list(back.statistics) == ["rt1"]
    np.testing.assert_array_equal(back.infer(OBSERVATIONS), policy.under("rt1").infer(OBSERVATIONS))


def test_a_policy_that_was_only_pretrained_is_refused(tmp_path):
    policy = acting_policy("tiny", "bins", tmp_path)
    before = replace(policy.config, chunk=0, spaces=(), action_bins=(), state_bins=())
    pretrained = Policy(policy.model.grown(before), policy.processor)
    with pytest.raises(UserError, match=r"only pretrained.*lerobot-train --policy.type=lapa --policy.start="):
        exported(pretrained, tmp_path)


def test_a_damaged_run_of_a_policy_is_named_before_anything_is_written(tmp_path):
    policy = acting_policy("tiny", "chunk", tmp_path)
    policy.save_pretrained(tmp_path / "policy", run={"loop": {"optim": {"schedule": "x"}}})
    with pytest.raises(UserError, match=r"/policy: the run of the policy: schedule: unknown value 'x'"):
        export(ExportLeRobotConfig(tmp_path / "policy", tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def test_an_output_is_not_overwritten(tmp_path):
    policy = acting_policy("tiny", "chunk", tmp_path)
    exported(policy, tmp_path)
    with pytest.raises(UserError, match=r"already holds a finished result; .*--overwrite to replace it"):
        exported(policy, tmp_path)
    exported(policy, tmp_path, overwrite=True)


def test_ids_of_the_hub_are_taken_both_ways(tmp_path, monkeypatch):
    policy = acting_policy("tiny", "chunk", tmp_path)
    policy.save_pretrained(tmp_path / "policy", run=RUN)

    def held(folder: Path) -> Repo:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return Repo(commits={"1" * 40: files}, branches={"main": "1" * 40})

    with FakeHub() as hub:
        hub.used(monkeypatch, tmp_path / "cache")
        hub.repos["model", "ann/policy"] = held(tmp_path / "policy")
        for command in ("export lerobot ann/policy --out", "import lerobot ann/exported --out"):
            out = tmp_path / command.split()[0]
            with pytest.raises(SystemExit) as exit_:
                cli.main([*command.split(), str(out)])
            assert exit_.value.code == 0
            hub.repos["model", "ann/exported"] = held(out)
    back = Policy.from_pretrained(tmp_path / "import", device="cpu")
    np.testing.assert_array_equal(back.infer(OBSERVATIONS), policy.infer(OBSERVATIONS))


def test_what_is_no_such_folder_or_does_not_fit_is_named(tmp_path):
    folder = exported(acting_policy("tiny", "chunk", tmp_path), tmp_path)
    with pytest.raises(UserError, match=r"policy-bins: has no folder lapa/, so no policy of `lapa export lerobot`"):
        imported(FROZEN / "policy-bins", tmp_path / "back")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("out.weight"))
    for change, message in {
        "missing": rf"model.safetensors: does not fit .*{name} is missing",
        "extra": r"spare is in no such policy",
        "misshapen": rf"{name} is of shape \[1, 32\], not \[3, 32\]",
        "not finite": rf"{name} holds numbers that are not finite",
    }.items():
        changed = dict(weights)
        if change == "missing":
            del changed[name]
        else:
            other = {"extra": torch.zeros(2), "misshapen": weights[name][:1], "not finite": weights[name] / 0}
            changed["spare" if change == "extra" else name] = other[change].contiguous()
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            imported(folder, tmp_path / "back")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model.safetensors: does not fit"):
        imported(folder, tmp_path / "back")
    config = folder / "lapa" / "config.json"
    config.write_text(config.read_text().replace('"x"', '"z"'))
    with pytest.raises(UserError, match=r"config.json"):
        imported(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_config_of_a_gigantic_model_allocates_nothing(tmp_path):
    folder = exported(acting_policy("smolvlm", "chunk", tmp_path), tmp_path)
    (folder / "lapa" / "SHA256SUMS").unlink()
    config = folder / "lapa" / "model" / "config.json"
    values = json.loads(config.read_text())
    values["text_config"]["num_hidden_layers"] = 10**7
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"num_hidden_layers 10,000,000 does not fit its weights"):
        imported(folder, tmp_path / "back")
