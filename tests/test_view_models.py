"""`lapa view` of latent action models and policies: data, server, export, and the pages in a headless Chromium."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("starlette", reason="needs lapa-vla[serve]")
pytest.importorskip("websockets", reason="needs lapa-vla[serve]")

import lapa
from acting_policies import CAMERAS, CHUNK, INSTRUCTION, acting_policy
from browser import Browser, browser
from lapa import LatentActionModel, Policy, UserError, cli
from lapa.data.dataset import ActionSpace
from lapa.data.lerobot import LeRobotDataset
from lapa.data.transforms import to_page
from lapa.latent.model import lam_fingerprint
from lapa.latent.show import decode_each, pixels, roll_out
from lapa.policy.runtime import Actor
from lapa.view.config import ViewConfig
from lapa.view.images import dataset_here, from_page
from lapa.view.lam import LamPages
from lapa.view.opening import open_pages
from lapa.view.policy import PolicyPages
from lapa.view.server import MOST_BYTES, running

FROZEN = Path(__file__).parent / "golden" / "frozen"
LAM, DATASET = FROZEN / "lam", FROZEN / "dataset"
PHOTO = np.indices((48, 64)).transpose(1, 2, 0)[..., [0, 1, 1]].astype(np.uint8) * 3


def opened(path: Path = LAM, **options: Any) -> Any:
    return open_pages(ViewConfig(str(path), **options))


def ask(pages: Any, name: str, **given: Any) -> dict[str, Any]:
    return pages.answer(name, json.dumps(given).encode())


@pytest.fixture(scope="module")
def pages() -> Iterator[LamPages]:
    made = opened(data=str(DATASET))
    yield made
    made.close()


@pytest.fixture(scope="module")
def small() -> LatentActionModel:
    return LatentActionModel.from_pretrained(LAM)


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


def test_an_example_has_its_frames_and_their_codes(pages: LamPages, small: LatentActionModel) -> None:
    dataset, (episode, frame) = LeRobotDataset(DATASET), pages.places[1]
    (model,) = pages.json("example-1")["models"]
    step = round(small.horizon * dataset.fps)
    truth = dataset.frames(episode, [frame, frame + step])
    np.testing.assert_array_equal(from_page(model["frames"][0]), truth[0])
    assert model["codes"][0] == small.codes(truth)[0].tolist()
    assert len(model["frames"]) == len(model["codes"]) + 1


def test_codes_pressed_one_after_the_other_are_a_rollout(pages: LamPages, small: LatentActionModel) -> None:
    """The page sends the prediction back, as it came."""
    start = pages.json("example-0")["models"][0]["frames"][0]
    actions, image = [[1, 2, 3, 4], [1, 2, 3, 4], [0, 7, 0, 7]], start
    for codes in actions:
        answer = ask(pages, "step", model=0, image=image, codes=codes)
        image = answer["image"]
    frame_CHW = torch.from_numpy(from_page(start).transpose(2, 0, 1).copy())
    expected = pixels(roll_out(small, frame_CHW, torch.tensor(actions))[-1:] / 255)[0]
    np.testing.assert_array_equal(from_page(image), expected)
    assert from_page(answer["difference"]).shape == expected.shape and 0.05 <= answer["most"] <= 1


def test_each_code_is_shown_at_each_position(pages: LamPages, small: LatentActionModel) -> None:
    codes, config = [1, 2, 3, 4], small.config
    found = ask(pages, "each", model=0, image=to_page(PHOTO), codes=codes)
    assert len(found["actions"]) == config.latent_length * (config.codebook_size - 1) + 1
    assert all(sum(a != b for a, b in zip(action, codes, strict=True)) <= 1 for action in found["actions"])
    (steps,) = found["steps"]
    frames = torch.from_numpy(from_page(ask(pages, "image", images=[to_page(PHOTO)])["models"][0]["frames"][0]).copy())
    predicted = pixels(decode_each(small, frames.permute(2, 0, 1)[None], torch.tensor(found["actions"][3:4])))[0]
    # WebP is not exact.
    assert np.abs(from_page(steps[3]["image"]).astype(float) - predicted).mean() < 8


def test_a_pair_of_images_has_codes(pages: LamPages, small: LatentActionModel) -> None:
    pair = [PHOTO, np.ascontiguousarray(PHOTO[:, ::-1])]
    (model,) = ask(pages, "image", images=[to_page(each) for each in pair])["models"]
    assert model["codes"] == small.codes([Image.fromarray(each) for each in pair]).tolist()
    assert ask(pages, "image", images=[to_page(PHOTO)])["models"][0]["codes"] == []


def test_frequent_latent_actions_are_counted(pages: LamPages) -> None:
    found = pages.json("frequent-0")
    shares = [each["share"] for each in found["actions"]]
    assert found["sample"] > 0 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-3


IMAGE = to_page(PHOTO)


@pytest.mark.parametrize(("name", "given", "message"), [
    ("step", {"model": 0, "image": IMAGE, "codes": [1, 2, 3]}, "has 4 whole numbers, from 0 to 7"),
    ("step", {"model": 0, "image": IMAGE, "codes": [1, 2, 3, 8]}, "1,2,3,8: codes of this model lie in 0 to 7"),
    ("step", {"model": 0, "image": IMAGE, "codes": [1, 2, 3, True]}, "has 4 whole numbers"),
    ("step", {"model": 1, "image": IMAGE, "codes": [1, 2, 3, 4]}, "there are the models 0 to 0"),
    ("step", {"model": 0, "image": "data:image/png;base64,AAAA", "codes": [1, 2, 3, 4]}, "image: cannot be read"),
    ("step", {"model": 0, "image": "/etc/passwd", "codes": [1, 2, 3, 4]}, "image: not an image file"),
    ("step", {"model": 0, "codes": [1, 2, 3, 4]}, "image: not an image file"),
    ("image", {"images": []}, "give one image, or two"),
    ("image", {"images": [IMAGE, "data:image/png;base64,!"]}, "later image: damaged"),
    ("image", {"images": ["data:image/png;base64,\xe9"]}, "image: damaged"),
    ("each", {"model": 0, "image": IMAGE}, "has 4 whole numbers"),
])  # fmt: skip
def test_what_is_asked_wrongly_is_one_line(pages: LamPages, name: str, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(pages, name, **given)


@pytest.mark.parametrize("body", [b"", b"[]", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_object_is_refused(pages: LamPages, body: bytes) -> None:
    with pytest.raises(UserError, match="expected a JSON object"):
        pages.answer("step", body)


def test_the_server_answers_questions_of_its_own_page() -> None:
    def post(name: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/ask/{name}", body, headers)) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    body = json.dumps({"model": 0, "image": IMAGE, "codes": [1, 2, 3, 4]}).encode()
    with running(LAM, data=str(DATASET)) as url:
        status, answer = post("step", body)
        assert status == 200 and from_page(json.loads(answer)["image"]).shape == (32, 32, 3)
        assert post("step", body.replace(b"3, 4", b"3, 9"))[1].startswith(b"error: 1,2,3,9")
        assert post("about", body)[0] == post("_step", body)[0] == 404
        assert post("step", body, Origin="https://evil.example")[0] == 403
        assert post("step", bytes(MOST_BYTES + 1))[0] == 413


def test_two_models_have_codes_of_their_own(tmp_path: Path) -> None:
    other = LatentActionModel(replace(LatentActionModel.from_pretrained(LAM).config, latent_length=2, image_size=16))
    other.save_pretrained(tmp_path / "other")
    pages = opened(data=str(DATASET), compare=(str(tmp_path / "other"),))
    one, two = pages.json("example-0")["models"]
    assert (len(one["codes"][0]), len(two["codes"][0])) == (4, 2)
    assert from_page(ask(pages, "step", model=1, image=IMAGE, codes=[1, 2])["image"]).shape == (16, 16, 3)
    pages.close()


def test_a_continuous_model_applies_the_latent_of_two_frames(tmp_path: Path) -> None:
    config = LatentActionModel.from_pretrained(LAM).config
    LatentActionModel(replace(config, quantizer="continuous")).save_pretrained(tmp_path / "continuous")
    pages = opened(tmp_path / "continuous", data=str(DATASET))
    (model,) = pages.json("example-0")["models"]
    assert model["codes"] == [] and pages.json("frequent-0")["actions"] == []
    found = ask(pages, "step", model=0, image=IMAGE, pair=model["frames"][:2])
    assert from_page(found["image"]).shape == (32, 32, 3)
    with pytest.raises(UserError, match="a continuous model has no codes to press"):
        ask(pages, "step", model=0, image=IMAGE, codes=[1, 2, 3, 4])
    with pytest.raises(UserError, match="a pair is two images"):
        ask(pages, "step", model=0, image=IMAGE, pair=[IMAGE])
    pages.close()


def test_the_dataset_of_a_model_is_found(tmp_path: Path) -> None:
    """Where its config names it, and it is still the same one."""
    shutil.copytree(LAM, tmp_path / "lam")
    config = json.loads((tmp_path / "lam/config.json").read_text())
    fingerprint = LeRobotDataset(DATASET).fingerprint
    for known, found in ((fingerprint, "dataset"), ("another", None)):
        changed = {**config, "data": [str(tmp_path / "gone"), str(DATASET)], "datasets": {known: {"name": "squares"}}}
        (tmp_path / "lam/config.json").write_text(json.dumps(changed))
        pages = opened(tmp_path / "lam")
        assert pages.json("about")["dataset"] == found
        pages.close()


@pytest.mark.parametrize("named", ["lerobot:user/name", "one=lerobot:user/name:0.5", "user/name", "videos:/",
                                   "rlds:gs://bucket/name", "s3://bucket/name", "x" * 5000, "\0", "", 7])  # fmt: skip
def test_no_other_source_is_opened_for_a_config(named: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_folders = []
    monkeypatch.setattr("lapa.view.images.LeRobotDataset", lambda *given: opened_folders.append(given))
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.chdir(tmp_path)
    assert dataset_here([named], ["known"]) is None and not opened_folders


@pytest.mark.parametrize("form", ["{}", "{}:0.5", "squares={},horizon=0.4:2"])
def test_a_dataset_folder_of_a_config_is_found_in_each_form(form: str) -> None:
    dataset = LeRobotDataset(DATASET)
    found = dataset_here([form.format(DATASET)], {dataset.fingerprint: {}})
    assert found is not None and found.fingerprint == dataset.fingerprint
    assert dataset_here([form.format(DATASET)], 3) is None


def test_options_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(UserError, match="dataset does not take --compare; leave it out"):
        opened(DATASET, compare=(str(LAM),))
    with pytest.raises(UserError, match="needs images to start from; give them: --data DATASET"):
        opened(export=Path("page"))


def presses(tab: Browser, num: int) -> None:
    """Waits until so many steps are shown, of each model."""
    tab.until(f"models.length && models.every(model => model.film && model.film.length === {num + 1})")


def test_a_person_presses_codes(tab: Browser, tmp_path: Path) -> None:
    with running(LAM, data=str(DATASET)) as url:
        tab.open(f"{url}/")
        presses(tab, 1)
        tab.until("document.querySelectorAll('.shots figure').length === 4")
        tab.run("document.querySelector('#code-0-2-5').click()")
        presses(tab, 2)
        assert tab.run("models[0].action.codes[2]") == 5 and "0.6 s" in tab.text("#state")
        tab.press("ArrowRight")
        presses(tab, 3)
        assert tab.run("models[0].action.codes[2]") == 6
        tab.press("ArrowDown")
        tab.press("7")
        presses(tab, 4)
        assert tab.run("models[0].action.codes[3]") == 7
        tab.run("document.querySelectorAll('.film button')[1].click()")
        presses(tab, 1)
        tab.press("Escape")
        presses(tab, 0)
        tab.run("showEach(models[0])")
        tab.until("document.querySelectorAll('.codes img').length === 64")
        Image.fromarray(PHOTO).save(tmp_path / "photo.png")
        (tmp_path / "none.png").write_bytes(b"none")
        tab.choose_files("#drops label:first-child input", [tmp_path / "none.png"])
        tab.until("document.getElementById('error').textContent.includes('image: cannot be read')")
        # The failed request, which the page reports itself.
        tab.complaints.clear()
        tab.drop("#drops label:first-child", tmp_path / "photo.png")
        tab.until("document.querySelector('.shots figcaption').textContent === 'image, as the model reads it'")
        assert tab.run("document.getElementById('error').hidden")
        tab.choose_files("#drops label:nth-child(2) input", [tmp_path / "photo.png"])
        presses(tab, 1)
        assert "The encoder reads" in tab.text("#models")
        assert tab.run("dropped.every(Boolean)")
        tab.run("document.querySelector('#examples button').click()")
        tab.until("dropped.every(address => address === null)")
    assert not tab.complaints


def test_a_person_compares_two_models_on_a_phone(tab: Browser) -> None:
    with running(LAM, data=str(DATASET), compare=(str(LAM),)) as url:
        tab.open(f"{url}/")
        presses(tab, 1)
        tab.run("document.getElementById('replay').click()")
        tab.until("models[0].film.length === models[0].clip.frames.length")
        assert tab.run("models.map(model => model.film.length)") == [tab.run("models[0].clip.frames.length")] * 2
        tab.run("document.getElementById('code-1-0-3').focus()")
        assert tab.run("active") == 1
        for width in (320, 390, 768):
            tab.resize(width, 800)
            tab.until(f"document.documentElement.scrollWidth <= {width}")
    assert not tab.complaints


def test_an_export_has_what_each_code_does(tab: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["view", str(LAM), "--data", str(DATASET), "--export", str(tmp_path / "page"), "--limit", "2"])
    assert exit.value.code == 0 and "2 images, each code applied to them up to 3 times" in capsys.readouterr().err
    assert not any(str(FROZEN) in path.read_text() for path in (tmp_path / "page").rglob("*.js"))
    tab.open((tmp_path / "page" / "index.html").as_uri())
    tab.until("document.querySelectorAll('.codes img').length === 64")
    for num in (1, 2, 3):
        tab.run("document.querySelector('#code-0-1-6').click()")
        presses(tab, num)
    tab.run("document.querySelector('#code-0-1-6').click()")
    tab.until("document.getElementById('error').textContent.includes('3 times at most')")
    tab.run("document.querySelector('#code-0-0-2').click()")
    presses(tab, 1)
    tab.run("replay()")
    tab.until("models[0].film.length === models[0].clip.frames.length")
    assert not tab.complaints and all(address.startswith(("file:", "data:", "blob:")) for address in tab.requests)


def test_models_of_an_export_stay_in_step(tab: Browser, tmp_path: Path) -> None:
    options = ["--data", str(DATASET), "--compare", str(LAM), "--export", str(tmp_path / "page"), "--limit", "1"]
    with pytest.raises(SystemExit) as exit:
        cli.main(["view", str(LAM), *options])
    assert exit.value.code == 0
    tab.open((tmp_path / "page" / "index.html").as_uri())
    presses(tab, 1)
    tab.until("models.every(model => model.each)")
    # Neither the video nor the export has this code after the first step, so both begin again.
    tab.run("document.querySelector('#code-0-1-6').click()")
    tab.until("models[0].action.codes[1] === 6 && models[0].film.length === 2")
    first = "models[1].film.length === 2 && models[1].film[1].image === models[1].clip.replay[0].image"
    assert tab.run(first), "the other model has taken the first step of the video, not the second"
    assert not tab.complaints


def test_a_step_that_is_gone_is_not_gone_back_to(tab: Browser) -> None:
    with running(LAM, data=str(DATASET)) as url:
        tab.open(f"{url}/")
        presses(tab, 1)
        tab.run("document.getElementById('again').click()")
        presses(tab, 2)
        tab.run("document.getElementById('reset').click(); document.querySelectorAll('.film button')[2].click()")
        presses(tab, 0)
        tab.run("document.getElementById('again').click()")
        presses(tab, 1)
    assert not tab.complaints


def test_a_continuous_model_next_to_one_with_codes_needs_a_later_image(tab: Browser, tmp_path: Path) -> None:
    config = replace(LatentActionModel.from_pretrained(LAM).config, quantizer="continuous", standardize_z=False)
    LatentActionModel(config).save_pretrained(tmp_path / "continuous")
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    with running(LAM, compare=(str(tmp_path / "continuous"),)) as url:
        tab.open(f"{url}/")
        tab.until("document.querySelectorAll('.drop').length === 2")
        tab.drop("#drops label:nth-child(1)", tmp_path / "photo.png")
        presses(tab, 0)
        tab.run("document.querySelector('#code-0-1-6').click()")
        tab.until(
            "document.getElementById('error').textContent.includes('no latent action to apply; give a later image')"
        )


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the frozen LAM, and of untrained policies that know its fingerprint: `bins`, `chunk` and `latent`."""
    folder = tmp_path_factory.mktemp("policies")
    shutil.copytree(LAM, folder / "lam")
    for head in ("bins", "chunk"):
        policy = acting_policy("tiny", head, folder, ("one", "two") if head == "chunk" else ("robot",))
        config = replace(policy.config, lam_fingerprint=lam_fingerprint(LAM))
        Policy(policy.model.grown(config), policy.processor, policy.statistics).save_pretrained(folder / head)
    policy = acting_policy("tiny", "bins", folder)
    alone = replace(
        policy.config, chunk=0, spaces=(), state_bins=(), action_bins=(), lam_fingerprint=lam_fingerprint(LAM)
    )
    Policy(policy.model.grown(alone), policy.processor).save_pretrained(folder / "latent")
    return folder


