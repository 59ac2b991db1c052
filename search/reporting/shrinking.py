"""The shrinking, drawn as in the paper's Figure 3: a row of dots per block, a dot per operation."""

from collections.abc import Iterator

from matplotlib.axes import Axes

from bsnas.engine.runs.facts import RunFacts, ShrinkStep
from bsnas.engine.space.arch import Operation
from bsnas.engine.space.space import Space
from bsnas.search.reporting.picture import FAINT, GREEN, GRID, MUTED, RED, Picture, drawing


def shrinking_pictures(run: RunFacts) -> Iterator[Picture]:
    """One picture per shrink step made so far."""
    for step in run.shrink_steps:
        if step.after is not None:
            yield draw_step(run.space, step, step.after)


def draw_step(full: Space, step: ShrinkStep, after: Space) -> Picture:
    """Rows are blocks, columns operations; those of smaller channel numbers come first."""
    columns = max(len(ops) for ops in full.full().live)
    left, before = (sum(map(len, space.live)) for space in (after, step.before))
    title = f"Step {step.number}: at most {step.keep} operations a block"
    caption = (
        f"{len(step.archs):,} scored subnets turned {before - left} of {before} operations off. Filled: alive. Cross: "
        "turned off at this step. Small dot: turned off before. Blocks of a cluster share their channels; ◂ marks its "
        "spring block."
    )
    height = 104 + 15.5 * full.num_blocks
    with drawing(f"shrink-step-{step.number}", title, caption, height=height) as (picture, (axes,)):
        kept, cut, gone = [], [], []
        for block, operations in enumerate(full.full().live):
            for column, operation in enumerate(_ordered(operations)):
                place = (column, block, operation)
                if operation in after.live[block]:
                    kept.append(place)
                elif operation in step.before.live[block]:
                    cut.append(place)
                else:
                    gone.append(place)
        _draw(picture, axes, "alive", kept, step, "alive", marker="o", ms=7.5, color=GREEN)
        _draw(picture, axes, "off", cut, step, "turned off at this step", marker="x", ms=6, mew=1.7, color=RED)
        _draw(picture, axes, "before", gone, step, "turned off before", marker="o", ms=2.6, color=FAINT)
        _draw_frame(axes, full, columns)
    return picture


def _draw(
    picture: Picture, axes: Axes, gid: str, places: list[tuple[int, int, Operation]], step: ShrinkStep, what: str,
    **style: object,
) -> None:  # fmt: skip
    if not places:
        return
    texts = []
    for _, block, operation in places:
        ratio = step.importance[block].get(operation)
        texts.append(f"block {block + 1}: {operation}\n{what}" + ("" if ratio is None else f"\nR = {ratio:+.3f}"))
    columns, rows = [p[0] for p in places], [p[1] for p in places]
    axes.plot(columns, rows, ls="", gid=picture.mark(gid, texts), clip_on=False, **style)  # type: ignore[arg-type]


def _draw_frame(axes: Axes, full: Space, columns: int) -> None:
    axes.set_ylim(full.num_blocks - 0.4, -0.6)
    axes.set_xlim(-0.6, columns - 0.4)
    axes.set_yticks(
        range(full.num_blocks),
        [f"{block + 1}{' ◂' if full.is_spring(block) else '  '}" for block in range(full.num_blocks)],
    )
    axes.set_ylabel("block")
    options = _ordered(max(full.full().live, key=len))
    axes.set_xticks(range(columns), [str(op.block_op) for op in options], rotation=90, fontsize=9.5)
    axes.tick_params(length=0)
    axes.grid(False)
    for blocks in full.cluster_blocks[1:]:
        axes.axhline(blocks[0] - 0.5, color=GRID, lw=1)
    same = {len({op.channels for op in ops}) for ops in full.full().live} == {len({op.channels for op in options})}
    if same and len(full.full().live[0]) == columns:
        count = len({op.channels for op in options})
        names = ["fewest", *["middle"] * (count - 2), "most"] if 1 < count <= 3 else [""] * count
        width = columns // count
        for number, text in enumerate(names):
            if number:
                axes.axvline(number * width - 0.5, color=GRID, lw=1)
            label = f"{text} channels" if text else ""
            axes.text((number + 0.5) * width - 0.5, -0.75, label, ha="center", va="bottom", fontsize=10, color=MUTED)


def _ordered(operations: tuple[Operation, ...]) -> list[Operation]:
    return sorted(operations, key=lambda op: (op.channels, op.block_op))
