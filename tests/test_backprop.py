"Every layer by hand and every operation of the tape against PyTorch, on odd shapes and dtypes."
import gc
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from dlfound.autograd import Node, Value, topological_order, unbroadcast
from dlfound.backprop import MSE, Linear, Module, ReLU, Sequential, grad_check, normalize

thorough = settings(deadline=None, max_examples=60)

dtypes = st.sampled_from([torch.float32, torch.float64])
dims = st.integers(1, 4)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
seeds = st.integers(0, 2**31 - 1)

def randn(shape, dtype, seed, layout='plain'):
    "Normal numbers; `turned` and `strided` are views that are not contiguous"
    g = torch.Generator().manual_seed(seed)
    def draw(*sizes): return torch.randn(sizes, dtype=dtype, generator=g)
    if layout == 'turned': return draw(*shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    if layout == 'strided' and shape: return draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    return draw(*shape)

layouts = st.sampled_from(['plain', 'turned', 'strided'])

@st.composite
def broadcastable(draw):
    "Two shapes that broadcast together, sizes of 0 and 1 included"
    full = draw(st.lists(st.integers(0, 4), max_size=4))
    def side():
        kept = full[draw(st.integers(0, len(full))):]
        return tuple(1 if draw(st.booleans()) else n for n in kept)
    return side(), side()

def reference(f, tensors, arriving_seed):
    "Output, arriving gradient and gradients by PyTorch's autograd"
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    arriving = randn(out.shape, out.dtype, arriving_seed)
    return out.detach(), arriving, torch.autograd.grad(out, leaves, arriving)

# ---- layers

@thorough
@given(shapes, dims, dims, dtypes, layouts, seeds)
def test_linear(lead, n_in, n_out, dtype, layout, seed):
    layer = Linear(n_in, n_out, dtype)
    layer.bias.copy_(randn((n_out,), dtype, seed))
    x = randn((*lead, n_in), dtype, seed + 1, layout)
    out, arriving, grads = reference(F.linear, (x, layer.weight, layer.bias), seed + 2)
    assert_close(layer(x), out)
    assert_close((layer.backward(arriving), layer.weight.grad, layer.bias.grad), grads)

def test_linear_keeps_the_gradient_of_the_last_pass_for_any_batch_size():
    layer = Linear(5, 3)
    for n in 1, 17, 64, 0:
        x = torch.randn(n, 5)
        out, arriving, grads = reference(F.linear, (x, layer.weight, layer.bias), n)
        layer(x)
        assert_close((layer.backward(arriving), layer.weight.grad, layer.bias.grad), grads)

def test_linear_init_is_kaiming():
    torch.manual_seed(0)
    layer = Linear(400, 300)
    assert abs(layer.weight.std() / (2 / 400)**.5 - 1) < .02 and not layer.bias.any()

@thorough
@given(shapes, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), layouts, seeds)
def test_relu(shape, dtype, layout, seed):
    x = randn(shape, dtype, seed, layout).round(decimals=0)
    out, arriving, (grad,) = reference(torch.relu, (x,), seed + 1)
    layer = ReLU()
    assert_close(layer(x), out)
    assert_close(layer.backward(arriving), grad, rtol=0, atol=0)

def test_relu_on_special_values_is_torch_s():
    x = torch.tensor([float('-inf'), -1., -0., 0., 1e-45, 1., float('inf'), float('nan')])
    arriving = torch.tensor([float('inf'), float('nan'), float('inf'), float('nan'), 1., 2., 3., 4.])
    leaf = x.clone().requires_grad_()
    torch.relu(leaf).backward(arriving)
    layer, value = ReLU(), Value(x)
    assert_close(layer(x), torch.relu(x), equal_nan=True)
    assert_close(layer.backward(arriving), leaf.grad, equal_nan=True)
    value.relu().backward(arriving)
    assert_close(value.grad, leaf.grad, equal_nan=True)

@thorough
@given(shapes, dtypes, layouts, seeds)
def test_mse(shape, dtype, layout, seed):
    assume(0 not in shape)
    pred, target = randn(shape, dtype, seed, layout), randn(shape, dtype, seed + 1)
    leaf = pred.clone().requires_grad_()
    F.mse_loss(leaf, target).backward()
    loss = MSE()
    assert_close(loss(pred, target), F.mse_loss(pred, target))
    assert_close(loss.backward(), leaf.grad)

