-- The Redis ledger's functions: each is one campaign, atomically.
--
-- KEYS[1] is what all keys of the campaign begin with, its name as the hash tag, so that
-- they lie on one node of a cluster: "molva:{lectures}:". Behind it stand
--
--   campaign         hash: seq, corrected (seq of the last correction), and of the campaign
--                    as a whole count, sum, d_count, d_sum (trusted less raw)
--   items            hash: item -> "count sum d_count d_sum"
--   log              list: the last entries, each packed as LOG, the item, the words
--   amended          hash: seq of a rating -> "rate retracted excluded"
--   ids:<n>          hash: id -> "e" hash seq of an entry, "n" hash of what had no effect;
--                    one for each stretch of time, gone when all of it is old enough
--   hours:<day>      hash: "<hour>/n" and "/s", count and sum; "<hour>/n/<item>" likewise
--
-- and for each scope, which is ":" and an item, or nothing for the campaign as a whole:
--
--   ring<scope>      string: the last ratings, each packed as RECORD, at position % SLOTS
--   rates<scope>     hash: rate -> how many, raw
--   shift<scope>     hash: rate -> how many more or fewer are trusted
--   net<scope>       hash: position -> "d_count d_sum" of a corrected rating
--
-- A function reads everything first and writes at its end: Redis takes nothing back, so
-- what could fail has to fail before the first write.

local RECORD = '>I6i8'          -- seq, running sum
local RECORD_BYTES = 14
local LOG = '>I6I6I6I6i4BI2'    -- seq, campaign's position, item's, target's seq, rate, kind, #item
local LOG_BYTES = 31

-- Kinds of entries, as in _schema.py.
local RATING, CHANGE, RETRACTION, COMMENT, EXCLUSION, RESTORATION = 0, 1, 2, 3, 4, 5

-- Stretches of time in one horizon. More, and each look for an id takes longer; fewer, and
-- ids are kept for longer than they have to be: one stretch at most.
local STRETCHES = 4

-- Words that one command takes here: Lua's stack has 8,000.
local WORDS = 2000

-- Seconds that hours are kept: 92 days.
local HOURS_KEPT = 92 * 86400

local function whole_number(value)
    return string.format('%.0f', value)
end

-- ------------------------------------------------------------------------- reading

local function read_campaign(prefix)
    local found = redis.call('HMGET', prefix .. 'campaign',
        'seq', 'corrected', 'count', 'sum', 'd_count', 'd_sum')
    for i = 1, 6 do
        found[i] = tonumber(found[i] or 0)
    end
    return {
        seq = found[1], corrected = found[2],
        whole = {
            name = '', count = found[3], sum = found[4], d_count = found[5], d_sum = found[6],
            first_count = found[3], first_sum = found[4],
        },
    }
end

local function read_item(prefix, item)
    local found = redis.call('HGET', prefix .. 'items', item)
    local scope = {name = ':' .. item, item = item, count = 0, sum = 0, d_count = 0, d_sum = 0}
    if found then
        local count, sum, d_count, d_sum = string.match(found, '^(%S+) (%S+) (%S+) (%S+)$')
        scope.count, scope.sum = tonumber(count), tonumber(sum)
        scope.d_count, scope.d_sum = tonumber(d_count), tonumber(d_sum)
    end
    scope.first_count, scope.first_sum = scope.count, scope.sum
    return scope
end

local function record_at(prefix, scope, position, slots)
    local at = position % slots * RECORD_BYTES
    local packed = redis.call(
        'GETRANGE', prefix .. 'ring' .. scope.name, at, at + RECORD_BYTES - 1)
    return struct.unpack(RECORD, packed)
end

local function sum_at(prefix, scope, position, slots)
    if position == 0 then
        return 0
    end
    local _, sum = record_at(prefix, scope, position, slots)
    return sum
end

