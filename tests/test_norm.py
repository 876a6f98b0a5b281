"Norms equal PyTorch's, in every shape and type; refuse before they change; and are folded where that is right."
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from dlfound.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, RunningBatchNorm, fold_batchnorm

quick = settings(max_examples=15, deadline=None)
images = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 6]), st.lists(st.integers(1, 4), max_size=3)).map(
    lambda t: (t[0], t[1], *t[2])) # `(N, C)` to `(N, C, D, H, W)`
dtypes = st.sampled_from([torch.float32, torch.float64])
halves = st.sampled_from([torch.float16, torch.bfloat16])
means = st.sampled_from([0., 3.])


def twin(kind, shape): # PyTorch's class for inputs of this shape
    return getattr(nn, f'{kind}{max(len(shape) - 2, 1)}d')


def near(dtype): return dict(rtol=1e-3, atol=1e-3) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-9)


def draw(shape, dtype=torch.float32, mean=0.): return (torch.randn(shape) * 2 + mean).to(dtype)


def seen(norm, x):
    "Output, gradients, and buffers after it"
    x = x.clone().requires_grad_()
    y = norm(x)
    parameters = [p for p in norm.parameters()]
    grads = torch.autograd.grad(y, [x, *parameters], torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))
    return y.detach(), grads, {k: v.clone() for k, v in norm.named_buffers()}


def shaken(ours, theirs):
    "Both with the same parameters, which are not those they start with"
    with torch.no_grad():
        for p in ours.parameters(): p.copy_(torch.linspace(.5, 1.5, p.numel()).view(p.shape))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def many(shape): return shape[0] * len(torch.empty(shape).flatten(2)[0, 0]) if len(shape) > 2 else shape[0]


# Equal to PyTorch's

@given(images, dtypes, means, st.booleans(), st.sampled_from([.1, 0., 1., None]), st.booleans())
@quick
def test_batch_norm(shape, dtype, mean, affine, momentum, track):
    torch.manual_seed(0)
    options = dict(affine=affine, momentum=momentum, track_running_stats=track)
    classes = BatchNorm, twin('BatchNorm', shape)
    ours, theirs = shaken(*(norm(shape[1], **options).to(dtype) for norm in classes))
    if many(shape) == 1:
        for norm in ours, theirs:
            with pytest.raises(ValueError): norm(draw(shape, dtype))
        return
    tol = near(dtype)
    for i in range(3):
        x = draw(shape, dtype, mean + i)
        assert_close(seen(ours, x), seen(theirs, x), **tol)
    assert_close(seen(ours.eval(), x), seen(theirs.eval(), x), **tol)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@given(images, dtypes, means, st.booleans(), st.booleans())
@quick
def test_instance_norm(shape, dtype, mean, affine, track):
    torch.manual_seed(0)
    options = dict(affine=affine, track_running_stats=track)
    ours = InstanceNorm(shape[1], **options).to(dtype)
    if len(shape) == 2 or torch.empty(shape[2:]).numel() == 1: # For any number of images, in eval too
        before = deepcopy(ours.state_dict())
        with pytest.raises(ValueError, match='two numbers'): ours(draw(shape, dtype))
        assert_close(ours.state_dict(), before, rtol=0, atol=0)
        if track: assert ours.eval()(draw(shape, dtype)).shape == shape
        else:
            with pytest.raises(ValueError): ours.eval()(draw(shape, dtype))
        return
    ours, theirs = shaken(ours, twin('InstanceNorm', shape)(shape[1], **options).to(dtype))
    for i in range(3):
        x = draw(shape, dtype, mean + i)
        a, b = seen(ours, x), seen(theirs, x)
        for buffers in a[2], b[2]: buffers.pop('num_batches_tracked', None) # PyTorch's does not count
        tol = near(dtype)
        assert_close(a, b, **tol)
    assert_close(seen(ours.eval(), x)[:2], seen(theirs.eval(), x)[:2], **tol)


