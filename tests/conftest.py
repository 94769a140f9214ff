"How pytest-xdist deals out the tests: files with fixtures for the whole file come first, each to one worker; of all others each test goes to whichever is free"
import gc, sys
from functools import cache
from pathlib import Path
import pytest

gc.set_threshold(100_000, 50, 1000) # each worker holds all that any file imports, and the collector would walk through it again and again

@cache
def shares(file): return "scope='module'" in (Path(__file__).parent/file).read_text(encoding='utf-8')

def pytest_collection_modifyitems(items):
    items.sort(key=lambda o: not shares(o.path.name)) # no long file is left for the end
    for_gpu = [o for o in items if o.get_closest_marker('cuda')]
    if not for_gpu: return
    import torch
    if not torch.cuda.is_available():
        for o in for_gpu: o.add_marker(pytest.mark.skip(reason='needs a GPU'))

def pytest_collection_finish(session):
    "einops goes into a compiled graph in one piece: Dynamo traces its Python else, at every call, in over half of a network's compiling. The notebooks compile it traced"
    if 'torch._dynamo' in sys.modules:
        import einops, torch
        torch.compiler.allow_in_graph([einops.rearrange, einops.repeat])
    gc.freeze()

def pytest_unconfigure(config): gc.unfreeze()      # or Triton complains at the end of what was not collected

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling
    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid): return file if shares(Path(file := nodeid.split('::')[0]).name) else nodeid
    return Scheduler(config, log)
