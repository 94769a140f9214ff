"""T2T-ViT against numbers of the released code, and what follows from theory.

`golden/t2t.json` holds what the code of yitu-opensource/T2T-ViT (revision 0f63dc9) gave on the CPU in float32 and evaluation mode, and
its counts of parameters; the copy in yhlleo/VTs-Drloc (revision 6ac2c44) gave the same, bit for bit. Every input is computed anew from a
name: `uniform(name, shape)` draws from numpy's RandomState, whose stream is frozen, seeded with the name's CRC32. Weights go by their
names in the release (`values` scales them: norms and biases are random, too), images and the weights of the loss by the names below. A
tensor is kept as its largest value, its norm, every `step`-th entry, and two products with random vectors that touch every entry."""
import json, math, zlib
from functools import cache
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from vt_drloc.attention import attend
from vt_drloc.hybrid import as_backbone
from vt_drloc.t2t import *
from vt_drloc.tokens import to_grid, to_tokens

few = settings(max_examples=15, deadline=None, derandomize=True)
golden = json.loads((Path(__file__).parent/'golden'/'t2t.json').read_text())

def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return T2T(**{**dict(img_size=32, splits=((3,1,1),(3,2,1),(3,2,1)), token_dim=16, features=8, dim=24, depth=2, heads=2), **kw})

# --- the released code

def uniform(name, shape): return 2*np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)-1

def values(name, shape):
    "The weights of the golden runs, by their names in the release"
    u,last = uniform(name, shape),name.split('.')[-1]
    if len(shape)==1: u = 1+.3*u if 'norm' in name and last=='weight' else .3*u
    elif last=='w': u = u*np.sqrt(3*32/64)
    elif last not in ('pos_embed','cls_token'):
        u = u*np.sqrt(3)*.02 if ('qkv' in name or 'kqv' in name) and 'tokens_to_token' in name else u*np.sqrt(3/shape[1])
    return torch.from_numpy(u.astype(np.float32))

def mixer_names(tokens):
    "Weights of a mixer, from the release's names to ours, written down by hand"
    both = {f'{n}.{p}':f'{n}.{p}' for n in ('norm1','norm2') for p in ('weight','bias')}
    if tokens=='performer':
        own = {'kqv.weight':'qkv.weight', 'kqv.bias':'qkv.bias', 'w':'w', 'proj.weight':'proj.weight', 'proj.bias':'proj.bias',
               'mlp.0.weight':'mlp.fc1.weight', 'mlp.0.bias':'mlp.fc1.bias', 'mlp.2.weight':'mlp.fc2.weight', 'mlp.2.bias':'mlp.fc2.bias'}
    else:
        own = {'attn.qkv.weight':'qkv.weight', 'attn.proj.weight':'proj.weight', 'attn.proj.bias':'proj.bias',
               **{f'mlp.{f}.{p}':f'mlp.{f}.{p}' for f in ('fc1','fc2') for p in ('weight','bias')}}
    return both | own

def names(model, tokens):
    "All weights of a T2T, from the release's names to ours"
    out = {f'tokens_to_token.attention{i+1}.{a}':f'mixers.{i}.{b}' for i in (0,1) for a,b in mixer_names(tokens).items()}
    out |= {f'tokens_to_token.project.{p}':f'project.{p}' for p in ('weight','bias')}
    return out | {k:k for k in model.state_dict() if k.split('.')[0] in ('cls_token','pos_embed','blocks','norm','head')}

def released_sd(model, tokens):
    "The golden weights, under the release's names"
    shapes = {k:tuple(v.shape) for k,v in model.state_dict().items()}
    return {theirs:values(theirs, shapes[ours]) for theirs,ours in names(model, tokens).items()}

def swap(t):
    "q, k, v -> k, q, v"
    q,k,v = t.chunk(3)
    return torch.cat([k,q,v])

def close(name, t, want, tol):
    "Within `tol` of the largest value, entry by entry; the checksums within `tol` of the norm"
    a = t.detach().double().numpy().ravel()
    assert list(t.shape)==want['shape'], name
    assert np.abs(a[::want['step']][:64]-want['values']).max() < tol*want['max'], name
    assert abs(np.abs(a).max()-want['max']) < tol*want['max'] and abs(np.linalg.norm(a)-want['norm']) < tol*want['norm'], name
    for i,c in enumerate(want['checksums']): assert abs(uniform(f'check {name} {i}', a.size)@a-c) < tol*want['norm'], name

