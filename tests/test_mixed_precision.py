"Sixteen bits in a forward pass and nowhere else: gradients, state and other features are those of float32."
import warnings
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import batches, by_hand, learner, net
from torch import nn, optim
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dlfound import norm
from dlfound.flat import flat
from dlfound.hooks import ActivationStats
from dlfound.learner import (Callback, DataLoaders, GradientAccumulation, GradientClip, Learner, Recorder,
                             TerminateOnNaN, TrainingLoop)
from dlfound.mixed_precision import AMP, LossScale, MixedPrecision, narrow, sixteen_bits, widen
from dlfound.optimizer import adamw
from dlfound.sanity import SanityWarning
from dlfound.search import lr_find
from dlfound.state import attribute_state, module_state

both = pytest.mark.parametrize('kind', [MixedPrecision, AMP])
halves = pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])


class Overflow(Callback):
    "An infinite gradient in some batches, inside of the scaling"
    def __init__(self, *numbers): self.numbers = numbers
    def around_backward(self, learn, proceed):
        proceed()
        if learn.iter in self.numbers: learn.params[0].grad[0] = torch.inf


def fit(*cbs, epochs=1, **kwargs):
    learn = learner(cbs=cbs, progress=False, **kwargs)
    learn.fit(epochs)
    return learn


def told(f):
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in log if issubclass(w.category, SanityWarning)]


# The scale

@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 29))
def test_scale_is_that_of_gradscaler(bad, interval, at):
    scalers = [LossScale(8., interval), torch.amp.GradScaler('cpu', 8., growth_interval=interval)]
    found = []
    for make, scaler in zip([lambda: LossScale(1., interval),
                             lambda: torch.amp.GradScaler('cpu', 1., growth_interval=interval)], scalers):
        p, seen = nn.Parameter(torch.ones(3)), []
        for n, inf in enumerate(bad):
            if n == at: # Another one goes on
                state, scaler = scaler.state_dict(), make()
                scaler.load_state_dict(state)
            p.grad = None
            scaler.scale((p * torch.arange(3.)).sum()).backward()
            if inf: p.grad[1] = torch.nan
            scaler.unscale_(SimpleNamespace(param_groups=[dict(params=[p])]))
            scaler.update()
            seen.append((scaler.get_scale(), p.grad[[0, 2]].tolist()))
        found.append(seen)
    assert found[0] == found[1]


# The block

class Sequence(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.read, self.rnn = nn.Linear(1, 4), kind(4, 8, batch_first=True)
    def forward(self, x): return self.rnn(self.read(x[..., None]))[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.mix = nn.Linear(1, 8), nn.MultiheadAttention(8, 2, batch_first=True)
    def forward(self, x):
        x = self.read(x[..., None])
        return self.mix(x, x, x, need_weights=False)[0].mean(1)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('table', torch.randn(6))
    def forward(self, x): return x + self.table


models = dict(
    linear=lambda: nn.Linear(6, 8),
    conv=lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3), nn.Flatten()),
    norms=lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.PReLU(8)),
    ours=lambda: nn.Sequential(nn.Linear(6, 8), norm.LayerNorm(8), norm.RMSNorm(8), nn.Unflatten(1, (8, 1)),
                               norm.BatchNorm(8), norm.RunningBatchNorm(8), nn.Flatten()),
    lstm=lambda: Sequence(nn.LSTM), gru=lambda: Sequence(nn.GRU), attention=Attention,
    positions=lambda: nn.Sequential(Positions(), nn.Linear(6, 8)),
    transformer=lambda: nn.Sequential(nn.Linear(6, 8), nn.Unflatten(0, (-1, 2)),
                                      nn.TransformerEncoderLayer(8, 2, 16, 0., batch_first=True), nn.Flatten(0, 1)))


