"""Schedules, the sweep and the file format, where a page has no room."""
import json
import math
import os
import random
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from dlfound import schedule
from dlfound.learner import (Callback, CancelEpoch, CancelFit, DataLoaders, GradientAccumulation, GradientClip, Learner,
                             Metric, Recorder, ShortEpoch, SingleBatch, TerminateOnNaN, TrainingLoop)
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset, accuracy
from dlfound.schedule import (Checkpoint, EarlyStopping, ParamScheduler, combine_scheds, flat_cos, lr_find, one_cycle,
                              resume, sched_cos, sched_exp, sched_lin, sched_no, warmup)
from dlfound.state import load_module_state, module_state, random_state

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
positive = st.floats(1e-8, 1e4)


def data(n=40, **kwargs):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    train, valid = Dataset(x, x.argmax(1) % 3), Dataset(x[:20], x[:20].argmax(1) % 3)
    return DataLoaders.from_datasets(train, valid, 8, generator=g, **kwargs)


def learner(opt=optim.SGD, cbs=(), dls=None, model=None, **kwargs):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 3))
    kwargs = dict(metrics=accuracy, progress=False) | kwargs
    return Learner(dls or data(), model, F.cross_entropy, opt, lr=.1, cbs=cbs, **kwargs)


class Stop(Callback):
    "An exception at a place, once"
    def __init__(self, epoch, batch, event='train'): self.place = epoch, batch, event
    def after_backward(self, learn): self.strike(learn, 'train')
    def after_pred(self, learn):
        if not learn.training: self.strike(learn, 'valid')
    def strike(self, learn, event):
        if self.place == (learn.epoch, learn.iter, event):
            self.place = None
            raise RuntimeError('stop')


def interrupted(folder, learn, cbs=(), epochs=2, stop=(1, 2), unit='batch', **kwargs):
    "A fit that stops, and the callbacks to resume it with"
    cbs = [*cbs, Checkpoint(folder, unit=unit, **kwargs), Stop(*stop)]
    with pytest.raises(RuntimeError, match='stop'): learn.fit(epochs, cbs=cbs)
    return cbs


def messages(log): return '\n'.join(str(w.message) for w in log)
def state(learn): return schedule._copied(module_state(learn.module))
def drawn(learn): return random_state(learn.dls.train, learn.dls.valid, *learn.generators)
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# schedules

@given(positive, positive)
def test_ends_are_exact(a, b):
    for sched in sched_lin, sched_cos, sched_exp:
        assert (sched(a, b)(0), sched(a, b)(1)) == (a, b)
        for i in range(9): assert min(a, b) * (1 - 1e-12) <= sched(a, b)(i / 8) <= max(a, b) * (1 + 1e-12)
    assert sched_no(a, b)(1) == a


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any), st.data())
def test_combine_any_phases(shares, data):
    "Within each phase its own schedule, at its own position, however the shares round"
    pcts = [s / sum(shares) for s in shares]
    combined = combine_scheds(pcts, [lambda pos, i=i: (i, pos) for i in range(len(pcts))])
    phase = data.draw(st.sampled_from([i for i, s in enumerate(shares) if s]))
    inside = data.draw(st.floats(.001, .999))
    i, pos = combined(min((sum(shares[:phase]) + inside * shares[phase]) / sum(shares), 1.))
    assert i == phase and abs(pos - inside) < 1e-6
    assert combined(0)[1] == 0 or shares[0] == 0
    assert combined(1)[1] == 1
    for boundary in range(1, len(pcts)):
        i, pos = combined(sum(shares[:boundary]) / sum(shares))
        assert pos in (0, 1) or pos < 1e-6


@pytest.mark.parametrize('pcts', [
    [.1] * 10, [.7, .2, .1], [1 / 3] * 3, [1 / 7] * 7, [.3, .4, .3], [1.], [0, 1], [1, 0]])
def test_combine_steps(pcts):
    "Each phase starts where people would say that it starts"
    combined = combine_scheds(pcts, [sched_no(i, i) for i in range(len(pcts))])
    for i in range(len(pcts)):
        if pcts[i] and sum(pcts[:i]) < 1: assert combined(min(round(sum(pcts[:i]), 15), 1)) == i
    assert combined(1) == len(pcts) - 1


@pytest.mark.parametrize('pcts, n', [([.5, .4], 2), ([.5, .5], 3), ([], 0), ([1.5, -.5], 2), ([math.nan, 1], 2)])
def test_combine_refuses(pcts, n):
    with pytest.raises(ValueError): combine_scheds(pcts, [sched_lin(0, 1)] * n)


def test_positions_outside():
    scheds = sched_no(0, 1), sched_lin(0, 1), sched_cos(0, 1), sched_exp(1, 2), combine_scheds([1], [lambda p: p])
    for pos in -.01, 1.01, math.nan:
        for sched in scheds:
            with pytest.raises(ValueError, match='between 0'): sched(pos)
    for ends in (0, 1), (1, 0), (-1, -2):
        with pytest.raises(ValueError, match='positive'): sched_exp(*ends)


class Watch(Callback):
    order = 6
    def __init__(self, *names): self.names, self.seen = names, []
    def before_batch(self, learn):
        if learn.training: self.seen.append([[g[n] for n in self.names] for g in learn.opt.param_groups])


