"Losses and collate equal PyTorch's; the loader gives PyTorch's batches, the same from any number of workers, and says what is wrong."
import gc
import math
import pickle
import random
import time
import traceback
import warnings
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

from dlfound.minibatch import BatchSampler, DataLoader, Dataset, Sampler, accuracy, collate, cross_entropy, fit, log_softmax, logsumexp, nll

floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
leading = st.lists(st.integers(0, 4), max_size=3).map(tuple)
scales = st.sampled_from([0., 1e-6, 1., 100., 1e4])


def logits(shape, dtype, scale, seed, strange=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    if strange and x.numel(): x.view(-1)[::3] = -math.inf
    return x.to(dtype)


def near(a, b, **kw):
    "Close; in half precision, where PyTorch's own kernels are some units in the last place off, less so"
    loose = dict(rtol=4 * torch.finfo(b.dtype).eps, atol=torch.finfo(b.dtype).eps) if b.dtype.itemsize < 4 else {}
    assert_close(a, b, **loose, **kw)


def layouts(x):
    "The same numbers, contiguous, transposed and strided"
    yield x
    if x.ndim > 1: yield x.transpose(0, 1).contiguous().transpose(0, 1)
    if x.ndim: yield torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


@settings(deadline=None, max_examples=200)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data(), dtype=st.sampled_from(floats), scale=scales, seed=st.integers(0, 99), keepdim=st.booleans(), strange=st.booleans())
def test_logsumexp(shape, data, dtype, scale, seed, keepdim, strange):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = logits(shape, dtype, scale, seed, strange)
    expected = torch.logsumexp(x.float() if dtype.itemsize < 4 else x, dim, keepdim).to(dtype)
    for y in layouts(x): assert_close(logsumexp(y, dim, keepdim), expected)


@pytest.mark.parametrize('row', [[math.inf, 1], [-math.inf, -math.inf], [math.nan, 1], [math.inf, -math.inf], [1e38, 1e38], [-1e38, -3e38], [5.]])
def test_logsumexp_of_strange_rows(row):
    x = torch.tensor(row)
    assert_close(logsumexp(x), torch.logsumexp(x, -1), equal_nan=True)
    assert_close(log_softmax(x), F.log_softmax(x, -1), equal_nan=True)


@settings(deadline=None, max_examples=200)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data(), dtype=st.sampled_from(floats), scale=scales, seed=st.integers(0, 99))
def test_log_softmax(shape, data, dtype, scale, seed):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = logits(shape, dtype, scale, seed)
    for y in layouts(x): near(log_softmax(y, dim), F.log_softmax(x, dim))
    if dtype.itemsize < 4: assert_close(log_softmax(x, dim), F.log_softmax(x.double(), dim).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_log_softmax_keeps_its_digits():
    x = torch.tensor([1e4, 1e4 - 1, -1e4], dtype=torch.float32)
    assert_close(log_softmax(x), F.log_softmax(x.double(), -1).float(), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=200)
@given(shape=leading, classes=st.integers(1, 6), dtype=st.sampled_from(floats), scale=scales, seed=st.integers(0, 99), labels=st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_cross_entropy(shape, classes, dtype, scale, seed, labels):
    x = logits((*shape, classes), dtype, scale, seed).requires_grad_()
    y = x.detach().clone().requires_grad_()
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed)).to(labels)
    ours = cross_entropy(x, target)
    expected = F.cross_entropy((y.float() if dtype.itemsize < 4 else y).reshape(-1, classes), target.reshape(-1).long()).to(dtype)
    near(ours, expected, equal_nan=True)
    if not target.numel(): return
    ours.backward()
    expected.backward()
    near(x.grad, y.grad)


@settings(deadline=None, max_examples=100)
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), data=st.data(), dtype=st.sampled_from(floats), scale=scales, seed=st.integers(0, 99), f=st.sampled_from(['logsumexp', 'log_softmax']))
def test_gradients_of_logarithms(shape, data, dtype, scale, seed, f):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    ours, theirs_f = {'logsumexp': (logsumexp, torch.logsumexp), 'log_softmax': (log_softmax, F.log_softmax)}[f]
    for x in layouts(logits(shape, dtype, scale, seed)):
        x, y = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
        a, b = ours(x, dim), theirs_f(y.float() if dtype.itemsize < 4 else y, dim).to(dtype)
        arriving = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
        a.backward(arriving)
        b.backward(arriving)
        near(x.grad, y.grad)


