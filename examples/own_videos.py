"""What happens between two frames of your own videos, from Python: a trained model's latent actions.

lapa data videos FOLDER --caption "what is done" --out DATASET
lapa latent train --data DATASET --out LAM
python examples/own_videos.py LAM DATASET
"""

from __future__ import annotations

import sys
from pathlib import Path

from lapa.data.pairs import horizon_frames
from lapa.data.spec import open_dataset
from lapa.latent.model import LatentActionModel


def main(lam: Path, data: Path) -> None:
    model, dataset = LatentActionModel.from_pretrained(lam), open_dataset(data)
    horizon = horizon_frames(model.horizon, dataset.fps)
    for episode in dataset.episodes:
        starts = range(0, episode.length - horizon, horizon)
        for start in starts:
            codes_BL = model.codes(dataset.frames(episode.index, [start, start + horizon]))
            print(f"episode {episode.index}, frames {start} to {start + horizon}: {codes_BL[0].tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
