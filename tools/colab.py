"""The first cell of every notebook: in Colab it fetches the repository and installs what is missing there, anywhere else it does nothing.
`python tools/colab.py` puts it into each notebook under nbs/, or brings it up to date; `--check` only says where it is missing."""
import json, sys
from badges import root, settings

id = 'c01ab000'


def cell(path):
    "The cell for nbs/`path`, with the addresses of settings.ini. Whatever pip installs, the torch that is there stays: its own version is a constraint"
    cfg = settings()
    folder = f"/content/{cfg['repo']}"
    return dict(cell_type='code', execution_count=None, id=id, metadata={}, outputs=[], source=f'''#| hide
import os
from importlib.metadata import version
if 'COLAB_RELEASE_TAG' in os.environ: # in Colab alone: add what it lacks, and keep the torch it has
    with open('/tmp/keep.txt', 'w') as f: f.writelines(f'{{o}}=={{version(o)}}\\n' for o in ('torch', 'torchvision', 'numpy'))
    get_ipython().system('git clone -q --depth 1 -b {cfg['branch']} https://github.com/{cfg['user']}/{cfg['repo']} {folder}')
    get_ipython().system('pip install -q -c /tmp/keep.txt {folder}')
    os.chdir('{folder}/{("nbs"/path).parent.as_posix()}')
'''.strip().splitlines(keepends=True))


def with_cell(nb, path):
    "The notebook with the cell first, and once; a copy of it with another id goes too"
    def ours(c): return c.get('id') == id or ''.join(c['source']).startswith('#| hide\nimport os\n') and 'COLAB_RELEASE_TAG' in ''.join(c['source'])
    return {**nb, 'cells': [cell(path), *(c for c in nb['cells'] if not ours(c))]}


def notebooks():
    "Every notebook: its path under nbs/, and what it holds"
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' not in p.parts: yield p.relative_to(root/'nbs'), json.loads(p.read_text(encoding='utf-8'))


def lacking():
    "Notebooks without the cell, or with an old one, and what they should be"
    return {path: with_cell(nb, path) for path,nb in notebooks() if nb != with_cell(nb, path)}


if __name__ == '__main__':
    todo = lacking()
    if '--check' in sys.argv: sys.exit('\n'.join(['run `make colab`, these notebooks lack the cell that installs in Colab:', *map(str, todo)]) if todo else None)
    for path,nb in todo.items(): (root/'nbs'/path).write_text(json.dumps(nb, ensure_ascii=False, indent=1)+'\n', encoding='utf-8')
    print(f'{len(todo)} notebooks changed')
