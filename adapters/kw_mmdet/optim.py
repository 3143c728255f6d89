"""Layer-wise learning-rate decay for ConvNeXt backbones."""

import re
from typing import Any

from torch import nn

from .generation import OPTIM_CONSTRUCTORS, DefaultOptimizerConstructor

__all__ = ['ConvNeXtLayerDecay', 'convnext_layer_id']

NUM_LAYERS = 6
_BLOCK = re.compile(r'stages\.(\d+)\.(?:blocks\.(\d+)|downsample)')


def convnext_layer_id(name: str) -> int:
    """Return the layer id of a detector's parameter: 0 for the stem to 6 for the last stage, 7 for everything else.

    Args:
        name: Parameter name, ``backbone.model.<timm name>`` for the backbone's.
    """
    path = name.removeprefix('backbone.model.')
    if path == name:
        return NUM_LAYERS + 1
    if path.startswith('stem.'):
        return 0
    match = _BLOCK.match(path)
    if match is None:  # warehouses belong to no one layer
        return NUM_LAYERS + 1
    stage, block = int(match[1]), match[2]
    if stage < 2:
        return stage + 1
    return 3 + (int(block) // 3 if block else 0) if stage == 2 else NUM_LAYERS


@OPTIM_CONSTRUCTORS.register_module()
class ConvNeXtLayerDecay(DefaultOptimizerConstructor):
    """Optimizer constructor: learning rate times ``decay_rate ** (7 - layer id)``.

    One-dimensional parameters and biases get no weight decay. In a config:
    ``optimizer = dict(constructor='ConvNeXtLayerDecay', paramwise_cfg=dict(decay_rate=0.95), ...)``, in MMDetection 3.x
    the same keys in ``optim_wrapper``.
    """

    def _validate_cfg(self) -> None:
        rate = self.paramwise_cfg.get('decay_rate')
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg of ConvNeXtLayerDecay needs decay_rate above 0 and at most 1, got {rate!r}.'
            )

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Add one group per layer id and kind of weight decay to ``params``."""
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer_id = convnext_layer_id(name)
            decays = parameter.dim() > 1 and not name.endswith('.bias')
            group = groups.setdefault(
                (layer_id, decays),
                dict(
                    params=[],
                    param_names=[],
                    lr=self.base_lr * self.paramwise_cfg['decay_rate'] ** (NUM_LAYERS + 1 - layer_id),
                    weight_decay=self.base_wd if decays else 0.0,
                ),
            )
            group['params'].append(parameter)
            group['param_names'].append(name)
        params.extend(groups[key] for key in sorted(groups))
