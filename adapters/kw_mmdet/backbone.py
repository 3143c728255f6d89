"""The backbone that MMDetection configs name."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .features import PyramidFeatures
from .generation import BACKBONES, BaseModule
from .padding import BatchSizes, follow_detectors, sizes_of
from .sources import weights_source

__all__ = ['KWBackbone']


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
        grad_checkpointing: Keep less for the gradient and compute it again; what ``with_cp`` is elsewhere.
        ignore_padding: Compute the features of each image as if it were alone, whatever it was padded to: KW kernels
            depend on the mean of their input. The published weights were trained with the padding, hence not with this.
            The sizes come from the ``img_shape`` of the batch that the detector is called with.
        pretrained: True for timm's pretrained weights of ``name``, or a weight file.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)``; ``'timm://NAME'`` stands for timm's pretrained weights.
            Of a detector's file the backbone is taken; ``prefix`` says what its names begin with, if not
            ``'backbone.'``. Of type ``'KernelizeStatic'``: the weights of the static network that a KW network was made
            of, which it then computes exactly, and learns from there. Not together with ``pretrained``.
        **model_args: Arguments of ``timm.create_model``, e.g. ``drop_path_rate=0.4, ls_init_value=1.0``.

    Shape:
        input ``(B, 3, H, W)``, and with ``ignore_padding`` outside of a detector ``sizes``; output a tuple of
        ``(B, out_channels[i], H / strides[i], W / strides[i])``.

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
        grad_checkpointing: bool = False,
        ignore_padding: bool = False,
        pretrained: bool | str | None = None,
        init_cfg: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        **model_args: Any,
    ) -> None:
        if pretrained and init_cfg:
            raise ValueError('Give pretrained or init_cfg, not both.')
        super().__init__(
            name, out_indices, frozen_stages, norm_eval, out_norms, head_conv, grad_checkpointing, **model_args
        )
        if ignore_padding and grad_checkpointing:
            raise ValueError('Choose ignore_padding or grad_checkpointing, they do not go together.')
        self.ignore_padding = ignore_padding
        self.batch_sizes: list[BatchSizes] = []
        if ignore_padding:
            follow_detectors()
        # MMDetection's NumClassCheckHook takes any module's num_classes for a detection head's.
        for module in self.model.modules():
            module.__dict__.pop('num_classes', None)
        # mmcv 1.x writes non-persistent buffers into checkpoints, where nothing reads them.
        self._register_state_dict_hook(_drop_assignments)
        self.pretrained = pretrained
        self.init_cfg = init_cfg
        self._is_init = False

    def forward(self, x: torch.Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> tuple[torch.Tensor, ...]:
        """Return one feature map per level for images ``(B, 3, H, W)``.

        Args:
            x: Images, padded at the right and at the bottom.
            sizes: ``(height, width)`` of each without its padding; None takes them from the detector's batch if
                ``ignore_padding``, else the padding for part of the images.

        Raises:
            ValueError: If ``ignore_padding`` and the sizes are not known, or they do not fit ``x``.
        """
        if sizes is None and self.ignore_padding:
            sizes = sizes_of(x, self.batch_sizes)
        return super().forward(x, sizes)

    def init_weights(self) -> None:
        """Load the weights that ``pretrained`` or ``init_cfg`` names; the constructor has drawn all others."""
        if self._is_init:
            warnings.warn('init_weights of KWBackbone has been called before; nothing is done.', stacklevel=2)
            return
        source = weights_source(self.name, self.pretrained, self.init_cfg)
        if source is not None and source.static:
            self.load_static(str(source.weights), source.prefix)
        elif source is not None:
            self.load_pretrained(source.weights, source.prefix)
        self._is_init = True


def _drop_assignments(module: KWBackbone, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [k for k in state_dict if k.startswith(prefix) and k.endswith('.attention.assignment')]:
        del state_dict[key]
