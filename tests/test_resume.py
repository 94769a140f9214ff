"Interrupted runs: killed for real and resumed, several processes, half precision, damaged files"
import json, os, signal, socket, subprocess, sys, time, warnings
from pathlib import Path
from types import SimpleNamespace
import fastai, numpy as np, pytest, torch
from PIL import Image
from torch import nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from fastai.basics import Callback, CancelFitException, DataLoader, DataLoaders, Learner, OptimWrapper, accuracy, partial, set_seed
import vt_drloc.models as models
import vt_drloc.resume as mod
import vt_drloc.train as tr
from vt_drloc.callback import DrlocCallback
from vt_drloc.data import MemoryImages
from vt_drloc.resume import Checkpoints, ResumeError, _row_sums, checkpoints, fingerprint, go_on, newest_checkpoint, read_checkpoint, write_checkpoint
from vt_drloc.train import Fp16, FusedAdamW, Recipe, build, precision_on, run_name, train

STEPS = 5                                                                  # of an epoch: 80 images in batches of 16
common = dict(model='demo_cvt', drloc='paper', epochs=2, bs=16, size=16, lr=.01, warmup=0, drop_path=.1)   # augmented, mixed, dropped: all that is random
name = run_name(Recipe('noise', **common))

def noise(folder):
    "A folder of 80 + 24 images of two classes"
    rng = np.random.RandomState(0)
    for part,n in (('train',80), ('valid',24)):
        for i in range(n):
            (d := folder/part/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray((rng.rand(32,32,3)*128 + 127*(i%2)).astype(np.uint8)).save(d/f'{i}.png')
    return folder

# --- real processes, killed by the operating system

class Kill(Callback):
    "SIGKILL to the own process: no handler, no `finally`, no buffer gets its turn"
    order = 100
    def __init__(self, event, at): self.at = at; setattr(self, event, self._kill)
    def _kill(self):
        if self.train_iter==self.at: os.kill(os.getpid(), signal.SIGKILL)

def die_in_flush(n):
    "Kill at the flush of the n-th checkpoint from now: the file is written, but has not its name yet"
    stock,count = models.flush,[0]
    def flush(path):
        stock(path)
        count[0] += '.ckpt' in Path(path).name
        if count[0]==n: os.kill(os.getpid(), signal.SIGKILL)
    models.flush = flush

def child(out, kill=None, flush=None, rank=None, port=0, **kw):
    "A process that runs the console script; its id"
    if pid := os.fork(): return pid
    try:
        if rank is not None: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        sys.stdout = sys.stderr
        if flush: die_in_flush(flush)
        if kill:
            stock = tr.build
            tr.build = lambda *args, **kwargs: stock(*args, **kwargs).add_cb(Kill(*kill))
        tr.main(**{**common, 'data':str(out.parent/'noise'), **kw}, out=str(out), device='cpu', no_bar=True)
        code = 0
    except SystemExit as e: code = 3 if e.code else 0; print(e, file=sys.stderr)
    except BaseException as e: code = 2; print(repr(e), file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)

def wait(*pids):
    "0 for each that ended well, -9 for each that was killed"
    return [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]

def pair(out, **kw):
    "Two processes of one group"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    return [child(out, rank=r, port=port, **kw) for r in (0,1)]

kills = dict(before_the_first_checkpoint_is_due=[('after_batch',1)], mid_epoch=[('after_batch',3)], in_a_backward_pass=[('after_backward',7)],
             before_validation=[('before_validate',STEPS)], at_the_end_of_an_epoch=[('after_epoch',STEPS)], in_the_last_validation=[('after_validate',2*STEPS)],
             twice=[('after_batch',4), ('after_batch',8)])

def server(path):
    "All runs, forked from one process that has the imports behind it, those of a first step too"
    import timm.data, torch._dynamo
    path,res = Path(path),{}
    noise(path/'noise')
    res['alone'] = wait(child(path/'alone'))
    for k,points in kills.items():
        res[k] = []
        for i,p in enumerate(points): res[k] += wait(child(path/k, kill=p, save_every='2', resume=i>0))
        res[k] += wait(child(path/k, save_every='2', resume=True))
    res['in_a_write'] = wait(child(path/'in_a_write', flush=3, save_every='2')) + wait(child(path/'in_a_write', save_every='2', resume=True))
    res['other_lr'] = wait(child(path/'other', kill=('after_batch',3), save_every='2')) + wait(child(path/'other', save_every='2', resume=True, lr=1e-3))
    res['two'] = wait(*pair(path/'two'))
    pids = pair(path/'two_killed', kill=('after_batch',7), save_every='2')
    res['two_killed'] = wait(*pids) + wait(*pair(path/'two_killed', save_every='2', resume=True))
    res['two_limited'] = wait(*pair(path/'two_limited', minutes=1e-6)) + wait(*pair(path/'two_limited', resume=True))
    (path/'codes.json').write_text(json.dumps(res))

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp('killed')
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}
    res = subprocess.run([sys.executable, '-c', f"import test_resume as t; t.server({str(path)!r})"], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=900)
    if res.returncode: pytest.fail(res.stderr[-3000:], pytrace=False)
    return path,json.loads((path/'codes.json').read_text()),res.stderr

