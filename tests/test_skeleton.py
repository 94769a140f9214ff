"The house itself: metadata said once, modules in their order, README made from its notebook, nothing private in the tree"
import ast, importlib, importlib.util, inspect, json, re, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest, tomllib

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
cfg = ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini', encoding='utf-8'); cfg = cfg['DEFAULT']
order = ('tokens attention vit hybrid pairs speed_loss loss callback data randaugment augment swin t2t cvt models variants gpus resume plots '
         'watch looks compare evaluate speed step_graph train bench profile evidence').split()
bare = set('tokens attention vit hybrid pairs loss swin t2t cvt variants'.split())     # these need torch, einops and fastcore alone
light = [m for m in order if m in bare | {'models', 'compare'}]                       # these load none of `heavy`
heavy = 'fastai matplotlib timm torchvision transformers huggingface_hub sklearn skimage pandas'.split()
modules = sorted(p for p in (root/'vt_drloc').glob('*.py') if p.name[0] != '_')
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
name = lambda p: p.stem


# ---- metadata

def test_pyproject_repeats_settings():
    proj = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']
    user, repo = cfg['user'], cfg['repo']
    assert proj['name'] == cfg['lib_name']
    assert proj['urls'] == {'Repository': f'https://github.com/{user}/{repo}', 'Documentation': f'https://{user}.github.io/{repo}/'}
    assert set(proj) == {'name', 'urls', 'dynamic'}, 'everything else belongs in settings.ini'

def test_one_version():
    import vt_drloc
    assert vt_drloc.__version__ == cfg['version'] == distribution(cfg['lib_name']).version

def test_console_scripts():
    scripts = {e.name: e for e in distribution(cfg['lib_name']).entry_points if e.group == 'console_scripts'}
    assert scripts.keys() >= {'vt_drloc_train', 'vt_drloc_eval', 'vt_drloc_demo'}
    for n,e in scripts.items():
        assert callable(e.load()), n
        assert (Path(sys.executable).parent/n).exists(), f'{n} is not installed beside {sys.executable}'

def test_constraints_meet_settings():
    "Whatever settings.ini asks for is pinned, at or above its lower bound"
    from packaging.requirements import Requirement
    pins = dict(l.strip().split('==') for l in (root/'constraints.txt').read_text().splitlines() if l.strip() and l[0] != '#')
    for r in map(Requirement, (cfg['requirements'] + ' ' + cfg['dev_requirements']).split()):
        assert r.name in pins, f'{r.name} has no pin in constraints.txt'
        assert r.specifier.contains(pins[r.name]), f'{r} but constraints.txt pins {pins[r.name]}'

def test_citation():
    "CITATION.cff repeats version, licence and address"
    import yaml
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert cff['version'] == cfg['version'] and cff['license'] == 'Apache-2.0'
    assert cff['repository-code'] == f"https://github.com/{cfg['user']}/{cfg['repo']}"

def test_workflows():
    "Each is YAML that GitHub reads, tests run on every Python of settings.ini, and make has each target they call"
    import yaml
    flows = {p.stem: yaml.safe_load(p.read_text(encoding='utf-8')) for p in (root/'.github/workflows').glob('*.yml')}
    assert flows.keys() == {'test', 'docs', 'release', 'weekly'}
    lo, hi = (int(cfg[k].split('.')[1]) for k in ('min_python', 'max_python'))
    assert flows['test']['jobs']['test']['strategy']['matrix']['python'] == [f'3.{v}' for v in range(lo, hi+1)]
    targets = set(re.findall(r'^([\w-]+):', (root/'Makefile').read_text(), re.M))
    steps = [s['run'] for f in flows.values() for j in f['jobs'].values() for s in j['steps'] if 'run' in s]
    assert {t for s in steps for t in re.findall(r'\bmake ([\w-]+)', s)} <= targets and 'bash .ci/run' in steps
    for p in (root/'.github/ISSUE_TEMPLATE').glob('*.yml'): assert yaml.safe_load(p.read_text(encoding='utf-8'))

def test_release_check():
    "No release while the owner is not set, or without its section in the changelog"
    res = subprocess.run(['make', '-s', 'release-check'], cwd=root, capture_output=True, text=True)
    ready = cfg['user'] != 'SET_ME' and f"\n## {cfg['version']}" in (root/'CHANGELOG.md').read_text()
    assert (res.returncode == 0) == ready, res.stdout + res.stderr
    if cfg['user'] == 'SET_ME': assert 'no release yet: set the owner' in res.stdout


