"A step taken apart: names of kernels, traces, sums, arithmetic, the record"
import io, json, os
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vt_drloc import profile
from vt_drloc.bench import Case, Steps, prepare
from vt_drloc.loss import LocalizationMLP
from vt_drloc.models import create_model, list_models
from vt_drloc.pairs import gather_pairs
from vt_drloc.profile import *
from vt_drloc.profile import _pieces
from vt_drloc.speed import speed_up

# --- names, as profiles on Ampere and Hopper show them (template arguments shortened)

NAMES = {
    'matrix products': ['nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT', 'nvjet_hsh_64x8_64x16_2x1_v_bz_splitK_TNT', 'ampere_sgemm_128x64_tn', 'ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_nn',
        'sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas', 'void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_32x3_nn_align4>',
        'void cutlass::Kernel2<cutlass_80_simt_sgemm_128x128_8x4_nt_align1>', 'void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>', 'void gemv2T_kernel_val<int, int, float>',
        'triton_tem_fused_addmm_t_view_3', 'triton_tem_fused_addmm_gelu_4', 'aten::mm', 'aten::addmm', 'aten::bmm'],
    'attention': ['_window_forward', '_window_backward', 'void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<32, 128, 128, 4>, false, false>', 'void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<(int)64>>',
        'void pytorch_flash::flash_bwd_dot_do_o_kernel<true>', 'fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)', 'fmha_cutlassB_bf16_aligned_128x128_k128_sm80',
        'cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x', 'cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x', 'triton_tem_fused_flex_attention_1',
        'aten::_scaled_dot_product_flash_attention_for_cpu_backward'],
    'convolution': ['sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64', 'sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc', 'sm80_xmma_dgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc',
        'void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_64x64>', 'void conv2d_grouped_direct_kernel<float>', 'void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>',
        'void at::native::(anonymous namespace)::conv_depthwise2d_grad_weight_kernel<float, unsigned int>', 'cudnn_generated_fort_native_sm80_convFwd_pointwise', 'void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>', 'implicit_convolve_sgemm',
        'void cudnn::winograd_nonfused::winogradForwardData9x9_5x5<float, float>', 'aten::mkldnn_convolution', 'aten::convolution_backward'],
    'pointwise': ['triton_poi_fused__scaled_dot_product_flash_attention_clone_3', 'triton_red_fused__to_copy_native_layer_norm_1', 'triton_per_fused_add_addmm_mean_relu_sub_1', 'triton_poi_fused_convolution_backward_4', 'triton_for_fused_0',
        'void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>', 'void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, at::native::sum_functor>>>',
        'void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>', 'void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<float>',
        'void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32u, 1u, 32u, true>', 'void (anonymous namespace)::softmax_warp_forward<float, float, float, 6, false>', 'void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>',
        'void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, 512, true, 1>', 'void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>', 'void at::native::indexing_backward_kernel<c10::BFloat16, 4>', 'void at::native::indexSelectLargeIndex<float>',
        'void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>', 'at::native::nll_loss_forward_reduce_cuda_kernel_2d<float>', '_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_13BinaryFunctorIfff',
        'aten::native_layer_norm_backward', 'aten::gelu', 'aten::add_', 'aten::sum', 'aten::clamp_min', 'aten::scatter_add_'],
    'side task': ['_pairs_forward', '_cells_round', '_pairs_backward', '_cells_forward', '_cells_backward', '_pairs_look_up', '_pairs_to_cells', 'vt_drloc::pair_losses_backward'],
    'optimizer': ['void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, ADAM_MODE::1, false>>',
        'void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::TensorListMetadata<1>, at::native::(anonymous namespace)::LpNormFunctor<float, NormType::L2>>',
        'void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, float>', 'aten::_fused_adamw_', 'aten::_foreach_norm', 'Optimizer.step#AdamW.step'],
    'copies': ['Memcpy DtoD (Device -> Device)', 'Memcpy HtoD (Pageable -> Device)', 'Memset (Device)', 'void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>>',
        'void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>', 'void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 3, 64, 64>',
        'void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>', 'void at::native::roll_cuda_kernel<float>', 'void at::native::im2col_kernel<float>', 'aten::copy_', 'aten::cat'],
    'other': ['void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<long>', 'aten::view', 'aten::expand', 'aten::empty_strided', 'autograd::engine::evaluate_function: AddmmBackward0']}

