"""The checks of gpu_check that need torch and proxynorm.nn alone; networks need timm besides."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from proxynorm.nn import NormAct2d, pn_act, proxy_moments
from proxynorm.nn.fast.fused import per_channel
from proxynorm.train.readback import Readback, step_if

NORMS = ("ln_pn", "gn_pn", "ln", "gn", "bn", "in", "bn_pn", "in_pn")
ACTIVATIONS = {"relu": torch.relu, "silu": functional.silu, "gelu": functional.gelu}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Added to twice the written formula's own error: the rounding of the result.
FLOORS = {"bf16": 4e-3, "fp16": 5e-4, "fp32": 2e-6}


class Skipped(Exception):
    """A check that cannot run here; the message says why."""


@dataclass
class Machine:
    """Where the checks run; small: few and tiny cases, as on a CPU; deadline: of the long ones."""

    device: torch.device
    small: bool
    deadline: float
    bandwidth: float = 0.0  # bytes a second of a copy, read and written
    failures: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def expect(self, holds: bool, what: str) -> str:
        """Record a failure unless `holds`; return a word for the table."""
        if not holds:
            self.failures.append(what)
        return "yes" if holds else "NO"

    def seconds(self, action: Callable[[], object], rounds: int) -> float:
        """Return the seconds of one call, the mean of `rounds` after two more."""
        for _ in range(2):
            action()
        self.wait()
        start = time.perf_counter()
        for _ in range(rounds):
            action()
        self.wait()
        return (time.perf_counter() - start) / rounds

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def facts(machine: Machine) -> Iterator[dict]:
    """Describe the machine; measure the bandwidth of a copy."""
    size = 2**22 if machine.small else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    machine.bandwidth = 2 * size / machine.seconds(lambda: target.copy_(source), 20)
    yield {"fact": "device", "value": device_name(machine.device)}
    yield {"fact": "torch, CUDA", "value": f"{torch.__version__}, {torch.version.cuda}"}
    if machine.on_gpu:
        properties = torch.cuda.get_device_properties(machine.device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield {
            "fact": "capability, memory",
            "value": f"{properties.major}.{properties.minor}, {memory}",
        }
        yield {"fact": "GPUs", "value": torch.cuda.device_count()}
    yield {"fact": "copy, GB/s read and written", "value": round(machine.bandwidth / 1e9, 1)}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# The layer against float64


def formula(layer: NormAct2d, x: Tensor) -> Tensor:
    """The layer as the paper writes it, in float32 or float64, by torch's own norms."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if layer.kind == "bn":
        y = functional.batch_norm(wide, None, None, training=True, eps=layer.eps)
    else:
        groups = {"ln": 1, "in": layer.num_features}.get(layer.kind, layer.groups)
        y = functional.group_norm(wide, groups, eps=layer.eps)
    phi = ACTIVATIONS[layer.act_name]
    if layer.proxied:
        moments = partial(proxy_moments, activation=layer.act_name)
        z = pn_act(y, *layer.four_parameters(), phi, moments, layer.proxy_eps)
    else:
        z = phi(per_channel(layer.weight) * y + per_channel(layer.bias))
    return z.to(x.dtype)


def results(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, grad: Tensor) -> dict:
    """Return the output and all gradients of one forward and backward pass."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    out = run(x)
    out.backward(grad.to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **gradients}


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return relative errors in the 2-norm."""
    return {
        name: float((got[name].double() - exact[name]).norm() / (exact[name].norm() + 1e-30))
        for name in exact
    }


def make_case(machine: Machine, norm: str, activation: str, layout: str, dtype: str) -> tuple:
    """Return a layer with trained-like parameters, an input and an output gradient."""
    torch.manual_seed(0)
    shape = (4, 16, 8, 8) if machine.small else (32, 64, 28, 28)
    layer = NormAct2d(shape[1], norm, act_layer=activation, groups=4 if "gn" in norm else None)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0 if parameter is layer.weight else 0.0, 0.3)
    x, grad = 2 * torch.randn(shape) + 0.5, torch.randn(shape)
    move = {"dtype": DTYPES[dtype], "memory_format": FORMATS[layout]}
    return layer.to(machine.device), x.to(machine.device, **move), grad.to(machine.device, **move)


def norms(machine: Machine) -> Iterator[dict]:
    """Compare every norm, activation, layout, type and mode with float64, within the deadline."""
    cases = list(product(("eager", "compiled"), DTYPES, FORMATS, NORMS, ACTIVATIONS))
    if machine.small:
        cases = [case for case in cases if case[0] == "eager"]
        cases.append(("compiled", "fp32", "channels_last", "ln_pn", "relu"))
    for number, (mode, dtype, layout, norm, activation) in enumerate(cases):
        if time.monotonic() > machine.deadline:
            raise Skipped(f"{len(cases) - number} of {len(cases)} cases, for want of time")
        yield norm_case(machine, mode, dtype, layout, norm, activation)


def norm_case(machine: Machine, mode: str, dtype: str, layout: str, norm: str, act: str) -> dict:
    layer, x, grad = make_case(machine, norm, act, layout, dtype)
    wide = copy.deepcopy(layer).double()
    exact = results(partial(formula, wide), wide, x.double(), grad.double())
    written = errors(results(partial(formula, layer), layer, x, grad), exact)
    torch._dynamo.reset()
    run = torch.compile(layer, dynamic=False) if mode == "compiled" else layer
    got = results(run, layer, x, grad)
    found, name = errors(got, exact), f"{mode} {dtype} {layout} {norm} {act}"
    worst = max(found, key=lambda key: found[key] - 2 * written[key])
    good = found[worst] <= 2 * written[worst] + FLOORS[dtype]
    kept = got["output"].stride() == x.stride()
    return {
        "mode": mode,
        "type": dtype,
        "layout": layout,
        "norm": norm,
        "activation": act,
        "error": f"{found[worst]:.1e} ({worst})",
        "formula's": f"{written[worst]:.1e}",
        "exact": machine.expect(good, f"{name}: error of {worst} {found[worst]:.1e}"),
        "strides kept": machine.expect(kept, f"{name}: strides {got['output'].stride()}"),
    }


