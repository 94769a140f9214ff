"The five losses under both presets: against the released code's numbers, by hand, and by their properties"
import copy, json, math
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from hypothesis import given, settings, strategies as st
from vt_drloc.loss import DrlocLoss, best_guess
from vt_drloc.pairs import all_pairs, offsets, rowcol
from vt_drloc.variants import *
from vt_drloc.variants import PRESETS

GOLDEN = json.loads((Path(__file__).parent/'golden'/'drloc_released.json').read_text())
ONE = ['drloc','signed','ce','reg']                    # the variants on one grid
both = [(v,p) for v in ONE for p in PRESETS]
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31-1)
sides = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda s: s[0]*s[1] > 1)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def family(variant, preset='paper', k=(7,7), dim=4, **kw):
    square = {} if preset=='paper' else dict(square=False)
    return DrlocFamily(dim, variant, preset, k=k, **{**dict(hidden=16, seed=0), **square, **kw})


# The released code's own numbers

def streams(c):
    "Grid, cells and weights of a golden case, from numpy's generator"
    rng = np.random.default_rng(c['seed'])
    grid = rng.standard_normal((c['B'],c['D'],c['side'],c['side'])).astype(np.float32)
    cells = rng.integers(0, c['task'], (c['B'],c['m'],2,2))            # image, pair, which cell, row or column
    ws = [((rng.standard_normal((o,i))*(2/i)**.5).astype(np.float32), (.1*rng.standard_normal(o)).astype(np.float32)) for o,i in c['shapes']]
    check = np.float64(grid).sum() + cells.sum() + sum(np.float64(w).sum() + np.float64(b).sum() for w,b in ws)
    assert abs(check - c['check']) < 1e-6, "numpy's stream has changed: the golden inputs cannot be rebuilt"
    pairs = torch.tensor(cells[...,0]*c['task'] + cells[...,1])
    return torch.tensor(grid), pairs, ws

def load(mlp, ws):
    layers = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == len(ws)
    for l,(w,b) in zip(layers, ws):
        l.weight.data.copy_(torch.tensor(w)); l.bias.data.copy_(torch.tensor(b))

def rebuilt(c, preset='released'):
    grid, pairs, ws = streams(c)
    variant = {'l1': 'drloc' if c['absolute'] else 'signed', 'ce':'ce', 'cbr':'reg'}[c['mode']]
    fam = DrlocFamily(c['D'], variant, preset, m=c['m'], k=c['out_dim'], pool='3x3' if c['pool'] else None,
                      signed=not c['absolute'], **(dict(scale='k-1') if c['normalize'] else {}))
    if preset=='released': load(fam.mlp, ws)
    return fam, grid.requires_grad_(), pairs

@pytest.mark.parametrize('c', GOLDEN['cases'], ids=lambda c: '-'.join([c['mode'], 'abs' if c['absolute'] else 'signed', f"{c['side']}to{c['task']}"]+['norm']*c['normalize']))
def test_released_numbers(c):
    fam, grid, pairs = rebuilt({**c, 'out_dim':c['side'] if c['mode']=='l1' else c['out_dim']})
    loss = fam(grid, pairs=pairs)
    loss.backward()
    tol = 1e-5 if c['mode']=='cbr' else 1e-6
    assert abs(loss.item()/c['loss'] - 1) < tol
    assert abs(grid.grad.double().norm().item()/c['grad'] - 1) < 10*tol
    wide = fam.double()(grid.detach().double(), pairs=pairs).item()    # and float64 agrees with both
    assert abs(wide/c['loss'] - 1) < tol

def test_released_stages_are_summed():
    parts = [streams(c) for c in GOLDEN['stages']['parts']]
    fam = DrlocFamily([c['D'] for c in GOLDEN['stages']['parts']], 'all', 'released', m=40)
    for f,(_,_,ws) in zip(fam.mlp, parts): load(f, ws)
    loss = fam([g for g,_,_ in parts], pairs=[p for _,p,_ in parts]).item()
    assert abs(loss/GOLDEN['stages']['loss'] - 1) < 1e-6

def test_released_schedule():
    f = lambda_schedule(GOLDEN['lambda_drloc'], 'ramp_decay', epochs=101)
    for e,lam in GOLDEN['schedule'].items():
        if int(e) <= 100:
            for within in (0, 1e-4, .5, .999): assert f((int(e)+within)/101) == pytest.approx(lam, abs=1e-12)
    f = lambda_schedule(GOLDEN['lambda_drloc'], 'ramp_decay', epochs=300)
    for e,lam in GOLDEN['schedule'].items(): assert f(int(e)/300) == pytest.approx(lam, abs=1e-12)

def test_golden_file_names_its_source():
    assert GOLDEN['repository'].endswith('yhlleo/VTs-Drloc') and len(GOLDEN['revision']) == 40
    assert {(c['mode'],c['absolute'],c['task']) for c in GOLDEN['cases']} >= {(m,a,k) for m in ('l1','ce','cbr') for a in (True,False) for k in (7,14)}


# By hand

def silent(*args, **kw):
    "An MLP of zeros: it answers 0 for L1, and every class alike"
    fam = DrlocFamily(*args, hidden=8, **kw)
    for q in fam.parameters(): nn.init.zeros_(q)
    return fam

