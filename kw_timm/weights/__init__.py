"""Weight files of the reference implementation <-> this package's."""

from .convert import reference_keys, to_reference_state_dict, to_timm_state_dict
from .files import check_weight_file, load_checkpoint, read_weight_file
from .variants import identify_variant

__all__ = [
    'check_weight_file',
    'identify_variant',
    'load_checkpoint',
    'read_weight_file',
    'reference_keys',
    'to_reference_state_dict',
    'to_timm_state_dict',
]
