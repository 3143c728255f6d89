"""The documentation: every block of code in it runs, configs build, commands exist."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
# What runs in every test: the quickest of them. The others take most of a minute together.
QUICK = ('index.md', 'weights.md')
FENCE = re.compile(r'^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$', re.MULTILINE | re.DOTALL)


def blocks(page: Path, info: str) -> list[tuple[str, str]]:
    """What is written after the fence, and the code, of every block whose language it is."""
    found = [(m['info'], textwrap.dedent(m['code'])) for m in FENCE.finditer(page.read_text())]
    return [(head, code) for head, code in found if re.fullmatch(info, head)]


def test_blocks_are_of_kinds_that_are_tested():
    for page in PAGES:
        heads = {head for head, _ in blocks(page, '.*')}
        assert all(re.fullmatch(r'python|bash|python title="\w+\.py"', head) for head in heads), (page, heads)


PYTHON = [page for page in PAGES if blocks(page, 'python')]


@pytest.mark.parametrize(
    'page', [pytest.param(p, id=p.name, marks=() if p.name in QUICK else pytest.mark.slow) for p in PYTHON]
)
def test_python_runs(page, stored, tmp_path, monkeypatch):
    """With the weights of the smallest network in the store, one page's blocks after another in one program."""
    mktestdocs = pytest.importorskip('mktestdocs', reason='needs the extra test')
    monkeypatch.chdir(tmp_path)
    mktestdocs.check_md_file(page, memory=True)


CONFIGS = [(page, head, code) for page in PAGES for head, code in blocks(page, r'python title=.*')]


@pytest.mark.parametrize(('page', 'head', 'code'), CONFIGS, ids=[re.findall('"(.*)"', c[1])[0] for c in CONFIGS])
def test_configs_are_detectors(page, head, code, tmp_path):
    pytest.importorskip('mmdet', reason='needs MMDetection')
    from kw_mmdet.checks import check_neck
    from kw_mmdet.generation import GENERATION
    from kw_mmdet.programs import load_config

    name = re.findall('"(.*)"', head)[0]
    if 'kw_mmdet::' in code and GENERATION == 2:
        pytest.skip('a config for MMDetection 3.x')
    if '\ndata = ' in code and GENERATION == 3:
        pytest.skip('a config for MMDetection 2.x')
    (tmp_path / name).write_text(code)
    config = load_config(str(tmp_path / name))
    check_neck(config.model)
    assert config.model.backbone.type == 'KWBackbone'


def commands() -> list[list[str]]:
    """The commands of this package in the documentation's shell blocks."""
    lines = [line for page in PAGES for _, code in blocks(page, 'bash') for line in code.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and words[0].startswith('kw-')]


def test_commands_are_understood():
    import kw_hub.cli

    import kw_timm.cli

    parsers = {'kw-hub': kw_hub.cli._parser(), 'kw-timm': kw_timm.cli._parser()}
    found = commands()
    assert {words[0] for words in found} >= {'kw-hub', 'kw-timm', 'kw-mmdet'}
    for words in found:
        if words[0] in parsers:
            parsers[words[0]].parse_args(words[1:])


def test_mmdetection_commands_are_understood():
    pytest.importorskip('mmdet', reason='needs MMDetection')
    from kw_mmdet import cli, configs

    for program, command, *arguments in commands():
        if program == 'kw-mmdet':
            assert command in cli.PROGRAMS or cli._parser().parse_args([command, *arguments])
            named = arguments[arguments.index('--config') + 1] if '--config' in arguments else arguments[0]
            assert named in ('CONFIG', 'FILE') or configs.find_config(named)


@pytest.mark.slow
def test_the_pictures_are_what_the_program_draws(tmp_path):
    subprocess.run([sys.executable, 'tools/draw_docs.py', str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    for name in ('kernel.svg', 'warehouse.svg'):
        drawn, kept = ((folder / name).read_text() for folder in (tmp_path, ROOT / 'docs'))
        # Numbers of places and versions aside.
        assert re.findall(r'<!-- .* -->|fill: #\w+', drawn) == re.findall(r'<!-- .* -->|fill: #\w+', kept)
