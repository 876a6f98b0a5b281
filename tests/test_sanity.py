"The checks stay silent on what is right, speak on what is wrong, and leave no trace in model, mode or random state."
import copy
import gc
import math
import random
import re
import warnings
import weakref
from collections import OrderedDict, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import dlfound.sanity as sanity
from dlfound import minibatch
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset
from dlfound.sanity import (SanityWarning, check_dead, check_finite, check_first_loss, check_grads, check_hidden_state,
                            check_inputs, check_loader, check_lr, check_optimizer, check_target, check_trainable,
                            check_training, check_zeroed, dead_units, finite, first_nonfinite, known_loss,
                            overfit_batch)

inf, nan = math.inf, math.nan
quick = settings(deadline=None, max_examples=150)


@contextmanager
def told():
    "The SanityWarnings of a block, of which nothing is remembered from before"
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
def gen(seed): return torch.Generator().manual_seed(seed)


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


# The learning rate, the model, the loader

@pytest.mark.parametrize('lr', [.1, 1, 1e-12, np.float32(.1), np.float64(.1), np.int64(1), np.array(.1),
                                torch.tensor(.1), torch.tensor(1), torch.tensor(.1, dtype=torch.bfloat16),
                                Fraction(1, 10)])
def test_lr_passes(lr): check_lr(lr)


@pytest.mark.parametrize('lr', [0, 0., -.0, -.1, nan, inf, -inf, np.float32(0), np.float64(nan), torch.tensor(0.),
                                torch.tensor(nan)])
def test_lr_has_no_use(lr):
    with pytest.raises(ValueError, match='above 0'): check_lr(lr)


@pytest.mark.parametrize('lr', ['.1', None, [.1], (.1,), 1j, {}])
def test_lr_is_no_number(lr):
    with pytest.raises(TypeError): check_lr(lr)


def test_trainable():
    assert list(check_trainable(net())) == [n for n, _ in net().named_parameters()]
    with pytest.raises(ValueError, match='ModuleList'): check_trainable(nn.Sequential(nn.ReLU()))
    frozen = net().requires_grad_(False)
    with pytest.raises(ValueError, match='all are frozen'): check_trainable(frozen)
    frozen[4].bias.requires_grad_()
    assert list(check_trainable(frozen)) == ['4.bias']


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(range(3))


@pytest.mark.parametrize('kind', [DataLoader, torch.utils.data.DataLoader])
def test_loader(kind):
    data = Dataset(torch.ones(10, 2), torch.ones(10))
    for dl in (kind(data, 4), kind(data, 10, drop_last=True), kind(data, None), iter([1]), [1],
               kind(data, batch_sampler=[[1]]), None, (i for i in 'a')): check_loader(dl)
    with pytest.raises(ValueError, match='valid is empty.*lower batch_size if drop_last'):
        check_loader(kind(data, 64, drop_last=True), 'valid')
    empty = Dataset(torch.ones(0, 2), torch.ones(0))
    for dl in kind(empty, 4), [], kind(data, 4, sampler=[]), kind(data, batch_sampler=[]):
        with pytest.raises(ValueError, match='is empty'): check_loader(dl)


# The optimizer

def test_optimizer_of_the_model():
    model = net()
    groups = [dict(params=model[:3].parameters()), dict(params=model[3:].parameters(), lr=1.)]
    for opt in torch.optim.SGD(model.parameters(), .1), torch.optim.Adam(groups), object():
        with silent(): check_optimizer(opt, model)
    model[0].requires_grad_(False)
    for params in [p for p in model.parameters() if p.requires_grad], list(model.parameters()):
        with silent(): check_optimizer(torch.optim.SGD(params, .1), model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with silent(): check_optimizer(torch.optim.SGD(tied.parameters(), .1), tied)


def test_optimizer_of_another_model():
    model = net()
    for other in net(), copy.deepcopy(model):
        with pytest.raises(ValueError, match='the optimizer lacks 0.weight.*after all layers'):
            check_optimizer(torch.optim.SGD(other.parameters(), .1), model)
    with pytest.raises(ValueError, match='frozen'):
        check_optimizer(torch.optim.SGD(model.parameters(), .1), copy.deepcopy(model).requires_grad_(False))
    opt = torch.optim.SGD(model.parameters(), .1)
    model[4] = nn.Linear(16, 5)
    with told() as texts:
        for _ in range(3): check_optimizer(opt, model)
    assert len(texts) == 1 and 'lacks 4.weight, 4.bias' in texts[0]


# Inputs

dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@quick
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), scale=st.floats(.2, 3), shift=st.floats(-1, 1),
       dtype=dtypes, seed=st.integers(0, 99))
def test_inputs_near_normal_pass(shape, scale, shift, dtype, seed):
    x = torch.randn(64, *shape, generator=gen(seed))
    x = (x - x.mean()) / x.std() # 64 numbers with a scale of 3 have a mean up to 1 of their own
    with silent(): check_inputs((x * scale + shift).to(dtype))