def outcome(folder):
    "Weights, the MLP's weights and the record of a run"
    return load_file(folder/f'{name}.safetensors'),load_file(folder/f'{name}.mlp.safetensors'),json.loads((folder/f'{name}.json').read_text())

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
times = {'started','wall_s','images_per_s','train_s','seconds','resumed'}
def timeless(x):
    if isinstance(x, dict): return {k: timeless(v) for k,v in x.items() if k not in times}
    return [timeless(v) for v in x] if isinstance(x, list) else x

@pytest.mark.parametrize('where', [*kills, 'in_a_write'])
def test_killed_and_resumed_is_never_interrupted(runs, where):
    path,codes,err = runs
    assert codes['alone']==[0] and codes[where]==[-9]*(len(codes[where])-1)+[0], err
    (w,mlp,rec),(w2,mlp2,rec2) = outcome(path/'alone'),outcome(path/where)
    assert same(w, w2) and same(mlp, mlp2)
    assert timeless(rec)==timeless(rec2) and rec2['status']=='complete' and 'resumed' not in rec
    assert len(rec2['resumed'])==len(codes[where])-1
    for r in rec2['resumed']: assert {'epoch','done','step','started','revision'} <= set(r) and r['step'] == r['epoch']*STEPS+r['done']
    assert not list((path/where).glob('*.ckpt*')) and not list((path/where).glob('*.tmp'))

def test_record_says_from_where(runs):
    path,_,_ = runs
    at = {k: [r['step'] for r in outcome(path/k)[2]['resumed']] for k in ('before_the_first_checkpoint_is_due','mid_epoch','twice')}
    assert at['before_the_first_checkpoint_is_due']==[0] and at['mid_epoch'][0] in (0,2) and at['twice'][1] in (6,8)   # the last write may have been under way; one begins only when that before it has ended

def test_other_settings_are_an_error_that_names_them(runs):
    path,codes,err = runs
    assert codes['other_lr']==[-9,3] and 'recipe.lr: 0.01 in the checkpoint, 0.001 now' in err
    assert checkpoints(path/'other'/name)                                   # nothing was touched

def test_two_processes_killed_and_resumed(runs):
    path,codes,err = runs
    assert codes['two']==[0,0] and sorted(codes['two_killed'][:2])==[-9,-9] and codes['two_killed'][2:]==[0,0], err
    (w,mlp,rec),(w2,mlp2,rec2) = outcome(path/'two'),outcome(path/'two_killed')
    assert same(w, w2) and same(mlp, mlp2) and timeless(rec)==timeless(rec2)
    assert rec['processes']==2 and len(list((path/'two').iterdir()))==3      # record, weights, MLP: written once
    one = outcome(path/'alone')[2]
    for a,b in zip(rec['epochs'], one['epochs']):
        assert a['lr']==b['lr'] and abs(a['train_loss']-b['train_loss']) < .15*b['train_loss']   # unscaled, other draws

def test_time_limit_of_two_processes(runs):
    "Both stop at the same step, by rank 0's clock; here it is the last one, so that only validation is left"
    path,codes,err = runs
    assert codes['two_limited']==[0]*4 and f'stopped at step {2*STEPS}, in epoch 2 of 2' in err, err
    (w,mlp,_),(w2,mlp2,rec) = outcome(path/'two'),outcome(path/'two_limited')
    assert same(w, w2) and same(mlp, mlp2) and (rec['resumed'][0]['done'],rec['status'])==(STEPS,'complete')

# --- in this process: stopped by an exception

class Stop(Callback):
    order = 100
    def __init__(self, step): self.step = step
    def after_batch(self):
        if self.training and self.train_iter==self.step: raise CancelFitException()

@pytest.fixture
def recipe(runs): return Recipe(**common, data=str(runs[0]/'noise'))

