"""Tools of MMDetection that rebuild networks, kept from timm's blocks, which they would change silently.

``fuse_conv_bn`` multiplies every BatchNorm into the convolution listed before it and puts an identity in its place. But
timm's ``BatchNormAct2d`` is a BatchNorm that holds the activation too, timm's blocks do not list their children in the
order of their calls, and a KW layer is followed by the BatchNorm of its attention. The conversions to and from
SyncBatchNorm lose the same activation.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn

__all__ = ['protect_timm_networks']

Rebuild = Callable[..., nn.Module]


def protect_timm_networks() -> None:
    """Keep the tools that walk a detector from changing what its timm networks compute; importing ``kw_mmdet`` runs it.

    ``fuse_conv_bn`` leaves timm's networks as they are, with a warning that names
    :func:`kw_timm.optimize_for_inference`. On the way to and from SyncBatchNorm activations are kept.
    """
    _protect('mmcv.cnn.utils.fuse_conv_bn', 'fuse_conv_bn', _is_timm, _leave)
    for module in ('mmcv.cnn.utils.sync_bn', 'mmengine.model.utils'):
        _protect(module, 'revert_sync_batchnorm', lambda norm: isinstance(norm, SyncBatchNormAct), _revert)
    _protect(
        'mmengine.model.utils',
        'convert_sync_batchnorm',
        lambda norm: isinstance(norm, BatchNormAct2d),
        convert_sync_batchnorm,
    )


def _protect(module_name: str, name: str, is_ours: Callable[[nn.Module], bool], instead: Rebuild) -> None:
    """Let a function that calls itself for every child call ``instead`` for those that are ours."""
    try:
        home = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return  # of the other generation
    original = getattr(home, name)
    if hasattr(original, '__wrapped__'):
        return

    @wraps(original)
    def protected(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return instead(module) if is_ours(module) else original(module, *args, **kwargs)

    # The original finds itself by its global name, so children pass here even where the original was imported before.
    setattr(home, name, protected)
    package = module_name
    while '.' in package:
        package = package.rpartition('.')[0]
        if getattr(importlib.import_module(package), name, None) is original:
            setattr(importlib.import_module(package), name, protected)


def _is_timm(module: nn.Module) -> bool:
    return any(kind.__module__.partition('.')[0] in ('timm', 'kw_timm') for kind in type(module).__mro__)


def _leave(module: nn.Module) -> nn.Module:
    warnings.warn(
        f'fuse_conv_bn leaves {type(module).__name__} as it is, since its norms hold activations. To make a KW network '
        f'faster use kw_timm.optimize_for_inference(detector), which folds its norms.',
        stacklevel=3,
    )
    return module


def _revert(module: SyncBatchNormAct) -> nn.Module:
    plain = BatchNormAct2d(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    plain.act, plain.drop = module.act, module.drop
    for name in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
        setattr(plain, name, getattr(module, name))
    return plain.train(module.training)
