"The famous optimizers: equal to timm and PyTorch where options agree, resumed to the bit, sound on odd parameters."
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from dlfound.checkpoint import Checkpoint, resume
from dlfound.famous import Together, lamb, lars, lion, muon, muon_groups, orthogonal, radam
from dlfound.learner import Callback, GradientClip, Recorder
from dlfound.optimizer import adamw
from dlfound.schedule import ParamScheduler, one_cycle
from dlfound.state import load_opt_state
from fits import Stop, learner, same, state

plain = radam, lars, lamb, lion
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch.optim.Muon is of 2.9')


def walk(make, steps=100, shapes=((6, 4), (4, 6), (5, 5)), dtype=torch.float64, opt=None, seed=0, params=None):
    "Down a bowl, with noise, from a fixed start; the parameters"
    g = torch.Generator().manual_seed(seed)
    def draw(shape): return torch.randn(shape, generator=g, dtype=dtype)
    if params is None: params = [nn.Parameter(draw(s)) for s in shapes]
    opt = opt or make(params)
    for _ in range(steps):
        for p in params: p.grad = p.detach() + draw(p.shape)
        opt.step()
    return [p.detach() for p in params]


def both(model, lr=.02, adam_lr=.01):
    hidden, others = muon_groups(model, model[-1])
    return Together(muon(hidden, lr=lr), adamw(others, lr=adam_lr))


# Against others

@pytest.mark.parametrize('options', [
    dict(weight_decay=0.), dict(weight_decay=.3), dict(betas=(.5, .7), eps=1e-3), dict(lr=.3)])
def test_lamb_is_timms(options):
    timm = pytest.importorskip('timm.optim')
    same_options = dict(max_grad_norm=None, always_adapt=True)
    shapes = (6, 4), (7,), (1,), ()
    ours, theirs = (walk(f, 200, shapes) for f in (
        partial(lamb, **dict(lr=.01) | options), partial(timm.Lamb, **dict(lr=.01) | options, **same_options)))
    assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize('default', [dict(max_grad_norm=None), dict(always_adapt=True)])
def test_lamb_is_not_timms_by_default(default):
    timm = pytest.importorskip('timm.optim')
    options = dict(lr=.01, weight_decay=0.)
    ours, theirs = (walk(partial(f, **options)) for f in (lamb, partial(timm.Lamb, **default)))
    assert max((a - b).abs().max() for a, b in zip(ours, theirs)) > 1e-3


def test_lamb_from_zeros_is_timms():
    timm = pytest.importorskip('timm.optim')
    made = partial(timm.Lamb, max_grad_norm=None, always_adapt=True)
    ours, theirs = (walk(partial(f, lr=.1), 50, params=[nn.Parameter(torch.zeros(5, dtype=torch.float64))])
                    for f in (lamb, made))
    assert ours[0].norm() > .1
    assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize('decay', [0., .1])
def test_lars_and_lion_are_timms(decay):
    timm = pytest.importorskip('timm.optim')
    made = partial(timm.Lars, trust_coeff=.01, momentum=.8, always_adapt=True, eps=0.)
    ours = walk(partial(lars, lr=.5, trust=.01, momentum=.8, weight_decay=decay), 200)
    assert_close(ours, walk(partial(made, lr=.5, weight_decay=decay), 200), rtol=0, atol=1e-9)
    ours, theirs = (walk(partial(f, lr=.01, weight_decay=decay), 200) for f in (lion, timm.Lion))
    assert_close(ours, theirs, rtol=0, atol=1e-9)


@settings(max_examples=3, deadline=None)
@given(st.floats(0, .99), st.floats(0, .9999), st.floats(0, .3), st.booleans(), st.integers(0, 9))
def test_radam_is_pytorchs(beta1, beta2, decay, decoupled, seed):
    options = dict(lr=.01, betas=(beta1, beta2), weight_decay=decay, decoupled_weight_decay=decoupled)
    ours, theirs = (walk(partial(f, **options), 1000, ((4, 3), (1,), ()), seed=seed)
                    for f in (radam, torch.optim.RAdam))
    assert_close(ours, theirs, rtol=0, atol=1e-6)