@pytest.fixture
def stopped(tmp_path, recipe):
    "The folder of a run that stopped in its first epoch, with two checkpoints, at steps 2 and 4"
    learn = build(recipe, out=tmp_path, bar=False, device='cpu', save_every='2')
    with learn.no_logging(): learn.fit(recipe.epochs, recipe.lr, cbs=Stop(4))
    assert [f.name for f in checkpoints(tmp_path/name)] == [f'{name}.{s:08d}.ckpt' for s in (4,2)]
    return tmp_path

def resume(path, r, **kw): return train(r, out=path, bar=False, device='cpu', save_every='2', resume=True, **kw)

def test_damaged_checkpoints(stopped, recipe, runs):
    new,old = checkpoints(stopped/name)
    new.write_bytes(new.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='cut short.*going on from the one before'): learn = resume(stopped, recipe)
    assert same(learn.model.state_dict(), outcome(runs[0]/'alone')[0])
    rec = outcome(stopped)[2]
    assert [r['step'] for r in rec['resumed']]==[2]

def test_no_whole_checkpoint_and_no_code_from_a_file(stopped, recipe):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(stopped/'owned'),)
    for f in checkpoints(stopped/name): torch.save(Evil(), f)
    with pytest.raises(ResumeError, match='no checkpoint of this run is whole.*start anew'): resume(stopped, recipe)
    assert not (stopped/'owned').exists()

def test_beginning_anew_over_a_checkpoint_is_refused(stopped, recipe):
    with pytest.raises(ResumeError, match='not finished.*resume=True'): train(recipe, out=stopped, bar=False, device='cpu')

@pytest.mark.parametrize('change,match', [('fastai','versions.fastai: .* in the checkpoint, 9.9 now'), ('threads','OMP_NUM_THREADS'), ('data','data.fingerprint')])
def test_what_else_must_not_have_changed(stopped, recipe, monkeypatch, change, match):
    if change=='fastai': monkeypatch.setattr(fastai, '__version__', '9.9')
    if change=='threads': monkeypatch.setattr(torch, 'get_num_threads', lambda: 77)
    if change=='data':
        stock = tr.get_dls
        def get_dls(*args, **kw):
            dls = stock(*args, **kw)
            dls.train.dataset.x = dls.train.dataset.x.flip(-1)
            return dls
        monkeypatch.setattr(tr, 'get_dls', get_dls)
    with pytest.raises(ResumeError, match=match): resume(stopped, recipe)

def test_nothing_to_resume(tmp_path, recipe):
    r = Recipe(**{**vars(recipe), 'epochs':1, 'bs':80, 'drloc':'none'})
    train(r, out=tmp_path, bar=False, device='cpu')
    with pytest.raises(ResumeError, match='complete'): resume(tmp_path, r)
    with pytest.raises(ValueError, match='give `out`'): build(r, bar=False, device='cpu', minutes=1.)

def test_the_first_time_resume_begins(tmp_path, runs, recipe, capsys):
    "One command for the first time and every time after; it says what it does, and what waits under other names"
    (tmp_path/'other-s0.00000004.ckpt').write_bytes(b'')
    out = tmp_path/'new'/'folder'
    learn = resume(out, recipe)
    assert f'nothing of {name} in {out} to go on from: it starts at the beginning\n' in capsys.readouterr().out
    assert same(learn.model.state_dict(), outcome(runs[0]/'alone')[0]) and 'resumed' not in outcome(out)[2]
    with pytest.raises(ResumeError, match='complete'): resume(out, recipe)
    (tmp_path/f'{name}.json').write_text(json.dumps(dict(status='cut short', recipe={}, epochs=[])))     # killed before its first checkpoint
    tr._start(None, tmp_path/name, True)
    assert 'it starts at the beginning; there are checkpoints of other-s0\n' in capsys.readouterr().out

@pytest.mark.parametrize('kind,lies', [('json', dict(epochs=[dict(accuracy=.5)])), ('json', dict(epochs=[], stopped=dict(why='time limit'))), ('safetensors', None)])
def test_resume_does_not_begin_over_what_lies_there(kind, lies, tmp_path, recipe):
    "Epochs of a run whose checkpoints are gone, or weights without a record"
    file = tmp_path/f'{name}.{kind}'
    file.write_text(json.dumps(dict(status='cut short', recipe={}, **lies)) if lies else 'weights')
    was = file.read_bytes()
    with pytest.raises(ResumeError, match='is the folder right'): resume(tmp_path, recipe)
    assert file.read_bytes()==was

