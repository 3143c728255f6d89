"""KW networks in the packages that people train and build with: one step each, by the real package.

`make test-packages` runs them, in an environment of their own.
"""

import copy
import json

import pytest
import timm
import torch
from networks import network
from torch import nn

import kw_timm
from kw_timm.layers.annealing import without_passes

pytestmark = pytest.mark.packages

NAME = 'kw1x_mobilenetv2_050'
SIZE, CLASSES, RATE = 64, 10, 0.1


class Data(torch.utils.data.Dataset):
    """Four images, as every package takes them."""

    def __init__(self, as_dict: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(4, 3, SIZE, SIZE, generator=generator)
        self.labels = torch.randint(CLASSES, (4,), generator=generator)
        self.as_dict = as_dict

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int):  # type: ignore[no-untyped-def]
        if self.as_dict:
            return dict(pixel_values=self.images[i], labels=self.labels[i])
        return self.images[i], self.labels[i]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
    model.load_state_dict({k: v for k, v in network(NAME).state_dict().items() if 'classifier' not in k}, strict=False)
    kw_timm.anneal(model, 8)  # By itself, whatever calls it.
    return model.train()


@pytest.fixture
def expected(model) -> dict[str, torch.Tensor]:
    """The weights after one step of plain SGD on the whole batch, of a temperature that is given."""
    plain, data = copy.deepcopy(model), Data()
    kw_timm.anneal(plain, None)
    kw_timm.set_temperature(plain, 1 - 1 / 8)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    nn.functional.cross_entropy(plain(data.images), data.labels).backward()
    optimizer.step()
    return plain.state_dict()


def assert_learned(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = without_passes(model.state_dict())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f'{key}: {text}')


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Data(), batch_size=4)


def test_lightning(model, expected, tmp_path):
    lightning = pytest.importorskip('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, _):  # type: ignore[no-untyped-def]
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=RATE)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(Classifier(), loader())
    assert_learned(model, expected)
    assert model.warehouses.training_passes == 1
    (checkpoint,) = tmp_path.rglob('*.ckpt')
    again = timm.create_model(NAME, num_classes=CLASSES)
    kw_timm.load_checkpoint(again, checkpoint)
    assert_learned(again, expected)


def test_accelerate(model, expected, tmp_path):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for images, labels in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(images), labels))
            optimizer.step()
    assert_learned(accelerator.unwrap_model(prepared), expected)
    assert model.warehouses.training_passes == 1
    accelerator.save_model(prepared, tmp_path / 'model', max_shard_size='2MB')
    assert len(list((tmp_path / 'model').glob('*.safetensors'))) > 1
    again = timm.create_model(NAME, num_classes=CLASSES)
    kw_timm.load_checkpoint(again, tmp_path / 'model')
    assert_learned(again, expected)
    accelerator.save_state(tmp_path / 'state')
    with torch.no_grad():
        model.conv_stem.attention.fc1.weight.zero_()
        model.warehouses.training_passes.zero_()
    accelerator.load_state(tmp_path / 'state')
    assert model.warehouses.training_passes == 1
    assert_learned(accelerator.unwrap_model(prepared), expected)


class ForTrainer(nn.Module):
    """A classifier as Transformers' Trainer takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(pixel_values)
        return dict(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def test_transformers_trainer(model, expected, tmp_path):
    transformers = pytest.importorskip('transformers')
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=RATE,
        optim='sgd',
        lr_scheduler_type='constant',
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy='no',
        disable_tqdm=True,
    )

    class InOrder(transformers.Trainer):  # another order rounds norms otherwise, which random weights amplify
        def _get_train_sampler(self, dataset=None):  # type: ignore[no-untyped-def]
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    trainer = InOrder(ForTrainer(model), args, train_dataset=Data(as_dict=True))
    trainer.train()
    assert_learned(model, expected)
    assert model.warehouses.training_passes == 1
    trainer.save_model(str(tmp_path / 'saved'))
    again = timm.create_model(NAME, num_classes=CLASSES)
    kw_timm.load_checkpoint(again, tmp_path / 'saved')
    assert_learned(again, expected)


def test_segmentation_models_pytorch():
    """Its Unet over a KW network, by timm's name with `tu-` before it: the features of timm's own wrapper."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    torch.manual_seed(0)
    unet = smp.Unet(f'tu-{NAME}', encoder_weights=None, classes=3)
    features = timm.create_model(NAME, features_only=True)
    unet.encoder.model.load_state_dict(features.state_dict())
    x = torch.randn(2, 3, SIZE, SIZE)
    for net in (unet, features):
        net.eval()
    for found, wanted in zip(unet.encoder(x)[1:], features(x), strict=True):
        torch.testing.assert_close(found, wanted)
    mask = unet.train()(x)
    assert mask.shape == (2, 3, SIZE, SIZE)
    mask.square().mean().backward()
    cells = [p for name, p in unet.named_parameters() if 'warehouses.' in name]
    assert cells
    assert all(p.grad is not None for p in cells)