@halves
@pytest.mark.parametrize('name', models)
def test_gradients_are_float32_and_near(name, dtype):
    torch.manual_seed(0)
    model, x = models[name](), torch.randn(8, 6)
    other, grads = deepcopy(model), []
    before, attributes = [*model.parameters()], {k: [*map(str, v.items())] for k, v in attribute_state(model).items()}
    for m, block in (model, sixteen_bits(model, dtype)), (other, torch.enable_grad()):
        with block: out = widen(m(x))
        out.float().square().mean().backward()
        grads.append([p.grad for p in m.parameters()])
        assert out.dtype == torch.float32
    assert all(p is q for p, q in zip(model.parameters(), before))
    assert {k: [*map(str, v.items())] for k, v in attribute_state(model).items()} == attributes
    scale = max(g.abs().max() for g in grads[1] if g is not None)
    for g, h in zip(*grads, strict=True):
        if h is not None: assert_close(g, h, rtol=.1, atol=.06 * scale.item())
    for b, c in zip(model.buffers(), other.buffers()):
        assert b.dtype == c.dtype
        if b.is_floating_point(): assert_close(b, c, rtol=.05, atol=.05)


def test_block_is_undone_after_an_error():
    model = net()
    with pytest.raises(RuntimeError), sixteen_bits(model): model(torch.randn(8, 5))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(isinstance(p, nn.Parameter) for p in (model[0].weight, model[2].bias))
    assert not any('forward' in vars(m) for m in model.modules())


def test_a_forward_of_ones_own_is_kept():
    model = net()
    model[0].forward = own = lambda x: F.linear(x, model[0].weight, model[0].bias)
    with sixteen_bits(model): assert model(torch.randn(4, 6)).dtype == torch.bfloat16
    assert vars(model[0])['forward'] is own


def test_other_types_stay_as_they_are():
    x = dict(a=torch.ones(2, dtype=torch.float64), b=(torch.tensor([True]), 'text'),
             c=torch.ones(2, dtype=torch.complex64))
    for y in narrow(x, torch.float16), widen(x):
        assert y['a'] is x['a'] and y['b'][0] is x['b'][0] and y['c'] is x['c'] and y['b'][1] == 'text'


# Fits

@both
@halves
def test_fit_is_near_that_of_float32(kind, dtype):
    plain, mixed = fit(epochs=3), fit(kind(dtype), epochs=3)
    assert_close(torch.tensor(mixed[Recorder].losses), torch.tensor(plain[Recorder].losses), rtol=.02, atol=.01)
    assert mixed[kind].skipped == 0 and (mixed[kind].scale is None) == (dtype == torch.bfloat16)
    assert {p.dtype for p in mixed.params} | {mixed.get_preds()[0].dtype} == {torch.float32}
    assert mixed.predict(torch.randn(6)).dtype == torch.float32


@both
@pytest.mark.parametrize('opt', [optim.SGD, optim.Adam, adamw, flat(adamw, after=100)])
def test_an_overflow_is_as_if_the_batch_were_not_there(kind, opt):
    sizes = [8] * 6
    learn = fit(kind(torch.float16), Overflow(1, 4), train=sizes, opt=opt)
    fewer = learner(cbs=kind(torch.float16), progress=False, train=sizes, opt=opt)
    fewer.dls.train = [b for i, b in enumerate(fewer.dls.train) if i not in (1, 4)]
    fewer.fit(1)
    assert all(torch.equal(p, q) for p, q in zip(learn.params, fewer.params))
    assert (learn[kind].skipped, learn[kind].scale) == (2, 2.**14)


@both
def test_windows_leave_an_overflow_out(kind):
    sizes = [8, 5, 8, 3, 8, 4]
    cbs = kind(torch.bfloat16, 2.**4), GradientAccumulation(2), GradientClip(.5), Overflow(1)
    learn = fit(*cbs, train=sizes)
    model = by_hand(batches(*sizes), net(), optim.SGD, epochs=1, window=2, clip=.5, skip=(1,))
    assert learn[kind].skipped == 1
    assert_close(learn.model.state_dict(), model.state_dict(), rtol=.05, atol=.01)


