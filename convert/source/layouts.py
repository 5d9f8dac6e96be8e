"""The layouts that checkpoints come in, each as one table of rules: an upstream key, and its place in our module tree.

Places are the names of this project's own parameters. What has still to be folded hangs below the module it goes into:
`<module>.branches.<name>.{conv.weight,bn.*}`, `<module>.skip.*`, `<module>.layer_scale` and so on (see `recipes`).

A layout is recognised by the names of its keys, never by a shape. Every key must match a rule, every rule a key.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import names

_AFFINE = ("weight", "bias")
_NORM = ("weight", "bias", "running_mean", "running_var")
_CONV_NORM = ("conv.weight", *(f"bn.{name}" for name in _NORM))

HEAD_REASON = "CLIP's projection head; FastVLM does not use it"
COUNTER_REASON = "a counter that only training uses"
ROTARY_REASON = "recomputed from rope_theta"


@dataclass(frozen=True)
class Rule:
    """One or more keys of a layout and where they go.

    `#` stands for the number of a block or layer. `*` stands for each of `leaves`.

    Attributes:
        source: The upstream key.
        place: The place in our module tree; None for a tensor that is dropped.
        leaves: What `*` stands for.
        optional: Whether a checkpoint may lack the rule's keys (all of its leaves or none).
        reason: Why the tensor is dropped.
    """

    source: str
    place: str | None
    leaves: tuple[str, ...] = ("",)
    optional: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An upstream layout.

    Attributes:
        name: What the config records.
        description: What messages say.
        marker: Matches a key that only this layout has.
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
class Names:
    """What a family of layouts calls the parts of the tower.

    Attributes:
        stem: The three convolutions of the stem, `{}` being the number.
        blocks: The blocks of each stage.
        downsample: The PatchEmbed before stages 1 to 4.
        cpe: The RepCPE of stages 3 and 4.
        ffn: A block's ConvFFN.
        layer_scale: What follows `layer_scale`, `layer_scale_1` and `layer_scale_2`.
        conv_exp: The expanding convolution.
        se: Squeeze and expand of its squeeze-excite.
        merged: A convolution that upstream has folded already.
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


