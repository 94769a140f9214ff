"The explain pages as they are stored: links that lead somewhere, every difference sorted, no picture of a fetched data set"
import json, re
from pathlib import Path
import pytest
from vt_drloc.variants import PRESET_TABLE

nbs = Path(__file__).resolve().parent.parent/'nbs'
pages = sorted((nbs/'explain').glob('*.ipynb'))

def cells(p): return json.loads(p.read_text(encoding='utf-8'))['cells']
def source(c): return ''.join(c['source'])
def shown(c):
    "What a code cell shows as markdown"
    return '\n'.join(''.join(o['data']['text/markdown']) for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {}))
def slug(heading): return re.sub(r'[^\w\s.-]', '', heading.lower()).strip().replace(' ', '-')
def anchors(p): return {slug(h) for c in cells(p) if c['cell_type']=='markdown' for h in re.findall(r'^#+ (.+)$', source(c), re.M)}

@pytest.mark.parametrize('p', pages, ids=lambda p: p.stem)
def test_links_lead_somewhere(p):
    text = '\n'.join(source(c) if c['cell_type']=='markdown' else shown(c) for c in cells(p))
    links = re.findall(r'\]\((?!https?:)([^)\s]+)\)', text)
    assert links
    for l in links:
        file,_,at = l.partition('#')
        to = (p.parent/file).resolve() if file else p
        assert to.exists(), f'{l}: no such page'
        assert not at or at in anchors(to), f'{l}: no such section'

def test_the_map_has_every_equation_and_table():
    text = '\n'.join(shown(c) for c in cells(nbs/'explain/paper_map.ipynb'))
    for item in [*(f'Eq. {i}' for i in range(1, 8)), 'L_{tot}', 'Table 1b', 'Table 2a', 'Table 2b', 'Table 3', 'Table 4', 'Figure 1a', 'Figure 1b']:
        lines = [l for l in text.splitlines() if item in l]
        assert lines, f'{item} is not on the map'
        assert any('](../' in l for l in lines), f'{item} leads nowhere'

def test_every_difference_is_sorted():
    "The last table of the page holds each point of `PRESET_TABLE`, and the three that are no part of a loss, with a verdict and a number"
    text = '\n'.join(shown(c) for c in cells(nbs/'explain/paper_against_code.ipynb'))
    rows = [[s.strip() for s in l.split('|')[1:-1]] for l in text.splitlines() if l.startswith('| **')]
    assert [r[2] for r in rows if not re.search(r'\d', r[5])] == []
    assert {r[0].strip('*') for r in rows} <= {'a lot','a little','only the wording'}
    plain = [re.sub(r'[${}\\]', '', r[2]) for r in rows]     # without the marks of a formula
    assert sorted(plain) == sorted([*(r['point'] for r in PRESET_TABLE), 'length', 'reported accuracy', 'cost'])

@pytest.mark.parametrize('p', [*pages, nbs/'tutorials/dense_prediction.ipynb'], ids=lambda p: p.stem)
def test_cells_with_fetched_data_show_numbers_and_no_picture(p):
    for c in cells(p):
        if c['cell_type']=='code' and re.match(r'#\| data\b', source(c)):
            kinds = {k for o in c['outputs'] for k in o.get('data', {})}
            assert kinds and not any(k.startswith('image/') for k in kinds)
