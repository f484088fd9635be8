"""The command `kt-hf`. Help and `list` read metadata alone; what a subcommand needs is imported when it is run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from kt_hf import __version__

DESCRIPTION = "Knowledge transfer between models on the Hugging Face stack."
EPILOG = "`kt-hf COMMAND --help` shows a command's options."


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the subcommands by name. The options of `run` are those of a recipe file."""
    p = argparse.ArgumentParser(prog="kt-hf", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    p.add_argument("--version", action="version", version=f"kt_hf {__version__}")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        found.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        return found

    add("run", "run a recipe from YAML, with overrides key=value")
    one = add("list", "list tasks, strategies, merges and ensembles, and where each comes from")
    one.add_argument("--check", action="store_true", help="import each in a process of its own and say what is wrong")
    one = add("show", "what a plugin does, its settings with defaults, its paper, what it composes with")
    one.add_argument("name", help="name of a plugin, or kind:name")
    one = add("new-plugin", "write an installable package with a working strategy and its test")
    one.add_argument("name", help="name of the strategy, such as my-strategy")
    one.add_argument("--dir", default=".", help="where the package's folder is made; default: here")
    one = add("check-plugin", "try a registered plugin on tiny models against every rule of its kind")
    one.add_argument("name", help="name of a plugin, or kind:name")
    one.add_argument("settings", nargs="*", metavar="key=value", help="settings in place of its defaults")
    one.add_argument("--task", help="what a strategy is tried on; default: the first task that it does not refuse")
    one.add_argument("--thorough", action="store_true", help="also rules that start further processes")
    one = add("report", "show the report of a run, or compare several")
    one.add_argument("folders", nargs="+", metavar="OUT", help="output folder of a run")
    one.add_argument("--html", metavar="FILE", help="also write a page")
    one = add("predict", "predict with a model or an ensemble")
    one.add_argument("model", metavar="MODEL", help="folder or Hub id")
    one.add_argument("inputs", nargs="+", metavar="INPUT", help="a text, an image file, a data file or a folder")
    one.add_argument("--task", help="default: as the model's files say")
    one.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the data or the task, such as data.columns.text=sentence; default: as in training",
    )
    one.add_argument("--labels", metavar="A,B,...", help="class names, for models that are told what to look for")
    one.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="of a data folder; default: test, else the last there is",
    )
    one.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="for text generation; default: 64")
    one.add_argument("--output", metavar="FILE", help="write .parquet, .jsonl or .csv instead of a table")
    one = add("evaluate", "measure a model or an ensemble on labelled data")
    one.add_argument("model", metavar="MODEL", help="folder or Hub id")
    one.add_argument("data", metavar="DATA", help="folder, file, Hub id or `digits`")
    one.add_argument(
        "settings", nargs="*", metavar="data.KEY=VALUE", help="settings of the data, such as data.columns.text=sentence"
    )
    one.add_argument("--task", help="default: as the model's files say")
    one.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    one = add("merge", "merge models in weight space, without a recipe")
    one.add_argument(
        "method", nargs="?", metavar="METHOD", help="name of a merge, such as uniform_soup; see `kt-hf list`"
    )
    one.add_argument("settings", nargs="*", metavar="key=value", help="settings of the method; see `kt-hf show METHOD`")
    one.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="folders or Hub ids")
    one.add_argument("--config", metavar="FILE", help="a merge as mergekit's YAML describes it, in place of all that")
    one.add_argument("--base", metavar="MODEL", help="what they were fine-tuned from, for methods that ask for it")
    one.add_argument("--head", metavar="MODEL", help="where heads differ: the model whose head is kept, or 'all'")
    one.add_argument("--output", required=True, metavar="DIR", help="a folder that does not exist yet")
    one.add_argument("--no-check", action="store_true", help="do not load the result and try it")
    one.add_argument("--dry-run", action="store_true", help="check and compare layer by layer, write nothing")
    one.add_argument("--dtype", metavar="DTYPE", help="of the result, such as bfloat16; default: the first model's")
    one.add_argument("--compute", metavar="DTYPE", help="float32 (default) or float64")
    one.add_argument(
        "--vocabulary",
        metavar="POLICY",
        help="where tokenizers differ: union, first, base or one of the models; default: equal, they may not",
    )
    one.add_argument(
        "--new-rows",
        metavar="HOW",
        help="for tokens that a model has not: average (default) or copy, the first there is",
    )
    one.add_argument("--max-shard-size", metavar="SIZE", help="of a file, such as 5GB; default: as the first model")
    one.add_argument("--threads", type=int, metavar="N", help="default: as many as torch uses; the result is the same")
    one.add_argument("--fold", action="store_true", help="adapters are folded into their bases, and give a full model")
    only = one.add_argument_group("of adapters alone, which give an adapter")
    only.add_argument("--rank", type=int, metavar="N", help="of each module at most; default: the sum of their ranks")
    only.add_argument("--error", type=float, metavar="E", help="relative error that each module may have, such as 0.05")
    only.add_argument(
        "--combine", metavar="WAY", help="`changes` (default) or `factors`: A and B apart, as peft's linear"
    )
    only.add_argument("--in-full", metavar="WAY", help="heads and biases: by the `method` (default), `mean` or `first`")
    one = add("extract-lora", "make an adapter out of what a model has learnt since its base")
    one.add_argument("model", metavar="MODEL", help="folder or Hub id of the fine-tuned model")
    one.add_argument("--base", required=True, metavar="MODEL", help="what it was fine-tuned from")
    one.add_argument("--rank", type=int, metavar="N", help="of each module at most")
    one.add_argument("--error", type=float, metavar="E", help="relative error that each module may have, such as 0.05")
    one.add_argument("--output", required=True, metavar="DIR", help="a folder that does not exist yet")
    one.add_argument("--only-low-rank", action="store_true", help="leave out changed biases and norms, all but a head")
    one.add_argument("--dtype", metavar="DTYPE", help="of the adapter, such as bfloat16; default: the model's")
    one.add_argument("--threads", type=int, metavar="N", help="default: as many as torch uses")
    one = add("push", "publish a stage's model to the Hub")
    one.add_argument("folder", metavar="STAGE_DIR", help="a stage's folder, or its model/ folder")
    one.add_argument("repo", metavar="REPO", help="NAME or OWNER/NAME")
    one.add_argument("--private", action="store_true", help="make a new repository private")
    one.add_argument("--revision", metavar="BRANCH", help="default: main")
    one.add_argument("--token-file", metavar="FILE", help="file with the token; default: HF_TOKEN or the stored login")
    return p, commands.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and exit with its code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given[:1] == ["run"]:
            run(given[1:])
            code = 0
        else:
            code = _guarded(_parse(given))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `kt-hf list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    return code


def _parse(given: list[str]) -> argparse.Namespace:
    p, commands = parsers()
    if given and given[0] in ("evaluate", "check-plugin", "merge"):  # options may stand between their settings
        return commands[given[0]].parse_intermixed_args(given[1:], argparse.Namespace(command=given[0]))
    return p.parse_args(given)


def _guarded(options: argparse.Namespace) -> int:
    """Run a command; a failure is one line of cause, one of remedy and an exit code."""
    try:
        return COMMANDS[options.command](options) or 0
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            raise
        from kt_hf import failing

        failing.fail(error, None)


# --- run -------------------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> None:
    """`kt-hf run RECIPE.yaml key=value ...`: as the recipe file would, from YAML."""
    from pathlib import Path

    from kt_hf import failing, launch
    from kt_hf import recipe as grammar
    from kt_hf.errors import KtError

    p = launch.parser("kt-hf run")
    p.usage = "kt-hf run RECIPE.yaml [key=value ...] [options]"
    options = p.parse_intermixed_args(argv)
    if not options.settings:
        p.error("name a recipe: kt-hf run RECIPE.yaml")
    path = Path(options.settings.pop(0))
    try:
        recipe = grammar.from_yaml(str(path))
    except KtError as error:
        if options.debug:
            raise
        failing.fail(error, None)
    # `recipe.yaml` is what a run leaves in its output folder, which then has the name.
    launch.execute(recipe, options, path.resolve().parent.name if path.stem == "recipe" else path.stem)


# --- plugins ---------------------------------------------------------------------------------------------------------


def list_plugins(options: argparse.Namespace) -> int:
    from kt_hf import registry

    found = [*registry.entries().values(), *registry.shadowed()]
    problems: dict[Any, str] = {}
    if options.check:
        from kt_hf.probing import probe

        problems = probe([e for e in found if not e.problem])
    width = max((len(e.name) for e in found), default=0)
    for kind in registry.KINDS:
        print(f"{kind}:")
        for entry in sorted((e for e in found if e.kind == kind), key=lambda e: e.name):
            problem = entry.problem or problems.get(entry, "")
            state = f"  UNAVAILABLE: {problem}" if problem else "  ok" if options.check else ""
            print(f"  {entry.name:{width}}  {entry.distribution}{state}")
    return 1 if any(problems.values()) else 0


def show(options: argparse.Namespace) -> int:
    from kt_hf import describing

    entries = _named(options.name)
    print("\n\n".join(describing.describe(entry) for entry in entries))
    return 0


def _named(name: str) -> list[Any]:
    """The plugins of that name, of whichever kind; `kind:name` for one of them."""
    from kt_hf import registry
    from kt_hf.errors import RecipeError, nearest

    kind, _, rest = name.rpartition(":")
    found = [e for (k, n), e in registry.entries().items() if n == rest and kind in ("", k)]
    if not found:
        raise RecipeError(f"there is no plugin called '{name}'", nearest(rest, {n for _, n in registry.entries()}))
    return found


def new_plugin(options: argparse.Namespace) -> int:
    from kt_hf import scaffold

    folder = scaffold.write(options.name, options.dir)
    print(f"wrote {folder}\nnext: pip install -e {folder} && kt-hf check-plugin {options.name}")
    return 0


def check_plugin(options: argparse.Namespace) -> int:
    from kt_hf import testing
    from kt_hf.errors import Collector, RecipeError
    from kt_hf.recipe import parse_override
    from kt_hf.runner import quiet_libraries

    quiet_libraries()
    collect, given = Collector(), {}
    for text in options.settings:
        with collect():
            path, value = parse_override(text)
            given[".".join(path)] = value
    collect.raise_if_any()
    entries = _named(options.name)
    if len(entries) > 1:
        raise RecipeError(
            f"several plugins are called '{options.name}'",
            f"say which: {', '.join(f'{e.kind}:{e.name}' for e in entries)}",
        )
    entry = entries[0]
    found = testing.examine(entry.kind, entry.name, task=options.task, thorough=options.thorough, **given)
    print(f"{entry.kind} '{entry.name}' of {entry.distribution}")
    for finding in found:
        print(f"  {finding}")
    broken = [f.rule for f in found if f.passed is False]
    print(f"{len(broken)} of {len(found)} rules broken{': ' if broken else ''}{', '.join(broken)}")
    return 1 if broken else 0


# --- results ---------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace) -> int:
    from kt_hf import report as pages

    print(pages.show(options.folders))
    if options.html:
        reports = [pages.load(folder) for folder in options.folders]
        if len(reports) == 1:
            pages.write_html(reports[0], options.html)
        else:
            pages.compare_html(reports, options.html, options.folders)
    return 0


def predict(options: argparse.Namespace) -> int:
    from kt_hf import inference

    labels = [label.strip() for label in options.labels.split(",")] if options.labels else None
    table = inference.predict(
        options.model,
        options.inputs,
        task=options.task,
        labels=labels,
        split=options.split,
        max_new_tokens=options.max_new_tokens,
        settings=options.settings,
    )
    if options.output:
        inference.write(table, options.output)
        print(f"wrote {options.output} ({inference.length(table)} rows)")
    else:
        print(inference.text(table))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from kt_hf import inference

    found = inference.evaluate(options.model, options.data, options.settings, task=options.task)
    print(inference.figures(found))
    if options.output:
        inference.write_json(found, options.output)
    return 0


def merge(options: argparse.Namespace) -> int:
    from kt_hf import merge_command
    from kt_hf.errors import RecipeError
    from kt_hf.launch import set_up_logging

    set_up_logging(options.debug)
    if options.config is not None:
        print(_merge_as_described(options))
        return 0
    if options.method is None or not options.models:
        raise RecipeError(
            f"{'no method' if options.method is None else 'no models'} to merge",
            "kt-hf merge METHOD --models A B --output DIR, or kt-hf merge --config FILE.yml --output DIR",
        )
    models, given = merge_command.separate([*options.models, *options.settings])
    print(
        merge_command.merge(
            options.method,
            models,
            options.output,
            base=options.base,
            head=options.head,
            dry_run=options.dry_run,
            check=not options.no_check,
            given=given,
            dtype=options.dtype,
            compute=options.compute or "float32",
            max_shard_size=options.max_shard_size,
            threads=options.threads,
            vocabulary=options.vocabulary or "equal",
            new_rows=options.new_rows or "average",
            fold=options.fold,
            **{k: v for k in ("rank", "error", "combine", "in_full") if (v := getattr(options, k)) is not None},
        )
    )
    return 0


def extract_lora(options: argparse.Namespace) -> int:
    from kt_hf import merge_command
    from kt_hf.launch import set_up_logging

    set_up_logging(options.debug)
    print(
        merge_command.extract_lora(
            options.model,
            options.base,
            options.output,
            rank=options.rank,
            error=options.error,
            only_low_rank=options.only_low_rank,
            dtype=options.dtype,
            threads=options.threads,
        )
    )
    return 0


def _merge_as_described(options: argparse.Namespace) -> str:
    from kt_hf import mergekit_merge
    from kt_hf.errors import RecipeError

    said = {"METHOD": options.method, "--models": options.models, "key=value": options.settings}
    elsewhere = (
        "base",
        "head",
        "dtype",
        "vocabulary",
        "new_rows",
        "fold",
        "rank",
        "error",
        "combine",
        "in_full",
    )
    said |= {f"--{key.replace('_', '-')}": getattr(options, key) for key in elsewhere}
    if odd := [key for key, value in said.items() if value]:
        raise RecipeError(f"{' and '.join(odd)} beside --config", "write it in that file, or leave --config out")
    return mergekit_merge.merge(
        options.config,
        options.output,
        compute=options.compute,
        max_shard_size=options.max_shard_size,
        threads=options.threads,
        check=not options.no_check,
        dry_run=options.dry_run,
    )


def push(options: argparse.Namespace) -> int:
    from pathlib import Path

    from kt_hf import hub
    from kt_hf.errors import RecipeError

    token = None
    if options.token_file:
        try:
            token = Path(options.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"cannot read the token file '{options.token_file}': {type(error).__name__}",
                "name a text file that holds the token alone",
            ) from error
        if not token:
            raise RecipeError(
                f"the token file '{options.token_file}' is empty", "name a text file that holds the token alone"
            )
    commit = hub.push(options.folder, options.repo, revision=options.revision, private=options.private, token=token)
    print(commit.url if commit.created else f"{commit.url} (nothing had changed)")
    return 0


COMMANDS = {
    "list": list_plugins,
    "show": show,
    "new-plugin": new_plugin,
    "check-plugin": check_plugin,
    "report": report,
    "predict": predict,
    "evaluate": evaluate,
    "merge": merge,
    "extract-lora": extract_lora,
    "push": push,
}

if __name__ == "__main__":
    sys.exit(main())
