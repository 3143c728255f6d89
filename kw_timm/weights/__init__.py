"""Weight files of the reference implementation <-> this package's."""

from .convert import reference_keys, to_reference_state_dict, to_timm_state_dict
from .errors import WeightsMismatchError
from .files import check_weight_file, read_weight_file
from .load import load_checkpoint, unwrap_weights
from .static_start import load_static
from .variants import identify_variant

__all__ = [
    'WeightsMismatchError',
    'check_weight_file',
    'identify_variant',
    'load_checkpoint',
    'load_static',
    'read_weight_file',
    'reference_keys',
    'to_reference_state_dict',
    'to_timm_state_dict',
    'unwrap_weights',
]