@given(images, dtypes, means, st.booleans(), st.sampled_from([1, 2, 'all']))
@quick
def test_group_norm(shape, dtype, mean, affine, groups):
    torch.manual_seed(0)
    groups = shape[1] if groups == 'all' or shape[1] % groups else groups
    ours, theirs = shaken(GroupNorm(groups, shape[1], affine=affine).to(dtype),
                          nn.GroupNorm(groups, shape[1], affine=affine).to(dtype))
    x = draw(shape, dtype, mean)
    alone = x.numel() == shape[0] * groups
    with warnings.catch_warnings(record=True, action='always') as caught: ours(x)
    assert len(caught) == alone
    if alone: return # PyTorch's raises for one image, and gives rounding errors for several
    tol = near(dtype)
    for mode in True, False: assert_close(seen(ours.train(mode), x), seen(theirs.train(mode), x), **tol)


@given(images, dtypes, means, st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([1e-5, .1]))
@quick
def test_layer_norm_and_rms_norm(shape, dtype, mean, n, affine, bias, eps):
    torch.manual_seed(0)
    last = shape[-n:]
    x = draw(shape, dtype, mean)
    tol = near(dtype)
    if torch.empty(last).numel() > 1:
        ours, theirs = shaken(*(c(last, eps, affine, bias).to(dtype) for c in (LayerNorm, nn.LayerNorm)))
        assert_close(seen(ours, x), seen(theirs, x), **tol)
    for eps in eps, None:
        ours, theirs = shaken(*(c(last, eps, affine).to(dtype) for c in (RMSNorm, nn.RMSNorm)))
        assert_close(seen(ours, x), seen(theirs, x), **tol)


def every(channels=4, size=5): # Ours, and PyTorch's
    return [(BatchNorm(channels), nn.BatchNorm2d(channels)), (GroupNorm(2, channels), nn.GroupNorm(2, channels)),
            (InstanceNorm(channels, affine=True), nn.InstanceNorm2d(channels, affine=True)),
            (LayerNorm(size), nn.LayerNorm(size)), (RMSNorm(size), nn.RMSNorm(size))]


@given(halves, st.sampled_from([0., 1., -5.]), st.sampled_from([1., 30., 500.]))
@quick
def test_half_precision_is_rounded_once(dtype, mean, std):
    "The output is as near as the type can be to that of float64, and no farther off than PyTorch's"
    torch.manual_seed(0)
    x = ((torch.randn(4, 4, 5, 5) + mean) * std).to(dtype)
    for ours, theirs in every():
        right, grads, _ = seen(deepcopy(theirs).double(), x.double())
        _, theirs_grads, _ = seen(theirs.to(dtype), x)
        for norm in ours.to(dtype), ours.float(): # Weights in the type of the input, or not
            got, ours_grads, _ = seen(norm, x)
            assert got.dtype == dtype and not got.isnan().any()
            step = torch.finfo(dtype).eps * right.abs().clamp(min=1)
            assert ((got.double() - right).abs() <= .502 * step + 1e-6).all()
            for a, b, c in zip(ours_grads, grads, theirs_grads):
                off, their_off = ((g.double() - b).abs().max() for g in (a, c))
                assert off <= 1.5 * their_off + torch.finfo(dtype).eps * b.abs().max() + 1e-6


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_running_statistics_in_half_precision(dtype):
    ours, theirs = BatchNorm(3).to(dtype), nn.BatchNorm1d(3).to(dtype)
    running = RunningBatchNorm(3).to(dtype)
    for i in range(5):
        x = draw((8, 3), dtype, i)
        for norm in ours, theirs, running: norm(x)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=.02, atol=.02)
    assert {t.dtype for t in running.state_dict().values()} == {dtype, torch.int64}


def test_a_mean_far_from_zero():
    x = torch.randn(64, 4, 3, 3) + 1e4
    for ours, theirs in every(size=3)[:4]: # An RMS norm leaves the mean where it is
        right = deepcopy(theirs).double()(x.double())
        assert (ours(x) - right).abs().max() < .02


