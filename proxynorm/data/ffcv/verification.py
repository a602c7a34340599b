"""Reads a .beton file back: checks each sample's checksum and decodes it as training does."""

from __future__ import annotations

import numpy as np

from proxynorm.data.augment import View
from proxynorm.data.ffcv.beton import Samples, byte_sum
from proxynorm.data.ffcv.native import BAD_SUM, REASONS, ffcv_available, map_file
from proxynorm.data.readers import BetonReader, Failures, Job
from proxynorm.data.spec import LoaderSpec
from proxynorm.errors import DataError

ROWS_PER_JOB = 256
SIDE = 8


def verify(samples: Samples, workers: int = 1) -> None:
    """Read all of a .beton file. Raises DataError with the first damaged image and their number."""
    failures = find_damage(samples, workers)
    if failures:
        name, reason = next(iter(failures.items()))
        raise DataError(
            f"{name}: {reason}; {len(failures)} of {len(samples)} images are damaged, write the "
            f"file again"
        )


def find_damage(samples: Samples, workers: int = 1) -> dict[str, str]:
    """Return the damaged images, name -> reason. Without FFCV only checksums are compared."""
    if not ffcv_available():
        return compare_sums(samples)
    reader = BetonReader(samples, (), LoaderSpec(workers=workers), pin=False)
    side = SIDE if samples.channels == 3 else int(samples.height[0])
    failures = Failures("skip")
    parts = np.split(np.arange(len(samples)), range(ROWS_PER_JOB, len(samples), ROWS_PER_JOB))
    jobs = (Job(part, np.zeros(len(part), dtype=np.uint64), side) for part in parts)
    for _ in reader.stream(jobs, View(), failures):
        pass
    return failures.reasons


def compare_sums(samples: Samples) -> dict[str, str]:
    """Return the images whose bytes no longer have the checksum written down, name -> reason."""
    file = map_file(samples.path)
    spans = zip(samples.pointer, samples.pointer + samples.size, samples.sums)
    return {
        f"{samples.path}: image {row}": REASONS[BAD_SUM]
        for row, (start, end, expected) in enumerate(spans)
        if byte_sum(file[start:end]) != expected
    }