# 2 x 2: pair (3, 0) has the offsets (1, 1), pair (1, 1) has (0, 0). 3 x 3: pair (0, 5) has (-1, -2).
TWO, THREE = torch.tensor([[[3,0],[1,1]]]), torch.tensor([[[0,5]]])
ln = math.log
HAND = [
    ('drloc', 'paper', {}, .5, 1.),                        # (1/2+1/2 + 0)/2;              1/3 + 2/3
    ('drloc', 'released', {}, .5, 1.5),                    # ((1+1)/2 + 0)/2;              (1+2)/2
    ('drloc', 'released', dict(scale='k-1'), .5, .75),     # as raw, k-1 = 1;              (1+2)/2/2
    ('signed', 'paper', {}, .5, 1.),                       # as absolute: |.| of 0 - t
    ('signed', 'released', {}, 1.5, .5),                   # +1: (2,2), (1,1);             +2: (1, 0)
    ('signed', 'released', dict(scale='k-1'), .75, .125),  # divided by 2(k-1) = 2;        by 4
    ('ce', 'paper', {}, 2*ln(5), 2*ln(7)),                 # 2k+1 classes
    ('ce', 'released', {}, 2*ln(3), 2*ln(5)),              # 2k-1
    ('ce', 'paper', dict(signed=False), 2*ln(3), 2*ln(4)), # k+1
    ('ce', 'released', dict(signed=False), 2*ln(2), 2*ln(3)), # k
    # uniform on -2..2: mu 0, var 2: (1+1)/2 and 0, mean 1/2; on -3..3: var 4: (1+4)/4. Doubt: 2 * alpha/2 log var
    ('reg', 'paper', {}, .5 + .001*ln(2), 1.25 + .001*ln(4)),
    # uniform on -1..1: var 2/3: (1+1)*3/2, mean 3/2; on -2..2: var 2: (1+4)/2. Doubt: 2 * alpha log var
    ('reg', 'released', {}, 1.5 + .002*ln(2/3), 2.5 + .002*ln(2)),
    # absolute, uniform on 0, 1: mu 1/2, var 1/4: each axis of each pair costs 1; on 0..2: mu 1, var 2/3: 0 + 1*3/2
    ('reg', 'released', dict(signed=False), 2 + .002*ln(1/4), 1.5 + .002*ln(2/3)),
    # absolute, uniform on 0..2: mu 1, var 2/3: (0 + 0) and (1 + 1)*3/2, mean 3/2; on 0..3: mu 3/2, var 5/4: (1/4 + 1/4)*4/5
    ('reg', 'paper', dict(signed=False), 1.5 + .001*ln(2/3), .4 + .001*ln(5/4))]

@pytest.mark.parametrize('variant,preset,kw,two,three', HAND)
def test_by_hand_with_a_silent_mlp(variant, preset, kw, two, three):
    for k,pairs,want in ((2,TWO,two), (3,THREE,three)):
        loss = silent(1, variant, preset, k=k, **kw)(torch.randn(1, 1, k, k), pairs=pairs)
        assert loss.item() == pytest.approx(want, rel=1e-6)

@pytest.mark.parametrize('preset,want', [('paper', .5+1.), ('released', .5+1.5)])
def test_all_by_hand(preset, want):
    fam = silent([1,2], 'all', preset)
    assert fam([torch.randn(1, 1, 2, 2), torch.randn(1, 2, 3, 3)], pairs=[TWO, THREE]).item() == pytest.approx(want)

def test_l1_by_hand_with_an_answer():
    "Always (1/4, 1/2) on 2 x 2: paper |1/2-1/4| + 0 and 1/4 + 1/2, mean 1/2; released (3/4+1/2)/2 and (1/4+1/2)/2, mean 1/2"
    for preset,want in (('paper',.5), ('released',.5)):
        fam = silent(1, 'drloc', preset)
        fam.mlp[-1].bias.data.copy_(torch.tensor([.25,.5]))
        assert fam(torch.randn(1, 1, 2, 2), pairs=TWO).item() == pytest.approx(want)
        assert fam.predict_cells(torch.randn(1, 1, 2, 2), TWO)[0,0].tolist() == ([.5,1.] if preset=='paper' else [.25,.5])
    fam = silent(1, 'signed', 'released')                  # +1: targets (2, 2), (1, 1); answers 1/4, 1/2
    fam.mlp[-1].bias.data.copy_(torch.tensor([.25,.5]))
    assert fam(torch.randn(1, 1, 2, 2), pairs=TWO).item() == pytest.approx(((1.75+1.5)/2 + (.75+.5)/2)/2)
    assert fam.predict_cells(torch.randn(1, 1, 2, 2), TWO)[0,0].tolist() == [-.75,-.5]

def test_classes_by_hand_with_an_answer():
    "Rows: ln 2 on offset 1, so 2/6 there and 1/6 elsewhere: mu 1/6, var 11/6 - 1/36 = 65/36. Columns: all alike"
    pair = TWO[:,:1]                                       # offsets (1, 1), classes -2..2
    fam = silent(1, 'ce', k=2)
    fam.mlp[-1].bias.data[3] = ln(2)
    assert fam(torch.randn(1, 1, 2, 2), pairs=pair).item() == pytest.approx(ln(3) + ln(5))
    assert fam.predict_cells(torch.randn(1, 1, 2, 2), pair)[0,0].tolist() == pytest.approx([1/6, 0], abs=1e-6)
    fam = silent(1, 'reg', k=2)
    fam.mlp[-1].bias.data[3] = ln(2)
    want = 5/13 + .0005*ln(65/36) + 1/2 + .0005*ln(2)      # (5/6)^2 / (65/36) = 25/65
    assert fam(torch.randn(1, 1, 2, 2), pairs=pair).item() == pytest.approx(want)

def test_classes_sit_where_the_presets_put_them():
    assert class_range(7) == (-7,15) and class_range(7, signed=False) == (0,8)
    assert class_range(7, classes='2k-1') == (-6,13) and class_range(7, signed=False, classes='2k-1') == (0,7)
    count = lambda **kw: [C for _,C in DrlocFamily(1, 'ce', k=14, pool=True, hidden=2, **kw)._axes(7, 7)]
    assert count() == [15,15] and count(preset='released') == [27,27] and count(preset='released', signed=False) == [14,14]
    assert DrlocFamily(1, 'ce', k=(3,5), hidden=2)._axes(3, 5) == [(-3,7),(-5,11)]

def test_pooling_by_hand():
    g = torch.arange(16.).view(1, 1, 4, 4)
    assert pool_grid(g, '2x2')[0,0].tolist() == [[2.5,4.5],[10.5,12.5]]
    # corner: 0 1 4 5; top: 1 2 3 5 6 7; left: 4 5 8 9 12 13; inside: 5..7, 9..11, 13..15
    assert pool_grid(g, '3x3')[0,0].tolist() == [[2.5,4.],[8.5,10.]]
    for h,w in ((4,4), (7,7), (5,8)): assert tuple(pool_grid(torch.zeros(1, 1, h, w), '3x3').shape[2:]) == pooled_size(h, w, '3x3')

@pytest.mark.parametrize('pool,preset', [('2x2','paper'), ('3x3','released')])
def test_pooling_is_for_the_side_task_alone(pool, preset):
    fam, plain = (family('drloc', preset, pool=p) for p in (True,None))
    grid, pairs = torch.randn(2, 4, 14, 14), draw_pairs(2, 8, 7, 7)
    assert fam.pool == pool and torch.equal(fam(grid, pairs=pairs), plain(pool_grid(grid, pool), pairs=pairs))
    assert fam.predict_cells(grid, pairs).shape == (2,8,2)


