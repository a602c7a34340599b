"""Where labelled images come from: class folders, a flat folder with a list of labels, ImageNet's tar files."""

from __future__ import annotations

import csv
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proxynorm.data.images import EXTENSIONS, ImageRef
from proxynorm.errors import ConfigError, DataError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class Listing(NamedTuple):
    """Labelled images, in a fixed order: class names, sorted; one reference and one target, int64 (N,), per image.

    aside: the files among them that are not images by their names.
    """

    classes: tuple[str, ...]
    images: list[ImageRef]
    targets: np.ndarray
    aside: tuple[str, ...] = ()


def list_source(source: Path, labels: Path | None = None) -> Listing:
    """The images of `source`: a folder of class folders, a flat folder or tar (with `labels`), or a tar of class tars.

    labels: a CSV whose columns are file name and class (Kaggle's LOC_val_solution.csv is one), or the folder of
    ImageNet's devkit. Raises DataError when something is missing, empty or contradictory.
    """
    source = Path(source)
    if source.is_file() and tarfile.is_tarfile(source):
        return list_tar(source, labels)
    if not source.is_dir():
        raise DataError(f"{source}: no such folder or tar file")
    if not labels:
        return list_folder(source)
    images, aside = _images_in(source)
    return list_flat(images, labels, source)._replace(aside=tuple(aside))


def list_folder(folder: Path) -> Listing:
    """The images of folder/CLASS/*; classes in sorted order. DataError: no folder, no class, a class without images."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(
            f"{folder}: holds no class folders; expected {folder}/CLASS/*.jpg (scripts/write_ffcv.py takes a flat folder "
            "with labels=)"
        )
    images, targets, aside = [], [], []
    for target, name in enumerate(classes):
        found, others = _images_in(folder / name)
        if not found:
            raise DataError(
                f"{folder / name}: class without images ({', '.join(EXTENSIONS)}); fill it or remove the folder"
            )
        images += found
        targets += [target] * len(found)
        aside += others
    return Listing(tuple(classes), images, np.array(targets, dtype=np.int64), tuple(aside))


def _images_in(folder: Path) -> tuple[list[ImageRef], list[str]]:
    """The images of a folder, and the other files in it; hidden ones and folders count as neither."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and not entry.is_dir())
    paths = [os.path.join(folder, name) for name in names]
    images = [ImageRef(path, path) for path in paths if path.lower().endswith(EXTENSIONS)]
    return images, [path for path in paths if not path.lower().endswith(EXTENSIONS)]


def list_flat(images: list[ImageRef], labels: Path, source: Path) -> Listing:
    """Images without class folders, labelled by a CSV or the devkit; an image without a label is a DataError."""
    if not images:
        raise DataError(f"{source}: holds no images ({', '.join(EXTENSIONS)})")
    # A file in a tar is called TAR:NAME.
    stems = [Path(image.name.removeprefix(f"{source}:")).stem for image in images]
    table = _read_devkit(labels) if labels.is_dir() else _read_csv(labels, set(stems))
    names = [table.get(stem) for stem in stems]
    if None in names:
        raise DataError(f"{images[names.index(None)].name}: has no label in {labels}")
    classes = tuple(sorted(set(table.values())))
    number = {name: target for target, name in enumerate(classes)}
    return Listing(classes, images, np.array([number[name] for name in names], dtype=np.int64))


def _read_csv(path: Path, stems: set[str]) -> dict[str, str]:
    """File stem -> class, from the first two columns; of the second only the first word.

    A first line that names none of the images, whose `stems` are given, is a heading and left out.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
        pairs = [(Path(row[0].strip()).stem, row[1].split()[0]) for row in rows]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except (OSError, UnicodeDecodeError, IndexError, csv.Error) as error:
        raise DataError(f"{path}: is no list of labels, lines of FILE,CLASS ({error})") from None
    return dict(pairs[1:] if pairs and pairs[0][0] not in stems else pairs)


def _read_devkit(folder: Path) -> dict[str, str]:
    """File stem -> WNID, from ImageNet's devkit (its folder, or one above or below it)."""
    data = next(folder.rglob(GROUND_TRUTH), folder / GROUND_TRUTH).parent
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ConfigError("reading ImageNet's devkit needs scipy: pip install scipy, or give labels=FILE.csv") from None
    try:
        numbers = [int(line) for line in (data / GROUND_TRUTH).read_text().split()]
        synsets = loadmat(str(data / "meta.mat"), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return {f"ILSVRC2012_val_{n:08d}": wnid[number] for n, number in enumerate(numbers, start=1)}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: is not ImageNet's devkit, with {GROUND_TRUTH} and meta.mat ({error})") from None


def list_tar(path: Path, labels: Path | None) -> Listing:
    """The images of an uncompressed tar, read in place: of class tars (ILSVRC2012_img_train.tar), of CLASS/* files, or,
    with labels, of files without class. DataError if it is compressed, damaged or empty."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if member.isfile()]
        if any(member.name.endswith(".tar") for member in members):
            found = [pair for member in members for pair in _inner_images(path, member)]
        else:
            found = [(Path(m.name).parent.name, _ref(path, m.name, m.offset_data, m.size)) for m in members]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as an uncompressed tar file ({error}); unpack it if it is compressed, else fetch it again"
        ) from None
    aside = tuple(ref.name for _, ref in found if not ref.name.lower().endswith(EXTENSIONS))
    found = sorted(pair for pair in found if pair[1].name.lower().endswith(EXTENSIONS))
    if labels is not None:
        return list_flat([ref for _, ref in found], labels, path)._replace(aside=aside)
    classes = tuple(sorted({name for name, _ in found}))
    if not found or "" in classes:
        raise DataError(
            f"{path}: holds no images in class folders or class tars; give labels= if its images have a list"
        )
    number = {name: target for target, name in enumerate(classes)}
    targets = np.array([number[name] for name, _ in found], dtype=np.int64)
    return Listing(classes, [ref for _, ref in found], targets, aside)


def _inner_images(path: Path, outer: tarfile.TarInfo) -> list[tuple[str, ImageRef]]:
    """The files of a tar within the tar: class (the inner tar's name) and reference."""
    if not outer.name.endswith(".tar"):
        return []
    name = Path(outer.name).stem
    with open(path, "rb") as file:
        file.seek(outer.offset_data)
        # tarfile counts offsets from the start of the file it was given, at whatever position.
        with tarfile.open(fileobj=file, mode="r:") as inner:
            end = outer.offset_data + outer.size
            members = []
            for member in inner:
                if member.offset_data >= end:
                    break
                if member.isfile():
                    members.append(member)
    return [(name, _ref(path, f"{name}/{m.name}", m.offset_data, m.size)) for m in members]


def _ref(path: Path, name: str, offset: int, size: int) -> ImageRef:
    return ImageRef(str(path), f"{path}:{name}", offset, size)
