"""Static, straightforward, default and optimized networks measured side by side: ``kw-timm bench``."""

from .cases import MODES, Case, inference_case, network_cases, training_case
from .errors import BenchmarkError
from .results import Result, read_csv, write_csv
from .run import Settings, run_case
from .session import Outputs, run_all

__all__ = [
    'MODES',
    'BenchmarkError',
    'Case',
    'Outputs',
    'Result',
    'Settings',
    'inference_case',
    'network_cases',
    'read_csv',
    'run_all',
    'run_case',
    'training_case',
    'write_csv',
]