runs = {'t2t_vit_14':(t2t_vit_14,'performer'), 't2t_vit_14 at 96':(t2t_vit_14,'performer'), 't2t_vit_t_14':(t2t_vit_t_14,'transformer')}

@pytest.mark.parametrize('name', runs)
def test_released(name):
    "Logits and final grids to 1e-5 of the largest value, gradients to 1e-4, every norm and bias random"
    (make,tokens),want = runs[name],golden['runs'][name]
    B,side = want['batch'],want['side']
    m = make(img_size=side).eval()
    m.load_state_dict(t2t_from_release(released_sd(m, tokens)))
    f = m.forward_features(torch.from_numpy(uniform(f'images {B} {side}', (B,3,side,side)).astype(np.float32)*2))
    logits,grid = m.forward_head(f),f[:,1:]
    want_logits = torch.tensor(want['logits'])
    assert want_logits.std() > .3                # numbers that differ
    assert (logits-want_logits).abs().max() < 1e-5*want_logits.abs().max()
    close('grid', grid, want['grid'], 1e-5); close('cls', f[:,0], want['cls'], 1e-5)
    weights = torch.from_numpy(uniform('grid weights', tuple(grid.shape)).astype(np.float32))
    loss = F.cross_entropy(logits, torch.arange(B)*3+1)+(grid*weights).sum(-1).mean()
    assert abs(loss.item()-want['loss']) < 1e-5
    loss.backward()
    params,ours = dict(m.named_parameters()),names(m, tokens)
    assert len(want['grads'])>10
    for n,w in want['grads'].items(): close(n, swap(params[ours[n]].grad) if '.kqv.' in n else params[ours[n]].grad, w, 1e-4)

def test_released_performer_with_long_queries():
    "Where the denominator is so small that its 1e-8 counts"
    want,p = golden['runs']['performer, long q and k'],Performer(27).eval()
    sd = {}
    for theirs,ours in mixer_names('performer').items():
        t = values('performer.'+theirs, tuple(p.state_dict()[ours].shape))
        if theirs=='kqv.weight': t = t*want['scale']
        if theirs[:3]=='kqv':
            k,q,v = t.chunk(3)
            t = torch.cat([q,k,v])
        sd[ours] = t
    p.load_state_dict(sd)
    y = p(torch.from_numpy(uniform('tokens', (2,50,27)).astype(np.float32)))
    close('out', y, want['out'], 1e-5)
    y.square().mean().backward()
    close('kqv.weight', swap(p.qkv.weight.grad), want['grads']['kqv.weight'], 1e-4)
    for n in ('proj.weight','norm1.bias'): close(n, dict(p.named_parameters())[n].grad, want['grads'][n], 1e-4)

def test_released_counts():
    "The release counts positions and directions as parameters; ours are buffers"
    for make,n in ((t2t_vit_14,10), (t2t_vit_t_14,10), (t2t_vit_14,1000)):
        want = golden['parameters'][make.__name__ + (', 1000 classes' if n>10 else '')]
        m = make(n)
        trained,fixed = sum(p.numel() for p in m.parameters()),sum(b.numel() for b in m.buffers())
        assert (trained,trained+fixed)==(want['trained'],want['all'])
        assert all(p.requires_grad for p in m.parameters())
    assert round(golden['parameters']['t2t_vit_14']['all']/1e6, 2)==21.16

@pytest.mark.parametrize('n', [37,197])
def test_released_positions(n): close(f'table {n}', sinusoid_1d(n, 384)[None], golden['tables'][str(n)], 1e-6)

@pytest.mark.parametrize('wrap', [lambda sd: sd, lambda sd: {'state_dict':sd}, lambda sd: {'state_dict':{}, 'state_dict_ema':sd, 'epoch':3},
                                  lambda sd: {'state_dict':{'module.'+k:v for k,v in sd.items()}}])
@pytest.mark.parametrize('tokens', ['performer','transformer'])
def test_from_release(tokens, wrap):
    "Every weight arrives where it belongs, whatever it was wrapped in, and the given dict stays as it was"
    m = tiny(tokens=tokens)
    sd = released_sd(m, tokens)
    before = {k:v.clone() for k,v in sd.items()}
    got,ours = t2t_from_release(wrap(sd)),names(m, tokens)
    m.load_state_dict(got)
    for theirs,t in sd.items(): assert torch.equal(t, swap(got[ours[theirs]]) if '.kqv.' in theirs else got[ours[theirs]]), theirs
    assert all(torch.equal(sd[k], before[k]) for k in before) and len(got)==len(sd)

