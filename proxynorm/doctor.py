"""What is installed, what is missing, how to get it: one finding a line, for the experiment one means to run."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image

from proxynorm.data import DataInfo, DataSpec, LoaderSpec, fashion_mnist, open_data
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
# The weights; SGD's momentum, or RMSProp's square and momentum. last.pt and previous.pt hold both, best.pt the weights.
OPTIMIZER_COPIES = {"momentum": 1, "sgd": 1}
IMAGENET_BYTES = 65.5e9  # as JPEG-90, longest side 500
# Classes, training and evaluation images that the experiments of this beginning are made for; a few may be left out.
EXPECTED, TOLERANCE = {"imagenet_": (1000, 1_281_167, 50_000)}, 0.02


@dataclass(frozen=True)
class Finding:
    """status: OK, WARNING or MISSING (the experiment cannot run); what was found; the command that mends it."""

    status: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; mend it with: {self.remedy}" if self.remedy else ""
        return f"{self.status:<8} {self.subject:<9} {self.text}{remedy}"


def check_python() -> Iterator[Finding]:
    """The interpreter and the packages that this one requires."""
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.platform()}")
    try:
        lines = metadata.requires("proxynorm") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            WARNING, "packages", "proxynorm runs from a folder, not installed", "pip install -e ."
        )
        return
    required = [Requirement(line) for line in lines]
    required = [
        item for item in required if item.marker is None or item.marker.evaluate({"extra": ""})
    ]
    bad = [f"{item} (found {found})" for item in required if (found := lacking(item))]
    if bad:
        yield Finding(MISSING, "packages", ", ".join(bad), "pip install -e .")
    else:
        yield Finding(
            OK,
            "packages",
            ", ".join(f"{item.name} {metadata.version(item.name)}" for item in required),
        )


def lacking(item: Requirement) -> str | None:
    """What there is instead of the required version: another one, or none; None if it is there."""
    try:
        version = metadata.version(item.name)
    except metadata.PackageNotFoundError:
        return "none"
    return None if item.specifier.contains(version, prereleases=True) else version


def check_cuda(settings: Settings, hardware: str | None) -> Iterator[Finding]:
    """The GPUs, beside what the experiment's head asks for."""
    asked = f"; the experiment asks for {hardware}" if hardware else ""
    if torch.cuda.is_available():
        found = [
            torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
        ]
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.0f} GB" for gpu in found)
        yield Finding(OK, "cuda", f"{torch.version.cuda}: {names}{asked}")
        return
    status = MISSING if settings.device.startswith("cuda") else WARNING if hardware else OK
    if shutil.which("nvidia-smi"):
        status = WARNING if status == OK else status
        yield Finding(status, "cuda", *unusable_gpu(asked))
        return
    remedy = (
        ""
        if status == OK
        else "device=auto"
        if status == MISSING
        else "sbatch slurm/train.sbatch, on a cluster with GPUs"
    )
    yield Finding(
        status, "cuda", f"no GPU: training runs on {os.cpu_count()} CPU cores{asked}", remedy
    )


def unusable_gpu(asked: str) -> tuple[str, str]:
    """Why torch does not see the GPU that the driver knows, and the command that mends it."""
    if torch.version.cuda is None:
        command = "pip install --force-reinstall torch torchvision, with the index that pytorch.org names for your driver"
        return f"this torch is built for CPUs{asked}", command
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES hides every GPU{asked}", "unset CUDA_VISIBLE_DEVICES"
    command = "nvidia-smi; then update the driver, or pip install --force-reinstall a torch built for an older CUDA"
    return (
        f"the driver does not serve this torch, built for CUDA {torch.version.cuda}{asked}",
        command,
    )


