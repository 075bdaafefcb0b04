"""Text data by name: what the rows hold, how they are split, cut, packed and padded, and what bad input says."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from hift_ds.recipes import sources
from hift_ds.recipes.datasets import IGNORED, build_prompt, load_text_dataset

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = TEMPLATE):
    """One token per byte: lengths and contents can be counted by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(count: int) -> list[dict]:
    return [{"question": f"q{index}", "answer": f"a{index}"} for index in range(count)]


def answer_of(tokenizer, row: dict) -> str:
    return tokenizer.decode(row["labels"][row["labels"] != IGNORED])


def decoded(tokenizer, rows) -> list[str]:
    return [tokenizer.decode(rows[index]["input_ids"]) for index in range(len(rows))]


# chat rows


def test_chat_loss_covers_the_answer_and_its_end_and_nothing_else(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", [{"question": "2+2?", "answer": "four"}])
    data = load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0)
    assert data.kind == "chat"
    assert len(data.eval) == 0
    row = data.train[0]
    assert tokenizer.decode(row["input_ids"]) == "<|user|>2+2?<eos>\n<|assistant|>four<eos>\n"
    assert answer_of(tokenizer, row) == "four<eos>"
    learned = row["labels"] != IGNORED
    assert torch.equal(row["labels"][learned], row["input_ids"][learned])
    assert {tensor.dtype for tensor in row.values()} == {torch.int64}


def test_generation_prompt_is_the_start_of_the_training_row(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", [{"question": "2+2?", "answer": "four"}])
    row = load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0).train[0]
    prompt = build_prompt(tokenizer, [[{"role": "user", "content": "2+2?"}]])
    length = prompt["input_ids"].shape[1]
    assert prompt["attention_mask"].shape == (1, length)
    assert torch.equal(prompt["input_ids"][0], row["input_ids"][:length])
    assert row["labels"][length - 1] == IGNORED
    assert row["labels"][length] != IGNORED


def test_prompts_of_unlike_lengths_end_together_and_keep_their_system_message(tokenizer, tmp_path):
    rows = [{"system": "s", "question": "why?", "answer": "a"}, {"question": "q", "answer": "b"}]
    train = write_jsonl(tmp_path / "x_train.jsonl", rows)
    write_jsonl(tmp_path / "x_test.jsonl", rows)
    held_out = load_text_dataset(str(Path(train).parent), tokenizer, seq_len=64).held_out
    prompt = build_prompt(tokenizer, [one.messages for one in held_out])
    first, second = (tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*prompt.values(), strict=True))
    assert first == "<|system|>s<eos>\n<|user|>why?<eos>\n<|assistant|>"
    assert second == "<|user|>q<eos>\n<|assistant|>"
    assert bool(prompt["attention_mask"][:, -1].all()) and not prompt["attention_mask"][1, 0]


def test_every_answer_of_a_conversation_is_learned(tokenizer, tmp_path):
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"m{index}"} for index, role in enumerate(roles)]
    name = write_jsonl(tmp_path / "x.jsonl", [{"messages": messages}])
    row = load_text_dataset(name, tokenizer, seq_len=128, eval_fraction=0).train[0]
    assert answer_of(tokenizer, row) == "m2<eos>m4<eos>"


def test_answer_that_the_template_rewrites_later_is_context_only(tmp_path):
    stripping = TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last or message['role'] != 'assistant' else 'short' }}",
    )
    tokenizer = make_tokenizer(stripping)
    messages = [{"role": role, "content": f"m{index}"} for index, role in enumerate(["user", "assistant"] * 2)]
    name = write_jsonl(tmp_path / "x.jsonl", [{"messages": messages}])
    row = load_text_dataset(name, tokenizer, seq_len=128, eval_fraction=0).train[0]
    assert "short" in tokenizer.decode(row["input_ids"])
    assert answer_of(tokenizer, row) == "m3<eos>"


