"""The backbone that MMDetection configs name."""

import warnings
from collections.abc import Sequence
from typing import Any

from .features import PyramidFeatures
from .generation import BACKBONES, BaseModule

__all__ = ['KWBackbone']

TIMM_PREFIX = 'timm://'


@BACKBONES.register_module()
class KWBackbone(PyramidFeatures, BaseModule):
    """Any timm network, KernelWarehouse or static, as an MMDetection backbone.

    Weights are loaded by ``init_weights``, as MMDetection does it for training; testing loads a detector's checkpoint.

    Args:
        name: timm network, e.g. ``'kw4x_resnet50'``.
        out_indices: Levels to return: 0, 1, 2, 3 have strides 4, 8, 16, 32.
        frozen_stages: -1 nothing, 0 the stem, 1 the stem and the stage of stride 4, and so on.
        norm_eval: Keep BatchNorms, those of the attention included, on their running statistics.
        out_norms: LayerNorm over the channels of every level; None: for ConvNeXt.
        head_conv: Make the 1x1 head's output the last level; None: for MobileNetV2 (1280 channels).
        pretrained: True for timm's pretrained weights of ``name``, or a weight file.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)``; ``'timm://NAME'`` stands for timm's pretrained weights.
            Not together with ``pretrained``.
        **model_args: Arguments of ``timm.create_model``, e.g. ``drop_path_rate=0.4, ls_init_value=1.0``.

    Shape:
        input ``(B, 3, H, W)``; output a tuple of ``(B, out_channels[i], H / strides[i], W / strides[i])``.

    Raises:
        ValueError: See :class:`~kw_mmdet.features.PyramidFeatures`; also for an ``init_cfg`` of another type.

    Example:
        >>> backbone = dict(type='KWBackbone', name='kw4x_resnet50', frozen_stages=1)
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = True,
        out_norms: bool | None = None,
        head_conv: bool | None = None,
        pretrained: bool | str | None = None,
        init_cfg: dict[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        if pretrained and init_cfg:
            raise ValueError('Give pretrained or init_cfg, not both.')
        super().__init__(name, out_indices, frozen_stages, norm_eval, out_norms, head_conv, **model_args)
        # MMDetection's NumClassCheckHook takes any module's num_classes for a detection head's.
        for module in self.model.modules():
            module.__dict__.pop('num_classes', None)
        # mmcv 1.x writes non-persistent buffers into checkpoints, where nothing reads them.
        self._register_state_dict_hook(_drop_assignments)
        self.pretrained = pretrained
        self.init_cfg = init_cfg
        self._is_init = False

    def init_weights(self) -> None:
        """Load the weights that ``pretrained`` or ``init_cfg`` names; the constructor has drawn all others."""
        if self._is_init:
            warnings.warn('init_weights of KWBackbone has been called before; nothing is done.', stacklevel=2)
            return
        source = self._weights_source()
        if source is not None:
            self.load_pretrained(None if source == TIMM_PREFIX else source)
        self._is_init = True

    def _weights_source(self) -> str | None:
        """Return a file or URL, ``TIMM_PREFIX`` for timm's own weights, or None."""
        if self.init_cfg:
            kind, checkpoint = self.init_cfg.get('type'), self.init_cfg.get('checkpoint')
            if kind != 'Pretrained' or not checkpoint:
                raise ValueError(
                    f"init_cfg of KWBackbone must be dict(type='Pretrained', checkpoint=...), "
                    f'got {dict(self.init_cfg)}. '
                    f'The network initializes itself; there is no other way to choose.'
                )
            source = str(checkpoint)
        elif self.pretrained:
            source = TIMM_PREFIX if self.pretrained is True else str(self.pretrained)
        else:
            return None
        if source.startswith(TIMM_PREFIX):
            wanted = source.removeprefix(TIMM_PREFIX)
            if wanted and wanted.partition('.')[0] != self.name.partition('.')[0]:
                raise ValueError(f"init_cfg names the weights of '{wanted}', but the backbone is '{self.name}'.")
            return TIMM_PREFIX
        return source


def _drop_assignments(module: KWBackbone, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [k for k in state_dict if k.startswith(prefix) and k.endswith('.attention.assignment')]:
        del state_dict[key]
