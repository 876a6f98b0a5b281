"The Learner equals a hand-written loop bit for bit, leaves nothing behind however a fit ends, and says what is wrong."
import copy
import gc
import multiprocessing
import os
import subprocess
import sys
import weakref
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dlfound.learner as L
from dlfound.learner import (Callback, CancelBatch, CancelEpoch, CancelFit, DataLoaders, GradientAccumulation, GradientClip, Learner, Metric,
                             Metrics, Progress, Recorder, SanityCheck, SingleBatch, TerminateOnNaN)
from dlfound.minibatch import Dataset, accuracy

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
loss_func = nn.CrossEntropyLoss()


def net(seed=0, *extra): return torch.random.manual_seed(seed) and nn.Sequential(nn.Linear(6, 8), *extra, nn.ReLU(), nn.Linear(8, 3))


def batches(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]


def learner(model=None, train=(8, 8, 5), valid=(4, 2), cbs=(), opt=torch.optim.SGD, lr=.1, **kw):
    dls = DataLoaders(batches(*train), batches(*valid, seed=1) if valid else None)
    return Learner(dls, net() if model is None else model, loss_func, opt, lr, cbs=cbs, **kw)


def by_hand(train, model, opt_func, lr=.1, epochs=2, window=1, clip=None, stop_at=None, skip=()):
    "The loop that a person would write: one step for `window` batches, the mean over their examples"
    opt = opt_func(model.parameters(), lr=lr)
    count = 0
    for epoch in range(epochs):
        model.train()
        opt.zero_grad()
        n = examples = 0
        for i, (x, y) in enumerate(train):
            if i in skip: continue
            if stop_at == (epoch, i): return model
            loss = loss_func(model(x), y)
            (loss * len(y) if window > 1 else loss).backward()
            n, examples = n + 1, examples + len(y)
            if n < window and i + 1 < len(train): continue
            if window > 1:
                for p in model.parameters(): p.grad /= examples
            if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
            count, n, examples = count + 1, 0, 0
    return model


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def at(event, f, **attributes):
    "A callback with one method"
    return type('At', (Callback,), {event: f, **attributes})()


def raiser(e):
    def f(self): raise e
    return f


# Equal to the loop by hand

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=5)
opts = st.sampled_from([torch.optim.SGD, torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=.9)])


@settings(max_examples=15, deadline=None)
@given(sizes, opts, st.integers(1, 4), st.sampled_from([None, .05]), st.integers(0, 99))
def test_a_fit_is_the_loop_by_hand(sizes, opt, window, clip, seed):
    model = net(seed)
    wanted = by_hand(batches(*sizes), copy.deepcopy(model), opt, window=window, clip=clip)
    cbs = ([GradientAccumulation(window)] if window > 1 else []) + ([GradientClip(clip)] if clip else [])
    learner(model, sizes, cbs=cbs, opt=opt, metrics=accuracy).fit(2)
    assert same(model, wanted)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(2, 4))
def test_unequal_windows_give_the_gradient_of_all_their_examples(sizes, window):
    seen, model = [], net()
    class Grads(Callback):
        order = 30 # inside the accumulation
        def around_step(self, proceed):
            seen.append([p.grad.clone() for p in self.model.parameters()])
            return proceed()
    reference, train = copy.deepcopy(model), batches(*sizes)
    learner(model, sizes, cbs=[GradientAccumulation(window), Grads()], lr=1e-9).fit(1)
    for got, start in zip(seen, range(0, len(train), window), strict=True):
        x, y = (torch.cat(t) for t in zip(*train[start:start + window]))
        reference.zero_grad()
        loss_func(reference(x), y).backward()
        for g, p in zip(got, reference.parameters()): torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward'])
def test_a_cancelled_batch_leaves_no_gradient(event):
    def f(self):
        if self.training and self.iter == 1: raise CancelBatch
    model = net()
    wanted = by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.SGD, skip=[1])
    learner(model, cbs=at(event, f)).fit(2)
    assert same(model, wanted)


