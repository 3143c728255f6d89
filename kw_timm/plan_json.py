"""Plans as plain data, for configs and JSON files."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .plans import WarehousePlan

__all__ = ['plan_from_json', 'plan_to_json']

_DEFAULTS = {field.name: field.default for field in fields(WarehousePlan) if field.name != 'layers'}


def plan_to_json(plan: Mapping[str, WarehousePlan]) -> dict[str, dict[str, Any]]:
    """Return a plan as dicts, lists, strings and numbers; ratios that are the defaults are left out.

    Args:
        plan: Warehouse name -> layers and ratios.

    Example:
        >>> json.dumps(plan_to_json({'last': WarehousePlan(['layer4.1.conv1'], cell_num_ratio=4)}))
        '{"last": {"layers": ["layer4.1.conv1"], "cell_num_ratio": 4}}'
    """
    return {
        name: {'layers': list(entry.layers)}
        | {key: getattr(entry, key) for key, default in _DEFAULTS.items() if getattr(entry, key) != default}
        for name, entry in plan.items()
    }


def plan_from_json(data: Any) -> dict[str, WarehousePlan]:
    """Return the plan that :func:`plan_to_json` wrote.

    Args:
        data: Warehouse name -> ``{'layers': [...], ratio: number, ...}``. Entries that are plans already stay.

    Raises:
        ValueError: If there is something else; the message names the warehouse and what is wrong there.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"A plan must be a dict {{warehouse: {{'layers': [...]}}}}, got {type(data).__name__}.")
    return {_name(name): _entry(name, entry) for name, entry in data.items()}


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f'Warehouses of a plan are named by strings that are not empty, got {name!r}.')
    return name


def _entry(name: str, data: Any) -> WarehousePlan:
    if isinstance(data, WarehousePlan):
        return data
    where = f"The plan's warehouse '{name}'"
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a dict with 'layers', got {type(data).__name__}.")
    unknown = [str(key) for key in data if key != 'layers' and key not in _DEFAULTS]
    if unknown:
        raise ValueError(f'{where} has unknown entries {", ".join(unknown)}; known are layers, {", ".join(_DEFAULTS)}.')
    layers = data.get('layers')
    if not isinstance(layers, list | tuple) or not layers or not all(isinstance(x, str) and x for x in layers):
        raise ValueError(f"{where} needs 'layers', a list of one or more names of layers, got {layers!r:.80}.")
    for key, value in data.items():
        if key == 'spatial_partition':
            if not isinstance(value, bool):
                raise ValueError(f"{where} needs true or false as '{key}', got {value!r:.80}.")
        elif key != 'layers' and not (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
        ):
            raise ValueError(f"{where} needs a positive number as '{key}', got {value!r:.80}.")
    return WarehousePlan(**{**data, 'layers': list(layers)})