# Presets

def test_defaults_are_drlocloss():
    grid, pairs = torch.randn(3, 8, 5, 6), draw_pairs(3, 16, 5, 6)
    a, b = DrlocFamily(8, seed=3), DrlocLoss(8, seed=3)
    assert a.state_dict().keys() == b.state_dict().keys() and torch.equal(a(grid, pairs=pairs), b(grid, pairs=pairs))
    assert torch.equal(a(grid, gen(1)), b(grid, gen(1)))

def test_table_names_every_option():
    named = {o for r in PRESET_TABLE for o in r['option'].replace(',', ' ').split()}
    assert set(PRESETS['paper']) == set(PRESETS['released']) and set(PRESETS['paper']) <= named
    assert named - set(PRESETS['paper']) == {'signed','reduction'}
    assert all(set(r) == {'point','paper','released','option'} and all(r.values()) for r in PRESET_TABLE)

@pytest.mark.parametrize('variant,option', [(v,o) for v in ONE for o in ('scale','shift','axes','layers','trunk','classes','log') if o!='trunk' or v in ('ce','reg')])
def test_every_option_changes_what_it_should(variant, option):
    "One option at a time, from paper to released, and the loss moves where that option applies"
    value = PRESETS['released'][option]
    applies = dict(scale='drloc signed', shift='signed', axes='drloc signed ce reg', layers='drloc signed ce reg', trunk='ce reg', classes='ce reg', log='reg')[option].split()
    grid, pairs = torch.randn(2, 4, 7, 7, generator=gen(1)), draw_pairs(2, 16, 7, 7, generator=gen(2))
    a, b = family(variant)(grid, pairs=pairs), family(variant, **{option:value})(grid, pairs=pairs)
    assert (a.item() != b.item()) == (variant in applies)

@pytest.mark.parametrize('option', ['alpha','eps'])
def test_reg_takes_its_constants(option):
    "One pair of 2 x 2 that is (0, 0) apart, an MLP of zeros: mean 0, variance 2, so alpha log sqrt(2 + eps) an axis"
    o = dict(alpha=1e-3, eps=1e-8) | {option: .5}
    got = silent(1, 'reg', k=2, **{option: .5})(torch.randn(1, 1, 2, 2), pairs=TWO[:,1:])
    assert got.item() == pytest.approx(2*o['alpha']*ln((2+o['eps'])**.5), rel=1e-5)

def test_effective_weight():
    "Released L1 over paper L1 at the same error in cells: k/2"
    for k in (2,7,14):
        pairs, price = all_pairs(k, k)[None], {}
        for p in PRESETS:
            fam = family('drloc', p, dim=1)
            price[p] = fam.per_image(encode(fam.true_cells(pairs, k, k)+.5, k, k, fam.options['scale']), pairs, k, k).item()
        assert price['released']/price['paper'] == pytest.approx(k/2, rel=1e-5)

def test_literal_sum():
    grid, pairs = torch.randn(6, 4, 7, 7), draw_pairs(6, 8, 7, 7)
    for v,p in both: torch.testing.assert_close(family(v, p, reduction='sum')(grid, pairs=pairs), 6*family(v, p)(grid, pairs=pairs))

def test_signed_against_absolute():
    p = draw_pairs(2, 50, 5, 6, generator=gen())
    assert torch.equal(signed_offsets(p, 6).abs(), offsets(p, 6)) and torch.equal(signed_offsets(p.flip(-1), 6), -signed_offsets(p, 6))

@quick
@given(sides, seeds)
def test_a_flip_negates_the_signed_column_alone(hw, seed):
    h, w = hw
    p = draw_pairs(2, 9, h, w, generator=gen(seed))
    row, col = rowcol(p, w).unbind(-1)
    f = row*w + w-1-col
    assert torch.equal(offsets(f, w), offsets(p, w)) and torch.equal(signed_offsets(f, w), signed_offsets(p, w)*torch.tensor([1,-1]))

@quick
@given(sides, seeds, st.sampled_from(['k','raw','k-1']), st.booleans())
def test_decode_undoes_encode(hw, seed, scale, shift):
    cells = signed_offsets(draw_pairs(2, 9, *hw, generator=gen(seed)), hw[1]).float()
    torch.testing.assert_close(decode(encode(cells, *hw, scale, shift), *hw, scale, shift), cells)


# Drawing

@pytest.mark.parametrize('h,w', [(7,7), (2,3)])
@pytest.mark.parametrize('identical', [True,False])
def test_draw_is_uniform(h, w, identical):
    "Pearson's chi-square over all ordered pairs, at five standard deviations"
    n = h*w
    allowed = torch.ones(n, n, dtype=torch.bool) if identical else ~torch.eye(n, dtype=torch.bool)
    N = allowed.sum().item()
    p = draw_pairs(8, 25*N, h, w, generator=gen(1), identical=identical).flatten(0, 1)
    hits = torch.bincount(p[:,0]*n + p[:,1], minlength=n*n).view(n, n).double()
    assert hits[~allowed].sum() == 0
    mu = len(p)/N
    chi2 = ((hits[allowed]-mu)**2/mu).sum().item()
    assert abs(chi2 - (N-1)) < 5*(2*(N-1))**.5

def test_every_pair_once():
    a = draw_pairs(3, 1, 3, 4, exhaustive=True)
    assert a.shape == (3,144,2) and torch.equal(a[1], all_pairs(3, 4))
    b = draw_pairs(3, 1, 3, 4, exhaustive=True, identical=False)[2]
    assert b.tolist() == [p for p in all_pairs(3, 4).tolist() if p[0] != p[1]]
    grid = torch.randn(2, 4, 3, 4)
    for v in ONE: assert torch.equal(family(v, k=(3,4), exhaustive=True)(grid, gen(1)), family(v, k=(3,4), exhaustive=True)(grid, gen(2)))
    torch.testing.assert_close(family('drloc', exhaustive=True)(grid), family('drloc')(grid, pairs=a[:2]))

def test_draws_repeat_and_leave_the_global_state():
    before = torch.get_rng_state()
    for kw in ({}, dict(identical=False)):
        a, b, c = (draw_pairs(3, 64, 7, 7, generator=gen(s), **kw) for s in (5,5,6))
        assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a[0], a[1])
    for v,p in both: family(v, p)(torch.ones(2, 4, 7, 7), gen(3))
    assert torch.equal(torch.get_rng_state(), before)

