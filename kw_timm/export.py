"""``kw-timm export``: a network as a file for another runtime, which is run at once and compared with torch."""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import check_writable, new_files
from .inference import optimize_for_inference
from .pyramid import create_network
from .random_weights import drawn_images, settle
from .weights import read_weight_file
from .weights.exact import network_part, recognise_network, to_timm_exact
from .weights.store import WeightsNotFoundError

__all__ = ['ENDINGS', 'check_packages', 'export_file', 'file_size', 'load_file', 'load_network', 'run_export']

Run = Callable[[torch.Tensor], list[torch.Tensor]]

ENDINGS = {'onnx': '.onnx', 'openvino': '.xml', 'torch': '.pt2'}
_NEEDS = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('openvino',), 'torch': ()}
# Beyond, weights do not fit into an ONNX file and lie beside it; some room is left for the graph.
_LARGEST_ONNX = 2**31 - 2**27
# What the file is compared at if it takes any batch and size.
_BATCHES = (1, 2, 5)
_REPEATS = 15


def run_export(options: argparse.Namespace, size: tuple[int, int]) -> int:
    """Run the command: write the file, run it, print how far it is from torch, and the times of both.

    Raises:
        ValueError: If the network is unknown, its file cannot be read, a package is missing or the export fails.
    """
    file = options.output or Path(f'{Path(options.network).stem}{ENDINGS[options.to]}')
    if file.suffix != ENDINGS[options.to]:
        raise ValueError(f"'{file}' must end in '{ENDINGS[options.to]}' for --to {options.to}.")
    check_writable(file)
    check_packages(options.to)
    network = load_network(options.network, options.random_weights, min(size))
    chosen = optimize_for_inference(network, batch_size=options.batch) if options.optimized else network
    export_file(chosen, file, options.to, (options.batch, *size), options.dynamic, options.opset)
    run = load_file(options.to, file)
    print(f'{file}: {file_size(file) / 1e6:.0f} MB')
    heights = (size[0], size[0] + 32) if options.dynamic else (size[0],)
    batches = sorted({options.batch, *(_BATCHES if options.dynamic else ())})
    worst = 0.0
    with torch.inference_mode():
        for batch, height in ((b, h) for b in batches for h in heights):
            images = drawn_images(batch, (height, size[1]))
            worst = max(worst, _difference(run(images)[0], chosen(images)))
        images = drawn_images(options.batch, size)
        times = {'torch': _seconds(network, images)}
        if options.optimized:
            times['torch, optimized'] = _seconds(chosen, images)
        times[_title(options.to)] = _seconds(run, images)
    print(f'batches of {", ".join(map(str, batches))}: largest relative difference from torch {worst:.1e}')
    text = ', '.join(f'{what} {seconds * 1e3:.1f} ms' for what, seconds in times.items())
    print(
        f'batch {options.batch}, {size[0]} x {size[1]}, {torch.get_num_threads()} threads, '
        f'fastest of {_REPEATS}: {text}'
    )
    if not worst < 1e-2:
        print('kw-timm: this is more than rounding; please report it')
        return 1
    return 0


def load_network(name: str, random_weights: bool = False, size: int = 128) -> nn.Module:
    """Return a network in eval mode.

    Args:
        name: A timm name, whose published weights are taken, or a weight file of a KW variant or a network of the
            published tables, of any number of classes, in any wrapping.
        random_weights: Take sound random weights instead of published ones.
        size: Pixels of the images that these are fitted to.

    Raises:
        ValueError: If there is no such network, there are no weights, or the file is not one of a released variant.
    """
    if Path(name).is_file():
        weights = network_part(read_weight_file(name))
        found = recognise_network(weights)
        network = found.create()
        network.load_state_dict(to_timm_exact(weights, found))
        return network.eval()
    if random_weights:
        torch.manual_seed(0)
        return settle(create_network(name), min(size, 128))
    try:
        return create_network(name, pretrained=True).eval()
    except (WeightsNotFoundError, RuntimeError) as error:
        raise ValueError(f'{error} Or give --random-weights, to see speed and agreement alone.') from error


