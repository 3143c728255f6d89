"""What differs between MMDetection's generations, under one set of names.

:mod:`.mmdet2` serves MMDetection 2.28 with mmcv 1.7, :mod:`.mmdet3` MMDetection 3.x with mmcv 2 and mmengine. Both
define the same names; which of them is in use is decided here, once. Nothing else in this package asks.
"""

import mmdet
import torch

from kw_timm.weights.unpickle import allowed_globals

GENERATION = int(mmdet.__version__.partition('.')[0])

if GENERATION == 2:
    from .mmdet2 import *  # noqa: F403
    from .mmdet2_bridges import apply as apply_bridges
else:
    from .mmdet3 import *  # noqa: F403
    from .mmdet3_bridges import apply as apply_bridges  # noqa: F401


def trust_checkpoints() -> None:
    """Let ``torch.load`` read what the framework itself writes into checkpoints; importing ``kw_mmdet`` runs it.

    torch refuses by default all but tensors and plain containers; checkpoints hold numpy values too, and mmengine's
    hold the history of its logs. These go on torch's allow-list. Everything else is still refused.
    """
    torch.serialization.add_safe_globals(allowed_globals())
