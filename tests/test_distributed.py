"""Two processes compute what one computes on the joined batch: losses and gradients, in float64 to 1e-9."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmdet', reason='needs MMDetection')
ROOT = Path(__file__).parent.parent


def run_two(python: Path, file: Path) -> list[dict]:
    """Return losses and gradients of each of two processes, and of one with the joined batch."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2'}
    env |= {'CUDA_VISIBLE_DEVICES': '', 'LOCAL_RANK': '0'}
    command = [str(python), str(ROOT / 'tests/drive_processes.py'), str(file)]
    started = [
        subprocess.Popen(command, env={**env, 'RANK': rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in '01'
    ]
    for process in started:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output.decode()
    return [torch.load(file.with_suffix(f'.{name}'), weights_only=True) for name in ('0', '1', 'joined')]


@pytest.mark.parametrize('stack', ['this one', 'mmdet3'])
def test_two_processes_are_one_process_with_the_joined_batch(stack, request, tmp_path):
    python = Path(sys.executable) if stack == 'this one' else request.getfixturevalue('mmdet3_python')
    first, second, joined = run_two(python, tmp_path / 'found')
    assert first['losses'].keys() == joined['losses'].keys()
    for name, loss in joined['losses'].items():
        assert loss > 0
        assert first['losses'][name] == pytest.approx(loss, rel=1e-9), name
    assert any(name.startswith('backbone.model.warehouses') for name in joined['gradients'])
    learned = 0
    for name, gradient in joined['gradients'].items():
        assert torch.equal(first['gradients'][name], second['gradients'][name]), name
        size = gradient.abs().max()
        error = (first['gradients'][name] - gradient).abs().max()
        assert error <= 1e-9 * size, (name, error / size)
        learned += int(size > 0)
    assert learned >= 0.98 * len(joined['gradients'])  # a coarse level may have no sample
