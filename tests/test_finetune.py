"Fine-tuning through the console programs: from a checkpoint on a folder, from public weights, and the score of the result"
import json, re
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vt_drloc import models
from vt_drloc.data import open_data
from vt_drloc.evaluate import check_record, eval_main, find_record
from vt_drloc.models import create_model, list_models, load_model, load_weights, read_header, save_model, weights_help, PUBLIC
from vt_drloc.train import Recipe, build, main, run_name

common = dict(device='cpu', warmup=0., tfms='none', no_mix=True, no_bar=True)

def folder(root, classes, per=(12,10)):
    "A data set of class folders, from the digits"
    for part,split,n in zip(('train','valid'), open_data('digits')[:2], per):
        for c in classes:
            (root/part/f'digit_{c}').mkdir(parents=True)
            for i in np.flatnonzero(split.y==c)[:n]:
                Image.fromarray(split.x[i].permute(1,2,0).numpy()).save(root/part/f'digit_{c}'/f'{i:04}.png')
    return str(root)

@pytest.fixture(scope='module')
def first(tmp_path_factory):
    "A checkpoint of ten digits, as the program leaves it"
    out = tmp_path_factory.mktemp('first')
    main(data='digits', model='demo_cvt', size=16, epochs=2, bs=64, lr=1.6e-2, out=str(out), **common)
    return next(out.glob('digits-demo_cvt-none-*s0.safetensors'))

@pytest.fixture(scope='module')
def few(tmp_path_factory): return folder(tmp_path_factory.mktemp('few')/'few', (3,5,8))

@pytest.fixture(scope='module')
def tuned(first, few, tmp_path_factory):
    "The checkpoint fine-tuned by the program on three classes, with the side task"
    out = tmp_path_factory.mktemp('tuned')
    main(data=few, model='demo_cvt', size=16, drloc='paper', pretrained=str(first), epochs=3, bs=12, lr=4e-2, out=str(out), **common)
    return next(out.glob('few-demo_cvt-paper-tuned-*[0-9].safetensors'))

def recipe(few, **kw): return Recipe(**{**dict(data=few, model='demo_cvt', epochs=1, bs=12, warmup=0, tfms='none', mix=False), **kw})

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- from a checkpoint

def test_starts_from_the_checkpoint_with_a_new_head(first, few):
    "Before the first step all but the head is the checkpoint's, bit for bit; the head has the new classes"
    r = recipe(few, pretrained=str(first))
    own,start,scratch = (build(o, bar=False, device='cpu').model.state_dict() for o in (r, r, recipe(few)))
    old,head = load_file(first),{'head.weight','head.bias'}
    assert own.keys()==old.keys() and head <= set(own)
    assert all(torch.equal(own[k], old[k]) for k in set(own)-head)
    assert own['head.weight'].shape==(3,64) and old['head.weight'].shape==(10,64)
    assert same(own, start)
    assert not torch.equal(own['head.weight'], old['head.weight'][:3])
    assert any(not torch.equal(scratch[k], own[k]) for k in set(own)-head)

def test_all_weights_are_trained(first, tuned):
    "Nothing stays frozen, and nothing is started anew: the weights are nearer to the checkpoint than to zero"
    old,new = load_file(first),load_file(tuned)
    for k in set(old)-{'head.weight','head.bias'}:
        assert not torch.equal(old[k], new[k]), k
        if k.endswith('weight') and old[k].ndim>1: assert (new[k]-old[k]).norm() < old[k].norm(), k

def test_a_head_of_the_same_size_stays(first):
    "Ten classes from ten: every tensor is the checkpoint's, also the head; without a head in the tensors it is new"
    m = create_model('demo_cvt', 10)
    assert load_weights(m, first)==dict(new=[], resized=[]) and same(m.state_dict(), load_file(first))
    body = {k:v for k,v in load_file(first).items() if not k.startswith('head.')}
    assert set(load_weights(create_model('demo_cvt', 10), body)['new'])=={'head.weight','head.bias'}

def test_record_and_name_say_tuned(first, few, tuned):
    rec,head = find_record(tuned),read_header(tuned)
    assert tuned.is_file() and tuned.with_suffix('.json').is_file() and tuned.with_suffix('.mlp.safetensors').is_file()
    assert rec['recipe']['pretrained']==head['recipe']['pretrained']==str(first) and rec['status']=='complete'
    assert rec['data']['name']=='few' and (rec['data']['n_train'], rec['data']['n_valid'])==(36,30)
    assert head['vocab']==['digit_3','digit_5','digit_8'] and head['args']['num_classes']==3
    assert 'tuned' not in run_name(recipe(few)) and 'tuned' in run_name(recipe(few, pretrained='imagenet'))

