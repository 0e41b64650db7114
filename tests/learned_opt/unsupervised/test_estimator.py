"""LearnedFeatures: scikit-learn's own checks, pipelines, seeds, and what it says to mistakes."""

import contextlib
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import learned_opt
from learned_opt import unsupervised
from learned_opt.unsupervised import LearnedFeatures


@pytest.fixture(scope="module")
def theta():
    return unsupervised.unsupervised().init_theta(jax.random.key(0))


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return x[:400], y[:400]


def small(theta, **settings):
    return LearnedFeatures(theta, **{"sizes": (12, 8), "steps": 20} | settings)


@pytest.mark.slow  # scikit-learn's own suite
@parametrize_with_checks([LearnedFeatures("letters", sizes=(4, 3), steps=2)])
def test_it_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def test_in_a_pipeline(theta, digits):
    x, y = digits
    model = make_pipeline(small(theta, sizes=(32, 32)), LogisticRegression(max_iter=500)).fit(x[:300], y[:300])
    assert model.score(x[300:], y[300:]) > 0.5  # chance is 0.1
    assert list(model[:-1].get_feature_names_out()[:2]) == ["learnedfeatures0", "learnedfeatures1"]


def test_the_seed_decides(theta, digits):
    x, _ = digits
    first, again = (small(theta, random_state=3).fit_transform(x) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, small(theta, random_state=4).fit_transform(x))
    model = small(theta, random_state=3)
    np.testing.assert_array_equal(clone(model).fit(x).transform(x), first)


def test_a_rows_features_do_not_depend_on_its_neighbours(theta, digits):
    x, _ = digits
    model = small(theta).fit(x)
    np.testing.assert_allclose(model.transform(x[:1]), model.transform(x)[:1], rtol=1e-4, atol=1e-5)


def test_shift_and_scale_of_the_data_do_not_matter(theta, digits):
    x, _ = digits
    plain, moved = small(theta).fit_transform(x), small(theta).fit_transform(100 * x - 7)
    np.testing.assert_allclose(plain, moved, rtol=1e-2, atol=1e-2)


def test_it_learns_by_the_rule(theta, digits):
    """What fit does, written out."""
    x, _ = digits
    model = small(theta, steps=3, batch_size=400).fit(x)
    rule = unsupervised.unsupervised()
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max)
    phi = rule.init(jax.random.split(jax.random.key(seed))[0], (64, 12, 8), "relu")
    scaled = jnp.asarray((x - x.mean()) / x.std(), jnp.float32)
    update = jax.jit(rule.update)
    for _ in range(3):
        phi = update(theta, phi, scaled)
    for a, b in zip(model.network_.layers, phi.layers, strict=True):
        np.testing.assert_allclose(a.w, b.w, rtol=2e-3, atol=2e-4)


def test_progress_is_shown_only_if_asked_for(theta, digits, capsys):
    x, _ = digits
    small(theta, verbose=True).fit(x)
    assert capsys.readouterr().out == "LearnedFeatures: step 20 of 20\n"
    small(theta).fit(x)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"activation": None}, "unknown activation None"),
        ({"sizes": ()}, "sizes must be each layer's units, positive integers"),
        ({"sizes": 4}, "positive integers, not 4"),
        ({"sizes": (4.0,)}, "positive integers"),
        ({"sizes": ("4",)}, "positive integers"),
        ({"sizes": "44"}, "positive integers"),
        ({"sizes": (4, 0)}, "positive integers"),
        ({"sizes": (True,)}, "positive integers"),
        ({"steps": True}, "steps must be an integer"),
        ({"steps": -1}, "steps must be an integer of at least 0"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"batch_size": 1}, "batch_size must be an integer of at least 2"),
    ],
)
def test_bad_parameters(theta, digits, settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        small(theta, **settings).fit(digits[0])


def test_bad_data(theta, digits):
    x, _ = digits
    with pytest.raises(ValueError, match="NaN"):
        small(theta).fit(np.where(np.arange(64) == 3, np.nan, x))
    with pytest.raises(ValueError, match="minimum of 2"):
        small(theta).fit(x[:1])
    model = small(theta).fit(x)
    with pytest.raises(ValueError, match=r"63 features.*64"):
        model.transform(x[:, 1:])


def test_an_unknown_rule(digits):
    with pytest.raises(learned_opt.StoreError, match="no pretrained rule or folder named 'nonesuch'"):
        LearnedFeatures("nonesuch").fit(digits[0])
    with pytest.raises(learned_opt.StoreError, match="is an optimizer"):
        LearnedFeatures("flagship-1").fit(digits[0])
    for wrong in (None, 3):
        with pytest.raises(learned_opt.StoreError, match="a name, a folder or meta-parameters"):
            LearnedFeatures(wrong).fit(digits[0])


def test_meta_parameters_of_another_rule(theta, digits):
    for wrong in ({}, {"merge": theta["merge"]}, theta | {"merge": np.zeros(3)}, {name: "x" for name in theta}):
        with pytest.raises(learned_opt.StoreError, match="other names or shapes"):
            LearnedFeatures(wrong).fit(digits[0])


# ---- data are centred and scaled in float64


TIMES = 1_700_000_000 + 8 * np.arange(60)[:, None] + np.arange(3)  # seconds since 1970


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float64])
def test_large_numbers_keep_their_differences(theta, dtype):
    expected = small(theta).fit_transform((TIMES - TIMES[0, 0]).astype(np.float64))
    features = small(theta).fit_transform(TIMES.astype(dtype))
    assert features.dtype == np.float64
    assert len(np.unique(features, axis=0)) == 60
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)


