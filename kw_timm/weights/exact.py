"""Convert whole weight files, KW or static, and prove it: every key expected, every tensor the same to the last bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch

from .convert import in_reference_order, reference_keys, rename_to_reference, to_timm_state_dict
from .prefixes import find_prefix, without_prefix
from .skeletons import create_skeleton
from .sound import check_kinds, first_few, misfits
from .static import STATIC_NETWORKS, identify_static, static_names, static_to_reference, static_to_timm
from .variants import OURS, REFERENCE_WAREHOUSE, candidates, identify_variant, released_names

__all__ = [
    'Network',
    'assert_same_tensors',
    'check_complete',
    'network_part',
    'recognise_network',
    'to_reference_exact',
    'to_timm_exact',
]

_CLASSIFIER_BIASES = ('fc.bias', 'classifier.bias', 'head.fc.bias')
# Which axis of which tensor counts the input channels, under timm's names.
_STEMS = (
    'conv_stem.attention.fc1.weight',
    'stem.0.attention.fc1.weight',
    'conv1.weight',
    'conv_stem.weight',
    'stem.0.weight',
)


@dataclass(frozen=True)
class Network:
    """A network as its weights tell: enough to create it with timm.

    Attributes:
        name: timm name, e.g. ``'kw4x_resnet50'`` or ``'resnet50'``.
        num_classes: Classes of the classifier, 0 without one.
        in_chans: Channels of the input images.
    """

    name: str
    num_classes: int = 1000
    in_chans: int = 3

    @property
    def is_kw(self) -> bool:
        """Whether this is a KernelWarehouse network."""
        return self.name not in STATIC_NETWORKS

    @property
    def model_args(self) -> dict[str, int]:
        """Return the arguments of ``timm.create_model`` that differ from the published network's."""
        published = Network(self.name)
        return {
            key: getattr(self, key)
            for key in ('num_classes', 'in_chans')
            if getattr(self, key) != getattr(published, key)
        }

    def create(self) -> Any:
        """Create the network without pretrained weights."""
        return timm.create_model(self.name, **self.model_args)

    def skeleton(self) -> Any:
        """Return the network without any weights, shapes alone; it is shared and not to be changed.

        Raises:
            ValueError: If there is none with such classes and channels.
        """
        try:
            return _skeleton(self)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            raise ValueError(
                f'There is no {self.name} with {self.num_classes} classes and {self.in_chans} input channels. The '
                f"weights are damaged; use a file that holds a network's."
            ) from error


@lru_cache(maxsize=4)
def _skeleton(network: Network) -> Any:
    return create_skeleton(network.name, **network.model_args)


def recognise_network(state_dict: Mapping[str, torch.Tensor]) -> Network:
    """Tell from keys and shapes which network weights belong to.

    Args:
        state_dict: Weights under the reference's names or this package's (timm's).

    Raises:
        ValueError: If they are of no released variant and no static network of the published tables.
    """
    name = identify_variant(state_dict) or identify_static(state_dict)
    if name is None:
        some, several = ', '.join(list(state_dict)[:3]), candidates(state_dict)
        if several:
            raise ValueError(
                f'The weights are a part, of {" or ".join(several)}: {len(state_dict)} tensors, {some}, ... A whole '
                f'network was expected. Use a file with all of it.'
            )
        raise ValueError(
            f'The weights are of no released variant and no static network of the published tables '
            f'({len(state_dict)} tensors: {some}, ...). Expected one of: {", ".join(_known_names())}.'
        )
    renamed = rename_exact(state_dict, name)
    # Of another rank they are damaged, which is said when all shapes are compared.
    classes = next((renamed[key].shape[0] for key in _CLASSIFIER_BIASES if key in renamed and renamed[key].dim()), 0)
    in_chans = next((renamed[key].shape[1] for key in _STEMS if key in renamed and renamed[key].dim() > 1), 3)
    return Network(name, int(classes), int(in_chans))


