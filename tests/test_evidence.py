"Rules of a verdict, plans of runs and the program that makes them"
import json, os, signal, subprocess, sys, tarfile, time
from pathlib import Path
import numpy as np, pytest
from scipy import stats
from vt_drloc.evidence import Runner, interval, overall, read_plan, verdict

root = Path(__file__).resolve().parent.parent

# --- the rules

@pytest.mark.parametrize('n', [2, 3, 4, 10])
def test_interval_is_the_paired_t_interval(n):
    "As scipy's interval, and as what the paired t test rejects"
    rng = np.random.RandomState(n)
    without,with_ = rng.randn(n)+80,rng.randn(n)+81
    lo,hi = interval(with_-without)
    assert (lo,hi) == pytest.approx(stats.ttest_rel(with_, without).confidence_interval(.95))

def test_interval_by_hand():
    "Three gains 1, 2, 3: mean 2, deviation 1, t quantile 4.302653 for two degrees of freedom"
    half = 4.302653/3**.5
    assert interval([1,2,3]) == pytest.approx((2-half, 2+half), abs=1e-5)
    with pytest.raises(ValueError, match='1 gain: '): interval([1.])

@pytest.mark.parametrize('gains,said', [
    ([1.,1.1,.9], 'holds'), ([-1.,-1.1,-.9], 'does not'), ([.1,-.1,0.], 'does not'), ([3.,-3.,0.], 'undecided'),
    ([1.,2.], 'no verdict'), ([5.], 'no verdict'), ([], 'not tested yet'), ([.45,.47,.46], 'holds'), ([.2,-.1,.05,.1], 'does not')])
def test_verdict(gains, said): assert verdict(gains) == said

def test_verdict_at_the_edge():
    "An interval that reaches half a point is no longer within it"
    gains = np.array([-.1,0,.1]); half = interval(gains)[1]
    assert verdict(gains*.499/half) == 'does not' and verdict(gains*.501/half) == 'undecided'

@pytest.mark.parametrize('each,said', [
    (['holds']*3, 'holds'), (['holds','does not'], 'in part'), (['holds','undecided'], 'in part'), (['does not','undecided'], 'undecided'),
    (['does not']*2, 'does not'), (['holds','not tested yet'], 'holds'), (['no verdict','not tested yet'], 'no verdict'), ([], 'not tested yet')])
def test_overall(each, said): assert overall(each) == said

# --- plans

