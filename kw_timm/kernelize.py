"""Turn layers of an existing network into KernelWarehouse layers, from a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import Conv2dSame
from torch import nn

from .layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, Warehouse
from .layers.attention import NormLayer

__all__ = ['WarehousePlan', 'drop_unused_warehouses', 'kernelize']

_CONVS: dict[type[nn.Module], type[KWLayer]] = {
    nn.Conv1d: KWConv1d,
    nn.Conv2d: KWConv2d,
    nn.Conv3d: KWConv3d,
    Conv2dSame: KWConv2d,
}


class _Warehouses(nn.ModuleDict):
    """Warehouses by name; passes its input on, because an ``nn.Sequential`` calls everything it holds."""

    def forward(self, x: Any) -> Any:
        return x


@dataclass(frozen=True)
class WarehousePlan:
    """One warehouse: the layers that share it, and its ratios.

    Attributes:
        layers: Names of the layers, as ``named_modules`` gives them; their order does not matter.
        cell_num_ratio: Cells per mixture, the budget ``b``.
        cell_inplane_ratio: Cell input channels relative to the layers' greatest common divisor.
        cell_outplane_ratio: Cell output channels relative to the layers' greatest common divisor.
        reduction: Hidden width of the attention relative to a layer's input channels.
        nonlocal_basis_ratio: Below 1, cells of other layers are reached through a basis of this relative size.
        spatial_partition: Cut spatial positions apart (cells are 1x1).
    """

    layers: Sequence[str]
    cell_num_ratio: float = 1.0
    cell_inplane_ratio: float = 1.0
    cell_outplane_ratio: float = 1.0
    reduction: float = 1 / 16
    nonlocal_basis_ratio: float = 1.0
    spatial_partition: bool = True


def kernelize(
    model: nn.Module, plan: Mapping[str, WarehousePlan], norm_layer: NormLayer = nn.BatchNorm1d
) -> nn.ModuleDict:
    """Replace planned layers of a network by KW layers, in place, and allocate their warehouses.

    The warehouses become the network's ``warehouses`` (an ``nn.ModuleDict`` in the plan's order; those already there
    stay). A KW layer keeps stride, padding, dilation, groups and the presence of a bias; its weights are new.

    Args:
        model: Network with ``nn.Conv1d/2d/3d`` and ``nn.Linear`` layers.
        plan: Warehouse name -> layers and ratios.
        norm_layer: Norm within the attention: ``nn.BatchNorm1d`` (with a bias-free first linear layer) or
            ``nn.LayerNorm``.

    Returns:
        The network's warehouses.

    Raises:
        ValueError: If the plan names a layer that is missing, of another type, planned twice or otherwise
            unsuitable, or if a warehouse cannot be partitioned. The network is then unchanged.

    Example:
        >>> model = timm.create_model('resnet18')
        >>> kernelize(model, {'last': WarehousePlan(['layer4.1.conv1', 'layer4.1.conv2'])})
    """
    modules = dict(model.named_modules())
    order = {name: i for i, name in enumerate(modules)}
    registered = getattr(model, 'warehouses', None)
    _check_plan(plan, modules, registered)

    made: dict[str, Warehouse] = {}
    replacements: dict[str, KWLayer] = {}
    for name, entry in plan.items():
        layers = sorted(entry.layers, key=order.__getitem__)
        first = next(modules[layers[0]].parameters())
        factory: dict[str, Any] = {'device': first.device, 'dtype': first.dtype}
        try:
            made[name] = Warehouse(
                [_kernel_shape(modules[layer]) for layer in layers],
                entry.cell_num_ratio,
                entry.cell_inplane_ratio,
                entry.cell_outplane_ratio,
                entry.spatial_partition,
                **factory,
            )
            for i, layer in enumerate(layers):
                replacements[layer] = _kw_layer(modules[layer], made[name], i, entry, norm_layer, factory)
        except ValueError as error:
            raise ValueError(f"Warehouse '{name}' of layers {', '.join(layers)}: {error}") from error

    try:
        added = _Warehouses(made)
    except KeyError as error:
        raise ValueError(f'The plan has an unusable warehouse name: {error.args[0]}.') from error
    added.train(model.training)
    if registered is None:
        registered = _register_first(model, added)
    else:
        registered.update(added)
    for layer, replacement in replacements.items():
        replacement.train(modules[layer].training)
        parent, _, child = layer.rpartition('.')
        setattr(modules[parent], child, replacement)
    return registered


def _register_first(model: nn.Module, warehouses: nn.ModuleDict) -> nn.ModuleDict:
    """Make warehouses a network's first child, so that ``children()[:-k]`` leaves out what it always left out."""
    model.warehouses = warehouses
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return warehouses  # Whose children are numbered.
    for name in [name for name in model._modules if name != 'warehouses']:
        model._modules[name] = model._modules.pop(name)
    return warehouses


