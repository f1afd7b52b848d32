"""What is kept beside a topic or a queue: dead letters, and what attempts did not count.

NATS counts hand-overs, and a message that was given back untouched was handed over as well. So
whoever gives one back says first how many of its hand-overs were no attempts, in a message of
its own subject, which the next one says anew. It is looked up only where a message comes again,
and is gone when the message is settled.
"""

import base64
from collections.abc import Collection, Sequence
from typing import Final, final

from nats.aio.msg import Msg

from molva.messaging.driver import DeadLetter
from molva.messaging.drivers._nats_link import NATSLink, Question, nobody_answered
from molva.messaging.drivers._nats_messages import (
    Names,
    dead_headers_of,
    dead_letter_of,
    fitting,
    replay_headers_of,
)
from molva.messaging.drivers._nats_streams import JetStream, kept_settings
from molva.messaging.errors import UnavailableError

__all__ = ["Kept"]

# Questions about attempts, or letters, that are asked together.
_PAGE: Final = 100


@final
class Kept:
    """What is kept for one subscription, or for a queue."""

    def __init__(self, link: NATSLink, names: Names, *, replicas: int) -> None:
        self._link = link
        self._jetstream = JetStream(link)
        self._names = names
        self._replicas = replicas

    async def open(self) -> None:
        """Make the stream where it is not there."""
        await self._jetstream.ensure_stream(kept_settings(self._names, replicas=self._replicas))

    # Attempts ---------------------------------------------------------------------------

    async def note_uncounted(self, which: Sequence[tuple[str, int, int]]) -> None:
        """Note for each message (id, sequence) how many of its hand-overs were no attempts."""
        await self._store(
            [
                Question(self._names.tries(id_, sequence), b"%d" % number)
                for id_, sequence, number in which
            ]
        )

    async def uncounted(self, which: Sequence[tuple[str, int]]) -> list[int]:
        """Return for each message how many of its hand-overs were no attempts."""
        found: list[int] = []
        for at in range(0, len(which), _PAGE):
            asked = [
                {"last_by_subj": self._names.tries(id_, sequence)}
                for id_, sequence in which[at : at + _PAGE]
            ]
            for stored in await self._jetstream.messages(self._names.kept_stream, asked):
                found.append(0 if stored is None else int(base64.b64decode(stored["data"])))
        return found

    async def forget(self, which: Sequence[tuple[str, int]]) -> None:
        """Forget what was noted of messages that are settled."""
        purge = f"STREAM.PURGE.{self._names.kept_stream}"
        for at in range(0, len(which), _PAGE):
            await self._jetstream.ask_many(
                (purge, {"filter": self._names.tries(id_, sequence)})
                for id_, sequence in which[at : at + _PAGE]
            )

    # Dead letters -----------------------------------------------------------------------

    async def bury(self, letters: Sequence[tuple[DeadLetter, int]]) -> None:
        """Store dead letters, each with the sequence number that it had."""
        most = (await self._link.connected()).client.max_payload
        letters = [(fitting(letter, most), sequence) for letter, sequence in letters]
        await self._store(
            [
                Question(
                    self._names.dead(letter.message.id.hex(), sequence),
                    letter.message.body,
                    dead_headers_of(letter),
                )
                for letter, sequence in letters
            ]
        )

    async def _store(self, questions: Sequence[Question]) -> None:
        answers = await self._link.ask(*questions)
        if nobody_answered(answers):
            # Somebody deleted the stream, or the server was wiped.
            await self.open()
            answers = await self._link.ask(*questions)
        for answer in answers:
            if b'"error"' in answer.data or b'"seq"' not in answer.data:
                raise UnavailableError(
                    f"{self._link.address}: {self._names.kept_stream} takes nothing: "
                    f"{answer.data.decode(errors='replace')}"
                )

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        return [letter for _, letter in await self._numbered(limit, None)]

    async def _numbered(
        self, limit: int, ids: Collection[bytes] | None
    ) -> list[tuple[int, DeadLetter]]:
        """Return dead letters with the sequence numbers under which they are kept."""
        found: list[tuple[int, DeadLetter]] = []
        after = 0
        while len(found) < limit:
            asked = {"seq": after + 1, "next_by_subj": self._names.dead()}
            [stored] = await self._jetstream.messages(self._names.kept_stream, [asked])
            if stored is None:
                break
            after = int(stored["seq"])
            letter = dead_letter_of(_msg(stored), self._names.origin)
            if ids is None or letter.message.id in ids:
                found.append((after, letter))
        return found

    async def dead(self) -> int:
        """Return how many dead letters there are."""
        return await self._jetstream.count(self._names.kept_stream, self._names.dead())

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Send up to ``limit`` dead letters back; return how many."""
        if ids is not None and not ids:
            return 0
        number = 0
        only = self._names.consumer_name
        while number < limit:
            some = await self._numbered(min(_PAGE, limit - number), ids)
            questions = [
                Question(
                    self._names.subject,
                    letter.message.body,
                    replay_headers_of(letter, only, sequence),
                )
                for sequence, letter in some
            ]
            answers = await self._link.ask(*questions)
            for (sequence, _), answer in zip(some, answers, strict=True):
                if b'"error"' in answer.data or b'"seq"' not in answer.data:
                    raise UnavailableError(
                        f"{self._link.address}: {self._names.shown} takes nothing: "
                        f"{answer.data.decode(errors='replace')}"
                    )
                # It waits again, so it is no dead letter any more.
                await self._jetstream.delete_message(self._names.kept_stream, sequence)
                number += 1
            if len(some) < _PAGE:
                break
        return number

    async def purge(self) -> int:
        """Remove all dead letters; return how many."""
        return await self._jetstream.purge(self._names.kept_stream, filter=self._names.dead())

    async def purge_all(self) -> None:
        """Remove all that is kept for this subscription."""
        await self.purge()
        await self._jetstream.purge(self._names.kept_stream, filter=self._names.tries())


def _msg(stored: dict[str, object]) -> Msg:
    """Return a stored message as one that came: what the server describes is text."""
    headers = {}
    for line in base64.b64decode(str(stored.get("hdrs") or "")).split(b"\r\n")[1:]:
        name, _, value = line.decode().partition(": ")
        if name:
            headers[name] = value
    data = base64.b64decode(str(stored.get("data") or ""))
    return Msg(_client=None, data=data, headers=headers)  # type: ignore[arg-type]