@settings(deadline=None, max_examples=100)
@given(shape=leading.filter(lambda s: 0 not in s), classes=st.integers(1, 6), dtype=st.sampled_from(floats[:2]), seed=st.integers(0, 99))
def test_nll(shape, classes, dtype, seed):
    x = logits((*shape, classes), dtype, 1., seed).requires_grad_()
    y, target = x.detach().clone().requires_grad_(), torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    ours, expected = nll(x, target), F.nll_loss(y.reshape(-1, classes), target.reshape(-1))
    near(ours, expected)
    ours.backward()
    expected.backward()
    near(x.grad, y.grad)


def test_cross_entropy_for_images():
    x, target = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    assert_close(cross_entropy(x.movedim(1, -1), target), F.cross_entropy(x, target))


@pytest.mark.parametrize('f', [logsumexp, log_softmax])
def test_second_derivatives(f):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))


def test_masked_logits_have_gradients():
    x = torch.tensor([[1., -math.inf, 2.]], requires_grad=True)
    cross_entropy(x, torch.tensor([2])).backward()
    assert x.grad.isfinite().all() and x.grad[0, 1] == 0


@pytest.mark.parametrize('x, target, error, message', [
    (torch.ones(2, 3), torch.tensor([0]), ValueError, r'\(2,\), got labels of shape \(1,\)'),
    (torch.ones(2, 3), torch.tensor([[0], [1]]), ValueError, 'squeeze'),
    (torch.ones(2, 3), torch.tensor([0, 3]), ValueError, 'from 0 to 2, got 0 to 3'),
    (torch.ones(2, 3), torch.tensor([0, -1]), ValueError, 'got -1 to 0'),
    (torch.ones(2, 3), torch.tensor([0., 1.]), TypeError, 'float32.*long'),
    (torch.ones(2, 3), torch.tensor([True, False]), TypeError, 'bool'),
    (torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1]), TypeError, r'int64.*float\(\)')])
def test_unfit_labels(x, target, error, message):
    with pytest.raises(error, match=message): cross_entropy(x, target)


@given(shape=leading.filter(lambda s: 0 not in s), classes=st.integers(1, 5), seed=st.integers(0, 99))
def test_accuracy(shape, classes, seed):
    x, target = logits((*shape, classes), torch.float32, 1., seed), torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    assert float(accuracy(x, target)) == pytest.approx((x.argmax(-1) == target).double().mean().item())


def test_accuracy_does_not_broadcast():
    with pytest.raises(ValueError, match=r'\(4,\), got \(4, 1\)'): accuracy(torch.ones(4, 3), torch.ones(4, 1))


# Data sets that workers import

class Noisy(theirs.Dataset):
    "Position and a number from each generator that is seeded for a batch"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return i, random.random(), np.random.rand(), torch.rand(2)


class NoisyBatches(Noisy):
    "PyTorch's protocol for several samples at once"
    def __getitems__(self, positions): return [(i, float(np.random.rand())) for i in positions]


class NoisyWhole(Noisy):
    "What it gives for a list of positions is a batch"
    def __getitem__(self, positions): return torch.tensor(positions), torch.rand(len(positions)), np.random.rand(len(positions))


class Failing(theirs.Dataset):
    def __init__(self, error, bad=3): self.error, self.bad = error, bad
    def __len__(self): return 6
    def __getitem__(self, i):
        if i == self.bad: self.fail()
        return i
    def fail(self): raise self.error


class Odd(Exception):
    "Cannot be made from one message"
    def __init__(self, a, b): super().__init__(a, b)


class Negated(Dataset):
    def __getitem__(self, i): return -self.x[i], self.y[i]


class Lengthless:
    def __getitem__(self, i): return i * 10


