"""The command ``tell``: its verbs, and how errors are reported."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tell import __version__
from tell.cli import add_command as add
from tell.cli import anchor_command as anchor
from tell.cli import build_command as build
from tell.cli import chat_command as chat
from tell.cli import demo_command as demo
from tell.cli import eval_command as eval
from tell.cli import export_command as export
from tell.cli import gate_command as gate
from tell.cli import general_command as general
from tell.cli import look_command as look
from tell.cli import plan_command as plan
from tell.cli import report_command as report
from tell.cli import separate_command as separate
from tell.cli import serve_command as serve
from tell.cli import study_command as study
from tell.cli import tune_command as tune
from tell.cli import ui_command as ui
from tell.errors import TellError, did_you_mean, is_panic
from tell.shown import one_line
from tell.train.launch import refuse_several

# The base of all usage errors; some versions of typer vendor click, others depend on it.
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _Verbs(TyperGroup):
    """A group of verbs that suggests the nearest one."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            path = ctx.command_path
            nearest = did_you_mean(name, self.commands)
            remedy = f"`{path} --help` lists the verbs."
            if not nearest and (Path(name).suffix or "/" in name):
                remedy = f"Did you mean `tell tune {name}`?"
            raise TellError(f"unknown verb {name!r}", remedy=remedy, nearest=nearest)
        return super().resolve_command(ctx, args)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tell {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="tell",
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _tell(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    """Fine-tune a language model well when there are only 15 to 1,000 examples of a task.

    Start with `tell demo`, or `tell tune YOUR_FILE`.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    elif ctx.invoked_subcommand != "tune":
        refuse_several(ctx.invoked_subcommand)


_build = typer.Typer(cls=_Verbs, help=(build.__doc__ or "").partition("\n")[0])
_build.callback()(build.group)
_build.command("halu-cot-json")(build.halu_cot_json)
_build.command("is-en-news")(build.is_en_news)
for _name, _verb in (
    ("tune", tune.tune),
    ("plan", plan.plan),
    ("look", look.look),
    ("eval", eval.evaluate),
    ("chat", chat.chat),
    ("export", export.export),
    ("serve", serve.serve),
    ("ui", ui.ui),
    ("report", report.report),
    ("gate", gate.gate),
    ("add", add.add),
    ("general", general.general),
    ("anchor", anchor.anchor),
    ("separate", separate.separate),
    ("study", study.study),
    ("demo", demo.demo),
):
    app.command(_name)(_verb)
app.add_typer(_build, name="build")


def run(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return the exit code; errors go to stderr."""
    arguments, debug = _take_debug(list(argv))
    # Our own bars show loading and training; the libraries' would break their lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # we never fork after tokenising
    try:
        _check_arguments(arguments)
        command: Any = typer.main.get_command(app)
        command.rich_markup_mode = None  # `tell --help` in plain text: rich would double the time to answer
        code = command.main(arguments, prog_name="tell", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # newer typer turns Ctrl-C into this
            return _fail("interrupted", 130)
        return code if isinstance(code, int) else 0
    except TellError as error:
        return _fail(str(error), error.exit_code)
    except _ClickException as error:
        return _fail(_usage(error, arguments), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `tell plan --json | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        if debug:
            import traceback

            traceback.print_exc()
        known = _known(error)
        return _fail(known or _unexpected(error, debug), 2 if known else 1)


def main() -> None:
    """Entry point of the command ``tell``."""
    if not _take_debug(sys.argv[1:])[1]:
        warnings.simplefilter("ignore", FutureWarning)  # warnings of libraries are for developers, not users
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # e.g. unpaired surrogates in answers
    sys.exit(run(sys.argv[1:]))


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Remove ``--debug``, which may be anywhere before ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    head = [argument for argument in argv[:end] if argument != "--debug"]
    asked = len(head) < end or os.environ.get("TELL_DEBUG", "") not in ("", "0")
    return [*head, *argv[end:]], asked


def _fail(message: str, code: int) -> int:
    label = "\x1b[1;31merror:\x1b[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "error:"
    print(label, one_line(message), file=sys.stderr)
    return code


def _usage(error: Any, arguments: list[str]) -> str:
    """Click's usage errors as what, where, remedy."""
    context = getattr(error, "ctx", None)
    verb = next((name for name in arguments if not name.startswith("-")), "")
    path = context.command_path if context else f"tell {verb}".rstrip()
    remedy = f"`{path} --help` lists the flags."
    option = getattr(error, "option_name", None)
    if option and type(error).__name__ == "NoSuchOption":
        known = [name for p in context.command.params for name in (*p.opts, *p.secondary_opts)] if context else []
        known = [name for name in known if name.startswith("--")]
        nearest = did_you_mean(option, known)
        return str(TellError(f"unknown flag {option}", where=path, remedy=remedy, nearest=nearest))
    text = error.format_message().rstrip(".")
    return str(TellError(text[:1].lower() + text[1:], where=path, remedy=remedy))


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that can be neither displayed nor saved.

    Raises:
        TellError: an argument is not UTF-8.
    """
    for text in arguments:
        if any("\ud800" <= char <= "\udfff" for char in text):
            shown = text.encode("utf-8", "replace").decode()
            raise TellError("is not UTF-8", where=f"argument {shown}", remedy="Rename the file, or set a UTF-8 locale.")


def _known(error: BaseException) -> str | None:
    """One line for errors that checks cannot foresee: a full disk, no permission, no memory."""
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        at = str(error.filename) if error.filename else None
        why = (error.strerror or str(error)).lower()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
        remedy = "Free disk space, or choose a folder you can write to with --out." if full else "Check that path."
        return str(TellError(why, where=at, remedy=remedy))
    if isinstance(error, RecursionError):
        return "a file or value is nested too deeply. Make it flatter."
    if is_panic(error):
        return f"the tokenizer crashed ({error}). Fetch the model again, or shorten the row it was given."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory. Lower it with --set train.micro_tokens=1024 --set generate.batch_size=8."
    return None


def _unexpected(error: BaseException, debug: bool) -> str:
    more = "" if debug else "add --debug for the traceback, and "
    return (
        f"unexpected {type(error).__name__}: {error} -- this is a bug in tell {__version__}, not in your input; "
        f"{more}report it with the command you ran and `pip freeze`"
    )


if __name__ == "__main__":
    main()
