"The loop equals one by hand bit for bit, leaves nothing behind however a fit ends, and says what is wrong."
import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import at, batches, by_hand, learner, loss_func, net, no_workers, raiser, same
from torch import nn

from dlfound.learner import (Callback, CancelBatch, CancelEpoch, CancelFit, DataLoaders, GradientAccumulation,
                             GradientClip, Learner, Metric, Recorder, SanityCheck, ShortEpoch, SingleBatch,
                             TrainingLoop)
from dlfound.loop import Callbacks
from dlfound.minibatch import Dataset, accuracy

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


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


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward'])
def test_a_cancelled_batch_leaves_no_gradient(event):
    def f(learn):
        if learn.training and learn.iter == 1: raise CancelBatch
    model = net()
    wanted = by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.SGD, skip=[1])
    learner(model, cbs=at(event, f)).fit(2)
    assert same(model, wanted)


@pytest.mark.parametrize('exception', [CancelEpoch, CancelFit])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward'])
def test_a_cancelled_epoch_or_fit_leaves_no_gradient(event, exception):
    def f(learn):
        if learn.epoch == 0 and learn.training and learn.iter == 2: raise exception
    model = net()
    wanted = by_hand(batches(8, 8), copy.deepcopy(model), torch.optim.SGD, epochs=1)
    learn = learner(model, cbs=at(event, f))
    learn.fit(2)
    if exception is CancelEpoch: wanted = by_hand(batches(8, 8, 5), wanted, torch.optim.SGD, epochs=1)
    assert same(model, wanted) and all(p.grad is None for p in model.parameters())
    assert [r['epoch'] for r in learn[Recorder].rows] == ([0, 1] if exception is CancelEpoch else [])


def test_a_fit_can_begin_anywhere():
    "The batches before are neither trained on nor counted"
    seen, model = [], net()
    wanted = by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.SGD, epochs=1, skip=[0])
    wanted = by_hand(batches(8, 8, 5), wanted, torch.optim.SGD, epochs=1)
    learner(model, cbs=at('before_batch', lambda learn: seen.append((learn.epoch, learn.training, learn.iter)))).fit(
        4, start=(2, 1))
    assert same(model, wanted) and seen[:3] == [(2, True, 1), (2, True, 2), (2, False, 0)] and seen[-1][0] == 3


# The optimizer

def test_a_second_fit_keeps_the_state_and_says_so_once():
    model = net()
    wanted = by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.Adam, epochs=3)
    learn = learner(model, opt=torch.optim.Adam)
    with pytest.warns(UserWarning) as caught:
        for _ in range(3): learn.fit(1)
    assert same(model, wanted) and sum('reset_opt=True' in str(w.message) for w in caught) == 1


@pytest.mark.filterwarnings('error:the optimizer goes on')
def test_an_optimizer_without_state_goes_on_in_silence():
    learn = learner()
    learn.fit(1), learn.fit(1)


def test_reset_opt_starts_afresh():
    model = net()
    wanted = by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.Adam, epochs=1)
    wanted = by_hand(batches(8, 8, 5), wanted, torch.optim.Adam, epochs=1)
    learn = learner(model, opt=torch.optim.Adam)
    learn.fit(1)
    learn.fit(1, reset_opt=True)
    assert same(model, wanted)


def two_groups(params, lr):
    a, *b = params
    return torch.optim.SGD([dict(params=[a], lr=lr / 10), dict(params=b, lr=lr)])


def test_groups_keep_their_ratios():
    learn = learner(opt=two_groups)
    learn.fit(1, .2)
    assert [g['lr'] for g in learn.opt.param_groups] == pytest.approx([.02, .2])
    learn.fit(1, .5)
    assert [g['lr'] for g in learn.opt.param_groups] == pytest.approx([.05, .5])
    learn.lr = 7. # Too late: the optimizer is made
    learn.opt.param_groups[0]['lr'] = learn.opt.param_groups[1]['lr'] = 0. # As a schedule may leave it
    learn.fit(1)
    assert [g['lr'] for g in learn.opt.param_groups] == [.01, .1]


def test_an_optimizer_of_ones_own_keeps_its_rate():
    learn = learner()
    learn.opt = torch.optim.Adam(learn.model.parameters(), lr=1e-3)
    learn.fit(1)
    assert learn.opt.param_groups[0]['lr'] == 1e-3
    learn.fit(1, .5)
    assert learn.opt.param_groups[0]['lr'] == .5


