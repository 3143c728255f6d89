"""KW in torchvision's Mask R-CNN: the pyramid of any timm network under its FPN; a training step, then a detection.

Example:
    python examples/torchvision_mask_rcnn.py --name kw1x_resnet50
"""

import argparse

import torch
import torchvision
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from kw_timm.pyramid import PyramidFeatures


class Backbone(torch.nn.Module):
    """A KW network with an FPN: what torchvision's detectors ask for."""

    def __init__(self, name: str, pretrained: bool, channels: int = 256) -> None:
        super().__init__()
        self.out_channels = channels
        self.body = PyramidFeatures(name, frozen_stages=1)
        if pretrained:
            self.body.load_pretrained()
        self.fpn = FeaturePyramidNetwork(list(self.body.out_channels), channels)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the levels of images ``(B, 3, H, W)`` by name, from fine to coarse."""
        return self.fpn({str(i): level for i, level in enumerate(self.body(images))})


def mask_rcnn(backbone: Backbone, classes: int, size: int) -> torch.nn.Module:
    """Return a Mask R-CNN of four levels; ``classes`` counts the background."""
    levels = ['0', '1', '2', '3']
    anchors = AnchorGenerator(tuple((edge,) for edge in (32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 4)
    return torchvision.models.detection.MaskRCNN(
        backbone,
        num_classes=classes,
        min_size=size,
        max_size=size * 2,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--name', default='kw1x_resnet50')
    parser.add_argument('--random', action='store_true', help='begin with random weights instead of pretrained ones')
    parser.add_argument('--size', type=int, default=800, help='shorter edge of the images')
    options = parser.parse_args()
    detector = mask_rcnn(Backbone(options.name, not options.random), 4, options.size).train()
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    # Your own data in torchvision's form: images in 0 to 1, and per image boxes, labels and masks.
    images = [torch.rand(3, options.size, options.size) for _ in range(2)]
    low, high = options.size // 4, options.size // 2
    masks = torch.zeros(1, options.size, options.size, dtype=torch.uint8)
    masks[:, low:high, low:high] = 1
    boxes = torch.tensor([[low, low, high, high]], dtype=torch.float32)
    losses = detector(images, [dict(boxes=boxes, labels=torch.tensor([1]), masks=masks)] * 2)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    print(', '.join(f'{name} {loss.item():.3f}' for name, loss in losses.items()))
    with torch.no_grad():
        (found,) = detector.eval()(images[:1])
    print(f'{len(found["boxes"])} boxes, masks {tuple(found["masks"].shape)}')


if __name__ == '__main__':
    main()
