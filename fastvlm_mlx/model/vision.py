"""FastViTHD, the vision tower of FastVLM (arXiv 2412.13303), in its folded inference form; NHWC from end to end.

The converter folds away what only training needs: MobileOne and RepMixer branches, BatchNorm, layer scales. What
remains are depthwise convolutions, linears (upstream's 1x1 convolutions), GELU, and the attention of the last two
stages.

Shapes: B batch, H and W height and width, C channels, N = H·W. A tensor that is stored "divided by s" holds 1/s of its
    true value, which keeps it within float16 (see `ActivationScales`).
"""

from collections.abc import Callable
from typing import Any

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model.activations import gelu


class DepthwiseConv(nn.Module):
    """A padded k x k convolution of each channel on its own: (B, H, W, C) -> (B, H/stride, W/stride, C)."""

    def __init__(self, channels: int, kernel_size: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, kernel_size, 1))
        if bias:
            self.bias = mx.zeros((channels,))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        channels, kernel_size = self.weight.shape[:2]
        x = mx.conv2d(x, self.weight, stride=self.stride, padding=kernel_size // 2, groups=channels)
        return x + self.bias if "bias" in self else x


class DoublingDepthwiseConv(nn.Module):
    """A grouped convolution with two filters per channel: (B, H, W, C) -> (B, H/stride, W/stride, 2C).

    Two plain depthwise convolutions, since MLX has no fast kernel for a channel multiplier: the first half of the
    output comes from upstream's even filters, the second from its odd ones, and the next layer's columns are permuted
    to match.
    """

    def __init__(self, channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = mx.zeros((2 * channels, kernel_size, kernel_size, 1))
        self.bias = mx.zeros((2 * channels,))
        self.stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        kernel_size = self.weight.shape[1]
        halves = [
            mx.conv2d(x, weight, stride=self.stride, padding=kernel_size // 2, groups=x.shape[-1])
            for weight in mx.split(self.weight, 2)
        ]
        return mx.concatenate(halves, axis=-1) + self.bias


class ConvFFN(nn.Module):
    """7x7 depthwise, linear, GELU, linear: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, hidden: int, hidden_scale: float) -> None:
        super().__init__()
        self.conv = DepthwiseConv(channels, 7, bias=False)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.hidden_scale = hidden_scale

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu(self.fc1(self.conv(x)), self.hidden_scale))


class RepMixerBlock(nn.Module):
    """A 3x3 depthwise token mixer with its skip folded in, and a ConvFFN: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, hidden: int, hidden_scale: float) -> None:
        super().__init__()
        self.token_mixer = DepthwiseConv(channels, 3)
        self.conv_ffn = ConvFFN(channels, hidden, hidden_scale)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.token_mixer(x)
        return x + self.conv_ffn(x)


class Attention(nn.Module):
    """Multi-head self-attention over all positions: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.head_dim = head_dim

    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        q, k, v = (
            part.reshape(batch, height * width, -1, self.head_dim).swapaxes(1, 2)
            for part in mx.split(self.qkv(x), 3, axis=-1)
        )
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.proj(x.transpose(0, 2, 1, 3).reshape(batch, height, width, channels))


class AttentionBlock(nn.Module):
    """Attention and a ConvFFN on the residual stream: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, hidden: int, head_dim: int, eps: float, hidden_scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.token_mixer = Attention(channels, head_dim)
        self.conv_ffn = ConvFFN(channels, hidden, hidden_scale)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.token_mixer(self.norm(x))
        return x + self.conv_ffn(x)


class PatchEmbed(nn.Module):
    """Downsamples between stages: (B, H, W, C) -> (B, H/2, W/2, 2C)."""

    def __init__(self, channels: int, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.conv = DoublingDepthwiseConv(channels, 7, stride=2)
        self.proj = nn.Linear(2 * channels, 2 * channels)
        self.scales = scales

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(self.proj(gelu(self.conv(x), self.scales[0])), self.scales[1])


class Stage(nn.Module):
    """PatchEmbed (not in stage 0), conditional position encoding (stages 3 and 4), then the blocks."""

    def __init__(self, config: VisionConfig, index: int) -> None:
        super().__init__()
        channels, scales = config.embed_dims[index], config.scales.stages[index]
        hidden = config.mlp_ratio * channels
        if index > 0:
            self.downsample = PatchEmbed(config.embed_dims[index - 1], scales.downsample)
        if index < 3:
            self.blocks: list[nn.Module] = [RepMixerBlock(channels, hidden, scale) for scale in scales.hidden]
        else:
            self.cpe = DepthwiseConv(channels, 7)
            eps = config.layer_norm_eps / scales.stream**2
            self.blocks = [AttentionBlock(channels, hidden, config.head_dim, eps, scale) for scale in scales.hidden]

    def __call__(self, x: mx.array) -> mx.array:
        if "downsample" in self:
            x = self.downsample(x)
        if "cpe" in self:
            x = self.cpe(x)
        for block in self.blocks:
            x = block(x)
        return x


class SqueezeExcite(nn.Module):
    """Channel attention: (B, H, W, C) -> its gates (B, 1, 1, C), the mean taken in float32."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)

    def __call__(self, x: mx.array) -> mx.array:
        mean = x.astype(mx.float32).mean(axis=(1, 2), keepdims=True).astype(x.dtype)
        return mx.sigmoid(self.expand(nn.relu(self.reduce(mean))))


class ConvExp(nn.Module):
    """The tower's last layer: (B, H, W, C) -> (B, H, W, 2C), in the order even filters, odd filters."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.conv = DoublingDepthwiseConv(channels, 3)
        self.se = SqueezeExcite(2 * channels, 2 * channels // 16)
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv(x)
        return gelu(x * self.se(x), self.scale)


class FastViTHD(nn.Module):
    """The tower: pixel values (B, R, R, 3) in [0, 1] -> features (B, R/64, R/64, C).

    C is twice the last stage's width (3072 in the released models). The features come in the order even filters, odd
    filters: with `perm = concat(arange(0, C, 2), arange(1, C, 2))`, `ours[..., i]` is upstream's `[..., perm[i]]`.
    Height and width may differ; each must be a multiple of 64.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.embed_dims[0]
        self.stem: list[Any] = [
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            DepthwiseConv(width, 3, stride=2),
            nn.Linear(width, width),
        ]
        self.stages = [Stage(config, index) for index in range(5)]
        self.conv_exp = ConvExp(config.embed_dims[-1], config.scales.conv_exp)
        self.stem_scales = config.scales.stem

    def __call__(self, x: mx.array) -> mx.array:
        for segment in self.segments().values():
            x = segment(x)
        return x

    def segments(self) -> dict[str, Callable[[mx.array], mx.array]]:
        """The stem, the stages and `conv_exp` by name, each (B, H, W, C) -> (B, H', W', C'): in order, the tower."""
        stages = {f"stages.{index}": stage for index, stage in enumerate(self.stages)}
        return {"stem": self._run_stem, **stages, "conv_exp": self.conv_exp}

    def _run_stem(self, x: mx.array) -> mx.array:
        for layer, scale in zip(self.stem, self.stem_scales, strict=True):
            x = gelu(layer(x), scale)
        return x

    def activation_peaks(self, x: mx.array) -> dict[str, mx.array]:
        """The largest magnitude of every activation that could overflow float16, by the name of the layer.

        Runs the same parts as the forward pass, one by one: `stem.i` and `…downsample.{conv,proj}` before their GELU,
        `…conv_ffn.{conv,fc1,fc2}`, and the residual stream after each layer that writes it.
        """
        peaks: dict[str, mx.array] = {}

        def peak(name: str, value: mx.array) -> mx.array:
            peaks[name] = mx.abs(value).max()
            return value

        for index, (layer, scale) in enumerate(zip(self.stem, self.stem_scales, strict=True)):
            x = gelu(peak(f"stem.{index}", layer(x)), scale)
        for index, stage in enumerate(self.stages):
            name = f"stages.{index}"
            if "downsample" in stage:
                part, scales = stage.downsample, stage.downsample.scales
                x = gelu(peak(f"{name}.downsample.conv", part.conv(x)), scales[0])
                x = gelu(peak(f"{name}.downsample.proj", part.proj(x)), scales[1])
            if "cpe" in stage:
                x = peak(f"{name}.cpe", stage.cpe(x))
            for number, block in enumerate(stage.blocks):
                name = f"stages.{index}.blocks.{number}"
                if "norm" in block:
                    x = x + peak(f"{name}.token_mixer", block.token_mixer(block.norm(x)))
                    peak(f"{name}.attention", x)
                else:
                    x = peak(f"{name}.token_mixer", block.token_mixer(x))
                ffn = block.conv_ffn
                hidden = peak(f"{name}.conv_ffn.fc1", ffn.fc1(peak(f"{name}.conv_ffn.conv", ffn.conv(x))))
                x = peak(name, x + peak(f"{name}.conv_ffn.fc2", ffn.fc2(gelu(hidden, ffn.hidden_scale))))
            mx.eval(x, peaks)
        x = peak("conv_exp.conv", self.conv_exp.conv(x))
        peak("conv_exp", gelu(x * self.conv_exp.se(x), self.conv_exp.scale))
        mx.eval(peaks)
        return peaks
