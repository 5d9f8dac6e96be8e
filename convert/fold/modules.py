"""Builds every module of the model from a source's tensors: one `Fold` per module.

A fold names its inputs (targets of `source.layouts`) and its outputs (parameters), each with their shapes, and the
function between them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from fastvlm_mlx.config import ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.convert.arrays import Array, Shape
from fastvlm_mlx.convert.fold import operations
from fastvlm_mlx.convert.fold.operations import Affine, BatchNorm

Arrays = Mapping[str, Array]

_BRANCH_SIZES = {"pointwise": 1, "small": 3}


@dataclass(frozen=True)
class Fold:
    """The way from some of a source's tensors to some of the model's parameters.

    Attributes:
        inputs: Targets and the shapes that their tensors must have.
        outputs: Parameters and their shapes.
        function: Computes the outputs from the inputs; None if the only output is the only input.
    """

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    function: Callable[[Arrays], dict[str, Array]] | None = None


def copies(folds: Collection[Fold]) -> list[Fold]:
    """The folds for a source that holds the same parameters folded already."""
    return [_copy(name, shape) for fold in folds for name, shape in fold.outputs.items()]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every parameter of a model, by name."""
    vision, text = config.vision_config, config.text_config
    folds = [*vision_folds(vision, ()), *projector_folds(vision.hidden_size, text.hidden_size), *decoder_folds(text)]
    return {name: shape for fold in folds for name, shape in fold.outputs.items()}


def vision_folds(config: VisionConfig, targets: Collection[str]) -> list[Fold]:
    """The folds for the tower.

    Args:
        config: Its architecture.
        targets: The targets that the source fills; they decide between branches and merged convolutions.
    """
    return list(_Tower(config, targets).folds())


def projector_folds(features: int, hidden: int) -> list[Fold]:
    """The folds for the projector from (…, `features`) to (…, `hidden`)."""
    name = "mm_projector.0.weight"
    order = operations.even_odd(features)
    return [
        Fold({name: (hidden, features)}, {name: (hidden, features)}, lambda inputs: {name: inputs[name][:, order]}),
        _copy("mm_projector.0.bias", (hidden,)),
        _copy("mm_projector.2.weight", (hidden, hidden)),
        _copy("mm_projector.2.bias", (hidden,)),
    ]


