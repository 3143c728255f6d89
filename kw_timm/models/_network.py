"""What the three families share: the mixin over timm's networks, and building with timm's own machinery."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from timm.models import adapt_input_conv, build_model_with_cfg, generate_default_cfgs
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn

from ..kernelize import drop_unused_warehouses
from ..layers.attention import KWAttention
from ..plan_json import plan_from_json, plan_to_json
from ..temperature import anneal
from ..weights import WeightsMismatchError, read_weight_file, to_timm_state_dict, unwrap_weights
from ..weights.errors import in_one_line
from ..weights.load import fit_state_dict
from ..weights.sound import check_kinds
from ..weights.static_start import load_static
from ..weights.store import HUB_ORGANISATION, pretrained_source

__all__ = ['KWNetwork', 'build_kw_model', 'kw_cfg', 'kw_default_cfgs']

PAPER = {'paper_ids': 'arXiv:2406.07879', 'paper_name': 'KernelWarehouse: Rethinking the Design of Dynamic Convolution'}


class KWNetwork(nn.Module):
    """Mixin for timm networks whose layers were kernelized; goes before the timm class among the bases.

    Attributes:
        warehouses: The cells, by name, in the order of the reference weight files.
        family: Name of the key table for the reference's weight files.
        is_init: What OpenMMLab's runners ask before they call ``init_weights``, which would draw some of a ResNet's
            weights anew, trained ones as well; a network has drawn them when it was made.
    """

    is_init = True
    family: str
    warehouses: nn.ModuleDict

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm notes at a network, from which it is built again; all are plain data."""
        try:
            return self.__dict__['_model_args']
        except KeyError:
            raise AttributeError('_model_args') from None

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        # Where the first weights came from, a path or tensors, is no part of what a saved network is.
        kept = {key: value for key, value in args.items() if key != 'pretrained_static'}
        if 'plan' in kept:
            kept['plan'] = plan_to_json(plan_from_json(kept['plan']))
        self.__dict__['_model_args'] = kept

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Remove the layers behind the last wanted feature, and warehouses that nothing else uses; see timm."""
        kept: list[int] = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        drop_unused_warehouses(self)
        return kept

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under this package's names or the reference's, all of them or a part.

        Args:
            state_dict: Weights.
            strict: Require that keys match exactly.
            assign: See ``nn.Module.load_state_dict``.

        Returns:
            Missing and unexpected keys.

        Raises:
            WeightsMismatchError: If the weights are another variant's (the message names both), or their names begin
                otherwise (it says with what, and what to write); a ``ValueError`` and a ``RuntimeError``.
            RuntimeError: As ``nn.Module.load_state_dict``.
        """
        if isinstance(state_dict, Mapping):
            state_dict = fit_state_dict(state_dict, self, strict)
        result = super().load_state_dict(state_dict, strict, assign)
        for module in self.modules() if assign else ():
            if isinstance(module, KWAttention) and module.assignment.device != module.fc2.weight.device:
                module.assignment = torch.empty_like(module.assignment, device=module.fc2.weight.device)
                module.init_non_persistent_buffers()
        return result

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Move the network without its weights; what no weight file holds is filled again."""
        super().to_empty(device=device, recurse=recurse)
        for module in self.modules():
            if isinstance(module, KWAttention):
                module.init_non_persistent_buffers()
                if module.annealing is not None:
                    module.annealing.passes.zero_()
        return self


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: KWNetwork) -> dict[str, torch.Tensor]:
    """Give weights this package's names, and fit a KW stem to the model's input channels."""
    own = model.state_dict()
    state_dict = to_timm_state_dict(unwrap_weights(state_dict, model), model)
    check_kinds(state_dict, own)
    for key in ('warehouses.stem.weight', 'conv_stem.attention.fc1.weight', 'stem.0.attention.fc1.weight'):
        if key in state_dict and key in own and state_dict[key].shape != own[key].shape:
            state_dict[key] = _adapt_channels(state_dict[key], own[key].shape)
    bias = state_dict.get('classifier.bias')
    if bias is not None and ('classifier.bias' not in own or bias.shape != own['classifier.bias'].shape):
        # Other classes: timm drops the cells of a KW classifier, what belongs to them goes too.
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith('classifier.')}
    return state_dict


def _adapt_channels(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Adapt the channel axis, the first after ``(cells, co)`` or ``(hidden,)``, by timm's rule for stems."""
    axis = 2 if weight.dim() > 2 else 1
    as_conv = weight.reshape(-1, weight.shape[axis], 1, 1)
    return adapt_input_conv(shape[axis], as_conv, base_chans=weight.shape[axis]).reshape(
        *weight.shape[:axis], shape[axis], *weight.shape[axis + 1 :]
    )


