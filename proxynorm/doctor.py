"""Checks of the installation and of what an experiment needs: one finding a line."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image

from proxynorm.data import DataSpec, LoaderSpec, fashion_mnist, open_data
from proxynorm.data.cache import cache_folder
from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.data.ffcv.native import INSTALL, ffcv_library
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.ffcv.verification import find_damage
from proxynorm.data.images import BadImage, StorageOptions, load_rgb
from proxynorm.data.randomness import permutation
from proxynorm.data.sources import list_folder
from proxynorm.errors import ConfigError, DataError, ProxynormError
from proxynorm.train.build import build_model
from proxynorm.train.settings import Settings
from proxynorm.train.tracker import choose_mode

OK, WARNING, MISSING = "ok", "warning", "missing"
TRIAL_IMAGES, TRIAL_CLASSES, SAMPLED_IMAGES = 64, 4, 512
# Copies of the weights that an optimizer holds; RMSProp has two: square and momentum.
OPTIMIZER_COPIES = {"momentum": 1, "sgd": 1}
IMAGENET_BYTES = 65.5e9  # as JPEG-90, longest side 500
# Classes, training and evaluation images of ImageNet; a few images may be left out.
IMAGENET, TOLERANCE = (1000, 1_281_167, 50_000), 0.02
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


def examine(
    settings: Settings, hardware: str | None = None, experiment: str | None = None
) -> Iterator[Finding]:
    """All findings for an experiment; hardware: what the head of its file asks for."""
    checks = {
        "python": check_python(),
        "cuda": check_cuda(settings, hardware),
        "ffcv": check_ffcv(settings),
        "data": check_data(settings),
        "amount": check_amount(settings, experiment),
        "disk": check_disk(settings),
        "memory": check_memory(settings),
        "wandb": check_wandb(settings),
        "slurm": check_slurm(),
    }
    for name, findings in checks.items():
        try:
            yield from findings
        except ProxynormError as error:
            yield Finding(MISSING, name, str(error), "python train.py --help")


def check_python() -> Iterator[Finding]:
    """The interpreter and the packages that this one requires."""
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.platform()}")
    install = "pip install -e ."
    try:
        required = [Requirement(line) for line in metadata.requires("proxynorm") or []]
    except metadata.PackageNotFoundError:
        yield Finding(WARNING, "packages", "proxynorm runs from a folder, not installed", install)
        return
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    found, bad = [], []
    for item in required:
        version = installed_version(item.name)
        found.append(f"{item.name} {version}")
        if version is None or not item.specifier.contains(version, prereleases=True):
            bad.append(f"{item} (found {version or 'none'})")
    if bad:
        yield Finding(MISSING, "packages", ", ".join(bad), install)
    else:
        yield Finding(OK, "packages", ", ".join(found))


def installed_version(package: str) -> str | None:
    """The version of an installed package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_cuda(settings: Settings, hardware: str | None) -> Iterator[Finding]:
    """The GPUs, beside what the experiment's head asks for."""
    asked = f"; the experiment asks for {hardware}" if hardware else ""
    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.0f} GB" for gpu in found)
        yield Finding(OK, "cuda", f"{torch.version.cuda}: {names}{asked}")
        return
    needed = settings.device.startswith("cuda")
    if shutil.which("nvidia-smi"):
        text, remedy = unusable_gpu()
    else:
        text = f"no GPU: training runs on {os.cpu_count()} CPU cores"
        cluster = "sbatch slurm/train.sbatch, on a cluster with GPUs"
        remedy = "device=auto" if needed else cluster if hardware else ""
    status = MISSING if needed else WARNING if remedy else OK
    yield Finding(status, "cuda", text + asked, remedy)


def unusable_gpu() -> tuple[str, str]:
    """Why torch does not see the GPU that the driver knows, and the remedy."""
    reinstall = "pip install --force-reinstall torch torchvision"
    if torch.version.cuda is None:
        remedy = f"{reinstall}, with the index that pytorch.org names for your driver"
        return "this torch is built for CPUs", remedy
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES"
    text = f"the driver does not serve this torch, built for CUDA {torch.version.cuda}"
    remedy = f"nvidia-smi; then update the driver, or {reinstall} built for an older CUDA"
    return text, remedy


