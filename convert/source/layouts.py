"""One table of rules per checkpoint layout: each rule maps upstream keys to targets in our module tree.

Targets are the names of this project's own parameters. Tensors that are still to be folded have targets below the
module that they are folded into: `<module>.branches.<name>.{conv.weight,bn.*}`, `<module>.skip.*`,
`<module>.layer_scale` and so on (see `fold.modules`).

A layout is recognised by its keys, never by a shape. Every key must match a rule, and every rule a key.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_AFFINE = ("weight", "bias")
_NORM = ("weight", "bias", "running_mean", "running_var")
_CONV_NORM = ("conv.weight", *(f"bn.{name}" for name in _NORM))

HEAD_REASON = "CLIP's projection head; FastVLM does not use it"
COUNTER_REASON = "a counter that only training uses"
ROTARY_REASON = "recomputed from rope_theta"


@dataclass(frozen=True)
class Rule:
    """One or more keys of a layout and their targets.

    `#` stands for the number of a block or layer. `*` stands for each of `leaves`.

    Attributes:
        source: The upstream key.
        target: A name in our module tree; None for a tensor that is dropped.
        leaves: The names that `*` stands for.
        optional: Whether a checkpoint may lack the rule's keys (all of its leaves or none).
        reason: Why the tensor is dropped.
    """

    source: str
    target: str | None
    leaves: tuple[str, ...] = ("",)
    optional: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An upstream layout.

    Attributes:
        name: Recorded in the config.
        description: Used in messages.
        marker: A pattern that matches a key of this layout only.
        rules: The table.
        channels_last: Whether convolution weights are (O, k, k, I) rather than PyTorch's (O, I, k, k).
        folded: Whether the tensors are those of our own format.
    """

    name: str
    description: str
    marker: re.Pattern[str]
    rules: tuple[Rule, ...]
    channels_last: bool = False
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class TowerNames:
    """The names that a family of layouts has for the parts of the tower.

    Attributes:
        stem: The three convolutions of the stem, `{}` being the number.
        blocks: The blocks of each stage.
        downsample: The PatchEmbed before stages 1 to 4.
        cpe: The RepCPE of stages 3 and 4.
        ffn: A block's ConvFFN.
        layer_scale: The suffix of `layer_scale`, `layer_scale_1` and `layer_scale_2`.
        conv_exp: The expanding convolution.
        se: Squeeze and expand of its squeeze-excite.
        merged: A convolution that is already folded upstream.
        merged_large: The same for the PatchEmbed's 7x7.
        kernel: The convolution branch of a train-time block.
        pointwise: Its 1x1 branch.
        skip: Its identity branch.
        large: The 7x7 branch of a train-time PatchEmbed; its 3x3 one is `small_conv`.
        encoding: The convolution of a train-time RepCPE.
    """

    stem: str
    blocks: tuple[str, str, str, str, str]
    downsample: tuple[str, str, str, str]
    cpe: tuple[str, str]
    ffn: str
    layer_scale: str
    conv_exp: str
    se: tuple[str, str]
    merged: str
    merged_large: str
    kernel: str
    pointwise: str
    skip: str
    large: str
    encoding: str


_APPLE = TowerNames(
    stem="patch_embed.{}",
    blocks=("network.0.#", "network.2.#", "network.4.#", "network.7.#", "network.10.#"),
    downsample=("network.1", "network.3", "network.5", "network.8"),
    cpe=("network.6", "network.9"),
    ffn="convffn",
    layer_scale="",
    conv_exp="conv_exp",
    se=("reduce", "expand"),
    merged="reparam_conv",
    merged_large="lkb_reparam",
    kernel="rbr_conv.0",
    pointwise="rbr_scale",
    skip="rbr_skip",
    large="lkb_origin",
    encoding="pe",
)

_MLX_VLM = TowerNames(**{**vars(_APPLE), "stem": "patch_embed.blocks.{}"})

_TIMM = TowerNames(
    stem="stem.{}",
    blocks=tuple(f"stages.{stage}.blocks.#" for stage in range(5)),  # type: ignore[arg-type]
    downsample=tuple(f"stages.{stage}.downsample" for stage in range(1, 5)),  # type: ignore[arg-type]
    cpe=("stages.3.pos_emb", "stages.4.pos_emb"),
    ffn="mlp",
    layer_scale=".gamma",
    conv_exp="final_conv",
    se=("fc1", "fc2"),
    merged="reparam_conv",
    merged_large="reparam_conv",
    kernel="conv_kxk.0",
    pointwise="conv_scale",
    skip="identity",
    large="large_conv",
    encoding="pos_enc",
)


