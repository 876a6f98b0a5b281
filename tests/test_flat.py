"The flat form of an optimizer gives the numbers of the plain one, whatever happens to its parameters on the way."
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.nn.utils import prune
from torch.optim import lr_scheduler
from torch.testing import assert_close

import dlfound.flat
from dlfound.checkpoint import Checkpoint, resume
from dlfound.famous import Together, lamb, lars, lion, muon, radam
from dlfound.flat import FlatOptimizer, flat, flat_graph
from dlfound.learner import DataLoaders, Learner
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset
from dlfound.optimizer import (AverageGrad, Stat, StatefulOptimizer, StepCount, adam, adamw, decay_groups, momentum,
                               nesterov, rmsprop, sgd, sgd_step)
from dlfound.sanity import SanityWarning

makers = [sgd, momentum, nesterov, rmsprop, adam, adamw, radam, lars, lamb, lion]
each = pytest.mark.parametrize('make', makers, ids=lambda f: f.__name__)
late = 10**6 # So many steps over lists: never compiled
large = 190, 180 # More than 2**15 numbers
double = torch.float64


@pytest.fixture
def eager(monkeypatch):
    "The compiled form without a compiler: the graph itself is run; a list of what it was asked for"
    asked = []
    def compiled(lines, names, outputs, n, dtype, device):
        asked.append((lines, dtype))
        return flat_graph(lines, names, outputs, dlfound.flat._slots).forward
    monkeypatch.setattr(dlfound.flat, 'compiled', compiled)
    return asked


@pytest.fixture(params=['lists', 'compiled'])
def after(request, eager):
    "From which step on it is compiled, in either form"
    return late if request.param == 'lists' else 1


def tensors(shapes, dtype=double, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float32).to(dtype) for s in shapes]


def parameters(shapes=([3, 4], [5], [], [0, 2], [2, 3, 2, 2], large), dtype=double):
    return [nn.Parameter(t) for t in tensors(shapes, dtype)]


class Twins:
    "An optimizer and its flat form, on equal parameters"
    def __init__(self, make=adamw, ps=None, after=1, groups=lambda ps: ps, **kwargs):
        self.ps = parameters() if ps is None else ps
        self.qs = deepcopy(self.ps)
        self.opt = flat(make, after)(groups(self.ps), **{'lr': .05} | kwargs)
        self.plain = make(groups(self.qs), **{'lr': .05} | kwargs)
        self.gen, self.n = torch.Generator().manual_seed(1), 0
    def go(self, steps=4, skip=(), grad=lambda g, p: g, tol=1e-12):
        for _ in range(steps):
            self.n += 1
            for i, (p, q) in enumerate(zip(self.ps, self.qs)):
                g = torch.randn(p.shape, generator=self.gen, dtype=torch.float32).to(p.dtype)
                p.grad, q.grad = (None, None) if i in skip else (grad(g, p), g.clone())
            for opt in self.opt, self.plain:
                for j, group in enumerate(opt.param_groups):
                    group['lr'] = .05 / (self.n + j)
                    if 'betas' in group: group['betas'] = (.9 - .1 / self.n, .99 - .05 / self.n)
                opt.step()
        self.equal(tol)
        return self
    def equal(self, tol=1e-12):
        assert_close([*self.ps], [*self.qs], rtol=tol, atol=tol)
        for p, q in zip(self.ps, self.qs):
            ours, theirs = dict(self.opt.state.get(p, {})), dict(self.plain.state.get(q, {}))
            assert ours.keys() == theirs.keys()
            for k in ours: assert_close(ours[k], theirs[k], rtol=tol, atol=tol)


def form(after): return 'lists' if after == late else 'compiled'


# The same numbers

@each
def test_every_optimizer(make, after):
    pair = Twins(make, after=after, weight_decay=.1).go(9)
    assert pair.opt.form == form(after) and not pair.opt.reason


def test_muon_goes_over_lists_of_one_shape(after):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        pair = Twins(muon, parameters([[4, 3], [3, 4], [4, 3], large]), after).go(6)
    assert len(caught) == (after != late) and pair.opt.split == 'shapes' and pair.opt.form == 'lists'


def test_other_options_of_the_same(after):
    for make, kwargs in [(momentum, dict(dampening=.5)), (radam, dict(decoupled_weight_decay=True)),
                         (adam, dict(eps=.1)), (rmsprop, dict(alpha=.5))]:
        Twins(make, parameters([[3], [2, 2]]), after, **kwargs).go(8)


