"Mixed and smoothed losses against PyTorch's, whatever the loss, the rank and the targets; mixing among other features."
import copy
from collections import namedtuple
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import at, batches, learner, net, same
from torch import nn
from torch.nn import functional as F

from dlfound.checkpoint import Checkpoint, resume
from dlfound.learner import (Callback, CancelBatch, DataLoaders, GradientAccumulation, GradientClip, Learner, Metric,
                             Recorder, label_weight)
from dlfound.metrics import check_weight
from dlfound.minibatch import Dataset, accuracy
from dlfound.mixup import CutMix, LabelSmoothing, MixUp, MixUpOrCutMix, mixed_loss, random_boxes, soft_accuracy
from dlfound.sanity import SanityWarning, check_first_loss, check_target
from dlfound.search import lr_find

quiet = pytest.mark.filterwarnings('ignore::UserWarning')
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
seeds = st.integers(0, 2**31)
sizes = st.lists(st.integers(1, 3), max_size=3) # Of the dimensions behind the classes


def drawn(seed, n, k, rest):
    "Predictions, labels, those of partners, shares, class weights"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n, *rest), generator=g)
    who = torch.randperm(n, generator=g)
    return torch.randn(n, k, *rest, generator=g), y, y[who], torch.rand(n, generator=g), torch.rand(k, generator=g) + .1


def rows(y, k): return F.one_hot(y, k).movedim(-1, 1).float()


def columns(lam, like): return lam.view(-1, *[1] * (like.ndim - 1))


# Smoothing

@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(2, 5), sizes, st.sampled_from([0., .1, .5, 1.]), st.booleans(),
       st.booleans(), st.sampled_from(['mean', 'sum', 'none']))
def test_smoothing_is_pytorchs(seed, n, k, rest, eps, weighted, ignoring, reduction):
    pred, y, _, _, weight = drawn(seed, n, k, rest)
    options = dict(reduction=reduction, weight=weight if weighted else None)
    if ignoring:
        options['ignore_index'] = 0
        y.view(-1)[0] = 1 # One at least counts
    p, q = (pred.clone().requires_grad_() for _ in range(2))
    ours = LabelSmoothing(eps, **options)(p, y)
    theirs = F.cross_entropy(q, y, label_smoothing=eps, **options)
    close(ours, theirs)
    close(*(torch.autograd.grad(loss.sum(), x)[0] for loss, x in ((ours, p), (theirs, q))))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(2, 5), sizes, st.booleans(), st.sampled_from(['mean', 'sum', 'none']))
def test_smoothing_of_shares_is_pytorchs(seed, n, k, rest, weighted, reduction):
    pred, y, _, _, weight = drawn(seed, n, k, rest)
    shares, options = torch.rand_like(pred).softmax(1), dict(reduction=reduction, weight=weight if weighted else None)
    close(LabelSmoothing(.2, **options)(pred, shares), F.cross_entropy(pred, shares, label_smoothing=.2, **options))


def test_smoothing_of_one_example_without_a_batch_and_of_double_precision():
    pred = torch.randn(5, dtype=torch.float64)
    close(LabelSmoothing()(pred, torch.tensor(3)), F.cross_entropy(pred, torch.tensor(3), label_smoothing=.1))
    assert LabelSmoothing()(pred, torch.tensor(3)).dtype == torch.float64


def test_a_class_ruled_out_costs_nothing_without_smoothing():
    pred, y = torch.tensor([[0., 1, -torch.inf]]), torch.tensor([1])
    close(LabelSmoothing(0.)(pred, y), F.cross_entropy(pred, y))


def test_half_precision_is_computed_in_32_bits():
    pred, y = (20 * torch.randn(64, 10)).bfloat16(), torch.randint(10, (64,))
    close(LabelSmoothing()(pred, y), F.cross_entropy(pred.float(), y, label_smoothing=.1))


def test_a_loss_of_weights_moves_with_its_module():
    assert 'weight' in LabelSmoothing(weight=torch.rand(3)).state_dict()
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"): LabelSmoothing(reduction='avg')


# Mixed losses