class NoisyStream(theirs.IterableDataset):
    "Numbers that workers share out batch by batch, each with noise"
    def __init__(self, n, size=1): self.n, self.size = n, size
    def __iter__(self):
        info = theirs.get_worker_info()
        me, workers = (info.id, info.num_workers) if info else (0, 1)
        for i in range(self.n):
            if i // self.size % workers == me: yield i, torch.rand(())


class CountedStream(NoisyStream):
    def __len__(self): return self.n


class Marked(Noisy):
    mark = 0
    def __getitem__(self, i): return i, self.mark


def mark_worker(number): theirs.get_worker_info().dataset.mark = number + 7


def noisy_collate(samples): return torch.tensor([s[0] for s in samples]), torch.rand(3), random.random()


def flat(batches):
    "Every number in the batches, so that two epochs can be compared at once"
    def numbers(b):
        if isinstance(b, torch.Tensor): return b.flatten().tolist()
        if isinstance(b, np.ndarray): return b.flatten().tolist()
        if isinstance(b, dict): return [n for v in b.values() for n in numbers(v)]
        return [n for v in b for n in numbers(v)] if isinstance(b, (list, tuple)) else [b]
    return [numbers(b) for b in batches]


def gen(seed): return torch.Generator().manual_seed(seed)


starts = [m for m in ('fork', 'forkserver', 'spawn') if m in torch.multiprocessing.get_all_start_methods()]
cases = dict(
    samples=lambda **kw: DataLoader(Noisy(10), 4, shuffle=True, **kw),
    several=lambda **kw: DataLoader(NoisyBatches(10), 4, shuffle=True, **kw),
    whole=lambda **kw: DataLoader(NoisyWhole(10), None, sampler=BatchSampler(Sampler(range(10), True, kw['generator']), 4), **kw),
    collated=lambda **kw: DataLoader(Noisy(10), 4, shuffle=True, collate_fn=noisy_collate, **kw),
    tensors=lambda **kw: DataLoader(Dataset(torch.arange(10.), torch.arange(10)), 4, shuffle=True, **kw),
    drop_last=lambda **kw: DataLoader(Noisy(10), 4, shuffle=True, drop_last=True, **kw),
    torch_sampler=lambda **kw: DataLoader(Noisy(10), 4, sampler=theirs.WeightedRandomSampler(torch.arange(1., 11), 10, generator=kw['generator']), **kw),
    batch_sampler=lambda **kw: DataLoader(Noisy(10), batch_sampler=[[1, 2], [3], [9, 0, 4]], **kw),
    single=lambda **kw: DataLoader(Noisy(5), None, **kw),
    stream=lambda **kw: DataLoader(NoisyStream(8, 2), 2, **kw),
)


@pytest.mark.parametrize('case', cases)
def test_any_number_of_workers(case):
    make, epochs = cases[case], []
    for workers in 0, 1, 2, 3:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.manual_seed(workers)
            loader = make(num_workers=workers, generator=gen(1))
            epochs.append((flat(loader), flat(loader)))
    assert all(e == epochs[0] for e in epochs)
    assert case in ('batch_sampler', 'tensors', 'single') or epochs[0][0] != epochs[0][1]
    assert flat(make(generator=gen(2))) != epochs[0][0] or case == 'batch_sampler'


@pytest.mark.parametrize('start', starts)
def test_start_methods(start):
    for make in cases['samples'], cases['tensors'], cases['stream']:
        assert flat(make(num_workers=1, generator=gen(1), multiprocessing_context=start)) == flat(make(generator=gen(1)))


@pytest.mark.parametrize('case', ['samples', 'stream'])
def test_persistent_workers(case):
    alone, kept = cases[case](generator=gen(1)), cases[case](num_workers=2, generator=gen(1), persistent_workers=True)
    for _ in range(3): assert flat(alone) == flat(kept)
    next(iter(alone)), next(iter(kept))
    assert flat(alone) == flat(kept)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_global_generators_are_left_alone(workers):
    def state(): return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state().tolist()
    loader = DataLoader(Noisy(10), 4, shuffle=True, num_workers=workers, generator=gen(3))
    np.random.randn()
    before = state()
    for _ in loader: assert state() == before
    assert state() == before


