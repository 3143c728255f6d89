"""Checks of configs: what MMDetection copes with passes, what fails late or silently is stopped with one sentence."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmdet', reason='needs MMDetection')
import mmdet
from kw_mmdet import check_config, check_neck

POLYGON = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0]]
COCO_FORMS = (2, 3)


def annotation(number: int = 1, **changes: Any) -> dict[str, Any]:
    """An annotation that MMDetection reads; None as a value takes a field out."""
    whole = dict(id=number, image_id=1, category_id=1, bbox=[10, 10, 40, 40], area=1600, iscrowd=0)
    whole |= dict(segmentation=POLYGON) | changes
    return {key: value for key, value in whole.items() if value is not None}


@pytest.fixture
def coco(tmp_path):
    """Writes an annotation file and its images; returns its path."""
    (tmp_path / 'images').mkdir()

    def write(*annotations: dict[str, Any], name: str = 'a.json', classes: Any = ('cat', 'dog'), **changes: Any) -> str:
        images = [dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in (1, 2)]
        categories = [dict(id=3 * i + 1, name=name) for i, name in enumerate(classes)]
        content = dict(images=images, annotations=list(annotations), categories=categories) | changes
        for image in images:
            save_image(tmp_path / 'images' / image['file_name'])
        (tmp_path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return str(tmp_path / name)

    return write


def save_image(path: Path) -> None:
    from PIL import Image

    Image.new('RGB', (64, 64)).save(path)


def detector(num_classes: Any = 2, masks: bool = True) -> dict[str, Any]:
    heads = dict(bbox_head=dict(num_classes=num_classes))
    return dict(backbone=dict(type='ResNet'), roi_head=heads | (dict(mask_head=dict(num_classes=2)) if masks else {}))


def dataset(form: int, file: Any, classes: Any = ('cat', 'dog'), **changes: Any) -> dict[str, Any]:
    """A data set's config in the form of either generation; images beside the file."""
    folder = str(Path(file if isinstance(file, str) else file[0]).parent / 'images')
    if form == 2:
        named = dict(img_prefix=folder) | ({} if classes is None else dict(classes=classes))
    else:
        named = dict(data_prefix=dict(img=folder)) | ({} if classes is None else dict(metainfo=dict(classes=classes)))
    return dict(type='CocoDataset', ann_file=file) | named | changes


def config(form: int, given: Any, split: str = 'train', model: Any = None, **changes: Any) -> dict[str, Any]:
    model = model or detector()
    if form == 2:
        return dict(model=model, data={split: given}, evaluation=dict(metric=['bbox', 'segm'])) | changes
    evaluator = dict(type='CocoMetric', metric=['bbox', 'segm'])
    if isinstance(given, dict) and isinstance(given.get('ann_file'), str):
        evaluator['ann_file'] = given['ann_file']
    return {'model': model, f'{split}_dataloader': dict(dataset=given), f'{split}_evaluator': evaluator} | changes


@pytest.mark.parametrize('form', COCO_FORMS)
@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('wrap', ['plain', 'repeat', 'concat', 'balanced', 'mixed', 'list'])
def test_wrapped_data_sets_are_found(coco, form, split, wrap):
    def wrapped(inner: dict[str, Any]) -> Any:
        return {
            'plain': inner,
            'repeat': dict(type='RepeatDataset', times=3, dataset=inner),
            'concat': dict(type='ConcatDataset', datasets=[inner, inner]),
            'balanced': dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=inner),
            'mixed': dict(type='RepeatDataset', times=2, dataset=dict(type='MultiImageMixDataset', dataset=inner)),
            'list': [inner, dict(type='RepeatDataset', times=2, dataset=inner)],
        }[wrap]

    good, bad = (wrapped(dataset(form, coco(annotation()), names)) for names in (('cat', 'dog'), ('cat', 'cow')))
    if wrap == 'mixed':
        with pytest.raises(ValueError, match='MultiImageMixDataset without pipeline'):
            check_config(config(form, good, split), (split,))
        good['dataset']['pipeline'] = bad['dataset']['pipeline'] = []
    check_config(config(form, good, split), (split,))
    with pytest.raises(ValueError, match='no class named cow; it has cat, dog'):
        check_config(config(form, bad, split), (split,))