@pytest.mark.parametrize('group,name', [(g,n) for g,ns in NAMES.items() for n in ns])
def test_real_names(group, name): assert kernel_group(name)==group

def test_every_group_is_tried(): assert set(NAMES)==set(GROUPS)

# --- sums

def test_time_that_is_covered():
    assert covered([])==0
    assert covered([(0,3),(2,2),(6,2)])==6                                    # overlap and gap
    assert covered([(5,1),(0,10),(2,3)])==10                                  # one within another, out of order
    assert covered([(0,1),(1,1)])==2

def test_sums_by_name_and_group():
    events = [('nvjet_a', .1*i, .05) for i in range(4)]+[('_pairs_forward', .05, .02),('Memset (Device)', .39, .01)]
    r = add_up(events, steps=2)
    assert r['busy_s']==pytest.approx((.2+.02+.01)/2)
    assert [(o['name'],o['count'],o['group']) for o in r['rows']]==[('nvjet_a',2,'matrix products'),('_pairs_forward',.5,'side task'),('Memset (Device)',.5,'copies')]
    assert sum(by_group(r['rows']).values())==pytest.approx(r['busy_s'])      # nothing overlaps
    assert list(by_group(r['rows']))==list(GROUPS)

def test_where_kernels_overlap_their_sum_is_more_than_the_busy_time():
    r = add_up([('nvjet_a', 0., 2.),('elementwise_kernel', 1., 2.)])
    assert r['busy_s']==3 and sum(by_group(r['rows']).values())==4

# --- traces

def trace(tmp_path, *events):
    (tmp_path/'t.json').write_text(json.dumps(dict(traceEvents=[dict(ph='X', pid=0, **e) for e in events]+[dict(ph='M', name='process_name')])))
    return read_trace(tmp_path/'t.json')

def test_a_gpu_trace_keeps_kernels_copies_and_memsets(tmp_path):
    "Annotations are repeated on the GPU's line and would count everything twice; the CPU's operations are left out too"
    ev = lambda cat, name, ts, dur, tid=7: dict(cat=cat, name=name, ts=ts, dur=dur, tid=tid)
    found = trace(tmp_path, ev('gpu_user_annotation', 'Optimizer.step', 5e12, 100), ev('kernel', 'b', 5e12+20, 4.5), ev('kernel', 'a', 5e12+10, 2), ev('gpu_memcpy', 'Memcpy', 5e12+40, 1),
                  ev('gpu_memset', 'Memset', 5e12+50, 1), ev('cpu_op', 'aten::mm', 5e12, 3, 1), ev('cuda_runtime', 'cudaGraphLaunch', 5e12, 3, 1))
    assert [n for n,_,_ in found]==['a','b','Memcpy','Memset']
    assert [round(t*1e6, 3) for _,t,_ in found]==[0,10,30,40] and found[1][2]==pytest.approx(4.5e-6)

def test_operations_of_the_cpu_are_cut_where_they_call_others(tmp_path):
    ev = lambda name, ts, dur, tid=1: dict(cat='cpu_op', name=name, ts=ts, dur=dur, tid=tid)
    found = trace(tmp_path, ev('linear', 0, 10), ev('t', 1, 2), ev('addmm', 4, 6), ev('copy', 5, 1), ev('view', 12, 1), ev('other thread', 2, 5, tid=2))
    us = [(n,round(t*1e6, 3),round(d*1e6, 3)) for n,t,d in found]
    assert us==[('linear',0,1),('t',1,2),('other thread',2,5),('linear',3,1),('addmm',4,1),('copy',5,1),('addmm',6,4),('view',12,1)]

