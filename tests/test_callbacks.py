"Accumulation, clipping, short epochs, devices and the checks, against loops by hand and on planted faults."
import copy
import warnings
from collections import UserDict
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import at, batches, by_hand, learner, loss_func, net, no_workers, poisoned, raiser, same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from dlfound.callbacks import nonfinite_grads
from dlfound.learner import (Callback, CancelBatch, CancelFit, DataLoaders, Device, GradientAccumulation, GradientClip,
                             Learner, Metrics, Progress, Recorder, SanityCheck, ShortEpoch, SingleBatch, TerminateOnNaN,
                             label_weight)
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset, accuracy, cross_entropy
from dlfound.mixed_precision import AMP, MixedPrecision
from dlfound.sanity import SanityWarning
from dlfound.state import map_tensors

quiet = pytest.mark.filterwarnings('ignore::UserWarning')


def told(f):
    "The SanityWarnings that `f()` gives"
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in log if issubclass(w.category, SanityWarning)]


# Accumulation

@quiet
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(2, 4))
def test_unequal_windows_give_the_gradient_of_all_their_examples(sizes, window):
    seen, model = [], net()
    class Grads(Callback):
        order = 30 # inside the accumulation
        def around_step(self, learn, proceed):
            seen.append([p.grad.clone() for p in learn.model.parameters()])
            proceed()
    reference, train = copy.deepcopy(model), batches(*sizes)
    learner(model, sizes, cbs=[GradientAccumulation(window), Grads()], lr=1e-9).fit(1)
    for got, start in zip(seen, range(0, len(train), window), strict=True):
        x, y = (torch.cat(t) for t in zip(*train[start:start + window]))
        reference.zero_grad()
        loss_func(reference(x), y).backward()
        for g, p in zip(got, reference.parameters()): torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)


def test_a_window_that_a_checkpoint_opens_again():
    "Its gradients are where the next batch begins"
    one, two = (learner(train=[4] * 6, cbs=GradientAccumulation(3), progress=False) for _ in range(2))
    states = []
    def take(learn):
        if (learn.epoch, learn.training, learn.iter) == (0, True, 3): states.append(copy.deepcopy(learn.state_dict()))
    one.fit(2, cbs=at('after_batch', take))
    class Load(Callback):
        order = 1e9
        def before_train(self, learn):
            if not learn.epoch: learn.load_state_dict(states[0])
    two.fit(2, cbs=Load(), start=(0, 4))
    assert same(one.model, two.model) and one[Recorder].losses == two[Recorder].losses


