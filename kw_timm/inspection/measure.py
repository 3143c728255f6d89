"""What a network's attention does over some images, in numbers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..inference.layers import OptimizedKWLayer
from ..layers import KWAttention, KWLayer, Warehouse
from ..ops.straightforward import assemble_kernels

__all__ = ['UNUSED', 'Inspection', 'LayerFindings', 'WarehouseFindings', 'inspect_network']

# A cell is used by nobody if its largest coefficient is below this part of 1 / n, what each has where all share.
UNUSED = 0.1


@dataclass(frozen=True)
class LayerFindings:
    """What one KW layer does.

    Attributes:
        name: Name of the layer; behind it which call, if a pass through the network calls it several times.
        warehouse: Name of its warehouse.
        mean: Mean coefficients over the images, ``(m, n)``, float32.
        spread: Their standard deviations over the images, ``(m, n)``, float32.
        effective_cells: Of how many cells a mixture consists: the exponential of the entropy of its magnitudes, the
            mean over mixtures and images.
        attention_variation: Spread of the coefficients over the images relative to their size, both root mean squares;
            0 to 1, NaN for a single image.
        kernel_variation: The same of the kernels that they make.
    """

    name: str
    warehouse: str
    mean: torch.Tensor
    spread: torch.Tensor
    effective_cells: float
    attention_variation: float
    kernel_variation: float

    @property
    def mixtures(self) -> int:
        """Number of mixtures, ``m``."""
        return self.mean.shape[0]

    @property
    def cells(self) -> int:
        """Number of cells, ``n``."""
        return self.mean.shape[1]


@dataclass(frozen=True)
class WarehouseFindings:
    """What is used of one warehouse.

    Attributes:
        name: Name of the warehouse.
        layers: Names of the layers that share it, as far as the network calls them.
        cell_shape: ``(co, ci, *window)`` of a cell.
        cell_num_ratio: The budget ``b``.
        largest: Largest magnitude that a cell's coefficients have, over layers, mixtures and images, ``(n,)``, float32.
        unused: Cells for which it is below :data:`UNUSED` / n.
    """

    name: str
    layers: tuple[str, ...]
    cell_shape: tuple[int, ...]
    cell_num_ratio: float
    largest: torch.Tensor
    unused: tuple[int, ...]

    @property
    def cells(self) -> int:
        """Number of cells, ``n``."""
        return len(self.largest)


@dataclass(frozen=True)
class Inspection:
    """What a network's attention does.

    Attributes:
        images: Number of images.
        layers: KW layers, in the order of the network.
        warehouses: Warehouses, in the order of their first layers.
        skipped: KW layers that the network did not call.
    """

    images: int
    layers: tuple[LayerFindings, ...]
    warehouses: tuple[WarehouseFindings, ...]
    skipped: tuple[str, ...] = ()


def inspect_network(model: nn.Module, images: Iterable[torch.Tensor]) -> Inspection:
    """Measure what the attention of a network does over images, at temperature 0 and in eval mode.

    Images go through one after the other, and sums are kept instead of what they are made of: memory does not grow with
    their number. The network is left as it was, in temperature and mode. Where a network makes several kernels for an
    image, windows of an image for instance, each counts.

    Args:
        model: Network with KW layers, in whatever wrapper.
        images: Inputs without the batch axis, ``(C, *spatial)``: a batch, or any iterable; on the network's device.

    Raises:
        ValueError: If the network has no KW layer or calls none, there is no image, or coefficients are not finite.

    Example:
        >>> inspect_network(timm.create_model('kw1x_resnet18'), torch.randn(8, 3, 224, 224)).layers[0].kernel_variation
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KWLayer)}
    if not layers:
        optimized = any(isinstance(module, OptimizedKWLayer) for module in model.modules())
        reason = 'was optimized for inference' if optimized else 'has no KW layer'
        raise ValueError(f'{type(model).__name__} {reason}. Inspect a KW network itself, not compiled or exported.')
    records: dict[tuple[str, int], _Record] = {}
    count = 0
    with _as_used(model), _recording(layers, records) as calls, torch.inference_mode():
        for image in images:
            calls.clear()
            model(image.unsqueeze(0))
            count += 1
    if not count:
        raise ValueError('There is no image to inspect the network with; give at least one.')
    if not records:
        raise ValueError(f'{type(model).__name__} called none of its {len(layers)} KW layers.')
    order = {name: i for i, name in enumerate(layers)}
    records = dict(sorted(records.items(), key=lambda item: (order[item[0][0]], item[0][1])))
    for (name, _), record in records.items():
        if not (record.mean.isfinite().all() and record.squares.isfinite().all()):
            raise ValueError(
                f"The attention of '{name}' gives numbers that are not finite: the weights, or the images, are broken."
            )
    names = _warehouse_names(model, [record.layer for record in records.values()])
    with torch.inference_mode():
        found = tuple(
            record.findings(
                f'{name} (call {call + 1})' if (name, 1) in records else name, names[_warehouse(record.layer)]
            )
            for (name, call), record in records.items()
        )
    skipped = tuple(name for name in layers if (name, 0) not in records)
    return Inspection(count, found, _warehouse_findings(records, found), skipped)


