-- Keeps the first verdict given to each sequence and answers with it.
--
-- ARGV[2…] image id, sequence, verdict of at most 256 bytes; ...
-- Returns  the verdicts kept, '' where the sequence is not the image's; {} when the generation is
--          gone or the server's history is another

if not served(ARGV[1]) then return {} end

-- Images in one bucket are looked at, and written, in one go.
local buckets = {}
for at = 2, #ARGV, 3 do
  local sequence = tonumber(ARGV[at + 1])
  local key, first = record_key(sequence), field(sequence, 0)
  local bucket = buckets[key] or {places = {}, fields = {}}
  buckets[key] = bucket
  bucket.places[#bucket.places + 1] = at
  bucket.fields[#bucket.fields + 1] = first + 1
  bucket.fields[#bucket.fields + 1] = first + 2
end
local kept = {}
for key, bucket in pairs(buckets) do
  local stored = redis.call('HMGET', key, unpack(bucket.fields))
  local given, writes = {}, {}
  for i, at in ipairs(bucket.places) do
    local name, where = stored[2 * i - 1], bucket.fields[2 * i]
    local verdict = stored[2 * i] or given[where]
    if name ~= ARGV[at] then
      verdict = ''
    elseif not verdict then
      verdict = ARGV[at + 2]
      given[where] = verdict
      writes[#writes + 1] = where
      writes[#writes + 1] = verdict
    end
    kept[(at + 1) / 3] = verdict
  end
  if #writes > 0 then redis.call('HSET', key, unpack(writes)) end
end
return kept
