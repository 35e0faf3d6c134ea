"""The command line. What scripts may rely on is the JSON and the exit codes.

A verb's file is imported when it is asked for: ``edgepet --help`` needs none of them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgepet import __version__
from edgepet.cli.options import Parser, ends_by_sigterm, flags_of, harmless, spelled
from edgepet.errors import EdgepetError, InputError
from edgepet.reports.streams import forget, json_line, take_any_text, tell

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from edgepet.reports.progress import Progress
    from edgepet.reports.screen import Screen
    from edgepet.verbs.verb import Group, Stream, Verb

DONE, REFUSED, CHECK_SAID_NO, STOPPED = 0, 3, 4, 130  # the other exit codes are those of the errors, and argparse's 2

VERBS: dict[str, tuple[str, str]] = {  # verb -> where its ``Verb`` is, below ``edgepet.verbs``; what it does
    "doctor": ("doctor:VERB", "what is installed, what each missing runtime needs, CPU features"),
    "methods": ("methods:VERB", "every method: paper, and its parameters and kilobytes on a backbone"),
    "sites": ("sites:VERB", "how few numbers each part of a backbone is tuned by, and where a method should go"),
    "text": ("text:VERB", "a table with a vector for each class, of the vectors of words in a package"),
    "train": ("train:VERB", "tune a method on images, fold it to updates, and write a pack"),
    "predict": ("predict:VERB", "what packs and exported models say of images"),
    "eval": ("evaluate:VERB", "top-1 of a pack or an exported model"),
    "merge": ("merge:VERB", "write dense weights that plain timm loads strictly"),
    "export": ("export:VERB", "write models for ONNX Runtime, OpenVINO and TensorRT, each compared before it is kept"),
    "calibrate": ("calibrate:VERB", "what int8 costs a task: every layer, the ranges, and the recipe it would choose"),
    "verify": ("verify:VERB", "check an exported model's files, then the comparison again"),
    "bench": ("bench:VERB", "latency, all candidates in turn in every round"),
    "storage": ("storage:VERB", "bytes of one folder with every task in it, against a full model for every task"),
    "inspect": ("inspect:VERB", "what a pack or an exported model says of itself"),
    "pack": ("pack:VERB", "store a task in fewer bytes, sign it, number it"),
    "keygen": ("pack:KEYGEN", "a key to sign packs with, and its public part, which devices trust"),
    "pretrain": ("pretrain:VERB", "tune a method on a broad data set and keep its tensors, for `train --init`"),
    "import-peft": ("peft:IMPORT_PEFT", "a PEFT adapter folder as a pack, compared with PEFT itself"),
    "export-peft": ("peft:EXPORT_PEFT", "a pack as an adapter folder that PEFT loads on the timm model"),
    "device": ("device_actions:GROUP", "the folder on a device: make it, install tasks, run them, go back, check it"),
    "report": ("report:VERB", "one page of what was measured, with charts, made of result files"),
    "demo": ("demo:VERB", "the whole flow on real data, offline once installed"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    if sys.stderr is None:  # closed by who started us: there is nobody to tell
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  as long as the process lives
    take_any_text()
    given = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in given if not word.startswith("-")), None)
    parser, made = _parsers(name, load(name) if name in VERBS else None)
    options = parser.parse_args(given)
    if options.own not in made:  # argparse has refused all other words
        return DONE
    verb, own = made[options.own]
    try:
        with ends_by_sigterm():
            return _run(verb, options)
    except EdgepetError as error:
        return _refused(str(error), own, error.exit_code)
    except MemoryError:
        return _refused(f"{name}: needs more memory than there is\n  fix: ask for less", own, REFUSED)
    except KeyboardInterrupt as stopped:
        return _refused(f"interrupted: {stopped}" if str(stopped) else "interrupted", own, STOPPED)


def _refused(message: str, parser: ArgumentParser, code: int) -> int:
    """Say it, with flags for fields; names from outside must not steer the terminal."""
    tell(f"{harmless(spelled(message, flags_of(parser)))}\n")
    return code


def load(name: str) -> Verb | Group:
    """The verb of this name, one of ``VERBS``."""
    module, _, attribute = VERBS[name][0].partition(":")
    verb: Verb | Group = getattr(importlib.import_module(f"edgepet.verbs.{module}"), attribute)
    return verb


def _run(verb: Verb, options: Namespace) -> int:
    from edgepet.reports.progress import Progress

    if options.verbose and not options.quiet:
        _say_versions()
    with Progress(quiet=options.quiet, verbose=options.verbose) as progress:
        if verb.stream is not None and verb.stream.asked(options):
            return _stream(verb.stream, options, progress)
        report = verb.run(options, progress)
    if verb.speaks():
        _put_out(verb.screen, report, options)
    return CHECK_SAID_NO if verb.failed(report) else DONE


def _stream(stream: Stream, options: Namespace, progress: Progress) -> int:
    """Answer until nobody asks any more, or nobody listens."""
    failed = False
    for report in stream.run(options, progress):
        failed = stream.failed(report) or failed
        if not _put_out(stream.screen, report, options):
            break
    return REFUSED if failed else DONE


def _put_out(screen: Callable[[Any], Screen], report: object, options: Namespace) -> bool:
    """Write the report to stdout. A reader who has left is told nothing; a full disk is an error.

    Returns:
        Whether somebody still reads.

    Raises:
        InputError: stdout is closed or cannot be written.
    """
    if sys.stdout is None:
        raise InputError("stdout", "is closed", fix="write the report to a file or a pipe")
    try:
        if options.json:
            from edgepet.reports.as_json import to_json

            sys.stdout.write(json_line(to_json(report), sys.stdout.encoding))
        elif not options.quiet:
            from edgepet.reports.screen import show, terminal

            show(terminal(stderr=False), screen(report))
        sys.stdout.flush()
    except BrokenPipeError:
        forget(sys.stdout)
        return False
    except OSError as error:
        forget(sys.stdout)
        raise InputError("stdout", "could not be written", got=error.strerror or str(error)) from error
    return True


def _say_versions() -> None:
    from edgepet.measuring.machine import environment

    here = environment()
    told = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    tell(f"{told}; Python {here.python}; {here.cpu}, {here.cores} cores\n")


def _parsers(
    asked: str | None, verb: Verb | Group | None
) -> tuple[ArgumentParser, dict[str, tuple[Verb, ArgumentParser]]]:
    """The parser of the whole command line, with the options of the verb ``asked``, and that verb with its own.

    Of a group they are its actions. What is parsed has the name of one of them under "own".
    """
    parser = Parser(prog="edgepet", description="One vision backbone and fifty tasks on an edge device.")
    parser.add_argument("--version", action="version", version=f"edgepet {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)
    shared = Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else there")
    shared.add_argument("--quiet", action="store_true", help="no progress and no tables")
    shared.add_argument(
        "-v", "--verbose", action="store_true", help="progress with versions, and every file that is passed over"
    )
    made: dict[str, tuple[Verb, ArgumentParser]] = {}

    def add(under: Any, name: str, told: str, verb: Verb | None) -> None:
        own = under.add_parser(name, help=told, description=told, parents=[shared])
        own.set_defaults(own=name)
        if verb is not None:
            verb.options(own)
            made[name] = verb, own

    for name, (_, told) in VERBS.items():
        if name != asked or not hasattr(verb, "actions"):
            add(verbs, name, told, None if name != asked or verb is None else cast("Verb", verb))
            continue
        group = verbs.add_parser(name, help=told, description=told)
        actions = group.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
        for action, (each, does) in cast("Group", verb).actions.items():
            add(actions, action, does, each)
    return parser, made


if __name__ == "__main__":
    sys.exit(main())
