"""What Redis does for budgets, each script in one step.

Where things lie, all under the hash tag `{budget}`:

    lives                  hash: replica id -> the life that last told everything it knows
    epoch                  server time at which the state began; a new one: Redis lost it all meanwhile
    <budget>:<period>      hash of an account: `s:<replica>` spent, `r:<replica>` set aside, in micro-dollars
    open:<replica>         hash: attempt id -> {"microusd", "accounts", "state": "reserved" or "sent"}
    upstreams:<month>      hash: `<replica>:<upstream>` -> what was paid
    limits                 hash: budget -> the limit an operator set
    periods                sorted set: the name of each account by the end of its period
    replicas               sorted set: replica id by when it last showed itself (see `Replicas`)

A replica alone writes its own fields, so it can write them anew from what it knows, and nothing counts twice.
KEYS[1] is always `lives`; ARGV[1] the replica, ARGV[2] its life. Answers begin with a word.
"""

# Redis does not know this life (any more): it was emptied, others took us for dead, or we have doubts ourselves. What
# is late from an earlier life changes nothing: its replica has told, or will tell, everything at once.
_KNOWN = """
local known = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if known ~= ARGV[2] then return {'stranger', known} end
"""

# What all replicas together, and this one alone, have spent and set aside in an account.
_SUMS = """
local function sums(account)
  local total = {s = 0, r = 0}
  local fields = redis.call('HGETALL', account)
  for i = 1, #fields, 2 do
    local kind = string.sub(fields[i], 1, 1)
    total[kind] = total[kind] + tonumber(fields[i + 1])
  end
  local own_spent = tonumber(redis.call('HGET', account, 's:' .. ARGV[1]) or 0)
  local own_reserved = tonumber(redis.call('HGET', account, 'r:' .. ARGV[1]) or 0)
  return total.s, total.r, own_spent, own_reserved
end
"""

# A replica is gone: what it set aside is free again, what it sent counts as spent, for nobody knows what it cost.
# (0 - x and not -x: some servers write the negative of nothing as "-0", and then refuse to read it.)
# The accounts' names come from values; they carry our hash tag, so they are on this server.
_BURY = """
local function bury(replica, open)
  for _, text in ipairs(redis.call('HVALS', open)) do
    local reservation = cjson.decode(text)
    for _, account in ipairs(reservation.accounts) do
      redis.call('HINCRBY', account, 'r:' .. replica, 0 - reservation.microusd)
      if reservation.state == 'sent' then
        redis.call('HINCRBY', account, 's:' .. replica, reservation.microusd)
      end
    end
  end
  redis.call('DEL', open)
end
"""

TELL = (
    _BURY
    + """
-- Everything this replica knows, over what Redis knows of it. ARGV[3]: the new life, ARGV[4]: the knowledge.
-- ARGV[2] is the life that we think Redis knows: a telling that was overtaken by a later one changes nothing.
-- ARGV[5] is the epoch in which we set aside what we know of, or nothing: a Redis that still is in it and does not
-- know us has buried us, and what we had not sent is no longer set aside.
local lives, open, epoch, periods, replicas, limits = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local known = redis.call('HGET', lives, ARGV[1]) or ''
if known ~= ARGV[2] then return {'stranger', known} end
if known == '' and ARGV[5] ~= '' and redis.call('GET', epoch) == ARGV[5] then return {'buried'} end
local time = redis.call('TIME')
local now = tonumber(time[1])
local all = cjson.decode(ARGV[4])

bury(ARGV[1], open)
for _, account in ipairs(all.accounts) do
  redis.call('HSET', account.name, 's:' .. ARGV[1], account.spent, 'r:' .. ARGV[1], account.reserved)
  redis.call('ZADD', periods, account.end_s, account.name)
  -- Only where it was lost: those who still run tell it themselves, for the others nobody else would.
  for replica, spent in pairs(account.others) do redis.call('HSETNX', account.name, 's:' .. replica, spent) end
end
for id, reservation in pairs(all.open) do redis.call('HSET', open, id, reservation) end
for _, month in ipairs(all.paid) do
  for upstream, microusd in pairs(month.upstreams) do
    redis.call('HSET', month.name, ARGV[1] .. ':' .. upstream, microusd)
  end
  redis.call('ZADD', periods, month.end_s, month.name)
end
-- Only where it was lost: an operator may have set another one since.
for budget, limit in pairs(all.limits) do redis.call('HSETNX', limits, budget, limit) end

redis.call('SETNX', epoch, string.format('%d.%06d', time[1], time[2]))
redis.call('ZADD', replicas, now, ARGV[1])
redis.call('HSET', lives, ARGV[1], ARGV[3])
return {'done', now, redis.call('GET', epoch)}
"""
)