def test_pieces_cover_what_the_operations_cover():
    g = torch.Generator().manual_seed(0)
    def nest(start, end, depth):                                              # operations within operations, at random
        yield (f'd{depth}', start, end-start)
        cuts = sorted((start+(end-start)*torch.rand(4, generator=g)).tolist())
        if depth<3:
            for a,b in ((cuts[0],cuts[1]),(cuts[2],cuts[3])): yield from nest(a, b, depth+1)
    ops = [*nest(0., 100., 0),*nest(150., 160., 0)]
    pieces = _pieces(ops)
    assert sum(d for _,_,d in pieces)==pytest.approx(covered([(s,d) for _,s,d in ops]))==pytest.approx(110)
    assert covered([(s,d) for _,s,d in pieces])==pytest.approx(110)

def test_an_empty_trace(tmp_path): assert trace(tmp_path)==[]

# --- a step

tiny = Case('profile', 'tiny', model='demo_cvt', batch=2, size=32, precision='float32', arms=('eager side',), steps=1)
@pytest.fixture(scope='module')
def run(): return prepare(tiny, 'cpu')

def test_a_step_on_the_cpu(run):
    r = profile_step(run, 'eager side', 2)
    groups = by_group(r['rows'])
    assert r['wall_s']>0 and r['idle_s']>=0 and groups['matrix products']>0 and groups['optimizer']>0
    assert sum(groups.values())==pytest.approx(r['busy_s'], rel=1e-6)
    assert sum(o['count'] for o in r['rows'] if o['name']=='aten::_fused_adamw_')>=1

def on_gpu(wall): return SimpleNamespace(device=torch.device('cuda'), case=tiny, block=lambda arm, n: wall)

def test_a_step_on_a_gpu(monkeypatch):
    "Its length is measured without the profiler; idle time is never negative"
    monkeypatch.setattr(profile, 'trace_steps', lambda run, arm, n: [('nvjet_a', .5*i, .3) for i in range(n)])
    r = profile_step(on_gpu(1.), 'eager side', 4)
    assert (r['wall_s'],r['busy_s'],r['idle_s'])==pytest.approx((1.,.3,.7)) and r['rows'][0]['seconds']==pytest.approx(.3)
    assert profile_step(on_gpu(.2), 'eager side', 4)['idle_s']==0

def test_on_a_cpu_the_profile_is_stretched_to_the_step(run, monkeypatch):
    "The profiler slows everything down there: 3 of 4 seconds busy are three quarters of a step"
    monkeypatch.setattr(profile, 'trace_steps', lambda *a: [('aten::mm', 0., 1.),('aten::add', 2., 2.)])
    r = profile_step(run, 'eager side', 1)
    assert (r['busy_s']/r['wall_s'],r['idle_s']/r['wall_s'])==pytest.approx((.75,.25))

def test_a_profiler_that_sees_nothing_is_an_error(run, monkeypatch):
    monkeypatch.setattr(profile, 'trace_steps', lambda *a: [])
    with pytest.raises(RuntimeError, match='tiny: the profiler saw nothing'): profile_step(run, 'eager side', 1)

@pytest.mark.parametrize('arm,n,says', [('compiled',1,"arm='compiled': the case 'tiny' has 'eager side'"), ('eager side',0,'n=0: profile at least 1 step')])
def test_bad_requests(run, arm, n, says):
    with pytest.raises(ValueError, match=says): profile_step(run, arm, n)

# --- arithmetic

class Flat(nn.Module):
    num_prefix_tokens,num_features = 0,10
    def __init__(self): super().__init__(); self.lin = nn.Linear(3*32*32, 10)
    def forward(self, x): return self.forward_head(self.forward_features(x))
    def forward_features(self, x): return self.lin(x.flatten(1))[:,None,None]
    def forward_head(self, f): return f.flatten(1)

