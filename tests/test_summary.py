"Counts that are exact for any layer, however it is called, and a model that is as it was."
import gc
import os
import random
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

os.environ.setdefault('KINETO_LOG_LEVEL', '9')

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dlfound.summary import Memory, Summary, Work, formulas, summary

pytestmark = [pytest.mark.filterwarnings(f'ignore::{kind}') for kind in ('UserWarning', 'DeprecationWarning',
                                                                         'FutureWarning')]
quick = settings(max_examples=40, deadline=None)
small = st.integers(1, 4)
# Older ones show a mode no operation that calls functions
newer = pytest.mark.skipif(not hasattr(TorchDispatchMode, 'supports_higher_order_operators'), reason='PyTorch is older')


class Call(nn.Module):
    "A module that calls a function, with a linear layer that the function may use"
    def __init__(self, f):
        super().__init__()
        self.f, self.layer = f, nn.Linear(8, 8)
    def forward(self, *args, **kwargs): return self.f(self, *args, **kwargs)


def counts(model, *inputs, **kwargs):
    s = summary(model, *inputs, **kwargs)
    assert not s.unknown
    return s.parameters, s.multiply_adds


def work(f, *inputs):
    with Work() as found: f(*inputs)
    assert not found.unknown
    return found.total()


# Layers

@quick
@given(st.lists(st.integers(0, 4), max_size=4), small, small, st.booleans())
def test_linear_of_any_rank(shape, n_in, n_out, bias):
    layer = nn.Linear(n_in, n_out, bias=bias)
    assert counts(layer, torch.randn(*shape, n_in)) == (n_out * (n_in + bias), int(np.prod(shape)) * n_in * n_out)


@quick
@given(st.data())
def test_convolutions(data):
    draw, n = data.draw, data.draw(st.integers(1, 3))
    transposed, groups, bias, batch = draw(st.booleans()), draw(small), draw(st.booleans()), draw(st.integers(0, 3))
    n_in, n_out = groups * draw(small), groups * draw(small)
    def each(low, high): return tuple(draw(st.integers(low, high)) for _ in range(n))
    kernel, stride, dilation, padding, size = each(1, 3), each(1, 3), each(1, 2), each(0, 1), each(6, 8)
    made = getattr(nn, f'Conv{"Transpose" * transposed}{n}d')
    layer = made(n_in, n_out, kernel, stride, padding, groups=groups, bias=bias, dilation=dilation)
    x = torch.randn(*[batch] * (batch > 0), n_in, *size) # An image alone has no dimension for the batch
    if not transposed: # Where a filter is laid
        sides = zip(size, padding, dilation, kernel, stride)
        size = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in sides]
    places, numbers = max(batch, 1) * int(np.prod(size)), n_in * n_out // groups * int(np.prod(kernel))
    assert counts(layer, x) == (numbers + n_out * bias, places * numbers)


@settings(quick, max_examples=20)
@given(st.data())
def test_recurrent_layers(data):
    draw = data.draw
    kind, layers, both = draw(st.sampled_from(['LSTM', 'GRU', 'RNN'])), draw(st.integers(1, 3)), draw(st.booleans())
    n_in, n, bias, first = draw(small), draw(st.integers(2, 4)), draw(st.booleans()), draw(st.booleans())
    steps, batch, gates = draw(small), draw(small), {'LSTM': 4, 'GRU': 3, 'RNN': 1}[kind]
    size = draw(st.integers(0, n - 1)) if kind == 'LSTM' else 0
    net = getattr(nn, kind)(n_in, n, layers, bias=bias, batch_first=first, bidirectional=both,
                            **dict(proj_size=size) if size else {})
    numbers, out = 0, size or n
    for i in range(layers):
        numbers += (1 + both) * (gates * n * ((n_in if i == 0 else out * (1 + both)) + out) + size * n)
    parameters = numbers + (1 + both) * layers * 2 * gates * n * bias
    x = torch.randn(*(batch, steps) if first else (steps, batch), n_in)
    assert counts(net, x) == (parameters, steps * batch * numbers)
    lengths = draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=first, enforce_sorted=False)
    assert counts(net, packed) == (parameters, sum(lengths) * numbers)
    assert counts(net, x[:, 0] if not first else x[0]) == (parameters, steps * numbers)


