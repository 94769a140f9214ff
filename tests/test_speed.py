"The fast modules compute what the slow ones compute; drop path that skips is drop path"
import os, pickle, subprocess, sys
import pytest, torch
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'    # before the kernels are made
from copy import deepcopy
from hypothesis import given, settings, strategies as st
from vt_drloc.attention import Attention, RelativeBias
from vt_drloc.hybrid import as_backbone
from vt_drloc.models import create_model, load_model, save_model
from vt_drloc.speed import *
from vt_drloc.speed_loss import can_fuse
from vt_drloc.speed import _attention, _attention_backward
from vt_drloc.swin import WindowAttention

kernels = pytest.mark.skipif(not can_fuse(torch.zeros(1, device='cuda' if torch.cuda.is_available() else 'cpu')), reason='needs Triton, and without a GPU TRITON_INTERPRET=1 before anything imports it, as make test does')
device = 'cuda' if torch.cuda.is_available() else 'cpu'
far = lambda a,b: ((a-b).norm()/b.norm()).item()

def small(name, **kw):
    "Few blocks: the interpreter is slow"
    return create_model(name, 5, drop_path=.5, **{**(dict(depths=(1,2), dims=(32,64)) if name=='swin_mini' else dict(depth=3)), **kw})

def grads(f, x, params):
    y = f(x)
    g = torch.cos(torch.arange(y.numel(), device=y.device, dtype=y.dtype)).view_as(y)
    return y,*torch.autograd.grad(y, [x,*params], g)

@kernels
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_kernel_is_window_attention(data):
    "Any grid, window, shift and number of heads, also where only one axis is shifted, or none"
    s = data.draw(st.sampled_from([2,3,4,7]))
    shift,nh,nw = (data.draw(st.integers(*b)) for b in ((0,s-1),(1,2),(1,2)))
    heads,d,B = (data.draw(st.sampled_from(o)) for o in ((1,3),(16,32),(1,2)))
    torch.manual_seed(0)
    slow = WindowAttention(heads*d, heads, s, shift).to(device)
    torch.nn.init.normal_(slow.bias.table)
    fast = deepcopy(slow)
    fast.__class__ = FusedWindowAttention
    x = torch.randn(B, nh*s, nw*s, heads*d, device=device, requires_grad=True)
    for a,b in zip(grads(fast, x, fast.parameters()), grads(slow, x, slow.parameters())): assert far(a, b)<1e-5

@kernels
def test_operations_obey_pytorch():
    "Strides, shapes and gradients as declared, for tensors that are not contiguous too: what the compiler relies on"
    def strided(*shape): return torch.randn(shape[0],*shape[:0:-1], device=device).permute(0,3,2,1)
    bias = torch.randn(16,16,2, device=device).permute(2,0,1)
    for qkv,g in ((torch.randn(2,8,4,96, device=device),torch.randn(2,8,4,32, device=device)), (strided(2,8,4,96),strided(2,8,4,32))):
        assert qkv.shape==(2,8,4,96)
        torch.library.opcheck(_attention, (qkv.clone().requires_grad_(),bias.clone().requires_grad_(),2,4,16,2,0))
        torch.library.opcheck(_attention_backward, (qkv,bias,g,2,4,16,2,0))
        torch.library.opcheck(_attention, (qkv[:,:1].clone().requires_grad_(),None,2,4,4,0,0))
        torch.library.opcheck(_attention_backward, (qkv[:,:1],None,g[:,:1],2,4,4,0,0))