def test_groups_and_names(after):
    def groups(ps):
        return [dict(params=[('a', ps[0]), ('b', ps[1])], weight_decay=.3),
                dict(params=[('c', ps[2])], eps=.1), dict(params=[('d', p) for p in ps[3:4]] + [('e', ps[5])])]
    pair = Twins(adamw, after=after, groups=groups).go(6)
    assert [g['param_names'] for g in pair.opt.param_groups] == [['a', 'b'], ['c'], ['d', 'e']]
    assert [g['param_names'] for g in pair.opt.state_dict()['param_groups']] == [['a', 'b'], ['c'], ['d', 'e']]


def test_decay_groups(after):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    twin = deepcopy(net)
    opts = flat(adamw, after)(decay_groups(net, .1), lr=.01), adamw(decay_groups(twin, .1), lr=.01)
    for _ in range(4):
        for p, q in zip(net.parameters(), twin.parameters()): p.grad = q.grad = torch.ones_like(p)
        for opt in opts: opt.step()
    assert_close([*net.parameters()], [*twin.parameters()], rtol=1e-12, atol=1e-12)


def layouts():
    big = torch.randn(40, 30, 6, 6, dtype=double)
    base, rows = torch.randn(8, 9, dtype=double), torch.randn(300, 400, dtype=double)
    return [torch.randn(4, 3, 2, 2, dtype=double).to(memory_format=torch.channels_last),
            big.to(memory_format=torch.channels_last), base[:, ::2], base[:, 1::2].t(), rows[::2], rows[1::2, :200].t(),
            torch.randn(200, 180, dtype=double).t(), torch.randn(1, 40000, 1, dtype=double).transpose(0, 1)]


@pytest.mark.parametrize('make', [adamw, lamb, sgd], ids=lambda f: f.__name__)
def test_layouts(make, after):
    "Channels last, with gaps, slices, transposed; gradients are in another layout at times"
    ps = [nn.Parameter(t) for t in layouts()]
    strides = [p.stride() for p in ps]
    pair = Twins(make, ps, after).go(4).go(3, grad=lambda g, p: torch.empty_like(p).copy_(g))
    pair.go(3, grad=lambda g, p: g.t().contiguous().t() if g.ndim == 2 else g.to(memory_format=torch.channels_last)
            if g.ndim == 4 else g)
    assert [p.stride() for p in ps] == strides


def test_gradients_that_are_expanded(after):
    pair = Twins(adamw, parameters([large, [4, 5]]), after).go(2)
    for p, q in zip(pair.ps, pair.qs):
        p.grad, q.grad = torch.ones((), dtype=double).expand(p.shape), torch.ones(p.shape, dtype=double)
    pair.opt.step(), pair.plain.step()
    pair.equal()
    assert all(p.grad.eq(1).all() for p in pair.ps)


def test_an_expanded_parameter_is_refused_as_by_the_plain_one(after):
    for make in flat(adamw, after), adamw:
        p = nn.Parameter(torch.ones(1).expand(4))
        opt = make([p])
        p.grad = torch.ones(4)
        with pytest.raises(RuntimeError, match='single memory location'): opt.step()


def test_one_gradient_of_two_parameters(after):
    pair, g = Twins(adamw, parameters([large, large, [3], [3]]), after).go(2), torch.randn(large, dtype=double)
    for ps in pair.ps, pair.qs:
        for p in ps: p.grad = g if p.shape == large else g[0, :3]
    pair.opt.step(), pair.plain.step()
    pair.equal()


def test_shared_storage(after):
    "Parameters that are pieces of one memory, as some trainers keep them"
    base, sizes = tensors([[3 * 190 * 180 + 10]])[0], [190 * 180] * 3 + [4, 6]
    ps = [nn.Parameter(t) for t in base.split(sizes)]
    pair = Twins(adamw, ps, after).go(5)
    assert all(p.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() for p in pair.ps)


def test_tied_weights(after):
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
        model[1].weight = model[0].weight
        return model
    def losses(make):
        model, found = net(), []
        opt = make(model.parameters(), lr=.1)
        for i in range(6):
            opt.zero_grad()
            loss = F.cross_entropy(model(torch.arange(7)), torch.arange(7).flip(0))
            loss.backward(), opt.step(), found.append(loss.item())
        assert model[1].weight is model[0].weight
        return found
    assert_close(losses(flat(adamw, after)), losses(adamw), rtol=1e-12, atol=1e-12)


# Gradients and parameters that come and go

@each
def test_gradients_that_are_missing(make, after):
    pair = Twins(make, parameters([[3], [4], large, large]), after)
    for skip in [1], [0], [], [2], [0, 3], [0, 1, 2, 3], [], [1, 2], []: pair.go(1, skip)
    assert pair.opt.form == form(after)


