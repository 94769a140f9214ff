"The site as its readers see it: built, then opened in a headless browser"
import functools, html, http.server, importlib, json, os, re, shutil, subprocess, sys, threading
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

import pytest, yaml

root = Path(__file__).resolve().parent.parent
docs = root/'_docs'
sys.path.insert(0, str(root/'tools'))
import badges, colab

made_from = [p for pat in ('nbs/**/*.ipynb', 'nbs/*.css', 'vt_drloc/*.py', 'tools/*.py', 'settings.ini', 'pyproject.toml', '_quarto.yml') for p in root.glob(pat)]
notebooks = sorted(p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
modules = sorted(p.stem for p in (root/'vt_drloc').glob('*.py') if p.name[0] != '_')
pages = sorted([n.replace('.ipynb', '.html') for n in notebooks] + [f'api/{m}.html' for m in ['index', *modules]])
config = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def site():
    "The folder of the site, built anew when a source is younger"
    home = docs/'index.html'
    if not home.exists() or home.stat().st_mtime < max(p.stat().st_mtime for p in made_from):
        res = subprocess.run([sys.executable, 'tools/site.py', 'docs'], cwd=root, capture_output=True, text=True)
        assert res.returncode == 0, res.stdout + res.stderr
    return docs

def read(p): return p.read_text(encoding='utf-8')


# ---- without a browser

def listed():
    "Every notebook in the sidebar, in reading order"
    def walk(o):
        if isinstance(o, str): yield from [o] if '*' not in o else sorted(p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').glob(o))
        elif isinstance(o, list):
            for i in o: yield from walk(i)
        else: yield from walk(o.get('contents') or o.get('href') or [])
    return [o for o in walk(config['website']['sidebar']['contents']) if o.endswith('.ipynb')]

def test_every_notebook_is_in_the_navigation():
    assert not set(notebooks) - set(listed()), 'add these to the sidebar in _quarto.yml'
    assert len(set(listed())) == len(listed())

def test_every_page_is_built(site):
    assert sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html')) == pages

@pytest.mark.parametrize('page', pages)
def test_links_lead_somewhere(site, page):
    "Relative links, pictures and anchors"
    text = read(site/page)
    for link in re.findall(r'(?:href|src)="([^"]+)"', text):
        if re.match(r'[a-z]+:|//', link): continue
        path, _, anchor = html.unescape(link).partition('#')
        to = (site/page).parent/unquote(path.split('?')[0]) if path else site/page
        to = to/'index.html' if to.is_dir() else to
        assert to.exists(), link
        if anchor and to.suffix == '.html': assert f'id="{unquote(anchor)}"' in read(to), link

def test_nothing_comes_over_the_network(site):
    "Letters, scripts, styles and pictures are in the site itself"
    for p in [*site.rglob('*.html'), *site.rglob('*.css')]:
        assert not re.search(r'<(script|img|iframe)[^>]* src="(https?:)?//|<link[^>]*rel="stylesheet"[^>]*href="(https?:)?//|(url\(|@import )"?(https?:)?//', read(p)), p

@pytest.mark.parametrize('notebook', notebooks)
def test_badge(site, notebook):
    "Every notebook's page opens in Colab and on GitHub, at the addresses of settings.ini"
    text = read(site/notebook.replace('.ipynb', '.html'))
    for address in badges.addresses(notebook): assert f'href="{address}"' in text
    if notebook != 'index.ipynb': assert re.search(r'</header>.{0,600}Open in Colab', text, re.S), 'not at the top of the page'

def test_badge_is_put_once():
    nb = dict(cells=[dict(cell_type='raw', id='a', source='---'), dict(cell_type='markdown', id='b', source='text')])
    once = badges.add(nb, 'x/y.ipynb')
    assert badges.add(once, 'x/y.ipynb') == once and [c['id'] for c in once['cells']] == ['a', badges.mark, 'b']

def test_colab_cell_in_every_notebook(): assert not colab.lacking(), 'run `make colab`'

def run_cell(monkeypatch, tmp_path, there=True):
    "Run the cell as Colab would, and say what it asked of the shell"
    said, src = [], ''.join(colab.cell(Path('tutorials/x.ipynb'))['source']).replace('/tmp/keep.txt', str(tmp_path/'keep.txt'))
    monkeypatch.setenv('COLAB_RELEASE_TAG', 'x') if there else monkeypatch.delenv('COLAB_RELEASE_TAG', raising=False)
    went = []
    monkeypatch.setattr(os, 'chdir', went.append)
    exec(src, dict(get_ipython=lambda: type('Shell', (), dict(system=staticmethod(said.append)))))
    return said, went

def test_colab_cell_keeps_torch(monkeypatch, tmp_path):
    import torch
    said, went = run_cell(monkeypatch, tmp_path)
    assert f"torch=={version('torch')}\n" in (tmp_path/'keep.txt').read_text()
    pip = next(s for s in said if s.startswith('pip'))
    assert f'-c {tmp_path/"keep.txt"}' in pip and not re.search(r'--upgrade| -U', pip)
    assert said[0].split()[-2] == f"https://github.com/{badges.settings()['user']}/{badges.settings()['repo']}" and went == [f"{said[0].split()[-1]}/nbs/tutorials"]

def test_colab_cell_does_nothing_elsewhere(monkeypatch, tmp_path): assert run_cell(monkeypatch, tmp_path, there=False) == ([], [])

@pytest.mark.parametrize('name', modules)
def test_reference(site, name):
    "Each public function and class: an anchor, its signature, and a link to the line where it is defined"
    mod, text = importlib.import_module(f'vt_drloc.{name}'), read(site/f'api/{name}.html')
    for n in mod.__all__:
        o = getattr(mod, n)
        if getattr(o, '__module__', None) != mod.__name__ or not hasattr(o, '__qualname__'): continue
        at = text.find(f'id="{n}"')
        assert at > 0, n
        m = re.search(rf'href="[^"]*/vt_drloc/{name}\.py#L(\d+)"', text[at:])
        lines = read(root/f'vt_drloc/{name}.py').splitlines()[int(m[1])-1:]
        assert n in ' '.join(lines[:4]), f'the source link of {n} leads to {lines[0]!r}'

def test_programs_can_read_it(site):
    "llms.txt lists every page, and its copy in Markdown is there"
    index = read(site/'llms.txt')
    assert badges.settings()['description'].split(',')[0] in index
    for p in pages:
        copy = p.replace('.html', '.llms.md')
        assert f'/{copy})' in index and (site/copy).exists(), p

def test_description_is_that_of_settings(): assert config['website']['description'] == badges.settings()['description']


# ---- in a browser

def browser_file():
    names = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'
    return next(filter(None, map(shutil.which, names)), None)

@pytest.fixture(scope='module')
def browser(site):
    "A headless browser, and the address of the site on a small server"
    file = browser_file()
    if file is None:
        if os.environ.get('NEED_BROWSER'): pytest.fail('no Chromium, and NEED_BROWSER is set')
        pytest.skip('NO BROWSER: install Chromium, and the site is tested in it')
    from playwright.sync_api import sync_playwright
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=file, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'])
        b.address = f'http://127.0.0.1:{server.server_port}/'
        yield b
        b.close()
    server.shutdown()

@pytest.fixture(scope='module')
def window(browser):
    "One window for all pages; what goes wrong in it is kept"
    w = browser.new_page(viewport=dict(width=1280, height=900))
    w.wrong = []
    w.on('console', lambda m: w.wrong.append(m.text) if m.type in ('error', 'warning') else None)
    w.on('pageerror', lambda e: w.wrong.append(str(e)))
    w.on('requestfailed', lambda r: w.wrong.append(r.url) if r.failure!='net::ERR_ABORTED' else None)    # broken off by going to the next page: not missing
    yield w
    w.close()

too_wide = '''() => [...document.querySelectorAll('main *')].filter(e => !e.closest('.katex') && e.getBoundingClientRect().right > innerWidth+1
    && ![...function*(){ for (let p = e.parentElement; p; p = p.parentElement) yield p }()].some(p => getComputedStyle(p).overflowX != 'visible')).slice(0, 3).map(e => e.outerHTML.slice(0, 120))'''
overflow = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'

@pytest.mark.parametrize('page', pages)
def test_page(browser, window, page):
    "No console errors, nothing missing, math typeset, every picture described, no sideways scrolling on a desk or a phone"
    window.wrong.clear()
    window.goto('about:blank')              # or the page before would be laid out once more
    window.set_viewport_size(dict(width=1280, height=900))
    window.goto(browser.address+page)
    window.wait_for_function("() => [...document.querySelectorAll('.math')].every(e => e.querySelector('.katex'))", timeout=10_000)
    assert not window.wrong
    assert not window.evaluate("[...document.querySelectorAll('.katex-error')].map(e => e.title)")
    body = window.evaluate("[...document.querySelectorAll('main p, main li, main td')].map(e => { const c = e.cloneNode(true); c.querySelectorAll('code, .katex').forEach(x => x.remove()); return c.textContent }).join('\\n')")
    assert not re.search(r'\$[^$\n]*\\\w+[^$\n]*\$', body), 'a formula that was not typeset'
    bad = window.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth || (i.closest('main') && !(i.alt && i.alt.includes(' ')))).map(i => i.alt + ' ' + i.src.slice(0, 60))")
    assert not bad, f'pictures that are missing or not described: {bad}'
    for width in (1280, 375):
        window.set_viewport_size(dict(width=width, height=900))
        assert window.evaluate(overflow) <= 0, f'scrolls sideways at {width} pixels: {window.evaluate(too_wide)}'

def first_of_each_look():
    "Marks one element for each combination of text colour, ground, size and weight: contrast is the same for all that look alike"
    return '''() => { const seen = new Set(), own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
      document.querySelectorAll('[data-look]').forEach(e => e.removeAttribute('data-look'));
      for (const e of document.querySelectorAll('body *')) { if (!own(e) || !e.checkVisibility()) continue;
        let g = e, bg; do { bg = getComputedStyle(g).backgroundColor; g = g.parentElement } while (g && bg == 'rgba(0, 0, 0, 0)');
        const s = getComputedStyle(e), look = [s.color, bg, s.fontSize, s.fontWeight, s.opacity].join();
        if (!seen.has(look)) { seen.add(look); e.dataset.look = ''; } } return seen.size }'''

looks = ['index.html', '00_idea.html', '05_pairs.html', '10_train.html', '14_variants.html', 'explain/paper_map.html', 'api/index.html', 'api/callback.html']

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('page', looks)
def test_accessible(browser, page, scheme):
    "WCAG AA by axe-core: contrast in both themes; names, roles and keyboard, which no theme changes, in one"
    from axe_playwright_python.sync_playwright import Axe
    w = browser.new_page(viewport=dict(width=1280, height=900), color_scheme=scheme)
    w.goto(browser.address+page)
    w.wait_for_function('([dark]) => document.documentElement.classList.contains("quarto-dark") == dark', arg=[scheme == 'dark'])
    rules = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']
    found = []
    if scheme == 'light': found += Axe().run(w, options=dict(runOnly=rules, rules={'color-contrast': dict(enabled=False)})).response['violations']
    assert w.evaluate(first_of_each_look()) > 3
    found += Axe().run(w, context=dict(include=[['[data-look]']]), options=dict(runOnly=dict(type='rule', values=['color-contrast']))).response['violations']
    w.close()
    assert not found, '\n'.join(f"{v['id']}: {n['html'][:120]} {n['failureSummary'][:160]}" for v in found for n in v['nodes'][:4])

def test_search(browser, window):
    "L_drloc is found, and the first result leads to a page that has it"
    window.set_viewport_size(dict(width=1280, height=900))
    window.goto(browser.address+'index.html')
    window.get_by_role('searchbox').fill('L_drloc')
    first = window.locator('#quarto-search a[href]').first
    first.wait_for(timeout=10_000)
    first.click()
    window.wait_for_load_state()
    assert window.url.split('?')[0].split('#')[0] != browser.address and 'drloc' in window.locator('main').inner_text().lower()

def test_wrapped_code(browser, window):
    "A long line goes on to the right of its own beginning, and what is copied is the code as it was"
    window.set_viewport_size(dict(width=390, height=900))
    window.goto(browser.address+'21_speed.html')
    text = re.findall(r'<pre class="sourceCode[^>]*><code[^>]*>(.*?)</code>', read(docs/'21_speed.html'), re.S)
    want = [html.unescape(re.sub('<[^>]+>', '', t)) for t in text]
    assert len(want)>20 and window.evaluate("[...document.querySelectorAll('pre.sourceCode > code')].map(c => c.checkVisibility() ? c.innerText : c.textContent)") == want
    places = window.evaluate("""[...document.querySelectorAll('.code-line')].map(l => { const r = document.createRange(); r.selectNodeContents(l);
        const rows = [...r.getClientRects()].filter(c => c.width); return [rows[0]?.top, rows[0]?.left, ...rows.filter(c => c.top > rows[0].bottom-2).map(c => c.left)]; })""")
    wrapped = [p for p in places if len(p)>2]
    assert len(wrapped)>20 and all(min(p[2:])>p[1] for p in wrapped)

def test_dark_mode(browser):
    "The switch changes the page, and the next page remembers"
    w = browser.new_page(viewport=dict(width=1280, height=900), color_scheme='light')
    ground = lambda: sum(map(int, re.findall(r'\d+', w.evaluate('getComputedStyle(document.body).backgroundColor'))[:3]))
    w.goto(browser.address+'index.html')
    light = ground()
    w.locator('.quarto-color-scheme-toggle').first.click()
    w.wait_for_function('() => document.documentElement.classList.contains("quarto-dark")')
    dark = ground()
    w.goto(browser.address+'00_idea.html')
    assert light > 600 and dark < 200 and ground() == dark
    assert w.evaluate("getComputedStyle(document.querySelector('.cell-output-display img')).backgroundColor") == 'rgb(255, 255, 255)'
    w.close()

def test_course_page_by_page(browser, window):
    "Next leads through every page of the sidebar in order, and Previous back"
    order = [n.replace('.ipynb', '.html') for n in listed() if (root/'nbs'/n).exists()]
    for here, after in zip(order, order[1:]):
        text = read(docs/here)
        to = re.search(r'nav-page-next.*?href="([^"]+)"', text, re.S)
        assert to and (docs/here).parent.joinpath(to[1]).resolve() == docs/after, here
        back = re.search(r'nav-page-previous.*?href="([^"]+)"', read(docs/after), re.S)
        assert (docs/after).parent.joinpath(back[1]).resolve() == docs/here, after
    window.goto(browser.address+'00_idea.html')
    window.locator('.nav-page-next a').click()
    assert window.url.endswith('01_tokens.html') and window.locator('#TOC a').count() > 3

def test_keyboard(browser):
    "Tab reaches the navigation, the search and the text's links in turn, and one sees where one is; folded text opens with Enter"
    w = browser.new_page(viewport=dict(width=1280, height=900))
    w.goto(browser.address+'02_attention.html')
    seen = []
    for _ in range(60):
        w.keyboard.press('Tab')
        seen.append(w.evaluate("(e => [e.tagName, e.closest('#quarto-header, #quarto-sidebar, #TOC, main')?.id || 'main', getComputedStyle(e).outlineStyle != 'none' || getComputedStyle(e).boxShadow != 'none'])(document.activeElement)"))
    assert {'quarto-header', 'quarto-sidebar'} <= {s[1] for s in seen} and 'INPUT' in {s[0] for s in seen}
    assert all(s[2] for s in seen), [s for s in seen if not s[2]][:3]
    fold = w.locator('.callout-header[data-bs-toggle]').first
    fold.focus()
    w.keyboard.press('Enter')
    w.wait_for_function("() => document.querySelector('.callout-header[data-bs-toggle]').getAttribute('aria-expanded') == 'true'")
    w.close()


# ---- the landing page

@pytest.mark.parametrize('width,height', [(375, 700), (1280, 700)])
def test_first_screen(browser, width, height):
    "All of it fits, in order, in at most 90 words"
    w = browser.new_page(viewport=dict(width=width, height=height))
    w.goto(browser.address+'index.html')
    places = w.evaluate('''() => { const at = f => Math.round([...document.querySelectorAll('main p, main img')].find(f).getBoundingClientRect().bottom), says = s => e => e.textContent.includes(s);
      return [at(says('What goes wrong')), at(says('The trick')), at(e => e.tagName == 'IMG'), at(says('Measured')), at(says('Use (three lines)'))] }''')
    assert places == sorted(places) and places[-1] <= height, places
    text = w.locator('main').inner_text().split('The idea in full')[0]
    figure = 'small network (MLP) used in training only 3 across 2 down (2/7, 3/7)'
    text = re.sub(r'Open in Colab|Notebook on GitHub', '', text)
    assert len(re.findall(r'[^\W_][\w.,/%-]*', text + figure)) <= 90, text
    doors = w.locator('main a[title*=":"]')
    assert doors.count() == 3 and 'colab.research.google.com' in doors.nth(1).get_attribute('href')
    w.close()

def test_measured_line_is_that_of_the_records(site):
    "Gain, interval and verdict of each small network, recomputed from the records"
    import numpy as np
    from scipy import stats
    from vt_drloc.train import read_records
    recs = [r for r in read_records(root/'nbs/results/runs') if r['data']['name'] == 'cifar10' and r['recipe']['tfms'] == 'paper' and not r['recipe']['control'] and r['recipe']['share'] == 1 and r['status'] == 'complete']
    text = re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', '', read(site/'index.html')))
    seen = {}
    for model, name in dict(swin_mini='Swin', t2t_mini='T2T', cvt_13_gap_mini='CvT').items():
        arm = lambda a: np.array([r['final']['accuracy']*100 for r in sorted(recs, key=lambda r: r['recipe']['seed']) if r['recipe']['model'] == model and r['recipe']['drloc'] == a])
        without, given = arm('none'), arm('paper')
        line = re.search(name + r'(?: gains)? (-?[\d.]+)(?: points, 95 % interval (\S+) to (\S+))? \(([\w ]+)\)', text)
        if min(len(without), len(given)) < 3: assert not line; continue
        gain = given - without
        half = stats.t.ppf(.975, len(gain)-1)*gain.std(ddof=1)/len(gain)**.5
        assert float(line[1]) == pytest.approx(gain.mean(), abs=.006) and (line[4] == 'holds') == (gain.mean() > half) and f'{len(gain)} seeds' in text
        row = re.search(rf'{model} ?{without.mean():.2f} ?{given.mean():.2f} ?{gain.mean():.2f} ?(-?[\d.]+) to (-?[\d.]+?) ?{len(gain)} ?{line[4]}', text)
        assert row, 'the table below'
        assert [*map(float, row.groups())] == pytest.approx([gain.mean()-half, gain.mean()+half], abs=.006)
        seen[model] = line[2] and (float(line[2]), float(line[3])) == tuple(map(float, row.groups()))
    assert seen['swin_mini'], 'the first of the plan has its interval in the first screen'


# ---- the guessing game

game_js = re.compile(r', game = (\{.*?\}), n = ', re.S)

def game_data(): return json.loads(game_js.search(game_html())[1])

def game_html():
    nb = json.loads(read(root/'nbs/00_idea.ipynb'))
    return next(''.join(o['data']['text/html']) for c in nb['cells'] for o in c.get('outputs', []) if 'guess-game' in ''.join(o.get('data', {}).get('text/html', [])))

def truth(r): return [abs(r['cells'][0][i]-r['cells'][1][i]) for i in (0, 1)]

def play(w, across, down, how):
    "One round: two choices and a look at the answer; what the game said"
    for axis, n in (('across', across), ('down', down)):
        if how == 'keyboard':
            w.locator(f'.guess-game input[name={axis}]').first.focus()
            w.keyboard.press('Space')
            for _ in range(n): w.keyboard.press('ArrowRight')
        else: w.locator(f'.guess-game input[name={axis}][value="{n}"]').tap()
    press = (lambda: (w.locator('.guess-game button').focus(), w.keyboard.press('Enter'))) if how == 'keyboard' else (lambda: w.locator('.guess-game button').tap())
    press()
    said = w.locator('.guess-game p').inner_text()
    press()
    return said

@pytest.mark.parametrize('how', ['keyboard', 'touch'])
def test_game_on_the_page(browser, how):
    "Ten rounds; the reader's error stands beside the net's and that of the best constant on the same pairs"
    game = game_data()
    phone = dict(viewport=dict(width=375, height=800), has_touch=True) if how == 'touch' else dict(viewport=dict(width=1280, height=900))
    w = browser.new_page(**phone)
    w.goto(browser.address+'00_idea.html')
    for r in game['rounds']:
        down, across = truth(r)
        said = play(w, min(across+1, 6) if how == 'touch' else across, down, how)
        assert f'{across} across and {down} down' in said
    rows = [l.split('\t') for l in w.locator('.guess-game table').inner_text().splitlines() if l.strip()]
    errors = {r[0].strip(): float(r[1]) for r in rows}
    off = sum(min(truth(r)[1]+1, 6)-truth(r)[1] for r in game['rounds'])/2/len(game['rounds']) if how == 'touch' else 0
    assert len(game['rounds']) == 10 and errors['you'] == pytest.approx(off, abs=.006)
    assert errors == pytest.approx({'you': off, **dict(game['rivals'])}, abs=.006)
    const = next(k for k in errors if k.startswith('always'))
    assert errors[const] == pytest.approx(sum(abs(t-int(const.split()[1])) for r in game['rounds'] for t in truth(r))/20, abs=.006)
    assert w.evaluate(overflow) <= 0
    w.close()

@pytest.mark.parametrize('where', ['iframe', 'cell'])
def test_game_in_notebooks(browser, where):
    "Colab puts an output into a frame of its own, Jupyter into the page, and runs its scripts again"
    w = browser.new_page()
    w.set_content('<main></main>')
    if where == 'iframe':
        w.evaluate("s => { const f = document.createElement('iframe'); f.sandbox = 'allow-scripts'; f.srcdoc = s; f.width = 500; f.height = 600; document.body.append(f) }", game_html())
        w = w.frame_locator('iframe')
    else:
        w.evaluate('''s => { const d = document.createElement('div'); d.innerHTML = s; document.body.append(d);
          d.querySelectorAll('script').forEach(o => { const n = document.createElement('script'); n.textContent = o.textContent; o.replaceWith(n) }) }''', game_html())
    w.locator('.guess-game input[name=across][value="1"]').check()
    w.locator('.guess-game input[name=down][value="0"]').check()
    w.locator('.guess-game button').click()
    assert 'You said 1 and 0' in w.locator('.guess-game p').inner_text()