def test_a_run_goes_on_under_another_name(stopped, recipe, runs):
    "As one must whose default name has changed since"
    for f in list(stopped.iterdir()): f.rename(f.with_name(f.name.replace(name, 'old', 1)))
    resume(stopped, Recipe(**{**vars(recipe), 'name':'old'}))
    assert same(load_file(stopped/'old.safetensors'), outcome(runs[0]/'alone')[0]) and json.loads((stopped/'old.json').read_text())['status']=='complete'

def test_a_run_whose_name_goes_on_after_a_dot_is_another(tmp_path, recipe, capsys):
    "The run `exp` begins beside what lies there of `exp.2`, refuses nothing for it and leaves it"
    def named(n): return Recipe(**{**vars(recipe), 'name':n, 'epochs':1, 'drloc':'none'})
    learn = build(named('exp.2'), out=tmp_path, bar=False, device='cpu', save_every='2')
    with learn.no_logging(): learn.fit(1, recipe.lr, cbs=Stop(4))
    (tmp_path/'exp.2.safetensors').write_bytes(b'')
    was = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert sorted(was)==['exp.2.00000002.ckpt','exp.2.00000004.ckpt','exp.2.json','exp.2.safetensors']
    train(named('exp'), out=tmp_path, bar=False, device='cpu', save_every='2')
    for f in tmp_path.glob('exp.*'):
        if f.name not in was: f.unlink()
    resume(tmp_path, named('exp'))
    assert 'nothing of exp in' in capsys.readouterr().out and {f.name: f.read_bytes() for f in tmp_path.glob('exp.2.*')}==was
    with pytest.raises(ResumeError, match=r'remove \S+exp.2.00000004.ckpt and \S+exp.2.00000002.ckpt to begin anew'): train(named('exp.2'), out=tmp_path, bar=False, device='cpu')

@pytest.mark.parametrize('text', ['', '{"format": 1, "sta', 'null', '{"epochs": []}', b'\xff\xfe'])
def test_a_damaged_record_is_said_and_once_removed_the_run_goes_on(text, stopped, recipe, runs):
    file = stopped/f'{name}.json'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    was = {f: f.read_bytes() for f in stopped.iterdir()}
    for again in (True, False):
        with pytest.raises(ValueError, match=f'{name}.json is no run record, or a damaged one.*remove it'): train(recipe, out=stopped, bar=False, device='cpu', resume=again)
    with pytest.raises(ValueError, match=f'{name}.json is no run record'): tr.read_records(stopped)
    assert {f: f.read_bytes() for f in stopped.iterdir()}==was
    if text: return
    file.unlink()
    learn = resume(stopped, recipe)
    w,_,rec = outcome(runs[0]/'alone')
    assert same(learn.model.state_dict(), w) and timeless(outcome(stopped)[2])==timeless(rec)

def test_a_damaged_record_without_a_checkpoint(tmp_path, recipe, capsys):
    "`_start` and `_begun` read it for themselves"
    (tmp_path/f'{name}.json').write_text('')
    for f in (partial(tr._start, None, tmp_path/name, True), partial(tr._begun, tmp_path/name)):
        with pytest.raises(ValueError, match='no run record, or a damaged one'): f()
    (tmp_path/f'{name}.json').unlink()
    tr._start(None, tmp_path/name, True)
    assert 'it starts at the beginning' in capsys.readouterr().out

def test_time_limit(tmp_path, runs, recipe, capsys):
    settings = dict(common, data=recipe.data)
    tr.main(**settings, out=str(tmp_path), device='cpu', no_bar=True, minutes=1e-6)
    assert 'stopped at step 1, in epoch 1 of 2: time limit' in (said := capsys.readouterr().out) and '--resume' in said
    rec = json.loads((tmp_path/f'{name}.json').read_text())
    assert rec['status']=='cut short' and rec['stopped']['step']==1 and rec['epochs']==[]
    tr.main(**settings, out=str(tmp_path), device='cpu', no_bar=True, minutes=1e-6, resume=True)
    assert json.loads((tmp_path/f'{name}.json').read_text())['stopped']['step']==2
    learn = resume(tmp_path, recipe)
    (w,_,_),(w2,_,rec) = outcome(runs[0]/'alone'),outcome(tmp_path)
    assert same(w, w2) and rec['status']=='complete' and 'stopped' not in rec and [r['step'] for r in rec['resumed']]==[1,2]

def memory(n=600, hw=(9,7), **kw):
    g = torch.Generator().manual_seed(0)
    ds = [MemoryImages(torch.randint(256, (k,3,*hw), dtype=torch.uint8, generator=g), torch.randint(4, (k,), generator=g), list('abcd'), i, **kw) for i,k in enumerate((n,20))]
    return [SimpleNamespace(dataset=d) for d in ds]

