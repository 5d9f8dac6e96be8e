"""FastVLM in its train-time form, in plain PyTorch, which `train.py` trains and the converter must reproduce.

Module names are those of Apple's training code (ml-fastvlm, `mobileclip/mobileclip_l`), so `state_dict()` *is* the
checkpoint: MobileOne and RepMixer branches, large + small kernels and BatchNorms are all still apart.
Shapes are PyTorch's, NCHW: B batch, C channels, H, W height and width, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

STAGES = (0, 2, 4, 7, 10)
"""Indices of the stages in `network`, which also holds the downsampling and position encodings between them."""
TOWER = "model.vision_tower.vision_tower.model."


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The shape of a FastViTHD tower; the last two of its five stages use attention."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    stem_scale: bool = False
    layer_scale: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a Qwen2 decoder, with Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True


class ConvBN(nn.Module):
    """A convolution without bias, then BatchNorm."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if x.is_cuda:
            x = x.contiguous()  # in NCHW, PyTorch's own depthwise kernels; in NHWC, cuDNN's, which train slowly
        if conv.in_channels == conv.groups < conv.out_channels:
            # The same sums as a plain depthwise convolution over repeated channels: PyTorch's backward pass of several
            # filters per channel is five to ten times slower on a CPU.
            repeats = conv.out_channels // conv.groups
            x = x.repeat_interleave(repeats, 1)
            return self.bn(F.conv2d(x, conv.weight, None, conv.stride, conv.padding, 1, conv.out_channels))
        return self.bn(conv(x))


class SqueezeExcite(nn.Module):
    """Channel gates from the global average, 1/16 of the width in between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, dim // 16, 1)
        self.expand = nn.Conv2d(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gates.sigmoid()


class MobileOneBlock(nn.Module):
    """The sum of up to three branches: k×k convolution, 1×1 "scale" convolution and identity, each with BatchNorm."""

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        conv: bool = True,
        scale: bool = True,
        act: bool = True,
        se: bool = False,
    ) -> None:
        super().__init__()
        self.act = act
        self.se = SqueezeExcite(out) if se else nn.Identity()
        self.rbr_skip = nn.BatchNorm2d(dim) if dim == out and stride == 1 else None
        self.rbr_conv = nn.ModuleList([ConvBN(dim, out, kernel, stride, groups)] if conv else [])
        self.rbr_scale = ConvBN(dim, out, 1, stride, groups) if scale and kernel > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        branches = [b for b in (self.rbr_skip, *self.rbr_conv, self.rbr_scale) if b is not None]
        y = self.se(sum(branch(x) for branch in branches))
        return F.gelu(y) if self.act else y


class LargeKernelConv(nn.Module):
    """A strided 7×7 and a 3×3 convolution side by side, each with BatchNorm, two filters per input channel."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.lkb_origin = ConvBN(dim, out, 7, 2, dim)
        self.small_conv = ConvBN(dim, out, 3, 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.lkb_origin(x) + self.small_conv(x))


