"""The processes of a run: a single one, or those that torchrun or srun started."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from proxynorm.cli import first_line
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.train.memory import keep_freed_memory

FAULT = "fault"  # the store's key for the first fault, as JSON [rank, message]
TIMEOUT = timedelta(minutes=30)  # the longest wait for a peer that loads, compiles or saves
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0  # for a process to notice a lost peer itself, as gloo does
LOST = re.compile("connection (closed|reset) by peer", re.IGNORECASE)  # gloo's message


class PeerError(ProxynormError):
    """Another process of the run failed."""

    status = 1


@dataclass(frozen=True)
class Process:
    """This process among its peers. Every method is a collective operation."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set in any process.

        It runs over gloo, on the host: NCCL would wait for all earlier work of the GPU.
        """
        if self.world_size == 1:
            return flags
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in tensor.tolist())

    def share(self, value: Any) -> Any:
        """Return rank 0's `value`."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, by rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def align_buffers(self, model: torch.nn.Module) -> None:
        """Broadcast rank 0's buffers (Batch Norm's running statistics) to all processes."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def parallel(self, model: torch.nn.Module, static_graph: bool) -> torch.nn.Module:
        """Wrap `model` to average gradients over the processes; static_graph: see torch's DDP."""
        if self.world_size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # no second copy of the gradients
            static_graph=static_graph,
        )

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


class Ranks(NamedTuple):
    """A process's rank in the run and on its machine, and the number of processes."""

    rank: int
    local_rank: int
    world_size: int


def environment_ranks() -> Ranks:
    """Return the ranks as torchrun or a multi-task srun step sets them.

    Raises ConfigError if srun started several tasks without a rendezvous address.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Ranks(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ConfigError(
                "srun started several tasks, but MASTER_ADDR and MASTER_PORT are not set: "
                "use slurm/train.sbatch, or set them to the first node and a free port"
            )
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        return Ranks(*(int(env[name]) for name in names))
    return Ranks(0, 0, 1)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device for auto, cpu, cuda or cuda:N. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device={name}: valid: auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: torch finds no CUDA device; use device=cpu")
    if device.type == "cuda" and device.index is None:
        # With SLURM's --gpus-per-task a process sees only its own GPU, as number 0.
        device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    return device


@contextmanager
def processes(device_name: str) -> Iterator[Process]:
    """Join the run's process group for the duration of the block.

    Raises PeerError if another process failed first.
    """
    rank, local_rank, world_size = environment_ranks()
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory(device)
    if world_size == 1:
        yield Process(0, 1, device)
        return
    # torchrun's agent keeps one store for all restarts. Without a prefix for each restart, workers
    # would find the addresses of dead ones.
    store, *_ = next(dist.rendezvous("env://", rank, world_size))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, on_gpu = dist.PrefixStore(f"restart-{restarts}", store), device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if on_gpu else None,  # connects NCCL at once, and only to this GPU
        timeout=TIMEOUT,
    )
    with fail_together(store, rank):
        yield Process(rank, world_size, device)
    # Not after a fault: it would wait for a lost process.
    dist.destroy_process_group()


@contextmanager
def fail_together(store: dist.Store, rank: int) -> Iterator[None]:
    """Run the block; if one process fails, end all of them with its message (PeerError).

    A thread ends processes that hang in a collective operation, as they do with NCCL.
    """
    ended = threading.Event()
    # A connection of its own, because requests of two threads on one connection block each other.
    connection = store.clone()
    threading.Thread(target=_exit_with_peers, args=(connection, rank, ended), daemon=True).start()
    try:
        yield
    except Exception as error:
        is_ours = isinstance(error, ProxynormError)
        kind = "" if is_ours else f"{type(error).__name__}: "
        fault = json.dumps([rank, kind + first_line(error)])
        first = None
        with suppress(RuntimeError):  # the store is gone
            first = json.loads(store.compare_set(FAULT, "", fault))  # keeps an earlier fault
        if not is_ours and first is not None and first[0] != rank:
            raise PeerError(_message(*first)) from None
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            raise PeerError("another process was killed, or its machine is gone") from None
        raise
    finally:
        ended.set()


def _exit_with_peers(store: dist.Store, rank: int, ended: threading.Event) -> None:
    """Exit if another process failed and this one does not end by itself."""
    while not ended.wait(POLL_SECONDS):
        try:
            fault = json.loads(store.get(FAULT)) if store.check([FAULT]) else None
        except RuntimeError:
            return
        if fault is not None and fault[0] != rank and not ended.wait(GRACE_SECONDS):
            print(f"error: {_message(*fault)}", file=sys.stderr, flush=True)
            os._exit(1)  # sys.exit would wait for the collective operation


def _message(rank: int, fault: str) -> str:
    return f"process {rank} failed, and with it the run: {fault}"
