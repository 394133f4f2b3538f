"""Exported value functions open again, here and in `transformers`, with the same numbers."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard

from iro_jax.guidance import Guide, function_scorer
from iro_jax.models import CheckpointError, Sampling, save_pretrained
from iro_jax.testing import word_tokenizer
from iro_jax.values import (
    Head,
    from_pretrained,
    merge_adapters,
    new_head,
    save_value,
    with_adapters,
)
from iro_jax.values.card import value_card
from iro_jax.values.store import opens_in_transformers
from tests.values import cases

# Its answers end often, by one of several tokens.
POLICY = cases.model(eos_ids=(cases.EOS, 20, 30, 40))
BARE = Head(bias=False)


def noisy(tree, scale=0.1):
    return jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.key(1), x.shape), tree)


def adapted(function, **options):
    """With adapters that do change something."""
    function = with_adapters(function, rank=3, seed=0, **options)
    adapters = noisy(function.params.adapters)
    return function.with_params(dataclasses.replace(function.params, adapters=adapters))


def with_large_head(function):
    """Values that differ by units."""
    head = jax.tree.map(lambda x: 20 * x + 0.01, function.params.head)
    return function.with_params(dataclasses.replace(function.params, head=head))


def texts(eos_ids=(cases.EOS,), count=6):
    """Prompts with answers; every other one ends with a token that ends answers."""
    rng = np.random.default_rng(0)
    return [
        np.append(
            rng.integers(9, 49, rng.integers(2, 14)), [eos_ids[i // 2 % len(eos_ids)]] * (i % 2)
        )
        for i in range(count)
    ]


def values_at_the_end(function, some):
    return np.array([cases.whole_values(function, text[:1], text[1:])[-1] for text in some])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def shared_policy(folder: Path, head=Head((8,)), layer=1):
    """A head that shares a frozen backbone, which is on disk under its name."""
    save_pretrained(POLICY, folder)
    return with_large_head(new_head(POLICY, head, layer=layer, source=str(folder)))


class TestIroJax:
    @pytest.mark.parametrize(
        ("head", "layer"),
        [
            (Head((8,)), 1),
            (Head(), None),
            (Head((8, 4), bias=False, output="sigmoid"), None),
            (Head(output="categorical", num_atoms=5, support=(-1.0, 2.0)), 0),
            (BARE, 1),
        ],
    )
    def test_a_head_that_shares_its_backbone(self, head, layer, tmp_path):
        function = shared_policy(tmp_path / "policy", head, layer)
        assert not opens_in_transformers(function)
        save_value(function, tmp_path / "value", card="# V")
        assert files(tmp_path / "value") == ["README.md", "value.json", "value_head.safetensors"]
        for given in (None, POLICY):
            found = from_pretrained(tmp_path / "value", backbone=given)
            assert found.network == function.network
            assert found.source == function.source
            assert found.frozen
            assert (found.params.backbone is POLICY.params) == (given is POLICY)
            for a, b in zip(
                jax.tree.leaves(found.params), jax.tree.leaves(function.params), strict=True
            ):
                np.testing.assert_array_equal(a, b)

    def test_a_score_model_goes_back_to_the_backbone_that_it_shares(self, tmp_path):
        """Otherwise a run's next value function would start from a network of its own."""
        function = shared_policy(tmp_path / "policy", BARE, None)
        assert opens_in_transformers(function)
        save_value(function, tmp_path / "value")
        shared = from_pretrained(tmp_path / "value", backbone=POLICY)
        assert shared.frozen
        assert shared.network == function.network
        assert shared.params.backbone is POLICY.params
        alone = from_pretrained(tmp_path / "value")
        assert alone.network.network.config.head == "score"
        some = texts()
        expected = values_at_the_end(function, some)
        for found in (shared, alone):
            np.testing.assert_allclose(values_at_the_end(found, some), expected, atol=1e-5)

    @pytest.mark.parametrize("adapters", [False, True])
    def test_a_head_with_a_backbone_of_its_own(self, adapters, tmp_path):
        function = with_large_head(new_head(cases.model(seed=7), Head((8,)), layer=1, source=None))
        if adapters:
            function = adapted(dataclasses.replace(function, source="another backbone"))
        save_value(function, tmp_path / "value")
        # A loaded policy of the same shape is not its backbone.
        for given in (None, POLICY):
            found = from_pretrained(tmp_path / "value", backbone=given)
            assert found.source is None
            want = values_at_the_end(function, texts())
            assert np.std(want) > 0.1
            np.testing.assert_allclose(
                values_at_the_end(found, texts()), want, atol=1e-4, rtol=1e-4
            )

    @pytest.mark.slow
    @pytest.mark.parametrize("on_policy", [True, False])
    def test_the_numbers_are_those_that_the_search_used(self, on_policy, tmp_path):
        if on_policy:
            sigmoid = shared_policy(tmp_path / "policy", Head((8,), output="sigmoid"))
            functions = [sigmoid, with_large_head(new_head(POLICY, BARE))]
        else:
            tuned = adapted(with_large_head(new_head(cases.model(seed=7), BARE)))
            functions = [tuned, cases.score_function(seed=2)]
        scorer, params, tokenizer = function_scorer(POLICY, functions, [2.0, 4.0], chunk_length=2)
        assert tokenizer is None
        guide = Guide(
            POLICY,
            scorer,
            params,
            sampling=Sampling(1.5),
            beam_width=2,
            num_successors=2,
            chunk_length=2,
            max_new_tokens=7,
            batch_size=2,
        )
        found = []
        for index, function in enumerate(functions):
            save_value(function, tmp_path / str(index))
            found.append(from_pretrained(tmp_path / str(index)))
        prompts = ["w1 w2", "w3", "w30 w31 w32 w9", "w5 w6"]
        ends = set()
        for prompt, guided in zip(prompts, guide(prompts), strict=True):
            for answer in guided.answers:
                ends.add(answer.finished)
                asked = guide.render(prompt)
                last = [cases.whole_values(f, asked, answer.tokens)[-1] for f in found]
                np.testing.assert_allclose(answer.values, last, atol=1e-3)
                assert answer.score == pytest.approx(last[0] / 2 + last[1] / 4, abs=1e-3)
        assert ends == {False, True}