@kernels
def test_two_backward_passes_give_the_same_bits():
    qkv,bias,g = (torch.randn(*s, device=device) for s in ((5,8,8,96),(2,16,16),(5,8,8,32)))
    one,two = (_attention_backward(qkv, bias, g, 2, 4, 16, 2, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a,b in zip(one, two))

@kernels
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_kernel_is_attention(data):
    "Any number of tokens up to 64, heads and their width: output and every gradient"
    N,B = data.draw(st.sampled_from([1,2,5,16,49,63,64])),data.draw(st.sampled_from([1,3]))
    heads,d = (data.draw(st.sampled_from(o)) for o in ((1,3),(16,32,64)))
    torch.manual_seed(0)
    slow = Attention(heads*d, heads).to(device)
    fast = deepcopy(slow)
    fast.__class__ = FusedAttention
    x = torch.randn(B, N, heads*d, device=device, requires_grad=True)
    ours,theirs = (grads(f, x, f.parameters()) for f in (fast, slow))
    for name,a,b in zip(('output','x',*(n for n,_ in slow.named_parameters())), ours, theirs):
        if b.norm()<1e-4: assert a.norm()<1e-4                     # one token: its weight is 1 whatever q and k are, their gradients are 0
        else: assert far(a, b)<(1e-4 if name=='qkv.bias' else 1e-5)# its gradient is a sum over all tokens that nearly cancels
    with torch.no_grad(): assert torch.equal(fast(x), ours[0])

@kernels
def test_attention_it_does_not_take_is_the_old_module(monkeypatch):
    "65 tokens, heads of 24, a relative bias, float64: the kernel is not called"
    import vt_drloc.speed as speed
    def refuse(*_): raise AssertionError('the kernel was called')
    monkeypatch.setattr(speed, 'short_attention', refuse)
    torch.manual_seed(0)
    for slow,n,dtype in ((Attention(32, 2),65,torch.float), (Attention(48, 2),4,torch.float), (Attention(32, 2, bias=RelativeBias(4,4,2)),16,torch.float), (Attention(32, 2),16,torch.double)):
        slow = slow.to(device, dtype); fast = deepcopy(slow); fast.__class__ = FusedAttention
        x = torch.randn(2, n, slow.proj.in_features, device=device, dtype=dtype)
        torch.testing.assert_close(fast(x), slow(x))
    fast = Attention(32, 2).to(device); fast.__class__ = FusedAttention
    with pytest.raises(AssertionError, match='was called'): fast(torch.randn(2, 64, 32, device=device))

@kernels
@pytest.mark.parametrize('shape,heads,says', [((1,65,96), 2, '65 tokens: the kernel takes up to 64; use Attention'), ((1,8,97), 2, '97 numbers a cell are not q, k and v of 2 heads'),
    ((1,8,144), 2, 'heads are 24 wide: the kernel takes 16, 32, 64, 128')])
def test_bad_input_of_short_attention(shape, heads, says):
    with pytest.raises(ValueError, match=says): short_attention(torch.zeros(shape, device=device), heads)

def test_where_the_kernel_cannot_run_it_is_the_old_module():
    slow = WindowAttention(32, 2, 4, 2).double()
    fast = deepcopy(slow)
    fast.__class__ = FusedWindowAttention
    assert not can_fuse(torch.zeros(1).double())
    x = torch.randn(2,8,8,32).double()
    assert torch.equal(fast(x), slow(x))
    padded = torch.randn(2,6,7,32)
    assert torch.equal(fast.float()(padded), slow.float()(padded))

@kernels
@pytest.mark.parametrize('shape,bias,heads,s,says', [
    ((1,6,8,96), (2,16,16), 2, 4, r'grid 6 x 8: it does not divide into windows of 4'),
    ((1,8,8,97), (2,16,16), 2, 4, r'97 numbers a cell are not q, k and v of 2 heads'),
    ((1,8,8,96), (2,9,9), 2, 4, r'bias is \(2, 9, 9\), wanted \(2, 16, 16\)')])
def test_bad_input_of_window_attention(shape, bias, heads, s, says):
    with pytest.raises(ValueError, match=says): window_attention(torch.zeros(shape, device=device), torch.zeros(bias, device=device), heads, s)

def test_where_it_cannot_run_it_says_so():
    with pytest.raises(ValueError, match='float64 on cpu: the kernel needs a GPU with Triton'):
        window_attention(torch.zeros(1,8,8,96).double(), torch.zeros(2,16,16).double(), 2, 4)
    with pytest.raises(ValueError, match='float64 on cpu.*; use Attention'): short_attention(torch.zeros(1,8,96).double(), 2)

def test_skip_is_unbiased_and_exact_for_those_it_drops():
    "The mean over draws is x + f(x); a dropped image passes with gradient 1; the number is fixed"
    torch.manual_seed(0)
    x = torch.randn(20,3, requires_grad=True)
    total,n = torch.zeros(20,3),4000
    for _ in range(n):
        y = skip_branch(x.detach(), torch.exp, .25)
        kept = (y!=x).any(1)
        assert kept.sum()==15
        torch.testing.assert_close(y[kept], (x+x.exp()*20/15)[kept].detach())
        total += y
    se = (x.exp()*(20/15)*(.25*.75/n)**.5).detach()
    assert ((total/n-(x+x.exp()).detach()).abs()/se).max()<5
    y = skip_branch(x, torch.exp, .25)
    kept = (y!=x).any(1)
    g, = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, torch.where(kept[:,None], 1+x.exp()*20/15, torch.ones(())).detach())

