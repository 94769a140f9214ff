"A checkpoint scored again: against the right classes, the right epoch, and photos the right way up"
import json
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from vt_drloc.data import DataError, get_dls
from vt_drloc.evaluate import *
from vt_drloc.models import create_model, read_header, save_model
from vt_drloc.train import Recipe, build

def folder(root, names, levels):
    "A data set whose images are of one grey, a level for each class"
    for part in ('train','valid'):
        for name,level in zip(names, levels):
            (root/part/name).mkdir(parents=True)
            for i in range(4): Image.fromarray(np.full((16,16,3), level, np.uint8)).save(root/part/name/f'{i}.png')
    return root

@pytest.fixture
def grey(tmp_path): return folder(tmp_path/'grey', ('bright','dark'), (220,30))

def checkpoint(path, data, n=2, **head):
    "An untrained network with a header; what it scores does not matter"
    torch.manual_seed(0)
    save_model(create_model('demo_cvt', n, img_size=16), path, **{**dict(recipe=dict(data=str(data), size=16), size=[16,16]), **head})
    return path

def record(path, accs, n=8, **kw):
    "A run record as training writes it, with an accuracy for each epoch"
    rec = dict(data=dict(n_valid=n), epochs=[dict(epoch=i, accuracy=a) for i,a in enumerate(accs)], **kw)
    if accs: rec['final'] = dict(accuracy=accs[-1], epoch=len(accs)-1)
    path.with_suffix('.json').write_text(json.dumps(rec))

def said(capsys, *args, **kw):
    capsys.readouterr()
    eval_main(*map(str, args), device='cpu', **kw)
    return capsys.readouterr().out

# --- classes

def test_other_classes_of_the_same_number_are_refused(grey, tmp_path):
    "The same two classes in German sort the other way round: a perfect network would be right nowhere"
    f = checkpoint(tmp_path/'w.safetensors', grey, vocab=['bright','dark'])
    german = folder(tmp_path/'grau', ('dunkel','hell'), (30,220))
    assert check_record(f, device='cpu')['n']==8
    with pytest.raises(DataError, match="output 0 of .*w.safetensors is 'bright', class 0 of grau is 'dunkel': name the data set"): check_record(f, data=german, device='cpu')
    with pytest.raises(SystemExit, match='^vt_drloc_eval: output 0'): eval_main(str(f), data=str(german), device='cpu')

def test_the_first_class_that_differs_is_named(grey, tmp_path):
    f = checkpoint(tmp_path/'w.safetensors', grey, vocab=['bright','night'])
    with pytest.raises(DataError, match="output 1 of .* is 'night', class 1 of grey is 'dark'"): check_record(f, device='cpu')

@pytest.mark.parametrize('vocab', [None, [], ['bright','dark']])
def test_a_header_without_names_is_scored(grey, tmp_path, vocab):
    f = checkpoint(tmp_path/'w.safetensors', grey, **({} if vocab is None else dict(vocab=vocab)))
    assert check_record(f, device='cpu')['n']==8

@pytest.mark.parametrize('names', [list('0123456789'), list(range(10))])
def test_names_are_compared_as_text(tmp_path, names):
    f = checkpoint(tmp_path/'w.safetensors', 'digits', 10, vocab=names)
    assert check_record(f, device='cpu')['n']==360

def test_data_without_names_is_scored(grey, tmp_path, monkeypatch):
    import vt_drloc.evaluate as E
    f = checkpoint(tmp_path/'w.safetensors', grey, vocab=['clear','murky'])
    def nameless(*args, **kw):
        dls = get_dls(grey, bs=8, size=16, device='cpu')
        dls.train.dataset.vocab = dls.vocab = None
        return dls
    monkeypatch.setattr(E, 'images_for', nameless)
    assert check_record(f)['n']==8

# --- epochs and records

def test_the_accuracy_of_the_weights_own_epoch(grey, tmp_path, capsys):
    "Weights of epoch 1 beside a record that has gone on to epoch 3"
    f = checkpoint(tmp_path/'w.safetensors', grey, epoch=1)
    record(f, [.2,.5,.7,.9])
    assert check_record(f, device='cpu')['record']==.5 and 'its record says 50.00 %' in said(capsys, f)
    f = checkpoint(tmp_path/'w.safetensors', grey, epoch=0)
    assert check_record(f, device='cpu')['record']==.2

