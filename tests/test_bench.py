"The benchmark's processes: turns, failures, a Learner that waits, the rival"
from importlib.util import find_spec
import json, math, os, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from vt_drloc import bench
from vt_drloc.bench import *
from vt_drloc.bench import Released, Rival, _gpu_cases, _in_slots, _noise
from vt_drloc.models import MODELS, create_model, list_models

tiny = dict(section='try', model='demo_cvt', size=32, precision='float32')

def test_a_failing_case_costs_its_row_alone():
    told = []
    rows = measure_cases([Case(name='good', batch=4, steps=1, arms=('eager',), **tiny), Case(name='bad', batch=4, steps=1, **{**tiny, 'model':'no_such'})],
                         'cpu', rounds=2, say=told.append)
    by = {r['name']:r for r in rows}
    assert "unknown model 'no_such'" in by['bad']['error'] and 'block_s' not in by['bad']
    assert len(by['good']['block_s'])==2 and all(s>0 for s in by['good']['block_s'])
    assert any('1 of 2' in t for t in told)

def test_a_case_that_dies_when_it_is_timed_costs_its_rows_alone():
    "In the second round; the blocks that it has already are no comparison, the others' pairs stay pairs"
    class Fake:
        def __init__(self, name, *arms): self.case,self.asked = Case(name=name, arms=arms, **tiny),[]
        def ask(self, arm):
            self.asked.append(arm)
            if self.case.name=='bad' and len(self.asked)==3: raise BrokenPipeError('gone')
            return len(self.asked)
    good,bad,rows = Fake('good', 'eager', 'eager side'),Fake('bad', 'eager', 'eager side'),[]
    answers = bench._take_turns([good,bad], 3, math.inf, print, rows)
    assert answers=={(good,'eager'):[1,4,5], (good,'eager side'):[2,3,6]} and len(bad.asked)==3
    assert [(r['name'],r['error']) for r in rows]==[('bad','gone')]
    assert [len(v) for v in bench._take_turns([Fake('late', 'eager')], 5, 0., print, rows).values()]==[2]   # one round has no interval

def test_groups_are_measured_one_after_the_other(monkeypatch):
    "Each gets its share of the minutes that are left; one that fails costs its own rows"
    clock,alive,seen = [0.],set(),[]
    monkeypatch.setattr(bench, 'time', SimpleNamespace(perf_counter=lambda: clock[0]))
    class Fake:
        def __init__(self, case, device): assert alive<={c.name for c in seen[-1]}; self.case = case; alive.add(case.name)
        def read(self, until):
            assert until==pytest.approx(clock[0]+60*.85*share[-1])
            if self.case.name=='bad': raise RuntimeError('no memory')
            return {a: dict(steps=3) for a in self.case.arms}
        def ask(self, arm): clock[0] += 10; return .1
        def close(self): alive.discard(self.case.name)
    monkeypatch.setattr(bench, 'Worker', Fake)
    measure,share = bench.measure_cases,[]
    def watched(cases, device, rounds, minutes, say, **kw): assert not alive; seen.append(cases); share.append(minutes); return measure(cases, device, rounds, minutes, say, **kw)
    monkeypatch.setattr(bench, 'measure_cases', watched)
    case = lambda name: Case(name=name, arms=('eager','eager side'), **tiny)
    rows = one_by_one([[case('a')],[case('bad')],[case('b'),case('c')]], 'cpu', 3, 9., lambda s: None)
    assert share==pytest.approx([3,4,8]) and not alive                       # 'a' took a minute of its three
    assert [(r['name'],r.get('arm'),r.get('error')) for r in rows]==[('a','eager',None),('a','eager side',None),('bad',None,'no memory'),*[(n,a,None) for n in 'bc' for a in case(n).arms]]
    assert all(len(r['block_s'])==3 for r in rows if 'arm' in r)

@pytest.mark.parametrize('section,asked,rounds,how', [('side',0,20,'one_by_one'), ('parts',0,20,'measure_cases'), ('side_eager',0,480,'measure_cases'), ('side_eager',7,7,'measure_cases'), ('side512_t2t',0,160,'measure_cases'), ('side512_eager',0,20,'one_by_one')])
def test_a_section_has_its_number_of_rounds(section, asked, rounds, how, tmp_path, monkeypatch):
    seen = []
    for name in ('measure_cases','one_by_one'): monkeypatch.setattr(bench, name, lambda *args, name=name: seen.append((name,*args[:4])) or [])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(bench, 'case_circumstances', lambda device: {})
    bench.main(section=section, out=str(tmp_path), rounds=asked, minutes=5.)
    assert seen==[(how,SECTIONS[section],'cuda',rounds,5.)] and json.loads((tmp_path/f'{section}.json').read_text())['rows']==[]

def test_a_case_that_compiles_for_too_long(monkeypatch):
    "It costs its own row; who was ready in time is there, also if it is asked after the late one"
    does = dict(late='import time; time.sleep(600)', good='print("{\\"eager\\": 7}", flush=True); input()')
    launch,told,rows = subprocess.Popen,[],[]
    monkeypatch.setattr(bench.subprocess, 'Popen', lambda cmd, **kw: launch([sys.executable,'-c',does[json.loads(cmd[cmd.index('--worker')+1])['name']]], **kw))
    workers = [Worker(Case(name=n, **tiny), 'cpu') for n in does]
    try: ready = await_ready(workers, rows, told.append, until=time.perf_counter()+5); ended = [w.p.poll() is not None for w in workers]
    finally:
        for w in workers: w.close()
    assert [w.case.name for w in ready]==['good'] and ready[0].facts==dict(eager=7) and 'ready: good' in told
    assert ended==[True,False]                                               # it does not compile on beside those that are timed
    [row] = rows
    assert row['name']=='late' and 'not ready in time; a case that compiles for long needs more --minutes' in row['error']
    assert all(w.p.poll() is not None for w in workers)

