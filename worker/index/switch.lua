-- Lets the generation being built answer, in one step, and retires the one that did.
--
-- ARGV[1]  the generation built
-- Returns  'switched', also when it was before; 'changed' when another one is being built

if redis.call('HGET', KEYS[1], 'serving') == ARGV[1] then return 'switched' end
if redis.call('HGET', KEYS[1], 'building') ~= ARGV[1] then return 'changed' end
redis.call('HSET', KEYS[1], 'retired:' .. redis.call('HGET', KEYS[1], 'serving'), 1,
  'serving', ARGV[1])
redis.call('HDEL', KEYS[1], 'building')
return 'switched'
