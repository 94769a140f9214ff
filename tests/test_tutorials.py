"What the tutorials rely on and do not show: grids the right way round, U-Nets under a tap, two processes, no fastai"
import contextlib, importlib, json, os, re, shlex, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from fastcore.script import anno_parser
from vt_drloc.hybrid import CvT, as_backbone
from vt_drloc.loss import DrlocLoss

nbs = Path(__file__).parents[1]/'nbs'/'tutorials'

def page_cell(page, start):
    "Source of the one code cell of a tutorial that starts with `start`"
    cells = [''.join(c['source']) for c in json.loads((nbs/f'{page}.ipynb').read_text())['cells'] if c['cell_type']=='code']
    found = [c for c in cells if c.startswith(start)]
    assert len(found)==1, f"{len(found)} cells of {page} start with {start!r}"
    return found[0]

def page_classes():
    "`Joint` and `Hooked` as the page on plain PyTorch defines them"
    ns = dict(nn=nn, DrlocLoss=DrlocLoss, as_backbone=as_backbone)
    for name in ('Joint','Hooked'): exec(page_cell('plain_pytorch', f'class {name}('), ns)
    return ns['Joint'],ns['Hooked']

# --- commands that a reader copies

def commands(text):
    "Command lines of this project in a shell text, as words: the program's name first"
    found = re.findall(r'^[ \t]*(?:[!$][ \t]*)?(?:[\w./-]*/)?(?:(vt_drloc_\w+)|python3? -m (vt_drloc\.\w+))((?:[ \t][^\n]*)?)$', text.replace('\\\n', ' '), re.M)
    for prog,module,rest in found: yield [prog or module, *shlex.split(re.split(r'[|>;&]', rest)[0], comments=True)]

def shell_texts(cell):
    "What of a cell goes to a shell: fenced blocks, and lines that begin with `!`"
    text = ''.join(cell['source'])
    if cell['cell_type']=='markdown': return re.findall(r'^```\{?\.?(?:sh|bash|shell|console|text|python)?\}?\n(.*?)^```', text, re.M|re.S)
    lines = text.replace('\\\n', ' ').splitlines()
    return [text] if text.startswith(('%%bash','%%sh')) else [l.lstrip() for l in lines if l.lstrip().startswith('!')]

def all_commands():
    root = nbs.parents[1]
    for page in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in page.parts: continue
        for cell in json.loads(page.read_text())['cells']:
            for text in shell_texts(cell):
                for words in commands(text): yield str(page.relative_to(root)),words
    for text in shell_texts(dict(cell_type='markdown', source=(root/'README.md').read_text())):
        for words in commands(text): yield 'README.md',words

programs = dict(vt_drloc_train=('train','main'), vt_drloc_eval=('evaluate','eval_main'), vt_drloc_demo=('train','demo_main'))

def parsed(words):
    "What a command's own parser makes of it; raises where it would refuse"
    module,fn = programs.get(words[0]) or (words[0].removeprefix('vt_drloc.'),'main')
    parser = anno_parser(getattr(importlib.import_module(f'vt_drloc.{module}'), fn).__wrapped__, prog=words[0])
    def error(why): raise ValueError(f"{' '.join(words)}: {why}")
    parser.error = error
    return parser.parse_args(words[1:])

def test_every_command_that_a_page_shows_is_one():
    "An option that does not exist, in a fenced block or a shell cell of any page"
    found = list(all_commands())
    assert len(found) >= 15 and {'README.md','nbs/tutorials/fine_tuning.ipynb','nbs/tutorials/interrupted_runs.ipynb'} <= {p for p,_ in found}
    for page,words in found:
        try: parsed(words)
        except ValueError as e: pytest.fail(f'{page}: {e}')
    with pytest.raises(ValueError, match='no_mix'): parsed(next(commands('.venv/bin/vt_drloc_train --data few --no_mix # so')))