@pytest.mark.parametrize('to_none', [True, False])
def test_zero_grad(after, to_none):
    def run(make):
        torch.manual_seed(0)
        net, found = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double(), []
        opt = make(net.parameters(), lr=.01)
        for i in range(6):
            net[i % 2](torch.ones(2, 4 - i % 2, dtype=double)).sum().backward()
            opt.step(), opt.zero_grad(to_none)
        return [*net.parameters()]
    assert_close(run(flat(adamw, after)), run(adamw), rtol=1e-12, atol=1e-12)


def test_nothing_has_a_gradient(after):
    pair = Twins(after=after).go(2, skip=range(9))
    assert not any(pair.opt.state.values())
    pair.go(3).go(2, skip=range(9)).go(1)


def test_frozen_and_added_later(after):
    pair = Twins(after=after).go(3)
    for ps in pair.ps, pair.qs: ps[0].requires_grad_(False), ps[5].requires_grad_(False)
    before = pair.ps[5].detach().clone()
    pair.go(2)
    assert pair.ps[5].equal(before)
    for ps in pair.ps, pair.qs: ps[0].requires_grad_(True), ps[5].requires_grad_(True)
    pair.go(2)
    for ps, opt in (pair.ps, pair.opt), (pair.qs, pair.plain):
        ps += [nn.Parameter(t) for t in tensors([[7], large], seed=5)]
        opt.add_param_group(dict(params=ps[-2:], weight_decay=.5))
    pair.go(4)
    assert pair.opt.form == form(after)


def test_groups_that_go(after):
    pair = Twins(after=after, groups=lambda ps: [dict(params=ps[:3]), dict(params=ps[3:])]).go(3)
    for opt in pair.opt, pair.plain: opt.param_groups.reverse()
    pair.go(3)
    for opt in pair.opt, pair.plain: opt.param_groups.pop()
    pair.go(3)


def test_only_counts_as_statistics(eager):
    "Nothing but a number for each parameter, and they are apart after a missing gradient"
    def slower(p, g, step): return p, g / step
    def make(params, lr): return StatefulOptimizer(params, [StepCount('step'), slower, sgd_step], lr=lr)
    pair = Twins(make, after=1)
    for skip in [], [], [0, 5], [0, 5], [], []: pair.go(1, skip)


# Models that change

@pytest.mark.parametrize('make', [adamw, momentum, lamb], ids=lambda f: f.__name__)
def test_other_numbers_and_other_memory(make, after):
    pair = Twins(make, parameters(dtype=torch.float32), after).go(3, tol=1e-5)
    for dtype in torch.float64,:
        for p, q in zip(pair.ps, pair.qs):
            p.data, q.data = p.data.to(dtype), q.data.to(dtype)
            for k, v in pair.plain.state[q].items():
                if isinstance(v, torch.Tensor): pair.plain.state[q][k] = v.to(dtype)
        for p, q in zip(pair.ps, pair.qs): p.grad = q.grad = torch.full_like(p, .5)
        pair.opt.step(), pair.plain.step()
        pair.equal(1e-5)
        for p, q in zip(pair.ps, pair.qs): p.data.copy_(q.data)
        for p, q in zip(pair.ps, pair.qs):
            for k, v in pair.plain.state[q].items():
                if isinstance(v, torch.Tensor): pair.opt.state[p][k].copy_(v)
    assert pair.opt.form == form(after)
    for p in pair.ps: p.data = p.data.clone(memory_format=torch.contiguous_format)
    pair.go(3, tol=1e-5)


def test_a_model_moves_as_a_whole(after):
    net = nn.Sequential(nn.Linear(200, 190), nn.Linear(190, 3))
    opt = flat(adamw, after)(net.parameters(), lr=.01)
    moves = nn.Module.double, nn.Module.bfloat16, nn.Module.float, lambda m: m.to(memory_format=torch.channels_last)
    for move in moves:
        for _ in range(3):
            opt.zero_grad()
            net(torch.ones(2, 200, dtype=net[0].weight.dtype)).sum().backward()
            before = net[0].weight.detach().clone()
            opt.step()
            assert (net[0].weight != before).float().mean() > .9
        move(net)


