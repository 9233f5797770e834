# Copyright 2026 The par_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Backbone of PAR ("Parallelized Autoregressive Visual Generation", arXiv 2412.15119) and of LlamaGen (arXiv 2406.06525).

A Llama decoder over visual tokens with an axial rotary embedding. It knows nothing of token orders: what stands in which
slot, where, and in which attention group, is the scheduler's to say.

This file travels inside checkpoints: it imports the standard library, torch and transformers only.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


# logits that the loss holds at a time: 256 MiB in float32
_MAX_LOGITS = 2**26


class PARConfig(PreTrainedConfig):
    r"""
    Configuration of [`PARModel`] and [`PARForConditionalGeneration`]. The grid is not part of it: one set of weights
    serves any grid the scheduler plans.

    Args:
        vocab_size (`int`, defaults to 16384): Codes of the image tokenizer.
        num_classes (`int`, defaults to 1000): Classes; id `num_classes` is the null class of classifier-free guidance.
        num_learnable_tokens (`int`, defaults to 3):
            Learnable tokens, n - 1 for n parallel tokens. Their input ids are the `num_learnable_tokens` from
            `vocab_size` on.
        hidden_size (`int`, defaults to 1024), intermediate_size (`int`, defaults to 2816),
        num_hidden_layers (`int`, defaults to 24), num_attention_heads (`int`, defaults to 16):
            Sizes of the decoder; the defaults are LlamaGen-L's.
        num_key_value_heads (`int`, *optional*): Key and value heads. Defaults to `num_attention_heads`.
        rms_norm_eps (`float`, defaults to 1e-5): Epsilon of the norms.
        rope_theta (`float`, defaults to 10000): Base of the rotary embedding.
        rope_axes (`int`, defaults to 2):
            Coordinates of a token: 2 for (row, column), 3 for (frame, row, column).
        rope_sections (`tuple[int, ...]`, *optional*):
            Channel pairs of a head that each axis rotates, half the width of a head in all. Defaults to equal numbers, the
            first axis taking those left over.
        rope_unplaced (`str`, defaults to `"zero"`):
            Rotation of slots without a place, the condition and the learnable tokens (coordinates -1). `"zero"`: cosine
            and sine are 0, so that their queries and keys vanish, as in all published weights. `"identity"`: unrotated.
        condition (`str`, defaults to `"class"`):
            `"class"`: one slot from a table of classes. `"caption"`: `caption_length` slots projected from features.
        caption_channels (`int`, defaults to 2048), caption_length (`int`, defaults to 120):
            Shape (`caption_length`, `caption_channels`) of caption features.
        token_dropout, residual_dropout, attention_dropout (`float`, defaults to 0.0):
            Dropouts on the embedded slots, on the output of attention and feed-forward, and on attention weights. The
            paper trains with 0.1 each.
        condition_dropout (`float`, defaults to 0.0):
            Share of conditions that training replaces by the null condition. The paper trains with 0.1.
        hidden_act (`str`, defaults to `"silu"`), mlp_bias (`bool`, defaults to `False`): Gated feed-forward.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights; the output head starts at zero.
        use_cache (`bool`, defaults to `True`): Whether inference returns a key-value cache.
    """

    model_type = "par"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 16384
    num_classes: int = 1000
    num_learnable_tokens: int = 3
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_axes: int = 2
    rope_sections: tuple[int, ...] | list[int] | None = None
    rope_unplaced: str = "zero"
    condition: str = "class"
    caption_channels: int = 2048
    caption_length: int = 120
    token_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    condition_dropout: float = 0.0
    hidden_act: str = "silu"
    mlp_bias: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name, multiple, divisor in (
            ("num_attention_heads", "hidden_size", self.num_attention_heads),
            ("num_key_value_heads", "num_attention_heads", self.num_key_value_heads),
        ):
            if getattr(self, multiple) % divisor:
                raise ValueError(f"`{name}` must divide `{multiple}` ({getattr(self, multiple)}), got {divisor}.")
        if self.head_dim % 2 or self.head_dim < 2 * self.rope_axes:
            raise ValueError(
                f"`hidden_size` / `num_attention_heads` must be even and at least {2 * self.rope_axes} for "
                f"{self.rope_axes} rotary axes, got {self.head_dim}."
            )
        for name, allowed in (("rope_unplaced", ("zero", "identity")), ("condition", ("class", "caption"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}.")
        if self.rope_axes not in (2, 3):
            raise ValueError(f"`rope_axes` must be 2 or 3, got {self.rope_axes!r}.")
        pairs, sections = self.head_dim // 2, self.rope_sections
        if sections is not None and (
            len(sections) != self.rope_axes
            or not all(isinstance(section, int) and section >= 0 for section in sections)
            or sum(sections) != pairs
        ):
            raise ValueError(
                f"`rope_sections` must be {self.rope_axes} whole numbers with the sum {pairs}, half the width of a head, "
                f"got {sections!r}."
            )
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_condition_slots(self) -> int:
        """Slots of the condition, before those of the tokens."""
        return 1 if self.condition == "class" else self.caption_length


class PARRotaryEmbedding(nn.Module):
    """
    Axial rotary embedding: cosines and sines (..., slots, head_dim / 2) in float32 for grid coordinates
    (..., slots, axes). Nothing is stored, so that neither meta-device loading nor a change of dtype can spoil it.
    """

    def __init__(self, config: PARConfig):
        super().__init__()
        later = config.head_dim // 2 // config.rope_axes
        equal = [config.head_dim // 2 - later * (config.rope_axes - 1)] + [later] * (config.rope_axes - 1)
        self.sections = config.rope_sections or equal
        self.theta = config.rope_theta
        self.unplaced = config.rope_unplaced

    @torch.no_grad()
    def forward(self, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = []
        for axis, pairs in enumerate(self.sections):
            exponents = torch.arange(pairs, device=position_ids.device, dtype=torch.float32) / pairs
            angles.append(position_ids[..., axis, None].float() * self.theta**-exponents)
        angles = torch.cat(angles, dim=-1)
        is_placed = position_ids[..., :1] >= 0
        cos = torch.where(is_placed, angles.cos(), 0.0 if self.unplaced == "zero" else 1.0)
        return cos, torch.where(is_placed, angles.sin(), 0.0)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring channel pairs of `states` (B, heads, slots, head_dim), in float32, as the published code does."""
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(-2).to(states.dtype)


class PARAttention(nn.Module):
    def __init__(self, config: PARConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        # fast kernels want heads of whole multiples of 8 and would copy the whole cache to widen it at each step
        self.padding = -self.head_dim % 8
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        key = rotate(self.k_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.padding:
            query, key, value = (F.pad(states, (0, self.padding)) for states in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output[..., : self.head_dim]
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class PARDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: PARConfig, layer_idx: int):
        super().__init__()
        self.self_attn = PARAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class PARClassEmbedding(nn.Module):
    """Class ids (B,) -> condition slots (B, 1, hidden_size). The last row of the table is the null class."""

    def __init__(self, config: PARConfig):
        super().__init__()
        self.null_class = config.num_classes
        self.condition_dropout = config.condition_dropout
        self.embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, class_labels: torch.LongTensor) -> torch.Tensor:
        if self.training and self.condition_dropout > 0:
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.condition_dropout
            class_labels = class_labels.masked_fill(dropped, self.null_class)
        return self.embedding(class_labels).unsqueeze(1)


class PARCaptionEmbedding(nn.Module):
    """
    Caption features (B, caption_length, caption_channels) -> condition slots (B, caption_length, hidden_size). Where
    `null_condition` (B,) is true, the learned null features take their place.
    """

    def __init__(self, config: PARConfig):
        super().__init__()
        self.condition_dropout = config.condition_dropout
        self.null_features = nn.Parameter(torch.zeros(config.caption_length, config.caption_channels))
        self.fc1 = nn.Linear(config.caption_channels, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, encoder_hidden_states: torch.Tensor, null_condition: torch.BoolTensor | None = None
    ) -> torch.Tensor:
        if self.training and self.condition_dropout > 0:
            batch, device = len(encoder_hidden_states), encoder_hidden_states.device
            null_condition = torch.rand(batch, device=device) < self.condition_dropout
        if null_condition is not None:
            null_condition = null_condition.to(encoder_hidden_states.device)[:, None, None]
            encoder_hidden_states = torch.where(null_condition, self.null_features, encoder_hidden_states)
        return self.fc2(F.gelu(self.fc1(encoder_hidden_states), approximate="tanh"))


class PackedLinear(nn.Module):
    """
    A linear layer without bias for inference on CPUs: its weight lies in memory as oneDNN multiplies it fastest with `rows`
    rows of input. It reads and saves as the layer it was made from; it cannot be moved or cast.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.packed, None, "none", [], "")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.packed.to_dense()

    def _apply(self, fn, recurse=True):
        probe = torch.empty(0, dtype=self.packed.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise ValueError(
                f"Packed weights stay {probe.dtype} on the CPU: move or cast the model before packing it."
            )
        return self


def _is_shown(attention_mask: torch.BoolTensor, batch: int, head: int, query: int, key: int) -> torch.BoolTensor:
    """A mask function of transformers: whether slot `key` is shown to slot `query`."""
    return attention_mask[batch, key] | (query == key)


class PARPreTrainedModel(PreTrainedModel):
    config: PARConfig
    config_class = PARConfig
    # read when the module is imported: diffusers overwrites the file of remote code whenever it loads another folder
    _source = Path(__file__).read_text(encoding="utf-8")
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PARDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _skip_keys = ["past_key_values"]  # the same, for diffusers' hooks
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PARDecoderLayer, "attentions": PARAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module is self.get_output_embeddings():
            init.zeros_(module.weight)
        elif isinstance(module, PARCaptionEmbedding):
            init.normal_(module.null_features, std=self.config.caption_channels**-0.5)
        else:
            super()._init_weights(module)


class PARModel(PARPreTrainedModel):
    """The decoder without its output head. See [`PARForConditionalGeneration`]."""

    def __init__(self, config: PARConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size + config.num_learnable_tokens, config.hidden_size)
        embed_condition = PARClassEmbedding if config.condition == "class" else PARCaptionEmbedding
        self.embed_condition = embed_condition(config)
        self.dropout = nn.Dropout(config.token_dropout)
        self.rotary_emb = PARRotaryEmbedding(config)
        self.layers = nn.ModuleList([PARDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        block_sequence_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        is_causal: bool = True,
        null_condition: torch.BoolTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        slots = []
        if class_labels is not None:
            slots.append(self.embed_condition(class_labels))
        elif encoder_hidden_states is not None:
            slots.append(self.embed_condition(encoder_hidden_states, null_condition))
        if input_ids is not None:
            slots.append(self.embed_tokens(input_ids))
        if not slots:
            raise ValueError("One of `input_ids`, `class_labels` and `encoder_hidden_states` must be given, got none.")
        hidden_states = self.dropout(torch.cat(slots, dim=1))
        if position_ids is None or position_ids.shape[-2:] != (hidden_states.shape[1], self.config.rope_axes):
            raise ValueError(
                f"`position_ids` must hold the {self.config.rope_axes} grid coordinates of each of the "
                f"{hidden_states.shape[1]} slots, got {None if position_ids is None else tuple(position_ids.shape)}."
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # where all sequences of a batch see alike, the mask is made for one of them and broadcast
        alike = attention_mask is None and (block_sequence_ids is None or block_sequence_ids.ndim == 1)
        embeds = hidden_states[:1] if alike else hidden_states
        length = hidden_states.shape[1]
        end = length + (0 if past_key_values is None else past_key_values.get_seq_length())
        total = length if past_key_values is None else past_key_values.get_mask_sizes(length, 0)[0]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = F.pad(attention_mask.bool(), (0, total - attention_mask.shape[1]), value=True)
        if is_causal:
            if block_sequence_ids is not None:
                block_sequence_ids = block_sequence_ids.to(hidden_states.device).expand(len(hidden_states), -1)
            visible = None
            if attention_mask is not None and attention_mask.ndim == 2:
                # a hidden slot still sees itself, as in the published code: what sees nothing would be no number
                visible = partial(_is_shown, attention_mask)
                attention_mask = None
            # without `position_ids`: the mask functions would take grid coordinates for those of packed sequences
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                and_mask_function=visible,
                block_sequence_ids=block_sequence_ids,
            )
        else:
            if getattr(past_key_values, "is_compileable", False):
                # a static cache is read whole: nobody sees what is not filled yet
                filled = (torch.arange(total, device=hidden_states.device) < end).expand(len(embeds), -1)
                attention_mask = filled if attention_mask is None else attention_mask & filled
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        cos, sin = self.rotary_emb(position_ids.to(hidden_states.device))
        if position_ids.ndim == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, slots, head_dim / 2)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=(cos, sin),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                is_causal=is_causal,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class PARForConditionalGeneration(PARPreTrainedModel):
    r"""
    The autoregressive backbone of PAR with its output head.

    Example (teacher forcing; the scheduler says what stands where):

    ```py
    >>> import torch
    >>> from par_diffusers import PARConfig, PARForConditionalGeneration, PARScheduler

    >>> scheduler = PARScheduler(grid_size=(4, 4), num_parallel_tokens=4)
    >>> config = PARConfig(
    ...     vocab_size=32, num_classes=10, num_learnable_tokens=3, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    ... )
    >>> model = PARForConditionalGeneration(config).eval()
    >>> tokens = torch.randint(32, (2, 4, 4))
    >>> output = model(
    ...     class_labels=torch.tensor([1, 7]),
    ...     labels=scheduler.order_tokens(tokens),
    ...     **scheduler.model_inputs(tokens, config.vocab_size),
    ... )
    >>> output.logits.shape
    torch.Size([2, 16, 32])
    ```
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PARConfig):
        super().__init__(config)
        self.model = PARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def pack_linear_weights(self, rows: int = 8) -> "PARForConditionalGeneration":
        """
        Lays out the weights of all linear layers for fast decoding on a CPU, in place; for inference only.

        Args:
            rows (`int`, defaults to 8): Rows of a step to lay them out for: images, twice with guidance, times tokens.
        """
        if self.device.type != "cpu" or self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"Weights are packed in float32 or bfloat16 on the CPU, the model is {self.dtype} on {self.device}."
            )
        if getattr(self, "is_quantized", False):
            raise ValueError("Weights are packed in float32 or bfloat16, those of the model are quantized.")
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child, rows))
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        block_sequence_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Slots are those of the condition, where one is given, followed by those of `input_ids`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Token ids; ids from `vocab_size` on are the learnable tokens.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class ids, for `condition="class"`; `num_classes` is the null class. Given with the first slots only.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, caption_length, caption_channels)`, *optional*):
                Caption features, for `condition="caption"`.
            position_ids (`torch.LongTensor` of shape `(slots, axes)` or `(batch_size, slots, axes)`):
                Grid coordinates of the token each slot carries, -1 where it has none.
            block_sequence_ids (`torch.LongTensor` of shape `(total,)` or `(batch_size, total)`, *optional*):
                Attention group of every slot from the first cached one on: slots see all earlier ones and their own
                group. Without it, attention is causal.
            is_causal (`bool`, defaults to `True`):
                `False`: all slots given see each other and all cached ones; there are no groups then.
            attention_mask (`torch.Tensor`, *optional*):
                (batch_size, length), 0 for those of the first slots that only they themselves may see, such as the
                padding of captions; slots from `length` on are seen. Or a prepared 4D mask.
            null_condition (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
                Sequences whose `encoder_hidden_states` are replaced by the learned null features.
            past_key_values (`Cache`, *optional*): Keys and values of earlier slots.
            labels (`torch.LongTensor` of shape `(batch_size, num_labels)`, *optional*):
                Target token of each of the last `num_labels` slots, in the order of the slots (nothing is shifted), -100
                where there is none. Only those slots get logits.
            use_cache (`bool`, *optional*): Whether to fill and return a cache.
            logits_to_keep (`int`, defaults to 0): Last slots to compute logits for, 0 for all. `labels` decide otherwise.
            skip_logits (`bool`, defaults to `False`):
                With `labels`: `loss` is that of each label, and there are no logits; their memory is bounded, whatever the
                vocabulary and the batch.

        Returns:
            `CausalLMOutputWithPast` with `loss` (mean cross-entropy in nats, computed in float32; with `skip_logits` one
            for each label, (batch_size, num_labels)), `logits` (batch_size, slots kept, vocab_size) and `past_key_values`.
        """
        if skip_logits and labels is None:
            raise ValueError("`skip_logits` goes with `labels`, got none.")
        outputs = self.model(
            input_ids=input_ids,
            class_labels=class_labels,
            encoder_hidden_states=encoder_hidden_states,
            position_ids=position_ids,
            block_sequence_ids=block_sequence_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if labels is not None:
            logits_to_keep = labels.shape[1]
        hidden_states = outputs.last_hidden_state[:, -logits_to_keep:]
        logits = loss = None
        if skip_logits:
            loss = self._label_losses(hidden_states, labels.to(hidden_states.device))
        else:
            logits = self.lm_head(hidden_states)
        if labels is not None and not skip_logits:
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.to(logits.device).flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _label_losses(self, hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """Cross-entropies (B, num_labels) in float32; no more than `_MAX_LOGITS` logits are held at a time."""
        rows, targets = hidden_states.flatten(0, 1), labels.flatten()
        size = max(1, _MAX_LOGITS // self.config.vocab_size)
        if len(rows) <= size:
            return self._row_losses(rows, targets).view_as(labels)
        # the backward pass makes the logits of a part again
        parts = zip(rows.split(size), targets.split(size), strict=True)
        losses = [checkpoint(self._row_losses, *part, use_reentrant=False) for part in parts]
        return torch.cat(losses).view_as(labels)

    def _row_losses(self, rows: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
        return F.cross_entropy(self.lm_head(rows).float(), targets, reduction="none")


PARConfig.register_for_auto_class()
PARForConditionalGeneration.register_for_auto_class("AutoModel")
