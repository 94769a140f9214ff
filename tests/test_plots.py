"What the pictures say: labels, lines and levels, each checked against numbers computed here"
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from vt_drloc import plots
from vt_drloc.plots import *

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def texts(ax): return [t.get_text() for t in ax.texts]
def legend(ax): return [t.get_text() for t in ax.get_legend().get_texts()]
def brute(h, w):
    "Every |row| and |column| difference, by loops"
    cells = [(r,c) for r in range(h) for c in range(w)]
    return np.array([(abs(a-p),abs(b-q)) for a,b in cells for p,q in cells])

def test_style_is_set_on_import():
    assert matplotlib.rcParams['figure.facecolor'] == '#ffffff'
    for k in ('font.size','axes.titlesize','axes.labelsize','xtick.labelsize','ytick.labelsize','legend.fontsize'): assert matplotlib.rcParams[k] >= 9
    assert {'blue','orange','green','red','purple','sky','grey'} <= set(PALETTE)

def test_show_image_shows_the_same_pixels_in_every_layout():
    x = torch.rand(3, 6, 8)
    want = x.permute(1,2,0).numpy()
    for y in (x, x.permute(1,2,0), x.numpy(), x.double()):
        got = show_image(y, title='t')
        assert np.allclose(got.images[0].get_array(), want) and got.get_title() == 't'
    u8 = (x*255).round().to(torch.uint8)
    assert np.allclose(show_image(u8).images[0].get_array(), u8.permute(1,2,0).numpy()/255)

def test_show_image_grey():
    x = torch.rand(8, 8)
    for y in (x, x[None], x[...,None]):
        im = show_image(y).images[0]
        assert np.allclose(im.get_array(), x.numpy()) and im.get_clim() == (0,1)

@pytest.mark.parametrize('bad,says', [(torch.rand(2,3,8,8), 'shape (2, 3, 8, 8)'), (torch.rand(5,8,8), '1 or 3 channels'),
    (torch.randn(3,8,8)*3, 'undo the normalization'), (torch.full((3,8,8), float('nan')), 'undo the normalization'), (torch.rand(3,8,8)*255, 'undo the normalization')])
def test_show_image_refuses(bad, says):
    with pytest.raises(ValueError) as e: show_image(bad)
    assert says in str(e.value)

def test_show_image_draws_on_the_given_axes():
    _,ax = plt.subplots()
    assert show_image(torch.rand(3,4,4), ax) is ax

@pytest.mark.parametrize('h,w', [(1,1), (7,7), (4,8)])
def test_show_grid_lines_lie_between_cells(h, w):
    ax = show_grid(torch.rand(3, 56, 56), h, w)
    flat = [l.get_ydata()[0] for l in ax.lines if l.get_ydata()[0]==l.get_ydata()[1] and tuple(l.get_xdata())==(0,1)]
    assert len(ax.lines) == h-1+w-1
    assert np.allclose(sorted(flat), [r*56/h-.5 for r in range(1,h)])

def test_show_patches_keeps_every_patch():
    x = torch.rand(3, 8, 12)
    got = np.asarray(show_patches(x, 4).images[0].get_array())
    gap = (got.shape[0]-8)
    for r in range(2):
        for c in range(3):
            y0,x0 = r*(4+gap), c*(4+gap)
            assert np.allclose(got[y0:y0+4, x0:x0+4], x[:, r*4:r*4+4, c*4:c*4+4].permute(1,2,0))
    assert (got[4:4+gap]==1).all()
    with pytest.raises(ValueError, match='side 5'): show_patches(x, 5)
    with pytest.raises(ValueError, match='side 0'): show_patches(x, 0)

@pytest.mark.parametrize('a,b,says', [((2,1),(4,4), ['3 across','2 down']), ((4,4),(2,1), ['3 across','2 down']), ((4,1),(2,4), ['3 across','2 down']),
    ((1,1),(1,6), ['5 across, 0 down']), ((5,3),(2,3), ['0 across, 3 down']), ((3,3),(3,3), ['0 across, 0 down'])])
def test_show_pair_labels_its_legs(a, b, says):
    ax = show_pair(torch.rand(3,70,70), 7, 7, a, b)
    assert texts(ax) == says
    corners = {(round((p.get_y()+.5)/10), round((p.get_x()+.5)/10)) for p in ax.patches}
    assert corners == {a, b}

