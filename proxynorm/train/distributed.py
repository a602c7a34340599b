"""The processes of a run: one, or those that torchrun or srun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from proxynorm.errors import ConfigError
from proxynorm.train.faults import shared_fate
from proxynorm.train.memory import keep_freed_memory


@dataclass(frozen=True)
class Process:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process."""
        if self.world_size == 1:
            return flags
        tensor = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in tensor.tolist())

    def share(self, value: object) -> object:
        """Rank 0's `value`, in every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank, in every process."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def union(self, values: dict[str, str]) -> dict[str, str]:
        """The entries of all processes' `values`, in every process."""
        return {key: value for part in self.gather(dict(values)) for key, value in part.items()}

    def align_buffers(self, model: torch.nn.Module) -> None:
        """Give every process rank 0's buffers, which Batch Norm's running averages are, so that all evaluate one network."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def environment_ranks() -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun's variables, else from a multi-task srun step, else a single process.

    Raises ConfigError where srun's tasks would not find one another.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ConfigError(
                "srun started several tasks, but MASTER_ADDR and MASTER_PORT are not set: "
                "use slurm/train.sbatch, or set them to the first node and a free port"
            )
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return 0, 0, 1


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device for `name`: auto, cpu, cuda or cuda:N. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: valid: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: valid: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: torch finds no CUDA device; use device=cpu")
    if device.type == "cuda" and device.index is None:
        # under SLURM's --gpus-per-task a process sees its own GPU alone, as the first
        device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    return device


def fresh_store(rank: int, world_size: int) -> dist.Store:
    """The rendezvous store under a prefix of its own for each restart by torchrun, whose agent keeps one store for
    all of them: without it a restarted worker finds the addresses of dead ones."""
    store, *_ = next(dist.rendezvous("env://", rank, world_size))
    return dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def processes(device_name: str) -> Iterator[Process]:
    """Join the run's process group for the duration of the block; a lone process needs none.

    Raises PeerError, a ProxynormError, where another process failed first.
    """
    rank, local_rank, world_size = environment_ranks()
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory(device)
    if world_size == 1:
        yield Process(0, 1, device)
        return
    backend, store = "nccl" if device.type == "cuda" else "gloo", fresh_store(rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        with shared_fate(store, rank):
            yield Process(rank, world_size, device)
    finally:
        dist.destroy_process_group()