def test_several_annotation_files(coco):
    files = [coco(annotation(), name='a.json'), coco(annotation(), name='b.json')]
    folder = str(Path(files[0]).parent / 'images')
    check_config(config(2, dataset(2, files)), ('train',))
    check_config(config(2, dataset(2, files, img_prefix=[folder, folder])), ('train',))
    with pytest.raises(ValueError, match='img_prefix has 1 entries for the 2 annotation files'):
        check_config(config(2, dataset(2, files, img_prefix=[folder])), ('train',))
    with pytest.raises(FileNotFoundError, match=r'c\.json'):
        check_config(config(2, dataset(2, [files[0], 'c.json'])), ('train',))
    with pytest.raises(ValueError, match='separate_eval=False'):
        check_config(config(2, dataset(2, files, separate_eval=False), 'val'), ('val',))
    with pytest.raises(ValueError, match=r'MMDetection 3 takes one.*ConcatDataset'):
        check_config(config(3, dataset(3, files)), ('train',))


@pytest.mark.parametrize('form', COCO_FORMS)
def test_paths_are_joined_as_mmdetection_joins_them(coco, form, tmp_path, monkeypatch):
    coco(annotation())
    relative = dataset(form, 'a.json', data_root=str(tmp_path))
    key = 'img_prefix' if form == 2 else 'data_prefix'
    relative[key] = 'images' if form == 2 else dict(img='images/')
    check_config(config(form, relative), ('train',))
    monkeypatch.chdir(tmp_path.parent)
    check_config(config(form, relative | dict(data_root=tmp_path.name)), ('train',))
    with pytest.raises(FileNotFoundError, match=r"no image '.*nowhere/1.png' \(2 of 2 that were looked for"):
        check_config(config(form, relative | {key: 'nowhere' if form == 2 else dict(img='nowhere')}), ('train',))
    check_config(config(form, dataset(form, 's3://bucket/a.json')), ('train',))


