"""Checks of the installation and of what an experiment needs: one finding a line."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from proxynorm.data import Data, DataSpec, LoaderSpec, fashion_mnist, open_data
from proxynorm.data.cache import cache_folder
from proxynorm.data.datasets import DATASETS
from proxynorm.data.ffcv.native import INSTALL, ffcv_library
from proxynorm.data.loaders import Split
from proxynorm.data.randomness import permutation
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.train.build import build_model
from proxynorm.train.finetune import PUBLISHED, carry, read_weights, source_of
from proxynorm.train.settings import Settings, folder_of
from proxynorm.train.tracker import choose_mode

OK, WARNING, MISSING = "ok", "warning", "missing"
SAMPLED_IMAGES = 256
# Copies of the weights: last.pt, previous.pt and the file being written have the weights, their
# average and up to two states of the optimizer; best.pt has the weights.
COPIES = 3 * 4 + 1
IMAGENET_BYTES = 65.5e9  # as JPEG-90, longest side 500
# Classes, training and evaluation images of ImageNet, and how many of each may be left out.
IMAGENET, LEFT_OUT = (1000, 1_281_167, 50_000), (0, 25_000, 1_000)
WRITE = "python scripts/write_ffcv.py source=DIR output={}"


@dataclass(frozen=True)
class Finding:
    """status: OK, WARNING or MISSING (the experiment cannot run); remedy: a command."""

    status: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; fix: {self.remedy}" if self.remedy else ""
        return f"{self.status:<8} {self.subject:<9} {self.text}{remedy}"


def verdict(subject: str, text: str, remedy: str, status: str = WARNING) -> Finding:
    """A finding that is OK unless there is a remedy."""
    return Finding(status if remedy else OK, subject, text, remedy)


def examine(
    settings: Settings, hardware: str | None = None, experiment: str | None = None
) -> Iterator[Finding]:
    """Find what is there and what is missing; hardware: what the head of the experiment asks for.

    The data set is opened once, by the functions that training uses.
    """
    yield from check_python()
    yield from check_cuda(settings, hardware)
    yield from check_ffcv(settings)
    try:
        data = open_for_a_look(settings.data)
        yield from check_data(data, settings.data.on_bad)
        if data is not None:
            found = len(data.info.classes), data.info.train_count, data.info.eval_count
            yield from check_amount(settings, experiment, found)
            yield from check_weights(settings, data)
    except ProxynormError as error:
        data = None
        yield unopened(settings.data, error)
    yield from check_disk(settings, data)
    yield from check_memory(settings)
    yield from check_wandb(settings)
    yield from check_slurm()


def check_python() -> Iterator[Finding]:
    """The interpreter and the packages that training requires."""
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.platform()}")
    install = "install proxynorm's extra [train]; in a checkout: pip install -e '.[train]'"
    try:
        required = [Requirement(line) for line in metadata.requires("proxynorm") or []]
    except metadata.PackageNotFoundError:
        yield Finding(WARNING, "packages", "proxynorm runs from a folder, not installed", install)
        return
    found, bad = [], []
    for item in required:
        if item.marker is not None and not item.marker.evaluate({"extra": "train"}):
            continue
        try:
            found.append(f"{item.name} {metadata.version(item.name)}")
            if not item.specifier.contains(metadata.version(item.name), prereleases=True):
                bad.append(f"{item.name}{item.specifier} (found: {found.pop()})")
        except metadata.PackageNotFoundError:
            bad.append(f"{item.name}{item.specifier}")
    yield verdict("packages", ", ".join(bad or found), install if bad else "", MISSING)


def check_cuda(settings: Settings, hardware: str | None) -> Iterator[Finding]:
    """The GPUs, beside what the experiment's head asks for."""
    asked = f"; the experiment asks for {hardware}" if hardware else ""
    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.0f} GB" for gpu in found)
        yield Finding(OK, "cuda", f"{torch.version.cuda}: {names}{asked}")
        return
    needed = settings.device.startswith("cuda")
    reinstall = "pip install --force-reinstall torch torchvision"
    if not shutil.which("nvidia-smi"):
        text = f"no GPU: training runs on {os.cpu_count()} CPU cores"
        cluster = "sbatch slurm/train.sbatch, on a cluster with GPUs" if hardware else ""
        remedy = "device=auto" if needed else cluster
    elif torch.version.cuda is None:
        text = "this torch is built for CPUs"
        remedy = f"{reinstall}, with the index that pytorch.org names for your driver"
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        text, remedy = "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES"
    else:
        text = f"the driver does not serve this torch, built for CUDA {torch.version.cuda}"
        remedy = f"nvidia-smi; then update the driver, or {reinstall} built for an older CUDA"
    yield verdict("cuda", text + asked, remedy, MISSING if needed else WARNING)


