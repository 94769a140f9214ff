"""Counters against hand-made numbers, receptive fields against theory, and the measuring program on the CPU."""
import json, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from vt_drloc import compare
from vt_drloc.compare import (PUBLISHED, Bench, Contender, activations, cases, check_gradients, contenders, costs, final_grid, measure,
    multiply_adds, reach, read_record)
from vt_drloc.models import create_model, list_models

bench_dir = Path(__file__).parents[1]/'nbs'/'results'/'bench'

class TinyAttention(nn.Module):
    "Two heads on 64 pixels, with a mask if asked"
    def __init__(self, masked=False): super().__init__(); self.qkv,self.masked = nn.Linear(3, 24),masked
    def forward(self, x):
        q,k,v = self.qkv(x.flatten(2).mT).reshape(1, 64, 3, 2, 4).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(64, 64) if self.masked else None)

def test_convolution_by_hand():
    "A grouped convolution with stride: h w D C/groups k^2, and one number written a product sum"
    m = nn.Conv2d(3, 12, 5, 2, 2, groups=3)
    assert multiply_adds(m, (16,24)) == dict(conv=8*12*12*25, linear=0, attention=0)
    assert activations(m, (16,24)) == dict(conv=8*12*12, linear=0, attention=0)

@pytest.mark.parametrize('bias', [True, False])
def test_linear_by_hand(bias):
    "A linear layer on the last axis, with and without bias, counts the same"
    m = nn.Linear(16, 10, bias=bias)
    assert multiply_adds(m, (8,16)) == dict(conv=0, linear=3*8*16*10, attention=0)
    assert activations(m, (8,16)) == dict(conv=0, linear=3*8*10, attention=0)

@pytest.mark.parametrize('masked', [True, False])
def test_attention_by_hand(masked):
    "Both products of fused attention are counted, and only its output as activation"
    m = TinyAttention(masked)
    assert multiply_adds(m, 8) == dict(conv=0, linear=64*3*24, attention=2*64*64*8)
    assert activations(m, 8) == dict(conv=0, linear=64*24, attention=64*8)

@pytest.mark.parametrize('look', [multiply_adds, activations, final_grid, reach])
def test_looking_leaves_the_model_as_it_was(look):
    "Each module's mode (a frozen BatchNorm stays frozen), weights, their type and gradients, BatchNorm statistics, PyTorch's shortcut"
    m = create_model('resnet_mini').train()
    frozen = next(o for o in m.modules() if isinstance(o, nn.BatchNorm2d)).eval()
    frozen.weight.requires_grad_(False)
    state = lambda: [(o.training,) for o in m.modules()] + [(p.requires_grad,p.dtype,p.grad) for p in m.parameters()]
    before,said = {k:v.clone() for k,v in m.state_dict().items()},state()
    look(m, 32)
    assert state() == said and not frozen.training and torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

def test_an_error_leaves_the_model_as_it_was_too():
    "An image that does not fit: the modes and PyTorch's shortcut come back"
    m = create_model('swin_mini').train()
    for look in (multiply_adds, activations, final_grid):
        with pytest.raises(ValueError): look(m, 33)
    assert all(o.training for o in m.modules()) and torch.backends.mha.get_fastpath_enabled()

def test_looking_follows_the_model():
    "The image is made where the model is, and in its precision"
    with torch.device('meta'): m = create_model('demo_cvt')
    assert final_grid(m, 32).device.type == reach(m, 32).device.type == 'meta'
    assert final_grid(create_model('demo_cvt').double(), 32).dtype == torch.double
    assert reach(create_model('demo_cvt').bfloat16(), 32).any()
    assert reach(torch.compile(create_model('demo_cvt'), backend='eager'), 32).any()

def test_pytorchs_own_attention_costs_what_ours_does():
    "torchvision's ViT is made of nn.MultiheadAttention, which takes a shortcut in evaluation"
    from torchvision.models import VisionTransformer
    from vt_drloc.vit import ViT
    theirs,ours = VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10),ViT(img_size=32, patch=8, dim=64, depth=2, heads=4, ratio=2)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert multiply_adds(theirs, 32) == multiply_adds(ours, 32) and activations(theirs, 32) == activations(ours, 32)

