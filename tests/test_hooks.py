"What hooks see is what was there, whatever comes after it, and nothing of it is left when they are off."
import gc
import warnings
import weakref
from collections import namedtuple
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from dlfound.hooks import (ActivationStats, BatchTransform, GeneralReLU, Hook, Hooks, cnn_layers, conv_block, init_cnn)
from dlfound.init import gain
from dlfound.learner import CancelBatch, Callback, DataLoaders, Learner, TrainingLoop
from dlfound.sanity import SanityWarning
from dlfound.state import named_tensors

Pair = namedtuple('Pair', 'x y')


def net(inplace=False): return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 3))
def nothing(*_): pass
def left(model): return sum(len(m._forward_hooks) for m in model.modules())


def loop(model, *cbs, n=3, valid=2, size=8, x=None, loss=F.cross_entropy, **kw):
    def batch(): return (torch.randn(size, 4) if x is None else x), torch.randint(3, (size,))
    return TrainingLoop(DataLoaders([batch() for _ in range(n)], [batch() for _ in range(valid)]), model, loss,
                        cbs=cbs, **kw)


class Called(nn.Module):
    "Calls `f(self, x)`, with the layers that it is given"
    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for name, m in layers.items(): self.add_module(name, m)
    def forward(self, x): return self.f(self, x)


# One hook

@pytest.mark.parametrize('returned', [None, 0, torch.zeros(1), 'output'])
def test_what_the_function_returns_is_ignored(returned):
    model, x = net(), torch.randn(2, 4)
    want = model(x)
    with Hook(model[0], lambda *_: returned): assert torch.equal(model(x), want)


def test_the_function_is_called_without_gradients_and_told_all():
    model, x, told = net(), torch.randn(2, 4), []
    def f(hook, module, inputs, output): told.append((hook, module, inputs[0] is x, output.mean().requires_grad))
    hook = Hook(model[0], f, 'first')
    model(x)
    assert told == [(hook, model[0], True, False)] and hook.name == 'first' and hook.calls == 1
    hook.remove()
    hook.remove()
    model(x)
    assert len(told) == 1 and left(model) == 0


def test_what_is_no_function_is_refused_at_once():
    with pytest.raises(TypeError, match='calls a function'): Hook(nn.ReLU(), 'std')
    with pytest.raises(TypeError, match='calls a function'): Hooks(model := net(), None)
    assert left(model) == 0


@pytest.mark.parametrize('structure, names', [
    (torch.ones(1), ['']), ((torch.ones(1), [torch.ones(1)]), ['[0]', '[1][0]']),
    (dict(loss=torch.ones(1), parts={1: torch.ones(1)}), ["['loss']", "['parts'][1]"]),
    (Pair(torch.ones(1), None), ['[0]']), (None, []), ('text', []), ([], [])])
def test_tensors_have_names_by_their_place(structure, names):
    assert [name for name, _ in named_tensors(structure)] == names


def test_hooks_may_be_removed_in_any_order_also_where_something_was_compiled():
    model = net()
    compiled = torch.compile(model, backend='eager')
    compiled(x := torch.randn(2, 4))
    a, b = Hooks(model, note := lambda hook, *_: told.append(hook.name)), Hooks(model, note)
    told = []
    a.remove()
    compiled(x)
    assert told == ['0', '1', '2']
    b.remove()
    assert torch._dynamo.eval_frame._stance.stance == 'default'


@pytest.mark.parametrize('how', ['forward', 'function'])
def test_compiled_code_around_a_module_is_seen_through(how):
    model, x, told = net(), torch.randn(2, 4), []
    if how == 'forward': model.forward = torch.compile(model.forward, backend='eager')
    call = torch.compile(lambda x: model(x), backend='eager') if how == 'function' else model
    call(x)
    with Hooks(model, lambda hook, *_: told.append(hook.name)): call(x)
    assert told == ['0', '1', '2']


def test_a_layer_whose_weight_is_computed_is_looked_at_and_its_weight_is_not():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU())
    assert [hook.name for hook in Hooks(model, nothing)] == ['0', '1']
    before = model[0].weight.clone()
    init_cnn(model)
    assert_close(model[0].weight, before)


def test_a_number_is_the_name_of_a_layer_in_a_sequence():
    with Hooks(net(), nothing, [0, 2]) as hooks: assert [hook.name for hook in hooks] == ['0', '2']


