"""The error of weights that are not the network's."""

__all__ = ['WeightsMismatchError']


class WeightsMismatchError(ValueError, RuntimeError):
    """Weights do not fit a network; the message says whose they are or what is wrong, and what to do.

    A ``RuntimeError`` too, since that is what ``nn.Module.load_state_dict`` raises and callers catch.
    """
