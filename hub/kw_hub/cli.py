"""The command line ``kw-hub``."""

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kw_timm.weights.store import DamagedWeightsError, WeightsNotFoundError, store_folder

from .errors import HubError

__all__ = ['main']

_MISTAKES = (HubError, WeightsNotFoundError, DamagedWeightsError, ValueError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 1 for what the user can set right, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
        sys.stdout.flush()
    except _MISTAKES as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 0
        print(f'kw-hub: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            '\nkw-hub: interrupted; nothing that was there was changed. Run the command again: downloads and uploads '
            'go on where they stopped.',
            file=sys.stderr,
        )
        return 130
    return 0


def _reader_has_gone() -> bool:
    """Say whether nobody reads the output any more, as after `kw-hub list | head`; the rest of it is dropped then."""
    # Uploads can break pipes too; asking the output itself tells which it was.
    poll = select.poll()
    poll.register(sys.stdout, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='kw-hub',
        description='Weights of kw-timm: list, fetch, convert, verify, export, publish.',
        epilog='example: kw-hub fetch kw4x_resnet50',
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def add(
        name: str, command: Callable[[argparse.Namespace], None], text: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + '.',
            epilog=f'example: {example}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    sub = add('list', _list, 'show all weights and where they are available now', 'kw-hub list --offline')
    sub.add_argument('--offline', action='store_true', help='do not ask the Hub')

    sub = add(
        'fetch',
        _fetch,
        "download the authors' file, convert and verify it, put it in the local store",
        'kw-hub fetch kw4x_resnet50',
    )
    sub.add_argument('name', metavar='NAME')
    sub.add_argument('--force', action='store_true', help='fetch again what the store has')
    sub.add_argument('--keep', action='store_true', help="keep the authors' file")
    sub.add_argument('--record', action='store_true', help='write the sha256 sums into the manifest (for maintainers)')
    _add_weights(sub)

    sub = add(
        'convert',
        _convert,
        'convert a file of the authors; what it is, is told from its shapes',
        'kw-hub convert kw4x_resnet50.pth --store',
    )
    sub.add_argument('file', metavar='FILE')
    where = sub.add_mutually_exclusive_group()
    where.add_argument('--output', metavar='FOLDER', help='folder to make (default: named after the weights)')
    where.add_argument('--store', action='store_true', help='into the local store, where pretrained=True finds it')
    sub.add_argument('--force', action='store_true', help='replace what is there')
    _add_weights(sub)

    sub = add(
        'verify',
        _verify,
        'check weights: in the store, a file, a folder, or a repository on the Hub',
        'kw-hub verify kw4x_resnet50',
    )
    sub.add_argument('what', metavar='NAME|FILE|FOLDER|REPO')
    sub.add_argument('--revision', help='of a repository (default: the one that pretrained=True uses)')

    sub = add(
        'export',
        _export,
        "write weights in the authors' format, or a detector's backbone for timm",
        'kw-hub export kw4x_resnet50 --to-reference kw4x_resnet50.pth',
    )
    sub.add_argument('what', metavar='NAME|FILE|FOLDER')
    target = sub.add_mutually_exclusive_group(required=True)
    target.add_argument('--to-reference', metavar='FILE', help="file for the authors' code")
    target.add_argument('--backbone', metavar='FOLDER', help="folder for timm with a detector's backbone")
    sub.add_argument('--force', action='store_true', help='replace what is there')

    sub = add(
        'publish',
        _publish,
        'publish weights of the store on the Hub',
        'kw-hub publish kw4x_resnet50 --to my-org --dry-run',
    )
    sub.add_argument('name', metavar='NAME')
    sub.add_argument('--to', metavar='ORG', required=True, help='organisation or user on the Hub')
    sub.add_argument('--revision', help='tag to publish as (default: the one that pretrained=True uses)')
    sub.add_argument('--dry-run', action='store_true', help='only show what would be done, and the model card')

    sub = add(
        'tables',
        _tables,
        "write the manifest's tables into a Markdown file (for maintainers)",
        'kw-hub tables README.md',
    )
    sub.add_argument('file', metavar='FILE')
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--weights',
        choices=('auto', 'ema', 'model'),
        default='auto',
        help='averaged (EMA) weights or the plain ones, if the file has both (default: averaged if there are any)',
    )


def _list(options: argparse.Namespace) -> None:
    from .listing import listing

    print(listing(ask_hub=not options.offline))


def _fetch(options: argparse.Namespace) -> None:
    from .fetch import fetch
    from .manifest import find_entry

    entry = find_entry(options.name)
    converted = fetch(entry, options.force, options.keep, options.weights, options.record)
    if converted is None:
        print(f"{entry.name} is in the store already: '{store_folder(entry.name)}' (--force fetches it again)")
        return
    _verify_and_print(converted.folder)
    print(f"{entry.name} is in the store: '{converted.folder}', sha256 {converted.record['sha256']}")
    if entry.kind == 'detector':
        print(f'Test it: bash tools/dist_test.sh {entry.config} {converted.folder / entry.file} 1 --eval bbox segm')
    elif entry.kind == 'static':
        print(f"Use it: timm.create_model('local-dir:{converted.folder}', pretrained=True)")
    else:
        print(f"Use it: timm.create_model('{entry.network}', pretrained=True)")


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert_file

    converted = convert_file(options.file, options.output, options.store, options.weights, options.force)
    entry = converted.record['source_entry']
    print(f"{converted.name}: '{converted.folder}'" + (f" (from the file's '{entry}')" if entry else ''))
    _verify_and_print(converted.folder)


def _verify(options: argparse.Namespace) -> None:
    from .manifest import find_entry
    from .verify import verify_file, verify_repository

    what = options.what.removeprefix('hf-hub:')
    path = Path(what)
    if path.is_dir():
        _verify_and_print(path)
    elif path.is_file():
        _print_checks(verify_file(path))
    elif what.count('/') == 1 and path.suffix not in ('.pth', '.pt', '.safetensors'):
        repository, _, revision = what.partition('@')
        _print_checks(verify_repository(repository, options.revision or revision or None))
    elif '/' in what or path.suffix in ('.pth', '.pt', '.safetensors'):
        raise HubError(f"There is no file or folder '{what}'.")
    else:
        entry = find_entry(what)
        if store_folder(entry.name).is_dir():
            _verify_and_print(store_folder(entry.name))
        else:
            _print_checks(verify_repository(entry.hub_id, options.revision))


def _export(options: argparse.Namespace) -> None:
    from .convert import export_to_backbone, export_to_reference
    from .manifest import find_entry

    path = Path(options.what)
    if not path.exists():
        entry = find_entry(options.what)
        path = store_folder(entry.name)
        if not path.is_dir():
            raise HubError(f"{entry.name} is not in the local store. Run 'kw-hub fetch {options.what}' first.")
    if options.to_reference:
        name = export_to_reference(path, options.to_reference, options.force)
        print(f"{name}, in the authors' format: '{options.to_reference}'")
    else:
        converted = export_to_backbone(path, options.backbone, options.force)
        print(f"Backbone {converted.network.name}: timm.create_model('local-dir:{converted.folder}', pretrained=True)")


def _publish(options: argparse.Namespace) -> None:
    from .card import model_card
    from .manifest import find_entry
    from .publish import HubNotReachedError, plan, publish

    entry = find_entry(options.name)
    if options.dry_run:
        try:
            todo = plan(entry, options.to, options.revision)
        except HubNotReachedError as error:
            print(f'kw-hub: the Hub was not compared: {error}', file=sys.stderr)
            todo = plan(entry, options.to, options.revision, compare=False)
        print(model_card(entry, todo.repository, todo.revision))
        print('\n'.join(f'would {line}' for line in todo.lines()) or f'{todo.repository}: nothing to do')
        return
    done = publish(entry, options.to, options.revision)
    print('\n'.join(f'did {line}' for line in done.lines()) or f'{done.repository}: nothing to do, it is complete')


def _tables(options: argparse.Namespace) -> None:
    from .tables import update_file

    changed = update_file(Path(options.file))
    print(f'{options.file}: {"updated" if changed else "up to date"}')


def _verify_and_print(folder: Path) -> None:
    from .verify import verify_folder

    _print_checks(verify_folder(folder))


def _print_checks(lines: list[str]) -> None:
    for line in lines:
        print(f'ok: {line}')