@pytest.mark.parametrize('exception', [CancelEpoch, CancelFit])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward'])
def test_a_cancelled_epoch_or_fit_leaves_no_gradient(event, exception):
    def f(self):
        if self.epoch == 0 and self.training and self.iter == 2: raise exception
    model = net()
    wanted = by_hand(batches(8, 8), copy.deepcopy(model), torch.optim.SGD, epochs=1)
    learn = learner(model, cbs=at(event, f))
    learn.fit(2)
    if exception is CancelEpoch: wanted = by_hand(batches(8, 8, 5), wanted, torch.optim.SGD, epochs=1)
    assert same(model, wanted) and all(p.grad is None for p in model.parameters())
    assert [r['epoch'] for r in learn[Recorder].rows] == ([0, 1] if exception is CancelEpoch else [])


# Metrics

def test_metrics_are_averaged_by_size_or_computed_from_all():
    worst = Metric(lambda p, t: (p.argmax(1) == t).float().min(), 'worst', average=False)
    count = Metric(lambda p, t: len(t), 'count', average=False)
    learn = learner(metrics=[accuracy, worst, count], valid=(7, 2))
    learn.fit(1)
    (x1, y1), (x2, y2) = learn.dls.valid
    right = (learn.model(torch.cat([x1, x2])).argmax(1) == torch.cat([y1, y2])).float()
    row = learn[Recorder].rows[0]
    assert row['accuracy'] == pytest.approx(right.mean().item()) and row['worst'] == right.min() and row['count'] == 9
    assert row['valid_loss'] == pytest.approx(loss_func(learn.model(torch.cat([x1, x2])), torch.cat([y1, y2])).item())


def test_f1_of_all_predictions_is_not_the_mean_of_the_batches():
    def f1(p, t):
        p, t = p.argmax(1) == 1, t == 1
        return 2 * (p & t).sum() / max(int(p.sum() + t.sum()), 1)
    learn = learner(metrics=Metric(f1, average=False), valid=(9, 3, 5))
    learn.fit(1)
    preds, targets = learn.get_preds()
    assert learn[Recorder].rows[0]['f1'] == pytest.approx(float(f1(preds, targets)))


def test_metrics_need_validation_and_names_of_their_own():
    with pytest.raises(ValueError, match='validation set'): learner(valid=None, metrics=accuracy).fit(1)
    with pytest.raises(ValueError, match='accuracy'): learner(metrics=[accuracy, accuracy])
    learn = learner(valid=None)
    learn.fit(2)
    assert [set(r) for r in learn[Recorder].rows] == [{'epoch', 'train_loss'}] * 2


def test_single_batch():
    seen = []
    learn = learner(cbs=[SingleBatch(), at('after_batch', lambda self: seen.append((self.epoch, self.training)))])
    learn.fit(2)
    assert seen == [(0, True), (0, False), (1, True), (1, False)] and len(learn[Recorder].losses) == 2


# The optimizer

def test_a_second_fit_keeps_the_state_and_says_so_once(capsys):
    model = net()
    wanted = by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.Adam, epochs=3)
    learn = learner(model, opt=torch.optim.Adam)
    for _ in range(3): learn.fit(1)
    assert same(model, wanted) and capsys.readouterr().out.count('reset_opt=True') == 1


def test_reset_opt_starts_afresh():
    model = net()
    wanted = by_hand(batches(8, 8, 5), by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.Adam, epochs=1), torch.optim.Adam, epochs=1)
    learn = learner(model, opt=torch.optim.Adam)
    learn.fit(1)
    learn.fit(1, reset_opt=True)
    assert same(model, wanted)


def test_groups_keep_their_ratios():
    def groups(params, lr):
        a, *b = params
        return torch.optim.SGD([dict(params=[a], lr=lr / 10), dict(params=b, lr=lr)])
    learn = learner(opt=groups)
    learn.fit(1, .2)
    assert [g['lr'] for g in learn.opt.param_groups] == [.02, .2]
    learn.fit(1, .5)
    assert [g['lr'] for g in learn.opt.param_groups] == pytest.approx([.05, .5])
    learn.fit(1)
    assert [g['lr'] for g in learn.opt.param_groups] == pytest.approx([.01, .1])


# Callbacks

