"""LearnedFeatures: scikit-learn's own checks, pipelines, seeds, and what it says to mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
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
        ({"sizes": ()}, "sizes"),
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
        LearnedFeatures("flagship").fit(digits[0])
