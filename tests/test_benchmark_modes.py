"""Modes of `kw-timm bench` beside its own four: other dynamic convolutions, cells of fewer bits; types and devices."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from kw_timm.benchmark import MODES, Settings, network_cases, read_csv, run_case, session
from kw_timm.benchmark.cases import STORED
from kw_timm.benchmark.measure import alternate, peak_memory
from kw_timm.benchmark.odconv import ODConv2d
from kw_timm.benchmark.peers import PEERS, RoutedCondConv2d, experts_of, with_peers
from kw_timm.benchmark.report import BEGIN, COLOURS, END, describe, text_table
from kw_timm.benchmark.results import Machine
from kw_timm.cli import main
from kw_timm.layers import KWLayer

CPU = torch.device('cpu')
VARIANT = 'kw1x_mobilenetv2_050'
QUICK = ['--size', '32', '--repeats', '1', '--min-time', '0', '--max-time', '0', '--train-size', '64']
MACHINE = Machine('cpu', 'a processor', 1, 'float32', 1e11, 2e10, torch.__version__, timm.__version__, '0', '3')
MB = 2**20
# in, out, window, stride, padding, dilation, groups
LAYERS = {
    'plain': (6, 10, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    'pointwise': (6, 10, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    'strided pointwise': (6, 10, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    'strided and dilated': (6, 10, (5, 3), (2, 1), (2, 1), (1, 2), 1),
    'depthwise': (6, 6, (3, 3), (2, 2), (1, 1), (1, 1), 6),
    'grouped': (6, 9, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    'grouped pointwise': (6, 4, (1, 1), (1, 1), (0, 0), (1, 1), 2),
}


def condconv_kernel(layer: RoutedCondConv2d, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel and bias of one image ``(C, H, W)``: the sum of experts, each times the sigmoid of its routing."""
    weights = torch.sigmoid(layer.routing.weight @ image.mean((1, 2)) + layer.routing.bias)
    kernel = sum(w * expert.view(layer.weight_shape) for w, expert in zip(weights, layer.weight, strict=True))
    return kernel, sum(w * bias for w, bias in zip(weights, layer.bias, strict=True))


def odconv_kernel(layer: ODConv2d, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel and bias of one image: every element times its four attentions, the paper's equation 2."""
    count, filters, per_group, height, width = layer.weight.shape
    hidden = torch.relu(layer.squeeze.weight @ image.mean((1, 2)) + layer.squeeze.bias)

    def attention(axis: str, length: int) -> torch.Tensor:
        if axis not in layer.heads:
            return torch.ones(length, dtype=image.dtype)
        logits = layer.heads[axis].weight @ hidden + layer.heads[axis].bias
        return torch.softmax(logits, 0) if axis == 'kernels' else torch.sigmoid(logits)

    of_kernels, of_filters = attention('kernels', count), attention('filters', filters)
    of_inputs, of_positions = attention('inputs', len(image)), attention('positions', height * width)
    rows = []
    for f in range(filters):
        first = f // (filters // layer.groups) * per_group  # of the input channels that this filter sees
        seen = of_inputs[first : first + per_group].view(-1, 1, 1)
        mixed = sum(a * kernel[f] for a, kernel in zip(of_kernels, layer.weight, strict=True))
        rows.append(of_filters[f] * seen * of_positions.view(1, height, width) * mixed)
    return torch.stack(rows), layer.bias


def randomized(kind: str, *arguments: object, experts: int) -> nn.Module:
    layer = PEERS[kind](*arguments, True, num_experts=experts).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.mark.parametrize('experts', [1, 4])
@pytest.mark.parametrize('kind', PEERS)
@pytest.mark.parametrize('shape', LAYERS.values(), ids=LAYERS)
def test_peers_compute_what_their_papers_say(shape, kind, experts):
    layer = randomized(kind, *shape, experts=experts)
    x = torch.randn(3, 6, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    kernel_of = {'condconv': condconv_kernel, 'odconv': odconv_kernel}[kind]

    def definition() -> torch.Tensor:
        images = ((image[None], *kernel_of(layer, image)) for image in x)
        return torch.cat([F.conv2d(image, kernel, bias, *shape[3:]) for image, kernel, bias in images])

    wanted = [x, *layer.parameters()]
    found, expected = layer(x), definition()
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected)), strict=True)
    for own, others in pairs:
        assert others.abs().max() > 1e-6
        assert (own - others).abs().max() <= 1e-9 * others.abs().max()


