"""Where LN+PN's time goes: its layers and its extra passes over the map, each timed alone.

  python scripts/benchmark.py passes model=resnet50 batch=8 size=224 json=results/passes/NAME.json

Each proxied layer of the model runs on a map of its own size, forward and backward, against
torch's LN and activation. The passes that only the proxied layer makes are timed alone, and so is
a copy of the map for scale. Sums over the layers, medians over rounds, shares of a training step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.common import ModelOptions, require_positive, seconds, take_turns, write_figures
from benchmarks.step import moments_seconds
from benchmarks.variants import FORMATS, Variant, build
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.nn import NormAct2d
from proxynorm.nn.fast.folding import fold
from proxynorm.nn.fast.fused import Head, channel_sum, gained_, gained_sums, per_channel
from proxynorm.nn.fast.one_step import Affines, Step, rebuild, takes_one_step
from proxynorm.nn.norms import group_normalize
from proxynorm.train.distributed import choose_device
from proxynorm.train.memory import keep_freed_memory

TORCH, OURS, COPY = "torch's LN and activation", "LN+PN", "a copy of the map, for scale"
CONSTANTS = "constants per channel, and their backward"


@dataclass
class Options(ModelOptions):
    format: str = option("channels_last", "memory format: nchw, channels_last")
    rounds: int = option(15, "times each is run, in turns")


@dataclass(frozen=True)
class LayerKind:
    """Layers that cost the same: shape of the map, activation, whether the output is scaled."""

    shape: tuple[int, ...]
    act: type[nn.Module]
    scaled: bool


def main(options: Options) -> None:
    if options.format not in FORMATS:
        raise ConfigError(f"format={options.format}: choose of {', '.join(FORMATS)}")
    require_positive(options, "batch", "size", "rounds")
    device, memory_format = choose_device(options.device), FORMATS[options.format]
    keep_freed_memory(device)  # as in training
    net = build(Variant("ln_pn", options.format), options.model, device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=memory_format)
    kinds = proxied_layers(net, images)
    step = median(
        seconds(lambda: net(images).sum().backward(), device) for _ in range(options.rounds)
    )
    net.zero_grad(set_to_none=True)
    times: Counter[str] = Counter()
    for kind, count in kinds.items():
        x = torch.randn(kind.shape, device=device).contiguous(memory_format=memory_format)
        for name, values in take_turns(actions(kind, x), options.rounds, device).items():
            times[name] += count * median(values)
    times[CONSTANTS] = moments_seconds(net)
    rows = [
        {"what": name, "ms": value * 1e3, "share": value / step} for name, value in times.items()
    ]
    cells = [(row["what"], f"{row['ms']:.1f}", f"{100 * row['share']:.2f}") for row in rows]
    print(text_table(("what", "ms", "% of a step"), cells))
    layers = kinds.total()
    print(f"a training step of {options.model}, LN+PN: {step * 1e3:.0f} ms; {layers} layers")
    figures = {"step_ms": step * 1e3, "layers": layers, "rows": rows}
    write_figures(options, {**figures, "threads": torch.get_num_threads()})


def proxied_layers(net: nn.Module, images: Tensor) -> Counter[LayerKind]:
    """The proxied layers of a forward pass, counted by kind."""
    found: Counter[LayerKind] = Counter()

    def note(layer: NormAct2d, inputs: tuple[Tensor, ...]) -> None:
        if layer.proxied:
            found[LayerKind(tuple(inputs[0].shape), type(layer.act), layer.proxy_scale)] += 1

    layers = [module for module in net.modules() if isinstance(module, NormAct2d)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return found


def actions(kind: LayerKind, x: Tensor) -> dict[str, Callable[[], object]]:
    """Both layers, forward and backward, and the single passes over one map, by name."""
    torch.manual_seed(0)
    grad, buffer, channels = torch.randn_like(x), torch.empty_like(x), x.shape[1]
    theirs = nn.Sequential(nn.GroupNorm(1, channels), kind.act(inplace=True)).to(x.device)
    ours = NormAct2d(channels, "ln", True, kind.act, proxy_scale=kind.scaled).to(x.device)
    # Within a network the constants come from outside; they have a row of their own.
    ours.share_constants(fold(ours.four_parameters(), ours.proxy_rule()))
    row = torch.rand(channels, device=x.device)
    gain = row if kind.scaled else None

    def both_ways(layer: nn.Module) -> Callable[[], object]:
        inputs = [x.detach().requires_grad_(), *layer.parameters()]
        return lambda: torch.autograd.grad(layer(inputs[0]), inputs, grad)

    if ours.act_name == "relu":
        passes = {
            "output − floor, the mask of the backward pass": lambda: torch.sub(
                x, per_channel(row), out=buffer
            ),
            "sum of the gradient over each channel": lambda: channel_sum(grad),
        }
    else:
        passes = {
            "gain and offset, or offset alone": lambda: gained_(buffer, gain, row),
            "u once more, in the backward pass": rebuilding(ours, x),
            "sums of the gradient, and of gradient · output where there is a gain": lambda: (
                gained_sums(grad, x, gain, row)
            ),
            "less: the copy of u that torch's activation in place keeps": lambda: x.clone(),
        }
    return {
        TORCH: both_ways(theirs),
        OURS: both_ways(ours),
        **passes,
        COPY: lambda: buffer.copy_(x),
    }


def rebuilding(layer: NormAct2d, x: Tensor) -> Callable[[], object]:
    """The recomputation of the activation's input in the layer's backward pass."""
    row = torch.rand(x.shape[1], device=x.device)
    if not takes_one_step(x, layer.constants()):
        return lambda: group_normalize(x, 1, layer.eps, row, row)
    step = Step(Head(layer.act_name, layer.act), layer.proxy_rule(), 1, layer.eps)
    statistics = [torch.rand(len(x), 1, device=x.device)] * 2
    return lambda: rebuild(x, Affines(row, row, row, row), statistics, step)
