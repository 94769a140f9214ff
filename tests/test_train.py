"The training program: protocol, optimizer, records, console script"
import json, math, subprocess, sys
from dataclasses import fields, replace
from pathlib import Path
import pytest, torch
from fastcore.script import anno_parser
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from fastai.basics import Callback, CancelFitException, DataLoaders, L, Learner, set_seed
from vt_drloc.evaluate import eval_main
from vt_drloc.models import create_model, list_models, load_model, read_header
from vt_drloc.train import (DeviceRecorder, Fp16, FusedAdamW, GradientNorms, DRLOC, Recipe, RunRecord, accuracy_curves, build, controls, decays, demo_cvt, main,
                            read_records, run_name, settings, side_task_error, train)

small = Recipe(data='digits', model='demo_cvt', size=16, epochs=2, bs=64, warmup=0, mix=False, tfms='none', share=.2)   # 287 images, 4 steps an epoch

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
    assert rec['status']=='complete' and len(rec['epochs'])==2 and rec['recipe']['seed']==0 and rec['data']['n_train']==287
    assert rec['final']['accuracy']==rec['epochs'][-1]['accuracy'] and rec['versions']['torch']==torch.__version__
    for e in rec['epochs']:
        assert {'train_loss','valid_loss','accuracy','ce','drloc','lambda','lr','images_per_s','grad_norm','grad_norm_max','wall_s'} <= set(e)
        assert e['train_loss'] == pytest.approx(e['ce'] + e['lambda']*e['drloc'], rel=1e-5)
    assert str(Path.home()) not in json.dumps(rec)
    with safe_open(tmp_path/f'{run_name(r)}.safetensors', 'pt') as f: meta = f.metadata()
    assert json.loads(meta['vocab'])==[str(i) for i in range(10)] and json.loads(meta['size'])==[16,16]
    m = load_model(tmp_path/f'{run_name(r)}.safetensors')
    for k,v in load_file(tmp_path/f'{run_name(r)}.safetensors').items(): assert torch.equal(m.state_dict()[k], v)
    assert (tmp_path/f'{run_name(r)}.mlp.safetensors').exists() and not list(tmp_path.glob('*.tmp'))

def test_circumstances_are_those_of_the_committed_records(monkeypatch):
    "Same keys in the same order, each version as its package states it; where there is a GPU, which one"
    import fastai, timm, torchvision, vt_drloc
    from vt_drloc.train import circumstances
    recs = read_records()
    then = max(recs, key=lambda r: r['started'])
    monkeypatch.setenv('VT_DRLOC_REVISION', 'abc')
    now = circumstances('cpu')
    assert list(now) == [k for k in then if k in now] == ['revision','python','versions','hardware'] and now['revision'] == 'abc'
    assert list(now['versions'].items()) == [(m.__name__,m.__version__) for m in (vt_drloc, torch, torchvision, fastai, timm)]
    assert all(list(r['versions']) == list(now['versions']) for r in recs)
    assert now['hardware']['device'] == 'CPU' and list(now['hardware']) == [k for k in then['hardware'] if k!='gpu']
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: f'GPU {device}')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3')
    there = circumstances(torch.device('cuda:0'))['hardware']
    assert list(there) == list(then['hardware']) and (there['device'],there['gpu']) == ('GPU cuda:0','3')

def test_gradient_norms_are_those_before_clipping(tmp_path):
    "Against the norm that autograd left, at the noted steps alone; the clipping comes after"
    class See(Callback):
        order,run_valid,seen = 0,False,[]
        def before_step(self): self.seen.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).norm().item())
    r = Recipe(**{**vars(small), 'drloc':'paper', 'clip':1e-3})
    learn = build(r, out=tmp_path, bar=False, device='cpu')
    learn.gradient_norms.every = 3
    with learn.no_logging(): learn.fit(2, r.lr, cbs=See())
    n,es = len(learn.dls.train),json.loads((tmp_path/f'{run_name(r)}.json').read_text())['epochs']
    assert n==4 and len(See.seen)==8
    for e,noted in zip(es, ([0,3],[6])):
        want = [See.seen[i] for i in noted]
        assert e['grad_norm']==pytest.approx(sum(want)/len(want), rel=1e-3) and e['grad_norm_max']==pytest.approx(max(want), rel=1e-3) and e['grad_norm'] > 1e-2

