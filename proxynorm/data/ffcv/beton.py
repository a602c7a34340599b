"""The .beton file: FFCV's layout (version 2), and how it is read and checked.

Layout: header, field descriptors, one metadata record per sample, then the samples' bytes from the
next page border on, then the table of allocations, which ends the file. writer.py writes it; tests
hold our files to FFCV's own reader and loader, and read the files of FFCV's writer.

Beside FILE.beton lie FILE.beton.json, the manifest (classes, counts, options, what was left out),
and FILE.beton.sums.npy, a 64-bit checksum of every sample's bytes, by which later damage is found.
A digest in the manifest ties the three together.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proxynorm.errors import DataError

VERSION = 2
PAGE_SIZE = 1 << 23
JPEG, RAW = 0, 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
INT_FIELD, IMAGE_FIELD = 1, 2
CHANGED = "its stored bytes have changed since it was written"
DIGEST = "sha256_of_head_sums_and_manifest"


@dataclass
class Samples:
    """The table of N samples; one array (N,) per property.

    mode: JPEG or RAW; height, width in pixels; pointer, size in bytes; targets: classes; sums:
    checksums, empty if there are none; manifest: {} if there is none.
    """

    path: Path
    mode: np.ndarray
    height: np.ndarray
    width: np.ndarray
    pointer: np.ndarray
    size: np.ndarray
    targets: np.ndarray
    sums: np.ndarray
    manifest: dict

    def __len__(self) -> int:
        return len(self.mode)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; () if there is no manifest, as beside FFCV's own files."""
        return tuple(self.manifest.get("classes", ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user of the file, one line each."""
        if not self.manifest:
            told = "no manifest, so classes, labels and later damage cannot be checked"
            return (f"{self.path}: {told}",)
        damaged = len(self.manifest.get("skipped", ()))
        others = self.manifest.get("left_aside", {}).get("count", 0)
        if not damaged + others:
            return self.empty_classes(self.path)
        told = f"written without {damaged} damaged images and {others} other files"
        return (f"{self.path}: {told}; its manifest lists them", *self.empty_classes(self.path))

    def empty_classes(self, source: Path) -> tuple[str, ...]:
        """Return a line on the classes of which no image is left; they keep their numbers."""
        counts = self.manifest.get("count_per_class", {})
        if not (empty := [name for name, count in counts.items() if not count]):
            return ()
        return (f"{source}: no image is left of {len(empty)} class(es), such as {empty[0]}",)


def digest(head: bytes, sums: np.ndarray, manifest: dict) -> str:
    """Return SHA-256 of the file's head, of its checksums, uint64 (N,), and of its manifest.

    The head has every label and address, the checksums stand for the images' bytes, the manifest
    names the classes.
    """
    rest = {key: value for key, value in manifest.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(head + np.ascontiguousarray(sums).tobytes() + text.encode()).hexdigest()


def byte_sum(data: np.ndarray) -> int:
    """Return a 64-bit checksum of bytes (uint8, any length): 8-byte words times odd weights.

    An odd weight is invertible, so any change within a word shows.
    """
    whole = len(data) // 8 * 8
    words = np.frombuffer(data[:whole].tobytes(), dtype="<u8")
    weights = (np.arange(len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * WEIGHT
    rest = int.from_bytes(data[whole:].tobytes(), "little") ^ len(data)
    return (int((words * weights).sum(dtype=np.uint64)) + rest * int(WEIGHT_TAIL)) % (1 << 64)


WEIGHT, WEIGHT_TAIL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def changed_images(samples: Samples) -> list[str]:
    """Read every image's bytes; return the names of those that changed since they were written.

    Nothing is known of a file without checksums.
    """
    file = np.memmap(samples.path, dtype=np.uint8, mode="r")
    spans = zip(samples.pointer, samples.pointer + samples.size, samples.sums)
    return [
        f"{samples.path}: image {row}"
        for row, (start, end, expected) in enumerate(spans)
        if byte_sum(file[start:end]) != expected
    ]


def sums_path(path: Path) -> Path:
    """Return the file of checksums beside a .beton file."""
    return path.with_name(path.name + ".sums.npy")


def manifest_path(path: Path) -> Path:
    """Return the manifest beside a .beton file."""
    return path.with_name(path.name + ".json")


def read_beton(path: Path) -> Samples:
    """Read the table of samples of a .beton file, ours or FFCV's, with fields image and label.

    Raises DataError if it is missing, truncated, of another version, or disagrees with its
    manifest.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with scripts/write_ffcv.py")
    try:
        return _read_samples(path)
    except (IndexError, ValueError, OSError, OverflowError, MemoryError):
        raise DataError(
            f"{path}: truncated, damaged or no .beton file of version {VERSION} with the fields "
            "image (RGB) and label; write it again"
        ) from None


def _read_samples(path: Path) -> Samples:
    length = path.stat().st_size
    header = np.fromfile(path, dtype=HEADER, count=1)[0]
    count = int(header["num_samples"])
    _check(header["version"] == VERSION and count > 0)
    fields = np.fromfile(path, dtype=FIELD, count=int(header["num_fields"]), offset=HEADER.itemsize)
    names = [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in fields["name"]]
    _check(names == ["image", "label"] and fields["type_id"].tolist() == [IMAGE_FIELD, INT_FIELD])
    offset = HEADER.itemsize + fields.nbytes
    _check(offset + count * RECORD.itemsize <= length)
    records = np.fromfile(path, dtype=RECORD, count=count, offset=offset)
    columns = *(records["image"][name] for name in IMAGE.names), records["label"]
    mode, width, height, pointer, targets = map(np.ascontiguousarray, columns)
    size = _sizes(path, header, pointer)
    _check(bool((pointer + size <= length).all()) and bool((targets >= 0).all()))
    pixels = height.astype(np.uint64) * width * np.uint64(3)
    _check(bool((size == pixels)[mode == RAW].all()))
    head = header.tobytes() + fields.tobytes() + records.tobytes()
    manifest, sums = _read_companions(path, head, count, length)
    return Samples(path, mode, height, width, pointer, size, targets, sums, manifest)


def _sizes(path: Path, header: np.void, pointer: np.ndarray) -> np.ndarray:
    """Return the samples' sizes in bytes, from the table of allocations."""
    table = np.fromfile(path, dtype=ALLOCATION, offset=int(header["alloc_table_ptr"]))
    table = table[np.argsort(table["ptr"])]
    _check(len(table) >= len(pointer))
    row = np.minimum(np.searchsorted(table["ptr"], pointer), len(table) - 1)
    _check(bool((table["ptr"][row] == pointer).all()))
    return np.ascontiguousarray(table["size"][row])


def _read_companions(path: Path, head: bytes, count: int, length: int) -> tuple[dict, np.ndarray]:
    """Read manifest and checksums and compare them with the file; FFCV's own file has neither."""
    if not manifest_path(path).is_file() and not sums_path(path).is_file():
        return {}, np.zeros(0, dtype=np.uint64)
    try:
        manifest, sums = json.loads(manifest_path(path).read_text()), np.load(sums_path(path))
        whole = manifest["bytes"] == length and np.shape(sums) == (count,)
        if whole and digest(head, sums, manifest) == manifest[DIGEST]:
            return manifest, sums
        reason = "they were not written together: one is damaged, edited or replaced"
    except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DataError(
        f"{path}: does not fit its manifest {manifest_path(path).name} and checksums "
        f"{sums_path(path).name} ({reason}); put back those written with it, or write the file "
        "again"
    )


def _check(fine: bool) -> None:
    if not fine:
        raise ValueError
