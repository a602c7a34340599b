"""Put LN+PN into a network of your own and train it: python examples/own_network.py"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import proxynorm


class OwnNetwork(nn.Module):
    """An ordinary network with batch norm, written without proxynorm in mind."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


def make_batch(count: int = 64) -> tuple[Tensor, Tensor]:
    """Images of noise with one bright quadrant; the label says which one."""
    labels = torch.randint(4, (count,))
    images = torch.randn(count, 3, 16, 16)
    for image, label in zip(images, labels):
        row, column = divmod(int(label), 2)
        # Colour the quadrant as well: the network pools over positions and would not see where.
        image[label % 3, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 2 + label
    return images, labels


def main() -> None:
    torch.manual_seed(0)
    # Convert first: γ̃ and β̃ are new parameters, which the optimizer must hold.
    model = proxynorm.convert(OwnNetwork(), norm="ln_pn")
    print(proxynorm.conversion_report(model))

    groups = proxynorm.parameter_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for step in range(60):
        images, labels = make_batch()
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    frozen = proxynorm.freeze(model.eval())
    images, labels = make_batch(256)
    with torch.no_grad():
        accuracy = (frozen(images).argmax(dim=1) == labels).float().mean().item()
    print(f"accuracy on new images: {accuracy:.1%}")


if __name__ == "__main__":
    main()