def test_gradient_norms_are_free_of_half_precisions_factor():
    "A loss scaled by 1 and by 2^10 has the same gradient, up to the rounding of fp16"
    from fastai.data.load import DataLoader
    def noted(scale):
        set_seed(0)
        ds = list(zip(torch.randn(8,4), torch.randn(8,3)))
        dls = DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4), device=torch.device('cpu'))
        learn = Learner(dls, torch.nn.Linear(4,3), loss_func=torch.nn.MSELoss(), opt_func=FusedAdamW, cbs=[Fp16('cpu', init_scale=scale), GradientNorms(1)])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
        return learn.gradient_norms.found
    assert noted(1024.) == pytest.approx(noted(1.), rel=1e-2) and noted(1.)['grad_norm'] > .1

def test_a_gradient_that_overflows_is_in_no_mean():
    cb,norms = GradientNorms(1),[1., float('inf'), 3., float('nan')]
    cb.noted = [torch.tensor(n) for n in norms]
    cb.after_train()
    assert cb.found == dict(grad_norm=2., grad_norm_max=3.)
    cb.noted = [torch.tensor(float('nan'))]
    cb.after_train()
    assert cb.found == {}

def test_record_says_when_a_run_was_cut_short(tmp_path):
    learn = build(small, out=tmp_path, bar=False, device='cpu')
    n = len(learn.dls.train)
    with pytest.raises(KeyboardInterrupt), learn.no_logging(): learn.fit(small.epochs, small.lr, cbs=StopAt(n+1))
    rec = json.loads((tmp_path/f'{run_name(small)}.json').read_text())
    assert rec['status']=='cut short' and len(rec['epochs'])==1

def test_weights_say_of_which_epoch_they_are(tmp_path):
    "Cut short in the fourth epoch: the record has three rows, the weights are of the second, and their accuracy is its"
    r = Recipe(**{**vars(small), 'epochs':5})
    learn = build(r, out=tmp_path, bar=False, device='cpu')
    learn.keep_weights.every = 2
    n,file = len(learn.dls.train),tmp_path/f'{run_name(r)}.safetensors'
    with pytest.raises(KeyboardInterrupt), learn.no_logging(): learn.fit(r.epochs, r.lr, cbs=StopAt(3*n+1))
    head,es = read_header(file),json.loads(file.with_suffix('.json').read_text())['epochs']
    assert head['epoch']==1 and type(head['epoch']) is int and [e['epoch'] for e in es]==[0,1,2]
    learn.model.load_state_dict(load_model(file).state_dict())
    with learn.no_bar(), learn.no_logging(): loss,acc = learn.validate()
    assert acc==pytest.approx(es[1]['accuracy']) and loss==pytest.approx(es[1]['valid_loss'], rel=1e-5)
    train(small, out=tmp_path, bar=False, device='cpu')
    assert read_header(tmp_path/f'{run_name(small)}.safetensors')['epoch']==small.epochs-1

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

# --- pages and curves

def page_cell(start):
    "Source of the one code cell of the chapter that starts with `start`"
    cells = json.loads((Path(__file__).parents[1]/'nbs'/'10_train.ipynb').read_text())['cells']
    found, = [s for c in cells if c['cell_type']=='code' and (s := ''.join(c['source'])).startswith(start)]
    return found

def test_the_figure_of_the_rate_shows_peak_and_drop():
    "Its own x: the peak is reached, the jump lies at 20 and is what the text says"
    import matplotlib; matplotlib.use('Agg')
    import numpy as np, matplotlib.pyplot as plt
    from vt_drloc.plots import PALETTE
    exec(page_cell('#| fig-alt: "Learning rate over'), ns := dict(np=np, plt=plt, r=Recipe(), PALETTE=PALETTE))
    x,y = ns['ax'].lines[0].get_data()
    y = np.asarray(y)
    assert max(y)==pytest.approx(5e-4, rel=1e-3) and x[0]==0 and x[-1]==100
    jump = int(np.argmin(np.diff(y)))+1
    assert x[jump]==20 and 1-y[jump]/max(y)==pytest.approx(.0945, abs=2e-3)
    plt.close(ns['fig'])

