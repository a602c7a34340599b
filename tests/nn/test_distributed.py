"""norm_batch="global": two processes with half a batch each are one process with all of it."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from proxynorm.nn import NormAct2d


def half(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, grad = (t[rank * 3 : rank * 3 + 3].requires_grad_() for t in inputs())
    act = NormAct2d(4, "bn_pn", norm_batch="global").double()
    z = act(x)
    z.backward(grad.detach())
    weight_grad = act.weight.grad.clone()
    dist.all_reduce(weight_grad)
    torch.save(
        [z.detach(), x.grad, weight_grad, act.running_mean, act.running_var], f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=generator) for _ in range(2)
    )


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(half, (port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    x, grad = inputs()
    act = NormAct2d(4, "bn_pn", norm_batch="global").double()
    z = act(x.requires_grad_())
    z.backward(grad)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), z.detach())
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad)
    for part in parts:
        torch.testing.assert_close(part[2:], [act.weight.grad, act.running_mean, act.running_var])
