"""Check what is installed and what an experiment needs.

  python scripts/doctor.py     # default experiment
  python scripts/doctor.py experiment=imagenet_resnet50 data.root=DIR norm=bn

Takes the arguments of train.py and checks what that run would need.
Each line says ok, warning or missing, and how to fix it. The exit status is 2
if something that the run needs is missing, else 0.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from packaging.requirements import Requirement

from proxynorm.cli import as_installed
from proxynorm.data import Data, DataSpec, LoaderSpec, fashion_mnist, open_data
from proxynorm.data.ffcv.native import INSTALL, ffcv_library
from proxynorm.data.loaders import Split
from proxynorm.data.randomness import permutation
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.train.build import build_model
from proxynorm.train.config import CONFIGS, choices, compose_config, settings_from
from proxynorm.train.finetune import PUBLISHED, carry_over, read_weights, source_of
from proxynorm.train.settings import Settings, folder_of
from proxynorm.train.tracker import choose_mode

OK, WARNING, MISSING = "ok", "warning", "missing"
INDENT = " " * 19  # as wide as a finding's status and subject
SAMPLED_IMAGES = 256
IMAGENET = {"classes": 1000, "training images": 1_281_167, "evaluation images": 50_000}
REMEDIES = {  # for data that cannot be opened, by data.name
    "fashion_mnist": f"data.root=null and {fashion_mnist.PACKAGE}",
    "beton": "python scripts/write_ffcv.py source=DIR output=ROOT/PART.beton overwrite=true, and "
    "data.root=ROOT",
}
TOLERANCE = 0.02  # the share of ImageNet that may be missing, for example damaged images


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    status: OK, WARNING or MISSING (the experiment cannot run); remedy: how to fix it.
    """

    status: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; fix: {self.remedy}" if self.remedy else ""
        return f"{self.status:<8} {self.subject:<9} {self.text}{remedy}"


def examine(settings: Settings, experiment: str | None = None) -> Iterator[Finding]:
    """Yield the findings of all checks.

    The data set is opened once, by the functions that training uses.
    """
    yield check_packages()
    yield check_cuda(settings, hardware_of(experiment))
    yield check_ffcv(settings)
    try:
        data = open_without_conversion(settings.data)
        if data is None:
            text = "Fashion-MNIST is not installed; the first run downloads it"
            yield Finding(WARNING, "data", text, fashion_mnist.PACKAGE)
        else:
            yield from check_data(data, settings.data.on_bad)
            counts = len(data.info.classes), data.info.train_count, data.info.eval_count
            yield from check_counts(settings, experiment, counts)
            yield from check_weights(settings, data)
    except ProxynormError as error:
        remedy = REMEDIES.get(settings.data.name, "data.root=DIR")
        yield Finding(MISSING, "data", str(error), remedy)
    yield check_wandb(settings)
    yield check_slurm()


def hardware_of(experiment: str | None) -> str | None:
    """Return the hardware that an experiment's file asks for in its first lines."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    found = re.search(r"^# hardware: (.*)", path.read_text(), re.M) if path.is_file() else None
    return found and found[1]


def check_packages() -> Finding:
    """Check the interpreter and the packages that training requires."""
    python = f"python {platform.python_version()} on {platform.platform()}"
    install = "install proxynorm's extra [train]; in a checkout: pip install -e '.[train]'"
    try:
        lines = metadata.requires("proxynorm") or []
    except metadata.PackageNotFoundError:
        text = f"{python}; proxynorm runs from a folder, not installed"
        return Finding(WARNING, "packages", text, install)
    found, bad = [python], []
    for item in map(Requirement, lines):
        if item.marker is not None and not item.marker.evaluate({"extra": "train"}):
            continue
        version = next((d.version for d in metadata.distributions(name=item.name)), None)
        if version is not None and item.specifier.contains(version, prereleases=True):
            found.append(f"{item.name} {version}")
        else:
            bad.append(f"{item.name}{item.specifier} (found: {version})")
    if bad:
        return Finding(MISSING, "packages", ", ".join(bad), install)
    return Finding(OK, "packages", ", ".join(found))


def check_cuda(settings: Settings, hardware: str | None) -> Finding:
    """Check the GPUs; hardware: what the experiment asks for."""
    asked = f"; the experiment asks for {hardware}" if hardware else ""
    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.0f} GB" for gpu in found)
        return Finding(OK, "cuda", f"{torch.version.cuda}: {names}{asked}")
    needed = settings.device.startswith("cuda")
    if shutil.which("nvidia-smi"):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
        text = f"this torch, built for {built}, sees no GPU"
        remedy = (
            "unset CUDA_VISIBLE_DEVICES, or install the torch that pytorch.org names for the "
            "driver that nvidia-smi shows"
        )
    else:
        text = f"no GPU: training runs on {os.cpu_count()} CPU cores"
        cluster = "sbatch slurm/train.sbatch, on a cluster with GPUs" if hardware else ""
        remedy = "device=auto" if needed else cluster
    status = MISSING if needed else WARNING if remedy else OK
    return Finding(status, "cuda", text + asked, remedy)


def check_ffcv(settings: Settings) -> Finding:
    """Check FFCV's library."""
    needed = settings.data.name == "beton" or settings.loader.name == "ffcv"
    try:
        ffcv_library()
        return Finding(OK, "ffcv", metadata.version("ffcv"))
    except ConfigError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        text = reason if needed else f"{reason}; the torchvision loader serves"
        return Finding(MISSING if needed else WARNING, "ffcv", text, INSTALL.partition(": ")[2])