def test_first_batch_is_0_and_last_is_1():
    learn, watch = learner(), Watch('lr')
    learn.fit(2, cbs=[ParamScheduler({'lr': sched_lin(.1, .3)}), watch])
    assert watch.seen[0] == [[.1]] and watch.seen[-1] == [[.3]] and len(watch.seen) == 10
    assert learn.opt.param_groups[0]['lr'] == .1
    learn.fit(1, cbs=[ParamScheduler({'lr': sched_lin(.1, .3)}), SingleBatch()])
    assert learn[Recorder].lrs[-1] == .1


def test_a_single_batch():
    learn = learner(dls=data(8))
    learn.fit(1, cbs=ParamScheduler({'lr': sched_lin(.1, .3)}))
    assert learn[Recorder].lrs == [.1]


def test_groups_and_any_parameter():
    def opt(params, lr):
        params = list(params)
        return optim.SGD([dict(params=params[:2], lr=lr / 10), dict(params=params[2:])], lr=lr)
    learn, watch = learner(opt), Watch('lr', 'weight_decay')
    scheds = {'lr': [sched_lin(.1, .2), sched_lin(1., 2.)], 'weight_decay': sched_lin(0., .5)}
    learn.fit(1, cbs=[ParamScheduler(scheds), watch])
    assert watch.seen[0] == [[.1, 0.], [1., 0.]] and watch.seen[-1] == [[.2, .5], [2., .5]]
    with pytest.raises(ValueError, match='3 schedules for 2'):
        learn.fit(1, cbs=ParamScheduler({'lr': [sched_lin(0, 1)] * 3}))


def test_adams_momentum_and_betas():
    by_momentum, by_betas = {'momentum': sched_lin(.95, .85)}, {'betas': lambda p: (.9, .9 + .09 * p)}
    for scheds, last in (by_momentum, (.85, .999)), (by_betas, (.9, .99)):
        learn, watch = learner(optim.Adam), Watch('betas')
        learn.fit(1, cbs=[ParamScheduler(scheds), watch])
        assert watch.seen[-1][0][0] == pytest.approx(last)
        assert learn.opt.param_groups[0]['betas'] == (.9, .999)
    with pytest.raises(ValueError, match='betas.*, momentum'): learn.fit(1, cbs=ParamScheduler({'beta': sched_lin}))
    with pytest.raises(ValueError, match="no 'betas'.*momentum"): learner().fit(1, cbs=ParamScheduler(by_betas))


def test_a_name_that_is_the_loops_own_is_none_of_the_optimizers():
    with pytest.raises(ValueError, match='there are: lr, (?!.*made_lr)'):
        learner().fit(1, cbs=ParamScheduler({'made_lr': sched_lin(0, 1)}))


def test_learning_rate_in_a_tensor():
    learn = learner(lambda p, lr: optim.Adam(p, lr=torch.tensor(lr)))
    held = learn.opt.param_groups[0]['lr']
    learn.fit(1, cbs=ParamScheduler(flat_cos(.01)))
    assert learn.opt.param_groups[0]['lr'] is held and float(held) == pytest.approx(.1)


def test_no_length():
    dls = data()
    dls = DataLoaders(iter(list(dls.train)), dls.valid)
    with pytest.raises(ValueError, match='n_batches'): learner(dls=dls).fit(1, cbs=ParamScheduler(flat_cos(.1)))
    learn = learner(dls=dls)
    learn.fit(1, cbs=ParamScheduler({'lr': sched_lin(.1, .5)}, n_batches=5))
    assert learn[Recorder].lrs[-1] == .5


def test_builders():
    cycle = one_cycle(1., pct=.3, div=10, div_final=100, momentum=(.95, .85, .9))
    assert [cycle['lr'](p) for p in (0, .3, 1)] == [.1, 1., .01]
    assert [cycle['momentum'](p) for p in (0, .3, 1)] == [.95, .85, .9]
    assert list(one_cycle(1.)) == ['lr']
    assert [flat_cos(2., .5)['lr'](p) for p in (0, .4, .5, 1)] == [2, 2, 2, 2 / 1e5]
    assert [warmup(2., .5, sched_lin(2., 1.))['lr'](p) for p in (0, .25, .5, 1)] == [0, 1, 2, 1]
    assert warmup(2.)['lr'](1) == 2


def test_one_cycle_is_pytorchs():
    "The curve of torch.optim.lr_scheduler.OneCycleLR, step by step"
    opt = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1., momentum=.9)
    # theirs turns at step pct * n - 1 and ends at n - 1; ours is laid over the same steps
    n, pct = 101, .25
    theirs = optim.lr_scheduler.OneCycleLR(opt, 1., total_steps=n, pct_start=(pct * (n - 1) + 1) / n, base_momentum=.85,
                                           max_momentum=.95, final_div_factor=1e5 / 25)
    cycle = one_cycle(1., pct, momentum=(.95, .85, .95))
    for i in range(n):
        assert opt.param_groups[0]['lr'] == pytest.approx(cycle['lr'](i / (n - 1)), abs=1e-9)
        assert opt.param_groups[0]['momentum'] == pytest.approx(cycle['momentum'](i / (n - 1)), abs=1e-9)
        opt.step()
        if i < n - 1: theirs.step()


# the sweep

class Odd(nn.Module):
    "A model with everything that a sweep could leave changed"
    def __init__(self):
        super().__init__()
        self.l1, self.bn, self.drop, self.l2 = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(.2), nn.Linear(8, 3)
        self.register_buffer('seen', torch.zeros(()), persistent=False)
        self.bn.eval()
    def forward(self, x):
        self.seen = self.seen + 1
        return self.l2(self.drop(self.bn(self.l1(x)).relu()))


