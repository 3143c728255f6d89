"""The tables of weights in the README, generated from the manifest."""

from pathlib import Path

from kw_timm.files import new_file, replace_section

from .manifest import Entry, load_manifest

__all__ = ['classification_table', 'detection_table', 'update_file', 'with_tables']

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


def with_tables(file: Path) -> str:
    """Return the text of a Markdown file with its marked tables replaced by the manifest's.

    Raises:
        ValueError: If it cannot be read or has no marks.
    """
    tables = {'classification table': classification_table(), 'detection table': detection_table()}
    return replace_section(file, *((_BEGIN.format(name), _END.format(name), table) for name, table in tables.items()))


def update_file(file: Path) -> bool:
    """Write the manifest's tables into a Markdown file; say whether anything changed."""
    new = with_tables(file)
    if new == file.read_text():
        return False
    with new_file(file) as filling:
        filling.write_text(new)
    return True


def _aps(entry: Entry | None) -> str:
    return f'{entry.metrics["box_ap"]:.1f} / {entry.metrics["mask_ap"]:.1f}' if entry else ''
