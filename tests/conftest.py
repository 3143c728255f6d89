"""Settings and fixtures of every test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# No test leaves the machine; those of the Hub talk to a server on loopback. Read when huggingface_hub is imported.
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['KW_TIMM_HOME'] = os.devnull
os.environ['KW_HUB_FILE_HOST'] = 'http://127.0.0.1:9/uc?id={id}'
# Programs that tests start share the cores with the other test process.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from hub_server import HubServer, running_hub

ROOT = Path(__file__).parent.parent
# Small tensors gain nothing from more, and on a machine that does other work too they lose much: threads spin.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that two processes end together."""
    longest = ('test_tools.py', 'test_golden.py', 'test_distributed.py', 'test_generations.py', 'test_configs.py')
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """A Hub and file host on loopback; clients of this process talk to it, with a cache and store of their own."""
    from hub_support import client_of

    with running_hub() as server, client_of(server, tmp_path, monkeypatch):
        yield server


@pytest.fixture(scope='session')
def reference_file(tmp_path_factory) -> Path:
    """A weight file of the smallest ResNet variant, as the reference's training writes it."""
    from hub_support import VARIANT, reference_checkpoint

    path = tmp_path_factory.mktemp('reference') / f'{VARIANT}.pth'
    torch.save(reference_checkpoint(VARIANT), path)
    return path


@pytest.fixture(scope='session')
def converted_folder(reference_file) -> Path:
    """The folder that it converts to; not to be changed."""
    from hub_support import NAME
    from kw_hub import convert_file

    return convert_file(reference_file, output=reference_file.parent / NAME, quiet=True).folder


@pytest.fixture
def stored(converted_folder, tmp_path, monkeypatch) -> Path:
    """The folder in a store of the test's own."""
    target = tmp_path / 'store' / converted_folder.name
    shutil.copytree(converted_folder, target)
    monkeypatch.setenv('KW_TIMM_HOME', str(tmp_path / 'store'))
    return target


@pytest.fixture(scope='session')
def mmdet3_python() -> Path:
    """The interpreter of an environment with MMDetection 3."""
    python = Path(os.environ.get('KW_TIMM_MMDET3_PYTHON') or ROOT / '.venv3/bin/python')
    if not python.is_file():
        pytest.skip(
            f'needs MMDetection 3: there is no {python}. Run make setup3, or let KW_TIMM_MMDET3_PYTHON name one'
        )
    return python
