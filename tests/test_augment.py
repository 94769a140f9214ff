"The paper's augmentation on the device: against PIL and timm on the same parameters, and its draws against timm's own."
import pickle, random, shutil
from functools import lru_cache
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
import matplotlib; matplotlib.use('Agg')
from fastai.vision.all import DisplayedTransform, Learner, TensorImage, set_seed
from timm.data import auto_augment as timm_aa
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
import vt_drloc.randaugment as R
from vt_drloc.randaugment import *
from vt_drloc.augment import AffineEach, AsOne, EraseEach, LightEach, MixupCutmix, get_tfms, plain
from vt_drloc.data import get_dls, photo_crops

cpu = torch.device('cpu')
# our operations in timm's names, in our order
TIMM = ['AutoContrast','Equalize','Invert','Rotate','PosterizeIncreasing','SolarizeIncreasing','SolarizeAdd','ColorIncreasing','ContrastIncreasing',
        'BrightnessIncreasing','SharpnessIncreasing','ShearX','ShearY','TranslateXRel','TranslateYRel']

@lru_cache
def photos(n, side):
    "Crops of scikit-learn's photos, and for the larger ones scikit-image's astronaut: (n, 3, side, side) uint8"
    x = photo_crops(n, 'all', size=side, seed=5)
    if side>32:
        from skimage.data import astronaut
        a = Image.fromarray(astronaut())
        for i in range(0, n, 3): x[i] = to_tensor(a.crop((40*i%300, 20*i%200, 40*i%300+200, 20*i%200+200)).resize((side,side)))
    return x

def to_tensor(im): return torch.from_numpy(np.array(im)).permute(2,0,1)
def to_pil(x): return Image.fromarray(x.permute(1,2,0).numpy())

def pil_op(im, op, arg):
    "One operation by timm's function, with timm's defaults for the paper's setting"
    if op==R.NONE: return im
    if op==R.POSTER and arg==0: return Image.new('RGB', im.size)        # newer PIL refuses 0 bits, older gives black
    if op in (R.TRANSX,R.TRANSY): arg = arg/im.size[op==R.TRANSY]
    if op in (R.POSTER,R.SOLAR,R.ADD): arg = int(arg)
    args = () if op<=R.INVERT else (arg,)
    return timm_aa.NAME_TO_OP[TIMM[op]](im, *args, fillcolor=(124,116,104), resample=Image.Resampling.BICUBIC)

def diff(a, b): return (a.float()-b.float()).abs().mean((1,2,3))

# ---- each operation

