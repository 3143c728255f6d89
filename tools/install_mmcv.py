"""Install compiled mmcv (``mmcv-full`` 1.x or ``mmcv`` 2.x) for the torch that is installed here.

Run it with the interpreter of the environment to install into::

    python tools/install_mmcv.py [--version 1.7.2] [--wheel-dir DIR] [--force]

mmcv publishes no ready-made wheels for recent torch releases, so its C++ ops have to be compiled once per torch. This
script does that, keeps the wheel, and reuses it: a second environment with the same torch takes seconds. It needs
nothing but the standard library, and builds with whatever package index pip is configured for.

Environment variables:
    KW_TIMM_WHEELS: where wheels are kept (default ``$XDG_CACHE_HOME/kw-timm/wheels`` or ``~/.cache/kw-timm/wheels``).
    CXX: the C++ compiler to use. CFLAGS: its flags (default without CUDA: ``-g0 -O1``, half the time of ``-O3 -g``).
    MAX_JOBS: compilers at once (default: the cores this process may use).
    FORCE_CUDA=1: compile the CUDA ops although no GPU is visible. CUDA_VISIBLE_DEVICES= (empty): leave them out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

DEFAULT_VERSION = '1.7.2'
#: mmcv's own ``setup.py`` asks for this standard; compilers are wrapped only where torch needs a newer one.
MMCV_STANDARD = 17
#: CPU minutes of a build, measured; only used to tell the user what to expect. Without CUDA, at ``-g0 -O1`` ...
CPU_BUILD_MINUTES = 14
#: ... and with CUDA ops for one GPU architecture, at mmcv's own flags (extrapolated from two of its 55 kernels).
CUDA_BUILD_MINUTES = 65
#: ``setup.py`` of mmcv imports ``pkg_resources``, which setuptools 81 no longer has.
MAX_SETUPTOOLS = 81
BUILD_TOOLS = ('wheel', 'ninja', 'psutil')
PROBE_MARK = 'KWTIMM:'

TORCH_PROBE = r"""
import json, torch
seen = torch.cuda.is_available()
capability = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}) if seen else []
from torch.utils import cpp_extension
print("KWTIMM:" + json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "gpu": seen, "cuda_home": cpp_extension.CUDA_HOME,
    "capability": ["%d%d" % c for c in capability], "cpp_extension": cpp_extension.__file__,
}))
"""

# RoIAlign over the ramp f(y, x) = 4y + x, where bilinear interpolation is exact: the box (1, 1)-(3, 3) covers, after
# the half pixel shift of aligned=True, 0.5..2.5; its 2 x 2 bins have their centres at 1 and 2, hence 5 6 9 10. Every
# bin is an average, so the gradients of the four sum to 4. NMS: box 1 overlaps box 0 with IoU 81 / 119 and goes.
OPS_CHECK = r"""
import json, sys

def say(stage, ok, **more):
    print("KWTIMM:" + json.dumps({"stage": stage, "ok": ok, **more}))
    sys.exit(0 if ok else 1)

def close(got, want):
    got = got.detach().cpu().reshape(-1).tolist()
    return len(got) == len(want) and all(abs(g - w) < 1e-4 for g, w in zip(got, want))

def check(device):
    ramp = torch.arange(16.0, device=device).reshape(1, 1, 4, 4).requires_grad_()
    rois = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]], device=device)
    pooled = RoIAlign((2, 2), spatial_scale=1.0, sampling_ratio=2, aligned=True)(ramp, rois)
    if not close(pooled, [5.0, 6.0, 9.0, 10.0]):
        say("mmcv", False, error=f"RoIAlign on {device} gives {pooled.tolist()}, expected [5, 6, 9, 10]")
    pooled.sum().backward()
    if not close(ramp.grad.sum(), [4.0]):
        say("mmcv", False, error=f"RoIAlign on {device} has gradients summing to {ramp.grad.sum()}, expected 4")
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]], device=device)
    _, kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)
    if not close(kept, [0, 2]):
        say("mmcv", False, error=f"NMS on {device} keeps {kept.tolist()}, expected [0, 2]")

