"""Plans for any network, by the rules of the released ones."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .layers.attention import NormLayer
from .plans import WarehousePlan
from .replaceable import obstacles
from .sharing import Group, keep_small, make_group
from .stages import Place, candidates, find_classifiers, find_places

__all__ = ['DerivedPlan', 'derive_plan', 'fitting_norm']

Patterns = str | Sequence[str] | None


class DerivedPlan(dict[str, WarehousePlan]):
    """A plan, and what it leaves alone.

    Attributes:
        static: Layer that stays static -> reason.
    """

    static: dict[str, str]

    def __init__(self, plan: dict[str, WarehousePlan], static: dict[str, str]) -> None:
        super().__init__(plan)
        self.static = static


def fitting_norm(model: nn.Module) -> NormLayer:
    """Return the norm of attentions as in the released networks: BatchNorm in networks with such, else LayerNorm."""
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    return nn.BatchNorm1d if has_batch_norm else nn.LayerNorm


def derive_plan(
    model: nn.Module,
    budget: float = 1.0,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    attention_limit: float = 0.10,
    norm_layer: NormLayer | None = None,
    **ratios: Any,
) -> DerivedPlan:
    """Plan the warehouses of a network, of any, by the rules of the released ones.

    A warehouse serves the layers of one stage and one kind: convolutions (pointwise and spatial ones together),
    depthwise ones, grouped ones, linear layers; each downsampling by patches has its own; pointwise layers before a
    depthwise one have theirs for budgets above 1. The first layers of a stage belong to the stage before, as long as
    they read its width. Stem, classifier and layers that gate channels stay static, and so does what cannot be a KW
    layer. Attention is kept within a limit, see :func:`~kw_timm.sharing.keep_small`.

    With ``attention_limit=math.inf`` this gives the released plans, except: the stems of MobileNetV2 and ConvNeXt are
    KW there (here if their names are given), the attentions of kw1d2x_resnet50 have a basis
    (``nonlocal_basis_ratio=0.0625`` here), and kw1d2x_mobilenetv2 is of its own making. With 10 %, ResNets' plans stay
    so for budgets of 1 and more; the attentions of the others are larger than that (38 to 47 % at 1x).

    Args:
        model: The network; nothing is changed.
        budget: Cells per mixture: 1/4, 1/2, 1, 2, 4... Below 1 cells are halved, as in the released networks, or as
            far as is needed for that share of cells.
        include: Patterns (``fnmatch``) of the names of layers to plan, others stay static; None for all. A name that
            is written out plans a stem or classifier, too.
        exclude: Patterns of the names of layers that stay static.
        attention_limit: Most attention parameters, relative to all others that the network will have.
        norm_layer: Norm within the attention, as for ``kernelize``; None for :func:`fitting_norm`.
        **ratios: Further ratios of every warehouse, as :class:`~kw_timm.WarehousePlan` takes them.

    Returns:
        The plan, with what stays static in its attribute ``static``.

    Raises:
        ValueError: If the budget is no such number, a pattern matches no layer, a layer has no size yet, or there is
            nothing to plan.

    Example:
        >>> plan = derive_plan(timm.create_model('resnet34'), 4)
        >>> plan.static
        {'conv1': 'it is part of the stem.', 'fc': 'it is the classifier.'}
    """
    _check_budget(budget)
    if not attention_limit > 0:
        raise ValueError(f'attention_limit must be a positive number, got {attention_limit!r}.')
    layers = candidates(model)
    lazy = next((name for name, layer in layers.items() if isinstance(layer, LazyModuleMixin)), None)
    if lazy is not None:
        raise ValueError(f"The layer '{lazy}' has no size yet; run the network once before you derive a plan.")
    named = _select(layers, include, exclude)
    norm_layer = norm_layer or fitting_norm(model)
    reasons = _reasons(model, layers, named)
    places = find_places(model, layers)
    reasons |= {n: p.reason for n, p in places.items() if p.reason and n not in reasons and named[n] != 'written'}
    chosen = {name: layer for name, layer in layers.items() if name not in reasons}
    ratios = {'cell_num_ratio': budget, **ratios}

    groups, unfit = _groups(chosen, places, norm_layer, ratios, is_coarse=False)
    others = sum(p.numel() for p in model.parameters()) - sum(
        chosen[n].weight.numel() for g in groups for n in g.layers
    )
    if budget < 1 and sum(g.attention for g in groups) > attention_limit * (others + sum(g.sizes[1] for g in groups)):
        groups, unfit = _groups(chosen, places, norm_layer, ratios, is_coarse=True)
    reasons |= dict.fromkeys(unfit, f'its kernel cannot be cut such that {budget:g} cells for a mixture add up.')
    groups, left = keep_small(groups, others, attention_limit)
    reasons |= {
        name: f'its attention of {weights:,} weights for a kernel of {layers[name].weight.numel():,} is over the limit.'
        for name, weights in left.items()
    }
    if not groups:
        told = '; '.join(f"'{name}': {reason}" for name, reason in list(reasons.items())[:3])
        raise ValueError(f'There is no layer to plan in {type(model).__name__}. {told or "It has no layers."}')
    plan = {group.name: group.plan for group in groups}
    return DerivedPlan(plan, {name: reasons[name] for name in layers if name in reasons})


def _check_budget(budget: Any) -> None:
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool) and 0 < budget < 1e6
    whole = (budget if budget >= 1 else 1 / budget) if is_number else 0.5
    if abs(whole - round(whole)) > 1e-9:
        raise ValueError(
            f'budget must be a whole number, or one divided by a whole number (4, 2, 1, 1/2, 1/4), got {budget!r}.'
        )


def _select(layers: dict[str, Any], include: Patterns, exclude: Patterns) -> dict[str, str]:
    """Return for every layer ``'yes'``, ``'no'``, or ``'written'`` if its name is written out."""

    def patterns(given: Patterns, what: str) -> list[str]:
        found = [given] if isinstance(given, str) else list(given or ())
        for pattern in found:
            if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(f'{what}: no convolution or linear layer of the network is named like {pattern!r}.')
        return found

    wanted, unwanted = patterns(include, 'include'), patterns(exclude, 'exclude')
    selected = {}
    for name in layers:
        yes = include is None or any(fnmatchcase(name, pattern) for pattern in wanted)
        no = any(fnmatchcase(name, pattern) for pattern in unwanted)
        selected[name] = 'no' if no or not yes else 'written' if name in wanted else 'yes'
    return selected


def _reasons(model: nn.Module, layers: dict[str, Any], named: dict[str, str]) -> dict[str, str]:
    reasons = {name: 'it is excluded.' for name in layers if named[name] == 'no'}
    classifiers = find_classifiers(model, layers)
    reasons |= {n: 'it is the classifier.' for n in layers if n in classifiers and named[n] == 'yes'}
    return dict(obstacles(model, [name for name in layers if name not in reasons])) | reasons


def _groups(
    layers: dict[str, Any], places: dict[str, Place], norm_layer: NormLayer, ratios: dict[str, Any], is_coarse: bool
) -> tuple[list[Group], list[str]]:
    """Return the warehouses of stages and kinds, and the layers that do not fit."""
    together: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        kind, stage = places[name].kind, places[name].stage
        if kind == 'expand' and ratios['cell_num_ratio'] <= 1:
            kind = 'conv'
        key = 'stem' if stage < 0 else f'stage{stage}_{kind}'
        if kind.startswith('patch'):
            key = f'{key}_{name.replace(".", "_")}'
        together.setdefault(key, {})[name] = layer
    groups: list[Group] = []
    unfit: list[str] = []
    for key, members in together.items():
        group, others = make_group(key, members, norm_layer, ratios, is_coarse)
        groups += [] if group is None else [group]
        unfit += others
    return groups, unfit
