"""mmcv's compiled operators, made of torchvision's.

``mmcv.ops`` looks up about 112 names in the compiled module ``mmcv._ext`` when it is imported. Mask and Faster R-CNN
run three of them: ``nms``, ``roi_align_forward`` and ``roi_align_backward``. torchvision has the same three for CPUs,
CUDA and MPS, ready-made for every torch, so without compiled mmcv they stand in for it. All other names raise when
called.

Compiled mmcv wins wherever it is installed and can be loaded.
"""

import importlib
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import NoReturn

import torch
import torchvision
from torch import Tensor

__all__ = ['use_torchvision_ops']

NAME = 'mmcv._ext'
MAX, AVERAGE = 0, 1


def use_torchvision_ops() -> bool:
    """Let ``mmcv.ops`` use torchvision's operators unless compiled ones work here.

    Has to run before ``mmcv.ops`` (and so before most of MMDetection) is imported; importing ``kw_mmdet`` runs it.

    Returns:
        Whether torchvision's operators are in use.

    Raises:
        ImportError: If mmcv is not installed.
    """
    try:
        import mmcv
    except ModuleNotFoundError as error:
        if error.name != 'mmcv':
            raise
        raise ModuleNotFoundError(
            "kw_mmdet needs MMDetection and mmcv, which are not installed; run: pip install 'kw-timm[mmdet]' "
            "(MMDetection 2.28) or pip install 'kw-timm[mmdet3]' (3.3)",
            name='mmcv',
        ) from error
    try:
        return isinstance(importlib.import_module(NAME), _TorchvisionOperators)
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == NAME):
            warnings.warn(
                f"The compiled operators of mmcv {mmcv.__version__} cannot be loaded here ({error}), torchvision's are "
                'used; build mmcv again for this torch, or install mmcv without operators.',
                stacklevel=2,
            )
    module = _TorchvisionOperators(mmcv.__version__)
    sys.modules[NAME] = mmcv._ext = module
    return True


