"""A causal language model: token ids in, the next token's logits out, and text by its state.

Dimensions: batch b · seqlen l · vocabulary v
"""

import os
from collections.abc import Collection, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from mamba2_apps import layouts
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.checkpoint import (
    CONFIG_NAME,
    LANGUAGE_MODEL_FORMAT,
    HubUpload,
    cast_weights,
    read_json,
    write_folder,
)
from mamba2_apps.heads import LanguageModelHead, pool_tokens


class LanguageModel(HubUpload, nn.Module):
    """Embedding table ∘ causal backbone ∘ output head.

    Args:
        config: sizes of the backbone, which must be causal.
        vocab_size: tokens that exist.
        padded_vocab_size: rows of the table, vocab_size or more; None: vocab_size.
        tie_embeddings: the head's weights are the table.
        device: where the parameters lie.
        dtype: the parameters' type.
    """

    def __init__(
        self,
        config: BackboneConfig,
        vocab_size: int,
        *,
        padded_vocab_size: int | None = None,
        tie_embeddings: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.bidirectional:
            raise ValueError("bidirectional is True; a language model reads from left to right")
        rows = vocab_size if padded_vocab_size is None else padded_vocab_size
        if not 1 <= vocab_size <= rows:
            raise ValueError(f"vocab_size is {vocab_size}, expected 1 to {rows}")
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(rows, config.d_model, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.backbone = Backbone(config, device=device, dtype=dtype)
        tied_to = self.embedding if tie_embeddings else None
        self.head = LanguageModelHead(config.d_model, rows, tied_to=tied_to)
        if tied_to is None:
            self.head.to(device=device, dtype=dtype)

    @property
    def tied(self) -> bool:
        """Whether the head's weights are the table."""
        return self.head.proj.weight is self.embedding.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (b, l, v) of the token after each of ids (b, l) int64."""
        return self.head(self.backbone(self.embedding(ids), mask=mask))

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        mask: Tensor | None = None,
        stop: Collection[int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next tokens (b,) one after another; each costs the same, however long the text.

        Args:
            ids: prompt (b, l) int64.
            max_new_tokens: tokens to yield at most.
            stop: tokens that end a row's text, such as `end_tokens` gives; the row repeats it until
                all rows have ended.
            mask: (b, l) bool, True where a prompt has tokens; None: everywhere.
            temperature: 0 takes the likeliest token; above, samples.
            top_k: sample among the k likeliest only.
            top_p: sample among the likeliest that together have this probability.
            generator: of the device of the model, for samples that repeat.

        Attention layers keep all keys: their cost grows with the text.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        _check_sampling(temperature, top_k, top_p)
        sampling = (temperature, top_k, top_p, generator)
        return self._tokens(ids, max_new_tokens, mask, stop, sampling)

    @torch.inference_mode()
    def _tokens(
        self,
        ids: Tensor,
        count: int,
        mask: Tensor | None,
        stop: Collection[int],
        sampling: tuple[float, int | None, float | None, torch.Generator | None],
    ) -> Iterator[Tensor]:
        """What `generate` yields; apart, so that its checks are made where it is called."""
        hidden, state = self.backbone(self.embedding(ids), mask=mask, return_state=True)
        last = pool_tokens(hidden, mask, "last")
        ends = torch.tensor(list(stop), dtype=ids.dtype, device=ids.device)
        token, ended = ids[:, -1], ids.new_zeros(len(ids), dtype=torch.bool)
        for left in reversed(range(count)):
            logits = self.head(last[:, None])[:, 0, : self.vocab_size].float()
            chosen = _choose(logits, *sampling)
            token = torch.where(ended, token, chosen) if stop else chosen
            yield token
            if stop:
                ended = ended | torch.isin(token, ends)
            if left == 0 or (stop and ended.all()):
                return
            last, state = self.backbone.step(self.embedding(token), state)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into the directory `path`, each atomically."""
        tensors = {f"backbone.{name}": t for name, t in self.backbone.state_dict().items()}
        tensors["embedding.weight"] = self.embedding.weight
        if not self.tied:
            tensors["head.weight"] = self.head.proj.weight
        settings = {"config": self.backbone.config.to_dict(), "vocab_size": self.vocab_size}
        write_folder(path, LANGUAGE_MODEL_FORMAT, settings, tensors)

    def save_hugging_face(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that transformers' Mamba2ForCausalLM reads.

        Raises ValueError that names what its architecture does not have.
        """
        head = None if self.tied else self.head.proj.weight
        weights = self.backbone.state_dict()
        layouts.write_hugging_face(path, self.backbone.config, weights, self.embedding.weight, head)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A language model from a checkpoint, in eval mode.

        Read are what `save_pretrained` wrote, Hugging Face's Mamba2 folders and state-spaces'.
        dtype None keeps what is stored; A_log, D and dt_bias are only ever widened.

        Raises:
            FileNotFoundError: no such directory or repository, or a file missing in it.
            ValueError: what `Backbone.from_pretrained` raises, or a checkpoint without an
                embedding table.
        """
        checkpoint = layouts.read(path_or_repo)
        table, head = checkpoint.embedding, checkpoint.head
        if table is None:
            raise ValueError(
                f"{checkpoint.folder}: a backbone without an embedding table; expected a language "
                "model's checkpoint"
            )
        if head is None and not checkpoint.tied:
            raise ValueError(
                f"{checkpoint.folder}: missing: lm_head.weight, which its config.json does not tie "
                "to the embedding; expected a language model's checkpoint"
            )
        backbone = Backbone.from_checkpoint(checkpoint)
        for name, weight in (("embedding", table), ("head", head)):
            if weight is not None and weight.shape != (len(table), backbone.config.d_model):
                raise ValueError(
                    f"{checkpoint.folder}: the {name}'s weight is {tuple(weight.shape)}, expected "
                    f"(vocabulary, d_model) = {(len(table), backbone.config.d_model)}"
                )
        tied = head is None or torch.equal(head, table)
        model = cls(
            backbone.config,
            min(checkpoint.vocab_size or len(table), len(table)),
            padded_vocab_size=len(table),
            tie_embeddings=tied,
            device="meta",
        )
        model.backbone = backbone
        model.embedding.weight = nn.Parameter(table)
        model.head.proj.weight = (
            model.embedding.weight if head is None or tied else nn.Parameter(head)
        )
        cast_weights(model, dtype)
        return model.to(device).eval()


def load_tokenizer(path_or_repo: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` in a checkpoint's folder. Raises FileNotFoundError without one."""
    from tokenizers import Tokenizer

    path = layouts.local_folder(path_or_repo) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; put the checkpoint's tokenizer there, in the format of the "
            "tokenizers library (state-spaces' models use that of EleutherAI/gpt-neox-20b)"
        )
    return Tokenizer.from_file(str(path))


def end_tokens(path_or_repo: str | os.PathLike[str], tokenizer: Any) -> list[int]:
    """The tokens that end a text of a checkpoint; none where nothing in its folder names one.

    As in transformers those of generation_config.json, or of config.json; a checkpoint that names
    none there may have a tokenizer_config.json, whose `eos_token` is a text.

    Args:
        path_or_repo: the checkpoint.
        tokenizer: what `load_tokenizer` gives for it.
    """
    folder = layouts.local_folder(path_or_repo)
    for name in ("generation_config.json", CONFIG_NAME):
        path = folder / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    path = folder / "tokenizer_config.json"
    text = read_json(path).get("eos_token") if path.is_file() else None
    token = tokenizer.token_to_id(text["content"] if isinstance(text, dict) else text or "")
    return [] if token is None else [token]


def text_pieces(tokenizer: Any, ids: list[int], tokens: Iterator[Tensor]) -> Iterator[str]:
    """What each new token adds to the text of a prompt, as soon as its characters are whole.

    Args:
        tokenizer: of the `tokenizers` library.
        ids: the prompt.
        tokens: new tokens (1,), as `LanguageModel.generate` yields them for one prompt.
    """
    ids = list(ids)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(int(token))
        text = tokenizer.decode(ids)
        if not text.endswith("�"):  # half a character: the next token completes it
            yield text[len(shown) :]
            shown = text


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected above 0 and up to 1, or None")


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """A token (b,) for logits (b, v)."""
    if temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = (logits / temperature).sort(descending=True)
    if top_k is not None:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    shares = ordered.softmax(-1)
    if top_p is not None:
        before = shares.cumsum(-1) - shares  # the likeliest token always stays
        shares = shares.masked_fill(before >= top_p, 0)
    return tokens.gather(1, torch.multinomial(shares, 1, generator=generator))[:, 0]
