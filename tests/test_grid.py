"""Features of a fit, alone, by twos and all together: each fit equals, to the bit, a loop that is written by hand.

The loop by hand knows none of the callbacks: every feature is an `if` in it. Losses of all batches, validation,
parameters, buffers, statistics of the optimizer and the rates at the end are compared.
"""
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Beta

from dlfound.callbacks import GradientAccumulation, GradientClip
from dlfound.checkpoint import Checkpoint, resume
from dlfound.learner import DataLoaders, Learner
from dlfound.loop import Callback
from dlfound.minibatch import Dataset
from dlfound.mixed_precision import AMP, MixedPrecision
from dlfound.mixup import MixUp
from dlfound.optimizer import adamw
from dlfound.schedule import ParamScheduler, one_cycle
from dlfound.search import lr_find

lr, epochs, window, longest, alpha, first_scale = .05, 4, 2, .2, .8, 2.**19
types = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'halves': torch.float16} # AMP twice, and MixedPrecision
features = 'accumulation', 'clipping', *types, 'mixup', 'schedule', 'resume', 'lr_find'
optimizers = {'torch SGD': lambda ps, lr: torch.optim.SGD(ps, lr, .9), 'our AdamW': adamw}
pairs = [{a, b} for a, b in combinations(features, 2) if not {a, b} <= {*types}]
grid = [set(), *({f} for f in features), *pairs, *({*features} - {*types} | {f} for f in types)]
loss_func = F.cross_entropy


def data():
    "Five batches, the last a small one, in an order that is drawn, and two to validate"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(53, 6, generator=g), torch.randint(3, (53,), generator=g)
    return DataLoaders.from_datasets(Dataset(x[:37], y[:37]), Dataset(x[37:], y[37:]), 8,
                                     generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.2), nn.Linear(16, 3))


def by_hand(on, opt_func):
    "What a person would write who wants these features, and has nothing but PyTorch"
    dls, model = data(), net()
    opt, params = opt_func(model.parameters(), lr=lr), [*model.parameters()]
    rate, seen, scale, skipped = one_cycle(lr)['lr'], [], first_scale, 0
    dtype = next((types[f] for f in on if f in types), None)
    n = len(dls.train)

    def predict(x):
        if 'halves' in on: # The norm in float32, the rest with copies of 16 bits
            first, norm, relu, dropout, last = model
            def linear(m, x): return F.linear(x.half(), m.weight.half(), m.bias.half())
            return linear(last, dropout(relu(norm(linear(first, x).float()).half()))).float()
        with torch.autocast('cpu', dtype, enabled=dtype is not None): return model(x).float()

    def step(grads):
        for p, g in zip(params, grads): p.grad = g
        if 'clipping' in on: nn.utils.clip_grad_norm_(params, longest)
        opt.step()

    torch.manual_seed(3)
    for epoch in range(epochs):
        model.train()
        sums, held, count = [], 0, 0
        for i, (x, y) in enumerate(dls.train):
            if 'schedule' in on: opt.param_groups[0]['lr'] = rate((epoch * n + i) / (epochs * n - 1))
            if 'mixup' in on:
                other = torch.randperm(len(y))
                share = Beta(alpha, alpha).sample((len(y),))
                share = torch.maximum(share, 1 - share)
                pred = predict(torch.lerp(x[other], x, share[:, None]))
                own, others = (loss_func(pred, t, reduction='none') for t in (y, y[other]))
                loss = (share * own + (1 - share) * others).sum() / len(y)
            else: loss = loss_func(predict(x), y)
            seen.append(loss.item())
            whole = loss * len(y) if 'accumulation' in on else loss
            grads = torch.autograd.grad(whole * scale if dtype is torch.float16 else whole, params)
            if dtype is torch.float16:
                grads = [g / scale for g in grads]
                if not all(g.isfinite().all() for g in grads):
                    scale, skipped = scale / 2, skipped + 1
                    continue
            if 'accumulation' in on:
                sums = [s + g for s, g in zip(sums, grads)] if held else grads
                held, count = held + 1, count + len(y)
                if held < window: continue
                grads, held, count = [s / count for s in sums], 0, 0
            step(grads)
        if held: step([s / count for s in sums])
        model.eval()
        with torch.no_grad(): seen += [loss_func(predict(x), y).item() for x, y in dls.valid]
    if 'schedule' in on: opt.param_groups[0]['lr'] = lr
    assert skipped < len(seen) / 3 and (skipped > 1) == (dtype is torch.float16) # Some steps overflow, and few
    return model, opt, seen


class Seen(Callback):
    "Keeps the losses of all batches"
    kept = 'losses',
    def __init__(self): self.losses = []
    def after_loss(self, learn): self.losses.append(learn.loss.item())


def learner(on, opt_func):
    cbs = dict(accumulation=lambda: GradientAccumulation(window), clipping=lambda: GradientClip(longest),
               bf16=lambda: AMP(torch.bfloat16), fp16=lambda: AMP(torch.float16, first_scale),
               halves=lambda: MixedPrecision(torch.float16, first_scale),
               mixup=lambda: MixUp(alpha), schedule=lambda: ParamScheduler(one_cycle(lr)))
    cbs = [Seen(), *(make() for f, make in cbs.items() if f in on)]
    return Learner(data(), net(), loss_func, opt_func, lr, cbs=cbs)


class Cut(Checkpoint):
    "Writes a file after every batch, until the process dies in the middle of a window"
    def after_batch(self, learn):
        super().after_batch(learn)
        if learn.training and (learn.epoch, learn.iter) == (1, 2): raise KeyboardInterrupt


def by_learner(on, opt_func, folder):
    learn = learner(on, opt_func)
    torch.manual_seed(3)
    if 'lr_find' in on: lr_find(learn, n=10)
    if 'resume' in on:
        with pytest.raises(KeyboardInterrupt): learn.fit(epochs, cbs=Cut(folder, unit='batch'))
        learn = learner(on, opt_func)
        torch.manual_seed(99)
        resume(learn, folder)
    else: learn.fit(epochs)
    return learn.model, learn.opt, learn[Seen].losses


@pytest.mark.filterwarnings('ignore:.*the fit is to go on in epoch 1')
@pytest.mark.parametrize('opt_func', optimizers.values(), ids=[*optimizers])
@pytest.mark.parametrize('on', grid, ids=[' and '.join(sorted(on)) or 'none' for on in grid])
def test_a_fit_is_the_loop_by_hand(on, opt_func, tmp_path):
    model, opt, seen = by_hand(on, opt_func)
    ours, its, losses = by_learner(on, opt_func, tmp_path)
    assert losses == seen
    for (name, a), b in zip(model.state_dict().items(), ours.state_dict().values()): assert torch.equal(a, b), name
    for p, q in zip(model.parameters(), ours.parameters()):
        for k, v in opt.state[p].items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(its.state[q][k])), k
    assert [g['lr'] for g in opt.param_groups] == [g['lr'] for g in its.param_groups]


def test_every_feature_changes_the_fit():
    "No row of the grid is equal because a feature does nothing, but for the two that are to change nothing"
    plain = by_hand(set(), adamw)[2]
    for f in features: assert (by_hand({f}, adamw)[2] == plain) == (f in ('resume', 'lr_find')), f
