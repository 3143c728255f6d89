"""Turn layers of an existing network into KernelWarehouse layers, from a plan."""

from collections.abc import Mapping
from typing import Any

from timm.layers import Conv2dSame
from torch import nn

from .layers import KWLayer, KWLinear, Warehouse
from .layers.annealing import PASSES
from .layers.attention import NormLayer, make_basis
from .layers.norms import AttentionBatchNorm
from .layers.partition import partition_kernels
from .layers.start import check_init
from .plans import WarehousePlan, check_sizes, kernel_shape, naming, plan_sizes
from .recording import recorded
from .replaceable import check_replaceable, counterpart
from .takeover import FREE, WEIGHTS, kernel_std, take_over

__all__ = ['WarehousePlan', 'drop_unused_warehouses', 'kernelize']


class _Warehouses(nn.ModuleDict):
    """Warehouses by name; passes its input on, because an ``nn.Sequential`` calls everything it holds.

    Attributes:
        errors: By layer how far its kernel was from the static one when it began, relative, with ``weights='keep'``.
    """

    errors: dict[str, float]

    def forward(self, x: Any) -> Any:
        return x

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Weights of a network that counted its training passes fit one that does not.
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        unexpected_keys.extend(key for key in unexpected if key != prefix + PASSES)


@recorded
def kernelize(
    model: nn.Module,
    plan: Mapping[str, WarehousePlan],
    norm_layer: NormLayer = nn.BatchNorm1d,
    *,
    weights: str = 'new',
    init: str = 'live',
    free: str = 'random',
    max_weights: float | None = None,
) -> nn.ModuleDict:
    """Replace planned layers of a network by KW layers, in place, and allocate their warehouses.

    The warehouses become the network's ``warehouses`` (an ``nn.ModuleDict`` in the plan's order; those already there
    stay). A KW layer keeps stride, padding, dilation, groups and bias. Unless the initialization is the published one
    it begins with the weights that the static layer has, those that the network's own initialization drew or trained
    ones: at ``b >= 1`` each kernel is the static one and varies with the image a little.

    Args:
        model: Network with ``nn.Conv1d/2d/3d`` and ``nn.Linear`` layers.
        plan: Warehouse name -> layers and ratios.
        norm_layer: Norm within the attention: ``nn.BatchNorm1d`` (with a bias-free first linear layer) or
            ``nn.LayerNorm``.
        weights: ``'new'``; or ``'keep'`` for exactly the outputs of before, at temperature 0, in training and in
            evaluation mode, from where attention and cells learn. At ``b < 1`` there are too few cells for that: then
            the kernels are the nearest in the sense of least squares, and ``warehouses.errors`` says by layer how near.
        init: With new weights ``'live'``, or ``'published'`` for the paper's ImageNet recipes, which need the
            temperature annealed; see :mod:`kw_timm.layers.start`.
        free: With kept weights and ``b > 1``, what cells begin as that no mixture needs yet: ``'random'``,
            ``'copies'``, ``'residuals'`` or ``'zeros'``; outputs are the same. See :func:`~kw_timm.takeover.take_over`.
        max_weights: Most weights that the plan may make, in cells and attentions; None for 20 times those of the
            kernels that are replaced (at least 10 million), ``math.inf`` for any number.
            :func:`~kw_timm.plan_sizes` shows what a plan makes.

    Returns:
        The network's warehouses.

    Raises:
        ValueError: If the plan names a layer that is missing, of another type or planned twice; one whose weight is
            tied, parametrized, pruned, or read by the module above it instead of the layer being called; one with
            hooks; if a warehouse cannot be partitioned; if the plan makes too many weights; or if ``weights``,
            ``init`` or ``free`` is unknown. Nothing is allocated, and the network is unchanged.

    Example:
        >>> model = timm.create_model('resnet18')
        >>> kernelize(model, {'last': WarehousePlan(['layer4.1.conv1', 'layer4.1.conv2'])})
    """
    _check_start(weights, init, free)
    modules = dict(model.named_modules())
    order = {name: i for i, name in enumerate(modules)}
    registered = getattr(model, 'warehouses', None)
    _check_plan(model, plan, modules, registered)

    check_sizes(plan_sizes(model, plan, norm_layer), max_weights)
    _check_cells(plan, modules, order)
    added, replacements = _make(plan, modules, order, norm_layer, weights, init, free)
    added.train(model.training)
    if registered is None:
        registered = _register_first(model, added)
    else:
        registered.update(added)
        registered.errors = {**getattr(registered, 'errors', {}), **added.errors}
    for layer, replacement in replacements.items():
        replacement.train(modules[layer].training)
        if isinstance(replacement.attention.norm1, AttentionBatchNorm):
            replacement.attention.norm1.layer = layer
        parent, _, child = layer.rpartition('.')
        setattr(modules[parent], child, replacement)
    return registered


