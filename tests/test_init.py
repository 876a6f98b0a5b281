"Every initializer against torch.nn.init: distribution, fans, gains, convolutions, generators, and what is refused."
import inspect
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from dlfound.init import (_fans, gain, kaiming_normal_, kaiming_uniform_, orthogonal_, xavier_normal_, xavier_uniform_)

named = ['linear', 'conv1d', 'conv2d', 'conv3d', 'conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d',
         'sigmoid', 'tanh', 'relu', 'leaky_relu', 'selu']
kaiming = {kaiming_normal_: nn.init.kaiming_normal_, kaiming_uniform_: nn.init.kaiming_uniform_}
xavier = {xavier_normal_: nn.init.xavier_normal_, xavier_uniform_: nn.init.xavier_uniform_}
peers = kaiming | xavier | {orthogonal_: nn.init.orthogonal_}
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
shapes = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple) # Linear weights, convolutions in up to 3
floats = st.sampled_from([torch.float32, torch.float64])
slopes = st.floats(-3, 3, allow_nan=False) | st.integers(-3, 3)
modes = st.sampled_from(['fan_in', 'fan_out', 'FAN_IN', 'Fan_Out'])
each = pytest.mark.parametrize('ours', list(peers), ids=lambda f: f.__name__)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def same(ours, theirs, shape, dtype, seed, **kw):
    "The result of ours, once it equals what PyTorch makes from an equal generator"
    a, b = (f(torch.empty(shape, dtype=dtype), **kw, generator=seeded(seed)) for f in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 if ours is orthogonal_ else 0)
    return a


def check_moments(w, std, uniform):
    "Mean, standard deviation, fourth moment and range are those of the distribution, within five standard errors"
    n, kurtosis = w.numel(), 1.8 if uniform else 3
    z = w.double() / std
    assert abs(z.mean()) < 5 / n**.5
    assert abs(z.square().mean() - 1) < 5 * ((kurtosis - 1) / n)**.5
    eighth = 81 / 9 if uniform else 105
    assert abs(z.pow(4).mean() - kurtosis) < 5 * ((eighth - kurtosis**2) / n)**.5
    if uniform: assert z.abs().max() <= 3**.5 * (1 + 1e-6) and z.abs().max() > 3**.5 * .999
    else: assert z.abs().max() > 3.5


@given(st.sampled_from(named), slopes | st.none())
@quick
def test_gain_is_pytorchs(name, param):
    assert gain(name) == nn.init.calculate_gain(name)
    assert gain(name, param) == pytest.approx(nn.init.calculate_gain(name, param), rel=1e-15)


@pytest.mark.parametrize('name, param', [('swish', None), ('', None), ('ReLU', None), (None, None), (['relu'], None),
                                         ('leaky_relu', True), ('leaky_relu', '0.1'), ('leaky_relu', torch.tensor(.1))])
def test_gain_refuses_what_pytorch_refuses(name, param):
    with pytest.raises(ValueError): nn.init.calculate_gain(name, param)
    with pytest.raises(ValueError, match='gain is known|must be a number'): gain(name, param)


@given(shapes)
@quick
def test_fans(shape):
    assert _fans(torch.empty(shape)) == nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


@given(st.sampled_from(list(kaiming)), shapes, floats, slopes, modes, st.sampled_from(named), st.integers(0, 2**31))
@quick
def test_kaiming_draws_pytorchs_numbers(ours, shape, dtype, a, mode, nonlinearity, seed):
    w = same(ours, kaiming[ours], shape, dtype, seed, a=a, mode=mode, nonlinearity=nonlinearity)
    assert w.dtype == dtype and w.shape == shape


@given(st.sampled_from(list(xavier)), shapes, floats, st.floats(0, 5), st.integers(0, 2**31))
@quick
def test_xavier_draws_pytorchs_numbers(ours, shape, dtype, factor, seed):
    same(ours, xavier[ours], shape, dtype, seed, gain=factor)