def test_a_rate_in_a_tensor_stays_that_tensor():
    learn = learner(opt=lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr)))
    learn.fit(1)
    held = learn.opt.param_groups[0]['lr']
    learn.fit(1, .5)
    assert learn.opt.param_groups[0]['lr'] is held and held == .5


# A loss that is a module

class Learnt(nn.Module):
    "A loss with parameters of its own, as in learnt temperatures or centres"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer('seen', torch.zeros(()), persistent=False)
    def forward(self, pred, target):
        self.seen += self.training
        return loss_func(pred * self.scale, target)


def test_a_loss_with_parameters_is_trained_saved_and_restored(tmp_path):
    loss = Learnt()
    learn = learner(loss=loss)
    learn.fit(2)
    assert loss.scale != 1 and loss.seen == 6 and loss.training
    learn.save(tmp_path / 'w.safetensors')
    other = learner(loss=Learnt())
    other.load(tmp_path / 'w.safetensors')
    assert other.loss_func.scale == loss.scale and same(other.model, learn.model)
    again = learner(net(3), loss=Learnt())
    again.load_state_dict(learn.state_dict())
    assert again.loss_func.scale == loss.scale and again.loss_func.seen == 6 and same(again.model, learn.model)


def test_a_loss_that_knows_the_model_trains_it_once():
    class Decayed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def forward(self, pred, target): return loss_func(pred, target) + 1e-3 * self.model[0].weight.square().sum()
    model = net()
    learn = learner(model, loss=Decayed(model), cbs=[GradientAccumulation(2), GradientClip(1.)])
    learn.fit(1)
    assert len(learn.opt.param_groups[0]['params']) == 4


@pytest.mark.parametrize('wrap', [lambda v: dict(kl=v * 0, loss=v), lambda v: (v, v * 0),
                                  lambda v: dict(main=v, other=v * 2)])
def test_of_several_losses_one_is_trained_on(wrap):
    model = net()
    wanted = by_hand(batches(8, 8, 5), copy.deepcopy(model), torch.optim.SGD)
    learn = learner(model, loss=lambda p, t: wrap(loss_func(p, t)))
    learn.fit(2)
    assert same(model, wanted)
    names = set(learn.row)
    assert names >= {'train_loss', 'valid_loss'}
    if 'train_other' in names: assert learn.row['train_other'] == pytest.approx(2 * learn.row['train_loss'])


# Callbacks

@pytest.mark.parametrize('name, near', [('after_bach', 'after_batch'), ('befor_fit', 'before_fit'),
                                        ('around_stepp', 'around_step'), ('after_train_epoch', 'after_cancel_epoch')])
def test_a_misspelt_event_is_refused_when_the_class_is_written(name, near):
    with pytest.raises(TypeError, match=f'{name} is no event.*{near}'):
        type('Odd', (Callback,), {name: lambda self, learn: None})
    class Mixin: pass
    setattr(Mixin, name, lambda self, learn: None)
    with pytest.raises(TypeError, match=name): type('Mixed', (Mixin, Callback), {})


def test_other_names_are_the_callbacks_own():
    class Fine(Callback):
        before, after_all_these_years = 1, 'text'
        def report(self): pass
        def _after_bach(self): pass
    assert Fine().state_dict() == {}


def test_twice_or_a_class_is_refused():
    cb = at('after_fit', lambda learn: None)
    with pytest.raises(ValueError, match='already'): learner(cbs=[cb, cb])
    with pytest.raises(ValueError, match='already'): learner(cbs=[Recorder(), Recorder()])
    for wrong in [Recorder], Recorder, ['progress'], 'progress':
        with pytest.raises(TypeError, match='made from Callback is needed'): learner(cbs=wrong)
    with pytest.raises(TypeError, match='made from Callback is needed'): learner().add_cb(len)
    with pytest.raises(ValueError, match='not here'): learner().remove_cb(cb)
    with pytest.raises(KeyError, match='no GradientClip'): learner()[GradientClip]


def test_a_list_of_callbacks_is_told_from_one():
    class Plain:
        def after_loss(self, learn): pass
    class Notes(Callback):
        def __iter__(self): return iter('abc')
    with pytest.raises(TypeError, match=r'is needed, as Recorder\(\), got .*Plain'): learner(cbs=Plain())
    notes = Notes()
    assert list(Callbacks(notes)) == list(Callbacks([notes])) == [notes] and list(Callbacks(None)) == []