@pytest.mark.parametrize('opt', [optim.SGD, lambda p, lr: optim.SGD(p, lr, momentum=.9), optim.Adam])
@pytest.mark.parametrize('fitted', [False, True])
def test_sweep_leaves_no_trace(opt, fitted, tmp_path, recwarn, capsys):
    scheduler = ParamScheduler(flat_cos(.1))
    cbs = [EarlyStopping(), Checkpoint(tmp_path / 'c'), scheduler, GradientAccumulation(2), GradientClip(1.)]
    learn = learner(opt, cbs, model=Odd(), progress=True)
    if fitted: learn.fit(1)
    files = sorted(tmp_path.rglob('*'))
    def look():
        return ([m.training for m in learn.model.modules()], sorted(vars(learn)), list(learn.cbs), learn.fit_lr,
                learn.epoch, str(learn.opt.state_dict()) if 'opt' in vars(learn) else None)
    before, weights, rng = look(), state(learn), drawn(learn)
    recorded = list(learn[Recorder].losses), list(learn[Recorder].rows)
    recwarn.clear(), capsys.readouterr()
    sweep = lr_find(learn, n=23)
    assert not len(recwarn) and capsys.readouterr().out == ''
    assert look() == before and same(weights, state(learn)) and ('opt' in vars(learn)) == fitted
    assert (learn[Recorder].losses, learn[Recorder].rows) == recorded
    for a, b in zip(rng, drawn(learn)):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)
    assert sorted(tmp_path.rglob('*')) == files
    assert len(sweep.lrs) == len(sweep.losses) == len(sweep.smoothed) <= 23


def test_sweep_then_fit_is_fit():
    a, b = learner(optim.Adam), learner(optim.Adam)
    lr_find(a)
    torch.manual_seed(1)
    a.fit(1)
    torch.manual_seed(1)
    b.fit(1)
    assert same(state(a), state(b))


def test_sweep_edges():
    with pytest.raises(ValueError, match='at least 2'): lr_find(learner(), n=1)
    bad = learner()
    bad.model[0].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match='not finite'): lr_find(bad)
    with pytest.raises(ValueError, match='dls.train is empty'): lr_find(learner(dls=DataLoaders([], None)))
    used_up = DataLoaders(iter(list(data().train)))
    with pytest.raises(ValueError, match='5 of 100 batches'): lr_find(learner(dls=used_up))
    for p in bad.model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='frozen'): lr_find(bad)
    flat = learner(lambda p, lr: optim.SGD(p, lr), model=nn.Sequential(nn.Linear(4, 3)))
    sweep = lr_find(flat, 1e-6, 100., n=60)
    assert len(sweep.lrs) <= 60 and sweep.lrs[0] == 1e-6 and sweep.suggestion in sweep.lrs
    sweep.plot()


def test_a_failing_sweep_leaves_no_trace():
    learn = learner(cbs=Stop(1, 2))
    before = state(learn)
    with pytest.raises(RuntimeError, match='stop'): lr_find(learn, n=50)
    assert same(before, state(learn)) and 'opt' not in vars(learn)
    learn.fit(1)


def test_a_sweep_goes_on_until_the_loss_is_no_number(recwarn):
    "What would end a fit, and say so, has no part in it"
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3))
        def forward(self, x): return x @ self.w + 0 * (self.w[0, 0].detach() - self.w[0, 0]).sqrt() # Its gradient: NaN
    with pytest.raises(ValueError, match='not finite'): lr_find(learner(model=Root(), cbs=TerminateOnNaN()), n=8)
    assert not len(recwarn)


# early stopping

class Rows(Callback):
    "Puts numbers in the rows"
    order = 55
    def __init__(self, values): self.values = values
    def after_epoch(self, learn): learn.row['made'] = self.values[learn.epoch]


@pytest.mark.parametrize('values, mode, patience, delta, epochs, best', [
    ([3, 2, 1, 2, 3, 4], 'min', 2, 0, 5, 2), ([1, 2, 3, 2, 1, 0], 'max', 2, 0, 5, 2),
    ([3, 2.9, 2.8, 2.7], 'min', 2, .5, 3, 0), ([5, 4, 3, 2], 'min', 1, 0, 4, 3),
    ([math.nan] * 4, 'min', 2, 0, 2, None), ([1, math.nan, 0, 5], 'min', 2, 0, 4, 2)])
def test_early_stopping(values, mode, patience, delta, epochs, best):
    kept = []
    class Keep(Callback):
        order = 56
        def after_epoch(self, learn): kept.append(state(learn))
    learn, stop = learner(), EarlyStopping('made', mode, patience, delta)
    learn.fit(len(values), cbs=[Rows(values), Keep(), stop])
    assert len(kept) == epochs and stop.best_epoch == best
    assert same(state(learn), kept[-1 if best is None else best])
    learn.fit(len(values), cbs=[Rows(values), EarlyStopping('made', mode, patience, delta, restore=False)])


def test_early_stopping_refuses():
    with pytest.raises(ValueError, match='train_loss, valid_loss, accuracy'):
        learner().fit(1, cbs=EarlyStopping('acuracy'))
    without = Learner(DataLoaders(data().train), nn.Linear(4, 3), F.cross_entropy, cbs=EarlyStopping(), progress=False)
    with pytest.raises(ValueError, match='valid_loss.*train_loss'): without.fit(1)
    for bad in dict(mode='up'), dict(patience=0):
        with pytest.raises(ValueError): EarlyStopping(**bad)


def test_an_exception_restores_nothing():
    learn = learner()
    with pytest.raises(RuntimeError): learn.fit(3, cbs=[EarlyStopping(), Stop(1, 4)])
    after = state(learn)
    assert not same(after, state(learner()))


