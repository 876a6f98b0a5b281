"The checks stay silent on what is right, speak on what is wrong, and leave no trace in model, buffers, mode or random state."
import copy
import gc
import math
import random
import warnings
import weakref
from collections import OrderedDict, namedtuple
from contextlib import contextmanager
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dlfound.sanity as sanity
from dlfound import minibatch
from dlfound.minibatch import DataLoader, Dataset
from dlfound.sanity import (SanityWarning, check_dead, check_finite, check_first_loss, check_grads, check_inputs, check_loader, check_lr, check_optimizer, check_target,
                            check_training, check_trainable, check_zeroed, dead_units, first_nonfinite, overfit_batch)

inf, nan = math.inf, math.nan
quick = settings(deadline=None, max_examples=150)


@contextmanager
def told():
    "The SanityWarnings of a block, of which nothing is remembered from before"
    sanity._told_all.clear()
    sanity._told.clear()
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter('always')
        texts = []
        yield texts
    texts += [str(w.message) for w in log if issubclass(w.category, SanityWarning)]


@contextmanager
def silent():
    with told() as texts: yield
    assert texts == []


def net(): return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 3))


class Traces:
    "Everything about a model and the generators that a check must not change"
    def __init__(self, model): self.model, self.was = model, self.now(model)

    def now(self, model):
        tensors = [(k, v.clone(), v._version) for k, v in model.state_dict().items()]
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return tensors, grads, modes, torch.get_rng_state(), random.getstate(), np.random.get_state()

    def __enter__(self): return self

    def __exit__(self, kind, *_):
        now = self.now(self.model)
        for (k, a, v), (k2, b, v2) in zip(self.was[0], now[0]):
            assert k == k2 and v == v2
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(self.was[1], now[1]): assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        assert self.was[2] == now[2] and torch.equal(self.was[3], now[3]) and self.was[4] == now[4]
        assert all(np.array_equal(a, b) for a, b in zip(self.was[5], now[5]))


# the learning rate, the model, the loader

@pytest.mark.parametrize('lr', [.1, 1, 1e-12, np.float32(.1), np.float64(.1), np.int64(1), np.array(.1), torch.tensor(.1), torch.tensor(1), torch.tensor(.1, dtype=torch.bfloat16), Fraction(1, 10)])
def test_lr_passes(lr): check_lr(lr)


@pytest.mark.parametrize('lr', [0, 0., -.0, -.1, nan, inf, -inf, np.float32(0), np.float64(nan), torch.tensor(0.), torch.tensor(nan)])
def test_lr_has_no_use(lr):
    with pytest.raises(ValueError, match='above 0'): check_lr(lr)


@pytest.mark.parametrize('lr', ['.1', None, [.1], (.1,), True, np.bool_(True), torch.tensor(True), torch.tensor([.1]), np.ones(2), 1j, {}])
def test_lr_is_no_number(lr):
    with pytest.raises(TypeError, match='is a number'): check_lr(lr)


def test_trainable():
    check_trainable(net())
    with pytest.raises(ValueError, match='no parameters'): check_trainable(nn.Sequential(nn.ReLU()))
    frozen = net().requires_grad_(False)
    with pytest.raises(ValueError, match='all 6'): check_trainable(frozen)
    frozen[4].bias.requires_grad_()
    check_trainable(frozen)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(range(3))


@pytest.mark.parametrize('kind', [DataLoader, torch.utils.data.DataLoader])
def test_loader(kind):
    data = Dataset(torch.ones(10, 2), torch.ones(10))
    for dl in kind(data, 4), kind(data, 10, drop_last=True), kind(data, None), kind(Stream(), 2), iter([1]), [1], kind(data, batch_sampler=[[1]]): check_loader(dl)
    with pytest.raises(ValueError, match='valid is empty.*10 samples do not fill one of 64.*lower batch_size'): check_loader(kind(data, 64, drop_last=True), 'valid')
    cut = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(data), 64, True)
    with pytest.raises(ValueError, match='10 samples do not fill one of 64'): check_loader(kind(data, batch_sampler=cut))
    for dl in kind(Dataset(torch.ones(0, 2), torch.ones(0)), 4), [], kind(data, 4, sampler=[]), kind(data, batch_sampler=[]):
        with pytest.raises(ValueError, match='no samples'): check_loader(dl)


def test_batch_samplers_of_others():
    class Odd:
        sampler = range(10)
        def __iter__(self): return iter(())
        def __len__(self): return 0
    data = Dataset(torch.ones(10, 2), torch.ones(10))
    with pytest.raises(ValueError, match='is empty'): check_loader(torch.utils.data.DataLoader(data, batch_sampler=Odd()))


# the optimizer

