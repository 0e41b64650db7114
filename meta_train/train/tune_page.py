"""A tuning run's page: ``report.html``, one file without network or scripts."""

import shlex
from typing import Any

import jinja2
from markupsafe import Markup


def render(result: dict[str, Any], curves: str) -> str:
    """The page of a run.

    Args:
        result: what ``result.json`` holds.
        curves: an SVG document of the losses and the hyperparameters.

    Returns:
        The text of an HTML document.
    """
    columns = {"best": "best by validation", "last": "last"}
    columns |= {name: f"{name} values, constant" for name in result["constants"]}
    judged = {"best": result["best"], "last": result["last"]}
    held = {f"constant {name}": found for name, found in result["constants"].items()}
    config = result["config"]
    named = ["--network", config["problem"]] if ":" in config["problem"] else [config["problem"]]
    command = ["learned-opt", "tune", *named]
    for name in ("dataset", "optimizer", "learning_rate", "method", "cycles", "seed"):
        if config[name] is not None:
            command += [f"--{name.replace('_', '-')}", str(config[name])]
    command += ["--constants"] if config["constants"] else []
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("tune_page.html.j2").render(
        columns=list(columns.values()),
        command=shlex.join(command),
        config=config,
        curves=Markup(curves[curves.index("<svg") :]),
        hyperparameters=[
            (name, [f"{judged[which]['hyperparameters'][name]:.4g}" for which in judged])
            for name in result["best"]["hyperparameters"]
        ],
        metrics=[
            (f"{split} {metric}", [f"{found[split][metric]:.4f}" for found in (judged | held).values()])
            for split in ("valid", "test")
            for metric in result["best"][split]
        ],
        remarks=remarks(result),
        result=result,
    )


def remarks(result: dict[str, Any]) -> str:
    """What did not go as planned, in one line; empty where all did."""
    done, planned = result["cycles_done"], result["config"]["cycles"]
    found = [f"stopped after {done} of {planned} cycles"] if done < planned else []
    if skipped := result["skipped_updates"]:
        found.append(f"{skipped} updates that were not finite were skipped")
    if back := result["rolled_back"]:
        found.append(f"{back} times back at the best weights")
    return "; ".join(found)
