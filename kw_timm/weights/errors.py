"""The error of weights that are not the network's."""

import textwrap

__all__ = ['WeightsMismatchError', 'in_one_line']


class WeightsMismatchError(ValueError, RuntimeError):
    """Weights do not fit a network; the message says whose they are or what is wrong, and what to do.

    A ``RuntimeError`` too, since that is what ``nn.Module.load_state_dict`` raises and callers catch.
    """


def in_one_line(error: Exception) -> str:
    """Return what an error says on one line, of torch's lists of names no more than a few."""
    return textwrap.shorten(str(error), 600, placeholder=' ...')
