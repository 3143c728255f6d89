"""What weights need to know of a network. Those of :mod:`kw_timm.models` are such; nothing here imports them."""

from typing import Any, Protocol

from torch import nn

__all__ = ['KWModel']


class KWModel(Protocol):
    """A network with warehouses whose reference weight files are known.

    Attributes:
        family: Name of the key table for the reference's weight files, see :mod:`kw_timm.weights.key_tables`.
        warehouses: The cells, by name, in the order of the reference's weight files.
    """

    family: str
    warehouses: nn.ModuleDict

    def state_dict(self) -> dict[str, Any]:
        """Return the weights."""
        ...
