"""Fits that are killed and resumed, each in a process of its own, forked from one that has imported torch already.

Run as a script it reads cases as lines of JSON and answers each with a line; tests/test_resume.py asks.
"""
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # which the first optimizer imports: once here, not in every child
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import IterableDataset, TensorDataset

from dlfound import checkpoint, packed
from dlfound.checkpoint import Checkpoint, resume
from dlfound.learner import Callback, DataLoaders, GradientAccumulation, GradientClip, Learner, Recorder
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset, accuracy
from dlfound.schedule import ParamScheduler, flat_cos, one_cycle, sched_cos, sched_lin
from dlfound.search import EarlyStopping
from dlfound.state import module_state, random_state

bs, epochs = 8, 3
x, y = torch.randn(52, 6, generator=torch.Generator().manual_seed(1)), torch.arange(52) % 3
xv, yv = torch.randn(25, 6, generator=torch.Generator().manual_seed(2)), torch.arange(25) % 3
n_train, n_valid = 7, 4


class Noisy(torch.utils.data.Dataset):
    "Samples changed by all three generators"
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        return self.x[i] + .1 * torch.randn(6) + random.random() + float(np.random.rand()), self.y[i]


class Stream(IterableDataset):
    def __init__(self, x, y): self.x, self.y = x, y
    def __iter__(self): return ((a + .1 * torch.randn(6), b) for a, b in zip(self.x, self.y))


class Lazy:
    "A sampler that draws as it goes, from generators of its own"
    def __init__(self, n):
        self.n, self.generator, self.rng = n, torch.Generator().manual_seed(5), np.random.default_rng(6)
    def __len__(self): return self.n
    def __iter__(self):
        for _ in range(self.n):
            i = int(torch.randint(self.n, (1,), generator=self.generator))
            yield (i + int(self.rng.integers(self.n))) % self.n


class Counting:
    "A sampler whose order depends on a count of epochs, and on no generator"
    def __init__(self, n): self.n, self.epoch = n, 0
    def __len__(self): return self.n
    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Net(nn.Module):
    "Batch norm, dropout, a buffer that is not saved by PyTorch, tied weights, and on request channels last"
    def __init__(self, conv=False, hidden=False):
        super().__init__()
        self.hidden, self.h, self.calls = hidden, None, 0
        self.conv = nn.Conv2d(6, 6, (2, 1)) if conv else None
        self.l1, self.bn, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(.3)
        self.l2, self.l3 = nn.Linear(6, 6), nn.Linear(6, 3)
        self.l2.weight = self.l1.weight
        self.register_buffer('seen', torch.zeros(()), persistent=False)
        if conv: self.to(memory_format=torch.channels_last)

    def forward(self, x):
        if self.training: self.seen = self.seen + x.mean()
        if self.hidden:
            if self.h is not None: x = x + .1 * self.h['mean'][0] + .01 * self.calls
            self.h, self.calls = {'mean': (x.mean(0).detach(),)}, self.calls + 1
        if self.conv is not None:
            image = x[:, :, None, None].expand(-1, -1, 2, 3).contiguous(memory_format=torch.channels_last)
            x = self.conv(image).amax((2, 3))
        return self.l3(self.l2(self.drop(self.bn(self.l1(x)).relu())).relu()) + self.seen


class Scaled(nn.Module):
    "A loss with a parameter and a buffer"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer('sum', torch.zeros(()))
    def forward(self, pred, target):
        if self.training: self.sum += pred.detach().mean()
        return F.cross_entropy(pred * self.scale, target) + .01 * self.sum


class Two(Learner):
    "A second optimizer, for the last layer"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        *rest, weight, bias = self.model.parameters()
        self.opt, self.opt2 = optim.Adam(rest, lr=.01), optim.Adam([weight, bias], lr=.02)
    def step(self): super().step(); self.opt2.step()
    def zero_grad(self): super().zero_grad(); self.opt2.zero_grad()


