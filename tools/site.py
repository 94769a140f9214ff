"The site and the README, with pip alone: nbdev's processing, then smalldocs or nbconvert. `python tools/site.py docs`, `api` or `readme`"
import inspect, os, re, shutil, sys, warnings
from functools import cache
from pathlib import Path
from badges import colab_links, root

pics = 'nbs/images' # where README.md finds its pictures


def api():
    "A reference page for each module into nbs/api, from docstrings, types and docments, and their table of contents; both builds show them"
    from nbdev.config import get_config
    from fastcore.basics import NullType
    from smalldocs import api
    os.chdir(root)
    cfg, out = get_config(), root/'nbs/api'
    made_from = [*cfg.lib_path.glob('*.py'), root/'settings.ini', root/'pyproject.toml', Path(__file__)]
    if (out/'index.qmd').exists() and (out/'index.qmd').stat().st_mtime > max(p.stat().st_mtime for p in made_from): return
    warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning) # timm's and torchvision's, when they are imported
    seen = api.unwrapped
    api.unwrapped = lambda o: o if isinstance(o, NullType) else seen(o) # fastai's `null` answers whatever it is asked, without end
    inspect.findsource = cache(inspect.findsource) # it is asked for the same source again and again, and parses a whole module to find a class
    shutil.rmtree(out, ignore_errors=True)
    s = api.Settings(root/'nbs', [cfg.lib_name], root=root, source=f'{cfg.git_url}/blob/{cfg.branch}')
    pages = api.build(s)
    (root/'nbs/_symbols.json').unlink()
    index = ['---', 'title: All modules', 'description: "Every module: what can be called, with which arguments, and where its source is"', '---', '',
             '| module | what it answers | public names |', '|--|--|--|']
    for p in pages:
        mod = sys.modules[f'{cfg.lib_name}.{p.stem}']
        names = ' '.join(f'[`{o.__name__}`]({p.name}#{o.__name__})' for o in api.own(mod))
        index.append(f'| [{p.stem}]({p.name}) | {api.summary(mod)} | {names} |')
        p.write_text(_page(p.read_text(encoding='utf-8'), p.stem, cfg), encoding='utf-8')
    (out/'index.qmd').write_text('\n'.join(index)+'\n', encoding='utf-8')


def _page(text, module, cfg):
    "A reference page that leads to its chapter instead of repeating its address"
    chapter = next(o for n,o in sources().items() if n == module)
    text = re.sub(rf'\nDocs: {own_link(cfg)}\.md\n', f'\nBuilt step by step in [its chapter](../{chapter}).\n', text)
    text = text.replace(f'title: "{cfg.lib_name}.', 'title: "', 1)
    code = (cfg.lib_path/f'{module}.py').read_text(encoding='utf-8').splitlines()
    def line(m): return next(f'{m[0][:-1]}{i}' for i,l in enumerate(code, 1) if re.match(rf'{m[1]}\b', l))
    text = re.sub(r'#(\w+)\}\n\n\[source\]\S+?#L0(?!\d)', line, text) # what was not made by `def` or `class`, such as a named tuple
    text = text.replace('| NoneType | `None` |', '| | `None` |') # a default is no type
    return re.sub(r'^(### )\w+\.(\w+)', r'\1\2', text, flags=re.M)


