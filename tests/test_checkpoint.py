"""Checkpoints and resume: what is kept, refused and told. The kills are in test_resume.py."""
import errno
import math
import os
import random
import stat
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from dlfound import checkpoint, packed
from dlfound.checkpoint import Checkpoint, resume
from dlfound.learner import (Callback, DataLoaders, GradientAccumulation, Learner, Metric, Recorder, ShortEpoch,
                             TrainingLoop)
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset, accuracy
from dlfound.packed import save_packed
from dlfound.schedule import ParamScheduler, flat_cos, one_cycle
from dlfound.search import EarlyStopping, lr_find
from fits import Rows, Stop, data, drawn, learner, messages, odd_places, same, state

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


def interrupted(folder, learn, cbs=(), epochs=2, stop=(1, 2), unit='batch', **kwargs):
    "A fit that stops, and the callbacks to resume it with"
    cbs = [*cbs, Checkpoint(folder, unit=unit, **kwargs), Stop(*stop)]
    with pytest.raises(RuntimeError, match='stop'): learn.fit(epochs, cbs=cbs)
    return cbs


def goes_on(made, folder, cbs=(), stop=(1, 2)):
    "A fit of two epochs that nothing disturbs, and one that `resume` finishes; Learners by `made()`"
    whole, broken, again = made(), made(), made()
    torch.manual_seed(4)
    whole.fit(2, cbs=cbs)
    torch.manual_seed(4)
    resume(again, folder, interrupted(folder, broken, cbs, stop=stop))
    assert same(state(whole), state(again)) and whole[Recorder].losses == again[Recorder].losses
    return whole, again


@pytest.mark.parametrize('bad', [
    dict(every=0), dict(every=True), dict(every='batch'), dict(keep=0), dict(unit='step'), dict(mode='up')])
def test_checkpoint_refuses(bad, tmp_path):
    with pytest.raises(ValueError): Checkpoint(tmp_path, **bad)


def test_two_checkpoints_in_one_folder(tmp_path):
    with pytest.raises(ValueError, match='folder of its own'):
        learner().fit(1, cbs=[Checkpoint(tmp_path), Checkpoint(tmp_path)])
    learner().fit(1, cbs=[Checkpoint(tmp_path / 'a'), Checkpoint(tmp_path / 'b')])
    assert len(checkpoint._found(tmp_path / 'a')) == len(checkpoint._found(tmp_path / 'b')) == 1


def test_sorted_by_number(tmp_path):
    places = (0, 9999), (0, 10000), (999, 1), (1000, 0)
    names = [f'fit{f:03}_epoch{e:04}_done.safetensors' for f, e in places]
    for name in reversed(names): (tmp_path / name).touch()
    (tmp_path / 'fitness.safetensors').touch()
    assert [p.name for p in checkpoint._found(tmp_path)] == names
    keep = Checkpoint(tmp_path)
    for name in names: save_packed(tmp_path / name, {})
    learner().fit(1, cbs=keep)
    assert keep.best == tmp_path / 'fit1001_epoch0000_done.safetensors'


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
    assert 'to go on in epoch 1 of 2, after 2 batches' in said and 'goes on with its state' not in said


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
    with pytest.raises(ValueError, match='parameters in its groups'): resume(untied, tmp_path, cbs)


def test_keep_and_best(tmp_path):
    values = [5, 1, 4, 3, 3, 3]
    learner().fit(6, cbs=[Rows(values), Checkpoint(tmp_path, keep=2, monitor='made', mode='min')])
    assert [p.name[7:16] for p in checkpoint._found(tmp_path)] == ['epoch0001', 'epoch0004', 'epoch0005']
    learner().fit(3, cbs=[Rows(values), Checkpoint(tmp_path, keep=1, monitor='made', mode='max')])
    first = [f'fit000_epoch{i:04}' for i in (1, 4, 5)]
    assert [p.name[:16] for p in checkpoint._found(tmp_path)] == [*first, 'fit001_epoch0000', 'fit001_epoch0002']
    with pytest.raises(ValueError, match="no result 'other'"):
        learner().fit(1, cbs=Checkpoint(tmp_path, monitor='other', mode='max'))