@quick
@given(st.data())
def test_attention(data):
    draw = data.draw
    batch, queries, keys, heads = (draw(st.integers(1, 5)) for _ in range(4))
    d, first = heads * draw(small), draw(st.booleans())
    other = draw(st.booleans())
    kdim, vdim = (draw(small), draw(small)) if other else (d, d)
    mha = nn.MultiheadAttention(d, heads, batch_first=first, bias=draw(st.booleans()), kdim=kdim, vdim=vdim)
    mha.train(draw(st.booleans()))
    def sequence(n, size): return torch.randn(*(batch, n) if first else (n, batch), size)
    hand = batch * (queries * d * 2 * d + keys * d * (kdim + vdim) + 2 * queries * keys * d)
    given = sequence(queries, d), sequence(keys, kdim), sequence(keys, vdim)
    with torch.set_grad_enabled(draw(st.booleans())):
        s = summary(mha, *given, need_weights=draw(st.booleans()))
    assert (s.multiply_adds, s['out_proj'].calls, s['out_proj'].parameters > 0) == (hand, 0, True)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('gradients', [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('first', [True, False])
def test_transformer_layers(training, gradients, first):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=first), 2).train(training)
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=first).train(training)
    x, memory = torch.randn(4, 4, 8), torch.randn(4, 4, 8)
    layer = 4 * 4 * (4 * 8 * 8 + 2 * 4 * 8 + 2 * 8 * 16)
    with gradients():
        s = summary(encoder, x, src_key_padding_mask=torch.zeros(4, 4, dtype=torch.bool))
        assert s.multiply_adds == 2 * layer
        assert {s[f'layers.{i}'].multiply_adds for i in range(2)} == {layer}
        assert summary(decoder, x, memory).multiply_adds == layer + 4 * 4 * (4 * 8 * 8 + 2 * 4 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_without_products():
    x = torch.randn(2, 8, 6, 6)
    for layer in nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 8), nn.Upsample(scale_factor=2), \
            nn.Softmax(1), nn.Dropout(), nn.Upsample(scale_factor=2, mode='bilinear'), nn.PReLU(8), nn.Flatten():
        assert summary(layer, x).multiply_adds == 0 and not summary(layer, x).unknown
    assert counts(nn.Embedding(10, 4), torch.tensor([1, 2])) == (40, 0)
    assert counts(nn.EmbeddingBag(10, 4), torch.tensor([[1, 2]])) == (40, 0)
    assert counts(nn.Upsample(scale_factor=2, mode='linear'), x[0]) == (0, 0)
    for cell, gates in (nn.LSTMCell(8, 4), 4), (nn.GRUCell(8, 4), 3), (nn.RNNCell(8, 4), 1):
        assert counts(cell, torch.randn(5, 8))[1] == 5 * gates * 4 * (8 + 4)


# Ways to write a product

a, b, v, stacked = torch.randn(3, 4), torch.randn(4, 5), torch.randn(4), torch.randn(2, 3, 4)
products = {
    'mm': (lambda: torch.mm(a, b), 60), 'matmul': (lambda: a @ b, 60), 'F.linear': (lambda: F.linear(a, b.T), 60),
    'einsum': (lambda: torch.einsum('ij,jk->ik', a, b), 60), 'tensordot': (lambda: torch.tensordot(a, b, 1), 60),
    'inner': (lambda: torch.inner(a, b.T), 60), 'multi_dot': (lambda: torch.linalg.multi_dot([a, b, b.T]), 120),
    'mv': (lambda: a @ v, 12), 'vector first': (lambda: v @ b, 20), 'dot': (lambda: v @ v, 4),
    'vdot': (lambda: torch.vdot(v, v), 4), 'broadcast': (lambda: stacked @ b, 120),
    'bmm': (lambda: torch.bmm(stacked, stacked.mT), 72), 'both broadcast': (lambda: stacked[:, None] @ b, 120),
    'addmm': (lambda: torch.addmm(torch.ones(5), a, b), 60), 'addmv': (lambda: torch.addmv(torch.ones(3), a, v), 12),
    'baddbmm': (lambda: torch.baddbmm(torch.ones(2, 3, 3), stacked, stacked.mT), 72),
    'addbmm': (lambda: torch.addbmm(torch.ones(3, 3), stacked, stacked.mT), 72),
    'in place': (lambda: torch.ones(3, 5).addmm_(a, b), 60), 'addmv_': (lambda: torch.ones(3).addmv_(a, v), 12),
    '8 bits': (lambda: torch._int_mm(*[torch.ones(32, 32, dtype=torch.int8)] * 2), 32**3),
    'out': (lambda: torch.mm(a, b, out=torch.empty(3, 5)), 60), 'by name': (lambda: torch.mm(input=a, mat2=b), 60),
    'complex': (lambda: a.cfloat() @ b.cfloat(), 60),
    'integers': (lambda: a.long() @ b.long(), 60), 'no columns': (lambda: a @ torch.ones(4, 0), 0),
    'elementwise': (lambda: (a * a).sum(), 0), 'outer': (lambda: torch.outer(v, v), 0),
}


@pytest.mark.parametrize('name', products)
def test_every_way_to_write_a_product(name):
    f, hand = products[name]
    assert work(f) == hand
    with torch.inference_mode(): assert work(f) == hand


