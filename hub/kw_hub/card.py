"""Model cards: what a repository on the Hub says of its weights."""

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from kw_timm.weights.errors import in_one_line
from kw_timm.weights.store import hub_revision

from .errors import HubError
from .manifest import Entry, load_manifest

__all__ = ['check_card', 'model_card']

_METRICS = {
    'top1': ('accuracy', 'Accuracy (top-1)'),
    'top5': ('accuracy', 'Accuracy (top-5)'),
    'box_ap': ('mAP', 'box AP'),
    'mask_ap': ('mAP', 'mask AP'),
}
_TASKS = {
    'classification': ('image-classification', 'Image classification', 'imagenet-1k', 'ImageNet-1k'),
    'detection': ('object-detection', 'Object detection', 'detection-datasets/coco', 'COCO 2017'),
}
_AUTHORS = 'https://github.com/OSVAI/KernelWarehouse'
_CITATION = """```bibtex
@inproceedings{li2024kernelwarehouse,
  title     = {KernelWarehouse: Rethinking the Design of Dynamic Convolution},
  author    = {Li, Chao and Yao, Anbang},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  note      = {arXiv 2406.07879}
}
```"""


def model_card(entry: Entry, repository: str | None = None, revision: str | None = None) -> str:
    """Return the model card of a weight: metadata as the Hub wants it, then text.

    Args:
        entry: A weight of the manifest.
        repository: Where it is published, ``'organisation/name'``; None for where ``pretrained=True`` looks.
        revision: Tag that it is published as; None for the one that ``pretrained=True`` uses.

    Returns:
        Markdown with YAML front matter.
    """
    repository, revision = repository or entry.hub_id, revision or hub_revision()
    text = _detector_text if entry.kind == 'detector' else _network_text
    body = text(entry, repository, revision)
    return f'---\n{_metadata(entry).to_yaml()}\n---\n\n# {entry.repository}\n\n{body}\n\n## Citation\n\n{_CITATION}\n'


def _metadata(entry: Entry) -> ModelCardData:
    is_detector = entry.kind == 'detector'
    pipeline, task, dataset, dataset_name = _TASKS['detection' if is_detector else 'classification']
    results = [
        EvalResult(
            task_type=pipeline,
            task_name=task,
            dataset_type=dataset,
            dataset_name=dataset_name,
            dataset_split='validation',
            metric_type=_METRICS[name][0],
            metric_name=_METRICS[name][1],
            metric_value=value,
            source_name='as published by the authors',
            source_url=_AUTHORS,
        )
        for name, value in entry.metrics.items()
    ]
    tags = ['kernelwarehouse', 'dynamic-convolution'] if entry.kind != 'static' else []
    return ModelCardData(
        model_name=entry.repository,
        library_name='mmdetection' if is_detector else 'timm',
        license=entry.licence,
        pipeline_tag=pipeline,
        datasets=[dataset],
        metrics=sorted({_METRICS[name][0] for name in entry.metrics}),
        tags=[*tags, 'mmdetection'] if is_detector else [*tags, 'timm', 'image-classification'],
        eval_results=results,
    )


def check_card(text: str, entry: Entry, ask_hub: bool = True) -> None:
    """Check a model card before it is published: what can be seen here, then by the Hub's own rules.

    Args:
        text: The card.
        entry: Weight that it is about.
        ask_hub: Ask the Hub too.

    Raises:
        HubError: If it is not as the Hub wants it; the message says why.
    """
    try:
        card = ModelCard(text)  # reads the metadata, results included
        lacking = [key for key in ('license', 'library_name', 'pipeline_tag', 'model_name') if not card.data.get(key)]
        if not card.data.get('eval_results'):
            lacking.append('model-index')
        if lacking:
            raise ValueError(f'its metadata lacks {", ".join(lacking)}')
        code = text.partition('```python\n')[2].partition('```')[0]
        if not code.startswith('import ') or '```' in text.partition('```python\n')[0]:
            raise ValueError('its first line of code is no import')
        compile(code, entry.name, 'exec')
        if ask_hub:
            card.validate(repo_type='model')
    except (ValueError, TypeError, SyntaxError, YAMLError) as error:
        said = in_one_line(error)
        raise HubError(f'The model card of {entry.name} is not published: {said}. Correct kw_hub/card.py.') from error


