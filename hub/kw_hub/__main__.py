"""Run the command line as ``python -m kw_hub``."""

import sys

from .cli import main

sys.exit(main())