def test_a_learner_answers_epoch_by_epoch():
    "Each answer is one epoch's seconds a step; with the side task, augmentation and mixing in it"
    case = Case(name='learner', kind='learner', batch=8, steps=3, recipe=dict(drloc='paper', tfms='light', warmup=0), **tiny)
    [row] = measure_cases([case], 'cpu', rounds=3)
    assert 'error' not in row, row
    assert row['steps']==3 and len(row['block_s'])==len(row['valid_s'])==3
    assert all(0<s<30 for s in row['block_s']+row['valid_s'])

def test_the_rival_is_the_released_loop():
    "Pairs from the CPU, a loss read back, all parameters moved"
    run = Rival(Case('try', 'rival', model='timm:swin_tiny_patch4_window7_224', kind='rival', batch=2, precision='float32', arms=('eager side',), steps=1), 'cpu')
    before = [p.detach().clone() for p in run.params]
    loss = run.step('eager side')
    assert isinstance(loss, float) and math.isfinite(loss)
    assert len(run.params)==len(list(run.model.parameters()))+len(list(run.drloc.parameters()))
    assert all(not torch.equal(p, q) for p,q in zip(run.params, before))

@pytest.mark.parametrize('precision', ['float32','bf16'])
def test_the_released_step_reads_its_loss_back(precision):
    "The rival's step on a batch that lies ready"
    run = Released(Case('try', 'released', model='timm:swin_tiny_patch4_window7_224', kind='released', batch=2, precision=precision, arms=('eager side',)), 'cpu')
    before = [p.detach().clone() for p in run.params]
    loss = run.step('eager side')
    assert isinstance(loss, float) and math.isfinite(loss) and run.batch()[0] is run.x
    assert all(not torch.equal(p, q) for p,q in zip(run.params, before))

@pytest.mark.parametrize('mode,arms,want', [('', 1, dict(peak_bytes=7, peak_of='allocated')), ('', 2, dict(peak_bytes=7, peak_of='allocated')),
    ('reduce-overhead', 1, dict(peak_bytes=20, peak_of='held')), ('reduce-overhead', 2, dict(peak_bytes=None, peak_of='held'))])
def test_how_memory_was_read(mode, arms, want, monkeypatch):
    "What the graphs of two arms hold is nobody's alone; without a GPU the record does not say how"
    monkeypatch.setattr(bench, 'peak_memory', lambda device, graphs=False: None if device=='cpu' else 20 if graphs else 7)
    run = SimpleNamespace(case=Case('try', 'a', mode=mode, arms=('compiled','eager')[:arms]), device='cuda')
    assert Steps.memory(run)==want
    run.device = 'cpu'
    assert Steps.memory(run)==dict(peak_bytes=None)

@pytest.mark.parametrize('name,device', [('profile','cuda'), ('side','cuda'), ('cpu','cpu')])
def test_a_record_of_cases_says_what_their_processes_set(name, device, monkeypatch):
    "As the committed ones say it; this process has other switches"
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: 'a GPU')
    then = json.loads((Path(bench.__file__).parents[1]/'nbs'/'results'/'bench'/f'{name}.json').read_text())['circumstances']
    now = bench.case_circumstances(device)
    assert [k for k in now if k!='baseline']==[k for k in then if k!='baseline'] and all(now[k]==then[k] for k in ('cudnn_benchmark','float32_matmul_precision','optimizer','autocast'))

def test_the_waterfall_changes_one_thing_at_a_time():
    "From the released step on, each bar differs from the one before in what its name says"
    cases = [c for c in SECTIONS['speed'] if not c.name.startswith('beside')]
    changed = [{k for k,v in asdict(b).items() if v!=asdict(a)[k]}-{'name'} for a,b in zip(cases, cases[1:])]
    assert changed==[{'precision'},{'kind'},{'model'},{'arms'},{'mode'},{'attention'},{'skip'},{'patches'},{'batch'}]
    assert all(len(c.arms)==1 and c.arms[0].endswith(' side') for c in SECTIONS['speed']) and cases[0].kind=='released' and cases[0].model.startswith('timm:')

def test_side_task_is_in_the_step():
    "With it the MLP moves, without it does not"
    run = Steps(Case(name='side', batch=4, arms=('eager','eager side'), **tiny), 'cpu')
    mlp = lambda: torch.cat([p.detach().flatten().clone() for p in run.drloc.parameters()])
    a = mlp(); run.step('eager')
    b = mlp(); run.step('eager side')
    assert torch.equal(a, b) and not torch.equal(b, mlp())

def weights(run): return torch.cat([p.detach().flatten() for p in run.model.parameters()])

@pytest.mark.parametrize('model', ['demo_cvt','swin_mini','cvt_13_mini'])                  # (B, D, h, w), (B, h, w, D), (B, 1 + hw, D)
def test_pieces_of_the_side_task_add_up(model):
    "A piece alone trains the network as if there were none, draws the same pairs, and leaves the MLP; compiled or not"
    case = Case(name='parts', batch=4, drop_path=0., **{**tiny, 'model':model}, arms=('eager','eager out','eager draw','eager grid','eager side',*(['compiled','compiled side'] if model=='demo_cvt' else [])))
    seen = {}
    for arm in case.arms:
        torch.manual_seed(0)
        run = Steps(case, 'cpu')
        mlp = [p.detach().clone() for p in run.drloc.parameters()]
        loss = run.step(arm)
        moved = [not torch.equal(p, q) for p,q in zip(mlp, run.drloc.parameters())]
        assert all(moved) if arm.endswith('side') else not any(moved)
        seen[arm] = loss,weights(run),run.generator.get_state()
        torch.compiler.reset()
    drawn = {a:s for a,(_,_,s) in seen.items() if a.split()[-1] in ('draw','grid','side')}
    assert all(torch.equal(s, drawn['eager side']) for s in drawn.values()) and not torch.equal(seen['eager'][2], drawn['eager side'])
    for arm in ('eager out','eager draw','eager grid'): assert all(torch.equal(a, b) for a,b in zip(seen[arm][:2], seen['eager'][:2]))
    for a,b in (('compiled','eager'),('compiled side','eager side')):
        if a not in seen: continue
        for x,y in zip(seen[a][:2], seen[b][:2]): torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)
    assert seen['eager side'][0]>seen['eager'][0]+.01

