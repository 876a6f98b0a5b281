"Small nets and batches, a loop by hand, and callbacks of one method, for the tests of lessons 04 to 04c."
import multiprocessing
import time

import torch
from torch import nn

from dlfound.learner import Callback, DataLoaders, Learner

loss_func = nn.CrossEntropyLoss()


def net(seed=0, *extra):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), *extra, nn.ReLU(), nn.Linear(8, 3))


def batches(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]


def learner(model=None, train=(8, 8, 5), valid=(4, 2), cbs=(), opt=torch.optim.SGD, lr=.1, loss=loss_func, **kw):
    dls = DataLoaders(batches(*train), batches(*valid, seed=1) if valid else None)
    return Learner(dls, net() if model is None else model, loss, opt, lr, cbs=cbs, **kw)


def no_workers():
    "Have all worker processes ended? One that was told to may need a while on a busy machine"
    end = time.monotonic() + 60
    while (left := multiprocessing.active_children()) and time.monotonic() < end: time.sleep(.05)
    return not left


def by_hand(train, model, opt_func, lr=.1, epochs=2, window=1, clip=None, skip=()):
    "The loop that a person would write: one step for `window` batches, the mean over their examples"
    opt = opt_func(model.parameters(), lr=lr)
    for _ in range(epochs):
        model.train()
        opt.zero_grad()
        n = examples = 0
        for i, (x, y) in enumerate(train):
            if i in skip: continue
            loss = loss_func(model(x), y)
            (loss * len(y) if window > 1 else loss).backward()
            n, examples = n + 1, examples + len(y)
            if n < window and i + 1 < len(train): continue
            if window > 1:
                for p in model.parameters(): p.grad /= examples
            if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
            n = examples = 0
    return model


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in pairs)


def at(event, f, **attributes):
    "A callback with one method, `f(learn)`"
    return type('At', (Callback,), {event: lambda self, learn: f(learn), **attributes})()


def raiser(e):
    def f(learn): raise e
    return f


def poisoned(i, n=12):
    "Batches of which one has no numbers in it"
    data = batches(*[4] * n)
    data[i] = data[i][0] * float('nan'), data[i][1]
    return data