@both
def test_gradients_that_a_loop_keeps_are_not_unscaled_again(kind):
    class Keep(Callback):
        def around_zero_grad(self, learn, proceed): pass
        def around_step(self, learn, proceed): pass
    class Look(Callback):
        order = 90
        def after_batch(self, learn):
            if learn.training: self.grads = [p.grad.clone() for p in learn.params]
    look, exact = Look(), Look()
    fit(kind(torch.float16, 2.**8), Keep(), Overflow(1), look, train=(8, 8, 8))
    learn = learner(cbs=[Keep(), exact], progress=False, train=(8, 8, 8))
    learn.dls.train.pop(1)
    learn.fit(1)
    assert_close(look.grads, exact.grads, rtol=.02, atol=.002)


@both
def test_a_loss_with_parameters_and_two_optimizers(kind):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
        def forward(self, pred, y):
            assert pred.dtype == torch.float32
            return F.cross_entropy(pred * self.w, y)
    class Two(Learner):
        def step(self):
            for o in self.opts: o.step()
    found = []
    for cbs in [], [kind(torch.float16)]:
        loss = Weighted()
        learn = Two(DataLoaders(batches(8, 8), batches(4)), net(), loss, lr=.1, cbs=cbs, progress=False)
        learn.opts = [optim.SGD(learn.model.parameters(), .1), optim.SGD(loss.parameters(), .5)]
        learn.fit(2)
        found.append(module_state(learn.module))
    assert_close(*found, rtol=.01, atol=.002)
    assert not torch.equal(found[1]['loss.w'], torch.ones(3))


@both
def test_an_overflow_in_a_closure_leaves_the_step(kind):
    class Closure(Learner):
        def step(self):
            def again():
                self.zero_grad()
                self.forward()
                self.compute_loss()
                self.backward()
                return self.loss
            self.opt.step(again)
    class Late(Callback):
        "The second backward pass of batch 1 is that of the closure"
        calls = 0
        def around_backward(self, learn, proceed):
            proceed()
            self.calls += 1
            if self.calls == 4: learn.params[0].grad[0] = torch.inf
    found = []
    for cbs, train in ([kind(torch.float16), Late()], batches(8, 8, 8)), ([kind(torch.float16)], batches(8, 8, 8)[::2]):
        learn = Closure(DataLoaders(train), net(), F.cross_entropy, adamw, .1, cbs=cbs, progress=False)
        learn.fit(1)
        found.append([p.detach() for p in learn.params])
    assert_close(*found, rtol=0, atol=0)


@both
@halves
def test_sparse_gradients_and_structures(kind, dtype):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(10, 4, sparse=True), nn.Embedding(10, 4)
            self.say = nn.Linear(4, 10, bias=False)
            self.say.weight = self.b.weight
        def forward(self, i): return dict(out=(self.say(self.a(i) + self.b(i)), i))
    x = torch.randint(10, (16,), generator=torch.Generator().manual_seed(0))
    losses = []
    for cbs in [], [kind(dtype)]:
        torch.manual_seed(0)
        learn = Learner(DataLoaders([(x, x)] * 3, [(x, x)]), Words(), lambda p, y: F.cross_entropy(p['out'][0], y),
                        lr=.1, cbs=cbs, progress=False)
        learn.fit(2)
        losses.append(learn[Recorder].losses)
        out = learn.get_preds()[0]['out']
        assert (out[0].dtype, out[1].dtype) == (torch.float32, torch.int64)
    assert_close(*map(torch.tensor, losses), rtol=.02, atol=.01)


@pytest.mark.parametrize('kind', [AMP])
def test_compiled_models(kind):
    plain, model = fit(kind(torch.float16)), torch.compile(net(), backend='eager')
    mixed = fit(kind(torch.float16), model=model)
    assert_close(torch.tensor(mixed[Recorder].losses), torch.tensor(plain[Recorder].losses), rtol=.01, atol=.01)