@pytest.mark.parametrize('side', [32,80])
@pytest.mark.parametrize('op', range(R.NONE), ids=OPS)
def test_operation_is_pils(op, side):
    torch.manual_seed(op)
    n = 8
    x,ops = photos(n, side),torch.full((n,), op)
    level,sign = torch.linspace(0, 1, n-2).tolist()+[0.9,0.9],torch.tensor([1.,-1]).repeat(n//2)
    arg = op_args(ops, torch.tensor(level), sign, (side,side))
    want = torch.stack([to_tensor(pil_op(to_pil(o), op, a)) for o,a in zip(x, arg.tolist())])
    got = apply_op(x, ops, arg)
    assert got.dtype==torch.uint8 and diff(got, want).max()<0.5 and diff(got, want).mean()<0.2
    assert diff(x, want)[-2:].max()>1                                   # the operation does something here

def test_operation_on_oblong_images():
    x = F.interpolate(photos(15, 32).float(), size=(40,64)).to(torch.uint8)
    ops = torch.arange(15); arg = op_args(ops, torch.full((15,), 0.9), torch.ones(15), (40,64))
    want = torch.stack([to_tensor(pil_op(to_pil(o), k, a)) for k,(o,a) in enumerate(zip(x, arg.tolist()))])
    assert diff(apply_op(x, ops, arg), want).max()<0.5

@pytest.mark.parametrize('make', [lambda: torch.full((1,3,16,16), 77), lambda: torch.arange(256).view(1,1,16,16).expand(1,3,16,16), lambda: torch.cat([torch.zeros(1,3,8,16),torch.full((1,3,8,16), 255)], 2)],
                         ids=['constant','ramp','two levels'])
@pytest.mark.parametrize('op', [R.AUTO,R.EQUAL,R.CONTRAST,R.SHARP])
def test_odd_histograms(op, make):
    x = make().to(torch.uint8).contiguous(); a = torch.tensor([1.9])
    got,want = apply_op(x, torch.tensor([op]), a),to_tensor(pil_op(to_pil(x[0]), op, 1.9))[None]
    assert diff(got, want)<0.5

def test_arguments_are_timms():
    "To the last whole number, at each magnitude"
    levels = torch.linspace(0, 10, 41)
    for k,name in enumerate(TIMM):
        theirs = timm_aa.LEVEL_TO_ARG[name]
        if theirs is None or k in (R.TRANSX,R.TRANSY): continue
        ours = op_args(torch.full((1,41), k), levels[None]/10, torch.ones(1, 41), (32,32))[0]
        want = torch.tensor([float(theirs(l, {})[0]) for l in levels.tolist()])
        if k not in (R.POSTER,R.SOLAR,R.ADD): ours,want = (ours-ours[0]).abs(),(want-want[0]).abs()     # timm draws the sign here
        assert torch.allclose(ours, want, atol=1e-5), name
    assert FILL==(124,116,104)

# ---- crop and resize

@pytest.mark.parametrize('side,size', [((32,32),(224,224)), ((60,90),(32,48)), ((200,120),(64,64))])
def test_crop_resize_is_pils(side, size):
    torch.manual_seed(0)
    x = F.interpolate(photos(12, 80).float(), size=side).to(torch.uint8)
    box = random_crops(12, side)
    want = torch.stack([to_tensor(TF.resized_crop(to_pil(o), *b, size, InterpolationMode.BICUBIC)) for o,b in zip(x, box.T.int().tolist())])
    assert diff(crop_resize(x, box, size), want).max()<(0.01 if size==(224,224) else 0.4)      # shrinking, PIL may begin with rows

# ---- the whole pipeline, on parameters that timm itself has drawn

def timm_recorded(x, size, monkeypatch):
    "timm's transform on each image of x: what comes out, and what it drew"
    rec,out,crop = [],[],RandomResizedCropAndInterpolation.get_params
    def _crop(*args): b = crop(*args); rec[-1]['box'] = b; return b
    def _flip(im): rec[-1]['flip'] = True; return hflip(im)
    hflip = TF.hflip
    monkeypatch.setattr(RandomResizedCropAndInterpolation, 'get_params', staticmethod(_crop))
    monkeypatch.setattr('torchvision.transforms.transforms.F.hflip', _flip)
    tfm = timm_transform(size)
    ra = next(t for t in tfm.transforms if isinstance(t, timm_aa.RandAugment))
    for k,o in enumerate(ra.ops):
        assert o.name==TIMM[k] and o.prob==0.5 and o.magnitude==9 and o.magnitude_std==0.5
        def _fn(im, *args, k=k, f=o.aug_fn, **kw):
            assert kw==dict(fillcolor=(124,116,104), resample=Image.Resampling.BICUBIC)
            a = args[0] if args else 0.
            rec[-1]['ops'].append((k, a*im.size[k==R.TRANSY] if k in (R.TRANSX,R.TRANSY) else a))
            return Image.new('RGB', im.size) if k==R.POSTER and a==0 else f(im, *args, **kw)
        o.aug_fn = _fn
    assert [type(t).__name__ for t in tfm.transforms][:3]==['RandomResizedCropAndInterpolation','RandomHorizontalFlip','RandAugment']
    assert tfm.transforms[-1].probability==0.25 and tfm.transforms[-1].per_pixel
    for o in x:
        rec.append(dict(flip=False, ops=[])); im = to_pil(o)
        for t in tfm.transforms[:3]: im = t(im)
        out.append(to_tensor(im))
    return torch.stack(out),rec

def as_draws(rec):
    ops = [(r['ops']+[(R.NONE,0.)]*2)[:2] for r in rec]
    op,arg = torch.tensor([[k for k,_ in o] for o in ops]).T,torch.tensor([[float(a) for _,a in o] for o in ops]).T
    return Draws(torch.tensor([r['box'] for r in rec]).T.float(), torch.tensor([r['flip'] for r in rec]), op, arg, torch.zeros(4, len(rec)))

@pytest.mark.parametrize('source', [32,80])
def test_pipeline_is_timms(source, monkeypatch):
    random.seed(0); np.random.seed(0)
    x = photos(48, source)
    want,rec = timm_recorded(x, (96,96), monkeypatch)
    assert 0<sum(r['flip'] for r in rec)<48 and sum(len(r['ops']) for r in rec)>20
    d = as_draws(rec)
    exact = paper_exact(x, d, (96,96))
    assert diff(exact, want).mean()<0.2 and diff(exact, want).max()<2
    if source==32:
        fast = paper_fast(x, d, (96,96))
        assert diff(fast, want).mean()<4
        plain = (d.op==R.NONE).all(0)
        assert plain.any() and diff(fast, want)[plain].max()<0.6
        geometry = ((d.op==R.NONE)|R._geometric(d.op)).all(0)&~plain
        assert geometry.any() and diff(fast, want)[geometry].max()<1.5

@pytest.mark.parametrize('op', range(R.NONE+1), ids=lambda o: [*OPS,'None'][o])
def test_what_lies_outside_a_crop_does_not_matter(op):
    "To the fast form as little as to the exact one, which cuts first; and the two agree"
    x,ops = photos(6, 32),torch.full((1,6), op)
    y = torch.tensor([0,255], dtype=torch.uint8).repeat(3).view(6,1,1,1).repeat(1,3,32,32); y[:,:,6:26,4:28] = x[:,:,6:26,4:28]
    d = Draws(torch.tensor([[6,4,20,24.]]*6).T, torch.zeros(6, dtype=torch.bool), ops, op_args(ops, torch.full((1,6), .9), torch.tensor([[1.,-1]*3]), (96,96)), torch.zeros(4, 6))
    fast = paper_fast(x, d, (96,96))
    assert (fast-paper_fast(y, d, (96,96))).abs().max()<1e-3 and diff(fast, paper_exact(y, d, (96,96))).mean()<7

def test_fill_goes_through_what_comes_after():
    x = photos(2, 32)
    d = Draws(torch.tensor([[0,0,32,32.]]*2).T, torch.zeros(2, dtype=torch.bool), torch.tensor([[R.TRANSX,R.INVERT],[R.INVERT,R.TRANSX]]),
              torch.tensor([[40.,0],[0,40.]]), torch.zeros(4, 2))
    for y in (paper_fast(x, d, (96,96)), paper_exact(x, d, (96,96)).float()):
        assert y[0,:,50,-1].tolist()==[255-o for o in FILL] and y[1,:,50,-1].tolist()==list(FILL)

def test_sharpness_of_the_enlarged_image():
    "At the source itself, as strong as PIL's; enlarged sevenfold it does next to nothing"
    x = photos(4, 32); ops,arg = torch.full((1,4), R.SHARP),torch.full((1,4), 1.9)
    d = Draws(torch.tensor([[0,0,32,32.]]*4).T, torch.zeros(4, dtype=torch.bool), ops, arg, torch.zeros(4, 4))
    inner = lambda t: t[:,:,2:-2,2:-2].float()
    assert (inner(paper_fast(x, d, (32,32)))-inner(paper_exact(x, d, (32,32)))).abs().mean()<1 and diff(paper_fast(x, d, (32,32)), x).max()>3
    none = d._replace(op=torch.full((1,4), R.NONE))
    assert diff(paper_fast(x, d, (224,224)), paper_fast(x, none, (224,224))).mean()<0.5

def test_room_changes_nothing():
    torch.manual_seed(0)
    n = 300; x = photos(60, 32).repeat(5,1,1,1); d = paper_draws(n, (32,32), (40,40))
    assert R._room(n, 0.5/15)<n and R._room(n, 0.2)<n
    assert paper_exact(x, d, (40,40), 0.5).equal(paper_exact(x, d, (40,40))) and paper_fast(x, d, (40,40), 0.5).equal(paper_fast(x, d, (40,40)))

# ---- the draws are timm's

def timm_ops(n):
    "What timm's RandAugment draws for n images of 100 pixels: [(operation, argument), ...] each"
    ra,rec = timm_aa.rand_augment_transform('rand-m9-mstd0.5-inc1', dict(translate_const=45, img_mean=(124,116,104), interpolation=Image.Resampling.BICUBIC)),[]
    for k,o in enumerate(ra.ops): o.aug_fn = lambda im,*args,k=k,**kw: (rec[-1].append((k,args[0] if args else 0.)),im)[1]
    im = Image.new('RGB', (100,100))
    for _ in range(n): rec.append([]); ra(im)
    return rec

def test_operations_are_drawn_as_timm_draws_them():
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    theirs,(op,arg) = timm_ops(12_000),random_ops(40_000, (100,100))
    n_theirs,n_ours = [np.bincount([len(o) for o in theirs], minlength=3),np.bincount((op<R.NONE).sum(0), minlength=3)]
    assert chi2_contingency([n_theirs,n_ours]).pvalue>1e-3               # how many an image
    used = op[op<R.NONE]; flat = [o for r in theirs for o in r]
    assert chi2_contingency([np.bincount([k for k,_ in flat], minlength=15),np.bincount(used, minlength=15)]).pvalue>1e-3
    pairs = [np.bincount([r[0][0]*15+r[1][0] for r in theirs if len(r)==2], minlength=225),np.bincount(op[0,both]*15+op[1,both] if (both := (op<R.NONE).all(0)).any() else 0, minlength=225)]
    assert chi2_contingency(pairs).pvalue>1e-3                          # pairs, repetitions too
    for k in range(3, 15):
        a,b = np.array([a for o,a in flat if o==k])*(100 if k>=R.TRANSX else 1),arg[op==k].numpy()
        assert ks_2samp(a, b).pvalue>1e-3, OPS[k]
    def levels(k, a): return np.round(np.abs(np.asarray(a, dtype=np.float64)-(1 if k in FACTORS else 0))/SPAN[k], 5)
    FACTORS,SPAN = (7,8,9,10),{3:30, 7:0.9, 8:0.9, 9:0.9, 10:0.9, 11:0.3, 12:0.3, 13:0.45, 14:0.45}
    pooled = [np.concatenate([levels(k, [a for o,a in flat if o==k]) for k in SPAN]),np.concatenate([levels(k, arg[op==k].numpy()/(100 if k>=R.TRANSX else 1)) for k in SPAN])]
    assert abs(pooled[0].max()-1)<1e-4 and ks_2samp(*pooled).pvalue>1e-3  # magnitudes of all together: a finer comb

def test_crops_are_drawn_as_timm_draws_them():
    random.seed(0); torch.manual_seed(0)
    for H,W in ((32,32),(60,20)):                                       # the second often fits in none of ten attempts
        im = Image.new('RGB', (W,H))
        a = np.array([RandomResizedCropAndInterpolation.get_params(im, (0.08,1.), (3/4,4/3)) for _ in range(6000)])
        b = random_crops(20_000, (H,W)).T.double().numpy()
        assert (b[:,:2]>=0).all() and (b[:,0]+b[:,2]<=H).all() and (b[:,1]+b[:,3]<=W).all()
        for f in (lambda o: o[:,0], lambda o: o[:,1], lambda o: o[:,2], lambda o: o[:,3], lambda o: o[:,2]*o[:,3], lambda o: o[:,2]/o[:,3]):
            assert ks_2samp(f(a), f(b)).pvalue>1e-3

def test_boxes_are_erased_as_timm_erases_them(monkeypatch):
    random.seed(0); torch.manual_seed(0)
    seen = []
    class Canvas:                                                       # timm writes its box here
        def __setitem__(self, i, v): seen.append((i[1].start, i[2].start, i[1].stop-i[1].start, i[2].stop-i[2].start))
    monkeypatch.setattr('timm.data.random_erasing._get_pixels', lambda *a, **k: None)
    t = RandomErasing(0.25, mode='pixel', device='cpu'); n = 20_000
    for _ in range(n): t._erase(Canvas(), 3, 48, 40, torch.float32)
    a,b = np.array(seen),random_erasing(n, (48,40)).T.double().numpy(); some = b[:,2]>0
    assert chi2_contingency([[len(a),n-len(a)],[some.sum(),n-some.sum()]]).pvalue>1e-3
    for i in range(4): assert ks_2samp(a[:,i], b[some,i]).pvalue>1e-3

# ---- the transform

def test_normalises_and_erases():
    torch.manual_seed(0)
    x = torch.full((2000,3,16,16), 124, dtype=torch.uint8)
    y = PaperAugment(16, p=0., erase=0.25, compile=False).run(x)
    grey = (124/255-torch.tensor([0.485,0.456,0.406]))/torch.tensor([0.229,0.224,0.225])
    same = (y-grey.view(1,3,1,1)).abs()<1e-4
    noise = y[~same]
    assert abs((~same).flatten(1).any(1).float().mean()-0.25)<0.04 and abs(noise.mean())<0.03 and abs(noise.std()-1)<0.03
    box = (~same).any(1)[(~same).flatten(1).any(1)][:40]
    for o in box: assert o.sum()>=0.97*o.any(1).sum()*o.any(0).sum()    # one whole box (noise may hit the value by chance)
    assert (PaperAugment(16, p=0., erase=0., compile=False).run(x)-grey.view(1,3,1,1)).abs().max()<1e-4

@pytest.mark.parametrize('mode', ['fast','exact'])
def test_each_image_has_its_own_and_seeds_repeat(mode):
    t,x = PaperAugment(40, mode=mode),TensorImage(photos(1, 32).expand(40,-1,-1,-1).contiguous()); before = x.clone()
    torch.manual_seed(1); a = t(x, split_idx=0)
    torch.manual_seed(1); b = t(x, split_idx=0)
    assert a.equal(b) and not a.equal(t(x, split_idx=0)) and x.equal(before) and type(a) is TensorImage and a.dtype==torch.float32
    assert len(a.as_subclass(torch.Tensor).flatten(1).unique(dim=0))==40 and a.isfinite().all()
    assert t(x, split_idx=1) is x                                       # training only

def test_flip_can_be_off():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(200,3,32,32).contiguous()
    def slope(t): y = t.run(ramp); return (y[:,:,:,-1]-y[:,:,:,0]).mean((1,2))
    torch.manual_seed(0)
    assert (slope(PaperAugment(32, flip=0., p=0., erase=0.))>0).all()
    assert 70<(slope(PaperAugment(32, flip=0.5, p=0., erase=0.))>0).sum()<130
    assert get_tfms('paper', 224, flip=False)[0].flip==0 and get_tfms('paper', 224)[0].flip==0.5 and get_tfms('paper_exact', 96)[0].mode=='exact'
    assert get_tfms('strong', 32)[0].area==(.8,1.) and get_tfms('paper', 32)[0].area==(.08,1.)

class HostReads(TorchDispatchMode):
    "Counts what would make the host wait for a device, or copy to it from memory that is not pinned"
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        o = torch.ops.aten
        if func.overloadpacket in (o._local_scalar_dense,o.nonzero,o.is_nonzero,o.lift_fresh,o.masked_select): self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('mode', ['fast','exact'])
def test_nothing_waits_for_the_device(mode):
    t,x = PaperAugment(40, mode=mode),photos(60, 32).repeat(5,1,1,1)
    with HostReads() as reads: t.run(x)
    assert reads.seen==[]
    with HostReads() as reads: torch.tensor([1.]), x[0,0,0,0].item()
    assert len(reads.seen)==2                                           # the instrument works

@pytest.mark.parametrize('mode', ['fast','exact'])
def test_compiles_as_one_graph(mode):
    "The draws and what is made of them"
    t,x = PaperAugment(40, mode=mode),photos(60, 32)
    torch._dynamo.reset()
    set_seed(0); got = torch.compile(t.run, fullgraph=True, dynamic=False, backend='eager')(x)
    set_seed(0); want = t.run(x)
    assert got.equal(want) and got.shape==(60,3,40,40)

def test_bad_input():
    with pytest.raises(ValueError, match="mode='quick': choose 'fast' or 'exact'"): PaperAugment(32, mode='quick')
    for area in ((0,1.), (.5,1.1), (.9,.8)):
        with pytest.raises(ValueError, match=r"area=\(.*\): give the least and the most"): PaperAugment(32, area=area)
    with pytest.raises(TypeError, match='torch.float32: PaperAugment takes uint8'): PaperAugment(32).run(torch.rand(2,3,32,32))
    with pytest.raises(ValueError, match=r"80 x 80 pixels are larger than the result of 64 x 64.*mode='exact'"): PaperAugment(64).run(photos(3, 80))
    with pytest.raises(ValueError, match='40 x 80 pixels are larger'): PaperAugment(64).run(photos(3, 80)[:,:,:40])
    assert PaperAugment(64, mode='exact').run(photos(3, 80)).shape==(3,3,64,64) and PaperAugment(32, area=(1.,1.)).area==(1.,1.)
    with pytest.raises(ValueError, match='choose from none, light, strong, paper, paper_exact'): get_tfms('papier')

def test_speed_table():
    rows = augment_speed(cpu, bs=4, size=40, seconds=0.01, workers=0)
    assert {'fast','exact','torchvision batch','torchvision image','timm'}<={r['name'] for r in rows} and all(r['images_per_s']>0 for r in rows)

# ---- with the data

def test_training_batches_are_the_papers_and_test_batches_pils():
    dls = get_dls('digits', bs=16, size=224, batch_tfms=get_tfms('paper', 224, flip=False), device=cpu)
    x,_ = dls.train.one_batch()
    assert x.shape==(16,3,224,224) and x.dtype==torch.float32 and type(x) is TensorImage
    assert [type(o).__name__ for o in dls.train.after_batch.fs]==['PaperAugment'] and dls.train.after_batch.fs[0].crop
    xv,_ = dls.valid.one_batch()
    ims = [to_pil(o).resize((256,256), Image.Resampling.BICUBIC).crop((16,16,240,240)) for o in dls.valid_ds.x[:16]]
    want = (torch.stack([to_tensor(o) for o in ims])/255-torch.tensor(dls.info.mean).view(3,1,1))/torch.tensor(dls.info.std).view(3,1,1)
    assert (xv.as_subclass(torch.Tensor)-want).abs().mean()*255*0.225<1
    dls.train.show_batch(max_n=2)
    assert get_dls('digits', bs=16, batch_tfms=get_tfms('paper', 32), device=cpu).valid.one_batch()[0].shape[-1]==32

def test_photos_from_files_are_cropped_once(tmp_path):
    for s in ('train','valid'):
        for c in 'ab':
            (tmp_path/s/c).mkdir(parents=True)
            for i in range(3): to_pil(photos(6, 80)[i]).save(tmp_path/s/c/f'{i}.png')
    dls = get_dls(tmp_path, bs=4, size=72, in_memory=False, num_workers=0, batch_tfms=get_tfms('paper', 72), device=cpu)
    assert dls.one_batch()[0].shape==(4,3,72,72) and not dls.train.after_batch.fs[0].crop and dls.info.held=='files'
    assert get_tfms('paper', 72)[0].crop

# ---- mixing: timm's numbers, fewer copies

@pytest.mark.parametrize('kw', [dict(cutmix=0.), dict(mixup=0.)])
def test_mixing_is_timms(kw):
    cb = MixupCutmix(n_classes=10, **kw); cb.learn = learn = Learner(get_dls('digits', bs=32, device=cpu), torch.nn.Identity(), loss_func=F.cross_entropy)
    x,y = learn.dls.one_batch(); x,y = x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)
    for seed in range(4):
        learn.xb,learn.yb = (x,),(y,)
        cb.before_fit(); set_seed(seed); cb.before_batch()
        set_seed(seed); theirs = Mixup(kw.get('mixup', 0.8), kw.get('cutmix', 1.), label_smoothing=0.1, num_classes=10)(x.clone(), y)
        assert torch.allclose(learn.xb[0], theirs[0], atol=1e-5) and torch.allclose(learn.yb[0], theirs[1], atol=1e-6)

