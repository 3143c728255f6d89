"""Publishing to a Hub on loopback with the real client: what lies there afterwards, twice, broken off, refused."""

import json
import re

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import Fault
from hub_support import NAME, VARIANT, synthetic, tree_of
from huggingface_hub import ModelCard, constants
from kw_hub.card import check_card, model_card
from kw_hub.cli import main
from kw_hub.convert import convert_file
from kw_hub.errors import HubError
from kw_hub.manifest import find_entry, load_manifest
from kw_hub.publish import plan, publish
from kw_hub.verify import verify_repository
from PIL import Image
from reference_data import manifest

ORG = 'our-org'
REPOSITORY = f'{ORG}/{NAME}'


@pytest.fixture
def entry():
    return find_entry(VARIANT)


def published(hub) -> dict[str, bytes]:
    return hub.repositories[REPOSITORY].resolve('v1')[1]


def test_published_repository_is_complete_and_loads(hub, stored, entry, monkeypatch, capsys):
    assert main(['publish', VARIANT, '--to', ORG]) == 0
    assert 'did set the tag v1' in capsys.readouterr().out
    tree = published(hub)
    assert sorted(tree) == [
        '.gitattributes',
        'README.md',
        'config.json',
        'known_answer.safetensors',
        'model.safetensors',
    ]
    assert all(tree[name] == content for name, content in tree_of(stored).items())
    config = json.loads(tree['config.json'])
    assert config['architecture'] == VARIANT
    assert config['pretrained_cfg']['interpolation'] == 'bicubic'
    assert f"timm.create_model('hf-hub:{REPOSITORY}@v1', pretrained=True)" in tree['README.md'].decode()
    # As somebody else, without a store, from that organisation.
    monkeypatch.setenv('KW_TIMM_HOME', str(stored.parent / 'other'))
    monkeypatch.setenv('KW_TIMM_HUB_ORG', ORG)
    model = timm.create_model(VARIANT, pretrained=True)
    assert torch.equal(model.fc.bias, timm.create_model(f'local-dir:{stored}', pretrained=True).fc.bias)
    assert main(['verify', REPOSITORY]) == 0
    assert main(['verify', VARIANT]) == 0
    assert 'known answer agrees' in capsys.readouterr().out


def test_publishing_twice_changes_nothing(hub, stored, entry, capsys):
    publish(entry, ORG)
    commits, tags = list(hub.repositories[REPOSITORY].commits), dict(hub.repositories[REPOSITORY].tags)
    writes = hub.count('^(POST|PUT)')
    assert publish(entry, ORG).lines() == []
    assert main(['publish', VARIANT, '--to', ORG]) == 0
    assert 'nothing to do' in capsys.readouterr().out
    assert hub.repositories[REPOSITORY].commits == commits
    assert hub.repositories[REPOSITORY].tags == tags
    assert hub.count('^(POST|PUT)') == writes


@pytest.mark.parametrize(
    'breaks_at',
    ['POST /api/repos/create', 'PUT /upload', 'POST /verify', 'POST .*/commit/', 'POST .*/tag/', 'POST .*/preupload'],
)
def test_broken_off_publish_goes_on(hub, stored, entry, breaks_at, capsys, monkeypatch):
    hub.faults = [Fault(breaks_at, 500, times=99)]
    assert main(['publish', VARIANT, '--to', ORG]) == 1
    said = capsys.readouterr().err
    assert '500' in said
    assert 'goes on where it stopped' in said
    # Whatever there is, nobody loads it: the pinned tag comes last.
    repository = hub.repositories.get(REPOSITORY)
    assert repository is None or repository.tags == {}
    sent_before = set(hub.objects)
    hub.faults, hub.log = [], []
    publish(entry, ORG)
    assert sorted(published(hub))[1:] == ['README.md', 'config.json', 'known_answer.safetensors', 'model.safetensors']
    # Large files that had arrived are not sent again.
    assert not [digest for digest in sent_before if hub.count(f'PUT /upload/{digest}')]


