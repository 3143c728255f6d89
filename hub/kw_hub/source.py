"""Weight files: reading them, and recognising whose weights they hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kw_timm.weights import check_weight_file, read_weight_file
from kw_timm.weights.detectors import Detector, detector_to_ours, is_detector
from kw_timm.weights.entries import EMA_KEYS, select_weights
from kw_timm.weights.exact import Network, network_part, recognise_network, to_timm_exact
from kw_timm.weights.files import is_safetensors
from kw_timm.weights.sound import check_finite, check_kinds, check_stored
from kw_timm.weights.store import TAG
from kw_timm.weights.unpickle import load_pickled

from .errors import HubError

__all__ = ['UNUSED', 'Recognised', 'Source', 'read_source', 'recognise']

# Where a checkpoint of a detector keeps what the authors' file has beyond it.
UNUSED = 'reference_unused'


@dataclass(frozen=True)
class Source:
    """What a weight file holds: a network's weights or a detector's, and where in the file they were."""

    file: Path
    state_dict: dict[str, torch.Tensor]
    entry: str
    meta: dict[str, Any]
    unused: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recognised:
    """Weights that are complete, under this project's names, converted to the last bit.

    Attributes:
        name: ``'kw4x_resnet50.osvai_in1k'``, ``'kw1x_resnet18.10_classes'``, or the name of a detector's config.
        network: The network, or the detector's backbone.
        state_dict: The network's weights, or the whole detector's.
        detector: The detector, or None.
    """

    name: str
    network: Network
    state_dict: dict[str, torch.Tensor]
    detector: Detector | None


def read_source(file: str | Path, weights: str = 'auto') -> Source:
    """Read a weight file: the authors', MMDetection's, or one of this project's.

    Args:
        file: ``torch.save`` file or safetensors.
        weights: ``'ema'`` for averaged weights, ``'model'`` for the others, ``'auto'`` for averaged ones if
            there are any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or holds more than weights.
        HubError: If averaged weights are asked for and there are none.
    """
    path = check_weight_file(file)
    if is_safetensors(path) or path.suffix == '.json':
        return Source(path, read_weight_file(path), '', {}, {})
    checkpoint = load_pickled(path, mmap=True)
    try:
        state_dict, entry = select_weights(checkpoint, use_ema=weights != 'model')
        check_stored(state_dict)
    except ValueError as error:
        raise HubError(f"'{path}': {error}") from error
    if weights == 'ema' and entry not in EMA_KEYS:
        raise HubError(
            f"'{path}' has no averaged (EMA) weights; it has '{entry or 'a bare state dict'}'. Use --weights auto."
        )
    if weights == 'model' and entry in EMA_KEYS:
        raise HubError(f"'{path}' has averaged (EMA) weights only. Use --weights auto.")
    meta = checkpoint.get('meta') if entry == 'state_dict' else None
    unused = checkpoint.get(UNUSED) if entry == 'state_dict' else None
    unused = {k: v for k, v in unused.items() if isinstance(v, torch.Tensor)} if isinstance(unused, dict) else {}
    return Source(path, state_dict, entry, meta if isinstance(meta, dict) else {}, unused)


def recognise(source: Source) -> Recognised:
    """Tell from keys and shapes whether weights are a detector's or a network's and which one's, and convert them.

    Raises:
        ValueError: If they are not recognised, not complete, not finite, or would not convert exactly.
    """
    try:
        return _recognise(source)
    except ValueError as error:
        raise ValueError(f"'{source.file}' is not what it should be. {error}") from error


def _recognise(source: Source) -> Recognised:
    check_kinds(source.state_dict)
    if is_detector(source.state_dict):
        detector = detector_to_ours(source.state_dict, source.unused)
        check_finite(detector.state_dict)
        return Recognised(detector.name, detector.backbone, detector.state_dict, detector)
    state_dict = network_part(source.state_dict)
    network = recognise_network(state_dict)
    converted = to_timm_exact(state_dict, network)
    check_finite(converted)
    tag = TAG if not network.model_args else f'{network.num_classes}_classes'
    return Recognised(f'{network.name}.{tag}', network, converted, None)
