"""UniPi (https://arxiv.org/abs/2302.00111): a policy that plans in images and infers its actions from the plan.

A video model predicts the next frames from the current one and the instruction; an inverse dynamics model predicts the
actions that lead from each frame to the next. The one learns from videos without actions, the other from few episodes.
UniPi plans a whole trajectory and follows it open-loop; a plan here is F frames, one horizon apart, and a new one is
made when it has been followed.

    lapa baseline unipi --video VIDEO --inverse INVERSE --out POLICY
    lapa evaluate POLICY --env metaworld --tasks mt10 --out RESULTS

POLICY holds copies of both in video/ and inverse/, and in config.json how they are sampled.
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
from lapa.baselines.config import UniPiConfig
from lapa.baselines.inverse import InverseDynamics, inverse_fingerprint
from lapa.baselines.video_model import CONFIG, HORIZON_TOLERANCE, NOISE_LEVELS, TOKENIZER, WEIGHTS, VideoModel
from lapa.checksums import verify, write_marker
from lapa.console import finish, warn
from lapa.data.dataset import ActionSpace
from lapa.data.transforms import resize_and_crop
from lapa.engine.distributed import pick_device
from lapa.errors import UserError, shown
from lapa.files import claim_output, fingerprint, read_json
from lapa.locks import LOCK, locks_output
from lapa.policy.runtime import Actor
from lapa.types import Observation

VIDEO, INVERSE = "video", "inverse"
# Beyond it a plan is noise: differences of two predictions are multiplied by it.
MOST_GUIDANCE = 100.0


@dataclass(frozen=True)
class Acting:
    """Content of a joined policy's config.json. seed: of the noise that every plan starts from."""

    sampling_steps: int
    guidance: float
    seed: int
    video_fingerprint: str
    inverse_fingerprint: str
    kind: str = "unipi"

    def __post_init__(self) -> None:
        if not 1 <= self.sampling_steps <= NOISE_LEVELS:
            raise UserError(f"--sampling-steps must be from 1 to {NOISE_LEVELS}, got {self.sampling_steps}")
        if not abs(self.guidance) <= MOST_GUIDANCE:
            raise UserError(f"--guidance must be from {-MOST_GUIDANCE:g} to {MOST_GUIDANCE:g}, got {self.guidance}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must be from 0 to 2^63 - 1, got {shown(self.seed)}")


@locks_output
def run(config: UniPiConfig) -> None:
    """`lapa baseline unipi`. Raises UserError where the two models do not fit together."""
    acting = Acting(config.sampling_steps, config.guidance, 0, "", "")
    video, inverse = VideoModel.from_pretrained(config.video), InverseDynamics.from_pretrained(config.inverse)
    require_fit(video, inverse, config.video, config.inverse)
    for source in (config.video, config.inverse):
        if source.resolve() in config.out.resolve().parents:
            raise UserError(f"--out {config.out}: lies in {source}, which is copied into it; choose another folder")
    learned_from, camera = read_json(config.video / CONFIG)["camera"], inverse.recording.camera
    if learned_from != camera:
        warn(f"the video model learned from the camera {learned_from}; the policy takes {camera}, as {config.inverse}")
    claim_output(
        config.out,
        complete=(config.out / CONFIG).exists(),
        overwrite=config.overwrite,
        resumable=False,
        inputs=[config.video, config.inverse],
    )
    for source, name in ((config.video, VIDEO), (config.inverse, INVERSE)):
        shutil.copytree(source, config.out / name, ignore=shutil.ignore_patterns("training", "*.png", LOCK))
    write_marker(config.out, CONFIG, {**configs.to_dict(acting), **fingerprints(config.out)}, ())
    finish("policy", config.out, [f"lapa evaluate {shlex.quote(str(config.out))} --env ENVIRONMENT --out RESULTS"])


