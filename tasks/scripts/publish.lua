-- Admit and publish requests, all that one process publishes in one round trip. Each stands or falls alone.
-- KEYS: 1 open tasks, then one queue a message.
-- ARGV: 1 messages a queue may hold, 2 prefix of bells, then 11 fields a message:
--   task id, score in the open tasks, raw message, body key ('' if inline), task record ('' if synchronous),
--   seconds the record is kept, then of the record: model, operation, deadline, tenant; at last '' or, of a request
--   under an idempotency key, three words: the key's place, the fingerprint, and what may stand there to be replaced.
-- Returns one text a message: 'ok', 'full' (the queue holds its limit), 'bodyless' (its body was not kept), or 'taken '
-- and what stands under its idempotency key.
-- Limits per model and tenant will be further sets among KEYS and further fields; their refusals, further texts.
local FIELDS, ONCE_S = 11, 86400
local limit = tonumber(ARGV[1])
local answers, lengths = {}, {}
local submitted
for at = 3, #ARGV, FIELDS do
  local queue = KEYS[#answers + 2]
  local id, score, raw, body, record = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local length = lengths[queue] or redis.call('LLEN', queue)
  local once, fingerprint, replaced = string.match(ARGV[at + 10], '^(%S+) (%S+) (%S*)$')
  local taken = once and redis.call('GET', once)
  local answer = 'ok'
  if taken and taken ~= replaced then
    answer = 'taken ' .. taken
  elseif length >= limit then
    answer = 'full'
  elseif body ~= '' and redis.call('EXISTS', body) == 0 then
    answer = 'bodyless'
  else
    redis.call('ZADD', KEYS[1], score, id)
    if record ~= '' then
      if not submitted then
        local now = redis.call('TIME')
        submitted = now[1] .. '.' .. string.format('%06d', now[2])
      end
      redis.call('HSET', record, 'state', 'queued', 'model', ARGV[at + 6], 'operation', ARGV[at + 7],
        'deadline', ARGV[at + 8], 'tenant', ARGV[at + 9], 'submitted', submitted)
      redis.call('EXPIRE', record, ARGV[at + 5])
    end
    if once then redis.call('SET', once, fingerprint .. ':' .. id, 'EX', ONCE_S) end
    length = redis.call('LPUSH', queue, raw)
  end
  if answer ~= 'ok' and body ~= '' then redis.call('DEL', body) end
  lengths[queue] = length
  answers[#answers + 1] = answer
end
for queue in pairs(lengths) do
  if redis.call('EXISTS', ARGV[2] .. queue) == 0 and redis.call('EXISTS', queue) == 1 then
    redis.call('RPUSH', ARGV[2] .. queue, '1')
  end
end
return answers