try:
    import torch, numpy, cv2
except Exception as error:
    say("environment", False, error=f"{type(error).__name__}: {error}")
try:
    import mmcv
    from mmcv.ops import RoIAlign, nms
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        check(device)
except Exception as error:
    say("mmcv", False, error=f"{type(error).__name__}: {error}")
say("mmcv", True, mmcv=mmcv.__version__, torch=torch.__version__, devices=devices)
"""

#: Compiles only where the asked standard is really there, not just its name.
STANDARD_PROBE = {
    17: '#include <optional>\nstd::optional<int> f() { return 1; }\nint main() { return *f() - 1; }\n',
    20: '#include <concepts>\n#include <span>\ntemplate <std::integral T> T f(std::span<T> s) { return s[0]; }\n'
    'int main() { int a[1] = {0}; return f(std::span<int>(a)); }\n',
}
COMPILER_ERROR = re.compile(r': (fatal )?error: |undefined reference|No space left|\bKilled\b')
ANY_ERROR = re.compile(r'\berror\b[: ]|fatal|Error\b|ERROR', re.ASCII)
PROGRESS_LINE = re.compile(rb'^\s*\[(\d+)/(\d+)\]', re.MULTILINE)


class InstallError(Exception):
    """Something is in the way; the text says what, what was expected and what to do next."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing which is missing or wrong, told in three lines."""

    found: str
    expected: str
    next_step: str

    def __str__(self) -> str:
        """The three lines."""
        return f'{self.found}\n  expected: {self.expected}\n  next:     {self.next_step}'


@dataclasses.dataclass(frozen=True)
class Torch:
    """What the build must know of the installed torch."""

    version: str
    cuda: str | None
    gpu: bool
    cuda_home: str | None
    capability: tuple[str, ...]
    standard: int

    @property
    def with_cuda(self) -> bool:
        """Whether mmcv's ``setup.py`` is going to compile the CUDA ops: it asks exactly this."""
        return self.gpu or os.environ.get('FORCE_CUDA', '0') == '1'


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """Outcome of running real ops; ``stage`` tells a broken mmcv ("mmcv") from a broken environment."""

    ok: bool
    stage: str
    error: str = ''
    mmcv: str = ''
    torch: str = ''
    devices: tuple[str, ...] = ()


def say(text: str) -> None:
    """Print one message at once, also into a pipe."""
    print(f'install_mmcv: {text}', flush=True)


def dist_name(version: str) -> str:
    """Name of the compiled distribution on the package index: ``mmcv-full`` before 2.0, ``mmcv`` since."""
    return 'mmcv-full' if int(version.split('.')[0]) < 2 else 'mmcv'


def cache_root(wheel_dir: str | None) -> Path:
    """Directory which holds one sub-directory per tag."""
    if wheel_dir:
        return Path(wheel_dir).expanduser().absolute()
    if own := os.environ.get('KW_TIMM_WHEELS'):
        return Path(own).expanduser().absolute()
    base = os.environ.get('XDG_CACHE_HOME')
    return (Path(base) if base else Path.home() / '.cache') / 'kw-timm' / 'wheels'


def cuda_tag(torch: Torch) -> str:
    """Which CUDA ops a wheel holds: "cpu", or the toolkit and the GPU architectures they are compiled for."""
    if not torch.with_cuda:
        return 'cpu'
    archs = os.environ.get('TORCH_CUDA_ARCH_LIST') or '.'.join(torch.capability) or 'default'
    return f'cu{torch.cuda or "none"}-sm{archs}'


def wheel_tag(version: str, torch: Torch) -> str:
    """Everything a compiled wheel depends on, as one directory name."""
    python = f'cp{sys.version_info.major}{sys.version_info.minor}{getattr(sys, "abiflags", "")}'
    parts = [f'{dist_name(version)}-{version}', f'torch{torch.version}', python, sysconfig.get_platform()]
    return re.sub(r'[^A-Za-z0-9.+_-]+', '_', '-'.join([*parts, cuda_tag(torch)]))