def test_the_cell_for_colab_works_on_a_fresh_machine_and_again():
    "It installs from where settings.ini says, under the same constraints as the first cell of every page, and goes on or begins"
    cfg = ConfigParser(delimiters=['=']); cfg.read(nbs.parents[1]/'settings.ini', encoding='utf-8'); cfg = cfg['DEFAULT']
    cells = json.loads((nbs/'interrupted_runs.ipynb').read_text())['cells']
    block, = [b for c in cells if c['cell_type']=='markdown' for b in re.findall(r'^```python\n(.*?)^```', ''.join(c['source']), re.M|re.S)]
    assert f"pip install -q -c /tmp/keep.txt git+https://github.com/{cfg['user']}/{cfg['repo']}@{cfg['branch']}\n" in block
    keep = "with open('/tmp/keep.txt', 'w') as f: f.writelines("
    assert next(l for l in block.splitlines() if l.startswith(keep)) in ''.join(cells[0]['source'])
    words, = commands(block)
    got = parsed(words)
    assert got.resume and got.save_every and got.minutes and got.out.startswith('/content/drive/')

# --- `your_own_data`

def test_the_page_shows_images_of_every_class():
    "The judged images are sorted by class: what is shown is spread over all of them"
    from types import SimpleNamespace
    y = torch.arange(150)//30
    shown,batches = [],[(torch.zeros(50,3,4,4), o) for o in y.split(50)]
    class Loader(list):
        def one_batch(self): return self[0]
    plt = SimpleNamespace(subplots=lambda r, c, **kw: (None, np.empty((r,c))))
    dls = SimpleNamespace(valid=Loader(batches), info=SimpleNamespace(mean=[0.]*3, std=[1.]*3), train=SimpleNamespace(dataset=SimpleNamespace(vocab='abcde')))
    exec(page_cell('your_own_data', '#| fig-alt: "Ten small crops'), dict(torch=torch, dls=dls, plt=plt, show_image=lambda im, ax, name: shown.append(name)))
    assert sorted(shown)==list('aabbccddee')

def test_a_task_that_is_not_learnt_moves_the_weights_too():
    "What the page says of its two accuracies: one seed, and the callback alone sets them apart"
    from fastai.basics import DataLoader, DataLoaders, Learner, set_seed
    from vt_drloc.callback import DrlocCallback
    set_seed(0)
    ds = [(x, i%3) for i,x in enumerate(torch.randn(8,3,16,16))]
    def weights(cbs=None):
        set_seed(0)
        learn = Learner(DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4), device=torch.device('cpu')), tiny(), loss_func=nn.CrossEntropyLoss(), cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn.model.state_dict()
    without,again,zero,task = weights(),weights(),weights(DrlocCallback(0.)),weights(DrlocCallback(.1))
    for same in (again, zero): assert all(torch.equal(without[k], same[k]) for k in without)
    assert not all(torch.equal(without[k], task[k]) for k in without)
    page = (nbs/'your_own_data.ipynb').read_text()
    assert 'do not differ because of it' not in page and 'sends gradients too' in page

def test_the_arms_of_the_page_differ_in_the_callback_alone():
    "Each run gets a loader of its own: the generator of a shared one would go on, and the second arm would see another order"
    made,learners = [],[]
    class Fake:
        def __init__(self, dls, *args, **kw): learners.append(dls)
        def no_bar(self): return contextlib.nullcontext()
        no_logging = no_bar
        def fit_one_cycle(self, *args): pass
    def get_dls(*args, **kw): made.append(torch.initial_seed()); return object()
    ns = dict(set_seed=torch.manual_seed, get_dls=get_dls, Learner=Fake, new_model=lambda: None, CrossEntropyLossFlat=lambda: None, accuracy=None, folder=None, dls=object(), DrlocCallback=lambda **kw: None)
    exec(page_cell('your_own_data', 'def run('), ns)
    assert made==[0,0] and len(set(map(id, learners)))==2 and ns['dls'] not in learners

# --- the five models of `any_backbone`

