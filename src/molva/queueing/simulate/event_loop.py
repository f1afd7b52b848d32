"""Every other model: any order, priorities, interruption, patience, bulks, servers without end.

Jobs are numbers of slots, and what belongs to a job stands in columns. Two heaps say what
happens next: the ends of service, and the ends of patience of those that wait. A waiting job
is in the line of its class, a doubly linked list, so that it can be taken from either end or
leave from the middle; for the random order it is in an array instead.

The functions are written for plain Python over lists and for the compiler over arrays: they
index and compare, and nothing else. What happens at one instant happens in this order: a
service ends and the next begins, patience ends, a job arrives.
"""

from collections.abc import Callable, MutableSequence
from typing import Final, NamedTuple

__all__ = [
    "PARTS",
    "Board",
    "Counter",
    "Drawn",
    "Log",
    "Order",
    "Play",
    "Rules",
    "begin",
    "chosen",
    "drop_end",
    "drop_leaf",
    "interruptible",
    "lift_end",
    "lift_leaf",
    "pass_time",
    "play",
    "push_end",
    "push_leaf",
    "record",
    "serve_next",
    "stand",
    "take",
]

# Columns: lists in plain Python, arrays of numpy where compiled.
Numbers = MutableSequence[float]
Places = MutableSequence[int]


class Order:
    """Who is next, as numbers for the compiler."""

    FIFO: Final = 0
    LIFO: Final = 1
    RANDOM: Final = 2
    PREEMPTIVE: Final = 3


class Counter:
    """Places in ``Board.counts``."""

    WAITING: Final = 0
    BUSY: Final = 1  # servers
    SPARE: Final = 2  # slots without a job
    LEAVES: Final = 3  # jobs whose patience can end
    PICKS: Final = 4  # numbers used for the random order
    LOGGED: Final = 5
    REFUSED: Final = 6
    SIZE: Final = 7


class Rules(NamedTuple):
    """What does not change in a run."""

    servers: int  # −1 for any number
    waiting: int  # −1 for any number
    order: int
    limit: int  # jobs in a bulk; 0 where each is served alone
    base: float  # of a bulk
    each: float  # for each job in it


class Drawn(NamedTuple):
    """What arriving jobs bring; what the model has not is empty."""

    gaps: Numbers
    services: Numbers
    ranks: Places
    patience: Numbers
    picks: Numbers


class Board(NamedTuple):
    """Everything that is in the station. Instants count from the end of the last chunk."""

    # Of each slot.
    came: Numbers
    since: Numbers  # when its present wait began
    waited: Numbers
    left: Numbers  # service time that it still needs
    deadline: Numbers
    rank: Places
    after: Places  # the next in its line, or in its bulk; −1 for none
    before: Places  # the one before it in its line; its place where the order is random
    leaf: Places  # its place among the leaves; −1 where it is in none
    # Lines by class, and the array for the random order.
    head: Places
    tail: Places
    crowd: Places
    # Heaps.
    ends: Numbers
    works: Places  # the first job of the work that ends
    leaves: Places
    # The rest.
    spare: Places
    counts: Places
    work: Numbers  # its one number: time for which servers are busy


class Log(NamedTuple):
    """What became of jobs, in the order in which they left, and when jobs were refused."""

    wait: Numbers
    stay: Numbers
    at: Numbers
    abandoned: Places
    rank: Places
    refused_at: Numbers


Play = Callable[[Rules, Drawn, Board, Log], float]

_WAITING: Final = Counter.WAITING
_BUSY: Final = Counter.BUSY
_SPARE: Final = Counter.SPARE
_LEAVES: Final = Counter.LEAVES
_PICKS: Final = Counter.PICKS
_LOGGED: Final = Counter.LOGGED
_REFUSED: Final = Counter.REFUSED
_LIFO: Final = Order.LIFO
_RANDOM: Final = Order.RANDOM
_PREEMPTIVE: Final = Order.PREEMPTIVE


