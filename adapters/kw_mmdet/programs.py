"""Run MMDetection's own train and test programs on a config that was checked first, in one process or several."""

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import mmdet
import torch
import torch.distributed as dist

from .checks import check_config
from .configs import find_config
from .generation import GENERATION, Config, DictAction, get_device, translate_options
from .published import find_checkpoint, published_name

__all__ = ['load_config', 'parse_options', 'program_path', 'run_program']

SPLITS = {'train': ('train', 'val'), 'test': ('test',)}


def program_path(name: str) -> Path:
    """Return the path of MMDetection's ``train.py`` or ``test.py``, which its wheel carries.

    Raises:
        FileNotFoundError: If the installed MMDetection does not carry its programs.
    """
    path = Path(mmdet.__file__).parent / '.mim' / 'tools' / f'{name}.py'
    if not path.is_file():
        wanted = 'mmdet==2.28.2' if GENERATION == 2 else 'mmdet==3.3.0'
        raise FileNotFoundError(
            f"MMDetection {mmdet.__version__} has no '{path}'. Install it from its wheel: pip install {wanted}"
        )
    return path


def load_config(name: str, options: dict | None = None) -> Config:
    """Return a config, a file or one of ours, with the values of ``--cfg-options`` in it.

    Raises:
        FileNotFoundError: If there is no such config, or a file that it inherits does not exist.
        ValueError: If the file cannot be read as a detector's config.
    """
    path = find_config(name)
    try:
        config = Config.fromfile(str(path))
        config.merge_from_dict(options or {})
    except FileNotFoundError:
        raise  # says which file
    except Exception as error:
        # A config is a program: it, and mmcv's reader of it, may raise anything.
        raise ValueError(f"The config '{path}' cannot be used: {type(error).__name__}: {error}") from error
    if 'model' not in config:
        raise ValueError(f"The config '{path}' is no detector's: it has no 'model'.")
    return config


def run_program(name: str, arguments: Sequence[str]) -> int:
    """Check a config, then hand over to MMDetection's program.

    Args:
        name: ``'train'`` or ``'test'``.
        arguments: Those of MMDetection's program, and ``--processes N``. More processes than one, and several machines
            (environment: ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR``, ``PORT``), are started by torchrun.

    Returns:
        The exit status.

    Raises:
        ValueError: If the config or a number is wrong.
        FileNotFoundError: If a file that is named does not exist, or published weights cannot be had.
        SystemExit: If MMDetection's program does not know an argument, or after ``--help``.
    """
    own = argparse.ArgumentParser(prog=f'kw-mmdet {name}', add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    own.add_argument(
        '--processes',
        metavar='N',
        help='processes on this machine, one per GPU, or any number on the CPU (1); several machines by the '
        'environment variables NNODES, NODE_RANK, MASTER_ADDR and PORT',
    )
    known, others = own.parse_known_args(arguments)
    if {'-h', '--help'} & set(others):
        own.print_help()
    program = _program(name)
    others = translate_options(others)
    sys.argv = [own.prog, *others]
    try:
        args = program.parse_args()
    except ValueError as error:  # of MMDetection's reader of options, which does not say of which
        raise ValueError(f'--cfg-options takes KEY=VALUE ({error}).') from error
    # The path takes the name's place, so that MMDetection finds configs of ours.
    path = str(find_config(args.config))
    others[others.index(args.config)] = path
    if name == 'test':
        published_name(args.checkpoint, path)  # before the config is read; fetched once all is checked
    processes = count_processes(known.processes)
    if os.environ.get('RANK', '0') == '0':
        config = load_config(path, args.cfg_options)
        check_config(config, SPLITS[name])
        _check_modes(config, args)
    if name == 'test':
        others[others.index(args.checkpoint)] = str(find_checkpoint(args.checkpoint, path))
    machines = os.environ.get('NNODES', '1')
    if args.launcher != 'none' or (processes == 1 and machines == '1'):
        return _run_here(program, others)
    if getattr(args, 'show', False) or getattr(args, 'show_dir', None):
        print(f'{own.prog}: to draw (--show, --show-dir) takes one process; nothing is drawn', file=sys.stderr)
    return _run_processes(name, [*others, '--launcher', 'pytorch'], processes, machines)


def parse_options(options: Sequence[str]) -> dict:
    """Return what ``--cfg-options KEY=VALUE ...`` stands for.

    Raises:
        ValueError: If one has no '='.
    """
    for option in options:
        if '=' not in option:
            raise ValueError(f"--cfg-options takes KEY=VALUE, got '{option}'.")
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args(['--cfg-options', *options] if options else []).cfg_options


def count_processes(text: str | None) -> int:
    """Return the number of processes on this machine.

    Raises:
        ValueError: If it is no positive number, or there are fewer GPUs.
    """
    if text is None:
        return 1
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"The number of processes (GPUS) must be a positive number, got '{text}'.")
    visible = torch.cuda.device_count()
    if visible and int(text) > visible:
        raise ValueError(f'{text} processes, each on a GPU of its own, were asked for, but {visible} GPUs are visible.')
    return int(text)


def _check_modes(config: Config, args: argparse.Namespace) -> None:
    """Raise ValueError for ways to run that MMDetection itself refuses only once everything is loaded."""
    wrapper = config.get('optim_wrapper') or {}
    half = config.get('fp16') or getattr(args, 'amp', False) or 'Amp' in str(wrapper.get('type'))
    if half and get_device() in ('cpu', 'mps'):
        raise ValueError(
            'Half precision (fp16, --amp, AmpOptimWrapper) of MMDetection needs a CUDA device or the like, and none is '
            'there. Leave it out here.'
        )
    if getattr(args, 'tta', False) and (config.model.get('roi_head') or {}).get('mask_head'):
        raise ValueError(
            'MMDetection 3.x has no test-time augmentation (--tta) of masks. Test without it, or a Faster R-CNN.'
        )


def _program(name: str) -> ModuleType:
    """Import MMDetection's program."""
    path = program_path(name)
    spec = importlib.util.spec_from_file_location(f'mmdet_{name}_program', path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def _run_here(program: ModuleType, arguments: Sequence[str]) -> int:
    sys.argv = [str(program.__file__), *arguments]
    program.main()
    # MMDetection leaves its processes connected. Threads of gloo then let go of tensors while the interpreter ends,
    # which now and then aborts the process. After an error they may wait for one another: then there is only the end.
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # what has ended but still holds the group: DistributedDataParallel
        dist.destroy_process_group()
    return 0


def _run_processes(name: str, arguments: Sequence[str], processes: int, machines: str) -> int:
    """Run MMDetection's program in several processes by torchrun; the config has been checked."""
    if machines == '1' and 'PORT' not in os.environ:
        # A free port of this machine, so that two trainings on it do not meet.
        meeting = ['--standalone', '--local-addr=127.0.0.1']
    else:
        meeting = [
            f'--nnodes={machines}',
            f'--node_rank={os.environ.get("NODE_RANK", "0")}',
            f'--master_addr={os.environ.get("MASTER_ADDR", "127.0.0.1")}',
            f'--master_port={os.environ.get("PORT", "29500")}',
        ]
    command = [sys.executable, '-m', 'torch.distributed.run', *meeting, f'--nproc_per_node={processes}']
    with subprocess.Popen([*command, '-m', 'kw_mmdet.programs', name, *arguments]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # a terminal's signal has reached it too; it ends those that it started
            raise


if __name__ == '__main__':
    # One of several processes, started by `_run_processes`.
    sys.exit(_run_here(_program(sys.argv[1]), sys.argv[2:]))
