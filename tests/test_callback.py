"The callback's contract, a test for each clause"
import copy, os, random, subprocess, sys, traceback, warnings
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from fastai.vision.all import (Adam, Callback, CancelBatchException, CancelFitException, CancelTrainException, CrossEntropyLossFlat, CutMix,
    DataLoader, DataLoaders, GradientAccumulation, GradientClip, ImageDataLoaders, L, LabelSmoothingCrossEntropyFlat, Learner, LRFinder,
    MixedPrecision, MixUp, OptimWrapper, PILImage, ProgressCallback, Recorder, Resize, RMSProp, SaveModelCallback, SGD, ShortEpochCallback,
    accuracy, get_image_files, noop, resnet18, tensor, vision_learner)
import vt_drloc.callback as mod
from vt_drloc.callback import *
from vt_drloc.loss import DrlocLoss


# --- a tiny world

class Tiny(nn.Module):
    "The backbone contract, as small as it gets: 8 x 8 images, a 4 x 4 grid"
    num_prefix_tokens,output_fmt = 0,'NCHW'
    def __init__(self, D=6, n_out=3, drop=0., unused=False):
        super().__init__()
        self.num_features = D
        self.conv,self.drop,self.head = nn.Conv2d(3, D, 2, 2),nn.Dropout(drop),nn.Linear(D, n_out)
        if unused: self.spare = nn.Linear(2, 2)
    def forward_features(self, x): return self.conv(x).tanh()
    def forward_head(self, f, pre_logits=False):
        f = self.drop(f.mean((2,3)))
        return f if pre_logits else self.head(f)
    def forward(self, x): return self.forward_head(self.forward_features(x))

def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return Tiny(**kw)

def data(n=32, hw=(8,8), seed=1):
    g = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(n, 3, *hw, generator=g), torch.randint(3, (n,), generator=g)))

def loaders(ds=None, bs=8, shuffle=False, device='cpu', **kw):
    ds = ds or data(**kw)
    dls = DataLoaders(DataLoader(ds, bs=bs, shuffle=shuffle, num_workers=0, device=device), DataLoader(ds[:8], bs=8, num_workers=0, device=device))
    return dls.to(device)

def drloc(lam=0.5, **kw): return DrlocCallback(lam, **{**dict(m=8, hidden=16), **kw})

def learner(cbs=None, model=None, dls=None, **kw):
    kw = {**dict(loss_func=CrossEntropyLossFlat(), lr=0.02), **kw}
    learn = Learner(dls or loaders(), tiny() if model is None else model, cbs=cbs, **kw)
    learn.create_mbar,learn.logger = False,noop
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, ProgressCallback)])
    return learn

def weights(m): return {k: v.detach().clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def near(a, b, **kw):
    assert a.keys()==b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], msg=lambda m: f'{k}: {m}', **kw)
def mlp(learn): return weights(learn.drloc.loss_fn)

def clean(learn, metrics=()):
    "No trace of the callback in Learner, model and optimizer"
    model = learn.model
    for m in model.modules():
        assert not any('tapped' in repr(v) for k,v in vars(m).items() if k.startswith('forward'))
        assert not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
    assert not any(type(c).__name__=='_JointClip' for c in learn.cbs)
    assert '_drloc_undo' not in vars(learn) and not hasattr(learn, '_joint_clip')
    assert list(learn.metrics.attrgot('name'))==list(metrics)
    if learn.opt:
        params = list(model.parameters())
        assert [id(p) for pg in learn.opt.param_lists for p in pg] == [id(p) for p in params]
        assert set(learn.opt.state) <= set(params)
        if isinstance(learn.opt, OptimWrapper): assert set(learn.opt.opt.state) <= set(params)
    for c in learn._grab_cbs(DrlocCallback): assert c.tap is None and c.joined is None and all(p.grad is None for p in c.mlp_params)

@pytest.fixture
def fixed_pairs(monkeypatch):
    "Every image gets the same pairs, so that batches can be split"
    monkeypatch.setattr('vt_drloc.loss.sample_pairs', same_pairs)

def same_pairs(B, m, h, w, device=None, generator=None):
    g = torch.Generator().manual_seed(5)
    return torch.randint(h*w, (1,m,2), generator=g).expand(B,-1,-1).to(device)

class Stop(Callback):
    "Raise `exc` at an event of training"
    run_valid = False
    def __init__(self, event, exc, order=0): self.order = order; setattr(self, event, partial(self._raise, exc))
    def _raise(self, exc): raise exc

class Watch(Callback):
    "Keep what a function of the Learner says at an event"
    def __init__(self, event, f, order=0): self.order,self.seen = order,[]; setattr(self, event, lambda: self.seen.append(f(self.learn)))

# --- however it is given

def given_to_init(cb):
    learn = learner(cb)
    learn.fit(1)
    return learn
def given_to_add_cb(cb):
    learn = learner()
    learn.add_cb(cb)
    learn.fit(1)
    return learn
def given_to_fit(cb):
    learn = learner()
    learn.fit(1, cbs=cb)
    return learn

@pytest.mark.parametrize('give', [given_to_init, given_to_add_cb, given_to_fit])
def test_given_to(give):
    cb,plain = drloc(),learner()
    start = weights(DrlocLoss(6, 8, 16, seed=0))
    learn = give(cb)
    plain.fit(1)
    assert not same(weights(learn.model), weights(plain.model))
    assert not same(weights(cb.loss_fn), start)
    assert same(weights(learn.model), weights(given_to_init(drloc()).model))
    clean(learn)

def images(path, side=64):
    rng = np.random.default_rng(0)
    for c in 'ab':
        (path/c).mkdir()
        for i in range(6): PILImage.create(rng.integers(0, 255, (side,side,3), dtype=np.uint8)).save(path/c/f'{i}.png')
    return ImageDataLoaders.from_folder(path, valid_pct=0.34, seed=0, item_tfms=Resize(side), bs=4, num_workers=0, device='cpu')

