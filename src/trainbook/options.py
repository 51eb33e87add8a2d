"""The words of the command line: every command with its options; a config's fields are options of their own."""

import argparse
from collections.abc import Callable
from pathlib import Path

from pydantic.fields import FieldInfo

from trainbook import __version__, catalog, runtime
from trainbook.config import allowed_values
from trainbook.spec import RunSpec

DEFAULT_PRESET = "laptop"
PLATFORMS = ("kaggle", "colab", "vastai")


def parser_for(arguments: list[str], functions: dict[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of a command line; of the workflows' fields, which are many, only those that it can need.

    Args:
        arguments: the words, of which the first is looked at.
        functions: name of each command to what carries it out, whose docstring is its help; it is in the options' `command`.
    """
    parser = argparse.ArgumentParser(
        prog="trainbook", description="Train a workflow's notebook here, headless, and read what it measured."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str) -> argparse.ArgumentParser:
        function = functions[name]
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False)
        added.set_defaults(command=function)
        return added

    def of_each_workflow(
        name: str,
        add: Callable[[argparse.ArgumentParser, catalog.Workflow], None],
        required: bool = True,
        **before: tuple[str, ...],
    ) -> argparse.ArgumentParser:
        """A command that takes words of given choices, a workflow's name and then options, some of them the workflow's."""
        parser = command(name)
        for word, choices in before.items():
            parser.add_argument(word, choices=choices)
        names = parser.add_subparsers(required=required, metavar="NAME", dest="name")
        for workflow in map(catalog.load, catalog.names() if arguments[:1] == [name] else []):
            add(names.add_parser(workflow.name, help=workflow.title, allow_abbrev=False), workflow)
        return parser

    command("list")
    show_parser = command("show")
    show_parser.add_argument("name")
    show_parser.add_argument("--preset", default=DEFAULT_PRESET)
    of_each_workflow("plan", _add_plan)
    run_parser = of_each_workflow("run", _add_run, required=False)
    run_parser.add_argument("--spec", type=Path, help="run what this run.toml says, instead of NAME and its options")
    of_each_workflow("sweep", _add_sweep)
    of_each_workflow("tune", _add_tune)
    of_each_workflow("bundle", _add_bundle, platform=PLATFORMS)
    for name in ("resume", "verify", "report"):
        one = command(name)
        one.add_argument("run", help="run id, or path of the run folder")
        if name != "report":
            _add_runtime(one)
        if name == "resume":
            one.add_argument("--step", type=int, help="go back to the checkpoint of this step; later ones are set aside")
            _add_processes(one)
    compare_parser = command("compare")
    compare_parser.add_argument("folders", nargs="+", metavar="RUN", help="run ids, or paths of run folders")
    compare_parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page to write (default compare.html)"
    )
    _add_runtime(command("doctor"))
    return parser


def _add_plan(parser: argparse.ArgumentParser, workflow: catalog.Workflow) -> None:
    parser.add_argument("--preset", default="", help=f"one of {', '.join(workflow.Config.PRESETS)} (default full)")
    parser.add_argument("--run", default="", help="read what this run took, instead of measuring here")
    parser.add_argument("--prices", type=Path, help="a table like the kit's prices.toml, instead of it")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to take steps for (default 6)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:INDEX")
    _add_fields(parser, workflow.Config.model_fields)


def _add_bundle(parser: argparse.ArgumentParser, workflow: catalog.Workflow) -> None:
    parser.add_argument("--out", default="dist", help="folder to write to (default dist)")
    _add_authentic(parser)
    elsewhere = ("workflow", "overrides", "authentic")
    _add_fields(parser, {name: field for name, field in RunSpec.model_fields.items() if name not in elsewhere})
    _add_fields(parser, workflow.Config.model_fields)


def _add_run(parser: argparse.ArgumentParser, workflow: catalog.Workflow) -> None:
    parser.add_argument("--run-id", default="", help="name of the run folder; an existing one of the same config is continued")
    _add_training(parser, workflow)


def _add_training(parser: argparse.ArgumentParser, workflow: catalog.Workflow) -> None:
    """What a run can be told, and every run of a sweep or a study."""
    parser.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        help=f"one of {', '.join(workflow.Config.PRESETS)} (default {DEFAULT_PRESET})",
    )
    _add_authentic(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a training brief in YAML; options given here win")
    _add_runtime(parser)
    _add_processes(parser)
    _add_fields(parser, workflow.Config.model_fields)


def _add_sweep(parser: argparse.ArgumentParser, workflow: catalog.Workflow) -> None:
    parser.add_argument(
        "--field",
        dest="sweep_fields",
        action="append",
        required=True,
        metavar="FIELD=VALUE,VALUE,...",
        help="values to try; several fields: every combination. A value that holds commas stands in brackets: (16,16,8)",
    )
    parser.add_argument("--seeds", dest="sweep_seeds", default="", metavar="0,1,2", help="train each with these (default: one)")
    parser.add_argument(
        "--metric",
        dest="sweep_metrics",
        action="append",
        default=[],
        metavar="METRIC",
        help="show this too, beside those of the targets; accuracy stands for every model's: model/accuracy, guess/accuracy",
    )
    parser.add_argument("--sweep-id", default="", help="begins the names of its folders (default: from what is swept)")
    _add_training(parser, workflow)


def _add_tune(parser: argparse.ArgumentParser, workflow: catalog.Workflow) -> None:
    parser.add_argument(
        "--field",
        dest="sweep_fields",
        action="append",
        required=True,
        metavar="FIELD=LOW..HIGH",
        help="a range to search, by ratio where its ends are a factor of 10 apart; or values: FIELD=VALUE,VALUE,...",
    )
    parser.add_argument(
        "--trials",
        dest="tune_trials",
        type=int,
        metavar="N",
        help="trials altogether (default 20, or as many as --budget has time for)",
    )
    parser.add_argument("--budget", dest="tune_budget", default="", help="for all trials of this call, such as 20m; then stop")
    parser.add_argument(
        "--metric",
        dest="tune_metric",
        default="",
        metavar="METRIC",
        help="to look for: held out, such as model/accuracy, or of the records, such as valid_loss; those let bad trials end "
        "early (default: best_metric where the config validates, else the first target's)",
    )
    parser.add_argument("--best", dest="tune_best", default="", choices=["highest", "lowest"], help="which value of it is best")
    parser.add_argument("--study-id", default="", help="begins the names of its folders (default: from what is searched)")
    _add_training(parser, workflow)


def _add_authentic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--authentic",
        "--authentic-mode",
        nargs="?",
        type=_true_or_false,
        const=True,
        metavar="true|false",
        help=f"{RunSpec.model_fields['authentic'].description} false is for smoke runs, and is written on all they make.",
    )


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _add_runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:INDEX")
    parser.add_argument("--time-budget", help="stop and save after this long, such as 20m or 11h")
    parser.add_argument("--mirror", help="an existing folder, such as a network share, to copy the run to while it trains")
    parser.add_argument("--memory-limit", help="count on so much of the device's free memory, such as 12GB, instead of all")
    parser.add_argument("--log-level", choices=runtime.LOG_LEVELS, help="what the console shows; the file has everything")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", help="train in so many processes, one per GPU; auto (the default) takes both of Kaggle's T4s"
    )
    parser.add_argument(
        "--parallel",
        choices=runtime.PARALLEL_KINDS,
        help="each process keeps a copy of the weights (default), a slice of every tensor, or some of an nn.Sequential's blocks",
    )
    parser.add_argument("--workers", help="processes that read a data set too large for the device (default 0)")
    parser.add_argument("--jobs", help="networks trained at once where a workflow trains many (default: the cores, or the GPUs)")
    parser.add_argument("--checkpoint-every", help="at most this much work is lost to a kill, such as 60s or 5m (default 60s)")
    parser.add_argument("--keep", help="number of checkpoints kept (default 2)")
    parser.add_argument("--checkpoint-dir", help="keep checkpoints in DIR/RUN instead of the run folder")
    parser.add_argument("--log-dir", help="keep logs in DIR/RUN instead of the run folder")


def _add_fields(parser: argparse.ArgumentParser, fields: dict[str, FieldInfo]) -> None:
    """One option per field of a config or spec; values stay text, its class reads and checks them."""
    for name, field in fields.items():
        text = " ".join((field.description or "").split()).replace("%", "%%")
        allowed = allowed_values(field)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text + (f" [{allowed}]" if allowed else ""),
        )