def check_ffcv(settings: Settings) -> Iterator[Finding]:
    """FFCV's library."""
    needed = settings.data.name == "beton" or settings.loader.name == "ffcv"
    try:
        ffcv_library()
        yield Finding(OK, "ffcv", metadata.version("ffcv"))
    except ConfigError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        text = reason if needed else f"{reason}; the torchvision loader serves"
        yield Finding(MISSING if needed else WARNING, "ffcv", text, INSTALL.partition(": ")[2])


def open_for_a_look(spec: DataSpec) -> Data | None:
    """Open the data set as training does; None if the first run will download it.

    A folder is only listed, not converted for FFCV, and a damaged image does not end the look.
    """
    installed = spec.root is not None or fashion_mnist.DEBIAN_FOLDER.is_dir()
    if spec.name == "fashion_mnist" and not installed:
        return None
    loader = LoaderSpec("ffcv", 1) if spec.name == "beton" else LoaderSpec("torchvision", 0)
    return open_data(dataclasses.replace(spec, on_bad="skip"), loader)


def unopened(spec: DataSpec, error: ProxynormError) -> Finding:
    """The finding for a data set that cannot be opened."""
    if spec.root is None and DATASETS[spec.name].needs_root:
        made = ", made with scripts/write_ffcv.py" if spec.name == "beton" else ""
        return Finding(MISSING, "data", "data.root is not given", f"data.root=DIR{made}")
    remedy = "data.root=DIR"
    if spec.name == "fashion_mnist":
        remedy = f"data.root=null and {fashion_mnist.PACKAGE}"
    elif spec.name == "beton":
        remedy = f"{WRITE.format(Path(spec.root or 'DIR') / 'PART.beton')} overwrite=true"
    return Finding(MISSING, "data", str(error), remedy)


def check_data(data: Data | None, on_bad: str) -> Iterator[Finding]:
    """Decode a sample of the images as training does, and say what was found.

    on_bad: the run's, as the look itself leaves damaged images out.
    """
    if data is None:
        text = "Fashion-MNIST is not installed; the first run downloads it"
        yield Finding(WARNING, "data", text, fashion_mnist.PACKAGE)
        return
    for line in data.warnings:
        remedy = "mend the folder, write the .beton files again, or change the key"
        yield Finding(WARNING, "data", line, remedy)
    for split in (data.train, data.evaluation):
        order = permutation(0, 0, len(split.rows))[:SAMPLED_IMAGES]
        sample = Split(split.reader, np.sort(split.rows[order]))
        before = len(data.failures)
        for _ in dataclasses.replace(data, evaluation=sample).eval_loader(64):
            pass
        text = f"{split.reader.source}: {len(split.rows)} images, {len(order)} of them looked at"
        bad = list(data.failures.items())[before:]
        if not bad:
            yield Finding(OK, "data", text)
            continue
        text += f", {len(bad)} damaged ({': '.join(bad[0])})"
        if on_bad == "skip" and len(bad) < len(order):
            yield Finding(WARNING, "data", text, "repair them, or train without them")
        else:
            skip = "" if on_bad == "skip" else "data.on_bad=skip, or "
            yield Finding(MISSING, "data", text, f"{skip}repair or remove them")


def check_amount(
    settings: Settings, experiment: str | None, found: tuple[int, int, int]
) -> Iterator[Finding]:
    """Enough data for one batch, and ImageNet for ImageNet's recipes."""
    spec = settings.data
    if settings.batch > found[1]:
        text = f"batch={settings.batch} exceeds the {found[1]} training images"
        yield Finding(MISSING, "data", text, f"batch={found[1]}")
    if not (experiment or "").startswith("imagenet_") or spec.limit or spec.holdout:
        return
    if all(abs(size - n) <= most for size, n, most in zip(found, IMAGENET, LEFT_OUT)):
        return
    parts = zip(found, ("classes", "training images", "evaluation images"), IMAGENET)
    off = ", ".join(f"{size:,} {what} instead of {n:,}" for size, what, n in parts if size != n)
    text = f"experiment={experiment} is ImageNet's recipe, and this is not ImageNet: {off}"
    root = f" data.root={spec.root}" if spec.root else ""
    own = f"python train.py data={spec.name}{root} model={settings.model['name']}"
    remedy = f"data.root=DIR of ImageNet, or your own recipe: {own}"
    yield Finding(WARNING, "data", text, remedy)