def test_vision_learner_frozen_with_slices(tmp_path):
    cb,hypers = drloc(),Watch('after_step', lambda l: ([len(pg) for pg in l.opt.param_lists], [h['lr'] for h in l.opt.hypers]))
    learn = vision_learner(images(tmp_path), resnet18, pretrained=False, cbs=[cb, hypers])
    learn.freeze()
    n,body = [len(pg) for pg in learn.opt.param_lists],learn.model[0][0].weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-4, 1e-2))
    groups,lrs = hypers.seen[-1]
    assert groups == [*n[:-1], n[-1]+4] and len(lrs) == 3 and lrs == pytest.approx([1e-4, 1e-3, 1e-2])
    assert cb.loss_fn.mlp.dim == 512 and torch.equal(body, learn.model[0][0].weight)
    assert [len(pg) for pg in learn.opt.param_lists] == n
    assert not same(weights(cb.loss_fn), weights(DrlocLoss(512, 8, 16, seed=0)))

def two_groups(m): return [list(m.conv.parameters()), list(m.head.parameters())]

def test_mlp_step_has_last_groups_lr_and_decays_weights_not_biases():
    class NoGrad(Callback):
        def before_step(self):
            for p in self.drloc.mlp_params: p.grad.zero_()
    cb = drloc()
    learn = learner([cb, NoGrad()], splitter=two_groups, opt_func=SGD)
    learn.fit(1, slice(1e-3, 1e-1), wd=0.2)
    start = weights(DrlocLoss(6, 8, 16, seed=0))
    for k,v in weights(cb.loss_fn).items():
        torch.testing.assert_close(v, start[k]*((1-0.1*0.2)**4 if v.ndim>1 else 1))

def test_freeze_trains_mlp_but_not_the_backbone():
    learn = learner(drloc(), splitter=two_groups)
    learn.freeze()
    a = weights(learn.model)
    learn.fit(1)
    b = weights(learn.model)
    assert torch.equal(a['conv.weight'], b['conv.weight']) and not torch.equal(a['head.weight'], b['head.weight'])
    assert not same(mlp(learn), weights(DrlocLoss(6, 8, 16, seed=0)))

@pytest.mark.parametrize('opt_func', [partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9), SGD, RMSProp])
def test_other_optimizers(opt_func):
    learn = learner(drloc(), opt_func=opt_func, splitter=two_groups)
    learn.fit(2, slice(1e-3, 1e-2))
    assert not same(mlp(learn), weights(DrlocLoss(6, 8, 16, seed=0)))
    assert len(learn.opt.hypers) == 2
    clean(learn)
    learn.fit(1)
    clean(learn)

# --- the sum

def test_total_is_ce_plus_lambda_drloc_and_columns():
    seen = []
    class See(Callback):
        order,run_valid = DrlocCallback.order-1,False
        def after_loss(self): seen.append(self.loss_grad.item())
    class SeeTotal(See):
        order = DrlocCallback.order+1
        def after_loss(self): seen.append(self.loss_grad.item()); assert self.loss.item() == self.loss_grad.item()
    cb = drloc(0.25)
    learn = learner([cb, See(), SeeTotal()], metrics=accuracy)
    learn.fit(2)
    ce,total = np.array(seen).reshape(-1,2)[4:].T                 # of the second epoch alone
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert list(learn.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','ce','drloc','lambda','time']
    assert row['ce'] == pytest.approx(ce.mean(), rel=1e-5) and row['lambda'] == 0.25
    assert row['drloc'] == pytest.approx(((total-ce)/0.25).mean(), rel=1e-4)

def test_options_reach_the_loss_and_the_defaults_are_the_papers():
    asked = dict(m=5, hidden=7, reduction='sum')
    cb,plain = DrlocCallback(.5, **asked),DrlocCallback()
    learner(cb).fit(1)
    assert dict(m=cb.loss_fn.m, hidden=cb.loss_fn.mlp[0].out_features, reduction=cb.loss_fn.reduction) == asked
    assert (plain.lambda_drloc, plain.m, plain.hidden, plain.reduction) == (.1, 64, 512, 'mean')

def test_schedule_of_lambda():
    lams = Watch('after_backward', lambda l: l.drloc.lam)
    learn = learner([drloc(lambda pct: 1-pct), lams])
    learn.fit(2)
    assert lams.seen == pytest.approx([1-i/8 for i in range(8)])

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixup_and_cutmix(mix):
    mixed = Watch('before_batch', lambda l: l.xb[0].clone() if l.training else None, order=99)
    parts = Watch('after_loss', lambda l: (l.loss_grad.item(), l.drloc.sums.tolist()) if l.training else None, order=DrlocCallback.order+1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = learner([drloc(0.5), mix(), mixed, parts])
        learn.fit(1)
    assert not torch.equal(mixed.seen[0], torch.stack([x for x,_ in data()[:8]]))
    total,(ce,task) = parts.seen[0]
    assert total == pytest.approx(ce + 0.5*task, rel=1e-5)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['ce']+0.5*row['drloc'] == pytest.approx(np.mean([o[0] for o in parts.seen if o]), rel=1e-5)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)

def test_label_smoothing():
    learn = learner(drloc(), loss_func=LabelSmoothingCrossEntropyFlat())
    learn.fit(1)
    assert np.isfinite(learn.recorder.losses[-1])

# --- precision, accumulation, clipping

class CpuMixed(MixedPrecision):
    "fastai's own mixed precision with the device exchanged"
    def __init__(self, scale=False): super().__init__('bf16'); self.scale = scale
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', torch.bfloat16),L()
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=self.scale)

def test_mixed_precision():
    grids,losses = Watch('after_pred', lambda l: l.drloc.tap.out.dtype if l.training else None),[]
    cb = drloc()
    learn = learner([cb, CpuMixed(), grids])
    learn.fit(1)
    assert grids.seen[0] == torch.bfloat16
    assert cb.sums.dtype == torch.float32 and cb.loss_fn.mlp[0].weight.dtype == torch.float32
    full = learner(drloc())
    full.fit(1)
    near(weights(learn.model), weights(full.model), atol=0.02, rtol=0.1)
    scaled = learner([drloc(), CpuMixed(scale=True)])
    scaled.fit(1)
    near(mlp(learn), mlp(scaled), atol=1e-5, rtol=1e-4)

