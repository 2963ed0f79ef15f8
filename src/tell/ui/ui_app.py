"""The routes of `tell ui`: each reads files of the root, or starts a command and reads what it writes."""

from __future__ import annotations

import hashlib
import re
import shlex
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tell import __version__
from tell.data.form import Form
from tell.data.workbook import split_sheet
from tell.errors import TellError, Unwritable
from tell.exports.serving_files import model_licence
from tell.exports.target import export_targets
from tell.files import expanded, read_facts, read_text, stamps
from tell.folder import RunFolder, reading
from tell.report.compare import compare_kept
from tell.report.look_page import look_parts
from tell.report.page import environment, stylesheet
from tell.report.read_run import get
from tell.run.claim import stop_holder
from tell.run.first_answers import first_answers
from tell.shown import one_line
from tell.ui.chat_relay import COLUMNS, answer, asked_for, free_model, serve_run, served, serving
from tell.ui.choices import Choice, picked, positional
from tell.ui.guard import FRAMED, Guard
from tell.ui.jobs import Job
from tell.ui.run_view import ACTIVE, live, resume, state_of, study_line, summary, tuning
from tell.ui.ui_root import FULL, NotHere, UiRoot

MOST_PROMPT, MOST_PAGE = 1 << 17, 64 << 20  # bytes of a prompt, and of a page of a run folder
STATIC = {"style.css": "text/css", "ui.js": "text/javascript", "htmx.min.js": "text/javascript"}
SORTS = {"name": False, "state": False, "score": True, "loss": False, "seconds": True, "changed": True}  # high first?
Shown = Mapping[str, object]  # what a template prints
AFTER = {"stop": "run", "resume": "run", "load": "chat", "unload": "chat", "export": "ship"}  # an action: what is shown


@cache
def templates() -> Environment:
    """The report's environment, with the page's templates next to its own."""
    loaders = [PackageLoader(f"tell.{room}", "templates") for room in ("ui", "report")]
    made = environment().overlay(loader=ChoiceLoader(loaders))
    made.filters["address"] = lambda name: quote(str(name), safe="/")
    made.filters["key"] = lambda name: hashlib.sha256(str(name).encode("utf-8", "replace")).hexdigest()[:12]
    made.filters["moment"] = lambda stamp: time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp))
    made.globals |= {name[1]: made.get_template(f"{name}.html.j2").module for name in ("_ui", "_macros")}
    return made


def page(request: Request, part: str, title: str, shown: Shown, *, here: str = "", status: int = 200) -> HTMLResponse:
    """A page of one part, or the part alone where htmx asks for it."""
    file = f"_{part}.html.j2"
    whole, folder = not request.headers.get("hx-request"), getattr(request.state, "folder", None)
    known = {"part": file, "title": title, "here": here or part, "whole": whole, "folder": folder}
    made = templates().get_template("base.html.j2" if whole else file)
    text = made.render({**known, "name": "", "run": None, "choice": None, **shown})
    return HTMLResponse(text.encode("utf-8", "replace"), status)


