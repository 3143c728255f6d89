"""Making a KW network as fast as it can be for inference, within a memory budget."""

import copy
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from ..layers import KWLayer, Warehouse
from .folding import norms_behind
from .layers import CellStore, MixingWork, OptimizedKWLayer, bases_bytes

__all__ = ['MixingWork', 'OptimizationReport', 'mixing_work', 'optimization_report', 'optimize_for_inference']

DEFAULT_BUDGET = '2GB'
_UNITS = {'': 1, 'k': 1000, 'm': 1000**2, 'g': 1000**3, 't': 1000**4}


@dataclass
class OptimizationReport:
    """What :func:`optimize_for_inference` did.

    Attributes:
        batch_size: Batch size it was done for.
        memory_budget: Bytes that bases may take.
        bases_bytes: Bytes that they take.
        cells_bytes: Bytes of the cells that are still needed.
        from_bases: Layers whose kernels are made from bases.
        from_cells: Layers whose kernels are made from cells.
        folded_norms: Norms that were multiplied into the layer before them.
        work: Cost of making the kernels of a batch.
        work_before: What it cost before.
        storage: How cells and bases are stored.
        storage_error: Largest relative error of a warehouse's cells or a layer's bases, in the Frobenius norm, that
            storing them so causes; 0 where nothing was rounded.
    """

    batch_size: int
    memory_budget: int
    bases_bytes: int = 0
    cells_bytes: int = 0
    from_bases: list[str] = field(default_factory=list)
    from_cells: list[str] = field(default_factory=list)
    folded_norms: list[str] = field(default_factory=list)
    work: MixingWork = field(default_factory=lambda: MixingWork(0, 0))
    work_before: MixingWork = field(default_factory=lambda: MixingWork(0, 0))
    storage: torch.dtype | None = None
    storage_error: float = 0.0

    def __str__(self) -> str:
        lines = [
            f'{len(self.from_bases) + len(self.from_cells)} KW layers for batches of {self.batch_size}: '
            f'{len(self.from_bases)} from precomputed bases ({_gigabytes(self.bases_bytes)} of at most '
            f'{_gigabytes(self.memory_budget)}), {len(self.from_cells)} from cells ({_gigabytes(self.cells_bytes)}); '
            f'{len(self.folded_norms)} norms folded',
            f'kernels of a batch: {self.work.flops / 1e9:.2f} GFLOP instead of {self.work_before.flops / 1e9:.2f}, '
            f'{_gigabytes(self.work.bytes)} read instead of {_gigabytes(self.work_before.bytes)}',
        ]
        if self.storage is not None:
            lines.append(f'stored as {self.storage}: relative error up to {self.storage_error:.1e}')
        return '\n'.join(lines)


def optimize_for_inference(
    model: nn.Module,
    *,
    batch_size: int = 1,
    memory_budget: int | str | None = None,
    storage: torch.dtype | None = None,
) -> nn.Module:
    """Return a copy of a network that computes the same faster, for inference only.

    The attention of every KW layer becomes two matrices (its BatchNorm and a non-local basis multiplied in), and a
    BatchNorm behind a KW layer of a timm block becomes part of the layer. Layers for which it pays at this batch size
    get *bases*: the product of the second matrix with the cells, of which fewer have to be read and mixed per image.
    Outputs are those of the network in eval mode, up to rounding.

    Args:
        model: Network with KW layers, in whatever wrapper: a timm model, its feature extractor, a detector. It is not
            changed; the copy does not share its memory.
        batch_size: Batch size to be fast at; every other one works too.
        memory_budget: Bytes that bases may take, as a number or such as ``'500MB'``; 2 GB by default, 0 for none.
        storage: Store cells and bases in fewer bits: ``torch.bfloat16`` or ``torch.int8`` (one scale per cell). They
            are widened as they are read, so reading takes half or a quarter of the time, and outputs are approximate:
            the report has the error of what is stored. For float32 networks.

    Returns:
        The copy, in eval mode; it has no gradients. Hooks on KW layers and on folded norms are not copied.
        :func:`optimization_report` says what was done.

    Raises:
        ValueError: If the network has no KW layer or was optimized before, or an argument is unusable.

    Example:
        >>> model = timm.create_model('kw4x_resnet50', pretrained=True).eval()
        >>> fast = kw_timm.optimize_for_inference(model)
        >>> print(kw_timm.optimization_report(fast))
    """
    report = OptimizationReport(_positive(batch_size), parse_bytes(memory_budget), storage=storage)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KWLayer)}
    if not layers:
        optimized = any(isinstance(module, OptimizedKWLayer) for module in model.modules())
        reason = 'was optimized before' if optimized else 'has no KW layer'
        raise ValueError(f'{type(model).__name__} {reason}. Pass the KW network itself, not compiled or exported.')
    if storage not in (None, torch.bfloat16, torch.int8):
        raise ValueError(f'storage={storage} is not supported. Use torch.bfloat16, torch.int8 or None.')
    if storage is not None and any(
        layer.__dict__['warehouse'].weight.dtype != torch.float32 for layer in layers.values()
    ):
        raise ValueError(f'storage={storage} is for float32 networks; call model.float() first.')
    with torch.no_grad():
        result = _copy_with(model, _build(model, layers, _plan(layers, report), report))
    result._kw_report = report  # type: ignore[assignment]
    return result


def optimization_report(model: nn.Module) -> OptimizationReport:
    """Return what was done to a network that :func:`optimize_for_inference` returned.

    Raises:
        ValueError: If the network is another.
    """
    report = getattr(model, '_kw_report', None)
    if report is None:
        raise ValueError(f'{type(model).__name__} does not come from optimize_for_inference.')
    return report


