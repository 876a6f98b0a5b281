"""A step of a 10-16-2 MLP, batches of 64, one thread: ours against a bare loop, beside miniai, fastai and Lightning.

Run it as `python benchmarks/learner.py`; it takes about a minute and a half. A peer is measured where it is installed:
`pip install fastai lightning torchmetrics`; miniai is that of the course's repository (the package of this name on PyPI
is another). *Bare* is a loop without reports (`TrainingLoop`, and each peer with all it lets one turn off); *full* has
metrics, recorder and progress as a user of each would have them, and ours looks at the gradients of every step besides.
A call is a fit of one epoch: its start is in the figure, spread over 300 steps of training, and in *full* 30 batches of
validation follow, in the bare loop too.
"""
from common import compare, row, save

import contextlib
import io
import logging
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from dlfound.learner import DataLoaders, Learner, TrainingLoop
from dlfound.minibatch import accuracy

n_train, n_valid, size, lr = 300, 30, 64, .01
warnings.filterwarnings('ignore')


class Batches:
    "Batches made beforehand, so that no loader is measured (Lightning takes a list for a list of loaders)"
    def __init__(self, n): self.batches = [(torch.randn(size, 10), torch.randint(2, (size,))) for _ in range(n)]
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)


def mlp() -> nn.Module: return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))
def sgd(params, lr): return torch.optim.SGD(params, lr=lr)


train, valid = Batches(n_train), Batches(n_valid)


def bare(full: bool):
    "The loop that a person writes; with `full` it validates too, and prints one line"
    model = mlp()
    opt = sgd(model.parameters(), lr)
    def fit():
        model.train()
        for x, y in train:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
        if not full: return
        model.eval()
        total = right = 0
        with torch.no_grad():
            for x, y in valid:
                pred = model(x)
                total, right = total + F.cross_entropy(pred, y), right + (pred.argmax(1) == y).float().mean()
        print(float(loss), float(total) / n_valid, float(right) / n_valid)
    return fit


def ours(full: bool):
    if not full: learn = TrainingLoop(DataLoaders(train), mlp(), F.cross_entropy, sgd, lr)
    else: learn = Learner(DataLoaders(train, valid), mlp(), F.cross_entropy, sgd, lr, metrics=accuracy)
    return lambda: learn.fit(1)


def fastai(full: bool):
    from fastai.data.core import DataLoaders as Loaders
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner as Theirs
    from fastai.metrics import accuracy as metric
    from fastai.optimizer import OptimWrapper
    dls = Loaders(train, valid if full else [])
    def opt(params, lr, **kw): return OptimWrapper(params, torch.optim.SGD, lr=lr)
    learn = Theirs(dls, mlp(), F.cross_entropy, opt_func=opt, lr=lr, metrics=[metric] if full else [])
    def fit():
        if full: return learn.fit(1)
        with learn.no_bar(), learn.no_logging(), learn.removed_cbs(list(learn.cbs)[1:]): learn.fit(1)
    return fit


def lightning(full: bool):
    import lightning as pl
    from torchmetrics import Accuracy
    for name in list(logging.root.manager.loggerDict):
        if name.startswith('lightning'): logging.getLogger(name).setLevel(logging.ERROR)
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.acc = mlp(), Accuracy('multiclass', num_classes=2)
        def training_step(self, batch, i):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if full: self.log('train_loss', loss, prog_bar=True)
            return loss
        def configure_optimizers(self): return sgd(self.parameters(), lr)
    class Judged(Net):
        def validation_step(self, batch, i):
            pred = self.net(batch[0])
            self.acc(pred, batch[1])
            self.log('valid_loss', F.cross_entropy(pred, batch[1]), prog_bar=True)
            self.log('accuracy', self.acc, prog_bar=True)
    net = Judged() if full else Net()
    def fit():
        trainer = pl.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,
                             enable_model_summary=False, enable_progress_bar=full, num_sanity_val_steps=0)
        trainer.fit(net, train, valid if full else None)
    return fit


def miniai(full: bool):
    from miniai.learner import DataLoaders as Loaders, DeviceCB, Learner as Theirs, MetricsCB, ProgressCB, TrainCB
    from torcheval.metrics import MulticlassAccuracy
    cbs = [TrainCB()] + ([DeviceCB(), MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB()] if full else [])
    learn = Theirs(Loaders(train, valid), mlp(), F.cross_entropy, lr=lr, cbs=cbs, opt_func=sgd)
    return lambda: learn.fit(1, valid=full)


def quiet(fit):
    "`fit`, whose reports go nowhere"
    def f():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): fit()
    return f


def measured(full: bool) -> list[dict]:
    fs = dict(bare=quiet(bare(full)), ours=quiet(ours(full)))
    for make in fastai, lightning, miniai:
        try:
            f = quiet(make(full))
            f()
            fs[make.__name__] = f
        except Exception as e: print(f'{make.__name__} is left out ({type(e).__name__}: {str(e)[:90]})')
    t = compare(fs, repeat=31, min_time=.25) # Blocks so long that the caches left by what ran before count for little
    kind = 'full' if full else 'bare'
    def us(name): return t[name].median / n_train * 1e6
    def against(name, what, goal=''):
        rates = dict(us_per_step=us('ours'), peer_us_per_step=us(name))
        return row(f'{kind}: against {what}', t['ours'], t[name], goal, **rates)
    peers = [against(name, name) for name in fs if name not in ('bare', 'ours')]
    return [against('bare', 'a bare loop', '<= 1.25' if full else '<= 1.05'), *peers]


if __name__ == '__main__':
    torch.manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    save('learner', measured(False) + measured(True), packages=('fastai', 'lightning', 'miniai'), steps=n_train,
         valid_batches=n_valid, load_at_start=load)
