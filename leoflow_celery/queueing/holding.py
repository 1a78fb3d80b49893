"""How a worker takes messages from Redis: what Redis accepted is in a queue or held, at every moment.

A held message is an entry of kombu's own hash ``unacked`` and of its index ``unacked_index``, whose score says since
when. What is ours is that a message goes from one to the other in one step: by a script (ADR 31). Every time is that
of Redis, and every key is whole: kombu's client would put its prefix before some of them.

Each script begins with a write that changes nothing. It ends the script on a replica and where a key holds something
else, before a message is touched. And Redis checks its memory before the first write of a script that needs some: what
follows frees as much as it takes, so a full Redis still hands out messages and takes them back.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

#: What ``Reject(error, requeue=...)`` says of a message that goes back because the broker did not take what its task
#: had to send. It is delivered again, however often.
NOT_ITS_FAULT: Any = "not its fault"
#: The same of a message that another host, or this one later, has room for.
NO_ROOM: Any = "no room"
#: Messages of one take, where the worker sets no limit.
MOST_AT_ONCE = 100
#: A worker that holds many large messages is slower than one that comes again.
_MAX_BYTES_AT_ONCE = 1_048_576
#: What a script of Redis may give to a command at once is limited.
_MAX_TAGS = 1_000
#: Who puts a message back has so long, then another does.
_PUT_BACK_SECONDS = 10

#: KEYS: unacked, its index, the lists of the queues, first served first.
#: ARGV: what the tags begin with, how many, bytes, lists of one priority, then two counted lists of tags: those that
#: are done and those that nobody saw; then the end of an entry for each of the lists.
#: Answers whether a list is none, then of each message tag, number of its list and message. Those that nobody saw have
#: the number -1 and their whole entry: they are still held, and are to be put back.
TAKE = """
redis.call('HDEL', KEYS[1], '')
redis.call('ZREM', KEYS[2], '')
local at = 5
local function tags()
  local found, number = {}, tonumber(ARGV[at])
  for i = at + 1, at + number do found[#found + 1] = ARGV[i] end
  at = at + number + 1
  return found
end
local done, lost = tags(), tags()
if #done > 0 then
  redis.call('HDEL', KEYS[1], unpack(done))
  redis.call('ZREM', KEYS[2], unpack(done))
end
local ends, answer = at - 3, {0}
local function give(tag, place, raw)
  answer[#answer + 1] = tag
  answer[#answer + 1] = place - 3
  answer[#answer + 1] = raw
end
for _, tag in ipairs(lost) do
  local entry = redis.call('HGET', KEYS[1], tag)
  if entry then give(tag, 2, entry) end
end
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
local taken, wanted, bytes, width = 0, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
for first = 3, #KEYS, width do
  local found = true
  while found do
    found = false
    for place = first, first + width - 1 do
      local raw = taken < wanted and bytes > 0 and redis.pcall('RPOP', KEYS[place])
      if type(raw) == 'table' then
        answer[1] = 1
      elseif raw then
        taken = taken + 1
        bytes = bytes - #raw
        local tag = ARGV[1] .. taken
        redis.call('HSET', KEYS[1], tag, '[' .. raw .. ARGV[ends + place])
        redis.call('ZADD', KEYS[2], now, tag)
        give(tag, place, raw)
        found = true
      end
    end
  end
end
return answer
"""
TAKE_SHA = hashlib.sha1(TAKE.encode(), usedforsecurity=False).hexdigest()

#: KEYS: unacked, index. ARGV: visibility timeout, seconds to put one back, how many. Answers tag and entry of each
#: message that is due; nobody else is told of it for those seconds.
DUE = """
redis.call('HDEL', KEYS[1], '')
redis.call('ZREM', KEYS[2], '')
local time = redis.call('TIME')
local due, answer = time[1] - ARGV[1], {}
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', due, 'LIMIT', 0, ARGV[3])) do
  local entry = redis.call('HGET', KEYS[1], tag)
  if entry then
    redis.call('ZADD', KEYS[2], due + ARGV[2], tag)
    answer[#answer + 1] = tag
    answer[#answer + 1] = entry
  else
    redis.call('ZREM', KEYS[2], tag)
  end
end
return answer
"""

#: KEYS: unacked, index, and the lists that the message goes to. ARGV: tag, LPUSH or RPUSH, message. Answers whether it
#: was held: of two who try only one puts it back. A list that is none ends it at the push, and the message stays held.
PUT_BACK = """
redis.call('HDEL', KEYS[1], '')
redis.call('ZREM', KEYS[2], '')
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return 0
end
for place = 3, #KEYS do redis.call(ARGV[2], KEYS[place], ARGV[3]) end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""

#: KEYS: unacked, index. ARGV: tags. The worker that holds these is alive.
RENEW = """
local time = redis.call('TIME')
for _, tag in ipairs(ARGV) do redis.call('ZADD', KEYS[2], 'XX', time[1], tag) end
"""


class Holder:
    """What one worker process has to tell Redis about what it holds. It outlives the connections.

    Telling it twice changes nothing, so whatever Redis may not have heard is told again.
    """

    def __init__(self) -> None:
        #: Tags of messages that are done with. Appending is safe from any thread.
        self.done: deque[str] = deque()
        #: Tags under which we may hold messages that no task of ours saw: their answer was lost, or their queue shut.
        self.lost: deque[str] = deque()
        self._name = uuid.uuid4().hex
        self._takes = 0

    def is_ours(self, tag: str) -> bool:
        return tag.startswith(self._name)

    def ask(self, wanted: int) -> Ask:
        """The next call: it tells what there is to tell, and asks for ``wanted`` messages."""
        self._takes += 1
        done, lost = ([tags.popleft() for _ in range(min(len(tags), _MAX_TAGS))] for tags in (self.done, self.lost))
        return Ask(f"{self._name}.{self._takes}.", max(wanted - len(lost), 0), done, lost)

    def unanswered(self, ask: Ask) -> None:
        """Nobody knows whether Redis heard it."""
        self.done.extend(ask.done)
        self.lost.extend((*ask.lost, *ask.tags()))


class Ask:
    """One call of ``TAKE``."""

    def __init__(self, tag_base: str, wanted: int, done: Sequence[str], lost: Sequence[str]) -> None:
        self.tag_base, self.wanted, self.done, self.lost = tag_base, wanted, done, lost

    def tags(self) -> list[str]:
        """Those that it may have given."""
        return [f"{self.tag_base}{number + 1}" for number in range(self.wanted)]

    def arguments(self, keys: Sequence[str], width: int, ends: Sequence[str]) -> list[Any]:
        """Of ``TAKE``. ``keys`` are unacked, its index and the lists, ``width`` of them of each priority."""
        counted = (len(self.done), *self.done, len(self.lost), *self.lost)
        return [len(keys), *keys, self.tag_base, self.wanted, _MAX_BYTES_AT_ONCE, width, *counted, *ends]


def due(keys: Sequence[str], visibility_seconds: float, limit: int) -> list[Any]:
    """The arguments of ``DUE``."""
    return [len(keys), *keys, visibility_seconds, _PUT_BACK_SECONDS, limit]


def renewals(keys: Sequence[str], tags: Sequence[str]) -> Iterator[list[Any]]:
    """The arguments of each ``RENEW`` that it takes: a worker may hold any number of messages for later."""
    for start in range(0, len(tags), _MAX_TAGS):
        yield [len(keys), *keys, *tags[start : start + _MAX_TAGS]]