def test_from_release_refuses():
    for sd in ({'conv1.weight':torch.zeros(1)}, {'state_dict':{'head.weight':torch.zeros(1)}}, {}):
        with pytest.raises(ValueError, match='no T2T-ViT'): t2t_from_release(sd)

# --- the soft split

split_sizes = st.tuples(st.integers(1,7), st.integers(1,4), st.integers(0,3)).filter(lambda t: t[0]-t[1] <= 2*t[2] < t[0])

@few
@given(ksp=split_sizes, B=st.integers(1,2), C=st.integers(1,3), h=st.integers(1,4), w=st.integers(1,4))
def test_soft_split_is_a_convolution(ksp, B, C, h, w):
    "With a linear layer behind; on any grid, so it has the shape it promises"
    k,s,p = ksp
    torch.manual_seed(0)
    x,lin = torch.randn(B, C, s*h, s*w, dtype=torch.double),nn.Linear(C*k*k, 5).double()
    t = SoftSplit(k, s, p)(x)
    assert t.shape==(B, h*w, C*k*k)
    conv = F.conv2d(x, lin.weight.view(5, C, k, k), lin.bias, stride=s, padding=p)
    assert conv.shape==(B, 5, h, w)
    torch.testing.assert_close(lin(t), to_tokens(conv))

@few
@given(ksp=split_sizes, h=st.integers(1,4), w=st.integers(1,4))
def test_fold_undoes_the_split(ksp, h, w):
    "Folded, each cell comes back once for each copy"
    k,s,p = ksp
    torch.manual_seed(0)
    split,x = SoftSplit(k, s, p),torch.randn(2, 3, s*h, s*w, dtype=torch.double)
    back = lambda x: F.fold(split(x).mT, x.shape[-2:], k, padding=p, stride=s)
    copies = back(torch.ones_like(x))
    assert torch.equal(copies, copies.round())
    torch.testing.assert_close(back(x), x*copies)

def test_soft_split_refuses():
    for k,s,p in ((7,4,0), (7,4,4), (3,2,0), (3,2,2), (2,1,2)):
        with pytest.raises(ValueError, match=f'kernel {k}, stride {s}, padding {p}'): SoftSplit(k, s, p)
    with pytest.raises(ValueError, match='31 x 32.*32 x 32'): SoftSplit(7, 4, 2)(torch.zeros(1,3,31,32))

# --- the performer

def draw(m, d):
    "Orthogonal in blocks, with the lengths of normal vectors: unbiased"
    return torch.cat([nn.init.orthogonal_(torch.empty(d, d))*torch.randn(d, d).norm(dim=1, keepdim=True) for _ in range(0, m, d)])[:m].double()

def short(length=.6, N=40, d=16):
    q,k = length*F.normalize(torch.randn(2, N, d, dtype=torch.double), dim=-1)
    return q,k,torch.randn(N, d, dtype=torch.double)

def test_performer_converges_to_softmax():
    "The error falls as one over the root of the number of features: a slope of -1/2 between logarithms"
    torch.manual_seed(0)
    q,k,v = short()
    soft,ms = attend(q, k, v, scale=1),[64,256,1024,4096]
    err = [np.mean([((performer_attention(q, k, v, draw(m, 16))-soft).norm()/soft.norm()).item() for _ in range(12)]) for m in ms]
    slope = np.polyfit(np.log(ms), np.log(err), 1)[0]
    assert -.58 < slope < -.42, (slope,err)
    assert err[-1] < .03

def test_released_rule_has_half_the_strength():
    "With m = d/2 directions of length sqrt(m), the mean over draws is a softmax at half strength, not at full strength"
    torch.manual_seed(0)
    q,k,v = short(1., d=64)
    w = torch.cat([orthogonal_features(32, 64).double() for _ in range(300)])
    y = performer_attention(q, k, v, w)
    off = lambda scale: ((y-attend(q, k, v, scale=scale)).norm()/y.norm()).item()
    assert 3*off(.5) < off(1), (off(.5),off(1))