def test_a_parameter_that_is_given_keeps_no_hooks():
    model, n = Called(lambda m, x: x + m.token(x).sum(), token=Called(lambda m, x: m.p)), 0
    model.token.p = nn.Parameter(torch.ones(3))
    def count(hook, module, gradient):
        nonlocal n
        n += 1
    for _ in range(3):
        with Hooks(model, count, 'token', gradient=True): model(torch.ones(2)).sum().backward()
    assert n == 3


# Gradients

def reference(model, x, layers):
    "Gradients of the sum of squares at the outputs of layers, by autograd, from a model without operations in place"
    outputs = []
    handles = [m.register_forward_hook(lambda m, i, o: outputs.append(o)) for m in layers]
    loss = model(x).square().sum()
    for h in handles: h.remove()
    return torch.autograd.grad(loss, outputs)


def shortcut(m, x):
    h = m.a(x)
    h += x
    return m.act(m.b(h))


@pytest.mark.parametrize('f', [
    lambda m, x: m.b(m.act(m.a(x))), lambda m, x: m.act(m.b(m.act(m.a(x)))),
    lambda m, x: m.act(m.flat(m.b(m.a(x)))), lambda m, x: m.b(m.act(m.flat(m.a(x)))), shortcut])
def test_gradients_in_front_of_operations_in_place(f):
    models = []
    for inplace in (False, True):
        torch.manual_seed(0)
        models.append(Called(f, a=nn.Linear(4, 4), b=nn.Linear(4, 4), act=nn.ReLU(inplace), flat=nn.Flatten()))
    x, found = torch.randn(3, 4), {}
    with Hooks(models[1], lambda hook, m, g: found.update({hook.name: g.clone()}), ['a', 'b'], gradient=True):
        models[1](x).square().sum().backward()
    if f is shortcut: models[0].f = lambda m, x: m.act(m.b(m.a(x) + x))
    want = reference(models[0], x, [models[0].a, models[0].b])
    assert_close([found['a'], found['b']], list(want))


def test_a_view_that_is_written_over_keeps_its_gradient_and_its_value():
    torch.manual_seed(0)
    model, x, found = nn.Sequential(nn.Linear(4, 6), nn.Flatten(0), nn.ReLU(inplace=True)), torch.randn(2, 4), {}
    want = model(x).detach()
    with Hooks(model, lambda hook, m, g: found.update({hook.name: g.clone()}), gradient=True):
        out = model(x)
        out.sum().backward()
    assert torch.equal(out, want) and torch.equal(found['1'], (want > 0).float()) and len(found) == 3


def test_each_tensor_and_each_call_has_its_gradient():
    told, lstm = [], nn.LSTM(4, 3)
    with Hook(lstm, lambda hook, m, g: told.append((hook.call, hook.part, g.shape)), gradient=True):
        first, second = lstm(torch.randn(5, 2, 4)), lstm(torch.randn(5, 2, 4))
        (first[0].sum() + first[1][1].sum() + second[1][0].sum()).backward()
    assert {(call, part) for call, part, _ in told} >= {(1, '[0]'), (1, '[1][1]'), (2, '[1][0]')}
    assert all(len(shape) == 3 for *_, shape in told)


def test_gradients_stay_away_after_removal_and_where_there_are_none():
    model, told = net(), []
    hooks = Hooks(model, lambda *a: told.append(a), gradient=True)
    with torch.no_grad(): model(torch.randn(2, 4))
    loss = model(torch.randn(2, 4)).sum()
    hooks.remove()
    loss.backward()
    assert told == [] and left(model) == 0


@pytest.mark.parametrize('make', [lambda t: Pair(t, t * 2), lambda t: dict(a=t, b=[t[:1]]),
                                  lambda t: (t, 'text', None)])
def test_structures_pass_through_a_gradient_hook(make):
    layer = Called(lambda m, x: make(m.a(x)), a=nn.Linear(4, 4))
    with Hook(layer, nothing, gradient=True): out = layer(torch.randn(2, 4))
    plain = layer(torch.randn(2, 4))
    assert type(out) is type(plain) and len(out) == len(plain)


# Many hooks

def names(model, which=None):
    with Hooks(model, nothing, which) as hooks: return [hook.name for hook in hooks]