class Pages:
    """The handlers of one root. Those that are no coroutines run in threads."""

    def __init__(self, root: UiRoot) -> None:
        self.root = root

    def _run(self, request: Request) -> tuple[str, RunFolder]:
        """The run that the address names.

        Raises:
            NotHere: there is no such run.
        """
        folder = self.root.run(request.path_params["name"])
        request.state.folder = folder  # for the navigation
        return self.root.name(folder.root), folder

    def runs(self, request: Request) -> Response:
        by = next((name for name in request.query_params.getlist("by") if name in SORTS), "changed")
        names, studies = self.root.find()
        lines = [study_line(self.root, name, set(names)) for name in studies]
        cells = {run for line in lines for run in line["runs"]}
        runs = [summary(self.root, name) for name in names if name not in cells]
        known = sorted((run for run in runs if run[by] is not None), key=lambda run: run[by], reverse=SORTS[by])
        known += [run for run in runs if run[by] is None]
        active = any(run["state"] in ACTIVE for run in runs) or any(line["counts"].get("running") for line in lines)
        shown = {"runs": known, "studies": lines, "by": by, "active": active, "root": self.root}
        return page(request, "runs", "Runs", shown)

    # Data and plan: htmx asks for what a command says.
    def data(self, request: Request) -> Response:
        return self._asked(request, "look", "Data", self._looked)

    def plan(self, request: Request) -> Response:
        return self._asked(request, "plan", "Plan", self._planned)

    def _asked(self, request: Request, verb: str, title: str, answered: Callable[..., Response]) -> Response:
        """What a command says of the data as it is now, asked once for all tabs; its last line until it has ended."""
        choice = Choice.of(request.query_params)
        shown = {"verb": verb, "choice": choice, "uploaded": self.root.uploaded()}
        named = [name for name in ("data", "test", "schema", "general", "model") if choice[name]]
        of = {name: stamps(self.root.path / expanded(split_sheet(choice[name])[0])) for name in named}
        job = Job(self.root, f"{verb} {__version__} {choice.command(verb)}", "questions")
        if request.headers.get("hx-request"):
            if (told := job.told(choice.command(verb, "--json"), of=str(of))) is not None:
                return answered(request, choice, *told)
            return page(request, "busy", "", {**shown, "log": job.lines(1)})
        found = read_facts(job.file(".out"))
        hub = not all(of[name][0][1] for name in ("data", "test", "schema") if name in of)  # or it is not here
        if verb != "look" or hub or get(found.get("look") or found, "model", "name") is None:
            job.forget()  # a page that is loaded asks again, but for a look that found all
        return page(request, title.lower(), title, shown, here="data")

    def _looked(self, request: Request, choice: Choice, found: dict[str, Any], error: str) -> Response:
        guess, others = not (choice["columns"] or choice["prompt"] or choice["answer"]), list[tuple[str, Choice]]()
        if error and found.get("look"):  # by the likeliest of several forms
            readings = [(f.name, Choice({**choice.values, **f.typed})) for f in map(Form.of, found["forms"])]
            found, error, choice, others, guess = found["look"], "", readings[0][1], readings[1:], True
        shown = {"choice": choice, "error": error, "command": _typed(choice.command("look")), "guess": guess}
        shown["book"] = split_sheet(choice["data"])[0]
        more = {"facts": None} if error else look_parts(found)
        return page(request, "look", "Data", {**shown, "others": others, **picked(found.get("data", found)), **more})

    def _planned(self, request: Request, choice: Choice, plan: dict[str, Any], error: str) -> Response:
        model, out = {} if error else plan["model"], self.root.fresh_run(choice["data"])
        shown = {"choice": choice, "plan": plan, "error": error, "out": out, "root": self.root}
        shown |= {"licence": model_licence(model["origin"], Path(model["path"])) if model else None}
        return page(request, "planned", "Plan", {**shown, "command": _typed(choice.command("tune", out=out))})

    async def upload(self, request: Request) -> Response:
        return JSONResponse({"path": await self.root.receive(request.path_params["name"], request.stream())}, 201)

    def start(self, request: Request) -> Response:
        choice = Choice.of(request.query_params)
        out = choice["out"] if re.fullmatch(r"runs/\w[\w.-]*", choice["out"]) else self.root.fresh_run(choice["data"])
        if tuning(self.root, out).process() is None:  # else it was started by another click
            out = self.root.fresh_run(choice["data"]) if (self.root.path / out).exists() else out
            tuning(self.root, out).start(choice.command("tune", out=out))
        return RedirectResponse(f"/run/{quote(out)}", 303)

    # One run
    def run(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not tuning(self.root, name).command:  # else it may have no folder yet
            name, _ = self._run(request)
        command = shlex.join(tuning(self.root, name).command)
        request.state.folder = RunFolder(self.root.path / name)
        return page(request, "run", name, {"name": name, "run": live(self.root, name), "command": command})

    def chat(self, request: Request) -> Response:
        name, folder = self._run(request)
        (run, address), job, mine = served(self.root), serving(self.root), asked_for(self.root) == name
        shown = {
            **{"name": name, "columns": COLUMNS, "prompts": [row["prompt"] for row in first_answers(folder)]},
            **{"loading": run == name and not address, "ready": run == name and address, "other": run},
            **{"error": job.ended() if mine else "", "log": job.lines(3) if mine else []},
        }
        return page(request, "chat", f"Chat with {name}", shown)

    async def say(self, request: Request) -> Response:
        name, _ = self._run(request)
        body, at = b"", request.query_params.get("at", "")
        async for part in request.stream():
            if len(body := body + part) > MOST_PROMPT or at not in COLUMNS:
                raise TellError("the prompt is too long", remedy="Shorten it.")
        prompt = body.decode("utf-8", "replace")
        return StreamingResponse(answer(self.root, name, prompt, at), media_type="application/x-ndjson")

    def ship(self, request: Request) -> Response:
        name, _ = self._run(request)
        serve, state = _typed(["serve", positional(name)]), state_of(self.root, name)
        shown = {"name": name, "exports": self._exports(name), "state": state, "serve": serve}
        return page(request, "ship", f"Ship {name}", shown)

    def _exports(self, name: str) -> dict[str, dict[str, Any]]:
        found = {}
        for target, made in export_targets().items():
            job, out = Job(self.root, f"export {target} {name}"), f"exports/{name}-{target}"
            to = "--repo=USER/NAME" if target == "hub" else f"--out={out}"
            arguments = ["export", positional(name), f"--to={target}", to]
            there, ended = (self.root.path / out).exists(), job.ended()
            failed = ended and (job.error() or not there)
            state = "running" if job.process() else "failed" if failed else "done" if ended else ""
            said = [ended] if failed else job.lines(8)
            known = {"about": made.about, "command": _typed(arguments), "arguments": arguments, "job": job, "out": out}
            found[target] = known | {"state": state, "said": said, "there": there}
        return found

    def act(self, request: Request) -> Response:
        """Stop or resume a run, load or free its model, export it."""
        action, name = request.url.path.split("/")[1], request.path_params["name"]
        if action == "stop" and tuning(self.root, name).stop() is None and not stop_holder(self._run(request)[1]):
            what = "is not run by a process of yours on this machine"
            raise TellError(what, where=name, remedy="Stop it where it was started.")
        if action == "resume":
            name, _ = self._run(request)
            resume(self.root, name)
        if action == "load":
            serve_run(self.root, self._run(request)[0])
        if action == "unload":
            free_model(self.root)
        if action == "export":
            exports = self._exports(self._run(request)[0])
            if (target := request.query_params.get("target", "")) not in exports.keys() - {"hub"}:
                raise NotHere("there is no such target")
            exports[target]["job"].start(exports[target]["arguments"])
        return RedirectResponse(f"/{AFTER[action]}/{quote(name)}", 303)

    def static(self, request: Request) -> Response:
        """A file of the page; the stylesheet extends the report's."""
        if (name := request.path_params["name"]) not in STATIC:
            raise NotHere("there is no such file")
        text = resources.files("tell.ui").joinpath("static", name).read_bytes()
        text = str(stylesheet()[0]).encode() + text if name == "style.css" else text
        return Response(text, media_type=STATIC[name], headers={"cache-control": "no-cache"})

    # Pages in a frame: a run's report, a study's page, runs side by side
    def frame(self, request: Request) -> Response:
        kind, name, query = request.url.path.split("/")[1], request.path_params.get("name", ""), request.url.query
        self._source(kind, name, request)
        title, source = f"{kind.capitalize()} {name}".strip(), f"/framed/{kind}/{quote(name)}?{query}"
        return page(request, "frame", title, {"name": name if kind == "report" else "", "source": source}, here=kind)

    def framed(self, request: Request) -> Response:
        kind, name = request.path_params["kind"], request.path_params["name"]
        with reading(self.root.path):
            text = self._source(kind, name, request)()
        return HTMLResponse(text.encode("utf-8", "replace"), headers={"content-security-policy": FRAMED})

    def _source(self, kind: str, name: str, request: Request) -> Callable[[], str]:
        """What makes the page; a folder's own is served as it is, so that it comes at once."""
        if kind == "compare":
            names = list(dict.fromkeys(request.query_params.getlist("run")))[:8]
            if len(names) < 2:
                raise TellError("two runs or more are compared", remedy="Mark them in the table of runs.")
            return partial(compare_kept, [self.root.run(name) for name in names])
        path = self._run(request)[1].report if kind == "report" else self.root.study(name).page
        if not path.is_file():
            remedy = f"It is written at the end; `tell {kind} {name}` writes one of what is there now."
            raise NotHere(f"there is no {kind} yet", remedy=remedy)
        return partial(read_text, path, most=MOST_PAGE, remedy="Write it again.")


def _typed(arguments: list[str]) -> str:
    return shlex.join(["tell", *arguments])


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = NotHere("there is no such page")
    if isinstance(error, Unwritable):
        error = TellError(error.what, where=error.where, remedy=FULL)
    status = 404 if isinstance(error, NotHere) else 400 if isinstance(error, TellError | ClientDisconnect) else 500
    said = one_line(str(error) if status < 500 else f"unexpected {type(error).__name__}: {error}")
    if request.method == "PUT":
        return JSONResponse({"error": said}, status)
    shown = 200 if status < 500 and request.headers.get("hx-request") else status  # htmx shows no others
    return page(request, "message", "That did not work", {"error": said}, status=shown)


def make_ui(root: UiRoot, token: str) -> Guard:
    """The application of a root."""
    p, made = Pages(root), templates()
    for name in made.list_templates(["j2"]):  # compiled now, so that no first view waits for it
        made.get_template(name)
    named = {kind: p.frame for kind in ("report", "study")}
    named |= {"run": p.run, "framed/{kind}": p.framed, "chat": p.chat, "ship": p.ship}
    get = {"/": p.runs, "/data": p.data, "/plan": p.plan, "/compare": p.frame, "/static/{name}": p.static}
    get |= {f"/{path}/{{name:path}}": handler for path, handler in named.items()}
    post = {"/start": p.start, "/say/{name:path}": p.say, **{f"/{act}/{{name:path}}": p.act for act in AFTER}}
    routes = [Route(path, handler) for path, handler in get.items()]
    routes += [Route(path, handler, methods=["POST"]) for path, handler in post.items()]
    routes += [Route("/upload/{name:path}", p.upload, methods=["PUT"])]
    refused = dict.fromkeys((TellError, HTTPException, ClientDisconnect, Exception), _refused)
    return Guard(Starlette(routes=routes, exception_handlers=refused), token, page)
