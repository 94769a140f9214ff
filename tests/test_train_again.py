"What a Learner is asked after, before and beside its run: validate, predict, lr_find, a second fit"
import json, subprocess, sys
from dataclasses import replace
import pytest, torch
from fastai.basics import Callback, load_learner
from fastai.vision.core import PILImage
from vt_drloc.models import demo_cvt
from vt_drloc.train import DeviceRecorder, Fp16, KeepWeights, Position, Recipe, RunRecord, TensorCores, build, run_name, train

small = Recipe(data='digits', model='demo_cvt', size=16, drloc='paper', m=8, epochs=2, bs=64, warmup=0, mix=False, tfms='none', share=.2)   # 287 images, 4 steps an epoch

def made(r=small, **kw): return build(r, bar=False, device='cpu', **kw)
def fit(learn, epochs=1, **kw):
    with learn.no_logging(): learn.fit(epochs, small.lr, **kw)
    return learn
def files(folder): return {f.name: f.read_bytes() for f in folder.glob('*.*') if f.is_file()}

@pytest.fixture
def photo(tmp_path):
    x = made().dls.valid.dataset.x[0]
    PILImage.create(x.permute(1,2,0).numpy()).save(tmp_path/'photo.bmp')
    return tmp_path/'photo.bmp'

# --- the files of a run

@pytest.mark.parametrize('ask', [lambda l,im: l.validate(), lambda l,im: l.get_preds(), lambda l,im: l.predict(im), lambda l,im: l.lr_find(show_plot=False, num_it=8)],
                         ids=['validate','get_preds','predict','lr_find'])
def test_what_is_asked_after_a_run_leaves_its_files(tmp_path, photo, ask):
    out = tmp_path/'out'
    learn = train(small, out=out, bar=False, device='cpu', probe=0)
    was = files(out)
    assert json.loads(was[f'{run_name(small)}.json'])['status']=='complete' and f'{run_name(small)}.safetensors' in was
    ask(learn, photo)
    assert files(out)==was

def test_a_look_before_the_run_writes_nothing(tmp_path):
    learn = made(out=tmp_path)
    learn.validate(); learn.get_preds(); learn.lr_find(show_plot=False, num_it=8)
    assert not files(tmp_path)
    fit(learn, small.epochs)                                # and the run itself is recorded
    assert json.loads((tmp_path/f'{run_name(small)}.json').read_text())['status']=='complete'

def test_a_second_fit_keeps_the_complete_record(tmp_path):
    learn = train(small, out=tmp_path, bar=False, device='cpu', probe=0)
    was = files(tmp_path)
    with pytest.raises(ValueError, match='complete record.*finished.*--name.*--out'): fit(learn)
    assert files(tmp_path)==was

def test_a_fit_by_hand_keeps_the_record_of_another_recipe(tmp_path):
    train(small, out=tmp_path, bar=False, device='cpu', probe=0)
    was,other = files(tmp_path),made(replace(small, lr=1e-3), out=tmp_path)
    with pytest.raises(ValueError, match='complete record of another run .lr=0.0005, now 0.001.*--name.*--out'): fit(other)
    assert files(tmp_path)==was

def test_the_same_recipe_may_be_run_again(tmp_path):
    "By `train`, or built anew and fitted by hand; what was cut short may be begun again"
    r = replace(small, epochs=1)
    for _ in range(2): train(r, out=tmp_path, bar=False, device='cpu', probe=0)
    fit(made(r, out=tmp_path, probe=0))
    short = fit(made(replace(r, name='short', epochs=2), out=tmp_path, probe=0))
    fit(short)
    assert json.loads((tmp_path/'short.json').read_text())['status']=='cut short'

def test_a_run_that_goes_on_keeps_its_record(tmp_path):
    train(small, out=tmp_path, bar=False, device='cpu', probe=0, minutes=1e-6)
    learn = train(small, out=tmp_path, bar=False, device='cpu', probe=0, resume=True)
    rec = json.loads((tmp_path/f'{run_name(small)}.json').read_text())
    assert rec['status']=='complete' and len(rec['epochs'])==2 and len(rec['resumed'])==1
    with pytest.raises(ValueError, match='complete record'): fit(learn)

# --- a Learner that is asked

@pytest.fixture(params=['as built','TensorCores','Fp16'])
def learn(request, tmp_path):
    "As built for the CPU, and with what a GPU's run has beside it"
    (tmp_path/'out').mkdir()
    learn = made(out=tmp_path/'out', probe=0)
    return learn.add_cb({'TensorCores': TensorCores, 'Fp16': lambda: Fp16('cpu')}[request.param]()) if request.param!='as built' else learn

