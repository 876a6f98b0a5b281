"What is taken hold of comes back to the bit: tensors in any structure, modules, optimizers, modes, random generators."
import random
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from dlfound.state import (attribute_state, group_values, hyper, hyper_ratios, load_attribute_state, load_module_state,
                           load_opt_state, map_tensors, module_state, modes_kept, opt_state_in_order, random_kept,
                           random_state, set_group_values, set_hyper, set_random_state)

Pair = namedtuple('Pair', 'x y')


class Deep(tuple): pass


class Encoding(UserDict):
    "As the batches of a well-known tokenizer: a mapping whose entries are attributes too"
    def __getattr__(self, name): return self.data[name]


class Moved(dict):
    "A mapping that knows how to be moved"
    def to(self, device): return 'moved by itself'


@dataclass
class Record: x: Tensor


def plus(x, method=''): return map_tensors(lambda t: t + 1, x, method)


# Tensors in structures

@pytest.mark.parametrize('make', [
    lambda t: t, lambda t: (t,), lambda t: [t, [t, (t, {})]], lambda t: dict(a=t, b=dict(c=[t])),
    lambda t: Pair(t, [t]), lambda t: OrderedDict(b=t, a=t), lambda t: Encoding(a=t),
    lambda t: UserDict(a=Pair(t, t)), lambda t: Deep([t, t]), lambda t: {1: t, None: t}, lambda t: (), lambda t: [],
])
def test_classes_are_kept_and_the_structure_is_left_alone(make):
    x, want = make(torch.zeros(2)), make(torch.ones(2))
    got = plus(x)

    def same(a, b):
        assert type(a) is type(b)
        if isinstance(a, Tensor): assert torch.equal(a, b)
        elif hasattr(a, 'keys'):
            assert list(a) == list(b)
            for k in a: same(a[k], b[k])
        else:
            assert len(a) == len(b)
            for p, q in zip(a, b): same(p, q)

    same(got, want)
    same(x, make(torch.zeros(2)))


def test_a_default_dict_goes_on_making_defaults():
    got = plus(defaultdict(list, a=torch.zeros(1)))
    assert got['a'] == 1 and got['new'] == []


def test_a_mapping_that_cannot_be_changed_becomes_a_dict():
    assert plus(MappingProxyType(dict(a=torch.zeros(1)))) == dict(a=torch.ones(1))


@pytest.mark.parametrize('x', [
    'text', b'bytes', 3, None, {1, 2}, range(3), np.zeros(2), Record(torch.zeros(1)), nn.Linear, len, torch.float32])
def test_all_else_stays_the_same_object(x):
    assert plus(x) is x and plus([x])[0] is x and map_tensors(lambda t: 1 / 0, x, 'to') is x


def test_what_torch_returns():
    top = torch.max(torch.tensor([[1, 3], [5, 2]]), dim=1)
    got = plus(top)
    assert type(got) is type(top) and got.values.tolist() == [4, 6] and got.indices.tolist() == [2, 1]
    assert type(plus(torch.Size([2, 3]))) is torch.Size and plus(torch.Size([2, 3])) == (2, 3)
    assert isinstance(plus(pack_sequence([torch.ones(2)])), PackedSequence)


def test_a_method_counts_where_it_is_named():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    net = nn.Linear(2, 2)
    got = map_tensors(lambda t: t.to('meta'), [packed, Moved(a=torch.ones(1)), net], 'to')
    assert got[0].data.device.type == 'meta' and got[1] == 'moved by itself' and got[2] is net
    assert type(plus(Moved(a=torch.zeros(1)))) is Moved
    for made in Record(torch.zeros(1)), Encoding(a=torch.zeros(1)): # Without the method, `__getattr__` is not asked
        assert type(map_tensors(lambda t: t, made, 'to')) is type(made)


class Wrapped(MutableMapping):
    "A mapping around a dictionary, which `copy` would share"
    def __init__(self, d): self.d = d
    def __getitem__(self, k): return self.d[k]
    def __setitem__(self, k, v): self.d[k] = v
    def __delitem__(self, k): del self.d[k]
    def __iter__(self): return iter(self.d)
    def __len__(self): return len(self.d)


def test_a_mapping_that_wraps_another_is_left_alone():
    x = Wrapped(dict(a=torch.zeros(1)))
    assert plus(x) == dict(a=torch.ones(1)) and x['a'] == 0


