"""The command line: list, show, plan, run, sweep, tune, bundle, resume, verify, report, compare, doctor."""

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from trainbook import __version__, catalog, report, runtime
from trainbook.config import allowed_values
from trainbook.errors import RunFailed, UserError
from trainbook.files import read_json, write_atomic
from trainbook.headless import execute
from trainbook.records import BAD_INPUT, EXIT_CODES, RunFolder, find_run, identity, measured_times
from trainbook.spec import RunSpec
from trainbook.tables import Table

DEFAULT_PRESET = "laptop"
PLATFORMS = ("kaggle", "colab", "vastai")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 complete, 1 failed, 2 bad input, 3 stopped and resumable."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    try:
        _export(options)
        return options.command(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `trainbook show NAME | head` has read enough
        sys.stdout = None
        return 0
    except KeyboardInterrupt:  # before a run has begun to listen: what was saved earlier is as it was
        print("interrupted", file=sys.stderr)
        return EXIT_CODES["stopped"]
    except RunFailed as error:
        print(error, file=sys.stderr)
        return EXIT_CODES["failed"]


def list_workflows(options: argparse.Namespace) -> int:
    """What there is, and how long its runs took here."""
    times = measured_times(runtime.runs_folder())
    rows = [[w.name, w.title, ", ".join(w.Config.PRESETS), times.get(w.name, "no complete run yet")] for w in _workflows()]
    print(Table(["workflow", "what it trains", "presets", "measured here"], rows))
    return 0


def show(options: argparse.Namespace) -> int:
    """A workflow's fields and targets."""
    workflow = catalog.load(options.name)
    print(workflow.module.__doc__.strip(), end="\n\n")
    rows = workflow.Config.from_preset(options.preset).rows()
    print(
        Table(
            ["field", options.preset, "allowed", "meaning"],
            [[name, value, allowed, text] for name, value, _, allowed, text in rows],
        ),
        end="\n\n",
    )
    targets = [[t.metric, f"{t.comparison} {t.value}", ", ".join(t.presets), t.source] for t in workflow.TARGETS]
    print(Table(["metric", "target", "presets", "source"], targets))
    return 0


def plan(options: argparse.Namespace) -> int:
    """Where to train: hours, sessions and cost per platform, from a few seconds of real steps here or from a run."""
    from trainbook import plan as planning

    workflow = catalog.load(options.name)
    prices_file = options.prices or planning.PRICES
    prices = planning.Prices.read(prices_file)
    overrides = {name: value for name, value in vars(options).items() if name in workflow.Config.model_fields}
    if options.run:
        if overrides or options.preset:
            raise UserError("--run says which config was trained", "leave out the preset and the fields, or --run")
        folder = find_run(options.run, runtime.runs_folder())
        if read_json(folder.config)["workflow"] != workflow.name:
            raise UserError(f"{options.run} is a run of another workflow", f"plan {read_json(folder.config)['workflow']}")
        measurement, price = planning.read_run(folder), None
    else:
        config = workflow.Config.from_preset(options.preset or "full", overrides)
        where = runtime.detect()
        measurement, price = planning.measure(workflow, config, where, options.seconds), where.price_per_hour
        rows = [[f"{p.step:,}", p.stage, f"{1000 * p.seconds:.3g} ms", f"{p.operations:,}"] for p in measurement.parts]
        print(Table(["at step", "stage", "a step takes", "operations"], rows), end="\n\n")
    print(planning.table(measurement, prices, price), end="\n\n")
    for line in planning.assumptions(measurement, prices, prices_file):
        print(line if line.startswith(" ") else f"- {line}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Train: the notebook, headless."""
    if options.spec:
        return _run_spec(options.spec, options.name)
    if not options.name:
        raise UserError("run what?", "`trainbook run NAME` or `trainbook run --spec run.toml`")
    return execute(options.name, options.preset, _overrides(options), options.run_id, _is_authentic(options))


def sweep(options: argparse.Namespace) -> int:
    """Train every combination of some fields' values with every seed, and show what the fields do to the metrics."""
    from trainbook import sweep as sweeping

    fields = _tried_fields(options)
    if "seed" in vars(options) and options.sweep_seeds:
        raise UserError("--seed and --seeds both say the seed", "give one of the two")
    planned = sweeping.plan(
        options.name, options.preset, _overrides(options), fields, options.sweep_seeds, _is_authentic(options), options.sweep_id
    )
    return sweeping.run(planned, options.sweep_metrics)


def tune(options: argparse.Namespace) -> int:
    """Search for the best values of some fields, trial after trial, each an ordinary run; again: goes on."""
    from trainbook.tuning import ConfigurationTuner

    fields = _tried_fields(options)
    tuner = ConfigurationTuner(options.name, options.preset, _overrides(options), _is_authentic(options))
    wanted = (options.tune_trials, options.tune_budget, options.tune_metric, options.tune_best, options.study_id)
    return tuner.tune(fields, *wanted).code


def bundle(options: argparse.Namespace) -> int:
    """Write what a platform needs: a self-contained notebook for kaggle or colab, a folder for vastai or any box with ssh."""
    from trainbook import bundles

    given = {name: value for name, value in vars(options).items() if name in RunSpec.model_fields and name != "workflow"}
    given["authentic"] = _is_authentic(options)
    fields = catalog.load(options.name).Config.model_fields
    overrides = {name: value for name, value in vars(options).items() if name in fields}
    spec = RunSpec(workflow=options.name, overrides=overrides, **given)
    out = Path(options.out)
    if options.platform == "vastai":
        print(bundles.build_box(spec, out / f"{spec.workflow}-vastai"))
        return 0
    notebook = bundles.build_notebook(options.platform, spec)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{spec.workflow}-{options.platform}.ipynb"
    write_atomic(path, notebook)
    print(f"{path} ({len(notebook) / 1000:.0f} kB)")
    return 0


def resume(options: argparse.Namespace) -> int:
    """Continue a run where its newest checkpoint left it."""
    folder = find_run(options.run, runtime.runs_folder())
    saved = read_json(folder.config)
    if folder.run_json.exists() and folder.summary()["status"] == "complete":
        if options.step is not None:
            raise UserError(f"{folder.path.name} is complete", "start a new run from its weights with --initial-weights")
        print(f"{folder.path.name} is complete: {folder.report}")
        return 0
    if options.step is not None:
        runtime.detect()  # a device that does not work is said before anything is changed
        go_back(folder, options.step)
    runtime.export(runs=str(folder.path.parent))
    return execute(saved["workflow"], saved["preset"], saved["config"], folder.path.name, saved["authentic"])


def go_back(folder: RunFolder, step: int) -> None:
    """Let the run continue from an earlier checkpoint of its own."""
    from trainbook.checkpoints import checkpoint_steps, read_checkpoint, set_aside_after

    if (process := folder.training_process()) is not None:
        raise UserError(f"process {process} is training in {folder.path}", "wait for it or stop it first")
    if step not in (steps := checkpoint_steps(folder.checkpoints)):
        raise UserError(f"there is no checkpoint of step {step}", f"choose one of: {', '.join(map(str, steps)) or 'none'}")
    try:
        read_checkpoint(folder.checkpoints / f"{step:010d}")
    except ValueError as error:
        raise UserError(f"checkpoint {error}", "choose another of: " + ", ".join(map(str, steps))) from None
    set_aside_after(folder.checkpoints, step)


def verify(options: argparse.Namespace) -> int:
    """Recompute a run's metrics from its checkpoint and check every checksum."""
    from trainbook.verification import verify_run

    findings = verify_run(find_run(options.run, runtime.runs_folder()))
    print(Table(["check", "recorded", "found", ""], [finding.row() for finding in findings]))
    good = all(finding.well for finding in findings)
    print("verified: the run is what it says" if good else "NOT verified: see the rows marked DIFFERS")
    return 0 if good else EXIT_CODES["failed"]


def write_report(options: argparse.Namespace) -> int:
    """Write report.html anew."""
    folder = find_run(options.run, runtime.runs_folder())
    report.write(folder)
    print(folder.report)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Several runs side by side: where their configs differ, metrics with intervals over seeds, verdicts, curves in a page."""
    from trainbook import run_comparison

    found = run_comparison.columns([find_run(name, runtime.runs_folder()) for name in options.folders])
    print(run_comparison.table(found))
    if (differences := run_comparison.differences(found)) is not None:
        print(f"\n{differences}")
    run_comparison.write_page(found, options.out)
    print(f"\npage    {options.out.absolute()}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Is this machine fit to train, and what to do if not."""
    from trainbook.doctor import examine

    findings = examine()
    print(Table(["check", "found", "", "what to do"], [finding.row() for finding in findings]))
    return 0 if all(finding.well for finding in findings) else EXIT_CODES["failed"]


def _run_spec(path: Path, name: str | None) -> int:
    """Run what a run.toml says, with the notebook that lies beside it if there is one (a box has no source tree).

    A complete run is left alone, so that whatever starts again after a restart may call this again.
    """
    if name:
        raise UserError(f"{path} says what to run, and so does {name}", "give one of the two")
    spec = RunSpec.read(path).named()
    runtime.export(**spec.settings())
    folder = RunFolder(runtime.runs_folder() / spec.run_id)
    if folder.run_json.exists() and folder.summary()["status"] == "complete":
        folder.check(identity(spec.workflow, spec.preset, spec.config(), spec.authentic))
        print(f"{spec.run_id} is complete: {folder.report}")
        return 0
    beside = path.absolute().parent / f"{spec.workflow}.ipynb"
    return execute(spec.workflow, spec.preset, spec.overrides, spec.run_id, spec.authentic, beside if beside.is_file() else None)


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The config fields that the command line gives, on top of its brief's, whose settings are exported."""
    config = catalog.load(options.name).Config
    overrides = {name: value for name, value in vars(options).items() if name in config.model_fields}
    if options.config is None:
        return overrides
    from trainbook.brief import read_brief

    brief = read_brief(options.config, options.name, config)
    runtime.export(**{name: value for name, value in brief.settings.items() if getattr(options, name) is None})
    return brief.overrides | overrides


def _tried_fields(options: argparse.Namespace) -> dict[str, list[str]]:
    """What --field says, of fields that no option says too."""
    from trainbook.sweep import read_fields

    fields = read_fields(options.sweep_fields)
    if twice := sorted(fields.keys() & vars(options).keys() & catalog.load(options.name).Config.model_fields.keys()):
        raise UserError(f"{', '.join(twice)} is given as an option and with --field", "give one of the two")
    return fields


def _workflows() -> list[catalog.Workflow]:
    return [catalog.load(name) for name in catalog.names()]


def _export(options: argparse.Namespace) -> None:
    """Hand the runtime's options to this process and the kernels it starts."""
    given = {name: getattr(options, name, None) for name in runtime.SETTINGS}
    for name in ("time_budget", "checkpoint_every"):
        if given[name]:
            runtime.parse_duration(given[name])
    if given["memory_limit"]:
        runtime.parse_bytes(given["memory_limit"])
    runtime.export(**given)


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


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainbook", description="Train a workflow's notebook here, headless, and read what it measured."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any, name: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False)
        added.set_defaults(command=function)
        return added

    command(list_workflows, "list")
    show_parser = command(show, "show")
    show_parser.add_argument("name")
    show_parser.add_argument("--preset", default=DEFAULT_PRESET)
    plan_parser = command(plan, "plan")
    planned = plan_parser.add_subparsers(required=True, metavar="NAME", dest="name")
    if arguments[:1] == ["plan"]:
        for workflow in _workflows():
            one = planned.add_parser(workflow.name, help=workflow.title, allow_abbrev=False)
            one.add_argument("--preset", default="", help=f"one of {', '.join(workflow.Config.PRESETS)} (default full)")
            one.add_argument("--run", default="", help="read what this run took, instead of measuring here")
            one.add_argument("--prices", type=Path, help="a table like the kit's prices.toml, instead of it")
            one.add_argument("--seconds", type=float, default=6.0, help="how long to take steps for (default 6)")
            one.add_argument("--device", help="auto, cpu, cuda or cuda:INDEX")
            _add_fields(one, workflow.Config.model_fields)
    run_parser = command(run, "run")
    run_parser.add_argument("--spec", type=Path, help="run what this run.toml says, instead of NAME and its options")
    names = run_parser.add_subparsers(metavar="NAME", dest="name")
    if arguments[:1] == ["run"]:
        for workflow in _workflows():
            one = names.add_parser(workflow.name, help=workflow.title, allow_abbrev=False)
            one.add_argument(
                "--run-id", default="", help="name of the run folder; an existing one of the same config is continued"
            )
            _add_run(one, workflow)
    sweep_parser = command(sweep, "sweep")
    swept = sweep_parser.add_subparsers(required=True, metavar="NAME", dest="name")
    if arguments[:1] == ["sweep"]:
        for workflow in _workflows():
            one = swept.add_parser(workflow.name, help=workflow.title, allow_abbrev=False)
            _add_sweep(one)
            _add_run(one, workflow)
    tune_parser = command(tune, "tune")
    tuned = tune_parser.add_subparsers(required=True, metavar="NAME", dest="name")
    if arguments[:1] == ["tune"]:
        for workflow in _workflows():
            one = tuned.add_parser(workflow.name, help=workflow.title, allow_abbrev=False)
            _add_tune(one)
            _add_run(one, workflow)
    bundle_parser = command(bundle, "bundle")
    bundle_parser.add_argument("platform", choices=PLATFORMS)
    bundled = bundle_parser.add_subparsers(required=True, metavar="NAME", dest="name")
    if arguments[:1] == ["bundle"]:
        for workflow in _workflows():
            one = bundled.add_parser(workflow.name, help=workflow.title, allow_abbrev=False)
            one.add_argument("--out", default="dist", help="folder to write to (default dist)")
            _add_authentic(one)
            elsewhere = ("workflow", "overrides", "authentic")
            _add_fields(one, {name: field for name, field in RunSpec.model_fields.items() if name not in elsewhere})
            _add_fields(one, workflow.Config.model_fields)
    for function, name in ((resume, "resume"), (verify, "verify"), (write_report, "report")):
        one = command(function, name)
        one.add_argument("run", help="run id, or path of the run folder")
        if name != "report":
            _add_runtime(one)
        if name == "resume":
            one.add_argument("--step", type=int, help="go back to the checkpoint of this step; later ones are set aside")
            _add_processes(one)
    compare_parser = command(compare, "compare")
    compare_parser.add_argument("folders", nargs="+", metavar="RUN", help="run ids, or paths of run folders")
    compare_parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page to write (default compare.html)"
    )
    _add_runtime(command(doctor, "doctor"))
    return parser


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


def _is_authentic(options: argparse.Namespace) -> bool:
    """What --authentic says; it trains the same either way, but who says false wants no more than to try it out."""
    preset = getattr(options, "preset", DEFAULT_PRESET)
    if options.authentic is False and preset != "smoke":
        raise UserError(
            f"--authentic false is for smoke runs, not for preset {preset}",
            "use --preset smoke; or leave the option out: nothing is refused then, and all outputs say that nothing was checked",
        )
    return bool(options.authentic)


def _add_run(parser: argparse.ArgumentParser, workflow: catalog.Workflow) -> None:
    """What a run can be told."""
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


def _add_sweep(parser: argparse.ArgumentParser) -> None:
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


def _add_tune(parser: argparse.ArgumentParser) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
