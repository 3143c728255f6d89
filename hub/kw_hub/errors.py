"""The error that a user can do something about."""

__all__ = ['HubError']


class HubError(Exception):
    """Something that the user can set right; the message says how. The command line prints it without a traceback."""
