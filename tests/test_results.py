"Pages of results that wait for their runs: what they compute from records that are made up, and what they say without any"
import ast, json, math, re
from dataclasses import asdict
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np, pytest
from vt_drloc.bench import mean_interval
from vt_drloc.evidence import PAPER, W, planned, read_plan
from vt_drloc.train import read_records

results = Path(__file__).resolve().parent.parent/'nbs'/'results'
plan = results/'plans'/'224px_swin_t.txt'
released,strong = f'{W}, released',f'{W}, ramp_decay, lambda=1.75'

# last accuracy of each run: (batch, laid out for, task, weight) -> one for each seed
ENDS = {(512,100,'none',None): [88.,88.5,87.75], (512,100,'paper',.5): [90.,90.75,89.5], (512,100,'released',.5): [89.], (512,100,'paper',1.75): [91.5],
        (1024,300,'none',None): [62.5], (1024,300,'released',.5): [70.], (1024,100,'none',None): [55.], (512,300,'none',None): [75.], (128,300,'none',None): [86.], (128,300,'released',.5): [87.25]}

def key(r): return r.bs, r.laid_out or r.epochs, r.drloc, r.lambda_drloc if r.drloc!='none' else None

def record(run, epochs=None):
    "What a run of the plan might leave; of 100 epochs and 101 nine tenths are learned by epoch 40"
    r,e = run.recipe.check(),run.recipe
    last,n = ENDS[key(e)][e.seed],epochs or e.epochs
    accs = [last*(.9*min(i/40, 1) + .1*max(0, i-40)/(e.epochs-40)) for i in range(1, n+1)] if e.epochs > 40 else [last*i/40 for i in range(1, n+1)]
    if n==e.epochs: accs[n-2] = last+.25                    # the best epoch is not the last
    bad = e.bs==1024
    es = [dict(epoch=i, accuracy=a/100, train_loss=2.3-.01*i, drloc=.2, train_s=60., wall_s=60.*(i+1), grad_norm=2.+bad, grad_norm_max=4.+(i==7)*2+bad*90) for i,a in enumerate(accs)]
    at = {'images': [1.25,1.25], 'scrambled pixels': [1.5,1.5], 'constant image': [2.,2.]}
    return dict(status='complete' if n==e.epochs else 'cut short', recipe=asdict(r), data=dict(name=e.data, size=[r.size]*2, held='device'), hardware=dict(device='GPU', gpu=f'{e.seed}{e.bs}'), epochs=es,
                wall_s=60.*n, runs_on_device=2, started='2026-01-01T00:00:00Z', revision='r'*40, versions=dict(torch='2'), position=dict(probe=dict(grid=[7,7], guessing=[1.5,1.5], error=at, steps=600)),
                attention=[dict(block=f'b{i}', distance=[2.,3.], even=[3.5,3.5], entropy=[.5,1.-.5*bad], image=[.25,.5]) for i in range(12)])

def fakes(only=lambda r: True, **kw): return [record(o, **kw) for o in read_plan(plan) if only(o.recipe)]

def table3(model, data, ends, drloc):
    "A run at 224 pixels of another network, in the protocol of the main table"
    return [record_of(model, data, drloc, s, last) for s,last in enumerate(ends)]

def record_of(model, data, drloc, seed, last):
    rec = record(read_plan(plan)[0])
    return rec | dict(recipe=rec['recipe'] | dict(model=model, data=data, drloc=drloc, lambda_drloc=None if drloc=='none' else .5 if model=='swin_t' else .1, seed=seed), data=rec['data'] | dict(name=data), epochs=[*rec['epochs'][:-1], rec['epochs'][-1] | dict(accuracy=last/100)])