def test_only_what_changed_is_sent_and_weights_of_a_revision_do_not_change(hub, stored, entry, monkeypatch):
    publish(entry, ORG)
    monkeypatch.setattr('kw_hub.publish.model_card', lambda *args: model_card(*args) + '\nOne more line.\n')
    hub.log = []
    assert [line.partition(' (')[0] for line in publish(entry, ORG).lines()] == ['upload README.md']
    assert hub.count('PUT /upload') == 0
    assert hub.repositories[REPOSITORY].resolve('main')[1]['README.md'].endswith(b'One more line.\n')

    other = {**published(hub), 'model.safetensors': b'something else'}
    hub.add(REPOSITORY, other, tag='v1')
    with pytest.raises(HubError, match=r'as v1 with another model\.safetensors.*--revision'):
        publish(entry, ORG)
    assert publish(entry, ORG, 'v2').tag
    assert hub.repositories[REPOSITORY].resolve('v1')[1]['model.safetensors'] == b'something else'


def test_dry_run_changes_nothing_and_shows_the_card(hub, stored, capsys):
    assert main(['publish', VARIANT, '--to', ORG, '--dry-run']) == 0
    out = capsys.readouterr().out
    assert f'would create the repository {REPOSITORY}' in out
    assert re.search(r'would upload model\.safetensors \(16,\d+,\d+ bytes\)', out)
    assert 'library_name: timm' in out
    assert hub.repositories == {}
    assert hub.count('^(POST|PUT)') == 0


def test_dry_run_works_without_the_hub(hub, stored, capsys, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert main(['publish', VARIANT, '--to', ORG, '--dry-run']) == 0
    captured = capsys.readouterr()
    assert 'would upload README.md' in captured.out
    assert 'was not compared' in captured.err
    assert main(['publish', VARIANT, '--to', ORG]) == 1


def test_without_a_token_that_may_write(hub, stored, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    assert main(['publish', VARIANT, '--to', ORG]) == 1
    assert 'hf auth login' in capsys.readouterr().err
    assert hub.repositories == {}


def test_what_is_not_in_the_store_or_damaged_is_not_published(hub, stored, capsys):
    assert main(['publish', 'kw1x_resnet18', '--to', ORG]) == 1
    assert 'kw-hub fetch kw1x_resnet18' in capsys.readouterr().err
    (stored / 'known_answer.safetensors').write_bytes(b'damaged')
    assert main(['publish', VARIANT, '--to', ORG]) == 1
    assert hub.repositories == {}


def test_published_file_that_is_changed_is_noticed(hub, stored, entry):
    publish(entry, ORG)
    hub.repositories[REPOSITORY].resolve('v1')[1]['config.json'] = b'{'
    with pytest.raises(HubError, match='cannot be read'):
        verify_repository(REPOSITORY)


def test_detector_is_published(hub, tmp_path, monkeypatch):
    name = 'mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco'
    body = {'rpn_head.rpn_conv.weight': (4, 4), 'roi_head.mask_head.conv_logits.bias': (80,)}
    backbone = {f'backbone.{key}': shape for key, shape in manifest('detection_kw1x_mobilenetv2_100').items()}
    torch.save({'meta': {}, 'state_dict': synthetic(backbone | body)}, tmp_path / 'file.pth')
    convert_file(tmp_path / 'file.pth', store=True, quiet=True)
    publish(find_entry(name), ORG)
    tree = hub.repositories[f'{ORG}/{name}'].resolve('v1')[1]
    assert sorted(tree) == ['.gitattributes', 'README.md', f'{name}.pth']
    assert f'dist_test.sh configs/mask_rcnn/{name}.py {name}.pth' in tree['README.md'].decode()
    assert verify_repository(f'{ORG}/{name}')
    assert plan(find_entry(name), ORG).lines() == []


@pytest.mark.parametrize('entry', load_manifest(), ids=lambda e: e.name)
def test_every_model_card_has_the_hubs_metadata(entry):
    text = model_card(entry)
    card = ModelCard(text)
    check_card(text, entry, ask_hub=False)
    first = {'kw': 'import kw_timm, timm', 'static': 'import timm', 'detector': 'import kw_mmdet'}[entry.kind]
    assert card.text.strip().split('\n\n')[1].startswith(f'```python\n{first}')
    data = card.data
    assert data.license == 'apache-2.0'
    assert data.library_name == ('mmdetection' if entry.kind == 'detector' else 'timm')
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert list(values.values()) == list(entry.metrics.values())
    index = yaml.safe_load(text.split('---')[1])['model-index']
    assert index[0]['results'][0]['dataset']['type'] == (
        'detection-datasets/coco' if entry.kind == 'detector' else 'imagenet-1k'
    )
    assert f'{entry.parameters:,}' in text
    assert '2406.07879' in text
    for word in ('## With timm', '## With MMDetection', '## Citation'):
        assert word in text
    if entry.kind != 'detector':
        # The code in the card names this network, and is code.
        code = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
        for block in code:
            compile(block, entry.name, 'exec')
        assert entry.network in text


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (lambda text: text.replace('license:', 'licence:'), 'lacks license'),
        (lambda text: text.replace('model-index:', 'results:'), 'lacks .*model-index'),
        (lambda text: text.replace('import kw_timm, timm, torch', 'x = 1'), 'no import'),
        (lambda text: text.replace('with torch', 'with with torch'), 'invalid syntax'),
        (lambda text: text.replace('---\n', '---\n[\n', 1), 'not published'),
    ],
)
def test_a_wrong_card_is_not_published(hub, stored, entry, wrong, message, monkeypatch):
    monkeypatch.setattr('kw_hub.publish.model_card', lambda *args: wrong(model_card(*args)))
    with pytest.raises(HubError, match=message):
        publish(entry, ORG)
    assert hub.repositories == {}


