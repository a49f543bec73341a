import json
import math
import re

import pytest
import torch
from builders.caches import VOCABULARY, causal_model, contents, pad, sequences, write
from builders.models import tiny_model
from datasets import Dataset, concatenate_datasets
from safetensors.numpy import load_file

from distill_llm.common import files
from distill_llm.common.errors import InputError
from distill_llm.data.special_tokens import tokenizer_fingerprint
from distill_llm.losses.items import targets
from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.cache_contents import find_examples
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.online import OnlineTeacher


class Interrupted(Exception):
    pass


class Stopping(OnlineTeacher):
    """A teacher that is stopped after some batches."""

    def __init__(self, model, batches):
        super().__init__(model)
        self.left = batches

    def signals(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().signals(*args, **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(model, data, folder) of a cache that was written in one go."""
    model, data, folder = causal_model(), sequences(), tmp_path_factory.mktemp("whole") / "cache"
    write(folder, model, data)
    return model, data, folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the cache that a test may spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in contents(whole[2]).items():
        (folder / name).write_bytes(data)
    return folder


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


# Stopping and going on; several processes.


def test_stopped_after_any_batch_and_begun_again_the_files_are_the_same(whole, tmp_path):
    model, data, folder = whole
    stops = 0
    for batches in range(30):
        try:
            write(tmp_path / "cache", model, data, teacher=Stopping(model, batches))
            break
        except Interrupted:
            stops += 1
            assert all(path.name in contents(folder) for path in tmp_path.glob("cache/*"))
    assert stops >= 3 and contents(tmp_path / "cache") == contents(folder)


def test_a_process_killed_while_it_writes_a_shard_leaves_none(whole, tmp_path, monkeypatch):
    model, data, folder = whole
    second, real = shards(folder)[1].name, files.to_disk

    def fails(path):
        if path.name.startswith(second):
            raise Interrupted
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "to_disk", fails)
        with pytest.raises(Interrupted):
            write(tmp_path / "cache", model, data)
    assert len(shards(tmp_path / "cache")) == 1
    with pytest.raises(InputError, match="this one is missing"):
        CachedTeacher(tmp_path / "cache")
    (tmp_path / "cache" / f"{second}.0123.partial").write_bytes(b"what a kill left")
    write(tmp_path / "cache", model, data)
    assert contents(tmp_path / "cache") == contents(folder)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_write_the_cache_of_one(whole, tmp_path, order):
    model, data, folder = whole
    for index in order:
        write(tmp_path / "cache", model, data, process_index=index, num_processes=2)
    assert contents(tmp_path / "cache") == contents(folder)


def test_one_of_two_processes_is_not_a_whole_cache(whole, tmp_path):
    write(tmp_path / "cache", *whole[:2], process_index=0, num_processes=2)
    with pytest.raises(InputError, match="^cache: .*shard-00001.*this one is missing"):
        CachedTeacher(tmp_path / "cache")


def test_the_order_of_the_data_and_duplicates_make_no_difference(whole, tmp_path):
    model, data, folder = whole
    write(tmp_path / "cache", model, concatenate_datasets([data.shuffle(seed=4), data.select([3, 3, 5])]))
    left, right = contents(tmp_path / "cache"), contents(folder)
    assert left.keys() == right.keys() and left["index.json"] == right["index.json"]
    keys = [load_file(path)["keys"] for path in shards(tmp_path / "cache")]
    assert sum(len(each) for each in keys) == len(data)


def test_a_finished_cache_is_left_alone(whole, copy):
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    write(copy, *whole[:2])
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_the_draws_of_an_example_depend_on_the_seed(whole, tmp_path):
    model, data, folder = whole
    write(tmp_path / "cache", model, data, seed=1)
    assert contents(tmp_path / "cache").keys() == contents(folder).keys()
    blocks = [[load_file(path)["blocks"].tobytes() for path in shards(each)] for each in (folder, tmp_path / "cache")]
    assert all(left != right for left, right in zip(*blocks, strict=True))


# Another teacher, tokenizer, dataset; damaged files.


class Words:
    """A tokenizer without a backend."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: at for at, word in enumerate(self.words)}


def test_what_changed_is_named_by_writer_and_reader(tmp_path):
    model, data, tokenizer = causal_model(), sequences(), Words("a", "b")
    write(tmp_path / "cache", model, data, tokenizer=tokenizer)
    before = contents(tmp_path / "cache")
    changes = {
        "teacher": (causal_model(seed=1), data, tokenizer),
        "tokenizer": (model, data, Words("b", "a")),
        "data": (model, sequences(seed=1), tokenizer),
        "teacher and tokenizer and data": (causal_model(seed=1), sequences(seed=1), Words("c")),
    }
    CachedTeacher(tmp_path / "cache", model, tokenizer, data)
    for names, (other, rows, words) in changes.items():
        expected = (
            f"^cache: got .*made with another {re.escape(names)}'; choose another folder, or write the cache again: .*$"
        )
        with pytest.raises(InputError, match=expected):
            write(tmp_path / "cache", other, rows, tokenizer=words)
        with pytest.raises(InputError, match=expected):
            CachedTeacher(tmp_path / "cache", other, words, rows)
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize(
    "options, named",
    [
        ({"k": 6}, r"k \(5, not 6\)"),
        ({"method": "topk"}, r"method \(sampled, not topk\)"),
        ({"unlabelled": True}, r"unlabelled \(False, not True\)"),
        ({"seed": 3}, r"seed \(0, not 3\)"),
    ],
)
def test_other_settings_do_not_go_on_with_a_cache(whole, copy, options, named):
    with pytest.raises(InputError, match=f"^cache: .*{named}"):
        write(copy, *whole[:2], **options)
    with pytest.raises(InputError, match="^shard_items: "):
        write(copy, *whole[:2], shard_items=10)


def test_a_fingerprint_sees_one_bit_of_one_weight_and_not_where_the_model_came_from(tmp_path):
    model, again = causal_model(), causal_model()
    again.config._name_or_path = "elsewhere"
    assert teacher_fingerprint(model) == teacher_fingerprint(again)
    weight = again.model.layers[0].mlp.up_proj.weight
    weight.data[7, 3] = torch.nextafter(weight.data[7, 3], torch.tensor(9.0))
    assert teacher_fingerprint(model) != teacher_fingerprint(again)
    assert teacher_fingerprint(model) != teacher_fingerprint(causal_model(rms_norm_eps=1e-3))
    model.save_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    causal_model().save_pretrained(tmp_path / "three")
    one, two, three = (teacher_fingerprint(tmp_path / name) for name in ("one", "two", "three"))
    assert one == three != two
    with pytest.raises(InputError, match="^teacher: .*config.json and safetensors"):
        teacher_fingerprint(tmp_path)


def test_a_fingerprint_of_a_folder_sees_a_new_head_and_every_byte_of_a_large_tensor(tmp_path):
    model = tiny_model("distilbert", head="token-classification", vocab=30_000)
    seen = set()

    def note():
        model.save_pretrained(tmp_path / "model")
        seen.add(teacher_fingerprint(tmp_path / "model"))

    note()
    torch.nn.init.normal_(model.classifier.weight)
    note()
    words = model.get_input_embeddings().weight
    for row in range(0, 30_000, 3_001):
        with torch.no_grad():
            words[row] += 1
        note()
    with torch.no_grad():
        words[[5, 6]] = words[[6, 5]]
    note()
    assert len(seen) == 13
    assert teacher_fingerprint(tmp_path / "model") in seen


def test_a_fingerprint_in_memory_sees_weights_that_change_places(tmp_path):
    model = tiny_model(vocab=30_000)
    before = teacher_fingerprint(model)
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        words[[5, 6]] = words[[6, 5]]
    assert teacher_fingerprint(model) != before


def test_padding_left_in_a_tokenizer_does_not_make_it_another(minilm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["distillation"])
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.mark.parametrize("cut", [0, 7, 30, -1])
def test_a_shard_that_is_cut_off_is_refused_and_made_again(whole, copy, cut):
    path = shards(copy)[1]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=f"^cache: .*{path.name}.*(damaged|cut off)"):
        CachedTeacher(copy)
    write(copy, *whole[:2])
    assert contents(copy) == contents(whole[2])


def test_any_damaged_byte_of_a_shard_is_an_error_or_without_effect(whole, copy):
    _, data, folder = whole
    path, batch = shards(copy)[1], pad(list(data))
    positions, _ = targets(batch, "next_token")
    expected, good, refused = CachedTeacher(folder).signals(batch, positions=positions).targets, path.read_bytes(), 0
    for at in range(8, len(good), 5):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x11]) + good[at + 1 :])
        try:
            found = CachedTeacher(copy).signals(batch, positions=positions).targets
        except InputError as error:
            assert error.field in ("cache", "input_ids")
            refused += 1
        else:
            assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert refused > 0.9 * len(range(8, len(good), 5))