def open_without_conversion(spec: DataSpec) -> Data | None:
    """Open the data set as training does; None if the first run will download it.

    A folder is not converted for FFCV, and damaged images are skipped.
    """
    installed = spec.root is not None or fashion_mnist.DEBIAN_FOLDER.is_dir()
    if spec.name == "fashion_mnist" and not installed:
        return None
    loader = LoaderSpec("ffcv", 1) if spec.name == "beton" else LoaderSpec("torchvision", 0)
    return open_data(dataclasses.replace(spec, on_bad="skip"), loader)


def check_data(data: Data, on_bad: str) -> Iterator[Finding]:
    """Check a sample of the images by decoding them as training does.

    on_bad: the run's own setting; `data` skips damaged images.
    """
    for line in data.warnings:
        remedy = "repair the folder, write the .beton files again, or change the key"
        yield Finding(WARNING, "data", line, remedy)
    for split in (data.train, data.evaluation):
        order = permutation(0, 0, len(split.rows))[:SAMPLED_IMAGES]
        sample = Split(split.reader, np.sort(split.rows[order]))
        before = len(data.failures)
        for _ in dataclasses.replace(data, evaluation=sample).eval_loader(64):
            pass
        text = f"{split.reader.source}: {len(split.rows)} images, {len(order)} of them decoded"
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


def check_counts(
    settings: Settings, experiment: str | None, counts: tuple[int, int, int]
) -> Iterator[Finding]:
    """Check that there are enough images for a batch and, for ImageNet's recipes, all of ImageNet.

    counts: of classes, training images and evaluation images.
    """
    spec = settings.data
    if settings.batch > counts[1]:
        text = f"batch={settings.batch} exceeds the {counts[1]} training images"
        yield Finding(MISSING, "data", text, f"batch={counts[1]}")
    if not (experiment or "").startswith("imagenet_") or spec.limit or spec.holdout:
        return
    differing = [
        f"{count:,} {what} instead of {expected:,}"
        for count, (what, expected) in zip(counts, IMAGENET.items())
        if abs(count - expected) > TOLERANCE * expected
    ]
    if differing:
        text = f"experiment={experiment} is ImageNet's recipe, and this is not ImageNet"
        own = f"python train.py data={spec.name} model={settings.model['name']}"
        remedy = f"data.root=DIR of ImageNet, or your own recipe: {own}"
        yield Finding(WARNING, "data", f"{text}: {', '.join(differing)}", remedy)


def check_weights(settings: Settings, data: Data) -> Iterator[Finding]:
    """Check that a new run can start from its weights; a resumed run does not need them."""
    source = source_of(settings)
    if source in (None, PUBLISHED):
        return
    classes, channels = data.info.classes, data.info.channels
    try:
        if (folder_of(settings) / "checkpoints").is_dir():
            return
        weights = read_weights(source, settings, len(classes), channels)
        model = build_model(settings, len(classes), channels)
        notes = carry_over(model, weights, settings, list(classes))["notes"]
        yield Finding(OK, "weights", "; ".join(notes))
    except ProxynormError as error:
        yield Finding(MISSING, "weights", str(error))


def check_wandb(settings: Settings) -> Finding:
    """Check where W&B logs to."""
    mode = choose_mode(settings.logger.mode)
    if mode == "offline":
        text = "no key: runs are logged offline, into their folders"
        return Finding(WARNING, "wandb", text, "wandb login (or logger=none)")
    return Finding(OK, "wandb", "off for this experiment" if mode == "disabled" else mode)


def check_slurm() -> Finding:
    """Check SLURM's commands and its controller."""
    if not shutil.which("sbatch"):
        text = "no sbatch command, so slurm/*.sbatch cannot be submitted"
        local = "torchrun --standalone --nproc-per-node=8 train.py …"
        return Finding(WARNING, "slurm", text, f"ssh LOGIN-NODE; without SLURM: {local}")
    command = ["sinfo", "--noheader", "--format=%P %D %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).splitlines()[0]
        text = f"installed, but its controller does not answer: {reason}"
        return Finding(WARNING, "slurm", text, "systemctl start slurmctld slurmd")
    text = "; ".join(done.stdout.splitlines()) or "none"
    return Finding(OK, "slurm", f"partition, nodes, GPUs: {text}")


def _fitted(line: str) -> str:
    """Wrap a finding to the terminal's width; in a file or pipe, it stays one line."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=INDENT, break_long_words=False)


def entry() -> int:
    """Print the findings; return 2 if something is missing."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(as_installed(__doc__.strip()))
        return 0
    try:
        settings = settings_from(compose_config(arguments))
    except ConfigError as error:
        if "data.root must be given" not in str(error):
            raise
        # The rest can still be checked; the missing folder becomes a finding.
        settings = settings_from(compose_config([*arguments, "data.root=null"]))
    missing = False
    for finding in examine(settings, choices(arguments)["experiment"]):
        print(_fitted(as_installed(str(finding))), flush=True)
        missing |= finding.status == MISSING
    return 2 if missing else 0