# Modules

class Odd(nn.Module):
    "Tied and frozen weights, buffers of all sorts, extra state, a parametrisation"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), weight_norm(nn.Linear(3, 3))
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)
        self.c.bias.requires_grad_(False)
        self.register_buffer('hidden', torch.zeros(2), persistent=False)
        self.register_buffer('late', None)
        self.register_buffer('growing', torch.zeros(0), persistent=False)
        self.told, self.plain = 0, torch.zeros(1)
    def get_extra_state(self): return dict(told=self.told)
    def set_extra_state(self, state): self.told = state['told']
    def forward(self, x):
        self.hidden += 1
        self.told += 1
        self.late = torch.full((3,), float(self.told))
        self.growing = torch.cat([self.growing, x.detach().sum()[None]])
        return self.norm(self.c(self.b(self.a(x)) + self.hidden.sum()) + self.growing.sum())


def test_all_of_a_module_comes_back():
    torch.manual_seed(0)
    x, net, other = torch.randn(4, 3), Odd(), Odd()
    for _ in range(3): net(x)
    objects = dict(other.named_parameters(remove_duplicate=False))
    load_module_state(other, deepcopy(module_state(net)))
    assert_close(dict(module_state(other)), dict(module_state(net)), rtol=0, atol=0)
    assert dict(other.named_parameters(remove_duplicate=False)) == objects # The same objects, tied and all
    assert other.b.weight is other.a.weight and other.told == 3 and not other.c.bias.requires_grad
    assert torch.equal(net(x), other(x))


def test_the_state_is_no_copy_and_needs_no_gradient():
    net = Odd()
    state = module_state(net)
    with torch.no_grad(): net.a.weight.fill_(7)
    assert (state['a.weight'] == 7).all() and not any(getattr(t, 'requires_grad', False) for t in state.values())
    load_module_state(net, state) # Of itself
    assert (net.a.weight == 7).all()


def test_what_a_module_keeps_as_a_plain_attribute_is_not_its_state():
    assert 'plain' not in module_state(Odd())


@pytest.mark.parametrize('model', [F.relu, lambda x: x, None, object()])
def test_what_is_no_module_has_no_state(model):
    assert module_state(model) == {}
    with modes_kept(model): pass


def test_gradients_and_the_optimizers_hold_survive_loading():
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    opt = torch.optim.SGD(net.parameters(), lr=1.)
    net(torch.ones(1, 2)).sum().backward()
    load_module_state(net, module_state(other))
    before = net.weight.detach().clone()
    opt.step()
    assert_close(net.weight, before - 1)


@pytest.mark.parametrize('there, here', [(torch.channels_last, torch.contiguous_format),
                                         (torch.contiguous_format, torch.channels_last)])
def test_the_layout_in_memory_comes_back(there, here):
    a, b = (nn.Conv2d(3, 4, 3).to(memory_format=f) for f in (there, here))
    weight = b.weight
    load_module_state(b, module_state(a))
    assert b.weight is weight and torch.equal(a.weight, b.weight) and a.weight.stride() == b.weight.stride()
    with torch.no_grad(): a.weight.zero_()
    assert b.weight.abs().sum() > 0 # A copy


def test_other_modules_are_refused_and_left_alone():
    state = module_state(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)))
    def ends(*layers): return nn.Sequential(nn.Linear(2, 3), *layers)
    for other, match in [
        (ends(nn.Linear(3, 4), nn.BatchNorm1d(4)), r'1.weight is \(4, 3, .*\) here and \(3, 3, .*\) in the state'),
        (ends(nn.Linear(3, 3).double(), nn.BatchNorm1d(3)), r'1.weight is .*float64\) here and .*float32'),
        (ends(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)), '1.bias is missing here'),
        (ends(nn.Linear(3, 3)), '2.weight is missing here'),
        (ends(nn.Linear(3, 3), nn.LayerNorm(3)), '2.running_mean is missing here'),
        (ends(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), '3.weight .*and missing in the state'),
        (nn.Linear(2, 3), 'weight is'),
    ]:
        before = deepcopy(module_state(other))
        with pytest.raises(ValueError, match=match): load_module_state(other, state)
        assert_close(module_state(other), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match='0.weight .*and missing in the state'): load_module_state(ends(), {})


class Token(nn.Module):
    def get_extra_state(self): return dict(n=0)
    def set_extra_state(self, state): self.n = state['n']


