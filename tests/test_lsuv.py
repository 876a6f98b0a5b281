"Any model is measured into shape, or is left as it was and told why; nothing but the chosen weights changes."
import inspect
import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.testing import assert_close

from dlfound.lsuv import lsuv_
from dlfound.sanity import SanityWarning
from dlfound.state import map_tensors, module_state, random_state, set_random_state

kinds = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
         nn.ConvTranspose3d)
good = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def outputs(model, *inputs):
    "Standard deviation and mean of the first output of each layer, measured in another way than lsuv_ does"
    found, handles = {}, []
    for name, m in model.named_modules():
        def note(module, args, out, name=name):
            found.setdefault(name, (out.double().std().item(), out.double().mean().item()))
        if isinstance(m, kinds): handles.append(m.register_forward_hook(note))
    states = random_state()
    with torch.no_grad(): model(*inputs)
    set_random_state(states)
    for h in handles: h.remove()
    return found


def snapshot(model):
    "All that must come back: tensors, modes, hooks, gradients, what is trained, random numbers"
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    ps = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return map_tensors(torch.clone, module_state(model)), [m.training for m in model.modules()], hooks, ps


def is_same(model, before, random):
    assert_close(snapshot(model)[0], before[0], rtol=0, atol=0, equal_nan=True)
    assert str(snapshot(model)[1:]) == str(before[1:])
    for a, b in zip(random_state(), random):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)


# Models of all shapes

class Residual(nn.Module):
    def __init__(self, *branch):
        super().__init__()
        self.branch = nn.Sequential(*branch)
    def forward(self, x): return x + self.branch(x)


acts = st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.SELU, nn.Identity, nn.PReLU, lambda: nn.ReLU(inplace=True),
                        lambda: nn.Dropout(.3), lambda: nn.LeakyReLU(.1, inplace=True)])


@st.composite
def mlps(draw):
    widths = draw(st.lists(st.integers(2, 24), min_size=2, max_size=5))
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Linear(i, o, bias=draw(st.booleans())), draw(acts)()]
        if draw(st.booleans()): layers.append(Residual(nn.Linear(o, 7), draw(acts)(), nn.Linear(7, o)))
        if draw(st.booleans()): layers.append(draw(st.sampled_from([nn.BatchNorm1d, nn.LayerNorm]))(o))
    return nn.Sequential(*layers), torch.randn(64, widths[0])


@st.composite
def cnns(draw):
    n = draw(st.integers(1, 3))
    convs = [nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    layers, c = [], 4
    for _ in range(draw(st.integers(1, 3))):
        g, o = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 8]))
        conv = draw(st.sampled_from(convs))[n - 1]
        layers += [conv(c, o, 3, padding=1, groups=g, bias=draw(st.booleans())), draw(acts)()]
        c = o
    return nn.Sequential(*layers), torch.randn(8, 4, *[5] * n)


@settings(max_examples=40, deadline=None)
@given(made=mlps() | cnns(), seed=st.integers(0, 99), orthonormal=st.booleans(), center=st.booleans(),
       training=st.booleans())
def test_every_layer_has_deviation_one(made, seed, orthonormal, center, training):
    model, x = made
    torch.manual_seed(seed)
    model.train(training)
    before, random = snapshot(model), random_state()
    table = lsuv_(model, x, orthonormal=orthonormal, center=center)
    own, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    weights = [k for k, m in model.named_modules() if isinstance(m, kinds)]
    may_change = {f'{k}.weight' for k in weights} | {f'{k}.bias' for k in weights if center}
    is_same(model, ({k: own.get(k, v) if k in may_change else v for k, v in before[0].items()}, *before[1:]), random)
    assert_close(buffers, {k: before[0][k] for k in buffers}, rtol=0, atol=0)
    found = outputs(model, x)
    assert [row['layer'] for row in table.rows] == list(found) # In the order of execution
    for row in table.rows:
        std, mean = found[row['layer']]
        assert row['std after'] == pytest.approx(std, rel=1e-3) and row['passes'] <= 10
        assert row.get('note') == 'not settled' or abs(std - 1) < .0101
        if center and row.get('note') is None and model.get_submodule(row['layer']).bias is not None:
            assert abs(mean) < .0101
    if not any(row.get('note') for row in table.rows): # It has nothing to do the second time
        again = lsuv_(model, x, orthonormal=False, center=center)
        assert [row['passes'] for row in again.rows] == [0] * len(table.rows)
        assert [row['std before'] for row in again.rows] == [row['std after'] for row in table.rows]