def test_order():
    assert DrlocCallback.order < StopOnNonFinite.order < GradientAccumulation.order < MixedPrecision.order < mod._JointClip.order < GradientClip.order

def test_gradient_accumulation_is_the_big_batch(fixed_pairs):
    a,b = learner([drloc(), GradientAccumulation(16)], opt_func=SGD, lr=0.5),learner(drloc(), dls=loaders(bs=16), opt_func=SGD, lr=0.5)
    a.fit(2); b.fit(2)
    near(weights(a.model), weights(b.model))
    near(mlp(a), mlp(b))
    assert not same(mlp(a), weights(DrlocLoss(6, 8, 16, seed=0)))

def test_save_in_mid_accumulation_keeps_gradients(fixed_pairs, tmp_path):
    class MidSave(Callback):
        def after_backward(self): self.learn.save('x')
    a = learner([drloc(), GradientAccumulation(16), MidSave()], opt_func=SGD, lr=0.5, path=tmp_path)
    b = learner([drloc(), GradientAccumulation(16)], opt_func=SGD, lr=0.5)
    a.fit(1); b.fit(1)
    assert same(mlp(a), mlp(b))

@pytest.mark.parametrize('norm_type', [2., float('inf')])
def test_clipped_by_the_joint_norm_once(norm_type):
    params = lambda l: [*l.model.parameters(), *l.drloc.mlp_params]
    grads = lambda l: [p.grad.clone() for p in params(l)]
    before,after = Watch('after_backward', grads),Watch('before_step', grads, order=99)
    learn = learner([drloc(5.), GradientClip(0.01, norm_type), before, after])
    learn.fit(1)
    for b,a in zip(before.seen, after.seen):
        total = torch.linalg.vector_norm(torch.cat([g.flatten() for g in b]), norm_type)
        assert total > 0.02
        for g,h in zip(b, a): torch.testing.assert_close(h, g*0.01/(total+1e-6), rtol=1e-5, atol=1e-9)

def test_norms_are_measured_once(monkeypatch):
    "fastai's own clip rests where model and MLP were clipped together, works where there is no MLP, and is as it was after a fit that fails"
    calls,real = [],nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, 'clip_grad_norm_', lambda ps, *a: (calls.append(len(list(ps := list(ps)))), real(ps, *a))[1])
    clip = GradientClip(0.01)
    learn = learner([drloc(), clip])
    learn.fit(1)
    n = len(learn.dls.train)
    assert calls==[len([*learn.model.parameters(), *learn.drloc.mlp_params])]*n and clip.run
    class Fails(Callback):
        order = 99
        def before_step(self): assert not clip.run; raise RuntimeError('on purpose')
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1, cbs=Fails())
    assert clip.run
    calls.clear(); learn.remove_cb(learn.drloc); learn.fit(1)
    assert calls==[len(list(learn.model.parameters()))]*n

def test_a_clip_that_is_switched_off_stays_off(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.utils, 'clip_grad_norm_', lambda *a: calls.append(a))
    clip = GradientClip(0.01)
    class Off(Callback):
        def before_fit(self): clip.run = False
        def after_batch(self): assert not clip.run
    learner([drloc(), clip, Off()]).fit(1)
    assert not calls

# --- torch.compile

def compiled_and_run(m, backend):
    m = torch.compile(m, backend=backend)
    m(torch.randn(8,3,8,8)).sum().backward()
    m.zero_grad()
    with torch.no_grad(): m.eval()(torch.randn(8,3,8,8))
    return m
def compiled_in_place(m, backend):
    m.compile(backend=backend)
    m(torch.randn(8,3,8,8))
    return m
def compiled_features(m, backend):
    m.forward_features = torch.compile(m.forward_features, backend=backend)
    m(torch.randn(8,3,8,8))
    return m

@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('how', [compiled_and_run, compiled_in_place, compiled_features])
def test_compiled(how, backend):
    ref,learn = learner(drloc()),learner(drloc(), model=how(tiny(), backend))
    ref.fit(2)
    learn.fit(1)
    learn.fit(1)
    near(weights(ref.model), {k.replace('_orig_mod.', ''): v for k,v in weights(learn.model).items()})
    near(mlp(ref), mlp(learn))
    if how is not compiled_features: clean(learn)
    else: assert 'tapped' not in repr(learn.model.forward_features)
    torch.compiler.reset()

def test_compiled_loss():
    "The loss compiled, too: the same run, and a copy of the callback compiles for itself"
    cb = drloc(compile=dict(backend='aot_eager', fullgraph=True))
    ref,learn = learner(drloc()),learner(cb)
    for l in (ref,learn): l.fit(2)
    near(weights(ref.model), weights(learn.model))
    near(mlp(ref), mlp(learn))
    assert cb.compiled is not None and copy.deepcopy(cb).compiled is None
    new = copy.deepcopy(cb)
    assert len(cb.draw.places)==1 and not new.draw.places               # drawn to one place; a copy has its own
    torch.compiler.reset()

def test_compiled_loss_of_a_network_with_a_class_token():
    "It begins at the features: from the class token's network to the loss in one graph; another size and another fit go on"
    seen = []
    def backend(g, example):
        seen.append([tuple(o.shape) for o in example if o.ndim==3])
        return g
    from vt_drloc.vit import ViT
    make = lambda: ViT(img_size=8, patch=2, dim=16, depth=1, heads=2, num_classes=3)
    cb = drloc(compile=dict(backend=backend, fullgraph=True, dynamic=False))
    ref,learn = learner(drloc(), model=make()),learner(cb, model=make())
    learn.model.load_state_dict(ref.model.state_dict())
    for l in (ref,learn): l.fit(1); l.fit(1)
    near(weights(ref.model), weights(learn.model))
    near(mlp(ref), mlp(learn))
    torch.compiler.reset()
    assert len(seen)==1 and any(s[1]==17 for s in seen[0])

