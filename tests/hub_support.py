"""Weight files as the authors' look, and the real clients pointed at loopback."""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from hub_server import TOKEN, HubServer
from reference_data import ROOT, manifest, reference_tensor

from kw_timm.weights.exact import Network, to_reference_exact

VARIANT = 'kw1d4x_resnet18'
NAME = f'{VARIANT}.osvai_in1k'
REPOSITORY = f'kw-timm/{NAME}'


def synthetic(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Deterministic tensors of these keys and shapes; running variances are positive."""
    state_dict = {}
    for key, shape in shapes.items():
        if key.endswith('num_batches_tracked'):
            state_dict[key] = torch.tensor(7)
        elif key.endswith('running_var'):
            state_dict[key] = torch.ones(shape, dtype=dtype)
        else:
            state_dict[key] = reference_tensor(key, shape).to(dtype)
    return state_dict


def reference_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the reference's file: its manifest, or this package's reverse table where there is none."""
    if (ROOT / f'manifests/{name}.json').exists():
        return manifest(name)
    network = Network(name)
    own = network.skeleton().state_dict()
    return {key: tuple(value.shape) for key, value in to_reference_exact(own, network).items()}


def reference_checkpoint(name: str, **more: Any) -> dict[str, Any]:
    """A checkpoint as the reference's training writes it."""
    return {
        'model': synthetic(reference_shapes(name)),
        'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.999)}]},
        'epoch': 299,
        'scaler': {'scale': 65536.0},
        'args': argparse.Namespace(model=name, lr=4e-3, output_dir='out'),
        **more,
    }


@contextmanager
def client_of(server: HubServer, folder: Path, monkeypatch: Any) -> Iterator[HubServer]:
    """Point huggingface_hub and gdown of this process at a server, with cache and store of its own, without waiting."""
    constants = huggingface_hub.constants
    for name, value in {
        'ENDPOINT': server.url,
        'HUGGINGFACE_CO_URL_TEMPLATE': server.url + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_HUB_CACHE': str(folder / 'cache'),
        'HF_HUB_OFFLINE': False,
        'HF_HUB_DISABLE_XET': True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setenv('KW_TIMM_HOME', str(folder / 'store'))
    monkeypatch.setenv('KW_HUB_FILE_HOST', f'{server.url}/uc?id={{id}}')
    for name in ('KW_TIMM_HUB_ORG', 'KW_TIMM_HUB_REVISION'):
        monkeypatch.delenv(name, raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, 0.01)))
    yield server


def environment(server: HubServer, folder: Path, **more: str) -> dict[str, str]:
    """The same for another process."""
    variables = {key: value for key, value in os.environ.items() if key not in ('HF_HUB_OFFLINE',)}
    return variables | {
        'HF_ENDPOINT': server.url,
        'HF_HUB_CACHE': str(folder / 'cache'),
        'HF_HUB_DISABLE_XET': '1',
        'HF_TOKEN': TOKEN,
        'KW_TIMM_HOME': str(folder / 'store'),
        'KW_HUB_FILE_HOST': f'{server.url}/uc?id={{id}}',
        'OMP_NUM_THREADS': '1',
        **more,
    }


def python(code: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """Start another process."""
    return subprocess.Popen(
        [sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def full_disk(size: int = 1 << 20) -> Iterator[None]:
    """Let every file that grows beyond a size fail to, as on a full disk (the error is EFBIG instead of ENOSPC)."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def tree_of(folder: Path) -> dict[str, bytes]:
    """The content of a folder as a repository's tree."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'weights.json'}


def leftovers(folder: Path) -> list[str]:
    """Unfinished files below a folder."""
    return [str(path) for path in folder.rglob('*') if '.incomplete' in path.name or path.name.endswith('.old')]


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def record_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / 'weights.json').read_text()))
