"""Read weight files, safely: one file, or the shards that an index names."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from .sound import check_stored, first_few
from .unpickle import load_pickled, select_weights, unreadable

__all__ = ['check_weight_file', 'is_safetensors', 'read_weight_file']

_INDEX = '.index.json'
# What Accelerate, Transformers and the Hub call the weights in a folder.
_IN_FOLDERS = tuple(f'{name}{end}' for name in ('model.safetensors', 'pytorch_model.bin') for end in ('', _INDEX))


def check_weight_file(path: str | Path) -> Path:
    """Return the path of a weight file that exists and is not empty.

    Args:
        path: Weight file, index of shards, or a folder with one by the name that Accelerate and Transformers give it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder without such a file, or empty.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"There is no weight file '{file}'. Check the path, or download the file first.")
    if file.is_dir():
        found = next((file / name for name in _IN_FOLDERS if (file / name).is_file()), None)
        if found is None and (file / '.metadata').is_file():
            raise ValueError(
                f"'{file}' is a folder of torch.distributed.checkpoint. Make it one file, by "
                f"torch.distributed.checkpoint.format_utils.dcp_to_torch_save('{file}', FILE)."
            )
        if found is None:
            raise ValueError(f"'{file}' is a folder; name the weight file in it.")
        file = found
    if not file.is_file():
        raise ValueError(f"'{file}' is no file that could be read; name a weight file.")
    if file.stat().st_size == 0:
        raise ValueError(f"The weight file '{file}' is empty; its download was cut off. Delete it and fetch it again.")
    return file


def read_weight_file(path: str | Path, use_ema: bool = True) -> dict[str, Any]:
    """Read the state dict of a weight file: safetensors, or ``torch.save`` with or without training state.

    Nothing but tensors, containers, numbers, ``argparse.Namespace`` and numpy values is unpickled.

    Args:
        path: Weight file; an index (``model.safetensors.index.json``), whose shards are read; or the folder of either.
        use_ema: Prefer averaged weights (``model_ema``, ``state_dict_ema``) where the file has them.

    Returns:
        State dict, on the CPU, without wrapper prefixes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, cut off, no weight file, or holds objects that are not allowed.
    """
    file = check_weight_file(path)
    if file.name.endswith(_INDEX):
        content: Any = _read_shards(file)
    elif is_safetensors(file):
        content = _read_safetensors(file)
    else:
        content = load_pickled(file)
    try:
        state_dict, _ = select_weights(content, use_ema)
        check_stored(state_dict)
    except ValueError as error:
        raise ValueError(f"The file '{file}': {error}") from error
    return state_dict


def is_safetensors(file: Path) -> bool:
    """Say whether a file is one of safetensors, by its name or by how it begins: a length, then JSON."""
    if file.suffix == '.safetensors':
        return True
    with file.open('rb') as opened:
        start = opened.read(9)
    return start[8:] == b'{' and start[5:8] == bytes(3)


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        tensors: dict[str, Any] = load_file(file)
    except Exception as error:
        raise unreadable(file, error) from error
    return tensors


def _read_shards(index: Path) -> dict[str, Any]:
    """Read all files that an index names; every name it lists must be in the file that it says."""
    try:
        weight_map = json.loads(index.read_text())['weight_map']
        files = sorted(set(weight_map.values()))
        # Beside the index, nowhere else.
        well_formed = all(Path(name).name == name and not name.endswith(_INDEX) for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(index, error) from error
    if not files or not well_formed:
        raise ValueError(f"The index '{index}' names no files beside it in its weight_map. Fetch it again.")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The index '{index}' names {len(files)} files; not there: {first_few(missing)}. Fetch all into one folder."
        )
    tensors: dict[str, Any] = {}
    for name in files:
        tensors |= read_weight_file(index.parent / name)
    return tensors