def test_the_loss_gets_the_tokens_that_a_grid_was_cut_from():
    "Only where the grid is the last of them: not from a grid of features, and not from an adapter that cuts in its own way"
    from vt_drloc.callback import features_loss
    from vt_drloc.hybrid import Adapter
    from vt_drloc.tokens import to_grid
    class Behind(Adapter):
        def grid(self, f, hw): return to_grid(f[:,:-1], 4, 4)
    class Turned(Adapter):
        def grid(self, f, hw): return to_grid(f[:,1:], 4, 4).flip(-1)
    seen = []
    def loss(grid, pairs, tokens): seen.append((grid,tokens))
    tap = nn.Identity(),'forward'
    tokens = torch.randn(2,17,8)
    for adapter,f in ((Adapter(None, tap, 8, 1),tokens), (Adapter(None, tap, 8, 0),tokens[:,1:]), (Adapter(None, tap, 8),torch.randn(2,8,4,4)), (Adapter(None, tap, 8),torch.randn(2,4,4,8)), (Behind(None, tap, 8),tokens), (Turned(None, tap, 8, 1),tokens)):
        features_loss(loss, adapter, f, (32,32), None)
        assert torch.equal(seen[-1][0], adapter.grid(f, (32,32)))
        assert seen[-1][1] is (f if type(adapter) is Adapter and f.ndim==3 else None)

def test_a_step_that_is_not_compiled_hands_them_in_too(monkeypatch):
    "Plain tensors, whatever the Learner's images are; the grid is cut from them"
    from vt_drloc.vit import ViT
    stock,seen = DrlocLoss.forward,[]
    def forward(self, grid, generator=None, pairs=None, tokens=None):
        seen.append((grid,tokens))
        return stock(self, grid, generator, pairs, tokens)
    monkeypatch.setattr(DrlocLoss, 'forward', forward)
    learner(drloc(), model=ViT(img_size=8, patch=2, dim=16, depth=1, heads=2, num_classes=3)).fit(1)
    assert seen and all(type(t) is torch.Tensor and t.shape==(len(g),17,16) and torch.equal(t[:,1:].mT.unflatten(2, (4,4)), g) for g,t in seen)
    seen.clear()
    learner(drloc()).fit(1)
    assert seen and all(t is None for _,t in seen)

def test_a_step_that_dies_leaves_no_autocast():
    "Left open, autocast keeps its copies of the weights, and nothing that is trained afterwards learns"
    class Half(MixedPrecision):
        def before_fit(self): self.autocast,self.learn.scaler = torch.autocast('cpu', torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False)
        def after_fit(self): self.autocast = None
    class Dies(Callback):
        order = MixedPrecision.order-1
        def after_loss(self): raise KeyboardInterrupt
    learn = learner([drloc(), Half(), Dies()])
    with torch.autocast('cpu', torch.bfloat16):
        with pytest.raises(KeyboardInterrupt): learn.fit(1)
        assert torch.is_autocast_enabled('cpu') and torch.autocast_increment_nesting()==2 and torch.autocast_decrement_nesting()==1
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu') and torch.autocast_increment_nesting()==1 and not torch.autocast_decrement_nesting()

# --- several processes

ddp_cases = dict(plain=dict(), unused=dict(unused=True), ddp_compile=dict(inner=True), compile_ddp=dict(outer=True), late=dict(late=True),
                 accumulate=dict(acc=8))

class WrapLate(Callback):
    "As fastai's DistributedTrainer does: wrap in `before_fit`, at order 11"
    order = 11
    def before_fit(self): self.learn.model = nn.parallel.DistributedDataParallel(self.model)
    def after_fit(self): self.learn.model = self.learn.model.module

def ddp_run(world, rank=0, unused=False, inner=False, outer=False, late=False, acc=0):
    "A few steps on this rank's half of each global batch of 8"
    ds,bs = data(),8//world
    ds = [ds[i] for j in range(0, 32, 8) for i in range(j+rank*bs, j+rank*bs+bs)]
    model,cbs = tiny(unused=unused),[drloc()]
    if world>1:
        if inner: model = torch.compile(model, backend='eager')
        if not late: model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        if outer: model = torch.compile(model, backend='eager')
        if late: cbs.append(WrapLate())
    if acc: cbs.append(GradientAccumulation(16//world))
    learn = learner(cbs, model=model, dls=loaders(ds, bs=bs), opt_func=SGD, lr=0.5)
    learn.fit(2)
    clean(learn)
    torch.compiler.reset()
    return {k.replace('_orig_mod.', '').replace('module.', ''): v for k,v in weights(learn.model).items()},mlp(learn)

def ddp_worker(rank, init, out):
    "Run all cases as one of two processes; each must draw pairs of its own"
    mod.DrlocLoss.forward.__globals__['sample_pairs'] = same_pairs
    torch.distributed.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    res = {k: ddp_run(2, rank, **kw) for k,kw in ddp_cases.items()}
    cb = learner(drloc())
    cb.fit(1)
    res['generator'] = cb.drloc.generator.get_state()
    torch.save(res, out)
    torch.distributed.destroy_process_group()

def both_ranks(worker, path):
    "Run a worker as both processes of a group, forked from one that has the imports behind it"
    import torch._dynamo
    pid = os.fork()
    rank = int(pid==0)
    os.environ['RANK'] = str(rank)
    try: worker(rank, f'file://{path}/init', f'{path}/{rank}.pt')
    except BaseException: traceback.print_exc(); os._exit(1)
    os._exit(0 if rank else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

def run_both(module, path):
    "What the `ddp_worker` of a test file saves, of both ranks"
    code = f"import test_callback, {module} as t; test_callback.both_ranks(t.ddp_worker, '{path}')"
    env = {**os.environ, 'WORLD_SIZE':'2', 'OMP_NUM_THREADS':'1'}
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=300)
    if res.returncode: pytest.fail(res.stderr[-3000:], pytrace=False)
    return [torch.load(path/f'{r}.pt', weights_only=False) for r in range(2)]

@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    "What both processes were left with"
    return run_both('test_callback', tmp_path_factory.mktemp('ddp'))

@pytest.mark.parametrize('case', ddp_cases)
def test_ddp_equals_one_process(two_ranks, case, fixed_pairs):
    (m0,l0),(m1,l1) = two_ranks[0][case],two_ranks[1][case]
    assert same(m0, m1) and same(l0, l1)
    m,l = ddp_run(1, **{k:v for k,v in ddp_cases[case].items() if k in ('unused','acc')})
    near(m0, m)
    near(l0, l)

def test_ddp_ranks_draw_different_pairs(two_ranks):
    assert not torch.equal(two_ranks[0]['generator'], two_ranks[1]['generator'])

# --- lr_find, saving, resuming

def everything(learn):
    cb = learn.drloc
    opt = [{k:v for k,v in s.items()} for s in learn.opt.state_dict()['state']] if learn.opt else None
    return copy.deepcopy((weights(learn.model), opt, cb.state_dict()))

def test_lr_find_leaves_no_effect(tmp_path):
    learn,ref = learner(drloc(), path=tmp_path),learner(drloc())
    m = weights(learn.model)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert same(m, weights(learn.model)) and learn.drloc.loss_fn is None and learn.drloc.generator is None
    clean(learn)
    learn.fit(1); ref.fit(1)
    was = everything(learn)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    now = everything(learn)
    assert same(was[0], now[0]) and same(was[2]['mlp'], now[2]['mlp']) and torch.equal(was[2]['generator'], now[2]['generator'])
    for a,b in zip([*was[1], *was[2]['opt']], [*now[1], *now[2]['opt']]): assert same({k: tensor(v) for k,v in a.items()}, {k: tensor(v) for k,v in b.items()})
    learn.fit(1); ref.fit(1)
    assert same(weights(ref.model), weights(learn.model)) and same(mlp(ref), mlp(learn))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[LRFinder(num_it=6), Stop('after_step', KeyboardInterrupt())])
    assert same(mlp(ref), mlp(learn))

def test_interrupted_lr_find_given_with_the_callback(tmp_path):
    learn = learner(path=tmp_path)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[drloc(), LRFinder(num_it=6), Stop('after_step', KeyboardInterrupt())])
    clean(learn)

