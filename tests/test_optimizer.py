"Our optimizers do what PyTorch's do, whatever the parameters, the hypers and what happens to them on the way."
import inspect
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.testing import assert_close

from dlfound import norm
from dlfound.callbacks import GradientAccumulation, GradientClip
from dlfound.checkpoint import Checkpoint, resume
from dlfound.learner import DataLoaders, Learner
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset
from dlfound.optimizer import (AverageGrad, SumGrad, Stat, StatefulOptimizer, adam, adamw, decay_groups, momentum,
                               momentum_direction, nesterov, rmsprop, run_steppers, sgd, sgd_step)
from dlfound.sanity import SanityWarning
from dlfound.schedule import ParamScheduler, one_cycle
from dlfound.state import load_opt_state

torchs = {sgd: optim.SGD, momentum: partial(optim.SGD, momentum=.9),
          nesterov: partial(optim.SGD, momentum=.9, nesterov=True),
          rmsprop: optim.RMSprop, adam: optim.Adam, adamw: optim.AdamW}
both = pytest.mark.parametrize('ours, theirs', torchs.items(), ids=lambda f: getattr(f, '__name__', ''))
each = pytest.mark.parametrize('make', torchs, ids=lambda f: f.__name__)
shares = st.floats(0, .99)
hypers = {
    sgd: dict(), momentum: dict(momentum=st.floats(.01, .99), dampening=st.floats(0, 1)),
    nesterov: dict(momentum=st.floats(.01, .99)), rmsprop: dict(alpha=shares, eps=st.floats(1e-9, 1.)),
    adam: dict(betas=st.tuples(shares, shares), eps=st.floats(1e-9, 1.))}
hypers[adamw] = hypers[adam]
shapes = st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4)


def parameters(shapes, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]


def steps(opt, ps, n, seed=1, absent=()):
    "`n` steps with gradients of their own; those of pairs (step, parameter) in `absent` are missing"
    gen = torch.Generator().manual_seed(seed)
    for i in range(n):
        for j, p in enumerate(ps):
            g = torch.randn(p.shape, generator=gen).to(p.dtype) + p.detach()
            p.grad = None if (i, j) in absent else g
        opt.step()
    return [p.detach().clone() for p in ps]


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), *more, nn.Linear(8, 3))


def loaders(batch_size=8):
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=gen), torch.randint(3, (48,), generator=gen)
    shuffle = torch.Generator().manual_seed(1)
    return DataLoaders(DataLoader(Dataset(x, y), batch_size, shuffle=True, generator=shuffle),
                       DataLoader(Dataset(x, y), 48))


def learner(make, cbs=(), **kwargs):
    return Learner(loaders(**kwargs), net(), F.cross_entropy, make, .01, cbs=cbs, progress=False)


# The same numbers

@both
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equal_to_torch(ours, theirs, data):
    given = {k: data.draw(v, k) for k, v in hypers[ours].items()}
    given |= dict(lr=data.draw(st.floats(0, .1)), weight_decay=data.draw(st.floats(0, 1.)))
    sizes = data.draw(shapes)
    absent = data.draw(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=6))
    mine, yours = parameters(sizes), parameters(sizes)
    a = steps(ours(mine, **given), mine, 10, absent=absent)
    b = steps(theirs(yours, **given), yours, 10, absent=absent)
    assert_close(a, b, rtol=1e-9, atol=1e-9)


@both
@settings(max_examples=10, deadline=None)
@given(sizes=shapes, n=st.integers(1, 5), back=st.booleans())
def test_state_goes_both_ways(ours, theirs, sizes, n, back):
    "A state of one is taken by the other, and what follows is the same"
    first, second = (theirs, ours) if back else (ours, theirs)
    ps, whole = parameters(sizes), parameters(sizes)
    opt, one = first(ps, lr=.01), theirs(whole, lr=.01)
    steps(opt, ps, n), steps(one, whole, n)
    new = second(ps, lr=.5)
    load_opt_state(new, opt.state_dict())
    assert new.param_groups[0]['lr'] == .01
    assert_close(steps(new, ps, 4, seed=2), steps(one, whole, 4, seed=2), rtol=1e-9, atol=1e-9)