@pytest.mark.parametrize('form', COCO_FORMS)
def test_classes_as_people_write_them(coco, form, tmp_path):
    file = coco(annotation())
    names = tmp_path / 'names.txt'
    names.write_text('cat\ndog\n')
    for classes in (('cat', 'dog'), ['cat', 'dog'], str(names)):
        check_config(config(form, dataset(form, file, classes)), ('train',))
    one = coco(annotation(), name='one.json', classes=('cat',))
    check_config(config(form, dataset(form, one, ('cat',)), model=detector(1, masks=False)), ('train',))
    for classes, message in (
        ('cat', r"'cat' is a lone string, no tuple.*\('cat',\)"),
        (('cat', 'cat'), "'cat' twice"),
        ({'cat': 1, 'dog': 2}, 'must be a tuple or list of names'),
        (('dog', 'cat'), r'order of the categories .*\(cat, dog\).*names would be exchanged'),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(config(form, dataset(form, file, classes), 'val'), ('val',))
    with pytest.raises(ValueError, match=r"val.* names no classes, so COCO's 80 .*num_classes=2.*mask_head"):
        check_config(config(form, dataset(form, file, None), 'val'), ('val',))
    model = detector(80)
    model['roi_head']['mask_head']['num_classes'] = 80
    with pytest.raises(ValueError, match=r"names no classes, so COCO's 80 .* has cat, dog"):
        check_config(config(form, dataset(form, file, None), model=model), ('train',))


@pytest.mark.parametrize('form', COCO_FORMS)
def test_every_head_must_have_the_classes(coco, form):
    file = coco(annotation())
    cascade = detector()
    cascade['roi_head']['bbox_head'] = [dict(num_classes=2), dict(num_classes=3), dict(num_classes=2)]
    one_stage = dict(backbone=dict(type='ResNet'), bbox_head=dict(type='ATSSHead', num_classes=2))
    agnostic = detector()
    agnostic['roi_head']['bbox_head']['reg_class_agnostic'] = True
    others = detector() | dict(rpn_head=dict(num_classes=1), semantic_head=dict(num_classes=183))
    for model in (one_stage, agnostic, others):
        check_config(config(form, dataset(form, file), model=model), ('train',))
    with pytest.raises(
        ValueError, match=r'bbox_head\[1\]\.num_classes=3\. Set num_classes=2 in model.roi_head.bbox_he'
    ):
        check_config(config(form, dataset(form, file), model=cascade), ('train',))
    wrong = detector()
    wrong['roi_head']['mask_head']['num_classes'] = 80
    with pytest.raises(
        ValueError, match=r'has 2 classes, but the model has model\.roi_head\.mask_head\.num_classes=80\.'
    ):
        check_config(config(form, dataset(form, file), model=wrong), ('train',))


RLE = dict(size=[64, 64], counts=[0, 5, 4091])
COPES = {
    'rle': [annotation(segmentation=RLE)],
    'no iscrowd': [annotation(iscrowd=None)],
    'crowd': [annotation(), annotation(2, iscrowd=1, segmentation=RLE)],
    'unknown category': [annotation(), annotation(2, category_id=99)],
    'no object in one image': [annotation(image_id=2)],
    'nothing left of an empty one': [annotation(), annotation(2, area=0, segmentation=[])],
}
FAILS = {
    'no segmentation': (
        [annotation(segmentation=None)],
        r'1 of 1 annotations .* no segmentation, e\.g\. the one with id 1',
    ),
    'empty segmentation': ([annotation(), annotation(2, segmentation=[])], '1 of 2 .* an empty segmentation'),
    'flat polygon': ([annotation(segmentation=[1, 2, 3, 4, 5, 6])], 'neither a list of polygons nor RLE'),
    'rle of another size': ([annotation(segmentation=RLE | dict(size=[8, 8]))], 'RLE of the size of its image'),
    'no area': ([annotation(area=None)], 'no area.*that of its box will do'),
    'no bbox': ([annotation(bbox=None)], 'no bbox'),
    'bbox of points': ([annotation(bbox=[1, 2, 3])], 'bbox that is not four numbers'),
    'same ids': ([annotation(), annotation()], 'not unique, e.g. 1'),
}


def loaded(given: dict[str, Any]) -> list[Any]:
    """All images and masks, as MMDetection 2.x loads them for training."""
    from mmdet.datasets import build_dataset

    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
    built = build_dataset(given | dict(pipeline=steps))
    return [built.prepare_train_img(i) for i in range(len(built))]


@pytest.mark.parametrize('kind', COPES)
def test_annotations_that_mmdetection_copes_with(coco, kind):
    given = dataset(2, coco(*copy.deepcopy(COPES[kind])))
    check_config(config(2, given), ('train',))
    if mmdet.__version__.startswith('2.'):
        assert len(loaded(given)) == 1
        assert len(loaded(given | dict(filter_empty_gt=False))) == 2


@pytest.mark.parametrize('kind', FAILS)
def test_annotations_that_it_would_fail_on(coco, kind):
    annotations, message = FAILS[kind]
    given = dataset(2, coco(*copy.deepcopy(annotations)))
    with pytest.raises(ValueError, match=message):
        check_config(config(2, given), ('train',))
    if mmdet.__version__.startswith('2.'):
        with pytest.raises((KeyError, ValueError, TypeError, IndexError, AssertionError)):
            loaded(given)


@pytest.mark.parametrize('form', COCO_FORMS)
def test_faster_rcnn_needs_no_masks(coco, form):
    given = dataset(form, coco(annotation(segmentation=None)))
    check_config(config(form, given, model=detector(masks=False)), ('train',))
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    with pytest.raises(ValueError, match=r'loads no masks.*with_mask=True'):
        check_config(config(form, dataset(form, coco(annotation()), pipeline=pipeline)), ('train',))


@pytest.mark.parametrize('form', COCO_FORMS)
def test_evaluation_needs_more(coco, form):
    for annotations, message in (
        ([annotation(iscrowd=None)], 'no iscrowd.*Add "iscrowd": 0'),
        ([annotation(area=None)], 'no area'),
        ([annotation(segmentation=None)], 'no segmentation'),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(config(form, dataset(form, coco(*annotations)), 'val'), ('val',))
    boxes = config(form, dataset(form, coco(annotation(segmentation=None))), 'val')
    (boxes['evaluation'] if form == 2 else boxes['val_evaluator'])['metric'] = 'bbox'
    check_config(boxes, ('val',))
    check_config(config(form, dataset(form, coco(annotations=None)), 'test'), ('test',))  # as COCO's test-dev


def test_evaluator_of_another_file(coco):
    given = config(3, dataset(3, coco(annotation())), 'val')
    given['val_evaluator']['ann_file'] = 'data/coco/annotations/instances_val2017.json'
    with pytest.raises(FileNotFoundError, match=r'val_evaluator\.ann_file'):
        check_config(given, ('val',))


def test_files_that_are_not_coco(coco, tmp_path):
    for content in ('{"images": [', '[]', '{}', '{"images": [{}], "categories": []}'):
        (tmp_path / 'bad.json').write_text(content)
        with pytest.raises(ValueError, match='not a COCO annotation file'):
            check_config(config(2, dataset(2, str(tmp_path / 'bad.json'))), ('train',))
    images = [dict(id=1, file_name='1.png')]
    with pytest.raises(ValueError, match='no width and height'):
        check_config(config(2, dataset(2, coco(annotation(), images=images))), ('train',))
    with pytest.raises(ValueError, match="several categories named 'cat'"):
        check_config(config(2, dataset(2, coco(annotation(), classes=('cat', 'cat', 'dog')))), ('train',))
    with pytest.raises(ValueError, match='nothing to train with'):
        check_config(config(2, dataset(2, coco())), ('train',))
    with pytest.raises(ValueError, match='no model='):
        check_config({}, ())


KW = dict(type='KWBackbone', name='kw1x_resnet18')
FPN = dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(depth=50, num_stages=4, norm_cfg=dict(type='BN'), style='pytorch'),
            'argument depth, num_stages, norm_cfg, style: they belong to another backbone.*_delete_=True',
        ),
        (dict(with_cp=True), '_delete_=True.*grad_checkpointing=True'),
        (dict(dcn=dict(type='DCN'), plugins=[]), 'dcn, plugins'),
        (dict(_delete_=True), '_delete_=True is left in the backbone'),
        (dict(drop_path_ratio=0.1), "'drop_path_ratio'; did you mean drop_path_rate"),
        (dict(frozen_stages=7), r'frozen_stages=7 is out of range for kw1x_resnet18: -1 to 4'),
        (dict(frozen_stages='1'), "frozen_stages='1' is out of range"),
        (dict(out_indices=3), 'out_indices=3 must be a sequence'),
        (dict(name='kw1x_resnet19'), 'no network .*Did you mean kw1x_resnet18'),
    ],
)
def test_arguments_of_another_backbone(changes, message):
    with pytest.raises(ValueError, match=message):
        check_neck(dict(backbone=KW | changes, neck=FPN))


