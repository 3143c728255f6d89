"""What is released works outside a checkout: a source distribution, a wheel made of it, installed, trains the demo."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = 'mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes'
SOURCES = ('kw_timm', 'adapters', 'hub', 'configs', 'tools', 'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md')


def call(*command: str | Path, cwd: Path, timeout: int = 500) -> str:
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """The wheel, made of the source distribution, made of a copy of the checkout."""
    pytest.importorskip('build', reason='needs the extra test')
    folder = tmp_path_factory.mktemp('release')
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns('*.so', '__pycache__', '*.egg-info')
            shutil.copytree(source, folder / 'checkout' / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder / 'checkout' / name)
    call(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder / 'dist', '.', cwd=folder / 'checkout')
    (found,) = (folder / 'dist').glob('*.whl')
    (source,) = (folder / 'dist').glob('*.tar.gz')
    said = call(sys.executable, '-m', 'twine', 'check', '--strict', found, source, cwd=folder)
    assert said.count('PASSED') == 2
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_trains_the_demo(wheel, tmp_path):
    """In an environment that has this wheel, and of this one's packages what the wheel asks for."""
    pytest.importorskip('mmdet', reason='needs MMDetection')
    from demo import overridden
    from kw_mmdet.generation import GENERATION
    from make_shapes import make_shapes

    names = zipfile.ZipFile(wheel).namelist()
    assert 'kw_timm/csrc/mixing.cpp' in names
    assert f'kw_mmdet/.mim/configs/shapes/{CONFIG}.py' in names
    compiled = any(name.startswith('kw_timm/_mixing.') and name.endswith(('.so', '.pyd')) for name in names)
    assert compiled == (shutil.which('g++') is not None or shutil.which('clang++') is not None)

    call('bash', ROOT / 'tools/overlay.sh', tmp_path / 'empty', sys.prefix, cwd=tmp_path)
    python = tmp_path / 'empty/bin/python'
    call(python, '-m', 'pip', 'install', '--no-deps', '--force-reinstall', wheel, cwd=tmp_path)
    ask = 'import kw_timm, kw_mmdet, kw_hub, kw_timm.ops.native as n; print(kw_timm.__file__, n.module is not None)'
    where = call(python, '-P', '-c', ask, cwd=tmp_path)
    assert where.split() == [str(next((tmp_path / 'empty').rglob('kw_timm/__init__.py'))), str(compiled)]
    points = 'from importlib.metadata import entry_points as e; print(*[p.load() for p in e(group="kw_timm.fetchers")])'
    assert 'bring' in call(python, '-P', '-c', points, cwd=tmp_path)

    data = make_shapes(tmp_path / 'shapes', train=2, val=1, size=96)
    options = [f'{key}={value}' for key, value in overridden(data, epochs=1, batch=2).items()]
    call(
        *(tmp_path / 'empty/bin/kw-mmdet', 'train', CONFIG, '--work-dir', tmp_path / 'run'),
        *(['--no-validate'] if GENERATION == 2 else []),
        *('--cfg-options', *options),
        cwd=tmp_path,
    )
    assert (tmp_path / 'run/epoch_1.pth').is_file()
