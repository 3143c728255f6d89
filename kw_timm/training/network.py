"""The network that a run trains: created, started, annealed."""

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from ..layers import KWAttention, KWLayer
from ..layers.annealing import without_passes
from ..models._network import KWNetwork, checkpoint_filter_fn
from ..pyramid import create_network
from ..weights import WeightsMismatchError, read_weight_file, unwrap_weights
from ..weights.load import CLASSIFIERS
from .data import uniform_drop_path
from .published import EVALUATION, PUBLISHED
from .recipes import Recipe

__all__ = ['attentions', 'data_config', 'load_start', 'network_of']


def network_of(recipe: Recipe, settings: argparse.Namespace, classes: int | None) -> nn.Module:
    """Return a new network, started as the settings say.

    Raises:
        ValueError: If there is no such network, or it cannot start so.
    """
    name, kwargs = settings.model, dict(settings.model_kwargs)
    classes = settings.num_classes or classes
    if classes:
        kwargs['num_classes'] = classes
    kwargs.setdefault('drop_rate', recipe.drop)
    if recipe.drop_path:
        kwargs.setdefault('drop_path_rate', recipe.drop_path)
    is_kw = name.startswith(('kw', 'kernelized'))
    if is_kw:
        kwargs.setdefault('init', recipe.init)
        kwargs['pretrained_static'] = settings.pretrained_static
    elif settings.pretrained_static:
        raise ValueError(f'--pretrained-static starts a KW network from a static one; for {name} write --pretrained.')
    network = create_network(name, pretrained=settings.pretrained, **kwargs).to(getattr(torch, settings.model_dtype))
    if not is_kw:
        uniform_drop_path(network, kwargs.get('drop_path_rate', 0.0))
    if settings.initial_checkpoint:
        load_start(network, Path(settings.initial_checkpoint))
    if settings.attention == 'frozen':
        for attention in attentions(network, frozen=True):
            attention.requires_grad_(False)
    if settings.grad_checkpointing:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    return network


def attentions(network: nn.Module, frozen: bool = False) -> list[nn.Module]:
    """Return the attentions of a network.

    Raises:
        ValueError: If they are to be frozen, and there are none.
    """
    found: list[nn.Module] = [module for module in network.modules() if isinstance(module, KWAttention)]
    if frozen and not any(isinstance(module, KWLayer) for module in network.modules()):
        raise ValueError(f'--attention frozen needs a KW network; {type(network).__name__} has no attention.')
    return found


def load_start(network: Any, file: Path, whole: bool = False) -> None:
    """Load the weights of a file, but, unless they are needed whole, for a classifier of other classes.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsMismatchError: If they do not fit, which they do not in part either; nothing is loaded.
    """
    found = read_weight_file(file)
    try:
        is_kw = isinstance(network, KWNetwork)
        weights = checkpoint_filter_fn(found, network) if is_kw else unwrap_weights(found, network)
        own = without_passes(network.state_dict())
        if not whole and any(
            key.startswith(CLASSIFIERS) and own[key].shape != weights[key].shape for key in own.keys() & weights
        ):
            weights = {key: value for key, value in weights.items() if not key.startswith(CLASSIFIERS)}
        missing = [key for key in own if key not in weights and (whole or not key.startswith(CLASSIFIERS))]
        if missing:
            raise ValueError(f'It lacks {missing[0]}, one of {len(missing)} missing tensors of {len(own)}.')
        network.load_state_dict(weights, strict=False)
    except (ValueError, RuntimeError) as error:
        raise WeightsMismatchError(f"The file '{file}' was not loaded. {' '.join(str(error).split()):.400}") from error


def data_config(network: Any, settings: argparse.Namespace, published: bool) -> dict[str, Any]:
    """Return what images a network takes: as the published accuracies were evaluated, or as its own cfg says."""
    asked = {'img_size': settings.img_size} if settings.img_size else {}
    own = resolve_data_config(asked, model=network)
    name = settings.model.partition('.')[0]
    return {**own, **EVALUATION, 'input_size': own['input_size']} if published and name in PUBLISHED else own
