"""The sweep, monitors and early stopping, where a page has no room."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from dlfound.learner import (Callback, CancelEpoch, CancelFit, DataLoaders, GradientAccumulation, GradientClip, Learner,
                             Recorder, TerminateOnNaN)
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset, accuracy
from dlfound.schedule import ParamScheduler, TorchScheduler, flat_cos
from dlfound.search import EarlyStopping, Monitor, lr_find
from dlfound.state import map_tensors, module_state
from fits import Rows, Stop, data, drawn, learner, odd_places, same, state

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


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
    class Writes(Callback):
        "Stands for whatever monitors a result"
        monitor = 'valid_loss'
        def before_fit(self, learn): (tmp_path / 'c').mkdir(exist_ok=True)
    cbs = [EarlyStopping(), Writes(), scheduler, GradientAccumulation(2), GradientClip(1.)]
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
    with pytest.raises(ValueError, match='n > 1'): lr_find(learner(), n=1)
    bad = learner()
    bad.model[0].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match='not finite'): lr_find(bad)
    with pytest.raises(ValueError, match='dls.train is empty'): lr_find(learner(dls=DataLoaders([], None)))
    used_up = DataLoaders(iter(list(data().train)))
    with pytest.raises(ValueError, match='5 of 100 batches'): lr_find(learner(dls=used_up))
    class Ends(Callback):
        def after_batch(self, learn): raise CancelFit
    with pytest.raises(ValueError, match='1 of 100 batches: the loader or a callback'): lr_find(learner(cbs=Ends()))
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


@pytest.mark.parametrize('bad, match', [(dict(start=0), '0 < start'), (dict(start=1., end=.1), 'start < end'),
                                        (dict(n=1), 'n > 1')])
def test_sweeps_refuse(bad, match):
    with pytest.raises(ValueError, match=match): lr_find(learner(), **bad)


def test_a_sweep_puts_attributes_of_callbacks_back():
    class Count(Callback):
        n = 0
        def after_batch(self, learn): self.n += 1
    learn = learner(cbs=(count := Count()))
    lr_find(learn, n=8)
    assert count.n == 0 and list(learn.cbs)[0] is count


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
        learner().fit(1, cbs=EarlyStopping('acuracy', 'max'))
    without = Learner(DataLoaders(data().train), nn.Linear(4, 3), F.cross_entropy, cbs=EarlyStopping(), progress=False)
    with pytest.raises(ValueError, match='valid_loss.*train_loss'): without.fit(1)
    for bad in dict(mode='up'), dict(patience=0), dict(min_delta=-1), dict(min_delta=math.nan):
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


def test_a_misspelt_result_is_told_at_once():
    class Early(Callback):
        def before_batch(self, learn): raise CancelFit
    with pytest.warns(UserWarning, match="no result 'acuracy', only train_loss, valid_loss, accuracy"):
        learner().fit(1, cbs=[EarlyStopping('acuracy', 'max'), Early()])
    class Adds(Callback):
        order = 50
        def after_epoch(self, learn): learn.row['mine'] = 1.
    learner().fit(1, cbs=[EarlyStopping('mine', 'min'), Adds()])


def test_a_result_that_is_never_a_number():
    with pytest.warns(UserWarning, match='made was no number; the fit ends after epoch 1'):
        learner(cbs=[Rows([math.nan] * 5), EarlyStopping('made', 'min', patience=2)]).fit(5)


# what a model, a loss and a loop may carry besides

def trained_alike(make, **kwargs):
    "Is a fit after a sweep, from the same random numbers, the fit without one? Twice, for an optimizer in mid-life"
    swept, fresh = make(), make()
    for learn in swept, fresh:
        for seed in 3, 4:
            if learn is swept: lr_find(learn, n=8, **kwargs)
            torch.manual_seed(seed)
            learn.fit(1)
    return same(state(swept), state(fresh)) and swept[Recorder].losses == fresh[Recorder].losses


class Carries(nn.Module):
    "A hidden state that is carried over, as in AWD-LSTM, in several shapes"
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)
        self.h, self.n, self.past, self.mean, self.seen = None, 0, [], dict(x=torch.zeros(())), torch.zeros(())
    def forward(self, x):
        out, h = self.rnn(x[:, None], self.h if self.h is not None and self.h[0].shape[1] == len(x) else None)
        self.h, self.n = tuple(t.detach() for t in h), self.n + 1
        self.past.append(float(x.mean()))
        self.mean['x'] += .1 * sum(self.past)
        self.seen += self.n
        return self.out(out[:, 0]) * (1 + .01 * self.mean['x'] + .001 * self.seen)


class Drifts:
    "A loss that is no module, and keeps a tensor and a list"
    def __init__(self): self.level, self.seen = torch.zeros(()), []
    def __call__(self, pred, target):
        loss = F.cross_entropy(pred, target)
        self.seen.append(1)
        self.level.mul_(.9).add_(.1 * loss.detach())
        return loss * (1 + self.level + .01 * len(self.seen))


class Two(Learner):
    "Two optimizers, as a GAN has, and a second module that no optimizer knows"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.opt, self.opt2 = optim.Adam(self.model[0].parameters()), optim.Adam(self.model[4].parameters())
        self.average = optim.swa_utils.AveragedModel(self.model)
    def step(self):
        super().step()
        self.opt2.step()
        self.average.update_parameters(self.model)
    def zero_grad(self):
        super().zero_grad()
        self.opt2.zero_grad()


def two():
    made = learner()
    return Two(made.dls, made.model, F.cross_entropy, metrics=accuracy, progress=False)


def drifting():
    made = learner()
    return Learner(made.dls, made.model, Drifts(), optim.Adam, .1, progress=False)


def with_average():
    "A callback that holds another model"
    class Average(Callback):
        def before_fit(self, learn):
            if not hasattr(self, 'model'): self.model = optim.swa_utils.AveragedModel(learn.model)
        def after_step(self, learn): self.model.update_parameters(learn.model)
    made = learner(cbs=Average())
    made.fit(1)
    return made


@pytest.mark.parametrize('make', [lambda: learner(optim.Adam, model=Carries()), drifting, two, with_average])
def test_what_is_carried_along_comes_back(make):
    assert trained_alike(make)


def test_the_average_comes_back():
    for make, find in (two, lambda learn: learn.average), (with_average, lambda learn: list(learn.cbs)[0].model):
        learn = make()
        before = map_tensors(torch.Tensor.clone, module_state(find(learn)))
        lr_find(learn, n=8)
        assert same(before, module_state(find(learn))) and int(find(learn).n_averaged) == int(before['n_averaged'])


def test_lists_stay_the_same_lists():
    "What others hold of a callback is still what the callback has"
    class Losses(Callback):
        def __init__(self, values): self.values = values
        def after_loss(self, learn): self.values.append(float(learn.loss.detach()))
    values = [1.]
    learn = learner(cbs=(cb := Losses(values)))
    lr_find(learn, n=8)
    assert values == [1.] and cb.values is values


def test_weights_of_an_rnn_stay_its_own():
    "It keeps a list of its parameters, which must not become a list of copies"
    learn = learner(model=Carries())
    lr_find(learn, n=8)
    own = {id(p) for p in learn.model.rnn.parameters()}
    assert {id(p) for p in learn.model.rnn._flat_weights} == own


class Slots:
    "Has a state and no dict of attributes"
    __slots__ = 'x',
    def load_state_dict(self, saved): self.x = saved


def test_odd_tensors_pass():
    "An expanded one cannot be written to, not even if NaN makes it differ, and a sparse gradient cannot be compared"
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out, self.ones = nn.Embedding(4, 8, sparse=True), nn.Linear(8, 3), torch.ones(1).expand(5)
            self.nans, self.slots = torch.full((1,), math.nan).expand(3), Slots()
            self.sparse = torch.eye(2).to_sparse()
        def forward(self, x): return self.out(self.table(x.argmax(1)))
    assert trained_alike(lambda: learner(model=Embeds()))


@pytest.mark.parametrize('dls, opt, dtype', odd_places)
def test_a_sweep_with_state_in_odd_places(dls, opt, dtype):
    "Generators that no loader has are named; what the optimizer keeps stays exact"
    def made():
        loaders, generators = dls()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
        return learner(opt, dls=loaders, model=model, generators=generators)
    assert trained_alike(made)
    learn = made()
    learn.fit(1)
    lr_find(learn, n=8)
    assert all(s['exact'].dtype == torch.float32 for s in learn.opt.state.values() if s)


def test_a_sweep_leaves_out_whatever_decides():
    class Told(Callback):
        "A user's own, that monitors"
        monitor, called = 'valid_loss', False
        def before_fit(self, learn): Told.called = True
    step = TorchScheduler(lambda opt: pytest.fail('made a scheduler'))
    lr_find(learner(cbs=[Told(), step, EarlyStopping('accuracy', 'max')]), n=8)
    assert not Told.called


def test_groups_keep_their_ratios_in_a_sweep():
    seen = []
    class Look(Callback):
        order = 99
        def before_batch(self, learn): seen.append([g['lr'] for g in learn.opt.param_groups])
    def opt(params, lr):
        params = list(params)
        return optim.SGD([dict(params=params[:2], lr=lr / 10), dict(params=params[2:])], lr=lr)
    sweep = lr_find(learner(opt, cbs=Look()), n=8)
    assert [fast for _, fast in seen] == sweep.lrs and all(slow == pytest.approx(fast / 10) for slow, fast in seen)


# monitors

def test_a_metric_needs_a_direction():
    "A loss has one"
    for bad in 'accuracy', 'auc', 'loss_ratio':
        with pytest.raises(ValueError, match=f"'min' or 'max'.*{bad}"): EarlyStopping(bad)
        with pytest.raises(ValueError, match=f"'min' or 'max'.*{bad}"): Monitor(bad)
    assert EarlyStopping().mode == EarlyStopping('train_loss').mode == 'min'
    stop = EarlyStopping('accuracy', 'max')
    assert (stop.monitor, stop.mode) == ('accuracy', 'max')


def test_the_best_accuracy_is_the_highest():
    learn, stop = learner(optim.Adam), EarlyStopping('accuracy', 'max', patience=2)
    learn.fit(8, cbs=stop)
    accs = [row['accuracy'] for row in learn[Recorder].rows]
    assert stop.best_epoch == accs.index(max(accs)) and learn.validate()['accuracy'] == pytest.approx(max(accs))


def test_patience_may_change():
    "The count goes on, in a callback with another patience"
    first, later = EarlyStopping(patience=2), EarlyStopping(patience=5)
    learner().fit(1, cbs=first)
    later.load_state_dict(first.state_dict())
    assert (later.patience, later.best, later.best_epoch) == (5, first.best, 0)


def test_a_short_sweep_over_noise_suggests_nothing():
    torch.manual_seed(0)
    noise = Dataset(torch.randn(400, 4), torch.randint(3, (400,)))
    for n in 5, 8, 14:
        assert lr_find(learner(dls=DataLoaders(DataLoader(noise, 8))), n=n).suggestion is None


def test_a_sweep_within_a_fit_is_refused():
    class Sweeps(Callback):
        def before_train(self, learn): lr_find(learn)
    with pytest.raises(RuntimeError, match='call lr_find before it'): learner().fit(1, cbs=Sweeps())


def test_schedulers_of_others_have_no_part():
    class Mine(Callback):
        scheds = 'lr',
        def before_batch(self, learn): raise AssertionError
    learn = learner(cbs=Mine())
    assert lr_find(learn, n=8).lrs