@pytest.mark.parametrize('with_opt', [True, False])
def test_save_model_callback_best(with_opt, tmp_path, capsys):
    snaps = Watch('after_epoch', lambda l: (mlp(l), weights(l.model)))
    learn = learner([drloc(), snaps], path=tmp_path, lr=0.05)
    learn.fit(4, cbs=SaveModelCallback(with_opt=with_opt, comp=np.greater))
    best = int(np.argmax([v[1] for v in learn.recorder.values]))
    assert same(mlp(learn), snaps.seen[best][0]) and same(weights(learn.model), snaps.seen[best][1])
    clean(learn)
    learn.fit(1)
    assert ('opt' in torch.load(tmp_path/'models'/'model.drloc.pth', weights_only=True)) == with_opt

def test_every_epoch_files_load_in_a_stock_learner(tmp_path):
    learn = learner(drloc(), path=tmp_path)
    learn.fit(2, cbs=SaveModelCallback(every_epoch=True, with_opt=True))
    assert (tmp_path/'models'/'model_1.drloc.pth').exists()
    stock = learner(path=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        stock.load('model_1')
    assert same(weights(stock.model), weights(learn.model))
    assert len(stock.opt.all_params()) == len(list(stock.model.parameters()))
    stock.fit(1)

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_resumed_equals_straight(opt_func, tmp_path):
    new = lambda: learner(drloc(), path=tmp_path, opt_func=opt_func)
    straight,first,second = new(),new(),new()
    straight.fit(4)
    first.fit(2)
    first.save('mid')
    second.load('mid').fit(2)
    assert same(weights(straight.model), weights(second.model)) and same(mlp(straight), mlp(second))
    first.fit(2) # so does a second fit of the same Learner
    assert same(weights(straight.model), weights(first.model)) and same(mlp(straight), mlp(first))

def test_a_generator_named_without_its_index_keeps_its_state(tmp_path):
    "A file says 'cuda', a grid 'cuda:0': the same device, and the pairs go on where they were"
    learn = learner(drloc())
    learn.fit(1)
    stock = learn.drloc.generator
    class Elsewhere:
        device = torch.device('cpu', 0)
        def get_state(self): return stock.get_state()
    assert Elsewhere.device != torch.device('cpu')
    learn.drloc.generator = Elsewhere()
    learn.drloc._ready(torch.zeros(1, 6, 4, 4))
    new = learn.drloc.generator
    assert new is not stock and new.device == torch.device('cpu') and torch.equal(new.get_state(), stock.get_state())
    assert not torch.equal(new.get_state(), torch.Generator().manual_seed(learn.drloc.seed+1).get_state())

@pytest.mark.parametrize('saved', [True, False])
def test_load_without_optimizer_starts_the_moments_anew(saved, tmp_path):
    a = learner(drloc(), path=tmp_path)
    a.fit(1)
    a.save('x', with_opt=saved)
    b = learner(drloc(), path=tmp_path).load('x', with_opt=False)
    assert same(mlp(a), mlp(b)) and b.drloc.opt_state is None

@pytest.mark.parametrize('clear', ['reset_opt', 'freeze'])
def test_moments_start_anew_with_the_optimizers(clear):
    steps = Watch('after_step', lambda l: (l.opt.state[l.drloc.mlp_params[0]]['step'], l.opt.state[l.model.head.weight]['step']))
    learn = learner([drloc(), steps], splitter=two_groups)
    learn.fit(1)
    learn.fit(1)
    assert steps.seen[-1] == (8,8)
    if clear == 'freeze': learn.freeze()
    learn.fit(1, reset_opt=clear=='reset_opt')
    assert steps.seen[-1] == (4,4)

def test_sidecar_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'owned'),)
    learn = learner(drloc(), path=tmp_path)
    learn.fit(1)
    learn.save('x')
    torch.save(dict(mlp=Evil()), tmp_path/'models'/'x.drloc.pth')
    with pytest.raises(Exception, match='eights.only'): learn.load('x')
    assert not (tmp_path/'owned').exists()

def test_sidecar_of_another_width_is_refused(tmp_path):
    a = learner(drloc(), path=tmp_path)
    a.fit(1)
    a.save('x')
    with pytest.raises(ValueError, match='hidden=16'): learner(drloc(hidden=24), path=tmp_path).load('x')

