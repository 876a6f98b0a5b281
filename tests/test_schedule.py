"""Schedules and PyTorch's schedulers, where a page has no room."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler

from dlfound.learner import Callback, DataLoaders, GradientAccumulation, Recorder, SingleBatch
from dlfound.schedule import (ParamScheduler, TorchScheduler, combine_scheds, flat_cos, one_cycle, sched_cos, sched_exp,
                              sched_lin, sched_no, warmup)
from fits import data, learner

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
positive = st.floats(1e-8, 1e4)


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


@pytest.mark.parametrize('bad', [sched_cos(1, 0), {'lr': .1}, {'lr': [sched_cos(1, 0), .1]}, 'lr'])
def test_no_schedules(bad):
    with pytest.raises(TypeError, match='schedules by name'): ParamScheduler(bad)


def test_two_schedulers_of_one_name():
    learn, one = learner(), ParamScheduler(flat_cos(.1))
    with pytest.raises(ValueError, match="sets one of"):
        learn.fit(1, cbs=[one, ParamScheduler(one_cycle(.1))])
    assert learn.opt.param_groups[0]['lr'] == .1
    learn.fit(1, cbs=[one, ParamScheduler({'weight_decay': sched_cos(.1, 0)})])


@pytest.mark.parametrize('recipe', [
    lambda: one_cycle(.1, div=-1), lambda: one_cycle(.1, div_final=-1), lambda: flat_cos(.1, div_final=math.inf),
    lambda: one_cycle(.1, pct=1.5), lambda: warmup(.1, pct=-.1)])
def test_recipes_refuse(recipe):
    with pytest.raises(ValueError, match='finite and above 0|add up to 1'): recipe()


def test_more_batches_than_were_said():
    with pytest.raises(ValueError, match='more than 3 batches'):
        learner().fit(2, cbs=ParamScheduler(flat_cos(.1), n_batches=3))


@pytest.mark.parametrize('make', [lambda: ParamScheduler({'momentum': sched_lin(.9, .8)}),
                                  lambda: TorchScheduler(partial(lr_scheduler.StepLR, step_size=1))])
def test_a_fit_that_never_began_changes_no_parameter(make):
    class Fails(Callback):
        order, now = -1, False
        def before_fit(self, learn): assert not self.now
    fails, scheduler = Fails(), make()
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
        return x * by
    class Load(Callback):
        order = 50
        def before_fit(self, learn):
            samples = states[0]['samples']
            other.load_state_dict(states[0] | dict(samples=nudged(samples, 1 + 2e-16)))
            with pytest.raises(ValueError, match='other schedules'):
                other.load_state_dict(states[0] | dict(samples=nudged(samples, 1.001)))
    learn.fit(1, cbs=[other, Load()])


# groups of parameters

def grouped(first, kind=optim.SGD, **last):
    "An optimizer with two groups, the first of them with values of its own"
    def made(params, lr):
        params = list(params)
        return kind([dict(params=params[:2], **first(lr)), dict(params=params[2:], **last)], lr=lr)
    return made


def test_one_schedule_keeps_the_ratios_of_rates():
    "Also after a fit at another rate, and for Adam"
    for kind in optim.SGD, optim.Adam:
        learn, watch = learner(grouped(lambda lr: dict(lr=lr / 100), kind)), Watch('lr')
        learn.fit(1, lr=.5)
        learn.fit(1, cbs=[ParamScheduler(one_cycle(1.)), watch])
        for slow, fast in watch.seen: assert slow[0] == pytest.approx(fast[0] / 100)
        assert max(fast[0] for _, fast in watch.seen) == 1.
        assert [g['lr'] for g in learn.opt.param_groups] == pytest.approx([.001, .1])


def test_one_schedule_keeps_the_ratios_of_anything():
    learn, watch = learner(grouped(lambda lr: dict(weight_decay=.2), weight_decay=.1)), Watch('weight_decay')
    learn.fit(1, cbs=[ParamScheduler({'weight_decay': sched_lin(.1, .5)}), watch])
    assert watch.seen[0] == [[.2], [.1]] and watch.seen[-1] == [[1.], [.5]]
    assert [g['weight_decay'] for g in learn.opt.param_groups] == [.2, .1]


@pytest.mark.parametrize('opt, name', [
    (grouped(lambda lr: dict(weight_decay=.1), weight_decay=0.), 'weight_decay'),
    (grouped(lambda lr: dict(betas=(.8, .99)), optim.Adam, betas=(.9, .99)), 'betas')])
def test_no_ratio(opt, name):
    learn = learner(opt)
    with pytest.raises(ValueError, match=f'{name}.*no proportion.*give a list'):
        learn.fit(1, cbs=ParamScheduler({name: sched_no(.1, .1)}))
    values = [learn.opt.param_groups[i][name] for i in (0, 1)]
    learn.fit(1, cbs=ParamScheduler({name: [lambda pos, v=v: v for v in values]}))
    assert [g[name] for g in learn.opt.param_groups] == values


class Take(Callback):
    "The states of a scheduler, as a checkpoint takes them"
    order = 99
    def __init__(self, cb): self.cb, self.states = cb, []
    def after_epoch(self, learn): self.states.append(self.cb.state_dict())


class Give(Callback):
    "A state at the beginning of a fit, as resume gives it"
    order = 99
    def __init__(self, cb, state): self.cb, self.state = cb, state
    def before_fit(self, learn): self.cb.load_state_dict(self.state)


def test_a_longer_fit_takes_the_state_and_other_batches_do_not():
    take = Take(ParamScheduler(flat_cos(.1)))
    learner().fit(2, lr=.3, cbs=[take.cb, take])
    longer, learn = ParamScheduler(flat_cos(.1)), learner()
    learn.fit(4, cbs=[longer, Give(longer, take.states[0])])
    assert learn.opt.param_groups[0]['lr'] == .3 # What was there before the interrupted fit
    with pytest.raises(ValueError, match='other batches an epoch'):
        learner(dls=data(24)).fit(2, cbs=[longer, Give(longer, take.states[0])])


# PyTorch's schedulers

def rates(cbs, epochs=3, **kwargs):
    learn = learner(**kwargs)
    learn.fit(epochs, cbs=cbs)
    return learn[Recorder].lrs, learn


@pytest.mark.parametrize('make, unit', [
    (partial(lr_scheduler.StepLR, step_size=1), 'epoch'), (partial(lr_scheduler.ExponentialLR, gamma=.5), 'batch'),
    (partial(lr_scheduler.OneCycleLR, max_lr=.5, total_steps=16), 'batch'),
    (partial(lr_scheduler.MultiStepLR, milestones=[1, 2]), 'epoch'),
    (partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2), 'batch'),
    (lambda opt: lr_scheduler.SequentialLR(opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, .9)],
                                           milestones=[3]), 'batch')])
def test_a_loop_by_hand_has_the_same_rates(make, unit):
    for opt in partial(optim.SGD, momentum=.9), optim.Adam:
        ours, learn = rates(TorchScheduler(make, unit), opt=opt)
        by_hand = opt([nn.Parameter(torch.zeros(1))], lr=.1)
        scheduler, theirs = make(by_hand), []
        for i in range(15):
            theirs.append(float(by_hand.param_groups[0]['lr']))
            by_hand.step()
            if unit == 'batch' or i % 5 == 4: scheduler.step()
        assert ours == theirs
        fresh = opt([nn.Parameter(torch.zeros(1))], lr=.1).param_groups[0] | dict(made_lr=.1)
        group = learn.opt.param_groups[0] # In which PyTorch leaves names of its own, such as initial_lr
        assert {k: group[k] for k in fresh if k != 'params'} == {k: v for k, v in fresh.items() if k != 'params'}


@pytest.mark.parametrize('window', [1, 2, 5])
def test_a_batch_is_a_step_of_the_optimizer(window, recwarn):
    "With accumulation, and a last window that is not full"
    ours, _ = rates([TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=.5), 'batch'),
                     GradientAccumulation(window)], epochs=1)
    assert ours == [.1 * .5**(i // window) for i in range(5)]
    assert not any('lr_scheduler.step' in str(w.message) for w in recwarn)


def test_a_plateau():
    class Made(Callback):
        order = 50
        def after_epoch(self, learn): learn.row['made'] = [3., 2., 2., 2., 1.][learn.epoch]
    plateau = partial(lr_scheduler.ReduceLROnPlateau, factor=.1, patience=0)
    ours, learn = rates([TorchScheduler(plateau, monitor='made'), Made()], epochs=5)
    assert ours[::5] == pytest.approx([.1, .1, .1, .01, .001])
    assert learn.opt.param_groups[0]['lr'] == .1
    with pytest.raises(ValueError, match="'mdae', only .'train_loss'"): rates(TorchScheduler(plateau, monitor='mdae'))
    with pytest.raises(ValueError, match='needs monitor'): rates(TorchScheduler(plateau))


def test_torch_schedulers_refuse():
    step = partial(lr_scheduler.StepLR, step_size=1)
    with pytest.raises(ValueError, match='and no other'): rates(TorchScheduler(step, monitor='valid_loss'))
    with pytest.raises(ValueError, match="sets one of"): rates([TorchScheduler(step), ParamScheduler(flat_cos(.1))])
    rates([TorchScheduler(step), ParamScheduler({'weight_decay': sched_lin(0, .1)})])
    with pytest.raises(ValueError, match="unit is 'epoch'"): TorchScheduler(step, unit='step')
    with pytest.raises(ValueError, match="'epoch' with a monitor"): TorchScheduler(step, 'batch', 'valid_loss')
    with pytest.raises(ValueError, match='keep one of the two'): rates([TorchScheduler(step), TorchScheduler(step)])


@pytest.mark.parametrize('make, monitor', [
    (partial(lr_scheduler.ExponentialLR, gamma=.5), None),
    (partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.), 'valid_loss')])
def test_a_torch_scheduler_goes_on(make, monitor):
    "In a fit of another Learner, from the state after an epoch"
    def scheduler(): return TorchScheduler(make, monitor=monitor)
    first = scheduler()
    keep = Take(first)
    whole, _ = rates([first, keep], 4)
    again, learn = scheduler(), learner()
    class Resumed(Give):
        def before_fit(self, learn):
            super().before_fit(learn)
            learn.opt.param_groups[0]['lr'] = keep.states[1]['now']['_last_lr'][0]
    learn.fit(4, cbs=[again, Resumed(again, keep.states[1])], start=(2, 0))
    assert learn[Recorder].lrs == whole[10:]
    assert learn.opt.param_groups[0]['lr'] == .1


def test_a_torch_scheduler_with_other_settings():
    one, other = (TorchScheduler(partial(lr_scheduler.StepLR, step_size=n)) for n in (1, 2))
    for cb in one, other: rates(cb)
    with pytest.raises(ValueError, match='StepLR has other settings'): other.load_state_dict(one.state_dict())


def test_a_rate_in_a_tensor_comes_back():
    _, learn = rates(TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=.5)),
                     opt=lambda p, lr: optim.Adam(p, lr=torch.tensor(lr)))
    assert float(learn.opt.param_groups[0]['lr']) == pytest.approx(.1)


def test_the_state_of_a_loop_that_has_not_begun():
    learn = learner(cbs=[TorchScheduler(partial(lr_scheduler.StepLR, step_size=1))])
    learn.load_state_dict(learn.state_dict())
    learn.fit(1)
    learn.load_state_dict(learn.state_dict())


@pytest.mark.parametrize('make', [partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1.),
                                  partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=9)])
def test_the_next_fit_begins_at_its_own_rate(make):
    "PyTorch leaves `initial_lr` in the groups, and would begin there again"
    learn = learner()
    learn.fit(1, cbs=TorchScheduler(make))
    learn.fit(1, lr=.5, cbs=TorchScheduler(make))
    assert learn[Recorder].lrs[-1] == .5 and learn.opt.param_groups[0]['lr'] == .5
