"""Other dynamic convolutions at the same layers: what a user would take instead."""

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import nn

from ..layers import KWConv2d, KWLayer, KWLinear, Warehouse
from ..layers.kw_layers import map_tokens
from .odconv import ODConv2d

__all__ = ['PEERS', 'describe_peers', 'experts_of', 'with_peers']


class RoutedCondConv2d(CondConv2d):
    """timm's CondConv with the routing that timm's EfficientNet has for a block: a sigmoid of the pooled input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.routing = nn.Linear(self.in_channels, self.num_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve each image of ``x: (B, C, H, W)`` with its own sum of experts."""
        y: torch.Tensor = super().forward(x, self.routing(x.mean((2, 3))).sigmoid())
        return y


class _OfTokens(nn.Module):
    """Maps tokens ``(B, *tokens, C)`` by a 1x1 convolution."""

    def __init__(self, conv: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv, self.channels = conv, (in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return map_tokens(x, *self.channels, lambda t: self.conv(t.unsqueeze(-1)).squeeze(-1))


PEERS: dict[str, type[nn.Module]] = {'condconv': RoutedCondConv2d, 'odconv': ODConv2d}


def experts_of(layer: KWLayer) -> int:
    """Return how many kernels a peer of a layer mixes: as many as the KW layer has cells per mixture, one at least.

    So ODConv's rows in the published tables have four kernels beside KW of 4x and one beside KW of 1x. CondConv's have
    eight there, which makes it larger but hardly slower; here it gets no more than the others.
    """
    return max(1, round(layer.__dict__['warehouse'].partition.cell_num_ratio))


def with_peers(network: nn.Module, kind: str) -> nn.Module:
    """Return a copy of a network that has other dynamic convolutions of the same shape in the places of its KW layers.

    All else is the same, which is the static network's. Weights of the new layers are random.

    Args:
        network: Network with KW layers; it is not changed.
        kind: Key of :data:`PEERS`.

    Raises:
        ValueError: If a KW layer is neither a 2D convolution nor a linear layer.
    """
    memo: dict[int, Any] = {}
    for name, module in network.named_modules():
        if isinstance(module, Warehouse):
            memo[id(module)] = nn.Identity()
        elif isinstance(module, KWLayer):
            memo[id(module)] = _peer(name, module, kind)
    return copy.deepcopy(network, memo)


def describe_peers(network: nn.Module) -> str:
    """Return what there is of other dynamic convolutions in a network: '4 kernels in each of 19 layers; ...'."""
    made: list[Any] = [module for module in network.modules() if isinstance(module, tuple(PEERS.values()))]
    counts = Counter(len(module.weight) for module in made)
    parts = [f'{n} kernel{"s" if n > 1 else ""} in each of {count} layers' for n, count in counts.items()]
    size = sum(parameter.numel() for parameter in network.parameters())
    return f'{", ".join(parts)}; {size / 1e6:.1f} M parameters'


def _peer(name: str, layer: KWLayer, kind: str) -> nn.Module:
    if isinstance(layer, KWLinear):
        window: tuple[Any, ...] = ((1, 1), (1, 1), (0, 0), (1, 1))
    elif isinstance(layer, KWConv2d) and not layer.spec.end_padding:
        window = (layer.kernel_size, layer.stride, layer.spec.padding, layer.dilation)
    else:
        raise ValueError(
            f"--modes {kind}: the layer '{name}' ({type(layer).__name__}) has no counterpart, only 2D convolutions "
            f'with the same padding at both ends and linear layers have; leave the mode out.'
        )
    channels, experts = (layer.in_channels, layer.out_channels), experts_of(layer)
    made = PEERS[kind](*channels, *window, layer.groups, layer.bias is not None, num_experts=experts)
    made = made if isinstance(layer, KWConv2d) else _OfTokens(made, *channels)
    return made.to(layer.attention.fc2.weight).train(layer.training)
