"""Networks to test with: names, what they cost, and weights under which every layer shows in the output."""

import copy
from functools import lru_cache

import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import kw_timm.models  # noqa: F401  (registers the models)
from kw_timm.random_weights import enliven, fit_norms

# Exact parameter counts at 1000 classes.
PARAMETERS = {
    'kw1d4x_resnet18': 4_031_768,
    'kw1d2x_resnet18': 7_431_044,
    'kw1x_resnet18': 11_932_148,
    'kw2x_resnet18': 23_242_127,
    'kw4x_resnet18': 45_862_085,
    'kw1d2x_resnet50': 17_638_264,
    'kw1x_resnet50': 28_052_310,
    'kw4x_resnet50': 102_015_144,
    'kw1d2x_mobilenetv2_050': 1_466_888,
    'kw1x_mobilenetv2_050': 2_854_522,
    'kw4x_mobilenetv2_050': 4_648_587,
    'kw1d2x_mobilenetv2_100': 2_654_396,
    'kw1x_mobilenetv2_100': 5_168_146,
    'kw4x_mobilenetv2_100': 11_379_382,
    'kw1x_convnext_tiny': 39_370_674,
}
VARIANTS = tuple(PARAMETERS)
# The smallest of each family.
SMALLEST = ('kw1x_resnet18', 'kw1x_mobilenetv2_050', 'kw1x_convnext_tiny')
# And those with layers that the smallest do not have: a non-local basis, a KW classifier.
SPECIAL = (*SMALLEST, 'kw1d2x_resnet50', 'kw1d2x_mobilenetv2_050')


def lively(model: nn.Module, in_chans: int = 3) -> nn.Module:
    """Give a new network, in eval mode, weights under which every layer shows; as initialized, signals vanish.

    Kernels depend on the sample, but not so much that rounding shows; the features' norms are fitted to the weights.
    """
    generator = torch.Generator().manual_seed(0)
    enliven(model, generator)
    return fit_norms(model, torch.randn(4, in_chans, 64, 64, generator=generator))


@lru_cache
def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(timm.create_model(name))


def network(name: str) -> nn.Module:
    """A lively network of a variant, in eval mode, the caller's own."""
    return copy.deepcopy(_network(name))


def images(batch: int = 2, size: int = 64, channels: int = 3, seed: int = 1) -> torch.Tensor:
    """A batch of random images."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def as_graph(model: nn.Module) -> nn.Module:
    """Trace a network into an fx graph."""
    options = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train, evaluate = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model, train_return_nodes=train[-1:], eval_return_nodes=evaluate[-1:], tracer_kwargs=options
    )


def check_gradients(model: nn.Module, outputs: torch.Tensor) -> None:
    """Assert that logits of 42 classes are sound, and that every parameter has a part in them."""
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()
    outputs.mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad()