def test_a_record_belongs_to_the_images_of_the_training(grey, tmp_path):
    "Also if these are named; others have no record, as many as they are, and are judged on all that they have"
    f,other = checkpoint(tmp_path/'w.safetensors', grey, recipe=dict(data=str(grey), size=16, heldout=2)),folder(tmp_path/'other', ('bright','dark'), (200,50))
    record(f, [.2,.5], n=2)
    assert check_record(f, data=str(grey), device='cpu')['record']==check_record(f, device='cpu')['record']==.5
    assert check_record(f, data=str(other), device='cpu')['n']==8
    assert check_record(f, data=str(other), heldout=2, device='cpu')['record'] is None

@pytest.mark.parametrize('head,side', [(dict(size=[20,24], recipe=dict(size=28), args=dict(img_size=48)), (20,24)), (dict(recipe=dict(size=28), args=dict(img_size=48)), (28,28)), (dict(args=dict(img_size=48)), (48,48)), (dict(args={}), (32,32))])
def test_images_have_the_size_that_the_header_says(grey, head, side):
    "Its own, else the recipe's, else the network's, else what the network was designed for"
    assert images_for(dict(model='demo_cvt')|head, data=str(grey), device='cpu').info.size==side

def test_an_older_header_is_held_against_the_final_accuracy(grey, tmp_path):
    f = checkpoint(tmp_path/'w.safetensors', grey)
    record(f, [.2,.5])
    assert check_record(f, device='cpu')['record']==.5

@pytest.mark.parametrize('head,accs', [({},[]), (dict(epoch=4),[]), (dict(epoch=4),[.2,.5]), ({},[None])], ids=['no final','started again','no such epoch','no accuracy'])
def test_nothing_to_compare_with(grey, tmp_path, capsys, head, accs):
    f = checkpoint(tmp_path/'w.safetensors', grey, **head)
    record(f, accs, status='cut short')
    assert check_record(f, device='cpu')['record'] is None
    assert 'nothing to compare with' in said(capsys, f)

def test_a_record_of_other_images(grey, tmp_path):
    f = checkpoint(tmp_path/'w.safetensors', grey)
    record(f, [.5], n=9)
    assert check_record(f, device='cpu')['record'] is None
    f.with_suffix('.json').write_text('{}')
    assert check_record(f, device='cpu')['record'] is None

