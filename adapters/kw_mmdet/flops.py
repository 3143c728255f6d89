"""KW layers in the table of ``mmcv.cnn.get_model_complexity_info``, which counts by the types of modules."""

from typing import Any

from torch import nn

from kw_timm import flop_hooks
from kw_timm.layers.norms import AttentionBatchNorm

__all__ = ['count_kw_layers']


def count_kw_layers() -> None:
    """Let mmcv's counter know KW layers. Importing ``kw_mmdet`` does it; a second time changes nothing."""
    try:
        from mmcv.cnn.utils import flops_counter
    except ImportError:  # Not in every mmcv; mmengine's counter traces the network and needs no help.
        return
    known = flops_counter.get_modules_mapping
    if hasattr(known, 'kw_layers'):
        return

    def get_modules_mapping() -> dict[type[nn.Module], Any]:
        mapping = known()
        return mapping | flop_hooks() | {AttentionBatchNorm: mapping[nn.BatchNorm1d]}

    get_modules_mapping.kw_layers = True  # type: ignore[attr-defined]
    flops_counter.get_modules_mapping = get_modules_mapping
