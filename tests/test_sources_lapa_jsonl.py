"""Files of the released LAPA code: what rows hold, which are one episode, malformed ones, labels, and pretraining."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lapa import cli
from lapa.data import info
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.data.pairs import FramePairs, PairsConfig
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.engine.config import LoopConfig
from lapa.errors import UserError
from lapa.files import as_path, read_json_lines
from lapa.policy import pretrain
from lapa.policy.config import PretrainConfig, VQGANConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy, load_policy
from lapa.released import lwm
from lapa.sources.lapa_jsonl import LABELS, LapaJsonlConfig, LapaJsonlReading, find_rows, parse_row, run, task_in_words

SIDE = 16
SMALL = lwm.LwmConfig(
    width=32,
    inner_width=64,
    layers=1,
    heads=2,
    max_length=128,
    vqgan=VQGANConfig(
        resolution=SIDE,
        hidden_channels=32,
        channel_mult=(1, 1, 1),
        num_res_blocks=1,
        z_channels=4,
        quantized_embed_dim=4,
        num_embeddings=64,
    ),
)
CODES = SMALL.vqgan.num_tokens
PROMPT = "<s> You are a helpful assistant. USER: What action should the robot take to `{}` ASSISTANT:"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def published(number: int, **changes: Any) -> dict[str, Any]:
    """A row as the published latent-action dataset has them, with a smaller image."""
    row = {
        "instruction": PROMPT.format(f"push {number % 2}"),
        "vision": [str((number + place) % 64) for place in range(CODES)],
        "delta": [str((number + place) % 8) for place in range(4)],
        "fields": "[instruction],[vision],delta",
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not None}


def finetuning(episode: int, step: int, **changes: Any) -> dict[str, Any]:
    """A row of the JSON list for finetuning, as the README of the released code shows it."""
    return {
        "id": f"data/finetune_data/episode_{episode}/step_{step}",
        "image": f"finetune_data/episode_{episode}/step_{step}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat action should the robot take to `lift {episode}`"},
            {
                "from": "gpt",
                "raw_actions": [0.1 * step, 0, 0, 0, 0, 0, step % 2],
                "states": {"eef_pos": [1.0, 2, episode], "gripper_state": 0.5},
            },
        ],
        **changes,
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_images(folder: Path, rows: list[dict[str, Any]], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in rows]
    for row, frame_HWC in zip(rows, images, strict=True):
        (folder / row["image"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame_HWC).save(folder / row["image"])
    return images


def opened(path: Path, **options: Any) -> Dataset:
    return LapaJsonlReading(str(path), **{"image_codes": CODES, **options}).open().dataset()


def test_published_rows_are_read_in_place(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "öpenx rows.jsonl", [published(number) for number in range(5)])
    dataset = open_dataset(f"openx=lapa-jsonl:{path},image_codes={CODES}:0.5")
    assert (dataset.name, dataset.weight, dataset.coded, dataset.cameras) == ("openx", 0.5, True, ("image",))
    assert [(one.length, one.instruction) for one in dataset.episodes] == [(1, f"push {n % 2}") for n in range(5)]
    assert dataset.image_codes(3, [0, 0]).tolist() == [[3 + place for place in range(CODES)]] * 2
    assert (dataset.action_dim, dataset.state_dim, dataset.image_shape()) == (None, None, (64, 64))
    with pytest.raises(ValueError, match=r"codes of images and no images.*images= with --data"):
        dataset.frames(0)
    longer = write_rows(tmp_path / "long.jsonl", [published(number, id=f"e/{number}") for number in range(4)])
    with pytest.raises(ValueError, match="codes of images and no images"):
        FramePairs([opened(longer)], PairsConfig(size=32, horizon=0.2, held_out=0))[0]


def test_of_several_images_in_a_row_the_first_is_read(tmp_path: Path) -> None:
    twice = published(0, vision=[str(place) for place in range(2 * CODES)])
    assert opened(write_rows(tmp_path / "two.jsonl", [twice])).image_codes(0, [0]).tolist() == [[*range(CODES)]]


def test_rows_with_whole_numbers_as_ids_are_grouped_by_their_images(tmp_path: Path) -> None:
    rows = [{**finetuning(episode, step), "id": 3 * episode + step} for episode in range(2) for step in range(3)]
    write_images(tmp_path, rows)
    dataset = opened(write_rows(tmp_path / "rows.jsonl", rows))
    assert [one.length for one in dataset.episodes] == [3, 3]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_finetuning_rows_become_a_dataset(tmp_path: Path, form: str) -> None:
    rows = [finetuning(episode, step) for step in range(3) for episode in range(2)]
    images = write_images(tmp_path, rows)
    path = tmp_path / "finetune.json"
    path.write_text(json.dumps(rows, indent=1) if form == "list" else "\n".join(map(json.dumps, rows)))
    dataset = opened(path)
    assert [(one.length, one.instruction) for one in dataset.episodes] == [(3, "lift 0"), (3, "lift 1")]
    assert dataset.episodes[1].source == "data/finetune_data/episode_1"
    np.testing.assert_allclose(dataset.actions(1)[:, [0, 6]], [[0, 0], [0.1, 1], [0.2, 0]], atol=1e-7)
    assert dataset.states(1)[2].tolist() == [1, 2, 1, 0.5]
    assert dataset.features["observation.state"]["names"] == ["eef_pos_0", "eef_pos_1", "eef_pos_2", "gripper_state"]
    assert dataset.action_space is not None and dataset.action_space.control == "delta"
    assert dataset.action_space.binary == (False,) * 6 + (True,)
    assert (dataset.frames(1, [2, 0]) == np.stack([images[5], images[1]])).all()
    run(LapaJsonlConfig(str(path), out=tmp_path / "out", size=16, workers=1))
    converted = open_dataset(tmp_path / "out")
    assert [(one.length, one.instruction) for one in converted.episodes] == [(3, "lift 0"), (3, "lift 1")]
    assert (converted.actions(1) == dataset.actions(1)).all() and not (tmp_path / "out" / LABELS).exists()


@pytest.mark.parametrize("store", ["", "memory:/"])
def test_labels_lie_beside_what_the_rows_become(tmp_path: Path, store: str) -> None:
    out = f"{store}{tmp_path}/out"
    rows = [published(number, id=f"clip_{number // 3}_{number % 3}", vision=None) for number in range(6)]
    rows = [{**row, "fields": "[instruction],delta", "image": f"{row['id']}.png"} for row in rows]
    del rows[2]["delta"], rows[2]["fields"]
    write_images(tmp_path, rows)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run(LapaJsonlConfig(str(path), out=out, size=16, workers=1, lam="laq"))
    dataset = open_dataset(out)
    labels = Labels.open(as_path(out) / LABELS, lam_fingerprint="laq", dataset_fingerprint=dataset.fingerprint)
    assert [labels.codes(number)[0].tolist() for number in range(2)] == [[0, 1], [0, 1, 2]]
    assert labels.codes(1)[1].tolist() == [[(3 + step + place) % 8 for place in range(4)] for step in range(3)]
    assert (labels.manifest.latent_length, labels.manifest.codebook_size, labels.manifest.num_rows) == (4, 8, 5)
    assert np.allclose(np.sum(labels.manifest.code_usage, axis=1), 1)
    with pytest.raises(ValueError, match=r"row 1: `delta` holds 3, but there are 3 codes; give --codebook-size"):
        run(LapaJsonlConfig(str(path), out=tmp_path / "few", size=16, workers=1, codebook_size=3))


def test_codes_without_images_become_labels_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [published(number) for number in range(4)])
    config = LapaJsonlConfig(str(path), out=tmp_path / "out", image_codes=CODES)
    run(config)
    assert "codes and no images" in capsys.readouterr().err
    labels = Labels.open(tmp_path / "out" / LABELS, dataset_fingerprint=opened(path).fingerprint)
    assert labels.codes(3)[1].tolist() == [[3, 4, 5, 6]]
    with pytest.raises(ValueError, match="not empty"):
        run(config)
    run(LapaJsonlConfig(str(path), out=tmp_path / "out", image_codes=CODES, resume=True))
    assert "already complete" in capsys.readouterr().err
    bare = write_rows(tmp_path / "bare.jsonl", [published(0, delta=None, fields=None)])
    with pytest.raises(ValueError, match="no `delta` to label them with"):
        run(LapaJsonlConfig(str(bare), out=tmp_path / "none", image_codes=CODES))


GOOD = published(0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"instruction": "push", ', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"delta": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[1]", "is not a JSON object, but list"),
        ({**GOOD, "vision": GOOD["vision"][:-1]}, f"{CODES - 1} codes in `vision`"),
        ({**GOOD, "vision": []}, "`vision` is not a list of codes"),
        ({**GOOD, "vision": [*GOOD["vision"][1:], "7_1"]}, "`vision` holds '7_1', which is no code"),
        ({**GOOD, "vision": [*GOOD["vision"][1:], -1]}, "`vision` holds '-1'"),
        ({**GOOD, "delta": [1, 2, 3]}, "3 codes in `delta`, the others 4"),
        ({**GOOD, "delta": [1, 2, 3, 1.5]}, "`delta` holds '1.5'"),
        ({**GOOD, "delta": [1, 2, 3, True]}, "`delta` holds 'True'"),
        ({**GOOD, "instruction": 3}, "`instruction` is not text"),
        ({**GOOD, "fields": "[instruction],[vision],action"}, "`fields` names action, which the row lacks"),
        ({**GOOD, "raw_actions": [1.0]}, "has other `raw_actions` than the first row"),
        ({**GOOD, "raw_actions": ["1"]}, "`raw_actions` is not a list of numbers"),
        ({**GOOD, "conversations": "words"}, "`conversations` must be"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, row: Any, message: str, capsys: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, "", row, published(2)])
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 3 .*skip_bad=true") as caught:
        opened(path)
    assert message in str(caught.value)
    dataset = opened(path, skip_bad=True)
    assert [one.source for one in dataset.episodes] == ["row 1", "row 4"]
    assert "left out, malformed rows: 1" in capsys.readouterr().err
    assert len(opened(path, skip_bad=True).episodes) == 2
    assert "left out, malformed rows: 1" in capsys.readouterr().err, "also where the pass over the rows is kept"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "1e39", "1" + "0" * 400])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        parse_row(f'{{"raw_actions": [0, {number}]}}'.encode())


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([finetuning(0, 0), finetuning(0, 1)])[:-40])
    after = tmp_path / "after.json"
    after.write_text("[] []")
    for path, message in (
        (empty, "holds no row"),
        (tmp_path / "none.jsonl", "no such file; name a JSONL file"),
        (tmp_path, "is a folder; name a JSONL file"),
        (broken, "row 1, at byte .* is not valid JSON"),
        (after, "goes on after the end of its list"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path, skip_bad=True)
    rows = [finetuning(0, 0), finetuning(0, 1)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 1: .*step_0\.png: no such file; give the folder .* --images"):
        opened(path)
    write_images(tmp_path, rows)
    image = tmp_path / rows[1]["image"]
    image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"row 2: .*step_1\.png: cannot be decoded"):
        opened(path).frames(0)
    image.unlink()
    image.symlink_to(image)
    with pytest.raises(ValueError, match=r"row 2: .*step_1\.png: cannot be read"):
        opened(path).frames(0)


def test_episodes_without_instruction_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    opened(
        write_rows(tmp_path / "rows.jsonl", [published(0), published(1, instruction=""), published(2, instruction=" ")])
    )
    assert "rows: without instruction: 2" in capsys.readouterr().err


def test_images_that_rows_name_lie_in_the_folder(tmp_path: Path) -> None:
    rows = [finetuning(0, step) for step in range(2)]
    path = write_rows(tmp_path / "rows" / "rows.jsonl", rows)
    write_images(tmp_path / "rows", rows)
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "secret.png")
    for named in ("../secret.png", "a/../../secret.png", str(tmp_path / "secret.png"), "a\0b.png", "~/secret.png", "."):
        write_rows(path, [rows[0], {**rows[1], "image": named}])
        dataset = opened(path)
        with pytest.raises(UserError, match=r"rows\.jsonl: row 2: .*(names no file inside|no such file)"):
            dataset.frames(0, [1])


def test_rows_are_put_together_where_their_names_tell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["a/img_00002.jpg", "a/img_00000.jpg", "7", "b_4", "b_4", "a/img_00001.jpg", "word", "c/0", "c/2"]
    path = write_rows(tmp_path / "rows.jsonl", [published(1, id=name) for name in names])
    dataset = opened(path)
    assert [(one.source, one.length) for one in dataset.episodes] == [
        ("a", 3),
        ("b 4 #0", 1),
        ("b 4 #1", 1),
        ("c", 2),
        ("row 3", 1),
        ("row 7", 1),
    ]
    assert dataset.source.items[0].place[0][0] == 2, "rows of an episode are in the order of its steps"  # type: ignore
    message = capsys.readouterr().err
    assert "whose ids are the same, taken as an episode each: 2" in message
    assert "lack steps in between: 1" in message


def test_a_remote_file_is_read(tmp_path: Path) -> None:
    rows = [published(number, id=f"e/{number}") for number in range(3)]
    path = as_path("memory://jsonl/rows.jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    assert opened(path).image_codes(0, [2])[0, 0] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PROMPT.format("put `it` down"), "put `it` down"),
        ("<s> <s> You are a helpful assistant. USER: wait ASSISTANT:", "wait"),
        ("<image>\nWhat action should the robot take to `lift`?", "lift"),
        ("lift it", "lift it"),
        ("", ""),
        ("half \ud800", "half \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_task_is_taken_out_of_its_prompt(text: str, words: str) -> None:
    assert task_in_words(text) == words


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "vision": st.lists(st.integers(0, 8191), min_size=CODES, max_size=CODES),
                "delta": st.lists(st.integers(0, 7), min_size=4, max_size=4),
                "instruction": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
                "as_text": st.booleans(),
                "space": st.sampled_from(["", " ", "\n", "\r\n \t"]),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    listed=st.booleans(),
    ascii_only=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_rows_read_as_they_were_written(rows: list[dict[str, Any]], listed: bool, ascii_only: bool) -> None:
    texts, wanted = [], []
    for row in rows:
        as_text = str if row["as_text"] else int
        value = {"vision": [*map(as_text, row["vision"])], "delta": [*map(as_text, row["delta"])]}
        value["instruction"] = f"What action should the robot take to `{row['instruction']}`"
        space = row["space"]
        text = json.dumps(value, ensure_ascii=ascii_only)
        texts.append(f"{space}{text}{space}" if listed else text)
        wanted.append((tuple(row["vision"]), tuple(row["delta"]), row["instruction"].strip()))
    path = as_path("memory://property/rows")
    path.write_bytes(("[" + ",".join(texts) + "]" if listed else "\n\n".join(texts)).encode())
    found = [parse_row(content) for _, _, content in find_rows(path)]
    assert [(row.vision_N, row.delta_L, row.instruction) for row in found] == wanted
    content = path.read_bytes()
    assert all(content[offset : offset + len(part)] == part for _, offset, part in find_rows(path))


@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)), listed=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_rows_or_a_value_error(content: bytes, listed: bool) -> None:
    path = as_path("memory://property/any")
    path.write_bytes(b"[" + content if listed else content)
    try:
        for _, _, part in find_rows(path):
            parse_row(part)
    except ValueError:
        return


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("id", "image", "instruction", "vision", "delta", "fields", "raw_actions", "states", "conversations")


@given(row=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_json_is_a_row_or_a_value_error(row: dict[str, Any]) -> None:
    try:
        found = parse_row(json.dumps(row).encode())
    except ValueError:
        return
    assert found.actions_A is None or np.isfinite(found.actions_A).all()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    texts = [PROMPT.format("push 0")]
    backbone, processor, vocabulary = lwm.create(SMALL, texts=texts, num_cameras=1, segments={})
    folder = tmp_path_factory.mktemp("lwm") / "policy"
    Policy(LatentPolicy(PolicyConfig(vocabulary, ("image",), SMALL), backbone), processor).save_pretrained(
        folder, run={}
    )
    return folder


def pretrained(data: str, labels: Path, out: Path, **changes: Any) -> list[float]:
    """The losses of two steps."""
    loop = LoopConfig(steps=2, batch_size=4, device="cpu", log_every=1)
    pretrain.run(PretrainConfig(**{"data": (data,), "labels": (labels,), "out": out, "loop": loop, **changes}))
    rows = read_json_lines(out / "training" / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def test_codes_and_the_images_they_stand_for_pretrain_alike(tmp_path: Path, policy: Path) -> None:
    rows = [published(number, id=f"e{number // 4}_{number % 4}", image=f"{number}.png") for number in range(8)]
    images = write_images(tmp_path, rows)
    with torch.no_grad():
        codes = load_policy(policy).model.backbone.vqgan.encode(torch.from_numpy(np.stack(images)))  # type: ignore
    for row, codes_hw in zip(rows, codes, strict=True):
        row["vision"] = [str(code) for code in codes_hw.flatten().tolist()]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    losses = {}
    for name, images in (("codes", None), ("images", str(tmp_path))):
        config = LapaJsonlConfig(str(path), out=tmp_path / name, image_codes=CODES, images=images, size=SIDE, workers=1)
        if images is None:
            run(config)
            labels = tmp_path / name / LABELS
        data = f"lapa-jsonl:{path},image_codes={CODES}" + (f",images={images}" if images else "")
        if images is not None:
            # The same rows, read as images, are another dataset for labels.
            manifest = json.loads((labels / "manifest.json").read_text())
            manifest["dataset_fingerprint"] = open_dataset(data).fingerprint
            (labels / "manifest.json").write_text(json.dumps(manifest))
            (labels / "SHA256SUMS").unlink()
        losses[name] = pretrained(data, labels, tmp_path / f"{name} policy", policy=policy)
    assert losses["codes"] == losses["images"] and len(losses["codes"]) == 2
    assert losses["codes"][0] != losses["codes"][1]


def test_codes_and_images_may_be_in_one_batch(policy: Path) -> None:
    parts = load_policy(policy)
    backbone, processor = parts.model.backbone, parts.processor
    frame_HWC = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    codes_N = backbone.vqgan.encode(torch.from_numpy(frame_HWC[None])).flatten().numpy()  # type: ignore
    prompts = ["push", "push it"]
    wanted = backbone.tokens(processor([[frame_HWC]] * 2, prompts))  # type: ignore
    for images in ([[frame_HWC], [codes_N]], [[codes_N], [frame_HWC]], [[codes_N], [codes_N]]):
        assert torch.equal(backbone.tokens(processor(images, prompts)), wanted)  # type: ignore
    for wrong in (codes_N[1:], codes_N + 64, codes_N - 64):
        with pytest.raises(ValueError, match="another image tokenizer"):
            processor([[wrong]], ["push"])


def test_other_backbones_refuse_codes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [published(number) for number in range(8)])
    run(LapaJsonlConfig(str(path), out=tmp_path / "out", image_codes=CODES))
    data = f"lapa-jsonl:{path},image_codes={CODES}"
    with pytest.raises(ValueError, match=r"the backbone tiny cannot read.*images=FOLDER"):
        pretrained(data, tmp_path / "out" / LABELS, tmp_path / "policy")


def test_codes_are_described_and_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "rows.jsonl", [published(number) for number in range(3)])
    info.run(info.InfoConfig(f"lapa-jsonl:{path},image_codes={CODES}"))
    assert "no contact sheet" in "".join(capsys.readouterr()) and not [*tmp_path.glob("*.png")]


def test_codes_are_not_augmented(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [published(number, raw_actions=[number, 1]) for number in range(3)])
    steps = EpisodeSteps([opened(path)], 32, chunk=2, augment=True)
    item = steps[1]
    assert item["images"]["image"].tolist() == [1 + place for place in range(CODES)]
    assert item["actions_KA"].tolist() == [[1, 1], [1, 1]] and item["instruction"] == "push 1"
    assert "nothing is augmented" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--lam", "laq")])
def test_the_name_of_a_latent_action_model_is_no_folder(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [published(number) for number in range(2)])
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data", "lapa-jsonl", str(path), "--out", str(tmp_path / "out"), "--image-codes", "16", *options])
    assert exit_.value.code == 0
    assert (tmp_path / "out").is_dir()