@pytest.mark.parametrize('drloc', ['none','paper'])
def test_deterministic_on_the_cpu(drloc, first, few):
    "The same recipe gives the same weights, another seed others"
    def weights(seed):
        learn = build(recipe(few, pretrained=str(first), drloc=drloc, seed=seed, epochs=2), bar=False, device='cpu')
        with learn.no_logging(): learn.fit(2, learn.lr)
        return learn.model.state_dict()
    a,b,c = weights(0),weights(0),weights(1)
    assert same(a, b) and not same(a, c)

def test_side_task_leaves_the_start_alone(first, few):
    "With and without the side task a seed gives the same head and the same images in the first batch"
    a,b = (build(recipe(few, pretrained=str(first), drloc=d), bar=False, device='cpu') for d in ('none','paper'))
    assert same(a.model.state_dict(), b.model.state_dict())

def test_another_image_size(few, tmp_path):
    "Positions are interpolated, all other weights kept"
    vit = create_model('vit_mini', 10)
    save_model(vit, tmp_path/'vit.safetensors')
    m = build(recipe(few, model='vit_mini', pretrained=str(tmp_path/'vit.safetensors'), size=48), bar=False, device='cpu').model
    old,own = vit.state_dict(),m.state_dict()
    assert tuple(m.grid_size)==(12,12) and own['pos_embed'].shape==(1, 144+m.num_prefix_tokens, old['pos_embed'].shape[-1])
    res = load_weights(create_model('vit_mini', 3, img_size=48), tmp_path/'vit.safetensors')
    assert res['resized']==['pos_embed'] and set(res['new'])=={'head.weight','head.bias'}
    assert all(torch.equal(own[k], old[k]) for k in set(own)-{'pos_embed',*res['new']})
    assert (own['pos_embed'].mean((0,1))-old['pos_embed'].mean((0,1))).abs().max() < .02

# --- what cannot be started from

def refused(match, **kw):
    with pytest.raises(SystemExit, match=match) as e: main(**{**dict(model='demo_cvt', epochs=1, bs=12), **common, **kw})
    assert str(e.value).startswith('vt_drloc_train: ')
    return str(e.value)

def test_wrong_path(few, tmp_path):
    said = refused("no such file", data=few, pretrained=str(tmp_path/'gone.safetensors'), out=str(tmp_path/'runs'))
    assert 'gone.safetensors' in said and 'imagenet' in said and not (tmp_path/'runs').exists()

def test_another_model_is_refused_with_both_names(first, few, tmp_path):
    said = refused('holds a', data=few, model='vit_mini', pretrained=str(first), out=str(tmp_path))
    assert 'demo_cvt' in said and 'vit_mini' in said and first.name in said

def test_pickles_and_foreign_files_are_refused(few, tmp_path):
    "No code of a pickle is run; a safetensors file that names no model and one cut short are told apart"
    pickled,foreign,cut = (tmp_path/o for o in ('model.pth','foreign.safetensors','cut.safetensors'))
    torch.save(create_model('demo_cvt', 3).state_dict(), pickled)
    save_file(create_model('demo_cvt', 3).state_dict(), foreign)
    cut.write_bytes(foreign.read_bytes()[:2000])
    for f,why in ((pickled,'pickle'), (foreign,'names no model'), (cut,'cut short')):
        assert f.name in refused(why, data=few, pretrained=str(f), out=str(tmp_path/'runs'))

def test_no_public_weights_names_alternatives(few, tmp_path):
    said = refused('no public ImageNet weights of demo_cvt', data=few, pretrained='imagenet', out=str(tmp_path))
    for name in list_models(pretrained=True): assert re.search(rf'\b{name}\b', said)
    assert 'checkpoint' in said

def test_offline_says_what_to_download_and_where(few, tmp_path, monkeypatch):
    "Without a network: the address, the file, the folder; nothing is fetched"
    monkeypatch.setenv('VT_DRLOC_WEIGHTS', str(tmp_path/'weights'))
    def offline(w, path): raise OSError('no network')
    monkeypatch.setattr(models, '_download', offline)
    said = refused('could not be fetched', data=few, model='swin_t', pretrained='imagenet', bs=2, out=str(tmp_path/'runs'))
    for part in (PUBLIC['swin_t'].url, str(tmp_path/'weights'/PUBLIC['swin_t'].file), weights_help('swin_t'), 'VT_DRLOC_WEIGHTS'): assert part in said

def test_public_weights_that_lie_there_are_used(few, tmp_path, monkeypatch):
    "A file of ImageNet's 1,000 classes in the folder of weights: loaded, its head replaced"
    monkeypatch.setenv('VT_DRLOC_WEIGHTS', str(tmp_path))
    torch.manual_seed(1)
    sd = create_model('vit_tiny_16', 1000).state_dict()
    save_file(sd, tmp_path/PUBLIC['vit_tiny_16'].file)
    own = build(recipe(few, model='vit_tiny_16', pretrained='imagenet', size=64), bar=False, device='cpu').model.state_dict()
    assert own['head.weight'].shape[0]==3 and own['pos_embed'].shape[1]==17
    assert all(torch.equal(own[k], sd[k]) for k in own if k!='pos_embed' and not k.startswith('head.'))

