"""What differs between MMDetection's generations. So far 2.x (mmcv-full 1.x) is served."""

try:
    from mmcv.runner import HOOKS, BaseModule, DefaultOptimizerConstructor, Hook
    from mmcv.runner.optimizer import OPTIMIZER_BUILDERS
    from mmdet.models.builder import BACKBONES
except ImportError as error:
    raise ImportError(
        f'kw_mmdet needs MMDetection 2.28 with compiled mmcv-full 1.7 ({error}). '
        f'Run: python tools/install_mmcv.py && pip install mmdet==2.28.2'
    ) from error

__all__ = ['BACKBONES', 'HOOKS', 'OPTIMIZER_BUILDERS', 'BaseModule', 'DefaultOptimizerConstructor', 'Hook']