@few
@given(m=st.integers(1,24), d=st.integers(1,24))
def test_features_are_orthogonal(m, d):
    torch.manual_seed(0)
    w = orthogonal_features(m, d)
    gram = w@w.T if m<=d else w.T@w
    assert w.shape==(m,d)
    torch.testing.assert_close(gram, m*torch.eye(min(m,d)), atol=1e-4, rtol=0)

@few
@given(N=st.integers(1,9), M=st.integers(1,9), m=st.integers(1,8), seed=st.integers(0,9))
def test_performer_is_a_weighted_mean(N, M, m, seed):
    "The same as with the N x M weights written out; permuting keys with their values changes nothing"
    torch.manual_seed(seed)
    q,k,v,w = (torch.randn(2, n, 6, dtype=torch.double) for n in (N,M,M,m)); w = w[0]
    sim = random_features(q, w)@random_features(k, w).mT
    assert (sim>0).all()
    y = performer_attention(q, k, v, w, eps=0)
    torch.testing.assert_close(y, sim/sim.sum(-1, keepdim=True)@v)
    p = torch.randperm(M)
    torch.testing.assert_close(performer_attention(q, k[:,p], v[:,p], w, eps=0), y)
    torch.testing.assert_close(performer_attention(0*q, 0*k, v, w, eps=0), v.mean(1, keepdim=True).expand(2,N,6))

def test_performer_counts_in_float32():
    "Also when autocast, or the whole model, is in half precision; features there exceed half precision's range"
    torch.manual_seed(0)
    w = orthogonal_features(8, 16)
    q = k = w[None]                              # as large as a feature gets for its length
    q = k = torch.cat([k, 3*F.normalize(torch.randn(1, 20, 16), dim=-1)], 1)
    v = torch.randn(1, 28, 16)
    for dtype in (torch.bfloat16, torch.half):
        lo = [t.to(dtype) for t in (q,k,v,w)]
        want = performer_attention(*[t.double() for t in lo])
        with torch.autocast('cpu', dtype=dtype):
            for got in (performer_attention(*lo), performer_attention(lo[0].float(), lo[1].float(), lo[2], lo[3].float())):
                assert got.dtype==dtype
                torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-3)
        assert performer_attention(*lo).dtype==dtype
    w = orthogonal_features(32, 64)
    peak = random_features(w, w).max()
    assert 65504 < peak < 2e6 and torch.isfinite(performer_attention(w[None], w[None], torch.randn(1,32,64), w)).all()

def test_directions_are_saved_not_trained():
    m = tiny()
    keys = [f'mixers.{i}.w' for i in (0,1)]
    assert set(keys) < set(m.state_dict()) and not set(keys) & {n for n,_ in m.named_parameters()}
    assert not torch.equal(*[m.state_dict()[k] for k in keys])
    other = tiny(seed=1)
    other.load_state_dict(m.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.eval()(x), m.eval()(x))

# --- the model

@few
@given(h=st.integers(1,3), w=st.integers(1,3), C=st.integers(1,4), tokens=st.sampled_from(['performer','transformer']), n=st.integers(1,5))
def test_shapes(h, w, C, tokens, n):
    m = tiny(img_size=(4*h,4*w), in_ch=C, tokens=tokens, num_classes=n)
    x = torch.randn(2, C, 4*h, 4*w)
    f = m.forward_features(x)
    assert f.shape==(2, 1+h*w, 24) and m.forward_head(f).shape==m(x).shape==(2,n) and m.forward_head(f, pre_logits=True).shape==(2,24)
    assert m.grid_size==(h,w) and m.pos_embed.shape==(1,1+h*w,24) and (m.total_stride,m.num_features,m.num_prefix_tokens)==(4,24,1)
    assert m.tokens_to_token(x).shape==(2, h*w, 24)

def test_grid_is_where_the_image_is():
    "A change in one corner moves that corner's token through the splits alone, on a grid that is not square; the adapter finds the grid"
    m = tiny(img_size=(16,24), token_drop=0).double()
    m.mixers = nn.ModuleList([nn.Linear(27,16),nn.Linear(144,16)]).double()
    x = torch.randn(1,3,16,24, dtype=torch.double); y = x.clone(); y[...,-1,-1] += 1
    moved = (m.tokens_to_token(y)-m.tokens_to_token(x)).abs().amax(-1)[0]>0
    assert moved.nonzero().flatten().tolist()==[23]
    bb = as_backbone(m)
    assert bb.grid(bb.forward_features(x), (16,24)).shape==(1,24,4,6)

