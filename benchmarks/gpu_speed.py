"""The measurements of gpu_check: a GPU's bandwidth, layers, networks and the training loop."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer

from proxynorm.nn import NormAct2d

MODELS, NETS = ("resnet50", "efficientnet_b0"), ("torch bn", "ln_pn", "ln", "gn_pn")


class Skipped(Exception):
    """A check that cannot run here; the message says why."""


@dataclass
class Machine:
    """The device under test, the time limit, and the failures so far."""

    device: torch.device
    deadline: float = 0.0  # of the running check, on time.monotonic's clock
    bandwidth: float = 0.0  # bytes per second of a copy, read and written
    failures: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """False on a CPU, where checks run a few small cases."""
        return self.device.type == "cuda"

    def expect(self, holds: bool, what: str) -> str:
        """Record a failure unless `holds`; return yes or NO for the table."""
        if not holds:
            self.failures.append(what)
        return "yes" if holds else "NO"

    def seconds(self, action: Callable[[], object], rounds: int) -> float:
        """The mean time of `rounds` calls after a warm-up."""
        return Timer("action()", globals={"action": action}).timeit(rounds).mean

    def check_time(self, left: str) -> None:
        """Raise Skipped if the deadline has passed; left says what remains to be done."""
        if time.monotonic() > self.deadline:
            raise Skipped(f"{left}, for lack of time")


def facts(machine: Machine) -> Iterator[dict]:
    """Describe the machine; measure the bandwidth of a copy."""
    size = 2**30 if machine.on_gpu else 2**22
    source = torch.empty(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    machine.bandwidth = 2 * size / machine.seconds(lambda: target.copy_(source), 20)
    yield {"fact": "device", "value": device_name(machine.device)}
    yield {"fact": "torch, CUDA", "value": f"{torch.__version__}, {torch.version.cuda}"}
    if machine.on_gpu:
        properties = torch.cuda.get_device_properties(machine.device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        value = f"{properties.major}.{properties.minor}, {memory}"
        yield {"fact": "capability, memory", "value": value}
        yield {"fact": "GPUs", "value": torch.cuda.device_count()}
    yield {"fact": "copy, GB/s read and written", "value": round(machine.bandwidth / 1e9, 1)}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def traffic(machine: Machine) -> Iterator[dict]:
    """Time layers on large bf16 maps; convert to bytes per element by the bandwidth of a copy."""
    if not machine.on_gpu:
        raise Skipped("speed means nothing on a CPU")
    x = torch.randn(64, 256, 56, 56, device=machine.device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)
    torch_bn = nn.Sequential(nn.BatchNorm2d(256), nn.ReLU(inplace=True)).to(machine.device)
    layers = {"torch bn, relu": torch_bn}
    for norm, act in product(("ln_pn", "ln", "gn_pn"), ("relu", "silu")):
        layers[f"{norm}, {act}"] = NormAct2d(256, norm, "pn" in norm, act).to(machine.device)
    for (name, layer), mode in product(layers.items(), ("eager", "compiled")):
        machine.check_time(f"from {name} {mode} on")
        torch._dynamo.reset()  # beyond a number of compilations, torch silently runs eagerly
        run = torch.compile(layer, dynamic=False) if mode == "compiled" else layer
        taken = machine.seconds(lambda run=run: run(x).backward(grad), 10)
        bytes_each = f"{taken * machine.bandwidth / x.numel():.1f}"
        yield {"layer": name, "mode": mode, "ms": f"{1e3 * taken:.2f}", "bytes": bytes_each}


def networks(machine: Machine) -> Iterator[dict]:
    """Time training steps in bf16: images/s, memory, kernels, and the share of time in kernels."""
    try:
        from benchmarks.networks import build
    except ImportError as error:
        raise Skipped(f"needs {error.name}") from None
    cases = list(product((128, 32), ("eager", "compiled", "reduce-overhead"), MODELS, NETS))
    if not machine.on_gpu:
        cases = [(2, "eager", "resnet20v2", norm) for norm in ("torch bn", "ln_pn")]
    for number, (batch, mode, model, norm) in enumerate(cases):
        machine.check_time(f"{len(cases) - number} of {len(cases)} cases")
        torch._dynamo.reset()
        net = build(norm, model, "channels_last", machine.device)
        row = {"model": model, "norm": norm, "batch": batch, "mode": mode}
        yield row | time_network(machine, net, batch, mode)


def time_network(machine: Machine, net: nn.Module, batch: int, mode: str) -> dict:
    size = 224 if machine.on_gpu else 32
    images = torch.randn(batch, 3, size, size, device=machine.device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(batch, dtype=torch.long, device=machine.device)
    options = {"mode": mode} if mode == "reduce-overhead" else {}
    run = net if mode == "eager" else torch.compile(net, dynamic=False, **options)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16):
            logits = run(images)
        cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if not machine.on_gpu:
        step()
        return {"images/s": "", "GiB": "", "kernels": "", "busy": ""}
    torch.cuda.reset_peak_memory_stats(machine.device)
    taken = machine.seconds(step, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    busy = sum(event.device_time_total for event in kernels) / 1e6
    return {
        "images/s": round(batch / taken),
        "GiB": round(torch.cuda.max_memory_allocated(machine.device) / 2**30, 2),
        "kernels": len(kernels),
        "busy": f"{min(1.0, busy / taken):.0%}",
    }


def engine(machine: Machine) -> Iterator[dict]:
    """Compare our training with a bare loop and timm's, on synthetic images."""
    if not machine.on_gpu:
        raise Skipped("speed means nothing on a CPU")
    try:
        from benchmarks.engine import Options, compare, measure
        from tests.gpu.training import make_images
    except ImportError as error:
        raise Skipped(f"needs {error.name}") from None
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "data", train=2048, held_out=3, side=256)
        options = Options(model="resnet50", norm="ln_pn", batch=128, size=224, workers=8)
        options.source, options.rounds, options.steps = f"{folder}/data", 3, 10
        yield from compare(measure(options, folder))