@pytest.mark.parametrize(('variant', 'experts'), [(VARIANT, {1}), ('kw4x_mobilenetv2_050', {4})])
@pytest.mark.parametrize('kind', PEERS)
def test_peers_stand_where_kw_layers_are(variant, experts, kind):
    network = timm.create_model(variant).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    peers = with_peers(network, kind)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, KWLayer)}
    assert {name for name, module in peers.named_modules() if isinstance(module, PEERS[kind])} == set(layers)
    assert not any(isinstance(module, KWLayer) for module in peers.modules())
    assert {experts_of(layer) for layer in layers.values()} == experts
    shapes: dict[str, list[object]] = {}
    for of in (network, peers):
        for name in layers:
            of.get_submodule(name).register_forward_hook(
                lambda module, given, y, name=name: shapes.setdefault(name, []).append((given[0].shape, y.shape))
            )
    with torch.no_grad():
        network(torch.ones(1, 3, 64, 64)), peers(torch.ones(1, 3, 64, 64))
    for name, (own, others) in shapes.items():
        assert own == others, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_peers_of_linear_layers():
    variant = 'kw1d2x_mobilenetv2_050'  # Its classifier is a KW layer, too.
    case = next(network_cases(variant, ['odconv'], [], [(2, (64, 64))], False, Settings(CPU, torch.float32)))
    peers = with_peers(case.kw, 'odconv')
    assert isinstance(peers.classifier.conv, ODConv2d)
    loss, *_ = case.run('odconv', peers)
    assert loss.isfinite()
    missed = [name for name, p in peers.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not missed


def test_peers_and_stored_cells_are_modes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, 'measure_machine', lambda settings: MACHINE)
    (tmp_path / 'README.md').write_text(f'{BEGIN}\n{END}\n')
    modes = ['static', 'default', 'optimized', *STORED, *PEERS]
    files = ['--csv', f'{tmp_path}/r.csv', '--readme', f'{tmp_path}/README.md']
    # Without bases, of which there are more where they take less.
    arguments = ['--device', 'cpu', '--memory-budget', '0', '--batch', '2', '--train', '--train-batch', '2']
    assert main(['bench', VARIANT, *QUICK, *arguments, '--modes', *modes, *files]) == 0
    results = read_csv(tmp_path / 'r.csv')
    assert [r.mode for r in results if r.task == 'inference'] == modes
    assert [r.mode for r in results if r.task == 'training step'] == ['static', 'default', *PEERS]
    own = {r.mode: r for r in results if r.task == 'inference'}
    exact, *stored = (own[mode] for mode in ('optimized', *STORED))
    assert 100 * exact.difference < stored[0].difference < stored[1].difference < 0.5
    assert stored[1].stored_bytes < stored[0].stored_bytes < exact.stored_bytes
    for r in results:
        if r.mode in PEERS:
            assert (r.difference, r.speedup, r.over_bound) == (None, None, None)
            assert r.over_static > 0
            assert r.peak_memory > 0
    out = capsys.readouterr().out
    assert 'odconv: 1 kernel in each of 52 layers; 2.4 M parameters' in out
    assert 'stored as torch.int8: relative error up to' in out
    text = (tmp_path / 'README.md').read_text()
    assert text.count('| optimized-bfloat16 | optimized-int8 | condconv | odconv |') == 3  # times, memory, stored
    assert '| default | optimized | optimized-bfloat16 | optimized-int8 |\n' in text  # differences


def test_every_mode_has_a_colour_of_its_own():
    assert set(COLOURS) == set(MODES)
    assert len(set(COLOURS.values())) == len(MODES)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float64', 'bfloat16'])
