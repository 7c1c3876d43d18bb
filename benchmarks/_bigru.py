"""The recogniser that `audio_speech.py` compares with: the same features and tokens, a BiGRU."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mamba2_apps.heads import CTCHead


class BiGRU(nn.Module):
    """adapter ∘ bidirectional GRU ∘ CTC head.

    Args:
        num_outputs: letters.
        adapter: called with the width of its embeddings.
        d_model: width of the embeddings.
        hidden: units of each direction.
        layers: of the GRU.
        dropout: between layers.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        adapter: Callable[[int], nn.Module],
        d_model: int = 256,
        hidden: int = 256,
        layers: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.adapter = adapter(d_model)
        self.gru = nn.GRU(
            d_model, hidden, layers, batch_first=True, bidirectional=True, dropout=dropout
        )
        self.head = CTCHead(2 * hidden, num_outputs)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        embeddings, tokens = self.adapter(inputs, mask)
        if tokens is None:
            return self.head(self.gru(embeddings)[0])
        lengths = tokens.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(embeddings, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=embeddings.shape[1]
        )
        return self.head(hidden, tokens)

    def token_mask(self, inputs: Tensor, mask: Tensor | None) -> Tensor | None:
        return self.adapter.token_mask(inputs, mask)  # type: ignore[operator]
