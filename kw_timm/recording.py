"""What a network of timm's needs to be built again by name: timm's own notes on how it was made, and the plan."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from timm import is_model
from torch import nn

from .layers.attention import NormLayer
from .plan_json import plan_to_json
from .plans import WarehousePlan

__all__ = ['ARCHITECTURE', 'NORMS', 'recorded']

Kernelize = TypeVar('Kernelize', bound=Callable[..., nn.ModuleDict])

ARCHITECTURE = 'kernelized'  # The registered name under which timm builds a network by its plan.
NORMS: dict[str, NormLayer] = {'BatchNorm1d': nn.BatchNorm1d, 'LayerNorm': nn.LayerNorm}


def recorded(kernelize: Kernelize) -> Kernelize:
    """Let ``kernelize`` leave its plan with the network, where timm's own functions for saving find it."""

    @wraps(kernelize)
    def kernelize_and_record(
        model: nn.Module,
        plan: Mapping[str, WarehousePlan],
        norm_layer: NormLayer = nn.BatchNorm1d,
        **options: Any,
    ) -> nn.ModuleDict:
        is_static = getattr(model, 'warehouses', None) is None
        warehouses = kernelize(model, plan, norm_layer, **options)
        _record(model, plan, norm_layer, is_static)
        return warehouses

    return kernelize_and_record  # type: ignore[return-value]


def _record(model: Any, plan: Mapping[str, WarehousePlan], norm_layer: NormLayer, is_static: bool) -> None:
    found, args = getattr(model, 'pretrained_cfg', None), dict(getattr(model, '_model_args', None) or {})
    cfg: dict[str, Any] = found if isinstance(found, dict) else {}
    name = cfg.get('architecture')
    norm = next((key for key, value in NORMS.items() if value is norm_layer), None)
    if (
        not isinstance(name, str)
        or not is_model(name)
        or not (is_static or 'plan' in args)
        or args.get('features_only')
    ):
        return  # Not timm's, or within a network that knows its plan by its own name.
    if norm is None or args.get('attention_norm', norm) != norm:
        args.pop('plan', None)  # What cannot be said in words cannot be built again.
    else:
        args |= {'plan': {**args.get('plan', {}), **plan_to_json(plan)}, 'attention_norm': norm}
    if is_static:
        args['static'] = name
        model.pretrained_cfg = model.default_cfg = {**cfg, 'architecture': ARCHITECTURE, 'tag': None}
    model._model_args = args