@thorough
@given(shapes, dtypes, seeds)
def test_mse_scaled(shape, dtype, seed):
    assume(0 not in shape)
    pred, target = randn(shape, dtype, seed), randn(shape, dtype, seed + 1)
    out, arriving, (grad,) = reference(lambda p: F.mse_loss(p, target), (pred,), seed + 2)
    loss = MSE()
    assert_close(loss(pred, target), out)
    assert_close(loss.backward(arriving), grad)

@thorough
@given(st.lists(dims, min_size=2, max_size=5), shapes, dtypes, seeds)
def test_sequential_is_the_same_net_in_torch(sizes, lead, dtype, seed):
    assume(0 not in lead)
    ours = Sequential(*[l for pair in zip(sizes, sizes[1:]) for l in (Linear(*pair, dtype), ReLU())])
    theirs = nn.Sequential(*[l for pair in zip(sizes, sizes[1:]) for l in (nn.Linear(*pair, dtype=dtype), nn.ReLU())])
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True): p.copy_(q)
    x, target, loss = randn((*lead, sizes[0]), dtype, seed), randn((*lead, sizes[-1]), dtype, seed + 1), MSE()
    leaf = x.clone().requires_grad_()
    expected = F.mse_loss(theirs(leaf), target)
    expected.backward()
    assert_close(loss(ours(x), target), expected.detach())
    assert_close(ours.backward(loss.backward()), leaf.grad)
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])

@pytest.mark.parametrize('make, x', [(lambda: Linear(3, 2), torch.ones(4, 3)), (ReLU, torch.ones(4, 3)),
                                     (lambda: Sequential(Linear(3, 2), ReLU()), torch.ones(4, 3))])
def test_wrong_order_and_wrong_shape_say_so(make, x):
    layer = make()
    with pytest.raises(RuntimeError, match='before forward'): layer.backward(torch.ones(4, 2))
    out = layer(x)
    with pytest.raises(ValueError, match='got None'): layer.backward()
    with pytest.raises(ValueError, match=r'\(4, 1\)'): layer.backward(torch.ones(4, 1))
    with pytest.raises(ValueError, match='float64'): layer.backward(torch.ones_like(out).double())
    layer.backward(torch.ones_like(out))
    with pytest.raises(RuntimeError, match='twice'): layer.backward(torch.ones_like(out))
    layer(x)
    layer.backward(torch.ones_like(out))

def test_loss_order():
    loss = MSE()
    with pytest.raises(RuntimeError, match='before forward'): loss.backward()
    loss(torch.ones(2), torch.zeros(2))
    loss.backward()
    with pytest.raises(RuntimeError, match='twice'): loss.backward()

def test_unfit_arguments_say_so():
    with pytest.raises(ValueError, match=r'Linear\(3, 2\) needs'): Linear(3, 2)(torch.ones(4, 5))
    with pytest.raises(ValueError, match=r'Linear\(3, 2\) needs'): Linear(3, 2)(torch.tensor(1.))
    with pytest.raises(ValueError, match='float64'): Linear(3, 2)(torch.ones(4, 3).double())
    with pytest.raises(ValueError, match='at least 1'): Linear(0, 2)
    with pytest.raises(ValueError, match='broadcast'): MSE()(torch.ones(4, 1), torch.ones(4))
    with pytest.raises(TypeError, match='got ReLU'): Sequential(nn.ReLU())  # type: ignore[arg-type]
    relu = ReLU()
    with pytest.raises(ValueError, match='twice'): Sequential(relu, relu)
    with pytest.raises(NotImplementedError, match='forward'): Module()(torch.ones(1))

def test_inputs_are_let_go_after_backward():
    layer, x = Linear(3, 2), torch.ones(4, 3)
    layer(x)
    layer.backward(torch.ones(4, 2))
    seen = weakref.ref(x)
    del x
    assert seen() is None

def test_torch_optimizers_take_our_parameters():
    torch.manual_seed(0)
    net, loss = Sequential(Linear(4, 8), ReLU(), Linear(8, 1)), MSE()
    opt, x = torch.optim.SGD(net.parameters(), lr=.05), torch.randn(64, 4)
    losses = []
    for _ in range(100):
        losses.append(float(loss(net(x), x[:, :1])))
        net.backward(loss.backward())
        opt.step()
    assert losses[-1] < .3 * losses[0]

# ---- normalize, grad_check

@thorough
@given(shapes, dtypes, seeds)
def test_normalize(shape, dtype, seed):
    x = randn(shape, dtype, seed)
    assert_close(normalize(x, 2., .5), (x - 2) / .5)