def test_linear_by_hand(): assert count_work(Flat(), batch=5, size=32)==2*2*5*3072*10

def test_counting_leaves_the_network_alone():
    m = create_model('demo_cvt', 10).eval()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    count_work(m, batch=2, size=32)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and not m.training and all(p.grad is None for p in m.parameters())

def test_the_count_grows_with_the_batch_and_shrinks_with_skipped_branches():
    m = create_model('vit_mini', 10, drop_path=.2).to('meta')
    one,ten = (count_work(m, batch=b, size=32) for b in (1,10))
    assert ten==10*one
    speed_up(m)
    assert .85*ten<count_work(m, batch=10, size=32)<.95*ten

def test_the_side_task_by_hand():
    "64 pairs of 2 D numbers through two layers: forward, and two such products each backward"
    m,mlp = create_model('demo_cvt', 10),LocalizationMLP(64, 32)
    assert count_work(m, 2, 32, mlp)-count_work(m, 2, 32)==3*2*2*64*(2*64*32 + 32*2)

interpreted = pytest.mark.skipif(not os.environ.get('TRITON_INTERPRET') and not torch.cuda.is_available(), reason='needs a GPU, or TRITON_INTERPRET=1')

@interpreted
def test_window_attention_counts_the_same_fused():
    plain,fused = (create_model('swin_mini', 10) for _ in range(2))
    assert speed_up(fused, drop_path=False)['attention']
    assert count_work(fused.to('meta'), 3, 32)==count_work(plain.to('meta'), 3, 32)

def flop(f):
    with FlopCounterMode(display=False) as c: f()
    return c.get_total_flops()

