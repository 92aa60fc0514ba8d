"""Calibration sets: exact, deterministic, nested, disjoint; and refused with numbers where the text is too short."""

import json

import datasets
import pytest
import torch
from exports import TOKENIZER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from llmdrop.calibration import SOURCES, Calibration, batches, load_calibration
from llmdrop.data.texts import Documents, available_sources

EOS, BOS = 1, 2


class Tokenizer:
    """A text is its ids, spelled out: "7 8 9" -> [7, 8, 9]."""

    bos_token_id, eos_token_id = BOS, EOS

    def __init__(self, add_bos: bool = False):
        self.add_bos, self.n_texts = add_bos, 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if isinstance(text, str):
            return {"input_ids": [BOS] * (self.add_bos and add_special_tokens) + [int(i) for i in text.split()]}
        self.n_texts += len(text)
        return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}


@pytest.fixture
def whole_texts(monkeypatch):
    """Nothing held out: how text is cut is seen on texts of a few documents, that all open alike."""
    monkeypatch.setattr("llmdrop.data.texts.is_held_out", lambda document: False)


@pytest.fixture
def mirror(tmp_path, monkeypatch, whole_texts):
    """Writes documents of consecutive, never repeated ids as the source "toy"; returns the writer."""
    monkeypatch.setitem(SOURCES, "toy", Documents("toy/set", None, "train", "numbers"))

    def write(lengths: list[int]) -> str:
        start, rows = 10, []
        for length in lengths:
            rows.append({"text": " ".join(map(str, range(start, start + length)))})
            start += length
        file = tmp_path / "toy/set/default/train.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return write


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.integers(2, 12),
    st.integers(0, 9),
    st.booleans(),
    st.data(),
)
def test_samples_are_nested_disjoint_and_full(mirror, lengths, seq_len, seed, add_bos, data):
    data_dir, tokenizer = mirror(lengths), Tokenizer(add_bos)
    n = 0
    while True:  # the most there is
        try:
            whole = load_calibration("toy", tokenizer, n + 1, seq_len, seed, data_dir)
        except ValueError:
            break
        n += 1
    own = seq_len - add_bos
    assert n <= (sum(lengths) + len(lengths) * 9) // own
    if n == 0:
        return
    ids = whole.input_ids
    assert ids.shape == (n, seq_len) and ids.dtype == torch.int64 and whole.attention_mask is None
    assert (ids[:, 0] == BOS).all() or not add_bos
    tokens = ids[ids > BOS].tolist()
    assert len(set(tokens)) == len(tokens)  # no token twice
    k = data.draw(st.integers(0, n - 1))
    rest = load_calibration("toy", Tokenizer(add_bos), n - k, seq_len, seed, data_dir, skip=k)
    assert torch.equal(rest.input_ids, ids[k:])
    if k:
        assert torch.equal(load_calibration("toy", tokenizer, k, seq_len, seed, data_dir).input_ids, ids[:k])


def test_no_document_in_two_samples_while_there_are_new_ones(mirror):
    lengths = [3, 50, 8, 20, 5, 70, 9, 30, 11, 40]
    data_dir = mirror(lengths)
    ends = torch.tensor(lengths).cumsum(0) + 10
    for seed in range(5):
        ids = load_calibration("toy", Tokenizer(), 4, 10, seed, data_dir).input_ids
        documents = [set(torch.bucketize(row[row > BOS], ends, right=True).tolist()) for row in ids]
        assert sum(map(len, documents)) == len(set.union(*documents))


def test_only_what_is_needed_is_tokenized(mirror):
    data_dir, tokenizer = mirror([30] * 500), Tokenizer()
    load_calibration("toy", tokenizer, 3, 20, 0, data_dir)
    assert tokenizer.n_texts <= 16


def test_seeds_differ_and_repeat(mirror):
    data_dir = mirror([15] * 50)
    digests = [load_calibration("toy", Tokenizer(), 4, 10, seed, data_dir).digest for seed in (0, 1, 0)]
    assert digests[0] == digests[2] != digests[1]


