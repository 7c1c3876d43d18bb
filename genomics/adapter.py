"""From token ids to embeddings.

Dimensions: batch b · seqlen l · d_model d
"""

import torch
from torch import Tensor, nn

from mamba2_apps.genomics.tokenizers import TokenizerOptions, build_tokenizer


class TokenEmbedding(nn.Module):
    """Look up a vector for each token, with the tokens around it and its place where asked for.

    Args:
        d_model: width of the embeddings.
        tokenizer: `kind` (base, kmer, bpe) and its options, as the recipe's data has them.
        context: tokens, an odd number, that a convolution over the embeddings sees around each; 0:
            none.
        positions: tokens for which a place is learned, for inputs that are aligned (a window around
            a site); 0: none. Longer inputs raise ValueError.
        period: learn a vector for each place modulo this, 3 for reading frames, which a state space
            of real decays cannot count; 0: none.
        dropout: part of the embedding's values that training sets to 0.
        token_dropout: part of the tokens that training replaces by the mask token, so that no
            answer rests on one of them; needs `maskable`.
        maskable: for pretraining; hidden tokens become the tokenizer's mask token.
    """

    discrete_targets = True

    def __init__(
        self,
        d_model: int,
        *,
        tokenizer: TokenizerOptions | None = None,
        context: int = 0,
        positions: int = 0,
        period: int = 0,
        dropout: float = 0.0,
        token_dropout: float = 0.0,
        maskable: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= token_dropout < 1 or (token_dropout and not maskable):
            raise ValueError(
                f"adapter.token_dropout is {token_dropout} and adapter.maskable {maskable}; "
                "expected at least 0 and below 1, and maskable true for any but 0"
            )
        if context and (context < 0 or context % 2 == 0):
            raise ValueError(f"adapter.context is {context}, expected an odd number, or 0")
        self.tokenizer = build_tokenizer(tokenizer or {"kind": "base"})
        self.maskable, self.token_dropout = maskable, token_dropout
        self.target_size = self.tokenizer.size
        self.embedding = nn.Embedding(self.tokenizer.size, d_model)
        self.conv = nn.Conv1d(d_model, d_model, context, padding=context // 2) if context else None
        self.position = nn.Parameter(torch.empty(positions, d_model)) if positions else None
        if self.position is not None:
            nn.init.normal_(self.position, std=0.1)
        self.phase = nn.Embedding(period, d_model) if period else None
        self.dropout = nn.Dropout(dropout)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer must not decay."""
        return {"position"} if self.position is not None else set()

    @property
    def token_by_token(self) -> bool:
        """Whether an embedding depends on its own token alone."""
        return self.conv is None and self.position is None and self.phase is None

    @property
    def complement(self) -> Tensor:
        """(size,) id of each token's reverse complement; ValueError where the tokens have none."""
        return self.tokenizer.complement

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (b, l) integer to embeddings (b, l, d), and the mask (b, l) as it came.

        hide (b, l) bool: tokens to replace by the mask token; needs `maskable`.
        """
        if self.training and self.token_dropout:
            dropped = torch.rand(inputs.shape, device=inputs.device) < self.token_dropout
            hide = dropped if hide is None else hide | dropped
        if hide is not None:
            if not self.maskable:
                raise ValueError("hide was given; build the adapter with maskable=True")
            inputs = torch.where(hide, self.tokenizer.mask_id, inputs)
        embeddings = self.embedding(inputs)
        if self.conv is not None:
            data = embeddings if mask is None else torch.where(mask[..., None], embeddings, 0)
            embeddings = embeddings + self.conv(data.mT).mT
        if self.position is not None:
            if inputs.shape[1] > len(self.position):
                raise ValueError(
                    f"an input of {inputs.shape[1]} tokens; this model knows {len(self.position)} "
                    "places (adapter.positions)"
                )
            embeddings = embeddings + self.position[_places(inputs, mask)]
        if self.phase is not None:
            places = _places(inputs, mask) % self.phase.num_embeddings
            embeddings = embeddings + self.phase(places)
        return self.dropout(embeddings), mask

    def targets(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each token should give back in pretraining: its id, (b, l) int64."""
        return inputs.long()


def _places(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(b or 1, l) int64, counted from each row's first data."""
    if mask is None:
        return torch.arange(inputs.shape[1], device=inputs.device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)
