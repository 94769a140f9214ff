"What attention looks at"
import json, math, warnings
import pytest, timm, torch, torchvision
from torch import nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from vt_drloc.attention import Attention, attend
from vt_drloc.hybrid import cvt_mini
from vt_drloc.looks import *
from vt_drloc.models import create_model
from vt_drloc.attention import Attention
from vt_drloc.swin import WindowAttention, swin_mini
from vt_drloc.vit import vit_mini

def named(model, x):
    "name -> weights, may, heads"
    res = {}
    with torch.no_grad(), overhear(model.eval(), lambda name, m, *a: res.setdefault(name, (*weights(*a), m.heads))): model(x)
    return res

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(2, 12), st.integers(1, 8), st.sampled_from(['none','bias','bool']), st.integers(0, 99))
def test_weights_are_those_of_the_fused_function(n, m, d, kind, seed):
    "With these weights the values give what PyTorch gives"
    torch.manual_seed(seed)
    q,k,v,mask = torch.randn(2, 3, n, d),torch.randn(2, 3, m, d),torch.randn(2, 3, m, 5),None
    if kind!='none':
        mask = torch.randn(n, m).masked_fill(torch.rand(n, m) < .4, -torch.inf)
        mask[:,0] = 0
        if kind=='bool': mask = mask.isfinite()
    w,may = weights(q, k, mask, .3)
    assert w.shape == may.shape == (2,3,n,m) and w.dtype == torch.float32
    torch.testing.assert_close(w@v, F.scaled_dot_product_attention(q, k, v, mask, scale=.3), rtol=1e-4, atol=1e-5)
    assert (w[~may]==0).all() and torch.allclose(w.sum(-1), torch.ones(2, 3, n))

def test_half_precision_is_looked_at_in_float32():
    q,k = torch.randn(2, 1, 2, 9, 8).bfloat16().unbind(0)
    with torch.autocast('cpu', torch.bfloat16): w,_ = weights(q, k)
    torch.testing.assert_close(w, (q.float()@k.float().mT*8**-.5).softmax(-1))

@pytest.mark.parametrize('n,want', [(1,(0,1)), (2,(1,1)), (49,(0,7)), (50,(1,7)), (196,(0,14)), (197,(1,14))])
def test_grids(n, want):
    from vt_drloc.looks import _grid
    assert _grid(n) == want
    for k in (3,12,20):
        with pytest.raises(ValueError, match=f'{k} tokens'): _grid(k)

def test_windows_keep_to_their_region():
    "In a shifted window of Swin what lies across the seam has weight 0 and does not count as seen"
    net = swin_mini(10)
    res = named(net, torch.randn(2, 3, 32, 32))
    w,may,heads = res['layers.0.blocks.1.attn']
    assert (w[~may]==0).all() and .3 < may.float().mean() < 1 and may.any(-1).all()
    assert res['layers.0.blocks.0.attn'][1].all()

@pytest.mark.parametrize('name', ['vit_mini','swin_mini','cvt_mini','cvt_13_mini','cvt_13_gap_mini','t2t_mini'])
def test_every_network_of_the_project(name):
    "All blocks are heard, under the name of the module, and nothing of the network has changed"
    torch.manual_seed(0)
    net,x = create_model(name, 10, img_size=32).train(),torch.randn(4, 3, 32, 32)
    keys = [k for k,m in net.named_modules() if hasattr(m, 'heads')]
    stats = attention_stats(net, x, part=2)
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert set(keys) <= {s['block'] for s in stats} or name=='t2t_mini'          # its performer has no softmax
    for s in stats:
        m = dict(net.named_modules())[s['block']]
        assert len(s['distance']) == len(s['image']) == getattr(m, 'heads', 1)
        assert all(0 <= o <= 1.0001 for k in ('entropy','image') for o in s[k]) and all(math.isfinite(o) for k in ('distance','even') for o in s[k])

def test_resnet_has_none():
    "No attention, no warning: runs of such networks ask too"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert attention_stats(create_model('resnet_mini', 10), torch.randn(2, 3, 32, 32)) == []

def deaf(name):
    if name=='timm Swin': return timm.create_model('swin_tiny_patch4_window7_224', num_classes=3, depths=(1,1,1,1))
    if name=='torchvision ViT': return torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)
    return torchvision.models.SwinTransformer([4,4], 24, [1,1], [1,2], [4,4], num_classes=3)

@pytest.mark.parametrize('name,kind', [('timm Swin','WindowAttention'), ('torchvision ViT','MultiheadAttention'), ('torchvision Swin','ShiftedWindowAttention')])
def test_attention_that_is_not_heard_is_told(name, kind):
    "The chapter names them; the warning says what it could not hear, and points at the caller"
    with pytest.warns(UserWarning, match=f'no attention was heard, though the network has .*{kind}') as said:
        assert attention_stats(deaf(name), torch.randn(2, 3, *[224 if name=='timm Swin' else 32]*2)) == []
    assert [o.filename for o in said if 'no attention' in str(o.message)] == [__file__]

def test_the_remedy_for_timm():
    "With its fused function, timm's Swin is heard"
    from timm.layers import config
    was = config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(True, experimental=True)
    try: assert len(attention_stats(deaf('timm Swin'), torch.randn(2, 3, 224, 224))) == 4
    finally: config._USE_FUSED_ATTN = was

def test_nothing_to_draw():
    "A network of which nothing was heard is named, instead of an error in a mean or an axis"
    one = dict(block='b', distance=[1.], even=[1.], entropy=[1.], image=[0.])
    with pytest.raises(ValueError, match='^ResNet: no attention was heard'): plot_stats({'ViT': [one], 'ResNet': []})
    with pytest.raises(ValueError, match='no network'): plot_stats({})