def test_repeated_documents_count_once(mirror, tmp_path):
    data_dir = mirror([20])
    file = tmp_path / "toy/set/default/train.jsonl"
    file.write_text(file.read_text() * 10)
    with pytest.raises(ValueError, match="20 tokens in 1 documents"):
        load_calibration("toy", Tokenizer(), 3, 10, 0, data_dir)


PACKAGED = ["xsum", "multilexsum", "boolq", "quac", "questions", "dialogue", "narrativeqa", "wiki", "squad", "tales"]
PACKAGED += ["abstracts", "reviews", "stdlib", "libraries", "asdiv"]


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_sources(name):
    class Bytes(Tokenizer):
        def __call__(self, text, **kwargs):
            return {
                "input_ids": [list(one.encode()) for one in text] if isinstance(text, list) else list(text.encode())
            }

    found = load_calibration(name, Bytes(), n_samples=8, seq_len=64)
    assert found.input_ids.shape == (8, 64) and found.source.startswith(name)


def test_available_sources(mirror):
    assert available_sources() == PACKAGED and available_sources("hub") == list(SOURCES)
    assert available_sources(mirror([30])) == [*PACKAGED, "toy"]


def test_a_source_of_ones_own(monkeypatch):
    """Anything with documents and a place they come from: the core asks no more, and no mirror holds it."""

    class Own:
        where = "my shelf"

        def documents(self, data_dir):
            return [f"{data_dir} {k} 5" for k in range(10, 30)]

    monkeypatch.setitem(SOURCES, "own", Own())
    made = load_calibration("own", Tokenizer(), 2, 3, data_dir="7")
    assert (made.input_ids[:, 0] == 7).all() and made.source.startswith("own (my shelf)")
    assert "own" in available_sources()


def test_too_little_text_says_how_much_there_is_and_is_needed(mirror):
    data_dir = mirror([30, 30])
    with pytest.raises(ValueError, match=r"60 tokens in 2 documents: enough for 3 samples of 20.* 9 .*need 180 tokens"):
        load_calibration("toy", Tokenizer(), 8, 20, 0, data_dir, skip=1)
    with pytest.raises(ValueError, match="0 tokens in 1 documents"):
        load_calibration("toy", Tokenizer(), 1, 20, 0, mirror([0]))


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown calibration 'c5'; these are known: xsum,.*c4"):
        load_calibration("c5", Tokenizer())


@pytest.mark.parametrize("sizes", [{"n_samples": 0}, {"seq_len": 1}, {"skip": -1}])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="need at least"):
        load_calibration("xsum", Tokenizer(), **sizes)


# ---- files, strings, datasets

DOCUMENTS = [" ".join(str(k) for k in range(start, start + 12)) for start in range(100, 1300, 100)]


def written(tmp_path, kind: str):
    """The same documents as each kind of source."""
    if kind in (".jsonl", "path of a .jsonl"):
        file = tmp_path / "own.jsonl"
        file.write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in DOCUMENTS) + "\n\n")
        return str(file) if kind == ".jsonl" else file
    if kind == "dataset":
        return datasets.Dataset.from_dict({"other": [1] * len(DOCUMENTS), "text": DOCUMENTS})
    return DOCUMENTS if kind == "list" else (text for text in DOCUMENTS)


@pytest.mark.usefixtures("whole_texts")
@pytest.mark.parametrize("kind", [".jsonl", "path of a .jsonl", "dataset", "list", "generator"])
def test_other_sources_are_cut_as_named_ones(kind, tmp_path, monkeypatch):
    file = tmp_path / "toy/set/default/train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    monkeypatch.setitem(SOURCES, "toy", Documents("toy/set", None, "train", "numbers"))
    for settings_ in ({}, {"seed": 3}, {"skip": 2}):
        named = load_calibration("toy", Tokenizer(), 5, 10, data_dir=tmp_path, **settings_)
        made = load_calibration(written(tmp_path, kind), Tokenizer(), 5, 10, **settings_)
        assert torch.equal(made.input_ids, named.input_ids)
        assert made.source.startswith("own.jsonl" if "jsonl" in kind else "documents")


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(DOCUMENTS))
    made = load_calibration(file, Tokenizer(), 3, 20)
    assert torch.equal(made.input_ids, load_calibration([file.read_text()], Tokenizer(), 3, 20).input_ids)
    assert made.source.startswith("book.txt")
    assert EOS not in load_calibration(file, Tokenizer(), 1, 144).input_ids, "paragraphs were taken for documents"
    with pytest.raises(ValueError, match="book.txt has 144 tokens in 1 documents"):
        load_calibration(file, Tokenizer(), 8, 20)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "book.txt").write_text("\n\n".join(DOCUMENTS))
    made = load_calibration("~/book.txt", Tokenizer(), 3, 20)
    assert made.digest == load_calibration(tmp_path / "book.txt", Tokenizer(), 3, 20).digest