def check_ffcv(settings: Settings) -> Iterator[Finding]:
    """FFCV's library, and TRIAL_IMAGES images written, read back and counted."""
    needed = settings.data.name == "beton" or settings.loader.name == "ffcv"
    try:
        ffcv_library()
        seconds = round_trip()
    except ConfigError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        yield Finding(
            MISSING if needed else WARNING,
            "ffcv",
            reason + ("" if needed else "; the torchvision loader serves"),
            INSTALL.partition(": ")[2],
        )
        return
    except Exception as error:
        yield Finding(
            MISSING if needed else WARNING,
            "ffcv",
            f"{TRIAL_IMAGES} images do not survive a round trip: {error}",
            "pip install --force-reinstall --no-deps ffcv",
        )
        return
    yield Finding(
        OK,
        "ffcv",
        f"{metadata.version('ffcv')}: {TRIAL_IMAGES} images written, read and counted in {seconds:.1f} s",
    )


def round_trip() -> float:
    """Write and read a small set with FFCV; seconds. Raises DataError if a label or an image comes back changed."""
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
        colours_seen = batch.images.float().mean(dim=(2, 3)).numpy()
    if not (
        np.array_equal(batch.targets.numpy(), listing.targets)
        and np.abs(colours_seen - expected).max() < 6
    ):
        raise DataError("an image or a label came back changed")
    return time.perf_counter() - start


def check_data(settings: Settings) -> Iterator[Finding]:
    """The data set that the experiment reads; .beton files beside their manifests."""
    spec = settings.data
    try:
        if spec.name == "fashion_mnist":
            yield check_fashion_mnist(spec)
        elif spec.root is None:
            yield Finding(
                MISSING,
                "data",
                "data.root is not given",
                "data.root=DIR"
                + (", made with scripts/write_ffcv.py" if spec.name == "beton" else ""),
            )
        elif spec.name == "folder":
            yield from (
                check_folder(Path(spec.root).expanduser() / part) for part in ("train", "val")
            )
        else:
            yield from (
                check_beton(Path(spec.root).expanduser() / f"{part}.beton")
                for part in ("train", "val")
            )
    except DataError as error:
        remedy = (
            f"data.root=null and {fashion_mnist.PACKAGE}"
            if spec.name == "fashion_mnist"
            else "data.root=DIR"
        )
        yield Finding(MISSING, "data", str(error), remedy)


def check_folder(folder: Path) -> Finding:
    """One folder of class folders, SAMPLED_IMAGES of its images decoded; the torchvision loader looks no earlier."""
    images = list_folder(folder).images
    bad = []
    for row in permutation(0, 0, len(images))[:SAMPLED_IMAGES]:
        try:
            load_rgb(images[row], strict=True)
        except BadImage as reason:
            bad.append(f"{images[row].name}: {reason}")
    looked = f"{folder}: {len(images)} images, {min(len(images), SAMPLED_IMAGES)} of them looked at"
    if not bad:
        return Finding(OK, "data", looked)
    return Finding(
        MISSING,
        "data",
        f"{looked}, {len(bad)} damaged ({bad[0]})",
        "data.on_bad=skip, or mend or remove them",
    )


def check_fashion_mnist(spec: DataSpec) -> Finding:
    if spec.root is None and not fashion_mnist.DEBIAN_FOLDER.is_dir():
        return Finding(
            WARNING,
            "data",
            "Fashion-MNIST is not installed; the first run downloads it",
            fashion_mnist.PACKAGE,
        )
    folder = fashion_mnist.find_fashion_mnist(spec.root, cache_folder(spec.cache))
    return Finding(OK, "data", f"Fashion-MNIST in {folder}")