def play(rules: Rules, drawn: Drawn, board: Board, log: Log) -> float:
    """Let jobs arrive and everything happen until the last of them; return its instant."""
    count = board.counts
    now = 0.0
    for i in range(len(drawn.gaps)):
        now += drawn.gaps[i]
        pass_time(rules, drawn, board, log, now)
        if count[_BUSY] == rules.servers and 0 <= rules.waiting <= count[_WAITING]:
            log.refused_at[count[_REFUSED]] = now
            count[_REFUSED] += 1
            continue
        count[_SPARE] -= 1
        job = board.spare[count[_SPARE]]
        board.came[job] = now
        board.since[job] = now
        board.waited[job] = 0.0
        board.left[job] = drawn.services[i]
        board.rank[job] = drawn.ranks[i] if len(drawn.ranks) > 0 else 0
        board.after[job] = -1
        board.leaf[job] = -1
        if count[_BUSY] != rules.servers:
            begin(rules, board, job, 1, now)
            continue
        if rules.order == _PREEMPTIVE:
            at = interruptible(board, board.rank[job])
            if at >= 0:
                other = board.works[at]
                board.left[other] = board.ends[at] - now
                board.work[0] -= board.left[other]
                board.since[other] = now
                drop_end(board, at)
                stand(board, other, True)
                begin(rules, board, job, 1, now)
                continue
        if len(drawn.patience) > 0:
            board.deadline[job] = now + drawn.patience[i]
            push_leaf(board, job)
        if rules.order == _RANDOM:
            board.crowd[count[_WAITING]] = job
            board.before[job] = count[_WAITING]
            count[_WAITING] += 1
        else:
            stand(board, job, False)
    return now


def pass_time(rules: Rules, drawn: Drawn, board: Board, log: Log, until: float) -> None:
    """Let services and patience end up to ``until``, and at it."""
    count = board.counts
    while True:
        ends = count[_BUSY] > 0 and board.ends[0] <= until
        leaves = count[_LEAVES] > 0 and board.deadline[board.leaves[0]] <= until
        if leaves and not (ends and board.ends[0] <= board.deadline[board.leaves[0]]):
            job = board.leaves[0]
            at = board.deadline[job]
            take(rules, board, job)
            record(board, log, job, at, at - board.came[job], 1)
        elif ends:
            now = board.ends[0]
            job = board.works[0]
            drop_end(board, 0)
            while job >= 0:
                after = board.after[job]
                record(board, log, job, now, board.waited[job], 0)
                job = after
            if count[_WAITING] > 0:
                serve_next(rules, drawn, board, now)
        else:
            return


def serve_next(rules: Rules, drawn: Drawn, board: Board, now: float) -> None:
    """Begin with whoever is next, or with as many as are served as one."""
    count = board.counts
    size = min(max(rules.limit, 1), count[_WAITING])
    first = last = -1
    for _ in range(size):
        job = chosen(rules, drawn, board)
        take(rules, board, job)
        board.after[job] = -1
        if first < 0:
            first = job
        else:
            board.after[last] = job
        last = job
    begin(rules, board, first, size, now)


def begin(rules: Rules, board: Board, first: int, size: int, now: float) -> None:
    """Let a free server work on ``first``, and on those linked behind it."""
    time = rules.base + size * rules.each if rules.limit > 0 else board.left[first]
    job = first
    while job >= 0:
        board.waited[job] += now - board.since[job]
        job = board.after[job]
    board.work[0] += time
    push_end(board, now + time, first)


def record(board: Board, log: Log, job: int, now: float, wait: float, abandoned: int) -> None:
    """Note that a job leaves, and free its slot."""
    count = board.counts
    at = count[_LOGGED]
    log.wait[at] = wait
    log.stay[at] = now - board.came[job]
    log.at[at] = now
    log.abandoned[at] = abandoned
    log.rank[at] = board.rank[job]
    count[_LOGGED] = at + 1
    board.spare[count[_SPARE]] = job
    count[_SPARE] += 1


def chosen(rules: Rules, drawn: Drawn, board: Board) -> int:
    """Return who is next among those that wait."""
    count = board.counts
    if rules.order == _RANDOM:
        pick = drawn.picks[count[_PICKS]]
        count[_PICKS] += 1
        return board.crowd[int(pick * count[_WAITING])]
    for rank in range(len(board.head)):
        if board.head[rank] >= 0:
            return board.tail[rank] if rules.order == _LIFO else board.head[rank]
    return -1


