"""What can be set, and where each value comes from: the command line, else a YAML file, else the recipe."""

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from timm.utils import ParseKwargs

from .recipes import Recipe, recipe_of

__all__ = ['add_data_options', 'add_train_options', 'add_validate_options', 'read_config', 'resolve']

# Of all that is not the recipe's; None where timm or the network decides.
DEFAULTS: dict[str, Any] = {
    **dict(dataset='', train_split='train', val_split='validation', class_map='', batch_size=128, workers=4),
    **dict(model=None, recipe=None, pretrained=False, pretrained_static=None, initial_checkpoint=None),
    **dict(num_classes=None, img_size=None, model_kwargs={}, attention='trained', resume=None, output=None),
    **dict(lr=None, grad_accum_steps=1, amp=False, amp_dtype='bfloat16', model_dtype='float32', channels_last=False),
    **dict(torchcompile=None, grad_checkpointing=False, sync_bn=False, no_aug=False, seed=42, device=None),
    **dict(log_interval=50, recovery_interval=0, validation_batch_size=None, interpolation=None, crop_pct=None),
    **dict(generated=512),
}


PRECISIONS = ('float32', 'bfloat16', 'float16', 'float64')


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what training and evaluating have in common."""
    add = parser.add_argument
    add('data_dir', nargs='?', metavar='DATA', help='folder of images, a .tar, or as --dataset says (a generated set)')
    add('--dataset', metavar='NAME', help="kind of data as timm's, hfds/NAME, wds/NAME, torch/NAME (folder or tar)")
    add('--val-split', metavar='NAME', help='(validation)')
    add('--class-map', metavar='FILE', help='classes of folders, a name a line')
    add('-j', '--workers', type=int, metavar='N', help='processes that read images (4)')
    add('--num-classes', type=int, metavar='N', help="classes (the data's, where they are folders, else the network's)")
    add('--img-size', type=int, metavar='N', help="(the network's)")
    add('--interpolation', metavar='NAME', help="of evaluation (bicubic, or the network's)")
    add('--crop-pct', type=float, metavar='P', help="of evaluation (0.875, or the network's)")
    add('--model-kwargs', nargs='+', action=ParseKwargs, metavar='KEY=VALUE', help="the network's arguments")
    add('--device', help='cpu, cuda, cuda:N (cuda where there is one)')
    add('--generated', type=int, metavar='N', help='images of the generated set (512)')


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training; those of the recipe by its own names."""
    add = parser.add_argument
    add_data_options(parser)
    flag: dict[str, Any] = dict(action=argparse.BooleanOptionalAction, default=None)
    add('--model', metavar='NAME', help="network, see timm.list_models('kw*')")
    add('-c', '--config', type=Path, metavar='FILE', help="YAML file of options, as timm's")
    add('--recipe', metavar='NAME', help="network whose recipe to take (the model's)")
    add('--train-split', metavar='NAME', help='(train)')
    add('-b', '--batch-size', type=int, metavar='N', help='images of a process and micro-batch (128)')
    add('--validation-batch-size', type=int, metavar='N', help='(as in training)')
    add('--grad-accum-steps', type=int, metavar='N', help='micro-batches of a step (1)')
    add('--lr', type=float, metavar='LR', help='learning rate, whatever the batch is (lr-base in proportion to it)')
    add('--pretrained', **flag, help="begin with the network's published weights")
    add('--pretrained-static', metavar='NAME|FILE', help='begin where a trained static network stands')
    add('--initial-checkpoint', type=Path, metavar='FILE', help='begin with the weights of a file; classes may differ')
    add('--attention', choices=('trained', 'frozen'), help='let the attention learn (trained)')
    add('--amp', **flag, help='compute in mixed precision')
    add('--amp-dtype', choices=('bfloat16', 'float16'), help='... of this type (bfloat16)')
    add('--model-dtype', choices=('float32', 'float64'), help='type of the weights (float32)')
    add('--channels-last', **flag, help='layout of images')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the network')
    add('--grad-checkpointing', **flag, help='keep less for the gradient and compute it again')
    add('--sync-bn', **flag, help='BatchNorms over all processes; on GPUs')
    add('--no-aug', action='store_true', default=None, help='train on centre crops')
    add('--seed', type=int, metavar='N', help='(42)')
    add('--output', type=Path, metavar='DIR', help='where everything goes (train-MODEL)')
    add(
        '--resume',
        nargs='?',
        const=Path(),
        type=Path,
        metavar='FILE',
        help="go on from a checkpoint (the output's last)",
    )
    add('--recovery-interval', type=int, metavar='N', help='save within epochs, too, every N steps (0, never)')
    add('--log-interval', type=int, metavar='N', help='steps between two looks at the loss on a GPU (50)')
    group = parser.add_argument_group(
        'recipe', 'By default that of the published network; see kw_timm.training.Recipe.'
    )
    for name, kind in _kinds().items():
        if kind is bool:
            group.add_argument(_flag(name), **flag)
        else:
            group.add_argument(_flag(name), type=kind, metavar=kind.__name__.upper())


