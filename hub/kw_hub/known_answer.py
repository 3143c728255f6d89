"""Known answers: a fixed input and a network's answer to it, in float64, to be computed again anywhere."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kw_timm.weights.errors import in_one_line
from kw_timm.weights.sound import first_few

from .errors import HubError

__all__ = ['KNOWN_ANSWER', 'check_answer', 'write_answer']

KNOWN_ANSWER = 'known_answer.safetensors'
SIZE = 96
# Two machines differ by rounding: 1e-16 times the square root of a few thousand additions, layer by layer.
TOLERANCE = 1e-8


def answer(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a network answers.

    Args:
        model: timm network, in float64 and eval mode.
        images: ``(B, C, H, W)`` in float64.

    Returns:
        ``logits: (B, classes)`` (the pooled features of a network without classifier), and per feature level
        ``pyramid_mean/<i>: (B, channels)`` over space.
    """
    with torch.no_grad():
        last, levels = model.forward_intermediates(images)
        answers = {'logits': model.forward_head(last)}
    answers |= {f'pyramid_mean/{i}': level.mean((2, 3)) for i, level in enumerate(levels)}
    return {key: value.contiguous() for key, value in answers.items()}


def write_answer(model: Any, folder: Path, in_chans: int = 3) -> None:
    """Compute a network's known answer and write it into a folder; the network becomes float64, in eval mode."""
    images = torch.randn(2, in_chans, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    answers = answer(model.double().eval(), images.double())
    if not all(torch.isfinite(value).all() for value in answers.values()):
        raise HubError('The network answers with numbers that are not finite: the weights are damaged.')
    save_file({'input': images, **answers}, folder / KNOWN_ANSWER, metadata={'format': 'pt'})


def check_answer(model: Any, folder: Path) -> float:
    """Compute a known answer again, compare, and return the largest relative difference.

    Raises:
        HubError: If the file is damaged or the answers differ.
    """
    try:
        expected = load_file(folder / KNOWN_ANSWER)
        answers = answer(model.double().eval(), expected.pop('input').double())
    except Exception as error:
        raise HubError(
            f"'{folder / KNOWN_ANSWER}' cannot be read or is another network's ({in_one_line(error)}). Fetch or "
            f'convert the weights again.'
        ) from error
    if answers.keys() != expected.keys():
        raise HubError(
            f"'{folder / KNOWN_ANSWER}' is another network's: it has {first_few(list(expected))}. Fetch or convert the "
            f'weights again.'
        )
    worst = 0.0
    for key, value in expected.items():
        difference = _difference(answers[key], value)
        if not difference <= TOLERANCE:
            raise HubError(
                f"The network in '{folder}' answers differently than when it was converted: '{key}' differs by "
                f'{difference:.2g} (relative), at most {TOLERANCE:g} is rounding. The weights or the code changed.'
            )
        worst = max(worst, difference)
    return worst


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the largest number; networks without training may answer all zeros."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float('inf')
    return 0.0 if torch.equal(a, b) else float((a - b).abs().max() / b.abs().max())