def light_loader(device=cpu, **kw):
    "A training loader of digits and one raw batch of it"
    dl = get_dls('digits', bs=64, batch_tfms=get_tfms('light'), device=device, **kw).train
    dl.before_iter()
    return dl,dl.dataset.to(torch.device(device)).batch(torch.arange(64, device=device))

def test_transforms_as_one_function():
    "The same numbers, fastai's types, and the list of transforms stays"
    dl,b = light_loader()
    one = AsOne(dl.after_batch, backend='eager')
    set_seed(3); x,y = dl.after_batch(b)
    set_seed(3); u,v = one(b)
    assert type(u) is TensorImage and torch.allclose(x, u, atol=1e-5) and v.equal(y) and type(v) is type(y)
    assert [type(t).__name__ for t in one.fs]==['IntToFloatTensor','AffineEach','LightEach','Normalize','EraseEach'] and one.run() is one.run()

def test_as_one_follows_its_list():
    dl,b = light_loader()
    one = AsOne(dl.after_batch, backend='eager'); one(b)
    one.split_idx = 1                                                       # nothing that is meant for training alone
    assert one(b)[0].equal(one(b)[0])
    one.split_idx = 0
    class Black(DisplayedTransform):
        order = 200
        def encodes(self, x:TensorImage): return x*0
    one.add([Black()])                                                      # no plain form: called one after the other
    assert one.run() is None and one(b)[0].abs().sum()==0 and type(one(b)[0]) is TensorImage
    class Halved(LightEach):                                                # does something else than its parent's plain form
        def encodes(self, x:TensorImage): return x/2
    assert plain(Halved()) is None and plain(LightEach()) is not None
    again = pickle.loads(pickle.dumps(AsOne(dl.after_batch, backend='eager')))
    assert len(again.fs)==len(dl.after_batch.fs) and again(b)[0].shape==b[0].shape

