"""Run the command line as ``python -m kw_timm``."""

import sys

from .cli import main

sys.exit(main())
