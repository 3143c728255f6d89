"""Other runtimes as modes of a benchmark: the network exported to a file, and run from it."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..export import ENDINGS, check_packages, export_file, file_size, load_file
from .measure import Settings

__all__ = ['RUNTIMES', 'ExportedNetwork', 'check_runtimes', 'stored_bytes']

RUNTIMES = {'onnxruntime': 'onnx', 'openvino': 'openvino'}  # mode -> what `kw-timm export --to` calls it


def check_runtimes(modes: Sequence[str], settings: Settings) -> None:
    """Raise ValueError if modes are asked for that cannot be measured here, or not with these settings."""
    for mode in (mode for mode in modes if mode in RUNTIMES):
        check_packages(RUNTIMES[mode])
        if settings.device.type != 'cpu' or settings.dtype != torch.float32:
            given = f'--device {settings.device} --dtype {str(settings.dtype).removeprefix("torch.")}'
            raise ValueError(f'--modes {mode} is measured on the CPU in float32; leave it out, or {given}.')


class ExportedNetwork(nn.Module):
    """A network that computes in another runtime, from a file that takes any batch and size and goes with it."""

    def __init__(self, network: nn.Module, mode: str, shape: tuple[int, int, int]) -> None:
        """Export a network.

        Args:
            network: Network of RGB images, in eval mode; one tensor or a list of them comes out.
            mode: Key of :data:`RUNTIMES`.
            shape: Batch, height and width in pixels.

        Raises:
            ValueError: If a package is missing, or the exporter cannot do it.
        """
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix='kw-timm-')
        to = RUNTIMES[mode]
        file = Path(self._folder.name) / f'network{ENDINGS[to]}'
        export_file(network, file, to, shape, dynamic=True)
        self.nbytes = file_size(file)
        self._run: Callable[[torch.Tensor], list[torch.Tensor]] = load_file(to, file)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Compute; returns all outputs."""
        return self._run(images)


def stored_bytes(network: Any) -> int:
    """Return what a network's tensors take, each counted once, or its file; in bytes."""
    if isinstance(network, ExportedNetwork):
        return network.nbytes
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*network.parameters(), *network.buffers())}.values())
