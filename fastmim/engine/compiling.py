"""torch.compile for the blocks of a method: the parts that repeat, so that each is compiled once."""

from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost modules with parameters that stand in a list or sequence beside another of their own class:
    transformer blocks, the blocks of a CNN's stage."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            kinds = [type(part) for part in child]
            repeated = [part for part in child if kinds.count(type(part)) > 1 and _has_inside(part)]
            found += repeated
            for part in child:
                if part not in repeated:
                    found += repeated_blocks(part)
        else:
            found += repeated_blocks(child)
    return found


def compile_blocks(method: nn.Module, backend: str = "inductor") -> int:
    """Compile every repeated block in place: names and state-dict keys stay. Returns how many there are.

    Raises:
        ValueError: nothing repeats, so there would be nothing to compile.
    """
    blocks = repeated_blocks(method)
    if not blocks:
        raise ValueError(f"engine.compile: {type(method).__name__} has no repeated blocks to compile; turn it off")
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def _has_inside(module: nn.Module) -> bool:
    """A block is made of layers; a single layer (one of two convolutions in a row, say) is none."""
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