@pytest.mark.parametrize('encoder', ['resnet18', 'tu-regnety_002'])
def test_a_derived_plan_for_segmentation_models_pytorch(encoder):
    """A Unet of static layers, decoder and all, becomes a KW network and learns."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    torch.manual_seed(0)
    unet = smp.Unet(encoder, encoder_weights=None, classes=3)
    plan = kw_timm.derive_plan(unet, attention_limit=0.2, exclude='segmentation_head.*')
    planned = {layer for entry in plan.values() for layer in entry.layers}
    assert any(layer.startswith('encoder.') for layer in planned)
    assert any(layer.startswith('decoder.') for layer in planned)
    kw_timm.kernelize(unet, plan, weights='keep')
    x = torch.randn(2, 3, SIZE, SIZE)
    optimizer = torch.optim.SGD(unet.parameters(), RATE)
    losses = []
    for _ in range(3):
        loss = unet.train()(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in unet.warehouses.parameters())


def test_transformers_backbone_of_detr():
    """Its TimmBackbone finds KW networks, once `kw_timm` is imported, and DETR learns over one."""
    transformers = pytest.importorskip('transformers')
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone=NAME, use_pretrained_backbone=False, out_indices=[4]),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )
    torch.manual_seed(0)
    detr = transformers.DetrForObjectDetection(config)
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.3]]))] * 2
    out = detr.train()(torch.randn(2, 3, SIZE, SIZE), labels=labels)
    assert out.loss.isfinite()
    out.loss.backward()
    cells = {name: p for name, p in detr.named_parameters() if '.warehouses.' in name}
    assert cells
    assert all(p.grad is not None for p in cells.values() if p.requires_grad)
    assert any(p.requires_grad for p in cells.values())


def test_torchvision_mask_rcnn():
    """torchvision's Mask R-CNN over the pyramid of a KW network."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

    from kw_timm.pyramid import PyramidFeatures

    class Backbone(nn.Module):
        out_channels = 32

        def __init__(self) -> None:
            super().__init__()
            self.body = PyramidFeatures(NAME)
            self.fpn = FeaturePyramidNetwork(list(self.body.out_channels), self.out_channels)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            levels = self.body(x)
            return self.fpn({str(i): level for i, level in enumerate(levels)})

    torch.manual_seed(0)
    sizes = tuple((size,) for size in (16, 32, 64, 128))
    levels = [str(i) for i in range(4)]
    detector = MaskRCNN(
        Backbone(),
        num_classes=4,
        min_size=96,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
    ).train()
    masks = torch.zeros(1, 96, 96, dtype=torch.uint8)
    masks[:, 20:60, 10:50] = 1
    target = dict(boxes=torch.tensor([[10.0, 20, 50, 60]]), labels=torch.tensor([1]), masks=masks)
    losses = detector([torch.rand(3, 96, 96) for _ in range(2)], [target] * 2)
    assert {'loss_mask', 'loss_box_reg', 'loss_classifier'} <= losses.keys()
    sum(losses.values()).backward()
    body = detector.backbone.body
    assert all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters() if p.requires_grad)
    found = detector.eval()([torch.rand(3, 96, 96)])
    assert found[0].keys() == {'boxes', 'labels', 'scores', 'masks'}


def test_a_name_of_ours_without_the_import(tmp_path):
    """Without `import kw_timm`, timm knows no such network."""
    import subprocess
    import sys

    (tmp_path / 'config.json').write_text(json.dumps(dict(architecture=NAME, num_classes=10)))
    program = f"import timm; timm.create_model('local-dir:{tmp_path}')"
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert f'Unknown model ({NAME})' in done.stderr
    imported = subprocess.run([sys.executable, '-c', f'import kw_timm; {program}'], capture_output=True, text=True)
    assert imported.returncode == 0, imported.stderr