def test_several_batches_in_another_type(dtype, tmp_path, capsys):
    arguments = ['--device', 'cpu', '--dtype', dtype, '--batch', '1', '2', '--modes', 'default']
    arguments += ['--threads', '1', '--cpu-time']
    assert main(['bench', VARIANT, *QUICK, *arguments, '--csv', f'{tmp_path}/r.csv']) == 0
    results = read_csv(tmp_path / 'r.csv')
    assert [(r.batch, r.mode) for r in results] == [(1, 'default'), (2, 'default')]
    machine, out = results[0].machine, capsys.readouterr().out
    assert (machine.dtype, machine.instructions) == (dtype, torch.backends.cpu.get_cpu_capability())
    assert f'{machine.instructions}, CPU time), {dtype}' in out
    if dtype == 'float64':
        assert machine.float32_gemm is None
        assert max(r.difference for r in results if r.mode == 'default') < 1e-9
    else:
        assert ('bfloat16 without instructions for it, ' in out) == (machine.gemm < machine.float32_gemm)


def test_a_type_that_a_device_has_no_instructions_for_is_told_in_every_table(tmp_path):
    case = next(network_cases(VARIANT, ['static'], [(1, (32, 32))], [], False, Settings(CPU, torch.float32)))
    slow = Machine(*('cpu', 'a processor', 1, 'bfloat16', 2e9, 2e10, '2', '1', '0', '3'), 'AVX2', 1e11)
    remark = 'bfloat16 without instructions for it, 50 times slower than float32'
    results = run_case(case, Settings(CPU, torch.float32, rounds=1, max_time=0.0), slow)
    assert f'{remark}\n' in text_table(results)
    assert f'(cpu, 1 thread, AVX2), {remark}; torch 2' in describe([slow])
    assert Machine(*('cuda:0', 'a GPU', 1, 'bfloat16', 9e14, 3e12, '2', '1', '0', '3'), None, 6e13).remark == ''


def test_a_training_step_for_which_memory_does_not_suffice_leaves_the_others(monkeypatch):
    case = next(network_cases(VARIANT, ['static', 'default'], [], [(2, (64, 64))], False, Settings(CPU, torch.float32)))
    run = type(case).run

    def small(self, mode, network, check=False, keep_gradients=False):
        if mode == 'static' and not check:  # Statistics of a step in train mode need memory that the check did not.
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return run(self, mode, network, check, keep_gradients)

    monkeypatch.setattr(type(case), 'run', small)
    said: list[str] = []
    results = run_case(case, Settings(CPU, torch.float32, rounds=1, max_time=0.0), MACHINE, say=said.append)
    assert [r.mode for r in results] == ['default']
    assert 'static is left out: out of memory' in said[0]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@gpu
def test_times_on_a_gpu_are_those_of_the_work_not_of_its_start():
    device = torch.device('cuda')
    x = torch.randn(8192, 8192, device=device)

    def product() -> list[torch.Tensor]:
        return [x @ x]

    product()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    product()
    end.record()
    torch.cuda.synchronize()
    times = alternate({'product': product}, Settings(device, torch.float32, rounds=3, max_time=0.0))['product']
    assert min(times) > 0.5e-3 * start.elapsed_time(end)


@gpu
def test_peak_memory_on_a_gpu():
    device = torch.device('cuda')

    def call() -> list[torch.Tensor]:
        a = torch.empty(64 * MB, dtype=torch.uint8, device=device)
        b = torch.empty(128 * MB, dtype=torch.uint8, device=device)
        del a
        return [b, torch.empty(256 * MB, dtype=torch.uint8, device=device)]

    kept = torch.empty(512 * MB, dtype=torch.uint8, device=device)
    memory, _ = peak_memory(call, device)
    assert memory == pytest.approx((128 + 256) * MB, abs=4 * MB)
    assert kept.numel() == 512 * MB


@gpu
def test_a_gpu_takes_several_batches_in_half_precision(tmp_path):
    files, dtype = ['--csv', f'{tmp_path}/r.csv'], ['--device', 'cuda', '--dtype', 'bfloat16']
    modes = ['--modes', 'static', 'straightforward', 'default', 'optimized', *PEERS]
    assert main(['bench', VARIANT, *QUICK, *dtype, '--batch', '1', '8', '--train', *modes, *files]) == 0
    results = read_csv(Path(tmp_path / 'r.csv'))
    assert len(results) == 2 * 6 + 5
    for r in results:
        assert r.peak_memory > 0
        assert r.machine.device.startswith('cuda')
        assert r.machine.instructions is None


@gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    settings = Settings(torch.device('cuda'), torch.bfloat16)
    case = next(network_cases(VARIANT, ['default'], [], [(2, (64, 64))], False, settings))
    step = partial(case.run, 'default', case.kw)
    step(), step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