@needs_muon
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, .99), st.floats(0, .3))
def test_muon_is_pytorchs_in_double(rows, columns, beta, decay):
    options, shapes = dict(lr=.01, momentum=beta, weight_decay=decay), [(rows, columns)]
    ours = walk(partial(muon, **options), 50, shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.double)
        theirs = walk(partial(torch.optim.Muon, **options), 50, shapes)
    assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize('ours, theirs', [
    (radam, torch.optim.RAdam), pytest.param(muon, getattr(torch.optim, 'Muon', None), marks=needs_muon)])
def test_states_go_to_pytorch_and_back(ours, theirs, monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.double)
    options = dict(lr=.01, weight_decay=.1)
    for first, second in ((ours, theirs), (theirs, ours)):
        params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))]
        a = first(params, **options)
        walk(first, 10, opt=a, params=params)
        copies = deepcopy(params)
        b = second(copies, **options)
        b.load_state_dict(deepcopy(a.state_dict()))
        assert_close(walk(None, 10, opt=b, params=copies), walk(None, 10, opt=a, params=params), rtol=0, atol=1e-9)


# Formulas

@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 1), st.integers(0, 9))
def test_shares_of_the_norm(size, steep, decay, seed):
    g = torch.Generator().manual_seed(seed)
    start = size * torch.randn(5, generator=g, dtype=torch.float64)
    for make, share, atmost in ((partial(lamb, lr=.1), .1, False), (partial(lars, lr=5.), .005, decay > 0)):
        p = nn.Parameter(start.clone())
        p.grad = steep * torch.randn(5, generator=g, dtype=torch.float64)
        make([p], weight_decay=decay).step()
        moved = ((p - start).norm() / start.norm()).item()
        assert moved <= share * (1 + 1e-9) if atmost else moved == pytest.approx(share)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-6, 1e6), st.integers(0, 9))
def test_orthogonal(rows, columns, size, seed):
    m = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made, (u, s, v) = orthogonal(size * m), torch.linalg.svd(m, full_matrices=False)
    ours = u.T @ made @ v.T # The same directions: a diagonal
    assert_close(ours, torch.diag(ours.diagonal()), rtol=0, atol=1e-6)
    large = s > .02 * s.norm()
    assert ((.6 < ours.diagonal()) & (ours.diagonal() < 1.3))[large].all()


def test_lion_with_an_accumulated_tie():
    p = nn.Parameter(torch.zeros(3))
    opt = lion([p], lr=1.)
    for g in (1., -9., 0.):
        p.grad = torch.tensor([g, 0., 1e-30])
        opt.step()
    assert p[1] == 0 and p[2] == -3 # Tiny gradients count, none does not


# States

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('opt', [*plain, 'both'], ids=lambda f: getattr(f, '__name__', f))
def test_checkpoints(opt, tmp_path):
    def made():
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        return learner((lambda ps, lr: both(model)) if opt == 'both' else opt, model=model)
    torch.manual_seed(3)
    start = made().model.state_dict()
    whole, broken, again = made(), made(), made()
    for learn in (whole, broken, again): learn.model.load_state_dict(start)
    cbs = [ParamScheduler(one_cycle(.1)), GradientClip(1.)]
    torch.manual_seed(4)
    whole.fit(2, cbs=cbs)
    torch.manual_seed(4)
    with pytest.raises(RuntimeError, match='stop'):
        broken.fit(2, cbs=(cbs := [*cbs, Checkpoint(tmp_path, unit='batch'), Stop(1, 2)]))
    resume(again, tmp_path, cbs)
    assert same(state(whole), state(again)) and whole[Recorder].losses == again[Recorder].losses


@pytest.mark.parametrize('opt', [*plain, muon], ids=lambda f: f.__name__)
def test_state_of_a_subset(opt):
    "Parameters without a gradient have no state, and those with one go on to the same bits"
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    a = opt(params)
    for _ in range(3):
        for p in params[:2]: p.grad = torch.randn(4, 3)
        a.step()
    copies = deepcopy(params)
    b = opt(copies)
    b.load_state_dict(deepcopy(a.state_dict()))
    for pair in zip(params, copies): pair[0].grad, pair[1].grad = 2 * [torch.randn(4, 3)]
    a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


def test_states_of_others_are_refused():
    made = {f: f([nn.Parameter(torch.randn(4, 3))]) for f in (*plain, muon)}
    for f, opt in made.items():
        opt.param_groups[0]['params'][0].grad = torch.ones(4, 3)
        opt.step()
    for f, opt in made.items():
        for g, other in made.items():
            if f is g: continue
            before = deepcopy(opt.state_dict())
            with pytest.raises(ValueError, match=r'_direction.*_direction'): opt.load_state_dict(other.state_dict())
            assert str(before) == str(opt.state_dict())


