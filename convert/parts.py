"""The parts of a model that are counted, quantized and compared separately."""

from collections.abc import Mapping

PARTS = ("decoder", "embed", "projector", "vision")
"""The decoder's layers, its embedding and head, the projector, the vision tower."""

EMBEDDING = "language_model.model.embed_tokens"
"""The path of the embedding, which is also the head of a model with tied embeddings."""


def part_of(path: str) -> str:
    """The part that a parameter or layer belongs to."""
    if path.startswith("vision_tower."):
        return "vision"
    if path.startswith("mm_projector."):
        return "projector"
    return "decoder" if ".layers." in path else "embed"


def by_part(values: Mapping[str, int]) -> dict[str, int]:
    """The sums of the values of each part's parameters."""
    sums = dict.fromkeys(PARTS, 0)
    for name, value in values.items():
        sums[part_of(name)] += value
    return sums