def loaders(kind):
    g = torch.Generator().manual_seed(3)
    if kind == 'tensors': return DataLoaders.from_datasets(Dataset(x, y), Dataset(xv, yv), bs, generator=g)
    noisy = Noisy(x, y), Noisy(xv, yv)
    if kind == 'global': return DataLoaders.from_datasets(*noisy, bs)
    if kind == 'seeded': return DataLoaders.from_datasets(*noisy, bs, generator=g, seeded=True)
    if kind == 'workers': return DataLoaders.from_datasets(*noisy, bs, generator=g, num_workers=2)
    if kind == 'stream': return DataLoaders(DataLoader(Stream(x, y), bs), DataLoader(Stream(xv, yv), 2 * bs))
    lazy = DataLoader(noisy[0], bs, sampler=Lazy(len(x)))
    if kind == 'lazy': return DataLoaders(lazy, DataLoader(Dataset(xv, yv), bs))
    counting = DataLoader(noisy[0], bs, sampler=Counting(len(x)))
    if kind == 'counting': return DataLoaders(counting, DataLoader(Dataset(xv, yv), bs))
    if kind == 'list': return DataLoaders(list(zip(x.split(bs), y.split(bs))), list(zip(xv.split(bs), yv.split(bs))))
    T = torch.utils.data.DataLoader
    if kind == 'foreign': return DataLoaders(T(noisy[0], bs, shuffle=True), T(TensorDataset(xv, yv), bs))
    if kind == 'replacing':
        sampler = torch.utils.data.RandomSampler(noisy[0], replacement=True, generator=g)
        return DataLoaders(T(noisy[0], bs, sampler=sampler), T(noisy[1], bs))
    raise ValueError(kind)


cycle = one_cycle(.1, momentum=(.95, .85, .95))
betas = {'lr': sched_cos(.02, 0), 'betas': lambda p: (.9, .99 + .009 * p)}
sgd = lambda p, lr: optim.SGD(p, lr, momentum=.9, weight_decay=.01)
fits = dict(  # loader, optimizer, convolution?, callbacks
    tensors=('tensors', sgd, False, lambda: [ParamScheduler(cycle)]),
    adam=('global', optim.Adam, False, lambda: [
        ParamScheduler(one_cycle(.02, momentum=(.95, .85, .95))), GradientAccumulation(3), GradientClip(.5)]),
    seeded=('seeded', optim.Adam, False, lambda: [ParamScheduler(flat_cos(.02)), EarlyStopping(patience=2)]),
    workers=('workers', sgd, False, lambda: [ParamScheduler(cycle), GradientAccumulation(2)]),
    stream=('stream', optim.AdamW, False, lambda: [
        ParamScheduler(flat_cos(.02), n_batches=n_train), GradientClip(1.)]),
    lazy=('lazy', sgd, False, lambda: [EarlyStopping(patience=1)]),
    list=('list', optim.AdamW, True, lambda: [ParamScheduler(betas)]),
    foreign=('foreign', sgd, True, lambda: [
        ParamScheduler({'lr': sched_lin(.1, .01)}), GradientAccumulation(2),
        EarlyStopping('accuracy', 'max', patience=2)]),
    replacing=('replacing', optim.Adam, False, lambda: [GradientClip(.5), EarlyStopping()]),
    hidden=('tensors', optim.Adam, False, lambda: [ParamScheduler(flat_cos(.02))]),
    two=('tensors', sgd, False, lambda: [GradientAccumulation(2)]),
    loss=('seeded', optim.Adam, False, lambda: [ParamScheduler(cycle)]),
    counting=('counting', sgd, False, lambda: [EarlyStopping(patience=2)]),
)


class Killer(Callback):
    "Ends the process, or the fit, at a given place"
    order = 1e9
    def __init__(self, place, how): self.place, self.how = tuple(place), how
    def strike(self, learn, event):
        if (event, learn.epoch, learn.iter) != self.place: return
        if self.how == 'exception': raise RuntimeError('out of power')
        signum = dict(kill=signal.SIGKILL, term=signal.SIGTERM, ctrlc=signal.SIGINT)[self.how]
        os.kill(os.getpid(), signum)
        time.sleep(1)
    def after_backward(self, learn): self.strike(learn, 'train')
    def after_pred(self, learn):
        if not learn.training: self.strike(learn, 'valid')
    def after_train(self, learn): self.strike(learn, 'after_train')
    def after_validate(self, learn): self.strike(learn, 'after_validate')


def made(name):
    "A Learner and its callbacks for the fit"
    _, opt, conv, cbs = fits[name]
    random.seed(7), np.random.seed(8), torch.manual_seed(9)
    net, loss = Net(conv, name == 'hidden'), Scaled() if name == 'loss' else F.cross_entropy
    kind = Two if name == 'two' else Learner
    learn = kind(loaders(fits[name][0]), net, loss, opt, lr=.01, metrics=accuracy, progress=False)
    random.random(), np.random.normal(), torch.rand(3)  # where a run is has no fixed place
    return learn, cbs()