def test_variance_falls_as_one_over_m():
    fam, grid = family('drloc'), torch.randn(1, 4, 7, 7, generator=gen(3))
    def var(m):
        p = draw_pairs(2000, m, 7, 7, generator=gen(m))
        with torch.no_grad(): return fam.per_image(fam._answers(grid.expand(2000, -1, -1, -1), p), p, 7, 7).var().item()
    assert var(8)/var(32) == pytest.approx(4, rel=.2) and var(16)/var(64) == pytest.approx(4, rel=.2)


# Properties

def perfect(fam, pairs, h, w, sharp=40.):
    "What an MLP would have to say to be right about every pair"
    cells, o = fam.true_cells(pairs, h, w), fam.options
    if fam.built is None: return encode(cells, h, w, o['scale'], o['shift'] and fam.signed)
    hot = [nn.functional.one_hot(c.long()-first, C) for c,(first,C) in zip(cells.unbind(-1), fam._axes(h, w))]
    return sharp*torch.cat(hot, -1).float()

@pytest.mark.parametrize('variant,preset', [('drloc','paper'),('drloc','released'),('signed','paper'),('signed','released')])
@quick
@given(sides, seeds)
def test_l1_is_zero_exactly_at_the_truth(variant, preset, hw, seed):
    fam, (h,w) = family(variant, preset), hw
    p = draw_pairs(3, 5, h, w, generator=gen(seed))
    t, noise = perfect(fam, p, h, w), torch.randn(3, 5, 2, generator=gen(seed))
    assert (fam.per_image(t, p, h, w) == 0).all() and (fam.per_image(noise, p, h, w) >= 0).all()
    off = t.clone(); off[1,2,0] += .5
    assert (fam.per_image(off, p, h, w) > 0).tolist() == [False,True,False]

@pytest.mark.parametrize('preset', list(PRESETS))
@quick
@given(sides, seeds)
def test_ce_and_reg_reach_their_bounds_at_the_truth(preset, hw, seed):
    "L^ce falls to 0. L^reg falls to its bound: sigma^2 at 1e-8, so alpha/2 (paper) or alpha (released) times log 1e-8, twice"
    h, w = hw
    p = draw_pairs(2, 6, h, w, generator=gen(seed))
    ce, reg = (family(v, preset, k=hw) for v in ('ce','reg'))
    at = [ce.per_image(perfect(ce, p, h, w, s), p, h, w).max().item() for s in (1.,5.,20.,200.)]
    assert at == sorted(at, reverse=True) and at[-1] < 1e-6 and at[0] > .1
    bound = 2*1e-3*ln(1e-8)*(.5 if preset=='paper' else 1)
    torch.testing.assert_close(reg.per_image(perfect(reg, p, h, w, 400.), p, h, w), torch.full((2,), bound), rtol=1e-5, atol=1e-6)
    noise = 3*torch.randn(perfect(reg, p, h, w).shape, generator=gen(seed))
    assert (reg.per_image(noise, p, h, w) > bound).all() and (ce.per_image(noise, p, h, w) > 0).all()

def swapped(fam, out):
    if fam.built is None: return out.flip(-1)
    a, b = out.split([C for _,C in fam._axes(*fam.built)], -1)
    return torch.cat([b, a], -1)

@pytest.mark.parametrize('variant,preset', both)
@quick
@given(sides, seeds)
def test_axes_and_order_of_pairs_do_not_matter(variant, preset, hw, seed):
    (h,w), g = hw, gen(seed)
    fam, turned = family(variant, preset, k=(h,w)), family(variant, preset, k=(w,h))
    p = draw_pairs(2, 6, h, w, generator=g)
    out, perm = torch.randn(perfect(fam, p, h, w).shape, generator=g), torch.randperm(6, generator=g)
    loss = fam.per_image(out, p, h, w)
    row, col = rowcol(p, w).unbind(-1)
    torch.testing.assert_close(turned.per_image(swapped(fam, out), col*h + row, w, h), loss)
    torch.testing.assert_close(fam.per_image(out[:,perm], p[:,perm], h, w), loss)
    grid = torch.randn(2, 4, h, w, generator=g)
    torch.testing.assert_close(fam(grid, pairs=p[:,perm]), fam(grid, pairs=p), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('variant,preset', both)
@quick
@given(seeds, st.floats(-3, 3))
def test_float32_and_finite_under_autocast(variant, preset, seed, power):
    fam, p = family(variant, preset), draw_pairs(2, 8, 7, 7, generator=gen(seed))
    grid = torch.randn(2, 4, 7, 7, generator=gen(seed)).clamp(-1, 1)*10**power
    grid = grid.bfloat16().requires_grad_()
    plain = fam(grid.detach().float(), pairs=p)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low = fam(grid, pairs=p)
        assert fam.predict_cells(grid, p).dtype == torch.float32
    assert low.dtype == torch.float32 and low.isfinite() and torch.equal(low, plain)
    low.backward()
    assert grid.grad.isfinite().all() and all(q.grad.isfinite().all() for q in fam.parameters())

@pytest.mark.parametrize('pool', ['2x2','3x3'])
def test_pooling_under_autocast(pool):
    fam, grid = family('reg', k=14, pool=pool), (1e3*torch.randn(2, 4, 14, 14)).bfloat16()
    p = draw_pairs(2, 8, 7, 7)
    with torch.autocast('cpu', dtype=torch.bfloat16): low = fam(grid, pairs=p)
    assert low.dtype == torch.float32 and torch.equal(low, fam(grid.float(), pairs=p))

@pytest.mark.parametrize('variant,preset', both)
def test_gradient_reaches_the_backbone_through_both_cells(variant, preset):
    backbone, x = nn.Conv2d(3, 4, 2, 2), torch.randn(2, 3, 14, 14)
    grid = backbone(x)
    grid.retain_grad()
    fam = family(variant, preset)
    fam(grid, pairs=torch.tensor([[[1,20]],[[48,0]]])).backward()
    touched = grid.grad.abs().sum(1).flatten(1) > 0
    assert [r.nonzero().flatten().tolist() for r in touched] == [[1,20],[0,48]]
    assert backbone.weight.grad.abs().sum() > 0
    assert all(q.grad.abs().sum() > 0 for q in fam.parameters() if q.ndim > 1)   # (an L1's signs may cancel in a bias)

@pytest.mark.parametrize('variant,preset', both)
@quick
@given(sides, seeds)
def test_gradient_reaches_both_cells_of_any_pair_and_no_other(variant, preset, hw, seed):
    h, w = hw
    grid, p = torch.randn(2, 4, h, w, generator=gen(seed)).requires_grad_(), draw_pairs(2, 1, h, w, generator=gen(seed), identical=False)
    family(variant, preset, k=hw, hidden=64)(grid, pairs=p).backward()
    touched = grid.grad.abs().sum(1).flatten(1) > 0
    assert [r.nonzero().flatten().tolist() for r in touched] == [sorted(q) for q in p[:,0].tolist()]

@pytest.mark.parametrize('preset', list(PRESETS))
@quick
@given(seeds, st.floats(-3, 3))
def test_all_has_the_properties_of_its_parts(preset, seed, power):
    "Permuting the pairs leaves it, float32 and finite under autocast, and the gradient reaches both cells of a pair on each grid"
    fam = family('all', preset, dim=[3,4], hidden=512)     # so wide that no pair finds every unit asleep
    grids = [(torch.randn(2, D, k, k, generator=gen(seed)).clamp(-1, 1)*10**power).bfloat16().requires_grad_() for D,k in ((3,8),(4,7))]
    pairs = [draw_pairs(2, 2, k, k, generator=gen(seed), identical=False) for k in (8,7)]
    with torch.autocast('cpu', dtype=torch.bfloat16): low = fam(grids, pairs=pairs)
    assert low.dtype == torch.float32 and low.isfinite() and low >= 0
    torch.testing.assert_close(fam([g.detach() for g in grids], pairs=[p.flip(1) for p in pairs]), low.detach(), rtol=1e-4, atol=1e-5)
    low.backward()
    for g,p in zip(grids, pairs):
        touched = g.grad.float().abs().sum(1).flatten(1) > 0
        assert g.grad.isfinite().all()
        for r,q in zip(touched, p):
            got,cells = set(r.nonzero().flatten().tolist()),q.flatten().tolist()
            assert {c for c in cells if cells.count(c)==1} <= got <= set(cells)    # what two pairs ask of a cell may cancel to the last bit

@pytest.mark.parametrize('variant,preset', both)
def test_gradient_is_right(variant, preset):
    torch.manual_seed(0)
    fam, p = family(variant, preset, k=(2,3), dim=3, hidden=8).double(), draw_pairs(2, 4, 2, 3, generator=gen())
    grid = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: fam(g, pairs=p), grid)

