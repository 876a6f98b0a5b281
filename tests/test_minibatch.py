"Losses, samplers, data sets and collate equal PyTorch's, or say what is wrong; `fit` is the plain loop."
import math
import pickle
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.data as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from dlfound.minibatch import (BatchSampler, Dataset, Sampler, accuracy, collate, cross_entropy, fit, log_softmax,
                               logsumexp, nll)

floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
scales = st.sampled_from([0., 1e-6, 1., 100., 1e4])


def gen(seed): return torch.Generator().manual_seed(seed)


def logits(shape, dtype, scale, seed, strange=False):
    x = torch.randn(shape, generator=gen(seed), dtype=torch.float64) * scale
    if strange and x.numel(): x.view(-1)[::3] = -math.inf
    return x.to(dtype)


def near(a, b, **kw):
    "Close; in half precision, where PyTorch's own kernels are some units in the last place off, less so"
    eps = torch.finfo(b.dtype).eps
    loose = dict(rtol=4 * eps, atol=eps) if b.dtype.itemsize < 4 else {}
    assert_close(a, b, **loose, **kw)


def layouts(x):
    "The same numbers, contiguous, transposed and strided"
    yield x
    if x.ndim > 1: yield x.transpose(0, 1).contiguous().transpose(0, 1)
    if x.ndim: yield torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)
dtypes = st.sampled_from(floats)
seeds = st.integers(0, 99)


@settings(deadline=None, max_examples=200)
@given(shape=shapes, data=st.data(), dtype=dtypes, scale=scales, seed=seeds, keepdim=st.booleans(),
       strange=st.booleans())
def test_logsumexp(shape, data, dtype, scale, seed, keepdim, strange):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = logits(shape, dtype, scale, seed, strange)
    expected = torch.logsumexp(x.float() if dtype.itemsize < 4 else x, dim, keepdim).to(dtype)
    for y in layouts(x): assert_close(logsumexp(y, dim, keepdim), expected)


@pytest.mark.parametrize('row', [[math.inf, 1], [-math.inf, -math.inf], [math.nan, 1], [math.inf, -math.inf],
                                 [1e38, 1e38], [-1e38, -3e38], [5.]])
def test_logsumexp_of_strange_rows(row):
    x = torch.tensor(row)
    assert_close(logsumexp(x), torch.logsumexp(x, -1), equal_nan=True)
    assert_close(log_softmax(x), F.log_softmax(x, -1), equal_nan=True)


@settings(deadline=None, max_examples=200)
@given(shape=shapes, data=st.data(), dtype=dtypes, scale=scales, seed=seeds)
def test_log_softmax(shape, data, dtype, scale, seed):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = logits(shape, dtype, scale, seed)
    for y in layouts(x): near(log_softmax(y, dim), F.log_softmax(x, dim))
    exact, eps = F.log_softmax(x.double(), dim).to(dtype), torch.finfo(dtype).eps
    if dtype.itemsize < 4: assert_close(log_softmax(x, dim), exact, rtol=eps, atol=1e-7)


def test_log_softmax_keeps_its_digits():
    x = torch.tensor([1e4, 1e4 - 1, -1e4], dtype=torch.float32)
    assert_close(log_softmax(x), F.log_softmax(x.double(), -1).float(), rtol=1e-6, atol=0)


def class_shapes(classes, rest): return (classes, *rest) if not rest else (rest[0], classes, *rest[1:])


