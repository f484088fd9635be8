"""Parents with different vocabularies: rows follow their tokens, special tokens come back as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BERT
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from kt_hf import Data, Merge, Model, Recipe, Train, merging, run, vocabularies
from kt_hf.cli import main
from kt_hf.errors import RecipeError
from kt_hf.tensor_files import open_model

SENTENCES = ("the cat sat on the mat", "a dog and a cat", "nobody said hello, there!")
OTHERS = ("zwei hunde laufen schnell", "der kater sitzt auf der matte", "niemand sagt etwas")


def bpe(texts: tuple[str, ...], *added: str, size: int = 300) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    found.add_tokens([AddedToken(text, special=text.startswith("<"), normalized=False) for text in added])
    return found


def llama(folder: Path, tokenizer: Any, seed: int, rows: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=max(rows, len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{**sizes, **changes},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """Of one tokenizer: `base`, `chat` with two tokens more, `code` with two others, one of which `chat` has, too; of
    another one: `german`; `padded` has rows without tokens, `same` is equal to `base`."""
    root = tmp_path_factory.mktemp("parents")
    shared = {"base": (), "same": (), "chat": ("<|user|>", "catdog"), "code": ("<|fim|>", "<|user|>")}
    for i, (name, added) in enumerate(shared.items()):
        llama(root / name, bpe(SENTENCES, *added), i, tie_word_embeddings=False)
    llama(root / "padded", bpe(SENTENCES), 7, rows=400, tie_word_embeddings=False)
    llama(root / "german", bpe(OTHERS), 8, tie_word_embeddings=False)
    return root


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def merge(root: Path, output: Path, *words: str, method: str = "uniform_soup") -> dict[str, torch.Tensor]:
    words = tuple(str(root / w) if (root / w).exists() else w for w in words)
    assert main(["merge", method, "--models", *words, "--output", str(output)]) == 0
    return load_file(output / "model.safetensors")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def row(folder: Path, text: str, table: str = TABLES[0]) -> torch.Tensor:
    return state(folder)[table][AutoTokenizer.from_pretrained(folder).get_vocab()[text]]


def check_tokenizer(output: Path, like: Path, sentences: tuple[str, ...] = SENTENCES + OTHERS) -> None:
    """Ids, texts and pieces are those of a parent, and the model has a row for each."""
    found, theirs = (AutoTokenizer.from_pretrained(p) for p in (output, like))
    assert found.get_vocab().items() >= theirs.get_vocab().items()
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(found, key) == getattr(theirs, key)
    for sentence in sentences:
        assert found(sentence)["input_ids"] == theirs(sentence)["input_ids"]
        assert found.decode(found(sentence)["input_ids"]) == theirs.decode(theirs(sentence)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size > max(found.get_vocab().values())
    assert model(torch.tensor([found(sentences[0])["input_ids"]])).logits.isfinite().all()
    config = json.loads((output / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (found.bos_token_id, found.eos_token_id)


# --- policies --------------------------------------------------------------------------------------------------------


def test_other_vocabularies_are_refused_without_a_policy(tmp_path, parents, capsys):
    with pytest.raises(SystemExit) as ended:
        merge(parents, tmp_path / "out", "base", "german")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "differ in their vocabulary" in said and "--vocabulary" in said


@pytest.mark.parametrize("policy", ["union", "first", "equal"])
def test_equal_vocabularies_stay_as_they_are(tmp_path, parents, policy):
    found = merge(parents, tmp_path / "out", "base", "same", "--vocabulary", policy)
    expected = merge(parents, tmp_path / "plain", "base", "same")
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    for file in ("tokenizer.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_a_union_has_every_token_and_the_first_parents_ids(tmp_path, parents):
    found = merge(parents, tmp_path / "out", "chat", "code", "base", "--vocabulary", "union")
    check_tokenizer(tmp_path / "out", parents / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.get_vocab()
    for text in ("<|user|>", "<|fim|>", "catdog", "</s>"):
        assert tokenizer.encode(text, add_special_tokens=False) == [ids[text]]
        assert tokenizer.decode([ids[text]]) == text
    assert "<|user|>" not in tokenizer.decode([ids["<|user|>"], ids["<|fim|>"]], skip_special_tokens=True)
    chat, code, base = (parents / p for p in ("chat", "code", "base"))
    for table in TABLES:
        alike = torch.stack([row(p, "the", table) for p in (chat, code, base)]).mean(0)
        torch.testing.assert_close(found[table][ids["the"]], alike)
        # two have it: the third gets their mean, and the mean of all is that, too
        of_two = torch.stack([row(p, "<|user|>", table) for p in (chat, code)]).mean(0)
        torch.testing.assert_close(found[table][ids["<|user|>"]], of_two)
        torch.testing.assert_close(found[table][ids["catdog"]], row(chat, "catdog", table))
        torch.testing.assert_close(found[table][ids["<|fim|>"]], row(code, "<|fim|>", table))


def test_new_rows_may_be_copies_of_the_first_there_is(tmp_path, parents):
    words = ("base", "chat", "code", "weights=[0, 1, 1]", "--vocabulary", "union", "--new-rows", "copy")
    found = merge(parents, tmp_path / "out", *words, "--compute", "float64")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    of_two = torch.stack([row(parents / p, "<|user|>") for p in ("chat", "code")]).mean(0)
    torch.testing.assert_close(found[TABLES[0]][ids["<|user|>"]], of_two)
    alone = merge(parents, tmp_path / "alone", *words[:3], "weights=[1, 0, 0]", *words[4:])
    torch.testing.assert_close(alone[TABLES[0]][ids["<|user|>"]], row(parents / "chat", "<|user|>"))
    mean = merge(parents, tmp_path / "mean", *words[:3], "weights=[1, 0, 0]", "--vocabulary", "union")
    torch.testing.assert_close(mean[TABLES[0]][ids["<|user|>"]], of_two)


def test_the_bases_row_stands_for_what_a_parent_has_not(tmp_path, parents):
    """A parent without the token has learnt nothing about it: its task vector is 0 there."""
    words = ("base", "code", "--base", str(parents / "chat"), "--vocabulary", "union")
    found = merge(parents, tmp_path / "out", *words, method="task_arithmetic")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    torch.testing.assert_close(found[TABLES[0]][ids["catdog"]], row(parents / "chat", "catdog"))
    # of the two parents one has the token, and the other counts as the base
    torch.testing.assert_close(found[TABLES[0]][ids["<|user|>"]], row(parents / "code", "<|user|>"))
    # the base has it not, and gets the row of the one that has it
    torch.testing.assert_close(found[TABLES[0]][ids["<|fim|>"]], row(parents / "code", "<|fim|>"))


@pytest.mark.parametrize("policy", ["first", "german"])
def test_a_parents_tokenizer_serves_parents_that_were_trained_apart(tmp_path, parents, policy):
    words = ("base", "german", "--vocabulary", policy if policy == "first" else str(parents / policy))
    found = merge(parents, tmp_path / "out", *words)
    owner, other = ("base", "german") if policy == "first" else ("german", "base")
    check_tokenizer(tmp_path / "out", parents / owner)
    known = [AutoTokenizer.from_pretrained(parents / p).get_vocab() for p in (owner, other)]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == known[0]
    assert len(known[0].keys() - known[1].keys()) > 5 and len(known[0].keys() & known[1].keys()) > 200
    for text, i in known[0].items():
        mine, theirs = (state(parents / p)[TABLES[1]] for p in (owner, other))
        expected = (mine[i] + theirs[known[1][text]]) / 2 if text in known[1] else mine[i]
        torch.testing.assert_close(found[TABLES[1]][i], expected)


def test_the_tokenizer_and_the_ids_are_those_of_the_parent_that_is_named(tmp_path, parents):
    """Special tokens that have other ids, a chat template, and the settings of generation."""
    other = bpe(OTHERS, "<|end|>", "<pad>")
    other.eos_token, other.pad_token, other.chat_template = "<|end|>", "<pad>", "{{ messages }}"
    folder = llama(tmp_path / "other", other, 3, tie_word_embeddings=False, pad_token_id=other.pad_token_id)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [other.eos_token_id]}))
    shutil.copytree(parents / "base", tmp_path / "first")
    (tmp_path / "first" / "special_tokens_map.json").write_text("{}")
    merge(parents, tmp_path / "out", str(tmp_path / "first"), str(folder), "--vocabulary", str(folder))
    check_tokenizer(tmp_path / "out", folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == other.pad_token_id and config["eos_token_id"] == other.eos_token_id
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [other.eos_token_id]}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()


def test_rows_without_tokens_are_left_out(tmp_path, parents):
    found = merge(parents, tmp_path / "out", "padded", "base", "--vocabulary", "first")
    check_tokenizer(tmp_path / "out", parents / "base")
    padded, plain = (state(parents / p)[TABLES[0]] for p in ("padded", "base"))
    assert len(padded) == 400 > len(plain)
    torch.testing.assert_close(found[TABLES[0]], (padded[: len(plain)] + plain) / 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["base", "german", "--vocabulary", "union"], "were trained apart, so there is no union of them"),
        (["base", "german", "--vocabulary", "onion"], "did you mean 'union'?"),
        (["base", "german", "--vocabulary=base"], "there is no vocabulary 'base'"),
        (["base", "german", "--vocabulary", "first", "--new-rows", "zero"], "are not made by 'zero'"),
        (["base", "bare", "--vocabulary", "first"], "has no tokenizer"),
    ],
)
def test_what_has_no_vocabulary_is_refused(tmp_path, parents, capsys, words, told):
    shutil.copytree(parents / "base", parents / "bare", dirs_exist_ok=True)
    for file in vocabularies.FILES:
        (parents / "bare" / file).unlink(missing_ok=True)
    with pytest.raises(SystemExit) as ended:
        merge(parents, tmp_path / "out", *words)
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- tables ----------------------------------------------------------------------------------------------------------


def bert(folder: Path, words: list[str], seed: int) -> Path:
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{w}_token": f"[{w.upper()}]" for w in ("unk", "pad", "cls", "sep", "mask")}
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), pad_token_id=words.index("[PAD]"), **sizes))
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def test_tied_heads_and_their_biases_follow_their_tokens(tmp_path):
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    first = bert(tmp_path / "a", [*special, "one", "two", "three"], 0)
    second = bert(tmp_path / "b", ["three", "four", *special[::-1], "one"], 1)
    merge(tmp_path, tmp_path / "out", "a", "b", "--vocabulary", str(second))
    found = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    one, two = (AutoModelForMaskedLM.from_pretrained(p) for p in (first, second))
    ids = [AutoTokenizer.from_pretrained(p).get_vocab() for p in (first, second)]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == ids[1]
    for text, i in ids[1].items():
        for part in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
            mine, theirs = one.get_parameter(part), two.get_parameter(part)[i]
            expected = (mine[ids[0][text]] + theirs) / 2 if text in ids[0] else theirs
            torch.testing.assert_close(found.get_parameter(part)[i], expected)
    assert found.cls.predictions.decoder.weight is found.bert.embeddings.word_embeddings.weight
    assert found.config.pad_token_id == ids[1]["[PAD]"] and found.config.vocab_size == len(ids[1])


@pytest.mark.parametrize(
    ("cls", "config", "expected"),
    [
        (
            BertForMaskedLM,
            BertConfig(vocab_size=24, hidden_size=24, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1),
            {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0},
        ),
        (
            T5ForConditionalGeneration,
            T5Config(vocab_size=24, d_model=24, d_ff=24, d_kv=8, num_layers=1, num_heads=3),
            {"shared.weight": 0},
        ),
        (
            BartForConditionalGeneration,
            BartConfig(
                vocab_size=24, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24,
            ),
            {"model.shared.weight": 0, "final_logits_bias": 1},
        ),
        (
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=24, hidden_size=24, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1
            ),
            {"model.embed_tokens.weight": 0, "lm_head.weight": 0},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_tables_are_told_by_the_class_even_where_all_sizes_are_equal(tmp_path, cls, config, expected):
    cls(config).save_pretrained(tmp_path)
    assert vocabularies.tables("it", tmp_path, open_model(tmp_path)) == expected


def test_tables_are_told_by_names_where_the_class_is_not_known(tmp_path):
    tensors = {"net.wte.weight": torch.zeros(9, 4), "net.h.0.weight": torch.zeros(9, 4), "lm_head.bias": torch.zeros(9)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": 9}))
    assert vocabularies.tables("it", tmp_path, tensors) == {"net.wte.weight": 0, "lm_head.bias": 0}
    with pytest.raises(RecipeError, match="no embeddings of tokens"):
        vocabularies.tables("it", tmp_path, {"net.h.0.weight": torch.zeros(9, 4)})


def test_half_precision_and_several_threads_give_the_same_bits(tmp_path, parents):
    names = ["chat", "code"]
    vocabulary = vocabularies.choose("union", [(n, parents / n) for n in names])
    assert vocabulary is not None
    for threads in (1, 3):
        with merging.Parents([parents / n for n in names], names, vocabulary=vocabulary) as opened:
            merging.merge(
                merging.WeightedMean([1, 1]), opened, None, tmp_path / str(threads), out_dtype=torch.bfloat16,
                threads=threads,
            )  # fmt: skip
    one, three = ((tmp_path / str(i) / "model.safetensors").read_bytes() for i in (1, 3))
    assert one == three
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["vocab_size"] == len(AutoTokenizer.from_pretrained(tmp_path / "1"))


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_merges_models_of_different_vocabularies(tmp_path):
    """Fresh models, each with a tokenizer trained on texts of its own."""
    data = {}
    for name, words in (("fish", ("carp", "pike", "eel")), ("birds", ("crow", "finch", "owl"))):
        rows = [f"a {words[i % 3]} number {i % 7},{'yes' if i % 3 else 'no'}" for i in range(24)]
        for split in ("train", "validation", "test"):
            path = tmp_path / name / f"{split}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(["text,label", *rows]))
        data[name] = Data(str(tmp_path / name))
    model, training = Model(config="bert", config_overrides=BERT), {"max_steps": 2, "report_to": "none"}
    trained = [Train(name, data=name, model=model, training=training) for name in data]

    def recipe(**how: Any) -> Recipe:
        return Recipe(
            [*trained, Merge("soup", "uniform_soup", models=["@fish", "@birds"], data="fish", **how)], data=data
        )

    with pytest.raises(RecipeError, match="did you mean '@birds'"):
        run(recipe(vocabulary="@bird"), tmp_path / "out")
    with pytest.raises(RecipeError, match="vocabulary=union, first, or one of the models"):
        run(recipe(), tmp_path / "plain")
    run(recipe(vocabulary="@birds"), tmp_path / "out")
    folders = [tmp_path / "out" / name / "model" for name in ("fish", "birds", "soup")]
    fish, birds, soup = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders)
    assert soup == birds != fish
    table = "bert.embeddings.word_embeddings.weight"
    one, two, found = (state(folder)[table] for folder in folders)
    for text, i in soup.items():
        torch.testing.assert_close(found[i], (one[fish[text]] + two[i]) / 2 if text in fish else two[i])
