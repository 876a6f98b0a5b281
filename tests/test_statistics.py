"RunningStats against NumPy in float64 and torch.var_mean: batches, dimensions, dtypes, orders of merging, far means."
import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.testing import assert_close

from dlfound.statistics import RunningStats

quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from([*floats, torch.uint8, torch.int8, torch.int64, torch.bool])
kept = st.lists(st.integers(1, 4), max_size=2)
sizes = st.lists(st.integers(0, 7), min_size=1, max_size=6)
seeds = st.integers(0, 2**31)


def numbers(shape, dtype, seed, mean=0.):
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool: return torch.rand(shape, generator=g) > .5
    if not dtype.is_floating_point: return torch.randint(0, 100, shape, generator=g).to(dtype)
    return (torch.randn(shape, generator=g, dtype=torch.float64) + mean).to(dtype)


def check(stats, whole, dim, **tolerance):
    "Number, mean, variance and standard deviation are NumPy's, for both corrections"
    a = whole.double().numpy()
    axis = tuple(range(a.ndim)) if dim is None else dim
    want = torch.as_tensor(a.mean(axis=axis))
    assert stats.n == a.size // want.numel() and stats.mean.shape == want.shape
    assert_close(stats.mean, want, **tolerance)
    for correction in 0, 1:
        if stats.n <= correction:
            assert stats.var(correction).isnan().all() and stats.std(correction).shape == want.shape
        else:
            assert_close(stats.var(correction), torch.as_tensor(a.var(axis=axis, ddof=correction)), **tolerance)
            assert_close(stats.std(correction), torch.as_tensor(a.std(axis=axis, ddof=correction)), **tolerance)


@given(sizes, kept, dtypes, seeds)
@quick
def test_batches_of_any_size_and_type(sizes, kept, dtype, seed):
    batches = [numbers((n, *kept), dtype, seed + i) for i, n in enumerate(sizes)]
    for dim in (0,), None:
        stats = RunningStats(dim=None if dim is None else 0)
        for b in batches: assert stats.update(b) is stats
        if sum(sizes): check(stats, torch.cat(batches), dim, rtol=1e-10, atol=1e-12)
        else: assert stats.n == 0


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data(), seeds)
@quick
def test_any_dimensions(shape, data, seed):
    axes = st.integers(-len(shape), len(shape) - 1)
    dims = data.draw(st.lists(axes, min_size=1, max_size=4, unique_by=lambda d: d % len(shape)))
    batches = [numbers(shape, torch.float32, seed + i) for i in range(3)]
    stats = RunningStats(dim=tuple(dims))
    for b in batches: stats.update(b)
    together = torch.stack(batches)  # the batches in a dimension of their own, averaged over too
    axis = (0, *(d % len(shape) + 1 for d in dims))
    check(stats, together, axis, rtol=1e-10, atol=1e-12)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), seeds, st.data())
@quick
def test_merging_in_any_order(sizes, seed, data):
    batches = [numbers((n, 2), torch.float64, seed + i, mean=10. * i) for i, n in enumerate(sizes)]
    parts = [RunningStats(dim=0).update(b) for b in batches] + [RunningStats(dim=0)]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        other = copy.deepcopy(parts[i + 1])
        assert parts[i].merge(parts[i + 1]) is parts[i]
        gone = parts.pop(i + 1)
        assert gone.n == other.n
        assert not gone.n or torch.equal(gone.mean, other.mean) and torch.equal(gone.var(0), other.var(0))
    check(parts[0], torch.cat(batches), 0, rtol=1e-10, atol=1e-10)


@given(st.floats(0, 12), st.floats(-3, 3), st.integers(1, 50), seeds)
@quick
def test_no_digits_lost_far_from_zero(distance, spread, size, seed):
    "The error grows with the first power of mean/std, where the textbook formula's grows with the second"
    x = numbers((200,), torch.float64, seed) * 10**spread
    x = x + 10**distance * 10**spread
    stats = RunningStats()
    for b in x.split(size): stats.update(b)
    want = np.var(np.asarray(x, dtype=np.longdouble))
    assert abs(float(stats.var(0)) / float(want) - 1) < 64 * 2**-53 * max(10**distance, 10)


@given(st.floats(0, 4), st.integers(1, 50), seeds)
@quick
def test_float32_statistics(distance, size, seed):
    x = numbers((200,), torch.float32, seed, mean=10**distance)
    stats = RunningStats(dtype=torch.float32)
    for b in x.split(size): stats.update(b)
    assert stats.mean.dtype == stats.var().dtype == torch.float32
    want = np.var(x.double().numpy())
    assert abs(float(stats.var(0)) / want - 1) < 64 * 2**-24 * max(10**distance, 10)


