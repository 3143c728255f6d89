"""Setting and annealing the temperature."""

import copy

import pytest
import timm
import torch
from networks import images, network
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter

import kw_timm
from kw_timm import TemperatureSchedule, WarehousePlan, get_temperature, kernelize, set_temperature
from kw_timm.layers import KWAttention


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    kernelize(net, {'a': WarehousePlan(['0']), 'b': WarehousePlan(['2'])})
    return net


def temperatures(model: nn.Module) -> list[float]:
    return [module.temperature for module in model.modules() if isinstance(module, KWAttention)]


def test_is_zero_unless_set(net):
    assert get_temperature(net) == 0
    set_temperature(net, 0.25)
    assert temperatures(net) == [0.25, 0.25]
    assert get_temperature(net) == 0.25


def test_blends_linearly_between_attention_and_assignment(net):
    attention, x = net[0].attention, images()
    coefficients = {}
    for t in (0, 0.25, 1):
        set_temperature(net, t)
        coefficients[t] = attention(x)
    assert torch.equal(coefficients[1], attention.assignment[:, :-1].expand(2, -1, -1))
    torch.testing.assert_close(coefficients[0.25], 0.75 * coefficients[0] + 0.25 * coefficients[1])


def test_is_not_in_the_state_dict(net):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    set_temperature(net, 1)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    'wrap', [nn.DataParallel, torch.compile, ModelEmaV3, nn.Sequential, lambda net: nn.ModuleDict({'detector': net})]
)
def test_wrappers(net, wrap):
    wrapped = wrap(net)
    set_temperature(wrapped, 0.5)
    assert get_temperature(wrapped) == 0.5


def test_copies_keep_it_and_are_apart(net):
    set_temperature(net, 0.5)
    other = copy.deepcopy(net)
    set_temperature(net, 0)
    assert get_temperature(other) == 0.5


@pytest.mark.parametrize('value', [-0.1, 1.01, float('nan'), float('inf'), True + 1])
def test_outside_the_range(net, value):
    with pytest.raises(ValueError, match=r'must lie in \[0, 1\], got'):
        set_temperature(net, value)
    assert temperatures(net) == [0, 0]


def test_networks_without_kw_layers():
    model = timm.create_model('resnet18')
    for use in (lambda: set_temperature(model, 0.5), lambda: get_temperature(model)):
        with pytest.raises(ValueError, match='ResNet has no KW layer'):
            use()
    with pytest.raises(ValueError, match='ResNet has no KW layer'):
        TemperatureSchedule(model, 20, 100)


def test_layers_that_differ(net):
    net[0].attention.temperature = 0.5
    with pytest.raises(ValueError, match=r'differ in temperature: \[0.0, 0.5\]'):
        get_temperature(net)


def test_schedule(net):
    schedule = TemperatureSchedule(net, epochs=2, steps_per_epoch=5)
    assert get_temperature(net) == schedule.temperature == 1
    seen = []
    for _ in range(13):
        assert schedule.step() == get_temperature(net)
        seen.append(get_temperature(net))
    assert seen == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0])
    assert seen[-1] == 0


def test_schedule_resumes(net):
    schedule = TemperatureSchedule(net, 2, 5)
    for _ in range(4):
        schedule.step()
    saved = schedule.state_dict()
    resumed = TemperatureSchedule(net, 2, 5)
    assert get_temperature(net) == 1
    resumed.load_state_dict(saved)
    assert get_temperature(net) == pytest.approx(0.6)
    assert resumed.step() == pytest.approx(0.5)


@pytest.mark.parametrize(('epochs', 'steps'), [(0, 5), (-1, 5), (2, 0)])
def test_bad_schedules(net, epochs, steps):
    with pytest.raises(ValueError, match='epochs must be above 0 and steps_per_epoch at least 1'):
        TemperatureSchedule(net, epochs, steps)
    assert get_temperature(net) == 0


def test_annealing_does_not_compile_over_and_over(net):
    """torch.compile makes the temperature an input of its graph, rather than a constant per graph."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, x = torch.compile(net, backend=counter, fullgraph=True), images(size=8)
    for i in range(12):
        set_temperature(net, 1 - i / 11)
        torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count <= 3


@pytest.mark.parametrize('name', ['kw1d2x_mobilenetv2_050'])
def test_released_networks(name):
    model, x = network(name), images()
    with torch.no_grad():
        cold = model(x)
        kw_timm.set_temperature(model, 1)
        hot = model(x)
        kw_timm.set_temperature(model, 0)
        assert torch.equal(model(x), cold)
    assert not torch.allclose(hot, cold, rtol=0.1)
