"""A wait for images ends: after a time limit, with the cause, and at once on a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from proxynorm.data import DataSpec, LoaderSpec, open_data
from proxynorm.errors import DataError
from tests.data.conftest import needs_ffcv, write_folder
from tests.helpers import ROOT, need

# Private mounts need root, or user namespaces.
MOUNT = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
UNSHARE = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]


def can_mount() -> bool:
    try:
        done = subprocess.run([*UNSHARE, "sh", "-c", MOUNT, "sh", "true"], timeout=10)
        return done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def small_run(root: Path, runs: Path, *more: str) -> list[str]:
    """Arguments of a run on a folder of class folders."""
    keys = ("data=folder", "loader=torchvision", "loader.workers=2", "data.limit=null")
    keys += ("data.holdout=0", "model.depth=8", "model.width=16", "batch=12", "epochs=4")
    return [*keys, f"data.root={root}", f"runs_dir={runs}", "logger=none", "device=cpu", *more]


@need(can_mount(), "a small /dev/shm cannot be mounted here")
def test_full_shared_memory_is_named_at_once(tmp_path):
    root = write_folder(tmp_path / "data", 4, 2)
    arguments = small_run(root, tmp_path, "data.image_size=224", "data.augmentation=inception")
    command = [*UNSHARE, "sh", "-c", MOUNT, "sh", sys.executable, str(ROOT / "train.py")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "shared memory is full" in line and "MB are free in /dev/shm" in line
    assert "loader.workers=0" in line


def test_a_worker_that_hangs_ends_the_run_after_the_limit(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", 2, 1)
    monkeypatch.setattr("proxynorm.data.folder.load_rgb", lambda *_: time.sleep(60))
    data = open_data(DataSpec("folder", root=str(root)), LoaderSpec("torchvision", 1, timeout=1))
    start = time.monotonic()
    with pytest.raises(DataError, match="train: no images for 1 s; .*loader.timeout"):
        next(data.train_loader(3, 3, seed=0).epoch(0))
    assert time.monotonic() - start < 30


@needs_ffcv
def test_a_thread_that_hangs_ends_the_run_after_the_limit(photos, cache, monkeypatch):
    spec = DataSpec("folder", root=str(photos), cache=cache)
    data = open_data(spec, LoaderSpec("ffcv", 1, timeout=1))
    answer = threading.Event()
    monkeypatch.setattr(data.train.reader, "kernel", lambda *_: answer.wait(60))
    try:
        with pytest.raises(DataError, match="no images for 1 s"):
            next(data.train_loader(3, 3, seed=0).epoch(0))
    finally:
        answer.set()


def test_a_worker_that_is_killed_is_one_line(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", 2, 1)
    monkeypatch.setattr(
        "proxynorm.data.folder.load_rgb", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    data = open_data(DataSpec("folder", root=str(root)), LoaderSpec("torchvision", 1))
    with pytest.raises(DataError, match="a loader worker ended .*lack of memory"):
        next(data.train_loader(3, 3, seed=0).epoch(0))


HANGING = """
import runpy, sys, time
from proxynorm.data import {module}
calls, original = [], {module}.{name}
def hang(*arguments):
    calls.append(1)
    if len(calls) > {after}:
        open({sign!r}, "w").close()
        time.sleep(120)
    return original(*arguments)
{module}.{name} = hang
from proxynorm.commands import run
run("train")
"""


@pytest.mark.parametrize(
    ("module", "name", "after", "message"),
    [
        ("folder", "load_rgb", 5, "stopped at step 1, waiting for images, by SIGTERM; saved"),
        ("datasets", "list_source", 0, "stopped by SIGTERM; run again to go on"),
    ],
)
def test_a_signal_ends_a_wait_for_images(tmp_path, module, name, after, message):
    """In a step, and while the data set is opened, when there is nothing to save yet."""
    root = write_folder(tmp_path / "data", 4, 2)
    sign = tmp_path / "hangs"
    program = HANGING.format(module=module, name=name, after=after, sign=str(sign))
    arguments = small_run(root, tmp_path, "batch=3", "loader.workers=1", "loader.prefetch=1")
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 100
    while not sign.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 75 and message in output and "Traceback" not in output
    assert (module == "folder") == bool(list(tmp_path.glob("*/checkpoints/last.pt")))