@pytest.mark.parametrize('shape, layout', [
    ((2, 4, 5, 5), torch.channels_last), ((2, 4, 3, 5, 5), torch.channels_last_3d)])
def test_the_memory_format_is_kept(shape, layout):
    x = torch.randn(shape).to(memory_format=layout)
    for norm in *(ours for ours, _ in every()), RunningBatchNorm(4):
        for mode in True, False:
            y = norm.train(mode)(x)
            assert y.stride() == x.stride()
            assert_close(y, norm(x.contiguous()), atol=1e-2, rtol=1e-2) # A step of running statistics later


def test_what_is_neither_contiguous_nor_channels_last():
    x = torch.randn(5, 4, 3, 2).transpose(0, 3)[:, :, ::2]
    for ours, theirs in every(): assert_close(ours(x), theirs(x.contiguous()), atol=1e-5, rtol=1e-5)


def test_state_goes_both_ways_strictly():
    for ours, theirs in [*every(), (BatchNorm(3, affine=False), nn.BatchNorm1d(3, affine=False)),
                         (LayerNorm(3, bias=False), nn.LayerNorm(3, bias=False)),
                         (RunningBatchNorm(3), nn.BatchNorm1d(3))]:
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict()), theirs.load_state_dict(ours.state_dict())
        for t in theirs.state_dict().values(): t.add_(1)
        ours.load_state_dict(theirs.state_dict())
        assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_gradients_of_gradients():
    for ours, _ in every(2, 3):
        x = torch.randn(2, 2, 3, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradgradcheck(ours.double(), x)


# What cannot work

bad = [(lambda: BatchNorm(3)(torch.randn(1, 3)), ValueError, r'got \(1, 3\)'),
       (lambda: BatchNorm(3)(torch.randn(0, 3)), ValueError, r'got \(0, 3\)'),
       (lambda: BatchNorm(3)(torch.randn(4, 5)), ValueError, r'\(N, 3, …\), got \(4, 5\)'),
       (lambda: BatchNorm(3)(torch.randn(3)), ValueError, r'got \(3,\)'),
       (lambda: BatchNorm(3)(torch.ones(4, 3, dtype=torch.long)), TypeError, 'int64; convert'),
       (lambda: BatchNorm(3)(torch.randn(4, 3, dtype=torch.cfloat)), TypeError, 'complex64'),
       (lambda: RunningBatchNorm(3)(torch.randn(4, 5)), ValueError, r'got \(4, 5\)'),
       (lambda: RunningBatchNorm(3, momentum=0.), ValueError, 'above 0'),
       (lambda: InstanceNorm(3)(torch.randn(3, 8)), ValueError, r'got \(3, 8\)'), # One sound without a batch
       (lambda: GroupNorm(0, 4), ValueError, 'into 0'), (lambda: GroupNorm(-2, 4), ValueError, 'into -2'),
       (lambda: LayerNorm(())(torch.randn(3)), ValueError, r'end in \(\), got \(3,\)'),
       (lambda: InstanceNorm(3, track_running_stats=True)(torch.randn(0, 3, 2)), ValueError, r'got \(0, 3, 2\)'),
       (lambda: GroupNorm(2, 3), ValueError, '3 channels cannot be divided into 2'),
       (lambda: GroupNorm(2, 4)(torch.randn(2, 6)), ValueError, r'\(N, 4, …\), got \(2, 6\)'),
       (lambda: LayerNorm((2, 3))(torch.randn(3, 2)), ValueError, r'end in \(2, 3\), got \(3, 2\)'),
       (lambda: LayerNorm(3)(torch.ones(2, 3, dtype=torch.int32)), TypeError, 'int32'),
       (lambda: RMSNorm(3)(torch.randn(3, 2)), ValueError, r'end in \(3,\), got \(3, 2\)')]


@pytest.mark.parametrize('f, kind, match', bad)
def test_refused_with_words(f, kind, match):
    with pytest.raises(kind, match=match): f()


@pytest.mark.parametrize('make, x', [
    (BatchNorm, torch.randn(1, 3)), (BatchNorm, torch.randn(0, 3)), (BatchNorm, torch.randn(4, 5)),
    (BatchNorm, torch.ones(4, 3).long()), (BatchNorm, torch.randn(0, 3, 2)), (RunningBatchNorm, torch.randn(4, 5)),
    (RunningBatchNorm, torch.ones(4, 3).long()),
    (lambda n: InstanceNorm(n, track_running_stats=True), torch.randn(0, 3, 2))])
def test_refused_before_a_buffer_changes(make, x):
    norm = make(3)
    before = deepcopy(norm.state_dict())
    with pytest.raises((ValueError, TypeError)): norm(x)
    assert_close(norm.state_dict(), before, rtol=0, atol=0)


def test_one_image_in_training_and_one_row_in_eval():
    norm = BatchNorm(3)
    assert norm(torch.randn(1, 3, 4)).shape == (1, 3, 4) and norm.eval()(torch.randn(1, 3)).shape == (1, 3)
    assert norm(torch.randn(0, 3)).shape == (0, 3) # An empty batch needs no statistics
    assert LayerNorm(3)(torch.randn(0, 3)).shape == (0, 3)


def test_without_tracking_eval_uses_the_batch():
    norm, x = BatchNorm(3, track_running_stats=False).eval(), torch.randn(8, 3) + 5
    assert_close(norm(x).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError): norm(torch.randn(1, 3))


def test_tracking_can_be_stopped():
    for norm in BatchNorm(3), nn.BatchNorm1d(3):
        norm.track_running_stats = False
        norm(torch.randn(8, 3) + 5)
        assert norm.running_mean.abs().sum() == 0


def test_one_number_for_each_mean_is_warned_of_once():
    for norm, x in (GroupNorm(3, 3), torch.randn(2, 3)), (LayerNorm(1), torch.randn(2, 1)):
        with warnings.catch_warnings(record=True, action='always') as caught: norm(x), norm(x)
        (told,) = caught
        assert f'{type(norm).__name__}' in str(told.message) and 'gives 0 or its bias' in str(told.message)


def test_statistics_may_change_between_forward_and_backward():
    "A layer that is called twice before `backward`, or in eval and then in training"
    for make in BatchNorm, RunningBatchNorm, lambda n: InstanceNorm(n, track_running_stats=True):
        norm, x = make(3), torch.randn(4, 3, 5, requires_grad=True)
        (norm(x) * norm(2 * x)).sum().backward()
        y = norm.eval()(x)
        norm.train()(x)
        y.sum().backward()
        assert x.grad.isfinite().all()


def test_an_empty_batch_needs_no_statistics_that_are_not_kept():
    assert InstanceNorm(3)(torch.randn(0, 3, 2)).shape == (0, 3, 2)
    with warnings.catch_warnings(action='error'): assert GroupNorm(3, 3)(torch.randn(0, 3)).shape == (0, 3)


def test_sizes_of_other_integer_types_and_what_a_norm_says_of_itself():
    assert LayerNorm(np.int64(3)).weight.shape == RMSNorm(np.int64(3)).weight.shape == (3,)
    with pytest.raises(TypeError): LayerNorm(3.)
    for norm in InstanceNorm(3), RunningBatchNorm(3): assert repr(norm) == f'{type(norm).__name__}(3, momentum=0.1)'


def test_files_without_a_count_of_batches():
    state = nn.BatchNorm1d(3).state_dict()
    del state['num_batches_tracked']
    with pytest.raises(RuntimeError, match='num_batches_tracked'): BatchNorm(3).load_state_dict(state)
    assert BatchNorm(3).load_state_dict(state, strict=False).missing_keys == ['num_batches_tracked']


def test_the_count_that_pytorch_resets_is_not_ours():
    norm = BatchNorm(3)
    torch.optim.swa_utils.update_bn([torch.randn(8, 3)], nn.Sequential(norm))
    assert norm.num_batches_tracked == 0 # It looks for PyTorch's classes; the page says so


# RunningBatchNorm

@pytest.mark.filterwarnings('ignore:.*of 1 number')
@given(st.integers(1, 6), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 5),
       st.sampled_from([.1, .5, 1., None]))