def network_part(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a network's weights without what stands before all their names, e.g. ``model.``.

    Args:
        state_dict: Weights of one network, of any.

    Raises:
        ValueError: If there is more than the network, which conversion would lose.
    """
    if any(key.startswith((OURS, REFERENCE_WAREHOUSE)) for key in state_dict):
        return dict(state_dict)
    prefix = find_prefix(state_dict, static_names())
    others = [key for key in state_dict if not key.startswith(prefix)]
    if others:
        raise ValueError(
            f"Beside the network, whose names begin with '{prefix}', there is more: {first_few(others)}. Save the "
            f'network alone, by torch.save(kw_timm.weights.unwrap_weights(torch.load(FILE), model), NEW_FILE).'
        )
    return without_prefix(state_dict, prefix)


def to_timm_exact(state_dict: Mapping[str, torch.Tensor], network: Network) -> dict[str, torch.Tensor]:
    """Rename a network's weights to timm's names; complete, contiguous, and reversible to the last bit.

    Args:
        state_dict: Weights under the reference's names or timm's, of any floating type and memory format.
        network: What :func:`recognise_network` says of them.

    Returns:
        The weights, as a state dict of ``network.create()``.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape, or conversion would lose anything.
    """
    renamed = rename_exact(state_dict, network.name)
    check_complete(renamed, network.skeleton().state_dict(), network.name)
    converted = {key: value.contiguous() for key, value in renamed.items()}
    if has_reference_names(state_dict):
        assert_same_tensors(to_reference_exact(converted, network), state_dict)
    return converted


def to_reference_exact(state_dict: Mapping[str, torch.Tensor], network: Network) -> dict[str, torch.Tensor]:
    """Rename a network's weights from timm's names to the reference's.

    Args:
        state_dict: Weights under timm's names.
        network: What :func:`recognise_network` says of them.

    Returns:
        The same tensors under the reference's names, in its shapes and in its order.
    """
    skeleton = network.skeleton()
    if network.is_kw:
        return rename_to_reference(state_dict, reference_keys(skeleton))
    own_keys = static_to_reference({key: key for key in skeleton.state_dict()}, network.name)
    keys = in_reference_order({key: reference for reference, key in own_keys.items()})
    return {reference: state_dict[key] for key, reference in keys.items() if key in state_dict}


def has_reference_names(state_dict: Mapping[str, Any]) -> bool:
    """Say whether weights have the reference's names; ResNet's static weights have the same names in both."""
    first_keys = (REFERENCE_WAREHOUSE, 'features.', 'downsample_layers.', 'layer1.')
    return any(key.startswith(first_keys) for key in state_dict) and not any(
        k.startswith('warehouses.') for k in state_dict
    )


def check_complete(converted: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise ValueError unless a state dict has exactly the expected keys, shapes and kinds of tensors."""
    check_kinds(converted, expected)
    problems = misfits(converted, expected)
    if problems:
        raise ValueError(f'The weights look like those of {name} but do not fit it. {"; ".join(problems)}.')


def assert_same_tensors(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless two state dicts have the same keys, types, shapes and bits."""
    if actual.keys() != expected.keys():
        different = sorted(actual.keys() ^ expected.keys())
        raise ValueError(f'Conversion is not reversible: keys differ ({", ".join(different[:4])}).')
    for key, value in expected.items():
        same = actual[key].dtype == value.dtype and actual[key].shape == value.shape and _same_bits(actual[key], value)
        if not same:
            raise ValueError(f"Conversion is not reversible: the tensor '{key}' changed.")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    if not a.is_floating_point():
        return torch.equal(a, b)
    # NaN differs from itself, its bits do not.
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def rename_exact(state_dict: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Rename weights of a network, whole or without classifier, to timm's names."""
    if name in STATIC_NETWORKS:
        return static_to_timm(state_dict, name)
    return to_timm_state_dict(state_dict, Network(name).skeleton())


def _known_names() -> list[str]:
    return [*released_names(), *STATIC_NETWORKS]