def test_every(tmp_path):
    learner().fit(5, cbs=Checkpoint(tmp_path, every=2, keep=9, monitor=None))
    assert [p.name[7:16] for p in checkpoint._found(tmp_path)] == ['epoch0001', 'epoch0003', 'epoch0004']


def test_validate_writes_nothing(tmp_path):
    learn = learner(cbs=Checkpoint(tmp_path, unit='batch'))
    learn.validate()
    assert not checkpoint._found(tmp_path)


def test_leftovers(tmp_path):
    "What a process left that died while it wrote goes, unless it might still write"
    old, young = (tmp_path / f'.fit000_epoch0000_done.safetensors.{pid}.part' for pid in (1, 2))
    for part in old, young: part.write_bytes(b'x')
    os.utime(old, (time.time() - 700,) * 2)
    learner().fit(1, cbs=Checkpoint(tmp_path))
    assert [p.name for p in tmp_path.glob('.*')] == [young.name]


def test_a_full_disk(tmp_path, monkeypatch):
    def fails(*args): raise OSError('no space left')
    monkeypatch.setattr(packed, 'save_file', fails)
    learn = learner()
    with pytest.raises(OSError): learn.fit(1, cbs=Checkpoint(tmp_path))
    assert not list(tmp_path.iterdir())


def damaged(path, how):
    raw = path.read_bytes()
    if how == 'short': raw = raw[:-50]
    if how == 'empty': raw = b''
    if how == 'bit': raw = raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]
    if how == 'text': raw = raw.replace(b'n_epochs": 2', b'n_epochs": 9')
    if how == 'noise': raw = os.urandom(len(raw))
    assert raw != path.read_bytes()
    path.write_bytes(raw)


@pytest.mark.parametrize('how', ['short', 'empty', 'bit', 'text', 'noise'])
def test_damage(tmp_path, how, recwarn):
    cbs = interrupted(tmp_path, learner())
    *_, before, newest = checkpoint._found(tmp_path)
    damaged(newest, how)
    fresh, weights = learner(), state(learner())
    with pytest.raises(ValueError, match='no whole file|damaged or edited'): resume(fresh, newest, cbs)
    assert same(state(fresh), weights)
    resume(fresh, tmp_path, cbs)
    said = messages(recwarn)
    assert f'left out: {newest.name}' in said and f'{before.name}: the fit is to go on' in said


def test_refusals(tmp_path, monkeypatch):
    "What belongs to another fit is refused before anything is changed"
    learn = learner()
    cbs = interrupted(tmp_path / 'a', learn, [ParamScheduler(one_cycle(.1))])
    last = checkpoint._found(tmp_path / 'a')[-1]
    def refused(match, learn=None, cbs=cbs, path=last):
        learn = learn or learner()
        weights, rng, losses = state(learn), drawn(learn), learn[Recorder].losses
        with pytest.raises(ValueError, match=match): resume(learn, path, cbs)
        assert same(state(learn), weights) and learn[Recorder].losses == losses == [] and not learn.opt.state
        assert str(drawn(learn)) == str(rng)
    wide = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(.2), nn.Linear(9, 3))
    refused(r'model.0.weight is \(9, 4, .* here and \(8, 4', learner(model=wide))
    refused('float64', learner(model=learner().model.double()))
    refused('the optimizer: Adam, and SGD in the interrupted fit', learner(optim.Adam))
    refused(r'batches in dls.train and dls.valid: \[10, 2\], and \[5, 2\]', learner(dls=data(80)))
    refused(r'random generators: \d, and \d in', learner(generators=[random.Random(1)]))
    refused('had ParamScheduler', cbs=cbs[1:])
    refused('other schedules', cbs=[ParamScheduler(one_cycle(.2)), *cbs[1:]])
    def halves(params, lr):
        first, *rest = params
        return optim.SGD([dict(params=[first]), dict(params=rest)], lr)
    refused(r'parameters in its groups: \[1, 5\], and \[6\]', learner(halves))
    def error_rate(pred, target): return 1 - accuracy(pred, target)
    refused('Metrics: .*error_rate.*, and .*accuracy', learner(metrics=error_rate))
    accumulating = interrupted(tmp_path / 'd', learner(), [GradientAccumulation(2)])
    three = [GradientAccumulation(3), *accumulating[1:]]
    refused('GradientAccumulation: .*3.*, and .*2', cbs=three, path=tmp_path / 'd')
    learn.save(tmp_path / 'w.safetensors')
    refused('is no checkpoint', path=tmp_path / 'w.safetensors')
    monkeypatch.setattr(packed, '_FORMAT', '9')
    save_packed(tmp_path / 'future', {})
    monkeypatch.undo()
    refused('format 9', path=tmp_path / 'future')
    with pytest.raises(FileNotFoundError): resume(learner(), tmp_path / 'b')
    (tmp_path / 'c').mkdir()
    with pytest.raises(FileNotFoundError, match='Checkpoint'): resume(learner(), tmp_path / 'c')