def test_a_cancelled_epoch_has_no_result():
    class Skip(Callback):
        def before_validate(self, learn): raise CancelEpoch
    learner().fit(2, cbs=[Skip(), EarlyStopping(patience=5)])


# the format

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=3) | st.integers() | st.booleans()
trees = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(keys, x, max_size=3),
                     max_leaves=12)


def equal(a, b):
    if type(a) is not type(b): return False
    if isinstance(a, float): return a == b and math.copysign(1, a) == math.copysign(1, b) or a != a and b != b
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict): return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape
        return alike and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, np.ndarray): return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def back(x):
    packer = schedule._Packer()
    return schedule._unpack(json.loads(json.dumps(packer.pack(x, 'x'))), packer.tensors)


@settings(max_examples=150)
@given(trees)
def test_everything_comes_back(x): assert equal(back(x), x)


@pytest.mark.parametrize('x', [{'$tensor': 1}, {'$items': [], 2: 3}, {1: {'a': (1, 2)}, '1': 2},
                               {True: 0, 'b': {None: 1}}], ids=str)
def test_dollars_and_odd_keys(x): assert equal(back(x), x)


@pytest.mark.parametrize('dtype', [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64,
    torch.complex128, torch.float8_e4m3fn])
def test_tensors_come_back(dtype, tmp_path):
    made = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(dtype)
    narrow = torch.zeros(4, 3, 1, 1).to(dtype).to(memory_format=torch.channels_last)
    tensors = [made, made.to(memory_format=torch.channels_last), made[:, 1], made[..., ::2], made.transpose(0, 1),
               made[0, 0, 0, 0], made[:0], torch.zeros(3, 0, 2, dtype=dtype), made[:, :1].expand(2, 3, 4, 4), narrow]
    schedule._write(tmp_path / 'x', tensors)
    wide = torch.Tensor.float if 'float8' in str(dtype) else lambda t: t
    for a, b in zip(tensors, schedule._read(tmp_path / 'x')):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(wide(a), wide(b))


def test_numpy_and_generators_come_back():
    states = np.random.get_state(), np.random.default_rng(3).bit_generator.state, random.getstate()
    for x in *states, np.float32(.1).item(), np.arange(3, dtype='uint32'): assert equal(back(x), x)
    assert back(np.float64(.1)) == .1 and back(np.int64(3)) == 3 and back(torch.Size([1, 2])) == (1, 2)
    for bad in {1, 2}, object(), torch.float32, torch.eye(2).to_sparse():
        with pytest.raises(TypeError, match='state.a'): schedule._Packer().pack(dict(a=bad), 'state')


def test_tied_tensors_are_stored_once():
    t, packer = torch.randn(5), schedule._Packer()
    packed = packer.pack(dict(a=t, b=t, c=t.view(5), d=t[1:]), 'x')
    assert len(packer.tensors) == 2 and packed['a'] == packed['b'] == packed['c']


# bad arguments

@pytest.mark.parametrize('bad', [sched_cos(1, 0), {'lr': .1}, {'lr': [sched_cos(1, 0), .1]}, 'lr'])
def test_no_schedules(bad):
    with pytest.raises(TypeError, match='schedules by name'): ParamScheduler(bad)


def test_two_schedulers_of_one_name():
    learn, one = learner(), ParamScheduler(flat_cos(.1))
    with pytest.raises(ValueError, match="two ParamSchedulers set 'lr'"):
        learn.fit(1, cbs=[one, ParamScheduler(one_cycle(.1))])
    assert learn.opt.param_groups[0]['lr'] == .1
    learn.fit(1, cbs=[one, ParamScheduler({'weight_decay': sched_cos(.1, 0)})])


@pytest.mark.parametrize('recipe', [
    lambda: one_cycle(.1, div=0), lambda: one_cycle(.1, div_final=-1), lambda: flat_cos(.1, div_final=0),
    lambda: one_cycle(.1, pct=1.5), lambda: warmup(.1, pct=-.1)])
def test_recipes_refuse(recipe):
    with pytest.raises(ValueError, match='positive number|add up to 1'): recipe()


@pytest.mark.parametrize('bad, match', [(dict(start=0), 'goes up'), (dict(start=1., end=.1), 'goes up'),
                                        (dict(smooth=1.), 'smooth'), (dict(n=1), 'at least 2')])
def test_sweeps_refuse(bad, match):
    with pytest.raises(ValueError, match=match): lr_find(learner(), **bad)


@pytest.mark.parametrize('bad', [dict(every=0), dict(every='batch'), dict(keep=0), dict(unit='step'), dict(mode='up')])
def test_checkpoint_refuses(bad, tmp_path):
    with pytest.raises(ValueError): Checkpoint(tmp_path, **bad)


def test_two_checkpoints_in_one_folder(tmp_path):
    with pytest.raises(ValueError, match='folder of its own'):
        learner().fit(1, cbs=[Checkpoint(tmp_path), Checkpoint(tmp_path)])
    learner().fit(1, cbs=[Checkpoint(tmp_path / 'a'), Checkpoint(tmp_path / 'b')])
    assert len(schedule._found(tmp_path / 'a')) == len(schedule._found(tmp_path / 'b')) == 1


