"""Labelled images from class folders, a flat folder with a list of labels, or ImageNet's tars."""

from __future__ import annotations

import csv
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from proxynorm.data.images import EXTENSIONS, ImageRef
from proxynorm.data.names import code_points, look_alike, printable
from proxynorm.errors import ConfigError, DataError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KINDS_NAMED = 6


class Listing(NamedTuple):
    """Labelled images in a fixed order.

    classes: names, sorted; images and targets, int64 (N,): one per image; aside: files that were
    left out; notes: what the user should be told, one line each.
    """

    classes: tuple[str, ...]
    images: list[ImageRef]
    targets: np.ndarray
    aside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def list_source(source: Path, labels: Path | None = None) -> Listing:
    """List a folder of class folders, a tar of them, or, with `labels`, images without class.

    labels: a CSV with columns file name and class (Kaggle's LOC_val_solution.csv is one), or the
    folder of ImageNet's devkit. Raises DataError if anything is missing, empty or contradictory.
    """
    source = Path(source)
    if os.path.isfile(source) and tarfile.is_tarfile(source):
        return list_tar(source, labels)
    if not os.path.isdir(source):
        raise DataError(f"{source}: no such folder or tar file")
    if not labels:
        return list_folder(source)
    images, aside = _images_in(source)
    if not images and any(map(_is_image, aside)):
        raise DataError(
            f"{source}: holds its images in folders; if these are the classes, drop labels={labels}"
        )
    return list_flat(images, labels, source, aside)


def list_folder(folder: Path) -> Listing:
    """List folder/CLASS/*. Raises DataError without folder or classes, or for an empty class."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder")
    _, folders, beside = next(_walk(folder))
    if not folders:
        raise DataError(
            f"{folder}: holds no class folders; expected {folder}/CLASS/*.jpg "
            "(scripts/write_ffcv.py takes a flat folder with labels=)"
        )
    images, names, aside = [], [], [os.path.join(folder, name) for name in beside]
    for name in folders:
        found, others = _images_in(folder / name)
        if not found:
            raise _no_images(folder / name, others)
        images += found
        names += [printable(name)] * len(found)
        aside += others
    return _listing(folder, names, images, aside)


def _no_images(folder: Path, others: list[str]) -> DataError:
    """Return the error for a class folder without images; others: the files in and below it."""
    if any(map(_is_image, others)):
        train = folder.parent / "train"
        example = f", such as {train}" if train.is_dir() else ""
        return DataError(
            f"{folder.parent}: holds folders of folders; give one whose folders hold "
            f"images{example}"
        )
    kinds = f" ({_kinds(others)})" if others else ""
    return DataError(
        f"{printable(folder)}: class without images{kinds}; images end in "
        f"{' '.join(EXTENSIONS)}; fill it or remove the folder"
    )


def _listing(
    source: Path,
    names: list[str],
    images: list[ImageRef],
    aside: Iterable[str],
    classes: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Listing:
    """Number the classes of the images (`names`, one each) and note what the user should know."""
    sorted_classes = tuple(sorted({*names, *classes}))
    number = {name: target for target, name in enumerate(sorted_classes)}
    targets = np.array([number[name] for name in names], dtype=np.int64)
    notes, aside = list(notes), tuple(map(printable, aside))
    if aside:
        total = len(aside) + len(images)
        notes.append(f"{source}: {len(aside)} of {total} files are left out: {_kinds(aside)}")
    for name in sorted_classes:
        if twin := look_alike(name, sorted_classes[number[name] + 1 :]):
            notes.append(
                f"{source}: two classes look alike, {code_points(name)} and {code_points(twin)}"
            )
    return Listing(sorted_classes, images, targets, aside, tuple(notes))


def _kinds(aside: Iterable[str]) -> str:
    """Count files that are left out by their kind, most frequent first, in words."""
    kinds = Counter(
        "image(s) outside or below the class folders"
        if _is_image(name)
        else Path(name).suffix.lower() or "without ending"
        for name in aside
    )
    named = [f"{count} {kind}" for kind, count in kinds.most_common(KINDS_NAMED)]
    others = kinds.total() - sum(count for _, count in kinds.most_common(KINDS_NAMED))
    return ", ".join(named + ([f"{others} of other kinds"] if others else []))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder from `folder` down, its folders and its files, sorted, none hidden.

    Links to folders are followed at the top only. Raises DataError for an unreadable folder.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{printable(error.filename)}: cannot be listed ({error.strerror}); "
            "make it readable, or remove it"
        ) from None

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield place, folders, sorted(name for name in files if not name.startswith("."))


def _images_in(folder: Path) -> tuple[list[ImageRef], list[str]]:
    """Return the images of a folder, and the paths of all other files in and below it."""
    images, others = [], []
    for place, _, names in _walk(folder):
        for path in (os.path.join(place, name) for name in names):
            if place == str(folder) and _is_image(path):
                images.append(ImageRef(path, printable(path)))
            else:
                others.append(path)
    return images, others


def list_flat(images: list[ImageRef], labels: Path, source: Path, aside: list[str]) -> Listing:
    """List images without class folders by a CSV or the devkit; DataError if one has no label."""
    if not images:
        raise DataError(f"{source}: holds no images ({' '.join(EXTENSIONS)})")
    # A file in a tar is called TAR:NAME.
    stems = [Path(image.name.removeprefix(f"{source}:")).stem for image in images]
    table = _read_devkit(labels) if labels.is_dir() else _read_csv(labels, set(stems))
    for stem, image in zip(stems, images):
        if stem not in table:
            twin = look_alike(stem, table)
            hint = f" (but {code_points(twin)} for {code_points(stem)})" if twin else ""
            raise DataError(f"{image.name}: has no label in {labels}{hint}")
    names = [table[stem] for stem in stems]
    notes = _unused_labels(table, set(stems), set(names), labels)
    return _listing(source, names, images, aside, table.values(), notes)


def _unused_labels(
    table: dict[str, str], stems: set[str], present: set[str], labels: Path
) -> list[str]:
    """Return a line on labels without image and classes without any, which keep their numbers."""
    unused = [stem for stem in table if stem not in stems]
    if not unused:
        return []
    line = f"{len(unused)} of the {len(table)} labels in {labels} have no image"
    line += f" (the first: {unused[0]})"
    classes = set(table.values())
    if absent := sorted(classes - present):
        line += f"; {len(absent)} of the {len(classes)} classes have none and are kept"
        line += f" (the first: {absent[0]})"
    return [line]


def _read_csv(path: Path, stems: set[str]) -> dict[str, str]:
    """Return file stem -> class from the first two columns; of the second only the first word.

    A first line that names none of the images, whose `stems` are given, is a heading.
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
    """Return file stem and class from a line of a CSV. Raises DataError."""
    if len(row) < 2 or not row[0].strip() or not row[1].strip():
        raise DataError(
            f"{path}, line {number}: '{','.join(row)[:60]}' is not FILE,CLASS; separate them by a "
            "comma"
        )
    return Path(row[0].strip()).stem, row[1].split()[0]


