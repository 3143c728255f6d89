"""KW networks at fixed weights: folded attention and norms, precomputed bases, cells stored in fewer bits."""

from .layers import MixingWork
from .optimize import (
    OptimizationReport,
    mixing_work,
    optimization_report,
    optimize_for_inference,
    parse_bytes,
)

__all__ = [
    'MixingWork',
    'OptimizationReport',
    'mixing_work',
    'optimization_report',
    'optimize_for_inference',
    'parse_bytes',
]