def test_curves_name_the_arm_that_ran():
    "Nothing spoiled, changed or released passes for the paper's task; the words are those of the results"
    from vt_drloc import evidence
    def rec(seed=0, **kw): return dict(data=dict(name='digits'), recipe=vars(Recipe(data='digits', model='demo_cvt', seed=seed, **kw).check()), epochs=[dict(accuracy=.5)])
    arms = [dict(drloc='none'), dict(drloc='paper'), dict(drloc='released'), dict(drloc='paper', control='permuted'), dict(drloc='paper', variant='ce'), dict(drloc='paper', m=32),
            dict(drloc='paper', lambda_drloc=.5), dict(drloc='paper', schedule='cos'), dict(drloc='released', control='detached')]
    recs = [rec(seed, **a) for a in arms for seed in (0,1)]
    curves = accuracy_curves(recs, 'digits', 'demo_cvt')
    assert list(curves)==[evidence.arm(r['recipe']) for r in recs[::2]] and all(len(v)==2 for v in curves.values())
    assert 'with L_drloc, pool=2x2' in accuracy_curves([rec(drloc='paper', pool='2x2')], 'digits', 'demo_cvt')

def test_curves_of_several_settings_are_refused():
    def rec(**kw): return dict(data=dict(name='digits'), recipe=vars(Recipe(data='digits', model='demo_cvt', **kw).check()), epochs=[dict(accuracy=.5)])
    for kw,why in ((dict(share=.1), 'share: 0.1, 1.0'), (dict(tfms='paper'), 'tfms: light, paper'), (dict(laid_out=300), 'laid_out: 100, 300'), (dict(bs=64, lr=1e-3), 'bs: 512, 64; lr')):
        with pytest.raises(ValueError, match=f'records of digits, demo_cvt are of several settings \\({why}'): accuracy_curves([rec(), rec(drloc='paper', **kw)], 'digits', 'demo_cvt')
    assert len(accuracy_curves([rec(), rec(laid_out=100, compile=True, seed=1)], 'digits', 'demo_cvt')['without'])==2
    old = rec(); del old['recipe']['variant'], old['recipe']['laid_out'], old['recipe']['fast']        # from before there was a choice
    assert len(accuracy_curves([rec(), old], 'digits', 'demo_cvt')['without'])==2

# --- the console script

def test_wrong_names_get_the_right_ones():
    for kw,near in ((dict(data='cifra10'),'cifar10'), (dict(model='cvt_mimi'),'cvt_mini'), (dict(drloc='papr'),'paper')):
        with pytest.raises(SystemExit, match=near): main(**kw)
    for kw in (dict(m=0), dict(lambda_drloc=-1., drloc='paper'), dict(epochs=0), dict(lr=-1.)):
        with pytest.raises(SystemExit, match=next(iter(kw))): main(**kw)

@pytest.mark.parametrize('k,bad', [('clip',-1.), ('wd',-1.), ('mom',2.), ('sqr_mom',1.), ('eps',0.), ('lr_floor',-1e-6), ('lr_start',-1.), ('warmup',-1.), ('drop_path',1.), ('size',0),
                                   ('heldout',-5), ('share',0.), ('lr',math.nan), ('lr',math.inf), ('wd',math.nan), ('lambda_drloc',math.nan), ('lambda_drloc',-1.), ('m',0)])
def test_numbers_that_cannot_be_meant(k, bad):
    "An error that names the setting and its value, before any image is read"
    with pytest.raises(ValueError, match=f'^{k}={bad}: '): Recipe(drloc='paper', **{k:bad}).check()

@pytest.mark.parametrize('kw', [dict(clip=0), dict(wd=0), dict(mom=0), dict(warmup=0), dict(lr_start=0, lr_floor=0), dict(drop_path=.9), dict(share=1), dict(lambda_drloc=0, drloc='paper')])
def test_the_ends_of_the_limits_are_allowed(kw): Recipe(**kw).check()

@pytest.mark.parametrize('kw', [dict(variant='ce'), dict(control='permuted'), dict(schedule='cos'), dict(lambda_drloc=.5), dict(m=32), dict(pool='2x2')])
def test_settings_of_the_side_task_need_one(kw, tmp_path):
    "Or the baseline would be trained in its place without a word; a recipe may keep the numbers, for its other arm"
    k = next(iter(kw))
    said = f"{k}=.* without a side task: add drloc='paper' \\(--drloc paper\\)"
    with pytest.raises(SystemExit, match=said): main(**kw, data='digits', out=str(tmp_path))
    assert not list(tmp_path.iterdir())
    if k in ('variant','control','schedule'):
        with pytest.raises(ValueError, match='^'+said): Recipe(**kw).check()
    else: Recipe(**kw).check()
    assert getattr(Recipe(drloc='paper', **kw).check(), k) == kw[k]
    assert Recipe(lambda_drloc=.5, drloc='paper').check().check() and Recipe().check().check()        # what `check` gives can be checked again