@pytest.mark.parametrize('name, near', [('after_bach', 'after_batch'), ('befor_fit', 'before_fit'), ('around_stepp', 'around_step'), ('after_train_epoch', '')])
def test_a_misspelt_event_is_refused(name, near):
    with pytest.raises(ValueError, match=f'{name} is no event.*{near}'): learner(cbs=at(name, lambda self: None))


def test_twice_or_a_class_is_refused():
    cb = at('after_fit', lambda self: None)
    with pytest.raises(ValueError, match='already'): learner(cbs=[cb, cb])
    with pytest.raises(ValueError, match='already'): learner(cbs=[Recorder(), Recorder()])
    with pytest.raises(TypeError, match='object of a class'): learner(cbs=[Recorder])
    with pytest.raises(TypeError, match='object of a class'): learner(cbs=Recorder)
    with pytest.raises(TypeError, match='object of a class'): learner().add_cb(len)
    learn = learner(cbs=cb)
    with pytest.raises(ValueError, match='another Learner'): learner(cbs=cb)
    assert cb in learn.cbs


def test_added_in_a_fit_it_joins_at_the_next(capsys):
    seen = []
    late = at('before_epoch', lambda self: seen.append(self.epoch))
    def add(self):
        if late not in self.learn.cbs: self.learn.add_cb(late)
    learn = learner(cbs=at('before_fit', add))
    learn.fit(2)
    assert seen == [] and 'joins at the next' in capsys.readouterr().out
    learn.fit(2)
    assert seen == [0, 1]


def test_transient_callbacks_are_gone():
    learn, cb = learner(), at('after_batch', lambda self: None)
    before = list(learn.cbs)
    learn.fit(1, cbs=[cb, Recorder()])
    assert learn.cbs == before
    for bad in ([cb, cb], [cb, Recorder], [cb, at('after_bach', lambda self: None)]):
        with pytest.raises((ValueError, TypeError)): learn.fit(1, cbs=bad)
        assert learn.cbs == before
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[cb, at('after_step', raiser(ZeroDivisionError()))])
    assert learn.cbs == before
    learn.fit(1, cbs=cb)


# Failures

def children(): return [p for p in multiprocessing.active_children() if p.is_alive()]


def test_an_exception_names_its_callback_and_leaves_all_in_order():
    model, ended = net(0, nn.BatchNorm1d(8)), []
    model[1].eval()
    g = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randn(64, 6, generator=g), torch.randint(3, (64,), generator=g))
    learn = Learner(DataLoaders.from_datasets(ds, ds, 8, num_workers=2), model, loss_func, lr=.1)
    with pytest.raises(KeyError) as e: learn.fit(1, cbs=[at('after_backward', raiser(KeyError('x'))), at('after_fit', lambda self: ended.append(1))])
    assert any('At, at after_backward' in n for n in e.value.__notes__) and ended == [1] and not children()
    assert model.training and not model[1].training and all(p.grad is None for p in model.parameters())
    learn.fit(1)
    assert model.training and not model[1].training and not children()


def test_the_first_of_two_failures_of_after_fit_is_raised_and_all_are_called():
    ended = []
    cbs = [at('after_fit', raiser(KeyError('one'))), at('after_fit', raiser(IndexError('two'))), at('after_fit', lambda self: ended.append(1))]
    with pytest.raises(KeyError, match='one'): learner(cbs=cbs).fit(1)
    assert ended == [1]
    with pytest.raises(ZeroDivisionError): learner(cbs=[at('after_fit', lambda self: None), at('after_batch', raiser(ZeroDivisionError()))]).fit(1)


script = '''
import torch
from torch import nn
from dlfound.learner import *
class Stop(Callback):
    def after_batch(self):
        if not self.training == {training} and self.iter == 1: raise KeyboardInterrupt
    def after_fit(self): print('ended')
data = [(torch.randn(4, 6), torch.randint(3, (4,)))] * 3
model = nn.Linear(6, 3)
learn = Learner(DataLoaders(data, data), model, nn.CrossEntropyLoss())
stop = Stop()
'''