@pytest.mark.parametrize('variant,preset', [*both, ('all','paper')])
def test_predictions_at_the_truth(variant, preset):
    "predict_cells is what axis_costs takes the MLP to have said"
    if variant=='all': fam, grid = family('all', dim=[2,4]), [torch.randn(2, 2, 8, 8), torch.randn(2, 4, 7, 7)]
    else: fam, grid = family(variant, preset), torch.randn(2, 4, 7, 7)
    p = draw_pairs(2, 16, 7, 7, generator=gen())
    fam._answers = lambda g, pairs, mlp=None: perfect(fam, pairs, 7, 7)
    torch.testing.assert_close(fam.predict_cells(grid, p), fam.true_cells(p, 7, 7), atol=1e-5, rtol=1e-5)
    assert fam.true_cells(p, 7, 7).min() < 0 if fam.signed else fam.true_cells(p, 7, 7).min() == 0

@pytest.fixture
def fresh_compiler():
    "Each case compiles the same forward: together they would pass the limit of recompilations"
    torch.compiler.reset()
    yield
    torch.compiler.reset()

@pytest.mark.parametrize('variant,preset', [*both, ('all','released')])
def test_compiles_whole(variant, preset, fresh_compiler):
    "With pairs given, in every form; drawing them inside, which no form does in its own way, in two"
    if variant=='all': fam, grid = family('all', preset, dim=[2,4]), [torch.randn(2, 2, 8, 8), torch.randn(2, 4, 7, 7)]
    else: fam, grid = family(variant, preset, k=14, pool=True), torch.randn(2, 4, 14, 14, requires_grad=True)
    fast = torch.compile(fam, fullgraph=True, backend='aot_eager')
    p = [draw_pairs(2, 8, 8, 8), draw_pairs(2, 8, 7, 7)] if variant=='all' else draw_pairs(2, 8, 7, 7)
    a, b = fast(grid, pairs=p), fam(grid, pairs=p)
    torch.testing.assert_close(a, b)
    a.backward()
    if variant in ('drloc','all'): assert fast(grid).isfinite()

@pytest.mark.parametrize('kw', [dict(identical=False), dict(exhaustive=True, identical=False)])
def test_draws_compile_whole(kw, fresh_compiler):
    fam = family('ce', k=(3,4), **kw)
    assert torch.compile(fam, fullgraph=True, backend='aot_eager')(torch.randn(2, 4, 3, 4)).isfinite()


# Guessing

@pytest.mark.parametrize('k', [2,7,8,14])
def test_drloc_guess_is_chapter_6s(k):
    a, b = best_constant('drloc', k, k), best_guess(k, k)
    assert a.offset == b.offset and a.error == pytest.approx(b.error) and a.loss == pytest.approx(b.loss)
    assert best_constant('drloc', k, k, 'released').loss == pytest.approx(b.loss*k/2)
    assert loss_of_guessing('all', [k,k], [k,k]) == pytest.approx(2*b.loss)

def test_guess_for_several_grids_tells_the_cells_of_the_last():
    all_,last = best_constant('all', [5,3], [6,4]),best_constant('drloc', 3, 4)
    assert all_[:2] == last[:2] and all_[3:] == last[3:] and all_.loss == pytest.approx(last.loss + best_constant('drloc', 5, 6).loss)

@pytest.mark.parametrize('variant,preset,want', [('drloc','paper',5/9), ('drloc','released',5/18), ('signed','paper',8/9), ('signed','released',2/9)])
def test_guess_in_units_of_the_largest_offset(variant, preset, want):
    "3 x 3: the median is off by 5/9 cells, with sign by 8/9; divided by k-1 = 2, by 4 if shifted offsets run from 0 to 4; two axes summed or averaged"
    assert best_constant(variant, 3, 3, preset, scale='k-1').loss == pytest.approx(want)

