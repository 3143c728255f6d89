"""`kw-timm inspect`: numbers against a direct computation, files, the page in a browser, and what is refused."""

import contextlib
import io
import math
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from networks import images, lively
from PIL import Image
from torch import nn

import kw_timm
from kw_timm import WarehousePlan, kernelize
from kw_timm.cli import main
from kw_timm.inspection import (
    Inspection,
    LayerFindings,
    WarehouseFindings,
    command,
    inspect_network,
    pictures,
    verdict,
)
from kw_timm.inspection.text import percent, unused_cells
from kw_timm.layers import KWLayer
from kw_timm.ops.straightforward import assemble_kernels

NAME = 'kw1d2x_mobilenetv2_050'


def tiny(weights: str = 'new') -> nn.Sequential:
    """Three convolutions, two of which share a warehouse."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    net = nn.Sequential(*layers)
    plan = {'own': WarehousePlan(['0'], cell_num_ratio=2), 'shared': WarehousePlan(['3', '5'])}
    kernelize(net, plan, weights=weights)
    return net


def kw_layers(net: nn.Module) -> dict[str, KWLayer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, KWLayer)}


def test_numbers_are_those_of_a_direct_computation():
    net, batch = lively(tiny()).double(), images(5, 16).double()
    found = inspect_network(net, batch)
    assert [(layer.name, layer.warehouse) for layer in found.layers] == [('0', 'own'), ('3', 'shared'), ('5', 'shared')]
    assert (found.images, found.skipped) == (5, ())
    attentions = {}
    layers = kw_layers(net)
    for name, layer in layers.items():
        layer.attention.register_forward_hook(lambda _, __, output, name=name: attentions.update({name: output}))
    with torch.no_grad():
        net(batch)
    for row in found.layers:
        layer, c = layers[row.name], attentions[row.name]
        kernels = assemble_kernels(c, layer.warehouse.weight.detach(), layer.spec)
        for values, variation in ((c, row.attention_variation), (kernels, row.kernel_variation)):
            expected = ((values - values.mean(0)).square().sum() / values.square().sum()).sqrt()
            assert variation == pytest.approx(float(expected), rel=1e-9)
            assert variation > 1e-3
        torch.testing.assert_close(row.mean, c.mean(0).float())
        torch.testing.assert_close(row.spread, c.std(0, correction=0).float())
        parts = c.abs() / c.abs().sum(-1, keepdim=True)
        expected = (-(parts * parts.log()).sum(-1)).exp().mean()
        assert row.effective_cells == pytest.approx(float(expected), rel=1e-9)
    shared = found.warehouses[1]
    assert (shared.name, shared.layers, shared.cells) == ('shared', ('3', '5'), shared.largest.shape[0])
    largest = torch.cat([attentions[name].flatten(0, 1) for name in ('3', '5')]).abs().amax(0)
    torch.testing.assert_close(shared.largest, largest.float())


def test_after_a_warm_start_nothing_varies_until_it_learns():
    net = tiny(weights='keep')
    found = inspect_network(net, images(3, 16))
    for layer in found.layers:
        assert (layer.kernel_variation, layer.attention_variation) == (0, 0)
        assert not layer.spread.any()
        assert layer.effective_cells == pytest.approx(1)
    assert verdict(found).startswith('Kernels do not vary between images at all')
    # Of two cells per mixture one is free, and not used yet.
    assert [len(w.unused) / w.cells for w in found.warehouses] == [0.5, 0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        net.train()(images(4, 16, seed=seed)).square().mean().backward()
        optimizer.step()
    assert all(layer.kernel_variation > 0 for layer in inspect_network(net, images(3, 16)).layers)


def test_cells_that_nobody_uses_are_found():
    net = lively(tiny())
    assert not any(w.unused for w in inspect_network(net, images(3, 16)).warehouses)
    for name in ('3', '5'):
        attention = kw_layers(net)[name].attention
        with torch.no_grad():
            for tensor in (attention.fc2.weight, attention.fc2.bias):
                tensor.unflatten(0, (attention.num_mixtures, -1))[:, 4] = 0
    found = inspect_network(net, images(3, 16))
    assert [w.unused for w in found.warehouses] == [(), (4,)]
    assert unused_cells(found).startswith('1 of ')


def test_the_network_is_left_as_it_was_also_after_errors():
    net = tiny()
    first, *others = [layer.attention for layer in kw_layers(net).values()]
    net.train()
    net[1].eval()
    first.temperature, others[0].temperature = 0.25, 1.0
    state = {key: value.clone() for key, value in net.state_dict().items()}

    def check() -> None:
        assert [a.temperature for a in (first, *others)] == [0.25, 1.0, 0.0]
        assert net.training
        assert not net[1].training
        assert not any(layer.attention._forward_hooks for layer in kw_layers(net).values())
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())

    at_temperature_0 = inspect_network(net, images(3, 16))
    check()
    assert max(layer.kernel_variation for layer in at_temperature_0.layers) > 0
    with pytest.raises(ValueError, match='3'):
        inspect_network(net, images(2, 16, channels=4))
    check()


def test_layers_called_twice_and_never():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(self.net(x))

    net = Twice()
    kernelize(net, {'all': WarehousePlan(['net', 'unused'])})
    found = inspect_network(lively(net), images(2, 8))
    assert [layer.name for layer in found.layers] == ['net (call 1)', 'net (call 2)']
    assert found.skipped == ('unused',)
    assert not torch.equal(found.layers[0].mean, found.layers[1].mean)


def test_what_cannot_be_inspected_is_said():
    with pytest.raises(ValueError, match='Sequential has no KW layer'):
        inspect_network(nn.Sequential(nn.Conv2d(3, 3, 1)), images())
    net = lively(tiny())
    with pytest.raises(ValueError, match='was optimized for inference'):
        inspect_network(kw_timm.optimize_for_inference(net), images())
    with pytest.raises(ValueError, match='no image'):
        inspect_network(net, [])
    one = inspect_network(net, images(1, 16))
    assert math.isnan(one.layers[0].kernel_variation)
    assert verdict(one).startswith('One image does not show')
    with torch.no_grad():
        kw_layers(net)['3'].attention.fc2.bias[0] = math.nan
    with pytest.raises(ValueError, match="attention of '3' gives numbers that are not finite"):
        inspect_network(net, images(2, 16))


@pytest.mark.parametrize(
    ('variations', 'text'),
    [
        ((0.0, 0.0001), r'by 0\.01 % at most \(in b\), .* hardly does anything yet \(less than 1 % everywhere\)'),
        ((0.05, 0.0), r'by 5\.00 % at most \(in a\), 2\.50 % in the median layer: .* a little \(1 % to 10 %\)'),
        ((0.1, 0.3), r'by 30\.0 % at most \(in b\), .* at work \(10 % or more in 2 of 2 layers\)'),
    ],
)
def test_verdict(variations, text):
    values = torch.ones(2, 3)
    layers = [LayerFindings(name, 'w', values, values, 3.0, 0.5, v) for name, v in zip('ab', variations, strict=True)]
    assert re.search(text, verdict(Inspection(2, tuple(layers), ())))


def test_networks_of_16_bits():
    net = lively(tiny())
    wide, narrow = inspect_network(net, images(3, 16)), inspect_network(net.bfloat16(), images(3, 16).bfloat16())
    for a, b in zip(wide.layers, narrow.layers, strict=True):
        assert b.kernel_variation == pytest.approx(a.kernel_variation, rel=0.3)


@pytest.mark.parametrize(
    ('part', 'text'),
    [
        (0, '0 %'),
        (1e-9, '1e-07 %'),
        (0.0001, '0.01 %'),
        (0.0123, '1.23 %'),
        (0.22, '22.0 %'),
        (1, '100 %'),
        (math.nan, '-'),
    ],
)
def test_percent(part, text):
    assert percent(part) == text


def test_heat_maps_keep_what_is_largest():
    values = torch.zeros(300, 500)
    values[7, 499], values[299, 0] = -3.0, 2.0
    small = pictures.pooled(values, 100)
    assert small.shape == (100, 100)
    assert (small[2, 99], small[99, 0]) == (-3, 2)
    assert small.count_nonzero() == 2
    assert pictures.pooled(values[:50, :60], 100).equal(values[:50, :60])
    assert pictures.pooled(values[:50], 100).shape == (50, 100)


def test_of_very_many_layers_some_are_drawn(monkeypatch):
    monkeypatch.setattr(pictures, '_MOST_ROWS', 10)
    values = torch.ones(2, 3) / 3
    owners = ['many'] * 28 + ['one', 'many']
    layers = tuple(LayerFindings(f'l.{i}', owner, values, values, 3.0, 0.5, 0.5) for i, owner in enumerate(owners))
    warehouses = tuple(WarehouseFindings(name, (), (1, 1), 1.0, values[0], ()) for name in ('many', 'one'))
    for draw in (pictures.draw_plan, pictures.draw_variation):
        names = [label.get_text() for label in draw(Inspection(2, layers, warehouses)).axes[0].get_yticklabels()]
        assert len(names) == 11
        assert {'l.0', 'l.28'} <= set(names)


def test_pages_of_large_networks_stay_small(tmp_path, monkeypatch):
    found = inspect_network(lively(tiny()), images(2, 16))
    command.write_files(found, tmp_path / 'large', 'x', [])
    size = sum(file.stat().st_size for file in (tmp_path / 'large').glob('attention*.png'))
    monkeypatch.setattr(command, '_MOST_BYTES', size - 1)
    monkeypatch.setattr(command, '_HEAT_MAPS', (240, 4))
    command.write_files(found, tmp_path / 'small', 'x', [])
    assert sum(file.stat().st_size for file in (tmp_path / 'small').glob('attention*.png')) < size


def run(*arguments) -> int:
    return main(['inspect', *map(str, arguments)])


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """A folder of three images, of different kinds and sizes."""
    folder = tmp_path_factory.mktemp('photos')
    for i, mode in enumerate(('RGB', 'L', 'RGBA')):
        picture = images(1, 80 + 16 * i, len(mode), seed=i)[0].mul(60).add(128).clamp(0, 255).byte()
        Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).numpy(), mode).save(folder / f'{i}.png')
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def inspected(photos, tmp_path_factory):
    """What the command printed, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp('inspected') / 'out'
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(NAME, photos, '--random-weights', '--size', 64, '--output', folder) == 0
    return printed.getvalue(), folder


