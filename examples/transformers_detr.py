"""KW in Transformers' DETR: a training step on boxes, saved and loaded again.

Example:
    python examples/transformers_detr.py --name kw1x_resnet50 --output detr
"""

import argparse

import torch
import transformers

import kw_timm  # noqa: F401  (Transformers' TimmBackbone finds the networks by name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--name', default='kw1x_resnet50')
    parser.add_argument('--random', action='store_true', help='begin with random weights instead of pretrained ones')
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--layers', type=int, default=6, help='of encoder and decoder')
    parser.add_argument('--output', default='detr')
    options = parser.parse_args()
    backbone = transformers.TimmBackboneConfig(
        backbone=options.name, use_pretrained_backbone=not options.random, out_indices=[4]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        num_labels=3,
        num_queries=20,
        encoder_layers=options.layers,
        decoder_layers=options.layers,
    )
    detr = transformers.DetrForObjectDetection(config).train()
    optimizer = torch.optim.AdamW([p for p in detr.parameters() if p.requires_grad], lr=1e-4)

    # Your own data: normalized images, and per image classes and boxes as (cx, cy, w, h) in 0 to 1.
    images = torch.randn(2, 3, options.size, options.size)
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.3]]))] * 2
    loss = detr(images, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f'loss {loss.item():.3f}')

    detr.eval().save_pretrained(options.output)
    again = transformers.DetrForObjectDetection.from_pretrained(options.output).eval()
    with torch.no_grad():
        difference = (again(images).logits - detr(images).logits).abs().max().item()
    print(f'{options.output}: loaded again, differs by {difference:.1e}')


if __name__ == '__main__':
    main()