def test_a_shard_of_another_cache_is_refused(whole, copy, tmp_path):
    write(tmp_path / "other", causal_model(seed=1), whole[1])
    name = shards(copy)[0].name
    (copy / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(InputError, match="^cache: .*a shard of the cache that index.json describes"):
        CachedTeacher(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 3}', '{"format": 2}', '{"format": 3, "settings": {"k": 0}}']
)
def test_a_bad_index_is_one_line(copy, text):
    (copy / "index.json").write_text(text)
    with pytest.raises(InputError, match="^cache: [^\n]*$"):
        CachedTeacher(copy)
    (copy / "index.json").unlink()
    with pytest.raises(InputError, match="^cache: .*index.json is missing"):
        CachedTeacher(copy)


def test_a_cache_of_an_older_format_is_refused_by_reader_and_writer_in_one_line(whole, copy):
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace('"format": 4', '"format": 3'))
    refused = "^cache: got [^\n]*write the cache again: this version reads format 4$"
    with pytest.raises(InputError, match=refused):
        CachedTeacher(copy)
    with pytest.raises(InputError, match=refused):
        write(copy, *whole[:2])


# What cannot be stored.


def test_a_disk_too_small_is_refused_before_anything_is_written(whole, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("distill_llm.teachers.cache_writer.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(
        InputError, match="^path: got .* with 0.0 MB free'; free some space, or choose another disk: 0.0 MB are needed"
    ):
        write(tmp_path / "cache", *whole[:2])
    assert contents(tmp_path / "cache") == {}


def test_the_estimate_is_near_what_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill_llm.common.progress.EVERY", 0.0)
    data = sequences(200)
    write(tmp_path / "cache", causal_model(), data, batch_size=16, progress=True, shard_items=10_000)
    said = float(re.search(r"(\d+) bytes an item", capsys.readouterr().err)[1])
    (shard,) = shards(tmp_path / "cache")
    arrays = load_file(shard)
    assert said == pytest.approx(len(arrays["blocks"]) / arrays["items"].sum(), rel=0.15)


def test_a_collator_that_masks_anew_is_refused(whole, tmp_path):
    def masking(rows):
        batch = pad(rows)
        batch["input_ids"][0, 0] = 1
        return batch

    with pytest.raises(InputError, match="^collator: got 'a collator that changes input_ids'"):
        write(tmp_path / "cache", *whole[:2], collator=masking)


def test_a_collator_that_makes_up_labels_is_refused(whole, tmp_path):
    def labelling(rows):
        batch = pad(rows)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] % 2 == 0, -100)}

    with pytest.raises(InputError, match="^collator: got 'a collator that changes which tokens have labels'"):
        write(tmp_path / "cache", *whole[:2], collator=labelling)