def _check_cells(plan: Mapping[str, WarehousePlan], modules: Mapping[str, nn.Module], order: Mapping[str, int]) -> None:
    """Raise ValueError for warehouses that cannot be made, which would show when others are made already."""
    for name, entry in plan.items():
        layers = sorted(entry.layers, key=order.__getitem__)
        with naming(name, layers):
            partition = partition_kernels([kernel_shape(modules[layer]) for layer in layers], *entry.ratios)
            for share in partition.layers:
                make_basis(share, partition, entry.nonlocal_basis_ratio)
    try:
        _Warehouses(dict.fromkeys(plan, nn.Identity()))
    except KeyError as error:
        raise ValueError(f'The plan has an unusable warehouse name: {error.args[0]}.') from error


def _make(
    plan: Mapping[str, WarehousePlan],
    modules: Mapping[str, nn.Module],
    order: Mapping[str, int],
    norm_layer: NormLayer,
    weights: str,
    init: str,
    free: str,
) -> tuple['_Warehouses', dict[str, KWLayer]]:
    """Make warehouses and layers, on the device of what they replace."""
    made: dict[str, Warehouse] = {}
    replacements: dict[str, KWLayer] = {}
    errors: dict[str, float] = {}
    for name, entry in plan.items():
        layers = sorted(entry.layers, key=order.__getitem__)
        first = next(modules[layers[0]].parameters())
        factory: dict[str, Any] = {'device': first.device, 'dtype': first.dtype}
        shapes = [kernel_shape(modules[layer]) for layer in layers]
        stds = [kernel_std(modules[layer]) for layer in layers] if init != 'published' else []
        with naming(name, layers):
            made[name] = Warehouse(shapes, *entry.ratios, init, stds, **factory)
            for i, layer in enumerate(layers):
                replacements[layer] = _kw_layer(modules[layer], made[name], i, entry, norm_layer, factory)
        if init != 'published':
            taken = {layer: (replacements[layer], modules[layer]) for layer in layers}
            errors |= take_over(made[name], taken, weights, free)
    warehouses = _Warehouses(made)
    warehouses.errors = errors
    return warehouses, replacements


def _check_start(weights: str, init: str, free: str) -> None:
    check_init(init)
    if free not in FREE:
        raise ValueError(f'free must be one of {", ".join(map(repr, FREE))}, got {free!r}.')
    if weights not in WEIGHTS:
        raise ValueError(
            f"weights must be 'new' (the default) or 'keep' (what the layers have learnt), got {weights!r}."
        )
    if weights == 'keep' and init == 'published':
        raise ValueError("weights='keep' starts from the layers' weights, and init='published' from random ones.")


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
    model: nn.Module,
    plan: Mapping[str, WarehousePlan],
    modules: Mapping[str, nn.Module],
    registered: nn.ModuleDict | None,
) -> None:
    planned: dict[str, str] = {}
    for name, entry in plan.items():
        if registered is not None and name in registered:
            raise ValueError(f"The network already has a warehouse '{name}'; choose another name.")
        if not isinstance(entry, WarehousePlan):
            raise ValueError(f"Warehouse '{name}' needs a WarehousePlan(layers, ...), got {type(entry).__name__}.")
        if isinstance(entry.layers, str):
            raise ValueError(f"Warehouse '{name}' needs a list of layers, got the string '{entry.layers}'.")
        if not entry.layers:
            raise ValueError(f"Warehouse '{name}' has no layers.")
        for layer in entry.layers:
            if layer not in modules or not layer:
                raise ValueError(f"Warehouse '{name}' plans the layer '{layer}', which the network does not have.")
            if layer in planned:
                raise ValueError(f"The layer '{layer}' is planned twice: in '{planned[layer]}' and in '{name}'.")
            planned[layer] = name
    check_replaceable(model, planned)


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
    found = counterpart(module)
    assert found is not None
    return found[1](
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        'same' if isinstance(module, Conv2dSame) else module.padding,
        module.dilation,
        module.groups,
        **shared,
    )