def _convolutions(names: TowerNames, *, branches: bool) -> Iterator[Rule]:
    """Rules for the convolutions that have branches in training: with branches, or merged into one kernel each."""
    stem = [(names.stem.format(index), f"stem.{index}") for index in range(3)]
    large = [(f"{name}.proj.0", f"stages.{stage}.downsample.conv") for stage, name in enumerate(names.downsample, 1)]
    proj = [(f"{name}.proj.1", f"stages.{stage}.downsample.proj") for stage, name in enumerate(names.downsample, 1)]
    mixers = [(f"{names.blocks[stage]}.token_mixer", f"stages.{stage}.blocks.#.token_mixer") for stage in range(3)]
    cpe = [(name, f"stages.{stage}.cpe") for stage, name in enumerate(names.cpe, 3)]
    conv_exp = (names.conv_exp, "conv_exp.conv")
    if not branches:
        for source, target in [*stem, *proj, *mixers, *cpe, conv_exp]:
            yield Rule(f"{source}.{names.merged}.*", f"{target}.*", _AFFINE)
        for source, target in large:
            yield Rule(f"{source}.{names.merged_large}.*", f"{target}.*", _AFFINE)
        return
    mobile_one = [*stem, *proj, *((f"{source}.mixer", f"{target}.mixer") for source, target in mixers), conv_exp]
    for source, target in mobile_one:
        yield Rule(f"{source}.{names.kernel}.*", f"{target}.branches.kernel.*", _CONV_NORM)
        if not target.endswith(("stem.2", "proj")):  # 1x1 themselves
            optional = target.startswith("stem")
            yield Rule(f"{source}.{names.pointwise}.*", f"{target}.branches.pointwise.*", _CONV_NORM, optional=optional)
        if target.endswith(("stem.2", "proj", "mixer")):  # as many channels out as in, stride 1
            yield Rule(f"{source}.{names.skip}.*", f"{target}.skip.*", _NORM)
    for source, target in mixers:
        yield Rule(f"{source}.norm.{names.skip}.*", f"{target}.norm.*", _NORM)
        yield Rule(f"{source}.layer_scale{names.layer_scale}", f"{target}.layer_scale")
    for source, target in large:
        yield Rule(f"{source}.{names.large}.*", f"{target}.branches.large.*", _CONV_NORM)
        yield Rule(f"{source}.small_conv.*", f"{target}.branches.small.*", _CONV_NORM)
    for source, target in cpe:
        yield Rule(f"{source}.{names.encoding}.*", f"{target}.encoding.*", _AFFINE)


def _blocks(names: TowerNames) -> Iterator[Rule]:
    """Rules for the parts that are the same in training and in inference."""
    for stage, source in enumerate(names.blocks):
        target = f"stages.{stage}.blocks.#"
        yield Rule(f"{source}.{names.ffn}.conv.*", f"{target}.conv_ffn.conv.*", _CONV_NORM)
        yield Rule(f"{source}.{names.ffn}.fc1.*", f"{target}.conv_ffn.fc1.*", _AFFINE)
        yield Rule(f"{source}.{names.ffn}.fc2.*", f"{target}.conv_ffn.fc2.*", _AFFINE)
        if stage < 3:
            yield Rule(f"{source}.layer_scale{names.layer_scale}", f"{target}.conv_ffn.layer_scale")
        else:
            yield Rule(f"{source}.layer_scale_1{names.layer_scale}", f"{target}.token_mixer.layer_scale")
            yield Rule(f"{source}.layer_scale_2{names.layer_scale}", f"{target}.conv_ffn.layer_scale")
            yield Rule(f"{source}.norm.*", f"{target}.norm.*", _AFFINE)
            yield Rule(f"{source}.token_mixer.qkv.weight", f"{target}.token_mixer.qkv.weight")
            yield Rule(f"{source}.token_mixer.proj.*", f"{target}.token_mixer.proj.*", _AFFINE)
    for source, ours in zip(names.se, ("reduce", "expand"), strict=True):
        yield Rule(f"{names.conv_exp}.se.{source}.*", f"conv_exp.se.{ours}.*", _AFFINE)


def _tower(prefix: str, names: TowerNames, *, branches: bool = False) -> list[Rule]:
    rules = [*_convolutions(names, branches=branches), *_blocks(names)]
    return [
        *(Rule(prefix + rule.source, f"vision_tower.{rule.target}", rule.leaves, rule.optional) for rule in rules),
        Rule(prefix + "head.proj", None, optional=True, reason=HEAD_REASON),
    ]


def _projector(first: str, second: str) -> list[Rule]:
    return [Rule(f"{first}.*", "mm_projector.0.*", _AFFINE), Rule(f"{second}.*", "mm_projector.2.*", _AFFINE)]