@pytest.mark.parametrize('kwargs', [{}, dict(is_causal=True), dict(attn_mask=torch.zeros(5, 7)), dict(dropout_p=.5),
                                    dict(scale=1.), dict(enable_gqa=True)], ids=str)
def test_scaled_dot_product_attention(kwargs):
    heads = 1 if 'enable_gqa' in kwargs else 4
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 7, 8), torch.randn(2, heads, 7, 8)
    assert work(partial(F.scaled_dot_product_attention, **kwargs), q, k, v) == 2 * 4 * 5 * 7 * (8 + 8)
    wide = torch.randn(2, heads, 7, 6)
    assert work(partial(F.scaled_dot_product_attention, **kwargs), q, k, wide) == 2 * 4 * 5 * 7 * (8 + 6)


def test_vmap():
    torch.func.vmap(torch.sin)(stacked) # As above
    assert work(torch.func.vmap(lambda x: x @ b), stacked) == 120


@newer
def test_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention
    attend = Call(lambda self, q: flex_attention(q, q, q))
    assert counts(attend, torch.randn(1, 2, 16, 8))[1] == 2 * 16 * 16 * 16


def test_fused_kernels_of_other_devices():
    "By their schemas, for they do not run here"
    x, weights = torch.empty(5, 3, 8), [torch.empty(24, 8), torch.empty(24, 6), torch.empty(24), torch.empty(24)]
    h, hand = torch.empty(1, 3, 6), 15 * 24 * (8 + 6)
    assert formulas['aten._cudnn_rnn']((x, weights, 4, None, h, h, 2, 6, 0, 1, False), None) == hand
    assert formulas['aten._cudnn_rnn']((x, weights, 4, torch.empty(500), h, h, 2, 6, 0, 1, False), None) == hand
    assert formulas['aten.miopen_rnn']((x, weights, 4, h, h, 2, 6, 1, False), None) == hand
    assert formulas['aten._lstm_mps']((x, [h, h], weights, True, 1, 0., True, False, False), None) == hand
    packed = torch.empty(11, 8)
    assert formulas['aten._cudnn_rnn']((packed, weights, 4, None, h, h, 2, 6, 0, 1, False), None) == 11 * 24 * (8 + 6)


def test_a_gradient_in_the_forward_pass():
    def force(self, x): return torch.autograd.grad(self.layer(x).sum(), x, create_graph=True)[0]
    x = torch.randn(5, 8, requires_grad=True)
    torch.func.grad(torch.sin)(torch.tensor(1.)) # The first use in a process computes something of its own
    assert summary(Call(force), x).multiply_adds == 2 * 5 * 8 * 8
    def derivative(self, x): return torch.func.grad(lambda z: self.layer(z).sum())(x)
    assert summary(Call(derivative), x.detach()).multiply_adds == 2 * 5 * 8 * 8


# What is not counted is named

def test_operations_without_a_formula_are_named():
    x = torch.randn(5, 8)
    def sparse(self, x): return torch.eye(5).to_sparse() @ self.layer(x)
    s = summary(Call(sparse), x)
    assert s.multiply_adds == 5 * 8 * 8 and list(s.unknown) == ['aten.mm'] and 'aten.mm is not counted (×1)' in repr(s)
    for layout in torch.jagged, torch.strided:
        def nested(self, x): return self.layer(torch.nested.nested_tensor([x, x[:2]], layout=layout))
        assert summary(Call(nested), x).unknown == {'aten.linear': 1}
    int8 = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    assert summary(int8.eval(), x).unknown == {'quantized.linear_dynamic': 1}


@newer
def test_an_operation_that_calls_functions_is_named():
    cond = Call(lambda self, x: torch.cond(torch.tensor(True), torch.sin, torch.cos, (x,)))
    assert 'cond' in summary(cond, torch.randn(5, 8)).unknown


def test_what_is_computed_elsewhere_is_not_seen():
    "As the page says; no operation of PyTorch runs in this thread"
    def aside(self, x):
        with ThreadPoolExecutor(1) as pool: pool.submit(lambda: x @ x.T).result()
        return torch.from_numpy(x.detach().numpy() @ np.ones((8, 2)))
    assert counts(Call(aside), torch.randn(5, 8)) == (72, 0)


names = { # Of operations, and whether they sound like products
    True: ['mm', '_int_mm', 'addmm_', '_transformer_encoder_layer_fwd', '_sparse_semi_structured_linear', 'linear',
           '_wrapped_quantized_linear_prepacked', 'mkldnn_linear', '_weight_int8pack_mm', 'quantized_lstm',
           'miopen_rnn', '_cudnn_attention_forward', 'conv_tbc', '_sparse_sparse_matmul'],
    False: ['_cudnn_rnn_flatten_weight', '_convert_weight_to_int4pack', '_thnn_fused_lstm_cell', '_thnn_fused_gru_cell',
            'upsample_linear1d', '_upsample_bilinear2d_aa', 'upsample_trilinear3d', 'to_mkldnn', 'add', 'cumsum']}