def test_optimizer_of_the_model():
    model = net()
    for opt in torch.optim.SGD(model.parameters(), .1), torch.optim.Adam([dict(params=model[:3].parameters()), dict(params=model[3:].parameters(), lr=1.)]), object():
        with silent(): check_optimizer(opt, model)
    model[0].requires_grad_(False)
    with silent(): check_optimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1), model)
    with silent(): check_optimizer(torch.optim.SGD(model.parameters(), .1), model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with silent(): check_optimizer(torch.optim.SGD(tied.parameters(), .1), tied)


def test_optimizer_of_another_model():
    model = net()
    for other in net(), copy.deepcopy(model):
        with pytest.raises(ValueError, match='none of the 6'): check_optimizer(torch.optim.SGD(other.parameters(), .1), model)
    with pytest.raises(ValueError, match='frozen'): check_optimizer(torch.optim.SGD(model.parameters(), .1), copy.deepcopy(model).requires_grad_(False))
    opt = torch.optim.SGD(model.parameters(), .1)
    model[4] = nn.Linear(16, 5)
    for _ in range(2):
        with told() as texts:
            for _ in range(3): check_optimizer(opt, model)
        assert len(texts) == 2 and 'lacks 4.weight, 4.bias' in texts[0] and '2 parameters' in texts[1]
    part = torch.optim.SGD(model[0].parameters(), .1)
    with told() as texts: check_optimizer(part, model)
    assert len(texts) == 1 and 'lacks' in texts[0]


# inputs

@quick
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), scale=st.floats(.2, 3), shift=st.floats(-1, 1), dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 99))
def test_inputs_near_normal_pass(shape, scale, shift, dtype, seed):
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(seed))
    x = (x * scale + shift * scale).to(dtype)
    with silent(): check_inputs(x)


@quick
@given(scale=st.sampled_from([1e-30, 1e-4, .01, 20., 255., 1e4, 1e30]), shift=st.sampled_from([0., 1.]), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_inputs_far_from_normal_warn(scale, shift, dtype):
    x = (torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * scale + shift * scale).to(dtype)
    with told() as texts: check_inputs(x)
    assert len(texts) == 1 and 'standard deviation' in texts[0]


def test_inputs():
    raw = torch.rand(64, 3, 8, 8)
    for x in raw, raw > .5, (raw * 255).byte(), torch.randint(50_000, (4, 7)), None, 'text', [raw * 999], torch.empty(0), torch.tensor(1e9), F.one_hot(torch.arange(100)).float(), raw.to(torch.complex64):
        with silent(): check_inputs(x)
    for x in raw * 255, torch.zeros(4, 4), torch.ones(8, 3), 290 + 10 * torch.randn(64):
        with told() as texts: check_inputs(x)
        assert len(texts) == 1
    half = torch.full((100_000,), 300., dtype=torch.float16)
    with told() as texts: check_inputs(half)
    assert 'mean 3e+02' in texts[0]
    for bad in nan, inf, -inf:
        x = raw.clone()
        x[0, 0, 0, 0] = bad
        with told() as texts:
            for owner in None, net(): check_inputs(x, owner), check_inputs(x, owner)
        assert len(texts) == 2 and all('1 of 12288 inputs' in t and 'unless the model does' in t for t in texts)


def test_inputs_that_cannot_be_looked_at_pass():
    x = torch.randn(4, 5) * 999
    with silent():
        for y in x.to_sparse(), x.to_sparse_csr(), torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged): check_inputs(y)
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(3, 2)
        def forward(self, graph, x): return (graph @ self.l(x)).log()
    graph, x = torch.eye(4).to_sparse(), -torch.ones(4, 3)
    assert first_nonfinite(Uses(), graph, x) == 'the output of the model (Uses)'


def test_inputs_warn_once_for_each_owner():
    a, b = net(), net()
    with told() as texts:
        for i in range(5):
            for owner in a, b, 'no object to hold weakly': check_inputs(torch.rand(8, 8) * (300 + i), owner)
    assert len(texts) == 2 + len({t for t in texts[2:]})
    with told() as texts:
        for _ in range(3): check_inputs(torch.arange(9.) * 99)
    assert len(texts) == 1


# targets

class_losses = [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=.1, reduction='sum'), partial(F.cross_entropy, label_smoothing=.1), partial(partial(F.cross_entropy, reduction='none'), reduction='mean')]
nll_losses = [F.nll_loss, nn.NLLLoss(), partial(F.nll_loss, reduction='sum')]
value_losses = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(beta=2.), nn.HuberLoss(), partial(F.huber_loss, delta=2.), nn.MSELoss(reduction='none')]
binary_losses = [F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss(), F.binary_cross_entropy, nn.BCELoss(reduction='sum')]
refuse_whole = [F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits]  # as PyTorch does
ours = [minibatch.cross_entropy, minibatch.nll]
floats = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
seeds = st.integers(0, 99)


def gen(seed): return torch.Generator().manual_seed(seed)


def class_shapes(last):
    "Shapes of scores and of labels: unbatched, flat, spatial"
    def shapes(parts):
        n, classes, rest = parts
        if last: return (n, *rest, classes), (n, *rest)
        return ((classes,), ()) if n == 0 and not rest else ((n, classes, *rest), (n, *rest))
    return st.tuples(st.integers(0, 5), st.integers(2, 7), st.lists(st.integers(1, 4), max_size=3)).map(shapes)