@settings(max_examples=25, deadline=None)
@given(made=cnns() | mlps())
def test_the_directions_of_each_group_are_treated_alike(made):
    model, x = made
    with warnings.catch_warnings(action='ignore'): lsuv_(model, x)
    for m in model.modules():
        if not isinstance(m, kinds): continue
        for block in m.weight.detach().chunk(getattr(m, 'groups', 1)):
            s = torch.linalg.svdvals(block.flatten(1))
            assert s.max() / s.min() < 1.001


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 10)).to(dtype)
    table = lsuv_(model, torch.randn(32, 3, 8, 8, dtype=dtype), center=True)
    assert all(abs(row['std after'] - 1) < .01 and abs(row['mean after']) < .01 for row in table.rows)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_layout_in_memory_and_the_parameters_stay_the_same_objects():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), weight_norm(nn.Conv2d(8, 8, 3))).to(memory_format=torch.channels_last)
    params, strides = list(model.parameters()), [p.stride() for p in model.parameters()]
    opt = torch.optim.SGD(model.parameters(), .1)
    lsuv_(model, torch.randn(8, 3, 9, 9))
    assert all(a is b for a, b in zip(params, model.parameters()))
    assert [p.stride() for p in model[:1].parameters()] == strides[:2]
    x, before = torch.randn(4, 3, 9, 9), [p.detach().clone() for p in params]
    model(x).square().mean().backward()
    opt.step()
    assert all(not torch.equal(a, b) for a, b in zip(params, before))


def test_models_that_differ_stay_different_and_the_same_one_comes_again():
    torch.manual_seed(0)
    x, models = torch.randn(32, 6), [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(2)]
    twin = deepcopy(models[0])
    for model in (*models, twin): lsuv_(model, x)
    assert torch.equal(models[0][0].weight, twin[0].weight)
    assert not torch.allclose(models[0][0].weight, models[1][0].weight)


# What is left alone

def notes(table): return {row['layer']: row.get('note') for row in table.rows}


class Tied(nn.Module):
    "An embedding whose weight is the last layer's, as in language models"
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.say = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.say.weight = self.embed.weight
    def forward(self, i): return self.say(self.hidden(self.embed(i)).relu())


def test_a_weight_that_another_kind_of_layer_uses_too():
    torch.manual_seed(0)
    model, x = Tied(), torch.randint(20, (16, 9))
    table = lsuv_(model, x)
    assert model.say.weight is model.embed.weight and notes(table) == dict(hidden=None, say=None)
    assert all(abs(std - 1) < .0101 for std, _ in outputs(model, x).values())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.late, self.early, self.loop, self.never = (nn.Linear(6, 6) for _ in range(4))
        self.twin, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)
        self.twin.weight = self.loop.weight
    def forward(self, x):
        for layer in self.early, self.loop, self.loop, self.frozen, self.twin, self.late: x = layer(x).tanh()
        return x


def test_uses_of_a_weight_after_the_first_and_layers_that_are_frozen_or_never_called():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(64, 6)
    before = map_tensors(torch.clone, module_state(model))
    table = lsuv_(model, x)
    assert list(notes(table).items()) == [
        ('early', None), ('loop', 'called 2 times, the first decides'), ('frozen', 'frozen'), ('twin', 'tied to loop'),
        ('late', None), ('never', 'never called')]
    found = outputs(model, x)
    assert all(abs(found[k][0] - 1) < .0101 for k in ('early', 'loop', 'late'))
    for k in 'frozen.weight', 'frozen.bias', 'never.weight', 'loop.bias':
        assert torch.equal(module_state(model)[k], before[k])
    assert list(table.rows[-1]) == ['layer', 'note']