@settings(deadline=None, max_examples=300)
@given(rest=st.lists(st.integers(0, 4), max_size=4).map(tuple), classes=st.integers(1, 6), dtype=dtypes, scale=scales,
       seed=seeds, labels=st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_cross_entropy_of_any_shape(rest, classes, dtype, scale, seed, labels):
    "Classes are in dimension 1, as in PyTorch: images and texts too"
    x = logits(class_shapes(classes, rest), dtype, scale, seed).requires_grad_()
    y = x.detach().clone().requires_grad_()
    target = torch.randint(classes, rest, generator=gen(seed)).to(labels)
    ours = cross_entropy(x, target)
    theirs_ = F.cross_entropy(y.float() if dtype.itemsize < 4 else y, target.long()).to(dtype)
    near(ours, theirs_, equal_nan=True)
    if not target.numel(): return
    ours.backward()
    theirs_.backward()
    near(x.grad, y.grad)


@settings(deadline=None, max_examples=300)
@given(rest=st.lists(st.integers(1, 4), max_size=3).map(tuple), classes=st.integers(2, 6), seed=seeds,
       ignore=st.sampled_from([-100, -1, 0, 255]), weighted=st.booleans(), f=st.sampled_from(['cross_entropy', 'nll']),
       reduction=st.sampled_from(['mean', 'sum', 'none']), smoothing=st.sampled_from([0., .1, 1.]))
def test_options_are_pytorchs(rest, classes, seed, ignore, weighted, f, reduction, smoothing):
    x = logits(class_shapes(classes, rest), torch.float64, 3., seed).requires_grad_()
    y = x.detach().clone().requires_grad_()
    target = torch.randint(classes, rest, generator=gen(seed))
    target = torch.where(torch.rand(rest, generator=gen(seed + 1)) < .3, ignore, target)
    weight = torch.rand(classes, generator=gen(seed), dtype=torch.float64) if weighted else None
    kw = dict(weight=weight, ignore_index=ignore, reduction=reduction)
    if f == 'nll': ours, expected = nll(x, target, **kw), F.nll_loss(y, target, **kw)
    else:
        kw['label_smoothing'] = smoothing
        ours, expected = cross_entropy(x, target, **kw), F.cross_entropy(y, target, **kw)
    assert_close(ours, expected, equal_nan=True)
    ours.sum().backward()
    expected.sum().backward()
    assert_close(x.grad, y.grad, equal_nan=True)


@settings(deadline=None, max_examples=100)
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), data=st.data(), dtype=dtypes, scale=scales,
       seed=seeds, f=st.sampled_from(['logsumexp', 'log_softmax']))
def test_gradients_of_logarithms(shape, data, dtype, scale, seed, f):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    ours, theirs_ = {'logsumexp': (logsumexp, torch.logsumexp), 'log_softmax': (log_softmax, F.log_softmax)}[f]
    for x in layouts(logits(shape, dtype, scale, seed)):
        x, y = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
        a, b = ours(x, dim), theirs_(y.float() if dtype.itemsize < 4 else y, dim).to(dtype)
        arriving = torch.randn(b.shape, generator=gen(seed + 1)).to(dtype)
        a.backward(arriving)
        b.backward(arriving)
        near(x.grad, y.grad)


@pytest.mark.parametrize('f', [logsumexp, log_softmax])
def test_second_derivatives(f):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))


def test_masked_logits_have_gradients():
    x = torch.tensor([[1., -math.inf, 2.]], requires_grad=True)
    cross_entropy(x, torch.tensor([2])).backward()
    assert x.grad.isfinite().all() and x.grad[0, 1] == 0


@pytest.mark.parametrize('x, target, error, message', [
    (torch.ones(2, 3), torch.tensor([0]), ValueError, r'\[2\] are needed, got \[1\]'),
    (torch.ones(2, 3), torch.tensor([[0], [1]]), ValueError, 'squeeze'),
    (torch.ones(2, 4, 3), torch.zeros(2, 4).long(), ValueError, r'\[2, 3\] are needed'),
    (torch.ones(2, 3), torch.ones(2, 3), ValueError, 'argmax'),
    (torch.ones(2, 3), torch.tensor([0, 3]), ValueError, r'from 0 to 2, got \[3\]'),
    (torch.ones(2, 3), torch.tensor([0, -1]), ValueError, r'got \[-1\].*ignore_index'),
    (torch.ones(2, 3), torch.tensor([0., 1.]), TypeError, 'float32.*long'),
    (torch.ones(2, 3), torch.tensor([True, False]), TypeError, 'bool')])
def test_unfit_labels(x, target, error, message):
    with pytest.raises(error, match=message): cross_entropy(x, target)


def test_a_few_wrong_labels_are_named():
    with pytest.raises(ValueError, match=r'got \[3, 4, 5, 6, 7\]'): cross_entropy(torch.ones(99, 3), torch.arange(99))