# ---- modules

def imports(tree, top):
    "What a module imports: while it is being imported (`top`), or inside its functions"
    def walk(node, inside):
        for n in ast.iter_child_nodes(node):
            if isinstance(n, (ast.Import, ast.ImportFrom)) and inside != top:
                if isinstance(n, ast.Import): yield from (a.name for a in n.names)
                elif n.level: yield from (['vt_drloc.' + n.module] if n.module else [f'vt_drloc.{a.name}' for a in n.names])
                elif n.module == 'vt_drloc': yield from (f'vt_drloc.{a.name}' for a in n.names)
                else: yield n.module
            yield from walk(n, inside or isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    return list(walk(tree, False))

@pytest.mark.parametrize('p', modules, ids=name)
def test_module_order(p):
    "Exported code imports only modules above its own; plots only inside functions; train stands on top"
    assert p.stem in order, f'{p.stem} has no place in the order of modules'
    tree, above = ast.parse(p.read_text(encoding='utf-8')), set(order[:order.index(p.stem)])
    own = lambda top: {m.split('.')[1] for m in imports(tree, top) if m.startswith('vt_drloc.')} & set(order) - {p.stem} # `python -m` may import its own module again
    assert own(True) <= above - {'plots'}, f'{p.stem} may not import {own(True) - (above - {"plots"})}'
    assert own(False) <= above | {'plots'}, f'{p.stem} may not import {own(False) - above - {"plots"}}, inside a function either'

@pytest.mark.parametrize('p', [p for p in modules if p.stem in bare], ids=name)
def test_core_is_bare(p):
    mods = {m.split('.')[0] for m in imports(ast.parse(p.read_text(encoding='utf-8')), True)}
    assert mods <= {'torch', 'einops', 'fastcore', 'vt_drloc'} | set(sys.stdlib_module_names)

@pytest.fixture(scope='module')
def loaded():
    "What a new process has loaded after each import, one module after the other; schedules of lambda are made without fastai, too"
    code = """
import importlib, json, sys
def seen(*names): return sorted({m.split('.')[0] for m in sys.modules} & set(names))
res, heavy = {}, sys.argv[2].split()
for m in sys.argv[1].split():
    mod = importlib.import_module(f'vt_drloc.{m}')
    if m == 'variants': mod.lambda_schedule(.5, 'ramp_decay')(0.5)
    res[m] = seen(*heavy)
import vt_drloc.plots
res['plots'] = seen('IPython', 'matplotlib_inline')
print(json.dumps(res))"""
    res = subprocess.run([sys.executable, '-c', code, ' '.join(light), ' '.join(heavy)], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    return json.loads(res.stdout)

@pytest.mark.parametrize('module', [*light, 'plots'])
def test_import_is_light(loaded, module):
    "Networks and losses can be used where there is neither fastai nor another library of networks, pictures drawn without a notebook"
    assert loaded[module] == []

@pytest.mark.parametrize('p', modules, ids=name)
def test_docstrings(p):
    "Every public name that can be called says what it is"
    mod = importlib.import_module(f'vt_drloc.{p.stem}')
    for n in mod.__all__:
        o = getattr(mod, n)
        if inspect.isfunction(o) or inspect.isclass(o): assert (o.__doc__ or '').strip(), f'{p.stem}.{n} has no docstring'

@pytest.mark.parametrize('p', modules, ids=name)
def test_module_says_what_it_answers(p):
    "`doc(module)` opens with the question of its chapter"
    first = importlib.import_module(f'vt_drloc.{p.stem}').__doc__.splitlines()[0]
    asked = [re.search(r'\n> (.*)', ''.join(c['source'])) for n in notebooks for c in json.loads(n.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown' and ''.join(c['source']).startswith('# ')]
    assert first and any(first == m[1] for m in asked if m), first


# ---- notebooks and README

@pytest.mark.parametrize('p', notebooks, ids=name)
def test_notebook(p):
    "A title with its question, unique cell ids, outputs kept, no errors, and no more than a reader wants to load"
    cells = json.loads(p.read_text(encoding='utf-8'))['cells']
    title = next((''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), '')
    assert re.match(r'# \S.*\n+> \S', title), 'opens with no `# title` and `> question`'
    assert len({c['id'] for c in cells}) == len(cells), 'cell ids repeat'
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert outputs, 'holds no output: run it with nbdev-test --save'
    assert not [o for o in outputs if o['output_type'] == 'error']
    assert p.stat().st_size < 600*1024, 'is larger than 600 KB'

def test_readme():
    "README.md and its pictures are what nbs/index.ipynb makes"
    spec = importlib.util.spec_from_file_location('site_tool', root/'tools/site.py')
    tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)
    made = tool.readme()
    for p,content in made.items():
        assert (root/p).exists() and (root/p).read_bytes() == content, f'{p} is not what nbs/index.ipynb makes: run `make readme`'
    assert {f'{tool.pics}/{p.name}' for p in (root/tool.pics).glob('index_*')} == made.keys() - {'README.md'}

def test_readme_links():
    "Every relative link and picture of the README is there"
    for link in re.findall(r'\]\((?!https?:|#)([^)# ]+)', (root/'README.md').read_text(encoding='utf-8')): assert (root/link).exists(), link


# ---- the tree

def tree():
    "The text files that belong to the repository"
    out = subprocess.run('git ls-files -co --exclude-standard'.split(), cwd=root, capture_output=True, text=True)
    if out.returncode: pytest.skip('not a git repository')
    for f in sorted(set(out.stdout.splitlines())):
        if f.startswith('tools/katex/') or not (root/f).is_file(): continue
        try: yield f, (root/f).read_text(encoding='utf-8')
        except UnicodeDecodeError: pass

def test_no_machine_paths():
    private = re.compile('|'.join(f'/{d}/' for d in ('work', 'root')) + r'|/home/\w+/|/tmp/bash_jobs')
    found = [f'{f}: {m[0]}' for f,text in tree() if f != 'tests/test_skeleton.py' for m in private.finditer(text)]
    assert not found

def test_owner_is_said_once():
    "The placeholder stands in the two metadata files; elsewhere only in addresses that nbdev, `make colab` and `make readme` made of them"
    if cfg['user'] != 'SET_ME': return
    allowed = {'settings.ini', 'pyproject.toml', 'Makefile', 'tests/test_skeleton.py'}
    address = r'https://(SET_ME\.github\.io|github\.com/SET_ME|colab\.research\.google\.com/github/SET_ME)\b'
    made = lambda f,text: re.sub(address, '', text) if f.startswith(('vt_drloc/', 'nbs/')) or f in ('README.md', 'CITATION.cff') else text
    assert not [f for f,text in tree() if f not in allowed and 'SET_ME' in made(f, text)]


# ---- tests that need a GPU

def test_a_record_of_gpu_tests(tmp_path):
    "What pytest's report says comes into the record, an error of a fixture too"
    import gpu_tests
    (tmp_path/'test_some.py').write_text("""import pytest
@pytest.fixture
def broken(): raise OSError
def test_a(): pass
def test_b(): assert 0
def test_c(broken): pass
@pytest.mark.skip
def test_d(): pass
""")
    subprocess.run([sys.executable,'-m','pytest','-q','-p','no:cacheprovider',f'--junitxml={tmp_path}/report.xml',str(tmp_path)], capture_output=True)
    assert {t['name'].split('.')[-1]: t['outcome'] for t in gpu_tests.read(tmp_path/'report.xml')} == dict(test_a='passed', test_b='failed', test_c='error', test_d='skipped')

def test_an_interrupted_run_of_gpu_tests_is_no_record(tmp_path, monkeypatch):
    import gpu_tests, torch
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(gpu_tests, 'record', tmp_path/'gpu_tests.json')
    monkeypatch.setattr(gpu_tests.subprocess, 'call', lambda cmd, **kw: 2)
    with pytest.raises(SystemExit, match='pytest ended with 2.*no record was written'): gpu_tests.main()
    assert not list(tmp_path.iterdir())

def test_what_needs_a_gpu_is_marked():
    "So that `make test-gpu` finds it: nothing is skipped for want of a GPU in any other way"
    for f in sorted(Path(__file__).parent.glob('test_*.py')):
        if f.name!=Path(__file__).name: assert not re.search(r"skip(if)?\(.*(needs a GPU'|no GPU'|needs a CUDA)", f.read_text(encoding='utf-8')), f.name