def test_show_pair_legs_have_the_length_of_the_offset():
    h,w,a,b = 4,8,(3,1),(0,6)
    ax = show_pair(torch.rand(3,80,80), h, w, a, b)
    legs = [l for l in ax.lines if l.get_color() in (PALETTE['sky'],PALETTE['orange'])]
    assert len(legs) == 2
    across,down = legs
    assert np.isclose(abs(np.diff(across.get_xdata()))[0], 5*80/w) and np.isclose(np.diff(across.get_ydata())[0], 0)
    assert np.isclose(abs(np.diff(down.get_ydata()))[0], 3*80/h) and np.isclose(np.diff(down.get_xdata())[0], 0)

@pytest.mark.parametrize('a,b', [((7,0),(0,0)), ((0,0),(0,7)), ((-1,0),(0,0))])
def test_show_pair_refuses_cells_outside(a, b):
    with pytest.raises(ValueError, match='not in a 7 x 7 grid'): show_pair(torch.rand(3,70,70), 7, 7, a, b)

@pytest.mark.parametrize('h,w', [(7,7), (8,8), (4,8), (14,14), (1,3)])
def test_offset_hist_bars_and_level(h, w):
    d = brute(h, w)
    ax = offset_hist(h, w)
    n = 1 if h==w else 2
    shares = [np.bincount(d[:,i])/len(d) for i in range(n)]
    assert np.allclose([p.get_height() for p in ax.patches], np.concatenate(shares))
    assert len(ax.lines) == n
    said = [s for s in legend(ax) if 'best constant' in s]
    for i in range(n):
        cost = [np.abs(d[:,i]-c).mean() for c in range(max(h,w))]
        assert abs(ax.lines[i].get_xdata()[0] - np.argmin(cost)) < .5 and f'{np.argmin(cost)}, error {min(cost):.3f} cells' in said[i]
    assert f'{(h*w)**2:,} ordered pairs' in ax.get_title()

def test_offset_hist_of_the_papers_grid():
    "The level that every chapter cites: 2 cells, 1.347 cells an axis"
    ax = offset_hist(7, 7)
    assert ax.lines[0].get_xdata()[0] == 2 and legend(ax) == ['best constant: 2, error 1.347 cells']

def test_show_heat_puts_values_where_they_belong():
    h,w = 3,5
    r,c = np.divmod(np.arange(h*w), w)
    true = np.stack([abs(r-1), abs(c-4)], 1)
    fig = show_heat(torch.tensor(true)+.25, true, (1,4), h, w, image=torch.rand(3,30,50))
    by = {a.get_title(): a for a in fig.axes}
    assert {'|row|, predicted','|column|, predicted','|row|, true','|column|, true','query cell'} <= set(by)
    assert np.allclose(by['|row|, true'].images[0].get_array(), abs(np.arange(3)-1)[:,None].repeat(5,1))
    assert np.allclose(by['|column|, predicted'].images[0].get_array(), (abs(np.arange(5)-4)+.25)[None].repeat(3,0))
    assert {a.images[0].get_clim() for t,a in by.items() if '|' in t} == {(0,4)}
    box = by['|row|, true'].patches[0]
    assert (round(box.get_y()+.5), round(box.get_x()+.5)) == (1,4)

def test_show_heat_without_image_and_wrong_shape():
    t = torch.zeros(9,2)
    assert 'query cell' not in [a.get_title() for a in show_heat(t, t, (0,0), 3, 3).axes]
    with pytest.raises(ValueError, match='9 x 2 expected'): show_heat(t[:8], t, (0,0), 3, 3)

@pytest.mark.parametrize('n', [1,3,6])
def test_show_reach_counts_cells(n):
    masks = [torch.arange(16).reshape(4,4) < i+1 for i in range(n)]
    fig = show_reach(masks, [f's{i}' for i in range(n)], query=(0,0))
    axs = [a for a in fig.axes if a.get_title()]
    assert [a.get_title() for a in axs] == [f's{i}' for i in range(n)]
    assert [a.get_xlabel() for a in axs] == [f'{i+1} of 16 cells' for i in range(n)]
    for a,m in zip(axs, masks): assert np.array_equal(np.asarray(a.collections[0].get_array()).reshape(4,4), m.numpy())
    with pytest.raises(ValueError, match='one title a mask'): show_reach(masks, [])

