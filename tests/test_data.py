"Data by name and their augmentation: what the pages would not teach. Sets that are not bundled are made small, in the published layout."
import os,io,pickle,random,shutil,threading
from pathlib import Path
from urllib.error import URLError
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
import matplotlib; matplotlib.use('Agg')
from fastai.vision.all import (DisplayedTransform, Learner, TfmdDL, TensorImage, TensorCategory, Datasets, PILImage, CrossEntropyLossFlat, set_seed, accuracy,
                               SGD, load_learner, DataLoaders, Category, Normalize, IntToFloatTensor)
import vt_drloc.data as D
from vt_drloc.data import get_dls,list_data,SPECS,DataError,MemoryDL,MemoryImages,stratified,decode,crop_boxes,photo_crops,data_home
from vt_drloc.augment import get_tfms,AffineEach,LightEach,EraseEach,MixupCutmix

cpu = torch.device('cpu')

# ---- made data

def image(path, size=(40,32), color=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.RandomState(seed).randint(0, 256, (*size[::-1],3), dtype=np.uint8) if color is None else np.full((*size[::-1],3), color, dtype=np.uint8)
    Image.fromarray(a).save(path)
    return path

def folder(root, classes=('ant','bee'), n=(6,4), valid='valid', size=(40,32), suffix='png'):
    for split,k in zip(('train',valid), n):
        for j,c in enumerate(classes):
            for i in range(k): image(root/split/c/f'{i}.{suffix}', size, seed=100*j+i)
    return root

def svhn(root, n=(20,12), labels=None):
    from scipy.io import savemat
    root.mkdir(parents=True, exist_ok=True)
    for split,k in zip(('train','test'), n):
        y = np.arange(k)%10+1 if labels is None else np.full(k, labels)
        savemat(root/f'{split}_32x32.mat', dict(X=np.random.RandomState(0).randint(0, 256, (32,32,3,k), dtype=np.uint8), y=y[:,None].astype(np.uint8)))
    return root

def flowers(root, labels=(1,2,3,102,1,2,3,102,5,6)):
    from scipy.io import savemat
    base = root/'flowers-102'
    for i in range(1, 11): image(base/'jpg'/f'image_{i:05d}.jpg', (50,40), seed=i)
    savemat(base/'imagelabels.mat', dict(labels=np.array([labels], dtype=np.uint8)))
    savemat(base/'setid.mat', dict(trnid=np.array([[1,2,3]]), valid=np.array([[4,5]]), tstid=np.array([[6,7,8,9,10]])))
    return root

def domain(root, name='sketch', line='{name}/{c}/{i}.jpg {j}'):
    for split,k in (('train',4),('test',2)):
        rows = [(c,j,f'{split}{i}') for j,c in enumerate(('aircraft_carrier','zigzag')) for i in range(k)]
        for c,j,i in rows: image(root/name/c/f'{i}.jpg', (60,50))
        (root/f'{name}_{split}.txt').write_text('\n'.join(line.format(name=name, c=c, i=i, j=j) for c,j,i in rows)+'\n')
    return root

@pytest.fixture
def fastai_home(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    from fastai.data.external import fastai_cfg
    getattr(fastai_cfg, 'cache_clear', lambda: None)()
    yield fastai_cfg().path('data')
    getattr(fastai_cfg, 'cache_clear', lambda: None)()

def net(c=10, side=32): return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, c))

class HostReads(TorchDispatchMode):
    "Counts the operations that would make the host wait for an accelerator."
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero): self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

# ---- names, counts, splits

PUBLISHED = dict(cifar10=(10,50000,10000), cifar100=(100,50000,10000), flowers102=(102,2040,6149), svhn=(10,73257,26032), imagenet100=(100,126689,5000),
                 clipart=(345,33525,14604), infograph=(345,36023,15582), painting=(345,50416,21850), quickdraw=(345,120750,51750),
                 real=(345,120906,52041), sketch=(345,48212,20916), digits=(10,1437,360))

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_counts(name): assert (SPECS[name].n_classes,SPECS[name].n_train,SPECS[name].n_test)==PUBLISHED[name]

def test_digits():
    dls = get_dls('digits', bs=100, device=cpu)
    assert (len(dls.train_ds),len(dls.valid_ds),dls.c,list(dls.vocab)) == (1437,360,10,[str(i) for i in range(10)])
    assert len(dls.train)==14 and len(dls.valid)==4
    x,y = dls.one_batch()
    assert type(x) is TensorImage and type(y) is TensorCategory and x.shape==(100,3,32,32) and x.dtype==torch.float32 and y.dtype==torch.int64
    mean,std = (torch.tensor(o).view(3,1,1) for o in (dls.info.mean,dls.info.std))
    raw = x.as_subclass(torch.Tensor)*std+mean
    assert -1e-5<raw.min() and raw.max()<1+1e-5 and raw.std()>0.2
    from sklearn.datasets import load_digits
    held = torch.cat([dls.train_ds.x,dls.valid_ds.x]).float().mean()/255
    assert held.item()==pytest.approx(load_digits().images.mean()/16, abs=.002)     # as bright as scikit-learn's
    a,b = (get_dls('digits', device=cpu).valid_ds.y for _ in range(2))
    assert a.equal(b) and a.bincount().min()>=34                      # the same split each time, every class at its share
    assert dls.info.in_memory and dls.info.name=='digits' and dls.info.size==(32,32)

def test_valid_is_all_in_order():
    dls = get_dls('digits', bs=64, device=cpu)
    assert torch.cat([y for _,y in dls.valid]).as_subclass(torch.Tensor).equal(dls.valid_ds.y)

def test_photos_share_no_pixel(monkeypatch):
    class Half: images = [np.concatenate([np.zeros((200,300,3)),np.full((200,200,3), 255)], 1).astype(np.uint8)]
    monkeypatch.setattr('sklearn.datasets.load_sample_images', lambda: Half)
    assert photo_crops(200, 'train').max()==0 and photo_crops(200, 'valid').min()==255

def test_photos():
    dls = get_dls('photos', bs=32, expect=(200,100), device=cpu)
    assert (len(dls.train_ds),len(dls.valid_ds),dls.c) == (200,100,1)
    _,y = dls.one_batch()
    assert F.cross_entropy(torch.randn(32, 1), y.as_subclass(torch.Tensor)).item()==0
    assert photo_crops(5).equal(photo_crops(5)) and not photo_crops(5).equal(photo_crops(5, seed=1))
    with pytest.raises(DataError, match='share pixels'): get_dls('photos', expect=(200,100), heldout=50, device=cpu)

