"""WideNet for text and its dense student: an ALBERT-like encoder as a ``transformers`` model, registered with the Auto classes.

After ALBERT (Lan et al., arXiv 1909.11942) and WideNet (arXiv 2107.11817): factorised embeddings, attention and feed-forward
weights shared across depth, norms of every depth its own, the feed-forward layer an MoE or, with one expert, dense. As in
WideNet norms stand before attention and feed-forward layer. After ``import ones_lib``,
``AutoModelForSequenceClassification.from_pretrained(folder)`` and its like load what ``save_pretrained`` wrote.
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
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)

from ones_lib.moe import MoEFeedForward, MoEModel


class WideNetTextConfig(PretrainedConfig):
    """Configuration of the text models, in transformers' names.

    Args:
        embedding_size: width of the factorised token embeddings, at most ``hidden_size``.
        intermediate_size: d_ff, hidden neurons of one expert.
        num_experts: E; 1 makes the dense model, without router.
        num_experts_per_tok, capacity_factor, renormalize: see :class:`ones_lib.moe.Router`.
        share_depth: False gives every depth its own attention and experts.
        relative_positions: the largest distance between tokens that has an attention bias of its own, one a depth and head,
            learned; 0 is none, as in ALBERT. At first it falls with distance as in ALiBi (Press et al., arXiv 2108.12409), and
            half of the heads look ahead, half back. Without it small models take long to learn that neighbours matter.
        classifier_pooling: what a sequence classifier reads: ``mean`` of the tokens or the first, ``cls``.
    """

    model_type = "widenet_text"

    def __init__(
        self,
        vocab_size: int = 30000,
        embedding_size: int = 128,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        capacity_factor: float | None = 1.2,
        renormalize: bool = False,
        share_depth: bool = True,
        relative_positions: int = 0,
        hidden_dropout_prob: float = 0.0,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        classifier_pooling: str = "mean",
        pad_token_id: int | None = 0,
        **kwargs,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads={num_attention_heads}, found {hidden_size}"
            )
        if classifier_pooling not in ("mean", "cls"):
            raise ValueError(f"classifier_pooling: expected 'mean' or 'cls', found {classifier_pooling!r}")
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.capacity_factor = capacity_factor
        self.renormalize = renormalize
        self.share_depth = share_depth
        self.relative_positions = relative_positions
        self.hidden_dropout_prob = hidden_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.classifier_pooling = classifier_pooling


class WideNetTextPreTrainedModel(MoEModel, PreTrainedModel):
    """What the text models have in common: initialisation, the dense twin, the balance loss."""

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
            reach = self.config.relative_positions
            offset = torch.arange(-reach, reach + 1)
            with torch.no_grad():
                for head in range(self.config.num_attention_heads):
                    away = (offset if head % 2 else -offset).clamp(min=0)
                    own = offset == 0  # what a token is itself, it knows without attention
                    module.position_bias[:, head] = -(4.0 ** -(head // 2) * offset.abs() + 2.0 * away + own)
        elif isinstance(module, WideNetForMaskedLM):
            nn.init.zeros_(module.bias)

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
    """The encoder: token ids [B, L] -> hidden states [B, L, d]."""

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
        tokens, mask = (
            None,
            None,
        )  # where there is padding: which are tokens [B, L], what is added for the others [B, 1, 1, L]
        if attention_mask is not None and not attention_mask.all():
            tokens = attention_mask.bool()
            mask = x.new_zeros(tokens.shape).masked_fill(~tokens, torch.finfo(x.dtype).min)[:, None, None]
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
    """Masked language model; the output embedding is the input embedding."""

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
        """``labels`` [B, L], -100 where there is none. ``predicted``, bool [B, L], asks for the logits of these positions
        alone, [n, V]: at a large vocabulary the others would take most of the time."""
        x = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        if predicted is not None:
            x, labels = x[predicted], None if labels is None else labels[predicted]
        x = self.transform_norm(F.gelu(self.transform(x)))
        logits = F.linear(x, self.encoder.word_embeddings.weight, self.bias)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class WideNetForSequenceClassification(WideNetTextPreTrainedModel):
    """Classifier of one sentence or a pair: ``num_labels`` logits of the pooled hidden states."""

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        self.encoder = WideNetTextModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
        if self.config.classifier_pooling == "cls":
            pooled = x[:, 0]
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            pooled = (x * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        logits = self.classifier(torch.tanh(self.pooler(pooled)))
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


class WideNetForQuestionAnswering(WideNetTextPreTrainedModel):
    """Extractive question answering: logits of the answer's first and last token."""

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        self.encoder = WideNetTextModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
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
        start_logits, end_logits = self.qa_outputs(x).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (F.cross_entropy(start_logits, start_positions) + F.cross_entropy(end_logits, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits)


AutoConfig.register(WideNetTextConfig.model_type, WideNetTextConfig)
AutoModel.register(WideNetTextConfig, WideNetTextModel)
AutoModelForMaskedLM.register(WideNetTextConfig, WideNetForMaskedLM)
AutoModelForSequenceClassification.register(WideNetTextConfig, WideNetForSequenceClassification)
AutoModelForQuestionAnswering.register(WideNetTextConfig, WideNetForQuestionAnswering)