# ---- on a GPU

@pytest.mark.cuda
def test_as_one_on_a_gpu():
    "Compiled it gives what the transforms give, its own numbers scatter like theirs, and nothing waits"
    import torch._inductor.config as inductor
    dl,b = light_loader('cuda')
    x = b[0].as_subclass(torch.Tensor)
    for f in map(plain, dl.after_batch.fs):                 # one at a time: within a whole the compiler may change the order of draws
        with inductor.patch(fallback_random=True): one = torch.compile(f, fullgraph=True, dynamic=False)
        set_seed(3); want = f(x)
        with inductor.patch(fallback_random=True): set_seed(3); got = one(x)
        assert torch.allclose(want, got, atol=1e-5)
        x = want
    torch._dynamo.reset(); one = AsOne(dl.after_batch); one(b)
    torch.cuda.set_sync_debug_mode('error')
    try: us = torch.stack([one(b)[0].as_subclass(torch.Tensor) for _ in range(20)])
    finally: torch.cuda.set_sync_debug_mode('default')
    xs = torch.stack([dl.after_batch(b)[0].as_subclass(torch.Tensor) for _ in range(20)])
    assert type(one(b)[0]) is TensorImage and not us[0].equal(us[1]) and (us.mean()-xs.mean()).abs()<.03 and (us.std()/xs.std()-1).abs()<.03