def _decoder(prefix: str, head: str) -> list[Rule]:
    """Rules for Qwen2: `prefix` precedes `layers`, `head` is the name of the output layer."""
    layer, target = f"{prefix}layers.#", "language_model.model.layers.#"
    return [
        Rule(f"{prefix}embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        *(
            Rule(f"{layer}.self_attn.{name}.*", f"{target}.self_attn.{name}.*", _AFFINE)
            for name in ("q_proj", "k_proj", "v_proj")
        ),
        Rule(f"{layer}.self_attn.o_proj.weight", f"{target}.self_attn.o_proj.weight"),
        Rule(f"{layer}.self_attn.rotary_emb.inv_freq", None, optional=True, reason=ROTARY_REASON),
        *(
            Rule(f"{layer}.mlp.{name}.weight", f"{target}.mlp.{name}.weight")
            for name in ("gate_proj", "up_proj", "down_proj")
        ),
        Rule(f"{layer}.input_layernorm.weight", f"{target}.input_layernorm.weight"),
        Rule(f"{layer}.post_attention_layernorm.weight", f"{target}.post_attention_layernorm.weight"),
        Rule(f"{prefix}norm.weight", "language_model.model.norm.weight"),
        Rule(f"{head}.weight", "language_model.lm_head.weight", optional=True),
    ]


def _ours() -> Iterator[Rule]:
    """Rules for our own format, in which every key is its own target."""
    targets = [
        *(f"stem.{index}.*" for index in range(3)),
        *(f"stages.{stage}.downsample.{name}.*" for stage in range(1, 5) for name in ("conv", "proj")),
        *(f"stages.{stage}.cpe.*" for stage in (3, 4)),
        *(f"stages.{stage}.blocks.#.token_mixer.*" for stage in range(3)),
        *(f"stages.{stage}.blocks.#.{name}.*" for stage in (3, 4) for name in ("norm", "token_mixer.proj")),
        *(f"stages.{stage}.blocks.#.token_mixer.qkv.weight" for stage in (3, 4)),
        *(f"stages.{stage}.blocks.#.conv_ffn.conv.weight" for stage in range(5)),
        *(f"stages.{stage}.blocks.#.conv_ffn.{name}.*" for stage in range(5) for name in ("fc1", "fc2")),
        *("conv_exp.conv.*", "conv_exp.se.reduce.*", "conv_exp.se.expand.*"),
    ]
    for target in targets:
        yield Rule(f"vision_tower.{target}", f"vision_tower.{target}", _AFFINE if "*" in target else ("",))
    yield from _projector("mm_projector.0", "mm_projector.2")
    yield from _decoder("language_model.model.", "language_model.lm_head")


_APPLE_PREFIX = "model.vision_tower.vision_tower.model."
_TIMM_PREFIX = "model.vision_tower.timm_model."
_LLAVA = (*_projector("model.mm_projector.0", "model.mm_projector.2"), *_decoder("model.", "lm_head"))
_FAST_VLM = (
    *_projector("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    *_decoder("model.language_model.", "lm_head"),
)
_MLX_DECODER = tuple(_decoder("language_model.model.", "language_model.lm_head"))


def _starts(prefix: str, inside: str = "") -> re.Pattern[str]:
    return re.compile(re.escape(prefix) + inside)


OURS = Layout(
    name="fastvlm-mlx",
    description="fastvlm-mlx",
    marker=_starts("vision_tower.stem."),
    rules=tuple(_ours()),
    channels_last=True,
    folded=True,
)

LAYOUTS = (
    Layout(
        name="apple-train",
        description="Apple, train-time branches",
        marker=_starts(_APPLE_PREFIX, r".*\.(rbr_conv|rbr_skip|lkb_origin|pe)\."),
        rules=(*_tower(_APPLE_PREFIX, _APPLE, branches=True), *_LLAVA),
    ),
    Layout(
        name="apple",
        description="Apple, as released",
        marker=_starts(_APPLE_PREFIX),
        rules=(*_tower(_APPLE_PREFIX, _APPLE), *_LLAVA),
    ),
    Layout(
        name="transformers-train",
        description="transformers fast_vlm, train-time branches",
        marker=_starts(_TIMM_PREFIX, r".*\.(conv_kxk|identity|large_conv|pos_enc)\."),
        rules=(*_tower(_TIMM_PREFIX, _TIMM, branches=True), *_FAST_VLM),
    ),
    Layout(
        name="transformers",
        description="transformers fast_vlm",
        marker=_starts(_TIMM_PREFIX),
        rules=(*_tower(_TIMM_PREFIX, _TIMM), *_FAST_VLM),
    ),
    Layout(
        name="mlx-vlm",
        description="mlx-vlm",
        marker=_starts("vision_tower.vision_model."),
        rules=(
            *_tower("vision_tower.vision_model.", _MLX_VLM),
            *_projector("mm_projector.0", "mm_projector.2"),
            *_MLX_DECODER,
        ),
        channels_last=True,
    ),
    Layout(
        name="apple-llm",
        description="Apple, pre-exported decoder (no vision tower)",
        marker=_starts("multi_modal_projector.linear_0."),
        rules=(*_projector("multi_modal_projector.linear_0", "multi_modal_projector.linear_2"), *_MLX_DECODER),
        channels_last=True,
    ),
    OURS,
)
"""Every layout; if the markers of two match, the earlier one counts."""


def describe(name: str) -> str:
    """The layout that a config names, in a user's words."""
    return next((layout.description for layout in LAYOUTS if layout.name == name), name)
