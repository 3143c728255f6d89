"""What never changes about a KW convolution, as one value that is made with the layer and handed down whole."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .modes import is_recording

__all__ = ['ConvSpec', 'Padding', 'check_input']

Padding = str | tuple[int, ...]


@dataclass(frozen=True)
class ConvSpec:
    """How a kernel is put together from cells, and how it is convolved.

    Attributes:
        grid: Mixtures along the kernel's axes: ``(spatial positions, output groups, input groups)``, ``m`` in all.
        cell_shape: ``(co, ci, *window)``; the window is 1x1, or the whole kernel where the spatial partition is off.
        kernel_size: Window of the kernel.
        stride: Stride per spatial axis.
        padding: Zeros at both ends of each spatial axis, in pixels.
        dilation: Dilation per spatial axis.
        groups: Groups.
        end_padding: Further zeros at the end of each spatial axis: ``'same'`` padding of an even window has one.
        positions: Where mixtures are made for some positions of the window only, which ones.
    """

    grid: tuple[int, int, int]
    cell_shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    end_padding: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        grid: tuple[int, int, int],
        cell_shape: Sequence[int],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        padding: Padding | None = None,
        dilation: tuple[int, ...] | None = None,
        groups: int = 1,
    ) -> 'ConvSpec':
        """Make a value from a convolution's arguments as ``nn.Conv2d`` takes them.

        Raises:
            ValueError: If the padding is a word other than ``'same'`` and ``'valid'``, or ``'same'`` with a stride.
        """
        ones = (1,) * len(kernel_size)
        stride, dilation = stride or ones, dilation or ones
        end_padding: tuple[int, ...] = ()
        if padding == 'same':
            if stride != ones:
                raise ValueError(f"padding='same' needs a stride of 1, got {stride}.")
            total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
            padding = tuple(t // 2 for t in total)
            end_padding = tuple(t % 2 for t in total) if any(t % 2 for t in total) else ()
        elif padding is None or padding == 'valid':
            padding = (0,) * len(kernel_size)
        elif isinstance(padding, str):
            raise ValueError(f"padding={padding!r} is not known; give numbers of pixels, 'same' or 'valid'.")
        return cls(grid, tuple(cell_shape), kernel_size, stride, padding, dilation, groups, end_padding)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """``(O, I / groups, *kernel_size)``."""
        return (self.grid[1] * self.cell_shape[0], self.grid[2] * self.cell_shape[1], *self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether the convolution only mixes channels: one group, no window, no padding."""
        return self.groups == 1 and all(k == 1 for k in self.kernel_size) and not any(self.padding)

    @property
    def layout(self) -> tuple[int, ...]:
        """``(*grid, *kernel_size)``: what a registered operator, which takes numbers alone, needs to place mixtures."""
        return (*self.grid, *self.kernel_size)

    def narrow(self, cell_channels: int) -> 'ConvSpec':
        """Return the value for as many of every cell's output channels, and the output channels made of them."""
        return replace(self, cell_shape=(cell_channels, *self.cell_shape[1:]))

    def at(self, positions: tuple[int, ...]) -> 'ConvSpec':
        """Return the value for the mixtures of some positions of the window; the others count as zero."""
        return replace(self, grid=(len(positions), *self.grid[1:]), positions=positions)

    def pad_end(self, x: torch.Tensor) -> torch.Tensor:
        """Return inputs with the zeros that only their ends get."""
        if not self.end_padding:
            return x
        return F.pad(x, [zeros for end in reversed(self.end_padding) for zeros in (0, end)])

    def output_size(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return the spatial size of the output for inputs ``(B, C, *spatial)``."""
        return tuple(
            (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
            for size, window, stride, padding, dilation in zip(
                x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )


def check_input(x: torch.Tensor, spec: ConvSpec) -> None:
    """Raise ValueError unless ``x`` is a batch of inputs that the kernel fits into."""
    axes = len(spec.kernel_size)
    if x.dim() != axes + 2:
        raise ValueError(
            f'Expected a batched input of {axes + 2} axes (B, C, *spatial), got shape {tuple(x.shape)}. '
            f'Add the batch axis with x.unsqueeze(0): the kernels are computed per sample.'
        )
    if is_recording():
        return  # What a graph is made with says little of what it will get.
    spatial = tuple(x.shape[2:])
    if 0 in spatial:
        raise ValueError(f'The input has no pixels: shape {tuple(x.shape)}. Every spatial size must be at least 1.')
    end = spec.end_padding or (0,) * axes
    padded = tuple(s + 2 * p + e for s, p, e in zip(spatial, spec.padding, end, strict=True))
    window = tuple(d * (k - 1) + 1 for k, d in zip(spec.kernel_size, spec.dilation, strict=True))
    if any(s < w for s, w in zip(padded, window, strict=True)):
        raise ValueError(
            f'The input of spatial size {spatial} (with padding {padded}) is smaller than the kernel window {window}. '
            f'Feed a larger image.'
        )
