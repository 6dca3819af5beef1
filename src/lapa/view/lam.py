"""The page of a latent action model: press codes and see what the decoder predicts; several models side by side.

    about               the models, and small images of the examples
    example-E           an image of a dataset and those that follow a horizon apart, as each model reads them
    frequent-M          the most frequent latent actions of model M, in a sample of the dataset
    each-E-M            of an export: what each code of model M does to the image of example E

Asked with images, of which a model takes any size:
    image   {images}                         the images as each model reads them, and their codes
    step    {model, image, codes or pair}    the image one horizon later, by codes or by those between two images
    each    {model, image, codes}            the same for each code at each position

Axes: N latent actions, T frames, L latent action length, C channel, H W image.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from lapa.data.dataset import Dataset
from lapa.data.pairs import horizon_frames
from lapa.data.spec import open_dataset
from lapa.data.transforms import at_most, resize_and_crop, to_page
from lapa.drawing import heat_map, largest
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import distinct_names
from lapa.latent.metrics import device_of
from lapa.latent.model import DATASETS, LatentActionModel, horizon_for
from lapa.latent.show import EachCode, decode_each, difference, in_bytes, pixels
from lapa.view.config import ViewConfig
from lapa.view.images import SMALL, dataset_here, from_page, places_of
from lapa.view.pages import Pages, UnknownNameError

# Examples that the page offers, and those of an export. Frames of each after the first.
EXAMPLES, EXPORTED, FOLLOWING = 12, 12, 6
# Latent actions are counted of so many pairs of so many episodes, or as many as this time allows, in which nothing else
# is answered. The most frequent ones are offered.
SAMPLE_EPISODES, SAMPLE_PAIRS, SAMPLE_SECONDS, FREQUENT = 16, 4, 5.0, 8
# How often an export applies each code.
REPEATS = 3


@dataclass(frozen=True, eq=False)
class Lam:
    """A model with the name that the page shows, and its horizon on the dataset of the examples."""

    name: str
    model: LatentActionModel
    seconds: float

    def read(self, images: Iterable[np.ndarray]) -> Tensor:
        """Images of any size as the model reads them, uint8 [T, C, H, W]."""
        size = self.model.config.image_size
        return torch.from_numpy(
            np.stack([rearrange(resize_and_crop(image_HWC[None], size)[0], "h w c -> c h w") for image_HWC in images])
        )

    def codes(self, frames_TCHW: Tensor) -> list[list[int]]:
        """The codes between each frame and the next; none of a continuous model."""
        if len(frames_TCHW) < 2 or not self.model.discrete:
            return []
        pairs = torch.stack([frames_TCHW[:-1], frames_TCHW[1:]], dim=1)
        return self.model.codes(pairs).tolist()

    def predict(self, frame_CHW: Tensor, action: Tensor) -> np.ndarray:
        """The image [H, W, C] one horizon later. action: codes [L], or of a continuous model a pair [2, C, H, W]."""
        frame_1CHW = frame_CHW[None].to(device_of(self.model))
        if action.ndim == 1:
            return pixels(decode_each(self.model, frame_1CHW, action[None]))[0]
        latent = self.model.encode(action[None].to(frame_1CHW.device))
        return pixels(self.model.predict(frame_1CHW, latent.quantized_BLD))[0]

    def step(self, frame_CHW: Tensor, action: Tensor, *, exact: bool = True) -> dict[str, Any]:
        """The prediction of `predict` for the page, its difference from the image, and the end of that one's scale."""
        before_1HWC, after_1HWC = pixels(frame_CHW[None] / 255), self.predict(frame_CHW, action)[None]
        change_1HW = difference(before_1HWC, after_1HWC)
        most = largest(change_1HW)
        heat = to_page(heat_map(change_1HW[0], most), exact=False)
        return {"image": to_page(after_1HWC[0], exact=exact), "difference": heat, "most": most}