@quick
def test_running_statistics_are_weighted_moments(n, rest, batches, m):
    "Of all numbers seen, a batch i batches ago weighted by (1 - m)^i"
    torch.manual_seed(0)
    shape, norm = (n, 2, *rest), RunningBatchNorm(2, momentum=m).double()
    xs = [draw(shape, torch.double, i) for i in range(batches)]
    for x in xs: out = norm(x)
    columns = torch.stack([x.transpose(0, 1).flatten(1) for x in xs]) # (batch, channel, number)
    w = torch.tensor([1. if m is None else (1 - m)**(batches - 1 - i) for i in range(batches)], dtype=torch.double)
    w = (w / w.sum() / columns.shape[2])[:, None, None]
    mean = (w * columns).sum((0, 2))
    var = (w * (columns - mean[:, None])**2).sum((0, 2))
    assert_close(norm.running_mean, mean)
    assert_close(norm.running_var, var)
    assert_close(norm.eval()(xs[-1]), out)
    assert_close(norm(xs[-1]), out, rtol=0, atol=1e-12) # And again


def test_the_first_batch_is_that_of_a_batch_norm():
    x = torch.randn(8, 3, 4) * 3 + 5
    for a, b in zip(seen(RunningBatchNorm(3), x)[:2], seen(BatchNorm(3), x)[:2]): assert_close(a, b)


