"""A page to try KernelWarehouse networks and detectors on images of one's own.

Offered are a detector of one's own, by default that of `make demo`, and the networks and detectors in the local store.

Example:
    python hub/space/app.py --checkpoint epoch_12.pth --config my_config.py
"""

import argparse
import html
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import timm
from PIL import Image
from seeing import ROUNDS, Source, Times, against_mean_image, measure, open_source, read_photo, stored

from kw_timm.inspection import Inspection, verdict
from kw_timm.inspection.pictures import draw_attention, draw_variation
from kw_timm.inspection.text import HEAD, rows, unused_cells

DEMO = 'mask_rcnn_kw1x_mobilenetv2_050_fpn_shapes'
COLUMNS = (0, 3, 4, 5)  # of kw-timm inspect's table, whose last one is drawn beside it
HEAT_MAP = 120  # values along an axis, at most
TITLES = ('coefficients for this image', 'minus those for the mean image')
LARGEST_FILE = '50mb'
ABOUT = """# KernelWarehouse

Networks that make their kernels anew for every image. Choose one, drop an image, and see what it finds, how long it
takes against its static network, and which cells its attention uses for this image.
"""
EMPTY = """
**No weights are here, so these networks have random ones and their answers mean nothing.** `kw-hub fetch
kw1d4x_resnet18` gets weights (`kw-hub list` says of which networks there are some), `make demo` trains a small
detector; then start this page again.
"""
ATTENTION = """## Where the attention looks

Compared with the *mean image*, which is the mean colour of the data set everywhere: kernels that vary by 0 % do not
depend on the image.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known, option = os.environ.get, parser.add_argument
    text = "a detector's, as training writes it; '' for none ($KW_APP_CHECKPOINT, else what `make demo` left)"
    option('--checkpoint', default=known('KW_APP_CHECKPOINT'), metavar='FILE', help=text)
    option(
        '--config',
        default=known('KW_APP_CONFIG') or DEMO,
        help='that it was trained with ($KW_APP_CONFIG, else %(default)s)',
    )
    text = 'offered besides those in the local store; their weights are fetched ($KW_APP_NETWORKS)'
    option('--networks', nargs='+', default=known('KW_APP_NETWORKS', '').split(), metavar='NAME', help=text)
    option('--port', type=int, help='($GRADIO_SERVER_PORT, else the first free one from 7860)')
    options = parser.parse_args(arguments)
    checkpoint = _newest_of_demo() if options.checkpoint is None else options.checkpoint
    if checkpoint and not Path(checkpoint).is_file():
        parser.error(f"there is no checkpoint '{checkpoint}': name a file that exists")
    page = build_page(offered(checkpoint, options.config, options.networks))
    look = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])  # from nowhere else
    how: dict[str, Any] = dict(theme=look, max_file_size=LARGEST_FILE, footer_links=['api'], ssr_mode=False)
    try:
        page.launch(server_port=options.port, **how)
    except OSError as error:
        parser.error(f'the page cannot be served: {error}')


def offered(checkpoint: str, config: str, networks: Sequence[str]) -> list[Source]:
    """Return what can be chosen: a detector, networks by name, what is stored; networks with random weights if none."""
    title = f'{Path(config).stem}, {Path(checkpoint).name}'
    found = [Source(title, checkpoint, config)] if checkpoint else []
    known = {source.title: source for source in [*found, *(Source(name, name) for name in networks), *stored()]}
    return list(known.values()) or [
        Source(f'{name}, random weights: its answers mean nothing', name, random_weights=True)
        for name in timm.list_models('kw*')
    ]


def _newest_of_demo() -> str:
    """Return the checkpoint that `make demo` left in this checkout, or an empty string."""
    try:
        from kw_mmdet.generation import GENERATION
    except ImportError:
        return ''
    run = Path(__file__).resolve().parents[2] / f'work_dirs/shapes{"" if GENERATION == 2 else GENERATION}/run'
    return str(max(run.glob('epoch_*.pth'), key=lambda path: path.stat().st_mtime, default=''))


def build_page(sources: Sequence[Source]) -> gr.Blocks:
    """Return the page."""
    by_title = {source.title: source for source in sources}

    def look(chosen: str, photo: str | None, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        with sentences():
            if photo is None:
                raise ValueError('There is no image yet: drop one, or click to choose a file.')
            upright = read_photo(Path(photo))
            progress(0.1, 'opening the network')
            opened = open_source(by_title[chosen])
            progress(0.3, 'looking')
            x, classes, drawn = opened(upright)
            progress(0.5, 'timing')
            times = measure(opened, x)
            progress(0.7, 'looking into the attention')
            found = against_mean_image(opened.kw, x)
        names = [warehouse.name for warehouse in found.warehouses]
        used_most = max(found.layers, key=lambda layer: layer.kernel_variation).warehouse
        return (
            gr.update(value=classes, visible=classes is not None),
            gr.update(value=drawn, visible=drawn is not None),
            times_in_words(times, 'network' if drawn is None else "detector's backbone"),
            f'{verdict(found)} {unused_cells(found)}',
            figure(draw_variation(found, 'this and the mean image')),
            gr.update(choices=names, value=used_most),
            attention_map(found, used_most),
            [[row[column] for column in COLUMNS] for row in rows(found)],
            found,
        )

    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # It is asked for again when the page is launched.
    with gr.Blocks(title='KernelWarehouse', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(ABOUT + (EMPTY if sources[0].random_weights else ''))
        with gr.Row():
            with gr.Column():
                chosen = gr.Dropdown(list(by_title), label='Network or detector')
                photo = gr.Image(label='Image', type='filepath', sources=['upload', 'clipboard'], height=400)
                # As it was uploaded: gradio's own reading makes of a bad file an error without words.
                photo.preprocess = lambda payload: payload.path if payload else None
                button = gr.Button('Look', variant='primary')
            with gr.Column():
                classes = gr.Label(label='Classes', num_top_classes=5)
                drawn = picture('Boxes and masks', 'drawn', visible=False, show_label=False)
                times = gr.Markdown()
        gr.Markdown(ATTENTION)
        words = gr.Markdown()
        warehouse = gr.Dropdown(label='Warehouse, by default that of the layer whose kernels vary most')
        cells = picture('Which cells its layers use', 'cells')
        with gr.Row():
            variation = picture('How much kernels vary', 'variation')
            table = gr.Dataframe(headers=[HEAD[i] for i in COLUMNS], label='Layers', interactive=False, max_height=1200)
        found = gr.State()
        outputs = [classes, drawn, times, words, variation, warehouse, cells, table, found]
        gr.on([button.click, photo.upload], look, [chosen, photo], outputs, api_name='look')
        warehouse.input(attention_map, [found, warehouse], cells, api_name=False)
    return page


def picture(label: str, name: str, **options: Any) -> gr.Image:
    """Return where a picture is shown, not in a lossy format."""
    how: dict[str, Any] = dict(alt_text=label, elem_id=name, format='png', interactive=False)
    return gr.Image(label=label, buttons=['download', 'fullscreen'], **how, **options)


@contextmanager
def sentences() -> Iterator[None]:
    """Show what went wrong as a sentence on the page."""
    try:
        yield
    except Exception as error:  # Detectors raise whatever they come upon. The terminal gets what is not foreseen, too.
        foreseen, words = isinstance(error, ValueError | OSError | RuntimeError), ' '.join(str(error).split())[:1000]
        if not foreseen or not words:
            words = f'This cannot be done ({type(error).__name__}: {words}): try another image.'
        raise gr.Error(html.escape(words, quote=False), duration=None, print_exception=not foreseen) from error


def times_in_words(times: Times, what: str) -> str:
    """Return a table of times, and where they were measured."""
    static = times.seconds['static']
    lines = [f'| {name} | {1e3 * s:.1f} ms | {s / static:.2f} |' for name, s in times.seconds.items()]
    head = f'| {what} | time | against static |\n|---|---|---|'
    return '\n'.join([head, *lines, f'\nMedian of {ROUNDS} passes each, in turn, this image alone; {times.where}.'])


def attention_map(found: Inspection, name: str) -> Image.Image:
    """Return the picture of which cells a warehouse's layers use."""
    warehouse = next(warehouse for warehouse in found.warehouses if warehouse.name == name)
    return figure(draw_attention(found, warehouse, HEAT_MAP, TITLES))


def figure(drawn: Any) -> Image.Image:
    """Return matplotlib's figure as an image."""
    content = io.BytesIO()
    drawn.savefig(content, format='png')
    return Image.open(content)


if __name__ == '__main__':
    main()