_APPLE = Names(
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

_MLX_VLM = Names(**{**vars(_APPLE), "stem": "patch_embed.blocks.{}"})

_TIMM = Names(
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


def _convolutions(names: Names, *, branches: bool) -> Iterator[Rule]:
    """The convolutions that have branches in training: with them, or merged into one kernel each."""
    stem = [(names.stem.format(index), f"stem.{index}") for index in range(3)]
    large = [(f"{name}.proj.0", f"stages.{stage}.downsample.conv") for stage, name in enumerate(names.downsample, 1)]
    proj = [(f"{name}.proj.1", f"stages.{stage}.downsample.proj") for stage, name in enumerate(names.downsample, 1)]
    mixers = [(f"{names.blocks[stage]}.token_mixer", f"stages.{stage}.blocks.#.token_mixer") for stage in range(3)]
    cpe = [(name, f"stages.{stage}.cpe") for stage, name in enumerate(names.cpe, 3)]
    conv_exp = (names.conv_exp, "conv_exp.conv")
    if not branches:
        for source, place in [*stem, *proj, *mixers, *cpe, conv_exp]:
            yield Rule(f"{source}.{names.merged}.*", f"{place}.*", _AFFINE)
        for source, place in large:
            yield Rule(f"{source}.{names.merged_large}.*", f"{place}.*", _AFFINE)
        return
    mobile_one = [*stem, *proj, *((f"{source}.mixer", f"{place}.mixer") for source, place in mixers), conv_exp]
    for source, place in mobile_one:
        yield Rule(f"{source}.{names.kernel}.*", f"{place}.branches.kernel.*", _CONV_NORM)
        if not place.endswith(("stem.2", "proj")):  # 1x1 themselves
            optional = place.startswith("stem")
            yield Rule(f"{source}.{names.pointwise}.*", f"{place}.branches.pointwise.*", _CONV_NORM, optional=optional)
        if place.endswith(("stem.2", "proj", "mixer")):  # as many channels out as in, stride 1
            yield Rule(f"{source}.{names.skip}.*", f"{place}.skip.*", _NORM)
    for source, place in mixers:
        yield Rule(f"{source}.norm.{names.skip}.*", f"{place}.norm.*", _NORM)
        yield Rule(f"{source}.layer_scale{names.layer_scale}", f"{place}.layer_scale")
    for source, place in large:
        yield Rule(f"{source}.{names.large}.*", f"{place}.branches.large.*", _CONV_NORM)
        yield Rule(f"{source}.small_conv.*", f"{place}.branches.small.*", _CONV_NORM)
    for source, place in cpe:
        yield Rule(f"{source}.{names.encoding}.*", f"{place}.encoding.*", _AFFINE)


def _blocks(names: Names) -> Iterator[Rule]:
    """The parts that are the same in training and in inference."""
    for stage, source in enumerate(names.blocks):
        place = f"stages.{stage}.blocks.#"
        yield Rule(f"{source}.{names.ffn}.conv.*", f"{place}.conv_ffn.conv.*", _CONV_NORM)
        yield Rule(f"{source}.{names.ffn}.fc1.*", f"{place}.conv_ffn.fc1.*", _AFFINE)
        yield Rule(f"{source}.{names.ffn}.fc2.*", f"{place}.conv_ffn.fc2.*", _AFFINE)
        if stage < 3:
            yield Rule(f"{source}.layer_scale{names.layer_scale}", f"{place}.conv_ffn.layer_scale")
        else:
            yield Rule(f"{source}.layer_scale_1{names.layer_scale}", f"{place}.token_mixer.layer_scale")
            yield Rule(f"{source}.layer_scale_2{names.layer_scale}", f"{place}.conv_ffn.layer_scale")
            yield Rule(f"{source}.norm.*", f"{place}.norm.*", _AFFINE)
            yield Rule(f"{source}.token_mixer.qkv.weight", f"{place}.token_mixer.qkv.weight")
            yield Rule(f"{source}.token_mixer.proj.*", f"{place}.token_mixer.proj.*", _AFFINE)
    for source, ours in zip(names.se, ("reduce", "expand"), strict=True):
        yield Rule(f"{names.conv_exp}.se.{source}.*", f"conv_exp.se.{ours}.*", _AFFINE)


def _tower(prefix: str, names: Names, *, branches: bool = False) -> list[Rule]:
    rules = [*_convolutions(names, branches=branches), *_blocks(names)]
    return [
        *(Rule(prefix + rule.source, f"vision_tower.{rule.place}", rule.leaves, rule.optional) for rule in rules),
        Rule(prefix + "head.proj", None, optional=True, reason=HEAD_REASON),
    ]


def _projector(first: str, second: str) -> list[Rule]:
    return [Rule(f"{first}.*", "mm_projector.0.*", _AFFINE), Rule(f"{second}.*", "mm_projector.2.*", _AFFINE)]


def _decoder(prefix: str, head: str) -> list[Rule]:
    """Qwen2: `prefix` is what precedes `layers`, `head` the name of its output layer."""
    layer, place = f"{prefix}layers.#", "language_model.model.layers.#"
    return [
        Rule(f"{prefix}embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        *(
            Rule(f"{layer}.self_attn.{name}.*", f"{place}.self_attn.{name}.*", _AFFINE)
            for name in ("q_proj", "k_proj", "v_proj")
        ),
        Rule(f"{layer}.self_attn.o_proj.weight", f"{place}.self_attn.o_proj.weight"),
        Rule(f"{layer}.self_attn.rotary_emb.inv_freq", None, optional=True, reason=ROTARY_REASON),
        *(
            Rule(f"{layer}.mlp.{name}.weight", f"{place}.mlp.{name}.weight")
            for name in ("gate_proj", "up_proj", "down_proj")
        ),
        Rule(f"{layer}.input_layernorm.weight", f"{place}.input_layernorm.weight"),
        Rule(f"{layer}.post_attention_layernorm.weight", f"{place}.post_attention_layernorm.weight"),
        Rule(f"{prefix}norm.weight", "language_model.model.norm.weight"),
        Rule(f"{head}.weight", "language_model.lm_head.weight", optional=True),
    ]


def _ours() -> Iterator[Rule]:
    """Our own format: every place is its own key."""
    places = [
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
    for place in places:
        yield Rule(f"vision_tower.{place}", f"vision_tower.{place}", _AFFINE if "*" in place else ("",))
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
"""Every layout; of two whose marker matches, the earlier one is meant."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The keys of a checkpoint, each with the rule it came under.

    Attributes:
        places: The key of every place that is filled.
        dropped: The reason for every key that is not used.
        packed: The keys of a quantized tensor's `scales` and, where it has them, `biases`, by its own key.
    """

    places: dict[str, str]
    dropped: dict[str, str]
    packed: dict[str, tuple[str, ...]]


def recognise(keys: Collection[str], name: str) -> Layout:
    """The layout of a checkpoint with these keys.

    Args:
        keys: Its tensors.
        name: What messages call it.

    Raises:
        CheckpointError: If no layout has such keys.
    """
    for layout in LAYOUTS:
        if any(map(layout.marker.match, keys)):
            return layout
    known = "; ".join(f"{layout.description}: {layout.marker.pattern}" for layout in LAYOUTS)
    raise CheckpointError(
        f"{name}: is not a FastVLM checkpoint of a known layout. It holds {names(sorted(keys))}; "
        f"expected keys like {known}"
    )


def match(layout: Layout, keys: Collection[str], name: str) -> Match:
    """Applies the rules of `layout` to `keys`, all to all.

    Raises:
        CheckpointError: If keys are missing or left over.
    """
    packed = {
        key: tuple(companion for companion in _companions(key) if companion in keys)
        for key in keys
        if key.endswith(".weight") and _companions(key)[0] in keys
    }
    left = set(keys).difference(*packed.values())
    present = frozenset(left)
    counts = _counts(layout, present)
    places: dict[str, str] = {}
    dropped: dict[str, str] = {}
    missing: list[str] = []
    for rule in layout.rules:
        for pairs in expand(rule, counts.get(rule.source.partition("#")[0], 1)):
            if rule.optional and not any(key in present for key, _ in pairs):
                continue
            missing += [key for key, _ in pairs if key not in present]
            left.difference_update(key for key, _ in pairs)
            if rule.place is None:
                dropped.update((key, rule.reason) for key, _ in pairs)
            else:
                places.update((place, key) for key, place in pairs)
    for key in sorted(left):
        if key.endswith(".num_batches_tracked") and key.replace("num_batches_tracked", "running_mean") in present:
            dropped[key] = COUNTER_REASON
            left.remove(key)
    if missing:
        raise CheckpointError(f"{name}: lacks {names(missing)} (layout: {layout.description}); it is incomplete")
    if left:
        raise CheckpointError(
            f"{name}: has tensors that no rule knows: {names(sorted(left))} (layout: {layout.description})"
        )
    return Match(places=places, dropped=dropped, packed=packed)


def _companions(key: str) -> tuple[str, str]:
    stem = key.removesuffix("weight")
    return f"{stem}scales", f"{stem}biases"


def _counts(layout: Layout, keys: Collection[str]) -> Mapping[str, int]:
    """How many blocks or layers there are behind each prefix that a rule has before its `#`."""
    prefixes = {rule.source.partition("#")[0] for rule in layout.rules if "#" in rule.source}
    numbers: dict[str, set[int]] = {prefix: {0} for prefix in prefixes}
    for key in keys:
        for number in re.finditer(r"\.(\d+)(?=\.)", key):
            if (prefix := key[: number.start() + 1]) in numbers:
                numbers[prefix].add(int(number[1]))
    return {prefix: len(seen) for prefix, seen in numbers.items()}


def expand(rule: Rule, count: int) -> Iterator[list[tuple[str, str]]]:
    """The keys and places of a rule: one list, or one for each of `count` blocks or layers if it has a `#`."""
    for number in range(count if "#" in rule.source else 1):
        yield [
            tuple(text.replace("#", str(number)).replace("*", leaf) for text in (rule.source, rule.place or ""))  # type: ignore[misc]
            for leaf in rule.leaves
        ]