def test_attention_and_recurrent_layers_keep_what_is_theirs():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = map_tensors(torch.clone, module_state(model))
    table = lsuv_(model, torch.randn(16, 5, 8))
    assert notes(table) == dict(linear1=None, linear2=None) | {'self_attn.out_proj': 'never called'}
    assert torch.equal(before['self_attn.in_proj_weight'], model.self_attn.in_proj_weight)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.say = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)
        def forward(self, x): return self.say(self.lstm(x)[0])
    model = Reads()
    before = map_tensors(torch.clone, module_state(model.lstm))
    table = lsuv_(model, torch.randn(16, 5, 8), which=[nn.LSTM, nn.Linear])
    assert notes(table) == dict(lstm='gives a tuple', say=None)
    assert_close(module_state(model.lstm), before, rtol=0, atol=0)


def test_prelu_norms_and_activations_are_never_scaled():
    model = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6), nn.LayerNorm(6), nn.ReLU())
    table = lsuv_(model, torch.randn(16, 6), which=['0', '1', '2', '3'])
    assert notes(table) == {'0': None} | dict.fromkeys('123', 'no matrix to scale')
    assert (model[1].weight == .25).all() and (model[2].weight == 1).all()


def test_a_choice():
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Conv1d(6, 6, 1), nn.Embedding(3, 4))[:3]
    x = torch.randn(6, 6)
    for which, want in [(['0'], '0'), (nn.Conv1d, '2'), (lambda m: isinstance(m, nn.Linear), '0'), ('2', '2')]:
        model, plain = made(), made()
        table = lsuv_(model, x, which=which)
        assert [row['layer'] for row in table.rows] == [want]
        other = 2 if want == '0' else 0
        assert torch.equal(model[other].weight, plain[other].weight)
    model, before = made(), made()
    with pytest.raises(ValueError, match="'nine' .* no module of the model"): lsuv_(model, x, which='nine')
    assert_close(module_state(model), module_state(before), rtol=0, atol=0)


# Weights that are computed

no_effect = 'scaling has no effect'

def test_parametrizations():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    for make, note in (weight_norm, None), (spectral_norm, no_effect), (orthogonal, no_effect):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), make(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 6))
        params = list(model.parameters())
        before = map_tensors(torch.clone, module_state(model[2]))
        with warnings.catch_warnings(action='ignore'): table = lsuv_(model, x)
        if note: assert_close(module_state(model[2]), before, rtol=0, atol=0)
        assert notes(table) == {'0': None, '2': note, '4': None}
        assert all(a is b for a, b in zip(params, model.parameters()))
        found = outputs(model, x)
        assert all(abs(found[k][0] - 1) < .0101 for k in '04') and (abs(found['2'][0] - 1) < .0101) == (note is None)


class Halved(nn.Module):
    "A parametrization without a way back"
    def forward(self, w): return w / 2


def test_a_weight_that_cannot_be_set_is_left_alone():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    register_parametrization(model[1], 'weight', Halved())
    assert notes(lsuv_(model, good)) == {'0': None, '1': 'no matrix to scale'}


def test_a_single_layer_is_named_after_its_class():
    model = nn.Linear(6, 6)
    assert notes(lsuv_(model, good)) == dict(Linear=None)
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match='the weight of layer Linear is zero'): lsuv_(model, good)


def test_a_frozen_bias_is_not_shifted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    table = lsuv_(model, good, center=True)
    assert torch.equal(model[0].bias, before) and abs(table.rows[1]['mean after']) < .01
    assert all(abs(row['std after'] - 1) < .01 for row in table.rows)


def test_a_frozen_parametrization_is_frozen():
    model = nn.Sequential(weight_norm(nn.Linear(6, 6)).requires_grad_(False), nn.Linear(6, 6))
    assert notes(lsuv_(model, torch.randn(9, 6))) == {'0': 'frozen', '1': None}


def test_compiled_models_are_measured_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(64, 6)
    compiled = torch.compile(model, backend='eager')
    compiled(x) # Before the hooks came
    assert len(lsuv_(compiled, x).rows) == 2
    assert all(abs(std - 1) < .0101 for std, _ in outputs(model, x).values())
    assert_close(compiled(x), model(x))