@thorough
@given(st.integers(2, 5), dims, dtypes, seeds)
def test_normalize_by_column(n, m, dtype, seed):
    x = randn((n, m), dtype, seed)
    mean, std = x.mean(0), x.std(0) + .1
    out, arriving, (grad,) = reference(lambda t: F.batch_norm(t, mean, std**2, eps=0.), (x,), seed + 1)
    leaf = x.clone().requires_grad_()
    ours = normalize(leaf, mean, std)
    assert_close(ours.detach(), out)
    assert_close(torch.autograd.grad(ours, leaf, arriving)[0], grad)

def test_normalize_refuses_a_constant():
    x = torch.tensor([[1., 2.], [1., 4.]])
    with pytest.raises(ValueError, match='std > 0'): normalize(x, x.mean(0), x.std(0))
    with pytest.raises(ValueError, match='std > 0'): normalize(x, 0., float('nan'))

@thorough
@given(shapes, layouts, seeds)
def test_grad_check_passes_the_right_and_stops_the_wrong(shape, layout, seed):
    assume(0 not in shape)
    x = randn(shape, torch.float64, seed, layout)
    before, right = x.clone(), 3 * x**2 + 1
    f = lambda t: (t**3 + t).sum()
    assert grad_check(f, [x], [right]) < 1e-6
    assert grad_check(f, [x], [2 * right]) > .4
    assert grad_check(f, [x], [-right]) > 1
    assert math.isnan(grad_check(f, [x], [right * float('nan')]))
    assert_close(x, before, rtol=0, atol=0)

def test_grad_check_of_a_gradient_that_is_zero():
    x = torch.ones(3).double()
    assert grad_check(lambda t: (0 * t).sum(), [x], [torch.zeros(3)]) == 0
    assert grad_check(lambda t: (0 * t).sum(), [x], [torch.full((3,), 1e-9).double()]) == 1

def test_grad_check_sees_tensors_that_f_reads_for_itself():
    layer, x = Linear(3, 2, torch.float64), torch.randn(4, 3).double()
    layer(x)
    grads = [layer.backward(torch.ones(4, 2).double()), layer.weight.grad, layer.bias.grad]
    f = lambda *_: layer.forward(x).sum()
    assert grad_check(f, [x, layer.weight, layer.bias], grads) < 1e-8
    assert grad_check(f, [layer.bias], [grads[2] + 1e-3]) > 1e-5

def test_grad_check_arguments():
    x = torch.ones(3).double()
    with pytest.raises(TypeError, match='float64'): grad_check(torch.sum, [x.float()], [x])
    with pytest.raises(ValueError, match='shape'): grad_check(torch.sum, [x], [x[:2]])
    with pytest.raises(ValueError): grad_check(torch.sum, [x], [])
    with pytest.raises(ZeroDivisionError): grad_check(lambda t: 1 / 0, [x], [x])
    assert_close(x, torch.ones(3).double())
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert grad_check(torch.sum, [leaf], [torch.ones(3)]) < 1e-8
    assert grad_check(torch.sum, [x[:0]], [x[:0]]) == 0

# ---- the tape

def check_tape(f, tensors, seed, **close):
    "The same expression on our tape and PyTorch's"
    out, arriving, grads = reference(f, tensors, seed)
    values = [Value(t) for t in tensors]
    result = f(*values)
    assert_close(result.data, out, **close)
    result.backward(arriving)
    assert_close([v.grad for v in values], list(grads), **close)

two = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b, '/': lambda a, b: a / b,
       '**': lambda a, b: a**b, 'reuse': lambda a, b: a * b + a * a - b / a}

@pytest.mark.parametrize('name', two)
@thorough
@given(broadcastable(), dtypes, dtypes, layouts, seeds)
def test_operators_broadcast(name, pair, dtype_a, dtype_b, layout, seed):
    a, b = randn(pair[0], dtype_a, seed, layout).abs() + .5, randn(pair[1], dtype_b, seed + 1, layout).abs() + .5
    check_tape(two[name], (a, b), seed + 2, **(dict(rtol=1e-4, atol=1e-4) if dtype_a != dtype_b else {}))

one = {'exp': lambda a: a.exp(), 'log': lambda a: (a.exp() + .1).log(), 'relu': lambda a: a.relu(), '-a': lambda a: -a,
       'numbers': lambda a: 1 - 2 * a + a / 3 - 1, 'reversed': lambda a: 2 / (a.exp() + 1) + 2**a + .5 * a,
       'integer powers': lambda a: a**3 - a**2 + a**1 + a**0, 'negative power': lambda a: (a.exp() + .1)**-1.5}

