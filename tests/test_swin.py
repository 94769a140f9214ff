"Swin against torchvision and timm, to the last digit, and its properties"
import copy, io, pickle
import pytest, timm, torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, swin_t as tv_swin_t, swin_v2_t
from torchvision.models.swin_transformer import SwinTransformer
from hypothesis import given, settings, strategies as st
from vt_drloc.attention import Attention
from vt_drloc.hybrid import as_backbone, features_to_grid
from vt_drloc.callback import GridTap
from vt_drloc import swin as mod
from vt_drloc.swin import *

few = settings(max_examples=15, deadline=None, derandomize=True)
side = st.integers(1, 4)
tiny = dict(dims=(12,24), depths=(2,3), heads=(2,3), patch=2, window=4)

def scrambled(model, seed=0):
    "Every parameter random, so that no zero bias, unit scale or small table can hide a mistake"
    g = torch.Generator().manual_seed(seed)
    for n,p in model.named_parameters():
        r = torch.randn(p.shape, generator=g)
        with torch.no_grad():
            if   'table' in n: p.copy_(r)
            elif p.ndim==1: p.copy_(.2*r + float('norm' in n and n.endswith('weight')))
            else: p.copy_(r*p[0].numel()**-.5)
    return model.eval()

def small(seed=0, **kw): return scrambled(Swin(**{**tiny, **kw}), seed)

def gap(a, b): return ((a-b).abs().max()/b.abs().max()).item()
def photo(H, W, B=1, dtype=torch.float): return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(H+W)).to(dtype)

# --- exactness

def tv_grid(m, x): return m.norm(m.features(x))
def timm_grid(m, x): return m.forward_features(x)

def timm_swin(**kw): return timm.create_model('swin_tiny_patch4_window7_224', num_classes=7, **kw)

def beside(ours, tv, tm):
    "Per package: its network and ours, made by `ours`, with its weights"
    tv,tm = scrambled(tv, 1),scrambled(tm, 2)
    one,two = ours().eval(),ours().eval()
    one.load_state_dict(swin_from_torchvision(tv.state_dict()), strict=True)
    two.load_state_dict(swin_from_timm(tm.state_dict()), strict=True)
    return dict(torchvision=(one,tv,tv_grid), timm=(two,tm,timm_grid))

@pytest.fixture(scope='module')
def pairs(): return beside(lambda: swin_t(7), tv_swin_t(num_classes=7), timm_swin())

narrow = dict(depths=(2,2,2,2), num_heads=(1,2,4,8))                        # heads of 16 numbers

@pytest.fixture(scope='module')
def narrow_pairs():
    "Swin-T's four grids and windows in a narrow network: what the size of an image changes needs no width"
    return beside(lambda: swin_t(7, dims=(16,32,64,128), depths=(2,2,2,2), heads=(1,2,4,8)),
                  SwinTransformer([4,4], 16, [2,2,2,2], [1,2,4,8], [7,7], num_classes=7), timm_swin(embed_dim=16, **narrow))

def of_size(pair, H, W, dtype):
    "The pair in another precision; timm's is built for one size"
    ours,theirs,grid = pair
    if isinstance(theirs, timm.models.swin_transformer.SwinTransformer) and (H,W)!=(224,224):
        sized = timm_swin(img_size=(H,W), **(dict(embed_dim=16, **narrow) if theirs.num_features==128 else {})).eval()
        sized.load_state_dict(theirs.state_dict())
        theirs = sized
    return ours.to(dtype),theirs.to(dtype),grid

def our_names(grads, package): return (swin_from_timm if package=='timm' else swin_from_torchvision)(grads)