@pytest.mark.parametrize('kind', [torch.uint8, torch.int8])
def test_the_ignored_label_does_not_wrap(kind):
    "-100 is 156 in uint8, and 156 is -100 in int8"
    x, target = torch.randn(3, 200), torch.tensor([156, 1, 2]).to(torch.uint8)
    wanted = F.cross_entropy(x, target.long(), reduction='none')
    assert_close(cross_entropy(x, target, reduction='none'), wanted)
    if kind == torch.int8: assert cross_entropy(x, target.to(kind), reduction='none')[0] == 0


@pytest.mark.parametrize('kind', [torch.int64, torch.int8, torch.bool])
def test_scores_are_floats(kind):
    x = torch.tensor([[1, 0, 1]]).to(kind)
    for f in logsumexp, log_softmax, lambda x: cross_entropy(x, torch.tensor([0])):
        with pytest.raises(TypeError, match=r'scores are floats.*x\.float'): f(x)


@given(rest=st.lists(st.integers(1, 4), max_size=3).map(tuple), classes=st.integers(1, 5), seed=seeds)
def test_accuracy(rest, classes, seed):
    x = logits(class_shapes(classes, rest), torch.float32, 1., seed)
    target = torch.randint(classes, rest, generator=gen(seed))
    wanted = (x.argmax(1 if rest else 0) == target).double().mean().item()
    assert float(accuracy(x, target)) == pytest.approx(wanted)


def test_accuracy_does_not_broadcast():
    with pytest.raises(ValueError, match=r'\(4, 1\) would broadcast to \(4,\)'):
        accuracy(torch.ones(4, 3), torch.ones(4, 1))


# Samplers, data sets, collate

@given(n=st.integers(0, 30), size=st.integers(1, 10), drop=st.booleans(), shuffle=st.booleans(), seed=st.integers(0, 9))
def test_batch_sampler(n, size, drop, shuffle, seed):
    def make(): return BatchSampler(Sampler(range(n), shuffle, gen(seed)), size, drop)
    lists = list(make())
    assert lists == list(theirs.BatchSampler(Sampler(range(n), shuffle, gen(seed)), size, drop))
    assert len(lists) == len(make())


def test_bad_batch_size():
    for size in 0, -1:
        with pytest.raises(ValueError, match='at least 1'): BatchSampler([1], size)


def test_sampler_with_a_generator_goes_on_as_pytorchs():
    ours, peer = Sampler(range(9), True, gen(3)), theirs.RandomSampler(range(9), generator=gen(3))
    for _ in range(3): assert list(ours) == list(peer)


def test_sampler_reads_the_length_anew():
    data = [1, 2]
    s = Sampler(data)
    data.append(3)
    assert list(s) == [0, 1, 2] and len(s) == 3


@pytest.mark.parametrize('i', [2, -1, slice(1, 3), [0, 2], torch.tensor([2, 0]), torch.tensor([True, False] * 2)],
                         ids=str)
def test_dataset_index(i):
    ds = Dataset(torch.arange(8.).view(4, 2), torch.arange(4))
    assert torch.equal(ds[i][0], ds.x[i]) and torch.equal(ds[i][1], ds.y[i])


@pytest.mark.parametrize('positions', [[2, 0, 2], [-1, 0], torch.tensor([3, 1]), range(2), []], ids=str)
def test_several_at_once_are_the_samples(positions):
    ds = Dataset(torch.arange(8.).view(4, 2), torch.arange(4))
    rows = ds.__getitems__(list(positions))
    assert len(rows) == len(positions)
    for row, i in zip(rows, positions): assert all(map(torch.equal, row, ds[i]))
    if len(positions): assert all(map(torch.equal, collate(rows), theirs.default_collate(rows)))


@pytest.mark.parametrize('kind', [np.int8, np.int32, np.uint8])
def test_positions_of_any_whole_type(kind):
    ds = Dataset(torch.arange(200), torch.arange(200))
    last = -1 if np.issubdtype(kind, np.signedinteger) else 199
    assert ds.__getitems__(np.array([1, last], kind)).batch[0].tolist() == [1, 199]


@pytest.mark.parametrize('positions', [[True, False], [.5, 1.]])
def test_positions_are_whole_numbers(positions):
    with pytest.raises(TypeError, match='positions are whole numbers'):
        Dataset(torch.ones(2), torch.ones(2)).__getitems__(positions)


@pytest.mark.parametrize('x, y', [(torch.ones(2), torch.ones(3)), (torch.ones(()), torch.ones(1)),
                                  (torch.ones(0, 2), torch.ones(1))])