def run_cells(file, space):
    "Runs a page's cells where we are; each with what it shows"
    for c in json.loads(file.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        if c['cell_type']!='code' or 'COLAB_RELEASE_TAG' in source or source.startswith(('#| data','#| slow','#| cuda')): continue
        tree = ast.parse(source)
        last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.endswith(';') else None
        exec(compile(tree, c['id'], 'exec'), space)
        yield c,eval(compile(last, c['id'], 'eval'), space) if last else None

def page(name, recs, monkeypatch):
    "Runs the page's cells on these records; names of the page, and what each cell shows by its id"
    monkeypatch.setattr('vt_drloc.train.read_records', lambda folder=None: recs)
    monkeypatch.chdir(results)
    space,shown = {},{}
    for c,value in run_cells(results/f'{name}.ipynb', space): shown[c['id']] = value
    return space,shown

def text(o): return (o.data if hasattr(o, 'data') else '' if o is None else o.to_string() if hasattr(o, 'to_string') else str(o)).replace('\xa0', ' ')
def words(shown): return '\n'.join(map(text, shown.values()))

@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close('all')


# ---- Swin-T at 224 pixels

swin = '03_swin_t_224px'

@pytest.fixture(scope='module')
def full():
    "The page with all of the plan run"
    with pytest.MonkeyPatch.context() as m: return page(swin, fakes(), m)

def test_the_plan_is_the_one_expected():
    rs = [o.recipe for o in read_plan(plan)]
    assert len(rs)==14 and {k: len(v) for k,v in ENDS.items()} == {k: sum(key(r)==k for r in rs) for k in ENDS}

def test_nothing_is_made_up(monkeypatch):
    "Without records: nothing measured, no verdict, no advice; every part says that it has not been run"
    space,shown = page(swin, [], monkeypatch)
    said = words(shown)
    assert not len(space['runs']) and said.count('ot run yet') > 14 and 'complete' not in text(shown['a3000009'])
    assert space['advice']()=='*Not run yet, so there is no advice yet.*' and space['where_text']()=='*Not run yet.*' and 'nothing has been run' in space['time_text']()
    assert 'not been run' in space['base_text']() and 'holds' not in said and '**' not in said
    assert (space['settings'].verdict=='').all() and (space['settings'][['without','with it']]=='not run yet').all(axis=None)

def test_schedules_need_no_records(monkeypatch):
    "Rates from the recipes: a cosine from step 0, at epoch 40 and at the end"
    space,shown = page(swin, [], monkeypatch)
    rates = shown['a300001c']
    cos = lambda e,l: 100*(.01 + .99*(1+math.cos(math.pi*e/l))/2)
    assert [*rates.index] == [('512','100 of 100'), ('1,024','40 of 100'), ('512','40 of 300'), ('1,024','101 of 300')] and [*rates['peak rate']] == ['5e-04','1e-03','5e-04','1e-03']
    assert [*rates.iloc[:,1]] == pytest.approx([cos(40,100)]*2+[cos(40,300)]*2, abs=.06) and [*rates.iloc[:,2]] == pytest.approx([cos(100,100),cos(40,100),cos(40,300),cos(101,300)], abs=.06)

def test_gain_over_the_good_baseline(full):
    "Three seeds: 2, 2.25 and 1.75 points, so it holds; the released form has one seed and no verdict"
    space,shown = full
    g = space['gains'].set_index('arm')
    _,lo,hi = mean_interval([2.,2.25,1.75])
    assert g.loc[W,['without','with it','gain']].tolist() == pytest.approx([np.mean([88,88.5,87.75]), np.mean([90,90.75,89.5]), 2.]) and (g.loc[W,'verdict'],g.loc[W,'seeds']) == ('holds',3)
    assert g.loc[released,['without','with it','gain']].tolist() == pytest.approx([88,89,1]) and g.loc[released,'verdict']=='no verdict'
    assert f'**2.00 points** ({lo:.2f} to {hi:.2f}), 3 seeds: *holds*' in space['gain_text']() and '**1.00 points**, 1 seed: *no verdict*' in space['gain_text']()
    assert f"**88.08 %**" in space['base_text']() and f"{np.mean([88,88.5,87.75])-PAPER['swin','cifar10'][0]:.2f} points above the paper" in space['base_text']()
    assert [*shown['a3000017'].difference] == ['1.50','-2.50','-1.00'] and set(shown['a3000017'].verdict)=={'no\xa0verdict'} and shown['a3000017'].index[1]==('form','released','paper, 1.75')

def test_two_by_two(full):
    "At epoch 40: 79.2 and 56.25 where runs go on, 55 and 75 where they stop"
    space,shown = full
    t = shown['a3000020']
    assert [*t['at epoch 40']] == ['79.20','55.00','75.00','56.25'] and [*t['last epoch']] == ['88.00','55.00','75.00','62.50'] and t.loc[('1,024','101 of 300'),'best epoch']=='62.75'
    assert [round(v, 2) for v in space['effect'].values()] == [-24.2, -18.75, -4.2, 1.25]
    said = space['where_text']()
    assert 'larger change is that of the **batch with its rate**' in said and '**62.50 %**, 3.03 points above' in said and 'falls by 25.50 points' in said and '3.03 more' in said
    assert re.search(r'3 seeds of one and the same setting lie within 0\.6[78] points', said)

def test_below_the_paper_is_said(monkeypatch):
    monkeypatch.setitem(ENDS, (1024,300,'none',None), [50.])
    monkeypatch.setitem(ENDS, (512,300,'none',None), [30.])
    said = page(swin, fakes(), monkeypatch)[0]['where_text']()
    assert '9.47 points below' in said and 'more.' not in said and 'larger change is that of the **schedule**' in said

def test_inside(full):
    "Largest norm and where; epochs in which a step was clipped"
    m = full[0]['measured'].set_index('batch')
    assert m.loc['512',['largest norm','in epoch','epochs with clipping']].tolist() == [6,8,1] and m.loc['1,024',['largest norm','in epoch','epochs with clipping']].tolist() == [96,8,101]
    assert m.loc['512','loss, epoch 40'] == pytest.approx(1.91) and [*full[0]['know'][full[0]['know'].measure=='probe'].images] == [1.25]*2

def test_attention_of_the_two(full, monkeypatch):
    "A line for each of the two whole runs; without their records, a word instead"
    assert list(full[0]['heads']) == [full[0]['kind'](k) for k in full[0]['whole']] and len(full[0]['heads']) == 2
    assert text(page(swin, [], monkeypatch)[1]['a3000033'])=='*Not run yet.*'

def falling(recs, at=31, to=.2):
    "The same records, the released setting's baseline broken down from that epoch on"
    for r in recs:
        if r['recipe']['bs']==1024 and r['recipe']['laid_out']==300 and r['recipe']['drloc']=='none':
            for e in r['epochs'][at:]: e.update(accuracy=to, train_loss=2.25, grad_norm_max=700.)
    return recs

def test_nobody_breaks_down(full):
    "62.5 % at the end is no breakdown; a last epoch that is .25 points below the best is none, either"
    assert full[0]['breaks_text']()=='None of the runs so far does.' and 'Keep the rate down' not in full[0]['advice']() and 'breaks' not in full[0]['short']()

def test_a_breakdown_is_found(monkeypatch):
    "Where, from what to what, at which rate, and who did not"
    space,_ = page(swin, falling(fakes()), monkeypatch)
    said = space['breaks_text']()
    before = 100*fakes(lambda r: r.bs==1024 and r.epochs==101 and r.drloc=='none')[0]['epochs'][30]['accuracy']
    assert f'breaks down in epoch 32**: its accuracy falls from {before:.2f} to 20.00 %' in said and 'rises from 2.00 to 2.25' in said and '0.00097 then, 97 %' in said
    assert 'before is 96.0 long; in this epoch and the next two it is 700.0' in said and 'come down to 0.00077' in said and 'at 55.00 %' in said and 'neither suspect does it alone' in said
    assert 'breaks down in epoch 32 and ends at **20.00 %**' in space['short']() and 'peak rate of 1e-3' in space['advice']() and 'with 5e-4' in space['advice']()
    assert "and at the gradient's norm" in space['advice']()                   # 96 before, 6 at most in a run that went well

def test_a_norm_that_gave_no_warning(monkeypatch):
    recs = falling(fakes())
    for r in recs:
        if r['recipe']['bs']==1024:
            for e in r['epochs'][:31]: e['grad_norm_max'] = 3.
    assert 'gave no warning: before the breakdown it was at most 3.0, and in runs that went well up to 6.0' in page(swin, recs, monkeypatch)[0]['advice']()

def test_epochs_saved_are_told(full, monkeypatch):
    said = full[0]['sooner_text']()
    t = full[0]['faster_table'](full[0]['reach_table'](full[0]['main'], W)).iloc[0]
    assert f"**{t['epochs saved']:.1f} epochs** are saved ({t['from']:.2f} to {t.to:.2f}), 3 seeds: *{t.verdict}*" in said
    assert page(swin, [], monkeypatch)[0]['sooner_text']().startswith('*No pair')

def test_the_task_that_keeps_a_run_from_breaking(full, monkeypatch):
    "Points before the breakdown and at the end; nothing of it where nobody breaks down, or both do"
    assert full[0]['kept_text']().endswith("(one seed, no verdict). Its best epoch, which is what the released code reports, has 70.25 %, 13.64 points below the paper's.") and 'did not break down' not in full[0]['advice']()
    recs = falling(fakes())
    tasked = next(r for r in recs if r['recipe']['bs']==1024 and r['recipe']['drloc']=='released')
    for e in tasked['epochs']: e.update({'lambda': .5-e['epoch']/1000, 'accuracy': .5 if e['epoch']<31 else .8, 'grad_norm_max': 4.})
    alone = next(r for r in recs if r['recipe']['bs']==1024 and r['recipe']['epochs']==101 and r['recipe']['drloc']=='none')
    alone['epochs'][25]['accuracy'] = .48                                       # it is past its best when it breaks down
    space,_ = page(swin, recs, monkeypatch)
    said = space['kept_text']()
    assert 'ends at **80.00 %**, 3.89 points below' in said and 'its gain is 60.00 points, where the paper has 24.42' in said and "best until then was 48.00 %, the other's 50.00 %" in said
    assert 'with the task is 4.0 long, without it 700' in said and 'weight was 0.47 in that epoch, and 0.40 at the end' in said and 'So 2.00 of the 60.00 points' in said
    assert '20.00 into 80.00 %, by +60.00 points (*no verdict*, 1 seed). The run with it did not' in space['advice']() and 'ends at **80.00 %** (1 seed), where the paper has 83.89' in space['short']()
    for e in tasked['epochs'][50:]: e['accuracy'] = .3
    space,_ = page(swin, recs, monkeypatch)
    assert 'one over one that breaks' not in space['kept_text']() and 'run with it did not' not in space['advice']()

@pytest.mark.parametrize('second,said', [(.3,'**The three fast parts are not the cause.**'), (.9,'**The fast parts may be the cause.**')])
def test_is_it_our_speed(second, said, monkeypatch):
    "The plain run breaks down as well, or goes on"
    plain = read_plan(results/'plans'/'224px_breakdown.txt')[0]
    rec = record(read_plan(plan)[0], epochs=40)
    rec['recipe'] = asdict(plain.recipe.check())
    for e in rec['epochs']: e['accuracy'] = .8 if e['epoch']<33 else second
    text = page(swin, [*falling(fakes()), rec], monkeypatch)[0]['doubts_text']()
    assert text.startswith(said) and ('in epoch 34 where ours does in epoch 32: from 80.00 to 30.00 %' in text)==(second==.3)
    assert page(swin, fakes(), monkeypatch)[0]['doubts_text']()==''

@pytest.mark.parametrize('late,said', [(.8,'**The rate, rather than the batch as such.**'), (.2,'**The rate alone is not the cause.** At half the rate, a peak of 5e-04, the batch of 1,024 breaks down as well, in epoch 35')])
def test_is_it_the_rate(late, said, monkeypatch):
    "The same batch at half the rate goes on, and page and summary say so, or it breaks down too"
    half = next(o for o in read_plan(results/'plans'/'224px_breakdown.txt') if o.name.endswith('half-s0'))
    rec = record(half)
    for e in rec['epochs']: e['accuracy'] = .7 if e['epoch']<34 else late
    space = page(swin, [*falling(fakes()), rec], monkeypatch)[0]
    assert said in space['doubts_text']() and ('speaks for the rate as the cause' in space['short']())==(late==.8)
    if late==.8: assert '80.00 % at epoch 40' in space['doubts_text']() and '(80.00 % there, 1 seed)' in space['short']()
    assert 'rate' not in page(swin, [*fakes(), rec], monkeypatch)[0]['short']()      # nothing broke down that needs a reason

@pytest.mark.parametrize('acc,at', [([.3,.5,.6,.3,.3], 3), ([.3,.5,.6,.3,.51], None), ([.3,.6,.2,.6,.2], 4), ([.3,.4,.5], None), ([.5], None)])
def test_what_a_breakdown_is(full, acc, at):
    "Ten points below the best, for good; who recovers has not broken down"
    assert full[0]['broke'](dict(epochs=[dict(accuracy=a) for a in acc]))==at

def test_doubts_have_a_row_each(monkeypatch):
    "Those of the second list that are there, by name; the others are not run yet"
    one = read_plan(results/'plans'/'224px_breakdown.txt')[1]
    rec = record(read_plan(plan)[0], epochs=40)
    rec['recipe'] = asdict(one.recipe.check())
    t = page(swin, [*fakes(), rec], monkeypatch)[1]['a3000043']
    assert [o.replace('\xa0', ' ') for o in t['breaks down']] == ['not run yet','no',*['not run yet']*2] and [*t['peak rate']] == ['1e-03','5e-04','1e-03','1e-03'] and [*t.done] == ['','40','','']

def test_sharpness_of_all(full, monkeypatch):
    "Means over heads and blocks: .75 for batch 512 and 128, .5 for 1,024"
    s = full[0]['sharp']
    assert len(s)==14 and s.entropy.tolist() == pytest.approx([.5 if b==1024 else .75 for b in s.bs])
    assert 'sharpest attention is that of batch 1,024' in full[0]['sharp_text']() and 'softer' not in full[0]['sharp_text']()
    assert page(swin, [], monkeypatch)[0]['sharp_text']()==''

def test_each_setting(full):
    s = full[0]['settings']
    assert [*s.gain] == ['2.00','1.00','7.50','1.25'] and [*s.verdict] == ['holds',*['no verdict']*3]
    said = full[0]['advice']()
    assert 'batch 512, 100 epochs of a schedule for 100 ends at 88.00 %, and batch 1,024, 101 epochs of a schedule for 300 at 62.50 % (seed 0 of both): 25.50 points' in said
    assert 'Use it' in said and '62.50 into 70.00 %, by +7.50 points (*no verdict*, 1 seed)' in said
    assert '14 of 14 runs' in full[0]['time_text']() and f"{sum(r['wall_s'] for r in fakes())/3600:.1f} hours" not in full[0]['time_text']()

def test_half_done(monkeypatch):
    "Seed 0 of the first point, and the released setting in the middle of its run"
    recs = fakes(lambda r: r.seed==0 and r.epochs==100 and r.lambda_drloc!=1.75) + fakes(lambda r: r.bs==1024 and r.epochs==101 and r.drloc=='none', epochs=12)
    space,shown = page(swin, recs, monkeypatch)
    assert 'cut short after 12 of 101 epochs' in text(shown['a3000009']) and [*space['gains'].verdict] == ['no verdict']*2
    assert space['where_text']()=='*Not run yet.*' and [*space['settings'].gain] == ['2.00','1.00','',''] and 'Too few seeds' in space['advice']()
    assert [*shown['a3000020']['at epoch 40']] == ['79.20',*['not run yet']*3] and shown['a3000020'].iloc[3]['best epoch']=='not run yet'

@pytest.mark.parametrize('gain,said', [(-2.,'It does not help here'), (0.,'It does not help here')])
def test_advice_follows_the_verdict(monkeypatch, gain, said):
    monkeypatch.setitem(ENDS, (512,100,'paper',.5), [e+gain+d for e,d in zip(ENDS[512,100,'none',None], (.05,0,-.05))])
    assert said in page(swin, fakes(lambda r: r.bs==512 and r.epochs==100), monkeypatch)[0]['advice']()


# ---- the claims

claims = json.loads((results/'claims.ipynb').read_text(encoding='utf-8'))

def three_of(gains, model='swin_t', data='cifar10'):
    "Three seeds of both arms of a network for each set of gains"
    return table3(model, data, [80.]*3, 'none') + table3(model, data, [80.+g for g in gains], 'paper')

def test_in_part_is_what_the_rules_say(monkeypatch):
    "One network for and one undecided is *in part* too; page and chapter say so in the same words"
    table = page('claims', three_of((1.,1.1,.9)) + three_of((3.,-3.,1.), 't2t_vit_14'), monkeypatch)[0]['claims'].set_index('claim')
    assert table.verdict['It helps whatever the visual transformer'] == 'in part' and table.rests['It helps whatever the visual transformer'] == 'holds: 1, undecided: 1'
    words = [''.join(c['source']) for f in (results/'claims.ipynb', results.parent/'23_evidence.ipynb') for c in json.loads(f.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown' and 'n part*' in ''.join(c['source'])]
    assert len([w for w in words if 'holds for some' in w and 'be they undecided or against it' in w]) == 2 and not any('disagree' in w for w in words)

def test_cost_counts_every_record_of_the_benchmark(monkeypatch):
    "All committed blocks of steps of the three networks at 224 pixels on a GPU, compiled and eager, each by the same rule; what a cheap step is needs no seeds"
    space,shown = page('claims', [], monkeypatch)
    steps,want = space['steps'],{}
    for f in (results/'bench').glob('*.json'):
        o = json.loads(f.read_text())
        if not str(o.get('section')).startswith('side') or not o['circumstances']['device'].startswith('NVIDIA'): continue
        times = {(r['name'],r['arm']): r['block_s'] for r in o['rows']}
        for (name,arm),with_ in times.items():
            if arm.endswith(' side') and name.split(',')[0] in ('swin_t','t2t_vit_14','cvt_13_gap'): want[o['section'], f'{name}, {arm.split()[0]}: with / without'] = len(with_)
    assert {(r.section,r.goal): r.blocks for r in steps.itertuples()} == want and len(want) >= 9 and {'side','side_eager','side512','side512_t2t','side512_cvt'} <= {s for s,_ in want}
    assert [*steps.verdict] == ['holds' if h <= 1.05 else 'does not' if l > 1.05 else 'undecided' for l,h in zip(steps.low, steps.high)]
    cost = space['claims'].set_index('claim').loc['The side task costs next to nothing']
    assert cost.rests == ', '.join(f'{v}: {n}' for v in ('holds','does not','undecided') if (n := (steps.verdict==v).sum()))
    assert any('blocks of steps' in ''.join(c['source']) and 'three seeds' in ''.join(c['source']) for c in claims['cells'])

def test_how_many_gains_hold_by_luck(monkeypatch):
    "Two of three have three seeds: 1-0.975^2 is 4.9 %; none without runs; and of the committed as many as have a verdict"
    recs = three_of((1.,1.1,.9)) + three_of((3.,-3.,1.), 't2t_vit_14') + [r for r in three_of((1.,1.,1.), 'cvt_13_gap') if r['recipe']['seed']]
    said = text(page('claims', recs, monkeypatch)[1]['74757f0a'])
    assert '**2 gains** have a verdict, and 1 of them holds.' in said and 'one of 2 would hold by luck with a chance of **5 %**' in said
    assert text(page('claims', [], monkeypatch)[1]['74757f0a'])=='*No gain has a verdict yet.*'
    space,shown = page('claims', read_records(), monkeypatch)
    n = (space['few'].seeds > 2).sum()
    luck = np.mean((np.random.RandomState(0).rand(100_000, n) < .025).any(1))
    assert f'**{n} gains**' in text(shown['74757f0a']) and float(re.search(r'chance of \*\*(\d+) %', text(shown['74757f0a']))[1]) == pytest.approx(100*luck, abs=1)


# ---- the main table

def test_main_table_is_open_without_runs(monkeypatch):
    space,_ = page('table', [], monkeypatch)
    t = space['table']
    mine = t[[w.endswith('ours') for *_,w in t.index]]
    assert len(mine)==6 and (mine[['without','with']]=='not\xa0run\xa0yet').all(axis=None) and (mine.verdict=='').all()
    theirs = t[[w.endswith('paper') for *_,w in t.index]]
    assert {(float(a),float(b)) for a,b in zip(theirs.without, theirs['with'])} == set(PAPER.values())

def test_main_table_takes_its_protocol_alone(monkeypatch):
    "Swin-T from the plan's first point, not from its other settings; CvT with two seeds, T2T without a pair"
    recs = fakes() + table3('cvt_13_gap', 'cifar100', [70.,71.], 'none') + table3('cvt_13_gap', 'cifar100', [72.,72.5], 'paper') + table3('t2t_vit_14', 'cifar10', [80.], 'none')
    space,_ = page('table', recs, monkeypatch)
    at = lambda data,net: space['table'].loc[(data,net,'●\xa0ours')].str.replace('\xa0', ' ')
    _,lo,hi = mean_interval([2.,2.25,1.75])
    assert at('CIFAR-10','Swin-T').tolist() == ['88.08','90.08','2.00',f'{lo:.2f} to {hi:.2f}','3','holds']
    assert at('CIFAR-100','CvT-13').tolist() == ['70.50','72.25','1.75','','2','no verdict'] and at('CIFAR-10','T2T-ViT-14').tolist() == ['80.00','not run yet','','','','']
    assert 'not run yet' in at('CIFAR-100','Swin-T').tolist()

def test_what_stands_beside_a_gain_is_what_it_is_made_of(monkeypatch):
    "A second seed without its partner: in words and as a dot, not in the row and not in the arrow"
    recs = table3('swin_t', 'cifar10', [80.,78.], 'none') + table3('swin_t', 'cifar10', [85.], 'paper') + table3('cvt_13_gap', 'cifar100', [70.], 'none')
    drawn = []
    monkeypatch.setattr('matplotlib.axes.Axes.annotate', lambda self, text, xy, xytext, **kw: drawn.append((self.get_title() or len(drawn), xytext[0], xy[0])))
    space,shown = page('table', recs, monkeypatch)
    at = lambda data,net: space['table'].loc[(data,net,'●\xa0ours')].tolist()
    assert at('CIFAR-10','Swin-T')[:3] == ['80.00','85.00','5.00'] and at('CIFAR-10','Swin-T')[4] == '1' and at('CIFAR-100','CvT-13')[:3] == ['70.00','not\xa0run\xa0yet','']
    assert text(shown['b7000019']) == '- swin_t on CIFAR-10, without: 2 runs, mean 79.00 %, of which 1 paired\n- cvt_13_gap on CIFAR-100, without: 1 run, mean 70.00 %, of which none paired'
    arrows = [(a,b) for _,a,b in drawn]
    assert (80.,85.) in arrows and (79.,85.) not in arrows and len(arrows) == len(PAPER)+1+1 and all(p in arrows for p in PAPER.values())
    assert text(page('table', fakes(), monkeypatch)[1]['b7000019'])=='*None.*'

def test_rows_add_up_with_the_committed_records(monkeypatch):
    "With minus without is the gain, but for rounding, in every row of ours and of the paper"
    t = page('table', read_records(), monkeypatch)[0]['table']
    for _,r in t[t.gain!=''].iterrows(): assert float(r['with'])-float(r.without) == pytest.approx(float(r.gain), abs=.0151)

def test_other_starts_are_not_in_the_main_table(monkeypatch):
    "Public weights or held-out images: no row; two settings in one row: refused"
    base = table3('swin_t', 'cifar10', [80.], 'none') + table3('swin_t', 'cifar10', [85.], 'paper')
    def but(**kw): return [r | dict(recipe=r['recipe'] | kw) for r in base]
    for kw in (dict(pretrained='imagenet'), dict(heldout=5000), dict(wd=.1)): assert len(page('table', base+but(**kw), monkeypatch)[0]['ours']) == 2
    with pytest.raises(ValueError, match='2 settings of swin_t on cifar10'): page('table', base+but(drop_path=.1), monkeypatch)

def test_small_networks_are_those_of_their_page(monkeypatch):
    "With the committed records: the gains of the two plans at 32 pixels"
    recs = read_records()
    _,shown = page('table', recs, monkeypatch)
    small = shown['b7000009']
    for (data,model),row in small.iterrows():
        data = data.lower().replace('-', '')
        some = planned(results/'plans'/f'32px_{data}.txt', recs)
        end = lambda d: {r['recipe']['seed']: 100*r['epochs'][-1]['accuracy'] for r in some if r['recipe']['model']==model and r['recipe']['drloc']==d and r['status']=='complete'}
        a,b = end('none'),end('paper')
        both = a.keys() & b.keys()
        assert row.gain == (f'{np.mean([b[s]-a[s] for s in both]):.2f}' if both else '') and row.seeds == (str(len(both)) if both else '')
    assert len(small)==6


# ---- what is stored

@pytest.mark.parametrize('where', ['results/02_small_32px','results/03_swin_t_224px','results/table','results/claims','explain/paper_map','index'])
def test_stored_text_is_that_of_the_records(where, monkeypatch):
    "A record that is added, and a page that was not run again, do not go together"
    monkeypatch.chdir((results.parent/where).parent)
    seen = 0
    for c,value in run_cells(results.parent/f'{where}.ipynb', {}):
        kind = 'text/markdown' if type(value).__name__=='Markdown' and value.data else 'text/html' if hasattr(value, '_repr_html_') else None
        stored = [''.join(o['data'][kind]) for o in c.get('outputs', []) if kind in o.get('data', {})]
        if not kind: continue
        words = (lambda t: re.findall(r'>([^<>\n]+)<', t)) if kind=='text/html' else str
        assert stored and words(stored[-1])==words(value.data if kind=='text/markdown' else value._repr_html_()), f"{where}, cell {c['id']}: run the page again"
        seen += 1
    assert seen