def test_a_first_batch_far_from_zero():
    x = torch.randn(64, 3) + 1e4
    for m in .1, 1e-3, None: assert_close(RunningBatchNorm(3, momentum=m)(x), BatchNorm(3)(x))


def test_backward_again_and_again():
    layer, norm = nn.Linear(4, 3), RunningBatchNorm(3)
    for _ in range(3): norm(layer(torch.randn(2, 4))).sum().backward()
    assert not norm.running_mean.requires_grad and norm.running_mean.grad_fn is None


def test_an_empty_batch_moves_no_running_statistics():
    norm = RunningBatchNorm(3)
    assert norm(torch.randn(0, 3)).shape == (0, 3) and norm.num_batches_tracked == 0


@pytest.mark.filterwarnings('ignore:.*of 1 number')
def test_batches_of_one():
    norm = RunningBatchNorm(3)
    out = [norm(torch.randn(1, 3) + 50) for _ in range(50)]
    assert out[0].abs().max() == 0 and max(y.abs().max() for y in out) < 10


def test_it_takes_the_place_of_a_batch_norm_in_eval():
    norm, theirs, x = RunningBatchNorm(3), nn.BatchNorm1d(3), torch.randn(8, 3)
    for _ in range(3): norm(torch.randn(8, 3))
    theirs.load_state_dict(norm.state_dict())
    assert_close(norm.eval()(x), theirs.eval()(x))


def test_a_first_batch_of_one_number_is_warned_of_and_a_later_one_is_not():
    for first, warned in (1, True), (2, False):
        norm = RunningBatchNorm(3)
        with warnings.catch_warnings(record=True, action='always') as caught:
            for n in first, 1, 1: norm(torch.randn(n, 3))
        assert ['of 1 number' in str(w.message) for w in caught] == [True] * warned


@pytest.mark.parametrize('m', [1e-8, 1e-6, 1e-3, 1.])
def test_the_smallest_and_the_largest_momentum(m):
    norm, xs = RunningBatchNorm(3, momentum=m), torch.randn(10, 8, 3) + 5
    for x in xs: out = norm(x)
    right = xs[-1] if m == 1 else xs.flatten(0, 1)
    assert_close(norm.running_mean, right.mean(0), rtol=1e-3, atol=1e-3)
    assert_close(norm.running_var, right.var(0, correction=0), rtol=1e-2, atol=1e-3)
    assert out.isfinite().all()