@quick
@given(scale=st.sampled_from([1e-30, 1e-4, 20., 255., 1e4, 1e15]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_inputs_far_from_normal_warn(scale, dtype):
    x = (torch.randn(64, 5, generator=gen(0)) * scale).to(dtype)
    with told() as texts: check_inputs(x)
    assert len(texts) == 1 and 'root mean square' in texts[0]


def test_inputs_that_are_fine():
    "One-hot rows, TF-IDF and quiet sound have small entries, and rows of ordinary length"
    raw = torch.rand(64, 3, 8, 8)
    tfidf = torch.rand(32, 20_000).pow(200)
    sound = .002 * torch.randn(8, 1, 8000)
    fine = (raw, raw > .5, (raw * 255).byte(), torch.randint(50_000, (4, 7)), None, 'text', [raw * 999],
            torch.tensor(1.), F.one_hot(torch.arange(100)).float(), F.one_hot(torch.arange(8), 50_000).float(),
            tfidf / tfidf.norm(dim=1, keepdim=True), sound, raw.to(torch.complex64), x_sparse := raw[0, 0].to_sparse(),
            x_sparse.to_sparse_csr(), torch.zeros(0, 3), torch.zeros(3, 0))
    for x in fine:
        with silent(): check_inputs(x)


def test_inputs_that_are_not():
    "An offset of two standard deviations, at which training fails; a division by 255 too few or too many"
    digits = torch.rand(64, 784) * (torch.rand(64, 784) < .2)
    for x in torch.randn(64, 784) + 2, digits * 255, digits / 255 / 255, torch.zeros(4, 4), 290 + 10 * torch.randn(64):
        with told() as texts: check_inputs(x)
        assert len(texts) == 1, (x.mean(), x.std())
    with told() as texts: check_inputs(torch.full((100_000,), 300., dtype=torch.float16))
    assert 'mean 3e+02' in texts[0]
    for bad in nan, inf, -inf:
        x = torch.rand(64, 3)
        x[0, 0] = bad
        owner = net()
        with told() as texts:
            for _ in range(2): check_inputs(x, owner)
        assert len(texts) == 1 and 'NaN, infinite or far too large' in texts[0]
    with told() as texts: check_inputs(torch.full((4, 3), 1e20)) # Finite, but its square is not
    assert 'far too large' in texts[0]


def test_inputs_of_no_dimension_or_an_offset():
    with told() as texts: check_inputs(torch.tensor(0.))
    assert len(texts) == 1
    for offset, n in (1, 0), (1.3, 1), (-1.3, 1):
        with told() as texts: check_inputs(torch.randn(64, 784, generator=gen(0)) + offset)
        assert len(texts) == n


def test_warnings_are_once_for_each_owner():
    a, b = net(), net()
    with told() as texts:
        for i in range(5):
            for owner in a, b: check_inputs(torch.rand(8, 8) * (300 + i), owner)
    assert len(texts) == 2
    with told() as texts:
        for _ in range(3): check_inputs(torch.arange(9.) * 99)
    assert len(texts) == 3


# Targets

class_losses = [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=.1, reduction='sum'),
                partial(F.cross_entropy, label_smoothing=.1), minibatch.cross_entropy,
                partial(partial(F.cross_entropy, reduction='none'), reduction='mean')]
nll_losses = [F.nll_loss, nn.NLLLoss(), partial(F.nll_loss, reduction='sum'), minibatch.nll]
value_losses = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, nn.MSELoss(), nn.L1Loss(),
                nn.SmoothL1Loss(beta=2.), nn.HuberLoss(), partial(F.huber_loss, delta=2.), nn.MSELoss(reduction='none')]
binary_losses = [F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss(), F.binary_cross_entropy,
                 nn.BCELoss(reduction='sum')]
seeds = st.integers(0, 99)
class_shapes = st.tuples(st.integers(0, 5), st.integers(2, 7), st.lists(st.integers(1, 4), max_size=3)).map(
    lambda t: ((t[1],), ()) if t[0] == 0 and not t[2] else ((t[0], t[1], *t[2]), (t[0], *t[2])))


@settings(deadline=None, max_examples=300)
@given(f=st.sampled_from(class_losses + nll_losses), shapes=class_shapes, seed=seeds, dtype=dtypes)
def test_labels_that_are_right_pass_and_the_loss_takes_them(f, shapes, seed, dtype):
    scores, labels = shapes
    dim = min(len(scores), 2) - 1
    pred = torch.randn(scores, generator=gen(seed)).to(dtype)
    if f in nll_losses: pred = pred.log_softmax(dim)
    target = torch.randint(scores[dim], labels, generator=gen(seed))
    with silent(): check_target(f, pred, target)
    if target.numel(): f(pred.float(), target)