def test_template_that_hides_where_the_answer_begins_is_refused(tmp_path):
    tokenizer = make_tokenizer("{{ messages | length }}{{ messages[-1]['content'] }}")
    name = write_jsonl(tmp_path / "x.jsonl", questions(1))
    with pytest.raises(ValueError, match="chat template renders a prompt differently"):
        load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0)


def test_tokenizer_without_template_gets_a_plain_one_that_ends_in_eos(tmp_path):
    tokenizer = make_tokenizer(chat_template=None)
    name = write_jsonl(tmp_path / "x.jsonl", [{"question": "2+2?", "answer": "four"}])
    row = load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0).train[0]
    assert tokenizer.decode(row["input_ids"]) == "User: 2+2?\nAssistant: four<eos>\n"
    assert answer_of(tokenizer, row) == " four<eos>"
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "q", "answer": "a", "text": "unused"}, "q", "a"),
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"instruction": "q", "output": "a"}, "q", "a"),
        ({"instruction": "q", "input": "", "output": "a"}, "q", "a"),
        ({"instruction": "q", "input": "more", "output": "a"}, "q\n\nmore", "a"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q", "a"),
    ],
    ids=["question", "prompt", "instruction", "empty-input", "input", "messages"],
)
def test_each_column_layout_becomes_the_same_exchange(tokenizer, tmp_path, row, question, answer):
    name = write_jsonl(tmp_path / "x.jsonl", [row])
    data = load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0)
    expected = f"<|user|>{question}<eos>\n<|assistant|>{answer}<eos>\n"
    assert decoded(tokenizer, data.train) == [expected]


# files and folders


def test_json_list_csv_and_tsv_hold_the_same_rows_as_jsonl(tokenizer, tmp_path):
    rows = [{"question": '"hi", she says', "answer": "one, two"}, {"question": "q\u2028r", "answer": "é"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8"
    )
    (tmp_path / "c.csv").write_text(
        'question,answer\n"""hi"", she says","one, two"\nq\u2028r,é\n', encoding="utf-8-sig"
    )
    (tmp_path / "d.tsv").write_text('question\tanswer\n"hi", she says\tone, two\nq\u2028r\té\n', encoding="utf-8")
    read = [
        decoded(tokenizer, load_text_dataset(str(path), tokenizer, seq_len=64, eval_fraction=0).train)
        for path in sorted(tmp_path.iterdir())
    ]
    assert len(read[0]) == 2
    assert '"hi", she says<eos>' in read[0][0]
    assert read[0] == read[1] == read[2] == read[3]


@pytest.mark.parametrize("written", ["2020-01-01", "007", "NA", "1.50"])
def test_a_text_that_looks_like_something_else_stays_as_it_is_written(tokenizer, tmp_path, written):
    write_jsonl(tmp_path / "x.jsonl", [{"text": written}])
    (tmp_path / "y.csv").write_text(f"text\n{written}\n")
    data = load_text_dataset(str(tmp_path), tokenizer, seq_len=32, pack=False, eval_fraction=0)
    assert decoded(tokenizer, data.train) == [f"{written}<eos>"] * 2


def test_folder_is_read_in_sorted_order_without_hidden_or_foreign_files(tokenizer, tmp_path):
    for file in ["b/x.py", "a.txt", "c.md", ".git/y.txt", "z.bin"]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"I am {file}")
    (tmp_path / "empty.py").touch()
    data = load_text_dataset(str(tmp_path), tokenizer, seq_len=32, pack=False, eval_fraction=0)
    assert decoded(tokenizer, data.train) == ["I am a.txt<eos>", "I am b/x.py<eos>", "I am c.md<eos>"]


def test_folder_with_rows_ignores_its_readme_and_holds_the_test_file_out(tokenizer, tmp_path):
    (tmp_path / "README.md").write_text("about the data")
    write_jsonl(tmp_path / "my_train.jsonl", questions(3))
    write_jsonl(tmp_path / "my_test.jsonl", [{"question": "held", "answer": "out"}])
    data = load_text_dataset(str(tmp_path), tokenizer, seq_len=64)
    assert len(data.train) == 3
    assert decoded(tokenizer, data.eval) == ["<|user|>held<eos>\n<|assistant|>out<eos>\n"]
    assert [(one.question, one.answer) for one in data.held_out] == [("held", "out")]


