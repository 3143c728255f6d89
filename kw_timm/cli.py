"""The command line ``kw-timm``."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import Case, Settings

__all__ = ['main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0; 1 if a part of the work could not be done; 2 for what the user can set right; 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, behind = parser.parse_known_args(arguments)
    images = [text for text in behind if text != '--']
    if behind and hasattr(options, 'images') and not any(text.startswith('-') for text in images):
        options.images += map(Path, images)  # argparse leaves those that come after an option.
    elif behind:
        parser.error(f'unrecognized arguments: {" ".join(behind)}')
    options.command_line = shlex.join(['kw-timm', *arguments])
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (ValueError, OSError) as error:
        print(f'kw-timm: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\nkw-timm: interrupted', file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from .benchmark import MODES
    from .benchmark.session import add_options, positive

    parser = argparse.ArgumentParser(
        prog='kw-timm',
        description='KernelWarehouse networks for timm.',
        epilog='example: kw-timm bench kw1x_resnet50',
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    bench = _add_command(
        commands,
        'bench',
        _bench,
        'measure time and peak memory of a network in its modes, side by side',
        '. Weights are random, results are compared with each other. '
        'Modes: static, the same network without kernel warehouses; straightforward, all cells mixed for '
        'every image and one grouped convolution; default, as a network computes by itself; optimized, by '
        'kw_timm.optimize_for_inference. By --modes only: optimized-bfloat16 and optimized-int8, which store cells and '
        'bases in fewer bits; condconv and odconv, these convolutions in the places of the KW layers, with as many '
        'kernels per layer as KW has cells per mixture; onnxruntime and openvino, the default network as a file of '
        'these runtimes. The bound is the static time and what mixing takes at the '
        "machine's measured limits.",
        'kw-timm bench kw4x_resnet50 kw1x_resnet50 --batch 1 8 --train --csv results.csv',
    )
    bench.add_argument('variants', nargs='*', metavar='VARIANT', help="KW networks, see timm.list_models('kw*')")
    bench.add_argument('--batch', type=positive, nargs='+', default=[1], metavar='N', help='images (1)')
    bench.add_argument('--size', nargs='+', default=['224'], metavar='N', help='224, 800x1333 or 800 1333 pixels (224)')
    bench.add_argument('--train', action='store_true', help='measure a training step too: forward and backward')
    bench.add_argument('--train-batch', type=positive, nargs='+', default=[8], metavar='N', help='images of a step (8)')
    bench.add_argument('--train-size', nargs='+', default=['160'], metavar='N', help='their size in pixels (160)')
    bench.add_argument(
        '--features-only', action='store_true', help='the multi-scale features that a detector uses, no classifier'
    )
    add_options(bench, MODES)
    bench.add_argument(
        '--from-csv', type=Path, nargs='+', metavar='FILE', help='measure nothing, show the results of earlier runs'
    )
    _add_export(commands)
    _add_inspect(commands)
    _add_train(commands)
    _add_validate(commands)
    _add_command(commands, 'list', _list, 'list the KW networks, and which of them have released weights', '.')
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, more: str, example: str | None = None
) -> argparse.ArgumentParser:
    """Add a command, described by a text and what more there is to say."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f'{text[0].upper()}{text[1:]}{more}',
        epilog=None if example is None else f'example: {example}',
    )
    command.set_defaults(command=run)
    return command


def _list(options: argparse.Namespace) -> int:
    import timm

    from .models.derived import DERIVED

    released = timm.list_models('kw*', pretrained=True, include_tags=False)
    names = sorted(timm.list_models('kw*'), key=lambda name: name not in released)
    width = max(map(len, names))
    for name in names:
        static = DERIVED.get(name, '')
        note = 'released weights' if name in released else f'no released weights; pretrained_static={static!r}'
        print(f'{name:<{width}}  {note}')
    return 0


def _add_export(commands: Any) -> None:
    from .benchmark.session import positive

    export = _add_command(
        commands,
        'export',
        _export,
        'write a network to a file for another runtime, run it there and compare it with torch',
        '; prints the largest difference and the times of both.',
        'kw-timm export kw1x_resnet50 --to onnx --dynamic --output kw1x_resnet50.onnx',
    )
    export.add_argument('network', metavar='NAME|CHECKPOINT', help="timm's name, or a weight file of a KW variant")
    export.add_argument('--to', choices=('onnx', 'openvino', 'torch'), required=True, help='runtime')
    export.add_argument('--output', type=Path, metavar='FILE', help='.onnx, .xml or .pt2 (the name, here)')
    export.add_argument(
        '--size', nargs='+', default=['224'], metavar='N', help='224, 800x1333 or 800 1333 pixels (224)'
    )
    export.add_argument('--batch', type=positive, default=1, metavar='N', help='images (1)')
    export.add_argument('--dynamic', action='store_true', help='take any batch, height and width')
    export.add_argument('--optimized', action='store_true', help='export what optimize_for_inference makes of it')
    export.add_argument('--opset', type=positive, metavar='N', help="ONNX operator set (the exporter's choice)")
    export.add_argument('--random-weights', action='store_true', help='instead of published ones')