def open_lam_pages(config: ViewConfig) -> LamPages:
    """Loads the models and finds the dataset of their examples. Raises UserError for a model that cannot predict."""
    paths = [config.path, *config.compare]
    models = [LatentActionModel.from_pretrained(path).to(pick_device(config.device)).eval() for path in paths]
    for path, model in zip(paths, models, strict=True):
        if not model.predicts_pixels:
            raise UserError(
                f"{path}: predicts features, not pixels, so there is nothing to see; `lapa latent probe` measures it"
            )
    dataset = (
        open_dataset(config.data)
        if config.data is not None
        else dataset_here(models[0].notes.get("data"), models[0].notes.get(DATASETS))
    )
    if dataset is None and config.export is not None:
        raise UserError(f"{config.path}: an export needs images to start from; give them: --data DATASET")
    names = distinct_names([Path(path) for path in paths])
    lams = [
        Lam(name, model, model.horizon if dataset is None else horizon_for(path, dataset, model))
        for name, path, model in zip(names, paths, models, strict=True)
    ]
    exported = config.export is not None
    num = (config.limit or EXPORTED) if exported else EXAMPLES
    return LamPages(lams, dataset, num_examples=num, exported=exported, folders=paths)


class LamPages(Pages):
    """The data of the page of latent action models.

    dataset: of the examples. exported: whether what the page may ask for is worked out before. folders: of the models.
    """

    body = "lam.html"
    numbers = {"about": 0, "example": 1, "frequent": 1, "each": 2}  # noqa: RUF012
    questions = frozenset({"image", "step", "each"})

    def __init__(
        self,
        lams: Sequence[Lam],
        dataset: Dataset | None,
        *,
        num_examples: int = EXAMPLES,
        exported: bool = False,
        folders: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.lams, self.dataset, self._exported, self._folders = list(lams), dataset, exported, list(folders)
        self._counted = cache(self._count)
        self.places: list[tuple[int, int]] = []
        if dataset is not None:
            room = FOLLOWING * max(horizon_frames(lam.seconds, dataset.fps) for lam in lams)
            self.places = places_of(dataset, num_examples, room)

    @property
    def summary(self) -> str:
        names = ", ".join(lam.name for lam in self.lams)
        source = "none; --data DATASET gives some" if self.dataset is None else self.dataset.name
        return f"{names}; example images: {source}"

    @property
    def exportable(self) -> bool:
        return self.dataset is not None

    @property
    def inputs(self) -> list[str | Path]:
        folders: list[str | Path] = [path for path in self._folders if Path(path).is_dir()]
        return folders if self.dataset is None else [*folders, self.dataset.root]

    @property
    def left_out(self) -> str:
        return (
            f"{len(self.places)} images, each code applied to them up to {REPEATS} times; "
            "--limit takes more images, and `lapa view` without --export all that one can press"
        )

    def names(self) -> Iterator[str]:
        yield "about"
        for number in range(len(self.lams)):
            yield f"frequent-{number}"
        for example in range(len(self.places)):
            yield f"example-{example}"
            for number, lam in enumerate(self.lams):
                if lam.model.discrete:
                    yield f"each-{example}-{number}"

    def _about(self) -> dict[str, Any]:
        models = [
            {
                "name": lam.name,
                "about": f"{lam.model.config.image_size} px, {lam.model.config.quantizer}, "
                f"{sum(each.numel() for each in lam.model.parameters()):,} parameters",
                "discrete": lam.model.discrete,
                "length": lam.model.config.latent_length,
                "codebook": lam.model.config.codebook_size,
                "seconds": lam.seconds,
            }
            for lam in self.lams
        ]
        examples = []
        for episode, frame in self.places:
            assert self.dataset is not None
            image_HWC = self._frames(episode, [frame])[0]
            small = to_page(at_most(image_HWC, SMALL), exact=False)
            instruction = self.dataset[episode].instruction
            examples.append({"episode": episode, "frame": frame, "instruction": instruction, "small": small})
        dataset = None if self.dataset is None else self.dataset.name
        return {
            "models": models,
            "dataset": dataset,
            "examples": examples,
            "device": str(device_of(self.lams[0].model)),
        }

    def _frames(self, episode: int, frames: Sequence[int]) -> np.ndarray:
        assert self.dataset is not None
        camera = self.lams[0].model.notes.get("camera")
        camera = self.dataset.camera_name(camera if camera in self.dataset.cameras else None)
        return self.dataset.frames(episode, frames, camera)

    def _example(self, example: int) -> dict[str, Any]:
        episode, frame = self._place(example)
        assert self.dataset is not None
        models = []
        for lam in self.lams:
            step = horizon_frames(lam.seconds, self.dataset.fps)
            frames = range(frame, int(self.dataset.lengths[episode]), step)[: FOLLOWING + 1]
            frames_TCHW = lam.read(self._frames(episode, frames))
            found = self._clip(lam, frames_TCHW)
            if self._exported:
                found["replay"] = self._replay(lam, frames_TCHW)
            models.append(found)
        return {"models": models}

    def _clip(self, lam: Lam, frames_TCHW: Tensor) -> dict[str, Any]:
        images = rearrange(frames_TCHW, "t c h w -> t h w c").numpy()
        return {"frames": [self._sent(image_HWC) for image_HWC in images], "codes": lam.codes(frames_TCHW)}

    def _replay(self, lam: Lam, frames_TCHW: Tensor) -> list[dict[str, Any]]:
        """The predictions of each step of a clip from the prediction before it, by the clip's own latent actions."""
        codes, frame_CHW, steps = lam.codes(frames_TCHW), frames_TCHW[0], []
        for number in range(len(frames_TCHW) - 1):
            action = torch.tensor(codes[number]) if codes else frames_TCHW[number : number + 2]
            steps.append(self._step(lam, frame_CHW, action))
            frame_CHW = lam.read([lam.predict(frame_CHW, action)])[0]
        return steps

    def _step(self, lam: Lam, frame_CHW: Tensor, action: Tensor) -> dict[str, Any]:
        return lam.step(frame_CHW, action, exact=not self._exported)

    def _frequent(self, number: int) -> dict[str, Any]:
        return self._counted(self._lam(number))

    def _count(self, lam: Lam) -> dict[str, Any]:
        if self.dataset is None or not lam.model.discrete:
            return {"actions": [], "sample": 0}
        step, counts = horizon_frames(lam.seconds, self.dataset.fps), Counter[tuple[int, ...]]()
        places = places_of(self.dataset, SAMPLE_EPISODES, 0)
        end = math.inf if self._exported else time.monotonic() + SAMPLE_SECONDS
        # In any order, since the time may end before the episodes do.
        for place in np.random.default_rng(0).permutation(len(places)):
            if time.monotonic() > end:
                break
            episode = places[place][0]
            last = int(self.dataset.lengths[episode]) - 1 - step
            if last < 0:
                continue
            firsts = np.unique(np.linspace(0, last, SAMPLE_PAIRS).round().astype(int))
            frames = lam.read(self._frames(episode, np.stack([firsts, firsts + step], axis=1).reshape(-1).tolist()))
            pairs = rearrange(frames, "(b t) c h w -> b t c h w", t=2)
            counts.update(map(tuple, lam.model.codes(pairs).tolist()))
        total = sum(counts.values())
        most = counts.most_common(FREQUENT)
        return {
            "actions": [{"codes": codes, "share": round(count / total, 4)} for codes, count in most],
            "sample": total,
        }

    def _each(self, example: int, number: int) -> dict[str, Any]:
        """Of an export: each code at each position and the frequent latent actions, applied up to REPEATS times."""
        lam, (episode, frame) = self._lam(number), self._place(example)
        if not self._exported or not lam.model.discrete:
            raise UnknownNameError(number)
        clip = self.json(f"example-{example}")["models"][number]["codes"]
        base = clip[0] if clip else [lam.model.config.codebook_size // 2] * lam.model.config.latent_length
        more = [each["codes"] for each in self._frequent(number)["actions"]]
        return self._codes(lam, lam.read(self._frames(episode, [frame]))[0], base, more, REPEATS)

    def _codes(
        self, lam: Lam, frame_CHW: Tensor, base: Sequence[int], more: Sequence[Sequence[int]], repeats: int
    ) -> dict[str, Any]:
        """What latent actions do to an image: those that differ from `base` in one code, and `more`."""
        each = EachCode(lam.model, frame_CHW, torch.tensor(base))
        actions_NL = torch.cat([each.actions_NL, torch.tensor([base, *more])]).unique(dim=0)
        frames_NCHW, steps = frame_CHW.expand(len(actions_NL), -1, -1, -1), []
        for _ in range(repeats):
            before, frames_NCHW = frames_NCHW, in_bytes(decode_each(lam.model, frames_NCHW, actions_NL))
            after_NHWC = pixels(frames_NCHW / 255)
            changes_NHW = difference(pixels(before / 255), after_NHWC)
            most = largest(changes_NHW)
            steps.append(
                [
                    {
                        "image": to_page(image_HWC, exact=False),
                        "difference": to_page(heat_map(change_HW, most), exact=False),
                        "most": most,
                    }
                    for image_HWC, change_HW in zip(after_NHWC, changes_NHW, strict=True)
                ]
            )
        return {"base": list(base), "actions": actions_NL.tolist(), "steps": steps}

    def _ask_image(self, given: Mapping[str, Any]) -> dict[str, Any]:
        images = given.get("images")
        if not isinstance(images, list) or not 1 <= len(images) <= 2:
            raise UserError("give one image, or two of which the second is later")
        read = [from_page(each, name) for each, name in zip(images, ("image", "later image"), strict=False)]
        return {"models": [self._clip(lam, lam.read(read)) for lam in self.lams]}

    def _ask_step(self, given: Mapping[str, Any]) -> dict[str, Any]:
        lam = self._lam_of(given)
        frame_CHW = lam.read([from_page(given.get("image"))])[0]
        pair = given.get("pair")
        if lam.model.discrete or pair is None:
            action = torch.tensor(codes_of(given.get("codes"), lam.model))
        elif isinstance(pair, list) and len(pair) == 2:
            action = lam.read([from_page(each) for each in pair])
        else:
            raise UserError("a pair is two images, the second later than the first")
        return self._step(lam, frame_CHW, action)

    def _ask_each(self, given: Mapping[str, Any]) -> dict[str, Any]:
        lam = self._lam_of(given)
        base = codes_of(given.get("codes"), lam.model)
        return self._codes(lam, lam.read([from_page(given.get("image"))])[0], base, (), 1)

    def _sent(self, image_HWC: np.ndarray) -> str:
        return to_page(image_HWC, exact=not self._exported)

    def _place(self, example: int) -> tuple[int, int]:
        if example >= len(self.places):
            raise UnknownNameError(example)
        return self.places[example]

    def _lam(self, number: int) -> Lam:
        if number >= len(self.lams):
            raise UnknownNameError(number)
        return self.lams[number]

    def _lam_of(self, given: Mapping[str, Any]) -> Lam:
        number = given.get("model")
        if type(number) is not int or not 0 <= number < len(self.lams):
            raise UserError(f"model {number!r}: there are the models 0 to {len(self.lams) - 1}")
        return self.lams[number]


def codes_of(given: Any, model: LatentActionModel) -> list[int]:
    """A latent action that the page sent. Raises UserError where this model has no such one."""
    if not model.discrete:
        raise UserError(
            "a continuous model has no codes to press; give a pair of images, whose latent action it applies"
        )
    length, most = model.config.latent_length, model.config.codebook_size - 1
    if not isinstance(given, list) or len(given) != length or not all(type(code) is int for code in given):
        raise UserError(f"a latent action of this model has {length} whole numbers, from 0 to {most}")
    if not 0 <= min(given) <= max(given) <= most:
        raise UserError(f"{','.join(map(str, given))}: codes of this model lie in 0 to {most}")
    return given