@pytest.mark.parametrize('conv', [nn.Conv2d(8, 4, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(8, 4, 5, dilation=2, bias=False),
    nn.ConvTranspose2d(8, 6, 3, stride=2), nn.ConvTranspose2d(8, 6, 3, groups=2)], ids=str)
def test_each_gradient_of_a_convolution_takes_as_many_products_as_it(conv):
    def count(needs_grad, **kw):
        x = torch.zeros(2, 8, 12, 14, requires_grad=needs_grad)
        with FlopCounterMode(display=False, **kw) as c: y = conv(x); forward = c.get_total_flops(); y.sum().backward()
        return forward,c.get_total_flops()
    places = 12*14 if isinstance(conv, nn.ConvTranspose2d) else conv(torch.zeros(1, 8, 12, 14))[0,0].numel()
    once = 2*2*places*conv.weight.numel()
    assert count(True, custom_mapping=profile._formulas)==(once,3*once) and count(False, custom_mapping=profile._formulas)==(once,2*once)
    if conv.groups==1: assert count(True)==(once,3*once)

def test_a_network_of_depthwise_convolutions_costs_three_forward_passes():
    "But for the gradient of the image"
    from vt_drloc.compare import multiply_adds
    m = create_model('cvt_mini', 10).to('meta')
    least = 3*2*sum(multiply_adds(m, 32).values())
    assert .95*least < count_work(m, 1, 32) <= least

@interpreted
@pytest.mark.parametrize('h,w,m', [(9,9,6), (4,4,64)])
def test_side_task_counts_the_same_fused(h, w, m):
    "Where the kernels take pairs first; where they take cells first, as much less as there are fewer rows"
    from vt_drloc.speed_loss import pair_losses, _cells_first
    where = 'cuda' if torch.cuda.is_available() else 'cpu'
    D,B,mlp = 16,2,LocalizationMLP(16, 32).to(where)
    grid,pairs = torch.randn(B, D, h, w, requires_grad=True, device=where),torch.randint(h*w, (B,m,2), device=where)
    slow = flop(lambda: mlp(gather_pairs(grid, pairs)).sum().backward())
    product = 3*2*B*(m*2*D*32)
    for first in (None,False,True) if h*w<=64 else (None,False):
        cells = _cells_first(h*w, m, D) if first is None else first
        assert flop(lambda: pair_losses(mlp, grid, pairs, first=first).sum().backward())==slow-(product if cells else 0)*(1-h*w/m)

@interpreted
@pytest.mark.parametrize('h,w,m', [(9,9,6), (4,4,64)])
def test_side_task_counts_the_class_token(h, w, m):
    "Multiplied with the cells where those come first, never looked up"
    from vt_drloc.speed_loss import pair_losses
    where = 'cuda' if torch.cuda.is_available() else 'cpu'
    D,B,mlp = 16,2,LocalizationMLP(16, 32).to(where)
    tokens,pairs = torch.randn(B, 2+h*w, D, requires_grad=True, device=where),torch.randint(h*w, (B,m,2), device=where)
    grid = tokens[:,2:].mT.unflatten(2, (h,w))
    alone,behind = (flop(lambda: pair_losses(mlp, grid, pairs, t, h*w<=m).sum().backward()) for t in (None,tokens))
    assert behind==alone+(3*2*B*2*(2*D*32) if h*w<=m else 0)

# --- the chip

def test_limits_of_a_cpu():
    r = chip_limits('cpu', n=64, size=2**16)
    assert r['flop_per_s']>1e6 and r['bytes_per_s']>1e6 and (r['n'],r['bytes'],r['dtype'])==(64,2**16,'float32')

def test_share_of_the_limit_by_hand():
    groups = dict.fromkeys(GROUPS, 0.)|{'matrix products':.2,'attention':.05,'copies':.1}
    rows = [dict(name=p, precision=p, flop=1e11, wall_s=.5, idle_s=.1, groups=groups, starts=9, peak_bytes=None) for p in ('bf16','float32')]
    r,other = limit_table(dict(limits=dict(flop_per_s=1e12, dtype='bfloat16'), rows=[dict(name='broken', error='no memory'), *rows]))
    assert (r['limit_s'],r['share'],r['share_products'],r['busy'])==pytest.approx((.1,.2,.4,.8))
    assert other['limit_s'] is other['share'] is other['share_products'] is None and other['busy']==pytest.approx(.8)     # its limit was not measured

@pytest.mark.parametrize('more,known', [({}, True), (dict(mode='reduce-overhead'), False), (dict(mode='reduce-overhead', peak_of='held'), True)])
def test_memory_of_a_graph_counts_only_if_it_was_looked_for(more, known):
    row = dict(name='a', precision='bf16', flop=1, wall_s=1., idle_s=0., groups=dict.fromkeys(GROUPS, 1.), starts=1, peak_bytes=5, **more)
    assert [r['peak_bytes'] for r in limit_table(dict(limits=dict(flop_per_s=1., dtype='bfloat16'), rows=[row]))]==[5 if known else None]

@pytest.mark.cuda
def test_memory_on_a_gpu_counts_what_graphs_keep():
    "At least the weights, their gradients and AdamW's two moments; with two arms nobody knows whose it is"
    case = lambda *arms: Case('try', 'cvt_mini', model='cvt_mini', batch=64, size=32, mode='reduce-overhead', arms=arms, steps=2)
    one,two = (Steps(case(*arms)) for arms in (('compiled',),('compiled','eager')))
    facts = one.warm_up()['compiled']
    assert facts['peak_of']=='held' and facts['peak_bytes'] > 4*4*sum(p.numel() for p in one.model.parameters())
    assert all(f['peak_bytes'] is None for f in two.warm_up().values())

# --- the program

def test_cases_are_what_they_say():
    cases = gpu_cases(64)
    assert len({c.name for c in cases})==len(cases) and all(c.section=='profile' and c.batch==64 and c.size==224 for c in cases)
    assert all(len(c.arms)==1 and (c.arms==('compiled',) or c.arms[0].endswith(' side')) for c in cases+TRY) and cases[0].kind=='released' and cases[0].precision=='float32'
    assert all(c.model in list_models() or c.model.startswith('timm:') for c in cases+TRY)
    assert {c.model for c in cases if c.mode=='reduce-overhead'}=={'swin_t','t2t_vit_14','cvt_13_gap'}
    plain = {c.name: c for c in cases if c.arms==('compiled',)}
    for c in plain.values():                       # the same case but for the side task, so that the difference is its own
        [with_it] = [o for o in cases if o.name==c.name.replace('no side task', 'all of it')]
        assert replace(c, name=with_it.name, arms=with_it.arms)==with_it
    assert len(plain)==3

def test_a_case_that_cannot_start():
    "The command of a process of its own; what it said last is the row"
    [r] = profile_cases([Case('profile', 'bad', model='no_such', arms=('eager',))], 'cpu', 1, say=lambda s: None)
    assert r['name']=='bad' and "unknown model 'no_such'" in r['error']

def test_a_process_answers_with_its_profile(monkeypatch, capsys):
    "First that it is ready, then a profile for each line"
    monkeypatch.setattr('sys.stdin', io.StringIO('1\n'))
    profile._serve(tiny, 'cpu')
    facts,row = map(json.loads, capsys.readouterr().out.splitlines())
    assert facts['eager side']['first_step_s']>0
    assert set(row['groups'])==set(GROUPS) and 12 < len(row['kernels']) <= 40 + sum(k['group']=='side task' for k in row['kernels']) and row['arm']=='eager side' and row['flop']>0 and row['batch']==2

def test_a_process_that_dies_while_it_is_profiled(monkeypatch):
    "Its row is the error, the next case is profiled"
    class Fake:
        def __init__(self, case, *a): self.case,self.facts = case,None
        def read(self, until=None): return {}
        def ask(self, n):
            if self.case.name=='good': assert closed==['bad']                 # its memory is free by then
            if self.case.name=='bad': raise BrokenPipeError('gone')
            return dict(name=self.case.name)
        def close(self): closed.append(self.case.name)
    closed = []
    monkeypatch.setattr(profile, 'Worker', Fake)
    rows = list(profile_cases([Case('profile', 'bad'), Case('profile', 'good')], 'cpu', 1, say=lambda s: None))
    assert [(r['name'],r.get('error')) for r in rows]==[('bad','gone'),('good',None)] and set(closed)=={'bad','good'}

def test_the_record_is_whole_at_any_time(tmp_path, monkeypatch):
    "Written beside and renamed after each case; what was there stays until then"
    seen = []
    def cases(*a):
        for i in range(2):
            seen.append(json.loads((tmp_path/'profile.json').read_text())['rows'] if (tmp_path/'profile.json').exists() else None)
            yield dict(name=str(i), error='invented') if i else dict(name='0', wall_s=1., busy_s=.5, starts=2)
    monkeypatch.setattr(profile, 'profile_cases', cases)
    monkeypatch.setattr(profile, 'chip_limits', lambda d: dict(flop_per_s=1., bytes_per_s=1.))
    profile.main(out=str(tmp_path), device='cpu')
    rec = json.loads((tmp_path/'profile.json').read_text())
    assert seen[0] is None and [r['name'] for r in seen[1]]==['0'] and [r['name'] for r in rec['rows']]==['0','1']
    assert [p.name for p in tmp_path.iterdir()]==['profile.json'] and rec['section']=='profile' and rec['circumstances']['device']=='CPU' and rec['published'] is None

@pytest.mark.parametrize('args,says', [(dict(device='gpu'),"--device 'gpu': give 'cuda' or 'cpu'"), (dict(device='cpu', batch=0),'--batch 0 --steps 10: both must be at least 1'),
                                       pytest.param({}, 'no GPU', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'))])
def test_bad_arguments(args, says):
    with pytest.raises(SystemExit, match=says): profile.main(**args)
