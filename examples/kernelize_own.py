"""Make a KW network of a network of your own, exactly where it stands, and train it on.

Example:
    python examples/kernelize_own.py --cells 1
"""

import argparse
import copy

import torch
from torch import nn

import kw_timm


class Own(nn.Module):
    """Stands for yours: convolutions in two stages, and a classifier."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.stage1 = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
        self.down = nn.Conv2d(32, 64, 3, 2, 1)
        self.stage2 = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, classes)`` for images ``(B, 3, H, W)``."""
        x = self.stem(x).relu()
        for conv in self.stage1:
            x = x + conv(x.relu())
        x = self.down(x)
        for conv in self.stage2:
            x = x + conv(x.relu())
        return self.head(x.mean((2, 3)))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cells', type=float, default=1, help='per mixture: 1/4, 1/2, 1, 2, 4')
    parser.add_argument('--steps', type=int, default=20)
    options = parser.parse_args()
    static = Own().eval()
    network = copy.deepcopy(static)
    # Or kw_timm.derive_plan(network, options.cells), which finds stages by itself.
    plan = {
        name: kw_timm.WarehousePlan([f'{name}.{i}' for i in range(4)], cell_num_ratio=options.cells)
        for name in ('stage1', 'stage2')
    }
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    print(kw_timm.plan_table(network, plan, images))
    kw_timm.kernelize(network, plan, weights='keep')
    with torch.no_grad():
        difference = (network.eval()(images) - static(images)).abs().max().item()
    print(f'differs from the static network by {difference:.1e}')

    optimizer = torch.optim.AdamW(network.train().parameters(), lr=3e-3)
    for _ in range(options.steps):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f'loss {loss.item():.3f}')
    again = copy.deepcopy(static)
    kw_timm.kernelize(again, plan)
    again.load_state_dict(network.state_dict())


if __name__ == '__main__':
    main()
