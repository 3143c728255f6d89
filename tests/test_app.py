"""The page to try it: the real program on loopback, asked through gradio's client and by a person in a browser.

`make test-app` runs them, in an environment of their own. With KW_APP_SCREENSHOTS they leave docs/app.md's pictures in
that folder; with KW_APP_CHECKPOINT of the demo's detector, which draws better ones than that of the test.
"""

import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from make_shapes import make_shapes
from PIL import Image

pytestmark = pytest.mark.app

ROOT = Path(__file__).parents[1]
CONFIG = 'mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes'
NETWORK = 'kw1d4x_resnet18'
RANDOM = 'kw1x_mobilenetv2_050, random weights: its answers mean nothing'


@dataclass
class Page:
    """The program, running: its address, what it has printed, and who was asked outside of this machine."""

    url: str = ''
    printed: list[str] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)

    def read(self, output: Iterable[str]) -> None:
        """Take what the program prints, until it ends."""
        for line in output:
            self.printed.append(line)
            if found := re.search(r'http://127\.0\.0\.1:\d+', line):
                self.url = found[0]
                self.ready.set()
        self.ready.set()

    def served(self) -> 'Page':
        """Wait until it is there."""
        self.ready.wait(200)
        assert self.url, ''.join(self.printed)
        return self

    def check_quiet(self) -> None:
        assert not self.asked
        assert 'Traceback' not in ''.join(self.printed)


@contextmanager
def outside(page: Page) -> Iterator[str]:
    """A proxy to all the world that only writes down who is asked for."""

    class Asked(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            page.asked.append(self.rfile.readline())

    with socketserver.ThreadingTCPServer(('127.0.0.1', 0), Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}'
        server.shutdown()


@contextmanager
def running(*arguments: object, **variables: str) -> Iterator[Page]:
    if find_spec('gradio') is None:
        pytest.skip('needs the extra app')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    page = Page()
    command = [sys.executable, 'hub/space/app.py', '--port', str(port), *map(str, arguments)]
    with outside(page) as proxy:
        proxies = dict.fromkeys(('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy'), proxy)
        env = os.environ | proxies | {'NO_PROXY': '127.0.0.1,localhost', 'PYTHONUNBUFFERED': '1'} | variables
        env.pop('HF_HUB_OFFLINE', None)  # What is stored is taken without it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            threading.Thread(target=page.read, args=(process.stdout,), daemon=True).start()
            yield page
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope='module')
def shape(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp('drawn') / 'shapes', 1, 3) / 'val/00002.png'


@pytest.fixture(scope='module')
def photo() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), 'sample_data/grace_hopper.jpg')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """The detector of KW_APP_CHECKPOINT, else one that takes every proposal for a circle."""
    if named := os.environ.get('KW_APP_CHECKPOINT'):
        return Path(named)
    from kw_mmdet.generation import untrained_detector
    from kw_mmdet.programs import load_config

    from kw_timm.random_weights import settle

    torch.manual_seed(0)
    detector = untrained_detector(load_config(CONFIG), 'cpu')
    settle(detector.backbone)
    detector.roi_head.bbox_head.fc_cls.bias.data.copy_(torch.tensor([9.0, 0, 0, 0]))
    file = tmp_path_factory.mktemp('run') / 'epoch_1.pth'
    torch.save({'state_dict': detector.state_dict(), 'meta': {'CLASSES': ('circle', 'square', 'triangle')}}, file)
    return file


@pytest.fixture(scope='module')
def pages(request) -> Iterator[tuple[Page, Page]]:
    """With a detector and a network in the store; with nothing at all. The second starts while the detector is made."""
    with running('--checkpoint', '', KW_TIMM_HOME=os.devnull) as empty:
        folder, checkpoint = map(request.getfixturevalue, ('converted_folder', 'checkpoint'))
        with running('--checkpoint', checkpoint, KW_TIMM_HOME=str(folder.parent)) as filled:
            yield filled.served(), empty.served()
    for page in (filled, empty):
        page.check_quiet()


@pytest.fixture
def filled(pages) -> Page:
    return pages[0]


@pytest.fixture
def empty(pages) -> Page:
    return pages[1]


