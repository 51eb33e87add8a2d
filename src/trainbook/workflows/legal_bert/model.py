"""BERT with the brief's legal attention: a learned weight for every token, beside each feature's maximum, instead of [CLS]."""

# B texts, L tokens, D width, C labels

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from trainbook.errors import UserError
from trainbook.workflows.legal_bert.config import Config

PADDING = 0  # the id of [PAD], in every BERT
NUM_SLICES = 4  # of a batch, by length, so that a short text is not padded to the longest one


class LegalBert(BertForSequenceClassification):
    """`BertForSequenceClassification` whose classifier sees [sum_i a_i h_i, max_i h_i], a = softmax(w.h) over a text's tokens.

    Args:
        config: transformers' own, with `pooling` and `num_slices` besides.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        if config.pooling == "attention_max":
            self.attention = nn.Linear(config.hidden_size, 1)
            self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, (B, C), of texts, (B, L) int64 with `PADDING` behind their ends.

        Texts are run in slices of similar length; each slice is cut to its longest text.
        """
        lengths = (ids != PADDING).sum(1)
        order = lengths.argsort(descending=True)
        slices = order.tensor_split(min(self.config.num_slices, len(ids)))
        pooled = torch.cat([self.pool(*self.encode(ids[part][:, : int(lengths[part[0]])])) for part in slices])
        return self.classifier(self.dropout(pooled))[order.argsort()]

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What BERT makes of each token, (B, L, D), and which tokens belong to the text, (B, L)."""
        is_text = ids != PADDING
        return self.bert(input_ids=ids, attention_mask=is_text.long()).last_hidden_state, is_text

    def pool(self, h: Tensor, is_text: Tensor) -> Tensor:
        """One vector per text: (B, 2 D), or (B, D) for the first token alone."""
        if self.config.pooling == "first":
            return h[:, 0]
        mean = (self.token_weights(h, is_text).unsqueeze(-1) * h).sum(1)
        return torch.cat([mean, h.masked_fill(~is_text.unsqueeze(-1), -torch.inf).amax(1)], -1)

    def token_weights(self, h: Tensor, is_text: Tensor) -> Tensor:
        """The legal attention's weights, (B, L): they sum to 1 over a text, 0 on padding."""
        return self.attention(h).squeeze(-1).float().masked_fill(~is_text, -torch.inf).softmax(1).to(h.dtype)


def make_model(config: Config, num_labels: int, num_tokens: int) -> LegalBert:
    """A small BERT from torch's random numbers, or a pretrained one with a new classifier.

    Raises:
        UserError: when pretrained weights cannot be had.
    """
    own = {"num_labels": num_labels, "pooling": config.pooling, "num_slices": NUM_SLICES, "attn_implementation": "sdpa"}
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    if config.pretrained:
        try:
            shape = BertConfig.from_pretrained(config.pretrained)
            for name, value in {**own, **dropout}.items():
                setattr(shape, name, value)
            model = LegalBert.from_pretrained(config.pretrained, config=shape, ignore_mismatched_sizes=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot get the weights of {config.pretrained}: {str(error).splitlines()[0]}",
                'turn the internet on, give the folder of a downloaded BERT, or train from scratch with pretrained = ""',
            ) from None
    else:
        shape = {
            "vocab_size": num_tokens,
            "hidden_size": config.width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": 4 * config.width,
            "max_position_embeddings": config.max_sequence_length,
        }
        model = LegalBert(BertConfig(**shape, **own, **dropout))
    if config.gradient_checkpointing:  # its newer name first
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model
