"""The reference implementation's numbers, and the weights they were computed with.

A weight tensor is a function of its key and shape: standard normal numbers of a generator seeded with the key's CRC-32,
scaled by what the tensor is. See ``reference/README.md``.
"""

import json
import math
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

ROOT = Path(__file__).parent / 'reference'

CLASSIFICATION = sorted(
    path.stem for path in (ROOT / 'golden').glob('*.safetensors') if not path.stem.startswith('detection_')
)
DETECTION = sorted(path.stem.removeprefix('detection_') for path in (ROOT / 'golden').glob('detection_*.safetensors'))


def _normal(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    # RandomState is frozen by numpy's compatibility policy.
    return np.asarray(np.random.RandomState(zlib.crc32(seed.encode()) & 0x7FFFFFFF).standard_normal(shape or None))


def reference_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The float64 weight tensor of a reference key."""
    fan_in = math.prod(shape[1:])
    leaf = key.rpartition('.')[2]
    matrix = len(shape) > 1
    shift, scale = 0.0, 1.0
    if '.attention.' in key:
        if leaf == 'weight' and matrix:
            scale = (0.15 if 'fc2' in key or 'fc3' in key else 1.0) / math.sqrt(fan_in)
        elif leaf == 'weight':
            shift, scale = 1.0, 0.1
    elif leaf == 'gamma':
        shift, scale = 0.5, 0.1
    elif leaf == 'weight' and not matrix:
        shift, scale = 0.6, 0.1
    elif leaf == 'bias':
        scale = 0.1
    elif not key.startswith('warehouse_manager.weights.'):
        scale = math.sqrt(2.0 / fan_in)
    return torch.from_numpy(shift + scale * _normal(key, shape)).reshape(shape)


def reference_input(name: str, *shape: int) -> torch.Tensor:
    """The float64 input tensor of a name."""
    return torch.from_numpy(_normal(f'input:{name}', shape))


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a reference state dict, in order."""
    return {key: tuple(shape) for key, shape in json.loads((ROOT / f'manifests/{name}.json').read_text()).items()}


@lru_cache(maxsize=2)
def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a golden file."""
    with safe_open(ROOT / f'golden/{name}.safetensors', 'pt') as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def reference_state_dict(name: str) -> dict[str, torch.Tensor]:
    """A complete reference state dict: weights by key, running statistics from the golden file."""
    tensors, _ = golden(name)
    state_dict = {}
    for key, shape in manifest(name).items():
        if key.endswith('num_batches_tracked'):
            state_dict[key] = torch.tensor(0)
        elif f'buffers/{key}' in tensors:
            state_dict[key] = tensors[f'buffers/{key}']
        else:
            state_dict[key] = reference_tensor(key, shape)
    return state_dict


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-9) -> None:
    """Compare relative to the largest expected magnitude."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= rtol, f'relative error {error:.3g} exceeds {rtol:g}'


def seeded(model: nn.Module) -> nn.Module:
    """Give a model's norms statistics that are not the initial ones, so that eval mode differs from identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model