@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['fast','exact'])
def test_compiled_on_a_gpu(mode):
    t,x = PaperAugment(96, mode=mode),photos(60, 32).repeat(5,1,1,1).cuda()
    d = paper_draws(300, (32,32), (96,96), device='cuda', erase=0.)
    a,b = torch.compile(t.apply, fullgraph=True, dynamic=False)(x, d),t.apply(x, d)
    on_cpu = t.apply(x.cpu(), Draws(*(o.cpu() for o in d)))
    assert (a-b).abs().mean()*58<0.05 and (a.cpu()-on_cpu).abs().mean()*58<0.05

@pytest.mark.cuda
@pytest.mark.parametrize('held', ['device','host'])
def test_an_epoch_on_a_gpu_never_waits(held):
    dls = get_dls('digits', bs=64, size=96, batch_tfms=get_tfms('paper', 96, flip=False), device='cuda', held=held)
    for _ in dls.train: pass
    ys = []
    try:
        torch.cuda.set_sync_debug_mode('error')
        for x,y in dls.train: ys.append(y)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert torch.cat(ys).bincount().sum()==1437//64*64

@pytest.mark.skipif(not shutil.which('g++'), reason='the compiler of PyTorch needs g++')
def test_compiled_minimum_of_bytes():
    "AutoContrast asks for the darkest and the brightest level; compiled for a CPU, PyTorch 2.15 gets those of bytes wrong"
    x = photos(12, 32)
    op,arg = torch.zeros(len(x), dtype=torch.long),torch.zeros(len(x))
    f = lambda x: apply_op(x, op, arg, 0.)                                   # room for the fewest of the other operations
    assert torch.equal(torch.compile(f, fullgraph=True, dynamic=False)(x), f(x))
    torch.compiler.reset()

