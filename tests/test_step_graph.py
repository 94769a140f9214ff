"A step as one graph: the same training, bit for bit, wherever it may be recorded; a word where it may not"
import random, warnings
import numpy as np, pytest, torch
from torch import nn
from fastai.basics import Callback, Learner
from fastai.callback.fp16 import MixedPrecision

from vt_drloc.callback import DrlocCallback, NonFiniteLossError
from vt_drloc.models import create_model
from vt_drloc.train import Fp16, FusedAdamW, Recipe, build
from vt_drloc.step_graph import CudaGraph, Replayed, StepGraph, Tape, why_not

small = dict(data='digits', model='demo_cvt', epochs=2, bs=64, lr=8e-3, warmup=1, tfms='none', clip=1., share=.5)   # 11 steps an epoch

def made(device='cpu', extra=(), **kw):
    torch.set_num_threads(1)
    learn = build(Recipe(**{**small, **kw}), device=device, bar=False)
    learn.add_cbs(extra)
    return learn

def fitted(learn, epochs=2, **kw):
    with learn.no_logging(): learn.fit(epochs, small['lr'], **kw)
    return learn

def most(learn): return max(s.seen for s in learn.step_graph.steps.values())

def the_same(a, b):
    for (n,p),q in zip(a.model.named_parameters(), b.model.parameters(), strict=True): assert torch.equal(p, q), n
    assert a.recorder.values == b.recorder.values and a.gradient_norms.found == b.gradient_norms.found
    for p,q in zip(a.drloc.mlp_params if hasattr(a, 'drloc') else [], b.drloc.mlp_params if hasattr(b, 'drloc') else [], strict=True): assert torch.equal(p, q)

@pytest.mark.parametrize('kw', [dict(drloc='paper'), dict(drloc='none'), dict(drloc='paper', mix=False, schedule='ramp_decay'), dict(drloc='released', variant='all'),
                                dict(drloc='paper', clip=0.), dict(drloc='paper', lambda_drloc=0.)], ids=str)
def test_training_is_the_same(kw):
    one = fitted(made(extra=[StepGraph(kind=Tape)], **kw))
    assert one.step_graph.why == '' and most(one) > 10
    the_same(fitted(made(**kw)), one)

def test_fp16_is_the_same():
    "Scaler, overflow mark and both precisions within the step"
    a,b = (fitted(made(drloc='paper', share=.2, extra=[Fp16('cpu'), *cbs]), 1) for cbs in ([], [StepGraph(kind=Tape, warm=1)]))
    assert b.step_graph.why == ''
    the_same(a, b)

def test_an_overflow_is_left_out_in_a_replay():
    "A scale beyond fp16: the first steps are skipped, recorded or not, and the scale falls the same"
    scales = []
    class Note(Callback):
        def before_fit(self): scales.append([])
        def after_batch(self):
            if self.training: scales[-1].append(self.learn.scaler.get_scale())
    a,b = (fitted(made(mix=False, share=.3, extra=[Fp16('cpu', init_scale=2.**24), Note(), *cbs]), 1) for cbs in ([], [StepGraph(kind=Tape, warm=1)]))
    assert scales[0] == scales[1] and len(set(scales[0])) > 3
    the_same(a, b)

def test_weight_that_rises_from_zero():
    "With weight 0 the side task is computed for the log alone: another kind of step"
    lam = lambda pct: 0. if pct<.4 else .5
    a,b = (fitted(made(drloc='none', extra=[DrlocCallback(lam, seed=0), *cbs])) for cbs in ([], [StepGraph(kind=Tape)]))
    the_same(a, b)
    assert sorted(k[1] for k in b.step_graph.steps if k[0]) == [False,True]

def test_steps_outputs_are_copies():
    "A graph writes to its own memory; what the Learner holds must outlive the next step"
    kept = []
    class Keep(Callback):
        def after_batch(self):
            if self.training: kept.append((self.learn.pred, self.learn.pred.clone()))
    fitted(made(extra=[StepGraph(kind=Tape)]), 1, cbs=Keep())
    assert len(kept) == 11 and all(torch.equal(a, b) for a,b in kept)