class _TorchvisionOperators(types.ModuleType):
    """What stands for ``mmcv._ext``: three operators, and for every other name a function that raises."""

    def __init__(self, mmcv_version: str) -> None:
        super().__init__(NAME, __doc__)
        self.__spec__ = ModuleSpec(NAME, None, origin=__file__)  # mmcv's check_ops_exist looks for one
        self._mmcv_version = mmcv_version
        self.nms = nms
        self.roi_align_forward = roi_align_forward
        self.roi_align_backward = roi_align_backward
        # Reported by collect_env, at the start of every training.
        self.get_compiler_version = lambda: f'none (operators of torchvision {torchvision.__version__})'
        self.get_compiling_cuda_version = lambda: torchvision.version.cuda or 'not available'

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith('_'):
            raise AttributeError(f'module {NAME!r} has no attribute {name!r}')
        version = self._mmcv_version
        full = f'{"mmcv-full" if version.startswith("1.") else "mmcv"}=={version}'

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator '{name}' needs compiled mmcv, for which torchvision's NMS and RoIAlign stand in; "
                f'with a C++ compiler, run: MMCV_WITH_OPS=1 pip install --no-build-isolation {full} '
                f"(kw-timm's README, 'Compiled mmcv', says what current torch needs)"
            )

        missing.__name__ = missing.__qualname__ = name
        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes: x1, y1, x2, y2 in pixels, shape (N, 4).
        scores: Shape (N,).
        iou_threshold: Boxes that overlap a better one by more than this go.
        offset: 1 where x2 and y2 are the last pixel inside the box, else 0.

    Returns:
        Indices of the boxes kept, best first, shape (K,), int64.
    """
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.int64)
    # mmcv's own sort, for the same order among equal scores; then scores that torchvision cannot order otherwise.
    order = scores.sort(0, descending=True).indices
    ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=torch.float32)
    sorted_boxes = boxes[order]
    if boxes.dtype != torch.float64:
        # Compiled mmcv knows no other type than float32, and compares with a threshold of that type.
        sorted_boxes = sorted_boxes.float()
        iou_threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    if offset:
        sorted_boxes = torch.cat([sorted_boxes[:, :2], sorted_boxes[:, 2:] + offset], 1)
    return order[torchvision.ops.nms(sorted_boxes, ranks.to(sorted_boxes), iou_threshold)]


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool the features of regions, by bilinear samples in each of a region's bins.

    Args:
        input: Features, shape (B, C, H, W).
        rois: Index of the image, x1, y1, x2, y2 in pixels of the image; shape (K, 5).
        output: Written: pooled features, shape (K, C, aligned_height, aligned_width).
        argmax_y: Written for maxima: row of the largest sample in pixels of the features, like ``output``.
        argmax_x: Written for maxima: its column.
        aligned_height: Bins of a region from top to bottom.
        aligned_width: Bins of a region from left to right.
        spatial_scale: Pixels of the features per pixel of the image.
        sampling_ratio: Samples of a bin in each direction; 0 for about one per pixel of the features.
        pool_mode: 0 for the maximum of a bin's samples, 1 for their average.
        aligned: Whether pixels of the features have their centres half a pixel from their corner.
    """
    size = (aligned_height, aligned_width)
    kind = _working_type(input, rois)
    if pool_mode == AVERAGE:
        pooled = torchvision.ops.roi_align(
            input.to(kind), rois.to(kind), size, spatial_scale, sampling_ratio, bool(aligned)
        )
        output.copy_(pooled)
        return
    values, y, x = _max_forward(input.to(kind), rois.to(kind), size, spatial_scale, sampling_ratio, bool(aligned))
    output.copy_(values)
    argmax_y.copy_(y)
    argmax_x.copy_(x)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of ``roi_align_forward`` for its input.

    Args:
        grad_output: Gradient of the output, shape (K, C, aligned_height, aligned_width).
        rois: As in ``roi_align_forward``.
        argmax_y: As written there.
        argmax_x: As written there.
        grad_input: The gradient is added to it, shape (B, C, H, W).
        aligned_height: As in ``roi_align_forward``, like all that follow.
        aligned_width: As there.
        spatial_scale: As there.
        sampling_ratio: As there.
        pool_mode: As there.
        aligned: As there.
    """
    if pool_mode == MAX:
        _max_backward(grad_output, rois, argmax_y, argmax_x, grad_input)
        return
    kind = _working_type(grad_output, rois)
    grad_output, rois = grad_output.to(kind), rois.to(kind)
    shape = grad_input.shape
    if torch.are_deterministic_algorithms_enabled() and grad_output.device.type != 'cpu':
        # The kernel refuses; torchvision's Python has a way that is slow, large and deterministic.
        with torch.enable_grad():
            features = grad_output.new_zeros(shape).requires_grad_()
            pooled = torchvision.ops.roi_align(
                features, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, bool(aligned)
            )
        (grad,) = torch.autograd.grad(pooled, features, grad_output)
    else:
        grad = torch.ops.torchvision._roi_align_backward(
            grad_output, rois, spatial_scale, aligned_height, aligned_width, *shape, sampling_ratio, bool(aligned)
        )
    grad_input.add_(grad)


def _working_type(features: Tensor, rois: Tensor) -> torch.dtype:
    """The type to compute in: the wider one, and none that torchvision's kernels lack."""
    kind = torch.promote_types(features.dtype, rois.dtype)
    return torch.float32 if kind == torch.bfloat16 else kind