@pytest.mark.parametrize('variant,preset', both)
@pytest.mark.parametrize('h,w,identical', [(5,5,True), (3,6,False)])
def test_no_constant_beats_the_best(variant, preset, h, w, identical):
    "Gradient descent over the MLP's constant answers, on all pairs, ends at the level and never below it"
    fam = family(variant, preset, k=(h,w), identical=identical)
    best = best_constant(fam, h, w)
    pairs = draw_pairs(1, 1, h, w, identical=identical, exhaustive=True)
    torch.manual_seed(0)
    answer = (.1*torch.randn(perfect(fam, pairs[:,:1], h, w).shape[-1])).double().requires_grad_()
    opt = torch.optim.Adam([answer], lr=.1)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 250)
    for _ in range(250):
        loss = fam.per_image(answer.expand(*pairs.shape[:2], -1), pairs, h, w).mean()
        assert loss.item() > best.loss - 1e-9
        opt.zero_grad(); loss.backward(); opt.step(); sched.step()
    assert loss.item() == pytest.approx(best.loss, rel=.02 if variant=='reg' else 2e-3)
    d = fam.true_cells(pairs[0], h, w, torch.float64)
    assert best.mean == pytest.approx(d.mean(0).tolist(), abs=1e-9) and best.variance == pytest.approx(d.var(0, correction=0).tolist())
    assert best.error == pytest.approx((d - torch.tensor(best.offset, dtype=torch.float64)).abs().mean(0).tolist(), abs=1e-5)

def test_marginal_entropy_by_hand():
    "2 x 2, signed: -1, 0, 1 with 1/4, 1/2, 1/4: 3/2 bits an axis. Absolute: 0, 1 alike: 1 bit"
    assert best_constant('ce', 2, 2).loss == pytest.approx(3*ln(2)) and best_constant('ce', 2, 2, signed=False).loss == pytest.approx(2*ln(2))
    assert best_constant('ce', 2, 2).offset == (0,0) and best_constant('ce', 2, 2, signed=False).offset == (.5,.5)

def test_reg_guess_by_hand():
    "2 x 2, signed, classes -2..2: mean 0, variance 1/2, the largest variance a softmax has is 4: 1/8 + alpha/2 log 4 an axis"
    assert best_constant('reg', 2, 2).loss == pytest.approx(2*(1/8 + .0005*ln(4)), rel=1e-6)
    assert best_constant('reg', 2, 2).offset == (0,0) and best_constant('reg', 2, 2).error == (.5,.5)
    assert best_constant('reg', 2, 2, 'released').loss == pytest.approx(2*(1/2), abs=1e-6)       # -1..1: variance 1, log 1 = 0


# Bad input, imports

@pytest.mark.parametrize('call,words', [
    (lambda: DrlocFamily(4, 'sinded'), r"variant='sinded' is unknown \(did you mean 'signed'\?\); choose one of drloc, signed, ce, reg, all"),
    (lambda: DrlocFamily(4, preset='paperr'), "did you mean 'paper'"),
    (lambda: DrlocFamily(4, reduction='avg'), "reduction='avg' is unknown.*mean, sum"),
    (lambda: DrlocFamily(4, alhpa=1), "option='alhpa'.*did you mean 'alpha'"),
    (lambda: DrlocFamily(4, scale='k+1'), "scale='k\\+1'.*choose one of k, raw, k-1"),
    (lambda: DrlocFamily(4, pool='4x4'), "pool='4x4'"),
    (lambda: DrlocFamily(4, m=0), 'm=0'),
    (lambda: DrlocFamily(4, 'ce'), "variant='ce'.*k=7"),
    (lambda: DrlocFamily(4, 'all'), "'all' takes a list"),
    (lambda: DrlocFamily([4], 'ce', k=7), "'all' takes a list"),
    (lambda: family('all', dim=[4,4])(torch.randn(1, 4, 7, 7)), 'got one tensor'),
    (lambda: family('all', dim=[4,4])([torch.randn(1, 4, 7, 7)]), 'built for 2 grids and got 1'),
    (lambda: DrlocFamily(4, preset='released')(torch.randn(1, 4, 7, 5)), "7 x 5 grid.*square=False"),
    (lambda: family('ce')(torch.randn(1, 4, 9, 9)), 'axis of 9 cells.*made for 7.*k=9'),
    (lambda: family('drloc')(torch.randn(1, 5, 7, 7)), r'5 features.*built for 4.*DrlocFamily\(dim=5\)'),
    (lambda: family('drloc')(torch.randn(1, 4, 1, 1)), '1 x 1 grid'),
    (lambda: family('drloc', pool='2x2')(torch.randn(1, 4, 7, 7)), 'drop its last row'),
    (lambda: family('drloc')(torch.randn(1, 49, 4)), r'\(B, D, h, w\)'),
    (lambda: family('reg').bfloat16()(torch.randn(1, 4, 7, 7)), 'keep it in float32'),
    (lambda: lambda_schedule(.5, 'ramp'), "did you mean 'ramp_decay'"),
    (lambda: lambda_schedule(.5, 'ramp_decay', warmup=0), 'warmup=0'),
    (lambda: draw_pairs(1, 0, 7, 7), 'm=0'),
    (lambda: draw_pairs(1, 4, 1, 1, identical=False), '1 x 1 grid'),
    (lambda: best_constant('ce', 1, 1), '1 x 1 grid'),
    (lambda: tap_names(nn.Linear(2, 2)), "no blocks found in Linear; give their names"),
    (lambda: tap_names(nn.Linear(2, 2), 'stage'), "did you mean 'stages'"),
    (lambda: drloc_callback('all'), 'give tap='),
    (lambda: drloc_callback('cee'), "did you mean 'ce'")])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words): call()

def test_seed_and_state():
    before = torch.get_rng_state()
    a, b, c = (family('ce', 'released', seed=s) for s in (0,0,1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters())) and not torch.equal(a.mlp[0].weight, c.mlp[0].weight)
    c.load_state_dict(a.state_dict())
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), c.parameters()))

