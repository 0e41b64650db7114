"""What the words of the benchmark's tables mean: the one place that says so."""

from typing import NamedTuple


class Term(NamedTuple):
    """A word of the tables.

    Attributes:
        name: as it heads a column.
        short: for the terminal and the model card.
        full: for the page and the documentation.
    """

    name: str
    short: str
    full: str


TERMS = (
    Term(
        "final loss",
        "how far the training loss came down, tuned Adam's way being 1",
        "How far the training loss came down, tuned Adam's way being 1: (initial − final) / (initial − Adam's final), "
        "the final loss a mean over the last twentieth of the steps. A loss that is not finite counts as −1, and none "
        "as less. No training loss counts as less than Adam's validation loss at the end: below that a network learns "
        "examples by heart. Where every optimizer gets there this is 1 for all: look at the steps.",
    ),
    Term(
        "validation",
        "the validation loss at the end over tuned Adam's",
        "The validation loss after the last step over tuned Adam's, the geometric mean over the tasks with data; below "
        "1 is better. Learning rates are tuned by it.",
    ),
    Term("≥ Adam", "on how many tasks at least as far", "The share of tasks on which the final loss is at least 1."),
    Term(
        "steps",
        "in how many times fewer steps tuned Adam's best loss was reached, 0 where never",
        "How many times fewer steps than tuned Adam it needed to the lowest training loss that tuned Adam reached, or "
        "to Adam's validation loss where that is higher; 0 where it never got there. Curves are smoothed, and each "
        "seed is compared with Adam's run of the same seed.",
    ),
    Term(
        "clock",
        "how many times faster by the clock",
        "The same in time: divided by what a step costs beside a step of Adam, each compiled for a single run and "
        "timed alone, turn by turn. On tasks as small as these the update is a large part of a step; where gradients "
        "cost more, the clock comes closer to the steps. A turn is at least 100 steps, after the first eleven: ten "
        "corrections of SOAP's basis.",
    ),
    Term(
        "score",
        "area under the performance profile in steps, 1 is best",
        "The area under the performance profile: for every ratio from 1 to 4, on which share of the tasks was it at "
        "tuned Adam's best loss within that ratio of the fastest of all rows? 1 is fastest everywhere, 0 is never "
        "within 4. It depends on who takes part: compare within one report. (Dolan and Moré 2002, with "
        "AlgoPerf's limit.)",
    ),
    Term(
        "diverged",
        "runs that ended above their start, or not finite",
        "Runs that ended above their start by more than a twentieth, or not finite.",
    ),
    Term(
        "step, state",
        "a step's time beside Adam's; bytes of the optimizer's state a parameter",
        "The time of a step, Adam's being 1, a geometric mean over tasks; the optimizer's state, a mean over tasks.",
    ),
    Term(
        "rate*",
        "at the edge of its grid",
        "The chosen learning rate is at the edge of its grid all the same: a wider one might do better. Grids are made "
        "longer where the best rate of the first tuning seed lies on their edge, three times at most.",
    ),
    Term(
        "lost",
        "ended behind tuned Adam, never reached its best loss, or had a run that diverged",
        "A task is lost where the final loss is below 1, tuned Adam's best loss was never reached, or a run diverged.",
    ),
)
AVERAGES = "Interquartile means over tasks and seeds, with 95% intervals; best score first."
LABELS = "NAME is at the learning rate tuned for each task, NAME@RATE at that rate everywhere."


def short(*names: str) -> str:
    """The short meanings of some terms as one sentence.

    Example:
        >>> short("≥ Adam", "score")
        '≥ Adam: on how many tasks at least as far; score: area under the performance profile in steps, 1 is best.'
    """
    meanings = {term.name: term.short for term in TERMS}
    return "; ".join(f"{name}: {meanings[name]}" for name in names) + "."


def markdown() -> str:
    """All terms as a Markdown list."""
    return "\n".join(f"- **{term.name}**: {term.full}" for term in TERMS) + "\n"
