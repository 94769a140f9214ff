"How pytest-xdist deals out the tests: a file with fixtures for the whole file goes to one worker, of all others each test to whichever is free"
from functools import cache
import pytest

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling
    @cache
    def shares(file): return "scope='module'" in (config.rootpath/file).read_text(encoding='utf-8')
    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid): return file if shares(file := nodeid.split('::')[0]) else nodeid
    return Scheduler(config, log)
