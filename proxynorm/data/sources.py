"""Labelled images from class folders, a flat folder with a list of labels, or ImageNet's tars."""

from __future__ import annotations

import csv
import os
import posixpath
import re
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
BOXES = re.compile(r"\S+( +\d+){4}( .*)?")  # n01440764 and a box in pixels, once or more
KINDS_NAMED = 6
TOP = PurePosixPath(".")


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


class _File(NamedTuple):
    """A file of a source, and the folder (relative to the source) or class tar that it lies in.

    is_file: it is no link in a tar.
    """

    folder: PurePosixPath
    ref: ImageRef
    is_file: bool = True

    @property
    def is_image(self) -> bool:
        return self.is_file and _is_image(self.ref.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


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
    files = _folder_files(source)
    images = [file.ref for file in files if file.is_image and file.folder == TOP]
    aside = [file.ref.name for file in files if not (file.is_image and file.folder == TOP)]
    if not images and any(file.is_image for file in files):
        raise DataError(
            f"{source}: holds its images in folders; if these are the classes, drop labels={labels}"
        )
    return list_flat(images, labels, source, aside)


def list_folder(folder: Path) -> Listing:
    """List folder/CLASS/*. Raises DataError without folder or classes, or for an empty class."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder")
    files = _folder_files(folder)
    classes = {PurePosixPath(name) for name in next(_walk(folder))[1]}
    if not classes:
        raise DataError(
            f"{folder}: holds no class folders; expected {folder}/CLASS/*.jpg "
            "(scripts/write_ffcv.py takes a flat folder with labels=)"
        )
    if empty := classes - {file.folder for file in files if file.is_image}:
        raise _no_images(folder, min(empty), files)
    return _by_class(folder, files, classes)


def list_images(source: Path) -> Listing:
    """List the images in and below a folder, or one file, without classes.

    Raises DataError if there are none.
    """
    if source.is_file():
        images, aside = [_file_ref(str(source))], []
    elif source.is_dir():
        files = _folder_files(source)
        images = [file.ref for file in files if file.is_image]
        aside = [file.ref.name for file in files if not file.is_image]
    else:
        raise DataError(f"{source}: no such folder or file")
    if not images:
        kinds = f" but {_kinds(aside)}" if aside else ""
        raise DataError(f"{source}: holds no images{kinds}; images end in {' '.join(EXTENSIONS)}")
    return _listing(source, [""] * len(images), images, aside)


def _no_images(source: Path, name: PurePosixPath, files: list[_File]) -> DataError:
    """Return the error for a class folder without images."""
    below = [file for file in files if name in (file.folder, *file.folder.parents)]
    if any(file.is_image for file in below):
        example = f", such as {source}/train" if (source / "train").is_dir() else ""
        return DataError(
            f"{source}: holds folders of folders; give one whose folders hold images{example}"
        )
    kinds = f" ({_kinds(file.ref.name for file in below)})" if below else ""
    return DataError(
        f"{printable(source / name)}: class without images{kinds}; images end in "
        f"{' '.join(EXTENSIONS)}; fill it or remove the folder"
    )


def _by_class(source: Path, files: list[_File], classes: set[PurePosixPath]) -> Listing:
    """List the images directly in their class folders."""
    chosen = [file for file in files if file.is_image and file.folder in classes]
    aside = [file.ref.name for file in files if not (file.is_image and file.folder in classes)]
    names = [printable(file.folder.name) for file in chosen]
    return _listing(source, names, [file.ref for file in chosen], aside)


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


def _folder_files(folder: Path) -> list[_File]:
    """Return all files in and below a folder, none hidden."""
    place, folders, beside = next(_walk(folder))
    found = [(place, name) for name in beside]
    for top in folders:
        found += [(place, name) for place, _, names in _walk(folder / top) for name in names]
    return [
        _File(PurePosixPath(os.path.relpath(place, folder)), _file_ref(os.path.join(place, name)))
        for place, name in found
    ]


def _file_ref(path: str) -> ImageRef:
    return ImageRef(path, printable(path))


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
    """Return file stem -> class from the first two columns, without the boxes of ImageNet's lists.

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
    name = row[1].strip()
    return Path(row[0].strip()).stem, name.split()[0] if BOXES.fullmatch(name) else name


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


def list_tar(path: Path, labels: Path | None) -> Listing:
    """List an uncompressed tar, which is read in place.

    It holds class tars (ILSVRC2012_img_train.tar), CLASS/* files or, with labels, files without
    class. Raises DataError if it is compressed, damaged or empty, or holds a file twice or class
    folders in several places, such as train/CLASS and val/CLASS.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            files = sorted(_tar_files(path, archive), key=lambda file: (file.folder.name, file.ref))
    except Exception as error:  # tarfile raises many kinds on a damaged file
        raise DataError(
            f"{path}: cannot be read as an uncompressed tar file ({error}); unpack it if it is "
            "compressed, else fetch it again"
        ) from None
    images = [file for file in files if file.is_image]
    for name, count in Counter(file.ref.name for file in images).most_common(1):
        if count > 1:
            name = name.removeprefix(f"{path}:")
            raise DataError(f"{path}: holds {name} {count} times; make the archive anew")
    if labels is not None:
        aside = [file.ref.name for file in files if not file.is_image]
        return list_flat([file.ref for file in images], labels, path, aside)
    return _by_class(path, files, _class_folders(path, Counter(file.folder for file in images)))


def _tar_files(
    path: Path, archive: tarfile.TarFile, inside: PurePosixPath | None = None, start: int = 0
) -> Iterator[_File]:
    """Yield the files of a tar and of the tars in it, without hidden ones.

    inside: the class tar within the tar at `path` that `archive` is, from byte `start` on.
    """
    for member in archive:
        name = posixpath.normpath(member.name)
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            continue
        place = PurePosixPath(name) if inside is None else inside / name
        offset = start + member.offset_data
        if member.isfile() and place.suffix == ".tar":
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                yield from _tar_files(path, inner, place.with_suffix(""), offset)
        else:
            ref = ImageRef(str(path), f"{path}:{printable(place)}", offset, member.size)
            yield _File(inside or place.parent, ref, member.isfile())


def _class_folders(path: Path, folders: Counter[PurePosixPath]) -> set[PurePosixPath]:
    """Return the class folders among the folders in a tar; DataError if they lie in several places.

    folders: how many images each holds. As in a folder, images beside the class folders, or in
    folders below them, belong to no class.
    """
    places: Counter[PurePosixPath] = Counter()
    for folder, count in folders.items():
        if folder.name:
            places[folder.parent] += count
    if not places:
        raise DataError(
            f"{path}: holds no images in class folders or class tars; give labels= if its images "
            "have a list"
        )
    top = places.most_common(1)[0][0]
    classes = {folder for folder in folders if folder.name and folder.parent == top}
    for folder in folders:
        in_a_class = folder in classes or classes.intersection(folder.parents)
        if not (in_a_class or top.is_relative_to(folder)):
            raise DataError(
                f"{path}: holds class folders in several places ({top}/ and {folder.parent}/); "
                "make an archive of one of them"
            )
    return classes