def needed_standard(cpp_extension: Path) -> int:
    """C++ standard torch's headers need, taken from the flag torch itself gives to extensions which name none.

    Args:
        cpp_extension: Torch's ``utils/cpp_extension.py``.

    Returns:
        For instance 20; 17 where the file names no standard.
    """
    with contextlib.suppress(OSError):
        found = re.findall(r"['\"]-std=c\+\+(\d\d)['\"]", cpp_extension.read_text(encoding='utf-8', errors='replace'))
        return max([MMCV_STANDARD, *map(int, found)])
    return MMCV_STANDARD


def run_probe(code: str) -> tuple[dict[str, object], str]:
    """Run code in a fresh interpreter of this environment and read back the JSON line it prints.

    Args:
        code: Python source that prints one line starting with ``PROBE_MARK``.

    Returns:
        The decoded object and "", or an empty one and why there is none.
    """
    # an empty directory to run in, so that no folder of the current one can pose as a package
    with tempfile.TemporaryDirectory(prefix='kwtimm-probe-') as neutral:
        command = [sys.executable, '-W', 'ignore', '-c', code]
        done = subprocess.run(command, check=False, cwd=neutral, capture_output=True, text=True, errors='replace')
    for line in done.stdout.splitlines():
        if line.startswith(PROBE_MARK):
            decoded = json.loads(line[len(PROBE_MARK) :])
            return decoded, ''
    if done.returncode < 0:  # what was printed before a crash says nothing of it
        return {}, f'the interpreter crashed with signal {-done.returncode} ({signal.strsignal(-done.returncode)})'
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return {}, lines[-1] if lines else f'the interpreter ended with exit code {done.returncode}'


def probe_torch() -> Torch:
    """Ask the installed torch for its version and what it can see.

    Raises:
        InstallError: There is no torch, or it cannot be imported.
    """
    if importlib.util.find_spec('torch') is None:
        raise InstallError(
            str(Problem('no torch here', f'torch installed for {sys.executable}', 'pip install torch torchvision'))
        )
    seen, error = run_probe(TORCH_PROBE)
    if not seen:
        raise InstallError(
            str(Problem(f'torch cannot be imported: {error}', '`import torch` works', 'install torch again, then this'))
        )
    capability = seen['capability']
    return Torch(
        version=str(seen['version']),
        cuda=None if seen['cuda'] is None else str(seen['cuda']),
        gpu=bool(seen['gpu']),
        cuda_home=None if seen['cuda_home'] is None else str(seen['cuda_home']),
        capability=tuple(capability) if isinstance(capability, list) else (),
        standard=needed_standard(Path(str(seen['cpp_extension']))),
    )


def check_ops() -> CheckResult:
    """Run RoIAlign and NMS of the installed mmcv in a fresh interpreter."""
    seen, error = run_probe(OPS_CHECK)
    if not seen:  # the interpreter died, as it does on a compiled extension that does not fit
        return CheckResult(False, 'mmcv', error)
    devices = seen.get('devices')
    return CheckResult(
        ok=bool(seen['ok']),
        stage=str(seen['stage']),
        error=str(seen.get('error', '')),
        mmcv=str(seen.get('mmcv', '')),
        torch=str(seen.get('torch', '')),
        devices=tuple(devices) if isinstance(devices, list) else (),
    )


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_compiler() -> list[str] | None:
    """The C++ compiler as the words of a command: ``$CXX`` if set, else the first usual name on the PATH."""
    if own := os.environ.get('CXX', '').strip():
        # a path with spaces as it is, or a command with arguments such as "ccache g++"
        candidates = [[own], split_words(own)]
    else:
        candidates = [['c++'], ['g++'], ['clang++']]
    for first, *rest in candidates:
        if found := shutil.which(first):
            return [str(Path(found).absolute()), *rest]  # the build runs elsewhere, so no relative path
    return None


def split_words(command: str) -> list[str]:
    """Words of a shell command; the whole as one word if its quotes do not match."""
    try:
        return shlex.split(command) or [command]
    except ValueError:
        return [command]