def take(rules: Rules, board: Board, job: int) -> None:
    """Take a waiting job out of its line, and let its patience count no longer."""
    count = board.counts
    if board.leaf[job] >= 0:
        drop_leaf(board, board.leaf[job])
    count[_WAITING] -= 1
    before = board.before[job]
    if rules.order == _RANDOM:
        last = board.crowd[count[_WAITING]]
        board.crowd[before] = last
        board.before[last] = before
        return
    after = board.after[job]
    if before >= 0:
        board.after[before] = after
    else:
        board.head[board.rank[job]] = after
    if after >= 0:
        board.before[after] = before
    else:
        board.tail[board.rank[job]] = before


def stand(board: Board, job: int, first: bool) -> None:
    """Put a job at the end of the line of its class, or before all of it."""
    rank = board.rank[job]
    head, tail = board.head[rank], board.tail[rank]
    board.after[job] = head if first else -1
    board.before[job] = -1 if first else tail
    if head < 0:
        board.head[rank] = job
        board.tail[rank] = job
    elif first:
        board.before[head] = job
        board.head[rank] = job
    else:
        board.after[tail] = job
        board.tail[rank] = job
    board.counts[_WAITING] += 1


def interruptible(board: Board, rank: int) -> int:
    """Return the work that makes way for ``rank``, −1 for none.

    Of the least urgent class that is served, it is the one that would end last.
    """
    worst = 0
    for at in range(1, board.counts[_BUSY]):
        here, there = board.rank[board.works[at]], board.rank[board.works[worst]]
        if here > there or (here == there and board.ends[at] > board.ends[worst]):
            worst = at
    return worst if board.rank[board.works[worst]] > rank else -1


def push_end(board: Board, end: float, job: int) -> None:
    """Add a work to the heap of those under way."""
    at = board.counts[_BUSY]
    board.counts[_BUSY] = at + 1
    lift_end(board, at, end, job)


def lift_end(board: Board, at: int, end: float, job: int) -> None:
    """Put a work where it belongs in its heap, at ``at`` or above."""
    while at > 0:
        above = (at - 1) // 2
        if board.ends[above] <= end:
            break
        board.ends[at] = board.ends[above]
        board.works[at] = board.works[above]
        at = above
    board.ends[at] = end
    board.works[at] = job


def drop_end(board: Board, at: int) -> None:
    """Remove a work from its heap."""
    size = board.counts[_BUSY] - 1
    board.counts[_BUSY] = size
    end, job = board.ends[size], board.works[size]
    if at == size:
        return
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and board.ends[below + 1] < board.ends[below]:
            below += 1
        if board.ends[below] >= end:
            break
        board.ends[at] = board.ends[below]
        board.works[at] = board.works[below]
        at = below
    lift_end(board, at, end, job)


def push_leaf(board: Board, job: int) -> None:
    """Add a waiting job to the heap of those whose patience can end."""
    at = board.counts[_LEAVES]
    board.counts[_LEAVES] = at + 1
    lift_leaf(board, at, job)


def lift_leaf(board: Board, at: int, job: int) -> None:
    """Put a job where it belongs in its heap, at ``at`` or above."""
    deadline = board.deadline[job]
    while at > 0:
        above = (at - 1) // 2
        other = board.leaves[above]
        if board.deadline[other] <= deadline:
            break
        board.leaves[at] = other
        board.leaf[other] = at
        at = above
    board.leaves[at] = job
    board.leaf[job] = at


def drop_leaf(board: Board, at: int) -> None:
    """Remove a job from the heap of those whose patience can end."""
    size = board.counts[_LEAVES] - 1
    board.counts[_LEAVES] = size
    board.leaf[board.leaves[at]] = -1
    job = board.leaves[size]
    if at == size:
        return
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        right = below + 1
        if right < size and (
            board.deadline[board.leaves[right]] < board.deadline[board.leaves[below]]
        ):
            below = right
        other = board.leaves[below]
        if board.deadline[other] >= board.deadline[job]:
            break
        board.leaves[at] = other
        board.leaf[other] = at
        at = below
    lift_leaf(board, at, job)


# What ``play`` calls, for the compiler.
PARTS: Final[tuple[Callable[..., object], ...]] = (
    *(pass_time, serve_next, begin, record, chosen, take, stand, interruptible),
    *(push_end, lift_end, drop_end, push_leaf, lift_leaf, drop_leaf),
)