def test_extra_state_belongs_to_its_model_too():
    one, two = nn.Sequential(nn.Linear(2, 2), Token()), nn.Sequential(nn.Linear(2, 2), nn.Identity())
    for model, state in (two, module_state(one)), (nn.Sequential(nn.Linear(2, 2)), module_state(one)), (
            one, module_state(two)):
        before = model[0].weight.clone()
        with pytest.raises(ValueError, match='1._extra_state is'): load_module_state(model, state)
        assert torch.equal(before, model[0].weight)
    load_module_state(one, module_state(one))
    assert one[1].n == 0


def test_a_buffer_that_was_not_there_yet_may_stay():
    net, early = Odd(), deepcopy(module_state(Odd()))
    net(torch.ones(4, 3))
    load_module_state(net, early)
    assert 'late' not in early and net.late is not None and net.growing.shape == (0,)


# Optimizers

class Wide(torch.optim.Optimizer):
    "Momentum kept in 32 bits for parameters of 16"
    def __init__(self, params, lr=.1): super().__init__(params, dict(lr=lr))
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None: continue
                average = self.state[p].setdefault('average', torch.zeros_like(p, dtype=torch.float32))
                average.mul_(.9).add_(p.grad)
                p.data.add_(average, alpha=-group['lr'])


optimizers = dict(
    sgd=lambda p: torch.optim.SGD(p, lr=.1, momentum=.9), adam=lambda p: torch.optim.Adam(p, lr=.01, amsgrad=True),
    tensor_lr=lambda p: torch.optim.Adam(p, lr=torch.tensor(.01)), wide=Wide,
    lbfgs=lambda p: torch.optim.LBFGS(p, lr=.1)) # Whose dot products are not made for 16 bits
fits = [(name, dtype) for name in optimizers for dtype in (torch.float32, torch.bfloat16)
        if (name, dtype) != ('lbfgs', torch.bfloat16)]


@pytest.mark.parametrize('name, dtype', fits)
def test_a_fit_goes_on_to_the_bit_and_twice_from_one_state(name, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, dtype=dtype), torch.randn(16, 1, dtype=dtype)

    def steps(net, opt, n=5):
        def closure():
            opt.zero_grad()
            loss = F.mse_loss(net(x), y)
            loss.backward()
            return loss
        for _ in range(n):
            closure()
            opt.step(closure) if name == 'lbfgs' else opt.step()
        return [p.detach().clone() for p in net.parameters()]

    net = nn.Linear(3, 1, dtype=dtype)
    opt = optimizers[name](list(net.parameters()))
    steps(net, opt)
    weights, state = deepcopy(module_state(net)), deepcopy(opt.state_dict())
    want = steps(net, opt)
    for _ in range(2):
        other = nn.Linear(3, 1, dtype=dtype)
        again = optimizers[name](list(other.parameters()))
        load_module_state(other, weights)
        load_opt_state(again, state)
        for a, b in zip(steps(other, again), want): assert torch.equal(a, b)


def test_groups_frozen_parameters_and_parameters_without_a_state():
    def made():
        ps = [nn.Parameter(torch.full((2,), float(i), dtype=torch.bfloat16)) for i in range(4)]
        return ps, Wide([dict(params=[ps[2], ps[0]], lr=.5), dict(params=[ps[3], ps[1]])])

    (ps, opt), (qs, other) = made(), made()
    for i in 0, 3: ps[i].grad = torch.full_like(ps[i], 1 + i)
    opt.step()
    load_opt_state(other, opt.state_dict())
    assert [q in other.state for q in qs] == [True, False, False, True]
    for i in 0, 3:
        assert other.state[qs[i]]['average'].dtype == torch.float32
        assert torch.equal(other.state[qs[i]]['average'], opt.state[ps[i]]['average'])
    assert [g['lr'] for g in other.param_groups] == [.5, .1]


def test_counts_stay_where_torch_puts_them():
    p = nn.Parameter(torch.zeros(2, device='meta'))
    opt = torch.optim.Adam([p])
    state = dict(state={0: dict(step=torch.tensor(3.), exp_avg=torch.ones(2), exp_avg_sq=torch.ones(2))},
                 param_groups=opt.state_dict()['param_groups'])
    load_opt_state(opt, state)
    assert {k: v.device.type for k, v in opt.state[p].items()} == dict(step='cpu', exp_avg='meta', exp_avg_sq='meta')