@pytest.mark.parametrize('kind', [np.random.MT19937, np.random.PCG64])
@pytest.mark.parametrize('drawn', [0, 1, 2])
def test_numpys_generator_comes_back(kind, drawn):
    "Whichever it is, the second number of a pair of normal ones included; and it does not change what is loaded"
    usual = np.random.get_bit_generator()
    def three(load):
        np.random.set_bit_generator(kind(5))
        np.random.randn(drawn)
        batches = flat(DataLoader(Noisy(6), 2, generator=gen(3))) if load else []
        return [*np.random.randn(2), np.random.rand()], batches
    try:
        with_it, batches = three(True)
        assert with_it == three(False)[0]
        assert np.random.get_bit_generator().__class__ is kind
    finally: np.random.set_bit_generator(usual)
    assert batches == flat(DataLoader(Noisy(6), 2, generator=gen(3)))


class Nested(Noisy):
    "Reads a loader of its own between two draws"
    def __getitem__(self, i):
        first = random.random(), np.random.randn(), torch.rand(())
        flat(DataLoader(Noisy(2), 2, generator=gen(i)))
        return (*first, random.random(), np.random.randn(), torch.rand(()))


class Sixfold(Noisy):
    "The draws of `Nested`, with nothing between them"
    def __getitem__(self, i): return random.random(), np.random.randn(), torch.rand(()), random.random(), np.random.randn(), torch.rand(())


def test_scopes_may_be_nested():
    assert flat(DataLoader(Nested(4), 2, generator=gen(0))) == flat(DataLoader(Sixfold(4), 2, generator=gen(0)))


def test_the_global_generator_moves_alike():
    def after(workers):
        torch.manual_seed(0)
        first = flat(DataLoader(Noisy(10), 4, shuffle=True, num_workers=workers))
        return first, torch.rand(3).tolist()
    assert after(0) == after(1) == after(2)


def test_training_does_not_disturb_loading():
    def epoch(workers):
        torch.manual_seed(0)
        batches = []
        for b in DataLoader(Noisy(10), 4, shuffle=True, num_workers=workers):
            batches.append(b)
            torch.rand(5 + len(batches))
        return flat(batches)
    assert epoch(0) == epoch(2)


def test_order_is_drawn_when_the_epoch_begins():
    def first(workers):
        torch.manual_seed(0)
        batches = iter(DataLoader(Noisy(10), 4, shuffle=True, num_workers=workers))
        torch.manual_seed(99)
        return flat([next(batches)])
    assert first(0) == first(1)


def test_batches_of_an_epoch_differ():
    noise = [b[1] for b in flat(DataLoader(Noisy(40), 1))]
    assert len(set(noise)) == len(noise) == 40


def test_an_error_puts_the_generators_back():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    batches = iter(DataLoader(Failing(ValueError('no')), 6, generator=gen(0)))
    with pytest.raises(ValueError): next(batches)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('case', ['samples', 'tensors', 'drop_last', 'stream'])
def test_resume_from_any_batch(case, workers):
    def make(): return cases[case](num_workers=workers, generator=gen(4))
    whole = flat(make())
    for start in range(len(whole) + 2): assert flat(make().batches(start)) == whole[start:]
    loader = make()
    list(loader.batches(1))
    again = make()
    list(again)
    assert flat(loader) == flat(again)


def test_resume_does_not_make_what_it_skips():
    assert flat(DataLoader(Failing(ValueError('no'), bad=0), 2).batches(1)) == [[2, 3], [4, 5]]


# Against PyTorch's loader

@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 40), size=st.integers(1, 12), shuffle=st.booleans(), drop=st.booleans(), seed=st.integers(0, 99),
       shape=st.sampled_from([(), (3,), (2, 0), (2, 3)]), x=st.sampled_from([torch.float32, torch.float16, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.uint16]), plain=st.booleans())