@quick
@given(shapes=class_shapes, seed=seeds, index=st.sampled_from([-100, -1, 255, 99]))
def test_ignored_labels_pass_in_every_form(shapes, seed, index):
    scores, labels = shapes
    pred = torch.randn(scores, generator=gen(seed))
    target = torch.randint(scores[min(len(scores), 2) - 1], labels, generator=gen(seed))
    target = torch.where(torch.rand(labels, generator=gen(seed)) < .4, index, target)
    for f in nn.CrossEntropyLoss(ignore_index=index), partial(F.cross_entropy, ignore_index=index):
        with silent(): check_target(f, pred, target)
        if target.numel(): f(pred, target)
    if index != -100 and (target == index).any():
        for f in F.cross_entropy, nn.CrossEntropyLoss():
            with pytest.raises(ValueError, match='add outputs or ignore_index'): check_target(f, pred, target)


@quick
@given(f=st.sampled_from(class_losses), shapes=class_shapes.filter(lambda s: math.prod(s[1]) > 0), seed=seeds,
       bad=st.sampled_from([-1, -2, 'classes', 254]))
def test_wrong_labels_raise(f, shapes, seed, bad):
    scores, labels = shapes
    dim = min(len(scores), 2) - 1
    pred = torch.randn(scores, generator=gen(seed)).log_softmax(dim)
    target = torch.randint(scores[dim], labels, generator=gen(seed))
    wrong = target.clone()
    wrong.view(-1)[0] = scores[dim] if bad == 'classes' else bad
    with pytest.raises(ValueError, match='with labels'): check_target(f, pred, wrong)
    for shape in target[..., None], target[None]:
        with pytest.raises(ValueError, match='one label each is needed'): check_target(f, pred, shape)
    for kind in torch.float32, torch.bool:
        with pytest.raises(TypeError, match=r'target\.long\(\)'): check_target(f, pred, target.to(kind))


@quick
@given(f=st.sampled_from(class_losses[:4]), shapes=class_shapes, seed=seeds, hot=st.booleans())
def test_shares_of_classes_pass(f, shapes, seed, hot):
    scores, labels = shapes
    dim = min(len(scores), 2) - 1
    pred = torch.randn(scores, generator=gen(seed))
    target = torch.randn(scores, generator=gen(seed + 1)).softmax(dim)
    if hot and target.numel(): target = torch.zeros(scores).scatter(dim, target.argmax(dim, keepdim=True), 1.)
    with silent(): check_target(f, pred, target)
    if not target.numel(): return
    f(pred, target)
    with told() as texts: check_target(f, pred, target * 2)
    assert len(texts) == 1 and 'sum to 1' in texts[0]


@settings(deadline=None, max_examples=200)
@given(f=st.sampled_from(value_losses + binary_losses), shape=st.lists(st.integers(1, 5), max_size=4), seed=seeds)
def test_values_of_the_right_shape_pass_and_the_loss_takes_them(f, shape, seed):
    pred, target = torch.rand(shape, generator=gen(seed)), torch.rand(shape, generator=gen(seed + 1))
    with silent(): check_target(f, pred, target)
    f(pred, target)
    if getattr(f, 'reduction', 'mean') != 'none':
        for bad in nan, inf:
            with pytest.raises(ValueError, match='NaN or inf'): check_target(f, pred, torch.full(shape, bad))
    for bad in (1.5, -.5) if f in binary_losses else ():
        with pytest.raises(ValueError, match='beyond 0 and 1'): check_target(f, pred, torch.full(shape, bad))
    with pytest.raises(ValueError, match='would broadcast'): check_target(f, pred[None], torch.rand(2, *shape))
    with told() as texts: check_target(f, pred, torch.ones(shape).long())
    assert len(texts) == 1 and 'cross_entropy for classes' in texts[0]


def test_targets_that_are_masked_may_be_anything():
    pred, mask = torch.randn(4, 2), torch.ones(4, 2)
    target = torch.tensor([[1., -1.], [0., 1.], [-1., -1.], [1., 0.]])
    mask[target < 0] = 0
    with silent():
        for f in nn.BCEWithLogitsLoss(weight=mask), partial(F.binary_cross_entropy_with_logits, weight=mask):
            check_target(f, pred, target)
        check_target(nn.MSELoss(reduction='none'), pred, target / mask)
        scores = pred.masked_fill(torch.tensor([False, True]), -inf) # A choice that is not open
        check_target(F.cross_entropy, scores, torch.zeros(4).long())
        check_target(F.nll_loss, scores.log_softmax(1), torch.zeros(4).long())
    with pytest.raises(ValueError, match='beyond 0 and 1'):
        check_target(nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), pred, target)


def test_column_against_vector():
    with pytest.raises(ValueError, match=r'\(8, 1\) and a .*\(8,\).*use equal shapes'):
        check_target(F.mse_loss, torch.ones(8, 1), torch.ones(8))
    with pytest.raises(ValueError, match='for yes or no'):
        check_target(F.cross_entropy, torch.ones(8, 1), torch.zeros(8).long())
    with pytest.raises(ValueError, match='argmax'):
        check_target(F.cross_entropy, torch.randn(8, 3), torch.ones(8, 3).long())