def check_forward(pair, H, W, dtype):
    ours,theirs,grid = of_size(pair, H, W, dtype)
    x,tol = photo(H, W, dtype=dtype),1e-10 if dtype==torch.double else 1e-5
    with torch.no_grad(): f,g = ours.forward_features(x),grid(theirs, x)
    assert f.shape==g.shape and gap(f, g)<tol
    with torch.no_grad(): a,b = ours.forward_head(f),theirs.head(g) if grid is timm_grid else theirs.head(g.mean((1,2)))
    assert gap(a, b)<tol and b.std()>.05*b.abs().max()
    assert (g-g.mean((1,2), keepdim=True)).abs().max()>.1    # the cells differ, so a misplaced one would show

def check_gradients(pair, package, H, W, dtype):
    "Logits and the gradient of every parameter and of the image"
    ours,theirs,_ = of_size(pair, H, W, dtype)
    tol,grads,logits = (1e-10,1e-10) if dtype==torch.double else (1e-5,1e-4),[],[]
    for m in (ours,theirs):
        m.zero_grad(set_to_none=True)
        x = photo(H, W, dtype=dtype).requires_grad_()
        out = m(x)
        F.cross_entropy(out, torch.tensor([3])).backward()
        logits.append(out.detach())
        grads.append({**{n:p.grad for n,p in m.named_parameters()}})
        grads[-1]['image'] = x.grad
        m.zero_grad(set_to_none=True)
    image = grads[0].pop('image'),grads[1].pop('image')
    b = our_names(grads[1], package)
    assert gap(*logits)<tol[0] and gap(*image)<tol[1] and grads[0].keys()==b.keys()
    for n,g in grads[0].items():
        assert g is not None and b[n].abs().max()>0, n
        if n.endswith('qkv.bias'):           # the gradient of the keys' bias is zero but for rounding: a softmax does not see it
            D = len(g)//3
            assert g[D:2*D].abs().max() < tol[1]*g.abs().max()
        assert gap(g, b[n])<tol[1], (n, gap(g, b[n]))

@pytest.mark.parametrize('dtype', [torch.float,torch.double])
@pytest.mark.parametrize('package', ['torchvision','timm'])
def test_exact_at_224(pairs, package, dtype):
    check_forward(pairs[package], 224, 224, dtype)
    if dtype==torch.double: check_gradients(pairs[package], package, 224, 224, dtype)       # to 1e-10; below, rounding would hide what it finds

@pytest.mark.parametrize('package', ['torchvision','timm'])
@pytest.mark.parametrize('H,W', [(224,448),(448,448)])
def test_exact_at_multiples_of_224(narrow_pairs, package, H, W):
    check_forward(narrow_pairs[package], H, W, torch.double)

def test_exact_gradients_where_one_axis_is_one_window(narrow_pairs):
    for package,pair in narrow_pairs.items(): check_gradients(pair, package, 224, 448, torch.double)

@pytest.mark.parametrize('H,W', [(96,128),(128,128),(32,96)])
def test_pads_like_torchvision(narrow_pairs, H, W):
    "Also where a grid is smaller than a window"
    for dtype in (torch.float,torch.double): check_forward(narrow_pairs['torchvision'], H, W, dtype)
    check_gradients(narrow_pairs['torchvision'], 'torchvision', H, W, torch.double)

def test_timm_pads_otherwise(narrow_pairs):
    "The page says that timm computes something else there; this fails on the day it no longer does"
    ours,theirs,_ = of_size(narrow_pairs['timm'], 256, 256, torch.double)
    x = photo(256, 256, dtype=torch.double)
    with torch.no_grad(): assert gap(ours(x), theirs(x))>1e-3

def test_parameters_of_swin_t():
    assert sum(p.numel() for p in swin_t(1000).parameters())==28_288_354==sum(p.numel() for p in tv_swin_t().parameters())
    assert sum(p.numel() for p in swin_t().parameters())==27_527_044
    assert 1e6 < sum(p.numel() for p in swin_mini().parameters()) < 3e6

def test_starts_like_torchvision():
    "Every parameter starts with torchvision's mean and deviation"
    torch.manual_seed(0)
    theirs,ours = swin_from_torchvision(tv_swin_t().state_dict()),swin_t(1000).state_dict()
    assert theirs.keys()==ours.keys()
    for n in ours:
        torch.testing.assert_close(ours[n].std(), theirs[n].std(), rtol=.15, atol=1e-6, msg=n)
        torch.testing.assert_close(ours[n].mean(), theirs[n].mean(), rtol=.01, atol=.02, msg=n)