@pytest.mark.cuda
def test_no_host_wait_in_a_step():
    "On a GPU, torch itself reports a step that waits for the device or copies to it synchronously"
    for v,p in both:
        for kw in ({}, dict(identical=False), dict(exhaustive=True, identical=False)):
            fam, g = family(v, p, k=14, pool=True, **kw).cuda(), torch.Generator('cuda').manual_seed(0)
            grid = torch.randn(4, 4, 14, 14, device='cuda', requires_grad=True)
            fam(grid, g).backward()
            torch.cuda.set_sync_debug_mode('error')
            try: fam(grid, g).backward(); fam(grid).backward()
            finally: torch.cuda.set_sync_debug_mode('default')


# Schedules of lambda

def test_schedules():
    assert [lambda_schedule(.3)(s) for s in (0,.5,1)] == [.3]*3
    cos, lin = (lambda_schedule(.4, how) for how in ('cos','lin'))
    assert [cos(s) for s in (0,.5,1)] == pytest.approx([.4,.2,0]) and [lin(s) for s in (0,.25,1)] == pytest.approx([.4,.3,0])
    f = lambda_schedule(1., 'ramp_decay', epochs=50, warmup=10, end=40)
    assert [f(e/50) for e in (0,5,10,25,40,49)] == pytest.approx([0,.5,1,.5,0,0])
    assert all(f(e/50) == f((e+.99)/50) for e in range(50))              # by epoch, not by step


# In the callback

from test_callback import Tiny, Stop, Watch, clean, data, learner, loaders, mlp, near, same, tiny, weights
from vt_drloc.callback import DrlocCallback, GridNotCapturedError, GridTaps

class Deep(Tiny):
    "Two blocks: a grid of 8 x 8 cells with 5 features, then one of 4 x 4 with 6"
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 2, 2))
    def forward_features(self, x): return self.blocks(x).tanh()

def deep():
    torch.manual_seed(0)
    return Deep()

TAPS = ['blocks.0','blocks.1']
def callback(variant, preset='paper', lam=.5, **kw):
    kw = {**dict(m=8, hidden=16, schedule='constant'), **kw}
    return drloc_callback(variant, preset, lam, TAPS if variant=='all' else None, **kw)
def model(variant): return deep() if variant=='all' else tiny()
def wide(): return loaders(data(hw=(16,16)))
def run(variant, preset='paper', cbs=(), **kw): return learner([callback(variant, preset, **kw), *cbs], model=model(variant), dls=wide() if variant=='all' else None)

@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('preset', list(PRESETS))
def test_callback_trains_it_and_leaves_no_trace(variant, preset):
    learn = run(variant, preset)
    learn.fit(1)
    fam = learn.drloc.loss_fn
    assert (fam.variant,fam.preset) == (variant,preset) and fam.mlp.dim == ([5,6] if variant=='all' else 6)
    start = DrlocFamily(fam.mlp.dim, variant, preset, m=8, hidden=16, seed=0, k=learn.drloc.grid_size)
    moved = [not torch.equal(p, q) for p,q in zip(fam.parameters(), start.parameters())]
    assert len(moved) == len(list(start.parameters())) and all(moved)
    plain = learner(model=model(variant), dls=wide() if variant=='all' else None)
    plain.fit(1)
    assert not same(weights(learn.model), weights(plain.model))
    clean(learn)

def test_default_and_family_are_the_same_run():
    a, b = learner(DrlocCallback(.5, 8, 16)), run('drloc')
    a.fit(2); b.fit(2)
    assert same(weights(a.model), weights(b.model)) and same(mlp(a), mlp(b))

@pytest.mark.parametrize('variant', ['ce','all'])
def test_lambda_zero_bit_for_bit(variant):
    a, b = run(variant, lam=0.), learner(model=model(variant), dls=wide() if variant=='all' else None)
    a.fit(2); b.fit(2)
    assert same(weights(a.model), weights(b.model))

@pytest.mark.parametrize('variant,preset', [('reg','released'), ('all','paper')])
def test_resumes_exactly(variant, preset, tmp_path):
    new = lambda: learner(callback(variant, preset), model=model(variant), dls=wide() if variant=='all' else None, path=tmp_path)
    straight, first, second = new(), new(), new()
    straight.fit(2)
    first.fit(1)
    first.save('mid')
    second.load('mid').fit(1)
    assert same(weights(straight.model), weights(second.model)) and same(mlp(straight), mlp(second))

def test_released_takes_swins_grid_before_its_last_norm():
    from vt_drloc.hybrid import as_backbone, cvt_mini
    from vt_drloc.swin import swin_mini
    torch.manual_seed(0)
    swin, x = swin_mini(10).eval(), torch.randn(2, 3, 32, 32)
    where = lambda **kw: drloc_callback(**{'model':swin, **kw}).where
    assert where() is where(preset='released', swin_norm=True) is where(preset='released', model=cvt_mini(10)) is where(preset='released', model=None) is None
    assert where(preset='released', tap='patch_embed') == 'patch_embed' and where(swin_norm=False) == 'layers'
    def grid(tap):
        bb = as_backbone(swin, tap)
        with torch.no_grad(): return bb.grid(bb.forward_features(x), (32,32))
    with torch.no_grad(): before = swin.layers(swin.patch_embed(x))
    assert torch.equal(grid(where(preset='released')).permute(0,2,3,1), before) and torch.equal(grid(where()).permute(0,2,3,1), swin.norm(before).detach())
    assert not torch.allclose(grid('layers'), grid(None))

