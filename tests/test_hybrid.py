"The small CvT, and the grid of other libraries' features"
import pytest, torch
from torch import nn
from einops import rearrange
from vt_drloc.vit import ViT, vit_mini
from vt_drloc.hybrid import *

torch.manual_seed(0)

def cvt(**kw):
    torch.manual_seed(0)
    return CvT(**{**dict(dims=(16,24), depths=(1,2), heads=(2,3)), **kw})

# --- CvT

def test_cvt_mini_fits():
    m = cvt_mini()
    n = sum(p.numel() for p in m.parameters())
    assert 1.2e6 < n < 1.5e6
    assert sum(v.numel()*v.element_size() for v in m.state_dict().values()) < 6e6
    assert m.total_stride==4 and m.num_features==128 and m.num_prefix_tokens==0
    x = torch.randn(2,3,32,32)
    assert m.forward_features(x).shape==(2,128,8,8)
    assert m(x).shape==(2,10)

def test_cvt_not_square_and_head():
    m = cvt().eval()
    x = torch.randn(2,3,16,40)
    f = m.forward_features(x)
    assert f.shape==(2,24,4,10)
    torch.testing.assert_close(m.forward_head(f), m(x))
    torch.testing.assert_close(m.forward_head(f, pre_logits=True), f.mean((2,3)))

@pytest.mark.parametrize('hw', [(30,32),(32,30),(33,33)])
def test_total_stride(hw):
    with pytest.raises(ValueError, match=rf'{hw[0]} x {hw[1]}.*total stride 4.*resize to 32 x 32'):
        cvt()(torch.randn(1,3,*hw))

def test_heads_must_divide():
    with pytest.raises(ValueError, match='16.*heads 3'): cvt(heads=(3,3))

@pytest.mark.parametrize('train', [False,True])
@pytest.mark.parametrize('mode', ['reflect','replicate','circular'])
def test_constant_image_constant_grid(mode, train):
    "In double precision, since BatchNorm magnifies the rounding of a constant"
    m = cvt(padding_mode=mode, drop_path=.5).double().train(train)
    x = torch.rand(4,3,1,1).double().expand(4,3,16,24)
    g = m.forward_features(x)
    assert (g-g[...,:1,:1]).abs().max() < 1e-9
    m = cvt(padding_mode='zeros').double().train(train)
    g = m.forward_features(x)
    assert (g-g[...,:1,:1]).abs().max() > 1e-2

def test_padding_mode_reaches_every_padded_convolution():
    m = cvt(padding_mode='reflect')
    convs = [c for c in m.modules() if isinstance(c, nn.Conv2d)]
    assert convs and all(c.padding_mode=='reflect' for c in convs if c.kernel_size!=(1,1))

def test_no_copies_between_blocks():
    "Grids stay channels-last in memory, so tokens and grid are views of each other"
    m = cvt().eval()
    assert m.stages(torch.randn(2,3,16,16)).is_contiguous(memory_format=torch.channels_last)

def test_drop_path_rises():
    assert [round(b.drop_path.p, 3) for b in cvt(drop_path=.2).modules() if isinstance(b, ConvBlock)]==[0., .1, .2]

def test_gradients_reach_every_parameter():
    m = cvt()
    m(torch.randn(4,3,16,16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())

def test_bf16_autocast():
    m = cvt()
    with torch.autocast('cpu', torch.bfloat16): loss = m(torch.randn(2,3,16,16)).float().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())

# --- features_to_grid

T = lambda *s: torch.randn(*s)

@pytest.mark.parametrize('hw,img,prefix', [((8,8),(32,32),0), ((8,8),(32,32),1), ((4,10),(16,40),2), ((10,4),(40,16),1), ((1,1),(32,32),1)])
def test_tokens(hw, img, prefix):
    f = T(2, prefix+hw[0]*hw[1], 12)
    g = features_to_grid(f, img, prefix)
    assert g.shape==(2,12,*hw)
    torch.testing.assert_close(g[:,:,-1,-1], f[:,-1])
    torch.testing.assert_close(g[:,:,0,0], f[:,prefix])