class TestRewardModels:
    def test_any_of_them_is_a_value_function(self, tmp_path):
        function = cases.score_function()
        save_pretrained(function.model, tmp_path / "model")
        found = from_pretrained(tmp_path / "model")
        assert found.network == function.network
        np.testing.assert_array_equal(
            values_at_the_end(found, texts()), values_at_the_end(function, texts())
        )

    def test_a_language_model_is_none(self, tmp_path):
        save_pretrained(POLICY, tmp_path / "model")
        with pytest.raises(CheckpointError, match=r"model: neither a reward .*a language model"):
            from_pretrained(tmp_path / "model")


@pytest.mark.slow
class TestTransformers:
    """Batches padded on the right with the export's own padding."""

    @staticmethod
    def score(folder, some):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        model = model.eval().float()
        pad = model.config.pad_token_id
        assert pad is not None
        assert all(pad not in text for text in some)
        assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id == pad
        tokens = np.full((len(some), max(map(len, some))), pad)
        for row, text in enumerate(some):
            tokens[row, : len(text)] = text
        with torch.no_grad():
            scores = model(
                torch.tensor(tokens), attention_mask=torch.tensor(tokens != pad).long()
            ).logits
        return scores[:, 0].numpy()

    def pads_with(self, token=None):
        """The backbone, its tokenizer padding with another token."""
        tokenizer = word_tokenizer(cases.WORDS)
        tokenizer.pad_token = token
        return cases.model(tokenizer=tokenizer)

    @pytest.mark.parametrize("pad", ["<pad>", "<eos>", None, "</turn>"])
    @pytest.mark.parametrize("adapters", [False, True])
    def test_linear_heads_give_the_same_numbers(self, pad, adapters, tmp_path):
        function = with_large_head(new_head(self.pads_with(pad), BARE, source="somewhere"))
        if adapters:
            function = adapted(function)
        assert opens_in_transformers(function)
        save_value(function, tmp_path / "value", card="# V")
        assert (tmp_path / "value" / "README.md").read_text() == "# V"
        # Texts with every special token that a template writes.
        some = [*texts(), np.array([4, 6, 12, 5, 4, 7, 13, 5])]
        want = values_at_the_end(function, some)
        assert np.std(want) > 0.1
        np.testing.assert_allclose(self.score(tmp_path / "value", some), want, atol=1e-4, rtol=1e-4)
        ours = from_pretrained(tmp_path / "value")
        np.testing.assert_allclose(values_at_the_end(ours, some), want, atol=1e-4, rtol=1e-4)

    def test_a_score_network_that_was_trained(self, tmp_path):
        function = cases.score_function(seed=3)
        backbone = noisy(function.params.backbone)
        function = function.with_params(dataclasses.replace(function.params, backbone=backbone))
        save_value(function, tmp_path / "value")
        want = values_at_the_end(function, texts())
        np.testing.assert_allclose(
            self.score(tmp_path / "value", texts()), want, atol=1e-4, rtol=1e-4
        )

    def test_padding_is_no_token_that_ends_an_answer(self, tmp_path):
        """As with Qwen, whose padding is one of the two tokens that end answers."""
        model = cases.model(eos_ids=(0, cases.EOS))
        function = with_large_head(new_head(model, BARE))
        save_value(function, tmp_path / "value")
        some = texts(model.eos_ids)
        assert {0, cases.EOS} <= {int(text[-1]) for text in some}
        want = values_at_the_end(function, some)
        np.testing.assert_allclose(self.score(tmp_path / "value", some), want, atol=1e-4, rtol=1e-4)

    def test_padding_without_a_free_row_is_a_special_token_of_no_text(self, tmp_path):
        words = [f"w{i}" for i in range(cases.VOCABULARY - 10)]
        tokenizer = word_tokenizer([*words, "<spare>"])
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<turn>", "</turn>", "<spare>"]}
        )
        assert len(tokenizer) == cases.VOCABULARY
        tokenizer.pad_token = "<eos>"
        function = with_large_head(new_head(cases.model(tokenizer=tokenizer), BARE))
        save_value(function, tmp_path / "value")
        want = values_at_the_end(function, texts())
        np.testing.assert_allclose(
            self.score(tmp_path / "value", texts()), want, atol=1e-4, rtol=1e-4
        )
        assert json.loads((tmp_path / "value/config.json").read_text())["pad_token_id"] == 55