def test_float32_is_centred_in_float64(theta):
    """Near 2^19 a float32 is a multiple of 1/16: an exact shift of the same data."""
    x = np.random.default_rng(0).integers(0, 64, size=(60, 3)).astype(np.float32) / 16
    moved = x + np.float32(2**19)
    assert np.array_equal(moved - np.float32(2**19), x)
    np.testing.assert_allclose(small(theta).fit_transform(moved), small(theta).fit_transform(x), rtol=1e-3, atol=1e-4)
    assert small(theta).fit_transform(x).dtype == np.float32


@pytest.mark.parametrize("factor", [1e100, 1e-100, 2.0**400])
def test_a_scale_within_range_does_not_matter(theta, digits, factor):
    x = digits[0][:60].astype(np.float64)
    np.testing.assert_allclose(
        small(theta).fit_transform(x * factor), small(theta).fit_transform(x), rtol=1e-3, atol=1e-4
    )


def test_a_scale_out_of_range_is_refused(theta, digits):
    x = digits[0][:60].astype(np.float64)
    for factor in (1e200, 1e-300, 1e305):
        with pytest.raises(ValueError, match=r"standard deviation of X .* give X in other units"):
            small(theta).fit(x * factor)
    model = small(theta).fit(x)
    with pytest.raises(ValueError, match="from their mean"):
        model.transform(x * 1e30)
    with pytest.raises(ValueError, match="beyond 2\\^53"):
        small(theta).fit(TIMES * 10**9)
    with pytest.raises(ValueError, match="must hold numbers"):
        small(theta).fit(TIMES.astype("datetime64[s]"))


@pytest.mark.parametrize("value", [0.0, 0.1, 7, 1e300])
def test_constant_data_have_one_row_of_features(theta, value):
    features = small(theta).fit_transform(np.full((60, 3), value))
    assert np.all(np.isfinite(features))
    assert len(np.unique(features, axis=0)) == 1


# ---- compilation


@contextlib.contextmanager
def compilations():
    """How many programs are compiled (or read from the cache of compiled ones) inside."""
    counted = []

    def listener(event, duration, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_one_compilation_a_shape(digits):
    x, y = digits[0][:90], digits[1][:90]
    model = make_pipeline(LearnedFeatures("letters", sizes=(7, 5), steps=3), LogisticRegression(max_iter=500))
    with compilations() as counted:
        cross_val_score(model, x, y, cv=KFold(3))
    assert counted
    gc.collect()
    arrays = len(jax.live_arrays())
    with compilations() as counted:
        cross_val_score(model, x, y, cv=KFold(3))
        for seed in range(3):
            for steps in (0, 2, 55, 110):
                clone(model).set_params(learnedfeatures__steps=steps, learnedfeatures__random_state=seed).fit(
                    x[:60], y[:60]
                )
    assert not counted
    gc.collect()
    assert len(jax.live_arrays()) <= arrays
