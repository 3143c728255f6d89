"""Memory that is used again, and gradients of cells that a backward pass adds up in one buffer."""

import gc
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from kw_timm.layers import KWConv2d, Warehouse, buffers, straightforward


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Treat every buffer as a large one."""
    monkeypatch.setattr(buffers, '_LARGE', 1)
    buffers.empty_cache()
    yield
    buffers.empty_cache()


def buffer(*shape, dtype=torch.float32):
    return buffers.empty_buffer(shape, torch.empty(0, dtype=dtype))


def test_memory_is_used_again():
    first = buffer(3, 1000)
    address = first.data_ptr()
    del first
    assert buffers.kept_bytes() == 12000
    for shape, dtype in (((10, 300), torch.float32), ((1500,), torch.float64), ((4, 500), torch.float32)):
        again = buffer(*shape, dtype=dtype)
        assert (again.shape, again.dtype, again.is_contiguous()) == (shape, dtype, True)
        assert again.data_ptr() == address
        assert buffers.kept_bytes() == 0
        del again


def test_memory_that_is_far_too_large_is_not_used():
    del (large := [buffer(1000)])[:]
    assert not large
    small = buffer(400)
    assert buffers.kept_bytes() == 4000
    del small


def test_memory_in_use_is_not_handed_out():
    whole = buffer(10, 100).fill_(1)
    part = whole[3:].t().view_as(whole[3:].t())
    del whole
    others = [buffer(10, 100).fill_(2) for _ in range(3)]
    assert (part == 1).all()
    assert len({part.untyped_storage().data_ptr(), *(t.data_ptr() for t in others)}) == 4
    del part
    assert buffers.kept_bytes() == 4000


def test_a_tensor_that_graphs_and_lists_refer_to_each_other_by_is_not_handed_out():
    x = buffer(100).fill_(3).requires_grad_()
    y = (x * x).sum()
    y.owner = [y, x]
    del x
    gc.collect()
    buffer(100).fill_(4)
    y.backward()
    assert (y.owner[1].grad == 6).all()


def test_kept_memory_is_limited(monkeypatch):
    monkeypatch.setattr(buffers, '_MOST_KEPT', 10000)
    tensors = [buffer(1000) for _ in range(5)]
    too_large = buffer(3000)
    del tensors, too_large
    assert buffers.kept_bytes() == 8000
    buffers.empty_cache()
    assert buffers.kept_bytes() == 0


def test_many_threads():
    def use():
        for i in range(200):
            size = 100 + i % 7
            tensors = [buffer(size).fill_(threading.get_ident() % 1000 + k) for k in range(3)]
            wrong.extend(k for k, t in enumerate(tensors) if not (t == threading.get_ident() % 1000 + k).all())

    wrong = []
    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert buffers.kept_bytes() <= buffers._MOST_KEPT


def test_lent_tensors_are_ordinary():
    tensor = buffer(5, 6).normal_()
    assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
    assert torch.equal(tensor.clone(), tensor)
    assert tensor.numpy().sum() == pytest.approx(tensor.sum().item(), rel=1e-5)


class Chain(nn.Module):
    """Layers of one warehouse, one behind the other."""

    def __init__(self, layers=3):
        super().__init__()
        shape = (4, 4, 3, 3)
        self.warehouse = Warehouse([shape] * (layers + 1), cell_outplane_ratio=0.5, cell_inplane_ratio=0.5)
        self.layers = nn.Sequential(
            *(
                KWConv2d(4, 4, 3, padding=1, warehouse=self.warehouse, index=i, norm_layer=nn.LayerNorm)
                for i in range(layers)
            )
        )

    @property
    def cells(self):
        return self.warehouse.weight

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Chain().double()


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 5, dtype=torch.double, requires_grad=True)


def loss(net, x):
    return net(x).square().sum()


def expected(net, x, function=loss):
    """Gradients of the cells, of all parameters and of the input in the straightforward way."""
    with straightforward():
        value = function(net, x)
        return grad(value, [net.cells, x, *net.parameters()], allow_unused=True)


def assert_close(ours, theirs):
    assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


@pytest.fixture
def firsts(monkeypatch):
    """Record for each layer's backward whether it was the first to add to the cells' gradient."""
    record = []
    original = buffers.sum_buffer

    def spy(cells, parameter):
        result = original(cells, parameter)
        record.append(result[1])
        return result

    monkeypatch.setattr('kw_timm.ops.dynamic_conv.sum_buffer', spy)
    return record


def test_layers_share_a_sum(net, x, firsts):
    theirs = expected(net, x)
    loss(net, x).backward()
    assert firsts == [True, False, False]
    assert_close(net.cells.grad, theirs[0])
    assert_close(x.grad, theirs[1])
    assert not buffers._sums or net.cells.grad is not None
    net.cells.grad = None
    assert not buffers._sums


def test_gradients_accumulate(net, x, firsts):
    theirs = expected(net, x)[0]
    for times in (1, 2, 3):
        loss(net, x).backward()
        assert_close(net.cells.grad, times * theirs)
    net.zero_grad(set_to_none=False)
    loss(net, x).backward()
    assert_close(net.cells.grad, theirs)
    assert firsts == [True, False, False] * 4


def test_each_pass_has_its_own_sum(net, x):
    theirs = expected(net, x)[0]
    value = loss(net, x)
    first = grad(value, net.cells, retain_graph=True)[0]
    second = grad(value, net.cells, retain_graph=True)[0]
    value.backward()
    for ours in (first, second, net.cells.grad):
        assert_close(ours, theirs)
    first.zero_()
    assert_close(second, theirs)


def test_gradients_of_the_input_alone(net, x, firsts):
    theirs = expected(net, x)
    ours = grad(loss(net, x), x)[0]
    assert_close(ours, theirs[1])
    assert not buffers._sums
    ours = grad(loss(net, x), [net.cells, x])
    assert_close(ours[0], theirs[0])


@pytest.mark.parametrize('where', ['before', 'after', 'both'])
def test_cells_that_something_else_uses_too(net, x, where):
    def regularized(net, x):
        value = 0.3 * net.cells.pow(3).sum() if where != 'after' else 0
        value = value + loss(net, x)
        return value + (0.7 * net.cells.square().sum() if where != 'before' else 0)

    theirs = expected(net, x, regularized)[0]
    for _ in range(2):
        net.zero_grad()
        regularized(net, x).backward()
        assert_close(net.cells.grad, theirs)


def test_other_gradients_come_between_the_layers(net, x):
    """What autograd adds to the sum between two layers must not be lost."""

    class Between(nn.Module):
        def forward(self, x):
            return x + 0.1 * net.cells.mean()

    layers = list(net.layers)
    mixed = nn.Sequential(layers[0], Between(), layers[1], Between(), layers[2])

    def function(_, x):
        return mixed(x).square().sum()

    theirs = expected(net, x, function)[0]
    function(net, x).backward()
    assert_close(net.cells.grad, theirs)


def test_hooks_see_the_whole_gradient(net, x):
    theirs = expected(net, x)[0]
    seen = []
    net.cells.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    post = []
    net.cells.register_post_accumulate_grad_hook(lambda p: post.append(p.grad.clone()))
    loss(net, x).backward()
    assert len(seen) == len(post) == 1
    assert_close(seen[0], theirs)
    assert_close(net.cells.grad, 2 * theirs)
    assert_close(post[0], 2 * theirs)


def test_after_a_pass_that_failed(net, x):
    theirs = expected(net, x)[0]
    fail = True

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if fail:
                raise RuntimeError('interrupted')
            return g

    def function(net, x):
        return net.layers[2](net.layers[1](Failing.apply(net.layers[0](x)))).square().sum()

    caught = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match='interrupted') as error:
            function(net, x).backward()
        caught.append(error)  # Tracebacks keep frames, and what is in them, alive.
    fail = False
    function(net, x).backward()
    assert_close(net.cells.grad, theirs)


def test_graphs_that_share_cells(net, x):
    other = torch.randn(3, 4, 5, 5, dtype=torch.double)
    theirs = expected(net, x)[0], expected(net, other.requires_grad_())[0]
    values = loss(net, x), loss(net, other)
    ours = [grad(value, net.cells)[0] for value in reversed(values)]
    assert_close(ours[0], theirs[1])
    assert_close(ours[1], theirs[0])
    (loss(net, x) + loss(net, other)).backward()
    assert_close(net.cells.grad, theirs[0] + theirs[1])


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpoints(net, x, reentrant):
    theirs = expected(net, x)[0]

    def function(x):
        x = checkpoint(net.layers[0], x, use_reentrant=reentrant)
        return net.layers[2](checkpoint(net.layers[1], x, use_reentrant=reentrant)).square().sum()

    function(x).backward()
    assert_close(net.cells.grad, theirs)


def test_a_backward_inside_a_backward(net, x):
    """A hook that takes gradients itself gets its own, and leaves the outer pass alone."""
    theirs = expected(net, x)[0]
    inner = []

    def hook(_):
        with torch.enable_grad():
            inner.append(grad(loss(net, x.detach()), net.cells)[0])

    y = net.layers[1](net.layers[0](x))
    y.register_hook(hook)
    net.layers[2](y).square().sum().backward()
    assert_close(inner[0], theirs)
    assert_close(net.cells.grad, theirs)


def test_passes_in_many_threads(net):
    inputs = [torch.randn(2, 4, 5, 5, dtype=torch.double, requires_grad=True) for _ in range(6)]
    theirs = [expected(net, x)[0] for x in inputs]
    ours = [None] * len(inputs)

    def run(i):
        for _ in range(10):
            ours[i] = grad(loss(net, inputs[i]), net.cells)[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_without_knowing_the_pass(net, x, firsts, monkeypatch):
    monkeypatch.setattr(buffers, '_pass_id', lambda: -1)
    theirs = expected(net, x)[0]
    loss(net, x).backward()
    assert firsts == [True, True, True]
    assert_close(net.cells.grad, theirs)


def test_cells_that_are_computed_are_summed_by_autograd(net, x, firsts):
    raw = net.cells.detach().clone().requires_grad_()

    def function(net, x):
        return torch.func.functional_call(net, {'warehouse.weight': raw * 2}, (x,)).square().sum()

    with straightforward():
        theirs = grad(function(net, x), raw)[0]
    function(net, x).backward()
    assert all(firsts)
    assert_close(raw.grad, theirs)


class TwoChains(nn.Module):
    """Two warehouses of one size, whose layers take turns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Chain(), Chain()

    def forward(self, x):
        for a, b in zip(self.first.layers, self.second.layers, strict=True):
            x = b(a(x))
        return x


