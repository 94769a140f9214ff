"Is the side task solved, and by looking? Metrics against hand and brute force, controls, and watchers that change nothing"
import copy, random
from itertools import product
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from torch import nn
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, L, MixedPrecision, MixUp, ProgressCallback,
    Recorder, SaveModelCallback, accuracy, noop)
from vt_drloc.callback import DrlocCallback
from vt_drloc.hybrid import as_backbone, cvt_mini
from vt_drloc.loss import DrlocLoss, best_guess
from vt_drloc.pairs import all_pairs
from vt_drloc.variants import VARIANTS, DrlocFamily, best_constant, draw_pairs, drloc_callback
from vt_drloc.vit import vit_mini
from vt_drloc.watch import *
from test_callback import run_both

COLS = ['row','col','expl','scr_row','scr_col','scr_expl','con_row','con_col','con_expl']

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

# --- a tiny world

class Tiny(nn.Module):
    "The backbone contract, as small as it gets: 8 x 8 images, a 4 x 4 grid; BatchNorm and dropout would show a careless look"
    num_prefix_tokens,output_fmt = 0,'NCHW'
    def __init__(self, D=6, n_out=3):
        super().__init__()
        self.num_features = D
        self.conv,self.norm,self.drop,self.head = nn.Conv2d(3, D, 2, 2),nn.BatchNorm2d(D),nn.Dropout(.3),nn.Linear(D, n_out)
    def forward_features(self, x): return self.norm(self.conv(x)).tanh()
    def forward_head(self, f, pre_logits=False):
        f = self.drop(f.mean((2,3)))
        return f if pre_logits else self.head(f)
    def forward(self, x): return self.forward_head(self.forward_features(x))

class Restless(Tiny):
    "Draws from the global generator even in evaluation, as a sampling attention would"
    def forward_features(self, x): return super().forward_features(x) + .01*torch.randn(1, device=x.device)

def tiny(cls=Tiny, **kw):
    torch.manual_seed(0)
    return cls(**kw)

def data(n=32, hw=(8,8), seed=1):
    g = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(n, 3, *hw, generator=g), torch.randint(3, (n,), generator=g)))

def loaders(n_valid=12, device='cpu', shuffle=False, hw=(8,8)):
    ds = data(hw=hw)
    dl = lambda d, **kw: DataLoader(d, bs=8, num_workers=0, device=device, **kw)
    return DataLoaders(dl(ds, shuffle=shuffle), dl(ds[:n_valid])).to(device)

def drloc(lam=.5, **kw): return DrlocCallback(lam, **{**dict(m=8, hidden=16), **kw})

def learner(cbs=None, model=None, dls=None, **kw):
    learn = Learner(dls or loaders(), tiny() if model is None else model, cbs=cbs, **{**dict(loss_func=CrossEntropyLossFlat(), lr=.02), **kw})
    learn.create_mbar,learn.logger = False,noop
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, ProgressCallback)])
    return learn

def weights(m): return {k: v.detach().clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def table(learn): return [dict(zip(learn.recorder.metric_names[1:], v)) for v in learn.recorder.values]
def images(B=2, H=8, W=8, seed=0): return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(seed))

