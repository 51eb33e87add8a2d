"""The command line: list, show, plan, run, sweep, tune, bundle, resume, verify, report, compare, doctor."""

import argparse
import sys
from pathlib import Path
from typing import Any

from trainbook import catalog, report, runtime
from trainbook.errors import RunFailed, UserError
from trainbook.files import read_json, write_atomic
from trainbook.headless import execute
from trainbook.options import DEFAULT_PRESET, parser_for
from trainbook.records import BAD_INPUT, EXIT_CODES, RunFolder, find_run, identity, measured_times
from trainbook.spec import RunSpec
from trainbook.tables import Table


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 complete, 1 failed, 2 bad input, 3 stopped and resumable."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser_for(arguments, COMMANDS).parse_args(arguments)
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
    rows = [
        [w.name, w.title, ", ".join(w.Config.PRESETS), times.get(w.name, "no complete run yet")]
        for w in map(catalog.load, catalog.names())
    ]
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


def _export(options: argparse.Namespace) -> None:
    """Hand the runtime's options to this process and the kernels it starts."""
    given = {name: getattr(options, name, None) for name in runtime.SETTINGS}
    for name in ("time_budget", "checkpoint_every"):
        if given[name]:
            runtime.parse_duration(given[name])
    if given["memory_limit"]:
        runtime.parse_bytes(given["memory_limit"])
    runtime.export(**given)


def _is_authentic(options: argparse.Namespace) -> bool:
    """What --authentic says; it trains the same either way, but who says false wants no more than to try it out."""
    preset = getattr(options, "preset", DEFAULT_PRESET)
    if options.authentic is False and preset != "smoke":
        raise UserError(
            f"--authentic false is for smoke runs, not for preset {preset}",
            "use --preset smoke; or leave the option out: nothing is refused then, and all outputs say that nothing was checked",
        )
    return bool(options.authentic)


COMMANDS = {
    "list": list_workflows,
    "show": show,
    "plan": plan,
    "run": run,
    "sweep": sweep,
    "tune": tune,
    "bundle": bundle,
    "resume": resume,
    "verify": verify,
    "report": write_report,
    "compare": compare,
    "doctor": doctor,
}


if __name__ == "__main__":
    sys.exit(main())