class Cross(nn.Module):
    "64 pixels ask four tokens: queries, keys and values of different numbers and widths"
    def __init__(self): super().__init__(); self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)
    def forward(self, x): return self.attn(F.pad(x.flatten(2).mT, (0,5)), x.new_zeros(1, 4, 6), x.new_zeros(1, 4, 5))[0]

class Layer(nn.Module):
    "PyTorch's whole transformer layer on 64 pixels"
    def __init__(self): super().__init__(); self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    def forward(self, x): return self.layer(F.pad(x.flatten(2).mT, (0,5)))

def test_pytorchs_own_attention_by_hand():
    "Projections of queries, keys, values and of what comes out; both products; written: their outputs, and attention's once"
    assert multiply_adds(Cross(), 8) == dict(conv=0, linear=64*8*8 + 4*6*8 + 4*5*8 + 64*8*8, attention=2*64*4*8)
    assert activations(Cross(), 8) == dict(conv=0, linear=64*8 + 4*8 + 4*8 + 64*8, attention=64*8)
    assert multiply_adds(Layer(), 8) == dict(conv=0, linear=64*(4*8*8 + 2*8*16), attention=2*64*64*8)
    assert activations(Layer(), 8) == dict(conv=0, linear=64*(4*8 + 16 + 8), attention=64*8)

theirs = dict(swin_t=lambda: compare._torchvision('swin_t', 1000), resnet50=lambda: compare._torchvision('resnet50', 1000),
              cvt_13=lambda: compare._transformers_cvt('cvt-13', 1000), vit_base_16=lambda: compare._timm('vit_base_patch16_224', 1000))

@pytest.mark.parametrize('name', PUBLISHED)
def test_published(name):
    """Parameters to 0.06 M, multiply-adds to the published rounding; CvT's to 0.07 G, ViT-B's parameters to 1 M.
    The same architecture of another package has the same parameters and multiply-adds"""
    c,(params,macs) = costs(name),PUBLISHED[name]
    assert c['params']/1e6 == pytest.approx(params, abs=1 if name=='vit_base_16' else .06)
    assert c['macs']/1e9 == pytest.approx(macs, abs=.07 if name=='cvt_13' else .05)
    assert c['macs'] == sum(c[f'macs_{k}'] for k in ('conv','linear','attention'))
    if name not in theirs: return
    with torch.device('meta'): other = theirs[name]()                        # only shapes are counted
    assert sum(p.numel() for p in other.parameters()) == c['params']
    assert sum(multiply_adds(other, 224).values()) == c['macs']

def test_grids():
    "The final grid at the designed size and at another, not square"
    assert costs('swin_mini', 10)['grid'] == (128,8,8)
    assert final_grid(create_model('cvt_mini'), (32,64)).shape == (1,128,8,16)