def test_4d_by_aspect():
    f = T(2,12,4,10)
    assert features_to_grid(f, (16,40)) is f
    torch.testing.assert_close(features_to_grid(rearrange(f, 'b d h w -> b h w d'), (16,40)), f)

def test_4d_by_num_features():
    "With D given the grid needs not keep the image's proportions exactly: strides round up"
    f = T(2,12,4,3)
    assert features_to_grid(f, (100,70), num_features=12) is f
    torch.testing.assert_close(features_to_grid(rearrange(f, 'b d h w -> b h w d'), (100,70), num_features=12), f)

@pytest.mark.parametrize('hw,img', [((8,8),(299,299)), ((1,2),(75,107)), ((3,4),(96,128)), ((29,18),(224,140)), ((113,113),(224,224)), ((5,1),(160,33)), ((7,7),(224,288))])
def test_4d_grids_of_networks_that_pad_or_round(hw, img):
    "A cell or two more or less along an axis is no contradiction"
    f = T(2,11,*hw)
    assert features_to_grid(f, img, num_features=11) is f

def test_4d_both_axes_equal_d():
    f = T(2,10,4,10)                                    # (B,D,h,w) with D = w = 10
    assert features_to_grid(f, (16,40), num_features=10) is f
    with pytest.raises(ValueError, match='which axis is D'): features_to_grid(T(2,8,8,8), (32,32), num_features=8)

@pytest.mark.parametrize('shape,img,kw,match', [
    ((2,8,8,8), (32,32), {}, 'which axis is D.*num_features'),
    ((2,12,4,3), (100,70), {}, 'which axis is D'),
    ((2,12,4,10), (16,40), dict(num_features=7), 'which axis is D'),
    ((2,65,12), (32,32), {}, '65 tokens less 0.*num_prefix_tokens'),
    ((2,64,12), (32,64), {}, '64 tokens.*num_prefix_tokens'),
    ((2,64,12), (32,32), dict(num_features=64), 'not D = 64'),
    ((2,1,12), (32,32), dict(num_prefix_tokens=1), 'num_prefix_tokens'),
    ((2,12), (32,32), {}, 'no spatial grid'),
    ((2,512,7,7), (224,224), dict(num_features=7), 'with D = 7 its grid would be 512 x 7, which no stride.*num_features.*layout'),
    ((2,7,7,512), (224,224), dict(num_features=7), 'its grid would be 7 x 512'),
    ((2,12,4,40), (224,224), dict(num_features=12), 'its grid would be 4 x 40'),
])
def test_refused(shape, img, kw, match):
    with pytest.raises(ValueError, match=match) as e: features_to_grid(T(*shape), img, **kw)
    assert str(shape) in str(e.value) and f'{img[0]} x {img[1]}' in str(e.value)

# --- adapters

def capture(model, ad, x):
    "The model's own forward with its tap watched, as the callback does it"
    (owner,attr),out = ad.tap,[]
    orig = getattr(owner, attr)
    setattr(owner, attr, lambda *a,**k: out.append(orig(*a,**k)) or out[-1])
    try: y = model(x)
    finally: delattr(owner, attr)
    assert len(out)==1
    return out[0],y

@torch.no_grad()
def check(model, img, hw, D, want, head=True, tap=None):
    "`want(x)`: the grid by hand"
    model.eval()
    keys = list(model.state_dict())
    ad = as_backbone(model, tap)
    x = torch.randn(2, 3, *img)
    out,y = capture(model, ad, x)
    g = ad.grid(out, img)
    assert g.shape==(2,D,*hw)
    torch.testing.assert_close(g, want(x))
    f = ad.forward_features(x)
    torch.testing.assert_close(ad.grid(f, img), g)
    if head: torch.testing.assert_close(ad.forward_head(f), y)
    assert list(model.state_dict())==keys and not any('forward' in vars(m) for m in model.modules())
    if ad.num_features is not None: assert ad.num_features==D
    return ad

def tokens_by_hand(n, h, w): return lambda f: rearrange(f[:,n:], 'b (h w) d -> b d h w', h=h, w=w)