class Client:
    """gradio's own client."""

    def __init__(self, page: Page) -> None:
        from gradio_client import Client, handle_file

        self.client, self.file = Client(page.url, verbose=False, analytics_enabled=False), handle_file

    def titles(self) -> list[str]:
        parameters = self.client.view_api(return_format='dict')['named_endpoints']['/look']['parameters']
        return parameters[0]['type']['enum']

    def look(self, chosen: str, file: Path) -> tuple:
        return self.client.predict(chosen, self.file(str(file)), api_name='/look')

    def refusal(self, chosen: str, file: Path) -> str:
        from gradio_client.exceptions import AppError

        with pytest.raises(AppError) as caught:
            self.look(chosen, file)
        return str(caught.value)


def test_a_network_through_the_client(filled, photo):
    client = Client(filled)
    assert NETWORK in client.titles()
    classes, drawn, times, words, variation, warehouse, cells, table = client.look(NETWORK, photo)
    assert len(classes['value']['confidences']) == 5
    assert not drawn['visible']
    print(times)
    assert re.search(r'\| static \| [\d.]+ ms \| 1\.00 \|\n\| KW \| [\d.]+ ms \| [\d.]+ \|\n\| KW, optimized \|', times)
    assert re.search(r'Median of \d passes each, in turn, this image alone; .+, \d+ thread', times)
    assert 'Kernels vary between images by' in words
    assert warehouse['value'] in [choice[0] for choice in warehouse['choices']]
    for picture in (variation, cells):
        with Image.open(picture) as opened:
            assert opened.format == 'PNG'
            assert min(opened.size) > 300
    assert table['headers'] == ['layer', 'cells', 'effective cells', 'attention varies']
    assert 'layer4.1.conv2' in [row[0] for row in table['data']]


def test_a_detector_through_the_client(filled, shape):
    client = Client(filled)
    classes, drawn, times, *_ = client.look(client.titles()[0], shape)
    assert not classes['visible']
    assert "detector's backbone" in times
    with Image.open(shape) as given, Image.open(drawn['value']) as opened:
        factor = opened.size[0] // given.size[0]
        assert opened.size == tuple(factor * side for side in given.size)
        large = given.convert('RGB').resize(opened.size, Image.Resampling.BICUBIC)
        differ = sum(a != b for a, b in zip(large.getdata(), opened.convert('RGB').getdata(), strict=True))
    assert differ > 1000


def test_bad_files_get_a_sentence_and_the_next_image_is_seen(filled, photo, tmp_path):
    client = Client(filled)
    (tmp_path / 'notes.png').write_text('no image')
    (tmp_path / 'cut.jpg').write_bytes(photo.read_bytes()[:5000])
    assert "'notes.png' is not an image that can be read" in client.refusal(NETWORK, tmp_path / 'notes.png')
    assert "'cut.jpg' is cut off or damaged" in client.refusal(NETWORK, tmp_path / 'cut.jpg')
    assert client.look(NETWORK, photo)[0]['value']


def test_an_image_that_a_detector_cannot_take_gets_a_sentence(tmp_path, checkpoint):
    """OpenCV's error when it is made smaller than a pixel."""
    gradio = pytest.importorskip('gradio', reason='needs the extra app')
    from app import sentences
    from seeing import Source, open_source

    opened = open_source(Source('', str(checkpoint), CONFIG))
    with pytest.raises(gradio.Error, match=r'This cannot be done \(error: OpenCV.*\): try another image'), sentences():
        opened(Image.new('RGB', (10_000, 3)))


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_wrong_checkpoints_get_a_sentence_and_nothing_of_them_is_run(tmp_path):
    gradio = pytest.importorskip('gradio', reason='needs the extra app')
    from app import sentences
    from seeing import Source, open_source

    trap, file = tmp_path / 'was_run', tmp_path / 'epoch_1.pth'
    for content, text in (
        ({'state_dict': {}, 'meta': Harmful(trap)}, 'was refused and nothing of it was run'),
        ({'state_dict': {'backbone.x': torch.zeros(1)}}, 'does not fit the config: it lacks'),
        ({'epoch': 3}, "is not a detector's checkpoint"),
    ):
        torch.save(content, file)
        with pytest.raises(gradio.Error, match=text), sentences():
            open_source(Source('', str(file), CONFIG))
    assert not trap.exists()