def test_two_fits_and_the_end():
    plain = fitted(fitted(made(drloc='paper')))
    learn = fitted(made(drloc='paper', extra=[StepGraph(kind=Tape)]))
    assert '_do_one_batch' not in vars(learn) and learn.opt.rates is None and learn.drloc.factor is None and not learn.step_graph.held and not any(s.graph for s in learn.step_graph.steps.values())
    the_same(plain, fitted(learn))
    assert learn.validate()[1] == plain.validate()[1]

def test_non_finite_loss_is_found():
    "The mark is set within replays, and names the step"
    class Spoil(Callback):
        def before_batch(self):
            if self.training and self.train_iter==15: self.learn.xb = (self.xb[0]*float('nan'),)
    with pytest.raises(NonFiniteLossError, match='epoch 1, step 4'): fitted(made(mix=False, extra=[StepGraph(kind=Tape), Spoil()]))

# ---- what is not recorded

class Inner(Callback):
    def before_step(self): self.n = getattr(self, 'n', 0)+1
class Declared(Inner): recordable = True
class Heir(Declared): pass

def said(learn, **kw):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        fitted(learn, 1, **kw)
    return [str(w.message) for w in ws if 'graph' in str(w.message)]

@pytest.mark.parametrize('cb,why', [(Inner, 'Inner acts within a step (before_step)'), (Heir, 'Heir acts'), (lambda: MixedPrecision('fp16'), "fastai's MixedPrecision asks")])
def test_unknown_callbacks(cb, why):
    learn = made(extra=[cb()])
    learn.create_opt()
    assert why in why_not(learn, Tape)

def test_one_word_and_as_ever():
    learn = made(extra=[Inner()])
    assert len(m := said(learn, cbs=StepGraph(kind=Tape))) == 1 and 'Inner' in m[0]
    assert learn.inner.n == 11

def test_a_callback_may_declare_itself():
    learn = made(extra=[Declared(), StepGraph(kind=Tape)])
    assert not said(learn) and learn.declared.n == 4       # three steps as ever, and the one that was recorded

def test_hooks_optimizer_learner_device():
    learn = made()
    learn.create_opt()
    hook = learn.model.register_forward_hook(lambda *_: None)
    assert 'hook' in why_not(learn, Tape)
    hook.remove()
    stock = Learner(learn.dls, learn.model, loss_func=nn.CrossEntropyLoss())
    stock.create_opt()
    assert 'Optimizer takes its learning rates as numbers' in why_not(stock, Tape)
    class Own(Learner):
        def _step(self): super()._step()
    own = Own(learn.dls, learn.model, loss_func=nn.CrossEntropyLoss(), opt_func=FusedAdamW)
    own.create_opt()
    assert 'Own has a _step of its own' in why_not(own, Tape)
    if next(learn.model.parameters()).device.type=='cpu': assert 'only a GPU has CUDA graphs' in why_not(learn, CudaGraph)

def test_a_schedule_of_more_than_the_rate():
    "Each value of beta is another kind of step: nothing is recorded, the training is as ever, and that is said"
    def one_cycle(cbs):
        learn = made(extra=cbs, epochs=3, share=1.)
        learn.remove_cb(learn.param_scheduler)
        with learn.no_logging(): learn.fit_one_cycle(3, small['lr'], moms=(.95,.85,.95))
        return learn
    with pytest.warns(UserWarning, match='50 kinds of steps'): a = one_cycle([StepGraph(kind=Tape)])
    the_same(one_cycle([]), a)

def test_no_more_than_most():
    "A kind too many runs as ever, is said once, and trains the same"
    b = made(extra=[StepGraph(kind=Tape, most=1, warm=1)])
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        fitted(b)
    assert sum('no more kinds of steps are recorded than most=1' in str(w.message) for w in ws) == 1
    assert [s.seen>1 for s in b.step_graph.steps.values()].count(True) == 1 < len(b.step_graph.steps)
    the_same(fitted(made()), b)