@pytest.mark.parametrize('img', [(16,16),(16,24)])
@pytest.mark.parametrize('pool', ['token','avg'])
def test_our_vit(pool, img):
    m = ViT(img_size=img, patch=4, dim=24, depth=1, heads=2, pool=pool)
    h,w = img[0]//4,img[1]//4
    check(m, img, (h,w), 24, lambda x: tokens_by_hand(pool=='token', h, w)(m.forward_features(x)))

def test_our_cvt_even_if_d_equals_w():
    m = cvt(dims=(16,4), heads=(2,1))
    check(m, (16,16), (4,4), 4, m.forward_features)

timm = pytest.importorskip('timm')

@pytest.mark.parametrize('img', [(32,32),(32,48)])
def test_timm_vit(img):
    m = timm.create_model('vit_tiny_patch16_224', img_size=img, patch_size=8, depth=2, num_classes=10)
    h,w = img[0]//8,img[1]//8
    check(m, img, (h,w), 192, lambda x: tokens_by_hand(1, h, w)(m.forward_features(x)))

def test_timm_distilled_two_prefix_tokens():
    m = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, patch_size=8, depth=1, num_classes=10)
    check(m, (32,32), (4,4), 192, lambda x: tokens_by_hand(2,4,4)(m.forward_features(x)))

def test_timm_cait_class_token_comes_in_without_a_count():
    m = timm.create_model('cait_xxs24_224', img_size=32, patch_size=8, depth=1, num_classes=10)
    check(m, (32,32), (4,4), 192, lambda x: tokens_by_hand(1,4,4)(m.forward_features(x)))

@pytest.mark.parametrize('img', [(64,64),(64,128)])
def test_timm_swin(img):
    m = timm.create_model('swin_tiny_patch4_window7_224', img_size=img, window_size=4, embed_dim=16, depths=(1,1,1,1), num_heads=(1,1,2,2), num_classes=10)
    check(m, img, (img[0]//32,img[1]//32), 128, lambda x: m.forward_features(x).permute(0,3,1,2))

@pytest.mark.parametrize('name,D', [('convnext_atto',320),('resnet18',512),('pvt_v2_b0',256),('mobilenetv3_small_050',288)])
def test_timm_four_dimensional(name, D):
    m = timm.create_model(name, num_classes=10)
    check(m, (64,96), (2,3), D, m.forward_features)

tv = pytest.importorskip('torchvision.models')

def test_torchvision_resnet18():
    m = tv.resnet18(num_classes=10)
    body = nn.Sequential(*list(m.children())[:-2])
    check(m, (64,96), (2,3), 512, body)
    check(m, (70,100), (3,4), 512, body)          # sides that are no multiples of 32
    m.fc = nn.Identity()
    assert as_backbone(m).num_features is None

def test_torchvision_swin():
    m = tv.swin_transformer.SwinTransformer([4,4], 16, [1,1,1,1], [1,1,2,2], [4,4], num_classes=10)
    check(m, (64,96), (2,3), 128, lambda x: m.norm(m.features(x)).permute(0,3,1,2))

def test_torchvision_vit():
    m = tv.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=10)
    def by_hand(x):
        t = m._process_input(x)
        return tokens_by_hand(1,4,4)(m.encoder(torch.cat([m.class_token.expand(len(t),-1,-1), t], 1)))
    check(m, (32,32), (4,4), 24, by_hand)

def test_torchvision_convnext():
    C = tv.convnext.CNBlockConfig
    m = tv.ConvNeXt([C(16,32,1),C(32,None,1)], num_classes=10)
    check(m, (32,48), (4,6), 32, m.features)

@pytest.mark.parametrize('name,D,img', [('mobilenet_v3_small',576,(64,96)), ('densenet121',1024,(64,96)), ('regnet_y_400mf',440,(64,96)),
    ('squeezenet1_1',512,(64,96)), ('alexnet',256,(128,128)), ('shufflenet_v2_x0_5',1024,(64,96)), ('mnasnet0_5',1280,(64,96))])
def test_torchvision_others(name, D, img):
    m = tv.get_model(name, num_classes=10).eval()
    ad = as_backbone(m)
    x = torch.randn(1,3,*img)
    with torch.no_grad():
        out,y = capture(m, ad, x)
        g = ad.grid(out, img)
        assert g.shape[1]==D==ad.num_features and min(g.shape[2:])>1
        if ad.head is not None: torch.testing.assert_close(ad.forward_head(out), y)

def test_torchvision_maxvit():
    m = tv.MaxVit((64,64), 8, 8, [8,16], [1,1], 8, 0., num_classes=10)
    def by_hand(x):
        x = m.stem(x)
        for b in m.blocks: x = b(x)
        return x
    check(m, (64,64), (8,8), 16, by_hand, head=False)

hf = pytest.importorskip('transformers')

def hf_check(m, img, hw, D, want): return check(m, img, hw, D, want, head=False)

def test_unpack_is_traceable():
    from transformers.modeling_outputs import BaseModelOutput
    unpack = as_backbone(cvt()).unpack
    f = torch.compile(lambda x: unpack(BaseModelOutput(last_hidden_state=x*2)), fullgraph=True, backend='eager')
    x = torch.randn(3)
    torch.testing.assert_close(f(x), x*2)
    torch.testing.assert_close(unpack((x,)), x)

def test_transformers_vit():
    m = hf.ViTForImageClassification(hf.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8))
    hf_check(m, (32,32), (4,4), 24, lambda x: tokens_by_hand(1,4,4)(m.vit(x).last_hidden_state))

