"Run every notebook, or those of a path, three at a time: nbdev-test, whose workers are forked from a process that has the imports behind it"
import gc, shutil, sys, warnings
gc.set_threshold(100_000, 50, 1000) # the collector walks through all that was ever imported: not so often
warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning) # timm's and torchvision's, when they are imported
if not shutil.which('nvidia-smi'):  # fastai's import opens a GPU, which a process forked after that cannot use
    import skimage.data, timm, torch._dynamo, torchvision, vt_drloc.train
from nbdev.test import nbdev_test

if __name__ == '__main__':
    gc.freeze()
    try: nbdev_test(*sys.argv[1:], n_workers=3, timing=True)
    finally: gc.unfreeze()          # or Triton complains at the end of what was not collected
