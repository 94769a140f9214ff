"Mistakes made in re-uses of the loss, put in on purpose: the test that nbs/explain/how_it_goes_wrong.ipynb names has to fail under each"
import argparse, pkgutil, subprocess, sys
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from fastcore.script import anno_parser
import test_callback, test_loss, test_train
import vt_drloc, vt_drloc.loss, vt_drloc.pairs
from vt_drloc.callback import DrlocCallback
from vt_drloc.loss import DrlocLoss
from vt_drloc.pairs import gather_pairs, offsets, rowcol, sample_pairs, targets
from vt_drloc.train import Recipe, main

def fails(test, *args, exc=AssertionError, **kw):
    "Passes if a test of ours fails; hypothesis may find several failures and raise them together"
    with pytest.raises(Exception) as found: test(*args, **kw)
    assert any(isinstance(e, exc) for e in getattr(found.value, 'exceptions', [found.value])), found.value

def put_in(monkeypatch, name, wrong, *modules):
    "Put a wrong function where the library and the tests have the right one"
    for m in (vt_drloc.pairs, vt_drloc.loss, test_loss, *modules):
        if hasattr(m, name): monkeypatch.setattr(m, name, wrong)

# --- 1 the flat index built with the height

def test_height_index_is_found(monkeypatch):
    "As the library would have it: rows and columns read off a flat index with the height, here of grids h x 2h"
    by_height = lambda idx, w: rowcol(idx, max(w//2, 1))
    assert torch.equal(rowcol(torch.arange(49), 7), torch.stack([torch.arange(49)//7, torch.arange(49)%7], -1))
    put_in(monkeypatch, 'rowcol', by_height)
    fails(test_loss.test_flat_index_on_2_by_3)
    fails(test_loss.test_targets_by_hand)
    fails(test_loss.test_targets_equal_the_slow_loop)
    fails(test_loss.test_a_turned_grid_swaps_the_axes)

def test_height_index_in_the_lookup_is_found(monkeypatch):
    "As re-uses have it: a row and a column are known, the embedding is read at row*h + column"
    def gather_by_height(grid, pairs):
        h, w = grid.shape[-2:]
        rc = rowcol(pairs, w)
        return gather_pairs(grid, (rc[...,0]*h + rc[...,1]).clamp(max=h*w-1))
    square = torch.randn(2, 3, 4, 4)
    p = sample_pairs(2, 9, 4, 4)
    assert torch.equal(gather_by_height(square, p), gather_pairs(square, p))
    put_in(monkeypatch, 'gather_pairs', gather_by_height)
    fails(test_loss.test_gathered_embeddings_equal_the_slow_loop)
    fails(test_loss.test_a_turned_grid_swaps_the_axes)

# --- 2 rows and columns drawn from each other's range

def drawn(rows, cols):
    "Draw rows and columns by themselves, `rows(h, w)` and `cols(h, w)` their ranges, and read at row*w + column, kept inside the grid"
    def draw(B, m, h, w, device=None, generator=None):
        r, c = (torch.randint(n(h, w), (B, m, 2), generator=generator, device=device) for n in (rows, cols))
        return (r*w + c) % (h*w)
    return draw

@pytest.mark.parametrize('rows,cols,oblong', [(lambda h, w: w, lambda h, w: h, (2,3)), (lambda h, w: h, lambda h, w: h, (2,3))],
                         ids=["each other's", 'both from the height'])
def test_wrong_ranges_are_found(rows, cols, oblong, monkeypatch):
    put_in(monkeypatch, 'sample_pairs', drawn(rows, cols))
    test_loss.test_pairs_are_uniform(7, 7)
    fails(test_loss.test_pairs_are_uniform, *oblong)

def test_right_ranges_pass(monkeypatch):
    put_in(monkeypatch, 'sample_pairs', drawn(lambda h, w: h, lambda h, w: w))
    test_loss.test_pairs_are_uniform(2, 3)
    test_loss.test_pairs_are_uniform(5, 4)

def test_swapped_sizes_are_found(monkeypatch):
    "Height and width exchanged everywhere: uniform, in range, the right level of guessing, and another game"
    def swapped(pairs, h, w, dtype=torch.float32): return targets(pairs, w, h, dtype)
    p = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    assert sorted(swapped(p, 2, 3).sum(-1).tolist()) == pytest.approx(sorted(targets(p, 2, 3).sum(-1).tolist()))
    put_in(monkeypatch, 'targets', swapped)
    fails(test_loss.test_targets_equal_the_slow_loop)
    fails(test_loss.test_targets_by_hand)

# --- 3 a global seed set on import

states = '''
import importlib, random, sys
import numpy as np, torch
def states(): return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes() + bytes([np.random.get_state()[2] % 256])
seeded = []
random.seed = seeded.append
for m in sys.argv[1:]:
    torch.manual_seed(1); np.random.seed(1); seeded.clear()
    before = states()
    importlib.import_module(m)
    if seeded or states() != before: print(m)
'''

def disturbers(*modules, path=None):
    "Those of the modules that set a seed, or draw from torch or NumPy, when a new process imports them"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', states, *modules], capture_output=True, text=True, cwd=path)
    assert res.returncode == 0, res.stderr
    return res.stdout.split()

def test_import_leaves_the_generators_alone(tmp_path):
    "The state of torch and NumPy stays, Python's own generator is not seeded (fastai takes draws from it, which is no harm); who does it is found"
    bad = dict(one='import torch; torch.manual_seed(12345)', two='import numpy; numpy.random.seed(0)', three='import random; random.seed(0)')
    for name,line in {**bad, 'good':'import torch; torch.Generator().manual_seed(0)'}.items(): (tmp_path/f'{name}.py').write_text(line)
    ours = [f'vt_drloc.{m.name}' for m in pkgutil.iter_modules(vt_drloc.__path__)]
    assert disturbers('good', *bad, *ours, path=tmp_path) == list(bad)

# --- 4 the MLP left out of the optimizer

def test_left_out_mlp_is_found(monkeypatch):
    test_callback.test_given_to(test_callback.given_to_init)
    monkeypatch.setattr(DrlocCallback, '_join', lambda self: setattr(self, 'joined', self.learn.opt))
    monkeypatch.setattr(DrlocCallback, '_part', lambda self: setattr(self, 'joined', None))
    fails(test_callback.test_given_to, test_callback.given_to_init)
    fails(test_callback.test_other_optimizers, test_callback.SGD)
    fails(test_callback.test_mlp_step_has_last_groups_lr_and_decays_weights_not_biases)
    fails(test_train.test_every_parameter_against_the_protocol, 'demo_cvt', 'paper')

# --- 5 a learned weight read as .item()

class Item(DrlocLoss):
    "The mean read out and put back, as a weight read by .item() is"
    def forward(self, *args, **kw):
        loss = super().forward(*args, **kw)
        return loss*(loss.detach().item() > -1)

def without_values(make):
    "A step on torch's fake tensors: shapes without values, so that nothing can be read back"
    with FakeTensorMode():
        loss, grid = make(), torch.randn(2, 8, 3, 5, requires_grad=True)
        pairs = torch.zeros(2, 16, 2, dtype=torch.long)
        for kw in (dict(pairs=pairs), dict()): loss(grid, **kw).backward()
    assert grid.grad is not None and all(p.grad is not None for p in loss.parameters())

@pytest.mark.parametrize('kw', [dict(), dict(reduction='sum')])
def test_loss_reads_no_value(kw): without_values(lambda: DrlocLoss(8, **kw))

def test_read_out_is_found():
    with pytest.raises(DataDependentOutputException, match='_local_scalar_dense'): without_values(lambda: Item(8))

def test_weight_as_a_tensor_is_learned_and_read_out_it_is_not():
    for read, learns in ((lambda s: s, True), (lambda s: s.item(), False)):
        s, grid = nn.Parameter(torch.tensor(.5)), torch.randn(1, 8, 3, 5, requires_grad=True)
        (read(s)*DrlocLoss(8, seed=0)(grid)).backward()
        assert (s.grad is not None) == learns

# --- 6 a switch parsed with type=bool

def test_switches_take_no_value(capsys):
    "No argument of the console script is a text that is cast to bool"
    p = anno_parser(getattr(main, '__wrapped__', main))
    assert not [a.dest for a in p._actions if a.type is bool]
    flags = [a.option_strings[-1] for a in p._actions if a.nargs == 0 and a.dest not in ('help','pdb','xtra')]
    assert {'compile', 'no_mix', 'no_bar'} <= {f.lstrip('-').replace('-', '_') for f in flags}
    for f in flags:
        for args in ([f, 'False'], [f'{f}=False']):
            with pytest.raises(SystemExit): p.parse_args(args)
    for arm in ('False', '0', 'no', ''):
        with pytest.raises(ValueError, match='unknown drloc preset'): Recipe(drloc=arm).check()

def test_cast_to_bool_is_found():
    p = argparse.ArgumentParser()
    p.add_argument('--use_drloc', type=bool, default=False)
    assert p.parse_args(['--use_drloc', 'False']).use_drloc is True
    assert [a.dest for a in p._actions if a.type is bool] == ['use_drloc']

# --- 7 targets not normalized

def test_targets_in_cells_are_found(monkeypatch):
    put_in(monkeypatch, 'targets', lambda pairs, h, w, dtype=torch.float32: offsets(pairs, w).to(dtype))
    fails(test_loss.test_targets_by_hand)
    fails(test_loss.test_targets_equal_the_slow_loop)
    fails(test_loss.test_module_by_hand)

# --- pairs drawn once for a batch

def test_shared_pairs_are_found(monkeypatch):
    put_in(monkeypatch, 'sample_pairs', lambda B, *args, **kw: sample_pairs(1, *args, **kw).expand(B, -1, -1))
    fails(test_loss.test_images_draw_their_own_pairs)


def test_a_learned_weight_is_refused():
    "Mistake 5 at the callback: a parameter would be read as a number at each step and never learn"
    from vt_drloc.callback import DrlocCallback
    for lam in nn.Parameter(torch.tensor(.1)), torch.tensor(.1), lambda pct: torch.tensor(pct):
        with pytest.raises(ValueError, match='it is not learned'): DrlocCallback(lam)