def test_stratified():
    y = np.repeat([0,1,2], [50,30,20])
    rest,cut = stratified(y, 13)
    assert sorted([*rest,*cut])==list(range(100)) and len(cut)==13 and set(np.bincount(y[cut])-np.array([6,3,2]))<={0,1}
    assert (cut==stratified(y, 13)[1]).all() and (cut!=stratified(y, 13, seed=1)[1]).any()
    for n in (0,100,-1):
        with pytest.raises(DataError, match='hold out'): stratified(y, n)

def test_heldout_comes_from_training():
    full,dls = get_dls('digits', device=cpu),get_dls('digits', heldout=200, device=cpu)
    assert (dls.info.n_train,dls.info.n_valid)==(1237,200)
    both = torch.cat([dls.train_ds.x,dls.valid_ds.x]).flatten(1).sum(1).sort()[0]
    assert both.equal(full.train_ds.x.flatten(1).sum(1).sort()[0])
    assert dls.valid_ds.y.bincount().min()>=19
    assert get_dls('digits', heldout=200, device=cpu).valid_ds.x.equal(dls.valid_ds.x)
    assert not get_dls('digits', heldout=200, seed=1, device=cpu).valid_ds.x.equal(dls.valid_ds.x)

# ---- the loader in memory keeps fastai's conventions

def order(seed):
    set_seed(seed)
    return torch.cat([y for _,y in get_dls('digits', device=cpu).train]).as_subclass(torch.Tensor)

def test_order_follows_the_seed(): assert order(3).equal(order(3)) and not order(3).equal(order(4))

def test_new_order_each_epoch():
    dls = get_dls('digits', device=cpu)
    a,b = (torch.cat([y for _,y in dls.train]) for _ in range(2))
    assert not a.equal(b) and len(a)==1437//64*64

def test_takes_no_more_random_numbers_than_stock():
    ds,after = get_dls('digits', device=cpu).train_ds,[]
    for cls in (MemoryDL,TfmdDL):
        set_seed(1)
        dl = cls(ds, bs=64, shuffle=True, drop_last=True, num_workers=0)
        ys = torch.cat([y for _,y in dl]).as_subclass(torch.Tensor)
        after.append((ys,torch.rand(1).item(),np.random.rand(),random.random()))
    assert after[0][0].equal(after[1][0]) and after[0][1:]==after[1][1:]     # the same order, too

def test_item_transforms_fall_back_to_stock():
    ds,calls = get_dls('digits', device=cpu).valid_ds,[]
    dl = MemoryDL(ds, bs=64, after_item=lambda o: (calls.append(1),o)[1])
    assert sum(len(y) for _,y in dl)==360 and len(calls)==2*360       # once for the image, once for the label

def test_show_batch_and_unique():
    dls = get_dls('digits', device=cpu)
    dls.show_batch(max_n=4); dls.train.show_batch(unique=True, max_n=4); dls.valid.show_batch(max_n=2)
    x,y = dls.valid.decode_batch(dls.valid.one_batch(), max_n=1)[0]
    assert y==dls.vocab[dls.valid_ds.y[0]]
    if x.dtype!=torch.uint8: x = x.long()
    assert (x-dls.valid_ds.x[0].long()).abs().max()<=1

def test_learner_round_trip(tmp_path):
    set_seed(0)
    dls = get_dls('digits', bs=64, size=24, batch_tfms=get_tfms(size=24), device=cpu)
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD, path=tmp_path)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.1)
    with learn.no_bar():
        p,t = learn.get_preds()
        assert t.as_subclass(torch.Tensor).equal(dls.valid_ds.y)
        p0,t0 = learn.get_preds(ds_idx=0)
        assert len(p0)==1437 and t0.as_subclass(torch.Tensor).equal(dls.train_ds.y)                   # reordered, none dropped
        image(tmp_path/'a.png', (32,32))
        label,i,probs = learn.predict(tmp_path/'a.png')
        assert label in dls.vocab and probs.shape==(10,)
        arrays = [dls.valid_ds.x[j].permute(1,2,0).numpy() for j in range(5)]
        q,_ = learn.get_preds(dl=dls.test_dl(arrays, num_workers=0))
        assert (q.argmax(1)==p[:5].argmax(1)).sum()>=4
    learn.export('e.pkl')
    assert learn.dls is dls
    raw = (tmp_path/'e.pkl').read_bytes()
    assert b'vt_drloc' not in raw and len(raw)<200_000                # stock fastai inside, and no image
    with load_learner(tmp_path/'e.pkl').no_bar() as other: assert other.predict(tmp_path/'a.png')[0]==label
    learn.show_results(max_n=2)

def test_distributed_halves(monkeypatch):
    pytest.importorskip('accelerate')                                  # fastai.distributed needs it
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self,t,rank: t)
    dls = get_dls('digits', bs=20, device=cpu)
    ys = [torch.cat([y for _,y in DistributedDL(dls.valid, rank=r, world_size=2)]) for r in (0,1)]
    assert [len(y) for y in ys]==[180,180] and torch.cat(ys).bincount().equal(dls.valid_ds.y.bincount())

def test_no_host_read_in_an_epoch():
    dls = get_dls('digits', bs=64, batch_tfms=get_tfms(), device=cpu)
    cb = MixupCutmix(); cb.learn = learn = Learner(dls, net(), loss_func=F.cross_entropy); cb.before_fit()
    it = iter(dls.train); next(it)
    with HostReads() as reads:
        for x,y in it: learn.xb,learn.yb = (x,),(y,); cb.before_batch()
    assert reads.seen==[]
    with HostReads() as reads: y.max().item()
    assert reads.seen                                                 # the instrument works

def test_sizes():
    assert get_dls('digits', size=48, device=cpu).one_batch()[0].shape==(64,3,48,48)
    dls = get_dls('digits', size=(24,40), device=cpu)
    assert dls.valid.one_batch()[0].shape==(64,3,24,40) and dls.info.size==(24,40)

@pytest.mark.parametrize('y', [[0,2], [-1,1]])
def test_labels_outside_the_classes(y):
    with pytest.raises(DataError, match='outside the 2 classes'): MemoryImages(torch.zeros(2,3,4,4, dtype=torch.uint8), torch.tensor(y), ['a','b'])

# ---- folders

@pytest.mark.parametrize('valid', ['valid','val','test'])
def test_folder_in_memory(tmp_path, valid):
    dls = get_dls(folder(tmp_path/'bugs', valid=valid), bs=4, size=32, device=cpu)
    assert type(dls.train) is MemoryDL and list(dls.vocab)==['ant','bee'] and dls.info.name=='bugs'
    assert (dls.info.n_train,dls.info.n_valid)==(12,8) and dls.one_batch()[0].shape==(4,3,32,32)

