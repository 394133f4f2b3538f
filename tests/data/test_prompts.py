"""Prompts: four kinds of sources, one list; what is wrong is said with its line."""

import builtins
import json
import sys

import numpy as np
import pytest

from iro_jax.data import Prompt, PromptError, read_prompts, subset, write_prompts

CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? “é”"})


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


class TestPrompt:
    def test_json_round_trip(self):
        for prompt in (
            Prompt("a", "Once upon"),
            Prompt("b", CHAT, {"answer": [1, 2.5, None, "ü"], "big": 10**30}),
        ):
            assert Prompt.from_json(json.loads(json.dumps(prompt.to_json()))) == prompt

    def test_messages_and_reference_are_kept_as_json_has_them(self):
        prompt = Prompt("a", [dict(message) for message in CHAT], (1, 2))
        assert prompt.conversation == CHAT
        assert prompt.reference == [1, 2]
        assert len({prompt, Prompt("b", CHAT)}) == 2  # can be put into sets

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (("", "x"), "id"),
            ((3, "x"), "id"),
            (("a", ""), "empty"),
            (("a", []), "messages"),
            (("a", b"x"), "messages"),
            (("a", [{"role": "user"}]), "'role' and 'content'"),
            (("a", [{"role": "user", "content": "x", "tool": "y"}]), "nothing else"),
            (("a", "half a pair \ud800"), "surrogates"),
            (("a", "x", {1, 2}), "JSON"),
            (("a", "x", float("nan")), "JSON"),
        ],
    )
    def test_malformed_ones_are_refused(self, fields, message):
        with pytest.raises(ValueError, match=rf"(?s){message}.*Got: "):
            Prompt(*fields)


class TestJsonLines:
    def test_text_and_messages(self, tmp_path):
        rows = [
            {"prompt": "first", "key": 7, "gold": {"answer": 4}},
            {"prompt": list(CHAT), "key": "k", "gold": None, "unused": [1]},
        ]
        lines = "\n".join(json.dumps(row) for row in rows)
        path = write(tmp_path / "p.jsonl", "\ufeff" + lines + "\n\n")
        assert read_prompts(path, id_field="key", reference_field="gold") == [
            Prompt("7", "first", {"answer": 4}),
            Prompt("k", CHAT),
        ]
        assert len(read_prompts(path, limit=1)) == 1

    def test_what_was_written_is_read(self, tmp_path):
        prompts = [Prompt("a", "one\u2028line"), Prompt("b", CHAT, [1])]
        write_prompts(tmp_path / "p.jsonl", prompts)
        found = read_prompts(str(tmp_path / "p.jsonl"), id_field="id", reference_field="reference")
        assert found == prompts

    def test_default_ids_survive_another_order(self, tmp_path):
        rows = [json.dumps({"prompt": text}) for text in ("a", "b", "c")]
        one = read_prompts(write(tmp_path / "1.jsonl", "\n".join(rows)))
        other = read_prompts(
            write(tmp_path / "2.jsonl", "\n".join([*rows[::-1], '{"prompt":"d"}']))
        )
        assert {p.id: p.conversation for p in one}.items() <= {
            p.id: p.conversation for p in other
        }.items()
        assert len({p.id for p in other}) == 4

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": "cut', "JSON object"),
            ('["prompt"]', "JSON object"),
            ('{"prompt": NaN}', "NaN"),
            ('{"text": "x"}', "field 'prompt'"),
            ('{"prompt": 3}', "text, or messages"),
            ('{"prompt": null}', "text, or messages"),
            ('{"prompt": ""}', "empty"),
            ('{"prompt": [{"role": "user", "content": 1}]}', "both text"),
            ('{"prompt": "\\ud800"}', "surrogates"),
            (b'{"prompt": "\xff"}', "UTF-8.*0xff at column 13"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, line, message):
        good = b'{"prompt": "fine"}\n\n'  # the blank line counts
        line = line if isinstance(line, bytes) else line.encode()
        path = write(tmp_path / "p.jsonl", good + line + b'\n{"prompt": "also fine"}\n')
        with pytest.raises(PromptError, match=rf"p\.jsonl, line 3: .*{message}") as caught:
            read_prompts(path)
        assert "Got: " in str(caught.value)
        assert [p.conversation for p in read_prompts(path, limit=1)] == ["fine"]

    @pytest.mark.parametrize("value", ["true", "null", '""', "1.5", "[1]"])
    def test_an_id_is_text_or_an_integer(self, tmp_path, value):
        path = write(tmp_path / "p.jsonl", f'{{"prompt": "x", "id": {value}}}')
        with pytest.raises(PromptError, match=r"line 1: field 'id'.*Got: "):
            read_prompts(path, id_field="id")

    def test_duplicates(self, tmp_path):
        path = write(tmp_path / "p.jsonl", '{"prompt": "x"}\n{"prompt": "y"}\n{"prompt": "x"}')
        with pytest.raises(PromptError, match=r"line 3: .*duplicates='drop'.*line 1"):
            read_prompts(path)
        found = read_prompts(path, duplicates="drop")
        assert [prompt.conversation for prompt in found] == ["x", "y"]

    def test_one_id_with_two_contents_is_always_an_error(self, tmp_path):
        path = write(tmp_path / "p.jsonl", '{"prompt": "x", "r": 1}\n{"prompt": "x", "r": 2}')
        with pytest.raises(PromptError, match=r"line 2: .*Got: another prompt"):
            read_prompts(path, reference_field="r", duplicates="drop")


