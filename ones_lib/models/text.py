"""WideNet for text and its dense student: an ALBERT-like encoder for transformers, registered with its Auto classes.

After ALBERT (Lan et al., arXiv 1909.11942) and WideNet (arXiv 2107.11817): factorised embeddings; attention and feed-forward
weights shared across depth, norms of each depth's own; an MoE feed-forward layer or, with one expert, a dense one. Norms stand
before attention and feed-forward layers, as in WideNet. After ``import ones_lib``,
``AutoModelForSequenceClassification.from_pretrained(folder)`` and the like load saved models.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)

from ones_lib.moe import MoEFeedForward, MoEModel


class WideNetTextConfig(PreTrainedConfig):
    """Configuration of the text models, with transformers' names.

    Args:
        embedding_size: width of the factorised token embeddings.
        intermediate_size: d_ff, hidden units of one expert.
        num_experts: E; 1 makes the dense model, without router.
        num_experts_per_tok, capacity_factor, renormalize: see :class:`ones_lib.moe.Router`.
        share_depth: False gives each depth its own attention and experts.
        relative_positions: the largest distance between tokens with an attention bias of its own, learned per depth and
            head; 0 is none, as in ALBERT. Initially the bias falls with distance as in ALiBi (Press et al., arXiv
            2108.12409); half of the heads look ahead, half back. Without it, small models are slow to learn that
            neighbours matter.
    """

    model_type = "widenet_text"

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_experts: int = 4
    num_experts_per_tok: int = 2
    capacity_factor: float | None = 1.2
    renormalize: bool = False
    share_depth: bool = True
    relative_positions: int = 0
    hidden_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads={self.num_attention_heads}, found {self.hidden_size}"
            )
        super().__post_init__(**kwargs)


class WideNetTextPreTrainedModel(MoEModel, PreTrainedModel):
    """Base of the text models: initialisation and the dense twin."""

    config_class = WideNetTextConfig
    base_model_prefix = "encoder"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, MoEFeedForward):
            module.init_weights()
        elif isinstance(module, WideNetTextModel) and module.position_bias is not None:
            self._init_position_bias(module.position_bias)
        elif isinstance(module, WideNetForMaskedLM):
            nn.init.zeros_(module.bias)

    @torch.no_grad()
    def _init_position_bias(self, bias: Tensor) -> None:
        """Start [depth, heads, offsets] with a penalty on distance, on the other direction, and on the token itself."""
        reach = self.config.relative_positions
        offset = torch.arange(-reach, reach + 1)
        for head in range(self.config.num_attention_heads):
            other_direction = (offset if head % 2 else -offset).clamp(min=0)
            itself = offset == 0  # a token knows itself without attention
            bias[:, head] = -(4.0 ** -(head // 2) * offset.abs() + 2.0 * other_direction + itself)

    def dense_twin(self, d_ff: int | None = None) -> WideNetTextPreTrainedModel:
        """A freshly initialised dense model (one expert, no router) of this architecture, ``d_ff`` wide if given."""
        config = copy.deepcopy(self.config)
        config.num_experts = 1
        config.intermediate_size = d_ff or config.intermediate_size
        return type(self)(config)

    def hidden_state_readers(self) -> list[nn.Module]:
        encoder = getattr(self, self.base_model_prefix, self)
        return [*encoder.attention_norms[1:], encoder.final_norm]


class WideNetTextModel(WideNetTextPreTrainedModel):
    """The encoder: token ids [B, L] to hidden states [B, L, d]."""

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        d, distinct = config.hidden_size, 1 if config.share_depth else config.num_hidden_layers
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.embedding_norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.embedding_projection = nn.Linear(config.embedding_size, d)
        self.attention = nn.ModuleList(
            Attention(d, config.num_attention_heads, qkv_bias=True, proj_drop=config.hidden_dropout_prob)
            for _ in range(distinct)
        )
        self.feed_forward = nn.ModuleList(
            MoEFeedForward(
                d,
                config.intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                config.capacity_factor,
                config.renormalize,
                drop=config.hidden_dropout_prob,
            )
            for _ in range(distinct)
        )
        depth, eps = config.num_hidden_layers, config.layer_norm_eps
        self.attention_norms = nn.ModuleList(nn.LayerNorm(d, eps=eps) for _ in range(depth))
        self.feed_forward_norms = nn.ModuleList(nn.LayerNorm(d, eps=eps) for _ in range(depth))
        self.final_norm = nn.LayerNorm(d, eps=eps)
        self.position_bias = None
        if config.relative_positions:
            shape = (depth, config.num_attention_heads, 2 * config.relative_positions + 1)
            self.position_bias = nn.Parameter(torch.zeros(shape))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        self.clear_balance_losses()
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids: expected at most {self.config.max_position_embeddings} tokens, found {length}"
            )
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(types)  # [B, L, e]
        x = x + self.position_embeddings.weight[:length]
        x = self.dropout(self.embedding_projection(self.embedding_norm(x)))  # [B, L, d]
        tokens, mask = None, None  # without padding, which a graph can't know of
        if attention_mask is not None and (torch.compiler.is_exporting() or not attention_mask.all()):
            tokens = attention_mask.bool()  # [B, L]
            mask = x.new_zeros(tokens.shape).masked_fill(~tokens, torch.finfo(x.dtype).min)[
                :, None, None
            ]  # [B, 1, 1, L]
        bias = self._position_bias(length)  # [depth, heads, L, L] or None
        for i in range(self.config.num_hidden_layers):
            shared = 0 if self.config.share_depth else i
            added = mask if bias is None else bias[i] if mask is None else bias[i] + mask
            x = x + self.attention[shared](self.attention_norms[i](x), attn_mask=added)
            x = x + self.feed_forward[shared](self.feed_forward_norms[i](x), tokens)
        return BaseModelOutput(last_hidden_state=self.final_norm(x))

    def _position_bias(self, length: int) -> Tensor | None:
        if self.position_bias is None:
            return None
        reach, at = self.config.relative_positions, torch.arange(length, device=self.position_bias.device)
        return self.position_bias[:, :, (at - at[:, None]).clamp(-reach, reach) + reach]


class WideNetForMaskedLM(WideNetTextPreTrainedModel):
    """Masked language model; input and output embeddings are shared."""

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        self.encoder = WideNetTextModel(config)
        self.transform = nn.Linear(config.hidden_size, config.embedding_size)
        self.transform_norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        predicted: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """``labels`` [B, L] are -100 where nothing is predicted. With ``predicted``, bool [B, L], only the logits of these n
        positions are computed, [n, V]: with a large vocabulary the others would take most of the time."""
        x = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        if predicted is not None:
            x, labels = x[predicted], None if labels is None else labels[predicted]
        x = self.transform_norm(F.gelu(self.transform(x)))
        logits = F.linear(x, self.encoder.word_embeddings.weight, self.bias)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


def _text_mean(x: Tensor, number: int, mask: Tensor | None, types: Tensor | None) -> Tensor:
    """Mean [B, d] of the hidden states [B, L, d] of the first text (``number`` 0) or the second (1); zeros where there is none."""
    types = x.new_zeros(x.shape[:2]) if types is None else types
    chosen = (types == number).to(x.dtype) if mask is None else (types == number) * mask.to(x.dtype)  # [B, L]
    return (x * chosen[:, :, None]).sum(dim=1) / chosen.sum(dim=1, keepdim=True).clamp(min=1)


class WideNetForSequenceClassification(WideNetTextPreTrainedModel):
    """Classifier of a sentence or a pair: ``num_labels`` logits.

    The head reads the mean hidden states u and v of the two texts as (u, v, abs(u - v), u * v), as InferSent's does (Conneau et
    al., arXiv 1705.02364); of a single text, v is zero. So the head compares the texts, and the layers need not.
    """

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        self.encoder = WideNetTextModel(config)
        self.pooler = nn.Linear(4 * config.hidden_size, 2 * config.hidden_size)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        x = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        u, v = (_text_mean(x, number, attention_mask, token_type_ids) for number in (0, 1))  # [B, d]
        logits = self.classifier(F.gelu(self.pooler(torch.cat([u, v, (u - v).abs(), u * v], dim=-1))))
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


class WideNetForQuestionAnswering(WideNetTextPreTrainedModel):
    """Extractive question answering: logits [B, L] of the answer's first and last token.

    The head reads a token's hidden state h beside the question's mean q as (h, q, h * q), as BiDAF's attention does (Seo et al.,
    arXiv 1611.01603). So the head compares token and question, and the layers need not. The first place, "no answer", gets the
    largest of what the head finds at the tokens of the context: there is no answer where none of them fits.
    """

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        self.encoder = WideNetTextModel(config)
        self.matching = nn.Linear(3 * config.hidden_size, 2 * config.hidden_size)
        self.qa_outputs = nn.Linear(2 * config.hidden_size, 2)
        self.no_answer = nn.Linear(2 * config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        x = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        q = _text_mean(x, 0, attention_mask, token_type_ids)[:, None].expand_as(x)
        matched = F.gelu(self.matching(torch.cat([x, q, x * q], dim=-1)))  # [B, L, 2d]
        context = torch.ones_like(input_ids) if token_type_ids is None else token_type_ids
        context = context if attention_mask is None else context * attention_mask
        best = matched.masked_fill(context[:, :, None] == 0, -1.0).amax(dim=1)  # [B, 2d]; GELU is above -0.2
        logits = torch.cat([self.no_answer(best)[:, None], self.qa_outputs(matched[:, 1:])], dim=1)
        start_logits, end_logits = logits.unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (F.cross_entropy(start_logits, start_positions) + F.cross_entropy(end_logits, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits)


AutoConfig.register(WideNetTextConfig.model_type, WideNetTextConfig)
AutoModel.register(WideNetTextConfig, WideNetTextModel)
AutoModelForMaskedLM.register(WideNetTextConfig, WideNetForMaskedLM)
AutoModelForSequenceClassification.register(WideNetTextConfig, WideNetForSequenceClassification)
AutoModelForQuestionAnswering.register(WideNetTextConfig, WideNetForQuestionAnswering)