def test_together_refuses_and_keeps():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = both(model)
    F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 2).backward()
    opt.step()
    before = deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match='1 optimizers together, and here are 2'):
        opt.load_state_dict(Together(opt.opts[0]).state_dict())
    with pytest.raises(ValueError, match='0 optimizers'): opt.load_state_dict(opt.opts[0].state_dict())
    with pytest.raises(ValueError, match='Together'): opt.opts[0].load_state_dict(opt.state_dict())
    with pytest.raises(ValueError): opt.load_state_dict(Together(*reversed(opt.opts)).state_dict())
    assert str(before) == str(opt.state_dict())


def test_together_takes_optimizers_without_parameters_in_common():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    a, b = adamw(model[0].parameters()), torch.optim.SGD(model[1].parameters(), lr=.1)
    for wrong, told in (((), 'got none'), (([a, b],), "got \\['list'\\]"), ((a, model), "got \\['Sequential'\\]")):
        with pytest.raises(TypeError, match=told): Together(*wrong)
    with pytest.raises(ValueError, match='2 parameters are in two'): Together(a, b, lion(model[0].parameters()))
    both = Together(a, b)
    assert both.labels == [' → '.join(a.labels), 'SGD']
    assert repr(both).startswith('Together:\nStatefulOptimizer: ') and 'lr: 0.1' in repr(both)
    assert Together(both, radam([nn.Parameter(torch.ones(1))])).labels[0].endswith('SGD')


def test_together_loads_members_of_pytorch_by_names():
    def made(names):
        ps = {name: nn.Parameter(torch.zeros(2)) for name in (*names, 'c')}
        pairs = list(ps.items())
        return ps, Together(torch.optim.SGD(pairs[:2], lr=.1, momentum=.9), lion(pairs[2:]))
    (ps, opt), (qs, other) = made('ab'), made('ba')
    for i, p in enumerate(ps.values()): p.grad = torch.full((2,), i + 1.)
    opt.step()
    other.load_state_dict(saved := opt.state_dict())
    for k in 'ab': assert torch.equal(other.opts[0].state[qs[k]]['momentum_buffer'], ps[k].grad)
    opt.step()
    assert other.opts[0].state[qs['a']]['momentum_buffer'][0] == 1 # A copy
    assert saved['together'][0]['param_groups'][0]['param_names'] == ['a', 'b']


@pytest.mark.parametrize('load', [load_opt_state, lambda opt, state: opt.load_state_dict(state)])
def test_a_state_of_together_is_for_no_other(load):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    state = both(model).state_dict()
    with pytest.raises(ValueError, match='together|Together'): load(adamw(model.parameters()), state)
    with pytest.raises(ValueError, match="\\['steppers', 'together'\\], and that of an optimizer has"):
        load_opt_state(torch.optim.SGD(model.parameters()), state)
    of_one = lamb(model.parameters()).state_dict()
    with pytest.raises(ValueError, match='state is of 0 optimizers'): load(both(model), of_one)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_checkpoint_of_other_members_is_refused(tmp_path):
    def made(adam):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        hidden, others = muon_groups(model, model[-1])
        return learner(lambda ps, lr: Together(muon(hidden), adam(others)), model=model)
    with pytest.raises(RuntimeError, match='stop'):
        made(adamw).fit(2, cbs=(cbs := [Checkpoint(tmp_path, unit='batch'), Stop(1, 2)]))
    with pytest.raises(ValueError, match='the optimizer: .*lion_direction.* in the interrupted fit'):
        resume(made(lion), tmp_path, cbs[:1])


def test_together_at_work():
    "Groups stay those of the members, also after loading; deep copies; one call of the closure"
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt, calls = both(model), []
    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = model(torch.ones(3, 4)).sum()
        loss.backward()
        return loss
    assert opt.step(closure).ndim == 0 and calls == [True]
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]['lr'] = 7.
    assert opt.opts[0].param_groups[0]['lr'] == 7
    twin = deepcopy(opt)
    assert twin.param_groups[0]['params'][0] is not opt.param_groups[0]['params'][0]
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_one_cycle_keeps_the_ratio_of_rates():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    learn, rates = learner(lambda ps, lr: both(model, .02, .005), model=model), []
    learn.fit(1, cbs=[ParamScheduler({'lr': lambda pos: .01 + pos}), Note(rates)])
    assert rates and all(a == pytest.approx(4 * b) for a, b in rates)


