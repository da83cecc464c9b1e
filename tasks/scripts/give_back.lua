-- Return messages that an incarnation holds (or has lost sight of) to their queues, or to the dead letters.
-- KEYS: 1 unacknowledged records, 2 started marks, 3 dead letters. ARGV: 1 prefix of bells, 2 'queue' or 'dead', 3.. tags, newest first.
-- Returns how many were moved.
local moved = 0
for at = 3, #ARGV do
  local record = redis.call('HGET', KEYS[1], ARGV[at])
  if record then
    redis.call('HDEL', KEYS[1], ARGV[at])
    redis.call('HDEL', KEYS[2], ARGV[at])
    local cut = string.find(record, '\n', 1, true)
    if ARGV[2] == 'queue' and cut then
      local queue = string.sub(record, 1, cut - 1)
      redis.call('RPUSH', queue, string.sub(record, cut + 1))
      if redis.call('EXISTS', ARGV[1] .. queue) == 0 then redis.call('RPUSH', ARGV[1] .. queue, '1') end
    else
      redis.call('LPUSH', KEYS[3], cjson.encode({queue = cut and string.sub(record, 1, cut - 1) or '', raw = cut and string.sub(record, cut + 1) or record, reason = 'refused'}))
    end
    moved = moved + 1
  end
end
return moved