def _network_text(entry: Entry, repository: str, revision: str) -> str:
    imports, first = 'import timm, torch', ''
    name = f'hf-hub:{repository}@{revision}'
    intro = f"timm's `{entry.network}`, trained by the authors of KernelWarehouse as the network to compare with."
    checkpoint = f'timm://{entry.name}'
    if entry.kind == 'kw':
        imports = 'import kw_timm, timm, torch'
        first = '`import kw_timm` comes first, or timm answers "Unknown model". '
        intro = f'`{entry.network}` is KernelWarehouse in `{entry.baseline}`, as a timm model.'
        checkpoint = f'timm://{entry.network}'
    return f"""```python
{imports}
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('photo.jpg').convert('RGB')).unsqueeze(0)
with torch.no_grad():
    scores, classes = model(image).softmax(1).topk(5)
```

{first}{intro} Weights of the [authors]({_AUTHORS}), converted without changing a bit.

{_figures(entry)}

## With timm

```python
features = timm.create_model('{name}', pretrained=True, features_only=True)
```

With kw-timm installed, `timm.create_model('{entry.network}', pretrained=True)` {_by_name(entry)}

## With MMDetection

```python
custom_imports = dict(imports=['kw_mmdet'], allow_failed_imports=False)
model = dict(backbone=dict(
    _delete_=True, type='KWBackbone', name='{entry.network}',
    init_cfg=dict(type='Pretrained', checkpoint='{checkpoint}')))
```

`known_answer.safetensors` holds an input and this network's answer in float64;
`kw-hub verify {repository}` computes it again."""


def _by_name(entry: Entry) -> str:
    return 'finds them by name.' if entry.kind == 'kw' else "takes timm's own weights instead of these."


def _detector_text(entry: Entry, repository: str, revision: str) -> str:
    return f"""```python
import kw_mmdet
from huggingface_hub import hf_hub_download
from kw_mmdet.predict import Detector, read_image
from kw_mmdet.programs import load_config
from pathlib import Path

checkpoint = hf_hub_download('{repository}', '{entry.file}', revision='{revision}')
detector = Detector(load_config('{entry.name}'), Path(checkpoint))
found = detector(read_image(Path('photo.jpg'))).above(0.3)
for box, score, label in zip(found.boxes, found.scores, found.labels):
    print(detector.names[label], score, box)
```

Mask R-CNN with `{entry.network}` and an FPN, trained on COCO for 12 epochs by the
[authors]({_AUTHORS}) of KernelWarehouse. Their weights under the names of the kw-timm detectors; no bit of a tensor was
changed, the unused ImageNet classifier of the original is kept apart.

{_figures(entry)}

## With MMDetection

By name, with MMDetection 2.x or 3.x:

    kw-mmdet test {entry.name} published --eval bbox segm

Or from a checkout of kw-timm:

    hf download {repository} {entry.file} --revision {revision} --local-dir .
    bash tools/dist_test.sh {entry.config} {entry.file} 8 --eval bbox segm

## With timm

The backbone alone, without classifier:

    kw-hub export {entry.file} --backbone backbone_folder

```python
import kw_timm, timm

features = timm.create_model('local-dir:backbone_folder', pretrained=True, features_only=True)
```"""


def _figures(entry: Entry) -> str:
    """Return a table of this weight and of the network that it is compared with."""
    rows: list[Any] = [entry]
    rows += [
        e
        for e in load_manifest()
        if (e.kind == 'detector') == (entry.kind == 'detector') and e.network == entry.baseline
    ]
    names = [_METRICS[name][1] for name in entry.metrics]
    lines = [f'| network | parameters | {" | ".join(names)} |', '|---|---|' + '---|' * len(names)]
    for row in rows:
        lines.append(f'| `{row.network}` | {row.parameters:,} | {" | ".join(f"{v:g}" for v in row.metrics.values())} |')
    note = f'\n\n{entry.note}' if entry.note else ''
    return '\n'.join(lines) + '\n\nAccuracy as published by the authors.' + note
