-- Admit and publish requests, all that one process publishes in one round trip. Each stands or falls alone, in order.
-- KEYS: 1 open tasks, then four a message: queue, and the sets of its model, of its tenant in this lane, of its queue.
-- ARGV: 1 messages a queue may hold, 2 prefix of bells, 3 prefix of the sets by tenant, 4 by queue, 5 prefix of token
--       clocks, 6 lanes, most urgent first, in one text, 7 seconds a set is kept untouched, then 13 fields a message:
--   task id, score in the open tasks, raw message, body key ('' if inline), task record ('' if synchronous),
--   seconds the record is kept, then of the record: model, operation, deadline, tenant; then
--   limits ('' if none, else five numbers, 0 for none: open tasks of the model, of the tenant, of the tenant in this
--   lane, its tokens a minute, tokens of this request),
--   pace ('' if unknown, else: seconds the request may wait, seconds a request of this queue takes the whole farm, how
--   many times its own the tenant waits for others, the least share of the farm that its lane has as 'one of so many'
--   (0: none), seconds a request takes of each more urgent lane),
--   at last '' or, of a request under an idempotency key, three words: the key's place, the fingerprint, and what may
--   stand there to be replaced.
-- Returns one text a message: 'ok', or why not, and a number: 'queue', 'model', 'tenant', 'lane' (full), 'tokens <s>'
-- (none left for so long), 'wait <s>' (it would take so long), 'bodyless' (its body was not kept),
-- or 'taken ' and what stands under its idempotency key.
-- Counts leave out what is overdue, on Redis' own clock. Nothing is written before the first ZADD: a full Redis refuses
-- that one, and whatever follows a write is let through.
local FIELDS, FIRST, ONCE_S = 13, 8, 86400
local BY_TENANT, BY_QUEUE, CLOCKS = ARGV[3], ARGV[4], ARGV[5]
local LANES = {}
for lane in string.gmatch(ARGV[6], '%S+') do LANES[#LANES + 1] = lane end
local MINUTE = 60

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local NOW = string.format('%.6f', now)

local counts, lengths, touched = {}, {}, {}
local function open_in(key)
  if not counts[key] then counts[key] = redis.call('ZCOUNT', key, NOW, '+inf') end
  return counts[key]
end

local function numbers(text)
  local found = {}
  for one in string.gmatch(text, '%S+') do found[#found + 1] = tonumber(one) end
  return found
end

-- The generic cell rate algorithm: at most a minute's tokens at once, and any request when nothing is owed.
local function token_clock(tenant)
  return math.max(now, tonumber(redis.call('GET', CLOCKS .. tenant) or now))
end

local function over_limit(tenant, model_set, tenant_set, limits)
  local of_model, of_tenant, of_lane, per_minute, tokens = unpack(limits)
  if of_model > 0 and open_in(model_set) >= of_model then return 'model' end
  if of_lane > 0 and open_in(tenant_set) >= of_lane then return 'lane' end
  if of_tenant > 0 then
    local open = 0
    for _, lane in ipairs(LANES) do open = open + open_in(BY_TENANT .. tenant .. ':' .. lane) end
    if open >= of_tenant then return 'tenant' end
  end
  if per_minute > 0 then
    local clock = token_clock(tenant)
    local late = clock + tokens * MINUTE / per_minute - MINUTE - now
    if clock > now and late > 0 then
      return 'tokens ' .. string.format('%.3f', math.min(late, clock - now))
    end
  end
end

-- Seconds until the request would be answered: what is before it, and itself, at the measured pace.
local function wait_s(queue, tenant_set, queue_set, length, pace)
  local own_s, others, least = pace[2], pace[3], pace[4]
  local held = math.max(0, open_in(queue_set) - length)
  local ahead = length + math.min(held, open_in(tenant_set) * others)
  local own = (ahead + 1) * own_s
  local stem = string.match(queue, '^(.*%.)') or ''
  local wait = own
  for i = 5, #pace do wait = wait + open_in(BY_QUEUE .. stem .. LANES[i - 4]) * pace[i] end
  if least > 0 then wait = math.min(wait, own * least) end
  return wait
end

local function refusal(queue, length, sets, fields)
  if length >= tonumber(ARGV[1]) then return 'queue' end
  if fields.limits then
    local over = over_limit(fields.tenant, sets[1], sets[2], fields.limits)
    if over then return over end
  end
  if fields.pace then
    local wait = wait_s(queue, sets[2], sets[3], length, fields.pace)
    if wait > fields.pace[1] then return 'wait ' .. string.format('%.3f', wait) end
  end
  if fields.body ~= '' and redis.call('EXISTS', fields.body) == 0 then return 'bodyless' end
end

local answers = {}
for at = FIRST, #ARGV, FIELDS do
  local key = 2 + 4 * #answers
  local queue, sets = KEYS[key], {KEYS[key + 1], KEYS[key + 2], KEYS[key + 3]}
  local id, score, raw, record = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 4]
  local fields = {body = ARGV[at + 3], tenant = ARGV[at + 9]}
  if ARGV[at + 10] ~= '' then fields.limits = numbers(ARGV[at + 10]) end
  if ARGV[at + 11] ~= '' then fields.pace = numbers(ARGV[at + 11]) end
  local length = lengths[queue] or redis.call('LLEN', queue)
  local once, fingerprint, replaced = string.match(ARGV[at + 12], '^(%S+) (%S+) (%S*)$')
  local taken = once and redis.call('GET', once)
  local answer
  if taken and taken ~= replaced then
    answer = 'taken ' .. taken
  else
    answer = refusal(queue, length, sets, fields)
  end
  if not answer then
    redis.call('ZADD', KEYS[1], score, id)
    for _, set in ipairs(sets) do
      redis.call('ZADD', set, score, id)
      if counts[set] then counts[set] = counts[set] + 1 end
      touched[set] = true
    end
    if fields.limits and fields.limits[4] > 0 then
      local paid = token_clock(fields.tenant) + fields.limits[5] * MINUTE / fields.limits[4]
      redis.call('SET', CLOCKS .. fields.tenant, string.format('%.6f', paid))
      redis.call('EXPIRE', CLOCKS .. fields.tenant, math.ceil(paid - now) + MINUTE)
    end
    if record ~= '' then
      redis.call('HSET', record, 'state', 'queued', 'model', ARGV[at + 6], 'operation', ARGV[at + 7],
        'deadline', ARGV[at + 8], 'tenant', fields.tenant, 'queue', queue, 'submitted', NOW)
      redis.call('EXPIRE', record, ARGV[at + 5])
    end
    if once then redis.call('SET', once, fingerprint .. ':' .. id, 'EX', ONCE_S) end
    length = redis.call('LPUSH', queue, raw)
  elseif fields.body ~= '' then
    redis.call('DEL', fields.body)
  end
  lengths[queue] = length
  answers[#answers + 1] = answer or 'ok'
end
for set in pairs(touched) do
  redis.call('ZREMRANGEBYSCORE', set, '-inf', '(' .. NOW)
  redis.call('EXPIRE', set, ARGV[7])
end
for queue in pairs(lengths) do
  if redis.call('EXISTS', ARGV[2] .. queue) == 0 and redis.call('EXISTS', queue) == 1 then
    redis.call('RPUSH', ARGV[2] .. queue, '1')
  end
end
return answers