RESERVE = (
    _KNOWN
    + _SUMS
    + """
-- Set money aside in all accounts (KEYS[6] and on) or in none.
local open, limits, periods, epoch = KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local id, reservation, microusd, share = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local day_start, day_end, young_s = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local now = tonumber(redis.call('TIME')[1])
if now < day_start or now >= day_end then return {'period', now} end
-- A client that lost its connection sends the same again.
if redis.call('HEXISTS', open, id) == 1 then return {'done', now, {}} end

local is_young = now - tonumber(redis.call('GET', epoch) or now) < young_s
local refused, least, standing = 0, microusd, {}
for i = 6, #KEYS do
  local nth = i - 5
  local budget, limit = ARGV[6 + 4 * nth], ARGV[7 + 4 * nth]
  local others_were = tonumber(ARGV[9 + 4 * nth])
  limit = tonumber(redis.call('HGET', limits, budget) or limit)
  local spent, reserved, own_spent, own_reserved = sums(KEYS[i])
  local own = own_spent + own_reserved
  local others = spent + reserved - own
  -- Redis lost what it knew, and the others may not have told it yet: what we last saw of them still counts.
  if is_young then others = math.max(others, others_were) end
  local left = math.floor(limit * share) - own - others
  if left < least then refused, least = nth, left end
  standing[nth] = {limit, spent, reserved, own_spent, own_reserved}
end
if refused > 0 then return {'refused', now, standing, refused} end

for i = 6, #KEYS do
  local nth = i - 5
  redis.call('HINCRBY', KEYS[i], 'r:' .. ARGV[1], microusd)
  redis.call('ZADD', periods, ARGV[8 + 4 * nth], KEYS[i])
  standing[nth][3] = standing[nth][3] + microusd
  standing[nth][5] = standing[nth][5] + microusd
end
redis.call('HSET', open, id, reservation)
return {'done', now, standing}
"""
)

SENT = (
    _KNOWN
    + """
-- The reservation ARGV[3] is replaced by ARGV[4], which says that it was sent.
if redis.call('HEXISTS', KEYS[2], ARGV[3]) == 0 then return {'missing'} end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
return {'done'}
"""
)

CLOSE = (
    _KNOWN
    + """
-- The reservation ARGV[3] of ARGV[4] micro-dollars ends in all its accounts (KEYS[5] and on); ARGV[5] is spent,
-- at the upstream ARGV[6] if it has a name, in the month KEYS[4] that ends at ARGV[7].
local open, periods, month = KEYS[2], KEYS[3], KEYS[4]
if redis.call('HDEL', open, ARGV[3]) == 0 then return {'missing'} end
for i = 5, #KEYS do
  redis.call('HINCRBY', KEYS[i], 'r:' .. ARGV[1], 0 - tonumber(ARGV[4]))
  redis.call('HINCRBY', KEYS[i], 's:' .. ARGV[1], ARGV[5])
end
if ARGV[6] ~= '' then
  redis.call('HINCRBY', month, ARGV[1] .. ':' .. ARGV[6], ARGV[5])
  redis.call('ZADD', periods, ARGV[7], month)
end
return {'done'}
"""
)

LOOK = (
    _KNOWN
    + _SUMS
    + _BURY
    + """
-- How all accounts (KEYS[6] and on) stand and what the upstreams were paid in the month KEYS[5]; on the way, the
-- dead are buried and what ended ARGV[5] seconds ago is forgotten. ARGV[3] begins the names of open reservations,
-- ARGV[4] is how many seconds of silence mean death.
local limits, periods, replicas, month = KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now = tonumber(redis.call('TIME')[1])
redis.call('ZADD', replicas, now, ARGV[1])
for _, replica in ipairs(redis.call('HKEYS', KEYS[1])) do
  local seen = tonumber(redis.call('ZSCORE', replicas, replica) or 0)
  if replica ~= ARGV[1] and seen < now - tonumber(ARGV[4]) then
    bury(replica, ARGV[3] .. replica)
    redis.call('HDEL', KEYS[1], replica)
  end
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', periods, '-inf', now - tonumber(ARGV[5]), 'LIMIT', 0, 100)) do
  redis.call('DEL', name)
  redis.call('ZREM', periods, name)
end
local standing, parts = {}, {}
for i = 6, #KEYS do
  local nth = i - 5
  local limit = redis.call('HGET', limits, ARGV[4 + 2 * nth]) or ARGV[5 + 2 * nth]
  local spent, reserved, own_spent, own_reserved = sums(KEYS[i])
  standing[nth] = {tonumber(limit), spent, reserved, own_spent, own_reserved}
  parts[nth] = redis.call('HGETALL', KEYS[i])
end
return {'done', now, standing, redis.call('HGETALL', month), parts}
"""
)

SET_LIMIT = (
    _KNOWN
    + """
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
return {'done'}
"""
)
