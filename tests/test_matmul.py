"Products equal torch's for any shape, dtype and layout, and say what is wrong with others; bench counts as it should."
import math
from operator import matmul

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import dlfound.matmul
from dlfound.matmul import (Timing, bench, matmul_broadcast, matmul_einsum, matmul_elementwise, matmul_lists,
                            matmul_loops)

products = [matmul_loops, matmul_lists, matmul_elementwise, matmul_broadcast, matmul_einsum]
every = pytest.mark.parametrize('product', products, ids=lambda f: f.__name__)
sizes = st.integers(0, 9)


def plain(t): return t
def transposed(t): return t.t().contiguous().t()
def strided(t): return t.new_zeros(2 * t.shape[0], 3 * t.shape[1])[::2, ::3].copy_(t)
def offset(t): return torch.cat([t.new_ones(2, t.shape[1]), t])[2:]
def stretched(t): return t[:, :1].expand(t.shape)


layouts = st.sampled_from([plain, transposed, strided, offset, stretched])


@every
@settings(deadline=None, max_examples=150)
@given(n=sizes, k=sizes, m=sizes, left=layouts, right=layouts, seed=st.integers(0, 999),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.int32, torch.int64, torch.complex64]))
def test_equals_torch(product, n, k, m, dtype, left, right, seed):
    g = torch.Generator().manual_seed(seed)
    def make(*shape):
        if dtype.is_floating_point or dtype.is_complex: return torch.randn(*shape, generator=g, dtype=dtype)
        return torch.randint(-50, 50, shape, generator=g, dtype=dtype)
    a, b = left(make(n, k)), right(make(k, m))
    before = a.clone(), b.clone()
    c = product(a, b)
    assert_close(c, a @ b, rtol=1e-5, atol=1e-5)
    assert c.shape == (n, m) and c.dtype == dtype and c.is_contiguous()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(product, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(3, 8).to(dtype), torch.randn(8, 2).to(dtype)
    assert product(a, b).dtype == dtype
    assert_close(product(a, b).float(), a.float() @ b.float(), rtol=0, atol=8 * torch.finfo(dtype).eps * 3)


@every
def test_double_keeps_its_digits(product):
    torch.manual_seed(0)
    a, b = torch.randn(4, 300, dtype=torch.float64), torch.randn(300, 3, dtype=torch.float64)
    assert_close(product(a, b), a @ b, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_travel(product, bad):
    a, b = torch.tensor([[bad, 1.], [2., 3.]]), torch.tensor([[1., -1.], [4., 5.]])
    assert_close(product(a, b), a @ b, equal_nan=True)


@pytest.mark.parametrize('product', [p for p in products if p is not matmul_lists], ids=lambda f: f.__name__)
def test_gradients(product):
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (4, 2)))
    assert torch.autograd.gradcheck(product, (a, b))


@every
@pytest.mark.parametrize('left, right', [((2, 3), (2, 3)), ((2, 3), (4, 1)), ((0, 3), (0, 3)), ((2, 0), (1, 2))])
def test_inner_sizes(product, left, right):
    with pytest.raises(ValueError) as e: product(torch.ones(left), torch.ones(right))
    assert str(left) in str(e.value) and str(right) in str(e.value)


@every
@pytest.mark.parametrize('left, right', [((3,), (3, 2)), ((2, 3), (3,)), ((), (3, 2)), ((4, 2, 3), (4, 3, 2)),
                                         ((3,), (3,))])
def test_not_a_matrix(product, left, right):
    with pytest.raises(ValueError) as e: product(torch.ones(left), torch.ones(right))
    assert str(left) in str(e.value) and str(right) in str(e.value) and 'matrices' in str(e.value)


@every
def test_other_operands(product):
    with pytest.raises(TypeError, match='float32.*float64'): product(torch.ones(2, 2), torch.ones(2, 2).double())
    with pytest.raises(TypeError, match='list.*torch.tensor'): product([[1.]], torch.ones(1, 1))
    with pytest.raises(TypeError, match='ndarray'): product(torch.ones(1, 1), torch.ones(1, 1).numpy())


