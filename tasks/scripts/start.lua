-- Mark messages as started by this incarnation, and asynchronous tasks as running. Nobody waits for the answer.
-- KEYS: 1 unacknowledged records, 2 started marks. ARGV: pairs of tag and task record ('' if none).
for at = 1, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[at]) == 1 then
    redis.call('HSET', KEYS[2], ARGV[at], '1')
    if ARGV[at + 1] ~= '' and redis.call('EXISTS', ARGV[at + 1]) == 1 then
      redis.call('HSET', ARGV[at + 1], 'state', 'running')
    end
  end
end
return #ARGV / 2