@pytest.mark.parametrize('in_training', [True, False])
def test_ctrl_c_in_a_script_is_raised_again(in_training):
    text = script.format(training=not in_training) + 'try: learn.fit(2, cbs=stop)\nfinally: print(learn.cbs.count(stop), model.training)'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', text], capture_output=True, text=True)
    assert done.returncode in (-2, 130, 1) and 'KeyboardInterrupt' in done.stderr and done.stdout.endswith('ended\n0 True\n'), done


@pytest.mark.parametrize('in_training', [True, False])
def test_ctrl_c_in_a_session_is_said_and_swallowed(in_training):
    text = script.format(training=not in_training) + f'''
from IPython.terminal.interactiveshell import TerminalInteractiveShell
TerminalInteractiveShell.instance()
learn.fit(2, cbs=stop)
learn.fit(1)
print('usable', len(learn[Recorder].rows))
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', text], capture_output=True, text=True)
    where = 'training' if in_training else 'validation'
    assert done.returncode == 0 and f'Interrupted in epoch 0, {where}, batch 1' in done.stdout and 'usable 1' in done.stdout, done


# Losses that are not finite

def poisoned(i, n=12):
    data = batches(*[4] * n)
    data[i] = (data[i][0] * float('nan'), data[i][1])
    return data


def test_nan_on_the_cpu_is_seen_before_the_step():
    data, model = poisoned(3), net()
    wanted = by_hand(data[:3], copy.deepcopy(model), torch.optim.SGD, epochs=1)
    with pytest.raises(FloatingPointError, match='nan in batch 3 of epoch 0; no step'): Learner(DataLoaders(data), model, loss_func, lr=.1).fit(2)
    assert same(model, wanted)


@pytest.mark.parametrize('bad, every', [(1, 5), (4, 5), (5, 5), (11, 5), (7, 50)])
def test_nan_on_a_device_is_told_at_the_next_log_point(bad, every):
    steps = []
    learn = Learner(DataLoaders(poisoned(bad)), net(), loss_func, lr=.1,
                    cbs=[SanityCheck(look='log', every=every), at('after_batch', lambda self: steps.append(self.iter))])
    with pytest.raises(FloatingPointError, match=f'batch {bad} of epoch 0'): learn.fit(2)
    assert len(steps) == min(bad // every * every + every - 1, 12)


def test_terminate_on_nan_ends_the_fit_and_names_the_layer():
    model, data = net(), poisoned(3)
    wanted = by_hand(data[:3], copy.deepcopy(model), torch.optim.SGD, epochs=1)
    with pytest.warns(UserWarning, match='batch 3 of epoch 0'): Learner(DataLoaders(data), model, loss_func, lr=.1, cbs=TerminateOnNaN()).fit(2)
    assert same(model, wanted)


def test_a_bad_loss_is_told_though_the_model_takes_other_arguments():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()
        def forward(self, *, x): return self.inner(x)
    class Keywords(Learner):
        def forward(self): self.pred = self.model(x=self.batch[0])
    model = Keyword()
    model.inner[0].weight.data[0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match='cannot be told, for .*positional'): Keywords(DataLoaders(batches(8, 8)), model, loss_func, lr=.1).fit(1)


@pytest.mark.filterwarnings('always')
def test_a_model_left_in_eval_is_told_once():
    learn = learner(net(0, nn.Dropout(.1)), cbs=at('before_batch', lambda self: self.model.eval()))
    with pytest.warns(UserWarning, match='Dropout.* left in eval') as caught: learn.fit(2)
    assert sum('left in eval' in str(w.message) for w in caught) == 1
    import warnings
    with warnings.catch_warnings(record=True, action='always') as caught: learner(net(0, nn.Dropout(.1))).fit(1)
    assert not [w for w in caught if 'left in eval' in str(w.message)]


# Batches of other shapes, predictions

def test_dicts_and_several_inputs():
    class Dicts(Learner):
        def inputs(self): return self.batch['a'], self.batch['b']
        def target(self): return self.batch['y']
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = net()
        def forward(self, a, b): return self.fc(a + b)
    data = batches(5, 4)
    dicts, tuples = Sum(), Sum()
    tuples.load_state_dict(dicts.state_dict())
    as_dicts = [dict(a=x, b=x * 2, y=y) for x, y in data]
    learn = Dicts(DataLoaders(as_dicts, as_dicts), dicts, loss_func, lr=.1, metrics=accuracy)
    learn.fit(2)
    Learner(DataLoaders([(x, x * 2, y) for x, y in data]), tuples, loss_func, lr=.1).fit(2)
    assert same(dicts, tuples) and learn.get_preds()[0].shape == (9, 3)
    with pytest.raises(TypeError, match='override inputs and target'): Learner(DataLoaders(as_dicts), Sum(), loss_func).fit(1)


def test_predictions():
    learn = learner(net(0, nn.Dropout()))
    preds, targets = learn.get_preds()
    x, y = (torch.cat(t) for t in zip(*learn.dls.valid))
    with torch.no_grad(): wanted = learn.model.eval()(x)
    torch.testing.assert_close(preds, wanted)
    assert torch.equal(targets, y) and not preds.requires_grad
    torch.testing.assert_close(learn.predict(x[0]), wanted[0])
    assert learn.get_preds([(x,)])[1] is None


def test_nested_predictions():
    Out = namedtuple('Out', 'logits hidden')
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = net()
        def forward(self, x): return Out(self.fc(x), dict(h=[x, x * 2]))
    learn = learner(Nested())
    preds, _ = learn.get_preds()
    x = torch.cat([x for x, _ in learn.dls.valid])
    assert preds[0].shape == (6, 3) and torch.equal(preds[1]['h'][1], x * 2) and type(preds) is Out


def test_validate_fires_its_events_only():
    seen = []
    log = type('Log', (Callback,), {e: lambda self, e=e: seen.append(e) for e in L._events})()
    learn = learner(valid=(4, 2), metrics=accuracy)
    learn.model.train()
    results = learn.validate(cbs=log)
    batch = ['before_batch', 'after_pred', 'after_loss', 'after_batch']
    assert seen == ['before_validate', *batch, *batch, 'after_validate'] and set(results) == {'valid_loss', 'accuracy'}
    assert learn.model.training and learn[Recorder].rows == []
    with pytest.raises(ValueError, match='dls.valid is None'): learner(valid=None).validate()


# Memory and the device

class Fails(Callback):
    "Raises an exception that nobody keeps"
    kind = KeyError
    def after_backward(self): raise self.kind


class Stops(Fails): kind = KeyboardInterrupt


def use(how, learn):
    if how == 'fit': learn.fit(2)
    elif how == 'validate': learn.validate()
    elif how == 'predict': learn.predict(learn.dls.valid[0][0][0])
    else:
        try: learn.fit(1, cbs=Fails() if how == 'failed' else Stops())
        except (KeyError, KeyboardInterrupt): pass


@pytest.mark.parametrize('how', ['fit', 'failed', 'interrupted', 'validate', 'predict'])
def test_freed_by_reference_counting_alone(how):
    gc.collect()
    gc.disable()
    try:
        learn = learner(cbs=[GradientClip(1.), GradientAccumulation(2)], metrics=[accuracy, Metric(lambda p, t: 1., 'one', average=False)])
        dead = weakref.ref(learn), weakref.ref(learn.model), weakref.ref(learn.model[0].weight)
        use(how, learn)
        del learn
        assert [d() is None for d in dead] == [True] * 3
    finally: gc.enable()


class Syncs(TorchDispatchMode):
    "Counts what would make the host wait for a device"
    def __init__(self):
        super().__init__()
        self.seen, self.where = [], None
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(n in name for n in ('_local_scalar_dense', 'is_nonzero', 'nonzero', 'equal.', 'unique', 'masked_select')) and '.masked_fill' not in name: self.seen.append((self.where, name))
        if '_to_copy' in name and (kwargs or {}).get('device') is not None: self.seen.append((self.where, name))
        return func(*args, **(kwargs or {}))


def test_no_synchronisation_in_a_step():
    mode = Syncs()
    def mark(self): mode.where = (self.epoch, self.training, self.iter)
    def unmark(self): mode.where = None
    tracker = type('Where', (Callback,), dict(order=-1000, before_batch=mark))()
    end = type('End', (Callback,), dict(order=1000, after_batch=unmark))()
    cbs = [tracker, end, SanityCheck(look='log', every=4), Metrics(accuracy), Progress(), GradientClip(1.), GradientAccumulation(2)]
    learn = learner(train=[4] * 10, valid=[4] * 3, cbs=cbs)
    with mode: learn.fit(2)
    steps = {w for w, _ in mode.seen if w}
    first = {(0, True, 0), (0, False, 0), (1, False, 0)} # looked at once, by the checks of the first batches
    assert steps - first == {(e, True, i) for e in (0, 1) for i in (3, 7)}, mode.seen
    assert sum(w is not None and w not in first for w, _ in mode.seen) == 4


def test_the_device_can_be_told():
    seen = []
    learn = learner(cbs=[L.Device('meta'), at('after_pred', lambda self: (seen.append(self.pred.device.type), (_ for _ in ()).throw(CancelFit)))])
    learn.remove_cb(SanityCheck)
    learn.fit(1)
    assert seen == ['meta'] and next(learn.model.parameters()).is_meta


# Files

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.emb, self.out, self.norm = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(4)
        self.out.weight = self.emb.weight


def holding(model): return learner(model)


def test_weights_come_back(tmp_path):
    a, b = Tied(), Tied()
    holding(a).save(tmp_path / 'm.safetensors')
    holding(b).load(tmp_path / 'm.safetensors')
    assert same(a, b) and b.out.weight is b.emb.weight and b.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert os.listdir(tmp_path) == ['m.safetensors']


@pytest.mark.parametrize('other', [lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), lambda: nn.Sequential(nn.Linear(6, 8))])
def test_another_model_is_refused_and_nothing_changes(tmp_path, other):
    holding(other()).save(tmp_path / 'm.safetensors')
    learn = holding(net())
    before = copy.deepcopy(learn.model)
    with pytest.raises(ValueError, match='another model'): learn.load(tmp_path / 'm.safetensors')
    assert same(learn.model, before)


@pytest.mark.parametrize('keep', [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    learn, path = holding(net()), tmp_path / 'm.safetensors'
    learn.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    before = copy.deepcopy(learn.model)
    with pytest.raises(ValueError, match='no whole safetensors'): learn.load(path)
    assert same(learn.model, before)


def test_the_old_file_is_kept_when_writing_fails(tmp_path, monkeypatch):
    learn, path = holding(net()), tmp_path / 'm.safetensors'
    learn.save(path)
    before = path.read_bytes()
    def broken(model, file):
        open(file, 'wb').write(b'half')
        raise OSError('no space left')
    monkeypatch.setattr(L, 'save_model', broken)
    with pytest.raises(OSError, match='no space'): learn.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['m.safetensors']


# Progress

fitting = '''
import time, torch
from torch import nn
from dlfound.learner import *
from dlfound.minibatch import accuracy
data = [(torch.randn(4, 6), torch.randint(3, (4,)))] * 6
class Slow(Callback):
    def after_batch(self): time.sleep(.03)
