"""Module names of the reference's weight files and of timm, family by family.

The reference names ResNet and MobileNetV2 as torchvision does and ConvNeXt as its authors do.
"""

from functools import lru_cache

__all__ = ['FAMILIES', 'rename', 'timm_names']

FAMILIES = ('resnet', 'mobilenetv2', 'convnext')

_MOBILENETV2_REPEATS = (1, 2, 3, 4, 3, 3, 1)
_CONVNEXT_DEPTHS = (3, 3, 9, 3)
_CLASSIFIERS = ('classifier', 'classifier.1', 'classifier.1.conv')


@lru_cache
def timm_names(family: str, classifier: str | None = None) -> dict[str, str]:
    """Return the table ``{reference module name: timm module name}``; names that agree are left out.

    No name of timm's is one of the reference's for something else, so that :func:`rename` leaves timm's as they are.

    Args:
        family: ``'resnet'``, ``'mobilenetv2'`` or ``'convnext'``; ``'timm'`` for networks that the reference lacks.
        classifier: The reference's name of MobileNetV2's classifier: ``'classifier'`` in KW 1x and 4x,
            ``'classifier.1'`` in the static network, ``'classifier.1.conv'`` in KW 1/2x. None for all of them, which
            serves in this direction only.

    Returns:
        The table, shared and not to be changed.

    Raises:
        ValueError: If the family is unknown.
    """
    if family in ('resnet', 'timm'):
        return {}
    if family == 'mobilenetv2':
        return _mobilenetv2_names(_CLASSIFIERS if classifier is None else (classifier,))
    if family == 'convnext':
        return _convnext_names()
    raise ValueError(f"Unknown family '{family}', expected one of {', '.join(FAMILIES)}.")


def rename(key: str, names: dict[str, str]) -> str:
    """Replace the longest module name that ``key`` starts with by its counterpart in ``names``."""
    parts = key.split('.')
    for length in range(len(parts), 0, -1):
        found = names.get('.'.join(parts[:length]))
        if found is not None:
            return '.'.join((found, *parts[length:]))
    return key


def _mobilenetv2_names(classifiers: tuple[str, ...]) -> dict[str, str]:
    names = {'features.0.0': 'conv_stem', 'features.0.1': 'bn1', 'features.18.0': 'conv_head', 'features.18.1': 'bn2'}
    separable = {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2'}
    residual = {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3'}
    position = 1
    for s, repeats in enumerate(_MOBILENETV2_REPEATS):
        for i in range(repeats):
            for part, timm_part in (separable if s == 0 else residual).items():
                names[f'features.{position}.conv.{part}'] = f'blocks.{s}.{i}.{timm_part}'
            position += 1
    return names | {name: 'classifier' for name in classifiers if name != 'classifier'}


def _convnext_names() -> dict[str, str]:
    # The whole key: `head` is the name of timm's module too, which holds norm and classifier.
    names = {f'head.{leaf}': f'head.fc.{leaf}' for leaf in ('weight', 'bias')}
    names |= {'downsample_layers.0': 'stem', 'norm': 'head.norm'}
    names |= {f'downsample_layers.{s}': f'stages.{s}.downsample' for s in range(1, len(_CONVNEXT_DEPTHS))}
    parts = {'dwconv': 'conv_dw', 'norm': 'norm', 'pwconv1': 'mlp.fc1', 'pwconv2': 'mlp.fc2', 'gamma': 'gamma'}
    for s, depth in enumerate(_CONVNEXT_DEPTHS):
        for i in range(depth):
            for part, timm_part in parts.items():
                names[f'stages.{s}.{i}.{part}'] = f'stages.{s}.blocks.{i}.{timm_part}'
    return names