OBSERVED = {"images": dict.fromkeys(CAMERAS, IMAGE), "instruction": INSTRUCTION, "state": [0.1, 0.2]}


def test_a_policy_predicts_what_it_does_without_the_page(policies: Path) -> None:
    pages = opened(policies / "bins")
    found = ask(pages, "predict", **OBSERVED)
    policy = Policy.from_pretrained(policies / "bins", "cpu")
    observation = {**dict.fromkeys(CAMERAS, PHOTO), "instruction": INSTRUCTION, "state": np.array([0.1, 0.2])}
    np.testing.assert_allclose(found["actions"], policy.infer(observation), rtol=1e-3)
    (codes_L,) = policy.predict_codes([observation])
    assert found["codes"] == codes_L.tolist()
    shares_LR = np.array(found["shares"])
    np.testing.assert_allclose(shares_LR.sum(1), 1, atol=1e-2)
    assert (shares_LR.argmax(1) == codes_L).all()
    for dimension, bins in enumerate(found["bins"]):
        assert len(bins["values"]) == len(bins["shares"]) == policy.config.action_bins[dimension]
        best = bins["values"][int(np.argmax(bins["shares"]))]
        assert best == pytest.approx(found["actions"][0][dimension], rel=1e-3)
    pages.close()


def test_a_latent_action_is_decoded_by_the_model_that_labelled(policies: Path, tmp_path: Path) -> None:
    """The model is found by its fingerprint in the folder around the policy, or given."""
    small, frames = LatentActionModel.from_pretrained(LAM), None
    for path, options in (("bins", {}), ("latent", {}), ("latent", {"lam": str(LAM)})):
        pages = opened(policies / path, **options)
        assert pages.json("about")["lam"]["seconds"] == small.horizon
        found = ask(pages, "predict", **OBSERVED)
        frames = torch.from_numpy(from_page(found["decoded"]["before"]).copy()).permute(2, 0, 1)[None]
        expected = pixels(decode_each(small, frames, torch.tensor([found["codes"]])))[0]
        np.testing.assert_array_equal(from_page(found["decoded"]["image"]), expected)
        assert ("actions" in found) == (path == "bins")
        pages.close()
    shutil.copytree(policies / "latent", tmp_path / "alone" / "latent")
    pages = opened(tmp_path / "alone" / "latent")
    assert "lam" not in pages.json("about") and "decoded" not in ask(pages, "predict", **OBSERVED)
    pages.close()


