"""The compiled products, with every width of vectors that the processor has, against torch's."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from kw_timm.ops import ConvSpec, assemble_kernels, mix_cells, native
from kw_timm.ops.mixing import add_dot_products, add_products

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(params=[16, 32, 64, None], autouse=True)
def vectors(request, monkeypatch):
    if request.param is None:
        monkeypatch.setattr(native, 'module', None)
        yield
        return
    module = native.module
    if module is None or module.use_vectors(request.param) != request.param:
        pytest.skip(f'no vectors of {request.param} bytes')
    yield
    module.use_vectors(64)


@pytest.fixture(params=[torch.float64, torch.float32], ids=['float64', 'float32'])
def dtype(request):
    torch.manual_seed(0)
    return request.param


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).norm() <= TOLERANCE[ours.dtype] * theirs.double().norm()


@pytest.mark.parametrize('num_cells', [1, 3, 5, 8, 11, 40, 257, 513])
def test_kernels_of_any_number_of_rows_and_cells(num_cells, dtype):
    for rows, columns in itertools.product((*range(1, 14), 17, 25, 28, 33, 300), (1, 37, 250)):
        coefficients = torch.randn(1, rows, num_cells, dtype=dtype)
        cells = torch.randn(num_cells, columns, 3, 1, 1, dtype=dtype)
        kernels = mix_cells(coefficients, cells, ConvSpec.of((1, rows, 1), cells.shape[1:], (1, 1)))
        assert_close(kernels.flatten(), (coefficients[0].double() @ cells.double().flatten(1)).flatten())


def test_kernels_whose_windows_come_from_many_rows(dtype):
    coefficients, cells = torch.randn(4, 18, 270, dtype=dtype), torch.randn(270, 4, 61, 1, 1, dtype=dtype)
    spec = ConvSpec.of((9, 2, 1), cells.shape[1:], (3, 3))
    expected = assemble_kernels(coefficients.double(), cells.double(), spec)
    assert_close(mix_cells(coefficients, cells, spec), expected)
    factors = torch.randn(8, dtype=dtype)
    with_factors = mix_cells(coefficients, cells, spec, factors)
    assert_close(with_factors, expected * factors.double().view(-1, 1, 1, 1))


@pytest.mark.parametrize('bits', [torch.bfloat16, torch.int8])
def test_kernels_from_fewer_bits(bits):
    torch.manual_seed(0)
    for rows, num_cells in itertools.product((1, 4, 9, 40), (7, 300)):
        coefficients = torch.randn(1, rows, num_cells)
        cells = (torch.randn(num_cells, 77, 3, 1, 1) * 20).clamp(-127, 127).to(bits)
        kernels = mix_cells(coefficients, cells, ConvSpec.of((1, rows, 1), cells.shape[1:], (1, 1)))
        assert_close(kernels.flatten(), (coefficients[0].double() @ cells.double().flatten(1)).flatten())


@pytest.mark.parametrize('overwrite', [True, False])
def test_products_are_added(overwrite, dtype):
    for rows, n, length in (
        (1, 1, 1),
        (0, 2, 3),
        (2, 0, 3),
        (2, 3, 0),
        (5, 3, 700),
        (11, 40, 64),
        (47, 9, 1030),
        (300, 36, 250),
        (600, 8, 33),
    ):
        left, right = torch.randn(2, n, rows, dtype=dtype).transpose(1, 2), torch.randn(2, n, length, dtype=dtype)
        whole = torch.randn(2, rows, length + 5, dtype=dtype)
        before = whole.clone()
        add_products(whole[..., :length], left, right, overwrite=overwrite)
        start = 0 if overwrite else before[..., :length].double()
        assert_close(whole[..., :length], start + left.double() @ right.double())
        assert torch.equal(whole[..., length:], before[..., length:])


def test_products_replace_what_is_no_number(dtype):
    out = torch.full((1, 30, 70), torch.nan, dtype=dtype)
    left, right = torch.randn(1, 30, 4, dtype=dtype), torch.randn(1, 4, 70, dtype=dtype)
    add_products(out, left, right, overwrite=True)
    assert_close(out, left.double() @ right.double())


def test_dot_products_are_added(dtype):
    for rows, n, length in (
        (1, 1, 1),
        (0, 2, 3),
        (2, 0, 3),
        (2, 3, 0),
        (3, 5, 8),
        (4, 4, 512),
        (9, 47, 1000),
        (300, 6, 700),
        (34, 601, 513),
    ):
        left, right = torch.randn(rows, length + 3, dtype=dtype)[:, :length], torch.randn(n, length, dtype=dtype)
        out = torch.randn(rows, n, dtype=dtype)
        expected = out.double() + left.double() @ right.double().t()
        add_dot_products(out, left, right)
        assert_close(out, expected)


def told(instructions):
    program = 'from kw_timm.ops import native; print(native.instructions())'
    environment = os.environ | {'KW_TIMM_ISA': instructions}
    return subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize('vectors', [16], indirect=True)
def test_instructions_by_variable():
    widest = {16: 'any', 32: 'avx2', 64: 'avx512'}[native.module.use_vectors(64)]
    assert told('any').stdout.split() == ['any']
    assert told('').stdout.split() == [widest]
    refused = told('sse9')
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("ValueError: KW_TIMM_ISA='sse9' is not known; use one of avx512,")
