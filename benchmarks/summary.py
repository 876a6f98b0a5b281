"""Parameters and multiply-adds of models: by formula, by `summary`, by torchinfo and by PyTorch's FlopCounterMode.

Run it as `python benchmarks/summary.py`; it takes about half a minute. torchinfo is measured where it is installed
(`pip install torchinfo`). No weights are downloaded. The formulas below use nothing but the sizes in a model's
definition; a multiply-add is a product that is added to a sum, so FlopCounterMode, which counts both, is halved.
torchinfo counts the biases of convolutions and recurrent layers too, and one product for each parameter of a norm. In
the table a peer's figure stands where it differs from the formula, with the ratio; `=` says that it is the same. Last,
what a summary of a ResNet-18 costs, in forward passes.
"""
from common import compare, row, save

import warnings

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from dlfound.summary import summary

warnings.filterwarnings('ignore')
torch.manual_seed(0)
try: import torchinfo
except ImportError: torchinfo = None


# Models that do part of their work outside layers, or use layers in unusual ways

class Function(nn.Module):
    "A function with weights and layers"
    def __init__(self, f, *layers, **weights):
        super().__init__()
        self.f, self.layers = f, nn.ModuleList(layers)
        for name, shape in weights.items(): setattr(self, name, nn.Parameter(torch.randn(shape)))
    def forward(self, *inputs): return self.f(self, *inputs)


class Words(nn.Module):
    "Two layers that share a matrix"
    def __init__(self):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(1000, 32), nn.Linear(32, 1000, bias=False)
        self.decoder.weight = self.embedding.weight
    def forward(self, words): return self.decoder(self.embedding(words))


def attend(self, x):
    q, k, v = self.layers[0](x).chunk(3, dim=-1)
    return self.layers[1]((q @ k.mT).softmax(-1) @ v)
