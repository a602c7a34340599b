"""Where LN+PN's time goes: each proxied layer of a model on a map of its own size, against torch's LN and activation.

  python scripts/benchmark.py passes model=resnet50 batch=8 size=224 json=results/passes/NAME.json

Beside both layers, forward and backward, stand alone the passes over the map that only the proxied one makes, and one
pass that torch makes anyway, a copy. Sums over the layers, medians over interleaved rounds, shares of a training step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.step import moments_seconds, timed
from benchmarks.variants import FORMATS, Variant, build
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.nn import NormAct2d
from proxynorm.nn.fast.folding import fold
from proxynorm.nn.fast.fused import Head, channel_sum, gained_, gained_sums, per_channel
from proxynorm.nn.fast.one_step import Affines, Step, rebuild, takes_one_step
from proxynorm.nn.norms import group_normalize
from proxynorm.train.distributed import choose_device
from proxynorm.train.memory import keep_freed_memory
from proxynorm.train.run_folder import environment

TORCH, OURS, COPY = "torch's LN and activation", "LN+PN", "a copy of the map, for scale"
CONSTANTS = "constants per channel, and their backward"


@dataclass
class Options:
    model: str = option("resnet50", "a model of proxynorm.create_model")
    batch: int = option(8, "images a step")
    size: int = option(224, "side of the images, pixels")
    format: str = option("channels_last", "memory format: nchw, channels_last")
    rounds: int = option(15, "times each is run, in turns")
    device: str = option("auto", "auto, cpu, cuda")
    json: str | None = option(None, "file for the figures, with the machine's description")


@dataclass(frozen=True)
class Place:
    """A kind of proxied layer: the shape of its map, its activation, as a module, and whether it scales its output."""

    shape: tuple[int, ...]
    act: nn.Module
    scaled: bool


def main(options: Options) -> None:
    """Measure, print the table, write the file. Raises ConfigError."""
    if options.format not in FORMATS:
        raise ConfigError(f"format={options.format}: choose of {', '.join(FORMATS)}")
    device = choose_device(options.device)
    keep_freed_memory(device)  # as in training
    net = build(Variant("ln_pn", options.format), options.model, device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=FORMATS[options.format])
    places = proxied_places(net, images)
    step = median(
        timed(lambda: net(images).sum().backward(), device) for _ in range(options.rounds)
    )
    net.zero_grad(set_to_none=True)
    times = {
        name: seconds * 1e3 for name, seconds in sums_over_layers(places, options, device).items()
    }
    times[CONSTANTS] = moments_seconds(net) * 1e3
    rows = [
        {"what": name, "ms": value, "share": value / (step * 1e3)} for name, value in times.items()
    ]
    print(
        text_table(
            ("what", "ms", "% of a step"),
            [(row["what"], f"{row['ms']:.1f}", f"{100 * row['share']:.2f}") for row in rows],
        )
    )
    print(
        f"a training step of {options.model} with LN+PN: {step * 1e3:.0f} ms; {sum(places.values())} layers"
    )
    if options.json:
        write_json(
            Path(options.json),
            {
                "options": asdict(options),
                "step_ms": step * 1e3,
                "layers": sum(places.values()),
                "rows": rows,
                "threads": torch.get_num_threads(),
                "environment": environment(),
            },
        )


def proxied_places(net: nn.Module, images: Tensor) -> Counter[Place]:
    """The proxied layers of a forward pass, those of one shape and activation together."""
    acts: dict[str, nn.Module] = {}
    found: Counter[Place] = Counter()

    def note(layer: NormAct2d, inputs: tuple[Tensor, ...]) -> None:
        if layer.proxied:
            found[
                Place(
                    tuple(inputs[0].shape),
                    acts.setdefault(layer.act_name, layer.act),
                    layer.proxy_scale,
                )
            ] += 1

    handles = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, NormAct2d)]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return found


def sums_over_layers(
    places: Counter[Place], options: Options, device: torch.device
) -> dict[str, float]:
    """Seconds of each contender, summed over the layers; the contenders of a place take turns."""
    sums: Counter[str] = Counter()
    for place, count in places.items():
        seconds: dict[str, list[float]] = {}
        actions = dict(contenders(place, options.format, device))
        for number in range(options.rounds + 1):
            for name, action in actions.items():
                elapsed = timed(action, device)
                if number:  # the first warms up
                    seconds.setdefault(name, []).append(elapsed)
        for name, values in seconds.items():
            sums[name] += count * median(values)
    return dict(sums)


def contenders(
    place: Place, memory_format: str, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Both layers and the single passes on one map, by name."""
    torch.manual_seed(0)
    x = torch.randn(place.shape, device=device).contiguous(memory_format=FORMATS[memory_format])
    grad, buffer = torch.randn_like(x), torch.empty_like(x)
    channels = place.shape[1]
    theirs = nn.Sequential(nn.GroupNorm(1, channels), type(place.act)(inplace=True)).to(device)
    ours = NormAct2d(channels, "ln", True, type(place.act), proxy_scale=place.scaled).to(device)
    ours.share_constants(
        fold(ours.four_parameters(), ours.proxy_rule())
    )  # as in a network; they have a row of their own
    row = torch.rand(channels, device=device)
    gain = row if place.scaled else None

    def both_ways(layer: nn.Module) -> Callable[[], None]:
        inputs = [x.detach().requires_grad_(), *layer.parameters()]
        return lambda: torch.autograd.grad(layer(inputs[0]), inputs, grad)

    yield TORCH, both_ways(theirs)
    yield OURS, both_ways(ours)
    if ours.act_name == "relu":
        yield (
            "output − floor, the mask of the backward pass",
            lambda: torch.sub(x, per_channel(row), out=buffer),
        )
        yield "sum of the gradient over each channel", lambda: channel_sum(grad)
    else:
        yield "gain and offset, or offset alone", lambda: gained_(buffer, gain, row)
        yield "u once more, in the backward pass", rebuilding(ours, x)
        yield (
            "sums of the gradient, and of gradient · output where there is a gain",
            lambda: gained_sums(grad, x, gain, row),
        )
        yield "less: the copy of u that torch's activation in place keeps", lambda: x.clone()
    yield COPY, lambda: buffer.copy_(x)


def rebuilding(layer: NormAct2d, x: Tensor) -> Callable[[], Tensor]:
    """What layer does in the backward pass to have its activation's input again."""
    row = torch.rand(x.shape[1], device=x.device)
    if not takes_one_step(x, layer.constants()):
        return lambda: group_normalize(x, 1, layer.eps, row, row)
    step = Step(Head(layer.act_name, layer.act), layer.proxy_rule(), 1, layer.eps)
    statistics = [torch.rand(len(x), 1, device=x.device)] * 2
    return lambda: rebuild(x, Affines(row, row, row, row), statistics, step)