@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(2, 5), sizes, st.sampled_from([0., .1]),
       st.sampled_from(['mean', 'sum', 'none']), st.sampled_from(['function', 'module', 'ours']))
def test_mixed_losses_are_those_of_mixed_rows(seed, n, k, rest, eps, reduction, kind):
    pred, y, partner, lam, _ = drawn(seed, n, k, rest)
    f = dict(function=partial(F.cross_entropy, label_smoothing=eps, reduction=reduction),
             module=nn.CrossEntropyLoss(label_smoothing=eps, reduction=reduction),
             ours=LabelSmoothing(eps, reduction=reduction))[kind]
    shares = columns(lam, pred)
    mixed = shares * rows(y, k) + (1 - shares) * rows(partner, k)
    close(mixed_loss(f, pred, y, partner, lam),
          F.cross_entropy(pred, mixed, label_smoothing=eps, reduction=reduction))
    if kind != 'function': assert f.reduction == reduction


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 5), st.integers(2, 5), sizes, st.sampled_from([0., .1]), st.booleans())
def test_weights_and_ignored_labels(seed, n, k, rest, eps, ours):
    "The sum is PyTorch's of mixed rows; the mean divides by what the labels of the batch count"
    pred, y, partner, lam, weight = drawn(seed, n, k, rest)
    y.view(-1)[0] = 1
    options = dict(weight=weight, ignore_index=0)
    make = partial(LabelSmoothing, eps) if ours else partial(nn.CrossEntropyLoss, label_smoothing=eps)
    each = [F.cross_entropy(pred, t, label_smoothing=eps, reduction='none', **options) for t in (y, partner)]
    shares = columns(lam, y)
    total = (shares * each[0] + (1 - shares) * each[1]).sum()
    close(mixed_loss(make(reduction='sum', **options), pred, y, partner, lam), total)
    close(mixed_loss(make(**options), pred, y, partner, lam), total / weight[y[y != 0]].sum())
    close(mixed_loss(make(**options), pred, y, partner, torch.ones(n)), make(**options)(pred, y))
    plain = make(weight=weight, reduction='sum')
    close(mixed_loss(plain, pred, y, partner, lam), F.cross_entropy(
        pred, columns(lam, pred) * rows(y, k) + (1 - columns(lam, pred)) * rows(partner, k), weight, reduction='sum',
        label_smoothing=eps))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.lists(st.integers(1, 4), max_size=3))
def test_a_regression_gets_the_gradient_of_mixed_targets(seed, n, rest):
    g = torch.Generator().manual_seed(seed)
    pred, y = (torch.randn(n, *rest, generator=g) for _ in range(2))
    partner, lam = y.flip(0), torch.rand(n, generator=g)
    pred.requires_grad_()
    mixed = columns(lam, y) * y + (1 - columns(lam, y)) * partner
    losses = mixed_loss(F.mse_loss, pred, y, partner, lam), F.mse_loss(pred, mixed)
    close(*(torch.autograd.grad(loss, pred)[0] for loss in losses))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(2, 4), st.booleans(), st.booleans())
def test_a_loss_for_every_pixel_is_that_of_the_pasted_target(seed, n, k, one_box, real):
    g = torch.Generator().manual_seed(seed)
    share = torch.randint(2, (1 if one_box else n, 1, 5, 6), generator=g).float()
    pred, y = torch.randn(n, k, 5, 6, generator=g), torch.randint(k, (n, 5, 6), generator=g)
    if real: y = torch.randn(n, k, 5, 6, generator=g)
    f, keep = F.mse_loss if real else F.cross_entropy, share == 1 if real else share[:, 0] == 1
    close(mixed_loss(f, pred, y, y.flip(0), share), f(pred, torch.where(keep, y, y.flip(0))))


def test_square_pictures_and_as_many_losses_for_each_example_are_no_pixels():
    pred, y, share = torch.randn(4, 6), torch.rand(4, 6), torch.randint(2, (4, 1, 6, 6)).float()
    bce = F.binary_cross_entropy_with_logits
    lam = share.mean((1, 2, 3))
    close(mixed_loss(bce, pred, y, y.flip(0), share), bce(pred, lam[:, None] * y + (1 - lam[:, None]) * y.flip(0)))