@pytest.mark.parametrize('f', class_losses + nll_losses)
def test_classes_that_come_last(f):
    for steps in 7, 1:
        pred, target = torch.randn(4, steps, 100).log_softmax(-1), torch.randint(100, (4, steps))
        with pytest.raises(ValueError, match=r'dimension 1: use pred\.movedim\(-1, 1\)'): check_target(f, pred, target)
        with silent(): check_target(f, pred.movedim(-1, 1), target)
    with silent(): check_target(f, torch.randn(4, 7, 7).log_softmax(1), torch.randint(7, (4, 7)))


def test_scores_that_are_something_else():
    pred, target = torch.randn(8, 3), torch.randint(3, (8,))
    for f in nll_losses:
        with pytest.raises(ValueError, match='log_softmax'): check_target(f, pred + 5, target)
    for f in class_losses:
        owner = net()
        with told() as texts:
            for _ in range(3): check_target(f, pred.softmax(-1), target, owner)
        assert len(texts) == 1 and 'softmax' in texts[0]
        with silent(): check_target(f, pred.log_softmax(-1), target)


class Focal(nn.CrossEntropyLoss):
    def forward(self, input, target): return super().forward(input, target) * 2


@pytest.mark.parametrize('f', [lambda p, t: p.sum(), Focal(), F.kl_div, nn.GaussianNLLLoss(), None, 'mse', torch.sub])
def test_unknown_losses_pass(f):
    with silent():
        check_target(f, torch.ones(4, 1), torch.ones(4))
        check_first_loss(f, torch.ones(4, 3), torch.tensor(1e9))


@dataclass
class Scaled:
    "A loss with options, which like every dataclass that can be compared has no hash"
    scale: float = 2.
    def __call__(self, pred, target): return self.scale * (pred - target).abs().mean()


def test_losses_without_a_hash_pass():
    assert known_loss(Scaled()) == known_loss(partial(Scaled())) == ('', {})
    with silent():
        check_target(Scaled(), torch.ones(4, 1), torch.ones(4))
        check_first_loss(Scaled(), torch.ones(4, 3), torch.tensor(1e9))
    weight = torch.ones(3)
    assert known_loss(nn.CrossEntropyLoss(weight=weight))[1]['weight'] is weight


def test_known_losses_with_strange_arguments_pass():
    for pred, target in (None, torch.ones(2)), (torch.ones(2), [1, 2]), ({}, {}):
        check_target(F.mse_loss, pred, target)


# The first loss

@quick
@given(classes=st.integers(2, 2000), n=st.integers(16, 64), seed=seeds, scale=st.floats(0, .5),
       smoothing=st.sampled_from([0., .1]))
def test_first_losses_of_fresh_models_pass(classes, n, seed, scale, smoothing):
    pred = torch.randn(n, classes, generator=gen(seed)) * scale
    target = torch.randint(classes, (n,), generator=gen(seed + 1))
    f, g = partial(F.cross_entropy, label_smoothing=smoothing), nn.CrossEntropyLoss(label_smoothing=smoothing)
    with silent():
        for loss in f, g, minibatch.cross_entropy: check_first_loss(loss, pred, loss(pred, target))


def test_first_losses_that_are_off():
    pred, target = torch.randn(16, 10), torch.randint(10, (16,))
    for f in F.cross_entropy, nn.CrossEntropyLoss(), minibatch.cross_entropy:
        with told() as texts: check_first_loss(f, pred * 30, f(pred * 30, target))
        assert len(texts) == 1 and 'initialisation' in texts[0]
    knows = (20. * F.one_hot(target, 10)).log_softmax(-1)
    for f in F.cross_entropy, nn.NLLLoss(), minibatch.nll:
        with told() as texts: check_first_loss(f, knows, f(knows, target))
        assert len(texts) == 1 and 'trained before' in texts[0]
    spatial, places = torch.randn(2, 10, 5, 5) * 30, torch.randint(10, (2, 5, 5))
    with told() as texts: check_first_loss(F.cross_entropy, spatial, F.cross_entropy(spatial, places))
    assert len(texts) == 1
    with silent():
        check_first_loss(F.cross_entropy, pred, torch.tensor(nan))
        for f in nn.CrossEntropyLoss(weight=torch.ones(10)), nn.CrossEntropyLoss(reduction='sum'):
            check_first_loss(f, pred, torch.tensor(99.))


# Gradients, modes, hidden state

