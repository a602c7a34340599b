"""Checks of the layer on a device; they need torch and proxynorm.nn alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu_speed import Machine, Skipped
from proxynorm.nn import NormAct2d, proxy_moments
from proxynorm.train.readback import Readback, step_if

NORMS = ("ln_pn", "gn_pn", "ln", "gn", "bn", "in", "bn_pn", "in_pn")
ACTIVATIONS = {"relu": torch.relu, "silu": functional.silu, "gelu": functional.gelu}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Added to twice the written formula's own error: the rounding of the result.
FLOORS = {"bf16": 4e-3, "fp16": 5e-4, "fp32": 2e-6}
DRAWS = 4  # inputs and output gradients a case: the rounding error of one varies severalfold


def formula(layer: NormAct2d, x: Tensor) -> Tensor:
    """The layer in torch's own operations: norm and activation in x's type, PN in float32."""
    z = ACTIVATIONS[layer.act_name](act_input(layer, x))
    if not layer.proxied:
        return z
    mean, var = proxy_moments(*layer.four_parameters(), activation=layer.act_name)
    mean, scale = (value.view(1, -1, 1, 1) for value in (mean, torch.rsqrt(var + layer.proxy_eps)))
    return ((z.to(torch.promote_types(x.dtype, torch.float32)) - mean) * scale).to(x.dtype)


def act_input(layer: NormAct2d, x: Tensor) -> Tensor:
    """γy + β by torch's own norms, in x's type."""
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    if layer.kind == "bn":
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps)
    groups = {"ln": 1, "in": layer.num_features}.get(layer.kind, layer.groups)
    return functional.group_norm(x, groups, weight, bias, layer.eps)


def results(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, grad: Tensor) -> dict:
    """Return the output and all gradients of one forward and backward pass."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    out = run(x)
    out.backward(grad.to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **gradients}


def errors(got: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return relative errors in the 2-norm, their root mean square over the draws."""
    found = {}
    for name in exact[0]:
        off = sum((g[name].double() - e[name]).norm() ** 2 for g, e in zip(got, exact, strict=True))
        found[name] = float((off / sum(e[name].norm() ** 2 for e in exact)) ** 0.5)
    return found


def make_layer(machine: Machine, norm: str, activation: str) -> NormAct2d:
    """Return a layer with trained-like parameters."""
    torch.manual_seed(0)
    channels, groups = (64 if machine.on_gpu else 16), (4 if "gn" in norm else None)
    layer = NormAct2d(channels, norm, "pn" in norm, act_layer=activation, groups=groups)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0 if parameter is layer.weight else 0.0, 0.3)
    return layer.to(machine.device)


def draw(machine: Machine, layout: str, dtype: str) -> tuple[Tensor, Tensor]:
    """Return an input and an output gradient."""
    shape = (32, 64, 28, 28) if machine.on_gpu else (4, 16, 8, 8)
    move = {"dtype": DTYPES[dtype], "memory_format": FORMATS[layout], "device": machine.device}
    return (2 * torch.randn(shape) + 0.5).to(**move), torch.randn(shape).to(**move)


def norms(machine: Machine) -> Iterator[dict]:
    """Compare every norm, activation, layout, type and mode with float64, within the deadline."""
    cases = list(product(("eager", "compiled"), DTYPES, FORMATS, NORMS, ACTIVATIONS))
    if not machine.on_gpu:
        cases = [case for case in cases if case[0] == "eager"]
        cases.append(("compiled", "fp32", "channels_last", "ln_pn", "relu"))
    for number, (mode, dtype, layout, norm, activation) in enumerate(cases):
        machine.check_time(f"{len(cases) - number} of {len(cases)} cases")
        yield norm_case(machine, mode, dtype, layout, norm, activation)


def norm_case(machine: Machine, mode: str, dtype: str, layout: str, norm: str, act: str) -> dict:
    layer = make_layer(machine, norm, act)
    draws = [draw(machine, layout, dtype) for _ in range(DRAWS)]
    wide = copy.deepcopy(layer).double()
    torch._dynamo.reset()
    run = torch.compile(layer, dynamic=False) if mode == "compiled" else layer
    exact = [results(partial(formula, wide), wide, x.double(), g.double()) for x, g in draws]
    written = errors([results(partial(formula, layer), layer, x, g) for x, g in draws], exact)
    got = [results(run, layer, x, g) for x, g in draws]
    found, name = errors(got, exact), f"{mode} {dtype} {layout} {norm} {act}"
    worst = max(found, key=lambda key: found[key] - 2 * written[key])
    good = found[worst] <= 2 * written[worst] + FLOORS[dtype]
    output = got[0]["output"]
    kept = output.stride() == draws[0][0].stride()
    return {
        "mode": mode,
        "type": dtype,
        "layout": layout,
        "norm": norm,
        "activation": act,
        "error": f"{found[worst]:.1e} ({worst})",
        "formula's": f"{written[worst]:.1e}",
        "exact": machine.expect(good, f"{name}: error of {worst} {found[worst]:.1e}"),
        "strides kept": machine.expect(kept, f"{name}: strides {output.stride()}"),
    }


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
