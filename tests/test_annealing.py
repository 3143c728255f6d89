"""Networks that anneal their temperature by themselves, whatever calls them."""

import copy
import io

import drive_engines
import pytest
import timm
import torch
from hub_support import VARIANT
from networks import images, network
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import kw_timm
from kw_timm import TemperatureSchedule, WarehousePlan, anneal, get_temperature, kernelize, set_temperature
from kw_timm.layers import KWAttention, KWConv2d, Warehouse
from kw_timm.pyramid import PyramidFeatures

TINY = 'kw1d2x_mobilenetv2_050'
# A network of timm's by a plan, as derived ones and saved ones are.
KERNELIZED = dict(static='test_resnet', plan={'a': {'layers': ['layer1.0.conv2', 'layer2.0.conv2']}})
PASSES = 'warehouses.training_passes'


def small(steps: float | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kernelize(net, {'a': WarehousePlan(['0']), 'b': WarehousePlan(['2'])}, nn.LayerNorm, init='published')
    if steps is not None:
        anneal(net, steps)
    return net.double()


def checkpointed(net: nn.Sequential, reentrant: bool) -> None:
    for layer in (net[0], net[2]):
        forward = layer.forward
        layer.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=reentrant)


def batch(seed: int = 1, size: int = 8) -> torch.Tensor:
    return images(4, size, seed=seed).double()