def test_zeroed():
    model = net()
    check_zeroed(model)
    model(torch.randn(8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r'0\.weight.*zero_grad'): check_zeroed(model)
    model.zero_grad(set_to_none=False)
    check_zeroed(model)
    model[4].bias.grad = torch.full((3,), nan)
    with pytest.raises(RuntimeError, match=r'4\.bias'): check_zeroed(model)
    sparse = nn.Embedding(5, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='weight'): check_zeroed(sparse)
    model[4].requires_grad_(False)
    check_zeroed(model)


def test_gradients_used_up_during_backward():
    model = nn.Linear(2, 2)
    def used(p): p.grad = None
    for p in model.parameters(): p.register_post_accumulate_grad_hook(used)
    model(torch.ones(1, 2)).sum().backward()
    with silent(): check_grads(model)


def test_grads():
    model = nn.ModuleDict(dict(used=nn.Linear(2, 2), idle=nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match='missing backward'): check_grads(model)
    model['used'](torch.ones(1, 2)).sum().backward()
    with told() as texts:
        for _ in range(3): check_grads(model)
    assert len(texts) == 1 and 'idle.weight, idle.bias' in texts[0]
    model['idle'].requires_grad_(False)
    with silent(): check_grads(model)


def test_training():
    model = net()
    with silent(): check_training(model)
    model[1].eval() # Frozen statistics are common practice
    with silent(): check_training(model)
    for place, word in ((3, 'left in eval: 3;'), (None, 'left in eval: 1, 3;')):
        model = net()
        (model if place is None else model[place]).eval()
        with told() as texts:
            for _ in range(3): check_training(model)
        assert len(texts) == 1 and word in texts[0]
    model = nn.Sequential(net().requires_grad_(False).eval(), nn.Linear(3, 3), nn.Dropout()) # An encoder that is kept
    with silent(): check_training(model)
    model[2].eval()
    with told() as texts: check_training(model)
    assert len(texts) == 1 and 'left in eval: 2;' in texts[0]
    for layer in (nn.LSTM(4, 4, 2, dropout=.5), nn.MultiheadAttention(4, 2, dropout=.5),
                  nn.TransformerEncoderLayer(4, 2, 8)):
        layer.eval()
        with told() as texts: check_training(nn.Sequential(layer))
        assert texts
    with silent(): check_training(nn.Sequential(nn.Dropout(0.).eval(), nn.Linear(2, 2)))


class Stateful(nn.Module):
    "A hidden state in a plain attribute, and things that are none"
    def __init__(self):
        super().__init__()
        self.rnn, self.h, self.note = nn.RNN(4, 8, batch_first=True), None, 'text'
        self.register_buffer('steps', torch.zeros(()))
    def forward(self, x):
        out, h = self.rnn(x, self.h)
        self.h = h.detach()
        return out


def test_hidden_state():
    model = nn.Sequential(Stateful())
    with silent(): check_hidden_state(model)
    model(torch.randn(2, 3, 4))
    with told() as texts: check_hidden_state(model), check_hidden_state(model)
    assert len(texts) == 1 and texts[0].startswith('0.h is not saved')
    old = nn.utils.weight_norm(nn.Linear(2, 2)) # Computes a plain attribute anew at each call
    old(torch.ones(1, 2))
    with silent(): check_hidden_state(old), check_hidden_state(net())


def test_hidden_state_in_tuples_and_lists():
    model = nn.LSTM(4, 8)
    for h in (torch.ones(2), torch.ones(2)), [{'h': torch.ones(2)}], [None, (torch.ones(2),)]:
        model.h = h
        with told() as texts: check_hidden_state(model)
        assert len(texts) == 1 and texts[0].startswith('h is not saved')
    model.h = (nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 2, 'text', None)
    with silent(): check_hidden_state(model)


@pytest.mark.parametrize('model, inputs', [
    (nn.GRU(4, 4, 2), 1), (nn.MultiheadAttention(4, 2), 3), (nn.TransformerEncoderLayer(4, 2, 8), 1),
    (nn.utils.spectral_norm(nn.Linear(4, 3)), 1), (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), 1),
    (prune.l1_unstructured(nn.Linear(4, 3), 'weight', 2), 1)])
def test_what_layers_compute_is_no_hidden_state(model, inputs):
    old = nn.utils.weight_norm(nn.Linear(4, 3))
    with torch.no_grad(), silent():
        for m, n in (model, inputs), (model.eval(), inputs), (old, 1):
            m(*[torch.randn(2, 3, 4)] * n)
            check_hidden_state(m)


# Numbers that are not finite

class Many(nn.Module):
    "Takes a dict and a tuple, gives a tuple with a dict"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.free = nn.Linear(2, 2), nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    def forward(self, d, pair): return self.a(d['x']), dict(y=self.b(pair[0]) + self.free), 'text', None


def test_first_nonfinite():
    torch.manual_seed(0)
    model, x = net(), torch.randn(8, 8)
    with Traces(model): assert 'the model is finite' in first_nonfinite(model, x)
    for place, name in ((0, 'the weight 0.weight'), (4, 'the weight 4.weight')):
        bad = copy.deepcopy(model)
        with torch.no_grad(): bad[place].weight[0, 0] = nan
        with Traces(bad): assert first_nonfinite(bad, x) == name
    with Traces(model): assert first_nonfinite(model, x.index_fill(0, torch.tensor(3), inf)) == 'the inputs'
    big = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    with torch.no_grad(): big[1][1].weight.fill_(1e38)
    with Traces(big): assert first_nonfinite(big, 100 + x.abs()) == 'the output of layer 1.1 (Linear)'


def test_first_nonfinite_in_structures():
    model, good, bad = Many(), torch.ones(1, 2), torch.full((1, 2), nan)
    Pair = namedtuple('Pair', 'a b')
    assert 'finite' in first_nonfinite(model, {'x': good}, (good, 3))
    assert first_nonfinite(model, OrderedDict(x=bad), [good]) == 'the inputs'
    assert first_nonfinite(model, {'x': good}, Pair(bad, None)) == 'the inputs'
    with torch.no_grad(): model.free.fill_(inf)
    assert first_nonfinite(model, {'x': good}, (good,)) == 'the weight free'
    class Root(nn.Module):
        def forward(self, x): return {'deep': [x.log()]}
    assert first_nonfinite(Root(), torch.zeros(2)) == 'the output of the model (Root)'
    assert 'finite' in first_nonfinite(nn.Embedding(4, 2), torch.tensor([1]))


def test_plain_attributes_come_back():
    model, x = nn.Sequential(Stateful(), nn.ReLU()), torch.randn(8, 3, 4)
    model(x)
    model[0].pair = h, _ = model[0].h, [model[0].h]
    for f in first_nonfinite, dead_units, check_dead:
        with Traces(model): f(model, x)
        assert model[0].h is h and model[0].pair[0] is h
    model[1] = nn.Linear(1, 1) # Fails when the state has been replaced
    for f in first_nonfinite, dead_units:
        with pytest.raises(RuntimeError): f(model, x)
        assert model[0].h is h
    class Grows(nn.Module): # An attribute that only a forward pass makes
        def forward(self, x):
            self.seen = x
            return x
    grows = Grows()
    first_nonfinite(grows, x)
    assert not hasattr(grows, 'seen') and grows(x) is grows.seen


def test_errors_in_forward_leave_no_trace():
    class Breaks(nn.Module):
        def forward(self, x): raise KeyError('mine')
    model, x = nn.Sequential(net(), Breaks()), torch.randn(8, 8)
    for f in first_nonfinite, dead_units:
        with Traces(model), pytest.raises(KeyError, match='mine'): f(model, x)
    class Chokes(nn.Module): # A layer that would choke on NaN does not hide where it came from
        def forward(self, x): return torch.multinomial(x.softmax(-1), 1).float()
    class Log(nn.Module):
        def forward(self, x): return (x - 9).log()
    assert first_nonfinite(nn.Sequential(nn.ReLU(), Log(), Chokes()), torch.rand(2, 3)) == 'the output of layer 1 (Log)'


def test_check_finite():
    model, x = net(), torch.randn(8, 8)
    with Traces(model):
        for loss in torch.tensor(1.), 2., torch.ones(3): check_finite(loss, model, x, batch=3)
    with Traces(model), pytest.raises(FloatingPointError, match='nan in batch 7; it began in the target or the loss'):
        check_finite(torch.tensor(nan), model, x, batch=7)
    with pytest.raises(FloatingPointError, match=r'inf in batch \?; it began in the inputs'):
        check_finite(inf, model, x * inf)
    for wrong in (), (x, x):
        with Traces(model), pytest.raises(FloatingPointError, match='no layer can be named.*positional argument'):
            check_finite(nan, model, *wrong, batch=2)
    assert finite([torch.ones(2), {'a': (torch.tensor([1]), 'x', None)}]) and not finite({'a': [torch.tensor(nan)]})


def test_compiled_models():
    model, x = net(), torch.randn(8, 8)
    with torch.no_grad(): model[4].weight[0, 0] = nan
    wrapped = torch.compile(model, backend='eager')
    with Traces(model):
        assert first_nonfinite(wrapped, x).endswith('4.weight')
        assert [*dead_units(wrapped, x)][0].endswith('2')


def test_backward_works_after_a_look():
    model, x = net(), torch.randn(8, 8)
    loss = model(x).square().sum()
    first_nonfinite(model, x)
    dead_units(model, x)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# Dead units

def test_dead_units():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(.9),
                          nn.Linear(8, 2))
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


