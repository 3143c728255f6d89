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
from kw_timm.weights import check_weight_file
from kw_timm.weights.detectors import detector_to_reference, export_backbone
from kw_timm.weights.exact import Network, to_reference_exact
from kw_timm.weights.store import WEIGHTS, check_stored, sha256_of, store_folder

from .errors import HubError
from .files import new_file, new_folder, write_record
from .known_answer import write_answer
from .source import UNUSED, read_source, recognise

__all__ = ['Converted', 'convert_file', 'export_to_backbone', 'export_to_reference']


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
        weights: See :func:`~kw_hub.source.read_source`.
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
    found = recognise(source)
    name, network = found.name, found.network
    if expected is not None and name != expected:
        raise ValueError(f"'{path}' holds the weights of {name}, expected {expected}. Fetch the file again.")
    if store and found.detector is None and network.model_args:
        raise HubError(
            f"'{path}' is a {network.name} with {network.num_classes} classes and {network.in_chans} input channels; "
            f'the store holds published networks (1000 classes, 3 channels). Leave --store out.'
        )
    folder = store_folder(name) if store else Path(output or name)
    with new_folder(folder, overwrite) as filling:
        if found.detector is not None:
            # MMDetection reads this with torch.load, optimizer state would only slow it down.
            checkpoint = {'meta': source.meta, 'state_dict': found.state_dict, UNUSED: found.detector.unused}
            torch.save(checkpoint, filling / f'{name}.pth')
            record = write_record(filling, f'{name}.pth', **origin)
        else:
            save_file(found.state_dict, filling / WEIGHTS, metadata={'format': 'pt'})
            # The source is mapped into memory; let it go before the network is run.
            del source, found
            gc.collect()
            try:
                record = _complete_folder(filling, network, **origin)
            except HubError as error:
                raise HubError(f"'{path}' was not converted. {error}") from error
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
    found = recognise(source)
    checkpoint: dict[str, Any]
    if found.detector is not None:
        checkpoint = {'meta': source.meta, 'state_dict': detector_to_reference(found.detector)}
    else:
        checkpoint = {'model': to_reference_exact(found.state_dict, found.network)}
    with new_file(Path(output), overwrite) as file:
        torch.save(checkpoint, file)
    return found.name if found.detector is not None else found.network.name


def export_to_backbone(folder: Path, output: str | Path, overwrite: bool = False) -> Converted:
    """Write a detector's backbone as a folder that timm loads as ``local-dir:PATH``, without classifier.

    Args:
        folder: A detector's folder or checkpoint.
        output: Folder to make.
        overwrite: Replace a folder that is there.

    Raises:
        HubError: If the weights are no detector's.
    """
    detector = recognise(read_source(check_stored(folder) if folder.is_dir() else folder)).detector
    if detector is None:
        raise HubError(f"'{folder}' holds no detector. 'kw-hub export NAME --backbone' takes the backbone out of one.")
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
