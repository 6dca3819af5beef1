"""Labels as the files that LARYBench's code reads, so that it can score a latent action model of this project.

    lapa label --lary --lam LAM --data DATASET     # LABELS/lary: latent_actions.csv, an .npz and an .npy for each pair

https://github.com/meituan-longcat/LARYBench (commit 2092d20): each row of a CSV names `la_path`, an .npz with `tokens`
(the latent before quantisation) and `indices` (its codes), and `action`, an .npy with the chunk of actions. As there,
pairs begin at multiples of the horizon. Every file is written whole and the CSV last; files that are there are kept.
Paths are absolute: of a relative one its code keeps the last part, and looks for it below folders of its own layout.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lapa.console import say
from lapa.data.labels import Labels
from lapa.errors import UserError
from lapa.files import atomic_path
from lapa.labelling.shards import Plan

FOLDER, TABLE = "lary", "latent_actions.csv"


def require_actions(plan: Plan) -> None:
    """Raises UserError where the dataset has no actions, without which LARYBench's regression cannot run."""
    if plan.dataset.action_dim is None:
        raise UserError(f"{plan.dataset.root}: has no actions, which --lary writes next to the latent actions")


def export(labels: Labels, plan: Plan) -> None:
    """Writes the files of finished labels that have embeddings, and then the table that lists them."""
    folder, rows = labels.folder.resolve() / FOLDER, list[dict[str, object]]()
    length, horizon = plan.model.config.latent_length, plan.horizon
    if (folder / TABLE).exists():
        return
    for episode in range(len(plan.dataset)):
        frames_T, codes_TL = labels.codes(episode)
        chosen_T = np.flatnonzero(frames_T % horizon == 0)
        if not len(chosen_T):
            continue
        tokens_TLD = labels.embeddings(episode).reshape(len(frames_T), length, -1)
        actions_TA = plan.dataset.actions(episode)
        for row in chosen_T:
            first = int(frames_T[row])
            name = f"episode_{episode:06d}/{{}}_{first:06d}to{first + horizon - 1:06d}"
            latent = folder / f"{name.format('latent_action')}.npz"
            action = folder / f"{name.format('action')}.npy"
            if not latent.exists():
                latent.parent.mkdir(parents=True, exist_ok=True)
                _write(latent, {"tokens": tokens_TLD[row], "indices": codes_TL[row]})
            if not action.exists():
                _write(action, actions_TA[first : first + horizon])
            rows.append({
                "dataset": plan.dataset.name, "episode": episode, "frame": first,
                "instruction": plan.dataset.instruction(episode), "la_path": latent, "action": action,
            })  # fmt: skip
    _write_table(folder / TABLE, rows)
    say(f"{len(rows)} pairs of {horizon} frames for LARYBench, listed in {folder / TABLE}")


def _write(path: Path, arrays: np.ndarray | dict[str, np.ndarray]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if isinstance(arrays, dict):
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        else:
            np.save(file, arrays)


def _write_table(path: Path, rows: Sequence[dict[str, object]]) -> None:
    if not rows:
        raise UserError(f"{path.parent}: no pair with a label begins at a multiple of the horizon; lower --min-motion")
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), newline="")