def test_factories():
    for make in (t2t_vit_14, t2t_vit_t_14):
        m = make(num_classes=3, img_size=(32,48), depth=2, drop_path=.1, in_ch=1)
        assert m(torch.randn(1,1,32,48)).shape==(1,3) and m.grid_size==(2,3) and m.total_stride==16
        assert [b.drop_path.p for b in m.blocks]==[0,.1]
    assert t2t_vit_t_14(depth=1).mixers[0].scale==147**-.5 and t2t_vit_t_14(depth=1).mixers[1].scale==576**-.5
    for tokens in ('performer','transformer'):
        m = t2t_mini(tokens=tokens)
        assert 1e6 < sum(p.numel() for p in m.parameters()) < 3e6 and m.forward_features(torch.randn(1,3,32,32)).shape==(1,65,128)
    drops = lambda m: [d.p for d in m.modules() if isinstance(d, nn.Dropout)]
    assert drops(t2t_mini())==[.1,.1] and drops(t2t_mini(tokens='transformer'))==[0,0] and drops(t2t_mini(token_drop=.3))==[.3,.3]

def test_start():
    "Weights start as in the release: deviation 0.02, zero biases, unit norms"
    m = t2t_mini()
    for k in m.modules():
        if isinstance(k, nn.Linear): assert abs(k.weight.std()-.02) < 2e-3 and (k.bias is None or not k.bias.any())
        if isinstance(k, nn.LayerNorm): assert k.eps==1e-5 and (k.weight==1).all() and not k.bias.any()
    assert all(b.attn.qkv.bias is None for b in m.blocks) and abs(m.cls_token.std()-.02) < 5e-3

@pytest.mark.parametrize('tokens', ['performer','transformer'])
def test_dropout_where_it_was_released(tokens):
    m = tiny(tokens=tokens).train()
    x = torch.randn(2,3,32,32)
    assert torch.equal(m(x), m(x)) == (tokens=='transformer')
    assert torch.equal(m.eval()(x), m(x))

def test_every_parameter_gets_a_gradient():
    for tokens in ('performer','transformer'):
        m = tiny(tokens=tokens)
        m(torch.randn(2,3,32,32)).square().sum().backward()
        for n,p in m.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, n

def test_refuses():
    for kw,word in [(dict(tokens='convolution'),'convolution'), (dict(img_size=30),'30 x 30.*stride 4'), (dict(dim=25, heads=5),'25'), (dict(heads=5),'heads 5'),
                    (dict(drop_path=1.),'p=1.0'), (dict(splits=((3,2,0),)),'padding 0')]:
        with pytest.raises(ValueError, match=word): tiny(**kw)
    with pytest.raises(ValueError, match='230 x 224.*16.*resize to 224 x 224'): t2t_vit_14(img_size=(230,224), depth=1)
    m = tiny()
    with pytest.raises(ValueError, match=r'48 x 32.*T2T\(img_size=\(48, 32\)\)'): m(torch.randn(1,3,48,32))
    with pytest.raises(ValueError, match='33 x 32.*stride 4'): m(torch.randn(1,3,33,32))

# --- positions at other sizes

@few
@given(n=st.integers(1,40), half=st.integers(1,8))
def test_sinusoid(n, half):
    "Sines and cosines in turns, every row distinct and of the same length"
    t = sinusoid_1d(n, 2*half)
    i,j = n-1,half-1
    assert t.shape==(n,2*half)
    torch.testing.assert_close(t[i,2*j:2*j+2], torch.tensor([math.sin(i/10000**(2*j/(2*half))),math.cos(i/10000**(2*j/(2*half)))]))
    torch.testing.assert_close(t.square().sum(1), torch.full((n,), float(half)))
    with pytest.raises(ValueError, match='must be even'): sinusoid_1d(n, 2*half+1)

def cubic(ys, x):
    "Cubic convolution with a = -0.75 at place x, ends repeated: what bicubic is along one axis"
    a,i = -.75,math.floor(x)
    def weight(t):
        t = abs(t)
        return (a+2)*t**3-(a+3)*t**2+1 if t<=1 else a*(t**3-5*t**2+8*t-4) if t<2 else 0.
    return sum(weight(x-j)*ys[min(max(j, 0), len(ys)-1)] for j in range(i-1, i+3))

