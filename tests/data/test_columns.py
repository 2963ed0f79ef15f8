import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell.data.cell_text import RowFault
from tell.data.columns import detect_layout
from tell.data.layouts import LAYOUTS, find_columns
from tell.data.sources import load
from tell.data.turns import to_messages
from tell.errors import TellError

ASK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = [
    ({"messages": ASK}, "messages", ["Hi", "Hello"]),
    ({"messages": json.dumps(ASK)}, "messages", ["Hi", "Hello"]),
    ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}}, "messages", ["Hi", "Hello"]),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        "ShareGPT conversations",
        ["Hi", "Hello"],
    ),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt/completion", ["Hi", "Hello"]),
    ({"prompt": ASK[:1], "completion": ASK[1:]}, "prompt/completion", ["Hi", "Hello"]),
    ({"prompt": ASK[:1], "completion": "Hello"}, "prompt/completion", ["Hi", "Hello"]),
    ({"prompt": "Hi", "response": "Hello"}, "prompt/response", ["Hi", "Hello"]),
    ({"query": "Hi", "response": "Hello"}, "query/response", ["Hi", "Hello"]),
    ({"input": "Hi", "output": "Hello"}, "input/output", ["Hi", "Hello"]),
    ({"question": "Hi", "answer": "Hello"}, "question/answer", ["Hi", "Hello"]),
    ({"Question": "Hi", "Answer": 4.5}, "Question/Answer", ["Hi", "4.5"]),
    ({"text": "Hi", "label": 1}, "text/label", ["Hi", "1"]),
    ({"instruction": "Sum", "input": "1 2", "output": "3"}, "Alpaca instruction/input/output", ["Sum\n1 2", "3"]),
    ({"instruction": "Sum", "input": "", "output": "3"}, "Alpaca instruction/input/output", ["Sum", "3"]),
    (
        {"instruction": "Sum", "context": "1 2", "response": "3"},
        "Alpaca instruction/context/response",
        ["Sum\n1 2", "3"],
    ),
    (
        {"system": "Be brief", "prompt": "Hi", "response": "Hello"},
        "system/prompt/response",
        ["Be brief", "Hi", "Hello"],
    ),
    (
        {"query": "And you?", "response": "Too", "history": [["Well?", "Yes"]]},
        "history/query/response",
        ["Well?", "Yes", "And you?", "Too"],
    ),
    ({"prompt": "Hi", "completion": {"ü": [1, None]}}, "prompt/completion", ["Hi", '{"ü": [1, null]}']),
    ({"prompt": "Hi", "completion": [1, 2]}, "prompt/completion", ["Hi", "[1, 2]"]),
    ({"prompt": "Hi", "completion": False}, "prompt/completion", ["Hi", "false"]),
    ({"prompt": "Hi", "completion": 0}, "prompt/completion", ["Hi", "0"]),
]


@pytest.mark.parametrize(("row", "name", "contents"), ROWS)
def test_known_layouts(row, name, contents):
    layout = detect_layout([row])
    assert layout.name == name
    assert [turn.content for turn in to_messages(row, layout)] == contents


def test_a_column_given_by_hand_is_sharegpt_by_the_beginning_of_its_name():
    names = ("Conversation_1", "conversations_en", "messages_1", "dialog")
    shown = [detect_layout([{name: ASK}], columns=f"messages={name}").name for name in names]
    assert shown == ["ShareGPT Conversation_1", "ShareGPT conversations_en", "messages_1", "dialog"]


@pytest.mark.parametrize("known", LAYOUTS)
def test_every_known_layout_is_found_by_its_columns_and_preferred_as_declared(known):
    names = [known.prompt, *known.answers, *known.inputs]
    columns = find_columns(dict.fromkeys(names), dict.fromkeys(names))
    if not known.answers:
        assert columns == {"messages": known.prompt}
    elif known == next(other for other in LAYOUTS if other.prompt == known.prompt):
        wanted = {"prompt": known.prompt, "answer": known.answers[0]}
        assert columns == wanted | ({"input": known.inputs[0]} if known.inputs else {})


def test_roles_of_many_turns():
    turns = [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": role, "value": content} for role, content in turns]}
    messages = to_messages(row, detect_layout([row]))
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.content for m in messages] == ["S", "a", "b", "c", "d"]


def test_a_later_row_may_bring_an_input_column():
    rows = [{"instruction": "A", "output": "1"}, {"instruction": "B", "output": "2", "input": "x"}]
    layout = detect_layout(rows)
    assert [to_messages(row, layout)[0].content for row in rows] == ["A", "B\nx"]


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_answers_that_are_not_strings_survive_as_json(value):
    row = {"prompt": "q", "completion": {"value": value}}
    try:
        answer = to_messages(row, detect_layout([row]))[-1].content
    except RowFault as fault:
        assert "surrogate" in str(fault)
    else:
        assert json.loads(answer) == {"value": value}