# Folding

def trained(model, *shape, steps=3):
    "With running statistics, scales and shifts that are not those it starts with"
    with torch.no_grad():
        for m in model.modules():
            if getattr(m, 'running_mean', None) is not None and getattr(m, 'weight', None) is not None:
                m.weight.uniform_(-1, 2), m.bias.normal_()
        for _ in range(steps): model.train()(torch.randn(shape) * 2 + 1)
    return model


def norms(model): return [k for k, m in model.named_modules() if 'BatchNorm' in type(m).__name__]


def check(model, *shape, left=()):
    trained(model, *shape)
    before, mode = deepcopy(model.state_dict()), [m.training for m in model.modules()]
    folded = fold_batchnorm(model)
    assert norms(folded) == list(left)
    assert [m.training for m in model.modules()] == mode and not any(m.training for m in folded.modules())
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    x = torch.randn(shape)
    with torch.no_grad(): assert_close(folded(x), model.eval()(x), atol=1e-4, rtol=1e-4)
    return folded


convs = st.tuples(st.sampled_from([1, 2, 3]), st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.booleans(),
                  st.booleans())


@given(convs)
@quick
def test_folding_convolutions(options):
    d, transposed, bias, groups, ours, affine = options
    torch.manual_seed(0)
    conv = getattr(nn, f'Conv{"Transpose" * transposed}{d}d')(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
    norm = BatchNorm(6, affine=affine) if ours else getattr(nn, f'BatchNorm{d}d')(6, affine=affine)
    check(nn.Sequential(conv, norm, nn.ReLU()), 3, 4, *[5] * d)


@pytest.mark.parametrize('norm', [BatchNorm, RunningBatchNorm, nn.BatchNorm1d])
def test_folding_linear_layers(norm):
    torch.manual_seed(0)
    folded = check(nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Linear(6, 6, bias=False), norm(6)), 8, 4)
    with pytest.raises(ValueError, match=r'got \(2, 6, 6\); keep the norm'): folded[1](torch.randn(2, 6, 6))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_folding_keeps_types_and_what_is_frozen(dtype):
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm(3)), 4, 2, 5, 5).to(dtype)
    model[0].weight.requires_grad_(False)
    folded, x = fold_batchnorm(model), torch.randn(2, 2, 5, 5).to(dtype)
    tol = {} if dtype == torch.float64 else dict(atol=.2, rtol=.1)
    assert_close(folded(x), model.eval()(x), **tol)
    assert {p.dtype for p in folded.parameters()} == {dtype} and not folded[0].weight.requires_grad


class Written(nn.Module):
    "Layers in an order that only `forward` knows"
    def __init__(self, forward, **parts):
        super().__init__()
        for k, m in parts.items(): self.add_module(k, m)
        self.way = forward
    def forward(self, x): return self.way(self, x)


class Optional(nn.Module):
    "Does something else between the layers where an argument is not given"
    def __init__(self, given):
        super().__init__()
        self.conv, self.norm, self.given = nn.Conv2d(2, 2, 1), BatchNorm(2), given
    def forward(self, x, skip=None):
        h = self.conv(x)
        if (skip is None) == self.given: h = h.relu()
        return self.norm(h)


def conv(): return nn.Conv2d(2, 2, 1)


def by_values(m, x): return m.norm(m.conv(x)) if x.sum() > 1e9 else m.norm(m.conv(x).relu())


def hooked():
    layer = conv()
    layer.register_forward_hook(lambda m, i, o: o.relu())
    return layer


class MyConv(nn.Conv2d):
    def forward(self, x): return super().forward(x).relu()