# What a batch may be

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(5, 3)
    def forward(self, a, b): return self.one(a) + self.two(b)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 3)
    def forward(self, batch, scale=1.): return self.one(input=batch['x']) * scale


@pytest.mark.parametrize('batch', [
    lambda a, b, y: (a, b), lambda a, b, y: [a, b], lambda a, b, y: (a, b, y), lambda a, b, y: [a, b, y]])
def test_several_inputs(batch):
    torch.manual_seed(0)
    a, b = torch.randn(32, 4), torch.randn(32, 5)
    model = Two()
    lsuv_(model, batch(a, b, torch.zeros(32)))
    assert all(abs(std - 1) < .0101 for std, _ in outputs(model, a, b).values())


def test_one_input_with_or_without_a_target_and_a_mapping_and_keywords():
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.zeros(32)
    for batch in x, (x,), [x], (x, y), [x, y], next(iter(torch.utils.data.DataLoader(list(zip(x, y)), 32))):
        model = nn.Sequential(nn.Linear(4, 3))
        assert abs(lsuv_(model, batch).rows[0]['std after'] - 1) < .01
    for batch in dict(x=x), (dict(x=x), y):
        model = Named()
        assert abs(lsuv_(model, batch).rows[0]['std after'] - 1) < .01


def test_one_example_will_do_for_a_convolution():
    torch.manual_seed(0)
    assert abs(lsuv_(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 16, 16)).rows[0]['std after'] - 1) < .01


# All or nothing

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(.5), nn.Linear(6, 4),
                          weight_norm(nn.Linear(4, 4)))
    model[1].eval()
    model(torch.randn(8, 6)).sum().backward()
    return model


class Failing(nn.Module):
    "Raises at a call"
    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0
    def forward(self, x):
        self.calls += 1
        self.train(not self.training)
        if self.calls == self.at: raise self.error
        return x