@pytest.mark.parametrize('fitted', [False, True])
def test_a_built_learner_can_be_asked(learn, photo, fitted):
    "Twice: a callback that raised would leave the lock of the first time, and the second would wait for ever"
    if fitted: fit(learn, small.epochs)
    for _ in range(2):
        loss,acc = learn.validate()[:2]
        preds,ys = learn.get_preds()
        label,i,p = learn.predict(photo)
    assert len(preds)==len(ys)==360 and acc==pytest.approx((preds.argmax(1)==ys).float().mean().item(), abs=1e-6)
    torch.testing.assert_close(preds.float().sum(1), torch.ones(360), rtol=0, atol=1e-3)       # probabilities
    assert label==learn.dls.vocab[i]==learn.dls.vocab[p.argmax()]
    assert torch.get_float32_matmul_precision()=='highest'
    if fitted: learn.remove_cbs([RunRecord,KeepWeights,Position])
    fit(learn)                                              # and trained after it

@pytest.mark.parametrize('fitted', [False, True])
def test_an_exported_learner_can_be_asked(learn, photo, fitted):
    if fitted: fit(learn, small.epochs)
    want,was = learn.predict(photo),files(learn.path)
    learn.export('learner.pkl')
    again = load_learner(learn.path/'learner.pkl')
    for _ in range(2): got = again.predict(photo)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-6)
    assert got[0]==want[0] and files(learn.path).keys()-was.keys()=={'learner.pkl'}

def test_decay_is_marked_all_the_same():
    learn = made()
    learn.validate()
    fit(learn)
    marks = {n: learn.opt.state[p]['do_wd'] for n,p in learn.model.named_parameters()}
    assert set(marks.values())=={True,False} and all(m==(learn.model.get_parameter(n).ndim>1 and not n.endswith(('pos_embed','table'))) for n,m in marks.items())

# --- lr_find

@pytest.mark.parametrize('drloc', ['none','paper'])
def test_lr_find_suggests_what_it_does_with_fastais_recorder(drloc):
    from fastai.basics import Recorder
    def found(stock):
        learn = made(replace(small, drloc=drloc))
        if stock: learn.remove_cb(learn.recorder); learn.add_cb(Recorder())
        res = learn.lr_find(show_plot=False, num_it=30)
        return res.valley,learn.recorder.lrs,[float(o) for o in learn.recorder.losses]
    (lr,lrs,losses),want = found(False),found(True)
    assert 1e-7 < lr < 10 and len(lrs)==len(losses) > 10 and (lr,lrs,losses)==want

def test_a_run_after_lr_find_has_the_recorders_plain_mean():
    learn,seen = made(),[]
    learn.lr_find(show_plot=False, num_it=10)
    class See(Callback):
        order = 70
        def after_batch(self): self.training and seen.append(self.loss.item())
    fit(learn, cbs=See())
    assert isinstance(learn.recorder,DeviceRecorder) and learn.recorder.values[0][0]==pytest.approx(sum(seen)/len(seen), rel=1e-5) and not learn.recorder.losses

# --- several processes

two_ask = """
import sys, torch
sys.path.insert(0, 'tests')
from test_train_again import *
from vt_drloc.gpus import processes
with processes('cpu'):
    learn = made(small)
    before = learn.validate()[:2]
    fit(learn)
    logged,after = learn.recorder.values[-1][1:3],learn.validate()[:2]
    def right(): preds,ys = learn.get_preds(); return len(ys),(preds.argmax(1)==ys).float().mean().item()
    n,acc = right()
    if not torch.distributed.get_rank(): assert right()==(n,acc)              # one process alone
    print('RES', json.dumps([list(before), list(logged), list(after), n, acc]), flush=True)
learn.validate(); learn.get_preds()                                          # the processes have parted
"""

def test_processes_judge_together():
    out = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no-python', sys.executable, '-c', two_ask],
                         capture_output=True, text=True, timeout=240)
    assert not out.returncode, out.stderr[-2000:]
    (a,b) = (json.loads(l[4:]) for l in sorted(out.stdout.splitlines()) if l.startswith('RES'))
    assert a==b and a[3]==360 and a[4]==pytest.approx(a[2][1], abs=1e-6)
    assert a[1]==pytest.approx(a[2], rel=1e-6)                               # asked afterwards: what the fit has logged
    assert a[0]==pytest.approx(list(made(small).validate()[:2]), rel=1e-5)   # and what one process says of the same weights

# --- the side task's error, and on which images

@pytest.mark.parametrize('kw', [dict(preset='released'), dict(variant='signed'), dict(pool='2x2'), dict(variant='ce', k=8), dict(dim=[64,64], variant='all')], ids=str)
def test_an_mlp_of_another_form_is_refused(kw):
    from vt_drloc.train import side_task_error
    from vt_drloc.variants import DrlocFamily
    loss = DrlocFamily(**{'dim':64, **kw})
    for mlp in (loss.mlp, loss):
        with pytest.raises(ValueError, match=rf'mlp is a {type(mlp).__name__}.*LocalizationMLP.*task_error\(loss'): side_task_error(demo_cvt(1), mlp, torch.zeros(2,3,32,32))