def test_modules_by_class_name_and_predicate():
    model = nn.Sequential(net(), nn.ModuleDict(dict(a=nn.Linear(3, 3))))
    assert names(model) == ['0.0', '0.1', '0.2', '1.a'] and names(model[0][0]) == [''] and names(model, '') == ['']
    assert names(model, nn.Linear) == names(model, [nn.Linear, '0.0']) == ['0.0', '0.2', '1.a']
    assert names(model, (nn.ReLU, '0')) == ['0', '0.1'] and names(model, {'1.a', '0.0'}) == ['0.0', '1.a']
    assert names(model, lambda m: getattr(m, 'out_features', 0) == 3) == ['0.2', '1.a']
    assert names(model, model[0]) == ['0']


@pytest.mark.parametrize('which', ['2.x', nn.Conv2d, ['0', 'nine'], lambda m: False, [nn.Linear, nn.LSTM]])
def test_what_is_not_there_is_named(which):
    model = net()
    with pytest.raises(ValueError, match=r"is no module of the model; there are: '' \(Sequential\), '0' \(Linear\)"):
        Hooks(model, nothing, which)
    assert left(model) == 0


def test_a_tied_module_has_one_hook_under_the_name_that_was_asked_for():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict(dict(a=layer, b=layer))
    assert names(model) == ['a'] and names(model, 'b') == ['b'] and names(model, ['b', 'a']) == ['b']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(error):
    model = net()
    def fail(*_): raise error('here')
    with pytest.raises(error), Hooks(model, fail): model(torch.randn(2, 4))
    with pytest.raises(error), Hooks(model, fail, gradient=True): model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(error), Hooks(model, nothing): raise error
    model(torch.randn(2, 4)).sum().backward()
    assert left(model) == 0
    class Stubborn(nn.ReLU):
        def register_forward_hook(self, *args, **kwargs): raise error('not me')
    model.append(Stubborn())
    with pytest.raises(error, match='not me'): Hooks(model, nothing)
    assert left(model) == 0


def test_hooks_are_a_sequence():
    hooks = Hooks(net(), nothing)
    assert len(hooks) == 3 and hooks[0] in hooks and [h.name for h in hooks[1:]] == ['1', '2']
    hooks.remove()
    hooks.remove()


def test_layers_that_a_fast_path_leaves_out_are_seen():
    "PyTorch's encoder layer runs without its parts in evaluation, unless they have hooks"
    model, told = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), []
    with torch.no_grad(), Hooks(model, lambda hook, *_: told.append(hook.name)): model(torch.randn(2, 5, 8))
    assert {'linear1', 'linear2', 'norm1', 'norm2'} <= {*told}


@pytest.mark.parametrize('how', ['torch.compile', 'module.compile'])
def test_a_model_that_was_compiled_before(how):
    model, x, told = net(), torch.randn(8, 4), []
    if how == 'torch.compile': compiled = torch.compile(model, backend='eager')
    else: (compiled := model).compile(backend='eager')
    want = compiled(x)
    with Hooks(compiled, lambda hook, *_: told.append(hook.name)): assert_close(compiled(x), want)
    assert len(told) == 3
    compiled(x)
    assert len(told) == 3 and left(compiled) == 0
    hooks = Hooks(compiled, lambda hook, *_: told.append(hook.name))
    compiled(x)
    hooks.remove()
    compiled(x)
    assert len(told) == 6
    stats = ActivationStats()
    fit = loop(compiled, stats)
    fit.fit(1)
    assert [len(v) for v in stats.series().values()] == [3, 3, 3]
    grads = ActivationStats(gradient=True)
    fit.fit(1, cbs=grads)
    assert len(grads.series()) == 3


def test_nothing_is_kept_alive():
    model, seen = net(), []
    gc.disable()
    with Hook(model[0], lambda hook, module, inputs, output: seen.append(weakref.ref(output))):
        loop(model, ActivationStats(bins=4), ActivationStats(gradient=True), n=2, valid=0).fit(1)
    gc.enable()
    assert [ref() for ref in seen] == [None, None]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Statistics

floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def given_to(stats, t):
    "What a callback says of a layer whose output is `t`"
    learn = loop(nn.Identity(), stats, n=1, valid=0, x=t, loss=lambda p, y: torch.zeros((), requires_grad=True),
                 opt_func=lambda params, lr: torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr))
    learn.weight = learn.batch_size = lambda: 1
    learn.fit(1)
    return {what: v[0] for what in ('mean', 'std', 'dead', 'nonfinite', 'hist')
            for v in stats.series(what).values()}