def add_validate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of evaluating."""
    add = parser.add_argument
    add_data_options(parser)
    add('--model', metavar='NAME', help='network, KW or any of timm')
    add('--all', action='store_true', help='all released KW networks that weights are found of, in one table')
    add('--checkpoint', type=Path, metavar='FILE', help='weights, averaged ones if there are (the published ones)')
    add('-b', '--batch-size', type=int, metavar='N', help='images of a process (128)')
    add('--optimized', action='store_true', help='by optimize_for_inference')
    add('--precision', choices=PRECISIONS, default='float32', help='type of weights and images (float32)')


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def _kinds() -> dict[str, type]:
    """Return the type of each value of a recipe."""
    hints = get_type_hints(Recipe)
    return {field.name: (get_args(hints[field.name]) or (hints[field.name],))[0] for field in fields(Recipe)}


def read_config(file: Path) -> dict[str, Any]:
    """Read a YAML file of options, as timm's ``--config``; names have underscores.

    Raises:
        ValueError: If it cannot be read, or holds what is no option.
    """
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The config '{file}' cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"The config '{file}' must be 'name: value' lines of YAML.")
    known, kinds = {*DEFAULTS, 'data_dir', *_kinds()}, _kinds()
    read: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace('-', '_')
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"The config '{file}' sets '{key}', which is no option here"
                + (f'; did you mean {close[0]}?' if close else '; kw-timm train --help lists them.')
            )
        wrong = f"The config '{file}' sets {key} to {value!r}, expected a {kinds.get(name, str).__name__}."
        if name in kinds and value is not None and not isinstance(value, bool) == (kinds[name] is bool):
            raise ValueError(wrong)
        try:
            read[name] = kinds[name](value) if name in kinds and value is not None else _number(value)
        except (TypeError, ValueError) as error:
            raise ValueError(wrong) from error
    return read


def _number(value: Any) -> Any:
    """Return a number for 1e-3, which YAML reads as text, and anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def resolve(options: argparse.Namespace) -> tuple[Recipe, argparse.Namespace]:
    """Return the recipe, with what was set in it, and all other options, each with its value.

    A recipe for another number of epochs keeps the shares of warm-up and annealing. A network that begins with weights
    is not annealed: weights live at temperature 0.

    Raises:
        ValueError: If an option is out of range, or two exclude each other.
    """
    config = read_config(options.config) if options.config else {}
    config = {key: value for key, value in config.items() if value is not None}
    given = {key: value for key, value in vars(options).items() if value is not None}
    values = {**DEFAULTS, 'data_dir': None, **config, **given}
    if not values['model']:
        raise ValueError("Name the network to train: --model kw1x_resnet18, for instance; timm.list_models('kw*').")
    recipe = recipe_of(values['model'], values['recipe'])
    names = asdict(recipe).keys()
    own = {key: value for key, value in {**config, **given}.items() if key in names}
    if 'epochs' in own and own['epochs'] >= 1:
        recipe = recipe.shortened(own['epochs'])
    starts = [key for key in ('pretrained', 'pretrained_static', 'initial_checkpoint') if values[key]]
    if len(starts) > 1:
        raise ValueError(f'A network begins in one way; choose one of {", ".join(map(_flag, starts))}.')
    if starts:
        recipe = replace(recipe, temperature_epochs=0.0, init='live')
    if not (values['data_dir'] or values['dataset']):
        own.setdefault('hflip', 0.0)  # Mirrored, a generated image is one of another class.
    recipe = replace(recipe, **own)
    settings = argparse.Namespace(**{key: value for key, value in values.items() if key in {*DEFAULTS, 'data_dir'}})
    settings.output = Path(settings.output or f'train-{settings.model.replace("/", "-").replace(":", "-")}')
    _check(recipe, settings)
    return recipe, settings


def _check(recipe: Recipe, settings: argparse.Namespace) -> None:
    least = {'epochs': 1, 'lr_base_size': 1, 'batch_size': 1, 'grad_accum_steps': 1, 'log_interval': 1, 'generated': 8}
    values = {**asdict(recipe), **vars(settings)}
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != 'seed':
            lowest = least.get(key, 0)
            if not lowest <= value < float('inf'):
                raise ValueError(f'{_flag(key)} must be {lowest} or more, got {value!r}.')
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(f'--warmup-epochs {recipe.warmup_epochs:g} must be fewer than --epochs {recipe.epochs}.')
    if (recipe.mixup or recipe.cutmix) and settings.batch_size % 2:
        raise ValueError(f'Mixup and CutMix need an even --batch-size, got {settings.batch_size}.')
    if recipe.init not in ('published', 'live'):
        raise ValueError(f"--init must be 'published' or 'live', got {recipe.init!r}.")