@settings(deadline=None, max_examples=400)
@given(data=st.data(), seed=seeds, dtype=floats)
def test_labels_that_are_right_pass_and_the_loss_takes_them(data, seed, dtype):
    f = data.draw(st.sampled_from(class_losses + nll_losses + ours))
    last = f in ours
    scores, labels = data.draw(class_shapes(last))
    whole = [torch.int64, torch.uint8, torch.int32, torch.int8][:4 if last else 2 if len(scores) < 3 else 1]
    kind = data.draw(st.sampled_from(whole))
    classes = scores[-1] if last else scores[min(len(scores), 2) - 1]
    pred = torch.randn(scores, generator=gen(seed)).to(dtype)
    if f in nll_losses or f is minibatch.nll: pred = pred.log_softmax(-1 if last else min(pred.ndim, 2) - 1)
    target = torch.randint(classes, labels, generator=gen(seed)).to(kind)
    with silent(): check_target(f, pred, target)
    if target.numel(): f(pred, target)


@quick
@given(data=st.data(), seed=seeds, index=st.sampled_from([-100, -1, 255, 99]))
def test_ignored_labels_pass_in_every_form(data, seed, index):
    scores, labels = data.draw(class_shapes(False))
    pred = torch.randn(scores, generator=gen(seed))
    target = torch.randint(pred.shape[min(pred.ndim, 2) - 1], labels, generator=gen(seed))
    target = torch.where(torch.rand(labels, generator=gen(seed)) < .4, index, target)
    for f in nn.CrossEntropyLoss(ignore_index=index), partial(F.cross_entropy, ignore_index=index):
        with silent(): check_target(f, pred, target)
        if target.numel(): f(pred, target)
    if index != -100 and (target == index).any():
        for f in F.cross_entropy, nn.CrossEntropyLoss():
            with pytest.raises(ValueError, match='needs labels from 0 to'): check_target(f, pred, target)


@quick
@given(data=st.data(), seed=seeds)
def test_wrong_labels_raise(data, seed):
    f = data.draw(st.sampled_from(class_losses + ours))
    last = f in ours
    scores, labels = data.draw(class_shapes(last).filter(lambda s: math.prod(s[1]) > 0))
    dim = -1 if last else min(len(scores), 2) - 1
    pred = torch.randn(scores, generator=gen(seed)).log_softmax(dim)
    target = torch.randint(scores[dim], labels, generator=gen(seed))
    wrong = target.clone()
    wrong.view(-1)[0] = data.draw(st.sampled_from([-1, -2, scores[dim], 254]))
    with pytest.raises(ValueError, match='needs labels from 0'): check_target(f, pred, wrong)
    with pytest.raises(ValueError, match='it needs labels of shape'): check_target(f, pred, target[..., None])
    with pytest.raises(ValueError, match='it needs labels of shape'): check_target(f, pred, target[None])
    for kind in torch.float32, torch.bool, torch.complex64:
        with pytest.raises(TypeError, match=r'target\.long\(\)'): check_target(f, pred, target.to(kind))


@quick
@given(data=st.data(), seed=seeds, soft=st.sampled_from(['shares', 'one-hot']))
def test_shares_of_classes_pass(data, seed, soft):
    f = data.draw(st.sampled_from(class_losses))
    scores, labels = data.draw(class_shapes(False))
    dim = min(len(scores), 2) - 1
    pred = torch.randn(scores, generator=gen(seed))
    target = torch.randn(scores, generator=gen(seed + 1)).softmax(dim)
    if soft == 'one-hot': target = torch.zeros(scores).scatter(dim, target.argmax(dim, keepdim=True), 1.) if target.numel() else target
    with silent(): check_target(f, pred, target)
    if not target.numel(): return
    f(pred, target)
    with told() as texts: check_target(f, pred, target * 2)
    assert len(texts) == 1 and 'sum to 1' in texts[0]
    with pytest.raises(ValueError, match='at least 0'): check_target(f, pred, target - 1)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), shape=st.lists(st.integers(0, 5), max_size=4), seed=seeds, dtype=floats)
def test_values_of_the_right_shape_pass_and_the_loss_takes_them(data, shape, seed, dtype):
    f = data.draw(st.sampled_from(value_losses + binary_losses))
    pred = torch.rand(shape, generator=gen(seed)).to(dtype)
    target = torch.rand(shape, generator=gen(seed + 1)).to(dtype)
    with silent(): check_target(f, pred, target)
    f(pred, target)
    if dtype.itemsize == 2:
        with silent(): check_target(f, pred, target.float())