-- Known ids, in one look for each stretch of time that is not over.
local function look_up(prefix, ids, stretch, known)
    for n = stretch, stretch - STRETCHES, -1 do
        for from = 1, #ids, WORDS do
            local upto = math.min(from + WORDS - 1, #ids)
            local found = redis.call('HMGET', prefix .. 'ids:' .. n, unpack(ids, from, upto))
            for i = 1, #found do
                local id = ids[from + i - 1]
                if found[i] and not known[id] then
                    known[id] = found[i]
                end
            end
        end
    end
end

-- ------------------------------------------------------------------------- writing

local Batch = {}
Batch.__index = Batch

local function begin(prefix, window, stretch)
    local campaign = read_campaign(prefix)
    return setmetatable({
        prefix = prefix, window = window, slots = window + 1,
        stretch = stretch, campaign = campaign, first_seq = campaign.seq, items = {},
        known = {}, log = {}, news = {}, amended = {}, nets = {}, shifts = {}, rates = {},
        rings = {},
    }, Batch)
end

function Batch:item(name)
    local scope = self.items[name]
    if not scope then
        scope = read_item(self.prefix, name)
        self.items[name] = scope
    end
    return scope
end

function Batch:append(kind, item, item_position, target_seq, rate, body)
    local campaign = self.campaign
    campaign.seq = campaign.seq + 1
    self.log[#self.log + 1] = struct.pack(LOG, campaign.seq, campaign.whole.count, item_position,
        target_seq, rate, kind, #item) .. item .. body
    return campaign.seq
end

local function add(table, key, name, number)
    local of = table[key]
    if not of then
        of = {}
        table[key] = of
    end
    of[name] = (of[name] or 0) + number
end

function Batch:count(scope, rate, seq)
    scope.count = scope.count + 1
    scope.sum = scope.sum + rate
    add(self.rates, scope.name, rate, 1)
    local ring = self.rings[scope.name]
    if not ring then
        ring = {}
        self.rings[scope.name] = ring
    end
    -- Runs of records that lie side by side are written as one.
    local slot = scope.count % self.slots
    local run = ring[#ring]
    if not run or slot == 0 then
        run = {slot = slot}
        ring[#ring + 1] = run
    end
    run[#run + 1] = struct.pack(RECORD, seq, scope.sum)
end

function Batch:rate(submission)
    local item, rate = self:item(submission.item), submission.rate
    -- The row of a rating holds its own position.
    self.campaign.whole.count = self.campaign.whole.count + 1
    local seq = self:append(RATING, item.item, item.count + 1, 0, rate, submission.body)
    self.campaign.whole.count = self.campaign.whole.count - 1
    self:count(self.campaign.whole, rate, seq)
    self:count(item, rate, seq)
    if submission.comment ~= '' then
        self:append(COMMENT, '', 0, seq, 0, submission.comment)
    end
    return seq
end

-- The rating of an id: nil where the campaign has none, false where it is no longer kept.
function Batch:target(id)
    local value = self.known[id]
    if not value or string.sub(value, 1, 1) ~= 'e' then
        return nil
    end
    local seq = struct.unpack('>I6', value, 10)
    if seq <= self.campaign.seq - self.window then
        return false
    end
    local packed
    if seq > self.first_seq then
        packed = self.log[seq - self.first_seq]
    else
        packed = redis.call('LINDEX', self.prefix .. 'log', seq - self.first_seq - 1)
    end
    if not packed then
        return false
    end
    local _, position, item_position, _, rate, kind, length = struct.unpack(LOG, packed)
    if kind ~= RATING then
        return nil
    end
    return {
        seq = seq, position = position, item_position = item_position, rate = rate,
        item = string.sub(packed, LOG_BYTES + 1, LOG_BYTES + length),
    }
end

function Batch:state(target)
    local state = self.amended[target.seq]
    if not state then
        local found = redis.call('HGET', self.prefix .. 'amended', target.seq)
        if found then
            local rate, retracted, excluded = string.match(found, '^(%S+) (%S+) (%S+)$')
            state = {tonumber(rate), tonumber(retracted), tonumber(excluded)}
        else
            state = {target.rate, 0, 0}
        end
    end
    return state
end

local function contribution(state)
    if state[2] + state[3] > 0 then
        return nil
    end
    return state[1]
end

function Batch:correct(scope, position, before, after)
    local d_count = (after and 1 or 0) - (before and 1 or 0)
    local d_sum = (after or 0) - (before or 0)
    scope.d_count = scope.d_count + d_count
    scope.d_sum = scope.d_sum + d_sum
    if before then
        add(self.shifts, scope.name, before, -1)
    end
    if after then
        add(self.shifts, scope.name, after, 1)
    end
    local nets = self.nets[scope.name]
    if not nets then
        nets = {}
        self.nets[scope.name] = nets
    end
    if not nets[position] then
        local found = redis.call('HGET', self.prefix .. 'net' .. scope.name, position)
        local count, sum = string.match(found or '0 0', '^(%S+) (%S+)$')
        nets[position] = {tonumber(count), tonumber(sum)}
    end
    nets[position] = {nets[position][1] + d_count, nets[position][2] + d_sum}
end

-- Returns the letter of the outcome; see _OUTCOMES in redis.py.
function Batch:apply_to_rating(submission)
    local id, kind = submission.id, submission.kind
    local value = self.known[id]
    if value then -- nothing came of it before
        return string.sub(value, 2, 9) == submission.hash and 'E' or 'C'
    end
    local target = self:target(submission.target)
    if target == nil then
        return 'N'
    elseif target == false then
        return 'O'
    end
    if kind == COMMENT then
        self:remember(id, 'e', submission.hash, self:append(kind, '', 0, target.seq, 0, submission.body))
        return 'A'
    end
    local before = self:state(target)
    local after = {before[1], before[2], before[3]}
    if kind == CHANGE then
        after[1] = submission.rate
    elseif kind == RETRACTION then
        after[2] = 1
    else
        after[3] = kind == EXCLUSION and 1 or 0
    end
    -- What was retracted is taken back for good.
    if before[2] == 1
        or (before[1] == after[1] and before[2] == after[2] and before[3] == after[3]) then
        self:remember(id, 'n', submission.hash, 0)
        return 'E'
    end
    local seq = self:append(kind, '', 0, target.seq, submission.rate, submission.body)
    self:remember(id, 'e', submission.hash, seq)
    self.amended[target.seq] = after
    local rate_before, rate_after = contribution(before), contribution(after)
    if rate_before ~= rate_after then
        self.campaign.corrected = seq
        self:correct(self.campaign.whole, target.position, rate_before, rate_after)
        self:correct(self:item(target.item), target.item_position, rate_before, rate_after)
    end
    return 'A'
end

function Batch:remember(id, what, hash, seq)
    local value = what .. hash .. struct.pack('>I6', seq)
    self.known[id] = value
    self.news[#self.news + 1] = id
    self.news[#self.news + 1] = value
end

local function push(command, key, words)
    for from = 1, #words, WORDS do
        redis.call(command, key, unpack(words, from, math.min(from + WORDS - 1, #words)))
    end
end

function Batch:write(width, hour)
    local prefix, campaign = self.prefix, self.campaign
    if #self.news == 0 then
        return
    end
    local ids = prefix .. 'ids:' .. self.stretch
    push('HSET', ids, self.news)
    redis.call('EXPIREAT', ids, (self.stretch + STRETCHES + 1) * width)
    if #self.log == 0 then
        return
    end
    local whole = campaign.whole
    redis.call('HSET', prefix .. 'campaign', 'seq', whole_number(campaign.seq),
        'corrected', whole_number(campaign.corrected),
        'count', whole_number(whole.count), 'sum', whole_number(whole.sum),
        'd_count', whole_number(whole.d_count), 'd_sum', whole_number(whole.d_sum))
    local words = {}
    for name, scope in pairs(self.items) do
        words[#words + 1] = name
        words[#words + 1] = whole_number(scope.count) .. ' ' .. whole_number(scope.sum) .. ' '
            .. whole_number(scope.d_count) .. ' ' .. whole_number(scope.d_sum)
    end
    push('HSET', prefix .. 'items', words)
    push('RPUSH', prefix .. 'log', self.log)
    redis.call('LTRIM', prefix .. 'log', -self.window, -1)
    for scope, runs in pairs(self.rings) do
        for _, run in ipairs(runs) do
            redis.call('SETRANGE', prefix .. 'ring' .. scope, run.slot * RECORD_BYTES,
                table.concat(run))
        end
    end
    for scope, rates in pairs(self.rates) do
        for rate, number in pairs(rates) do
            redis.call('HINCRBY', prefix .. 'rates' .. scope, rate, number)
        end
    end
    for scope, rates in pairs(self.shifts) do
        for rate, number in pairs(rates) do
            if number ~= 0
                and redis.call('HINCRBY', prefix .. 'shift' .. scope, rate, number) == 0 then
                redis.call('HDEL', prefix .. 'shift' .. scope, rate)
            end
        end
    end
    self:write_corrections()
    self:write_hour(hour)
end

-- All of a batch was applied in one hour.
function Batch:write_hour(hour)
    local day = math.floor(hour / 24)
    local key = self.prefix .. 'hours:' .. day
    local function count(scope, suffix)
        if scope.count > scope.first_count then
            redis.call('HINCRBY', key, hour % 24 .. '/n' .. suffix, scope.count - scope.first_count)
            redis.call('HINCRBY', key, hour % 24 .. '/s' .. suffix, scope.sum - scope.first_sum)
        end
    end
    count(self.campaign.whole, '')
    for name, scope in pairs(self.items) do
        count(scope, '/' .. name)
    end
    redis.call('EXPIREAT', key, (day + 1) * 86400 + HOURS_KEPT)
end

-- Corrections of ratings that are no longer kept one by one are dropped now and then: their
-- sums stay, in d_count, d_sum and shift.
local function sweep(key, floor, window)
    if redis.call('HLEN', key) <= window then
        return
    end
    local old = {}
    for _, name in ipairs(redis.call('HKEYS', key)) do
        if tonumber(name) <= floor then
            old[#old + 1] = name
        end
    end
    push('HDEL', key, old)
end

function Batch:write_corrections()
    local prefix = self.prefix
    for seq, state in pairs(self.amended) do
        redis.call('HSET', prefix .. 'amended', seq, table.concat(state, ' '))
    end
    sweep(prefix .. 'amended', self.campaign.seq - self.window, self.window)
    for scope, nets in pairs(self.nets) do
        local key = prefix .. 'net' .. scope
        for position, net in pairs(nets) do
            if net[1] == 0 and net[2] == 0 then
                redis.call('HDEL', key, position)
            else
                redis.call('HSET', key, position, net[1] .. ' ' .. net[2])
            end
        end
        local of = scope == '' and self.campaign.whole or self.items[string.sub(scope, 2)]
        sweep(key, of.count - self.window, self.window)
    end
end

-- One submission: SUBMISSION, then item, rating that it is about, words, words of the comment.
local SUBMISSION = '>c16Bic8I2I2I4'     -- id, kind, rate, hash of its content, #item, #target, #body
local SUBMISSION_BYTES = 37

local function unpacked(packed)
    local id, kind, rate, hash, item, target, body = struct.unpack(SUBMISSION, packed)
    local at = SUBMISSION_BYTES + item
    return {
        id = id, kind = kind, rate = rate, hash = hash,
        item = string.sub(packed, SUBMISSION_BYTES + 1, at),
        target = string.sub(packed, at + 1, at + target),
        body = string.sub(packed, at + target + 1, at + target + body),
        comment = string.sub(packed, at + target + body + 1),
    }
end

-- apply(applied_at_us, window, horizon, submission, …): a letter for each submission.
local function apply(keys, args)
    local horizon = tonumber(args[3])
    local width = math.ceil(horizon / STRETCHES)
    -- The server's own clock: those of the workers differ.
    local stretch = math.floor(tonumber(redis.call('TIME')[1]) / width)
    local batch = begin(keys[1], tonumber(args[2]), stretch)
    local submissions, ids = {}, {}
    for i = 4, #args do
        local submission = unpacked(args[i])
        submissions[#submissions + 1] = submission
        ids[#ids + 1] = submission.id
        if submission.target ~= '' then
            ids[#ids + 1] = submission.target
        end
    end
    look_up(keys[1], ids, stretch, batch.known)
    local outcomes = {}
    for i, submission in ipairs(submissions) do
        local value = batch.known[submission.id]
        if value and string.sub(value, 1, 1) == 'e' then
            outcomes[i] = string.sub(value, 2, 9) == submission.hash and 'D' or 'C'
        elseif submission.kind == RATING then
            batch:remember(submission.id, 'e', submission.hash, batch:rate(submission))
            outcomes[i] = 'A'
        else
            outcomes[i] = batch:apply_to_rating(submission)
        end
    end
    batch:write(width, math.floor(tonumber(args[1]) / 3.6e9))
    return table.concat(outcomes)
end

-- ------------------------------------------------------------------------- totals

-- Where the window of n ratings that count begins: the position behind which it starts, and
-- the sum of the corrections in it. Walks back from corrected rating to corrected rating.
local function window_start(prefix, scope, raw, n)
    local found = redis.call('HGETALL', prefix .. 'net' .. scope.name)
    local nets = {}
    for i = 1, #found, 2 do
        local position = tonumber(found[i])
        if position <= raw then
            local count, sum = string.match(found[i + 1], '^(%S+) (%S+)$')
            nets[#nets + 1] = {position, tonumber(count), tonumber(sum)}
        end
    end
    table.sort(nets, function(one, other) return one[1] > other[1] end)
    local position, have, d_sum = raw, 0, 0
    for _, net in ipairs(nets) do
        if have + position - net[1] >= n then
            break
        end
        have = have + position - net[1] + 1 + net[2]
        d_sum = d_sum + net[3]
        position = net[1] - 1
        if have == n then
            return position, d_sum
        end
    end
    return position - (n - have), d_sum
end

-- The rates that came behind a position, which is kept: rate -> how many.
local function rates_since(prefix, scope, position, slots)
    local rates = {}
    local sum = sum_at(prefix, scope, position, slots)
    local at = position + 1
    while at <= scope.count do
        local slot = at % slots
        local run = math.min(scope.count - at + 1, slots - slot)
        local packed = redis.call('GETRANGE', prefix .. 'ring' .. scope.name,
            slot * RECORD_BYTES, (slot + run) * RECORD_BYTES - 1)
        for i = 0, run - 1 do
            local _, next_sum = struct.unpack(RECORD, packed, i * RECORD_BYTES + 1)
            local rate = next_sum - sum
            rates[rate] = (rates[rate] or 0) + 1
            sum = next_sum
        end
        at = at + run
    end
    return rates
end

-- total(item, is_item, n, as_of, trusted, window): sum, n, count, as_of, rate, how many, …;
-- nothing where there is nothing to average; one word where it is not kept. as_of -1: now.
local function total(keys, args)
    local prefix, item, n = keys[1], args[1], tonumber(args[3])
    local trusted, window = args[5] == '1', tonumber(args[6])
    local slots = window + 1
    local campaign = read_campaign(prefix)
    local scope = args[2] == '1' and read_item(prefix, item) or campaign.whole
    local at = tonumber(args[4])
    if at < 0 and args[4] == '-1' or at > campaign.seq then
        at = campaign.seq
    end
    if at <= 0 or scope.count == 0 then
        return false
    end
    local raw, sum = scope.count, scope.sum
    local kept = math.max(0, scope.count - window) -- sums behind this position are known
    local old = at < campaign.seq
    if old then
        local low, high = kept, raw
        if kept > 0 and record_at(prefix, scope, kept, slots) > at then
            return {'window'}
        end
        while low < high do
            local middle = math.ceil((low + high) / 2)
            if record_at(prefix, scope, middle, slots) <= at then
                low = middle
            else
                high = middle - 1
            end
        end
        raw = low
        if raw == 0 then
            return false
        end
        if trusted and campaign.corrected > at then
            return {'corrected'}
        end
        sum = sum_at(prefix, scope, raw, slots)
    end
    local count = raw
    if trusted then
        count = count + scope.d_count
        sum = sum + scope.d_sum
    end
    if count == 0 then
        return false
    end
    if n < count then
        local start, d_sum = raw - n, 0
        if trusted and redis.call('EXISTS', prefix .. 'net' .. scope.name) == 1 then
            start, d_sum = window_start(prefix, scope, raw, n)
        end
        if start < kept then
            return {'window'}
        end
        sum = sum_at(prefix, scope, raw, slots) - sum_at(prefix, scope, start, slots) + d_sum
    end
    local later = old and rates_since(prefix, scope, raw, slots) or {}
    local reply = {whole_number(sum), math.min(n, count), count, at}
    local shift = {}
    if trusted then
        local found = redis.call('HGETALL', prefix .. 'shift' .. scope.name)
        for i = 1, #found, 2 do
            shift[tonumber(found[i])] = tonumber(found[i + 1])
        end
    end
    local found = redis.call('HGETALL', prefix .. 'rates' .. scope.name)
    for i = 1, #found, 2 do
        local rate = tonumber(found[i])
        local number = tonumber(found[i + 1]) - (later[rate] or 0) + (shift[rate] or 0)
        shift[rate] = nil
        if number ~= 0 then
            reply[#reply + 1] = rate
            reply[#reply + 1] = number
        end
    end
    for rate, number in pairs(shift) do -- rates that only a change has given
        if number ~= 0 then
            reply[#reply + 1] = rate
            reply[#reply + 1] = number
        end
    end
    return reply
end

-- entries(since_seq, limit): the last sequence number, then packed entries after since_seq.
local function entries(keys, args)
    local seq = tonumber(redis.call('HGET', keys[1] .. 'campaign', 'seq') or 0)
    local since, limit = tonumber(args[1]), tonumber(args[2])
    local length = redis.call('LLEN', keys[1] .. 'log')
    local first = since - (seq - length) -- how many kept ones come before
    if first < 0 then
        return {seq}
    end
    local found = redis.call('LRANGE', keys[1] .. 'log', first, first + limit - 1)
    table.insert(found, 1, seq)
    return found
end

-- audit(scope): what the ledger keeps of one scope, as it stands at one moment.
local function audit(keys, args)
    local prefix, name = keys[1], args[1]
    return {
        redis.call('HGETALL', prefix .. 'campaign'),
        name == '' and redis.call('HVALS', prefix .. 'items')
            or {redis.call('HGET', prefix .. 'items', string.sub(name, 2))},
        redis.call('GET', prefix .. 'ring' .. name) or '',
        redis.call('HGETALL', prefix .. 'rates' .. name),
        redis.call('HGETALL', prefix .. 'shift' .. name),
        redis.call('HGETALL', prefix .. 'net' .. name),
        name == '' and redis.call('LRANGE', prefix .. 'log', 0, -1) or {},
    }
end

register('apply', apply)
register('total', total, {'no-writes'})
register('entries', entries, {'no-writes'})
register('audit', audit, {'no-writes'})