def test_loading_weights(after):
    net = nn.Linear(200, 190).double()
    opt, saved = flat(sgd, after)(net.parameters(), lr=.1), deepcopy(net.state_dict())
    def step():
        for p in net.parameters(): p.grad = torch.ones_like(p)
        opt.step()
    for _ in range(3): step()
    net.load_state_dict(saved), step()
    assert_close(net.weight.detach(), saved['weight'] - .1, rtol=1e-12, atol=1e-12)
    net.load_state_dict(saved, assign=True)
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r'Linear.weight, Linear.bias was replaced'): step()
    assert net.weight.equal(before)
    opt = flat(sgd, after)(net.parameters(), lr=.1)
    step()


def test_layers_that_are_replaced_or_gone(after):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt, old = flat(adamw, after)(net.parameters()), [*net.parameters()]
    def step():
        for p in old: p.grad = torch.ones_like(p)
        opt.step()
    step(), step()
    kept, net[1] = net[1], nn.Linear(3, 3) # Whoever keeps a layer may train it
    step()
    del kept
    gc.collect()
    with pytest.raises(RuntimeError, match='Linear.weight, Linear.bias was'): step()
    net[0].weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(RuntimeError, match='Linear.weight'): step()
    del net
    gc.collect()
    step()


def test_one_home_of_a_tied_parameter_is_replaced(after):
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    b.weight = a.weight
    opt = flat(adamw, after)(a.parameters())
    for i in range(4):
        a.weight.grad = torch.ones(3, 3)
        opt.step()
        b.weight = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize('move', [lambda m: prune.l1_unstructured(m, 'weight', .5), lambda m: nn.utils.spectral_norm(m),
                                  lambda m: nn.utils.parametrizations.spectral_norm(m)], ids='prune old new'.split())
def test_a_parameter_that_gets_another_home(move, after):
    "Pruning and spectral norm keep the parameter, and call it otherwise"
    m = nn.Linear(4, 4)
    opt, p = flat(adamw, after)(m.parameters(), lr=.1), m.weight
    for _ in range(3):
        m(torch.ones(1, 4)).sum().backward(), opt.step()
    move(m)
    assert any(p is q for q in m.parameters())
    before = p.detach().clone()
    opt.zero_grad(), m(torch.ones(1, 4)).sum().backward(), opt.step()
    assert not p.equal(before)


# Copies and states

def test_copies(after):
    net = nn.Sequential(nn.Linear(200, 190), nn.Linear(190, 3)).double()
    opt = flat(adamw, after)(net.parameters(), lr=.01)
    def step(net, opt, k):
        for i, p in enumerate(net.parameters()): p.grad = torch.full_like(p, i + k)
        opt.step()
    for k in range(3): step(net, opt, k)
    twin, copy = deepcopy((net, opt))
    alone = deepcopy(opt)
    assert type(copy) is FlatOptimizer and copy.form == form(after) and repr(copy) == repr(opt)
    before = [p.detach().clone() for p in twin.parameters()]
    for k in range(3, 6): step(net, opt, k)
    assert_close([*twin.parameters()], before, rtol=0, atol=0)
    for k in range(3, 6): step(twin, copy, k)
    assert_close([*twin.parameters()], [*net.parameters()], rtol=0, atol=0)
    for p in alone.param_groups[0]['params']: p.grad = torch.ones_like(p)
    alone.step()
    again = pickle.loads(pickle.dumps(opt))
    for p in again.param_groups[0]['params']: p.grad = torch.ones_like(p)
    again.step()


@pytest.mark.parametrize('other', [adamw, optim.AdamW, flat(adamw, 0), flat(adamw, late)],
                         ids=['plain', 'torch', 'flat', 'lists'])
@pytest.mark.parametrize('back', [False, True])
def test_states_go_both_ways(other, back, after):
    first, second = (other, flat(adamw, after)) if back else (flat(adamw, after), other)
    ps, qs = parameters(), parameters()
    def go(opt, ps, steps, seed):
        gen = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for p in ps: p.grad = torch.randn(p.shape, generator=gen, dtype=double)
            opt.step()
    one, whole = first(ps, lr=.01), adamw(qs, lr=.01)
    go(one, ps, 4, 1), go(whole, qs, 4, 1)
    new = second(ps, lr=.3)
    new.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    assert new.param_groups[0]['lr'] == .01
    go(new, ps, 4, 2), go(whole, qs, 4, 2)
    assert_close(ps, qs, rtol=1e-12, atol=1e-12)


@each
def test_a_state_does_not_share_memory_and_is_like_the_plain_one(make, after):
    pair = Twins(make, after=after).go(3)
    ours, theirs = pair.opt.state_dict(), pair.plain.state_dict()
    assert ours.keys() - theirs.keys() == {'count'} and ours['param_groups'] == theirs['param_groups']
    kept = deepcopy(ours)
    pair.opt.load_state_dict(ours)
    pair.go(2)
    for n, state in kept['state'].items(): assert_close(dict(ours['state'][n]), dict(state), rtol=0, atol=0)