def docs():
    "Build the site into _docs"
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    from smalldocs import layout
    from smalldocs.site import build
    os.chdir(root)
    cfg = get_config()
    refresh_quarto_yml()
    api()
    proc = proc_nbs(n_workers=min(os.cpu_count(), 4))
    for d in (proc/'_docs', cfg.doc_path): shutil.rmtree(d, ignore_errors=True)
    yml = proc/'_quarto.yml' # an entry whose page does not exist yet is left out; that no page lacks its entry is tested
    there = lambda l: not (m := re.search(r'(?:- |href: )(\S+\.ipynb)$', l)) or (proc/m[1]).exists()
    yml.write_text('\n'.join(filter(there, yml.read_text(encoding='utf-8').splitlines())), encoding='utf-8')
    quarto_only = 'runs no code|output-file is not read|unknown key format-links|format commonmark is not built'
    wrong = [w for w in build(proc, quiet=True).warnings if not re.search(quarto_only, w)]
    out = proc/'_docs'
    shutil.copytree(root/'tools/katex', out/'site_libs/katex')
    pages, link = sources(), own_link(cfg)
    for p in out.rglob('*.html'):
        up, text = '../'*(len(p.relative_to(out).parts)-1), p.read_text(encoding='utf-8')
        text = text.replace(layout.KATEX, f'{up}site_libs/katex')
        text = re.sub(f'href="{link}', lambda m: f'href="{up}{pages[m[1]].with_suffix(".html")}', text)
        seen = set(re.findall(r' id="([^"]+)"', text))
        def anchor(m):
            id = m[1].lower()
            if id in seen: return m[0]
            seen.add(id)
            return m[0].replace('"kw"', f'"kw" id="{id}"', 1)
        text = re.sub(r'<span class="kw">(?:def|class)</span> (?:<span class="fu">)?(\w+)', anchor, text) # where `symbol` links lead
        text = re.sub(r'<span class="fu">(\w+)</span>(?=\(<span class="va">self</span>:(\w+))', lambda m: f'<span class="fu" id="{m[2].lower()}.{m[1].lower()}">{m[1]}</span>', text) # methods
        named = lambda m: m[0] if m[1].lower() in seen else (seen.add(m[1].lower()) or f'<span id="{m[1].lower()}">{m[1]}</span>{m[2]}')
        text = re.sub(r'(?:^|(?<=">))([A-Z][A-Z\d_]+)( <span class="op">=</span>)', named, text, flags=re.M) # constants too
        p.write_text(text, encoding='utf-8')
    for p in out.rglob('*.css'): # a theme's letters would come over the network; the system's do as well
        p.write_text(re.sub(r'@import url\("?https://fonts[^)]*\);?', '', p.read_text(encoding='utf-8')), encoding='utf-8')
    shutil.move(out, cfg.doc_path)
    print(f'{len(list(cfg.doc_path.rglob("*.html")))} pages in {cfg.doc_path.name}/, open {cfg.doc_path.name}/index.html')
    if wrong: sys.exit('\n'.join(['The site is built, but not as it should be:', *wrong]))


def sources():
    "The notebook of each page of Quarto's site, where pages lose their number: {'pairs': Path('05_pairs.ipynb'), ...}"
    nbs = [p.relative_to(root/'nbs') for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    return {str(p.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem))): p for p in nbs}


def own_link(cfg):
    "A pattern for the address that nbdev gives to a page of ours; its group is the page"
    return rf'{re.escape(cfg.doc_host)}{re.escape(cfg.doc_baseurl)}/([\w/]+)\.html'


def _front(src):
    "A title and subtitle from the front matter that nbdev's processing makes of them"
    import yaml
    fm = yaml.safe_load(src.strip().strip('-'))
    return f"# {fm['title']}\n\n> {fm.get('description') or fm.get('subtitle')}"


def readme():
    "README.md and its pictures, as {path: content}, from nbs/index.ipynb"
    from fastcore.nbio import read_nb
    from nbconvert import MarkdownExporter
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults
    import nbformat, json
    os.chdir(root)
    cfg, nb = get_config(), read_nb('nbs/index.ipynb')
    FilterDefaults()(nb)
    alts, cells = {}, []
    for c in nb.cells:
        if c.cell_type == 'raw': c.cell_type, c.source = 'markdown', _front(c.source)
        opts = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*)$', c.source, re.M)) if c.cell_type == 'code' else {}
        if c.cell_type == 'code': c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
        if 'fig-alt' in opts: alts[len(cells)] = opts['fig-alt'].strip('"\'')
        c['metadata'] = {'transient': {'remove_source': opts.get('echo') == 'false'}}
        cells.append(c)
    nb.cells = cells
    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    nb.metadata.language_info = {'name': 'python'}
    body, res = MarkdownExporter(exclude_output_stdin=True).from_notebook_node(nb, {'output_files_dir': pics, 'unique_key': 'index'})
    body = re.sub(r'!\[\w+\]\((\S+?/index_(\d+)_\d+\.\w+)\)', lambda m: f'![{alts.get(int(m[2]), "")}]({m[1]})', body)
    body = colab_links(body)
    body = re.sub(r'\]\(([\w/]+\.ipynb)', r'](nbs/\1', body)
    pages = sources()
    body = re.sub(rf'\]\({own_link(cfg)}[^)]*\)', lambda m: f'](nbs/{pages[m[1]]})', body)
    body = re.sub(r'\n\s*\n', '\n\n', re.sub(r' +$', '', body, flags=re.M)).strip()+'\n'
    return {'README.md': body.encode(), **res['outputs']}


if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else ''
    if what == 'docs': docs()
    elif what == 'api': api()
    elif what == 'readme':
        for p in (root/pics).glob('index_*'): p.unlink()
        for p, content in readme().items(): (root/p).parent.mkdir(parents=True, exist_ok=True); (root/p).write_bytes(content)
    else: sys.exit(__doc__)