def test_a_misspelt_result_is_told_at_once():
    class Early(Callback):
        def before_batch(self, learn): raise CancelFit
    with pytest.warns(UserWarning, match="'acuracy', which is none of train_loss, valid_loss, accuracy"):
        learner().fit(1, cbs=[EarlyStopping('acuracy'), Early()])
    class Adds(Callback):
        order = 50
        def after_epoch(self, learn): learn.row['mine'] = 1.
    learner().fit(1, cbs=[EarlyStopping('mine'), Adds()])


# checkpoints

def test_sorted_by_number(tmp_path):
    places = (0, 9999), (0, 10000), (999, 1), (1000, 0)
    names = [f'fit{f:03}_epoch{e:04}_3done.safetensors' for f, e in places]
    for name in reversed(names): (tmp_path / name).touch()
    (tmp_path / 'fitness.safetensors').touch()
    assert [p.name for p in schedule._found(tmp_path)] == names
    assert schedule._Shelf(tmp_path, 3).fit == 1001


def test_resume_the_same_learner(tmp_path, recwarn):
    "After an exception at a prompt: the Learner that stopped goes on, and says nothing of its optimizer"
    whole, learn = learner(optim.Adam), learner(optim.Adam)
    torch.manual_seed(4)
    whole.fit(2, cbs=[ParamScheduler(one_cycle(.1)), Stop(9, 9)])
    torch.manual_seed(4)
    cbs = interrupted(tmp_path, learn, [ParamScheduler(one_cycle(.1))])
    learn.model[0].weight.data.zero_()
    recwarn.clear()
    resume(learn, tmp_path, cbs)
    assert same(state(learn), state(whole)) and learn[Recorder].losses == whole[Recorder].losses
    assert learn[Recorder].rows == whole[Recorder].rows
    said = messages(recwarn)
    assert 'goes on in epoch 1 of 2, after 2 batches' in said and 'goes on with its state' not in said


def test_the_next_fit_says_that_the_optimizer_goes_on(tmp_path):
    cbs, learn = interrupted(tmp_path, learner(optim.Adam)), learner(optim.Adam)
    resume(learn, tmp_path, cbs)
    with pytest.warns(UserWarning, match='goes on with its state'): learn.fit(1)


def test_a_second_fit(tmp_path):
    "Losses and rows of the fit before, and the optimizer's state, are part of it"
    def twice(stop):
        torch.manual_seed(4)
        learn = learner(optim.Adam)
        learn.fit(1)
        if not stop: learn.fit(2, .05)
        else:
            cbs = [Checkpoint(tmp_path, unit='batch'), Stop(1, 2)]
            with pytest.raises(RuntimeError): learn.fit(2, .05, cbs=cbs)
            learn = learner(optim.Adam)
            resume(learn, tmp_path, cbs)
        return learn
    a, b = twice(False), twice(True)
    assert same(state(a), state(b)) and a[Recorder].losses == b[Recorder].losses
    assert a[Recorder].rows == b[Recorder].rows
    a.fit(1), b.fit(1)
    assert a.opt.param_groups[0]['lr'] == b.opt.param_groups[0]['lr'] == .1


def test_finished_fit(tmp_path):
    learn = learner()
    learn.fit(2, cbs=Checkpoint(tmp_path))
    other = learner()
    with pytest.warns(UserWarning, match='the fit is over'): resume(other, tmp_path)
    assert same(state(learn), state(other)) and other[Recorder].rows == learn[Recorder].rows and other.row == learn.row
    other.fit(1)
    assert len(other[Recorder].rows) == 3


def test_strides_and_ties(tmp_path):
    def net(last):
        torch.manual_seed(0)
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        model = nn.Sequential(nn.Conv2d(3, 4, 3), *pool, nn.Linear(4, 4), nn.Linear(4, 4))
        model[3].weight = model[4].weight
        return model.to(memory_format=torch.channels_last) if last else model
    x = torch.randn(24, 3, 5, 5)
    def made(last):
        dls = DataLoaders(DataLoader(Dataset(x, torch.arange(24) % 3), 8))
        return Learner(dls, net(last), F.cross_entropy, lr=.1, progress=False)
    whole = made(True)
    whole.fit(2)
    cbs = interrupted(tmp_path, made(True), stop=(1, 1))
    learn = made(False)
    resume(learn, tmp_path, cbs)
    assert same(state(whole), state(learn)) and learn.model[3].weight is learn.model[4].weight
    assert learn.model[0].weight.stride() == whole.model[0].weight.stride() != made(False).model[0].weight.stride()
    untied = made(True)
    untied.model[3].weight = nn.Parameter(untied.model[3].weight.detach().clone())
    with pytest.raises(ValueError, match='of another model'): resume(untied, tmp_path, cbs)


def test_keep_and_best(tmp_path):
    values = [5, 1, 4, 3, 3, 3]
    learner().fit(6, cbs=[Rows(values), Checkpoint(tmp_path, keep=2, monitor='made')])
    assert [p.name[7:16] for p in schedule._found(tmp_path)] == ['epoch0001', 'epoch0004', 'epoch0005']
    learner().fit(3, cbs=[Rows(values), Checkpoint(tmp_path, keep=1, monitor='made', mode='max')])
    first = [f'fit000_epoch{i:04}' for i in (1, 4, 5)]
    assert [p.name[:16] for p in schedule._found(tmp_path)] == [*first, 'fit001_epoch0000', 'fit001_epoch0002']
    with pytest.raises(ValueError, match="no result 'other'"):
        learner().fit(1, cbs=Checkpoint(tmp_path, monitor='other'))


def test_every(tmp_path):
    learner().fit(5, cbs=Checkpoint(tmp_path, every=2, keep=9, monitor=None))
    assert [p.name[7:16] for p in schedule._found(tmp_path)] == ['epoch0001', 'epoch0003', 'epoch0004']