def test_a_save_without_the_callback_takes_the_old_sidecar_away(tmp_path, monkeypatch):
    a,stock,side = learner(drloc(), path=tmp_path),learner(path=tmp_path),tmp_path/'models'/'x.drloc.pth'
    a.fit(1)
    a.save('x'); a.save('y')
    was = side.read_bytes()
    def full(*args, **kwargs): raise OSError('no space left')
    with monkeypatch.context() as m: # it stays while the old model does: the save fails, or another process writes
        m.setattr('torch.save', full)
        with pytest.raises(OSError): stock.save('x')
    with monkeypatch.context() as m:
        m.setenv('RANK', '1')
        stock.save('x')
    assert side.read_bytes() == was
    stock.save('x')
    assert not side.exists() and side.with_name('y.drloc.pth').exists()
    b = learner(drloc(), path=tmp_path).load('x')
    assert same(weights(b.model), weights(stock.model)) and b.drloc.loss_fn is None
    stock.save('x') # nothing to take away
    with open(tmp_path/'f.pth', 'wb') as f: stock.save(f)

def test_save_to_an_open_file(tmp_path):
    learn = learner(drloc(), path=tmp_path)
    learn.fit(1)
    with open(tmp_path/'f.pth', 'wb') as f: learn.save(f)
    assert (tmp_path/'f.pth').stat().st_size

# --- no trace

def test_state_dict_keys_and_logits():
    model,x = tiny(),torch.randn(2,3,8,8)
    keys,logits = list(model.state_dict()),model.eval()(x)
    learn = learner(drloc(), model=model)
    seen = Watch('after_pred', lambda l: (list(l.model.state_dict()), l.pred.detach().clone()))
    plain = Watch('after_pred', lambda l: l.pred.detach().clone())
    learn.fit(1, lr=0., cbs=seen)
    other = learner()
    other.fit(1, lr=0., cbs=plain)
    assert all(k==keys for k,_ in seen.seen) and all(torch.equal(a, b) for (_,a),b in zip(seen.seen, plain.seen))
    assert list(model.state_dict()) == keys and torch.equal(model.eval()(x), logits)

@pytest.mark.parametrize('event,exc', [('after_backward', KeyboardInterrupt()), ('before_train', KeyboardInterrupt()), ('before_fit', ZeroDivisionError('x')),
    ('after_epoch', ZeroDivisionError('x')), ('after_step', CancelFitException()), ('after_loss', CancelTrainException()), ('before_epoch', CancelFitException()),
    ('after_pred', CancelBatchException())])
@pytest.mark.parametrize('order', [-1, 99])
def test_no_trace_after(event, exc, order):
    learn = learner(drloc(), metrics=accuracy)
    stop = Stop(event, exc, order)
    if type(exc).__name__.startswith('Cancel'): learn.fit(1, cbs=stop)
    else:
        with pytest.raises(type(exc)): learn.fit(1, cbs=stop)
    clean(learn, ['accuracy'])
    learn.remove_cb(stop)
    learn.fit(1)
    clean(learn, ['accuracy'])
    learn.remove_cb(learn.drloc)
    learn.fit(1)

def test_evaluation_does_nothing(tmp_path, monkeypatch):
    dls = images(tmp_path, side=8)
    a = learner(drloc(), model=tiny(n_out=2), dls=dls, metrics=accuracy)
    a.fit(1)
    b = learner(model=a.model, dls=dls, metrics=accuracy)
    g = a.drloc.generator.get_state()
    def never(*_): raise AssertionError('tapped')
    monkeypatch.setattr(mod.GridTap, '__enter__', never)
    assert list(a.validate()) == list(b.validate()) and len(a.validate()) == 2
    for x,y in zip(a.get_preds(), b.get_preds()): assert torch.equal(x, y)
    item = get_image_files(tmp_path)[0]
    assert torch.equal(a.predict(item)[2], b.predict(item)[2])
    assert torch.equal(g, a.drloc.generator.get_state())

def test_validation_holds_no_grid_and_validate_inside_a_fit_is_harmless():
    outs = Watch('after_pred', lambda l: (l.training, l.drloc.tap.out is None))
    class Inner(Callback):
        def after_train(self): self.learn.get_preds()
    learn = learner([drloc(), outs])
    learn.fit(1)
    assert set(outs.seen) == {(True,False), (False,True)}
    a,b = learner([drloc(), Inner()]),learner(drloc())
    a.fit(1); b.fit(1)
    assert same(mlp(a), mlp(b))

class Flip(Callback):
    run_valid = False
    def before_batch(self):
        if torch.rand(1) < 0.5: self.learn.xb = (self.xb[0].flip(-1),)

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_lambda_zero_bit_for_bit(opt_func):
    def run(*cbs):
        torch.manual_seed(3); random.seed(3); np.random.seed(3)
        learn = learner([*cbs, Flip(), GradientClip(0.1), MixUp()], model=tiny(drop=0.3), dls=loaders(shuffle=True), opt_func=opt_func, wd=0.1)
        learn.fit_one_cycle(2, 0.01)
        return weights(learn.model),torch.get_rng_state(),learn.recorder.losses
    (a,ra,la),(b,rb,lb) = run(drloc(0.)),run()
    assert same(a, b) and torch.equal(ra, rb) and la == lb
    assert not same(run(drloc(0.1))[0], b)

def test_global_generator_is_left_alone():
    a,b = learner([drloc(), Watch('after_batch', lambda l: torch.get_rng_state())]),learner(Watch('after_batch', lambda l: torch.get_rng_state()))
    for l in (a,b): torch.manual_seed(0); l.fit(1)
    assert all(torch.equal(x, y) for x,y in zip(a.watch.seen, b.watch.seen))

# --- export

