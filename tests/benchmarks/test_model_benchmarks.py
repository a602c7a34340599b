"""The benchmarks of the method and the engine, on a small network."""

from __future__ import annotations

import json

import pytest

from benchmarks import engine, memory, passes, step
from proxynorm.cli import parse_options
from proxynorm.errors import ConfigError

SMALL = {"model": "resnet20v2", "batch": 2, "size": 16}


def test_step_measures_every_norm_beside_torchs(tmp_path, capsys):
    norms = ["torch bn", "torch ln", "ln_pn", "ln_pn+recompute"]
    step.main(step.Options(**SMALL, norms=norms, rounds=1, json=str(tmp_path / "step.json")))
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert {(row["norm"], row["format"]) for row in rows} == {
        (norm, memory_format) for norm in norms for memory_format in ("nchw", "channels_last")
    }
    for row in rows:
        assert row["step ms"] > 0 and row["inference ms"] > 0
        assert row["/ torch ln"] > 0 and (row["/ torch ln"] == 1) == (row["norm"] == "torch ln")
        assert (row["moments %"] or 0) > 0 if "pn" in row["norm"] else row["moments %"] is None
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["norm", "format", "mode"] and len(shown) == 2 + len(rows)


def test_passes_compares_the_operators_of_both_networks(tmp_path, capsys):
    passes.main(passes.Options(**SMALL, rounds=1, json=str(tmp_path / "passes.json")))
    rows = json.loads((tmp_path / "passes.json").read_text())["rows"]
    times = {row["what"]: (row["LN+PN ms"], row["torch LN ms"]) for row in rows}
    assert min(times[passes.STEP]) > 0 and min(times["aten::convolution_backward"]) > 0
    ours, theirs = times["aten::relu_"]
    assert theirs > 0 == ours  # LN+PN has its activation inside of its own pass
    assert any(ours > 0 == theirs for ours, theirs in times.values())
    differences = [abs(row["% more"]) for row in rows]
    assert differences == sorted(differences, reverse=True)
    assert "torch LN ms" in capsys.readouterr().out


def test_memory_counts_less_with_recompute(tmp_path):
    memory.main(
        memory.Options(
            **SMALL, norms=["ln_pn", "ln_pn+recompute"], json=str(tmp_path / "memory.json")
        )
    )
    kept = json.loads((tmp_path / "memory.json").read_text())["bytes_kept"]
    assert kept["ln_pn+recompute"] < 0.7 * kept["ln_pn"]


@pytest.mark.parametrize(
    "benchmark, options",
    [
        (step, ["norms=[ln_pm]"]),
        (step, ["formats=nhwc"]),
        (step, ["rounds=0"]),
        (step, ["modes=[eager,fast]"]),
        (passes, ["format=nhwc"]),
        (step, ["device=tpu"]),
        (step, ["norms=[]"]),
        (memory, ["norms=ln_pm"]),
        (step, ["norms=in_pn", "model=efficientnet_b0", "batch=1"]),
    ],
)
def test_wrong_options_are_refused(benchmark, options):
    words = [f"{name}={value}" for name, value in SMALL.items()] + options
    with pytest.raises(ConfigError):
        benchmark.main(parse_options(benchmark.Options, words))


def test_engine_compares_our_loop_with_a_bare_one_and_timm(tmp_path):
    engine.main(engine.Options(batch=16, steps=2, rounds=2, json=str(tmp_path / "engine.json")))
    rows = json.loads((tmp_path / "engine.json").read_text())["rows"]
    assert {row["of"] for row in rows} >= {"bare loop", "min(loader, bare loop)", "timm's training"}
    assert all(row["images_per_second"] > 0 for row in rows)
