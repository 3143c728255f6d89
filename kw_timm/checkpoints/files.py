"""Read weight files, safely."""

from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict as timm_load_state_dict
from torch import nn

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

    Nothing but tensors, containers, numbers and ``argparse.Namespace`` is unpickled.

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
    try:
        state_dict = timm_load_state_dict(str(file), use_ema=use_ema, weights_only=True)
    except Exception as error:
        if 'weights_only' in str(error):
            raise ValueError(
                f"The weight file '{file}' holds objects other than weights and was not loaded: {error}"
            ) from error
        raise ValueError(
            f"The weight file '{file}' ({file.stat().st_size} bytes) cannot be read: it is cut off or not a weight file "
            f'({type(error).__name__}: {error}). Fetch it again.'
        ) from error
    if not isinstance(state_dict, dict) or not any(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ValueError(f"The file '{file}' holds no tensors; expected a state dict or a checkpoint with one.")
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
