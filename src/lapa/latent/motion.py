"""The visible motion between two frames, where no true action is known: optical flow, averaged in coarse cells.

    lapa latent probe LAM --data VIDEOS --motion

Dense inverse search (Kroeger et al., ECCV 2016, https://arxiv.org/abs/1603.03590) by OpenCV (`lapa-vla[motion]`).
Axes: B pairs, T time (the two frames, or also that halfway), C channel, H W image, N cells, M components.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from lapa.errors import UserError

GRID = 4
# Images below this size are enlarged: at 64 px the flow of a known shift is off by up to 0.4 px, at 128 by 0.001.
SIDE = 128


def require_opencv() -> ModuleType:
    """Returns OpenCV's module. Raises UserError where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"the motion of videos needs OpenCV ({error}); pip install 'lapa-vla[motion]'") from None
    return cv2


def motion(frames_BTCHW: UInt8[Tensor, "B T C H W"]) -> dict[str, Float[np.ndarray, "B M"]]:
    """Returns the mean flow, x and y, as shares of the side: in each of 4 x 4 cells (`grid`), and in the `whole`.

    The median over the image is subtracted: what is left is what moves other than the camera. The flow of T frames is
    the sum from each to the next, since shorter ways are found better, each the mean of the flow forward and of that
    backward with its sign changed. Raises as `require_opencv`.
    """
    cv2 = require_opencv()
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    side = max(SIDE, frames_BTCHW.shape[-1])

    def grey(frame_CHW: Tensor) -> np.ndarray:
        image_HW = cv2.cvtColor(np.ascontiguousarray(frame_CHW.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2GRAY)
        return cv2.resize(image_HW, (side, side), interpolation=cv2.INTER_CUBIC)

    def flow(first_HW: np.ndarray, second_HW: np.ndarray) -> np.ndarray:
        flow_HW2 = search.calc(first_HW, second_HW, np.zeros((side, side, 2), np.float32)) / side
        flow_HW2 -= np.median(flow_HW2, axis=(0, 1))
        return cv2.resize(flow_HW2, (GRID, GRID), interpolation=cv2.INTER_AREA).reshape(-1, 2)

    cells = []
    for frames_TCHW in frames_BTCHW:
        images = [grey(frame_CHW) for frame_CHW in frames_TCHW]
        steps = [(flow(first, second) - flow(second, first)) / 2 for first, second in itertools.pairwise(images)]
        cells.append(np.sum(steps, axis=0))
    cells_BN2 = np.stack(cells).astype(np.float64)
    return {"grid": cells_BN2.reshape(len(cells_BN2), -1), "whole": cells_BN2.mean(axis=1)}