def test_of_two_equal_callbacks_one_is_removed():
    @dataclass
    class Equal(Callback):
        n: int = 0
    cbs = Callbacks([a := Equal(), b := Equal()])
    cbs.remove(a)
    assert len(list(cbs)) == 1 and cbs[Equal] is b


def test_a_double_is_named_and_can_be_removed_by_its_base():
    class Mine(Recorder): pass
    learn = learner(cbs=[mine := Mine(), SingleBatch()])
    with pytest.raises(ValueError, match='there is a Mine already; keep one'): learn.add_cb(Recorder())
    with pytest.raises(ValueError, match='there is a SingleBatch already'): learn.add_cb(ShortEpoch(3))
    assert learn.cbs.twin(Recorder()) is mine and learn.cbs.twin(GradientClip(1.)) is None
    learn.remove_cb(Recorder)
    learn.add_cb(new := Recorder())
    assert learn[Recorder] is new


def test_the_list_stays_as_it_is_during_a_fit():
    late = at('before_epoch', lambda learn: None)
    for change in lambda learn: learn.add_cb(late), lambda learn: learn.remove_cb(Recorder):
        learn = learner(cbs=at('before_fit', change))
        before = list(learn.cbs)
        with pytest.raises((RuntimeError, ValueError), match='before the fit|a fit is on'): learn.fit(1)
        assert list(learn.cbs) == before


def test_transient_callbacks_are_gone():
    learn, cb = learner(), at('after_batch', lambda learn: None)
    before = list(learn.cbs)
    learn.fit(1, cbs=[cb, Recorder()])
    assert list(learn.cbs) == before
    for bad in [cb, cb], [cb, Recorder]:
        with pytest.raises((ValueError, TypeError)): learn.fit(1, cbs=bad)
        assert list(learn.cbs) == before
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[cb, at('after_step', raiser(ZeroDivisionError()))])
    assert list(learn.cbs) == before
    learn.fit(1, cbs=cb)


def test_a_transient_one_stands_in_for_its_twin():
    learn, own = learner(), SanityCheck('log')
    seen = []
    learn.fit(1, cbs=[own, at('before_fit', lambda learn: seen.extend(learn.cbs))])
    assert own in seen and sum(isinstance(cb, SanityCheck) for cb in seen) == 1


def test_names_of_several():
    cbs = [at('after_fit', lambda learn: None) for _ in range(3)]
    assert list(Callbacks([*cbs, Recorder()]).named()) == ['At', 'At2', 'At3', 'Recorder']


def test_order_of_events_and_of_steps():
    seen = []
    def make(order):
        class Around(Callback):
            def before_fit(self, learn): seen.append(('event', order))
            def around_step(self, learn, proceed):
                seen.append(('in', order))
                proceed()
                seen.append(('out', order))
        cb = Around()
        cb.order = order
        return cb
    learner(train=[4], cbs=[make(2), make(-1)]).fit(1)
    assert seen == [('event', -1), ('event', 2), ('in', -1), ('in', 2), ('out', 2), ('out', -1)]


def test_a_step_set_from_outside_is_still_there_after_a_fit():
    learn, calls = learner(), []
    learn.zero_grad = lambda: (calls.append(1), learn.opt.zero_grad())
    learn.fit(1)
    assert 'zero_grad' in vars(learn)
    n = len(calls)
    learn.fit(1)
    assert len(calls) == 2 * n


def test_a_callback_names_what_is_kept():
    class Counter(Callback):
        kept = 'n', 'seen'
        def __init__(self): self.n, self.seen = 0, []
        def after_batch(self, learn): self.n, self.seen = self.n + 1, [*self.seen, learn.iter]
    learn = learner(cbs=Counter())
    learn.fit(1)
    other = learner(cbs=Counter())
    other.load_state_dict(learn.state_dict())
    assert other[Counter].n == 5 and other[Counter].seen == [0, 1, 2, 0, 1]


# Failures

