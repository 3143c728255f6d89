"""The field's tools for freezing and synchronizing norms, one image in training, and numbers of other types."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from networks import images, network
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from timm.utils import freeze, unfreeze
from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import kw_timm
from kw_timm.layers import KWAttention, KWConv2d, KWLayer, Warehouse

SLOW = pytest.mark.slow
NAMES = ('kw1d4x_resnet18', 'kw1x_mobilenetv2_050')


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if 'running' in name}


def learning(model: nn.Module) -> set[str]:
    """Norms whose statistics a step of training changes."""
    before = statistics(model.train())
    model(images(2, 32))
    after = statistics(model)
    return {name.rpartition('.')[0] for name in after if not torch.equal(after[name], before[name])}


def torchvision_frozen(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, BatchNormAct2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(model, name, frozen)
        else:
            torchvision_frozen(child)
    return model


def in_place(*tools: Callable[..., None]) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        for tool in tools:
            tool(model)
        return model

    return convert


CONVERSIONS = {
    'freeze': (in_place(freeze), False),
    'freeze and unfreeze': (in_place(freeze, unfreeze), True),
    'parameters only': (in_place(lambda model: freeze(model, include_bn_running_stats=False)), True),
    'norms': (freeze_batch_norm_2d, False),
    'norms and back': (lambda model: unfreeze_batch_norm_2d(freeze_batch_norm_2d(model)), True),
    'torchvision': (torchvision_frozen, False),
    'synchronized': (convert_sync_batchnorm, True),
    'synchronized by torch': (nn.SyncBatchNorm.convert_sync_batchnorm, True),
}


@pytest.mark.parametrize('conversion', CONVERSIONS)
@pytest.mark.parametrize('name', NAMES)
def test_norms_of_attentions_go_with_the_others(name, conversion):
    if name == NAMES[1] and 'torch' in conversion:
        pytest.skip('loses the activation of BatchNormAct2d in a static MobileNetV2 too')
    convert, learns = CONVERSIONS[conversion]
    model = network(name)
    x = images(2, 32)
    with torch.no_grad():
        expected = model(x)
        norms = {name for name, m in model.named_modules() if hasattr(m, 'running_mean')}
        converted = convert(model).eval()
        torch.testing.assert_close(converted(x), expected, rtol=1e-3, atol=1e-3)
        # Optimizing reads the same statistics, and tracing sees one operation, whatever is in the norm's place.
        fast = kw_timm.optimize_for_inference(converted)
        torch.testing.assert_close(fast(x), expected, rtol=1e-3, atol=1e-3)
        assert learning(converted) == (norms if learns else set())


def test_freezing_a_stage():
    model = network(NAMES[0])
    freeze(model, ['conv1', 'bn1', 'layer1'])
    learns = learning(model)
    assert not any(name.startswith(('bn1', 'layer1.')) for name in learns)
    assert 'layer2.0.conv1.attention.norm1' in learns
    before = model.layer1[0].eval()(torch.ones(1, 64, 8, 8))
    model.train()(images(2, 32)).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(model.layer1[0].eval()(torch.ones(1, 64, 8, 8)), before)
    unfreeze(model, ['layer1'])
    assert all(p.requires_grad for p in model.layer1.parameters())


def test_synchronizing_keeps_activations():
    model = convert_sync_batchnorm(network(NAMES[1]))
    assert isinstance(model.bn1, SyncBatchNormAct)
    assert isinstance(model.conv_stem.attention.norm1, nn.SyncBatchNorm)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_norm_is_one_operation_of_a_graph(duplicate):
    model = duplicate(network(NAMES[0]))
    graph = torch.fx.symbolic_trace(model)
    norms = [node for node in graph.graph.nodes if node.op == 'call_module' and 'attention.norm1' in node.target]
    assert len(norms) == sum(isinstance(m, KWAttention) for m in model.modules())
    x = images(2, 32)
    assert torch.equal(graph(x), model(x))
    frozen = freeze_batch_norm_2d(model)
    assert torch.equal(create_feature_extractor(frozen, ['fc'])(x)['fc'], model(x))


@pytest.mark.parametrize('name', NAMES)
def test_one_image_in_training_mode(name):
    model = network(name).train()
    first = next(name for name, m in model.named_modules() if isinstance(m, KWLayer))
    words = f"Expected more than 1 value per channel when training.*'{first}'.*drop_last=True.*eval"
    with pytest.raises(ValueError, match=words):
        model(images(1, 32))
    assert freeze_batch_norm_2d(copy.deepcopy(model))(images(1, 32)).shape == (1, 1000)
    assert model.eval()(images(1, 32)).shape == (1, 1000)
    # A layer that is in no network has no name.
    layer = KWConv2d(4, 8, 3, warehouse=Warehouse([(8, 4, 3, 3)]))
    with pytest.raises(ValueError, match='attention of a KW layer pools'):
        layer(torch.ones(1, 4, 5, 5))
    norm = layer.attention.norm1
    assert norm.train()(torch.randn(2, 16)).shape == (2, 16)
    with pytest.raises(ValueError, match=r'Expected vectors \(B, 16\)'):
        norm(torch.ones(16))


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    model = network(NAMES[1])
    x = images(2, 32)
    expected = model(x)

    def close(y: torch.Tensor) -> bool:
        # Seen: 0.05 and 0.42 at these weights, 0.01 and 0.06 of a static MobileNetV2.
        return float((y - expected).norm() / expected.norm()) < (0.1 if dtype == torch.float16 else 0.6)

    with torch.autocast('cpu', dtype=dtype):
        assert close(model(x))
        assert close(kw_timm.optimize_for_inference(model)(x))
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert close(y.float())
    assert close(kw_timm.optimize_for_inference(model)(x.to(dtype)).float())


@pytest.mark.parametrize('dtype', [torch.float16, pytest.param(torch.bfloat16, marks=SLOW)])
def test_training_in_sixteen_bits(dtype):
    model, x = network(NAMES[1]).train(), images(4, 64)  # Of fewer pixels, gradients are large
    with torch.autocast('cpu', dtype=dtype):
        model(x).float().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    model.zero_grad()
    model.to(dtype)(x.to(dtype)).float().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize('optimize', [False, True])
def test_sums_that_float16_cannot_hold(optimize):
    """The magnitudes of a mixture's logits add up to more than 65504, its coefficients are about 1 / 401 each."""
    layer = KWConv2d(64, 64, 1, bias=False, warehouse=Warehouse([(64, 64, 1, 1)], cell_num_ratio=400)).eval()
    nn.init.zeros_(layer.attention.fc2.weight)
    nn.init.constant_(layer.attention.fc2.bias, 1000)
    expected = layer(torch.ones(1, 64, 4, 4))
    net = nn.Sequential(layer.half())
    y = (kw_timm.optimize_for_inference(net, memory_budget=0) if optimize else net)(torch.ones(1, 64, 4, 4).half())
    assert expected.abs().max() > 0
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=2e-3)
    # Nor does the mean over many large pixels.
    big = torch.full((1, 64, 128, 128), 60.0)
    torch.testing.assert_close(layer.attention(big.half()).float(), layer.float().attention(big), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize(
    'dtype', [torch.bfloat16, *(pytest.param(t, marks=SLOW) for t in (torch.float64, torch.float16))]
)
def test_default_types(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = timm.create_model(NAMES[1])
        y = model(torch.randn(2, 3, 32, 32))
        y.float().sum().backward()
        fast = kw_timm.optimize_for_inference(model.eval())(torch.randn(1, 3, 32, 32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {dtype}
    assert y.dtype == fast.dtype == dtype
    assert y.isfinite().all()