def test_a_warm_up_longer_than_the_schedule():
    with pytest.raises(ValueError, match='warmup=200 is longer than the schedule of 1 epochs'): Recipe(warmup=200, epochs=1).check()
    for kw in (dict(warmup=2, epochs=2), dict(warmup=30, epochs=10, laid_out=300)): Recipe(**kw).check()
    with pytest.warns(UserWarning, match='20 epochs and the schedule has 2.*--warmup'): build(replace(small, warmup=Recipe.warmup), bar=False, device='cpu')

def test_what_was_run_and_is_planned_passes_the_check():
    "All committed records, plans and settings of the benchmarks"
    from vt_drloc.bench import PLANS, SWEEP, quick
    from vt_drloc.evidence import read_plan
    known,recs = {f.name for f in fields(Recipe)},read_records()
    for r in recs: Recipe(**{k:v for k,v in r['recipe'].items() if k in known}).check()
    plans = sorted((Path(__file__).parents[1]/'nbs'/'results'/'plans').glob('*.txt'))
    assert len(recs) >= 70 and len(plans) >= 8 and all(read_plan(p) for p in plans)
    for plan in PLANS.values():
        for changes in SWEEP.values():
            kw = {k:v for k,v in {**quick, 'model':plan.model, **plan.recipe, **changes}.items() if k!='net'}
            if kw['drloc']=='none' and 'lambda_drloc' in changes: continue          # no variation: a peer without the side task
            if kw['model'] not in list_models(): kw['model'] = 'cvt_mini'       # a peer, from a package that may not be here
            for e in (dict(epochs=36), dict(epochs=3, warmup=0)): Recipe(**{**kw, **e}).check()

def test_help_describes_the_flag_that_it_shows():
    "`--no-graphs` must not read like the promise of graphs"
    flags = [a for a in anno_parser(main.__wrapped__)._actions if any(o.startswith('--no-') for o in a.option_strings)]
    assert {a.option_strings[0] for a in flags} == {'--no-mix','--no-bar','--no-graphs','--no-fast'}
    for a in flags: assert f'on unless {a.option_strings[0]} is given' in a.help if a.default else a.help.startswith(('without ','one line ')), a.help

def test_eval_asks_for_the_checkpoint_alone():
    "Its photos are optional: not named where FILE is missing, and empty where none is given"
    run = [Path(sys.executable).parent/'vt_drloc_eval']
    said = subprocess.run(run, capture_output=True, text=True)
    assert said.returncode==2 and said.stderr.strip().endswith('the following arguments are required: file')
    parse = anno_parser(eval_main.__wrapped__).parse_args
    assert not parse(['w.safetensors']).photos and list(parse(['w.safetensors','a.jpg','b.jpg']).photos)==['a.jpg','b.jpg']
    assert 'score it' in subprocess.run([*run, '--help'], capture_output=True, text=True).stdout

@pytest.mark.parametrize('program,given,said', [('vt_drloc_train', ['--lambda','.5','--drloc','paper'], 'no option --lambda; did you mean --lambda-drloc?'),
                                                ('-m', ['--no-gr','--warmup=3'], 'no option --no-gr; did you mean --no-graphs?')])
def test_options_are_not_shortened(tmp_path, program, given, said):
    "A typo must not mean another option"
    run = [Path(sys.executable).parent/program] if program!='-m' else [sys.executable,'-m','vt_drloc.train']
    res = subprocess.run([*run, '--data','cifra10','--out',str(tmp_path/'runs'), *given], capture_output=True, text=True)
    assert res.returncode and said in res.stderr and not (tmp_path/'runs').exists() and 'cifra10' not in res.stderr

def test_whole_options_pass(tmp_path):
    "Also with =, with a short name that is whole (--lr), and a value that looks like one"
    res = subprocess.run([Path(sys.executable).parent/'vt_drloc_train', '--data=cifra10','--lr','0.001','--no-graphs','--warmup=3','--wd=0'], capture_output=True, text=True)
    assert "did you mean 'cifar10'" in res.stderr