def _read_devkit(folder: Path) -> dict[str, str]:
    """Return file stem -> WNID from ImageNet's devkit: its folder, or one above or below it."""
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
    except Exception as error:  # scipy raises what it likes on a damaged file
        raise DataError(
            f"{folder}: is not ImageNet's devkit, with {GROUND_TRUTH} and meta.mat ({error})"
        ) from None


class _File(NamedTuple):
    """A file of a tar: the class folder, or class tar, it lies in, and where its bytes are."""

    folder: PurePosixPath
    ref: ImageRef


def list_tar(path: Path, labels: Path | None) -> Listing:
    """List an uncompressed tar, which is read in place.

    It holds class tars (ILSVRC2012_img_train.tar), CLASS/* files or, with labels, files without
    class. Raises DataError if it is compressed, damaged or empty, or holds a file twice or class
    folders in several places, such as train/CLASS and val/CLASS.
    """
    try:
        files, aside = _tar_files(path)
    except Exception as error:  # tarfile raises many kinds on a damaged file
        raise DataError(
            f"{path}: cannot be read as an uncompressed tar file ({error}); unpack it if it is "
            "compressed, else fetch it again"
        ) from None
    aside += [file.ref.name for file in files if not _is_image(file.ref.name)]
    files = sorted(
        (file for file in files if _is_image(file.ref.name)),
        key=lambda file: (file.folder.name, file.ref),
    )
    name, count = next(iter(Counter(file.ref.name for file in files).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(
            f"{path}: holds {name.removeprefix(f'{path}:')} {count} times; make the archive anew"
        )
    if labels is not None:
        return list_flat([file.ref for file in files], labels, path, aside)
    top = _place_of_classes(path, files)
    aside += [file.ref.name for file in files if not _is_class(file.folder, top)]
    files = [file for file in files if _is_class(file.folder, top)]
    return _listing(
        path, [printable(file.folder.name) for file in files], [file.ref for file in files], aside
    )


def _is_class(folder: PurePosixPath, top: PurePosixPath) -> bool:
    return folder.parent == top and folder.name != ""


def _place_of_classes(path: Path, files: list[_File]) -> PurePosixPath:
    """Return the folder in the tar whose folders are the classes; DataError if there is not one.

    As in a folder, images beside the class folders, or in folders below them, belong to no class.
    """
    folders = Counter(file.folder for file in files if file.folder.name)
    if not folders:
        raise DataError(
            f"{path}: holds no images in class folders or class tars; give labels= if its images "
            "have a list"
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
                "make an archive of one of them"
            )
    return top


def _tar_files(path: Path) -> tuple[list[_File], list[str]]:
    """Return the files of a tar and of the tars in it, and the names of what is no file (links).

    Hidden ones, such as macOS's ._* files, are neither.
    """
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
    """Return the files of a tar within the tar, at whatever depth, without hidden ones."""
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
    """Return whether a file, or a folder it lies in, is hidden."""
    return any(part.startswith(".") for part in name.split("/"))


def _ref(path: Path, name: str, member: tarfile.TarInfo) -> ImageRef:
    return ImageRef(str(path), f"{path}:{printable(name)}", member.offset_data, member.size)
