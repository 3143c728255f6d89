"""The networks of a benchmark: a KW variant and its static network, with weights that keep signals alive."""

import difflib
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import nn

from .errors import BenchmarkError

__all__ = ['drawn_images', 'enliven', 'fit_norms', 'make_networks', 'settle', 'static_name']


def static_name(variant: str) -> str:
    """Return timm's name of the static network of a KW variant.

    Raises:
        BenchmarkError: If there is no such variant, or timm does not know its static network.
    """
    known = timm.list_models('kw*')
    if variant not in known:
        close = difflib.get_close_matches(variant, known, n=3, cutoff=0.5)
        hint = f'Did you mean {" or ".join(close)}?' if close else f'There are: {", ".join(known)}.'
        raise BenchmarkError(f"There is no KW network '{variant}'. {hint}")
    name = variant.partition('_')[2]
    if not timm.is_model(name):
        raise BenchmarkError(f"timm has no network '{name}', which would be the static one of '{variant}'.")
    return name


def make_networks(
    variant: str, features_only: bool, with_static: bool, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module | None]:
    """Build a KW variant and its static network, in eval mode, with random weights.

    Args:
        variant: Name of the KW network.
        features_only: The extractors of multi-scale features that a detector uses, rather than classifiers; both
            networks with the variant's levels.
        with_static: Whether to build the static network.
        device: Where to.
        dtype: Type of the weights.

    Returns:
        The KW network and the static one, or None.
    """
    static = static_name(variant)
    torch.manual_seed(0)
    levels: dict[str, Sequence[int]] = {}
    kw = timm.create_model(variant, features_only=features_only)
    if features_only:
        levels['out_indices'] = tuple(kw.feature_info.out_indices)
    made = [kw]
    if with_static:
        made.append(timm.create_model(static, features_only=features_only, **levels))
    networks = [settle(network.to(device)).to(dtype) for network in made]
    return networks[0], networks[1] if with_static else None


def settle(network: nn.Module, size: int = 128) -> nn.Module:
    """Make random weights sound, in place, and put the network in eval mode.

    As initialized, kernels of a KW network are so small in eval mode that signals vanish, layer scales hide what a
    block computes, and attentions may hang on rounding. So: kernels depend on the image, though mostly on a bias,
    layer scales are 0.5, and BatchNorms take the statistics of drawn images.

    Args:
        network: Network for images ``(B, 3, H, W)``.
        size: Height and width of those images in pixels.
    """
    first = next(network.parameters())
    enliven(network, torch.Generator().manual_seed(0))
    return fit_norms(network, drawn_images(4, (size, size)).to(first))


@torch.no_grad()
def enliven(network: nn.Module, generator: torch.Generator) -> None:
    """Set new weights, in place, such that kernels depend on the image and every block shows in the output."""
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
    norms = [module for module in network.eval().modules() if isinstance(module, nn.BatchNorm2d)]
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