def check_beton(path: Path) -> Finding:
    """One .beton file: its manifest, and SAMPLED_IMAGES of its images against their sums and through the decoder."""
    rewrite = f"python scripts/write_ffcv.py source=DIR output={path} overwrite=true"
    if not path.is_file():
        return Finding(
            MISSING, "data", f"{path}: no such file", rewrite.removesuffix(" overwrite=true")
        )
    try:
        samples = read_beton(path)
        rows = np.sort(permutation(0, 0, len(samples))[:SAMPLED_IMAGES])
        damage = find_damage(subset(samples, rows))
    except (DataError, ConfigError) as error:
        return Finding(MISSING, "data", str(error), rewrite)
    if damage:
        return Finding(
            MISSING,
            "data",
            f"{path}: {len(damage)} of {len(rows)} images looked at are damaged",
            rewrite,
        )
    size = (
        f"{len(samples)} images, {path.stat().st_size / 1e9:.2f} GB, {len(rows)} of them looked at"
    )
    if not samples.manifest:
        return Finding(
            WARNING,
            "data",
            f"{path}: {size}; no manifest, so classes and later damage cannot be checked",
            rewrite,
        )
    return Finding(OK, "data", f"{path}: {size}, as its manifest says")


def subset(samples: Samples, rows: np.ndarray) -> Samples:
    """Some rows of a table of samples."""
    columns = {field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)}
    return Samples(
        **{
            name: value[rows] if isinstance(value, np.ndarray) and len(value) else value
            for name, value in columns.items()
        }
    )


def check_amount(settings: Settings, experiment: str | None) -> Iterator[Finding]:
    """Whether the data is what the experiment was made for, and enough for one batch."""
    try:
        classes, train, evaluation = data_sizes(settings.data)
    except (DataError, TypeError):  # check_data has told it
        return
    usable = min(train, settings.data.limit or train)
    if settings.batch > usable:
        text = f"batch={settings.batch} exceeds the {usable} training images"
        yield Finding(MISSING, "data", text, f"batch={usable}")
    expected = next(
        (sizes for name, sizes in EXPECTED.items() if (experiment or "").startswith(name)), None
    )
    if expected is None:
        return
    off = [
        f"{found:,} {what} instead of {wanted:,}"
        for what, found, wanted, tolerance in zip(
            ("classes", "training images", "evaluation images"),
            (classes, train, evaluation),
            expected,
            (0, TOLERANCE, TOLERANCE),
        )
        if abs(found - wanted) > tolerance * wanted
    ]
    if off:
        root = f" data.root={settings.data.root}" if settings.data.root else ""
        own = f"python train.py data={settings.data.name}{root} model={settings.model['name']}"
        yield Finding(
            WARNING,
            "data",
            f"experiment={experiment} is ImageNet's recipe, and this is not ImageNet: {', '.join(off)}",
            f"data.root=DIR of ImageNet, or your own recipe: {own}",
        )


def data_sizes(spec: DataSpec) -> tuple[int, int, int]:
    """Classes, training and evaluation images. Raises DataError, or TypeError without data.root."""
    if spec.name == "fashion_mnist":
        return len(fashion_mnist.CLASSES), *fashion_mnist.COUNTS.values()
    root = Path(spec.root).expanduser()
    if spec.name == "folder":
        train, evaluation = (list_folder(root / part) for part in ("train", "val"))
        return len(train.classes), len(train.images), len(evaluation.images)
    train, evaluation = (read_beton(root / f"{part}.beton") for part in ("train", "val"))
    return (
        len(train.manifest.get("classes", ())) or int(train.target.max()) + 1,
        len(train),
        len(evaluation),
    )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_disk(settings: Settings) -> Iterator[Finding]:
    """Room for the checkpoints and for files made on the fly."""
    classes = 10 if settings.data.name == "fashion_mnist" else 1000
    info = DataInfo("", tuple(map(str, range(classes))), 1 if classes == 10 else 3, 1, 1, (), ())
    model = build_model(settings, len(info.classes), info.channels)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    copies = (
        1
        + OPTIMIZER_COPIES.get(settings.optim.name, 2)
        + (settings.regularization.ema_decay is not None)
    )
    # last.pt, previous.pt and the one being written hold everything, best.pt the weights.
    yield room(Path(settings.runs_dir), (3 * copies + 1) * weights, "checkpoints")
    if settings.data.root is None:
        return
    root = Path(settings.data.root).expanduser()
    if settings.data.name == "folder" and root.is_dir():
        source = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        yield room(
            cache_folder(settings.data.cache),
            source,
            "the .beton files made of data.root",
            "data.cache",
        )
    if settings.data.name == "beton" and not (root / "train.beton").is_file():
        yield room(root, IMAGENET_BYTES, "the .beton files of ImageNet", "data.root")