@settings(deadline=None, max_examples=300)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), max_size=4), other=st.lists(st.integers(1, 5), max_size=4), seed=seeds)
def test_values_of_another_shape_or_kind_raise(data, shape, other, seed):
    f = data.draw(st.sampled_from(value_losses + binary_losses))
    pred = torch.rand(shape, generator=gen(seed))
    if shape != other:
        with pytest.raises(ValueError, match='broadcast or refuse'): check_target(f, pred, torch.rand(other))
    for kind in torch.int64, torch.bool, torch.uint8:
        whole, pred = torch.ones(shape).to(kind), pred.detach().requires_grad_()
        if getattr(f, 'func', f) in refuse_whole or isinstance(f, (nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)):
            with pytest.raises(TypeError, match='compares quantities'): check_target(f, pred, whole)
            with pytest.raises((RuntimeError, TypeError, NotImplementedError)): f(pred, whole).sum().backward()
        else:
            with told() as texts: check_target(f, pred, whole)
            assert len(texts) == 1 and 'casts' in texts[0] and 'cross_entropy for classes' in texts[0]
            if kind != torch.bool: torch.testing.assert_close(f(pred, whole), f(pred, whole.float()))
    with told() as texts: check_target(f, pred, torch.rand(shape).double())
    assert len(texts) == 1 and 'casts' in texts[0]
    if getattr(f, 'reduction', 'mean') != 'none':
        for bad in nan, inf:
            with pytest.raises(ValueError, match='NaN or inf'): check_target(f, pred, torch.full(shape, bad))
    if f in binary_losses:
        for bad in 1.5, -.5:
            with pytest.raises(ValueError, match='from 0 to 1'): check_target(f, pred, torch.full(shape, bad))


def test_targets_that_are_masked_may_be_anything():
    pred, target, mask = torch.randn(4, 2), torch.tensor([[1., -1.], [0., 1.], [-1., -1.], [1., 0.]]), torch.ones(4, 2)
    mask[target < 0] = 0
    with silent():
        for f in nn.BCEWithLogitsLoss(weight=mask), partial(F.binary_cross_entropy_with_logits, weight=mask): check_target(f, pred, target)
        check_target(nn.MSELoss(reduction='none'), pred, target / mask)
        scores = pred.masked_fill(torch.tensor([False, True]), -inf)  # a choice that is not open
        check_target(F.cross_entropy, scores, torch.zeros(4).long())
        check_target(F.nll_loss, scores.log_softmax(1), torch.zeros(4).long())
    with pytest.raises(ValueError, match='0 to 1'): check_target(nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), pred, target)


def test_column_against_list():
    with pytest.raises(ValueError, match=r'\(8, 1\) and a target of shape \(8,\).*target\.reshape\(8, 1\)'): check_target(F.mse_loss, torch.ones(8, 1), torch.ones(8))
    with pytest.raises(ValueError, match='one target a prediction'): check_target(F.mse_loss, torch.ones(8, 2), torch.ones(8))
    with pytest.raises(ValueError, match='two classes or more'): check_target(F.cross_entropy, torch.ones(8, 1), torch.zeros(8).long())
    with pytest.raises(ValueError, match='argmax'): check_target(F.cross_entropy, torch.randn(8, 3), torch.ones(8, 3).long())
    with pytest.raises(ValueError, match='subtract 1'): check_target(F.cross_entropy, torch.randn(3, 3), torch.tensor([1, 2, 3]))


def test_scores_that_are_something_else():
    pred, target = torch.randn(8, 3), torch.randint(3, (8,))
    for f in F.nll_loss, nn.NLLLoss(), minibatch.nll:
        with pytest.raises(ValueError, match='log_softmax'): check_target(f, pred + 5, target)
    for f in F.cross_entropy, nn.CrossEntropyLoss(), minibatch.cross_entropy:
        with told() as texts:
            for _ in range(3): check_target(f, pred.softmax(-1), target)
        assert len(texts) == 1 and 'softmax' in texts[0]
        with silent(): check_target(f, pred.log_softmax(-1), target)


class Focal(nn.CrossEntropyLoss):
    def forward(self, input, target): return super().forward(input, target) * 2


@pytest.mark.parametrize('f', [lambda p, t: p.sum(), Focal(), partial(F.cross_entropy, torch.ones(2, 3)), F.kl_div, nn.GaussianNLLLoss(), None, 'mse', torch.sub])
def test_unknown_losses_pass(f):
    with silent():
        check_target(f, torch.ones(4, 1), torch.ones(4))
        check_first_loss(f, torch.ones(4, 3), torch.tensor(1e9))


def test_known_losses_with_strange_arguments_pass():
    for pred, target in ((None, torch.ones(2)), (torch.ones(2), [1, 2]), ({}, {})): check_target(F.mse_loss, pred, target)


# the first loss