# ---- the light augmentation: draws within what is asked for, and all of it

def test_affine_draws():
    "Half are mirrored and half turned and zoomed, over the whole range; every image moves by whole pixels"
    torch.manual_seed(0)
    a,H,W = AffineEach(shift=4, max_deg=10, max_zoom=1.25),32,48
    t = a.theta(torch.zeros(4000, 3, H, W))
    c,s = t[:,1,1],-t[:,0,1]*W/H
    deg,zoom,mirrored,move = torch.rad2deg(torch.atan2(s, c)),(c*c+s*s).sqrt(),t[:,0,0]<0,t[:,:,2]*torch.tensor([W,H])/2
    assert torch.allclose(t[:,0,0], c*(1-2*mirrored.float())) and torch.allclose(t[:,1,0], s*W/H*(1-2*mirrored.float()), atol=1e-6)
    assert .45 < mirrored.float().mean() < .55 and .45 < (deg==0).float().mean() < .55 and ((deg==0)==((zoom-1).abs()<1e-6)).float().mean() > .999
    assert 9.8 < deg.max() <= 10.001 and -10.001 <= deg.min() < -9.8 and abs(deg.mean()) < .3
    assert 1.24 < zoom.max() < 1.2501 and .7999 < zoom.min() < .806 and abs(zoom.log().mean()) < .006
    assert (move-move.round()).abs().max() < 1e-4 and all({*move[:,i].round().int().tolist()}=={*range(-4,5)} for i in (0,1))

