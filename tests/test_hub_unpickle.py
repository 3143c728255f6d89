"""Files are unpickled from an allow-list; a payload in one is named and does not run."""

import argparse
import pickle

import numpy as np
import pytest
import torch

from kw_timm.weights.unpickle import RefusedFileError, load_pickled, select_weights


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def poisoned(folder, zipped: bool):
    sign = folder / 'ran'
    file = folder / 'poisoned.pth'
    content = {'model': {'weight': torch.zeros(2)}, 'args': Payload(f'touch {sign}')}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file, sign


@pytest.mark.parametrize('zipped', [True, False])
def test_payload_is_named_and_does_not_run(tmp_path, zipped):
    file, sign = poisoned(tmp_path, zipped)
    with pytest.raises(RefusedFileError, match=r'posix\.system'):
        load_pickled(file)
    assert not sign.exists()
    # The payload is live: without the allow-list it runs.
    torch.load(file, weights_only=False)
    assert sign.exists()


def test_every_way_in_refuses_the_payload(tmp_path):
    import timm
    from kw_hub import convert_file
    from kw_hub.verify import verify_file

    import kw_timm

    file, sign = poisoned(tmp_path, True)
    model = timm.create_model('kw1d4x_resnet18')
    ways = [
        lambda: kw_timm.load_checkpoint(model, file),
        lambda: convert_file(file, output=tmp_path / 'out', quiet=True),
        lambda: verify_file(file),
        lambda: timm.create_model('kw1d4x_resnet18', pretrained=True, pretrained_cfg_overlay={'file': str(file)}),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r'posix\.system'):
            way()
    assert not sign.exists()
    assert not (tmp_path / 'out').exists()


def test_bare_pickle_with_a_payload(tmp_path):
    file = tmp_path / 'bare.pth'
    file.write_bytes(pickle.dumps(Payload(f'touch {tmp_path / "ran"}')))
    with pytest.raises(RefusedFileError):
        load_pickled(file)
    assert not (tmp_path / 'ran').exists()


def test_what_training_and_mmcv_write_is_read(tmp_path):
    meta = {
        'epoch': 12,
        'best_score': np.float64(0.424),
        'best32': np.float32(1.5),
        'count': np.int64(3),
        'flag': np.bool_(True),
        'curve': np.arange(6.0).reshape(2, 3),
        'CLASSES': ('person',),
        'hook_msgs': {'last_ckpt': 'x.pth'},
        'env_info': 'torch',
    }
    content = {
        'meta': meta,
        'state_dict': {'w': torch.ones(2)},
        'args': argparse.Namespace(lr=0.1, betas=(0.9, 0.999), nested=argparse.Namespace(x=None)),
        'optimizer': {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]},
    }
    file = tmp_path / 'checkpoint.pth'
    torch.save(content, file)
    read = load_pickled(file, mmap=True)
    assert read['meta'].keys() == meta.keys()
    assert read['meta']['best_score'] == 0.424
    assert np.array_equal(read['meta']['curve'], meta['curve'])
    assert read['args'] == content['args']
    assert select_weights(read)[1] == 'state_dict'


def test_numpy_1_names_are_read(tmp_path):
    file = tmp_path / 'numpy1.pth'
    torch.save(
        {'state_dict': {'w': torch.ones(1)}, 'meta': {'score': np.float64(0.5)}},
        file,
        _use_new_zipfile_serialization=False,
    )
    data = file.read_bytes()
    assert b'numpy._core.multiarray' in data
    file.write_bytes(data.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n'))
    assert load_pickled(file)['meta']['score'] == 0.5


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'<!DOCTYPE html><html><title>Quota exceeded</title></html>', 'web page'),
        (b'PK\x03\x04' + bytes(100), 'cut off or not a weight file'),
        (b'nonsense' * 50, 'cut off or not a weight file'),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    file = tmp_path / 'file.pth'
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pickled(file)


def test_a_file_that_was_cut_off(reference_file, tmp_path):
    file = tmp_path / 'cut.pth'
    file.write_bytes(reference_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match='cut off'):
        load_pickled(file, mmap=True)


def test_no_tensors(tmp_path):
    with pytest.raises(ValueError, match='no tensors'):
        select_weights({'epoch': 3})