def test_agrees_with_torch_on_a_large_batch():
    x = torch.randn(64, 3, 20, 20)
    stats = RunningStats(dim=(0, 2, 3)).update(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    assert_close((stats.var(), stats.mean), (var, mean), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('dim', [None, (), 0, -1])
def test_a_single_number(dim):
    stats = RunningStats(dim)
    for v in 2., 4., 9.: stats.update(torch.tensor(v))
    assert (stats.n, stats.mean, stats.var(0), stats.var()) == (3, 5, torch.tensor(26 / 3, dtype=torch.float64), 13)


def test_without_axes_means_all_axes_as_in_torch():
    x = torch.randn(3, 4)
    assert_close(RunningStats(()).update(x).var(), x.double().var(()))


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(bad):
    stats = RunningStats().update(torch.tensor([1., bad])).update(torch.ones(5))
    assert not stats.mean.isfinite() and stats.var().isnan()


@pytest.mark.parametrize('shape', [(0, 3), (5, 0), (0,)])
def test_an_empty_batch_changes_nothing(shape):
    stats = RunningStats(dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert stats.update(torch.zeros(shape)).n == 0
        assert stats.update(torch.ones(4, 2)).update(torch.zeros(shape)).n == 4


def test_overflowing_half_precision_does_not():
    x = torch.full((1000,), 60_000, dtype=torch.float16)
    stats = RunningStats().update(x)
    assert stats.mean == 59_968 or stats.mean == 60_000
    assert stats.var() == 0


def test_no_graph_is_kept_and_inputs_are_left_alone():
    x = torch.randn(5, 2, requires_grad=True)
    before = x.detach().clone()
    stats = RunningStats(dim=0).update(x)
    mean = stats.mean
    kept = mean.clone()
    stats.update(x + 1).merge(RunningStats(dim=0).update(x))
    assert not stats.mean.requires_grad and torch.equal(x, before) and torch.equal(mean, kept)


def test_an_empty_one_takes_over_what_it_merges_without_sharing_it():
    a, b = RunningStats(), RunningStats().update(torch.arange(4.))
    a.merge(b).update(torch.ones(3))
    assert (a.n, b.n, b.mean) == (7, 4, 1.5)
    assert (b.merge(RunningStats()).n, b.mean) == (4, 1.5)
    c = RunningStats().merge(b)
    for m in c.mean, b.mean: m.add_(100)  # what one asked for is one's own
    assert (c.mean, b.mean) == (1.5, 1.5)


@pytest.mark.parametrize('first, then', [
    ((5, 3), (5, 1)), ((5, 1), (5, 3)), ((5, 3), (5, 4)), ((5, 3), (5, 3, 2)), ((5,), (5, 2))])
def test_other_shapes_are_refused_and_change_nothing(first, then):
    stats = RunningStats(dim=0).update(torch.randn(first))
    mean = stats.mean.clone()
    with pytest.raises(ValueError, match='cannot be joined'): stats.update(torch.randn(then))
    with pytest.raises(ValueError, match='cannot be joined'): stats.merge(RunningStats(dim=0).update(torch.randn(then)))
    assert stats.n == 5 and torch.equal(stats.mean, mean)


def test_statistics_over_other_dimensions_are_refused_and_change_nothing():
    x = torch.randn(3, 3)
    stats = RunningStats(0).update(x)
    with pytest.raises(ValueError, match='over dim 0 cannot be merged .* dim 1'): stats.merge(RunningStats(1).update(x))
    for other in 3, x, None:
        with pytest.raises(TypeError, match='merge takes RunningStats, got'): stats.merge(other)
    assert stats.n == 3 and torch.equal(stats.mean, x.double().mean(0))


def test_what_has_no_answer():
    stats = RunningStats()
    for ask in (lambda: stats.mean, stats.var, stats.std, lambda: stats.var(0)):
        with pytest.raises(RuntimeError, match='call update'): ask()
    with pytest.raises(TypeError, match='complex64'): stats.update(torch.zeros(2, dtype=torch.complex64))
    for x in [1., 2.], np.ones(3), 3., None:
        with pytest.raises(TypeError, match='update takes a tensor, got'): stats.update(x)
    for dtype in torch.int64, torch.float16, torch.bfloat16, torch.complex64:
        with pytest.raises(ValueError, match='use float32 or float64, not'): RunningStats(dtype=dtype)
    with pytest.raises(IndexError): RunningStats(dim=3).update(torch.zeros(2))


def test_prints_itself_shortly():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert repr(RunningStats()) == 'RunningStats(n=0, shape=())'
        assert repr(RunningStats().update(torch.tensor([1., 3.]))) == 'RunningStats(n=2, mean=2, std=1.414)'
        assert repr(RunningStats().update(torch.tensor([3.]))) == 'RunningStats(n=1, mean=3, std=nan)'
        assert repr(RunningStats(dim=0).update(torch.zeros(4, 300))) == 'RunningStats(n=4, shape=(300,))'


def test_statistics_are_float32_where_there_is_no_float64():
    "MPS has no float64; a CPU tensor that says it is there stands in for one"
    class Named(torch.Tensor):
        @property
        def device(self): return torch.device('mps')
    x = torch.randn(6).as_subclass(Named)
    assert RunningStats().update(x).mean.dtype == torch.float32
