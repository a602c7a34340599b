"""101 images on one, two and three processes: 101 are counted, with the same hits."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from proxynorm.data import DataSpec, LoaderSpec, open_data
from proxynorm.train.distributed import Process
from proxynorm.train.evaluate import evaluate, forward
from tests.data.conftest import write_folder


@pytest.fixture(scope="module")
def hundred_and_one(tmp_path_factory) -> Path:
    root = write_folder(tmp_path_factory.mktemp("101"), 1, 33)
    for number in (1, 2):
        (root / "val" / "bee" / f"copy{number}.jpg").write_bytes(
            (root / "val" / "ant" / "000.jpg").read_bytes()
        )
    return root


def evaluate_one(root: Path, folder: Path, rank: int, world_size: int) -> None:
    """Evaluate the share of one process; rank 0 writes the result to a file."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
        )
    data = open_data(
        DataSpec("folder", root=str(root), image_size=16), LoaderSpec("torchvision", 0)
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    device = torch.device("cpu")
    batches = data.eval_loader(16, rank, world_size)
    outputs = forward(model, batches, lambda batch: data.prepare(batch, "cpu"), device)
    result = evaluate(outputs, Process(rank, world_size, device), expected=101)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(vars(result)))
    if world_size > 1:
        dist.destroy_process_group()


def evaluate_on(root: Path, folder: Path, world_size: int) -> dict:
    """Return the result on `world_size` forked processes."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=evaluate_one, args=(root, folder, rank, world_size), daemon=True)
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=60)
        assert process.exitcode == 0
    return json.loads((folder / "result.json").read_text())


def test_the_number_of_processes_does_not_change_the_result(hundred_and_one, tmp_path):
    one, two, three = (
        evaluate_on(hundred_and_one, tmp_path / str(size), size) for size in (1, 2, 3)
    )
    assert one["count"] == two["count"] == three["count"] == 101
    assert (
        one["top1"] == two["top1"] == three["top1"] and one["top5"] == two["top5"] == three["top5"]
    )
    assert 0 < one["top1"] < 100
    assert (
        one["loss"]
        == pytest.approx(two["loss"], rel=1e-6)
        == pytest.approx(three["loss"], rel=1e-6)
    )
