"""Kernels from cells, compiled and not, against the straightforward way, in every layout and type."""

import itertools
import math

import pytest
import torch

from kw_timm.ops import ConvSpec, assemble_kernels, mix_cells, native

# grid (positions, output groups, input groups), cell (co, ci, *window), kernel window.
KERNELS = {
    'one mixture': ((1, 1, 1), (6, 4, 1, 1), (1, 1)),
    '1d': ((3, 1, 2), (4, 5, 1), (3,)),
    '1d whole windows': ((1, 2, 1), (4, 3, 3), (3,)),
    '2d': ((9, 2, 3), (4, 5, 1, 1), (3, 3)),
    '2d whole windows': ((1, 2, 2), (4, 3, 3, 3), (3, 3)),
    '2d depthwise': ((9, 3, 1), (4, 1, 1, 1), (3, 3)),
    '3d': ((8, 2, 1), (3, 2, 1, 1, 1), (2, 2, 2)),
    '3d whole windows': ((1, 1, 2), (3, 2, 2, 1, 2), (2, 1, 2)),
    'long cells': ((1, 2, 3), (24, 23, 1, 1), (1, 1)),
    'longer cells': ((4, 1, 2), (37, 31, 1, 1), (2, 2)),
}
KERNELS = {case: ConvSpec.of(*parts) for case, parts in KERNELS.items()}
LAYOUTS = {
    'sliced': lambda t: torch.cat([t, t[..., :1]], -1)[..., :-1],
    'spread': lambda t: torch.stack([t, t], -1)[..., 0],
    'permuted': lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    'mixtures first': lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    'every other sample': lambda t: t.repeat_interleave(2, 0)[::2],
    'some mixtures': lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    'one for all samples': lambda t: t[:1].expand_as(t),
}


def assert_close(ours, theirs, rtol=1e-9):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert (ours - theirs).norm() <= rtol * theirs.norm()


def mixtures(case, batch, num_cells, lead=()):
    spec = KERNELS[case]
    generator = torch.Generator().manual_seed(batch + num_cells)
    coefficients = torch.randn(batch, math.prod(spec.grid), num_cells, dtype=torch.double, generator=generator)
    cells = torch.randn(*lead, num_cells, *spec.cell_shape, dtype=torch.double, generator=generator)
    return coefficients, cells, spec


@pytest.fixture(params=['compiled', 'torch'])
def way(request, monkeypatch):
    if request.param == 'torch':
        monkeypatch.setattr(native, 'module', None)
    assert (native.module is not None) == (request.param == 'compiled')


@pytest.mark.parametrize('case', KERNELS)
def test_kernels(case, way):
    for batch, num_cells in itertools.product((0, 1, 3, 40), (1, 7, 8, 19)):
        coefficients, cells, spec = mixtures(case, batch, num_cells)
        expected = assemble_kernels(coefficients, cells, spec)
        kernels = mix_cells(coefficients, cells, spec)
        assert kernels.is_contiguous()
        assert_close(kernels, expected)
        kernels = mix_cells(coefficients.float(), cells.float(), spec)
        assert_close(kernels, expected.float(), 1e-5)


@pytest.mark.parametrize('case', KERNELS)
def test_kernels_from_cells_of_each_mixture(case, way):
    count = math.prod(KERNELS[case].grid)
    for batch, num_cells in itertools.product((0, 1, 3, 40), (1, 8, 19)):
        coefficients, cells, spec = mixtures(case, batch, num_cells, lead=(count,))
        # All cells for all mixtures, with those of the others at zero.
        apart = torch.zeros(batch, count, count, num_cells, dtype=torch.double)
        apart[:, range(count), range(count)] = coefficients
        expected = assemble_kernels(apart.flatten(2), cells.flatten(0, 1), spec)
        assert_close(mix_cells(coefficients, cells, spec), expected)


@pytest.mark.parametrize('case', ['one mixture', '2d', '2d whole windows', 'longer cells'])
@pytest.mark.parametrize('lead', [False, True], ids=['cells', 'cells of each mixture'])
def test_kernels_from_fewer_bits(case, lead):
    """Cells are widened exactly; coefficients in fewer bits are mixed in those."""
    coefficients, cells, spec = mixtures(case, 5, 19, lead=(math.prod(KERNELS[case].grid),) if lead else ())
    coefficients = coefficients.float()
    for few in (cells.bfloat16(), (cells * 30).round().clamp(-127, 127).to(torch.int8)):
        expected = mix_cells(coefficients.double(), few.double(), spec).float()
        assert_close(mix_cells(coefficients, few, spec), expected, 1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        kernels = mix_cells(coefficients.to(dtype), cells.to(dtype), spec)
        expected = mix_cells(coefficients.to(dtype).double(), cells.to(dtype).double(), spec)
        assert_close(kernels, expected.to(dtype), 1e-2)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_kernels_from_coefficients_in_any_layout(layout):
    for case in ('2d', '2d whole windows', 'one mixture'):
        coefficients, cells, spec = mixtures(case, 4, 9)
        coefficients = LAYOUTS[layout](coefficients)
        expected = mix_cells(coefficients.clone(memory_format=torch.contiguous_format), cells, spec)
        assert_close(mix_cells(coefficients, cells, spec), expected)
        spread = torch.stack([cells, cells], -1)[..., 0]
        assert_close(mix_cells(coefficients, spread, spec), expected)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_kernels_from_coefficients_in_any_layout_and_cells_of_each_mixture(layout):
    for case in ('2d', '2d whole windows'):
        coefficients, cells, spec = mixtures(case, 4, 9, (math.prod(KERNELS[case].grid),))
        coefficients = LAYOUTS[layout](coefficients)
        expected = mix_cells(coefficients.clone(memory_format=torch.contiguous_format), cells, spec)
        assert_close(mix_cells(coefficients, cells, spec), expected)
