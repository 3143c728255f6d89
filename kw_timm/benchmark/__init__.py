"""Static, straightforward, default and optimized networks measured side by side: ``kw-timm bench``."""

from .cases import MODES, Case, network_cases, run_case
from .measure import Settings
from .results import Result, read_csv, write_csv
from .session import run_all

__all__ = ['MODES', 'Case', 'Result', 'Settings', 'network_cases', 'read_csv', 'run_all', 'run_case', 'write_csv']
