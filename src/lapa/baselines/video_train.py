"""Trains the video model of the baseline UniPi (https://arxiv.org/abs/2302.00111) on videos without actions.

    lapa baseline video --data VIDEOS --out VIDEO
    lapa baseline video --data ROBOT_DATASET --start VIDEO --out FINETUNED

Axes: B batch, T=1+F frames (the current one and the F that follow), C channel, H W image.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from lapa import config as configs
from lapa.baselines.config import VideoTrainConfig
from lapa.baselines.video_model import CONFIG, HORIZON_TOLERANCE, VideoModel, require_diffusers
from lapa.console import finish, is_main_process, print_results, say, warn
from lapa.data.dataset import Dataset
from lapa.data.pairs import horizon_frames
from lapa.data.sampling import FrameStore, any_held_out, choose_cameras, parse_key, require_plain, split_items
from lapa.data.spec import open_dataset
from lapa.drawing import Row, grid
from lapa.engine.checkpoint import already_trained, seed_everything
from lapa.engine.loop import train
from lapa.engine.memory import built
from lapa.engine.metrics import read_figures, versions_and_hardware
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output, write_json
from lapa.locks import locks_output
from lapa.policy.backbones.tiny import train_tokenizer
from lapa.store_cache import use_store_cache
from lapa.types import TrainingDataset

METRICS = "metrics.json"
INITIALISATION_SAMPLES = 256
# Samples of the validation split: for the loss, for errors of predicted frames, and for the image of samples.
EVALUATION_SAMPLES, PREDICTED_SAMPLES, DRAWN_SAMPLES = 256, 32, 8
EVALUATION_BATCH = 32


@locks_output
def run(config: VideoTrainConfig) -> None:
    """`lapa baseline video`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    complete = (config.out / CONFIG).exists()
    require_diffusers()
    use_store_cache(config.loop.store_cache, config.loop.store_cache_gib)
    datasets = [open_dataset(path) for path in config.data]
    require_plain(datasets, "lapa baseline video", "--horizon-seconds")
    seed_everything(config.loop.seed)
    model = _starting_model(config, datasets)
    config = replace(config, model=model.config)
    run_config = {**configs.to_dict(config), "dataset_fingerprints": [dataset.fingerprint for dataset in datasets]}
    if config.resume and complete and already_trained(config.out / CONFIG, run_config):
        _conclude(config, _read_errors(config.out / METRICS), "video model, already complete")
        return
    training = FutureFrames(datasets, config, "train")
    held_out = _held_out(config, datasets, training)
    drawn = _spread(held_out, DRAWN_SAMPLES)
    if is_main_process():
        claim_output(
            config.out,
            complete=complete,
            overwrite=config.overwrite,
            resume=config.resume,
            inputs=[*(dataset.root for dataset in datasets), *([config.start] if config.start else [])],
        )

    def prepare(model: nn.Module) -> None:
        assert isinstance(model, VideoModel)
        # A model that goes on keeps its scale.
        if config.start is None:
            first = collated(model, _spread(training, INITIALISATION_SAMPLES))
            model.standardise(first["frames_BTCHW"].to(model.scale_F.device))

    result = train(
        model,
        training,
        lambda items: collated(model, items),
        config.loop,
        config.out,
        run_config=run_config,
        description="video model",
        resume=config.resume,
        prepare=prepare,
        evaluate=prediction_figures(_spread(held_out, EVALUATION_SAMPLES), held_out.split),
        draw=lambda model: {"samples": samples_sheet(model, drawn)},
        summary=summary,
    )
    if result.finished and is_main_process():
        write_json(config.out / METRICS, {**result.metrics, **versions_and_hardware()})
        with atomic_path(config.out / "samples.png") as temporary:
            samples_sheet(model, drawn).save(temporary)
        model.save_pretrained(config.out, run_config, camera=training.camera)
        _conclude(config, result.metrics, "video model")