@each
def test_a_rate_may_be_a_tensor(make):
    mine, yours = parameters([[3]]), parameters([[3]])
    a, b = make(mine, lr=torch.tensor(.01)), make(yours, lr=.01)
    for i in range(5):
        steps(a, mine, 1, seed=i), steps(b, yours, 1, seed=i)
        a.param_groups[0]['lr'].mul_(.5)
        b.param_groups[0]['lr'] *= .5
    assert_close(mine, yours, rtol=1e-6, atol=1e-6)


@each
def test_nothing_given_is_changed_and_nothing_is_shared(make):
    p = nn.Parameter(torch.ones(3))
    opt = make([p], lr=.1)
    p.grad = torch.arange(3.)
    opt.step()
    assert p.grad.tolist() == [0, 1, 2]
    kept = [v for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
    places = {t.untyped_storage().data_ptr() for t in (p, p.grad, *kept)}
    assert len(places) == 2 + len(kept)
    before = deepcopy(opt.state_dict())
    for t in p, p.grad: t.data.fill_(9.)
    assert_close(opt.state_dict()['state'], before['state'], rtol=0, atol=0)


def test_aliases_of_a_stepper_are_copied():
    p = nn.Parameter(torch.ones(3))
    class Same(Stat):
        def update(self, g, old): return g.view(1, 3)[0]
    opt = StatefulOptimizer([p], [Stat('a'), Same('b'), sgd_step], lr=.1)
    p.grad = torch.ones(3)
    opt.step()
    p.grad.zero_()
    assert opt.state[p]['a'].tolist() == opt.state[p]['b'].tolist() == [1, 1, 1]


def test_formulas_take_numbers_and_tensors():
    steppers = [SumGrad('momentum_buffer', 'momentum'), momentum_direction, sgd_step]
    values = [run_steppers(steppers, kind(2.), kind(3.), dict(momentum_buffer=kind(1.)), dict(lr=.5, momentum=.9))
              for kind in (float, torch.tensor)]
    assert values[0][0] == pytest.approx(float(values[1][0])) == pytest.approx(.05)


# What happens on the way

@each
def test_frozen_parameters_stand_still(make):
    p, q = parameters([[3], [3]])
    opt = make([p, q], lr=.1)
    steps(opt, [p, q], 2)
    p.requires_grad_(False)
    before = p.clone()
    steps(opt, [p, q], 2)
    assert p.equal(before)
    p.requires_grad_(True)
    steps(opt, [p, q], 1)
    assert not p.equal(before)


@each
def test_no_gradient_is_not_a_gradient_of_zero(make):
    p, q = parameters([[3], [3]])
    opt = make([p, q], lr=.1)
    steps(opt, [p, q], 3)
    kept, was = deepcopy(opt.state.get(p, {})), p.clone()
    p.grad, q.grad = None, torch.zeros(3, dtype=torch.float64)
    here = q.clone()
    opt.step()
    assert p.equal(was)
    assert_close(dict(opt.state.get(p, {})), dict(kept), rtol=0, atol=0)
    assert q.equal(here) == (make in (sgd, rmsprop)) # These have no memory of a direction


@each
def test_groups_have_hypers_of_their_own(make):
    p, q, still = parameters([[3], [3], [3]])
    opt = make([dict(params=[p]), dict(params=[q], lr=.2), dict(params=[still], lr=0.)], lr=.1)
    start = [x.clone() for x in (p, q, still)]
    for x in p, q, still: x.grad = torch.ones(3, dtype=torch.float64)
    opt.param_groups[0]['weight_decay'] = opt.param_groups[1]['weight_decay'] = 0.
    opt.step()
    assert_close(q - start[1], 2 * (p - start[0]))
    assert still.equal(start[2])


@each
def test_groups_come_go_and_change_places(make):
    ps, qs = parameters([[2], [3]]), parameters([[2], [3]])
    opt, other = make([dict(params=[p]) for p in ps], lr=.1), make([dict(params=[q]) for q in qs], lr=.1)
    steps(opt, ps, 2), steps(other, qs, 2)
    opt.param_groups.reverse()
    assert_close(steps(opt, ps, 2), steps(other, qs, 2), rtol=0, atol=0)
    gone = opt.param_groups.pop()
    saved = opt.state_dict()
    assert len(saved['state']) <= 1 and len(saved['param_groups']) == 1
    opt.add_param_group({k: v for k, v in gone.items()})
    assert_close(steps(opt, ps, 2), steps(other, qs, 2), rtol=0, atol=0)
    new = parameters([[4]])
    opt.param_groups[0]['params'] = new
    steps(opt, new, 1)
    assert len(opt.state_dict()['state']) <= 2


@each
def test_copies_hooks_and_closures(make):
    model = net()
    opt = make(model.parameters(), lr=.01)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append('pre'))
    opt.register_step_post_hook(lambda *_: seen.append('post'))
    opt.register_state_dict_post_hook(lambda o, s: s | {'more': 1})
    opt.register_load_state_dict_post_hook(lambda o: seen.append('loaded'))
    x, y = next(iter(loaders().train))
    def closure():
        opt.zero_grad(set_to_none=False)
        (loss := F.cross_entropy(model(x), y)).backward()
        return loss
    assert opt.step(closure).requires_grad and seen == ['pre', 'post']
    assert opt.state_dict()['more'] == 1
    opt.load_state_dict(opt.state_dict())
    assert seen[-1] == 'loaded'
    twin, copy = deepcopy((model, opt))
    opt.step(closure), copy.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    copy.step()
    assert_close([*model.parameters()], [*twin.parameters()], rtol=0, atol=0)
    assert repr(copy) == repr(opt) and copy.labels == opt.labels
    with pytest.raises(ValueError, match='lrr'): copy.add_param_group(dict(params=parameters([[1]]), lrr=1.))