def build_kw_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    feature_levels: Sequence[int],
    pretrained_static: str | Path | Mapping[str, Any] | None = None,
    temperature_steps: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a variant as timm builds its own models.

    Args:
        model_cls: Network class.
        variant: Registered name.
        pretrained: Load weights: those that the pretrained cfg names, else the published ones from the local store or
            the Hub, see :mod:`kw_timm.weights.store`.
        feature_levels: Default ``out_indices`` of ``features_only``.
        pretrained_static: Weights of the static network to start from, see :func:`~kw_timm.load_static`, e.g.
            ``'resnet50.a1_in1k'``.
        temperature_steps: Let the network anneal its temperature by itself, within so many training passes, see
            :func:`~kw_timm.anneal`.
        **kwargs: As for ``timm.create_model``.

    Returns:
        The network, or its feature extractor with ``features_only=True``.

    Raises:
        ValueError: If ``feature_cls`` is one that cannot work with shared warehouses, or both ``pretrained`` and
            ``pretrained_static`` are given; or ``temperature_steps`` is not positive.
        FileNotFoundError: If ``pretrained_cfg_overlay`` names a weight file that does not exist.
        ValueError: If that file cannot be read, or holds another variant's weights.
        WeightsNotFoundError: If there are no pretrained weights to be had.
        DamagedWeightsError: If those in the store are damaged, or those of the Hub arrived damaged.
    """
    if 'feature_cls' in kwargs:
        _check_feature_cls(kwargs['feature_cls'])
    saved = kwargs.get('pretrained_model_args') or {}
    if 'pretrained_static' in saved:
        pretrained_static = None  # How the network that was saved began; its weights are there.
    if saved.get('temperature_steps') == temperature_steps:
        temperature_steps = None  # And how it was trained.
    if pretrained_static is not None:
        if pretrained:
            raise ValueError("Give pretrained=True for the KW network's weights, or pretrained_static=..., not both.")
        model_cls = _started_from(model_cls, pretrained_static)
    if pretrained:
        overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
        source = pretrained_source(variant, kwargs.get('pretrained_cfg'), overlay, kwargs.get('cache_dir'))
        kwargs['pretrained_cfg_overlay'] = overlay | source
    try:
        network: nn.Module = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=tuple(feature_levels), feature_cls='getter'),
            **kwargs,
        )
    except Exception as error:
        weight_file = (kwargs.get('pretrained_cfg_overlay') or {}).get('file')
        if pretrained and weight_file:
            read_weight_file(weight_file)  # If the file is what is wrong, this says so; timm names no file.
            if isinstance(error, ValueError | RuntimeError):
                raise WeightsMismatchError(f"The file '{weight_file}' was not loaded. {in_one_line(error)}") from error
        raise
    if temperature_steps is not None:
        anneal(network, temperature_steps)
    return network


def _started_from(model_cls: Callable[..., nn.Module], source: Any) -> Callable[..., nn.Module]:
    def create(**kwargs: Any) -> nn.Module:
        model = model_cls(**kwargs)
        load_static(model, source)
        return model

    return create


_FEATURE_CLASSES = (FeatureGetterNet, FeatureGraphNet, FeatureHookNet)


def _check_feature_cls(feature_cls: Any) -> None:
    if isinstance(feature_cls, str):
        works = feature_cls.lower() in ('getter', 'fx', 'hook')
    else:
        works = isinstance(feature_cls, type) and issubclass(feature_cls, _FEATURE_CLASSES)
    if not works:
        raise ValueError(
            f"feature_cls={feature_cls!r} is not supported: timm's list and dict wrappers take a network's children "
            f"apart and would leave its shared warehouses behind. Use 'getter' (the default), 'fx' or 'hook'."
        )


def kw_default_cfgs(cfgs: Mapping[str, dict[str, Any]]) -> Any:
    """Return timm's default cfgs of ``{variant.tag: cfg}``, each with its repository on the Hub."""
    return generate_default_cfgs(
        {name: dict(cfg, hf_hub_id=f'{HUB_ORGANISATION}/{name}') for name, cfg in cfgs.items()}
    )


def kw_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return a pretrained cfg with the evaluation settings of the published accuracies."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': (0.485, 0.456, 0.406),
        'std': (0.229, 0.224, 0.225),
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/OSVAI/KernelWarehouse',
        **PAPER,
        **kwargs,
    }