def test_the_file_is_for_others_too(tmp_path):
    "Any reader of safetensors finds the weights under their names"
    from safetensors.torch import load_file
    learn = learner()
    learn.fit(1, cbs=Checkpoint(tmp_path))
    read = load_file(checkpoint._found(tmp_path)[-1])
    for name, p in learn.model.named_parameters(): assert torch.equal(read[f'state.module.model.{name}'], p)


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
    with pytest.raises(ValueError, match='only 2 batches, and 3 were done'): resume(short, tmp_path, cbs)


def test_freed(tmp_path):
    learn = learner()
    cbs = interrupted(tmp_path, learn)
    resume(learn, tmp_path, cbs)
    gone = weakref.ref(learn)
    del learn
    assert gone() is None


@pytest.mark.parametrize('dls, opt, dtype', odd_places)
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


def test_a_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = Checkpoint('here')
    monkeypatch.chdir('/')
    learner().fit(1, cbs=keep)
    assert len(list((tmp_path / 'here').iterdir())) == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='two Checkpoints'):
        learner().fit(1, cbs=[Checkpoint('here'), Checkpoint(tmp_path / 'here')])


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


# the same fit, or another

def plain(n=20, bs=8, shift=0., seed=1, **kwargs):
    "No generator but PyTorch's own"
    torch.manual_seed(seed)
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)) + shift
    return learner(dls=DataLoaders(DataLoader(Dataset(x, x.argmax(1) % 3), bs, shuffle=True)), metrics=(), **kwargs)


@pytest.mark.parametrize('unit', ['batch', 'epoch'])
@pytest.mark.parametrize('changed, match', [
    (dict(n=24), 'batch 1 of the pass has other values'), (dict(bs=7), r'shapes \[\[7, 4\], \[7\]\] and had'),
    (dict(shift=1.), 'batch 1 of the pass has other values')])
def test_other_data(changed, match, unit, tmp_path):
    "With the same number of batches"
    torch.manual_seed(4)
    cbs = interrupted(tmp_path, plain(), unit=unit, stop=(1, 1))
    other = plain(**changed)
    weights, numbers = state(other), drawn(other)
    with pytest.raises(ValueError, match=match): resume(other, tmp_path, cbs)
    assert same(state(other), weights) and not other.opt.state and torch.equal(drawn(other)[2], numbers[2])
    resume(other, tmp_path, cbs, same_data=False)
    assert len(other[Recorder].losses) == 6


def test_the_last_batch_is_looked_at(tmp_path):
    "Where the first is the same"
    class Batches:
        def __init__(self, change): self.change = change
        def __len__(self): return 5
        def __iter__(self): return ((x, (y + self.change * (i == 2)) % 3) for i, (x, y) in enumerate(made))
    made = list(data().train)
    cbs = interrupted(tmp_path, learner(dls=DataLoaders(Batches(0)), metrics=()), stop=(1, 3))
    with pytest.raises(ValueError, match='batch 3 of the pass has other values'):
        resume(learner(dls=DataLoaders(Batches(1)), metrics=()), tmp_path, cbs)


def test_batches_that_no_file_can_hold(tmp_path):
    "Nobody can tell whether they are the same, so they are taken for it"
    class Odd:
        def __init__(self, x): self.x = x
        def __len__(self): return len(self.x)
        def to(self, device, non_blocking=False): return self
    batches = [(Odd(torch.randn(8, 4)), torch.arange(8) % 3) for _ in range(5)]
    class Model(nn.Linear):
        def forward(self, odd): return super().forward(odd.x)
    def made():
        torch.manual_seed(0)
        return learner(dls=DataLoaders(batches), model=Model(4, 3), metrics=())
    goes_on(made, tmp_path)