def test_logits_that_are_not_finite_are_refused(tmp_path):
    model = causal_model()
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(InputError, match="^teacher: got 'logits that are not finite'"):
        write(tmp_path / "cache", model, sequences())


@pytest.mark.parametrize("settings", [{"k": VOCABULARY}, {"k": 5}, {"k": 5, "method": "sampled"}], ids=str)
def test_a_teacher_may_mask_classes_with_minus_infinity(tmp_path, settings):
    """The teacher that never says some tokens is cached as the one with the lowest logits there."""
    found = []
    for name, value in (("masked", -math.inf), ("low", -1e4)):
        model = causal_model()
        model.lm_head.register_forward_hook(
            lambda m, a, out, value=value: out.index_fill(-1, torch.arange(3, 90), value)
        )
        write(tmp_path / name, model, sequences(), **settings)
        cache = CachedTeacher(tmp_path / name)
        batch = pad(list(sequences()))
        positions = targets({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, "next_token")[
            0
        ]
        signals = cache.signals(batch, positions=positions)
        found.append(signals.targets if hasattr(signals, "targets") else [signals.logits.softmax(-1)])
    for masked, low in zip(*found, strict=True):
        torch.testing.assert_close(masked, low)


def test_a_kind_that_is_not_the_teachers_is_refused(tmp_path):
    with pytest.raises(InputError, match="^kind: got 'example with logits"):
        write(tmp_path / "cache", causal_model(), sequences(), kind="example")
    with pytest.raises(InputError, match="^kind: got 'token with logits"):
        write(tmp_path / "cache", tiny_model(), sequences(), kind="token")


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_examples_that_differ_beyond_their_ids_are_refused(name):
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, name: [[0, 0, 1], [0, 1, 1]]})
    with pytest.raises(InputError, match="^dataset: got 'rows 0 and 1'"):
        find_examples(data, CacheSettings(kind="example"))


