"""Weight files that are damaged in a thousand ways, each a function of its number alone."""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

Weights = dict[Any, Any]


@dataclass(frozen=True)
class Damaged:
    """A file, what was done to it, and what shall become of it.

    Attributes:
        path: The file.
        kind: What was done.
        good: True if it is to be accepted as a whole network, False if to be refused, None if either is right.
    """

    path: Path
    kind: str
    good: bool | None


def damaged_file(seed: int, weights: dict[str, torch.Tensor], folder: Path, sign: Path) -> Damaged:
    """Write the damaged file of a number.

    Args:
        seed: The number.
        weights: The state dict of a network.
        folder: Where to write it.
        sign: What a payload in it would make if it ran.
    """
    rng = random.Random(seed)
    group = rng.choices(('bytes', 'tensors', 'keys', 'values', 'payload', 'other'), (25, 30, 20, 10, 8, 7))[0]
    kind, damage = rng.choice([(name, make) for (of, name), make in DAMAGES.items() if of == group])
    form = rng.choice(('zip', 'zip', 'legacy', 'safetensors'))
    return damage(rng, kind, form, dict(weights), folder / f'{seed}', sign)


Damage = Callable[[random.Random, str, str, Weights, Path, Path], Damaged]
DAMAGES: dict[tuple[str, str], Damage] = {}


def written(rng: random.Random, form: str, weights: Weights, path: Path) -> Path:
    """Write weights in a form, in one of the wrappings that are met."""
    if form == 'safetensors':
        path = path.with_suffix('.safetensors')
        path.write_bytes(save({str(key): value.clone().contiguous() for key, value in weights.items()}))
        return path
    path = path.with_suffix(rng.choice(('.pth', '.pt', '.ckpt', '.bin')))
    content = rng.choice((weights, {'model': weights}, {'state_dict': weights, 'epoch': 3, 'optimizer': {'state': {}}}))
    torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    return path


