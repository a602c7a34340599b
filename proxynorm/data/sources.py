"""Lists labelled images in class folders, a flat folder with labels, or ImageNet's tar files."""

from __future__ import annotations

import csv
import os
import posixpath
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from proxynorm.data.images import EXTENSIONS, ImageRef
from proxynorm.errors import DataError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
BOXES = re.compile(r"\S+( +\d+){4}( .*)?")  # n01440764 and boxes in pixels, four numbers each
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
KINDS_NAMED = 6  # kinds of files that a message names


class Listing(NamedTuple):
    """Labelled images in a fixed order.

    source: the folder or tar; classes: sorted names; images and targets, int64 (N,): one per image;
    aside: names of the files left out; notes: warnings for the user, one line each.
    """

    source: Path
    classes: tuple[str, ...]
    images: list[ImageRef]
    targets: np.ndarray
    aside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _File(NamedTuple):
    """A file of a source.

    path: relative to the source; a class tar counts as a folder. is_image: by its name; False
    for a link in a tar.
    """

    path: PurePosixPath
    ref: ImageRef
    is_image: bool


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def list_source(source: Path, labels: Path | None = None) -> Listing:
    """List a folder of class folders, a tar of them, or, with `labels`, images in one folder.

    A tar is read in place. It may also hold class tars, as ILSVRC2012_img_train.tar does. labels: a
    CSV with columns file name and class, such as Kaggle's LOC_val_solution.csv, or the folder of
    ImageNet's devkit. Raises DataError if anything is missing, empty or contradictory.
    """
    is_tar = os.path.isfile(source) and tarfile.is_tarfile(source)
    files = _tar_files(source) if is_tar else _folder_files(source)
    if labels:
        return _by_labels(source, files, labels)
    holding = {file.path.parent for file in files if file.is_image}
    if is_tar:  # the class folders may lie deeper, as in imagenet/train/CLASS
        top = PurePosixPath(posixpath.commonpath(holding or [""]))
        classes = {top / path.relative_to(top).parts[0] for path in holding if path != top}
    else:
        classes = set(map(PurePosixPath, _subfolders(source)))
    if not classes:
        raise DataError(
            f"{source}: holds no class folders; expected {source}/CLASS/*.jpg, or labels= for "
            "images without class (scripts/write_ffcv.py)"
        )
    if empty := classes - holding:
        name = min(empty)
        kinds = _kinds(file.ref.name for file in files if name in file.path.parents)
        raise DataError(
            f"{printable(source / name)}: class without images ({kinds}); images end in "
            f"{' '.join(EXTENSIONS)}; fill it or remove it, or give the folder of class folders"
        )
    chosen = [file for file in files if file.is_image and file.path.parent in classes]
    names = [printable(file.path.parent.name) for file in chosen]
    return _listing(source, files, chosen, names, set(names))


def list_images(source: Path) -> Listing:
    """List the images in and below a folder, or one file, without classes.

    Raises DataError if there are none.
    """
    if source.is_file():
        image = ImageRef(str(source), printable(source))
        return Listing(source, ("",), [image], np.zeros(1, dtype=np.int64))
    files = _folder_files(source)
    images = [file for file in files if file.is_image]
    if not images:
        kinds = _kinds(file.ref.name for file in files)
        raise DataError(
            f"{source}: holds no images ({kinds}); images end in {' '.join(EXTENSIONS)}"
        )
    return _listing(source, files, images, [""] * len(images), {""})


def _listing(
    source: Path, files: list[_File], chosen: list[_File], names: list[str], classes: set[str]
) -> Listing:
    """List the chosen files, whose classes are `names`, and collect the warnings.

    classes: the names of all classes, some of which may have no file.
    """
    sorted_classes = tuple(sorted(classes))
    number = {name: target for target, name in enumerate(sorted_classes)}
    targets = np.array([number[name] for name in names], dtype=np.int64)
    kept, notes = {file.ref for file in chosen}, []
    aside = tuple(file.ref.name for file in files if file.ref not in kept)
    if aside:
        notes.append(f"{source}: {len(aside)} of {len(files)} files are left out: {_kinds(aside)}")
    # é is one code point, or e and an accent. macOS and Linux tools write different ones.
    forms: dict[str, str] = {}
    for name in sorted_classes:
        twin = forms.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            notes.append(f"{source}: two classes look alike, {spelled(twin)} and {spelled(name)}")
    return Listing(
        source, sorted_classes, [file.ref for file in chosen], targets, aside, tuple(notes)
    )


