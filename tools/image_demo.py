"""Draw a detector's boxes and masks on one image; `kw-mmdet predict` does it for many.

Example:
    python tools/image_demo.py photo.jpg CONFIG CHECKPOINT --out-file photo_detections.jpg
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image', type=Path)
    parser.add_argument('config', help='a file, or the name of a config of ours')
    parser.add_argument('checkpoint', type=Path, help='detector checkpoint, as training writes it')
    parser.add_argument('--out-file', type=Path, default=Path('detections.jpg'), help='default: %(default)s')
    parser.add_argument('--score-thr', type=float, default=0.3, help='draw detections above it (default: %(default)s)')
    parser.add_argument('--device', help='default: a GPU if there is one')
    args = parser.parse_args()
    if not args.image.is_file():
        parser.error(f"there is no file '{args.image}'")

    from kw_mmdet.predict import Detector, draw, read_image, write_image
    from kw_mmdet.programs import load_config

    try:
        image = read_image(args.image)
        detector = Detector(load_config(args.config), args.checkpoint, args.device)
        found = detector(image).above(args.score_thr)
        write_image(args.out_file, draw(image, found, detector.names))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for (x1, y1, x2, y2), score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        print(f'{detector.names[label]} {score:.2f} [{x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}]')
    print(f'drawn: {args.out_file}', file=sys.stderr)


if __name__ == '__main__':
    main()
