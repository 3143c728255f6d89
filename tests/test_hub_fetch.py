"""``kw-hub fetch``: from the authors' file host, through gdown, into the store; and what happens when that fails."""

import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from drive_proxy import running_drive
from hub_server import Fault
from hub_support import NAME, VARIANT, environment, full_disk, leftovers, record_of, snapshot
from kw_hub import fetch as fetching
from kw_hub import files, manifest
from kw_hub.cli import main
from kw_hub.errors import HubError
from kw_hub.fetch import download, fetch
from kw_hub.manifest import find_entry

from kw_timm.weights.store import sha256_of, store_folder

FILE = r'GET /uc\?id='


@pytest.fixture
def host(hub, reference_file):
    """The authors' host with one file."""
    hub.drive[find_entry(VARIANT).file_id] = reference_file.read_bytes()
    return hub


@pytest.fixture
def entry():
    return find_entry(VARIANT)


def downloads() -> list[str]:
    return sorted(p.name for p in store_folder('downloads').iterdir() if not p.name.startswith('.'))


def test_fetch_makes_pretrained_work(host, entry, reference_file, capsys):
    assert main(['fetch', VARIANT]) == 0
    assert 'known answer agrees' in capsys.readouterr().out
    model = timm.create_model(VARIANT, pretrained=True)
    theirs = torch.load(reference_file, weights_only=False)['model']
    assert torch.equal(model.fc.weight, theirs['fc.weight'])
    record = record_of(store_folder(NAME))
    assert record['source_sha256'] == sha256_of(reference_file)
    assert record['file_id'] == entry.file_id
    assert record['source_entry'] == 'model'
    assert 'weights.pth' not in downloads()
    assert not [name for name in downloads() if NAME in name]
    # A second time there is nothing to do.
    assert main(['fetch', NAME]) == 0
    assert 'in the store already' in capsys.readouterr().out
    assert host.count(FILE) == 1


def test_cut_connection_is_resumed_within_a_download(host, entry, tmp_path):
    content = host.drive[entry.file_id]
    host.faults = [Fault(FILE, cut_at=len(content) // 2)]
    file = download(entry, tmp_path)
    assert file.read_bytes() == content
    assert host.count(FILE) == 2


def test_broken_off_download_goes_on_next_time(host, entry, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, 'RETRIES', 0)
    content = host.drive[entry.file_id]
    # Several chunks of gdown, so that some are on disk.
    host.faults = [Fault(FILE, cut_at=len(content) - 1000)]
    with pytest.raises(HubError, match='it goes on where it stopped'):
        download(entry, tmp_path)
    (part,) = [path for path in tmp_path.iterdir() if path.suffix == '.part']
    received = part.stat().st_size
    assert 0 < received < len(content)
    assert not (tmp_path / f'{NAME}.pth').exists()
    assert download(entry, tmp_path).read_bytes() == content
    assert host.count(f'bytes={received}-') == 1
    assert not part.exists()


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        (Fault(FILE, body=b'<!DOCTYPE html><html>Quota exceeded</html>', times=9), 'web page .often a download quota'),
        (Fault(FILE, 404, times=9), '404'),
        (Fault(FILE, 503, times=9), '503'),
        (Fault(FILE, body=b'', times=9), 'empty file'),
        (Fault(FILE, body=b'PK\x03\x04' + bytes(5000), times=9), 'cut off or not a weight file'),
    ],
)
def test_failures_say_what_to_do_and_leave_the_store(host, stored, entry, fault, message, capsys):
    before = snapshot(stored)
    host.faults = [fault]
    assert main(['fetch', VARIANT, '--force']) == 1
    said = capsys.readouterr().err
    assert 'Traceback' not in said
    assert re.search(message, said)
    assert snapshot(stored) == before
    assert not leftovers(stored.parent)
    assert not [name for name in downloads() if name.endswith('.pth')]
    # The host recovers.
    host.faults = []
    assert main(['fetch', VARIANT, '--force']) == 0


def test_wrong_sha256_of_the_authors_file(host, entry, tmp_path):
    known = dataclasses.replace(entry, source_sha256='0' * 64)
    with pytest.raises(HubError, match='its sha256 is not 0000'):
        download(known, tmp_path)
    assert not (tmp_path / f'{NAME}.pth').exists()


def test_another_variants_file_under_this_id(host, reference_file):
    other = find_entry('kw1x_resnet18')
    host.drive[other.file_id] = reference_file.read_bytes()
    with pytest.raises(HubError, match='expected kw1x_resnet18'):
        fetch(other)
    assert not store_folder(other.name).exists()


