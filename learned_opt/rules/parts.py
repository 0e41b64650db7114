"""Training one part of a rule's meta-parameters and leaving the others as they are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..base import LearnedOptimizer, Theta


class Part(NamedTuple):
    """A rule whose meta-parameters are only some of another's.

    Attributes:
        rule: the rule; its ``init`` is that of the part.
        theta: the part's meta-parameters, a dict.
        whole: ``part -> theta``, puts the part back among the others.
    """

    rule: LearnedOptimizer
    theta: Theta
    whole: Callable[[Theta], Theta]


def only(rule: LearnedOptimizer, theta: Theta, names: Sequence[str]) -> Part:
    """The rule with all meta-parameters held fixed but those under some names.

    Any estimator and outer optimizer then sees, perturbs and moves the chosen ones alone. For Celo, ``["bank"]`` is the
    first phase of its meta-training and ``["scheduler"]`` the second; ``["scheduler"]`` of a ``scheduler`` over a
    trained base schedules that base.

    Args:
        rule: the rule.
        theta: its meta-parameters, a dict.
        names: keys of it.

    Returns:
        A :class:`Part`.

    Raises:
        ValueError: if ``theta`` is no dict with those keys, or no name is given.

    Example:
        >>> import jax
        >>> from learned_opt.rules.celo import celo
        >>> rule = celo()
        >>> part = only(rule, rule.init(jax.random.key(0)), ["bank"])
        >>> list(part.theta)
        ['bank']
    """
    known = sorted(theta) if isinstance(theta, dict) else []
    if not names or not set(names) <= set(known):
        raise ValueError(f"the parts of this rule's theta are {', '.join(known) or 'none'}, not {', '.join(names)}")
    fixed = {name: value for name, value in theta.items() if name not in names}

    def whole(part: Theta) -> Theta:
        return fixed | part

    def init(key):
        return {name: value for name, value in rule.init(key).items() if name in names}

    def build(part, *args, **options):
        return rule.build(whole(part), *args, **options)

    return Part(rule._replace(init=init, build=build), {name: theta[name] for name in sorted(names)}, whole)