shared = conv()
stays = {
    'after something else': nn.Sequential(conv(), nn.ReLU(), BatchNorm(2)),
    'first of all': nn.Sequential(BatchNorm(2), conv()),
    'the norm alone': nn.ModuleDict(dict(norm=BatchNorm(2)))['norm'],
    'two users': Written(lambda m, x: (h := m.conv(x)) + m.norm(h), conv=conv(), norm=BatchNorm(2)),
    'changed in place': Written(lambda m, x: (h := m.conv(x), h.relu_(), m.norm(h))[2], conv=conv(), norm=BatchNorm(2)),
    'the layer twice': Written(lambda m, x: m.conv(m.norm(m.conv(x))), conv=conv(), norm=BatchNorm(2)),
    'the norm twice': Written(lambda m, x: m.norm(m.norm(m.conv(x))), conv=conv(), norm=BatchNorm(2)),
    'weights used elsewhere': Written(lambda m, x: F.conv2d(m.norm(m.conv(x)), m.conv.weight),
                                      conv=conv(), norm=BatchNorm(2)),
    'shared': nn.Sequential(Written(by_values, conv=shared, norm=BatchNorm(2)), nn.Sequential(shared, BatchNorm(2))),
    'values decide': Written(by_values, conv=conv(), norm=BatchNorm(2)),
    'not tracked': nn.Sequential(conv(), BatchNorm(2, track_running_stats=False)),
    'a hook': nn.Sequential(hooked(), BatchNorm(2)),
    'weight norm': nn.Sequential(parametrizations.weight_norm(conv()), BatchNorm(2)),
    'another class': nn.Sequential(MyConv(2, 2, 1), BatchNorm(2)),
    'with an argument': Optional(True), 'without it': Optional(False),
}


@pytest.mark.filterwarnings('ignore:traced by parts')
@pytest.mark.parametrize('name', stays)
def test_what_stays(name):
    model = stays[name]
    check(model, 2, 2, 3, 3, left=norms(model))


def test_channels_that_are_not_the_last_dimension_of_a_linear_layer():
    check(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)), 2, 3, 4, left=['1'])


@pytest.mark.filterwarnings('ignore:traced by parts')
def test_a_model_that_cannot_be_traced_is_folded_by_parts():
    def way(m, x): return m.a(x) if x.sum() > 1e9 else m.b(m.a(x))
    parts = dict(a=nn.Sequential(conv(), BatchNorm(2), nn.ReLU()), b=nn.Sequential(conv(), nn.BatchNorm2d(2)))
    check(Written(way, **parts), 4, 2, 3, 3)


class Tied(nn.Module):
    "Uses the weights of a layer that it keeps in a list, out of sight"
    def __init__(self, layer):
        super().__init__()
        self.layers = [layer]
    def forward(self, h): return F.linear(h, self.layers[0].weight.t())


def linear(): return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def a_part_again(m, x): return h + m.a[0](x) if (h := m.a(x)).sum() < 1e9 else h


def its_weights(m, x): return F.linear(h, m.a[0].weight.t()) if (h := m.a(x)).sum() < 1e9 else h


def by_type(m, x): return m.a[0](x) if isinstance(x, torch.Tensor) else m.a(x)


tied = nn.Linear(3, 3)
wrong = {'a part is used again': Written(a_part_again, a=linear()), 'its weights are': Written(its_weights, a=linear()),
         'the type decides': Written(by_type, a=linear()),
         'a tied layer in a list': nn.Sequential(tied, nn.BatchNorm1d(3), Tied(tied))}