def test_an_mlp_of_ones_own_in_the_papers_units_is_taken():
    from vt_drloc.loss import LocalizationMLP
    from vt_drloc.train import side_task_error
    class Scaled(LocalizationMLP):
        def forward(self, x): return super().forward(x)/2
    for make in (LocalizationMLP, Scaled): assert side_task_error(demo_cvt(1), make(64), torch.zeros(2,3,32,32)).shape==(2,)

@pytest.mark.parametrize('n', [1, 16, 128, 4096, 10_000, 20_000])
def test_which_images_does_not_depend_on_the_batch(n):
    from vt_drloc.train import some_images
    class Loader:
        n = 10_000
        def __init__(self, bs): self.bs = bs
        def __iter__(self): return iter([(o,) for o in torch.arange(10_000)[:,None,None,None].split(self.bs)])
    want = torch.arange(0, 10_000, max(1, 10_000//n))
    for bs in (3, 500, 512, 2000, 10_000): assert torch.equal(some_images(Loader(bs), n).flatten(), want)

# --- what a recipe refuses

@pytest.mark.parametrize('kw,says', [
    (dict(epochs=2.5), 'epochs=2.5: give a whole number, such as 100'), (dict(epochs='2'), "epochs='2': give a whole number"), (dict(m=2.5), 'm=2.5: .*such as 64'),
    (dict(seed=1.5), 'seed=1.5: give a whole number'), (dict(seed=None), 'seed=None: give a whole number'), (dict(bs=None), 'bs=None: give a whole number, such as 512'),
    (dict(bs=True), 'bs=True: give a whole number'), (dict(laid_out=2.5), 'laid_out=2.5: give a whole number, or leave it out'), (dict(heldout=.1), 'heldout=0.1: give a whole'),
    (dict(epochs=float('inf')), 'epochs=inf: give a whole number'), (dict(lambda_drloc='0.1', drloc='paper'), "lambda_drloc='0.1': give a number, or leave it out"),
    (dict(share='a'), "share='a': give a number, such as 1.0"), (dict(lr=None), 'lr=None: give a number'), (dict(warmup=True), 'warmup=True: give a number'),
    (dict(mix='no'), "mix='no': give True or False$"), (dict(compile=None), 'compile=None: give True or False'),
    (dict(size=(16,32)), r'size=\(16, 32\): give one side in pixels.*get_dls and create_model.*\(height, width\)'), (dict(size=16.), 'size=16.0: give a whole number, or leave it out')], ids=str)
def test_a_recipe_refuses_what_is_not_of_its_kind(kw, says):
    with pytest.raises(ValueError, match=says): Recipe(**kw).check()

def test_a_recipe_takes_whole_numbers_where_fractions_may_stand():
    r = Recipe(warmup=5, lr=1, share=1, drloc='paper', lambda_drloc=0, drop_path=0, clip=5, size=None, laid_out=None).check()
    assert r.check()==r

# ---- a run's checkpoints, and what came of a graph

@pytest.mark.parametrize('ask', [lambda l: l.validate(), lambda l: l.get_preds(), lambda l: l.lr_find(show_plot=False, num_it=5)], ids=['validate','get_preds','lr_find'])
def test_checkpoints_sleep(ask, tmp_path):
    "Outside a run nothing is written, and nothing is asked of a fit that is not there"
    learn = made(replace(small, name='a'), out=tmp_path, save_every='2')
    with learn.no_logging(), learn.no_bar(): ask(learn)
    assert not list(tmp_path.glob('*.ckpt'))
    fit(learn, small.epochs)
    assert json.loads((tmp_path/'a.json').read_text())['status']=='complete'
    with learn.no_logging(), learn.no_bar(): ask(learn)

def test_a_graph_that_cannot_be_is_said():
    with pytest.warns(UserWarning, match='step_graph: no step is recorded as a graph with the network on the cpu'): made(replace(small, step_graph=True))

def test_a_record_says_what_came_of_a_graph(tmp_path):
    from vt_drloc.step_graph import StepGraph, Tape
    learn = made(replace(small, name='g'), out=tmp_path)
    learn.add_cb(StepGraph(kind=Tape))
    fit(learn, small.epochs)
    rec = json.loads((tmp_path/'g.json').read_text())
    assert rec['one_graph']['why']=='' and rec['one_graph']['recorded']>=1

@pytest.mark.parametrize('look', ['side_task_error','position_report','pool'])
def test_looking_at_position_keeps_frozen_norms_frozen(look):
    from vt_drloc.loss import LocalizationMLP
    from vt_drloc.train import _pool, position_report, side_task_error
    net,x = demo_cvt(10).train(), torch.randn(4, 3, 16, 16)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.eval()
    before = [m.training for m in net.modules()]
    dict(side_task_error=lambda: side_task_error(net, LocalizationMLP(net.num_features, 16), x, 8), position_report=lambda: position_report(net, x, steps=1),
         pool=lambda: _pool(replace(small, pool='auto'), net, (16,16)))[look]()
    assert norms and [m.training for m in net.modules()]==before