@pytest.mark.parametrize('error', [ValueError('mine'), RuntimeError('mine'), KeyboardInterrupt()])
@pytest.mark.parametrize('at', [1, 2, 3])
def test_after_an_error_in_any_pass_all_is_as_before(at, error):
    model = made().append(Failing(at, error))
    before, random = snapshot(model), random_state()
    with pytest.raises(type(error)): lsuv_(model, torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    is_same(model, before, random)
    assert model[-1].calls == at


def test_the_layer_of_an_error_is_named():
    with pytest.raises(RuntimeError) as e: lsuv_(nn.Sequential(nn.Linear(6, 6), nn.Linear(5, 2)), torch.randn(8, 6))
    assert 'in layer 1, a Linear' in e.value.__notes__[0]


def zero(model, k):
    with torch.no_grad(): model[k].weight.zero_()
    return model


def filled(model, k, value):
    with torch.no_grad(): model[k].weight[0, 0] = value
    return model


def dead():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
    nn.init.constant_(model[0].bias, -1e4)
    return model


@pytest.mark.parametrize('model, batch, error, match', [
    (made, None, TypeError, 'needs data to measure with, got a NoneType'),
    (made, (8, 6), TypeError, 'got a tuple without tensors'),
    (made, torch.utils.data.DataLoader(good), TypeError, r'pass inputs, or next\(iter\(loader\)\)'),
    (lambda: good, made(), TypeError, 'the model comes first, then a batch; got a Tensor'),
    (made, torch.ones(8, 6), ValueError, 'constant, all its 8 examples are equal'),
    (made, (good[:1].expand(8, 6), good), ValueError, 'constant, all its 8'), # The target does not count
    (made, good / 0, ValueError, "layer 0 has standard deviation nan"),
    (made, good[:0], ValueError, 'the batch is empty; pass examples'),
    (made, (good[:0], torch.ones(3)), ValueError, 'the batch is empty'),
    (lambda: zero(made(), 4), good, ValueError, "weight of layer 4 is zero; fill it with random numbers, or leave"),
    (lambda: filled(made(), 4, torch.nan), good, ValueError, "weight of layer 4 is not finite; fill it with random"),
    (lambda: filled(made(), 4, torch.inf), good, ValueError, "weight of layer 4 is not finite"),
    (lambda: nn.Linear(6, 1), good[:1], ValueError, r'no layer to scale: Linear \(gives a single number\)'),
    (dead, good, ValueError, "layer 2 has standard deviation 0.0"),
    (lambda: nn.Sequential(nn.ReLU()), good, ValueError, 'no linear layer and no convolution'),
    (lambda: made().requires_grad_(False), good, ValueError, r'no layer to scale: 0 \(frozen\), 4 \(frozen\)'),
    (lambda: nn.Sequential(nn.LazyLinear(6)), good, ValueError, '0.weight has no shape yet; call the model once'),
])
def test_refusals(model, batch, error, match):
    model = model()
    before = snapshot(model) if isinstance(model, nn.Module) and 'Lazy' not in str(model) else None
    random = random_state()
    for options in {}, dict(orthonormal=False), dict(center=True):
        if options.get('center') and 'deviation 0' in match: continue # Centred, it is not dead
        with pytest.raises(error, match=match): lsuv_(model, batch, **options)
    if before: is_same(model, before, random)


def test_a_model_on_the_meta_device():
    with pytest.raises(ValueError, match='weight is on the meta device, where there are no numbers; call to_empty'):
        lsuv_(nn.Linear(6, 6, device='meta'), good)


@pytest.mark.parametrize('options', [dict(max_passes=0), dict(max_passes=-1), dict(tol=0.), dict(tol=-1.), dict(tol=1.),
                                     dict(tol=float('nan'))])
def test_settings_are_checked_before_anything_changes(options):
    model = made()
    before, random = snapshot(model), random_state()
    with pytest.raises(ValueError, match='max_passes is 1 or more and tol lies between 0 and 1, got '):
        lsuv_(model, good, **options)
    is_same(model, before, random)


class Buffers(nn.Module):
    "Sets one that was None, adds one, and puts another tensor in the place of a third"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer('none', None)
        self.register_buffer('some', torch.zeros(3))
    def forward(self, x):
        self.none, self.some = torch.ones(3), self.some + 1
        if not hasattr(self, 'new'): self.register_buffer('new', torch.ones(2))
        return self.linear(x)


@pytest.mark.parametrize('fail', [False, True])
def test_buffers_that_a_forward_makes_or_replaces(fail):
    model = nn.Sequential(Buffers(), *[Failing(2, ValueError('mine'))] * fail)
    some = model[0].some
    if fail:
        with pytest.raises(ValueError, match='mine'): lsuv_(model, good)
    else: lsuv_(model, good)
    assert model[0].none is None and not hasattr(model[0], 'new')
    assert model[0].some is some and torch.equal(some, torch.zeros(3))


# It ends

@settings(max_examples=20, deadline=None)
@given(scale=st.floats(.1, 5), most=st.integers(1, 12), seed=st.integers(0, 99))
def test_large_biases(scale, most, seed):
    torch.manual_seed(seed)
    x, model = torch.randn(32, 6), nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(6, 6), nn.ReLU())])
    for m in model[::2]: nn.init.normal_(m.bias, std=scale)
    before, calls = deepcopy(model), []
    model.register_forward_hook(lambda *args: calls.append(1))
    with warnings.catch_warnings(record=True, action='always') as caught:
        table = lsuv_(model, x, orthonormal=False, max_passes=most)
    assert len(calls) <= most + 3
    found, unsettled = outputs(model, x), [row['layer'] for row in table.rows if row.get('note')]
    for row in table.rows:
        k = row['layer']
        assert row['std after'] == pytest.approx(found[k][0], rel=1e-3) and row['passes'] <= most
        assert k in unsettled or abs(found[k][0] - 1) < .0101
        if k in unsettled: assert torch.equal(model[int(k)].weight, before[int(k)].weight)
    assert [str(w.message).split(' did not')[0] for w in caught] == [', '.join(unsettled)] * bool(unsettled)


def test_the_warning_is_at_the_line_of_the_call():
    model = nn.Sequential(spectral_norm(nn.Linear(6, 6)))
    with pytest.warns(SanityWarning, match='0 did not settle in 3 passes') as caught:
        lsuv_(model, 3 * good, max_passes=3); line = inspect.currentframe().f_lineno
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


