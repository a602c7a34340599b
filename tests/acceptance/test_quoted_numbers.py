"""Numbers that the README and docs/ quote by hand are those of results/."""

from __future__ import annotations

import csv
import json
import re
from statistics import median

import pytest

from tests.helpers import ROOT

RESULTS = ROOT / "results"
README, RESULTS_PAGE, BENCHMARKS, DATA = (
    (ROOT / path).read_text()
    for path in ("README.md", "docs/results.md", "docs/benchmarks.md", "docs/data.md")
)


def load(path: str) -> dict:
    return json.loads((RESULTS / path).read_text())


def rows(page: str) -> list[list[str]]:
    """The rows of all tables of a page, as their cells."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def prose(page: str, heading: str) -> str:
    return re.search(rf"## {heading}\n(.*?)(?:\n## |\Z)", page, re.DOTALL)[1]


def test_the_claims_are_those_of_the_report():
    report = {}
    for table in ("mini_norms", "mini_regularization"):
        report |= {row[0]: row for row in rows((RESULTS / table / "report.md").read_text())}
    quoted = [row for row in rows(RESULTS_PAGE) if len(row) == 6 and " − " in row[1]]
    assert len(quoted) >= 12
    for claim, cells, *others in quoted:
        assert [report[claim][i] for i in (1, 3, 4, 5, 7)] == [cells, *others]


def test_differences_in_prose_are_those_of_the_report():
    text = prose(README, "Results").split("<!-- end -->")[1].split("On few images")[0]
    differences = re.findall(r"\d+\.\d\d(?=\s+(?:points|\(p))", text)
    intervals = re.findall(r"(?<=[ (])−\d\.\d\d … [+−]\d\.\d\d(?=\))", text)
    assert len(differences) >= 4 and len(intervals) == 2
    report = (RESULTS / "mini_norms/report.md").read_text()
    for difference in differences:
        assert re.search(rf"\| [+-]{re.escape(difference)} \|", report), difference
    for p in re.findall(r"p ([=<] 0\.\d+)", text):
        assert f"| {p.removeprefix('= ')} |" in report, p
    for interval in intervals:
        assert f"| {interval.replace('−', '-')} |" in report, interval


def test_the_differences_of_mini_norms_survive_holms_correction():
    report = rows((RESULTS / "mini_norms/report.md").read_text())
    p = sorted(float(row[5].strip("< ")) for row in report if row[2:3] in (["higher"], ["lower"]))
    corrected = max(value * (len(p) - n) for n, value in enumerate(p))
    assert len(p) == 6 and "the six differences" in " ".join(RESULTS_PAGE.split())
    assert corrected < 0.05 and f"largest p {corrected:.3f}" in " ".join(RESULTS_PAGE.split())


def test_the_verdict_of_the_demo_is_that_of_its_report():
    verdict = re.search(r"\*\*(.*)\.\*\*", (RESULTS / "demo/report.md").read_text())[1]
    for page in (README, RESULTS_PAGE):
        assert verdict in " ".join(page.split())


def test_the_gaps_between_bn_and_ln_pn_are_those_of_the_tables():
    gaps = []
    for table, bn in (("mini_norms", "bn"), ("study", "bn"), ("mini_batch", "bn-norm_batch32")):
        with open(RESULTS / table / "cells.csv") as file:
            top1 = {row["cell"]: float(row["top1"]) for row in csv.DictReader(file)}
        gaps.append(f"{top1[bn] - top1['ln_pn']:.2f}")
    line = "{} here, {} in the study and {} in the table of batch sizes".format(*gaps)
    assert line in " ".join(RESULTS_PAGE.split())


def test_the_chosen_pairs_are_those_of_the_search():
    found = load("mini_search/chosen.json")
    report = {row[0]: row[1] for row in rows((RESULTS / "mini_search/report.md").read_text())}
    for norm, pair in found["chosen"].items():
        rate, decay = pair.values()
        top1 = report[f"{norm}-base_lr{rate}-weight_decay{decay}"].split(" ± ")[0]
        assert [norm, str(rate), str(decay), top1] in rows(prose(RESULTS_PAGE, "The search"))
    best = {norm: max(tried.values()) for norm, tried in found["tried"].items()}
    assert f"LN+PN is {best['bn'] - best['ln_pn']:.2f} points" in RESULTS_PAGE
    assert f"and {best['ln_ws'] - best['ln_pn']:.2f} in the search" in RESULTS_PAGE
    words = r"it costs LN\+WS (\S+) points, LN\+PN (\S+) and BN (\S+)\. "
    costs = re.search(words, " ".join(RESULTS_PAGE.split())).groups()
    for norm, cost in zip(("ln_ws", "ln_pn", "bn", "ln"), (*costs, 0)):
        exact = best[norm] - found["tried"][norm]["0.2 0.0005"]
        assert float(cost) == pytest.approx(exact, abs=0.0051)
    for norm in ("bn", "ln_ws"):
        assert best[norm] - sorted(found["tried"][norm].values())[-2] < 0.05


def test_the_figures_of_the_study_are_those_of_its_report():
    text = prose(RESULTS_PAGE, "What training does to P1")
    powers = [row for row in rows((RESULTS / "study/report.md").read_text()) if len(row) == 7]
    quoted = [row for row in rows(text) if len(row) == 4 and row[1][:2] == "0."]
    assert len(quoted) == 8
    assert all(row in [[row[0], *row[2:5]] for row in powers] for row in quoted)
    with open(RESULTS / "study/cells.csv") as file:
        top1 = {row["cell"]: float(row["top1"]) for row in csv.DictReader(file)}
    pairs = """ln_pn ln; ln_pn-standardized ln_pn; ln_pn-width64 ln_pn; ln-width64 ln;
        ln_pn-width32 ln-width32; ln_pn-width64 ln-width64; ln_ws ln_pn; ln_ws_pn ln_ws;
        ln_ws_pn ln_pn; ln_ws_pn-width32 ln_pn-width32; ln_ws_pn-width64 ln_pn-width64;
        ln_ws_pn bn"""
    for first, second in (pair.split() for pair in pairs.split(";")):
        assert f"{abs(top1[first] - top1[second]):.2f}" in text, (first, second)


def test_the_differences_of_mini_batch_are_those_of_its_report():
    text = prose(RESULTS_PAGE, "Batch size")
    report = rows((RESULTS / "mini_batch/report.md").read_text())
    differences = {row[1]: row[3] for row in report if len(row) == 8}
    for cells in (
        "bn-norm_batch2 − bn-norm_batch32",
        "ln_pn − bn-norm_batch2",
        "gn_pn − bn-norm_batch2",
        "ln_pn − bn-norm_batch32",
        "gn_pn − bn-norm_batch32",
        "ln_pn-batch2 − bn-batch2",
        "gn_pn-batch2 − bn-batch2",
        "bn-batch2 − bn-norm_batch32",
        "gn_pn-batch2 − gn_pn",
    ):
        assert differences[cells].lstrip("+-") in text


def test_the_gains_by_regularization_are_those_of_its_cells():
    with open(RESULTS / "mini_regularization/cells.csv") as file:
        top1 = {row["cell"]: float(row["top1"]) for row in csv.DictReader(file)}
    gains = [
        f"{top1[f'{norm}-extra'] - top1[f'{norm}-none']:.2f}" for norm in ("ln_pn", "gn_pn", "bn")
    ]
    page = " ".join(RESULTS_PAGE.split())
    assert "LN+PN gains {} points, GN+PN {} and BN {}:".format(*gains) in page
    gaps = [top1[f"bn-{kind}"] - top1[f"ln_pn-{kind}"] for kind in ("none", "baseline", "extra")]
    assert f"by {min(gaps):.2f} to {max(gaps):.2f} in that of regularization" in page


STEP_NORMS = ["torch ln", "bn", "ln", "ln_pn", "ln_pn+recompute", "gn_pn"]


def step_ratios(model, norm, key):
    """What the five processes measured, in ascending order."""
    processes = [load(f"step/{model}/{number}.json")["rows"] for number in range(1, 6)]
    return sorted(row[key] for rows in processes for row in rows if row["norm"] == norm)


@pytest.mark.parametrize("model", ["resnet50", "efficientnet_b0"])
def test_the_step_tables_are_those_measured(model):
    for norm in STEP_NORMS:
        cells = [norm]
        for key in ("/ torch bn", "/ torch ln", "/ torch ln (inf.)"):
            ratios = step_ratios(model, norm, key)
            cells.append(f"{median(ratios):.3f} ({ratios[0]:.3f} … {ratios[-1]:.3f})")
        assert cells in rows(BENCHMARKS)
    assert f"{median(step_ratios(model, 'ln_pn', 'moments %')):.1f} %" in BENCHMARKS


@pytest.mark.parametrize("model", ["layer", "resnet50"])
def test_the_traffic_tables_are_those_counted(model):
    for row in load(f"traffic/{model}.json")["rows"]:
        moved = [f"{row[part]:.1f}" for part in ("forward", "backward", "total")]
        keys = ("norm", "act", "mode") if model == "layer" else ("norm", "mode")
        name = [row[key] for key in keys]
        counts = [str(row["kernels"])] + [f"{row['operations']:.0f}"] * (model == "layer")
        assert [*name, *moved, *counts] in rows(BENCHMARKS)


def test_network_traffic_meets_its_bound():
    eager, compiled, ours = (row["total"] for row in load("traffic/resnet50.json")["rows"])
    assert ours <= compiled and ours <= 0.8 * eager
    assert f"{ours / compiled:.2f} of the bytes" in BENCHMARKS


def test_the_readme_quotes_the_measured_ratios():
    large, small = (
        median(step_ratios(model, "ln_pn", "/ torch ln"))
        for model in ("resnet50", "efficientnet_b0")
    )
    quoted = f"(ratio {large:.2f} on a CPU in channels_last; EfficientNet-B0: {small:.2f})"
    assert quoted in README.replace("\n", " ")


def test_the_loop_and_loader_tables_are_those_measured():
    for model in ("resnet20v2", "resnet18"):
        for row in load(f"engine/{model}.json")["rows"]:
            ratio = f"{row['ratio']:.3f}" if row["ratio"] else ""
            assert f"{row['what']} | {row['images_per_second']:.0f} | {ratio}" in BENCHMARKS
    for row in load("loader/benchmark.json")["table"]:
        speed = f"{row['loader']} | {row['images_per_second']:.0f} | {row['ours_over_it']:.2f}"
        assert speed in BENCHMARKS
    assert f"{load('engine/startup.json')['seconds']['median']:.1f} s" in BENCHMARKS


def test_the_figures_of_mini_depth_are_those_of_its_report():
    text = " ".join(prose(RESULTS_PAGE, "Depth").split())
    with open(RESULTS / "mini_depth/cells.csv") as file:
        top1 = {row["cell"]: float(row["top1"]) for row in csv.DictReader(file)}
    depths = (20, 44, 80)
    gains = [f"{top1[f'ln_pn-depth{d}'] - top1[f'ln-depth{d}']:.2f}" for d in depths]
    assert "by {}, {} and {} points".format(*gains) in text
    first, _, last = (f"{top1[f'ln_pn-depth{d}']:.2f} %" for d in depths)
    assert f"from {first} at 20 layers to {last} at 80" in text
    behind = [top1[f"bn-depth{d}"] - top1[f"ln_pn-depth{d}"] for d in depths]
    assert f"it is {behind[2]:.2f} points behind BN" in text
    assert f"by {behind[2]:.2f} points at 80 layers" in " ".join(README.split())
    assert f"by {min(behind):.2f} to {max(behind):.2f} in that of depth" in " ".join(
        RESULTS_PAGE.split()
    )
    lags = [top1[f"bn-depth{d}"] - top1[f"ln-depth{d}"] for d in depths]
    assert [round(lag) for lag in lags] == [3, 3, 3]
    report = (RESULTS / "mini_depth/report.md").read_text()
    assert "flat, in 7 of 9 runs" in report and "in seven of nine" in text
    p1 = [row[3] for row in rows(report) if len(row) == 7]
    assert {f"{float(value):.2f}" for value in p1[-3:]} == {"0.02"}


def test_the_differences_at_80_layers_are_those_of_study_depth():
    text = " ".join(prose(RESULTS_PAGE, "Depth").split())
    with open(RESULTS / "study_depth/cells.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["top1"]]
    top1 = {row["cell"].replace("-base_lr", " "): float(row["top1"]) for row in rows}
    best = max((cell for cell in top1 if cell.startswith("ln_pn ")), key=lambda cell: top1[cell])
    assert best == "ln_pn 0.4" and "LN+PN is best at 0.4" in text
    assert f"{top1['bn 0.4'] - top1[best]:.2f} points behind BN there" in text
    wspn = top1["ln_ws_pn 0.2"]
    ahead = f"{wspn - top1['bn 0.2']:.2f} points ahead of BN and {wspn - top1['ln_pn 0.2']:.2f}"
    assert f"is {ahead} ahead of LN+PN" in text


def test_the_storage_table_is_that_measured():
    for row in load("loader/storage.json")["table"]:
        size, speed = row["bytes_per_image"] / 1000, row["images_per_cpu_second"]
        assert f"| {size:.0f} | {speed:.0f} |" in DATA


def test_the_reliability_figures_are_those_measured():
    soak = load("engine/soak.json")
    assert len(soak["steps"]) == 50 and soak["differences"] == []