def test_a_model_that_did_not_label_is_refused(policies: Path, tmp_path: Path) -> None:
    config = LatentActionModel.from_pretrained(LAM).config
    for name, changed in (("other", config), ("longer", replace(config, latent_length=6))):
        LatentActionModel(changed).save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="whose codes mean something else"):
        opened(policies / "bins", lam=str(tmp_path / "other"))
    with pytest.raises(UserError, match="predicts 4 codes of 8; give the model whose labels it learned"):
        opened(policies / "bins", lam=str(tmp_path / "longer"))
    with pytest.raises(UserError, match="has no latent actions; leave out --lam"):
        opened(FROZEN / "policy-bins", lam=str(LAM))


def test_each_dataset_has_statistics_of_its_own(policies: Path) -> None:
    pages = opened(policies / "chunk")
    assert pages.json("about")["statistics"] == ["one", "two"]
    one, two = (ask(pages, "predict", **OBSERVED, statistics=key) for key in ("one", "two"))
    assert one["actions"] != two["actions"] and "bins" not in one
    assert np.shape(one["actions"]) == (CHUNK, 3)
    pages.close()


@pytest.mark.parametrize(("changed", "message"), [
    ({"images": {}}, "there is no image of front, wrist; give one"),
    ({"images": {**OBSERVED["images"], "wrist": "data:image/png;base64,AAAA"}}, "image of wrist: cannot be read"),
    ({"images": [IMAGE]}, "expected images by camera"),
    ({"instruction": 3}, "expected images by camera, and an instruction"),
    ({"instruction": "go " * 1000}, "an instruction of 3000 characters"),
    ({"state": [1.0]}, "it has a state of shape"),
    ({"state": None}, "it has no state; this policy reads 2 numbers"),
    ({"state": ["a", "b"]}, "a state is a list of numbers"),
    ({"state": [10**400, 0]}, "a state has a number that is too large"),
    ({"statistics": "three"}, "unknown statistics 'three'"),
    ({"statistics": []}, "statistics are chosen by the name of a dataset"),
])  # fmt: skip
def test_an_observation_that_is_none_is_one_line(policies: Path, changed: Any, message: str) -> None:
    pages = opened(policies / "chunk")
    with pytest.raises(UserError, match=message):
        ask(pages, "predict", **{**OBSERVED, **changed})
    pages.close()