@pytest.mark.parametrize('text', ['{"data": ', '', '[1, 2]', b'\xff\xfe\x00'])
def test_a_damaged_record_is_named(grey, tmp_path, text):
    f = checkpoint(tmp_path/'w.safetensors', grey)
    (tmp_path/'w.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match='w.json is .*move it away'): find_record(f)
    with pytest.raises(SystemExit, match='^vt_drloc_eval: .*w.json'): eval_main(str(f), device='cpu')

def test_a_run_that_was_killed_between_two_writes(tmp_path):
    "End to end: weights of the epoch that their header names score as the record says"
    from fastai.callback.core import Callback
    class Kill(Callback):
        order = 200
        def after_epoch(self):
            if self.epoch==6: raise KeyboardInterrupt
    learn = build(Recipe(name='cut', data='digits', model='demo_cvt', size=16, share=.3, epochs=9, bs=64, lr=3.2e-2, warmup=1, mix=False, tfms='none'), out=tmp_path, bar=False, device='cpu')
    with pytest.raises(KeyboardInterrupt), learn.no_logging(): learn.fit(9, 3.2e-2, cbs=Kill())
    rec,head = json.loads((tmp_path/'cut.json').read_text()),read_header(tmp_path/'cut.safetensors')
    assert len(rec['epochs'])==7
    assert head['epoch']==4
    res = check_record(tmp_path/'cut.safetensors', device='cpu')
    assert res['record']==rec['epochs'][4]['accuracy']==pytest.approx(res['accuracy'], abs=1e-6)

# --- modes

@pytest.mark.parametrize('look', [lambda m: score(m, [(torch.randn(2, 3, 32, 32), torch.tensor([0,1]))]), lambda m: name_photo(m, Image.new('RGB', (40,40)), list('0123456789'))], ids=['score','name_photo'])
def test_each_module_keeps_its_own_mode(look):
    "Frozen BatchNorms stay frozen, and a network in training goes on training"
    net = create_model('cvt_mini', 10).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    modes = [m.training for m in net.modules()]
    look(net)
    assert [m.training for m in net.modules()]==modes and {*modes}=={True,False}

# --- photos

@pytest.fixture
def photo():
    "Four quarters of different colours, wider than high"
    x = np.zeros((80,120,3), np.uint8)
    x[:40,:60],x[:40,60:],x[40:,:60] = (250,20,20),(20,250,20),(20,20,250)
    return Image.fromarray(x)

@pytest.mark.parametrize('size', [(32,32), (96,96)])
@pytest.mark.parametrize('kind', ['png','tiff','jpg'])
@pytest.mark.parametrize('orient,stored', [(1,None), (3,Image.Transpose.ROTATE_180), (6,Image.Transpose.ROTATE_90), (8,Image.Transpose.ROTATE_270), (2,Image.Transpose.FLIP_LEFT_RIGHT)])
def test_photos_are_turned_upright(photo, tmp_path, size, kind, orient, stored):
    "However the phone was held, the network sees the same, from a file and from an opened image"
    f,held = tmp_path/f'p.{kind}',photo if stored is None else photo.transpose(stored)
    exif = held.getexif()
    exif[0x112] = orient
    held.save(f, exif=exif, **(dict(quality=100, subsampling=0) if kind=='jpg' else {}))
    want = prepare(photo, size)
    for got in (prepare(f, size), prepare(str(f), size), prepare(Image.open(f), size)):
        assert got.shape==(1,3,*size) and (got-want).abs().mean() < (.02 if kind=='jpg' else 1e-6)

def test_a_side_is_enough(photo):
    net = create_model('demo_cvt', 2)
    for s in (32,96): assert torch.equal(prepare(photo, s), prepare(photo, (s,s)))
    assert name_photo(net, photo, ['a','b'], 32)==name_photo(net, photo, ['a','b'], (32,32))==name_photo(net, photo, ['a','b'], [32,32])

@pytest.mark.parametrize('size,in_memory', [(16,True), (64,True), (72,False), ((48,72),False)])
def test_a_photo_is_prepared_as_the_test_images_are(photo, tmp_path, size, in_memory):
    for f in ('train/a/0.png','train/b/1.png','valid/a/2.png','valid/b/3.png'):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        photo.rotate(40*int(f[-5])).save(tmp_path/f)
    dls = get_dls(str(tmp_path), bs=2, size=size, in_memory=in_memory, num_workers=0, device='cpu')
    [(x,_)] = [*dls.valid]
    assert torch.allclose(torch.cat([prepare(tmp_path/f'valid/{c}.png', size) for c in ('a/2','b/3')]), torch.Tensor(x), atol=1e-5)

def test_names_come_with_their_probabilities(photo):
    "Those of evaluation, best first, whatever mode the network is in"
    torch.manual_seed(0)
    net = create_model('demo_cvt', 4).train()
    got = name_photo(net, photo, list('abcd'), 32, 3)
    with torch.no_grad(): p = net.eval()(prepare(photo, 32)).softmax(-1)[0]
    assert [n for n,_ in got]==['abcd'[i] for i in p.argsort(descending=True)[:3]]
    assert [q for _,q in got]==pytest.approx(sorted(p.tolist())[:0:-1]) and len(name_photo(net, photo, list('abcd'), top=9))==4
    with pytest.raises(ValueError, match='3 class names for 4 outputs: pass the vocabulary'): name_photo(net, photo, list('abc'))

def test_names_of_the_data_set_where_the_header_has_none(grey, photo, tmp_path, capsys):
    f,p = checkpoint(tmp_path/'w.safetensors', grey),tmp_path/'p.png'
    photo.save(p)
    for kw in ({}, dict(data=str(grey))): assert all(n in said(capsys, f, p, **kw) for n in ('bright','dark'))
    torch.manual_seed(0)
    save_model(create_model('demo_cvt', 2, img_size=16), tmp_path/'bare.safetensors')
    with pytest.raises(SystemExit, match='holds no class names: name the data set'): eval_main(str(tmp_path/'bare.safetensors'), str(p), device='cpu')
    with pytest.raises(SystemExit, match='does not say what it was trained on'): eval_main(str(tmp_path/'bare.safetensors'), device='cpu')

# --- scores

def test_a_score_by_hand():
    "Over batches of unlike size, in evaluation, exact where bfloat16 would be off"
    torch.manual_seed(0)
    net,x,y = nn.Sequential(nn.Dropout(.5), nn.Flatten(), nn.Linear(12, 3)).train(),torch.randn(7, 3, 2, 2),torch.tensor([0,1,2,0,1,2,0])
    got = score(net, [*zip(x.split(3), y.split(3))])
    with torch.no_grad(): p = net.eval()(x).double().log_softmax(-1)
    assert got==dict(n=7, accuracy=(p.argmax(-1)==y).sum().item()/7, loss=pytest.approx(-p[range(7),y].mean().item(), rel=1e-6))

def test_fewer_images_to_score(tmp_path):
    "Images that were held out in training are those that are scored"
    f = checkpoint(tmp_path/'w.safetensors', 'digits', 10)
    assert check_record(f, heldout=50, device='cpu')['n']==50
    assert check_record(f, device='cpu')['n']!=50