def test_export_loads_without_the_package(tmp_path):
    import timm
    dls = images(tmp_path, side=32)
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    learn = learner(drloc(hidden=512), model=model, dls=dls, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=ShortEpochCallback(pct=0.1))
    learn.export('a.pkl')
    item = get_image_files(tmp_path)[0]
    want = learn.predict(item)[2]
    raw = (tmp_path/'a.pkl').read_bytes()
    assert b'vt_drloc' not in raw and b'LocalizationMLP' not in raw and b'DrlocCallback' not in raw
    stock = learner(model=model, dls=dls, metrics=accuracy)
    stock.export('b.pkl')
    assert abs((tmp_path/'b.pkl').stat().st_size - len(raw)) < 20_000 < sum(p.numel() for p in learn.drloc.mlp_params)*4
    code = f"""
import sys; sys.modules['vt_drloc'] = None
from fastai.vision.all import *
learn = load_learner('{tmp_path}/a.pkl')
with learn.no_bar(): print(learn.predict('{item}')[2].tolist())
"""
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    torch.testing.assert_close(torch.tensor(eval(res.stdout.strip().splitlines()[-1])), torch.Tensor(want), rtol=0, atol=1e-6)
    learn.fit(1, cbs=ShortEpochCallback(pct=0.1)) # and the Learner goes on

# --- grids, taps, bad input

class Wrapped(nn.Module):
    "No contract: a body that makes the grid, pooled by hand"
    def __init__(self): super().__init__(); self.inner,self.head = nn.ModuleDict(dict(body=nn.Conv2d(3, 5, 2, 2))),nn.Linear(5, 3)
    def forward(self, x): return self.head(self.inner['body'](x).mean((2,3)))

def test_tap_by_dotted_name():
    with pytest.raises(ValueError, match='tap='): learner(drloc(), model=Wrapped()).fit(1)
    learn = learner(drloc(tap='inner.body'), model=Wrapped())
    learn.fit(1)
    assert learn.drloc.loss_fn.mlp.dim == 5

@pytest.mark.parametrize('hw,grid', [((8,16),(4,8)), ((16,4),(8,2))])
def test_grids_that_are_not_square(hw, grid):
    shapes = Watch('after_pred', lambda l: l.drloc.tap.adapter.grid(l.drloc.tap.out, hw).shape if l.training else None)
    learn = learner([drloc(), shapes], dls=loaders(hw=hw))
    learn.fit(1)
    assert shapes.seen[0] == (8,6,*grid)

def test_vit_with_class_token():
    import timm
    vit = timm.create_model('vit_tiny_patch16_224', img_size=(8,16), patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    assert vit.num_prefix_tokens == 1
    shapes = Watch('after_pred', lambda l: l.drloc.tap.adapter.grid(l.drloc.tap.out, (8,16)).shape if l.training else None)
    learn = learner([drloc(), shapes], model=vit, dls=loaders(hw=(8,16)))
    learn.fit(1)
    assert shapes.seen[0] == (8,24,2,4) and not same(mlp(learn), weights(DrlocLoss(24, 8, 16, seed=0)))

def test_a_step_without_grid_raises():
    class Shy(Tiny):
        calls = 0
        def forward(self, x):
            self.calls += 1
            return super().forward(x) if self.calls<3 else self.head(self.conv(x).mean((2,3)))
    learn = learner(drloc(), model=Shy())
    with pytest.raises(GridNotCapturedError, match='tap='): learn.fit(1)
    clean(learn)

def test_bad_input():
    for kw,msg in ((dict(m=0), 'm=0'), (dict(lam=-1), 'lambda_drloc=-1'), (dict(lam=float('nan')), 'nan'), (dict(reduction='max'), "'max'"),
                   (dict(m=2.5), r'm=2\.5'), (dict(m='8'), "m='8'"), (dict(hidden=0), 'hidden=0'), (dict(hidden=1.5), r'hidden=1\.5'),
                   (dict(lam='0.1'), "lambda_drloc='0.1': the weight must be a number >= 0"), (dict(lam=None), 'lambda_drloc=None: the weight must be a number')):
        with pytest.raises(ValueError, match=msg): drloc(**kw)
    with pytest.raises(ValueError, match='lambda_drloc=-'): learner(drloc(lambda p: 0.5-p)).fit(1)
    with pytest.raises(ValueError, match="lambda_drloc='much'"): learner(drloc(lambda p: 'much' if p else 0.5)).fit(1)   # a schedule that goes wrong late
    with pytest.raises(ValueError, match='1 x 1 grid'): learner(drloc(), dls=loaders(hw=(2,2))).fit(1)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match='no spatial grid'): learner(drloc(), model=flat).fit(1)
    with pytest.raises(ValueError, match='remove_cb'): learner([drloc(), drloc()]).fit(1)

# --- the loss is not a number

class Spoil(Callback):
    def __init__(self, epoch, it): self.at = (epoch,it)
    def after_loss(self):
        if self.training and (self.epoch,self.iter)==self.at: self.learn.loss_grad = self.loss_grad*float('nan')

@pytest.mark.parametrize('every', [2, 50])
def test_nan_names_epoch_step_and_checkpoint(every, tmp_path):
    learn = learner([drloc(), StopOnNonFinite(every)], path=tmp_path)
    with pytest.raises(NonFiniteLossError, match='epoch 1, step 2 on.*model_0.pth'):
        learn.fit(3, cbs=[Spoil(1,2), SaveModelCallback(every_epoch=True)])
    assert not (tmp_path/'models'/'model_1.pth').exists()
    assert all(v.isfinite().all() for v in torch.load(tmp_path/'models'/'model_0.pth').values())
    clean(learn)

def test_nan_after_a_short_or_skipped_epoch_and_in_the_last_step():
    learn = learner(StopOnNonFinite())
    with pytest.raises(NonFiniteLossError, match='epoch 2, step 1 on; no checkpoint'):
        learn.fit(4, start_epoch=1, cbs=[ShortEpochCallback(0.4, short_valid=False), Spoil(2,1)])
    class BadStep(Callback):
        def after_step(self):
            if self.iter==3: self.model.head.bias.data.fill_(float('inf'))
    with pytest.raises(NonFiniteLossError, match='epoch 0, validation'): learner(StopOnNonFinite()).fit(1, cbs=BadStep())