@pytest.mark.parametrize('like', names)
def test_names_that_sound_like_products(like):
    for name in names[like]:
        mode, op = Work(), lambda *_: None
        op.overloadpacket = f'aten.{name}'
        mode.__torch_dispatch__(op, (), (torch.ones(2).to_sparse(),)) # Sparse: no formula fits
        assert (name, mode.unknown) == (name, {f'aten.{name}': 1} if like else {})


def test_operations_that_are_whole_layers_are_named():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with torch.no_grad(), Work() as found: encoder(torch.randn(2, 5, 8))
    assert found.unknown == {'aten._transformer_encoder_layer_fwd': 2} and found.total() == 0
    with Work() as found: torch._grouped_mm(torch.ones(2, 16, 32).bfloat16(), torch.ones(32, 64).bfloat16(),
                                            offs=torch.tensor([32, 64], dtype=torch.int32))
    assert found.unknown == {'aten._grouped_mm': 1}


def test_products_that_are_written_elementwise_are_not_seen():
    "As the page says; of a complex convolution PyTorch makes three, each of which counts"
    a = torch.randn(4, 8)
    for f in (lambda: (a * a).sum(-1), lambda: torch.linalg.vecdot(a, a), lambda: torch.cdist(a, a),
              lambda: torch.linalg.inv(torch.eye(4)), lambda: torch.linalg.solve(torch.eye(4), a),
              lambda: torch.fft.fft(a)):
        assert work(f) == 0
    conv = nn.Conv1d(2, 2, 3, dtype=torch.cfloat)
    assert counts(conv, torch.zeros(1, 2, 5, dtype=torch.cfloat))[1] == 3 * (3 * 2 * 2 * 3)


def test_a_formula_of_ones_own():
    library = torch.library.Library('dlfound_test', 'DEF')
    library.define('twice(Tensor x, Tensor w) -> Tensor')
    library.impl('twice', lambda x, w: x @ w @ w, 'CompositeExplicitAutograd')
    model = Call(lambda self, x: torch.ops.dlfound_test.twice(x, torch.ones(8, 8)))
    with torch.no_grad():
        assert summary(model, torch.randn(5, 8)).unknown == {'dlfound_test.twice': 1}
        formulas['dlfound_test.twice'] = lambda args, out: 2 * out.numel() * len(args[1])
        try: assert counts(model, torch.randn(5, 8))[1] == 2 * 5 * 8 * 8
        finally: del formulas['dlfound_test.twice']


# Memory

def convolutions(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                                         nn.Dropout(.2), nn.Flatten(), nn.Linear(8 * 3 * 3, 10))
def residual(self, x): return x + F.relu(self.layer(x))
def remembers(self, x):
    self.kept = self.layer(x)
    return self.kept.sum()
def again(self, x):
    net = nn.Sequential(self.layer, nn.Tanh(), self.layer)
    return checkpoint(net, x, use_reentrant=False, preserve_rng_state=False)
def discards(self, x):
    self.layer(x).relu().sum()
    return self.layer(x)


held = {
    'convolutions': (convolutions, torch.randn(4, 3, 8, 8)), 'lstm': (lambda: nn.LSTM(8, 6, 2), torch.randn(5, 3, 8)),
    'gru': (lambda: nn.GRU(8, 6, bidirectional=True), torch.randn(5, 3, 8)),
    'encoder': (lambda: nn.TransformerEncoderLayer(8, 2, 16), torch.randn(5, 3, 8)),
    'residual': (lambda: Call(residual), torch.randn(5, 8)), 'discards': (lambda: Call(discards), torch.randn(5, 8)),
    'checkpoint': (lambda: Call(again), torch.randn(5, 8)),
    'frozen': (lambda: nn.Sequential(*[nn.Linear(8, 8).requires_grad_(i > 1) for i in range(3)]), torch.randn(5, 8)),
    'view': (lambda: Call(lambda self, x: self.layer(x)[:1].mT), torch.randn(5, 8)),
    'spectral norm': (lambda: parametrizations.spectral_norm(nn.Linear(8, 6)), torch.randn(5, 8)),
    'embedding': (lambda: nn.Embedding(10, 4), torch.tensor([1, 2])),
}


