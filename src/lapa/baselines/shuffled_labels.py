"""Labels with the codes of other frames: a control that shows what a policy learns from captions alone.

    lapa baseline shuffle-labels LABELS --out SHUFFLED
    lapa policy pretrain --data VIDEOS --labels SHUFFLED --out LATENT_POLICY

A policy that is pretrained on them sees the same images, instructions and codes, each code as often, but no code
describes the change after its image. The model's fingerprint, which labels and policies keep, gets `-shuffled`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lapa.baselines.config import ShuffleLabelsConfig
from lapa.console import finish
from lapa.data.labels import MANIFEST, EpisodeLabels, Labels, shard_path, write_manifest, write_shard
from lapa.errors import UserError
from lapa.files import claim_output
from lapa.locks import locks_output


@locks_output
def run(config: ShuffleLabelsConfig) -> None:
    """`lapa baseline shuffle-labels`. Raises UserError on bad input."""
    labels = Labels.open(config.labels)
    if not labels.manifest.num_rows:
        raise UserError(f"{config.labels}: has no labelled frame to shuffle")
    complete = (config.out / MANIFEST).exists()
    claim_output(config.out, complete=complete, overwrite=config.overwrite, inputs=[config.labels])
    episodes = {episode: labels.codes(episode) for episode in labels.episodes}
    codes_NL = np.concatenate([codes_TL for _, codes_TL in episodes.values()])
    np.random.default_rng(config.seed).shuffle(codes_NL)
    parts = np.split(codes_NL, np.cumsum([len(frames_T) for frames_T, _ in episodes.values()])[:-1])
    shuffled = {
        episode: EpisodeLabels(frames_T, codes_TL)
        for (episode, (frames_T, _)), codes_TL in zip(episodes.items(), parts, strict=True)
    }
    write_shard(shard_path(config.out, min(shuffled), max(shuffled)), shuffled)
    model = f"{labels.manifest.lam_fingerprint}-shuffled"
    write_manifest(config.out, replace(labels.manifest, embeddings=False, lam_fingerprint=model))
    finish(f"shuffled labels of {labels.manifest.num_rows} frames", config.out)
