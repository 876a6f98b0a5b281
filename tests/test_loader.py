"The loader gives PyTorch's batches, seeded ones the same from any number of workers, and says what is wrong."
import math
import random
import traceback
import warnings

import numpy as np
import pytest
import torch
import torch.utils.data as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import no_workers

from dlfound.loader import DataLoader, DataLoaders, open_batches, seeded
from dlfound.minibatch import BatchSampler, Dataset, Sampler, collate


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
    def __getitem__(self, positions):
        n = len(positions)
        return torch.tensor(positions), torch.rand(n), np.random.rand(n)


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


class Stream(theirs.IterableDataset):
    "Numbers that workers share out batch by batch"
    def __init__(self, n, size=1): self.n, self.size = n, size
    def __iter__(self):
        info = theirs.get_worker_info()
        me, workers = (info.id, info.num_workers) if info else (0, 1)
        for i in range(self.n):
            if i // self.size % workers == me: yield i, i * 10


class CountedStream(Stream):
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


def noisy(**kw): return DataLoader(Noisy(10), 4, shuffle=True, **kw)


starts = [m for m in ('fork', 'forkserver', 'spawn') if m in torch.multiprocessing.get_all_start_methods()]
small = Dataset(torch.arange(10.), torch.arange(10))
cases = dict(
    samples=noisy,
    several=lambda **kw: DataLoader(NoisyBatches(10), 4, shuffle=True, **kw),
    whole=lambda **kw: DataLoader(
        NoisyWhole(10), None, sampler=BatchSampler(Sampler(range(10), True, kw['generator']), 4), **kw),
    collated=lambda **kw: noisy(collate_fn=noisy_collate, **kw),
    tensors=lambda **kw: DataLoader(small, 4, shuffle=True, **kw),
    subset=lambda **kw: DataLoader(theirs.Subset(small, [3, 1, 4, 1, 5]), 2, shuffle=True, **kw),
    drop_last=lambda **kw: noisy(drop_last=True, **kw),
    torch_sampler=lambda **kw: DataLoader(
        Noisy(10), 4, sampler=theirs.WeightedRandomSampler(torch.arange(1., 11), 10, generator=kw['generator']), **kw),
    batch_sampler=lambda **kw: DataLoader(Noisy(10), batch_sampler=[[1, 2], [3], [9, 0, 4]], **kw),
    single=lambda **kw: DataLoader(Noisy(5), None, **kw))


# Seeded batches

@pytest.mark.parametrize('case', cases)
def test_any_number_of_workers(case):
    make, epochs = cases[case], []
    for workers in 0, 1, 2, 3:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.manual_seed(workers)
            loader = make(num_workers=workers, generator=gen(1), seeded=True)
            epochs.append((flat(loader), flat(loader)))
    assert all(e == epochs[0] for e in epochs)
    assert case in ('batch_sampler', 'tensors', 'single') or epochs[0][0] != epochs[0][1]
    assert flat(make(generator=gen(2), seeded=True)) != epochs[0][0] or case == 'batch_sampler'


def test_seeds_are_for_workers_unless_they_are_asked_for():
    assert [noisy(num_workers=n, seeded=s).seeded for n, s in ((0, None), (2, None), (0, True), (2, False))] == [
        False, True, True, False]
    one, two = (flat(noisy(num_workers=n, generator=gen(1), seeded=False)) for n in (1, 2))
    assert one != two
    with pytest.raises(ValueError, match='stream'): DataLoader(Stream(3), 2, seeded=True)


@pytest.mark.parametrize('start', starts)
def test_start_methods(start):
    for make in cases['samples'], cases['tensors']:
        with_worker = flat(make(num_workers=1, generator=gen(1), multiprocessing_context=start))
        assert with_worker == flat(make(generator=gen(1), seeded=True))


def test_persistent_workers_end_with_their_loader():
    import multiprocessing
    dl = noisy(num_workers=1, persistent_workers=True)
    list(dl)
    assert multiprocessing.active_children()
    del dl
    assert no_workers()