def room(folder: Path, needed: float, purpose: str, key: str = "runs_dir") -> Finding:
    """Whether a folder's disk has room for `needed` bytes."""
    free = shutil.disk_usage(existing(folder)).free
    text = f"{folder}: {free / 1e9:.1f} GB free, {purpose} take up to {needed / 1e9:.2f} GB"
    return (
        Finding(OK, "disk", text)
        if free > needed
        else Finding(MISSING, "disk", text, f"{key}=A LARGER DISK")
    )


def check_memory(settings: Settings) -> Iterator[Finding]:
    """Available memory beside the data files, which the system keeps in memory if they fit."""
    available = available_memory()
    text, size = f"{available / 1e9:.1f} GB available", 0
    if settings.data.name == "beton":
        file = Path(settings.data.root or "DIR").expanduser() / "train.beton"
        size = file.stat().st_size if file.is_file() else IMAGENET_BYTES
    if size > available:
        yield Finding(
            WARNING,
            "memory",
            f"{text}; the training file of {size / 1e9:.1f} GB does not fit, every epoch reads the disk",
            f"python scripts/write_ffcv.py source=DIR output={file} overwrite=true max_side=400, or data.root=FAST LOCAL DISK",
        )
    else:
        yield Finding(
            OK,
            "memory",
            text + (f"; the training file of {size / 1e9:.1f} GB fits" if size else ""),
        )


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
    notes = {"online": "online", "disabled": "off for this experiment"}
    if mode == "offline":
        yield Finding(
            WARNING,
            "wandb",
            "no key: runs are logged offline, into their folders",
            "wandb login (or logger=none)",
        )
    else:
        yield Finding(OK, "wandb", notes.get(mode, mode))


def check_slurm(settings: Settings) -> Iterator[Finding]:
    """SLURM's commands and whether its controller answers."""
    if not shutil.which("sbatch"):
        yield Finding(
            WARNING,
            "slurm",
            "sbatch is not here, so slurm/*.sbatch cannot be submitted",
            "ssh LOGIN-NODE; without SLURM: torchrun --standalone --nproc-per-node=8 train.py …",
        )
        return
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %D %G"],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
        )
        fine, said = answer.returncode == 0, (answer.stdout or answer.stderr).strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        fine, said = False, [str(error)]
    text = said[0] if said else "no partitions"
    if fine:
        yield Finding(OK, "slurm", f"partition, nodes, GPUs: {'; '.join(said) or text}")
    else:
        yield Finding(
            WARNING,
            "slurm",
            f"installed, but its controller does not answer: {text}",
            "systemctl start slurmctld slurmd",
        )


def examine(
    settings: Settings, hardware: str | None = None, experiment: str | None = None
) -> Iterator[Finding]:
    """All findings for an experiment; hardware: what its head says it needs; both None for the default experiment."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": check_python,
        "cuda": lambda: check_cuda(settings, hardware),
        "ffcv": lambda: check_ffcv(settings),
        "data": lambda: check_data(settings),
        "amount": lambda: check_amount(settings, experiment),
        "disk": lambda: check_disk(settings),
        "memory": lambda: check_memory(settings),
        "wandb": lambda: check_wandb(settings),
        "slurm": lambda: check_slurm(settings),
    }
    for name, check in checks.items():
        try:
            yield from check()
        except ProxynormError as error:
            yield Finding(
                MISSING, name, str(error), "python train.py --help, which lists what can be given"
            )