@given(shapes, floats, st.floats(-3, 3), st.integers(0, 2**31))
@quick
def test_orthogonal_draws_pytorchs_numbers(shape, dtype, factor, seed):
    w = same(orthogonal_, nn.init.orthogonal_, shape, dtype, seed, gain=factor).flatten(1).double()
    small = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    torch.testing.assert_close(small, factor**2 * torch.eye(len(small), dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('ours', list(kaiming), ids=lambda f: f.__name__)
@pytest.mark.parametrize('shape', [(300, 200), (100, 20, 5), (64, 32, 5, 5), (16, 8, 5, 5, 5)])
@pytest.mark.parametrize('mode', ['fan_in', 'fan_out'])
@pytest.mark.parametrize('name', named)
def test_kaiming_moments(ours, shape, mode, name):
    a = .3 if name == 'leaky_relu' else 0
    fan = math.prod(shape[2:]) * shape[mode == 'fan_in']
    w = ours(torch.empty(shape), a=a, mode=mode, nonlinearity=name, generator=seeded(1))
    check_moments(w, nn.init.calculate_gain(name, a) / fan**.5, ours is kaiming_uniform_)


@pytest.mark.parametrize('ours', list(xavier), ids=lambda f: f.__name__)
@pytest.mark.parametrize('shape', [(300, 200), (100, 20, 5), (64, 32, 5, 5), (16, 8, 5, 5, 5)])
@pytest.mark.parametrize('factor', [1, 5 / 3])
def test_xavier_moments(ours, shape, factor):
    fans = math.prod(shape[2:]) * (shape[0] + shape[1])
    weight = ours(torch.empty(shape), gain=factor, generator=seeded(1))
    check_moments(weight, factor * (2 / fans)**.5, ours is xavier_uniform_)


def test_orthogonal_is_uniform_over_rotations():
    "Entries have mean 0 and variance 1/n, and the diagonal is no likelier to be positive (the sign repair of the QR)"
    g = seeded()
    w = torch.stack([orthogonal_(torch.empty(4, 4), generator=g) for _ in range(4000)])
    assert w.mean(0).abs().max() < 5 * .5 / 4000**.5
    assert (w.square().mean(0) - .25).abs().max() < .025
    assert abs((torch.linalg.det(w) > 0).float().mean() - .5) < .05


@each
def test_signature_is_pytorchs(ours):
    mine, reference = (inspect.signature(f).parameters for f in (ours, peers[ours]))
    assert list(mine) == list(reference)
    assert [p.default for p in mine.values()] == [p.default for p in reference.values()]
    assert list(inspect.signature(gain).parameters) == list(inspect.signature(nn.init.calculate_gain).parameters)


@each
def test_in_place_without_gradient(ours):
    p = nn.Parameter(torch.zeros(6, 5))
    assert ours(p) is p and p.requires_grad and p.grad_fn is None and p.abs().sum() > 0


@each
def test_generator(ours):
    before = torch.get_rng_state()
    first, again, other = (ours(torch.empty(7, 5), generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    a = ours(torch.empty(7, 5))
    torch.manual_seed(5)
    torch.testing.assert_close(a, peers[ours](torch.empty(7, 5)), rtol=1e-6, atol=1e-7)


@each
@pytest.mark.parametrize('tensor', [torch.empty(()), torch.empty(5), torch.empty(5, 5, dtype=torch.long)],
                         ids=['0-d', '1-d', 'integers'])
def test_tensors_that_pytorch_refuses(ours, tensor):
    with pytest.raises(Exception) as theirs: peers[ours](tensor.clone())
    with pytest.raises(type(theirs.value)): ours(tensor.clone())


@pytest.mark.parametrize('ours', list(kaiming), ids=lambda f: f.__name__)
@pytest.mark.parametrize('kw', [dict(mode='fan'), dict(mode=''), dict(mode='fan_avg'), dict(nonlinearity='swish'),
                                dict(a=True), dict(a='1')])
def test_kaiming_refuses_what_pytorch_refuses(ours, kw):
    with pytest.raises(ValueError): kaiming[ours](torch.empty(3, 3), **kw)
    with pytest.raises(ValueError): ours(torch.empty(3, 3), **kw)


def test_a_mode_that_is_no_string_is_named():
    with pytest.raises(ValueError, match='fan_in or fan_out'):
        kaiming_normal_(torch.empty(3, 3), mode=None) # pyright: ignore[reportArgumentType]


@each
@pytest.mark.parametrize('shape', [(0, 5), (5, 0), (0, 3, 2)])
def test_empty_weights(ours, shape):
    "A no-op, with a warning where PyTorch warns"
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter('always')
        peers[ours](torch.empty(shape))
    with warnings.catch_warnings(record=True) as mine:
        warnings.simplefilter('always')
        assert ours(torch.empty(shape)).shape == shape
    assert [w.category for w in mine] == [w.category for w in theirs]


@pytest.mark.parametrize('ours', list(xavier), ids=lambda f: f.__name__)
def test_a_xavier_weight_without_connections(ours):
    with pytest.raises(ZeroDivisionError): xavier[ours](torch.empty(0, 0))
    with pytest.raises(ValueError, match='connects nothing'): ours(torch.empty(0, 0))


@each
def test_layouts_and_devices(ours):
    "Transposed views and channels-last weights are filled, meta tensors are left alone"
    w = torch.full((4, 6), 9.)
    ours(w.T)
    assert (w.abs() < 9).all()
    conv = ours(torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last), generator=seeded())
    assert conv.is_contiguous(memory_format=torch.channels_last) and conv.abs().sum() > 0
    flat = conv.flatten(1)
    if ours is orthogonal_: torch.testing.assert_close(flat @ flat.T, torch.eye(8), rtol=0, atol=1e-5)
    assert ours(torch.empty(4, 6, device='meta')).is_meta


@pytest.mark.parametrize('ours', [*kaiming, *xavier], ids=lambda f: f.__name__)
def test_half_precision(ours):
    for dtype in torch.float16, torch.bfloat16:
        a, b = (f(torch.empty(50, 40, dtype=dtype), generator=seeded()) for f in (ours, peers[ours]))
        assert torch.equal(a, b)