def test_rows_with_empty_text_or_answer_are_left_out(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", [*questions(2), {"question": "q", "answer": " "}])
    assert len(load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0).train) == 2


# split


def test_split_is_disjoint_complete_and_the_same_for_the_same_seed(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", questions(50))

    def load(seed: int) -> tuple[list[str], list[str]]:
        data = load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0.1, seed=seed)
        return decoded(tokenizer, data.train), decoded(tokenizer, data.eval)

    train, held_out = load(seed=1)
    assert (len(train), len(held_out)) == (45, 5)
    assert len(set(train) | set(held_out)) == 50
    assert load(seed=1) == (train, held_out)
    assert load(seed=2)[1] != held_out


def test_single_document_holds_its_end_out_at_a_line_end(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("".join(f"line {index:04}\n" for index in range(100)))
    data = load_text_dataset(str(tmp_path / "x.txt"), tokenizer, seq_len=2000, pack=False, eval_fraction=0.052)
    assert decoded(tokenizer, data.train)[0].endswith("line 0093\n<eos>")
    assert decoded(tokenizer, data.eval)[0].startswith("line 0094\n")


def test_hift_faq_brings_its_own_held_out_paraphrases(tokenizer):
    data = load_text_dataset("hift-faq", tokenizer, seq_len=4096)
    folder = Path(sources.__file__).parent / "data"
    train, held_out = (
        [json.loads(line) for line in (folder / f"hift_faq_{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for part in ("train", "eval")
    )
    assert data.kind == "chat"
    assert (len(data.train), len(data.eval)) == (len(train), len(held_out))
    assert len(train) >= 150
    assert [(one.question, one.answer) for one in data.held_out] == [(r["question"], r["answer"]) for r in held_out]


def test_hift_facts_holds_out_wordings_of_every_fact_and_no_training_row():
    folder = Path(sources.__file__).parent / "data"
    train, held_out = (
        [json.loads(line) for line in (folder / f"hift_facts_{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for part in ("train", "eval")
    )
    answers = {row["fact"]: row["answer"] for row in train}
    assert len(set(answers.values())) == len(answers) >= 6
    assert all(answers[row["fact"]] == row["answer"] for row in train + held_out)
    assert {row["fact"] for row in held_out} == set(answers)
    asked = [set(re.findall(r"\w+", row["question"].lower())) for row in train]
    for row in held_out:
        words = set(re.findall(r"\w+", row["question"].lower()))
        assert max(len(words & other) / len(words | other) for other in asked) < 0.65, row["question"]
    examples, rest = sources.read_examples("hift-facts")
    assert (len(examples), len(rest)) == (len(train), len(held_out))


# lengths: cutting, packing, padding


def test_long_examples_are_cut_with_one_warning_that_counts_them(tokenizer, tmp_path):
    rows = [
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": "a" * 99},
        {"question": "q" * 99, "answer": "a"},
    ]
    name = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.warns(UserWarning, match="2 of 3 examples are longer than seq_len=64 .* 1 of them dropped") as record:
        data = load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0)
    assert len(record) == 1
    assert [len(data.train[index]["input_ids"]) for index in range(len(data.train))] == [27, 64]
    assert sum(len(row["input_ids"]) for row in data.train) == 27 + 64


def test_only_the_first_rank_warns(tokenizer, tmp_path, monkeypatch):
    name = write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a" * 99}])
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0)


def test_packed_text_is_the_documents_end_to_end_with_eos_between(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "defgh"}, {"text": "ij"}])
    data = load_text_dataset(name, tokenizer, seq_len=4, eval_fraction=0)
    assert data.kind == "text"
    # abc. defgh. ij. : 13 tokens, the last one fills no row
    assert decoded(tokenizer, data.train) == ["abc<eos>", "defg", "h<eos>ij"]
    assert [data.train[index]["position_ids"].tolist() for index in range(3)] == [
        [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1]
    ]  # fmt: skip
    row = data.train[2]  # the first token of a document is predicted from nothing
    assert row["labels"].tolist() == [*row["input_ids"][:2].tolist(), IGNORED, row["input_ids"][3]]
    assert "attention_mask" not in row and data.packed


@pytest.mark.parametrize(
    ("text", "rows"),
    [("abcde", ["abcd", "e<eos>"]), ("abcd", ["abcd"])],
    ids=["two-tokens-left", "one-left-without-a-target"],
)
def test_packed_held_out_part_keeps_its_last_short_row(tokenizer, tmp_path, text, rows):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "abcdefg"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": text}])
    data = load_text_dataset(str(tmp_path), tokenizer, seq_len=4)
    assert decoded(tokenizer, data.eval) == rows


def test_packed_chat_keeps_conversations_whole_and_apart(tokenizer, tmp_path):
    """Conversations of 69 tokens: two fit a row, whole; the third has a row of its own."""
    name = write_jsonl(tmp_path / "x.jsonl", [{"question": "q" * 40, "answer": "abcd"}] * 3)
    data = load_text_dataset(name, tokenizer, seq_len=150, pack=True, eval_fraction=0)
    assert [answer_of(tokenizer, data.train[index]) for index in range(2)] == ["abcd<eos>" * 2, "abcd<eos>"]
    assert data.train[0]["position_ids"].tolist() == [*range(69), *range(69)]
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["position_ids"][1].tolist() == [*range(69), *[0] * 69]
    assert set(batch) == {"input_ids", "labels", "position_ids"} and (batch["labels"][1, 69:] == IGNORED).all()
    whole = load_text_dataset(name, tokenizer, seq_len=80, pack=True, eval_fraction=0)
    assert [len(whole.train[index]["input_ids"]) for index in range(3)] == [69] * 3


def test_collate_pads_on_the_right_without_loss_or_attention(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", [{"text": "abcd"}, {"text": "ab"}])
    data = load_text_dataset(name, tokenizer, seq_len=8, pack=False, eval_fraction=0)
    batch = data.collate([data.train[0], data.train[1]])
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[a, b, c, d, eos], [a, b, eos, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[a, b, c, d, eos], [a, b, eos, IGNORED, IGNORED]]


# bad input


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.txt", b"", r"x\.txt: the file is empty"),
        ("x.txt", b" \n\n", r"x\.txt: the file is empty"),
        ("x.jsonl", b"\n", r"x\.jsonl: the file is empty"),
        ("x.csv", b"question,answer\n", r"x\.csv: the file is empty"),
        ("x.jsonl", b'{"question": "q", "answer": ""}\n', "no row holds any text"),
        ("x.txt", b"caf\xe9 au lait", r"x\.txt: not a text file \(byte 0xe9 at offset 3\)"),
        ("x.txt", b"PK\x03\x04\x00\x00", r"byte 0x00 at offset 4"),
        ("x.csv", b"text\nab\xff\n", r"byte 0xff at offset 7"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2: not JSON"),
        ("x.json", b'[{"text": "a"},\n{"text" "b"}]', r"x\.json, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n"b"\n', r"line 2: a row is a JSON object .* not str"),
        ("x.jsonl", b'{"label": 1, "body": "b"}\n', r"line 1: the columns are 'label', 'body'; .*question, answer"),
        ("x.tsv", b"a film\t0\nanother\t1\n", r"line 2: the columns are 'a film', '0'"),
        ("x.jsonl", b'{"question": "q", "answer": 42}\n', r"line 1: answer=42 is not a string"),
        ("x.jsonl", b'{"text": null}\n', r"line 1: text=None is not a string"),
        ("x.csv", b"text\nhello, world\n", r"line 2: the row has not as many cells"),
        ("x.csv", b"text,label\nhello\n", r"line 2: the row has not as many cells"),
        ("x.csv", b'text\n"never closed\n', r"not a table"),
        ("x.jsonl", b'{"messages": "hi"}\n', r"messages='hi' is not a list"),
        ("x.jsonl", b'{"messages": [{"role": "bot", "content": "c"}]}\n', r"with a role \(system, user, assistant\)"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "c"}]}\n', r"roles are \['user'\]"),
        ("x.jsonl", b'{"messages": [{"role": "assistant", "content": "c"}]}\n', "starts with system or user"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": null}]}\n', "and a string as content"),
        ("x.jsonl", b'{"text": "a"}\n{"question": "q", "answer": "a"}\n', "some rows are text and some"),
        ("x.parquet", b"PAR1", r"extension '\.parquet' is unknown; a data file ends in \.txt, .*\.tsv"),
    ],
)
def test_bad_file_says_where_and_what(tokenizer, tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text_dataset(str(tmp_path / file), tokenizer, seq_len=64)


@pytest.mark.parametrize("name", ["missing.jsonl", "data/missing.csv", "/missing/folder", "./missing", "notes.pdf"])
def test_missing_file_is_said_without_asking_the_hub(tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_read_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; name one, .*\(hift-faq or hift-facts\)"):
        load_text_dataset(name, tokenizer, seq_len=64)


def test_folder_without_data_is_refused(tokenizer, tmp_path):
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="the folder holds no file that ends in"):
        load_text_dataset(str(tmp_path), tokenizer, seq_len=64)


def test_one_row_cannot_be_split(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="one row cannot be split"):
        load_text_dataset(write_jsonl(tmp_path / "x.jsonl", questions(1)), tokenizer, seq_len=64)


def test_prompts_that_fill_every_row_are_refused(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", [{"question": "q" * 99, "answer": "a"}])
    with (
        pytest.warns(UserWarning, match="1 of 1"),
        pytest.raises(ValueError, match="no training example has a token to learn among its first seq_len=64"),
    ):
        load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0)


def test_too_little_text_for_one_packed_row_is_refused(tokenizer, tmp_path):
    name = write_jsonl(tmp_path / "x.jsonl", [{"text": "abc"}])
    with pytest.raises(ValueError, match="its 4 training tokens do not fill one packed row of seq_len=64"):
        load_text_dataset(name, tokenizer, seq_len=64, eval_fraction=0)


@pytest.mark.parametrize(("key", "value"), [("seq_len", 1), ("eval_fraction", 1.0), ("eval_fraction", -0.1)])
def test_impossible_values_are_refused(tokenizer, key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}: "):
        load_text_dataset("hift-faq", tokenizer, **{"seq_len": 64, key: value})


def test_tokenizer_without_pad_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="load_tokenizer"):
        load_text_dataset("hift-faq", tokenizer, seq_len=64)


# hub names, with a stand-in for the network


@pytest.fixture
def hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(repository, config):
        asked.append((repository, config))
        if repository == "org/offline":
            raise ConnectionError("Couldn't reach the Hub\nsecond line")
        parts = {"train": questions(4), "test": questions(2)}
        return datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_name_takes_its_config_and_its_own_splits(tokenizer, hub):
    data = load_text_dataset("org/sums:main", tokenizer, seq_len=64)
    assert hub == [("org/sums", "main")]
    assert (len(data.train), len(data.eval)) == (4, 2)


def test_unreachable_hub_names_the_alternatives(tokenizer, hub):
    with pytest.raises(FileNotFoundError, match=r"'org/offline'.*\(Couldn't reach the Hub\); name a file, a folder"):
        load_text_dataset("org/offline", tokenizer, seq_len=64)


# real data


@pytest.mark.parametrize(
    ("file", "kind", "num_examples"),
    [("gsm8k_test.jsonl", "chat", 1319), ("banking77_test.csv", "text", 3080), ("identity.json", "chat", 91)],
)
def test_real_files_load_whole(tokenizer, file, kind, num_examples):
    if not (SHARED_DATA / file).is_file():
        pytest.skip(f"needs ../shared/data/{file} beside the repository")
    data = load_text_dataset(str(SHARED_DATA / file), tokenizer, seq_len=8192, pack=False)
    assert data.kind == kind
    assert len(data.train) + len(data.eval) == num_examples
    assert len(data.eval) == round(num_examples * 0.05)