def test_the_hub_may_refuse_a_card(hub, stored, entry):
    hub.faults = [Fault('POST /api/validate-yaml', 400, times=1)]
    with pytest.raises(HubError, match=r'not published: .*on request'):
        publish(entry, ORG)
    assert hub.repositories == {}
    publish(entry, ORG)
    assert hub.count('POST /api/validate-yaml') >= 2  # the client asks once more with its commit


def run_card(tree: dict[str, bytes], folder) -> dict:
    """Run the first code of a published card, on a photograph of noise."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)).save(folder / 'photo.jpg')
    code = re.findall(r'```python\n(.*?)```', tree['README.md'].decode(), re.DOTALL)[0]
    names: dict = {}
    exec(compile(code, 'card', 'exec'), names)
    return names


def test_the_cards_code_runs(hub, stored, entry, tmp_path, monkeypatch):
    publish(entry, ORG)
    monkeypatch.chdir(tmp_path)
    assert run_card(published(hub), tmp_path)['classes'].shape == (1, 5)


@pytest.mark.slow
def test_a_detectors_cards_code_runs(hub, tmp_path, monkeypatch):
    pytest.importorskip('mmdet', reason='needs MMDetection')
    from kw_mmdet.generation import build
    from kw_mmdet.programs import load_config

    from kw_timm.weights.detectors import detector_to_ours, detector_to_reference

    name = 'mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco'
    own = {k: v for k, v in build(load_config(name)).state_dict().items() if not k.startswith('backbone.')}
    backbone = {f'backbone.{k}': s for k, s in manifest('detection_kw1x_mobilenetv2_100').items()}
    reference = detector_to_reference(detector_to_ours(synthetic(backbone) | own))
    torch.save({'meta': {}, 'state_dict': reference}, tmp_path / 'file.pth')
    convert_file(tmp_path / 'file.pth', store=True, quiet=True)
    publish(find_entry(name), ORG)
    monkeypatch.chdir(tmp_path)
    names = run_card(hub.repositories[f'{ORG}/{name}'].resolve('v1')[1], tmp_path)
    assert len(names['detector'].names) == 80


def test_plan_of_a_new_repository(hub, stored, entry):
    todo = plan(entry, ORG)
    assert todo.create
    assert todo.tag
    assert len(todo.files) == 4
