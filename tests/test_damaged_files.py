"""Damaged weight files: loaded, converted and verified, each is an error in one sentence, or harmless."""

import random
import shutil
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from damaged_files import Damaged, damaged_file
from hub_support import leftovers
from kw_hub.cli import main

import kw_timm
from kw_timm.weights import to_reference_state_dict

NAME = 'kw1d2x_mobilenetv2_050'


@pytest.fixture(scope='module')
def network() -> torch.nn.Module:
    return timm.create_model(NAME)


def check_message(message: str, case: Damaged) -> None:
    """One sentence, or a few, on one line, that names the file."""
    assert str(case.path) in message or str(case.path.parent) in message, message
    assert '\n' not in message.strip(), message
    assert 30 < len(message) < 1200, message
    assert message.strip().endswith(('.', "'")), message


def loads(case: Damaged, network: torch.nn.Module) -> bool:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        kw_timm.load_checkpoint(network, case.path)
    except (ValueError, OSError) as error:
        check_message(str(error), case)
        after = network.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items()), 'half of it was loaded'
        return False
    assert all(value.isfinite().all() for value in network.state_dict().values())
    return True


def runs(arguments: list[str], case: Damaged, capsys: pytest.CaptureFixture[str]) -> bool:
    code = main(arguments)
    said = capsys.readouterr().err
    if code == 0:
        return True
    assert code == 1
    assert said.startswith('kw-hub: error: ')
    check_message(said, case)
    return False


def try_files(seeds: range, network: torch.nn.Module, folder: Path, capsys: pytest.CaptureFixture[str], every: int) -> Counter[str]:
    """Load and verify every file, convert every n-th; return what became of them."""
    state_dict = network.state_dict()
    names = {True: {k: v.clone() for k, v in state_dict.items()}, False: to_reference_state_dict(network)}
    became: Counter[str] = Counter()
    wrong = []
    for seed in seeds:
        work = folder / str(seed)
        work.mkdir()
        sign, output = work / 'ran', work / 'out'
        weights = names[random.Random(-seed).random() < 0.5]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            case = damaged_file(seed, weights, work, sign)
            files = sorted(work.rglob('*'))
            try:
                loaded = loads(case, network)
                verified = not case.path.is_dir() and runs(['verify', str(case.path)], case, capsys)
                if seed % every == 0 and runs(['convert', str(case.path), '--output', str(output)], case, capsys):
                    assert verified
                    shutil.rmtree(output)
                assert case.good is None or case.path.is_dir() or loaded == verified == case.good, (loaded, verified)
                assert not sign.exists(), 'it ran'
                assert sorted(work.rglob('*')) == files, leftovers(work)
            except BaseException:
                wrong.append(f'{seed}, {case.kind}: {traceback.format_exc(limit=-3)}')
            became['loaded' if loaded else 'refused'] += 1
        shutil.rmtree(work)
    assert not wrong, f'{len(wrong)} of {len(seeds)}:\n' + '\n'.join(wrong[:30])
    return became


def test_damaged_files(network, tmp_path, capsys):
    became = try_files(range(150), network, tmp_path, capsys, every=10)
    assert became['refused'] > 90
    assert became['loaded'] > 10


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_damaged_files(network, tmp_path, capsys):
    became = try_files(range(1000, 2000), network, tmp_path, capsys, every=1)
    assert became['refused'] > 600
    assert became['loaded'] > 60
