"""UniPi (https://arxiv.org/abs/2302.00111): a policy that plans in pictures and reads its actions off the plan.

A video model predicts the next frames from what is seen and the instruction; an inverse dynamics model says which
actions lead from each frame to the next. The one learns from videos without actions, the other from few episodes.
UniPi plans a whole trajectory and follows it open-loop; a plan here is a short look ahead, F frames one horizon apart,
and is made anew when it has been followed.

    lapa baseline unipi --video VIDEO --inverse INVERSE --out POLICY
    lapa evaluate POLICY --env metaworld --tasks mt10 --out RESULTS

POLICY holds copies of both in video/ and inverse/, and in config.json how they act.
Axes: B batch, F future frames, T=1+F frames, C channel, H W image, K chunk, A action dimensions.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float

from lapa import config as configs
from lapa.baselines.inverse import InverseDynamics, inverse_fingerprint
from lapa.baselines.video_model import CONFIG, HORIZON_TOLERANCE, TOKENIZER, WEIGHTS, VideoModel
from lapa.console import finish, warn
from lapa.data.dataset import ActionSpace
from lapa.data.transforms import resize_and_crop
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import claim_output, fingerprint, read_json
from lapa.policy.runtime import check_observation
from lapa.types import Observation

KIND, VIDEO, INVERSE = "unipi", "video", "inverse"


@dataclass(frozen=True)
class UniPiConfig:
    """Join a video model and an inverse dynamics model into a policy that `lapa evaluate` takes."""

    video: Path
    """Folder of a video model."""
    inverse: Path
    """Folder of an inverse dynamics model, of the same horizon and image size."""
    out: Path
    """Folder of the policy to write."""
    sampling_steps: int = 8
    """Denoising steps of a plan."""
    guidance: float = 1.0
    """How far a plan follows the instruction: 1 as the video model learned it, above 1 beyond, 0 not at all."""
    seed: int = 0
    """Draws the noise that every plan starts from."""
    overwrite: bool = False
    """Replace what `out` holds."""


@dataclass(frozen=True)
class Acting:
    """What config.json of a joined policy holds. The fingerprints are those of its parts."""

    sampling_steps: int
    guidance: float
    seed: int
    video_fingerprint: str
    inverse_fingerprint: str
    kind: str = KIND


def run(config: UniPiConfig) -> None:
    """`lapa baseline unipi`. UserError where the two do not fit together."""
    if config.sampling_steps < 1:
        raise UserError(f"--sampling-steps must be at least 1, got {config.sampling_steps}")
    video, inverse = VideoModel.from_pretrained(config.video), InverseDynamics.from_pretrained(config.inverse)
    require_fit(video, inverse, config.video, config.inverse)
    learned_from = read_json(config.video / CONFIG)["camera"]
    if learned_from != inverse.camera:
        warn(
            f"the video model saw the camera {learned_from}; the policy will see {inverse.camera}, as {config.inverse}"
        )
    claim_output(
        config.out,
        complete=(config.out / CONFIG).exists(),
        overwrite=config.overwrite,
        resumable=False,
        inputs=[config.video, config.inverse],
    )
    for source, name in ((config.video, VIDEO), (config.inverse, INVERSE)):
        shutil.copytree(source, config.out / name, ignore=shutil.ignore_patterns("training", "*.png"))
    parts = video_fingerprint(config.out / VIDEO), inverse_fingerprint(config.out / INVERSE)
    configs.save(Acting(config.sampling_steps, config.guidance, config.seed, *parts), config.out / CONFIG)
    finish("policy", config.out, [f"lapa evaluate {shlex.quote(str(config.out))} --env ENVIRONMENT --out RESULTS"])


def is_unipi(folder: Path) -> bool:
    """Whether `folder` holds a joined policy."""
    path = Path(folder) / CONFIG
    written = read_json(path) if path.exists() else None
    return isinstance(written, dict) and written.get("kind") == KIND


def video_fingerprint(folder: Path) -> str:
    """Identifies a saved video model by its weights, config and tokenizer (16 hex digits)."""
    return fingerprint(*(folder / name for name in (WEIGHTS, CONFIG, f"{TOKENIZER}/tokenizer.json")))


def require_fit(video: VideoModel, inverse: InverseDynamics, video_name: object, inverse_name: object) -> None:
    """UserError where the inverse dynamics model does not know what is between two of the video model's frames."""
    ahead, between = video.config.horizon_seconds, inverse.horizon_frames / inverse.fps
    if abs(ahead - between) > HORIZON_TOLERANCE * between:
        raise UserError(
            f"{video_name}: its frames are {ahead:.3g} s apart, those of {inverse_name} {between:.3g} s "
            f"({inverse.horizon_frames} frames at {inverse.fps:g} fps); train one of them again with the other's "
            "--horizon-seconds"
        )
    if video.config.image_size != inverse.image_size:
        raise UserError(
            f"{video_name}: predicts pictures of {video.config.image_size} px, {inverse_name} sees "
            f"{inverse.image_size} px; train one of them again with the other's --image-size"
        )