def test_losses_with_parameters_are_trained():
    class Scaled(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, pred, target): return super().forward(self.scale * pred, target)
    loss_func = Scaled()
    mixed_loss(loss_func, torch.randn(4, 3), torch.arange(4) % 3, torch.arange(4).flip(0) % 3, torch.rand(4)).backward()
    assert loss_func.scale.grad is not None


# The boxes

@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_boxes(seed, height, width, kept):
    torch.manual_seed(seed)
    box = random_boxes(torch.full((20,), kept), height, width)
    assert box.shape == (20, 1, height, width)
    side = (1 - kept)**.5
    most = (side * height + 1) * (side * width + 1)
    assert (box.sum((1, 2, 3)) <= most).all()
    rows, cols = box.any(3), box.any(2)
    assert (box == rows[..., None] & cols[..., None, :]).all() # They are rectangles


def test_boxes_at_both_ends():
    assert not random_boxes(torch.ones(50), 9, 9).any()
    assert random_boxes(torch.zeros(500), 9, 9).float().mean() < 1 # Clipped, as their centre may be anywhere


# In a loop

class Keeps(torch.nn.Module):
    "Gives back what it gets"
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))
        self.seen = []
    def forward(self, *inputs):
        self.seen.append((self.training, inputs))
        return inputs[0].float().flatten(1)[:, :3] + self.p


def fitted(batch, cb, model=None, loss=F.cross_entropy, **kw):
    model = model or Keeps()
    Learner(DataLoaders([batch], [batch]), model, loss, cbs=cb, progress=False, **kw).fit(1)
    return model


ways = pytest.mark.parametrize('make', [MixUp, CutMix, MixUpOrCutMix])


@quiet
@ways
@pytest.mark.parametrize('per_sample', [True, False])
@pytest.mark.parametrize('n', [1, 2, 7])
def test_any_size_of_batch_and_nothing_is_mixed_in_validation(make, per_sample, n):
    torch.manual_seed(0)
    x, y = torch.randn(n, 3, 4, 5), torch.arange(n) % 3
    cb = make(per_sample=per_sample)
    model = fitted((x, y), cb)
    (_, (mixed,)), (_, (valid,)) = model.seen
    assert torch.equal(valid, x) and mixed.shape == x.shape and (n == 1) <= torch.equal(mixed, x)
    assert len(cb.share) == (n if per_sample else 1)


@quiet
def test_predictions_and_metrics_see_what_they_would_see_without():
    learn = learner(cbs=MixUp(1.), metrics=accuracy)
    twin = learner(learn.model, metrics=accuracy)
    state = torch.get_rng_state()
    for f in (lambda l: l.validate(), lambda l: l.get_preds()[0], lambda l: l.get_preds(l.dls.train)[0],
              lambda l: l.predict(torch.ones(6))):
        a, b = f(learn), f(twin)
        assert a == b if isinstance(a, dict) else torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state) # And nothing is drawn


@quiet
@ways
def test_one_share_for_the_batch_needs_no_reduction(make):
    def single(pred, target): return F.cross_entropy(pred, target)
    fitted((torch.randn(4, 3, 4, 4), torch.arange(4) % 3), make(per_sample=False), loss=single)
    with pytest.raises(TypeError, match='single gives one number'):
        fitted((torch.randn(4, 3, 4, 4), torch.arange(4) % 3), make(), loss=single)


@quiet
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
@ways
def test_inputs_keep_their_type(make, dtype):
    model = fitted(((100 * torch.rand(4, 3, 4, 4)).to(dtype), torch.arange(4) % 3), make(), loss=nn.CrossEntropyLoss())
    assert model.seen[0][1][0].dtype == dtype