@pytest.mark.parametrize('make, x, dead', [
    (lambda: nn.Conv2d(3, 8, 3), torch.randn(4, 3, 6, 6), 2), (lambda: nn.Conv1d(3, 8, 3), torch.randn(4, 3, 6), 2),
    (lambda: nn.Linear(5, 8), torch.randn(4, 7, 5), 2), (lambda: nn.Linear(5, 8), torch.randn(4, 7, 3, 5), 2)])
@pytest.mark.parametrize('act', [nn.ReLU, nn.ReLU6])
def test_units_are_channels_after_a_convolution_and_the_last_dimension_after_a_linear(make, x, dead, act):
    layer = make()
    with torch.no_grad():
        layer.bias.fill_(1e3)
        layer.bias[:dead] = -1e3
    assert dead_units(nn.Sequential(layer, act(), nn.Dropout()), x) == {'1': dead / 8}


class Second(nn.Module):
    def forward(self, pair): return pair[0]


@pytest.mark.parametrize('before, x', [
    ([nn.GRU(4, 8, batch_first=True), Second()], torch.randn(5, 7, 4)),
    ([nn.Embedding(9, 8)], torch.randint(9, (5, 7))),
    ([nn.Conv2d(1, 8, 3), nn.LayerNorm((8, 6, 6))], torch.randn(5, 1, 8, 8)),
    ([nn.Conv1d(1, 8, 3), nn.Flatten(0, 1), nn.Linear(6, 8), nn.LayerNorm(8)], torch.randn(5, 1, 8)),
    ([nn.Conv1d(1, 8, 3), nn.Dropout(), nn.BatchNorm1d(8)], torch.randn(5, 1, 8))])
