"""Whatever the installed lm-eval defines, and YAML files of one's own: rows are lm-eval's, data is where it is."""

import json
import logging
import math

import pytest
from lm_eval import evaluate as lm_evaluate
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from made_up import write
from tiny import byte_tokenizer, tiny

from llmdrop import DropPlan, dropped, evaluate, evaluate_sweep, save_model
from llmdrop.compress.variant import Variant
from llmdrop.data.mirror import read_split
from llmdrop.evaluation import tasks
from llmdrop.evaluation.evaluate import ask
from llmdrop.evaluation.lm_eval_models import DroppedLM
from llmdrop.evaluation.tasks import load_tasks, subset, task_digest, unread
from llmdrop.repro.quality import quality
from llmdrop.repro.store import Store

logging.getLogger("lm_eval").setLevel(logging.ERROR)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
LANGUAGES = ["de", "en", "es", "fr", "ja", "ko", "zh"]
MINE = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {validation: "%s"}}
output_type: %s
validation_split: validation
doc_to_text: "Question: {{q}}\\nAnswer:"
doc_to_target: " {{a}}"
"""


@pytest.fixture
def model():
    return tiny("llama", vocab_size=257, max_position_embeddings=2048)


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A mirror of data that no task in `tasks.YAML` reads."""
    root = tmp_path_factory.mktemp("mirror")
    lambada = [{"text": f"The river runs past the mill {word}"} for word in ("again", "twice", "today", "slowly")]
    write(root, "EleutherAI/lambada_openai/default/test", lambada)
    both = {"choices": ["yes", "no", "often"], "labels": [1, 1, 0]}
    truthful = [{"question": f"Is {i} even?", "mc1_targets": both, "mc2_targets": both} for i in range(5)]
    write(root, "truthfulqa/truthful_qa/multiple_choice/validation", truthful)
    for k, language in enumerate(LANGUAGES):
        paws = [{"sentence1": f"A is {i}.", "sentence2": f"It is {i + k}.", "label": i % 2} for i in range(3 + k % 3)]
        write(root, f"google-research-datasets/paws-x/{language}/test", paws)
        write(root, f"google-research-datasets/paws-x/{language}/train", paws[::-1] * 2)
    return root


