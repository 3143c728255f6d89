"""Networks without released weights, their plans derived by :func:`kw_timm.derive_plan`: kw1x, kw2x and kw4x of each.

``timm.list_models('kw*', pretrained=True)`` leaves them out.
"""

from functools import lru_cache
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..derive import DerivedPlan, derive_plan
from ..weights.skeletons import create_skeleton
from .kernelized import build_kernelized, network_cfg

__all__ = ['DERIVED']

BUDGETS = {'kw1x': 1, 'kw2x': 2, 'kw4x': 4}
STATIC = (
    *('resnet34', 'resnet101', 'resnext50_32x4d', 'regnety_008', 'repvit_m1'),
    *('convnext_nano', 'convnext_small', 'convnextv2_nano'),
    *('efficientnet_b0', 'efficientnet_lite0', 'mobilenetv3_large_100', 'mobilenetv4_conv_small'),
    *('deit_tiny_patch16_224', 'deit_small_patch16_224'),
)
DERIVED: dict[str, str] = {f'{budget}_{static}': static for static in STATIC for budget in BUDGETS}

default_cfgs = generate_default_cfgs({name: network_cfg(static) for name, static in DERIVED.items()})


@lru_cache
def _plan(static: str, budget: float) -> DerivedPlan:
    """Return the plan of the network for ImageNet, so that other classes and input channels do not change it."""
    return derive_plan(create_skeleton(static), budget)


def _register(name: str, static: str) -> None:
    budget = BUDGETS[name.partition('_')[0]]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        plan = kwargs.pop('plan', None) or _plan(static, budget)  # A saved network keeps the plan that it had.
        return build_kernelized(name, pretrained, **{'static': static, 'plan': plan, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'{static} with {budget} cells per mixture, without released weights.'
    globals()[name] = register_model(create)  # Where a name in ``__all__`` is looked for.


for _name, _static in DERIVED.items():
    _register(_name, _static)