def test_a_batch_that_a_callback_changes_in_place(tmp_path):
    "What came from the loader counts"
    class Doubles(Callback):
        def before_batch(self, learn): learn.batch[0].mul_(2)
    whole, again, broken = learner(), learner(), learner()
    torch.manual_seed(4)
    whole.fit(2, cbs=Doubles())
    torch.manual_seed(4)
    cbs = interrupted(tmp_path, broken, [Doubles()])
    resume(again, tmp_path, cbs)
    assert same(state(whole), state(again))


class Counting(torch.utils.data.Sampler):
    "An order of its own for each epoch, from a count and no generator"
    def __init__(self, n, name): self.n, self.name = n, name; setattr(self, name, 0)
    def __len__(self): return self.n
    def __iter__(self):
        setattr(self, self.name, getattr(self, self.name) + 1)
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(getattr(self, self.name))).tolist())


@pytest.mark.parametrize('stop', [(1, 2), (2, 0)])
def test_a_sampler_that_counts_epochs(stop, tmp_path):
    "Kept where it calls the count `epoch`, as PyTorch's distributed one does, and refused where nobody can know"
    def made(name):
        loaders = data()
        loaders.train = DataLoader(loaders.train.dataset, 8, sampler=Counting(40, name))
        return learner(dls=loaders)
    whole, again, broken, other = made('epoch'), made('epoch'), made('epoch'), made('turn')
    torch.manual_seed(4)
    whole.fit(3)
    torch.manual_seed(4)
    cbs = interrupted(tmp_path / 'a', broken, epochs=3, stop=stop)
    resume(again, tmp_path / 'a', cbs)
    assert same(state(whole), state(again)) and whole[Recorder].losses == again[Recorder].losses
    cbs = interrupted(tmp_path / 'b', other, epochs=3, stop=stop)
    with pytest.raises(ValueError, match='batch 1 of the pass has other values; .*order'):
        resume(made('turn'), tmp_path / 'b', cbs)


def test_a_hidden_state_goes_on(tmp_path):
    "In plain attributes of the model: tensors, structures of them, counts"
    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.out, self.h, self.n = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3), None, 0
        def forward(self, x):
            out, (h, c) = self.rnn(x[:, None], self.h if self.h and self.h[0].shape[1] == len(x) else None)
            self.h, self.n = (h.detach(), c.detach()), self.n + 1
            return self.out(out[:, 0]) / (1 + .1 * self.n)
    def made(): return learner(dls=DataLoaders(data().train), model=Carrying(), metrics=())
    whole, again = goes_on(made, tmp_path)
    assert again.model.n == whole.model.n == 10


