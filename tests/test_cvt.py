"Both CvT-13s, each against the code that it stands for, and their properties"
import json, math, re, zlib
from functools import cache
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings, strategies as st
from torch import nn
from vt_drloc.attention import attend
from vt_drloc.hybrid import ConvAttention, ConvBlock, ConvProjection, CvT, as_backbone, cvt_mini
from vt_drloc.tokens import to_grid
from vt_drloc.vit import Mlp
from vt_drloc.cvt import *

gold = json.loads((Path(__file__).parent/'golden/cvt_gap.json').read_text())
minis = [cvt_13_mini, cvt_13_gap_mini]
tiny = dict(dims=(8,12,16), depths=(1,1,2), heads=(1,3,2), kernels=(7,3,3), strides=(4,2,2), kv_strides=(2,2,2))
both = pytest.mark.parametrize('build', [CvTToken, CvTGap])
few = settings(max_examples=12, deadline=None, derandomize=True)
tol = {torch.float32:(1e-5,1e-4), torch.float64:(1e-10,1e-10)}       # values, gradients

def count(m): return sum(p.numel() for p in m.parameters())
def small(build, **kw):
    torch.manual_seed(0)
    return build(**{**tiny, **kw})
def apart(a, b, scale=None):
    "Largest difference, relative to the largest value of `b`"
    assert a.shape==b.shape
    return ((a-b).abs().max()/(b.abs().max() if scale is None else scale)).item()
def grid_of(m, f, hw): return as_backbone(m).grid(f, hw)

def seeded(name, shape):
    "The tensor of this name as the golden numbers' makers drew it"
    rng = np.random.default_rng([gold['seed'], zlib.crc32(name.encode())])
    leaf = name.split('.')[-1]
    if leaf=='num_batches_tracked': return torch.tensor(7)
    if leaf=='running_var': a = rng.uniform(.5, 1.5, shape)
    else:
        a = rng.standard_normal(shape)
        if leaf=='g' or leaf=='weight' and len(shape)==1: a = 1+.2*a
        elif leaf in ('bias','b','running_mean'): a = .2*a
        elif leaf=='weight': a = a/np.prod(shape[1:])**.5
    return torch.from_numpy(a.astype(np.float32))

# --- cvt_13 against transformers

@cache
def theirs():
    from transformers import CvtConfig, CvtForImageClassification
    m = CvtForImageClassification(CvtConfig(num_labels=10, drop_path_rate=(0.,0.,0.)))
    m.load_state_dict({n:seeded(n, t.shape) for n,t in m.state_dict().items()})
    return m

def hf_run(m, x):
    "Logits and the grid before the last norm"
    out = m.cvt(x)
    return m.classifier(m.layernorm(out.cls_token_value).mean(1)),out.last_hidden_state

def our_run(m, x):
    f = m.forward_features(x)
    return m.forward_head(f),grid_of(m, f, x.shape[-2:])

def loss_of(logits, grid):
    torch.manual_seed(2)
    return (logits*torch.randn(logits.shape).to(logits)).sum() + 100*(grid*torch.randn(grid.shape).to(grid)).mean()