def check_ffcv(settings: Settings) -> Iterator[Finding]:
    """FFCV's library, and TRIAL_IMAGES images written and read back."""
    needed = settings.data.name == "beton" or settings.loader.name == "ffcv"
    status = MISSING if needed else WARNING
    try:
        ffcv_library()
        seconds = round_trip()
    except ConfigError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        text = reason if needed else f"{reason}; the torchvision loader serves"
        yield Finding(status, "ffcv", text, INSTALL.partition(": ")[2])
    except Exception as error:  # a broken library can raise anything
        text = f"{TRIAL_IMAGES} images do not survive a round trip: {error}"
        yield Finding(status, "ffcv", text, "pip install --force-reinstall --no-deps ffcv")
    else:
        text = f"{TRIAL_IMAGES} images written, read and compared in {seconds:.1f} s"
        yield Finding(OK, "ffcv", f"{metadata.version('ffcv')}: {text}")


def round_trip() -> float:
    """Write and read a small set with FFCV; seconds. Raises DataError if anything changed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="proxynorm-doctor-") as name:
        folder = Path(name)
        colours = np.random.default_rng(0).integers(0, 256, (TRIAL_IMAGES, 3))
        for number, colour in enumerate(colours):
            path = folder / "images" / str(number % TRIAL_CLASSES) / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (100, 80), tuple(colour.tolist())).save(path, quality=95)
        listing = list_folder(folder / "images")
        for part in ("train", "val"):
            prepare(listing, folder / f"{part}.beton", StorageOptions())
        expected = colours[[int(Path(image.path).stem) for image in listing.images]]
        spec = DataSpec("beton", root=name, augmentation="none")
        (batch,) = open_data(spec, LoaderSpec("ffcv", 1)).eval_loader(TRIAL_IMAGES)
        seen = batch.images.float().mean(dim=(2, 3)).numpy()
    labels_agree = np.array_equal(batch.targets.numpy(), listing.targets)
    if not labels_agree or np.abs(seen - expected).max() >= 6:  # JPEG shifts colours a little
        raise DataError("an image or a label came back changed")
    return time.perf_counter() - start


def check_data(settings: Settings) -> Iterator[Finding]:
    """The data set that the experiment reads."""
    spec = settings.data
    try:
        if spec.name == "fashion_mnist":
            yield check_fashion_mnist(spec)
        elif spec.root is None:
            made = ", made with scripts/write_ffcv.py" if spec.name == "beton" else ""
            yield Finding(MISSING, "data", "data.root is not given", f"data.root=DIR{made}")
        else:
            root = Path(spec.root).expanduser()
            for part in ("train", "val"):
                if spec.name == "folder":
                    yield from check_folder(root / part)
                else:
                    yield check_beton(root / f"{part}.beton")
    except DataError as error:
        remedy = "data.root=DIR"
        if spec.name == "fashion_mnist":
            remedy = f"data.root=null and {fashion_mnist.PACKAGE}"
        yield Finding(MISSING, "data", str(error), remedy)


def check_fashion_mnist(spec: DataSpec) -> Finding:
    if spec.root is None and not fashion_mnist.DEBIAN_FOLDER.is_dir():
        text = "Fashion-MNIST is not installed; the first run downloads it"
        return Finding(WARNING, "data", text, fashion_mnist.PACKAGE)
    folder = fashion_mnist.find_fashion_mnist(spec.root, cache_folder(spec.cache))
    return Finding(OK, "data", f"Fashion-MNIST in {folder}")


def check_folder(folder: Path) -> Iterator[Finding]:
    """One folder of class folders: what is left out, and SAMPLED_IMAGES of its images decoded."""
    listing = list_folder(folder)
    for note in listing.notes:
        yield Finding(WARNING, "data", note, "move or convert what should be trained on")
    images = listing.images
    rows, bad = permutation(0, 0, len(images))[:SAMPLED_IMAGES], []
    # The torchvision loader meets a damaged image only when training draws it.
    for row in rows:
        try:
            load_rgb(images[row], strict=True)
        except BadImage as reason:
            bad.append(f"{images[row].name}: {reason}")
    text = f"{folder}: {len(images)} images, {len(rows)} of them looked at"
    if not bad:
        yield Finding(OK, "data", text)
        return
    remedy = "data.on_bad=skip, or repair or remove them"
    yield Finding(MISSING, "data", f"{text}, {len(bad)} damaged ({bad[0]})", remedy)


def check_beton(path: Path) -> Finding:
    """One .beton file: its manifest, and SAMPLED_IMAGES of its images, checksums and decoding."""
    write = WRITE.format(path)
    rewrite = f"{write} overwrite=true"
    if not path.is_file():
        return Finding(MISSING, "data", f"{path}: no such file", write)
    try:
        samples = read_beton(path)
        rows = np.sort(permutation(0, 0, len(samples))[:SAMPLED_IMAGES])
        damage = find_damage(subset(samples, rows))
    except (DataError, ConfigError) as error:
        return Finding(MISSING, "data", str(error), rewrite)
    if damage:
        text = f"{path}: {len(damage)} of {len(rows)} images looked at are damaged"
        return Finding(MISSING, "data", text, rewrite)
    size = f"{len(samples)} images, {path.stat().st_size / 1e9:.2f} GB"
    text = f"{path}: {size}, {len(rows)} of them looked at"
    if not samples.manifest:
        text += "; no manifest, so classes and later damage cannot be checked"
        return Finding(WARNING, "data", text, rewrite)
    return Finding(OK, "data", f"{text}, as its manifest says")


def subset(samples: Samples, rows: np.ndarray) -> Samples:
    """Some rows of a table of samples."""
    columns = {field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)}
    for name, value in columns.items():
        if isinstance(value, np.ndarray) and len(value):
            columns[name] = value[rows]
    return Samples(**columns)


def check_amount(settings: Settings, experiment: str | None) -> Iterator[Finding]:
    """Enough data for one batch, and ImageNet for ImageNet's recipes."""
    try:
        sizes = data_sizes(settings.data)
    except (DataError, TypeError):  # check_data reports it
        return
    usable = min(sizes[1], settings.data.limit or sizes[1])
    if settings.batch > usable:
        text = f"batch={settings.batch} exceeds the {usable} training images"
        yield Finding(MISSING, "data", text, f"batch={usable}")
    if not (experiment or "").startswith("imagenet_"):
        return
    close = all(abs(size - n) <= TOLERANCE * n for size, n in zip(sizes[1:], IMAGENET[1:]))
    if sizes[0] == IMAGENET[0] and close:
        return
    found = zip(sizes, ("classes", "training images", "evaluation images"), IMAGENET)
    off = ", ".join(f"{size:,} {what} instead of {n:,}" for size, what, n in found if size != n)
    root = f" data.root={settings.data.root}" if settings.data.root else ""
    own = f"python train.py data={settings.data.name}{root} model={settings.model['name']}"
    text = f"experiment={experiment} is ImageNet's recipe, and this is not ImageNet: {off}"
    remedy = f"data.root=DIR of ImageNet, or your own recipe: {own}"
    yield Finding(WARNING, "data", text, remedy)


