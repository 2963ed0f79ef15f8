"""The routes of `tell ui`: each reads files of the root, or starts a command and reads what it writes."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from jinja2 import ChoiceLoader, Environment, PackageLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tell.errors import TellError
from tell.exports.serving_files import model_licence
from tell.exports.target import export_targets
from tell.files import read_text
from tell.folder import RunFolder, reading
from tell.home import make_folder
from tell.report.compare import compare
from tell.report.page import environment, render, stylesheet
from tell.shown import one_line
from tell.ui.chat_relay import COLUMNS, MOST_PROMPT, answers, serve_run, served, serving
from tell.ui.choices import CHOICES, Choice, positional
from tell.ui.guard import Guard, framed
from tell.ui.jobs import Job
from tell.ui.run_view import ACTIVE, live, state_of, study_line, summary, test_rows, tuning
from tell.ui.ui_root import NotHere, UiRoot

MOST_FORM, MOST_PAGE = 1 << 20, 64 << 20  # bytes of a form, and of a page made by a command
PATIENCE = 300  # seconds for tell look and tell plan
STATIC = {"ui.js": "text/javascript", "htmx.min.js": "text/javascript"}
SORTS = {"name": False, "state": False, "score": True, "loss": False, "seconds": True, "changed": True}  # high first?
Handler = Callable[[Request], Awaitable[Response]]


@cache
def pages() -> Environment:
    """The report's environment, with the page's templates next to its own."""
    loaders = [PackageLoader(f"tell.{room}", "templates") for room in ("ui", "report")]
    made = environment().overlay(loader=ChoiceLoader(loaders))
    made.filters["address"] = lambda name: quote(str(name), safe="/")
    made.filters["key"] = lambda name: hashlib.sha256(str(name).encode("utf-8", "replace")).hexdigest()[:12]
    made.filters["moment"] = lambda stamp: time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp))
    return made


@cache
def static(name: str) -> bytes:
    """A file of the page; the stylesheet extends the report's."""
    folder = resources.files("tell.ui").joinpath("static")
    if name == "style.css":
        return (str(stylesheet()[0]) + folder.joinpath("ui.css").read_text("utf-8")).encode()
    return folder.joinpath(name).read_bytes()


def html(template: str, status: int = 200, /, **context: object) -> HTMLResponse:
    text = pages().get_template(f"{template}.html.j2").render(**context)
    return HTMLResponse(text.encode("utf-8", "replace"), status)


def part(request: Request, shown: str, title: str, /, **context: object) -> HTMLResponse:
    """A page of one part, or the part alone where htmx asks for it again."""
    template = shown if request.headers.get("hx-request") else "page"
    return html(template, 200, part=shown, title=title, **context)


def in_frame(page: str, style: str = "") -> HTMLResponse:
    headers = {"content-security-policy": framed(style)}
    return HTMLResponse(page.encode("utf-8", "replace"), headers=headers)


async def form_of(request: Request) -> dict[str, list[str]]:
    """The fields of a form.

    Raises:
        TellError: it is too large.
    """
    body = b""
    async for part in request.stream():
        if len(body := body + part) > MOST_FORM:
            raise TellError("the form is too large", remedy="Shorten its fields.")
    return parse_qs(body.decode("utf-8", "replace"))