@pytest.fixture(scope='module')
def plan():
    """The network's KW layers by name, and its warehouses."""
    net = timm.create_model(NAME)
    return kw_layers(net), net.warehouses


def test_the_command(inspected, plan):
    text, folder = inspected
    assert 'Seen: 3 images, 64 x 64 pixels' in text
    assert re.search(r'^blocks\.5\.1\.conv_pw +stage6_expand +4 +6 +[\d.]+ +[\d.]+ % +[\d.]+ %$', text, re.MULTILINE)
    assert re.search(r'^Kernels vary between images by [\d.]+ % at most', text, re.MULTILINE)
    layers, warehouses = plan
    names = {f'attention-{name}.png' for name in warehouses} | {'plan.png', 'kernel-variation.png', 'index.html'}
    assert {file.name for file in folder.iterdir()} == names
    for file in folder.glob('*.png'):
        with Image.open(file) as picture:
            assert min(picture.size) > 150
            assert len(picture.convert('RGB').reduce(4).getcolors(1 << 24)) > 20
    page = (folder / 'index.html').read_text()
    assert len(page) < 5e6
    assert page.count('<tr>') == 2 + len(layers) + len(warehouses)
    assert page.count('src="data:image/png;base64,') == page.count('src=') == len(names) - 1
    assert not re.search('<script|<link|https?:', page)