def test_light_draws():
    "Half are lighter or darker and half of other contrast, over the whole range; about the image's own mean"
    torch.manual_seed(0)
    x = torch.tensor([.3,.5]).view(2,1).expand(4000,3,2,2)
    y = LightEach(max_lighting=.2, p=.5).plain(x)
    bright,scale = y.mean((1,2,3))-.4,(y[:,0,1,0]-y[:,0,0,0])/.2
    assert -.1001 < bright.min() < -.095 and .095 < bright.max() < .1001 and .799 < scale.min() < .81 and 1.19 < scale.max() < 1.201
    assert all(.46 < (o.abs()>1e-5).float().mean() < .54 for o in (bright, scale-1))

def test_erased_boxes():
    "One box of noise in as many images as asked for, of the size asked for, anywhere; the rest stays"
    e,x = EraseEach(p=.5, lo=.1, hi=.3),torch.full((3000, 3, 32, 32), 7.)
    torch.manual_seed(0); m = e.boxes(x)[:,0]
    torch.manual_seed(0); y = e.plain(x)
    inside = m[:,None].expand_as(x)
    assert (y[~inside]==7).all() and (y[inside]!=7).all() and abs(y[inside].mean()) < .01 and abs(y[inside].std()-1) < .01
    rows,cols = m.any(2),m.any(1)
    assert torch.equal(m, rows[:,:,None]&cols[:,None,:]) and all(((o.int().diff(dim=1)!=0).sum(1)<=2).all() for o in (rows,cols))
    some = m.any((1,2))
    area,aspect = m.float().mean((1,2))[some],rows.sum(1)[some]/cols.sum(1)[some]
    assert .46 < some.float().mean() < .54 and .08 < area.min() < .12 and .28 < area.max() < .32
    assert .25 < aspect.min() < .35 and 2.9 < aspect.max() < 4 and m.any(0).all()
