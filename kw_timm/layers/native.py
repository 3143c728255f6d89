"""The compiled module of ``kw_timm/csrc``, None where the package was installed without a compiler."""

from types import ModuleType

module: ModuleType | None
try:
    from .. import _mixing as module
except ImportError:
    module = None