class TestBrokenExports:
    @pytest.fixture
    def folder(self, tmp_path):
        save_value(shared_policy(tmp_path / "policy"), tmp_path / "value")
        return tmp_path / "value"

    def refused(self, folder, message, **options):
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(folder, **options)

    def test_the_head_is_missing(self, folder):
        (folder / "value_head.safetensors").unlink()
        self.refused(folder, r"value_head\.safetensors: missing", backbone=POLICY)

    @pytest.mark.parametrize("size", [0, 7, 60, -1])
    def test_the_head_is_truncated(self, size, folder):
        path = folder / "value_head.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        self.refused(folder, r"value_head\.safetensors: missing, truncated", backbone=POLICY)

    def test_the_backbone_has_another_width(self, folder):
        wide = cases.model(width=32)
        self.refused(folder, r"value_head\.safetensors: .*width 32.*Got: .*16, 8", backbone=wide)

    def test_the_head_is_another_one(self, folder):
        change(folder, head={"hidden": [4]})
        self.refused(folder, r"value_head\.safetensors: .*\(16, 4\).*Got: .*\(16, 8\)")
        change(folder, head={"hidden": [8], "bias": False})
        self.refused(folder, r"value_head\.safetensors: ")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 99}, "expected format 1. Got: 99"),
            ({"layer": 3}, r"layer must be in 0..2. Got: 3"),
            ({"head": {"output": "tanh"}}, "description is broken .*tanh"),
            ({"head": {"depth": 3}}, "description is broken .*depth"),
            ({"head": None}, "description is broken"),
        ],
    )
    def test_the_description_is_broken(self, changes, message, folder):
        change(folder, **changes)
        self.refused(folder, rf"value\.json: .*{message}", backbone=POLICY)

    @pytest.mark.parametrize("field", ["format", "layer", "backbone", "head"])
    def test_the_description_is_incomplete(self, field, folder):
        change(folder, without=field)
        self.refused(folder, rf"value\.json: .*({field}|None)", backbone=POLICY)

    def test_the_description_is_no_json(self, folder):
        (folder / "value.json").write_text("{")
        self.refused(folder, r"value\.json: not valid JSON")

    def test_the_backbone_is_gone(self, folder):
        change(folder, backbone=str(folder / "nowhere"))
        self.refused(folder, "nowhere")


