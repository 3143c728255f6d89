"""Any network of timm's, kernelized by a plan that is among its arguments, and built by timm's own machinery."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
from timm.models import get_pretrained_cfg, register_model, resolve_pretrained_cfg
from torch import nn

from ..derive import fitting_norm
from ..kernelize import drop_unused_warehouses, kernelize
from ..plan_json import plan_from_json
from ..recording import ARCHITECTURE, NORMS
from ..weights.skeletons import create_skeleton
from ..weights.store import WeightsNotFoundError
from ._network import KWNetwork, build_kw_model, kw_cfg

__all__ = ['KernelizedNetwork', 'build_kernelized']

# What a static network's cfg says of its input and names of layers; the rest is about its weights.
_OF_THE_NETWORK = (
    *('num_classes', 'input_size', 'min_input_size', 'test_input_size', 'fixed_input_size', 'pool_size'),
    *('crop_pct', 'test_crop_pct', 'crop_mode', 'interpolation', 'mean', 'std', 'first_conv', 'classifier'),
)


class KernelizedNetwork(KWNetwork):
    """Mixin for a timm network that was kernelized by a plan; :func:`as_kernelized` puts it before the timm class."""

    family = 'timm'
    static_class: type[nn.Module]

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Replace the classifier as timm does; where it was a KW layer, its warehouse goes, too."""
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        drop_unused_warehouses(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made when it is needed, so pickle cannot find it by name.
        return _blank, (self.static_class,), self.__dict__


@cache
def as_kernelized(static_class: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a kernelized network of a timm class."""
    attributes = {'__module__': __name__, '__doc__': static_class.__doc__, 'static_class': static_class}
    return type(f'KW{static_class.__name__}', (KernelizedNetwork, static_class), attributes)


def _blank(static_class: type[nn.Module]) -> nn.Module:
    cls = as_kernelized(static_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


def network_cfg(static: str) -> dict[str, Any]:
    """Return the cfg of a kernelized network: that of the static one, without anything about its weights."""
    found = get_pretrained_cfg(static)
    cfg = found.to_dict() if found is not None else {}
    return {**kw_cfg(origin_url=None), **{key: cfg[key] for key in _OF_THE_NETWORK if key in cfg}}


def build_kernelized(
    variant: str,
    pretrained: bool,
    static: str,
    plan: Mapping[str, Any],
    attention_norm: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm network and kernelize it, with everything that timm's machinery offers.

    Args:
        variant: Registered name.
        pretrained: Load the weights that the pretrained cfg names.
        static: timm's name of the static network.
        plan: Warehouse name -> layers and ratios, as plans or as plain data.
        attention_norm: ``'BatchNorm1d'`` or ``'LayerNorm'``; None for what fits the network's norms.
        **kwargs: As for ``timm.create_model``; ``init`` and ``max_weights`` as for :func:`~kw_timm.kernelize`.

    Returns:
        The network, or its feature extractor with ``features_only=True``.

    Raises:
        ValueError: If there is no such network, or the plan does not fit it.
        WeightsNotFoundError: If ``pretrained`` is true and no weights are named.
    """
    if not isinstance(static, str) or not timm.is_model(static):
        raise ValueError(f"timm has no network {static!r} to kernelize; give a name as 'resnet34', without a tag.")
    if attention_norm is not None and attention_norm not in NORMS:
        raise ValueError(f'attention_norm must be one of {", ".join(NORMS)}, got {attention_norm!r}.')
    planned = plan_from_json(plan)
    options = {key: kwargs.pop(key) for key in ('init', 'max_weights') if key in kwargs}

    def create(**model_args: Any) -> nn.Module:
        network = timm.create_model(static, **model_args)
        norm = fitting_norm(network) if attention_norm is None else NORMS[attention_norm]
        kernelize(network, planned, norm, **options)
        network.__class__ = as_kernelized(type(network))  # type: ignore[arg-type]
        return network

    if pretrained:
        _check_source(variant, static, kwargs)
    levels: tuple[int, ...] = ()
    if kwargs.get('features_only'):
        skeleton = create_skeleton(static)
        count = len(skeleton.feature_info)
        is_pyramid = len({entry['reduction'] for entry in skeleton.feature_info}) > 1
        levels = tuple(range(0 if is_pyramid else max(count - 3, 0), count))  # Of others the last three, as in timm.
        if not hasattr(skeleton, 'forward_intermediates'):
            kwargs.setdefault('feature_cls', 'fx')
    return build_kw_model(create, variant, pretrained, levels, **kwargs)


def _check_source(variant: str, static: str, kwargs: Mapping[str, Any]) -> None:
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if not (cfg.has_weights or cfg.state_dict):
        raise WeightsNotFoundError(
            f'There are no released weights of {variant}: start from those of the static network '
            f"(pretrained_static='{static}') or from random ones (pretrained=False)."
        )


@register_model
def kernelized(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any timm network with the plan that ``kernelize`` left with it: ``static='resnet34', plan={...}``."""
    missing = [key for key in ('static', 'plan') if key not in kwargs]
    if missing:
        raise ValueError(
            f'{ARCHITECTURE} needs {" and ".join(missing)}: the name of a timm network, and a plan as '
            f"kw_timm.plan_to_json gives it; a saved network has both in its config ('local-dir:FOLDER')."
        )
    if not kwargs.get('pretrained_cfg') and isinstance(kwargs['static'], str) and timm.is_model(kwargs['static']):
        kwargs['pretrained_cfg'] = {**network_cfg(kwargs['static']), 'architecture': ARCHITECTURE}
    return build_kernelized(ARCHITECTURE, pretrained, **kwargs)
