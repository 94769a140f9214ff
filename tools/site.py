"The site and the README, with pip alone: nbdev's processing, then smalldocs or nbconvert. `python tools/site.py docs` or `readme`"
import os, re, shutil, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
pics = 'nbs/images' # where README.md finds its pictures


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
    proc = proc_nbs(n_workers=min(os.cpu_count(), 4))
    for d in (proc/'_docs', cfg.doc_path): shutil.rmtree(d, ignore_errors=True)
    quarto_only = 'runs no code|output-file is not read|unknown key format-links|format commonmark is not built'
    warnings = [w for w in build(proc, quiet=True).warnings if not re.search(quarto_only, w)]
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
        p.write_text(text, encoding='utf-8')
    shutil.move(out, cfg.doc_path)
    print(f'{len(list(cfg.doc_path.rglob("*.html")))} pages in {cfg.doc_path.name}/, open {cfg.doc_path.name}/index.html')
    if warnings: sys.exit('\n'.join(['The site is built, but not as it should be:', *warnings]))


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
    body = re.sub(r'\]\(([\w/]+\.ipynb)', r'](nbs/\1', body)
    pages = sources()
    body = re.sub(rf'\]\({own_link(cfg)}[^)]*\)', lambda m: f'](nbs/{pages[m[1]]})', body)
    body = re.sub(r'\n\s*\n', '\n\n', re.sub(r' +$', '', body, flags=re.M)).strip()+'\n'
    return {'README.md': body.encode(), **res['outputs']}


if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else ''
    if what == 'docs': docs()
    elif what == 'readme':
        for p in (root/pics).glob('index_*'): p.unlink()
        for p, content in readme().items(): (root/p).parent.mkdir(parents=True, exist_ok=True); (root/p).write_bytes(content)
    else: sys.exit(__doc__)
