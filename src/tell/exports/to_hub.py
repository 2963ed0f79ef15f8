"""``--to hub``: the adapter, or the merged model, in a private repository on the Hugging Face hub."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from tell.errors import TellError, first_line
from tell.exports.serving_files import hub_base
from tell.exports.target import ExportOptions, Reader, Source, Target, export_target
from tell.exports.to_adapter import Adapter
from tell.exports.to_hf import Merged
from tell.shown import without_secrets

LOCAL = ("export.json",)  # names folders of this machine


@export_target("hub")
class Hub(Target):
    """An upload of what ``hf`` or ``adapter`` writes."""

    about = "private repository on the Hugging Face hub"

    def ready(self, source: Source, options: ExportOptions) -> None:
        from huggingface_hub import HfApi

        if not options.repo or options.repo.count("/") > 1:
            remedy = "Pass --repo USER/NAME."
            raise TellError(f"{options.repo or 'no repository'} is no name on the hub", where="--repo", remedy=remedy)
        if source.shots:
            raise TellError(
                "the chat template shows training rows (task.shots), which the hub would publish",
                where=str(source.opened.folder.root),
                remedy="Use --to adapter or --to hf, and upload that folder yourself if those rows may be read.",
            )
        if not options.merged and hub_base(source) is None:
            raise TellError(
                f"the base model is a folder of this machine ({source.base}), which nobody can load the adapter onto",
                where="--to hub",
                remedy="Add --merged.",
            )
        with _said("--to hub"):
            api = HfApi()
            api.whoami()
            taken = api.repo_exists(options.repo)
        if taken:
            raise TellError("exists on the hub", where=f"--repo {options.repo}", remedy="Choose another name.")

    def size(self, source: Source, options: ExportOptions) -> int:
        return _form(options).size(source, options)

    def write(self, source: Source, options: ExportOptions, folder: Path) -> dict:
        return _form(options).write(source, options, folder)

    def reopen(self, source: Source, folder: Path) -> AbstractContextManager[Reader] | str:
        form = Adapter() if (folder / source.adapter.config.name).exists() else Merged()
        return form.reopen(source, folder)

    def finish(self, source: Source, options: ExportOptions, folder: Path) -> list[str]:
        from huggingface_hub import HfApi

        assert options.repo
        api = HfApi()
        with _said(str(folder)), source.notices.display.bar(f"upload to {options.repo}", None):
            url = api.create_repo(options.repo, private=not options.public, repo_type="model")
            api.upload_folder(
                repo_id=url.repo_id, folder_path=folder, ignore_patterns=list(LOCAL), commit_message="Exported by TELL"
            )
        return [f"{'public' if options.public else 'private'}: {url}"]


def _form(options: ExportOptions) -> Target:
    return Merged() if options.merged else Adapter()


class _said:  # a context manager
    """Errors of the hub and of the network in one line, without keys.

    Args:
        where: what the error is about.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, TellError) or not isinstance(error, Exception):
            return
        raise TellError(
            f"the hub refused or did not answer ({without_secrets(first_line(error))})",
            where=self.where,
            remedy="Run `hf auth login`, and check the name and the network.",
        ) from error
