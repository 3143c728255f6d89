"""Networks to test with: names, what they cost, and weights under which every layer shows in the output."""

import copy
from functools import lru_cache

import timm
import torch
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from torch import nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import LeafModuleAwareTracer

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
    """Trace a network into an fx graph, with the tracer of timm's and torchvision's feature extractors.

    Without the names that theirs gives to nodes, which takes minutes where there are thousands.
    """
    tracer = LeafModuleAwareTracer(
        leaf_modules=list(get_notrace_modules()),
        autowrap_functions=list(get_notrace_functions()),
        param_shapes_constant=True,
    )
    return GraphModule(model, tracer.trace(model))


def check_gradients(model: nn.Module, outputs: torch.Tensor) -> None:
    """Assert that logits of 42 classes are sound, and that every parameter has a part in them."""
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()
    outputs.mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad()


@torch.no_grad()
def check_forward(made: nn.Module, size: int, **graph_tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Assert that logits are sound, and the same with checkpoints and as a graph; return images and logits."""
    x = images(1, size)
    outputs = made(x)
    assert outputs.shape == (1, 1000)
    assert outputs.isfinite().all()
    made.set_grad_checkpointing()
    torch.testing.assert_close(made(x), outputs, rtol=1e-4, atol=1e-5)
    made.set_grad_checkpointing(False)
    torch.testing.assert_close(as_graph(made)(x), outputs, **graph_tolerance)
    return x, outputs


@torch.no_grad()
def check_head(made: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Assert that a head can be taken off; return the features, and the outputs without head and pooling."""
    x = images(1, size)
    features = made.forward_features(x)
    pooled = made.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, made.head_hidden_size)
    torch.testing.assert_close(made.forward_head(features), made(x))
    model = copy.deepcopy(made)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, '')
    return features, model(x)


@torch.no_grad()
def check_intermediates(made: nn.Module, size: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Assert that levels are as announced, and the same with checkpoints.

    Return the features, the levels, and the second and last level alone.
    """
    x = images(1, size)
    info = FeatureInfo(made.feature_info, len(made.feature_info))
    final, features = made.forward_intermediates(x, output_fmt='NCHW')
    assert [f.shape[1] for f in features] == info.channels()
    assert [size // f.shape[-1] for f in features] == info.reduction()
    torch.testing.assert_close(final, made.forward_features(x), rtol=0, atol=0)
    only = made.forward_intermediates(x, indices=[1, -1], intermediates_only=True)
    assert torch.equal(only[0], features[1])
    made.set_grad_checkpointing()
    torch.testing.assert_close(made.forward_intermediates(x)[0], final, rtol=1e-4, atol=1e-5)
    made.set_grad_checkpointing(False)
    return final, features, only


def check_backward(made: nn.Module, size: int) -> None:
    """Assert that every parameter gets a gradient, in a graph too, which has all of them."""
    model = copy.deepcopy(made).train()
    model.reset_classifier(42)
    x = images(2, size)
    check_gradients(model, model(x))
    graph = as_graph(model)
    check_gradients(graph, graph(x))
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, graph)]
    assert counts[0] == counts[1]