def test_a_state_of_another_is_refused(after):
    pair = Twins(adamw, after=after).go(3)
    other = Twins(sgd).go(2).opt.state_dict()
    with pytest.raises(ValueError, match='sgd_step, and this'): pair.opt.load_state_dict(other)
    pair.go(2)


def loaders():
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=gen), torch.randint(3, (48,), generator=gen)
    shuffle = torch.Generator().manual_seed(1)
    return DataLoaders(DataLoader(Dataset(x, y), 8, shuffle=True, generator=shuffle), DataLoader(Dataset(x, y), 48))


def learner(make, cbs=()):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return Learner(loaders(), net, F.cross_entropy, make, .01, cbs=cbs, progress=False)


@pytest.mark.parametrize('make, after', [(adamw, 0), (adamw, 3), (adamw, late), (lamb, 3), (radam, 3)],
                         ids=lambda x: getattr(x, '__name__', x))
def test_a_checkpoint_goes_on_to_the_bit(make, after, eager, tmp_path):
    whole = learner(flat(make, after), Checkpoint(tmp_path, every=2, unit='batch', keep=100))
    whole.fit(2)
    for path in sorted(tmp_path.glob('*batch*'))[:3]:
        half = learner(flat(make, after))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            resume(half, path)
        assert half.opt.form == whole.opt.form
        assert_close([*half.model.parameters()], [*whole.model.parameters()], rtol=0, atol=0)


def test_files_have_the_size_of_what_is_in_them(after, tmp_path):
    from safetensors.torch import load_file, save_file
    net = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30), nn.Linear(30, 1200))
    opt = flat(adamw, after)(net.named_parameters())
    for _ in range(3):
        for p in net.parameters(): p.grad = torch.randn_like(p)
        opt.step()
    def size(x):
        torch.save(x, file := io.BytesIO())
        return len(file.getvalue())
    fresh = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30), nn.Linear(30, 1200))
    for ours, theirs in (net, fresh), (net[0], fresh[0]), (net[1], fresh[1]):
        assert size(ours.state_dict()) <= size(theirs.state_dict()) + 100
    save_file(net.state_dict(), tmp_path / 'net.safetensors')
    assert_close(load_file(tmp_path / 'net.safetensors'), net.state_dict(), rtol=0, atol=0)


# Around it

def test_grad_scaler(after):
    def run(make):
        p = nn.Parameter(torch.ones(3))
        opt, scaler = make([p], lr=.1), torch.amp.GradScaler('cpu', init_scale=8., growth_interval=2)
        for i in range(8):
            opt.zero_grad()
            scaler.scale((p * p).sum() * (float('inf') if i == 3 else 1)).backward()
            scaler.unscale_(opt)
            scaler.step(opt), scaler.update()
        return p, scaler.get_scale()
    assert_close(run(flat(adamw, after)), run(adamw), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('schedule', [
    partial(lr_scheduler.StepLR, step_size=2), partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=9),
    partial(lr_scheduler.CyclicLR, base_lr=.01, max_lr=.1, step_size_up=3),
    lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, .1, total_iters=3),
                                            lr_scheduler.ExponentialLR(o, .9)], [3])])
def test_schedulers_of_torch(schedule, after):
    def run(make):
        ps = parameters([[3], [2]])
        opt = make(ps, lr=.05)
        plan = schedule(opt)
        for _ in range(8):
            for p in ps: p.grad = p.detach() + 1
            opt.step(), plan.step()
        return ps
    assert_close(run(flat(adamw, after)), run(adamw), rtol=1e-12, atol=1e-12)


def test_closures_and_hooks(after):
    p = nn.Parameter(torch.ones(2))
    opt, seen = flat(momentum, after)([p], lr=.1), []
    opt.register_step_pre_hook(lambda *_: seen.append('pre'))
    opt.register_step_post_hook(lambda *_: seen.append('post'))
    def closure():
        opt.zero_grad()
        (loss := (p**2).sum()).backward()
        return loss
    losses = [opt.step(closure) for _ in range(5)]
    assert losses[0] == 2 and losses[-1] < 1 and losses[0].requires_grad and seen == ['pre', 'post'] * 5