def test_committed_plans():
    "Each line is a run that can be made, with a name of its own; arms are complete: every seed with and without"
    plans = {f.stem: read_plan(f) for f in (root/'nbs/results/plans').glob('*.txt')}
    assert plans
    for runs in plans.values():
        assert all(r.recipe.check() for r in runs)
    for data in ('cifar10','cifar100'):
        rs = [r.recipe for r in plans[f'32px_{data}']]
        assert len(rs) == 18 and {(r.model, r.drloc, r.seed) for r in rs} == {(m,d,s) for m in ('swin_mini','t2t_mini','cvt_13_gap_mini') for d in ('none','paper') for s in range(3)}
        for r in rs:
            c = r.check()
            assert (c.epochs,c.bs,c.lr,c.warmup,c.wd,c.tfms,c.compile,c.mix) == (100,512,5e-4,20,.05,'paper',True,True)
            assert c.drloc=='none' or c.lambda_drloc == (.5 if c.model=='swin_mini' else .1)
            assert c.drop_path == (.2 if c.model=='swin_mini' else 0)
    names = [r.name for runs in plans.values() for r in runs]
    assert len(names) == len(set(names))
    for r in plans['32px_less_data']:
        steps = int(50_000*r.recipe.share)//r.recipe.bs*r.recipe.epochs
        assert 3*steps >= 100*(50_000//512) and r.recipe.warmup == r.recipe.epochs/5

@pytest.mark.parametrize('line,why', [('python train.py', 'vt_drloc_train'), ('vt_drloc_train --model swin_minni', 'swin_mini'), ('vt_drloc_train --epochs 0', 'epochs=0'),
                                      ('vt_drloc_train --colour red', 'colour'), ('vt_drloc_train\nvt_drloc_train --lr 1e-3', 'line 2: .*--name')])
def test_a_bad_line_is_named(tmp_path, line, why):
    (tmp_path/'p.txt').write_text(line)
    with pytest.raises(ValueError, match=why): read_plan(tmp_path/'p.txt')

# --- the runner, with runs that are nothing but a few lines of Python

fake = '''
import json, sys, time
from pathlib import Path
out,name,epochs,pause,fail = Path(sys.argv[1]),sys.argv[2],int(sys.argv[3]),float(sys.argv[4]),sys.argv[5]
rec = dict(status='cut short', epochs=[])
for e in range(epochs):
    time.sleep(pause)
    if fail=='fail' and e==1: sys.exit('out of luck')
    rec['epochs'].append(dict(epoch=e, accuracy=.1, wall_s=(e+1)*pause))
    if e==epochs-1: rec['status'] = 'complete'
    tmp = out/f'{name}.tmp'; tmp.write_text(json.dumps(rec)); tmp.replace(out/f'{name}.json')
(out/f'{name}.safetensors').write_bytes(b'w'*10)
'''

class FakeRunner(Runner):
    "Starts the script above in place of training; notes when, and how many were at work"
    pause,fail = .1,()
    def command(self, run):
        self.started = getattr(self, 'started', [])
        self.started.append((run.name, len(self.having('running')), run.slot))
        return [sys.executable, '-c', fake, str(self.out), run.name, str(run.recipe.epochs), str(self.pause), 'fail' if run.name in self.fail else '']

def plan_of(tmp_path, n=4, more=''):
    (tmp_path/'p.txt').write_text('\n'.join(f'vt_drloc_train --data digits --model demo_cvt --drloc {arm} --seed {s} --epochs 3 --bs 256{more}' for s in range(n//2) for arm in ('none','paper')))
    return read_plan(tmp_path/'p.txt')

def test_runs_all_side_by_side(tmp_path):
    r = FakeRunner(plan_of(tmp_path), tmp_path/'out', gpus=2, beside=1, pack=tmp_path/'all.tar', weights='demo_cvt')
    assert [o.state for o in r.run()] == ['done']*4
    assert {s[2][0] for s in r.started[:2]} == {'0','1'} and max(n for _,n,_ in r.started) == 1
    with tarfile.open(tmp_path/'all.tar') as t: names = set(t.getnames())
    assert {f'{o.name}.json' for o in r.runs} | {'plan.json'} < names
    assert {n for n in names if n.endswith('.safetensors')} == {f'digits-demo_cvt-{a}-s0.safetensors' for a in ('none','paper')}
    assert not list(tmp_path.rglob('*.tmp'))

def test_a_failed_run_takes_no_other_along(tmp_path, capsys):
    class R(FakeRunner): fail = ('digits-demo_cvt-paper-s0',)
    r = R(plan_of(tmp_path), tmp_path/'out', gpus=1, beside=2, pack=tmp_path/'all.tar')
    assert [o.state for o in r.run()] == ['done','failed','done','done']
    assert 'out of luck' in r.runs[1].why and 'digits-demo_cvt-paper-s0: exit code 1: out of luck' in capsys.readouterr().out
    with tarfile.open(tmp_path/'all.tar') as t: assert 'digits-demo_cvt-paper-s0.log' in t.getnames()

def test_what_is_complete_is_skipped_and_what_was_cut_is_made_again(tmp_path):
    FakeRunner(plan_of(tmp_path), tmp_path/'out', gpus=1, beside=4).run()
    cut = tmp_path/'out'/'digits-demo_cvt-paper-s1.json'
    cut.write_text(json.dumps(dict(json.loads(cut.read_text()), status='cut short')))
    r = FakeRunner(plan_of(tmp_path), tmp_path/'out', gpus=1, beside=4)
    assert [o.state for o in r.run()] == ['done']*4 and [n for n,_,_ in r.started] == ['digits-demo_cvt-paper-s1']

def test_one_of_each_kind_compiles_for_the_others(tmp_path):
    "Compiled runs: the first of each arm starts at once, the others not before its first epoch"
    r = FakeRunner(plan_of(tmp_path, 6, ' --compile'), tmp_path/'out', gpus=1, beside=6)
    seen,epochs = [],r.epochs
    first = [r.runs[0], r.runs[1]]
    class Spy(FakeRunner):
        def launch(self, run):
            seen.append((run.name, [len(self.epochs(o)) for o in self.runs[:2]]))
            super().launch(run)
    s = Spy(r.runs, tmp_path/'out', gpus=1, beside=6)
    s.run()
    assert [n for n,_ in seen[:2]] == [o.name for o in first]
    for n,done in seen[2:]: assert done[0 if '-none-' in n else 1] >= 1, seen

def test_none_starts_that_cannot_end(tmp_path):
    "With 20 s for runs of some 15 s, of which one at a time, the second is left; and says so"
    class R(FakeRunner):
        def pace(self, run): return (10., 2.) if len(self.epochs(run)) > 1 else None
    r = R(plan_of(tmp_path, 2), tmp_path/'out', gpus=1, beside=1, minutes=12/60)
    runs = r.run()
    assert [o.state for o in runs] == ['done','left'] and 'could not end' in runs[1].why

def test_what_still_runs_is_stopped_in_the_end(tmp_path):
    class R(FakeRunner): pause = 30
    r = R(plan_of(tmp_path, 2), tmp_path/'out', gpus=1, beside=2, minutes=1/60)
    t = time.monotonic()
    runs = r.run()
    assert time.monotonic()-t < 10 and {o.state for o in runs} == {'left'} and all(o.proc.poll() is not None for o in runs)

def test_estimate(tmp_path):
    "Two that run and two that wait on two places: from what the records say"
    r = FakeRunner(plan_of(tmp_path), tmp_path/'out', gpus=1, beside=2)
    assert r.ends_in() is None
    (tmp_path/'out').mkdir()
    for o in r.runs[:2]:
        o.state,o.began = 'running',1.
        (tmp_path/'out'/f'{o.name}.json').write_text(json.dumps(dict(epochs=[dict(wall_s=20.), dict(wall_s=25.)])))
    assert r.pace(r.runs[0]) == (35., 5.)
    assert r.expected(r.runs[0]) == 5. and r.expected(r.runs[2]) == 35+2*5
    assert r.ends_in() == 5+45

def test_real_commands(tmp_path):
    "What is started for a run on a GPU, and on the CPU"
    runs = plan_of(tmp_path)
    r = Runner(runs, tmp_path/'o', gpus=2, beside=9, path='images')
    runs[0].slot = r.places[0]
    cmd = r.command(runs[0])
    assert cmd[cmd.index('-m'):][:2] == ['-m','vt_drloc.train'] and cmd[cmd.index('--beside')+1] == '9' and cmd[cmd.index('--path')+1] == 'images'
    assert '--device' not in cmd and len(r.places) == 18
    c = Runner(runs, tmp_path/'o', gpus=0)
    runs[0].slot = c.places[0]
    assert c.command(runs[0])[-2:] == ['--device','cpu']

def test_console(tmp_path):
    "One real run of an epoch, as a program; a wrong plan is refused in one line"
    env = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    (tmp_path/'p.txt').write_text('vt_drloc_train --data digits --model demo_cvt --epochs 1 --bs 256 --warmup 0 --no-mix --tfms none')
    cmd = [sys.executable, '-m', 'vt_drloc.evidence', '--gpus', '0', '--out', str(tmp_path/'o')]
    res = subprocess.run([*cmd, '--plan', str(tmp_path/'p.txt'), '--pack', str(tmp_path/'a.tar')], env=env, capture_output=True, text=True)
    assert res.returncode == 0 and '1 done' in res.stdout, res.stdout + res.stderr
    assert json.loads((tmp_path/'o'/'digits-demo_cvt-none-s0.json').read_text())['status'] == 'complete'
    (tmp_path/'p.txt').write_text('train it')
    res = subprocess.run([*cmd, '--plan', str(tmp_path/'p.txt')], env=env, capture_output=True, text=True)
    assert res.returncode == 1 and 'line 1' in res.stderr and 'Traceback' not in res.stderr