def test_transformers_deit_two_prefix_tokens():
    m = hf.DeiTForImageClassification(hf.DeiTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8))
    hf_check(m, (32,32), (4,4), 24, lambda x: tokens_by_hand(2,4,4)(m.deit(x).last_hidden_state))

def test_transformers_cvt():
    m = hf.CvtForImageClassification(hf.CvtConfig(embed_dim=[8,16,24], num_heads=[1,2,3], depth=[1,2,3], drop_path_rate=[0.,0.,0.]))
    hf_check(m, (32,48), (2,3), 24, lambda x: m.cvt(x).last_hidden_state)

def test_transformers_swin():
    m = hf.SwinForImageClassification(hf.SwinConfig(image_size=64, embed_dim=16, depths=[1,1], num_heads=[1,2], window_size=4))
    hf_check(m, (64,64), (8,8), 32, lambda x: tokens_by_hand(0,8,8)(m.swin(x).last_hidden_state))

def test_transformers_convnext():
    m = hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8,16], depths=[1,1], num_stages=2))
    hf_check(m, (32,48), (4,6), 16, lambda x: m.convnext(x).last_hidden_state)

def test_transformers_in_a_wrapper():
    class Logits(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m
        def forward(self, x): return self.m(x).logits
    m = hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8,16], depths=[1,1], num_stages=2))
    check(Logits(m), (32,32), (4,4), 16, lambda x: m.convnext(x).last_hidden_state, head=False)

def test_fastai_vision_models():
    vision = pytest.importorskip('fastai.vision.all')
    m = vision.create_vision_model(tv.resnet18, n_out=10, pretrained=False)
    check(m, (64,96), (2,3), 512, m[0])
    m = vision.create_timm_model('resnet18', n_out=10, pretrained=False)[0]
    check(m, (64,96), (2,3), 512, m[0], head=False)
    m = vision.create_timm_model('vit_tiny_patch16_224', n_out=10, pretrained=False, img_size=32, patch_size=8, depth=1)[0]
    check(m, (32,32), (4,4), 192, lambda x: tokens_by_hand(1,4,4)(m[0].model.forward_features(x)), head=False)

def test_fastai_xresnet():
    xr = pytest.importorskip('fastai.vision.models.xresnet')
    m = xr.xresnet18(n_out=10)
    check(m, (64,96), (2,3), 512, nn.Sequential(*list(m)[:-4]))

def test_normalizing_wrapper():
    m = nn.Sequential(nn.BatchNorm2d(3), cvt())
    check(m, (16,24), (4,6), 24, lambda x: m[1].forward_features(m[0](x)), head=False)

# --- unwrapping, taps, refusals

