"""`kw-timm train` and `kw-timm validate`, as people run them, with tiny networks."""

import csv
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml

import kw_timm
from kw_timm.cli import main
from kw_timm.training import data
from kw_timm.training.data import GeneratedImages

PLAN = {'mlp': {'layers': ['stages.1.blocks.0.mlp.fc1', 'stages.2.blocks.0.mlp.fc1']}}
NETWORK = ['--model', 'kernelized', '--model-kwargs', 'static=test_convnext', f'plan={PLAN}', 'conv_mlp=True']
EXACT = ['--model-dtype', 'float64', '--img-size', '32', '--workers', '0', '--device', 'cpu']
SHORT = [*NETWORK, *EXACT, '--generated', '32', '--batch-size', '8', '--epochs', '3', '--temperature-epochs', '2']


def train(output: Path, *options: str) -> int:
    return main(['train', *SHORT, '--output', str(output), *options])


def last(output: Path) -> dict:
    return torch.load(output / 'last.pth.tar', weights_only=True)


def summary(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / 'summary.csv').read_text().splitlines()))


def assert_same_run(found: dict, expected: dict) -> None:
    """Weights, averages, momenta, figures and random numbers are the same to the last bit."""
    for entry in ('state_dict', 'state_dict_ema'):
        assert (entry in found) == (entry in expected)
        for key, value in expected.get(entry, {}).items():
            assert torch.equal(found[entry][key], value), key
    for number, values in expected['optimizer']['state'].items():
        for key, value in values.items():
            assert torch.equal(found['optimizer']['state'][number][key], value), (number, key)
    assert found['run'] == expected['run']
    assert torch.equal(found['random'][0]['torch'], expected['random'][0]['torch'])


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    output = tmp_path_factory.mktemp('whole') / 'run'
    assert train(output, '--model-ema', '--model-ema-decay', '0.5') == 0
    return output


def test_what_a_run_leaves(whole):
    rows = summary(whole)
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    assert [float(row['train_temperature']) for row in rows] == [0.5, 0, 0]
    state = last(whole)
    assert state['epoch'] == 2
    assert state['state_dict']['warehouses.training_passes'] == 12
    options = yaml.safe_load((whole / 'args.yaml').read_text())
    assert options['epochs'] == 3
    assert options['model'] == 'kernelized'
    assert options['mixup'] == 0.8
    net = timm.create_model('kernelized', static='test_convnext', plan=PLAN, conv_mlp=True, num_classes=10)
    kw_timm.load_checkpoint(net, whole / 'model_best.pth.tar', use_ema=False)
    assert sorted(file.name for file in whole.iterdir() if file.is_file()) == sorted(
        ['args.yaml', 'last.pth.tar', 'model_best.pth.tar', 'summary.csv']
    )


@pytest.mark.parametrize(
    'image', [20, pytest.param(33, marks=pytest.mark.slow), pytest.param(64 + 8 + 3, marks=pytest.mark.slow)]
)
def test_interrupted_and_resumed(whole, tmp_path, monkeypatch, capsys, image):
    """By Ctrl-C within the first epoch's second half, at its evaluation, or within the second epoch."""
    calls, get = 0, GeneratedImages.__getitem__

    def interrupting(self: GeneratedImages, index: int):
        nonlocal calls
        calls += 1
        if calls == image:
            signal.raise_signal(signal.SIGINT)
        return get(self, index)

    monkeypatch.setattr(GeneratedImages, '__getitem__', interrupting)
    ema = ('--model-ema', '--model-ema-decay', '0.5')
    assert train(tmp_path / 'run', *ema) == 130
    assert 'go on from there with --resume' in capsys.readouterr().err
    assert last(tmp_path / 'run')['run']['step'] < 12
    assert train(tmp_path / 'run', *ema) == 2
    assert 'holds a run already' in capsys.readouterr().err
    assert train(tmp_path / 'run', *ema, '--resume') == 0
    assert_same_run(last(tmp_path / 'run'), last(whole))


