"""Compute the features of padded images as if each image were alone.

The images of a batch are padded to one size at the right and at the bottom. Convolutions reach a few positions into
the padding, but the attention of a KW layer takes the mean of its whole input: padding changes every kernel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .inference.layers import OptimizedKWLayer
from .layers import KWConv2d

__all__ = ['check_sizes', 'without_padding']

Size = tuple[int, int]


@contextmanager
def without_padding(network: nn.Module, sizes: Sequence[Size], padded: Size) -> Iterator[None]:
    """Let a network leave the padding of its input out, while the context lasts.

    In front of every convolution and pooling the activations in the padding are zero, as beyond the border of an image
    that is alone, and the attention of KW layers takes the mean over the image. So the features of each image are those
    of the image alone, where every stride meets its last row and column: with sizes that are multiples of the stride
    they agree up to rounding. What the features hold in the padding means nothing.

    Squeeze-and-excitation and other pooling of static networks goes on seeing zeros, BatchNorms in training mode the
    padding. With gradient checkpointing, features are computed a second time outside of the context: do not combine.

    Args:
        network: Network of images, KW or static, from timm or of the same layers.
        sizes: ``(height, width)`` of each image of the batch.
        padded: ``(height, width)`` of the batch.

    Raises:
        ValueError: If a size is not within the padded one.

    Example:
        >>> with without_padding(model, [(480, 640), (512, 512)], (512, 640)):
        ...     features = model.forward_intermediates(x, intermediates_only=True)
    """
    check_sizes(sizes, padded)
    valid = _Valid(list(sizes), padded)
    handles = []
    for module in network.modules():
        is_kw = isinstance(module, KWConv2d) or (isinstance(module, OptimizedKWLayer) and not module.tokens)
        if is_kw or isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            handles.append(module.register_forward_pre_hook(valid.before))
            handles.append(module.register_forward_hook(valid.behind))
        if is_kw:
            attention: Any = module.attention
            handles.append(attention.register_forward_pre_hook(valid.pooled))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_sizes(sizes: Sequence[Size], padded: Size) -> None:
    """Raise ValueError unless every ``(height, width)`` is positive and within the padded size."""
    for i, (height, width) in enumerate(sizes):
        if not (0 < height <= padded[0] and 0 < width <= padded[1]):
            raise ValueError(
                f'Image {i} of the batch is said to be {height} x {width}, which is not within the {padded[0]} x '
                f'{padded[1]} of the batch. Give (height, width) of each image before it was padded.'
            )


class _Valid:
    """The images' sizes at each resolution of the network."""

    def __init__(self, sizes: list[Size], padded: Size) -> None:
        self.padded = padded
        self.sizes: dict[Size, list[Size]] = {padded: sizes}
        self.masks: dict[Size, torch.Tensor] = {}

    def before(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Set the padding of a layer's input to zero."""
        x = inputs[0]
        if x.dim() != 4:
            return None
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            return None  # sees no other position
        return (torch.where(self.mask(x), x, x.new_zeros(())),)

    def behind(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Note the sizes behind a layer that changes the resolution, as they are for each image alone."""
        x = inputs[0]
        if output.dim() != 4 or _resolution(output) in self.sizes:
            return
        after = partial(_length_behind, getattr(layer, 'spec', layer), x, output)
        self.sizes[_resolution(output)] = [(after(0, height), after(1, width)) for height, width in self.at(x)]

    def pooled(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Give the attention the mean over each image, ``(B, C, 1, 1)``, in place of the whole input."""
        x = inputs[0]
        if x.dim() != 4:
            return inputs
        areas = x.new_tensor([height * width for height, width in self.at(x)])
        return (x.mean((2, 3), keepdim=True) * (x.shape[2] * x.shape[3] / areas)[:, None, None, None],)

    def at(self, x: torch.Tensor) -> list[Size]:
        """Return the sizes at the resolution of ``x``; where it arose in an unknown way, in proportion."""
        resolution = _resolution(x)
        if resolution not in self.sizes:
            ratios = [now / first for now, first in zip(resolution, self.padded, strict=True)]
            self.sizes[resolution] = [
                (-int(-height * ratios[0] // 1), -int(-width * ratios[1] // 1))
                for height, width in self.sizes[self.padded]
            ]
        return self.sizes[resolution]

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(B, 1, H, W)``, true within the images."""
        resolution = _resolution(x)
        if resolution not in self.masks:
            heights, widths = (torch.tensor(lengths, device=x.device) for lengths in zip(*self.at(x), strict=True))
            rows = torch.arange(resolution[0], device=x.device) < heights[:, None]
            columns = torch.arange(resolution[1], device=x.device) < widths[:, None]
            self.masks[resolution] = (rows[:, :, None] & columns[:, None, :])[:, None]
        return self.masks[resolution]


def _resolution(x: torch.Tensor) -> Size:
    return int(x.shape[2]), int(x.shape[3])


def _length_behind(layer: Any, x: torch.Tensor, output: torch.Tensor, axis: int, length: int) -> int:
    """Return the length of an image's axis behind a layer."""
    pick: Callable[[Any], int] = lambda value: value if isinstance(value, int) else value[axis]  # noqa: E731
    if isinstance(layer.padding, str):
        return -(-length * output.shape[2 + axis] // x.shape[2 + axis])
    window = pick(getattr(layer, 'dilation', 1)) * (pick(layer.kernel_size) - 1) + 1
    room = length + 2 * pick(layer.padding) - window
    stride = pick(layer.stride)
    rounded = -(-room // stride) if getattr(layer, 'ceil_mode', False) else room // stride
    return max(rounded + 1, 1)