class FutureFrames(TrainingDataset):
    """Every frame of the datasets with the F that follow, each a horizon after the last.

    Past an episode's end its last frame repeats: the goal follows the goal, and so the model plans to it.
    Keys are an index or a draw `(index, number)`. split: 'train' or 'held_out', by episode, from the seed.
    in_memory: whether the frames are in memory, where DataLoader workers are of no use.
    """

    def __init__(self, datasets: Sequence[Dataset], config: VideoTrainConfig, split: str):
        self.datasets, self.split, self.num_frames = tuple(datasets), split, config.model.num_frames
        self.horizon_frames = tuple(horizon_frames(config.model.horizon_seconds, dataset.fps) for dataset in datasets)
        self._index = split_items(
            datasets,
            lambda number, episodes: datasets[number].lengths[episodes],
            split=split,
            held_out=config.held_out,
            seed=config.loop.seed,
        )
        self._cameras = choose_cameras(datasets, None if config.camera is None else [config.camera])
        self.camera = self._cameras[0][0]
        episodes = [self._index.of_dataset(number) for number in range(len(datasets))]
        self._frames = FrameStore(datasets, self._cameras, episodes, config.model.image_size, config.cache_gib)
        self.in_memory, self.remote = self._frames.in_memory, self._frames.remote

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key: int | Sequence[int]) -> dict[str, Any]:
        """{"frames_TCHW": uint8 [1 + F, 3, size, size], "instruction", "index"}."""
        index, _ = parse_key(key)
        number, episode, frame = self._index.locate(index)
        dataset = self.datasets[number]
        wanted_T = frame + self.horizon_frames[number] * np.arange(1 + self.num_frames)
        wanted_T = np.minimum(wanted_T, dataset.lengths[episode] - 1)
        frames_THWC = self._frames.get(number, self._cameras[number][0], episode, wanted_T.tolist())
        return {
            "frames_TCHW": np.ascontiguousarray(rearrange(frames_THWC, "t h w c -> t c h w")),
            "instruction": dataset.episodes[episode].instruction,
            "index": index,
        }

    def describe(self, index: int) -> str:
        """The origin of a sample, for messages."""
        number, episode, frame = self._index.locate(index)
        return f"dataset {self.datasets[number].name}, episode {episode}, frame {frame}"