def test_persistent_workers():
    alone, kept = noisy(generator=gen(1), seeded=True), noisy(num_workers=2, generator=gen(1), persistent_workers=True)
    for _ in range(3): assert flat(alone) == flat(kept)
    next(iter(alone)), next(iter(kept))
    assert flat(alone) == flat(kept)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_global_generators_are_left_alone(workers):
    def state(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loader = noisy(num_workers=workers, generator=gen(3), seeded=True)
    np.random.randn(2)
    before = state()
    for _ in loader: assert state() == before
    assert state() == before


@pytest.mark.parametrize('kind', [np.random.MT19937, np.random.PCG64])
def test_numpys_generator_comes_back(kind):
    "Whichever it is; and it does not change what is loaded"
    usual = np.random.get_bit_generator()
    def three(load):
        np.random.set_bit_generator(kind(5))
        batches = flat(DataLoader(Noisy(6), 2, generator=gen(3), seeded=True)) if load else []
        return [*np.random.randn(2), np.random.rand()], batches
    try:
        with_it, batches = three(True)
        assert with_it == three(False)[0]
        assert np.random.get_bit_generator().__class__ is kind
    finally: np.random.set_bit_generator(usual)
    assert batches == flat(DataLoader(Noisy(6), 2, generator=gen(3), seeded=True))


class Nested(Noisy):
    "Reads a loader of its own between two draws"
    def __getitem__(self, i):
        first = random.random(), np.random.rand(), torch.rand(())
        flat(DataLoader(Noisy(2), 2, generator=gen(i), seeded=True))
        return (*first, random.random(), np.random.rand(), torch.rand(()))


class Sixfold(Noisy):
    "The draws of `Nested`, with nothing between them"
    def __getitem__(self, i):
        return random.random(), np.random.rand(), torch.rand(()), random.random(), np.random.rand(), torch.rand(())


def test_scopes_may_be_nested():
    a, b = (flat(DataLoader(kind(4), 2, generator=gen(0), seeded=True)) for kind in (Nested, Sixfold))
    assert a == b


def test_three_generators_three_streams():
    "What NumPy and PyTorch draw from one seed has nothing to do with each other"
    with seeded(5): a, b, c = [random.random() for _ in range(500)], np.random.rand(500), torch.rand(500).numpy()
    corr = np.corrcoef([a, b, c])
    assert abs(corr - np.eye(3)).max() < .2


def test_the_global_generator_moves_alike():
    def after(workers):
        torch.manual_seed(0)
        first = flat(noisy(num_workers=workers, seeded=True))
        return first, torch.rand(3).tolist()
    assert after(0) == after(1) == after(2)


def test_training_does_not_disturb_loading():
    def epoch(workers):
        torch.manual_seed(0)
        batches = []
        for b in noisy(num_workers=workers, seeded=True):
            batches.append(b)
            torch.rand(5 + len(batches))
        return flat(batches)
    assert epoch(0) == epoch(2)


def test_batches_of_an_epoch_differ():
    noise = [b[1] for b in flat(DataLoader(Noisy(40), 1, seeded=True))]
    assert len(set(noise)) == len(noise) == 40


def test_an_error_puts_the_generators_back():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    batches = iter(DataLoader(Failing(ValueError('no')), 6, generator=gen(0), seeded=True))
    with pytest.raises(ValueError): next(batches)
    assert torch.equal(torch.rand(2), expected)


# From any batch on

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('case', ['samples', 'tensors', 'drop_last', 'subset'])
def test_resume_from_any_batch(case, workers):
    def make(): return cases[case](num_workers=workers, generator=gen(4), seeded=True)
    whole = flat(make())
    for start in range(len(whole) + 2): assert flat(make().batches(start)) == whole[start:]
    loader = make()
    list(loader.batches(1))
    again = make()
    list(again)
    assert flat(loader) == flat(again)


@pytest.mark.parametrize('kw', [{}, dict(seeded=True), dict(num_workers=1)], ids=str)
def test_length_from_a_batch_on(kw):
    for ds in small, Noisy(10):
        for start, left in (0, 3), (2, 1), (5, 0): assert len(DataLoader(ds, 4, **kw).batches(start)) == left
        with pytest.raises(ValueError, match='from 0 on, got -1'): DataLoader(ds, 4, **kw).batches(-1)


def test_what_is_skipped_is_not_made():
    for seeded in True, False:
        dl = DataLoader(Failing(ValueError('no'), bad=0), 2, seeded=seeded)
        assert flat(dl.batches(1)) == [[2, 3], [4, 5]]


@pytest.mark.parametrize('make', [
    lambda: DataLoader(Stream(9), 2), lambda: theirs.DataLoader(small, 2), lambda: list(range(5)),
    lambda: noisy(num_workers=1, seeded=False, generator=gen(0)), lambda: DataLoader(small, 2)])
def test_open_batches_of_any_loader(make):
    whole = flat(make())
    for start in range(len(whole) + 1):
        with open_batches(make(), start) as batches: assert flat(batches) == whole[start:]


def test_open_batches_ends_workers():
    import multiprocessing
    for kind in DataLoader, theirs.DataLoader:
        with pytest.raises(KeyError), open_batches(kind(small, 2, num_workers=2)) as batches:
            next(batches)
            raise KeyError
        assert no_workers()
    bad = Failing(KeyError(), bad=0)
    for dl in theirs.DataLoader(bad, 2, num_workers=2), DataLoader(bad, 2, num_workers=2, seeded=False):
        with pytest.raises(KeyError) as kept_error, open_batches(dl, 1): pass
        assert kept_error and no_workers()
    kept = DataLoader(small, 2, num_workers=1, persistent_workers=True)
    for _ in range(2):
        with open_batches(kept) as batches: next(batches)
        assert len(multiprocessing.active_children()) == 1


# Against PyTorch's loader

kinds = [torch.float32, torch.float16, torch.uint8, torch.bool, torch.complex64, torch.float64]
try: kinds += [torch.ones(1, dtype=torch.uint16).index_select(0, torch.tensor([0])).dtype]
except RuntimeError: pass # PyTorch 2.6 has no index_select for it


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 40), size=st.integers(1, 12), shuffle=st.booleans(), drop=st.booleans(),
       seed=st.integers(0, 99), shape=st.sampled_from([(), (3,), (2, 0), (2, 3)]), x=st.sampled_from(kinds),
       wrap=st.sampled_from('ours theirs subset plain'.split()))