@given(shapes, st.sampled_from(floats), st.integers(0, 999), st.sampled_from([1e-3, 1., 200.]), st.integers(-1, 3))
@settings(max_examples=60, deadline=None)
def test_statistics_of_any_shape_and_dtype(shape, dtype, seed, scale, unit_dim):
    torch.manual_seed(seed)
    t = (torch.randn(shape) * scale + scale).to(dtype) * (torch.rand([1, *shape[1:]]) > .5)
    found, x = given_to(ActivationStats(unit_dim=unit_dim, bins=8, span=2.), t), t.double()
    assert float(found['mean']) == pytest.approx(float(x.mean()), rel=1e-3, abs=1e-4 * scale)
    assert float(found['std']) == pytest.approx(float(x.std(correction=0)), rel=1e-3, abs=1e-4 * scale)
    inside = -x.ndim <= unit_dim < x.ndim
    units = x.movedim(unit_dim, 0).reshape(x.shape[unit_dim], -1) if inside else x.flatten()[None]
    dead = (units == units[:, :1]).all(1).double().mean() if units.shape[1] > 1 else torch.nan
    assert float(found['dead']) == pytest.approx(float(dead), abs=1e-6, nan_ok=True)
    assert float(found['nonfinite']) == 0 and float(found['hist'].sum()) == x.numel()
    assert float(found['hist'][:4].sum()) == float((x.float() < 0).sum())


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.sampled_from(floats))
@settings(max_examples=30, deadline=None)
def test_nan_and_inf_are_counted(nans, infs, minus, dtype):
    t = torch.linspace(-3, 3, 24).to(dtype)
    for value, begin, n in (torch.nan, 0, nans), (torch.inf, 6, infs), (-torch.inf, 12, minus):
        t[begin:begin + n] = value
    found = given_to(ActivationStats(bins=4, span=1.), t.view(6, 4))
    assert float(found['nonfinite']) == pytest.approx((nans + infs + minus) / 24)
    assert float(found['hist'].sum()) == 24 - nans
    assert bool(found['mean'].isfinite()) == (nans + infs + minus == 0)


def test_numbers_of_half_precision_are_counted_in_float32():
    found = given_to(ActivationStats(), torch.tensor([60000., -60000.], dtype=torch.float16).repeat(512)[:, None])
    assert found['std'] == pytest.approx(60000) and found['mean'] == 0


def test_what_has_no_statistics_is_left_out():
    for t in torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), torch.ones(0, 3):
        assert given_to(ActivationStats(), t) == {}
    assert given_to(ActivationStats(), torch.full((4, 2), 3 + 4j)) == {}
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert given_to(ActivationStats(), nested) == {}
    assert given_to(ActivationStats(), torch.full((4, 2), torch.nan))['dead'].isnan()


def test_an_in_place_activation_changes_nothing():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        loop(net(inplace), stats := ActivationStats()).fit(1)
        found.append(stats.series('mean'))
    assert_close(*found, rtol=0, atol=0)


# In a loop

def test_training_only_and_every_so_many():
    stats, some = ActivationStats(), ActivationStats('0', every=3)
    learn = loop(net(), stats, some, n=5)
    learn.fit(2)
    assert {k: v.tolist() for k, v in stats.series('batch').items()} == {k: [*range(10)] for k in '012'}
    assert some.series('batch')['0'].tolist() == [0, 3, 6, 9] and left(learn.model) == 0
    assert torch.equal(some.series()['0'], stats.series()['0'][::3])


def test_what_a_callback_asks_the_model_is_not_counted():
    class Asks(Callback):
        def before_batch(self, learn): learn.model(learn.batch[0])
        after_pred = before_batch
    loop(net(), Asks(), stats := ActivationStats()).fit(1)
    assert len(stats.series()) == 3