def test_a_second_optimizer_goes_on(tmp_path):
    class Two(Learner):
        def __init__(self, dls, m):
            super().__init__(dls, m, F.cross_entropy, progress=False)
            self.opt, self.opt2 = optim.Adam(m[0].parameters()), optim.Adam(m[1].parameters())
        def step(self): super().step(); self.opt2.step()
        def zero_grad(self): super().zero_grad(); self.opt2.zero_grad()
    def made():
        torch.manual_seed(0)
        return Two(data(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    goes_on(made, tmp_path)


@pytest.mark.parametrize('stop', [(1, 2), (1, 0)])
def test_more_epochs(stop, tmp_path, recwarn):
    "Without a schedule the fit is that of more epochs; one that is over can go on too"
    longer, broken, first, again, over = (learner() for _ in range(5))
    torch.manual_seed(4)
    longer.fit(3)
    torch.manual_seed(4)
    cbs = interrupted(tmp_path / 'a', broken, stop=stop)
    resume(again, tmp_path / 'a', cbs, n_epochs=3)
    assert same(state(longer), state(again)) and 'of 3, ' in messages(recwarn)
    assert 'epochs planned: 2' in messages(recwarn)
    torch.manual_seed(4)
    first.fit(2, cbs=Checkpoint(tmp_path / 'b'))
    resume(over, tmp_path / 'b', n_epochs=3)
    assert same(state(longer), state(over)) and len(over[Recorder].rows) == 3


def test_schedules_run_over_more_epochs(tmp_path, recwarn):
    cbs = interrupted(tmp_path, learner(), [ParamScheduler(flat_cos(.1))], stop=(1, 0))
    again = learner()
    resume(again, tmp_path, cbs, n_epochs=4)
    assert len(again[Recorder].lrs) == 20 and again[Recorder].lrs[-1] < 1e-5
    assert 'schedules run over 4' in messages(recwarn)


def test_other_patience(tmp_path, recwarn):
    cbs = interrupted(tmp_path, learner(), [EarlyStopping(patience=2)])
    resume(learner(), tmp_path, [EarlyStopping(patience=5), *cbs[1:]])
    assert "'patience': 5" in messages(recwarn) and "'patience': 2" in messages(recwarn)
    with pytest.raises(ValueError, match='EarlyStopping'):
        resume(learner(), tmp_path, [EarlyStopping(patience=5, min_delta=.1), *cbs[1:]])


def test_a_new_callback_is_told(tmp_path, recwarn):
    cbs = interrupted(tmp_path, learner())
    resume(learner(), tmp_path, [GradientAccumulation(2), *cbs])
    assert 'the interrupted fit had no GradientAccumulation' in messages(recwarn)


# the folder

def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path)), monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    learner().fit(1, cbs=Checkpoint('~/runs/a'))
    assert [p.name for p in (tmp_path / 'runs/a').iterdir()] == ['fit000_epoch0000_done.safetensors']
    assert not (tmp_path / '~').exists()
    resume(learner(), '~/runs/a')


def test_no_fsync_of_folders(tmp_path, monkeypatch):
    "As on SMB, VirtualBox or FUSE mounts"
    real = os.fsync
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode): raise OSError(errno.EINVAL, 'Invalid argument')
        real(handle)
    monkeypatch.setattr(os, 'fsync', fsync)
    learner().fit(2, cbs=Checkpoint(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_usual_permissions(tmp_path):
    learner().fit(1, cbs=Checkpoint(tmp_path / 'runs'))
    (tmp_path / 'usual').touch()
    made, = (tmp_path / 'runs').iterdir()
    assert made.stat().st_mode == (tmp_path / 'usual').stat().st_mode


def test_mode_is_needed_for_a_metric(tmp_path):
    with pytest.raises(ValueError, match="'accuracy'"): Checkpoint(tmp_path, monitor='accuracy')
    keep = Checkpoint(tmp_path, monitor='made', mode='max', keep=1)
    learn = learner(cbs=[Rows([1., 3., 2.]), keep])
    learn.fit(3)
    assert keep.best.name == 'fit000_epoch0001_done.safetensors' and len(list(tmp_path.iterdir())) == 2


def test_load_the_best(tmp_path):
    "Weights of a checkpoint, tied ones and those of a loss too; those of another model are refused"
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, pred, target): return F.cross_entropy(pred * self.scale, target)
    def made(loss=None, n=4):
        learn = learner(optim.Adam, model=nn.Sequential(nn.Linear(4, n), nn.Linear(n, 4), nn.Linear(4, 3)))
        if n == 4: learn.model[1].weight = learn.model[0].weight
        if loss: learn.loss_func = loss
        return learn
    for loss in None, Scaled():
        keep = Checkpoint(tmp_path / str(loss))
        learn, other = made(loss), made(Scaled() if loss else None)
        learn.fit(1, cbs=keep)
        other.load(keep.best)
        assert same(state(learn), state(other)) and other.model[1].weight is other.model[0].weight
    wide = made(n=5)
    before = state(wide)
    with pytest.raises(ValueError, match='of this model'): wide.load(keep.best)
    assert same(state(wide), before)
    assert Checkpoint(tmp_path).best is None


# what readers found

def mixed(samples):
    "Two random mixtures: of inputs and of targets"
    x, y = torch.stack([a for a, _ in samples]), F.one_hot(torch.stack([b for _, b in samples]), 3).float()
    p, lam = torch.randperm(len(x)), torch.rand(())
    return lam * x + (1 - lam) * x[p], lam * y + (1 - lam) * y[p]


@pytest.mark.parametrize('kind', [DataLoader, torch.utils.data.DataLoader])
@pytest.mark.parametrize('stop', [(1, 1), (1, 2), (1, 4)])
def test_random_targets(kind, stop, tmp_path):
    "Batches that are made with random numbers, while dropout draws others between them, are made again as they were"
    def made():
        loaders = data()
        loaders.train = kind(loaders.train.dataset, 8, shuffle=True, collate_fn=mixed)
        return learner(dls=loaders, metrics=())
    goes_on(made, tmp_path, stop=stop)


def test_a_callback_that_changes_the_loader(tmp_path):
    "Lazily, as ShortEpoch does: the same bits. If it draws the order itself, it is refused"
    class Doubled:
        def __init__(self, dl): self.dl = dl
        def __len__(self): return len(self.dl)
        def __iter__(self): return ((2 * x, y) for x, y in self.dl)
    class Lazy(Callback):
        def before_train(self, learn): learn.dl = Doubled(learn.dl)
    class Eager(Callback):
        def before_train(self, learn): learn.dl = list(Doubled(learn.dl))
    whole, broken, again, other = (learner() for _ in range(4))
    torch.manual_seed(4)
    whole.fit(2, cbs=Lazy())
    torch.manual_seed(4)
    cbs = interrupted(tmp_path / 'a', broken, [Lazy()])
    resume(again, tmp_path / 'a', cbs)
    assert same(state(whole), state(again))
    cbs = interrupted(tmp_path / 'b', other, [Eager()])
    with pytest.raises(ValueError, match='batch 2 of the pass has other values'):
        resume(learner(), tmp_path / 'b', cbs)


def test_parameters_among_plain_attributes(tmp_path):
    "They stay the parameters that they are, and settings keep their class"
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self._h, self.size = nn.Linear(4, 3), None, torch.Size([4, 3])
            self.ws, self.matrix = [self.l.weight], torch.eye(2).to_sparse()
        def forward(self, x):
            out = x @ self.ws[0].T + self.l.bias + (0 if self._h is None else self._h)
            self._h = out.detach().mean()
            return out
    def made():
        torch.manual_seed(0)
        return learner(model=Odd(), metrics=())
    _, again = goes_on(made, tmp_path)
    assert again.model.ws[0] is again.model.l.weight and type(again.model.size) is torch.Size


@pytest.mark.parametrize('what, change', [
    ('layers', dict(model=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(.2),
                                        nn.Linear(8, 3)))), ('the loss', {})])