@pytest.mark.parametrize('packing', ['copies', 'offloading', 'pickles', 'one object for all'])
def test_saved_tensors_that_come_back_as_others(x, packing):
    """What hooks give back lives for a moment, and the next may lie at its address."""
    torch.manual_seed(0)
    net = TwoChains().double()
    with straightforward():
        theirs = grad(loss(net, x), [net.first.cells, net.second.cells])
    scratch = torch.empty(net.first.cells.numel(), dtype=torch.double)

    def reused(saved):
        if saved.numel() != scratch.numel():
            return saved
        return scratch.view(saved.shape).copy_(saved)

    context = {
        'copies': torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone),
        'offloading': torch.autograd.graph.save_on_cpu(),
        'pickles': torch.autograd.graph.saved_tensors_hooks(pickle.dumps, pickle.loads),
        'one object for all': torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, reused),
    }[packing]
    with context:
        value = loss(net, x)
    value.backward()
    assert_close(net.first.cells.grad, theirs[0])
    assert_close(net.second.cells.grad, theirs[1])


def test_a_parameter_does_not_inherit_the_sum_of_another(monkeypatch):
    monkeypatch.setattr(buffers, '_pass_id', lambda: 7)
    parameter = torch.zeros(100)
    address = id(parameter)
    kept, is_first = buffers.sum_buffer(parameter, parameter)
    again, is_second_first = buffers.sum_buffer(torch.zeros(100), parameter)
    assert (is_first, is_second_first) == (True, False)
    assert again.data_ptr() == kept.data_ptr()
    del parameter
    for _ in range(1000):
        heir = torch.zeros(100)
        if id(heir) == address:
            break
    assert id(heir) == address, 'no other tensor came to lie at the address'
    other, is_first = buffers.sum_buffer(heir, heir)
    assert is_first
    assert other.data_ptr() != kept.data_ptr()


def test_steps_of_an_optimizer(net, x):
    torch.manual_seed(1)
    other = Chain().double()
    other.load_state_dict(net.state_dict())
    for network in (net, other):
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            if network is other:
                with straightforward():
                    loss(network, x).backward()
            else:
                loss(network, x).backward()
            optimizer.step()
    assert_close(net.cells, other.cells)
