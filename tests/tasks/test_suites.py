"""The suites: training and held-out kept apart, every entry made."""

import functools
import itertools

import jax
import pytest

from tasks import data, manifest, num_params, suites
from tasks.suites import HELD_OUT, SAME_FAMILY_NEW_DATA, TRAIN, VALIDATION, Entry

TRAINED = {entry.name: entry for entries in TRAIN.values() for entry in entries}
HELD = {entry.name: entry for entries in HELD_OUT.values() for entry in entries}
CHOOSING = {entry.name: entry for entries in VALIDATION.values() for entry in entries}
HERE = [
    entry
    for entry in (*TRAINED.values(), *CHOOSING.values(), *HELD.values())
    if entry.dataset not in ("mnist", "cifar10")
]


def origin(entry: Entry) -> str:
    """The whole data set of which an entry's is a part."""
    return entry.dataset.removesuffix("_small")


def shapes(entry: Entry) -> tuple:
    family = entry.make()
    key = jax.random.key(0)
    params = jax.eval_shape(lambda d: family.task(d, family.sample(key)).init(key), family.data)
    return tuple(sorted(leaf.shape for leaf in jax.tree.leaves(params)))


def test_no_data_set_is_in_two_of_training_validation_and_held_out_suites():
    for one, other in itertools.combinations((TRAINED, CHOOSING, HELD), 2):
        assert not {origin(entry) for entry in one.values()} & {origin(entry) for entry in other.values()}
    for entry in (*TRAINED.values(), *CHOOSING.values(), *HELD.values()):
        assert entry.dataset in data.SETS or entry.dataset.startswith(f"{entry.family}(")


def test_no_family_is_both_but_for_those_named():
    both = {entry.family for entry in TRAINED.values()} & {entry.family for entry in HELD.values()}
    assert both == set(SAME_FAMILY_NEW_DATA)
    assert list(SAME_FAMILY_NEW_DATA) == sorted(SAME_FAMILY_NEW_DATA)


def test_families_in_both_have_other_sizes():
    def sizes(entries):
        return {(e.family, shapes(e)) for e in entries if e.family in SAME_FAMILY_NEW_DATA and e in HERE}

    assert not sizes(TRAINED.values()) & sizes(HELD.values())


def test_ranges_of_quadratics_do_not_overlap():
    kinds = (TRAINED, CHOOSING, HELD)
    trained, choosing, held = (
        [entry.make.keywords["condition"] for entry in kind.values() if entry.family == "quadratic"] for kind in kinds
    )
    assert max(high for _, high in trained) < min(low for low, _ in choosing)
    assert max(high for _, high in choosing) < min(low for low, _ in held)


def test_names_are_unique_and_shared_entries_the_same():
    for suite in (*TRAIN.values(), *VALIDATION.values(), *HELD_OUT.values()):
        assert len({entry.name for entry in suite}) == len(suite)
        for entry in suite:
            assert (TRAINED | CHOOSING | HELD)[entry.name] is entry


def test_sizes_of_the_suites():
    assert {name: len(suite) for name, suite in VALIDATION.items()} == {"validation": 5}
    assert {name: len(suite) for name, suite in TRAIN.items()} == {
        "quick": 2,
        "small": 1,
        "standard": 5,
        "local_sgd": 6,
        "kinds": 7,
        "networks": 9,
        "mixed": 7,
        "broad": 9,
    }
    assert {name: len(suite) for name, suite in HELD_OUT.items()} == {
        "quick": 5,
        "held_out": 18,
        "fetched": 6,
        "fetched_small": 6,
    }


@pytest.mark.parametrize("entry", HERE, ids=lambda entry: entry.name)
def test_entries_are_small(entry):
    assert 0 < num_params(entry.make()) <= 300_000


def test_the_reference_task_has_its_published_size():
    assert num_params(suites.suite("small")[0].make()) == 2410


def test_the_held_out_suites_are_as_frozen():
    """Whoever changes one must freeze anew, `python -m tasks.manifest`, and run every benchmark that is reported."""
    frozen = manifest.frozen()
    assert manifest.digest({"suites": frozen["suites"], "entries": frozen["entries"]}) == frozen["sha256"]
    now = manifest.compute()
    for name, description in frozen["entries"].items():
        assert now["entries"][name] == description, name
    assert now["sha256"] == frozen["sha256"]


def test_the_manifest_notices_every_change():
    entry = HELD_OUT["held_out"][0]
    described = manifest.record(entry)
    make = entry.make
    changed = [
        entry._replace(steps=7),
        entry._replace(make=functools.partial(make.func, *make.args, **{**make.keywords, "width": 49})),
        entry._replace(make=functools.partial(make.func, *make.args, **make.keywords, batch_size=65)),
        entry._replace(dataset="fashion_mnist_small"),
    ]
    assert all(manifest.record(other) != described for other in changed)
    assert described["parameters"]["hidden_0/w"] == [64, 48]


def test_fetched_entries_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path))
    for entry in suites.suite("fetched", held_out=True):
        with pytest.raises(data.DataError, match=f"learned-opt data fetch {entry.dataset}"):
            entry.make()


def test_unknown_suites():
    with pytest.raises(ValueError, match="known: quick, small, standard, local_sgd, kinds, networks, mixed, broad"):
        suites.suite("nonsense")
    with pytest.raises(ValueError, match="known: quick, held_out, fetched, fetched_small, validation"):
        suites.suite("small", held_out=True)
