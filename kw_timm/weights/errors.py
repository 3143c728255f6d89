"""Errors of weights that are not the network's, not there or damaged."""

import textwrap

__all__ = ['DamagedWeightsError', 'WeightsMismatchError', 'WeightsNotFoundError', 'in_one_line']


class WeightsMismatchError(ValueError, RuntimeError):
    """Weights do not fit a network; the message says whose they are or what is wrong, and what to do.

    A ``RuntimeError`` too, since that is what ``nn.Module.load_state_dict`` raises and callers catch.
    """


class WeightsNotFoundError(RuntimeError):
    """Pretrained weights are neither in the store nor to be had from anywhere."""


class DamagedWeightsError(RuntimeError):
    """A weight file is not what it was when it was stored or published."""


def in_one_line(error: Exception) -> str:
    """Return what an error says on one line, of torch's lists of names no more than a few."""
    return textwrap.shorten(str(error), 600, placeholder=' ...')