@pytest.mark.parametrize("name", ["policy-bins", "policy-chunk", "policy-flow"])
def test_examples_of_a_dataset_have_their_true_actions(name: str) -> None:
    pages, dataset = opened(FROZEN / name, data=str(DATASET)), LeRobotDataset(DATASET)
    episode, frame = pages.places[2]
    example = pages.json("example-2")
    np.testing.assert_allclose(example["actions"], dataset.actions(episode)[frame : frame + 2], rtol=1e-3)
    np.testing.assert_array_equal(from_page(example["images"]["front"]), dataset.frames(episode, [frame])[0])
    given = {key: example[key] for key in ("images", "instruction", "state")}
    assert np.shape(ask(pages, "predict", **given)["actions"]) == (2, 2)
    pages.close()


def test_a_dataset_that_does_not_fit_the_policy_is_refused(policies: Path) -> None:
    with pytest.raises(UserError, match="the policy those named front, wrist; give a dataset with these"):
        opened(policies / "bins", data=str(DATASET))
    with pytest.raises(UserError, match="an export needs observations to predict from"):
        opened(policies / "bins", export=Path("page"))


class Still(Actor):
    """A policy of another kind, which does not move."""

    cameras, chunk, fps = ("front",), 2, None
    action_space = ActionSpace(("right", "down"), (False, False))

    def act(self, observations: Any) -> np.ndarray:
        return np.zeros((len(observations), 2, 2), np.float32)


