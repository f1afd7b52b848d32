-- The functions of topics: what must happen at once or not at all. ``redis.py`` says why
-- they are built this way.
--
-- A stream's list of pending entries says who holds what: the consumer, for how long, and
-- how often it was handed over, its turn. What was given back is held by NOBODY until it is
-- taken again. Times are milliseconds of the server's clock, as streams have them.

local NOBODY = '~'
-- Entries that one step of a loop looks at: few enough for Lua's stack, many enough for speed.
local STEP = 500

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function text(number)
  return string.format('%.0f', number)
end

-- Return what a flat list of names and values says.
local function named(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

-- Return the groups of a stream, by name; none where there is no stream.
local function groups_of(log)
  local found = {}
  if redis.call('EXISTS', log) == 0 then return found end
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', log)) do
    local group = named(flat)
    found[group.name] = group
  end
  return found
end

local function after(id)
  local ms, seq = string.match(id, '(%d+)-(%d+)')
  return ms .. '-' .. text(seq + 1)
end

-- Return how many messages a group has not settled. Never fewer: where entries were deleted
-- behind our back the server does not know its lag, and then it is all that is kept.
local function waiting_of(log, group)
  local lag = group.lag
  if not lag then return redis.call('XLEN', log) end
  return group.pending + lag
end

-- Return the turn of an entry that a consumer holds; nil where it does not hold it.
local function turn_of(log, group, consumer, id)
  local found = redis.call('XPENDING', log, group, id, id, 1)[1]
  if found and found[2] == consumer then return found[4] end
  return nil
end

-- Return the attempt as which an entry is handed over in this turn. Turns count every
-- hand-over; those that did not count, or counted twice, are the difference.
local function attempt_of(tries, id, turn)
  local difference = redis.call('HGET', tries, id)
  return turn - (tonumber(difference or '0'))
end

local function forget(later, tries, ids)
  if #ids == 0 then return end
  -- Nearly always neither is there, and to look is cheaper than to name each.
  if redis.call('EXISTS', later) == 1 then redis.call('ZREM', later, unpack(ids)) end
  if redis.call('EXISTS', tries) == 1 then redis.call('HDEL', tries, unpack(ids)) end
end

-- Tell one consumer that waits that there is something to look at.
local function wake_one(wake)
  redis.call('XADD', wake, 'MAXLEN', 1, '*', 'w', '')
end

-- Make what is missing. Returns the topic's kind and the subscription's lease.
-- keys: log, info, wake; args: create, kind, group, start, lease
register('open', function(keys, args)
  local log, info, wake = unpack(keys)
  local create, kind, group, start, lease = unpack(args)
  local found = redis.call('HGET', info, 'kind')
  if not found then
    if create ~= '1' then return {'no topic'} end
    redis.call('HSET', info, 'kind', kind, 'version', 1)
    found = kind
  end
  if found == 'log' and redis.call('EXISTS', log) == 0 then
    -- An empty stream: what is large is added without a function, and only where one is.
    redis.call('XGROUP', 'CREATE', log, NOBODY, '0', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', log, NOBODY)
  end
  if found ~= 'log' or group == '' then return {found} end
  if not groups_of(log)[group] then
    if create ~= '1' then return {'no subscription'} end
    redis.call('XGROUP', 'CREATE', log, group, start == 'latest' and '$' or '0', 'MKSTREAM')
  end
  if not groups_of(wake)[group] then
    redis.call('XGROUP', 'CREATE', wake, group, '0', 'MKSTREAM')
  end
  local name = 'lease:' .. group
  if lease == '' then
    redis.call('HSETNX', info, name, 30000)
  else
    redis.call('HSET', info, name, lease)
  end
  return {found, redis.call('HGET', info, name)}
end)

-- Store messages. Returns how many fitted; -1 where there is no such topic.
-- keys: log, info; args: capacity, then for each: id, '=' and the key or nothing, meta, body
register('send', function(keys, args)
  local log, info = unpack(keys)
  if redis.call('EXISTS', info) == 0 then return -1 end
  local fitting = (#args - 1) / 4
  if args[1] ~= '' then
    local waiting, groups = 0, 0
    for _, group in pairs(groups_of(log)) do
      groups = groups + 1
      waiting = math.max(waiting, waiting_of(log, group))
    end
    -- Without a subscription, what is kept waits for the first one.
    if groups == 0 then waiting = redis.call('XLEN', log) end
    fitting = math.max(0, math.min(fitting, args[1] - waiting))
  end
  for i = 2, 1 + 4 * fitting, 4 do
    local id, key, meta, body = unpack(args, i, i + 3)
    if key == '' and meta == '' then
      redis.call('XADD', log, '*', 'id', id, 'body', body)
    elseif meta == '' then
      redis.call('XADD', log, '*', 'id', id, 'body', body, 'key', string.sub(key, 2))
    elseif key == '' then
      redis.call('XADD', log, '*', 'id', id, 'body', body, 'meta', meta)
    else
      redis.call('XADD', log, '*', 'id', id, 'body', body, 'key', string.sub(key, 2), 'meta', meta)
    end
  end
  return fitting
end)

-- Take what was given back and is due, and what somebody held for longer than a lease.
-- Returns milliseconds until more is due (-1: nothing is), then id, turn, attempt and fields
-- of each.
-- keys: log, info, later, tries, wake; args: group, consumer, limit, woken by…
register('look', function(keys, args)
  local log, info, later, tries, wake = unpack(keys)
  local group, consumer, limit = args[1], args[2], tonumber(args[3])
  for i = 4, #args do redis.call('XACK', wake, group, args[i]) end
  local now = now_ms()
  local lease = tonumber(redis.call('HGET', info, 'lease:' .. group) or 30000)
  local taken = {}

  local function take(id, turn)
    local entry = redis.call('XCLAIM', log, group, consumer, 0, id)[1]
    redis.call('ZREM', later, id)
    if entry then
      taken[#taken + 1] = {id, turn + 1, attempt_of(tries, id, turn + 1), entry[2]}
    end
  end

  -- What was given back, and what was held for longer than a lease, by when that is over.
  local due = redis.call('ZRANGE', later, '-inf', text(now), 'BYSCORE', 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    local held = redis.call('XPENDING', log, group, id, id, 1)[1]
    if held and (held[2] == NOBODY or held[3] >= lease) then
      take(id, held[4])
    else
      redis.call('ZREM', later, id)
    end
  end
  -- What a consumer holds that has not been heard of. XAUTOCLAIM would also take what was
  -- given back and is not due, and does not say whose it was.
  local from = '-'
  while #taken < limit do
    local page = redis.call('XPENDING', log, group, 'IDLE', lease, from, '+', STEP)
    for _, held in ipairs(page) do
      if #taken < limit and not redis.call('ZSCORE', later, held[1]) then take(held[1], held[4]) end
    end
    if #page < STEP then break end
    from = '(' .. page[#page][1]
  end

  local next = redis.call('ZRANGE', later, 0, 0, 'WITHSCORES')
  local wait = next[2] and math.max(0, next[2] - now) or -1
  if wait == 0 then wake_one(wake) end
  return {wait, taken}
end, {'allow-oom'})

-- Settle entries as done. A token is an entry's id, with /turn behind it after the first.
-- Returns the places of those that this consumer does not hold.
-- keys: log, later, tries; args: group, consumer, how to look, then the tokens
register('ack', function(keys, args)
  local log, later, tries = unpack(keys)
  local group, consumer = args[1], args[2]
  local held = {}  -- token to id; false once it was used
  if args[3] == 'range' then
    -- Asking for all between the first and the last costs a quarter of asking for each.
    local from, to = string.match(args[4], '[^/]+'), string.match(args[#args], '[^/]+')
    repeat
      local page = redis.call('XPENDING', log, group, from, to, STEP, consumer)
      for i = 1, #page do
        local id, turn = page[i][1], page[i][4]
        held[turn == 1 and id or id .. '/' .. turn] = id
      end
      if #page > 0 then from = '(' .. page[#page][1] end
    until #page < STEP
  end
  local ours, lost = {}, {}
  for i = 4, #args do
    local token = args[i]
    local found = held[token]
    if found == nil then
      local id, turn = string.match(token, '([^/]+)/?(.*)')
      if turn_of(log, group, consumer, id) == tonumber(turn == '' and 1 or turn) then
        found = id
      end
    end
    if found then
      ours[#ours + 1] = found
    else
      lost[#lost + 1] = i - 4
    end
    held[token] = false  -- the same token a second time is a late one
  end
  if #ours > 0 then
    redis.call('XACK', log, group, unpack(ours))
    forget(later, tries, ours)
  end
  return lost
end, {'allow-oom'})

-- Give an entry back, which comes again after a while with so many attempts behind it.
local function give_back(keys, group, id, turn, due, attempts)
  local log, later, tries = unpack(keys)
  redis.call('XCLAIM', log, group, NOBODY, 0, id, 'JUSTID')
  redis.call('ZADD', later, text(due), id)
  if turn == attempts then
    redis.call('HDEL', tries, id)
  else
    redis.call('HSET', tries, id, turn - attempts)
  end
end

-- Settle entries in any way. Returns the places of those that this consumer does not hold.
-- keys: log, later, tries, wake, dead; args: group, consumer, then for each: id, turn,
-- action (back, done, dead), delay, attempts, reason
register('settle', function(keys, args)
  local log, later, tries, wake, dead = unpack(keys)
  local group, consumer = args[1], args[2]
  local lost, now, back = {}, now_ms(), false
  for i = 3, #args, 6 do
    local id, turn, action, delay, attempts, reason = unpack(args, i, i + 5)
    if turn_of(log, group, consumer, id) ~= tonumber(turn) then
      lost[#lost + 1] = (i - 3) / 6
    elseif action == 'back' then
      give_back(keys, group, id, tonumber(turn), now + delay, tonumber(attempts))
      back = true
    else
      local entry = action == 'dead' and redis.call('XRANGE', log, id, id)[1]
      if entry then
        redis.call('XADD', dead, '*', 'reason', reason, 'attempts', attempts, 'entry', id,
          unpack(entry[2]))
      end
      redis.call('XACK', log, group, id)
      forget(later, tries, {id})
    end
  end
  if back then wake_one(wake) end
  return lost
end, {'allow-oom'})

-- Hold entries for some milliseconds from now. Returns the places of those that are lost.
-- keys: log, info, later; args: group, consumer, milliseconds, then for each: id, turn
register('extend', function(keys, args)
  local log, info, later = unpack(keys)
  local group, consumer, ms = args[1], args[2], tonumber(args[3])
  local lease = tonumber(redis.call('HGET', info, 'lease:' .. group) or 30000)
  local now, lost = now_ms(), {}
  for i = 4, #args, 2 do
    local id = args[i]
    if turn_of(log, group, consumer, id) ~= tonumber(args[i + 1]) then
      lost[#lost + 1] = (i - 4) / 2
    else
      -- Without a turn counted up: it is the same hand-over.
      redis.call('XCLAIM', log, group, consumer, 0, id, 'IDLE', math.max(0, lease - ms), 'JUSTID')
      if ms > lease then
        redis.call('ZADD', later, text(now + ms), id)
      else
        redis.call('ZREM', later, id)
      end
    end
  end
  return lost
end, {'allow-oom'})

-- Return what a consumer holds by the server's account: id, turn and attempt of each.
-- keys: log, tries; args: group, consumer, from
register('mine', function(keys, args)
  local log, tries = unpack(keys)
  local found = {}
  for _, held in ipairs(redis.call('XPENDING', log, args[1], args[3], '+', STEP, args[2])) do
    found[#found + 1] = {held[1], held[4], attempt_of(tries, held[1], held[4])}
  end
  return found
end, {'no-writes'})

-- Say that a consumer is there, and forget those that are not, unless they hold something:
-- deleting a consumer deletes its pending entries with it.
-- keys: log, wake, members; args: group, consumer, milliseconds
register('beat', function(keys, args)
  local log, wake, members = unpack(keys)
  local group, consumer = args[1], args[2]
  local now = now_ms()
  redis.call('ZADD', members, text(now + args[3]), consumer)
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', log, group)) do
    local other = named(flat)
    local until_ms = redis.call('ZSCORE', members, other.name)
    local gone = not until_ms or tonumber(until_ms) < now
    if gone and other.pending == 0 and other.name ~= NOBODY then
      redis.call('XGROUP', 'DELCONSUMER', log, group, other.name)
      redis.call('XGROUP', 'DELCONSUMER', wake, group, other.name)
      redis.call('ZREM', members, other.name)
    end
  end
end, {'allow-oom'})

-- Give back all that a consumer holds; none of it was tried. Then forget the consumer.
-- keys: log, later, tries, wake, members; args: group, consumer
register('leave', function(keys, args)
  local log, later, tries, wake, members = unpack(keys)
  local group, consumer = args[1], args[2]
  local now, back = now_ms(), false
  while true do
    local page = redis.call('XPENDING', log, group, '-', '+', STEP, consumer)
    for _, held in ipairs(page) do
      local id, turn = held[1], held[4]
      give_back(keys, group, id, turn, now, attempt_of(tries, id, turn) - 1)
      back = true
    end
    if #page < STEP then break end
  end
  redis.call('XGROUP', 'DELCONSUMER', log, group, consumer)
  redis.call('XGROUP', 'DELCONSUMER', wake, group, consumer)
  redis.call('ZREM', members, consumer)
  if back then wake_one(wake) end
end, {'allow-oom'})

-- Delete what every group has settled, in bulk: whole nodes of the stream.
-- keys: log
register('trim', function(keys)
  local log = keys[1]
  local lowest
  for name, group in pairs(groups_of(log)) do
    local needed = after(group['last-delivered-id'])
    if group.pending > 0 then needed = redis.call('XPENDING', log, name)[2] end
    local ms, seq = string.match(needed, '(%d+)-(%d+)')
    ms, seq = tonumber(ms), tonumber(seq)
    if not lowest or ms < lowest[1] or ms == lowest[1] and seq < lowest[2] then
      lowest = {ms, seq}
    end
  end
  if not lowest then return 0 end
  return redis.call('XTRIM', log, 'MINID', '~', text(lowest[1]) .. '-' .. text(lowest[2]))
end, {'allow-oom'})

-- Return pending, dead, milliseconds since the oldest was stored (-1: nothing waits).
-- keys: log, dead; args: group
register('stat', function(keys, args)
  local log, dead = unpack(keys)
  local group = groups_of(log)[args[1]]
  if not group then return {} end
  local oldest
  if group.pending > 0 then oldest = redis.call('XPENDING', log, args[1])[2] end
  local unread = redis.call('XRANGE', log, '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
  if not oldest and unread then oldest = unread[1] end
  local age = oldest and now_ms() - string.match(oldest, '%d+') or -1
  return {waiting_of(log, group), redis.call('XLEN', dead), math.max(-1, age)}
end, {'no-writes'})

-- Return state, attempts, id and fields of what waits, oldest first.
-- keys: log, info, later, tries; args: group, limit
register('peek', function(keys, args)
  local log, info, later, tries = unpack(keys)
  local group, limit = args[1], tonumber(args[2])
  local now = now_ms()
  local lease = tonumber(redis.call('HGET', info, 'lease:' .. group) or 30000)
  local found = {}
  for _, held in ipairs(redis.call('XPENDING', log, group, '-', '+', limit)) do
    local id, consumer, idle, turn = unpack(held)
    local entry = redis.call('XRANGE', log, id, id)[1]
    local due = redis.call('ZSCORE', later, id)
    local state = 'held'
    if due and tonumber(due) > now then
      if consumer == NOBODY then state = 'delayed' end
    elseif consumer == NOBODY or idle >= lease then
      state = 'ready'
    end
    if entry then found[#found + 1] = {state, attempt_of(tries, id, turn), id, entry[2]} end
  end
  local last = groups_of(log)[group]['last-delivered-id']
  if #found < limit then
    local unread = redis.call('XRANGE', log, '(' .. last, '+', 'COUNT', limit - #found)
    for _, entry in ipairs(unread) do found[#found + 1] = {'ready', 0, entry[1], entry[2]} end
  end
  return found
end, {'no-writes'})

-- Settle all that waits, whoever holds it. Returns how many.
-- keys: log, later, tries; args: group
register('purge', function(keys, args)
  local log, later, tries = unpack(keys)
  local group = args[1]
  local number = waiting_of(log, groups_of(log)[group])
  local stream = named(redis.call('XINFO', 'STREAM', log))
  redis.call('XGROUP', 'SETID', log, group, stream['last-generated-id'],
    'ENTRIESREAD', stream['entries-added'])
  while true do
    local page = redis.call('XPENDING', log, group, '-', '+', STEP)
    local ids = {}
    for i, held in ipairs(page) do ids[i] = held[1] end
    if #ids == 0 then break end
    redis.call('XACK', log, group, unpack(ids))
  end
  redis.call('DEL', later, tries)
  return number
end, {'allow-oom'})

-- Send dead letters back: each is one or the other at every moment. Returns how many were,
-- and where to go on ('' at the end).
-- keys: log, dead; args: subscription, limit, from, then the ids that are meant (none: any)
register('replay', function(keys, args)
  local log, dead = unpack(keys)
  local subscription, limit = args[1], tonumber(args[2])
  local wanted = #args == 3
  local meant = {}
  for i = 4, #args do meant[args[i]] = true end
  local number = 0
  local page = redis.call('XRANGE', dead, args[3], '+', 'COUNT', STEP)
  for _, entry in ipairs(page) do
    local fields = entry[2]
    local again, id = {}, nil
    -- Behind reason, attempts and entry stands what the message was made of.
    for i = 7, #fields, 2 do
      if fields[i] == 'id' then id = fields[i + 1] end
      if fields[i] ~= 'only' then
        again[#again + 1] = fields[i]
        again[#again + 1] = fields[i + 1]
      end
    end
    if number == limit then return {number, ''} end
    if wanted or meant[id] then
      again[#again + 1] = 'only'
      again[#again + 1] = subscription
      redis.call('XADD', log, '*', unpack(again))
      redis.call('XDEL', dead, entry[1])
      number = number + 1
    end
  end
  return {number, #page == STEP and '(' .. page[STEP][1] or ''}
end)

-- Remove a subscription that nobody consumes. Returns 1; 0 where there is none; less: how
-- many consume it.
-- keys: log, info, later, tries, wake, dead, members; args: group
register('remove', function(keys, args)
  local log, info, later, tries, wake, dead, members = unpack(keys)
  local group = args[1]
  if not groups_of(log)[group] then return 0 end
  local number = redis.call('ZCOUNT', members, text(now_ms()), '+inf')
  if number > 0 then return -number end
  redis.call('XGROUP', 'DESTROY', log, group)
  redis.call('HDEL', info, 'lease:' .. group)
  redis.call('UNLINK', later, tries, wake, dead, members)
  return 1
end, {'allow-oom'})
