-- Begins to fill another generation of a namespace, or goes on with one begun before. One that another
-- model was filling is given up, also where this model answers already.
--
-- ARGV[1]  name of the generation to begin: a fresh random name
-- ARGV[2]  model id
-- ARGV[3]  record layout version
-- ARGV[4]  centroid of the first cluster, 128 bytes
-- ARGV[5]  salt of the lookups: fresh random bytes
-- ARGV[6]  the generation that the caller has begun or gone on with before: no other will do; or empty
-- Returns  {'building', generation, history, given up}, {'serving', generation, history, given up} when
--          this model answers already, {'none'} when there is no such namespace, {'gone'} when the
--          generation asked for neither answers nor is being built: then nothing is begun
--          given up: the model of the generation that was being built until now, or ''

local root = redis.call('HMGET', KEYS[1], 'serving', 'building')
if ARGV[6] ~= '' and root[1] ~= ARGV[6] and root[2] ~= ARGV[6] then return {'gone'} end
if not root[1] then return {'none'} end

local function model_of(generation)
  return redis.call('HGET', KEYS[1], 'model:' .. generation) or ''
end

local function give_up()
  if not root[2] then return '' end
  redis.call('HSET', KEYS[1], 'retired:' .. root[2], 1)
  redis.call('HDEL', KEYS[1], 'building')
  return model_of(root[2])
end

if model_of(root[1]) == ARGV[2] then
  -- Who has switched to it leaves alone what others have begun since.
  return {'serving', root[1], history(), ARGV[6] == '' and give_up() or ''}
end
if root[2] and model_of(root[2]) == ARGV[2] then return {'building', root[2], history(), ''} end
local given_up = give_up()
redis.call('HSET', KEYS[1], 'building', ARGV[1])
found(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5])
return {'building', ARGV[1], history(), given_up}