def test_the_fingerprint_sees_every_pixel_and_label():
    "Any bit of any image, in training and validation; two images that changed places; a label. 189 bytes an image: not a multiple of 8"
    was,state = fingerprint(memory()),torch.get_rng_state()
    assert was==fingerprint(memory()) and torch.equal(state, torch.get_rng_state())
    for which,i,c,r,q in ((0,1,0,0,0), (0,2,2,8,6), (0,599,1,4,3), (1,19,2,8,6)):
        dls = memory()
        dls[which].dataset.x[i,c,r,q] ^= 128
        assert fingerprint(dls)!=was, (which,i,c,r,q)
    for change in (lambda d: d.x[[3,4]].flip(0), lambda d: d.x.flip(-1)):
        dls = memory(); d = dls[0].dataset
        new = change(d)
        d.x[3:5] = new if len(new)==2 else new[3:5]
        assert fingerprint(dls)!=was
    dls = memory(); dls[0].dataset.y[7] = (dls[0].dataset.y[7]+1)%4
    assert fingerprint(dls)!=was

def test_the_fingerprint_of_a_mapped_set_reads_some_images(monkeypatch):
    "Its limit, as the chapter says it: every third of 600 images, and never more than 256"
    def changed(i):
        dls = memory(held='mapped')
        dls[0].dataset.x[i] ^= 1
        return fingerprint(dls)
    assert changed(3)!=fingerprint(memory(held='mapped'))==changed(1)==changed(2)
    read = []
    monkeypatch.setattr(mod, '_row_sums', lambda x: read.append(len(x)) or _row_sums(x))
    for n in (1, 255, 256, 257, 511, 512, 600): fingerprint(memory(n, held='mapped'))
    assert read[::2]==[1, 255, 256, 129, 256, 256, 200] and set(read[1::2])=={20}

def test_row_sums_in_pieces():
    "In one piece or in many, the same sums; no two of ten thousand images have the same"
    x = torch.randint(256, (10_000,3,32,32), dtype=torch.uint8)
    sums = _row_sums(x)
    assert torch.equal(sums, torch.cat([_row_sums(o) for o in x.split(777)])) and len(set(sums.tolist()))==len(x)

def test_differences():
    assert mod.differences(dict(a=1, b=dict(c=[1,2])), dict(a=1., b=dict(c=[1,2])))==[]      # 1 from the one caller, 1.0 from the other
    assert mod.differences(dict(a=None), dict(a=0))==['a: None in the checkpoint, 0 now'] and mod.differences({}, dict(b=1))==['b: absent in the checkpoint, 1 now']

# --- files

def written(path, step, **kw): return write_checkpoint(path, dict(at=dict(step=step), **kw))

def test_files_of_a_run_whose_name_goes_on_after_a_dot(tmp_path):
    "Those of `exp.2` are not listed, read, counted or removed as those of `exp`; nor is what else looks like one"
    others = [written(tmp_path/'exp.2', 9), written(tmp_path/'exp.00000001', 8), written(tmp_path/'expo', 7)]
    for o in ('exp.0000001.ckpt', 'exp.00000001.ckpt.ckpt', 'exp.best.ckpt', 'exp.00000003.ckpt.old'): (tmp_path/o).write_bytes(b''); others.append(tmp_path/o)
    assert checkpoints(tmp_path/'exp')==[]
    with pytest.raises(ResumeError, match='is the folder right'): newest_checkpoint(tmp_path/'exp')
    for step in (1,2,3): written(tmp_path/'exp', step)
    assert [f.name for f in checkpoints(tmp_path/'exp')]==['exp.00000003.ckpt','exp.00000002.ckpt'] and checkpoints(tmp_path/'exp.2')==others[:1]
    assert newest_checkpoint(tmp_path/'exp')[0]['at']['step']==3 and all(o.exists() for o in others)

def test_names_with_signs_and_many_steps(tmp_path):
    "Signs that mean something in a pattern; a step of nine digits is newer than one of eight"
    for name in ('a[1]','a*','a+'):
        for step in (99_999_999, 100_000_000): written(tmp_path/name, step)
        assert [f.name for f in checkpoints(tmp_path/name)]==[f'{name}.100000000.ckpt', f'{name}.99999999.ckpt']

