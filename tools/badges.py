"Colab and GitHub links under the title of every processed notebook. Both builds run it in _proc, as _quarto.yml's pre-render; it needs Python alone"
import json, re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
mark = 'badges'


def settings():
    "What settings.ini says"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


def addresses(path):
    "Where a notebook under nbs/ opens in Colab, and where it lies on GitHub"
    cfg = settings()
    where = f"{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/nbs/{path}"
    return f'https://colab.research.google.com/github/{where}', f'https://github.com/{where}'


def badge(path):
    "The line under a page's title"
    colab, github = addresses(path)
    return f'[Open in Colab]({colab}){{.badge-link}} [Notebook on GitHub]({github}){{.badge-link}}'


def colab_links(text):
    "A link to a notebook whose title says that it opens in Colab does so"
    return re.sub(r'\]\((\S+\.ipynb) ("[^"]*opens in Colab")\)', lambda m: f']({addresses(m[1])[0]} {m[2]})', text)


def add(nb, path):
    "Put the line after the title, once, however often it is called; the landing page has doors instead, and gets it below them"
    cells = [c for c in nb['cells'] if c.get('id') != mark]
    for c in cells:
        if c['cell_type'] == 'markdown': c['source'] = colab_links(''.join(c['source']))
    at = next((i for i,c in enumerate(cells) if c['cell_type'] in ('raw', 'markdown')), -1) + 1
    if path == 'index.ipynb': at = next(i for i,c in enumerate(cells) if 'opens in Colab' in ''.join(c['source'])) + 1
    cells.insert(at, dict(cell_type='markdown', id=mark, metadata={}, source=badge(path)))
    return {**nb, 'cells': cells}


def main(proc=Path('.')):
    "Every notebook of a processed tree"
    for p in sorted(proc.rglob('*.ipynb')):
        path = p.relative_to(proc)
        if any(o[0] in '._' for o in path.parts): continue
        nb = add(json.loads(p.read_text(encoding='utf-8')), path.as_posix())
        p.write_text(json.dumps(nb, ensure_ascii=False, indent=1), encoding='utf-8')


if __name__ == '__main__': main()