def test_an_exception_names_its_callback_and_leaves_all_in_order():
    model, ended = net(0, nn.BatchNorm1d(8)), []
    model[1].eval()
    g = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randn(64, 6, generator=g), torch.randint(3, (64,), generator=g))
    learn = Learner(DataLoaders.from_datasets(ds, ds, 8, num_workers=2), model, loss_func, lr=.1)
    cbs = [at('after_backward', raiser(KeyError('x'))), at('after_fit', lambda learn: ended.append(1))]
    with pytest.raises(KeyError) as e: learn.fit(1, cbs=cbs)
    assert any('At, at after_backward' in n for n in e.value.__notes__) and ended == [1] and no_workers()
    assert model.training and not model[1].training and all(p.grad is None for p in model.parameters())
    learn.fit(1)
    assert model.training and not model[1].training and no_workers()


def test_gradients_are_forgotten_though_a_callback_fails_at_the_end():
    learn = learner(cbs=at('after_fit', raiser(KeyError('x'))))
    with pytest.raises(KeyError): learn.fit(1)
    assert all(p.grad is None for p in learn.model.parameters())


script = '''
import torch
from torch import nn
from dlfound.learner import *
class Stop(Callback):
    def after_batch(self, learn):
        if not learn.training == {training} and learn.iter == 1: raise KeyboardInterrupt
    def after_fit(self, learn): print('ended')
data = [(torch.randn(4, 6), torch.randint(3, (4,)))] * 3
model = nn.Linear(6, 3)
def made(): return Learner(DataLoaders(data, data), model, nn.CrossEntropyLoss())
learn, stop = made(), Stop()
'''


@pytest.mark.parametrize('in_training', [True, False])
def test_ctrl_c_in_a_script_is_raised_again(in_training):
    text = script.format(training=not in_training)
    text += 'try: learn.fit(2, cbs=stop)\nfinally: print(list(learn.cbs).count(stop), model.training)'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', text], capture_output=True, text=True)
    assert done.returncode in (-2, 130, 1) and 'KeyboardInterrupt' in done.stderr, done
    assert 'ended' in done.stdout and done.stdout.endswith('0 True\n'), done