@both
def test_terminate_on_nan_lets_an_overflow_pass(kind):
    learn = fit(kind(torch.float16), TerminateOnNaN(), Overflow(0), train=(8, 8, 8))
    assert learn[kind].skipped == 1 and len(learn[Recorder].losses) == 3


@both
def test_a_sweep_leaves_no_trace(kind):
    learn = learner(cbs=kind(torch.float16, 2.**20, 3), progress=False, train=[8] * 20)
    before = learn[kind].state_dict()
    lr_find(learn, n=15)
    assert learn[kind].state_dict() == before


@both
def test_only_one(kind):
    with pytest.raises(ValueError, match='already'): learner(cbs=[AMP(), kind()])
    learn = learner(cbs=AMP(), progress=False)
    learn.fit(1, cbs=(other := kind(torch.float16))) # In its place
    assert other.tried == {True, False} and not learn[AMP].tried


def test_arguments_and_parameters():
    for bad in dict(dtype=torch.float64), dict(init_scale=0.), dict(init_scale=torch.inf), dict(growth_interval=0):
        with pytest.raises(ValueError): MixedPrecision(**bad)
    model = net()
    model[0].half().requires_grad_(False)
    fit(AMP(torch.float16), model=model) # A frozen part may have what it likes
    model[2].half()
    with pytest.raises(ValueError, match=r'model.2.weight.*float\(\)'): fit(AMP(), model=model)


# Layers that break

class Scatter(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.calls = nn.Linear(6, 6), 0
    def forward(self, x):
        self.calls += 1
        return torch.zeros(x.shape).index_add_(0, torch.arange(len(x)), self.lin(x))


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x): return self.inner(x) + torch.zeros(x.shape).index_add_(0, torch.arange(len(x)), self.inner(x))


class Large(nn.Module):
    def forward(self, x): return x * 1e6 / 1e6