@quick
@given(data=st.data(), classes=st.integers(2, 2000), n=st.integers(8, 64), seed=seeds, scale=st.floats(0, 1), smoothing=st.sampled_from([0., .1, .5]), reduction=st.sampled_from(['mean', 'sum', 'none']), ignored=st.booleans())
def test_first_losses_of_fresh_models_pass(data, classes, n, seed, scale, smoothing, reduction, ignored):
    pred = torch.randn(n, classes, generator=gen(seed)) * scale
    target = torch.randint(classes, (n,), generator=gen(seed + 1))
    if ignored: target[::2] = -100
    weight = torch.rand(classes, generator=gen(seed)) + .01 if data.draw(st.booleans()) else None
    f = partial(F.cross_entropy, weight=weight, label_smoothing=smoothing, reduction=reduction)
    g = nn.CrossEntropyLoss(weight, label_smoothing=smoothing, reduction=reduction)
    spread = f(pred, target) / (1 if reduction == 'mean' else n)
    if classes > 2 and spread.sum() > .6 * math.log(classes):  # two classes may have luck
        with silent():
            for loss in f, g: check_first_loss(loss, pred, loss(pred, target))
    if not ignored and scale < .5:
        with silent():
            for loss in minibatch.cross_entropy, F.cross_entropy: check_first_loss(loss, pred, loss(pred, target))


def test_first_losses_that_are_off():
    pred, target = torch.randn(16, 10), torch.randint(10, (16,))
    for f in F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction='sum'), partial(F.cross_entropy, reduction='none'), minibatch.cross_entropy:
        with told() as texts:
            for _ in range(3): check_first_loss(f, pred * 30, f(pred * 30, target))
        assert len(texts) == 1 and 'initialisation' in texts[0]
    knows = 20. * F.one_hot(target, 10)
    for f in F.cross_entropy, nn.NLLLoss(), minibatch.nll:
        with told() as texts: check_first_loss(f, knows.log_softmax(-1), f(knows.log_softmax(-1), target))
        assert len(texts) == 1 and 'look for the answer' in texts[0]
    spatial, places = torch.randn(2, 10, 5, 5) * 30, torch.randint(10, (2, 5, 5))
    with told() as texts: check_first_loss(F.cross_entropy, spatial, F.cross_entropy(spatial, places))
    assert '10 classes' in texts[0]
    with silent():
        for x in torch.tensor(3.), torch.empty(0, 3), None: check_first_loss(F.cross_entropy, x, torch.tensor(99.))
        check_first_loss(F.cross_entropy, pred, torch.tensor(nan))


# gradients and modes

def test_zeroed():
    model = net()
    check_zeroed(model)
    x = torch.randn(8, 8)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r'0\.weight.*zero_grad.*accumulate'): check_zeroed(model)
    model.zero_grad(set_to_none=False)
    check_zeroed(model)
    model[4].bias.grad = torch.full((3,), nan)
    with pytest.raises(RuntimeError, match=r'4\.bias'): check_zeroed(model)
    sparse = nn.Embedding(5, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='weight'): check_zeroed(sparse)


def test_gradients_that_nobody_uses_may_stay():
    model, x = net(), torch.randn(8, 8)
    model(x).sum().backward()
    head = torch.optim.SGD(model[4].parameters(), .1)
    with pytest.raises(RuntimeError, match=r'4\.weight'): check_zeroed(model, head)
    head.zero_grad()
    check_zeroed(model, head)
    with pytest.raises(RuntimeError, match=r'0\.weight'): check_zeroed(model)
    with pytest.raises(RuntimeError, match=r'0\.weight'): check_zeroed(model, object())
    model[:2].requires_grad_(False)
    check_zeroed(model)


def test_gradients_used_up_during_backward():
    model = nn.Linear(2, 2)
    def used(p): p.grad = None
    for p in model.parameters(): p.register_post_accumulate_grad_hook(used)
    model(torch.ones(1, 2)).sum().backward()
    with silent(): check_grads(model)


