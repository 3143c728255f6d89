"""The project's weights: manifest, conversion, verification, model cards, the Hub. Command line: ``kw-hub``."""

from .convert import convert_file
from .manifest import Entry, load_manifest
from .verify import verify_folder

__all__ = ['Entry', 'convert_file', 'load_manifest', 'verify_folder']
