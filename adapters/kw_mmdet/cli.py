"""The command line ``kw-mmdet``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ['main']

PROGRAMS = {
    'train': "train a detector: CONFIG, --processes N and the options of MMDetection's train program",
    'test': "test a detector: CONFIG CHECKPOINT (a file or 'published'), --processes N and the options of "
    "MMDetection's test program",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0; 1 if a part of the work could not be done; 2 for what the user can set right; 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and arguments[0] in PROGRAMS:
            from .programs import run_program

            return run_program(arguments[0], arguments[1:])
        options = _parser().parse_args(arguments)
        return options.command(options)
    except (ValueError, OSError) as error:
        print(f'kw-mmdet: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\nkw-mmdet: interrupted', file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='kw-mmdet',
        description="Detectors with KernelWarehouse backbones, trained and tested by MMDetection's own programs. "
        'CONFIG is a file, or the name of a config of this package, e.g. mask_rcnn_kw4x_resnet50_fpn_1x_coco.',
        epilog='example: kw-mmdet train mask_rcnn_kw1x_resnet50_fpn_1x_coco --processes 8',
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for name, text in PROGRAMS.items():
        commands.add_parser(name, help=text, add_help=False)  # for the list above; `main` runs them

    text = "detect in images: draw, and write detections.json in COCO's result form"
    predict = commands.add_parser(
        'predict',
        help=text,
        description=f'{text[0].upper()}{text[1:]}. image_id is the file name, categories count from 1.',
        epilog='example: kw-mmdet predict photographs --config my_config.py --checkpoint epoch_12.pth --output found',
    )
    predict.set_defaults(command=_predict)
    predict.add_argument('images', nargs='+', type=Path, metavar='IMAGE', help='files, and folders of files')
    predict.add_argument('--config', required=True, metavar='CONFIG', help='that the checkpoint was trained with')
    predict.add_argument(
        '--checkpoint', required=True, metavar='FILE', help="(or 'published', for that of the config's name)"
    )
    predict.add_argument('--output', type=Path, default=Path('predictions'), metavar='FOLDER', help='(predictions)')
    predict.add_argument('--score-thr', type=float, default=0.3, metavar='S', help='draw what scores at least S (0.3)')
    predict.add_argument('--no-drawings', action='store_true', help='write detections.json alone')
    predict.add_argument('--device', help='(a GPU if there is one)')
    _add_options(predict)

    text = 'say what a config stands for: levels, parameters, what is frozen, weights, classes, schedule'
    info = commands.add_parser('info', help=text, description=f'{text[0].upper()}{text[1:]}.')
    info.set_defaults(command=_info)
    info.add_argument('config', metavar='CONFIG')
    _add_options(info)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    # A list of its own per occurrence: the framework's parser of values is loaded when a command runs.
    parser.add_argument(
        '--cfg-options', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='change values of the config'
    )


def _config(options: argparse.Namespace) -> object:
    from .programs import load_config, parse_options

    return load_config(options.config, parse_options(options.cfg_options))


def _predict(options: argparse.Namespace) -> int:
    from .predict import Detector, find_images, predict
    from .published import find_checkpoint

    images = find_images(options.images, options.output)
    config = _config(options)
    detector = Detector(config, find_checkpoint(options.checkpoint, options.config), options.device)
    wrong = predict(detector, images, options.output, options.score_thr, not options.no_drawings)
    for sentence in wrong:
        print(f'kw-mmdet: {sentence}', file=sys.stderr)
    print(f'{len(images) - len(wrong)} of {len(images)} images: {options.output / "detections.json"}')
    return 1 if wrong else 0


def _info(options: argparse.Namespace) -> int:
    from .info import describe

    lines = describe(_config(options))
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f'{name:{width}}  {text}')
    return 0