@pytest.mark.parametrize('kernels,strides', [((3,),(1,)), ((3,5),(2,1)), ((7,3,3),(2,2,1))])
def test_reach_of_convolutions(kernels, strides):
    "A stack of convolutions sees 1 + sum (k-1) x step pixels a side"
    m = nn.Sequential(*[nn.Conv2d(3, 3, k, s, k//2) for k,s in zip(kernels, strides)])
    side,step = 1,1
    for k,s in zip(kernels, strides): side,step = side+(k-1)*step, step*s
    seen = reach(m, 64, tap=str(len(kernels)-1))
    assert seen.any(0).sum() == seen.any(1).sum() == side and seen.sum() == side**2

def test_reach_of_windows():
    "A Swin block without shift sees its window, the shifted one after it also the neighbours'; tokens of a ViT see all"
    m = create_model('swin_mini')
    assert reach(m, 32, 'layers.0.blocks.0').sum() == (4*2)**2
    first = reach(m, 32, 'layers.0.blocks.0')
    both = reach(m, 32, 'layers.0')
    assert (both | first).equal(both) and first.sum() < both.sum() < 32*32
    assert reach(create_model('vit_mini'), 32).all()

def test_reach_refuses_a_cell_outside():
    "A cell outside the grid is named with the grid"
    for cell in ((8,0), (0,8), (-1,0), (0,-1)):
        with pytest.raises(ValueError, match=rf'cell \({cell[0]}, {cell[1]}\) is not in the 8 x 8 grid'): reach(create_model('demo_cvt'), 32, cell=cell)

def test_every_network_is_measured_once():
    "All registered networks are among the contenders, the subset to compile is stated, and no case comes twice"
    groups = contenders()
    assert sorted(c.name for g in groups for c in g if c.by=='vt_drloc') == list_models()
    for more in (False, True):
        keys = [compare._case_key(*o) for g in cases(groups, more) for o in g]
        assert len(keys) == len(set(keys))
    eager = {k[:2] for k in keys if not k[-1] and k[4]=='train' and k[5]=='bf16'}
    assert eager == {(c.name,c.by) for g in groups for c in g}

def test_steps_of_a_measurement():
    "Large and small networks have the batches and the classes of the page, and a try-out four images; spaces between names do not matter"
    big,small = (g[0] for g in contenders(only='swin_t, swin_mini'))
    assert (big.size,big.batch,big.classes) == (224,128,1000) and (small.size,small.batch,small.classes) == (32,512,10)
    assert {c.batch for g in contenders(True) for c in g} == {4}

def test_what_is_compiled_and_what_is_float32():
    "Three large transformers in float32, and training of ours compiled; with more also inference of the five large ones and the rivals"
    groups = contenders()
    short,long = ([o for g in cases(groups, more) for o in g] for more in (False,True))
    assert {c.name for c,_,precision,_ in short if precision=='float32'} == {'swin_t','cvt_13','t2t_vit_14'}
    assert {(c.by,kind) for c,kind,_,compiled in short if compiled} == {('vt_drloc','train')} and all(o in long for o in short)
    assert {(c.name,c.by,kind) for c,kind,_,_ in long[len(short):]} == {(n,'vt_drloc','infer') for n in ('swin_t','cvt_13','t2t_vit_14','resnet50','vit_base_16')} | {(n,by,'train') for n,l in compare.RIVALS.items() for by,*_ in l}

@pytest.mark.parametrize('precision,dtype', [('bf16',torch.bfloat16), ('float32',torch.float32)])
@pytest.mark.parametrize('kind', ['train','infer'])
def test_a_step_has_the_precision_that_it_is_named_after(kind, precision, dtype):
    seen = []
    class Net(nn.Linear):
        def forward(self, x): y = super().forward(x.flatten(1)); seen.append((y.dtype,self.training)); return y
    Bench(Contender('net', 'nobody', lambda: Net(3*32*32, 10), 32, 4, 10), 'cpu', kind, precision).step()
    assert seen == [(dtype,kind=='train')]

def test_time_of_a_record_adds_up(tmp_path):
    "What was spent before it was started again counts too"
    for seconds in (1.,2.): compare.Record(tmp_path/'m.json', 'cpu').write(seconds)
    assert read_record(tmp_path/'m.json')['seconds'] == 3

def test_errors():
    "Wrong names, kinds and files are named"
    with pytest.raises(ValueError, match="'swin_x' is not measured"): contenders(only='swin_x')
    c = contenders(True, 'demo_cvt')[0][0]
    with pytest.raises(ValueError, match="kind='test'"): Bench(c, 'cpu', 'test')
    with pytest.raises(ValueError, match="precision='half'"): Bench(c, 'cpu', precision='half')

def test_a_failing_contender_leaves_its_error():
    "The others are measured all the same"
    def broken(): raise RuntimeError('no such thing')
    good = contenders(True, 'demo_cvt')[0][0]
    bad = Contender('broken', 'nobody', broken, 32, 4, 10)
    rows = measure([(bad,'train','float32',False), (good,'train','float32',False)], 'cpu', 2, 0.)
    assert rows[0]['error'] == 'RuntimeError: no such thing' and rows[1]['images_per_s'] > 0
    assert rows[1]['low'] <= rows[1]['images_per_s'] <= rows[1]['high'] and rows[1]['peak_bytes'] is None

def test_one_that_fails_later_leaves_its_error():
    "After some steps, out of memory for example: the others' blocks are still measured"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.fc,self.left = nn.Linear(3*32*32, 10),5
        def forward(self, x):
            self.left -= 1
            if self.left<0: raise RuntimeError('no\nmemory')
            return self.fc(x.flatten(1))
    good = contenders(True, 'demo_cvt')[0][0]
    rows = measure([(Contender('late', 'nobody', Net, 32, 4, 10),'train','float32',False), (good,'train','float32',False)], 'cpu', 3, 0.)
    assert [(r['network'],r.get('error')) for r in rows] == [('late','RuntimeError: no memory'), ('demo_cvt',None)]
    assert rows[1]['blocks'] == 3

def test_who_failed_comes_last(tmp_path):
    "Started again with the same file; its old error is dropped, since it is tried again"
    file = tmp_path/'m.json'
    groups = contenders(True, 'cvt_mini,swin_mini')
    r = compare.Record(file, 'cpu')
    first = [[label.split()[0] for label,*_ in compare._todo(groups, r, check, False)] for check in (False,True)]
    r.data['rows'] += [dict(network='cvt_mini', by='vt_drloc', size=32, batch=4, kind='train', precision='bf16', compiled=False, error='x')]
    r.data['checks'] += [dict(network='cvt_mini', by='vt_drloc', size=32, batch=4, error='x')]
    r.write(1.)
    r = compare.Record(file, 'cpu')
    then = [[label.split()[0] for label,*_ in compare._todo(groups, r, check, False)] for check in (False,True)]
    assert r.data['rows'] == r.data['checks'] == []
    assert first[0][0] == first[1][0] == 'cvt_mini'
    assert then == [['swin_mini']*3+['cvt_mini']*3, ['swin_mini','cvt_mini']]

@pytest.mark.parametrize('name', compare.RIVALS)
def test_rivals_have_no_drop_path_either(name):
    "In training mode two passes of the same batch agree, for ours and for theirs"
    own,*rivals = contenders(True, name)[0]
    for c in (own, *rivals):
        m,x = c.make().train(),torch.randn(1, 3, c.size, c.size)
        with torch.no_grad(): assert torch.equal(*[compare._logits(m(x)) for _ in range(2)]), str(c)

def test_peak_memory(monkeypatch):
    "Of tensors, or of what is left when all unused memory is given back; without a GPU nothing is known"
    held = dict(allocated=7, reserved=50)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: held['allocated'])
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda: held['reserved'])
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: held.update(reserved=20))
    assert compare.peak_memory('cpu') is None and compare.peak_memory('cpu', graphs=True) is None
    assert (compare.peak_memory('cuda'),compare.peak_memory('cuda', before=3)) == (7,4) and held['reserved'] == 50
    assert compare.peak_memory(torch.device('cuda'), graphs=True) == 20