def test_any_flipped_bit(tmp_path):
    "Header and tensors: damage is said, and the older file is read"
    for step in (1,2): file = written(tmp_path/'x', step, model=dict(w=torch.randn(4, 3), b=torch.zeros(3)), own=[dict(now=[1,2,3])])
    raw = file.read_bytes()
    assert 8*len(raw) > 4000
    for i in range(len(raw)):
        for b in range(8):
            file.write_bytes(raw[:i] + bytes([raw[i]^1<<b]) + raw[i+1:])
            with pytest.raises(ResumeError, match='remove it'): read_checkpoint(file)
    for word in (b'"digest"', b'"state"', b'"format"'):
        file.write_bytes(raw.replace(word, b'"' + bytes([word[1]^1]) + word[2:]))
        state,_,passed = newest_checkpoint(tmp_path/'x')
        assert state['at']['step']==1 and len(passed)==1

def test_the_checksum_holds_names_types_and_shapes(tmp_path):
    "The same bytes under other names, of another type, in another shape"
    file = written(tmp_path/'x', 1, a=torch.arange(6.).view(2, 3), b=torch.arange(6.).view(2, 3))
    with safe_open(file, 'pt') as f: meta,ts = f.metadata(),{k: f.get_tensor(k) for k in f.keys()}
    assert set(ts)=={'0','1'}
    for change in (lambda t: {'0': t['0'], '2': t['1']}, lambda t: {**t, '1': t['1'].view(torch.int32)}, lambda t: {**t, '1': t['1'].view(3, 2)}, lambda t: {'0': t['0']}):
        save_file(change(ts), file, metadata=meta)
        with pytest.raises(ResumeError, match='its checksum differs'): read_checkpoint(file)
    save_file(ts, file, metadata=meta)
    assert read_checkpoint(file)['b'].shape==(2,3)

@pytest.mark.parametrize('n', [1,3])
def test_a_checkpoint_of_another_format(n, tmp_path):
    file = written(tmp_path/'x', 1)
    file.write_bytes(file.read_bytes().replace(b'vt_drloc checkpoint 2', b'vt_drloc checkpoint %d' % n))
    with pytest.raises(ResumeError, match=f"is a 'vt_drloc checkpoint {n}', and this version of vt_drloc reads 'vt_drloc checkpoint 2': go on with the version"): read_checkpoint(file)

# --- other Learners

def points(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=g)
    return list(zip(x, (x.mean((1,2,3))>0).long()))

class Tiny(nn.Module):
    num_prefix_tokens,output_fmt,num_features = 0,'NCHW',6
    def __init__(self):
        super().__init__()
        self.conv,self.drop,self.head = nn.Conv2d(3, 6, 2, 2),nn.Dropout(.2),nn.Linear(6, 2)
    def forward_features(self, x): return self.conv(x).tanh()
    def forward_head(self, f, pre_logits=False): return self.head(self.drop(f.mean((2,3))))
    def forward(self, x): return self.forward_head(self.forward_features(x))

def learner(path, *cbs, workers=0, device='cpu', noisy=False, **kw):
    set_seed(0)
    item = dict(after_item=lambda b: (b[0]+torch.rand(1), b[1])) if noisy else {}
    dls = DataLoaders(DataLoader(points(), bs=8, shuffle=True, drop_last=True, num_workers=workers, **item), DataLoader(points(16, 1), bs=8), device=torch.device(device))
    learn = Learner(dls, Tiny().to(device), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, lr=.01,
                    cbs=[DrlocCallback(.5, m=8, hidden=16), Checkpoints(path/'x', every='3'), *cbs], **kw)
    learn.create_mbar,learn.logger = False,lambda *_: None
    return learn.remove_cbs([c for c in learn.cbs if type(c).__name__=='ProgressCallback'])

def broken_off_equals_straight(new, tmp_path, step=13, **tol):
    (straight := new(tmp_path/'a')).fit(2)               # each is made, and so seeded, right before its fit
    new(tmp_path/'b').fit(2, cbs=Stop(step))
    at = go_on(second := new(tmp_path/'b'))
    second.fit(2)
    for a,b in ((straight.model, second.model), (straight.drloc.loss_fn, second.drloc.loss_fn)):
        for (k,x),y in zip(a.state_dict().items(), b.state_dict().values()): torch.testing.assert_close(x, y, rtol=0, atol=0, msg=k) if not tol else torch.testing.assert_close(x, y, **tol)
    assert np.allclose(np.array(straight.recorder.values, float), np.array(second.recorder.values, float), rtol=tol.get('rtol', 0), atol=tol.get('atol', 0))
    assert straight.recorder.losses==second.recorder.losses or tol
    return at