@pytest.fixture(scope='module')
def quick_collections():
    "Collecting garbage looks only at what is new, for it is done before each measurement"
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('gradients', [True, False])
@pytest.mark.parametrize('name', held)
def test_memory_is_what_the_allocator_says(name, gradients, training, quick_collections):
    torch.manual_seed(0)
    make, x = held[name]
    model = make().train(training)
    with torch.set_grad_enabled(gradients):
        s = summary(model, x)
        gc.collect() # What others left would count as given back
        gc.disable()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: out = model(x)
        gc.enable()
        allocated = sum(e.self_cpu_memory_usage for e in p.events())
    assert s.activation_bytes == allocated and out is not None


def test_memory_by_hand():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(5, 8)
    s = summary(net, x)
    assert [r.activation_bytes for r in s.rows] == [4 * 5 * (16 + 2), 0, 4 * 5 * 16, 4 * 5 * 2]
    assert summary(net.double(), x.double()).activation_bytes == 2 * s.activation_bytes
    with Memory() as memory: kept, _ = torch.ones(10), torch.ones(20)
    del _
    assert memory.held().total() == 40 and len(kept) == 10


def test_memory_that_is_not_seen():
    "As the page says"
    with Memory() as memory: kept = torch.eye(4).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert memory.held().total() < 4 * (16 + 5) and len(kept) == 2


def test_a_model_that_keeps_its_activations_is_left_without_them():
    model = Call(remembers)
    assert summary(model, torch.randn(5, 8)).activation_bytes == 4 * (5 * 8 + 1) and not hasattr(model, 'kept')


# In any mode and kind of number

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype):
    for model, x in (nn.LSTM(8, 6), torch.randn(5, 3, 8)), (nn.Conv1d(8, 4, 3), torch.randn(2, 8, 9)), \
            (nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8)):
        given = (x,) * 3 if isinstance(model, nn.MultiheadAttention) else (x,)
        wanted = counts(model, *given)
        assert counts(model.to(dtype), *[t.to(dtype) for t in given]) == wanted


def test_autocast():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 8)
    with torch.autocast('cpu', torch.bfloat16): assert counts(model, x) == counts(model.float(), x)