# Layers that do not do what a factor asks of them

class Standardised(nn.Conv2d):
    "Whatever the size of its weight, the output is the same"
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Cosine(nn.Linear):
    def forward(self, x): return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


@pytest.mark.parametrize('orthonormal', [False, True])
@pytest.mark.parametrize('center', [False, True])
def test_layers_that_undo_a_factor_keep_their_weights_and_those_behind_them_settle(orthonormal, center):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *[m for _ in range(8) for m in (
        Standardised(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())], nn.Flatten(),
        Cosine(288, 16, bias=False), nn.Linear(16, 4))
    x = torch.randn(16, 3, 8, 8)
    undo = {k: m for k, m in model.named_children() if isinstance(m, (Standardised, Cosine))}
    before = {k: map_tensors(torch.clone, module_state(m)) for k, m in undo.items()}
    with pytest.warns(SanityWarning, match=', '.join(undo) + ' did not settle'):
        table = lsuv_(model, x, orthonormal=orthonormal, center=center)
    assert {k for k, note in notes(table).items() if note == no_effect} == {*undo}
    for k, m in undo.items(): assert_close(module_state(m), before[k], rtol=0, atol=0)
    found = outputs(model, x)
    assert all(abs(found[k][0] - 1) < .0101 for k, note in notes(table).items() if not note)
    for row in table.rows: assert row['std after'] == pytest.approx(found[row['layer']][0], 1e-3)


class Own(nn.Module):
    "A linear layer that is no nn.Linear, so that nobody knows what its bias does"
    def __init__(self, n, std):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, n) / n), nn.Parameter(torch.randn(n) * std)
    def forward(self, x): return x @ self.weight.T + self.bias


@pytest.mark.parametrize('std', [.1, .4, 2, 4])
@pytest.mark.parametrize('center', [False, True])
def test_layers_of_an_own_class_settle_or_keep_their_weights(std, center):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), Own(16, std), nn.Tanh(), nn.Linear(16, 16))
    x = torch.randn(64, 16)
    before = map_tensors(torch.clone, module_state(model[2]))
    with warnings.catch_warnings(action='ignore'): table = lsuv_(model, x, which=[nn.Linear, Own], center=center)
    assert [bool(row.get('note')) for row in table.rows] == [False, std > 1, False]
    if std > 1: assert_close(module_state(model[2]), before, rtol=0, atol=0)
    with torch.no_grad(): outs = [model[:k](x).std().item() for k in (1, 3, 5)]
    assert [row['std after'] for row in table.rows] == pytest.approx(outs, 1e-3)
    assert all(abs(std - 1) < .0101 or row.get('note') for std, row in zip(outs, table.rows))


@pytest.mark.parametrize('inside', [False, True])
def test_under_autocast(inside):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    x = torch.randn(64, 16)
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
        def forward(self, x):
            with torch.autocast('cpu', dtype=torch.bfloat16): return self.model(x)
    if inside: table = lsuv_(Casts(), x)
    else:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            model(x) # Now the cast weights are cached
            table = lsuv_(model, x)
            assert model(x).detach().float().std() == pytest.approx(1, abs=.0101)
    assert [row['passes'] for row in table.rows] == [1, 1, 1] and not any(notes(table).values())
    assert all(abs(std - 1) < .03 for std, _ in outputs(model, x).values())


def test_a_parametrization_that_is_frozen_in_part_is_left_alone():
    model = nn.Sequential(weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    model[0].parametrizations.weight.original1.requires_grad_(False)
    before = map_tensors(torch.clone, module_state(model[0]))
    assert notes(lsuv_(model, good)) == {'0': 'partly frozen', '1': None}
    assert_close(module_state(model[0]), before, rtol=0, atol=0)


class InTurn(nn.Module):
    "Calls the one or the other"
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), 0
    def forward(self, x):
        self.calls += 1
        return self.last((self.one if self.calls % 2 else self.two)(x).relu())


