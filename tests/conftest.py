"Under `pytest --dist loadgroup` the tests of a file that share a fixture go to one worker, so that it is made once; all others to whichever is free"
import pytest

@pytest.hookimpl(tryfirst=True)   # before xdist reads the marks
def pytest_collection_modifyitems(items):
    for item in items:
        made = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, '_fixtureinfo') else ()
        if any(f[-1].scope == 'module' for f in made): item.add_marker(pytest.mark.xdist_group(item.path.stem))