def test_units_after_recurrent_layers_embeddings_and_norms(before, x):
    seen = []
    class Kill(nn.Module): # Unit 0, in the dimension of the 8 units
        def forward(self, x):
            seen.append(x)
            alive = (torch.arange(8) > 0).view([8 if n == 8 else 1 for n in x.shape])
            return (x.abs() + 1) * alive
    assert dead_units(nn.Sequential(*before, Kill(), nn.ReLU()), x) == {str(len(before) + 1): 1 / 8}
    assert list(seen[0].shape).count(8) == 1


def test_other_activations():
    x = torch.randn(32, 4)
    for act in nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(), nn.PReLU(), nn.Identity(), nn.Softmax(-1):
        assert dead_units(nn.Sequential(nn.Linear(4, 8), act), x) == {}
    assert dead_units(nn.ReLU(), -x.abs()) == {'': 1.}
    relu = nn.Sequential(nn.Linear(4, 64), nn.ReLU())
    for n in range(40):
        torch.manual_seed(n)
        with silent(): check_dead(relu, torch.randn(1 + n % 9, 4)) # One row in a healthy layer: half of it is 0
    assert dead_units(relu, x[:7]) == {} and [*dead_units(relu, x[:8])] == ['1']
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
        def forward(self, x): return self.act(-x.abs()) + self.act(x.abs() + 1)
    assert dead_units(Twice(), x) == {'act': .5}


# One batch by heart

def test_overfit_leaves_everything_alone():
    model = net()
    batch = torch.randn(16, 8), torch.randint(3, (16,))
    model(batch[0]).sum().backward()
    opt = torch.optim.Adam(model.parameters())
    with Traces(model): losses = overfit_batch(model, F.cross_entropy, batch, lr=.01, steps=150)
    assert len(losses) == 150 and losses[-1] < losses[0] / 3 and not opt.state
    assert overfit_batch(model, F.cross_entropy, batch, lr=.01, steps=150) == losses
    with torch.no_grad(), Traces(model): overfit_batch(model, F.cross_entropy, batch, torch.optim.SGD, .3)
    class Scaled(nn.Module): # A loss with a parameter
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, p, t): return self.scale * F.cross_entropy(p, t)
    loss = Scaled()
    with Traces(loss): overfit_batch(model, loss, batch, lr=.01)


@pytest.mark.parametrize('case', ['broadcast', 'detached', 'constant inputs', 'nan', 'mean of a large target'])
def test_overfit_says_no(case):
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    y, loss = x[:, :1] * 3, F.mse_loss
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    if case == 'broadcast': loss = lambda p, t: (p - t.squeeze(1)).square().mean()
    if case == 'detached': loss = lambda p, t: F.mse_loss(p.mean().expand_as(t), t)
    if case == 'constant inputs': x = torch.zeros(16, 8)
    if case == 'nan': loss = lambda p, t: F.mse_loss(p, t) * nan
    if case == 'mean of a large target': y, loss = y + 100, lambda p, t: (p - t.squeeze(1)).square().mean()
    with pytest.raises(RuntimeError, match='by heart.*broadcast'): overfit_batch(model, loss, (x, y), lr=.01, steps=300)


def test_overfit_of_a_batch_with_one_class():
    with pytest.raises(RuntimeError, match='all its targets equal'):
        overfit_batch(nn.Linear(8, 3), F.cross_entropy, (torch.randn(16, 8), torch.ones(16).long()), lr=.1)


def test_overfit_of_other_kinds():
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20))
    tokens = torch.randint(20, (4, 9))
    overfit_batch(words, lambda p, t: F.cross_entropy(p.transpose(1, 2), t), (tokens, tokens), lr=.02)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 1)
        def forward(self, a, b): return self.l(torch.cat([a, b], 1))
    x = torch.randn(8, 4)
    overfit_batch(Two(), F.mse_loss, (x, x, x[:, :1]), lr=.05)
    same = nn.Linear(4, 2)
    with pytest.raises(ValueError, match='frozen'):
        overfit_batch(copy.deepcopy(same).requires_grad_(False), F.mse_loss, (x, x))


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
    with pytest.raises(RuntimeError, match='by heart'): overfit_batch(model, loss, (x, y), lr=.01, steps=300)


# Warnings

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


