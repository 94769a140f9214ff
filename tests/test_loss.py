"The side task by itself: pairs, targets, Eq. 2, on any grid, in any precision"
import pytest, torch
from hypothesis import given, settings, strategies as st
from vt_drloc.loss import DrlocLoss, LocalizationMLP, best_guess, l1_drloc, pair_errors, predict_offsets, predict_pairs
from vt_drloc.pairs import all_pairs, check_grid, check_m, gather_pairs, offsets, query_pairs, rowcol, sample_pairs, targets

sides = st.integers(1, 9)
grids = st.tuples(sides, sides).filter(lambda s: s[0]*s[1] > 1)
seeds = st.integers(0, 2**31-1)
quick = settings(max_examples=40, deadline=None)

def gen(seed=0): return torch.Generator().manual_seed(seed)

def slow_targets(pairs, h, w):
    "Eq. 1 by walking over the grid with two nested loops, without any division of an index"
    where, n = {}, 0
    for row in range(h):
        for col in range(w):
            where[n] = row, col
            n += 1
    out = torch.zeros(*pairs.shape, dtype=torch.float64)
    for b in range(pairs.shape[0]):
        for s in range(pairs.shape[1]):
            (i, j), (p, q) = where[pairs[b,s,0].item()], where[pairs[b,s,1].item()]
            out[b,s,0], out[b,s,1] = abs(i-p)/h, abs(j-q)/w
    return out


# Drawing

