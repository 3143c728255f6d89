"""Looking inside a network, whether its attention does anything: ``kw-timm inspect``."""

from .measure import Inspection, LayerFindings, WarehouseFindings, inspect_network
from .text import verdict

__all__ = ['Inspection', 'LayerFindings', 'WarehouseFindings', 'inspect_network', 'verdict']
