"""Specs: transforms and their inverses, bounds, JSON, printing, and their mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from learned_opt import self_tuning as st
from learned_opt.self_tuning.hyperparameters import KINDS, tuned, unconstrained

MAKERS = {
    "interval": lambda u: st.interval(-1.0 + 3.0 * u, -1.0, 2.0),
    "logit": lambda u: st.logit(u),
    "positive": lambda u: st.positive(2.0 + 10.0 * u, 2.0),
    "log": lambda u: st.log(1e-6 + u),
    "log_interval": lambda u: st.log(10 ** (-5 + 4 * u), 1e-5, 1e-1),
    "real": lambda u: st.real(20.0 * (u - 0.5)),
}


@settings(deadline=None, max_examples=30)
@given(hs.floats(0.01, 0.99), hs.sampled_from(sorted(MAKERS)))
def test_transforms_invert_each_other(u, kind):
    with jax.enable_x64(True):
        spec = MAKERS[kind](u)
        assert spec.kind == kind
        (value,) = st.values([spec], st.start([spec])[0])
        np.testing.assert_allclose(value, spec.start, rtol=1e-9, atol=1e-9)


def test_every_kind_is_tested_and_keeps_its_bounds():
    assert set(MAKERS) == set(KINDS)
    for make in MAKERS.values():
        spec = make(0.5)
        (value,) = st.values([spec], jnp.linspace(-30.0, 30.0, 7)[:, None])
        assert value.shape == (7,)
        assert np.all(np.diff(value) >= 0)
        assert spec.low is None or np.all(value >= spec.low - 1e-6)
        assert spec.high is None or np.all(value <= spec.high + 1e-6)


def test_the_scale_is_its_softplus():
    _, scale = st.start({"a": st.real(0.0, scale=0.05), "b": st.real(0.0, scale=2.0)})
    np.testing.assert_allclose(jax.nn.softplus(scale), [0.05, 2.0], rtol=1e-6)


def test_values_keep_rows_where_examples_have_their_own():
    specs = {"a": st.real(0.0), "b": [st.real(1.0, tuned=False), st.real(0.0, per_example=False)]}
    assert st.names(specs) == ("a", "b/1")
    point = jnp.array([[1.0, 5.0], [2.0, 5.0]])
    found = st.values(specs, point)
    np.testing.assert_array_equal(found["a"], [1.0, 2.0])
    assert [float(x) for x in found["b"]] == [1.0, 5.0]


def test_discrete_values_are_whole_and_start_amid_their_step():
    specs = {"count": st.interval(3.0, 0.0, 5.0, discrete=True)}
    mean, _ = st.start(specs)
    assert float(st.values(specs, mean)["count"]) == 3.0
    assert float(st.values(specs, mean + 0.1)["count"]) == 3.0
    found = st.values(specs, jnp.linspace(-20.0, 10.0, 500)[:, None])["count"]
    assert set(np.asarray(found).tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert np.isfinite(unconstrained(st.interval(4.7, 0.0, 5.0, discrete=True)))
    short = {"count": st.interval(3.0, 0.0, 3.3, discrete=True)}
    assert float(st.values(short, st.start(short)[0])["count"]) == 3.0


def test_json_round_trip():
    specs = {
        "a": [make(0.3) for make in MAKERS.values()],
        "numpy": st.log(np.float32(0.25)),
        "b": {"c": st.logit(0.1, scale=0.2, per_example=False), "d": st.real(3.0, discrete=True, tuned=False)},
    }
    text = st.to_json(specs)
    assert st.from_json(text) == specs
    assert json.loads(text)["format"] == 1
    for broken in ('{"format": 2}', "[]", text.replace('"kind"', '"sort"'), text.replace('"dict"', '"tuple"')):
        with pytest.raises(ValueError, match="from_json"):
            st.from_json(broken)
    with pytest.raises(ValueError, match="got a tuple"):
        st.to_json((st.real(0.0),))


def test_printing():
    specs = {"drop": st.logit(0.25), "cut": st.interval(3.0, 0.0, 9.0, discrete=True, per_example=False)}
    lines = st.describe(specs, jnp.array([0.0, 0.0]), jnp.array([0.1, 0.2])).splitlines()
    assert lines[1].split() == ["cut", "4", "(0,", "9)", "whole", "0.1", "a", "batch"]
    assert lines[2].split() == ["drop", "0.5", "(0,", "1)", "0.2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.interval(2.0, 0.0, 1.0), r"start must lie in \(0.0, 1.0\), got 2.0"),
        (lambda: st.interval(0.5, 1.0, 0.0), "low must be below"),
        (lambda: st.logit(0.0), "lies on a bound"),
        (lambda: st.positive(0.0), "lies on a bound"),
        (lambda: st.log(-1.0), "above 0"),
        (lambda: st.log(1.0, low=0.1), "both low and high"),
        (lambda: st.real(float("nan")), "start must lie"),
        (lambda: st.real(0.0, scale=0.0), "scale must be above 0"),
        (lambda: st.Hyperparameter("cube", 0.0), "unknown kind"),
        (lambda: st.Hyperparameter("interval", 0.0), "needs low"),
        (lambda: st.names({"a": 1.0}), "is a float: make it with interval"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bound_is_a_fine_place_to_be_held_at():
    specs = {"drop": st.interval(0.0, 0.0, 0.5, tuned=False), "l2": st.log(1.0)}
    assert len(tuned(specs)) == 1
    assert float(st.values(specs, jnp.zeros(1))["drop"]) == 0.0