@pytest.mark.parametrize('how', ['eager','compiled'])
def test_features_leave_only_a_step_that_wants_them(how, monkeypatch):
    "What it is compared with is the network as it is trained without the task"
    run,handed = Steps(Case(name='out', batch=2, arms=tuple(f'{how} {p}'.strip() for p in ('','out','draw','side')), **tiny), 'cpu'),{}
    assert set(run.forwards)=={(how,False),(how,True)}
    for w,f in list(run.forwards.items()): monkeypatch.setitem(run.forwards, w, lambda x, f=f: handed.setdefault(arm, f(x)))
    with torch.compiler.set_stance('force_eager'):                        # which network an arm calls is the question, not what the compiler makes of it
        for arm in run.case.arms: run.step(arm)
    assert {a:f is not None for a,(_,f) in handed.items()}=={how:False, f'{how} out':True, f'{how} draw':True, f'{how} side':True}

def test_the_optimizer_has_the_groups_of_training():
    "Matrices decay and vectors do not, the localization MLP's too, and nobody is forgotten"
    run = Steps(Case(name='groups', batch=2, arms=('eager','eager side'), **tiny), 'cpu')
    decay,rest = run.opt.param_groups
    assert {p.ndim for p in rest['params']}=={1} and min(p.ndim for p in decay['params'])==2 and (decay['weight_decay'],rest['weight_decay'])==(.05,0)
    every = [*run.model.parameters(),*run.drloc.parameters()]
    assert {id(p) for g in (decay,rest) for p in g['params']}=={id(p) for p in every} and len(decay['params'])+len(rest['params'])==len(every)

@pytest.mark.parametrize('arm', ['alone','side','compiled sdie','eager side grid',''])
def test_an_arm_that_is_none(arm):
    with pytest.raises(ValueError, match=f"arm {arm!r}: give 'eager' or 'compiled'"): Steps(Case(name='x', batch=2, arms=(arm,), **tiny), 'cpu')

def test_arms_that_are_compared_take_as_many_steps(monkeypatch):
    "From the fastest of those that run alike, however the first timings scatter"
    secs = {'compiled':.0375, 'compiled side':.01875, 'eager':.1, 'eager side':.11}
    run = Steps(Case(name='n', batch=2, seconds=.3, arms=tuple(secs), **tiny), 'cpu')
    monkeypatch.setattr(run, 'block', lambda arm, n, lead=None: secs[arm])
    assert {a:f['steps'] for a,f in run.warm_up().items()}=={'compiled':16, 'compiled side':16, 'eager':3, 'eager side':3}
    run.case.steps = 5
    assert {f['steps'] for f in run.warm_up().values()}=={5}

def test_the_compiled_side_task_begins_at_the_features():
    "One graph, from tokens with a class token to the loss, the same loss and gradients; the piece of the grid sends zeros back"
    run = Steps(Case(name='parts', batch=4, arms=('eager','eager side'), **{**tiny, 'model':'cvt_13_mini'}), 'cpu')
    f,pairs = run.model.forward_features(run.x).detach().requires_grad_(),torch.randint(64, (4,64,2))
    got = {(how,k): (l,*torch.autograd.grad(l, f)) for how,d in run.judges.items() for k,judge in d.items() for l in [judge(f, pairs)]}
    torch.compiler.reset()
    for k in ('side','grid'):
        for a,b in zip(got['compiled',k], got['eager',k]): torch.testing.assert_close(a, b)
    assert got['eager','side'][1][:,1:].any() and not got['eager','side'][1][:,0].any()
    assert got['eager','grid'][1].shape==f.shape and not got['eager','grid'][1].any()
    assert torch._dynamo.explain(run.judges['eager']['side'])(f, pairs).graph_break_count==0

def test_steps_that_lead_a_block_are_not_timed(monkeypatch):
    run,done = Steps(Case(name='lead', batch=4, lead=.45, arms=('eager',), **tiny), 'cpu'),[]
    monkeypatch.setattr(run, 'step', lambda arm: time.sleep(.05 if len(done)<3 else 0.) or done.append(arm))
    assert run.block('eager', 2)<.02 and done==['eager']*5
    monkeypatch.setattr(run, 'step', lambda arm: time.sleep(0. if done[5:] else .05) or done.append(arm))
    assert run.warm_up()['eager']['first_step_s']>=.05            # the first step compiles, and is timed

def test_pieces_by_hand():
    ms = dict(zip(bench.PARTS, (19.9,20.,20.01,20.05,20.2)))
    rows = [dict(name='swin_t', arm=a, batch=8, block_s=[1e-3*(s+d) for d in (.1,0.,-.1)]) for a,s in ms.items()]       # a drift that all arms share
    found = side_parts(rec('parts', *rows, dict(name='broken', error='no memory')))
    assert [r['us'] for r in found]==pytest.approx([100,10,40,150,300]) and all(r['high']-r['low']<1e-6 for r in found)
    assert found[-1]['share']==pytest.approx(.3/19.9) and sum(r['us'] for r in found[:4])==pytest.approx(found[-1]['us'])
    assert [r['piece'] for r in side_parts(rec('parts', *rows[1:3]))]==['+ drawing pairs']