@pytest.mark.parametrize('in_training', [True, False])
def test_ctrl_c_in_a_session_ends_the_cell_and_leaves_a_learner(in_training):
    "A loop over fits ends (case F16); where the fit was is said; the Learner can be used"
    text = script.format(training=not in_training) + '''
from IPython.testing.globalipapp import start_ipython
shell = start_ipython()
shell.push(dict(learn=learn, stop=stop, made=made))
done = shell.run_cell("for lr in .1, .2, .3: print('rate', lr); learn.fit(2, lr, cbs=stop)")
print('raised', done.error_in_exec.__class__.__name__)
learn.fit(1)
print('usable', len(learn[Recorder].rows))
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', text], capture_output=True, text=True)
    where = 'training' if in_training else 'validation'
    assert done.returncode == 0 and done.stdout.count('rate 0.') == 1, done
    assert 'raised KeyboardInterrupt' in done.stdout, done
    assert f'stopped in epoch 0 (the last is 1), {where}: 2 of 3 batches' in done.stdout, done
    assert 'usable 1' in done.stdout, done


@pytest.mark.parametrize('event, exception', [('after_batch', CancelBatch), ('before_fit', CancelEpoch),
                                              ('after_epoch', CancelEpoch), ('after_fit', CancelFit)])
def test_a_cancel_that_nobody_hears_says_so(event, exception):
    learn = learner(cbs=at(event, raiser(exception())))
    with pytest.raises(RuntimeError, match=f'{exception.__name__} came where there was nothing to leave') as info:
        learn.fit(1)
    assert f'the callback At, at {event}' in info.value.__cause__.__notes__[0]
    learn.remove_cb(list(learn.cbs)[0])
    learn.fit(1)


def test_a_fit_in_a_fit_is_refused():
    learn = learner(cbs=at('before_epoch', lambda learn: learn.fit(1)))
    with pytest.raises(RuntimeError, match='at work'): learn.fit(1)


# Batches of other shapes

@pytest.mark.parametrize('wrap', [lambda y: (y, y, y), lambda y: [y, y], lambda y: dict(a=y, b=dict(c=y)),
                                  lambda y: [dict(c=int(i)) for i in y], lambda y: y.sum()])
def test_examples_are_counted_in_targets_of_several_parts(wrap):
    train = [(x, wrap(y)) for x, y in batches(8, 8, 5)]
    learn = Learner(DataLoaders(train), net(), lambda pred, t: pred.square().mean())
    learn.fit(1)
    losses = learn[Recorder].losses
    assert learn.row['train_loss'] == pytest.approx(sum(v * n for v, n in zip(losses, (8, 8, 5))) / 21)


def test_images_of_several_sizes_are_counted_by_their_targets():
    "As in detection: a tuple of images and a tuple of dicts, with as many boxes as it happens"
    loop = TrainingLoop(None, net(), None)
    boxes = dict(boxes=torch.zeros(7, 4)), dict(boxes=torch.zeros(1, 4))
    loop.batch = (torch.zeros(3, 4), torch.zeros(3, 5)), boxes
    assert loop.batch_size() == 2


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


def test_a_loader_is_not_closed_and_need_not_know_its_length():
    learn = Learner(DataLoaders(Reader()), net(), loss_func)
    learn.fit(2)
    assert len(learn[Recorder].losses) == 4


# State

class Odd(nn.Module):
    "Batch norm, tied weights, a buffer that PyTorch does not save, channels last, extra state"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm, self.a, self.b = nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight, self.extra = self.a.weight, 'none'
        self.register_buffer('seen', torch.zeros(()), persistent=False)
    def get_extra_state(self): return self.extra
    def set_extra_state(self, state): self.extra = state
    def forward(self, x):
        self.seen, self.extra = self.seen + 1, 'some'
        return self.b(self.a(self.norm(self.conv(x)).mean((2, 3))))


def test_a_loop_that_loads_a_state_goes_on_alike():
    def made():
        torch.manual_seed(0)
        g = torch.Generator().manual_seed(1)
        data = Dataset(torch.randn(40, 3, 5, 5, generator=g), torch.randint(4, (40,), generator=g))
        dls = DataLoaders.from_datasets(data, data, 8, generator=torch.Generator().manual_seed(2))
        return Learner(dls, Odd(), loss_func, torch.optim.Adam, lr=.01, progress=False)
    one, two = made(), made()
    one.fit(2)
    state = copy.deepcopy(one.state_dict())
    assert state['position'] == dict(epoch=1, batch=3, row=one.row)
    one.fit(1)
    torch.rand(7)
    two.load_state_dict(state)
    assert two.model.extra == 'some' and two.model.seen == 16 and two.row == state['position']['row']
    two.fit(1)
    assert same(one.model, two.model) and two.model.a.weight is two.model.b.weight
    assert one[Recorder].losses == two[Recorder].losses and one[Recorder].rows == two[Recorder].rows
    assert two.model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_generators_of_ones_own_are_kept():
    g = torch.Generator().manual_seed(3)
    learn = learner(generators=[g])
    state = learn.state_dict()
    wanted = torch.rand(3, generator=g)
    learn.load_state_dict(state)
    assert torch.equal(torch.rand(3, generator=g), wanted)
    with pytest.raises(ValueError, match='5 states for 4 generators'): learner().load_state_dict(state)


def test_a_copy_is_a_learner_of_its_own():
    learn = learner(metrics=accuracy)
    learn.fit(1)
    other = copy.deepcopy(learn)
    assert same(learn.model, other.model)
    other.fit(1)
    assert not same(learn.model, other.model) and len(learn[Recorder].losses) == 3 and len(other[Recorder].losses) == 6
    learn.fit(1)
    assert same(learn.model, other.model)


# Memory

class Fails(Callback):
    "Raises an exception that nobody keeps"
    kind = KeyError
    def after_backward(self, learn): raise self.kind


class Stops(Fails): kind = KeyboardInterrupt


def use(how, learn):
    if how == 'fit': learn.fit(2)
    elif how == 'validate': learn.validate()
    elif how == 'predict': learn.predict(learn.dls.valid[0][0][0])
    elif how == 'layer':
        try: learn.predict(torch.zeros(5))
        except RuntimeError: pass
    else:
        try: learn.fit(1, cbs=Fails() if how == 'failed' else Stops())
        except (KeyError, KeyboardInterrupt): pass


@pytest.mark.parametrize('how', ['fit', 'failed', 'interrupted', 'validate', 'predict', 'layer'])
def test_freed_by_reference_counting_alone(how):
    gc.collect()
    gc.disable()
    try:
        once = Metric(lambda p, t: 1., 'one', average=False)
        learn = learner(cbs=[GradientClip(1.), GradientAccumulation(2)], metrics=[accuracy, once])
        dead = weakref.ref(learn), weakref.ref(learn.model), weakref.ref(learn.model[0].weight)
        use(how, learn)
        del learn
        assert [d() is None for d in dead] == [True] * 3
    finally: gc.enable()