class Clock:
    "A clock that moves only when it is told to, and by a little when it is read"
    def __init__(self): self.now, self.read = 0., 1e-7
    def __call__(self):
        self.now += self.read
        return self.now


@pytest.fixture
def clock(monkeypatch):
    c = Clock()
    monkeypatch.setattr(dlfound.matmul, 'perf_counter', c)
    return c


def worker(clock, durations):
    "A function that takes the given seconds, the last of them for ever; it counts its calls"
    def f():
        clock.now += durations[min(f.calls, len(durations) - 1)]
        f.calls += 1
    f.calls = 0
    return f


@pytest.mark.parametrize('seconds', [1e-7, 3.3e-6, 1e-3, .02])
def test_bench_finds_the_time(clock, seconds):
    f = worker(clock, [seconds])
    t = bench(f)
    assert t.median == pytest.approx(seconds, rel=.01) and t.spread < .01 * seconds
    assert clock.now < 2 + .05


def test_bench_forgets_the_first_call(clock):
    assert bench(worker(clock, [1., 1e-3])).median == pytest.approx(1e-3, rel=.01)


def test_bench_blocks(clock):
    f = worker(clock, [.02])
    bench(f, repeat=5)
    assert f.calls == 1 + 5
    f = worker(clock, [1e-3])
    bench(f, repeat=4, min_time=.1)
    assert 4 * 100 <= f.calls <= 4 * 150 + 50


def test_bench_shrugs_off_a_disturbance(clock):
    f = worker(clock, [.02] * 3 + [9.] + [.02])
    assert bench(f, max_time=60).median == pytest.approx(.02, rel=.01)


def test_bench_spread(clock):
    t = bench(worker(clock, [0, .11, .12, .13, .14, .15]), repeat=5, max_time=60)
    assert t.median == pytest.approx(.13) and t.spread == pytest.approx(.01, rel=1e-3)


@pytest.mark.parametrize('seconds, calls', [(5., 1), (1.5, 2), (.9, 3), (.38, 6)])
def test_bench_is_patient_but_not_for_ever(clock, seconds, calls):
    f = worker(clock, [seconds])
    t = bench(f)
    assert f.calls == calls and t.median == pytest.approx(seconds)
    assert math.isnan(t.spread) == (calls < 3)


def test_bench_wants_a_block():
    with pytest.raises(ValueError, match='repeat=0'): bench(lambda: None, repeat=0)


def test_bench_lets_errors_through():
    with pytest.raises(ZeroDivisionError): bench(lambda: 1 / 0)


@pytest.mark.parametrize('timing, text', [
    ((.00123, .00004), '1.23 ms ± 0.04 ms'), ((12.3456e-6, 1e-7), '12.3 µs ± 0.1 µs'),
    ((123.4e-9, 2.6e-9), '123 ns ± 3 ns'), ((2., math.nan), '2.00 s ± ?'), ((.9996, .1), '1.00 s ± 0.10 s'),
    ((.9994, .1), '999 ms ± 100 ms'), ((9.996e-3, 0), '10.0 ms ± 0.0 ms'), ((99.96e-3, 0), '100 ms ± 0 ms'),
    ((1e-3, 0), '1.00 ms ± 0.00 ms'), ((4e-10, 0), '0.40 ns ± 0.00 ns'), ((0., 0.), '0.00 ns ± 0.00 ns'),
    ((7200., 60.), '7200 s ± 60 s')])
def test_timing_reads_well(timing, text):
    assert repr(Timing(*timing)) == text


def test_ladder_is_one_family():
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    for f in (*products, matmul): assert_close(f(a, b), torch.full((2, 2), 3.))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_that_are_too_large_wrap_as_in_torch(dtype):
    most = torch.iinfo(dtype).max
    a, b = torch.tensor([[most, most], [2, most]], dtype=dtype), torch.tensor([[3, most], [2, 5]], dtype=dtype)
    for f in matmul_loops, matmul_lists: assert torch.equal(f(a, b), a @ b)