def drop_unused_warehouses(model: nn.Module) -> list[str]:
    """Remove the warehouses that no remaining layer of the network refers to, after layers were pruned.

    Args:
        model: A kernelized network.

    Returns:
        Names of the removed warehouses.
    """
    used = {id(module.__dict__['warehouse']) for module in model.modules() if isinstance(module, KWLayer)}
    registered: nn.ModuleDict = model.warehouses  # type: ignore[assignment]
    unused = [name for name, warehouse in registered.items() if id(warehouse) not in used]
    for name in unused:
        del registered[name]
    return unused


def _check_plan(
    plan: Mapping[str, WarehousePlan], modules: Mapping[str, nn.Module], registered: nn.ModuleDict | None
) -> None:
    planned: dict[str, str] = {}
    for name, entry in plan.items():
        if registered is not None and name in registered:
            raise ValueError(f"The network already has a warehouse '{name}'; choose another name.")
        if not entry.layers:
            raise ValueError(f"Warehouse '{name}' has no layers.")
        for layer in entry.layers:
            if layer not in modules or not layer:
                raise ValueError(f"Warehouse '{name}' plans the layer '{layer}', which the network does not have.")
            if layer in planned:
                raise ValueError(f"The layer '{layer}' is planned twice: in '{planned[layer]}' and in '{name}'.")
            planned[layer] = name
            module = modules[layer]
            if type(module) not in _CONVS and not isinstance(module, nn.Linear):
                raise ValueError(
                    f"Warehouse '{name}' plans the layer '{layer}', but {type(module).__name__} has no KW counterpart. "
                    f'Plan nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Linear layers.'
                )


def _kernel_shape(module: Any) -> tuple[int, ...]:
    shape = tuple(module.weight.shape)
    return (*shape, 1) if isinstance(module, nn.Linear) else shape


def _kw_layer(
    module: Any,
    warehouse: Warehouse,
    index: int,
    entry: WarehousePlan,
    norm_layer: NormLayer,
    factory: dict[str, Any],
) -> KWLayer:
    shared: dict[str, Any] = dict(
        bias=module.bias is not None,
        warehouse=warehouse,
        index=index,
        reduction=entry.reduction,
        nonlocal_basis_ratio=entry.nonlocal_basis_ratio,
        norm_layer=norm_layer,
        **factory,
    )
    if isinstance(module, nn.Linear):
        return KWLinear(module.in_features, module.out_features, **shared)
    if module.padding_mode != 'zeros':
        raise ValueError(f"padding_mode='{module.padding_mode}' is not supported, only 'zeros'.")
    padding = module.padding
    if isinstance(module, Conv2dSame):
        # Pads by input size in its own forward; only at stride 1 is that a padding known beforehand.
        if any(stride != 1 for stride in module.stride):
            raise ValueError('Conv2dSame pads by input size, which is supported at stride 1 only.')
        padding = 'same'
    return _CONVS[type(module)](
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        padding,
        module.dilation,
        module.groups,
        **shared,
    )
