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
from safetensors.torch import load_file, save

import kw_timm
from kw_timm.weights import to_reference_state_dict

NAME = 'kw1d2x_mobilenetv2_050'


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


def try_files(
    seeds: range, network: torch.nn.Module, folder: Path, capsys: pytest.CaptureFixture[str], commands: tuple[str, ...]
) -> Counter[bool]:
    """Load every file, and give it to commands; return how many were loaded and how many not."""
    state_dict = network.state_dict()
    names = {True: {k: v.clone() for k, v in state_dict.items()}, False: to_reference_state_dict(network)}
    became: Counter[bool] = Counter()
    wrong = []
    for seed in seeds:
        work = folder / str(seed)
        work.mkdir()
        sign, output = work / 'ran', work / 'out'
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            case = damaged_file(seed, names[random.Random(-seed).random() < 0.5], work, sign)
            files = sorted(work.rglob('*'))
            try:
                good = loads(case, network)
                became[good] += 1
                assert good == case.good or case.good is None
                if not case.path.is_dir():
                    if 'verify' in commands:
                        assert runs(['verify', str(case.path)], case, capsys) == good
                    if 'convert' in commands:
                        converted = runs(['convert', str(case.path), '--output', str(output)], case, capsys)
                        # Finite weights of a flipped exponent may have infinite answers.
                        assert converted == good or (good and case.good is None)
                        shutil.rmtree(output, ignore_errors=not converted)
                assert not sign.exists(), 'it ran'
                assert sorted(work.rglob('*')) == files, leftovers(work)
            except BaseException:
                wrong.append(f'{seed}, {case.kind}: {traceback.format_exc(limit=-3)}')
        shutil.rmtree(work)
    assert not wrong, f'{len(wrong)} of {len(seeds)}:\n' + '\n'.join(wrong[:30])
    return became


def test_damaged_files_are_loaded_or_not(tmp_path, capsys):
    small = timm.create_model('kw1x_resnet18', layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), num_classes=10)
    became = try_files(range(90), small, tmp_path, capsys, ())
    assert became[False] > 50
    assert became[True] > 10


def test_damaged_files_are_verified_and_converted(tmp_path, capsys):
    became = try_files(range(200, 206), timm.create_model(NAME), tmp_path, capsys, ('verify', 'convert'))
    assert became[False] > 2


CONFIG, ANSWER = 'config.json', 'known_answer.safetensors'
FOLDERS: dict[str, tuple[str, bytes]] = {
    'record: no JSON': ('weights.json', b'{'),
    'record: a list': ('weights.json', b'[]'),
    'record: of other types': ('weights.json', b'{"file": 3, "size": "x", "sha256": null}'),
    'record: nested': ('weights.json', b'[' * 100_000),
    'config: no JSON': (CONFIG, b'\xff'),
    'config: a list': (CONFIG, b'[1]'),
    'config: empty': (CONFIG, b'{}'),
    'config: unknown': (CONFIG, b'{"architecture": "no_such_network"}'),
    'config: of other types': (CONFIG, b'{"architecture": 3, "num_classes": "x"}'),
    'config: other classes': (CONFIG, b'{"architecture": "kw1d4x_resnet18", "num_classes": 7}'),
    'config: arguments': (CONFIG, b'{"architecture": "kw1d4x_resnet18", "model_args": {"x": 3}}'),
    'answer: cut off': (ANSWER, b'x' * 9),
    'answer: no input': (ANSWER, save({'logits': torch.zeros(2)})),
    'answer: no image': (ANSWER, save({'input': torch.zeros(2), 'logits': torch.zeros(2)})),
    'answer: another': (ANSWER, save({'input': torch.zeros(1, 3, 32, 32), 'x': torch.zeros(2)})),
}


@pytest.mark.parametrize('what', FOLDERS)
def test_damaged_folders(what, stored, capsys):
    name, content = FOLDERS[what]
    (stored / name).write_bytes(content)
    assert not runs(['verify', str(stored)], Damaged(stored / name, what, False), capsys)


def test_a_folder_with_numbers_that_are_none(stored, capsys):
    weights = load_file(stored / 'model.safetensors')
    weights['bn1.weight'][0] = float('nan')
    (stored / 'model.safetensors').write_bytes(save(weights))
    (stored / 'weights.json').unlink()
    assert not runs(['verify', str(stored)], Damaged(stored / 'model.safetensors', 'NaN', False), capsys)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_damaged_files(tmp_path, capsys):
    became = try_files(range(1000, 2000), timm.create_model(NAME), tmp_path, capsys, ('verify', 'convert'))
    assert became[False] > 500
    assert became[True] > 60