def test_equals_torch(n, size, shuffle, drop, seed, shape, x, plain):
    xs = torch.arange(n * max(1, math.prod(shape)))[:n * math.prod(shape)].reshape(n, *shape).to(x)
    ds = (theirs.TensorDataset if plain else Dataset)(xs, torch.arange(n))
    def epochs(kind):
        torch.manual_seed(seed)
        loader = kind(ds, size, shuffle=shuffle and n > 0, drop_last=drop)
        return [list(loader), list(loader)], len(loader), torch.rand(2)
    (a, len_a, rand_a), (b, len_b, rand_b) = epochs(DataLoader), epochs(theirs.DataLoader)
    assert len_a == len_b and torch.equal(rand_a, rand_b)
    for ours, peer in zip(a, b, strict=True):
        assert len(ours) == len(peer) == len_a
        for p, q in zip(ours, peer): assert all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(p, q, strict=True))


def test_same_seed_generator_gives_torchs_order():
    ds = Dataset(torch.arange(20.), torch.arange(20))
    a, b = (flat(kind(ds, 6, shuffle=True, generator=gen(8))) for kind in (DataLoader, theirs.DataLoader))
    assert a == b


def test_stands_for_torchs():
    ds = Dataset(torch.arange(9.), torch.arange(9))
    dl = DataLoader(ds, 4, True, None, None, 0, drop_last=True, generator=gen(0), pin_memory=False, timeout=0)
    assert isinstance(dl, theirs.DataLoader) and isinstance(ds, theirs.Dataset)
    assert dl.dataset is ds and dl.batch_size == 4 and dl.drop_last and len(dl) == 2 and dl.num_workers == 0 and isinstance(dl.sampler, Sampler)
    assert [len(y) for _, y in dl] == [4, 4]
    assert [len(y) for _, y in theirs.DataLoader(ds, batch_sampler=BatchSampler(Sampler(ds), 4))] == [4, 4, 1]
    assert len(ds + ds) == 18


def test_subclasses_are_not_passed_over():
    ds = Negated(torch.arange(1., 5), torch.arange(4))
    assert flat(DataLoader(ds, 4)) == [[-1, -2, -3, -4, 0, 1, 2, 3]]
    class Backwards(Sampler):
        def __iter__(self): return reversed(range(len(self)))
    plain = Dataset(torch.arange(4.), torch.arange(4))
    assert flat(DataLoader(plain, 3, sampler=Backwards(plain))) == [[3, 2, 1, 3, 2, 1], [0, 0]]
    class Fast(Dataset):
        def __getitems__(self, positions): return [(torch.tensor(0.), torch.tensor(p)) for p in positions]
    assert flat(DataLoader(Fast(torch.ones(3), torch.ones(3)), 3)) == [[0, 0, 0, 0, 1, 2]]


def test_positions_from_elsewhere():
    ds = Dataset(torch.arange(4.), torch.arange(4))
    assert flat(DataLoader(ds, 2, sampler=[-1, 0, 2])) == [[3, 0, 3, 0], [2, 2]]
    assert flat(DataLoader(ds, batch_sampler=[[], [1]])) == [[], [1, 1]]
    assert flat(DataLoader(ds, 2, sampler=torch.tensor([1, 3]))) == [[1, 3, 1, 3]]
    with pytest.raises((IndexError, RuntimeError), match='out of'): list(DataLoader(ds, 2, sampler=[4]))
    names = DataLoader({'a': 1, 'b': 2}, 2, sampler=['b', 'a'])
    assert flat(names) == [[2, 1]]


def test_gradients_flow_to_the_data():
    x = torch.arange(4.).requires_grad_()
    sum(xb.sum() * (i + 1) for i, (xb, _) in enumerate(DataLoader(Dataset(x, torch.arange(4)), 2))).backward()
    assert x.grad.tolist() == [1, 1, 2, 2]


def test_attributes_may_change():
    dl = DataLoader(Noisy(4), 2)
    dl.collate_fn = noisy_collate
    assert len(next(iter(dl))) == 3
    dl.num_workers = 1
    assert flat(dl)[0][:2] == [0, 1]


# Odd data sets

@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('ds', [Noisy(0), Dataset(torch.ones(0, 2), torch.ones(0)), theirs.TensorDataset(torch.ones(0))], ids=['samples', 'ours', 'TensorDataset'])
@pytest.mark.parametrize('shuffle', [False, True])
def test_empty(ds, shuffle, workers):
    for drop in False, True:
        dl = DataLoader(ds, 4, shuffle=shuffle, num_workers=workers, drop_last=drop)
        assert len(dl) == 0 and list(dl) == []