def test_a_checkpoint_that_does_not_exist_is_said_at_once(capsys):
    pytest.importorskip('gradio', reason='needs the extra app')
    from app import main

    with pytest.raises(SystemExit) as caught:
        main(['--checkpoint', 'nowhere.pth'])
    assert caught.value.code == 2
    assert "error: there is no checkpoint 'nowhere.pth'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(capsys):
    pytest.importorskip('gradio', reason='needs the extra app')
    from app import main

    with socket.create_server(('127.0.0.1', 0)) as taken, pytest.raises(SystemExit) as caught:
        main(['--checkpoint', '', '--port', str(taken.getsockname()[1])])
    assert caught.value.code == 2
    assert 'error: the page cannot be served' in capsys.readouterr().err


@pytest.fixture(scope='module')
def chromium() -> Iterator[object]:
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None:
        pytest.skip('needs chromium or google-chrome')
    playwright = pytest.importorskip('playwright.sync_api', reason='needs the extra app-test')
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


@contextmanager
def opened(chromium, page: Page) -> Iterator[object]:
    """The page in a browser, as somebody sees it who has just come; all that it loads comes from this machine."""
    tab = chromium.new_page(viewport={'width': 1280, 'height': 900})
    tab.set_default_timeout(60_000)
    asked: set[str] = set()
    wrong: list[str] = []
    tab.on('request', lambda request: asked.add(urlsplit(request.url).netloc))
    tab.on('pageerror', lambda error: wrong.append(str(error)))
    tab.goto(page.url)
    tab.get_by_role('button', name='Look').wait_for()
    yield tab
    assert asked - {'', urlsplit(page.url).netloc} == set()
    assert not wrong
    tab.close()


def shown(tab, name: str) -> str:
    """The address of a picture, once it is drawn."""
    picture = tab.locator(f'#{name} img')
    picture.wait_for()
    tab.wait_for_function('picture => picture.complete && picture.naturalWidth > 100', arg=picture.element_handle())
    return picture.get_attribute('src')


def keep(tab, name: str, folder: Path) -> None:
    """Keep the upper part of the page, in few colours, and look at it."""
    tab.mouse.move(0, 0)
    box = tab.locator('#cells').bounding_box()
    height = box['y'] + box['height'] + 12
    file = Path(os.environ.get('KW_APP_SCREENSHOTS') or folder) / f'app-{name}.png'
    tab.screenshot(path=file, full_page=True, clip={'x': 0, 'y': 0, 'width': 1280, 'height': height})
    with Image.open(file) as whole:
        few = whole.convert('RGB').quantize(96)
    few.save(file, optimize=True)
    assert few.size[0] == 1280
    counts = sorted(count for count, _ in few.getcolors())
    assert counts[-1] < 0.9 * few.size[0] * few.size[1]
    assert len(counts) > 50


def test_boxes_and_masks_in_a_browser(chromium, filled, shape, tmp_path):
    with opened(chromium, filled) as tab:
        tab.locator('input[type=file]').first.set_input_files(shape)
        tab.get_by_text('Median of').wait_for()
        shown(tab, 'drawn')
        shown(tab, 'variation')
        before = shown(tab, 'cells')
        keep(tab, 'detection', tmp_path)
        tab.get_by_label('Warehouse').click()
        tab.get_by_role('option', name='stage6_dw').click()
        tab.wait_for_function(
            'before => document.querySelector("#cells img")?.getAttribute("src") !== before', arg=before
        )
        assert shown(tab, 'cells') != before


def test_classes_in_a_browser_with_nothing_there(chromium, empty, photo, tmp_path):
    with opened(chromium, empty) as tab:
        tab.get_by_text('No weights are here').wait_for()
        tab.get_by_label('Network or detector').click()
        tab.get_by_role('option', name=RANDOM).click()
        tab.locator('input[type=file]').first.set_input_files(photo)
        tab.get_by_text('Median of').wait_for()
        assert re.search(r'\(\d+\)\s+\d+%', tab.locator('.block:has-text("Classes")').last.inner_text())
        shown(tab, 'cells')
        keep(tab, 'classification', tmp_path)


def test_a_bad_file_in_a_browser(chromium, empty, tmp_path, photo):
    (tmp_path / 'notes.png').write_text('no image')
    with opened(chromium, empty) as tab:
        tab.get_by_role('button', name='Look').click()
        tab.get_by_text('There is no image yet').wait_for()
        tab.locator('input[type=file]').first.set_input_files(tmp_path / 'notes.png')
        tab.get_by_text("'notes.png' is not an image that can be read").wait_for()
        assert not tab.get_by_text('Traceback').count()
        assert not tab.get_by_text('Median of').count()