def test_ratio_by_hand():
    r,lo,hi = ratio([2.,8.], [1.,2.])                       # logs log 2 and log 4
    assert math.isclose(r, 8**.5) and lo<r<hi
    half = 12.706204736432095*(math.log(2)/2**.5)/2**.5       # Student's t with one degree of freedom
    assert math.isclose(hi, 8**.5*math.exp(half), rel_tol=1e-9)
    with pytest.raises(ValueError, match='1 number: an interval needs at least 2'): ratio([1.], [1.])
    with pytest.raises(ValueError): ratio([1.,2.], [1.])

def test_sections_are_what_they_say():
    flat = {name: [c for g in what for c in (g if isinstance(g, list) else [g])] for name,what in SECTIONS.items() if not callable(what)}
    for name,cases in flat.items():
        assert len({c.name for c in cases})==len(cases)
        assert all(c.section==name for c in cases)
        assert all(c.model in list_models() or c.model.startswith('timm:') for c in cases)
    vts = {'swin_t','t2t_vit_14','cvt_13_gap'}
    flat['side512'] = flat['side512']+flat['side512_t2t']+flat['side512_cvt']
    for name,batch in (('side',128),('side512',512)):
        assert {c.model for c in flat[name]}==vts and all((c.batch,c.size,c.arms,c.mode)==(batch,224,('compiled','compiled side'),'reduce-overhead') for c in flat[name])
        assert [c.attention and c.skip and c.patches for c in flat[name]]==[c.model=='swin_t' for c in flat[name]]
    for name,batch,lead,secs in (('side_eager',128,.06,.12),('side512_eager',512,.3,1.2)):
        assert {c.model for c in flat[name]}==vts and all((c.batch,c.size,c.arms,c.mode,c.lead,c.seconds)==(batch,224,('eager','eager side'),'',lead,secs) for c in flat[name])
        assert not any(c.attention or c.skip or c.patches for c in flat[name])
    assert [len(g) for n in ('side','side512_eager') for g in SECTIONS[n]]==[1]*6 and [len(SECTIONS[n]) for n in ('side512','side512_t2t','side512_cvt')]==[1]*3 and set(ROUNDS)<=set(flat)
    assert [(c.model,c.batch,c.arms,c.lead,c.mode) for c in SECTIONS['parts']]==[(c.model,128,bench.PARTS,.3,'reduce-overhead') for c in flat['side']]
    assert [replace(p, section='side', arms=s.arms) for p,s in zip(SECTIONS['parts'], flat['side'])]==flat['side']
    small = {(c.model,c.size,c.batch) for c in flat['side_small']}
    assert small=={('resnet50',224,128),('resnet50',224,512),*((m,32,512) for m in ('t2t_mini','swin_mini','cvt_13_gap_mini','cvt_mini','resnet_mini'))}
    assert [[c.batch for c in g if c.model=='resnet50'] for g in SECTIONS['side_small']]==[[512],[128]]           # the largest by itself
    assert set(GOALS)<=set(SECTIONS)
    assert all(n in GOALS for n,cs in flat.items() if any(len({a.split()[0] for a in c.arms})<len(c.arms) for c in cs) and n!='parts')

