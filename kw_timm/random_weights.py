"""Random weights that keep signals alive, and images that show it."""

import torch
import torch.nn.functional as F
from torch import nn

from .layers import KWAttention, Warehouse

__all__ = ['drawn_images', 'enliven', 'fit_norms', 'settle']


def settle(network: nn.Module, size: int = 128) -> nn.Module:
    """Make the random weights of a network for RGB images sound, in place, and put it in eval mode.

    As initialized, kernels depend on the image too little to show it, or by the published initialization are so small
    in eval mode that signals vanish. So: kernels depend on the image, though mostly on a bias, layer scales are 0.5,
    and BatchNorms take the statistics of drawn images of ``size`` x ``size`` pixels.
    """
    enliven(network, torch.Generator().manual_seed(0))
    return fit_norms(network, drawn_images(4, (size, size)).to(next(network.parameters())))


@torch.no_grad()
def enliven(network: nn.Module, generator: torch.Generator) -> None:
    """Set new weights, in place, such that kernels depend on the image and every block shows in the output."""
    for module in network.modules():
        if isinstance(module, KWAttention | Warehouse):  # From which every cell counts, not the assigned ones alone.
            module.init = 'published'
            module.reset_parameters()
    for name, parameter in network.named_parameters():
        if name.endswith('.gamma'):
            parameter.fill_(0.5)
        elif name.endswith(('attention.fc2.bias', 'basis_bias')):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif name.endswith('attention.fc2.weight'):
            parameter.mul_(0.1)


@torch.no_grad()
def fit_norms(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give BatchNorms the statistics of images, and put the network in eval mode."""
    # Not the attentions' norms, whose statistics would be those of a few vectors.
    norms = [m for m in network.eval().modules() if isinstance(m, nn.BatchNorm2d) and not isinstance(m, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return network


def drawn_images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """Return drawn images ``(B, 3, H, W)``, the same every time: coarse patches and some noise.

    Mere noise has the same mean in every image, of which the attentions' BatchNorms would show nothing but rounding.
    """
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(batch, 3, 4, 4, generator=generator)
    noise = torch.randn(batch, 3, *size, generator=generator)
    return F.interpolate(patches, size, mode='bilinear') + 0.3 * noise
