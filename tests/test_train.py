"The training program: protocol, optimizer, records, console script"
import json, math, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from fastai.basics import Callback, CancelFitException, L, set_seed
from vt_drloc.models import create_model, load_model
from vt_drloc.train import (DeviceRecorder, FusedAdamW, DRLOC, Recipe, RunRecord, build, controls, decays, demo_cvt, main,
                            run_name, settings, side_task_error, train)

small = Recipe(data='digits', model='demo_cvt', epochs=2, bs=256, warmup=0, mix=False, tfms='none')

class StopAt(Callback):
    order = 100
    def __init__(self, step, exc=KeyboardInterrupt): self.step,self.exc = step,exc
    def after_batch(self):
        if self.training and self.train_iter==self.step: raise self.exc()

# --- the protocol

def test_defaults_are_the_protocol():
    r = Recipe()
    assert (r.lr, r.lr_start, r.lr_floor, r.warmup, r.epochs, r.bs) == (5e-4, 5e-7, 5e-6, 20, 100, 512)
    assert (r.wd, r.mom, r.sqr_mom, r.eps, r.clip, r.m, r.check().drop_path) == (0.05, 0.9, 0.999, 1e-8, 5.0, 64, 0.)

@pytest.mark.parametrize('model', ['cvt_mini','vit_mini','demo_cvt','swin_mini','t2t_mini','cvt_13_mini','cvt_13_gap_mini','resnet_mini'])
@pytest.mark.parametrize('drloc', DRLOC)
def test_every_parameter_against_the_protocol(model, drloc):
    r = Recipe(data='digits', model=model, drloc=drloc, bs=8, epochs=100)
    rows = {o['name']:o for o in settings(r, device='cpu')}
    names = [n for n,p in create_model(model).named_parameters() if p.requires_grad]
    layers = dict(none=(), paper=(0,2), released=(0,2,4))[drloc]
    mlp = {f'drloc.mlp.{i}.{n}' for i in layers for n in ('weight','bias')}
    assert set(rows) == set(names) | mlp
    for n,o in rows.items():
        spared = len(o['shape'])==1 or n=='pos_embed' or n.endswith(('cls_token','relative_position_bias_table','bias.table'))
        assert o['wd'] == (0. if spared else 0.05), n
        assert o['betas'] == (0.9,0.999) and o['eps'] == 1e-8, n
        assert o['lr'] == pytest.approx(5e-7*8/512, rel=1e-6), n    # the warm-up's first step, scaled by batch/512

def test_paper_weights_of_the_side_task():
    assert Recipe(model='cvt_mini', drloc='paper').check().lambda_drloc == 0.1
    assert Recipe(model='cvt_mini', drloc='none').check().lambda_drloc is None
    learn = build(Recipe(data='digits', model='demo_cvt', drloc='paper', bs=64), bar=False, device='cpu')
    assert learn.drloc.lambda_drloc == 0.1 and learn.drloc.m == 64 and learn.gradient_clip.max_norm == 5.0
    assert (learn.mixup_cutmix.alpha, learn.mixup_cutmix.cutmix, learn.mixup_cutmix.smooth) == (0.8, 1.0, 0.1)

def test_decay_spares_vectors_positions_and_tables():
    p2,p1 = torch.zeros(3,4),torch.zeros(3)
    assert decays('blocks.0.mlp.fc1.weight', p2) and not decays('norm.weight', p1) and not decays('head.bias', p1)
    for n in ('pos_embed','cls_token','layers.0.attn.relative_position_bias_table'): assert not decays(n, p2[None])

@pytest.mark.parametrize('bs', [128, 512, 1024])
def test_learning_rate(bs):
    r,k = Recipe(bs=bs),bs/512
    cos = lambda e: 5e-6 + (5e-4-5e-6)*(1+math.cos(math.pi*e/100))/2
    assert r.lr_at(0) == pytest.approx(5e-7*k) and r.lr_at(.1) == pytest.approx(k*(5e-7+(5e-4-5e-7)/2))
    for e in (20, 50, 99.5): assert r.lr_at(e/100) == pytest.approx(k*cos(e))
    assert r.lr_at(1.) == pytest.approx(5e-6*k) and cos(20)/5e-4 == pytest.approx(.905, abs=1e-3)