def test_released_takes_any_swins_grid_before_its_last_norm():
    "timm's, torchvision's, compiled, parallel or inside fastai's body; the norm of the tapped grid is the final grid"
    import timm, torchvision
    from fastai.vision.learner import TimmBody
    from vt_drloc.hybrid import as_backbone
    from vt_drloc.swin import swin_mini
    where = lambda m, **kw: drloc_callback(preset='released', model=m, **kw).where
    small = dict(depths=(1,1), num_heads=(1,1), embed_dim=8)
    ours,theirs = swin_mini(10),timm.create_model('swin_tiny_patch4_window7_224', img_size=56, num_classes=2, **small)
    tv = torchvision.models.SwinTransformer([4,4], 8, [1,1], [1,1], [7,7], num_classes=2)
    v2 = timm.create_model('swinv2_tiny_window8_256', img_size=64, num_classes=2, **small)
    assert where(torch.compile(ours)) == where(nn.DataParallel(ours)) == where(nn.DataParallel(torch.compile(ours))) == 'layers'
    for m,want,hw in ((theirs,'layers',(56,56)), (tv,'features',(56,56)), (tv,'features',(56,112)), (v2,'layers',(64,64))):
        assert where(m) == want and where(m, swin_norm=True) is None and where(m, tap='norm') == 'norm'
        x,final,tapped = torch.randn(2, 3, *hw),as_backbone(m.eval()),as_backbone(m, where(m))
        with torch.no_grad(): a,b = (o.grid(o.forward_features(x), hw) for o in (final,tapped))
        assert a.shape == b.shape == (2,16,hw[0]//8,hw[1]//8) and not torch.allclose(a, b)
        torch.testing.assert_close(m.norm(b.permute(0,2,3,1)).permute(0,3,1,2), a)
    inside = nn.Sequential(TimmBody(theirs), nn.Flatten(), nn.LazyLinear(2))
    assert as_backbone(inside, where(inside)).tap == (theirs.layers,'forward')

def test_released_asks_where_an_unknown_swin_has_its_norm():
    "Of another build: an error that names it and both ways out"
    class SwinOther(nn.Module):
        def __init__(self): super().__init__(); self.stages,self.norm = nn.Sequential(nn.Conv2d(3, 8, 4, 4)),nn.Identity()
    with pytest.raises(ValueError, match="SwinOther.*tap='...'.*swin_norm=True"): drloc_callback(preset='released', model=SwinOther())
    assert drloc_callback(preset='released', model=SwinOther(), tap='stages').where == 'stages'
    assert drloc_callback(preset='released', model=SwinOther(), swin_norm=True).where is drloc_callback(model=SwinOther()).where is None

def test_taps_of_a_wrapped_model_are_those_of_the_model():
    from vt_drloc.swin import swin_mini
    m = swin_mini(10)
    for after in ('blocks','stages'):
        for wrapped in (torch.compile(m), nn.DataParallel(m)): assert tap_names(wrapped, after) == tap_names(m, after)
def test_sidecar_of_another_loss_is_refused(tmp_path):
    a = learner(callback('signed'), path=tmp_path)
    a.fit(1)
    a.save('x')
    with pytest.raises(ValueError, match=r'signed \(paper\).*drloc \(paper\)'): learner(callback('drloc'), path=tmp_path).load('x')
    learner(callback('signed'), path=tmp_path).load('x')

def test_sidecar_from_before_this_option_loads(tmp_path):
    a = learner(callback('drloc'), path=tmp_path)
    a.fit(1)
    a.save('x')
    side = tmp_path/'models'/'x.drloc.pth'
    sd = torch.load(side, weights_only=True)
    torch.save({k:v for k,v in sd.items() if k not in ('size','kind')}, side)
    b = learner(callback('drloc'), path=tmp_path).load('x')
    assert same(mlp(a), mlp(b))
    b.fit(1)

def test_lr_find_leaves_no_effect():
    a, b = run('ce'), run('ce')
    a.lr_find(num_it=5, show_plot=False)
    a.fit(1); b.fit(1)
    assert same(mlp(a), mlp(b))

def test_deepcopy_keeps_the_variant():
    a = run('reg')
    a.fit(1)
    b = copy.deepcopy(a)
    a.fit(1); b.fit(1)
    assert same(mlp(a), mlp(b)) and b.drloc.loss_fn.variant == 'reg'

def test_no_trace_of_many_taps_after_an_error():
    learn = run('all', cbs=[Stop('after_backward', KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    clean(learn)
    assert not any('forward' in vars(m) for m in learn.model.modules())

def test_many_taps_see_every_grid():
    m, x = deep(), torch.randn(2, 3, 16, 16)
    for run in (m, torch.compile(m, backend='eager', fullgraph=True)):
        with GridTaps(run, TAPS) as tap:
            run(x)
            grids = tap.pop((16,16))
            with pytest.raises(GridNotCapturedError): tap.pop((16,16))
        torch.testing.assert_close(grids[0], m.blocks[0](x)); torch.testing.assert_close(grids[1], m.blocks(x))
        assert not any('forward' in vars(o) for o in m.modules())

def test_a_schedule_reaches_the_callback():
    lam = Watch('after_loss', lambda l: l.drloc.lam if l.training else None, order=99)
    learn = learner([drloc_callback('drloc', 'released', 1., m=8, hidden=16, epochs=101), lam])
    learn.fit(4)                                           # a run of 4 epochs goes through the curve of 101
    f = lambda_schedule(1., 'ramp_decay')
    seen = [l for l in lam.seen if l is not None]
    assert seen == [f(i/16) for i in range(16)] and seen[0] == 0 and max(seen) > .9
    assert drloc_callback('ce', 'released', SchedFixed()).lambda_drloc(.3) == 7

class SchedFixed:
    def __call__(self, pct): return 7

def test_callback_refuses_bad_losses():
    for kw,words in ((dict(loss='ce'), "loss='ce'"), (dict(tap=['a','b']), 'DrlocLoss takes one grid')):
        with pytest.raises(ValueError, match=words): DrlocCallback(**kw)
    with pytest.raises(ValueError, match=r'tap=\[\]'): learner(DrlocCallback(loss=partial(DrlocFamily, variant='all'), tap=[])).fit(1)

def test_taps_of_our_models_and_timms():
    import timm
    from vt_drloc.hybrid import CvT
    from vt_drloc.vit import ViT
    cvt = CvT(dims=(10,20), depths=(1,2), heads=(1,1))
    assert tap_names(cvt) == ['stages.0.1','stages.1.1','stages.1.2'] and tap_names(cvt, 'stages') == ['stages.0','stages.1']
    vit = ViT(img_size=(8,16), patch=4, dim=12, depth=2, heads=2)
    assert tap_names(vit) == ['blocks.0','blocks.1']
    with pytest.raises(ValueError, match='no stages found in ViT'): tap_names(vit, 'stages')
    assert len(tap_names(timm.create_model('vit_tiny_patch16_224', depth=3))) == 3
    swin = timm.create_model('swin_tiny_patch4_window7_224', depths=(1,1), num_heads=(1,1), embed_dim=8)
    assert tap_names(swin) == ['layers.0.blocks.0','layers.1.blocks.0'] and tap_names(swin, 'stages') == ['layers.0','layers.1']
    for m,hw in ((vit,(8,16)), (cvt,(16,16))):
        with GridTaps(m, tap_names(m)) as tap:
            m(torch.randn(2, 3, *hw))
            assert all(g.ndim==4 and g.shape[1] in (10,12,20) for g in tap.pop(hw))