def models(H, W):
    "As the page builds them"
    timm,tv,hf = map(pytest.importorskip, ('timm','torchvision.models','transformers'))
    ns = dict(torch=torch, timm=timm, tv=tv, H=H, W=W, CvtConfig=hf.CvtConfig, CvtForImageClassification=hf.CvtForImageClassification)
    exec(page_cell('any_backbone', 'def build()').split('\nmodels =')[0], ns)
    return ns['build']()

strides = {'timm ViT':16, 'timm ConvNeXt':32, 'timm PVT v2':32, 'torchvision Swin':32, 'transformers CvT':16}

@pytest.mark.parametrize('hw', [(64,160), (160,64)])
@pytest.mark.parametrize('name', strides)
def test_a_change_in_the_image_shows_in_its_cell(name, hw):
    "Other pixels in a corner move that corner of the grid most: rows are rows, columns are columns"
    m,s = models(*hw)[name].eval(),strides[name]
    h,w = hw[0]//s,hw[1]//s
    g = torch.Generator().manual_seed(0)
    bb,x = as_backbone(m),torch.randn(1,3,*hw, generator=g)
    with torch.no_grad():
        base = bb.grid(bb.forward_features(x), hw)
        assert base.shape[2:]==(h,w)
        for r,c in [(0,w-1), (h-1,0)]:
            z = x.clone()
            z[...,r*s:(r+1)*s,c*s:(c+1)*s] = 3*torch.randn(1,3,s,s, generator=g)
            moved = (bb.grid(bb.forward_features(z), hw)-base).norm(dim=1)[0]
            assert divmod(moved.argmax().item(), w)==(r,c)

@pytest.mark.parametrize('name', [n for n in strides if n not in ('timm ViT','timm ConvNeXt','timm PVT v2')])
def test_hooked_module_gives_the_grid_of_the_adapter(name):
    _,Hooked = page_classes()
    joint = Hooked(models(64,96)[name]).eval()
    x = torch.randn(2,3,64,96)
    _,drloc = joint(x, torch.Generator().manual_seed(3))
    grid = joint.bb.grid(joint.bb.forward_features(x), (64,96))
    torch.testing.assert_close(drloc, joint.drloc(grid, torch.Generator().manual_seed(3)))

# --- U-Nets

def unet(img=(64,96)):
    vision,timm = pytest.importorskip('fastai.vision.all'),pytest.importorskip('timm')
    torch.manual_seed(0)
    arch = lambda pretrained=False: timm.create_model('resnet10t', channels=(8,16,24,32))
    return vision.create_unet_model(arch, 3, img, pretrained=False, cut=-3)

@pytest.mark.parametrize('tap,hw,D', [('layers.0',(4,6),24), ('layers.0.5',(8,12),16), ('layers.0.4',(16,24),8)])
def test_unet_tap(tap, hw, D):
    m,x = unet().eval(),torch.randn(2,3,64,96)
    bb = as_backbone(m, tap)
    with torch.no_grad():
        grid,parts = bb.grid(bb.forward_features(x), (64,96)),m.layers[0]
        want = parts(x) if tap=='layers.0' else parts[:int(tap[-1])+1](x)
    assert grid.shape==(2,D,*hw)
    torch.testing.assert_close(grid, want)

def test_unet_under_a_tap_keeps_its_skip_connections():
    from vt_drloc.callback import GridTap
    m,x = unet().eval(),torch.randn(1,3,64,96)
    before,keys = m(x),list(m.state_dict())
    with GridTap(m, 'layers.0') as tap:
        assert torch.equal(m(x), before) and tap.pop((64,96)).requires_grad
    assert torch.equal(m(x), before) and list(m.state_dict())==keys

def test_the_side_task_of_a_unet_reaches_the_encoder_and_not_the_decoder():
    from vt_drloc.callback import GridTap
    m = unet()
    with GridTap(m, 'layers.0') as tap:
        m(torch.randn(2,3,64,96))
        DrlocLoss(24, seed=0)(tap.pop((64,96))).backward()
    enc = {id(p) for p in m.layers[0].parameters()}
    reached = {id(p) for p in m.parameters() if p.grad is not None}
    assert reached==enc and next(m.layers[0].parameters()).grad.abs().sum()>0

