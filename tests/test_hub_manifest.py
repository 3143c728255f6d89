"""The manifest agrees with the published numbers and the networks; tables are generated from it; the command line."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
from hub_support import NAME, REPOSITORY, VARIANT, tree_of
from huggingface_hub import constants
from kw_hub.cli import main
from kw_hub.errors import HubError
from kw_hub.manifest import MANIFEST, find_entry, load_manifest
from kw_hub.tables import classification_table, detection_table, with_tables
from reference_data import ROOT

from kw_timm.weights.exact import Network

COMMANDS = ['list', 'fetch', 'convert', 'verify', 'export', 'publish', 'tables']
README = Path(__file__).parents[1] / 'README.md'


def test_every_weight_is_there_once():
    entries = load_manifest()
    assert Counter(entry.kind for entry in entries) == {'kw': 15, 'static': 5, 'detector': 8}
    for values in ([e.name for e in entries], [e.file_id for e in entries], [e.repository for e in entries]):
        assert len(set(values)) == len(entries)
    assert {e.network for e in entries if e.kind == 'kw'} == set(
        timm.list_models('kw*', pretrained=True, include_tags=False)
    )


def test_metrics_and_file_ids_are_the_published_ones():
    published = json.loads((ROOT / 'published.json').read_text())
    entries = load_manifest()
    for row in published['classification']:
        entry = next(e for e in entries if e.network == row['name'] and e.kind != 'detector')
        assert entry.metrics == {'top1': row['top1'], 'top5': row['top5']}
        assert entry.file_id == row['google_drive_id']
    for row in published['detection']:
        entry = next(e for e in entries if e.network == row['backbone'] and e.kind == 'detector')
        assert entry.metrics == {'box_ap': row['box_ap'], 'mask_ap': row['mask_ap']}
        assert entry.file_id == row['google_drive_id']
        assert (README.parent / entry.config).is_file()


@pytest.mark.parametrize('entry', [e for e in load_manifest() if e.kind != 'detector'], ids=lambda e: e.name)
def test_parameter_counts_are_exact(entry):
    assert sum(p.numel() for p in Network(entry.network).skeleton().parameters()) == entry.parameters


def test_detector_parameter_counts_are_exact():
    models = pytest.importorskip('mmdet.models', reason='needs MMDetection')
    import kw_mmdet  # noqa: F401
    from mmcv import Config

    entry = find_entry('mask_rcnn_kw1x_mobilenetv2_100_fpn_1x_coco')
    detector = models.build_detector(Config.fromfile(str(README.parent / entry.config)).model)
    assert sum(p.numel() for p in detector.parameters()) == entry.parameters


def test_readme_has_the_manifests_tables():
    """Drift: run `kw-hub tables README.md`."""
    assert with_tables(README) == README.read_text()


def test_tables_command_brings_a_file_up_to_date(tmp_path, capsys):
    text = README.read_text()
    stale = text.replace('81.05', '99.99').replace('42.4 / 38.9', '99.9 / 99.9')
    assert stale != text
    file = tmp_path / 'README.md'
    file.write_text(stale)
    assert main(['tables', str(file)]) == 0
    assert file.read_text() == text
    assert main(['tables', str(file)]) == 0
    assert 'up to date' in capsys.readouterr().out
    file.write_text('no marks')
    assert main(['tables', str(file)]) == 1
    assert file.read_text() == 'no marks'


def test_tables_say_what_was_published():
    assert '| `kw4x_resnet50` | 102,015,144 | 81.05 | 95.21 | 78.44 |' in classification_table()
    assert '| ConvNeXt-Tiny | 43.4 / 39.7 | 44.7 / 40.6 |  |' in detection_table()


def test_unknown_names_get_suggestions():
    with pytest.raises(HubError, match='Did you mean kw4x_resnet50'):
        find_entry('kw4x_resnet5')
    with pytest.raises(HubError, match='kw-hub list'):
        find_entry('???')
    assert find_entry('kw4x_resnet50') == find_entry('kw4x_resnet50.osvai_in1k')


def test_list_says_where_weights_are(hub, stored, converted_folder, capsys):
    from kw_timm.weights.store import find_weights

    other = 'kw1x_resnet18'
    hub.add(f'kw-timm/{other}.osvai_in1k', tree_of(converted_folder))
    find_weights(f'{other}.osvai_in1k')
    hub.add('kw-timm/resnet50.osvai_in1k', {'config.json': b'{}'})
    assert main(['list']) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert re.search(r"4,031,768 +72\.73 top-1  store, authors' host", rows[VARIANT])
    assert rows[other].endswith("Hub cache, Hub, authors' host")
    assert rows['resnet50'].endswith("Hub, authors' host")
    assert '42.40 box AP' in rows['mask_rcnn_kw4x_resnet50_fpn_1x_coco']
    assert len(rows) == 1 + len(load_manifest())
    asked = len(hub.log)
    assert main(['list', '--offline']) == 0
    assert len(hub.log) == asked


def test_list_without_the_hub(hub, capsys, monkeypatch):
    hub.shutdown()
    hub.server_close()
    assert main(['list']) == 0
    assert 'could not be asked' in capsys.readouterr().out
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert main(['list']) == 0
    assert 'HF_HUB_OFFLINE is set' in capsys.readouterr().out


@pytest.mark.parametrize('command', COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, '--help'])
    assert ended.value.code == 0
    assert f'example: kw-hub {command}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['fetch', 'kw9x_resnet50'], 'Did you mean'),
        (['convert', 'nowhere.pth'], "no weight file 'nowhere.pth'"),
        (['convert', '.'], 'is a folder'),
        (['verify', 'nowhere.pth'], "no file or folder 'nowhere.pth'"),
        (['export', VARIANT, '--to-reference', 'x.pth'], 'kw-hub fetch'),
        (['publish', VARIANT, '--to', 'org'], 'kw-hub fetch'),
        (['tables', 'nowhere.md'], 'nowhere.md'),
    ],
)
def test_mistakes_are_no_tracebacks(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('KW_TIMM_HOME', str(tmp_path / 'store'))
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith('kw-hub: error: ')
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_convert_verify_export_from_the_command_line(reference_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('KW_TIMM_HOME', str(tmp_path / 'store'))
    assert main(['convert', str(reference_file)]) == 0
    assert (tmp_path / NAME / 'config.json').exists()
    assert main(['convert', str(reference_file)]) == 1
    assert main(['convert', str(reference_file), '--force', '--weights', 'model']) == 0
    assert main(['convert', str(reference_file), '--store']) == 0
    for what in (VARIANT, NAME, str(reference_file), f'{NAME}/model.safetensors'):
        assert main(['verify', what]) == 0, what
    assert main(['export', VARIANT, '--to-reference', 'back.pth']) == 0
    assert main(['export', VARIANT, '--to-reference', 'back.pth']) == 1
    assert main(['verify', 'back.pth']) == 0
    assert main(['export', VARIANT, '--backbone', 'backbone']) == 1
    assert 'no detector' in capsys.readouterr().err


def test_interrupt(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('kw_hub.fetch.fetch', interrupted)
    assert main(['fetch', VARIANT]) == 130
    assert 'interrupted' in capsys.readouterr().err


@pytest.mark.slow
def test_closed_pipe():
    command = f'{sys.executable} -m kw_hub list --offline | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == '0'
    assert 'Traceback' not in done.stderr


def test_verify_a_repository_that_is_not_there(hub, capsys):
    assert main(['verify', REPOSITORY]) == 1
    assert main(['verify', VARIANT]) == 1
    assert 'Traceback' not in capsys.readouterr().err


def test_manifest_holds_no_machine():
    assert not re.search(r'/home/|/tmp/|127\.0\.0\.1', MANIFEST.read_text())