def test_schedule_reaches_the_optimizer():
    learn,seen = build(small, bar=False, device='cpu'),[]
    class See(Callback):
        order = 70
        def before_step(self): seen.append((self.pct_train, self.opt.hypers[0]['lr']))
    with learn.no_logging(): learn.fit(small.epochs, small.lr, cbs=See())
    for pct,lr in seen: assert lr == pytest.approx(small.lr_at(pct))

# --- the optimizer

@pytest.mark.parametrize('wd', [0., .05])
def test_fused_adamw_is_adamw(wd):
    def run(make):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5,7), nn.Tanh(), nn.Linear(7,2)); opt = make(net)
        for x in torch.randn(20,16,5): net(x).square().mean().backward(); opt.step(); opt.zero_grad()
        return nn.utils.parameters_to_vector(net.parameters())
    ours = run(lambda m: FusedAdamW(L(m.parameters()), lr=.01, wd=wd))
    theirs = run(lambda m: torch.optim.AdamW(m.parameters(), lr=.01, weight_decay=wd))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

def test_fused_adamw_keeps_groups_and_marks():
    a,b = nn.Parameter(torch.ones(4)),nn.Parameter(torch.ones(4))
    opt = FusedAdamW(L([[a],[b]]).map(L), lr=.1, wd=.5)
    opt.set_hyper('lr', [.1,.2]); opt.state[b]['do_wd'] = False
    for p in (a,b): p.grad = torch.zeros(4)
    opt.step()
    torch.testing.assert_close(a.detach(), torch.full((4,), 1-.1*.5)); torch.testing.assert_close(b.detach(), torch.ones(4))

# --- records

def test_record_of_a_complete_run(tmp_path):
    r = Recipe(**{**vars(small), 'drloc':'paper'})
    train(r, out=tmp_path, bar=False, device='cpu')
    rec = json.loads((tmp_path/f'{run_name(r)}.json').read_text())
    assert rec['status']=='complete' and len(rec['epochs'])==2 and rec['recipe']['seed']==0 and rec['data']['n_train']==1437
    assert rec['final']['accuracy']==rec['epochs'][-1]['accuracy'] and rec['versions']['torch']==torch.__version__
    for e in rec['epochs']:
        assert {'train_loss','valid_loss','accuracy','ce','drloc','lambda','lr','images_per_s','wall_s'} <= set(e)
        assert e['train_loss'] == pytest.approx(e['ce'] + e['lambda']*e['drloc'], rel=1e-5)
    assert str(Path.home()) not in json.dumps(rec)
    with safe_open(tmp_path/f'{run_name(r)}.safetensors', 'pt') as f: meta = f.metadata()
    assert json.loads(meta['vocab'])==[str(i) for i in range(10)] and json.loads(meta['size'])==[32,32]
    m = load_model(tmp_path/f'{run_name(r)}.safetensors')
    for k,v in load_file(tmp_path/f'{run_name(r)}.safetensors').items(): assert torch.equal(m.state_dict()[k], v)
    assert (tmp_path/f'{run_name(r)}.mlp.safetensors').exists() and not list(tmp_path.glob('*.tmp'))

def test_record_says_when_a_run_was_cut_short(tmp_path):
    learn = build(small, out=tmp_path, bar=False, device='cpu')
    n = len(learn.dls.train)
    with pytest.raises(KeyboardInterrupt), learn.no_logging(): learn.fit(small.epochs, small.lr, cbs=StopAt(n+1))
    rec = json.loads((tmp_path/f'{run_name(small)}.json').read_text())
    assert rec['status']=='cut short' and len(rec['epochs'])==1