def test_several_calls_and_several_tensors_have_rows_of_their_own():
    model = Called(lambda m, x: m.out(m.act(m.b(m.act(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), act=nn.ReLU(),
                   out=nn.Linear(4, 3))
    loop(model, stats := ActivationStats(), grads := ActivationStats(gradient=True)).fit(1)
    assert [*stats.series()] == ['a', 'act', 'b', 'act (2)', 'out'] and {*grads.series()} == {*stats.series()}
    reader = Called(lambda m, x: m.lstm(x[:, None])[0][:, 0], lstm=nn.LSTM(4, 3))
    loop(reader, stats := ActivationStats()).fit(1)
    assert [*stats.series()] == ['lstm[0]', 'lstm[1][0]', 'lstm[1][1]']


def test_gradients_over_time_equal_those_of_autograd():
    torch.manual_seed(0)
    model, stats = net(inplace=True), ActivationStats(gradient=True)
    learn = loop(model, stats, lr=0., n=2)
    learn.fit(1)
    x, y = learn.dls.train[1]
    before = model[0](x).detach().requires_grad_()
    F.cross_entropy(model[2](F.relu(before)), y).backward()
    assert stats.series('mean')['0'][1] == pytest.approx(float(before.grad.mean()), abs=1e-7)
    assert left(model) == 0


def test_a_layer_that_is_never_called_is_named_once():
    model = Called(lambda m, x: m.a(x), a=nn.Linear(4, 3), spare=nn.Linear(4, 3))
    with pytest.warns(SanityWarning, match='no forward called spare') as caught:
        loop(model, stats := ActivationStats()).fit(2)
    assert len(caught) == 1 and [*stats.series()] == ['a']


@pytest.mark.parametrize('gradient', [False, True])
@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_backward', 'after_step', 'before_validate'])
def test_after_an_error_there_are_no_hooks_and_what_was_seen_is_there(event, gradient):
    class Fails(Callback): pass
    def fail(self, learn): raise ZeroDivisionError
    setattr(Fails, event, fail)
    stats = ActivationStats(gradient=gradient)
    learn = loop(net(), stats, Fails())
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert left(learn.model) == 0
    if not gradient: assert len(stats.series()) == 3


def test_an_error_in_the_model_leaves_nothing_either():
    def fail(m, x): raise ZeroDivisionError
    model = nn.Sequential(nn.Linear(4, 3), Called(fail, a=nn.Linear(1, 1)))
    with pytest.raises(ZeroDivisionError): loop(model, ActivationStats()).fit(1)
    assert left(model) == 0


@pytest.mark.parametrize('gradient', [False, True])
def test_a_batch_that_is_left_early(gradient):
    class Leaves(Callback):
        def after_pred(self, learn): raise CancelBatch
    learn = loop(net(), stats := ActivationStats(gradient=gradient), Leaves())
    learn.fit(1)
    assert left(learn.model) == 0 and len(stats.series()) == (0 if gradient else 3)


def test_a_fit_is_the_same_with_it():
    found = []
    for cbs in [], [ActivationStats(bins=8), ActivationStats(gradient=True)]:
        torch.manual_seed(0)
        learn = loop(net(inplace=True), *cbs)
        learn.fit(2)
        found.append([p.detach() for p in learn.model.parameters()])
    assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize('gradient', [False, True])
def test_a_copy_of_the_model_made_in_training_has_no_hooks(gradient):
    class Copies(Callback):
        def after_step(self, learn): self.copy = deepcopy(learn.model)
    loop(net(), ActivationStats(gradient=gradient), copies := Copies()).fit(1)
    assert left(copies.copy) == 0


def test_it_goes_on_from_its_state():
    torch.manual_seed(0)
    model, stats, later = net(), ActivationStats(bins=4), ActivationStats(bins=4)
    loop(model, stats).fit(1)
    later.load_state_dict(stats.state_dict())
    loop(model, later).fit(1)
    assert later.series('batch')['0'].tolist() == [*range(6)]
    assert torch.equal(later.series()['1'][:3], stats.series()['1'])


def test_questions_that_have_no_answer():
    loop(net(), stats := ActivationStats()).fit(1)
    with pytest.raises(ValueError, match=r"there is .*'std'.* of \['0', '1', '2'\], not std of \['9'\]"):
        stats.series(layers='9')
    with pytest.raises(ValueError, match='not median of'): stats.series('median')
    with pytest.raises(ValueError, match='pass bins=80'): stats.plot_hist()


def test_pictures_have_axes_with_labels():
    import matplotlib
    matplotlib.use('agg')
    loop(net(), stats := ActivationStats(bins=8), n=2).fit(1)
    ax = stats.plot('mean', ['0', '2'])
    assert (ax.get_xlabel(), ax.get_ylabel(), len(ax.lines)) == ('batches', 'mean', 2)
    axes = stats.plot_hist(['0', '2'])
    assert [a.get_ylabel() for a in axes] == ['0', '2'] and axes[-1].get_xlabel() == 'batches'
    assert stats.plot_hist('1').shape == (1,) and stats.plot('dead', ax=ax) is ax


def test_in_a_learner_with_its_checks():
    torch.manual_seed(0)
    x, y = torch.randn(32, 16), torch.randint(3, (32,))
    model = nn.Sequential(conv_block(1, 4), nn.Flatten(), nn.Linear(16, 3))
    learn = Learner(DataLoaders([(x, y)], [(x, y)]), model, F.cross_entropy, progress=False,
                    cbs=[BatchTransform(lambda t: t.view(-1, 1, 4, 4)), ActivationStats()])
    with warnings.catch_warnings(action='error'): learn.fit(1)
    assert learn.get_preds()[0].shape == (32, 3) and learn.predict(x[0]).shape == (3,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_statistics_on_a_gpu():
    t = torch.randn(8, 4, 3, 3)
    want = given_to(ActivationStats(bins=8), t)
    assert_close(given_to(ActivationStats(bins=8), t.cuda()), want, rtol=1e-4, atol=1e-5)


# Batches, blocks, activations, initial weights

def test_transforms_of_batches():
    seen = []
    class Look(Callback):
        def before_batch(self, learn):
            x, y = learn.batch
            seen.append((learn.training, type(learn.batch), x.mean(), y.float().mean()))
    x, y = torch.ones(2, 4), torch.ones(2, dtype=torch.long)
    twice = BatchTransform(lambda t: 2 * t)
    train_only = BatchTransform(lambda batch: (batch[0] + 1, batch[1] * 0), whole=True, validation=False)
    dls = DataLoaders([[x, y]], [(x, y)])
    TrainingLoop(dls, nn.Linear(4, 3), F.cross_entropy, cbs=[Look(), twice, train_only]).fit(1)
    assert seen == [(True, tuple, 3, 0), (False, tuple, 2, 1)]


def test_a_transform_sees_the_batch_where_the_device_put_it():
    assert Callback.order > BatchTransform.order > -100


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(5, 12),
       st.booleans())
@settings(max_examples=30, deadline=None)
def test_blocks_of_any_size(n_in, n_out, kernel_size, stride, side, norm):
    block = conv_block(n_in, n_out, kernel_size, stride, norm=nn.BatchNorm2d if norm else None)
    out = -(-side // stride)
    assert block(torch.randn(2, n_in, side, side)).shape == (2, n_out, out, out)
    assert (block[0].bias is None) == norm and len(conv_block(n_in, n_out, act=None)) == 1


def test_layers_for_other_pictures():
    model = nn.Sequential(*cnn_layers((4, 6), n_in=3, n_out=7, act=nn.Tanh, norm=nn.BatchNorm2d))
    assert model(torch.randn(2, 3, 17, 9)).shape == (2, 7) and type(model[1][2]) is nn.Tanh


@given(st.sampled_from([0., .1, .5]), st.floats(0, 1), st.sampled_from([None, .5, 6.]), st.sampled_from(floats))
@settings(max_examples=40, deadline=None)
def test_the_activation_and_its_gradient(leak, sub, top, dtype):
    act = GeneralReLU(leak, sub, top)
    x = torch.tensor([-torch.inf, -3., -.5, 0., .3, 2., 9., torch.inf, torch.nan], dtype=dtype)
    want = torch.where(x < 0, x * leak if leak else torch.zeros_like(x), x) - sub
    assert_close(act(x), want if top is None else want.clamp(max=top), equal_nan=True)
    y = torch.tensor([-2., -.4, .3, 4.], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, y)


@pytest.mark.parametrize('f, want', [(F.relu, gain('relu')), (GeneralReLU(.1), gain('leaky_relu', .1)),
                                     (lambda x: x, 1.), (torch.tanh, 1.5925), (F.selu, 1.),
                                     (GeneralReLU(0., .4), 1.7152)])
def test_gains_of_activations(f, want):
    torch.manual_seed(0)
    weight = init_cnn(nn.Linear(1500, 1500), f).weight
    assert weight.std().item() * 1500**.5 == pytest.approx(want, rel=5e-3)


def test_init_leaves_alone_what_it_does_not_know():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2),
                          nn.Conv1d(3, 50, 5))
    before = deepcopy(model.state_dict())
    assert init_cnn(model) is model
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'0.weight', '3.weight', '3.bias'} and not model[3].bias.any()
    assert model[0].weight.std().item() == pytest.approx((2 / 18)**.5, rel=.2)
    assert all(p.requires_grad for p in model.parameters())
