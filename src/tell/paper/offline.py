"""A teacher without a model, which composes the thought from the label and the annotators' marked passages."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from tell.paper.halueval import HaluRow
from tell.paper.teacher import Progress, Thought

_VERBS = """
add aggregate align analyse analyze answer append arrange assess assume brainstorm break briefly build calculate
categorize change check choose cite classify collect combine come comment compare compile complete compose compute
construct convert craft create define describe design detect determine develop devise diagnose discuss draft draw
edit estimate evaluate expand explain extract find formulate generate give guess hypothesize identify imagine
implement insert interpret introduce invent list make match modify name offer optimize organize outline output
perform pick plan predict prepare present produce propose prove provide rank read rearrange recite recommend
reformat rephrase report research retrieve reverse rewrite search select share show simulate sketch solve sort state
suggest summarise summarize take tell trace transform translate update use visit visualize write
"""
_QUESTIONS = "what which who whom whose when where why how is are was were do does did can could should would"
_LIMIT = re.compile(
    r"as an ai|language model|\bsorry\b|\bapologi[sz]e|\bI cannot\b|\bI can't\b|\bunable to\b"
    r"|(?:do not|don't) have (?:the )?(?:access|abilit|capab|personal)",
    re.IGNORECASE,
)
_CODE = re.compile(r"```|[{};]|\\frac|\bdef |\breturn |print\(|==|\+=|\bSELECT\b")
_CREATIVE = re.compile(
    r"\b(?:poem|story|haiku|slogan|song|lyrics|dialogue|tweet|rap|joke|riddle|verse|limerick|metaphor|caption|tagline|"
    r"scene|fiction|fairy|rhym\w+|character|title|name for|motto|imagine)\b",
    re.IGNORECASE,
)
_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+\S", re.MULTILINE)

# What is wrong with a marked passage, by kind of passage. {s} is the quotation.
_WRONG = {
    "refusal": (
        "Instead of doing this, the response says {s}, which claims a limit that is not warranted here.",
        "The response evades the request with {s}, so what was asked for is not delivered.",
        "The statement {s} misrepresents what can be done and leaves the request unanswered.",
    ),
    "link": (
        "The response speaks as if it had read the page, yet {s} cannot be drawn from a page it never saw.",
        "The linked source cannot have been opened, so the content in {s} is made up.",
    ),
    "figure": (
        "The figures in {s} do not hold up when they are checked.",
        "The response gives {s}, but these numbers are wrong or cannot be verified.",
        "Checking the details shows that {s} is not correct.",
    ),
    "code": (
        "The step {s} does not do what is needed, so the result cannot be relied on.",
        "The working contains {s}, which is an error in the solution.",
    ),
    "whole": (
        "Nearly the whole answer is at fault: from {s} on it is not supported by fact or by the query.",
        "The answer, which begins {s}, does not rest on anything that can be verified.",
        "What the response offers, starting with {s}, does not fit what was asked or what is known.",
    ),
    "plain": (
        "The passage {s} is not accurate or does not follow from the query.",
        "The response states {s}, which cannot be supported.",
        "The claim {s} deviates from what is known and from what was asked.",
        "The problem lies in {s}: it is unfounded or beside the request.",
    ),
    "remark": (
        "On review the answer falls short: {s}.",
        "The reviewer's note on the answer is {s}, which the response does not satisfy.",
    ),
    "incomplete": (
        "The response breaks off before it is finished, so it is incomplete.",
        "The answer is incomplete and does not deliver everything that was asked for.",
    ),
    "none": (
        "No single passage stands out, but the answer taken as a whole is not reliable.",
        "The answer as a whole does not agree with what was asked or with what is known.",
    ),
}
_END_YES = (
    "This is a hallucination.",
    "Therefore the response contains a hallucination.",
    "This deviation has to be judged a hallucination.",
    "Hence the answer is hallucinated in this part.",
    "",
)

# What was checked in an answer that annotators found sound, by kind of answer.
_SOUND = {
    "refusal": (
        "The response says openly what it cannot do and claims nothing beyond that.",
        "The response names its own limits honestly, and the rest of it stays within what can be known.",
    ),
    "code": (
        "The steps of the solution were followed and each does what the response says it does.",
        "The code and its explanation agree with each other and with the request.",
    ),
    "creative": (
        "This is a creative task, and the response keeps to its terms without presenting invention as fact.",
        "The text is inventive, as it was asked to be, and makes no false claim about the world.",
    ),
    "list": (
        "The response gives {n} points; each was checked and is on topic and plausible.",
        "Each of the {n} points in the response is relevant and agrees with common knowledge.",
    ),
    "figure": (
        "The figures and details in the response are consistent with one another and with the query.",
        "The numbers given were checked and nothing in them contradicts the query.",
    ),
    "plain": (
        "The statements in the response, which begins {s}, agree with common knowledge.",
        "The response answers this directly, and its claims are accurate and consistent.",
        "The response stays on the subject and makes no claim that goes against known facts.",
        "Beginning with {s}, the response gives a relevant and coherent answer.",
    ),
}
_END_NO = (
    "There is no hallucination.",
    "Therefore the response contains no hallucination.",
    "No part of it has to be judged a hallucination.",
    "It is free of hallucinations.",
    "",
)
_TASK = ("The task is to {q}.", "The user asks the assistant to {q}.", "The query requests the assistant to {q}.")
_ASKED = ("The query asks {q}.", "The user wants to know {q}.", "The question is {q}.")
_GIVEN = ("The query reads {q}.", "The user writes {q}.", "The request is {q}.")


class OfflineTeacher:
    """Composes thoughts of one to three sentences from the row alone: the query, what is wrong or checked, the verdict.

    A thought is as true as the label and the marked passages. A hash of the row picks the sentence patterns, so the
    same row gives the same thought everywhere.
    """

    name = "offline"
    usage = None

    def write(
        self, rows: Sequence[HaluRow], *, cache: Path | None = None, progress: Progress | None = None
    ) -> list[Thought]:
        """A thought for each row; nothing is cached, nothing is dropped."""
        out = []
        for done, row in enumerate(rows, 1):
            out.append(Thought(compose(row)))
            if progress:
                progress(done, len(rows))
        return out


def compose(row: HaluRow) -> str:
    """The thought of one row, 1-3 sentences on one line."""
    if row.label == "yes":
        kind, quoted = _fault(row)
        middle = _pick(row, kind, _WRONG[kind]).format(s=quoted)
        end = _pick(row, "end", _END_YES)
    else:
        kind, items = _kind_of_answer(row)
        middle = _pick(row, kind, _SOUND[kind]).format(n=items, s=_quote(_words(row.response, 60)))
        end = _pick(row, "end", _END_NO)
    return " ".join(part for part in (_asked(row), middle, end) if part)


def _pick(row: HaluRow, slot: str, choices: Sequence[str]) -> str:
    digest = hashlib.blake2b(f"{row.id}\x00{row.query}\x00{slot}".encode(), digest_size=8).digest()
    return choices[int.from_bytes(digest, "big") % len(choices)]


def _asked(row: HaluRow) -> str:
    """A sentence on what the query asked."""
    first = next((line.strip() for line in row.query.splitlines() if line.strip()), "")
    text = _words(first, 110)
    words = re.findall(r"[a-z']+", text.lower())
    head = words[0] if words else ""
    if text and head in _VERBS.split() and not text.endswith("?"):
        task = _quiet(text[0].lower() + text[1:]).rstrip(" .:,;!")
        if not re.search(r"[.!?]\s", task):
            if text.endswith("..."):
                task += "..."
            return _pick(row, "asked", _TASK).format(q=task).replace("....", "...")
    if head in _QUESTIONS.split() and text.endswith("?"):
        return _pick(row, "asked", _ASKED).format(q=_quote(text))
    return _given(row, text)


def _given(row: HaluRow, text: str) -> str:
    return _pick(row, "asked", _GIVEN).format(q=_quote(text)) if text else ""


def _fault(row: HaluRow) -> tuple[str, str]:
    """The kind of passage that the annotators marked, and a quotation of it."""
    if not row.spans:
        return "none", ""
    span, response = _flat(row.spans[0]), _flat(row.response)
    quoted = _quote(_words(span, 140))
    if re.match(r"incomplete\b", span, re.IGNORECASE) and len(span) < 14:
        return "incomplete", ""
    if span not in response and len(span) < 80:  # a remark of the annotator, not a passage
        return "remark", quoted
    if _LIMIT.search(span):
        return "refusal", quoted
    if re.search(r"https?://", row.query):
        return "link", quoted
    if _CODE.search(span):
        return "code", quoted
    if len(span) > 0.8 * len(response):
        return "whole", quoted
    short = list(dict.fromkeys(_quote(_words(other, 80)) for other in row.spans))
    if len(short) > 1:
        quoted = f"{short[0]} (as well as {short[1]})"
    return ("figure" if re.search(r"\d[\d,.]*\d", quoted) else "plain"), quoted


def _kind_of_answer(row: HaluRow) -> tuple[str, int]:
    items = len(_ITEM.findall(row.response))
    if _LIMIT.search(row.response):
        return "refusal", items
    if re.search(r"```|\bdef |\breturn \w+;?$|print\(|\\frac", row.response):
        return "code", items
    if _CREATIVE.search(row.query):
        return "creative", items
    if items >= 2:
        return "list", items
    return ("figure" if len(re.findall(r"\d+", row.response)) >= 3 else "plain"), items


def _flat(text: str) -> str:
    return " ".join(text.split())


def _words(text: str, limit: int) -> str:
    """At most about `limit` characters, whole sentences if one ends in time, else whole words and dots."""
    text = _flat(text)
    if len(text) <= limit:
        return text
    head = text[: limit + 1]
    ends = [match.end() for match in re.finditer(r"[a-z)\]'\"][.!?](?=\s)", head)]
    if ends and ends[-1] >= limit // 3:
        return head[: ends[-1]]
    cut = head.rsplit(" ", 1)[0] if " " in head[limit // 2 :] else head[:limit]
    return cut.rstrip(" ,;:-(") + "..."


def _quiet(text: str) -> str:
    """Double quotes to single ones and no fences, so that the JSON around needs few escapes."""
    return re.sub(r"[\"“”]", "'", text.replace("```", "")).strip()


def _quote(text: str) -> str:
    text = _quiet(text)
    if text[:1] == "'" and text.count("'") == 1 + (text[-1] == "'"):
        text = text.strip("'")  # quoted already
    if not text.endswith("..."):
        text = text.rstrip(" .,;:")
    return f"'{text}'"