@pytest.mark.parametrize('make', [convolutions, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
def test_the_meta_device(make):
    x = torch.randn(4, 3, 8, 8) if make is convolutions else torch.randn(4, 5, 8)
    s, here = summary(make().to('meta'), x.to('meta')), summary(make(), x)
    assert (s.parameters, s.multiply_adds, s.seconds) == (here.parameters, here.multiply_adds, None)
    assert [r.shape for r in s.rows] == [r.shape for r in here.rows] and 'ms' not in repr(s) and 'ms' in repr(here)
    assert s.activation_bytes > 0


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode():
        s, lstm = summary(convolutions(), torch.randn(4, 3, 8, 8)), nn.LSTM(8, 6)
        assert counts(lstm, torch.randn(5, 3, 8))[1] == 15 * 24 * (8 + 6)
    assert s.multiply_adds == summary(convolutions(), torch.randn(4, 3, 8, 8)).multiply_adds


def test_compiled_models():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(5, 8)
    wanted = counts(net, x)
    assert counts(torch.compile(net, backend='eager'), x) == wanted
    compiled = torch.compile(net, backend='eager')
    compiled(x)
    s = summary(compiled, x)
    assert (s.parameters, s.multiply_adds, s['_orig_mod.0'].calls) == (*wanted, 1)
    net.compile(backend='eager')
    net(x)
    assert counts(net, x) == wanted


def test_scripted_and_traced_models():
    net, x = nn.Sequential(nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)), torch.randn(2, 8, 9)
    wanted = counts(net, x)
    for model in torch.jit.script(net), torch.jit.trace(net, x):
        before = [t.clone() for t in model.buffers()]
        assert counts(model, x) == wanted
        assert all(map(torch.equal, before, model.buffers()))
        model(x)
        assert not all(map(torch.equal, before, model.buffers()))


# Modules

def test_inputs_in_any_structure():
    def forward(self, batch, *pair, scale=1): return {'out': [self.layer(batch['x'][0]) * scale, (pair[0], None)]}
    x = torch.randn(5, 8)
    s = summary(Call(forward), OrderedDict(x=(x, 'name')), x, 3, scale=torch.tensor(2.))
    assert s.multiply_adds == 5 * 8 * 8 and s.rows[0].shape == {'out': ((5, 8), ((5, 8), None))}
    assert summary(Call(lambda self: self.layer.weight.sum())).rows[0].shape == ()


def test_tied_reused_unused_and_unregistered_modules():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    s = summary(net, torch.randn(5, 8))
    assert [r.parameters for r in s.rows] == [152, 72, 72, 8] and s.tied == {'0.weight': ['2.weight']}
    twice = nn.Sequential(net[0], nn.ReLU(), net[0])
    s = summary(twice, torch.randn(5, 8))
    assert (s.parameters, s.multiply_adds, s['0'].calls, s['0'].multiply_adds) == (72, 640, 2, 640)
    assert s.tied == {'0': ['2']} and '×2' in repr(s)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.hidden = nn.Linear(8, 8), nn.Linear(8, 8), [nn.Linear(8, 4)]
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
        def forward(self, x): return self.hidden[0](self.used(x)), self.frozen.forward(x)
    s = summary(Odd(), torch.randn(5, 8))
    assert s.multiply_adds == 5 * 8 * (8 + 4 + 8) and (s.parameters, s.trainable) == (3 * 72, 2 * 72)
    assert [r.calls for r in s.rows] == [1, 1, 0, 0] and repr(s).count('not seen') == 2


def test_rows_add_up():
    s = summary(nn.Transformer(8, 2, 2, 2, 16), torch.randn(5, 3, 8), torch.randn(4, 3, 8))
    for row in s.rows:
        inside = [r for r in s.rows if r.name.rpartition('.')[0] == row.name and r.name]
        for cost in 'parameters', 'trainable', 'multiply_adds', 'activation_bytes', 'seconds':
            assert getattr(row, cost) >= sum(getattr(r, cost) for r in inside) - 1e-9
    layers = [s[f'{part}.layers.{i}'] for part in ('encoder', 'decoder') for i in range(2)]
    assert s.multiply_adds == sum(r.multiply_adds for r in layers)


def test_an_error_that_the_model_catches():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Sequential(nn.Linear(8, 4), nn.Linear(7, 7)), nn.Linear(8, 2)
        def forward(self, x):
            try: return self.wrong(x)
            except RuntimeError: return self.right(x) @ torch.ones(2, 3)
    s = summary(Careful(), torch.randn(5, 8))
    assert {r.name: r.multiply_adds for r in s.rows} == {'': 5 * (32 + 16 + 6), 'wrong': 160, 'wrong.0': 160,
                                                         'wrong.1': 0, 'right': 80}


def test_a_module_that_calls_itself():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
        def forward(self, x, n=3): return self.layer(x) if n == 0 else self(self.layer(x), n - 1)
    s = summary(Again(), torch.randn(5, 8))
    assert (s.multiply_adds, s.rows[0].calls, s['layer'].calls) == (4 * 320, 4, 4)


def test_time_belongs_to_the_module_at_work():
    slept = []
    class Sleep(nn.Module):
        def forward(self, x):
            begin = time.perf_counter()
            time.sleep(.05)
            slept.append(time.perf_counter() - begin)
            return x
    s = summary(nn.Sequential(nn.Sequential(nn.ReLU(), Sleep()), nn.ReLU()), torch.ones(2))
    assert len(slept) == 4 and s.seconds >= s['0'].seconds >= s['0.1'].seconds >= min(slept[1:]) # The first counts
    assert s['0.1'].seconds > s['0.0'].seconds + s['1'].seconds


def test_the_shortest_of_three_times_is_kept():
    delays = {'changing': [0, .3, 0, .3], 'steady': [0, .1, .1, .1]} # The first call counts
    def sleep(name): return Call(lambda self, x: time.sleep(delays[name].pop(0)) or x)
    s = summary(nn.Sequential(sleep('changing'), sleep('steady')), torch.ones(2))
    assert not any(delays.values()) and s['0'].seconds < s['1'].seconds


def test_a_module_with_two_parents_is_in_the_first():
    layer = nn.Linear(8, 8)
    s = summary(nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.Linear(8, 4))), torch.ones(5, 8))
    assert [r.multiply_adds for r in s.limit(1).rows] == [2 * 320 + 160, 2 * 320, 160]
    assert [r.parameters for r in s.limit(1).rows] == [72 + 36, 72, 36] and s['0.0'].calls == 2
    assert s.tied == {'0.0': ['1.0']} and '0.0 is also 1.0' in repr(s)


def test_shared_blocks_are_said_once():
    s = summary(nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16)] * 12), torch.randn(4, 2, 8))
    assert s.tied == {'0': [str(i) for i in range(1, 12)]} and len(s.table().status) < 60


def test_published_counts():
    "torchvision's own, of weights that are not downloaded; they are given in billions, to three decimals"
    torchvision = pytest.importorskip('torchvision')
    for name in 'resnet50', 'vit_b_16', 'mobilenet_v3_small', 'swin_t':
        meta = torchvision.models.get_model_weights(name).DEFAULT.meta
        with torch.device('meta'): model, x = torchvision.models.get_model(name).eval(), torch.empty(1, 3, 224, 224)
        with torch.no_grad(): s = summary(model, x)
        assert (name, s.parameters) == (name, meta['num_params'])
        assert round(s.multiply_adds / 1e9, 3) == meta['_ops']


# The model is as it was