@pytest.fixture
def mine(tmp_path):
    """A YAML file of one's own, and its rows beside it."""
    rows = [{"q": f"{i} + 1?", "a": str(i + 1)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "mine.yaml"
    file.write_text(MINE % (tmp_path / "rows.jsonl", "loglikelihood"))
    return file


def stock(model, tokenizer, name, monkeypatch, data_dir, limit, shots=None, **options) -> dict:
    """Results of lm-eval alone, its loader of datasets pointed at the mirror."""
    from datasets import Dataset, DatasetDict

    def load_dataset(path, name=None, **kwargs):
        folder = data_dir / path / (name or "default")
        splits = [file.name.partition(".")[0] for file in folder.iterdir()]
        return DatasetDict({split: Dataset.from_list(read_split(path, name, split, data_dir)) for split in splits})

    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", load_dataset)
        found = tasks._index().load(name)
    for task in found["tasks"].values():
        task.set_config("num_fewshot", shots or task.config.num_fewshot or 0)
        task.set_fewshot_seed(1234)
    samples = {part: subset(part, len(task.eval_docs), limit) for part, task in found["tasks"].items()}
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    return lm_evaluate(lm, found, samples=samples, bootstrap_iters=100, **options)


def check(rows, results) -> None:
    """Every row is one of lm-eval's results, and all of these are there."""
    expected = results["results"]
    keys = {(name, key.partition(",")[0]) for name in expected for key in expected[name] if "," in key}
    assert set(zip(rows["task"], rows["metric"], strict=True)) == {
        key for key in keys if not key[1].endswith("_stderr")
    }
    for row in rows.itertuples():
        assert row.value == pytest.approx(expected[row.task][f"{row.metric},none"], rel=1e-4)
        stderr = expected[row.task][f"{row.metric}_stderr,none"]
        assert math.isnan(row.stderr) if stderr == "N/A" else row.stderr == pytest.approx(stderr, rel=1e-4)
        assert row.version == str(results["versions"][row.task]) and row.num_fewshot == results["n-shot"][row.task]


@pytest.mark.parametrize(
    ("name", "shots"), [("lambada_openai", None), ("truthfulqa_mc2", None), ("paws_zh", 2), ("pawsx", None)]
)
def test_rows_are_lm_evals(model, tokenizer, rows, name, shots, monkeypatch):
    plans = {"whole": DropPlan(), "attn": DropPlan([1, 3])}
    found = evaluate_sweep(model, tokenizer, plans, [name], 3, rows, shots, progress=False)
    for plan in plans:
        with dropped(model, plans[plan]):
            check(found[found["plan"] == plan], stock(model, tokenizer, name, monkeypatch, rows, 3, shots))
    if name == "pawsx":
        assert set(found["task"]) == {"pawsx", *(f"paws_{language}" for language in LANGUAGES)}
        assert set(found[found["task"] == "pawsx"]["n"]) == {3 * len(LANGUAGES)}


@pytest.mark.parametrize(
    "options",
    [
        {"apply_chat_template": True},
        {"system_instruction": "Answer truthfully."},
        {"apply_chat_template": True, "system_instruction": "Be short.", "fewshot_as_multiturn": False},
    ],
)
def test_chat_template_and_system_prompt_are_lm_evals(model, tokenizer, rows, options, monkeypatch):
    prompts = set()
    count = HFLM.tok_encode
    monkeypatch.setattr(
        HFLM, "tok_encode", lambda self, text, **kwargs: prompts.add(text) or count(self, text, **kwargs)
    )
    found = evaluate(model, tokenizer, ["paws_zh"], 3, rows, 2, progress=False, **options)
    asked = prompts.copy()
    on_command_line = {"fewshot_as_multiturn": "apply_chat_template" in options} | options
    check(found, stock(model, tokenizer, "paws_zh", monkeypatch, rows, 3, 2, **on_command_line))
    assert asked == prompts
    (part,) = load_tasks(["paws_zh"], rows)["paws_zh"].values()
    lm = DroppedLM(str(save_model(model, tokenizer, rows.parent / f"m{len(str(options))}")), device="cpu")
    results = simple_evaluate(lm, tasks=[part], limit=1, task_manager=TaskManager(include_defaults=False), **options)
    assert 0 <= results["results"]["paws_zh"]["acc,none"] <= 1


def test_a_yaml_file_of_ones_own(model, tokenizer, mine, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "_index", lambda: pytest.fail("an index of all tasks takes 10 seconds"))
    settings = {"progress": False, "limit": 4}
    for data_dir in (None, mine.parent, "hub"):
        found = evaluate(model, tokenizer, [str(mine)], data_dir=data_dir, **settings)
        assert (
            set(found["task"]) == {"mine"} and {"acc", "perplexity"} <= set(found["metric"]) and set(found["n"]) == {4}
        )
    (records,) = ask(model, tokenizer, [DropPlan()], str(mine), **settings)
    assert [record["item"] for record in records] == subset("mine", 6, 4)
    assert [record["task"] for record in records] == ["mine"] * 4 and all(
        len(record["bytes"]) == 1 for record in records
    )
    assert unread(str(mine)) == 1 / 6

    variants = {"whole": Variant(), "attn": Variant(DropPlan([1]))}
    store = Store(mine.parent / "store")
    first = quality(model, tokenizer, variants, tasks=[str(mine)], store=store)
    capsys.readouterr()
    assert quality(model, tokenizer, variants, tasks=[str(mine)], store=store).equals(first)
    assert "measuring" not in capsys.readouterr().out
    before = task_digest(str(mine))
    mine.write_text(mine.read_text().replace("Question", "Q"))
    assert task_digest(str(mine)) != before
    changed = quality(model, tokenizer, variants, tasks=[str(mine)], store=store)
    assert "measuring" in capsys.readouterr().out and not changed.equals(first)


def test_a_group_of_ones_own_takes_tasks_beside_it_and_lm_evals(model, tokenizer, mine, rows):
    (mine.parent / "both.yaml").write_text(
        "group: both\ntask: [mine, truthfulqa_mc2]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = evaluate(model, tokenizer, [str(mine.parent / "both.yaml")], data_dir=rows, progress=False)
    by_task = found[found["metric"] == "acc"].set_index("task")
    assert set(by_task.index) == {"both", "mine", "truthfulqa_mc2"} and by_task["n"]["both"] == 11
    mean = (6 * by_task["value"]["mine"] + 5 * by_task["value"]["truthfulqa_mc2"]) / 11
    assert by_task["value"]["both"] == pytest.approx(mean)


def test_generated_answers_take_lm_evals_path_and_that_is_said_once(model, tokenizer, mine, capsys):
    text = MINE % (mine.parent / "rows.jsonl", "generate_until")
    mine.write_text(text + "generation_kwargs: {max_gen_toks: 3, do_sample: false, until: []}\n")
    plans = {"whole": DropPlan(), "attn": DropPlan([1])}
    found = evaluate_sweep(model, tokenizer, plans, [str(mine)], limit=2)
    assert set(found["metric"]) == {"exact_match"} and len(found) == 2
    assert capsys.readouterr().err.count("lm-eval generates the answers, plan by plan") == 1
    evaluate_sweep(model, tokenizer, plans, [str(mine)], limit=2, progress=False)
    assert "lm-eval generates" not in capsys.readouterr().err


def test_packaged_rows_serve_other_tasks_too(model, tokenizer):
    """lm-eval's BoolQ for encoder-decoders, on the packaged BoolQ, with examples of its packaged training rows."""
    (task,) = load_tasks(["boolq-seq2seq"], num_fewshot=1)["boolq-seq2seq"].values()
    assert len(task.eval_docs) == 3270 and task.config.num_fewshot == 1
    assert task.fewshot_context(task.eval_docs[0], 1).count("Question:") == 2


# ---- errors


def test_what_is_no_task_is_refused_in_a_sentence(model, tokenizer, rows, mine):
    for name, message in (
        ("lambada_openia", "unknown task 'lambada_openia'.*names like this one: .*lambada_openai.*path of a YAML"),
        ("nowhere.yaml", "unknown task 'nowhere.yaml'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, tokenizer, [name])
    for text, message in (
        ("task: [", "cannot read a task out of"),
        ("task: mine\noutput_typ: x", "out of .*output_typ"),
        ("question: 3", "Unknown config shape"),
        (mine.read_text().replace("loglikelihood", "guess"), "invalid output_type 'guess'"),
    ):
        bad = mine.with_name("bad.yaml")
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluate(model, tokenizer, [str(bad)])


def test_missing_data_examples_and_packages_are_named(rows, mine, monkeypatch):
    def no_hub(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nor anything else")

    monkeypatch.setattr("datasets.load_dataset", no_hub)
    with pytest.raises(
        FileNotFoundError, match="no data for task 'lambada': .*cimec/lambada/default/test.jsonl.* holds"
    ):
        load_tasks(["lambada"], rows)
    with pytest.raises(
        FileNotFoundError, match="no data for task 'lambada_openai': cannot read EleutherAI/lambada_openai"
    ):
        load_tasks(["lambada_openai"])
    with pytest.raises(
        FileNotFoundError, match="cannot read Rowan/hellaswag/default: Couldn't reach the hub or any.*Fix"
    ):
        load_tasks(["hellaswag"])
    (rows / "google-research-datasets/paws-x/ko/train.jsonl.gz").unlink()
    with pytest.raises(ValueError, match="paws_ko takes its 2 shots from .*ko/train.jsonl.*which does not exist"):
        load_tasks(["paws_ko"], rows, 2)
    assert len(load_tasks(["paws_ko"], rows)["paws_ko"]) == 1
    mine.write_text(mine.read_text() + "process_docs: !function needs.nothing\n")
    mine.with_name("needs.py").write_text("import a_package_that_is_not_here\n")
    with pytest.raises(ImportError, match="needs a package that is not here.*a_package_that_is_not_here"):
        load_tasks([str(mine)])


def test_no_chat_template_and_unknown_options_are_refused(model, tokenizer, mine):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*apply_chat_template"):
        evaluate(model, tokenizer, [str(mine)], apply_chat_template=True)
    with pytest.raises(TypeError, match="chat_template: not an option of evaluate; lm-eval's are apply_chat_template"):
        evaluate(model, tokenizer, [str(mine)], chat_template=True)
