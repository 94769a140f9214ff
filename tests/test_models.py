"models by name: against timm and torchvision, sizes and options, public weights without a network, checkpoints and what can be wrong with them"
import argparse, copy, json, os, pickle, re, signal
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from vt_drloc import models
from vt_drloc.hybrid import as_backbone, CvT
from vt_drloc.vit import ViT, DropPath
from vt_drloc.models import *

ALL = list_models()
MINIS = [n for n in ALL if model_info(n).size==32]
BIG = [n for n in ALL if model_info(n).size==224]
GRIDS = dict(swin_t=(7,7), resnet50=(7,7)) | {n:(8,8) for n in MINIS}
OWN = Path(models.__file__).parents[1]/'nbs'/'results'/'weights'
few = settings(max_examples=25, deadline=None, derandomize=True)

def randomize(m, std=.05):
    "Every parameter and every BatchNorm statistic random, so that no zero bias or unit scale hides a mistake"
    torch.manual_seed(0)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn_like(p)*std + (p.ndim==1)*.1)
        for n,b in m.named_buffers():
            if n.endswith('running_mean'): b.normal_(0, .1)
            if n.endswith('running_var'): b.uniform_(.5, 1.5)
    return m.eval()

def rel(a, b): return ((a-b).abs().max()/b.abs().max()).item()

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder of weights, and no network"
    monkeypatch.setenv('VT_DRLOC_WEIGHTS', str(tmp_path))
    def offline(*args, **kw): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', offline)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    return tmp_path

# --- the two that frame the paper

@pytest.mark.parametrize('ours,name', [('vit_tiny_16','vit_tiny_patch16_224'), ('vit_small_16','vit_small_patch16_224'), ('vit_base_16','vit_base_patch16_224')])
def test_vit_is_timms(ours, name):
    "Logits and grid to 1e-5, gradients to 1e-4 in float32, all to 1e-10 in float64"
    import timm
    for dtype,tol,gtol in ((torch.float32,1e-5,1e-4), (torch.float64,1e-10,1e-10)):
        depth = 12 if dtype==torch.float32 and ours=='vit_tiny_16' else 2       # the blocks are equal, and wide ones take long
        theirs = randomize(timm.create_model(name, num_classes=10, depth=depth)).to(dtype)
        m,x = create_model(ours, depth=depth).eval().to(dtype),torch.randn(1,3,224,224, dtype=dtype)
        m.load_state_dict(theirs.state_dict())
        outs = []
        for net in (m,theirs):
            net.zero_grad()
            f = net.forward_features(x)
            y = net.forward_head(f)
            F.cross_entropy(y, torch.tensor([3])).backward()
            outs.append((f.detach(), y.detach(), dict((n,p.grad) for n,p in net.named_parameters())))
        (f,y,g),(tf,ty,tg) = outs
        assert ty.std() > .01 and rel(f, tf) < tol and rel(y, ty) < tol
        largest = max(v.abs().max() for v in tg.values())
        assert set(g)==set(tg) and max((g[n]-tg[n]).abs().max() for n in g)/largest < gtol

def test_resnet50_is_torchvisions():
    import torchvision
    theirs,m = randomize(torchvision.models.resnet50(num_classes=10)),create_model('resnet50').eval()
    m.load_state_dict(theirs.state_dict())
    assert list(m.state_dict())==list(theirs.state_dict())
    x = torch.randn(1,3,96,64)
    with torch.no_grad(): assert torch.equal(m(x), theirs(x)) and theirs(x).std() > 1e-3
    m.train(); theirs.train()
    assert torch.equal(m(x), theirs(x))

def test_resnet_starts_as_torchvisions():
    "The same seed gives the same weights: nothing is drawn beyond torchvision's own"
    import torchvision
    torch.manual_seed(1); theirs = torchvision.models.resnet50(num_classes=10).state_dict()
    torch.manual_seed(1); ours = create_model('resnet50').state_dict()
    assert all(ours[k].equal(theirs[k]) for k in theirs)