@pytest.mark.parametrize('program,given,said', [('vt_drloc_eval', ['x.safetensors','--held','5'], '--held; did you mean --heldout'), ('vt_drloc.bench', ['--sect=speed'], '--sect; did you mean --section'),
                                                ('vt_drloc.compare', ['--quic'], '--quic; did you mean --quick'), ('vt_drloc.profile', ['--dev','cpu'], '--dev; did you mean --device')])
def test_no_program_takes_shortened_options(tmp_path, program, given, said):
    run = [sys.executable,'-m',program] if '.' in program else [Path(sys.executable).parent/program]
    res = subprocess.run([*run, *given], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode and f'no option {said}' in res.stderr and not list(tmp_path.iterdir())

def test_the_demos_options_are_not_shortened(tmp_path):
    res = subprocess.run([Path(sys.executable).parent/'vt_drloc_demo', '--digit','1','--out',str(tmp_path/'runs')], capture_output=True, text=True)
    assert res.returncode and 'no option --digit; did you mean --digit-epochs?' in res.stderr and not (tmp_path/'runs').exists()

def test_help():
    out = subprocess.run([Path(sys.executable).parent/'vt_drloc_train', '--help'], capture_output=True, text=True).stdout
    for s in ('--data','--model','--drloc','--epochs','--seed','pairs of patches'): assert s in out

@pytest.mark.parametrize('kw,said', [(dict(name=5), 'name=5: give a text'), (dict(name=None), 'name=None'), (dict(data=None), 'data=None: give a text'), (dict(data=5), 'data=5'), (dict(model=None), 'model=None'), (dict(drloc=None), 'drloc=None'),
    (dict(pretrained=None), 'pretrained=None'), (dict(tfms=['light']), "tfms=.'light'.: give a text"), (dict(lambda_drloc='a', drloc='paper'), "lambda_drloc='a': give a number"), (dict(seed=2**70), 'seed=.*from 0'), (dict(seed=-1), 'seed=-1'),
    (dict(share_seed=-1, share=.5), 'share_seed=-1'), (dict(name='..'), "name='..'"), (dict(schedule='cosine', drloc='paper'), "unknown schedule 'cosine'.* Right ones: constant,"), (dict(control='x', drloc='paper'), "unknown control 'x'[.;]")])
def test_settings_that_cannot_be_meant(tmp_path, kw, said):
    with pytest.raises(ValueError, match='^'+said): train(replace(small, **kw), out=tmp_path/'runs', bar=False, device='cpu')
    assert not (tmp_path/'runs').exists()

@pytest.mark.parametrize('kw,said', [(dict(probe=-5), 'probe=-5: give'), (dict(probe=1.5), 'probe=1.5'), (dict(beside=0), 'beside=0'), (dict(minutes=0), 'minutes=0: must be above 0'), (dict(minutes='a'), "minutes='a'")])
def test_arguments_of_a_run_that_cannot_be_meant(tmp_path, kw, said):
    "At once, and not after hours of training"
    with pytest.raises(ValueError, match='^'+said): train(small, out=tmp_path/'runs', bar=False, device='cpu', **kw)
    assert not (tmp_path/'runs').exists()

def test_a_folder_of_images_in_any_form(tmp_path, monkeypatch):
    "As a Path, from home, from inside; the run is called after it"
    from PIL import Image
    for f in ('train/a/0','train/b/1','valid/a/2','valid/b/3'):
        (p := tmp_path/'zoo'/f'{f}.png').parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16,16), (0,60*int(f[-1]),0)).save(p)
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path/'zoo')
    for data in (tmp_path/'zoo', '~/zoo', '.'):
        r = replace(small, data=data, bs=2, share=1., epochs=1)
        assert run_name(r) == run_name(replace(r, data='zoo')) and build(r, bar=False, device='cpu').dls.info.name == 'zoo'
    train(replace(r, data=tmp_path/'zoo'), out=tmp_path/'runs', bar=False, device='cpu')
    assert json.loads(next((tmp_path/'runs').glob('zoo-*.json')).read_text())['recipe']['data'] == str(tmp_path/'zoo')

def test_the_program_needs_a_folder_to_write_to(tmp_path, monkeypatch):
    "It would have trained to the end, and written nothing"
    with pytest.raises(SystemExit, match="out='': give a folder"): main(**{k: v for k,v in vars(small).items() if k!='mix'}, no_mix=True, out='', device='cpu', no_bar=True)