def test_torchvision_segmentation_models_by_name():
    seg = pytest.importorskip('torchvision.models.segmentation')
    m = seg.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    bb = as_backbone(m, 'backbone.layer4')
    with torch.no_grad(): assert bb.grid(bb.forward_features(torch.randn(1,3,64,96)), (64,96)).shape==(1,2048,8,12)

# --- plain PyTorch

def test_the_page_without_fastai():
    "What the plain page imports, and a step, where fastai cannot be imported"
    code = page_cell('plain_pytorch', 'import sys\nloaded') + '\n' + page_cell('plain_pytorch', 'class Joint(') + """
joint = Joint(CvT(3, dims=(8,), depths=(1,), heads=(2,), kernels=(5,), strides=(4,), kv_strides=(1,)))
logits,drloc = joint(torch.randn(2,3,16,16))
(logits.mean()+drloc).backward()
assert all(p.grad is not None for p in joint.parameters())
print('ran')"""
    res = subprocess.run([sys.executable, '-c', "import sys; sys.modules['fastai'] = None\n"+code], capture_output=True, text=True)
    assert res.stdout.strip()=='ran', res.stderr[-2000:]

def tiny():
    torch.manual_seed(0)
    return CvT(3, dims=(8,), depths=(1,), heads=(2,), kernels=(5,), strides=(4,), kv_strides=(1,)).eval()    # BatchNorm fixed

def batch(): return torch.randn(4,3,16,16, generator=torch.Generator().manual_seed(5)),torch.tensor([0,1,2,0])

def one_rank(rank, init, out):
    "A backward pass on half of the batch, with DDP around the joint module, and without"
    torch.distributed.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    Joint,_ = page_classes()
    (x,y),half = batch(),slice(2*rank,2*rank+2)
    for which in ('joint','outside'):
        joint = Joint(tiny())
        run = nn.parallel.DistributedDataParallel(joint) if which=='joint' else joint
        logits,drloc = run(x[half], torch.Generator().manual_seed(1+rank))
        (F.cross_entropy(logits, y[half]) + .5*drloc).backward()
        torch.save({n: p.grad for n,p in joint.named_parameters()}, f'{out}/{which}.{rank}')
    torch.distributed.destroy_process_group()

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "Gradients of both ranks, by `which`"
    if not torch.distributed.is_available(): pytest.skip('PyTorch without torch.distributed')
    out = tmp_path_factory.mktemp('ranks')
    code = f"import torch._dynamo, torch.multiprocessing as mp, test_tutorials as t; mp.start_processes(t.one_rank, ('file://{out}/init', {str(out)!r}), nprocs=2, start_method='fork')"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=Path(__file__).parent, env={**os.environ, 'OMP_NUM_THREADS':'1'}, capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stderr[-3000:]
    return {which: [torch.load(f'{out}/{which}.{r}', weights_only=True) for r in (0,1)] for which in ('joint','outside')}

def test_ddp_around_the_joint_module_averages_the_mlp(ranks):
    a,b = ranks['joint']
    assert all(torch.equal(a[n], b[n]) for n in a)
    Joint,_ = page_classes()
    alone,(x,y) = Joint(tiny()),batch()
    for r in (0,1):
        logits,drloc = alone(x[2*r:2*r+2], torch.Generator().manual_seed(1+r))
        ((F.cross_entropy(logits, y[2*r:2*r+2]) + .5*drloc)/2).backward()
    for n,p in alone.named_parameters(): torch.testing.assert_close(a[n], p.grad, rtol=1e-4, atol=1e-6)

def test_without_ddp_around_it_the_mlps_drift_apart(ranks):
    a,b = ranks['outside']
    assert not torch.equal(a['drloc.mlp.0.weight'], b['drloc.mlp.0.weight'])