def fingerprints(folder: Path) -> dict[str, str]:
    """Identifies the two models of a joined policy by what they need to act (16 hex digits each)."""
    video = fingerprint(*(folder / VIDEO / name for name in (WEIGHTS, CONFIG, f"{TOKENIZER}/tokenizer.json")))
    return {f"{VIDEO}_fingerprint": video, f"{INVERSE}_fingerprint": inverse_fingerprint(folder / INVERSE)}


def require_fit(video: VideoModel, inverse: InverseDynamics, video_name: object, inverse_name: object) -> None:
    """Raises UserError where the horizons or the image sizes of the two models differ."""
    ahead, between = video.config.horizon_seconds, inverse.horizon_frames / inverse.recording.fps
    if abs(ahead - between) > HORIZON_TOLERANCE * between:
        raise UserError(
            f"{video_name}: its frames are {ahead:.3g} s apart, those of {inverse_name} {between:.3g} s "
            f"({inverse.horizon_frames} frames at {inverse.recording.fps:g} fps); train one of them again with the "
            "other's --horizon-seconds"
        )
    if video.config.image_size != inverse.config.image_size:
        raise UserError(
            f"{video_name}: predicts images of {video.config.image_size} px, {inverse_name} takes "
            f"{inverse.config.image_size} px; train one of them again with the other's --image-size"
        )


class UniPi(Actor):
    """The joined policy. It takes no state."""

    def __init__(self, video: VideoModel, inverse: InverseDynamics, acting: Acting, device: torch.device) -> None:
        super().__init__()
        self.video, self.inverse, self.acting = video.to(device).eval(), inverse.to(device).eval(), acting
        self.device = device

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "auto") -> UniPi:
        """Loads a joined policy. Raises UserError where a part is missing, was changed, or does not fit the other."""
        folder = Path(folder)
        acting = configs.load(Acting, folder / CONFIG)
        verify(folder, "join the two models again with `lapa baseline unipi`")
        video, inverse = VideoModel.from_pretrained(folder / VIDEO), InverseDynamics.from_pretrained(folder / INVERSE)
        for name, now in fingerprints(folder).items():
            if now != (joined := getattr(acting, name)):
                raise UserError(
                    f"{folder / name.removesuffix('_fingerprint')}: changed since it was joined (its fingerprint is "
                    f"{now}, in {CONFIG} it is {joined}); join the two models again with `lapa baseline unipi`"
                )
        require_fit(video, inverse, folder / VIDEO, folder / INVERSE)
        return cls(video, inverse, acting, pick_device(device))

    @property
    def cameras(self) -> tuple[str, ...]:
        """The camera that the inverse dynamics model learned from."""
        return (self.inverse.recording.camera,)

    @property
    def chunk(self) -> int:
        return self.video.config.num_frames * self.inverse.horizon_frames

    @property
    def action_space(self) -> ActionSpace:
        return self.inverse.recording.action_space

    @property
    def fps(self) -> float:
        return self.inverse.recording.fps

    def act(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K A"]:
        """Deterministic; the actions for an observation do not depend on the others, up to rounding."""
        frames_BTCHW = self.plan(observations)
        pairs = torch.stack([frames_BTCHW[:, :-1], frames_BTCHW[:, 1:]], dim=2)
        actions = self.inverse.predict(rearrange(pairs, "b f t c h w -> (b f) t c h w"))
        return rearrange(actions, "(b f) k a -> b (f k) a", b=len(observations))

    def plan(self, observations: Sequence[Observation]) -> torch.Tensor:
        """Returns the current frames and the predicted ones after them: uint8 [B, 1 + F, 3, H, W]."""
        size, camera = self.video.config.image_size, self.cameras[0]
        seen_BHWC = np.concatenate([resize_and_crop(o.images[camera][None], size) for o in observations])
        seen_BCHW = torch.from_numpy(rearrange(seen_BHWC, "b h w c -> b c h w").copy()).to(self.device)
        future_BFCHW = self.video.sample(
            seen_BCHW,
            [observation.instruction for observation in observations],
            steps=self.acting.sampling_steps,
            guidance=self.acting.guidance,
            seed=self.acting.seed,
        )
        return torch.cat([seen_BCHW[:, None], future_BFCHW], dim=1)