class Pages:
    """The handlers of one root."""

    def __init__(self, root: UiRoot) -> None:
        self.root = root

    def name_of(self, request: Request) -> str:
        """The name of the run that the address names.

        Raises:
            NotHere: there is no such run.
        """
        return self.root.run(request.path_params["name"]).root.relative_to(self.root.path).as_posix()

    # Runs
    async def runs(self, request: Request) -> Response:
        by = request.query_params.get("by", "changed")
        by = by if by in SORTS else "changed"
        lines, studies = await run_in_threadpool(self._all)
        known = [line for line in lines if line[by] not in (None, "")]
        known.sort(key=lambda line: line[by], reverse=SORTS[by])
        rest = [line for line in lines if line[by] in (None, "")]
        active = any(line["state"] in ACTIVE for line in lines) or any(s["counts"].get("running") for s in studies)
        return part(
            request,
            "_runs",
            "Runs",
            runs=known + rest,
            studies=studies,
            by=by,
            active=active,
            root=self.root,
            here="runs",
        )

    def _all(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        runs, studies = self.root.find()
        lines = [study_line(self.root, name) for name in studies]
        cells = {cell["run"] for line in lines for cell in line["cells"]}
        return [summary(self.root, name) for name in runs if name not in cells], lines

    # Data and plan
    async def data(self, request: Request) -> Response:
        choice = Choice.of(request.query_params)
        return html("data", choice=choice, uploaded=self.root.uploaded(), here="data")

    async def upload(self, request: Request) -> Response:
        name = await self.root.receive(request.path_params["name"], request.stream())
        return JSONResponse({"path": name}, 201)

    async def look(self, request: Request) -> Response:
        choice = Choice.of(request.query_params)
        key = hashlib.sha256(choice.query.encode()).hexdigest()[:20]
        page = make_folder(self.root.state / "look") / f"{key}.html"
        facts, error = await self._json(choice.command("look", "--json", f"--html={page}"))
        command = shlex.join(["tell", *choice.command("look")])
        return html("_look", choice=choice, facts=facts, error=error, key=key, command=command)

    async def looked(self, request: Request) -> Response:
        path = self.root.inside(f".tell-ui/look/{request.path_params['key']}.html")
        return in_frame(await run_in_threadpool(read_text, path, most=MOST_PAGE, remedy="Look again."))

    async def plan(self, request: Request) -> Response:
        choice = Choice.of(request.query_params, request.query_params.getlist("arm"))
        return html("plan", choice=choice, arms=CHOICES, chosen=choice["arms"].split(","), here="data")

    async def planned(self, request: Request) -> Response:
        choice = Choice.of(request.query_params, request.query_params.getlist("arm"))
        plan, error = await self._json(choice.command("plan", "--json"))
        out, licence = self.root.fresh_run(choice["data"]), None
        if plan is not None:
            licence = await run_in_threadpool(model_licence, plan["model"]["origin"], Path(plan["model"]["path"]))
        command = shlex.join(["tell", *choice.command("tune", out=out)])
        return html(
            "_plan", choice=choice, plan=plan, error=error, command=command, out=out, root=self.root, licence=licence
        )

    async def _json(self, arguments: list[str]) -> tuple[dict[str, Any] | None, str]:
        """What a command prints with ``--json``, or the line that says why it does not."""

        def run() -> tuple[dict[str, Any] | None, str]:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "tell", *arguments],
                    cwd=self.root.path,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=PATIENCE,
                )
                return json.loads(done.stdout), ""
            except subprocess.TimeoutExpired:
                return None, f"not finished after {PATIENCE} s"
            except ValueError:
                said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["nothing was said"]
                return None, one_line(said[-1].removeprefix("error: "))

        return await run_in_threadpool(run)

    async def start(self, request: Request) -> Response:
        form = {name: values[-1] for name, values in (await form_of(request)).items()}
        choice = Choice.of(form)
        out = choice["out"] if re.fullmatch(r"runs/\w[\w.-]*", choice["out"]) else self.root.fresh_run(choice["data"])
        if tuning(self.root, out).process() is None:  # else it was started by another click
            out = self.root.fresh_run(choice["data"]) if (self.root.path / out).exists() else out
            tuning(self.root, out).start(choice.command("tune", out=out))
        return RedirectResponse(f"/run/{quote(out)}", 303)

    # One run
    def _begun(self, request: Request) -> str:
        """A run, or one whose command was started and has no folder yet."""
        name = request.path_params["name"]
        return name if tuning(self.root, name).record() else self.name_of(request)

    async def run(self, request: Request) -> Response:
        name = self._begun(request)
        found = await run_in_threadpool(live, self.root, name)
        command = tuning(self.root, name).record().get("command")
        shown = shlex.join(map(str, command)) if isinstance(command, list) else ""
        return part(request, "_live", name, run=found, name=name, command=shown, here="run")

    async def stop(self, request: Request) -> Response:
        name = self._begun(request)
        tuning(self.root, name).stop()
        return RedirectResponse(f"/run/{quote(name)}", 303)

    async def resume(self, request: Request) -> Response:
        name = self.name_of(request)
        tuning(self.root, name).start(["tune", "--resume", f"--out={name}"])
        return RedirectResponse(f"/run/{quote(name)}", 303)

    # Reports
    async def report(self, request: Request) -> Response:
        name = self.name_of(request)
        return html("frame", name=name, title="Report", source=f"/framed/report/{quote(name)}", here="report")

    async def framed_report(self, request: Request) -> Response:
        return in_frame(await run_in_threadpool(self._rendered, self.root.run(request.path_params["name"])))

    async def study(self, request: Request) -> Response:
        name = self.root.study(request.path_params["name"]).root.relative_to(self.root.path).as_posix()
        return html("frame", name=name, title="Study", source=f"/framed/study/{quote(name)}", here="")

    async def framed_study(self, request: Request) -> Response:
        page = self.root.study(request.path_params["name"]).page
        text = await run_in_threadpool(read_text, page, most=MOST_PAGE, remedy="Run the study again.")
        return in_frame(text, "unsafe-inline")

    async def compared(self, request: Request) -> Response:
        names = [self.root.run(name).root for name in request.query_params.getlist("run")[:8]]
        if len(names) < 2:
            raise TellError("two runs or more are compared", remedy="Mark them in the table of runs.")
        if not request.url.path.startswith("/framed/"):
            return html(
                "frame",
                name="",
                title="Runs side by side",
                source=f"/framed{request.url.path}?{request.url.query}",
                here="",
            )
        return in_frame(await run_in_threadpool(self._compared, [RunFolder(path) for path in names]))

    def _rendered(self, folder: RunFolder) -> str:
        with reading(folder.root):
            return render(folder)

    def _compared(self, folders: list[RunFolder]) -> str:
        with reading(folders[0].root):
            return compare(folders)

    # Chat
    async def chat(self, request: Request) -> Response:
        name = self.name_of(request)
        run, address = served(self.root)
        rows = await run_in_threadpool(test_rows, self.root.run(name))
        job = serving(self.root)
        mine = str(job.record().get("command", ["", "", ""])[2]).removeprefix("./") == name
        return part(
            request,
            "_chat",
            f"Chat with {name}",
            name=name,
            loading=run == name and not address,
            ready=run == name and bool(address),
            other=run if run != name else "",
            error=job.error() if mine else "",
            log=job.lines(3) if mine else [],
            columns=COLUMNS,
            prompts=[row["prompt"] for row in rows],
            here="chat",
        )

    async def load(self, request: Request) -> Response:
        name = self.name_of(request)
        await run_in_threadpool(serve_run, self.root, name)
        return RedirectResponse(f"/chat/{quote(name)}", 303)

    async def unload(self, request: Request) -> Response:
        serving(self.root).stop()
        return RedirectResponse(f"/chat/{quote(self.name_of(request))}", 303)

    async def say(self, request: Request) -> Response:
        name = self.name_of(request)
        prompt = "".join((await form_of(request)).get("prompt", []))[:MOST_PROMPT]
        return StreamingResponse(answers(self.root, name, prompt), media_type="application/x-ndjson")

    # Ship
    def _exports(self, name: str) -> list[dict[str, Any]]:
        found = []
        for target, made in export_targets().items():
            job, out = Job(self.root, f"export {target} {name}"), f"exports/{Path(name).name}-{target}"
            arguments = ["export", positional(name), f"--to={target}", f"--out={out}"]
            state = "running" if job.process() else "failed" if job.error() else "done" if job.record() else ""
            said = [job.error()] if state == "failed" else job.lines(8)
            command = shlex.join(["tell", *arguments])
            found.append(
                {"name": target, "about": made.about, "command": command, "arguments": arguments, "job": job}
                | {"state": state, "said": said, "there": (self.root.path / out).exists(), "out": out}
            )
        return found

    async def ship(self, request: Request) -> Response:
        name = self.name_of(request)
        exports = await run_in_threadpool(self._exports, name)
        state = state_of(self.root.run(name), tuning(self.root, name))
        serve = shlex.join(["tell", "serve", positional(name)])
        return part(request, "_ship", f"Ship {name}", name=name, exports=exports, state=state, serve=serve, here="ship")

    async def export(self, request: Request) -> Response:
        name = self.name_of(request)
        target = "".join((await form_of(request)).get("target", []))
        chosen = next((one for one in self._exports(name) if one["name"] == target and target != "hub"), None)
        if chosen is None:
            raise NotHere(f"there is no target {target[:40]!r}")
        chosen["job"].start(chosen["arguments"])
        return RedirectResponse(f"/ship/{quote(name)}", 303)


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name != "style.css" and name not in STATIC:
        raise NotHere("there is no such file")
    return Response(static(name), media_type=STATIC.get(name, "text/css"), headers={"cache-control": "no-cache"})