# --- the score

def said(capsys, *args, **kw):
    capsys.readouterr()
    eval_main(*map(str, args), **{**dict(device='cpu', bs=12), **kw})
    return capsys.readouterr().out

def agrees(text):
    "Does the printed score equal its record's, to a hundredth of a point?"
    return text.strip().endswith('a difference of +0.00')

def test_prints_the_accuracy_of_the_record(tuned, capsys):
    acc,text = find_record(tuned)['final']['accuracy'],said(capsys, tuned)
    assert f'few: {100*acc:.2f} % of 30 images right' in text
    assert f'its record says {100*acc:.2f} %' in text and agrees(text)
    assert said(capsys, tuned, bs=7).splitlines()[1]==text.splitlines()[1]

def test_scores_a_small_set_without_options(tuned, capsys):
    "A set with fewer training images than the default batch; the same score"
    assert said(capsys, tuned, bs=250)==said(capsys, tuned)

def test_a_wrong_record_shows(tuned, tmp_path, capsys):
    "A record that claims more than the weights hold is told, with the difference"
    copy = tmp_path/tuned.name
    copy.write_bytes(tuned.read_bytes())
    assert 'no record' in said(capsys, copy)
    rec = json.loads(tuned.with_suffix('.json').read_text())
    for o in (rec['final'],*rec['epochs']): o['accuracy'] -= .1
    copy.with_suffix('.json').write_text(json.dumps(rec))
    assert 'a difference of +10.00' in said(capsys, copy)

def test_weights_of_chance_score_as_chance(first, tmp_path, capsys):
    "The score is the weights': the trained network beats one whose head is zero, which is right for one class in ten"
    m = load_model(first)
    torch.nn.init.zeros_(m.head.weight); torch.nn.init.zeros_(m.head.bias)
    save_model(m, tmp_path/'zero.safetensors', recipe=read_header(first)['recipe'])
    zero,full = check_record(tmp_path/'zero.safetensors', device='cpu'),check_record(first, device='cpu')
    assert zero['accuracy']==pytest.approx(.1, abs=.01) and zero['loss']==pytest.approx(np.log(10), rel=1e-5)
    assert full['accuracy'] > .15 and full['accuracy']==pytest.approx(full['record'], abs=1e-6)

def test_another_training_size(few, first, tmp_path, capsys):
    "Scored at the size that it was trained at, which its file says"
    main(data=few, model='demo_cvt', pretrained=str(first), size=48, epochs=1, bs=12, out=str(tmp_path), **common)
    f = next(tmp_path.glob('few-demo_cvt-none-tuned-*-size48-s0.safetensors'))
    assert read_header(f)['size']==[48,48] and agrees(said(capsys, f))

def test_names_images(tuned, few, capsys):
    "One line an image: its classes in order of their softmax, which add up to one"
    files = sorted(Path(few).glob('valid/*/*.png'))[::10]
    lines = said(capsys, tuned, *files).splitlines()
    assert len(lines)==len(files)==3
    for f,line in zip(files, lines):
        assert line.startswith(f'{f}: ')
        got = [o.rsplit(' ', 1) for o in line.removeprefix(f'{f}: ').split(', ')]
        ps = [float(p) for _,p in got]
        assert {c for c,_ in got}=={'digit_3','digit_5','digit_8'} and ps==sorted(ps, reverse=True) and sum(ps)==pytest.approx(1, abs=.02)
    assert len(said(capsys, tuned, files[0], top=1).split(', '))==1

def test_heldout(first, few, tmp_path, capsys):
    "Trained with held-out images it is scored on those, and `heldout=0` scores the test images"
    main(data=few, model='demo_cvt', pretrained=str(first), heldout=9, epochs=1, bs=12, out=str(tmp_path), **common)
    [f] = [o for o in tmp_path.glob('few-demo_cvt-none*-s0.safetensors')]
    own,test = said(capsys, f),said(capsys, f, heldout=0)
    assert 'of 9 images' in own and agrees(own)
    assert 'of 30 images' in test and 'no record' in test

def test_errors_of_the_score(tuned, first, tmp_path):
    foreign,text = tmp_path/'foreign.safetensors',tmp_path/'notes.txt'
    save_file(create_model('demo_cvt', 3).state_dict(), foreign)
    text.write_text('no image')
    for args,match in (((foreign,),'names no model'), ((tmp_path/'gone.safetensors',),'no such file'), ((tuned,text),'notes.txt')):
        with pytest.raises(SystemExit, match=match) as e: eval_main(*map(str, args), device='cpu')
        assert str(e.value).startswith('vt_drloc_eval: ')
    with pytest.raises(SystemExit, match='tells 3 classes apart, digits has 10'): eval_main(str(tuned), data='digits', device='cpu')