@pytest.mark.parametrize('make', [adam, momentum], ids=lambda f: f.__name__)
@pytest.mark.parametrize('schedule', [
    partial(lr_scheduler.StepLR, step_size=2), partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=9),
    partial(lr_scheduler.LambdaLR, lr_lambda=lambda i: .9**i),
    partial(lr_scheduler.CyclicLR, base_lr=.01, max_lr=.1, step_size_up=3)], ids=lambda s: s.func.__name__)
def test_schedulers_of_torch(make, schedule):
    def run(make):
        ps = parameters([[3], [2]])
        opt = make(ps, lr=.05)
        plan = schedule(opt)
        for i in range(8):
            steps(opt, ps, 1, seed=i)
            plan.step()
            again = make(ps, lr=1.)
            if i == 4: load_opt_state(again, opt.state_dict())
        return ps, again
    ours, theirs = run(make)[0], run(torchs[make])[0]
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@each
def test_in_a_learner_with_clipping_accumulation_and_a_schedule(make):
    def train(make):
        learn = learner(make, [GradientClip(.1), GradientAccumulation(16), ParamScheduler(one_cycle(.02))])
        learn.fit(3)
        return [p.detach() for p in learn.model.parameters()]
    assert_close(train(make), train(torchs[make]), rtol=1e-4, atol=1e-5)


@each
def test_a_checkpoint_goes_on_to_the_bit(make, tmp_path):
    whole = learner(make, Checkpoint(tmp_path, every=2, unit='batch', keep=100))
    whole.fit(2)
    half = learner(make)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        resume(half, min(tmp_path.glob('*batch*')))
        assert_close([*half.model.parameters()], [*whole.model.parameters()], rtol=0, atol=0)
        other = learner(sgd if make is not sgd else adam)
        before = [p.detach().clone() for p in other.model.parameters()]
        with pytest.raises(ValueError, match=f'{other.opt.labels[-2]}.*, and .*{whole.opt.labels[-2]}.* interrupted'):
            resume(other, min(tmp_path.glob('*batch*')))
        assert_close([*other.model.parameters()], before, rtol=0, atol=0)


# What is refused

@each
@pytest.mark.parametrize('bad', ['sparse', 'complex'])
def test_a_gradient_that_is_refused_is_seen_before_anything_moves(make, bad):
    p = nn.Parameter(torch.ones(2))
    q = nn.Parameter(torch.ones(2, dtype=torch.complex64 if bad == 'complex' else torch.float32))
    opt = make([dict(params=[p]), dict(params=[q])], lr=.1)
    p.grad, q.grad = torch.ones(2), torch.ones_like(q) if bad == 'complex' else torch.ones(2).to_sparse()
    for _ in range(2):
        with pytest.raises(TypeError, match='dense and real'): opt.step()
    assert p.tolist() == [1, 1] and not opt.state[p]
    q.grad = None
    other = make([r := nn.Parameter(torch.ones(2))], lr=.1)
    r.grad = torch.ones(2)
    opt.step(), other.step()
    assert p.equal(r)