class Everything(nn.Module):
    "All that a pass may change: statistics, random numbers, attributes, modes, gradients, and its input"
    def __init__(self, fail):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
        self.norm, self.fail, self.calls = parametrizations.spectral_norm(nn.Linear(8, 8)), fail, 0
        self.register_buffer('cache', None)
        self.register_buffer('shared', torch.ones(3))
        self.body[0].register_buffer('shared', self.shared)
    def forward(self, x):
        self.calls += 1
        self.cache, self.new = torch.ones(2), torch.zeros(3)
        self.shared += 1
        self.body[2].eval()
        random.random(), np.random.rand()
        y = self.norm(self.body(x))
        if torch.is_grad_enabled(): y.sum().backward(retain_graph=True)
        if self.fail: return self.body[3](y[:, 1:])
        return y


def state(model):
    every, named = torch.nn.modules.module, (*model.named_parameters(), *model.named_buffers(remove_duplicate=False))
    tensors = [(k, id(t), t.tolist(), t.requires_grad) for k, t in named]
    gradients = [(id(p.grad), p.grad if p.grad is None else p.grad.tolist()) for p in model.parameters()]
    hooks = [[list(vars(m)[k]) for k in vars(m) if 'hooks' in k] for m in model.modules()]
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    attributes = [sorted(vars(m)) for m in model.modules()]
    return dict(tensors=tensors, gradients=gradients, hooks=hooks, generators=generators, attributes=attributes,
                modes=[m.training for m in model.modules()], calls=model.calls, cache=model.cache,
                everywhere=(list(every._global_forward_hooks), list(every._global_forward_pre_hooks)),
                fast=torch.backends.mha.get_fastpath_enabled())


@pytest.mark.parametrize('fail', [False, True])
@pytest.mark.parametrize('gradients', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_changed(fail, gradients):
    model, x = Everything(fail), torch.randn(6, 8)
    model.body[1].eval()
    model.norm.weight # As a pass would, once
    model.body[3].weight.grad = torch.ones(8, 8)
    model.body[3].bias.requires_grad_(False)
    heard = []
    model.body.register_forward_hook(lambda m, i, o: heard.append(len(o)))
    before, given = state(model), x.clone()
    with gradients():
        if not fail: summary(model, x)
        else:
            with pytest.raises(RuntimeError, match='mat1 and mat2') as e: summary(model, x)
            assert 'in layer body.3, a Linear' in e.value.__notes__[0]
    assert state(model) == before and x.equal(given) and set(heard) == {6}


class Changing(nn.Module):
    "Writes to what it holds: weights, attributes, dicts and lists of tensors, layers, its own generator and hooks"
    def __init__(self):
        super().__init__()
        self.layer, self.target, self.list, self.dict = nn.Linear(8, 8), nn.Linear(8, 8), [], OrderedDict()
        self.cache, self.inner = torch.zeros(5, 8), {0: {'k': torch.zeros(3)}, 1: [torch.ones(2)]}
        self.last = deque([1], 1)
        self.same, self.generator = self.inner, torch.Generator().manual_seed(0)
        self.hook = self.layer.register_forward_hook(lambda *_: self.hook.remove())
    def forward(self, x):
        assert self.inner is self.same and not hasattr(self, 'new') # Each call begins as the first did
        with torch.no_grad():
            for a, b in zip(self.target.parameters(), self.layer.parameters()): a.lerp_(b, .1)
            self.target.weight.data = self.target.weight.data * 2
            self.target.bias.data.add_(1)
        self.cache += x
        self.list.append(x)
        self.dict['a'] = x
        self.inner[0]['k'] += 1
        self.inner[1][0] += 1
        self.inner[1].append(self.inner.pop(0))
        self.last.append(2)
        self.new, self.generator2 = nn.Linear(8, 4), torch.Generator()
        x = self.new(self.layer(x)) + torch.rand(1, generator=self.generator)
        self.layer.weight = nn.Parameter(torch.zeros(8, 8))
        self.target.requires_grad_(False)
        return x


@pytest.mark.parametrize('fail', [False, True])
@pytest.mark.parametrize('gradients', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_a_model_changes_in_itself_is_put_back(fail, gradients):
    model = Changing()
    if fail: model.register_forward_hook(lambda *_: 1 / 0)
    def state():
        weights = [(k, id(p), p.data_ptr(), p.tolist(), p.requires_grad) for k, p in model.named_parameters()]
        return weights, [sorted(vars(m)) for m in model.modules()], str(vars(model)), id(model.cache), \
            model.generator.get_state().tolist(), len(model.layer._forward_hooks)
    before = state()
    with gradients():
        if not fail:
            s = summary(model, torch.randn(5, 8))
            assert s.multiply_adds == 5 * 8 * (8 + 4) and [r.name for r in s.rows] == ['', 'layer', 'target']
        else:
            with pytest.raises(ZeroDivisionError): summary(model, torch.randn(5, 8))
    assert state() == before


def test_hooks_of_the_model_run_in_each_call():
    heard, model = [], nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_hook(lambda m, i, o: heard.append(len(o)) or o @ torch.ones(8, 2))
    s = summary(model, torch.ones(5, 8))
    assert heard == [5] * 4 and s.multiply_adds == 5 * 8 * (8 + 2) and s.rows[0].shape == (5, 2)


def test_models_made_in_inference_mode():
    with torch.inference_mode(): model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    def state(): return {k: t.tolist() for k, t in model.state_dict().items()}
    before = state()
    with torch.inference_mode(): assert counts(model, torch.randn(5, 8))[1] == 320
    with torch.no_grad(): assert counts(model.eval(), torch.randn(5, 8))[1] == 320
    assert state() == before


def test_an_interrupt_leaves_nothing_behind():
    model = Everything(False)
    model.norm.weight
    def stop(*_): raise KeyboardInterrupt
    model.body[3].register_forward_hook(stop)
    x = torch.randn(6, 8)
    before = state(model)
    with pytest.raises(KeyboardInterrupt): summary(model, x)
    assert state(model) == before


def test_the_error_of_the_model_comes_through():
    class Own(Exception): pass
    mine = Own('mine')
    def fail(self, x): raise mine
    with pytest.raises(Own) as e: summary(Call(fail), torch.ones(2))
    assert e.value is mine
    with pytest.raises(TypeError, match='make one, as nn.ReLU'): summary(F.relu, torch.ones(2))
    with pytest.raises(TypeError, match='make one, as nn.ReLU'): summary(nn.ReLU, torch.ones(2))
    with pytest.raises(TypeError, match='forward'): summary(nn.ReLU())
    with pytest.raises(TypeError) as e: summary(nn.Linear(3, 4), (2, 3))
    assert any('no input is a tensor' in note for note in e.value.__notes__)


def test_a_graph_from_before_can_still_be_used():
    "The buffers that a backward pass will need are not touched"
    model, x = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)), torch.randn(5, 8)
    model[0].eval()
    loss = model(x).sum()
    model.train()
    summary(model, x)
    loss.backward()
    assert model[1].weight.grad is not None