def test_grads():
    model = nn.ModuleDict(dict(used=nn.Linear(2, 2), idle=nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match='no parameter has a gradient'): check_grads(model)
    model['used'](torch.ones(1, 2)).sum().backward()
    with told() as texts:
        for _ in range(3): check_grads(model)
    assert len(texts) == 1 and 'idle.weight, idle.bias' in texts[0]
    model['idle'].requires_grad_(False)
    with silent(): check_grads(model)
    with silent(): check_grads(model.requires_grad_(False))


def test_training_mode():
    right = [net(), nn.Linear(2, 2).eval(), nn.Sequential(nn.Dropout(0.)).eval(), nn.Sequential(nn.InstanceNorm1d(3), nn.LayerNorm(3)).eval(), nn.LSTM(2, 2).eval()]
    frozen = net()
    frozen[1].eval()
    for model in right + [frozen]:
        with silent(): check_training(model)
    for model, word in (net().eval(), '1 (BatchNorm1d), 3 (Dropout)'), (nn.Dropout().eval(), 'the model (Dropout)'), (nn.LSTM(2, 2, 2, dropout=.1).eval(), 'LSTM'), (nn.TransformerEncoderLayer(4, 2).eval(), 'dropout'):
        with told() as texts:
            for _ in range(3): check_training(model)
        assert len(texts) == 1 and word in texts[0]
    model = nn.Sequential(net().requires_grad_(False).eval(), nn.Linear(3, 3), nn.Dropout())
    with silent(): check_training(model)
    model[2].eval()
    with told() as texts: check_training(model)
    assert len(texts) == 1 and texts[0].startswith('2 (Dropout) left')
    model[0][4].requires_grad_(True)
    with told() as texts: check_training(copy.deepcopy(model))
    assert len(texts) == 1 and '0.3 (Dropout), 2 (Dropout)' in texts[0]
    part = net()
    part[3].eval()
    with told() as texts: check_training(part)
    assert '3 (Dropout)' in texts[0] and 'Batch' not in texts[0]


# numbers that are not finite

class Many(nn.Module):
    "Takes a dict and a tuple, gives a tuple with a dict"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.free = nn.Linear(2, 2), nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    def forward(self, d, pair): return self.a(d['x']), dict(y=self.b(pair[0]) + self.free), 'text', None


def test_first_nonfinite():
    model, x = net(), torch.randn(8, 8)
    with Traces(model): assert first_nonfinite(model, x) is None
    for place, name in ((0, 'the weight 0.weight'), (4, 'the weight 4.weight')):
        bad = copy.deepcopy(model)
        with torch.no_grad(): bad[place].weight[0, 0] = nan
        with Traces(bad): assert first_nonfinite(bad, x) == name
    with Traces(model): assert first_nonfinite(model, x.index_fill(0, torch.tensor(3), inf)) == 'the inputs'
    big = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    with torch.no_grad(): big[1][1].weight.fill_(1e38)
    with Traces(big): assert first_nonfinite(big, 100 + x.abs()) == 'the output of layer 1.1 (Linear)'
    unused = nn.Sequential(nn.Linear(8, 8))
    unused.extra = nn.Parameter(torch.tensor(nan))
    unused.forward = lambda x: x
    assert first_nonfinite(unused, x) == 'the weight extra'


def test_first_nonfinite_in_structures():
    model, good, bad = Many(), torch.ones(1, 2), torch.full((1, 2), nan)
    Pair = namedtuple('Pair', 'a b')
    assert first_nonfinite(model, {'x': good}, (good, 3)) is None
    assert first_nonfinite(model, OrderedDict(x=bad), [good]) == 'the inputs'
    assert first_nonfinite(model, {'x': good}, Pair(bad, None)) == 'the inputs'
    with torch.no_grad(): model.free.fill_(inf)
    assert first_nonfinite(model, {'x': good}, (good,)) == 'the weight free'
    class Root(nn.Module):
        def forward(self, x): return {'deep': [x.log()]}
    assert first_nonfinite(Root(), torch.zeros(2)) == 'the output of the model (Root)'
    assert first_nonfinite(nn.Embedding(4, 2), torch.tensor([1])) is None


def test_errors_in_forward_leave_no_trace():
    class Breaks(nn.Module):
        def forward(self, x): raise KeyError('mine')
    model, x = nn.Sequential(net(), Breaks()), torch.randn(8, 8)
    for f in first_nonfinite, dead_units:
        with Traces(model), pytest.raises(KeyError, match='mine'): f(model, x)
    # a layer that would choke on NaN does not hide where it came from
    class Chokes(nn.Module):
        def forward(self, x): return torch.multinomial(x.softmax(-1), 1).float()
    class Log(nn.Module):
        def forward(self, x): return (x - 9).log()
    assert first_nonfinite(nn.Sequential(nn.ReLU(), Log(), Chokes()), torch.rand(2, 3)) == 'the output of layer 1 (Log)'


def test_check_finite():
    model, x = net(), torch.randn(8, 8)
    with Traces(model):
        for loss in torch.tensor(1.), 2., torch.ones(3): check_finite(loss, model, x, batch=3)
    with Traces(model), pytest.raises(FloatingPointError, match='the loss is nan in batch 7; the model is finite: look at the target'): check_finite(torch.tensor(nan), model, x, batch=7)
    with pytest.raises(FloatingPointError, match='the loss is inf; the first bad number is in the inputs'): check_finite(inf, model, x * inf)
    nothing = F.cross_entropy(model(x), torch.full((8,), -100))
    with pytest.raises(FloatingPointError, match='the model is finite: look at the target, whose labels may all be ignored'): check_finite(nothing, model, x)
    for wrong in (), (x, x):
        with Traces(model), pytest.raises(FloatingPointError, match='the loss is nan in batch 2; no layer can be named.*positional argument'): check_finite(nan, model, *wrong, batch=2)


@pytest.mark.parametrize('wrap', [nn.DataParallel, partial(torch.compile, backend='eager')])
def test_wrapped_models(wrap):
    model, x = net(), torch.randn(8, 8)
    with torch.no_grad(): model[4].weight[0, 0] = nan
    with Traces(model):
        assert first_nonfinite(wrap(model), x).endswith('4.weight')
        assert [*dead_units(wrap(model), x)][0].endswith('2')


def test_backward_works_after_a_look():
    model, x = net(), torch.randn(8, 8)
    loss = model(x).square().sum()
    first_nonfinite(model, x)
    dead_units(model, x)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# dead units

def test_dead_units():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(.9), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias[:2] = -1e6
        model[2].bias[:] = -1e6
    x = torch.randn(64, 4)
    with Traces(model): shares = dead_units(model, x)
    assert set(shares) == {'1', '3'} and shares['1'] >= .25 and shares['3'] == 1
    with told() as texts:
        for _ in range(3): check_dead(model, x)
    assert len(texts) == 1 and '3 (100%)' in texts[0] and '1 (' not in texts[0]
    with told() as texts: check_dead(model, x, share=.2)
    assert '1 (' in texts[0]


class Clip(nn.Module):
    def forward(self, x): return x.clamp(min=0)


@pytest.mark.parametrize('make, x, dead', [
    (lambda: nn.Conv2d(3, 8, 3), torch.randn(4, 3, 6, 6), 2), (lambda: nn.Conv1d(3, 8, 3), torch.randn(4, 3, 6), 2),
    (lambda: nn.Linear(5, 8), torch.randn(4, 7, 5), 2), (lambda: nn.Linear(5, 8), torch.randn(4, 7, 3, 5), 2)])
@pytest.mark.parametrize('act', [nn.ReLU, nn.ReLU6, Clip])
def test_units_are_channels_after_a_convolution_and_the_last_dimension_after_a_linear(make, x, dead, act):
    layer = make()
    with torch.no_grad():
        layer.bias.fill_(1e3)
        layer.bias[:dead] = -1e3
    pool = nn.MaxPool1d(2) if x.ndim == 3 else nn.Identity()
    assert dead_units(nn.Sequential(layer, act(), pool, nn.Dropout()), x) == {'1': dead / 8}


def test_other_activations():
    x = torch.randn(32, 4)
    for act in nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(), nn.PReLU(), nn.Identity(), nn.Softmax(-1): assert dead_units(nn.Sequential(nn.Linear(4, 8), act), x) == {}
    assert dead_units(nn.ReLU(), -x.abs()) == {'the model': 1.}
    assert dead_units(nn.ReLU(), torch.empty(0, 4)) == {}
    relu = nn.Sequential(nn.Linear(4, 64), nn.ReLU())
    for n in range(40):
        torch.manual_seed(n)
        with silent(): check_dead(relu, torch.randn(1 + n % 9, 4))  # one row in a healthy layer: half of it is 0
    assert dead_units(relu, x[:7]) == {} and [*dead_units(relu, x[:8])] == ['1']
    assert dead_units(nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU()), torch.randn(1, 1, 3, 3)).keys() == {'1'}
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
        def forward(self, x): return self.act(-x.abs()) + self.act(x.abs() + 1)
    assert dead_units(Twice(), x) == {'act': .5}