learn = Learner(DataLoaders(data, data), nn.Linear(6, 3), nn.CrossEntropyLoss(), metrics=accuracy, cbs=[Slow(), Progress({args})])
learn.fit(3)
'''


def check_table(lines):
    assert lines[0].split() == ['epoch', 'train_loss', 'valid_loss', 'accuracy'] and [l.split()[0] for l in lines[1:]] == ['0', '1', '2'], lines
    assert all(len(l) <= 80 for l in lines)


def test_progress_in_a_pipe_is_plain_lines():
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', fitting.format(args='')], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and '\r' not in done.stdout and '\x1b' not in done.stdout, done
    check_table(done.stdout.splitlines())


def test_progress_in_a_terminal_is_a_bar_that_goes_away():
    pty = pytest.importorskip('pty')
    import fcntl, struct, termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0)) # a new one has no columns at all
    child = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', fitting.format(args='')], stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    out = b''
    while True:
        try: part = os.read(ours, 4096)
        except OSError: break
        if not part: break
        out += part
    assert child.wait() == 0
    os.close(ours)
    text = out.decode()
    assert '%|' in text
    shown = [line.split('\r')[-1].replace('\x1b[A', '') for line in text.replace('\r\n', '\n').split('\n')]
    check_table([line for line in shown if line.strip()])


@pytest.mark.parametrize('plot', [False, True])
def test_progress_on_a_page_leaves_one_table(plot):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('import warnings; warnings.simplefilter("ignore")\n' + fitting.format(args=f'plot={plot}, every=.05'))])
    nbclient.NotebookClient(nb, timeout=60, kernel_name='python3').execute()
    outputs = nb.cells[0].outputs
    tables, pictures = ([o for o in outputs if kind in o.get('data', {})] for kind in ('text/html', 'image/png'))
    assert len(tables) == 1 and len(pictures) == plot and len(outputs) == 1 + plot, [o.output_type for o in outputs]
    assert 'batch' not in tables[0]['data']['text/html']
    check_table(tables[0]['data']['text/plain'].splitlines())


# What a second reader found

@pytest.mark.parametrize('event, exception', [('after_batch', CancelBatch), ('before_fit', CancelEpoch), ('after_epoch', CancelEpoch), ('after_fit', CancelFit)])
def test_a_cancel_that_nobody_hears_says_so(event, exception):
    learn = learner(cbs=at(event, raiser(exception())))
    with pytest.raises(RuntimeError, match=f'{exception.__name__} has nothing to leave at {event}') as info: learn.fit(1)
    assert 'the callback At' in info.value.__notes__[0]
    learn.remove_cb(learn.cbs[0])
    learn.fit(1)


@pytest.mark.parametrize('wrap', [lambda y: (y, y, y), lambda y: [y, y], lambda y: dict(a=y, b=dict(c=y)), lambda y: [dict(c=int(i)) for i in y]])
def test_examples_are_counted_in_targets_of_several_parts(wrap):
    train = [(x, wrap(y)) for x, y in batches(8, 8, 5)]
    learn = L.Learner(DataLoaders(train), net(), lambda pred, t: pred.square().mean())
    learn.fit(1)
    losses = learn[Recorder].losses
    assert learn.row['train_loss'] == pytest.approx(sum(v * n for v, n in zip(losses, (8, 8, 5))) / 21)


def test_images_of_several_sizes_are_counted_by_their_targets():
    "As in detection: a tuple of images and a tuple of dicts, with as many boxes as it happens"
    loop = L.TrainingLoop(None, net(), None)
    loop.batch = (torch.zeros(3, 4), torch.zeros(3, 5)), (dict(boxes=torch.zeros(7, 4)), dict(boxes=torch.zeros(1, 4)))
    assert loop.batch_size() == 2


def test_a_target_wrong_in_validation_only():
    train, valid = ([(x, torch.zeros(len(x), *shape)) for x, _ in batches(8)] for shape in ((3,), (1,)))
    learn = L.Learner(DataLoaders(train, valid), net(), torch.nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r'target of shape \(8, 1\)'): learn.fit(1)


def test_numbers_that_are_none():
    right = Metric(lambda p, t: (p.argmax(1) == t).float(), 'right')
    with pytest.raises(ValueError, match='take its mean') as info: learner(metrics=right).fit(1)
    assert '(in the metric right)' in info.value.__notes__
    late = Metric(lambda p, t: 1 / 0, 'late', average=False)
    with pytest.raises(ZeroDivisionError) as info: learner(metrics=late).fit(1)
    assert '(in the metric late)' in info.value.__notes__
    loss = torch.nn.CrossEntropyLoss(reduction='none')
    with pytest.raises(ValueError, match=r'one number, got one of shape \(8,\)'): L.Learner(DataLoaders(batches(8)), net(), loss).fit(1)


def test_a_step_set_from_outside_is_still_there_after_a_fit():
    learn, calls = learner(), []
    learn.zero_grad = lambda: (calls.append(1), learn.opt.zero_grad())
    learn.fit(1)
    assert 'zero_grad' in vars(learn)
    n = len(calls)
    learn.fit(1)
    assert len(calls) == 2 * n


def test_a_copy_is_a_learner_of_its_own():
    learn = learner(metrics=accuracy)
    learn.fit(1)
    other = copy.deepcopy(learn)
    assert same(learn.model, other.model)
    other.fit(1)
    assert not same(learn.model, other.model) and len(learn[Recorder].losses) == 3 and len(other[Recorder].losses) == 6
    assert other[Recorder].learn is other
    learn.fit(1)
    assert same(learn.model, other.model)


class Reader:
    "A loader that is its own iterator, and can be closed by its owner"
    closed = False
    def __iter__(self):
        self.left = iter(batches(4, 4))
        return self
    def __next__(self):
        assert not self.closed
        return next(self.left)
    def close(self): self.closed = True
    def __len__(self): raise NotImplementedError


def test_a_loader_is_not_closed_and_need_not_know_its_length():
    learn = L.Learner(DataLoaders(Reader()), net(), loss_func, cbs=Progress())
    learn.fit(2)
    assert len(learn[Recorder].losses) == 4


def test_a_single_batch_sends_its_workers_home():
    from dlfound.minibatch import Dataset
    for Loader in L.DataLoader, torch.utils.data.DataLoader:
        dl = Loader(Dataset(torch.randn(32, 6), torch.arange(32) % 3), 8, num_workers=1)
        learn = L.Learner(DataLoaders(dl, dl), net(), loss_func, cbs=SingleBatch())
        learn.fit(1)
        assert len(learn[Recorder].losses) == 1 and not children()


def test_a_bad_loss_is_told_though_the_fit_was_left():
    def leave(self):
        if self.iter == 7: raise CancelFit
    train = poisoned(5)
    learn = L.Learner(DataLoaders(train), net(), loss_func, cbs=[SanityCheck('log', every=50), at('after_batch', leave)])
    with pytest.raises(FloatingPointError, match='in batch 5'): learn.fit(1)


def test_learning_rates_in_a_tensor_are_recorded_one_by_one():
    learn = learner(opt=lambda p, lr: torch.optim.SGD(p, lr=torch.tensor(lr)))
    def lower(self): self.opt.param_groups[0]['lr'].mul_(.5)
    learn.fit(1, cbs=at('after_step', lower))
    assert learn[Recorder].lrs == pytest.approx([.05, .025, .0125])


def test_predictions_are_what_other_callbacks_made_of_them():
    def soften(self): self.learn.pred = self.pred.softmax(-1)
    preds, _ = learner(cbs=at('after_pred', soften, order=3)).get_preds()
    torch.testing.assert_close(preds.sum(-1), torch.ones(6))


def test_nothing_to_predict_for():
    learn = learner()
    learn.remove_cb(SanityCheck)
    with pytest.raises(ValueError, match='no batch to predict for'): learn.get_preds([])


def test_a_prediction_of_several_parts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
        def forward(self, x): return dict(scores=self.layer(x), pair=(x, x[:, 0]))
    learn, x = learner(Two()), torch.randn(6)
    got = learn.predict(x)
    torch.testing.assert_close(got['scores'], learn.model.layer(x))
    assert torch.equal(got['pair'][0], x) and got['pair'][1] == x[0]


def test_interrupted_while_it_tidied_up_a_resumed_fit():
    learn = learner()
    learn._first_epoch, learn._skip_training = 3, True # As it is if Ctrl-C came before the end of a resumed fit
    learn.fit(1)
    assert len(learn[Recorder].losses) == 3


@pytest.mark.parametrize('saved, own', [(True, False), (False, True)])
def test_tied_or_not_is_another_model(tmp_path, saved, own):
    def made(tied):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied: model[1].weight = model[0].weight
        return holding(model)
    made(saved).save(tmp_path / 'w.safetensors')
    other = made(own)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(ValueError, match='one tensor in the ' + ('file' if saved else 'model')): other.load(tmp_path / 'w.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(before.values(), other.model.state_dict().values()))


def test_what_weights_are_not(tmp_path):
    from dlfound.schedule import Checkpoint
    learn = learner()
    learn.fit(1, cbs=Checkpoint(tmp_path))
    with pytest.raises(ValueError, match='is a checkpoint'): learn.load(next(tmp_path.iterdir()))
    class Extra(nn.Linear):
        def get_extra_state(self): return dict(a=1)
        def set_extra_state(self, state): pass
    with pytest.raises(TypeError, match='_extra_state is dict'): holding(Extra(6, 3)).save(tmp_path / 'w')