def test_a_line_of_a_file_ends_where_json_ends_it(tmp_path):
    """Other marks that Python takes for line ends stand in texts as they are."""
    file = tmp_path / "own.jsonl"
    texts = [f"{k} {mark} 7 8 9" for k, mark in enumerate("\u2028\u2029\x85\x0b\x0c\x1c", start=20)]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    made = load_calibration(file, Tokenizer(), 6, 4)
    assert torch.equal(made.input_ids, load_calibration(texts, Tokenizer(), 6, 4).input_ids)


def test_what_is_no_text_is_refused(tmp_path):
    def refused(source, error, message):
        with pytest.raises(error, match=message):
            load_calibration(source, Tokenizer(), 1, 4)

    refused(tmp_path / "none.txt", FileNotFoundError, "no file .*none.txt; give")
    (tmp_path / "folder.txt").mkdir()
    refused(tmp_path / "folder.txt", FileNotFoundError, "no file .*folder.txt")
    refused(str(tmp_path / "own.csv"), ValueError, "unknown calibration .*own.csv.*a .txt or .jsonl file")
    refused("A text as it is.", ValueError, "unknown calibration 'A text as it is.'")
    file = tmp_path / "own.jsonl"
    for line in ('{"text": ', '{"body": "5 6"}', '["5 6"]', "5"):
        file.write_text('{"text": "5 6 7 8"}\n' + line + "\n")
        refused(file, ValueError, 'own.jsonl: expected an object with "text" on every line')
    file.write_text('{"text": 5}\n')
    refused(file, TypeError, "documents must be text; one is a int")
    refused(["5 6 7 8", None], TypeError, "one is a NoneType")
    refused([[5, 6, 7, 8]], TypeError, "one is a list.*Calibration")
    refused(datasets.Dataset.from_dict({"body": ["5 6"]}), ValueError, 'has columns body; expected one called "text"')
    refused([], ValueError, "0 tokens in 0 documents")
    for name in ("own.txt", "own.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "\xff 5 6 7"}')
        refused(tmp_path / name, ValueError, f"{name}.*UTF-8")


# ---- Calibration


def test_own_ids():
    made = Calibration([[5, 6, 7], [8, 9, 0]], attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool))
    assert made.input_ids.dtype == made.attention_mask.dtype == torch.int64
    assert made.n_tokens == 5 and made.source == "custom"


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (torch.ones(2, 3), None, TypeError, "float32"),
        (torch.ones(2, 3, dtype=torch.bool), None, TypeError, "bool"),
        (torch.ones(3, dtype=torch.int64), None, ValueError, r"shape \(3,\)"),
        (torch.ones(0, 3, dtype=torch.int64), None, ValueError, r"shape \(0, 3\)"),
        (torch.tensor([[1, -100]]), None, ValueError, "-100"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 2), ValueError, r"attention_mask has shape \(2, 2\)"),
        (torch.ones(2, 3, dtype=torch.int64), torch.full((2, 3), 2), ValueError, "other than 0"),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]), ValueError, "without any token"),
    ],
)
def test_bad_ids_are_refused(ids, mask, error, message):
    with pytest.raises(error, match=message):
        Calibration(ids, attention_mask=mask)


def test_digest_sees_ids_shape_and_mask_and_nothing_else():
    ids = torch.arange(12).reshape(3, 4)
    same = [Calibration(ids), Calibration(ids.int(), source="x"), Calibration(ids.T.contiguous().T)]
    if torch.cuda.is_available():
        same.append(Calibration(ids.cuda()))
    other = [ids + 1, ids.reshape(4, 3), ids[:2]]
    masks = [torch.ones(3, 4), torch.tensor([[1, 1, 1, 0]] * 3)]
    assert len({c.digest for c in same}) == 1
    assert len({Calibration(i).digest for i in other} | {Calibration(ids, attention_mask=m).digest for m in masks}) == 5
    assert same[0].digest not in {Calibration(i).digest for i in other}