def data_sizes(spec: DataSpec) -> tuple[int, int, int]:
    """Classes, training and evaluation images. Raises DataError, or TypeError without data.root."""
    if spec.name == "fashion_mnist":
        return len(fashion_mnist.CLASSES), *fashion_mnist.COUNTS.values()
    root = Path(spec.root).expanduser()
    if spec.name == "folder":
        train, evaluation = (list_folder(root / part) for part in ("train", "val"))
        return len(train.classes), len(train.images), len(evaluation.images)
    train, evaluation = (read_beton(root / f"{part}.beton") for part in ("train", "val"))
    classes = len(train.manifest.get("classes", ())) or int(train.target.max()) + 1
    return classes, len(train), len(evaluation)


def check_disk(settings: Settings) -> Iterator[Finding]:
    """Room for the checkpoints and for .beton files."""
    data = settings.data
    classes, channels = (10, 1) if data.name == "fashion_mnist" else (1000, 3)
    model = build_model(settings, classes, channels)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    copies = 1 + OPTIMIZER_COPIES.get(settings.optim.name, 2)
    copies += settings.regularization.ema_decay is not None
    # last.pt, previous.pt and the one being written hold everything, best.pt the weights.
    yield room(Path(settings.runs_dir), (3 * copies + 1) * weights, "checkpoints")
    if data.root is None:
        return
    root = Path(data.root).expanduser()
    if data.name == "folder" and root.is_dir():
        source = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        purpose = "the .beton files made of data.root"
        yield room(cache_folder(data.cache), source, purpose, "data.cache")
    if data.name == "beton" and not (root / "train.beton").is_file():
        yield room(root, IMAGENET_BYTES, "the .beton files of ImageNet", "data.root")