def at_bytes(kind: str) -> Callable[[Callable[[random.Random, bytearray], bytes | bytearray]], None]:
    """Register damage to the bytes of a good file."""

    def register(change: Callable[[random.Random, bytearray], bytes | bytearray]) -> None:
        def damage(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
            path = written(rng, form, weights, path)
            path.write_bytes(change(rng, bytearray(path.read_bytes())))
            return Damaged(path, f'{kind}, {form}', None)

        DAMAGES['bytes', kind] = damage

    return register


@at_bytes('cut off')
def _(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.choice((1, 7, 8, 9, 100, rng.randrange(len(data)), rng.randrange(len(data)), len(data) - 1))]


@at_bytes('bits flipped')
def _(rng: random.Random, data: bytearray) -> bytearray:
    # Most of a file is numbers; what says what they are is at its ends.
    ends = [*range(min(4000, len(data))), *range(max(0, len(data) - 40000), len(data))]
    for _ in range(rng.choice((1, 2, 5, 50))):
        data[rng.choice(ends) if rng.random() < 0.8 else rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


@at_bytes('a block of zeros')
def _(rng: random.Random, data: bytearray) -> bytearray:
    start, size = rng.choice((0, rng.randrange(len(data)), len(data) - 500)), rng.choice((8, 512, 4096))
    data[start : start + size] = bytes(len(data[start : start + size]))
    return data


@at_bytes('bytes inserted')
def _(rng: random.Random, data: bytearray) -> bytearray:
    start = rng.choice((0, 8, 64, rng.randrange(len(data))))
    return data[:start] + rng.randbytes(rng.choice((1, 8, 100))) + data[start:]


@at_bytes('bytes missing')
def _(rng: random.Random, data: bytearray) -> bytearray:
    start = rng.choice((0, 8, rng.randrange(len(data))))
    return data[:start] + data[start + rng.choice((1, 8, 100)) :]


@at_bytes('more behind its end')
def _(rng: random.Random, data: bytearray) -> bytearray:
    return data + rng.choice((bytes(100), data[:1000], b'\r\n', rng.randbytes(70000)))


@at_bytes('line ends changed')
def _(rng: random.Random, data: bytearray) -> bytes:
    return data.replace(b'\n', b'\r\n')


def at_tensor(kind: str, good: bool | None = False, forms: tuple[str, ...] = ('zip', 'legacy', 'safetensors')) -> Any:
    """Register damage to some tensors of a network."""

    def register(change: Callable[[random.Random, torch.Tensor], Any]) -> None:
        def damage(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
            form = form if form in forms else 'zip'
            # The first are those by which networks are told apart.
            names = [key for key, value in weights.items() if value.is_floating_point() and value.dim() > 0]
            wide = rng.random() < 0.15
            chosen = names if wide else [rng.choice((names[0], names[1], names[-1], rng.choice(names)))]
            for key in chosen:
                weights[key] = change(rng, weights[key])
            where = 'all' if wide else chosen[0]
            return Damaged(written(rng, form, weights, path), f'{kind} ({where}), {form}', good)

        DAMAGES['tensors', kind] = damage

    return register


PICKLED = ('zip', 'legacy')
at_tensor('another rank')(lambda rng, t: rng.choice((t.unsqueeze(0), t.flatten()[:1].reshape(()), t[None, None])))
at_tensor('another shape')(lambda rng, t: rng.choice((t[:0], torch.cat([t, t]), t[..., :0], t.new_zeros(3, 5, 7, 9))))
at_tensor('half precision', True)(lambda rng, t: t.to(rng.choice((torch.float16, torch.bfloat16))))
at_tensor('double precision', True)(lambda rng, t: t.double())
at_tensor('complex')(lambda rng, t: t.to(torch.complex64))
at_tensor('integers')(lambda rng, t: t.to(rng.choice((torch.int8, torch.int32, torch.int64, torch.uint8))))
at_tensor('booleans')(lambda rng, t: t > 0)
at_tensor('NaN')(lambda rng, t: spoilt(rng, t, float('nan')))
at_tensor('infinite')(lambda rng, t: spoilt(rng, t, rng.choice((1, -1)) * float('inf')))
at_tensor('sparse', forms=PICKLED)(lambda rng, t: t.to_sparse())
at_tensor('sparse rows', forms=PICKLED)(lambda rng, t: t.reshape(len(t), -1).to_sparse_csr())
at_tensor('quantized', forms=PICKLED)(lambda rng, t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8))
at_tensor('without values', forms=PICKLED)(lambda rng, t: t.to('meta'))
at_tensor('a parameter', True, PICKLED)(lambda rng, t: torch.nn.Parameter(t))
at_tensor('expanded from one number', None, PICKLED)(lambda rng, t: torch.ones(1).expand(t.shape))
at_tensor('terabytes of one number', forms=PICKLED)(lambda rng, t: torch.ones(1).expand(1 << 20, 1 << 20))
at_tensor('transposed in memory', True, PICKLED)(lambda rng, t: t.transpose(0, -1).contiguous().transpose(0, -1))


def spoilt(rng: random.Random, tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Return a tensor with one number replaced."""
    tensor = tensor.clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return tensor


def at_keys(kind: str, good: bool | None = False) -> Any:
    """Register damage to names."""

    def register(change: Callable[[random.Random, Weights], Weights]) -> None:
        def damage(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
            return Damaged(written(rng, form, change(rng, weights), path), f'{kind}, {form}', good)

        DAMAGES['keys', kind] = damage

    return register


def without(rng: random.Random, weights: Weights, count: int) -> Weights:
    """Leave out some tensors, not one that torch fills in itself."""
    names = [key for key in weights if 'num_batches' not in key]
    gone = rng.sample(names, min(count, len(names)))
    return {key: value for key, value in weights.items() if key not in gone}


PREFIXES = ('module.', 'model.', 'backbone.', '_orig_mod.', 'encoder.', 'student.', 'ema.', 'net.', 'a.b.c.')
at_keys('one missing')(lambda rng, w: without(rng, w, 1))
at_keys('many missing')(lambda rng, w: without(rng, w, rng.randrange(2, 200)))
at_keys('nearly all missing')(lambda rng, w: dict(rng.sample(sorted(w.items()), rng.choice((1, 2, 9)))))
at_keys('no warehouses')(lambda rng, w: {key: value for key, value in w.items() if 'warehouse' not in key})
at_keys('warehouses alone')(lambda rng, w: {key: value for key, value in w.items() if 'warehouse' in key})
at_keys('one more')(lambda rng, w: {**w, rng.choice(('extra', 'a.b', 'warehouses.x.weight', 'é')): torch.zeros(3)})
at_keys('a warehouse of no number')(
    lambda rng, w: {**w, f'warehouse_manager.weights.{rng.choice(("x", 99, "", "²"))}': w[next(iter(w))]}
)
at_keys('upper case')(lambda rng, w: {key.upper(): value for key, value in w.items()})
at_keys('dots lost')(lambda rng, w: {key.replace('.', '_'): value for key, value in w.items()})
at_keys('two swapped')(lambda rng, w: dict(zip(w, sorted(w.values(), key=lambda v: v.numel()), strict=True)))
at_keys('prefixed', True)(lambda rng, w: prefixed(rng.choice(PREFIXES) + rng.choice(('', *PREFIXES)), w))
at_keys('partly prefixed')(lambda rng, w: {f'model.{k}' if rng.random() < 0.5 else k: v for k, v in w.items()})
at_keys('twice, under two names')(lambda rng, w: prefixed('student.', w) | prefixed('teacher.', w))
at_keys('in another order', True)(lambda rng, w: dict(rng.sample(list(w.items()), len(w))))


def prefixed(prefix: str, weights: Weights) -> Weights:
    """Put something before all names."""
    return {prefix + key: value for key, value in weights.items()}


def at_values(kind: str, good: bool | None = False) -> Any:
    """Register other things than tensors, in pickles alone."""

    def register(make: Callable[[random.Random, Weights], Any]) -> None:
        def damage(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
            path = path.with_suffix('.pth')
            torch.save(make(rng, weights), path, _use_new_zipfile_serialization=form == 'zip')
            return Damaged(path, f'{kind}, {form}', good)

        DAMAGES['values', kind] = damage

    return register


def replaced(rng: random.Random, weights: Weights, value: Any) -> Weights:
    """Put something in a tensor's place."""
    return {**weights, rng.choice([key for key in weights if 'num_batches' not in str(key)]): value}


def cycle() -> dict[str, Any]:
    """A dictionary that holds itself."""
    made: dict[str, Any] = {f'{i}': None for i in range(50)}
    return dict.fromkeys(made, made) | {'x': torch.zeros(1)}


at_values('text')(lambda rng, w: replaced(rng, w, 'weights'))
at_values('nothing')(lambda rng, w: replaced(rng, w, None))
at_values('a list')(lambda rng, w: replaced(rng, w, [1.0, 2.0]))
at_values('a dictionary')(lambda rng, w: replaced(rng, w, {'a': {'b': torch.zeros(3)}}))
at_values('numbers for names')(lambda rng, w: dict(enumerate(w.values())))
at_values('a number for a name')(lambda rng, w: replaced(rng, {**w, 3: 4, (1, 2): torch.zeros(1)}, 5))
at_values('no dictionary')(
    lambda rng, w: rng.choice(([*w.values()][:9], 'x', 3, None, (), [], {}, torch.zeros(3), {'model': {}}))
)
at_values('a dictionary of itself')(lambda rng, w: cycle())
at_values('nested deeply')(lambda rng, w: nested(w, rng.choice((2, 3, 30, 300))))
at_values('entries of another type', True)(
    lambda rng, w: {'model': rng.choice(('x', [], 3)), 'state_dict': w, 'meta': 3, 'reference_unused': 'x'}
)


def nested(weights: Weights, depth: int) -> Any:
    """Hide weights deep within dictionaries; those of few levels are found."""
    inner: Any = dict(list(weights.items())[:20])
    for _ in range(depth):
        inner = {'x': inner}
    return inner


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payload(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
    """Write a file that would make ``sign`` if it were unpickled without care."""
    import subprocess

    code = f"open({str(sign)!r}, 'w')"
    call = rng.choice(
        (
            Call(os.system, f'touch {sign}'),
            Call(eval, code),
            Call(exec, code),
            Call(subprocess.Popen, ['touch', str(sign)]),
            Call(open, str(sign), 'w'),
            Call(Path.touch, sign),
            Call(os.mkdir, str(sign)),
            Call(getattr, dict, 'clear'),
            Call(torch.save, 3, str(sign)),
            Call(torch.hub.load, 'x/y', 'z'),
            Call(pickle.loads, pickle.dumps(Call(os.system, f'touch {sign}'))),
        )
    )
    path = path.with_suffix(rng.choice(('.pth', '.ckpt', '.bin', '.safetensors')))
    content = {'model': weights, 'args': call} if rng.random() < 0.5 else {**weights, 'x': call}
    if form == 'safetensors':
        path.write_bytes(pickle.dumps(rng.choice((call, [call])), protocol=rng.choice((0, 2, 4))))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    return Damaged(path, f'{kind} {call.call[0].__name__}, {form}', False)


DAMAGES['payload', 'a payload'] = payload


def at_header(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
    """Change what a safetensors file says of its tensors."""
    path = path.with_suffix('.safetensors')
    data = save(weights)
    size = struct.unpack('<Q', data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice(list(header))
    how = rng.randrange(8)
    if how == 0:
        header[name]['shape'] = rng.choice(([-1], [1 << 62, 4], ['x'], None, [], [[]]))
    elif how == 1:
        header[name]['dtype'] = rng.choice(('F7', 'float32', None, 3, 'C64', 'BOOL', 'I32'))
    elif how == 2:
        header[name]['data_offsets'] = rng.choice(([0], [0, 1 << 60], [9, 3], [-4, 4], [0, 8], None, 'x'))
    elif how == 3:
        header[name] = rng.choice(({}, [], None, 'x'))
    elif how == 4:
        del header[name]
    elif how == 5:
        header['__metadata__'] = rng.choice(({'a': 3}, [], 'x', {'a': {'b': 'c'}}))
    text = json.dumps(header).encode()
    if how == 6:
        text = rng.choice((b'{' * 1000, b'[]', b'null', b'{"a":' * 5000, text[:-1], text + text, b'\xff\xfe' + text))
    length = rng.choice((0, 1, 1 << 63, len(text) + len(body) + 1, 1 << 40)) if how == 7 else len(text)
    path.write_bytes(struct.pack('<Q', length) + text + body)
    return Damaged(path, f'{kind}, way {how}', None if how in (1, 5) else False)


def zip_bomb(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
    """Write a checkpoint whose tensor unpacks to a hundred times what there is of it."""
    path = path.with_suffix('.pth')
    made = io.BytesIO()
    torch.save({**weights, 'bomb': torch.zeros(1 << 19)}, made)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return Damaged(path, kind, False)


def other_file(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
    """Write something that is no weight file."""
    path = path.with_suffix(rng.choice(('.pth', '.safetensors', '.ckpt', '')))
    archive, tar = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as opened:
        opened.writestr(rng.choice(('a.txt', 'archive/data.pkl', 'a/version', '../x')), rng.randbytes(50))
    with tarfile.open(fileobj=tar, mode='w') as made:
        made.addfile(tarfile.TarInfo('pickle'), io.BytesIO())
    contents = {
        'empty': b'',
        'text': b'Not a weight file.\n' * 9,
        'a web page': b'\n <!DOCTYPE html><html>Quota</html>',
        'JSON': b'{"weight_map": {"a": "b"}}',
        'random bytes': rng.randbytes(rng.choice((1, 8, 9, 5000))),
        'zeros': bytes(rng.choice((1, 8, 9, 10000))),
        'another archive': archive.getvalue(),
        'a tar file': tar.getvalue(),
        'compressed': gzip.compress(b'weights' * 100),
        'a pointer of Git LFS': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
        'a pickle': pickle.dumps(rng.choice(({'a': 1}, [1, 2], 'x', {1: {2: 3}})), protocol=rng.choice((0, 2, 5))),
        'a folder': None,
        'a broken link': None,
    }
    what = rng.choice(list(contents))
    if what == 'a folder':
        path.mkdir()
    elif what == 'a broken link':
        path.symlink_to(path.with_name('nowhere'))
    else:
        path.write_bytes(contents[what] or b'')
    return Damaged(path, f'{what}, {path.suffix}', False)


def bad_index(rng: random.Random, kind: str, form: str, weights: Weights, path: Path, sign: Path) -> Damaged:
    """Write an index of shards that are missing, elsewhere, or damaged."""
    path.mkdir()
    index = path / 'model.safetensors.index.json'
    (path / 'a.safetensors').write_bytes(save(dict(list(weights.items())[:9])) if rng.random() < 0.5 else b'x' * 20)
    content = rng.choice(
        (
            '{',
            '[]',
            '{}',
            '{"weight_map": []}',
            '{"weight_map": {}}',
            '{"weight_map": {"a": 3}}',
            '{"weight_map": {"a": "../a.safetensors", "b": "/etc/passwd"}}',
            '{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}',
            '{"weight_map": {"a": "model.safetensors.index.json"}}',
            '{"weight_map": {"a": "a.safetensors"}}',
            '[' * 100000,
        )
    )
    index.write_text(content)
    return Damaged(rng.choice((index, path)) if content != '[' * 100000 else index, f'{kind} {content[:40]}', False)


DAMAGES['bytes', 'header'] = at_header
DAMAGES['other', 'zip bomb'] = zip_bomb
DAMAGES['other', 'other file'] = other_file
DAMAGES['other', 'other file again'] = other_file
DAMAGES['other', 'index'] = bad_index
