"""Processes that are measured from outside: one line in, one JSON object out, memory of the whole process tree."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

from proxynorm.errors import ProxynormError

SAMPLE_SECONDS = 0.1
CLOCK_TICK = 1 / os.sysconf("SC_CLK_TCK")  # processor time is told no finer
COUNTED = ("Pss_Anon:", "Pss_Shmem:")


def process_tree(pid: int) -> list[int]:
    """A process and all that it started, as far as they still live (Linux)."""
    found = [pid]
    for process in found:
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def memory_of(pid: int) -> int:
    """Bytes that a process tree holds beside files' pages, shared ones counted once; 0 where it is not Linux."""
    total = 0
    for process in process_tree(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(COUNTED))
    return total


def cpu_seconds_of(pid: int) -> float:
    """Processor time that a process tree has used so far, its ended and awaited children included (Linux)."""
    ticks = 0
    for process in process_tree(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # utime, stime, cutime, cstime: proc(5) numbers them 14 to 17, and the state, the first here, 3.
        ticks += sum(map(int, fields[11:15]))
    return ticks * CLOCK_TICK


class Child:
    """A process that answers each line with a JSON object. Use it in a with statement, which ends it."""

    def __init__(self, command: list[str], environment: dict[str, str], errors: Path) -> None:
        self.command, self.errors = command, errors
        with open(errors, "wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
            )

    def ask(self) -> dict:
        """The answer to one more line, with "cpu_seconds", the processor time it took.

        Raises ProxynormError with the end of what the process said if it died.
        """
        before = cpu_seconds_of(self.process.pid)
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.errors.read_text(errors="replace").strip().splitlines() or [
                "it said nothing"
            ]
            raise ProxynormError(f"{' '.join(self.command[1:4])} ended: {said[-1]}")
        used = max(cpu_seconds_of(self.process.pid) - before, CLOCK_TICK)
        return {**json.loads(line), "cpu_seconds": used}

    def ask_with_memory(self) -> dict:
        """As ask, with "memory": the largest of the samples taken meanwhile, bytes."""
        samples, done = [0], threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_SECONDS):
                samples.append(memory_of(self.process.pid))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            answer = self.ask()
        finally:
            done.set()
            thread.join()
        return {**answer, "memory": max(*samples, memory_of(self.process.pid))}

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
