"""Measure P1 … P4 in each layer of a network of your own: python examples/own_power.py [CSV]

P1 is the share of a feature map's power that is constant in each channel, over all images and
positions, and so carries no information. Layer Norm lets it grow with depth; PN keeps it near 0.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import astuple, fields

import torch
from torch import nn

import proxynorm
from proxynorm.analysis.power import PowerRow


def deep_network(depth: int = 20, width: int = 64) -> nn.Module:
    """A plain stack of convolution, batch norm and ReLU, with norms as after some training."""
    layers: list[nn.Module] = []
    for index in range(depth):
        norm = nn.BatchNorm2d(width)
        # At initialization all γ are 1 and all β 0; the effect needs some spread between channels.
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
        layers += [nn.Conv2d(width if index else 3, width, 3, padding=1), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def measure(norm: str) -> list[PowerRow]:
    """The power of each layer of the network converted to `norm`, on images of noise."""
    torch.manual_seed(0)
    model = proxynorm.convert(deep_network(), norm=norm)
    # For your own network: batches of its input images; a few dozen images are enough.
    batches = [torch.randn(16, 3, 16, 16) for _ in range(2)]
    return proxynorm.power_decomposition(model, batches)


def main(path: str | None = None) -> None:
    found = {norm: measure(norm) for norm in ("ln", "ln_pn")}
    print("P1     " + "".join(f"{norm:>8}" for norm in found))
    for rows in zip(*found.values()):
        print(f"{rows[0].name:<7}" + "".join(f"{row.p1:8.3f}" for row in rows))
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["norm", *(field.name for field in fields(PowerRow))])
            writer.writerows((norm, *astuple(row)) for norm in found for row in found[norm])


if __name__ == "__main__":
    main(*sys.argv[1:])
