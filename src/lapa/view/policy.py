"""The page of a policy: an observation, and what the policy predicts for it: latent action and robot actions.

    about        the policy, and small images of the examples
    example-E    an observation of a dataset and its true actions; in an export with what the policy predicts

Asked with {images, instruction, state, statistics}, images by camera:
    predict      the latent action with the probabilities of its codes, as an image where the LAM is known; the chunk of
                 robot actions, with probabilities of the first action's bins where the head is `bins`

Axes: K chunk, A action dimensions, L latent action length, F tokens of a field, R rows of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapa.data.dataset import Dataset
from lapa.data.pairs import horizon_frames
from lapa.data.spec import open_dataset
from lapa.data.transforms import at_most, to_page
from lapa.engine.distributed import pick_device
from lapa.errors import UserError, unknown
from lapa.files import read_json
from lapa.hub.download import errors_of
from lapa.latent.model import LatentActionModel, horizon_for, lam_fingerprint
from lapa.policy.model import Field
from lapa.policy.runtime import CONFIG, Actor, Policy, load_actors, load_policy, other_kind, policy_folder
from lapa.policy.training import slot_cameras
from lapa.types import Observation
from lapa.view.config import ViewConfig
from lapa.view.images import SIDE, SMALL, dataset_here, from_page, places_of
from lapa.view.lam import Lam
from lapa.view.pages import Pages, UnknownNameError

# Observations that the page offers, and those of an export.
EXAMPLES, EXPORTED = 12, 20
LONGEST_INSTRUCTION = 2000


def open_policy_pages(config: ViewConfig) -> PolicyPages:
    """Loads a policy of any kind, and finds the dataset of its examples and the model of its latent actions.

    Raises UserError where the dataset or the model does not fit the policy.
    """
    folder = policy_folder(config.path)
    if other_kind(folder) is not None:
        actors, policy = load_actors(folder, config.device), None
    else:
        with errors_of(config.path):
            policy = load_policy(folder).to(config.device)
        actors = dict[str, Actor](policy.by_statistics() if policy.acts else {"": policy})
    dataset: Dataset | None = None
    chosen: tuple[str, ...] = ()
    if config.data is not None:
        dataset = open_dataset(config.data)
    elif policy is not None:
        dataset = dataset_here(policy.run.get("data"), policy.run.get("dataset_fingerprints"))
        known = policy.run.get("cameras")
        chosen = tuple(map(str, known)) if isinstance(known, list) else ()
    if dataset is None and config.export is not None:
        raise UserError(f"{config.path}: an export needs observations to predict from; give them: --data DATASET")
    lam = _lam(config, policy, folder, dataset)
    exported = config.export is not None
    num = (config.limit or EXPORTED) if exported else EXAMPLES
    name = Path(config.path).name
    pages = PolicyPages(name, actors, lam, exported=exported, folders=[folder])
    if dataset is not None:
        pages.take_examples(dataset, num, chosen)
    return pages


def _lam(config: ViewConfig, policy: Policy | None, folder: Path, dataset: Dataset | None) -> Lam | None:
    """The model of a policy's latent actions: the given one, or else one in the folder around the policy's.

    None where there is none, and where it predicts no pixels.
    """
    path: str | Path | None = config.lam
    if policy is None or not policy.config.latent_length:
        if path is not None:
            raise UserError(f"{config.path}: has no latent actions; leave out --lam")
        return None
    wanted = policy.config.lam_fingerprint
    if path is None:
        around = sorted(folder.absolute().parent.iterdir()) if wanted else []
        path = next((each for each in around if _is_lam(each) and lam_fingerprint(each) == wanted), None)
        if path is None:
            return None
    model = LatentActionModel.from_pretrained(path).to(pick_device(config.device)).eval()
    sizes = model.config.latent_length, model.config.codebook_size
    if sizes != (policy.config.latent_length, policy.config.vocabulary.latent) or not model.discrete:
        raise UserError(
            f"--lam {path}: the policy predicts {policy.config.latent_length} codes of "
            f"{policy.config.vocabulary.latent}; give the model whose labels it learned"
        )
    if wanted and (given := lam_fingerprint(path)) != wanted:
        raise UserError(
            f"--lam {path}: is the model {given}; the policy learned the latent actions of {wanted}, whose codes mean "
            "something else"
        )
    seconds = model.horizon if dataset is None else horizon_for(path, dataset, model)
    return Lam(Path(path).name, model, seconds) if model.predicts_pixels else None


def _is_lam(folder: Path) -> bool:
    try:
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    except UserError:
        return False
    return isinstance(config, dict) and isinstance(config.get("model"), dict) and "policy" not in config


class PolicyPages(Pages):
    """The data of the page of a policy.

    actors: the policy as it acts with the statistics of each dataset. exported: whether examples have predictions.
    """

    body = "policy.html"
    numbers = {"about": 0, "example": 1}  # noqa: RUF012
    questions = frozenset({"predict"})

    def __init__(
        self,
        name: str,
        actors: Mapping[str, Actor],
        lam: Lam | None = None,
        *,
        exported: bool = False,
        folders: list[str | Path] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.actors, self.lam, self._exported = name, dict(actors), lam, exported
        self._folders = folders or []
        self._first = next(iter(self.actors.values()))
        self._latent = isinstance(self._first, Policy) and self._first.config.latent_length > 0
        self._acts = not isinstance(self._first, Policy) or self._first.acts
        self.dataset: Dataset | None = None
        self.places: list[tuple[int, int]] = []
        self._cameras: tuple[str, ...] = ()

    def take_examples(self, dataset: Dataset, num: int, cameras: Sequence[str] = ()) -> None:
        """Offers `num` observations of a dataset. cameras: those in the policy's slots; by default of the same names.

        Raises UserError where the dataset has other cameras or another state.
        """
        actor = self._first
        try:
            self._cameras = slot_cameras(actor.cameras, [dataset], cameras)
        except UserError:
            raise UserError(
                f"{dataset.root}: has the cameras {', '.join(dataset.cameras)}, the policy those named "
                f"{', '.join(actor.cameras)}; give a dataset with these"
            ) from None
        if actor.state_dim not in (0, dataset.state_dim):
            raise UserError(
                f"{dataset.root}: has a state of {dataset.state_dim or 0} dimensions, the policy reads "
                f"{actor.state_dim}; give episodes of its robot"
            )
        room = max(actor.chunk, 0 if self.lam is None else horizon_frames(self.lam.seconds, dataset.fps))
        self.places, self.dataset = places_of(dataset, num, room), dataset

    @property
    def summary(self) -> str:
        lam = f"; latent actions by {self.lam.name}" if self.lam else ""
        source = "none; --data DATASET gives some" if self.dataset is None else self.dataset.name
        return f"cameras {', '.join(self._first.cameras)}{lam}; example observations: {source}"

    @property
    def exportable(self) -> bool:
        return self.dataset is not None

    @property
    def inputs(self) -> list[str | Path]:
        return self._folders if self.dataset is None else [*self._folders, self.dataset.root]

    @property
    def left_out(self) -> str:
        return f"predictions for {len(self.places)} observations of the dataset; --limit takes more"

    def names(self) -> Iterator[str]:
        yield "about"
        yield from (f"example-{number}" for number in range(len(self.places)))

    def _about(self) -> dict[str, Any]:
        actor, examples = self._first, []
        for episode, frame in self.places:
            assert self.dataset is not None
            small = to_page(at_most(self._images(episode, frame)[actor.cameras[0]], SMALL), exact=False)
            instruction = self.dataset[episode].instruction
            examples.append({"episode": episode, "frame": frame, "instruction": instruction, "small": small})
        about: dict[str, Any] = {
            "name": self.name,
            "cameras": list(actor.cameras),
            "state": actor.state_dim,
            "statistics": [key for key in self.actors if key],
            "dataset": None if self.dataset is None else self.dataset.name,
            "examples": examples,
            "latent": self._latent,
        }
        if isinstance(actor, Policy):
            about["about"] = f"{actor.config.backbone.kind} backbone, on {actor.device}"
            about["fingerprint"] = actor.config.lam_fingerprint
        if self.lam is not None:
            about["lam"] = {"name": self.lam.name, "seconds": self.lam.seconds}
        if self._acts:
            space = actor.action_space
            about["acts"] = {
                "chunk": actor.chunk,
                "names": list(space.names),
                "fps": actor.fps,
                "control": space.control,
            }
        return about

    def _images(self, episode: int, frame: int) -> dict[str, np.ndarray]:
        assert self.dataset is not None
        slots = zip(self._first.cameras, self._cameras, strict=True)
        return {slot: self.dataset.frames(episode, [frame], camera)[0] for slot, camera in slots}

    def _example(self, number: int) -> dict[str, Any]:
        if number >= len(self.places):
            raise UnknownNameError(number)
        assert self.dataset is not None
        (episode, frame), dataset, actor = self.places[number], self.dataset, self._first
        images, instruction = self._images(episode, frame), dataset[episode].instruction
        states_TS = dataset.states(episode) if actor.state_dim else None
        state_S = None if states_TS is None else states_TS[frame]
        found: dict[str, Any] = {
            "images": {
                camera: to_page(at_most(image_HWC, SIDE), exact=False) if self._exported else to_page(image_HWC)
                for camera, image_HWC in images.items()
            },
            "instruction": instruction,
            "state": None if state_S is None else _rounded(state_S),
        }
        if self._acts and dataset.action_dim == actor.action_dim:
            found["actions"] = _rounded(dataset.actions(episode)[frame : frame + actor.chunk])
        if self.lam is not None:
            found["recorded"] = self._recorded(self.lam, episode, frame)
        if self._exported:
            chosen = self.actors.get(dataset.name, actor)
            found["predicted"] = self._predicted(chosen, Observation(images, instruction, state_S))
        return found

    def _recorded(self, lam: Lam, episode: int, frame: int) -> dict[str, Any] | None:
        """The image one horizon later, and the codes that the model reads from the two; None past the episode's end."""
        assert self.dataset is not None
        later = frame + horizon_frames(lam.seconds, self.dataset.fps)
        if later >= self.dataset.lengths[episode]:
            return None
        frames_TCHW = lam.read(self.dataset.frames(episode, [frame, later], self._cameras[0]))
        image_HWC = frames_TCHW[1].permute(1, 2, 0).numpy()
        return {"image": to_page(image_HWC, exact=not self._exported), "codes": lam.codes(frames_TCHW)[0]}

    def _ask_predict(self, given: Mapping[str, Any]) -> dict[str, Any]:
        key, images, instruction = given.get("statistics"), given.get("images"), given.get("instruction", "")
        if not isinstance(images, dict) or not isinstance(instruction, str):
            raise UserError("expected images by camera, and an instruction")
        if len(instruction) > LONGEST_INSTRUCTION:
            raise UserError(f"an instruction of {len(instruction)} characters; give at most {LONGEST_INSTRUCTION}")
        if key is not None and not isinstance(key, str):
            raise UserError("statistics are chosen by the name of a dataset")
        if key is not None and key not in self.actors:
            raise unknown("statistics", key[:100], self.actors)
        actor = self._first if key is None else self.actors[key]
        if missing := [camera for camera in actor.cameras if camera not in images]:
            raise UserError(f"there is no image of {', '.join(missing)}; give one")
        read = {camera: from_page(images[camera], f"image of {camera}") for camera in actor.cameras}
        state = given.get("state") if actor.state_dim else None
        try:
            (observation,) = actor.checked([{**read, "instruction": instruction, "state": _numbers(state)}])
        except UserError as error:
            raise UserError(str(error).removeprefix("observation 0: ")) from None
        return self._predicted(actor, observation)

    def _predicted(self, actor: Actor, observation: Observation) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if isinstance(actor, Policy) and self._latent:
            codes_L, shares_LR = _decoded(actor, observation, actor.model.latent_field)
            found["codes"], found["shares"] = codes_L.tolist(), _rounded(shares_LR)
            if self.lam is not None:
                image_HWC = observation.images[actor.cameras[0]]
                (frame_CHW,) = self.lam.read([image_HWC])
                read = to_page(frame_CHW.permute(1, 2, 0).numpy(), exact=not self._exported)
                step = self.lam.step(frame_CHW, torch.from_numpy(codes_L), exact=not self._exported)
                found["decoded"] = {"before": read, **step}
        if self._acts:
            found["actions"] = _rounded(actor.act([observation])[0])
        if isinstance(actor, Policy) and actor.acts and actor.config.head == "bins":
            _, shares_FR = _decoded(actor, observation, actor.model.action_field)
            (statistics,) = actor.statistics.values()
            found["bins"] = []
            for dimension, num in enumerate(actor.config.action_bins):
                bins_NA = np.minimum(np.arange(num)[:, None], np.array(actor.config.action_bins) - 1)
                values_N = statistics.codec.decode(statistics.codec.clamp(bins_NA))[:, dimension]
                found["bins"].append({"values": _rounded(values_N), "shares": _rounded(shares_FR[dimension, :num])})
        return found


@torch.no_grad()
def _decoded(policy: Policy, observation: Observation, field: Field) -> tuple[np.ndarray, np.ndarray]:
    """The codes [F] of a field, and at each position the probability of every code [F, R] given those before it."""
    batch = policy.batch([observation])
    tokens_BF, _ = policy.model.decode(batch, field)
    logits_BFR = policy.model.field_logits(batch, field, tokens_BF)
    codes_BF = policy.config.vocabulary.codes(field.segment, tokens_BF)
    return codes_BF[0].cpu().numpy(), logits_BFR[0].float().softmax(-1).cpu().numpy()


def _numbers(state: Any) -> np.ndarray | None:
    """A state that the page sent. Raises UserError where it is none."""
    if state is None:
        return None
    if not isinstance(state, list) or not all(type(value) in (int, float) for value in state):
        raise UserError("a state is a list of numbers")
    try:
        return np.array(state, np.float32)
    except OverflowError:
        raise UserError("a state has a number that is too large") from None


def _rounded(values: np.ndarray) -> list[Any]:
    """Numbers with four digits, as lists."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.4g}") for value in values.tolist()]