# one batch by heart

def test_overfit_leaves_everything_alone():
    model = net()
    batch = torch.randn(16, 8), torch.randint(3, (16,))
    model(batch[0]).sum().backward()
    opt = torch.optim.Adam(model.parameters())
    with Traces(model): losses = overfit_batch(model, F.cross_entropy, batch, lr=.01, steps=150)
    assert len(losses) == 150 and losses[-1] < losses[0] / 3 and not opt.state
    assert overfit_batch(model, F.cross_entropy, batch, lr=.01, steps=150) == losses
    with torch.no_grad(), Traces(model): overfit_batch(model, F.cross_entropy, batch, torch.optim.SGD, .3)


def test_overfit_does_not_touch_a_loss_that_knows_the_model():
    model = nn.Linear(4, 1)
    def loss(pred, target): return F.mse_loss(pred, target) + 1e-6 * sum(p.square().sum() for p in model.parameters())
    x = torch.randn(8, 4)
    with Traces(model): overfit_batch(model, loss, (x, x[:, :1] * 2), lr=.05, steps=200)


@pytest.mark.parametrize('case', ['broadcast', 'detached', 'constant inputs', 'nan', 'mean of a large target'])
def test_overfit_says_no(case):
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    y = x[:, :1] * 3
    model, loss, lr = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)), F.mse_loss, .01
    if case == 'broadcast': loss = lambda p, t: (p - t.squeeze(1)).square().mean()
    if case == 'detached': loss = lambda p, t: F.mse_loss(p.mean().expand_as(t), t)
    if case == 'constant inputs': x = torch.zeros(16, 8)
    if case == 'nan': loss = lambda p, t: F.mse_loss(p, t) * nan
    if case == 'mean of a large target': y, loss = y + 100, lambda p, t: (p - t.squeeze(1)).square().mean()
    with pytest.raises(RuntimeError, match='by heart.*check_target'): overfit_batch(model, loss, (x, y), lr=lr, steps=300)


