"""The page of a served policy, in a headless Chromium: what a person sees, and what the policy returns."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
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

from browser import Browser, browser
from lapa.data.dataset import ActionSpace
from lapa.policy.actions import ActionBins, KeyedSpace, Statistics
from lapa.policy.backbones import create_backbone
from lapa.policy.config import TinyConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy
from lapa.serve import client
from lapa.serve.protocols import from_json
from lapa.serve.server import PAGE, running

HTML = "open <img src=x onerror='window.bad=1'><script>window.bad=1</script>"


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Untrained; two cameras, a state of three numbers, chunks of five actions."""
    rng, space = np.random.default_rng(0), ActionSpace(("lift", "turn", "gripper"), (False, False, True), "delta")
    actions_NA = np.stack([*rng.normal(size=(2, 900)), rng.choice([0.0, 1.0], 900)], axis=1)
    bins, states = ActionBins.fit(actions_NA, binary=space.binary), ActionBins.fit(rng.normal(size=(900, 3)))
    sizes = TinyConfig(image_size=32, vision_widths=(16, 32), width=32, layers=1, heads=2)
    torch.manual_seed(0)
    backbone, processor, vocabulary = create_backbone(
        sizes, texts=["open the drawer"], num_cameras=2, segments={"bins": 256, "state": 256}
    )
    config = PolicyConfig(
        vocabulary,
        ("front", "wrist"),
        sizes,
        spaces=(KeyedSpace("robot", space, 10.0),),
        action_bins=tuple(bins.counts_A.tolist()),
        state_bins=tuple(states.counts_A.tolist()),
        chunk=5,
    )
    return Policy(LatentPolicy(config, backbone), processor, {"robot": Statistics(bins, states)}).to("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image file for each camera, one of them wider than the other."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    files = {}
    for camera, shape in {"front": (48, 64, 3), "wrist": (40, 40, 3)}.items():
        files[camera] = folder / f"{camera}.png"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(files[camera])
    return files


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


def choose_images(tab: Browser, images: dict[str, Path]) -> None:
    for at, file in enumerate(images.values()):
        tab.choose_files(f"#image-{at}", [file])


def shown_numbers(tab: Browser, table: str) -> np.ndarray:
    """The actions [K, A] in a table of the page, with the digits that it shows."""
    cells = tab.run(f"[...document.querySelectorAll('#{table} tbody td')].map(cell => cell.textContent)")
    return np.array(cells, float).reshape(-1, 3)


def test_a_person_sees_what_the_policy_expects_and_does(tab: Browser, policy: Policy, images: dict[str, Path]) -> None:
    with running(policy) as address:
        tab.open(f"{address}/")
        tab.until("!document.getElementById('content').hidden")
        expected = tab.text("#expects")
        for words in ("front, wrist", "3 numbers", "5 steps x 3", "lift, turn, gripper", "delta", "10 actions"):
            assert words in expected
        tab.choose_files("#image-0", [images["front"]])
        tab.drop(".drop:nth-child(2)", images["wrist"])
        tab.until("document.querySelectorAll('.drop img:not([hidden])').length === 2")
        assert "wrist.png (40 x 40)" in tab.text("#images")
        tab.run("document.getElementById('instruction').focus()")
        tab.type(HTML)
        state = [0.5, -1.25, 2.0]
        for number in state:
            tab.press("Tab")
            tab.type(str(number))
        tab.press("Tab")
        tab.press("Enter")
        tab.until("!document.getElementById('result').hidden")
        pixels = {camera: np.asarray(Image.open(file)) for camera, file in images.items()}
        for camera, image in tab.run("observation()").items():
            if camera in pixels:
                np.testing.assert_array_equal(from_json(image), pixels[camera])
        actions_KA = policy.infer({**pixels, "instruction": HTML, "state": state})
        np.testing.assert_allclose(shown_numbers(tab, "result-table"), actions_KA, rtol=2e-3)
        assert "Round trip" in tab.text("#timing") and "the model" in tab.text("#timing")
        # The status shows the same observation and action, with the instruction as text.
        tab.until(f"document.getElementById('last-instruction').textContent === {json.dumps(HTML)}")
        np.testing.assert_allclose(shown_numbers(tab, "last-table"), actions_KA, rtol=2e-3)
        assert tab.run("[...document.querySelectorAll('#last-images img')].map(i => i.naturalWidth)") == [64, 40]
        tab.until("document.querySelectorAll('#latency-chart svg .bar').length")
        tab.run("document.getElementById('latency-chart').focus()")
        tab.press("ArrowLeft")
        assert re.match(r".*: p50 |no request then", tab.text("#latency-cursor"))
        assert tab.run("[document.querySelectorAll('main script, img[src=x]').length, window.bad ?? null]") == [0, None]
    assert not tab.complaints
    asked = {re.sub("^(data|blob):.*", r"\1", request) for request in tab.requests}
    assert asked <= {"data", "blob", *(f"{address}/{name}" for name in ("", "metadata", "status", "infer"))}


def test_a_server_with_a_key_is_used_by_who_has_it(tab: Browser, policy: Policy) -> None:
    with running(policy, api_key="sesame") as address:
        tab.open(f"{address}/")
        tab.until("!document.getElementById('key-form').hidden")
        assert not tab.run("document.getElementById('content').checkVisibility()")
        for key in ("guess", "sesame"):
            tab.run("document.getElementById('key').value = ''; document.getElementById('key').focus()")
            tab.type(key)
            tab.press("Enter")
            tab.until("document.getElementById('key-error').textContent || !document.getElementById('content').hidden")
            assert (key == "sesame") == tab.run("document.getElementById('content').checkVisibility()")
        assert "front, wrist" in tab.text("#expects")
        tab.run("document.getElementById('code').open = true")
        tab.until("document.getElementById('curl').textContent")
        assert "sesame" not in tab.text("body")
    assert all("401" in complaint for complaint in tab.complaints)


def test_what_it_offers_to_copy_gives_the_same_actions(
    tab: Browser, policy: Policy, images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "KEY_FILE").write_text("sesame\n")
    for file in images.values():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lapa_client", client)
    with running(policy, api_key="sesame") as address:
        tab.open(f"{address}/")
        tab.until("!document.getElementById('key-form').hidden")
        tab.run("document.getElementById('key').focus()")
        tab.type("sesame")
        tab.press("Enter")
        tab.until("!document.getElementById('content').hidden")
        choose_images(tab, images)
        tab.run("document.getElementById('instruction').value = 'say \"open\"'")
        tab.run("document.getElementById('state-1').value = '-0.5'")
        tab.run("document.getElementById('code').open = true")
        tab.until("document.getElementById('python').textContent.includes('wrist.png')")
        pixels = {camera: np.asarray(Image.open(file)) for camera, file in images.items()}
        actions_KA = policy.infer({**pixels, "instruction": 'say "open"', "state": [0.0, -0.5, 0.0]})
        found: dict[str, Any] = {}
        exec(tab.text("#python"), found)
        found["client"].close()
        np.testing.assert_array_equal(found["actions_KA"], actions_KA)
        (tmp_path / "observation.json").write_text(tab.run("observation().then(made => JSON.stringify(made))"))
        if shutil.which("curl"):
            printed = subprocess.run(tab.text("#curl"), shell=True, check=True, capture_output=True, text=True).stdout
            np.testing.assert_array_equal(np.float32(json.loads(printed)["actions"]), actions_KA)


def test_errors_are_shown_as_their_line(tab: Browser, policy: Policy, images: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    with running(policy, max_instruction=20) as address:
        tab.open(f"{address}/")
        tab.until("!document.getElementById('content').hidden")
        tab.choose_files("#image-0", [tmp_path / "notes.png"])
        tab.until("document.getElementById('error').textContent.includes('notes.png is not an image')")
        # Without an image nothing is sent.
        tab.run("document.getElementById('send').click()")
        assert not tab.run("document.getElementById('form').checkValidity()")
        choose_images(tab, images)
        tab.until("document.querySelectorAll('.drop img:not([hidden])').length === 2")
        assert not any(request.endswith("/infer") for request in tab.requests)
        tab.run("document.getElementById('instruction').value = 'open the drawer, please'")
        tab.run("document.getElementById('send').click()")
        tab.until("document.getElementById('error').textContent.includes('instruction')")
        assert tab.text("#error") == "an instruction of 23 characters; at most 20 (--max-instruction)"
    tab.until("document.getElementById('state').textContent.includes('does not answer')")


def test_the_page_fits_a_narrow_window(tab: Browser, policy: Policy, images: dict[str, Path]) -> None:
    with running(policy) as address:
        tab.open(f"{address}/")
        tab.until("!document.getElementById('content').hidden")
        choose_images(tab, images)
        tab.run("document.getElementById('send').click()")
        tab.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        tab.until("!document.getElementById('result').hidden && !document.getElementById('last').hidden")
        tab.until("document.querySelector('#latency-chart svg') && document.getElementById('curl').textContent")
        for width in (320, 768, 1600):
            tab.resize(width, 800)
            tab.until(f"document.documentElement.scrollWidth <= {width}")


def test_only_the_script_of_the_page_runs(tab: Browser, policy: Policy) -> None:
    with running(policy) as address:
        tab.open(f"{address}/")
        tab.until("!document.getElementById('content').hidden")
        tab.run(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"
        )
        tab.run("document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.2:9/x.png'}))")
        assert tab.run("window.bad ?? null") is None
        tab.until("document.getElementById('state').textContent === 'ready'")
    refused = " ".join(tab.complaints)
    assert "script" in refused and "http://127.0.0.2:9/x.png" in refused


def test_a_policy_of_several_datasets_acts_as_the_chosen_one(
    tab: Browser, policy: Policy, images: dict[str, Path]
) -> None:
    (key, statistics), (space,) = next(iter(policy.statistics.items())), policy.config.spaces
    scaled = Statistics(replace(statistics.codec, centres_AN=5 * statistics.codec.centres_AN), statistics.states)
    config = replace(policy.config, spaces=(space, replace(space, key="other")))
    both = Policy(policy.model.grown(config).eval(), policy.processor, {key: statistics, "other": scaled})
    pixels = {camera: np.asarray(Image.open(file)) for camera, file in images.items()}
    actions_KA = both.under("other").infer({**pixels, "instruction": "", "state": [0.0, 0.0, 0.0]})
    with running(both) as address:
        tab.open(f"{address}/")
        tab.until("!document.getElementById('content').hidden")
        choose_images(tab, images)
        tab.run("document.getElementById('statistics').value = 'other'")
        tab.run("document.getElementById('send').click()")
        tab.until("!document.getElementById('result').hidden")
        np.testing.assert_allclose(shown_numbers(tab, "result-table"), actions_KA, rtol=2e-3)


def test_the_colours_are_those_of_lapa_view() -> None:
    """They are in two files, since this page is one file and the other's exports have theirs in a folder."""
    style = (PAGE.parents[1] / "view" / "page" / "style.css").read_text()
    colours, *_ = style.partition("* {")
    assert ":root" in colours and colours in PAGE.read_text()