def decoder_folds(config: TextConfig) -> list[Fold]:
    """The folds for the decoder, all of them copies."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    cached = config.num_key_value_heads * config.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.q_proj.bias": (heads,),
        "self_attn.k_proj.weight": (cached, hidden),
        "self_attn.k_proj.bias": (cached,),
        "self_attn.v_proj.weight": (cached, hidden),
        "self_attn.v_proj.bias": (cached,),
        "self_attn.o_proj.weight": (hidden, heads),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.up_proj.weight": (config.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, config.intermediate_size),
    }
    shapes: dict[str, Shape] = {"language_model.model.embed_tokens.weight": (config.vocab_size, hidden)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"language_model.model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["language_model.model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["language_model.lm_head.weight"] = (config.vocab_size, hidden)
    return [_copy(name, shape) for name, shape in shapes.items()]


def _copy(name: str, shape: Shape) -> Fold:
    return Fold({name: shape}, {name: shape})


class _Tower:
    """Lists the folds of the tower in the order of its forward pass."""

    def __init__(self, config: VisionConfig, targets: Collection[str]) -> None:
        self.config = config
        self.targets = sorted(targets)

    def folds(self) -> Iterator[Fold]:
        dims = self.config.embed_dims
        yield self.convolution("stem.0", dims[0], 3, per_group=3)
        yield self.convolution("stem.1", dims[0], 3)
        yield self.linear("stem.2", dims[0])
        for stage, channels in enumerate(dims):
            name = f"stages.{stage}"
            if stage > 0:
                yield self.convolution(f"{name}.downsample.conv", channels, 7, doubling=True)
                yield self.linear(f"{name}.downsample.proj", channels, even_odd=True)
            if stage > 2:
                yield self.convolution(f"{name}.cpe", channels, 7)
            for number in range(self.config.depths[stage]):
                block = f"{name}.blocks.{number}"
                if stage < 3:
                    yield self.convolution(f"{block}.token_mixer", channels, 3)
                else:
                    yield from self.attention(block, channels)
                yield self.conv_ffn(f"{block}.conv_ffn", channels)
        features = self.config.hidden_size
        yield self.convolution("conv_exp.conv", features, 3, doubling=True)
        yield from self.squeeze_excite("conv_exp.se", features, features // 16)

    def convolution(self, name: str, channels: int, size: int, *, per_group: int = 1, doubling: bool = False) -> Fold:
        """A convolution with `channels` outputs; `doubling` if it has two filters per input channel."""
        name = f"vision_tower.{name}"

        def folded(inputs: Arrays) -> dict[str, Array]:
            weight, bias = _merged(name, inputs, size, per_group)
            order = operations.even_odd(channels) if doubling else slice(None)
            return {f"{name}.weight": weight[order], f"{name}.bias": bias[order]}

        shapes = {f"{name}.weight": (channels, size, size, per_group), f"{name}.bias": (channels,)}
        return Fold(self.inputs(name, channels, size, per_group), shapes, folded)

    def linear(self, name: str, channels: int, *, even_odd: bool = False) -> Fold:
        """A 1x1 convolution that becomes a linear layer; `even_odd` if its input comes from a doubling one."""
        name = f"vision_tower.{name}"

        def folded(inputs: Arrays) -> dict[str, Array]:
            weight, bias = operations.pointwise(_merged(name, inputs, 1, channels))
            columns = operations.even_odd(channels) if even_odd else slice(None)
            return {f"{name}.weight": weight[:, columns], f"{name}.bias": bias}

        shapes = {f"{name}.weight": (channels, channels), f"{name}.bias": (channels,)}
        return Fold(self.inputs(name, channels, 1, channels), shapes, folded)

    def inputs(self, name: str, channels: int, size: int, per_group: int) -> dict[str, Shape]:
        """The targets under a convolution, merged or in branches, with their shapes."""
        shapes: dict[str, Shape] = {}
        for target in self.targets:
            if not target.startswith(f"{name}."):
                continue
            *path, leaf = target.removeprefix(f"{name}.").split(".")
            is_kernel = leaf == "weight" and (not path or path[-1] in ("conv", "encoding"))
            side = _BRANCH_SIZES.get(path[path.index("branches") + 1], size) if "branches" in path else size
            shapes[target] = (channels, side, side, per_group) if is_kernel else (channels,)
        return shapes

    def attention(self, block: str, channels: int) -> Iterator[Fold]:
        block = f"vision_tower.{block}"
        yield _copy(f"{block}.norm.weight", (channels,))
        yield _copy(f"{block}.norm.bias", (channels,))
        yield _copy(f"{block}.token_mixer.qkv.weight", (3 * channels, channels))
        proj, gamma = f"{block}.token_mixer.proj", f"{block}.token_mixer.layer_scale"
        shapes = {f"{proj}.weight": (channels, channels), f"{proj}.bias": (channels,)}

        def folded(inputs: Arrays) -> dict[str, Array]:
            return _named(proj, operations.layer_scale(_affine(inputs, proj), inputs[gamma]))

        yield Fold({**shapes, gamma: (channels,)}, shapes, folded)

    def conv_ffn(self, name: str, channels: int) -> Fold:
        name = f"vision_tower.{name}"
        hidden = self.config.mlp_ratio * channels
        linears = {
            f"{name}.fc1.weight": (hidden, channels),
            f"{name}.fc1.bias": (hidden,),
            f"{name}.fc2.weight": (channels, hidden),
            f"{name}.fc2.bias": (channels,),
        }
        kernel = (channels, 7, 7, 1)

        def folded(inputs: Arrays) -> dict[str, Array]:
            weight, bias = _branch(inputs, f"{name}.conv")
            fc1 = operations.bias_through(bias, _affine(inputs, f"{name}.fc1"))
            fc2 = operations.layer_scale(_affine(inputs, f"{name}.fc2"), inputs[f"{name}.layer_scale"])
            return {f"{name}.conv.weight": weight, **_named(f"{name}.fc1", fc1), **_named(f"{name}.fc2", fc2)}

        inputs = {
            f"{name}.conv.conv.weight": kernel,
            **{f"{name}.conv.bn.{field}": (channels,) for field in BatchNorm._fields},
            **linears,
            f"{name}.layer_scale": (channels,),
        }
        return Fold(inputs, {f"{name}.conv.weight": kernel, **linears}, folded)

    def squeeze_excite(self, name: str, channels: int, reduced: int) -> Iterator[Fold]:
        reduce, expand = f"vision_tower.{name}.reduce", f"vision_tower.{name}.expand"
        order = operations.even_odd(channels)
        shapes: dict[str, Shape] = {f"{reduce}.weight": (reduced, channels)}
        yield Fold(shapes, shapes, lambda inputs: {name: value[:, order] for name, value in inputs.items()})
        yield _copy(f"{reduce}.bias", (reduced,))
        shapes = {f"{expand}.weight": (channels, reduced), f"{expand}.bias": (channels,)}
        yield Fold(shapes, shapes, lambda inputs: {name: value[order] for name, value in inputs.items()})


def _affine(inputs: Arrays, name: str) -> Affine:
    return Affine(inputs[f"{name}.weight"], inputs[f"{name}.bias"])


def _named(name: str, affine: Affine) -> dict[str, Array]:
    return {f"{name}.weight": affine.weight, f"{name}.bias": affine.bias}


def _norm(inputs: Arrays, name: str) -> BatchNorm:
    return BatchNorm(*(inputs[f"{name}.{field}"] for field in BatchNorm._fields))


def _branch(inputs: Arrays, name: str) -> Affine:
    return operations.batch_norm(inputs[f"{name}.conv.weight"], _norm(inputs, f"{name}.bn"))


def _merged(name: str, inputs: Arrays, size: int, per_group: int) -> Affine:
    """The convolution `name` as one kernel, merged from its branches if the source has it in branches."""
    if f"{name}.weight" in inputs:
        return _affine(inputs, name)
    if f"{name}.encoding.weight" in inputs:
        return operations.rep_cpe(_affine(inputs, f"{name}.encoding"))
    if f"{name}.layer_scale" in inputs:
        mixer = _merged(f"{name}.mixer", inputs, size, per_group)
        return operations.rep_mixer(mixer, _norm(inputs, f"{name}.norm"), inputs[f"{name}.layer_scale"])
    start, end = f"{name}.branches.", ".conv.weight"
    kernels = [target for target in inputs if target.startswith(start) and target.endswith(end)]
    convolutions = [_branch(inputs, kernel.removesuffix(end)) for kernel in kernels]
    if f"{name}.skip.weight" in inputs:
        skip = _norm(inputs, f"{name}.skip")
        convolutions.append(operations.batch_norm(operations.identity_kernel(len(skip.weight), size, per_group), skip))
    return operations.branches(convolutions)
