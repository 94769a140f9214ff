"The side task's kernels compute the loss of chapter 06"
import os, subprocess, sys
import pytest, torch
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'    # before the kernels are made
from copy import deepcopy
from hypothesis import given, settings, strategies as st
from vt_drloc.loss import DrlocLoss, LocalizationMLP, l1_drloc, predict_pairs
from vt_drloc.pairs import sample_pairs, targets
import vt_drloc.speed_loss as s
from vt_drloc.speed_loss import can_fuse
from vt_drloc.speed_loss import fits, pair_losses
from vt_drloc.speed_loss import _losses, _losses_backward
from vt_drloc.tokens import to_grid

device = 'cuda' if torch.cuda.is_available() else 'cpu'
kernels = pytest.mark.skipif(not can_fuse(torch.zeros(1, device=device)), reason='needs Triton, and without a GPU TRITON_INTERPRET=1 before anything imports it, as make test does')
far = lambda a,b: ((a.double()-b.double()).norm()/b.double().norm()).item()

def in_turn(cases, last, row):
    "Each case with one of two last values, so that every pair of values meets; `row` cases share their first value"
    return [(*c, last[(i//row+i%row)%2]) for i,c in enumerate(cases)]

def inputs(B=2, D=16, h=4, w=5, m=20, hidden=32, dtype=torch.float32):
    "Grid as a backbone hands it out (a permuted view), MLP, pairs"
    torch.manual_seed(0)
    mlp = LocalizationMLP(D, hidden).to(device)
    return mlp,torch.randn(B,h,w,D, device=device).to(dtype).permute(0,3,1,2).requires_grad_(),sample_pairs(B, m, h, w, device)

def behind(prefix, h, w, B=3, D=16, dtype=torch.float32, **kw):
    "MLP, tokens of which `prefix` come before the cells and are NaN, pairs, and the grid of any such tokens"
    mlp,grid,pairs = inputs(B, D, h, w, dtype=dtype, **kw)
    tokens = torch.cat([torch.full((B,prefix,D), float('nan'), device=device, dtype=dtype), grid.detach().flatten(2).mT], 1).requires_grad_()
    return mlp,tokens,pairs,lambda t: to_grid(t[:,prefix:], h, w)

def plain(mlp, grid, pairs):
    pred = predict_pairs(mlp, grid, pairs)
    return (pred-targets(pairs, *grid.shape[2:], pred.dtype)).abs().sum(-1)

def ordered(first): return lambda mlp, grid, pairs: pair_losses(mlp, grid, pairs, first=first)

def grads(f, mlp, grid, pairs):
    "Losses, and gradients for weights that differ from pair to pair"
    y = f(mlp, grid, pairs)
    g = torch.cos(torch.arange(y.numel(), device=y.device, dtype=y.dtype)).view_as(y)
    return y,*torch.autograd.grad(y, [grid,*mlp.parameters()], g)

@kernels
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_kernels_are_chapter_6(data):
    "Any grid, square or not, more pairs than cells or fewer, widths that are no power of 2"
    B,D,h,w,m = (data.draw(st.integers(*r)) for r in ((1,3),(1,20),(1,9),(2,9),(1,80)))
    args = inputs(B, D, h, w, m, data.draw(st.sampled_from([16,48,128,160])))
    first = data.draw(st.sampled_from([None,False,True] if h*w<=64 else [None,False]))
    for a,b in zip(grads(ordered(first), *args), grads(plain, *args)): assert far(a, b)<1e-5

@kernels
@pytest.mark.parametrize('h,w,m', [(3,3,20),(6,6,20)])
def test_bfloat16(h, w, m):
    "Losses as exact as float16 and TF32, which keep 11 bits, gradients as exact as bfloat16"
    mlp,grid,pairs = inputs(h=h, w=w, m=m, D=64, hidden=64, dtype=torch.bfloat16)
    for k,(a,b) in enumerate(zip(grads(pair_losses, mlp, grid, pairs), grads(plain, mlp, grid, pairs))):
        assert a.dtype==b.dtype and far(a, b)<(1e-2 if k else 1e-3)

@kernels
@pytest.mark.parametrize('h', [3,9])
def test_float16_has_no_room_for_it(h):
    "Embeddings beyond 65,504 are cut off there, an infinite one shows in the loss of the pairs that have it"
    mlp,grid,pairs = inputs(h=h, w=h)
    mlp[0].weight.data.mul_(1e-6)                                       # hidden units that float16 holds
    big,cut = (torch.where(torch.arange(16, device=device)[:,None,None]==3, o, grid.detach()) for o in (1e6,65504.))
    with torch.autocast(device, torch.bfloat16): a,b = (pair_losses(mlp, o, pairs) for o in (big,cut))
    assert torch.equal(a, b) and a.isfinite().all()
    big[0,3,0,0] = float('inf')
    with torch.autocast(device, torch.bfloat16): a = pair_losses(mlp, big, pairs)
    assert torch.equal(~a.isfinite(), (pairs==0).any(-1) & (torch.arange(2, device=device)==0)[:,None])

@kernels
@pytest.mark.parametrize('h,w', [(3,3),(6,6)])
@pytest.mark.parametrize('prefix', [1,2])
def test_tokens_behind_a_class_token(h, w, prefix):
    "Looked up where they lie: the same bits as from a copy, and no gradient for the class token"
    mlp,grid,pairs = inputs(B=3, h=h, w=w)
    tokens = torch.cat([torch.full((3,prefix,16), float('nan'), device=device), grid.detach().flatten(2).mT], 1).requires_grad_()
    view = lambda f: f[:,prefix:].mT.unflatten(2, (h,w))
    got,want = grads(lambda m,f,p: pair_losses(m, view(f), p), mlp, tokens, pairs),grads(pair_losses, mlp, grid, pairs)
    assert torch.equal(view(got[1]), want[1]) and not got[1][:,:prefix].any()
    for k in (0,2,3,4,5): assert torch.equal(got[k], want[k])

@kernels
@pytest.mark.parametrize('prefix,h,w,dtype', in_turn([(p,*g) for p in (0,1,2,5) for g in ((3,3),(6,6),(8,8),(14,5))], [torch.float32,torch.bfloat16], 4))
def test_tokens_handed_in_are_chapter_6(prefix, h, w, dtype):
    "The gradient has the tokens' shape and precision, and is zero where no cell is; not even a NaN there reaches a sum"
    mlp,tokens,pairs,grid = behind(prefix, h, w, dtype=dtype, m=64 if h==8 else 20)
    first = True if h==8 else None
    got = grads(lambda m,t,p: pair_losses(m, grid(t), p, t, first), mlp, tokens, pairs)
    want,alone = (grads(lambda m,t,p: f(m, grid(t), p), mlp, tokens, pairs) for f in (plain,ordered(first)))
    assert (got[1].shape,got[1].dtype)==(tokens.shape,dtype) and got[1].is_contiguous() and not got[1][:,:prefix].any()
    for k,(a,b,c) in enumerate(zip(got, want, alone)):
        assert far(a, b) < (1e-5 if dtype==torch.float32 else 1e-2 if k else 1e-3)
        if h*w>64 or not prefix: assert torch.equal(a, c)                        # cells that are multiplied first have more rows around them, and a product may add in another order
        else: assert far(a, c) < (1e-6 if dtype==torch.float32 else 1e-2)

@kernels
@pytest.mark.parametrize('prefix,lie,side', in_turn([(p,l) for p in (0,1,2) for l in ('as channels','among others','each second')], [3,6], 3))
def test_tokens_wherever_they_lie(prefix, lie, side):
    "Channels first in memory, a part of more tokens, a part of more features: read in place, their gradient is that of a copy"
    mlp,tokens,pairs,grid = behind(prefix, side, side)
    t = tokens.detach()
    t = dict(zip(('as channels','among others','each second'), (t.mT.contiguous().mT, torch.cat([t[:,:1],t,t[:,:3]], 1)[:,1:-3], t.repeat_interleave(2, 2)[...,::2])))[lie]
    assert not t.is_contiguous() and torch.equal(t.nan_to_num(), tokens.nan_to_num())
    f = lambda m,t,p: pair_losses(m, grid(t), p, t)
    for a,b in zip(grads(f, mlp, t.requires_grad_(), pairs), grads(f, mlp, tokens, pairs)): assert torch.equal(a, b)

@kernels
def test_tokens_under_autocast():
    "As the grid that is cut from them: the hidden units' gradients are rounded, the tokens' own are not"
    mlp,tokens,pairs,grid = behind(1, 6, 6, D=64, hidden=64)
    with torch.autocast(device, torch.bfloat16): got,want = (grads(lambda m,t,p: pair_losses(m, grid(t), p, *more(t)), mlp, tokens, pairs) for more in (lambda t: (t,), lambda t: ()))
    assert got[1].dtype==torch.float32 and not torch.equal(got[1], got[1].bfloat16().float())
    for a,b in zip(got, want): assert torch.equal(a, b)

@pytest.mark.parametrize('change,said', [('too few',r'\(2, 19, 16\)'), ('another batch',r'\(1, 21, 16\)'), ('features',r'\(2, 21, 8\)'), ('a grid',r'\(2, 16, 4, 5\)'), ('dtype','bfloat16')])
@kernels
def test_tokens_that_hold_no_such_grid(change, said):
    mlp,grid,pairs = inputs()
    t = torch.randn(2,21,16, device=device)
    t = dict(zip(('too few','another batch','features','a grid','dtype'), (t[:,:19], t[:1], t[...,:8], grid, t.bfloat16())))[change]
    with pytest.raises(ValueError, match=said+r'.*\(2, prefix \+ 20, 16\), or none'): pair_losses(mlp, grid, pairs, t)

def way_back(side, *args, grad=0):
    "Nodes of a compiled function's way back, and the one that is the gradient of an argument"
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    seen = []
    backend = aot_autograd(fw_compiler=lambda g,_: g, bw_compiler=lambda g,_: seen.append(g) or g, decompositions=select_decomp_table())
    torch.compile(side, backend=backend, fullgraph=True)(*args).backward()
    torch.compiler.reset()
    nodes = list(seen[0].graph.nodes)
    shape = args[grad].shape
    return nodes,next(o for o in nodes[-1].args[0] if o is not None and o.meta['val'].shape==shape)

from_kernel = lambda node: str(node.target)=='<built-in function getitem>' and node.args[1]==0 and 'pair_losses_backward' in str(node.args[0].target)

@kernels
@pytest.mark.parametrize('prefix,h,w,dtype', [(0,3,3,torch.bfloat16), (1,3,3,torch.float32), (0,6,6,torch.float32), (2,6,6,torch.bfloat16)])     # cells first and pairs first, alone and behind tokens
def test_nothing_lies_between_the_kernel_and_the_features(prefix, h, w, dtype):
    "The compiled gradient is what the kernel wrote: nothing is padded, cast or copied; without the tokens it is padded"
    mlp,tokens,pairs,grid = behind(prefix, h, w, dtype=dtype)
    for amp in (False,True):
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            nodes,dtokens = way_back(lambda t: pair_losses(mlp, grid(t), pairs, t).mean(), tokens)
            padded = way_back(lambda t: pair_losses(mlp, grid(t), pairs).mean(), tokens)[0]
        assert from_kernel(dtokens) and [n for n in nodes if n.op=='call_function' and getattr(n.meta['val'], 'shape', None)==tokens.shape]==[dtokens]
        assert any('slice_scatter' in n.name or 'pad' in n.name for n in padded)==bool(prefix)

@kernels
@pytest.mark.parametrize('model', ['t2t_mini','vit_mini','cvt_13_mini','swin_mini','cvt_mini'])
def test_a_networks_features_get_their_gradient_from_the_kernel(model, monkeypatch):
    "From `DrlocCallback`'s compiled loss and the benchmark's, behind a class token too; other networks never hand in tokens"
    from vt_drloc.callback import features_loss
    from vt_drloc.hybrid import as_backbone
    from vt_drloc.models import create_model
    net,pairs,seen = create_model(model, 10).to(device),torch.randint(64, (2,64,2), device=device),[]
    with torch.no_grad(): f = net.forward_features(torch.randn(2,3,32,32, device=device))
    back,loss,f = as_backbone(net),DrlocLoss(net.num_features, seed=0).to(device),f.requires_grad_()
    def per_image(self, grid, pairs, tokens=None):                              # as on a GPU
        seen.append(tokens is not None)
        return s.pair_losses(self.mlp, grid, pairs, tokens).mean(-1)
    want = torch.autograd.grad(loss(back.grid(f, (32,32)), pairs=pairs), f)[0]
    monkeypatch.setattr(DrlocLoss, 'per_image', per_image)
    nodes,df = way_back(lambda f: features_loss(loss, back, f, (32,32), pairs), f)
    assert set(seen)=={f.ndim==3} and far(f.grad, want)<1e-5
    if f.ndim==3: assert from_kernel(df)

@kernels
@pytest.mark.parametrize('half', [torch.bfloat16,torch.float16])
@pytest.mark.parametrize('h,w', [(3,3),(6,6)])
def test_autocast_rounds_what_is_multiplied(h, w, half):
    "To 11 bits on the way forward, to bfloat16 on the way back; in fp16 nothing changes at all"
    args = inputs(B=4, D=64, h=h, w=w, hidden=64)
    want = grads(pair_losses, *args)
    with torch.autocast(device, half): got = grads(pair_losses, *args)
    for k,(a,b) in enumerate(zip(got, want)):
        if half==torch.float16: assert torch.equal(a, b)
        elif k in (1,2): assert a.dtype==torch.float32 and 1e-5 < far(a, b) < (5e-3 if device=='cuda' else 8e-3)   # Triton's interpreter cuts off where a GPU rounds
        else: assert a.dtype==torch.float32 and (k or 1e-7 < far(a, b)) and far(a, b) < (5e-3 if k else 1e-3)   # a hidden unit near zero may fall on its other side

@kernels
def test_a_compiled_loss_knows_of_autocast():
    args = inputs()
    f = torch.compile(pair_losses, backend='aot_eager', fullgraph=True)
    for on in (False,True,False):
        with torch.autocast(device, torch.bfloat16, enabled=on): got,want = (grads(g, *args) for g in (f, pair_losses))
        for a,b in zip(got, want): assert torch.equal(a, b)
    torch.compiler.reset()

@kernels
@pytest.mark.parametrize('h,w', [(3,3),(6,6)])
def test_operations_obey_pytorch(h, w):
    mlp,grid,pairs = inputs(h=h, w=w)
    (l1,_,l2),cells = mlp,grid.flatten(2).transpose(1,2)
    more = torch.randn(2,2+h*w,16, device=device)
    for x,prefix in ((cells,0), (torch.randn(2,16,h*w, device=device).transpose(1,2),0), (more[:,2:],0), (more,2), (more[:,1:],1)):     # in memory as tokens, as a convolution's grid, behind a class token, and with it
        leaves = [o.detach().clone().requires_grad_() for o in (x,l1.weight,l1.bias,l2.weight,l2.bias)]
        torch.library.opcheck(_losses, (leaves[0],pairs,*leaves[1:],prefix,h,w,False,h==3))

@kernels
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16])
@pytest.mark.parametrize('h,w', [(3,3),(6,6)])
def test_the_way_back_is_as_declared(h, w, dtype):
    "Shape and precision of the tokens: autograd would cast another precision in silence, with a copy"
    (l1,_,l2),tokens,pairs,_ = behind(1, h, w, dtype=dtype)
    w1,b1,w2,b2,t = (o.detach() for o in (l1.weight,l1.bias,l2.weight,l2.bias,tokens))
    for low in (False,True):
        error,sign,pre,kept = _losses(t, pairs, w1, b1, w2, b2, 1, h, w, low, h==3)
        back = t,pairs,w1,b1,w2,pre,sign,kept,torch.ones_like(error),1,low,h==3
        torch.library.opcheck(_losses_backward, back, test_utils=('test_schema','test_faketensor'))
        assert (_losses_backward(*back)[0].dtype,_losses_backward(*back)[0].shape)==(dtype,t.shape)

@kernels
@pytest.mark.parametrize('m', [60,8])
def test_two_runs_give_the_same_bits(m):
    args = inputs(B=5, h=8, w=9, m=m)
    assert all(torch.equal(a, b) for a,b in zip(grads(pair_losses, *args), grads(pair_losses, *args)))

@kernels
@pytest.mark.parametrize('h', [4,8])
@pytest.mark.parametrize('bad', [-1,None])
def test_a_pair_outside_the_grid_is_seen(bad, h):
    "Cells first and pairs first: nobody else's memory is read, nor written on the way back"
    mlp,grid,pairs = inputs(h=h)
    want = grads(ordered(h==4), mlp, grid, pairs.where(torch.arange(20, device=device)[:,None]!=3, 0))[0]
    pairs[1,3,0] = 5*h if bad is None else bad
    loss = pair_losses(mlp, grid, pairs, first=h==4)
    assert loss.isnan().nonzero().tolist()==[[1,3]] and torch.equal(loss[0,4:], want[0,4:])
    g, = torch.autograd.grad(loss.nansum(), grid)
    assert g.isfinite().all()

@kernels
@pytest.mark.parametrize('bad,prefix,h', in_turn([(b,p) for b in (-1,-2,None) for p in (0,1,2)], [4,8], 3))
def test_a_pair_outside_the_grid_of_tokens(bad, prefix, h):
    "NaN where it is; a cell -1 is not the class token, which stays without a gradient"
    mlp,tokens,pairs,grid = behind(prefix, h, 5, B=2)
    pairs[1,3,0] = 5*h if bad is None else bad
    loss = pair_losses(mlp, grid(tokens), pairs, tokens, h==4)
    assert loss.isnan().nonzero().tolist()==[[1,3]]
    (g,),(want,) = (torch.autograd.grad(o, tokens, torch.ones_like(o)) for o in (loss,pair_losses(mlp, grid(tokens), pairs, first=h==4)))
    assert g.isfinite().all() and not g[:,:prefix].any() and far(g, want)<1e-6

@kernels
@pytest.mark.parametrize('first', [True,False])
def test_compiled(first):
    args = inputs()
    f = torch.compile(lambda *a: ordered(first)(*a).mean(), backend='aot_eager', fullgraph=True)
    for a,b in zip(*(torch.autograd.grad(g(*args), [args[1],*args[0].parameters()]) for g in (f, lambda *a: ordered(first)(*a).mean()))): assert torch.equal(a, b)
    torch.compiler.reset()

@pytest.mark.parametrize('N,m,D,first', [(49,64,768,True), (49,64,2048,True), (64,64,128,False), (64,64,768,False), (64,64,2048,True), (16,64,512,True), (16,64,128,False), (49,64,128,False), (49,64,384,False), (196,64,384,False), (49,20,768,False), (65,200,768,False)])
def test_which_comes_first(N, m, D, first):
    "Cells where there are at most as many as pairs, and where it pays: with many features, the sooner the fewer the cells"
    assert s._cells_first(N, m, D)==first

@kernels
@pytest.mark.parametrize('change', ['more images','fewer','three cells','rounded','flat'])
def test_pairs_of_another_batch(change):
    "A kernel would read beyond what is there"
    mlp,grid,pairs = inputs()
    bad = {'more images': pairs.repeat(2,1,1), 'fewer': pairs[:1], 'three cells': pairs.repeat(1,1,2)[...,:3], 'rounded': pairs.float(), 'flat': pairs[0]}[change]
    with pytest.raises(ValueError, match=r'do not fit a batch of 2 images.*expected \(2, m, 2\), torch.int64'): pair_losses(mlp, grid, bad)

@kernels
def test_cells_that_do_not_fit():
    with pytest.raises(ValueError, match='first=True with 72 cells.*leave it out'): pair_losses(*inputs(h=8, w=9), first=True)

@kernels
@pytest.mark.parametrize('prefix,h,w', [(0,3,3),(1,6,6)])
def test_eager_is_the_operation(prefix, h, w):
    "What a step that is not compiled calls gives the bits of the operation that a compiled one has; no gradient for who wants none"
    mlp,tokens,pairs,grid = behind(prefix, h, w)
    tokens = tokens.detach().nan_to_num().requires_grad_()
    got = grads(lambda m,t,p: pair_losses(m, grid(t), p, t, h==3), mlp, tokens, pairs)
    want = grads(lambda m,t,p: _losses(t, p, m[0].weight, m[0].bias, m[2].weight, m[2].bias, prefix, h, w, False, h==3)[0], mlp, tokens, pairs)
    for a,b in zip(got, want): assert torch.equal(a, b)
    mlp[0].requires_grad_(False)
    pair_losses(mlp, grid(t := tokens.detach()), pairs, t).mean().backward()
    assert mlp[0].weight.grad is None and torch.equal(mlp[2].weight.grad, torch.autograd.grad(pair_losses(mlp, grid(t), pairs, t).mean(), mlp[2].weight)[0])
    with torch.no_grad(): assert not pair_losses(mlp, grid(t), pairs, t).requires_grad

@kernels
def test_who_watches_sees_the_operation():
    "A mode that is told of every operation, and one that runs none of them"
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.append(str(f))
            return f(*args, **(kwargs or {}))
    mlp,grid,pairs = inputs()
    for watch,want in ((Names(),True),(None,False)):
        seen = []
        with watch or torch.enable_grad(): pair_losses(mlp, grid, pairs).mean().backward()
        assert ({'vt_drloc.pair_losses.default','vt_drloc.pair_losses_backward.default'}<=set(seen))==want
    with FakeTensorMode(allow_non_fake_inputs=True) as mode: assert pair_losses(mlp, mode.from_tensor(grid), mode.from_tensor(pairs)).shape==(2,20)

@kernels
def test_not_twice():
    mlp,grid,pairs = inputs()
    g, = torch.autograd.grad(pair_losses(mlp, grid, pairs).mean(), grid, create_graph=True)
    with pytest.raises(RuntimeError): torch.autograd.grad(g.square().sum(), mlp[0].weight)

@pytest.mark.parametrize('change', ['float64','fp16 grid','hidden 24','other layers'])
def test_what_does_not_fit_says_so(change):
    mlp,grid,pairs = inputs(hidden=24 if change=='hidden 24' else 32)
    if change=='float64': mlp,grid = mlp.double(),grid.double()
    if change=='fp16 grid': grid = grid.half()
    if change=='other layers': mlp[1] = torch.nn.GELU()
    assert not fits(mlp, grid)
    with pytest.raises(ValueError, match='multiple of 16.*use predict_pairs'): pair_losses(mlp, grid, pairs)

# ---- DrlocLoss takes them by itself on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('reduction', ['mean','sum'])
@pytest.mark.parametrize('h', [3,9])
def test_the_loss_on_a_gpu(h, reduction, monkeypatch):
    calls,real = [],s.pair_losses
    monkeypatch.setattr(s, 'pair_losses', lambda *a: calls.append(1) or real(*a))
    fast = DrlocLoss(16, reduction=reduction, seed=0).cuda()
    slow = deepcopy(fast)
    slow.fast = False
    grid,seen = inputs(h=h)[1],[]
    for loss in (fast,slow):
        l = loss(grid, generator=torch.Generator('cuda').manual_seed(1))
        seen.append([l,*torch.autograd.grad(l, [grid,*loss.parameters()])])
    assert calls==[1] and all(far(a, b)<1e-5 for a,b in zip(*seen))

@pytest.mark.cuda
def test_what_does_not_fit_on_a_gpu_still_runs():
    for dtype in (torch.float16,torch.float64):
        loss = DrlocLoss(16, seed=0).cuda()
        if dtype==torch.float64: loss = loss.double()
        loss(inputs()[1].to(dtype)).backward()
        assert loss.mlp[0].weight.grad.isfinite().all()

@pytest.mark.cuda
def test_never_waits():
    loss,grid = DrlocLoss(16, seed=0).cuda(),inputs(dtype=torch.bfloat16)[1]
    loss(grid).backward()
    try:
        torch.cuda.set_sync_debug_mode('error')
        loss(grid).backward()
    finally: torch.cuda.set_sync_debug_mode('default')

COMPILE = '''
import triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
import vt_drloc.speed_loss as s
numbers = dict(cells='*fp32', tokens='*fp32', n='i32', image='i32', cell='i32', one='i32', D='i32', T='i32', prefix='i32', b1='*fp32', w2='*fp32', b2='*fp32', pairs='*i64', error='*fp32', sign='*fp32', dtokens='*fp32', derror='*fp32', parts='*fp32', **{k:'i32' for k in ('M','N','R','rows','cols')})
def build(kernel, low, cap, **fixed):
    names = kernel.arg_names
    half,ahead = ('*bf16','*fp16') if low else ('*fp32','*fp32')
    sig = {k: 'constexpr' if k in fixed else half if k in ('dpre','dx','kept') else ahead if k in ('pre','out') else numbers[k] for k in names}
    code = ASTSource(kernel, sig, constexprs={(names.index(k),):v for k,v in fixed.items()})
    made = triton.compile(code, target=GPUTarget('cuda', cap, 32))
    assert f'.entry {kernel.__name__}' in made.asm['ptx'] and made.metadata.shared<=(64 if cap==75 else 227)*1024
for low in (True,False):                                         # for an H200
    for one in ({},dict(prefix=1)):                              # a number that is 1 is known to the compiler
        build(s._cells_forward, low, 90, H=512, BH=128, BM=16, **one)
        build(s._cells_backward, low, 90, H=512, BH=64, BM=32, NB=64, LOW=low, **one)
        build(s._pairs_to_cells, low, 90, D=384, BD=128, BM=32, NB=64, LOW=low, **one)
    build(s._pairs_look_up, low, 90, BD=512, BM=16, LOW=low)
    build(s._pairs_forward, low, 90, H=512, BH=128, BM=32)
    build(s._pairs_backward, low, 90, H=512, BH=64, BM=32, STEPS=8)
for prefix in (0,1): build(s._cells_round, True, 90, prefix=prefix, BLOCK=2048)
build(s._pairs_forward, False, 75, H=512, BH=128, BM=32)                                                 # for a T4, as Colab lends it: fp16 rounds nothing here
build(s._pairs_backward, False, 75, H=512, BH=64, BM=32, STEPS=8)
build(s._cells_forward, False, 75, H=512, BH=128, BM=16)
build(s._cells_backward, False, 75, H=512, BH=64, BM=32, NB=64, LOW=False)
build(s._pairs_to_cells, False, 75, D=384, BD=128, BM=32, NB=64, LOW=False)
print('done')'''

@kernels
def test_kernels_compile_for_a_gpu_that_is_not_there():
    "The interpreter forgives what the compiler does not; and a T4 has 64 KiB a program"
    env = {k:v for k,v in os.environ.items() if k!='TRITON_INTERPRET'}
    res = subprocess.run([sys.executable,'-c',COMPILE], capture_output=True, text=True, env=env)
    assert res.stdout.strip()=='done', res.stderr