def test_steppers_may_come_from_a_generator():
    p = nn.Parameter(torch.ones(1))
    opt = StatefulOptimizer([p], (f for f in [sgd_step]), lr=.5)
    p.grad = torch.ones(1)
    opt.step()
    assert p.item() == .5 and opt.labels == ['sgd_step']


def test_a_statistic_has_a_name_of_its_own():
    ps = parameters([[1]])
    twice = [SumGrad('a', 'momentum'), AverageGrad('a', 'momentum'), lambda p, g, a: (p, a), sgd_step]
    with pytest.raises(ValueError, match=r'AverageGrad\(a\) .* rename'):
        StatefulOptimizer(ps, twice, lr=.1, momentum=.9)
    with pytest.raises(ValueError, match='rename'): StatefulOptimizer(ps, [Stat('lr'), sgd_step], lr=.1)


def test_another_shape_is_not_spread_over_the_parameter():
    p = nn.Parameter(torch.ones(3))
    opt = StatefulOptimizer([p], [lambda p, g, lr: (p.sum() - lr * g.sum(), g)], lr=.1)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match='steppers made'): opt.step()
    assert p.tolist() == [1, 1, 1]


def test_what_another_option_is_called_is_said_and_no_more():
    ps = parameters([[2]])
    steps(opt := optim.AdamW(ps, lr=.3), ps, 1)
    with pytest.raises(ValueError) as e: adam(ps).load_state_dict(opt.state_dict())
    assert str(e.value) == 'decoupled_weight_decay is True in the state and False here'


@pytest.mark.parametrize('ours, theirs', [(adam, optim.Adam), (adamw, optim.AdamW), (rmsprop, optim.RMSprop),
                                          (sgd, optim.SGD), (momentum, optim.SGD), (nesterov, optim.SGD)])
def test_arguments_are_those_of_torch(ours, theirs):
    "What is given by place means the same, and defaults are the same, but for the momentum"
    own, torchs = (inspect.signature(f).parameters for f in (ours, theirs))
    placed = [k for k, v in own.items() if v.kind == v.POSITIONAL_OR_KEYWORD]
    assert placed == list(torchs)[:len(placed)] and own.keys() <= torchs.keys()
    assert all(own[k].default == torchs[k].default for k in own if (ours, k) not in ((momentum, 'momentum'),
                                                                                     (nesterov, 'momentum')))


@pytest.mark.parametrize('wrong, said', [
    (dict(lr=-.1), 'lr is at least 0'), (dict(lr=float('nan')), 'nan'), (dict(lr=float('inf')), 'inf'),
    (dict(eps=-1.), 'eps'), (dict(betas=(1., .9)), 'below 1'), (dict(betas=(.9, -.1)), 'betas'),
    (dict(weight_decay=-1.), 'weight_decay'), (dict(lr='.1'), "lr .* got '.1'"), (dict(eps=None), 'eps .* None')])
def test_ranges(wrong, said):
    with pytest.raises(ValueError, match=said): adam(parameters([[1]]), **wrong)
    with pytest.raises(ValueError, match=said): adam([dict(params=parameters([[1]]), **wrong)])


def test_names_and_order_of_steppers():
    ps = parameters([[1]])
    with pytest.raises(ValueError, match='asks for exp_avg, and before it'):
        StatefulOptimizer(ps, [lambda p, g, exp_avg: (p, exp_avg), AverageGrad('exp_avg', 'beta1')], betas=(.9, .9))
    with pytest.raises(ValueError, match='no stepper asks for rate; they ask for lr'):
        StatefulOptimizer(ps, [sgd_step], lr=.1, rate=.2)
    with pytest.raises(TypeError, match='momentun'): momentum(ps, momentun=.9)
    with pytest.raises(ValueError, match='empty'): sgd([])