@few
@given(h=st.integers(1,4), w=st.integers(1,4), H=st.integers(1,6), W=st.integers(1,6))
def test_resize_pos(h, w, H, W):
    "Loads into a model of the new size; the class token's and all other weights stay; a table that varies along one axis still does"
    m,big = tiny(img_size=(4*h,4*w), depth=1),tiny(seed=1, img_size=(4*H,4*W), depth=1)
    sd = m.state_dict()
    old = sd['pos_embed'].clone()
    sd['pos_embed'] = torch.cat([old[:,:1], torch.arange(h).float().repeat_interleave(w)[None,:,None].expand(1,h*w,24)], 1)
    before = sd['pos_embed'].clone()
    new = t2t_resize_pos(sd, (h,w), (H,W))
    big.load_state_dict(new)
    assert torch.equal(sd['pos_embed'], before) and all(torch.equal(new[k], sd[k]) for k in sd if k!='pos_embed')
    assert torch.equal(new['pos_embed'][:,:1], old[:,:1])
    rows = to_grid(new['pos_embed'][:,1:], H, W)
    torch.testing.assert_close(rows, rows[...,:1].expand_as(rows))
    if (h,w)==(H,W): assert torch.equal(new['pos_embed'], before)
    torch.testing.assert_close(rows[0,0,:,0], torch.tensor([cubic(list(range(h)), (i+.5)*h/H-.5) for i in range(H)]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='old_hw'): t2t_resize_pos(sd, (h+1,w), (H,W))

# --- where it has to run

kinds = pytest.mark.parametrize('tokens', ['performer','transformer'])

@kinds
def test_compiles_whole(tokens):
    "In training, with the same numbers dropped; evaluation is compiled below"
    m,x = tiny(tokens=tokens, drop_path=.2, token_drop=0.).train(),torch.randn(2,3,32,32)
    c = torch.compile(m, backend='aot_eager', fullgraph=True)
    grads = []
    for f in (m,c):
        m.zero_grad(); torch.manual_seed(3)
        f(x).square().sum().backward()
        grads.append({n:p.grad.clone() for n,p in m.named_parameters()})
    for n in grads[0]: torch.testing.assert_close(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-5, msg=n)

@pytest.mark.parametrize('tokens,whole', [('performer',False), ('transformer',False), ('performer',True)])
def test_bfloat16(tokens, whole):
    "Autocast and, compiled, autocast: finite, and near float32 (a transformer's blocks, compiled, stand in the performer's network, too)"
    m,x = t2t_mini(tokens=tokens, depth=1).eval(),torch.randn(2,3,32,32)
    want = m(x)
    f = torch.compile(m, backend='aot_eager', fullgraph=True) if whole else m
    with torch.autocast('cpu', dtype=torch.bfloat16): got = f(x)
    assert torch.isfinite(got).all() and (got-want).abs().max() < .05*want.abs().max()
    got.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())

@kinds
def test_channels_last(tokens):
    m,x = tiny(tokens=tokens).eval(),torch.randn(2,3,32,32)
    want = m(x)
    torch.testing.assert_close(m.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), want)

def test_attention_operands_are_contiguous():
    for t in TokenTransformer(27).split(torch.randn(2,5,27)): assert t.is_contiguous() and t.shape==(2,5,64)

@kinds
def test_float64(tokens):
    "In double precision all of it is: float32 differs from it by float32's rounding only"
    m,x = tiny(tokens=tokens).eval(),torch.randn(2,3,32,32)
    lo,hi = m(x),m.double()(x.double())
    assert hi.dtype==torch.double and (lo-hi).abs().max() < 1e-5*hi.abs().max() and (lo-hi).abs().max() > 0

@kinds
def test_onnx(tokens, tmp_path):
    ort = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    m,x = t2t_mini(tokens=tokens, depth=1).eval(),torch.randn(2,3,32,32)
    torch.onnx.export(m, (x,), str(tmp_path/'m.onnx'), dynamo=True, verbose=False)
    s = ort.InferenceSession(str(tmp_path/'m.onnx'), providers=['CPUExecutionProvider'])
    got = s.run(None, {s.get_inputs()[0].name:x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), m(x), rtol=1e-4, atol=1e-5)
