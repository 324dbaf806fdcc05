"""Comparisons of the quality benchmark's runs: intervals, equal time, and the table of the harness."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import quality, quality_pages
from benchmarks.common import read_rows
from benchmarks.quality_grid import Setting
from benchmarks.quality_statistics import Curve, at_equal_time, paired_difference

BASE = Setting("file/data", "clean", "full", 1.0, 1.0, 0, 1e-3, 4)


@pytest.mark.parametrize("of_seed", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_an_interval_covers_as_often_as_it_says(seeds, of_seed):
    """Differences of seed + sample + noise with a known mean: of 1,000 intervals at 95 % between 93 % and all but a few
    cover it. Where seeds differ most, the percentiles of a bootstrap over three would cover three in four."""
    rng = np.random.default_rng(5)
    covered = 0
    weight = rng.integers(1, 20, 60).astype(float)
    for _ in range(1000):
        each = rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, 0.5, (1, 60)) + rng.normal(0, 0.3, (seeds, 60))
        base = rng.normal(2, 1, (1, 60)).repeat(seeds, 0)
        found = paired_difference(base + weight * (0.3 + each), base, weight)
        covered += found.low <= 0.3 <= found.high
    assert 0.93 <= covered / 1000 <= 0.995


def test_a_difference_is_a_ratio_of_sums_over_tokens():
    first, second, tokens = np.array([[4.0, 9.0], [2.0, 7.0]]), np.array([[1.0, 3.0], [1.0, 3.0]]), np.array([1.0, 3.0])
    found = paired_difference(first, second, tokens)
    assert found.by_seed == pytest.approx(((3 + 6) / 4, (1 + 4) / 4))
    assert found.mean == pytest.approx(1.75)
    # over two seeds 12.7 standard errors of 1/2; over samples, of residuals 2 - 1.75 and 5 - 3 · 1.75 from the mean
    half = np.hypot(12.706 * 0.5, 1.96 * np.sqrt(2 * (0.25**2 + 0.25**2)) / 4)
    assert (found.low, found.high) == pytest.approx((1.75 - half, 1.75 + half))
    assert not found.shown  # two seeds show nothing


def curve(seed, machine, seconds):
    """nll of two records that falls from 2 to 0 in 4 steps, which take so many seconds."""
    nll = np.array([[2.0, 2.0], [0.0, 0.0]])
    rows = [{"machine": machine}]
    times = np.array([0.0, seconds])
    return Curve(replace(BASE, seed=seed), np.array([0.0, 4.0]), times, nll, np.ones(2), nll, rows)


def test_equal_time_is_that_of_one_processor():
    """The second policy is as good per step and twice as fast; one of its seeds was run where all takes ten times as
    long, and one beside others. By the clock alone those would lie behind the first policy and not 1 nat ahead."""
    first = [curve(seed, "one", 20.0) for seed in (0, 1, 2)]
    second = [curve(0, "one", 10.0), curve(1, "two", 100.0), curve(2, "one", 25.0)]
    assert at_equal_time(second, first).by_seed == pytest.approx((-1.0, -1.0, -1.0))
    assert at_equal_time(second, [*first, curve(3, "two", 200.0)]).by_seed == pytest.approx((-1.0, -1.0, -1.0))
    assert at_equal_time(second[1:2], first) is None  # no processor has run both
    assert at_equal_time(first[:1], second[2:]) is None  # they have no seed in common


def test_tables_have_the_seconds_of_the_machine_of_most_runs():
    policies = {"a": [curve(0, "one", 20.0), curve(1, "two", 90.0)], "b": [curve(0, "one", 10.0)],
                "c": [curve(0, "two", 50.0)]}  # fmt: skip
    timed = quality_pages.on_one_machine(policies)
    assert {name: [each.cpu_seconds[-1] for each in group] for name, group in timed.items()} == {
        "a": pytest.approx([20.0, 20.0]), "b": [10.0],
    }  # fmt: skip


def test_accuracies_of_the_harness_stand_by_policy(tmp_path):
    """Three seeds of a policy and of chance, measured before their last point, and the model before them."""
    lists = {"sample_nll": [1.0], "sample_tokens": [2], "sample_correct": [True]}
    output = tmp_path / "quality.csv"
    policies = {"random": [curve(seed, "here", 1.0) for seed in range(3)]}
    policies["other"] = [each._replace(setting=replace(each.setting, policy="other")) for each in policies["random"]]
    runs = [(replace(BASE, steps=0), 0, 10)]
    runs += [(each.setting, 4, 20 if name == "random" else 28) for name in policies for each in policies[name]]
    for setting, step, right in runs:
        task = {
            "task": "sums",
            "accuracy": right / 40,
            "stderr": right / 400,
            "correct": [i < right for i in range(40)],
        }
        later = [{"step": step + 1} | lists] if step else []
        quality.append(output, setting, [{"step": step, "harness": [task]} | lists, *later])
    assert "harness" not in read_rows(output)[0]
    table = quality_pages.harness_table(
        {("file/data", 0.125, "clean"): policies},
        [row for row in read_rows(output) if row["steps"] == "0"],
        read_rows(tmp_path / "quality_harness.csv"),
    )
    # 8 of 40 more in every seed: the interval is that over questions, of a share of 0.2
    half = 1.96 * np.sqrt(0.2 * 0.8 / 39)
    difference = f"+0.20 [{0.2 - half:+.2f}, {0.2 + half:+.2f}]"
    assert table.splitlines()[2:] == [
        "| sums | 40 | file/data |  | before training | 1 | 0 | 0.250 ± 0.025 |  |",
        "| sums | 40 | file/data | clean | random | 3 | 4 | 0.500 ± 0.050 |  |",
        f"| sums | 40 | file/data | clean | other | 3 | 4 | 0.700 ± 0.070 | **{difference}** |",
    ]