@pytest.mark.parametrize('name,size', [('demo_cvt',(16,64)), ('vit_mini',(32,128))])
def test_images_that_are_not_square_are_refused(name, size):
    "4 x 16 cells are as many as 8 x 8, and would be measured as those"
    with pytest.raises(ValueError, match=f'{size[0]} x {size[1]} pixels.*squares'): attention_stats(create_model(name, 10, img_size=size), torch.randn(2, 3, *size))

def test_each_module_keeps_its_own_mode():
    "Frozen BatchNorms stay frozen, also after an error"
    net = create_model('cvt_mini', 10).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    modes = [m.training for m in net.modules()]
    attention_stats(net, torch.randn(2, 3, 32, 32))
    assert [m.training for m in net.modules()] == modes and True in modes and False in modes
    with pytest.raises(Exception): attention_stats(net, torch.randn(2, 5, 32, 32))
    assert [m.training for m in net.modules()] == modes

def test_uniform_attention_has_entropy_one_and_the_even_distance():
    net = vit_mini(10)
    for m in net.modules():
        if isinstance(m, Attention): nn.init.zeros_(m.qkv.weight); nn.init.zeros_(m.qkv.bias)
    for s in attention_stats(net, torch.randn(3, 3, 32, 32)):
        assert s['entropy'] == pytest.approx([1.]*len(s['entropy'])) and s['image'] == pytest.approx([0.]*len(s['image']), abs=1e-4)
        assert s['distance'] == pytest.approx(s['even'], abs=1e-3)

def test_a_relative_bias_looks_without_the_image():
    "Attention that a bias alone decides: sharp, near, and the image has no say"
    net = swin_mini(10)
    for m in net.modules():
        if isinstance(m, WindowAttention):
            nn.init.zeros_(m.qkv.weight); nn.init.zeros_(m.qkv.bias)
            stock = m.bias.forward
            m.bias.forward = lambda stock=stock: torch.eye(16)*30 + 0*stock()
    for s in attention_stats(net, torch.randn(3, 3, 32, 32)): assert max(s['entropy']) < .01 and max(s['distance']) < .01 and max(s['image']) < 1e-3

def test_parts_do_not_matter_but_for_the_comparison():
    "Distance and entropy are means over images, however many are looked at together"
    torch.manual_seed(0)
    net,x = cvt_mini(10),torch.randn(7, 3, 32, 32)
    for a,b in zip(attention_stats(net, x, part=2), attention_stats(net, x, part=7)):
        for k in ('distance','even','entropy'): assert a[k] == pytest.approx(b[k], abs=2e-4)

def test_a_compiled_network():
    "It is asked in its eager form and stays compiled"
    torch.manual_seed(0)
    net,x = vit_mini(10).eval(),torch.randn(4, 3, 32, 32)
    want = attention_stats(net, x)
    net.compile(backend='eager')
    net(x)
    assert attention_stats(net, x) == want and net._compiled_call_impl is not None

@pytest.mark.parametrize('kind,make', [(WindowAttention,swin_mini), (Attention,vit_mini)])
def test_attention_in_one_kernel_is_heard_too(kind, make):
    "The module computes as chapters 02 and 11 do while we listen, and as before afterwards"
    class Fused(kind):
        def forward(self, x): raise RuntimeError('the kernel')
    net,x = make(10),torch.randn(2, 3, 32, 32)
    want = attention_stats(net, x)
    for m in net.modules():
        if type(m) is kind: m.__class__ = Fused
    assert attention_stats(net, x) == want
    with pytest.raises(RuntimeError, match='the kernel'): net(x)

def test_after_an_error_nothing_is_left():
    net = vit_mini(10)
    def note(*_): raise KeyError('note')
    with pytest.raises(KeyError), overhear(net, note): net(torch.randn(2, 3, 32, 32))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    net(torch.randn(2, 3, 32, 32))

def test_what_cannot_be_looked_into():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match='is_causal=True'), overhear(nn.Identity(), lambda *_: None): F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with pytest.raises(ValueError, match='1 image'): attention_stats(vit_mini(10), torch.randn(1, 3, 32, 32))

def test_a_run_writes_it(tmp_path):
    "In the record of a complete run, a block each; the table reads it"
    from vt_drloc.train import Recipe, train
    train(Recipe(data='digits', model='demo_cvt', size=16, share=.2, epochs=1, bs=64, warmup=0, tfms='none'), out=tmp_path, device='cpu', bar=False)
    rec = json.loads(next(tmp_path.glob('*.json')).read_text())
    table = stats_table({'run': rec['attention']})
    assert len(rec['attention']) == len(table) > 0 and table.notna().all().all() and set(rec['attention'][0]) == {'block','distance','even','entropy','image'}

def test_head_stats_by_hand():
    "Of two images on a 2 x 2 grid each cell of the first looks at itself, each of the second at the first cell"
    w = torch.stack([torch.eye(4), F.one_hot(torch.zeros(4, dtype=torch.long), 4).float()])[:,None]
    got,far = head_stats(w, torch.ones_like(w, dtype=torch.bool), 1),(2+2**.5)/4
    assert {k: v.item() for k,v in got.items()}==pytest.approx(dict(distance=far/2, even=far, entropy=0., image=.75))
    same = head_stats(torch.full((2,1,4,4), .25), torch.ones(2, 1, 4, 4, dtype=torch.bool), 1)
    assert {k: v.item() for k,v in same.items()}==pytest.approx(dict(distance=far, even=far, entropy=1., image=0.))