def test_other_layers_or_loss(what, change, tmp_path):
    cbs = interrupted(tmp_path, learner())
    other = learner(**change)
    if not change: other.loss_func = nn.MultiMarginLoss()
    with pytest.raises(ValueError, match=f'{what}: '): resume(other, tmp_path, cbs)


def test_optimizers_in_a_list(tmp_path):
    class Three(Learner):
        def __init__(self, *args):
            super().__init__(*args, progress=False)
            self.opts = [optim.Adam(p) for p in ([self.model[0].weight], [self.model[0].bias])]
        def step(self):
            super().step()
            for opt in self.opts: opt.step()
    def made():
        torch.manual_seed(0)
        return Three(data(), nn.Sequential(nn.Linear(4, 3)), F.cross_entropy)
    goes_on(made, tmp_path)
    one = Learner(data(), nn.Sequential(nn.Linear(4, 3)), F.cross_entropy, progress=False)
    with pytest.raises(ValueError, match='parts with a state'): resume(one, tmp_path)


def test_an_abandoned_branch_is_not_the_newest(tmp_path):
    "After going back to an earlier file, the fit that went on from there has the newest files"
    learner().fit(3, cbs=Checkpoint(tmp_path, keep=9))
    first = checkpoint._found(tmp_path)[0]
    back = [Checkpoint(tmp_path, unit='batch'), Stop(1, 3)]
    with pytest.raises(RuntimeError, match='stop'): resume(learner(), first, back)
    path, saved = checkpoint._newest(tmp_path)
    assert (saved['epoch'], saved['batch']) == (1, 3) and path.name.startswith('fit001')