def test_a_rate_may_be_a_tensor(after):
    pair = Twins(adamw, after=after)
    pair.opt.param_groups[0]['lr'] = torch.tensor(.05, dtype=double)
    for i in range(5):
        for p, q in zip(pair.ps, pair.qs): p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        pair.opt.step(), pair.plain.step()
        pair.opt.param_groups[0]['lr'].mul_(.5)
        pair.plain.param_groups[0]['lr'] *= .5
    pair.equal()


@pytest.mark.parametrize('shape', [[4], large])
def test_autograd_notices(shape, after):
    p, = parameters([shape])
    opt = flat(adamw, after)([p])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    loss = (p**2).sum()
    opt.step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


def test_gradients_are_left_alone(after):
    pair = Twins(after=after).go(3)
    given = [p.grad.clone() for p in pair.ps]
    places = [p.grad.data_ptr() for p in pair.ps]
    pair.opt.step()
    assert_close([p.grad for p in pair.ps], given, rtol=0, atol=0)
    assert [p.grad.data_ptr() for p in pair.ps] == places


def test_sixteen_bits_that_are_lost_are_told(after):
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    opt = flat(adamw, after)([p], lr=1e-4)
    with pytest.warns(SanityWarning, match='did not move'):
        for _ in range(20):
            p.grad = torch.ones_like(p)
            opt.step()


def test_others_are_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match='got AdamW'): flat(optim.AdamW)([p])
    with pytest.raises(TypeError, match='got Together'):
        flat(lambda ps, lr=.1: Together(adamw(ps, lr)))([p])
    opt = Together(flat(adamw)([p]), flat(sgd)([nn.Parameter(torch.ones(2))]))
    p.grad = torch.ones(2)
    opt.step()
    with pytest.raises(ValueError, match='lrr'): opt.opts[0].add_param_group(dict(params=[p], lrr=1))
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(TypeError, match='dense'): opt.step()


# Steppers of one's own

def stepping(*steppers, **hypers):
    return lambda params, lr: StatefulOptimizer(params, [*steppers, sgd_step], lr=lr, **hypers)


def run_own(make, after, ps=None, steps=5):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        pair = Twins(make, ps, after).go(steps)
    return pair, [str(w.message) for w in caught]


class Size(Stat):
    per_element = False
    def update(self, g, old): return g.norm() if old is None else .5 * old + g.norm()


def test_a_statistic_that_is_one_tensor(after):
    def by_size(p, g, size): return p, g / (1 + size)
    pair, told = run_own(stepping(Size('size'), by_size), after)
    assert len(told) == (after != late) and pair.opt.form == 'lists'
    new = flat(stepping(Size('size'), by_size), after)(pair.ps, lr=.1)
    new.load_state_dict(pair.opt.state_dict())


def test_a_condition_on_numbers(after, eager):
    def later(p, g, step): return (p, g * 2) if step > 3 else (p, -g)
    pair, told = run_own(stepping(StepCount('step'), later), after, steps=6)
    assert not told and len(set(eager)) == (after != late) * 2


def test_a_condition_on_operands(after):
    def odd(p, g): return (p, 2 * g) if (g.abs() == 0) else (p, g) # For one number it can be said
    pair, told = run_own(stepping(odd), after, parameters([[], [1]]))
    assert pair.opt.split == 'one by one' and len(told) == (after != late)


def test_functions_of_torch(after):
    pair, told = run_own(stepping(lambda p, g: (p, torch.clamp(g, -.5, .5))), after)
    assert pair.opt.split == 'one by one' and len(told) == (after != late)


def test_methods_without_a_flat_form(after):
    pair, told = run_own(stepping(lambda p, g: (p, g.clamp(-.5, .5).exp() ** 2)), after)
    assert pair.opt.split == 'kinds' and len(told) == (after != late)
    assert 'clamp' in ''.join(told) or after == late


def test_methods_in_place(after):
    run_own(stepping(lambda p, g: (p, g.clone().mul_(.5).add_(1))), after)
    run_own(stepping(lambda p, g: (p.mul_(.5), g)), after)


def test_a_method_in_place_before_a_function_of_torch(after):
    "What is refused was not begun"
    run_own(stepping(lambda p, g: (p, torch.clamp(g.mul_(.5), -1, 1))), after)


def test_arithmetic(after):
    def all_of_it(p, g):
        return p, 1 - (-g) * 2 + 3 / (2 + g.abs()) - g / 2 + (g - 1) * .5 + g.sign() * (1 + g * g).sqrt()
    pair, told = run_own(stepping(all_of_it), after)
    assert not told and pair.opt.form == form(after)


