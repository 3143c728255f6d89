"""``pretrained=True`` fetches what neither store nor Hub has, through the installed entry point; and when not."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Fault
from hub_support import NAME, VARIANT, environment, leftovers, reference_shapes, synthetic
from huggingface_hub import constants
from kw_hub.manifest import find_entry
from reference_data import manifest

from kw_timm import load_static
from kw_timm.pyramid import PyramidFeatures
from kw_timm.weights import fetchers
from kw_timm.weights.store import WeightsNotFoundError, find_weights, store_folder

ROOT = Path(__file__).parents[1]
FILE = r'GET /uc\?id='
DETECTOR = 'mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco'


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> Path:
    """A folder for ``sys.path`` with what installing writes about this package's entry points."""
    folder = tmp_path_factory.mktemp('installed')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    about = folder / f'kw_timm-{project["version"]}.dist-info'
    about.mkdir()
    (about / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: kw-timm\nVersion: {project["version"]}\n')
    lines = []
    for group, points in project['entry-points'].items():
        lines += [f'[{group}]', *(f'{name} = {value}' for name, value in points.items())]
    (about / 'entry_points.txt').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.fixture
def host(hub, reference_file, installed, monkeypatch):
    """The authors' host with a network's file, and a Hub without repositories."""
    monkeypatch.syspath_prepend(installed)
    monkeypatch.delenv(fetchers.FORBID, raising=False)
    hub.drive[find_entry(VARIANT).file_id] = reference_file.read_bytes()
    return hub


def give(host, name: str, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """Lay a file of these weights on the authors' host."""
    torch.save(
        {'model': state_dict} if 'backbone' not in next(iter(state_dict)) else {'state_dict': state_dict}, folder
    )
    host.drive[find_entry(name).file_id] = folder.read_bytes()


def test_create_model_fetches_once(host, reference_file, capsys):
    model = timm.create_model(VARIANT, pretrained=True)
    theirs = torch.load(reference_file, weights_only=False)['model']
    assert torch.equal(model.fc.weight, theirs['fc.weight'])
    said = capsys.readouterr().err
    assert f"kw_timm: {NAME} comes from its authors' host, 127.0.0.1" in said
    assert f"'{store_folder(NAME)}' (KW_TIMM_FETCH=0 forbids it)" in said
    assert 'known answer agrees' in said
    assert 'KW_TIMM_FETCH' not in said.split('forbids it)', 1)[1]
    again = timm.create_model(VARIANT, pretrained=True, num_classes=0)
    assert torch.equal(again.conv1.weight, model.conv1.weight)
    assert host.count(FILE) == 1
    assert 'host' not in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_caller_set_changes_nothing(host):
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        find_weights(NAME)
    finally:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
    assert dtype == torch.float64
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert next(timm.create_model(VARIANT, pretrained=True).parameters()).dtype == torch.float32


@pytest.mark.parametrize('way', ['variable', 'offline'])
def test_it_can_be_forbidden(host, way, monkeypatch):
    if way == 'variable':
        monkeypatch.setenv('KW_TIMM_FETCH', '0')
    else:
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    name = 'KW_TIMM_FETCH=0' if way == 'variable' else 'HF_HUB_OFFLINE'
    with pytest.raises(WeightsNotFoundError, match=f'(?s){name}.*forbids to fetch.*kw-hub fetch {VARIANT}'):
        timm.create_model(VARIANT, pretrained=True)
    assert host.count(FILE) == 0


def test_without_the_extra_it_is_named(hub, monkeypatch):
    monkeypatch.setattr(fetchers, 'GROUP', 'kw_timm.nobody')
    with pytest.raises(WeightsNotFoundError, match=r'pip install .kw-timm\[hub\]'):
        find_weights(NAME)


def test_a_refusal_says_both_reasons_and_nothing_is_half(host):
    host.faults = [Fault(FILE, body=b'<!DOCTYPE html><html>Quota exceeded</html>', times=9)]
    with pytest.raises(
        WeightsNotFoundError, match=r'(?s)does not exist \(404\).*Nor were they fetched: .*download quota'
    ):
        timm.create_model(VARIANT, pretrained=True)
    assert not store_folder(NAME).exists()
    assert not leftovers(store_folder())


def test_hosts_that_do_not_answer(host, monkeypatch):
    host.shutdown()
    host.server_close()
    monkeypatch.setattr('time.sleep', lambda _: pytest.fail('waits to try again'))
    with pytest.raises(WeightsNotFoundError, match=r'(?s)cannot be reached.*127\.0\.0\.1:\d+ does not answer'):
        timm.create_model(VARIANT, pretrained=True)
    with pytest.raises(RuntimeError, match=r'does not answer'):
        PyramidFeatures('resnet18').load_pretrained('timm://resnet18.osvai_in1k')


@pytest.mark.slow
def test_two_processes_fetch_once(host, installed, tmp_path):
    code = f'import timm, kw_timm; timm.create_model({VARIANT!r}, pretrained=True); print("loaded")'
    env = environment(host, tmp_path)
    env['PYTHONPATH'] = ':'.join([str(installed), *sys.path])
    env.pop('HF_HUB_OFFLINE', None)
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all('loaded' in out for out, _ in outputs), outputs
    assert host.count(FILE) == 1
    assert sum("authors' host" in err for _, err in outputs) == 1


def test_the_authors_static_networks(host, tmp_path):
    name = 'mobilenetv2_050'
    weights = synthetic(reference_shapes(name))
    give(host, name, weights, tmp_path / 'static.pth')
    backbone = PyramidFeatures(name, out_indices=(0, 1))
    backbone.load_pretrained(f'timm://{name}.osvai_in1k')
    stem = next(iter(weights.values()))
    assert torch.equal(backbone.model.conv_stem.weight, stem)
    model = timm.create_model(f'kw1x_{name}')
    errors = load_static(model, f'{name}.osvai_in1k')
    assert max(errors.values()) < 1e-5
    assert host.count(FILE) == 1


@pytest.mark.slow
def test_a_detector_by_name(host, tmp_path, capsys):
    pytest.importorskip('mmdet', reason='needs MMDetection')
    from kw_mmdet.published import find_checkpoint

    body = {'neck.fpn_convs.0.conv.weight': torch.randn(4, 4), 'rpn_head.rpn_conv.weight': torch.randn(4, 4)}
    body['roi_head.mask_head.conv_logits.bias'] = torch.randn(80)
    backbone = synthetic(manifest('detection_kw1x_mobilenetv2_100'))
    give(host, DETECTOR, {f'backbone.{k}': v for k, v in backbone.items()} | body, tmp_path / 'detector.pth')
    file = find_checkpoint('published', f'somewhere/{DETECTOR}.py')
    assert file == store_folder(DETECTOR) / f'{DETECTOR}.pth'
    assert torch.equal(torch.load(file)['state_dict']['rpn_head.rpn_conv.weight'], body['rpn_head.rpn_conv.weight'])
    assert find_checkpoint(DETECTOR, 'my_config.py') == find_checkpoint(file, 'my_config.py') == file
    assert host.count(FILE) == 1
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint 'x\.pth'"):
        find_checkpoint('x.pth', DETECTOR)
    with pytest.raises(
        FileNotFoundError, match=r'(?s)No pretrained weights of my_config.*Nothing installed fetches them'
    ):
        find_checkpoint('published', 'my_config.py')