def test_batches_leave_padding_out_of_positions():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    ids = torch.arange(12).reshape(3, 4)
    made = list(batches(Calibration(ids, attention_mask=mask), 2, torch.device("cpu")))
    assert [rows for rows, _ in made] == [slice(0, 2), slice(2, 4)]
    assert torch.equal(torch.cat([inputs["input_ids"] for _, inputs in made]), ids)
    assert torch.equal(torch.cat([inputs["attention_mask"] for _, inputs in made]), mask)
    position = torch.cat([inputs["position_ids"] for _, inputs in made])
    assert position[mask.bool()].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert set(next(batches(Calibration(ids), 2, torch.device("cpu")))[1]) == {"input_ids"}


# ---- token ids as people have them


def loader(ids, mask, size):
    rows = [{"input_ids": i, "attention_mask": m, "token_type_ids": 0 * i} for i, m in zip(ids, mask, strict=True)]
    return DataLoader(rows, size)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=9), min_size=1, max_size=7), st.integers(1, 4))
def test_samples_of_any_length_are_padded_with_a_mask(samples, size):
    lengths = torch.tensor([len(sample) for sample in samples])
    width = int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask.bool()] = torch.tensor([token for sample in samples for token in sample])
    rows = [{"input_ids": sample, "token_type_ids": [0] * len(sample)} for sample in samples]
    tensors = [torch.tensor(sample) for sample in samples]
    forms = [samples, tensors, [tensor[None] for tensor in tensors], rows, {"input_ids": samples}, iter(tensors)]
    forms += [BatchEncoding({"input_ids": samples, "token_type_ids": samples}), datasets.Dataset.from_list(rows)]
    forms += [[[sample] for sample in samples], [tensor.numpy() for tensor in tensors]]
    for form in forms:
        made = Calibration(form)
        assert torch.equal(made.input_ids, ids)
        if len(set(lengths.tolist())) == 1:
            assert made.attention_mask is None
        else:
            assert torch.equal(made.attention_mask, mask)
    as_rows = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask}
    masked = [
        as_rows,
        BatchEncoding(as_rows),
        loader(ids, mask, size),
        [as_rows],
        {k: v.tolist() for k, v in as_rows.items()},
    ]
    for form in masked:
        made = Calibration(form)
        assert torch.equal(made.input_ids, ids) and torch.equal(made.attention_mask, mask)
    assert (
        Calibration(ids, attention_mask=mask).digest == Calibration(ids.tolist(), attention_mask=mask.tolist()).digest
    )
    assert torch.equal(Calibration({"input_ids": ids}, attention_mask=mask).attention_mask, mask)
    assert torch.equal(Calibration(DataLoader(TensorDataset(ids), size)).input_ids, ids)


def test_batches_of_different_widths_and_sides_keep_their_masks():
    left = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    made = Calibration([left, {"input_ids": torch.tensor([[7, 8, 9, 10]])}])
    assert made.input_ids.tolist() == [[0, 5, 6, 0], [7, 8, 9, 10]]
    assert made.attention_mask.tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]


def test_what_a_tokenizer_gives():
    texts = ["Layers go.", "A longer text than that one."]
    tokenizer = byte_tokenizer()
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    assert Calibration(padded).digest == Calibration(tokenizer(texts, padding=True)).digest
    plain = Calibration(tokenizer(texts, return_attention_mask=False))
    assert plain.n_tokens == Calibration(padded).n_tokens and plain.n_samples == 2
    assert TOKENIZER.pad_token is None
    made = Calibration(TOKENIZER(texts))  # no padding token is needed
    assert made.n_tokens == sum(map(len, TOKENIZER(texts)["input_ids"])) < made.input_ids.numel()


