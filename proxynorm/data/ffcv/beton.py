"""The .beton file: FFCV's layout (version 2), and how it is read and checked.

Layout: header, field descriptors, one metadata record per sample; the samples' bytes, from the next
page boundary on; the allocation table, up to the end of the file. The tests read files of writer.py
with FFCV's Loader, and files of FFCV's writer with read_beton.

Two companions lie beside FILE.beton. FILE.beton.json is the manifest: classes, counts, options,
images left out. FILE.beton.sums.npy has a 64-bit checksum of every sample's bytes, which reveals
later damage. A digest in the manifest ties the three files together.
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
DIGEST = "sha256_of_head_sums_and_manifest"  # a key of the manifest
# See byte_sum: two odd numbers with scattered bits (SplitMix64's and xxHash's).
WEIGHT, WEIGHT_TAIL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass
class Samples:
    """The table of N samples; one array (N,) per property.

    mode: JPEG or RAW; height, width in pixels; pointer, size in bytes; targets: class numbers; sums
    (checksums) and manifest: empty for a file of FFCV's own writer.
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
        """The names of the classes; () without a manifest."""
        return tuple(self.manifest.get("classes", ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the file, one line each."""
        if not self.manifest:
            problem = "no manifest, so classes, labels and later damage cannot be checked"
            return (f"{self.path}: {problem}",)
        notes = self.empty_class_notes(self.path)
        damaged = len(self.manifest.get("skipped", ()))
        others = self.manifest.get("left_aside", {}).get("count", 0)
        if damaged or others:
            missing = f"{damaged} damaged images and {others} other files"
            notes = (f"{self.path}: written without {missing}; its manifest lists them", *notes)
        return notes

    def empty_class_notes(self, source: Path) -> tuple[str, ...]:
        """Return a warning if classes have no images left; they keep their numbers."""
        counts = self.manifest.get("count_per_class", {})
        if not (empty := [name for name, count in counts.items() if not count]):
            return ()
        return (f"{source}: no images left in {len(empty)} class(es), such as {empty[0]}",)


def digest(head: bytes, sums: np.ndarray, manifest: dict) -> str:
    """Return the SHA-256 of the file's head, its checksums, uint64 (N,), and its manifest.

    The head holds every label and address, the checksums cover the images' bytes, and the manifest
    names the classes.
    """
    rest = {key: value for key, value in manifest.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(head + np.ascontiguousarray(sums).tobytes() + text.encode()).hexdigest()


def byte_sum(data: np.ndarray) -> int:
    """Return a 64-bit checksum of bytes, uint8 (N,): the weighted sum of 8-byte words.

    The weights are odd and so invertible modulo 2^64: a change within one word changes the sum.
    """
    whole = len(data) // 8 * 8
    words = np.frombuffer(data[:whole].tobytes(), dtype="<u8")
    weights = (np.arange(len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * WEIGHT
    rest = int.from_bytes(data[whole:].tobytes(), "little") ^ len(data)
    return (int((words * weights).sum(dtype=np.uint64)) + rest * int(WEIGHT_TAIL)) % (1 << 64)


def changed_images(samples: Samples) -> list[str]:
    """Return the names of the images whose bytes no longer match their checksums.

    Reads the whole file. A file without checksums yields no names.
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

    Raises DataError if the file is missing, truncated or of another version, or if it does not
    match its manifest.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with scripts/write_ffcv.py")
    try:
        return _read_samples(path)
    except (IndexError, ValueError, OSError, OverflowError, MemoryError):
        raise DataError(
            f"{path}: truncated, damaged, or not a .beton file of version {VERSION} with the "
            "fields image (RGB) and label; write it again"
        ) from None


def _read_samples(path: Path) -> Samples:
    """Read and check the table. Raises ValueError, among others, for a file that is damaged."""
    length = path.stat().st_size
    header = np.fromfile(path, dtype=HEADER, count=1)[0]
    count = int(header["num_samples"])
    _require(header["version"] == VERSION and count > 0)
    fields = np.fromfile(path, dtype=FIELD, count=int(header["num_fields"]), offset=HEADER.itemsize)
    names = [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in fields["name"]]
    _require(names == ["image", "label"] and fields["type_id"].tolist() == [IMAGE_FIELD, INT_FIELD])
    offset = HEADER.itemsize + fields.nbytes
    _require(offset + count * RECORD.itemsize <= length)
    records = np.fromfile(path, dtype=RECORD, count=count, offset=offset)
    columns = *(records["image"][name] for name in IMAGE.names), records["label"]
    mode, width, height, pointer, targets = map(np.ascontiguousarray, columns)
    size = _sizes(path, header, pointer)
    _require((pointer + size <= length).all() and (targets >= 0).all())
    pixels = height.astype(np.uint64) * width * np.uint64(3)  # the sides' 16 bits would overflow
    _require((size == pixels)[mode == RAW].all())
    head = header.tobytes() + fields.tobytes() + records.tobytes()
    manifest, sums = _read_companions(path, head, count, length)
    return Samples(path, mode, height, width, pointer, size, targets, sums, manifest)


def _sizes(path: Path, header: np.void, pointer: np.ndarray) -> np.ndarray:
    """Look up the samples' sizes, in bytes, in the allocation table."""
    table = np.fromfile(path, dtype=ALLOCATION, offset=int(header["alloc_table_ptr"]))
    table = table[np.argsort(table["ptr"])]
    _require(len(table) >= len(pointer))
    row = np.minimum(np.searchsorted(table["ptr"], pointer), len(table) - 1)
    _require((table["ptr"][row] == pointer).all())
    return np.ascontiguousarray(table["size"][row])


def _read_companions(path: Path, head: bytes, count: int, length: int) -> tuple[dict, np.ndarray]:
    """Read manifest and checksums, and check that they were written with the file.

    A file of FFCV's own writer has neither.
    """
    if not manifest_path(path).is_file() and not sums_path(path).is_file():
        return {}, np.zeros(0, dtype=np.uint64)
    try:
        manifest, sums = json.loads(manifest_path(path).read_text()), np.load(sums_path(path))
        same_size = manifest["bytes"] == length and np.shape(sums) == (count,)
        if same_size and digest(head, sums, manifest) == manifest[DIGEST]:
            return manifest, sums
        reason = "they were not written together: one is damaged, edited or replaced"
    except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DataError(
        f"{path}: does not match its manifest {manifest_path(path).name} and checksums "
        f"{sums_path(path).name} ({reason}); restore those written with it, or write the file again"
    )


def _require(condition: bool) -> None:
    """Raise ValueError, which read_beton turns into its DataError."""
    if not condition:
        raise ValueError