def traffic(machine: Machine) -> Iterator[dict]:
    """Time large maps in bf16; as effective bytes an element, at the bandwidth of a copy."""
    if not machine.on_gpu:
        raise Skipped("speed means nothing on a CPU")
    x = torch.randn(64, 256, 56, 56, device=machine.device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)
    torch_bn = nn.Sequential(nn.BatchNorm2d(256), nn.ReLU(inplace=True)).to(machine.device)
    layers = {"torch bn, relu": torch_bn}
    for norm, act in product(("ln_pn", "ln", "gn_pn"), ("relu", "silu")):
        layers[f"{norm}, {act}"] = NormAct2d(256, norm, act_layer=act).to(machine.device)
    for (name, layer), mode in product(layers.items(), ("eager", "compiled")):
        if time.monotonic() > machine.deadline:
            raise Skipped(f"from {name} {mode} on, for want of time")
        torch._dynamo.reset()
        run = torch.compile(layer, dynamic=False) if mode == "compiled" else layer
        taken = machine.seconds(lambda run=run: run(x).backward(grad), 10)
        bytes_each = taken * machine.bandwidth / x.numel()
        yield {
            "layer": name,
            "mode": mode,
            "ms": f"{1e3 * taken:.2f}",
            "bytes": f"{bytes_each:.1f}",
        }


# A step without the trainer


def syncs(machine: Machine) -> Iterator[dict]:
    """Run steps under CUDA's debug mode, in which an implicit wait for the device is an error."""
    layers = [nn.Conv2d(3, 16, 3), NormAct2d(16, "ln_pn"), nn.Flatten(), nn.Linear(16 * 36, 10)]
    net = nn.Sequential(*layers).to(machine.device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, fused=True)
    images = torch.randn(8, 3, 8, 8, device=machine.device)
    targets = torch.zeros(8, dtype=torch.long, device=machine.device)
    last, waited = None, "none"
    try:
        for step in range(6):
            if machine.on_gpu and step == 2:
                torch.cuda.set_sync_debug_mode("error")
            loss = functional.cross_entropy(net(images), targets)
            loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
            if last is not None:
                last.read()
            step_if(optimizer, torch.isfinite(norm))
            last = Readback(torch.stack([loss.detach(), norm]))
            optimizer.zero_grad(set_to_none=True)
    except RuntimeError as error:
        waited = str(error).splitlines()[0]
    finally:
        if machine.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    yield {"step": "layers of this project, bare loop", "waits": waited}
    machine.expect(waited == "none", f"a step waits for the device: {waited}")
    if not machine.on_gpu:
        raise Skipped("waits are seen on CUDA alone")


def networks(machine: Machine) -> Iterator[dict]:
    """Time training steps in bf16: images/s, memory, kernels, share of time in kernels."""
    try:
        from proxynorm.models import create_model
    except ImportError as error:
        raise Skipped(f"needs {error.name}") from None
    cases = list(product((128, 32), ("eager", "compiled", "reduce-overhead"), MODELS, NETS))
    if machine.small:
        cases = [(2, "eager", "resnet20v2", norm) for norm in ("torch bn", "ln_pn")]
    for number, (batch, mode, model, norm) in enumerate(cases):
        if time.monotonic() > machine.deadline:
            raise Skipped(f"{len(cases) - number} of {len(cases)} cases, for want of time")
        torch._dynamo.reset()
        make = partial(create_model, model, norm.removeprefix("torch "), num_classes=1000)
        net = torch_norms(make()) if norm == "torch bn" else make()
        yield {"model": model, "norm": norm, "batch": batch, "mode": mode} | time_network(
            machine, net, batch, mode
        )


MODELS, NETS = ("resnet50", "efficientnet_b0"), ("torch bn", "ln_pn", "ln", "gn_pn")


def torch_norms(net: nn.Module) -> nn.Module:
    """Replace the layers by torch's Batch Norm and an activation in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, NormAct2d):
                act = copy.deepcopy(child.act) if child.apply_act else nn.Identity()
                if hasattr(act, "inplace"):
                    act.inplace = True
                setattr(module, name, nn.Sequential(nn.BatchNorm2d(child.num_features), act))
    return net


def time_network(machine: Machine, net: nn.Module, batch: int, mode: str) -> dict:
    size = 32 if machine.small else 224
    net = net.to(machine.device, memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, size, size, device=machine.device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(batch, dtype=torch.long, device=machine.device)
    options = {"mode": mode} if mode == "reduce-overhead" else {}
    run = net if mode == "eager" else torch.compile(net, dynamic=False, **options)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16):
            logits = run(images)
        functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if not machine.on_gpu:
        step()
        return {"images/s": "", "GiB": "", "kernels": "", "busy": ""}
    torch.cuda.reset_peak_memory_stats(machine.device)
    taken = machine.seconds(step, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        machine.wait()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    busy = sum(event.device_time_total for event in kernels) / 1e6
    return {
        "images/s": round(batch / taken),
        "GiB": round(torch.cuda.max_memory_allocated(machine.device) / 2**30, 2),
        "kernels": len(kernels),
        "busy": f"{min(1.0, busy / taken):.0%}",
    }
