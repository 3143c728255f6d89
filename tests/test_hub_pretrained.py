"""Where ``pretrained=True`` finds weights, and what happens when the store or the Hub fails; with the real client."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Fault
from hub_support import NAME, REPOSITORY, VARIANT, environment, full_disk, leftovers, python, tree_of
from huggingface_hub import constants

from kw_timm.weights.store import (
    DamagedWeightsError,
    WeightsNotFoundError,
    find_weights,
    hub_file,
    hub_repository,
    store_folder,
)

LFS_GET = r'GET /lfs/'
HEAD = r'HEAD /.*model\.safetensors'


@pytest.fixture
def tree(converted_folder) -> dict[str, bytes]:
    return tree_of(converted_folder)


@pytest.fixture
def published(hub, tree):
    """The Hub with the converted weights on it."""
    hub.add(REPOSITORY, tree)
    return hub


def cache(hub) -> Path:
    return Path(constants.HF_HUB_CACHE)


def blobs(hub) -> list[Path]:
    return [path for path in cache(hub).rglob('blobs/*') if path.is_file()]


def assert_nothing_half(hub) -> None:
    assert not leftovers(cache(hub))
    for blob in blobs(hub):
        assert blob.stat().st_size in {len(content) for content in hub.objects.values()}


def test_store_comes_first(published, stored):
    model = timm.create_model(VARIANT, pretrained=True)
    assert model.pretrained_cfg['file'] == str(stored / 'model.safetensors')
    assert published.log == []


def test_hub_comes_second_and_is_cached(published, tree, monkeypatch):
    from safetensors.torch import load

    model = timm.create_model(VARIANT, pretrained=True)
    expected = load(tree['model.safetensors'])
    assert torch.equal(model.fc.bias, expected['fc.bias'])
    assert published.count(LFS_GET) == 1
    assert published.count(rf'/{REPOSITORY}/resolve/v1/') > 0
    timm.create_model(VARIANT, pretrained=True)
    assert published.count(LFS_GET) == 1
    # And without any network.
    before = len(published.log)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    timm.create_model(VARIANT, pretrained=True, features_only=True, out_indices=(1, 2))
    assert len(published.log) == before


@pytest.mark.parametrize('features_only', [False, True])
def test_timms_own_forms(published, stored, features_only, monkeypatch):
    args = {'features_only': True, 'out_indices': (2, 3)} if features_only else {}
    x = torch.randn(1, 3, 64, 64)
    answers = []
    names = (VARIANT, NAME, f'hf-hub:{REPOSITORY}@v1', f'hf-hub:{REPOSITORY}', f'local-dir:{stored}')
    for name in names:
        model = timm.create_model(name, pretrained=True, **args).eval()
        with torch.no_grad():
            answer = model(x)
        answers.append(answer if features_only else [answer])
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[0], strict=True))
    # Cached, they need no network.
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    asked = len(published.log)
    for name in names:
        timm.create_model(name, pretrained=True, **args)
    assert len(published.log) == asked


def test_other_heads_and_channels_from_the_hub(published):
    model = timm.create_model(VARIANT, pretrained=True, num_classes=5, in_chans=1).eval()
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_sources_that_the_user_names_are_left_alone(published, reference_file):
    timm.create_model(VARIANT, pretrained=True, pretrained_cfg_overlay={'file': str(reference_file)})
    state_dict = timm.create_model(VARIANT).state_dict()
    timm.create_model(VARIANT, pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict})
    assert published.log == []


def test_pickled_weights_of_a_hub_repository_load(hub, tree, converted_folder):
    import io

    from safetensors.torch import load

    buffer = io.BytesIO()
    torch.save(load(tree['model.safetensors']), buffer)
    hub.add('someone/mine', {'config.json': tree['config.json'], 'pytorch_model.bin': buffer.getvalue()})
    model = timm.create_model('hf-hub:someone/mine', pretrained=True)
    assert torch.equal(model.fc.bias, load(tree['model.safetensors'])['fc.bias'])


def test_organisation_and_revision_can_be_changed(hub, tree, monkeypatch):
    monkeypatch.setenv('KW_TIMM_HUB_ORG', 'elsewhere')
    monkeypatch.setenv('KW_TIMM_HUB_REVISION', 'v7')
    hub.add(f'elsewhere/{NAME}', tree, tag='v7')
    assert hub_repository(NAME) == f'elsewhere/{NAME}'
    timm.create_model(VARIANT, pretrained=True)


def test_variants_are_listed_as_pretrained():
    assert len(timm.list_pretrained('kw*')) == 15
    assert NAME in timm.list_pretrained('kw*')


def test_without_any_weights_three_commands_are_named(hub):
    with pytest.raises(WeightsNotFoundError) as caught:
        timm.create_model(VARIANT, pretrained=True)
    text = str(caught.value)
    for command in (
        f'kw-hub fetch {VARIANT}',
        'kw-hub convert FILE --store',
        f'hf download {REPOSITORY} --revision v1',
    ):
        assert command in text
    assert str(store_folder(NAME)) in text


@pytest.mark.parametrize(
    ('faults', 'message'),
    [
        ([Fault(HEAD, 401, {'X-Error-Message': 'Invalid username or password.'}, times=99)], 'hf auth login'),
        ([Fault(HEAD, 404, {'X-Error-Code': 'RepoNotFound'}, times=99)], r'does not exist \(404\)'),
        ([Fault(HEAD, 404, {'X-Error-Code': 'RevisionNotFound'}, times=99)], 'not published completely'),
        ([Fault(HEAD, 404, {'X-Error-Code': 'EntryNotFound'}, times=99)], "no file 'model.safetensors'"),
        ([Fault(HEAD, 403, {'X-Error-Code': 'GatedRepo'}, times=99)], 'accept its conditions'),
        ([Fault(HEAD, 429, times=99)], 'too many requests'),
        ([Fault(LFS_GET, 429, times=99)], 'too many requests'),
        ([Fault(HEAD, 503, times=99)], r'busy or down \(503\)'),
        ([Fault(LFS_GET, 503, times=99)], r'busy or down \(503\)'),
    ],
)
def test_refusals_say_what_to_do(published, faults, message):
    published.faults = faults
    with pytest.raises(WeightsNotFoundError, match=message):
        find_weights(NAME)
    assert_nothing_half(published)
    # Nothing is broken: once the Hub answers, they load.
    published.faults = []
    assert find_weights(NAME).exists()


@pytest.mark.parametrize(
    'fault',
    [Fault(HEAD, 429, times=2), Fault(HEAD, 503, times=2), Fault(LFS_GET, 429, times=2), Fault(LFS_GET, 503, times=2)],
)
def test_a_busy_hub_is_asked_again(published, fault):
    fault.times = 2
    published.faults = [fault]
    assert find_weights(NAME).exists()
    assert fault.times == 0


def test_a_cut_connection_is_resumed(published, tree):
    # The client keeps whole chunks.
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    published.faults = [Fault(LFS_GET, cut_at=chunk + 1000)]
    file = find_weights(NAME)
    assert file.read_bytes() == tree['model.safetensors']
    assert published.count(LFS_GET) == 2
    assert published.count(rf'{LFS_GET}\w+ bytes={chunk}-') == 1


def test_a_connection_that_is_always_cut(published):
    published.faults = [Fault(LFS_GET, cut_at=0, times=99)]
    with pytest.raises(WeightsNotFoundError, match='did not arrive whole'):
        find_weights(NAME)
    assert blobs(published) == []
    assert_nothing_half(published)


def test_wrong_size(published, tree):
    published.faults = [Fault(LFS_GET, body=tree['model.safetensors'][:-100], times=99)]
    with pytest.raises(WeightsNotFoundError, match='did not arrive whole'):
        find_weights(NAME)
    assert blobs(published) == []


def test_wrong_sha256(published, tree):
    damaged = bytearray(tree['model.safetensors'])
    damaged[-1] ^= 1
    published.faults = [Fault(LFS_GET, body=bytes(damaged))]
    with pytest.raises(DamagedWeightsError, match='sha256 is not the published'):
        find_weights(NAME)
    assert blobs(published) == []
    assert find_weights(NAME).read_bytes() == tree['model.safetensors']


def test_wrong_sha256_by_timms_form(published, tree):
    damaged = bytearray(tree['model.safetensors'])
    damaged[-1] ^= 1
    published.faults = [Fault(LFS_GET, body=bytes(damaged))]
    with pytest.raises(DamagedWeightsError, match='sha256 is not the published'):
        timm.create_model(f'hf-hub:{REPOSITORY}', pretrained=True)


def test_damaged_safetensors_header(hub, tree):
    damaged = b'\xff' * 8 + tree['model.safetensors'][8:]
    hub.add(REPOSITORY, {**tree, 'model.safetensors': damaged})
    with pytest.raises(ValueError, match=r"weight file '.*model\.safetensors'.* cannot be read"):
        timm.create_model(VARIANT, pretrained=True)


def test_another_variants_weights_under_this_name(hub, tree):
    hub.add('kw-timm/kw1d2x_resnet18.osvai_in1k', tree)
    with pytest.raises(ValueError, match='weights are of kw1d4x_resnet18'):
        timm.create_model('kw1d2x_resnet18', pretrained=True)


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch, hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(WeightsNotFoundError, match='cannot be reached'):
        find_weights(NAME)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda f: (f / 'model.safetensors').write_bytes(b'short'), 'damaged: 5 bytes, expected'),
        (lambda f: (f / 'model.safetensors').unlink(), 'damaged: missing'),
        (lambda f: (f / 'weights.json').write_text('{'), 'no readable weights.json'),
        (lambda f: (f / 'weights.json').unlink(), 'no readable weights.json'),
    ],
)
def test_damaged_store(published, stored, damage, message):
    damage(stored)
    with pytest.raises(DamagedWeightsError, match=message) as caught:
        timm.create_model(VARIANT, pretrained=True)
    assert f'kw-hub fetch {NAME}' in str(caught.value)
    assert published.log == []


# In processes of their own: the environment as users set it, two at once.

CREATE = f'import timm, kw_timm; timm.create_model({VARIANT!r}, pretrained=True); print("loaded")'


def test_two_processes_at_once_then_offline(published, tmp_path):
    published.faults = [Fault(HEAD, 503, times=1)]
    processes = [python(CREATE, environment(published, tmp_path)) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert 'loaded' in out, err
    assert len(blobs(published)) == 1
    assert_nothing_half(published)
    # A second use, offline, as $HF_HUB_OFFLINE says; and loading needs nothing of the [hub] extra.
    bare = 'import sys; sys.modules["gdown"] = sys.modules["kw_hub"] = None; '
    offline = python(
        bare + CREATE, environment(published, tmp_path, HF_HUB_OFFLINE='1', HF_ENDPOINT='http://127.0.0.1:9')
    )
    out, err = offline.communicate(timeout=120)
    assert 'loaded' in out, err


def test_disk_full_while_writing(published):
    with full_disk(), pytest.raises(WeightsNotFoundError, match=r'could not be written: File too large\. Make room in'):
        find_weights(NAME)
    assert blobs(published) == []
    assert_nothing_half(published)
    assert find_weights(NAME).exists()


@pytest.mark.slow
def test_disk_really_full(published, tmp_path):
    """On a small file system, where this user may mount one."""
    small = tmp_path / 'small'
    small.mkdir()
    mount = f'mount -t tmpfs -o size=2m tmpfs {small} && '
    try:
        allowed = subprocess.run(['unshare', '-rm', 'sh', '-c', mount + 'true'], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip('this user may not mount a file system')
    command = ['unshare', '-rm', 'sh', '-c', f'{mount} {sys.executable} -c {shlex.quote(CREATE)}']
    env = environment(published, tmp_path, HF_HUB_CACHE=str(small))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"could not be written: No space left on device. Make room in '{small}'" in done.stderr


def test_small_files_come_without_sha256(published, tree):
    assert hub_file(REPOSITORY, 'config.json', 'v1').read_bytes() == tree['config.json']