def mixing_work(model: nn.Module, batch_size: int) -> MixingWork:
    """Return what making the kernels of a batch costs a network, by the contractions that it uses.

    Args:
        model: A network with KW layers, optimized or not.
        batch_size: Samples in the batch.

    Raises:
        ValueError: If the network has no KW layer.
    """
    layers = [module for module in model.modules() if isinstance(module, KWLayer | OptimizedKWLayer)]
    if not layers:
        raise ValueError(f'{type(model).__name__} has no KW layer, so there is nothing to mix.')
    return sum((_work_now(layer, batch_size) for layer in layers), MixingWork(0, 0))


def parse_bytes(size: int | str | None) -> int:
    """Return a memory size in bytes.

    Args:
        size: A number of bytes, a string such as ``'1.5GB'`` or ``'200 MB'`` (powers of 1000), or None for the default.

    Raises:
        ValueError: If it is neither.
    """
    match = re.fullmatch(
        r'\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(?:i?b)?\s*', str(DEFAULT_BUDGET if size is None else size).lower()
    )
    if match is None:
        raise ValueError(f"memory_budget={size!r} is not a memory size. Use a number of bytes or such as '2GB'.")
    return int(float(match[1]) * _UNITS[match[2]])


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size!r}.')
    return batch_size


def _gigabytes(size: float) -> str:
    return f'{size / 1e9:.2f} GB'


def _work(layer: KWLayer | OptimizedKWLayer, batch_size: int, bases: int = 0) -> MixingWork:
    """Cost of a layer's kernels; with ``bases``, of that many bytes of bases."""
    if isinstance(layer, OptimizedKWLayer):
        return layer.work(batch_size)
    cells = layer.__dict__['warehouse'].weight
    attention = layer.attention
    if bases:
        terms, read = attention.fc2.in_features + 1, float(bases)
    else:
        terms, read = attention.num_cells, float(cells.nbytes)
    return MixingWork.of(batch_size, attention.num_mixtures, terms, cells[0].numel(), read)


def _work_now(layer: KWLayer | OptimizedKWLayer, batch_size: int) -> MixingWork:
    """Cost of a layer's kernels by the contraction that it takes for a batch."""
    if isinstance(layer, OptimizedKWLayer) or not layer.uses_bases(batch_size):
        return _work(layer, batch_size)
    attention, cells = layer.attention, layer.__dict__['warehouse'].weight
    made = attention.num_mixtures * attention.num_terms * cells[0].numel()  # Bases, written once and read once.
    return MixingWork(2.0 * made * (attention.num_cells + batch_size), cells.nbytes + 2.0 * made * cells.element_size())


def _plan(layers: dict[str, KWLayer], report: OptimizationReport) -> set[str]:
    """Choose the layers that get bases, those first that gain most per byte."""
    gains: list[tuple[float, str, int]] = []
    for name, layer in layers.items():
        size = bases_bytes(layer, report.storage)
        cells = _work(layer, report.batch_size)
        if report.storage is not None:
            cells = MixingWork(cells.flops, cells.bytes * report.storage.itemsize / 4)
        gain = cells.cost - _work(layer, report.batch_size, size).cost
        if gain > 0 and layer.attention.temperature == 0:
            gains.append((gain / size, name, size))
    chosen: set[str] = set()
    left = report.memory_budget
    for _, name, size in sorted(gains, reverse=True):
        if size <= left:
            chosen.add(name)
            left -= size
    return chosen


def _build(
    model: nn.Module, layers: dict[str, KWLayer], planned: set[str], report: OptimizationReport
) -> dict[str, nn.Module]:
    """Make the replacements of layers and warehouses, by name."""
    stores: dict[int, CellStore] = {}
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, Warehouse)}
    made: dict[str, nn.Module] = {}
    norms = norms_behind(model, layers)
    for name, layer in layers.items():
        warehouse = layer.__dict__['warehouse']
        if name not in planned and id(warehouse) not in stores:
            store = stores[id(warehouse)] = CellStore(warehouse.weight, report.storage)
            made[names[id(warehouse)]] = store
            report.cells_bytes += store.cells.nbytes
            report.storage_error = max(report.storage_error, store.error)
    for name, layer in layers.items():
        store_or_none = stores.get(id(layer.__dict__['warehouse']))
        norm = norms.get(name)
        new = OptimizedKWLayer(
            layer, store_or_none, name in planned, norm.module if norm is not None else None, report.storage
        )
        made[name] = new
        if norm is not None:
            made[norm.name] = norm.rest
            report.folded_norms.append(norm.name)
        report.bases_bytes += 0 if new.bases is None else new.bases.nbytes
        report.storage_error = max(report.storage_error, new.error)
        (report.from_bases if name in planned else report.from_cells).append(name)
        report.work += new.work(report.batch_size)
        report.work_before += _work(layer, report.batch_size)
    return made


def _copy_with(model: nn.Module, made: dict[str, nn.Module]) -> nn.Module:
    """Copy a network with other modules in the places of some; warehouses that got no other are left out."""
    memo: dict[int, object] = {}
    unused: list[str] = []
    # Layers of a part of a network bring their warehouse along, which is then no module's child.
    brought = {f'{name}.{m.shares}'.lstrip('.') for name, m in model.named_modules() if isinstance(m, KWLayer)}
    for name, module in model.named_modules():
        if name in made:
            memo[id(module)] = made[name]
        elif isinstance(module, Warehouse):
            memo[id(module)] = nn.Identity()
            if name not in brought:
                unused.append(name)
    result = copy.deepcopy(model, memo).eval()
    for name in unused:
        parent, _, child = name.rpartition('.')
        delattr(result.get_submodule(parent), child)
    return result.requires_grad_(False)
