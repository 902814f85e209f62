-- Keeps the first verdict given to each sequence and answers with it.
--
-- ARGV[2…] image id, sequence, verdict of at most 256 bytes; ...
-- Returns  the verdicts kept, '' where the sequence is not the image's; {} when the generation is
--          gone or the server's history is another

if not served(ARGV[1]) then return {} end
local kept = {}
for at = 2, #ARGV, 3 do
  local sequence, verdict = tonumber(ARGV[at + 1]), ARGV[at + 2]
  local key, first = record_key(sequence), field(sequence, 0)
  local stored = redis.call('HMGET', key, first + 1, first + 2)
  if stored[1] ~= ARGV[at] then
    verdict = ''
  elseif stored[2] then
    verdict = stored[2]
  else
    redis.call('HSET', key, first + 2, verdict)
  end
  kept[#kept + 1] = verdict
end
return kept