class Mark(DisplayedTransform):
    order = 20                                                                                         # after the floats, before they are normalised
    def encodes(self, x:TensorImage): return x+100

@pytest.mark.parametrize('in_memory', [True,False])
def test_transforms_are_for_training_batches(tmp_path, in_memory):
    dls = get_dls(folder(tmp_path/'bugs', size=(64,64)), bs=4, size=64, batch_tfms=[Mark()], in_memory=in_memory, num_workers=0, device=cpu)
    assert dls.train.one_batch()[0].min() > 100 and dls.valid.one_batch()[0].max() < 10

def test_folder_from_files(tmp_path):
    root = folder(tmp_path/'bugs', suffix='jpg', size=(90,70))
    dls = get_dls(str(root), bs=4, size=(64,80), num_workers=0, device=cpu)
    assert not dls.info.in_memory and dls.one_batch()[0].shape==(4,3,64,80) and dls.valid.one_batch()[0].shape==(4,3,64,80)
    assert dls.train.one_batch()[1].dtype==torch.int64 and torch.cat([y for _,y in dls.valid]).tolist()==[0]*4+[1]*4
    a,b = (dls.valid.one_batch()[0] for _ in range(2)); assert a.equal(b)                            # nothing random in validation
    assert get_dls(root, bs=4, num_workers=0, device=cpu).one_batch()[0].shape[-2:]==(224,224)
    assert get_dls(root, bs=4, num_workers=0, heldout=4, device=cpu).info.n_valid==4
    learn = Learner(get_dls(root, bs=4, size=64, num_workers=0, in_memory=False, device=cpu), net(2), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(): assert learn.predict(root/'train/ant/0.jpg')[0] in ('ant','bee')
    learn.dls.show_batch(max_n=2)

def test_a_folder_in_the_users_home(tmp_path, monkeypatch):
    folder(tmp_path/'bugs'); monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert get_dls('~/bugs', bs=4, size=32, device=cpu).info.n_train==12

def test_middle_crop_is_the_papers():
    from torchvision.transforms import v2
    im = PILImage.create(np.random.RandomState(0).randint(0, 256, (300,400,3), dtype=np.uint8))
    want = v2.CenterCrop(224)(v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC)(im))
    got = D.CropMiddle((224,224))(im, split_idx=1)
    assert got.size==(224,224) and np.abs(np.asarray(got).astype(int)-np.asarray(want)).mean()<1

# ---- photos of phones

def phone(root, orient, size=(90,60), suffix='png'):
    "A folder whose images a phone took, held as `orient` says; the same images whatever it is"
    turns = {1:None, 6:Image.Transpose.ROTATE_90, 3:Image.Transpose.ROTATE_180, 8:Image.Transpose.ROTATE_270, 7:Image.Transpose.TRANSVERSE}
    for f in sorted(folder(root, size=size, n=(2,2)).rglob('*.png')):
        im,exif = Image.open(f),Image.Exif()
        exif[0x112] = orient; f.unlink()
        (im.transpose(turns[orient]) if turns[orient] is not None else im).save(f.with_suffix('.'+suffix), exif=exif, **(dict(lossless=True) if suffix=='webp' else {}))
    return root

@pytest.mark.parametrize('orient,suffix', [(6,'png'), (3,'png'), (8,'webp'), (7,'tiff'), (6,'tiff')])
@pytest.mark.parametrize('in_memory', [True,False])
def test_photos_of_phones_are_trained_and_judged_upright(tmp_path, in_memory, orient, suffix):
    kw = dict(bs=4, size=48, in_memory=in_memory, num_workers=0, device=cpu)
    def made(name, *args, **kwargs): phone(tmp_path/name, *args, **kwargs); set_seed(0); o = get_dls(tmp_path/name, **kw); return o,o.train.one_batch()[0]
    (a,x),(b,y) = made('a', 1),made('b', orient, suffix=suffix)
    assert torch.equal(x, y) and torch.equal(*(o.valid.one_batch()[0] for o in (a,b)))
    f,g = tmp_path/'a/valid/ant/0.png',tmp_path/f'b/valid/ant/0.{suffix}'
    want = a.test_dl([f], num_workers=0).one_batch()[0]
    for one in (g, str(g), g.read_bytes(), Image.open(g)): assert torch.equal(b.test_dl([one], num_workers=0).one_batch()[0], want), type(one)

def test_what_a_photo_says_of_its_orientation_is_heard_once(tmp_path):
    from PIL import ImageOps
    want = np.asarray(D.load_rgb(phone(tmp_path/'a', 1)/'train/ant/0.png'))
    im = D.load_rgb(phone(tmp_path/'b', 6)/'train/ant/0.png')
    assert np.array_equal(np.asarray(im), want) and np.array_equal(np.asarray(ImageOps.exif_transpose(im)), want)
    opened = Image.open(tmp_path/'b/train/ant/0.png'); D._open_rgb(opened)
    assert opened.getexif()[0x112]==6                                                             # the caller's own image keeps its note

@pytest.mark.parametrize('exif', [b'Exif\0\0nonsense', b'', b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0'])
def test_a_damaged_or_unknown_orientation_says_nothing(tmp_path, exif):
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3,4,3)).save(tmp_path/'a.png', exif=exif)
    assert np.array_equal(np.asarray(D.load_rgb(tmp_path/'a.png')).ravel(), np.arange(36))

@pytest.mark.parametrize('mode', ['L','RGBA','P'])
@pytest.mark.parametrize('in_memory', [True,False])
def test_an_opened_image_of_any_mode(tmp_path, in_memory, mode):
    dls = get_dls(folder(tmp_path/'bugs', size=(90,60), n=(2,2)), bs=4, size=48, in_memory=in_memory, num_workers=0, device=cpu)
    assert dls.test_dl([Image.open(tmp_path/'bugs/valid/ant/0.png').convert(mode)], num_workers=0).one_batch()[0].shape==(1,3,48,48)

@pytest.mark.parametrize('in_memory', [True,False])
def test_an_image_of_16_bits_is_not_named(tmp_path, in_memory):
    "Cut to 8 bits it would be white; training refuses it, so does who asks a network for its class"
    dls = get_dls(folder(tmp_path/'bugs', size=(90,60), n=(2,2)), bs=4, size=48, in_memory=in_memory, num_workers=0, device=cpu)
    deep = Image.fromarray(np.full((60,90), 40_000, dtype=np.uint16))
    deep.save(tmp_path/'deep.png')
    for one in (tmp_path/'deep.png', Image.open(tmp_path/'deep.png')):
        with pytest.raises(Exception, match='more than 8 bits a pixel.*save it with 8 bits'): dls.test_dl([one], num_workers=0).one_batch()

