"""The picture and the table of runs, from files as `kw-timm train` writes them."""

import pytest
import training_curves
from timm.utils.summary import update_summary

from kw_timm.training.command import _write_options


def write_run(folder, top1, lr=None):
    folder.mkdir(parents=True)
    options = dict(opt='sgd', lr=lr, lr_base=0.05, lr_base_size=256, batch_size=32, grad_accum_steps=1, processes=1)
    _write_options(options, folder)
    for epoch, value in enumerate(top1):
        update_summary(epoch, dict(loss=1.0), dict(top1=value), str(folder / 'summary.csv'), write_header=epoch == 0)


def test_table_and_picture(tmp_path, capsys):
    write_run(tmp_path / 'static' / '0', [10, 50, 80, 90])
    write_run(tmp_path / 'static' / '1', [10, 52, 80, 94])
    write_run(tmp_path / 'static' / '2', [10, 20, 30, 40], lr=0.1)
    write_run(tmp_path / 'kw' / '0', [10, 40, 70, 95])
    picture = tmp_path / 'curves.png'
    training_curves.main([str(picture), f'static={tmp_path}/static/*', f'KW={tmp_path}/kw/*'])
    printed = capsys.readouterr().out
    assert '| sgd 0.00625 | static | 51.0 ± 1.4 | 92.0 ± 2.8 | 90.0, 94.0 |' in printed
    assert '| sgd 0.1 | static | 20.0 | 40.0 | 40.0 |' in printed
    assert '| sgd 0.00625 | KW | 40.0 | 95.0 | 95.0 |' in printed
    assert picture.read_bytes()[:4] == b'\x89PNG'


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(SystemExit, match='names no run'):
        training_curves.main([str(tmp_path / 'curves.png'), f'static={tmp_path}/static/*'])
    write_run(tmp_path / 'a', [10, 50])
    write_run(tmp_path / 'b', [10])
    with pytest.raises(SystemExit, match='finish them'):
        training_curves.main([str(tmp_path / 'curves.png'), f'static={tmp_path}/?'])
    assert not (tmp_path / 'curves.png').exists()
