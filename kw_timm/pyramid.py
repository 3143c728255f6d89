"""A timm network as a feature pyramid: which levels, which channels, which parameters are frozen.

Knows timm only, so that it serves every framework's adapter alike.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import models  # noqa: F401  (registers the KW networks)
from .layers import Warehouse
from .layers.annealing import without_passes
from .padding import without_padding
from .temperature import anneal
from .weights import load_static, read_weight_file
from .weights.detectors import OUT_NORM, backbone_part
from .weights.exact import check_complete, rename_exact
from .weights.static import STATIC_NETWORKS, static_to_timm
from .weights.static_start import is_weight_file
from .weights.store import WeightsNotFoundError, reachable

__all__ = ['TIMM', 'PyramidFeatures', 'create_network']

# In front of a timm name that stands for its pretrained weights.
TIMM = 'timm://'

# The finest level of a detector's pyramid; finer features are not offered.
FINEST_STRIDE = 4
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
# What detectors set, for suggestions.
_ARGUMENTS = (
    'out_indices',
    'frozen_stages',
    'norm_eval',
    'out_norms',
    'head_conv',
    'grad_checkpointing',
    'ignore_padding',
    'pretrained',
    'init_cfg',
    'drop_path_rate',
    'drop_rate',
    'ls_init_value',
    'in_chans',
    'output_stride',
)
# What other backbones' arguments are called here.
_INSTEAD = {
    'with_cp': 'Instead of with_cp=True write grad_checkpointing=True.',
    'in_channels': 'Instead of in_channels write in_chans.',
    'drop_path': 'Instead of drop_path write drop_path_rate.',
    'layer_scale_init_value': 'Instead of layer_scale_init_value write ls_init_value.',
}


def create_network(name: str, **kwargs: Any) -> nn.Module:
    """Create a timm network, with an error that suggests names for one that is unknown."""
    base_name = name.partition('.')[0]
    if ':' not in name and not timm.is_model(base_name):
        close = difflib.get_close_matches(base_name, timm.list_models(), n=3)
        hint = f'Did you mean {", ".join(close)}?' if close else "timm.list_models('kw*') lists the KW networks."
        raise ValueError(f"timm has no network '{name}'. {hint}")
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        unknown = _unknown_arguments(name, kwargs)
        if not unknown:
            raise
        raise ValueError(_about_arguments(name, unknown)) from error


def _unknown_arguments(name: str, kwargs: dict[str, Any]) -> list[str]:
    """Return the arguments that a network does not take; timm names the first."""
    rest, unknown = {key: value for key, value in kwargs.items() if key != 'pretrained'}, []
    with torch.device('meta'):
        while True:
            try:
                timm.create_model(name, **rest)
            except TypeError as error:
                found = _UNEXPECTED.search(str(error))
                if found is not None and found[1] in rest:
                    unknown.append(found[1])
                    del rest[found[1]]
                    continue
            except Exception:  # Something else is wrong too; it will be told once these are gone.
                return unknown
            return unknown


def _about_arguments(name: str, unknown: list[str]) -> str:
    """Say what to do about arguments that a network does not take: misspelt, or another backbone's."""
    typos = {key: match[0] for key in unknown if (match := difflib.get_close_matches(key, _ARGUMENTS, 1, 0.8))}
    parts = [f"{name} has no argument '{key}'; did you mean {match}?" for key, match in typos.items()]
    others = [key for key in unknown if key not in typos and key != '_delete_']
    if others:
        parts.append(
            f'{name} has no argument {", ".join(others)}: {"it belongs" if len(others) == 1 else "they belong"} to '
            f'another backbone, whose config was inherited. Write backbone=dict(_delete_=True, ...) in a config that '
            f'inherits, so that nothing of the inherited backbone stays, or remove what does not belong.'
        )
    parts += [_INSTEAD[key] for key in others if key in _INSTEAD]
    if '_delete_' in unknown:
        parts.append(
            '_delete_=True is left in the backbone: it works only where a config inherits a backbone (_base_) that it '
            'replaces. Here nothing is inherited; remove it.'
        )
    return ' '.join(parts)


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
        temperature_steps: Let the pyramid anneal its temperature by itself, see :func:`~kw_timm.anneal`.
        grad_checkpointing: Keep less for the gradient and compute it again, where timm offers that.
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
        grad_checkpointing: bool = False,
        temperature_steps: float | None = None,
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
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= len(info):
            raise ValueError(f'frozen_stages={frozen_stages!r} is out of range for {name}: -1 to {len(info)}.')
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
        self.grad_checkpointing = grad_checkpointing
        if grad_checkpointing:
            _checkpoint(name, model)
        if temperature_steps is not None:
            anneal(self, temperature_steps)
        self.train(self.training)

    def forward(self, x: torch.Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> tuple[torch.Tensor, ...]:
        """Return one feature map per level for images ``(B, C, H, W)``.

        Args:
            x: Images, padded at the right and at the bottom to one size.
            sizes: ``(height, width)`` of each image without its padding, to compute its features as if it were alone,
                see :func:`kw_timm.padding.without_padding`. None takes the padding for part of the images, which is how
                the published detectors were trained and tested.

        Raises:
            ValueError: If a size is not within that of ``x``, or gradients are checkpointed besides.
        """
        if sizes is None:
            return self._levels(x)
        if self.grad_checkpointing and self.training:
            raise ValueError(
                'Padding cannot be left out with grad_checkpointing: the features would be computed again with it. '
                'Train without one of the two.'
            )
        if len(sizes) != len(x):
            raise ValueError(f'There are {len(sizes)} sizes for {len(x)} images; give (height, width) of each.')
        with without_padding(self.model, sizes, (x.shape[-2], x.shape[-1])):
            return self._levels(x)

    def _levels(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
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

    def load_pretrained(self, weights: str | None = None, prefix: str | None = None) -> None:
        """Load weights into the network.

        Args:
            weights: Weight file, of the reference or of this package, or a URL: a classification network's, or a
                detector's, of which the backbone is taken, output norms included. None takes timm's pretrained weights
                of ``name``, ``'timm://NAME.TAG'`` those of a tag.
            prefix: What the names of the backbone's tensors begin with in the file, e.g. ``'backbone.'``; found
                without it in a detector's file.

        Raises:
            RuntimeError: If ``weights`` is None and no weights exist for the network, or their host does not answer.
            FileNotFoundError: If the file does not exist.
            ValueError: If the file cannot be read, has no such prefix, or holds another network's weights.
        """
        # A whole network of the same arguments: weight files name warehouses and classifiers that were pruned here.
        args = {key: value for key, value in self.model_args.items() if key != 'drop_path_rate'}
        name = self.name
        overlay: dict[str, Any] = {}
        if weights is not None and weights.startswith(TIMM):
            name = weights.removeprefix(TIMM)
        elif weights is not None and '://' in weights:
            overlay = {'url': weights}
        elif weights is not None:
            state_dict = read_weight_file(weights)
            part = backbone_part(state_dict, prefix, weights)
            if part is not state_dict:
                self._load_part(part, weights)
                return
            variant = self.name.partition('.')[0]
            overlay = {'state_dict': static_to_timm(part, variant) if variant in STATIC_NETWORKS else part}
        try:
            name, args['pretrained_cfg_overlay'] = reachable(name, overlay)
            whole = create_network(name, pretrained=True, **args).state_dict()
        except RuntimeError as error:
            if overlay and not isinstance(error, WeightsNotFoundError):
                reason = ' '.join(str(error).split())
                raise ValueError(f"Weights '{weights}' do not fit {self.name}: {reason:.400}") from error
            raise RuntimeError(
                f'No pretrained weights could be loaded for {self.name}: {error} '
                f'Name a weight file with --cfg-options model.backbone.init_cfg.checkpoint=FILE, or train from random '
                f'weights with --cfg-options model.backbone.init_cfg=None.'
            ) from error
        self.model.load_state_dict({key: whole[key] for key in without_passes(self.model.state_dict())})

    def load_static(self, weights: str, prefix: str | None = None) -> None:
        """Start a KW network from the static one that it was made of, see :func:`~kw_timm.load_static`.

        Args:
            weights: Weight file of a static classification network or detector, whose output norms are taken too; or a
                timm name, with ``timm://`` before it or not.
            prefix: What the names of the backbone's tensors begin with in the file; None finds it.

        Raises:
            RuntimeError: If timm has no such weights, or their host does not answer.
            FileNotFoundError: If the file does not exist.
            ValueError: If the file cannot be read, or holds another network's weights.
        """
        if weights.startswith(TIMM) or not is_weight_file(weights):
            load_static(self.model, weights.removeprefix(TIMM))
            return
        state_dict = read_weight_file(weights)
        load_static(self.model, state_dict, prefix)
        self._load_norms(backbone_part(state_dict, prefix, weights))

    def _load_part(self, part: dict[str, torch.Tensor], source: str) -> None:
        """Load the backbone of a detector: this package's, with ``model.`` and output norms, or the reference's."""
        trunk = {key.removeprefix('model.'): value for key, value in part.items() if not OUT_NORM.match(key)}
        try:
            known = self.name.partition('.')[0] in (*STATIC_NETWORKS, *timm.list_models('kw*'))
            # Names warehouses and classifiers that were pruned here.
            trunk = rename_exact(trunk, self.name.partition('.')[0]) if known else trunk
            own = without_passes(self.model.state_dict())
            check_complete({key: value for key, value in trunk.items() if key in own}, own, self.name)
        except ValueError as error:
            raise ValueError(f"Weights '{source}' do not fit {self.name}: {error}") from error
        self.model.load_state_dict({key: trunk[key] for key in own})
        self._load_norms(part)

    def _load_norms(self, part: Mapping[str, torch.Tensor]) -> None:
        """Load the output norms among a detector's backbone, those of the levels that there are."""
        if self.out_norms:
            own = self.state_dict()
            norms = {key: value for key, value in part.items() if OUT_NORM.match(key) and key in own}
            self.load_state_dict(norms, strict=False)

    def _frozen_parameters(self) -> list[nn.Parameter]:
        cells = {p for module in self.model.modules() if isinstance(module, Warehouse) for p in module.parameters()}
        return [p for name in self._frozen for p in self.model.get_submodule(name).parameters() if p not in cells]


def _checkpoint(name: str, model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(f'{name} cannot checkpoint gradients (timm: no set_grad_checkpointing).') from error


def _check_indices(name: str, out_indices: Any, strides: list[int]) -> tuple[int, ...]:
    levels = len(strides)
    if not isinstance(out_indices, Sequence) or not all(isinstance(i, int) for i in out_indices):
        raise ValueError(f'out_indices={out_indices!r} must be a sequence of whole numbers, such as (0, 1, 2, 3).')
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
    children = [(name, child) for name, child in model.named_children() if name != 'warehouses']
    for name, _ in children:
        if name == trunk:
            break
        names.append(name)
    if frozen_stages == 0:
        return names
    last = info[frozen_stages - 1]['module']
    for top, child in children[len(names) :]:
        nested = last.startswith(f'{top}.')
        members = [f'{top}.{sub}' for sub, _ in child.named_children()] if nested else [top]
        for member in members:
            names.append(member)
            if member == last:
                return names
    raise ValueError(f"The network has no module '{last}' to freeze up to.")
