"""The command `kw-timm bench`: what it measures, writes, and says when something is wrong."""

import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from kw_timm.benchmark import Case, Settings, cases, network_cases, read_csv, run_all, run_case, session
from kw_timm.benchmark.cases import static_name
from kw_timm.benchmark.measure import (
    alternate,
    gemm_speed,
    peak_memory,
    quartiles,
    read_bandwidth,
    relative_difference,
    uncertainty,
)
from kw_timm.benchmark.report import BEGIN, END
from kw_timm.benchmark.results import Machine, Result, bound
from kw_timm.benchmark.session import image_size
from kw_timm.cli import main

CPU = torch.device('cpu')
VARIANT = 'kw1x_mobilenetv2_050'
MACHINE = Machine('cpu', 'a processor', 1, 'float32', 1e11, 2e10, torch.__version__, timm.__version__, '0', '3')
QUICK = ['--size', '32', '--repeats', '1', '--min-time', '0', '--max-time', '0', '--device', 'cpu']
ONCE = Settings(CPU, torch.float32, rounds=1, max_time=0.0)
MB = 2**20
WORK = SimpleNamespace(flops=1.0, bytes=1.0)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Limits of the machine are not measured anew by every test."""
    monkeypatch.setattr(session, 'measure_machine', lambda settings: MACHINE)


@pytest.fixture(scope='module')
def measured(tmp_path_factory) -> Path:
    """A folder with the files of one run."""
    folder = tmp_path_factory.mktemp('bench')
    (folder / 'README.md').write_text(f'before\n{BEGIN}\nold\n{END}\nafter\n')
    files = ['--csv', f'{folder}/r.csv', '--plot', f'{folder}/r.png', '--readme', f'{folder}/README.md']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, 'measure_machine', lambda settings: MACHINE)
        arguments = ['bench', VARIANT, '--batch', '1', '2', *QUICK, '--train', '--train-batch', '2']
        assert main([*arguments, '--train-size', '64', *files]) == 0
    return folder


def result(**changes: object) -> Result:
    known = Result(
        *(VARIANT, 'inference', 1, 32, 32, 'default'),
        **dict(seconds=0.3, first_quartile=0.2, third_quartile=0.4, rounds=3, speedup=2.0, over_static=3.0),
        **dict(peak_memory=10, difference=1e-6, bound=0.15, over_bound=2.0, mixing_flops=1.0, mixing_bytes=1.0),
        **dict(preparation=0.1, stored_bytes=1000, machine=MACHINE, command='kw-timm bench x'),
    )
    return replace(known, **changes)


def test_every_mode_of_every_configuration_is_measured(measured):
    results = read_csv(measured / 'r.csv')
    found = {(r.task, r.batch, r.height): [] for r in results}
    for r in results:
        found[r.task, r.batch, r.height].append(r.mode)
    modes = ['static', 'straightforward', 'default', 'optimized']
    assert found == {('inference', 1, 32): modes, ('inference', 2, 32): modes, ('training step', 2, 64): modes[:3]}
    for r in results:
        assert 0 < r.first_quartile <= r.seconds <= r.third_quartile
        assert r.peak_memory > 0
        assert r.machine == MACHINE
        assert r.command.startswith(f'kw-timm bench {VARIANT} --batch 1 2 --size 32')
        if r.mode != 'static':
            assert r.difference <= (0.05 if r.task == 'training step' else 1e-3)


def test_ratios_and_bound_are_those_of_the_run(measured):
    for batch in (1, 2):
        own = {r.mode: r for r in read_csv(measured / 'r.csv') if (r.task, r.batch) == ('inference', batch)}
        for mode, r in own.items():
            assert r.speedup == pytest.approx(own['straightforward'].seconds / r.seconds)
            assert r.over_static == pytest.approx(r.seconds / own['static'].seconds)
            mixing = max(r.mixing_flops / MACHINE.gemm, r.mixing_bytes / MACHINE.bandwidth)
            assert r.bound == pytest.approx(own['static'].seconds + mixing)
            assert mode == 'static' or r.over_bound == pytest.approx(r.seconds / r.bound)


@pytest.mark.slow
def test_other_runtimes_are_modes(tmp_path, monkeypatch):
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    pytest.importorskip('onnxruntime')
    pytest.importorskip('openvino')
    (tmp_path / 'README.md').write_text(f'{BEGIN}\n{END}\n')
    modes = ['default', 'onnxruntime', 'openvino']
    files = ['--csv', f'{tmp_path}/r.csv', '--readme', f'{tmp_path}/README.md', '--plot', f'{tmp_path}/r.png']
    arguments = ['--batch', '2', '--train', '--train-batch', '2', '--train-size', '64', '--modes', *modes]
    assert main(['bench', VARIANT, *QUICK, *arguments, '--features-only', *files]) == 0
    results = read_csv(tmp_path / 'r.csv')
    assert [r.mode for r in results] == [*modes, 'default']  # no runtime takes a training step
    own, *others = results[:3]
    network = timm.create_model(VARIANT, features_only=True)
    assert own.stored_bytes == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    for r in others:
        assert r.peak_memory is None
        assert r.difference < 1e-3
        assert 0.5 < r.stored_bytes / own.stored_bytes < 3
    text = (tmp_path / 'README.md').read_text()
    assert text.count('| onnxruntime | openvino |') == 3  # times, memory, what is stored
    assert not list((tmp_path / 'temporary').glob('kw-timm-*'))


def test_readme_and_plot(measured):
    text = (measured / 'README.md').read_text()
    assert text.startswith('before\n')
    assert text.endswith(f'{END}\nafter\n')
    assert 'old' not in text
    for part in (
        f'    kw-timm bench {VARIANT} --batch 1 2',
        f'torch {torch.__version__}',
        '20.0 GB/s',
        '| optimized |',
    ):
        assert part in text
    assert (measured / 'r.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(path.name for path in measured.iterdir()) == ['README.md', 'r.csv', 'r.png']


def test_earlier_results_are_shown_without_measuring(measured, tmp_path, capsys):
    other = tmp_path / 'other.csv'
    session.write_csv(other, [result(task='backbone')])
    readme = tmp_path / 'notes.md'
    readme.write_text(f'{BEGIN}\n{END}\n')
    files = ['--plot', str(tmp_path / 'all.svg'), '--readme', str(readme), '--csv', str(tmp_path / 'all.csv')]
    assert main(['bench', '--from-csv', str(measured / 'r.csv'), str(other), *files]) == 0
    out = capsys.readouterr().out
    assert f'{VARIANT}, training step, batch 2, 64 x 64' in out
    assert f'{VARIANT}, backbone, batch 1, 32 x 32' in out
    assert '    kw-timm bench x\n    kw-timm bench --from-csv' in readme.read_text()
    assert read_csv(tmp_path / 'all.csv') == [*read_csv(measured / 'r.csv'), result(task='backbone')]
    assert '<svg' in (tmp_path / 'all.svg').read_text()


def test_result_files_keep_their_columns(tmp_path):
    file = tmp_path / 'earlier.csv'
    file.write_text(
        'variant,task,batch,height,width,mode,seconds,first_quartile,third_quartile,rounds,speedup,over_static,'
        'peak_memory,difference,bound,over_bound,mixing_flops,mixing_bytes,preparation,command,device,device_name,'
        'threads,dtype,gemm,bandwidth,torch,timm,kw_timm,python\n'
        'kw1x_resnet50,training step,8,160,160,static,1.03,1.01,1.06,3,3.8,1.0,366000000,,,,,,0.1,'
        'kw-timm bench kw1x_resnet50 --train,cpu,AMD EPYC,2,float32,1.9e11,4e10,2.14.1,1.0.31,0.1.0,3.11.7\n'
    )
    (found,) = read_csv(file)
    assert (found.variant, found.rounds, found.peak_memory, found.bound) == ('kw1x_resnet50', 3, 366_000_000, None)
    assert found.uncertainty == pytest.approx(1.57 * 0.05 / 3**0.5 / 1.03)
    assert (found.machine.device_name, found.machine.threads, found.machine.gemm) == ('AMD EPYC', 2, 1.9e11)
    session.write_csv(tmp_path / 'again.csv', [found])
    again = (tmp_path / 'again.csv').read_text().splitlines()[0]
    assert re.sub(',(stored_bytes|instructions|float32_gemm|clock)', '', again) == file.read_text().splitlines()[0]
    assert read_csv(tmp_path / 'again.csv') == [found]
    file.write_text(file.read_text().replace(',1.03,', ',fast,'))
    with pytest.raises(ValueError, match=r"earlier.csv' cannot be read: could not convert .*'fast'"):
        read_csv(file)


def test_features_of_both_networks_have_the_same_shapes(capsys):
    assert main(['bench', VARIANT, *QUICK, '--features-only', '--modes', 'static', 'default']) == 0
    assert f'{VARIANT}, features, batch 1, 32 x 32' in capsys.readouterr().out


def test_static_counterparts():
    for variant in timm.list_models('kw*'):
        assert timm.is_model(static_name(variant))


def test_networks_are_lively():
    case = next(network_cases(VARIANT, ['default'], [(3, (64, 64))], [], False, ONCE))
    (outputs,) = case.run('default', case.kw)
    assert outputs.isfinite().all()
    assert outputs.std(0).mean() > 1e-3


def test_bound():
    assert bound(1.0, flops=6e9, moved=1e9, gemm=2e9, bandwidth=1e9) == 4.0
    assert bound(1.0, flops=2e9, moved=5e9, gemm=2e9, bandwidth=1e9) == 6.0


def test_peak_memory_of_a_known_pattern():
    def call() -> list[torch.Tensor]:
        a = torch.empty(1 * MB, dtype=torch.uint8)
        b = torch.empty(2 * MB, dtype=torch.uint8)
        del a
        c = torch.empty(4 * MB, dtype=torch.uint8)  # 6 MB: the peak
        del b
        return [c, torch.empty(1 * MB, dtype=torch.uint8)]

    memory, returned = peak_memory(call, CPU)
    assert memory == pytest.approx(6 * MB, abs=1024)
    assert [tensor.numel() for tensor in returned] == [4 * MB, 1 * MB]
    # Results of an earlier call may be released during the next; that is not memory gained.
    kept: list[list[torch.Tensor]] = []

    def keep() -> list[torch.Tensor]:
        kept[:] = [call()]
        return kept[0]

    keep()
    assert peak_memory(keep, CPU)[0] >= 6 * MB


def test_peak_memory_of_training_leaves_gradients_out():
    linear = torch.nn.Linear(512, 1024, bias=False)  # 2 MB of weights
    x = torch.ones(1, 512)
    case = Case('x', 'x', 1, (1, 1), linear, linear, lambda net: net(x).sum(), ['default'], training=True)
    assert len(case.run('default', linear)) == 2
    held, _ = peak_memory(partial(case.run, 'default', linear, keep_gradients=True), CPU)
    # One gradient on its way to where it is added, and the small rest.
    assert held == pytest.approx(2 * MB, rel=0.05)
    (result,) = run_case(case, ONCE, MACHINE)
    assert result.peak_memory == pytest.approx(2 * MB, rel=0.05)


def test_alternation_gives_every_mode_its_turn():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name) or []) for name in 'abc'}
    times = alternate(calls, replace(ONCE, rounds=3))
    assert order == list('abc' + 'bca' + 'cab')
    assert {name: len(own) for name, own in times.items()} == dict.fromkeys('abc', 3)
    assert len(alternate(calls, replace(ONCE, min_time=0.001))['a']) > 1
    assert alternate({}, ONCE) == {}


def test_rounds_are_spent_where_times_spread(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr('kw_timm.benchmark.measure.time.perf_counter', lambda: clock[0])

    def rounds(*seconds: float, **limits: float) -> int:
        """Rounds of a call that takes these times in turn, beside one that always takes a second."""
        turn = iter(seconds * 100)

        def call(own: Callable[[], float]) -> list[torch.Tensor]:
            clock[0] += own()
            return []

        calls = {'a': partial(call, lambda: next(turn)), 'b': partial(call, lambda: 1.0)}
        return len(alternate(calls, Settings(CPU, torch.float32, **{'rounds': 3, 'max_time': 100.0, **limits}))['a'])

    assert rounds(1.0) == 3
    assert rounds(1.0, min_time=9.0) == 5
    assert 3 < rounds(1.0, 1.1) < rounds(1.0, 1.2) < 50
    assert rounds(1.0, 1.1, precision=0.2) == 3
    assert rounds(1.0, 9.0) == 18  # 108 s; 98 s before
    assert rounds(1.0, 9.0, max_time=1.0) == 3


def test_time_of_the_cpu_is_what_was_computed():
    calls = {'asleep': lambda: time.sleep(0.05) or [], 'awake': lambda: [torch.ones(300, 300) @ torch.ones(300, 300)]}
    passed, computed = (alternate(calls, replace(ONCE, rounds=3, cpu_time=cpu_time)) for cpu_time in (False, True))
    assert min(passed['asleep']) > 0.04
    assert max(computed['asleep']) < 0.02
    assert min(computed['awake']) > 0


def test_uncertainty_of_a_median():
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == [2.0, 3.0, 4.0]
    assert quartiles([3.0]) == [3.0, 3.0, 3.0]
    assert uncertainty(16, 2.0, 3.0, 4.0) == pytest.approx(1.57 * 2 / 4 / 3)
    assert uncertainty(1, 3.0, 3.0, 3.0) == float('inf')
    # McGill et al. chose between 1.386 and 1.96 standard deviations of the median, for normal values.
    generator = torch.Generator().manual_seed(0)
    samples = 100 + torch.randn(2000, 15, generator=generator).double()
    notch = torch.tensor([uncertainty(15, *quartiles(times)) for times in samples.tolist()]).mean() * 100
    deviation = samples.quantile(0.5, dim=1).std()
    assert 1.386 < notch / deviation < 1.96


def test_relative_difference():
    ones, large = torch.ones(2), torch.tensor([100.0, 0.0])
    assert relative_difference([ones, large + 1], [ones, large]) == pytest.approx(0.01)
    assert relative_difference([ones * 2, large], [ones, large]) == pytest.approx(1.0)
    assert relative_difference([ones * 2, large], [ones, large], jointly=True) == pytest.approx(0.01)
    with pytest.raises(ValueError, match='shapes'):
        relative_difference([ones], [torch.ones(3)])


def test_limits_of_this_machine():
    assert gemm_speed(ONCE) > 1e8
    assert read_bandwidth(ONCE, 2**24) > 1e8


def test_sizes():
    assert image_size(['224']) == (224, 224)
    assert image_size(['800x1333']) == image_size(['800', '1333']) == (800, 1333)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['kw4x_resnet5'], 'no KW network .*Did you mean kw4x_resnet50'),
        (['zzz'], 'There are: kw'),
        ([], 'at least one variant'),
        ([VARIANT, '--from-csv', 'x.csv'], 'not both'),
        ([VARIANT, '--size', '0'], 'not a size in pixels'),
        ([VARIANT, '--size', '1x2x3'], 'not a size in pixels'),
        ([VARIANT, '--train', '--train-batch', '1'], 'needs 2 images'),
        ([VARIANT, '--device', 'cuda:99'], r'--device cuda:99: .* sees \d+ GPUs here; --device cpu measures'),
        ([VARIANT, '--modes', 'optimized-int8', '--dtype', 'bfloat16'], 'optimized-int8 is measured in float32.*leave'),
        ([VARIANT, '--device', 'abacus'], "expected 'cpu', 'cuda'"),
        ([VARIANT, '--modes', 'openvino', '--dtype', 'float64'], 'openvino is measured on the CPU in float32; leave'),
        ([VARIANT, '--cpu-time', '--device', 'cpu'], 'time of one thread on the CPU; add --threads 1'),
        ([VARIANT, '--csv', 'no/such/r.csv'], 'no folder'),
        ([VARIANT, '--plot', 'r.txt'], r"'r.txt' must end in one of: .*\.png"),
        ([VARIANT, '--readme', 'unmarked.md'], "'unmarked.md': .*no line '<!-- benchmark"),
        ([VARIANT, '--readme', 'missing.md'], "'missing.md' cannot be read"),
        (['--from-csv', 'missing.csv'], "'missing.csv' cannot be read"),
        (['--from-csv', 'unmarked.md'], 'not a result file.*has no column'),
    ],
)
def test_what_the_user_can_set_right(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('unmarked.md').write_text('nothing here\n')
    assert main(['bench', *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('kw-timm: error: ')
    assert error.count('\n') == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    'option',
    ['--batch=0', '--batch=x', '--repeats=-1', '--min-time=-1', '--max-time=nan', '--precision=x', '--modes=fast'],
)
def test_numbers_that_argparse_refuses(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['bench', VARIANT, option])
    assert stopped.value.code == 2
    assert option.partition('=')[0] in capsys.readouterr().err


def tiny_case(name: str, forward: Callable[[torch.nn.Module], torch.Tensor], *modes: str) -> Case:
    network = torch.nn.Identity()
    return Case(name, 'inference', 1, (1, 1), network, network, forward, modes or ['static', 'default'])


def test_interruption_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cases, 'mixing_work', lambda network, batch: WORK)

    def interrupted():
        yield tiny_case('first', lambda net: torch.ones(1))
        raise KeyboardInterrupt

    file = tmp_path / 'r.csv'
    assert run_all(interrupted(), 2, ONCE, Namespace(csv=file, plot=None, readme=None), 'command') == 130
    assert [(r.variant, r.mode) for r in read_csv(file)] == [('first', 'static'), ('first', 'default')]
    assert f"what was measured is in '{file}'" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_a_mode_that_cannot_be_measured_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(cases, 'mixing_work', lambda network, batch: WORK)
    monkeypatch.setattr(cases, 'optimization_report', lambda network: 'optimized')
    static, kw, optimized = (torch.nn.Identity() for _ in range(3))
    monkeypatch.setattr(cases, 'optimize_for_inference', lambda network, **_: optimized)
    order = []

    def forward(network):
        order.append(network)
        if network is static:
            raise torch.OutOfMemoryError('out of memory')
        if network is optimized:
            return torch.zeros(1)
        return torch.full((1,), 1.0 if len(order) == 1 else float('inf'))  # straightforward, then default

    case = Case('x', 'inference', 1, (1, 1), kw, static, forward, ['static', 'default', 'optimized'])
    said: list[str] = []
    results = run_case(case, ONCE, MACHINE, say=said.append)
    assert [r.mode for r in results] == ['optimized']
    assert results[0].difference == 1
    assert results[0].bound is None
    assert [text.partition(', batch 1, 1 x 1: ')[2][:28] for text in said[:3]] == [
        'static is left out: out of m',
        'default is left out: its res',
        'warning: optimized differs f',
    ]
    order.clear()
    assert run_all([case], 1, ONCE, Namespace(csv=None, plot=None, readme=None), 'command') == 1
    assert 'static is left out' in capsys.readouterr().out


def test_a_network_that_memory_does_not_suffice_to_make(monkeypatch):
    monkeypatch.setattr(cases, 'mixing_work', lambda network, batch: WORK)

    def too_large(network, **_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(cases, 'optimize_for_inference', too_large)
    case = tiny_case('x', lambda net: torch.ones(1), 'default', 'optimized')
    assert [r.mode for r in run_case(case, ONCE, MACHINE)] == ['default']


def test_other_errors_are_not_hidden():
    def broken(net):
        raise RuntimeError('a bug')

    with pytest.raises(RuntimeError, match='a bug'):
        run_case(tiny_case('x', broken), ONCE, MACHINE)


def test_module_runs_and_importing_the_package_stays_light():
    code = (
        'import runpy, sys, kw_timm; assert not {"matplotlib", "kw_timm.benchmark"} & set(sys.modules); '
        'sys.argv = ["kw-timm", "bench", "--help"]; runpy.run_module("kw_timm", run_name="__main__")'
    )
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert '--memory-budget' in shown.stdout
