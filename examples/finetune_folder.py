"""Fine-tune a KW network on images in one folder per class, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg.

Example:
    python examples/finetune_folder.py my_images --name kw1x_resnet18 --epochs 5
"""

import argparse
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import kw_timm  # registers the networks


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path)
    parser.add_argument('--name', default='kw1x_resnet18')
    parser.add_argument('--random', action='store_true', help='begin with random weights instead of pretrained ones')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--output', type=Path, default=Path('finetuned.pth'))
    options = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

    classes = ImageFolder(options.root / 'train').classes
    model = timm.create_model(options.name, pretrained=not options.random, num_classes=len(classes)).to(device)
    config = timm.data.resolve_model_data_config(model)
    sets = {
        split: ImageFolder(options.root / split, timm.data.create_transform(**config, is_training=split == 'train'))
        for split in ('train', 'val')
    }
    # An attention's BatchNorm needs two images at least: no last batch of one.
    train = DataLoader(sets['train'], options.batch, shuffle=True, drop_last=True)
    val = DataLoader(sets['val'], options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.epochs * len(train)))
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    for epoch in range(options.epochs):
        model.train()
        for images, labels in tqdm(train, desc=f'epoch {epoch + 1}', leave=False):
            loss = loss_of(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in val)
        print(f'epoch {epoch + 1}: {right} of {len(sets["val"])} right')

    torch.save(model.state_dict(), options.output)
    again = timm.create_model(options.name, num_classes=len(classes))
    kw_timm.load_checkpoint(again, options.output)
    print(f'{options.output}: classes {", ".join(classes)}')


if __name__ == '__main__':
    main()
