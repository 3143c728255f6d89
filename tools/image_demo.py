"""Draw a detector's boxes and masks on one image.

Example:
    python tools/image_demo.py photo.jpg CONFIG CHECKPOINT --out-file photo_detections.jpg
"""

import argparse
import sys
from pathlib import Path

import torch


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image', type=Path)
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=Path, help='detector checkpoint, as training writes it')
    parser.add_argument('--out-file', type=Path, default=Path('detections.jpg'), help='default: %(default)s')
    parser.add_argument('--score-thr', type=float, default=0.3, help='draw detections above it (default: %(default)s)')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    for path in (args.image, args.config, args.checkpoint):
        if not path.is_file():
            parser.error(f"there is no file '{path}'")

    import kw_mmdet  # noqa: F401  (registers KWBackbone, whatever the config imports)
    import mmcv
    from mmdet.apis import inference_detector, init_detector

    if mmcv.imread(str(args.image)) is None:
        parser.error(f"'{args.image}' is not an image that OpenCV can read")
    model = init_detector(str(args.config), str(args.checkpoint), device=args.device)
    result = inference_detector(model, str(args.image))
    args.out_file.parent.mkdir(parents=True, exist_ok=True)
    model.show_result(str(args.image), result, score_thr=args.score_thr, out_file=str(args.out_file))
    boxes = result[0] if isinstance(result, tuple) else result
    for name, detections in zip(model.CLASSES, boxes, strict=True):
        for x1, y1, x2, y2, score in detections[detections[:, 4] >= args.score_thr]:
            print(f'{name} {score:.2f} [{x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}]')
    print(f'drawn: {args.out_file}', file=sys.stderr)


if __name__ == '__main__':
    main()
