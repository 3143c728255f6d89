"""Read weight files, safely."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from .unpickle import load_pickled, select_weights, unreadable

__all__ = ['check_weight_file', 'load_checkpoint', 'read_weight_file']


def check_weight_file(path: str | Path) -> Path:
    """Return the path of a weight file that exists and is not empty.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder or empty.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"There is no weight file '{file}'. Check the path, or download the file first.")
    if file.is_dir():
        raise ValueError(f"'{file}' is a folder; name the weight file in it.")
    if file.stat().st_size == 0:
        raise ValueError(f"The weight file '{file}' is empty; its download was cut off. Delete it and fetch it again.")
    return file


def read_weight_file(path: str | Path, use_ema: bool = True) -> dict[str, Any]:
    """Read the state dict of a weight file: safetensors, or ``torch.save`` with or without training state.

    Nothing but tensors, containers, numbers, ``argparse.Namespace`` and numpy values is unpickled.

    Args:
        path: Weight file.
        use_ema: Prefer averaged weights (``model_ema``, ``state_dict_ema``) where the file has them.

    Returns:
        State dict, on the CPU, without wrapper prefixes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, cut off, no weight file, or holds objects that are not allowed.
    """
    file = check_weight_file(path)
    if file.suffix == '.safetensors':
        try:
            tensors: dict[str, Any] = load_file(file)
        except Exception as error:
            raise unreadable(file, error) from error
        return tensors
    checkpoint = load_pickled(file)
    try:
        state_dict, _ = select_weights(checkpoint, use_ema)
    except ValueError as error:
        raise ValueError(f"The file '{file}': {error}") from error
    return state_dict


def load_checkpoint(model: nn.Module, path: str | Path, use_ema: bool = True, strict: bool = True) -> Any:
    """Load a weight file, of the reference or of this package, into a model.

    Args:
        model: KW network (or any network, for files with its own names).
        path: Weight file.
        use_ema: Prefer averaged weights where the file has them.
        strict: Require that keys match exactly.

    Returns:
        Missing and unexpected keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or holds another variant's weights.

    Example:
        >>> load_checkpoint(timm.create_model('kw1x_resnet18'), 'kw1x_resnet18.pth')
    """
    return model.load_state_dict(read_weight_file(path, use_ema), strict=strict)