def _max_forward(
    features: Tensor, rois: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest sample of every bin, and where it lies; torchvision has averages only.

    Returns:
        Values, rows and columns, each of shape (K, C, bins down, bins across); rows and columns are -1 where no sample
        was larger than what mmcv starts with.
    """
    # mmcv starts from these; a region without samples (an empty one, sampled adaptively) keeps them.
    lowest = -10000.0 if features.device.type == 'cpu' else torch.finfo(torch.float32).min
    values = features.new_full((len(rois), features.shape[1], size[0] * size[1]), lowest)
    y_best, x_best = torch.full_like(values, -1), torch.full_like(values, -1)
    images = rois[:, 0].long()
    rows, row_counts = _sample_lines(rois[:, 2], rois[:, 4], size[0], scale, sampling_ratio, aligned)
    columns, column_counts = _sample_lines(rois[:, 1], rois[:, 3], size[1], scale, sampling_ratio, aligned)
    # One sample of every bin at a time: all samples at once would take as many times the memory of the output.
    for iy in range(int(row_counts.max()) if len(rois) else 0):
        for ix in range(int(column_counts.max())):
            some = ((row_counts > iy) & (column_counts > ix)).nonzero()[:, 0]
            if len(some) == 0:
                break
            y = rows(some, iy)[:, :, None].expand(-1, -1, size[1]).flatten(1)
            x = columns(some, ix)[:, None, :].expand(-1, size[0], -1).flatten(1)
            sample = _bilinear(features, images[some], y, x)
            before = values[some]
            larger = sample > before
            values[some] = torch.where(larger, sample, before)
            y_best[some] = torch.where(larger, y[:, None], y_best[some])
            x_best[some] = torch.where(larger, x[:, None], x_best[some])
    shape = (len(rois), features.shape[1], *size)
    return values.reshape(shape), y_best.reshape(shape), x_best.reshape(shape)


def _sample_lines(
    start: Tensor, end: Tensor, bins: int, scale: float, sampling_ratio: int, aligned: bool
) -> tuple[Callable[[Tensor, int], Tensor], Tensor]:
    """Sampling positions along one axis, in mmcv's order of operations.

    Returns:
        A function of some regions and a sample's number in its bin that gives positions of shape (regions, bins), and
        the number of samples per bin, shape (K,).
    """
    shift = 0.5 if aligned else 0.0
    start = start * scale - shift
    length = (end * scale - shift) - start
    if not aligned:
        length = length.clamp(min=1)
    bin_length = length / bins
    counts = torch.full_like(length, sampling_ratio) if sampling_ratio > 0 else bin_length.ceil()
    numbers = torch.arange(bins, device=start.device, dtype=start.dtype)

    def positions(some: Tensor, sample: int) -> Tensor:
        of_bin = bin_length[some][:, None]
        return start[some][:, None] + numbers * of_bin + (sample + 0.5) * of_bin / counts[some][:, None]

    return positions, counts


def _corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Pixels around each position and their weights, in mmcv's order of operations.

    Returns:
        Four indices into flattened pixels and four weights, shaped like ``y``, and whether a position is inside.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)

    def split(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.where(inside, position.clamp(min=0, max=size - 1), torch.zeros_like(position))
        low = position.long()
        return low, (low + 1).clamp(max=size - 1), position - low

    y_low, y_high, ly = split(y, height)
    x_low, x_high, lx = split(x, width)
    hy, hx = 1 - ly, 1 - lx
    indices = [y_low * width + x_low, y_low * width + x_high, y_high * width + x_low, y_high * width + x_high]
    return indices, [hy * hx, hy * lx, ly * hx, ly * lx], inside


def _bilinear(features: Tensor, images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Samples of shape (regions, C, positions), 0 outside, for positions of shape (regions, positions)."""
    indices, weights, inside = _corners(y, x, *features.shape[2:])
    pixels = features.flatten(2)
    # The two indices are apart, so that they come first: (regions, positions, C).
    terms = [
        weight[:, None] * pixels[images[:, None], :, index].transpose(1, 2)
        for index, weight in zip(indices, weights, strict=True)
    ]
    sample = terms[0] + terms[1] + terms[2] + terms[3]
    return torch.where(inside[:, None], sample, torch.zeros_like(sample))


def _max_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor) -> None:
    """Give each bin's gradient to the pixels around its largest sample."""
    _, channels, height, width = grad_input.shape
    indices, weights, inside = _corners(argmax_y, argmax_x, height, width)
    taken = inside & (argmax_y != -1)
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    first = (planes * (height * width))[:, :, None, None]
    where = torch.stack([first + index for index in indices], -1)[taken]
    what = torch.stack([grad_output * weight for weight in weights], -1)[taken]
    grad = torch.zeros_like(grad_input, memory_format=torch.contiguous_format)
    grad.view(-1).scatter_add_(0, where.flatten(), what.flatten().to(grad.dtype))
    grad_input.add_(grad)


# Importing kw_mmdet is enough, as a config's `custom_imports` does.
use_torchvision_ops()
