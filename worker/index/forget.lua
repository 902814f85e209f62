-- Deletes an image: its vector is zeroed in place and the cluster's epoch raised, so that caches
-- drop it. A living exact copy inherits the vector under its own sequence. The record stays as a
-- tombstone, so an older redelivered add gets its first verdict again.
-- Work: O(length of the image's cluster), which the hard limit bounds.
--
-- ARGV[2]  image id
-- ARGV[3]  first 16 bytes of the id's SHA-256
-- ARGV[4]  partition of the delete
-- ARGV[5]  offset of the delete
-- Returns  the sequence deleted now, or by this very delete before; 0 nothing to delete; -1 stale

if not served(ARGV[1]) then return -1 end
local partition, offset = tonumber(ARGV[4]), tonumber(ARGV[5])
local lookup = buckets_after(lookups())
local known = redis.call('HGET', lookup('id:', ARGV[3]), ARGV[3])
if not known then return 0 end
local sequence = tonumber(known)
local record = read_record(sequence)

if record.kind == DELETED and record.deleted_partition == partition
  and record.deleted_offset == offset then return sequence end
if life_at(ARGV[3], sequence, record, partition, offset) then return 0 end
if record.kind == DELETED then
  if record.deleted_partition ~= partition then
    remember(past_key(ARGV[3]), record.deleted_partition, record.deleted_offset, sequence)
  end
  record.deleted_partition, record.deleted_offset = partition, offset
  write_record(sequence, record)
  return 0
end

-- Rewrites the sequence of the vector in its cluster, or zeroes the record when there is no heir.
local function replace(heir)
  local cluster = struct.pack('>I4', record.where)
  local state = state_of(cluster)
  if not state then damaged('cluster ' .. number(record.where) .. ' is missing') end
  local wanted = struct.pack('<I8', sequence)
  for index = 0, math.floor((state.length - 1) / CHUNK) do
    local key = chunk_key(cluster, index)
    local chunk = redis.call('GET', key)
    if not chunk then
      damaged('records of cluster ' .. number(record.where) .. ' are missing')
    end
    for at = 1, #chunk, RECORD do
      if string.sub(chunk, at, at + 7) == wanted then
        if heir then
          redis.call('SETRANGE', key, at - 1, struct.pack('<I8', heir))
        else
          redis.call('SETRANGE', key, at - 1, string.rep('\0', RECORD))
          state.live = state.live - 1
        end
        state.epoch = state.epoch + 1
        write_state(cluster, state)
        if state.live * 2 < state.length then redis.call('SADD', prefix .. 'due', cluster) end
        return
      end
    end
  end
end

local copies = prefix .. 'copies:' .. record.sha
if record.kind == COPY then
  redis.call('ZREM', copies, number(sequence))
else
  local heir = redis.call('ZRANGE', copies, 0, 0)[1]
  local inherited = heir and read_record(tonumber(heir))
  local same_bytes = lookup('sha:', record.sha)
  replace(heir and tonumber(heir))
  if heir then
    redis.call('ZREM', copies, heir)
    redis.call('HSET', same_bytes, record.sha, heir)
    inherited.kind, inherited.where = LIVE, record.where
    write_record(tonumber(heir), inherited)
  else
    redis.call('HDEL', same_bytes, record.sha)
  end
end
record.kind, record.where = DELETED, 0
record.deleted_partition, record.deleted_offset = partition, offset
write_record(sequence, record)
return sequence