def test_what_to_try_against_a_nan():
    "cuDNN's attention is named where it can have been at work: on a GPU, unless it is forbidden there"
    gpu,cpu = torch.device('cuda'),torch.device('cpu')
    assert 'enable_cudnn_sdp(False)' in mod._advice(gpu) and mod._advice(cpu).endswith('float32')
    try: torch.backends.cuda.enable_cudnn_sdp(False); assert mod._advice(gpu)==mod._advice(cpu)
    finally: torch.backends.cuda.enable_cudnn_sdp(True)

def test_nan_is_no_matter_outside_a_fit():
    learn = learner(StopOnNonFinite())
    learn.model.head.bias.data.fill_(float('nan'))
    learn.validate()
    learn.get_preds()
    with pytest.raises(NonFiniteLossError, match='epoch 0, step 0'): learn.fit(1)

# --- Learners of all kinds

def test_one_callback_two_learners():
    cb = drloc()
    a = learner(cb)
    a.fit(1)
    b,c = learner(cb, model=tiny(D=9)),learner(drloc(), model=tiny(D=9))
    b.fit(1); c.fit(1)
    assert same(mlp(b), mlp(c)) and torch.equal(b.drloc.generator.get_state(), c.drloc.generator.get_state())

def test_deepcopied_learner_keeps_the_task():
    a = learner(drloc())
    a.fit(1)
    b = copy.deepcopy(a)
    assert isinstance(b.drloc, DrlocCallback) and b.drloc is not a.drloc and b.drloc.learn is b
    a.fit(1)
    b.fit(1)
    assert same(weights(a.model), weights(b.model)) and same(mlp(a), mlp(b))

def test_copy_of_the_model_in_a_fit_is_on_its_own():
    "As a moving average of the weights makes one"
    class Copy(Callback):
        run_valid = False
        def before_train(self): self.twin = copy.deepcopy(self.model)
        def after_pred(self):
            grid = self.drloc.tap.out
            self.twin(self.x)
            assert self.drloc.tap.out is grid
    learn = learner([drloc(), Copy()], lr=1.)
    learn.fit(1)
    x = data()[0][0][None]
    assert torch.equal(learn.copy.twin(x), tiny()(x)) and not torch.equal(learn.model(x), tiny()(x))

def test_backbone_kept_in_eval_mode():
    class Eval(Callback):
        def before_batch(self): self.model.eval()
    learner([drloc(), Eval()]).fit(1)

def test_recorder_of_train_metrics_and_none():
    learn = learner(drloc(), metrics=accuracy)
    learn.recorder.train_metrics = True
    learn.fit(1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_ce'] > 0 and row['train_lambda'] == 0.5 and row['valid_ce'] is None
    bare = learner(drloc())
    bare.remove_cb(Recorder)
    bare.fit(1)
    clean(bare)

def test_switched_off():
    a,b = learner(drloc()),learner()
    a.drloc.run = False
    a.fit(1); b.fit(1)
    assert same(weights(a.model), weights(b.model))

# --- on a GPU

def gpu_learner(*cbs, **kw): return learner([drloc(), *cbs], **{**dict(model=tiny().cuda(), dls=loaders(device='cuda')), **kw})

@pytest.mark.cuda
def test_nothing_waits_on_the_device():
    class Strict(Callback):
        order,run_valid = DrlocCallback.order-0.5,False
        def after_loss(self):
            if self.train_iter: torch.cuda.set_sync_debug_mode('error')
    class Lax(Callback):
        order,run_valid = StopOnNonFinite.order+0.1,False
        def after_loss(self): torch.cuda.set_sync_debug_mode('default')
    try: gpu_learner(Strict(), Lax(), StopOnNonFinite()).fit(2)
    finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_mixed_precision_on_a_gpu(mode):
    learn = gpu_learner(MixedPrecision(mode), GradientClip(1.), StopOnNonFinite())
    learn.fit(2)
    assert next(iter(learn.drloc.mlp_params)).dtype == torch.float32 and not same(mlp(learn), weights(DrlocLoss(6, 8, 16, seed=0).cuda()))

@pytest.mark.cuda
@pytest.mark.parametrize('opt_func', [partial(OptimWrapper, opt=torch.optim.AdamW, fused=True), partial(OptimWrapper, opt=torch.optim.AdamW), Adam])
def test_resume_and_change_of_device(opt_func, tmp_path):
    new = lambda: gpu_learner(opt_func=opt_func, path=tmp_path)
    straight,first,second = new(),new(),new()
    straight.fit(2)
    first.fit(1)
    first.save('mid')
    second.load('mid').fit(1)
    near(mlp(straight), mlp(second))
    there = learner(drloc(), path=tmp_path).load('mid', device='cpu', with_opt=False)
    there.fit(1)
    there.save('cpu')
    new().load('cpu').fit(1)

@pytest.mark.cuda
def test_inductor():
    ref,learn = gpu_learner(),gpu_learner(model=torch.compile(tiny().cuda()))
    learn.model(torch.randn(8,3,8,8, device='cuda')).sum().backward()
    learn.model.zero_grad()
    ref.fit(2); learn.fit(2)
    near(mlp(ref), mlp(learn), rtol=1e-3, atol=1e-4)

# --- what as_backbone cannot tell by itself

def test_tap_as_a_dict_settles_the_layout():
    "A (B, 8, 8, 8) map could be either way round: the callback takes as_backbone's own arguments"
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.head = nn.Conv2d(3, 8, 4, 4),nn.Linear(8, 2)
        def forward(self, x): return self.head(self.body(x).mean((2,3)))
    from vt_drloc.callback import GridTap
    m,x = Square(),torch.randn(2,3,32,32)
    with GridTap(m, 'body') as tap, pytest.raises(ValueError, match=r"in DrlocCallback: tap=dict\(layout='NCHW'\)"):
        m(x); tap.pop((32,32))
    with pytest.raises(ValueError, match="layout='nchw' is unknown"): GridTap(m, dict(tap='body', layout='nchw'))
    for layout in 'NCHW','NHWC':
        with GridTap(m, dict(tap='body', layout=layout)) as tap:
            m(x); g = tap.pop((32,32))
        want = m.body(x)
        assert torch.equal(g, want if layout=='NCHW' else want.permute(0,3,1,2))