def test_records_of_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match='nothere.*no such folder'): read_records(tmp_path/'nothere')
    assert read_records(tmp_path)==[]

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

# --- names, shares, controls, and what the record says of position

def test_names_of_runs():
    "Today's names stay, and what the question depends on is told"
    assert run_name(Recipe()) == 'cifar10-cvt_mini-none-s0' and run_name(Recipe(drloc='paper', seed=3)) == 'cifar10-cvt_mini-paper-s3'
    assert run_name(Recipe(model='swin_mini', drloc='paper', lambda_drloc=.5)) == 'cifar10-swin_mini-paper-s0'      # the paper's own weight
    differ = dict(lambda_drloc=.05, m=16, pool='2x2', tfms='paper', control='permuted', schedule='cos', share=.1, heldout=5000, laid_out=300, variant='ce', seed=1, mix=False, size=64)
    names = {run_name(Recipe(drloc='paper', **{k: v})) for k,v in differ.items()} | {run_name(Recipe(drloc='paper')), run_name(Recipe(drloc='paper', share=.1, share_seed=1))}
    names |= {run_name(Recipe(drloc='paper', tfms=t)) for t in ('none','strong','paper_exact')}
    assert len(names) == len(differ)+5
    assert run_name(Recipe(size=32)) == run_name(Recipe()) and run_name(Recipe(tfms='none', mix=False, size=64)) == 'cifar10-cvt_mini-none-aug_none-nomix-size64-s0'
    assert run_name(Recipe(name='mine')) == 'mine'
    with pytest.raises(ValueError, match='not a path'): Recipe(name='a/b').check()

def test_a_name_that_takes_anothers_file(tmp_path):
    "The weights of x.mlp would be the MLP's weights of x"
    with pytest.raises(ValueError, match="name='x.mlp'.*a run called 'x' keeps its localization MLP.*another name"): train(replace(small, name='x.mlp'), out=tmp_path, bar=False, device='cpu')
    assert not list(tmp_path.iterdir())
    Recipe(name='x.mlp2').check(); Recipe(name='mlp').check()

def test_committed_records_keep_their_names():
    "The recipe in each committed record, with the defaults of today for what it does not say, has the name of its file"
    files = sorted((Path(__file__).parents[1]/'nbs'/'results'/'runs').glob('*.json'))
    for f in files:
        kw = {k: v for k,v in json.loads(f.read_text())['recipe'].items() if k in Recipe.__dataclass_fields__}
        assert run_name(Recipe(**kw)) == f.stem
    assert files

def test_another_recipe_is_not_written_over(tmp_path):
    train(small, out=tmp_path, bar=False, device='cpu')
    before = (tmp_path/f'{run_name(small)}.json').read_text()
    with pytest.raises(ValueError, match='bs=64, now 32.*--name'): train(Recipe(**{**vars(small), 'bs':32}), out=tmp_path, bar=False, device='cpu')
    assert (tmp_path/f'{run_name(small)}.json').read_text() == before
    named = Recipe(**{**vars(small), 'bs':32, 'epochs':1, 'name':'half'})
    train(named, out=tmp_path, bar=False, device='cpu')
    assert (tmp_path/'half.json').exists() and (tmp_path/'half.safetensors').exists()

def test_share_is_stratified_and_its_own():
    "A tenth of each class, the same for every seed of a run, another for another `share_seed`"
    def images(**kw):
        ds = build(Recipe(**{**vars(small), 'bs':64, 'share':.1, **kw}), bar=False, device='cpu').dls.train.dataset
        return ds.x,ds.y
    (x,y),(x1,_),(x2,_) = images(),images(seed=1),images(share_seed=1)
    assert len(x) == 144 and max(abs(n-14.4) for n in y.bincount().tolist()) <= 1.
    assert torch.equal(x, x1) and not torch.equal(x, x2)
    with pytest.raises(ValueError, match='share=10'): Recipe(share=10).check()
    with pytest.raises(ValueError, match='fewer than one batch'): build(Recipe(**{**vars(small), 'bs':256, 'share':.1}), bar=False, device='cpu')