def test_drop_path_rises_like_timm():
    rates = lambda m,o: [float(getattr(getattr(b, o), 'p', getattr(getattr(b, o), 'drop_prob', 0.))) for s in m.layers for b in s.blocks]
    theirs = timm.create_model('swin_tiny_patch4_window7_224', drop_path_rate=.2)
    ours = rates(swin_t(drop_path=.2), 'drop_path')
    assert ours==pytest.approx([.2*i/11 for i in range(12)]) and ours==pytest.approx(rates(theirs, 'drop_path1'), abs=1e-6)
    assert not any(rates(swin_t(), 'drop_path'))

def test_converters_are_strict():
    for make in (swin_from_timm, swin_from_torchvision):
        with pytest.raises(ValueError, match='conv1.weight'): make(resnet18().state_dict())
        with pytest.raises(ValueError, match='patch embedding'): make({})
    with pytest.raises(ValueError, match='version 1.*logit_scale'): swin_from_torchvision(swin_v2_t().state_dict())
    tv,tm = tv_swin_t().state_dict(),timm.create_model('swin_tiny_patch4_window7_224').state_dict()
    with pytest.raises(ValueError, match='torchvision.*head.fc'): swin_from_torchvision(tm)
    with pytest.raises(ValueError, match='timm.*features.0.0'): swin_from_timm(tv)
    new = swin_from_torchvision(tv)
    assert list(tv)[0]=='features.0.0.weight' and all(any(v is o for o in tv.values()) for v in new.values()), "copied or changed its input"
    del new['layers.1.downsample.norm.weight']
    with pytest.raises(RuntimeError, match='downsample.norm.weight'): swin_t(1000).load_state_dict(new)

def test_converters_other_sizes():
    "The names of deeper Swins too"
    kw = dict(depths=(2,2,18,2))
    tm = timm.models.swin_transformer.SwinTransformer(embed_dim=24, num_heads=(1,2,3,4), num_classes=5, **kw)
    Swin(5, dims=(24,48,96,192), heads=(1,2,3,4), **kw).load_state_dict(swin_from_timm(tm.state_dict()))

# --- windows, masks, bias

@few
@given(B=st.integers(1,3), nh=side, nw=side, s=st.integers(1,5), D=side)
def test_window_partition_round_trip(B, nh, nw, s, D):
    x = torch.arange(B*nh*nw*s*s*D).reshape(B, nh*s, nw*s, D)
    t = window_partition(x, s)
    assert t.shape==(B*nh*nw, s*s, D) and torch.equal(window_reverse(t, s, nh*s, nw*s), x)
    for b in range(B):
        for i in range(nh):
            for j in range(nw):
                assert torch.equal(t[(b*nh+i)*nw+j], x[b,i*s:(i+1)*s,j*s:(j+1)*s].flatten(0,1))

@few
@given(s=st.integers(1,5), heads=st.integers(1,3))
def test_relative_index_by_brute_force(s, heads):
    "One entry an offset, query less key, row by row"
    rb = WindowAttention(6*heads, heads, window=s).bias
    cells = [(r,c) for r in range(s) for c in range(s)]
    want = [[(r0-r1+s-1)*(2*s-1) + c0-c1+s-1 for r1,c1 in cells] for r0,c0 in cells]
    assert rb.index.tolist()==want and rb.table.shape==((2*s-1)**2, heads)
    b = rb().detach()
    assert all(torch.equal(b[:,i,j], rb.table[want[i][j]]) for i in range(s*s) for j in range(s*s))

def windows_of(r, s, shift): return (r-shift)//s

