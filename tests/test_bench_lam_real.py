"""The figures and the table of benchmarks/bench_lam_real.py, on codes that know the verb or do not."""

import bench_lam_real as bench
import numpy as np
import pytest


def test_a_code_that_is_the_verb_knows_it_and_a_code_of_the_scene_does_not() -> None:
    clips_B = np.repeat(np.arange(60), 10)
    verbs_B = np.array(["pick", "push"])[clips_B % 2]
    knows_verb_B, knows_scene_B = clips_B % 2, clips_B // 6
    verb = bench.verb_figures(np.stack([knows_scene_B, knows_verb_B], axis=1), verbs_B, clips_B)
    assert verb["clips"] == 60
    assert verb["nats"] == pytest.approx(np.log(2)) and verb["permuted"] < 0.15
    # The scenes' verbs are as many of each, so that the code knows nothing; permuting clips says how much chance adds.
    scene = bench.verb_figures(knows_scene_B[:, None], verbs_B, clips_B)
    assert scene["nats"] == pytest.approx(0.0, abs=1e-9) and scene["permuted"] > 0.01


def test_the_table_of_motion_has_each_input_and_probe() -> None:
    probes = {
        "linear": {"quantized": {"r2": 0.3}, "first_frame": {"r2": 0.1}},
        "mlp": {"quantized": {"r2": 0.4}, "first_frame": {"r2": -0.2}},
    }
    lines = bench.motion_table([{"variant": "preset", "motion": {"grid": probes, "whole": probes}}]).splitlines()
    assert lines[0] == "| variant | from | grid, linear | grid, mlp | whole, linear | whole, mlp |"
    assert lines[2] == "| preset | quantized | 0.30 | 0.40 | 0.30 | 0.40 |"
    assert lines[3] == "| preset | continuous | - | - | - | - |"
    assert lines[5] == "| preset | first frame | 0.100 | -0.200 | 0.100 | -0.200 |"


def test_the_table_has_a_row_for_each_variant_with_least_and_greatest() -> None:
    def row(variant: str, seed: int, mse: float) -> dict:
        errors = {"mse": mse, "mse_copy": 1.0, "mse_shuffled": 1.5 * mse}
        moving = {f"moving_{name}": value for name, value in errors.items()}
        return {"variant": variant, "seed": seed, "reconstruction": {**errors, **moving}, "cpu_seconds": 100.0}

    lines = bench.table(
        [row("preset", 0, 0.6), row("preset", 1, 0.8), row("quantizer=continuous", 0, 0.5)]
    ).splitlines()
    names, _, preset, continuous = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = dict(zip(names, preset, strict=True))
    assert found["seeds"] == "2" and found["error / copying"] == "0.70 (0.60 to 0.80)"
    assert found["moving: shuffled / own"] == "1.50 (1.50 to 1.50)" and found["CPU s"] == "100 (100 to 100)"
    assert found["codes used"] == found["verb, nats"] == "-", (
        "a continuous model has no codes, videos may lack captions"
    )
    assert dict(zip(names, continuous, strict=True))["error / copying"] == "0.50"