@pytest.mark.parametrize(
    ("columns", "contents"),
    [
        ("prompt=q,answer=a", ["Q", "A"]),
        ("prompt = q , completion = a, system=s", ["S", "Q", "A"]),
        ("question=q,label=a,context=s", ["Q\nS", "A"]),
        ("messages=dialog", ["Hi", "Hello"]),
    ],
)
def test_columns_by_name(columns, contents):
    row = {"q": "Q", "a": "A", "s": "S", "dialog": ASK}
    assert [turn.content for turn in to_messages(row, detect_layout([row], columns=columns))] == contents


def test_columns_that_only_add_to_what_is_detected():
    row = {"prompt": "Q", "response": "A", "rules": "S"}
    assert detect_layout([row], columns="system=rules").columns == {
        "prompt": "prompt",
        "answer": "response",
        "system": "rules",
    }


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ("prompt=qestion,answer=a", "there is no column 'qestion' in f.csv; did you mean 'question'?"),
        ("promt=question,answer=a", "unknown part 'promt'; did you mean prompt?"),
        ("question", "'question' is not of the form part=column"),
        ("prompt=question", "'prompt=question' names no answer column"),
        ("prompt=a,query=question,answer=a", "prompt is named twice"),
        ("messages=a,prompt=question", "names messages and also prompt"),
    ],
)
def test_wrong_columns(columns, what):
    with pytest.raises(TellError) as caught:
        detect_layout([{"question": "Q", "a": "A", "b": "B"}], columns=columns, where="f.csv")
    assert caught.value.where == "--columns" and what in caught.value.what and caught.value.remedy


def test_unknown_layout_lists_the_columns():
    with pytest.raises(
        TellError, match=r"f.csv: has the columns 'frage', 'antwort', .*--columns prompt=frage,answer=antwort"
    ):
        detect_layout([{"frage": "Q", "antwort": "A"}], where="f.csv")


def test_one_column_is_not_enough():
    for row in ({"prompt": "Q"}, {"id": 1, "frage": "Q", "uid": "x"}, {"": 1, "frage": "Q", "leer": None}):
        with pytest.raises(TellError, match="a column of prompts and a column of answers"):
            detect_layout([row])


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"id": 7, "frage": "Q", "antwort": "A"}, "prompt=frage,answer=antwort"),
        (
            {"row_id": 7, "label": "x", "sentence1": "Q", "sentence2": "R"},
            "prompt=sentence1,input=sentence2,answer=label",
        ),
        ({"userId": 1, "premise": "P", "hypothesis": "H", "label": 1}, "prompt=premise,input=hypothesis,answer=label"),
        ({"the text": "Q", "class": "A"}, '"prompt=the text,answer=class"'),
        (
            {"text": "Q", "options": ["a"], "accept": ["a"], "answer": "reject"},
            "prompt=text,input=options,answer=accept",
        ),
        ({"question": "Q", "choices": ["a"], "answerKey": "A"}, "prompt=question,input=choices,answer=answerKey"),
        ({"question_stem": "Q", "choices": ["a"], "answer": "A"}, "prompt=question_stem,input=choices,answer=answer"),
    ],
)
def test_columns_that_are_suggested_exist_and_are_no_ids(row, columns):
    with pytest.raises(TellError) as caught:
        detect_layout([row], flag="--general-columns")
    assert caught.value.remedy == f"Name them, e.g. --general-columns {columns}."
    assert detect_layout([row], columns=columns.strip('"')).columns["answer"] in row


def test_three_columns_of_a_prompt_have_to_be_written_into_one():
    row = {"passage": "P", "question": "Q", "options": ["a"], "target": 1}
    with pytest.raises(TellError, match="Write 'passage', 'question', 'options' into one column named prompt, and the"):
        detect_layout([row])


LOST = [
    (
        {"question": "Q", "passage": "P", "answer": True},
        "'passage' next to the prompt 'question'",
        "--columns prompt=passage,input=question,answer=answer to join them, or pass --columns",
    ),
    (
        {"question": "Q", "text": "T", "label": "L"},
        "'question' next to the prompt 'text'",
        "--columns prompt=text,input=question,answer=label to join them",
    ),
    ({"question": "Q", "choices": ["a", "b"], "answer": 0}, "'choices'", " into the column of prompts, or pass"),
    ({"question": "Q", "A": "a", "B": "b", "answer": "A"}, "'A', 'B'", " into the column of prompts, or pass"),
    ({"article": "T", "question": "Q", "options": ["a"], "answer": "A"}, "'article', 'options'", "Write them into the"),
]