def room(folder: Path, needed: float, purpose: str, key: str = "runs_dir") -> Finding:
    """Compare the free space of a folder's disk with `needed` bytes."""
    free = shutil.disk_usage(existing(folder)).free
    text = f"{folder}: {free / 1e9:.1f} GB free, {purpose} take up to {needed / 1e9:.2f} GB"
    if free > needed:
        return Finding(OK, "disk", text)
    return Finding(MISSING, "disk", text, f"{key}=A LARGER DISK")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_memory(settings: Settings) -> Iterator[Finding]:
    """Available memory beside the training file, which the page cache holds if it fits."""
    available = available_memory()
    text, remedy = f"{available / 1e9:.1f} GB available", ""
    if settings.data.name == "beton":
        file = Path(settings.data.root or "DIR").expanduser() / "train.beton"
        size = file.stat().st_size if file.is_file() else IMAGENET_BYTES
        text += f"; the training file of {size / 1e9:.1f} GB"
        if size > available:
            text += " does not fit, every epoch reads the disk"
            remedy = (
                f"{WRITE.format(file)} overwrite=true max_side=400, or data.root=FAST LOCAL DISK"
            )
        else:
            text += " fits"
    yield Finding(WARNING if remedy else OK, "memory", text, remedy)


def available_memory() -> int:
    """Bytes that programs may still take, page cache included (Linux), else the free pages."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_wandb(settings: Settings) -> Iterator[Finding]:
    """Where W&B logs to."""
    mode = choose_mode(settings.logger.mode)
    text = {
        "offline": "no key: runs are logged offline, into their folders",
        "disabled": "off for this experiment",
    }.get(mode, mode)
    remedy = "wandb login (or logger=none)" if mode == "offline" else ""
    yield Finding(WARNING if remedy else OK, "wandb", text, remedy)


def check_slurm() -> Iterator[Finding]:
    """SLURM's commands, and its controller's answer."""
    if not shutil.which("sbatch"):
        text = "sbatch is not here, so slurm/*.sbatch cannot be submitted"
        local = "torchrun --standalone --nproc-per-node=8 train.py …"
        yield Finding(WARNING, "slurm", text, f"ssh LOGIN-NODE; without SLURM: {local}")
        return
    command = ["sinfo", "--noheader", "--format=%P %D %G"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        works, output = answer.returncode == 0, answer.stdout or answer.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        works, output = False, str(error)
    text = "; ".join(output.split("\n")).strip("; ") or "no partitions"
    if works:
        yield Finding(OK, "slurm", f"partition, nodes, GPUs: {text}")
    else:
        text = f"installed, but its controller does not answer: {text}"
        yield Finding(WARNING, "slurm", text, "systemctl start slurmctld slurmd")