def test_inputs_are_told_apart_as_before():
    x, seen = torch.randn(5, 8, requires_grad=True), []
    def forward(self, a, b, c=None): return seen.append((a is b, a is c, a.requires_grad, a.is_leaf)) or self.layer(a)
    summary(Call(forward), x, x, c=torch.ones(2))
    summary(Call(forward), x * 2, torch.ones(2), c=None)
    assert seen == [(True, False, True, True)] * 4 + [(False, False, True, False)] * 4 and x.grad is None


def test_summary_twice_is_the_same():
    model, x = Everything(False), torch.randn(6, 8)
    one, two = (summary(model, x) for _ in range(2))
    assert [(r.name, r.shape, r.calls, r.multiply_adds, r.activation_bytes) for r in one.rows] == [
        (r.name, r.shape, r.calls, r.multiply_adds, r.activation_bytes) for r in two.rows]


# The result

def test_a_limit_of_depth():
    s = summary(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), torch.randn(5, 3, 8))
    assert [len(s.limit(n).rows) for n in (0, 1)] == [1, 2] and len(s.limit(99).rows) == len(s.rows)
    for n in range(4):
        assert (s.limit(n).multiply_adds, s.limit(n).parameters) == (s.multiply_adds, s.parameters)
    assert isinstance(s.limit(1), Summary)
    assert [row.name for row in s.limit(-1).rows] == ['']
    with pytest.raises(KeyError, match="no row 'nope'; there are \\['', '"): s['nope']


def test_it_is_shown():
    net = nn.Sequential(nn.Linear(1000, 2000), nn.ReLU())
    s = summary(net, torch.randn(2, 1000))
    text, page = repr(s), s._repr_html_()
    for words in '2,002,000', '4,000,000', '(2, 2000)', 'Linear': assert words in text and words in page
    assert len({len(line) for line in text.splitlines()}) == 1 and page.count('<tr>') == 4
    assert Counter(s['0'].kind for _ in range(1)) == {'Linear': 1}


def test_mistakes_are_told():
    with pytest.raises(TypeError, match='is no nn.Module object'): summary(nn.Linear, torch.ones(2, 3))
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match='0.weight has no shape yet'): summary(lazy, torch.ones(2, 3))
    assert lazy[0].weight.__class__ is nn.UninitializedParameter
    lazy(torch.ones(2, 3))
    assert counts(lazy, torch.ones(2, 3))[1] == 18