@pytest.mark.parametrize('B,p,n', [(1,.9,1), (2,.2,2), (10,.3,7), (128,.2,102), (4,.99,1)])
def test_how_many_are_kept(B, p, n):
    seen = []
    skip_branch(torch.zeros(B,1), lambda z: seen.append(len(z)) or z, p)
    assert seen==[n]

@pytest.mark.parametrize('name', ['swin_mini','vit_mini','t2t_mini'])
def test_evaluation_and_names_stay(name, tmp_path):
    "Same names, same values, same logits in evaluation, same grid; a checkpoint goes both ways"
    torch.manual_seed(0)
    slow = small(name).eval()
    fast = deepcopy(slow)
    done = speed_up(fast)
    assert done['drop_path']==2 and done['attention']==3 and done['patches']==(name!='t2t_mini')
    assert speed_up(fast)==dict(attention=0, drop_path=0, patches=0)
    assert list(fast.state_dict())==list(slow.state_dict())
    x = torch.randn(2,3,32,32)
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-5, atol=1e-6)
    grids = [b.grid(b.forward_features(x), (32,32)) for b in map(as_backbone, (fast,slow))]
    torch.testing.assert_close(*grids, rtol=1e-5, atol=1e-5)
    save_model(fast, tmp_path/'m.safetensors')
    torch.testing.assert_close(load_model(tmp_path/'m.safetensors')(x), slow(x))

@settings(max_examples=20, deadline=None)
@given(st.data())
def test_patches_as_a_product(data):
    "Outputs and gradients of the convolution, any patch and any image; in float64, so that rounding hides nothing"
    patch,rows,cols,dim,channels,B = (data.draw(st.integers(*r)) for r in ((1,5),(1,4),(1,4),(1,9),(1,4),(1,3)))
    x = torch.randn(B, channels, patch*rows, patch*cols, dtype=torch.double, requires_grad=True)
    for kind in PATCHES:
        slow = kind(patch, dim, channels).double()
        quick = deepcopy(slow)
        quick.__class__ = PATCHES[kind]
        w = torch.randn_like(slow(x))
        got,want = ([y,*torch.autograd.grad((y*w).sum(), [x,*m.parameters()])] for m in (quick,slow) for y in [m(x)])
        for a,b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)

def test_patches_that_do_not_fit_say_so():
    m = small('vit_mini')
    speed_up(m)
    with pytest.raises(ValueError, match='image 30 x 32: each side must be a multiple'): m.patch_embed(torch.zeros(1,3,30,32))

def test_networks_with_blocks_of_their_own_are_left_alone():
    m = create_model('cvt_13_mini', 5, drop_path=.4)
    assert speed_up(m)==dict(attention=0, drop_path=0, patches=0)

def test_a_sped_up_swin_can_be_pickled():
    "`Learner.export` pickles the model"
    m = small('swin_mini')
    speed_up(m)
    x = torch.randn(1,3,32,32)
    torch.testing.assert_close(pickle.loads(pickle.dumps(m)).eval()(x), m.eval()(x))