@pytest.mark.parametrize('h,w', [(7,7), (2,3), (5,4)])
def test_pairs_are_uniform(h, w):
    "Pearson's chi-square over all ordered pairs, identical ones included, at five standard deviations"
    N, n = (h*w)**2, 200*(h*w)**2
    p = sample_pairs(8, n//8, h, w, generator=gen(1)).flatten(0, 1)
    hits = torch.bincount(p[:,0]*h*w + p[:,1], minlength=N).double()
    chi2 = ((hits - len(p)/N)**2 / (len(p)/N)).sum().item()
    assert len(hits) == N
    assert abs(chi2 - (N-1)) < 5*(2*(N-1))**0.5

def test_images_draw_their_own_pairs():
    p = sample_pairs(4, 64, 7, 7, generator=gen())
    assert p.shape == (4, 64, 2) and p.dtype == torch.int64
    assert all(not torch.equal(p[a], p[b]) for a in range(4) for b in range(a))

def test_generator_repeats_and_leaves_the_global_state():
    before = torch.get_rng_state()
    a, b, c = (sample_pairs(3, 64, 7, 7, generator=gen(s)) for s in (5,5,6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
    loss, grid = DrlocLoss(4, seed=0), torch.ones(2, 4, 7, 7).cumsum(-1)
    assert torch.equal(loss(grid, generator=gen(5)), loss(grid, generator=gen(5)))
    assert torch.equal(torch.get_rng_state(), before)

def test_without_generator_the_global_state_decides():
    torch.manual_seed(3); a = sample_pairs(3, 64, 7, 7)
    torch.manual_seed(3); b = sample_pairs(3, 64, 7, 7)
    assert torch.equal(a, b) and not torch.equal(b, sample_pairs(3, 64, 7, 7))

def test_a_draw_into_a_given_place():
    "The same pairs as without, written where they are wanted; a place that does not fit is refused"
    place = torch.empty(3, 8, 2, dtype=torch.int64)
    assert sample_pairs(3, 8, 2, 5, generator=gen(4), out=place) is place and torch.equal(place, sample_pairs(3, 8, 2, 5, generator=gen(4)))
    for bad in (torch.empty(3, 7, 2, dtype=torch.int64), torch.empty(3, 8, 2)):
        with pytest.raises(ValueError, match=r'a draw needs \(3, 8, 2\) and torch.int64'): sample_pairs(3, 8, 2, 5, out=bad)

def test_number_of_pairs():
    assert [len(all_pairs(k, k)) for k in (7,14)] == [2401, 38416]
    assert len(all_pairs(2, 3).unique(dim=0)) == 36


# Positions and targets, by hand and against the slow loop

def test_flat_index_on_2_by_3():
    assert rowcol(torch.arange(6), 3).tolist() == [[0,0],[0,1],[0,2],[1,0],[1,1],[1,2]]

def test_targets_by_hand():
    assert targets(torch.tensor([[0,3],[1,2],[1,1],[0,1]]), 2, 2).tolist() == [[.5,.5],[.5,.5],[0,0],[0,.5]]
    third = 1/3
    torch.testing.assert_close(targets(torch.tensor([[0,8],[4,8],[3,5],[2,6]]), 3, 3),
        torch.tensor([[2*third,2*third],[third,third],[0,2*third],[2*third,2*third]]))
    torch.testing.assert_close(targets(torch.tensor([[0,5],[3,2]]), 2, 3), torch.tensor([[.5,2*third],[.5,2*third]]))
    torch.testing.assert_close(targets(torch.tensor([[0,5],[2,3]]), 3, 2), torch.tensor([[2*third,.5],[0,.5]]))

@quick
@given(grids, seeds)
def test_targets_equal_the_slow_loop(hw, seed):
    h, w = hw
    p = sample_pairs(2, 7, h, w, generator=gen(seed))
    t = targets(p, h, w, torch.float64)
    torch.testing.assert_close(t, slow_targets(p, h, w))
    torch.testing.assert_close(t, targets(p.flip(-1), h, w, torch.float64))
    assert (t >= 0).all() and (t < 1).all()

@quick
@given(grids, seeds)
def test_gathered_embeddings_equal_the_slow_loop(hw, seed):
    h, w = hw
    grid, p = torch.randn(2, 3, h, w, generator=gen(seed)), sample_pairs(2, 5, h, w, generator=gen(seed))
    e = gather_pairs(grid, p)
    cells = [[[grid[b,:,r,c] for r in range(h) for c in range(w)] for b in range(2)]][0]
    for b in range(2):
        for s in range(5): assert torch.equal(e[b,s], torch.cat([cells[b][p[b,s,0]], cells[b][p[b,s,1]]]))

def test_query_pairs_cover_the_grid():
    p = query_pairs((1,2), 2, 3)
    assert p.tolist() == [[5,n] for n in range(6)]
    assert offsets(p, 3).tolist() == [[1,2],[1,1],[1,0],[0,2],[0,1],[0,0]]


# Eq. 2

def test_loss_by_hand():
    pred, p = torch.tensor([[[.25,.5],[0,.5]]]), torch.tensor([[[0,3],[1,1]]])
    assert l1_drloc(pred, targets(p, 2, 2)).tolist() == [.375]
    assert pair_errors(pred, p, 2, 2).tolist() == [.25,.5]
    pred = torch.tensor([[[0.,0.],[1.,1.],[0.,0.]]])              # 3 x 3: costs 4/3, 4/3 and 2/3
    p = torch.tensor([[[0,8],[4,8],[3,5]]])
    torch.testing.assert_close(l1_drloc(pred, targets(p, 3, 3)), torch.tensor([10/9]))
    torch.testing.assert_close(pair_errors(pred, p, 3, 3), torch.tensor([4/3,2.]))

def test_errors_in_cells_on_a_rectangle():
    "2 x 3, pair (0, 5), truth (1, 2) cells: half the height is one row, a third of the width one column"
    assert pair_errors(torch.tensor([[[0.,0.]]]), torch.tensor([[[0,5]]]), 2, 3).tolist() == [1,2]
    torch.testing.assert_close(pair_errors(torch.tensor([[[1.,1.]]]), torch.tensor([[[0,5]]]), 2, 3), torch.tensor([1.,1.]))

def test_module_by_hand():
    "An MLP of zeros answers 0 everywhere, so the loss is the mean of t_u + t_v"
    loss = DrlocLoss(1)
    for q in loss.parameters(): torch.nn.init.zeros_(q)
    grid, p = torch.randn(1, 1, 2, 3), all_pairs(2, 3)[None]
    torch.testing.assert_close(loss(grid, pairs=p).item(), .5/2 + (8/9)/3)
    assert best_guess(2, 2).loss == 0.5 and best_guess(2, 2).offset == (0, 0)

@pytest.mark.parametrize('k,offset,cells,loss', [(7,2,1.347,.385), (8,2,1.5625,.391), (14,4,2.724,.389)])
def test_level_of_guessing(k, offset, cells, loss):
    g = best_guess(k, k)
    assert g.offset == (offset, offset)
    assert [round(e, 3) for e in g.error] == [round(cells, 3)]*2 and round(g.loss, 3) == loss

@quick
@given(grids)
def test_no_constant_beats_the_best_guess(hw):
    h, w = hw
    g, t = best_guess(h, w), slow_targets(all_pairs(h, w)[None], h, w)[0]
    side = torch.tensor([h, w], dtype=torch.float64)
    at = lambda c: (t - torch.as_tensor(c, dtype=torch.float64)/side).abs().mean(0)
    torch.testing.assert_close(at(g.offset)*side, torch.tensor(g.error, dtype=torch.float64))
    torch.testing.assert_close(at(g.offset).sum().item(), g.loss)
    for c in torch.arange(0, max(h, w), .5): assert (at(c) >= at(g.offset) - 1e-12).all()

@quick
@given(grids, seeds)
def test_loss_is_zero_exactly_at_the_truth(hw, seed):
    h, w = hw
    p = sample_pairs(3, 5, h, w, generator=gen(seed))
    t, noise = targets(p, h, w), torch.randn(3, 5, 2, generator=gen(seed))
    assert (l1_drloc(t, t) == 0).all() and (l1_drloc(t+noise, t) > 0).all()
    one = t.clone(); one[1,2,0] += .5
    assert (l1_drloc(one, t) > 0).tolist() == [False, True, False]

@quick
@given(grids, seeds)
def test_axes_and_order_of_pairs_do_not_matter(hw, seed):
    h, w = hw
    p, pred = sample_pairs(2, 6, h, w, generator=gen(seed)), torch.randn(2, 6, 2, generator=gen(seed))
    t, perm = targets(p, h, w), torch.randperm(6, generator=gen(seed))
    torch.testing.assert_close(l1_drloc(pred.flip(-1), t.flip(-1)), l1_drloc(pred, t))
    torch.testing.assert_close(l1_drloc(pred[:,perm], t[:,perm]), l1_drloc(pred, t))
    loss, grid = DrlocLoss(3, seed=0), torch.randn(2, 3, h, w, generator=gen(seed))
    torch.testing.assert_close(loss(grid, pairs=p[:,perm]), loss(grid, pairs=p))

@quick
@given(grids, seeds)
def test_a_turned_grid_swaps_the_axes(hw, seed):
    h, w = hw
    rc = rowcol(sample_pairs(2, 6, h, w, generator=gen(seed)), w)
    p, turned = rc[...,0]*w + rc[...,1], rc[...,1]*h + rc[...,0]
    torch.testing.assert_close(targets(turned, w, h), targets(p, h, w).flip(-1))
    grid = torch.randn(2, 3, h, w, generator=gen(seed))
    assert torch.equal(gather_pairs(grid, p), gather_pairs(grid.transpose(2, 3), turned))

def test_sum_is_the_mean_times_the_images():
    grid, p = torch.randn(6, 4, 3, 5), sample_pairs(6, 64, 3, 5)
    mean, total = (DrlocLoss(4, reduction=r, seed=0)(grid, pairs=p) for r in ('mean','sum'))
    torch.testing.assert_close(total, 6*mean)
    assert mean.shape == total.shape == ()


# Gradient

def test_gradient_reaches_both_cells_and_no_other():
    grid = torch.randn(2, 8, 3, 4, requires_grad=True)
    loss = DrlocLoss(8, seed=0)
    loss(grid, pairs=torch.tensor([[[1,6]],[[11,0]]])).backward()
    touched = grid.grad.abs().sum(1).flatten(1) > 0
    assert [r.nonzero().flatten().tolist() for r in touched] == [[1,6],[0,11]]
    assert all(q.grad.abs().sum() > 0 for q in loss.parameters())

def test_gradient_is_right():
    torch.manual_seed(0)
    loss, p = DrlocLoss(3, hidden=16, seed=0).double(), sample_pairs(2, 4, 2, 3)
    grid = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: loss(g, pairs=p), grid)


# Precision

@pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
def test_autocast_keeps_float32(scale):
    torch.manual_seed(0)
    grid, p = (scale*torch.randn(4, 32, 7, 7)).bfloat16().requires_grad_(), sample_pairs(4, 64, 7, 7)
    loss = DrlocLoss(32, seed=0)
    plain = loss(grid.detach().float(), pairs=p)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low = loss(grid, pairs=p)
        assert predict_pairs(loss.mlp, grid, p).dtype == torch.float32
        assert predict_offsets(loss.mlp, grid, (0,0)).dtype == torch.float32
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16      # the outer autocast is back
    assert low.dtype == torch.float32 and low.isfinite() and torch.equal(low, plain)
    low.backward()
    assert grid.grad.dtype == torch.bfloat16 and grid.grad.isfinite().all()

def test_float64_stays_float64():
    grid, p = torch.randn(2, 4, 3, 3, dtype=torch.float64), sample_pairs(2, 8, 3, 3)
    loss = DrlocLoss(4, seed=0).double()
    out = loss(grid, pairs=p)
    assert out.dtype == torch.float64
    pred = loss.mlp(gather_pairs(grid, p))
    torch.testing.assert_close(out, (pred - slow_targets(p, 3, 3)).abs().sum(-1).mean(), rtol=1e-12, atol=0)

def test_low_precision_weights_are_refused():
    with pytest.raises(ValueError, match='keep it in float32'): DrlocLoss(4).bfloat16()(torch.randn(1, 4, 3, 3))


# State, contract, errors

def test_seed_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, c = (DrlocLoss(8, seed=s) for s in (0,0,1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.mlp[0].weight, b.mlp[0].weight) and not torch.equal(a.mlp[0].weight, c.mlp[0].weight)
    DrlocLoss(8)
    assert not torch.equal(torch.get_rng_state(), before)

def test_seed_leaves_the_devices_alone(monkeypatch):
    "torch.manual_seed would reseed every GPU as well, where nothing restores them"
    monkeypatch.setattr(torch, 'manual_seed', lambda s: pytest.fail('reseeds all devices'))
    DrlocLoss(8, seed=0)

def test_attributes_and_shapes():
    loss = DrlocLoss(8, m=5, hidden=16, reduction='sum')
    assert (loss.m, loss.reduction, loss.mlp.dim) == (5, 'sum', 8)
    paper = DrlocLoss(8)
    assert (paper.m, paper.reduction, paper.mlp[0].out_features) == (64, 'mean', 512)
    assert {n: tuple(q.shape) for n,q in loss.mlp.named_parameters()} == {
        '0.weight':(16,16), '0.bias':(16,), '2.weight':(2,16), '2.bias':(2,)}
    assert sum(q.numel() for q in LocalizationMLP(384).parameters()) == 2*384*512 + 512 + 2*512 + 2

def test_predicted_offsets_are_the_pairs_answers_in_cells():
    torch.manual_seed(0)
    loss, grid = DrlocLoss(4, seed=0), torch.randn(2, 4, 2, 3)
    far = predict_offsets(loss.mlp, grid, (1,0))
    assert far.shape == (2, 6, 2) and not far.requires_grad
    one = loss.mlp(torch.cat([grid[1,:,1,0], grid[1,:,0,2]]))
    torch.testing.assert_close(far[1,2], one.detach()*torch.tensor([2.,3.]))

def test_compiles_in_one_graph():
    loss, grid, p = DrlocLoss(4, seed=0), torch.randn(2, 4, 3, 5), sample_pairs(2, 8, 3, 5)
    fast = torch.compile(loss, fullgraph=True, backend='eager')
    torch.testing.assert_close(fast(grid, pairs=p), loss(grid, pairs=p))
    assert fast(grid).isfinite()

@pytest.mark.parametrize('dynamic', [None, True])
def test_checks_stay_in_the_graph(dynamic):
    "Shapes are compared and m is checked while a graph is traced, for sizes that are known and that are not"
    def both(pred, p, m):
        check_m(m)
        return l1_drloc(pred, targets(p, 3, 5)), pair_errors(pred, p, 3, 5)
    torch._dynamo.reset()
    fast = torch.compile(both, fullgraph=True, backend='eager', dynamic=dynamic)
    for m in (4,6,8):
        args = torch.randn(2, m, 2, generator=gen(m)), sample_pairs(2, m, 3, 5, generator=gen(m)), m
        torch.testing.assert_close(fast(*args), both(*args))

def test_numpy_counts_are_whole_numbers():
    import numpy as np
    assert DrlocLoss(np.int64(4), m=np.int32(5), hidden=np.int64(8))(torch.randn(2, 4, 3, 3)).isfinite()

@pytest.mark.parametrize('call,words', [
    (lambda: DrlocLoss(8, m=0), 'm=0'),
    (lambda: sample_pairs(1, -1, 7, 7), 'm=-1'),
    (lambda: DrlocLoss(8, m=2.5), r'm=2\.5: give a whole number >= 1.*m=64'),
    (lambda: sample_pairs(1, '64', 7, 7), "m='64': give a whole number"),
    (lambda: check_m(True), 'm=True: give a whole number'),
    (lambda: check_m(torch.tensor(64)), 'm=a Tensor: give a whole number'),
    (lambda: DrlocLoss(8, hidden=0), 'hidden=0: give a whole number >= 1, the width of the hidden layer'),
    (lambda: DrlocLoss(8, hidden=12.), r'hidden=12\.0: give a whole number'),
    (lambda: DrlocLoss(0), 'dim=0: give a whole number >= 1, the features of one embedding'),
    (lambda: LocalizationMLP(None), 'dim=None: give a whole number'),
    (lambda: l1_drloc(torch.zeros(2, 3, 2), torch.zeros(2, 3, 1)), r'pred has shape \(2, 3, 2\), targ \(2, 3, 1\); give both as \(B, m, 2\)'),
    (lambda: l1_drloc(torch.zeros(2, 3, 2), torch.zeros(3, 2)), r'targ \(3, 2\)'),
    (lambda: l1_drloc(torch.zeros(2, 3), torch.zeros(2, 3)), r'\(B, m, 2\)'),
    (lambda: pair_errors(torch.zeros(2, 3, 2), torch.zeros(1, 3, 2, dtype=torch.long), 7, 7), r'pred has shape \(2, 3, 2\), pairs \(1, 3, 2\)'),
    (lambda: pair_errors(torch.zeros(2, 3, 1), torch.zeros(2, 3, 2, dtype=torch.long), 7, 7), r'pred has shape \(2, 3, 1\)'),
    (lambda: DrlocLoss(8, reduction='none'), "'none' is unknown; choose one of mean, sum"),
    (lambda: check_grid(1, 1), '1 x 1 grid'),
    (lambda: best_guess(1, 1), '1 x 1 grid'),
    (lambda: DrlocLoss(8)(torch.randn(2, 8, 1, 1)), '1 x 1 grid'),
    (lambda: DrlocLoss(8)(torch.randn(2, 8, 1, 1), pairs=torch.zeros(2, 4, 2, dtype=torch.long)), '1 x 1 grid'),
    (lambda: sample_pairs(2, 4, 1, 1), '1 x 1 grid'),
    (lambda: DrlocLoss(8)(torch.randn(2, 49, 8)), r'shape \(2, 49, 8\).*\(B, D, h, w\)'),
    (lambda: DrlocLoss(8)(torch.randn(2, 16, 7, 7)), r'16 features.*built for 8.*DrlocLoss\(dim=16\)'),
    (lambda: gather_pairs(torch.randn(2, 8, 7, 7), all_pairs(7, 7)), r'shape \(2401, 2\).*\(2, m, 2\)'),
    (lambda: gather_pairs(torch.randn(2, 8, 7, 7), torch.zeros(1, 4, 2, dtype=torch.long)), 'batch of 2'),
    (lambda: predict_offsets(DrlocLoss(8).mlp, torch.randn(2, 16, 7, 7), (0,0)), '16 features.*built for 8'),
    (lambda: gather_pairs(torch.randn(2, 8, 7, 7), torch.zeros(2, 4, 2, 1, dtype=torch.long)), r'shape \(2, 4, 2, 1\)'),
    (lambda: gather_pairs(torch.randn(2, 8, 7, 7), torch.zeros(2, 4, 3, dtype=torch.long)), r'shape \(2, 4, 3\).*\(2, m, 2\)'),
    *[(lambda q=q: query_pairs(q, 7, 7), rf'query=\({q[0]}, {q[1]}\) lies outside the 7 x 7 grid') for q in ((7,0),(0,7),(-1,0),(0,-1))]])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words): call()

@pytest.mark.cuda
def test_no_host_wait_in_a_step():
    "On a GPU, torch itself reports a step that waits for the device or copies to it synchronously"
    loss = DrlocLoss(16, seed=0).cuda()
    grid, g = torch.randn(4, 16, 7, 5, device='cuda', requires_grad=True), torch.Generator('cuda').manual_seed(0)
    loss(grid, generator=g).backward()
    torch.cuda.set_sync_debug_mode('error')
    try: loss(grid, generator=g).backward(); loss(grid).backward()
    finally: torch.cuda.set_sync_debug_mode('default')
