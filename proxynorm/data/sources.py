"""Where labelled images come from: class folders, a flat folder with a list of labels, ImageNet's
tar files."""

from __future__ import annotations

import csv
import os
import posixpath
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from proxynorm.data.images import EXTENSIONS, ImageRef
from proxynorm.errors import ConfigError, DataError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class Listing(NamedTuple):
    """Labelled images, in a fixed order: class names, sorted; one reference and one target, int64
    (N,), per image.

    aside: the files among them that were left out, as their names are no images' or they lie
    outside the class folders;
    notes: what else the user should be told, one line each.
    """

    classes: tuple[str, ...]
    images: list[ImageRef]
    targets: np.ndarray
    aside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def list_source(source: Path, labels: Path | None = None) -> Listing:
    """The images of `source`: a folder of class folders, a flat folder or tar (with `labels`), or a
    tar of class tars.

    labels: a CSV whose columns are file name and class (Kaggle's LOC_val_solution.csv is one), or
    the folder of ImageNet's devkit. Raises DataError when something is missing, empty or
    contradictory.
    """
    source = Path(source)
    if source.is_file() and tarfile.is_tarfile(source):
        return list_tar(source, labels)
    if not source.is_dir():
        raise DataError(f"{source}: no such folder or tar file")
    if not labels:
        return list_folder(source)
    images, aside = _images_in(source)
    if not images and any(path.lower().endswith(EXTENSIONS) for path in aside):
        raise DataError(
            f"{source}: holds its images in folders; if these are the classes, drop labels={labels}"
        )
    return list_flat(images, labels, source)._replace(aside=tuple(aside))