def test_unwraps_in_any_order():
    m = cvt()
    for wrapped in (torch.compile(m, backend='eager'), nn.DataParallel(m), nn.DataParallel(torch.compile(m, backend='eager')),
                    torch.compile(nn.DataParallel(m), backend='eager')):
        ad = as_backbone(wrapped)
        assert ad.model is m and ad.tap==(m,'forward_features')
    assert as_backbone(ad) is ad

def test_pickles():
    "So that a callback which holds an adapter can be exported with its learner"
    import pickle
    m = tv.squeezenet1_1(num_classes=10)
    ad = pickle.loads(pickle.dumps(as_backbone(m)))
    assert ad.tap[0] is ad.model.features and ad.model is not m
    pickle.dumps(as_backbone(tv.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=10)))

def test_stages_must_agree():
    with pytest.raises(ValueError, match='one entry a stage'): CvT(dims=(8,16,32))

def test_tap_by_name():
    m = tv.resnet18(num_classes=10)
    check(m, (64,96), (4,6), 256, lambda x: nn.Sequential(*list(m.children())[:7])(x), head=False, tap='layer3')
    m = cvt()
    assert as_backbone(m, 'stages.0').tap==(m.stages[0],'forward')
    assert as_backbone(nn.Sequential(m), '0.forward_features').tap==(m,'forward_features')
    assert as_backbone(m, (m.stages,'forward')).tap==(m.stages,'forward')
    with pytest.raises(ValueError, match="tap='layer9'.*stages, norm, head"): as_backbone(m, 'layer9')

def test_given_values_win():
    m = nn.Sequential(nn.Conv2d(3,8,4,4), nn.Linear(8,8))
    ad = as_backbone(m, '0', num_features=8, num_prefix_tokens=3, layout='NCHW')
    assert (ad.num_features,ad.num_prefix_tokens,ad.layout)==(8,3,'NCHW')
    assert ad.grid(torch.randn(2,8,8,8), (32,32)).shape==(2,8,8,8)

@pytest.mark.parametrize('layout', ['nchw','NHCW','channels_last',''])
def test_unknown_layouts_are_refused(layout):
    m = nn.Sequential(nn.Conv2d(3,8,4,4), nn.Linear(8,8))
    for call in (lambda: as_backbone(m, '0', layout=layout), lambda: as_backbone(cvt(), layout=layout)):
        with pytest.raises(ValueError, match=f"layout='{layout}' is unknown; choose 'NCHW'"): call()

def test_a_given_layout_needs_no_proportions():
    ad = as_backbone(nn.Sequential(nn.Conv2d(3,8,4,4), nn.Linear(8,8)), '0', num_features=8, layout='NCHW')
    assert ad.grid(torch.randn(2,8,4,40), (224,224)).shape==(2,8,4,40)

def test_nothing_to_tap():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1,self.fc2 = nn.Linear(48,8),nn.Linear(8,2)
    for m,kids in ((Net(),'fc1, fc2'), (nn.Sequential(nn.Flatten(), nn.Linear(48,2)),'0, 1')):
        with pytest.raises(ValueError, match=f"no spatial grid.*tap='...'.*{kids}"): as_backbone(m)

def test_tap_that_is_never_called():
    m = nn.Sequential(cvt())
    with pytest.raises(ValueError, match='never calls'): as_backbone(m, (m[0].norm,'extra_repr')).forward_features(torch.randn(1,3,16,16))

def test_two_backbones_are_ambiguous():
    m = nn.ModuleDict(dict(teacher=cvt(), student=cvt()))
    with pytest.raises(ValueError, match='teacher, student'): as_backbone(m)

def test_pure_shape_logic():
    "No tensor value is looked at: works on the meta device"
    assert features_to_grid(torch.empty(2,65,12, device='meta'), (32,32), 1).shape==(2,12,8,8)

def test_a_tap_that_returns_a_dict_is_refused():
    class Dicts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 8, 4, 4)
        def forward(self, x): return dict(out=self.body(x), aux=x)
    net = nn.Sequential(Dicts())
    with pytest.raises(ValueError, match='returns a dict with out, aux; tap a submodule'):
        as_backbone(net, '0').forward_features(torch.randn(1,3,32,32))
    assert as_backbone(net, '0.body').forward_features(torch.randn(1,3,32,32)).shape==(1,8,8,8)