def _add_inspect(commands: Any) -> None:
    from .benchmark.session import positive

    inspect = _add_command(
        commands,
        'inspect',
        _inspect,
        'show what the attention of a network does: which cells it uses, how far kernels vary between images',
        '; prints tables and a verdict, and writes pictures and one page.',
        'kw-timm inspect kw1x_resnet50 photos --checkpoint last.pth --output inside',
    )
    inspect.add_argument(
        'network', metavar='MODEL', help="timm's name, local-dir:FOLDER, or a KW variant's weight file"
    )
    inspect.add_argument('images', nargs='*', type=Path, metavar='IMAGE', help='files or folders (8 drawn images)')
    inspect.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights, instead of published ones')
    inspect.add_argument('--random-weights', action='store_true', help='as the network is when it is new')
    inspect.add_argument('--size', nargs='+', metavar='N', help="224, 800x1333 or 800 1333 pixels (the network's own)")
    inspect.add_argument(
        '--limit', type=positive, default=64, metavar='N', help='most images to take, evenly spread (64)'
    )
    inspect.add_argument('--output', type=Path, metavar='DIR', help='folder to write to (inspect-MODEL)')


def _add_train(commands: Any) -> None:
    from .training.options import add_train_options

    train = _add_command(
        commands,
        'train',
        _train,
        'train a classifier by the published recipe of the network, or fine-tune it',
        ", over timm's own parts and with its options. Weights, figures of every epoch and the options go to a folder, "
        'from where --resume goes on as if nothing had happened. Several processes by torchrun -m kw_timm train ...',
        'kw-timm train imagenet --model kw1x_resnet18 --batch-size 256 --amp --workers 8',
    )
    add_train_options(train)


def _add_validate(commands: Any) -> None:
    from .training.options import add_validate_options

    validate = _add_command(
        commands,
        'validate',
        _validate,
        'evaluate a classifier: top-1, top-5, throughput, and what was published',
        '. Published networks are evaluated as published: short side 256, bicubic, centre crop 224.',
        'kw-timm validate imagenet --model kw1x_resnet18 --checkpoint train-kw1x_resnet18/model_best.pth.tar',
    )
    add_validate_options(validate)


def _train(options: argparse.Namespace) -> int:
    from .training.command import run_train

    return run_train(options)


def _validate(options: argparse.Namespace) -> int:
    from .training.validate import run_validate

    return run_validate(options)


def _inspect(options: argparse.Namespace) -> int:
    from .benchmark.session import image_size
    from .inspection.command import run_inspect

    return run_inspect(options, image_size(options.size) if options.size else None)


def _export(options: argparse.Namespace) -> int:
    from .benchmark.session import image_size
    from .export import run_export

    return run_export(options, image_size(options.size))


def _bench(options: argparse.Namespace) -> int:
    import torch

    from .benchmark import run_all
    from .benchmark.cases import check_modes
    from .benchmark.session import check_files, settings_of

    if options.from_csv and options.variants:
        raise ValueError('Give variants to measure or --from-csv, not both.')
    if not options.from_csv and not options.variants:
        raise ValueError('Name at least one variant, kw1x_resnet50 for instance.')
    check_files(options)
    if options.from_csv:
        return _show(options)
    threads = torch.get_num_threads()
    try:
        settings = settings_of(options)
        check_modes(options.modes, settings)
        cases = _cases(options, settings)
        total = len(options.variants) * (len(options.batch) + (len(options.train_batch) if options.train else 0))
        return run_all(cases, total, settings, options, options.command_line)
    finally:
        torch.set_num_threads(threads)


def _cases(options: argparse.Namespace, settings: 'Settings') -> Iterator['Case']:
    """Return the configurations: options are checked at once, networks built when it is their turn."""
    from .benchmark import network_cases
    from .benchmark.cases import static_name
    from .benchmark.session import image_size

    size, train_size = image_size(options.size), image_size(options.train_size)
    inference = [(batch, size) for batch in options.batch]
    training = [(batch, train_size) for batch in options.train_batch] if options.train else []
    for variant in options.variants:
        static_name(variant)
        if (1, train_size) in training and 'convnext' not in variant:
            raise ValueError(f'--train-batch 1: a training step of {variant} needs 2 images, for its BatchNorms.')
    modes = list(dict.fromkeys(options.modes))
    rest = (modes, inference, training, options.features_only, settings, options.memory_budget)
    return (case for variant in options.variants for case in network_cases(variant, *rest))


def _show(options: argparse.Namespace) -> int:
    from .benchmark import read_csv
    from .benchmark.report import describe, text_table
    from .benchmark.results import grouped
    from .benchmark.session import write_files

    results = [result for file in options.from_csv for result in read_csv(file)]
    for machine in dict.fromkeys(result.machine for result in results):
        print(describe([machine]))
    for group in grouped(results):
        print('\n' + text_table(list(group.values())))
    print()
    if results:
        write_files(results, options, options.command_line)
    return 0