def check_weights(settings: Settings, data: Data) -> Iterator[Finding]:
    """That a new run can start from a file or run; another one has all in its checkpoints."""
    source = source_of(settings)
    if source in (None, PUBLISHED):
        return
    classes, channels = data.info.classes, data.info.channels
    try:
        if (folder_of(settings) / "checkpoints").is_dir():
            return
        weights = read_weights(source, settings, len(classes), channels)
        model = build_model(settings, len(classes), channels)
        notes = carry(model, weights, settings, list(classes))["notes"]
        yield Finding(OK, "weights", "; ".join(notes))
    except ProxynormError as error:
        yield Finding(MISSING, "weights", str(error))


def check_disk(settings: Settings, data: Data | None) -> Iterator[Finding]:
    """Room for the checkpoints and for .beton files."""
    spec = settings.data
    sizes = (len(data.info.classes), data.info.channels) if data else (1000, 3)
    model = build_model(settings, *sizes)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    yield room(Path(settings.runs_dir), COPIES * weights, "checkpoints")
    root = Path(spec.root or "").expanduser()
    if spec.name == "folder" and data:
        source = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        purpose = "the .beton files made of data.root"
        yield room(cache_folder(spec.cache), source, purpose, "data.cache")
    if spec.name == "beton" and spec.root and not (root / "train.beton").is_file():
        yield room(root, IMAGENET_BYTES, "the .beton files of ImageNet", "data.root")


def room(folder: Path, needed: float, purpose: str, key: str = "runs_dir") -> Finding:
    """Compare the free space of a folder's disk with `needed` bytes."""
    folder = folder.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{folder}: {free / 1e9:.1f} GB free, {purpose} take up to {needed / 1e9:.2f} GB"
    return verdict("disk", text, "" if free > needed else f"{key}=A LARGER DISK", MISSING)


def check_memory(settings: Settings) -> Iterator[Finding]:
    """Available memory beside the training file, which the page cache holds if it fits."""
    available = available_memory()
    text, remedy = f"{available / 1e9:.1f} GB available", ""
    if settings.data.name == "beton":
        file = Path(settings.data.root or "DIR").expanduser() / "train.beton"
        size = file.stat().st_size if file.is_file() else IMAGENET_BYTES
        text += f"; the training file has {size / 1e9:.1f} GB"
        if size > available:
            text += " and does not fit: every epoch reads the disk"
            write = f"{WRITE.format(file)} overwrite=true max_side=400"
            remedy = f"{write}, or data.root=FAST LOCAL DISK"
    yield verdict("memory", text, remedy)


def available_memory() -> int:
    """Bytes that programs may still take, page cache included (Linux), else all memory."""
    file = Path("/proc/meminfo")
    if file.exists() and (found := re.search(r"MemAvailable: *(\d+) kB", file.read_text())):
        return 1024 * int(found[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_wandb(settings: Settings) -> Iterator[Finding]:
    """Where W&B logs to."""
    mode = choose_mode(settings.logger.mode)
    texts = {
        "offline": "no key: runs are logged offline, into their folders",
        "disabled": "off for this experiment",
    }
    remedy = "wandb login (or logger=none)" if mode == "offline" else ""
    yield verdict("wandb", texts.get(mode, mode), remedy)


def check_slurm() -> Iterator[Finding]:
    """SLURM's commands, and its controller's answer."""
    if not shutil.which("sbatch"):
        text = "sbatch is not here, so slurm/*.sbatch cannot be submitted"
        local = "torchrun --standalone --nproc-per-node=8 train.py …"
        yield Finding(WARNING, "slurm", text, f"ssh LOGIN-NODE; without SLURM: {local}")
        return
    command = ["sinfo", "--noheader", "--format=%P %D %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        text = "; ".join(done.stdout.splitlines()) or "none"
        yield Finding(OK, "slurm", f"partition, nodes, GPUs: {text}")
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).splitlines()[0]
        text = f"installed, but its controller does not answer: {reason}"
        yield Finding(WARNING, "slurm", text, "systemctl start slurmctld slurmd")