def test_a_backbone_without_name():
    with pytest.raises(ValueError, match='names no network'):
        check_neck(dict(backbone=dict(type='KWBackbone'), neck=FPN))
    with pytest.raises(ValueError, match='must be dict'):
        check_config(dict(model=dict(backbone=KW | dict(init_cfg=dict(type='Kaiming')))), ('train',))
    with pytest.raises(ValueError, match="cannot load 'torchvision://resnet18'"):
        check_config(dict(model=dict(backbone=KW, pretrained='torchvision://resnet18')), ('train',))
    with pytest.raises(FileNotFoundError, match='no weight file'):
        check_config(dict(model=dict(backbone=KW | dict(pretrained='nowhere.pth'))), ('train',))


def test_necks_that_fit():
    retina = FPN | dict(start_level=1, add_extra_convs='on_input')
    anchors = dict(anchor_generator=dict(strides=[8, 16, 32, 64, 128]))
    for neck in (FPN, retina, [FPN, dict(type='BFP', in_channels=256)], FPN | dict(type='PAFPN'), None):
        check_neck(dict(backbone=KW, neck=neck, bbox_head=anchors))
    mapper = dict(type='ChannelMapper', in_channels=[128, 256, 512], out_channels=256, num_outs=4)
    check_neck(dict(backbone=KW | dict(out_indices=(1, 2, 3)), neck=mapper))
    check_neck(dict(backbone=KW | dict(out_indices=(3,)), neck=dict(type='DilatedEncoder', in_channels=512)))
    check_neck(dict(backbone=dict(type='ResNet', depth=50), neck=dict(type='FPN', in_channels=[1])))


@pytest.mark.parametrize(
    ('neck', 'message'),
    [
        (
            FPN | dict(in_channels=[64, 128, 256, 320]),
            r'channels \[64, 128, 256, 512\].*in_channels=\[64, 128, 256, 320\]',
        ),
        ([FPN | dict(in_channels=[256]), dict(type='BFP')], 'Neck and backbone disagree'),
        (dict(type='ChannelMapper', in_channels=[128, 256, 512]), 'Neck and backbone disagree'),
        (dict(type='DilatedEncoder', in_channels=2048), 'in_channels=2048'),
        (FPN | dict(num_outs=3), 'num_outs=3 cannot be.*at least 4'),
        (FPN | dict(type='PAFPN', start_level=1, num_outs=2), 'num_outs=2 cannot be: from level 1 of 4'),
        (FPN | dict(start_level=4), 'start_level=4 is out of range'),
        (FPN | dict(end_level=2, num_outs=5), 'num_outs=5 cannot be'),
        (FPN | dict(num_outs=4), r'rpn_head\.anchor_generator has 5 strides'),
    ],
)
def test_necks_that_do_not(neck, message):
    anchors = dict(anchor_generator=dict(strides=[4, 8, 16, 32, 64]))
    with pytest.raises(ValueError, match=message):
        check_neck(dict(backbone=KW, neck=neck, rpn_head=anchors))