class TestCsv:
    def test_quotes_commas_and_newlines(self, tmp_path):
        path = write(
            tmp_path / "p.csv", '\ufeffname,prompt\r\na,"x, ""y"""\r\n\r\nb,"two\nlines"\r\n'
        )
        assert read_prompts(path, id_field="name") == [
            Prompt("a", 'x, "y"'),
            Prompt("b", "two\nlines"),
        ]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("a", "2 fields.*Got: 1"),
            ("a,b,c", "2 fields.*Got: 3"),
            ("a,", "empty"),
            (",b", "'name'"),
            ('a,"b"c', "CSV"),
            ('a,"never closed', "CSV"),
        ],
    )
    def test_a_broken_row_is_named_by_its_first_line(self, tmp_path, row, message):
        path = write(tmp_path / "p.csv", f'name,prompt\nz,"two\nlines"\n{row}\n')
        with pytest.raises(PromptError, match=rf"p\.csv, line 4: .*{message}"):
            read_prompts(path, id_field="name")

    def test_a_missing_column_lists_those_there_are(self, tmp_path):
        path = write(tmp_path / "p.csv", "question,answer\nx,y\n")
        with pytest.raises(PromptError, match=r"'prompt'.*\['answer', 'question'\]"):
            read_prompts(path)

    def test_columns_have_different_names(self, tmp_path):
        path = write(tmp_path / "p.csv", "prompt,prompt\nx,y\n")
        with pytest.raises(PromptError, match="line 1"):
            read_prompts(path)