def test_a_loop_with_validation_and_no_recorder(tmp_path):
    "There is no result to judge by, and there are files"
    loop = TrainingLoop(data(), nn.Linear(4, 3), F.cross_entropy, optim.SGD, .1)
    loop.fit(2, cbs=(keep := Checkpoint(tmp_path)))
    assert len(list(tmp_path.iterdir())) == 2 and keep.best is None


def names(folder): return [p.name.split('.')[0] for p in checkpoint._found(folder)]


def test_files_in_another_folder_are_left_alone(tmp_path):
    "Though they have the names of those that the interrupted fit wrote"
    a, b = tmp_path / 'a', tmp_path / 'b'
    learner().fit(1, cbs=Checkpoint(b))
    interrupted(a, learner(), unit='epoch', keep=1, monitor=None)
    assert names(a) == names(b) == ['fit000_epoch0000_done']
    resume(learner(), a, [Checkpoint(b, keep=1, monitor=None), Stop(9, 9)])
    assert names(a) == ['fit000_epoch0000_done'] and names(b) == ['fit000_epoch0000_done', 'fit001_epoch0001_done']


def test_a_folder_that_was_moved_and_a_second_checkpoint(tmp_path):
    "Both have their own files still, and their best"
    def cbs(first, *stop):
        other = Checkpoint(tmp_path / 'b', keep=1, monitor='made', mode='min')
        return [Rows([1., 2., 3.]), Checkpoint(tmp_path / first, 1, 'batch', 1, 'made', 'min'), other, Stop(*stop)]
    with pytest.raises(RuntimeError, match='stop'): learner().fit(3, cbs=cbs('a', 1, 2))
    (tmp_path / 'a').rename(tmp_path / 'moved')
    again = cbs('moved', 9, 9)
    resume(learner(), tmp_path / 'moved', again)
    assert names(tmp_path / 'moved') == ['fit000_epoch0000_done', 'fit001_epoch0002_done']
    assert names(tmp_path / 'b') == ['fit000_epoch0000_done', 'fit001_epoch0002_done']
    assert all(keep.best.name == 'fit000_epoch0000_done.safetensors' for keep in again[1:3])


@pytest.mark.parametrize('stop', [(1, 0), (1, 2), (2, 2)])
def test_layers_that_are_unfrozen_in_the_middle(stop, tmp_path):
    "What was being trained is trained again"
    class Unfreeze(Callback):
        def set(self, learn, on): learn.model[0].requires_grad_(on)
        def before_fit(self, learn): self.set(learn, False)
        def before_epoch(self, learn):
            if learn.epoch == 1: self.set(learn, True)
    whole, broken, again = (learner(optim.Adam) for _ in range(3))
    torch.manual_seed(4)
    whole.fit(3, cbs=Unfreeze())
    torch.manual_seed(4)
    resume(again, tmp_path, interrupted(tmp_path, broken, [Unfreeze()], 3, stop))
    assert same(state(whole), state(again)) and whole[Recorder].losses == again[Recorder].losses


def test_refused_before_an_inner_object_is_changed(tmp_path):
    "A callback that loads into a module of its own"
    class Averages(Callback):
        def __init__(self, value): self.m = nn.Linear(4, 3); nn.init.constant_(self.m.weight, value)
        def state_dict(self): return dict(self.m.state_dict())
        def load_state_dict(self, saved): self.m.load_state_dict(saved)
    interrupted(tmp_path, plain(), [Averages(1.)], stop=(1, 1))
    mine = Averages(2.)
    with pytest.raises(ValueError, match='other values'):
        resume(plain(shift=1.), tmp_path, [mine, Checkpoint(tmp_path), Stop(9, 9)])
    assert (mine.m.weight == 2).all()


def test_one_checkpoint_for_two_fits(tmp_path):
    keep = Checkpoint(tmp_path)
    learner(dls=DataLoaders(data().train), metrics=()).fit(1, cbs=keep)
    assert keep.best is None
    learner().fit(1, cbs=keep)
    assert keep.best.name == 'fit001_epoch0000_done.safetensors'


@pytest.mark.parametrize('n', [0, -1, '3', True])
def test_no_epochs(n, tmp_path):
    learner().fit(1, cbs=Checkpoint(tmp_path))
    with pytest.raises(ValueError, match='at least 1'): resume(learner(), tmp_path, n_epochs=n)
