"""Several datasets learned from together: how often each is drawn.

    lapa latent train --data bridge=data/bridge:1.0 --data rt1=data/rt1:0.5 --out LAM --mix-by frames

A dataset's share of the draws is, by `--mix-by`,

frames    its weight x its items (pairs or steps): with equal weights each frame is seen as often as any other
episodes  its weight x its episodes
equal     its weight alone

The order is a function of the seed and the number of the draw (lapa.engine.batches). Equal weights by frames need no
mixing: all items are one pool, in one permutation an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from lapa.console import console, warn
from lapa.data.dataset import Dataset
from lapa.errors import UserError

MixBy = Literal["frames", "episodes", "equal"]


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture, as far as it is trained on. amount: what its share is in proportion to."""

    name: str
    num_items: int
    num_episodes: int
    weight: float
    amount: float


@dataclass(frozen=True)
class Mixture:
    """What is drawn from which dataset."""

    parts: tuple[Part, ...]
    one_pool: bool
    """Whether each item is drawn as often as any other."""

    @classmethod
    def of(
        cls, datasets: Sequence[Dataset], num_items: Sequence[int], num_episodes: Sequence[int], by: MixBy
    ) -> Mixture:
        """num_items, num_episodes: those of each dataset that are trained on. Datasets without any are not drawn."""
        parts = []
        for dataset, items, episodes in zip(datasets, num_items, num_episodes, strict=True):
            counted = {"frames": items, "episodes": episodes, "equal": 1}[by]
            parts.append(Part(dataset.name, items, episodes, dataset.weight, dataset.weight * counted * (items > 0)))
        drawn = [part for part in parts if part.num_items]
        alike = by == "frames" and len({part.weight for part in drawn}) <= 1
        return cls(tuple(parts), alike or len(drawn) <= 1)

    @property
    def groups(self) -> tuple[tuple[int, float], ...] | None:
        """(items, weight) of each dataset as `lapa.engine.batches.StepSampler` takes them; None for one pool."""
        return None if self.one_pool else tuple((part.num_items, part.amount) for part in self.parts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each dataset's share of the draws; together 1."""
        total = sum(part.amount for part in self.parts)
        return tuple(part.amount / total for part in self.parts)

    def tell(self, num_draws: int) -> None:
        """Prints the shares, where there are several datasets, and how often `num_draws` draws see each."""
        if len(self.parts) < 2:
            return
        table = Table("dataset", title="mixture")
        for column in ("items", "episodes", "weight", "share", "epochs"):
            table.add_column(column, justify="right")
        for part, share in zip(self.parts, self.shares, strict=True):
            if not part.num_items:
                warn(f"{part.name}: nothing of it is trained on")
            epochs = f"{num_draws * share / part.num_items:.2f}" if part.num_items else "-"
            counts = (f"{part.num_items:,}", f"{part.num_episodes:,}", f"{part.weight:g}")
            table.add_row(part.name, *counts, f"{share:.1%}", epochs)
        console.print(table)


def require_plain(datasets: Sequence[Dataset], command: str, horizon_option: str) -> None:
    """UserError where a dataset has a weight or a horizon of its own, which `command` would not look at."""
    for dataset in datasets:
        if dataset.weight != 1:
            raise UserError(f"{dataset.root}: `{command}` draws all frames alike; leave out the weight")
        if dataset.horizon is not None:
            raise UserError(
                f"{dataset.root}: `{command}` has one horizon for all datasets; leave out `,horizon=`, and give it as "
                f"{horizon_option}"
            )


def require_names(datasets: Sequence[Dataset]) -> None:
    """UserError where two datasets have one name, or one has none."""
    names = [dataset.name for dataset in datasets]
    for dataset in datasets:
        if not dataset.name or names.count(dataset.name) > 1:
            found = f"has the name {dataset.name!r} of another one" if dataset.name else "has no name"
            raise UserError(
                f"{dataset.root}: {found}, and each has statistics of its own by its name; name them as in "
                f"--data NAME={dataset.root}"
            )