def test_validate_writes_nothing(tmp_path):
    learn = learner(cbs=Checkpoint(tmp_path, unit='batch'))
    learn.validate()
    assert not schedule._found(tmp_path)


def test_leftovers(tmp_path):
    name = '.fit000_epoch0000_3done.safetensors'
    dead, alive = (tmp_path / f'{name}.{pid}.part' for pid in (999999999, os.getppid()))
    for folder in dead, alive:
        folder.mkdir()
        (folder / 'file').write_bytes(b'x')
    learner().fit(1, cbs=Checkpoint(tmp_path))
    assert [p.name for p in tmp_path.glob('.*')] == [alive.name]


def test_a_full_disk(tmp_path, monkeypatch):
    def fails(*args): raise OSError('no space left')
    monkeypatch.setattr(schedule, 'save_file', fails)
    learn = learner()
    with pytest.raises(OSError): learn.fit(1, cbs=Checkpoint(tmp_path))
    assert not list(tmp_path.iterdir())


def damaged(path, how):
    raw = path.read_bytes()
    if how == 'short': raw = raw[:-50]
    if how == 'empty': raw = b''
    if how == 'bit': raw = raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]
    if how == 'text': raw = raw.replace(b'n_epochs\\": 2', b'n_epochs\\": 9')
    if how == 'noise': raw = os.urandom(len(raw))
    assert raw != path.read_bytes()
    path.write_bytes(raw)


@pytest.mark.parametrize('how', ['short', 'empty', 'bit', 'text', 'noise'])
def test_damage(tmp_path, how, recwarn):
    cbs = interrupted(tmp_path, learner())
    *_, before, newest = schedule._found(tmp_path)
    damaged(newest, how)
    fresh, weights = learner(), state(learner())
    with pytest.raises(ValueError, match='no whole file|damaged or edited'): resume(fresh, newest, cbs)
    assert same(state(fresh), weights)
    resume(fresh, tmp_path, cbs)
    said = messages(recwarn)
    assert f'left out: {newest.name}' in said and f'{before.name}: the fit goes on' in said


def test_refusals(tmp_path, monkeypatch):
    "What belongs to another fit is refused before anything is changed"
    learn = learner()
    cbs = interrupted(tmp_path / 'a', learn, [ParamScheduler(one_cycle(.1))])
    last = schedule._found(tmp_path / 'a')[-1]
    def refused(match, learn=None, cbs=cbs, path=last):
        learn = learn or learner()
        weights, rng, losses = state(learn), drawn(learn), learn[Recorder].losses
        with pytest.raises(ValueError, match=match): resume(learn, path, cbs)
        assert same(state(learn), weights) and learn[Recorder].losses == losses == [] and not learn.opt.state
        assert all(map(equal, drawn(learn), rng))
    wide = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(.2), nn.Linear(9, 3))
    refused(r'another model: model.0.weight is \[\[9, 4\]', learner(model=wide))
    refused('another model: .* only in the', learner(model=nn.Sequential(nn.Linear(4, 3))))
    refused('float64', learner(model=learner().model.double()))
    refused('optimizer is Adam and was SGD', learner(optim.Adam))
    refused(r'have \[10, 2\] batches', learner(dls=data(80)))
    refused(r'\d random generators and were \d', learner(generators=[random.Random(1)]))
    refused('had ParamScheduler', cbs=cbs[1:])
    refused('other schedules', cbs=[ParamScheduler(one_cycle(.2)), *cbs[1:]])
    def halves(params, lr):
        first, *rest = params
        return optim.SGD([dict(params=[first]), dict(params=rest)], lr)
    refused(r'\[1, 5\] parameters in its groups and had \[6\]', learner(halves))
    def error_rate(pred, target): return 1 - accuracy(pred, target)
    refused('Metrics has .*error_rate.* and had .*accuracy', learner(metrics=error_rate))
    accumulating = interrupted(tmp_path / 'd', learner(), [GradientAccumulation(2)])
    three = [GradientAccumulation(3), *accumulating[1:]]
    refused('GradientAccumulation has .*3.* and had .*2', cbs=three, path=tmp_path / 'd')
    learn.save(tmp_path / 'w.safetensors')
    refused('is no checkpoint', path=tmp_path / 'w.safetensors')
    monkeypatch.setattr(schedule, '_FORMAT', 2)
    schedule._write(tmp_path / 'future', {})
    monkeypatch.undo()
    refused('format 2', path=tmp_path / 'future')
    with pytest.raises(FileNotFoundError): resume(learner(), tmp_path / 'b')
    (tmp_path / 'c').mkdir()
    with pytest.raises(FileNotFoundError, match='Checkpoint'): resume(learner(), tmp_path / 'c')


def test_the_file_is_for_others_too(tmp_path):
    "Any reader of safetensors finds the weights under their names"
    from safetensors.torch import load_file
    learn = learner()
    learn.fit(1, cbs=Checkpoint(tmp_path))
    read = load_file(schedule._found(tmp_path)[-1])
    for name, p in learn.model.named_parameters(): assert torch.equal(read[f'.state.module.model.{name}'], p)


def test_progress_has_a_length(tmp_path):
    seen = []
    class Look(Callback):
        order = math.inf
        def before_batch(self, learn): seen.append((len(learn.dl), learn.iter))
    learn, look = learner(), Look()
    cbs = interrupted(tmp_path, learn, [look])
    seen.clear()
    resume(learn, tmp_path, cbs)
    assert seen[0] == (5, 2)