def test_bad_number():
    with pytest.raises(ValueError, match='most=0: at least one kind'): StepGraph(most=0)
    with pytest.raises(ValueError, match='warm=0: at least one step'): StepGraph(warm=0)

def test_what_cannot_be_recorded_says_how_to_go_on():
    class Broken(Tape):
        def record(self, f): raise RuntimeError('operation not permitted when stream is capturing')
    with pytest.raises(RuntimeError, match='cannot be recorded as a graph.*not permitted.*leave out StepGraph'): fitted(made(extra=[StepGraph(kind=Broken)]), 1)

def test_tape():
    x,total = torch.ones(3),torch.zeros(3)
    tape = Tape()
    tape.record(lambda: total.add_(x.view(3)*2))
    x.fill_(5.); tape.replay()
    assert total.tolist() == [12.]*3

def test_tape_knows_what_waits():
    "Rows by number are looked up again; rows by a mask, whose number only the device knows, are refused"
    x,i,out = torch.arange(3.),torch.tensor([2,0]),torch.zeros(2)
    tape = Tape()
    tape.record(lambda: out.copy_(x[i]))
    i.fill_(1); tape.replay()
    assert out.tolist() == [1.,1.]
    with pytest.raises(RuntimeError, match='waits for a number or a shape'): Tape().record(lambda: x[x>0])

def test_replayed():
    "A step that raises while it is recorded is not taken for recorded"
    seen,total = [],torch.zeros(())
    def step():
        seen.append(len(seen)); total.add_(1)
        if len(seen)==3 and not replayed.seen>3: raise RuntimeError('not yet')
    replayed = Replayed(warm=2, kind=Tape)
    for _ in range(2): replayed(step)
    assert replayed.due
    with pytest.raises(RuntimeError, match='not yet'): replayed(step)
    assert replayed.due and replayed.graph is None
    for _ in range(4): replayed(step)
    assert not replayed.due and len(seen)==4 and total.item()==7

# ---- on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('kw', [dict(precision='bf16'), dict(precision='fp16'), dict(precision='float32'), dict(precision='bf16', compile=True)], ids=str)
def test_on_a_gpu(kw):
    "One graph trains as step by step does, up to the order of additions"
    kw = dict(kw, drloc='paper', model='cvt_mini', size=32, lr=1e-3, mix=False)
    a,b = (fitted(made('cuda', step_graph=one, **kw)) for one in (False,True))
    assert b.step_graph.why == '' and most(b) > 15
    for x,y in zip(a.recorder.values[-1], b.recorder.values[-1]): assert abs(x-y) < .05
    assert a.drloc.generator.get_state().equal(b.drloc.generator.get_state())

@pytest.mark.cuda
def test_a_replay_waits_for_nothing():
    "From the fifth step on; but for the first of an epoch, whose loss the recorder reads"
    class Strict(Callback):
        order = 900
        def before_batch(self):
            if self.training and self.train_iter>4 and self.iter: torch.cuda.set_sync_debug_mode('error')
        def after_batch(self): torch.cuda.set_sync_debug_mode('default')
    try: learn = fitted(made('cuda', precision='bf16', drloc='paper', model='cvt_mini', size=32, step_graph=True, extra=[Strict()]))
    finally: torch.cuda.set_sync_debug_mode('default')
    assert learn.step_graph.why == '' and most(learn) > 15

# ---- plain fastai Learners, whose callbacks change things between steps

from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import CrossEntropyLossFlat
from fastai.data.core import DataLoaders

