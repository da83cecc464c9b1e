-- Admit and publish requests, all that one process publishes in one round trip. Each stands or falls alone.
-- KEYS: 1 open tasks, then one queue a message.
-- ARGV: 1 messages a queue may hold, 2 prefix of bells, then 10 fields a message:
--   task id, score in the open tasks, raw message, body key ('' if inline), task record ('' if synchronous),
--   seconds the record is kept, then of the record: model, operation, deadline, tenant.
-- Returns one text a message: 'ok', 'full' (the queue holds its limit), or 'bodyless' (its body was not kept).
-- Limits per model and tenant will be further sets among KEYS and further fields; their refusals, further texts.
local FIELDS = 10
local limit = tonumber(ARGV[1])
local answers, lengths = {}, {}
local submitted
for at = 3, #ARGV, FIELDS do
  local queue = KEYS[#answers + 2]
  local id, score, raw, body, record = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local length = lengths[queue] or redis.call('LLEN', queue)
  local answer = 'ok'
  if length >= limit then
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
    length = redis.call('LPUSH', queue, raw)
  end
  lengths[queue] = length
  answers[#answers + 1] = answer
end
for queue in pairs(lengths) do
  if redis.call('EXISTS', ARGV[2] .. queue) == 0 and redis.call('EXISTS', queue) == 1 then
    redis.call('RPUSH', ARGV[2] .. queue, '1')
  end
end
return answers