class Note(Callback):
    "The rates of the two groups, at each batch"
    order = 50
    def __init__(self, rates): self.noted = rates
    def after_loss(self, learn):
        if learn.training: self.noted.append(tuple(g['lr'] for g in learn.opt.param_groups))


# Odd parameters

@pytest.mark.parametrize('opt', [*plain, muon], ids=lambda f: f.__name__)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_odd_parameters(opt, dtype):
    shapes = [(3, 2), (1, 1), (0, 2), (2, 0)] + [(), (1,), (0,), (2, 1, 3)] * (opt is not muon)
    params = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]
    made = opt(params, weight_decay=0., **dict(eps=1e-6) if opt is radam else {})
    for value in (0., 1., 1e-3, 0., -1.):
        for p in params: p.grad = torch.full_like(p, value)
        made.step()
    assert all(p.isfinite().all() and p.dtype == dtype for p in params)
    for p in params:
        for v in made.state[p].values():
            assert not isinstance(v, torch.Tensor) or v.dtype == dtype and v.shape == p.shape


@pytest.mark.parametrize('opt', [*plain, muon], ids=lambda f: f.__name__)
def test_nothing_moves_without_gradients_or_rate(opt):
    start = torch.randn(3, 3)
    for grad, options in ((torch.zeros(3, 3), dict(lr=.1, weight_decay=0.)), (torch.ones(3, 3), dict(lr=0.))):
        p = nn.Parameter(start.clone())
        made = opt([p], **options)
        for _ in range(8):
            p.grad = grad.clone()
            made.step()
        assert torch.equal(p, start) and torch.equal(p.grad, grad)
    p = nn.Parameter(start.clone(), requires_grad=False)
    p.grad = torch.ones(3, 3)
    opt([p]).step()
    assert torch.equal(p, start)


@pytest.mark.parametrize('opt', [lamb, lars], ids=lambda f: f.__name__)
def test_zeros_move(opt):
    p = nn.Parameter(torch.zeros(3))
    made = opt([p], lr=.1, weight_decay=.1)
    p.grad = torch.zeros(3)
    made.step()
    assert p.count_nonzero() == 0 and p.isfinite().all()
    p.grad = torch.tensor([1., 2, -1])
    made.step()
    assert p.count_nonzero() == 3


@pytest.mark.parametrize('shape', [(), (3,), (2, 3, 1, 1)])
def test_muon_is_for_matrices(shape):
    w, other = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(shape))
    with pytest.raises(ValueError, match='parameter 1 has shape'): muon([w, other])
    with pytest.raises(ValueError, match='head.bias has shape'): muon([('w', w), ('head.bias', other)])
    with pytest.raises(ValueError, match='b has shape'): muon([dict(params=[('w', w)]), dict(params=[('b', other)])])
    late = muon([w])
    late.add_param_group(dict(params=[other]))
    other.grad = torch.ones_like(other)
    with pytest.raises(ValueError, match='a matrix is needed'): late.step()


def test_muon_groups():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False))
    model[3].weight = model[0].weight # Tied: an embedding after all
    hidden, others = muon_groups(model)
    assert [k for k, _ in hidden] == ['1.weight']
    assert [k for k, _ in others] == ['0.weight', '1.bias', '2.weight', '2.bias']
    assert muon_groups(model, model)[0] == [] and muon_groups(model, nn.Linear)[0] == []
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert [k for k, _ in muon_groups(nested, nested[0])[0]] == ['1.weight']


@pytest.mark.parametrize('spare', ['1', [0], None], ids=str)
def test_muon_groups_of_what_is_no_layer(spare):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for wrong in (spare, model[1].weight, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match='is no layer of this model; give layers'): muon_groups(model, wrong)


def test_lion_refuses_to_forget():
    for wrong in ((.9,), ()):
        with pytest.raises(ValueError, match='beta'): lion([nn.Parameter(torch.ones(1))], betas=wrong)
    with pytest.raises(ValueError, match='second beta'): lion([nn.Parameter(torch.ones(1))], betas=(.9, 0.))
    with pytest.raises(ValueError): lion([nn.Parameter(torch.ones(1))], betas=(.9, 1.))