@pytest.mark.parametrize('name', one)
@thorough
@given(shapes, dtypes, layouts, seeds)
def test_functions_and_numbers(name, shape, dtype, layout, seed):
    check_tape(one[name], (randn(shape, dtype, seed, layout),), seed + 1)

@st.composite
def matmul_shapes(draw):
    k, n, m = draw(st.integers(0, 4)), draw(st.integers(0, 4)), draw(st.integers(0, 4))
    left, right = draw(broadcastable())
    return draw(st.sampled_from([(k,), (n, k), (*left, n, k)])), draw(st.sampled_from([(k,), (k, m), (*right, k, m)]))

@thorough
@given(matmul_shapes(), dtypes, layouts, seeds)
def test_matmul(pair, dtype, layout, seed):
    a, b = (randn(shape, dtype, seed + i, layout) for i, shape in enumerate(pair))
    check_tape(lambda a, b: a @ b, (a, b), seed + 2)

@pytest.mark.parametrize('name', ['sum', 'mean'])
@thorough
@given(shapes, st.data(), st.booleans(), dtypes, layouts, seeds)
def test_reductions(name, shape, data, keepdim, dtype, layout, seed):
    assume(0 not in shape or name == 'sum')
    n = len(shape)
    some = st.lists(st.integers(0, n - 1), min_size=1, unique=True).map(tuple)
    options = [st.none(), st.integers(-n, n - 1), some] if n else [st.none()]
    dim = data.draw(st.one_of(*options))
    check_tape(lambda a: getattr(a, name)(dim, keepdim=keepdim), (randn(shape, dtype, seed, layout),), seed + 1)

@thorough
@given(broadcastable(), seeds)
def test_constants_on_either_side(pair, seed):
    a, c = randn(pair[0], torch.float64, seed).abs() + .5, randn(pair[1], torch.float64, seed + 1).abs() + .5
    for f in (lambda a: c + a, lambda a: c - a, lambda a: c * a, lambda a: c / a, lambda a: c**a, lambda a: a**c,
              lambda a: a / c):
        check_tape(f, (a,), seed + 2)

@pytest.mark.parametrize('f', [
    lambda a, c: a + c, lambda a, c: c + a, lambda a, c: a - c, lambda a, c: c - a, lambda a, c: a * c,
    lambda a, c: c * a, lambda a, c: a / c, lambda a, c: c / a, lambda a, c: a**c, lambda a, c: c**a,
    lambda a, c: a @ c, lambda a, c: c @ a])
def test_numpy_arrays_on_either_side(f):
    a, c = torch.rand(3, 3).double() + .5, np.random.default_rng(0).random((3, 3)) + .5
    leaf, value = a.clone().requires_grad_(), Value(a)
    expected, ours = f(leaf, torch.as_tensor(c)), f(value, c)
    assert isinstance(ours, Value)
    expected.sum().backward()
    ours.sum().backward()
    assert_close((ours.data, value.grad), (expected.detach(), leaf.grad))

def test_constant_matrices_on_either_side():
    a, c = torch.randn(3, 3), torch.randn(3, 3)
    check_tape(lambda a: c @ a @ c, (a,), 0)

def test_powers_at_zero_are_torch_s():
    base = torch.tensor([0., 0., 0., 2., -2.])
    check_tape(lambda a: a**torch.tensor([0., 1., 2., 0., 3.]), (base,), 0)
    check_tape(lambda b: torch.tensor([0., 0., 2.])**b, (torch.tensor([0., 2., -1.]),), 0)

@thorough
@given(shapes, st.data())
def test_unbroadcast_is_sum_to_size(shape, data):
    full = (*data.draw(st.lists(st.integers(0, 3), max_size=2)), *shape)
    small = tuple(1 if data.draw(st.booleans()) else n for n in shape)
    grad = randn(full, torch.float64, 0)
    assert_close(unbroadcast(grad, small), grad.sum_to_size(small))

def test_a_node_used_many_times():
    x = Value(2.)
    y = x
    for _ in range(100): y = (y + y) * .5 * x**0
    y.backward()
    assert float(x.grad) == 1.
    assert len(topological_order(y)) == 1 + 4 * 100