def train(net: nn.Module, steps: int, first: int = 0, before=None) -> list[float]:
    """Take steps of SGD; return the temperature after each."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    seen = []
    for i in range(first, first + steps):
        if before is not None:
            before()
        net(batch(i)).square().mean().backward()
        seen.append(get_temperature(net))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_same(net: nn.Module, other: nn.Module) -> None:
    for (key, value), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected), key


def test_it_trains_as_the_schedule_does():
    net, plain = small(4), small()
    schedule = TemperatureSchedule(plain, 2, 2)
    assert get_temperature(net.train()) == 1
    assert train(net, 6) == [0.75, 0.5, 0.25, 0, 0, 0]
    train(plain, 6, before=schedule.step)
    assert_same(net, plain)


def test_evaluation_is_at_zero_and_no_pass():
    net = small(4)
    net(batch())
    frozen = small()
    frozen.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(batch()), frozen.eval()(batch()))
    assert get_temperature(net) == 0
    assert net.warehouses.training_passes == 1
    assert get_temperature(net.train()) == 0.75
    assert not torch.equal(net(batch()), frozen.train()(batch()))


def test_a_run_goes_on_from_its_state_dict():
    whole, before = small(6), small(6)
    train(whole, 5)
    train(before, 3)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    again = small(6)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert train(again, 2, first=3) == pytest.approx([1 / 3, 1 / 6])
    assert_same(again, whole)


@pytest.mark.parametrize(
    'name',
    [TINY, pytest.param('kw1x_convnext_tiny', marks=pytest.mark.slow), 'kernelized by hand'],
)
def test_weights_load_with_a_count_and_without(name):
    def make(steps: float | None) -> nn.Module:
        if name == 'kernelized by hand':
            return small(steps)
        return timm.create_model(name, temperature_steps=steps)

    counting, plain = make(4), make(None)
    assert set(counting.state_dict()) - set(plain.state_dict()) == {PASSES}
    counting.warehouses.training_passes.fill_(3)
    for assign in (False, True):
        result = plain.load_state_dict(counting.state_dict(), strict=True, assign=assign)
        assert result.missing_keys == result.unexpected_keys == []
        assert PASSES not in plain.state_dict()
        result = counting.load_state_dict(plain.state_dict(), strict=True, assign=assign)
        assert result.missing_keys == result.unexpected_keys == []
        assert counting.warehouses.training_passes == 3


def test_files_load_with_a_count_and_without(tmp_path):
    """By timm, and by ours, which loads weights and leaves the count."""
    counting = timm.create_model(TINY, temperature_steps=4)
    counting.warehouses.training_passes.fill_(3)
    file = tmp_path / 'last.pth.tar'
    optimizer = torch.optim.SGD(counting.parameters(), 0.1)
    CheckpointSaver(counting, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    for load in (timm.models.load_checkpoint, kw_timm.load_checkpoint):
        plain, resumed = (timm.create_model(TINY, temperature_steps=steps) for steps in (None, 4))
        for net in (plain, resumed):
            load(net, str(file))
            assert_same(net, counting)
        assert resumed.warehouses.training_passes == (3 if load is timm.models.load_checkpoint else 0)
    with pytest.raises(ValueError, match=TINY):
        timm.create_model('kw1x_mobilenetv2_050').load_state_dict(counting.state_dict())


def test_the_authors_files_load(reference_file):
    net = timm.create_model(VARIANT, temperature_steps=4)
    for load in (timm.models.load_checkpoint, kw_timm.load_checkpoint):
        load(net, str(reference_file))
    assert net.warehouses.training_passes == 0


def test_published_weights_have_no_count(tmp_path, monkeypatch):
    from kw_hub import convert_file
    from safetensors.torch import load_file

    counting = timm.create_model(TINY, temperature_steps=4)
    torch.save({'state_dict': counting.state_dict()}, tmp_path / 'last.pth')
    folder = convert_file(tmp_path / 'last.pth', output=tmp_path / 'out', quiet=True).folder
    assert PASSES not in load_file(folder / 'model.safetensors')
    timm.models.save_for_hf(counting, tmp_path / 'hf', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "hf"}', pretrained=True)
    assert_same(again, counting)
    assert PASSES not in again.state_dict()
    names = kw_timm.weights.to_reference_state_dict(counting)
    assert len(names) == len(again.state_dict())
    assert not any('training_passes' in name for name in names)


@pytest.mark.slow
def test_static_weights_start_a_network_that_anneals():
    counting, plain = (timm.create_model(TINY, temperature_steps=steps) for steps in (4, None))
    static = timm.create_model('mobilenetv2_050').state_dict()
    kw_timm.load_static(counting, static)
    kw_timm.load_static(plain, static)
    for key, value in plain.named_parameters():
        assert '.attention.fc' in key or torch.equal(value, counting.get_parameter(key)), key


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('whole', [False, True])
def test_what_is_computed_again_is_no_pass(reentrant, whole):
    """Also where one backward pass belongs to two forward passes, each of a temperature of its own."""

    def run(net: nn.Module, call) -> None:
        for i in range(2):
            sum(call(net, batch(2 * i + j).requires_grad_()).square().mean() for j in range(2)).backward()

    def in_parts(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net(x)

    plain, net = small(5), small(5)
    if not whole:
        checkpointed(net, reentrant)
    run(plain, in_parts)
    run(net, (lambda net, x: checkpoint(net, x, use_reentrant=reentrant)) if whole else in_parts)
    assert net.warehouses.training_passes == 4
    if whole and reentrant:
        return  # What comes out knows nothing of a pass then; temperatures are those of the latest pass.
    for (key, value), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad, rtol=1e-12, atol=0, msg=key)


@pytest.mark.slow
def test_checkpointing_of_a_network():
    nets = [network(TINY).train().double() for _ in range(2)]
    for net in nets:
        anneal(net, 5)
    nets[1].set_grad_checkpointing()
    for _ in range(2):
        for net in nets:
            torch.manual_seed(0)  # Of its dropout.
            net(batch(size=32)).square().mean().backward()
    assert [get_temperature(net) for net in nets] == [0.6, 0.6]
    for (key, value), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_compiled_without_breaks_or_compiling_again():
    torch._dynamo.reset()
    counter = CompileCounter()
    net, plain = small(6), small(6)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for i in range(8):
        torch.testing.assert_close(compiled(batch(i)), plain(batch(i)), rtol=1e-12, atol=1e-15)
        assert get_temperature(compiled) == get_temperature(plain)
    assert counter.frame_count == 1
    net.eval(), plain.eval()
    torch.testing.assert_close(compiled(batch()), plain(batch()))
    assert counter.frame_count == 2
    assert net.warehouses.training_passes == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ('backend', 'checkpointing'),
    [('aot_eager', True), ('aot_eager', False), ('inductor', True)],
)
def test_a_compiled_network_learns_as_a_plain_one(backend, checkpointing):
    torch._dynamo.reset()
    plain, net = small(4), small(4)
    if checkpointing:
        checkpointed(net, reentrant=False)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (plain, net)]
    for i in range(3):
        for call, optimizer in zip((plain, compiled), optimizers, strict=True):
            call(batch(i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert get_temperature(net) == get_temperature(plain) == 1 - (i + 1) / 4
    for (key, value), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=key)


def test_averaged_copies_compute_at_zero():
    net = small(4)
    ema = ModelEmaV3(net, decay=0.5)
    expected = copy.deepcopy(net.state_dict())
    for i in range(2):
        train(net, 1, first=i)
        ema.update(net)
        for key, value in net.state_dict().items():
            expected[key] = (expected[key] + value) / 2 if value.is_floating_point() else value
    plain = small()
    plain.load_state_dict(expected)
    torch.testing.assert_close(ema(batch()), plain.eval()(batch()), rtol=1e-12, atol=0)
    assert get_temperature(ema) == 0
    assert get_temperature(net) == 0.5


@pytest.mark.parametrize('how', [copy.deepcopy, lambda net: torch.load(_saved(net), weights_only=False)])
def test_copies_count_by_themselves(how):
    net = timm.create_model(TINY, temperature_steps=4).train()
    net(images())
    other = how(net)
    other(images())
    assert [get_temperature(model) for model in (net, other)] == [0.75, 0.5]
    anneal(other, None)
    assert PASSES not in other.state_dict()
    other(images())
    assert get_temperature(other) == 0
    assert get_temperature(net) == 0.75
    net(images())
    assert get_temperature(net) == 0.5


def _saved(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    'make',
    [
        lambda: timm.create_model(TINY, features_only=True, temperature_steps=4),
        lambda: timm.create_model(TINY, features_only=True, feature_cls='hook', temperature_steps=4),
        lambda: PyramidFeatures(TINY, temperature_steps=4),
        lambda: timm.create_model('kernelized', **KERNELIZED, temperature_steps=4),
    ],
)
def test_features_and_derived_networks(make):
    net = make().train()
    for expected in (0.75, 0.5):
        net(images())
        assert get_temperature(net) == expected
    assert get_temperature(net.eval()) == 0


def test_networks_of_the_meta_device():
    weights = timm.create_model(TINY).state_dict()
    for how in ('assigned', 'emptied'):
        with torch.device('meta'):
            net = timm.create_model(TINY, temperature_steps=4).train()
        if how == 'emptied':
            net.to_empty(device='cpu')
        net.load_state_dict(weights, assign=how == 'assigned')
        net(images())
        assert get_temperature(net) == 0.75


@pytest.mark.slow
def test_sharded():
    net, plain = (network(TINY).train() for _ in range(2))
    for each in (net, plain):
        anneal(each, 4)
    with drive_engines.one_process():
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=drive_engines.init_device_mesh('cpu', (1,)))
        for each in (net, plain):
            torch.manual_seed(0)  # Of its dropout.
            each(images()).square().mean().backward()
        assert get_temperature(net) == 0.75
        key, cells = next(iter(plain.warehouses.named_parameters()))
        torch.testing.assert_close(net.warehouses.get_parameter(key).grad.full_tensor(), cells.grad)


def test_layers_made_by_hand():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = Warehouse([(4, 3, 3, 3)])
            self.conv = KWConv2d(3, 4, 3, warehouse=self.cells)

        def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
            return {'features': [self.conv(x)]}

    net = Net()
    anneal(net, 4)
    net(images())['features'][0].sum().backward()
    other = Net()
    anneal(other, 4)
    other.load_state_dict(net.state_dict())
    assert get_temperature(other) == 0.75
    plain = Net()
    other.load_state_dict(plain.state_dict())
    assert get_temperature(other) == 0.75


def test_accumulated_batches_each_count_and_parts_of_a_detector_do():
    detector = nn.ModuleDict({'backbone': small()})
    detector.forward = lambda x: detector['backbone'](x)
    anneal(detector, 8)
    for _ in range(2):
        for i in range(3):
            (detector(batch(i)).square().mean() / 3).backward()
    assert get_temperature(detector) == 0.25
    assert get_temperature(detector['backbone']) == 0.25
    anneal(detector['backbone'], 2)  # Begins anew, by the calls of the backbone.
    assert get_temperature(detector) == 1
    detector(batch())
    assert get_temperature(detector) == 0.5


def test_one_way_of_annealing_at_a_time():
    net = small(4)
    ways = (lambda: set_temperature(net, 0.5), lambda: TemperatureSchedule(net, 2, 2))
    for way in ways:
        with pytest.raises(ValueError, match=r'anneals its temperature by itself.*anneal\(model, None\)'):
            way()
    anneal(net, None)
    for way in ways:
        way()
    anneal(net, 4)
    net.eval()
    assert get_temperature(net) == 0


@pytest.mark.parametrize('steps', [0, -1, float('nan'), float('inf')])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match='steps must be a number of training passes above 0'):
        anneal(small(), steps)
    with pytest.raises(ValueError, match='ResNet has no KW layer'):
        anneal(timm.create_model('resnet18'), 4)


def test_a_part_that_is_called_says_what_to_do():
    net = timm.create_model(TINY, temperature_steps=4).train()
    with pytest.raises(RuntimeError, match='annealed by the calls of KWMobileNetV2, which was not called'):
        net.forward_features(images())
    net.eval().forward_features(images())
    assert not any(isinstance(a.temperature, torch.Tensor) for a in net.modules() if isinstance(a, KWAttention))