class TestSources:
    @pytest.mark.parametrize("name", ["p.txt", "p", "missing.jsonl", "missing.csv"])
    def test_unknown_and_missing_files(self, tmp_path, name):
        with pytest.raises(PromptError, match=r"expected|must end.*Got: "):
            read_prompts(str(tmp_path / name))

    def test_a_source_without_prompts(self, tmp_path):
        for name, text in (("p.jsonl", "\n"), ("p.csv", "prompt\n"), ("q.csv", "")):
            with pytest.raises(PromptError, match="at least one"):
                read_prompts(write(tmp_path / name, text))

    def test_options(self, tmp_path):
        path = write(tmp_path / "p.jsonl", '{"prompt": "x"}')
        with pytest.raises(ValueError, match="limit"):
            read_prompts(path, limit=0)
        with pytest.raises(ValueError, match="duplicates"):
            read_prompts(path, duplicates="number")

    def test_without_datasets_the_extra_is_named(self, monkeypatch):
        real = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name == "datasets":
                raise ModuleNotFoundError("No module named 'datasets'")
            return real(name, *args, **kwargs)

        monkeypatch.delitem(sys.modules, "datasets", raising=False)
        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(ImportError, match=r"iro_jax\[hf\]"):
            read_prompts("hf:somewhere")

    @pytest.mark.needs("datasets")
    def test_hugging_face_on_disk(self, tmp_path):
        import datasets

        chats = [[dict(message) for message in CHAT], [{"role": "user", "content": "x"}]]
        data = datasets.Dataset.from_dict({"chat": chats, "gold": [[1.5], []], "key": [1, 2]})
        data.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "splits"))
        fields = {"prompt_field": "chat", "reference_field": "gold", "id_field": "key"}

        expected = [Prompt("1", CHAT, [1.5]), Prompt("2", tuple(chats[1]), [])]
        assert read_prompts(f"hf:{tmp_path}/one", **fields) == expected
        assert read_prompts(f"hf:{tmp_path}/splits", split="test", **fields) == expected
        with pytest.raises(PromptError, match=r"\['test'\]. Got: 'train'"):
            read_prompts(f"hf:{tmp_path}/splits", **fields)
        with pytest.raises(PromptError, match=r"row 0: .*'prompt'"):
            read_prompts(f"hf:{tmp_path}/one")

    @pytest.mark.needs("importlib_resources")  # tensorflow-datasets does, to write them
    def test_tensorflow_datasets_without_tensorflow(self, tmp_path):
        was_imported = "tensorflow" in sys.modules
        import tensorflow_datasets as tfds

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from ((i, {"text": f"Grüße {i}", "label": i}) for i in range(3))

        builder = Tiny(data_dir=str(tmp_path), file_format="array_record")
        builder.download_and_prepare()
        found = read_prompts(
            f"tfds:{builder.data_dir}", prompt_field="text", reference_field="label"
        )
        assert {p.conversation: p.reference for p in found} == {f"Grüße {i}": i for i in range(3)}
        with pytest.raises(PromptError, match="'test'"):
            read_prompts(f"tfds:{builder.data_dir}", split="test")
        assert ("tensorflow" in sys.modules) == was_imported


class TestSubset:
    PROMPTS = tuple(Prompt(f"p{i}", f"text {i}") for i in range(23))

    def ids(self, iteration, size, seed=0, prompts=PROMPTS):
        return [prompt.id for prompt in subset(prompts, iteration, size, seed)]

    def test_disjoint_while_prompts_last(self):
        drawn = [id for iteration in range(3) for id in self.ids(iteration, 7)]
        assert len(set(drawn)) == 21

    @pytest.mark.parametrize("size", [1, 5, 7, 12, 20, 22, 23])
    def test_every_pass_has_every_prompt_once(self, size):
        """However subsets straddle passes, no subset repeats, and use stays even."""
        counts = dict.fromkeys((prompt.id for prompt in self.PROMPTS), 0)
        for iteration in range(30):
            drawn = self.ids(iteration, size)
            assert len(set(drawn)) == size
            for id in drawn:
                counts[id] += 1
            # A prompt that the subset has already may wait for the next one.
            assert max(counts.values()) - min(counts.values()) <= (1 if 23 % size == 0 else 2)

    def test_a_new_pass_has_a_new_order(self):
        assert sorted(self.ids(0, 23)) == sorted(self.ids(1, 23))
        assert self.ids(0, 23) != self.ids(1, 23)

    def test_depends_on_ids_and_seed_only(self):
        other = tuple(Prompt(prompt.id, "other text") for prompt in self.PROMPTS[::-1])
        assert self.ids(4, 7) == self.ids(4, 7, prompts=other)
        assert self.ids(4, 7) != self.ids(4, 7, seed=1)

    @pytest.mark.parametrize(("iteration", "size"), [(0, 0), (0, 24), (-1, 3)])
    def test_impossible_sizes(self, iteration, size):
        with pytest.raises(ValueError, match=r"at least|between.*Got: "):
            self.ids(iteration, size)

    def test_ids_are_different(self):
        with pytest.raises(ValueError, match="different ids"):
            self.ids(0, 1, prompts=(Prompt("a", "x"), Prompt("a", "y")))