def export_file(
    network: nn.Module,
    file: Path,
    to: str,
    shape: tuple[int, int, int],
    dynamic: bool = False,
    opset: int | None = None,
) -> None:
    """Write a network to a file for another runtime; it appears when it is whole.

    Args:
        network: Network of RGB images, in eval mode.
        file: The file to write. Weights may come beside it: ``.onnx.data`` beyond 2 GB, ``.bin`` for OpenVINO.
        to: ``'onnx'``, ``'openvino'`` or ``'torch'`` (an archive of ``torch.export``).
        shape: Batch, height and width that it is for.
        dynamic: Let it take any batch and size.
        opset: ONNX operator set; None for the exporter's choice.

    Raises:
        ValueError: If a package is missing, or the exporter cannot do it.
    """
    check_packages(to)
    if opset is not None and to != 'onnx':
        raise ValueError(f'--opset {opset} is for --to onnx.')
    batch, *size = shape
    # In a graph that takes any batch, one of 1 would be a constant.
    images = drawn_images(max(batch, 2) if dynamic else batch, (size[0], size[1]))
    images = images.to(next(network.buffers()).dtype)
    try:
        with torch.no_grad(), _quiet(), new_files(file) as filling:
            {'onnx': _to_onnx, 'openvino': _to_openvino, 'torch': _to_torch}[to](
                network, images, filling, dynamic, opset
            )
    except (ValueError, OSError):
        raise
    except Exception as error:  # Exporters raise whatever they come upon.
        reason = ' '.join(str(error).split())
        raise ValueError(f'{type(network).__name__} cannot be exported to {to}: {reason:.300}') from error


def _to_onnx(network: nn.Module, images: torch.Tensor, file: Path, dynamic: bool, opset: int | None) -> None:
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    tensors = (*network.parameters(), *network.buffers())
    arguments: dict[str, Any] = dict(input_names=['images'], output_names=['output'], opset_version=opset)
    if sum(t.nbytes for t in tensors) < _LARGEST_ONNX:
        # Of torch's two exporters the one that takes seconds; the other takes a minute if sizes are dynamic.
        arguments |= dict(dynamo=False, dynamic_axes={'images': axes, 'output': {0: 'batch'}} if dynamic else None)
    else:
        arguments |= dict(dynamo=True, external_data=True, dynamic_shapes=(axes,) if dynamic else None, verbose=False)
    torch.onnx.export(network, (images,), str(file), **arguments)


def _to_openvino(network: nn.Module, images: torch.Tensor, file: Path, dynamic: bool, _: int | None) -> None:
    import openvino

    shape = [-1, 3, -1, -1] if dynamic else list(images.shape)
    openvino.save_model(
        openvino.convert_model(network, example_input=images, input=[shape]), file, compress_to_fp16=False
    )


def _to_torch(network: nn.Module, images: torch.Tensor, file: Path, dynamic: bool, _: int | None) -> None:
    some = torch.export.Dim.DYNAMIC
    shapes = ({0: some, 2: some, 3: some},) if dynamic else None
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), file)


def load_file(to: str, file: Path) -> Run:
    """Load a file into the runtime that it is for.

    Args:
        to: ``'onnx'``, ``'openvino'`` or ``'torch'``.
        file: What :func:`export_file` wrote.

    Returns:
        What computes all outputs of images ``(batch, 3, height, width)``, with as many threads as torch has now.
    """
    threads = torch.get_num_threads()
    if to == 'torch':
        module = torch.export.load(file).module()
        return lambda images: _listed(module(images))
    if to == 'openvino':
        import openvino

        # Where a processor has bfloat16, OpenVINO would compute in it, and differ from torch by more than rounding.
        settings = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'}
        compiled = openvino.compile_model(openvino.Core().read_model(file), 'CPU', settings)
        return lambda images: [torch.from_numpy(output) for output in compiled(images.numpy()).to_tuple()]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def check_packages(to: str) -> None:
    """Raise ValueError if what a runtime needs is not installed."""
    missing = [name for name in _NEEDS[to] if find_spec(name) is None]
    if missing:
        raise ValueError(f"--to {to} needs {', '.join(missing)}: pip install 'kw-timm[export]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what exporters warn of: constants that are constants, and their own deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _listed(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _seconds(run: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    run(images)
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - begin)
    return min(times)  # What else the machine does adds to the others.


def file_size(file: Path) -> int:
    """Return what a file takes in bytes, with the weights beside it."""
    beside = (file, file.with_name(f'{file.name}.data'), file.with_suffix('.bin'))
    return sum(part.stat().st_size for part in set(beside) if part.is_file())


def _title(to: str) -> str:
    return {'onnx': 'onnxruntime', 'openvino': 'OpenVINO', 'torch': 'torch.export'}[to]
