"""The tables of weights in the README, generated from the manifest."""

from pathlib import Path

from .errors import HubError
from .manifest import Entry, load_manifest

__all__ = ['classification_table', 'detection_table', 'insert_tables']

_BEGIN = '<!-- {}: generated from hub/kw_hub/manifest.json by `kw-hub tables README.md` -->'
_END = '<!-- end of {} -->'
_BACKBONES = {'resnet50': 'ResNet-50', 'mobilenetv2_100': 'MobileNetV2 1.0', 'convnext_tiny': 'ConvNeXt-Tiny'}


def classification_table() -> str:
    """Return the table of KW networks, next to their static networks."""
    entries = load_manifest()
    static = {entry.network: entry.metrics['top1'] for entry in entries if entry.kind == 'static'}
    lines = ['| name | parameters | top-1 | top-5 | static network, top-1 |', '|---|---|---|---|---|']
    lines += [
        f'| `{e.network}` | {e.parameters:,} | {e.metrics["top1"]:.2f} | {e.metrics["top5"]:.2f} '
        f'| {static[e.baseline or ""]:.2f} |'
        for e in entries
        if e.kind == 'kw'
    ]
    return '\n'.join(lines)


def detection_table() -> str:
    """Return the table of Mask R-CNN detectors, a backbone family a line."""
    by_network = {entry.network: entry for entry in load_manifest() if entry.kind == 'detector'}
    lines = ['| backbone | static | KW 1x | KW 4x |', '|---|---|---|---|']
    for network, title in _BACKBONES.items():
        cells = (_aps(by_network.get(f'{prefix}{network}')) for prefix in ('', 'kw1x_', 'kw4x_'))
        lines.append(f'| {title} | {" | ".join(cells)} |')
    notes = [f'{entry.network}: {entry.note}' for entry in by_network.values() if entry.note]
    return '\n'.join([*lines, *(f'\n{note}' for note in notes)])


def insert_tables(text: str) -> str:
    """Return a Markdown text with its marked tables replaced by the manifest's.

    Raises:
        HubError: If the text has no marks.
    """
    for name, table in (('classification table', classification_table()), ('detection table', detection_table())):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise HubError(f"The text has no '{begin}' with an '{end}' after it.")
        text = f'{before}{begin}\n{table}\n{end}{after}'
    return text


def update_file(file: Path) -> bool:
    """Write the manifest's tables into a Markdown file; say whether anything changed."""
    old = file.read_text()
    new = insert_tables(old)
    if new != old:
        file.write_text(new)
    return new != old


def _aps(entry: Entry | None) -> str:
    return f'{entry.metrics["box_ap"]:.1f} / {entry.metrics["mask_ap"]:.1f}' if entry else ''
