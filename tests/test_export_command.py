"""`kw-timm export`: files are whole or not there, are run and compared, and what cannot be done is said."""

import onnxruntime
import pytest
import timm
import torch
from networks import images

from kw_timm import WarehousePlan, export, kernelize
from kw_timm.cli import main
from kw_timm.random_weights import enliven

NAME = 'kw1d2x_mobilenetv2_050'


def run(*arguments) -> int:
    return main(['export', *map(str, arguments)])


def test_onnx(tmp_path, capsys):
    file = tmp_path / 'net.onnx'
    assert run(NAME, '--to', 'onnx', '--output', file, '--size', 64, '--dynamic', '--random-weights') == 0
    text = capsys.readouterr().out
    assert 'batches of 1, 2, 5: largest relative difference from torch' in text
    assert 'onnxruntime' in text
    assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    assert session.run(None, {'images': images(3, 96).numpy()})[0].shape == (3, 1000)


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [(), ('--dynamic',)])
@pytest.mark.parametrize('optimized', [(), ('--optimized',)])
@pytest.mark.parametrize('to', ['torch', 'openvino', 'onnx'])
def test_every_way(to, optimized, dynamic, tmp_path, capsys):
    if to == 'openvino':
        pytest.importorskip('openvino')
    file = tmp_path / f'net{export.ENDINGS[to]}'
    assert run(NAME, '--to', to, '--output', file, '--size', 64, '--random-weights', *optimized, *dynamic) == 0
    assert ('torch, optimized' in capsys.readouterr().out) == bool(optimized)


@pytest.mark.parametrize('dynamic', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_beside_the_file(dynamic, tmp_path, monkeypatch):
    monkeypatch.setattr(export, '_LARGEST_ONNX', 1000)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(64, 8, 1))
    kernelize(net, {'first': WarehousePlan(['0'], 2), 'second': WarehousePlan(['2'], 2)})
    enliven(net.eval(), torch.Generator().manual_seed(0))
    export.export_file(net, tmp_path / 'net.onnx', 'onnx', (2, 64, 64), dynamic)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['net.onnx', 'net.onnx.data']
    session = onnxruntime.InferenceSession(tmp_path / 'net.onnx', providers=['CPUExecutionProvider'])
    with torch.no_grad():
        for x in (images(), *([images(5, 49)] if dynamic else [])):
            ours, theirs = torch.from_numpy(session.run(None, {'images': x.numpy()})[0]), net(x)
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_checkpoint_of_a_training_is_taken_for_what_it_is(tmp_path):
    net = timm.create_model(NAME, num_classes=7)
    weights = {f'module.{key}': value for key, value in net.state_dict().items()}
    torch.save({'epoch': 3, 'state_dict': weights}, tmp_path / 'last.pth')
    found = export.load_network(str(tmp_path / 'last.pth'))
    assert not found.training
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())


def test_what_cannot_be_done_is_said(tmp_path, capsys, monkeypatch):
    def error(*arguments) -> str:
        assert run(*arguments) == 2
        text = capsys.readouterr().err.strip()
        assert text.startswith('kw-timm: error: ')
        assert not list(tmp_path.glob('net*'))
        return text

    onnx = ('--to', 'onnx', '--output', tmp_path / 'net.onnx')
    assert "must end in '.pt2' for --to torch" in error(NAME, '--to', 'torch', '--output', tmp_path / 'net.onnx')
    assert 'Did you mean kw1x_resnet18' in error('kw1x_resnet8', *onnx, '--random-weights')
    assert '--random-weights' in error(NAME, *onnx)
    (tmp_path / 'weights.pth').write_bytes(b'nothing')
    assert 'weights.pth' in error(tmp_path / 'weights.pth', *onnx)
    torch.save({'some': torch.ones(1)}, tmp_path / 'weights.pth')
    assert 'of no released variant' in error(tmp_path / 'weights.pth', *onnx)
    monkeypatch.setattr(export, 'find_spec', lambda name: None)
    assert "pip install 'kw-timm[export]'" in error(NAME, *onnx)


def test_an_exporter_that_fails_is_quoted_and_leaves_nothing(tmp_path):
    class Fails(torch.nn.BatchNorm2d):
        def forward(self, x):
            raise TypeError('no such\nthing')

    with pytest.raises(ValueError, match=r'Fails cannot be exported to torch: .*no such thing'):
        export.export_file(Fails(3), tmp_path / 'net.pt2', 'torch', (2, 8, 8))
    assert not list(tmp_path.iterdir())
