"""Train a detector: checks the config, then runs MMDetection's own program (same arguments, see --help)."""

from kw_mmdet.programs import main

if __name__ == '__main__':
    main('train')
