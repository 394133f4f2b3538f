"""Other methods in a run: what they answer, what they may cost, and what is left out."""

import json
import logging
import re
import shutil
import subprocess

import pytest

from experiments import run as command
from experiments.report.page import write_page
from experiments.sweep import Point, sweep
from iro_jax.data import RolloutStore
from iro_jax.evaluation import Ledger
from iro_jax.models import save_pretrained
from iro_jax.testing import tiny_pretrained, word_tokenizer
from iro_jax.workdir import WorkdirError
from tests.experiments import tiny

pytestmark = pytest.mark.slow

GUIDED_BY_VALUES = (
    "blockwise",
    "blockwise_cdq",
    "controlled_decoding",
    "controlled_decoding_cdq",
    "q_sharp",
    "value_augmented",
)
GUIDED_BY_REWARD = ("args", "args_sampled", "cards")
GUIDED_BY_LOG_RATIO = ("implicit_best_of_n", "weak_to_strong")
RIVALS = (*GUIDED_BY_VALUES, *GUIDED_BY_REWARD, *GUIDED_BY_LOG_RATIO)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a reward model, a tuned model and every rival: its folder and its results."""
    root = tmp_path_factory.mktemp("rivals")
    tiny.write_all(root)
    tiny.write_model(root / "tuned", tiny.WORDS, seed=5)
    reward_model = tiny_pretrained(
        word_tokenizer(tiny.WORDS), head="score", seed=3, origin=root / "reward"
    )
    save_pretrained(reward_model, root / "reward")
    config = tiny.get_config(str(root))
    config.task.reward.update(kind="model", target=str(root / "reward"))
    config.loop.update(num_iterations=1, betas=1.0, compress=False)
    config.eval.rivals = RIVALS
    config.eval.tuned, config.eval.untuned = str(root / "tuned"), str(root / "policy")
    return root / "run", command.run_seed(config, root / "run", progress=False)


def rows(folder, method):
    lines = (folder / "eval" / method / "outputs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_answers_every_prompt_within_the_budget(finished, name):
    folder, results = finished
    [result] = [result for result in results if result.name == name]
    answers = rows(folder, name)
    assert len(answers) == len(result.reward) == 6
    assert [row["reward"] for row in answers] == result.reward.tolist()
    assert all(0 < row["num_tokens"] <= 6 for row in answers)
    ledger = Ledger(folder / "cost.jsonl")
    spent = ledger.totals(stage=f"eval/{name}").tokens_sampled
    # U = 4 candidates of H = 6 tokens for each of 6 prompts.
    assert 0 < spent <= 6 * 4 * 6


def test_the_reward_may_pick_where_a_method_has_several_answers(finished):
    _, results = finished
    of_each = {result.name: result.reward for result in results}
    for name in ("blockwise", *GUIDED_BY_LOG_RATIO):
        assert (of_each[f"{name}_picked"] >= of_each[name]).all()
    for name in ("args", "cards", "controlled_decoding"):
        assert f"{name}_picked" not in of_each


def test_queries_are_those_of_what_guides(finished):
    folder, _ = finished
    ledger = Ledger(folder / "cost.jsonl")
    greedy = ledger.totals(stage="eval/args")
    assert greedy.value_queries == greedy.tokens_sampled
    blocks = ledger.totals(stage="eval/blockwise")
    assert 0 < blocks.value_queries < blocks.tokens_sampled


def test_trees_tell_every_candidate_and_why_it_was_dropped(finished):
    folder, _ = finished
    place = folder / "eval" / "searches" / "iteration_1"
    store = RolloutStore.open(place)
    trees = json.loads((place / "trees.json").read_text())
    assert [tree["prompt_id"] for tree in trees] == list(store.shards[0].prompts)[:4]
    reasons = set()
    for tree in trees:
        nodes = tree["nodes"]
        answers = []
        for node in nodes:
            before = "" if node["parent"] is None else answers[node["parent"]]
            answers.append(before + node["text"])
            reasons.add(node["why"].split(",")[0])
            if node["parent"] is not None:
                parent = nodes[node["parent"]]
                assert parent["kept"]
                assert parent["step"] < node["step"]
        for step in {node["step"] for node in nodes}:
            siblings = [node for node in nodes if node["step"] == step]
            kept = [node["score"] for node in siblings if node["kept"]]
            assert len(kept) <= 2
            for node in siblings:
                assert node["kept"] == (node["why"] == "kept")
                if "below" in node["why"]:
                    assert kept
                    assert node["score"] < max(kept)
        found = [rollout for rollout in store.all() if rollout.prompt.id == tree["prompt_id"]]
        ends = [
            (answer.strip(), pytest.approx(node["score"]))
            for answer, node in zip(answers, nodes, strict=True)
            if node["finished"]
        ]
        assert found
        for rollout in found:
            assert (rollout.text.strip(), rollout.score) in ends
    assert "kept" in reasons
    assert len(reasons) > 1


@pytest.fixture(scope="module")
def page(finished):
    folder, _ = finished
    return write_page(folder, answers=50)


def test_the_page_needs_no_network_and_shows_every_method(finished, page):
    _, results = finished
    text = page.read_text()
    for outside in ("http://", "https://", "//cdn", 'src="/'):
        assert outside not in text
    for result in results:
        assert f"<td>{result.name}</td>" in text
    [data] = re.findall(r'id="data">(.*?)</script>', text)
    data = json.loads(data)
    assert len(data["answers"]) == 6
    assert {name for name, _, _ in data["answers"][0]["answers"]} == {r.name for r in results}
    assert {tree["search"] for tree in data["trees"]} >= {"iteration_1", "args", "cards"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium to open it in")
def test_the_page_opens_in_a_browser_without_an_error(page):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command_line = ["chromium", *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    [data] = re.findall(r'id="data">(.*?)</script>', page.read_text())
    first = json.loads(data)["trees"][0]
    assert len(re.findall(r'<button class="node', shown.stdout)) == len(first["nodes"])
    assert len(re.findall(r'<div class="answer">', shown.stdout)) > 10


def test_a_run_that_is_not_there_has_no_page(tmp_path):
    with pytest.raises(WorkdirError, match=r"no config\.json"):
        write_page(tmp_path)


def test_what_cannot_be_run_is_told_in_a_line_and_left_out(tmp_path, caplog):
    tiny.write_all(tmp_path)
    config = tiny.get_config(str(tmp_path))
    config.loop.update(num_iterations=1, betas=1.0, compress=False)
    config.eval.rivals = ("args", "weak_to_strong")
    with caplog.at_level(logging.WARNING):
        results = command.run_seed(config, tmp_path / "run", progress=False)
    names = {result.name for result in results}
    assert names == {"base", "best_of_4", "guided_sample_1", "iro_1"}
    messages = [record.getMessage() for record in caplog.records]
    assert "args is left out: the reward is no model that reads prefixes" in messages
    [line] = [message for message in messages if message.startswith("weak_to_strong")]
    assert line == "weak_to_strong is left out: there is no tuned model (eval.tuned, eval.untuned)"


def test_an_unknown_rival_is_told_before_any_work(tmp_path):
    tiny.write_all(tmp_path)
    config = tiny.get_config(str(tmp_path))
    config.eval.rivals = ("ars",)
    with pytest.raises(ValueError, match=r"eval.rivals must be of.*Got: 'ars'"):
        command.run_seed(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_a_run_for_each_point(tmp_path):
    tiny.write_all(tmp_path)
    config = tiny.get_config(str(tmp_path))
    config.loop.update(num_iterations=1, betas=1.0, compress=False)
    points = [
        Point("L = 2", {"search.chunk_length": 2}),
        # Another U: best-of-U has another name, and the picture needs the same methods everywhere.
        Point(
            "one hidden layer, L = 3, U = 6",
            {
                "search.chunk_length": 3,
                "value.head.hidden": (4,),
                "search.num_successors": 3,
            },
        ),
    ]
    folder = tmp_path / "sweep"
    text = sweep(config, points, folder, title="Chunk length", progress=False)
    assert config.search.chunk_length == 2
    for point in points:
        stored = json.loads((folder / point.folder / "config.json").read_text())
        assert stored["search"]["chunk_length"] == point.changes["search.chunk_length"]
        assert (folder / point.folder / "report" / "index.html").exists()
        assert text.count(f"| {point.label} |") == 3
    numbers = json.loads((folder / "sweep.json").read_text())
    assert set(numbers["L = 2"]) == {"base", "best_of_4", "guided_sample_1", "iro_1"}
    assert (folder / "sweep.png").read_bytes()[1:4] == b"PNG"
    assert sweep(config, points, folder, title="Chunk length", progress=False) == text
    with pytest.raises(ValueError, match="a label of its own"):
        sweep(config, [points[0]] * 2, folder, title="", progress=False)