def test_warnings_of_code_without_a_module():
    with told() as texts: exec('check_inputs(x)', dict(check_inputs=check_inputs, x=torch.full((8, 8), 99.)))
    assert len(texts) == 1


def test_models_are_freed_by_counting_alone():
    def use():
        model = net()
        opt, loss = torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss()
        model[4] = nn.Linear(16, 3)
        x, y = torch.randn(8, 8) * 300, torch.randint(3, (8,))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            check_optimizer(opt, model), check_inputs(x, model), check_dead(model, x, share=0)
            check_training(model.eval())
            check_first_loss(loss, 99 * model(x), 99., model), check_target(loss, model(x).softmax(-1), y, model)
            model(x).sum().backward()
            model[0].weight.grad = None
            check_grads(model), first_nonfinite(model, x), overfit_batch(model, loss, (x, y), lr=.01)
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
    with Traces(model), silent():
        check_inputs(x), check_target(F.cross_entropy, model.eval()(x), y)
        model.train()
        check_zeroed(model), check_training(model)
        assert 'finite' in first_nonfinite(model, x)
        dead_units(model, x)
        overfit_batch(model, F.cross_entropy, (x, y), steps=200)
    with pytest.raises(ValueError, match='with labels'): check_target(minibatch.cross_entropy, model(x), y + 5)
    with pytest.raises(FloatingPointError, match='the inputs'):
        check_finite(torch.tensor(nan, device=device), model, x * nan)

# 16 bits, and losses that say what they are

def test_an_overflow_in_float16_is_found_if_the_model_is_called_as_it_was():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(.5), nn.Linear(8, 4)), torch.randn(16, 8)
    with torch.no_grad(): model[3].weight.mul_(1e6)
    def narrow():
        with torch.autocast('cpu', torch.float16): return model(x)
    place = r'the output of layer 3 \(Linear\) in float16.*keep that layer in float32, or use bfloat16'
    with Traces(model): assert re.match(place, first_nonfinite(model, x, call=narrow))
    with Traces(model): assert first_nonfinite(model, x).endswith('the model is finite')
    with Traces(model), pytest.raises(FloatingPointError, match=f'inf in batch 5; it began in {place}'):
        check_finite(inf, model, x, batch=5, call=narrow)
    with torch.autocast('cpu', torch.float16): assert re.match(place, first_nonfinite(model, x)) # In the block itself
    loss = model(x).sum()
    first_nonfinite(model, x, call=narrow)
    loss.backward() # The buffers of the graph have not changed
    with torch.no_grad(): model[3].weight.fill_(inf)
    assert first_nonfinite(model, x, call=narrow) == 'the weight 3.weight' # Which is no matter of 16 bits


def test_a_call_with_more_than_inputs():
    class Masked(nn.Module):
        def forward(self, x, *, mask): return (x * mask).log()
    model, x = nn.Sequential(Masked()), torch.ones(4, 2)
    with pytest.raises(FloatingPointError, match='no layer can be named'): check_finite(nan, model[0], x)
    with pytest.raises(FloatingPointError, match=r'the output of the model \(Masked\)$'):
        check_finite(nan, model[0], x, call=lambda: model[0](x, mask=0))


class Inherits(nn.CrossEntropyLoss):
    "As users make them: options of their own, the `forward` of PyTorch"
    def __init__(self, counts): super().__init__(weight=1 / counts, ignore_index=0)


class Says(Focal): known_as = 'cross_entropy'


class Silent(Inherits): known_as = ''


def test_losses_that_say_what_they_are():
    counts, pred = torch.tensor([1., 2., 4.]), torch.randn(4, 3)
    name, options = known_loss(Inherits(counts))
    assert name == 'cross_entropy' and torch.equal(options['weight'], 1 / counts) and options['ignore_index'] == 0
    assert known_loss(partial(Says(reduction='sum')))[0] == 'cross_entropy' and known_loss(Silent(counts))[0] == ''
    assert known_loss(type('Mean', (nn.NLLLoss,), {})())[0] == 'nll_loss'
    trained = nn.CrossEntropyLoss()
    trained.weight = nn.Parameter(torch.ones(3))
    assert known_loss(trained)[1]['weight'] is trained.weight
    for f in Inherits(counts), Says():
        with pytest.raises(ValueError, match='argmax'): check_target(f, pred, torch.ones(4, 3).long())
    def by_hand(pred, target, reduction='mean'): return F.cross_entropy(pred, target, reduction=reduction)
    by_hand.known_as = 'cross_entropy'
    with told() as texts: check_first_loss(by_hand, pred, torch.tensor(90.))
    assert len(texts) == 1
    by_hand.known_as = 'crossentropy'
    with pytest.raises(ValueError, match="known_as is 'crossentropy', not in .'cross_entropy'"):
        check_first_loss(by_hand, pred, torch.tensor(90.))


def test_a_byte_that_looks_like_an_ignored_label():
    with pytest.raises(ValueError, match='labels 3 to 156'):
        check_target(F.cross_entropy, torch.randn(2, 5), torch.tensor([156, 3], dtype=torch.uint8))
