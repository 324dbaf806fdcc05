"""What keeps the label's entry of an in-place gradient right, read in the control-flow graph of the compiled kernel."""

Flow = list[tuple[str, list[int]]]  # of each instruction its mnemonic, and which may come next


def reachable(flow: Flow, starts: list[int], without: int = -1) -> set[int]:
    """The instructions that `starts` lead to, themselves included, on ways that avoid one."""
    found, waiting = set(), [i for i in starts if i != without]
    while waiting:
        i = waiting.pop()
        if i not in found:
            found.add(i)
            waiting += [j for j in flow[i][1] if j != without]
    return found


def accesses(flow: Flow, places: set[int], name: str) -> list[int]:
    """Bits of the global loads (LDG) or stores (STG) among `places`."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    found = (flow[i][0].split(".") for i in places)
    return sorted(next((widths[m] for m in x if m in widths), 32) for x in found if x[0] == name)


def faults(flow: Flow, bits: int) -> list[str]:
    """What is wrong in a kernel whose logits have so many bits; nothing if all of this holds.

    Of two barriers the second stands on every way from the first to the end. Before the first nothing is stored, on no
    way that leads to it (a pruned row is stored on another). Between them the row is loaded and stored in 16 bytes, and
    no logit by itself: the label's is then read already. After the second one entry is stored, and nothing is loaded.
    """
    barriers = [i for i, (op, _) in enumerate(flow) if op.startswith("BAR")]
    if len(barriers) != 2:
        return [f"{len(barriers)} barriers"]
    first, second = barriers if barriers[1] in reachable(flow, flow[barriers[0]][1]) else barriers[::-1]
    before = reachable(flow, [0], first)
    between = reachable(flow, flow[first][1], second)
    after = reachable(flow, flow[second][1])
    early = [i for i in before if flow[i][0].startswith("STG") and first in reachable(flow, [i])]
    loaded, stored = accesses(flow, between, "LDG"), accesses(flow, between, "STG")
    found = {
        "a barrier is reached twice": first in between or {first, second} & after,
        "the second barrier without the first": second in before,
        "the end without the second barrier": any(flow[i][0].startswith("EXIT") for i in between),
        "a store before the first barrier": early,
        "the row is not between the barriers": 128 not in loaded or 128 not in stored,
        "a logit by itself between the barriers": any(width < 128 for width in loaded),
        "the last store is not the label's": accesses(flow, after, "STG") != [bits],
        "a load after the second barrier": accesses(flow, after, "LDG"),
    }
    return [text for text, wrong in found.items() if wrong]
