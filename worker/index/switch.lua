-- Lets the generation being built answer, in one step, and retires the one that did.
--
-- ARGV[1]  the generation built
-- Returns  'switched', also when it was before; 'changed' when another one is being built

local built = string.match(ARGV[1], '^[^@]*')
if redis.call('HGET', KEYS[1], 'serving') == built then return 'switched' end
if redis.call('HGET', KEYS[1], 'building') ~= built then return 'changed' end
redis.call('HSET', KEYS[1], 'retired:' .. redis.call('HGET', KEYS[1], 'serving'), 1,
  'serving', built)
redis.call('HDEL', KEYS[1], 'building')
return 'switched'
