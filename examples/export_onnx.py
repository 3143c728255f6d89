"""Export a KW network to ONNX, run it with onnxruntime, and compare with torch at another batch and size.

Example:
    python examples/export_onnx.py kw1x_resnet18 --output kw1x_resnet18.onnx
"""

import argparse
from pathlib import Path

import onnxruntime
import timm
import torch

import kw_timm


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', default='kw1x_resnet18')
    parser.add_argument('--random', action='store_true', help='random weights instead of pretrained ones')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--output', type=Path, default=Path('network.onnx'))
    options = parser.parse_args()
    network = timm.create_model(options.name, pretrained=not options.random).eval()
    network = kw_timm.optimize_for_inference(network, batch_size=1)
    images = torch.randn(2, 3, options.size, options.size)
    free = {0: 'batch', 2: 'height', 3: 'width'}
    torch.onnx.export(
        network,
        (images,),
        options.output,
        input_names=['images'],
        output_names=['logits'],
        dynamic_axes={'images': free, 'logits': {0: 'batch'}},
        dynamo=False,  # seconds instead of minutes
    )
    session = onnxruntime.InferenceSession(options.output)
    for batch, size in ((2, options.size), (3, options.size + 32)):
        images = torch.randn(batch, 3, size, size)
        (theirs,) = session.run(None, {'images': images.numpy()})
        with torch.no_grad():
            ours = network(images)
        difference = (torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max()
        print(f'batch {batch}, {size} x {size}: largest difference {difference:.1e} of the largest logit')
        assert difference < 1e-3
    print(options.output)


if __name__ == '__main__':
    main()