class TestTemplates:
    def rows(self, tmp_path):
        lines = [{"prompt": "first"}, {"prompt": "second"}, {"prompt": "third"}]
        return write(tmp_path / "p.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def test_text_becomes_what_a_user_says(self, tmp_path):
        source = self.rows(tmp_path)
        [prompt, *_] = read_prompts(source, chat=True)
        assert prompt.conversation == ({"role": "user", "content": "first"},)
        [other, *_] = read_prompts(source, chat=True, system="Be brief.")
        assert other.conversation == (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "first"},
        )
        # Another conversation, other draws.
        assert other.id != prompt.id

    def test_messages_get_a_system_prompt_unless_they_have_one(self, tmp_path):
        lines = [{"prompt": list(CHAT)}, {"prompt": list(CHAT[1:])}]
        source = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
        own, ours = read_prompts(source, system="Be kind.")
        assert own.conversation == CHAT
        assert ours.conversation == ({"role": "system", "content": "Be kind."}, CHAT[1])

    def test_text_may_stand_in_a_template(self, tmp_path):
        source = self.rows(tmp_path)
        [raw, *_] = read_prompts(source, template="Q: {prompt} {x}\nA:")
        assert raw.conversation == "Q: first {x}\nA:"
        [chat, *_] = read_prompts(source, template="Q: {prompt}", chat=True)
        assert chat.conversation == ({"role": "user", "content": "Q: first"},)
        with pytest.raises(ValueError, match=r"must have {prompt} in it\. Got: 'Q'"):
            read_prompts(source, template="Q")

    def test_a_system_prompt_for_raw_text_is_refused(self, tmp_path):
        with pytest.raises(PromptError, match=r"line 1: a system prompt needs.*Got: raw text"):
            read_prompts(self.rows(tmp_path), system="Be brief.")

    def test_one_file_serves_two_parts_of_a_run(self, tmp_path):
        source = self.rows(tmp_path)
        parts = [read_prompts(source, limit=1), read_prompts(source, skip=1, limit=1)]
        assert [[p.conversation for p in part] for part in parts] == [["first"], ["second"]]
        assert [p.conversation for p in read_prompts(source, skip=1)] == ["second", "third"]
        with pytest.raises(PromptError, match=r"after the first 3\. Got: none"):
            read_prompts(source, skip=3)


class TestJson:
    def test_a_list_of_objects(self, tmp_path):
        source = write(tmp_path / "p.json", '[{"prompt": "a"},\n {"prompt": "b", "other": 1}]')
        assert [p.conversation for p in read_prompts(source)] == ["a", "b"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", "expected a list"),
            ("[1", "expected a list"),
            ("[1]", "object 0: expected a JSON"),
        ],
    )
    def test_anything_else_is_refused(self, tmp_path, text, message):
        with pytest.raises(PromptError, match=message):
            read_prompts(write(tmp_path / "p.json", text))

    def test_a_file_of_a_dataset_on_the_hub(self, tmp_path, monkeypatch):
        import huggingface_hub

        asked = []

        def download(repo, file, *, repo_type):
            asked.append((repo, file, repo_type))
            return write(tmp_path / "p.json", '[{"prompt": "a"}]')

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        [prompt] = read_prompts("hf:some-one/a.set/folder/file.json")
        assert prompt.conversation == "a"
        assert asked == [("some-one/a.set", "folder/file.json", "dataset")]