@thorough
@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 2, st.sampled_from('+-*')), min_size=1, max_size=40), seeds)
def test_random_graphs(steps, seed):
    def build(a, b):
        made = [a, b]
        for i, j, op in steps:
            u, v = made[i % len(made)], made[j % len(made)]
            made.append({'+': lambda: u + v, '-': lambda: u - v, '*': lambda: u * v}[op]() * .5)
        return sum(made[2:], made[0] * 0 + made[1] * 0)
    tensors = randn((3,), torch.float64, seed), randn((2, 1), torch.float64, seed + 1)
    check_tape(build, tensors, seed + 2)

@pytest.mark.parametrize('length', [10_000, 100_000])
def test_long_chains(length):
    x = Value(torch.ones(2))
    y = x
    for _ in range(length): y = y + .5
    y.sum().backward()
    assert_close(x.grad, torch.ones(2))
    del y
    gc.collect()

def test_leaves_add_up_and_inner_nodes_do_not():
    x = Value(3.)
    y = x * x
    z = y * 2
    z.backward()
    z.backward()
    assert (float(x.grad), float(y.grad)) == (24., 2.)

def test_gradients_do_not_share_memory():
    a, b = Value(torch.ones(2)), Value(torch.ones(2))
    (a + b).sum().backward()
    a.grad.zero_()
    assert_close(b.grad, torch.ones(2))

def test_tape_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        x = Value(torch.ones(3))
        y = (x.exp() * x).sum()
        y.backward()
        seen = weakref.ref(y)
        del y
        assert seen() is None
    finally: gc.enable()

def test_scalars_arrays_and_dtypes():
    assert Value(2).data.dtype == torch.get_default_dtype() and Value(np.ones(2)).data.dtype == torch.float64
    x = Value(torch.tensor([1, 2]))
    (x * 2).sum().backward()
    assert_close(x.grad, torch.tensor([2., 2.]))
    with pytest.raises(TypeError, match='real'): Value(torch.tensor(1j))
    third = 1 / Value(torch.tensor(3., dtype=torch.float64))
    assert_close(third.data, torch.tensor(1 / 3, dtype=torch.float64), rtol=1e-15, atol=0)

def test_backward_wants_one_number_or_a_gradient():
    x = Value(torch.ones(3))
    with pytest.raises(ValueError, match='got None'): (x * 2).backward()
    with pytest.raises(ValueError, match=r'\(2,\)'): (x * 2).backward(torch.ones(2))
    leaf = Value(1.)
    leaf.backward()
    assert float(leaf.grad) == 1.

def test_a_new_operation_is_a_node_with_edges():
    x = Node(torch.tensor([.3, -.2]))
    y = Node(x.data.sin(), [(x, lambda g: g * x.data.cos()), (5., lambda g: g)])
    y.backward(torch.ones(2))
    assert_close(x.grad, x.data.cos())
    assert len(y.edges) == 1

def test_the_same_net_by_hand_on_the_tape_and_in_torch():
    torch.manual_seed(1)
    x, target = torch.randn(32, 7).double(), torch.randn(32, 3).double()
    net, loss = Sequential(Linear(7, 11, torch.float64), ReLU(), Linear(11, 3, torch.float64)), MSE()
    starts = [p.clone() for p in net.parameters()]
    w1, b1, w2, b2 = (Value(p.T.clone() if p.ndim == 2 else p.clone()) for p in starts)
    leaves = [p.clone().requires_grad_() for p in starts]
    for _ in range(50):
        by_hand = loss(net(x), target)
        net.backward(loss.backward())
        for p in net.parameters(): p -= .1 * p.grad
        on_tape = (((x @ w1 + b1).relu() @ w2 + b2 - target)**2).mean()
        for p in (w1, b1, w2, b2): p.grad = None
        on_tape.backward()
        for p in (w1, b1, w2, b2): p.data -= .1 * p.grad
        in_torch = F.mse_loss(F.linear(F.linear(x, *leaves[:2]).relu(), *leaves[2:]), target)
        grads = torch.autograd.grad(in_torch, leaves)
        with torch.no_grad():
            for p, g in zip(leaves, grads): p -= .1 * g
        assert_close(by_hand, in_torch.detach())
        assert_close(on_tape.data, in_torch.detach())


@pytest.mark.parametrize('given, shape', [((4, 3), (2,)), ((3,), (1, 1)), ((4, 3), (4, 3, 1)), ((2,), (3,))])
def test_a_gradient_that_broadcasting_cannot_have_made_is_refused(given, shape):
    with pytest.raises(ValueError, match='look at the vjp'): unbroadcast(torch.ones(given), shape)