def test_share_in_the_record(tmp_path):
    r = Recipe(**{**vars(small), 'bs':64, 'share':.1, 'epochs':1})
    train(r, out=tmp_path, bar=False, device='cpu')
    rec = json.loads((tmp_path/f'{run_name(r)}.json').read_text())
    assert rec['data']['n_train'] == 144 and rec['recipe']['share'] == .1 and rec['data']['held'] == 'device'

def test_permuted_targets_keep_the_draws_and_lose_the_sense():
    "Same first weights, same pairs as the real task; each pair is asked for the next one's distance"
    from vt_drloc.loss import DrlocLoss, predict_pairs
    from vt_drloc.pairs import sample_pairs, targets
    from vt_drloc.train import PermutedTargets
    grid,g = torch.randn(4,16,8,8),lambda: torch.Generator().manual_seed(5)
    real,spoiled = DrlocLoss(16, seed=0),PermutedTargets(16, seed=0)
    assert all(torch.equal(a, b) for a,b in zip(real.parameters(), spoiled.parameters()))
    pairs = sample_pairs(4, 64, 8, 8, generator=g())
    t = targets(pairs, 8, 8, torch.float32).flatten(0, 1).roll(1, 0).view(4,64,2)
    byhand = (predict_pairs(real.mlp, grid, pairs)-t).abs().sum(-1).mean()
    torch.testing.assert_close(spoiled(grid, generator=g()), byhand)
    assert not torch.isclose(spoiled(grid, generator=g()), real(grid, generator=g()))

def test_detached_features_train_the_mlp_alone():
    from vt_drloc.loss import DrlocLoss
    from vt_drloc.train import DetachedFeatures
    grid,g = torch.randn(4,16,8,8, requires_grad=True),lambda: torch.Generator().manual_seed(5)
    real,spoiled = DrlocLoss(16, seed=0),DetachedFeatures(16, seed=0)
    loss = spoiled(grid, generator=g())
    torch.testing.assert_close(loss, real(grid, generator=g()))
    loss.backward()
    assert grid.grad is None and all(p.grad.abs().sum()>0 for p in spoiled.parameters())

def test_a_schedule_of_lambda_reaches_the_run(tmp_path):
    "The paper's form with the released ramp: lambda of each epoch is that of the schedule; without a name it is the preset's"
    r = Recipe(**{**vars(small), 'drloc':'paper', 'lambda_drloc':1.75, 'schedule':'ramp_decay', 'epochs':3})
    train(r, out=tmp_path, bar=False, device='cpu')
    es = json.loads((tmp_path/f'{run_name(r)}.json').read_text())['epochs']
    assert [e['lambda'] for e in es] == pytest.approx([0., 1.75/20, 2*1.75/20])
    learn = build(Recipe(**{**vars(small), 'drloc':'released', 'lambda_drloc':.5, 'schedule':'constant', 'epochs':2}), bar=False, device='cpu')
    with learn.no_logging(): learn.fit(2, small.lr)
    assert learn.drloc.lam == .5 and learn.drloc.loss_fn.preset == 'released'
    with pytest.raises(ValueError, match='schedule.*without a side task'): Recipe(schedule='cos').check()
    with pytest.raises(ValueError, match="'ramp'.*ramp_decay"): Recipe(drloc='paper', schedule='ramp').check()

def test_controls_reach_the_run():
    for control,name in (('permuted','PermutedTargets'),('detached','DetachedFeatures')):
        learn = build(Recipe(**{**vars(small), 'drloc':'paper', 'control':control, 'epochs':1}), bar=False, device='cpu')
        with learn.no_logging(): learn.fit(1, 1e-4)
        assert type(learn.drloc.loss_fn).__name__ == name and learn.drloc.lambda_drloc == .1
    with pytest.raises(ValueError, match='control.*without a side task'): Recipe(control='permuted').check()
    with pytest.raises(ValueError, match='permuted'): Recipe(drloc='paper', control='permute').check()

def test_position_leaves_no_trace(tmp_path):
    "Weights, generators and the rest of a script are those of a run without the report"
    def run(**kw):
        learn = train(Recipe(**{**vars(small), 'drloc':'paper', 'epochs':1}), bar=False, device='cpu', **kw)
        return learn.model.state_dict(),torch.rand(3),learn.drloc.generator.get_state(),[dl.rng.random() for dl in learn.dls]
    (w1,t1,g1,r1),(w2,t2,g2,r2) = run(),run(out=tmp_path, probe=2)
    assert all(torch.equal(w1[k], w2[k]) for k in w1) and torch.equal(t1, t2) and torch.equal(g1, g2) and r1==r2
    rec = json.loads((tmp_path/f"{run_name(Recipe(**{**vars(small), 'drloc':'paper'}))}.json").read_text())
    assert rec['position'].keys() == {'side_task','probe','images','seconds'} and rec['position']['images'] == 180
    assert rec['epochs'][-1]['train_s'] <= rec['epochs'][-1]['wall_s'] <= rec['wall_s'] < rec['epochs'][-1]['wall_s']+.5

