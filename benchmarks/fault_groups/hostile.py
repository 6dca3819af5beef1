"""Files that a stranger made to harm: each is refused in one line or read rightly, in bounded memory.

Around `--out` lie files that must stay as they are. Checksums are no defence here, a stranger writes his own; files are
changed without them.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fault_groups.flips import read_dataset, read_labels, use_inverse, use_lam, use_policy
from fault_groups.folders import FRAMES, FRONT, SIDE, LeRobot, encoded, grey, rlds, write_video
from fault_groups.interrupted import words
from fault_groups.made import COMMANDS, SUMS, Case, contents, snapshot
from fault_groups.processes import Ended, Fault, ask, lapa

TEMPLATES: tuple[object, ...] = (
    "../precious.mp4", "videos/../../precious.mp4", "{video_key}/../../../precious.mp4",
    "{chunk_index}/../../precious.mp4", "./../precious.mp4", "ABSOLUTE", "~/precious.mp4", "meta/info.json",
    "{chunk_index:02000000000d}", "{chunk_index:0900000000d}", "{video_key:>900000000}", "{chunk_index.__class__}",
    "{chunk_index.__init__.__globals__}", "{video_key[0]}", "{video_key!r}", "{}", "{0}", "{unknown}", "{chunk_index",
    "", None, 5, ["x"], {"a": 1}, "videos/\x00.mp4",
)  # fmt: skip
# Values in place of those of a JSON file; the last ones are written as they are.
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 1e-300, "", "x", "../x", "\x1b[31mx", "\x00", [], {}, [[1]], ["x"], {"a": 1}, [None],
    "{video_key.__class__}", "@1e400@", "@-1e400@", "@NaN@",
)  # fmt: skip
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def hostile(made: Path, quick: bool) -> list[Case]:
    """Paths, code, bombs, escapes, weights without numbers, damaged JSON, little memory."""
    cases = [
        Case(f"{key} {number} {name}", partial(_template, made, key, template, name))
        for number, template in enumerate(TEMPLATES)
        for key, name in (("video_path", "hide-actions"), ("data_path", "lerobot"))
    ]
    cases += [Case(f"{run.__name__.strip('_')}".replace("_", " "), partial(_alone, run)) for run in ALONE]
    cases += [
        Case(f"weights of {kind}: {number}", partial(_weights, made, kind, number)) for kind, number in NO_NUMBERS
    ]
    for title, name in JSON_FILES:
        cases.append(Case(f"{title} {name}: deep", partial(_json, made, title, name, "deep")))
        cases += [Case(f"{title} {name}: odd {n}", partial(_json, made, title, name, "odd")) for n in range(6)]
        cases += [Case(f"{title} {name}: huge {n}", partial(_json, made, title, name, "huge")) for n in range(3)]
        cases.append(Case(f"{title} {name}: cut", partial(_json, made, title, name, "cut")))
    cases += [
        Case(f"{size} MiB for {name}", partial(_little_memory, made, name, size))
        for size in (32, 64, 128, 256)
        for name in ("train", "label", "convert", "finetune")
    ]
    return Random(1).sample(cases, 40) if quick else cases


def _alone(run: Callable[[Path], None], folder: Path, chance: Random) -> None:
    run(folder)


def _guarded(folder: Path, *given: object, out: str = "place/out") -> Ended:
    """Runs a command, whose output is `out`, and compares everything around that. Raises Fault where it changed."""
    before = snapshot(folder, but=(out,))
    ended = lapa(*given, folder=folder)
    after = snapshot(folder, but=(out,))
    if changed := [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]:
        raise Fault(f"outside --out, {', '.join(changed[:3])} changed: {ended.output.strip()[-150:]}")
    return ended


def _neighbours(folder: Path) -> None:
    """Files that lie where `..` leads from a dataset, and from an output."""
    for place in ("in", "place", "."):
        (folder / place).mkdir(exist_ok=True)
        write_video(folder / place / "precious.mp4", [grey(0, step) for step in range(FRAMES)])
        (folder / place / "precious.txt").write_text(place)


def _template(made: Path, key: str, template: object, name: str, folder: Path, chance: Random) -> None:
    _neighbours(folder)
    dataset = LeRobot()
    data = dataset.write(folder / "in" / "data")
    shutil.copy(data / "data" / "chunk-000" / "file-000.parquet", folder / "in" / "precious.parquet")
    shutil.copy(folder / "precious.txt", folder / "place" / "precious.parquet")
    if isinstance(template, str):
        template = template.replace("ABSOLUTE", str(folder / "place" / "precious.mp4"))
        template = template.replace(".mp4", ".parquet") if key == "data_path" else template
    (data / "meta" / "info.json").write_text(json.dumps({**dataset.info, key: template}))
    _guarded(folder, *_rewriting(name, data), "--out", "place/out").require_refused()


def _rewriting(name: str, data: Path) -> tuple[object, ...]:
    if name == "hide-actions":
        return "data", name, data
    return "data", name, data, "--size", SIDE, "--workers", 1


ALONE: list[Callable[[Path], None]] = []


def alone(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Registers a case by its name."""
    ALONE.append(function)
    return function