@pytest.mark.parametrize('ds', [Noisy(3), Dataset(torch.ones(3, 2), torch.ones(3))], ids=['samples', 'ours'])
def test_shorter_than_a_batch(ds):
    assert [len(b[0]) for b in DataLoader(ds, 4, shuffle=True)] == [3]
    assert list(DataLoader(ds, 4, shuffle=True, drop_last=True)) == []


def test_without_length():
    for shuffle in False, True:
        with pytest.raises(TypeError, match='Lengthless has no __len__.*IterableDataset'): DataLoader(Lengthless(), 2, shuffle=shuffle)
    for workers in 0, 1: assert flat(DataLoader(Lengthless(), 2, sampler=[3, 1, 2], num_workers=workers)) == [[30, 10], [20]]


@pytest.mark.parametrize('workers', [0, 1])
def test_streams(workers):
    def sizes(n, *args, **kw): return [len(b[0]) for b in DataLoader(NoisyStream(n, 2), *args, num_workers=workers, **kw)]
    assert sizes(5, 2) == [2, 2, 1] and sizes(5, 2, drop_last=True) == [2, 2] and sizes(0, 2) == [] and sizes(1, 4) == [1]
    assert [b[0] for b in DataLoader(NoisyStream(3), None, num_workers=workers)] == [0, 1, 2]
    assert len(DataLoader(CountedStream(5), 2, num_workers=workers)) == 3
    with pytest.raises(TypeError): len(DataLoader(NoisyStream(5), 2))
    with pytest.raises(ValueError, match='shuffle'): DataLoader(NoisyStream(5), 2, shuffle=True)


def test_streams_are_read_lazily():
    class Endless(theirs.IterableDataset):
        def __iter__(self):
            i = 0
            while True: yield (i := i + 1)
    assert next(iter(DataLoader(Endless(), 3))).tolist() == [1, 2, 3]
    endless = DataLoader(range(10), 2, sampler=Endless())
    assert next(iter(DataLoader(Dataset(torch.arange(9.), torch.arange(9)), 2, sampler=Endless())))[1].tolist() == [1, 2]
    assert next(iter(endless)).tolist() == [1, 2]


# Errors

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('error, kind', [(ValueError('broken file'), ValueError), (KeyError('broken file'), KeyError), (OSError(2, 'broken file'), Exception), (Odd(1, 'broken file'), Exception), (RuntimeError('broken file'), RuntimeError)], ids=lambda e: getattr(e, '__name__', type(e).__name__))
def test_errors_show_their_own_traceback(error, kind, workers):
    with pytest.raises(kind) as e: list(DataLoader(Failing(error), 2, num_workers=workers))
    text = ''.join(traceback.format_exception(e.value))
    assert 'broken file' in text and 'in fail' in text and 'sample 3 of the data set' in text and type(error).__name__ in text


@pytest.mark.parametrize('workers', [0, 1])
def test_stop_iteration_does_not_end_the_epoch(workers):
    with pytest.raises(RuntimeError, match='StopIteration'): list(DataLoader(Failing(StopIteration()), 2, num_workers=workers))


def test_an_error_that_cannot_be_sent():
    class Local(Exception): pass
    for workers, kind in (0, Local), (1, RuntimeError):
        with pytest.raises(kind, match='broken file') as e: list(DataLoader(Failing(Local('broken file')), 2, num_workers=workers))
        assert 'in fail' in ''.join(traceback.format_exception(e.value))


def test_workers_end_with_the_error():
    start = time.perf_counter()
    with pytest.raises(ValueError): list(DataLoader(Failing(ValueError('no')), 2, num_workers=2))
    gc.collect()
    assert time.perf_counter() - start < 4.5


def test_an_error_in_collate_fn():
    for workers in 0, 1:
        with pytest.raises(TypeError, match='NoneType'): list(DataLoader([None, None], 2, num_workers=workers))


def test_batches_before_the_error_arrive():
    for workers in 0, 2:
        seen = []
        with pytest.raises(ValueError):
            for b in DataLoader(Failing(ValueError('no')), 2, num_workers=workers): seen.append(b.tolist())
        assert seen == [[0, 1]]


