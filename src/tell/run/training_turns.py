"""Training rows of a run as turns of a conversation. No torch."""

from __future__ import annotations

from tell.errors import TellError
from tell.files import read_json
from tell.folder import RunFolder
from tell.run.claim import read_run_config
from tell.run.task_rows import read_task

MOST_EXAMPLES, MOST_CHARACTERS = 8, 6000  # in a prompt


def training_turns(folder: RunFolder) -> list[dict[str, str]]:
    """Turns of training rows for the prompt of an untuned model, the first that fit.

    Raises:
        TellError: the run's files are damaged, or its data is gone or has no row that is short enough.
    """
    found = read_json(folder.split, remedy="").get("train")
    train = set(map(str, found if isinstance(found, list) else ()))
    turns, left = list[dict[str, str]](), MOST_CHARACTERS
    for example in read_task(read_run_config(folder), bad_rows="drop")[0].examples:
        size = sum(len(m.content) for m in example.messages)
        if example.hash in train and len(example.messages) == 2 and size < left and len(turns) < 2 * MOST_EXAMPLES:
            turns += [{"role": m.role, "content": m.content} for m in example.messages]
            left -= size
    if not turns:
        raise TellError("no training row is short enough")
    return turns
