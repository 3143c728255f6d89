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


def start(python: Path, processes: int, file: Path) -> list[subprocess.Popen]:
    """Start a group of processes that take a step."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(processes)}
    env |= {'CUDA_VISIBLE_DEVICES': '', 'LOCAL_RANK': '0'}
    command = [str(python), str(ROOT / 'tests/drive_processes.py'), str(file)]
    return [
        subprocess.Popen(command, env={**env, 'RANK': str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen], file: Path) -> list[dict]:
    """Return losses and gradients of every process."""
    for process in processes:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output.decode()
    return [torch.load(file.with_suffix(f'.{rank}'), weights_only=True) for rank in range(len(processes))]


@pytest.mark.parametrize('stack', ['this one', 'mmdet3'])
def test_two_processes_are_one_process_with_the_joined_batch(stack, request, tmp_path):
    python = Path(sys.executable) if stack == 'this one' else request.getfixturevalue('mmdet3_python')
    one, two = tmp_path / 'one', tmp_path / 'two'
    group, alone = start(python, 2, two), start(python, 1, one)
    (joined,) = finish(alone, one)
    first, second = finish(group, two)
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