@alone
def names_of_cameras(folder: Path) -> None:
    """A camera's name becomes a folder."""
    _neighbours(folder)
    for number, camera in enumerate(
        ("../../../x", "..", "a/../../../../x", "/abs", "x" * 300, "a\x00b", "a\nb", ESCAPE)
    ):
        dataset = LeRobot(cameras=())
        feature = {"dtype": "image", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]}
        dataset.info["features"][f"observation.images.{camera}"] = feature
        image = {"bytes": encoded(grey(0, 0)), "path": None}
        dataset.rows[f"observation.images.{camera}"] = [image] * len(dataset.rows["index"])
        data = dataset.write(folder / "in" / f"data{number}")
        _guarded(folder, *_rewriting("lerobot", data), "--out", "place/out").refused()
        shutil.rmtree(folder / "place" / "out", ignore_errors=True)


@alone
def a_link_in_the_output(folder: Path) -> None:
    """An output that was begun holds links to the outside; what they lead to stays."""
    _neighbours(folder)
    data = LeRobot().write(folder / "in" / "data")
    outside = folder / "place" / "outside" / FRONT / "chunk-000"
    write_video(outside / "file-000.mp4", [grey(1, 0)] * 3)
    for option in ("--resume", "--overwrite"):
        out = folder / "place" / "out"
        out.mkdir(exist_ok=True)
        (out / "videos").symlink_to(folder / "place" / "outside", target_is_directory=True)
        _guarded(folder, "data", "hide-actions", data, "--out", "place/out", option).refused()
        shutil.rmtree(out, ignore_errors=True)


