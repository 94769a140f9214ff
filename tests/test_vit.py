"tokens, attention and vit against timm, and their properties"
import pytest, torch
from hypothesis import given, settings, strategies as st
from timm.models.vision_transformer import VisionTransformer
from vt_drloc.tokens import *
from vt_drloc.attention import *
from vt_drloc.vit import *

few = settings(max_examples=15, deadline=None, derandomize=True)
side = st.integers(1, 4)

def scrambled(model):
    "Every parameter random, so that no zero bias or unit scale can hide a mistake"
    torch.manual_seed(0)
    for p in model.parameters(): torch.nn.init.normal_(p, std=.2)
    return model.double().eval()

def both(pool, **kw):
    token = pool=='token'
    theirs = scrambled(VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7,
                                         global_pool=pool, class_token=token, fc_norm=False, **kw))
    ours = ViT(img_size=32, patch=8, dim=48, depth=3, heads=3, num_classes=7, pool=pool).double().eval()
    ours.load_state_dict(theirs.state_dict())
    return ours,theirs


@pytest.mark.parametrize('pool', ['token','avg'])
def test_timm_weights(pool):
    ours,theirs = both(pool)
    x = torch.randn(4,3,32,32, dtype=torch.double)
    f,g = ours.forward_features(x),theirs.forward_features(x)
    close = lambda a,b: torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    close(f, g); close(ours(x), theirs(x)); close(ours.forward_head(f, pre_logits=True), theirs.forward_head(g, pre_logits=True))
    assert (ours.num_features,ours.num_prefix_tokens) == (theirs.num_features,theirs.num_prefix_tokens)
    assert theirs(x).std() > .1     # the agreement is about numbers that differ

def test_timm_gradients():
    ours,theirs = both('token')
    x = torch.randn(2,3,32,32, dtype=torch.double)
    for m in (ours,theirs): m(x).square().sum().backward()
    for (n,p),q in zip(ours.named_parameters(), [dict(theirs.named_parameters())[n] for n,_ in ours.named_parameters()]):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=n)

def test_timm_starts_alike():
    "Every parameter starts with timm's deviation, as near as its numbers tell it"
    torch.manual_seed(0)
    kw = dict(img_size=32, embed_dim=192, depth=2, num_heads=3)
    theirs = dict(VisionTransformer(patch_size=4, num_classes=10, **kw).named_parameters())
    ours = dict(ViT(img_size=32, patch=4, dim=192, depth=2, heads=3).named_parameters())
    assert list(ours) and set(ours)==set(theirs)
    for n in ours:
        if n=='cls_token': continue    # timm starts it at 1e-6
        torch.testing.assert_close(ours[n].std(), theirs[n].std(), rtol=.1+2/ours[n].numel()**.5, atol=1e-6, msg=n)


@few
@given(B=st.integers(1,3), C=side, h=side, w=side, p=st.integers(1,5))
def test_patchify_round_trip(B, C, h, w, p):
    x = torch.arange(B*C*h*w*p*p).reshape(B, C, h*p, w*p)
    t = patchify(x, p)
    assert t.shape==(B, h*w, C*p*p) and torch.equal(unpatchify(t, h, w, p), x)
    r,c = h-1,w-1
    assert torch.equal(t[:,r*w+c], x[:,:,r*p:(r+1)*p,c*p:(c+1)*p].flatten(1))

@few
@given(h=side, w=side, p=st.integers(1,4))
def test_patch_embed_is_linear_on_patches(h, w, p):
    torch.manual_seed(0)
    emb = PatchEmbed(p, 8).double()
    x = torch.randn(2, 3, h*p, w*p, dtype=torch.double)
    want = patchify(x, p) @ emb.proj.weight.flatten(1).T + emb.proj.bias
    torch.testing.assert_close(to_tokens(emb(x)), want)

@few
@given(h=side, w=side, s=st.integers(1,4), k=st.sampled_from([3,5,7]))
def test_conv_embed_shape(h, w, s, k):
    if k < s: return
    g = ConvEmbed(3, 8, k, s)(torch.randn(1,3,h*s,w*s))
    assert g.shape==(1,8,h,w)
    assert to_tokens(g).mean(-1).abs().max() < 1e-5

@pytest.mark.parametrize('H,W,s,want', [(30,32,4,'32 x 32'), (32,33,8,'32 x 32'), (1,1,4,'4 x 4')])
def test_check_stride(H, W, s, want):
    for f in (lambda: check_stride(H,W,s), lambda: patchify(torch.zeros(1,3,H,W), s), lambda: PatchEmbed(s)(torch.zeros(1,3,H,W))):
        with pytest.raises(ValueError, match=f"{H} x {W}.*{s}.*{want}"): f()


@few
@given(N=st.integers(1,12), heads=st.sampled_from([1,2,4]), seed=st.integers(0,9))
def test_attention_is_equivariant(N, heads, seed):
    torch.manual_seed(seed)
    attn,x,p = Attention(16, heads).double(),torch.randn(2,N,16, dtype=torch.double),torch.randperm(N)
    torch.testing.assert_close(attn(x[:,p]), attn(x)[:,p])

@few
@given(N=st.integers(1,9), heads=st.sampled_from([1,2,4]), biased=st.booleans())
def test_attention_is_attend_per_head(N, heads, biased):
    torch.manual_seed(N)
    bias = RelativeBias(1, N, heads).double() if biased else None
    attn,x = Attention(16, heads, bias=bias).double(),torch.randn(2,N,16, dtype=torch.double)
    q,key,v = attn.split(x)
    out = attend(q, key, v, bias=bias() if biased else None).transpose(1,2).flatten(2)
    torch.testing.assert_close(attn(x), attn.proj(out))