def test_poisoned_file_is_refused(host, entry, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "ran"}',)

    file = tmp_path / 'poisoned.pth'
    torch.save({'model': {'w': torch.zeros(1)}, 'args': Payload()}, file)
    host.drive[entry.file_id] = file.read_bytes()
    assert main(['fetch', VARIANT]) == 1
    assert not (tmp_path / 'ran').exists()
    assert not store_folder(NAME).exists()


def test_damaged_store_is_fetched_again(host, stored, entry):
    (stored / 'model.safetensors').write_bytes(b'half')
    assert fetch(entry) is not None
    timm.create_model(VARIANT, pretrained=True)


@pytest.mark.parametrize('when', ['download', 'convert'])
def test_disk_full(host, stored, entry, when, capsys):
    before = snapshot(stored)
    if when == 'convert':
        # The download is there already, whole; the converted file is what does not fit.
        folder = store_folder('downloads')
        folder.mkdir()
        (folder / f'{NAME}.pth').write_bytes(host.drive[entry.file_id])
    with full_disk():
        assert main(['fetch', VARIANT, '--force']) == 1
    said = capsys.readouterr().err
    assert re.search(r'is full.*\. Nothing was changed\. Make room', said)
    assert snapshot(stored) == before
    assert not leftovers(stored.parent)
    # With room again, it goes on.
    assert main(['fetch', VARIANT, '--force']) == 0


def test_two_processes_at_once(host, tmp_path):
    code = f'import sys; from kw_hub.cli import main; sys.exit(main(["fetch", {VARIANT!r}]))'
    env = environment(host, tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert host.count(FILE) == 1
    assert sum('in the store already' in out for out, _ in outputs) == 1
    assert not leftovers(tmp_path / 'store')


def test_record_writes_the_manifest(host, entry, tmp_path, monkeypatch):
    copy = Path(shutil.copy(manifest.MANIFEST, tmp_path / 'manifest.json'))
    monkeypatch.setattr(manifest, 'MANIFEST', copy)
    manifest.load_manifest.cache_clear()
    try:
        converted = fetch(entry, record=True)
        updated = find_entry(VARIANT)
        assert updated.sha256 == converted.record['sha256']
        assert updated.source_sha256 == converted.record['source_sha256']
        # From now on the store must hold exactly this.
        assert main(['verify', VARIANT]) == 0
    finally:
        monkeypatch.undo()
        manifest.load_manifest.cache_clear()


def test_missing_gdown_is_named(entry, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    with pytest.raises(HubError, match=r'pip install .kw-timm\[hub\]'):
        download(entry, tmp_path)


# The real address, over TLS, through a proxy on loopback.


def test_the_real_hosts_pages(entry, reference_file, tmp_path, monkeypatch, capsys):
    """The page before a large file is passed; the page of a used-up quota is told from the file."""
    monkeypatch.setenv('KW_TIMM_HOME', str(tmp_path / 'store'))
    with running_drive(tmp_path, monkeypatch) as drive:
        drive.files[entry.file_id] = reference_file.read_bytes()
        drive.quota = True
        assert main(['fetch', VARIANT]) == 1
        said = capsys.readouterr().err
        assert 'too many people' in said
        assert 'kw-hub convert FILE --store' in said
        assert not store_folder(NAME).exists()
        drive.quota = False
        assert main(['fetch', VARIANT]) == 0
    assert drive.log[0] == f'drive.google.com/uc?id={entry.file_id}'
    assert drive.log[-1].startswith('drive.usercontent.google.com/download?')
    assert record_of(store_folder(NAME))['source_sha256'] == sha256_of(reference_file)


# The store's writers.


def test_interrupted_folder_leaves_what_was_there(tmp_path):
    target = tmp_path / 'folder'
    target.mkdir()
    (target / 'old').write_text('old')

    def fill():
        with files.new_folder(target, overwrite=True) as filling:
            (filling / 'new').write_text('new')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert snapshot(tmp_path) == {'folder/old': b'old'}
    with files.new_folder(target, overwrite=True) as filling:
        (filling / 'new').write_text('new')
    assert snapshot(tmp_path) == {'folder/new': b'new'}


def test_full_disk_in_any_words(tmp_path):
    def write(error):
        with files.new_file(tmp_path / 'file'):
            raise error

    class SafetensorError(Exception):
        pass

    for error in (OSError(errno.ENOSPC, 'x'), SafetensorError('I/O error: No space left on device (os error 28)')):
        with pytest.raises(HubError, match='is full'):
            write(error)
    with pytest.raises(SafetensorError):
        write(SafetensorError('something else'))
    assert not leftovers(tmp_path)
