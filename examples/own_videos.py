"""Prints the latent actions of your own videos: the codes between frames that are one horizon apart.

lapa data videos FOLDER --caption "what is done" --out DATASET
lapa latent train --data DATASET --out LAM
python examples/own_videos.py LAM DATASET
"""

from __future__ import annotations

import sys
from pathlib import Path

import lapa


def main(lam: Path, data: Path) -> None:
    model, dataset = lapa.LatentActionModel.from_pretrained(lam), lapa.open_dataset(data)
    # The model's horizon is in seconds.
    horizon = max(1, round(model.horizon * dataset.fps))
    for episode in dataset.episodes:
        starts = range(0, episode.length - horizon, horizon)
        for start in starts:
            codes_BL = model.codes(dataset.frames(episode.index, [start, start + horizon]))
            print(f"episode {episode.index}, frames {start} to {start + horizon}: {codes_BL[0].tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
