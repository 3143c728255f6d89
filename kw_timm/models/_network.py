"""What the three families share: the mixin over timm's networks, and building with timm's own machinery."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models import adapt_input_conv, build_model_with_cfg
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn

from ..checkpoints import check_weight_file, to_timm_state_dict
from ..kernelize import drop_unused_warehouses

__all__ = ['KWNetwork', 'build_kw_model', 'kw_cfg']

PAPER = {'paper_ids': 'arXiv:2406.07879', 'paper_name': 'KernelWarehouse: Rethinking the Design of Dynamic Convolution'}


class KWNetwork(nn.Module):
    """Mixin for timm networks whose layers were kernelized; goes before the timm class among the bases.

    Attributes:
        warehouses: The cells, by name, in the order of the reference weight files.
        family: Name of the key table for the reference's weight files.
    """

    family: str
    warehouses: nn.ModuleDict

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Remove the layers behind the last wanted feature, and warehouses that nothing else uses; see timm."""
        kept: list[int] = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        drop_unused_warehouses(self)
        return kept

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under this package's names or the reference's.

        Args:
            state_dict: Weights; ``warehouse_manager.weights.*`` marks the reference's names.
            strict: Require that keys match exactly.
            assign: See ``nn.Module.load_state_dict``.

        Returns:
            Missing and unexpected keys.

        Raises:
            ValueError: If the weights are another variant's; the message names both.
        """
        return super().load_state_dict(to_timm_state_dict(state_dict, self, strict), strict, assign)


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Give weights this package's names, and fit a KW stem to the model's input channels."""
    state_dict = to_timm_state_dict(state_dict, model, strict=False)
    own = model.state_dict()
    for key in ('warehouses.stem.weight', 'conv_stem.attention.fc1.weight', 'stem.0.attention.fc1.weight'):
        if key in state_dict and key in own and state_dict[key].shape != own[key].shape:
            state_dict[key] = _adapt_channels(state_dict[key], own[key].shape)
    return state_dict


def _adapt_channels(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Adapt the channel axis, the first after ``(cells, co)`` or ``(hidden,)``, by timm's rule for stems."""
    axis = 2 if weight.dim() > 2 else 1
    as_conv = weight.reshape(-1, weight.shape[axis], 1, 1)
    return adapt_input_conv(shape[axis], as_conv, base_chans=weight.shape[axis]).reshape(
        *weight.shape[:axis], shape[axis], *weight.shape[axis + 1 :]
    )


def build_kw_model(
    model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, out_indices: Sequence[int], **kwargs: Any
) -> nn.Module:
    """Build a variant as timm builds its own models.

    Args:
        model_cls: Network class.
        variant: Registered name.
        pretrained: Load the weights that the pretrained cfg names.
        out_indices: Default levels for ``features_only``.
        **kwargs: As for ``timm.create_model``.

    Returns:
        The network, or its feature extractor with ``features_only=True``.

    Raises:
        ValueError: If ``feature_cls`` is one that cannot work with shared warehouses.
        FileNotFoundError: If ``pretrained_cfg_overlay`` names a weight file that does not exist.
    """
    if 'feature_cls' in kwargs:
        _check_feature_cls(kwargs['feature_cls'])
    weight_file = (kwargs.get('pretrained_cfg_overlay') or {}).get('file')
    if pretrained and weight_file:
        check_weight_file(weight_file)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(out_indices), feature_cls='getter'),
        **kwargs,
    )


def _check_feature_cls(feature_cls: Any) -> None:
    if isinstance(feature_cls, str):
        works = feature_cls.lower() in ('getter', 'fx')
    else:
        works = isinstance(feature_cls, type) and issubclass(feature_cls, FeatureGetterNet | FeatureGraphNet)
    if not works:
        raise ValueError(
            f"feature_cls={feature_cls!r} takes a network's children apart and would leave its shared warehouses "
            f"behind. Use feature_cls='getter' (the default) or feature_cls='fx'."
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