@pytest.mark.slow
@pytest.mark.parametrize('size', [(1200, 2000), (390, 844)])
def test_the_page_in_a_browser(inspected, plan, size, tmp_path):
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if browser is None:
        pytest.skip('needs chromium or google-chrome')
    address = (inspected[1] / 'index.html').as_uri()
    options = (
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--hide-scrollbars',
        f'--user-data-dir={tmp_path}/profile',
    )

    def browse(*more: str) -> str:
        done = subprocess.run(
            (browser, *options, *more, address), capture_output=True, text=True, timeout=200, check=True
        )
        return done.stdout

    dom = browse('--dump-dom')
    assert '<table class="layers">' in dom
    assert dom.count('<tr>') == 2 + sum(map(len, plan))
    browse('--window-size={},{}'.format(*size), f'--screenshot={tmp_path}/page.png')
    with Image.open(tmp_path / 'page.png') as opened:
        shown = opened.convert('RGB')
    assert shown.size == size
    colours = sorted(shown.getcolors(1 << 24), reverse=True)
    assert colours[0][1] == (255, 255, 255)
    assert colours[0][0] < 0.98 * size[0] * size[1]
    # Bars of the first picture, in the colours of three warehouses, several thousand pixels of each.
    saturated = [count for count, colour in colours if max(colour) - min(colour) > 60 and count > 300]
    assert len(saturated) >= 3
    assert shown.getpixel((size[0] - 1, size[1] // 2)) == (255, 255, 255)  # Nothing sticks out of the page.


@pytest.mark.parametrize('channels', [1, 3])
def test_images_are_prepared_as_the_network_evaluates_them(photos, channels):
    net = timm.create_model('resnet18', in_chans=channels)
    config = timm.data.resolve_model_data_config(net) | {'input_size': (channels, 48, 64)}
    loaded = list(command.load_images(command.find_images([photos]), config))
    assert [image.shape for image in loaded] == [(channels, 48, 64)] * 3
    assert all(abs(float(image.mean())) < 1.5 for image in loaded)
    if channels == 3:
        with Image.open(photos / '0.png') as first:
            expected = timm.data.create_transform(**config, is_training=False)(first)
        assert torch.equal(loaded[0], expected)
    with pytest.raises(ValueError, match='5 channels'):
        next(command.load_images([photos / '0.png'], config | {'input_size': (5, 48, 64)}))


def test_only_so_many_images_evenly_spread(tmp_path, photos, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(command, 'load_images', lambda files, config: seen.extend(files) or iter(images(2, 32)))
    monkeypatch.setattr(command, 'write_files', lambda *_: tmp_path)
    assert run(NAME, photos, photos, '--random-weights', '--limit', 2, '--output', tmp_path) == 0
    assert [file.name for file in seen] == ['0.png', '0.png']
    assert '2 images of 6' in capsys.readouterr().out


def test_weights_of_a_training_with_other_classes(tmp_path):
    net = timm.create_model(NAME, num_classes=7)
    state = net.state_dict()
    torch.save({'state_dict': {f'module.{key}': value for key, value in state.items()}}, tmp_path / 'x.pth')
    timm.models.save_for_hf(net, tmp_path / 'folder', safe_serialization=True)
    for arguments in ((NAME, tmp_path / 'x.pth'), (str(tmp_path / 'x.pth'),), (f'local-dir:{tmp_path}/folder',)):
        found = command.open_network(*arguments)
        assert not found.training
        assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


def test_what_cannot_be_done_is_said(tmp_path, photos, capsys, monkeypatch):
    def error(*arguments) -> str:
        assert run(*arguments, '--output', tmp_path / 'out') == 2
        text = capsys.readouterr().err.strip()
        assert text.startswith('kw-timm: error: ')
        assert not (tmp_path / 'out').exists()
        return text

    new = (NAME, '--random-weights')
    assert "'resnet18' has no KW layer" in error('resnet18')
    assert 'Did you mean kw1x_resnet18' in error('kw1x_resnet8')
    assert 'Invalid pretrained tag (foo)' in error('kw1x_resnet18.foo')
    assert 'Or give --checkpoint FILE, or --random-weights' in error(NAME)
    (tmp_path / 'bad.jpg').write_bytes(b'nothing')
    assert f"The image '{tmp_path}/bad.jpg' cannot be read" in error(*new, tmp_path / 'bad.jpg')
    assert "There is no image 'nowhere'" in error(*new, 'nowhere')
    (tmp_path / 'empty').mkdir()
    assert 'has no image' in error(*new, tmp_path / 'empty')
    assert 'not both' in error(*new, '--checkpoint', tmp_path / 'bad.jpg')
    assert 'bad.jpg' in error(NAME, '--checkpoint', tmp_path / 'bad.jpg')
    assert 'nowhere.pth' in error(NAME, '--checkpoint', 'nowhere.pth')
    assert 'nowhere' in error('local-dir:nowhere')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert "pip install 'kw-timm[inspect]'" in error(*new)


def test_where_nothing_can_be_written_is_said_first(tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    for folder, text in ((tmp_path / 'file', 'is a file'), (tmp_path / 'no/where', 'Make it first')):
        assert run('resnet18', '--output', folder) == 2
        assert text in capsys.readouterr().err
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize(
    'arguments', [('a', 'b', '--size', '64'), ('a', '--random-weights', 'b'), ('--limit', '9', '--', 'a', 'b')]
)
def test_images_may_stand_behind_options(arguments, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(command, 'run_inspect', lambda options, size: seen.extend(options.images) or 0)
    assert run(NAME, *arguments) == 0
    assert list(map(str, seen)) == ['a', 'b']
    with pytest.raises(SystemExit):
        run(NAME, *arguments[:2], '--no-such-option')
    assert 'unrecognized arguments: --no-such-option' in capsys.readouterr().err