def test_dataset_lengths(x, y):
    with pytest.raises(ValueError, match='a target for each input'): Dataset(x, y)


def test_dataset_of_arrays_and_lists():
    ds = Dataset(np.ones((3, 2), np.float32), [0, 1, 2])
    assert ds.x.dtype == torch.float32 and ds[1][1] == 1 and ds.y.dtype == torch.int64
    with pytest.raises((TypeError, ValueError)): Dataset(['a', 'b'], [0, 1])


class Negated(Dataset):
    def __getitem__(self, i): return -self.x[i], self.y[i]


def test_a_subclass_that_changes_samples_is_asked_for_each():
    assert not Negated(torch.ones(2), torch.ones(2)).__getitems__
    class Fast(Negated):
        def __getitems__(self, positions): return [self[i] for i in positions]
    assert Fast(torch.ones(2), torch.ones(2)).__getitems__([0])[0][0] == -1
    class Back(Fast):
        def __getitem__(self, i): return self.x[i], self.y[i]
    assert not Back.__getitems__


def test_a_mixin_is_not_passed_over():
    class Mix:
        def __init_subclass__(cls, tag):
            super().__init_subclass__()
            cls.tag = tag
        def __getitem__(self, i): return -super().__getitem__(i)[0], i
    class Mixed(Mix, Dataset, tag='a'): pass
    assert not Mixed.__getitems__
    class Both(Dataset, Mix, tag='b'): pass
    assert Both.__getitems__ and Both.tag == 'b'


Pair = namedtuple('Pair', 'a b')
leaves = st.sampled_from([
    lambda i: i, lambda i: i / 3, lambda i: i % 2 == 0, lambda i: str(i), lambda i: bytes([i]),
    lambda i: torch.full((2, 3), i),
    lambda i: torch.tensor(i, dtype=torch.float16), lambda i: np.full(2, i, np.int16), lambda i: np.float32(i),
    lambda i: np.int64(i), lambda i: np.float64(i), lambda i: np.array(i, np.uint8)])
structures = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=3).map(lambda fs: lambda i: [f(i) for f in fs]),
    st.lists(inner, min_size=1, max_size=3).map(lambda fs: lambda i: tuple(f(i) for f in fs)),
    st.tuples(inner, inner).map(lambda fs: lambda i: Pair(*(f(i) for f in fs))),
    st.dictionaries(st.sampled_from('abc'), inner, min_size=1).map(
        lambda d: lambda i: {k: f(i) for k, f in d.items()})),
    max_leaves=5)


def agree(a, b, sample):
    if isinstance(b, torch.Tensor): assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for k in b: agree(a[k], b[k], sample[k])
    elif isinstance(sample, (str, bytes)): assert a == list(b)
    else:
        assert type(a) is type(sample) and len(a) == len(b)
        for p, q, s in zip(a, b, sample): agree(p, q, s)


@settings(deadline=None, max_examples=200)
@given(make=structures, n=st.integers(1, 4))
def test_collate(make, n):
    samples = [make(i) for i in range(n)]
    agree(collate(samples), theirs.default_collate(samples), samples[0])


@pytest.mark.parametrize('samples, error, message', [
    ([torch.ones(2), torch.ones(3)], ValueError, r'\[\(2,\), \(3,\)\]; resize'),
    ([(1, 2), (1,)], ValueError, r'different lengths: \[1, 2\]'), ([dict(a=1), dict(b=1)], ValueError, 'keys differ'),
    ([None], TypeError, 'NoneType'), ([np.array(['a'])], TypeError, ''),
    ([dict(a=object())], TypeError, 'object')])
def test_collate_errors(samples, error, message):
    with pytest.raises(error, match=message): collate(samples)


def test_collate_ordered_dict():
    assert list(collate([OrderedDict(b=1, a=2)] * 2)) == ['b', 'a']


def test_pickles():
    ds = Dataset(torch.arange(4.), torch.arange(4))
    for o in ds, Sampler(ds), BatchSampler(Sampler(range(3)), 2): assert type(pickle.loads(pickle.dumps(o))) is type(o)


# The loop

class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.modes = nn.Parameter(torch.zeros(2)), []
    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled(), len(x)))
        return x + self.w


def in_fours(ds): return [ds[i:i + 4] for i in range(0, len(ds), 4)]