@each
def test_a_state_of_another_is_refused_and_nothing_changed(make):
    others = [f for f in torchs if f is not make]
    p, q = parameters([[3], [3]])
    opt = make([p], lr=.1)
    steps(opt, [p], 2)
    before = deepcopy(opt.state_dict())
    for other in others:
        theirs = other([q], lr=.3)
        steps(theirs, [q], 2)
        with pytest.raises(ValueError) as e: opt.load_state_dict(theirs.state_dict())
        assert all(label in str(e.value) for label in (*theirs.labels, *opt.labels))
        if (make, other) == (momentum, sgd): continue # PyTorch's SGD is both, and its state says so
        like = torchs[other]([q], lr=.3)
        steps(like, [q], 2)
        with pytest.raises(ValueError): opt.load_state_dict(like.state_dict())
    assert_close(opt.state_dict()['state'], before['state'], rtol=0, atol=0)
    assert opt.state_dict()['param_groups'] == before['param_groups']


@pytest.mark.parametrize('ours, theirs', [
    (adam, partial(optim.Adam, maximize=True)), (adamw, optim.Adam), (adam, optim.AdamW),
    (momentum, partial(optim.SGD, momentum=.9, nesterov=True)), (rmsprop, partial(optim.RMSprop, centered=True))])
def test_options_that_a_list_has_not(ours, theirs):
    ps = parameters([[2]])
    opt = theirs(ps)
    steps(opt, ps, 1)
    with pytest.raises(ValueError, match='state'): ours(ps).load_state_dict(opt.state_dict())


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(['a', 'b', 'c', 'd']), split=st.integers(0, 3), theirs=st.booleans())
def test_named_parameters_are_matched_by_name(order, split, theirs):
    "Whatever the order inside groups and of groups, memories stay with their parameters"
    values = dict(zip('abcd', range(1, 5)))
    def made(names, groups, make):
        ps = {k: nn.Parameter(torch.zeros(2)) for k in names}
        for k, p in ps.items(): p.grad = torch.full((2,), float(values[k]))
        opt = make([dict(params=[(k, ps[k]) for k in group]) for group in groups if group], lr=.1)
        opt.step()
        return ps, opt
    groups = ['abcd'[:split], 'abcd'[split:]]
    shuffled = [[k for k in order if k in group] for group in reversed(groups)]
    _, was = made('abcd', groups, optim.Adam if theirs else adam)
    for load in StatefulOptimizer.load_state_dict, load_opt_state:
        ps, opt = made(order, shuffled, adam)
        load(opt, was.state_dict())
        for k, p in ps.items():
            assert_close(opt.state[p]['exp_avg'], torch.full((2,), .1 * values[k]))
        names = [k for g in opt.param_groups for k in g['param_names']]
        assert names == [k for group in shuffled for k in group]


def test_other_names_are_refused():
    ps, qs = parameters([[2]]), parameters([[2]])
    was, opt = adam([('a', ps[0])]), adam([('z', qs[0])])
    steps(was, ps, 1)
    with pytest.raises(ValueError, match='look at a, z'): opt.load_state_dict(was.state_dict())
    unnamed = adam(qs)
    unnamed.load_state_dict(was.state_dict()) # By place, as nothing else is known
    assert unnamed.state[qs[0]]['step'] == 1 and 'param_names' not in unnamed.param_groups[0]


@pytest.mark.parametrize('sizes, others', [
    ([[2]], [[1, 2]]), ([[2], [3]], [[3], [2]]), ([[2]], [[2], [2]]), ([[]], [[1]])])
def test_other_shapes_are_refused(sizes, others):
    ps, qs = parameters(sizes), parameters(others)
    opt = adam(ps)
    steps(opt, ps, 1)
    with pytest.raises(ValueError, match='shape|parameters'): adam(qs).load_state_dict(opt.state_dict())


def test_a_state_is_copied_and_keeps_its_precision():
    class Wide(Stat):
        def update(self, g, old): return g.float() if old is None else old + g.float()
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    def make(): return StatefulOptimizer([p], [Wide('sum'), sgd_step], lr=.1)
    opt = make()
    for _ in range(3):
        p.grad = torch.full_like(p, .001)
        opt.step()
    new = make()
    load_opt_state(new, opt.state_dict())
    assert new.state[p]['sum'].dtype == torch.float32 and new.state[p]['sum'].equal(opt.state[p]['sum'])
    new.step()
    assert not new.state[p]['sum'].equal(opt.state[p]['sum'])