@pytest.mark.parametrize('bad, error, message', [
    (dict(batch_sise=2), TypeError, 'batch_sise'), (dict(batch_size=0), ValueError, 'batch_size'), (dict(batch_size=2.5), ValueError, 'batch_size'),
    (dict(shuffle=True, sampler=[1]), ValueError, 'mutually exclusive'), (dict(batch_size=2, batch_sampler=[[1]]), ValueError, 'mutually exclusive'),
    (dict(batch_sampler=[[1]], shuffle=True), ValueError, 'mutually exclusive'), (dict(num_workers=-1), ValueError, 'num_workers'),
    (dict(persistent_workers=True), ValueError, 'num_workers'), (dict(prefetch_factor=2), ValueError, 'num_workers'),
    (dict(num_workers=1, multiprocessing_context='threads'), ValueError, 'threads'), (dict(batch_size=None, drop_last=True), ValueError, 'drop_last')])
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=message): DataLoader(Noisy(4), **bad)


def test_arguments_reach_the_workers():
    dl = DataLoader(Marked(6), 2, num_workers=2, worker_init_fn=mark_worker, prefetch_factor=1, timeout=60, in_order=True)
    assert sorted({b[1].tolist()[0] for b in dl}) == [7, 8]
    with pytest.raises(RuntimeError, match='timed out'): list(DataLoader(Slow(), 1, num_workers=1, timeout=.2))


class Slow(Noisy):
    def __init__(self): super().__init__(2)
    def __getitem__(self, i): time.sleep(1)


def test_pin_memory_without_workers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert flat(DataLoader(Noisy(4), 2, pin_memory=True, generator=gen(0))) == flat(DataLoader(Noisy(4), 2, generator=gen(0)))


def test_pickles():
    ds = Dataset(torch.arange(4.), torch.arange(4))
    for o in ds, Sampler(ds), BatchSampler(Sampler(range(3)), 2): assert type(pickle.loads(pickle.dumps(o))) is type(o)


# Samplers, data sets, collate

@given(n=st.integers(0, 30), size=st.integers(1, 10), drop=st.booleans(), shuffle=st.booleans(), seed=st.integers(0, 9))
def test_batch_sampler(n, size, drop, shuffle, seed):
    def make(): return BatchSampler(Sampler(range(n), shuffle, gen(seed)), size, drop)
    lists = list(make())
    assert lists == list(theirs.BatchSampler(Sampler(range(n), shuffle, gen(seed)), size, drop))
    assert len(lists) == len(make())


@pytest.mark.parametrize('size', [0, -1, 2.5, True, None, '3'])
def test_bad_batch_size(size):
    with pytest.raises(ValueError, match='whole number'): BatchSampler([1], size)


def test_sampler_reads_the_length_anew():
    data = [1, 2]
    s = Sampler(data)
    data.append(3)
    assert list(s) == [0, 1, 2] and len(s) == 3


@pytest.mark.parametrize('i', [2, -1, slice(1, 3), [0, 2], torch.tensor([2, 0]), torch.tensor([True, False, True, False])], ids=str)
def test_dataset_index(i):
    ds = Dataset(torch.arange(8.).view(4, 2), torch.arange(4))
    assert torch.equal(ds[i][0], ds.x[i]) and torch.equal(ds[i][1], ds.y[i])


@pytest.mark.parametrize('x, y', [(torch.ones(2), torch.ones(3)), (torch.ones(()), torch.ones(1)), (torch.ones(0, 2), torch.ones(1))])
def test_dataset_lengths(x, y):
    with pytest.raises(ValueError, match='a target for every input'): Dataset(x, y)


Pair = namedtuple('Pair', 'a b')
leaves = st.sampled_from([lambda i: i, lambda i: i / 3, lambda i: i % 2 == 0, lambda i: str(i), lambda i: bytes([i]), lambda i: torch.full((2, 3), i),
                          lambda i: torch.tensor(i, dtype=torch.float16), lambda i: np.full(2, i, np.int16), lambda i: np.float32(i), lambda i: np.int64(i), lambda i: np.float64(i), lambda i: np.array(i, np.uint8)])
