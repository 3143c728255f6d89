"""KW in segmentation_models_pytorch's U-Net: a few steps on drawn discs, and the overlap that is reached.

Example:
    python examples/smp_unet.py --name kw1x_resnet50 --steps 100
"""

import argparse

import segmentation_models_pytorch as smp
import torch
from tqdm import tqdm

import kw_timm  # noqa: F401  (timm, whose networks `tu-` names, knows them from then on)


def discs(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``(count, 3, size, size)`` with a disc each, and masks ``(count, 1, size, size)``."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    middle, radius = torch.randint(size // 4, 3 * size // 4, (count, 2, 1, 1)), size // 6
    masks = ((rows - middle[:, :1]) ** 2 + (columns - middle[:, 1:]) ** 2 < radius**2).float()
    return masks * 2 + 0.5 * torch.randn(count, 3, size, size), masks


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--name', default='kw1x_resnet50')
    parser.add_argument('--pretrained', action='store_true', help='begin with the published weights')
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--output', default='unet.pth')
    options = parser.parse_args()
    weights = 'imagenet' if options.pretrained else None
    unet = smp.Unet(f'tu-{options.name}', encoder_weights=weights, classes=1).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    loss_of = smp.losses.DiceLoss('binary')
    for _ in tqdm(range(options.steps)):
        images, masks = discs(4, options.size)
        loss = loss_of(unet(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, masks = discs(4, options.size)
    with torch.no_grad():
        found = unet.eval()(images) > 0
    union = (found | masks.bool()).sum().clamp(min=1)
    print(f'loss {loss.item():.3f}, intersection over union {(found & masks.bool()).sum() / union:.2f}')
    torch.save(unet.state_dict(), options.output)
    print(options.output)


if __name__ == '__main__':
    main()
