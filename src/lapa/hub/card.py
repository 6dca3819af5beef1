"""The card of an artifact on the hub, README.md: what it is, its data and figures, how to load it, its licence.

It is made from the artifact's own files: config.json, metrics.json, probe.json, measure.json, info.json, manifest.json
and results.json. A folder that has a README.md of its own keeps its text.
https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from lapa.errors import UserError
from lapa.hub.artifacts import CONFIG, INFO, MANIFEST, RESULTS, Artifact
from lapa.hub.download import HubId, as_hub_id

README = "README.md"
PAPER = "[Latent Action Pretraining](https://arxiv.org/abs/2410.11758) (LAPA)"
TAGS = ("lapa", "robotics", "latent-actions")
# In metrics.json: of the run and its machine, not of the validation split.
NOT_FIGURES = ("train_loss", "samples_per_s", "peak_memory_gib", "num_gpus", "cpu_threads")
# The data files of each kind of repository, which the hub's viewer shows.
VIEWED = {"dataset": "data/*/*.parquet", "labels": "episodes-*.parquet"}
MOST_ROWS = 60


def card_of(artifact: Artifact, hub_id: HubId, license: str | None) -> str:
    """The text of README.md. license: its id on the hub, None where it is not given.

    Raises UserError where an entry of the artifact's files has a value of another kind than it should.
    """
    try:
        return _card_of(artifact, hub_id, license)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{artifact.folder}: no card can be written, an entry of one of its JSON files is damaged ({why}); make or "
            "copy it again"
        ) from None


def _card_of(artifact: Artifact, hub_id: HubId, license: str | None) -> str:
    from huggingface_hub import RepoCard
    from huggingface_hub.repocard_data import CardData

    known, own = metadata(artifact, hub_id, license), artifact.folder / README
    if own.is_file():
        card = RepoCard(own.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        written = card.data.to_dict()
        known = {**known, **written, **{key: known[key] for key in ("license", "configs") if key in known}}
        text = card.text.strip()
    else:
        text = "\n\n".join([f"# {hub_id.repo.partition('/')[2]}", *SECTIONS[artifact.kind](artifact, hub_id)])
    return f"---\n{CardData(**known).to_yaml()}\n---\n\n{text}\n"


def metadata(artifact: Artifact, hub_id: HubId, license: str | None) -> dict[str, Any]:
    """The card's metadata, in the hub's names."""
    known: dict[str, Any] = {} if license is None else {"license": license}
    if artifact.kind in ("lam", "policy"):
        known |= {"library_name": "lapa", "pipeline_tag": "robotics", "tags": list(TAGS)}
        if (base := _base_model(artifact)) is not None:
            known["base_model"] = base
        if results := _model_index(artifact, hub_id):
            known["model-index"] = results
        return known
    tags = [*TAGS, *(["LeRobot"] if artifact.kind == "dataset" else [])]
    known |= {"tags": tags, "task_categories": ["robotics"]}
    if artifact.kind in VIEWED:
        known["configs"] = [{"config_name": "default", "data_files": VIEWED[artifact.kind]}]
    return known


def figures_of(values: Any, prefix: str = "") -> dict[str, float]:
    """The numbers in nested JSON by dotted name, without those of lists, of the options and of the machine."""
    found: dict[str, float] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and key != "config":
            found |= figures_of(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in NOT_FIGURES:
            found |= {name: value} if math.isfinite(value) else {}
    return found


def _lam(artifact: Artifact, hub_id: HubId) -> Iterator[str]:
    config = artifact.json(CONFIG)
    model = config.get("model", {})
    length, discrete = model.get("latent_length"), model.get("quantizer") != "continuous"
    what = f"codes out of {model.get('codebook_size')}" if discrete else f"vectors of {model.get('quant_dim')} numbers"
    yield (
        f"A latent action model of {PAPER}: from two images, {model.get('horizon_seconds')} seconds apart, to "
        f"{length} {what} that stand for the change."
    )
    yield _table(
        {
            "images": f"{model.get('image_size')} x {model.get('image_size')} px",
            "quantizer": model.get("quantizer"),
            "reads, predicts": f"{model.get('inputs')}, {model.get('targets')}",
            "vision tower": _last(model.get("vision_tower")),
        }
    )
    datasets = config.get("datasets")
    yield from _data([str(each.get("name")) for each in datasets.values()] if isinstance(datasets, dict) else [])
    yield from _figures(artifact, "probe_", "`lapa latent probe` on")
    lines = (
        f'lam = lapa.LatentActionModel.from_pretrained("{hub_id}")',
        "codes_BL = lam.codes(pairs)  # pairs of images: PIL, NumPy or torch",
    )
    command = f"lapa label --lam {hub_id}" if discrete else f"lapa latent probe {hub_id}"
    yield _usage(*(lines if discrete else ()), command=f"{command} --data DATASET")
    yield from _made_by(artifact)


def _policy(artifact: Artifact, hub_id: HubId) -> Iterator[str]:
    written = artifact.json(CONFIG)
    config, run = written.get("policy", {}), written.get("run", {})
    spaces = [each for each in config.get("spaces", []) if isinstance(each, dict)]
    acts = bool(config.get("chunk")) or written.get("kind") == "unipi"
    what = "from images and an instruction to robot actions" if acts else "pretrained on latent actions, to finetune"
    yield f"A policy of {PAPER}: {what}."
    space = spaces[0].get("space", {}) if spaces else config.get("action_space") or {}
    yield _table(
        {
            "cameras": ", ".join(config.get("cameras", [])),
            "backbone": config.get("backbone", {}).get("kind"),
            "latent actions": f"{config.get('latent_length')} codes" if config.get("latent_length") else None,
            "actions": ", ".join(space.get("names", [])),
            "control": space.get("control"),
            "rate": f"{spaces[0]['fps']:g} Hz" if spaces and spaces[0].get("fps") else None,
            "chunk, head": f"{config.get('chunk')} time steps, {config.get('head')}" if config.get("chunk") else None,
            "robot's state": f"{len(config['state_bins'])} numbers" if config.get("state_bins") else None,
            "statistics of": ", ".join(str(each.get("key")) for each in spaces),
        }
    )
    yield from _data([_last(name) for name in run.get("data", [])] if isinstance(run.get("data"), list) else [])
    yield from _figures(artifact, "measure_", "`lapa policy measure` on")
    if acts:
        key = f', statistics_key="{spaces[0].get("key")}"' if len(spaces) > 1 else ""
        camera = next(iter(config.get("cameras", [])), "front")
        state = ', "state": state' if config.get("state_bins") else ""
        yield _usage(
            f'policy = lapa.Policy.from_pretrained("{hub_id}"{key})',
            f'actions_KA = policy.infer({{"{camera}": image, "instruction": "open the drawer"{state}}})',
            command=f"lapa policy measure {hub_id} --data DATASET --out MEASURED",
        )
    else:
        yield _usage(command=f"lapa policy finetune --policy {hub_id} --data ROBOT_DATASET --out POLICY")
    yield from _made_by(artifact)


def _labels(artifact: Artifact, hub_id: HubId) -> Iterator[str]:
    manifest = artifact.json(MANIFEST)
    yield f"Latent action labels of {PAPER}: for each frame of a dataset, the codes of the change that follows it."
    yield _table(
        {
            "rows, episodes": f"{manifest.get('num_rows')}, {manifest.get('num_episodes')}",
            "codes": f"{manifest.get('latent_length')} out of {manifest.get('codebook_size')}",
            "horizon": f"{manifest.get('horizon_seconds')} s, {manifest.get('horizon_frames')} frames",
            "camera": manifest.get("camera"),
            "dataset (fingerprint)": manifest.get("dataset_fingerprint"),
            "latent action model (fingerprint)": manifest.get("lam_fingerprint"),
        }
    )
    yield _usage(
        f'labels = lapa.Labels.open("{hub_id}")',
        "frame_indices_T, codes_TL = labels.codes(0)  # of the first episode",
        command=f"lapa policy pretrain --data DATASET --labels {hub_id} --out LATENT_POLICY",
    )


def _dataset(artifact: Artifact, hub_id: HubId) -> Iterator[str]:
    info = artifact.json(INFO)
    features: dict[str, Any] = info.get("features", {})
    yield (
        f"Robot or human video as a LeRobotDataset {info.get('codebase_version')}, made with the code of {PAPER}"
        + ("." if "action" in features else "; it has no actions.")
    )
    yield _table(
        {
            "episodes": info.get("total_episodes"),
            "frames": info.get("total_frames"),
            "rate": f"{info.get('fps')} fps",
            "robot": info.get("robot_type"),
            "features": ", ".join(f"{name} {feature.get('shape')}" for name, feature in features.items()),
        }
    )
    yield _usage(
        f'dataset = lapa.open_dataset("{hub_id}")',
        "frames_THWC = dataset.frames(0)  # of the first episode",
        command=f"lapa latent train --data {hub_id} --out LAM",
    )


def _results(artifact: Artifact, hub_id: HubId) -> Iterator[str]:
    report = artifact.json(RESULTS)
    yield f"Rollouts of the policy {_last(report.get('policy'))} in {report.get('env')}, seed {report.get('seed')}."
    tasks = {**report.get("tasks", {}), "all": report.get("overall", {})}
    lines = ["| task | success | rate (95% interval) |", "|---|---|---|"]
    for task, row in tasks.items():
        low, high = row.get("interval") or (0.0, 1.0)
        share = row.get("success_rate")
        rate = "-" if share is None else f"{share:.0%} ({low:.0%} to {high:.0%})"
        lines.append(f"| {_cell(task)} | {row.get('successes')} of {row.get('episodes')} | {rate} |")
    yield "\n".join(lines)
    yield f"## Use\n\n```bash\nhf download {hub_id.repo} --repo-type dataset --local-dir RESULTS\n```"


SECTIONS = {"lam": _lam, "policy": _policy, "labels": _labels, "dataset": _dataset, "results": _results}


def _data(names: list[str]) -> Iterator[str]:
    if names:
        yield "## Data\n\n" + "\n".join(f"- {_cell(name)}" for name in names)


def _figures(artifact: Artifact, prefix: str, measured: str) -> Iterator[str]:
    """The figures of the training, then those of each folder of measurements, such as `probe_DATASET`."""
    if figures := figures_of(artifact.json("metrics.json")):
        yield f"## Figures\n\nOn the {_measured_on(figures)}:\n\n{_table(figures)}"
    for name in artifact.files:
        folder, _, file = name.partition("/")
        if folder.startswith(prefix) and file.endswith(".json"):
            figures = figures_of(artifact.json(name))
            yield f"{measured} {folder.removeprefix(prefix)}:\n\n{_table(dict(list(figures.items())[:MOST_ROWS]))}"


def _usage(*lines: str, command: str) -> str:
    python = ["```python", "import lapa", "", *lines, "```", ""] if lines else []
    return "\n".join(["## Use", "", "`pip install lapa-vla`, then", "", *python, "```bash", command, "```"])


def _made_by(artifact: Artifact) -> Iterator[str]:
    metrics = artifact.json("metrics.json")
    versions = [f"{name} {metrics[name]}" for name in ("lapa", "torch") if name in metrics]
    if "command" in metrics:
        yield f"## Training\n\n```bash\n{metrics['command']}\n```\n\n{', '.join(versions)}".rstrip()


def _model_index(artifact: Artifact, hub_id: HubId) -> list[dict[str, Any]]:
    """Figures of the training in the form in which the hub shows them next to the card."""
    figures = figures_of(artifact.json("metrics.json"))
    if not figures:
        return []
    metrics = [{"type": name, "value": value, "name": name} for name, value in figures.items()]
    data = {"name": _measured_on(figures), "type": "lapa"}
    result = {"task": {"type": "robotics"}, "dataset": data, "metrics": metrics}
    return [{"name": hub_id.repo.partition("/")[2], "results": [result]}]


def _measured_on(figures: Mapping[str, float]) -> str:
    kept = figures.get("num_held_out_episodes", 1)
    return (
        "validation split of the training data" if kept else "training episodes, of which none was kept for validation"
    )


def _base_model(artifact: Artifact) -> str | None:
    """The hub id of the model that a policy or a vision tower began with, as far as it has one."""
    config = artifact.json(CONFIG)
    backbone, tower = config.get("policy", {}).get("backbone", {}), config.get("model", {}).get("vision_tower")
    hub_id = as_hub_id(str(backbone.get("source") or tower or ""))
    return None if hub_id is None else hub_id.repo


def _table(rows: Mapping[str, Any]) -> str:
    """Rows of two columns; those without a value are left out."""
    lines = [
        f"| {_cell(name)} | {_cell(f'{value:.4g}' if isinstance(value, float) else value)} |"
        for name, value in rows.items()
        if value not in (None, "")
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _last(path: Any) -> str:
    """The last name of a path, or an id as it is."""
    text = "" if path is None else str(path)
    return PurePosixPath(text).name if text.count("/") > 1 else text