@pytest.mark.slow
@pytest.mark.parametrize('workers', ['0', '2'])
def test_killed_three_times(tmp_path, workers):
    """SIGKILL at random points: the same weights as never killed, whatever was being written."""
    options = ['--recovery-interval', '1', '--workers', workers, '--generated', '64', '--grad-accum-steps', '2']
    options += ['--epochs', '6']
    assert train(tmp_path / 'whole', *options) == 0
    command = [sys.executable, '-m', 'kw_timm', 'train', *SHORT, '--output', str(tmp_path / 'run'), *options]
    draw, kills = random.Random(0), 0
    while kills < 3:
        resuming = ['--resume'] if (tmp_path / 'run/last.pth.tar').exists() else []
        process = subprocess.Popen([*command, *resuming], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = _modified(tmp_path / 'run/last.pth.tar')
        while _modified(tmp_path / 'run/last.pth.tar') == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.random() / 2)
        assert process.poll() is None, 'it was ready too early'
        kills += 1
        process.kill()
        process.wait()
    assert train(tmp_path / 'run', *options, '--resume') == 0
    assert_same_run(last(tmp_path / 'run'), last(tmp_path / 'whole'))


@pytest.mark.slow
@pytest.mark.parametrize('asked', [signal.SIGTERM, signal.SIGINT])
def test_a_whole_group_of_processes_is_asked_to_stop(tmp_path, asked):
    """As Ctrl-C, `timeout` and job schedulers do it: workers hear it, too."""
    options = ['--workers', '2', '--generated', '64', '--epochs', '50', '--temperature-epochs', '2']
    command = [sys.executable, '-m', 'kw_timm', 'train', *SHORT, '--output', str(tmp_path / 'run'), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / 'run/last.pth.tar').exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, asked)
    text = process.communicate(timeout=100)[1]
    assert process.returncode == 130, text
    assert 'Traceback' not in text
    assert 'go on from there with --resume' in text
    done = last(tmp_path / 'run')['run']
    command[command.index('50')] = str(done['epoch'] + 2)
    assert subprocess.run([*command, '--resume'], capture_output=True, timeout=200).returncode == 0
    assert last(tmp_path / 'run')['run']['epoch'] == done['epoch'] + 2


@pytest.mark.slow
def test_a_worker_that_is_killed_while_the_network_computes(tmp_path, capsys, monkeypatch):
    """torch raises the error wherever the process is."""
    convolve = torch.nn.functional.conv2d

    def killing(*arguments, **options):
        if (tmp_path / 'run/last.pth.tar').exists():
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(1)
        return convolve(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, 'conv2d', killing)
    assert train(tmp_path / 'run', '--workers', '1') == 2
    text = capsys.readouterr().err
    assert 'DataLoader worker' in text, text
    assert 'go on from there with --resume' in text
    assert last(tmp_path / 'run')['run']['epoch'] == 1


def _modified(file: Path) -> float:
    return file.stat().st_mtime_ns if file.exists() else 0