def printable(name: str | bytes | os.PathLike) -> str:
    """Return a file name as one line of text.

    Bytes that are not UTF-8 become escapes (caf\\xe9): Python keeps them as lone surrogates, which
    neither a terminal nor a JSON file accepts. Control characters are escaped too.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda character: ascii(character[0])[1:-1], text)


def spelled(name: str) -> str:
    """Return a name, with its code points if it is not ASCII: café (caf\\xe9)."""
    return name if name.isascii() else f"{name} ({ascii(name)[1:-1]})"


def _kinds(aside: Iterable[str]) -> str:
    """Describe the files left out by kind, the most frequent first: "2 .txt, 1 .heic"."""
    kinds = Counter(
        "image(s) outside or below the class folders"
        if _is_image(name)
        else Path(name).suffix.lower() or "without ending"
        for name in aside
    )
    named = [f"{count} {kind}" for kind, count in kinds.most_common(KINDS_NAMED)]
    if len(kinds) > KINDS_NAMED:
        named.append("…")
    return ", ".join(named) or "no files"


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{printable(error.filename)}: cannot be listed ({error.strerror})") from None


def _visible(names: list[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _subfolders(folder: Path) -> list[str]:
    return _visible(next(os.walk(folder, onerror=_cannot_list))[1])


def _folder_files(source: Path) -> list[_File]:
    """Return the files in and below a folder, without hidden ones.

    A link to a folder is followed only at the top. Raises DataError for a folder that is missing or
    cannot be read.
    """
    if not os.path.isdir(source):
        raise DataError(f"{source}: no such folder or tar file")
    files = []
    for top in (source, *(source / name for name in _subfolders(source))):
        for folder, subfolders, names in os.walk(top, onerror=_cannot_list):
            # Each subfolder gets its own walk, which follows it even if it is a link.
            subfolders[:] = [] if top == source else _visible(subfolders)
            for name in _visible(names):
                path = os.path.join(folder, name)
                relative = PurePosixPath(os.path.relpath(path, source))
                files.append(_File(relative, ImageRef(path, printable(path)), _is_image(name)))
    return files


def _tar_files(source: Path) -> list[_File]:
    """Return the files of an uncompressed tar and of the tars in it, sorted, without hidden ones.

    Raises DataError if it is compressed or damaged, or holds an image twice.
    """
    try:
        with tarfile.open(source, "r:") as archive:
            found = _members(source, archive)
            files = sorted(found, key=lambda file: (file.path.parent.name, file.ref))
    except Exception as error:  # tarfile raises many kinds of exceptions for a damaged file
        raise DataError(
            f"{source}: cannot be read as an uncompressed tar file ({error}); unpack it if it is "
            "compressed, else download it again"
        ) from None
    for name, count in Counter(file.ref.name for file in files if file.is_image).items():
        if count > 1:
            raise DataError(f"{name}: is in the tar file {count} times; create the archive again")
    return files


def _members(
    source: Path, archive: tarfile.TarFile, inside: PurePosixPath | None = None, start: int = 0
) -> Iterator[_File]:
    """Yield the files of a tar and of the tars in it, without hidden ones.

    For a tar within the tar at `source`, inside is its path there, without .tar, and start the
    position of its first byte.
    """
    for member in archive:
        name = posixpath.normpath(member.name)
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            continue
        full = PurePosixPath(name) if inside is None else inside / name
        offset = start + member.offset_data
        if member.isfile() and full.suffix == ".tar":
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                yield from _members(source, inner, full.with_suffix(""), offset)
        else:
            ref = ImageRef(str(source), f"{source}:{printable(full)}", offset, member.size)
            path = inside / full.name if inside else full  # folders in a class tar do not count
            yield _File(path, ref, member.isfile() and _is_image(name))


def _by_labels(source: Path, files: list[_File], labels: Path) -> Listing:
    """List the images of the outermost folder that has any, with the classes that `labels` gives.

    labels: a CSV or ImageNet's devkit.
    """
    folders = [file.path.parent for file in files if file.is_image]
    if not folders:
        raise DataError(f"{source}: holds no images ({' '.join(EXTENSIONS)})")
    outermost = min(folders, key=lambda folder: len(folder.parts))
    chosen = [file for file in files if file.is_image and file.path.parent == outermost]
    stems = [printable(file.path.stem) for file in chosen]
    known = set(stems)
    table = _read_devkit(labels) if labels.is_dir() else _read_csv(labels, known)
    for stem, file in zip(stems, chosen):
        if stem not in table:
            raise DataError(
                f"{file.ref.name}: has no label in {labels}; drop labels= if the folders of the "
                "images are their classes"
            )
    names = [table[stem] for stem in stems]
    # Classes without images keep their numbers.
    listing = _listing(source, files, chosen, names, set(table.values()))
    if unused := [stem for stem in table if stem not in known]:
        count = f"{len(unused)} of the {len(table)} labels in {labels}"
        note = f"{count} have no image (the first: {unused[0]})"
        return listing._replace(notes=(*listing.notes, note))
    return listing


def _read_csv(path: Path, stems: set[str]) -> dict[str, str]:
    """Return file stem -> class from the first two columns, without the boxes of ImageNet's lists.

    stems: those of the images. A first line that names none of them is a header.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is not a list of FILE,CLASS lines ({error})") from None
    table: dict[str, str] = {}
    for n, (number, row) in enumerate(lines):
        name, label = (cell.strip() for cell in [*row, ""][:2])
        if not name or not label:
            raise DataError(
                f"{path}, line {number}: '{','.join(row)[:60]}' is not FILE,CLASS; separate them "
                "by a comma"
            )
        stem = Path(name).stem
        label = label.split()[0] if BOXES.fullmatch(label) else label
        if n == 0 and stem not in stems:
            continue
        if table.setdefault(stem, label) != label:
            raise DataError(
                f"{path}: gives {stem} two classes, {table[stem]} and {label}; keep the right one"
            )
    return table


def _read_devkit(folder: Path) -> dict[str, str]:
    """Return file stem -> WNID from ImageNet's devkit, found in or below the folder."""
    from scipy.io import loadmat  # slow to import, and training does not need it

    data = next(folder.rglob(GROUND_TRUTH), folder / GROUND_TRUTH).parent
    try:
        numbers = [int(line) for line in (data / GROUND_TRUTH).read_text().split()]
        synsets = loadmat(str(data / "meta.mat"), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return {
            f"ILSVRC2012_val_{n:08d}": wnid[number] for n, number in enumerate(numbers, start=1)
        }
    except Exception as error:  # scipy raises many kinds of exceptions for a damaged file
        raise DataError(
            f"{folder}: is not ImageNet's devkit, with {GROUND_TRUTH} and meta.mat ({error})"
        ) from None
