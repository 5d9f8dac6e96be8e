"""Matches the keys of a checkpoint with the rules of a layout: no key is left over, no rule unused."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from fastvlm_mlx.convert.source.layouts import COUNTER_REASON, LAYOUTS, Layout, Rule
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import names, printable


@dataclass(frozen=True, kw_only=True)
class Match:
    """The use of every key of a checkpoint.

    Attributes:
        targets: The key of every target that the checkpoint fills.
        dropped: The reason for every key that is not used.
        packed: The keys of a quantized tensor's `scales` and, where it has them, `biases`, by its own key.
    """

    targets: dict[str, str]
    dropped: dict[str, str]
    packed: dict[str, tuple[str, ...]]


def recognise(keys: Collection[str], name: str) -> Layout:
    """The layout of a checkpoint with these keys.

    Args:
        keys: The names of its tensors.
        name: Used in messages.

    Raises:
        CheckpointError: If no layout has such keys.
    """
    for layout in LAYOUTS:
        if any(map(layout.marker.match, keys)):
            return layout
    known = "; ".join(f"{layout.description}: {layout.marker.pattern}" for layout in LAYOUTS)
    raise CheckpointError(
        f"{printable(name)}: is not a FastVLM checkpoint of a known layout. It holds {names(sorted(keys))}; "
        f"expected keys like {known}"
    )


def match(layout: Layout, keys: Collection[str], name: str) -> Match:
    """Applies every rule of `layout` to `keys`.

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
    targets: dict[str, str] = {}
    dropped: dict[str, str] = {}
    missing: list[str] = []
    for rule in layout.rules:
        for pairs in expand(rule, counts.get(rule.source.partition("#")[0], 1)):
            if rule.optional and not any(key in present for key, _ in pairs):
                continue
            missing += [key for key, _ in pairs if key not in present]
            left.difference_update(key for key, _ in pairs)
            if rule.target is None:
                dropped.update((key, rule.reason) for key, _ in pairs)
            else:
                targets.update((target, key) for key, target in pairs)
    for key in sorted(left):
        if key.endswith(".num_batches_tracked") and key.replace("num_batches_tracked", "running_mean") in present:
            dropped[key] = COUNTER_REASON
            left.remove(key)
    if missing:
        raise CheckpointError(
            f"{printable(name)}: lacks {names(missing)} (layout: {layout.description}); it is incomplete"
        )
    if left:
        raise CheckpointError(
            f"{printable(name)}: has tensors that no rule knows: {names(sorted(left))} (layout: {layout.description})"
        )
    return Match(targets=targets, dropped=dropped, packed=packed)


def _companions(key: str) -> tuple[str, str]:
    stem = key.removesuffix("weight")
    return f"{stem}scales", f"{stem}biases"


def _counts(layout: Layout, keys: Collection[str]) -> Mapping[str, int]:
    """The number of blocks or layers behind each prefix that precedes the `#` of a rule."""
    prefixes = {rule.source.partition("#")[0] for rule in layout.rules if "#" in rule.source}
    numbers: dict[str, set[str]] = {prefix: {"0"} for prefix in prefixes}
    for key in keys:
        for number in re.finditer(r"\.(\d+)(?=\.)", key):
            if (prefix := key[: number.start() + 1]) in numbers:
                numbers[prefix].add(number[1])
    return {prefix: len(seen) for prefix, seen in numbers.items()}


def expand(rule: Rule, count: int) -> Iterator[list[tuple[str, str]]]:
    """The keys and targets of a rule: one list, or with a `#` one for each of `count` blocks or layers."""
    for number in range(count if "#" in rule.source else 1):
        yield [
            tuple(text.replace("#", str(number)).replace("*", leaf) for text in (rule.source, rule.target or ""))  # type: ignore[misc]
            for leaf in rule.leaves
        ]