def test_the_guard_sees_a_difference(monkeypatch):
    "A network whose compiled gradients are wrong is far off; a right one is not"
    class Net(nn.Module):
        def __init__(self, wrong): super().__init__(); self.fc,self.wrong = nn.Linear(3*32*32, 10),wrong
        def forward(self, x):
            y = self.fc(x.flatten(1))
            return y*3 if self.wrong and torch.compiler.is_compiling() else y
    far = [check_gradients(Contender('net', 'vt_drloc', lambda w=w: Net(w), 32, 4, 10), 'cpu') for w in (False, True)]
    assert far[0]['finite'] and far[0]['compiled_vs_eager'] < 1e-6 and far[1]['compiled_vs_eager'] > .1

def test_program_writes_a_record(tmp_path, capsys, monkeypatch):
    "Without time it says what it left out; started again it measures what is missing, and nothing twice; --check adds"
    file = tmp_path/'sub'/'models.json'
    cmd = [sys.executable, '-m', 'vt_drloc.compare', '--device', 'cpu', '--quick', '--only', 'demo_cvt', '--minutes', '0', '--out', str(file)]
    out = subprocess.run(cmd, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and 'Traceback' not in out.stderr, out.stderr
    rec = read_record(file)
    assert rec['cut_short'] and len(rec['rows']) == 1 and len(rec['left_out']['rows']) == 2
    assert rec['circumstances']['device'] == 'CPU' and rec['circumstances']['versions']['torch'] == torch.__version__
    with monkeypatch.context() as m:
        m.setattr(Bench, '_compile', lambda self: None)         # it takes seconds, and the check below does it
        compare.main(out=file, device='cpu', only='demo_cvt', quick=True)
    rec = read_record(file)
    assert not rec['cut_short'] and [(r['kind'],r['compiled']) for r in rec['rows']] == [('train',False),('infer',False),('train',True)]
    compare.main(out=file, device='cpu', only='demo_cvt', quick=True, check=True)
    rec,c = read_record(file),read_record(file)['checks'][0]
    assert len(rec['rows']) == 3 and c['finite'] and 0 < c['compiled_vs_float32'] < 1.5*c['eager_vs_float32'] < .1
    assert '3 rows, 1 checks, left out: 0' in capsys.readouterr().out

@pytest.mark.parametrize('name,more', [('models',{'drop_path'}), ('cpu',set()), ('profile',{'baseline'})])
def test_circumstances_are_those_of_the_committed_records(name, more, monkeypatch):
    "Same keys in the same order, values of the same kind: a record made today stands beside those that are there"
    monkeypatch.setenv('VT_DRLOC_REVISION', 'abc')
    then = json.loads((bench_dir/f'{name}.json').read_text())['circumstances']
    now = compare.bench_circumstances('cpu')
    assert list(now) == [k for k in then if k not in more] and list(now['versions']) == list(then['versions'])
    assert {k: type(v) for k,v in now.items() if v is not None} == {k: type(then[k]) for k,v in now.items() if v is not None}
    assert (now['revision'],now['device'],now['versions']['torch']) == ('abc','CPU',torch.__version__)

def test_what_a_gpu_is_called(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: f'GPU {device}')
    assert [compare.device_name(d) for d in ('cpu', torch.device('cpu'), 'cuda:1')] == ['CPU','CPU','GPU cuda:1']

@pytest.mark.parametrize('state', ['clean','dirty','outside','ignored','untracked'])
def test_revision(state, tmp_path, monkeypatch):
    "That of the folder where the code lies, whatever the working directory is; none, if it lies in a repository that is not its own"
    monkeypatch.delenv('VT_DRLOC_REVISION', raising=False)
    file = tmp_path/'vt_drloc'/'compare.py'
    file.parent.mkdir()
    file.write_text('')
    monkeypatch.setattr(compare, '__file__', str(file))
    def git(*args): return subprocess.run(['git','-c','user.name=a','-c','user.email=a@b.example',*args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    if state=='ignored': (tmp_path/'.gitignore').write_text('vt_drloc')
    if state!='outside': git('init','-q'); git('add','.gitignore' if state=='ignored' else '.'); git('commit','-qm','a')
    if state=='untracked': git('rm','-q','--cached','vt_drloc/compare.py'); git('commit','-qm','b','--allow-empty')
    if state=='dirty': file.write_text('x = 1')
    assert compare.git_revision() == dict(clean=lambda: git('rev-parse','HEAD'), dirty=lambda: git('rev-parse','HEAD')+'-dirty').get(state, lambda: 'unknown')()
    monkeypatch.setenv('VT_DRLOC_REVISION', 'said')
    assert compare.git_revision() == 'said'

def test_a_record_of_other_circumstances_is_not_mixed(tmp_path):
    "Another revision in the file: an error that names what changed; a foreign file: one that says so"
    file = tmp_path/'m.json'
    r = compare.Record(file, 'cpu')
    r.write(1.)
    r.data['circumstances']['revision'] = 'other'
    r.write(1.)
    with pytest.raises(ValueError, match='another revision'): compare.Record(file, 'cpu')
    file.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="has no 'checks'"): read_record(file)
    file.write_text('{')
    with pytest.raises(ValueError, match='is no JSON'): read_record(file)