def attend_fused(self, x):
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.layers[0](x).chunk(3, dim=-1))
    return self.layers[1](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
def steps(self, x):
    h = c = x.new_zeros(3, 6)
    for one in x: h, c = self.layers[0](one, (h, c))
    return h
def twice(self, x): return self.layers[0](self.layers[0](x))
def first(self, x): return self.layers[0](x)
def functional(self, x): return F.linear(x, self.weight)
def einsum(self, x): return torch.einsum('tbi,oi->tbo', x, self.weight)
def vector(self, x): return self.weight @ x
def bound(self, x): return self.layers[0].forward(x)


# Formulas: parameters and multiply-adds

def recurrent(gates, n_in, n, n_layers=1, ways=1, proj=0, bias=True):
    "Numbers in the matrices, and in the biases"
    out = proj or n
    matrices = sum(ways * (gates * n * ((n_in if i == 0 else ways * out) + out) + proj * n) for i in range(n_layers))
    return matrices, 2 * gates * n * ways * n_layers * bias


def attention(queries, keys, d, kdim=None, vdim=None):
    "Multi-head attention of one example: parameters, multiply-adds"
    kdim, vdim = kdim or d, vdim or d
    return (d * (d + kdim + vdim + d) + 4 * d,
            queries * d * 2 * d + keys * d * (kdim + vdim) + 2 * queries * keys * d)


def encoder_layer(n, d, hidden):
    p, w = attention(n, n, d)
    return p + 2 * d * hidden + hidden + d + 4 * d, w + n * 2 * d * hidden


def decoder_layer(n, memory, d, hidden):
    (p, w), (p2, w2) = attention(n, n, d), attention(n, memory, d)
    return p + p2 + 2 * d * hidden + hidden + d + 6 * d, w + w2 + n * 2 * d * hidden


class Tally:
    "Adds up convolutions with norms, as image models have them"
    def __init__(self): self.parameters = self.work = 0
    def conv(self, n_in, n_out, kernel, size, groups=1, norm=True, bias=False):
        numbers = n_in * n_out // groups * kernel**2
        self.parameters += numbers + n_out * (2 * norm + bias)
        self.work += numbers * size**2
    def linear(self, n_in, n_out): self.conv(n_in, n_out, 1, 1, norm=False, bias=True)
    def totals(self): return self.parameters, self.work


def resnet50():
    "He et al. 2016, table 1, with the stride in the 3×3 convolution"
    t, n_in, size = Tally(), 64, 56
    t.conv(3, 64, 7, 112)
    for width, blocks in (64, 3), (128, 4), (256, 6), (512, 3):
        for i in range(blocks):
            out = size // 2 if i == 0 and width > 64 else size
            t.conv(n_in, width, 1, size)
            t.conv(width, width, 3, out)
            t.conv(width, 4 * width, 1, out)
            if i == 0: t.conv(n_in, 4 * width, 1, out)
            n_in, size = 4 * width, out
    t.linear(2048, 1000)
    return t.totals()


def vit_b_16():
    "Dosovitskiy et al. 2021: 12 layers of width 768, 14×14 patches and one token for the class"
    p, w = encoder_layer(197, 768, 3072)
    patches = 768 * 3 * 16 * 16
    return (patches + 768 + 768 + 197 * 768 + 12 * p + 2 * 768 + 769 * 1000, 196 * patches + 12 * w + 768 * 1000)


def mobilenet_v3(blocks, last, hidden):
    "Howard et al. 2019, tables 1 and 2: kernel, expansion, channels, squeeze-and-excite, stride"
    t, n_in, size = Tally(), 16, 112
    t.conv(3, 16, 3, size)
    for kernel, wide, n_out, squeeze, stride in blocks:
        if wide != n_in: t.conv(n_in, wide, 1, size)
        size //= stride
        t.conv(wide, wide, kernel, size, groups=wide)
        if squeeze:
            narrow = max(8, int(wide / 4 + 4) // 8 * 8)
            if narrow < .9 * wide / 4: narrow += 8
            t.conv(wide, narrow, 1, 1, norm=False, bias=True)
            t.conv(narrow, wide, 1, 1, norm=False, bias=True)
        t.conv(wide, n_out, 1, size)
        n_in = n_out
    t.conv(n_in, last, 1, size)
    t.linear(last, hidden)
    t.linear(hidden, 1000)
    return t.totals()


small = [(3, 16, 16, 1, 2), (3, 72, 24, 0, 2), (3, 88, 24, 0, 1), (5, 96, 40, 1, 2), (5, 240, 40, 1, 1),
         (5, 240, 40, 1, 1), (5, 120, 48, 1, 1), (5, 144, 48, 1, 1), (5, 288, 96, 1, 2), (5, 576, 96, 1, 1),
         (5, 576, 96, 1, 1)]
large = [(3, 16, 16, 0, 1), (3, 64, 24, 0, 2), (3, 72, 24, 0, 1), (5, 72, 40, 1, 2), (5, 120, 40, 1, 1),
         (5, 120, 40, 1, 1), (3, 240, 80, 0, 2), (3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1),
         (3, 480, 112, 1, 1), (3, 672, 112, 1, 1), (5, 672, 160, 1, 2), (5, 960, 160, 1, 1), (5, 960, 160, 1, 1)]


def lstm_case(model, x, *sizes, parameters=0, positions=15, **kwargs):
    matrices, biases = recurrent(*sizes, **kwargs)
    return model, (x,), (matrices + biases, positions * matrices)


def cases() -> dict:
    "By name: a model, its inputs, and its parameters and multiply-adds by formula"
    x, image, volume = torch.randn(5, 3, 8), torch.randn(2, 8, 9, 9), torch.randn(2, 4, 5, 5, 5)
    packed = pack_padded_sequence(x, torch.tensor([5, 4, 2]))
    photo, series = torch.randn(1, 3, 224, 224), torch.randn(2, 50, 16)
    models, (mha, work) = torchvision.models, attention(50, 50, 16)
    def times(n, counts): return counts[0], n * counts[1]
    def fast(): return nn.MultiheadAttention(16, 2, batch_first=True).eval()
    e, d = encoder_layer(5, 8, 16), decoder_layer(4, 5, 8, 16)
    return {
        'Linear, a vector': (nn.Linear(8, 4), (torch.randn(8),), (36, 32)),
        'Linear, rank 3': (nn.Linear(8, 4), (x,), (36, 15 * 32)),
        'Linear, rank 5, no bias': (nn.Linear(8, 4, bias=False), (torch.randn(2, 3, 4, 5, 8),), (32, 120 * 32)),
        'Conv1d, stride 2': (nn.Conv1d(3, 6, 3, stride=2, bias=False), (x,), (54, 5 * 3 * 54)),
        'Conv2d, padding': (nn.Conv2d(8, 12, 3, padding=1), (image,), (8 * 12 * 9 + 12, 2 * 81 * 8 * 12 * 9)),
        'Conv2d, groups, dilation': (nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2), (image,),
                                     (2 * 12 * 9 + 12, 2 * 81 * 2 * 12 * 9)),
        'Conv2d, depthwise': (nn.Conv2d(8, 8, 3, groups=8), (image,), (8 * 9 + 8, 2 * 49 * 8 * 9)),
        'Conv3d': (nn.Conv3d(4, 6, (3, 1, 2)), (volume,), (4 * 6 * 6 + 6, 2 * 60 * 4 * 6 * 6)),
        'ConvTranspose1d, stride 3': (nn.ConvTranspose1d(3, 6, 4, stride=3), (x,), (78, 5 * 8 * 72)),
        'ConvTranspose2d, groups': (nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, output_padding=1), (image,),
                                    (8 * 3 * 9 + 6, 2 * 81 * 8 * 3 * 9)),
        'LSTM': lstm_case(nn.LSTM(8, 6), x, 4, 8, 6),
        'LSTM, 2 layers, both ways': lstm_case(nn.LSTM(8, 6, 2, bidirectional=True), x, 4, 8, 6, 2, 2),
        'LSTM, projected': lstm_case(nn.LSTM(8, 6, proj_size=2, batch_first=True), x, 4, 8, 6, 1, 1, 2),
        'LSTM, packed': lstm_case(nn.LSTM(8, 6), packed, 4, 8, 6, positions=11),
        'GRU, 2 layers, both ways': lstm_case(nn.GRU(8, 6, 2, bidirectional=True), x, 3, 8, 6, 2, 2),
        'RNN, no bias': lstm_case(nn.RNN(8, 6, bias=False), x, 1, 8, 6, bias=False),
        'LSTMCell in a loop': lstm_case(Function(steps, nn.LSTMCell(8, 6)), x, 4, 8, 6),
        'multi-head attention': (fast().train(), (series,) * 3, (mha, 2 * work)),
        'multi-head attention, eval': (fast(), (series,) * 3, (mha, 2 * work)),
        'cross attention': (nn.MultiheadAttention(8, 2, kdim=3, vdim=6),
                            (x, torch.randn(7, 3, 3), torch.randn(7, 3, 6)), times(3, attention(5, 7, 8, 3, 6))),
        'attention by @': (Function(attend, nn.Linear(16, 48), nn.Linear(16, 16)), (series,), (mha, 2 * work)),
        'attention by function': (Function(attend_fused, nn.Linear(16, 48), nn.Linear(16, 16)), (series,),
                                  (mha, 2 * work)),
        'TransformerEncoderLayer': (nn.TransformerEncoderLayer(8, 2, 16), (x,), times(3, e)),
        'TransformerEncoderLayer, eval': (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
                                          (x.transpose(0, 1),), times(3, e)),
        'Transformer, 2 + 2 layers': (nn.Transformer(8, 2, 2, 2, 16), (x, torch.randn(4, 3, 8)),
                                      (2 * (e[0] + d[0]) + 4 * 8, 3 * 2 * (e[1] + d[1]))),
        'embedding tied to decoder': (Words(), (torch.randint(1000, (4, 20)),), (32000, 80 * 32000)),
        'a module used twice': (Function(twice, nn.Linear(8, 8)), (x,), (72, 2 * 15 * 64)),
        'a layer that is not used': (Function(first, nn.Linear(8, 8), nn.Linear(8, 5)), (x,), (72 + 45, 15 * 64)),
        'forward called directly': (Function(bound, nn.Linear(8, 8)), (x,), (72, 15 * 64)),
        'F.linear': (Function(functional, weight=(4, 8)), (x,), (32, 15 * 32)),
        'einsum': (Function(einsum, weight=(4, 8)), (x,), (32, 15 * 32)),
        'matrix @ vector': (Function(vector, weight=(4, 8)), (torch.randn(8),), (32, 32)),
        'Bilinear': (nn.Bilinear(8, 8, 3), (x, x), (3 * 64 + 3, 15 * 3 * 64)),
        'ResNet-50': (models.resnet50().eval(), (photo,), resnet50()),
        'ViT-B/16': (models.vit_b_16().eval(), (photo,), vit_b_16()),
        'MobileNetV3 small': (models.mobilenet_v3_small().eval(), (photo,), mobilenet_v3(small, 576, 1024)),
        'MobileNetV3 large': (models.mobilenet_v3_large().eval(), (photo,), mobilenet_v3(large, 960, 1280)),
    }


