"The fused attention of chapter 2: which of PyTorch's kernels it allows, eager, compiled and on a GPU"
import pytest, torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from vt_drloc import attention
from vt_drloc.attention import attend, fused_attention
from vt_drloc.models import create_model

have = torch.backends.cuda
def allowed(): return dict(cudnn=have.cudnn_sdp_enabled(), flash=have.flash_sdp_enabled(), efficient=have.mem_efficient_sdp_enabled(), math=have.math_sdp_enabled())
everything = dict(cudnn=True, flash=True, efficient=True, math=True)

@pytest.fixture
def as_on_a_gpu(monkeypatch): monkeypatch.setattr(attention, '_may_take_cudnn', lambda x: True)

@pytest.fixture
def heard(monkeypatch):
    "What is allowed while PyTorch's function runs"
    told,real = [],F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *a, **kw: (told.append(allowed()), real(*a, **kw))[1])
    return told

def parts(n=6, m=9): return torch.randn(2, 3, n, 8), torch.randn(2, 3, m, 8), torch.randn(2, 3, m, 5)

@pytest.mark.parametrize('bias,scale', [(None,None), (torch.linspace(-2, 2, 54).view(6, 9),None), (None,.7), (torch.linspace(-2, 2, 54).view(6, 9),.7)])
def test_it_does_what_attend_does(bias, scale, as_on_a_gpu):
    q,key,v = parts()
    torch.testing.assert_close(fused_attention(q, key, v, bias, scale), attend(q, key, v, bias, scale), rtol=1e-5, atol=1e-6)

def test_cudnn_is_left_out_and_comes_back(as_on_a_gpu, heard):
    assert allowed()==everything
    fused_attention(*parts())
    with pytest.raises(RuntimeError): fused_attention(*parts(), bias=torch.zeros(7, 7))
    assert heard==[dict(everything, cudnn=False)]*2 and allowed()==everything

def test_what_a_user_allows_stays(as_on_a_gpu, heard):
    "One kernel alone, two of them, cuDNN's forbidden by its switch, and cuDNN's alone, which is a choice too"
    B,no = SDPBackend,dict.fromkeys(everything, False)
    with sdpa_kernel(B.MATH): fused_attention(*parts())
    with sdpa_kernel([B.CUDNN_ATTENTION, B.MATH]): fused_attention(*parts())
    try: have.enable_cudnn_sdp(False); fused_attention(*parts())
    finally: have.enable_cudnn_sdp(True)
    assert heard==[dict(no, math=True)]*2 + [dict(everything, cudnn=False)]
    with sdpa_kernel(B.CUDNN_ATTENTION): assert attention._but_cudnn()==[]

def test_a_case_of_the_benchmark_can_take_it(as_on_a_gpu, heard):
    "By PyTorch's own switches, which belong to the case's process"
    from vt_drloc.bench import Case, _switches
    try:
        _switches(Case('s', 'n', cudnn=True, precision='float32'), 'cpu')
        assert allowed()==dict.fromkeys(everything, False) | dict(cudnn=True) and attention._but_cudnn()==[]
    finally: have.enable_flash_sdp(True); have.enable_mem_efficient_sdp(True); have.enable_math_sdp(True)
    _switches(Case('s', 'n', precision='float32'), 'cpu')
    assert allowed()==everything

def test_on_the_cpu_nothing_is_asked(monkeypatch, heard):
    monkeypatch.setattr(attention, '_but_cudnn', lambda: pytest.fail('asked'))
    fused_attention(*parts())
    assert heard==[everything]

def kernels_of(graphs): return {str(n.target).split('.')[1] for g in graphs for n in g.graph.nodes if 'attention' in str(n.target)}

def test_compiled_in_one_graph_with_what_is_allowed(as_on_a_gpu):
    "The graph's kernel is chosen while cuDNN's is forbidden, and by what the user allows"
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs,args = [],[torch.randn(2, 3, n, 8, requires_grad=True) for n in (6,9,9)]
    def keep(g, _): graphs.append(g); return make_boxed_func(g.forward)
    f = torch.compile(fused_attention, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    torch.testing.assert_close(f(*args), attend(*args), rtol=1e-5, atol=1e-6)
    assert '_scaled_dot_product_flash_attention_for_cpu' in kernels_of(graphs)
    graphs.clear(); torch._dynamo.reset()
    with sdpa_kernel(SDPBackend.MATH): torch.testing.assert_close(f(*args), attend(*args), rtol=1e-5, atol=1e-6)
    assert graphs and not kernels_of(graphs) and allowed()==everything

@pytest.mark.parametrize('name', ['hybrid_s','cvt_mini','vit_mini','swin_mini','t2t_mini','cvt_13_gap_mini'])
def test_every_network_goes_through_it(name, as_on_a_gpu, heard):
    create_model(name, 3, img_size=32)(torch.randn(2, 3, 32, 32))
    assert heard and all(o==dict(everything, cudnn=False) for o in heard)

device = 'cuda' if torch.cuda.is_available() else 'cpu'

@pytest.mark.parametrize('compiled', [False,True] if device=='cuda' else [False])
@pytest.mark.parametrize('keys', [49,64,192,197])
@pytest.mark.parametrize('masked', [False,True])
def test_gradients_are_finite_and_right(keys, masked, compiled):
    """With similarities of -120 and 64 keys beyond a multiple of 128, cuDNN's backward pass gave NaN on a GPU, torch 2.11 and later.
    In the first channel large keys cancel, which bfloat16 cannot hold; the others are compared with float32"""
    torch.manual_seed(0); torch._dynamo.reset()
    q,key,v,dout = (.1*torch.randn(4, 2, keys, 32, device=device) for _ in range(4))
    q[...,0],key[...,0] = 1.,-120*32**.5
    bias = torch.zeros(keys, keys, device=device) if masked else None
    def gradients(f, dtype):
        args = [t.bfloat16().to(dtype).requires_grad_() for t in (q, key, v)]
        return torch.autograd.grad(f(*args, None if bias is None else bias.to(dtype)), args, dout.bfloat16().to(dtype))
    got = gradients(torch.compile(fused_attention, fullgraph=True) if compiled else fused_attention, torch.bfloat16)
    assert all(g.isfinite().all() for g in got)
    for g,w in zip(got, gradients(attend, torch.float32)): assert (g.float()-w)[...,1:].norm() < .03*w[...,1:].norm()