@pytest.mark.parametrize('state', [dict(steppers=['Together'], together=[]), nn.Linear(2, 1).state_dict(), {},
                                   dict(state={}), dict(param_groups=[])], ids=str)
def test_what_is_not_the_state_of_an_optimizer(state):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    for f in load_opt_state, opt_state_in_order:
        with pytest.raises(ValueError, match='that of an optimizer has state and param_groups'): f(opt, state)


def test_any_optimizer_gets_a_copy():
    class Foreign:
        param_groups = []
        def load_state_dict(self, state): self.state = state

    opt, state = Foreign(), dict(moments=[torch.zeros(2)], name='mine')
    load_opt_state(opt, state)
    opt.state['moments'][0].add_(1)
    assert opt.state['name'] == 'mine' and state['moments'][0].sum() == 0


# Modes

@pytest.mark.parametrize('error', [None, ValueError, KeyboardInterrupt])
def test_each_layer_keeps_its_mode(error):
    net = nn.Sequential(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval()).eval(), nn.Dropout())
    net[0][0].train()
    before = [m.training for m in net.modules()]
    try:
        with modes_kept(net):
            net.train(net.training is False).add_module('new', nn.Dropout())
            if error: raise error
    except (ValueError, KeyboardInterrupt): pass
    assert [m.training for m in net.modules()][:len(before)] == before


# Random generators

def draw_all(): return random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1), np.random.randn()


class Own:
    "A sampler with generators of every kind"
    def __init__(self):
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(2)
        self.old, self.python = np.random.RandomState(3), random.Random(4)
        self.mersenne, self.label = np.random.Generator(np.random.MT19937(5)), 'not a generator'
    def __len__(self): return 3
    def draw(self):
        return [torch.rand((), generator=self.torch).item(), self.numpy.random(), self.old.rand(), self.old.randn(),
                self.python.random(), self.python.gauss(0, 1), self.mersenne.normal()]
    def __iter__(self): return iter([int(3 * x) % 3 for x in self.draw()[:3]])


@pytest.mark.parametrize('place', ['owner', 'sampler', 'batch_sampler', 'sampler of batch_sampler'])
def test_generators_of_samplers_are_found(place):
    own, data = Own(), list(range(3))
    owner = {'owner': lambda: own, 'sampler': lambda: DataLoader(data, 2, sampler=own),
             'batch_sampler': lambda: DataLoader(data, batch_sampler=own),
             'sampler of batch_sampler': lambda: DataLoader(data, batch_sampler=BatchSampler(own, 2, False))}[place]()
    states = random_state(owner)
    first = draw_all(), own.draw()
    assert (draw_all(), own.draw()) != first
    set_random_state(states, owner)
    assert (draw_all(), own.draw()) == first
    set_random_state(states, owner) # The states were not used up
    assert (draw_all(), own.draw()) == first


def test_epochs_of_a_loader_come_again():
    g = torch.Generator().manual_seed(1)
    for dl in (DataLoader(range(9), 2, shuffle=True), DataLoader(range(9), 2, shuffle=True, generator=g),
               DataLoader(range(9), 2, sampler=RandomSampler(range(9), generator=g))):
        states = random_state(dl)
        first = [b.tolist() for b in dl]
        assert [b.tolist() for b in dl] != first
        set_random_state(states, dl)
        assert [b.tolist() for b in dl] == first


def test_a_generator_is_an_owner_itself():
    for g in torch.Generator(), np.random.default_rng(1), np.random.RandomState(1), random.Random(1):
        def draw(): return torch.rand((), generator=g).item() if isinstance(g, torch.Generator) else g.random()
        states = random_state(g)
        first = draw()
        set_random_state(states, g)
        assert draw() == first and len(states) == len(random_state()) + 1


def test_a_shared_generator_counts_once():
    g = torch.Generator()
    loaders = [DataLoader(range(4), sampler=RandomSampler(range(4), generator=g), generator=g) for _ in range(2)]
    assert len(random_state(*loaders, g)) == len(random_state()) + 1


def test_samplers_that_lead_back_to_themselves_end():
    class Round: pass
    a, b = Round(), Round()
    a.sampler, b.sampler, b.batch_sampler, b.rng = b, a, b, random.Random(1)
    states = random_state(a)
    first = b.rng.random()
    set_random_state(states, a)
    assert b.rng.random() == first


