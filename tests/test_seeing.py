"""What the page to try it shows, without the page: images of every kind, bad files, attention, the Space's files."""

import io
import tomllib
from pathlib import Path

import numpy as np
import pytest
import seeing
import timm
import torch
from huggingface_hub import SpaceCard
from networks import lively
from packaging.requirements import Requirement
from PIL import Image
from seeing import MOST_PIXELS, Classifier, Detector, Source, against_mean_image, read_photo
from torch import nn

from kw_timm import WarehousePlan, kernelize
from kw_timm.layers import KWLayer

ROOT = Path(__file__).parents[1]
SPACE = ROOT / 'hub/space'
RAMP = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)


def test_requirements_of_the_space_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    lines = (SPACE / 'requirements.txt').read_text().splitlines()
    assert [line for line in lines if not line.startswith('#')] == extras['app']
    card = SpaceCard.load(SPACE / 'README.md').data
    assert (card.sdk, card.app_file, card.license) == ('gradio', 'app.py', 'apache-2.0')
    assert Requirement(extras['app'][0]).specifier.contains(card.sdk_version)


def photo_of(mode: str) -> tuple[Image.Image, np.ndarray]:
    """An image of a mode, and the colours that it shows."""
    grey = {'L': RAMP, '1': RAMP > 127, 'I;16': RAMP.astype(np.uint16) * 257, 'I': RAMP.astype(np.int32) * 257}
    if mode in grey:
        image = Image.fromarray(grey[mode])
        assert image.mode == mode
        return image, np.stack([(RAMP > 127) * 255 if mode == '1' else RAMP] * 3, -1)
    image = Image.fromarray(COLOURS)
    if mode == 'P':
        return image.quantize(64), np.asarray(image.quantize(64).convert('RGB'))
    return image.convert(mode), np.stack([np.asarray(image.convert('L'))] * 3, -1) if mode == 'LA' else COLOURS


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'L', 'LA', '1', 'CMYK', 'I;16', 'I'])
def test_images_of_every_kind_become_colours_of_8_bits(mode, tmp_path):
    image, expected = photo_of(mode)
    file = tmp_path / ('photo.tif' if mode in ('CMYK', 'I') else 'photo.png')
    image.save(file)
    photo = read_photo(file)
    assert photo.mode == 'RGB'
    assert np.array_equal(np.asarray(photo), expected)


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(COLOURS).save(tmp_path / 'turned.png', exif=exif)
    photo = read_photo(tmp_path / 'turned.png')
    assert np.array_equal(np.asarray(photo), np.rot90(COLOURS, -1))


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('notes.png', 'is not an image that can be read'),
        ('empty.jpg', 'is not an image that can be read'),
        ('cut.png', 'is cut off or damaged'),
        ('cut.jpg', 'is cut off or damaged'),
        ('large.png', '8000 x 8000 pixels, more than the 50 million'),
        ('bomb.png', 'far too many pixels'),
    ],
)
def test_bad_files_get_a_sentence(name, text, tmp_path):
    file, content = tmp_path / name, io.BytesIO()
    if name in ('large.png', 'bomb.png'):
        side = 8000 if name == 'large.png' else 15000
        assert side**2 > MOST_PIXELS
        Image.new('1', (side, side)).save(file)
    else:
        Image.fromarray(COLOURS).save(content, file.suffix[1:].replace('jpg', 'jpeg'))
        whole = {'notes.png': b'no image', 'empty.jpg': b''}.get(name, content.getvalue())
        file.write_bytes(whole[: len(whole) // 2] if name.startswith('cut') else whole)
    with pytest.raises(ValueError, match=text) as caught:
        read_photo(file)
    assert name in str(caught.value)


def test_attention_against_the_mean_image_is_that_of_a_direct_computation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    kernelize(net, {'first': WarehousePlan(['0']), 'shared': WarehousePlan(['2', '4'])})
    lively(net)
    x, given = torch.randn(1, 3, 16, 16), {}
    for name, layer in net.named_children():
        if isinstance(layer, KWLayer):
            layer.attention.register_forward_hook(lambda _, __, c, name=name: given.setdefault(name, []).append(c[0]))
    with torch.no_grad():
        net(x), net(torch.zeros_like(x))
    expected = {name: list(passes) for name, passes in given.items()}
    found = against_mean_image(net, x)
    assert [layer.name for layer in found.layers] == list(expected) == ['0', '2', '4']
    for layer in found.layers:
        image, mean = expected[layer.name]
        torch.testing.assert_close(layer.mean, image)
        torch.testing.assert_close(layer.spread, image - mean, atol=1e-6, rtol=1e-4)
        assert layer.kernel_variation > 1e-3
    largest = torch.cat([expected['2'][0], expected['4'][0]]).abs().amax(0)
    torch.testing.assert_close(found.warehouses[1].largest, largest)


@pytest.mark.usefixtures('stored')
def test_what_is_stored_is_offered_and_classified():
    (source,) = seeing.stored()
    assert source == Source('kw1d4x_resnet18', 'kw1d4x_resnet18')
    x, classes, drawn = Classifier(source)(Image.fromarray(COLOURS))
    assert drawn is None
    net = timm.create_model('kw1d4x_resnet18', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    with torch.no_grad():
        assert torch.equal(x, transform(Image.fromarray(COLOURS))[None])
        values, indices = net(x).softmax(-1)[0].topk(5)
    assert list(classes.values()) == values.tolist()
    assert [name.rpartition('(')[2] for name in classes] == [f'{index})' for index in indices.tolist()]


def test_with_an_empty_store_nothing_is_offered():
    assert seeing.stored() == []


def test_detectors_without_a_kw_backbone_get_a_sentence(tmp_path):
    pytest.importorskip('mmdet', reason='needs MMDetection')
    config = tmp_path / 'static.py'
    config.write_text("model = dict(type='MaskRCNN', backbone=dict(type='ResNet', depth=50))")
    with pytest.raises(ValueError, match='has no KW backbone'):
        Detector(Source('', 'none.pth', str(config)))
    with pytest.raises(FileNotFoundError, match='There is no config'):
        Detector(Source('', 'none.pth', 'mask_rcnn_r50_fpn_1x_coco'))