@pytest.mark.parametrize(("row", "what", "remedy"), LOST)
def test_columns_of_the_prompt_are_not_lost(row, what, remedy):
    with pytest.raises(TellError) as caught:
        detect_layout([{**row, "id": 1}] * 3, where="f.jsonl")
    assert what in caught.value.what and remedy in caught.value.remedy and caught.value.where == "f.jsonl"
    plain = caught.value.remedy.rpartition("--columns ")[2].partition(" to ")[0]
    assert detect_layout([row], columns=plain).unused
    if "input=" in caught.value.remedy:
        joined = caught.value.remedy.partition("--columns ")[2].partition(" to ")[0]
        text = to_messages(row, detect_layout([row], columns=joined))[0].content
        assert text in ("P\nQ", "T\nQ")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "I", "output": "O", "text": "Below is an instruction: I Response: O"},
        {"question": "Q", "passage": "", "choices": None, "answer": "A"},
        {"text": "T", "a": 5, "label": "L"},
    ],
)
def test_columns_that_say_nothing_new(row):
    assert detect_layout([row]).required[0] in row


def test_a_column_repeats_the_prompt_though_not_in_every_row():
    rows = [{"instruction": f"I {n} ", "output": "O", "text": f"Now: I {n} Response: O"} for n in range(30)]
    assert detect_layout([*rows, {**rows[0], "text": "cut"}]).unused == ("text",)
    with pytest.raises(TellError, match="'text' next to the prompt 'instruction'"):
        detect_layout([{**row, "text": "cut"} if n % 3 else row for n, row in enumerate(rows)])


def test_columns_not_used_are_named(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "id": 1, "_hash": 3, "mood": "x", "topic": "y"}]
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(rows[0]))
    assert load(str(path)).notices == ("f.jsonl: columns not used: mood, topic",)
    many = {f"extra {i}": "x" for i in range(2000)}
    path.write_text(json.dumps(rows[0] | many))
    assert load(str(path)).notices[0].endswith("and 1,994 more")


def test_the_name_of_a_label_before_its_number():
    row = {"text": "t", "label": 1, "label_text": "spam"}
    assert to_messages(row, detect_layout([row]))[-1].content == "spam"


FAULTS = [
    ({"prompt": "q", "completion": ""}, "has no answer (column 'completion' is empty)"),
    ({"prompt": "q", "completion": " \n"}, "has no answer"),
    ({"prompt": "q", "completion": None}, "has no answer"),
    ({"prompt": "q"}, "has no answer (column 'completion' is missing)"),
    ({"prompt": "", "completion": "a"}, "has no prompt"),
    ({"prompt": "q", "completion": "half \ud83d"}, "half of a surrogate pair (\\ud83d)"),
]
CONVERSATION_FAULTS = [
    (ASK[:1], "ends with a user turn"),
    (ASK[1:], "has no user turn before the answer"),
    ([], "has no list of turns"),
    (None, "has no list of turns"),
    ("text", "has no list of turns"),
    (["Hi"], "turn 1 is not an object"),
    ([{"role": "narrator", "content": "x"}, *ASK], "turn 1 has the role 'narrator'"),
    ([{"content": "x"}, *ASK], "turn 1 has the role None"),
    ([*ASK, {"role": "system", "content": "x"}, *ASK], "turn 3 is a system turn"),
    ([{"role": "user", "content": ""}, ASK[1]], "turn 1 is empty"),
    ([ASK[0], {"role": "assistant", "content": None}], "has no answer"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, ASK[1]], "turn 1 has parts that are not text"),
]
GOOD = {"prompt": "p", "completion": "c"}
ALL_FAULTS = [(GOOD, bad, what) for bad, what in FAULTS]
ALL_FAULTS += [({"messages": ASK}, {"messages": bad}, what) for bad, what in CONVERSATION_FAULTS]


@pytest.mark.parametrize(("good", "bad", "what"), ALL_FAULTS)
def test_bad_rows_name_file_and_line(tmp_path, good, bad, what):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, good, bad, good])))
    with pytest.raises(TellError) as caught:
        load(str(path))
    assert caught.value.where == f"{path}:3"
    assert what in caught.value.what and caught.value.remedy
    general = load(str(path), name="general")
    assert len(general.examples) == 3
    assert general.dropped == (("f.jsonl:3", caught.value.what),)


@pytest.mark.parametrize(
    "other", [{"messages": ASK}, {"question": "q", "answer": "a"}, {}, {"prompt": "q", "response": "a"}]
)
def test_mixed_layouts(tmp_path, other):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, other])))
    for name in ("task", "general"):
        with pytest.raises(TellError, match="line 1 has prompt, completion: two layouts are mixed") as caught:
            load(str(path), name=name)
        assert caught.value.where == f"{path}:2"


def test_first_row_without_an_answer(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "q"}, GOOD])))
    with pytest.raises(TellError, match="has no answer") as caught:
        load(str(path))
    assert caught.value.where == f"{path}:1"


def test_conversations_in_csv_cells(tmp_path):
    path = tmp_path / "f.csv"
    cell = json.dumps(ASK).replace('"', '""')
    path.write_text(f'messages\n"{cell}"\nnot json\n')
    with pytest.raises(TellError, match="has no list of turns") as caught:
        load(str(path))
    assert caught.value.where == f"{path}:3"
    assert [m.content for m in load(str(path), bad_rows="drop").examples[0].messages] == ["Hi", "Hello"]