def test_labels_count_only_where_they_choose_tokens():
    rows = {"input_ids": [[5, 6, 7, 8]] * 2, "labels": [[-100, -100, 7, 8], [-100, -100, -100, 8]]}
    with pytest.raises(InputError, match="^dataset: got 'rows 0 and 1'"):
        find_examples(Dataset.from_dict(rows), CacheSettings())
    every = find_examples(Dataset.from_dict(rows), CacheSettings(unlabelled=True))
    assert every.items.tolist() == [3] and every.tokens.tolist() == [4]
    assert find_examples(Dataset.from_dict(rows).select([0]), CacheSettings()).items.tolist() == [2]
    assert find_examples(Dataset.from_dict(rows).select([0]), CacheSettings(kind="token")).items.tolist() == [2]
    classes = Dataset.from_dict({"input_ids": [[5, 6]] * 2, "labels": [0, 1]})
    assert find_examples(classes, CacheSettings(kind="example")).items.tolist() == [1]
    with pytest.raises(InputError, match="^dataset.labels: "):
        find_examples(classes, CacheSettings(kind="token"))


def test_data_with_nothing_to_store_is_refused():
    with pytest.raises(InputError, match="^dataset: got '1 rows without an output to store'"):
        find_examples(Dataset.from_dict({"input_ids": [[5]]}), CacheSettings())
    with pytest.raises(InputError, match="^dataset: got .'text'"):
        find_examples(Dataset.from_dict({"text": ["a"]}), CacheSettings())


@pytest.mark.parametrize("field, value", [("k", 0), ("k", 256), ("method", "top"), ("kind", "tokens"), ("seed", -1)])
def test_settings_are_checked(field, value):
    with pytest.raises(InputError, match=f"^{field}: got {value!r}"):
        CacheSettings(**{field: value})


def test_the_index_is_plain_json(whole):
    index = json.loads((whole[2] / "index.json").read_text())
    assert index["format"] == 4 and index["settings"]["k"] == 5 and index["classes"] == 97
    assert sum(examples for examples, _ in index["shards"]) == len(whole[1])