def test_cases_of_several_gpus():
    two,four = _gpu_cases(2),_gpu_cases(4)
    assert [(c.name,c.processes,c.batch//c.processes) for c in two]==[('one GPU',1,512),('2 GPUs',2,512),('2 GPUs, one batch of 512',2,256)]
    assert four[:3]==two and (four[3].processes,four[3].batch)==(4,2048)
    assert all(c.recipe['drloc']=='paper' and c.recipe['tfms']=='paper' and c.recipe['compile'] for c in two)

# --- goals, from records with invented numbers

def blocks(s, n=4): return [s*f for f in (.99,1.01,1.,1.)][:n]
def rec(section, *rows): return dict(section=section, rows=list(rows))
def met(goals): return {g['goal']:g['met'] for g in goals}

def test_a_goal_is_judged_by_the_worse_end():
    assert goal('x', (1., .9, 1.1), most=1.1)['met'] and not goal('x', (1., .9, 1.1), most=1.05)['met']
    assert goal('x', (1., .9, 1.1), least=.9)['met'] and not goal('x', (1., .9, 1.1), least=.95)['met']
    g = goal('x', 3, most=2)
    assert (g['measured'],g['low'],g['high'],g['wanted'],g['met'])==(3,3,3,'at most 2',False)

@pytest.mark.parametrize('section,model,factor,ok', [('side','swin_t',1.005,(True,True)), ('side512','swin_t',1.02,(False,True)), ('side_eager','swin_t',1.02,(False,True)), ('side512_eager','swin_t',1.04,(False,False)), ('side','swin_t',1.04,(False,False)),
                                                     ('side_small','cvt_mini',1.02,(True,True)), ('side_small','cvt_mini',1.04,(False,False))])
def test_cost_of_the_side_task(section, model, factor, ok):
    rows = [dict(name=model, model=model, arm=a, batch=8, block_s=blocks(.1*(factor if a.endswith('side') else 1))) for a in ('compiled','compiled side','eager','eager side')]
    found = side_goals(rec(section, *rows, dict(name='broken', error='no memory')))
    assert [round(g['measured'], 9) for g in found]==[factor]*2 and tuple(g['met'] for g in found)==ok

def test_a_noisy_measurement_meets_nothing():
    rows = [dict(name='m', model='swin_t', arm=a, batch=8, block_s=s) for a,s in (('compiled',[1.,1.,1.,1.]), ('compiled side',[1.1,.9,1.1,.9]))]
    [g] = side_goals(rec('side', *rows))
    assert g['measured']<1.01<g['high'] and not g['met']

def test_minutes_by_hand():
    row = dict(batch=500, block_s=[.1,.2], valid_s=[1.,2.])                  # 100 steps an epoch: 10 s and 1 s; 20 s and 2 s
    assert minutes_of(row)==pytest.approx([100*11/60,100*22/60])
    assert minutes_of(row, epochs=1, images=1000)==pytest.approx([1.2/60,2.4/60])
    with pytest.raises(ValueError): minutes_of(dict(row, valid_s=[1.]))

@pytest.mark.parametrize('learn,two,ok', [(.1,.105,(True,True,True,True)), (.14,.2,(False,False,False,False))])
def test_goals_of_the_whole(learn, two, ok):
    "0.1 s a bare step of 512; a rival of 0.14 s for 128, 914 images a second"
    r = rec('whole', dict(name='bare step', batch=512, block_s=blocks(.1)), dict(name='Learner', batch=512, block_s=blocks(learn), valid_s=[.5]*4),
            dict(name='Learner, two cores', batch=512, block_s=blocks(two), valid_s=[.5]*4), dict(name='rival', batch=128, block_s=blocks(.14)))
    found = whole_goals(r)
    assert [g['measured'] for g in found]==pytest.approx([.1/learn, .14/128/(learn/512), learn/two, 100*(50_000*learn/512+.5)/60])
    assert tuple(g['met'] for g in found)==ok

def test_a_case_that_failed_leaves_its_goals_out():
    r = rec('whole', dict(name='Learner', batch=512, block_s=blocks(.1), valid_s=[.5]*4), dict(name='rival', error='no memory'))
    assert list(met(whole_goals(r)))==['minutes for 100 epochs of CIFAR-10 at 224 px']
    assert whole_goals(rec('whole', dict(name='Learner', error='no memory')))==[]

def test_goals_of_several_gpus():
    row = lambda name, batch, s: dict(name=name, batch=batch, block_s=blocks(s))
    found = gpu_goals(rec('gpus', row('one GPU', 512, .1), row('2 GPUs', 1024, .102), row('2 GPUs, one batch of 512', 512, .06), row('4 GPUs', 2048, .105)))
    assert [g['measured'] for g in found]==pytest.approx([2/1.02, .1/.06, 4/1.05]) and [g['met'] for g in found]==[True,False,True]

def test_curves_agree_or_not():
    run = lambda n, seed, last: dict(name=f'{n} GPUs', processes=n, seed=seed, train=[2.,last], valid=[1.5,last-.5])
    same = rec('curves', *[run(1, i, 1.+.01*i) for i in range(3)], *[run(2, i, 1.005+.01*i) for i in range(3)])
    other = rec('curves', *[run(1, i, 1.+.01*i) for i in range(3)], *[run(2, i, 1.1+.01*i) for i in range(3)])
    assert all(met(curve_goals(same)).values()) and not any(met(curve_goals(other)).values())
    half = 2.7764451051977987*.01*(2/3)**.5                                  # Student's t with four degrees of freedom, deviation 0.01
    assert curve_goals(same)[0]['measured']==pytest.approx(.005) and curve_goals(same)[0]['wanted']==f'at most {half:.3g}'

def test_precisions_agree_or_not():
    run = lambda name, seed, last: dict(name=name, seed=seed, train=[2.,last], valid=[1.5,last-.5], drloc=[.5,last-.9])
    rows = lambda apart: [run(p, i, 1.+.01*i+apart*(p=='fp16')) for p in ('bf16','fp16') for i in range(3)]
    same,other = (bench.precision_goals(rec('precisions', *rows(o))) for o in (.005,.1))
    assert len(same)==3 and all(met(same).values()) and not any(met(other).values())
    assert list(met(same))[2]=='|last loss of the side task, bf16 - fp16|, by seeds' and same[2]['measured']==pytest.approx(.005)
    lost = rows(0.); lost[-1]['drloc'][-1] = float('nan')
    assert not met(bench.precision_goals(rec('precisions', *lost)))['|last loss of the side task, bf16 - fp16|, by seeds']

def test_precisions_are_trained(monkeypatch):
    "Each precision with each seed by the console script, on a CPU"
    monkeypatch.setitem(bench._halves, 'cpu', ('float32',))                 # the other one there, `auto`, is the same
    rows = bench.precision_rows('cpu', 1, 1, print, seeds=(0,1))
    losses = {(r['name'],r['seed']): (r['train'],r['valid'],r['drloc']) for r in rows}
    assert set(losses)=={('float32',0),('float32',1)} and losses['float32',0]!=losses['float32',1]
    assert rows[0]['settings']['precision']=='float32' and len(rows[0]['train'])==rows[0]['settings']['epochs']

def test_a_case_that_failed_leaves_no_goal_at_32_pixels():
    row = lambda name, attention=True, **kw: dict(name=name, kind='learner' if 'Learner' in name else 'steps', batch=512, attention=attention, **(kw or dict(block_s=[.01,.0101])))
    assert len(bench.small_goals(rec('whole_small', row('bare step, batch 512'), row('Learner, batch 512'))))==1
    assert bench.small_goals(rec('whole_small', row('bare step, batch 512'), row('Learner, batch 512', error='no memory')))==[]
    assert bench.small_goals(rec('whole_small', row('bare step, batch 512'), row('Learner, batch 512', False)))==[]     # its bare step is missing

def test_a_run_that_fails_ends_the_others(tmp_path):
    class P:
        def __init__(self, code): self.code = self.returncode = code; self.killed = False
        def communicate(self): return '','it broke'
        def wait(self): assert self.killed
        def kill(self): self.killed = True
    bad,still = P(1),P(None)
    with pytest.raises(RuntimeError, match='a, seed 0: it broke'): list(bench._curves({('a',0):bad, ('b',0):still}, tmp_path, print))
    assert still.killed

# --- time to quality

def epochs(first, rest, n=4):
    "Walls of `n` epochs: the first takes `first` seconds, each other one `rest`"
    return [dict(wall_s=first+i*rest, steady_s=.9*rest, valid_s=.1*rest, accuracy=.5+.1*i) for i in range(n)]

def test_compilation_is_counted_apart():
    c = clocked(epochs(50., 2.))
    assert (c['seconds'],c['compile_s'],c['valid_s'],c['first_epoch'],c['accuracy'])==pytest.approx((8.,48.,.8,1.,.8))
    assert clocked(epochs(3., 2., 1))['seconds']==3.
    assert clocked([dict(epochs(5., 2.)[0], steady_s=3.6), *epochs(5., 2.)[1:]])['first_epoch']==pytest.approx(2.)

def test_a_first_epoch_faster_than_the_rest_counts_as_it_is():
    c = clocked(epochs(1., 2.))
    assert c['compile_s']==0 and c['seconds']==pytest.approx(7.)

def test_a_later_epoch_that_is_slow_counts():
    es = epochs(50., 2.)
    for e in es[2:]: e['wall_s'] += 5
    assert clocked(es)['seconds']==pytest.approx(13.)

@pytest.mark.parametrize('minutes,epoch_s,n', [(2,1.7,67), (2,200.,1), (10,2.,288)])
def test_epochs_fit(minutes, epoch_s, n):
    assert epochs_in(minutes, epoch_s)==n and (n==1 or n*epoch_s<=60*minutes)

def run(plan, seed, acc, seconds=100., status='complete', first=1.):
    return dict(plan=plan, seed=seed, status=status, params=7, recipe=dict(model=plan), epochs=[0]*60, accuracy=acc, seconds=seconds, valid_s=5., compile_s=30.+seed, first_epoch=first)

def test_table_of_runs():
    [r,other] = quality_table([run('hybrid_s', 0, .93), run('hybrid_s', 1, .95, 119.), run('hybrid_s', 2, .1, status='cut short'), run('timm_vit', 0, .8)])
    assert (r['name'],r['seeds'],r['accuracy'],r['low'],r['high'],r['seconds'],r['compile_s'])==('hybrid_s',2,pytest.approx(.94),.93,.95,119.,31.)
    assert (other['name'],other['seeds'])==('timm_vit',1)

@pytest.mark.parametrize('accs,seconds,first,ok', [((.929,.931,.9301),119.,1.,(True,True,True,True)), ((.929,.931,.9299),121.,1.2,(False,False,True,False)), ((.95,.95),100.,1.,(True,True,False,True))])
def test_goals_of_quality(accs, seconds, first, ok):
    rows = quality_table([run('hybrid_s', i, a, seconds, first=first) for i,a in enumerate(accs)])
    assert tuple(g['met'] for g in quality_goals(dict(rows=rows)))==ok

def test_a_plan_runs_and_writes(tmp_path):
    r = run_plan('try', seed=1, device='cpu', file=tmp_path/'a.json', epochs=2, share=.2)
    assert json.loads((tmp_path/'a.json').read_text())==json.loads(json.dumps(r)) and r['status']=='complete' and len(r['epochs'])==2
    assert r['recipe']['seed']==1 and r['recipe']['drloc']=='paper' and r['epochs'][-1]['drloc']>0
    assert r['seconds']+r['compile_s']==pytest.approx(r['epochs'][-1]['wall_s']) and r['n_valid']==360

def test_the_trial_compiles_and_the_record_tells(monkeypatch):
    def fit(recipe, device, path, rec, file=None):
        first = 40. if recipe.warmup==0 else 3.                         # the trial has no warm-up
        es = [dict(wall_s=first+i, steady_s=1., valid_s=.1, accuracy=.5) for i in range(recipe.epochs)]
        return rec | dict(epochs=es, params=1, status='complete', **bench.clocked(es))
    monkeypatch.setattr(bench, '_fit', fit)
    r = run_plan('hybrid_s', device='cpu')
    assert r['trial']==dict(seconds=5., compile_s=39.) and r['compile_s']==2. and len(r['epochs'])==int(120/1.04)
    assert quality_table([r])[0]['compile_s']==39. and 'trial' not in run_plan('hybrid_s', device='cpu', epochs=2)

def test_each_variation_can_be_asked_for():
    "`--only` separates names by commas, so no name may hold one"
    assert not [n for n in SWEEP if ',' in n or '+' in n or n!=n.strip()]
    assert bench.variation('no mixing + wider stem+lr 2e-3 + residuals 2')==dict(mix=False, lr=2e-3, net=dict(stem=(96,192), residuals=2))
    assert all(bench.variation(n)==SWEEP[n] for n in SWEEP)

def test_runs_stay_on_the_gpus_that_the_program_may_use(monkeypatch):
    "A run gets the name by which the whole machine knows its GPU, not its place among those that are visible"
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    assert bench._slots('cuda', 2)==['3','5','3','5'] and bench._slots('cpu', 2)==[None]*2
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    monkeypatch.setattr(bench.torch.cuda, 'device_count', lambda: 2)
    assert bench._slots('cuda', 1)==['0','1'] and bench.visible_gpus(4)==['0','1','2','3']

def test_a_plan_with_another_network():
    "Its options change and nothing else, in a process that got them as JSON, and what is no option is named"
    net = json.loads(json.dumps(SWEEP['wider stem']['net']))
    r,plain = bench._settings(PLANS['hybrid_m'], net=net, epochs=8).check(),bench._settings(PLANS['hybrid_m'], epochs=8).check()
    a,b = create_model(r.model, 7),create_model('hybrid_m', 7)
    assert r.model!='hybrid_m' and asdict(r) | dict(model='hybrid_m', name=plain.name)==asdict(plain)
    assert [m.stem[0][0].out_channels for m in (a,b)]==[96,64] and len(a.blocks)==len(b.blocks)==6 and a.num_features==b.num_features
    with pytest.raises(ValueError, match=r"hybrid_m has no option 'stm'; it has .*stem"): bench._settings(PLANS['hybrid_m'], net=dict(stm=3))
    MODELS.pop(r.model)

def test_plans_are_what_they_say():
    "Peers train without the side task, hybrids with it; each in the time that the goal gives it"
    for name,p in PLANS.items():
        if name=='try' or p.model in ('cct_7_3x1','simple_vit') and not find_spec('vit_pytorch'): continue
        r = bench._settings(p, epochs=8)
        assert (r.drloc=='none')==(p.model in PEERS) and r.data=='cifar10' and r.compile and p.minutes<=(10 if name.endswith('_long') or name=='hybrid_m' else 2)
        assert r.heldout==0                                                  # judged on the test set, last epoch; sweeps are not
    for n in PEERS: MODELS.pop(n, None)

def test_sweep_is_judged_on_held_out_images(monkeypatch, tmp_path):
    jobs = {}
    used = []
    def run_here(js, slots, say):
        used.append(len(slots))
        for name,cmd in js.items():
            jobs[name] = job = json.loads(cmd[cmd.index('--worker')+1])
            bench.write_json(job['file'], dict(epochs=[dict(valid_loss=1.)], status='complete', n_valid=job['heldout'], accuracy=.5, seconds=9., compile_s=1., n_train=1000, recipe=dict(bs=100)))
    monkeypatch.setattr(bench, '_in_slots', run_here)
    rows = bench.sweep_rows('cpu', 1, 1, print, out=tmp_path)
    assert [r['name'] for r in rows]==list(SWEEP) and all(r['n_valid']==5000 for r in rows) and jobs['lr 2e-3']['lr']==2e-3
    assert [r['name'] for r in bench.sweep_rows('cpu', 1, 1, print, out=tmp_path, only='no mixing')]==['no mixing'] and jobs['no mixing']['mix'] is False
    assert jobs['no mixing']['epochs']==0 and used==[1,1] and rows[0]['seconds']==9.       # a GPU for each, and the plan's minutes
    assert 'seconds' not in bench.sweep_rows('cpu', 1, 1, print, out=tmp_path, only='lr 2e-3', epochs=4)[0] and jobs['lr 2e-3']['epochs']==4 and used[-1]==4
    files = {f.name for f in (tmp_path/'sweep_runs').iterdir()}
    assert len(files)==len(SWEEP)+1 and {'hybrid_s-no_mixing.json','hybrid_s-lr_2e_3.json','hybrid_s-lr_2e_3-4.json'}<=files    # each run's own record stays
    with pytest.raises(ValueError, match="no variation 'lr'"): bench.sweep_rows('cpu', 1, 1, print, out=tmp_path, only='lr')
    with pytest.raises(ValueError, match="unknown plan 'hybrid'; there are: hybrid_s"): bench.quality_rows('cpu', 1, 1, print, plan='hybrid')

def test_only_runs_of_this_call_count(monkeypatch, tmp_path):
    "Records of earlier runs stay, and are not told as new; a variation has files and a name of its own; nothing is written where nothing ran"
    rec = lambda label, seed, a: dict(plan=label, seed=seed, status='complete', params=1, epochs=[{}]*3, accuracy=a, seconds=9., valid_s=1., compile_s=1., first_epoch=1., recipe=dict(model='m'))
    def run_here(js, slots, say, fails=()):
        for name,cmd in js.items():
            job = json.loads(cmd[cmd.index('--worker')+1])
            if job['seed'] not in fails: bench.write_json(job['file'], rec(job['label'], job['seed'], .5))
    monkeypatch.setattr(bench, '_in_slots', run_here)
    kw = dict(plan='hybrid_s', out=tmp_path)
    [r] = bench.quality_rows('cpu', 1, 1, print, **kw)
    assert (r['name'],r['seeds'],r['epochs'],r['most_epochs'])==('hybrid_s',3,3,3)
    was = {f.name: f.read_text() for f in (tmp_path/'quality').iterdir()}
    monkeypatch.setattr(bench, '_in_slots', lambda *a: run_here(*a, fails=(0,2)))
    assert [r['seeds'] for r in bench.quality_rows('cpu', 1, 1, print, **kw)]==[1]
    monkeypatch.setattr(bench, '_in_slots', lambda *a: None)
    with pytest.raises(RuntimeError, match='no run of hybrid_s got through its first epoch; records of earlier runs are as they were'): bench.quality_rows('cpu', 1, 1, print, **kw)
    bench.write_json(earlier := tmp_path/'sweep_runs'/'hybrid_s-mixing.json', dict(epochs=[]))
    with pytest.raises(RuntimeError, match='no variation got through its first epoch; records of earlier runs are as they were'): bench.sweep_rows('cpu', 1, 1, print, only='mixing', out=tmp_path)
    assert json.loads(earlier.read_text())==dict(epochs=[])
    assert {f.name: f.read_text() for f in (tmp_path/'quality').iterdir()}==was and sorted(was)==[f'hybrid_s-s{i}.json' for i in range(3)]
    monkeypatch.setattr(bench, '_in_slots', run_here)
    [r] = bench.quality_rows('cpu', 1, 1, print, only='no side task + wd 0.15', seeds=(0,), **kw)
    assert r['name']=='hybrid_s, no side task + wd 0.15' and not bench.quality_goals(dict(rows=[r]))
    assert sorted(f.name for f in (tmp_path/'quality').iterdir())==[f'hybrid_s-s{i}.json' for i in range(3)]+['hybrid_s_no_side_task_wd_0.15-s0.json']
    assert bench.quality_rows('cpu', 1, 1, print, seeds=(5,5,6), **kw)[0]['seeds']==2                   # a seed named twice runs once
    assert [json.loads((tmp_path/'quality'/f'hybrid_s-s{i}.json').read_text())['seed'] for i in (5,6)]==[5,6]

def test_jobs_share_slots(tmp_path):
    "Two slots, four jobs: each in a slot of its own, a failure costs its own job alone"
    code = "import os,sys,time; open(sys.argv[1],'w').write(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(.3); sys.exit(sys.argv[1].endswith('2'))"
    told = []
    _in_slots({str(i): [sys.executable,'-c',code,str(tmp_path/f'{i}')] for i in range(4)}, [0,1], told.append)
    assert [(tmp_path/str(i)).read_text() for i in (0,1)]==['0','1'] and all((tmp_path/str(i)).read_text() in '01' for i in (2,3))
    assert sorted(t.split(':')[1].strip() for t in told)==['done']*3+['failed'] and any(t.startswith('2: failed') for t in told)

def test_peers_make_ten_logits():
    for n,f in PEERS.items():
        try: m = f(10)
        except ImportError: continue                                         # vit-pytorch is not a requirement
        assert m.eval()(torch.randn(2,3,32,32)).shape==(2,10)
        assert 3e6<sum(p.numel() for p in m.parameters())<8e6

def test_a_missing_package_is_named(monkeypatch):
    for m in ('vit_pytorch','vit_pytorch.cct'): monkeypatch.setitem(sys.modules, m, None)
    with pytest.raises(ImportError, match='cct_7_3x1 needs a package.*pip install vit-pytorch'): bench._join('cct_7_3x1')
    assert 'cct_7_3x1' not in MODELS

def test_a_process_is_held_with_all_its_threads():
    "A thread that runs already is held too"
    code = ("import os,threading,time; from vt_drloc.bench import _hold; t = threading.Thread(target=time.sleep, args=(5,), daemon=True); t.start(); _hold(1); "
            "print({len(os.sched_getaffinity(int(i))) for i in os.listdir('/proc/self/task')}); os._exit(0)")
    p = subprocess.run([sys.executable,'-u','-c',code], capture_output=True, text=True)
    assert p.stdout.strip()=='{1}', p.stderr

@pytest.mark.parametrize('section,says', [('no_such', "unknown section 'no_such'; there are: augment, speed"),
                                          pytest.param('speed', 'no GPU', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'))])
def test_bad_arguments(section, says):
    with pytest.raises(SystemExit, match=says): bench.main(section=section)

def test_a_number_of_rounds_that_is_none():
    for n in (-1,1):
        with pytest.raises(SystemExit, match=f"--rounds {n}: at least 2, since one has no interval, or 0 for the section's own number"): bench.main(section='cpu', device='cpu', rounds=n)

@pytest.mark.parametrize('more,says', [(dict(section='sweep', plan='hybrid'), "unknown plan 'hybrid'; there are: hybrid_s"), (dict(section='quality', plan='hybrid'), "unknown plan 'hybrid'"),
                                       (dict(section='curves', seeds='0'), '--seeds 0: at least two, or nothing tells what chance does'),
                                       (dict(section='quality', only='no mixin'), "no variation 'no mixin'"),
                                       (dict(section='curves', device='mps'), "--device mps: give 'cuda' or 'cpu'"), (dict(section='cpu', minutes=0.), '--minutes 0.0: give more than 0'),
                                       (dict(section='sweep', beside=0, epochs=1), '--beside 0: at least one run'), (dict(section='quality', seeds='a,b'), '--seeds a,b: give whole numbers')])
def test_what_could_only_fail_after_training_is_refused(more, says, tmp_path):
    with pytest.raises(SystemExit, match=says): bench.main(**{**dict(device='cpu', out=str(tmp_path)), **more})
    assert not list(tmp_path.iterdir())

def test_a_section_without_a_measured_case_leaves_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SECTIONS, 'nothing', lambda *a, **kw: [dict(name='a', error='no memory')])
    (tmp_path/'nothing.json').write_text('as it was')
    with pytest.raises(SystemExit, match='no case of nothing was measured'): bench.main(section='nothing', device='cpu', out=str(tmp_path))
    assert (tmp_path/'nothing.json').read_text()=='as it was' and 'no memory' in capsys.readouterr().out

def test_goals_of_records_with_gaps():
    assert bench.gpu_goals(dict(rows=[dict(name='2 GPUs', batch=2, block_s=[1.,1.])]))==[]
    [only] = bench.vt_goals(dict(rows=[dict(model='t2t_vit_14', cudnn=False, batch=128, block_s=[.1,.1], peak_bytes=None)]))
    assert 'speed' in only['goal']

@pytest.mark.parametrize('how', ['eager','compiled'])
def test_a_step_as_one_graph_is_the_same_step(how):
    "Both arms in turns, each with its own recording, from the fourth step on; on a CPU, where a tape stands in, without compiling"
    both = []
    for one in (False,True):
        run = Steps(Case(name='graph', batch=4, arms=(h := how if one else 'eager', f'{h} side'), one_graph=one, **tiny), 'cpu')
        for _ in range(6):
            for arm in run.case.arms: run.step(arm)
        both.append(run)
    assert sorted(both[1].graphs)==[how,f'{how} side'] and all(g.graph and g.seen==6 for g in both[1].graphs.values()) and not both[0].graphs
    assert all(torch.equal(p, q) for p,q in zip(*(r.params for r in both), strict=True))
    assert torch.equal(*(r.generator.get_state() for r in both))

def test_cases_as_one_graph():
    "No graphs of torch.compile's beside; the small networks as built, two with fused attention under names of their own, and the Learner of the short plan"
    cases = SECTIONS['side_small_graph']
    assert [c.model for c in cases]==['t2t_mini','swin_mini','cvt_13_gap_mini','cvt_mini','resnet_mini','swin_mini','hybrid_s'] and all(c.one_graph and c.mode=='' for c in cases)
    assert [c.attention for c in cases]==[False]*5+[True]*2 and len({c.name.split(',')[0] for c in cases})==7
    assert [c.name for c in SECTIONS['whole_small'] if c.recipe.get('step_graph')]==['Learner, one graph, batch 512','Learner, one graph, batch 256']