def test_a_branch_that_is_not_called_each_time_is_named_and_keeps_its_weight():
    torch.manual_seed(0)
    model = InTurn()
    before = map_tensors(torch.clone, module_state(model))
    with pytest.warns(SanityWarning, match='one.* did not settle'): table = lsuv_(model, good)
    assert notes(table)['one'] in ('not called each time', 'not settled')
    for k in 'one.weight', 'two.weight': assert torch.equal(module_state(model)[k], before[k])


def test_a_layer_whose_input_is_the_same_for_all_examples_is_left_alone():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.behind, self.one = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        def forward(self, x): return self.behind(self.layer(x * 0 + 1).relu()) + self.one(x)
    torch.manual_seed(0)
    model = Constant()
    before = map_tensors(torch.clone, module_state(model))
    with pytest.warns(SanityWarning, match='layer, behind did not settle'): table = lsuv_(model, good)
    constant = 'its input does not vary'
    assert notes(table) == dict(layer=constant, behind=constant, one=None)
    for k in 'layer.weight', 'behind.weight': assert torch.equal(module_state(model)[k], before[k])


def test_a_dead_relu_leaves_nothing_to_measure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    nn.init.constant_(model[0].bias, -1e4)
    before = model[2].weight.clone()
    with pytest.warns(SanityWarning, match='2 did not settle'): table = lsuv_(model, good)
    assert notes(table) == {'0': None, '2': 'its input does not vary'} and torch.equal(model[2].weight, before)


def test_parameters_that_share_memory_are_tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), weight_norm(nn.Linear(6, 6)),
                          nn.Tanh(), weight_norm(nn.Linear(6, 6)))
    model[2].weight = nn.Parameter(model[0].weight.data)
    model[6].parametrizations.weight.original1 = nn.Parameter(model[4].parametrizations.weight.original1.data)
    assert notes(lsuv_(model, torch.randn(64, 6))) == {'0': None, '2': 'tied to 0', '4': None, '6': 'tied to 4'}


def test_a_bias_that_two_layers_share_is_shifted_for_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].bias = model[0].bias
    table = lsuv_(model, good, center=True)
    assert notes(table) == {'0': None, '2': None} and abs(table.rows[0]['mean after']) < .0101
    assert all(abs(row['std after'] - 1) < .0101 for row in table.rows)


def test_of_layers_that_share_a_weight_the_first_that_is_chosen_decides():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(64, 6)
    table = lsuv_(model, x, which='twin')
    assert notes(table) == dict(twin=None) and model.twin.weight is model.loop.weight
    assert abs(outputs(model, x)['twin'][0] - 1) < .0101


def test_a_tolerance_that_is_finer_than_the_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).bfloat16()
    before = map_tensors(torch.clone, module_state(model))
    with pytest.warns(SanityWarning, match='did not settle'): table = lsuv_(model, good.bfloat16(), tol=1e-6)
    for k, note in notes(table).items():
        if note: assert torch.equal(module_state(model)[f'{k}.weight'], before[f'{k}.weight'])


def test_a_model_that_differentiates_in_its_forward_is_refused_unharmed():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Linear(6, 6)
        def forward(self, x): return torch.autograd.grad(self.energy(x.requires_grad_()).tanh().sum(), x)[0]
    model, x = Force(), good.clone()
    before, random = snapshot(model), random_state()
    with pytest.raises(RuntimeError, match='does not require grad'): lsuv_(model, x)
    is_same(model, before, random)


def test_after_a_single_pass_a_layer_behind_one_that_keeps_its_weight_is_named():
    torch.manual_seed(1)
    model, x = nn.Sequential(Own(16, .3), nn.Tanh(), nn.Linear(16, 16)), torch.randn(64, 16)
    before = map_tensors(torch.clone, module_state(model))
    with pytest.warns(SanityWarning, match='0, 2 did not settle in 1 passes, see the notes'):
        table = lsuv_(model, x, which=[nn.Linear, Own], max_passes=1)
    assert notes(table) == {'0': 'not settled', '2': 'moved by a layer before it'}
    assert torch.equal(model[0].weight, before['0.weight'])
    with torch.no_grad(): outs = [model[:k](x).std().item() for k in (1, 3)]
    assert [row['std after'] for row in table.rows] == pytest.approx(outs, 1e-3)