class Says(nn.Module):
    "A loss whose MLP says what it is told to"
    identical,reduction = True,'mean'
    def __init__(self, said, variant='drloc', signed=False, mlp=None): super().__init__(); self.said,self.variant,self.signed = said,variant,signed
    def predict_cells(self, grid, pairs): return self.said if torch.is_tensor(self.said) else self.said(self.true_cells(pairs, *grid.shape[2:]))
    def true_cells(self, pairs, h, w):
        d = torch.stack([pairs[...,0]//w - pairs[...,1]//w, pairs[...,0]%w - pairs[...,1]%w], -1).float()
        return d if self.signed else d.abs()

def every(h, w, B=1): return all_pairs(h, w).expand(B, -1, -1)

# --- scores

def test_by_hand_on_2x2():
    "Pairs (0,3): (1,1) apart; (1,1): (0,0). Answers off by 1/2 and 0 rows, 0 and 1 columns. Median 0 pays 1 a pair on the average"
    sums = judge(Says(torch.tensor([[[.5,1], [0,1]]])), torch.zeros(1,1,2,2), torch.tensor([[[0,3],[1,1]]]))
    assert sums.tolist() == [.5, 1, .75, 1, 1, 1, 2]
    got,guess = summary(sums)
    assert got == dict(row=.25, col=.5, explained=.25) and guess == dict(row=.5, col=.5, explained=0)

def test_by_hand_squares_on_2x2():
    "All 16 pairs: mean |offset| 1/2, variance 1/4 an axis; a constant 1 is off by 1 for half of the pairs, so twice the variance"
    sums = judge(Says(lambda t: torch.ones_like(t), 'reg'), torch.zeros(1,1,2,2), every(2, 2))
    assert sums[2] == 16*2*.5/4 and sums[5] == 16*2*.25/4
    assert summary(sums)[0] == dict(row=.5, col=.5, explained=-1)

def test_by_hand_rectangle():
    "2 x 3: an error of one row weighs 1/2, of one column 1/3"
    err = torch.tensor([1.,0.])
    sums = judge(Says(lambda t: t+err), torch.zeros(1,1,2,3), every(2, 3))
    assert sums[2] == pytest.approx(36/2) and judge(Says(lambda t: t+err.flip(0)), torch.zeros(1,1,2,3), every(2, 3))[2] == pytest.approx(36/3)

def brute(h, w, signed):
    "All offsets by loops"
    cells = list(product(range(h), range(w)))
    d = [(a-p, b-q) for a,b in cells for p,q in cells]
    return np.array(d if signed else [(abs(u),abs(v)) for u,v in d], dtype=float)

@pytest.mark.parametrize('h,w', [(2,2), (3,5), (7,7), (8,4)])
@pytest.mark.parametrize('variant,signed', [('drloc',False), ('signed',True), ('all',False), ('ce',True), ('ce',False), ('reg',True), ('reg',False)])
def test_guessing_equals_brute_force(h, w, variant, signed):
    "The best constant's score over all pairs, against a search over constants (a count for the classes)"
    d,n = brute(h, w, signed),np.array([h,w])
    if variant=='ce':
        fam = DrlocFamily(4, 'ce', hidden=8, k=(h,w), seed=0, signed=signed)
        got = judge(fam, torch.randn(1,4,h,w), every(h, w))[5].item()/len(d)
        want = sum(-np.log(np.mean(d[:,i]==x)) for i in (0,1) for x in d[:,i])/len(d)
    else:
        got = judge(Says(lambda t: t, variant, signed), torch.zeros(1,1,h,w), every(h, w))[5].item()/len(d)
        c = np.arange(-max(h,w), max(h,w)+.01, .125)
        price = lambda e: e**2 if variant=='reg' else np.abs(e)
        at = lambda i, c: price((d[:,i]-c)/n[i]).mean()
        want = sum(min(at(i, x) for x in c) if variant!='reg' else at(i, d[:,i].mean()) for i in (0,1))
        if variant=='reg': assert all(want <= sum(at(i, x) for i in (0,1)) + 1e-9 for x in c)
    assert got == pytest.approx(want, rel=1e-5)

def test_guess_errors_are_best_guess():
    got,guess = summary(judge(DrlocLoss(4, hidden=8), torch.randn(1,4,7,5), every(7, 5)))
    assert (guess['row'],guess['col']) == pytest.approx(best_guess(7, 5).error, rel=1e-6)

def blank(fam):
    "The last layer silenced: one answer for every pair"
    last = fam.mlp[-1]
    nn.init.zeros_(last.weight); nn.init.zeros_(last.bias)
    return last.bias.data

def guesser(variant, h, w, preset='paper', **kw):
    "A real loss that answers with its best constant"
    fam = DrlocFamily(4, variant, preset, hidden=8, k=(h,w), seed=0, trunk=False, **kw)
    bias,best = blank(fam),best_constant(fam, h, w)
    if variant in ('drloc','signed'):
        add = [n-1 if fam.options['shift'] and fam.signed else 0 for n in (h,w)]
        unit = [1,1] if fam.options['scale']=='raw' else [h,w]
        bias.copy_(torch.tensor([(o+a)/u for o,a,u in zip(best.offset, add, unit)]))
        return fam
    d,cut = torch.tensor(brute(h, w, fam.signed)),bias.numel()//2 if h==w else 2*h+1
    for part,i,n in ((bias[:cut],0,h), (bias[cut:],1,w)):
        first = -n if fam.signed else 0
        part.copy_(torch.tensor([(d[:,i]==first+c).double().mean() for c in range(len(part))]).log().clamp(min=-60))
    return fam

@pytest.mark.parametrize('variant', ['drloc','signed','ce','reg'])
@pytest.mark.parametrize('h,w', [(4,4), (3,5)])
def test_best_constant_explains_nothing(variant, h, w):
    fam = guesser(variant, h, w)
    got,guess = summary(judge(fam, torch.randn(2,4,h,w), every(h, w, 2)))
    assert got['explained'] == pytest.approx(0, abs=1e-5)
    if variant in ('drloc','signed'): assert (got['row'],got['col']) == pytest.approx((guess['row'],guess['col']), rel=1e-5)

@pytest.mark.parametrize('kw', [dict(axes='mean'), dict(reduction='sum'), dict(axes='mean', reduction='sum', signed=False)], ids=str)
def test_best_classes_explain_nothing_whatever_the_options(kw):
    "The score of the classes is their loss, so its guess has the loss's options too"
    got,_ = summary(judge(guesser('ce', 4, 4, **kw), torch.randn(2,4,4,4), every(4, 4, 2)))
    assert got['explained'] == pytest.approx(0, abs=1e-5)

@pytest.mark.parametrize('variant', ['drloc','signed','ce','reg'])
def test_axes_do_not_change_the_share_explained(variant):
    "Summed or averaged, the same net explains the same"
    share = lambda axes: summary(judge(DrlocFamily(6, variant, hidden=8, k=4, seed=0, axes=axes), images(2, 4, 4)[:,[0,1,2]*2], every(4, 4, 2)))[0]['explained']
    assert share('mean') == pytest.approx(share('sum'), rel=1e-4)

@pytest.mark.parametrize('variant', ['drloc','signed'])
def test_best_constant_explains_nothing_in_the_released_preset(variant):
    got,_ = summary(judge(guesser(variant, 4, 4, 'released', layers=2), torch.randn(2,4,4,4), every(4, 4, 2)))
    assert got['explained'] == pytest.approx(0, abs=1e-5)

def test_the_same_pairs_make_the_constants_share_exact():
    "On a few drawn pairs too, though their own median is another"
    fam,pairs = guesser('drloc', 4, 4),torch.tensor([[[0,15],[3,12],[0,14]]])
    assert summary(judge(fam, torch.randn(1,4,4,4), pairs))[0]['explained'] == pytest.approx(0, abs=1e-6)

def test_guessing_without_identical_pairs():
    "2 x 2: of 12 pairs of two cells, 8 lie a row apart and 4 do not, so the median is 1 and off by 1/3; with the 4 identical ones it is 0 and off by 1/2"
    loss = Says(lambda t: torch.ones_like(t))
    for identical,error,share in ((False,1/3,0), (True,.5,0)):
        loss.identical = identical
        got,guess = summary(judge(loss, torch.zeros(1,1,2,2), draw_pairs(1, 1, 2, 2, exhaustive=True, identical=identical)))
        assert (guess['row'],guess['col']) == pytest.approx((error,error)) and got['explained'] == pytest.approx(share, abs=1e-6)

@pytest.mark.parametrize('variant,signed', [('drloc',False), ('signed',True), ('all',False), ('reg',True)])
def test_perfect_answers_explain_all(variant, signed):
    assert summary(judge(Says(lambda t: t, variant, signed), torch.zeros(1,1,3,5), every(3, 5)))[0] == dict(row=0, col=0, explained=1)

def test_perfect_classes_explain_all():
    "A grid that carries its own coordinates, and an MLP that is sure"
    fam,(h,w) = DrlocFamily(2, 'ce', hidden=8, k=3, seed=0),(3,3)
    class Sure(nn.Module):
        dim = 2
        def __init__(self): super().__init__(); self.w = nn.Linear(1,1)
        def __getitem__(self, i): return self.w
        def forward(self, e): # (B, m, 4): row, column of both cells
            d = (e[...,:2]-e[...,2:]).round().long() + 3
            return torch.cat([100.*nn.functional.one_hot(d[...,i], 7) for i in (0,1)], -1)
    fam.mlp = Sure()
    grid = torch.stack(torch.meshgrid(torch.arange(3.), torch.arange(3.), indexing='ij'))[None]
    got,_ = summary(judge(fam, grid, every(h, w)))
    assert got['explained'] == pytest.approx(1, abs=1e-5) and got['row'] == pytest.approx(0, abs=1e-4)

@pytest.mark.parametrize('reduction', ['mean','sum'])
def test_classes_score_is_the_loss(reduction):
    fam,grid,pairs = DrlocFamily(4, 'ce', hidden=8, k=4, seed=0, reduction=reduction),torch.randn(3,4,4,4),every(4, 4, 3)
    sums = judge(fam, grid, pairs)
    assert (sums[2]/sums[6]).item() == pytest.approx(fam(grid, pairs=pairs).item()/(3 if reduction=='sum' else 1), rel=1e-5)

def test_sums_add_up():
    loss,grid,pairs = DrlocLoss(4, hidden=8, seed=0),torch.randn(4,4,4,4),every(4, 4, 4)
    parts = judge(loss, grid[:1], pairs[:1]) + judge(loss, grid[1:], pairs[1:])
    torch.testing.assert_close(parts, judge(loss, grid, pairs), rtol=1e-5, atol=1e-3)

def test_drloc_loss_and_family_agree():
    a,b = DrlocLoss(4, hidden=8, seed=0),DrlocFamily(4, hidden=8, seed=0)
    b.mlp.load_state_dict(a.mlp.state_dict())
    grid = torch.randn(2,4,3,5)
    torch.testing.assert_close(judge(a, grid, every(3, 5, 2)), judge(b, grid, every(3, 5, 2)))

@pytest.mark.parametrize('pool,hw', [('2x2',(4,4)), ('3x3',(4,4))])
def test_pooled_grid(pool, hw):
    fam = DrlocFamily(6, pool=pool, hidden=8, seed=0)
    grid = torch.randn(1,6,8,8)
    assert task_size(fam, grid) == hw
    assert judge(fam, grid, every(*hw))[6] == 256

# --- controls

def test_scrambling_is_one_fixed_permutation():
    x = torch.arange(2*3*4*6.).view(2,3,4,6)
    a,b = scrambled(x),scrambled(x)
    assert torch.equal(a, b) and a.shape==x.shape and not torch.equal(a, x)
    perm = a[0,0].flatten().long()
    assert sorted(perm.tolist()) == list(range(24))
    for i,c in product(range(2), range(3)): assert torch.equal(a[i,c].flatten(), x[i,c].flatten()[perm])
    assert not torch.equal(scrambled(x, seed=1), a)
    assert torch.equal(scrambled(x[:1]), a[:1])                  # of the batch's size too
    y = x.to(memory_format=torch.channels_last)
    assert torch.equal(scrambled(y), a)

def test_scrambling_leaves_the_global_generator():
    s = torch.get_rng_state()
    scrambled(images(1, 16, 4), seed=99)
    assert torch.equal(s, torch.get_rng_state())

def test_constant_is_each_images_mean():
    x = images(3, 4, 6)
    c = constant(x)
    assert c.shape==x.shape and (c==c[:,:,:1,:1]).all()
    torch.testing.assert_close(c[...,0,0], x.mean((2,3)))

def test_report():
    model,loss = tiny(),DrlocLoss(6, hidden=8, seed=0)
    a,b = watch_report(model, loss, images(4)),watch_report(model, loss, images(4))
    assert a==b and list(a) == ['images','scrambled','constant','best constant']
    assert set(a['images']) == {'row','col','explained'} and a['best constant']['explained'] == 0
    assert a['images'] != a['scrambled'] != a['constant']
    assert '| best constant |' in a._repr_markdown_() and len(repr(a).splitlines()) == 6

def test_report_is_judge_on_the_grid():
    "The line 'images' by hand: grid, the seed's pairs, judge"
    model,loss,x = tiny().eval(),DrlocLoss(6, hidden=8, seed=0),images(4)
    pairs = torch.randint(16, (4,32,2), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(): want = {k: summary(judge(loss, model.forward_features(o), pairs))[0] for k,o in dict(images=x, scrambled=scrambled(x,5), constant=constant(x)).items()}
    got = watch_report(model, loss, x, m=32, seed=5)
    for k in want: assert got[k] == pytest.approx(want[k], rel=1e-5)

@pytest.mark.parametrize('variant', VARIANTS)
def test_report_for_every_variant(variant):
    model = tiny()
    loss = DrlocFamily([6,6] if variant=='all' else 6, variant, hidden=8, k=4, seed=0)
    r = watch_report(model, loss, images(3), tap=['norm','norm'] if variant=='all' else None)
    assert all(np.isfinite(v) for row in r.values() for v in row.values())

def test_report_changes_nothing():
    model = tiny(Restless)
    model.train(); model.norm.eval()
    before,state = weights(model),torch.get_rng_state()
    watch_report(model, DrlocLoss(6, hidden=8), images())
    cell_spread(model, images())
    state2 = torch.get_rng_state()
    assert same(before, weights(model)) and model.training and not model.norm.training and model.conv.training
    torch.manual_seed(0); DrlocLoss(6, hidden=8); a = torch.get_rng_state()
    torch.manual_seed(0); watch_report(model, DrlocLoss(6, hidden=8), images())
    assert torch.equal(a, torch.get_rng_state())
    assert 'forward_features' not in vars(model)

def test_a_model_in_training_is_judged_as_in_evaluation():
    "Its BatchNorm takes the running statistics, and leaves them as they are"
    model,loss,x = tiny(),DrlocLoss(6, hidden=8, seed=0),images(4)
    before = weights(model)
    got = watch_report(model.train(), loss, x),cell_spread(model, x),view_from(model, loss, x[0])
    assert same(before, weights(model)) and model.norm.training
    want = watch_report(model.eval(), loss, x),cell_spread(model, x),view_from(model, loss, x[0])
    assert got[:2] == want[:2] and torch.equal(got[2].pred, want[2].pred)

# --- in a Learner

def test_columns_names_order_and_values():
    watch = WatchDrloc(n_batches=None, m=16)
    learn = learner([drloc(), watch], metrics=accuracy)
    learn.fit(2)
    assert list(learn.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','ce','drloc','lambda',*COLS,'time']
    rows = table(learn)
    assert [r[c] for r in rows for c in COLS] == [watch.history[e][c] for e in (0,1) for c in COLS]
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] and watch.task is None
    # by hand, on the two validation batches of 8 and 4 images
    g,sums = torch.Generator().manual_seed(0),{k: 0 for k in ('','scr_','con_')}
    for x,_ in learn.dls.valid:
        pairs = torch.randint(16, (len(x),16,2), generator=g)
        for k,o in (('',x), ('scr_',scrambled(x)), ('con_',constant(x))):
            with torch.no_grad(): sums[k] = sums[k] + judge(learn.drloc.loss_fn, learn.model.eval().forward_features(o), pairs)
    for k,s in sums.items():
        want = summary(s)[0]
        assert (rows[-1][k+'row'],rows[-1][k+'col'],rows[-1][k+'expl']) == pytest.approx((want['row'],want['col'],want['explained']), rel=1e-5)

def test_columns_of_choice():
    learn = learner([drloc(), WatchDrloc(columns=['expl','scr_expl'])])
    learn.fit(1)
    assert list(learn.recorder.metric_names[-3:]) == ['expl','scr_expl','time']

def test_the_order_of_the_callbacks_does_not_matter():
    learn = learner([WatchDrloc(), drloc()])
    learn.fit(1)
    assert list(learn.recorder.metric_names[3:6]) == ['ce','drloc','lambda'] and table(learn)[0]['row'] > 0

def test_given_to_fit_and_again():
    learn,watch = learner(drloc()),WatchDrloc()
    learn.fit(1, cbs=watch)
    first = dict(watch.history)
    learn.fit(1, cbs=watch)
    assert list(watch.history)==[0] and watch.history != first
    learn.fit(1)
    assert 'row' not in learn.recorder.metric_names

def test_n_batches():
    a,b,c = (WatchDrloc(n_batches=n) for n in (1,2,None))
    for w in (a,b,c): learner([drloc(), w]).fit(1)
    assert a.history != b.history == c.history

class Flip(Callback):
    run_valid = False
    def before_batch(self):
        if torch.rand(1) < .5: self.learn.xb = (self.xb[0].flip(-1),)

@pytest.mark.parametrize('cls', [Tiny, Restless])
def test_nothing_changes_bit_for_bit(cls):
    def run(*cbs):
        torch.manual_seed(3); random.seed(3); np.random.seed(3)
        task = drloc()
        learn = learner([task, Flip(), MixUp(), *cbs], model=tiny(cls), dls=loaders(shuffle=True), metrics=accuracy)
        learn.fit_one_cycle(2, .01)
        kept = [[r[k] for k in ('train_loss','valid_loss','accuracy','ce','drloc')] for r in table(learn)]
        return weights(learn.model),weights(task.loss_fn),task.generator.get_state(),torch.get_rng_state(),random.getstate(),np.random.get_state()[1],learn.recorder.losses,kept
    a,b = run(WatchDrloc(None), ShowDrloc()),run()
    assert same(a[0], b[0]) and same(a[1], b[1]) and torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) and a[4]==b[4] and (a[5]==b[5]).all()
    assert a[6]==b[6] and a[7]==b[7]

def test_evaluation_does_nothing(monkeypatch):
    a = learner([drloc(), WatchDrloc(), ShowDrloc()], metrics=accuracy)
    a.fit(1)
    history,b = dict(a.watch_drloc.history),learner(model=a.model, metrics=accuracy)
    def never(*_): raise AssertionError('looked')
    for name in ('sums_of','_view'): monkeypatch.setitem(WatchDrloc.after_pred.__globals__, name, never)
    torch.manual_seed(0); va,pa,ra = a.validate(),a.get_preds(),torch.get_rng_state()
    torch.manual_seed(0); vb,pb,rb = b.validate(),b.get_preds(),torch.get_rng_state()
    assert len(va)==2 and list(va)==list(vb) and all(torch.equal(x, y) for x,y in zip(pa, pb)) and torch.equal(ra, rb)
    assert a.watch_drloc.history == history and list(a.show_drloc.views) == [0]

def test_predictions_inside_a_fit_are_not_counted():
    class Inner(Callback):
        def after_train(self): self.learn.get_preds(ds_idx=0, inner=True)
    a,b = learner([drloc(), WatchDrloc(None), Inner()]),learner([drloc(), WatchDrloc(None)])
    for l in (a,b): torch.manual_seed(1); l.fit(1)               # dropout draws from the global generator
    assert a.watch_drloc.history == b.watch_drloc.history

def test_same_pairs_every_epoch():
    "A model that does not move scores the same to the bit, whatever the task draws"
    learn = learner([drloc(0.), WatchDrloc()], lr=0.)
    for p in learn.model.norm.parameters(): p.requires_grad_(False)
    learn.model.norm.momentum = 0.
    learn.fit(3, lr=0., wd=0.)
    a,b,c = learn.watch_drloc.history.values()
    assert a==b==c

def test_one_read_an_epoch(monkeypatch):
    "Tensors are read back once, at the end of the validation"
    reads = []
    class NoReads(Callback):
        order = WatchDrloc.order-.1
        def after_pred(self):
            if not self.training: reads.append(0)
    learn = learner([drloc(), WatchDrloc(None)])
    watch = learn.watch_drloc
    for name in ('item','tolist','cpu','numpy','__float__','__bool__','__int__'):
        stock = getattr(torch.Tensor, name)
        def counted(self, *args, stock=stock, name=name, **kw):
            if inside[0] and self.numel() < 10_000: reads.append((name, tuple(self.shape)))
            return stock(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, name, counted)
    inside = [False]
    for event in ('after_pred','after_validate'):
        f = getattr(WatchDrloc, event)
        def inner(self, f=f):
            inside[0] = True
            try: f(self)
            finally: inside[0] = False
        monkeypatch.setattr(WatchDrloc, event, inner)
    learn.fit(1)          # the best constants are computed here, on the CPU
    reads.clear()
    learn.fit(2)
    assert reads == [('tolist', (3,7))]*2

class CpuMixed(MixedPrecision):
    "fastai's own mixed precision with the device exchanged"
    def __init__(self): super().__init__('bf16')
    def before_fit(self): self.autocast,self.scales,self.learn.scaler = torch.autocast('cpu', torch.bfloat16),L(),torch.amp.GradScaler('cpu', enabled=False)

def test_mixed_precision():
    seen = []
    class Spy(Tiny):
        def forward_features(self, x):
            f = super().forward_features(x)
            if not self.training: seen.append(f.dtype)
            return f
    learn = learner([drloc(), CpuMixed(), WatchDrloc(None)], model=tiny(Spy))
    learn.fit(1)
    plain = learner([drloc(), WatchDrloc(None)])
    plain.fit(1)
    assert set(seen) == {torch.bfloat16}
    a,b = learn.watch_drloc.history[0],plain.watch_drloc.history[0]
    assert all(a[c] == pytest.approx(b[c], abs=.1) for c in COLS)

@pytest.mark.parametrize('how', ['wrapped','in place'])
def test_compiled(how):
    "The same numbers, the same weights, and not one graph more"
    def run(*cbs, compiled=True):
        torch._dynamo.reset()
        model,graphs = tiny(),[]
        def backend(gm, _): graphs.append(gm); return gm.forward
        if compiled and how=='wrapped': model = torch.compile(model, backend=backend)
        elif compiled: model.compile(backend=backend)
        learn = learner([drloc(), *cbs], model=model)
        learn.fit(2)
        torch._dynamo.reset()
        return learn,len(graphs)
    (a,na),(b,nb),(c,_) = run(WatchDrloc(None)),run(),run(WatchDrloc(None), compiled=False)
    assert na == nb > 0
    assert all(torch.equal(x, y) for x,y in zip(a.model.parameters(), b.model.parameters()))
    for e in (0,1): assert [a.watch_drloc.history[e][k] for k in COLS] == pytest.approx([c.watch_drloc.history[e][k] for k in COLS], rel=1e-3, abs=1e-4)

class WrapLate(Callback):
    "As fastai's DistributedTrainer does: wrap in `before_fit`, at order 11"
    order = 11
    def before_fit(self): self.learn.model = nn.parallel.DistributedDataParallel(self.model)
    def after_fit(self): self.learn.model = self.learn.model.module

def ddp_worker(rank, init, out):
    torch.distributed.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    ds = data()
    dl = lambda d: DataLoader(d, bs=4, num_workers=0, device='cpu')
    learn = learner([drloc(), WatchDrloc(None), ShowDrloc(), WrapLate()], dls=DataLoaders(dl(ds[rank::2]), dl(ds[rank:12:2])))
    learn.fit(2)
    g,sums = torch.Generator().manual_seed(rank),0
    with torch.no_grad():
        for x,_ in learn.dls.valid: sums = sums + judge(learn.drloc.loss_fn, learn.model.eval().forward_features(x), torch.randint(16, (len(x),64,2), generator=g))
    torch.save((learn.watch_drloc.history, sums), out)
    torch.distributed.destroy_process_group()

def test_ddp(tmp_path):
    "Both processes show the numbers of all images"
    (h0,s0),(h1,s1) = run_both('test_watch', tmp_path)
    want = summary(s0+s1)[0]
    assert h0==h1 and h0[1]['row'] == pytest.approx(want['row'], rel=1e-5) and h0[1]['expl'] == pytest.approx(want['explained'], rel=1e-4)

@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('preset', ['paper','released'])
def test_every_variant_is_watched(variant, preset):
    tap = ['conv','norm'] if variant=='all' else None
    learn = learner([drloc_callback(variant, preset, m=8, hidden=16, tap=tap), WatchDrloc(m=8), ShowDrloc()])
    learn.fit(2)
    assert all(np.isfinite(v) for row in learn.watch_drloc.history.values() for v in row.values())
    assert learn.show_drloc.views[1].arrows == (variant=='signed')
    learn.show_drloc.figure()

def test_saving_the_best_by_share_explained(tmp_path):
    learn = learner([drloc(), WatchDrloc(None)], path=tmp_path)
    learn.fit(3, cbs=SaveModelCallback(monitor='expl'))
    assert (tmp_path/'models'/'model.pth').exists() and list(learn.watch_drloc.history) == [0,1,2]

def test_train_metrics():
    "fastai's other table, with metrics of training and validation: ours belong to validation"
    learn = learner([drloc(), WatchDrloc()])
    learn.remove_cb(learn.recorder)
    learn.add_cb(Recorder(train_metrics=True))
    learn.fit(1)
    row = table(learn)[0]
    assert row['train_row'] is None and row['valid_row'] > 0

def test_lr_find_is_not_watched(tmp_path):
    learn = learner([drloc(), WatchDrloc(), ShowDrloc()], path=tmp_path)
    learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
    assert learn.watch_drloc.history == {} and learn.watch_drloc.task is None

def test_interrupted(tmp_path):
    class CtrlC(Callback):
        def after_pred(self):
            if not self.training: raise KeyboardInterrupt
    learn = learner([drloc(), WatchDrloc(), ShowDrloc()], metrics=accuracy)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=CtrlC())
    assert learn.watch_drloc.task is None and learn.show_drloc.task is None and list(learn.metrics.attrgot('name')) == ['accuracy']
    learn.fit(1)
    assert list(learn.watch_drloc.history) == [0]

def test_export_holds_no_watcher(tmp_path):
    learn = learner([drloc(), WatchDrloc(), ShowDrloc()], path=tmp_path)
    learn.fit(1)
    import pickle
    assert all(b'vt_drloc' not in pickle.dumps(c) for c in (learn.watch_drloc, learn.show_drloc))
    assert copy.deepcopy(learn.watch_drloc).history == learn.watch_drloc.history

@pytest.mark.cuda
@pytest.mark.parametrize('variant', ['drloc','ce'])
def test_on_a_gpu(variant):
    "Mixed precision and a host that never waits: one copy back an epoch"
    dls = loaders(device='cuda')
    learn = learner([drloc_callback(variant, m=8, hidden=16), MixedPrecision('bf16'), WatchDrloc(None), ShowDrloc()], model=tiny().cuda(), dls=dls)
    state = torch.cuda.get_rng_state()
    learn.fit(2)
    assert all(np.isfinite(v) for v in learn.watch_drloc.history[1].values())
    assert torch.equal(state, torch.cuda.get_rng_state()) or isinstance(learn.model.drop, nn.Dropout)

# --- pictures

def test_views_and_figures():
    show = ShowDrloc(every=2, query=(0,3))
    learn = learner([drloc(), show])
    learn.fit(4)
    assert list(show.views) == [0,2,3]
    v = show.views[3]
    assert v.query==(0,3) and (v.h,v.w)==(4,4) and not v.arrows
    assert v.true.view(4,4,2)[2,1].tolist() == [2,2]
    assert torch.equal(v.image, learn.dls.valid.dataset[0][0])
    with torch.no_grad(): want = view_from(learn.model, learn.drloc.loss_fn, v.image, (0,3))
    torch.testing.assert_close(v.pred, want.pred)
    assert show.figure() is not show.figure(0)
    with pytest.raises(ValueError, match='no view of epoch 1 .* 0, 2, 3'): show.figure(1)

@pytest.mark.parametrize('valid', [lambda: DataLoader([], bs=4), lambda: loaders().valid], ids=['none','some'])
def test_a_given_image_whether_there_are_validation_images(valid):
    show = ShowDrloc(image=images(1)[0])
    learn = learner([drloc(), show], dls=DataLoaders(loaders().train, valid()))
    learn.fit(1)
    assert torch.equal(show.views[0].image, images(1)[0])

def test_without_a_query_it_is_the_cell_a_third_down_and_across():
    assert view_from(tiny(), DrlocLoss(6, hidden=8), images(1, 12, 24)[0]).query == (2,4)

def test_arrows_meet_in_the_query():
    loss = DrlocFamily(6, 'signed', hidden=8, seed=0)
    v = view_from(tiny(), loss, images(1)[0], query=(1,2))
    n = torch.arange(16)
    tips = torch.stack([n//4, n%4], -1) + v.true
    assert v.arrows and (tips == torch.tensor([1,2])).all()
    quivers = [c for ax in show_view(v).axes for c in ax.collections]
    assert len(quivers) == 2 and np.allclose(quivers[1].U, v.true[:,1]) and np.allclose(quivers[1].V, v.true[:,0])

def test_heat_maps_of_a_variant_with_sign_are_absolute():
    v = view_from(tiny(), DrlocFamily(6, 'ce', k=4, hidden=8, seed=0), images(1)[0])
    assert not v.arrows and (v.pred >= 0).all() and (v.true >= 0).all()
    v = view_from(tiny(), DrlocFamily(6, 'ce', k=4, hidden=8, seed=0), images(1)[0], arrows=True)      # arrows if they are asked for
    assert v.arrows and v.true.min() < 0

def test_a_notebooks_figure_is_updated_in_place(monkeypatch):
    import IPython.display
    calls = []
    class Handle:
        def update(self, fig): calls.append('update')
    def display(fig, display_id=None): calls.append('display'); return Handle()
    monkeypatch.setattr(IPython.display, 'display', display)
    learner([drloc(), ShowDrloc(show=True)]).fit(3)
    assert calls == ['display','update','update'] and not plt.get_fignums()
    learner([drloc(), ShowDrloc()]).fit(1)                       # no notebook here: quiet
    assert len(calls) == 3 and not plt.get_fignums()

# --- architectures

def test_who_leaks():
    "The grid of a constant image: constant for Swin, reflecting convolutions and a ViT without positions; not for the others"
    from vt_drloc.swin import swin_mini
    from vt_drloc.t2t import t2t_mini
    torch.manual_seed(0)
    x = constant(images(2, 32, 32))
    for m in (swin_mini(), cvt_mini(padding_mode='reflect'), vit_mini(pos=None)): assert cell_spread(m, x) < 1e-5
    for m in (cvt_mini(), vit_mini(), vit_mini(pos='sincos'), t2t_mini()): assert cell_spread(m, x) > 1e-2
    assert cell_spread(swin_mini(), images(2, 32, 32)) > 1e-2

def test_swin_on_a_constant_image_is_no_better_than_guessing():
    "With random relative tables and norms too: one answer for all pairs, so at most the best constant's score"
    from vt_drloc.swin import swin_mini
    torch.manual_seed(0)
    swin = swin_mini()
    for p in swin.parameters(): p.data += .1*torch.randn_like(p)
    x = images(2, 32, 32)
    assert cell_spread(swin, constant(x)) < 1e-4 < cell_spread(swin, x)
    D = swin.num_features
    for variant in ('drloc','signed','ce'):
        fam = DrlocFamily(D, variant, hidden=16, k=8, seed=0)
        r = watch_report(swin, fam, x, m=2000)
        assert r['constant']['explained'] < .02
    best = DrlocFamily(D, hidden=16, seed=0)
    blank(best).copy_(torch.tensor(best_constant(best, 8, 8).offset)/8)
    assert watch_report(swin, best, x)['constant']['explained'] == pytest.approx(0, abs=1e-6)

def test_spread_by_hand():
    "Cells 1 and -1 have a mean of zero: spread 1; cells 3 and 1: 1/sqrt(5)"
    class Row(nn.Module):
        num_features,num_prefix_tokens,output_fmt = 1,0,'NCHW'
        def __init__(self, a, b): super().__init__(); self.v = torch.tensor([[[[a,b]]]])
        def forward_features(self, x): return self.v.expand(len(x),-1,-1,-1)
        def forward_head(self, f, pre_logits=False): return f.mean((2,3))
        def forward(self, x): return self.forward_head(self.forward_features(x))
    assert cell_spread(Row(1.,-1.), images()) == 1 and cell_spread(Row(3.,1.), images()) == pytest.approx(5**-.5) and cell_spread(Row(2.,2.), images()) == 0

# --- bad input

def test_bad_input():
    with pytest.raises(ValueError, match='WatchDrloc found no DrlocCallback.*cbs='): learner(WatchDrloc()).fit(1)
    with pytest.raises(ValueError, match='ShowDrloc found no DrlocCallback'): learner(ShowDrloc()).fit(1)
    with pytest.raises(ValueError, match='n_batches=0'): WatchDrloc(0)
    with pytest.raises(ValueError, match='m=0'): WatchDrloc(m=0)
    with pytest.raises(ValueError, match="column 'rows'.*con_expl"): WatchDrloc(columns=['rows'])
    with pytest.raises(ValueError, match='every=0'): ShowDrloc(0)
    with pytest.raises(ValueError, match=r'image is \(3, 8\)'): ShowDrloc(image=torch.zeros(3,8))
    with pytest.raises(ValueError, match=r'query=\(4, 0\)'): view_from(tiny(), DrlocLoss(6, hidden=8), images(1)[0], (4,0))
    with pytest.raises(ValueError, match='no|sign'): view_from(tiny(), DrlocLoss(6, hidden=8), images(1)[0], arrows=True)
    for bad in (images()[0], images().byte(), images()[:0], 'x'):
        with pytest.raises(ValueError, match='images are'): watch_report(tiny(), DrlocLoss(6, hidden=8), bad)
        with pytest.raises(ValueError, match='images are'): scrambled(bad)

@pytest.mark.parametrize('cb', [WatchDrloc, ShowDrloc])
@pytest.mark.parametrize('valid', [lambda: [], lambda: [DataLoader([], bs=4)]], ids=['missing','empty'])
def test_no_validation_images(cb, valid):
    learn = learner([drloc(), cb()], dls=DataLoaders(loaders().train, *valid()))
    with pytest.raises(ValueError, match='none; hold some out'): learn.fit(1)
    assert getattr(learn, 'drloc').tap is None
