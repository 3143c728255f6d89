"""Limits: memory and time of converting the largest checkpoint."""

import resource
import subprocess
import sys
import time

import pytest
import torch
from hub_support import reference_checkpoint, synthetic

NAME = 'kw4x_resnet50'


def with_optimizer(file) -> int:
    """Write a checkpoint with AdamW's state of every parameter; return its size."""
    checkpoint = reference_checkpoint(NAME)
    state = {
        i: {'step': torch.tensor(9.0), 'exp_avg': torch.rand_like(value), 'exp_avg_sq': torch.rand_like(value)}
        for i, value in enumerate(checkpoint['model'].values())
        if value.is_floating_point()
    }
    checkpoint['optimizer'] = {'state': state, 'param_groups': [{'lr': 1e-3, 'params': list(state)}]}
    torch.save(checkpoint, file)
    return file.stat().st_size


@pytest.mark.slow
def test_converting_the_largest_checkpoint(tmp_path):
    file = tmp_path / f'{NAME}.pth'
    size = with_optimizer(file)
    assert size > 1.2e9
    code = (
        f'import sys; from kw_hub.cli import main; code = main(["convert", {str(file)!r}, "--output", '
        f'{str(tmp_path / "out")!r}]); import resource; '
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)'
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=280)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f'{size / 1e9:.2f} GB checkpoint: peak {peak / 1e9:.2f} GB, {peak / size:.2f} times, {seconds:.1f} s')
    assert peak < 3 * size
    assert seconds < 120


def test_optimizer_state_is_not_read(tmp_path):
    """A small checkpoint with a large optimizer state converts in little memory: the state stays in the file."""
    from kw_timm.weights.unpickle import load_pickled, select_weights

    file = tmp_path / 'large.pth'
    checkpoint = {'model': synthetic({'fc.bias': (10,)}), 'optimizer': {'state': {0: torch.zeros(50_000_000)}}}
    torch.save(checkpoint, file)
    del checkpoint
    before = _resident()
    weights, _ = select_weights(load_pickled(file, mmap=True))
    assert weights['fc.bias'].sum().isfinite()
    assert _resident() - before < 100e6


def _resident() -> int:
    with open('/proc/self/statm') as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
