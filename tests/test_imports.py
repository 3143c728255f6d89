"""Imports go down the house only, and in no circle: neither at run time nor for types alone."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {'kw_timm': ROOT / 'kw_timm', 'kw_mmdet': ROOT / 'adapters/kw_mmdet', 'kw_hub': ROOT / 'hub/kw_hub'}
# From the ground up; a room may import from floors below its own, and from itself.
FLOORS = (
    ('kw_timm._mixing', 'kw_timm.files', 'kw_timm.tables'),
    ('kw_timm.ops',),
    ('kw_timm.layers', 'kw_timm.readers'),
    ('kw_timm.plans', 'kw_timm.replaceable', 'kw_timm.stages', 'kw_timm.takeover'),
    ('kw_timm.plan_json', 'kw_timm.sharing'),
    ('kw_timm.derive', 'kw_timm.recording'),
    ('kw_timm.plan_table',),
    ('kw_timm.kernelize', 'kw_timm.temperature', 'kw_timm.inference', 'kw_timm.counting'),
    ('kw_timm.weights', 'kw_timm.padding'),
    ('kw_timm.models',),
    ('kw_timm',),
    ('kw_timm.pyramid', 'kw_timm.random_weights'),
    ('kw_timm.export', 'kw_timm.training'),
    ('kw_timm.benchmark',),
    ('kw_timm.inspection',),
    ('kw_timm.cli', 'kw_mmdet', 'kw_hub'),
    ('kw_timm.__main__',),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """The project's modules by dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob('*.py'):
            name = '.'.join((package, *path.relative_to(folder).with_suffix('').parts))
            found[name.removesuffix('.__init__')] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    """The room that a module is in."""
    parts = name.split('.')
    return '.'.join(parts[:2]) if parts[0] == 'kw_timm' else parts[0]


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module of the project that a module imports, wherever in its text."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: len(package.split('.')) + 1 - node.level] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            inside = [f'{base}.{alias.name}' for alias in node.names]
            targets = [inner if inner in MODULES or inner in FLOOR else base for inner in inside]
        else:
            continue
        yield from ((node.lineno, target) for target in targets if target.split('.')[0] in PACKAGES)


@pytest.mark.parametrize('name', MODULES)
def test_imports_go_down(name):
    own = room(name)
    assert own in FLOOR, f'{name} is in no room of the house: add it to FLOORS'
    wrong = [
        f'{MODULES[name].relative_to(ROOT)}:{line} imports {target}'
        for line, target in imports(name, MODULES[name])
        if room(target) != own and FLOOR[room(target)] >= FLOOR[own]
    ]
    assert not wrong


def test_no_module_needs_itself():
    graph = {name: {t for _, t in imports(name, path) if t in MODULES} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError, with the circle.