@pytest.mark.parametrize('block,layers,D', [('BasicBlock',(1,1),128), ('BasicBlock',(1,1,1,1),512), ('Bottleneck',(1,),256), ('Bottleneck',(1,1,1),1024)])
@pytest.mark.parametrize('small', [False,True])
def test_resnet_shapes(block, layers, D, small):
    m = ResNet(5, block, layers, small, in_ch=1).eval()
    f = m.forward_features(torch.randn(1,1,64,96))
    assert f.shape==(1,D,64//m.total_stride,96//m.total_stride) and m.num_features==D
    assert m.forward_head(f).shape==(1,5) and m.forward_head(f, pre_logits=True).shape==(1,D)
    with pytest.raises(ValueError, match='1 to 4 stages'): ResNet(layers=())
    with pytest.raises(ValueError, match="block='Block'"): ResNet(block='Block')

def test_small_stem_starts_as_torchvision_starts_its_own():
    w = ResNet(small=True, in_ch=1).conv1.weight
    assert w.shape==(64,1,3,3) and w.std().item()==pytest.approx((2/(64*9))**.5, rel=.2)

# --- the registry

def test_the_networks_of_the_paper_are_there():
    want = 't2t_vit_14 t2t_vit_t_14 swin_t cvt_13 cvt_13_gap vit_tiny_16 vit_small_16 vit_base_16 resnet50'
    minis = 't2t_mini swin_mini cvt_13_mini cvt_13_gap_mini vit_mini resnet_mini cvt_mini demo_cvt hybrid_s hybrid_m'
    assert set(ALL)=={*want.split(),*minis.split()} and set(MINIS)==set(minis.split())
    assert list_models('vit*')==['vit_base_16','vit_mini','vit_small_16','vit_tiny_16'] and list_models('nothing*')==[]
    assert set(list_models(pretrained=True))==set(want.split())-{'cvt_13_gap'}==set(PUBLIC)

def test_choices_of_the_paper():
    "lambda: 0.1 for T2T and CvT, 0.5 for Swin; drop path: 0.2 for Swin, none for the others"
    for n in ALL:
        e = model_info(n)
        assert (e.lambda_drloc,e.drop_path)==((.5,.2) if n.startswith('swin') else (.1,0.)), n
        assert e.name==n and e.about

@pytest.mark.parametrize('name,millions', [('t2t_vit_14',21.16), ('swin_t',27.53), ('cvt_13',19.62), ('cvt_13_gap',19.56), ('resnet50',23.53), ('vit_base_16',85.81)])
def test_parameters(name, millions):
    m = models._skeleton(name, {})
    ts = m.state_dict().values() if name=='t2t_vit_14' else m.parameters()      # its fixed positions and random features count there
    assert sum(t.numel() for t in ts)/1e6==pytest.approx(millions, abs=.006)

@pytest.mark.parametrize('name', MINIS)
def test_minis_are_small(name):
    n = sum(p.numel() for p in create_model(name).parameters())
    assert n < (12.5e6 if name.startswith('hybrid') else 3e6) and (name=='demo_cvt' or n > 1e6)

@pytest.mark.parametrize('name', ALL)
def test_default_size(name):
    "The grid that the side task sees, logits, and head(features) = model"
    e,m = model_info(name),create_model(name, 7).eval()
    x,bb = torch.randn(1,3,e.size,e.size),as_backbone(m)
    with torch.no_grad():
        f = m.forward_features(x)
        g = bb.grid(f, x.shape[-2:])
        assert g.shape==(1,m.num_features,*GRIDS.get(name, (14,14)))
        y = m.forward_head(f)
        assert y.shape==(1,7) and m.forward_head(f, pre_logits=True).shape==(1,m.num_features)
        if name not in ('vit_base_16','vit_small_16'): torch.testing.assert_close(m(x), y)

@pytest.mark.parametrize('name', ALL)
def test_not_square(name):
    e = model_info(name)
    H,W = (64,96) if e.size==224 else (16,24)
    m = create_model(name, 4, img_size=(H,W)).eval()
    x,bb = torch.randn(1,3,H,W),as_backbone(m)
    with torch.no_grad(): g = bb.grid(bb.forward_features(x), (H,W))
    k = e.size//GRIDS.get(name, (14,14))[0]
    assert g.shape[2:]==(H//k,W//k)
    assert m.recipe_args==dict(model=name, args=dict(num_classes=4, img_size=(H,W), drop_path=0.))

@few
@given(name=st.sampled_from(MINIS), h=st.integers(1,4), w=st.integers(1,4), n=st.integers(1,5), C=st.sampled_from([1,2,3]), B=st.integers(1,2))
def test_random_sizes(name, h, w, n, C, B):
    "Sides that are multiples of what the registry says work; the grid has their proportions"
    k = 4
    m = create_model(name, n, img_size=(h*k,w*k), in_ch=C).eval()
    x,bb = torch.randn(B,C,h*k,w*k),as_backbone(m)
    with torch.no_grad():
        assert bb.grid(bb.forward_features(x), (h*k,w*k)).shape==(B,m.num_features,h,w) and m(x).shape==(B,n)

@pytest.mark.parametrize('name', [n for n in ALL if model_info(n).multiple>1])
def test_impossible_sizes_name_the_multiple(name):
    k = model_info(name).multiple
    with pytest.raises(ValueError, match=rf'{4*k+1} x {2*k}.*multiple of the total stride {k}; resize to {4*k} x {2*k}'):
        create_model(name, img_size=(4*k+1,2*k))

@pytest.mark.parametrize('size', [0, -32, (32,), (32,32,32), (32,0), 32., 'big', (32.,32)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=re.escape(f'img_size={size!r}')): create_model('vit_mini', img_size=size)

@pytest.mark.parametrize('n', [0, -1, 2.5, None])
def test_classes_that_are_none(n):
    with pytest.raises(ValueError, match=f'num_classes={n}'): create_model('vit_mini', n)

@pytest.mark.parametrize('wrong,right', [('swin_tiny','swin_'), ('cvt13','cvt_13'), ('t2t_vit14','t2t_vit_14'), ('resnet_50','resnet50'), ('vit_b_16','vit_base_16')])
def test_wrong_names_get_suggestions(wrong, right):
    with pytest.raises(ValueError, match=rf"unknown model '{wrong}': did you mean.*'{right}"): create_model(wrong)

def test_a_hopeless_name_gets_the_list():
    with pytest.raises(ValueError, match='there are: .*swin_t.*vit_tiny_16'): create_model('qqqqqqq')

def test_unknown_arguments_name_those_there_are():
    for name,some in (('vit_mini','depth, heads'), ('cvt_13_gap','eps, in_ch, dims'), ('resnet50','layers, small, in_ch')):
        with pytest.raises(ValueError, match=f"{name} takes no 'widht'; it takes: num_classes, .*{some}"): create_model(name, widht=3)

@pytest.mark.parametrize('name', [n for n in ALL if not n.startswith('resnet')])
def test_drop_path_reaches_the_blocks(name):
    rates = [m.p for m in models._skeleton(name, dict(drop_path=.3)).modules() if isinstance(m, DropPath)]
    assert rates and max(rates)==rates[-1]==pytest.approx(.3) and sorted(rates)==rates
    assert not any(m.p for m in models._skeleton(name, {}).modules() if isinstance(m, DropPath))

def test_resnet_refuses_drop_path():
    with pytest.raises(ValueError, match='drop_path=0.1: resnet50 has no drop path'): create_model('resnet50', drop_path=.1)

def test_register():
    try:
        @register(ViT, 'small', size=16, multiple=2)
        def vit_test(num_classes=10, **kw): return ViT(num_classes=num_classes, **{**dict(img_size=16, patch=2, dim=8, depth=1, heads=1), **kw})
        assert 'vit_test' in list_models() and create_model('vit_test', 3)(torch.randn(1,3,16,16)).shape==(1,3)
    finally: MODELS.pop('vit_test', None)

def test_demo_cvt_is_that_of_the_demo():
    m = demo_cvt(1, padding_mode='reflect')
    assert isinstance(m, CvT) and m.total_stride==4 and sum(p.numel() for p in m.parameters())==sum(
        p.numel() for p in CvT(1, dims=(64,), depths=(2,), heads=(4,), kernels=(7,), strides=(4,), kv_strides=(1,)).parameters())

# --- the hybrids

def hybrid_parameters(stem, residuals, dim, depth, classes=10, ratio=4):
    "Counted by hand: convolutions without bias, a BatchNorm after each; blocks; the last norm and the head"
    conv = lambda i, o: 9*i*o + 2*o
    a,b = stem
    block = 2*2*dim + (dim*3*dim + 3*dim) + (dim*dim + dim) + (dim*ratio*dim + ratio*dim) + (ratio*dim*dim + dim)
    return conv(3, a) + conv(a, b) + residuals*2*conv(b, b) + conv(b, dim) + 10*dim + depth*block + 2*dim + dim*classes + classes

@pytest.mark.parametrize('name,kw', [('hybrid_s',dict(stem=(64,128), residuals=1, dim=256, depth=8)), ('hybrid_m',dict(stem=(64,128), residuals=1, dim=384, depth=6)),
                                     ('hybrid_s',dict(stem=(8,16), residuals=0, dim=32, depth=1)), ('hybrid_s',dict(stem=(8,16), residuals=3, dim=64, depth=2))])
def test_hybrid_parameters(name, kw):
    assert sum(p.numel() for p in models._skeleton(name, dict(kw, heads=kw['dim']//32)).parameters())==hybrid_parameters(**kw)

def test_hybrid_shapes_suit_a_gpu():
    for name in ('hybrid_s','hybrid_m'):
        m = create_model(name)
        assert all(b.attn.qkv.in_features//b.attn.heads==64 for b in m.blocks) and m.num_features%64==0
        assert m.forward_features(torch.randn(2,3,32,32)).is_contiguous(memory_format=torch.channels_last)

def test_hybrid_is_its_parts():
    "The same numbers from PyTorch's own functions, and from its own transformer layer"
    torch.manual_seed(0)
    m = randomize(create_model('hybrid_s', 4, stem=(8,16), dim=32, depth=1, heads=2))
    x = torch.randn(2,3,16,24)
    def conv(x, p, stride=1): return F.batch_norm(F.conv2d(x, p[0].weight, stride=stride, padding=1), p[1].running_mean, p[1].running_var, p[1].weight, p[1].bias)
    c1,_,c2,_,*shortcuts,c3,pos = m.stem
    assert len(shortcuts)==3
    g = F.gelu(conv(F.gelu(conv(x, c1)), c2, 2))
    for o in shortcuts: g = F.gelu(g + conv(F.gelu(conv(g, o.conv1)), o.conv2))
    g = conv(g, c3, 2)
    g = g + F.conv2d(g, pos.conv.weight, pos.conv.bias, padding=1, groups=32)
    layer,b = torch.nn.TransformerEncoderLayer(32, 2, 128, 0., F.gelu, batch_first=True, norm_first=True).eval(),m.blocks[0]
    layer.load_state_dict({'self_attn.in_proj_weight':b.attn.qkv.weight, 'self_attn.in_proj_bias':b.attn.qkv.bias, 'self_attn.out_proj.weight':b.attn.proj.weight,
        'self_attn.out_proj.bias':b.attn.proj.bias, 'linear1.weight':b.mlp.fc1.weight, 'linear1.bias':b.mlp.fc1.bias, 'linear2.weight':b.mlp.fc2.weight, 'linear2.bias':b.mlp.fc2.bias,
        **{f'norm{i}.{k}':getattr(getattr(b, f'norm{i}'), k) for i in (1,2) for k in ('weight','bias')}})
    with torch.no_grad():
        t = m.norm(layer(g.flatten(2).transpose(1,2)))
        torch.testing.assert_close(m(x), m.head(t.mean(1)), rtol=1e-4, atol=1e-5)

def test_hybrid_padding_reaches_every_convolution():
    "Reflecting padding: a constant image gives a constant grid, zero padding does not"
    x = torch.full((1,3,32,32), .5)
    for mode,flat in (('reflect',True),('zeros',False)):
        torch.manual_seed(0)
        g = create_model('hybrid_s', padding_mode=mode, stem=(8,16), dim=32, depth=1, heads=1).eval().forward_features(x)
        assert (g.std((2,3)).max()<1e-4)==flat

# --- what every network must do

@pytest.mark.parametrize('name', ['vit_mini','resnet_mini','cvt_mini','hybrid_s'])      # Swin, T2T and both CvT-13: in their own files
def test_compiles_whole(name):
    "fullgraph, training and evaluation; the same numbers and the same gradient of every parameter"
    torch._dynamo.reset()
    small = dict(vit_mini=dict(depth=2), resnet_mini=dict(layers=(1,1)), cvt_mini=dict(depths=(1,1)), hybrid_s=dict(depth=2, stem=(16,32), dim=64, heads=1))[name]
    m = create_model(name, 4, img_size=16, **small)
    c,x = torch.compile(m, fullgraph=True, backend='aot_eager'),torch.randn(2,3,16,16)
    with torch.no_grad(): torch.testing.assert_close(c.eval()(x), m.eval()(x), rtol=1e-4, atol=1e-5)
    def gradients(net):
        m.zero_grad()
        net.train()(x).square().sum().backward()
        return {n:p.grad.clone() for n,p in m.named_parameters()}
    whole,eager = gradients(c),gradients(m)
    for n in eager: torch.testing.assert_close(whole[n], eager[n], rtol=1e-3, atol=1e-4, msg=n)

def test_compiles_whole_with_dropout():
    "T2T's performers drop numbers in training; decomposed as inductor does, in bfloat16"
    torch._dynamo.reset()
    m = create_model('t2t_mini', 4, img_size=16, depth=1).train()
    c,x = torch.compile(m, fullgraph=True, backend='aot_eager_decomp_partition'),torch.randn(2,3,16,16)
    with torch.autocast('cpu', torch.bfloat16): c(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())

@pytest.mark.parametrize('name', MINIS)
def test_bf16_and_channels_last(name):
    m = create_model(name, 4, img_size=16)
    x = torch.randn(2,3,16,16)
    with torch.no_grad():
        y = m.eval()(x)
        torch.testing.assert_close(m.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        z = m(x)
        loss = m.train()(x).float().square().sum()
    loss.backward()
    assert z.dtype==torch.bfloat16 and (z-y).abs().max() < .1*y.abs().max()+.03
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)

@pytest.mark.parametrize('name', ['resnet_mini','vit_mini'])
def test_onnx(name, tmp_path):
    ort = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    small = dict(depth=2) if name=='vit_mini' else {}
    m,x = randomize(create_model(name, 4, **small)),torch.randn(2,3,32,32)
    torch.onnx.export(m, (x,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    s = ort.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    y = s.run(None, {s.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad(): assert rel(torch.tensor(y), m(x)) < 1e-4

@pytest.mark.parametrize('name', ['resnet_mini','vit_mini'])
def test_copies_and_pickles(name):
    m = create_model(name)
    for again in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert again.recipe_args==m.recipe_args and all(a.equal(b) for a,b in zip(again.parameters(), m.parameters()))
    assert not any('recipe' in k for k in m.state_dict())

# --- weights of another shape

@pytest.mark.parametrize('old,new', [((14,14),(6,10)), ((8,8),(12,12)), ((4,16),(8,8)), ((7,7),(7,14))])
@pytest.mark.parametrize('prefix', [0,1])
def test_positions_are_resized_as_timm_does(old, new, prefix):
    from timm.layers import resample_abs_pos_embed
    pos = torch.randn(1, prefix+old[0]*old[1], 12)
    torch.testing.assert_close(resize_pos(pos, old, new, prefix), resample_abs_pos_embed(pos, new, old, prefix), rtol=0, atol=0)

def test_resized_positions_of_a_constant_are_constant():
    pos = torch.randn(1,1,6).expand(1,17,6)
    torch.testing.assert_close(resize_pos(pos, (4,4), (5,9)), pos[:,:1].expand(1,46,6))

def test_load_weights_replaces_the_head_alone():
    old,new = create_model('cvt_mini', 8),create_model('cvt_mini', 3)
    before = new.head.weight.clone()
    assert load_weights(new, old.state_dict())==dict(new=['head.weight','head.bias'], resized=[])
    assert new.head.weight.equal(before)
    for k,v in new.state_dict().items(): assert k.startswith('head.') or v.equal(old.state_dict()[k])

def test_load_weights_keeps_a_head_that_fits():
    old,new = create_model('resnet_mini', 4),create_model('resnet_mini', 4)
    assert load_weights(new, old.state_dict())==dict(new=[], resized=[]) and new.fc.weight.equal(old.fc.weight)

def test_weights_without_a_head_give_a_new_one():
    old,new = create_model('vit_mini', 4),create_model('vit_mini', 4)
    assert load_weights(new, {k:v for k,v in old.state_dict().items() if 'head' not in k})['new']==['head.weight','head.bias']

@pytest.mark.parametrize('name', ['vit_mini','t2t_mini'])
def test_positions_follow_the_size(name):
    old,new = create_model(name, 3, depth=1),create_model(name, 3, depth=1, img_size=(16,48))
    assert load_weights(new, old.state_dict())==dict(new=[], resized=['pos_embed'])
    assert new.pos_embed.shape[1]==1+4*12 and new.pos_embed[:,:1].equal(old.pos_embed[:,:1])
    if name=='vit_mini': assert new.pos_embed.equal(resize_pos(old.pos_embed.detach(), (8,8), (4,12)))
    else:
        from vt_drloc.t2t import t2t_resize_pos
        assert new.pos_embed.equal(t2t_resize_pos(old.state_dict(), (8,8), (4,12))['pos_embed'])

def test_equal_numbers_of_positions_on_another_grid(tmp_path):
    "8 x 8 and 4 x 16 have 64 cells each: the file knows which, a dictionary needs to be told"
    old,new = create_model('vit_mini', 3, depth=1),create_model('vit_mini', 3, depth=1, img_size=(16,64))
    save_model(old, tmp_path/'a.safetensors')
    assert load_weights(new, tmp_path/'a.safetensors')['resized']==['pos_embed']
    assert new.pos_embed.equal(resize_pos(old.pos_embed.detach(), (8,8), (4,16)))
    assert load_weights(new, old.state_dict())['resized']==[]
    assert load_weights(new, old.state_dict(), grid=(8,8))['resized']==['pos_embed']

def test_positions_on_no_grid():
    old,new = create_model('vit_mini', 3, depth=1, img_size=(16,24)),create_model('vit_mini', 3, depth=1)
    with pytest.raises(ValueError, match=r'24 positions.*grid=\(h, w\)'): load_weights(new, old.state_dict())
    load_weights(new, old.state_dict(), grid=(4,6))

def test_misfits_leave_the_model_alone():
    m = create_model('vit_mini', 3, depth=1)
    before = {k:v.clone() for k,v in m.state_dict().items()}
    sd = create_model('vit_mini', 3, depth=2).state_dict()
    with pytest.raises(ValueError, match=r'12 tensors do not fit ViT: blocks.1.* is unknown.*\.\.\.'): load_weights(m, sd)
    with pytest.raises(ValueError, match=r'norm.weight is \(64,\), wanted \(128,\)'): load_weights(m, {**before, 'norm.weight':torch.zeros(64)})
    with pytest.raises(ValueError, match='1 tensors do not fit ViT: norm.bias is missing'): load_weights(m, {k:v for k,v in before.items() if k!='norm.bias'})
    assert all(v.equal(before[k]) for k,v in m.state_dict().items())

def test_log_says_what_is_new(caplog):
    caplog.set_level('INFO', logger='vt_drloc.models')
    load_weights(create_model('vit_mini', 3, depth=1), create_model('vit_mini', 4, depth=1).state_dict())
    assert "new, not loaded: ['head.weight', 'head.bias']" in caplog.text and len(caplog.records)==1

# --- public weights, from made files

def theirs(name):
    "The other package's network, with random weights, and the file as its publisher writes it"
    import timm, torchvision, transformers
    if name.startswith('vit'): return timm.create_model(f'deit_{name.split("_")[1]}_patch16_224')
    if name=='swin_t': return timm.create_model('swin_tiny_patch4_window7_224')
    if name=='resnet50': return torchvision.models.resnet50()
    if name=='cvt_13': return transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=1000))

def put(folder, name, sd):
    f = folder/PUBLIC[name].file
    save_file({k:v.contiguous() for k,v in sd.items()}, f) if f.suffix=='.safetensors' else torch.save(sd, f)
    return f

@pytest.mark.parametrize('name', ['vit_tiny_16','swin_t','resnet50','cvt_13'])
def test_pretrained_from_a_made_file(name, folder):
    net = randomize(theirs(name), .03)
    put(folder, name, net.state_dict())
    m = create_model(name, 1000, pretrained=True).eval()
    x = torch.randn(1,3,224,224)
    with torch.no_grad():
        want = net(x)
        assert rel(m(x), getattr(want, 'logits', want)) < 1e-5
    new = create_model(name, 5, img_size=(64,96), pretrained=True).eval()
    assert new(torch.randn(1,3,64,96)).shape==(1,5)
    same = [k for k in m.state_dict() if not k.startswith(('head.','fc.','pos_embed'))]
    assert same and all(m.state_dict()[k].equal(new.state_dict()[k]) for k in same)

def test_swin_in_its_authors_order(folder):
    "Merging at a stage's end, one plain head, masks and indices in the file: what the authors' files hold"
    net = randomize(theirs('swin_t'), .03)
    old = {re.sub(r'layers\.(\d)\.downsample', lambda g: f'layers.{int(g[1])-1}.downsample', k).replace('head.fc.', 'head.'):v for k,v in net.state_dict().items()}
    old |= {'layers.0.blocks.1.attn_mask':torch.zeros(64,49,49), 'layers.0.blocks.0.attn.relative_position_index':torch.zeros(49,49, dtype=torch.long)}
    assert 'layers.0.downsample.norm.weight' in old and 'layers.3.downsample.norm.weight' not in old
    put(folder, 'swin_t', old)
    m,x = create_model('swin_t', 1000, pretrained=True).eval(),torch.randn(1,3,224,224)
    with torch.no_grad(): assert rel(m(x), net(x)) < 1e-5

def released_t2t(sd):
    "Our T2T's weights under the release's names"
    out = {}
    for k,v in sd.items():
        if m := re.match(r'mixers\.([01])\.(.+)', k):
            k,rest = f'tokens_to_token.attention{int(m[1])+1}.',m[2]
            if rest.startswith('qkv.'): q,key,v_ = v.chunk(3); v,rest = torch.cat([key,q,v_]),'kqv.'+rest[4:]
            k += rest.replace('mlp.fc1','mlp.0').replace('mlp.fc2','mlp.2')
        elif k.startswith('project.'): k = 'tokens_to_token.'+k
        out['module.'+k] = v
    return out

def test_t2t_from_its_release(folder):
    "A training program's checkpoint: averaged weights inside, its arguments beside them"
    net = randomize(create_model('t2t_vit_14', 1000), .03)
    put(folder, 't2t_vit_14', dict(epoch=3, arch='t2t', args=argparse.Namespace(lr=1.), state_dict={}, state_dict_ema=released_t2t(net.state_dict())))
    m = create_model('t2t_vit_14', 1000, pretrained=True).eval()
    assert all(v.equal(net.state_dict()[k]) for k,v in m.state_dict().items())
    m = create_model('t2t_vit_14', 5, img_size=(64,96), pretrained=True)
    assert m.pos_embed.shape[1]==1+4*6 and m.head.weight.shape[0]==5

@pytest.mark.parametrize('name', sorted(PUBLIC))
def test_offline_says_what_and_where(name, folder):
    w = PUBLIC[name]
    with pytest.raises(FileNotFoundError) as e: create_model(name, pretrained=True, img_size=64)
    for part in (name, w.url, str(folder/w.file), 'VT_DRLOC_WEIGHTS', 'OSError'): assert part in str(e.value)

def test_default_folder_is_pytorchs(monkeypatch, tmp_path):
    monkeypatch.delenv('VT_DRLOC_WEIGHTS', raising=False); monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    assert weights_dir()==tmp_path/'checkpoints'

def test_addresses():
    "One file each, https, known hosts; names in the folder differ; the sums are in torchvision's file names"
    assert len({w.file for w in PUBLIC.values()})==len(PUBLIC)
    for w in PUBLIC.values():
        assert w.url.startswith(('https://huggingface.co/','https://github.com/yitu-opensource/T2T-ViT/releases/','https://download.pytorch.org/'))
        assert Path(w.url).suffix==Path(w.file).suffix and w.sha256 in w.url

def test_addresses_are_those_of_the_packages():
    "What the installed packages say about the same files"
    import timm, torchvision
    assert PUBLIC['resnet50'].url==torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    tagged = {n:re.search('timm/(.+?)/resolve', PUBLIC[n].url)[1] for n in PUBLIC if 'timm/' in PUBLIC[n].url}
    assert len(tagged)==4
    for tag in tagged.values():
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg.hf_hub_id==f'timm/{tag}' and tuple(cfg.mean)==(.485,.456,.406) and tuple(cfg.std)==(.229,.224,.225) and cfg.num_classes==1000

def test_downloads_go_through_the_libraries(monkeypatch, tmp_path):
    monkeypatch.setenv('VT_DRLOC_WEIGHTS', str(tmp_path/'new'))
    calls = []
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda repo, file, revision=None: calls.append((repo,file,revision)) or '/cache/x')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *a, **k: calls.append(a))
    assert weights_file('cvt_13')==Path('/cache/x') and weights_file('resnet50')==tmp_path/'new'/'resnet50-0676ba61.pth'
    assert calls==[('microsoft/cvt-13','model.safetensors','main'), (PUBLIC['resnet50'].url,str(tmp_path/'new'/'resnet50-0676ba61.pth'),'0676ba61')]

@pytest.mark.parametrize('name', ['cvt_13_gap','vit_mini','demo_cvt'])
def test_names_without_public_weights(name):
    with pytest.raises(ValueError, match=f"no public ImageNet weights of {name}; there are of cvt_13, .*swin_t.*pretrained='FILE.safetensors'"): create_model(name, pretrained=True)

@pytest.mark.parametrize('name', ['resnet50','swin_t'])
def test_a_broken_public_file(name, folder):
    f = put(folder, name, dict(a=torch.zeros(1000)))
    f.write_bytes(f.read_bytes()[:500])
    with pytest.raises(ValueError, match=rf'{re.escape(str(f))} cannot be read as the weights of {name}.*remove it, then download'): create_model(name, pretrained=True)

def test_a_public_file_of_something_else(folder):
    put(folder, 'resnet50', dict(a=torch.zeros(3)))
    with pytest.raises(ValueError, match='do not fit ResNet'): create_model('resnet50', pretrained=True)
    put(folder, 'swin_t', dict(a=torch.zeros(3)))
    with pytest.raises(ValueError, match='cannot be read as the weights of swin_t'): create_model('swin_t', pretrained=True)

def test_pretrained_wants_three_channels(folder):
    put(folder, 'resnet50', theirs('resnet50').state_dict())
    with pytest.raises(ValueError, match=r'conv1.weight is \(64, 3, 7, 7\), wanted \(64, 1, 7, 7\)'): create_model('resnet50', in_ch=1, pretrained=True)

class Trap:
    "Whoever unpickles it creates a file"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def test_code_in_a_public_file_does_not_run(folder):
    put(folder, 'resnet50', dict(state_dict=Trap(folder/'ran')))
    with pytest.raises(ValueError, match='cannot be read'): create_model('resnet50', pretrained=True)
    assert not (folder/'ran').exists()
    torch.load(folder/PUBLIC['resnet50'].file, weights_only=False)
    assert (folder/'ran').exists()     # the trap is a trap

# --- checkpoints

@pytest.mark.parametrize('name', MINIS)
def test_round_trip(name, tmp_path):
    "Bit for bit, and the same network: arguments too"
    m = randomize(create_model(name, 5, img_size=(16,24), in_ch=1, drop_path=0. if 'resnet' in name else .1))
    save_model(m, tmp_path/'new'/'m.safetensors')
    again = load_model(tmp_path/'new'/'m.safetensors')
    assert not again.training and list(again.state_dict())==list(m.state_dict())
    assert all(v.equal(m.state_dict()[k]) for k,v in again.state_dict().items())
    x = torch.randn(2,1,16,24)
    with torch.no_grad(): assert torch.equal(again(x), m(x))
    assert json.loads(json.dumps(again.recipe_args))==json.loads(json.dumps(m.recipe_args))
    assert [d.p for d in again.modules() if isinstance(d, DropPath)]==[d.p for d in m.modules() if isinstance(d, DropPath)]
    save_model(again, tmp_path/'two.safetensors')
    assert all(v.equal(m.state_dict()[k]) for k,v in load_model(tmp_path/'two.safetensors').state_dict().items())

@pytest.mark.parametrize('name', BIG)
def test_big_ones_can_be_described(name):
    "Name and arguments survive JSON and make the same shapes"
    m = models._skeleton(name, dict(num_classes=3, img_size=(64,96)))
    made = json.loads(json.dumps(m.recipe_args))
    assert models._differ(m.state_dict(), models._skeleton(**made).state_dict())==[]

def test_class_arguments_survive(tmp_path):
    m = create_model('cvt_mini', 3, dims=(16,24), heads=(2,3), depths=(1,1), padding_mode='reflect')
    save_model(m, tmp_path/'a.safetensors')
    again = load_model(tmp_path/'a.safetensors')
    assert [c.padding_mode for c in again.modules() if isinstance(c, nn.Conv2d)]==[c.padding_mode for c in m.modules() if isinstance(c, nn.Conv2d)]

def test_header_and_extras(tmp_path):
    f = tmp_path/'a.safetensors'
    save_model(create_model('vit_mini', 2, depth=1), f, vocab=['cat','dog'], size=32, recipe=dict(data='pets', lr=1e-3), note='plain text')
    h = read_header(f)
    assert h['model']=='vit_mini' and h['args']==dict(num_classes=2, img_size=32, drop_path=0., depth=1)
    assert (h['vocab'],h['size'],h['recipe'],h['note'])==(['cat','dog'],32,dict(data='pets', lr=1e-3),'plain text')
    for bad in (dict(args=1), dict(format='x')):
        with pytest.raises(ValueError, match='the header has these already'): save_model(create_model('vit_mini', depth=1), f, **bad)
    with pytest.raises(ValueError, match='what JSON can hold'): save_model(create_model('vit_mini', depth=1), f, what=object())

@pytest.mark.parametrize('file', sorted(OWN.glob('*-s0.safetensors')), ids=lambda f: f.name)
def test_committed_weights_of_the_training_program(file):
    m,sd = load_model(file),load_file(file)
    assert all(v.equal(sd[k]) for k,v in m.state_dict().items()) and not m.training
    assert read_header(file)['model']=='cvt_mini' and read_header(file)['recipe']['data']=='cifar10'

def test_the_training_programs_format(tmp_path):
    "Name in `model`, JSON in `args` and `recipe`; no image size was written then"
    m = create_model('demo_cvt', 4)
    save_file(m.state_dict(), tmp_path/'a.safetensors', metadata=dict(format='vt_drloc', model='demo_cvt', args=json.dumps(dict(num_classes=4, drop_path=0.)), recipe='{"seed": 1}'))
    again = load_model(tmp_path/'a.safetensors')
    assert all(v.equal(m.state_dict()[k]) for k,v in again.state_dict().items()) and read_header(tmp_path/'a.safetensors')['recipe']==dict(seed=1)

def test_wrapped_models_are_unwrapped(tmp_path):
    m = create_model('demo_cvt', 4)
    for i,w in enumerate((torch.compile(m, backend='eager'), nn.DataParallel(m), nn.DataParallel(torch.compile(m, backend='eager')))):
        save_model(w, tmp_path/f'{i}.safetensors')
        assert list(load_model(tmp_path/f'{i}.safetensors').state_dict())==list(m.state_dict())
        assert load_weights(w, tmp_path/f'{i}.safetensors')==dict(new=[], resized=[])
    m.compile(backend='eager')
    save_model(m, tmp_path/'c.safetensors')
    assert torch.equal(load_model(tmp_path/'c.safetensors').head.weight, m.head.weight)

def test_ddp_is_unwrapped(tmp_path):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        m = create_model('demo_cvt', 4)
        save_model(nn.parallel.DistributedDataParallel(m), tmp_path/'a.safetensors')
        assert load_model(tmp_path/'a.safetensors').head.weight.equal(m.head.weight)
    finally: dist.destroy_process_group()

@pytest.mark.parametrize('name', MINIS)
def test_saving_draws_no_random_numbers(name, tmp_path):
    m = create_model(name)
    state = torch.get_rng_state()
    save_model(m, tmp_path/'a.safetensors')
    assert torch.get_rng_state().equal(state)

def test_other_dtypes_and_devices_of_weights(tmp_path):
    m = create_model('demo_cvt').half()
    save_model(m, tmp_path/'a.safetensors')
    assert load_file(tmp_path/'a.safetensors')['head.weight'].dtype==torch.half
    torch.testing.assert_close(load_model(tmp_path/'a.safetensors').head.weight, m.head.weight.float())

def test_overrides_and_starting_from_a_checkpoint(tmp_path):
    f = tmp_path/'a.safetensors'
    m = create_model('vit_mini', 3, depth=1)
    save_model(m, f)
    a = load_model(f, num_classes=5, img_size=(16,32), drop_path=.0)
    assert a.head.out_features==5 and a.pos_embed.shape[1]==33 and a.recipe_args['args']['num_classes']==5
    b = create_model('vit_mini', 5, img_size=(16,32), depth=1, pretrained=f)
    for k,v in a.state_dict().items(): assert k.startswith('head.') or v.equal(b.state_dict()[k])
    assert b.training and 'pretrained' not in b.recipe_args['args']
    assert create_model('vit_mini', 3, depth=1, pretrained=str(f)).head.weight.equal(m.head.weight)
    with pytest.raises(ValueError, match='holds a vit_mini; the model is a cvt_mini'): create_model('cvt_mini', pretrained=f)
    with pytest.raises(ValueError, match='do not fit ViT'): create_model('vit_mini', 3, depth=2, pretrained=f)
    with pytest.raises(ValueError, match='vit_mini takes no'): load_model(f, width=3)

def test_models_that_cannot_be_saved(tmp_path):
    f = tmp_path/'a.safetensors'
    with pytest.raises(ValueError, match='this ViT was not made by create_model.*recipe_args'): save_model(ViT(depth=1), f)
    m = create_model('vit_mini', 3, depth=1); m.head = nn.Linear(128, 7)
    with pytest.raises(ValueError, match='head.bias, head.weight: the network is not as .* makes it'): save_model(m, f)
    assert list(tmp_path.iterdir())==[]
    m.recipe_args['args']['num_classes'] = 7
    save_model(m, f)
    assert load_model(f).head.out_features==7

def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    "A disk that fails half way leaves the old file whole and nothing beside it"
    f = tmp_path/'a.safetensors'
    save_model(create_model('demo_cvt', 3), f)
    before = f.read_bytes()
    def half(sd, path, metadata): Path(path).write_bytes(b'half'); raise OSError('disk full')
    monkeypatch.setattr(models, 'save_file', half)
    with pytest.raises(OSError, match='disk full'): save_model(create_model('demo_cvt', 3), f)
    assert f.read_bytes()==before and [p.name for p in tmp_path.iterdir()]==['a.safetensors']

def test_replacing_flushes_then_renames_then_flushes_the_folder(tmp_path, monkeypatch):
    "After a power cut a name must not stand over bytes that never reached the disk, nor be lost itself"
    done = []
    stock,move = models.flush,models.os.replace
    monkeypatch.setattr(models, 'flush', lambda p: (done.append(('flush',Path(p).name)), stock(p)))
    monkeypatch.setattr(models.os, 'replace', lambda a,b: (done.append(('replace',Path(a).name,Path(b).name)), move(a, b)))
    f = tmp_path/'new'/'a.json'
    with replacing(f) as tmp: tmp.write_text('whole'); assert not f.exists() and tmp.parent==f.parent
    assert done==[('flush',tmp.name), ('replace',tmp.name,'a.json'), ('flush','new')]
    assert f.read_text()=='whole' and [o.name for o in f.parent.iterdir()]==['a.json']

@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_replacing_leaves_the_old_file_after_an_error(tmp_path, error):
    f = tmp_path/'a.json'
    f.write_text('old')
    with pytest.raises(error), replacing(f) as tmp: tmp.write_text('ha'); raise error()
    with pytest.raises(FileNotFoundError), replacing(f): pass                     # nothing was written
    assert f.read_text()=='old' and [o.name for o in tmp_path.iterdir()]==['a.json']

def killed_while_writing(f, beside, at):
    "A process that is killed by the operating system before the flush, after it, or after the rename; what killed it"
    if pid := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    def die(*args): os.kill(os.getpid(), signal.SIGKILL)
    if at=='before the flush': models.flush = die
    if at=='before the rename': models.os.replace = die
    if at=='after the rename': stock = models.flush; models.flush = lambda p: die() if Path(p).is_dir() else stock(p)
    with replacing(f, beside) as tmp: tmp.write_text('new')
    os._exit(0)

@pytest.mark.parametrize('at', ['before the flush','before the rename','after the rename'])
def test_replacing_when_the_process_is_killed(tmp_path, at):
    "The old file or the new one, whole; what is left beside it under a fixed name goes with the next write"
    f,beside = tmp_path/'a.json',tmp_path/'a.tmp'
    f.write_text('old')
    assert killed_while_writing(f, beside, at)==-signal.SIGKILL
    assert f.read_text()==('new' if at=='after the rename' else 'old') and beside.exists()==(at!='after the rename')
    with replacing(f, beside) as tmp: tmp.write_text('next')
    assert f.read_text()=='next' and [o.name for o in tmp_path.iterdir()]==['a.json']

def test_two_processes_that_write_one_file_do_not_meet(tmp_path):
    "Each has a name of its own beside it, so that neither renames what the other has half written"
    f = tmp_path/'a.json'
    with replacing(f) as mine:
        if not (pid := os.fork()):
            with replacing(f) as tmp: tmp.write_text('theirs')
            os._exit(0 if tmp!=mine else 1)
        mine.write_text('mine')
        assert os.waitpid(pid, 0)[1]==0 and f.read_text()=='theirs'
    assert f.read_text()=='mine' and [o.name for o in tmp_path.iterdir()]==['a.json']

# --- files that are wrong

@pytest.fixture
def good(tmp_path):
    f = tmp_path/'good.safetensors'
    save_model(create_model('demo_cvt', 3), f)
    return f

def rewrite(f, to, sd=None, **meta):
    m = dict(format='vt_drloc', model='demo_cvt', args='{"num_classes": 3}') | meta
    save_file(sd or load_file(f), to, metadata={k:v for k,v in m.items() if v is not None})
    return to

def refused(f, match, exc=ValueError):
    "By everything that opens checkpoints, with the file's name"
    for go in (load_model, lambda f: load_weights(create_model('demo_cvt', 3), f), lambda f: create_model('demo_cvt', 3, pretrained=f)):
        with pytest.raises(exc, match=match) as e: go(f)
        assert str(f) in str(e.value)

def test_missing(tmp_path):
    refused(tmp_path/'no.safetensors', 'there is no such file', FileNotFoundError)
    refused(tmp_path, 'there is no such file', FileNotFoundError)

@pytest.mark.parametrize('keep', [0, 4, 8, 100, -1, -5000])
def test_cut_short(good, keep):
    good.write_bytes(good.read_bytes()[:keep])
    refused(good, 'no safetensors file, or was cut short')

@pytest.mark.parametrize('data', [b'<html>not found</html>'*100, b'\0'*4096, b'\xff'*4096, json.dumps(dict(a=1)).encode()])
def test_not_safetensors(tmp_path, data):
    (tmp_path/'a.safetensors').write_bytes(data)
    refused(tmp_path/'a.safetensors', 'no safetensors file, or was cut short')

@pytest.mark.parametrize('zipped', [True,False])
def test_pickles_are_refused_and_not_run(tmp_path, zipped):
    f = tmp_path/'a.pth'
    torch.save(dict(a=Trap(tmp_path/'ran')), f, _use_new_zipfile_serialization=zipped)
    refused(f, r'is a pickle \(torch.save\).*weights_only=True')
    assert not (tmp_path/'ran').exists()

def test_the_remedy_for_pickles_works(tmp_path):
    m = create_model('demo_cvt', 3)
    torch.save(m.state_dict(), tmp_path/'a.pth')
    assert load_weights(create_model('demo_cvt', 3), torch.load(tmp_path/'a.pth', weights_only=True))==dict(new=[], resized=[])

@pytest.mark.parametrize('meta', [dict(format=None, model=None, args=None), dict(format='pt'), dict(model=None)])
def test_header_without_a_name(good, meta):
    refused(rewrite(good, good.with_name('b.safetensors'), **meta), 'names no model in its header')

def test_unknown_model(good):
    f = rewrite(good, good.with_name('b.safetensors'), model='demo_cvd')
    refused(f, "header asks for what cannot be made: unknown model 'demo_cvd': did you mean 'demo_cvt'")

@pytest.mark.parametrize('args', ['not json', '[1, 2]', '7', '{"pretrained": true}', '{"pretrained": "/etc/passwd"}', '{"name": "vit_mini"}'])
def test_unusable_arguments(good, args):
    refused(rewrite(good, good.with_name('b.safetensors'), args=args), 'no usable arguments')

@pytest.mark.parametrize('args', ['{"num_classes": "ten"}', '{"width": 3}', '{"dims": 7}', '{"img_size": 30}', '{"drop_path": 3}', '{"heads": [5]}', '{"padding_mode": {}}'])
def test_arguments_that_make_no_network(good, args):
    refused(rewrite(good, good.with_name('b.safetensors'), args=args), 'header asks for what cannot be made')

def test_tensors_that_do_not_fit(good):
    sd = load_file(good)
    more = {**sd, 'extra':torch.zeros(1)}
    less = {k:v for k,v in sd.items() if k!='norm.bias'}
    for bad,name in ((more,'extra'), (less,'norm.bias'), ({**sd, 'norm.bias':torch.zeros(3)},'norm.bias')):
        refused(rewrite(good, good.with_name('b.safetensors'), bad), f'1 tensors do not fit the demo_cvt of its header, such as {name}')
    refused(rewrite(good, good.with_name('c.safetensors'), args='{"num_classes": 4}'), 'head.bias, head.weight')

def test_a_header_cannot_ask_for_memory(good):
    "A terabyte is refused before a byte of it is taken"
    refused(rewrite(good, good.with_name('b.safetensors'), args='{"num_classes": 3, "dims": [400000]}'), 'do not fit')

def test_the_side_tasks_mlp_is_no_network():
    f = next(OWN.glob('*.mlp.safetensors'), None)
    if f is None: pytest.skip('no committed MLP')
    with pytest.raises(ValueError, match="cvt_mini takes no 'dim'"): load_model(f)

@pytest.mark.parametrize('name,kw', [('vit_mini',dict(patch=3, img_size=33)), ('vit_mini',dict(patch=2, img_size=30)), ('t2t_mini',dict(splits=((3,2,1),), img_size=34)), ('cvt_mini',dict(strides=(3,2), img_size=36))])
def test_options_that_shrink_otherwise(name, kw):
    "The multiple of the default is not asked for where an option sets another; the network checks for itself"
    s = kw['img_size']
    assert create_model(name, 3, **kw)(torch.randn(2, 3, s, s)).shape==(2,3)

def test_the_other_factor_is_checked():
    with pytest.raises(ValueError, match='total stride 3; resize to 33 x 33'): create_model('vit_mini', patch=3)

def test_each_module_gets_its_mode_back():
    "After an error too"
    m = create_model('resnet_mini').train()
    m.layer1.eval()
    before = [o.training for o in m.modules()]
    with pytest.raises(OSError):
        with in_evaluation(m):
            assert not any(o.training for o in m.modules())
            raise OSError
    assert [o.training for o in m.modules()]==before and len(set(before))==2

@pytest.mark.parametrize('name', ['cvt_mini','cvt_13_gap_mini','hybrid_s'])
def test_the_head_hands_back_a_gradient_in_the_layout_of_tokens(name):
    "Laid out as a grid it would go down the residual path so, and be rearranged in every block"
    from vt_drloc.tokens import to_tokens
    m = create_model(name, img_size=32).train()
    f = m.forward_features(torch.randn(2, 3, 32, 32))
    assert f.ndim==4 and to_tokens(f).is_contiguous()
    assert to_tokens(torch.autograd.grad(m.forward_head(f).sum(), f)[0]).is_contiguous()