def broken(part):
    torch.manual_seed(0)
    return nn.Sequential(part(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(.2), nn.Linear(8, 3))


@both
@halves
def test_a_broken_layer_is_named_once_and_goes_on(kind, dtype):
    cb = kind(dtype)
    learn = learner(broken(Scatter), cbs=cb, progress=False)
    log = told(lambda: learn.fit(1))
    assert [m.split(',')[0] for m in log if 'float32' in m] == ['layer 0'] and 'Scatter' in log[0]
    assert not any('layer 0' in m for m in told(lambda: (learn.fit(1), learn.get_preds())))
    plain = fit(model=broken(Scatter))
    assert_close(learn[Recorder].losses[0], plain[Recorder].losses[0], rtol=.02, atol=0)
    again = kind(dtype)
    again.load_state_dict(cb.state_dict())
    assert again.wide == ['0']


@both
def test_a_parent_takes_its_children_along(kind):
    cb = kind(torch.float16)
    told(lambda: fit(cb, model=broken(lambda: Outer(nn.Sequential(nn.Linear(6, 6), Large(), nn.Linear(6, 6))))))
    assert cb.wide == ['0.inner.1', '0']


@both
def test_the_whole_model(kind):
    class Whole(Scatter):
        def __init__(self):
            super().__init__()
            self.say = nn.Linear(6, 3)
        def forward(self, x): return self.say(super().forward(x))
    cb = kind()
    log = told(lambda: fit(cb, model=Whole()))
    assert cb.wide == [''] and any('the model, a Whole' in m for m in log)


@both
def test_infinite_in_float32_too_is_not_blamed(kind):
    class Never(nn.Module):
        def forward(self, x): return x / 0
    cb = kind(torch.float16)
    with pytest.raises(FloatingPointError, match='Never|output|loss'): fit(cb, model=broken(Never))
    assert cb.wide == []


@both
def test_predictions_before_any_fit(kind):
    learn = learner(broken(Scatter), cbs=(cb := kind()), progress=False)
    log = told(lambda: learn.get_preds())
    assert cb.wide == ['0'] and len(log) == 1


@both
def test_batches_of_other_forms_are_tried_out_too(kind):
    class Keys(Learner):
        def inputs(self): return self.batch['x'],
        def target(self): return self.batch['y']
        def forward(self): self.pred = self.model(*self.inputs())
    data = [dict(x=x, y=y) for x, y in batches(8, 8)]
    learn = Keys(DataLoaders(data), broken(Scatter), F.cross_entropy, lr=.1, cbs=(cb := kind()), progress=False)
    told(lambda: learn.fit(1))
    assert cb.wide == ['0']


@both
@pytest.mark.parametrize('make', [weight_norm, spectral_norm])
def test_parametrized_weights(kind, make):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), make(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    plain, found = fit(model=model()), []
    told(lambda: found.append(fit(kind(), model=model())))
    assert_close(torch.tensor(found[0][Recorder].losses), torch.tensor(plain[Recorder].losses), rtol=.02, atol=.01)


@both
def test_the_trial_leaves_no_trace(kind):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.generator = 0, torch.Generator().manual_seed(3)
            self.register_buffer('seen', torch.zeros(()))
        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return x + torch.rand(x.shape, generator=self.generator)
    learn = fit(kind(), model=nn.Sequential(Counts(), net()), train=(8, 8), valid=(4,))
    assert (learn.model[0].calls, learn.model[0].seen.item()) == (3, 3)
    other = torch.Generator().manual_seed(3)
    for n in 8, 8, 4: torch.rand(n, 6, generator=other)
    assert torch.equal(learn.model[0].generator.get_state(), other.get_state())


@both
@halves
def test_statistics_of_activations(kind, dtype):
    found = []
    for cbs in [], [kind(dtype)]:
        stats = ActivationStats()
        fit(*cbs, stats, epochs=2)
        found.append(stats.series('std'))
    assert_close(*found, rtol=.02, atol=.01) # As many batches, too: the trial was not counted


@both
@halves
def test_inputs_that_float16_cannot_hold(kind, dtype):
    data = [(x * 1e6, y) for x, y in batches(8, 8)]
    found = []
    for cbs in [], [kind(dtype)]:
        learn = Learner(DataLoaders(data), net(), F.cross_entropy, lr=1e-15, cbs=cbs, progress=False)
        told(lambda: learn.fit(1))
        found.append(torch.tensor(learn[Recorder].losses))
    assert_close(*found, rtol=.02, atol=0)


@both
def test_lazy_layers(kind):
    torch.manual_seed(0)
    learn = fit(kind(), model=nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 3)))
    assert learn.model[0].weight.shape == (8, 6) and learn[kind].wide == []


def test_activation_checkpoints():
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()
        def forward(self, x): return checkpoint(self.inner, x, use_reentrant=False)
    assert fit(AMP(torch.float16), model=Saves())[Recorder].losses == fit(AMP(torch.float16))[Recorder].losses


@pytest.mark.parametrize('bad', [dict(init_scale=2.**128), dict(dtype='float16')])
def test_arguments_are_told(bad):
    with pytest.raises(ValueError, match=r"2\*\*128|'float16'"): AMP(**bad)


# What the plain block cannot do