def test_attention_operands_are_contiguous():
    "Compiled bf16 fused attention on permuted views turned NaN in torch 2.11"
    for t in Attention(16,4).split(torch.randn(2,5,16)): assert t.is_contiguous() and t.shape==(2,4,5,4)

@few
@given(h=side, w=side)
def test_relative_bias_sees_offsets_alone(h, w):
    rb = RelativeBias(h, w, 2)
    b,n = rb().detach(),h*w
    at = {}
    for i in range(n):
        for j in range(n): at.setdefault((i//w-j//w, i%w-j%w), []).append(b[:,i,j])
    assert all(torch.equal(v, vs[0]) for vs in at.values() for v in vs)
    assert len(at)==len(rb.table)==len({tuple(vs[0].tolist()) for vs in at.values()})
    assert 'index' not in rb.state_dict()

@few
@given(h=st.integers(1,20), w=st.integers(1,20), dim=st.sampled_from([8,32]))
def test_sincos_rows_are_distinct(h, w, dim):
    t = sincos_2d(h, w, dim)
    assert t.shape==(h*w,dim)
    d = torch.cdist(t.double(), t.double()) + torch.eye(h*w)*9
    assert d.min() > .05

@pytest.mark.parametrize('pad,flat', [('zeros',False), ('reflect',True), ('replicate',True), ('circular',True)])
def test_conv_pos_leak(pad, flat):
    torch.manual_seed(0)
    y = ConvPos(8, padding_mode=pad)(torch.ones(1,8,5,4)).detach()
    assert ((y-y[...,:1,:1]).abs().max() < 1e-5) == flat


def test_drop_path():
    torch.manual_seed(0)
    d,x = DropPath(.3).train(),torch.ones(20000,2,2)
    y = d(x)
    assert torch.equal(y, y[:,:1,:1].expand_as(y)), "parts of an image were dropped"
    assert abs(y.mean()-1) < .02 and abs((y==0).float().mean()-.3) < .02
    torch.testing.assert_close(y[y>0], torch.full_like(y[y>0], 1/.7))
    assert d.eval()(x) is x and DropPath(0.).train()(x) is x
    for p in (-.1, 1., 2.):
        with pytest.raises(ValueError, match=str(p)): DropPath(p)

def test_drop_rates_rise():
    ps = [b.drop_path.p for b in ViT(drop_path=.2, depth=5, dim=8, heads=2).blocks]
    assert ps==pytest.approx([0,.05,.1,.15,.2]) and drop_rates(.2, 1)==[0.]

@pytest.mark.parametrize('kw', [dict(), dict(pool='avg', pos='sincos'), dict(pos=None), dict(drop_path=.2)])
def test_compiles_without_breaks(kw):
    "Training differs by drop path alone, which the first of several blocks has not"
    torch.manual_seed(0)
    drops = 'drop_path' in kw
    m,x = ViT(dim=16, depth=1+drops, heads=2, patch=8, **kw).train(drops),torch.randn(2,3,32,32)
    torch.manual_seed(1); a = torch.compile(m, backend='eager', fullgraph=True)(x)
    torch.manual_seed(1); torch.testing.assert_close(a, m(x))

@few
@given(h=st.integers(1,3), w=st.integers(1,3), pool=st.sampled_from(['token','avg']), pos=st.sampled_from(['learned','sincos',None]), C=st.integers(1,4))
def test_vit_shapes(h, w, pool, pos, C):
    m = ViT(img_size=(4*h,4*w), patch=4, dim=16, depth=1, heads=2, num_classes=5, pool=pool, pos=pos, in_ch=C)
    f = m.forward_features(torch.randn(2,C,4*h,4*w))
    assert f.shape==(2, m.num_prefix_tokens+h*w, m.num_features) and m.forward_head(f).shape==(2,5)
    assert m.forward_head(f, pre_logits=True).shape==(2,16)

def test_vit_refuses():
    for kw,word in [(dict(pool='max'),"'max'"), (dict(pos='rope'),"'rope'"), (dict(dim=18, heads=3, pos='sincos'),'18'), (dict(dim=10, heads=3),'10'), (dict(img_size=30),'30')]:
        with pytest.raises(ValueError, match=word): ViT(**kw)
    with pytest.raises(ValueError, match='48 x 32'): ViT(dim=8, heads=2, depth=1)(torch.randn(1,3,48,32))
    with pytest.raises(ValueError, match='33 x 32'): ViT(dim=8, heads=2, depth=1)(torch.randn(1,3,33,32))
    ViT(dim=8, heads=2, depth=1, pos=None)(torch.randn(1,3,48,32))

def test_start_and_eps():
    m = ViT(dim=192, depth=1, heads=3)
    for k in m.modules():
        if isinstance(k, torch.nn.Linear): assert abs(k.weight.std()-.02) < 2e-3 and not k.bias.any()
    assert all(n.eps==1e-6 for n in m.modules() if isinstance(n, torch.nn.LayerNorm)) and Block(8,2).norm1.eps==1e-5

def test_vit_mini():
    n = sum(p.numel() for p in vit_mini().parameters())
    assert 1.2e6 < n < 1.5e6 and vit_mini(num_classes=3, depth=1, pool='avg')(torch.randn(1,3,32,32)).shape==(1,3)

def test_state_of_fixed_positions():
    m = ViT(pos='sincos', dim=16, heads=2, depth=1, pool='avg')
    assert 'pos_embed' not in m.state_dict() and m.double().pos_embed.dtype==torch.double
