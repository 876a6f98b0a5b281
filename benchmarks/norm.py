"""The norms of lesson 06 beside PyTorch's, one thread, float32: forward without gradients, and forward with backward.

Run it as `python benchmarks/norm.py`; it takes some minutes, and needs a C++ compiler. LayerNorm and RMSNorm are
measured on what a small and a larger transformer give a norm, compiled against PyTorch's modules compiled by the same
`torch.compile`, and against PyTorch's as they come. As it comes, PyTorch's LayerNorm is a kernel written by hand; a
scale and a shift alone, compiled, stand beside it as a floor for whatever the compiler makes of a norm. LayerNorm takes
its statistics by one call of `torch.var_mean` where it is compiled, and by two means otherwise: the other way stands
beside both. Without a compiler all five norms are measured, for information. A norm that does not give PyTorch's
numbers is not measured. Freed memory stays with the process, where the C library can be asked for that: giving it back
and having it anew costs more than a small norm. Where its tensors lie in memory makes a tenth of a small norm's time,
so the compiled norms are measured five times, each with other tensors, and the middle one counts. On a busy machine
the rows with a goal say little: look at `load_at_start`.
"""
from common import compare, row, save

import ctypes
import os

import torch
from torch import nn
from torch.testing import assert_close

from dlfound.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

tokens, images = {'8 x 128 x 384': (8, 128, 384), '32 x 128 x 768': (32, 128, 768)}, (32, 64, 28, 28)


class ScaleShift(nn.LayerNorm):
    def forward(self, x): return x * self.weight + self.bias


class TwoMeans(nn.LayerNorm):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).square().mean(-1, keepdim=True)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class OneCall(nn.LayerNorm):
    def forward(self, x):
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


def keep_memory() -> bool:
    "Ask glibc to keep what is freed, up to 32 MB a piece and 1 GB in all; False where there is no glibc"
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    return bool(mallopt and mallopt(-3, 1 << 25) and mallopt(-1, 1 << 30)) # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def forward(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    def f():
        with torch.no_grad(): return norm(x)
    return f


def both(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    x, parameters = x.clone().requires_grad_(), [*norm.parameters()]
    def f():
        y = norm(x)
        return y, *torch.autograd.grad(y, [x, *parameters], grad)
    return f


def timed(norms: dict[str, nn.Module], shape: tuple, kind, repeat: int, rounds: int = 1) -> dict:
    torch.manual_seed(0)
    taken = {name: [] for name in norms}
    for _ in range(rounds):
        x, grad = torch.randn(shape), torch.randn(shape)
        fs = {name: kind(norm, x, grad) for name, norm in norms.items()}
        for name, f in fs.items():
            if name != 'floor': assert_close(f(), fs['PyTorch'](), rtol=1e-3, atol=1e-3)
        for name, t in compare(fs, repeat=repeat, min_time=.03).items(): taken[name].append(t)
    return {name: sorted(ts, key=lambda t: t.median)[rounds // 2] for name, ts in taken.items()}


def compiled(ours: type, theirs: type, others: dict[str, type], name: str) -> list[dict]:
    rows, n = [], tokens[name][-1]
    for what, kind in ('forward', forward), ('forward and backward', both):
        torch._dynamo.reset()
        norms = {'ours': ours(n), 'compiled': theirs(n)} | {k: norm(n) for k, norm in others.items()}
        norms = {k: torch.compile(m, fullgraph=True, dynamic=False) for k, m in norms.items()} | {'PyTorch': theirs(n)}
        t = timed(norms, tokens[name], kind, 31, rounds=5)
        title = f'{ours.__name__}, {name}, {what}'
        rows += [row(f"{title}: compiled, against PyTorch's compiled", t['ours'], t['compiled'], '<= 1.1'),
                 row(f"{title}: compiled, against PyTorch's as it comes", t['ours'], t['PyTorch'], '<= 1.1')]
        if 'floor' in t: rows += [
            row(f"{title}: by two means, compiled, against PyTorch's compiled", t['two means'], t['compiled']),
            row(f"{title}: scale and shift alone, compiled, against PyTorch's as it comes", t['floor'], t['PyTorch'])]
    return rows


def eager(ours: nn.Module, theirs: nn.Module, shape: tuple) -> list[dict]:
    rows = []
    for what, kind in ('forward', forward), ('forward and backward', both):
        norms = {'ours': ours, 'PyTorch': theirs}
        if isinstance(ours, LayerNorm): norms['one call'] = OneCall(shape[-1])
        t, title = timed(norms, shape, kind, 9), f'{type(ours).__name__}, {what}'
        rows.append(row(f'{title}: neither compiled', t['ours'], t['PyTorch']))
        if 'one call' in t: rows.append(row(f'{title}: by one call, neither compiled', t['one call'], t['PyTorch']))
    return rows


if __name__ == '__main__':
    kept = keep_memory()
    load, results = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None, []
    for name in tokens:
        results += compiled(LayerNorm, nn.LayerNorm, {'two means': TwoMeans, 'floor': ScaleShift}, name)
        results += compiled(RMSNorm, nn.RMSNorm, {}, name)
    for ours, theirs in (LayerNorm(384), nn.LayerNorm(384)), (RMSNorm(384), nn.RMSNorm(384)):
        results += eager(ours, theirs, tokens['8 x 128 x 384'])
    for ours, theirs in ((BatchNorm(64), nn.BatchNorm2d(64)), (InstanceNorm(64), nn.InstanceNorm2d(64)),
                         (GroupNorm(8, 64), nn.GroupNorm(8, 64))):
        results += eager(ours, theirs, images)
    save('norm', results, tokens=tokens, images=images, load_at_start=load, freed_memory_kept=kept)
