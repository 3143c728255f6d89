"""What a benchmark can tell its user."""

import torch

__all__ = ['BenchmarkError', 'is_out_of_memory']


class BenchmarkError(ValueError):
    """Something that the user can set right; the text says what."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception reports that memory ran out; torch has no type of its own for the CPU's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", 'not enough memory', 'out of memory')
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