@pytest.mark.parametrize('opt_func', [FusedAdamW, partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)])
@pytest.mark.parametrize('step', [7, 8, 13])
def test_any_optimizer_and_stock_callbacks(opt_func, step, tmp_path):
    at = broken_off_equals_straight(lambda p: learner(p, opt_func=opt_func), tmp_path, step)
    assert at['step'] == step//3*3

def test_settings_are_what_a_file_gives_back(tmp_path):
    "Tuples are lists in JSON, and its keys are text: an unchanged run goes on"
    def new(**kw):
        learn = learner(tmp_path)
        learn.remove_cb(learn.checkpoints)
        return learn.add_cb(Checkpoints(tmp_path/'x', dict(size=(16,32), by={1:(2,)}, **kw), every='3'))
    new().fit(2, cbs=Stop(7))
    assert go_on(new())['step']==6
    with pytest.raises(ResumeError, match="lr: absent in the checkpoint, 1 now"): go_on(new(lr=1))
    with pytest.raises(ValueError, match='PosixPath is not JSON.*str'): Checkpoints(tmp_path/'x', dict(out=Path('here')))

@pytest.mark.parametrize('step', [10, 14])
def test_the_order_of_an_epoch_is_kept(step, tmp_path):
    "Also where a loader would draw another one the second time, as on another kind of GPU; and only for that epoch"
    orders,deck = [],iter(range(99))
    class See(Callback):
        def after_train(self): orders.append(list(self.dls.train.order))
    class Shown(Callback):
        order = 97
        def after_cancel_fit(self): orders.append(list(self.dls.train.order))
    def new():
        learn = learner(tmp_path, See())
        learn.dls.train.shuffle_fn = lambda idxs: list(np.random.RandomState(next(deck)).permutation(idxs))
        return learn
    new().fit(3, cbs=[Stop(step), Shown()])
    second = new()
    at = go_on(second)
    second.fit(3)
    begun,rest = orders[1],orders[2:]
    assert at['epoch']==1 and rest[0]==begun and len(rest)==2 and rest[1]!=begun and sorted(rest[1])==list(range(64))

def test_share_of_an_order_in_a_tensor():
    from vt_drloc.gpus import share
    def new(as_tensor, rank):
        dl = DataLoader(points(), bs=8, drop_last=True)
        if as_tensor: dl.get_idxs = lambda: torch.arange(64)
        return share(dl, rank, 2)
    for r in (0,1): assert list(new(True, r).get_idxs()) == new(False, r).get_idxs()

def test_by_the_clock(tmp_path):
    def new(p):
        learn = learner(p)
        learn.checkpoints.steps,learn.checkpoints.seconds = None,1e-6            # due at every step
        return learn
    at = broken_off_equals_straight(new, tmp_path)
    assert at['step']==13

def test_compiled(tmp_path):
    def new(p):
        learn = learner(p, opt_func=FusedAdamW)
        learn.model.compile(backend='aot_eager')
        return learn
    broken_off_equals_straight(new, tmp_path)
    torch.compiler.reset()

def test_worker_processes_draw_the_same(tmp_path):
    at = broken_off_equals_straight(lambda p: learner(p, workers=1, noisy=True), tmp_path)
    assert at['done'] == 4

def test_draws_for_each_image_in_this_process(tmp_path): broken_off_equals_straight(lambda p: learner(p, noisy=True), tmp_path)

def test_fp16_with_its_scaler(tmp_path):
    "On the CPU, where the scaler and the fused optimizer are the same; the scale grows and falls within the run"
    scales,drlocs = [],[]
    class See(Callback):
        order = 99
        def after_batch(self):
            if not self.training: return
            scales.append(self.scaler.get_scale()); drlocs.append((self.drloc.sums.dtype, self.drloc.sums.isfinite().all().item()))
    new = lambda p: learner(p, Fp16('cpu', init_scale=2.**22, growth_interval=3), See(), opt_func=FusedAdamW)
    at = broken_off_equals_straight(new, tmp_path)
    assert at["step"]==12 and scales[0] == 2.**21 and any(b > a for a,b in zip(scales, scales[1:]))     # it fell, and grew again
    assert set(drlocs) == {(torch.float32, True)}
    n = len(scales) - 16 - 13                                                # straight, broken off after 13, and the rest
    assert scales[29:] == scales[16-n:16] and n == 4

def test_fp16_is_close_to_float32(tmp_path):
    (a := learner(tmp_path/'a', opt_func=FusedAdamW)).fit(2)
    (b := learner(tmp_path/'b', Fp16('cpu'), opt_func=FusedAdamW)).fit(2)
    for x,y in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(x, y, rtol=.05, atol=5e-3)
    with pytest.raises(ValueError, match='Fp16 needs FusedAdamW'): learner(tmp_path/'c', Fp16('cpu')).fit(1)

