"""Parents whose tokenizers differ, brought to one vocabulary before they are merged: a token's row is found by its
text, wherever it stood.

    equal   no policy: other vocabularies are refused
    union   every token of every parent. The parents share one tokenizer model and differ in the tokens that were added
            to it; of two models that were trained apart there is no union that would cut texts as either does
    first   the first parent's tokenizer
    base    the base's
    NAME    that of the parent of this name

A parent without a token gets a row for it. The result has the tokenizer's files of whoever gave it, with its special
tokens, and a configuration that says the same ids.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kt_hf.errors import IntegrityError, RecipeError, nearest
from kt_hf.loading import config_of, loading
from kt_hf.merging import Tensors, config
from kt_hf.recipe import Model
from kt_hf.tensor_files import open_model

logger = logging.getLogger(__name__)

ROWS = ("average", "copy")
POLICIES = ("equal", "union", "first", "base")
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "target.spm", "tekken.json",
)  # fmt: skip
"""What belongs to a tokenizer."""
_BY_NAME = re.compile(
    r"(embed_tokens|word_embeddings?|wte|tok_embeddings|token_embeddings?|embed_in|embed_out|shared|lm_head|"
    r"predictions\.decoder)\.(weight|bias)$|(predictions|lm_head)\.bias$|final_logits_bias$"
)


def choose(
    policy: str,
    parents: Sequence[tuple[str, Path]],
    base: str | None = None,
    *,
    rows: str = "average",
    multiple_of: int = 1,
) -> Vocabulary | None:
    """The vocabulary that a policy gives for parents, as (name, folder), of which one may be the base; None where there
    is nothing to do. rows: as `Vocabulary` has it. multiple_of: of the number of rows.

    Raises `RecipeError` for a policy that there is not, and for parents of which it gives no vocabulary.
    """
    names = [name for name, _ in parents]
    check(policy, names, base, rows)
    if policy == "equal":
        return None
    tokenizers = {name: _tokenizer(name, folder) for name, folder in parents}
    owner = {"union": names[0], "first": names[0], "base": str(base)}.get(policy, policy)
    found = Vocabulary(parents, tokenizers, owner, base, rows, multiple_of)
    if found.nothing_to_do:
        return None
    if policy == "union":
        found.unite()
    return found


def check(policy: str, names: Sequence[str], base: str | None, rows: str) -> None:
    """Refuse a policy that there is not for parents of these names."""
    valid = [*(p for p in POLICIES if p != "base" or base is not None), *names]
    if policy not in valid:
        raise RecipeError(f"there is no vocabulary '{policy}'", nearest(policy, valid))
    if rows not in ROWS:
        raise RecipeError(f"new rows of a vocabulary are not made by '{rows}'", nearest(rows, ROWS))


def _tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in FILES):
        raise RecipeError(f"'{name}' has no tokenizer", "put the files of its tokenizer beside its weights")
    with loading(f"the tokenizer of '{name}'"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class Vocabulary:
    """One vocabulary, and how each parent is brought to it.

    files: what is to be written beside the weights; None for what is to be left out. rows: what a parent without a
    token gets: `average`, the base's row where the base has the token, else the mean over the parents that have it;
    `copy`, the row of the first parent that has it.
    """

    def __init__(
        self,
        parents: Sequence[tuple[str, Path]],
        tokenizers: Mapping[str, Any],
        owner: str,
        base: str | None,
        rows: str,
        multiple_of: int,
    ):
        self.folders, self.tokenizers, self.owner, self.base = dict(parents), tokenizers, owner, base
        self.first, self.rows, self.multiple_of = parents[0][0], rows, multiple_of
        self.models = {name: open_model(folder) for name, folder in parents}
        self.tables = {name: tables(name, folder, self.models[name]) for name, folder in parents}
        self.known = {name: tokenizer.get_vocab() for name, tokenizer in tokenizers.items()}
        self.tokens: dict[str, int] = dict(self.known[owner])
        self.files: dict[str, bytes | str | None] = {}
        if owner != self.first:
            self.files = {file: _bytes(self.folders[owner] / file) for file in (*FILES, "generation_config.json")}

    @property
    def size(self) -> int:
        return -(-(max(self.tokens.values()) + 1) // self.multiple_of) * self.multiple_of

    @property
    def nothing_to_do(self) -> bool:
        sizes = {self.models[n][t].shape[axis] for n, found in self.tables.items() for t, axis in found.items()}
        same = all(known == self.tokens for known in self.known.values())
        return same and len(sizes) == 1 and sizes.pop() % self.multiple_of == 0

    # --- the tokenizer

    def unite(self) -> None:
        """Add to the first parent's tokenizer what was added to the others'."""
        united = copy.deepcopy(self.tokenizers[self.owner])
        for name, tokenizer in self.tokenizers.items():
            if not _same_model(self.tokenizers[self.owner], tokenizer):
                raise RecipeError(
                    f"the tokenizers of '{self.owner}' and '{name}' were trained apart, so there is no union of them",
                    f"choose one: first, or '{name}'; rows are found by the tokens' texts",
                )
            for _, token in sorted(tokenizer.added_tokens_decoder.items()):
                if token.content not in united.get_vocab():
                    united.add_tokens([token])
        self.tokens = united.get_vocab()
        with tempfile.TemporaryDirectory() as place:
            united.save_pretrained(place)
            self._check(Path(place))
            stale = dict.fromkeys(("special_tokens_map.json", "added_tokens.json"))
            self.files = {**stale, **{path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}}

    def _check(self, place: Path) -> None:
        """The tokenizer as it will be read: all tokens are there, and the special ones are cut as one."""
        read = _tokenizer("the union", place)
        moved = [text for text, i in self.known[self.owner].items() if self.tokens.get(text) != i]
        split = [
            t
            for t in _special(self.tokenizers.values())
            if read.encode(t, add_special_tokens=False) != [self.tokens[t]]
        ]
        if read.get_vocab() != self.tokens or moved or split:
            odd = repr((moved or split or ["a token"])[0])
            raise RecipeError(
                f"the union of the tokenizers does not give back {odd}", "choose first, or a parent's name"
            )

    # --- rows

    def aligned(self, folder: Path, tensors: Tensors) -> Tensors:
        """A parent's tensors, with the rows of its tables in the order of this vocabulary."""
        name = next(name for name, place in self.folders.items() if place == folder)
        found = {t: axis for t, axis in self.tables[name].items() if t in tensors}
        return {n: self._table(name, n, found[n]) if n in found else t for n, t in tensors.items()}

    def _table(self, name: str, table: str, axis: int) -> torch.Tensor:
        own = self.models[name][table].movedim(axis, 0)
        places = self._places(name, len(own))
        if torch.equal(places, torch.arange(len(own))):
            return self.models[name][table]
        rows = own[places.clamp(min=0)]
        absent = (places < 0).nonzero()[:, 0]
        if len(absent):
            rows[absent] = self._new_rows(name, table, absent).to(rows.dtype)
        return rows.movedim(0, axis).contiguous()

    def _places(self, name: str, count: int) -> torch.Tensor:
        """Row of each of our tokens in a parent's table; -1 where it has none."""
        places, known = torch.full((self.size,), -1), self.known[name]
        for text, i in self.tokens.items():
            if known.get(text, count) < count:
                places[i] = known[text]
        return places

    def _new_rows(self, name: str, table: str, absent: torch.Tensor) -> torch.Tensor:
        """Rows for tokens that a parent has not, in float32; the mean of all its rows where nobody has them."""
        own = self.models[name][table].movedim(self.tables[name][table], 0)
        total, count = torch.zeros(len(absent), *own.shape[1:]), torch.zeros(len(absent))
        settled = torch.zeros(len(absent), dtype=torch.bool)
        donors = [n for n in self.folders if table in self.tables[n]]
        for donor in sorted(donors, key=lambda n: self.rows == "average" and n != self.base):
            theirs = self.models[donor][table].movedim(self.tables[donor][table], 0)
            places = self._places(donor, len(theirs))[absent]
            here = (places >= 0) & ~settled
            total[here] += theirs[places[here]].float()
            count[here] += 1
            if self.rows == "copy" or donor == self.base:
                settled |= here
        if bool((count == 0).any()):
            total[count == 0] = own.float().mean(0)
        return total / count.clamp(min=1).view(-1, *[1] * (own.dim() - 1))

    # --- the configuration

    def configured(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The first parent's configuration, with our size and ids."""
        size = self._own_size()
        for key, theirs in _parts(settings, config(self.folders[self.owner])):
            if key.get("vocab_size") == size:
                key["vocab_size"] = self.size
            if self.owner == self.first:
                continue
            for word, value in key.items():
                if word.endswith("_token_id"):
                    key[word] = theirs[word] if word in theirs else self._moved(value)
        return settings

    def _own_size(self) -> int | None:
        for part, _ in _parts(config(self.folders[self.first]), {}):
            if isinstance(part.get("vocab_size"), int):
                rows = {self.models[self.first][t].shape[axis] for t, axis in self.tables[self.first].items()}
                if part["vocab_size"] in rows:
                    return part["vocab_size"]
        return None

    def _moved(self, value: Any) -> Any:
        """An id of the first parent's, or several, as ours; None for a token that we have not."""
        texts = {i: text for text, i in self.known[self.first].items()}
        if isinstance(value, list):
            return [i for i in map(self._moved, value) if i is not None]
        return self.tokens.get(texts[value]) if isinstance(value, int) and value in texts else None


def _parts(settings: dict[str, Any], others: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Configurations, each with its counterpart in another one."""
    inner = [(v, others.get(k)) for k, v in settings.items() if isinstance(v, dict)]
    return [(settings, others), *((v, o if isinstance(o, dict) else {}) for v, o in inner)]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _special(tokenizers: Any) -> list[str]:
    added = [t for tokenizer in tokenizers for t in tokenizer.added_tokens_decoder.values()]
    return list(dict.fromkeys(t.content for t in added if t.special))


def _same_model(one: Any, other: Any) -> bool:
    """Whether two tokenizers cut a text in the same way, but for tokens that were added to them."""
    if not (getattr(one, "is_fast", False) and getattr(other, "is_fast", False)):
        return one.get_vocab() == other.get_vocab()
    added = {t.content for tokenizer in (one, other) for t in tokenizer.added_tokens_decoder.values()}

    def described(tokenizer: Any) -> dict[str, Any]:
        found = json.loads(tokenizer.backend_tokenizer.to_str())
        model = dict(found["model"])
        vocab = model.pop("vocab", {})
        pieces = dict(vocab) if isinstance(vocab, list) else dict.fromkeys(vocab)
        model["vocab"] = {text: score for text, score in pieces.items() if text not in added}
        model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges") or []]
        return {"model": model, **{key: found.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}}

    return described(one) == described(other)


# --- which tensors have a row for each token --------------------------------------------------------------------------


def tables(name: str, folder: Path, tensors: Tensors) -> dict[str, int]:
    """tensor -> the dimension that counts tokens: the embeddings, the output's weights and biases, and what is tied to
    them. Asks the model's class, and goes by names where there is none that transformers knows."""
    found = _by_class(folder, tensors)
    if not found:
        sizes = {part.get("vocab_size") for part, _ in _parts(config(folder), {})} - {None}
        found = {n: _axis(t) for n, t in tensors.items() if _BY_NAME.search(n) and t.shape[_axis(t)] in sizes}
    if not found:
        raise RecipeError(f"'{name}' has no embeddings of tokens that can be told by name", "leave the vocabulary out")
    if len({tensors[n].shape[axis] for n, axis in found.items()}) != 1:
        raise IntegrityError(
            f"'{name}' has tables of several vocabularies: {', '.join(found)}", "leave the vocabulary out"
        )
    return found


def _axis(tensor: torch.Tensor) -> int:
    """A bias may be a row of its own."""
    return tensor.dim() - 1 if tensor.dim() == 2 and len(tensor) == 1 else 0


def _by_class(folder: Path, tensors: Tensors) -> dict[str, int]:
    import transformers

    try:
        settings = config_of(Model(path=str(folder)))
        cls: Any = getattr(transformers, (settings.architectures or [""])[0])
        with torch.device("meta"):
            model = cls(settings)
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (RecipeError, AttributeError, NotImplementedError):
        return {}
    found = {id(p) for module in tables if module is not None for p in module.parameters()}
    heads = [n for n, module in model.named_modules() if module is tables[1]]
    beside = {above for head in heads for above in (head, head.rpartition(".")[0], "")}
    size = tables[0].weight.shape[0] if hasattr(tables[0], "weight") else None
    names = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        bias = name.endswith("bias") and tensor.numel() == size and name.rpartition(".")[0] in beside
        if id(tensor) in found or bias:
            names[name] = _axis(tensor)
    return {t: axis for name, axis in names.items() for t in tensors if _same_name(t, name)}


def _same_name(one: str, other: str) -> bool:
    """A checkpoint may be of the model without its head, or the other way round."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