@alone
def images_of_jsonl_outside(folder: Path) -> None:
    """Rows name images outside of the folder of images."""
    (folder / "images").mkdir()
    (folder / "secret.png").write_bytes(encoded(grey(0, 0)))
    for path in ("../secret.png", str(folder / "secret.png"), "a/../../secret.png"):
        rows = [{"id": f"e/step_{n}", "image": path, "instruction": "x", "raw_actions": [0.1] * 7} for n in range(3)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ("data", "lapa-jsonl", "rows.jsonl", "--images", "images", "--size", SIDE, "--workers", 1)
        _guarded(folder, *given, "--out", "out", out="out").require_refused()


@alone
def code_of_a_model_folder(folder: Path) -> None:
    """config.json names code of its own folder, which is neither run nor offered to be run."""
    data = LeRobot().write(folder / "data")
    code = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).write_text('')\nclass Evil: pass\n"
    for part in ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer"):
        model = folder / part
        model.mkdir()
        (model / "evil.py").write_text(code)
        named = {"auto_map": {part: "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}}
        for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
            (model / name).write_text(json.dumps({"model_type": "evil", **named}))
        tower = (*TRAIN, "--inputs", "features", "--vision-tower", model, "--data", data, "--out", "out")
        policy = (*FINETUNE, "--backbone", f"hf:{model}", "--data", data, "--out", "out")
        for given in (tower, policy):
            ended = _guarded(folder, *given, out="out")
            line = ended.require_refused()
            if "[y/N]" in ended.output or "trust_remote_code=True" in line:
                raise Fault(f"offers to run the folder's code: {ended.output[-200:]}")


@alone
def a_kernel_of_the_hub(folder: Path) -> None:
    """config.json names an attention that transformers would fetch from the hub, and run."""
    data, model = LeRobot().write(folder / "data"), folder / "model"

    def build() -> None:
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16, mlp_ratio=2
        )
        Dinov2Model(config).save_pretrained(model)

    ask(build, folder).require_done()
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (model / "preprocessor_config.json").write_text(json.dumps(normal))
    config = json.loads((model / "config.json").read_text())
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        (model / "config.json").write_text(json.dumps({**config, name: "someone/some-attention"}))
        given = (*TRAIN, "--inputs", "features", "--vision-tower", model, "--data", data, "--out", "out", "--overwrite")
        ended = _guarded(folder, *given, out="out")
        ended.refused()
        if "someone/some-attention" in ended.output:
            raise Fault(f"asks for the kernel: {ended.output[-200:]}")


@alone
def tasks_by_the_million(folder: Path) -> None:
    data = LeRobot().write(folder / "data")
    _repeated(data / "meta" / "tasks.parquet", 40, task_index=0, task="x" * 64)
    _guarded(folder, *_info(data), out="out").require_refused("tasks.parquet")


@alone
def a_task_of_half_a_gigabyte(folder: Path) -> None:
    data = LeRobot().write(folder / "data")

    def write() -> None:
        table = pa.table({"task_index": [0], "task": ["x" * (500 << 20)]})
        pq.write_table(table, data / "meta" / "tasks.parquet", compression="zstd", use_dictionary=False)

    if ask(write, folder, address_space=8192).status:
        raise ValueError("the bomb was not written")
    _guarded(folder, *_info(data), out="out").require_refused("tasks.parquet")


@alone
def episodes_by_the_million(folder: Path) -> None:
    dataset = LeRobot()
    data = dataset.write(folder / "data")
    row = {name: column[0] for name, column in dataset.episodes.items()}
    _repeated(data / "meta" / "episodes" / "chunk-000" / "file-000.parquet", 12, **row)
    _guarded(folder, *_info(data), out="out").require_refused("episodes")


@alone
def rows_by_the_million(folder: Path) -> None:
    data = LeRobot().write(folder / "data")
    row = {"timestamp": 0.0, "frame_index": 0, "episode_index": 0, "index": 0, "task_index": 0, "action": [0.0, 0.0]}
    _repeated(data / "data" / "chunk-000" / "file-000.parquet", 60, **row)
    _guarded(folder, *_rewriting("hide-actions", data), "--out", "out", out="out").require_refused("file-000.parquet")


@alone
def shapes_beyond_memory(folder: Path) -> None:
    shapes: tuple[Any, ...] = ([10**9], [2**40], [1, 10**9], [[1]], [-1], [], "x", [1e400], None, [10**30])
    for number, shape in enumerate(shapes):
        for feature in ("action", "observation.state", FRONT):
            dataset = LeRobot()
            dataset.info["features"][feature]["shape"] = shape
            data = dataset.write(folder / f"data{number}{feature}")
            ask(partial(read_dataset, data), folder).refused()
            shutil.rmtree(data)


@alone
def a_png_of_169_million_pixels(folder: Path) -> None:
    image = encoded(np.zeros((13_000, 13_000), np.uint8))
    dataset = LeRobot(cameras=())
    names = ["height", "width", "channels"]
    dataset.info["features"][FRONT] = {"dtype": "image", "shape": [SIDE, SIDE, 3], "names": names}
    dataset.rows[FRONT] = [{"bytes": image, "path": None}] * len(dataset.rows["index"])
    ask(partial(read_dataset, dataset.write(folder / "data")), folder).require_refused()
    ask(
        partial(_first, f"rlds:{rlds(folder, {}, images=lambda episode, step: image)},fps=10"), folder
    ).require_refused()
    (folder / "frames" / "clip").mkdir(parents=True)
    for step in range(FRAMES):
        (folder / "frames" / "clip" / f"{step:03d}.png").write_bytes(image)
    ask(partial(_first, f"frames:{folder / 'frames'},fps=10,caption=x"), folder).require_refused()


def _first(spec: str) -> float:
    from lapa.data.spec import open_dataset

    return float(open_dataset(spec).frames(0, [0]).mean())


class Shared:
    """Pickled, an array of bytes that other arrays share."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __reduce__(self) -> Any:
        build, *_ = np.zeros(1, np.uint8).__reduce__()
        return build, (np.ndarray, (0,), b"b"), (1, (len(self.raw),), np.dtype(np.uint8), False, self.raw)


@alone
def a_pickle_that_shares(folder: Path) -> None:
    """Hundreds of arrays of one buffer."""
    raw = bytes(20 << 20)
    (folder / "vqgan").write_bytes(pickle.dumps({f"a{number}": Shared(raw) for number in range(400)}, protocol=4))
    ask(partial(_shapes, folder / "vqgan"), folder).refused()


def _shapes(path: Path) -> int:
    from lapa.released.checkpoints import open_checkpoint

    return sum(int(np.prod(tensor.shape)) for tensor in open_checkpoint(path).values())


@alone
def a_pickle_that_runs(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (eval, (f"open({str(folder / 'ran')!r}, 'w')",))

    (folder / "vqgan").write_bytes(pickle.dumps({"a": Evil()}, protocol=4))
    ask(partial(_shapes, folder / "vqgan"), folder).require_refused()
    (folder / "laq.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    lapa("import", "laq", "laq.pt", "--out", "out", folder=folder).require_refused()
    if (folder / "ran").exists():
        raise Fault("runs what the pickle names")


@alone
def tensors_of_no_step(folder: Path) -> None:
    """One number that stands for a million million, by a stride of 0."""

    def write() -> None:
        import torch

        one = torch.zeros(1).as_strided((10**12,), (0,))
        torch.save({"to_pixels_first_frame.0.weight": one, "vq.codebooks": one}, folder / "laq.pt")

    ask(write, folder).require_done()
    _guarded(folder, "import", "laq", "laq.pt", "--out", "out", out="out").require_refused()


@alone
def escapes_in_texts(folder: Path) -> None:
    dataset = LeRobot(tasks=(ESCAPE + "open", "close\r\nlapa: error: x"))
    dataset.episodes["tasks"] = [[dataset.tasks[n % 2]] for n in range(3)]  # type: ignore[index]
    dataset.info["features"]["action"]["names"] = [ESCAPE, "dy"]
    data = dataset.write(folder / "data")
    _guarded(folder, *_info(data), out="out").refused()
    shutil.rmtree(folder / "out", ignore_errors=True)
    _guarded(folder, *_rewriting("lerobot", data), "--out", "out", out="out").refused()


@alone
def escapes_in_names(folder: Path) -> None:
    """Names of files, of keys and of versions reach the lines of errors."""
    clips = folder / f"clips{ESCAPE.replace('/', '')}\nlapa"
    clips.mkdir()
    (clips / f"a{ESCAPE}\nb.mp4").write_bytes(b"no video")
    _guarded(folder, "data", "videos", clips, "--caption", "x", "--out", "out", out="out").require_refused()
    for change in ({"codebase_version": ESCAPE}, {ESCAPE: 1}, {"fps": ESCAPE}, {"data_path": ESCAPE}):
        dataset = LeRobot()
        dataset.info |= change
        data = dataset.write(folder / f"data{next(iter(change.values())) == 1}{len(list(folder.glob('data*')))}")
        ask(partial(read_dataset, data), folder).refused()
    (folder / "captions.json").write_text(json.dumps({"a.mp4": ESCAPE, ESCAPE: "x"}))
    given = ("data", "videos", clips, "--captions", "captions.json", "--out", "out")
    _guarded(folder, *given, out="out").refused()


@alone
def captions_outside(folder: Path) -> None:
    """Names in a captions file lead nowhere."""
    write_video(folder / "clips" / "a.mp4", [grey(0, step) for step in range(FRAMES)])
    write_video(folder / "secret.mp4", [grey(1, step) for step in range(FRAMES)])
    (folder / "captions.json").write_text(
        json.dumps({"../secret.mp4": "x", str(folder / "secret.mp4"): "y", "a.mp4": "z"})
    )
    given = ("data", "videos", "clips", "--captions", "captions.json", "--size", SIDE, "--workers", 1, "--out", "out")
    if _guarded(folder, *given, out="out").refused() is None and len(list((folder / "out").rglob("*.mp4"))) != 1:
        raise Fault("a video outside of the folder is converted")


def _info(data: Path) -> tuple[object, ...]:
    return "data", "info", data, "--sheet", "out/sheet.png"


TRAIN = ("latent", "train", "--preset", "debug", "--steps", 2, "--device", "cpu")
FINETUNE = ("policy", "finetune", "--preset", "debug", "--steps", 2, "--device", "cpu")


def _repeated(path: Path, millions: int, **row: Any) -> None:
    """Writes a parquet file of one row, many million times, which is small."""

    def write() -> None:
        part = pa.table({name: pa.repeat(pa.scalar(value), 1_000_000) for name, value in row.items()})
        with pq.ParquetWriter(path, part.schema, compression="zstd") as writer:
            for _ in range(millions):
                writer.write_table(part)

    ask(write, path.parent).require_done()


# Weights that are no numbers, in models written anew with their own checksums.
NO_NUMBERS = [(kind, number) for kind in ("lam", "latent_policy", "policy", "inverse") for number in ("nan", "inf")]


def _weights(made: Path, kind: str, number: str, folder: Path, chance: Random) -> None:
    copy = folder / "copy"
    shutil.copytree(made / kind, copy)
    (copy / SUMS).unlink(missing_ok=True)
    path = next(path for path in sorted(copy.rglob("model.safetensors")) if "training" not in path.parts)

    def poison() -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        name = chance.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point()))
        tensors[name].view(-1)[-1] = float(number)
        save_file(tensors, path, {"format": "pt"})

    ask(poison, folder).require_done()
    ask(partial(USES[kind], copy), folder).require_refused()


USES: dict[str, Callable[[Path], str]] = {
    "lam": use_lam,
    "latent_policy": use_policy,
    "policy": use_policy,
    "inverse": use_inverse,
    "labels": read_labels,
    "robot": read_dataset,
}
# An artifact or dataset, and a JSON file of it.
JSON_FILES = (
    *(("robot", name) for name in ("meta/info.json", "meta/lapa.json", "meta/stats.json")),
    *(("legacy", name) for name in ("meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl")),
    ("lam", "config.json"),
    ("latent_policy", "config.json"),
    *(("policy", name) for name in ("config.json", "processor/tokenizer.json", "processor/tokenizer_config.json")),
    ("inverse", "config.json"),
    ("labels", "manifest.json"),
    *(("rlds", name) for name in ("features.json", "dataset_info.json")),
    ("captions", "captions.json"),
    *(("evaluate", name) for name in ("config.json", "results.json", "episodes.jsonl")),
    *(("train", name) for name in ("training/metrics.jsonl",)),
)


def _json(made: Path, title: str, name: str, how: str, folder: Path, chance: Random) -> None:
    copy = folder / "copy"
    _copied(made, title, name, copy)
    path = copy / name
    (copy / SUMS).unlink(missing_ok=True)
    path.write_text(_damaged(path.read_text(), name.endswith("l"), how, chance))
    _use_json(made, title, copy).refused()


def _copied(made: Path, title: str, name: str, copy: Path) -> None:
    if title == "legacy":
        LeRobot().write_legacy(copy)
    elif title == "rlds":
        shutil.copytree(rlds(copy.parent / "rlds", {"language_instruction": lambda step: b"open"}), copy)
    elif title == "captions":
        copy.mkdir()
        write_video(copy / "a.mp4", [grey(0, step) for step in range(FRAMES)])
        (copy / "captions.json").write_text(json.dumps([{"file": "a.mp4", "text": "open"}, {"file": "b", "text": "x"}]))
    elif title == "train":
        half = (*words("train"), "--stop-after", 4, "--log-every", 1, "--out", copy)
        lapa(*half, folder=made).require_done()
    else:
        shutil.copytree(made / title, copy)
        if title == "evaluate" and name != "results.json":
            (copy / "results.json").unlink()


def _use_json(made: Path, title: str, copy: Path) -> Ended:
    folder = copy.parent
    if title in ("legacy", "rlds"):
        spec = f"rlds:{copy},fps=10" if title == "rlds" else copy
        return ask(partial(read_dataset, spec), folder)  # type: ignore[arg-type]
    if title == "captions":
        given = ("--captions", copy / "captions.json", "--size", SIDE, "--workers", 1, "--out", "place/out")
        return _guarded(folder, "data", "videos", copy, *given)
    if title in COMMANDS:
        return lapa(*words(title), "--out", copy, "--resume", folder=made)
    return ask(partial(USES[title], copy), folder)


def _damaged(text: str, lines: bool, how: str, chance: Random) -> str:
    """The text of a JSON file, or of one of JSON lines, with one value replaced, cut, or nested deeply."""
    if how == "cut":
        return text[: chance.randrange(len(text))] + chance.choice(("", "\n", "}", "\x00", "\ufeff"))
    values = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    if how == "deep":
        deep = "[" * 200_000 + "]" * 200_000
        if lines:
            return "\n".join([*text.splitlines()[:-1], deep]) + "\n"
        return json.dumps(_replaced(values, chance.choice(list(_places(values))), "@")).replace('"@"', deep)
    places = list(_places(values))
    if how == "huge":
        places = [place for place in places if type(_at(values, place)) is int] or places
        value: Any = chance.choice((10**6, 10**9, 2**40, 10**15))
    else:
        value = chance.choice(ODD)
    changed = _replaced(values, chance.choice(places), value)
    dumped = [json.dumps(item, ensure_ascii=chance.random() < 0.5) for item in (changed if lines else [changed])]
    written = "\n".join(dumped) + "\n"
    for odd in ("1e400", "-1e400", "NaN"):
        written = written.replace(f'"@{odd}@"', odd)
    return written


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    keys: Sequence[Any] = (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from _places(value[key], (*place, key))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def _replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    key, *rest = place
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = _replaced(value[key], tuple(rest), new)
    return changed


def _little_memory(made: Path, name: str, size: int, folder: Path, chance: Random) -> None:
    """Where memory is short, a command ends as asked, or with one line."""
    ended = lapa(*words(name), "--out", folder / "out", folder=made, address_space=size)
    if ended.refused() is None:
        contents(folder / "out")
