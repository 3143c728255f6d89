"""Where a backbone's weights come from, as OpenMMLab's users write it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm

from kw_timm.pyramid import TIMM
from kw_timm.weights.static import STATIC_NETWORKS
from kw_timm.weights.store import TAG

__all__ = ['WeightsSource', 'weights_source']

KERNELIZE_STATIC = 'KernelizeStatic'
_WEB = ('http://', 'https://')


@dataclass(frozen=True)
class WeightsSource:
    """What :meth:`~kw_timm.pyramid.PyramidFeatures.load_pretrained` takes.

    Attributes:
        weights: File, URL, ``'timm://NAME.TAG'``, or None for timm's own weights of the network.
        prefix: What the backbone's names begin with in a file.
        static: They are a static network's, for :meth:`~kw_timm.pyramid.PyramidFeatures.load_static`.
    """

    weights: str | None
    prefix: str | None = None
    static: bool = False


def weights_source(name: str, pretrained: Any = None, init_cfg: Any = None) -> WeightsSource | None:
    """Return where the weights of a backbone come from, None for nowhere.

    Args:
        name: timm network.
        pretrained: True for timm's own weights; or what ``checkpoint`` is in ``init_cfg``.
        init_cfg: ``dict(type='Pretrained', checkpoint=..., prefix=...)`` or a list with one such entry; or the same of
            type ``'KernelizeStatic'``, for the weights of the static network that a KW one was made of.

    Raises:
        ValueError: If it is of another type, or names weights of another framework or network; the message says what
            to write instead.
    """
    if pretrained and init_cfg:
        raise ValueError('Give pretrained or init_cfg, not both.')
    if init_cfg:
        entry = _pretrained_entry(init_cfg)
        if _type(entry) == KERNELIZE_STATIC:
            return WeightsSource(str(entry['checkpoint']), entry.get('prefix') or None, static=True)
        return WeightsSource(_checkpoint(name, str(entry['checkpoint'])), entry.get('prefix') or None)
    if pretrained:
        return WeightsSource(None if pretrained is True else _checkpoint(name, str(pretrained)))
    return None


def _pretrained_entry(init_cfg: Any) -> Mapping[str, Any]:
    entries = list(init_cfg) if isinstance(init_cfg, Sequence) and not isinstance(init_cfg, str) else [init_cfg]
    entry = entries[0] if len(entries) == 1 else None
    is_known = (
        isinstance(entry, Mapping)
        and _type(entry) in ('Pretrained', 'PretrainedInit', KERNELIZE_STATIC)
        and bool(entry.get('checkpoint'))
        and set(entry) <= {'type', 'checkpoint', 'prefix', 'map_location'}
    )
    if not is_known:
        shown = [dict(e) if isinstance(e, Mapping) else e for e in entries]
        raise ValueError(
            f"init_cfg of KWBackbone must be dict(type='Pretrained', checkpoint=...), or of type "
            f"'{KERNELIZE_STATIC}' for a static network's weights, or None, got "
            f'{shown if len(shown) != 1 else shown[0]!r}. The network initializes itself; there is no other way to '
            f'choose.'
        )
    assert isinstance(entry, Mapping)
    return entry


def _type(entry: Mapping[str, Any]) -> Any:
    return getattr(entry.get('type'), '__name__', entry.get('type'))


def _checkpoint(name: str, checkpoint: str) -> str | None:
    variant = name.partition('.')[0]
    scheme, separator, rest = checkpoint.partition('://')
    if checkpoint.startswith(TIMM):
        if not rest or rest == name:
            return None
        if rest.partition('.')[0] != variant:
            raise ValueError(
                f"init_cfg names the weights of '{rest}', but the backbone is '{name}'. "
                f"Write checkpoint='{TIMM}{name}', or name='{rest}' in the backbone."
            )
        known = timm.list_pretrained(f'{variant}.*')
        if variant in STATIC_NETWORKS:
            known = [*known, f'{variant}.{TAG}']  # the authors' own
        if '.' in rest and known and rest not in known:
            raise ValueError(f"timm has no weights '{rest}'; it has {', '.join(known)}.")
        return checkpoint if '.' in rest else None
    if separator and not checkpoint.startswith(_WEB):
        raise ValueError(
            f"KWBackbone cannot load '{checkpoint}': weights of {scheme}:// are a static network's, in another "
            f"implementation, not those of timm's {name}. Write checkpoint='{TIMM}{name}'"
            f'{_torchvision(variant, scheme)}, or name a weight file.'
        )
    return checkpoint


def _torchvision(variant: str, scheme: str) -> str:
    """Name torchvision's own weights where timm has them."""
    tags = [tag for tag in ('tv_in1k', 'tv2_in1k') if f'{variant}.{tag}' in timm.list_pretrained(f'{variant}.*')]
    return f" (torchvision's own weights are '{TIMM}{variant}.{tags[0]}')" if scheme == 'torchvision' and tags else ''