class Again(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.read, self.inner, self.reentrant = nn.Linear(6, 6), inner, reentrant
    def forward(self, x): return checkpoint(self.inner, self.read(x), use_reentrant=self.reentrant)


@both
@halves
@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('inner', [net, lambda: nn.Sequential(Scatter(), nn.LayerNorm(6), nn.Linear(6, 3))])
def test_checkpoints_change_no_loss(kind, dtype, reentrant, inner):
    found = []
    for cut in True, False:
        torch.manual_seed(0)
        model = Again(inner(), reentrant)
        if not cut: model = nn.Sequential(model.read, model.inner)
        told(lambda: found.append(fit(kind(dtype), epochs=2, model=model)))
        assert found[-1][kind].wide == ([] if inner is net else ['inner.0' if cut else '1.0'])
    assert found[0][Recorder].losses == found[1][Recorder].losses
    assert all(torch.equal(p, q) for p, q in zip(found[0].params, found[1].params))


types = torch.bfloat16, torch.float16


@pytest.mark.parametrize('kind, dtype, stored', [(MixedPrecision, a, b) for a in types for b in types]
                         + [(AMP, a, a) for a in types]) # Autocast converts nothing for norms
def test_a_frozen_body_of_16_bits(kind, dtype, stored):
    def model(convert):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        return nn.Sequential(body.to(stored).to(convert).requires_grad_(False), nn.Linear(8, 3))
    learn, plain = fit(kind(dtype), model=model(stored)), fit(model=model(torch.float32))
    assert_close(torch.tensor(learn[Recorder].losses), torch.tensor(plain[Recorder].losses), rtol=.02, atol=.01)
    assert {p.dtype for p in learn.model[0].parameters()} == {stored} and learn[kind].wide == []


def test_an_adapter_on_a_frozen_matrix():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(6, 8).half().requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(2, 8))
        def forward(self, x): return self.base(x) + x @ self.a @ self.b
    for dtype in torch.bfloat16, torch.float16:
        learn = fit(MixedPrecision(dtype), model=nn.Sequential(Adapted(), nn.Linear(8, 3)))
        assert learn.model[0].b.abs().max() > 0 and learn[MixedPrecision].wide == []


@dataclass(frozen=True)
class Answer:
    logits: torch.Tensor
    extra: list
    name: str = 'answer'


class Says(nn.Module):
    def __init__(self):
        super().__init__()
        self.say = nn.Linear(6, 3)
    def forward(self, x): return [Answer(out := self.say(x), [out, Answer(out, [])])]


@both
@halves
def test_predictions_in_dataclasses_are_float32(kind, dtype):
    def loss(pred, y):
        assert {pred[0].logits.dtype, pred[0].extra[1].logits.dtype} == {torch.float32}
        return F.cross_entropy(pred[0].logits, y)
    losses = []
    for cbs in [], [kind(dtype)]:
        torch.manual_seed(0)
        learn = Learner(DataLoaders(batches(8, 8)), Says(), loss, lr=.1, cbs=cbs, progress=False)
        learn.fit(1)
        losses.append(torch.tensor(learn[Recorder].losses))
    assert_close(*losses, rtol=.02, atol=.01)


def test_dataclasses_that_are_dicts():
    @dataclass
    class Output(dict):
        a: torch.Tensor | None = None
    x = Output(torch.ones(2).half())
    x['a'] = x.a
    assert widen(x)['a'].dtype == torch.float32 and type(widen(x)) is Output
    assert narrow(Output, torch.float16) is Output # The class itself is no structure


@both
def test_float64_is_told(kind):
    data = [(x.double(), y) for x, y in batches(8, 8)]
    learn = Learner(DataLoaders(data), net().double(), F.cross_entropy, lr=.1, cbs=kind(), progress=False)
    log = [m for m in told(lambda: (learn.fit(1), learn.fit(1))) if 'float()' in m]
    assert len(log) == 1 and 'model.0.weight has 64 bits' in log[0]
    assert learn.pred.dtype == torch.float64


@pytest.mark.filterwarnings('ignore')
def test_scripted_and_traced_models():
    for make in torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(8, 6)):
        with pytest.raises(TypeError, match='scripted and traced.*AMP'): fit(MixedPrecision(), model=make(net()))
        assert_close(fit(AMP(), model=make(net()))[Recorder].losses[0], fit()[Recorder].losses[0], rtol=.02, atol=0)


@pytest.mark.parametrize('bad', [dict(growth_interval=2.5), dict(growth_interval='x'), dict(init_scale='x'),
                                 dict(init_scale=float('nan'))])
def test_arguments_that_are_no_numbers(bad):
    with pytest.raises(ValueError, match='init_scale is a number.*got'): MixedPrecision(torch.float16, **bad)
