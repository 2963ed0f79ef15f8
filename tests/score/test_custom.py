import sys
from textwrap import dedent

import pytest

from tell.errors import TellError
from tell.score.custom import CustomScorer
from tell.score.scorers import make_scorer


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current directory; each test has its own name for it."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(dedent(source), encoding="utf-8")
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_list_and_mapping(module):
    module(
        "user_scores_a",
        """
        import numpy as np
        def length(answers, references):
            return [len(a) / len(r) for a, r in zip(answers, references)]
        def both(answers, references):
            import user_scores_late
            same = np.array([a == r for a, r in zip(answers, references)])
            return {"same": same, "size": length(answers, references)}
    """,
    )
    module("user_scores_late", "")
    before = list(sys.path)
    scorer = CustomScorer("user_scores_a:length")
    metrics = scorer.score(["ab", "abc"], ["abcd", "abc"])
    assert scorer.primary == "length" and list(metrics) == ["length"]
    assert metrics["length"].value == 0.75 and not metrics["length"].binary
    scorer = make_scorer("text", custom="user_scores_a:both")
    metrics = scorer.score(["ab", "abc"], ["abcd", "abc"])
    assert scorer.primary == "same" and list(metrics) == ["same", "size"]
    assert metrics["same"].value == 0.5 and metrics["same"].binary
    assert sys.path == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"scorer user_scores_b:f: returned 1 numbers for 2 answers"),
        ("return [1.0, float('nan')]", "returned nan for answer 2"),
        ("return [None, 1.0]", "returned None for answer 1"),
        ("return ['x', 1.0]", "returned 'x' for answer 1"),
        ("return 0.5", "returned float"),
        ("return {}", "no metric"),
        ("return {'m': [1, 2], 'k': [1]}", r"returned 1 numbers for 2 answers \(k\)"),
        ("return {3: [1, 2]}", "named a metric 3"),
        ("raise KeyError('gold')", "user_scores_b:f: raised KeyError: 'gold'"),
        ("raise SystemExit(3)", "user_scores_b:f: raised SystemExit: 3"),
    ],
)
def test_wrong_results_name_the_function(module, body, message):
    module("user_scores_b", f"def f(answers, references):\n    {body}\n")
    with pytest.raises(TellError, match=message):
        CustomScorer("user_scores_b:f").score(["a", "b"], ["a", "b"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon", "package.module:function"),
        ("user_scores_c:", "package.module:function"),
        ("no_such_module_here:f", "module no_such_module_here is not found"),
        ("user_scores_c:scroe", "has no scroe; did you mean score"),
        ("user_scores_c:number", "number is not a function"),
        ("user_scores_broken:f", "importing user_scores_broken failed with ZeroDivisionError"),
        ("user_scores_exits:f", "importing user_scores_exits failed with SystemExit"),
        ("user_scores_needs:f", "module absent_dependency_x is not found"),
    ],
)
def test_import_failures(module, spec, message):
    module("user_scores_c", "number = 1\ndef score(answers, references): return [1.0] * len(answers)\n")
    module("user_scores_broken", "1 / 0\n")
    module("user_scores_exits", "raise SystemExit(1)\n")
    module("user_scores_needs", "import absent_dependency_x\n")
    with pytest.raises(TellError, match=message):
        CustomScorer(spec)


def test_make_scorer():
    assert make_scorer("json", schema={"type": "object"}).primary == "field_accuracy"
    lists = {"type": "object", "properties": {key: {"type": "array"} for key in ("people", "places")}}
    assert make_scorer("json", schema=lists).primary == "item_f1"
    mixed = {"type": "object", "properties": {**lists["properties"], "language": {"type": "string"}}}
    assert make_scorer("json", schema=mixed).primary == "field_accuracy"
    assert make_scorer("label", labels=["a"]).primary == "accuracy"
    assert make_scorer("text").primary == "chrf"
    with pytest.raises(TellError, match="needs a JSON Schema"):
        make_scorer("json")
    with pytest.raises(TellError, match="no label"):
        make_scorer("label")
    with pytest.raises(TellError, match="unknown kind 'image'"):
        make_scorer("image")
