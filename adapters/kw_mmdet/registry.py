"""The scope ``kw_mmdet`` of mmengine's registries: everything of MMDetection 3.x.

A config that inherits by ``_base_ = 'kw_mmdet::...'`` has this scope, and mmengine imports this module to look there.
"""

import mmdet.registry
from mmengine.registry import Registry

# mmengine finds a scope by its registries, not by the names that they have here.
_CHILDREN = [
    Registry(registry.name, parent=registry, scope='kw_mmdet', locations=registry._locations or ['mmdet'])
    for registry in vars(mmdet.registry).values()
    if isinstance(registry, Registry)
]