structures = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=3).map(lambda fs: lambda i: [f(i) for f in fs]), st.lists(inner, min_size=1, max_size=3).map(lambda fs: lambda i: tuple(f(i) for f in fs)),
    st.tuples(inner, inner).map(lambda fs: lambda i: Pair(*(f(i) for f in fs))), st.dictionaries(st.sampled_from('abc'), inner, min_size=1).map(lambda d: lambda i: {k: f(i) for k, f in d.items()})), max_leaves=5)


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
    ([torch.ones(2), torch.ones(3)], ValueError, r'\[\(2,\), \(3,\)\]; resize'), ([(1, 2), (1,)], ValueError, r'one length, got \[1, 2\]'),
    ([dict(a=1), dict(b=1)], ValueError, 'same keys'), ([None], TypeError, 'NoneType.*collate_fn'), ([np.array(['a'])], TypeError, 'ndarray'), ([dict(a=object())], TypeError, 'object'),
    ([np.ones(2), np.ones(3)], ValueError, 'one shape')])
def test_collate_errors(samples, error, message):
    with pytest.raises(error, match=message): collate(samples)


def test_collate_ordered_dict():
    assert list(collate([OrderedDict(b=1, a=2)] * 2)) == ['b', 'a']


# The loop

class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.modes = nn.Parameter(torch.zeros(2)), []
    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled(), len(x)))
        return x + self.w


def test_fit_weights_by_size():
    torch.manual_seed(0)
    x, y = torch.randn(10, 2), torch.randint(2, (10,))
    dl = DataLoader(Dataset(x, y), 4)
    model = Shift()
    rows = fit(2, model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.), dl, dl)
    for r in rows: assert r == pytest.approx((F.cross_entropy(x, y).item(), F.cross_entropy(x, y).item(), (x.argmax(1) == y).float().mean().item()), abs=1e-6)
    assert model.modes[:6] == [(True, True, 4), (True, True, 4), (True, True, 2), (False, False, 4), (False, False, 4), (False, False, 2)]
    assert rows[0]._fields == ('train_loss', 'valid_loss', 'accuracy') and all(type(v) is float for r in rows for v in r)


def test_fit_is_the_plain_loop():
    def data(): return DataLoader(Dataset(torch.arange(20.).view(10, 2) / 10, torch.arange(10) % 2), 4, shuffle=True, generator=gen(1))
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    a.weight.grad = torch.full((2, 2), 100.)
    fit(2, a, cross_entropy, torch.optim.SGD(a.parameters(), lr=.1), data(), theirs.DataLoader(Dataset(torch.ones(1, 2), torch.tensor([0]))))
    opt, dl = torch.optim.SGD(b.parameters(), lr=.1), data()
    for _ in range(2):
        for xb, yb in dl:
            opt.zero_grad()
            cross_entropy(b(xb), yb).backward()
            opt.step()
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


@pytest.mark.parametrize('mode', [True, False])
def test_fit_leaves_the_mode(mode):
    dl = DataLoader(Dataset(torch.ones(3, 2), torch.tensor([0, 1, 0])), 2)
    model = Shift().train(mode)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    assert fit(0, model, cross_entropy, opt, dl, dl) == []
    fit(1, model, cross_entropy, opt, dl, dl)
    assert model.training is mode
    with pytest.raises(ValueError): fit(1, model, cross_entropy, opt, dl, DataLoader(Dataset(torch.ones(3, 2), torch.tensor([0, 1, 5])), 2))
    assert model.training is mode


@pytest.mark.parametrize('which', ['train_dl', 'valid_dl'])
def test_fit_wants_batches(which):
    full, model = DataLoader(Dataset(torch.ones(3, 2), torch.tensor([0, 1, 0])), 2), Shift()
    dls = dict(train_dl=full, valid_dl=full) | {which: DataLoader(full.dataset, 4, drop_last=True)}
    with pytest.raises(ValueError, match=f'no batch from {which}'): fit(1, model, cross_entropy, torch.optim.SGD(model.parameters(), lr=.1), **dls)
