"""The flat form of lesson 08a beside PyTorch's fused AdamW and timm's LAMB: ResNet-18's parameters, one thread.

Run it as `python benchmarks/optimizer.py`; it takes about two minutes, and needs a C++ compiler, torchvision and timm.
Learning rate and betas move at every step, as one cycle of 200 steps moves them, and gradients are new tensors at
every step, as after `zero_grad()`. The optimizers take turns, in blocks of four steps, after the ones of ours have
compiled; how long their first compiled step took stands in a row of its own, in an empty cache and in one that is
full. Each optimizer's numbers are compared with those of its peer before the time counts: AdamW's with PyTorch's, the
flat LAMB's with those of our plain one, since timm clips gradients and skips the ratio where there is no decay. A
second compilation of a formula is an error. What is over lists or one by one is measured over fewer steps.
"""
from common import row, save

import os
import sys
from functools import partial
from statistics import median
from subprocess import run
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from timm.optim import Lamb
from torch.optim.lr_scheduler import OneCycleLR
from torch.testing import assert_close
from torchvision.models import resnet18

from dlfound.famous import lamb
from dlfound.flat import compiled, flat
from dlfound.optimizer import adamw

steps, block = 200, 4
fused, after = torch.optim.AdamW, 4
torch.manual_seed(0)
start = [p.detach().clone() for p in resnet18().parameters()]
grads = [[.01 * torch.randn_like(p) for p in start] for _ in range(2)]


class Run:
    "An optimizer with parameters of its own, a schedule, and the seconds of each step"
    def __init__(self, opt_func, total=steps, **hypers):
        self.params = [p.clone().requires_grad_() for p in start]
        self.opt, self.taken = opt_func(self.params, lr=1e-3, weight_decay=.01, **hypers), []
        self.schedule = OneCycleLR(self.opt, max_lr=1e-2, total_steps=total + 1)

    def step(self):
        for p, g in zip(self.params, grads[len(self.taken) % 2]): p.grad = g
        begin = perf_counter()
        self.opt.step()
        self.taken.append(perf_counter() - begin)
        self.schedule.step()

    def median(self, skip=8): return median(self.taken[skip:])


def take_turns(runs: list[Run], total: int):
    for _ in range(total // block):
        for r in runs:
            for _ in range(block): r.step()


def first_step(name: str) -> float:
    "Seconds of the first compiled step"
    r = Run(flat({'adamw': adamw, 'lamb': lamb}[name], after=1), total=4)
    for _ in range(2): r.step()
    return r.taken[1]


def first_steps(name: str) -> list[float]:
    "The same in new processes: with an empty cache, then with what the first one left there"
    with TemporaryDirectory() as folder:
        env = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=folder)
        call = partial(run, [sys.executable, __file__, name], env=env, capture_output=True, text=True, check=True)
        done = [call() for _ in range(2)]
    return [float(d.stdout.split()[-1]) for d in done]


if __name__ == '__main__':
    if len(sys.argv) > 1: print(first_step(sys.argv[1])); sys.exit()
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    waits = {name: first_steps(name) for name in ('adamw', 'lamb')}
    runs = dict(fused=Run(fused, fused=True), adamw=Run(flat(adamw, after)), lamb=Run(flat(lamb, after)),
                timm=Run(Lamb))
    with torch._dynamo.config.patch(error_on_recompile=True): take_turns([*runs.values()], steps)
    formulas, reasons = compiled.cache_info().misses, [runs[k].opt.reason for k in ('adamw', 'lamb')]
    if reasons != ['', '']: raise SystemExit(f'not compiled: {reasons}')
    slow = dict(foreach=Run(fused, foreach=True, total=20), loop=Run(fused, foreach=False, total=20),
                plain=Run(adamw, total=20), lists=Run(flat(adamw, after=10**6), total=20), lamb=Run(lamb, total=20))
    take_turns([*slow.values()], 20)
    again = Run(flat(lamb, after), total=20)
    for _ in range(20): again.step()
    assert_close(runs['adamw'].params, runs['fused'].params, rtol=1e-3, atol=1e-5)
    assert_close(again.params, slow['lamb'].params, rtol=1e-3, atol=1e-5)
    f, t = runs['fused'].median(), runs['timm'].median()
    rows = [row('AdamW: flat, against torch fused', runs['adamw'].median(), f, '<= 1.0'),
            row("LAMB: flat, against timm's (speed)", runs['lamb'].median(), t, '>= 2.5', invert=True),
            row('LAMB: flat, against torch fused AdamW', runs['lamb'].median(), f),
            row("LAMB: timm's, against torch fused AdamW", t, f),
            row('formulas compiled, against optimizers', formulas, 2, '<= 1.0')]
    rows += [row(f'AdamW: {what}, against torch fused', slow[k].median(), f) for k, what in
             {'loop': 'torch loop', 'foreach': 'torch foreach', 'plain': 'plain', 'lists': 'lists'}.items()]
    rows += [row(f'{name}: first compiled step in an empty cache, against steps of torch fused', waits[name][0], f)
             for name in waits]
    rows += [row(f'{name}: first compiled step in a full cache, against steps of torch fused', waits[name][1], f)
             for name in waits]
    save('optimizer', rows, packages=('timm', 'torchvision'), steps=steps, load_at_start=load)
