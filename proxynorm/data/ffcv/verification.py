"""Reading a .beton file back: every sample's bytes against its sum, every JPEG through the decoder
of training."""

from __future__ import annotations

import numpy as np

from proxynorm.data.augment import View
from proxynorm.data.ffcv.beton import Samples, byte_sum
from proxynorm.data.ffcv.native import ffcv_available, map_file
from proxynorm.data.readers import BetonReader, Failures, Job
from proxynorm.data.spec import LoaderSpec
from proxynorm.errors import DataError

ROWS_PER_JOB = 256
SIDE = 8


def verify(samples: Samples, workers: int = 1) -> None:
    """Read all of a .beton file. Raises DataError with the number of damaged images and the first
    one's reason."""
    failures = find_damage(samples, workers)
    if failures:
        name, reason = next(iter(failures.items()))
        raise DataError(
            f"{name}: {reason}; {len(failures)} of {len(samples)} images are damaged, write the "
            f"file again"
        )


def find_damage(samples: Samples, workers: int = 1) -> dict[str, str]:
    """The damaged images of a .beton file, name -> reason. Without FFCV only the sums are
    compared."""
    if not ffcv_available():
        return compare_sums(samples)
    reader = BetonReader(samples, (), LoaderSpec(workers=workers), pin=False)
    side = SIDE if samples.channels == 3 else int(samples.height[0])
    failures = Failures("skip")
    rows = np.arange(len(samples))
    jobs = (
        Job(part, np.zeros(len(part), dtype=np.uint64), side)
        for part in (
            rows[start : start + ROWS_PER_JOB] for start in range(0, len(rows), ROWS_PER_JOB)
        )
    )
    for _ in reader.stream(jobs, View(), failures):
        pass
    return failures.reasons


def compare_sums(samples: Samples) -> dict[str, str]:
    """The images whose stored bytes do not have the sum that was written down, name -> reason."""
    file = map_file(samples.path)
    bad = (
        row
        for row, expected in enumerate(samples.sums)
        if byte_sum(file[samples.pointer[row] : samples.pointer[row] + samples.size[row]])
        != expected
    )
    return {
        f"{samples.path}: image {row}": "its stored bytes have changed since it was written"
        for row in bad
    }