def test_plot_curves_seeds_thin_mean_thick_level_dashed():
    ax = plot_curves({'a': [[3.,2.,1.],[5.,4.,3.]], 'b': [1.,1.,1.]}, 'cells', level=1.347)
    assert len(ax.lines) == 2+1+1+1
    thin1,thin2,mean,b,level = ax.lines
    assert thin1.get_linewidth() == thin2.get_linewidth() < mean.get_linewidth()
    assert list(mean.get_ydata()) == [4.,3.,2.] and list(mean.get_xdata()) == [1,2,3]
    assert list(level.get_ydata()) == [1.347]*2 and level.get_linestyle() == '--'
    assert mean.get_linestyle() != b.get_linestyle() and mean.get_color() != b.get_color()
    assert legend(ax) == ['a (mean of 2 seeds)','b','guessing: 1.347'] and ax.get_ylabel() == 'cells'

def test_plot_curves_mean_stops_with_the_shortest_seed():
    ax = plot_curves({'a': [[1.,2.,3.],[3.,4.]]}, 'y')
    assert [len(l.get_ydata()) for l in ax.lines] == [3,2,2] and list(ax.lines[-1].get_ydata()) == [2.,3.]

def test_plot_curves_takes_tensors_and_refuses_nothing():
    assert len(plot_curves({'a': torch.arange(4.)}, 'y').lines) == 1
    assert len(plot_curves({'a': torch.rand(2,4)}, 'y').lines) == 3
    with pytest.raises(ValueError, match='empty'): plot_curves({}, 'y')
    with pytest.raises(ValueError, match="'a'"): plot_curves({'a': []}, 'y')

def test_show_task_says_what_is_asked():
    ax = show_task(torch.rand(3, 56, 56), 7, 7, (1,5), (3,2))
    said = texts(ax)
    assert {'3 across', '2 down', 'small network\n(MLP)', 'used in training only', '(2/7, 3/7)'} <= set(said)
    assert '(3/4, 4/8)' in texts(show_task(torch.rand(3, 32, 64), 4, 8, (0,0), (3,4)))

def game(html):
    import json, re
    return json.loads(re.search(r', game = (\{.*?\}), n = ', html.data, re.S)[1])

def test_guess_game_scores_the_others_on_the_same_pairs():
    cells = torch.tensor([[[0,0],[3,1]], [[6,2],[6,2]]])
    said = torch.tensor([[1.,1.],[0.,2.]])
    g = game(guess_game(torch.rand(2,3,56,56), torch.rand(2,2,3,8,8), cells, 7, {'a net': said, 'right': torch.tensor([[3,1],[0,0]])}))
    assert g['rivals'] == [['a net', (2+0+0+2)/4], ['right', 0.]] and g['k'] == 7
    assert [r['cells'] for r in g['rounds']] == cells.tolist()

def test_guess_game_shows_the_pixels_it_was_given():
    import base64, io
    from PIL import Image
    view = torch.zeros(1,2,3,8,8); view[0,1,0] = 1
    g = game(guess_game(torch.rand(1,3,56,56), view, torch.zeros(1,2,2, dtype=torch.long), 7, {}))
    first,second = [np.asarray(Image.open(io.BytesIO(base64.b64decode(v.split(',')[1])))).mean((0,1)) for v in g['rounds'][0]['views']]
    assert first.max() < 5 and second[0] > 245 and second[1:].max() < 10

def test_guess_game_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match='2 photos, 1 views'): guess_game(torch.rand(2,3,8,8), torch.rand(1,2,3,8,8), torch.zeros(2,2,2), 7, {})

def test_every_page_draws_with_the_palette():
    "Colours by name from PALETTE, black and white aside; colour maps that people with colour-blindness can read and that stay ordered in grey"
    import json, re
    from pathlib import Path
    for p in sorted((Path(__file__).parents[1]/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        code = '\n'.join(''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code')
        assert set(re.findall(r"\b(?:color|c|ec|fc) ?= ?'(\w+)'", code)) <= {'k','w','none','white','black'}, p.name
        assert set(re.findall(r"\bcmap ?= ?'(\w+)'", code)) <= {'gray','cividis','viridis'}, p.name