def test_overfit_of_other_kinds():
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20))
    tokens = torch.randint(20, (4, 9))
    overfit_batch(words, minibatch.cross_entropy, (tokens, tokens.flip(1) * 0 + tokens), lr=.02)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 1)
        def forward(self, d, y): return self.l(torch.cat([d['x'], y], 1))
    x = torch.randn(8, 4)
    overfit_batch(Two(), F.mse_loss, ({'x': x}, x, x[:, :1]), lr=.05)
    same = nn.Linear(4, 2)
    overfit_batch(same, F.cross_entropy, (x, torch.zeros(8).long()), lr=.1)
    overfit_batch(same, F.cross_entropy, (x[:1], torch.zeros(1).long()), lr=.1)
    negative = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    overfit_batch(negative, lambda p, t: F.mse_loss(p, t) - 5 * torch.exp(-F.mse_loss(p, t)), (x, x[:, :1] * 2), lr=.05, steps=300)
    with pytest.raises(ValueError, match='above 0'): overfit_batch(same, F.mse_loss, (x, x), lr=0)
    with pytest.raises(ValueError, match='at least one step'): overfit_batch(same, F.mse_loss, (x, x), steps=0)
    with pytest.raises(ValueError, match='frozen'): overfit_batch(copy.deepcopy(same).requires_grad_(False), F.mse_loss, (x, x))


@pytest.mark.parametrize('kind', ['soft', 'smoothed', 'yes or no'])
def test_overfit_with_a_loss_that_cannot_reach_0(kind):
    torch.manual_seed(0)
    x, model = torch.randn(16, 8), nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 10))
    y, loss = torch.randn(16, 10).softmax(1), F.cross_entropy
    perfect = y.log()
    if kind == 'smoothed':
        y, loss = torch.arange(16) % 10, nn.CrossEntropyLoss(label_smoothing=.4)
        perfect = (.04 + .6 * F.one_hot(y, 10)).log()
    if kind == 'yes or no':
        loss, y = F.binary_cross_entropy_with_logits, torch.rand(16, 10)
        perfect = y.logit()
    floor = float(loss(perfect, y))
    losses = overfit_batch(model, loss, (x, y), lr=.01, steps=300, floor=floor)
    assert floor - 1e-5 < losses[-1] < floor + .1
    with pytest.raises(RuntimeError, match='the floor of a loss'): overfit_batch(model, loss, (x, y), lr=.01, steps=300)
    with pytest.raises(RuntimeError, match='by heart'): overfit_batch(model, lambda p, t: loss(p.detach() + 0 * p, t), (x, y), lr=.01, steps=300, floor=floor)


# warnings

def test_warnings_are_given_once_whatever_the_filters_and_point_at_the_caller():
    model, other = net().eval(), net().eval()
    sanity._told.clear()
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter('default')
        for m in model, other, model: check_training(m)
    assert len(log) == 2 and all(w.category is SanityWarning and w.filename == __file__ for w in log)
    third = net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error', SanityWarning)
        for _ in range(2):
            with pytest.raises(SanityWarning): check_training(third)
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter('always')
        warnings.filterwarnings('ignore', category=SanityWarning)
        check_training(third)
    assert not log
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter('always')
        for _ in range(3): check_target(F.mse_loss, torch.ones(2), torch.ones(2).double())
    assert {w.filename for w in log} <= {__file__}


def test_models_are_freed_by_counting_alone():
    def use():
        model = net()
        opt, loss = torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss()
        model[4] = nn.Linear(16, 3)
        x, y = torch.randn(8, 8) * 300, torch.randint(3, (8,))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            check_optimizer(opt, model), check_inputs(x, model), check_dead(model, x, share=0), check_training(model.eval()), check_first_loss(loss, 99 * model(x), 99., model)
            check_target(loss, model(x).softmax(-1), y)
            model(x).sum().backward()
            model[0].weight.grad = None
            check_grads(model), first_nonfinite(model, x), overfit_batch(model, loss, (x, y))
            with pytest.raises(FloatingPointError): check_finite(nan, model, x)
        return weakref.ref(model), weakref.ref(opt), weakref.ref(loss)
    sanity._told.clear()
    gc.collect()
    gc.disable()
    try: refs = use()
    finally: gc.enable()
    # PyTorch's optimizers are in cycles of their own; the model and the loss are in none
    assert refs[0]() is None and refs[2]() is None
    gc.collect()
    assert refs[1]() is None and not sanity._told


@pytest.mark.skipif(not torch.accelerator.is_available(), reason='no accelerator')
def test_on_an_accelerator():
    device = torch.accelerator.current_accelerator()
    model = net().to(device)
    x, y = torch.randn(16, 8, device=device), torch.randint(3, (16,), device=device)
    module = torch.get_device_module(device)
    state = module.get_rng_state() if device.type == 'mps' else module.get_rng_state(device)
    with Traces(model), silent():
        check_inputs(x), check_target(F.cross_entropy, model.eval()(x), y)
        model.train()
        check_zeroed(model), check_training(model)
        assert first_nonfinite(model, x) is None
        dead_units(model, x)
        overfit_batch(model, F.cross_entropy, (x, y), steps=200)
    assert torch.equal(state, module.get_rng_state() if device.type == 'mps' else module.get_rng_state(device))
    with pytest.raises(ValueError, match='needs labels from 0'): check_target(minibatch.cross_entropy, model(x), y + 5)
    with pytest.raises(FloatingPointError, match='the inputs'): check_finite(torch.tensor(nan, device=device), model, x * nan)