@pytest.mark.parametrize('kw', [dict(), dict(variant='signed'), dict(variant='ce'), dict(pool='2x2'), dict(drloc='released', variant='reg')], ids=str)
def test_task_error_of_every_form(kw):
    "An MLP that knows nothing is at or above the level of guessing, and `task_error` agrees with `side_task_error` where both apply"
    from vt_drloc.train import grids, position_report, task_error
    from vt_drloc.hybrid import as_backbone
    learn = build(Recipe(**{**vars(small), 'drloc':'paper', 'epochs':1, **kw}), bar=False, device='cpu')
    with learn.no_logging(): learn.fit(1, 1e-5)
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    res = position_report(learn.model, x, learn.drloc.loss_fn, learn.drloc.where, steps=0)
    side = res['side_task']
    assert side['grid'] == ([2,2] if kw.get('pool') else [4,4]) and res.keys() == {'side_task','images'}
    assert sum(side['error']['images']) > .9*sum(side['guessing'])
    if not kw:
        a = task_error(learn.drloc.loss_fn, grids(as_backbone(learn.model.eval()), x), m=256)
        torch.testing.assert_close(a, side_task_error(learn.model, learn.drloc.loss_fn.mlp, x), rtol=1e-3, atol=1e-4)

def test_probe_finds_position_only_where_there_is_some():
    "On a grid that holds its coordinates the probe reads them; on noise it is no better than guessing"
    from vt_drloc.loss import best_guess
    from vt_drloc.train import fit_probe, task_error
    g = torch.Generator().manual_seed(0)
    row,col = torch.meshgrid(torch.arange(8.), torch.arange(8.), indexing='ij')
    noise = torch.randn(64,8,8,8, generator=g)
    told = torch.cat([noise[:,:6], torch.stack([row,col]).expand(64,-1,-1,-1)/4-1], 1)
    level = sum(best_guess(8,8).error)/2
    errors = [task_error(fit_probe(o[:32], steps=300, bs=32), o[32:]).mean().item() for o in (told, noise)]
    assert errors[0] < .4*level and errors[1] > .95*level

def test_position_is_asked_eagerly(tmp_path, monkeypatch):
    "A replayed graph hands out memory that its next replay overwrites, and every look at a compiled network would compile anew"
    import vt_drloc.train as t
    seen,stock = [],t.position_report
    probe = torch.compile(lambda: seen.append(torch.compiler.is_compiling()), backend='eager')
    monkeypatch.setattr(t, 'position_report', lambda *args, **kw: probe() or stock(*args, **kw))
    train(Recipe(**{**vars(small), 'drloc':'paper', 'epochs':1}), out=tmp_path, bar=False, device='cpu', probe=2)
    assert seen==[False]
    probe()
    assert seen==[False,True]
    torch.compiler.reset()

@pytest.mark.parametrize('bs,n,want', [(100,10_000,500), (512,10_000,500), (1024,10_000,1000), (64,360,360), (64,10_007,64)])
def test_batches_that_a_compiled_network_is_judged_in(bs, n, want):
    "All of one size, and not small ones, even if the training's are"
    from types import SimpleNamespace
    from vt_drloc.train import _same_batches
    dl = SimpleNamespace(bs=bs, n=n)
    _same_batches(dl)
    assert dl.bs == want

@pytest.mark.parametrize('size,device,want', [((32,32),'cuda',2048), ((224,224),'cuda',512), ((112,112),'cuda',2048), ((160,160),'cuda',1003), ((384,384),'cuda',512), ((32,32),'cpu',512)])
def test_small_images_are_judged_in_larger_batches(size, device, want):
    "On a GPU as many pixels as 512 images of 224 px have, but at most 2,048 images"
    from vt_drloc.train import _judged_at_once
    assert _judged_at_once(size, torch.device(device)) == want