def test_a_state_through_json_and_back():
    import json
    p = nn.Parameter(torch.ones(1))
    groups = json.loads(json.dumps(adam([p]).state_dict()['param_groups']))
    opt = adam([p], lr=.5)
    opt.load_state_dict(dict(state={}, param_groups=groups))
    p.grad = torch.ones(1)
    opt.step()
    assert float(p.detach()) == pytest.approx(1 - 1e-3)


# Sixteen bits

@pytest.mark.parametrize('dtype, lr, told', [(torch.bfloat16, 1e-4, 1), (torch.float16, 1e-5, 1),
                                            (torch.bfloat16, .1, 0), (torch.float32, 1e-4, 0), (torch.bfloat16, 0., 0)])
def test_steps_that_are_lost_are_told_once(dtype, lr, told):
    ps = parameters([[50], [10]], dtype=dtype)
    opt = adamw(ps, lr=lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for i in range(70):
            for p in ps: p.grad = torch.randn(p.shape).to(dtype)
            opt.step()
    assert len([w for w in caught if issubclass(w.category, SanityWarning)]) == told
    for w in caught: assert '%' in str(w.message) and str(dtype) in str(w.message)


def test_numbers_without_a_gradient_do_not_count_as_lost():
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    opt = sgd([p], lr=1.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for i in range(40):
            p.grad = torch.zeros_like(p)
            p.grad[:2] = 1.
            opt.step()
            p.grad = torch.zeros_like(p)
            opt.step()


# Groups for decay

def test_decay_groups_by_class():
    norms = [nn.BatchNorm1d(8), nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8, affine=True),
             nn.SyncBatchNorm(8), norm.BatchNorm(8), norm.LayerNorm(8), norm.RMSNorm(8), norm.GroupNorm(2, 8),
             norm.InstanceNorm(8, affine=True), norm.RunningBatchNorm(8)]
    class Odd(nn.Module): # A matrix that is called norm, a vector that is no bias
        def __init__(self):
            super().__init__()
            self.norm, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    model = nn.ModuleList([*norms, Odd(), nn.MultiheadAttention(4, 2), nn.LSTM(2, 2), nn.Embedding(3, 2),
                           nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))])
    groups = {g['name']: dict(g['params']) for g in decay_groups(model, .1)}
    n = len(norms)
    assert set(groups['decay']) == {
        f'{n}.norm.weight', f'{n}.scale', f'{n + 1}.in_proj_weight', f'{n + 1}.out_proj.weight',
        f'{n + 2}.weight_ih_l0', f'{n + 2}.weight_hh_l0', f'{n + 3}.weight',
        f'{n + 4}.parametrizations.weight.original0', f'{n + 4}.parametrizations.weight.original1'}
    every = [p for g in groups.values() for p in g.values()]
    assert len(every) == len({*every}) == len([*model.parameters()])
    assert [g['name'] for g in decay_groups(nn.Linear(2, 2, bias=False), .1)] == ['decay']
    assert [g['weight_decay'] for g in decay_groups(nn.LayerNorm(2), .1)] == [0]


def test_tied_and_frozen_parameters_are_there_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    for spare, where in ((), 'decay'), ((nn.Embedding,), 'no decay'), (nn.Linear, 'no decay'):
        groups = {g['name']: [k for k, _ in g['params']] for g in decay_groups(model, .1, spare)}
        assert '0.weight' in groups[where] and sum(groups.values(), []).count('0.weight') == 1
        assert '1.bias' in groups['no decay']


@pytest.mark.parametrize('make', [adamw, optim.AdamW], ids=['ours', 'theirs'])
def test_decay_groups_in_an_optimizer(make):
    model = net(nn.LayerNorm(8))
    opt = make(decay_groups(model, .5), lr=.1)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    for k, p in model.named_parameters():
        assert_close(p.detach(), before[k] * (.95 if k in ('0.weight', '3.weight') else 1))