def test_other_policies_have_robot_actions_alone() -> None:
    pages = PolicyPages("still", {"": Still()})
    pages.take_examples(LeRobotDataset(DATASET), 2)
    about, example = pages.json("about"), pages.json("example-1")
    assert (
        not about["latent"] and about["acts"]["names"] == ["right", "down"] and np.shape(example["actions"]) == (2, 2)
    )
    assert ask(pages, "predict", images=example["images"]) == {"actions": [[0, 0], [0, 0]]}
    pages.close()


def test_a_person_asks_a_policy(tab: Browser, policies: Path, tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    with running(policies / "chunk") as url:
        tab.open(f"{url}/")
        tab.until("document.querySelectorAll('.drop').length === 2")
        tab.run("document.getElementById('predict').click()")
        tab.until("document.getElementById('error').textContent.includes('there is no image of front, wrist')")
        for number in (1, 2):
            tab.drop(f"#drops label:nth-child({number})", tmp_path / "photo.png")
        tab.until("Object.keys(images).length === 2")
        tab.run("document.getElementById('instruction').focus()")
        tab.type(INSTRUCTION)
        tab.press("Enter")
        tab.until("document.querySelectorAll('#curves figure').length === 3")
        assert tab.run("document.getElementById('error').hidden")
        assert tab.run("document.querySelectorAll('#shares figure').length") == 4
        assert tab.run("document.querySelectorAll('#shots img').length") == 3
        for width in (320, 390, 768):
            tab.resize(width, 800)
            tab.until(f"document.documentElement.scrollWidth <= {width}")
    assert not tab.complaints


def test_an_example_is_predicted_with_the_statistics_of_its_dataset(
    tab: Browser, policies: Path, tmp_path: Path
) -> None:
    writer = lapa.DatasetWriter(
        tmp_path / "two", fps=10, cameras=dict.fromkeys(CAMERAS, (48, 64)), action_names=["x", "y", "grip"],
        binary_actions=["grip"], state_names=["a", "b"],
    )  # fmt: skip
    frames = dict.fromkeys(CAMERAS, np.stack([PHOTO] * 6))
    writer.add_episode(frames, INSTRUCTION, actions=np.zeros((6, 3)), states=np.zeros((6, 2)))
    writer.finish()
    with running(policies / "chunk", data=str(tmp_path / "two")) as url:
        tab.open(f"{url}/")
        tab.until("document.querySelectorAll('#curves figure').length === 3")
        assert tab.run("document.getElementById('statistics').value") == "two"


def test_an_export_has_predictions(tab: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(DATASET), "--export", str(tmp_path / "page"), "--limit", "2"]
    with pytest.raises(SystemExit) as exit:
        cli.main(["view", str(FROZEN / "policy-bins"), *options])
    assert exit.value.code == 0 and "predictions for 2 observations" in capsys.readouterr().err
    tab.open((tmp_path / "page" / "index.html").as_uri())
    tab.until("document.querySelectorAll('#bins figure').length === 2")
    tab.run("document.querySelectorAll('#examples button')[1].click()")
    tab.until("document.querySelectorAll('#examples button')[1].getAttribute('aria-pressed') === 'true'")
    assert tab.run("document.getElementById('predict').hidden") and "recorded" in tab.text("#actions-about")
    assert not tab.complaints and all(address.startswith(("file:", "data:", "blob:")) for address in tab.requests)
