"""``python -m kw_mmdet`` is the command ``kw-mmdet``."""

import sys

from .cli import main

sys.exit(main())