def test_a_constant_tensor(after):
    weights = torch.tensor([1., 2., 3.], dtype=double)
    run_own(stepping(lambda p, g: (p, g * weights)), after, parameters([[3], [2, 3]]))


def test_a_statistic_of_the_parameter(eager):
    "Where the gradient has become the parameter, the last gradient is the old parameter"
    run_own(stepping(lambda p, g: (p, p), Stat('was')), 1)


class Wide(Stat):
    def update(self, g, old): return g.float() if old is None else old + g.float()


def test_a_statistic_of_higher_precision(after):
    ps = parameters([[3]], torch.bfloat16)
    qs = deepcopy(ps)
    opts = [make(x, lr=1.) for make, x in ((flat(stepping(Wide('sum')), after), ps), (stepping(Wide('sum')), qs))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i in range(6):
            for p in ps + qs: p.grad = torch.full_like(p, .001 + i)
            for opt in opts: opt.step()
    assert_close(opts[0].state[ps[0]]['sum'], opts[1].state[qs[0]]['sum'], rtol=1e-6, atol=0)


def test_another_shape_is_not_spread_over_the_parameter(after):
    p = nn.Parameter(torch.ones(3))
    def spread(p, g, lr): return p.norm() - lr * g.norm(), g
    opt = flat(lambda ps, lr: StatefulOptimizer(ps, [spread], lr=lr), after)([p], lr=.1)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match='steppers made'):
        for _ in range(3): opt.step()
    assert p.tolist() == [1, 1, 1]


@pytest.mark.parametrize('kind', [ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError])
def test_an_error_of_a_stepper_comes_out(kind, after):
    def fails(p, g, step):
        if step > 2: raise kind('on purpose')
        return p, g
    p, q = parameters([[3], large])
    opt = flat(stepping(StepCount('step'), fails), after)([p, q], lr=.1)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step(), opt.step()
    before = p.clone(), q.clone()
    with warnings.catch_warnings(), pytest.raises(kind, match='on purpose'):
        warnings.simplefilter('ignore')
        opt.step()
    assert p.equal(before[0]) and q.equal(before[1]) and opt.state[p]['step'] == 2


# Memory

def test_a_model_that_is_dropped_is_freed(after):
    net = nn.Sequential(nn.Linear(3, 3))
    opt, ref = flat(adamw, after)(net.parameters()), weakref.ref(net)
    for _ in range(3):
        net(torch.ones(1, 3)).sum().backward()
        opt.step()
    p = weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert ref() is None and p() is not None
    del opt
    gc.collect()
    assert p() is None


def test_bundles_are_bounded_and_keep_no_old_statistics(eager):
    pair = Twins(adamw, parameters([[3]] * 5 + [large]))
    pair.go(2)
    for i in range(1, 24): pair.go(1, skip=[j for j in range(5) if i >> j & 1])
    assert len(pair.opt._bundles) <= 17


def test_old_statistics_are_not_kept(eager):
    "Ever other gradients are missing: of the statistics of a large parameter there is one copy"
    pair = Twins(adamw, parameters([[3]] * 3 + [large])).go(2)
    old = weakref.ref(pair.opt.state[pair.ps[3]]['exp_avg'])
    pair.go(1, skip=[0])
    assert pair.opt.state[pair.ps[3]]['exp_avg'] is old() or old() is None


# Really compiled: one formula each for float32 (AdamW, SGD), float64, bfloat16, and LAMB

def run_schedule(make, ps, steps=60, **kwargs):
    opt, gen = make(ps, lr=.01, **kwargs), torch.Generator().manual_seed(3)
    plan = lr_scheduler.OneCycleLR(opt, max_lr=.01, total_steps=steps + 1, cycle_momentum='betas' in opt.defaults)
    for _ in range(steps):
        for p in ps: p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        opt.step(), plan.step()
    return opt


compiled_cases = [(adamw, torch.float32, 1e-5), (sgd, torch.float32, 1e-5), (adamw, torch.float64, 1e-12),
                  (lamb, torch.float32, 1e-4), (adamw, torch.bfloat16, .03)]


@pytest.mark.parametrize('make, dtype, tol', compiled_cases, ids=lambda x: getattr(x, '__name__', str(x)))
def test_compiled_once(make, dtype, tol):
    "No second compilation in the steps of a schedule that moves rate and betas"
    shapes = [[3, 4], [5], [], [0, 2], large, [250, 200], [40, 25, 6, 6]]
    ps, qs = parameters(shapes, dtype), parameters(shapes, dtype)
    for xs in ps, qs: xs[-1].data = xs[-1].data.to(memory_format=torch.channels_last)
    steps = 60 if make is adamw and dtype == torch.float32 else 8
    with torch._dynamo.config.patch(error_on_recompile=True):
        opt = run_schedule(flat(make, 2), ps, steps)
    assert opt.form == 'compiled' and not opt.reason
    run_schedule(make, qs, steps)
    assert_close(ps, qs, rtol=tol, atol=tol)