def test_fit_weights_by_size():
    torch.manual_seed(0)
    x, y = torch.randn(10, 2), torch.randint(2, (10,))
    dl, model = in_fours(Dataset(x, y)), Shift()
    rows = fit(2, model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.), dl, dl, accuracy)
    wanted = F.cross_entropy(x, y).item(), F.cross_entropy(x, y).item(), (x.argmax(1) == y).float().mean().item()
    for r in rows: assert r == pytest.approx(wanted, abs=1e-6)
    train, valid = [(True, True, n) for n in (4, 4, 2)], [(False, False, n) for n in (4, 4, 2)]
    assert model.modes[:6] == train + valid
    assert rows[0]._fields == ('train_loss', 'valid_loss', 'metric') and all(type(v) is float for r in rows for v in r)


def test_fit_takes_any_metric_or_none_and_any_function():
    w = torch.zeros(2, requires_grad=True)
    dl = in_fours(Dataset(torch.ones(5, 2), torch.zeros(5)))
    def loss(p, t): return (p - 1).square().mean()
    def model(x): return x * w
    rows = fit(3, model, loss, torch.optim.SGD([w], lr=.5), dl, dl)
    assert rows[-1].valid_loss < rows[0].valid_loss and all(math.isnan(r.metric) for r in rows)
    row, = fit(1, model, loss, torch.optim.SGD([w], lr=.5), dl, dl, lambda p, t: len(t))
    assert row.metric == pytest.approx((16 + 1) / 5)


def test_fit_is_the_plain_loop():
    ds = Dataset(torch.arange(20.).view(10, 2) / 10, torch.arange(10) % 2)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    a.weight.grad = torch.full((2, 2), 100.)
    fit(2, a, cross_entropy, torch.optim.SGD(a.parameters(), lr=.1), in_fours(ds), in_fours(ds))
    opt = torch.optim.SGD(b.parameters(), lr=.1)
    for _ in range(2):
        for xb, yb in in_fours(ds):
            opt.zero_grad()
            cross_entropy(b(xb), yb).backward()
            opt.step()
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


@pytest.mark.parametrize('mode', [True, False])
def test_fit_leaves_the_mode(mode):
    dl = in_fours(Dataset(torch.ones(3, 2), torch.tensor([0, 1, 0])))
    model = Shift().train(mode)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    assert fit(0, model, cross_entropy, opt, dl, dl) == []
    fit(1, model, cross_entropy, opt, dl, dl)
    assert model.training is mode
    wrong = in_fours(Dataset(torch.ones(3, 2), torch.tensor([0, 1, 5])))
    with pytest.raises(ValueError): fit(1, model, cross_entropy, opt, dl, wrong)
    assert model.training is mode


@pytest.mark.parametrize('which', ['train_dl', 'valid_dl'])
def test_fit_wants_batches(which):
    full, model = in_fours(Dataset(torch.ones(3, 2), torch.tensor([0, 1, 0]))), Shift()
    dls = dict(train_dl=full, valid_dl=full) | {which: []}
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    with pytest.raises(ValueError, match='a loader gave no batch'): fit(1, model, cross_entropy, opt, **dls)


def test_weights_of_another_type_and_options_that_are_wrong():
    scores, target = torch.randn(6, 3), torch.arange(6) % 3
    for weight in torch.tensor([1, 2, 3]), torch.tensor([1., 2., 3.], dtype=torch.float64):
        loss = cross_entropy(scores, target, weight)
        assert loss.dtype == torch.float32
        assert_close(loss, F.cross_entropy(scores, target, weight.float()))
    for kw in dict(label_smoothing=2.), dict(label_smoothing=-1.), dict(reduction='avg'):
        with pytest.raises(ValueError, match="'mean', 'sum' or 'none' and smoothing 0 to 1"):
            cross_entropy(scores, target, **kw)


def test_a_loss_in_half_precision_is_averaged_in_single():
    model = nn.Linear(1, 1, bias=False).half()
    x, y = torch.zeros(512, 1).half(), torch.full((512, 1), 200.).half()
    opt = torch.optim.SGD(model.parameters(), lr=0.)
    assert fit(1, model, lambda out, y: (out - y).abs().mean(), opt, [(x, y)], [(x, y)])[0].train_loss == 200
