"""torch.compile: when it is on, and what happens if it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from proxynorm.data import DataSpec
from proxynorm.train.build import compile_mode
from proxynorm.train.settings import Settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ASKED = Settings(recompute=True, compile=True)


def test_auto_compiles_only_on_a_gpu():
    assert compile_mode(Settings(), CUDA, 1) == ("default", None)
    assert compile_mode(Settings(), CPU, 1) == (None, None)
    assert compile_mode(Settings(compile=True), CPU, 1) == ("default", None)
    assert compile_mode(Settings(compile=False), CUDA, 1) == (None, None)


def test_recompute_is_eager_and_says_so():
    for settings, device in ((Settings(recompute=True), CUDA), (ASKED, CPU)):
        mode, line = compile_mode(settings, device, 1)
        assert mode is None and "runs eagerly" in line
    assert compile_mode(Settings(recompute=True), CPU, 1) == (None, None), "nothing was asked for"


def test_cuda_graphs_need_one_shape_and_one_forward():
    graphs = Settings(compile_mode="reduce-overhead")
    growing = replace(graphs, data=DataSpec("folder", start_size=96, ramp=(0, 3)))
    assert compile_mode(graphs, CUDA, 1) == ("reduce-overhead", None)
    for settings, accumulation in ((graphs, 2), (growing, 1)):
        mode, line = compile_mode(settings, CUDA, accumulation)
        assert mode == "default" and "single micro-batch" in line


@pytest.mark.parametrize("epoch_size", ["batch=20", "micro_batch=5"])
def test_a_failure_is_one_line_and_the_run_goes_on_eagerly(
    run_small, monkeypatch, capsys, epoch_size
):
    def no_compiler(*arguments):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch._inductor, "compile", no_compiler)
    tried = run_small("compile=true", epoch_size, "max_steps=4", "name=tried")
    said = capsys.readouterr().out
    line = "torch.compile failed, the run goes on eagerly: no C++ compiler\n"
    assert said.count(line) == said.count("torch.compile") == 1
    eager = run_small("compile=false", epoch_size, "max_steps=4", "name=eager")
    losses = [[row["loss"] for row in run.rows] for run in (tried, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_output_of_inductor_is_what_runs(run_small, monkeypatch, capsys):
    """In training and evaluation. The captured graphs stand in for compiled kernels."""
    graphs = []

    def captured(graph, inputs, options):
        graphs.append(options)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", captured)
    made = run_small("compile=true", "max_steps=3", "name=made")
    assert len(graphs) >= 2 and "torch.compile" not in capsys.readouterr().out
    eager = run_small("compile=false", "max_steps=3", "name=eager")
    losses = [[row["loss"] for row in run.rows] for run in (made, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