def test_foreign_loader_says_so(tmp_path):
    d = data()
    learn = learner(dls=DataLoaders(list(d.train), d.valid))
    cbs = interrupted(tmp_path, learn)
    with pytest.warns(UserWarning, match='list cannot begin in the middle: 2 batches are made and left out'):
        resume(learn, tmp_path, cbs)


def test_persistent_workers_of_others_are_told(tmp_path):
    "They draw once for all epochs, so the order cannot be drawn again"
    d, T = data(), torch.utils.data.DataLoader
    train = T(d.train.dataset, 8, shuffle=True, num_workers=1, persistent_workers=True)
    learn = learner(dls=DataLoaders(train, d.valid))
    cbs = interrupted(tmp_path, learn)
    with pytest.warns(UserWarning, match='its workers persist'): resume(learn, tmp_path, cbs)
    assert len(learn[Recorder].losses) == 10


def test_a_loader_that_has_become_shorter_is_told(tmp_path):
    class Shorter:
        "So many batches, whatever it says of them"
        def __init__(self, n): self.batches, self.n = list(data().train), n
        def __len__(self): return 5
        def __iter__(self): return iter(self.batches[:self.n])
    cbs = interrupted(tmp_path, learner(dls=DataLoaders(Shorter(5)), metrics=()), stop=(1, 3))
    short = learner(dls=DataLoaders(Shorter(2)), metrics=())
    with pytest.raises(ValueError, match='fewer than the 3 batches'): resume(short, tmp_path, cbs)


def test_freed(tmp_path):
    learn = learner()
    cbs = interrupted(tmp_path, learn)
    resume(learn, tmp_path, cbs)
    gone = weakref.ref(learn)
    del learn
    assert gone() is None


# what a second reader found

class Wrapped:
    "A loader of others around one with a generator"
    def __init__(self, dl): self.inner = dict(dl=[dl])
    def __len__(self): return len(self.inner['dl'][0])
    def __iter__(self): yield from self.inner['dl'][0]


class Shaken(torch.utils.data.Dataset):
    "Samples that are changed by a generator in a transform"
    def __init__(self, rng): self.transform = partial(self.shake, rng=rng)
    def shake(self, x, rng): return x + float(rng.normal())
    def __len__(self): return 20
    def __getitem__(self, i): return self.transform(torch.full((4,), i / 10)), torch.tensor(i % 3)


class Masters(optim.Optimizer):
    "SGD on exact copies of rounded weights"
    def __init__(self, params, lr): super().__init__(params, dict(lr=lr))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                exact = self.state[p].setdefault('exact', p.float())
                p.copy_(exact.sub_(group['lr'] * p.grad.float()))


def wrapped():
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(1)
    inner = torch.utils.data.DataLoader(Shaken(rng), 8, shuffle=True, generator=g)
    return DataLoaders(Wrapped(inner), data().valid), [rng, g]


def joined():
    rng = np.random.default_rng(0)
    both = torch.utils.data.ConcatDataset([Shaken(rng), Shaken(rng)])
    return DataLoaders(DataLoader(both, 8), data().valid), [rng]


def rounded():
    return DataLoaders(*([(x.bfloat16(), y) for x, y in dl] for dl in (data().train, data().valid))), []


@pytest.mark.parametrize('dls, opt, dtype', [
    (wrapped, optim.SGD, torch.float32), (joined, optim.SGD, torch.float32), (rounded, Masters, torch.bfloat16)])
def test_resume_and_sweep_with_state_in_odd_places(dls, opt, dtype, tmp_path):
    "Generators that no loader has are named; what the optimizer keeps stays exact"
    def made():
        loaders, generators = dls()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
        return learner(opt, dls=loaders, model=model, generators=generators)
    def exact(learn): return [s['exact'] for s in learn.opt.state.values() if s]
    whole = made()
    torch.manual_seed(5)
    whole.fit(2)
    swept = made()
    lr_find(swept, n=8)
    torch.manual_seed(5)
    swept.fit(1)
    lr_find(swept, n=8)
    assert swept[Recorder].losses == whole[Recorder].losses[:len(swept[Recorder].losses)]
    assert all(t.dtype == torch.float32 for t in exact(swept))
    first, keep = made(), Checkpoint(tmp_path, unit='batch')
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match='stop'): first.fit(2, cbs=[keep, Stop(1, 1)])
    again = made()
    resume(again, tmp_path, cbs=type('Stop', (Callback,), {})())
    assert same(state(whole), state(again)) and whole[Recorder].losses == again[Recorder].losses
    assert all(map(torch.equal, exact(whole), exact(again)))


def test_a_negative_zero_comes_back():
    model = nn.Linear(2, 2)
    model.bias.data.fill_(-0.)
    saved = schedule._copied(module_state(model))
    model.bias.data.fill_(0.)
    load_module_state(model, saved)
    assert model.bias.signbit().all()


def test_a_sweep_puts_attributes_of_callbacks_back():
    class Count(Callback):
        n = 0
        def after_batch(self, learn): self.n += 1
    learn = learner(cbs=(count := Count()))
    lr_find(learn, n=8)
    assert count.n == 0 and list(learn.cbs)[0] is count


def test_remains_of_a_process_of_our_number(tmp_path):
    "In a container each run may be process 1"
    part = tmp_path / f'.fit000_epoch0000_3done.safetensors.{os.getpid()}.part'
    part.mkdir()
    schedule._write(tmp_path / 'fit000_epoch0000_3done.safetensors', dict(a=1))
    assert not part.exists()
    part.mkdir()
    learner().fit(1, cbs=Checkpoint(tmp_path))
    assert not part.exists()