def stock(graph, cbs=(), loss=None, cls=Learner, model=None, epochs=3):
    "A Learner of fastai's own on the digits, the same each time"
    b = build(Recipe(**{**small, 'share':.3}), device='cpu', bar=False)                                                                  # 6 steps an epoch
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    learn = cls(b.dls, model or create_model('demo_cvt', 10, img_size=b.dls.info.size), loss_func=loss or nn.CrossEntropyLoss(), opt_func=FusedAdamW, cbs=list(cbs))
    if graph: learn.add_cb(StepGraph(kind=Tape))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 3e-3)
    return learn

class Unfreeze(Callback):
    def before_epoch(self):
        for p in list(self.model.parameters())[:4]: p.requires_grad_(self.epoch>0)
class Smooth(Callback):
    def before_epoch(self): self.learn.loss_func = nn.CrossEntropyLoss(label_smoothing=.3*(self.epoch>0))
class Reload(Callback):
    order = 100
    def after_epoch(self):
        if self.epoch==0: self.learn.save('reload_test')
    def before_epoch(self):
        if self.epoch==2: self.learn.load('reload_test')
class Worst(Callback):
    order = 100
    def after_epoch(self): self.losses = self.learn.get_preds(dl=self.dls.valid, with_loss=True, inner=True)[2]
class Freeze(Callback):
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, nn.BatchNorm2d) and self.epoch>0: m.eval()

@pytest.mark.parametrize('cb,kinds', [(Unfreeze,4), (Smooth,6), (Reload,4), (Worst,3), (Freeze,3)])
def test_what_changes_between_steps(cb, kinds, tmp_path, monkeypatch):
    "Weights that are trained, the loss, the moments, how a loss adds up, modes: another kind of step, and the same training"
    monkeypatch.chdir(tmp_path)
    a,b = (stock(g, [cb()]) for g in (False,True))
    assert b.step_graph.told==dict(why='', recorded=kinds)
    for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True): assert torch.equal(p, q)
    assert a.recorder.values==b.recorder.values

@pytest.mark.parametrize('cb', [MixUp,CutMix])
def test_fastais_mixing_is_refused(cb):
    "Its loss reads tensors that the callback makes anew"
    with pytest.warns(UserWarning, match=f"the loss is {cb.__name__}'s.*MixupCutmix"): b = stock(True, [cb()], CrossEntropyLossFlat())
    assert b.step_graph.told['recorded']==0 and b.opt.rates is None

def test_a_part_of_ones_own_is_refused():
    class Half(Learner):
        n = 0
        def _do_grad_opt(self):
            self.n += 1
            if self.n%2: return self._backward()
            super()._do_grad_opt()
    with pytest.warns(UserWarning, match='Half has a _do_grad_opt of its own'): learn = stock(True, cls=Half)
    assert learn.n==18
    plain = made()
    plain.create_opt()
    plain._step = lambda: None
    assert '_step of its own' in why_not(plain, Tape)

def test_a_hook_that_comes_later():
    "What is in the way is asked whenever a step is recorded, and the training goes on as ever"
    class Listen(Callback):
        def before_validate(self):
            if self.epoch==0: self.model.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match='a hook listens to'): b = stock(True, [Listen()])
    a = stock(False, [Listen()])
    assert b.step_graph.told['recorded']==1 and a.recorder.values==b.recorder.values

def test_batches_and_predictions_of_any_kind():
    "A dict cannot be copied to its place: as ever, with a word; an output that is None stays None"
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.m = create_model('demo_cvt', 10, img_size=(16,16))
        def forward(self, x): return self.m(x['x'] if isinstance(x, dict) else x),None
    loss = lambda p, y: nn.functional.cross_entropy(p[0], y)
    assert stock(True, loss=loss, model=Two()).step_graph.told==dict(why='', recorded=2)
    items = [({'x':torch.randn(3,16,16)}, torch.tensor(i%10)) for i in range(16)]
    learn = Learner(DataLoaders.from_dsets(items, items, bs=8, device='cpu', after_batch=[]), Two(), loss_func=loss, opt_func=FusedAdamW, cbs=StepGraph(kind=Tape))
    with pytest.warns(UserWarning, match='a batch holds a dict'), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
