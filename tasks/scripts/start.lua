-- Note that messages have been started. A synchronous task has no record: its score among the open tasks says it.
-- KEYS: 1 unacknowledged records, 2 started marks, 3 open tasks.
-- ARGV: three fields a message: tag, task id ('' if it was never admitted), task record ('' if none).
for at = 1, #ARGV, 3 do
  local tag, id, record = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  if redis.call('HEXISTS', KEYS[1], tag) == 1 then
    redis.call('HSET', KEYS[2], tag, '1')
    if record == '' then
      if id ~= '' then redis.call('ZADD', KEYS[3], 'XX', 'INCR', '0.5', id) end
    elseif redis.call('EXISTS', record) == 1 then
      redis.call('HSET', record, 'state', 'running')
    end
  end
end
return #ARGV / 3