@pytest.mark.parametrize('B,H,W,train,dtype', [(2,112,80,False,torch.double), (2,96,128,False,torch.double), (2,64,80,True,torch.double), (2,64,80,True,torch.float), (2,64,80,False,torch.float)])
def test_transformers(B, H, W, train, dtype):
    """All weights, biases, norms and BatchNorm statistics random: logits, grid, every gradient, updated statistics.
    Two images: with one, in transformers' memory layout, torch 2.15 on the CPU gives BatchNorm in evaluation a gradient that
    finite differences contradict"""
    from copy import deepcopy
    t,m = deepcopy(theirs()).to(dtype).train(train),cvt_13().to(dtype).train(train)
    m.load_state_dict(cvt_from_transformers(t.state_dict()))
    torch.manual_seed(1)
    x = torch.randn(B, 3, H, W, dtype=torch.double).to(dtype)
    (a,f),(b,g) = our_run(m, x),hf_run(t, x)
    near,near_grad = tol[dtype]
    assert g.shape==(B,384,H//16,W//16) and b.std()>.1 and g.std()>.1     # the agreement is about numbers that differ
    assert apart(a, b)<near and apart(f, g)<near
    if not train: torch.testing.assert_close(t(x).logits, b)              # `hf_run` is what their forward does
    loss_of(a, f).backward(); loss_of(b, g).backward()
    want = cvt_from_transformers({n:p.grad for n,p in t.named_parameters()})
    got = {n:p.grad for n,p in m.named_parameters()}
    assert got.keys()==want.keys()
    top = max(w.abs().max() for w in want.values())
    assert max(apart(got[n], w, top) for n,w in want.items())<near_grad
    if train:
        new = cvt_from_transformers(t.state_dict())
        for n,v in m.state_dict().items():
            if 'running' in n or 'num_batches' in n: assert apart(v.double(), new[n].double())<near

def test_config_is_the_published_one():
    "transformers' default configuration has the values of the authors' cvt-13-224x224.yaml"
    c = theirs().config
    want = dict(patch_sizes=(7,3,3), patch_stride=(4,2,2), patch_padding=(2,1,1), embed_dim=(64,192,384), num_heads=(1,3,6), depth=(1,2,10),
                mlp_ratio=(4.,4.,4.), qkv_bias=(True,)*3, cls_token=(False,False,True), qkv_projection_method=('dw_bn',)*3, kernel_qkv=(3,3,3),
                padding_q=(1,1,1), stride_q=(1,1,1), padding_kv=(1,1,1), stride_kv=(2,2,2), attention_drop_rate=(0.,)*3, drop_rate=(0.,)*3)
    assert {k:tuple(getattr(c, k)) for k in want}==want

def test_from_transformers_is_strict():
    sd = dict(theirs().state_dict())
    with pytest.raises(ValueError, match="'cvt.pooler.weight' is no tensor"): cvt_from_transformers({**sd, 'cvt.pooler.weight':torch.ones(1)})
    with pytest.raises(ValueError, match='is no tensor of the released CvT'): cvt_gap_from_release(sd)
    with pytest.raises(ValueError, match="is no tensor of transformers'"): cvt_from_transformers(cvt_mini().state_dict())
    sd.pop('cvt.encoder.stages.2.cls_token')
    with pytest.raises(RuntimeError, match='Missing key.*stages.2.cls_token'): cvt_13().load_state_dict(cvt_from_transformers(sd))

# --- against numbers that other code gave

@pytest.mark.parametrize('case', gold['authors']['cases'], ids=lambda c: 'x'.join(map(str, c['image'])))
def test_authors_code(case):
    "With QuickGELU, the authors' own code, to the last digits of double precision"
    m = cvt_13(act='quick_gelu').eval().requires_grad_(False)
    m.load_state_dict({n:seeded(n, t.shape) for n,t in m.state_dict().items()})
    B,_,H,W = case['image']
    f = m.double().forward_features(seeded(f'image {B} {H} {W}', case['image']).double())
    assert apart(m.forward_head(f).flatten(), torch.tensor(case['logits'], dtype=torch.double))<1e-10
    assert apart(f[-1,1:,383], torch.tensor(case['grid_channel'], dtype=torch.double), case['grid_absmax'])<1e-10

@cache
def released_weights(): return {n:seeded(n, s) for n,s in gold['parameters'].items()}

def released_view(grads):
    "Our gradients under the released names, in the released shapes"
    named = cvt_gap_from_release({n:torch.full(s, float(i)) for i,(n,s) in enumerate(gold['parameters'].items()) if n in gold['cases'][0]['grad_probes']})
    names = list(gold['parameters'])
    of = {names[int(v.flatten()[0])]:n for n,v in named.items()}
    return {theirs:grads[ours].reshape(gold['parameters'][theirs]) for theirs,ours in of.items()}

@pytest.mark.parametrize('case', gold['cases'], ids=lambda c: f"{'x'.join(map(str, c['image']))}-{'train' if c['train'] else 'eval'}-{c['dtype']}")
def test_released_code(case):
    "The network that the paper ran: logits, final grid, gradients, updated statistics"
    dtype = getattr(torch, case['dtype'])
    near,near_grad = tol[dtype]
    T = lambda v: torch.tensor(v, dtype=dtype)
    m = cvt_13_gap().train(case['train'])
    m.load_state_dict(cvt_gap_from_release(released_weights()))
    m.to(dtype)
    B,_,H,W = case['image']
    logits,grid = our_run(m, seeded(f'image {B} {H} {W}', case['image']).to(dtype))
    assert list(grid.shape)==case['grid_shape']
    top = case['grid_absmax']
    assert apart(logits.flatten(), T(case['logits']))<near
    assert apart(grid[0,[0,383]].flatten(), T(case['grid_channels']), top)<near
    assert apart(grid.sum(1)[-1].flatten(), T(case['grid_sum']), 384**.5*top)<near
    assert apart(grid.std(), T(case['grid_std']))<near and apart(grid.abs().max(), T(top))<near
    (logits*seeded(f'logits {B}', logits.shape).to(dtype)).sum().add(100*(grid*seeded(f'grid {B} {H} {W}', grid.shape).to(dtype)).mean()).backward()
    grads = released_view({n:p.grad for n,p in m.named_parameters()})
    for n,want in case['grads'].items(): assert apart(grads[n].flatten()[:8], T(want), case['grad_absmax'])<near_grad, n
    for n,want in case.get('grad_probes', {}).items():
        got = (grads[n]*seeded('probe '+n, grads[n].shape).to(dtype)).sum()
        assert apart(got, T(want), max(grads[n].norm().item(), 1e-3))<near_grad, n
    if case['train']:
        now = m.state_dict()
        ours = {'layers.0.2.layers.0.0.fn.to_q.net.1.running_mean':'stages.0.1.attn.q.norm.running_mean',
                'layers.2.2.layers.9.0.fn.to_kv.net.1.running_var':'stages.2.10.attn.kv.norm.running_var'}
        for n,want in case['running'].items(): assert apart(now[ours[n]][:8], T(want))<near

def test_golden_numbers_name_their_source():
    for g in (gold,gold['authors']): assert re.fullmatch('[0-9a-f]{40}', g['revision']) and g['repository'].startswith('https://github.com/')
    assert all(set(c['grad_probes'])==set(gold['cases'][0]['grad_probes']) for c in gold['cases'] if c['dtype']=='float64')
    assert sum(math.prod(gold['parameters'][n]) for n in gold['cases'][0]['grad_probes'])==count(cvt_13_gap())

def test_from_release_drops_the_side_task():
    sd = {**released_weights(), 'drloc.0.layers.0.weight':torch.ones(512,768)}
    cvt_13_gap().load_state_dict(cvt_gap_from_release(sd))

# --- the parts

@pytest.mark.parametrize('prefix', [0,1])
def test_attention_is_the_formula(prefix):
    "Against plain matrices: the class token goes around convolution and BatchNorm, the scale is that of D"
    torch.manual_seed(0)
    a = CvTAttention(12, heads=3).double().eval()
    for n,t in a.state_dict().items():
        if t.dtype==torch.double: t.copy_(torch.rand(t.shape)+.5)
    x = torch.randn(2, prefix+20, 12).double()
    grid = rearrange(x[:,prefix:], 'b (h w) d -> b d h w', h=4)
    def tokens(p):
        t = torch.cat([x[:,:prefix], rearrange(p.norm(p.conv(grid)), 'b d h w -> b (h w) d')], 1)
        return rearrange(t @ p.proj.weight.T + p.proj.bias, 'b t (n d) -> b n t d', n=3)
    want = attend(*map(tokens, (a.q,a.k,a.v)), scale=12**-.5)
    want = rearrange(want, 'b n t d -> b t (n d)') @ a.proj.weight.T + a.proj.bias
    assert apart(a(x, 4, 5), want)<1e-12

@given(st.integers(1,9), st.integers(2,40), st.floats(1e-7, 1e3))
@few
def test_channel_norm_is_the_formula(n, dim, sigma):
    torch.manual_seed(n)
    norm = ChannelNorm(dim, eps=1e-3).double()
    nn.init.normal_(norm.weight); nn.init.normal_(norm.bias)
    x = sigma*torch.randn(n, dim).double() + 1
    want = (x-x.mean(1, keepdim=True))/(x.var(1, correction=0, keepdim=True).sqrt()+1e-3)*norm.weight + norm.bias
    torch.testing.assert_close(norm(x), want, rtol=1e-8, atol=1e-8)

def test_channel_norm_of_a_constant_token():
    x = torch.full((2,16), 3., requires_grad=True)
    norm = ChannelNorm(16)
    norm(x).sum().backward()
    assert x.grad.isfinite().all() and (norm(x)==0).all()
    assert small(CvTGap)(torch.zeros(2,3,32,32)).isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_channel_norm_keeps_the_dtype_of_its_weights(dtype):
    assert ChannelNorm(16).to(dtype)(torch.randn(2,16).to(dtype)).dtype==dtype

def test_channel_norm_works_in_float32_on_half():
    x = torch.randn(64,16).bfloat16()*1e-3
    assert apart(ChannelNorm(16)(x), ChannelNorm(16)(x.float()))==0

@pytest.mark.parametrize('kernel,stride', [(7,4),(3,2),(5,2),(3,1),(5,4)])
def test_embed_padding(kernel, stride):
    "Every padding that is let through gives H/stride rows; the others would not"
    for p in range(kernel):
        rows = {H:(H+2*p-kernel)//stride+1 for H in (8*stride, 9*stride)}
        if all(r==H//stride for H,r in rows.items()): assert CvTEmbed(3, 4, kernel, stride, p)(torch.randn(1,3,8*stride,9*stride)).shape==(1,4,8,9)
        else:
            with pytest.raises(ValueError, match=f'padding {p} with kernel {kernel} and stride {stride}'): CvTEmbed(3, 4, kernel, stride, p)

def test_blocks_of_the_gap_are_chapter_4s():
    "CvTGap is CvT but for the norms and what is left out"
    m = cvt_13_gap_mini()
    assert not any(isinstance(c, nn.LayerNorm) for c in m.modules()) and isinstance(m.norm, nn.Identity)
    assert all(p.proj.bias is None for p in m.modules() if isinstance(p, ConvProjection))
    assert all(a.proj.bias is not None for a in m.modules() if isinstance(a, ConvAttention))
    assert count(cvt_mini())-count(m)==sum(3*b.attn.proj.in_features for b in m.modules() if isinstance(b, ConvBlock)) + 2*128

@both
def test_gradient_of_one_image(build):
    "A batch of one has ambiguous strides: its gradients against those within a batch of two, and against finite differences"
    m = small(build).double().eval()
    torch.manual_seed(1)
    x,r,d = torch.randn(2,3,48,32).double(),torch.randn(2,10).double(),torch.randn(1,3,48,32).double()
    def grad(x, r):
        x = x.clone().requires_grad_()
        return torch.autograd.grad((m(x)*r).sum(), [x])[0]
    one = grad(x[:1], r[:1])
    assert apart(one, grad(x, r)[:1])<1e-10
    with torch.no_grad(): slope = ((m(x[:1]+1e-5*d)-m(x[:1]-1e-5*d))*r[:1]).sum()/2e-5
    torch.testing.assert_close((one*d).sum(), slope, rtol=1e-5, atol=1e-8)

# --- sizes, features, grid

def test_parameters():
    assert (count(cvt_13()),count(cvt_13_gap()))==(19_616_330,19_555_146)
    assert count(cvt_13(num_classes=1000))==count(theirs())+990*385
    assert all(1e6<count(m())<3e6 for m in minis)

def test_contract():
    x = torch.randn(2,3,32,48)
    a,b = small(CvTToken).eval(),small(CvTGap).eval()
    assert (a.num_prefix_tokens,b.num_prefix_tokens,a.num_features,b.num_features)==(1,0,16,16)
    assert a.total_stride==b.total_stride==16 and b.output_fmt=='NCHW'
    f,g = a.forward_features(x),b.forward_features(x)
    assert f.shape==(2,1+6,16) and g.shape==(2,16,2,3)
    for m,o in ((a,f),(b,g)):
        torch.testing.assert_close(m.forward_head(o), m(x))
        assert m.forward_head(o, pre_logits=True).shape==(2,16)
    torch.testing.assert_close(a.forward_head(f, pre_logits=True), F.layer_norm(f[:,0], (16,), a.norm.weight, a.norm.bias))
    torch.testing.assert_close(b.forward_head(g, pre_logits=True), g.mean((2,3)))
    h = torch.cat([f[:,:1], torch.randn(2,6,16)], 1)
    torch.testing.assert_close(a.forward_head(h), a(x))                   # the head sees the class token alone

@pytest.mark.parametrize('build', minis)
def test_minis(build):
    m = build(num_classes=7).eval()
    x = torch.randn(2,3,32,32)
    f = m.forward_features(x)
    assert m(x).shape==(2,7) and grid_of(m, f, (32,32)).shape==(2,128,8,8)

@both
@given(st.integers(1,5), st.integers(1,5), st.integers(1,3), st.sampled_from([1,3,4]))
@few
def test_any_multiple_of_the_stride(build, h, w, B, C):
    "The grid is H/16 x W/16, and each image is computed by itself"
    m = small(build, in_ch=C, num_classes=3).double().eval()
    x = torch.randn(B,C,16*h,16*w).double()
    f = m.forward_features(x)
    assert f.shape==((B,1+h*w,16) if build is CvTToken else (B,16,h,w)) and m(x).shape==(B,3)
    assert grid_of(m, f, x.shape[-2:]).shape==(B,16,h,w)
    torch.testing.assert_close(m(x[-1:]), m(x)[-1:])

@both
def test_every_tap_gives_a_grid(build):
    "stages.S after each stage, stages.S.J after each block, under the same names in both networks"
    m,x = small(build).eval(),torch.randn(2,3,64,32)
    for s,(D,n) in enumerate(zip(tiny['dims'], tiny['depths'])):
        for tap in [f'stages.{s}']+[f'stages.{s}.{j+1}' for j in range(n)]:
            ad = as_backbone(m, tap=tap)
            assert ad.grid(ad.forward_features(x), (64,32)).shape==(2,D,16>>s,8>>s)
    final = grid_of(m, m.forward_features(x), (64,32))
    torch.testing.assert_close(as_backbone(m, tap='stages.2.2').grid(as_backbone(m, tap='stages.2.2').forward_features(x), (64,32)), final)

@both
@pytest.mark.parametrize('hw', [(30,32),(32,40)])
def test_wrong_size(build, hw):
    with pytest.raises(ValueError, match=rf'{hw[0]} x {hw[1]}.*multiple of the total stride 16'): small(build)(torch.randn(1,3,*hw))
    with pytest.raises(ValueError, match='multiple of the total stride 16'): small(build, img_size=hw)

@both
def test_img_size_fits(build):
    for s in (32,(32,48)): assert small(build, img_size=s)(torch.randn(1,3,48,32)).shape==(1,10)

@both
@pytest.mark.parametrize('kw,match', [(dict(heads=(1,3,3)), '16.*heads 3'), (dict(depths=(1,2)), 'one entry a stage'),
                                      (dict(drop_path=1.), 'drop path p=1.0')])
def test_bad_options(build, kw, match):
    with pytest.raises(ValueError, match=match): small(build, **kw)

def test_bad_options_of_the_token_net():
    with pytest.raises(ValueError, match="act='relu'"): small(CvTToken, act='relu')
    with pytest.raises(ValueError, match='padding 1 with kernel 7'): small(CvTToken, paddings=(1,1,1))

@both
@pytest.mark.parametrize('train', [False,True])
def test_zero_padding_leaks_position(build, train):
    "A constant image: with zeros the cells differ, with the other paddings they do not; double precision, for BatchNorm magnifies rounding"
    x = torch.rand(4,3,1,1).double().expand(4,3,64,96)
    for mode in ('zeros','reflect','replicate','circular'):
        m = small(build, padding_mode=mode).double().train(train)
        g = grid_of(m, m.forward_features(x), (64,96))
        spread = apart(g, g[...,1:2,1:2].expand_as(g))
        assert spread>1e-2 if mode=='zeros' else spread<1e-8, mode

# --- training

def test_initial_weights():
    "The authors: normal, deviation 0.02, biases 0. The re-implementation: PyTorch's own, uniform"
    for n,p in cvt_13_mini().named_parameters():
        if n.endswith(('proj.weight','fc1.weight','fc2.weight','head.weight','cls_token')) and '.0.proj' not in n:
            assert abs(p.std()/.02-1)<(.25 if 'cls' in n else .05), n
        if n.endswith(('attn.proj.bias','fc1.bias','fc2.bias','head.bias','q.proj.bias')): assert (p==0).all(), n
    for n,m in cvt_13_gap_mini().named_modules():
        if isinstance(m, nn.Linear):
            top = m.in_features**-.5
            assert m.weight.abs().max()<=top and abs(m.weight.std()*3**.5/top-1)<.05, n
            if m.bias is not None: assert 0<m.bias.abs().max()<=top, n

def test_drop_path_of_the_authors():
    "0 in the first stages, then rising from 0"
    rates = [round(b.drop_path.p, 4) for b in cvt_13(drop_path=.1).modules() if isinstance(b, CvTBlock)]
    assert rates==[0,0,0]+[round(.1*i/9, 4) for i in range(10)]

def test_drop_path_keeps_the_residual():
    torch.manual_seed(0)
    b,x = CvTBlock(8, drop_path=.9).train(),torch.randn(64,5,8)
    same = (b(x,(2,2))==x).all((1,2))
    assert 40<same.sum()<64

@both
def test_gradients_reach_every_parameter(build):
    m = small(build, drop_path=.1).train()
    (m(torch.randn(4,3,32,32)).square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())

def test_classification_reaches_the_final_cells_only_by_pooling():
    for build,reached in ((CvTToken,False),(CvTGap,True)):
        m = small(build).eval()
        f = m.forward_features(torch.randn(2,3,32,32)).detach().requires_grad_()
        m.forward_head(f).square().sum().backward()
        assert (grid_of(m, f.grad, (32,32)).abs().max()>0)==reached

# --- compiled, half precision, memory, export

@pytest.mark.parametrize('build,train', [(CvTGap,False), (CvTGap,True), (CvTToken,True)])
def test_compile_fullgraph(build, train):
    "Two stages of one block, with drop path in training: each block more takes a second to trace, and the same lines"
    own = dict(paddings=(2,1), depths=(1,1+train)) if build is CvTToken else dict(depths=(1,1))     # its drop path begins with the last stage's second block
    two = {k: v[:2] for k,v in tiny.items()} | dict(drop_path=.5, **own)
    a,b = (small(build, **two).train(train) for _ in range(2))
    x = torch.randn(4,3,16,24)
    with torch.set_grad_enabled(train):                                     # judging needs no way back
        torch.manual_seed(1); y = a(x)
        torch.manual_seed(1); z = torch.compile(b, fullgraph=True, backend='aot_eager')(x)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    if not train: return
    y.square().sum().backward(); z.square().sum().backward()
    for (n,p),q in zip(a.named_parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=n)
    for (n,p),q in zip(a.named_buffers(), b.buffers()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=n)

@pytest.mark.parametrize('build', minis)
def test_bf16_autocast(build):
    torch.manual_seed(0)
    m = build().train()
    x = torch.randn(4,3,32,32)
    want = m(x)
    with torch.autocast('cpu', torch.bfloat16): y = m(x)
    assert apart(y.float(), want)<.1
    y.float().square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())

@both
def test_channels_last(build):
    m = small(build).eval()
    x = torch.randn(2,3,64,32)
    y = m(x)
    torch.testing.assert_close(m.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-5)

@both
def test_no_needless_copies(build, monkeypatch):
    "Grids stay channels-last in memory, tokens and grid are views of each other, and attention gets contiguous q, k and v"
    m,seen,stages = small(build).eval(),[],[]
    fast = F.scaled_dot_product_attention
    def spy(q, k, v, **kw):
        seen.extend(t.is_contiguous() for t in (q,k,v))
        return fast(q, k, v, **kw)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    for s in m.stages: s.register_forward_hook(lambda mod,i,o: stages.append(o))
    m(torch.randn(2,3,64,96))
    assert len(seen)==3*4 and all(seen)
    assert all(g.is_contiguous(memory_format=torch.channels_last) if g.ndim==4 else g.is_contiguous() for g in stages)

@pytest.mark.parametrize('build', minis)
def test_onnx(build, tmp_path):
    import onnxruntime
    torch.manual_seed(0)
    m,x = build(depths=(1,1)).eval(),torch.randn(2,3,32,32)
    for n,t in m.state_dict().items():
        if 'running_var' in n: t.uniform_(.5, 1.5)
        elif 'running_mean' in n: t.normal_(0, .2)
    torch.onnx.export(m, (x,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    s = onnxruntime.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    y, = s.run(None, {s.get_inputs()[0].name:x.numpy()})
    assert apart(torch.tensor(y), m(x))<1e-4