class _Record:
    """Sums over the coefficients that a layer has had."""

    def __init__(self, layer: KWLayer) -> None:
        self.layer, self.count = layer, 0
        size = (layer.attention.num_mixtures, layer.attention.num_cells)
        self.mean, self.squares = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        self.largest = torch.zeros(size[1], dtype=torch.float64)
        self.effective = self.kernel_squares = 0.0

    def add(self, coefficients: torch.Tensor) -> None:
        """Take in one set ``(m, n)``. What does not vary has sums of exactly 0 (Welford's way)."""
        coefficients = coefficients.cpu().double()
        self.count += 1
        change = coefficients - self.mean
        self.mean += change / self.count
        self.squares += change * (coefficients - self.mean)
        if self.count > 1:
            # Kernels are linear in the coefficients, so the same sum needs none of the kernels before.
            self.kernel_squares += (1 - 1 / self.count) * self.kernel_norm(change) ** 2
        magnitudes = coefficients.abs()
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        total = magnitudes.sum(1, keepdim=True)
        entropy = torch.special.entr(magnitudes / total.clamp_min(1e-30)).sum(1)
        self.effective += float((entropy.exp() * (total[:, 0] > 0)).mean())

    def kernel_norm(self, coefficients: torch.Tensor) -> float:
        """Return the norm of the kernel that coefficients make."""
        cells = _warehouse(self.layer)()
        like = dict(device=cells.device, dtype=torch.promote_types(cells.dtype, torch.float32))
        kernel = assemble_kernels(coefficients[None].to(**like), cells, self.layer.spec)
        return float(torch.linalg.vector_norm(kernel, dtype=torch.float64))

    def findings(self, name: str, warehouse: str) -> LayerFindings:
        varies, size = float(self.squares.sum()) / self.count, float(self.mean.square().sum())
        kernel_varies, kernel_size = self.kernel_squares / self.count, self.kernel_norm(self.mean) ** 2
        once = self.count < 2
        return LayerFindings(
            name,
            warehouse,
            self.mean.float(),
            (self.squares / self.count).sqrt().float(),
            self.effective / self.count,
            float('nan') if once else _relative(varies, size),
            float('nan') if once else _relative(kernel_varies, kernel_size),
        )


def _relative(variance: float, mean_square: float) -> float:
    return (variance / (variance + mean_square)) ** 0.5 if variance else 0.0


def _warehouse(layer: Any) -> Warehouse:
    found: Warehouse = layer.__dict__['warehouse']
    return found


@contextmanager
def _as_used(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode and at temperature 0; each module is as before at the end, however it comes."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    attentions = [module for module in modules if isinstance(module, KWAttention)]
    temperatures = [attention.temperature for attention in attentions]
    try:
        model.eval()
        for attention in attentions:
            attention.temperature = 0.0
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for attention, temperature in zip(attentions, temperatures, strict=True):
            attention.temperature = temperature


@contextmanager
def _recording(layers: dict[str, KWLayer], records: dict[tuple[str, int], _Record]) -> Iterator[dict[str, int]]:
    """Record coefficients; gives the number of calls by layer, which is to be cleared before each pass."""
    calls: dict[str, int] = {}

    def hook_of(name: str, layer: KWLayer) -> Any:
        def hook(attention: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            record = records.setdefault((name, call), _Record(layer))
            for coefficients in output:
                record.add(coefficients)

        return hook

    handles = [layer.attention.register_forward_hook(hook_of(name, layer)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _warehouse_names(model: nn.Module, layers: list[KWLayer]) -> dict[Warehouse, str]:
    """Return short names of warehouses, or where two of one name meet, whole ones."""
    used = {_warehouse(layer) for layer in layers}
    whole = {module: name for name, module in model.named_modules() if module in used}
    short = {module: name.rpartition('warehouses.')[2] for module, name in whole.items()}
    return short if len(set(short.values())) == len(short) else whole


def _warehouse_findings(
    records: dict[tuple[str, int], _Record], found: tuple[LayerFindings, ...]
) -> tuple[WarehouseFindings, ...]:
    shared: dict[str, list[tuple[LayerFindings, _Record]]] = {}
    for findings, record in zip(found, records.values(), strict=True):
        shared.setdefault(findings.warehouse, []).append((findings, record))
    result = []
    for name, users in shared.items():
        largest = torch.stack([record.largest for _, record in users]).amax(0)
        unused = tuple((largest < UNUSED / len(largest)).nonzero()[:, 0].tolist())
        layers, partition = tuple(findings.name for findings, _ in users), _warehouse(users[0][1].layer).partition
        result.append(
            WarehouseFindings(name, layers, partition.cell_shape, partition.cell_num_ratio, largest.float(), unused)
        )
    return tuple(result)
