-- Keeps the first verdict given to a sequence and answers with it.
--
-- ARGV[2]  image id
-- ARGV[3]  sequence
-- ARGV[4]  verdict, at most 64 bytes
-- Returns  the verdict kept; '' when the sequence is not this image's; nothing when the generation
--          is gone or the server's history is another

if not served(ARGV[1]) then return nil end
local sequence = tonumber(ARGV[3])
if image_name(sequence) ~= ARGV[2] then return '' end
if redis.call('HSETNX', record_key(sequence), field(sequence, 2), ARGV[4]) == 1 then
  return ARGV[4]
end
return redis.call('HGET', record_key(sequence), field(sequence, 2))
