"""A model's folder from a stranger: no code of it runs, sizes are compared before anything is allocated."""

import copy
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, Dinov2Config, Dinov2Model

from lapa.baselines.config import InverseConfig
from lapa.baselines.inverse import InverseDynamics, Recording
from lapa.checksums import SUMS
from lapa.data.dataset import ActionSpace
from lapa.errors import UserError
from lapa.latent.config import LatentModelConfig
from lapa.latent.features import VisionTower
from lapa.latent.model import LatentActionModel
from lapa.policy.actions import ActionScale, KeyedSpace, Statistics
from lapa.policy.backbones import create_backbone, hf
from lapa.policy.config import FlowConfig, HfConfig, TinyConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy, load_policy
from vlms import IMAGE_SIZE, make_vlm

KERNEL = "stranger/kernel"
RNG = np.random.default_rng(0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that were asked, each answered with yes."""
    questions: list[str] = []

    def answer(prompt: str = "") -> str:
        questions.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return questions


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    change(values)
    path.write_text(json.dumps(values))


def booby_trapped(folder: Path, *, model_type: str | None = None) -> Path:
    """The folder, with a module of its own for every class that could be asked for, and a kernel of the hub."""
    # transformers runs a copy, so where `ran` is cannot be told from the module's own place.
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\nclass Evil: pass\n"
    )
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoTokenizer", "AutoImageProcessor")
    auto_map = dict.fromkeys((*names, "AutoProcessor", "AutoModelForCausalLM"), "evil.Evil")
    kernels = {"attn_implementation": KERNEL, "_attn_implementation": KERNEL, "experts_implementation": KERNEL}

    def trap(values: dict[str, Any]) -> None:
        inner = [value for value in values.values() if isinstance(value, dict) and "model_type" in value]
        for part in (values, *inner):
            part.update(auto_map=auto_map, **kernels)
        if model_type:
            values["model_type"] = model_type

    edited(folder / "config.json", trap)
    if (folder / "preprocessor_config.json").exists():
        for name in ("preprocessor_config.json", "processor_config.json"):
            edited(folder / name, lambda values: values.update(auto_map=auto_map))
        tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        edited(folder / "tokenizer_config.json", lambda values: values.update(tokenizer))
    return folder


def create(folder: Path) -> None:
    config = HfConfig(source=str(folder), image_size=IMAGE_SIZE)
    hf.create(config, texts=[], num_cameras=1, segments={"latent": 4})


def tower(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(patch_size=4, image_size=16, mlp_ratio=2, **sizes)).save_pretrained(folder)
    return folder


def test_a_folder_with_code_of_its_own_is_read_without_it(tmp_path: Path, asked: list[str]) -> None:
    for folder, load in (
        (make_vlm("smolvlm", tmp_path / "vlm"), create),
        (tower(tmp_path / "tower"), lambda folder: VisionTower.from_pretrained(folder, grid=4)),
    ):
        load(booby_trapped(folder))
        assert not asked and not (folder / "ran").exists()


def test_attention_is_plain_whatever_the_folder_names(tmp_path: Path) -> None:
    folder = booby_trapped(make_vlm("smolvlm", tmp_path / "vlm"))
    backbone, _, _ = hf.create(
        HfConfig(source=str(folder), image_size=IMAGE_SIZE), texts=[], num_cameras=1, segments={}
    )
    config = backbone.language.config
    assert {part._attn_implementation for part in (config, config.text_config, config.vision_config)} == {"sdpa"}


def test_a_model_that_is_only_its_own_code_is_refused(tmp_path: Path, asked: list[str]) -> None:
    for folder, load in (
        (make_vlm("smolvlm", tmp_path / "vlm"), create),
        (tower(tmp_path / "tower"), lambda folder: VisionTower.from_pretrained(folder, grid=4)),
    ):
        booby_trapped(folder, model_type="evil")
        with pytest.raises(UserError) as error:
            load(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        assert not asked and not (folder / "ran").exists()


def test_a_part_that_is_only_its_own_code_is_not_asked_for(tmp_path: Path, asked: list[str]) -> None:
    """A part whose type has no plain model falls back to the code that it names, without a word from the whole."""
    folder = make_vlm("llava", tmp_path / "vlm")
    booby_trapped(folder)
    edited(folder / "config.json", lambda values: values["vision_config"].update(model_type="rag"))
    with pytest.raises(UserError) as error:
        create(folder)
    assert "\n" not in str(error.value)
    assert not asked and not (folder / "ran").exists()


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    for folder, load in (
        (make_vlm("smolvlm", tmp_path / "vlm"), create),
        (tower(tmp_path / "tower"), lambda folder: VisionTower.from_pretrained(folder, grid=4)),
    ):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"model\.safetensors|weights"):
            load(folder)


def test_a_family_that_is_not_known_is_refused(tmp_path: Path) -> None:
    for kind in ("llava_next", "aya_vision", "idefics2"):
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=r"whose prompt .* is not known here; give one of idefics3, smolvlm"):
            hf.native_image_size(str(tmp_path / kind))
    assert "gemma3" in CONFIG_MAPPING


def without_checksums(folder: Path) -> None:
    """As a stranger leaves it, who has them right for what is inside."""
    (folder / SUMS).unlink(missing_ok=True)


def lam(folder: Path) -> Callable[[], object]:
    config = LatentModelConfig(
        image_size=32, patch_size=8, dim=32, spatial_depth=1, temporal_depth=1, heads=2, dim_head=16, quant_dim=8
    )
    LatentActionModel(config).save_pretrained(folder)
    without_checksums(folder)
    return lambda: LatentActionModel.from_pretrained(folder)


def inverse(folder: Path) -> Callable[[], object]:
    config = InverseConfig(image_size=32, horizon_seconds=0.3, vision_widths=(16, 32), vision_depth=1, width=64)
    space = ActionSpace.named(["x", "grip"], ["grip"], "delta")
    scale = ActionScale.fit(np.eye(2, dtype=np.float32), (False, True))
    InverseDynamics(config, Recording(3, 10.0, "front", space), scale).save_pretrained(folder)
    without_checksums(folder)
    return lambda: InverseDynamics.from_pretrained(folder)


def policy(folder: Path) -> Callable[[], object]:
    sizes = TinyConfig(image_size=32, vision_widths=(16, 32), width=32, layers=1, heads=2)
    backbone, processor, vocabulary = create_backbone(sizes, texts=["open"], num_cameras=1, segments={"latent": 8})
    config = PolicyConfig(
        vocabulary,
        ("front",),
        sizes,
        latent_length=4,
        spaces=(KeyedSpace("robot", ActionSpace(("x",), (False,))),),
        head="flow",
        flow=FlowConfig(width=32, layers=1, heads=2),
        chunk=3,
    )
    scale = ActionScale.fit(RNG.normal(size=(50, 1)))
    Policy(LatentPolicy(config, backbone), processor, {"robot": Statistics(scale)}).save_pretrained(folder, run={})
    without_checksums(folder)
    return lambda: load_policy(folder)


def vlm(folder: Path) -> Callable[[], object]:
    make_vlm("paligemma", folder)
    return lambda: create(folder)


def dinov2(folder: Path) -> Callable[[], object]:
    tower(folder)
    return lambda: VisionTower.from_pretrained(folder, grid=4)


SIZES = {
    lam: [
        *("image_size", "patch_size", "dim", "spatial_depth", "heads", "dim_head", "latent_length", "codebook_size"),
        "quant_dim",
    ],
    inverse: ["image_size", "vision_depth", "width", "horizon_frames"],
    policy: ["image_size", "vision_depth", "width", "layers", "latent", "text", "latent_length"],
    vlm: ["image_size", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_labels"],
    dinov2: ["image_size", "hidden_size", "num_hidden_layers", "mlp_ratio"],
}


# Numbers that no weight follows from, in these models.
LOOSE = ("codebook_size", "latent_length", "num_labels", "mlp_ratio")


@pytest.mark.parametrize(("make", "key"), [(make, key) for make, keys in SIZES.items() for key in keys])
def test_a_gigantic_config_allocates_nothing(make: Any, key: str, tmp_path: Path) -> None:
    load = make(tmp_path / "model")
    load()
    path = tmp_path / "model" / "config.json"
    written = json.loads(path.read_text())
    for value in (10**4, 10**6, 10**9, 10**30, 0, -1, 10**400):
        changed = copy.deepcopy(written)
        assert _set(changed, key, value)
        path.write_text(json.dumps(changed))
        with at_most(2 << 30):
            try:
                load()
            except UserError as error:
                message = str(error)
                assert "\n" not in message and len(message) < 600 and str(tmp_path / "model") in message
            else:
                assert value in (0, -1) or key in LOOSE, (key, value)


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Refuses to this process more memory than it has, and `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _set(values: Any, key: str, value: object) -> bool:
    """Sets every number under the key, wherever it is."""
    found = False
    for name, inner in values.items() if isinstance(values, dict) else ():
        if name == key and isinstance(inner, int | float):
            values[name], found = value, True
        else:
            found |= _set(inner, key, value)
    if isinstance(values, dict) and key == "num_labels":
        values[key], found = value, True
    return found


def test_a_head_is_as_large_as_its_weights(tmp_path: Path) -> None:
    load = policy(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    written = json.loads(path.read_text())
    for change in ({"width": 800_000}, {"layers": 10**5}, {"width": 800_000, "layers": 1}):
        changed = copy.deepcopy(written)
        changed["policy"]["flow"].update(change)
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match="does not fit"):
            load()


def test_weights_whose_header_lies_are_refused(tmp_path: Path) -> None:
    for number, make in enumerate((lam, inverse, policy, vlm, dinov2)):
        folder = tmp_path / str(number)
        load = make(folder)
        path = next(path for path in folder.rglob("model.safetensors"))
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        name = next(name for name in header if name != "__metadata__")
        grown = {**header, name: {**header[name], "shape": [10**12, *header[name]["shape"]]}}
        moved = {**header, name: {**header[name], "data_offsets": [0, 10**12]}}
        texts = [json.dumps(each).encode() for each in (grown, moved)]
        lies = [len(text).to_bytes(8, "little") + text + content[8 + length :] for text in texts]
        for damaged in (*lies, content[: len(content) // 2], b"", (2**62).to_bytes(8, "little") + content[8:]):
            path.write_bytes(damaged)
            with pytest.raises(UserError) as error:
                load()
            assert "\n" not in str(error.value) and str(folder) in str(error.value)
        shutil.rmtree(folder)


def test_a_model_with_other_shapes_is_named(tmp_path: Path) -> None:
    load = lam(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "from_latents.bias": torch.zeros(7)}, path)
    with pytest.raises(
        UserError, match=r"does not fit the config next .*from_latents.bias is of shape \[7\], not \[32\]"
    ):
        load()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "no object": lambda content: b"[1, 2]",
    "null": lambda content: b"null",
    "text": lambda content: b'"text"',
    "number": lambda content: b"1e400",
    "nothing in it": lambda content: b"{}",
    "deep": lambda content: b"[" * 200_000 + b"]" * 200_000,
    "deep objects": lambda content: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "no text": lambda content: b"\xff\xfe\x00" + content,
    "every value a list": lambda content: json.dumps({key: [] for key in json.loads(content)}).encode(),
    "every value null": lambda content: json.dumps(dict.fromkeys(json.loads(content))).encode(),
    "every value a number": lambda content: json.dumps(dict.fromkeys(json.loads(content), -(10**30))).encode(),
    "every value an object": lambda content: json.dumps({key: {"a": {}} for key in json.loads(content)}).encode(),
    "flipped 1": lambda content: flipped(content, 1),
    "flipped 2": lambda content: flipped(content, 2),
    "flipped 3": lambda content: flipped(content, 3),
}


def flipped(content: bytes, seed: int) -> bytes:
    """With one bit in a hundred bytes flipped."""
    rng, bent = np.random.default_rng(seed), bytearray(content)
    for place in rng.integers(0, len(bent), max(1, len(bent) // 100)):
        bent[place] ^= 1 << int(rng.integers(8))
    return bytes(bent)


def hf_policy(folder: Path) -> Callable[[], object]:
    source = make_vlm("smolvlm", folder.with_name("source"))
    config = HfConfig(source=str(source), image_size=IMAGE_SIZE)
    backbone, processor, vocabulary = hf.create(config, texts=[], num_cameras=1, segments={"latent": 8})
    policy = LatentPolicy(PolicyConfig(vocabulary, ("front",), config, latent_length=4), backbone)
    Policy(policy, processor).save_pretrained(folder, run={})
    without_checksums(folder)
    return lambda: load_policy(folder)


@pytest.mark.parametrize("make", [policy, hf_policy, vlm, dinov2, lam, inverse])
def test_a_damaged_file_is_one_line(make: Any, tmp_path: Path) -> None:
    """Every JSON file of every saved model, damaged in every way: a model that may act, or a UserError of one line."""
    folder = tmp_path / "model"
    load = make(folder)
    # What is set in the environment of tests aside, transformers warns of some of these.
    for path in sorted(folder.rglob("*.json")):
        whole = path.read_bytes()
        for name, damage in DAMAGE.items():
            path.write_bytes(damage(whole))
            try:
                load()
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, (path, name, str(error))
            except Exception as error:
                raise AssertionError(f"{path.name}, {name}") from error
        path.write_bytes(whole)
