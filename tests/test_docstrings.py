"""Every example of every docstring runs and shows what it says."""

import doctest
import importlib
import warnings

import pytest
from support import ROOT

PACKAGES = ("learned_opt", "tasks", "meta_train")
FINDER = doctest.DocTestFinder(exclude_empty=True)


def modules_with_examples():
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if ">>> " in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_the_examples_of(name):
    module = importlib.import_module(name)
    tests = [test for test in FINDER.find(module) if test.examples]
    assert tests
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries; the other tests take warnings for errors
        for test in tests:
            runner.run(test, out=shown.append)
    assert not runner.failures, "".join(shown)
