"""Tests of ``tools/install_mmcv.py``. Nothing here compiles mmcv or needs the network."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / 'tools' / 'install_mmcv.py'
VERSION = '1.7.2'


def load_script() -> ModuleType:
    """Import the script by its path."""
    spec = importlib.util.spec_from_file_location('kw_install_mmcv', SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, and none of the variables it looks at."""
    for name in ('CXX', 'CFLAGS', 'MAX_JOBS', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST', 'KW_TIMM_WHEELS', 'PYTORCH_NVCC'):
        monkeypatch.delenv(name, raising=False)
    return load_script()


@pytest.fixture
def torch_of(script: ModuleType) -> Callable[..., object]:
    """Makes the description of a torch without GPU; keywords change it."""

    def make(**changes: object) -> object:
        values: dict[str, object] = {
            'version': '2.14.1+cu130',
            'cuda': '13.0',
            'gpu': False,
            'cuda_home': None,
            'capability': (),
            'standard': 20,
        }
        return script.Torch(**(values | changes))

    return make


def write_executable(path: Path, text: str) -> Path:
    """Write a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\n' + text)
    path.chmod(0o755)
    return path


def tiny_wheel(folder: Path, payload: str) -> Path:
    """A real, valid wheel which claims to be mmcv-full and holds one file."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f'mmcv_full-{VERSION}.dist-info'
    path = folder / f'mmcv_full-{VERSION}-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('mmcv/__init__.py', payload)
        archive.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: mmcv-full\nVersion: {VERSION}\n')
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        archive.writestr(f'{info}/RECORD', '')
    return path


# the tag and the place of the cache


def test_tag_tells_all_that_a_wheel_depends_on(script: ModuleType, torch_of: Callable[..., object]) -> None:
    tag = script.wheel_tag(VERSION, torch_of())
    python = f'cp{sys.version_info.major}{sys.version_info.minor}'
    for part in ('mmcv-full-1.7.2', 'torch2.14.1+cu130', python, sysconfig.get_platform(), '-cpu'):
        assert part in tag
    assert '/' not in tag
    assert ' ' not in tag


def test_tags_of_different_builds_differ(
    script: ModuleType, torch_of: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {
        script.wheel_tag(VERSION, torch_of()),
        script.wheel_tag('2.1.0', torch_of()),
        script.wheel_tag(VERSION, torch_of(version='2.14.1+cpu', cuda=None)),
        script.wheel_tag(VERSION, torch_of(version='2.14.0+cu130')),
        script.wheel_tag(VERSION, torch_of(gpu=True, capability=('80',))),
        script.wheel_tag(VERSION, torch_of(gpu=True, capability=('80',), cuda='12.8')),
        script.wheel_tag(VERSION, torch_of(gpu=True, capability=('70', '80'))),
    }
    monkeypatch.setenv('FORCE_CUDA', '1')
    tags.add(script.wheel_tag(VERSION, torch_of()))
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0;9.0 +PTX')
    tags.add(script.wheel_tag(VERSION, torch_of()))
    assert len(tags) == 9
    assert not any(set(tag) & set('/; ') for tag in tags)


def test_distribution_names(script: ModuleType) -> None:
    assert script.dist_name('1.7.2') == 'mmcv-full'
    assert script.dist_name('2.1.0') == 'mmcv'


def test_cache_root_order(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert script.cache_root(None) == tmp_path / 'home/.cache/kw-timm/wheels'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert script.cache_root(None) == tmp_path / 'xdg/kw-timm/wheels'
    monkeypatch.setenv('KW_TIMM_WHEELS', str(tmp_path / 'own'))
    assert script.cache_root(None) == tmp_path / 'own'
    assert script.cache_root(str(tmp_path / 'given')) == tmp_path / 'given'


@pytest.mark.parametrize(
    ('text', 'standard'),
    [("flags = ['-std=c++20']\n", 20), ('x = "-std=c++14"\n', 17), ("y = '-std=c++17', '-std=c++23'", 23), ('', 17)],
)
def test_standard_is_the_one_torch_itself_uses(script: ModuleType, tmp_path: Path, text: str, standard: int) -> None:
    source = tmp_path / 'cpp_extension.py'
    source.write_text(text)
    assert script.needed_standard(source) == standard


def test_standard_without_that_file(script: ModuleType, tmp_path: Path) -> None:
    assert script.needed_standard(tmp_path / 'absent.py') == 17


# what can be missing


def test_cxx_that_does_not_exist(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CXX', '/nonexistent/g++')
    problem = str(script.compiler_problem(20))
    assert 'CXX=/nonexistent/g++' in problem
    assert 'expected: a C++ compiler that knows C++20' in problem
    assert 'next:' in problem


def test_no_compiler_on_the_path(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    problem = str(script.compiler_problem(17))
    assert 'no C++ compiler' in problem
    assert 'C++17' in problem
    assert 'apt-get install g++' in problem


def test_compiler_too_old(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse = 'case "$*" in *-std=c++20*) echo "g++: error: unrecognized option -std=c++20" >&2; exit 1 ;; esac\n'
    old = write_executable(tmp_path / 'old compiler' / 'g++', refuse)  # a path with a space
    monkeypatch.setenv('CXX', str(old))
    problem = str(script.compiler_problem(20))
    assert 'cannot compile C++20: g++: error: unrecognized option -std=c++20' in problem
    assert str(old) in problem
    assert 'newer compiler' in problem
    assert script.compiler_problem(17) is None  # the very same compiler will do where torch needs less


def test_compiler_that_only_knows_the_name_of_the_standard(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = shutil.which('c++')
    if real is None:
        pytest.skip('no C++ compiler here')
    drop = 'for w do shift; case "$w" in -std=*) ;; *) set -- "$@" "$w" ;; esac; done\n'
    monkeypatch.setenv('CXX', str(write_executable(tmp_path / 'g++', f'{drop}exec {real} -std=c++17 "$@"\n')))
    assert 'cannot compile C++20' in str(script.compiler_problem(20))


@pytest.mark.parametrize('given', ['env {real}', '{real}'])
def test_cxx_of_several_words(script: ModuleType, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    real = shutil.which('c++')
    if real is None:
        pytest.skip('no C++ compiler here')
    monkeypatch.setenv('CXX', given.format(real=real))
    assert script.find_compiler()[-1] == real
    assert script.compiler_error(script.find_compiler(), 17) == ''


def test_no_python_headers(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script.sysconfig, 'get_path', lambda name: str(tmp_path))
    problem = str(script.header_problem())
    assert f'{tmp_path}/Python.h does not exist' in problem
    assert '-dev' in problem
    (tmp_path / 'Python.h').touch()
    assert script.header_problem() is None


def test_gpu_without_nvcc(script: ModuleType, torch_of: Callable[..., object], tmp_path: Path) -> None:
    problem = str(script.cuda_problem(torch_of(gpu=True)))
    assert 'nvcc' in problem
    assert '13.0' in problem
    write_executable(tmp_path / 'bin' / 'nvcc', '')
    assert script.cuda_problem(torch_of(gpu=True, cuda_home=str(tmp_path))) is None
    assert script.cuda_problem(torch_of()) is None


def test_no_torch(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(script, 'installed_version', lambda name: None)
    assert script.main([]) == 1
    said = capsys.readouterr().err
    assert 'no torch here' in said
    assert 'pip install torch' in said
    assert 'Traceback' not in said


def test_all_problems_are_told_at_once(
    script: ModuleType, torch_of: Callable[..., object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv('CXX', '/nonexistent/g++')
    monkeypatch.setattr(script.sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(script.InstallError) as caught:
        script.build_and_install(VERSION, torch_of(), tmp_path)
    assert '/nonexistent/g++' in str(caught.value)
    assert 'Python.h' in str(caught.value)


@pytest.mark.parametrize(
    ('found', 'wanted'), [('80.10.2', []), ('81.0.0', ['setuptools<81']), (None, ['setuptools<81'])]
)
def test_setuptools_that_lacks_pkg_resources(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, found: str | None, wanted: list[str]
) -> None:
    monkeypatch.setattr(script, 'installed_version', lambda name: found if name == 'setuptools' else '1')
    assert script.missing_build_tools() == wanted


def test_other_mmcv_is_not_replaced_unasked(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(script, 'installed_version', lambda name: '2.1.0' if name == 'mmcv' else None)
    monkeypatch.setattr(script, 'pip', lambda *args: removed.extend(args))
    with pytest.raises(script.InstallError, match=r'mmcv 2\.1\.0 is installed here'):
        script.settle_conflicts(VERSION, force=False)
    assert removed == []
    script.settle_conflicts(VERSION, force=True)
    assert removed == ['uninstall', '-y', 'mmcv']
    script.settle_conflicts('2.1.0', force=False)  # the same distribution is no conflict


def test_bad_version_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(['--version', 'newest'])
    assert caught.value.code == 2
    assert 'newest' in capsys.readouterr().err


# the wrapper of the compiler


def test_wrapper_raises_the_standard_and_keeps_arguments(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / 'a b'
    folder.mkdir()
    shown = write_executable(folder / 'show args', 'for w do printf "<%s>" "$w"; done\n')
    script.write_wrapper(folder, 'kwtimm-c++', [str(shown), 'first'], 20)
    command = [str(folder / 'kwtimm-c++'), '-std=c++17', '-DX=a b', '', "it's", '-std=c++14', '-c']
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "<first><-DX=a b><><it's><-c><-std=c++20>"


@pytest.mark.parametrize(('standard', 'name'), [(17, None), (20, 'kwtimm-c++')])
def test_wrapper_only_where_torch_needs_it(
    script: ModuleType, torch_of: Callable[..., object], tmp_path: Path, standard: int, name: str | None
) -> None:
    environment = script.build_environment(torch_of(standard=standard), tmp_path)
    wrapper = shutil.which('kwtimm-c++', path=environment['PATH'])
    assert (wrapper is not None) == (name is not None)
    assert (environment['CXX'] == 'kwtimm-c++') == (name is not None)


def test_build_environment_respects_the_user(
    script: ModuleType, torch_of: Callable[..., object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ('a', 'b', 'c'):
        (tmp_path / folder).mkdir()
    own = script.build_environment(torch_of(), tmp_path / 'a')
    assert own['CFLAGS'] == '-g0 -O1'
    assert own['MAX_JOBS'] == str(script.core_count())
    assert own['MMCV_WITH_OPS'] == '1'
    cuda = script.build_environment(torch_of(gpu=True, cuda_home='/cuda'), tmp_path / 'c')
    assert 'CFLAGS' not in cuda
    assert cuda['PYTORCH_NVCC'] == 'kwtimm-nvcc'
    monkeypatch.setenv('CFLAGS', '-O3')
    monkeypatch.setenv('MAX_JOBS', '7')
    given = script.build_environment(torch_of(), tmp_path / 'b')
    assert (given['CFLAGS'], given['MAX_JOBS']) == ('-O3', '7')


# kept wheels


class FakeSite:
    """A directory that plays site-packages: takes real wheels, and mmcv "works" if its file says so."""

    def __init__(self, script: ModuleType, folder: Path) -> None:
        self.script = script
        self.folder = folder
        self.built = 0
        folder.mkdir()

    def version(self, name: str) -> str | None:
        """Stands in for ``installed_version``."""
        found = importlib.metadata.distributions(name=name, path=[str(self.folder)])
        return next((dist.version for dist in found), None)

    def pip(self, *args: str) -> None:
        """Stands in for ``pip``: install unpacks a wheel, uninstall removes everything."""
        if args[0] == 'uninstall':
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        else:
            with zipfile.ZipFile(args[-1]) as archive:
                archive.extractall(self.folder)

    def check(self) -> object:
        """Stands in for ``check_ops``."""
        source = self.folder / 'mmcv' / '__init__.py'
        state = source.read_text() if source.is_file() else 'absent'
        return self.script.CheckResult(state == 'works', 'mmcv', f'mmcv is {state}', VERSION, '2.14.1', ('cpu',))

    def build(self, version: str, torch: object, folder: Path) -> Path:
        """Stands in for ``build_wheel``."""
        self.built += 1
        return tiny_wheel(folder, 'works')


@pytest.fixture
def site(
    script: ModuleType, torch_of: Callable[..., object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> FakeSite:
    """The script, pointed at a ``FakeSite``."""
    fake = FakeSite(script, tmp_path / 'site')
    monkeypatch.setattr(script, 'installed_version', fake.version)
    monkeypatch.setattr(script, 'pip', fake.pip)
    monkeypatch.setattr(script, 'check_ops', fake.check)
    monkeypatch.setattr(script, 'build_wheel', fake.build)
    monkeypatch.setattr(script, 'build_problems', lambda torch: [])
    monkeypatch.setattr(script, 'ensure_build_tools', lambda: None)
    monkeypatch.setattr(script, 'ensure_opencv', lambda: None)
    monkeypatch.setattr(script, 'probe_torch', torch_of)
    return fake


@pytest.fixture
def folder(script: ModuleType, torch_of: Callable[..., object], tmp_path: Path) -> Path:
    """Where the wheels of this test are kept."""
    return tmp_path / 'my wheels' / str(script.wheel_tag(VERSION, torch_of()))


def run_main(script: ModuleType, folder: Path, *more: str) -> int:
    """Run the command with the cache of a test."""
    return int(script.main(['--wheel-dir', str(folder.parent), *more]))


def test_first_builds_then_there_then_reused(script: ModuleType, site: FakeSite, folder: Path) -> None:
    assert run_main(script, folder) == 0
    assert site.built == 1
    assert run_main(script, folder) == 0  # installed already
    site.pip('uninstall')
    assert run_main(script, folder) == 0  # from the kept wheel
    assert site.built == 1
    assert site.version('mmcv-full') == VERSION
    assert run_main(script, folder, '--force') == 0
    assert site.built == 2


def test_wheel_of_another_torch_is_not_used(
    script: ModuleType,
    site: FakeSite,
    folder: Path,
    torch_of: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_wheel(folder, 'works')
    monkeypatch.setattr(script, 'probe_torch', lambda: torch_of(version='2.15.0+cu130'))
    assert run_main(script, folder) == 0
    assert site.built == 1


def test_wheel_that_fails_the_check_is_set_aside(
    script: ModuleType, site: FakeSite, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_wheel(folder, 'broken')
    assert run_main(script, folder) == 0
    assert site.built == 1
    assert [path.suffix for path in folder.glob('*.whl')] == ['.whl']
    (aside,) = folder.glob('*.broken-*')
    assert b'broken' in zipfile.ZipFile(aside).read('mmcv/__init__.py')
    said = capsys.readouterr().out
    assert str(aside) in said
    assert 'mmcv is broken' in said


@pytest.mark.parametrize('keep', [0, 100, -30])
def test_truncated_wheel_is_set_aside(script: ModuleType, site: FakeSite, folder: Path, keep: int) -> None:
    wheel = tiny_wheel(folder, 'works')
    wheel.write_bytes(wheel.read_bytes()[:keep])
    assert run_main(script, folder) == 0
    assert site.built == 1
    assert len(list(folder.glob('*.broken-*'))) == 1
    assert script.wheel_is_whole(wheel)


def test_wheel_with_a_flipped_byte_is_damaged(script: ModuleType, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, 'x' * 50)
    assert script.wheel_is_whole(wheel)
    content = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        start = archive.infolist()[0].header_offset + 30 + len('mmcv/__init__.py')
    content[start] ^= 0xFF
    wheel.write_bytes(content)
    assert not script.wheel_is_whole(wheel)


def test_broken_environment_is_not_blamed_on_the_wheel(
    script: ModuleType,
    site: FakeSite,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wheel = tiny_wheel(folder, 'works')
    result = script.CheckResult(False, 'environment', 'ImportError: libGL.so.1')
    monkeypatch.setattr(script, 'check_ops', lambda: result)
    assert run_main(script, folder) == 1
    assert site.built == 0
    assert wheel.exists()
    assert 'libGL.so.1' in capsys.readouterr().err


def test_built_wheel_that_does_not_work_ends_there(
    script: ModuleType,
    site: FakeSite,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, 'build_wheel', lambda version, torch, where: tiny_wheel(where, 'broken'))
    assert run_main(script, folder) == 1
    assert list(folder.glob('*.whl')) == []
    assert 'the built mmcv does not work: mmcv is broken' in capsys.readouterr().err


def test_cache_that_cannot_be_written(
    script: ModuleType, site: FakeSite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'file').touch()
    assert script.main(['--wheel-dir', str(tmp_path / 'file')]) == 1
    assert '--wheel-dir' in capsys.readouterr().err


def test_half_copied_wheel_is_not_left(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = tiny_wheel(tmp_path / 'built', 'works'), tmp_path / 'cache'
    cache.mkdir()

    def stop_half_way(origin: Path, target: Path) -> None:
        Path(target).write_bytes(Path(origin).read_bytes()[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.shutil, 'copyfile', stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            script.keep_wheel(source, cache)
    assert list(cache.iterdir()) == []
    assert script.wheel_is_whole(script.keep_wheel(source, cache))


# the lock

HOLDER = """
import runpy, sys, time
from pathlib import Path
names = runpy.run_path(sys.argv[1])
with names["locked"](Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[3]).touch()
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until it gets a line, and leaves the file "released" then."""
    command = [sys.executable, '-c', HOLDER, str(SCRIPT), str(tmp_path / 'tag'), str(tmp_path / 'released')]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'held\n'
    return process


def test_second_process_waits(
    script: ModuleType, holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def release(number: int, frame: object) -> None:
        assert not (tmp_path / 'released').exists()
        assert holder.stdin is not None
        holder.stdin.write('\n')
        holder.stdin.close()

    before = signal.signal(signal.SIGALRM, release)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        with script.locked(tmp_path / 'tag') as waited:
            assert waited
            assert (tmp_path / 'released').exists()
    finally:
        signal.signal(signal.SIGALRM, before)
        holder.wait(5)
    assert 'waiting' in capsys.readouterr().out
    with script.locked(tmp_path / 'tag') as waited:
        assert not waited


def test_killed_process_leaves_no_lock(script: ModuleType, holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait(5)
    with script.locked(tmp_path / 'tag') as waited:
        assert not waited


def test_who_waited_looks_before_building(
    script: ModuleType, site: FakeSite, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = script.locked

    @contextlib.contextmanager
    def after_another(where: Path) -> Iterator[bool]:
        with locked(where):
            site.pip('install', str(tiny_wheel(where.parent / 'elsewhere', 'works')))  # what the other process did
            yield True

    monkeypatch.setattr(script, 'locked', after_another)
    assert run_main(script, folder) == 0
    assert site.built == 0


# the build, with a small source distribution in place of mmcv

SETUP = """
import os, subprocess
from pathlib import Path
from setuptools import setup
{body}
setup(name="mmcv-full", version="1.7.2", packages=["mmcv"])
"""
COMPILE = """
if __name__ == "__main__":
    Path("probe.cpp").write_text("#include <concepts>\\nstatic_assert(std::integral<int>);\\n")
    subprocess.run([os.environ["CXX"], "-std=c++17", "-c", "probe.cpp"], check=True)
    Path("mmcv/flags.py").write_text(os.environ["CFLAGS"])
"""
FAIL = """
import sys
print("[3/9] c++ -Wno-error -c x.cpp")
print("x.cpp:1:2: error: expected unqualified-id")
sys.exit(1)
"""


@pytest.fixture
def source_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes pip find a source distribution of mmcv-full with a given setup.py body."""
    if importlib.util.find_spec('pip') is None or importlib.util.find_spec('setuptools') is None:
        pytest.skip('no pip or no setuptools here')
    if importlib.util.find_spec('wheel') is None:
        pytest.skip('no package `wheel` here')

    def make(body: str) -> None:
        root = tmp_path / 'mmcv-full-1.7.2'
        (root / 'mmcv').mkdir(parents=True)
        (root / 'mmcv' / '__init__.py').write_text('works')
        (root / 'setup.py').write_text(SETUP.format(body=body))
        (root / 'PKG-INFO').write_text('Metadata-Version: 2.1\nName: mmcv-full\nVersion: 1.7.2\n')
        with tarfile.open(tmp_path / 'mmcv-full-1.7.2.tar.gz', 'w:gz') as archive:
            archive.add(root, arcname=root.name)
        monkeypatch.setenv('PIP_NO_INDEX', '1')
        monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
        monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)

    return make


def test_real_build_compiles_in_the_newer_standard(
    script: ModuleType,
    source_of: Callable[[str], None],
    torch_of: Callable[..., object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if script.compiler_problem(20) is not None:
        pytest.skip('no compiler for C++20 here')
    source_of(COMPILE)
    cache = tmp_path / 'my cache'
    cache.mkdir()
    wheel = script.build_wheel(VERSION, torch_of(), cache)
    assert wheel.parent == cache
    assert zipfile.ZipFile(wheel).read('mmcv/flags.py') == b'-g0 -O1'
    assert sorted(path.name for path in cache.iterdir()) == sorted(['build.log', wheel.name])
    said = capsys.readouterr().out
    assert 'minutes on' in said
    assert str(cache / 'build.log') in said


def test_failed_build_shows_the_error_and_the_log(
    script: ModuleType, source_of: Callable[[str], None], torch_of: Callable[..., object], tmp_path: Path
) -> None:
    source_of(FAIL)
    cache = tmp_path / 'cache'
    cache.mkdir()
    with pytest.raises(script.InstallError) as caught:
        script.build_wheel(VERSION, torch_of(), cache)
    assert 'x.cpp:1:2: error: expected unqualified-id' in str(caught.value)
    assert '-Wno-error' not in str(caught.value)
    assert 'ERROR' not in str(caught.value)  # what pip says of it afterwards
    assert str(cache / 'build.log') in str(caught.value)
    assert [path.name for path in cache.iterdir()] == ['build.log']


def test_out_of_memory_is_explained(script: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / 'build.log'
    log.write_text('c++: fatal error: Killed signal terminated program cc1plus\n')
    assert 'MAX_JOBS=1' in script.build_failure(log)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return 'Z' not in Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
def test_interrupt_ends_the_whole_build(script: ModuleType, tmp_path: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    pids = tmp_path / 'pids'
    tree = write_executable(tmp_path / 'tree', f'sleep 60 &\necho "$$ $!" > "{pids}"\nwait\n')
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.6)
        with pytest.raises(KeyboardInterrupt):
            script.run_logged([str(tree)], dict(os.environ), tmp_path / 'log')
    finally:
        signal.signal(signal.SIGALRM, before)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    deadline = time.monotonic() + 5
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, started))


def test_interrupt_has_its_exit_code(
    script: ModuleType, site: FakeSite, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(version: str, torch: object, where: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, 'build_wheel', stop)
    assert run_main(script, folder) == 130
    assert list(folder.iterdir()) == []


def test_progress_reads_what_ninja_writes(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / 'build.log'
    log.write_text('running build_ext\n')
    progress = script.Progress(log)
    progress.update()
    assert 'preparing' in progress.text()
    with log.open('a') as stream:
        stream.write('  [1/20] c++ a.cpp\n  [5/20] c++ b.cpp\n[19/2')  # the last line is not complete yet
    progress.update()
    assert '5/20 objects' in capsys.readouterr().out
    with log.open('a') as stream:
        stream.write('0] c++ c.cpp\n')
    progress.update()
    assert '19/20 objects' in capsys.readouterr().out


# the check itself


def test_installed_mmcv_passes(script: ModuleType) -> None:
    if not any(script.installed_version(name) for name in ('mmcv-full', 'mmcv')):
        pytest.skip('mmcv is not installed here: python tools/install_mmcv.py')
    result = script.check_ops()
    assert result.ok, result.error
    assert 'cpu' in result.devices
    assert result.mmcv in {script.installed_version('mmcv-full'), script.installed_version('mmcv')}


def test_check_notices_wrong_values(script: ModuleType) -> None:
    if not any(script.installed_version(name) for name in ('mmcv-full', 'mmcv')):
        pytest.skip('mmcv is not installed here: python tools/install_mmcv.py')
    changes = [('[5.0, 6.0, 9.0, 10.0]', '[5.0, 6.0, 9.0, 11.0]'), ('ramp.grad.sum(), [4.0]', 'ramp.grad.sum(), [5.0]')]
    changes.append(('kept, [0, 2]', 'kept, [0, 1]'))
    assert all(script.OPS_CHECK.count(good) == 1 for good, _ in changes)
    texts = [script.OPS_CHECK, *(script.OPS_CHECK.replace(good, bad) for good, bad in changes)]
    # all in one interpreter: importing torch and mmcv is what takes the time
    code = f'for text in {texts!r}:\n    try:\n        exec(text, {{}})\n    except SystemExit:\n        pass\n'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(script.PROBE_MARK)]
    results = [json.loads(line.removeprefix(script.PROBE_MARK)) for line in lines]
    assert [result['ok'] for result in results] == [True, False, False, False]
    assert all(result['stage'] == 'mmcv' for result in results)
    for result, told in zip(results[1:], ('RoIAlign on cpu gives', 'gradients', 'NMS on cpu'), strict=True):
        assert told in result['error']


def test_check_tells_environment_from_mmcv(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, 'OPS_CHECK', script.OPS_CHECK.replace('torch, numpy, cv2', 'kw_no_such_module'))
    result = script.check_ops()
    assert (result.ok, result.stage) == (False, 'environment')
    assert 'kw_no_such_module' in result.error


def test_check_survives_a_crash(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, 'OPS_CHECK', 'import os; os.system("echo warning >&2"); os.kill(os.getpid(), 11)')
    result = script.check_ops()
    assert (result.ok, result.stage) == (False, 'mmcv')
    assert 'signal 11' in result.error


def test_help_needs_nothing_installed() -> None:
    command = [sys.executable, '-I', '-S', str(SCRIPT), '--help']
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert '--wheel-dir' in done.stdout
