-- Opens a namespace: makes its first generation with one cluster when there is none.
--
-- ARGV[1]  generation to create when the namespace is new: a fresh random name
-- ARGV[2]  model id
-- ARGV[3]  record layout version
-- ARGV[4]  centroid of the first cluster, 128 bytes
-- ARGV[5]  salt of the lookups: fresh random bytes
-- Returns  {serving generation, its model id, its layout, history, policy of eviction or ''}

local root = {redis.call('HGET', KEYS[1], 'serving')}
if not root[1] then
  redis.call('HSET', KEYS[1], 'serving', ARGV[1])
  found(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5])
  root[1] = ARGV[1]
end
return {
  root[1], redis.call('HGET', KEYS[1], 'model:' .. root[1]),
  redis.call('HGET', KEYS[1], 'layout:' .. root[1]), history(), evicting(),
}
