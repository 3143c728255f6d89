"""The data sets that a config names, in the form of either generation of MMDetection.

2.x has ``data.train`` with ``img_prefix`` and ``classes``, 3.x ``train_dataloader.dataset`` with ``data_prefix`` and
``metainfo``. Both wrap data sets in others. Read from plain mappings; no framework is needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ['DataSet', 'data_sets', 'evaluators', 'type_name']

# What a wrapper needs, besides its type.
_WRAPPERS = {
    'ConcatDataset': ('datasets',),
    'RepeatDataset': ('dataset', 'times'),
    'ClassBalancedDataset': ('dataset', 'oversample_thr'),
    'MultiImageMixDataset': ('dataset', 'pipeline'),
}
# What 2.x takes one by one where there are several annotation files.
_LISTED = ('img_prefix', 'seg_prefix', 'proposal_file')


@dataclass(frozen=True)
class DataSet:
    """One data set of a config, without its wrappers.

    Attributes:
        key: Where the config has it, e.g. ``'data.train.dataset'``.
        split: ``'train'``, ``'val'`` or ``'test'``.
        generation: Of MMDetection, 2 or 3, by the form of the config.
        config: Its own part of the config.
    """

    key: str
    split: str
    generation: int
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Name of its class."""
        return type_name(self.config)

    @property
    def is_local(self) -> bool:
        """Whether its files are in the file system."""
        backend = (self.config.get('file_client_args') or self.config.get('backend_args') or {}).get('backend', 'disk')
        names = (self.config.get('ann_file'), self.config.get('data_root'))
        return backend in ('disk', 'local') and not any('://' in str(name) for name in names)

    @property
    def annotations(self) -> Path:
        """Its annotation file."""
        return self._path(self.config.get('ann_file') or '')

    @property
    def images(self) -> Path | None:
        """Folder of its images; None if they are to be found by other means."""
        prefixes = self.config.get('data_prefix') or {}
        prefix = self.config.get('img_prefix') if self.generation == 2 else prefixes.get('img')
        return None if prefix is None and self.generation == 3 else self._path(prefix or '')

    @property
    def classes_key(self) -> str:
        """Where the config names its classes."""
        return f'{self.key}.{"classes" if self.generation == 2 else "metainfo.classes"}'

    @property
    def classes(self) -> Any:
        """What the config names as its classes: a sequence, a file of names, or None."""
        if self.generation == 2:
            return self.config.get('classes')
        return (self.config.get('metainfo') or {}).get('classes')

    @property
    def trains(self) -> bool:
        """Whether a detector is trained with it."""
        return self.split == 'train' and not self.config.get('test_mode', False)

    @property
    def skips_empty(self) -> bool:
        """Whether training leaves images without objects out."""
        if self.generation == 2:
            return bool(self.config.get('filter_empty_gt', True))
        return bool((self.config.get('filter_cfg') or {}).get('filter_empty_gt', False))

    @property
    def loads_masks(self) -> bool:
        """Whether its pipeline loads masks."""
        steps = self.config.get('pipeline') or ()
        return any(isinstance(step, Mapping) and step.get('with_mask', False) for step in steps)

    def _path(self, name: Any) -> Path:
        return Path(self.config.get('data_root') or '', name)


def data_sets(config: Mapping[str, Any], split: str) -> list[DataSet]:
    """Return the data sets that a config uses for a split, taken out of wrappers and lists.

    Args:
        config: Config of MMDetection 2.x or 3.x.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        ValueError: If a wrapper lacks what it needs, or lists do not fit each other.
    """
    loader = config.get(f'{split}_dataloader')
    if isinstance(loader, Mapping):
        return list(_unwrap(loader.get('dataset'), f'{split}_dataloader.dataset', split, 3))
    return list(_unwrap((config.get('data') or {}).get(split), f'data.{split}', split, 2))


def evaluators(config: Mapping[str, Any], split: str) -> list[Mapping[str, Any]]:
    """Return what evaluates a split: metrics as ``metric``, in 3.x the annotation file as ``ann_file``."""
    if split == 'train':
        return []
    if isinstance(config.get(f'{split}_dataloader'), Mapping):
        given = config.get(f'{split}_evaluator') or []
        return [e for e in ([given] if isinstance(given, Mapping) else given) if isinstance(e, Mapping)]
    evaluation = config.get('evaluation')
    return [evaluation] if isinstance(evaluation, Mapping) and split == 'val' else []


def type_name(config: Mapping[str, Any]) -> str:
    """Return the name of the class that a config names by name, scoped or not, or is given itself."""
    kind = config.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def _unwrap(config: Any, key: str, split: str, generation: int) -> Iterator[DataSet]:
    if isinstance(config, list | tuple):
        for i, item in enumerate(config):
            yield from _unwrap(item, f'{key}[{i}]', split, generation)
        return
    if not isinstance(config, Mapping):
        return
    wrapper = type_name(config)
    for needed in _WRAPPERS.get(wrapper, ()):
        if needed not in config:
            raise ValueError(f'{key} is a {wrapper} without {needed}; add {needed}=....')
    inner = next((name for name in ('dataset', 'datasets') if config.get(name) is not None), None)
    if inner is not None:
        members = list(_unwrap(config[inner], f'{key}.{inner}', split, generation))
        whole = config.get('separate_eval', True) is False
        if whole and generation == 2 and any(member.kind == 'CocoDataset' for member in members):
            raise ValueError(f'{key} has separate_eval=False, which MMDetection cannot do for CocoDataset; remove it.')
        yield from members
    elif isinstance(config.get('ann_file'), list | tuple):
        yield from _one_by_one(config, key, split, generation)
    else:
        yield DataSet(key, split, generation, config)


def _one_by_one(config: Mapping[str, Any], key: str, split: str, generation: int) -> Iterator[DataSet]:
    """Yield a data set for each of several annotation files, as 2.x does."""
    files: Sequence[Any] = config['ann_file']
    if generation == 3:
        raise ValueError(
            f'{key}.ann_file names {len(files)} files, but MMDetection 3 takes one. Write '
            f"dict(type='ConcatDataset', datasets=[...]) with a data set for each."
        )
    if config.get('separate_eval', True) is False and type_name(config) == 'CocoDataset':
        raise ValueError(f'{key} has separate_eval=False, which MMDetection cannot do for CocoDataset; remove it.')
    for i, file in enumerate(files):
        single = {name: value for name, value in config.items() if name != 'separate_eval'} | {'ann_file': file}
        for name in _LISTED:
            listed = config.get(name)
            if isinstance(listed, list | tuple):
                if len(listed) < len(files):
                    raise ValueError(
                        f'{key}.{name} has {len(listed)} entries for the {len(files)} annotation files of '
                        f'{key}.ann_file; give one for each, or a single one for all.'
                    )
                single[name] = listed[i]
        yield DataSet(key, split, generation, single)
