"""The command line of every script: simple-parsing and an args file, with every complaint one sentence.

`launch(main, DPOFlags)` is the whole of a script's command line: it parses, runs `main(flags)`, and turns a `UserError`
into one line and its exit status, 2 as a rule.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from simple_parsing import ArgumentParser, DashVariant

from rlhf.errors import LAST_WORDS, UserError, leave
from rlhf.flag_values import check_kinds, check_texts, closest, item_kind, shown, wanted
from rlhf.paths import check_path
from rlhf.untrusted import LARGEST_JSON

Flags = TypeVar("Flags")

PATHS = (
    *("data_dir", "experiment_dir", "model_name", "sft_experiment_dir", "rm_experiment_dir", "reference", "output"),
    *("destination_dir", "tokenizer_name", "dataset_path"),
)
"""Flags that may be paths of this machine."""


def parse(flags_class: type[Flags], argv: Sequence[str] | None = None) -> Flags:
    """Read `flags_class` from the command line (default `sys.argv[1:]`).

    `--args_file args.json` supplies values first (the `args.json` of an experiment repeats its run); flags on the
    command line override it. Booleans take a value (`--shuffle=False`); dashes and underscores both work.

    A run's own args.json says what was run, not where: its repeat gets a folder of its own, and `--resume=True`
    beside it goes on in the folder in which the file lies. A file that stands elsewhere is taken word for word.

    Raises:
        UserError: an unknown flag, one that is missing, or a value that its flag can't have; an args file that can't be
            read, or holds a key that is no flag of this script.
        SystemExit: status 0, after `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        description=_description(flags_class),
        add_option_string_dash_variants=DashVariant.UNDERSCORE_AND_DASH,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        add_config_path_arg=False,
    )
    args_file = _args_file(argv) if "args_file" in {field.name for field in dataclasses.fields(flags_class)} else None
    default = None if args_file is None else _from_args_file(flags_class, args_file, argv)
    parser.add_arguments(flags_class, dest="flags", default=default)
    parser._preprocessing(args=argv)  # simple-parsing adds the actions late; grouping needs them now
    parser.know(flags_class)
    _group_actions(parser, flags_class)
    found, rest = parser.parse_known_args(argv)
    if rest:
        raise parser.unknown(rest[0])
    flags = found.flags
    check_texts(flags)
    for name in PATHS:
        for path in _items(getattr(flags, name, None)):
            check_path(path, name)
    if args_file is not None and _is_of_a_run(args_file) and flags.resume and flags.experiment_dir is None:
        flags.experiment_dir = str(args_file.parent)
    return flags


def launch(main: Callable[[Flags], Any], flags_class: type[Flags]) -> None:
    """Run a script: parse its flags, call `main`, and end with one sentence and its status on a `UserError`.

    Ctrl-C, where the script doesn't listen to it itself, ends with status 130 and a word in the place of a traceback.
    """
    try:
        main(parse(flags_class))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        for tell in LAST_WORDS:
            tell(str(error))
        leave(error.status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        leave(130)
    distributed = getattr(sys.modules.get("torch"), "distributed", None)  # not loaded for a mistake in the flags
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # and with it its threads, which must not outlive the interpreter


def _description(flags_class: type) -> str:
    module = sys.modules.get(flags_class.__module__)
    return ((module and module.__doc__) or flags_class.__doc__ or "").strip()


class _Parser(ArgumentParser):
    """argparse, whose complaints are one sentence that names the flag and what would be right."""

    kinds: dict[str, Any]
    """Annotation of each flag."""

    def know(self, flags_class: type) -> None:
        """Take note of the flags; each but a boolean needs a value, a list at least one."""
        hints = get_type_hints(flags_class)
        self.kinds = {field.name: hints[field.name] for field in dataclasses.fields(flags_class)}
        for action in self._actions:
            kind = self.kinds.get(_name(action))
            if kind is not None and item_kind(kind) is not bool:
                action.nargs = {"?": None, "*": "+"}.get(action.nargs, action.nargs)

    def unknown(self, argument: str) -> UserError:
        """The error for a word of the command line that belongs to no flag."""
        name = argument.partition("=")[0].lstrip("-").replace("-", "_")
        if not argument.startswith("-"):
            return UserError(f"{shown(argument)!r} belongs to no flag; write --flag=value")
        meant = closest(name, self.kinds)
        remedy = f"did you mean --{meant}?" if meant else "see --help for those that there are"
        return UserError(f"--{shown(name)} is no flag of this script; {remedy}")

    def error(self, message: str) -> NoReturn:
        """What argparse itself finds: a required flag that is missing, a flag without its value."""
        options, _, rest = message.rpartition(": ")
        if options == "the following arguments are required":
            missing = [_underscored(names) for names in rest.split(", ")]
            raise UserError(f"{missing[0]} is missing; give it (see --help)")
        name = _underscored(options.removeprefix("argument "))
        raise UserError(f"{name} needs a value; write {name}=VALUE" if "expected" in rest else f"{name}: {rest}")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            raise self._wrong(action, text) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError:
            raise self._wrong(action, value) from None

    def _wrong(self, action: argparse.Action, value: Any) -> UserError:
        name = _name(action)
        if not str(value).strip():
            return UserError(f"--{name} is empty; give it a value, or leave it out")
        return UserError(f"--{name}={shown(value)} must be {wanted(item_kind(self.kinds[name]))}")


def _name(action: argparse.Action) -> str:
    return action.dest.removeprefix("flags.")


def _underscored(options: str) -> str:
    """`--mini_batch_size` of `--mini-batch-size/--mini_batch_size`."""
    return min(options.split("/"), key=lambda option: "-" in option[2:])


def _items(value: Any) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _args_file(argv: list[str]) -> Path | None:
    path = None
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--args_file", "--args-file"):
            path = value if equals else "".join(argv[i + 1 : i + 2])
    if path is None:
        return None
    if not path.strip():
        raise UserError("--args_file is empty; give the args.json of an experiment")
    check_path(path, "args_file")
    return Path(path)


def _is_of_a_run(path: Path) -> bool:
    return path.name == "args.json" and (path.parent / "environment.json").is_file()


def _from_args_file(flags_class: type[Flags], path: Path, argv: list[str]) -> Flags:
    """The flags that a file gives; required ones that it lacks may stand on the command line, which replaces them."""
    values = _json_object(path)
    kinds = {field.name: get_type_hints(flags_class)[field.name] for field in dataclasses.fields(flags_class)}
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        meant = closest(unknown[0], kinds)
        remedy = f"did you mean {meant!r}?" if meant else "remove it"
        raise UserError(f"--args_file {path}: {shown(unknown[0])!r} is not a flag of this script; {remedy}")
    check_kinds(kinds, values, f"--args_file {path}")
    on_the_line = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    for field in dataclasses.fields(flags_class):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            if field.name not in on_the_line:
                raise UserError(f"--args_file {path} lacks {field.name!r}; add it, or give --{field.name}")
            values[field.name] = "on the command line" if kinds[field.name] is str else ["on the command line"]
    if _is_of_a_run(path):
        values = {name: value for name, value in values.items() if name not in ("experiment_dir", "resume")}
    return flags_class(**values)


def _json_object(path: Path) -> dict[str, Any]:
    remedy = "give the args.json of an experiment"
    if not path.is_file():
        what = "is a folder or a device" if path.exists() else "there is no such file"
        raise UserError(f"--args_file {path}: {what}; {remedy}")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise UserError(f"--args_file {path} has more than {LARGEST_JSON >> 20} MB; {remedy}")
        values = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"--args_file {path} can't be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"--args_file {path} is not valid UTF-8; {remedy}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(f"--args_file {path} is not valid JSON ({where}); {remedy}") from None
    except (ValueError, RecursionError):
        why = "it nests too deeply, or holds a number of thousands of digits"
        raise UserError(f"--args_file {path} is not valid JSON ({why}); {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"--args_file {path} holds no JSON object; {remedy}")
    return values


def _group_actions(parser: argparse.ArgumentParser, flags_class: type) -> None:
    """Re-sort the parser's actions into one titled group for each class that declares fields."""
    owner = {}
    for cls in reversed(flags_class.__mro__):
        for name in inspect.get_annotations(cls):
            owner.setdefault(name, cls)
    moved = []
    for group in list(parser._action_groups):
        for action in list(group._group_actions):
            if action.dest.startswith("flags."):
                group._group_actions.remove(action)
                moved.append(action)
    for cls in flags_class.__mro__:
        actions = [action for action in moved if owner.get(action.dest.removeprefix("flags.")) is cls]
        if actions:
            doc = (cls.__doc__ or cls.__name__).strip().split("\n")[0].rstrip(".")
            parser.add_argument_group(doc)._group_actions.extend(actions)
    parser._action_groups = [group for group in parser._action_groups if group._group_actions]


class _HelpFormatter(argparse.HelpFormatter):
    """One flag a line in the usage's place: a usage line with eighty flags helps nobody."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        super().add_usage(usage or "%(prog)s --flag=value ...", actions, groups, prefix)

    def _format_text(self, text: str) -> str:
        return text.strip("\n") + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = min(
            action.option_strings,
            key=lambda option: ("-" in option[2:], not option.startswith("--"), len(option)),
        )
        return ", ".join([name, *[o for o in action.option_strings if _is_alias(o, name)]])

    def _expand_help(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").replace("(default: %(default)s)", "").split())
        if action.choices:
            text += f" One of {', '.join(str(choice) for choice in action.choices)}."
        if action.dest != "help" and action.default not in (None, argparse.SUPPRESS, dataclasses.MISSING):
            text += f" (default: {action.default})"
        return text


def _is_alias(option: str, name: str) -> bool:
    """Whether `option` is a second name of the flag `name`, and neither a dashed spelling nor its --no form."""
    return option.startswith("--") and "-" not in option[2:] and option not in (name, f"--no{name[2:]}")