@few
@given(nh=side, nw=side, s=st.integers(1,4), data=st.data())
def test_mask_by_brute_force(nh, nw, s, data):
    "Two cells of a window may see each other if they also share a moved window of the unshifted grid"
    h,w = nh*s,nw*s
    a,b = (data.draw(st.integers(0, s-1)) if n>1 else 0 for n in (nh,nw))
    mask = shift_mask(h, w, s, (a,b))
    assert mask.shape==(nh*nw, s*s, s*s) and set(mask.unique().tolist()) <= {0.,-float('inf')}
    where = window_partition(torch.arange(h*w).reshape(1,h,w,1).roll((-a,-b), (1,2)), s).squeeze(-1)
    r,c = windows_of(where//w, s, a),windows_of(where%w, s, b)
    same = (r[:,:,None]==r[:,None]) & (c[:,:,None]==c[:,None])
    assert torch.equal(mask==0, same) and same.diagonal(dim1=1, dim2=2).all()

@few
@given(nh=st.integers(1,3), nw=st.integers(1,3), s=st.integers(2,4), seed=st.integers(0,9))
def test_sees_its_moved_window_and_nothing_else(nh, nw, s, seed):
    "By gradients, exactly: what came round the border is never attended to"
    torch.manual_seed(seed)
    h,w,shift = nh*s,nw*s,s//2
    attn = WindowAttention(8, 2, window=s, shift=shift).double()
    x = torch.randn(1, h, w, 8, dtype=torch.double, requires_grad=True)
    r,c = torch.randint(h, ()).item(),torch.randint(w, ()).item()
    attn(x)[0,r,c].sum().backward()
    seen = x.grad[0].abs().sum(-1)>0
    a,b = shift*(nh>1),shift*(nw>1)
    row = windows_of(torch.arange(h), s, a)==windows_of(r, s, a)
    col = windows_of(torch.arange(w), s, b)==windows_of(c, s, b)
    assert torch.equal(seen, row[:,None] & col)
    assert x.grad[0][~seen].eq(0).all()

@few
@given(nh=st.integers(1,3), nw=st.integers(1,3), s=st.integers(1,4), heads=st.sampled_from([1,2,4]))
def test_unshifted_is_attention_on_each_window(nh, nw, s, heads):
    torch.manual_seed(0)
    attn = scrambled(WindowAttention(16, heads, window=s)).double()
    plain = Attention(16, heads, bias=attn.bias).double()
    plain.load_state_dict(attn.state_dict())
    x = torch.randn(2, nh*s, nw*s, 16, dtype=torch.double)
    torch.testing.assert_close(attn(x), window_reverse(plain(window_partition(x, s)), s, nh*s, nw*s))

def test_operands_are_contiguous(monkeypatch):
    "Compiled bf16 fused attention on permuted views turned NaN in torch 2.11"
    seen,real = [],F.scaled_dot_product_attention
    def spy(q, k, v, attn_mask, **kw): seen.append((q,k,v,attn_mask)); return real(q, k, v, attn_mask=attn_mask, **kw)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    small()(photo(24, 32, B=2))
    assert len(seen)==5 and all(t.is_contiguous() for ts in seen for t in ts)
    q,_,_,bias = seen[1]
    assert q.shape==(2, 3*4*2, 16, 6) and bias.shape==(3*4*2, 16, 16), "the bias is written out for every image"

def test_masks_are_kept_and_no_part_of_the_model():
    m,x = small(),photo(32, 32)
    mod._kept_mask.cache_clear()
    with torch.inference_mode(): m(x)
    first = mod._kept_mask.cache_info()
    m(x).sum().backward()
    again = mod._kept_mask.cache_info()
    assert (first.misses, again.misses)==(2,2) and again.hits>first.hits
    kept = mod._kept_mask(16, 16, 4, (2,2), x.device)
    assert mod._kept_mask.cache_info().misses==2 and not kept.is_inference(), "made under inference_mode, kept for training"
    assert not [n for n in m.state_dict() if 'mask' in n or 'index' in n]
    torch.testing.assert_close(pickle.loads(pickle.dumps(m))(x), m(x))
    torch.testing.assert_close(copy.deepcopy(m)(x), m(x))

# --- the network

def test_constant_image_constant_grid():
    x = torch.rand(2, 3, 1, 1, dtype=torch.double).expand(2, 3, 224, 224)
    for m,size in ((scrambled(swin_mini()),32), (scrambled(swin_mini()),96), (small(),48)):
        with torch.no_grad(): f = m.double().forward_features(x[...,:size,:size])
        assert (f-f[:,:1,:1]).abs().max() < 1e-9 and f.std()>.1
    with torch.no_grad(): f = small().double().forward_features(x[...,:24,:24])
    assert (f-f[:,:1,:1]).abs().max() > 1e-3     # 6 x 6 cells are padded to 8 x 8, and padding tells where it is

def test_constant_image_swin_t(pairs):
    m = pairs['timm'][0].double()
    with torch.no_grad(): f = m.forward_features(torch.full((1,3,224,224), .3).double())
    assert (f-f[:,:1,:1]).abs().max() < 1e-9

@few
@given(h=st.integers(1,5), w=st.integers(1,5), B=st.integers(1,2), C=st.integers(1,3))
def test_shapes(h, w, B, C):
    m = Swin(num_classes=5, in_ch=C, dims=(8,16,24), depths=(1,2,1), heads=(1,2,3), patch=2, window=3)
    x = torch.randn(B, C, 8*h, 8*w)
    f = m.forward_features(x)
    assert f.shape==(B,h,w,24) and f.isfinite().all() and m.total_stride==8 and m.num_features==24
    assert m.forward_head(f).shape==(B,5) and m.forward_head(f, pre_logits=True).shape==(B,24)
    torch.testing.assert_close(m(x), m.forward_head(f))
    grid = as_backbone(m).grid(f, (8*h,8*w))
    assert torch.equal(grid, f.permute(0,3,1,2))

def test_images_do_not_see_each_other():
    m,x = small().double(),photo(24, 40, B=3, dtype=torch.double)
    torch.testing.assert_close(m(x), torch.cat([m(x[i:i+1]) for i in range(3)]))

def test_taps():
    "Names for the grid before the last norm, after each stage and after each block"
    m,x = small(),photo(32, 48)
    f = m.forward_features(x)
    shapes = {'layers':(24,8,12), 'layers.0':(12,16,24), 'layers.0.blocks.1':(12,16,24), 'layers.1':(24,8,12), 'layers.1.blocks.2':(24,8,12)}
    for tap,shape in shapes.items():
        with GridTap(m, tap) as t:
            m(x)
            got = t.pop((32,48))
            assert got.shape==(1,*shape)
        if tap in ('layers','layers.1','layers.1.blocks.2'): torch.testing.assert_close(m.norm(got.permute(0,2,3,1)), f)
    with GridTap(m) as t:
        m(x)
        torch.testing.assert_close(t.pop((32,48)), f.permute(0,3,1,2))

def test_mini():
    m = swin_mini(num_classes=3, drop_path=.1, in_ch=1, img_size=32)
    assert m.forward_features(torch.randn(2,1,32,32)).shape==(2,8,8,128) and m(torch.randn(2,1,32,32)).shape==(2,3)
    assert [a.shift for a in m.modules() if isinstance(a, WindowAttention)]==[0,2]*4
    assert swin_mini(head_bias=False).head.bias is None and Swin(**tiny, qkv_bias=False).layers[0].blocks[0].attn.qkv.bias is None

def test_gradients_reach_every_parameter():
    m = small(drop_path=.1).train()
    m(photo(32, 32, B=4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max()>0 for p in m.parameters())

def test_drop_path_drops_images():
    "In training a branch is dropped for whole images: the same input twice gives few different outputs"
    torch.manual_seed(0)
    m = scrambled(Swin(**{**tiny, 'depths':(1,1)}, drop_path=.5)).train()
    out = m(photo(16, 16).expand(64,-1,-1,-1))
    assert len({tuple(o.tolist()) for o in (out*1e3).round()})==4     # two branches in the last block, each kept or dropped

@pytest.mark.parametrize('hw', [(32,32),(24,40)])
def test_compiles_whole(hw):
    "Without and with padding; training mode differs by drop path alone, which is next"
    m,x = small(depths=(2,1)),photo(*hw, B=2)
    torch.compiler.reset()                   # a size seen before would make this one symbolic, which is slow to trace
    a,b = torch.compile(m, fullgraph=True, backend='aot_eager')(x),m(x)
    torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y in (a,b)]
    for g,want in zip(*grads): assert gap(g, want) < 1e-4

def test_compiles_with_drop_path_and_other_sizes():
    m = small(depths=(2,1), drop_path=.4).train()
    torch.compiler.reset()
    compiled = torch.compile(m, fullgraph=True, backend='eager', dynamic=False)
    for hw in ((16,16),(24,40)):
        x = photo(*hw, B=4)
        torch.manual_seed(1); a = compiled(x)
        torch.manual_seed(1); torch.testing.assert_close(a, m(x))

def test_exports_with_a_warm_cache_or_not():
    "Tracing neither takes a kept mask into the graph nor leaves a traced one behind"
    m,x = small(),photo(32, 32)
    mod._kept_mask.cache_clear()
    program = torch.export.export(m, (x,), strict=False)
    assert mod._kept_mask.cache_info().currsize==0
    torch.testing.assert_close(program.module()(x), m(x))

def test_bf16_autocast():
    m,x = scrambled(swin_mini()),photo(32, 32, B=2)
    ref = m(x)
    with torch.autocast('cpu', torch.bfloat16): out = m(x)
    assert out.isfinite().all() and gap(out.float(), ref) < .05
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    assert m.bfloat16()(x.bfloat16()).isfinite().all()

def test_channels_last():
    m,x = small(),photo(32, 48, B=2)
    want = m(x)
    m = m.to(memory_format=torch.channels_last)
    torch.testing.assert_close(m(x.contiguous(memory_format=torch.channels_last)), want)

def test_onnx(tmp_path):
    ort = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    m,x = scrambled(swin_mini(depths=(2,2))),photo(32, 32, B=2)
    torch.onnx.export(m, (x,), str(tmp_path/'m.onnx'), dynamo=True, verbose=False)
    sess = ort.InferenceSession(str(tmp_path/'m.onnx'), providers=['CPUExecutionProvider'])
    out, = sess.run(None, {sess.get_inputs()[0].name:x.numpy()})
    assert gap(torch.from_numpy(out), m(x).detach()) < 1e-5

def test_no_synchronization_hides_in_the_forward():
    "On the meta device nothing can be read back"
    m = Swin(**tiny).to('meta')
    assert m(torch.empty(2, 3, 32, 40, device='meta')).shape==(2,10)

def test_refuses():
    for kw,word in [(dict(depths=(2,2)),'one entry a stage'), (dict(img_size=100),'100 x 100.*32'), (dict(img_size=(224,100)),'224 x 100'),
                    (dict(window=0),'window 0'), (dict(heads=(3,6,12,23)),'768.*heads 23'), (dict(drop_path=1.5),'drop path')]:
        with pytest.raises(ValueError, match=word): swin_t(**kw)
    for hw in ((30,32),(32,33)):
        with pytest.raises(ValueError, match=rf'{hw[0]} x {hw[1]}.*total stride 4.*resize to 32 x 32'): small()(photo(*hw))
    with pytest.raises(ValueError, match='shift 4.*0 to 3'): WindowAttention(8, 2, window=4, shift=4)
    with pytest.raises(ValueError, match='5 x 4.*pad it to 6 x 4'): PatchMerging(8)(torch.zeros(1,5,4,8))
    with pytest.raises(ValueError, match='9 x 8.*pad it to 12 x 8'): window_partition(torch.zeros(1,9,8,2), 4)
