"""From the authors' weight files to folders for timm and MMDetection, and back; every conversion proves itself."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from tqdm import tqdm

import kw_timm
from kw_timm.weights import check_weight_file, read_weight_file
from kw_timm.weights.detectors import (
    Detector,
    detector_to_ours,
    detector_to_reference,
    export_backbone,
    is_detector,
)
from kw_timm.weights.exact import Network, recognise_network, to_reference_exact, to_timm_exact
from kw_timm.weights.store import TAG, WEIGHTS, check_stored, sha256_of, store_folder
from kw_timm.weights.unpickle import EMA_KEYS, load_pickled, select_weights

from .errors import HubError
from .files import new_file, new_folder, write_record
from .known_answer import write_answer

__all__ = ['CHOICES', 'Converted', 'convert_file', 'export_to_backbone', 'export_to_reference', 'read_source']

CHOICES = ('auto', 'ema', 'model')
_UNUSED = 'reference_unused'


@dataclass(frozen=True)
class Source:
    """What a weight file holds: a network's weights or a detector's, and where in the file they were."""

    state_dict: dict[str, torch.Tensor]
    entry: str
    meta: dict[str, Any]
    unused: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Converted:
    """A folder with converted weights.

    Attributes:
        name: e.g. ``'kw4x_resnet50.osvai_in1k'``.
        folder: Where it is.
        network: The network, or the detector's backbone.
        record: File, size, sha256 and origin, as in ``weights.json``.
    """

    name: str
    folder: Path
    network: Network
    record: dict[str, Any]


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
    if path.suffix == '.safetensors':
        return Source(read_weight_file(path), '', {}, {})
    checkpoint = load_pickled(path, mmap=True)
    try:
        state_dict, entry = select_weights(checkpoint, use_ema=weights != 'model')
    except ValueError as error:
        raise HubError(f"'{path}': {error}") from error
    if weights == 'ema' and entry not in EMA_KEYS:
        raise HubError(
            f"'{path}' has no averaged (EMA) weights; it has '{entry or 'a bare state dict'}'. Use --weights auto."
        )
    if weights == 'model' and entry in EMA_KEYS:
        raise HubError(f"'{path}' has averaged (EMA) weights only. Use --weights auto.")
    meta = checkpoint.get('meta') if entry == 'state_dict' else None
    unused = checkpoint.get(_UNUSED) if entry == 'state_dict' else None
    return Source(state_dict, entry, meta if isinstance(meta, dict) else {}, unused or {})


def convert_file(
    file: str | Path,
    output: str | Path | None = None,
    store: bool = False,
    weights: str = 'auto',
    overwrite: bool = False,
    expected: str | None = None,
    quiet: bool = False,
    **origin: Any,
) -> Converted:
    """Convert a weight file into a folder; the network is recognised from the shapes.

    A network's folder holds ``model.safetensors``, timm's ``config.json``, a known answer and the record; a detector's
    holds a checkpoint for MMDetection and the record.

    Args:
        file: The authors' file, or one in their format.
        output: Folder to make; None names it after the weights, in the current folder.
        store: Put it into the local store instead, where ``pretrained=True`` looks first.
        weights: See :func:`read_source`.
        overwrite: Replace a folder that is there.
        expected: Name of the weights that the file must hold.
        quiet: Show no progress.
        **origin: Facts for the record.

    Raises:
        HubError: If the folder cannot be written, or is there already.
        ValueError: If the file cannot be read, is not recognised, holds other weights than expected, or does not
            convert exactly.

    Example:
        >>> convert_file('kw4x_resnet50.pth', store=True).folder
    """
    path = check_weight_file(file)
    with tqdm(
        total=path.stat().st_size, unit='B', unit_scale=True, desc='reading', disable=quiet or None, leave=False
    ) as bar:
        source_sha256 = sha256_of(path, bar.update)
    source = read_source(path, weights)
    origin = {'source_sha256': source_sha256, 'source_entry': source.entry, **origin, 'kw_timm': kw_timm.__version__}
    if is_detector(source.state_dict):
        detector = detector_to_ours(source.state_dict, source.unused)
        name, network = detector.name, detector.backbone
    else:
        network = recognise_network(source.state_dict)
        name = f'{network.name}.{TAG}' if not network.model_args else f'{network.name}.{network.num_classes}_classes'
        converted = to_timm_exact(source.state_dict, network)
    if expected is not None and name != expected:
        raise ValueError(f"'{path}' holds the weights of {name}, expected {expected}. Fetch the file again.")
    if store and not is_detector(source.state_dict) and network.model_args:
        raise HubError(
            f"'{path}' is a {network.name} with {network.num_classes} classes and {network.in_chans} input channels; "
            f'the store holds published networks (1000 classes, 3 channels). Leave --store out.'
        )
    folder = store_folder(name) if store else Path(output or name)
    with new_folder(folder, overwrite) as filling:
        if is_detector(source.state_dict):
            # MMDetection reads this with torch.load, optimizer state would only slow it down.
            checkpoint = {'meta': source.meta, 'state_dict': detector.state_dict, _UNUSED: detector.unused}
            torch.save(checkpoint, filling / f'{name}.pth')
            record = write_record(filling, f'{name}.pth', **origin)
        else:
            save_file(converted, filling / WEIGHTS, metadata={'format': 'pt'})
            # The source is mapped into memory; let it go before the network is run.
            del source, converted
            gc.collect()
            record = _complete_folder(filling, network, **origin)
    return Converted(name, folder, network, record)


def export_to_reference(folder: Path, output: str | Path, overwrite: bool = False) -> str:
    """Write a folder's weights as the authors' code loads them.

    Args:
        folder: Folder made by :func:`convert_file`, from the store or elsewhere; or a weight file.
        output: File to write.
        overwrite: Replace a file that is there.

    Returns:
        What was exported.
    """
    source = read_source(check_stored(folder) if folder.is_dir() else folder)
    checkpoint: dict[str, Any]
    if is_detector(source.state_dict):
        detector = detector_to_ours(source.state_dict, source.unused)
        name = detector.name
        checkpoint = {'meta': source.meta, 'state_dict': detector_to_reference(detector)}
    else:
        network = recognise_network(source.state_dict)
        name = network.name
        checkpoint = {'model': to_reference_exact(to_timm_exact(source.state_dict, network), network)}
    with new_file(Path(output), overwrite) as file:
        torch.save(checkpoint, file)
    return name


def export_to_backbone(folder: Path, output: str | Path, overwrite: bool = False) -> Converted:
    """Write a detector's backbone as a folder that timm loads as ``local-dir:PATH``, without classifier.

    Args:
        folder: A detector's folder or checkpoint.
        output: Folder to make.
        overwrite: Replace a folder that is there.

    Raises:
        HubError: If the weights are no detector's.
    """
    source = read_source(check_stored(folder) if folder.is_dir() else folder)
    if not is_detector(source.state_dict):
        raise HubError(f"'{folder}' holds no detector. 'kw-hub export NAME --backbone' takes the backbone out of one.")
    detector: Detector = detector_to_ours(source.state_dict, source.unused)
    network = detector.backbone
    target = Path(output)
    with new_folder(target, overwrite) as filling:
        save_file(export_backbone(detector), filling / WEIGHTS, metadata={'format': 'pt'})
        record = _complete_folder(filling, network, detector=detector.name, kw_timm=kw_timm.__version__)
    return Converted(f'{network.name}.{detector.name}', target, network, record)


def _complete_folder(folder: Path, network: Network, **facts: Any) -> dict[str, Any]:
    """Add to a network's weights, which the folder has, timm's config, the known answer and the record; return it."""
    model = network.create()
    save_config_for_hf(model, str(folder / 'config.json'))
    model.load_state_dict(load_file(folder / WEIGHTS))
    write_answer(model, folder, network.in_chans)
    return write_record(folder, WEIGHTS, **facts)
