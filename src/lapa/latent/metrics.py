"""Metrics of a latent action model: reconstruction, code usage, transfer, consistency in time, and true actions.

`lapa latent probe` and `lapa latent train` compute them; docs/metrics.md explains each one. All are measured on a
Sample that is encoded once, in the decoder's target space: pixels in [0, 1], or vision features. Regressions are fitted
and scored on different episodes, next to the scores of the mean action and of the bare pixels.

    sample = draw_sample(pairs, 4000, seed=0); codes_BL, errors = reconstruction_figures(model, sample)

Axes: B pairs, T time, C channel, H W image, L latent action length, D width, K codebook size, A action dimensions,
F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lapa.data.pairs import FramePairs, collate_pairs
from lapa.latent.model import LatentAction, LatentActionModel

BATCH = 64
RARE_CODE = 0.01
MOVING = 0.05  # change of any channel, in [0, 1], from which a pixel counts as moving
PIXEL_BASELINE_SIDE = 8
MAX_TASKS = 50
ACTION_BINS, PERMUTATIONS = 8, 20
HELD_OUT = 0.2
MLP_STEPS, MLP_PATIENCE, MLP_PENALTY = 500, 50, 10.0
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of ridge, on standardised features, as a share of the number of rows
LOGISTIC_PENALTY = 1e-3
NEVER_CHANGES = 1e-12  # variance below which a target counts as constant


@dataclass(frozen=True)
class Sample:
    """Pairs drawn from a dataset: frames uint8 [B, 2, C, H, W], their episodes and, if known, actions and tasks.

    actions_BA: the mean of the actions between the two frames, in the robot's own units. tasks_B: the instructions.
    middle_BCHW: the frame halfway between the two, uint8.
    """

    frames_BTCHW: Tensor
    episodes_B: np.ndarray
    actions_BA: np.ndarray | None = None
    middle_BCHW: Tensor | None = None
    tasks_B: np.ndarray | None = None

    def with_middle(self) -> Tensor:
        """The frames with that halfway between them, if it is there, uint8 [B, 2 or 3, C, H, W]."""
        if self.middle_BCHW is None:
            return self.frames_BTCHW
        return torch.stack([self.frames_BTCHW[:, 0], self.middle_BCHW, self.frames_BTCHW[:, 1]], dim=1)


def draw_sample(pairs: FramePairs, num: int, seed: int, *, actions: bool = False) -> Sample:
    """Up to `num` different pairs, drawn evenly. actions: with true action and instruction, if the dataset has them.

    Middle frames are included if the pairs have them (PairsConfig.middle).
    """
    return take_sample(pairs, drawn_pairs(pairs, num, seed), actions=actions)


def drawn_pairs(pairs: FramePairs, num: int, seed: int, episodes: Sequence[int] | None = None) -> list[int]:
    """Up to `num` different pairs, drawn evenly from these episodes of the only dataset, by default from all pairs."""
    order = map(int, np.random.default_rng(seed).permutation(len(pairs)))
    chosen = None if episodes is None else set(episodes)
    return list(islice((index for index in order if chosen is None or pairs.location(index)[1] in chosen), num))


def take_sample(pairs: FramePairs, indices: Sequence[int], *, actions: bool = False) -> Sample:
    """The pairs of these indices, in this order."""
    # In the order of the files, in which neighbours share an open video.
    in_order = sorted(enumerate(indices), key=lambda draw: draw[1])
    drawn = {number: pairs[(index, number)] for number, index in in_order}
    items = [drawn[number] for number in range(len(indices))]
    episodes_B = np.array([item["episode"] for item in items])
    frames_BTCHW = collate_pairs(items)["frames_BTCHW"]
    has_middle = "middle_CHW" in items[0]
    middle_BCHW = torch.from_numpy(np.stack([item["middle_CHW"] for item in items])) if has_middle else None
    if not actions:
        return Sample(frames_BTCHW, episodes_B, middle_BCHW=middle_BCHW)
    places = [pairs.location(index) for index in indices]
    tasks_B = np.array([pairs.datasets[number].episodes[episode].instruction for number, episode, _ in places])
    known = all(dataset.action_dim is not None for dataset in pairs.datasets)
    actions_BA = np.stack([pairs.actions_between(index).mean(axis=0) for index in indices]) if known else None
    return Sample(frames_BTCHW, episodes_B, actions_BA, middle_BCHW, tasks_B)


@torch.no_grad()
def encode(model: LatentActionModel, frames_BTCHW: Tensor) -> LatentAction:
    """The latent actions of many pairs, encoded in batches; on the CPU, in float32."""
    device = device_of(model)
    return _joined([model.encode(frames.to(device)) for frames in frames_BTCHW.split(BATCH)])


def other_episodes(episodes_B: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each pair the index of one of another episode; each pair is chosen once.

    If one episode holds more than half of the pairs, some get a partner of their own episode.
    """
    rng = np.random.default_rng(seed)
    _, group_B, sizes = np.unique(episodes_B, return_inverse=True, return_counts=True)
    shuffled_B = rng.permutation(len(sizes))[group_B]
    order = np.lexsort((rng.random(len(episodes_B)), shuffled_B))
    # Sorted by episode, a shift by the longest run leaves every run behind.
    partners_B = np.empty_like(order)
    partners_B[order] = np.roll(order, -min(int(sizes.max()), max(1, len(order) // 2)))
    return partners_B


def device_of(model: LatentActionModel) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def reconstruction_figures(
    model: LatentActionModel, sample: Sample, encoded: LatentAction | None = None
) -> tuple[Tensor | None, dict[str, float]]:
    """Codes [B, L] (None for a continuous model), and mean squared errors of the predicted second frame.

    mse: predicted from the pair's own latent action. mse_shuffled: from that of a pair of another episode. mse_copy:
    the first frame itself. mse_mean: the mean second frame. A model that ignores its codes has mse_shuffled = mse.
    moving_*: the same on moving pixels only, those that change by more than 0.05 in any channel (for features: patches
    that hold such a pixel); 0 if none does. moving_share: their share.
    Pixel predictions are clamped to [0, 1]; a model that predicts no pixels is measured on its target features.
    """
    device, encoded = device_of(model), encoded or encode(model, sample.frames_BTCHW)
    partners = torch.from_numpy(other_episodes(sample.episodes_B))
    totals: dict[str, float] = {}
    # Of all and of moving values: their number, sum and sum of squares, from which the mean frame's error follows.
    sums: list[Any] = [0.0, 0.0]
    num_moving, num_values = 0.0, 0
    for rows in torch.arange(len(partners)).split(BATCH):
        first, second = sample.frames_BTCHW[rows].to(device).unbind(1)
        target = model.target(second).float()
        moving = _moving(first, second, target)
        predictions = {
            "": _predict(model, first, encoded.quantized_BLD[rows].to(device)),
            "_shuffled": _predict(model, first, encoded.quantized_BLD[partners[rows]].to(device)),
            "_copy": model.target(first).float(),
        }
        for name, prediction in predictions.items():
            error = (prediction - target).square()
            totals[f"mse{name}"] = totals.get(f"mse{name}", 0.0) + error.sum().item()
            totals[f"moving_mse{name}"] = totals.get(f"moving_mse{name}", 0.0) + (error * moving).sum().item()
        powers = torch.stack([target.double() ** power for power in (0, 1, 2)])
        sums = [sums[0] + powers.sum(dim=1), sums[1] + (moving * powers).sum(dim=1)]
        num_moving += moving.expand_as(target).sum().item()
        num_values += target.numel()
    mean = sums[0][1] / sums[0][0]
    for name, (number, total, squares) in zip(("mse_mean", "moving_mse_mean"), sums, strict=True):
        totals[name] = float((squares - 2 * mean * total + mean.square() * number).sum())
    errors = {
        name: total / (max(num_moving, 1.0) if name.startswith("moving") else num_values)
        for name, total in totals.items()
    }
    return encoded.codes_BL, {**errors, "moving_share": num_moving / num_values}


def usage_figures(codes_BL: Tensor, codebook_size: int) -> dict[str, Any]:
    """How the codebook is used.

    codes_used: share of the K codes that some position uses in more than 1% of the pairs (with more than 10 codes, in
    more than a tenth of an even share). perplexity: exp of the entropy of a position's codes, mean over positions (K
    at best). joint_*: over whole latent actions.
    """
    counts_LK = torch.stack([torch.bincount(codes, minlength=codebook_size) for codes in codes_BL.T]).double()
    share_LK = counts_LK / counts_LK.sum(dim=1, keepdim=True)
    rare = min(RARE_CODE, 0.1 / codebook_size)
    _, joint = torch.unique(codes_BL, dim=0, return_counts=True)
    joint_share = joint.double() / joint.sum()
    return {
        "codes_used": float((share_LK.amax(dim=0) > rare).double().mean()),
        "perplexity": float(_perplexity(share_LK).mean()),
        "joint_codes_used": float(len(joint)),
        "joint_perplexity": float(_perplexity(joint_share)),
        "perplexity_per_position": _perplexity(share_LK).tolist(),
        "codes_used_per_position": (share_LK > rare).double().mean(dim=1).tolist(),
        "share_per_position": share_LK.tolist(),
    }


@torch.no_grad()
def transfer(model: LatentActionModel, sample: Sample, encoded: LatentAction) -> tuple[dict[str, Any], LatentAction]:
    """Each pair's latent action applied to the first frame of a pair of another episode, and encoded again.

    same_code: how often the same code returns, mean over positions; same_code_chance: how often it is that of a third
    pair; both also per position, and only for a model with codes. latent_error: squared distance of the returned
    quantised latent action to the one given, over its distance to that of a third pair (0: it returns; 1: chance).
    donor_share: where the result lies between the receiver's first frame (0) and the donor's second (1): squared
    distance to the former over the sum of both. Near 1, the latent action carries the frame and not the motion.
    Also returns the latent actions encoded again. The model must predict pixels.
    """
    device, num = device_of(model), len(sample.episodes_B)
    receivers = torch.from_numpy(other_episodes(sample.episodes_B, seed=1))
    third = torch.from_numpy(other_episodes(sample.episodes_B, seed=2))
    again, to_receiver, to_donor = [], 0.0, 0.0
    for rows in torch.arange(num).split(BATCH):
        first = sample.frames_BTCHW[receivers[rows], 0].to(device)
        result = (_predict(model, first, encoded.quantized_BLD[rows].to(device)) * 255).round().byte()
        again.append(encode(model, torch.stack([first, result], dim=1)))
        donor = sample.frames_BTCHW[rows, 1].to(device)
        to_receiver += F.mse_loss(result.float(), first.float()).item() * len(rows)
        to_donor += F.mse_loss(result.float(), donor.float()).item() * len(rows)
    returned = _joined(again)
    given = encoded.quantized_BLD
    figures: dict[str, Any] = {
        "donor_share": _ratio(to_receiver, to_receiver + to_donor),
        "latent_error": _ratio(
            (returned.quantized_BLD - given).square().sum(), (returned.quantized_BLD - given[third]).square().sum()
        ),
    }
    if returned.codes_BL is not None and encoded.codes_BL is not None:
        for name, codes_BL in (("same_code", encoded.codes_BL), ("same_code_chance", encoded.codes_BL[third])):
            same_L = (returned.codes_BL == codes_BL).double().mean(dim=0)
            figures |= {name: float(same_L.mean()), f"{name}_per_position": same_L.tolist()}
    return figures, returned


@torch.no_grad()
def consistency_figures(model: LatentActionModel, sample: Sample, encoded: LatentAction) -> dict[str, float | None]:
    """How the continuous latent action z behaves in time, for frames a and c, and b halfway between them.

    reversal_error: |z(a,c) + z(c,a)|^2 / |z(a,c)|^2, ratio of the means; 0 where going back is minus going there.
    reversal_cosine: cosine of z(a,c) and z(c,a), mean. offset_share: |mean z|^2 / mean |z|^2, the part of z that is
    the same for every pair. With middle frames also composition_error, |z(a,c) - z(a,b) - z(b,c)|^2 / |z(a,c)|^2, and
    s_pcfc (CoMo, https://arxiv.org/abs/2505.17006): cosine of z(a,b) and z(c,b), past and future to current.
    """
    whole, frames = encoded.z_BLD.flatten(1), sample.frames_BTCHW
    length = whole.square().sum()
    back = encode(model, frames.flip(1)).z_BLD.flatten(1)
    figures: dict[str, float | None] = {
        "reversal_error": _ratio((whole + back).square().sum(), length),
        "reversal_cosine": float(F.cosine_similarity(whole, back).mean()),
        "offset_share": _ratio(len(whole) * whole.mean(dim=0).square().sum(), length),
    }
    if sample.middle_BCHW is not None:
        middle = sample.middle_BCHW
        to_middle, from_middle, future = (
            encode(model, torch.stack(pair, dim=1)).z_BLD.flatten(1)
            for pair in ((frames[:, 0], middle), (middle, frames[:, 1]), (frames[:, 1], middle))
        )
        figures["composition_error"] = _ratio((whole - to_middle - from_middle).square().sum(), length)
        figures["s_pcfc"] = float(F.cosine_similarity(to_middle, future).mean())
    return figures


def regression_figures(
    targets_BA: np.ndarray, sample: Sample, encoded: LatentAction, codebook_size: int, seed: int = 0
) -> dict[str, Any]:
    """Linear (ridge) and MLP regressions to true actions or to the motion, scored on the test episodes; see `scores`.

    From the codes (one-hot), the quantised latent action and the continuous one. For comparison, from the difference
    of the two frames and from the first frame, both at 8x8 pixels (what the scene alone predicts), from the quantised
    latent actions of other episodes (shuffled), and from nothing (mean). lp_mse (CoMo,
    https://arxiv.org/abs/2505.17006): the linear probe's error from the continuous latent action, targets brought to
    unit variance.
    """
    targets_BA, episodes_B = targets_BA.astype(np.float64), sample.episodes_B
    test_B = hold_out(episodes_B, seed)
    features = features_of(sample, encoded, codebook_size)
    features["shuffled"] = features["quantized"][other_episodes(episodes_B, seed)]
    mean_BA = np.broadcast_to(targets_BA[~test_B].mean(0), targets_BA.shape)
    linear = {
        name: scores(ridge(values, targets_BA, test_B, episodes_B), targets_BA, test_B)
        for name, values in features.items()
    }
    nonlinear = {
        name: scores(mlp(values, targets_BA, test_B, episodes_B, seed), targets_BA, test_B)
        for name, values in features.items()
        if name != "codes"
    }
    return {
        "num_held_out_episodes": len(np.unique(episodes_B[test_B])),
        "lp_mse": linear["continuous"]["standardised_mse"],
        "mean": scores(mean_BA, targets_BA, test_B),
        "linear": linear,
        "mlp": nonlinear,
    }


def returned_action_r2(sample: Sample, encoded: LatentAction, returned: LatentAction, seed: int = 0) -> float | None:
    """R2 between the linear regression's predictions before and after a transfer, on the test episodes.

    returned: the latent actions encoded again, of `transfer`. 1: the same action; 0 or less: no better than the mean
    prediction. None if the regression predicts the same for every pair.
    """
    assert sample.actions_BA is not None
    test_B = hold_out(sample.episodes_B, seed)
    given_BF, returned_BF = (latent.quantized_BLD.flatten(1).double().numpy() for latent in (encoded, returned))
    probe = fit_ridge(given_BF[~test_B], sample.actions_BA[~test_B], sample.episodes_B[~test_B])
    before_BA = probe.predict(given_BF)
    # Without dimensions of near-constant predictions, which would divide by almost zero.
    predicted_A = before_BA[test_B].var(0) > 0.01 * sample.actions_BA[test_B].var(0)
    if not predicted_A.any():
        return None
    return float(scores(probe.predict(returned_BF)[:, predicted_A], before_BA[:, predicted_A], test_B)["r2"])


def information_figures(codes_BL: Tensor, actions_BA: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Mutual information of each code, and of the whole latent action, with each binned action dimension.

    Bins of equal frequency, 8 for each dimension; each entry is the result of `mutual_information`. known: mean
    over dimensions of the best position's share; known_joint: the same of whole latent actions.
    """
    codes_BL_numpy = codes_BL.numpy()
    _, joint_B = np.unique(codes_BL_numpy, axis=0, return_inverse=True)
    bins = [equal_frequency_bins(values_B, ACTION_BINS) for values_B in actions_BA.T]
    positions = [[mutual_information(codes_B, bins_B, seed=seed) for bins_B in bins] for codes_B in codes_BL_numpy.T]
    joint = [mutual_information(joint_B.reshape(-1), bins_B, seed=seed) for bins_B in bins]
    best = [_known([position[number]["known"] for position in positions], max) for number in range(len(bins))]
    return {
        "known": _known(best, np.mean),
        "known_joint": _known([entry["known"] for entry in joint], np.mean),
        "positions": positions,
        "joint": joint,
    }


def task_figures(sample: Sample, encoded: LatentAction, codebook_size: int, seed: int = 0) -> dict[str, Any] | None:
    """Accuracy of a logistic regression from the latent action to the instruction, on test episodes.

    A fifth of each instruction's episodes are test episodes. Instructions of a single episode are left out, and only
    the 50 with most pairs are classes; None if that leaves fewer than two. chance: the share of the most frequent one.
    first_frame: from the first frame at 8x8 pixels, what the scene alone predicts.
    """
    assert sample.tasks_B is not None
    tasks_B, episodes_B = sample.tasks_B, sample.episodes_B
    names, counts = np.unique(tasks_B[tasks_B != ""], return_counts=True)
    several = [
        name for name in names[np.argsort(-counts, kind="stable")] if len(np.unique(episodes_B[tasks_B == name])) > 1
    ][:MAX_TASKS]
    if len(several) < 2:
        return None
    kept_B, test_B = np.isin(tasks_B, several), np.zeros(len(tasks_B), bool)
    for name in several:
        test_B[tasks_B == name] = hold_out(episodes_B[tasks_B == name], seed)
    labels_B = np.searchsorted(names, tasks_B[kept_B])
    _, frequent = np.unique(labels_B[test_B[kept_B]], return_counts=True)
    accuracy = {
        name: linear_accuracy(values[kept_B], labels_B, test_B[kept_B])
        for name, values in features_of(sample, encoded, codebook_size).items()
    }
    return {"num_tasks": len(several), "chance": float(frequent.max() / frequent.sum()), **accuracy}


def features_of(sample: Sample, encoded: LatentAction, codebook_size: int) -> dict[str, np.ndarray]:
    """Inputs of the regressions, each [B, F]: the latent action in its forms, and pixels for comparison."""
    features = {
        "quantized": encoded.quantized_BLD,
        "continuous": encoded.z_BLD,
        "pixel_difference": _small(sample.frames_BTCHW[:, 1]) - _small(sample.frames_BTCHW[:, 0]),
        "first_frame": _small(sample.frames_BTCHW[:, 0]),
    }
    if encoded.codes_BL is not None:
        features = {"codes": F.one_hot(encoded.codes_BL, codebook_size), **features}
    return {name: rearrange(values, "b ... -> b (...)").double().numpy() for name, values in features.items()}


def hold_out(groups_B: np.ndarray, seed: int = 0) -> np.ndarray:
    """Marks the rows of a fifth of the groups (at least one group, at most all but one), bool [B]."""
    groups = np.random.default_rng(seed).permutation(np.unique(groups_B))
    return np.isin(groups_B, groups[: min(max(1, round(HELD_OUT * len(groups))), len(groups) - 1)])


def fit_ridge(features_BF: np.ndarray, targets_BA: np.ndarray, groups_B: np.ndarray | None = None) -> Any:
    """A fitted ridge regression on standardised features and targets; `.predict(features_BF)` returns [B, A].

    Its penalty is the best of PENALTIES on a part of the groups (by default of the rows), which keeps the comparison
    fair between narrow and wide representations.
    """
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    validation_B = hold_out(np.arange(len(features_BF)) if groups_B is None else groups_B)
    alphas = len(features_BF) * np.array(PENALTIES)
    if validation_B.any():
        split = (np.flatnonzero(~validation_B), np.flatnonzero(validation_B))
        regression = RidgeCV(alphas, cv=[split], scoring="neg_mean_squared_error")
    else:
        regression = Ridge(alphas[1])
    fit = make_pipeline(StandardScaler(), regression)
    fit = TransformedTargetRegressor(fit, transformer=StandardScaler(), check_inverse=False)
    return fit.fit(features_BF, targets_BA)


def ridge(
    features_BF: np.ndarray, targets_BA: np.ndarray, test_B: np.ndarray, groups_B: np.ndarray | None = None
) -> np.ndarray:
    """Predictions [B, A] of a ridge regression fitted on the rows that are not marked as test."""
    groups = None if groups_B is None else groups_B[~test_B]
    return fit_ridge(features_BF[~test_B], targets_BA[~test_B], groups).predict(features_BF)


def mlp(
    features_BF: np.ndarray, targets_BA: np.ndarray, test_B: np.ndarray, groups_B: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Predictions [B, A] of an MLP with two hidden layers of 128, fitted on the rows that are not marked as test.

    Full batches, features and targets standardised, stopped early on a part of the training groups (scikit-learn's own
    early stopping would split the rows of one episode). The same seed gives the same result.
    """
    from sklearn.neural_network import MLPRegressor
    from sklearn.preprocessing import StandardScaler

    train_B = ~test_B
    validation_B = train_B & np.isin(groups_B, groups_B[train_B][hold_out(groups_B[train_B], seed)])
    fitted_B = train_B & ~validation_B
    stopped_by_B = validation_B if validation_B.any() else fitted_B
    y_scale = StandardScaler().fit(targets_BA[train_B])
    x_BF, y_BA = StandardScaler().fit(features_BF[train_B]).transform(features_BF), y_scale.transform(targets_BA)
    network = MLPRegressor(
        hidden_layer_sizes=(128, 128),
        activation="tanh",
        alpha=MLP_PENALTY,
        batch_size=int(fitted_B.sum()),
        learning_rate_init=2e-3,
        random_state=seed,
    )
    best, best_step, predicted_BA = np.inf, 0, np.zeros_like(y_BA)
    for step in range(MLP_STEPS):
        network.partial_fit(x_BF[fitted_B], y_BA[fitted_B][:, 0] if y_BA.shape[1] == 1 else y_BA[fitted_B])
        error = np.square(network.predict(x_BF[stopped_by_B]).reshape(-1, y_BA.shape[1]) - y_BA[stopped_by_B]).mean()
        if error < best:
            best, best_step = error, step
            predicted_BA = network.predict(x_BF).reshape(y_BA.shape)
        if step - best_step >= MLP_PATIENCE:
            break
    return y_scale.inverse_transform(predicted_BA)


def scores(predicted_BA: np.ndarray, targets_BA: np.ndarray, test_B: np.ndarray) -> dict[str, Any]:
    """R2 and MSE on the test rows, per dimension and their mean; R2 is None for a constant target.

    R2 compares with the mean of the other rows: 0 is as good as that mean. standardised_mse: in units of the variance
    over the other rows, mean over the dimensions that change.
    """
    train_BA, test_BA = targets_BA[~test_B], targets_BA[test_B]
    r2_A = r2(predicted_BA[test_B], test_BA, train_BA.mean(0))
    mse_A = np.square(predicted_BA[test_B] - test_BA).mean(0)
    variance_A = train_BA.var(0)
    varies_A = variance_A > NEVER_CHANGES
    return {
        "r2": float(np.nanmean(r2_A)) if not np.isnan(r2_A).all() else 0.0,
        "mse": float(mse_A.mean()),
        "standardised_mse": float((mse_A[varies_A] / variance_A[varies_A]).mean()) if varies_A.any() else 0.0,
        "r2_per_dimension": [None if np.isnan(value) else float(value) for value in r2_A],
        "mse_per_dimension": mse_A.tolist(),
    }


def r2(predicted_BA: np.ndarray, targets_BA: np.ndarray, mean_A: np.ndarray) -> np.ndarray:
    """1 - squared error / squared error of predicting mean_A, [A]; NaN for a constant target."""
    total_A = np.square(targets_BA - mean_A).mean(0)
    varies_A = total_A > NEVER_CHANGES
    return np.where(
        varies_A, 1 - np.square(predicted_BA - targets_BA).mean(0) / np.where(varies_A, total_A, 1.0), np.nan
    )


def linear_accuracy(features_BF: Any, labels_B: Any, test_B: Any) -> float:
    """Accuracy on the test rows of a logistic regression fitted on the others; arrays or tensors.

    Features are standardised on the fitted rows; a small L2 penalty; no random numbers.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features_BF, labels_B, test_B = (np.asarray(values) for values in (features_BF, labels_B, test_B))
    strength = 1 / (2 * LOGISTIC_PENALTY * (~test_B).sum())
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    return float(model.fit(features_BF[~test_B], labels_B[~test_B]).score(features_BF[test_B], labels_B[test_B]))


def equal_frequency_bins(values_B: np.ndarray, bins: int = 8) -> np.ndarray:
    """The bin of each value, int64 from 0, so that bins hold equally many values; equal values share a bin."""
    edges = np.unique(np.quantile(values_B, np.linspace(0, 1, bins + 1)[1:-1]))
    # A value on an edge belongs to the bin above it: with two values only, as of a gripper, each has its own bin.
    return np.unique(np.searchsorted(edges, values_B, side="right"), return_inverse=True)[1]


def mutual_information(symbols_B: np.ndarray, others_B: np.ndarray, seed: int = 0) -> dict[str, float | None]:
    """Mutual information in nats of two columns of integers, and the same with one of them permuted.

    nats: counted from the sample, biased upwards. permuted: mean of the same with shuffled rows: the bias.
    known: (nats - permuted) / (entropy of others - permuted): 0 is chance, 1 where the first column determines the
    second; None where the second never changes, or where the sample is too small.
    """
    from scipy.stats import entropy
    from sklearn.metrics import mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    def information(others: np.ndarray) -> float:
        return float(mutual_info_score(None, None, contingency=contingency_matrix(symbols_B, others, sparse=True)))

    rng = np.random.default_rng(seed)
    nats = information(others_B)
    permuted = float(np.mean([information(rng.permutation(others_B)) for _ in range(PERMUTATIONS)]))
    room = float(entropy(np.unique(others_B, return_counts=True)[1])) - permuted
    return {"nats": nats, "permuted": permuted, "known": (nats - permuted) / room if room > 1e-3 else None}


def _joined(latents: Sequence[LatentAction]) -> LatentAction:
    codes = [latent.codes_BL.cpu() for latent in latents if latent.codes_BL is not None]
    return LatentAction(
        torch.cat(codes) if codes else None,
        torch.cat([latent.z_BLD.float().cpu() for latent in latents]),
        torch.cat([latent.quantized_BLD.float().cpu() for latent in latents]),
    )


def _moving(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """1 at target positions that hold a changing pixel, else 0: [B, 1, h, w]."""
    changed = (second.float() - first.float()).abs().amax(dim=1, keepdim=True) > MOVING * 255
    return F.adaptive_max_pool2d(changed.float(), target.shape[-2:])


def _predict(model: LatentActionModel, first: Tensor, quantized_BLD: Tensor) -> Tensor:
    prediction = model.predict(first, quantized_BLD).float()
    return prediction.clamp(0, 1) if model.predicts_pixels else prediction


def _ratio(numerator: Tensor | float, denominator: Tensor | float) -> float | None:
    """None for a zero denominator, as with latents that are all the same."""
    return float(numerator) / float(denominator) if float(denominator) > 0 else None


def _perplexity(share: Tensor) -> Tensor:
    return torch.special.entr(share).sum(dim=-1).exp()


def _small(frame_BCHW: Tensor) -> Tensor:
    parts = [F.interpolate(part.float() / 255, size=PIXEL_BASELINE_SIDE, mode="area") for part in frame_BCHW.split(64)]
    return torch.cat(parts)


def _known(values: list[float | None], summary: Callable[[list[float]], Any]) -> float | None:
    """The summary (max, mean) of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(summary(known)) if known else None
