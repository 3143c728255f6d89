"""Test a detector: `kw-mmdet test` from a checkout; the arguments are those of MMDetection's own program."""

import sys

from kw_mmdet.cli import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