def test_precision_on_a_device(monkeypatch):
    cpu,gpu = torch.device('cpu'),torch.device('cuda')
    assert precision_on('auto', cpu)==precision_on('float32', cpu)=='float32'
    with pytest.raises(ValueError, match="leave it at 'auto'"): precision_on('fp16', cpu)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: 'Tesla T4')
    for cap,auto in (((7,5),'fp16'), ((8,0),'bf16')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d: cap)
        assert [precision_on(p, gpu) for p in ('auto','fp16','float32')] == [auto,'fp16','float32']
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d: (7,5))
    with pytest.raises(ValueError, match="Tesla T4 does not have it; use 'fp16'"): precision_on('bf16', gpu)
    with pytest.raises(ValueError, match='float32'): Recipe(precision='half').check()

def test_a_write_that_fails_is_said(tmp_path, monkeypatch):
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(mod, 'save_file', full)
    with pytest.raises(OSError, match='No space left'): learner(tmp_path/'a').fit(1)

def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    "The copy is taken at once: what is trained meanwhile does not get into it"
    stock = mod.write_checkpoint
    def slow(*args): time.sleep(.3); return stock(*args)
    monkeypatch.setattr(mod, 'write_checkpoint', slow)
    at = broken_off_equals_straight(lambda p: learner(p), tmp_path)
    assert at['step']==12

# --- on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['bf16','fp16'])
def test_resume_on_a_gpu(mode, tmp_path):
    from fastai.callback.fp16 import MixedPrecision
    half = lambda: Fp16('cuda') if mode=='fp16' else MixedPrecision('bf16')
    broken_off_equals_straight(lambda p: learner(p, half(), opt_func=FusedAdamW, device='cuda'), tmp_path, rtol=1e-3, atol=1e-4)

@pytest.mark.cuda
def test_a_second_fit_on_a_gpu(tmp_path):
    learn = learner(tmp_path, opt_func=FusedAdamW, device='cuda')
    learn.fit(1)
    learn.fit(1)                                                             # the MLP's moments come back beside it
    assert all(s['step'].device.type=='cuda' and s['step']==16 for s in learn.drloc.opt_state)

@pytest.mark.cuda
def test_fp16_waits_for_nothing(tmp_path):
    class Strict(Callback):
        order = Fp16.order-.1
        def before_step(self): torch.cuda.set_sync_debug_mode('error' if self.train_iter else 'default')
        def after_batch(self): torch.cuda.set_sync_debug_mode('default')
    learn = learner(tmp_path, Fp16('cuda'), Strict(), opt_func=FusedAdamW, device='cuda')
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, Checkpoints)])
    try: learn.fit(1)
    finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.cuda
def test_fp16_follows_bf16(tmp_path, recipe):
    curves = {}
    for p in ('bf16','fp16'):
        r = Recipe(**{**vars(recipe), 'epochs':8, 'precision':p, 'mix':False, 'tfms':'none', 'drop_path':0.})
        train(r, out=tmp_path/p, bar=False)
        curves[p] = [(e['train_loss'], e['drloc']) for e in json.loads((tmp_path/p/f'{name}.json').read_text())['epochs']]
    fp16,bf16 = (np.array(curves[p]) for p in ('fp16','bf16'))
    assert np.isfinite(fp16).all() and (fp16[-1] < fp16[0]).all()
    assert (fp16 > .95*bf16).all() and (fp16[1:] < 1.05*bf16[:-1]).all()      # the steps left out while the scale is found make it late, by less than an epoch

@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count()<2, reason='needs two GPUs')
def test_two_gpus(tmp_path):
    cmd = ['-m','vt_drloc.train','--data','digits','--model','vit_mini','--epochs','2','--bs','240','--warmup','0','--tfms','none','--no-mix','--no-bar','--precision','float32']
    for n in (1,2):
        launcher = ['-m','torch.distributed.run','--standalone',f'--nproc_per_node={n}']
        res = subprocess.run([sys.executable, *launcher, *cmd, '--out', str(tmp_path/str(n)), '--save-every', '4'], capture_output=True, text=True)
        assert res.returncode==0, res.stderr[-3000:]
    one,two = (json.loads((tmp_path/n/'digits-vit_mini-none-aug_none-nomix-s0.json').read_text()) for n in '12')
    assert (one['processes'],two['processes'])==(1,2)
    for a,b in zip(one['epochs'], two['epochs']): assert abs(a['train_loss']-b['train_loss']) < .01*a['train_loss']
