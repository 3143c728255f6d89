"""The attention's BatchNorm, such that the field's tools for freezing and synchronizing BatchNorms take it along."""

from typing import Any

import torch
from torch import nn

__all__ = ['AttentionBatchNorm', 'as_attention_norm', 'normalize']


class AttentionBatchNorm(nn.BatchNorm1d, nn.BatchNorm2d):
    """A BatchNorm over vectors ``(B, C)`` that is also taken for one over images.

    ``freeze_batch_norm_2d`` and its like look for ``BatchNorm2d`` only; a network whose other norms are frozen must not
    have norms that go on learning. What they put in its place gets its vectors as images, see :func:`normalize`.

    Attributes:
        layer: Name of the layer whose attention this is, for messages.
    """

    layer: str = ''

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        as_attention_norm(self)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() not in (2, 3, 4):
            raise ValueError(f'Expected vectors (B, {self.num_features}), got shape {tuple(input.shape)}.')

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize vectors ``(B, C)``.

        Raises:
            ValueError: If one image alone is to be normalized by its own statistics.
        """
        if (self.training or self.running_mean is None) and input.shape[0] == 1 and input.numel() == self.num_features:
            layer = f"the layer '{self.layer}'" if self.layer else 'a KW layer'
            raise ValueError(
                f'Expected more than 1 value per channel when training, got one image: the attention of {layer} pools '
                f'every image to one vector, of which its BatchNorm needs two or more; give two images or more per '
                f'device (DataLoader(..., drop_last=True)), or call .eval() where only shapes are wanted.'
            )
        return super().forward(input)


def as_attention_norm(norm: nn.Module) -> nn.Module:
    """Let a plain ``nn.BatchNorm1d`` be an :class:`AttentionBatchNorm`; return other norms as they are."""
    if type(norm) is nn.BatchNorm1d:
        norm.__class__ = AttentionBatchNorm
    if type(norm) is AttentionBatchNorm:
        # An instance's, not the class's: torch.fx takes modules of torch.nn for one operation, and must not look in.
        norm.__module__ = nn.BatchNorm1d.__module__
    return norm


def normalize(norm: nn.Module, vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors ``(B, C)`` normalized by whatever now is in the place of the attention's norm."""
    takes_vectors = isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm) or not hasattr(norm, 'running_mean')
    return norm(vectors) if takes_vectors else norm(vectors[..., None, None]).flatten(1)
