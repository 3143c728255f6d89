"""Features of padded images: as if each image were alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import lively

import kw_timm
from kw_timm.padding import without_padding
from kw_timm.pyramid import PyramidFeatures

NAMES = ('kw1x_resnet18', 'kw1d2x_mobilenetv2_050', 'kw1x_convnext_tiny', 'resnet18', 'mobilenetv2_050')
LARGE, SMALL = (64, 96), (32, 64)


def backbone(name: str, **kwargs) -> PyramidFeatures:
    torch.manual_seed(0)
    return lively(PyramidFeatures(name, **kwargs)).double()


def batch(
    large: tuple[int, int] = LARGE, small: tuple[int, int] = SMALL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A large and a small image, and both in a batch."""
    a, b = (torch.randn(1, 3, *size, dtype=torch.float64) for size in (large, small))
    return a, b, torch.cat([a, F.pad(b, (0, large[1] - small[1], 0, large[0] - small[0]), value=0.3)])


def distance(padded: torch.Tensor, alone: torch.Tensor) -> float:
    height, width = alone.shape[2:]
    return float((padded[:, :, :height, :width] - alone).norm() / alone.norm())


@pytest.mark.parametrize('name', NAMES)
def test_each_image_as_if_alone(name):
    features = backbone(name)
    a, b, x = batch()
    with torch.no_grad():
        left_out, published = features(x, sizes=[LARGE, SMALL]), features(x)
        for level, alone in enumerate(zip(features(a), features(b), strict=True)):
            assert max(distance(left_out[level][i : i + 1], alone[i]) for i in range(2)) < 1e-6
        # The published way, which stays the default: the padding is part of the image.
        if name.startswith('kw'):
            assert distance(published[-1][1:], features(b)[-1]) > 1e-3
        assert all(torch.equal(p, q) for p, q in zip(features(x), published, strict=True))


@pytest.mark.parametrize('name', NAMES[:3])
def test_sizes_that_no_stride_divides(name):
    """Resolutions are those of the image alone: rounded up by padded convolutions, down by ConvNeXt's."""
    features = backbone(name)
    size = (45, 59)
    _, b, x = batch(LARGE, size)
    if 'convnext' not in name:
        x[1, :, size[0] :] = x[1, :, :, size[1] :] = 0
    with torch.no_grad():
        for padded, alone in zip(features(x, sizes=[LARGE, size]), features(b), strict=True):
            assert distance(padded[1:], alone) < 1e-6


def test_gradients_are_those_of_the_image_alone():
    features = backbone('kw1x_resnet18', norm_eval=True).train()
    _, b, x = batch()
    cells = features.model.warehouses['stage1'].weight if 'stage1' in features.model.warehouses else None
    cells = cells if cells is not None else next(iter(features.model.warehouses.values())).weight
    alone = torch.autograd.grad(features(b)[-1].square().mean(), cells)[0]
    padded = features(x[1:], sizes=[SMALL])[-1][..., : SMALL[0] // 32, : SMALL[1] // 32]
    torch.testing.assert_close(torch.autograd.grad(padded.square().mean(), cells)[0], alone, rtol=1e-6, atol=1e-12)


def test_optimized_networks_and_plain_ones():
    network = backbone('kw1x_resnet18').float()
    fast = kw_timm.optimize_for_inference(network)
    _, b, x = (t.float() for t in batch())
    with torch.no_grad():
        alone = network(b)
        for padded, expected in zip(fast(x, sizes=[LARGE, SMALL]), alone, strict=True):
            assert distance(padded[1:], expected) < 1e-3
        with without_padding(network.model, [LARGE, SMALL], LARGE):
            inside = network(x)
        assert distance(inside[0][1:], alone[0]) < 1e-3
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_sizes_that_cannot_be():
    features = backbone('kw1x_resnet18', grad_checkpointing=True).train()
    x = batch()[2]
    with pytest.raises(ValueError, match='with grad_checkpointing'):
        features(x, sizes=[LARGE, SMALL])
    features.eval()
    with pytest.raises(ValueError, match='Image 1 of the batch is said to be 96 x 64, which is not within the 64 x 96'):
        features(x, sizes=[LARGE, (96, 64)])
    with pytest.raises(ValueError, match='1 sizes for 2 images'):
        features(x, sizes=[LARGE])


def test_checkpointing_changes_nothing():
    plain = backbone('kw1x_resnet18', norm_eval=True).train()
    checkpointed = backbone('kw1x_resnet18', norm_eval=True, grad_checkpointing=True)
    checkpointed.load_state_dict(copy.deepcopy(plain.state_dict()))
    x = batch()[0]
    gradients = []
    for features in (plain, checkpointed.train()):
        features(x)[-1].square().mean().backward()
        gradients.append([p.grad for p in features.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
