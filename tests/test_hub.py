"""The hub: what is pushed comes back the same, over cut connections too; mistakes are one line; cards hold figures."""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel

import lapa
from fake_hub import TOKEN, FakeHub
from lapa import cli
from lapa.checksums import SUMS, sums_of, write_marker
from lapa.hub.artifacts import read_artifact, without_paths
from lapa.hub.download import HubId, as_hub_id
from lapa.labelling.config import LabelConfig
from lapa.labelling.run import run as label
from lapa.latent.model import LatentActionModel, lam_fingerprint
from lapa.on_import import after_import
from lapa.presets import LATENT
from lapa.sources.synthetic import write_synthetic_dataset

FROZEN = Path(__file__).parent / "golden" / "frozen"
FRAMES = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
# Of the machine, in options and commands.
SECRET = "/home/ann/secret place"
LICENSE = ("--license", "cc-by-4.0")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        hub.used(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one artifact of each kind, each with what a run leaves next to it."""
    root = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    write_synthetic_dataset(root / "dataset", episodes=4, frames=10, size=32, fps=10)
    model = LatentActionModel(LATENT["debug"].model)
    learned = {"abc": {"name": "squares", "horizon_seconds": 0.3}}
    model.save_pretrained(root / "lam", {"data": [f"{SECRET}/videos"], "datasets": learned, "loop": {"steps": 3}})
    command = "lapa latent train --data /home/ann/videos --out runs/lam"
    (root / "lam" / "metrics.json").write_text(json.dumps({"mse": 0.125, "mse_copy": 0.5, "command": command}))
    probe = {"reconstruction": {"mse": 0.25, "moving": [1, 2]}, "num_pairs": 7, "config": {"lam": f"{SECRET}/lam"}}
    (root / "lam" / "probe_squares").mkdir()
    (root / "lam" / "probe_squares" / "probe.json").write_text(json.dumps(probe))
    label(LabelConfig(lam=root / "lam", data=str(root / "dataset"), out=str(root / "labels"), shard_episodes=2))
    policy = lapa.Policy.from_pretrained(FROZEN / "policy-chunk", device="cpu")
    run = {"data": [f"{SECRET}/robot"], "out": f"{SECRET}/policy"}
    policy.save_pretrained(root / "policy", run=run, metrics={"held_out_action_error": 0.0625, "samples_per_s": 9.0})
    results = root / "results"
    (results / "videos").mkdir(parents=True)
    (results / "videos" / "reach.mp4").write_bytes(b"film")
    (results / "config.json").write_text("{}\n")
    task = {"successes": 3, "episodes": 4, "success_rate": 0.75, "interval": [0.3, 0.95]}
    report = {"policy": f"{SECRET}/policy", "env": "metaworld", "seed": 1, "tasks": {"reach": task}, "overall": task}
    write_marker(results, "results.json", report, ["config.json", "videos/reach.mp4"])
    for name in ("lam", "policy"):
        (root / name / "training").mkdir()
        (root / name / "training" / "step.pt").write_bytes(b"x" * 1000)
        (root / name / ".config.17.partial.json").write_bytes(b"half")
        (root / name / "notes.txt").write_text("mine")
    (root / "policy" / "model" / ".ipynb_checkpoints").mkdir()
    for own in ("notes.txt", ".ipynb_checkpoints/notes.txt"):
        (root / "policy" / "model" / own).write_text("mine")
    return root


def push(*arguments: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["push", *map(str, arguments)])
    assert exit_.value.code == 0


def failure(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main([*map(str, arguments)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lapa: error: ")]
    assert exit_.value.code == 2
    return line


def card(files) -> tuple[dict, str]:
    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def observation():
    return {"front": np.full((40, 32, 3), 90, np.uint8), "instruction": "go right", "state": np.zeros(2, np.float32)}


def require_sums(files) -> None:
    """SHA256SUMS fits what was pushed."""
    lines = files[SUMS].decode().splitlines()
    assert lines
    for line in lines:
        digest, _, name = line.partition("  ")
        assert hashlib.sha256(files[name]).hexdigest() == digest, name


def test_a_lam_comes_back_the_same(hub, root, capsys):
    push(root / "lam", "ann/lam", *LICENSE)
    assert f"{hub.url}/ann/lam" in (said := capsys.readouterr().err)
    assert "next: lapa latent probe ann/lam --data DATASET" in said
    files = hub.repos["model", "ann/lam"].files()
    assert set(files) == {
        *("config.json", "model.safetensors", "metrics.json", "probe_squares/probe.json", SUMS, "README.md")
    }
    require_sums(files)
    assert not any(b"/home/ann" in content or b"secret" in content for content in files.values())
    metadata, text = card(files)
    assert (metadata["license"], metadata["library_name"], metadata["tags"][0]) == ("cc-by-4.0", "lapa", "lapa")
    (measured,) = metadata["model-index"][0]["results"]
    assert {each["type"]: each["value"] for each in measured["metrics"]} == {"mse": 0.125, "mse_copy": 0.5}
    assert "| mse | 0.125 |" in text and "| reconstruction.mse | 0.25 |" in text and "- squares" in text
    assert 'from_pretrained("ann/lam")' in text and "lapa latent train --data videos --out runs/lam" in text
    own, again = LatentActionModel.from_pretrained(root / "lam"), LatentActionModel.from_pretrained("ann/lam")
    assert torch.equal(own.codes(FRAMES), again.codes(FRAMES))
    assert lam_fingerprint("ann/lam") == lam_fingerprint(root / "lam")
    assert again.notes["datasets"] == own.notes["datasets"]


def test_a_policy_comes_back_the_same(hub, root):
    push(root / "policy", "ann/policy", *LICENSE)
    files = hub.repos["model", "ann/policy"].files()
    require_sums(files)
    assert not any("training" in name or "partial" in name or name.endswith("notes.txt") for name in files)
    assert not any(b"secret" in content for content in files.values())
    metadata, text = card(files)
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.0625
    assert "held_out_action_error | 0.0625" in text and "samples_per_s" not in text and "right, down" in text
    own, again = (lapa.Policy.from_pretrained(name, device="cpu") for name in (root / "policy", "ann/policy"))
    assert np.array_equal(own.infer(observation()), again.infer(observation()))
    assert again.metrics["held_out_action_error"] == 0.0625


def test_labels_come_back_the_same(hub, root):
    push(root / "labels", "ann/labels", *LICENSE)
    files = hub.repos["dataset", "ann/labels"].files()
    require_sums(files)
    metadata, _ = card(files)
    assert metadata["configs"] == [{"config_name": "default", "data_files": "episodes-*.parquet"}]
    own, again = lapa.Labels.open(root / "labels"), lapa.Labels.open("ann/labels@main")
    assert all(np.array_equal(own.codes(episode)[1], again.codes(episode)[1]) for episode in range(4))
    assert own.push_to_hub("ann/again") == f"{hub.url}/datasets/ann/again"


def test_a_dataset_comes_back_the_same(hub, root, tmp_path, monkeypatch):
    push(root / "dataset", "ann/squares", "--license", "mit")
    repo = hub.repos["dataset", "ann/squares"]
    require_sums(repo.files())
    metadata, text = card(repo.files())
    assert metadata["configs"] == [{"config_name": "default", "data_files": "data/*/*.parquet"}]
    assert "LeRobot" in metadata["tags"] and "| episodes | 4 |" in text
    # LeRobot looks for a tag with the version of the layout.
    assert list(repo.tags) == ["v3.0"]
    own = lapa.open_dataset(root / "dataset")
    for data in ("ann/squares", "lerobot:ann/squares", "ann/squares@v3.0", "two=ann/squares:0.5"):
        again = lapa.open_dataset(data)
        assert np.array_equal(own.frames(3, [2, 5]), again.frames(3, [2, 5]))
        assert (again.fingerprint, again.in_place) == (own.fingerprint, True)
    assert (lapa.open_dataset("two=ann/squares:0.5").weight, lapa.open_dataset("ann/squares@main").name) == (
        0.5,
        "squares",
    )
    before = repo.tags["v3.0"]
    (changed := tmp_path / "changed").mkdir()
    shutil.copytree(root / "dataset", changed, dirs_exist_ok=True)
    (changed / "meta" / "lapa.json").write_text('{"action_space": {"control": "delta"}}')
    lapa.open_dataset(changed).push_to_hub("ann/squares", license="mit")
    assert repo.tags["v3.0"] != before
    require_sums(repo.files())


def test_results_are_pushed_with_their_table(hub, root):
    push(root / "results", "ann/results", *LICENSE)
    files = hub.repos["dataset", "ann/results"].files()
    require_sums(files)
    assert files["videos/reach.mp4"] == b"film" and not any(b"secret" in content for content in files.values())
    metadata, text = card(files)
    assert "| reach | 3 of 4 | 75% (30% to 95%) |" in text and "configs" not in metadata


def test_every_command_takes_ids_of_the_hub(hub, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("lam", "policy", "labels", "dataset"):
        push(root / name, f"ann/{name}", *LICENSE)
    trained = ["--data", "ann/dataset", "--labels", "ann/labels", "--out", "out/latent"]
    for command in (
        ["label", "--lam", "ann/lam", "--data", "ann/dataset", "--out", "out/labels"],
        ["latent", "probe", "ann/lam@main", "--data", "ann/dataset", "--num-pairs", "8"],
        ["policy", "pretrain", "--preset", "debug", "--steps", "1", *trained],
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(command)
        assert exit_.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "probe_dataset" / "probe.json").exists()
    own, made = lapa.Labels.open(root / "labels"), lapa.Labels.open(tmp_path / "out" / "labels")
    assert own.manifest == made.manifest
    error = failure(capsys, "evaluate", "ann/policy", "--env", "synthetic", "--tasks", "nothing", "--out", "out/r")
    assert "nothing" in error
    push(tmp_path / "out" / "latent", "ann/latent", *LICENSE)
    assert "lapa policy finetune --policy ann/latent" in card(hub.repos["model", "ann/latent"].files())[1]
    out = ("--tasks", "all", "--out", "out/results")
    assert "only pretrained" in failure(capsys, "evaluate", "ann/latent", "--env", "synthetic", *out)


def test_private_and_revision_and_token_reach_the_hub(hub, root, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    model = LatentActionModel.from_pretrained(root / "lam")
    model.push_to_hub("ann/lam", private=True, revision="v2", token=TOKEN)
    assert hub.created[-1]["name"] == "lam" and hub.repos["model", "ann/lam"].private
    repo = hub.repos["model", "ann/lam"]
    assert "model.safetensors" in repo.files("v2") and not repo.files("main")
    assert hub.tokens == {TOKEN}
    for again in (
        LatentActionModel.from_pretrained("ann/lam", revision="v2", token=TOKEN),
        LatentActionModel.from_pretrained("ann/lam@v2", token=TOKEN),
        LatentActionModel.from_pretrained("ann/lam", revision=repo.branches["v2"], token=TOKEN),
    ):
        assert torch.equal(again.codes(FRAMES), model.codes(FRAMES))
    with pytest.raises(lapa.UserError, match=r"ann/lam: the model on the hub has no config\.json"):
        LatentActionModel.from_pretrained("ann/lam", token=TOKEN)
    with pytest.raises(lapa.UserError, match=r"no such repository, or a private one\); correct the name, or log in"):
        LatentActionModel.from_pretrained("ann/lam")
    with pytest.raises(lapa.UserError, match="names a revision, and 'v3' is another one"):
        LatentActionModel.from_pretrained("ann/lam@v2", revision="v3")
    with pytest.raises(lapa.UserError, match="a folder here, which has no revision"):
        LatentActionModel.from_pretrained(root / "lam", revision="v3")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo.private = False
    assert "is there and public; make it private" in failure(
        capsys, "push", root / "lam", "ann/lam", "--private", *LICENSE
    )


def test_an_error_of_the_hub_is_one_line_with_the_fix(hub, root, monkeypatch, capsys, tmp_path):
    push(root / "policy", "ann/policy", *LICENSE)
    push(root / "labels", "ann/labels", *LICENSE)
    out = ("--env", "synthetic", "--tasks", "all", "--out", str(tmp_path / "r"))
    error = failure(capsys, "evaluate", "ann/none", *out)
    assert "ann/none: neither a folder here nor a model on the hub" in error and "`lapa policy pretrain`" in error
    error = failure(capsys, "evaluate", "ann/policy@v9", *out)
    assert error.endswith(f"has no revision 'v9'; choose a branch, tag or commit of {hub.url}/ann/policy")
    assert "neither a folder" in failure(capsys, "label", "--lam", "ann/labels", "--data", str(root / "dataset"))
    error = failure(
        capsys, "label", "--lam", "ann/policy", "--data", str(root / "dataset"), "--out", str(tmp_path / "l")
    )
    assert error.startswith("lapa: error: ann/policy: ") and '"model"; give the folder of a latent' in error
    error = failure(capsys, "data", "info", "ann/labels")
    assert "ann/labels: the dataset on the hub has no meta/info.json" in error
    push(root / "policy", "ann/gated", *LICENSE)
    hub.repos["model", "ann/gated"].gated = True
    error = failure(capsys, "evaluate", "ann/gated", *out)
    assert f"is gated; ask for access at {hub.url}/ann/gated, and log in" in error
    assert "no permission (403: You don't have the rights" in failure(
        capsys, "push", root / "lam", "someone-else/lam", *LICENSE
    )
    assert '"license" must be one of the list' in failure(capsys, "push", root / "lam", "ann/x", "--license", "bad")
    with monkeypatch.context() as patch:
        full = ("POST /api/repos/create", lambda handler, allowed: handler._error(422, message="too many of them"))
        patch.setattr("fake_hub.ROUTES", [full])
        error = failure(capsys, "push", root / "lam", "ann/x", *LICENSE)
    assert error.endswith(f"refuses this (422: too many of them); correct the name or the revision of {hub.url}/ann/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for command in (["push", root / "lam", "ann/lam", *LICENSE], ["evaluate", "ann/gated", *out]):
        assert "the hub refuses the token, or there is none (401); log in with" in failure(capsys, *command)


def test_without_a_network_what_was_downloaded_is_used(hub, root, monkeypatch, capsys):
    model = LatentActionModel.from_pretrained(root / "lam")
    model.push_to_hub("ann/lam")
    LatentActionModel.from_pretrained("ann/lam")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(LatentActionModel.from_pretrained("ann/lam").codes(FRAMES), model.codes(FRAMES))
    error = failure(capsys, "latent", "probe", "ann/other", "--data", str(root / "dataset"))
    assert "neither a folder here nor a model on the hub" in error and "check the network" in error
    error = failure(capsys, "push", root / "lam", "ann/lam", *LICENSE)
    assert "the connection to the hub failed" in error and "keeps the files that arrived" in error


def test_a_cut_download_goes_on_and_fetches_nothing_twice(hub, root, monkeypatch):
    model = LatentActionModel.from_pretrained(root / "lam")
    model.push_to_hub("ann/lam")
    hub.cut, hub.cuts = 100_000, 100
    with pytest.raises(lapa.UserError, match=r"ann/lam: the connection to the hub failed .* keeps the files that arr"):
        LatentActionModel.from_pretrained("ann/lam")
    # Less than this is in flight and lost when the connection breaks.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    # Before 2.0, huggingface_hub tried again only where the connection timed out.
    hub.cuts = 0 if (old := huggingface_hub.__version__.startswith("1.")) else 1
    assert torch.equal(LatentActionModel.from_pretrained("ann/lam").codes(FRAMES), model.codes(FRAMES))
    assert old or hub.ranges == ["bytes=100000-"]
    fetched = [path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert fetched.count("config.json") == fetched.count(SUMS) == 1


def test_a_cut_push_goes_on_and_sends_nothing_twice(hub, root, capsys):
    hub.cut, hub.cuts = 150_000, 100
    error = failure(capsys, "push", root / "policy", "ann/policy", *LICENSE)
    assert "ann/policy: the connection to the hub failed" in error and "keeps the files that arrived" in error
    assert not hub.repos["model", "ann/policy"].files()
    before = dict(hub.sent)
    assert before, "files smaller than the cut are on the hub"
    hub.cuts = 0
    push(root / "policy", "ann/policy", *LICENSE)
    assert set(hub.sent.values()) == {1} and before.items() <= hub.sent.items() and len(hub.sent) > len(before)
    assert lapa.Policy.from_pretrained("ann/policy", device="cpu").acts
    sent = dict(hub.sent)
    push(root / "policy", "ann/policy", *LICENSE)
    assert dict(hub.sent) == sent, "nothing has changed"


def test_a_second_push_removes_what_the_first_alone_had(hub, root, tmp_path):
    torch.manual_seed(0)
    push(root / "labels", "ann/labels", *LICENSE)
    repo = hub.repos["dataset", "ann/labels"]
    repo.commits[repo.branches["main"]]["mine.txt"] = b"kept"
    shards = {name for name in repo.files() if name.endswith(".parquet")}
    label(LabelConfig(lam=root / "lam", data=str(root / "dataset"), out=str(tmp_path / "new"), shard_episodes=4))
    push(tmp_path / "new", "ann/labels", *LICENSE)
    assert len(shards) == 2 and not shards & set(repo.files()) and repo.files()["mine.txt"] == b"kept"
    assert lapa.Labels.open("ann/labels").manifest.num_episodes == 4


def test_what_cannot_be_pushed_is_named(hub, root, tmp_path, capsys):
    error = failure(capsys, "push", root / "lam", "ann/lam")
    assert "--license is needed" in error and "apache-2.0, mit" in error
    assert "'By 4' is no licence" in failure(capsys, "push", root / "lam", "ann/lam", "--license", "By 4")
    assert "is no id on the hub; give the repository" in failure(capsys, "push", root / "lam", "lam", *LICENSE)
    assert "no such folder" in failure(capsys, "push", tmp_path / "none", "ann/lam", *LICENSE)
    assert "holds no finished artifact; give" in failure(capsys, "push", tmp_path, "ann/lam", *LICENSE)
    (tmp_path / "training").mkdir()
    assert "finish it with --resume" in failure(capsys, "push", tmp_path, "ann/lam", *LICENSE)
    shutil.copytree(root / "lam", tmp_path / "lam")
    (tmp_path / "lam" / "model.safetensors").write_bytes(b"damaged")
    assert "model.safetensors: damaged or changed" in failure(capsys, "push", tmp_path / "lam", "ann/lam", *LICENSE)
    assert not hub.repos


def test_a_dry_run_shows_files_and_card(hub, root, capsys):
    push(root / "policy", "ann/policy", *LICENSE, "--dry-run")
    said = capsys.readouterr().err
    assert "model/model.safetensors" in said and "license: cc-by-4.0" in said and "nothing was pushed" in said
    assert not hub.requests


def test_a_card_promises_what_the_model_can_do_and_says_what_its_figures_are_of(hub, root, tmp_path):
    shutil.copytree(root / "lam", tmp_path / "lam")
    (tmp_path / "lam" / SUMS).unlink()
    config = json.loads((tmp_path / "lam" / "config.json").read_text())
    config["model"] |= {"quantizer": "continuous", "latent_length": 2, "quant_dim": 8}
    (tmp_path / "lam" / "config.json").write_text(json.dumps(config))
    figures = {"mse": 0.25, "num_held_out_episodes": 0, "peak_memory_gib": 3.5}
    (tmp_path / "lam" / "metrics.json").write_text(json.dumps(figures))
    push(tmp_path / "lam", "ann/lam", *LICENSE)
    metadata, text = card(hub.repos["model", "ann/lam"].files())
    assert "to 2 vectors of 8 numbers" in text and "lapa latent probe ann/lam" in text
    assert "codes" not in text and "lapa label" not in text
    assert "On the training episodes" in text and "peak_memory_gib" not in text
    (results,) = metadata["model-index"][0]["results"]
    assert "training episodes" in results["dataset"]["name"]


def test_a_card_of_the_folder_keeps_its_text(hub, root, tmp_path):
    shutil.copytree(root / "lam", tmp_path / "lam")
    (tmp_path / "lam" / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n\nWords.\n")
    push(tmp_path / "lam", "ann/lam", *LICENSE)
    metadata, text = card(hub.repos["model", "ann/lam"].files())
    assert (metadata["license"], metadata["tags"], text.strip()) == ("cc-by-4.0", ["mine"], "# Mine\n\nWords.")


def test_automodel_loads_a_lam_and_a_policy(hub, root):
    for name in ("lam", "policy"):
        push(root / name, f"ann/{name}", *LICENSE)
    # In a process of its own lapa is imported after transformers, in this one before.
    checks = (
        f"for place in ({str(root)!r} + '/', 'ann/'):\n"
        "    assert AutoConfig.from_pretrained(place + 'lam').model_type == 'lapa_lam'\n"
        "    assert AutoConfig.from_pretrained(place + 'policy').policy['head'] == 'chunk'\n"
        "    assert isinstance(AutoModel.from_pretrained(place + 'lam'), lapa.LatentActionModel)\n"
        "    assert isinstance(AutoModel.from_pretrained(place + 'policy', device='cpu'), lapa.Policy)\n"
    )
    late = f"from transformers import AutoConfig, AutoModel\nimport lapa\n{checks}"
    environment = {**os.environ, **hub.settings(root / "other-cache")}
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for folder, kind in (("lam", lapa.LatentActionModel), ("policy", lapa.Policy)):
        assert isinstance(AutoModel.from_pretrained(root / folder), kind)
        assert isinstance(AutoModel.from_pretrained(root / folder, device_map={"": "cpu"}), kind)
        with pytest.raises(lapa.UserError, match="a model of lapa is on one device"):
            AutoModel.from_pretrained(root / folder, device_map={"vision": 0, "text": "cpu"})


def test_a_module_that_is_imported_later_is_found_as_before_and_calls_once(tmp_path, monkeypatch):
    (tmp_path / "later_module.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    called = []
    monkeypatch.setattr(
        "lapa.hub.config.called", lambda: called.append(sys.modules["later_module"].value), raising=False
    )
    before = list(sys.meta_path)
    after_import("later_module", "lapa.hub.config:called")
    assert called == []
    importlib.import_module("later_module")
    assert called == [3] and sys.meta_path == before
    after_import("later_module", "lapa.hub.config:called")
    assert called == [3, 3]
    del sys.modules["later_module"]


def test_artifacts_of_before_have_no_model_type_and_are_pushed(hub):
    push(FROZEN / "lam", "ann/old", *LICENSE)
    assert torch.equal(
        LatentActionModel.from_pretrained("ann/old").codes(FRAMES),
        LatentActionModel.from_pretrained(FROZEN / "lam").codes(FRAMES),
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/ann/data/bridge", "bridge"),
        ("/home/ann/my data/bridge", "bridge"),
        ("~/runs/lam", "lam"),
        ("../ann/lam", "lam"),
        ("runs/lam", "runs/lam"),
        ("bridge=rlds:/home/ann/bridge/1.0.0,camera=front:0.5", "bridge=rlds:1.0.0,camera=front:0.5"),
        ("lapa latent train --data '/home/ann/v' /x/y --out=/tmp/lam", "lapa latent train --data 'v' y --out=lam"),
        ("s3://bucket/clips", "s3://bucket/clips"),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("and/or", "and/or"),
        ("6 / 7 solved", "6 / 7 solved"),
        ("/ or \\", "/ or \\"),
        ("/", "/"),
    ],
)
def test_paths_of_the_machine_are_left_out(text, told):
    assert without_paths({"a": [text, 1]}) == {"a": [told, 1]}


def test_what_may_be_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lam").mkdir(parents=True)
    assert as_hub_id("runs/lam") is None and as_hub_id("runs/policy") == HubId("runs/policy")
    assert as_hub_id("ann/lam@refs/pr/1") == HubId("ann/lam", "refs/pr/1")
    for text in ("lam", "/ann/lam", "./lam", "../lam", "a/b/c", "s3://ann/lam", "~/lam", "ann/", "x" * 5000, "a b/c"):
        assert as_hub_id(text) is None
    for revision in ("", "a b", "a@b", "..", "a/../b", "."):
        with pytest.raises(lapa.UserError, match=re.escape(f"ann/lam: {revision!r} is no revision; give a branch")):
            as_hub_id("ann/lam", revision)


def test_sums_of_an_artifact_that_tells_nothing_are_its_own(root):
    artifact = read_artifact(root / "dataset")
    assert artifact.files[SUMS].decode() == (root / "dataset" / SUMS).read_text()
    assert set(sums_of(root / "dataset", [name for name in artifact.files if name != SUMS]))
    assert replace(artifact, kind="dataset").num_bytes > 1000


@pytest.mark.parametrize(
    ("kind", "file", "change"),
    [
        ("lam", "config.json", {"datasets": {"abc": "x"}}),
        ("results", "results.json", {"tasks": {"reach": 1}}),
        ("policy", "config.json", {"run": []}),
        ("dataset", "meta/info.json", {"features": {"action": 1}}),
    ],
)
def test_a_damaged_entry_is_one_line_when_pushed(hub, root, tmp_path, capsys, kind, file, change):
    folder = shutil.copytree(root / kind, tmp_path / kind)
    (folder / SUMS).unlink()
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    line = failure(capsys, "push", folder, "ann/damaged", "--license", "mit")
    assert f"{folder}: no card can be written" in line
    assert not hub.repos