def test_equals_torch(n, size, shuffle, drop, seed, shape, x, wrap):
    xs = torch.arange(n * max(1, math.prod(shape)))[:n * math.prod(shape)].reshape(n, *shape).to(x)
    ds = (theirs.TensorDataset if wrap == 'theirs' else Dataset)(xs, torch.arange(n))
    if wrap == 'subset': ds = theirs.Subset(ds, list(range(n)[::-1]))
    if wrap == 'plain': ds = [ds[i] for i in range(n)]
    def epochs(kind):
        torch.manual_seed(seed)
        loader = kind(ds, size, shuffle=shuffle and n > 0, drop_last=drop)
        return [list(loader), list(loader)], len(loader), torch.rand(2)
    (a, len_a, rand_a), (b, len_b, rand_b) = epochs(DataLoader), epochs(theirs.DataLoader)
    assert len_a == len_b and torch.equal(rand_a, rand_b)
    for ours, peer in zip(a, b, strict=True):
        assert len(ours) == len(peer) == len_a
        for p, q in zip(ours, peer):
            assert all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(p, q, strict=True))


@pytest.mark.parametrize('kw', [{}, dict(drop_last=True)], ids=str)
def test_same_seed_generator_gives_torchs_order(kw):
    a, b = (kind(small, 6, shuffle=True, generator=gen(8), **kw) for kind in (DataLoader, theirs.DataLoader))
    for _ in range(3): assert flat(a) == flat(b)