def compiler_error(compiler: Sequence[str], standard: int) -> str:
    """Try a tiny file in the needed standard.

    Args:
        compiler: Words of the compiler command.
        standard: For instance 20.

    Returns:
        The first error of the compiler, or "" if all is well.
    """
    with tempfile.TemporaryDirectory(prefix='kwtimm-cxx-') as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text(STANDARD_PROBE[20 if standard >= 20 else 17])
        command = [*compiler, f'-std=c++{standard}', '-c', str(source), '-o', str(source.with_suffix('.o'))]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, errors='replace')
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return ''
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if 'error' in line), lines[0] if lines else f'exit code {done.returncode}')


def compiler_problem(standard: int) -> Problem | None:
    """What is wrong with the C++ compiler, if anything."""
    expected = f'a C++ compiler that knows C++{standard} (' + (
        'g++ >= 11 or clang++ >= 14)' if standard >= 20 else 'g++ >= 8 or clang++ >= 6)'
    )
    compiler = find_compiler()
    if compiler is None:
        if own := os.environ.get('CXX', '').strip():
            return Problem(f'CXX={own} is no command', expected, 'set CXX to an installed compiler, or unset it')
        step = 'install g++ (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)'
        return Problem('no C++ compiler: neither c++, g++ nor clang++ is on the PATH', expected, step)
    if error := compiler_error(compiler, standard):
        step = 'install a newer compiler and name it, for instance: CXX=g++-12 python tools/install_mmcv.py'
        return Problem(f'{shlex.join(compiler)} cannot compile C++{standard}: {error}', expected, step)
    return None


def header_problem() -> Problem | None:
    """Whether the headers of this Python are there."""
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if header.is_file():
        return None
    name = f'python{sys.version_info.major}.{sys.version_info.minor}'
    step = f'install them (Debian, Ubuntu: apt-get install {name}-dev; Fedora: dnf install {name}-devel)'
    return Problem(f'no Python headers: {header} does not exist', f'the headers of {name}', step)


def cuda_problem(torch: Torch) -> Problem | None:
    """Whether CUDA ops are asked for without a CUDA compiler."""
    if not torch.with_cuda:
        return None
    nvcc = Path(torch.cuda_home or '', 'bin', 'nvcc')
    if torch.cuda and torch.cuda_home and nvcc.is_file():
        return None
    if not torch.cuda:
        step = 'install a CUDA build of torch, or unset FORCE_CUDA'
        return Problem('FORCE_CUDA=1 with a torch without CUDA', 'a torch built for CUDA', step)
    step = 'install that toolkit and set CUDA_HOME, or leave the CUDA ops out: CUDA_VISIBLE_DEVICES= FORCE_CUDA=0'
    why = 'a GPU is visible' if torch.gpu else 'FORCE_CUDA=1'
    return Problem(f'{why}, but there is no nvcc', f'the CUDA toolkit {torch.cuda} with nvcc', step)


def build_problems(torch: Torch) -> list[Problem]:
    """Everything that would stop a build, found before it starts."""
    problems = [compiler_problem(torch.standard), header_problem(), cuda_problem(torch)]
    return [problem for problem in problems if problem is not None]