def test_what_holds_no_ids_is_named():
    listed = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10]]})
    pairs = DataLoader(TensorDataset(torch.ones(4, 3).long(), torch.ones(4, 3).long()), 2)
    cases = [
        ("A text.", TypeError, "a str is no token ids"),
        (["A text.", "Another."], TypeError, "a str is no token ids.*Texts go through llmdrop.load_calibration"),
        (None, TypeError, "a NoneType is no token ids"),
        (7, TypeError, "a int is no token ids"),
        ([[2**64, 1]], ValueError, "these are no token ids: .*give integers"),
        ([[1, None]], ValueError, "these are no token ids: .*give integers"),
        ([5, 6, 7], ValueError, r"shape \(3,\); expected \[n_samples, seq_len\]"),
        ([], ValueError, "there are no samples"),
        ([[5], []], ValueError, "or one without a token"),
        (DataLoader([]), ValueError, "there are no samples"),
        ([[5.0, 6.0], [7.0]], TypeError, "float32; token ids are integers"),
        ({"text": ["a"]}, ValueError, "a batch holds text; expected input_ids"),
        ([{}], ValueError, "a batch holds nothing; expected input_ids"),
        (DataLoader(listed, 2), ValueError, "put samples into columns.*set_format"),
        (pairs, ValueError, "a batch holds 2 tensors; say which"),
        (DataLoader([(ids, 1) for ids in torch.ones(4, 3).long()], 2), ValueError, "a batch holds 2 tensors"),
        ([(torch.ones(3).long(), torch.ones(3).long())], ValueError, "a batch holds 2 tensors"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 1, 0]]}, ValueError, "attention_mask has shape"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 1], [1, 0]]}, ValueError, "attention_mask has 2 samples"),
    ]
    for given_, error, message in cases:
        with pytest.raises(error, match=message):
            Calibration(given_)
    for source in ({"input_ids": [[5]]}, TOKENIZER(["a"]), datasets.DatasetDict(), None, 7):
        with pytest.raises(TypeError, match=r"is no text; give .*one split of a dataset, and to Calibration\(\)"):
            load_calibration(source, Tokenizer(), 1, 4)
    with pytest.raises(TypeError, match="one is a dict. Token ids go into Calibration()"):
        load_calibration(DataLoader([{"input_ids": torch.ones(3)}]), Tokenizer(), 1, 4)


# ---- datasets of the hub


def test_a_directory_that_datasets_can_load(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    made = load_calibration(tmp_path / "own", Tokenizer(), 5, 10)
    assert torch.equal(made.input_ids, load_calibration(DOCUMENTS, Tokenizer(), 5, 10).input_ids)
    assert made.source.startswith(str(tmp_path / "own"))
    stream = datasets.load_dataset(str(tmp_path / "own"), split="train", streaming=True)
    assert torch.equal(load_calibration(stream, Tokenizer(), 5, 10).input_ids, made.input_ids)


@pytest.mark.parametrize(
    "name, asked",
    [
        ("me/texts", ("me/texts", {"split": "train", "name": None})),
        ("me/texts/small", ("me/texts", {"split": "train", "name": "small"})),
        ("me/texts/small/test", ("me/texts", {"split": "test", "name": "small"})),
    ],
)
def test_a_dataset_of_the_hub(name, asked, monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_dict({"text": DOCUMENTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = load_calibration(name, Tokenizer(), 5, 10)
    assert calls == [asked]
    assert torch.equal(made.input_ids, load_calibration(DOCUMENTS, Tokenizer(), 5, 10).input_ids)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"body": DOCUMENTS}))
    with pytest.raises(ValueError, match='the dataset has columns body; expected one called "text"'):
        load_calibration(name, Tokenizer(), 5, 10)


def test_a_dataset_of_the_hub_in_a_mirror_or_out_of_reach(tmp_path, monkeypatch):
    file = tmp_path / "me/texts/default/train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    made = load_calibration("me/texts", Tokenizer(), 5, 10, data_dir=tmp_path)
    assert torch.equal(made.input_ids, load_calibration(DOCUMENTS, Tokenizer(), 5, 10).input_ids)
    with pytest.raises(FileNotFoundError, match="cannot get me/no-such/default/train from the hub"):
        load_calibration("me/no-such", Tokenizer(), 5, 10)  # the hub is not in reach of tests
