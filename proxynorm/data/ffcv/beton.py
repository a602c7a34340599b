"""The .beton file: FFCV's layout (version 2), written whole or not at all, and checked before it is
used.

Layout: header, field descriptors, one metadata record per sample, then the samples' bytes from the
next page border on, then the table of allocations, which ends the file. FFCV's own writer is not
used because it hangs when its source raises and its output depends on the number of workers; tests
hold our files to FFCV's own reader and loader, and read the files of FFCV's writer.

Beside FILE.beton lie FILE.beton.json, the manifest (classes, counts, options, what was left out),
and FILE.beton.sums.npy, a 64-bit sum of every sample's bytes, by which later damage is found. A
digest in the manifest ties
the three together: of the file's head, which has every label and address, of the sums, and of the
manifest itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from proxynorm.errors import DataError
from proxynorm.files import sync_folder

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
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
INT_FIELD, IMAGE_FIELD, ARRAY_FIELD = 1, 2, 4
DIGEST = "sha256_of_head_sums_and_manifest"


@dataclass
class Samples:
    """Where each of N samples lies and what it is; one array (N,) per property.

    mode: JPEG or RAW; height, width in pixels; pointer, size in bytes; target: class; sums: 64-bit
    sums or empty.
    """

    path: Path
    channels: int
    mode: np.ndarray
    height: np.ndarray
    width: np.ndarray
    pointer: np.ndarray
    size: np.ndarray
    target: np.ndarray
    sums: np.ndarray
    manifest: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.mode)


def metadata_type(channels: int) -> np.dtype:
    """A sample's record: colour images are FFCV's RGBImageField, grey ones its NDArrayField; then
    an IntField."""
    return np.dtype(
        [("image", IMAGE if channels == 3 else np.dtype("<u8")), ("label", "<i8")], align=True
    )


def field_descriptors(channels: int, shape: tuple[int, int] | None) -> np.ndarray:
    """FFCV's description of the fields "image" and "label"; shape (height, width) is that of grey
    images."""
    fields = np.zeros(2, dtype=FIELD)
    for row, name in zip(fields, (b"image", b"label")):
        row["name"][: len(name)] = np.frombuffer(name, dtype="<u1")
    fields["type_id"] = (IMAGE_FIELD if channels == 3 else ARRAY_FIELD), INT_FIELD
    if channels == 1:
        element = json.dumps(np.dtype("u1").descr).encode()
        arguments = np.zeros(1, dtype=ARRAY_ARGUMENTS)
        arguments["shape"][0, :2] = shape
        arguments["type_length"] = len(element)
        packed = arguments.tobytes() + element
        fields[0]["arguments"][: len(packed)] = np.frombuffer(packed, dtype="<u1")
    return fields


class BetonWriter:
    """Writes one .beton file under a temporary name; `close` finishes, verifies and renames it,
    `discard` removes it.

    capacity: the most samples that will be added; shape: (height, width) of every image, for grey
    images only. Raises DataError if another process is writing the same file.
    """

    def __init__(
        self, path: Path, channels: int, capacity: int, shape: tuple[int, int] | None = None
    ) -> None:
        self.path = Path(path)
        self.temporary = _hidden(self.path)
        self.channels = channels
        self.fields = field_descriptors(channels, shape)
        self.records = np.zeros(capacity, dtype=metadata_type(channels))
        self.allocations = np.zeros(capacity, dtype=ALLOCATION)
        self.sums = np.zeros(capacity, dtype=np.uint64)
        self.page_size = PAGE_SIZE
        self.count = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = _open_alone(self.path)
        start = HEADER.itemsize + self.fields.nbytes + self.records.nbytes
        self.file.seek(-(-start // PAGE_SIZE) * PAGE_SIZE)

    def add(self, data: np.ndarray, target: int, height: int, width: int, mode: int) -> None:
        """Append a sample: its stored bytes (uint8, one dimension), class, side lengths in pixels,
        JPEG or RAW."""
        pointer = self._place(len(data))
        self.file.write(data)
        record = self.records[self.count]
        record["image"] = (mode, width, height, pointer) if self.channels == 3 else pointer
        record["label"] = target
        self.allocations[self.count] = (self.count, pointer, len(data))
        self.sums[self.count] = byte_sum(data)
        self.count += 1

    def _place(self, size: int) -> int:
        """Where a sample of this size goes: a sample never crosses a page border, as FFCV's page
        cache requires."""
        if size > self.page_size:
            raise DataError(
                f"{self.path}: an image of {size} stored bytes exceeds a page of "
                f"{self.page_size}; use max_side"
            )
        position = self.file.tell()
        if position // self.page_size != (position + size - 1) // self.page_size:
            position = self.file.seek(-(-position // self.page_size) * self.page_size)
        return position

    def close(self, manifest: dict, verify: Callable[[Samples], None]) -> None:
        """Finish the file, have it read back by verify(samples), and put it, its sums and its
        manifest in place.

        verify raises DataError if what is on the disk is not what was added. DataError also if
        nothing was added.
        """
        if self.count == 0:
            raise DataError(f"{self.path}: not one usable image to write")
        # FFCV's page cache reads whole pages: fill the last one.
        self.file.seek(-(-self.file.tell() // self.page_size) * self.page_size)
        table = self.file.tell()
        self.file.write(self.allocations[: self.count].tobytes())
        header = np.array((VERSION, 2, self.page_size, self.count, table), dtype=HEADER)
        head = header.tobytes() + self.fields.tobytes() + self.records[: self.count].tobytes()
        self.file.seek(0)
        self.file.write(head)
        _flush(self.file)
        sums = self.sums[: self.count]
        verify(replace(read_beton(self.temporary), sums=sums))
        contents = {**manifest, "bytes": self.temporary.stat().st_size}
        contents[DIGEST] = digest(head, sums, contents)
        with open(_hidden(sums_path(self.path)), "wb") as file:
            np.save(file, sums)
            _flush(file)
        with open(_hidden(manifest_path(self.path)), "wb") as file:
            file.write(json.dumps(contents, indent=1).encode() + b"\n")
            _flush(file)
        # Until the new file is whole: no file rather than an old one beside the new one's manifest.
        self.path.unlink(missing_ok=True)
        for path in (sums_path(self.path), manifest_path(self.path), self.path):
            os.replace(_hidden(path), path)
        sync_folder(self.path.parent)
        self.file.close()  # and with it the lock

    def discard(self) -> None:
        """Remove the unfinished file."""
        for path in (self.path, sums_path(self.path), manifest_path(self.path)):
            _hidden(path).unlink(missing_ok=True)
        with suppress(OSError):  # a full disk refuses what is still buffered
            self.file.close()


def _hidden(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


def _open_alone(path: Path) -> BinaryIO:
    """The temporary file of `path`, empty, and locked while it is open: one writer at a time.

    What a killed writer left is overwritten: its lock ended with it. DataError if another process
    is writing.
    """
    while True:
        file = os.fdopen(os.open(_hidden(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(
                f"{path}: another process is writing it; wait for it, or give another name"
            ) from None
        except OSError:
            # A file system without locks; reading back finds what two writers would do to it.
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(_hidden(path))):
                file.truncate(0)
                return file
        # Between opening and locking the other writer finished, and this is now its file.
        file.close()


@contextmanager
def new_beton(
    path: Path, channels: int, capacity: int, shape: tuple[int, int] | None = None
) -> Iterator[BetonWriter]:
    """A BetonWriter to add to and to close; whatever goes wrong, no unfinished file stays.

    Raises DataError if the folder cannot be written or the disk is full.
    """
    try:
        writer = BetonWriter(path, channels, capacity, shape)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield writer
    except OSError as error:
        writer.discard()
        raise _unwritable(path, error) from None
    except BaseException:
        writer.discard()
        raise


def _unwritable(path: Path, error: OSError) -> DataError:
    remedy = (
        "make room, or choose another folder" if error.errno in FULL else "choose another folder"
    )
    return DataError(f"{path}: cannot be written ({error.strerror}); {remedy}")


FULL = (errno.ENOSPC, errno.EDQUOT)


def digest(head: bytes, sums: np.ndarray, manifest: dict) -> str:
    """What a manifest holds as DIGEST: SHA-256 of the file's head, of its sums, uint64 (N,), and of
    the manifest's rest.

    The head has every label and address, the sums stand for the images' bytes, the manifest names
    the classes.
    """
    rest = {key: value for key, value in manifest.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(head + np.ascontiguousarray(sums).tobytes() + text.encode()).hexdigest()


def byte_sum(data: np.ndarray) -> int:
    """A 64-bit sum of bytes (uint8, any length): 8-byte words times odd weights, so any change
    within a word shows."""
    whole = len(data) // 8 * 8
    words = np.frombuffer(data[:whole].tobytes(), dtype="<u8")
    weights = (np.arange(len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * WEIGHT
    rest = int.from_bytes(data[whole:].tobytes(), "little") ^ len(data)
    return (int((words * weights).sum(dtype=np.uint64)) + rest * int(WEIGHT_TAIL)) % (1 << 64)


WEIGHT, WEIGHT_TAIL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def sums_path(path: Path) -> Path:
    """The file of byte sums beside a .beton file."""
    return path.with_name(path.name + ".sums.npy")


def manifest_path(path: Path) -> Path:
    """The manifest beside a .beton file."""
    return path.with_name(path.name + ".json")


def _flush(file) -> None:
    """Bring the file to the disk, and out of the page cache where the system allows: so reading it
    back is a test."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_beton(path: Path) -> Samples:
    """The table of samples of a .beton file, ours or FFCV's, with fields image and label.

    Raises DataError if it is missing, truncated, of another version, or disagrees with its
    manifest.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with scripts/write_ffcv.py")
    try:
        header = np.fromfile(path, dtype=HEADER, count=1)[0]
        _check(path, header["version"] == VERSION and header["num_samples"] > 0)
        fields = np.fromfile(
            path, dtype=FIELD, count=int(header["num_fields"]), offset=HEADER.itemsize
        )
        return _read_samples(path, header, fields)
    except (IndexError, ValueError, OSError, OverflowError, MemoryError):
        raise _damaged(path) from None


def _read_samples(path: Path, header: np.void, fields: np.ndarray) -> Samples:
    count, length = int(header["num_samples"]), path.stat().st_size
    names = [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in fields["name"]]
    channels = {IMAGE_FIELD: 3, ARRAY_FIELD: 1}.get(int(fields["type_id"][0]))
    if names != ["image", "label"] or channels is None or fields["type_id"][1] != INT_FIELD:
        raise DataError(
            f"{path}: holds the fields {names}; expected an image field 'image' and an integer "
            f"field 'label'"
        )
    offset = HEADER.itemsize + fields.nbytes
    _check(path, offset + count * metadata_type(channels).itemsize <= length)
    records = np.fromfile(path, dtype=metadata_type(channels), count=count, offset=offset)
    table = np.fromfile(path, dtype=ALLOCATION, offset=int(header["alloc_table_ptr"]))
    table = table[np.argsort(table["ptr"])]
    image = records["image"]
    pointer = np.ascontiguousarray(image["data_ptr"] if channels == 3 else image)
    _check(path, len(table) >= count)
    row = np.minimum(np.searchsorted(table["ptr"], pointer), len(table) - 1)
    _check(path, bool((table["ptr"][row] == pointer).all()))
    size = np.ascontiguousarray(table["size"][row])
    _check(path, bool((pointer + size <= length).all()) and bool((records["label"] >= 0).all()))
    if channels == 3:
        mode, height, width = (
            np.ascontiguousarray(image[name]) for name in ("mode", "height", "width")
        )
    else:
        shape = fields["arguments"][0][: ARRAY_ARGUMENTS.itemsize].view(ARRAY_ARGUMENTS)["shape"][0]
        mode = np.full(count, RAW, dtype=np.uint8)
        height, width = (np.full(count, side, dtype=np.uint16) for side in shape[:2])
    expected = height.astype(np.uint64) * width * np.uint64(channels)
    _check(path, bool((size == expected)[mode == RAW].all()))
    head = header.tobytes() + fields.tobytes() + records.tobytes()
    manifest, sums = _read_companions(path, head, count, length)
    target = np.ascontiguousarray(records["label"])
    return Samples(path, channels, mode, height, width, pointer, size, target, sums, manifest)


def _read_companions(path: Path, head: bytes, count: int, length: int) -> tuple[dict, np.ndarray]:
    """The manifest and the sums, held against the file; a file with neither is somebody else's."""
    if not manifest_path(path).is_file():
        if sums_path(path).is_file():
            raise DataError(
                f"{path}: its manifest {manifest_path(path).name} is missing; put it back, or "
                f"write the file again"
            )
        return {}, np.zeros(0, dtype=np.uint64)
    try:
        manifest = json.loads(manifest_path(path).read_text())
        sums = np.load(sums_path(path))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: its manifest or sums cannot be read ({error}); write the file again"
        ) from None
    if not isinstance(manifest, dict) or DIGEST not in manifest:
        raise DataError(
            f"{path}: its manifest is damaged or of an older proxynorm (it has no {DIGEST}); "
            f"write the file again"
        )
    if (
        manifest.get("bytes") != length
        or not isinstance(sums, np.ndarray)
        or sums.shape != (count,)
    ):
        raise DataError(
            f"{path}: differs from its manifest (truncated or replaced); write the file again"
        )
    if digest(head, sums, manifest) != manifest[DIGEST]:
        raise DataError(
            f"{path}: its labels, addresses, sums or manifest are not those that were written "
            f"together (damaged, edited or "
            "replaced); write the file again"
        )
    return manifest, sums


def _check(path: Path, fine: bool) -> None:
    if not fine:
        raise _damaged(path)


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: truncated, damaged or no .beton file of version {VERSION}; write it again"
    )