def change(folder, *, without=None, **fields):
    path = folder / "value.json"
    description = json.loads(path.read_text()) | fields
    description.pop(without, None)
    path.write_text(json.dumps(description))


class TestWriting:
    @pytest.mark.parametrize("kind", ["shared", "own", "transformers"])
    def test_the_folder_appears_whole_or_not_at_all(self, kind, tmp_path, monkeypatch):
        head = BARE if kind == "transformers" else Head((4,))
        source = "somewhere" if kind == "shared" else None
        function = new_head(POLICY, head, source=source)
        write = Path.write_bytes

        def fail(path, content):
            write(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", fail)
            with pytest.raises(OSError, match="No space left"):
                save_value(function, tmp_path / "value", card="# V")
        assert list(tmp_path.iterdir()) == []
        save_value(function, tmp_path / "value", card="# V")
        assert "README.md" in files(tmp_path / "value")
        before = {path: path.read_bytes() for path in (tmp_path / "value").iterdir()}
        with pytest.raises(FileExistsError, match="value: already exists"):
            save_value(function, tmp_path / "value")
        assert {path: path.read_bytes() for path in (tmp_path / "value").iterdir()} == before

    def test_saving_changes_nothing(self, tmp_path):
        function = adapted(new_head(POLICY, BARE, source="somewhere"))
        pad = POLICY.tokenizer.pad_token
        before = [np.asarray(x).copy() for x in jax.tree.leaves(function.params)]
        save_value(function, tmp_path / "value")
        assert function.network.adapters
        assert POLICY.tokenizer.pad_token == pad
        for a, b in zip(jax.tree.leaves(function.params), before, strict=True):
            np.testing.assert_array_equal(a, b)


class TestCard:
    FACTS: ClassVar = {
        "train": 120,
        "held_out": 30,
        "best_epoch": 1,
        "curve": [
            {"epoch": 0, "train_loss": 3.0, "held_out_loss": 4.0},
            {"epoch": 1, "train_loss": 1.23456, "held_out_loss": 2.5},
        ],
        "deciles": [{"predicted": 0.125, "observed": 0.25, "count": 17}],
    }

    def test_says_what_was_fitted_to_what_and_how_well(self):
        function = new_head(POLICY, Head((8,)), layer=1, source="org/model")
        card = ModelCard(value_card("reviews", "iter_0/value", function, self.FACTS))
        assert card.data.base_model == "org/model"
        assert card.data.library_name == "iro_jax"
        for fact in ("reviews", "120 rollouts", "30 rollouts", "epoch 1", "block 1", "[8]"):
            assert fact in card.text
        for line in ("| 1 | 1.235 | 2.5 |", "| 0.125 | 0.25 | 17 |"):
            assert line in card.text
        assert "AutoModel" not in card.text

    def test_says_with_what_it_opens(self):
        facts = {name: fact for name, fact in self.FACTS.items() if name != "deciles"}
        function = merge_adapters(adapted(new_head(POLICY, BARE)))
        card = ModelCard(value_card("reviews", "compressed", function, facts))
        assert "AutoModelForSequenceClassification" in card.text
        assert "Calibration" not in card.text