def pip(*args: str) -> None:
    """Run pip of this environment and show what it says only if it fails.

    Raises:
        InstallError: Pip is missing or ends with an error.
    """
    if importlib.util.find_spec('pip') is None:
        step = f'{shlex.quote(sys.executable)} -m ensurepip'
        raise InstallError(str(Problem('no pip here', f'pip installed for {sys.executable}', step)))
    environment = os.environ | {'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    command = [sys.executable, '-m', 'pip', *args]
    done = subprocess.run(
        command, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        tail = '\n'.join(f'  | {line}' for line in error_lines(done.stdout.splitlines()))
        raise InstallError(f'`pip {shlex.join(args)}` failed\n{tail}')


def missing_build_tools() -> list[str]:
    """Requirements of the build which this environment lacks, as pip wants them."""
    setuptools = installed_version('setuptools')
    usable = setuptools is not None and int(setuptools.split('.')[0]) < MAX_SETUPTOOLS
    wanted = [] if usable else [f'setuptools<{MAX_SETUPTOOLS}']
    return wanted + [name for name in BUILD_TOOLS if installed_version(name) is None]


def ensure_build_tools() -> None:
    """Install what the build needs besides a compiler."""
    if missing := missing_build_tools():
        say(f'installing build tools here: {" ".join(missing)}')
        pip('install', *missing)


def ensure_opencv() -> None:
    """Install OpenCV if there is none.

    mmcv's ``setup.py`` requires ``opencv-python``, which wants a display library, unless some cv2 is importable during
    the build; so one is put here first, and every wheel is built (and reused) with the same requirements.
    """
    importlib.invalidate_caches()
    if importlib.util.find_spec('cv2') is None:
        say('installing opencv-python-headless here (mmcv needs cv2)')
        pip('install', 'opencv-python-headless')


def write_wrapper(folder: Path, name: str, command: Sequence[str], standard: int) -> None:
    """Write a shell script that runs a compiler in a newer C++ standard than it is asked for.

    Args:
        folder: Where the script goes.
        name: File name of the script.
        command: Words of the real compiler's command.
        standard: For instance 20; any other ``-std=`` among the arguments is dropped (nvcc refuses two).
    """
    script = (
        '#!/bin/sh\n'
        'for word do\n'
        '    shift\n'
        '    case "$word" in -std=*) ;; *) set -- "$@" "$word" ;; esac\n'
        'done\n'
        f'exec {shlex.join(command)} "$@" -std=c++{standard}\n'
    )
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)


def build_environment(torch: Torch, folder: Path) -> dict[str, str]:
    """Environment variables of the build.

    Args:
        torch: The installed torch.
        folder: Temporary directory, which gets the compiler wrappers and all that pip unpacks.

    Returns:
        The variables of this process with those of the build on top.
    """
    environment = dict(os.environ)
    tools = folder / 'bin'
    tools.mkdir()
    # the wrappers go by a bare name on the PATH: torch and distutils disagree on how to quote a path with spaces
    environment['PATH'] = os.pathsep.join(
        [str(tools), sysconfig.get_path('scripts'), environment.get('PATH', os.defpath)]
    )
    environment |= {'MMCV_WITH_OPS': '1', 'TMPDIR': str(folder), 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    environment.setdefault('MAX_JOBS', str(core_count()))
    compiler = find_compiler() or ['c++']
    if torch.standard > MMCV_STANDARD:
        write_wrapper(tools, 'kwtimm-c++', compiler, torch.standard)
        environment['CXX'] = 'kwtimm-c++'
        if torch.with_cuda and torch.cuda_home:
            nvcc = os.environ.get('PYTORCH_NVCC') or str(Path(torch.cuda_home, 'bin', 'nvcc'))
            write_wrapper(tools, 'kwtimm-nvcc', [nvcc], torch.standard)
            environment['PYTORCH_NVCC'] = 'kwtimm-nvcc'
    elif 'CXX' not in environment:
        environment['CXX'] = shlex.join(compiler)
    if not torch.with_cuda:
        environment.setdefault('CFLAGS', '-g0 -O1')
    return environment


def core_count() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def expectation(torch: Torch) -> str:
    """How long the build is going to take, in words."""
    jobs = os.environ.get('MAX_JOBS', '')
    cores = min(core_count(), int(jobs)) if jobs.isdigit() and int(jobs) else core_count()
    where = f'on {cores} core{"s" if cores > 1 else ""}'
    if torch.with_cuda:
        minutes = max(1, round(CUDA_BUILD_MINUTES / cores))
        return f'about {minutes} minutes {where} for the CUDA ops of one GPU architecture, more for several'
    return f'about {max(1, round(CPU_BUILD_MINUTES / cores))} minutes {where}, CPU ops only'


def error_lines(lines: Sequence[str], limit: int = 12) -> list[str]:
    """The lines of a log which tell why it failed.

    Args:
        lines: The log.
        limit: How many to return at most.

    Returns:
        The first errors of the compiler, as the later ones follow from them; if there are none, the last lines that
        look like an error; else simply the last lines.
    """
    said = [line[:300] for line in lines if line.strip() and not re.match(r'\s*\[\d+/\d+\]', line)]
    if first := [line for line in said if COMPILER_ERROR.search(line)]:
        return first[:limit]
    return ([line for line in said if ANY_ERROR.search(line)] or said)[-limit:]


class Progress:
    """Shows how far a build is, from the ``[k/n]`` lines that ninja writes into its log."""

    def __init__(self, log: Path) -> None:
        """Start the clock.

        Args:
            log: File which the build writes.
        """
        self._log = log
        self._offset = 0
        self._start = self._shown_at = time.monotonic()
        self._done = self._total = self._shown = 0
        self._live = sys.stdout.isatty()

    def update(self) -> None:
        """Read what is new in the log and show it: in place on a terminal, else now and then a line."""
        with self._log.open('rb') as stream:
            stream.seek(self._offset)
            new = stream.read()
        complete = new[: new.rfind(b'\n') + 1]
        self._offset += len(complete)
        for done, total in PROGRESS_LINE.findall(complete):
            self._done, self._total = int(done), int(total)
        now = time.monotonic()
        step = max(1, self._total // 10)
        if self._live:
            print(f'\r{self.text()}\033[K', end='', flush=True)
        elif self._done >= self._shown + step or now - self._shown_at >= 120:
            self._shown, self._shown_at = self._done, now
            print(self.text(), flush=True)

    def text(self) -> str:
        """The progress line."""
        spent = time.monotonic() - self._start
        if not self._total:
            return f'  preparing, {clock(spent)}'
        line = f'  {self._done}/{self._total} objects, {clock(spent)}'
        left = spent / self._done * (self._total - self._done) if self._done else 0
        return line + (f', about {clock(left)} left' if left else ', linking')

    def finish(self) -> None:
        """End the line which is being rewritten."""
        if self._live:
            print(flush=True)


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started (it leads a process group of its own)."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def run_logged(command: Sequence[str], environment: dict[str, str], log: Path) -> int:
    """Run a command with its output in a file, showing progress.

    Args:
        command: Words of the command.
        environment: Its environment variables.
        log: The file.

    Returns:
        Its exit code. Whatever interrupts the wait ends the command and all its children first.
    """
    with log.open('wb') as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        progress = Progress(log)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(1.0)
                progress.update()
        finally:
            if process.poll() is None:
                stop_group(process)
            progress.finish()


def build_wheel(version: str, torch: Torch, folder: Path) -> Path:
    """Compile mmcv and put the wheel into the cache.

    Args:
        version: Version of mmcv.
        torch: The installed torch.
        folder: Directory of this tag in the cache.

    Returns:
        The wheel in the cache.

    Raises:
        InstallError: The build failed.
    """
    name = dist_name(version)
    log = folder / 'build.log'
    say(f'building {name} {version} for torch {torch.version}: {expectation(torch)}')
    say(f'log: {log}')
    start = time.monotonic()
    # pip's own cache would hand the wheel of one torch to another, hence --no-cache-dir and no ready-made binaries
    options = ['--no-cache-dir', '--no-deps', '--no-build-isolation', '--no-binary', name]
    with tempfile.TemporaryDirectory(prefix='kwtimm-mmcv-', ignore_cleanup_errors=True) as temporary:
        out = Path(temporary, 'out')
        command = [sys.executable, '-m', 'pip', 'wheel', '-v', *options, '-w', str(out), f'{name}=={version}']
        code = run_logged(command, build_environment(torch, Path(temporary)), log)
        wheels = sorted(out.glob('*.whl')) if out.is_dir() else []
        if code or not wheels:
            raise InstallError(build_failure(log))
        wheel = keep_wheel(wheels[0], folder)
    say(f'built in {clock(time.monotonic() - start)} minutes')
    return wheel


def build_failure(log: Path) -> str:
    """Why a build failed, in a few lines."""
    text = log.read_text(encoding='utf-8', errors='replace')
    tail = '\n'.join(f'  | {line}' for line in error_lines(text.splitlines()))
    if 'Killed' in text:
        step = 'a compiler was killed, most likely out of memory: try again with MAX_JOBS=1'
    elif 'No space left' in text:
        step = 'free some space, or set TMPDIR to a directory that has it (about 1 GB)'
    elif 'No matching distribution' in text:
        step = 'pip has to reach a package index with the sources of mmcv: see `pip config list` and the network'
    else:
        step = 'mend what these lines tell, then run this again'
    return f'the build failed; its errors:\n{tail}\n  full log: {log}\n  next:     {step}'


def keep_wheel(wheel: Path, folder: Path) -> Path:
    """Move a wheel into the cache so that it is there either whole or not at all."""
    part = folder / f'.{wheel.name}.part'  # one name is enough: whoever writes holds the lock
    try:
        shutil.copyfile(wheel, part)
        part.replace(folder / wheel.name)
    finally:
        part.unlink(missing_ok=True)
    return folder / wheel.name


def cached_wheel(folder: Path) -> Path | None:
    """The usable wheel of a tag; a damaged archive is set aside."""
    for wheel in sorted(folder.glob('*.whl')):
        if wheel_is_whole(wheel):
            return wheel
        set_aside(wheel, 'it is damaged')
    return None


def wheel_is_whole(wheel: Path) -> bool:
    """Whether every file of the archive can be read and has the right checksum."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except Exception:  # damage shows in many ways: BadZipFile, zlib.error, EOFError, NotImplementedError
        return False


def set_aside(wheel: Path, why: str) -> Path:
    """Rename a wheel so that it is not used again but can be looked at."""
    target = wheel.with_name(f'{wheel.name}.broken-{time.strftime("%Y%m%d-%H%M%S")}')
    wheel.replace(target)
    say(f'kept wheel set aside as {target}: {why}')
    return target


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of one tag; a second process waits here for the first instead of building, too.

    Args:
        folder: Directory of the tag in the cache; it is made.

    Yields:
        Whether another process held the lock before.
    """
    waited = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = folder.with_name(f'{folder.name}.lock').open('a')
    except OSError as error:
        expected, step = 'a directory this user may write to', 'name another one: --wheel-dir DIR'
        raise InstallError(str(Problem(f'wheels cannot be kept in {folder}: {error}', expected, step))) from error
    # the lock goes with the open file, so a process that dies cannot leave it behind; the file itself may stay
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'another process is at work on {folder}; waiting for it')
            fcntl.flock(stream, fcntl.LOCK_EX)
            waited = True
        yield waited


def conflicting(version: str) -> list[str]:
    """Installed distributions that own the same ``mmcv`` package under another name, as ``name version``."""
    others = {'mmcv', 'mmcv-full', 'mmcv-lite'} - {dist_name(version)}
    return [f'{name} {found}' for name in sorted(others) if (found := installed_version(name)) is not None]


def settle_conflicts(version: str, force: bool) -> None:
    """Remove distributions which share files with the wanted one, if that is allowed.

    Raises:
        InstallError: There are some and ``force`` is not set.
    """
    others = conflicting(version)
    if not others:
        return
    name = dist_name(version)
    if not force:
        expected = f'no other distribution that owns the package `mmcv` beside {name} {version}'
        step = 'use an environment of its own, or replace it: python tools/install_mmcv.py --force'
        raise InstallError(str(Problem(f'{" and ".join(others)} is installed here', expected, step)))
    say(f'removing {" and ".join(others)}')
    pip('uninstall', '-y', *(other.split()[0] for other in others))


def install_wheel(wheel: Path, version: str) -> CheckResult:
    """Install a wheel in place of whatever mmcv is there, and run the check."""
    name = dist_name(version)
    if installed_version(name) is not None:
        pip('uninstall', '-y', name)
    pip('install', str(wheel))
    return check_ops()


def ensure_environment() -> None:
    """Make sure of what mmcv imports besides itself, before anything is built for it or blamed on it.

    Raises:
        InstallError: Something cannot be imported, which no other wheel would mend.
    """
    ensure_opencv()
    result = check_ops()
    if not result.ok and result.stage == 'environment':
        step = 'mend that (the cv2 which needs no display libraries is opencv-python-headless), then run this again'
        raise InstallError(str(Problem(result.error, 'torch, numpy and cv2 can be imported', step)))


def report(result: CheckResult, version: str, folder: Path | None) -> None:
    """Print the closing line."""
    kept = f'; wheel kept in {folder}' if folder else ''
    say(f'{dist_name(version)} {result.mmcv} works with torch {result.torch} on {", ".join(result.devices)}{kept}')


def already_there(version: str) -> CheckResult | None:
    """The check's result if the wanted version is installed and works, else None."""
    name = dist_name(version)
    if installed_version(name) != version or conflicting(version):
        return None
    result = check_ops()
    if not result.ok:
        say(f'{name} {version} is installed but does not work here: {result.error}')
        return None
    return result


def install(version: str, wheel_dir: str | None, force: bool) -> None:
    """Install mmcv from a kept wheel or by building one.

    Args:
        version: Version of mmcv.
        wheel_dir: Where wheels are kept, or None for the default.
        force: Build anew even if mmcv works already.

    Raises:
        InstallError: It cannot be done; the text says why.
    """
    if not force and (result := already_there(version)):
        report(result, version, None)
        return
    torch = probe_torch()
    folder = cache_root(wheel_dir) / wheel_tag(version, torch)
    with locked(folder) as waited:
        # the process which held the lock before may have installed into this very environment
        if waited and not force and (result := already_there(version)):
            report(result, version, folder)
            return
        settle_conflicts(version, force)
        ensure_environment()
        if force or not install_cached(version, folder):
            build_and_install(version, torch, folder)


def install_cached(version: str, folder: Path) -> bool:
    """Install the kept wheel of a tag if there is one that works; one which does not is set aside.

    Args:
        version: Version of mmcv.
        folder: Directory of the tag in the cache.

    Returns:
        Whether mmcv is installed and works.
    """
    wheel = cached_wheel(folder)
    if wheel is None:
        return False
    say(f'using the kept wheel {wheel}')
    result = install_wheel(wheel, version)
    if result.ok:
        report(result, version, folder)
    else:
        set_aside(wheel, result.error)
    return result.ok


def build_and_install(version: str, torch: Torch, folder: Path) -> None:
    """Build, keep and install a wheel.

    Raises:
        InstallError: Something is missing, the build fails, or its result does not work.
    """
    if problems := build_problems(torch):
        raise InstallError('\n'.join(str(problem) for problem in problems))
    ensure_build_tools()
    wheel = build_wheel(version, torch, folder)
    result = install_wheel(wheel, version)
    if not result.ok:
        target = set_aside(wheel, result.error)
        step = f'look at {folder / "build.log"} and {target}'
        raise InstallError(str(Problem(f'the built mmcv does not work: {result.error}', 'ops that work', step)))
    report(result, version, folder)


def interrupted(number: int, frame: FrameType | None) -> None:
    """Let other ends of this process clean up as Ctrl-C does."""
    raise KeyboardInterrupt


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Install compiled mmcv for the torch of this environment, building it once if need be.'
    )
    parser.add_argument('--version', default=DEFAULT_VERSION, help='of mmcv, 1.x or 2.x (default: %(default)s)')
    parser.add_argument('--wheel-dir', help='where built wheels are kept (default: the cache directory of the user)')
    parser.add_argument('--force', action='store_true', help='build anew, and replace another mmcv if there is one')
    args = parser.parse_args(argv)
    if not re.fullmatch(r'\d+\.\d+\.\d+\w*', args.version):
        parser.error(f'--version {args.version} is no version such as {DEFAULT_VERSION}')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Command line without the program name; None for that of the process.

    Returns:
        Exit code: 0 done, 1 not done, 130 interrupted.
    """
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupted)
    try:
        install(args.version, args.wheel_dir, args.force)
    except InstallError as error:
        print(f'install_mmcv: error: {error}', file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print('install_mmcv: interrupted; nothing half-built is kept', file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