def test_a_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = Checkpoint('here')
    monkeypatch.chdir('/')
    learner().fit(1, cbs=keep)
    assert len(list((tmp_path / 'here').iterdir())) == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='two Checkpoints'):
        learner().fit(1, cbs=[Checkpoint('here'), Checkpoint(tmp_path / 'here')])


def test_more_batches_than_were_said():
    with pytest.raises(ValueError, match='for 3 batches an epoch'):
        learner().fit(2, cbs=ParamScheduler(flat_cos(.1), n_batches=3))


def test_a_fit_that_never_began_changes_no_parameter():
    class Fails(Callback):
        order, now = -1, False
        def before_fit(self, learn): assert not self.now
    fails, scheduler = Fails(), ParamScheduler({'momentum': sched_lin(.9, .8)})
    learn = learner(lambda p, lr: optim.SGD(p, lr, momentum=.9), cbs=[fails, scheduler])
    learn.fit(1)
    learn.opt.param_groups[0]['momentum'], fails.now = .5, True
    with pytest.raises(AssertionError): learn.fit(1)
    assert learn.opt.param_groups[0]['momentum'] == .5


@pytest.mark.parametrize('recipe', [one_cycle, flat_cos, warmup])
@pytest.mark.parametrize('lr', [0, -.1, math.nan, math.inf])
def test_recipes_look_at_the_rate(recipe, lr):
    with pytest.raises(ValueError, match='finite and above 0'): recipe(lr)


def test_shares_in_arrays():
    for pcts in np.array([.5, .5]), torch.tensor([.5, .5]), (p for p in (.5, .5)):
        assert combine_scheds(pcts, [sched_lin(0, 1), sched_lin(2, 3)])(1) == 3


def test_schedules_of_another_machine_are_the_same():
    "Their cosines differ in the last digit"
    def scheduler(): return ParamScheduler({'lr': sched_cos(.1, 0), 'betas': lambda p: (.9, .99 + p / 1000)})
    one, other, states, learn = scheduler(), scheduler(), [], learner(optim.Adam)
    class Take(Callback):
        def after_epoch(self, learn): states.append(one.state_dict())
    learn.fit(1, cbs=[one, Take()])
    def nudged(x, by):
        if isinstance(x, (list, tuple)): return type(x)(nudged(v, by) for v in x)
        return x * by if isinstance(x, float) else x
    class Load(Callback):
        order = 50
        def before_fit(self, learn):
            samples = states[0]['samples']
            other.load_state_dict(states[0] | dict(samples=nudged(samples, 1 + 2e-16)))
            with pytest.raises(ValueError, match='other schedules'):
                other.load_state_dict(states[0] | dict(samples=nudged(samples, 1.001)))
    learn.fit(1, cbs=[other, Load()])


def test_a_result_that_is_never_a_number():
    with pytest.warns(UserWarning, match='made was no number; the fit ends after epoch 1'):
        learner(cbs=[Rows([math.nan] * 5), EarlyStopping('made', patience=2)]).fit(5)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason='there is no accelerator')
def test_on_an_accelerator(tmp_path):
    "A sweep as the first thing that a Learner does, and a fit that goes on from a file"
    right = Metric(lambda p, t: (p.argmax(-1) == t).float().mean(), 'right', average=False)
    whole, broken, again = (learner(optim.Adam, metrics=right) for _ in range(3))
    assert lr_find(broken, n=8).losses
    torch.manual_seed(4)
    whole.fit(2)
    torch.manual_seed(4)
    cbs = interrupted(tmp_path, broken)
    resume(again, tmp_path, cbs)
    assert same(state(whole), state(again)) and whole[Recorder].rows == again[Recorder].rows
    assert next(again.model.parameters()).device.type != 'cpu'


# what a loop has besides

def test_a_bare_loop_has_checkpoints_too(tmp_path):
    "Without the callbacks of a Learner, validation set or monitor"
    def made():
        torch.manual_seed(0)
        return TrainingLoop(DataLoaders(data().train), nn.Linear(4, 3), F.cross_entropy, optim.Adam, .1)
    whole, broken, again = made(), made(), made()
    whole.fit(2)
    cbs = interrupted(tmp_path, broken, monitor=None)
    resume(again, tmp_path, cbs)
    assert same(state(whole), state(again))


def test_a_loss_with_parameters_goes_on(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, pred, target): return F.cross_entropy(pred * self.scale, target)
    def made():
        learn = learner(optim.Adam)
        learn.loss_func = Scaled()
        return learn
    whole, broken, again = made(), made(), made()
    torch.manual_seed(4)
    whole.fit(2)
    torch.manual_seed(4)
    cbs = interrupted(tmp_path, broken)
    lr_find(again, n=8)
    assert again.loss_func.scale == 1
    resume(again, tmp_path, cbs)
    assert same(state(whole), state(again)) and again.loss_func.scale == whole.loss_func.scale != 1


def test_a_short_epoch_goes_on(tmp_path):
    "Its batches are counted from the first one"
    whole, broken, again = (learner() for _ in range(3))
    torch.manual_seed(4)
    whole.fit(2, cbs=ShortEpoch(4))
    torch.manual_seed(4)
    cbs = interrupted(tmp_path, broken, [ShortEpoch(4)])
    resume(again, tmp_path, cbs)
    assert same(state(whole), state(again)) and whole[Recorder].losses == again[Recorder].losses
    assert len(again[Recorder].losses) == 8
