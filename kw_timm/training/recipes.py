"""The published ImageNet recipes as data, one for each of the 15 KW networks and their five static baselines."""

import difflib
from dataclasses import dataclass, replace

from .published import PUBLISHED

__all__ = ['RECIPES', 'Recipe', 'recipe_of']


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; names and meanings are those of timm's ``train.py``.

    Attributes:
        epochs: Passes over the images.
        opt: Optimizer, timm's name.
        opt_eps: Its epsilon; None for its own.
        momentum: For SGD, which is Nesterov's.
        weight_decay: Constant; none on biases and one-dimensional parameters.
        clip_grad: Norm to clip gradients to.
        lr_base: Learning rate at a global batch of ``lr_base_size`` images; it is proportional to the batch.
        lr_base_size: That batch.
        warmup_epochs: Epochs in which the rate grows linearly from ``warmup_lr``; half a cosine to ``min_lr`` follows.
        warmup_lr: See there.
        min_lr: See there.
        temperature_epochs: Epochs until a KW network's temperature is 0.
        init: How a KW network begins, ``'published'`` or ``'live'``.
        drop: Dropout before the classifier.
        drop_path: Stochastic depth; in ResNets the same for every block, in ConvNeXt growing.
        smoothing: Label smoothing.
        mixup: Its alpha.
        cutmix: Its alpha.
        mixup_prob: Probability that a batch is mixed at all.
        mixup_switch_prob: Probability that it is by CutMix, where both are on.
        mixup_mode: ``'batch'``, ``'pair'`` or ``'elem'``.
        aa: AutoAugment policy, timm's words.
        color_jitter: Its strength, where the policy does not replace it.
        train_interpolation: Of the crops.
        hflip: Probability of flipping.
        reprob: Probability of random erasing.
        remode: What with.
        recount: How many rectangles.
        model_ema: Keep an exponential moving average of the weights, and evaluate that.
        model_ema_decay: Its decay.
    """

    epochs: int = 300
    opt: str = 'adamw'
    opt_eps: float | None = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.05
    clip_grad: float | None = None
    lr_base: float = 4e-3
    lr_base_size: int = 4096
    warmup_epochs: float = 20.0
    warmup_lr: float = 0.0
    min_lr: float = 1e-6
    temperature_epochs: float = 20.0
    init: str = 'published'
    drop: float = 0.0
    drop_path: float = 0.0
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = 'batch'
    aa: str = 'rand-m9-mstd0.5-inc1'
    color_jitter: float = 0.4
    train_interpolation: str = 'bicubic'
    hflip: float = 0.5
    reprob: float = 0.25
    remode: str = 'pixel'
    recount: int = 1
    model_ema: bool = False
    model_ema_decay: float = 0.9999

    def shortened(self, epochs: int) -> 'Recipe':
        """Return it for another number of epochs; warm-up and annealing keep their share of them."""
        share = epochs / self.epochs
        return replace(
            self,
            epochs=epochs,
            warmup_epochs=self.warmup_epochs * share,
            temperature_epochs=self.temperature_epochs * share,
        )


_RESNET = Recipe()
_RESNET50 = replace(_RESNET, drop_path=0.1)
_CONVNEXT = replace(_RESNET, drop_path=0.1, model_ema=True)
_MOBILENET = Recipe(
    epochs=150,
    opt='sgd',
    opt_eps=None,
    weight_decay=4e-5,
    lr_base=0.05,
    lr_base_size=256,
    warmup_epochs=0.0,
    temperature_epochs=15.0,
    smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    aa='',
    color_jitter=0.0,
    train_interpolation='bilinear',
    reprob=0.0,
)
_SMOOTHED = replace(_MOBILENET, smoothing=0.1)

RECIPES: dict[str, Recipe] = {
    'resnet18': _RESNET,
    'kw1d4x_resnet18': replace(_RESNET, mixup=0.0, cutmix=0.0),
    'kw1d2x_resnet18': _RESNET,
    'kw1x_resnet18': _RESNET50,
    'kw2x_resnet18': _RESNET50,
    'kw4x_resnet18': _RESNET50,
    'resnet50': _RESNET50,
    'kw1d2x_resnet50': _RESNET50,
    'kw1x_resnet50': _RESNET50,
    'kw4x_resnet50': _RESNET50,
    'convnext_tiny': _CONVNEXT,
    'kw1x_convnext_tiny': replace(_CONVNEXT, drop_path=0.3),
    **{f'{kind}mobilenetv2_{width}': _MOBILENET for width in ('050', '100') for kind in ('', 'kw1d2x_')},
    **{f'{kind}mobilenetv2_{width}': _SMOOTHED for width in ('050', '100') for kind in ('kw1x_', 'kw4x_')},
}
assert RECIPES.keys() == PUBLISHED.keys()


def recipe_of(network: str, recipe: str | None = None) -> Recipe:
    """Return the recipe of a network, or the one that is asked for.

    Args:
        network: timm's name. One without a published recipe is trained as ``kw1x_resnet18``, or, if it is of the
            MobileNets' kind, as ``kw1x_mobilenetv2_100``.
        recipe: Name of a network whose recipe to take instead.

    Raises:
        ValueError: If there is no such recipe.
    """
    if recipe is None:
        name = network.partition('.')[0]
        small = any(kind in name for kind in ('mobilenet', 'efficientnet'))
        return RECIPES.get(name) or RECIPES['kw1x_mobilenetv2_100' if small else 'kw1x_resnet18']
    if recipe not in RECIPES:
        close = difflib.get_close_matches(recipe, RECIPES, n=3)
        hint = f'did you mean {", ".join(close)}?' if close else f'there are {", ".join(RECIPES)}.'
        raise ValueError(f"There is no recipe '{recipe}'; {hint}")
    return RECIPES[recipe]