def test_compiled_again_with_other_models():
    "Another optimizer of the same formula compiles nothing, whatever the shapes"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shapes in [[1]], [[]], [[0]], [large], [large] * 7, [[2]] * 50, [[181, 182], [1, 40000], [40000, 1]]:
            ps, qs = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
            opt = run_schedule(flat(adamw, 0), ps, 4)
            assert opt.form == 'compiled' and not opt.reason
            run_schedule(adamw, qs, 4)
            assert_close(ps, qs, rtol=1e-5, atol=1e-6)


def test_compiled_with_parameters_in_one_memory():
    def made():
        base = tensors([[3 * 190 * 180 + 10]], torch.float32)[0]
        return [nn.Parameter(t) for t in base.split([190 * 180] * 3 + [4, 6])]
    ps, qs = made(), made()
    opt = run_schedule(flat(adamw, 1), ps, 4)
    assert opt.form == 'compiled' and not opt.reason
    run_schedule(adamw, qs, 4)
    assert_close(ps, qs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('k', [1, 3, 6])
@pytest.mark.parametrize('make', [adamw, lamb], ids=lambda f: f.__name__)
def test_resumed_to_the_bit(make, k):
    shapes = [[3, 4], [5], large]
    def go(opt, ps, start, stop):
        for i in range(start, stop):
            gen = torch.Generator().manual_seed(i)
            for p in ps: p.grad = torch.randn(p.shape, generator=gen)
            opt.param_groups[0]['lr'] = .1 / (i + 1)
            opt.step()
    ps, qs = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    go(opt := flat(make, 3)(ps), ps, 0, 10)
    go(half := flat(make, 3)(qs), qs, 0, k)
    file = io.BytesIO()
    torch.save((half.state_dict(), [q.detach() for q in qs]), file)
    state, values = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    new = [nn.Parameter(v.clone()) for v in values]
    again = flat(make, 3)(new, lr=.5)
    again.load_state_dict(state)
    go(again, new, k, 10)
    assert opt.form == again.form == 'compiled'
    assert_close(new, ps, rtol=0, atol=0)
    for p, q in zip(ps, new): assert_close(dict(again.state[q]), dict(opt.state[p]), rtol=0, atol=0)


def test_two_threads():
    def made(): return parameters([[5], large, [250, 200]], torch.float32)
    sets, errors = [made() for _ in range(4)], []
    def work(ps):
        try: run_schedule(flat(adamw, 2), ps, 12)
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(ps,)) for ps in sets[:2]]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors
    for ps in sets[2:3]: run_schedule(adamw, ps, 12)
    for ps in sets[:2]: assert_close(ps, sets[2], rtol=1e-5, atol=1e-6)


def test_no_compiler(tmp_path):
    code = '''
import warnings, torch
from copy import deepcopy
from torch import nn
from dlfound.flat import flat
from dlfound.optimizer import sgd
ps = [nn.Parameter(torch.randn(s)) for s in ((3, 4), (200, 200))]
qs = deepcopy(ps)
a, b = flat(sgd, after=1)(ps, lr=.1), sgd(qs, lr=.1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for _ in range(4):
        for p, q in zip(ps, qs): p.grad = q.grad = torch.randn_like(p)
        a.step(), b.step()
told = [str(w.message) for w in caught if 'no compiled steps' in str(w.message)]
print(a.form, len(told), all(p.equal(q) for p, q in zip(ps, qs)), len(told[0].splitlines()))
'''
    env = os.environ | dict(CXX='/nonexistent', TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    env |= dict(TORCHINDUCTOR_COMPILE_THREADS='1')
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ['lists', '1', 'True', '1'], done.stderr[-2000:]


def test_a_square_parameter_that_is_transposed_in_place(eager):
    "The memory is the same, and its order another"
    pair = Twins(adamw, parameters([(200, 200)]), 1).go(3)
    for p in pair.ps + pair.qs: p.data = p.data.t()
    for p, q in zip(pair.ps, pair.qs):
        for state in pair.opt.state[p], pair.plain.state[q]: # So are their statistics
            for k, v in state.items():
                if isinstance(v, torch.Tensor): state[k] = v.t().contiguous()
    pair.go(3)