def test_decoded_once(tmp_path, monkeypatch):
    root,calls,real = folder(tmp_path/'bugs'),[],D.load_rgb
    monkeypatch.setattr(D, 'load_rgb', lambda f: (calls.append(f),real(f))[1])
    kw = dict(bs=4, size=32, device=cpu)
    a = get_dls(root, **kw).train_ds.x; assert len(calls)==20
    b = get_dls(root, **kw).train_ds.x; assert len(calls)==20 and a.equal(b)
    image(root/'train'/'ant'/'0.png', (41,32), seed=7)
    c = get_dls(root, **kw).train_ds.x; assert len(calls)==32 and not a.equal(c)          # changed: decoded anew
    (root/'train'/'ant'/'5.png').rename(root/'train'/'bee'/'9.png')
    get_dls(root, **kw); assert len(calls)==44                                            # moved: too
    for f in root.glob('.vt_drloc_*'): f.write_bytes(f.read_bytes()[:100])
    d = get_dls(root, **kw).train_ds.x; assert len(calls)==64 and len(d)==12              # damaged: too
    get_dls(root, cache=False, **kw); assert len(calls)==84
    assert not list(root.glob('*.tmp'))

def test_cache_from_many_at_once(tmp_path):
    files = [str(image(tmp_path/f'{i}.png', (32,32), seed=i)) for i in range(6)]
    want,got = decode(files, (32,32)),[]
    ts = [threading.Thread(target=lambda: got.append(decode(files, (32,32), tmp_path/'c.safetensors'))) for _ in range(6)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert len(got)==6 and all(o.equal(want) for o in got) and [o.name for o in tmp_path.glob('c.*')]==['c.safetensors']

def test_cache_not_writable(tmp_path):
    files = [str(image(tmp_path/'0.png', (32,32)))]
    with pytest.warns(UserWarning, match='not kept'): assert len(decode(files, (32,32), tmp_path/'no'/'c.safetensors'))==1

def test_a_flipped_byte_is_found(tmp_path):
    files,cache = [str(image(tmp_path/f'{i}.png', (32,32), seed=i)) for i in range(6)],tmp_path/'c.safetensors'
    want = decode(files, (32,32), cache).clone(); good = cache.read_bytes()
    for at in (-1,-3000,-6*3*32*32):                                     # the last byte, one in the middle, the first pixel
        bad = bytearray(good); bad[at] ^= 1; cache.write_bytes(bad)
        with pytest.warns(UserWarning, match='c.safetensors is damaged'): assert decode(files, (32,32), cache).equal(want)
        assert cache.read_bytes()==good                                  # made anew

def test_cache_is_written_in_pieces_and_is_plain_safetensors(tmp_path, monkeypatch):
    from safetensors.torch import load_file
    files,pieces = [str(image(tmp_path/f'{i}.png', (32,32), seed=i)) for i in range(7)],D._pieces
    monkeypatch.setattr(D, '_pieces', lambda files, size: pieces(files, size, 3))
    x = decode(files, (32,32), tmp_path/'c.safetensors'); monkeypatch.undo()
    assert x.equal(decode(files, (32,32))) and load_file(tmp_path/'c.safetensors')['x'].equal(x)

def test_disk_full_while_the_cache_is_written(tmp_path, monkeypatch):
    files = [str(image(tmp_path/'0.png', (32,32)))]
    class Full:
        def __init__(self, *a): (tmp_path/'c.tmp').touch()
        def __enter__(self): return self
        def __exit__(self, *a): pass
        def write(self, b): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(D, 'open', Full, raising=False)
    with pytest.warns(UserWarning, match='No space left'): x = decode(files, (32,32), tmp_path/'c.safetensors')
    monkeypatch.undo()
    assert x.equal(decode(files, (32,32))) and not (tmp_path/'c.safetensors').exists()

# ---- where images are held

@pytest.mark.parametrize('gpu,host,want', [(100,100,'device'), (39,100,'host'), (39,19,'mapped'), (None,0,'device')])
def test_place_by_free_memory(monkeypatch, gpu, host, want):
    monkeypatch.setattr(D, 'free_memory', lambda device: host if str(device)=='cpu' else gpu)
    assert D.place(10, 'cuda')==want
    assert D.place(10, 'cpu')==('device' if host>=20 else 'mapped')

def test_free_memory():
    assert 10**6<D.free_memory('cpu')<10**14 and D.free_memory('meta') is None

@pytest.mark.parametrize('held', ['device','host','mapped'])
def test_held_wherever_the_batches_are_the_same(tmp_path, held):
    root = folder(tmp_path/'bugs'); kw = dict(bs=4, size=32, device=cpu)
    set_seed(0); a = [(x,y) for x,y in get_dls(root, **kw).train]
    set_seed(0); dls = get_dls(root, held=held, **kw); b = [(x,y) for x,y in dls.train]
    assert dls.info.held==held and dls.info.mbytes==round(20*3*32*32/2**20, 1) and all(x.equal(u) and y.equal(v) for (x,y),(u,v) in zip(a, b))
    cached = list(root.glob('.vt_drloc_*'))
    assert len(cached)==2
    maps = Path('/proc/self/maps')
    if maps.exists(): assert (str(cached[0]) in maps.read_text())==(held=='mapped')

def test_order_drawn_on_the_device(monkeypatch):
    set_seed(0); dl = get_dls('digits', bs=64, device=cpu).train; ds = dl.dataset
    dl.randomize(); a,b = dl.draw_order('cpu'),dl.draw_order('cpu')
    assert a.sort()[0].equal(torch.arange(1437)) and not a.equal(b)
    set_seed(0); other = get_dls('digits', bs=64, device=cpu).train; other.randomize()
    torch.manual_seed(1); assert other.draw_order('cpu').equal(a)        # by the loader's own generator alone
    monkeypatch.setattr(MemoryDL, 'get_idxs', lambda self: a)            # as on an accelerator
    it = iter(dl); ys = [next(it)[1]]                                    # PyTorch's loader reads a seed of the CPU's at the start
    with HostReads() as reads: ys += [y for _,y in it]
    ys = torch.cat(ys).as_subclass(torch.Tensor)
    assert reads.seen==[] and ys.equal(ds.y[a[:1437//64*64]])

def test_order_is_fastais_on_the_cpu_and_inside_other_loaders(monkeypatch):
    dl = get_dls('digits', bs=64, device=cpu).train
    assert isinstance(dl.get_idxs(), list)
    dl.device = torch.device('meta')                                    # stands for an accelerator
    assert isinstance(dl.get_idxs(), list)                               # asked by another loader
    monkeypatch.setattr(MemoryDL, 'draw_order', lambda self, device: ('drawn on',device.type))
    dl._alone = True; assert dl.get_idxs()==('drawn on','meta')
    dl.dataset.held = 'host'; assert isinstance(dl.get_idxs(), list)     # images that stay in this computer's memory
    valid = get_dls('digits', bs=64, device=cpu).valid
    valid.device,valid._alone = torch.device('meta'),True
    assert valid.get_idxs()==list(range(360))                           # test images keep their order

def test_enlarged_test_images_are_cut_from_the_middle():
    x = torch.rand(2,3,32,32); t = D.ResizeBatch((224,224), middle=True)
    want = F.interpolate(x, (256,256), mode='bicubic', antialias=True)[:,:,16:240,16:240].clamp(0, 1)
    assert torch.allclose(t(TensorImage(x)).as_subclass(torch.Tensor), want, atol=1e-6)
    fs = get_dls('digits', size=48, device=cpu).valid.after_batch.fs
    assert fs[1].middle and not get_dls('digits', size=48, device=cpu).train.after_batch.fs[1].middle
    assert not get_dls('digits', size=24, device=cpu).valid.after_batch.fs[1].middle     # made smaller: all of it

# ---- the published layouts, made small

@pytest.mark.parametrize('coarse', ['','insects/'])
def test_cifar_layouts(tmp_path, coarse):
    for split,k in (('train',3),('test',2)):
        for c in ('bee','ant'):
            for i in range(k): image(tmp_path/split/f'{coarse}{c}'/f'{i}.png', (32,32))
    for name in ('cifar10','cifar100'):
        dls = get_dls(name, bs=2, path=tmp_path, expect=(6,4), device=cpu)
        assert list(dls.vocab)==['ant','bee'] and dls.valid_ds.y.tolist()==[0,0,1,1]

def test_svhn_layout(tmp_path):
    dls = get_dls('svhn', bs=4, path=svhn(tmp_path), expect=(20,12), device=cpu)
    assert dls.c==10 and dls.valid_ds.y.tolist()==[1,2,3,4,5,6,7,8,9,0,1,2] and dls.one_batch()[0].shape==(4,3,32,32)
    from scipy.io import loadmat
    assert np.array_equal(dls.valid_ds.x[3].permute(1,2,0).numpy(), loadmat(tmp_path/'test_32x32.mat')['X'][...,3])

def test_flowers_layout(tmp_path):
    flowers(tmp_path)
    dls = get_dls('flowers102', bs=2, path=tmp_path, expect=(5,5), num_workers=0, device=cpu)
    assert dls.c==102 and torch.cat([y for _,y in dls.valid]).tolist()==[1,2,101,4,5] and not dls.info.in_memory
    dls = get_dls('flowers102', bs=2, size=32, path=tmp_path, expect=(5,5), device=cpu)
    assert dls.info.in_memory and dls.train_ds.y.tolist()==[0,1,2,101,0]

def test_domain_layout(tmp_path):
    dls = get_dls('sketch', bs=2, path=domain(tmp_path), expect=(8,4), num_workers=0, device=cpu)
    assert list(dls.vocab)==['aircraft_carrier','zigzag'] and torch.cat([y for _,y in dls.valid]).tolist()==[0,0,1,1]
    assert dls.one_batch()[0].shape==(2,3,224,224)

def test_imagenet100_layout(tmp_path):
    root = folder(tmp_path/'in100', valid='val', size=(260,240), n=(2,1))
    assert get_dls('imagenet100', bs=2, path=root, expect=(4,2), num_workers=0, device=cpu).one_batch()[0].shape==(2,3,224,224)

# ---- bad input, each with its own message

def err(match, *args, **kwargs):
    with pytest.raises(DataError, match=match): get_dls(*args, device=cpu, **{'bs':2, **kwargs})

def test_unknown_name():
    err(r"called 'cifar'.*Did you mean 'cifar1", 'cifar')
    err('Names: digits, photos', 'no/such/folder')

def test_wrong_count(tmp_path):
    root = folder(tmp_path/'cifar10', valid='test', size=(32,32))
    err(r'cifar10: found 12 training images, expected 50,000.*cifar10', 'cifar10', path=root)
    err(r'found 8 test images, expected 9', 'cifar10', path=root, expect=(12,9))
    err(r'found 12 training images, expected 13', root, expect=(13,8))

def test_a_folder_takes_its_readers_arguments(tmp_path):
    root = folder(tmp_path/'zoo', classes=('insects/ant','insects/bee'))
    kw = dict(bs=4, size=32, device=cpu)
    assert list(get_dls(root, **kw).vocab)==['insects'] and list(get_dls(root, leaf=True, **kw).vocab)==['ant','bee']
    with pytest.raises(TypeError, match='batchsize'): get_dls(root, batchsize=3, **kw)

def test_a_folder_lies_where_it_lies(tmp_path):
    err("path='/nowhere'.*bugs is a folder.*leave `path` out", folder(tmp_path/'bugs'), path='/nowhere')
    err("Did you mean 'cifar10'", 'cifar1', path='/nowhere')

def test_a_folder_called_photos_may_hold_out(tmp_path, monkeypatch):
    root,kw = folder(tmp_path/'photos'),dict(bs=4, size=32, heldout=4, device=cpu)
    assert get_dls(root, **kw).info.n_valid==4
    monkeypatch.chdir(tmp_path)
    assert get_dls('./photos', **kw).info.n_valid==4 and get_dls(Path('photos'), **kw).info.n_valid==4
    err('share pixels', 'photos', expect=(200,100), heldout=50)

def test_folder_without_classes(tmp_path):
    image(tmp_path/'a/train/0.png'); image(tmp_path/'a/valid/0.png')
    err('has no class folders.*0.png', tmp_path/'a', size=32)
    (tmp_path/'b/train').mkdir(parents=True); (tmp_path/'b/valid').mkdir()
    err('has no class folders', tmp_path/'b')
    (tmp_path/'c').mkdir()
    err('needs a folder `train`', tmp_path/'c')

def test_validation_class_not_in_training(tmp_path):
    root = folder(tmp_path/'bugs'); image(root/'valid/wasp/0.png')
    err("'wasp'.*outside the 2 training classes", root)

@pytest.mark.parametrize('size', [32,96])
def test_unreadable_image_is_named(tmp_path, size):
    root = folder(tmp_path/'bugs')
    for f in (root/'valid').glob('ant/*.png'): f.write_bytes(f.read_bytes()[:300])
    with pytest.raises(DataError, match=r'cannot read image .*valid/ant/\d.png'):
        for _ in get_dls(root, bs=2, size=size, num_workers=0, device=cpu).valid: pass

def test_unreadable_image_in_a_worker(tmp_path):
    root = folder(tmp_path/'bugs')
    for f in (root/'train').glob('ant/*.png'): f.write_bytes(b'no image')
    with pytest.raises(DataError, match=r'cannot read image .*train/ant/\d.png'):
        for _ in get_dls(root, bs=2, size=96, num_workers=1, device=cpu).train: pass

def test_missing_image(tmp_path):
    root = domain(tmp_path); (root/'sketch/zigzag/test1.jpg').unlink()
    err('zigzag/test1.jpg is missing', 'sketch', path=root, expect=(8,4), size=32)

def test_batch_larger_than_the_set(): err('1437 training images, fewer than one batch of 2000', 'digits', bs=2000)

@pytest.mark.parametrize('kw,words', [
    (dict(held='gpu'), "held='gpu': choose 'device', 'host' or 'mapped'"), (dict(held=''), "held=''"),
    (dict(size=(32,)), r'size=\(32,\): give the side'), (dict(size=0), 'size=0'), (dict(size=(64,-1)), r'size=\(64, -1\)'), (dict(size=32.5), r'size=32\.5'), (dict(size='32'), "size='32'"),
    (dict(bs=0), 'bs=0: give a whole number >= 1'), (dict(bs=None), 'bs=None'), (dict(bs=16.), r'bs=16\.0'),
    (dict(heldout=0.1), r'heldout=0\.1: .*not a share'), (dict(heldout=-5), 'heldout=-5'),
    (dict(batch_tfms='light'), r"'light' is no transform.*batch_tfms=get_tfms\('light'\)"), (dict(batch_tfms=[IntToFloatTensor(),3]), '3 is no transform')])
def test_arguments_are_checked_before_the_data_are_opened(kw, words, monkeypatch):
    monkeypatch.setattr(D, 'open_data', lambda *a,**k: pytest.fail('looked for the data first'))
    with pytest.raises(DataError, match=words): get_dls('digits', **{'device':cpu, **kw})

def test_arrays_have_no_files():
    err('in_memory=False: digits comes as one array', 'digits', in_memory=False)

def test_sizes_and_batches_of_numpy():
    dls = get_dls('digits', bs=np.int64(8), size=np.array([16,24]).tolist(), heldout=np.int64(100), device=cpu)
    assert dls.one_batch()[0].shape==(8,3,16,24) and len(dls.valid_ds)==100

@pytest.mark.parametrize('kw,words', [
    (dict(part='test'), "part='test': choose one of train, valid, all"), (dict(lo=500), r"lo=500, hi=160: .* part 'train' of a 640 x 427 photo go from 1 to 384 pixels"),
    (dict(lo=0), 'lo=0'), (dict(lo=200, hi=300, part='valid'), 'from 1 to 256 pixels'), (dict(hi=428, part='all'), 'from 1 to 427 pixels')])
def test_impossible_crops(kw, words):
    for f in (crop_boxes,photo_crops):
        with pytest.raises(DataError, match=words): f(1, **kw)

def test_largest_crops_that_fit():
    for part,side in (('train',384),('valid',256),('all',427)): assert {r-l for _,(l,t,r,b) in crop_boxes(20, part=part, lo=side, hi=side)}=={side}

def test_truncated_mat(tmp_path):
    f = svhn(tmp_path)/'test_32x32.mat'; f.write_bytes(f.read_bytes()[:500]); before = f.read_bytes()
    err(r'test_32x32.mat \(500 bytes\) is cut short.*delete it and fetch it again', 'svhn', path=tmp_path, expect=(20,12))
    err(r'train_32x32.mat .*is cut short', 'svhn', path=tmp_path)      # the published set: by its checksum
    assert f.read_bytes()==before                                      # nothing of the user's is touched
    err(r'imagelabels.mat .*is cut short', 'flowers102', path=flowers(tmp_path/'f'))

def test_labels_outside(tmp_path):
    err("label 11, outside SVHN's 1..10", 'svhn', path=svhn(tmp_path/'s', labels=11), expect=(20,12))
    err(r'labels 0\.\.3, outside 1\.\.102', 'flowers102', path=flowers(tmp_path/'f', labels=(0,1,2,3)*2+(1,1)), expect=(5,5))
    err(r'labels 1\.\.103, outside 1\.\.102', 'flowers102', path=flowers(tmp_path/'g', labels=(1,103)*5), expect=(5,5))
    err('label 345, outside 0..344', 'sketch', path=domain(tmp_path/'d', line='{name}/{c}/{i}.jpg 345'), expect=(8,4))
    err('not a list of `path label` lines', 'sketch', path=domain(tmp_path/'e', line='{name}/{c}/{i}.jpg'), expect=(8,4))

def test_no_network(tmp_path, fastai_home, monkeypatch):
    def _offline(*args, **kwargs): raise URLError('Name or service not known')
    for o in ('fastdownload.core.urlsave','torchvision.datasets.utils._urlretrieve','vt_drloc.data.urlsave'): monkeypatch.setattr(o, _offline)
    err(r'cifar10 could not be fetched from https://.*Without network.*cifar10.tgz.*data/cifar10/train', 'cifar10')
    err(r'svhn could not be fetched.*train_32x32.mat', 'svhn')
    err(r'flowers102 could not be fetched.*setid.mat into .*flowers-102', 'flowers102')
    err(r'sketch could not be fetched.*sketch.zip.*sketch_test.txt into .*domainnet', 'sketch')
    err(r'imagenet100 cannot be downloaded.*imagenet100/train/<class>/', 'imagenet100')

def test_truncated_archive(tmp_path, fastai_home, monkeypatch):
    arch = fastai_home.parent/'archive'/'cifar10.tgz'; arch.parent.mkdir(parents=True, exist_ok=True); arch.write_bytes(b'x'*1000)
    err(r'cifar10.tgz \(1,000 bytes\) is cut short.*delete it', 'cifar10')
    assert arch.read_bytes()==b'x'*1000
    root = domain(fastai_home/'domainnet'); shutil.rmtree(root/'sketch'); (root/'sketch.zip').write_bytes(b'PK'+b'x'*98)
    err(r'sketch.zip \(100 bytes\) is cut short', 'sketch', expect=(8,4))
    assert (root/'sketch.zip').exists() and not [o for o in root.iterdir() if o.name.startswith('.')]

def test_domain_is_unpacked(tmp_path):
    root = domain(tmp_path); shutil.make_archive(str(root/'sketch'), 'zip', root, 'sketch'); shutil.rmtree(root/'sketch')
    assert get_dls('sketch', bs=2, path=root, expect=(8,4), num_workers=0, device=cpu).info.n_train==8
    assert (root/'sketch.zip').exists()

# ---- the real sets, where they lie

def need(name):
    if not (data_home()/name).is_dir(): pytest.skip(f'no ~/.fastai/data/{name}')

@pytest.mark.parametrize('name,c', [('cifar10',10),('cifar100',100)])
def test_cifar(name, c):
    need(name)
    dls = get_dls(name, bs=512, batch_tfms=get_tfms(), device=cpu)
    assert (len(dls.train_ds),len(dls.valid_ds),dls.c)==(50000,10000,c) and list(dls.vocab)==sorted(dls.vocab)
    assert (dls.train_ds.y.bincount()==50000//c).all() and (dls.valid_ds.y.bincount()==10000//c).all()
    x,y = dls.one_batch(); assert x.shape==(512,3,32,32) and x.isfinite().all()
    held = get_dls(name, bs=512, heldout=5000, device=cpu)
    assert (held.info.n_train,held.info.n_valid)==(45000,5000) and (held.valid_ds.y.bincount()==5000//c).all()

# ---- augmentation

def batch(n=64, side=32): return TensorImage(torch.rand(n,3,side,side))

def test_every_transform_is_for_training_only():
    x = batch()
    for t in get_tfms(): assert t(x, split_idx=1) is x and not t(x, split_idx=0).equal(x)
    dls = get_dls('digits', batch_tfms=get_tfms(), device=cpu)
    assert [type(o).__name__ for o in dls.train.after_batch.fs]==['IntToFloatTensor','AffineEach','LightEach','Normalize','EraseEach']
    assert [type(o).__name__ for o in dls.valid.after_batch.fs]==['IntToFloatTensor','Normalize']

@pytest.mark.parametrize('t', [AffineEach(), LightEach(), EraseEach()])
def test_transform_basics(t):
    x = batch(); before = x.clone()
    set_seed(5); a = t(x, split_idx=0)
    set_seed(5); b = t(x, split_idx=0)
    assert a.equal(b) and x.equal(before) and type(a) is TensorImage and a.shape==x.shape
    same = TensorImage(x[:1].expand(64,-1,-1,-1).clone())
    assert len(t(same, split_idx=0).as_subclass(torch.Tensor).flatten(1).unique(dim=0))>8               # one draw an image
    if not isinstance(t, EraseEach): assert 0<=a.min() and a.max()<=1

@pytest.mark.parametrize('make,kw,words', [
    (AffineEach, dict(flip=1.5), 'flip=1.5: give a number from 0 to 1'), (AffineEach, dict(p=-1), 'p=-1'), (AffineEach, dict(max_zoom=0), 'max_zoom=0: give a number >= 1'),
    (AffineEach, dict(max_deg=-10), 'max_deg=-10'), (AffineEach, dict(shift=-1), 'shift=-1'), (AffineEach, dict(shift=1.5), 'shift=1.5: give a whole number'),
    (AffineEach, dict(pad='mirror'), "pad='mirror': choose 'reflection', 'zeros' or 'border'"),
    (LightEach, dict(max_lighting=-0.2), 'max_lighting=-0.2'), (LightEach, dict(p=float('nan')), 'p=nan'),
    (EraseEach, dict(p=2), 'p=2'), (EraseEach, dict(lo=0.5), 'hi=0.33.*from 0.5 to 1'), (EraseEach, dict(hi=1.5), 'hi=1.5'), (EraseEach, dict(min_aspect=0), 'min_aspect=0'),
    (MixupCutmix, dict(smooth=2), 'smooth=2: give a number from 0 to 1'), (MixupCutmix, dict(mixup=-1), 'mixup=-1: give a number >= 0'), (MixupCutmix, dict(cutmix=float('inf')), 'cutmix=inf'),
    (MixupCutmix, dict(prob=-3), 'prob=-3'), (MixupCutmix, dict(switch='half'), "switch='half'")])
def test_numbers_out_of_range(make, kw, words):
    with pytest.raises(ValueError, match=words): make(**kw)

def test_numbers_at_the_ends_of_their_range():
    AffineEach(0, 0, 0, 1, 0, 'border'); AffineEach(1., np.int64(4), 180., 2., 1.); LightEach(1., 0.); EraseEach(0., 0., 0., 1.); EraseEach(1., 0.5, 1.)
    MixupCutmix(0, 0, 0, 0, 0); MixupCutmix(2., 2., 1., 1., 1.)

def test_shift_and_flip_are_exact():
    x = batch(200, 16); t = AffineEach(flip=0.5, shift=3, p=0., pad='zeros')
    out = t(x, split_idx=0).as_subclass(torch.Tensor); x = x.as_subclass(torch.Tensor)
    P = F.pad(x, (3,3,3,3))
    every = torch.stack([(P.flip(3) if fl else P)[:,:,dy:dy+16,dx:dx+16] for fl in (0,1) for dy in range(7) for dx in range(7)], 1)
    hits = (every-out[:,None]).abs().amax((2,3,4))<1e-4                # (200, 98)
    assert (hits.sum(1)==1).all()
    seen = [(i%49//7,i%7,i//49) for i in hits.int().argmax(1).tolist()]
    assert {o[0] for o in seen}=={o[1] for o in seen}==set(range(7)) and {o[2] for o in seen}=={0,1}

def test_rotation_keeps_shape_on_oblong_images():
    t,x = AffineEach(flip=0., shift=0, max_deg=30, max_zoom=1., p=1.),TensorImage(torch.rand(8,3,20,40))
    m = t.theta(x); px = m[:,:,:2]*torch.tensor([[1,40/20],[20/40,1]])
    assert torch.allclose(px@px.transpose(1,2), torch.eye(2).expand(8,-1,-1), atol=1e-5)

def test_erasing():
    x = TensorImage(torch.full((4000,3,32,32), 9.)); m = EraseEach(p=0.25).boxes(x)
    share = m.float().mean((1,2,3)); some = share>0
    assert abs(some.float().mean()-0.25)<0.03 and share.max()<0.36 and 0.12<share[some].mean()<0.22
    for o in m[some][:50,0]:
        r,c = o.any(1),o.any(0)
        assert o.sum()==r.sum()*c.sum()                                # one whole box
    y = EraseEach(p=1.)(x, split_idx=0); hit = y!=9
    assert abs(y[hit].mean())<0.02 and abs(y[hit].std()-1)<0.02

def test_get_tfms():
    assert get_tfms('none')==[] and get_tfms(flip=False)[0].flip==0 and get_tfms()[0].flip==.5 and [get_tfms(size=s)[0].shift for s in (64,(32,96))]==[8,12]
    with pytest.raises(ValueError, match="'hevy': choose from none, light"): get_tfms('hevy')

def mixed(cb, n=64, c=10, seed=0):
    set_seed(seed)
    dls = get_dls('digits', bs=n, device=cpu); b = dls.one_batch()
    cb.learn = learn = Learner(dls, net(c), loss_func=F.cross_entropy)
    learn.xb,learn.yb = b[:1],b[1:]; keep = b[0].clone()
    cb.before_fit(); cb.before_batch()
    assert b[0].equal(keep)                                            # the batch that came in is not overwritten
    return keep,b[1],learn.xb[0],learn.yb[0]

@pytest.mark.parametrize('n', [64,33])
@pytest.mark.parametrize('kw', [dict(cutmix=0.), dict(mixup=0.), {}])
def test_mixing(n, kw):
    x,y,xm,ym = mixed(MixupCutmix(**kw), n)
    assert xm.shape==x.shape and not xm.equal(x) and ym.shape==(n,10) and torch.allclose(ym.sum(1), torch.ones(n), atol=1e-5)
    again = mixed(MixupCutmix(**kw), n)
    assert again[2].equal(xm) and again[3].equal(ym)
    off = 0.1/10; lam = (ym.gather(1, y.as_subclass(torch.Tensor)[:,None])[:,0]-off)/0.9
    other = y.flip(0)!=y
    lam = lam[other]; assert (lam-lam[0]).abs().max()<1e-5             # one draw a batch
    if kw==dict(cutmix=0.): assert torch.allclose(xm.as_subclass(torch.Tensor), x*lam[0].item()+x.flip(0)*(1-lam[0].item()), atol=1e-4)

def test_mixing_off_is_label_smoothing():
    x,y,xm,ym = mixed(MixupCutmix(mixup=0., cutmix=0.))
    logits = torch.randn(64, 10)
    assert xm.equal(x) and torch.allclose(F.cross_entropy(logits, ym), F.cross_entropy(logits, y.as_subclass(torch.Tensor), label_smoothing=0.1))

def test_mixing_in_a_run():
    dls = get_dls('digits', bs=64, device=cpu); seen = []
    def loss(p, t): seen.append((torch.is_grad_enabled(),t.ndim)); return F.cross_entropy(p, t)
    learn = Learner(dls, net(), loss_func=loss, metrics=accuracy, opt_func=SGD, cbs=MixupCutmix())
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.1)
    assert set(seen)=={(True,2),(False,1)}                             # soft in training, hard in validation
    with pytest.raises(ValueError, match='loss_func=F.cross_entropy'):
        learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), cbs=MixupCutmix())
        with learn.no_bar(): learn.fit(1)

def test_mixing_one_class():
    dls = get_dls('photos', bs=32, expect=(64,32), device=cpu)
    cb = MixupCutmix(); cb.learn = learn = Learner(dls, net(1), loss_func=F.cross_entropy)
    learn.xb,learn.yb = (lambda b: (b[:1],b[1:]))(dls.one_batch()); cb.before_fit(); cb.before_batch()
    assert F.cross_entropy(torch.randn(32, 1), learn.yb[0]).item()==0

# ---- what would be lost, or fail elsewhere

@pytest.mark.parametrize('data,kw,said', [(5, {}, 'data=5: give the name of a set'), (None, {}, 'data=None'), ('', {}, "data=''"), ('digits', dict(expect=5), 'expect=5: give two numbers'), ('digits', dict(expect=(1,2,3)), 'expect='),
                                          ('digits', dict(seed=-1), 'seed=-1: give a whole number'),
                                          ('digits', dict(seed=1.5, heldout=9), 'seed=1.5'), ('bugs', dict(num_workers=-1), 'num_workers=-1: give a whole number'), ('bugs', dict(num_workers='a'), "num_workers='a'"), ('digits', dict(in_memory='no'), "in_memory='no': give True or False")])
def test_arguments_that_cannot_be_meant(tmp_path, data, kw, said):
    if data=='bugs': data = folder(tmp_path/'bugs')
    with pytest.raises(DataError, match=said): get_dls(data, **{**dict(bs=4, size=32, device=cpu), **kw})

def test_a_folder_has_a_name_from_inside_too(tmp_path, monkeypatch):
    root = folder(tmp_path/'bugs'); monkeypatch.chdir(root)
    assert get_dls('.', bs=4, size=32, device=cpu).info.name=='bugs' and get_dls('train/..', bs=4, size=32, device=cpu).info.name=='bugs'

def test_a_folder_called_as_a_named_set(tmp_path, monkeypatch):
    folder(tmp_path/'digits'); monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="'digits' is the named set; the folder here is ./digits"): assert get_dls('digits', bs=4, device=cpu).info.n_train==1437
    assert get_dls('./digits', bs=4, size=32, device=cpu).info.n_train==12

def test_images_of_another_kind_are_missed_aloud(tmp_path):
    root = folder(tmp_path/'bugs')
    for f in ('ant/a.HEIC','ant/b.jfif','notes.txt'): (root/'train'/f).write_text('x')
    (root/'train'/'cicada').mkdir(); (root/'train'/'.hidden').mkdir()
    with pytest.warns(UserWarning) as said: assert get_dls(root, bs=4, size=32, device=cpu).info.n_train==12
    said = [str(o.message) for o in said]
    assert any('2 images under' in o and 'a.HEIC' in o and '.jpg' in o for o in said) and any("without images, such as 'cicada'" in o for o in said)

@pytest.mark.parametrize('a', [np.arange(12, dtype=np.uint16).reshape(3,4)*5000, np.arange(12, dtype=np.float32).reshape(3,4)/12], ids=['16 bits','floats'])
def test_more_bits_than_eight_are_not_cut(tmp_path, a):
    "PIL would make them white, or black"
    Image.fromarray(a).save(tmp_path/'a.tiff')
    with pytest.raises(DataError, match='a.tiff .*more than 8 bits a pixel.*save it with 8 bits'): D.load_rgb(tmp_path/'a.tiff')

@pytest.mark.parametrize('x,n', [(torch.zeros(3,3,8,8, dtype=torch.uint8), 2), (torch.zeros(2,3,8,8), 2)])
def test_images_and_labels_belong_together(x, n):
    with pytest.raises(DataError, match=f'{len(x)} images of .* with {n} labels.*uint8'): MemoryImages(x, torch.zeros(n).long(), ['a'])