def collated(model: VideoModel, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Items of FutureFrames as the model's batch."""
    frames_BTCHW = torch.from_numpy(np.stack([item["frames_TCHW"] for item in items]))
    index_B = torch.tensor([item["index"] for item in items], dtype=torch.int64)
    return {"frames_BTCHW": frames_BTCHW, "index": index_B, **model.words([item["instruction"] for item in items])}


def prediction_figures(items: Sequence[dict[str, Any]], split: str) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation: the loss, and the error of some predicted frames compared with those of simpler guesses.

    The loss is always under the same noise. Errors are mean squared, of pixels in [0, 1]: of the predicted frames, of
    copies of the current frame, and of frames predicted under another sample's instruction.
    Names begin with the split: held_out_mse, or train_mse where nothing is held out.
    """
    some = [items[place] for place in _places(len(items), PREDICTED_SAMPLES)]
    frames_BTCHW = torch.from_numpy(np.stack([item["frames_TCHW"] for item in some]))
    instructions = [item["instruction"] for item in some]
    others = _other_instructions(instructions)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, VideoModel)
        total, device = 0.0, model.scale_F.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for first in range(0, len(items), EVALUATION_BATCH):
                group = items[first : first + EVALUATION_BATCH]
                batch = {name: value.to(device) for name, value in collated(model, group).items()}
                total += float(model(batch).loss) * len(group)
        figures = {
            "loss": total / len(items),
            "mse": _error(model.sample(frames_BTCHW[:, 0], instructions), frames_BTCHW),
            "mse_copy": _error(frames_BTCHW[:, :1], frames_BTCHW),
        }
        if others is not None:
            figures["mse_other_instruction"] = _error(model.sample(frames_BTCHW[:, 0], others), frames_BTCHW)
        return {f"{split}_{name}": value for name, value in figures.items()}

    return evaluate


def samples_sheet(model: nn.Module, items: Sequence[dict[str, Any]]) -> Image.Image:
    """Draws a row for each sample under its instruction: the current frame, the predicted ones, the true ones."""
    frames_BTCHW = torch.from_numpy(np.stack([item["frames_TCHW"] for item in items]))
    assert isinstance(model, VideoModel)
    predicted_BFCHW = model.sample(frames_BTCHW[:, 0], [item["instruction"] for item in items]).cpu()
    seconds = [number * model.config.horizon_seconds for number in range(1, model.config.num_frames + 1)]
    captions = [
        "frame",
        *(f"predicted, after {each:.3g} s" for each in seconds),
        *(f"true, {each:.3g} s" for each in seconds),
    ]
    rows = []
    for item, true_TCHW, predicted_FCHW in zip(items, frames_BTCHW, predicted_BFCHW, strict=True):
        cells_NCHW = torch.cat([true_TCHW[:1], predicted_FCHW, true_TCHW[1:]])
        rows.append(Row(item["instruction"], list(rearrange(cells_NCHW, "n c h w -> n h w c").numpy()), captions))
    return grid(rows, "Predicted and true frames")


def _starting_model(config: VideoTrainConfig, datasets: Sequence[Dataset]) -> VideoModel:
    """A new model, its horizon in whole frames of the datasets, or the one to go on from."""
    if config.start is None:
        horizon = _common_horizon(datasets, config.model.horizon_seconds)
        instructions = [episode.instruction for dataset in datasets for episode in dataset.episodes]
        tokenizer = train_tokenizer(instructions)
        return built(lambda: VideoModel(replace(config.model, horizon_seconds=horizon), tokenizer))
    model = VideoModel.from_pretrained(config.start)
    horizon, own = _common_horizon(datasets, model.config.horizon_seconds), model.config.horizon_seconds
    if abs(horizon - own) > HORIZON_TOLERANCE * own:
        raise UserError(
            f"{datasets[0].root}: at {datasets[0].fps:g} fps its frames are {horizon:.3g} s apart where the video "
            f"model {config.start} predicts {own:.3g} s ahead; give videos of a higher frame rate"
        )
    say(f"going on from {config.start}: its sizes and its horizon of {own:.3g} s")
    return model


def _common_horizon(datasets: Sequence[Dataset], seconds: float) -> float:
    """The horizon in whole frames of the datasets, in seconds. Raises UserError where their rates disagree on it."""
    rounded = {dataset.name: horizon_frames(seconds, dataset.fps) / dataset.fps for dataset in datasets}
    if max(rounded.values()) - min(rounded.values()) > HORIZON_TOLERANCE * seconds:
        found = ", ".join(f"{name} {value:.3g} s" for name, value in rounded.items())
        raise UserError(
            f"a horizon of {seconds:g} s in whole frames is {found}; give one with --horizon-seconds that fits all"
        )
    return next(iter(rounded.values()))


def _held_out(config: VideoTrainConfig, datasets: Sequence[Dataset], training: FutureFrames) -> FutureFrames:
    """The validation split or, where there is none, the training split, which is decoded already."""
    if any_held_out(datasets, config.held_out):
        return FutureFrames(datasets, config, "held_out")
    warn("no episode is held out: evaluating on the training episodes instead")
    return training


def _conclude(config: VideoTrainConfig, metrics: Mapping[str, Any], name: str) -> None:
    """Reports the errors of predicted frames, and warns where copies of the current frame are better."""
    print_results(metrics, summary(metrics), as_json=config.json)
    split = _split_of(metrics)
    if metrics[f"{split}_mse"] >= metrics[f"{split}_mse_copy"]:
        warn("predicted frames are worse than copies of the current one; train for longer")
    out = shlex.quote(str(config.out))
    finish(name, config.out, [f"lapa baseline unipi --video {out} --inverse INVERSE --out POLICY"])


def summary(figures: Mapping[str, Any]) -> str:
    """The errors of predicted frames as a line."""
    split = _split_of(figures)
    error, copy = figures[f"{split}_mse"], figures[f"{split}_mse_copy"]
    whose = "validation split" if split == "held_out" else "training episodes"
    return f"{whose}: error {error:.5f}, copying the current frame {copy:.5f}"


def _read_errors(path: Path) -> dict[str, Any]:
    """The figures of a finished training. Raises UserError naming the file where its errors are damaged or missing."""
    figures = read_figures(path, "held_out_", "train_")
    split = _split_of(figures)
    read_figures(path, **dict.fromkeys((f"{split}_mse", f"{split}_mse_copy"), float))
    return figures


def _split_of(figures: Mapping[str, Any]) -> str:
    """The split that was evaluated, from the names of its figures."""
    return "held_out" if "held_out_mse" in figures else "train"


def _places(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def _spread(samples: FutureFrames, most: int) -> list[dict[str, Any]]:
    """At most so many samples, spread evenly over the episodes."""
    return [samples[place] for place in _places(len(samples), most)]


def _other_instructions(words: Sequence[str]) -> list[str] | None:
    """For each instruction the next one that differs; None where all are the same."""
    if len(set(words)) == 1:
        return None
    count = len(words)
    return [next(w for w in (words[(n + k) % count] for k in range(count)) if w != words[n]) for n in range(count)]


def _error(predicted_BFCHW: Tensor, frames_BTCHW: Tensor) -> float:
    difference = predicted_BFCHW.cpu().float() - frames_BTCHW[:, 1:].float()
    return float((difference / 255).square().mean())