def flop_counter(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(*inputs)
    return counter.get_total_flops() // 2


def info(model, inputs):
    "Parameters and multiply-adds, or `None` where torchinfo is missing or fails"
    if torchinfo is None: return None, None
    mode = 'train' if model.training else 'eval'
    try: found = torchinfo.summary(model, input_data=list(inputs), verbose=0, mode=mode)
    except Exception: return None, None
    return found.total_params, found.total_mult_adds


def against(ours, truth): # A peer's figure, as the table shows it
    if ours is None: return 'fails'
    return '=' if ours == truth else f'{ours:,} ({ours / truth:.2f})'


def measured() -> list[dict]:
    rows, heads = [], ('model', 'parameters', 'multiply-adds', 'summary', 'torchinfo: parameters', 'multiply-adds',
                       'FlopCounterMode')
    lines = [heads]
    for name, (model, inputs, (parameters, work)) in cases().items():
        s = summary(model, *inputs)
        peer_parameters, peer_work = info(model, inputs)
        flops = flop_counter(model, inputs)
        exact = (s.parameters, s.multiply_adds) == (parameters, work) and not s.unknown
        figures = dict(parameters=parameters, multiply_adds=work, our_parameters=s.parameters,
                       our_multiply_adds=s.multiply_adds, torchinfo_parameters=peer_parameters,
                       torchinfo_multiply_adds=peer_work, flop_counter=flops)
        rows.append(row(name, s.multiply_adds, work, **figures) | dict(goal='exact', met=exact))
        lines.append((name, f'{parameters:,}', f'{work:,}', '=' if exact else f'{s.parameters:,}, {s.multiply_adds:,}',
                      against(peer_parameters, parameters), against(peer_work, work), against(flops, work)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first_one, *others in lines:
        print('  '.join([first_one.ljust(widths[0])] + [c.rjust(w) for c, w in zip(others, widths[1:])]).rstrip())
    n = len(rows)
    for what, key, truth in (('torchinfo, parameters', 'torchinfo_parameters', 'parameters'),
                             ('torchinfo, multiply-adds', 'torchinfo_multiply_adds', 'multiply_adds'),
                             ('FlopCounterMode', 'flop_counter', 'multiply_adds')):
        far = sum(r[key] is None or abs(r[key] / r[truth] - 1) > .2 for r in rows)
        print(f'{what}: wrong in {sum(r[key] != r[truth] for r in rows)} of {n}, by more than a fifth in {far}')
    print(f'summary: wrong in {sum(not r["met"] for r in rows)} of {n}\n')
    return rows


def cost() -> list[dict]:
    "What it takes, in forward passes"
    model, photo = torchvision.models.resnet18().eval(), torch.randn(1, 3, 224, 224)
    fs = {'forward': lambda: model(photo), 'ours': lambda: summary(model, photo)}
    if torchinfo is not None: fs['torchinfo'] = lambda: torchinfo.summary(model, input_data=[photo], verbose=0)
    t = compare(fs, repeat=7)
    peers = ['forward', *['torchinfo'] * (torchinfo is not None)]
    return [row(f'a summary of ResNet-18, against {p}', t['ours'], t[p]) for p in peers]


if __name__ == '__main__': save('summary', measured() + cost(), packages=('torchinfo', 'torchvision'))