@kernels
@pytest.mark.parametrize('name,side,kw', [('swin_mini',16,dict(depths=(2,1))), ('vit_mini',32,{}), ('hybrid_s',32,dict(stem=(8,16),residuals=1,dim=32,heads=2))])
def test_compiles_whole(name, side, kw):
    "No break in the graph, in training and in evaluation, under autocast too; windows at rest, shifted and alone on their grid"
    torch.manual_seed(0)
    m = small(name, **kw).to(device)
    speed_up(m)
    torch._dynamo.reset()
    c = torch.compile(m, backend='aot_eager', fullgraph=True, dynamic=False)
    x = torch.randn(2,3,side,side, device=device)
    with torch.autocast(device, torch.bfloat16): loss = c(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    m.eval()
    with torch.no_grad(): torch.testing.assert_close(c(x), m(x))

@pytest.mark.cuda
@pytest.mark.parametrize('name', ['swin_mini','hybrid_s','hybrid_m'])
@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16,.02), (torch.float16,.005)])
def test_compiled_and_eager_gradients_on_a_gpu(name, dtype, tol):
    "The kernel in half precision against the old module in float32, compiled by Inductor and eager"
    torch.manual_seed(0)
    slow = create_model(name, 5).to(device)
    fast = deepcopy(slow)
    speed_up(fast)
    x = torch.randn(16,3,32,32, device=device)
    flat = lambda loss, m: torch.cat([g.flatten() for g in torch.autograd.grad(loss, m.parameters())])
    def half(f, m):
        with torch.autocast(device, dtype): return flat(f(x).float().square().mean(), m)
    want = flat(slow(x).square().mean(), slow)
    tol = max(tol, 1.3*far(half(slow, slow), want))                 # hybrids: batch norm in half precision is farther off than that by itself
    torch._dynamo.reset()
    for f in (fast, torch.compile(fast, fullgraph=True, dynamic=False)): assert far(half(f, fast), want)<tol

@kernels
@pytest.mark.parametrize('dim,heads,window', [(48,2,4), (16,2,4), (32,2,12)])
def test_windows_that_the_kernel_cannot_take(dim, heads, window):
    "Heads 24 or 8 wide, windows of 144 cells: the old module's steps, and an error for who calls the kernel"
    torch.manual_seed(0)
    old = WindowAttention(dim, heads, window).to(device)
    new,x = deepcopy(old),torch.randn(2, 12, 12, dim, device=device)
    new.__class__ = FusedWindowAttention
    assert torch.equal(old(x), new(x))
    with pytest.raises(ValueError, match='the kernel takes'): window_attention(new.qkv(x), new.bias(), heads, window)

COMPILE = '''
import triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
import vt_drloc.speed as s
names,numbers = s._window_backward.arg_names,dict(bias='*fp32', dbias='*fp32', B='i32', H='i32', W='i32', scale='fp32')     # the larger of the two kernels
for fixed in (dict(HEADS=3, D=32, S=7, N=49, P=64, SR=3, SC=3, BIAS=True), dict(HEADS=4, D=64, S=8, N=64, P=64, SR=0, SC=0, BIAS=False)):
    fixed |= dict(PREC='tf32')
    sig = {k: 'constexpr' if k in fixed else numbers.get(k, '*fp16') for k in names}
    made = triton.compile(ASTSource(s._window_backward, sig, constexprs={(names.index(k),):v for k,v in fixed.items()}), target=GPUTarget('cuda', 75, 32))
    assert '.entry _window_backward' in made.asm['ptx'] and made.metadata.shared<=64*1024
print('done')'''

@kernels
def test_kernels_compile_for_a_gpu_that_is_not_there():
    "For Swin-T's windows and a hybrid's 64 tokens on a T4, as Colab lends it, which has 64 KiB a program"
    env = {k:v for k,v in os.environ.items() if k!='TRITON_INTERPRET'}
    res = subprocess.run([sys.executable,'-c',COMPILE], capture_output=True, text=True, env=env)
    assert res.stdout.strip()=='done', res.stderr