def test_cancelled_fit_is_cut_short_too(tmp_path):
    learn = build(small, out=tmp_path, bar=False, device='cpu')
    with learn.no_logging(): learn.fit(small.epochs, small.lr, cbs=StopAt(len(learn.dls.train)+1, CancelFitException))
    rec = json.loads((tmp_path/f'{run_name(small)}.json').read_text())
    assert rec['status']=='cut short' and len(rec['epochs']) < 2+1

def test_nan_keeps_the_last_good_weights(tmp_path):
    class Spoil(Callback):
        order = 1
        def after_loss(self):
            if self.training and self.epoch==1 and self.iter==2: self.learn.loss_grad = self.loss_grad*float('nan')
    learn = build(small, out=tmp_path, bar=False, device='cpu')
    learn.keep_weights.every = 1
    with pytest.raises(RuntimeError, match='epoch 1, step 2.*last good checkpoint'), learn.no_logging(): learn.fit(2, small.lr, cbs=Spoil())
    kept = load_file(tmp_path/f'{run_name(small)}.safetensors')
    assert all(v.isfinite().all() for v in kept.values())

def test_same_seed_same_run():
    a,b = (train(small, bar=False, device='cpu').model.state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_device_recorder_reports_the_mean():
    learn,losses = build(small, bar=False, device='cpu'),[]
    class See(Callback):
        run_valid = False
        def after_batch(self): losses.append(self.loss.item())
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=See())
    assert learn.recorder.values[0][0] == pytest.approx(sum(losses)/len(losses), rel=1e-5)

# --- the console script

def test_wrong_names_get_the_right_ones():
    for kw,near in ((dict(data='cifra10'),'cifar10'), (dict(model='cvt_mimi'),'cvt_mini'), (dict(drloc='papr'),'paper')):
        with pytest.raises(SystemExit, match=near): main(**kw)
    for kw in (dict(m=0), dict(lambda_drloc=-1., drloc='paper'), dict(epochs=0), dict(lr=-1.)):
        with pytest.raises(SystemExit, match=next(iter(kw))): main(**kw)

def test_help():
    out = subprocess.run([Path(sys.executable).parent/'vt_drloc_train', '--help'], capture_output=True, text=True).stdout
    for s in ('--data','--model','--drloc','--epochs','--seed','pairs of patches'): assert s in out

# --- the side task's error

def test_controls_and_error():
    x = torch.randn(4,3,32,32)
    c = controls(x)
    assert torch.equal(c['scrambled pixels'].flatten(2).sort(-1).values, x.flatten(2).sort(-1).values)
    assert c['constant image'].flatten(2).std(-1).max() == 0
    set_seed(0); model = demo_cvt(1)
    class Zero(nn.Sequential): dim = 64
    mlp = Zero(nn.Linear(128,2)); nn.init.zeros_(mlp[0].weight); nn.init.zeros_(mlp[0].bias)
    err = side_task_error(model, mlp, x, m=4096)
    assert err == pytest.approx(torch.full((2,), 63/24).tolist(), abs=.05)   # always answering 0 costs the mean offset (k^2-1)/3k = 63/24
    assert model.training

def test_tensor_cores_for_the_fit_alone():
    "float32 products are 'high' inside a fit and as before after it, also when it dies"
    from vt_drloc.train import TensorCores
    seen = []
    class Look(Callback):
        def after_batch(self):
            seen.append(torch.get_float32_matmul_precision())
            if len(seen)==2: raise ZeroDivisionError('stop')
    learn = build(Recipe(data='digits', model='demo_cvt', bs=256, epochs=1, warmup=0), device='cpu', bar=False)
    was = torch.get_float32_matmul_precision()
    with learn.no_logging(), pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[TensorCores(), Look()])
    assert seen==['high','high'] and torch.get_float32_matmul_precision()==was=='highest'

def test_fast_is_for_gpus():
    "On a CPU a recipe's network is the one of its chapter, fast or not"
    learn = build(Recipe(data='digits', model='swin_mini', bs=256, epochs=1, warmup=0), device='cpu', bar=False)
    assert {type(m).__name__ for m in learn.model.modules() if 'Attention' in type(m).__name__}=={'WindowAttention'}