def two_processes(output: Path, *options: str) -> list[subprocess.Popen]:
    """Start what torchrun starts."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, '-m', 'kw_timm', 'train', *SHORT, *options, '--output', str(output)]
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': '2'}
    return [
        subprocess.Popen(
            command, env={**env, 'RANK': rank, 'LOCAL_RANK': rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in '01'
    ]


def finish(started: list[subprocess.Popen], code: int = 0) -> list[str]:
    said = [process.communicate(timeout=280)[0].decode() for process in started]
    assert [process.returncode for process in started] == [code, code], said
    return said


@pytest.mark.slow
def test_two_processes_resume(tmp_path):
    """Asked to stop, of which the other process learns, and started again: as never stopped, dropout and all."""
    options = ('--drop', '0.2', '--drop-path', '0.1', '--generated', '64', '--batch-size', '4')
    finish(two_processes(tmp_path / 'whole', *options))
    started = two_processes(tmp_path / 'run', *options, '--recovery-interval', '1')
    while not (tmp_path / 'run/last.pth.tar').exists() and started[0].poll() is None:
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    assert 'Stopped in epoch' in finish(started, 130)[0]
    assert 0 < last(tmp_path / 'run')['run']['step'] < 24
    finish(two_processes(tmp_path / 'run', *options, '--resume'))
    assert_same_run(last(tmp_path / 'run'), last(tmp_path / 'whole'))


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Two gloo processes take the steps of one with the joined batch, temperature, learning rate and all."""
    plain = ['--no-aug', '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--hflip', '0', '--drop-path', '0']
    options = [
        *plain,
        '--generated',
        '16',
        '--epochs',
        '4',
        '--lr',
        '0.01',
        '--opt',
        'sgd',
        '--temperature-epochs',
        '6',
    ]
    assert train(tmp_path / 'one', *options, '--batch-size', '16') == 0
    finish(two_processes(tmp_path / 'two', *options))
    one, two = last(tmp_path / 'one'), last(tmp_path / 'two')
    assert len(two['random']) == 2
    for key, value in one['state_dict'].items():
        torch.testing.assert_close(two['state_dict'][key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert two['run']['loss'] == pytest.approx(one['run']['loss'], rel=1e-12)
    assert two['run']['best'] == one['run']['best']


def test_diverging(tmp_path, capsys):
    assert train(tmp_path / 'run', '--lr', '1e200', '--opt', 'sgd') == 2
    assert 'The loss became' in (text := capsys.readouterr().err)
    assert 'Nothing was saved yet' in text
    assert not (tmp_path / 'run/last.pth.tar').exists()


def folder_of_images(root: Path, count: int = 8) -> Path:
    made = GeneratedImages(4 * count)
    for split in ('train', 'val'):
        for i in range(count):
            image, target = made[i]
            file = root / split / f'class{target % 2}' / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return root


def test_images_that_cannot_be_read(tmp_path, capsys, caplog):
    """One is left out, and named; where all are, the run ends and nothing is lost."""
    root = folder_of_images(tmp_path / 'data')
    broken = root / 'train/class0/0.png'
    broken.write_bytes(broken.read_bytes()[:100])
    options = (str(root), '--batch-size', '4', '--epochs', '1')
    assert train(tmp_path / 'run', *options) == 0
    assert any('0.png' in message or 'Skipped' in message for message in caplog.messages)
    assert last(tmp_path / 'run')['state_dict']['head.fc.weight'].shape[0] == 2
    for file in root.glob('train/*/*.png'):
        file.write_bytes(b'no image')
    assert train(tmp_path / 'run', *options[:-2], '--epochs', '2', '--resume') == 2
    text = capsys.readouterr().err
    assert 'The images can no longer be read: Failed to load 10 consecutive samples.' in text
    assert 'go on from there with --resume' in text
    assert last(tmp_path / 'run')['run']['epoch'] == 1


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path, capsys, monkeypatch):
    get = GeneratedImages.__getitem__

    def dying(self: GeneratedImages, index: int):
        if torch.utils.data.get_worker_info() is not None and self.offset == 0 and index == 5 and epoch(tmp_path) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    monkeypatch.setattr(GeneratedImages, '__getitem__', dying)
    assert train(tmp_path / 'run', '--workers', '1') == 2
    text = capsys.readouterr().err
    assert 'DataLoader worker' in text, text
    assert 'fewer --workers' in text
    assert 'go on from there with --resume' in text
    monkeypatch.undo()
    assert train(tmp_path / 'run', '--workers', '1', '--resume') == 0
    assert epoch(tmp_path) == 3


def epoch(folder: Path) -> int:
    file = folder / 'run/last.pth.tar'
    return torch.load(file, weights_only=True)['run']['epoch'] if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        ['--amp', '--channels-last', '--grad-checkpointing', '--model-dtype', 'float32', '--clip-grad', '1'],
        ['--torchcompile', 'aot_eager', '--grad-accum-steps', '3'],
        ['--recipe', 'kw1d2x_mobilenetv2_050', '--init', 'live', '--model-ema'],
        ['--torchcompile', 'aot_eager', '--amp', '--amp-dtype', 'float16', '--model-dtype', 'float32', '--model-ema'],
    ],
)
def test_options_go_together(tmp_path, options):
    assert train(tmp_path / 'run', *options, '--lr', '1e-3') == 0
    assert last(tmp_path / 'run')['state_dict']['warehouses.training_passes'] == 12


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """While a run goes on it tries again; at its end it says so. What was saved before stays whole."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluated = 0
    evaluate = data.batches

    def filling(loader):
        nonlocal evaluated
        evaluated += 1
        if evaluated == 2:  # The second epoch's.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        return evaluate(loader)

    monkeypatch.setattr('kw_timm.training.loop.batches', filling)
    try:
        assert train(tmp_path / 'run') == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    assert 'could not be saved' in err
    assert 'go on from there with --resume' in err
    assert 'Training goes on and tries again' in out + err
    assert last(tmp_path / 'run')['run']['epoch'] == 1
    assert not list((tmp_path / 'run').glob('*incomplete*'))
    assert train(tmp_path / 'run', '--resume') == 0
    assert last(tmp_path / 'run')['run']['epoch'] == 3


def test_fine_tuning_with_other_classes_and_attention_as_it_is(whole, tmp_path):
    root = folder_of_images(tmp_path / 'data')
    start = ('--initial-checkpoint', str(whole / 'model_best.pth.tar'), '--attention', 'frozen')
    assert train(tmp_path / 'run', str(root), '--batch-size', '4', '--epochs', '1', '--lr', '0.1', *start) == 0
    begun = torch.load(whole / 'model_best.pth.tar', weights_only=True)['state_dict_ema']
    found = last(tmp_path / 'run')['state_dict']
    same = {key for key, value in found.items() if key in begun and torch.equal(value, begun[key])}
    assert {key for key in found if '.attention.' in key} <= same
    assert not any(key.startswith(('warehouses.mlp', 'head.fc')) for key in same)


def test_tar_files(tmp_path, capsys):
    root = folder_of_images(tmp_path / 'data')
    (tmp_path / 'tar').mkdir()
    for split in ('train', 'validation'):
        with tarfile.open(tmp_path / f'tar/{split}.tar', 'w') as tar:
            tar.add(root / split[: 3 if split == 'validation' else 5], arcname='.')
    options = ('--batch-size', '4', '--epochs', '1')
    assert train(tmp_path / 'run', str(tmp_path / 'tar'), *options) == 0
    assert train(tmp_path / 'folder', str(root), *options) == 0
    assert_same_run(last(tmp_path / 'run'), last(tmp_path / 'folder'))
    assert train(tmp_path / 'other', str(tmp_path / 'tar/train.tar')) == 2
    assert "must be a folder with 'train' in it" in capsys.readouterr().err


def test_a_config(tmp_path, capsys):
    config = tmp_path / 'run.yaml'
    config.write_text('opt: sgd\nlr: 1e-2\nepochs: 1\nmixup: 0\ncutmix: 0.0\nbatch-size: 4\n')
    assert (
        main(['train', *NETWORK, *EXACT, '--generated', '8', '-c', str(config), '--output', str(tmp_path / 'run')]) == 0
    )
    options = last(tmp_path / 'run')['options']
    assert [options[key] for key in ('opt', 'lr', 'epochs', 'batch_size')] == ['sgd', 0.01, 1, 4]
    for text, message in (
        ('epoch: 3', 'did you mean epochs?'),
        ('epochs: many', 'expected a int'),
        ('[1, 2]', "'name: value' lines"),
    ):
        config.write_text(text)
        assert main(['train', *NETWORK, '-c', str(config)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--model', 'kw1x_resnet19'], 'Did you mean'),
        (['--recipe', 'kw1x_resnet34'], 'There is no recipe'),
        (['--batch-size', '7'], 'even --batch-size'),
        (['--batch-size', '64'], 'fewer than a batch: give --batch-size 32'),
        (['--num-classes', '3'], 'The data has 10 classes, the network 3'),
        (['/nowhere'], 'cannot be read'),
        (['--resume'], 'There is no checkpoint'),
        (['--lr=-1'], '--lr must be 0 or more'),
        (['--pretrained', '--pretrained-static', 'x'], 'begins in one way'),
        (['--warmup-epochs', '5'], '--warmup-epochs 5 must be fewer than --epochs 3'),
    ],
)
def test_what_cannot_be_trained(tmp_path, capsys, options, message):
    assert train(tmp_path / 'run', *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_validating(whole, capsys, tmp_path):
    options = ['--checkpoint', str(whole / 'model_best.pth.tar'), '--img-size', '32', '--generated', '32', '-j', '0']
    found = {}
    for more in ((), ('--precision', 'float64'), ('--precision', 'bfloat16'), ('--optimized',)):
        assert main(['validate', *NETWORK, '--device', 'cpu', '-b', '8', *options, *more]) == 0
        found[more] = capsys.readouterr().out.splitlines()[1].split()
    trained = max(float(row['eval_top1']) for row in summary(whole))
    assert {figures[1] for figures in found.values()} == {f'{trained:.2f}'}
    assert main(['validate', '--all', '-j', '0', '--generated', '8', '--img-size', '32', '--device', 'cpu']) == 1
    captured = capsys.readouterr()
    assert captured.err.count('left out: kw') == 15
    assert captured.out.startswith('network')