@quiet
def test_several_inputs_and_targets():
    Batch = namedtuple('Batch', 'a b y')
    x = torch.randn(5, 3, 4, 4)
    batch = Batch(dict(x=x), (x, x + 1), dict(y=torch.arange(5) % 3, z=torch.randn(5)))
    class Model(Keeps):
        def forward(self, a, b):
            self.gap = (a['x'] - b[0]).abs().max() + (b[1] - b[0] - 1).abs().max()
            return super().forward(a['x'])
    def loss(pred, target, reduction='mean'):
        return F.cross_entropy(pred, target['y'], reduction=reduction)
    seen = []
    model = Model()
    dls = DataLoaders([batch], None)
    cb = CutMix()
    watch = at('after_pred', lambda learn: seen.append((type(learn.batch), cb.partner['z'].sort()[0])), order=70)
    Learner(dls, model, loss, cbs=[cb, watch], progress=False).fit(1)
    assert model.gap < 1e-5 and seen[0][0] is Batch
    assert torch.equal(seen[0][1], batch.y['z'].sort()[0])


@quiet
@pytest.mark.parametrize('batch, error, text', [
    ((torch.randn(4, 3), [0, 1, 2, 0]), TypeError, 'a tuple of inputs and a target'),
    ([torch.randn(4, 3)], TypeError, 'a tuple of inputs and a target'),
    ((torch.ones(4, 3, dtype=torch.long), torch.arange(4) % 3), TypeError, 'only embeddings'),
    ((torch.ones(4, 3, dtype=torch.bool), torch.arange(4) % 3), TypeError, 'mixing needs floats'),
    ((torch.randn(4, 3), torch.tensor(2.), torch.arange(4) % 3), ValueError, r'item \[1\] of a batch of 4')])
def test_what_cannot_be_mixed(batch, error, text):
    with pytest.raises(error, match=text): fitted(batch, MixUp())


@quiet
@pytest.mark.parametrize('e', [RuntimeError, KeyboardInterrupt, CancelBatch])
def test_the_loss_is_left_as_it_was(e):
    class Fails(nn.CrossEntropyLoss):
        def forward(self, pred, target): raise e
    loss_func = Fails(reduction='sum')
    learn = learner(cbs=MixUp(), loss=loss_func, valid=())
    if e is CancelBatch: learn.fit(1)
    else:
        with pytest.raises(e): learn.fit(1)
    assert learn.loss_func is loss_func and loss_func.reduction == 'sum'


@quiet
def test_tiny_and_huge_alphas():
    for alpha in (1e-4, 1e6):
        share = MixUp(alpha).draw(1000)
        assert share.isfinite().all() and 0 <= share.min() <= share.max() <= 1
    for alpha in (0, -1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='alpha is above 0'): MixUp(alpha)


@quiet
@ways
def test_an_interrupted_fit_goes_on_to_the_bit(make, tmp_path):
    g = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randn(40, 3, 4, 4, generator=g), torch.randint(3, (40,), generator=g))
    def made():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Dropout(.2), nn.ReLU(), nn.Linear(16, 3))
        cbs = [make(), GradientAccumulation(2), GradientClip(.5), Checkpoint(tmp_path, 1, 'batch', monitor=None)]
        return Learner(DataLoaders.from_datasets(ds, ds, 8), model, LabelSmoothing(), torch.optim.Adam, cbs=cbs,
                       progress=False)
    whole = made()
    torch.manual_seed(2)
    whole.fit(3)
    for path in tmp_path.iterdir(): path.unlink()
    torch.manual_seed(2)
    broken = made()
    torch.manual_seed(2)
    def stop(learn):
        if (learn.epoch, learn.iter, learn.training) == (1, 2, True): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): broken.fit(3, cbs=at('after_pred', stop))
    torch.manual_seed(99)
    again = made()
    resume(again, tmp_path, at('after_pred', lambda learn: None))
    assert same(whole.model, again.model) and whole[Recorder].losses == again[Recorder].losses