def everything(learn):
    "All that a fit leaves behind"
    rec, model = learn[Recorder], learn.model
    more = dict(loss=module_state(learn.loss_func), h=model.h, calls=model.calls)
    if hasattr(learn, 'opt2'): more['opt2'] = learn.opt2.state_dict()
    return dict(more, weights=module_state(model), strides=[p.stride() for p in model.parameters()],
                opt=learn.opt.state_dict(), losses=rec.losses, lrs=rec.lrs, rows=rec.rows,
                rng=random_state(learn.dls.train, learn.dls.valid), row=learn.row, epoch=learn.epoch,
                tied=model.l1.weight is model.l2.weight)


def bits(x):
    "A line for a state: equal lines, equal bits"
    return packed.digest(*packed.pack(x))


def digest(state): return dict(all=bits(state), **{k: bits(v) for k, v in state.items()})


def whole(name):
    learn, cbs = made(name)
    learn.fit(epochs, cbs=cbs)
    return digest(everything(learn))


def start(name, folder, every, unit, killer):
    learn, cbs = made(name)
    learn.fit(epochs, cbs=[*cbs, Checkpoint(folder, every, unit), *killer])
    return digest(everything(learn))


def go_on(name, folder, every, unit):
    learn, cbs = made(name)
    torch.manual_seed(99), random.seed(98), np.random.seed(97)
    torch.rand(5)
    resume(learn, folder, cbs=[*cbs, Checkpoint(folder, every, unit), Killer(("", 0, 0), "")])
    return digest(everything(learn))


def break_writing(how, nth):
    "Die while the `nth` checkpoint is written"
    count, save, replace = [0], packed.save_file, os.replace
    def dying_save(tensors, path, metadata):
        count[0] += 1
        save(tensors, path, metadata)
        if count[0] != nth: return
        if how == 'half': os.truncate(path, os.path.getsize(path) // 2)
        if how in ('half', 'before'): os.kill(os.getpid(), signal.SIGKILL)
    def dying_replace(a, b):
        replace(a, b)
        if count[0] == nth and how == 'after': os.kill(os.getpid(), signal.SIGKILL)
    packed.save_file, os.replace = dying_save, dying_replace


def forked(f, *args, stop=None):
    "What `f` returns in a process of its own, or how it died; with `stop` it is killed after so many seconds"
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            os.close(r)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = open(os.devnull, 'w')
            out = f(*args)
        except BaseException as e: out = dict(error=f'{type(e).__name__}: {e}', trace=traceback.format_exc())
        os.write(w, json.dumps(out).encode())
        os._exit(0)
    os.close(w)
    if stop is not None:
        time.sleep(stop)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]  # what it says fits into the pipe
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # loader workers that it left, which would hold the pipe open
    with os.fdopen(r, 'rb') as pipe: answer = pipe.read()
    return json.loads(answer) if answer else dict(died=os.WTERMSIG(status) if os.WIFSIGNALED(status) else status)


known = {}

def reference(name):
    if name not in known: known[name] = forked(whole, name)
    return known[name]


def case(name, how, place=None, every=1, unit='batch', times=1):
    "Kill, resume (and kill again), and compare; a dict that says what happened"
    wanted = reference(name)
    if 'error' in wanted: return dict(ok=False, wanted=wanted)
    with tempfile.TemporaryDirectory() as folder:
        args = name, folder, every, unit
        if how in ('half', 'before', 'after'):
            def dying(*args):
                break_writing(how, place)
                return start(*args)
            died = forked(dying, *args, [])
        elif how == 'random': died = forked(start, *args, [], stop=place)
        else: died = forked(start, *args, [Killer(place, how)])
        files = len(os.listdir(folder))
        for _ in range(times - 1): forked(go_on, *args, stop=place / 2 if how == 'random' else .05)
        if not checkpoint._found(Path(folder)):
            return dict(ok=how in ('random', 'half', 'before'), died=died, files=files, early=True)
        got = forked(go_on, *args)
        left = sorted(p.name for p in Path(folder).iterdir())
    ok = got == wanted
    parts = [n for n in left if n.startswith('.')]  # a file half written stays for ten minutes: who knows who writes it
    tidy = len(left) - len(parts) <= 4 and len(parts) < times + 1
    return dict(ok=ok and tidy, died={k: v for k, v in died.items() if k in ('died', 'error')}, files=files, left=left,
                **({} if ok else dict(wrong=[k for k in wanted if got.get(k) != wanted[k]], got=got)))


if __name__ == '__main__':
    torch.set_num_threads(1)
    for line in sys.stdin:
        try: answer = case(**json.loads(line))
        except BaseException: answer = dict(ok=False, trace=traceback.format_exc())
        print(json.dumps(answer), flush=True)
