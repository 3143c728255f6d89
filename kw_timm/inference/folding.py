"""Which BatchNorms lie right behind which convolutions in timm's blocks, so that inference can fold them."""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from timm.layers import BatchNormAct2d
from timm.models import EfficientNet, ResNet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

__all__ = ['NormBehind', 'norms_behind']

# Convolution -> norm that its block or network calls next, with nothing in between.
_NEXT: dict[type[nn.Module], dict[str, str]] = {
    BasicBlock: {'conv1': 'bn1', 'conv2': 'bn2'},
    Bottleneck: {'conv1': 'bn1', 'conv2': 'bn2', 'conv3': 'bn3'},
    DepthwiseSeparableConv: {'conv_dw': 'bn1', 'conv_pw': 'bn2'},
    InvertedResidual: {'conv_pw': 'bn1', 'conv_dw': 'bn2', 'conv_pwl': 'bn3'},
    EfficientNet: {'conv_stem': 'bn1', 'conv_head': 'bn2'},
    ResNet: {'conv1': 'bn1'},
}


@dataclass(frozen=True)
class NormBehind:
    """A norm that can be folded into the layer before it.

    Attributes:
        name: Name of the norm in the network.
        module: The norm.
        rest: What remains of it: nothing, or its activation.
    """

    name: str
    module: nn.BatchNorm2d
    rest: nn.Module


def norms_behind(model: nn.Module, layers: Iterable[str]) -> dict[str, NormBehind]:
    """Find the norms that can be folded.

    Args:
        model: Network, in whatever wrapper. Blocks of other types than timm's ResNet and EfficientNet (that is, also
            MobileNetV2) are left alone.
        layers: Names of the convolutions.

    Returns:
        For each layer that has one, its norm. Norms and layers that the network holds in several places are left out.
    """
    found: dict[str, NormBehind] = {}
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for layer in layers:
        parent_name, _, child = layer.rpartition('.')
        parent = model.get_submodule(parent_name)
        if type(parent) is nn.Sequential:
            names = list(parent._modules)
            following = names[names.index(child) + 1 : names.index(child) + 2]
            behind = following[0] if following else None
        else:
            behind = _NEXT.get(_timm_class(parent), {}).get(child)
        norm = None if behind is None else parent._modules.get(behind)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        if uses[id(norm)] > 1 or uses[id(parent._modules[child])] > 1:
            continue
        if type(norm) is nn.BatchNorm2d:
            rest: nn.Module = nn.Identity()
        elif type(norm) is BatchNormAct2d:
            rest = nn.Sequential(*copy.deepcopy([norm.get_submodule('drop'), norm.get_submodule('act')]))
        else:
            continue
        found[layer] = NormBehind(f'{parent_name}.{behind}' if parent_name else str(behind), norm, rest)
    return found


def _timm_class(module: nn.Module) -> type[nn.Module]:
    """Return the class itself, or the timm network class that it is made from."""
    for network in (EfficientNet, ResNet):
        if isinstance(module, network):
            return network
    return type(module)