@pytest.mark.parametrize('owner', [None, [1, 2], 'text', object(), type('Slots', (), dict(__slots__=('a',)))()])
def test_what_has_no_generator_adds_none(owner):
    states = random_state(owner, None)
    assert len(states) == len(random_state())
    set_random_state(states, owner)


def test_states_of_other_owners_are_refused_and_change_nothing():
    states = random_state(Own())
    before = random_state()
    for others in (), (Own(), Own()):
        with pytest.raises(ValueError, match='give the same loaders'): set_random_state(states, *others)
    first = draw_all()
    set_random_state(before)
    assert draw_all() == first


def test_a_machine_without_the_accelerator(monkeypatch):
    "Has no place for the state of one, and takes the others"
    states = [*random_state()[:3], torch.zeros(16, dtype=torch.uint8)]
    drawn = torch.rand(())
    monkeypatch.setattr(torch, 'get_device_module', lambda: torch.cpu)
    set_random_state(states)
    assert torch.rand(()) == drawn


@pytest.mark.parametrize('error', [None, ValueError, KeyboardInterrupt])
def test_a_look_leaves_no_trace(error):
    own = Own()
    states = random_state(own)
    try:
        with random_kept(own), random_kept():
            draw_all(), own.draw()
            if error: raise error
    except (ValueError, KeyboardInterrupt): pass
    got = draw_all(), own.draw()
    set_random_state(states, own)
    assert (draw_all(), own.draw()) == got


# plain attributes

class Carrying(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.h, self.n, self.drop = nn.Linear(2, 2), None, 0, nn.Dropout(.1)
        self.other = object()


def test_plain_attributes_come_back():
    a, b = Carrying(), Carrying()
    a.h, a.n, a.drop.p = [(torch.ones(2), {'c': torch.zeros(1)})], 7, .4
    a.eval()
    load_attribute_state(b, attribute_state(a))
    assert (b.n, b.drop.p) == (7, .4) and torch.equal(b.h[0][0], torch.ones(2)) and b.training and b.drop.training
    assert 'other' not in attribute_state(a)[''] and b.other is not a.other
    load_attribute_state(b, {'nowhere': dict(n=8)})
    assert b.n == 7


def test_what_no_file_can_hold_is_no_plain_attribute():
    net = Carrying()
    net.n, net.h = {nn.Linear: 1}, [np.zeros(1, 'longdouble')]
    assert list(attribute_state(net)['']) == []
    net.n, net.h = {(1, 'a'): 1}, [np.zeros(1)]
    assert list(attribute_state(net)['']) == ['h', 'n']


def test_tensors_among_them_go_where_the_parameters_are():
    a, b = Carrying(), Carrying().to('meta')
    a.h = torch.ones(2)
    load_attribute_state(b, attribute_state(a))
    assert b.h.device.type == 'meta'


def test_a_sampler_that_counts_epochs():
    class ByEpoch(torch.utils.data.Sampler):
        epoch = 3
        def __len__(self): return 4
        def __iter__(self): return iter(range(4))
    inner = ByEpoch()
    dl = torch.utils.data.DataLoader(range(4), batch_sampler=torch.utils.data.BatchSampler(inner, 2, False))
    states = random_state(dl)
    inner.epoch = 5
    set_random_state(states, dl)
    assert inner.epoch == 3


# numbers of parameter groups

def test_numbers_of_groups():
    opt = torch.optim.Adam([dict(params=[torch.zeros(1)], lr=torch.tensor(.1)), dict(params=[torch.zeros(1)])], lr=.2)
    lr, before = opt.param_groups[0]['lr'], group_values(opt)
    for group in opt.param_groups:
        set_hyper(group, 'lr', .5)
        set_hyper(group, 'momentum', .7)
    assert opt.param_groups[0]['lr'] is lr and lr == .5 and opt.param_groups[1]['betas'] == (.7, .999)
    set_group_values(opt, before)
    assert [float(g['lr']) for g in opt.param_groups] == [pytest.approx(.1), .2]
    assert [hyper(g, 'momentum') for g in opt.param_groups] == [.9, .9]
    assert hyper_ratios(opt.param_groups, 'lr') == [pytest.approx(.5), 1] and 'params' not in before[0]
    with pytest.raises(ValueError, match="no 'made_lr'; there are: lr, betas"):
        hyper(dict(lr=1, betas=(1, 2)), 'made_lr')