class UniPi:
    """Acts like `lapa.policy.runtime.Policy`: observations in, chunks of robot actions out."""

    state_dim = 0
    """The robot's state is not looked at."""

    def __init__(self, video: VideoModel, inverse: InverseDynamics, acting: Acting, device: torch.device) -> None:
        self.video, self.inverse, self.acting = video.to(device).eval(), inverse.to(device).eval(), acting
        self.device = device

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "auto", dataset: str | None = None) -> UniPi:
        """Loads a joined policy. UserError where a part is missing, was changed, or does not fit the other.

        dataset: whose prompt is read; a video model reads bare instructions, so that there is none to choose.
        """
        folder = Path(folder)
        if not is_unipi(folder):
            raise UserError(f"{folder}: no joined policy; make one with `lapa baseline unipi`")
        if dataset is not None:
            raise UserError(f"{folder}: reads bare instructions, not the prompt of {dataset}; leave out --prompt-of")
        acting = configs.load(Acting, folder / CONFIG)
        video, inverse = VideoModel.from_pretrained(folder / VIDEO), InverseDynamics.from_pretrained(folder / INVERSE)
        _require_unchanged(folder, acting)
        require_fit(video, inverse, folder / VIDEO, folder / INVERSE)
        return cls(video, inverse, acting, pick_device(device))

    @property
    def cameras(self) -> tuple[str, ...]:
        """The camera that the inverse dynamics model learned from."""
        return (self.inverse.camera,)

    @property
    def chunk(self) -> int:
        """K, the time steps of actions that a plan holds."""
        return self.video.config.num_frames * self.inverse.horizon_frames

    @property
    def action_dim(self) -> int:
        return self.action_space.action_dim

    @property
    def action_space(self) -> ActionSpace:
        """What the actions mean."""
        return self.inverse.action_space

    def infer(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K A"]:
        """The next K actions for each observation, float32, in the robot's own units.

        Deterministic; what an observation is answered does not depend on the others, up to rounding. Raises UserError
        for a missing camera and for an image that is not uint8 RGB.
        """
        if not observations:
            return np.zeros((0, self.chunk, self.action_dim), dtype=np.float32)
        for number, observation in enumerate(observations):
            check_observation(observation, number, self.cameras, self.state_dim)
        frames_BTCHW = self.plan(observations)
        pairs = torch.stack([frames_BTCHW[:, :-1], frames_BTCHW[:, 1:]], dim=2)
        actions = self.inverse.predict(rearrange(pairs, "b f t c h w -> (b f) t c h w"))
        return rearrange(actions, "(b f) k a -> b (f k) a", b=len(observations))

    def plan(self, observations: Sequence[Observation]) -> torch.Tensor:
        """What is seen and the frames that should follow: uint8 [B, 1 + F, 3, H, W]."""
        size, camera = self.video.config.image_size, self.cameras[0]
        seen_BHWC = np.concatenate([resize_and_crop(np.asarray(o.images[camera])[None], size) for o in observations])
        seen_BCHW = torch.from_numpy(rearrange(seen_BHWC, "b h w c -> b c h w").copy()).to(self.device)
        future_BFCHW = self.video.sample(
            seen_BCHW,
            [observation.instruction for observation in observations],
            steps=self.acting.sampling_steps,
            guidance=self.acting.guidance,
            seed=self.acting.seed,
        )
        return torch.cat([seen_BCHW[:, None], future_BFCHW], dim=1)


def _require_unchanged(folder: Path, acting: Acting) -> None:
    now = {VIDEO: video_fingerprint(folder / VIDEO), INVERSE: inverse_fingerprint(folder / INVERSE)}
    then = {VIDEO: acting.video_fingerprint, INVERSE: acting.inverse_fingerprint}
    for name, joined in then.items():
        if now[name] != joined:
            raise UserError(
                f"{folder / name}: changed since it was joined (its fingerprint is {now[name]}, {CONFIG} says "
                f"{joined}); join the two models again with `lapa baseline unipi`"
            )
