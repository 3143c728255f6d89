"""Weights of a detector's backbone, as people name them."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch

from kw_timm.pyramid import PyramidFeatures
from kw_timm.weights import to_reference_state_dict
from kw_timm.weights.reach import unreachable


def save(folder, state_dict: Any, **more: Any) -> str:
    path = folder / 'weights.pth'
    torch.save(dict(state_dict=state_dict, **more), path)
    return str(path)


def renamed(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f'{prefix}{key}': value for key, value in state_dict.items()}


def assert_same(a: PyramidFeatures, b: PyramidFeatures) -> None:
    own, other = a.state_dict(), b.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in own.items())


def source(name: str, **kwargs: Any) -> PyramidFeatures:
    backbone = PyramidFeatures(name, **kwargs)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.uniform_(-1, 1)
    return backbone


@pytest.mark.parametrize(
    ('name', 'before', 'prefix'),
    [
        ('resnet18', 'backbone.', 'backbone.'),
        ('resnet18', 'module.backbone.', None),
        ('regnetx_002', 'backbone.', None),
        ('kw1x_resnet18', 'backbone.', 'backbone'),
        ('kw1d2x_mobilenetv2_050', 'backbone.', None),
        ('kw1x_convnext_tiny', 'teacher.backbone.', 'teacher.backbone.'),
        ('kw1x_mobilenetv2_050', '', None),
    ],
)
def test_a_detector_of_ours(name, before, prefix, tmp_path):
    detector = source(name)
    others = {} if before == '' else {'rpn_head.rpn_conv.weight': torch.zeros(1), 'ema_backbone_x': torch.zeros(1)}
    file = save(tmp_path, renamed(detector.state_dict(), before) | others, meta=dict(epoch=3), optimizer={})
    backbone = PyramidFeatures(name)
    backbone.load_pretrained(file, prefix)
    assert_same(backbone, detector)


@pytest.mark.parametrize('name', ['kw1x_resnet18', 'kw1x_mobilenetv2_050', 'kw1x_convnext_tiny'])
def test_a_detector_of_the_reference(name, tmp_path):
    network = timm.create_model(name)
    trunk = to_reference_state_dict(network)
    norms = {f'norm{i}.{part}': torch.rand(c) for i, c in enumerate((96, 192, 384, 768)) for part in ('weight', 'bias')}
    norms = norms if 'convnext' in name else {}
    file = save(tmp_path, renamed(trunk | norms, 'backbone.') | {'neck.x': torch.zeros(1)})
    backbone = PyramidFeatures(name)
    backbone.load_pretrained(file)
    own = backbone.state_dict()
    for key, value in network.state_dict().items():
        if f'model.{key}' in own:
            assert torch.equal(own[f'model.{key}'], value)
    assert all(torch.equal(own[key], value) for key, value in norms.items())


def test_a_static_detector_and_fewer_levels(tmp_path):
    """As MMDetection's own checkpoints name a ResNet; and levels that were not trained are not missed."""
    network = timm.create_model('resnet18')
    file = save(tmp_path, renamed(network.state_dict(), 'backbone.'))
    backbone = PyramidFeatures('resnet18', out_indices=(0, 1))
    backbone.load_pretrained(file)
    assert torch.equal(backbone.model.layer2[1].conv2.weight, network.layer2[1].conv2.weight)
    detector = source('kw1x_resnet18', out_indices=(0, 1))
    with pytest.raises(ValueError, match='do not fit kw1x_resnet18'):
        PyramidFeatures('kw1x_resnet18').load_pretrained(save(tmp_path, renamed(detector.state_dict(), 'backbone.')))


def test_files_that_do_not_fit(tmp_path):
    static = save(tmp_path, renamed(timm.create_model('resnet18').state_dict(), 'backbone.'))
    for prefix in (None, 'backbone.'):
        with pytest.raises(ValueError, match='static network, the model is kw1x_resnet18'):
            PyramidFeatures('kw1x_resnet18').load_pretrained(static, prefix)
    with pytest.raises(ValueError, match=r"begins with prefix='neck\.'; theirs begin with backbone\."):
        PyramidFeatures('resnet18').load_pretrained(static, 'neck')
    with pytest.raises(ValueError, match='do not fit mobilenetv2_050'):
        PyramidFeatures('mobilenetv2_050').load_pretrained(static)


@pytest.fixture(params=['refuses', 'says nothing'])
def dead_host(request) -> Iterator[str]:
    """Address of a host that refuses connections, or takes them and never answers."""
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    address = f'http://127.0.0.1:{listener.getsockname()[1]}'
    if request.param == 'refuses':
        listener.close()
        yield address
    else:
        listener.listen(8)
        yield address
        listener.close()


@pytest.mark.parametrize('name', ['resnet18', 'kw1x_resnet18'])
def test_nothing_is_tried_again_where_the_hub_is_not(name, dead_host, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', dead_host)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setenv('KW_TIMM_HOME', str(tmp_path / 'store'))
    monkeypatch.setattr('kw_timm.weights.reach.SECONDS', 0.3)
    monkeypatch.setattr('time.sleep', lambda _: pytest.fail('waits to try again'))
    with pytest.raises(RuntimeError, match=r'(?s)No pretrained weights .*cannot be reached.*checkpoint=FILE'):
        PyramidFeatures(name, out_indices=(0,)).load_pretrained()
    with pytest.raises(RuntimeError, match=r'does not answer'):
        PyramidFeatures(name, out_indices=(0,)).load_pretrained(f'{dead_host}/weights.pth')


def test_any_answer_counts():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(1)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n')

        thread = threading.Thread(target=answer)
        thread.start()
        assert unreachable(f'http://127.0.0.1:{listener.getsockname()[1]}/x') is None
        thread.join()
    assert unreachable('http://127.0.0.1:9/') is not None
    assert unreachable('no address') is not None
