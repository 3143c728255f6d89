"""Contrasting-driven attention: from a layer's input to the coefficients of its mixtures."""

from collections.abc import Callable

import torch
import torch.fx
from torch import nn

from ..ops.modes import is_recording
from .annealing import Annealing
from .norms import as_attention_norm, normalize
from .partition import LayerPartition, Partition
from .start import ALIVE, check_init, inertia, start_codes

__all__ = ['KWAttention', 'NonLocalBasis', 'as_maps', 'basis_size', 'hidden_width', 'make_basis', 'sum_of_magnitudes']

NormLayer = Callable[..., nn.Module]

# One node each in an fx graph: their checks are run, not traced.
torch.fx.wrap('pool')
torch.fx.wrap('sum_of_magnitudes')


def pool(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the mean ``(B, C)`` over the positions of ``x: (B, C, *spatial)``.

    Raises:
        ValueError: If the input has not ``channels`` channels on its second axis.
    """
    if x.dim() < 3 or (not is_recording() and x.shape[1] != channels):
        raise ValueError(
            f'Expected a batched input (B, {channels}, *spatial), got shape {tuple(x.shape)}. '
            f'Add a missing batch axis with x.unsqueeze(0): the kernels are computed per sample.'
        )
    return x.mean(tuple(range(2, x.dim())))


def sum_of_magnitudes(logits: torch.Tensor) -> torch.Tensor:
    """Return the sums of magnitudes ``(B, m, 1)``, of 16-bit numbers in float32: in float16 they would overflow."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits.abs().sum(-1, keepdim=True)


def as_maps(slopes: torch.Tensor, origin: torch.Tensor, mixtures: int) -> torch.Tensor:
    """Return an affine map to logits by mixture, ``(m, hidden + 1, n)``: what cells are multiplied by to get bases."""
    both = torch.cat([slopes, origin[None]])
    return both.unflatten(1, (mixtures, -1))[..., :-1].transpose(0, 1)


def hidden_width(in_channels: int, reduction: float) -> int:
    """Return the width of an attention's hidden vector."""
    return max(int(in_channels * reduction), 16)


def basis_size(num_nonlocal: int, ratio: float) -> int:
    """Return how many terms reach the cells of other layers."""
    return max(int(num_nonlocal * ratio), 16)


class KWAttention(nn.Module):
    """Coefficients of a layer's mixtures, one set per sample.

    The pooled input passes two linear layers; the logits of a mixture are divided by the sum of their magnitudes
    (signs are kept), blended with the initial assignment by the temperature, and the zero cell is dropped.

    Attributes:
        temperature: 1 makes every mixture its assigned cell, 0 (the default) is pure attention. State of the model,
            not of its weights; set it with :func:`kw_timm.set_temperature`.
        annealing: What lets the temperature fall in its stead, see :func:`kw_timm.anneal`; None (the default): nothing.
        assignment: The initial assignment, ``(m, n + 1)``, one-hot.

    Args:
        in_channels: Input channels of the layer, not divided by its groups.
        partition: Partition of the layer's warehouse.
        index: Position of the layer in the warehouse.
        reduction: Hidden width relative to the input channels; at least 16 wide.
        nonlocal_basis_ratio: Below 1, cells of other layers are reached through a basis of this relative size.
        norm_layer: Norm of the hidden vector; ``nn.BatchNorm1d`` goes with a bias-free first linear layer, any other
            with a bias.
        init: How it begins, ``'live'`` or ``'published'``; see :mod:`kw_timm.layers.start`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        input ``(B, C, *spatial)``, output ``(B, m, n)``.

    Source: arXiv 2406.07879, section 3.3, equation 3.
    """

    assignment: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        partition: Partition,
        index: int,
        reduction: float = 1 / 16,
        nonlocal_basis_ratio: float = 1.0,
        norm_layer: NormLayer = nn.BatchNorm1d,
        init: str = 'live',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        share: LayerPartition = partition.layers[index]
        self.init, self._share, self._partition = check_init(init), share, partition
        basis = make_basis(share, partition, nonlocal_basis_ratio)
        self.num_mixtures = share.num_mixtures
        self.num_cells = partition.num_cells
        self.temperature: float = 0.0
        self.annealing: Annealing | None = None
        hidden = hidden_width(in_channels, reduction)
        self.fc1 = nn.Linear(in_channels, hidden, bias=norm_layer is not nn.BatchNorm1d, device=device, dtype=dtype)
        self.norm1 = as_attention_norm(norm_layer(hidden, device=device, dtype=dtype))
        self.act1 = nn.ReLU()
        self.nonlocal_basis = basis is not None
        if basis is not None:
            columns = self.num_mixtures * basis.columns
            self.basis = basis
            self.fc2 = nn.Linear(hidden, columns, bias=False, device=device, dtype=dtype)
            self.fc3 = nn.Linear(basis.size, basis.num_nonlocal, bias=False, device=device, dtype=dtype)
            self.basis_bias = nn.Parameter(
                torch.zeros(self.num_mixtures * (self.num_cells + 1), device=device, dtype=dtype)
            )
        else:
            columns = self.num_mixtures * (self.num_cells + 1)
            self.fc2 = nn.Linear(hidden, columns, device=device, dtype=dtype)
        assignment = torch.empty(self.num_mixtures, self.num_cells + 1, device=device, dtype=dtype)
        self.register_buffer('assignment', assignment, persistent=False)
        self.init_non_persistent_buffers()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew, as ``init`` says."""
        if self.init == 'published':
            self._reset_published()
        else:
            self.begin(self.codes)

    @property
    def codes(self) -> torch.Tensor:
        """What the mixtures begin as, ``(m, n + 1)``, see :func:`~kw_timm.layers.start.start_codes`."""
        return start_codes(self._share, self._partition).dense(self.fc2.weight, self.num_cells + 1)

    @property
    def assigned(self) -> tuple[int, ...]:
        """For each mixture the cell that it equals at temperature 1; ``num_cells`` stands for the zero cell."""
        return self._share.assigned

    def _reset_published(self) -> None:
        # Linear layers Kaiming normal (fan out, ReLU), biases 0, norm 1 and 0.
        for linear in (self.fc1, self.fc2, *((self.fc3,) if self.nonlocal_basis else ())):
            nn.init.kaiming_normal_(linear.weight, mode='fan_out', nonlinearity='relu')
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.nonlocal_basis:
            nn.init.zeros_(self.basis_bias)
        self._reset_norm()

    @torch.no_grad()
    def begin(self, codes: torch.Tensor, alive: float = ALIVE) -> None:
        """Let every mixture be, for all inputs nearly or wholly the same, a given combination of cells.

        Args:
            codes: Coefficients ``(m, n + 1)``, the zero cell's last; magnitudes of a mixture sum to 1.
            alive: What varies with the input: magnitudes, relative to those of the codes, summed over a mixture, for
                hidden units of unit variance. With 0 the coefficients are the codes, and only gradients vary.
        """
        scale = inertia(self.num_cells)
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity='linear')
        if self.fc1.bias is not None:
            nn.init.zeros_(self.fc1.bias)
        self._reset_norm()
        # Of a normal variable the mean magnitude is 0.8 standard deviations; half of a hidden unit's square survives.
        std = alive * scale / (self.num_cells + 1) / 0.8 / (self.fc1.out_features / 2) ** 0.5
        nn.init.normal_(self.fc2.weight, std=std)
        if self.nonlocal_basis:
            nn.init.normal_(self.fc3.weight, std=self.fc3.in_features**-0.5)
        (self.basis_bias if self.nonlocal_basis else self.fc2.bias).copy_(scale * codes.flatten())

    def _reset_norm(self) -> None:
        reset_norm = getattr(self.norm1, 'reset_parameters', None)
        if reset_norm is not None:
            reset_norm()

    def init_non_persistent_buffers(self) -> None:
        """Fill the assignment, which no weight file holds (also after ``to_empty``)."""
        with torch.no_grad():
            columns = torch.tensor(self.assigned, device=self.assignment.device)
            self.assignment.zero_().scatter_(1, columns[:, None], 1.0)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Return the hidden vector ``(B, hidden)`` of inputs ``(B, C, *spatial)``."""
        return self.act1(normalize(self.norm1, self.fc1(pool(x, self.fc1.in_features))))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits ``(B, m, n + 1)`` of hidden vectors ``(B, hidden)``; the last column is the zero cell."""
        logits = self.fc2(hidden)
        if self.nonlocal_basis:
            logits = self.basis(logits.unflatten(1, (self.num_mixtures, -1)), self.fc3) + self.basis_bias
        return logits.unflatten(1, (self.num_mixtures, self.num_cells + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the coefficients ``(B, m, n)`` for inputs ``(B, C, *spatial)``."""
        logits = self.logits(self.hidden(x))
        coefficients = logits / (sum_of_magnitudes(logits) + 1e-3)
        temperature = self._temperature_now(x)
        if isinstance(temperature, torch.Tensor) or temperature != 0:
            coefficients = (1 - temperature) * coefficients + temperature * self.assignment
        return coefficients[..., :-1].to(logits.dtype)

    @property
    def num_terms(self) -> int:
        """Bases of a mixture, ``hidden + 1``."""
        return int(self.fc1.out_features) + 1

    @property
    def is_affine(self) -> bool:
        """Whether the logits are known to be what :meth:`affine` says: nothing was put in, or listens."""
        maps = (self.fc2, self.fc3) if self.nonlocal_basis else (self.fc2,)
        return all(type(linear) is nn.Linear for linear in maps) and not any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in (self, *maps)
        )

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits as an affine map of the hidden vector: slopes ``(hidden, m * (n + 1))`` and origin."""
        if not self.nonlocal_basis:
            return self.fc2.weight.t(), self.fc2.bias
        weight = self.fc2.weight
        points = torch.cat(
            [weight.new_zeros(1, weight.shape[1]), torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)]
        )
        origin, *others = self.logits(points).flatten(1)
        return torch.stack(others) - origin, origin

    def of_bases(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`forward` does as a product: ``(B, m, T)``, the coefficients of bases, times ``(m, T, n)``.

        Above temperature 0 the assigned cell is one basis more.
        """
        hidden = self.hidden(x)
        logits = self.logits(hidden)
        temperature = self._temperature_now(x)
        norms = sum_of_magnitudes(logits) + 1e-3
        terms = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)[:, None]
        coefficients = (1 - temperature) * terms / norms
        maps = as_maps(*self.affine(), self.num_mixtures)
        if isinstance(temperature, torch.Tensor) or temperature != 0:
            warm = torch.ones_like(coefficients[..., :1]) * temperature
            coefficients = torch.cat([coefficients, warm], -1)
            maps = torch.cat([maps, self.assignment[:, None, :-1].to(maps.dtype)], 1)
        return coefficients.to(logits.dtype), maps

    def _temperature_now(self, x: torch.Tensor) -> float | torch.Tensor:
        if self.annealing is not None and not isinstance(x, torch.fx.Proxy):  # A graph counts nothing.
            return self.annealing.of_layer(self.training)
        return self.temperature

    def extra_repr(self) -> str:
        """Return mixtures, cells and temperature."""
        return f'mixtures={self.num_mixtures}, cells={self.num_cells}, temperature={self.temperature:g}'