def test_unseeded_samples_draw_as_torchs_do():
    def epoch(kind):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        return flat(kind(Noisy(10), 4, shuffle=True))
    def peer(*args, **kw): return theirs.DataLoader(*args, collate_fn=collate, **kw)
    assert epoch(DataLoader) == epoch(peer)


def test_stands_for_torchs():
    dl = DataLoader(small, 4, True, None, None, 0, drop_last=True, generator=gen(0), pin_memory=False, timeout=0)
    assert isinstance(dl, theirs.DataLoader) and isinstance(small, theirs.Dataset)
    assert dl.dataset is small and dl.batch_size == 4 and dl.drop_last and len(dl) == 2 and dl.num_workers == 0
    assert isinstance(dl.sampler, Sampler) and [len(y) for _, y in dl] == [4, 4] and len(small + small) == 20
    assert [len(y) for _, y in theirs.DataLoader(small, batch_sampler=BatchSampler(Sampler(small), 4))] == [4, 4, 2]
    for kw in {}, dict(num_workers=1), dict(seeded=True):
        for ds in small, Noisy(10): assert len(iter(DataLoader(ds, 4, **kw))) == 3


def test_random_split_profits():
    one, two = theirs.random_split(small, [6, 4], generator=gen(0))
    [(x, y)] = DataLoader(two, 9)
    assert y.tolist() == list(two.indices) and [len(b[1]) for b in DataLoader(one, 4)] == [4, 2]


def test_subclasses_are_not_passed_over():
    ds = Negated(torch.arange(1., 5), torch.arange(4))
    assert flat(DataLoader(ds, 4)) == [[-1, -2, -3, -4, 0, 1, 2, 3]] == flat(theirs.DataLoader(ds, 4))
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
    for wrong in [True, False], [.5, 1.]:
        with pytest.raises(TypeError, match='whole numbers'): list(DataLoader(ds, 2, sampler=wrong))
    assert flat(DataLoader({'a': 1, 'b': 2}, 2, sampler=['b', 'a'])) == [[2, 1]]


def test_gradients_flow_to_the_data():
    x = torch.arange(4.).requires_grad_()
    sum(xb.sum() * (i + 1) for i, (xb, _) in enumerate(DataLoader(Dataset(x, torch.arange(4)), 2))).backward()
    assert x.grad.tolist() == [1, 1, 2, 2]


# Odd data sets

sets = [Noisy(0), Dataset(torch.ones(0, 2), torch.ones(0)), theirs.TensorDataset(torch.ones(0))]


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('ds', sets, ids=['samples', 'ours', 'TensorDataset'])
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
    with pytest.raises(TypeError, match='Lengthless.*no len'): list(DataLoader(Lengthless(), 2, shuffle=True))
    for workers in 0, 1:
        assert flat(DataLoader(Lengthless(), 2, sampler=[3, 1, 2], num_workers=workers)) == [[30, 10], [20]]


@pytest.mark.parametrize('workers', [0, 1])
def test_streams(workers):
    def sizes(n, *args, **kw): return [len(b[0]) for b in DataLoader(Stream(n, 2), *args, num_workers=workers, **kw)]
    assert sizes(5, 2) == [2, 2, 1] and sizes(5, 2, drop_last=True) == [2, 2]
    assert sizes(0, 2) == [] and sizes(1, 4) == [1]
    assert [b[0] for b in DataLoader(Stream(3), None, num_workers=workers)] == [0, 1, 2]
    assert len(DataLoader(CountedStream(5), 2, num_workers=workers)) == 3
    with pytest.raises(TypeError): len(DataLoader(Stream(5), 2))
    with pytest.raises(ValueError, match='shuffle'): DataLoader(Stream(5), 2, shuffle=True)