def text(n=4):
    x = torch.randn(n, 6, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6 * n).view(n, 6) % 5
    y[:n // 2, 1:] = -100 # Padding
    return x, y


class Words(nn.Linear):
    "Scores as PyTorch's losses want them, classes second"
    def forward(self, x): return super().forward(x).transpose(1, 2)


def sum_of_weights(learn): return (learn.target() != -100).sum()


@quiet
@pytest.mark.parametrize('loss', [F.cross_entropy, cross_entropy, nn.CrossEntropyLoss(weight=torch.arange(1., 6)),
                                  partial(F.cross_entropy, weight=torch.arange(1., 6))], ids=str)
def test_the_mean_over_what(loss):
    "Case F11: padded tokens and class weights; with the right weight accumulation equals one large batch"
    x, y = text()
    def after(bs, *cbs, **kw):
        torch.manual_seed(0)
        data = list(zip(x.split(bs), y.split(bs)))
        learn = Learner(DataLoaders(data, data), Words(3, 5), loss, lr=1., cbs=cbs, progress=False, **kw)
        learn.fit(1)
        return learn
    whole = after(4)
    def weight(learn): return label_weight(learn.loss_func, learn.target()) or learn.target().numel()
    right, wrong = (after(2, GradientAccumulation(2), **kw) for kw in (dict(weight=weight), {}))
    torch.testing.assert_close(right.model.weight, whole.model.weight)
    assert not torch.allclose(wrong.model.weight, whole.model.weight, rtol=1e-3)
    for name in 'train_loss', 'valid_loss':
        if name == 'valid_loss' or right.row[name] == whole.row[name]:
            assert right.row[name] == pytest.approx(whole.row[name])


def test_where_the_default_weight_is_wrong_it_is_said():
    x, y = text()
    def fit(loss, y=y, **kw): Learner(DataLoaders([(x, y)]), Words(3, 5), loss, progress=False, **kw).fit(1)
    for loss in F.cross_entropy, cross_entropy, nn.CrossEntropyLoss():
        assert any('mean over 14 in a batch that counts 4' in t for t in told(lambda: fit(loss)))
    weighted, plain = nn.CrossEntropyLoss(weight=torch.arange(1., 6)), y.clamp(min=0)
    assert any('label_weight' in t for t in told(lambda: fit(weighted, plain)))
    assert any('no sums' in t for t in told(lambda: fit(nn.CrossEntropyLoss(reduction='sum'), plain)))
    for loss, target, kw in ((F.cross_entropy, plain, {}), (F.cross_entropy, y, dict(weight=sum_of_weights)),
                             (lambda p, t: F.cross_entropy(p, t), y, {})):
        assert not [t for t in told(lambda: fit(loss, target, **kw)) if 'mean over' in t]


def test_a_refused_batch_is_not_in_its_window():
    def after(train, *cbs):
        learn = Learner(DataLoaders(train), net(), loss_func, lr=.1, cbs=[GradientAccumulation(len(train)), *cbs])
        learn.fit(1)
        return learn.model
    def refuse(learn):
        if learn.iter == 1: raise CancelBatch
    four = batches(4, 4, 4, 4)
    refused = after(four, at('after_backward', refuse))
    assert same(refused, after([four[0], *four[2:]])) and not same(refused, after(four))


def test_a_window_survives_gradients_that_are_zeroed_in_place():
    def after(none):
        class SGD(torch.optim.SGD):
            def zero_grad(self): super().zero_grad(set_to_none=none)
        learn = learner(train=[40, 40, 10], cbs=GradientAccumulation(3), opt=SGD)
        learn.fit(1)
        return learn.model
    assert same(after(True), after(False)) and not same(after(True), net())


@pytest.mark.parametrize('make, message', [
    (lambda: GradientClip(0.), 'max_norm is above 0'), (lambda: GradientClip(-1.), 'max_norm is above 0'),
    (lambda: GradientAccumulation(0), '1 batch at least'), (lambda: ShortEpoch(-1), '1 batch at least'),
    (lambda: SanityCheck('steps'), "'step', 'log' or None"), (lambda: SanityCheck('log', every=0), 'every above 0')])
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_gradients_of_other_kinds():
    sparse, imaginary = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    for factor, bad in (1., 0), (torch.nan, 1):
        sparse.zero_grad()
        imaginary.grad = None
        (factor * sparse(torch.tensor([1]))).sum().backward()
        (factor * imaginary).abs().sum().backward()
        for p in sparse.weight, imaginary: assert float(nonfinite_grads([p])) == bad


# Short epochs

def test_single_batch():
    seen = []
    def note(learn): seen.append((learn.epoch, learn.training))
    learn = learner(cbs=[SingleBatch(), at('after_batch', note)])
    learn.fit(2)
    assert seen == [(0, True), (0, False), (1, True), (1, False)] and len(learn[Recorder].losses) == 2


def test_short_epochs_end_in_order():
    ends = []
    def note(learn): ends.append((learn.epoch, learn.iter))
    cbs = [ShortEpoch(3), GradientAccumulation(2), at('after_train', note), at('after_validate', note)]
    learn = learner(train=[4] * 9, valid=[4] * 2, cbs=cbs)
    learn.fit(2)
    assert ends == [(0, 3), (0, 2), (1, 3), (1, 2)] and len(learn[Recorder].rows) == 2
    assert {'train_loss', 'valid_loss'} <= set(learn.row)


@pytest.mark.parametrize('kind', [DataLoader, torch.utils.data.DataLoader])
def test_a_single_batch_sends_its_workers_home(kind):
    dl = kind(Dataset(torch.randn(32, 6), torch.arange(32) % 3), 8, num_workers=1)
    learn = Learner(DataLoaders(dl, dl), net(), loss_func, cbs=SingleBatch())
    learn.fit(1)
    assert len(learn[Recorder].losses) == 1 and no_workers()


# Devices

class Graph:
    "As in PyTorch Geometric: a batch that moves itself"
    def __init__(self, x): self.x = x
    def to(self, *args, **kwargs): return Graph(self.x.to(*args, **kwargs))


class Encoding(UserDict):
    "As in transformers: a dict whose items are attributes too"
    def __getattr__(self, k): return self.data[k]


def test_what_moves_keeps_its_class():
    "Case F14"
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    encoding = Encoding(a=torch.ones(1), text='x')
    device = Device('meta')
    learn = learner()
    learn.batch = Graph(torch.ones(2)), packed, encoding, [torch.ones(1), 'text'], (3, None)
    device.before_batch(learn)
    graph, packed, encoding, listed, rest = learn.batch
    assert graph.x.is_meta and packed.data.is_meta and type(packed).__name__ == 'PackedSequence'
    assert type(encoding) is Encoding and encoding.a.is_meta and encoding['text'] == 'x'
    assert listed[0].is_meta and listed[1] == 'text' and rest == (3, None)


def test_the_device_can_be_told():
    seen = []
    def look(learn):
        seen.append((learn.pred.device.type, learn.loss_func.weight.device.type))
        raise CancelFit
    learn = learner(loss=nn.CrossEntropyLoss(weight=torch.ones(3)), cbs=[Device('meta'), at('after_pred', look)])
    learn.remove_cb(SanityCheck)
    learn.fit(1)
    assert seen == [('meta', 'meta')] and next(learn.model.parameters()).is_meta


# Numbers that are not finite

def test_nan_on_the_cpu_is_seen_before_the_step():
    data, model = poisoned(3), net()
    wanted = by_hand(data[:3], copy.deepcopy(model), torch.optim.SGD, epochs=1)
    with pytest.raises(FloatingPointError, match='nan in batch 3 of epoch 0.*began in the inputs'):
        Learner(DataLoaders(data), model, loss_func, lr=.1).fit(2)
    assert same(model, wanted)


class Norm(nn.Module):
    "Gives finite numbers, and NaN gradients"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(2, 2)
    def forward(self, x): return self.l(x).sub(self.l(x)).square().sum(1).sqrt()


@pytest.mark.parametrize('cbs', [(), GradientClip(1.), GradientAccumulation(2)],
                         ids=['alone', 'clipped', 'accumulated'])
def test_gradients_that_are_nan(cbs):
    "Case F10: the step is refused, in the batch that made them, and the weights are as before"
    model, batch = Norm(), (torch.randn(8, 2), torch.ones(8))
    before = copy.deepcopy(model)
    learn = Learner(DataLoaders([batch] * 3), model, nn.MSELoss(), cbs=cbs)
    with pytest.raises(FloatingPointError, match='the gradient of .*l.weight'):
        learn.fit(1)
    assert same(model, before)
    learn = Learner(DataLoaders([batch] * 3), model, nn.MSELoss(), cbs=TerminateOnNaN())
    with pytest.warns(UserWarning, match='the fit ends: the gradient of'): learn.fit(1)
    assert same(model, before)


def test_gradients_of_many_kinds_are_looked_at():
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    params = [nn.Parameter(torch.zeros(3, dtype=d)) for d in dtypes]
    params.append(nn.Parameter(torch.zeros(2, 3)))
    assert not nonfinite_grads(params)
    for p in params[:4]: p.grad = torch.ones_like(p)
    assert not nonfinite_grads(params) and all((p.grad == 1).all() for p in params[:4])
    for p in params[:4]:
        for bad in float('nan'), float('inf'), -float('inf'):
            p.grad[1] = bad
            assert nonfinite_grads(params)
            p.grad[1] = 1
    assert not nonfinite_grads(params)


@quiet
@pytest.mark.parametrize('bad, every', [(1, 5), (4, 5), (5, 5), (11, 5), (7, 50)])
@pytest.mark.parametrize('kind', ['loss', 'gradient'])
def test_on_a_device_it_is_told_at_the_next_log_point(bad, every, kind):
    steps = []
    def spoil(learn):
        if learn.iter == bad: learn.params[0].grad[0] = float('inf')
    cbs = [SanityCheck(look='log', every=every), at('after_batch', lambda learn: steps.append(learn.iter))]
    if kind == 'gradient': cbs.append(at('after_backward', spoil, order=-70))
    train = poisoned(bad) if kind == 'loss' else batches(*[4] * 12)
    learn = Learner(DataLoaders(train), net(), loss_func, lr=.1, cbs=cbs)
    with pytest.raises(FloatingPointError, match=f'batch {bad} of epoch 0'): learn.fit(2)
    assert len(steps) == min(bad // every * every + every - 1, 12)


@quiet
def test_a_bad_loss_is_told_though_the_fit_was_left():
    def leave(learn):
        if learn.iter == 7: raise CancelFit
    cbs = [SanityCheck('log', every=50), at('after_loss', leave, order=90)]
    with pytest.raises(FloatingPointError, match='in batch 5'):
        Learner(DataLoaders(poisoned(5)), net(), loss_func, cbs=cbs).fit(1)


@pytest.mark.filterwarnings('error:Converting a tensor')
def test_terminate_on_nan_ends_the_fit_and_names_the_place():
    model, data = net(), poisoned(3)
    wanted = by_hand(data[:3], copy.deepcopy(model), torch.optim.SGD, epochs=1)
    learn = Learner(DataLoaders(data), model, loss_func, lr=.1, cbs=TerminateOnNaN())
    with pytest.warns(UserWarning, match='batch 3 of epoch 0, at a rate of .*; it began in the inputs'): learn.fit(2)
    assert same(model, wanted)


def test_a_bad_loss_is_found_though_the_model_takes_other_arguments():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()
        def forward(self, *, x): return self.inner(x)
    class Keywords(Learner):
        def forward(self): self.pred = self.model(x=self.batch[0])
    model = Keyword()
    model.inner[0].weight.data[0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match=r'began in the weight inner\.0\.weight'):
        Keywords(DataLoaders(batches(8, 8)), model, loss_func, lr=.1).fit(1)


# The other checks

def test_a_model_left_in_eval_is_told_once():
    def left(learn): learn.model.eval()
    learn = learner(net(0, nn.Dropout(.1)), cbs=at('before_batch', left))
    assert sum('left in eval' in t for t in told(lambda: learn.fit(2))) == 1
    assert not [t for t in told(lambda: learner(net(0, nn.Dropout(.1))).fit(1)) if 'left in eval' in t]


def test_a_loss_that_grows_is_told():
    "Of a linear net on normal inputs, at a rate at which it diverges slowly"
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    def fit(lr): Learner(DataLoaders([(x, x)] * 60), nn.Linear(4, 4), nn.MSELoss(), lr=lr, progress=False).fit(1)
    assert sum('has grown from' in t for t in told(lambda: fit(4.4))) == 1
    assert not [t for t in told(lambda: fit(.1)) if 'grown' in t]


def test_a_rate_that_ruins_the_first_batches_is_told():
    "The mean of the first ten is ruined too, so a classifier is compared with its first loss"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=g), torch.randint(3, (64,), generator=g)
    def fit(lr, opt=torch.optim.SGD):
        torch.manual_seed(0)
        Learner(DataLoaders([(x, y)] * 30), nn.Linear(4, 3), nn.CrossEntropyLoss(), opt, lr, progress=False).fit(1)
    for given in (1e6,), (100, torch.optim.Adam):
        assert sum('has grown from' in t for t in told(lambda: fit(*given))) == 1, given
    assert not [t for t in told(lambda: fit(.1)) if 'grown' in t]
    with pytest.raises(FloatingPointError, match='at a rate of 1e[+]38; it began in'): fit(1e38)


def test_a_hidden_state_is_told():
    class RNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.h = nn.RNN(4, 8, batch_first=True), None
        def forward(self, x):
            out, h = self.rnn(x, self.h)
            self.h = h.detach()
            return out
    x = torch.randn(8, 2, 4)
    fit = Learner(DataLoaders([(x, torch.zeros(8, 2, 8))] * 2), RNN(), nn.MSELoss(), progress=False).fit
    assert any('h is not saved or moved' in t for t in told(lambda: fit(1)))


def test_a_target_wrong_in_validation_only():
    train, valid = ([(x, torch.zeros(len(x), *shape)) for x, _ in batches(8)] for shape in ((3,), (1,)))
    with pytest.raises(ValueError, match=r'target of shape \(8, 1\)'):
        Learner(DataLoaders(train, valid), net(), F.mse_loss).fit(1)


@pytest.mark.parametrize('change, message', [
    (dict(lr=0.), 'finite and above 0'), (dict(lr=float('nan')), 'finite and above 0'),
    (dict(loss=nn.CrossEntropyLoss(reduction='none')), 'single number'),
    (dict(loss=lambda p, t: None), 'single number, got None'),
    (dict(train=()), 'dls.train is empty'), (dict(valid=(0,), loss=F.cross_entropy), '')])
def test_settings_and_first_batches(change, message):
    if not message: return
    with pytest.raises((ValueError, TypeError), match=message): learner(**change).fit(1)


def test_an_iterator_that_is_used_up_is_told():
    with pytest.raises(ValueError, match='used-up iterator'):
        Learner(DataLoaders(iter(batches(4))), net(), loss_func).fit(2)


def test_no_trainable_parameter_is_told():
    with pytest.raises(ValueError, match='frozen'): learner(net().requires_grad_(False)).fit(1)


class Syncs(TorchDispatchMode):
    "Counts what would make the host wait for a device"
    names = '_local_scalar_dense', 'is_nonzero', 'nonzero', 'equal.', 'unique', 'masked_select'
    def __init__(self):
        super().__init__()
        self.seen, self.where = [], None
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(n in name for n in self.names) and 'foreach' not in name: self.seen.append((self.where, name))
        if '_to_copy' in name and (kwargs or {}).get('device') is not None: self.seen.append((self.where, name))
        return func(*args, **(kwargs or {}))


def test_no_synchronisation_in_a_step():
    mode = Syncs()
    def mark(learn): mode.where = (learn.epoch, learn.training, learn.iter)
    def unmark(learn): mode.where = None
    cbs = [at('before_batch', mark, order=-1000), at('after_batch', unmark, order=1000),
           SanityCheck(look='log', every=4), Metrics(accuracy), Progress(), GradientClip(1.), GradientAccumulation(2)]
    learn = learner(train=[4] * 10, valid=[4] * 3, cbs=cbs)
    with mode: learn.fit(2)
    steps = {w for w, _ in mode.seen if w}
    first = {(0, True, 0), (1, True, 0), (0, False, 0), (1, False, 0)} # Looked at by the checks of first batches
    assert steps - first == {(e, True, i) for e in (0, 1) for i in (3, 7)}, mode.seen
    assert sum(w is not None and w not in first for w, _ in mode.seen) == 4


def test_map_tensors_leaves_what_it_was_given():
    inner = dict(a=torch.ones(1))
    map_tensors(lambda t: t + 1, [inner])
    assert inner['a'] == 1


# A model that is called in 16 bits

class Half(Callback):
    "What anybody may write"
    def around_forward(self, learn, proceed):
        with torch.autocast('cpu', torch.float16): proceed()
        learn.pred = learn.pred.float()


class Grows(nn.Module):
    "Overflows float16 from the third training batch on"
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.n = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), 0
    def forward(self, x):
        self.n += self.training
        return self.b(self.norm(self.a(x)) * (1e6 if self.n > 2 else 1))


@quiet
@pytest.mark.parametrize('make', [Half, partial(MixedPrecision, torch.float16), partial(AMP, torch.float16)])
@pytest.mark.parametrize('ends', [True, False])
def test_an_overflow_in_16_bits_late_in_a_fit_is_found_where_it_was(make, ends):
    learn = learner(Grows(), train=[8] * 5, valid=(), cbs=[make(), *[TerminateOnNaN()] * ends])
    found = []
    def fit():
        try: learn.fit(1)
        except FloatingPointError as e: found.append(str(e))
    found += told(fit)
    text = next(text for text in found if 'in batch 2' in text)
    assert 'it began in the output of layer b (Linear) in float16' in text and 'or use bfloat16' in text