class NonLocalBasis(nn.Module):
    """Logits of a layer's own cells directly, of all other cells through a small basis.

    Has no parameters of its own: the weight files name them ``fc2``, ``fc3`` and ``basis_bias`` of the attention.

    Args:
        share: The layer's share of the warehouse.
        partition: The warehouse's partition.
        ratio: Size of the basis relative to the number of other cells; at least 16.

    Raises:
        ValueError: If the warehouse has no cells of other layers.
    """

    def __init__(self, share: LayerPartition, partition: Partition, ratio: float) -> None:
        super().__init__()
        self.num_local = int(partition.cell_num_ratio * share.num_mixtures)
        self.num_nonlocal = partition.num_cells - self.num_local
        if self.num_nonlocal < 1:
            raise ValueError(
                f'nonlocal_basis_ratio={ratio:g} needs a warehouse that several layers share, but all '
                f'{partition.num_cells} cells belong to one layer. Use nonlocal_basis_ratio=1 there.'
            )
        self.size = basis_size(self.num_nonlocal, ratio)
        self.start = share.start

    @property
    def columns(self) -> int:
        """Number of logits per mixture before expansion: own cells, basis, zero cell."""
        return self.num_local + self.size + 1

    def forward(self, logits: torch.Tensor, expand: nn.Module) -> torch.Tensor:
        """Expand ``(B, m, local + basis + 1)`` by ``expand: basis -> nonlocal`` to ``(B, m * (n + 1))``."""
        local, basis, zero = logits.split((self.num_local, self.size, 1), dim=-1)
        others = expand(basis)
        before, after = others.split((self.start, self.num_nonlocal - self.start), dim=-1)
        return torch.cat((before, local, after, zero), dim=-1).flatten(1)


def make_basis(share: LayerPartition, partition: Partition, ratio: float) -> NonLocalBasis | None:
    """Return the basis of a layer, None at a ratio of 1, where every cell is reached directly.

    Raises:
        ValueError: If the ratio is not in (0, 1], or as :class:`NonLocalBasis`.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f'nonlocal_basis_ratio must be above 0 and at most 1, got {ratio!r}.')
    return NonLocalBasis(share, partition, ratio) if ratio < 1 else None