@quiet
def test_accumulation_with_class_weights_is_one_batch_of_all():
    weight = torch.tensor([1., 5, .2])
    loss_func = nn.CrossEntropyLoss(weight)
    kept, grads = [], []
    cb = MixUp(1.)
    keep = at('after_loss', lambda l: l.training and kept.append((*l.batch, cb.partner, cb.share)), order=70)
    def look(learn, proceed): grads.append([p.grad.clone() for p in learn.params])
    step = at('before_fit', lambda l: None, order=70)
    type(step).around_step = lambda self, learn, proceed: look(learn, proceed)
    learn = learner(cbs=[cb, GradientAccumulation(3), keep, step], loss=loss_func,
                    weight=lambda l: label_weight(l.loss_func, l.target()))
    learn.fit(1)
    x, y, partner, lam = map(torch.cat, zip(*kept))
    loss = mixed_loss(loss_func, learn.model(x), y, partner, lam)
    for a, b in zip(grads[0], torch.autograd.grad(loss, learn.params), strict=True): close(a, b, rtol=1e-4)


@quiet
def test_a_search_for_the_rate_mixes_and_leaves_everything_as_it_was():
    learn = learner(cbs=MixUp(), train=[8] * 4, loss=LabelSmoothing())
    before, state = copy.deepcopy(learn.model), torch.get_rng_state()
    lr_find(learn, n=20)
    assert same(before, learn.model) and torch.equal(torch.get_rng_state(), state)
    assert isinstance(learn.loss_func, LabelSmoothing)


@quiet
def test_half_precision_around_the_model_leaves_the_loss_in_32_bits():
    class Half(Callback):
        def around_forward(self, learn, proceed):
            with torch.autocast('cpu', torch.bfloat16): proceed()
            assert learn.pred.dtype == torch.bfloat16
    seen, cb = [], MixUp()
    loss_func = LabelSmoothing()
    def look(learn):
        if not learn.training: return
        by_hand = mixed_loss(loss_func, learn.pred.float(), learn.target(), cb.partner, cb.share)
        seen.append((learn.loss.dtype, torch.equal(learn.loss, by_hand)))
    learner(cbs=[cb, Half(), at('after_loss', look, order=70)], loss=loss_func).fit(1)
    assert seen == [(torch.float32, True)] * 3


@quiet
def test_two_that_mix_are_refused_and_one_can_take_the_others_place():
    with pytest.raises(ValueError, match='there is a MixUp'): learner(cbs=[MixUp(), CutMix()])
    learn = learner(cbs=MixUp())
    learn.fit(1, cbs=MixUpOrCutMix(p_cutmix=0))
    assert learn.cbs[MixUp].partner is None


@quiet
def test_nothing_but_the_inputs_differs_from_a_loop_by_hand():
    model = net()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    learner(model, cbs=MixUp(.4), loss=LabelSmoothing()).fit(2)
    torch.manual_seed(3)
    opt = torch.optim.SGD(twin.parameters(), .1)
    for _ in range(2):
        for x, y in batches(8, 8, 5):
            who = torch.randperm(len(x))
            lam = torch.distributions.Beta(.4, .4).sample((len(x),))
            lam = torch.maximum(lam, 1 - lam)[:, None]
            mixed = lam * rows(y, 3) + (1 - lam) * rows(y[who], 3)
            loss = F.cross_entropy(twin(lam * x + (1 - lam) * x[who]), mixed, label_smoothing=.1)
            opt.zero_grad(), loss.backward(), opt.step()
    for p, q in zip(model.parameters(), twin.parameters()): close(p, q, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(2, 5), sizes)
def test_accuracy_of_shares(seed, n, k, rest):
    pred, y, partner, lam, _ = drawn(seed, n, k, rest)
    close(soft_accuracy(pred, rows(y, k)), accuracy(pred, y))
    shares = columns(lam, pred) * rows(y, k) + (1 - columns(lam, pred)) * rows(partner, k)
    hits = [(pred.argmax(1) == t).float() for t in (y, partner)]
    close(soft_accuracy(pred, shares), (columns(lam, y) * hits[0] + (1 - columns(lam, y)) * hits[1]).mean())


# What else PyTorch takes

