"""Partition arithmetic: every rule of how kernels are cut, counted and assigned, on integers."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from reference_data import manifest

from kw_timm.layers import partition
from kw_timm.layers.partition import assign_cells, partition_kernels


def test_cells_are_the_greatest_common_divisors_times_the_ratios():
    shapes = [(48, 60, 3, 3), (72, 36, 1, 1)]
    assert partition_kernels(shapes).cell_shape == (24, 12, 1, 1)
    half = partition_kernels(shapes, cell_outplane_ratio=0.5, cell_inplane_ratio=0.25)
    assert half.cell_shape == (12, 3, 1, 1)
    # Rounded down, but at least 1.
    assert partition_kernels([(10, 7)], cell_outplane_ratio=0.25, cell_inplane_ratio=0.01).cell_shape == (2, 1)


def test_grids_number_positions_output_groups_and_input_groups():
    p = partition_kernels([(48, 60, 3, 3), (72, 36, 1, 1)])
    assert [layer.grid for layer in p.layers] == [(9, 2, 5), (1, 3, 3)]
    assert [layer.num_mixtures for layer in p.layers] == [90, 9]
    assert p.num_cells == 99


@pytest.mark.parametrize(('ratio', 'cells'), [(0.25, 18), (0.5, 36), (1, 72), (2, 144), (4, 288)])
def test_cell_count_is_the_budget_times_the_mixtures(ratio, cells):
    p = partition_kernels([(8, 8, 2, 2)] * 18, cell_num_ratio=ratio)
    assert p.num_cells == cells
    assert (p.layers[0].start, p.layers[-1].stop) == (0, cells)


def test_a_warehouse_has_at_least_one_cell():
    with pytest.raises(ValueError, match='does not add up'):
        # Each layer's only mixture takes a cell, a quarter of two is one.
        partition_kernels([(8, 8, 1)] * 2, cell_num_ratio=0.25)
    assert partition_kernels([(8, 8, 1)], cell_num_ratio=0.25).num_cells == 1


def test_without_spatial_partition_cells_keep_the_window():
    p = partition_kernels([(8, 4, 3, 5), (16, 8, 3, 5)], spatial_partition=False)
    assert p.cell_shape == (8, 4, 3, 5)
    assert [layer.grid for layer in p.layers] == [(1, 1, 1), (1, 2, 2)]


def test_assignment_with_whole_budgets_takes_every_so_manieth_cell():
    assert assign_cells(3, 5, 1, 20) == ((5, 6, 7), 8)
    assert assign_cells(3, 4, 4, 20) == ((4, 8, 12), 16)


def test_assignment_with_fractional_budgets_moves_along_and_fills_with_the_zero_cell():
    z = 99
    assert assign_cells(8, 3, 0.5, z) == ((3, z, z, 4, 5, z, z, 6), 7)
    assert assign_cells(12, 0, 0.25, z) == ((0, z, z, z, z, 1, z, z, z, z, 2, z), 3)


@pytest.mark.parametrize('ratio', [0.25, 0.5, 1, 2])
def test_layers_take_consecutive_slices_and_each_cell_once(ratio):
    p = partition_kernels([(16, 16, 2, 2), (32, 16, 1, 1), (16, 16, 2, 2)], ratio, 0.5, 0.5)
    assert [layer.start for layer in p.layers[1:]] == [layer.stop for layer in p.layers[:-1]]
    taken = [cell for layer in p.layers for cell in layer.assigned if cell < p.num_cells]
    assert taken == list(range(0, p.num_cells, max(int(ratio), 1)))


@pytest.mark.parametrize(
    ('shapes', 'options', 'message'),
    [
        ([], {}, 'at least one layer'),
        ([(8, 8, 3, 3), (8, 8, 3)], {}, 'one rank'),
        ([(8,)], {}, 'one rank'),
        ([(8, 0, 3, 3)], {}, 'must be positive'),
        ([(8, 8)], {'cell_num_ratio': 0}, 'cell_num_ratio must be a positive number'),
        ([(8, 8)], {'cell_inplane_ratio': -1.0}, 'cell_inplane_ratio must be a positive number'),
        ([(8, 8)], {'cell_outplane_ratio': math.nan}, 'cell_outplane_ratio must be a positive number'),
        ([(8, 8)], {'cell_num_ratio': math.inf}, 'cell_num_ratio must be a positive number'),
        ([(64, 64, 1, 1)], {'cell_outplane_ratio': 0.75}, 'Cells of 48 output and 64 input channels do not divide'),
        ([(64, 64, 1, 1)], {'cell_inplane_ratio': 2}, 'do not divide a kernel of shape'),
        ([(8, 8, 3, 3)] * 2, {'cell_num_ratio': 1.5}, 'does not add up: 2 layers with .* 18 cells, .* has 27'),
        ([(8, 8, 3, 3)] * 2, {'cell_num_ratio': 0.5}, 'does not add up'),
        ([(8, 8, 3, 3), (8, 8, 1, 1)], {'spatial_partition': False}, 'need one kernel size'),
    ],
)
def test_bad_plans(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        partition_kernels(shapes, **options)


def test_is_pure_integer_code():
    """The file runs where torch cannot be imported."""
    source = Path(partition.__file__).read_text()
    program = f"import sys\nsys.modules['torch'] = sys.modules['numpy'] = None\nexec({source!r}, {{'__name__': 'p'}})"
    subprocess.run([sys.executable, '-c', program], check=True)


# The released networks, drawn from the paper's description rather than from the models.


def warehouses(name: str) -> list[tuple[int, ...]]:
    found = {k: shape for k, shape in manifest(name).items() if k.startswith('warehouse_manager.')}
    return [found[f'warehouse_manager.weights.{i}'] for i in range(len(found))]


def resnet_kernels(depths: tuple[int, ...], bottleneck: bool) -> list[list[tuple[int, ...]]]:
    stages: list[list[tuple[int, ...]]] = [[], [], [], []]
    channels = 64
    for s, depth in enumerate(depths):
        width = 64 * 2**s
        out = width * (4 if bottleneck else 1)
        for i in range(depth):
            before = stages[max(s - 1, 0) if i == 0 else s]
            if bottleneck:
                if (s, i) != (0, 0):
                    before.append((width, channels, 1, 1))
                stages[s] += [(width, width, 3, 3), (out, width, 1, 1)]
            else:
                before.append((width, channels, 3, 3))
                stages[s].append((width, width, 3, 3))
            if i == 0 and s > 0:
                before.append((out, channels, 1, 1))
            channels = out
    return stages


@pytest.mark.parametrize(
    ('name', 'depths', 'ratios'),
    [
        ('kw1d4x_resnet18', (2, 2, 2, 2), (0.25, 0.5, 0.5)),
        ('kw1x_resnet18', (2, 2, 2, 2), (1, 1, 1)),
        ('kw1d2x_resnet50', (3, 4, 6, 3), (0.5, 0.5, 0.5)),
        ('kw4x_resnet50', (3, 4, 6, 3), (4, 1, 1)),
    ],
)
def test_released_resnets(name, depths, ratios):
    made = [partition_kernels(shapes, *ratios) for shapes in resnet_kernels(depths, 'resnet50' in name)]
    assert [(p.num_cells, *p.cell_shape) for p in made] == warehouses(name)


def mobilenetv2_kernels(width: float, shared: bool) -> list[list[tuple[int, ...]]]:
    def channels(c: int) -> int:
        rounded = max(8, int(c * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * c * width else rounded

    groups: dict[tuple, list[tuple[int, ...]]] = {}

    def add(stage: int, kind: str, *shape: int) -> None:
        groups.setdefault((stage, 'pointwise' if shared and kind != 'depthwise' else kind), []).append(shape)

    inputs = channels(32)
    kw_stages = (1, 2, 3, 4, 5, 6, 6)
    settings = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for s, (expansion, c, repeats) in enumerate(settings):
        for i in range(repeats):
            stage = kw_stages[s - 1] if i == 0 and s > 0 else kw_stages[s]
            hidden = inputs * expansion
            if expansion > 1:
                add(stage, 'expand', hidden, inputs, 1, 1)
            add(stage, 'depthwise', hidden, 1, 3, 3)
            add(stage, 'project', channels(c), hidden, 1, 1)
            inputs = channels(c)
    add(6, 'project', 1280, inputs, 1, 1)
    return [[(channels(32), 3, 3, 3)], *groups.values()]


@pytest.mark.parametrize(
    ('name', 'width', 'shared', 'ratio'),
    [('kw1x_mobilenetv2_050', 0.5, True, 1), ('kw4x_mobilenetv2_100', 1.0, False, 4)],
)
def test_released_mobilenets(name, width, shared, ratio):
    made = [partition_kernels(shapes, ratio) for shapes in mobilenetv2_kernels(width, shared)]
    assert [(p.num_cells, *p.cell_shape) for p in made] == warehouses(name)


def test_released_half_budget_mobilenet():
    groups = mobilenetv2_kernels(1.0, shared=False)
    expand, depthwise, project = groups[-3:]
    assert all(shape[2:] == (3, 3) for shape in depthwise)
    made = [partition_kernels(groups[0])]
    made += [partition_kernels(g) for g in groups[1:-3] if g[0][2:] == (3, 3)]
    made.append(partition_kernels(expand, 0.5, 0.5, 0.5))
    made.append(partition_kernels(depthwise))
    made.append(partition_kernels(project, 0.5, 0.5, 0.5))
    made.append(partition_kernels([(1000, 1280, 1)], 0.5, 0.025))
    assert [(p.num_cells, *p.cell_shape) for p in made] == warehouses('kw1d2x_mobilenetv2_100')


def test_released_convnext():
    dims, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    groups: list[list[tuple[int, ...]]] = [[(96, 3, 4, 4)]]
    groups += [[(wide, narrow, 2, 2)] for narrow, wide in pairwise(dims)]
    for dim, depth in zip(dims, depths, strict=True):
        groups += [[(dim, 1, 7, 7)] * depth, [(4 * dim, dim, 1, 1), (dim, 4 * dim, 1, 1)] * depth]
    made = [partition_kernels(shapes) for shapes in groups]
    assert [(p.num_cells, *p.cell_shape) for p in made] == warehouses('kw1x_convnext_tiny')