@pytest.mark.parametrize('name', wrong)
def test_an_example_shows_what_went_wrong(name):
    model = wrong[name]
    trained(nn.Sequential(*[m for m in model.modules() if isinstance(m, (nn.Linear, nn.BatchNorm1d))]), 8, 3)
    x, state = torch.randn(5, 3), torch.get_rng_state()
    with pytest.raises(ValueError, match='(?s)other outputs.*difference'), warnings.catch_warnings(action='error'):
        fold_batchnorm(model, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_example_is_left_as_it_is_and_may_be_of_any_structure():
    model = Written(lambda m, x: m.a(F.relu_(x['rows'])), a=linear())
    trained(model.a, 8, 3)
    x = {'rows': torch.randn(4, 3)}
    before = x['rows'].clone()
    folded = fold_batchnorm(model, x)
    assert norms(folded) == [] and torch.equal(x['rows'], before)


def test_half_precision_needs_a_wider_tolerance():
    model, x = trained(nn.Sequential(*linear(), nn.ReLU(), *linear()), 64, 3).bfloat16(), torch.randn(64, 3).bfloat16()
    with pytest.raises(ValueError, match='other outputs'): fold_batchnorm(model, x, tol=1e-6)
    assert norms(fold_batchnorm(model, x, tol=.2)) == []


def test_tracing_by_parts_warns_without_an_example():
    model = Written(lambda m, x: m.a(x) if x.sum() < 1e9 else x, a=linear())
    trained(model, 8, 3)
    with pytest.warns(UserWarning, match='traced by parts only'): assert norms(fold_batchnorm(model)) == []
    with warnings.catch_warnings(action='error'): assert norms(fold_batchnorm(model, torch.randn(4, 3))) == []


def test_a_norm_that_is_read_stays():
    for read in (lambda n: n.weight), (lambda n: n.running_mean), (lambda n: n.running_var):
        model = Written(lambda m, x: m.norm(m.layer(x)) * read(m.norm), layer=nn.Linear(3, 3), norm=BatchNorm(3))
        check(model, 8, 3, left=['norm'])


def test_hooks_of_containers_never_see_a_placeholder():
    seen, model = [], nn.Sequential(nn.Sequential(conv(), BatchNorm(2)), conv(), nn.BatchNorm2d(2))
    model[0].register_forward_hook(lambda m, i, o: seen.append(type(o)))
    check(model, 4, 2, 3, 3, left=['0.1'])
    assert set(seen) == {torch.Tensor}


def test_the_generators_are_where_they_were():
    model = Written(lambda m, x: m.a(x) if torch.rand(1) < 2 else x, a=linear())
    state = torch.get_rng_state()
    for inputs in (), (torch.ones(4, 3),):
        with warnings.catch_warnings(action='ignore'): fold_batchnorm(model, *inputs)
        assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_another_layer_shares_stay_its_own():
    a, b = conv(), conv()
    b.weight = a.weight
    folded = check(nn.Sequential(a, BatchNorm(2), nn.ReLU(), b), 4, 2, 3, 3)
    assert folded[0].weight is not folded[3].weight


def test_tracing_leaves_nothing_behind():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.calls, self.last = conv(), BatchNorm(2), 0, None
        def forward(self, x):
            self.calls, self.last = self.calls + 1, x
            return self.norm(self.conv(x))
    model = trained(Counting(), 4, 2, 3, 3)
    model.last = None
    folded = fold_batchnorm(model)
    assert norms(folded) == [] and folded.calls == model.calls == 3 and folded.last is None


def test_a_real_network():
    from torchvision.models import resnet18
    torch.manual_seed(0)
    check(resnet18(weights=None, num_classes=10), 2, 3, 32, 32)


def test_compiled_it_is_the_same():
    pytest.importorskip('torch._inductor')
    x = torch.randn(4, 6)
    for norm in LayerNorm(6), BatchNorm(6), RunningBatchNorm(6):
        other = deepcopy(norm)
        compiled = torch.compile(other, backend='aot_eager', fullgraph=True)
        assert_close(seen(compiled, x)[:2], seen(norm, x)[:2])
        assert_close(other.state_dict(), norm.state_dict())
    far = torch.randn(64, 36) + 1e4 # A layer norm takes its statistics in another way where it is compiled
    right = nn.LayerNorm(36).double()(far.double())
    assert (torch.compile(LayerNorm(36), backend='aot_eager')(far) - right).abs().max() < .02
