"""A timm network as a feature pyramid: which levels, which channels, which parameters are frozen.

Knows timm only, so that it serves every framework's adapter alike.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import models  # noqa: F401  (registers the KW networks)

__all__ = ['PyramidFeatures', 'create_network']

# The finest level of a detector's pyramid; finer features are not offered.
FINEST_STRIDE = 4


def create_network(name: str, **kwargs: Any) -> nn.Module:
    """Create a timm network, with an error that suggests names for one that is unknown."""
    base_name = name.partition('.')[0]
    if ':' not in name and not timm.is_model(base_name):
        close = difflib.get_close_matches(base_name, timm.list_models(), n=3)
        hint = f'Did you mean {", ".join(close)}?' if close else "timm.list_models('kw*') lists the KW networks."
        raise ValueError(f"timm has no network '{name}'. {hint}")
    return timm.create_model(name, **kwargs)


class PyramidFeatures(nn.Module):
    """Multi-scale features of a timm network, for a detector's neck.

    Levels are the network's features of stride 4 and coarser, numbered from 0. What is behind the last wanted level is
    removed (classifier, stages, warehouses), so that no parameter goes without a gradient.

    Attributes:
        out_channels: Channels per level.
        strides: Stride per level.

    Args:
        name: timm network, KW or static; it needs ``forward_intermediates`` and ``prune_intermediate_layers``.
        out_indices: Levels to return; negative ones count from the last.
        frozen_stages: Freeze the stem (0), and the stages up to level ``frozen_stages - 1`` (1 and more); -1 freezes
            nothing. Warehouses are never frozen, since trainable layers share them.
        norm_eval: Keep every BatchNorm, the attention's included, on its running statistics while training.
        out_norms: Pass every level through a LayerNorm over channels (``norm0``, ``norm1``, ...). None: for ConvNeXt.
        head_conv: Let the last level be the output of the 1x1 head. None: for MobileNetV2 (1280 channels).
        **model_args: Further arguments of ``timm.create_model``: ``drop_path_rate``, ``ls_init_value``, ``in_chans``...

    Shape:
        input ``(B, C, H, W)``, output: per level ``(B, out_channels[i], ~H / strides[i], ~W / strides[i])``.

    Raises:
        ValueError: If the network is unknown or has no such levels, or a level, stage or option is out of range.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        out_norms: bool | None = None,
        head_conv: bool | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__()
        self.name = name
        self.model_args = model_args
        self.norm_eval = norm_eval
        model: Any = create_network(name, **model_args)
        if not hasattr(model, 'forward_intermediates') or not hasattr(model, 'prune_intermediate_layers'):
            raise ValueError(f'{name} cannot return intermediate features (timm: no forward_intermediates).')
        info = [entry for entry in model.feature_info if entry['reduction'] >= FINEST_STRIDE]
        first_level = len(model.feature_info) - len(info)
        self.out_indices = _check_indices(name, out_indices, [entry['reduction'] for entry in info])
        if not -1 <= frozen_stages <= len(info):
            raise ValueError(f'frozen_stages={frozen_stages} is out of range for {name}: -1 to {len(info)}.')
        self._frozen = _names_up_to(model, info, frozen_stages)

        is_mobilenet = 'mobilenetv2' in name
        self.head_conv = (is_mobilenet if head_conv is None else head_conv) and self.out_indices[-1] == len(info) - 1
        if self.head_conv and not hasattr(model, 'conv_head'):
            raise ValueError(f'{name} has no 1x1 head convolution; use head_conv=False.')
        self.indices = [first_level + i for i in self.out_indices]
        channels = [info[i]['num_chs'] for i in self.out_indices]
        if self.head_conv:
            channels[-1] = model.num_features
            model.reset_classifier(0, '')
        else:
            model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.model: Any = model
        self.out_channels = tuple(channels)
        self.strides = tuple(info[i]['reduction'] for i in self.out_indices)

        self.out_norms = 'convnext' in name if out_norms is None else out_norms
        if self.out_norms:
            for i, level_channels in zip(self.out_indices, self.out_channels, strict=True):
                self.add_module(f'norm{i}', LayerNorm2d(level_channels, eps=1e-6))
        for parameter in self._frozen_parameters():
            parameter.requires_grad = False
        self.train(self.training)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one feature map per level for images ``(B, C, H, W)``."""
        if self.head_conv:
            last, features = self.model.forward_intermediates(x, indices=self.indices)
            features[-1] = last
        else:
            features = self.model.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        if self.out_norms:
            features = [getattr(self, f'norm{i}')(f) for i, f in zip(self.out_indices, features, strict=True)]
        return tuple(features)

    def train(self, mode: bool = True) -> 'PyramidFeatures':
        """Set training mode; frozen stages, and with ``norm_eval`` every BatchNorm, stay in eval mode."""
        super().train(mode)
        if mode:
            for name, module in self.model.named_modules():
                is_frozen = name != '' and any(name == f or name.startswith(f'{f}.') for f in self._frozen)
                if is_frozen or (self.norm_eval and isinstance(module, _BatchNorm)):
                    module.training = False
        return self

    def load_pretrained(self, weights: str | None = None) -> None:
        """Load ImageNet weights into the network; the output norms keep their own.

        Args:
            weights: Weight file, of the reference or of this package (a classification network's), or a URL; None
                takes timm's pretrained weights of ``name``.

        Raises:
            RuntimeError: If ``weights`` is None and no weights exist for the network.
            FileNotFoundError: If the file does not exist.
            ValueError: If the file cannot be read or holds another network's weights.
        """
        # A whole network of the same arguments: weight files name warehouses and classifiers that were pruned here.
        args = {key: value for key, value in self.model_args.items() if key != 'drop_path_rate'}
        if weights is not None:
            source = 'url' if '://' in weights else 'file'
            args['pretrained_cfg_overlay'] = {source: weights}
        try:
            whole = create_network(self.name, pretrained=True, **args).state_dict()
        except RuntimeError as error:
            if weights is not None:
                raise ValueError(f"Weights '{weights}' do not fit {self.name}: {error}") from error
            raise RuntimeError(
                f'No pretrained weights could be loaded for {self.name}: {error} '
                f'Name a weight file with --cfg-options model.backbone.init_cfg.checkpoint=FILE, or train from random '
                f'weights with --cfg-options model.backbone.init_cfg=None.'
            ) from error
        self.model.load_state_dict({key: whole[key] for key in self.model.state_dict()})

    def _frozen_parameters(self) -> list[nn.Parameter]:
        return [p for name in self._frozen for p in self.model.get_submodule(name).parameters()]


def _check_indices(name: str, out_indices: Sequence[int], strides: list[int]) -> tuple[int, ...]:
    levels = len(strides)
    if not out_indices:
        raise ValueError('out_indices is empty; name at least one level.')
    bad = [i for i in out_indices if not -levels <= i < levels]
    if bad:
        raise ValueError(
            f'out_indices={tuple(out_indices)} is out of range: {name} has levels 0 to {levels - 1} '
            f'(strides {", ".join(map(str, strides))}).'
        )
    indices = tuple(i % levels for i in out_indices)
    if list(indices) != sorted(set(indices)):
        raise ValueError(f'out_indices={tuple(out_indices)} must name levels once, from fine to coarse.')
    return indices


def _names_up_to(model: nn.Module, info: list[dict[str, Any]], frozen_stages: int) -> list[str]:
    """Return the modules that come before the end of the last frozen stage, warehouses left out."""
    if frozen_stages < 0:
        return []
    trunk = info[0]['module'].partition('.')[0]  # e.g. 'layer1', 'blocks', 'stages'
    names = []
    for name, _ in model.named_children():
        if name == trunk:
            break
        names.append(name)
    if frozen_stages == 0:
        return names
    last = info[frozen_stages - 1]['module']
    for top, child in list(model.named_children())[len(names) :]:
        nested = last.startswith(f'{top}.')
        members = [f'{top}.{sub}' for sub, _ in child.named_children()] if nested else [top]
        for member in members:
            names.append(member)
            if member == last:
                return names
    raise ValueError(f"The network has no module '{last}' to freeze up to.")