def list_folder(folder: Path) -> Listing:
    """The images of folder/CLASS/*; classes in sorted order. DataError: no folder, no class, a
    class without images."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    classes, beside = _entries(folder)
    if not classes:
        raise DataError(
            f"{folder}: holds no class folders; expected {folder}/CLASS/*.jpg "
            f"(scripts/write_ffcv.py takes a flat folder "
            "with labels=)"
        )
    images, targets, aside = [], [], [os.path.join(folder, name) for name in beside]
    for target, name in enumerate(classes):
        found, others = _images_in(folder / name)
        if not found:
            raise _no_images(folder / name, others)
        images += found
        targets += [target] * len(found)
        aside += others
    return Listing(tuple(classes), images, np.array(targets, dtype=np.int64), tuple(aside))


def _no_images(folder: Path, others: list[str]) -> DataError:
    """A class folder without images; others: the files that lie in it or below it."""
    deeper = [path for path in others if path.lower().endswith(EXTENSIONS)]
    if deeper:
        example = (
            f", such as {folder.parent / 'train'}" if (folder.parent / "train").is_dir() else ""
        )
        return DataError(
            f"{folder.parent}: holds folders of folders; give one whose folders hold "
            f"images{example}"
        )
    return DataError(
        f"{folder}: class without images ({', '.join(EXTENSIONS)}); fill it or remove the folder"
    )


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, each sorted, hidden ones left out."""
    folders, files = [], []
    for entry in os.scandir(folder):
        if not entry.name.startswith("."):
            (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def _images_in(folder: Path) -> tuple[list[ImageRef], list[str]]:
    """The images of a folder, and the other files in it and all below it; hidden ones count as
    neither."""
    folders, names = _entries(folder)
    paths = [os.path.join(folder, name) for name in names]
    images = [ImageRef(path, path) for path in paths if path.lower().endswith(EXTENSIONS)]
    others = [path for path in paths if not path.lower().endswith(EXTENSIONS)]
    return images, others + [path for name in folders for path in _files_below(folder / name)]


def _files_below(folder: Path) -> list[str]:
    """Every file in a folder and below it, hidden ones left out; links to folders are not
    followed."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(place, name) for name in sorted(files) if not name.startswith(".")]
    return found


def list_flat(images: list[ImageRef], labels: Path, source: Path) -> Listing:
    """Images without class folders, labelled by a CSV or the devkit; an image without a label is a
    DataError."""
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
    targets = np.array([number[name] for name in names], dtype=np.int64)
    return Listing(
        classes,
        images,
        targets,
        notes=_unused_labels(table, set(stems), classes, set(names), labels),
    )


def _unused_labels(
    table: dict[str, str],
    stems: set[str],
    classes: tuple[str, ...],
    present: set[str],
    labels: Path,
) -> tuple[str, ...]:
    """A line on the labels that have no image, and on the classes that have none; such classes keep
    their numbers."""
    unused = [stem for stem in table if stem not in stems]
    if not unused:
        return ()
    line = (
        f"{len(unused)} of the {len(table)} labels in {labels} have no image (the first: "
        f"{unused[0]})"
    )
    absent = [name for name in classes if name not in present]
    if absent:
        line += (
            f"; {len(absent)} of the {len(classes)} classes have none and are kept (the first: "
            f"{absent[0]})"
        )
    return (line,)


def _read_csv(path: Path, stems: set[str]) -> dict[str, str]:
    """File stem -> class, from the first two columns; of the second only the first word.

    A first line that names none of the images, whose `stems` are given, is a heading and left out.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no list of labels, lines of FILE,CLASS ({error})") from None
    pairs = [_label(path, number, row) for number, row in lines]
    if pairs and pairs[0][0] not in stems:
        del pairs[0]
    table: dict[str, str] = {}
    for stem, name in pairs:
        if table.setdefault(stem, name) != name:
            raise DataError(
                f"{path}: gives {stem} two classes, {table[stem]} and {name}; leave the right one"
            )
    return table


def _label(path: Path, number: int, row: list[str]) -> tuple[str, str]:
    """File stem and class from a line of a list of labels, split at its commas. Raises
    DataError."""
    if len(row) < 2 or not row[0].strip() or not row[1].strip():
        raise DataError(
            f"{path}, line {number}: '{','.join(row)[:60]}' is not FILE,CLASS; separate them by a "
            f"comma"
        )
    return Path(row[0].strip()).stem, row[1].split()[0]


def _read_devkit(folder: Path) -> dict[str, str]:
    """File stem -> WNID, from ImageNet's devkit (its folder, or one above or below it)."""
    data = next(folder.rglob(GROUND_TRUTH), folder / GROUND_TRUTH).parent
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ConfigError(
            "reading ImageNet's devkit needs scipy: pip install scipy, or give labels=FILE.csv"
        ) from None
    try:
        numbers = [int(line) for line in (data / GROUND_TRUTH).read_text().split()]
        synsets = loadmat(str(data / "meta.mat"), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return {
            f"ILSVRC2012_val_{n:08d}": wnid[number] for n, number in enumerate(numbers, start=1)
        }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: is not ImageNet's devkit, with {GROUND_TRUTH} and meta.mat ({error})"
        ) from None


class _File(NamedTuple):
    """A file of a tar: the class folder, or the class tar, that it lies in, and where its bytes
    are."""

    folder: PurePosixPath
    ref: ImageRef


def list_tar(path: Path, labels: Path | None) -> Listing:
    """The images of an uncompressed tar, read in place: of class tars (ILSVRC2012_img_train.tar),
    of CLASS/* files, or, with labels, of files without class. DataError if it is compressed,
    damaged or empty, holds a file twice, or class folders in several places, such as train/CLASS
    and val/CLASS."""
    try:
        files, aside = _tar_files(path)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as an uncompressed tar file ({error}); unpack it if it is "
            f"compressed, else fetch it again"
        ) from None
    aside += [file.ref.name for file in files if not file.ref.name.lower().endswith(EXTENSIONS)]
    files = [file for file in files if file.ref.name.lower().endswith(EXTENSIONS)]
    name, count = next(iter(Counter(file.ref.name for file in files).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(
            f"{path}: holds {name.removeprefix(f'{path}:')} {count} times; make the archive anew"
        )
    if labels is not None:
        refs = [
            file.ref for file in sorted(files, key=lambda file: (file.folder.name, file.ref.name))
        ]
        return list_flat(refs, labels, path)._replace(aside=tuple(aside))
    top = _place_of_classes(path, files)
    aside += [file.ref.name for file in files if not _is_class(file.folder, top)]
    pairs = sorted((file.folder.name, file.ref) for file in files if _is_class(file.folder, top))
    classes = tuple(sorted({name for name, _ in pairs}))
    number = {name: target for target, name in enumerate(classes)}
    targets = np.array([number[name] for name, _ in pairs], dtype=np.int64)
    return Listing(classes, [ref for _, ref in pairs], targets, tuple(aside))


def _is_class(folder: PurePosixPath, top: PurePosixPath) -> bool:
    return folder.parent == top and folder.name != ""


def _place_of_classes(path: Path, files: list[_File]) -> PurePosixPath:
    """The folder in the tar whose folders are the classes. DataError if there is none, or more than
    one.

    As in a folder, images beside the class folders, or in folders below them, belong to no class.
    """
    folders = Counter(file.folder for file in files if file.folder.name)
    if not folders:
        raise DataError(
            f"{path}: holds no images in class folders or class tars; give labels= if its images "
            f"have a list"
        )
    places: Counter[PurePosixPath] = Counter()
    for folder, count in folders.items():
        places[folder.parent] += count
    top = places.most_common(1)[0][0]
    for folder in folders:
        in_a_class = any(above in folders and _is_class(above, top) for above in folder.parents)
        if not (_is_class(folder, top) or in_a_class or top.is_relative_to(folder)):
            raise DataError(
                f"{path}: holds class folders in several places ({top}/ and {folder.parent}/); "
                f"make an archive of one of them"
            )
    return top


def _tar_files(path: Path) -> tuple[list[_File], list[str]]:
    """The files of a tar and of the tars in it; the names of what is no file, such as links. Hidden
    ones are neither."""
    files, aside = [], []
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name = posixpath.normpath(member.name)
            if member.isdir() or _is_hidden(name):
                continue
            if not member.isfile():
                aside.append(f"{path}:{name}")
            elif name.endswith(".tar"):
                folder = PurePosixPath(name).with_suffix("")
                files += [_File(folder, ref) for ref in _inner_files(path, member, folder)]
            else:
                files.append(_File(PurePosixPath(name).parent, _ref(path, name, member)))
    return files, aside


def _inner_files(path: Path, outer: tarfile.TarInfo, folder: PurePosixPath) -> list[ImageRef]:
    """The files of a tar within the tar, at whatever depth, hidden ones left out."""
    with open(path, "rb") as file:
        file.seek(outer.offset_data)
        # tarfile counts offsets from the start of the file it was given, at whatever position.
        with tarfile.open(fileobj=file, mode="r:") as inner:
            end = outer.offset_data + outer.size
            refs = []
            for member in inner:
                if member.offset_data >= end:
                    break
                name = posixpath.normpath(member.name)
                if member.isfile() and not _is_hidden(name):
                    refs.append(_ref(path, f"{folder}/{name}", member))
    return refs


def _is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is hidden, as the ._* files are that macOS adds
    to a tar."""
    return any(part.startswith(".") for part in name.split("/"))


def _ref(path: Path, name: str, member: tarfile.TarInfo) -> ImageRef:
    return ImageRef(str(path), f"{path}:{name}", member.offset_data, member.size)
