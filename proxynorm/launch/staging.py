"""Copy the .beton files to a node's own disk or memory: python -m proxynorm.launch.staging FOLDER OVERRIDE…

Once for each node and data set: jobs that come at the same time wait for the copy, later ones find it. It stays when the
job ends; remove FOLDER/proxynorm-UID when it is no longer needed. Prints the override that points data.root at the copy, or
nothing for data that need not be staged.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from proxynorm.cli import guard
from proxynorm.data.ffcv.beton import manifest_path, read_beton, sums_path
from proxynorm.data.ffcv.verification import compare_sums
from proxynorm.errors import DataError
from proxynorm.files import locked
from proxynorm.launch.runs import quoted
from proxynorm.train.config import compose_config, settings_from


def beton_files(root: Path) -> list[Path]:
    """What lies in `root` of train.beton and val.beton and their companions. Raises DataError if a .beton is missing."""
    betons = [root / f"{part}.beton" for part in ("train", "val")]
    for path in betons:
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; STAGE copies .beton files, made by scripts/write_ffcv.py"
            )
    companions = [beside(path) for path in betons for beside in (manifest_path, sums_path)]
    return [*betons, *(path for path in companions if path.is_file())]


def digest(files: Sequence[Path]) -> str:
    """A name for the data set: of its files' names, sizes and dates of change, and of its manifests' content."""
    state = hashlib.sha256()
    for path in files:
        known = path.stat()
        state.update(f"{path.absolute()} {known.st_size} {known.st_mtime_ns}\n".encode())
        state.update(path.read_bytes() if path.suffix == ".json" else b"")
    return state.hexdigest()[:16]


def stage(root: Path, node: Path) -> Path:
    """The folder below `node` with the checked copy of the .beton files in `root`, made if missing.

    Raises DataError if there is no room, or the copy is not what the manifest says.
    """
    files = beton_files(root)
    home, name = own_folder(node), digest(files)
    target = home / name
    with locked(home / f"{name}.lock"):
        if target.is_dir():
            return target
        for part in ("train", "val"):
            read_beton(
                root / f"{part}.beton"
            )  # what is wrong at the source shows before gigabytes are copied
        for leftover in home.glob(f".{name}.*"):
            shutil.rmtree(leftover)
        check_room(files, home)
        temporary = home / f".{name}.{os.getpid()}"
        temporary.mkdir()
        try:
            for path in files:
                shutil.copyfile(path, temporary / path.name)
            for part in ("train", "val"):
                check_copy(root / f"{part}.beton", temporary / f"{part}.beton")
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def own_folder(node: Path) -> Path:
    """The user's folder below `node`. Raises DataError if `node` cannot be written or the folder is another's."""
    home = node / f"proxynorm-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"STAGE={node}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    if home.stat().st_uid != os.getuid():
        raise DataError(f"{home} belongs to another user; choose another folder for STAGE")
    return home


def check_room(files: Sequence[Path], folder: Path) -> None:
    """Raises DataError unless the files fit into the folder's disk or memory, and a twentieth more."""
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(folder).free
    if free < 1.05 * needed:
        raise DataError(
            f"{folder}: {free / 1e9:.2f} GB free, the .beton files take {needed / 1e9:.2f} GB; choose another STAGE, or none"
        )


def check_copy(source: Path, copy: Path) -> None:
    """Raises DataError unless the copy is what its manifest says, or, without manifest, what the source is."""
    samples = read_beton(copy)
    if not samples.manifest:
        if file_digest(source) != file_digest(copy):
            raise DataError(f"{copy} is not the same bytes as {source}; try again")
        return
    damaged = compare_sums(samples)
    if damaged:
        raise DataError(
            f"{source}: {len(damaged)} of {len(samples)} images are damaged, or were while they were copied to {copy.parent}"
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    state = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def main(arguments: Sequence[str]) -> int:
    folder, *overrides = arguments
    data = settings_from(compose_config(overrides)).data
    if data.name == "fashion_mnist":
        print("staging: Fashion-MNIST is small; nothing is copied", file=sys.stderr)
        return 0
    if data.name != "beton":
        raise DataError(
            f"STAGE copies .beton files, not data={data.name}: make them with scripts/write_ffcv.py"
        )
    copy = stage(Path(data.root).expanduser(), Path(os.path.expandvars(folder)))
    print(f"data.root={quoted(str(copy))}")
    return 0


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
