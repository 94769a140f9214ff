"The benchmark's processes: turns, failures, a Learner that waits, the rival"
import json, math, subprocess, sys
import pytest, torch
from vt_drloc.bench import *
from vt_drloc.bench import Rival, main

tiny = dict(section='try', model='demo_cvt', size=32, precision='float32')

def test_a_failing_case_costs_its_row_alone():
    told = []
    rows = measure_cases([Case(name='good', batch=4, steps=1, arms=('eager',), **tiny), Case(name='bad', batch=4, steps=1, **{**tiny, 'model':'no_such'})],
                         'cpu', rounds=2, say=told.append)
    by = {r['name']:r for r in rows}
    assert "unknown model 'no_such'" in by['bad']['error'] and 'block_s' not in by['bad']
    assert len(by['good']['block_s'])==2 and all(s>0 for s in by['good']['block_s'])
    assert any('1 of 2' in t for t in told)

def test_a_learner_answers_epoch_by_epoch():
    "Each answer is one epoch's seconds a step; with the side task, augmentation and mixing in it"
    case = Case(name='learner', kind='learner', batch=8, steps=3, recipe=dict(drloc='paper', tfms='light', warmup=0), **tiny)
    [row] = measure_cases([case], 'cpu', rounds=3)
    assert 'error' not in row, row
    assert row['steps']==3 and len(row['block_s'])==3 and all(0<s<30 for s in row['block_s'])

def test_the_rival_is_the_released_loop():
    "Pairs from the CPU, a loss read back, all parameters moved"
    run = Rival(Case('try', 'rival', model='timm:swin_tiny_patch4_window7_224', kind='rival', batch=2, precision='float32', arms=('eager side',), steps=1), 'cpu')
    before = [p.detach().clone() for p in run.params]
    loss = run.step('eager side')
    assert isinstance(loss, float) and math.isfinite(loss)
    assert len(run.params)==len(list(run.model.parameters()))+len(list(run.drloc.parameters()))
    assert all(not torch.equal(p, q) for p,q in zip(run.params, before))

def test_side_task_is_in_the_step():
    "With it the MLP moves, without it does not"
    run = Steps(Case(name='side', batch=4, arms=('eager','eager side'), **tiny), 'cpu')
    mlp = lambda: torch.cat([p.detach().flatten().clone() for p in run.drloc.parameters()])
    a = mlp(); run.step('eager')
    b = mlp(); run.step('eager side')
    assert torch.equal(a, b) and not torch.equal(b, mlp())

def test_ratio_by_hand():
    r,lo,hi = ratio([2.,8.], [1.,2.])                       # logs log 2 and log 4
    assert math.isclose(r, 8**.5) and lo<r<hi
    half = 12.706204736432095*(math.log(2)/2**.5)/2**.5       # Student's t with one degree of freedom
    assert math.isclose(hi, 8**.5*math.exp(half), rel_tol=1e-9)
    with pytest.raises(ValueError, match='1 block: an interval needs at least 2'): ratio([1.], [1.])
    with pytest.raises(ValueError): ratio([1.,2.], [1.])

def test_sections_are_what_they_say():
    for name,cases in SECTIONS.items():
        if callable(cases): continue
        assert len({c.name for c in cases})==len(cases)
        assert all(c.section==name or name=='side512' for c in cases)

@pytest.mark.parametrize('args,says', [(['--section','no_such'], "unknown section 'no_such'; there are: speed"),
                                       pytest.param(['--section','speed'], 'no GPU', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'))])
def test_bad_arguments(args, says):
    p = subprocess.run([sys.executable,'-m','vt_drloc.bench',*args], capture_output=True, text=True)
    assert p.returncode==1 and says in p.stderr