async def _refused(request: Request, error: Exception) -> Response:
    status = 404 if isinstance(error, NotHere) else 400
    said = one_line(str(error))
    if request.method == "PUT":
        return JSONResponse({"error": said}, status)
    return html("message", status, error=said, here="")


def make_ui(root: UiRoot, token: str) -> Starlette:
    """The application of a root."""
    p = Pages(root)
    routes = [
        Route("/", p.runs),
        Route("/data", p.data),
        Route("/upload/{name:path}", p.upload, methods=["PUT"]),
        Route("/look", p.look),
        Route("/framed/look/{key}", p.looked),
        Route("/plan", p.plan),
        Route("/planned", p.planned),
        Route("/start", p.start, methods=["POST"]),
        Route("/run/{name:path}", p.run),
        Route("/stop/{name:path}", p.stop, methods=["POST"]),
        Route("/resume/{name:path}", p.resume, methods=["POST"]),
        Route("/report/{name:path}", p.report),
        Route("/framed/report/{name:path}", p.framed_report),
        Route("/study/{name:path}", p.study),
        Route("/framed/study/{name:path}", p.framed_study),
        Route("/compare", p.compared),
        Route("/framed/compare", p.compared),
        Route("/chat/{name:path}", p.chat),
        Route("/load/{name:path}", p.load, methods=["POST"]),
        Route("/unload/{name:path}", p.unload, methods=["POST"]),
        Route("/say/{name:path}", p.say, methods=["POST"]),
        Route("/ship/{name:path}", p.ship),
        Route("/export/{name:path}", p.export, methods=["POST"]),
        Route("/static/{name}", _static),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, token)], exception_handlers={TellError: _refused})