def test_streams_are_read_lazily():
    class Endless(theirs.IterableDataset):
        def __iter__(self):
            i = 0
            while True: yield (i := i + 1)
    assert next(iter(DataLoader(Endless(), 3))).tolist() == [1, 2, 3]
    assert next(iter(DataLoader(small, 2, sampler=Endless())))[1].tolist() == [1, 2]
    assert next(iter(DataLoader(range(10), 2, sampler=Endless()))).tolist() == [1, 2]


# Errors

errors = [ValueError('broken file'), KeyError('broken file'), OSError(2, 'broken file'), Odd(1, 'broken file')]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('error', errors, ids=lambda e: type(e).__name__)
def test_errors_show_their_own_traceback(error, workers):
    with pytest.raises(Exception) as e: list(DataLoader(Failing(error), 2, num_workers=workers))
    text = ''.join(traceback.format_exception(e.value))
    for words in 'broken file', 'in fail', 'sample 3 of the data set', type(error).__name__: assert words in text


@pytest.mark.parametrize('kw', [{}, dict(seeded=True), dict(num_workers=1)], ids=str)
def test_stop_iteration_does_not_end_the_epoch(kw):
    with pytest.raises(RuntimeError, match='StopIteration'): list(DataLoader(Failing(StopIteration()), 2, **kw))


@pytest.mark.parametrize('workers', [0, 1])
def test_stop_iteration_in_a_part_or_in_single_samples(workers):
    bad = Failing(StopIteration())
    for dl in (DataLoader(theirs.Subset(bad, range(6)), 2, num_workers=workers),
               DataLoader(bad, None, num_workers=workers)):
        with pytest.raises(RuntimeError, match='StopIteration'): list(dl)


def test_the_sample_of_a_part_is_named():
    for part in theirs.Subset(Failing(KeyError()), [1, 3]), theirs.Subset(theirs.Subset(Failing(KeyError()), [3]), [0]):
        with pytest.raises(KeyError) as e: list(DataLoader(part, 2))
        assert e.value.__notes__ == ['(sample 3 of the data set)']


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
    (dict(batch_sise=2), TypeError, 'batch_sise'), (dict(batch_size=0), ValueError, 'batch_size'),
    (dict(shuffle=True, sampler=[1]), ValueError, 'mutually exclusive'),
    (dict(batch_size=2.5), ValueError, 'batch_size'), (dict(num_workers=-1), ValueError, 'num_workers'),
    (dict(batch_size=2, batch_sampler=[[1]]), ValueError, 'mutually exclusive'),
    (dict(persistent_workers=True), ValueError, 'num_workers'), (dict(prefetch_factor=2), ValueError, 'num_workers'),
    (dict(num_workers=1, multiprocessing_context='threads'), ValueError, 'threads'),
    (dict(batch_size=None, drop_last=True), ValueError, 'drop_last')])
def test_bad_arguments(bad, error, message):
    with pytest.raises(error, match=message): DataLoader(Noisy(4), **bad)


class Slow(Noisy):
    def __init__(self): super().__init__(2)
    def __getitem__(self, i):
        import time
        time.sleep(1)


def test_arguments_reach_the_workers():
    for kw in {}, dict(seeded=False):
        dl = DataLoader(Marked(6), 2, num_workers=2, worker_init_fn=mark_worker, prefetch_factor=1, timeout=60, **kw)
        assert sorted({b[1].tolist()[0] for b in dl}) == [7, 8]
    with pytest.raises(RuntimeError, match='timed out'): list(DataLoader(Slow(), 1, num_workers=1, timeout=.2))


def test_pin_memory_without_workers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for kw in dict(seeded=True), {}:
            ds = Noisy(4) if kw else small
            pinned, plain = (flat(DataLoader(ds, 2, pin_memory=pin, generator=gen(0), **kw)) for pin in (True, False))
            assert pinned == plain


def test_data_loaders():
    dls = DataLoaders.from_datasets(small, small, 4, drop_last=True, generator=gen(0))
    assert len(dls.train) == 2 and len(dls.valid) == 2 and sum(len(y) for _, y in dls.valid) == 10
    assert DataLoaders.from_datasets(small).valid is None