@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(2, 5), sizes, st.booleans(), st.booleans())
def test_labels_may_be_bytes(seed, n, k, rest, weighted, ignoring):
    pred, y, partner, lam, weight = drawn(seed, n, k, rest)
    y.view(-1)[0] = 1
    loss_func = LabelSmoothing(weight=weight if weighted else None, ignore_index=0 if ignoring else 255)
    close(loss_func(pred, y.byte()), loss_func(pred, y))
    close(mixed_loss(loss_func, pred, y.byte(), partner.byte(), lam), mixed_loss(loss_func, pred, y, partner, lam))


@pytest.mark.parametrize('k', [1, 2, 5])
def test_as_many_weights_as_classes(k):
    with pytest.raises(ValueError, match=f'{k} weights for 3 classes'):
        LabelSmoothing(weight=torch.ones(k))(torch.randn(4, 3), torch.zeros(4).long())


@pytest.mark.parametrize('options', [dict(ignore_index=1), dict(weight=torch.zeros(3))])
def test_a_mean_over_nothing_is_nan_as_in_pytorch(options):
    pred, y = torch.randn(4, 3), torch.ones(4).long()
    for loss_func in LabelSmoothing(**options), nn.CrossEntropyLoss(label_smoothing=.1, **options):
        assert loss_func(pred, y).isnan() and mixed_loss(loss_func, pred, y, y, torch.rand(4)).isnan()


def test_a_module_may_take_the_reduction_in_its_forward():
    class Own(nn.Module):
        def forward(self, pred, target, reduction='mean'): return F.cross_entropy(pred, target, reduction=reduction)
    args = torch.randn(4, 3), torch.arange(4) % 3, torch.arange(4).flip(0) % 3, torch.rand(4)
    close(mixed_loss(Own(), *args), mixed_loss(F.cross_entropy, *args))


def test_accuracy_of_whole_numbers_in_rows():
    pred, y = torch.randn(9, 3), torch.arange(9) % 3
    assert soft_accuracy(pred, F.one_hot(y, 3)) == accuracy(pred, y)


# What the checks know of smoothed labels

@quiet
def test_checks_and_averages_know_smoothing():
    weight, data = torch.tensor([1., 50., .2]), batches(7, 2)
    loss = LabelSmoothing(weight=weight, ignore_index=2)
    for _, y in data:
        assert label_weight(loss, y) == label_weight(nn.CrossEntropyLoss(weight, ignore_index=2), y)
    with pytest.warns(SanityWarning, match='pass weight='): check_weight(loss, data[0][1], 7)
    with pytest.warns(SanityWarning, match='take no sums'):
        check_weight(LabelSmoothing(reduction='sum'), data[0][1], 7)
    with pytest.raises(ValueError, match='argmax'): check_target(loss, torch.randn(4, 3), torch.ones(4, 3).long())
    values = Metric(lambda p, t: p.sum() / len(p), 'values')
    learn = Learner(DataLoaders(data, data), net(), loss, metrics=values, progress=False,
                    weight=lambda l: label_weight(l.loss_func, l.target()))
    row, x, y = learn.validate(), *(torch.cat(t) for t in zip(*data))
    kept = torch.tensor([(y != 2).sum() for _, y in data])
    means = torch.stack([learn.model(x).sum() / len(x) for x, _ in data])
    assert row['values'] == pytest.approx(float((means * kept).sum() / kept.sum()), abs=1e-6)
    assert row['valid_loss'] == pytest.approx(float(loss(learn.model(x), y)), abs=1e-5)


def test_the_first_loss_of_smoothing_is_judged():
    pred, y = 30 * torch.randn(16, 10), torch.randint(10, (16,))
    with pytest.warns(SanityWarning, match='the first loss'):
        check_first_loss(LabelSmoothing(), pred, LabelSmoothing()(pred, y))


def test_labels_out_of_range_are_named_and_options_printed():
    for k in 3, -1:
        with pytest.raises(ValueError, match=rf'labels go from 0 to 2, got \[{k}\]'):
            LabelSmoothing()(torch.randn(4, 3), torch.tensor([0, 1, k, 2]))
    assert repr(LabelSmoothing(.2, reduction='sum')) == "LabelSmoothing(eps=0.2, ignore_index=-100, reduction='sum')"