class PatchEmbed(nn.Module):
    """Halves the map and doubles the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(LargeKernelConv(dim, 2 * dim), MobileOneBlock(2 * dim, 2 * dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class RepMixer(nn.Module):
    """`x + layer_scale * (mixer(x) - norm(x))`, which folds into one 3×3 depthwise convolution."""

    def __init__(self, dim: int, layer_scale: float) -> None:
        super().__init__()
        self.norm = MobileOneBlock(dim, dim, 3, groups=dim, conv=False, scale=False, act=False)
        self.mixer = MobileOneBlock(dim, dim, 3, groups=dim, act=False)
        self.layer_scale = nn.Parameter(layer_scale * torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class ConvFFN(nn.Module):
    """7×7 depthwise convolution with BatchNorm, then a pointwise MLP four times as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = ConvBN(dim, dim, 7, groups=dim)
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    """Block of the first three stages."""

    def __init__(self, dim: int, layer_scale: float) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim, layer_scale)
        self.convffn = ConvFFN(dim)
        self.layer_scale = nn.Parameter(layer_scale * torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class RepCPE(nn.Module):
    """Conditional position encoding: a 7×7 depthwise convolution added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe(x)


class LayerNormChannel(nn.Module):
    """LayerNorm over the channels of an NCHW map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-5)
        return x.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention over all positions of a map, heads of 32."""

    head_dim = 32

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).view(b, h * w, 3, c // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return self.proj(y).transpose(1, 2).reshape(b, c, h, w)


class AttentionBlock(nn.Module):
    """Block of the last two stages."""

    def __init__(self, dim: int, layer_scale: float) -> None:
        super().__init__()
        self.norm = LayerNormChannel(dim)
        self.token_mixer = Attention(dim)
        self.convffn = ConvFFN(dim)
        self.layer_scale_1 = nn.Parameter(layer_scale * torch.ones(dim, 1, 1))
        self.layer_scale_2 = nn.Parameter(layer_scale * torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class FastViTHD(nn.Module):
    """The vision tower; `network` interleaves stages, downsampling and position encodings as upstream numbers them."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        dims = config.embed_dims
        first = dims[0]
        self.patch_embed = nn.Sequential(
            MobileOneBlock(3, first, 3, 2, scale=config.stem_scale),
            MobileOneBlock(first, first, 3, 2, first, scale=config.stem_scale),
            MobileOneBlock(first, first, 1),
        )
        self.network = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, config.depths, strict=True)):
            attention = stage >= 3
            if stage > 0:
                self.network.append(PatchEmbed(dims[stage - 1]))
            if attention:
                self.network.append(RepCPE(dim))
            block = AttentionBlock if attention else RepMixerBlock
            self.network.append(nn.Sequential(*(block(dim, config.layer_scale) for _ in range(depth))))
        self.conv_exp = MobileOneBlock(dims[-1], 2 * dims[-1], 3, groups=dims[-1], se=True)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns the maps of the five stages and, last, the features (B, 2C, R/64, R/64) of pixels (B, 3, R, R)."""
        x = self.patch_embed(pixels)
        maps = []
        for i, layer in enumerate(self.network):
            x = layer(x)
            if i in STAGES:
                maps.append(x)
        return [*maps, self.conv_exp(x)]


class RMSNorm(nn.Module):
    """Root mean square norm with a weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions; biases on q, k and v only."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        b, length, _ = x.shape
        q, k, v = (
            proj(x).view(b, length, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(x, *rope).to(v.dtype) for x in (q, k))
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, mask.to(v.dtype))
        return self.o_proj(y.transpose(1, 2).reshape(b, length, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class _VisionTower(nn.Module):
    """Upstream wraps the tower twice; so do the names."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.model = FastViTHD(config)


class _Model(nn.Module):
    def __init__(self, tower: TowerConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        dim = decoder.hidden_size
        self.embed_tokens = nn.Embedding(decoder.vocab_size, dim)
        self.layers = nn.ModuleList(DecoderLayer(decoder) for _ in range(decoder.num_hidden_layers))
        self.norm = RMSNorm(dim, decoder.rms_norm_eps)
        self.vision_tower = _VisionTower(tower)
        self.mm_projector = nn.Sequential(nn.Linear(2 * tower.embed_dims[-1], dim), nn.GELU(), nn.Linear(dim, dim))


class FastVLM(nn.Module):
    """Tower, projector and decoder under the names of Apple's checkpoints."""

    def __init__(self, tower: TowerConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.config = decoder
        self.model = _Model(tower, decoder)
        self.lm_head = None
        if not decoder.tie_word_embeddings:
            self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)

    @property
    def tower(self) -> FastViTHD:
        """The vision tower without upstream's wrappers."""
        return self.model.vision_tower.vision_tower.model

    @classmethod
    def load(cls, folder: Path) -> FastVLM:
        """Returns the model of a checkpoint in Apple's train-time layout, in float32, for inference."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        fields = DecoderConfig.__dataclass_fields__
        decoder = DecoderConfig(**{name: value for name, value in config.items() if name in fields})
        prefixes = [f"{TOWER}network.{stage}." for stage in STAGES]
        tower = TowerConfig(
            embed_dims=tuple(len(weights[f"{prefix}0.convffn.fc2.bias"]) for prefix in prefixes),
            depths=tuple(sum(f"{prefix}{i}.convffn.fc2.bias" in weights for i in range(99)) for prefix in prefixes),
            stem_scale=f"{TOWER}patch_embed.0.rbr_scale.conv.weight" in weights,
        )
        weights.pop(f"{TOWER}head.proj", None)  # MobileCLIP's, unused
        model = cls(tower, decoder)
        model.load_state_dict({name: value.float() for name, value in weights.items()})
        return model.eval()

    @torch.no_grad()
    def greedy(
        self, pixels: Tensor, before: Sequence[int], after: Sequence[int], end: Collection[int], limit: int
    ) -> list[int]:
        """Returns the most likely answer, without the token that ended it.

        Args:
            pixels: (1, 3, R, R), from 0 to 1.
            before: token ids before the image.
            after: token ids after it.
            end: the tokens that end an answer.
            limit: most tokens of the answer.
        """
        embed = self.model.embed_tokens
        visual = self.project(self.tower(pixels)[-1])
        answer: list[int] = []
        while len(answer) < limit:
            start, rest = torch.tensor([before]), torch.tensor([[*after, *answer]])
            embeds = torch.cat([embed(start), visual, embed(rest)], 1)
            length = embeds.shape[1]
            hidden = self.decode(embeds, torch.arange(length), torch.full((length, length), -torch.inf).triu(1))[-1]
            token = int(self.logits(hidden[0, -1]).argmax())
            if token in end:
                break
            answer.append(token)
        return answer

    def project(self, features: Tensor) -> Tensor:
        """Returns the visual tokens (B, N, D) of features (B, 2C, R/64, R/64), row by row."""
        return self.model.mm_projector(features.flatten(2).transpose(1, 2))

    def decode(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> list[Tensor]:
        """Returns the hidden states (B, L, D) after every layer but the last and, last, the normed ones.

        Args:
            embeds: input embeddings (B, L, D).
            positions: rotary positions, (L) or (B, 1, L).
            mask: added to attention scores, 0 or -inf, broadcastable to (B, heads, L, L).
        """
        half = torch.arange(0, self.model.layers[0].self_attn.head_dim, 2, device=embeds.device)
        frequencies = self.config.rope_theta ** (-half.float() / (2 * len(half)))
        angles = positions[..., None].float() * frequencies
        rope = angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype)
        states = []
        for layer in self.model.layers:
            embeds = layer(embeds, rope, mask)
            states.append(embeds)
        return [*states[:-1], self.model.norm(embeds)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (…, V) of hidden states (…, D)."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x (B, heads, L, head_dim) rotated pairwise, first half against second half."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
